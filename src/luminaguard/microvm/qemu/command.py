"""QEMU's command lines, as pure functions of what the machine is made of.

The device list is the same for a boot and a clone, because a saved device state only fits the
machine that it came from. There is no network device, ever. Every file is an inherited descriptor:
QEMU sees no path of the host but its own firmware; its program comes from the caller.
"""

from __future__ import annotations

from luminaguard.microvm import guest_kernel

__all__ = ["TRANSLATION_MIB", "boot_command", "clone_command", "kernel_command_line"]

TRANSLATION_MIB = 256
"""Of translated code that an emulating QEMU keeps, at most."""

_SANDBOX = "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"
_KERNEL_OPTIONS = f"{guest_kernel.OPTIONS} reboot=t"


def kernel_command_line(accelerator: str, tsc_khz: int) -> str:
    """The guest kernel's command line.

    Under TCG the kernel cannot calibrate the counter (hardware-reduced ACPI hides the PIT), so it
    is told the host's frequency; under KVM it asks kvmclock. Mitigations of processor bugs are off
    under TCG: emulated code does not speculate, and page table isolation would empty the emulated
    TLB at every system call.
    """
    if accelerator == "tcg":
        return f"{_KERNEL_OPTIONS} tsc_early_khz={tsc_khz} tsc=reliable mitigations=off"
    return f"{_KERNEL_OPTIONS} {guest_kernel.MITIGATIONS}"


def boot_command(
    firmware: str, accelerator: str, memory_mib: int, *, ram: int, channel: int, control: int,
    disks: tuple[int, ...], kernel: int, initramfs: int, append: str,
) -> list[str]:  # fmt: skip
    """Boot a kernel, with the guest's RAM in the shared memfd ``ram``."""
    return [
        *_machine(firmware, accelerator, memory_mib, ram, "on", channel, control, disks),
        "-kernel", f"/proc/self/fd/{kernel}",
        "-initrd", f"/proc/self/fd/{initramfs}",
        "-append", append,
    ]  # fmt: skip


def clone_command(
    firmware: str, accelerator: str, memory_mib: int, *, ram: int, channel: int, control: int,
    disks: tuple[int, ...],
) -> list[str]:  # fmt: skip
    """Wait for a saved device state, over a private (copy-on-write) mapping of ``ram``."""
    return [
        *_machine(firmware, accelerator, memory_mib, ram, "off", channel, control, disks),
        "-S", "-incoming", "defer",
    ]  # fmt: skip


def _machine(
    firmware: str, accelerator: str, memory_mib: int, ram: int, share: str, channel: int, control: int,
    disks: tuple[int, ...],
) -> list[str]:  # fmt: skip
    command = [
        "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot",
        "-bios", firmware,
        "-sandbox", _SANDBOX,
        "-M", "microvm,acpi=on,isa-serial=off,memory-backend=mem,dump-guest-core=off",
        "-accel", f"tcg,tb-size={TRANSLATION_MIB}" if accelerator == "tcg" else accelerator,
        "-object", f"memory-backend-file,id=mem,size={memory_mib}M,mem-path=/proc/self/fd/{ram},share={share}",
        "-cpu", "Nehalem,+arat,+rdrand,+smep,+smap,-spec-ctrl" if accelerator == "tcg" else "host",
        "-smp", "1", "-m", str(memory_mib),
        "-device", "virtio-serial-device,max_ports=2",
        "-chardev", f"socket,id=agent,fd={channel}",
        "-device", "virtserialport,chardev=agent,name=lumina.agent,nr=1",
        "-chardev", f"socket,id=control,fd={control}",
        "-mon", "chardev=control,mode=control",
        "-device", "virtio-rng-device",
    ]  # fmt: skip
    for index, disk in enumerate(disks):
        command += [
            "-add-fd", f"fd={disk},set={index + 1}",
            "-blockdev", f"driver=file,node-name=file{index},filename=/dev/fdset/{index + 1},read-only=on,locking=off",
            "-blockdev", f"driver=raw,node-name=disk{index},file=file{index},read-only=on",
            "-device", f"virtio-blk-device,drive=disk{index}",
        ]  # fmt: skip
    return command

"""Run the tests marked ``firecracker`` against a real Firecracker, in a machine made for it where KVM is missing.

``make firecracker-lab`` (LUMINAGUARD_FIRECRACKER and LUMINAGUARD_JAILER, or PATH, name the two programs).

Where KVM runs guest code, pytest runs right here. Elsewhere an emulated machine with nested SVM is
booted from the guest image's own kernel and root, with this tree, its Python packages and the two
programs on a second disk; the tests run in it, and their words come out on its console. One boot in
the inner machine takes tens of seconds there: the lab shows what works, never how fast.

Exit status: pytest's own; 77 when there is no Firecracker, which is no pass.
"""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

from luminaguard.errors import LuminaGuardError
from luminaguard.images import cpio, deb, kernel, lock, spec
from luminaguard.images.build import ImageStore
from luminaguard.images.manifest import ROOT, Image
from luminaguard.microvm import guest_kernel
from luminaguard.microvm.firecracker.probe import Firecracker, find_firecracker
from luminaguard.microvm.qemu.probe import find_qemu, probe_kvm, tsc_khz

NOT_RUN = 77
TREE = Path(__file__).resolve().parent.parent
MODULES = (*spec.KERNEL_MODULES, "kvm_amd")
PROGRAMS = ("bwrap", "setpriv", "prlimit", "flock", "mksquashfs")  # what the guest image has no use for
MEMORY_MIB = 4096
TIME_LIMIT_S = 3000
_END = re.compile(rb"lab ended with status (\d+)")

INIT = r"""#!/bin/busybox sh
b=/bin/busybox
trap '$b poweroff -f' EXIT
set -eu
$b mount -t devtmpfs dev /dev
$b mount -t proc proc /proc
for m in {modules}; do $b insmod "/modules/$m.ko"; done
exec > /dev/hvc0 2>&1
$b mkdir /lower /payload /upper /new
$b mount -t squashfs -o ro /dev/vda /lower
$b mount -t squashfs -o ro /dev/vdb /payload
$b mount -t tmpfs -o mode=755,size=2g tmpfs /upper
$b mkdir /upper/data /upper/work
$b mount -t overlay -o lowerdir=/payload/host:/lower,upperdir=/upper/data,workdir=/upper/work overlay /new
$b mkdir -p /new/payload /new/lab
$b mount --move /payload /new/payload
$b mount -t proc proc /new/proc
$b mount -t sysfs sysfs /new/sys
$b mount -t cgroup2 cgroup2 /new/sys/fs/cgroup
$b mount --move /dev /new/dev
$b mkdir -p /new/dev/pts /new/dev/shm /new/srv
$b mount -t devpts devpts /new/dev/pts
$b mount -t tmpfs tmpfs /new/dev/shm
$b mount -t tmpfs -o mode=755,size=2g tmpfs /new/srv
$b mkdir -p /new/srv/home/cache/images
$b cp /new/payload/home/cache/images/current /new/srv/home/cache/images/
$b ln -s /payload/home/cache/images/{image} /new/srv/home/cache/images/{image}
status=0
$b chroot /new /usr/bin/env -i {environment} {command} || status=$?
echo "lab ended with status $status"
$b sleep 1
"""


def main() -> int:
    """Find the programs, choose the way, return the exit status."""
    names = [os.environ.get(f"LUMINAGUARD_{name}", name.lower()) for name in ("FIRECRACKER", "JAILER")]
    try:
        firecracker = find_firecracker(*names)
    except LuminaGuardError as error:
        print(f"firecracker-lab: not run: {error.message} {error.hint}")
        return NOT_RUN
    version = ".".join(map(str, firecracker.version))
    pytest = ["-m", "pytest", "-v", "-m", "firecracker", "-p", "no:cacheprovider", *sys.argv[1:]]
    if probe_kvm().usable and os.geteuid() == 0:
        print(f"firecracker-lab: Firecracker {version} on this machine's KVM", flush=True)
        environment = os.environ | {
            "LUMINAGUARD_FIRECRACKER": firecracker.path,
            "LUMINAGUARD_JAILER": firecracker.jailer,
        }
        return subprocess.run([sys.executable, *pytest], cwd=TREE, env=environment, check=False).returncode
    print(f"firecracker-lab: Firecracker {version} in an emulated machine with nested SVM", flush=True)
    cache = Path(os.environ.get("LUMINAGUARD_TEST_CACHE", Path.home() / ".cache" / "luminaguard-tests")) / "cache"
    with tempfile.TemporaryDirectory(prefix="luminaguard-lab-") as folder:
        return emulate(Path(folder), ImageStore(cache), firecracker, pytest)


def emulate(folder: Path, images: ImageStore, firecracker: Firecracker, pytest: list[str]) -> int:
    """Boot the outer machine and return what the tests in it ended with."""
    image = images.current()
    print("firecracker-lab: packing this tree and its packages", flush=True)
    payload, initramfs = folder / "payload.squashfs", folder / "initramfs"
    pack(payload, image, firecracker)
    vmlinux = make_initramfs(initramfs, images, image, pytest)
    (folder / "vmlinux").write_bytes(vmlinux)
    qemu = find_qemu("qemu-system-x86_64")
    append = f"{guest_kernel.OPTIONS} reboot=t mitigations=off tsc_early_khz={tsc_khz()} tsc=reliable".replace(
        "oops=panic", ""
    ).replace("lockdown=integrity", "")
    command = [
        qemu.path, "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot", "-bios", qemu.firmware,
        "-M", "microvm,accel=tcg,acpi=on,isa-serial=off", "-cpu", "max", "-smp", "2", "-m", str(MEMORY_MIB),
        "-kernel", str(folder / "vmlinux"), "-initrd", str(initramfs), "-append", append,
        "-device", "virtio-rng-device", "-device", "virtio-serial-device",
        "-chardev", "stdio,id=console,signal=off", "-device", "virtconsole,chardev=console",
    ]  # fmt: skip
    for name, path in (("root", image.folder / ROOT), ("payload", payload)):
        command += ["-drive", f"if=none,id={name},file={path},format=raw,readonly=on",
                    "-device", f"virtio-blk-device,drive={name}"]  # fmt: skip
    print("firecracker-lab: booting", flush=True)
    return follow(command)


def follow(command: list[str]) -> int:
    """Show what the machine prints until it ends; its exit status is in its last words."""
    status = 1
    # It ends with whoever started it, however that ends, and after its time.
    with subprocess.Popen(
        ["setpriv", "--pdeathsig", "KILL", "--", *command], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        limit = threading.Timer(TIME_LIMIT_S, process.kill)
        limit.start()
        try:
            for line in process.stdout:
                sys.stdout.buffer.write(line)
                sys.stdout.flush()
                if ended := _END.search(line):
                    status = int(ended[1])
        finally:
            process.kill()
            limit.cancel()
    return status


def make_initramfs(target: Path, images: ImageStore, image: Image, pytest: list[str]) -> bytes:
    """Write an initramfs that loads KVM and runs the tests; return the kernel."""
    shipped = lock.shipped()
    packages = shipped if shipped is not None else lock.resolve()
    files = {package: images.packages / package.filename for package in packages.packages}
    found = kernel.extract((files[p] for p in packages.role("kernel")), [MODULES])
    archive = cpio.Newc()
    for folder in ("bin", "dev", "proc", "modules"):
        archive.add(folder, 0o040755, b"")
    for package in packages.role("initramfs"):
        for member, data in deb.data_members(files[package]):
            if member.isreg() and member.name.endswith("/bin/busybox"):
                archive.add("bin/busybox", 0o100755, data)
    environment = {
        "PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "HOME": "/lab", "LANG": "C.UTF-8", "TMPDIR": "/srv",
        "PYTHONPATH": "/payload/tree/src:/payload/packages", "PYTHONDONTWRITEBYTECODE": "1",
        "LUMINAGUARD_FIRECRACKER": "/payload/bin/firecracker", "LUMINAGUARD_JAILER": "/payload/bin/jailer",
        "LUMINAGUARD_TEST_CACHE": "/srv/home", "LUMINAGUARD_TEST_PREBUILT": "1", "TERM": "dumb",
    }  # fmt: skip
    words = ["/usr/bin/python3", *pytest, "--rootdir", "/payload/tree", "-c", "/payload/tree/pyproject.toml",
             "-o", "tmp_path_retention_policy=none",
             "--timeout", "900", "--basetemp", "/srv/pytest", "/payload/tree/tests"]  # fmt: skip
    init = INIT.replace("{image}", image.folder.name).replace(
        "{modules}", " ".join(name for name, _ in found.modules[0])
    )
    init = init.replace("{environment}", " ".join(f"{key}={value}" for key, value in environment.items()))
    archive.add("init", 0o100755, init.replace("{command}", " ".join(f"'{word}'" for word in words)).encode())
    for name, data in found.modules[0]:
        archive.add(f"modules/{name}.ko", 0o100644, data)
    target.write_bytes(archive.finish())
    return found.elf


def pack(target: Path, image: Image, firecracker: Firecracker) -> None:
    """A disk with this tree, the Python packages, the programs with their libraries, and the guest image."""
    command = ["mksquashfs", "-", str(target), "-tar", "-comp", "lz4", "-no-xattrs", "-root-mode", "755", "-quiet",
               "-no-progress"]  # fmt: skip
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL) as process:
        assert process.stdin is not None
        with tarfile.open(fileobj=process.stdin, mode="w|", format=tarfile.PAX_FORMAT, dereference=True) as tar:
            for source, name in contents(image, firecracker):
                tar.add(source, name, recursive=False, filter=_of_root)
            current = tarfile.TarInfo("home/cache/images/current")
            text = f"{image.folder.name}\n".encode()
            current.size = len(text)
            tar.addfile(current, io.BytesIO(text))
        process.stdin.close()
        if process.wait():
            raise SystemExit("firecracker-lab: mksquashfs failed")


def contents(image: Image, firecracker: Firecracker) -> Iterator[tuple[Path, str]]:
    """What goes onto the disk, and under which name."""
    for folder in ("src", "tests"):
        yield from _below(TREE / folder, f"tree/{folder}")
    yield TREE / "pyproject.toml", "tree/pyproject.toml"
    packages = Path(sysconfig.get_paths()["platlib"])
    for path, name in _below(packages, "packages"):
        if not re.match(r"packages/(mypy|mypyc|ruff|pip|setuptools|grimp|.*mypyc)", name):
            yield path, name
    yield from ((Path(path), f"bin/{name}") for path, name in ((firecracker.path, "firecracker"),
                                                                 (firecracker.jailer, "jailer")))  # fmt: skip
    for path in _programs():
        folder = "lib/x86_64-linux-gnu" if ".so" in path.name else "bin"
        yield path, f"host/usr/{folder}/{path.name}"
    for path, name in _below(image.folder, f"home/cache/images/{image.folder.name}"):
        yield path, name


def _programs() -> Iterator[Path]:
    libraries: set[str] = set()
    for program in PROGRAMS:
        path = next(p for d in os.environ["PATH"].split(":") if (p := Path(d, program)).exists())
        yield path
        said = subprocess.run(["ldd", str(path)], capture_output=True, text=True, check=True).stdout
        libraries |= set(re.findall(r"=> (/\S+)", said))
    for library in sorted(libraries):
        if not re.match(r"(libc|libm|ld-linux)[-.]", os.path.basename(library)):
            yield Path(library)


def _below(folder: Path, name: str) -> Iterator[tuple[Path, str]]:
    for path in sorted(folder.rglob("*")):
        if "__pycache__" not in path.parts or folder.name == "site-packages":
            yield path, f"{name}/{path.relative_to(folder)}"


def _of_root(info: tarfile.TarInfo) -> tarfile.TarInfo:
    info.uid = info.gid = 0
    info.uname = info.gname = ""
    return info


if __name__ == "__main__":
    sys.exit(main())

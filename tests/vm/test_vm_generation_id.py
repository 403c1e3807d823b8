"""The kernel that is built here is told by the virtual machine generation ID that it runs as a copy.

Our own machines (``-M microvm``) have no such device under QEMU 7.2, and get their entropy from the agent
when they wake. A hypervisor that has one announces the copy to the kernel itself. So the same kernel, with the
same command line, is booted on a ``q35`` here, saved, and copied as our machines are.

A kernel without drivers for that machine's ports and buses can say nothing. Its only program keeps what it
sees in its own memory, where the host reads it: the kernel's log, and a random number in each round.
"""

import itertools
import os
import socket
import stat
import struct
import subprocess
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from uuid import UUID, uuid4

import anyio
import pytest

from luminaguard.errors import MachineError
from luminaguard.images.cpio import Newc
from luminaguard.images.elf import MAGIC, X86_64
from luminaguard.images.manifest import KERNEL, Image
from luminaguard.microvm.jail import Jail, Limits, Program
from luminaguard.microvm.qemu.backend import QemuMachine
from luminaguard.microvm.qemu.command import kernel_command_line
from luminaguard.microvm.qemu.probe import Qemu, find_qemu, tsc_khz
from luminaguard.microvm.qemu.qmp import Qmp
from luminaguard.runtime import Runtime

pytestmark = pytest.mark.vm

TOLD = "random: crng reseeded due to virtual machine fork"
RUNNING = "Run /init as init process"
MEMORY_MIB = 128
LIMITS = Limits(memory_bytes=768 << 20, address_bytes=4 << 30)
DEADLINE_S = 60
QUIET_ROUNDS = 50  # a copy that is told hears of it within two
SOME_ROUNDS = 10

# The program's memory: a page of code, one of facts (a mark, the count of rounds), numbers and the log.
CODE, FACTS, NUMBERS, LOG = 0x400000, 0x401000, 0x402000, 0x412000
MARK = b"luminaguard-seen"
ROUNDS, LOGGED = FACTS + len(MARK), FACTS + len(MARK) + 8  # how many, and how long the log is
NUMBER_BYTES, NUMBERS_KEPT, LOG_BYTES, PAGE = 16, 4096, 1 << 16, 4096
OPEN, IOCTL, NANOSLEEP, SYSLOG, MKNOD, GETRANDOM = 2, 16, 35, 103, 133, 318  # of x86-64
READ_ALL, RESEED = 3, 0x5207  # SYSLOG_ACTION_READ_ALL of syslog(2), RNDRESEEDCRNG of random(4)
EVERY_NS = 10_000_000
ENTRY, PAUSE, NODE = 0x100, 0x300, 0x310  # in the page of code


def program() -> bytes:
    """A static program, by hand: no compiler is needed for a few system calls.

    The log is read before a number is drawn: when it tells of the copy, the number was drawn after that.
    Early after its boot a kernel reseeds every second by itself; that begins anew with the first of the calls.
    """
    first = b"".join((
        call(MKNOD, CODE + NODE, stat.S_IFCHR | 0o600, os.makedev(1, 9)),
        call(OPEN, CODE + NODE, os.O_RDWR),
        b"\x89\xc7",  # mov edi, eax
        call(IOCTL, None, RESEED),
        b"\x31\xdb",  # xor ebx, ebx
    ))  # fmt: skip
    again = b"".join((
        call(SYSLOG, READ_ALL, LOG, LOG_BYTES),
        b"\x48\x89\x04\x25" + struct.pack("<I", LOGGED),  # mov [LOGGED], rax
        b"\x48\x8d\xbb" + struct.pack("<I", NUMBERS),  # lea rdi, [rbx + NUMBERS]
        call(GETRANDOM, None, NUMBER_BYTES, 0),
        b"\x83\xc3" + bytes((NUMBER_BYTES,)),  # add ebx, NUMBER_BYTES
        b"\x81\xe3" + struct.pack("<I", NUMBER_BYTES * NUMBERS_KEPT - 1),  # and ebx, all of them - 1
        b"\x48\xff\x04\x25" + struct.pack("<I", ROUNDS),  # inc qword [ROUNDS]
        call(NANOSLEEP, CODE + PAUSE, 0),
    ))  # fmt: skip
    jump = b"\xe9" + struct.pack("<i", -(len(again) + 5))  # jmp again
    header = (
        (MAGIC + b"\1").ljust(16, b"\0")
        + struct.pack("<H2sIQQQIHHHHHH", 2, X86_64, 1, CODE + ENTRY, 64, 0, 0, 64, 56, 2, 0, 0, 0)
        + segment(5, 0, CODE, PAGE)
        + segment(6, PAGE, FACTS, LOG + LOG_BYTES - FACTS)
    )
    code = header.ljust(ENTRY, b"\0") + first + again + jump
    assert len(code) <= PAUSE
    code = code.ljust(PAUSE, b"\0") + struct.pack("<QQ", 0, EVERY_NS) + b"/urandom\0"
    return code.ljust(PAGE, b"\0") + MARK.ljust(PAGE, b"\0")


def call(number: int, *arguments: int | None) -> bytes:
    """A system call; None leaves a register as it is."""
    registers = zip((b"\xbf", b"\xbe", b"\xba"), arguments, strict=False)  # mov edi / esi / edx, ...
    loads = b"".join(load + struct.pack("<I", value) for load, value in registers if value is not None)
    return loads + b"\xb8" + struct.pack("<I", number) + b"\x0f\x05"  # mov eax, number; syscall


def segment(flags: int, offset: int, address: int, in_memory: int) -> bytes:
    """A PT_LOAD header for a page of the file; elf(5)."""
    return struct.pack("<IIQQQQQQ", 1, flags, offset, address, address, PAGE, in_memory, PAGE)


@dataclass
class Guest:
    """A machine in which the program runs."""

    machine: QemuMachine
    qmp: Qmp
    seen: int

    async def read(self, address: int, size: int) -> bytes:
        """Some of the program's memory, once it is there.

        It is the only program, so the processor has its page tables, but for moments in which the kernel
        changes its own code.
        """
        place = f"/proc/self/fd/{self.seen}"
        while True:
            try:
                await self.qmp.execute("memsave", val=address, size=size, filename=place)
                return os.pread(self.seen, size, 0)
            except MachineError:
                if not self.machine.process.running:
                    raise
            await anyio.sleep(0.02)

    async def rounds(self) -> int:
        """How many rounds the program has made; 0 while something else is at its addresses, before it runs."""
        mark, rounds = struct.unpack(f"<{len(MARK)}sQ", await self.read(FACTS, len(MARK) + 8))
        return int(rounds) if mark == MARK else 0

    async def until_round(self, wanted: int) -> None:
        """Wait until the program has made so many rounds."""
        while await self.rounds() < wanted:
            await anyio.sleep(0.02)

    async def log(self) -> str:
        """The kernel's log as the program has read it last."""
        size = int.from_bytes(await self.read(LOGGED, 8), "little")
        assert size < LOG_BYTES  # nothing was left out
        return (await self.read(LOG, size)).decode()

    async def until_told(self) -> None:
        """Wait until the log tells that this is a copy."""
        while TOLD not in await self.log():
            await anyio.sleep(0.02)

    async def numbers(self, since: int) -> set[bytes]:
        """The random numbers that were drawn in a few rounds from this one on, counted from 0.

        The kernel draws from the same sequence, at times of its own: copies that go the same way need not
        have a number in the same round.
        """
        places = [NUMBERS + n % NUMBERS_KEPT * NUMBER_BYTES for n in range(since, since + SOME_ROUNDS)]
        return {await self.read(place, NUMBER_BYTES) for place in places}


class Lab:
    """Boots the kernel on a machine with a generation ID, and copies that machine."""

    def __init__(self, qemu: Qemu, image: Image, stack: ExitStack) -> None:
        searched = subprocess.run((qemu.path, "-L", "help"), capture_output=True, text=True, check=True, timeout=10)
        firmware = {os.path.realpath(folder) for folder in searched.stdout.splitlines() if Path(folder).is_dir()}
        self._program = Program(qemu.path, (*qemu.folders, *sorted(firmware)), (), ("/dev/null", "/dev/urandom"))
        self._stack = stack
        self._kernel = image.open_part(KERNEL)
        stack.callback(os.close, self._kernel)
        self._initramfs, self._ram, self._state = (self._memory(name) for name in ("initramfs", "ram", "state"))
        archive = Newc()
        archive.add("init", 0o100755, program())
        os.write(self._initramfs, archive.finish())
        os.ftruncate(self._ram, MEMORY_MIB << 20)
        self._numbers = itertools.count()

    @asynccontextmanager
    async def boot(self, generation: UUID) -> AsyncIterator[Guest]:
        """A machine whose program runs."""
        arguments = (
            "-kernel", f"/proc/self/fd/{self._kernel}", "-initrd", f"/proc/self/fd/{self._initramfs}",
            "-append", kernel_command_line("tcg", tsc_khz()),
        )  # fmt: skip
        async with self._start(generation, "on", arguments, (self._kernel, self._initramfs)) as guest:
            await guest.machine.handshake()
            await guest.until_round(1)
            yield guest

    async def save(self, guest: Guest) -> int:
        """Stop a machine for copies of it; the count of its rounds."""
        await guest.machine.save(self._state)
        return await guest.rounds()

    @asynccontextmanager
    async def copy(self, generation: UUID) -> AsyncIterator[Guest]:
        """A running copy of the machine that was saved."""
        state = os.open(f"/proc/self/fd/{self._state}", os.O_RDONLY)  # with an offset of its own
        try:
            async with self._start(generation, "off", ("-S", "-incoming", "defer"), (state,)) as guest:
                await guest.machine.restore(state)
                await guest.machine.resume()
                yield guest
        finally:
            os.close(state)

    def _memory(self, name: str) -> int:
        fd = os.memfd_create(name)
        self._stack.callback(os.close, fd)
        return fd

    @asynccontextmanager
    async def _start(
        self, generation: UUID, share: str, arguments: tuple[str, ...], inherited: tuple[int, ...]
    ) -> AsyncIterator[Guest]:
        monitor, control = socket.socketpair()
        monitor.setblocking(False)
        name, seen = f"generation-{os.getpid()}-{next(self._numbers)}", self._memory("seen")
        ram = f"/proc/self/fd/{self._ram}"
        command = [
            "-name", name, "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot",
            "-M", "q35,memory-backend=mem", "-accel", "tcg,tb-size=64", "-m", str(MEMORY_MIB),
            "-object", f"memory-backend-file,id=mem,mem-path={ram},size={MEMORY_MIB}M,share={share}",
            "-cpu", "Nehalem,+arat,+rdrand,+smep,+smap,-spec-ctrl",
            "-chardev", f"socket,id=control,fd={control.fileno()}", "-mon", "chardev=control,mode=control",
            "-device", f"vmgenid,guid={generation}", *arguments,
        ]  # fmt: skip
        with monitor, control:
            fds = (self._ram, seen, control.fileno(), *inherited)
            async with Jail().start(name, self._program, command, fds, LIMITS) as process:
                control.close()
                qmp = Qmp(monitor)
                machine = QemuMachine(process, monitor, qmp)
                try:
                    yield Guest(machine, qmp, seen)
                except (MachineError, TimeoutError) as error:
                    error.add_note(await machine.diagnosis())
                    raise


@pytest.fixture
def lab(runtime: Runtime) -> Iterator[Lab]:
    image = runtime.images.current()
    if image.manifest.kernel != "hardened":
        pytest.skip("the test image has the distribution's kernel")
    with ExitStack() as stack:
        yield Lab(find_qemu(runtime.settings.qemu), image, stack)


def test_copies_with_ids_of_their_own_are_told_and_draw_other_numbers(lab: Lab) -> None:
    async def see() -> None:
        with anyio.fail_after(DEADLINE_S):
            async with lab.boot(uuid4()) as origin:
                await lab.save(origin)
                log = await origin.log()
                assert RUNNING in log
                assert TOLD not in log
            async with lab.copy(uuid4()) as one, lab.copy(uuid4()) as other:
                both = (one, other)
                for copy in both:
                    await copy.until_told()
                    assert (await copy.log()).startswith(log)
                since = max([await copy.rounds() for copy in both]) + 1
                for copy in both:
                    await copy.until_round(since + SOME_ROUNDS)
                assert not await one.numbers(since) & await other.numbers(since)
                assert [(await copy.log()).count(TOLD) for copy in both] == [1, 1]

    anyio.run(see)


def test_copies_that_keep_the_id_are_not_told_and_draw_the_same_numbers(lab: Lab) -> None:
    """That it is the ID which makes the difference, and that there is something to be afraid of."""

    async def see() -> None:
        generation = uuid4()
        with anyio.fail_after(DEADLINE_S):
            async with lab.boot(generation) as origin:
                saved = await lab.save(origin)
            async with lab.copy(generation) as one, lab.copy(generation) as other:
                both = (one, other)
                for copy in both:
                    await copy.until_round(saved + QUIET_ROUNDS)
                    log = await copy.log()
                    assert RUNNING in log
                    assert TOLD not in log
                # The first number may have been drawn before they were copied.
                assert await one.numbers(saved + 1) & await other.numbers(saved + 1)

    anyio.run(see)

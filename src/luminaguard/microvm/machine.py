"""A micro-VM as the rest of LuminaGuard sees it: wake it, run commands in it, take the changes out.

A machine is made by :func:`boot` or :func:`clone`, lives in that context, and is destroyed at its
end, whatever happened. A clone is woken before it is handed out: clock, entropy, host name and
machine id are its own, because it was copied from a machine that other clones were copied from too.
"""

from __future__ import annotations

import base64
import json
import secrets
import socket
import struct
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol, runtime_checkable

import anyio

from luminaguard import log
from luminaguard.errors import GuestProtocolError, GuestUnresponsive, MachineError
from luminaguard.guest import frames
from luminaguard.microvm.channel import Call, CallFailed, GuestChannel, open_channel
from luminaguard.microvm.jail import JailedProcess
from luminaguard.microvm.port import BootSource, Hypervisor, ProcessInfo, SavedMachine, VirtualMachine
from luminaguard.microvm.relay import RelayedConnection, serving
from luminaguard.microvm.tracker import State, Tracked, VMTracker

__all__ = ["DISKS", "Command", "LayerEntry", "MicroVM", "Outcome", "Owned", "Terminal", "all_disks", "boot", "clone",
           "new_id", "watch"]  # fmt: skip

BOOT_TIMEOUT_S = 60.0
CALL_TIMEOUT_S = 20.0
CHANGES_SILENCE_S = 30.0
WATCH_S = 5.0
DISKS = 4
"""The root, a workspace, a layer on it, and programs that the root has not."""
FIRST_UID, UIDS = 100_000, 900_000
"""Numbers of users: above all that distributions give away, and of six digits, for which ar and ustar have room."""
_MAX_META = 32 << 10
_ENTRY_TYPES = frozenset({"file", "dir", "symlink", "whiteout", "other"})
_PATH = "/usr/bin:/bin"

Profile = Literal["strict", "default", "build"]
"""Which system calls a command may make; see :mod:`luminaguard.guest.filters`."""
Output = Callable[[int, bytes], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class Terminal:
    """The size of a terminal in characters."""

    rows: int
    columns: int


@dataclass(frozen=True, slots=True)
class Command:
    """What to run, and within which limits."""

    argv: Sequence[str]
    cwd: str = "/workspace"
    terminal: Terminal | None = None
    environment: Mapping[str, str] | None = None
    profile: Profile = "default"
    processes: int = 256
    max_file_bytes: int = 1 << 40

    def within(self, environment: Mapping[str, str]) -> Command:
        """The same command where an image sets variables of its own; what the command sets is kept."""
        return replace(self, environment={**environment, **(self.environment or {})}) if environment else self

    def params(self) -> dict[str, Any]:
        """The parameters of the protocol's ``exec`` call."""
        environment = {
            "PATH": _PATH, "HOME": "/home/user", "USER": "user", "LOGNAME": "user",
            "LANG": "C.UTF-8", "TMPDIR": "/tmp",  # noqa: S108  # the guest's, not ours
            # Byte code is no effect that anyone wants to review. (Another place for it, PYTHONPYCACHEPREFIX, would
            # also be the only one that is looked at: the image's own would count for nothing.)
            "PYTHONDONTWRITEBYTECODE": "1",
            **(self.environment or {}),
        }  # fmt: skip
        size = self.terminal
        return {
            "argv": list(self.argv),
            "cwd": self.cwd,
            "env": environment,
            "tty": {"rows": size.rows, "columns": size.columns} if size else None,
            "profile": self.profile,
            "limits": {"pids": self.processes, "nofile": 4096, "fsize": self.max_file_bytes},
        }


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a command ended."""

    exit_code: int
    signal: int | None = None
    out_of_memory: bool = False
    timed_out: bool = False


@dataclass(frozen=True, slots=True)
class LayerEntry:
    """One entry of the overlay's upper layer as the guest reports it: unchecked but for its shape."""

    path: str
    kind: str
    mode: int
    size: int
    target: str
    opaque: bool


@runtime_checkable
class Owned(Protocol):
    """A machine of this process's own."""

    @property
    def process(self) -> JailedProcess:
        """The hypervisor's process, which can be waited for and killed."""
        ...

    async def check(self) -> None:
        """Raise MachineError unless the hypervisor answers within seconds."""
        ...


class _Machine(Protocol):
    """What a micro-VM needs of its machine: its own, or one that another process lends."""

    @property
    def process(self) -> ProcessInfo: ...

    @property
    def channel(self) -> socket.socket: ...


class MicroVM:
    """A running, woken machine."""

    def __init__(
        self, vm_id: str, machine: _Machine, channel: GuestChannel, tracked: Tracked | None = None,
        *, backend: str, accelerator: str, boot_id: str = "",
    ) -> None:  # fmt: skip
        self.id = vm_id
        self.backend = backend
        self.accelerator = accelerator
        self.boot_id = boot_id
        self.uid = 0
        self._machine = machine
        self._channel = channel
        self.tracked = tracked

    @property
    def process(self) -> ProcessInfo:
        """The hypervisor's process."""
        return self._machine.process

    async def ended(self) -> None:
        """Wait until the hypervisor has ended; see :func:`watch`."""
        assert isinstance(self._machine, Owned), "only the owner of a machine can wait for it"
        await watch(self._machine, self.id)

    def hand_over(self) -> tuple[socket.socket, int]:
        """Stop talking to the guest: the channel's socket, and the number of the next call, for who goes on.

        Raises:
            GuestProtocolError: the guest is in the middle of a frame.
        """
        self._state("running")
        return self._machine.channel, self._channel.release()

    async def wake(
        self, *, layer: bool = False, packages: bool = False, upper_mib: int = 0, randomize: bool = True
    ) -> None:
        """Give the clone its own clock, entropy, names and user, and mount the workspace.

        Args:
            layer: whether the third disk lies on the second one.
            packages: whether the fourth disk has programs.
            upper_mib: only for the machine that clones are copied from, which gets no workspace:
                how much the clones may change, in MiB.
            randomize: for that machine too: whether commands get random addresses.
        """
        self.uid = FIRST_UID + secrets.randbelow(UIDS)
        call = await self._channel.call(
            "wake",
            {
                "time_ns": time.time_ns(),
                "entropy": base64.b64encode(secrets.token_bytes(64)).decode(),
                "hostname": self.id,
                "machine_id": secrets.token_hex(16),
                "uid": self.uid,
                "workspace": not upper_mib,
                "layer": layer,
                "packages": packages,
                "upper_size": f"{upper_mib}m",
                "randomize": randomize,
            },
        )
        self.boot_id = str((await _answer(call, CALL_TIMEOUT_S)).get("boot_id", ""))[:64]
        self._state("ready")

    def _state(self, state: State) -> None:
        if self.tracked is not None:
            self.tracked.update(state=state)

    async def rest(self) -> None:
        """Undo :meth:`wake` after a rehearsal: unmount the workspace and make the next command ready."""
        await _answer(await self._channel.call("rest", {}), CALL_TIMEOUT_S)
        self._state("ready")

    async def inspect(self, settings: Sequence[str]) -> tuple[dict[str, str], dict[str, str]]:
        """What the guest's kernel is set to, as its PID 1 sees it.

        Args:
            settings: names below /proc/sys; one that the kernel does not have is missing in the answer.

        Returns:
            The settings, and ``cmdline``, ``mounts``, ``modules``, ``lockdown`` and ``landlock``.

        Raises:
            GuestProtocolError: the answer is not of this form.
        """
        result = await _answer(await self._channel.call("inspect", {"settings": list(settings)}), CALL_TIMEOUT_S)
        found, facts = result.get("settings"), result.get("facts")
        if not isinstance(found, dict) or not isinstance(facts, dict):
            raise _malformed("no settings")
        return (
            {str(name): str(value)[:200] for name, value in found.items()},
            {str(name): str(value)[: 1 << 16] for name, value in facts.items()},
        )

    async def start(self, command: Command) -> Call:
        """Start a command and return the call, for a caller that drives the streams itself."""
        self._state("running")
        streams = (frames.STDOUT,) if command.terminal else (frames.STDOUT, frames.STDERR)
        return await self._channel.call("exec", command.params(), streams)

    @asynccontextmanager
    async def relaying(self, port: int, handle: Callable[[RelayedConnection], Awaitable[None]]) -> AsyncIterator[None]:
        """Let programs reach what ``handle`` answers, at this port of the machine's loopback, in this context."""
        call = await self._channel.call("relay", {"port": port}, (frames.STDOUT,))
        async with serving(call, handle):
            yield

    async def run(
        self,
        command: Command,
        *,
        output: Output,
        feed: Callable[[Call], Awaitable[None]] | None = None,
        timeout_s: float | None = None,
    ) -> Outcome:
        """Run a command to its end.

        Args:
            command: what to run.
            output: called with each piece of standard output (1) and standard error (2).
            feed: writes standard input and signals; cancelled when the command ends. Without it,
                standard input is empty.
            timeout_s: after this many seconds the outcome says ``timed_out``; destroy the machine then.

        Raises:
            CallFailed: it could not be started (``not-found``, ``not-executable``, ``bad-cwd``).
            MachineError: the machine failed.
        """
        call = await self.start(command)
        failure: Exception | None = None
        timed_out = False
        result: dict[str, Any] = {}
        try:
            async with anyio.create_task_group() as tasks:
                if isinstance(self._machine, Owned):
                    tasks.start_soon(self.ended)
                if feed is None:
                    await call.write_eof()
                else:
                    tasks.start_soon(_feed, feed, call)
                async with anyio.create_task_group() as readers:
                    readers.start_soon(_forward, call, frames.STDOUT, output)
                    if not command.terminal:
                        readers.start_soon(_forward, call, frames.STDERR, output)
                    timed_out = await _ended_in_time(call, timeout_s)
                    if timed_out:
                        readers.cancel_scope.cancel()
                if not timed_out:
                    result = await call.result(CALL_TIMEOUT_S)
                tasks.cancel_scope.cancel()
        except* Exception as group:  # noqa: BLE001  # raised again below, outside the task groups' wrapping
            failure = _first(group)
        if failure is not None:
            raise failure
        return Outcome(128 + 9, 9, timed_out=True) if timed_out else _outcome(result)

    async def changes(
        self,
        on_entry: Callable[[LayerEntry], None],
        on_content: Callable[[bytes], None],
    ) -> int | None:
        """Read the upper layer: each entry, and the content of each file right after its entry.

        The callbacks may raise to refuse what they are told; that ends the machine's usefulness.

        Returns:
            The permission bits of the workspace folder itself, if the guest told them.

        Raises:
            GuestProtocolError: the records are malformed.
            MachineError: the guest stopped, or was silent for :data:`CHANGES_SILENCE_S` seconds.
        """
        self._state("stopping")
        call = await self._channel.call("changes", {}, (frames.CHANGES,))
        reader = _RecordReader(on_entry, on_content)
        while True:
            data = b""
            with anyio.move_on_after(CHANGES_SILENCE_S) as scope:
                data = await call.read(frames.CHANGES)
            if scope.cancelled_caught:
                raise GuestUnresponsive(
                    f"The guest said nothing for {CHANGES_SILENCE_S:g} s while its changes were taken out.",
                    hint="Run the command again, with a larger --memory if it is a big one.",
                    kept="The machine was destroyed; the workspace was not touched.",
                )
            if not data:
                break
            reader.feed(data)
        result = await _answer(call, CALL_TIMEOUT_S)
        reader.finish(result.get("entries"))
        mode = result.get("mode")
        return mode & 0o7777 if type(mode) is int else None


@asynccontextmanager
async def boot(
    hypervisor: Hypervisor, source: BootSource, ram: int, tracker: VMTracker, *, task: Sequence[str] = ()
) -> AsyncIterator[tuple[MicroVM, VirtualMachine]]:
    """Cold-boot a machine and wait until its supervisor is up; it has not been woken."""
    name = new_id()
    tracked = tracker.track(name, hypervisor, task=task)
    async with (
        hypervisor.boot(name, source, ram, follow=tracked.follow) as machine,
        open_channel(machine.channel) as channel,
    ):
        tracked.started(machine.process)
        try:
            await channel.hello(BOOT_TIMEOUT_S)
        except MachineError as error:
            error.add_note(f"{hypervisor.name}: {await machine.diagnosis()}")
            raise
        vm = MicroVM(name, machine, channel, tracked, backend=hypervisor.name, accelerator=hypervisor.accelerator)
        yield vm, machine


@asynccontextmanager
async def clone(
    hypervisor: Hypervisor,
    saved: SavedMachine,
    disks: tuple[int, ...],
    tracker: VMTracker,
    *,
    packages: int = -1,
    vm_id: str | None = None,
    workspace: str = "",
    task: Sequence[str] = (),
) -> AsyncIterator[MicroVM]:
    """A woken copy of a saved machine, with ``disks`` (the root, the workspace, and a layer on it) behind it.

    Args:
        hypervisor: what runs it.
        saved: what it is copied from.
        disks: open for reading only; the caller's.
        tracker: where it is recorded.
        packages: a disk with programs that the root has not, likewise; -1 for none.
        vm_id: its name, from :func:`new_id`.
        workspace: for the record: the folder that it works on.
        task: for the record: what it is for.
    """
    name = vm_id or new_id()
    tracked = tracker.track(name, hypervisor, workspace=workspace, task=task)
    async with (
        hypervisor.clone(name, saved, all_disks(disks, packages), follow=tracked.follow) as machine,
        open_channel(machine.channel) as channel,
    ):
        tracked.started(machine.process)
        vm = MicroVM(name, machine, channel, tracked, backend=hypervisor.name, accelerator=hypervisor.accelerator)
        try:
            await vm.wake(layer=len(disks) > 2, packages=packages >= 0)  # root and workspace
            yield vm
        except MachineError as error:
            error.add_note(f"{hypervisor.name}: {await machine.diagnosis()}")
            raise


def all_disks(disks: tuple[int, ...], packages: int = -1) -> tuple[int, ...]:
    """As many disks as the template has: the root once more for those that nobody will look at."""
    filled = (*disks, *(disks[0] for _ in range(DISKS - len(disks))))
    return filled if packages < 0 else (*filled[:-1], packages)


async def watch(machine: Owned, vm_id: str) -> None:
    """Wait until a hypervisor has ended; one that does not answer any more is ended."""
    while machine.process.running:
        with anyio.move_on_after(WATCH_S):
            await machine.process.wait()
            return
        try:
            await machine.check()
        except MachineError as error:
            log.event("machine.stuck", vm=vm_id, error=str(error))
            machine.process.kill("it did not answer")


def new_id() -> str:
    """A name for a machine, such as ``vm-3f2a9c01b7``; it is the guest's host name too."""
    return f"vm-{secrets.token_hex(5)}"


class _RecordReader:
    """Splits the change stream into entries and contents; trusts no length."""

    def __init__(self, on_entry: Callable[[LayerEntry], None], on_content: Callable[[bytes], None]) -> None:
        self._on_entry = on_entry
        self._on_content = on_content
        self._buffer = bytearray()
        self._content = 0
        self._entries = 0

    def feed(self, data: bytes) -> None:
        self._buffer += data
        while self._buffer:
            if self._content:
                part = bytes(self._buffer[: self._content])
                del self._buffer[: len(part)]
                self._content -= len(part)
                self._on_content(part)
                continue
            if len(self._buffer) < 4:
                return
            (length,) = struct.unpack_from(">I", self._buffer)
            if length > _MAX_META:
                raise _malformed(f"a record of {length} bytes")
            if len(self._buffer) < 4 + length:
                return
            entry = _entry(bytes(self._buffer[4 : 4 + length]))
            del self._buffer[: 4 + length]
            self._entries += 1
            self._on_entry(entry)
            if entry.kind == "file":
                self._content = entry.size

    def finish(self, claimed: object) -> None:
        if self._buffer or self._content:
            raise _malformed("the stream ends inside a record")
        if claimed != self._entries:
            raise _malformed(f"{claimed!r} entries were announced and {self._entries} came")


def _entry(payload: bytes) -> LayerEntry:
    try:
        raw: dict[str, object] = json.loads(payload)
        path, kind, mode = raw["p"], raw["t"], raw["m"]
        size, target, opaque = raw.get("s", 0), raw.get("l", ""), raw.get("o", False)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise _malformed(f"a record cannot be read ({type(error).__name__})") from None
    well_typed = isinstance(path, str) and isinstance(target, str) and isinstance(kind, str) and kind in _ENTRY_TYPES
    # bool is an int to isinstance, and JSON's true is no mode
    if not well_typed or type(mode) is not int or type(size) is not int or type(opaque) is not bool:
        raise _malformed("a record has fields of the wrong type")
    if not (0 <= mode <= 0o7777 and 0 <= size < 1 << 62):
        raise _malformed("a record has numbers out of range")
    return LayerEntry(str(path), str(kind), mode, size, str(target), opaque)


async def _feed(feed: Callable[[Call], Awaitable[None]], call: Call) -> None:
    await feed(call)


async def _forward(call: Call, stream: int, output: Output) -> None:
    while data := await call.read(stream):
        await output(stream, data)


async def _ended_in_time(call: Call, timeout_s: float | None) -> bool:
    """Wait for the call's end; True if the deadline came first (the machine is then of no more use)."""
    with anyio.move_on_after(timeout_s) as scope:
        await call.result()
    return scope.cancelled_caught


def _outcome(result: dict[str, Any]) -> Outcome:
    code, number = result.get("exit"), result.get("signal")
    if type(code) is int and 0 <= code <= 255:
        return Outcome(code, None, bool(result.get("out_of_memory")))
    if type(number) is int and 0 < number < 128:
        return Outcome(128 + number, number, bool(result.get("out_of_memory")))
    raise GuestProtocolError(
        "The guest reported no usable exit status.",
        hint="Treat what ran in it as hostile.",
        kept="The machine was destroyed; the workspace was not touched.",
    )


async def _answer(call: Call, timeout_s: float) -> dict[str, Any]:
    try:
        return await call.result(timeout_s)
    except CallFailed as error:
        raise MachineError(
            f"The guest could not do its part ({error.code}): {error.message}",
            hint="Run the command again with a larger --memory; 'luminaguard doctor' checks the parts.",
            kept="The workspace was not touched.",
        ) from error


def _first(group: BaseExceptionGroup[Exception]) -> Exception:
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    assert isinstance(error, Exception)
    return error


def _malformed(why: str) -> GuestProtocolError:
    return GuestProtocolError(
        f"The guest's answer is malformed: {why}.",
        hint="Treat what ran in it as hostile. The ledger has a record.",
        kept="The machine was destroyed; the workspace was not touched.",
    )

"""Start a hypervisor in a jail, and end it so that nothing of it is left.

Layers, from the outside in:

``uid``         as root: a uid of its own for each machine; otherwise the user's own
``privileges``  no_new_privs, no capabilities, empty bounding set (setpriv(1), bwrap(1))
``namespaces``  user, mount, pid, net, ipc, uts and cgroup; further user namespaces are forbidden
``files``       read-only: the program and its library folders; no file of the user, no home, no /tmp
``rlimits``     address space, file size (its log too), descriptors; no core, no locked memory
``cgroup``      memory and processes; an ordinary user has one where the host delegates them
``seccomp``     the hypervisor's own filter; the caller's arguments turn it on

The process is stopped at its first instruction until limits and cgroup hold. It is watched by a
pidfd from then on, and dies with its owner (PR_SET_PDEATHSIG) or with its context, whichever is first.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import select
import shutil
import signal
import subprocess
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractContextManager, ExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import anyio

from luminaguard import log
from luminaguard.errors import HypervisorUnavailable, JailUnavailable
from luminaguard.microvm.jail.cgroups import CgroupStore

__all__ = ["Follow", "Jail", "JailedProcess", "Limits", "ProcessInfo", "Program", "not_followed", "unused_uid"]

_UID_BASE, _UID_COUNT = 1_900_000_000, 1 << 24
"""Above the ranges of distributions, subordinate ids and systemd (its containers end at 1,879,048,191)."""
_INSIDE = "65534"
_START_TIMEOUT_S = 10.0
_END_TIMEOUT_S = 1.0
_STATUS_TIMEOUT_S = 0.5
_MAX_SAID = 4 << 20
_MAX_INFO = 4096


@dataclass(frozen=True, slots=True)
class Program:
    """A hypervisor and what it reads: ``folders`` and ``files`` appear read-only at their own paths."""

    path: str
    folders: tuple[str, ...] = ()
    files: tuple[str, ...] = ()
    devices: tuple[str, ...] = ("/dev/null", "/dev/urandom")


@dataclass(frozen=True, slots=True)
class Limits:
    """``memory_bytes`` is what the process may use for real, ``address_bytes`` what it may map."""

    memory_bytes: int
    address_bytes: int
    descriptors: int = 256
    processes: int = 64


@dataclass(slots=True)
class ProcessInfo:
    """A hypervisor's process: its id on the host, and each layer of its jail: ``on``, or why it is missing."""

    pid: int
    layers: dict[str, str]


@dataclass(slots=True)
class JailedProcess(ProcessInfo):
    """A running hypervisor, held by a pidfd; ``said`` is its standard error.

    ``outer`` is our child, which ends when the hypervisor has, with its status; ``killed_for`` says why we
    ended it, if we did before its context was over.
    """

    pidfd: int
    said: int
    outer: subprocess.Popen[bytes]
    groups: list[Path]
    killed_for: str = ""

    def words(self, limit: int = 2000) -> str:
        """What it printed, at most ``limit`` bytes, from the end."""
        size = os.fstat(self.said).st_size
        return os.pread(self.said, limit, max(0, size - limit)).decode("utf-8", "replace").strip()

    @property
    def running(self) -> bool:
        """Whether it lives."""
        return not _readable(self.pidfd)

    def ended_within(self, seconds: float) -> bool:
        """Block until it has ended, for at most so long."""
        return _readable(self.pidfd, seconds)

    def exit_status(self) -> int | None:
        """The status that it ended with, 128 and the signal's number if it was one; None while it lives."""
        if self.running:
            return None
        try:
            status = self.outer.wait(_STATUS_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            return None
        return status if status >= 0 else 128 - status

    def kill(self, reason: str = "") -> None:
        """End it at once; the reason is for its record."""
        self.killed_for = reason
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)

    async def wait(self) -> None:
        """Wait for its end."""
        await anyio.wait_readable(self.pidfd)


Follow = Callable[[JailedProcess], AbstractContextManager[None]]


def not_followed(_process: JailedProcess) -> AbstractContextManager[None]:
    """For what needs no record."""
    return contextlib.nullcontext()


class Jail:
    """Starts programs in jails.

    Args:
        required: refuse to start anything when a layer that this host could have is missing.
        cgroups: where to make cgroups.
    """

    def __init__(self, *, required: bool = True, cgroups: CgroupStore | None = None) -> None:
        self.required = required
        self.cgroups = cgroups or CgroupStore()
        self._bwrap = shutil.which("bwrap")
        self._nesting = ["--disable-userns"] if self._bwrap and _can_forbid_nesting(self._bwrap) else []
        self._setpriv = shutil.which("setpriv") or "/usr/bin/setpriv"
        self._prlimit = shutil.which("prlimit") or "/usr/bin/prlimit"
        if required and self._bwrap is None:
            raise JailUnavailable(
                "bubblewrap is not installed: there is nothing to jail the hypervisor with.",
                hint="apt-get install bubblewrap; or set require_jail = false and accept weaker isolation.",
            )

    @asynccontextmanager
    async def start(
        self,
        name: str,
        program: Program,
        arguments: list[str],
        inherited: tuple[int, ...],
        limits: Limits,
        follow: Follow = not_followed,
    ) -> AsyncIterator[JailedProcess]:
        """Run a program for as long as the context lasts.

        Args:
            name: of the machine; the cgroup is called so.
            program: what to run.
            arguments: its arguments.
            inherited: descriptors that it gets under the same numbers.
            limits: what it may use.
            follow: entered with the process before it may begin, and left before it is ended.

        Raises:
            JailUnavailable: this host does not allow a layer that is required.
            HypervisorUnavailable: it cannot be started at all.
        """
        layers = {"seccomp": "on"}

        def command(info: int, gate: int) -> list[str]:
            return self._command(name, program, arguments, limits, info, gate, layers)

        async with self.launch(name, command, inherited, limits, layers, follow) as process:
            yield process

    @asynccontextmanager
    async def launch(
        self, name: str, command: Callable[[int, int], list[str]], inherited: tuple[int, ...], limits: Limits,
        layers: dict[str, str], follow: Follow = not_followed,
    ) -> AsyncIterator[JailedProcess]:  # fmt: skip
        """Run a command that bubblewrap starts, held at its gate until its cgroup holds it.

        Args:
            name: of the machine.
            command: given the descriptors for bubblewrap's ``--info-fd`` and ``--block-fd``, the whole command.
            inherited: descriptors that it gets under the same numbers.
            limits: of the cgroup.
            layers: what the command itself sees to; ``cgroup`` is added.
            follow: as for :meth:`start`.

        Raises:
            JailUnavailable: a namespace or the cgroup cannot be had.
            HypervisorUnavailable: it cannot be started at all.
        """
        with ExitStack() as stack:
            said = os.memfd_create("hypervisor-said", os.MFD_CLOEXEC)
            stack.callback(os.close, said)
            info_out, info_in = _pipe(stack)
            gate_out, gate_in = _pipe(stack)
            # It gets both ends of the gate: an owner that is killed must not open it by closing it.
            fds = (*inherited, info_in.fd, gate_out.fd, gate_in.fd) if self._bwrap else inherited
            outer = _spawn(command(info_in.fd, gate_out.fd), fds, said)
            stack.callback(_end_outer, outer)
            info_in.close()
            gate_out.close()
            try:
                pid = await self._child(info_out.fd, said) if self._bwrap else outer.pid
                pidfd = os.pidfd_open(pid)
            except BaseException as error:
                # The child is in the outer process's group until the gate opens, and nothing else holds it.
                os.killpg(outer.pid, signal.SIGKILL)
                if isinstance(error, ProcessLookupError):
                    raise _refused(said) from None
                raise
            stack.callback(os.close, pidfd)
            stack.callback(_end, pidfd)
            groups = self._confine(name, (pid, pidfd, said), limits, layers, stack)
            process = JailedProcess(pid, layers, pidfd, said, outer, groups)
            with follow(process):
                if self._bwrap:
                    try:
                        os.write(gate_in.fd, b"-")
                    except BrokenPipeError:
                        raise _refused(said) from None
                yield process

    def _command(
        self, name: str, program: Program, arguments: list[str], limits: Limits, info: int, gate: int,
        layers: dict[str, str],
    ) -> list[str]:  # fmt: skip
        drop: list[str] = []
        layers["uid"] = "the user's own: only root can give a machine another one"
        if os.geteuid() == 0:
            uid = str(unused_uid())
            groups = _device_groups(program.devices)
            keep = ["--groups", ",".join(groups)] if groups else ["--clear-groups"]
            drop = ["--reuid", uid, "--regid", uid, *keep, "--inh-caps=-all", "--bounding-set=-all"]
            layers["uid"] = "on"
        layers["privileges"] = layers["rlimits"] = "on"
        outer = [
            self._setpriv, *drop, "--no-new-privs", "--pdeathsig", "KILL", "--",
            self._prlimit, f"--as={limits.address_bytes}", f"--fsize={_MAX_SAID}", f"--nofile={limits.descriptors}",
            "--core=0", "--memlock=0", "--",
        ]  # fmt: skip
        if self._bwrap is None:
            layers["namespaces"] = layers["files"] = "bubblewrap is not installed"
            return [*outer, program.path, *arguments]
        layers["namespaces"] = layers["files"] = "on"
        binds = [word for path in (*program.folders, *program.files) for word in ("--ro-bind", path, path)]
        devices = [word for path in program.devices for word in ("--dev-bind", path, path)]
        return [
            *outer, self._bwrap, "--unshare-all", "--unshare-user", *self._nesting, "--as-pid-1",
            "--uid", _INSIDE, "--gid", _INSIDE, *_bwrap_options(name, info, gate), "--cap-drop", "ALL",
            "--proc", "/proc", *devices, *binds, "--ro-bind", program.path, program.path, "--remount-ro", "/",
            "--chdir", "/", "--", program.path, *arguments,
        ]  # fmt: skip

    def around_jailer(self, name: str, info: int, gate: int, keep: tuple[str, ...]) -> list[str]:
        """The beginning of a command that starts a jailer, which itself changes root and uid.

        The jailer gets pid, net, ipc and uts namespaces, and of root's capabilities those that it is to
        ``keep``. Bubblewrap's init stays above it: a changed uid would undo PR_SET_PDEATHSIG (prctl(2)).

        Raises:
            JailUnavailable: bubblewrap is not installed.
        """
        if self._bwrap is None:
            raise JailUnavailable("bubblewrap is not installed.", hint="apt-get install bubblewrap")
        capabilities = [word for capability in keep for word in ("--cap-add", f"CAP_{capability}")]
        return [
            self._setpriv, "--no-new-privs", "--pdeathsig", "KILL", "--",
            self._prlimit, "--core=0", "--memlock=0", "--",
            self._bwrap, "--unshare-pid", "--unshare-net", "--unshare-ipc", "--unshare-uts",
            *_bwrap_options(name, info, gate), "--cap-drop", "ALL", *capabilities,
            "--dev-bind", "/", "/", "--proc", "/proc", "--",
            self._setpriv, "--inh-caps=-all", "--ambient-caps=-all", "--",  # what bubblewrap keeps outlives the uid
        ]  # fmt: skip

    async def _child(self, info: int, said: int) -> int:
        """The pid of the program, as bubblewrap tells it once the namespaces are made."""
        data = b""
        with anyio.move_on_after(_START_TIMEOUT_S):
            while b"}" not in data and len(data) < _MAX_INFO:
                await anyio.wait_readable(info)
                piece = os.read(info, _MAX_INFO)
                if not piece:
                    break
                data += piece
        try:
            return int(json.loads(data)["child-pid"])
        except (ValueError, KeyError, TypeError):
            raise _refused(said) from None

    def _confine(
        self, name: str, process: tuple[int, int, int], limits: Limits, layers: dict[str, str], stack: ExitStack
    ) -> list[Path]:
        pid, pidfd, said = process
        layers["cgroup"] = self.cgroups.missing or "on"
        if self.cgroups.missing:
            if self.required and os.geteuid() == 0:  # an ordinary user has what was delegated to him, or none
                raise JailUnavailable(
                    f"The hypervisor cannot be put into a cgroup: {self.cgroups.missing}.",
                    hint="Mount a cgroup hierarchy with the memory and pids controllers; "
                    "'require_jail = false' runs without one.",
                    kept="No machine was started.",
                )
            return []
        try:
            groups = self.cgroups.create(name, memory_bytes=limits.memory_bytes, processes=limits.processes)
            stack.callback(self.cgroups.remove, groups)
            stack.callback(_end, pidfd)  # a group can be removed when nothing lives in it
            self.cgroups.add(groups, pid)
            return groups
        except ProcessLookupError:
            raise _refused(said) from None
        except OSError as error:
            layers["cgroup"] = f"the kernel refused: {error.strerror} ({error.filename})"
            log.event("jail.cgroup_missing", vm=name, reason=layers["cgroup"])
            if self.required:
                raise JailUnavailable(
                    f"The hypervisor could not be put into a cgroup: {layers['cgroup']}.",
                    hint="Run the command again; 'luminaguard vm reap' removes groups that were left. "
                    "'require_jail = false' runs without it.",
                    kept="No machine was started.",
                ) from error
        return []


def _bwrap_options(name: str, info: int, gate: int) -> list[str]:
    """What every start has in common: it ends with its owner, and waits at the gate."""
    return ["--die-with-parent", "--new-session", "--hostname", name, "--clearenv",
            "--info-fd", str(info), "--block-fd", str(gate)]  # fmt: skip


def unused_uid() -> int:
    """A uid, and gid, that nobody on this host has; another one for each machine."""
    return _UID_BASE + secrets.randbelow(_UID_COUNT)


def _device_groups(devices: tuple[str, ...]) -> list[str]:
    """Groups without which a device cannot be opened, such as that of /dev/kvm."""
    found = [os.stat(path) for path in devices if os.path.exists(path)]
    return sorted({str(info.st_gid) for info in found if info.st_mode & 0o006 != 0o006})


def _refused(said: int) -> JailUnavailable:
    words = os.pread(said, 500, 0).decode("utf-8", "replace").strip()
    return JailUnavailable(
        f"The hypervisor could not be jailed: {words or 'bubblewrap ended without a word'}.",
        hint="Run 'luminaguard doctor': it names the setting that forbids user namespaces here. "
        "'require_jail = false' runs without them.",
        kept="No machine was started.",
    )


def _spawn(command: list[str], inherited: tuple[int, ...], said: int) -> subprocess.Popen[bytes]:
    try:
        return subprocess.Popen(
            command, pass_fds=inherited, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=said,
            cwd="/", env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin"},
            start_new_session=True,  # a terminal's Ctrl-C is ours to handle, not the hypervisor's
        )  # fmt: skip
    except OSError as error:
        raise HypervisorUnavailable(
            f"The hypervisor could not be started: {error}.", hint="Run 'luminaguard doctor'."
        ) from error


def _can_forbid_nesting(bwrap: str) -> bool:
    """Bubblewrap 0.8 and later; raises JailUnavailable when it cannot be run."""
    try:
        said = subprocess.run([bwrap, "--version"], capture_output=True, text=True, check=True, timeout=10).stdout
        major, minor = said.split()[1].split(".")[:2]
        return (int(major), int(minor)) >= (0, 8)
    except (OSError, subprocess.SubprocessError, ValueError, IndexError) as error:
        raise JailUnavailable(f"'{bwrap}' cannot be run: {error}.", hint="apt-get install bubblewrap") from error


def _end(pidfd: int) -> None:
    """Kill and wait: SIGKILL is not ignored, so this takes as long as freeing the memory."""
    with contextlib.suppress(ProcessLookupError):
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)
    _readable(pidfd, _END_TIMEOUT_S)


def _end_outer(outer: subprocess.Popen[bytes]) -> None:
    """The outer process ends with what it started, once it has reaped it; if it does not, it is killed."""
    try:
        outer.wait(_END_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        outer.kill()
        outer.wait()


def _readable(fd: int, timeout_s: float = 0) -> bool:
    poll = select.poll()  # select would refuse descriptors beyond 1023
    poll.register(fd, select.POLLIN)
    return bool(poll.poll(timeout_s * 1000))


class _End:
    """One end of a pipe; closing it twice closes nothing of anyone else."""

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def close(self) -> None:
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)


def _pipe(stack: ExitStack) -> tuple[_End, _End]:
    ends = tuple(_End(fd) for fd in os.pipe2(os.O_CLOEXEC))
    for end in ends:
        stack.callback(end.close)
    return ends[0], ends[1]

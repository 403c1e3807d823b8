"""PID 1 of the micro-VM: speaks the guest protocol on its port to the host, runs the workload.

One thread, one loop. The workload is hostile: it runs confined (:mod:`confine`), in a cgroup that is
killed as a whole, and can reach neither this process nor the port. The host may be trusted by the
guest, but nothing here relies on that for the host's safety.

Whatever goes wrong in a call ends that call with a FAIL frame. Bytes that are no frames end the
process, with it the machine, and the host sees the channel close.
"""

from __future__ import annotations

import binascii
import gc
import json
import os
import select
import signal
import sys

from luminaguard.guest import frames, machine
from luminaguard.guest.changes import BadLayer, Changes
from luminaguard.guest.confine import Confinement
from luminaguard.guest.filters import PROFILES
from luminaguard.guest.frames import Frame
from luminaguard.guest.launcher import Launcher
from luminaguard.guest.loop import Loop
from luminaguard.guest.ownership import Joined
from luminaguard.guest.port import SerialPort, VsockPort
from luminaguard.guest.relay import Relay
from luminaguard.guest.workload import Workload, set_size

TYPE_CHECKING = False  # typing takes 70 ms of an emulated boot
if TYPE_CHECKING:
    from typing import Any

__all__ = ["main"]

_MOST_USERS = 1 << 31


class CallError(Exception):
    """A call cannot be done; ``code`` is one of the words of the protocol."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


def main() -> None:
    """Set the machine up, say HELLO, serve until the machine is destroyed."""
    # Objects live as long as the machine: a collection would only touch, and copy, every page.
    gc.disable()
    # Woken by each thing that the workload does, this process would interrupt it each time; as a batch
    # process (sched(7)) it waits until the workload does, and then finds all of them at once.
    os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
    os.setpriority(os.PRIO_PROCESS, 0, -15)
    machine.prepare()
    port = machine.find_port()
    Supervisor(VsockPort() if port < 0 else SerialPort(port)).run()


class Supervisor:
    """The port, and the calls of the protocol."""

    def __init__(self, port: SerialPort | VsockPort) -> None:
        self._port = port
        self._reader = frames.FrameReader()
        self._out = bytearray()
        self._loop = Loop()
        self._confinement = Confinement()
        self._launcher: Launcher | None = None
        self._workload: Workload | None = None
        self._changes: Changes | None = None
        self._changes_channel = 0
        self._relay: Relay | None = None
        self._mounted = self._layer = self._packages = False
        self._randomize = True
        self._identity: machine.Identity | None = None
        self._user = 0
        self._disks: tuple[Joined, ...] = ()
        self._ended, waker = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.set_wakeup_fd(waker, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)

    def run(self) -> None:
        """Serve for ever."""
        self._loop.watch(self._ended, select.POLLIN, self._on_child)
        self._port.start(self._loop, self._on_connected, self._on_data, self._on_lost)
        while True:
            self._finish_workload()
            self._pump_changes()
            self._port.flush(self._out)
            self._loop.wait()

    # -- the port ---------------------------------------------------------------------------

    def _send(self, frame: Frame) -> None:
        self._out += frames.encode(frame)

    def _on_connected(self) -> None:
        hello = {"protocol": frames.PROTOCOL, "kernel": os.uname().release, "python": sys.version.split()[0]}
        self._send(Frame(frames.HELLO, payload=json.dumps(hello).encode()))

    def _on_data(self, data: bytes) -> None:
        for frame in self._reader.feed(data):
            self._on_frame(frame)

    def _on_lost(self) -> None:
        """The connection is gone: nobody is left to be answered, and the next one begins anew."""
        if self._workload is not None or self._changes is not None:
            raise SystemExit("the host went away in the middle of a call")
        self._reader = frames.FrameReader()
        self._out.clear()

    def _on_frame(self, frame: Frame) -> None:
        if frame.kind == frames.CALL:
            self._on_call(frame)
        elif self._workload is not None and frame.channel == self._workload.channel:
            self._workload.on_frame(frame)
        elif self._changes is not None and frame.channel == self._changes_channel and frame.kind == frames.CREDIT:
            self._changes.credit += frames.number(frame)
        elif self._relay is not None and frame.channel == self._relay.channel:
            self._relay.on_frame(frame)
        # Anything else is a late frame of a call that has ended.

    def _on_call(self, frame: Frame) -> None:
        try:
            call = json.loads(frame.payload)
            method, params = call["method"], call["params"]
            if method == "wake":
                self._answer(frame.channel, frames.RESULT, self._wake(params))
            elif method == "rest":
                self._answer(frame.channel, frames.RESULT, self._rest())
            elif method == "exec":
                self._exec(frame.channel, params)
            elif method == "changes":
                self._start_changes(frame.channel)
            elif method == "relay":
                if self._relay is not None:
                    raise CallError("busy", "there is a relay")
                self._relay = Relay(frame.channel, int(params["port"]), self._loop, self._send)
            elif method == "inspect":
                settings = machine.inspect([str(name) for name in params["settings"]])
                self._answer(frame.channel, frames.RESULT, {"settings": settings, "facts": machine.facts()})
            else:
                raise CallError("unknown-method", str(method))
        except CallError as error:
            self._fail(frame.channel, error.code, str(error))
        except OSError as error:
            self._fail(frame.channel, "os-error", f"{error.strerror or error} ({error.filename})")
        except Exception as error:  # noqa: BLE001  # PID 1 ends with the machine: no call may end it
            self._fail(frame.channel, "bad-call", repr(error))

    def _answer(self, channel: int, kind: int, value: dict[str, Any]) -> None:
        self._send(Frame(kind, channel, json.dumps(value).encode()))

    def _fail(self, channel: int, code: str, message: str) -> None:
        self._answer(channel, frames.FAIL, {"code": code, "message": message[:2000]})

    # -- calls ----------------------------------------------------------------------------------

    def _wake(self, params: dict[str, Any]) -> dict[str, Any]:
        user = int(params["uid"])
        if not 0 < user < _MOST_USERS:
            raise CallError("bad-call", f"{user} is no number of a user")
        if self._mounted or (self._disks and not params["workspace"]):
            raise CallError("busy", "the machine is awake")
        if not params["workspace"]:
            self._randomize = bool(params["randomize"])
            self._disks = machine.make_upper(str(params["upper_size"]))
            self._identity = machine.Identity()
        if self._identity is None:
            raise CallError("bad-call", "the first wake of a machine is a template's")
        self._identity.give(
            int(params["time_ns"]), binascii.a2b_base64(params["entropy"]),
            str(params["hostname"]), str(params["machine_id"]), user,
        )  # fmt: skip
        self._user = user
        if not params["workspace"]:
            return {}
        self._layer, self._packages = bool(params["layer"]), bool(params["packages"])
        self._mounted = True  # or half of it, after which this machine is of no use
        machine.mount_workspace(self._disks if self._layer else self._disks[:1], user)
        if self._packages:
            machine.mount_packages()
        return {"boot_id": machine.read_boot_id()}

    def _rest(self) -> dict[str, Any]:
        """After a rehearsal: as before ``wake``, but with every path already translated."""
        if self._workload is not None or self._changes is not None:
            raise CallError("busy", "a command is running")
        if self._mounted:
            machine.unmount_workspace(layer=self._layer)
            self._mounted = False
        self._launch_ahead()
        return {}

    def _exec(self, channel: int, params: dict[str, Any]) -> None:
        if self._workload is not None:
            raise CallError("busy", "a command is running")
        # All of the call is read before anything is made that would have to be undone.
        order = {
            "argv": [str(word) for word in params["argv"]],
            "env": {str(key): str(value) for key, value in params["env"].items()},
            "cwd": str(params["cwd"]),
            "profile": str(params["profile"]),
            "packages": self._packages,
            "limits": {name: int(params["limits"][name]) for name in ("nofile", "fsize")},
        }
        if order["profile"] not in PROFILES:
            raise CallError("unknown-profile", "there is no such profile")
        processes, terminal = int(params["limits"]["pids"]), params["tty"]
        size = (int(terminal["rows"]) & 0xFFFF, int(terminal["columns"]) & 0xFFFF) if terminal else None
        if order["profile"] == "build" and self._launcher is not None:
            # What waits has the filter of the default profile, and filters cannot be taken away.
            self._launcher.discard()
            self._launcher = None
        launcher = self._launcher = self._launcher or self._new_launcher(order["profile"])
        if processes != launcher.group.pids:
            launcher.group.limit_processes(processes)
        pty = inside = -1
        if size:
            pty, inside = os.openpty()
            set_size(pty, *size)
            os.set_blocking(pty, False)
        # All is ready before the order is given: the command then runs to its end undisturbed.
        self._workload = Workload(channel, launcher, pty, self._loop, self._send)
        self._launcher = None
        try:
            launcher.launch(self._user, order, inside)
        except OSError as error:
            self._workload.never_started(f"os-error:the launcher is gone ({error.strerror})")
        if inside >= 0:
            os.close(inside)

    def _new_launcher(self, profile: str = "default") -> Launcher:
        confinement = Confinement("build") if profile == "build" else self._confinement
        return Launcher(confinement, randomize=self._randomize)

    def _launch_ahead(self) -> None:
        """In a template, make the launcher that each clone finds ready."""
        if not self._mounted and self._launcher is None:
            self._launcher = self._new_launcher()

    def _on_child(self, _events: int) -> None:
        os.read(self._ended, 4096)
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            if self._workload is not None and pid == self._workload.pid:
                self._workload.on_exit(status)

    def _finish_workload(self) -> None:
        work = self._workload
        if work is None or (result := work.result()) is None:
            return
        self._workload = None
        self._launch_ahead()
        self._answer(work.channel, frames.FAIL if "code" in result else frames.RESULT, result)

    def _start_changes(self, channel: int) -> None:
        if self._workload is not None or self._changes is not None:
            raise CallError("busy", "a command is running")
        if not self._mounted:
            raise CallError("no-workspace", "no workspace is mounted")
        self._changes = Changes(machine.UPPER)
        self._changes_channel = channel

    def _pump_changes(self) -> None:
        """Send as much of the changes as the host has granted credit for."""
        while self._changes is not None and self._changes.credit > 0:
            channel = self._changes_channel
            try:
                part = self._changes.next()
            except (BadLayer, OSError) as error:
                self._changes = None
                code = "bad-layer" if isinstance(error, BadLayer) else "os-error"
                self._fail(channel, code, f"the changes cannot be read: {error}")
                return
            if part is None:
                count, self._changes = self._changes.count, None
                self._send(Frame(frames.EOF, channel, stream=frames.CHANGES))
                self._answer(
                    channel, frames.RESULT, {"entries": count, "mode": os.stat(machine.UPPER).st_mode & 0o7777}
                )
                return
            self._send(Frame(frames.DATA, channel, part, frames.CHANGES))

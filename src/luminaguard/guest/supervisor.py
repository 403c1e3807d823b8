"""PID 1 of the micro-VM: speaks the guest protocol on one virtio-serial port, runs the workload.

One thread, one selector. The workload is hostile: it runs confined (:mod:`confine`), in a cgroup
that is killed as a whole, and can reach neither this process nor the port. The host may be trusted
by the guest, but nothing here relies on that for the host's safety.

Errors of one call end that call with a FAIL frame; anything unforeseen ends the process, with it
the machine, and the host sees the channel close.
"""

from __future__ import annotations

import base64
import ctypes
import fcntl
import gc
import json
import os
import selectors
import signal
import socket
import stat
import struct
import sys
import termios
import time
from collections.abc import Iterator
from typing import Any

from luminaguard.guest import frames
from luminaguard.guest.confine import UID, Confinement
from luminaguard.guest.frames import Frame

__all__ = ["main"]

PORT_NAME = "lumina.agent"
BASE = "/run/luminaguard"
CGROUP = f"{BASE}/cgroup"
UPPER = f"{BASE}/workspace/upper"
WORKSPACE = "/workspace"
_MS_RDONLY, _MS_NOSUID, _MS_NODEV, _MS_NOEXEC, _MS_MOVE = 1, 2, 4, 8, 8192
_MNT_DETACH = 2
_SAFE = _MS_NOSUID | _MS_NODEV
_RESERVED_MIB = 56  # of guest memory, for the kernel and this process
_RNDADDENTROPY, _RNDRESEEDCRNG = 0x40085203, 0x5207
_READ_SIZE = 1 << 15
_OVERLAY_BAD = ("trusted.overlay.redirect", "trusted.overlay.metacopy")

_libc = ctypes.CDLL(None, use_errno=True)


class CallError(Exception):
    """A call cannot be done; ``code`` is one of the words of the protocol."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


def mount(source: str, target: str, kind: str, flags: int, data: str = "") -> None:
    """Attach a file system (see mount in section 2 of the manual); raises OSError."""
    if _libc.mount(source.encode(), target.encode(), kind.encode(), flags, data.encode()) != 0:
        raise OSError(ctypes.get_errno(), f"mount {target}")


def main() -> None:
    """Set the machine up, say HELLO, serve until the machine is destroyed."""
    # Objects live as long as the machine: a collection would only touch, and copy, every page.
    gc.disable()
    fd = _prepare()
    if len(sys.argv) > 1:
        raise SystemExit("the supervisor takes no arguments")
    Supervisor(fd).run()


def _prepare() -> int:
    """Mount what the workload may see, hide the rest; return the port."""
    for folder in ("dev", "sys", "cgroup", "workspace"):
        os.mkdir(f"{BASE}/{folder}", 0o700)
    mount("sysfs", f"{BASE}/sys", "sysfs", _SAFE | _MS_NOEXEC)
    port = _open_port()
    mount("/dev", f"{BASE}/dev", "", _MS_MOVE)
    mount("tmpfs", "/dev", "tmpfs", _MS_NOSUID | _MS_NOEXEC, "mode=755,size=64k,nr_inodes=64")
    old = os.umask(0)
    for name, major, minor, mode in (
        ("null", 1, 3, 0o666), ("zero", 1, 5, 0o666), ("full", 1, 7, 0o666),
        ("random", 1, 8, 0o666), ("urandom", 1, 9, 0o666), ("tty", 5, 0, 0o666),
    ):  # fmt: skip
        os.mknod(f"/dev/{name}", stat.S_IFCHR | mode, os.makedev(major, minor))
    for name, target in (("fd", "/proc/self/fd"), ("stdin", "fd/0"), ("stdout", "fd/1"),
                         ("stderr", "fd/2"), ("ptmx", "pts/ptmx")):  # fmt: skip
        os.symlink(target, f"/dev/{name}")
    for folder in ("pts", "shm"):
        os.mkdir(f"/dev/{folder}", 0o755)
    os.umask(old)
    mount("devpts", "/dev/pts", "devpts", _MS_NOSUID | _MS_NOEXEC, "ptmxmode=666,mode=620,newinstance")
    mount("proc", "/proc", "proc", _SAFE | _MS_NOEXEC, "hidepid=invisible")
    for folder, mode, size in (("/tmp", 0o1777, "25%"), ("/var/tmp", 0o1777, "10%"),  # noqa: S108
                               ("/dev/shm", 0o1777, "10%"), ("/home/user", 0o755, "25%")):  # noqa: S108  # fmt: skip
        owner = f",uid={UID},gid={UID}" if folder == "/home/user" else ""
        mount("tmpfs", folder, "tmpfs", _SAFE, f"mode={mode:o},size={size}{owner}")
    mount("cgroup", CGROUP, "cgroup2", _SAFE | _MS_NOEXEC)
    _write(f"{CGROUP}/cgroup.subtree_control", "+memory +pids")
    for path in ("/proc/sys/kernel/yama/ptrace_scope",):
        _write(path, "3")
    for path, value in (("kernel/dmesg_restrict", "1"), ("kernel/kptr_restrict", "2"),
                        ("kernel/unprivileged_bpf_disabled", "1"), ("user/max_user_namespaces", "0"),
                        ("kernel/perf_event_paranoid", "3"), ("fs/suid_dumpable", "0"),
                        ("vm/unprivileged_userfaultfd", "0"), ("kernel/sysrq", "0"),
                        ("kernel/kexec_load_disabled", "1"), ("kernel/modules_disabled", "1"),
                        ("kernel/core_pattern", "|/bin/false")):  # fmt: skip
        _write(f"/proc/sys/{path}", value)
    return port


def _open_port() -> int:
    ports = f"{BASE}/sys/class/virtio-ports"
    for name in os.listdir(ports):
        with open(f"{ports}/{name}/name", encoding="ascii") as file:
            if file.read().strip() == PORT_NAME:
                return os.open(f"/dev/{name}", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    raise OSError(f"no virtio port is called {PORT_NAME}")


def _write(path: str, text: str) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(fd, text.encode())
    finally:
        os.close(fd)


class Workload:
    """One running command: its process, its cgroup, and its three streams."""

    def __init__(self, channel: int, pid: int, stdin: int, outputs: dict[int, int], pty: int) -> None:
        self.channel = channel
        self.pid = pid
        self.stdin = stdin  # -1 when closed
        self.outputs = outputs  # stream -> descriptor, while open
        self.pty = pty  # -1 without a terminal
        self.pending = bytearray()  # received for stdin, not written yet
        self.stdin_eof = False
        self.credit = dict.fromkeys(outputs, frames.WINDOW)
        self.status: int | None = None


class Launcher:
    """A child that has already given up its rights, waiting to be told which command to become.

    Forking a Python process and dropping rights cost more than the rest of an exec under emulation;
    done in the template, every clone gets them for nothing.
    """

    def __init__(self, confinement: Confinement) -> None:
        self._socket, inside = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.pid = os.fork()
        if self.pid == 0:
            _become(inside.detach(), confinement)
        inside.close()

    def launch(self, order: dict[str, Any], ends: tuple[int, int, int]) -> str:
        """Give the order and the three descriptors; return why it failed, or nothing."""
        try:
            socket.send_fds(self._socket, [json.dumps(order).encode()], list(ends))
            # Ends with nothing when exec closes the other end.
            return self._socket.recv(512).decode("utf-8", "replace")
        except OSError as error:
            return f"os-error:the launcher is gone ({error.strerror})"
        finally:
            self._socket.close()


def _become(fd: int, confinement: Confinement) -> None:
    """In the launcher: give up rights, wait for the order, turn into the command; never return."""
    code = "os-error"
    try:
        os.dup2(fd, 3)
        os.closerange(4, 64)  # the port and the selector are not for here
        inside = socket.socket(fileno=3)
        inside.set_inheritable(False)
        signal.set_wakeup_fd(-1)
        for number in (signal.SIGCHLD, signal.SIGPIPE, signal.SIGXFSZ):
            signal.signal(number, signal.SIG_DFL)
        os.setsid()
        confinement.drop_privileges()
        data, ends, _, _ = socket.recv_fds(inside, 1 << 18, 3)
        order = json.loads(data)
        # They may have come as 0 to 2 themselves: move them out of the way, and out of the command's.
        high = [fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 10) for end in ends]
        for end in ends:
            os.close(end)
        for target, end in enumerate(high):
            os.dup2(end, target)
        if order["tty"]:
            fcntl.ioctl(0, termios.TIOCSCTTY, 0)
        confinement.seal(order["limits"])
        code = "bad-cwd"
        os.chdir(order["cwd"])
        code = "not-executable"
        os.execvpe(order["argv"][0], order["argv"], order["env"])  # noqa: S606  # the point of the machine
    except FileNotFoundError as error:
        code = "not-found" if code == "not-executable" else code
        os.write(3, f"{code}:{error.strerror}".encode())
    except OSError as error:
        os.write(3, f"{code}:{error.strerror} {error.filename or ''}".encode())
    except BaseException as error:  # noqa: BLE001  # a forked child must never return
        os.write(3, f"os-error:{error!r}".encode()[:500])
    finally:
        os._exit(127)


class Supervisor:
    """The selector loop and the calls of the protocol."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._reader = frames.FrameReader()
        self._out = bytearray()
        self._selector = selectors.DefaultSelector()
        self._confinement = Confinement()
        self._workload: Workload | None = None
        self._changes: Iterator[bytes] | None = None
        self._changes_channel = 0
        self._changes_credit = 0
        self._changes_pending = b""
        self._changes_count = 0
        self._mounted = False
        self._groups = 0
        self._launcher: Launcher | None = None
        self._woken, waker = socket.socketpair()
        self._woken.setblocking(False)
        waker.setblocking(False)
        self._waker = waker
        signal.set_wakeup_fd(waker.fileno(), warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)

    def run(self) -> None:
        """Serve for ever."""
        self._selector.register(self._port, selectors.EVENT_READ, self._on_port)
        self._selector.register(self._woken, selectors.EVENT_READ, self._on_child)
        self._send(Frame(frames.HELLO, payload=json.dumps(
            {"protocol": frames.PROTOCOL, "kernel": os.uname().release, "python": sys.version.split()[0]}
        ).encode()))  # fmt: skip
        while True:
            self._pump_changes()
            self._flush()
            for key, events in self._selector.select():
                key.data(events)

    # -- the port ---------------------------------------------------------------------------

    def _send(self, frame: Frame) -> None:
        self._out += frames.encode(frame)

    def _flush(self) -> None:
        while self._out:
            try:
                count = os.write(self._port, self._out[: 1 << 17])
            except BlockingIOError:
                break
            del self._out[:count]
        wanted = selectors.EVENT_READ | (selectors.EVENT_WRITE if self._out else 0)
        if self._selector.get_key(self._port).events != wanted:
            self._selector.modify(self._port, wanted, self._on_port)

    def _on_port(self, events: int) -> None:
        if not events & selectors.EVENT_READ:
            return
        try:
            data = os.read(self._port, _READ_SIZE)
        except BlockingIOError:
            return
        if not data:
            time.sleep(0.005)  # virtio-serial reads nothing while the host side is not connected
            return
        for frame in self._reader.feed(data):
            self._on_frame(frame)

    def _on_frame(self, frame: Frame) -> None:
        if frame.kind == frames.CALL:
            self._on_call(frame)
            return
        if frame.kind == frames.CREDIT and frame.channel == self._changes_channel:
            self._changes_credit += struct.unpack(">I", frame.payload)[0]
            return
        work = self._workload
        if work is None or frame.channel != work.channel:
            return  # late frames of a call that has ended
        if frame.kind == frames.DATA:
            work.pending += frame.payload
            self._watch_stdin()
        elif frame.kind == frames.EOF:
            work.stdin_eof = True
            self._watch_stdin()
        elif frame.kind == frames.CREDIT and frame.stream in work.credit:
            work.credit[frame.stream] += struct.unpack(">I", frame.payload)[0]
            self._watch_output(frame.stream)
        elif frame.kind == frames.SIGNAL and frame.payload:
            self._signal(work, frame.payload[0])
        elif frame.kind == frames.RESIZE and work.pty >= 0 and len(frame.payload) == 4:
            rows, columns = struct.unpack(">HH", frame.payload)
            _set_size(work.pty, rows, columns)

    def _on_call(self, frame: Frame) -> None:
        try:
            call = json.loads(frame.payload)
            method, params = call["method"], call["params"]
            if method == "wake":
                self._result(frame.channel, self._wake(params))
            elif method == "exec":
                self._exec(frame.channel, params)
            elif method == "changes":
                self._start_changes(frame.channel)
            else:
                raise CallError("unknown-method", str(method))
        except CallError as error:
            self._fail(frame.channel, error.code, str(error))
        except OSError as error:
            self._fail(frame.channel, "os-error", f"{error.strerror or error} ({error.filename})")
        except (KeyError, TypeError, ValueError) as error:
            self._fail(frame.channel, "bad-call", repr(error))

    def _result(self, channel: int, value: dict[str, Any]) -> None:
        self._send(Frame(frames.RESULT, channel, json.dumps(value).encode()))

    def _fail(self, channel: int, code: str, message: str) -> None:
        payload = {"code": code, "message": message[:2000]}
        self._send(Frame(frames.FAIL, channel, json.dumps(payload).encode()))

    # -- wake: what a clone must not share with its siblings ------------------------------------

    def _wake(self, params: dict[str, Any]) -> dict[str, Any]:
        time.clock_settime_ns(time.CLOCK_REALTIME, int(params["time_ns"]))
        entropy = base64.b64decode(params["entropy"])
        with open("/dev/urandom", "wb", buffering=0) as device:
            header = struct.pack("<ii", len(entropy) * 8, len(entropy))
            fcntl.ioctl(device, _RNDADDENTROPY, header + entropy)
            fcntl.ioctl(device, _RNDRESEEDCRNG)
        name = str(params["hostname"])
        socket.sethostname(name)
        with open("/etc/hostname", "w", encoding="ascii") as file:
            file.write(f"{name}\n")
        with open("/etc/machine-id", "w", encoding="ascii") as file:
            file.write(f"{params['machine_id']}\n")
        if not params["workspace"]:
            # The machine that clones are copied from: the kernel makes its boot id when it is first
            # read, and every clone would inherit one that was read here.
            self._make_upper(str(params["upper_size"]))
            return {}
        self._mount_workspace()
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
            return {"boot_id": file.read().strip()}

    @staticmethod
    def _make_upper(size: str) -> None:
        base = f"{BASE}/workspace"
        mount("tmpfs", base, "tmpfs", _SAFE, f"mode=700,size={size}")
        for folder in ("lower", "upper", "work"):
            os.mkdir(f"{base}/{folder}", 0o755)

    def _mount_workspace(self) -> None:
        base = f"{BASE}/workspace"
        mount(f"{BASE}/dev/vdb", f"{base}/lower", "squashfs", _SAFE | _MS_RDONLY)
        root = os.stat(f"{base}/lower")
        os.chmod(UPPER, stat.S_IMODE(root.st_mode) | 0o700)
        os.chown(UPPER, UID, UID)
        mount("overlay", WORKSPACE, "overlay", _SAFE,
              f"lowerdir={base}/lower,upperdir={UPPER},workdir={base}/work,"
              "redirect_dir=off,metacopy=off,index=off,xino=off")  # fmt: skip
        self._mounted = True

    # -- exec -----------------------------------------------------------------------------------

    def _exec(self, channel: int, params: dict[str, Any]) -> None:
        if self._workload is not None:
            raise CallError("busy", "a command is running")
        argv = [str(word) for word in params["argv"]]
        environment = {str(k): str(v) for k, v in params["env"].items()}
        terminal = params["tty"]
        group = self._make_group(params["limits"])
        pty = -1
        if terminal:
            pty, inside = os.openpty()
            _set_size(pty, int(terminal["rows"]), int(terminal["columns"]))
            os.fchown(inside, UID, UID)
            child_ends = (inside, inside, inside)
            stdin, outputs = pty, {frames.STDOUT: pty}
        else:
            pipes = [os.pipe2(os.O_CLOEXEC) for _ in range(3)]
            child_ends = (pipes[0][0], pipes[1][1], pipes[2][1])
            stdin, outputs = pipes[0][1], {frames.STDOUT: pipes[1][0], frames.STDERR: pipes[2][0]}
        launcher, self._launcher = self._launcher or Launcher(self._confinement), None
        _write(f"{group}/cgroup.procs", str(launcher.pid))
        order = {
            "argv": argv,
            "env": environment,
            "cwd": str(params["cwd"]),
            "tty": bool(terminal),
            "limits": params["limits"],
        }
        trouble = launcher.launch(order, child_ends)
        for end in set(child_ends):
            os.close(end)
        if trouble:
            for end in {stdin, *outputs.values()}:
                os.close(end)
            os.waitpid(launcher.pid, 0)
            self._launch_ahead()
            code, _, message = trouble.partition(":")
            raise CallError(code, message)
        for end in {stdin, *outputs.values()}:
            os.set_blocking(end, False)
        self._workload = Workload(channel, launcher.pid, stdin, outputs, pty)
        for stream in outputs:
            self._watch_output(stream)

    def _launch_ahead(self) -> None:
        """In a template, fork the launcher that each clone finds ready.

        Not beside a workload: the two would have the same uid.
        """
        if not self._mounted and self._launcher is None:
            self._launcher = Launcher(self._confinement)

    def _make_group(self, limits: dict[str, int]) -> str:
        self._groups += 1
        group = f"{CGROUP}/work{self._groups}"
        os.mkdir(group)
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        _write(f"{group}/memory.max", str(total - (_RESERVED_MIB << 20)))
        _write(f"{group}/memory.oom.group", "1")
        _write(f"{group}/pids.max", str(int(limits["pids"])))
        return group

    def _signal(self, work: Workload, number: int) -> None:
        if number == signal.SIGKILL:
            self._kill_group()
        elif work.status is None and 0 < number < 32:
            try:
                os.killpg(work.pid, number)
            except ProcessLookupError:
                pass  # it has just ended

    def _kill_group(self) -> None:
        _write(f"{CGROUP}/work{self._groups}/cgroup.kill", "1")

    def _on_child(self, _events: int) -> None:
        try:
            self._woken.recv(4096)
        except BlockingIOError:
            pass
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                break
            if pid == 0:
                break
            if self._workload is not None and pid == self._workload.pid:
                self._workload.status = status
                self._kill_group()  # what it left running ends with it
                self._close_stdin(self._workload)
        self._finish_if_done()

    def _watch_output(self, stream: int) -> None:
        work = self._workload
        assert work is not None
        fd = work.outputs.get(stream)
        if fd is None:
            return
        if work.pty >= 0:
            self._watch_pty()
        elif work.credit[stream] > 0:
            self._watch(fd, selectors.EVENT_READ, lambda _e: self._on_output(stream, fd))
        else:
            self._watch(fd, 0, None)

    def _on_output(self, stream: int, fd: int) -> None:
        work = self._workload
        assert work is not None
        try:
            data = os.read(fd, min(_READ_SIZE, work.credit[stream]))
        except BlockingIOError:
            return
        except OSError:  # EIO: the last process on the terminal has closed it
            data = b""
        if data:
            work.credit[stream] -= len(data)
            self._send(Frame(frames.DATA, work.channel, data, stream))
            self._watch_output(stream)
            return
        self._watch(fd, 0, None)
        del work.outputs[stream]
        if fd != work.pty:
            os.close(fd)
        self._send(Frame(frames.EOF, work.channel, stream=stream))
        self._finish_if_done()

    def _watch_stdin(self) -> None:
        work = self._workload
        assert work is not None
        if work.stdin < 0:
            work.pending.clear()
        elif work.pty >= 0:
            if work.stdin_eof and not work.pending:
                work.stdin_eof = False
                work.pending += b"\x04"  # a terminal has no end of file, only the key for it
            self._watch_pty()
        elif work.pending:
            self._watch(work.stdin, selectors.EVENT_WRITE, self._on_stdin)
        else:
            self._watch(work.stdin, 0, None)
            if work.stdin_eof:
                self._close_stdin(work)

    def _on_stdin(self, _events: int) -> None:
        work = self._workload
        assert work is not None
        try:
            count = os.write(work.stdin, work.pending[:_READ_SIZE])
        except BlockingIOError:
            return
        except OSError:  # nobody reads it any more
            count = len(work.pending)
            self._close_stdin(work)
        del work.pending[:count]
        self._send(Frame(frames.CREDIT, work.channel, struct.pack(">I", count), frames.STDIN))
        self._watch_stdin()

    def _watch_pty(self) -> None:
        """A terminal is one descriptor for both directions."""
        work = self._workload
        assert work is not None
        events = selectors.EVENT_WRITE if work.pending else 0
        if frames.STDOUT in work.outputs and work.credit[frames.STDOUT] > 0:
            events |= selectors.EVENT_READ

        def ready(now: int) -> None:
            if now & selectors.EVENT_READ:
                self._on_output(frames.STDOUT, work.pty)
            if now & selectors.EVENT_WRITE and work.stdin >= 0 and self._workload is work:
                self._on_stdin(now)

        self._watch(work.pty, events, ready)

    def _close_stdin(self, work: Workload) -> None:
        if work.stdin >= 0 and work.pty < 0:
            self._watch(work.stdin, 0, None)
            os.close(work.stdin)
        if work.pty < 0:
            work.stdin = -1

    def _finish_if_done(self) -> None:
        work = self._workload
        if work is None or work.status is None:
            return
        if work.pty >= 0 and frames.STDOUT in work.outputs:
            return  # reading the terminal ends with EIO once all is read
        if work.outputs:
            return
        if work.pty >= 0:
            self._watch(work.pty, 0, None)
            os.close(work.pty)
        self._reap_group()
        events = _events(f"{CGROUP}/work{self._groups}/memory.events")
        value: dict[str, Any] = {"out_of_memory": events.get("oom_kill", 0) > 0}
        if os.WIFSIGNALED(work.status):
            value["signal"] = os.WTERMSIG(work.status)
        else:
            value["exit"] = os.WEXITSTATUS(work.status)
        self._workload = None
        self._launch_ahead()
        self._result(work.channel, value)

    def _reap_group(self) -> None:
        """Wait until nothing of the workload is left: only then do its files stand still."""
        group = f"{CGROUP}/work{self._groups}"
        while _events(f"{group}/cgroup.events").get("populated", 0):
            self._kill_group()
            try:
                os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                pass
            time.sleep(0.001)

    def _watch(self, fd: int, events: int, callback: Any) -> None:
        registered = fd in self._selector.get_map()
        if events and registered:
            self._selector.modify(fd, events, callback)
        elif events:
            self._selector.register(fd, events, callback)
        elif registered:
            self._selector.unregister(fd)

    # -- changes ----------------------------------------------------------------------------------

    def _start_changes(self, channel: int) -> None:
        if self._workload is not None or self._changes is not None:
            raise CallError("busy", "a command is running")
        if not self._mounted:
            raise CallError("no-workspace", "no workspace is mounted")
        self._changes = self._walk("")
        self._changes_channel = channel
        self._changes_credit = frames.WINDOW
        self._changes_count = 0
        self._changes_pending = b""

    def _pump_changes(self) -> None:
        """Send as much of the changes as the host has granted credit for."""
        while self._changes is not None and self._changes_credit > 0:
            if not self._changes_pending:
                try:
                    self._changes_pending = next(self._changes, b"")
                except (CallError, OSError, RecursionError) as error:
                    self._changes = None
                    code = "bad-layer" if isinstance(error, RecursionError) else getattr(error, "code", "os-error")
                    self._fail(self._changes_channel, code, f"the changes cannot be read: {error}")
                    return
                if not self._changes_pending:
                    self._changes = None
                    self._send(Frame(frames.EOF, self._changes_channel, stream=frames.CHANGES))
                    self._result(self._changes_channel, {"entries": self._changes_count})
                    return
            count = min(self._changes_credit, frames.MAX_PAYLOAD)
            part, self._changes_pending = (
                self._changes_pending[:count],
                self._changes_pending[count:],
            )
            self._changes_credit -= len(part)
            self._send(Frame(frames.DATA, self._changes_channel, part, frames.CHANGES))

    def _walk(self, folder: str) -> Iterator[bytes]:
        """Yield the records of one folder of the upper layer, parents first, in byte order."""
        batch = bytearray()
        with os.scandir(f"{UPPER}/{folder}".encode("utf-8", "surrogateescape")) as entries:
            names = sorted(entry.name for entry in entries)
        for raw in names:
            name = raw.decode("utf-8", "surrogateescape")
            path = f"{folder}/{name}" if folder else name
            real = f"{UPPER}/{path}".encode("utf-8", "surrogateescape")
            info = os.lstat(real)
            batch += self._record(path, real, info)
            if len(batch) >= _READ_SIZE or (stat.S_ISREG(info.st_mode) and info.st_size):
                yield bytes(batch)
                batch.clear()
            if stat.S_ISREG(info.st_mode):
                yield from _content(real, info.st_size)
            elif stat.S_ISDIR(info.st_mode):
                if batch:
                    yield bytes(batch)
                    batch.clear()
                yield from self._walk(path)
        if batch:
            yield bytes(batch)

    def _record(self, path: str, real: bytes, info: os.stat_result) -> bytes:
        self._changes_count += 1
        meta: dict[str, Any] = {"p": path, "m": stat.S_IMODE(info.st_mode)}
        mode = info.st_mode
        if stat.S_ISREG(mode) or stat.S_ISDIR(mode):
            for attribute in _OVERLAY_BAD:
                if _attribute(real, attribute):
                    raise CallError("bad-layer", f"{path!r} has {attribute}")
        if stat.S_ISREG(mode):
            meta["t"], meta["s"] = "file", info.st_size
        elif stat.S_ISDIR(mode):
            meta["t"] = "dir"
            meta["o"] = _attribute(real, "trusted.overlay.opaque") == b"y"
        elif stat.S_ISLNK(mode):
            meta["t"] = "symlink"
            meta["l"] = os.fsdecode(os.readlink(real))
        elif stat.S_ISCHR(mode) and info.st_rdev == 0:
            meta["t"] = "whiteout"
        else:
            meta["t"] = "other"
        header = json.dumps(meta).encode()
        return struct.pack(">I", len(header)) + header


def _content(real: bytes, size: int) -> Iterator[bytes]:
    """The file's bytes, exactly ``size`` of them: the workload is dead, so the file stands still."""
    fd = os.open(real, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        while size > 0:
            data = os.read(fd, min(frames.MAX_PAYLOAD, size))
            if not data:
                raise CallError("os-error", "a file became shorter while it was read")
            size -= len(data)
            yield data
    finally:
        os.close(fd)


def _attribute(path: bytes, name: str) -> bytes:
    try:
        return os.getxattr(path, name, follow_symlinks=False)
    except OSError:
        return b""


def _events(path: str) -> dict[str, int]:
    with open(path, encoding="ascii") as file:
        return {key: int(value) for key, value in (line.split() for line in file)}


def _set_size(fd: int, rows: int, columns: int) -> None:
    fcntl.ioctl(fd, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

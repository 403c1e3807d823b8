"""A child that has already given up most of its rights, waiting to be told which command to become.

Forking an interpreter and dropping rights cost more than the rest of an exec under emulation; done
in the template, every clone gets them for nothing. What is left for :func:`Launcher.launch` is what
depends on the command: its user, limits, the workspace's landlock rule, the folder, and exec itself.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import json
import os
import resource
import signal
import socket
import struct
import termios

from luminaguard.guest.confine import Confinement
from luminaguard.guest.machine import CGROUP, read_small, write

TYPE_CHECKING = False  # typing takes 70 ms of an emulated boot
if TYPE_CHECKING:
    from typing import Any

__all__ = ["Group", "Launcher"]

_RESERVED_MIB = 56  # of guest memory, for the kernel and PID 1
_DEFAULT_PIDS = 256
_USER = struct.Struct(">I")
_ADDR_NO_RANDOMIZE = 0x0040000
_libc = ctypes.CDLL(None, use_errno=True)


class Group:
    """The cgroup of one command: everything that it starts, limited and killed as a whole."""

    _made = 0

    def __init__(self) -> None:
        Group._made += 1
        self._path = f"{CGROUP}/work{Group._made}"
        os.mkdir(self._path)
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        write(f"{self._path}/memory.max", str(total - (_RESERVED_MIB << 20)).encode())
        write(f"{self._path}/memory.oom.group", b"1")
        self.limit_processes(_DEFAULT_PIDS)

    def add(self, pid: int) -> None:
        """Move a process into the group."""
        write(f"{self._path}/cgroup.procs", str(pid).encode())

    def limit_processes(self, count: int) -> None:
        """Refuse more than ``count`` processes and threads."""
        write(f"{self._path}/pids.max", str(count).encode())
        self.pids = count

    def kill(self) -> None:
        """Kill all of it."""
        write(f"{self._path}/cgroup.kill", b"1")

    @property
    def populated(self) -> bool:
        """Whether anything of it is left."""
        return b"populated 1" in read_small(f"{self._path}/cgroup.events")

    @property
    def ran_out_of_memory(self) -> bool:
        """Whether the kernel has killed it for its memory."""
        events = dict(line.split() for line in read_small(f"{self._path}/memory.events").splitlines())
        return int(events.get(b"oom_kill", b"0")) > 0


class Launcher:
    """The child as PID 1 sees it: its pid, its group, and PID 1's ends of its three pipes."""

    def __init__(self, confinement: Confinement, *, randomize: bool) -> None:
        self._socket, inside = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        (stdin, self.stdin), (self.stdout, stdout), (self.stderr, stderr) = (os.pipe2(os.O_CLOEXEC) for _ in range(3))
        for end in (self.stdin, self.stdout, self.stderr):
            os.set_blocking(end, False)
        self.group = Group()
        self.pid = os.fork()
        if self.pid == 0:
            _become(inside.detach(), (stdin, stdout, stderr), confinement, randomize=randomize)
        inside.close()
        for end in (stdin, stdout, stderr):
            os.close(end)
        self.group.add(self.pid)
        # A template must not be saved in the middle of this.
        if (said := self._socket.recv(512)) != b"-":
            raise OSError(f"the launcher could not give up its rights: {said.decode('utf-8', 'replace')}")

    def launch(self, user: int, order: dict[str, Any], terminal: int) -> None:
        """Give the order, and the terminal if there is one (else -1); raises OSError if the child is gone.

        What the command reads and writes becomes its user's, who can then open it by name (/dev/stdout).

        How it went is read with :meth:`verdict` once :attr:`said` is readable.
        """
        for end in (terminal,) if terminal >= 0 else (self.stdin, self.stdout, self.stderr):
            os.fchown(end, user, user)
        message = [_USER.pack(user), json.dumps(order).encode()]
        socket.send_fds(self._socket, message, [terminal] if terminal >= 0 else [])

    @property
    def said(self) -> int:
        """A descriptor that becomes readable when the child has become the command, or could not."""
        return self._socket.fileno()

    def verdict(self) -> str:
        """Why the command could not be started, as ``code:message``; nothing if it was."""
        try:
            # Ends with nothing when exec closes the other end.
            return self._socket.recv(512).decode("utf-8", "replace")
        except OSError as error:
            return f"os-error:the launcher is gone ({error.strerror})"
        finally:
            self._socket.close()

    def discard(self) -> None:
        """End a child that is not needed; it is reaped like any other."""
        self.group.kill()
        self._socket.close()
        self.close_pipes()

    def close_pipes(self) -> None:
        """For a command that has a terminal, or none that runs."""
        for end in (self.stdin, self.stdout, self.stderr):
            os.close(end)


def _become(fd: int, ends: tuple[int, int, int], confinement: Confinement, *, randomize: bool) -> None:
    """In the child: give up rights, wait for the order, turn into the command; never return."""
    code = "os-error"
    try:
        inside = _keep_only(fd, ends)
        if not randomize:
            # QEMU 7 translates a program again for each address at which it is mapped.
            _libc.personality(_ADDR_NO_RANDOMIZE)
        os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))  # not as PID 1, which waits for it
        os.setpriority(os.PRIO_PROCESS, 0, 0)
        confinement.drop_privileges()
        inside.send(b"-")
        data, terminals, _, _ = socket.recv_fds(inside, _USER.size + (1 << 18), 1)
        confinement.become(*_USER.unpack_from(data))  # before anything of the order is looked at
        order = json.loads(data[_USER.size :])
        for terminal in terminals:
            for target in range(3):
                os.dup2(terminal, target)
            if terminal > 2:
                os.close(terminal)
            fcntl.ioctl(0, termios.TIOCSCTTY, 0)
        limits = order["limits"]
        resource.setrlimit(resource.RLIMIT_NOFILE, (limits["nofile"], limits["nofile"]))
        resource.setrlimit(resource.RLIMIT_FSIZE, (limits["fsize"], limits["fsize"]))
        confinement.seal(order["profile"], packages=order["packages"])
        code = "bad-cwd"
        os.chdir(order["cwd"])
        code = "not-executable"
        if not order["argv"][0]:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))  # as a shell says of an empty name
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


def _keep_only(fd: int, ends: tuple[int, int, int]) -> socket.socket:
    """Put the pipes at 0 to 2 and the socket at 3, and close the rest: the port is not for here."""
    high = [fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 64) for end in (*ends, fd)]
    for target, end in enumerate(high):
        os.dup2(end, target, inheritable=target < 3)
    os.closerange(4, 128)
    signal.set_wakeup_fd(-1)
    for number in (signal.SIGCHLD, signal.SIGINT, signal.SIGPIPE, signal.SIGXFSZ):
        signal.signal(number, signal.SIG_DFL)
    os.setsid()
    return socket.socket(fileno=3)

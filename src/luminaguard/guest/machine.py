"""What PID 1 does to the machine itself: mounts, kernel settings, identity, the workspace.

A clone runs :meth:`Identity.give` and :func:`mount_workspace` before anything else, with an empty
translation cache under emulation: every new path through the interpreter or the kernel is paid for
there. So they use system calls and no text files, and what can be done in the template
(:func:`prepare`, :class:`Identity`, :func:`make_upper`) is done there.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import socket
import stat
import struct
import time
from collections.abc import Sequence

from luminaguard.guest import ownership
from luminaguard.guest.confine import IDENTITY, landlock_abi
from luminaguard.guest.ownership import Joined

__all__ = [
    "CGROUP",
    "UPPER",
    "Identity",
    "around_user",
    "facts",
    "find_port",
    "inspect",
    "make_upper",
    "mount_packages",
    "mount_workspace",
    "prepare",
    "read_boot_id",
    "read_small",
    "unmount_workspace",
    "write",
]

BASE = "/run/luminaguard"
CGROUP = f"{BASE}/cgroup"
CONTAINER_RUNTIME = "/usr/lib/luminaguard"
"""There only in an image that was made of a container."""
UPPER = f"{BASE}/workspace/upper"
WORKSPACE = "/workspace"
HOME = "/home/user"
PORT_NAME = "lumina.agent"
_MS_RDONLY, _MS_NOSUID, _MS_NODEV, _MS_NOEXEC, _MS_REMOUNT, _MS_BIND, _MS_MOVE = 1, 2, 4, 8, 32, 4096, 8192
_SAFE = _MS_NOSUID | _MS_NODEV
_UPPER_INODES = "64k"
_RNDADDENTROPY, _RNDRESEEDCRNG = 0x40085203, 0x5207
_SIOCSIFFLAGS, _IFF_UP, _IFF_RUNNING = 0x8914, 0x1, 0x40
_MASKED = (
    "config.gz", "iomem", "ioports", "kallsyms", "kcore", "key-users", "keys", "kmsg", "kpagecgroup", "kpagecount",
    "kpageflags", "modules", "sched_debug", "slabinfo", "timer_list", "vmallocinfo",
)  # fmt: skip
"""Under /proc: what tells about the kernel or the machine. What acts on it stays: nobody but root may write there."""
IMAGE_USER = "1000"
"""The number that the image's own files of accounts give to who commands run as."""
_NUMBERS = (2, 3)  # the columns of a user and of a group
_LOWER = {"lower": "vdb", "layer": "vdc"}
_SYSCTLS = (
    ("kernel/yama/ptrace_scope", "3"), ("kernel/dmesg_restrict", "1"), ("kernel/kptr_restrict", "2"),
    ("kernel/unprivileged_bpf_disabled", "1"), ("user/max_user_namespaces", "0"),
    ("kernel/perf_event_paranoid", "3"), ("fs/suid_dumpable", "0"), ("vm/unprivileged_userfaultfd", "0"),
    ("kernel/sysrq", "0"), ("kernel/kexec_load_disabled", "1"), ("kernel/core_pattern", "|/bin/false"),
    ("vm/mmap_min_addr", "65536"), ("vm/mmap_rnd_bits", "32"), ("vm/mmap_rnd_compat_bits", "16"),
    ("kernel/randomize_va_space", "2"), ("kernel/oops_limit", "100"), ("kernel/warn_limit", "100"),
    ("dev/tty/ldisc_autoload", "0"), ("dev/tty/legacy_tiocsti", "0"), ("kernel/io_uring_disabled", "2"),
    ("net/core/bpf_jit_harden", "2"), ("fs/protected_symlinks", "1"), ("fs/protected_hardlinks", "1"),
    ("fs/protected_fifos", "2"), ("fs/protected_regular", "2"),
    ("net/ipv4/icmp_ignore_bogus_error_responses", "1"), ("net/ipv4/icmp_echo_ignore_broadcasts", "1"),
    ("net/ipv4/tcp_syncookies", "1"),
    *((f"net/{family}/conf/{of}/{name}", "0")
      for name, families in (("accept_redirects", ("ipv4", "ipv6")), ("accept_source_route", ("ipv4", "ipv6")),
                             ("accept_ra", ("ipv6",)))
      for family in families for of in ("all", "default")),
    # The kernel starts no program by itself: none for what it has no module for, and none with a right.
    ("kernel/modprobe", "\n"), ("kernel/usermodehelper/bset", "0 0"), ("kernel/usermodehelper/inheritable", "0 0"),
    ("kernel/modules_disabled", "1"),
)  # fmt: skip
"""Those that this kernel does not have are left out; what is in force is read back by :func:`inspect`."""

_libc = ctypes.CDLL(None, use_errno=True)


def write(path: str, data: bytes) -> None:
    """Write ``data`` to an existing file in one system call; raises OSError."""
    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(fd, data)
    finally:
        os.close(fd)


def read_small(path: str) -> bytes:
    """Up to 4 KiB of a file of the kernel's; raises OSError."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return os.read(fd, 4096)
    finally:
        os.close(fd)


def read_all(path: str) -> str:
    """A file of the kernel's that may be longer, up to 64 KiB; raises OSError."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    data = b""
    try:
        while len(data) < 1 << 16 and (piece := os.read(fd, 1 << 14)):
            data += piece
    finally:
        os.close(fd)
    return data.decode("utf-8", "replace").strip()


def prepare() -> None:
    """Mount what the workload may see, hide the rest, and close what the kernel leaves open."""
    for folder in ("dev", "sys", "cgroup", "workspace", "packages"):
        os.mkdir(f"{BASE}/{folder}", 0o700)
    os.mkdir(IDENTITY, 0o755)
    _mount("sysfs", f"{BASE}/sys", "sysfs", _SAFE | _MS_NOEXEC)
    _mount("/dev", f"{BASE}/dev", "", _MS_MOVE)
    _make_devices()
    _mount("proc", "/proc", "proc", _SAFE | _MS_NOEXEC, "hidepid=invisible")
    for name in _MASKED:
        if os.path.exists(f"/proc/{name}"):
            _mount("/dev/null", f"/proc/{name}", "", _MS_BIND)
    for folder, mode, size, inodes in (
        ("/tmp", 0o1777, "25%", "32k"), ("/var/tmp", 0o1777, "10%", "8k"),  # noqa: S108
        ("/dev/shm", 0o1777, "10%", "4k"), (HOME, 0o755, "25%", "32k"),  # noqa: S108
    ):  # fmt: skip
        _mount("tmpfs", folder, "tmpfs", _SAFE, f"mode={mode:o},size={size},nr_inodes={inodes}")
    _mount("cgroup", CGROUP, "cgroup2", _SAFE | _MS_NOEXEC)
    write(f"{CGROUP}/cgroup.subtree_control", b"+memory +pids")
    settings = dict(_SYSCTLS)
    if os.path.isdir(CONTAINER_RUNTIME):
        # /bin/false is the container's there, and would be run as root. No core is written: its limit is 0.
        settings["kernel/core_pattern"] = "core"
    for name, value in settings.items():
        try:
            write(f"/proc/sys/{name}", value.encode())
        except FileNotFoundError:
            pass  # another kernel's

    _raise_loopback()


def _raise_loopback() -> None:
    """The only network interface there is: what a command serves on 127.0.0.1 it can reach itself."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        fcntl.ioctl(control, _SIOCSIFFLAGS, struct.pack("16sH14x", b"lo", _IFF_UP | _IFF_RUNNING))


def find_port() -> int:
    """The virtio-serial port that leads to the host, open and non-blocking; -1 if this machine has none."""
    ports = f"{BASE}/sys/class/virtio-ports"
    for name in os.listdir(ports):
        if read_small(f"{ports}/{name}/name").strip() == PORT_NAME.encode():
            return os.open(f"{BASE}/dev/{name}", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    return -1


class Identity:
    """What makes a machine differ from every other copy of its template; made in the template."""

    def __init__(self) -> None:
        self._accounts = {}
        for name in ("passwd", "group"):
            path = f"/etc/{name}"
            self._accounts[name] = around_user(read_all(path))
            _put(name, "")
            _mount(f"{IDENTITY}/{name}", path, "", _MS_BIND)
            _mount("", path, "", _MS_REMOUNT | _MS_BIND | _MS_RDONLY | _SAFE | _MS_NOEXEC)

    def give(self, time_ns: int, entropy: bytes, hostname: str, machine_id: str, user: int) -> None:
        """Set the clock, add entropy, and set the names and the number of the user; raises OSError."""
        time.clock_settime_ns(time.CLOCK_REALTIME, time_ns)
        device = os.open("/dev/urandom", os.O_WRONLY | os.O_CLOEXEC)
        fcntl.ioctl(device, _RNDADDENTROPY, struct.pack("<ii", len(entropy) * 8, len(entropy)) + entropy)
        fcntl.ioctl(device, _RNDRESEEDCRNG)
        os.close(device)
        socket.sethostname(hostname)
        _put("hostname", f"{hostname}\n")
        _put("machine-id", f"{machine_id}\n")
        for name, pieces in self._accounts.items():
            _put(name, str(user).join(pieces))
        os.chown(HOME, user, user)


def around_user(accounts: str) -> list[str]:
    """The text of passwd(5) or group(5), cut where the number of the image's user is."""
    pieces = [""]
    for line in accounts.splitlines():
        for column, field in enumerate(line.split(":")):
            pieces[-1] += ":" if column else ""
            if field == IMAGE_USER and column in _NUMBERS:
                pieces.append("")
            else:
                pieces[-1] += field
        pieces[-1] += "\n"
    return pieces


def _put(name: str, text: str) -> None:
    fd = os.open(f"{IDENTITY}/{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
    os.write(fd, text.encode())
    os.close(fd)


def read_boot_id() -> str:
    """The kernel makes it when it is first read: never to be called in a template."""
    return read_small("/proc/sys/kernel/random/boot_id").decode().strip()


def inspect(names: list[str]) -> dict[str, str]:
    """The kernel's settings by their names below /proc/sys, for an audit; a missing one lacks.

    Raises:
        ValueError: a name leads elsewhere.
    """
    found = {}
    for name in names:
        if not all(part.isidentifier() for part in name.split("/")):
            raise ValueError(f"no setting of the kernel: {name[:100]!r}")
        try:
            found[name] = read_small(f"/proc/sys/{name}").decode().strip()
        except FileNotFoundError:
            pass
    return found


def facts() -> dict[str, str]:
    """What else of the running kernel an audit reads back; raises OSError."""
    found = {"cmdline": read_all("/proc/cmdline"), "mounts": read_all("/proc/self/mounts")}
    for name, kind, target in (("modules", "proc", "modules"), ("lockdown", "securityfs", "lockdown")):
        # Neither is in the workload's sight: a fresh mount where only PID 1 looks.
        folder = f"{BASE}/audit"
        os.mkdir(folder, 0o700)
        _mount(kind, folder, kind, _SAFE | _MS_NOEXEC | _MS_RDONLY)
        try:
            found[name] = read_all(f"{folder}/{target}")
        except FileNotFoundError:
            found[name] = ""  # of a kernel that has no modules, for one
        _libc.umount2(folder.encode(), 0)
        os.rmdir(folder)
    found["landlock"] = str(landlock_abi())
    return found


def make_upper(size: str) -> tuple[Joined, Joined]:
    """In the template: the tmpfs on which each clone's changes will lie, and the disks below it."""
    base = f"{BASE}/workspace"
    _mount("tmpfs", base, "tmpfs", _SAFE, f"mode=700,size={size},nr_inodes={_UPPER_INODES}")
    for folder in (*_LOWER, "upper", "work"):
        os.mkdir(f"{base}/{folder}", 0o755)
    devices = f"{BASE}/dev"
    lower, layer = (
        ownership.join(name, f"{devices}/{disk}", f"{devices}/ram0", number * ownership.MEMORY, devices)
        for number, (name, disk) in enumerate(_LOWER.items())
    )
    return lower, layer


def mount_workspace(disks: Sequence[Joined], user: int) -> None:
    """In a clone: the disks, read-only and the user's, each on the one before, under an overlay."""
    base = f"{BASE}/workspace"
    folders: list[str] = []
    for name, disk in zip(_LOWER, disks, strict=False):
        disk.give_to(user)
        folders.insert(0, f"{base}/{name}")
        _mount(disk.node, folders[0], "squashfs", _SAFE | _MS_RDONLY)
    os.chmod(UPPER, stat.S_IMODE(os.stat(folders[0]).st_mode) | 0o700)
    os.chown(UPPER, user, user)
    _mount("overlay", WORKSPACE, "overlay", _SAFE,
           f"lowerdir={':'.join(folders)},upperdir={UPPER},workdir={base}/work,"
           "redirect_dir=off,metacopy=off,index=off,xino=off")  # fmt: skip


def mount_packages() -> None:
    """In a clone: what the fourth disk has below /usr, beside what is there, of which it can replace nothing."""
    packages = f"{BASE}/packages"
    _mount(f"{BASE}/dev/vdd", packages, "squashfs", _SAFE | _MS_RDONLY)
    _mount("overlay", "/usr", "overlay", _SAFE | _MS_RDONLY, f"lowerdir=/usr:{packages}/usr")


def unmount_workspace(*, layer: bool) -> None:
    """Undo :func:`mount_workspace`, and forget what the overlay left in its work folder."""
    base = f"{BASE}/workspace"
    for target in (WORKSPACE, f"{base}/lower", *([f"{base}/layer"] if layer else [])):
        if _libc.umount2(target.encode(), 0) != 0:
            raise OSError(ctypes.get_errno(), f"umount {target}")
    for folder in (f"{base}/work/work", f"{base}/work", UPPER):
        os.rmdir(folder)
    for folder in ("work", "upper"):
        os.mkdir(f"{base}/{folder}", 0o755)


def _make_devices() -> None:
    _mount("tmpfs", "/dev", "tmpfs", _MS_NOSUID | _MS_NOEXEC, "mode=755,size=64k,nr_inodes=64")
    old = os.umask(0)
    for name, major, minor in (("null", 1, 3), ("zero", 1, 5), ("full", 1, 7), ("random", 1, 8),
                               ("urandom", 1, 9), ("tty", 5, 0)):  # fmt: skip
        os.mknod(f"/dev/{name}", stat.S_IFCHR | 0o666, os.makedev(major, minor))
    for name, target in (("fd", "/proc/self/fd"), ("stdin", "fd/0"), ("stdout", "fd/1"),
                         ("stderr", "fd/2"), ("ptmx", "pts/ptmx")):  # fmt: skip
        os.symlink(target, f"/dev/{name}")
    for folder in ("pts", "shm"):
        os.mkdir(f"/dev/{folder}", 0o755)
    os.umask(old)
    _mount("devpts", "/dev/pts", "devpts", _MS_NOSUID | _MS_NOEXEC, "ptmxmode=666,mode=620,newinstance")


def _mount(source: str, target: str, kind: str, flags: int, data: str = "") -> None:
    if _libc.mount(source.encode(), target.encode(), kind.encode(), flags, data.encode()) != 0:
        raise OSError(ctypes.get_errno(), f"mount {target}")

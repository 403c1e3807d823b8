"""Take everything away from the process that is about to become the workload.

Runs between fork and exec, in this order: capabilities but those to become another user, groups, resource limits,
no_new_privs, seccomp, the user, landlock, and the filter of a stricter profile. Constants are those of the
kernel's uapi headers for x86-64. Of landlock all is used that the kernel has (Debian 12's: ABI 2),
but for TCP: programs may talk to themselves over the loopback, and there is no other interface.
"""

from __future__ import annotations

import ctypes
import errno
import os
import resource
import struct

from luminaguard.guest.filters import program

__all__ = ["Confinement", "landlock_abi", "make_ruleset", "restrict"]

_libc = ctypes.CDLL(None, use_errno=True)
_PR_SET_DUMPABLE, _PR_SET_SECCOMP, _PR_CAPBSET_DROP, _PR_SET_NO_NEW_PRIVS = 4, 22, 24, 38
_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL = 47, 4
_SECCOMP_MODE_FILTER = 2
_CAPABILITY_VERSION_3, _CAP_SETGID, _CAP_SETUID = 0x20080522, 6, 7

_LANDLOCK_CREATE, _LANDLOCK_ADD, _LANDLOCK_RESTRICT = 444, 445, 446
_FS_EXECUTE, _FS_WRITE, _FS_READ_FILE, _FS_READ_DIR = 1, 2, 4, 8
_FS_IOCTL_DEV = 1 << 15
_FS_BY_ABI = {1: (1 << 13) - 1, 2: (1 << 14) - 1, 3: (1 << 15) - 1, 5: (1 << 16) - 1}
"""ABI 2 has REFER, ABI 3 TRUNCATE, ABI 5 IOCTL_DEV (Documentation/userspace-api/landlock.rst)."""
_FS_ALL = _FS_BY_ABI[5]
_NET_ABI = 4  # TCP can be handled: nothing of it is, since there is no network but the machine's own loopback
_SCOPES, _SCOPE_ABI = 3, 6  # abstract Unix sockets and signals: none outside of what the workload started
_VERSION = 1
_READ = _FS_EXECUTE | _FS_READ_FILE | _FS_READ_DIR
_DEVICE = _FS_WRITE | _FS_READ_FILE | _FS_IOCTL_DEV
_FS_MAKE_CHAR, _FS_MAKE_BLOCK = 1 << 6, 1 << 11
_OWN = _FS_ALL & ~(_FS_MAKE_CHAR | _FS_MAKE_BLOCK)

IDENTITY = "/run/identity"
_NOT_READABLE = frozenset({"root", "run", "sys", "tmp", "workspace"})
DEVICES = ("/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom", "/dev/tty",
           "/dev/ptmx", "/dev/pts")  # fmt: skip
WORKSPACE = "/workspace"
OWNED = ("/tmp", "/var/tmp", "/home/user", "/dev/shm")  # noqa: S108  # the guest's own


class Confinement:
    """Everything that can be prepared once, before any workload runs."""

    def __init__(self, profile: str = "default") -> None:
        self._profile = profile
        self._ruleset = -1
        self._filter = _Filter(profile)
        self._strict = _Filter("strict")

    def drop_privileges(self) -> None:
        """All that needs no knowledge of the command or its user; done ahead, in the template.

        Raises:
            OSError: a step failed; the caller must not go on.
        """
        _prctl(_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL)
        for capability in range(64):
            if _libc.prctl(_PR_CAPBSET_DROP, capability, 0, 0, 0) != 0:
                break  # EINVAL: one past the last capability of this kernel
        os.setgroups([])
        _keep_capabilities(_CAP_SETGID, _CAP_SETUID)
        os.umask(0o022)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (0, 0))
        _prctl(_PR_SET_NO_NEW_PRIVS, 1)
        self._ruleset = make_ruleset()
        self._filter.install()

    @staticmethod
    def become(user: int) -> None:
        """Be this user, and of the group with the same number, for good: the last capabilities go with it.

        Raises:
            OSError: a step failed, or it would be root; the caller must not go on.
        """
        if user <= 0:
            raise OSError(errno.EPERM, "a command is never root")
        os.setresgid(user, user, user)
        os.setresuid(user, user, user)

    def seal(self, profile: str, *, packages: bool = False) -> None:
        """Right before exec: landlock, which has to wait until the workspace is mounted.

        Args:
            profile: that of this confinement, or ``strict``, whose filter comes on top.
            packages: whether programs of another disk were mounted over /usr, which no rule of before holds for.

        Raises:
            OSError: a step failed; the caller must not go on.
        """
        if packages:
            _allow(self._ruleset, "/usr", _READ)
        restrict(self._ruleset, WORKSPACE)
        if profile != self._profile:
            self._strict.install()


class _Filter:
    """A seccomp filter that waits to be installed; it lives as long as the buffers."""

    def __init__(self, profile: str) -> None:
        code = program(profile)
        self._code = ctypes.create_string_buffer(code)
        self._fprog = ctypes.create_string_buffer(
            struct.pack("<HxxxxxxQ", len(code) // 8, ctypes.addressof(self._code))
        )

    def install(self) -> None:
        _prctl(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, ctypes.addressof(self._fprog))


def landlock_abi() -> int:
    """Which landlock this kernel has; raises OSError when it has none."""
    return _syscall(_LANDLOCK_CREATE, 0, 0, _VERSION)


def make_ruleset() -> int:
    """A landlock ruleset of all but the workspace, which is not mounted yet; raises OSError.

    Abstract sockets of others and signals to them are handled without a rule that allows any.
    """
    abi = landlock_abi()
    handled = [
        next(rights for since, rights in sorted(_FS_BY_ABI.items(), reverse=True) if abi >= since),
        *([0] if abi >= _NET_ABI else []),
        *([_SCOPES] if abi >= _SCOPE_ABI else []),
    ]
    attributes = ctypes.create_string_buffer(struct.pack(f"<{len(handled)}Q", *handled))
    ruleset = _syscall(_LANDLOCK_CREATE, ctypes.addressof(attributes), 8 * len(handled), 0)
    for path, is_folder in readable():
        _allow(ruleset, path, (_READ if is_folder else _READ & ~_FS_READ_DIR) & handled[0])
    for path in DEVICES:
        _allow(ruleset, path, (_DEVICE | (_FS_READ_DIR if path == "/dev/pts" else 0)) & handled[0])
    for path in OWNED:
        _allow(ruleset, path, _OWN & handled[0])
    return ruleset


def readable() -> list[tuple[str, bool]]:
    """What lies in the root, but for what is nobody's business or has a rule of its own; and whether it is a folder."""
    with os.scandir("/") as entries:
        found = [(entry.path, entry.is_dir(follow_symlinks=False)) for entry in entries
                 if entry.name not in _NOT_READABLE and not entry.is_symlink()]  # fmt: skip
    return [*sorted(found), (IDENTITY, True)]


def restrict(ruleset: int, workspace: str) -> None:
    """Allow the workspace and put the ruleset in force, for good; raises OSError."""
    rights = next(rights for since, rights in sorted(_FS_BY_ABI.items(), reverse=True) if landlock_abi() >= since)
    _allow(ruleset, workspace, _OWN & rights)
    _syscall(_LANDLOCK_RESTRICT, ruleset, 0)
    os.close(ruleset)


def _allow(ruleset: int, path: str, access: int) -> None:
    fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
    rule = ctypes.create_string_buffer(struct.pack("<Qi", access, fd))
    _syscall(_LANDLOCK_ADD, ruleset, 1, ctypes.addressof(rule), 0)
    os.close(fd)


def _keep_capabilities(*kept: int) -> None:
    """Give up all others (linux/capability.h)."""
    mask = sum(1 << number for number in kept)
    if _libc.capset(struct.pack("<Ii", _CAPABILITY_VERSION_3, 0), struct.pack("<6I", mask, mask, 0, 0, 0, 0)) != 0:
        raise OSError(ctypes.get_errno(), "capset")


def _prctl(option: int, *arguments: int) -> None:
    padded = [ctypes.c_ulong(a) for a in (*arguments, 0, 0, 0, 0)[:4]]
    if _libc.prctl(option, *padded) != 0:
        raise OSError(ctypes.get_errno(), f"prctl {option}")


def _syscall(number: int, *arguments: int) -> int:
    result = _libc.syscall(ctypes.c_long(number), *(ctypes.c_ulong(a) for a in arguments))
    if result < 0:
        raise OSError(ctypes.get_errno(), f"syscall {number}")
    return int(result)

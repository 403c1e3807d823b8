"""Take everything away from the process that is about to become the workload.

Runs between fork and exec, in this order: capability bounding set, groups and uid, resource limits,
no_new_privs, seccomp, landlock. Constants are those of the kernel's uapi headers
for x86-64; the guest kernel is 6.1 or later (landlock ABI 2, no TCP rules), so seccomp covers what
landlock does not.
"""

from __future__ import annotations

import ctypes
import os
import resource
import struct
from collections.abc import Iterable

__all__ = ["UID", "Confinement"]

UID = 1000

_libc = ctypes.CDLL(None, use_errno=True)
_PR_SET_DUMPABLE, _PR_SET_SECCOMP, _PR_CAPBSET_DROP, _PR_SET_NO_NEW_PRIVS = 4, 22, 24, 38
_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL = 47, 4
_SECCOMP_MODE_FILTER = 2

_LANDLOCK_CREATE, _LANDLOCK_ADD, _LANDLOCK_RESTRICT = 444, 445, 446
_FS_EXECUTE, _FS_WRITE, _FS_READ_FILE, _FS_READ_DIR = 1, 2, 4, 8
_FS_ALL = (1 << 14) - 1  # ABI 2: up to REFER
_READ = _FS_EXECUTE | _FS_READ_FILE | _FS_READ_DIR
_DEVICE = _FS_WRITE | _FS_READ_FILE
_FS_MAKE_CHAR, _FS_MAKE_BLOCK = 1 << 6, 1 << 11
_OWN = _FS_ALL & ~(_FS_MAKE_CHAR | _FS_MAKE_BLOCK)

READABLE = ("/usr", "/etc", "/proc", "/var", "/dev")
DEVICES = ("/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom", "/dev/tty",
           "/dev/ptmx", "/dev/pts")  # fmt: skip
WORKSPACE = "/workspace"
OWNED = ("/tmp", "/var/tmp", "/home/user", "/dev/shm")  # noqa: S108  # the guest's own

# Refused with EPERM. What a workload inside a machine of its own never needs, and what kernel
# exploits like to start from.
_DENIED = {
    "ptrace": 101, "syslog": 103, "setfsuid": 122, "personality": 135,
    "modify_ldt": 154, "pivot_root": 155, "adjtimex": 159, "chroot": 161, "acct": 163,
    "settimeofday": 164, "mount": 165, "umount2": 166, "swapon": 167, "swapoff": 168,
    "reboot": 169, "sethostname": 170, "setdomainname": 171, "iopl": 172, "ioperm": 173,
    "init_module": 175, "delete_module": 176, "quotactl": 179, "lookup_dcookie": 212,
    "clock_settime": 227, "mbind": 237, "set_mempolicy": 238, "get_mempolicy": 239,
    "kexec_load": 246, "add_key": 248, "request_key": 249, "keyctl": 250, "migrate_pages": 256,
    "unshare": 272, "move_pages": 279, "perf_event_open": 298,
    "fanotify_init": 300, "name_to_handle_at": 303, "open_by_handle_at": 304,
    "clock_adjtime": 305, "setns": 308, "process_vm_readv": 310, "process_vm_writev": 311,
    "kcmp": 312, "finit_module": 313, "kexec_file_load": 320, "bpf": 321, "userfaultfd": 323,
    "io_uring_setup": 425, "io_uring_enter": 426, "io_uring_register": 427, "open_tree": 428,
    "move_mount": 429, "fsopen": 430, "fsconfig": 431, "fsmount": 432, "fspick": 433,
    "pidfd_getfd": 438, "process_madvise": 440, "mount_setattr": 442, "quotactl_fd": 443,
}  # fmt: skip
_SOCKET, _SOCKETPAIR, _CLONE, _IOCTL, _CLONE3 = 41, 53, 56, 16, 435
_AF_ALLOWED = (1, 2, 10)  # UNIX, INET, INET6: there is no network device behind the last two
_CLONE_NEW = 0x7E020080  # every CLONE_NEW* flag
_TIOCSTI, _TIOCLINUX = 0x5412, 0x541C
_AUDIT_ARCH_X86_64 = 0xC000003E
_EPERM, _ENOSYS, _EAFNOSUPPORT = 1, 38, 97

_RET_KILL, _RET_ERRNO, _RET_ALLOW = 0x80000000, 0x00050000, 0x7FFF0000
_LD_W_ABS, _JEQ, _JGE, _JSET, _RET = 0x20, 0x15, 0x35, 0x45, 0x06
_NR, _ARCH, _ARG0, _ARG1 = 0, 4, 16, 24


def seccomp_program() -> bytes:
    """The BPF program (struct sock_filter[]): a deny list, and an allow list of socket families."""
    code: list[tuple[int, int, int, int]] = [
        (_LD_W_ABS, 0, 0, _ARCH),
        (_JEQ, 1, 0, _AUDIT_ARCH_X86_64),
        (_RET, 0, 0, _RET_KILL),
        (_LD_W_ABS, 0, 0, _NR),
        (_JGE, 0, 1, 0x40000000),  # the x32 ABI would be a way around the numbers below
        (_RET, 0, 0, _RET_KILL),
        (_JEQ, 0, 1, _CLONE3),  # its flags are behind a pointer: libc falls back to clone
        (_RET, 0, 0, _RET_ERRNO | _ENOSYS),
    ]
    for number in sorted(_DENIED.values()):
        code += [(_JEQ, 0, 1, number), (_RET, 0, 0, _RET_ERRNO | _EPERM)]
    checks: tuple[tuple[Iterable[int], int, list[tuple[int, int, int, int]]], ...] = (
        (
            (_SOCKET, _SOCKETPAIR),
            _ARG0,
            [
                *((_JEQ, len(_AF_ALLOWED) - i, 0, family) for i, family in enumerate(_AF_ALLOWED)),
                (_RET, 0, 0, _RET_ERRNO | _EAFNOSUPPORT),
            ],
        ),
        ((_CLONE,), _ARG0, [(_JSET, 0, 1, _CLONE_NEW), (_RET, 0, 0, _RET_ERRNO | _EPERM)]),
        (
            (_IOCTL,),
            _ARG1,
            [(_JEQ, 1, 0, _TIOCSTI), (_JEQ, 0, 1, _TIOCLINUX), (_RET, 0, 0, _RET_ERRNO | _EPERM)],
        ),
    )
    for numbers, argument, body in checks:
        for number in numbers:
            block = [(_LD_W_ABS, 0, 0, argument), *body, (_RET, 0, 0, _RET_ALLOW)]
            code += [(_JEQ, 0, len(block), number), *block]
    code.append((_RET, 0, 0, _RET_ALLOW))
    return b"".join(struct.pack("<HBBI", *instruction) for instruction in code)


class Confinement:
    """Everything that can be prepared once, before any workload runs."""

    def __init__(self) -> None:
        self._ruleset = -1
        self._program = seccomp_program()
        self._buffer = ctypes.create_string_buffer(self._program)
        self._fprog = struct.pack("<HxxxxxxQ", len(self._program) // 8, ctypes.addressof(self._buffer))

    def drop_privileges(self) -> None:
        """All that needs no knowledge of the command; done ahead, in the template.

        Raises:
            OSError: a step failed; the caller must not go on.
        """
        _prctl(_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL)
        for capability in range(64):
            if _libc.prctl(_PR_CAPBSET_DROP, capability, 0, 0, 0) != 0:
                break  # EINVAL: one past the last capability of this kernel
        os.setgroups([])
        os.setresgid(UID, UID, UID)
        os.setresuid(UID, UID, UID)
        os.umask(0o022)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (0, 0))
        _prctl(_PR_SET_NO_NEW_PRIVS, 1)
        self._ruleset = _make_ruleset()
        fprog = ctypes.create_string_buffer(self._fprog)
        _prctl(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, ctypes.addressof(fprog))

    def seal(self) -> None:
        """Right before exec: landlock, which has to wait until the workspace is mounted.

        Raises:
            OSError: a step failed; the caller must not go on.
        """
        _allow(self._ruleset, WORKSPACE, _OWN)
        _syscall(_LANDLOCK_RESTRICT, self._ruleset, 0)
        os.close(self._ruleset)


def _make_ruleset() -> int:
    """A landlock ruleset of all but the workspace, which is not mounted yet."""
    attributes = ctypes.create_string_buffer(struct.pack("<Q", _FS_ALL))
    ruleset = _syscall(_LANDLOCK_CREATE, ctypes.addressof(attributes), 8, 0)
    for path in READABLE:
        _allow(ruleset, path, _READ)
    for path in DEVICES:
        _allow(ruleset, path, _DEVICE | (_FS_READ_DIR if path == "/dev/pts" else 0))
    for path in OWNED:
        _allow(ruleset, path, _OWN)
    return ruleset


def _allow(ruleset: int, path: str, access: int) -> None:
    fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
    rule = ctypes.create_string_buffer(struct.pack("<Qi", access, fd))
    _syscall(_LANDLOCK_ADD, ruleset, 1, ctypes.addressof(rule), 0)
    os.close(fd)


def _prctl(option: int, *arguments: int) -> None:
    padded = [ctypes.c_ulong(a) for a in (*arguments, 0, 0, 0, 0)[:4]]
    if _libc.prctl(option, *padded) != 0:
        raise OSError(ctypes.get_errno(), f"prctl {option}")


def _syscall(number: int, *arguments: int) -> int:
    result = _libc.syscall(ctypes.c_long(number), *(ctypes.c_ulong(a) for a in arguments))
    if result < 0:
        raise OSError(ctypes.get_errno(), f"syscall {number}")
    return int(result)

"""Which system calls a workload may make: allow lists for seccomp, as BPF programs.

A call that is on no list is refused with EPERM when it is one that workloads have no business with,
and with ENOSYS when this table does not know it (it came later, or is long dead): programs then use
an older one. Numbers are those of the kernel's headers for x86-64, up to 6.2.

``strict``   files, memory, processes, time: no sockets, no shared memory
``default``  what programs use: also sockets (Unix and Internet, without a network behind them), IPC, asynchronous I/O
``build``    also the personality of a process and where its memory lies, which some builds and their tests set
"""

from __future__ import annotations

import struct

__all__ = ["PROFILES", "program"]

_STRICT = {
    "read": 0, "write": 1, "open": 2, "close": 3, "stat": 4, "fstat": 5, "lstat": 6, "poll": 7, "lseek": 8,
    "mmap": 9, "mprotect": 10, "munmap": 11, "brk": 12, "rt_sigaction": 13, "rt_sigprocmask": 14,
    "rt_sigreturn": 15, "pread64": 17, "pwrite64": 18, "readv": 19, "writev": 20, "access": 21, "pipe": 22,
    "select": 23, "sched_yield": 24, "mremap": 25, "msync": 26, "mincore": 27, "madvise": 28, "dup": 32, "dup2": 33,
    "pause": 34, "nanosleep": 35, "getitimer": 36, "alarm": 37, "setitimer": 38, "getpid": 39, "sendfile": 40,
    "fork": 57, "vfork": 58, "execve": 59, "exit": 60, "wait4": 61, "kill": 62, "uname": 63, "fcntl": 72,
    "flock": 73, "fsync": 74, "fdatasync": 75, "truncate": 76, "ftruncate": 77, "getdents": 78, "getcwd": 79,
    "chdir": 80, "fchdir": 81, "rename": 82, "mkdir": 83, "rmdir": 84, "creat": 85, "link": 86, "unlink": 87,
    "symlink": 88, "readlink": 89, "chmod": 90, "fchmod": 91, "umask": 95, "gettimeofday": 96, "getrlimit": 97,
    "getrusage": 98, "sysinfo": 99, "times": 100, "getuid": 102, "getgid": 104, "geteuid": 107, "getegid": 108,
    "setpgid": 109, "getppid": 110, "getpgrp": 111, "setsid": 112, "getgroups": 115, "getresuid": 118,
    "getresgid": 120, "getpgid": 121, "getsid": 124, "capget": 125, "rt_sigpending": 127, "rt_sigtimedwait": 128,
    "rt_sigqueueinfo": 129, "rt_sigsuspend": 130, "sigaltstack": 131, "utime": 132, "statfs": 137, "fstatfs": 138,
    "getpriority": 140, "setpriority": 141, "sched_getparam": 143, "sched_getscheduler": 145,
    "sched_get_priority_max": 146, "sched_get_priority_min": 147, "sched_rr_get_interval": 148, "prctl": 157,
    "arch_prctl": 158, "setrlimit": 160, "sync": 162, "gettid": 186, "readahead": 187, "getxattr": 191,
    "lgetxattr": 192, "fgetxattr": 193, "listxattr": 194, "llistxattr": 195, "flistxattr": 196, "tkill": 200,
    "time": 201, "futex": 202, "sched_getaffinity": 204, "epoll_create": 213, "getdents64": 217,
    "set_tid_address": 218, "restart_syscall": 219, "fadvise64": 221, "timer_create": 222, "timer_settime": 223,
    "timer_gettime": 224, "timer_getoverrun": 225, "timer_delete": 226, "clock_gettime": 228, "clock_getres": 229,
    "clock_nanosleep": 230, "exit_group": 231, "epoll_wait": 232, "epoll_ctl": 233, "tgkill": 234, "utimes": 235,
    "waitid": 247, "openat": 257, "mkdirat": 258, "futimesat": 261, "newfstatat": 262, "unlinkat": 263,
    "renameat": 264, "linkat": 265, "symlinkat": 266, "readlinkat": 267, "fchmodat": 268, "faccessat": 269,
    "pselect6": 270, "ppoll": 271, "set_robust_list": 273, "get_robust_list": 274, "sync_file_range": 277,
    "utimensat": 280, "epoll_pwait": 281, "signalfd": 282, "timerfd_create": 283, "eventfd": 284, "fallocate": 285,
    "timerfd_settime": 286, "timerfd_gettime": 287, "signalfd4": 289, "eventfd2": 290, "epoll_create1": 291,
    "dup3": 292, "pipe2": 293, "preadv": 295, "pwritev": 296, "rt_tgsigqueueinfo": 297, "prlimit64": 302,
    "syncfs": 306, "getcpu": 309, "renameat2": 316, "getrandom": 318, "membarrier": 324, "copy_file_range": 326,
    "preadv2": 327, "pwritev2": 328, "statx": 332, "rseq": 334, "close_range": 436, "openat2": 437,
    "faccessat2": 439, "epoll_pwait2": 441, "futex_waitv": 449,
    # What cp -a, install and tar call to give a file the owner that it has; another one only root could give.
    "chown": 92, "fchown": 93, "lchown": 94, "fchownat": 260, "setxattr": 188, "lsetxattr": 189, "fsetxattr": 190,
    "removexattr": 197, "lremovexattr": 198, "fremovexattr": 199,
}  # fmt: skip
_DEFAULT = {
    "shmget": 29, "shmat": 30, "shmctl": 31, "connect": 42, "accept": 43, "sendto": 44, "recvfrom": 45,
    "sendmsg": 46, "recvmsg": 47, "shutdown": 48, "bind": 49, "listen": 50, "getsockname": 51, "getpeername": 52,
    "setsockopt": 54, "getsockopt": 55, "semget": 64, "semop": 65, "semctl": 66, "shmdt": 67, "msgget": 68,
    "msgsnd": 69, "msgrcv": 70, "msgctl": 71, "setuid": 105, "setgid": 106,
    "setreuid": 113, "setregid": 114, "setgroups": 116, "setresuid": 117, "setresgid": 119, "setfsgid": 123,
    "capset": 126, "mknod": 133, "sched_setparam": 142, "sched_setscheduler": 144, "mlock": 149, "munlock": 150,
    "mlockall": 151, "munlockall": 152, "sched_setaffinity": 203, "io_setup": 206, "io_destroy": 207,
    "io_getevents": 208, "io_submit": 209, "io_cancel": 210, "semtimedop": 220, "mq_open": 240, "mq_unlink": 241,
    "mq_timedsend": 242, "mq_timedreceive": 243, "mq_notify": 244, "mq_getsetattr": 245, "ioprio_set": 251,
    "ioprio_get": 252, "inotify_init": 253, "inotify_add_watch": 254, "inotify_rm_watch": 255, "mknodat": 259,
    "splice": 275, "tee": 276, "vmsplice": 278, "accept4": 288, "inotify_init1": 294,
    "recvmmsg": 299, "sendmmsg": 307, "sched_setattr": 314, "sched_getattr": 315, "seccomp": 317,
    "memfd_create": 319, "execveat": 322, "mlock2": 325, "pkey_mprotect": 329, "pkey_alloc": 330, "pkey_free": 331,
    "io_pgetevents": 333, "pidfd_send_signal": 424, "pidfd_open": 434, "landlock_create_ruleset": 444,
    "landlock_add_rule": 445, "landlock_restrict_self": 446, "memfd_secret": 447, "process_mrelease": 448,
}  # fmt: skip
_BUILD = {
    "personality": 135, "mbind": 237, "set_mempolicy": 238, "get_mempolicy": 239, "migrate_pages": 256,
    "move_pages": 279, "set_mempolicy_home_node": 450,
}  # fmt: skip
_REFUSED = {
    "ptrace": 101, "syslog": 103, "setfsuid": 122, "modify_ldt": 154, "pivot_root": 155, "adjtimex": 159,
    "chroot": 161, "acct": 163, "settimeofday": 164, "mount": 165, "umount2": 166, "swapon": 167, "swapoff": 168,
    "reboot": 169, "sethostname": 170, "setdomainname": 171, "iopl": 172, "ioperm": 173, "init_module": 175,
    "delete_module": 176, "quotactl": 179, "lookup_dcookie": 212, "clock_settime": 227, "kexec_load": 246,
    "add_key": 248, "request_key": 249, "keyctl": 250, "unshare": 272, "perf_event_open": 298, "fanotify_init": 300,
    "fanotify_mark": 301, "name_to_handle_at": 303, "open_by_handle_at": 304, "clock_adjtime": 305, "setns": 308,
    "process_vm_readv": 310, "process_vm_writev": 311, "kcmp": 312, "finit_module": 313, "kexec_file_load": 320,
    "bpf": 321, "userfaultfd": 323, "io_uring_setup": 425, "io_uring_enter": 426, "io_uring_register": 427,
    "open_tree": 428, "move_mount": 429, "fsopen": 430, "fsconfig": 431, "fsmount": 432, "fspick": 433,
    "pidfd_getfd": 438, "process_madvise": 440, "mount_setattr": 442, "quotactl_fd": 443,
}  # fmt: skip
"""What workloads never need, and what kernel exploits like to start from."""

PROFILES = ("strict", "default", "build")
_IOCTL, _SOCKET, _SOCKETPAIR, _CLONE, _CLONE3 = 16, 41, 53, 56, 435
_AF_UNIX, _AF_INET, _AF_INET6 = 1, 2, 10
_CLONE_NEW = 0x7E020080  # every CLONE_NEW* flag
_TIOCSTI, _TIOCLINUX = 0x5412, 0x541C
_AUDIT_ARCH_X86_64, _X32 = 0xC000003E, 0x40000000
_LAST = 450

_RET_KILL, _RET_ALLOW = 0x80000000, 0x7FFF0000
_RET_EPERM, _RET_ENOSYS, _RET_EAFNOSUPPORT = 0x00050001, 0x00050026, 0x00050061
_LD_W_ABS, _JA, _JEQ, _JGE, _JSET, _RET = 0x20, 0x05, 0x15, 0x35, 0x45, 0x06
_NR, _ARCH, _ARG0, _ARG1 = 0, 4, 16, 24
_MOST_JUMP = 255

Instruction = tuple[int, int, int, int]
Code = list[Instruction]


def program(profile: str) -> bytes:
    """The BPF program (struct sock_filter[]) of a profile; raises KeyError for one that there is not.

    A call is found by halving the numbers: it takes a dozen instructions, whichever it is.
    """
    head: Code = [
        (_LD_W_ABS, 0, 0, _ARCH),
        (_JEQ, 1, 0, _AUDIT_ARCH_X86_64),
        (_RET, 0, 0, _RET_KILL),
        (_LD_W_ABS, 0, 0, _NR),
        (_JGE, 0, 1, _X32),  # the x32 ABI would be a way around the numbers
        (_RET, 0, 0, _RET_KILL),
    ]
    return b"".join(struct.pack("<HBBI", *instruction) for instruction in (*head, *_search(_ranges(profile))))


def _ranges(profile: str) -> list[tuple[int, Code]]:
    """Where each run of equal answers begins, and the answer."""
    found: list[tuple[int, Code]] = []
    answers = _answers(profile)
    for number in range(_LAST + 2):
        answer = answers.get(number, [(_RET, 0, 0, _RET_ENOSYS)])
        if not found or found[-1][1] != answer:
            found.append((number, answer))
    return found


def _answers(profile: str) -> dict[int, Code]:
    lists = {"strict": (_STRICT,), "default": (_STRICT, _DEFAULT), "build": (_STRICT, _DEFAULT, _BUILD)}[profile]
    known = (_DEFAULT, _BUILD, _REFUSED)
    answers: dict[int, Code] = {n: [(_RET, 0, 0, _RET_EPERM)] for names in known for n in names.values()}
    answers |= {n: [(_RET, 0, 0, _RET_ALLOW)] for names in lists for n in names.values()}
    allowed = (_RET, 0, 0, _RET_ALLOW)
    families = () if profile == "strict" else (_AF_UNIX, _AF_INET, _AF_INET6)  # there is no network behind the last two
    answers[_SOCKET] = _of_family(families)
    answers[_SOCKETPAIR] = _of_family((_AF_UNIX,))
    answers[_CLONE] = [(_LD_W_ABS, 0, 0, _ARG0), (_JSET, 0, 1, _CLONE_NEW), (_RET, 0, 0, _RET_EPERM), allowed]
    answers[_CLONE3] = [(_RET, 0, 0, _RET_ENOSYS)]  # its flags are behind a pointer: libc falls back to clone
    answers[_IOCTL] = [
        (_LD_W_ABS, 0, 0, _ARG1),
        (_JEQ, 1, 0, _TIOCSTI),
        (_JEQ, 0, 1, _TIOCLINUX),
        (_RET, 0, 0, _RET_EPERM),
        allowed,
    ]
    return answers


def _of_family(families: tuple[int, ...]) -> Code:
    """A socket of one of these families, and no other."""
    if not families:
        return [(_RET, 0, 0, _RET_EAFNOSUPPORT)]
    tests: Code = [(_JEQ, len(families) - i, 0, family) for i, family in enumerate(families)]
    return [(_LD_W_ABS, 0, 0, _ARG0), *tests, (_RET, 0, 0, _RET_EAFNOSUPPORT), (_RET, 0, 0, _RET_ALLOW)]


def _search(ranges: list[tuple[int, Code]]) -> Code:
    """Halve until one answer is left."""
    if len(ranges) == 1:
        return ranges[0][1]
    middle = len(ranges) // 2
    below, above = _search(ranges[:middle]), _search(ranges[middle:])
    if len(below) <= _MOST_JUMP:
        return [(_JGE, len(below), 0, ranges[middle][0]), *below, *above]
    return [(_JGE, 0, 1, ranges[middle][0]), (_JA, 0, 0, len(below)), *below, *above]

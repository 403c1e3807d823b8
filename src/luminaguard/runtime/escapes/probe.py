"""Runs in a machine, as the workload: makes every attempt of the escape suite and prints what came of each.

Given as source to the guest's interpreter and never imported on the host. Its argument is the table of system
calls as JSON. What could end or stall this process is attempted in a child. An outcome is the name of an errno,
``killed:SIGNAL``, a word, or ``DID IT``.
"""

import ctypes
import errno
import fcntl
import json
import mmap
import os
import resource
import signal
import socket
import stat
import sys
import termios

libc = ctypes.CDLL(None, use_errno=True)
found = {}


def outcome_of(action):
    try:
        value = action()
    except OSError as error:
        return errno.errorcode.get(error.errno, str(error.errno))
    except (ValueError, MemoryError) as error:
        return type(error).__name__
    return "DID IT" if value is None or value is True else str(value)


def attempt(name, action):
    found[name] = outcome_of(action)


def in_child(name, action, prepare=lambda: None):
    """Make the attempt in a process of its own and report what it says, or what ended it."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        prepare()
        os.write(writer, outcome_of(action).encode()[:200])
        os._exit(0)
    os.close(writer)
    said = os.read(reader, 200).decode()
    os.close(reader)
    _, status = os.waitpid(pid, 0)
    killed = f"killed:{signal.Signals(os.WTERMSIG(status)).name}" if os.WIFSIGNALED(status) else ""
    found[name] = said or killed or f"exit:{os.WEXITSTATUS(status)}"


def call(number, *arguments):
    def go():
        if libc.syscall(ctypes.c_long(number), *(ctypes.c_ulong(a & (2**64 - 1)) for a in arguments)) < 0:
            raise OSError(ctypes.get_errno(), "refused")

    return go


def read(path):
    def go():
        with open(path, "rb") as file:
            return "DID IT" if file.read(1) else "empty"

    return go


def write(path, data=b"x"):
    def go():
        fd = os.open(path, os.O_WRONLY)
        try:
            os.write(fd, data)
        finally:
            os.close(fd)

    return go


def create(path):
    return lambda: os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL))


def connect(family, address, kind=socket.SOCK_STREAM):
    def go():
        with socket.socket(family, kind) as connection:
            connection.settimeout(2)
            connection.connect(address)
            if kind == socket.SOCK_DGRAM:
                connection.send(b"x")

    return go


def make_socket(family, kind=socket.SOCK_STREAM, protocol=0):
    return lambda: socket.socket(family, kind, protocol).close()


# -- system calls -----------------------------------------------------------------------------------------
for name, (number, arguments) in json.loads(sys.argv[1]).items():
    in_child(name, call(number, *arguments))


def by_i386():
    """getpid through the 32-bit entry, where every number means another call."""
    code = bytes.fromhex("b814000000cd80c3")  # mov eax, 20; int 0x80; ret
    page = mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    page.write(code)
    address = ctypes.addressof(ctypes.c_char.from_buffer(page))
    return f"DID IT: {ctypes.CFUNCTYPE(ctypes.c_int)(address)()}"


in_child("abi.i386", by_i386)
in_child("abi.x32", call(0x40000000 + 39))

# -- processes and PID 1 ------------------------------------------------------------------------------------
for number in (signal.SIGKILL, signal.SIGTERM, signal.SIGSTOP, signal.SIGCHLD):
    attempt(f"init.signal.{number.name}", lambda number=number: os.kill(1, number))
attempt("init.environ", read("/proc/1/environ"))
attempt("init.memory", read("/proc/1/mem"))
attempt("init.maps", read("/proc/1/maps"))
attempt("init.root", lambda: os.listdir("/proc/1/root"))
attempt("init.files", lambda: os.listdir("/proc/1/fd"))
attempt("init.pidfd", lambda: os.close(os.pidfd_open(1)) if "1" in os.listdir("/proc") else "unseen")
attempt(
    "processes.others",
    lambda: (
        ",".join(p for p in os.listdir("/proc") if p.isdigit() and os.stat(f"/proc/{p}").st_uid != os.getuid())
        or "none seen"
    ),
)
attempt("supervisor.files", lambda: os.listdir("/run/luminaguard"))
attempt(
    "supervisor.descriptors",
    lambda: (
        ",".join(n for n in os.listdir("/proc/self/fd") if int(n) > 2 and os.path.exists(f"/proc/self/fd/{n}"))
        or "none left"
    ),
)

# -- rights ----------------------------------------------------------------------------------------------------
attempt("rights.setuid", lambda: os.setuid(0))
attempt("rights.setgid", lambda: os.setgid(0))
attempt("rights.setgroups", lambda: os.setgroups([0]))
attempt("rights.nice", lambda: os.setpriority(os.PRIO_PROCESS, 0, -20))
attempt("rights.realtime", lambda: os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(50)))
attempt("rights.rlimit", lambda: resource.setrlimit(resource.RLIMIT_MEMLOCK, (1 << 20, 1 << 20)))
attempt("rights.cgroup", write("/run/luminaguard/cgroup/cgroup.procs", b"0"))
status = dict(line.split(":\t", 1) for line in open("/proc/self/status").read().splitlines() if ":\t" in line)
found["rights.capabilities"] = (
    ",".join(f"{k}={status[k]}" for k in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb") if int(status[k], 16))
    or "none"
)
found["rights.new-privileges"] = "off" if status["NoNewPrivs"] == "1" else "DID IT"
found["rights.seccomp"] = "filtered" if status["Seccomp"] == "2" else "DID IT"

# -- files of the kernel ------------------------------------------------------------------------------------
for path in (
    "sysrq-trigger",
    "sys/kernel/core_pattern",
    "sys/kernel/modprobe",
    "sys/kernel/hostname",
    "sys/vm/overcommit_memory",
    "sys/kernel/modules_disabled",
    "sys/user/max_user_namespaces",
    "sys/kernel/yama/ptrace_scope",
    "1/oom_score_adj",
):
    attempt(f"proc.write.{path}", write(f"/proc/{path}"))
for path in ("kcore", "kmsg", "kpageflags", "iomem", "timer_list", "modules", "slabinfo"):
    attempt(f"proc.read.{path}", read(f"/proc/{path}"))


def own_frames():
    """The physical addresses of this process's own memory."""
    page = mmap.mmap(-1, 4096)
    page[0] = 1
    address = ctypes.addressof(ctypes.c_char.from_buffer(page))
    with open("/proc/self/pagemap", "rb") as file:
        file.seek(address // 4096 * 8)
        frame = int.from_bytes(file.read(8), "little") & ((1 << 55) - 1)
    return "DID IT" if frame else "frames hidden"


attempt("proc.pagemap", own_frames)
attempt(
    "proc.kallsyms",
    lambda: (
        "DID IT"
        if any(int(line.split()[0], 16) for line in open("/proc/kallsyms").read(20_000).splitlines())
        else "addresses hidden"
    ),
)
attempt("sys.list", lambda: os.listdir("/sys"))
attempt("sys.debug", lambda: os.listdir("/sys/kernel/debug"))

# -- devices --------------------------------------------------------------------------------------------------
for path in (
    "mem",
    "kmsg",
    "vda",
    "vdb",
    "kvm",
    "vport0p1",
    "vsock",
    "hwrng",
    "hvc0",
    "ttyS0",
    "fuse",
    "net/tun",
    "loop-control",
    "mapper/control",
):
    attempt(f"device.open.{path}", read(f"/dev/{path}"))
attempt("device.make.disk", lambda: os.mknod("/tmp/disk", stat.S_IFBLK | 0o600, os.makedev(254, 0)))
attempt("device.make.memory", lambda: os.mknod("/tmp/mem", stat.S_IFCHR | 0o600, os.makedev(1, 1)))
attempt("device.make.port", lambda: os.mknod("/workspace/port", stat.S_IFCHR | 0o600, os.makedev(10, 1)))
attempt("device.make.whiteout", lambda: os.mknod("/workspace/w", stat.S_IFCHR | 0o600, 0))
attempt("terminal.push-input", lambda: fcntl.ioctl(0, termios.TIOCSTI, b"x"))

# -- network --------------------------------------------------------------------------------------------------
for name, family, kind in (
    ("vsock", 40, 1),
    ("netlink", 16, 3),
    ("packet", 17, 3),
    ("alg", 38, 5),
    ("key", 15, 3),
    ("bluetooth", 31, 3),
    ("can", 29, 3),
    ("xdp", 44, 3),
    ("raw", 2, 3),
    ("raw6", 10, 3),
):
    attempt(f"socket.{name}", make_socket(family, kind, 1 if family in {2, 10} else 0))
attempt("network.gateway", connect(socket.AF_INET, ("10.0.2.2", 80)))
attempt("network.metadata", connect(socket.AF_INET, ("169.254.169.254", 80)))
attempt("network.dns", connect(socket.AF_INET, ("8.8.8.8", 53), socket.SOCK_DGRAM))
attempt("network.six", connect(socket.AF_INET6, ("2001:4860:4860::8888", 53)))
attempt("network.name", lambda: socket.gethostbyname("example.com"))

# -- the root, and the way out of the workspace ------------------------------------------------------------------
for path in ("/usr/bin/python3", "/etc/passwd", "/etc/ld.so.cache", "/etc/machine-id"):
    attempt(f"root.write.{path[1:]}", write(path))
for path in ("/usr/new", "/etc/ld.so.preload", "/run/new", "/new", "/var/new", "/dev/new"):
    attempt(f"root.create.{path[1:]}", create(path))
attempt("root.remount", call(165, 0, 0, 0, 32, 0))
attempt("workspace.hard-link", lambda: os.link("/etc/passwd", "/workspace/passwd"))
attempt(
    "workspace.hard-link-out",
    lambda: os.link("/workspace/own", "/etc/own") if create("/workspace/own")() is None else None,
)
os.symlink("/etc/passwd", "/workspace/way")
attempt("workspace.through-link", write("/workspace/way"))
attempt("workspace.dot-dot", create("/workspace/../escaped"))
attempt("workspace.rename-out", lambda: os.rename("/workspace/own", "/escaped"))
attempt("workspace.overlay-attribute", lambda: os.setxattr("/workspace/own", "trusted.overlay.opaque", b"y"))
attempt("workspace.redirect", lambda: os.setxattr("/workspace/own", "trusted.overlay.redirect", b"/etc"))
attempt(
    "workspace.file-capability",
    lambda: os.setxattr(
        "/workspace/own", "security.capability", bytes.fromhex("0100000200000020000000000000000000000000")
    ),
)
attempt("workspace.chown", lambda: os.chown("/workspace/own", 0, 0))
attempt(
    "workspace.immutable",
    lambda: fcntl.ioctl(os.open("/workspace/own", os.O_RDONLY), 0x40086602, (16).to_bytes(8, "little")),
)

# -- exhaustion -------------------------------------------------------------------------------------------------


def fork_bomb():
    children = []
    try:
        while len(children) < 5000:
            pid = os.fork()
            if pid == 0:
                signal.pause()
            children.append(pid)
    finally:
        for pid in children:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


def open_files():
    descriptors = []
    try:
        while len(descriptors) < 200_000:
            descriptors.append(os.open("/dev/null", os.O_RDONLY))
    finally:
        for fd in descriptors:
            os.close(fd)


def fill(path):
    def go():
        block = bytes(1 << 20)
        fd = os.open(path, os.O_WRONLY | os.O_CREAT)
        try:
            for _ in range(4096):
                os.write(fd, block)
        finally:
            os.close(fd)
            os.unlink(path)

    return go


def many_files(folder):
    def go():
        os.mkdir(folder)
        made = 0
        try:
            while made < 2_000_000:
                create(f"{folder}/{made}")()
                made += 1
        finally:
            for number in range(made):
                os.unlink(f"{folder}/{number}")
            os.rmdir(folder)

    return go


attempt("exhaust.processes", fork_bomb)
attempt("exhaust.descriptors", open_files)
for name in ("tmp", "var/tmp", "home/user", "dev/shm", "workspace"):
    attempt(f"exhaust.disk.{name}", fill(f"/{name}/fill"))
attempt("exhaust.inodes", many_files("/tmp/many"))
attempt("exhaust.locked-memory", call(149, 0x10000, 1 << 30))

for name in ("/workspace/own", "/workspace/way"):
    os.unlink(name)
print(json.dumps(found))
# The forged answer of a call that says "all is well": nothing but output, wherever it is written.
sys.stdout.flush()
os.write(1, bytes([3, 0, 0, 2]) + (30).to_bytes(4, "big") + b'{"exit":0,"out_of_memory":0}\n\n')
os._exit(71)

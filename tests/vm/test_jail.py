"""The jail around the hypervisor: what /proc says of a live one, and what a hostile one can reach."""

import json
import os
import subprocess
import time
from pathlib import Path

import anyio
import pytest

from luminaguard.errors import JailUnavailable
from luminaguard.microvm.jail import CgroupStore, Jail, Limits, Program
from luminaguard.microvm.qemu.probe import _library_folders
from luminaguard.testing import Home

pytestmark = pytest.mark.vm
PYTHON = os.path.realpath("/usr/bin/python3")
LIBRARY = subprocess.run(
    [PYTHON, "-c", "import sysconfig; print(sysconfig.get_paths()['stdlib'])"],
    capture_output=True,
    text=True,
    check=True,
).stdout.strip()
HOSTILE_PROGRAM = Program(PYTHON, tuple(sorted({*_library_folders(PYTHON), LIBRARY})))
LIMITS = Limits(memory_bytes=256 << 20, address_bytes=2 << 30, descriptors=64, processes=16)


def running(home: Home, workspace: Path) -> subprocess.Popen[bytes]:
    argv = home.argv("exec", "-w", str(workspace), "--", "sh", "-c", "echo ready; sleep 600")
    process = subprocess.Popen(argv, env=home.environment, stdout=subprocess.PIPE, stdin=subprocess.DEVNULL)
    assert process.stdout is not None
    assert process.stdout.readline() == b"ready\n"
    return process


def status_of(pid: int) -> dict[str, str]:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return {key: value.strip() for key, _, value in (line.partition(":") for line in lines)}


def test_a_live_hypervisor_has_every_layer(home, workspace):
    process = running(home, workspace)
    try:
        (machine,) = home.run("vm", "list", "--json").json["vms"]
        pid = machine["pid"]
        assert Path(f"/proc/{pid}/comm").read_text().startswith("qemu-system")
        status = status_of(pid)
        namespaces = {
            kind: os.stat(f"/proc/{pid}/ns/{kind}").st_ino for kind in ("user", "mnt", "pid", "net", "ipc", "uts")
        }
        ours = {kind: os.stat(f"/proc/self/ns/{kind}").st_ino for kind in namespaces}
        limits = Path(f"/proc/{pid}/limits").read_text()
        seen = {path.name for path in Path(f"/proc/{pid}/root").iterdir()}
        devices = sorted(path.name for path in Path(f"/proc/{pid}/root/dev").iterdir())
        mounts = Path(f"/proc/{pid}/mountinfo").read_text()
        interfaces = Path(f"/proc/{pid}/net/dev").read_text().splitlines()[2:]
        environment = Path(f"/proc/{pid}/environ").read_bytes()
        groups = CgroupStore().groups().get(machine["id"], [])
        confined = {name: _first_line(groups, name) for name in
                    ("memory.max", "memory.limit_in_bytes", "pids.max")}  # fmt: skip
        members = [str(pid) in (group / "cgroup.procs").read_text().split() for group in groups]
        paths = Path(f"/proc/{pid}/cgroup").read_text()
    finally:
        process.terminate()
        process.terminate()
        process.kill()
        process.wait()
        process.stdout.close()
    if os.geteuid() == 0:
        assert int(status["Uid"].split()[0]) > 1_000_000_000
        assert status["Groups"] == ""
        assert int(status["CapBnd"], 16) == 0
    assert all(int(status[name], 16) == 0 for name in ("CapEff", "CapPrm", "CapInh", "CapAmb"))
    assert status["NoNewPrivs"] == "1"
    assert status["Seccomp"] == "2"
    assert not {kind for kind in namespaces if namespaces[kind] == ours[kind]}
    assert status["NSpid"].split()[-1] == "1"
    for name, value in (("Max core file size", "0"), ("Max locked memory", "0"), ("Max open files", "256")):
        (line,) = [line for line in limits.splitlines() if line.startswith(name)]
        assert line[len(name) :].split()[0] == value
    sizes = {line.split("  ")[0]: line[26:].split()[:2] for line in limits.splitlines()[1:]}
    guest, translated, room = 256 << 20, 256 << 20, 2048 << 20
    assert sizes["Max address space"][0] == sizes["Max address space"][1]
    assert guest < int(sizes["Max address space"][0]) <= guest + translated + room
    assert sizes["Max file size"] == [str(4 << 20)] * 2
    if machine["jail"]["cgroup"] == "on":
        limit = int(confined["memory.max"] or confined["memory.limit_in_bytes"])
        assert guest < limit <= 2 * guest + translated + (128 << 20)
        assert confined["pids.max"] == "64"
        assert members == [True] * len(groups) != []
        assert paths.count(f"/luminaguard/{machine['id']}") == len(groups)
    assert seen <= {"dev", "lib", "lib64", "proc", "usr"}
    assert devices == ["null", "urandom"]
    for line in mounts.splitlines():
        options = line.split()[5].split(",")
        assert "nosuid" in options, line
        assert line.split()[4] in {"/", "/proc", "/dev/null", "/dev/urandom"} or "ro" in options, line
    assert [line.split(":")[0].strip() for line in interfaces] == ["lo"]
    assert environment in {b"PWD=/\0", b""}


def _first_line(groups: list[Path], name: str) -> str:
    return next(((group / name).read_text().strip() for group in groups if (group / name).exists()), "")


class NoHierarchy(CgroupStore):
    def __init__(self, tmp_path: Path) -> None:
        (tmp_path / "mountinfo").write_text("")
        super().__init__(str(tmp_path / "mountinfo"))


def test_without_any_cgroups_root_starts_nothing_unless_he_said_so(tmp_path):
    async def start(required: bool) -> dict[str, str]:
        jail = Jail(required=required, cgroups=NoHierarchy(tmp_path))
        async with jail.start("vm-free", HOSTILE_PROGRAM, ["-c", "pass"], (), LIMITS) as process:
            await process.wait()
            return process.layers

    assert "no cgroup hierarchy" in anyio.run(start, False)["cgroup"]
    if os.geteuid() == 0:
        with pytest.raises(JailUnavailable, match="no cgroup hierarchy") as caught:
            anyio.run(start, True)
        assert "require_jail" in caught.value.hint
    else:
        assert "no cgroup hierarchy" in anyio.run(start, True)["cgroup"]


HOSTILE = r"""
import json, os, socket, subprocess, sys
host_pid, host_file, port = int(sys.argv[1]), sys.argv[2], int(sys.argv[3])
found = {}
def attempt(name, action):
    try: found[name] = "REACHED " + repr(action())[:100]
    except BaseException as e: found[name] = type(e).__name__
def connect(address):
    with socket.socket() as s: s.settimeout(2); s.connect(address); return address
def fork_many():
    for n in range(200):
        if os.fork() == 0:
            import time; time.sleep(5); os._exit(0)
    return n
def new_namespace():
    import ctypes
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(0x10000000): raise OSError(ctypes.get_errno())
    return "made"
def mount():
    import ctypes
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mount(b"tmpfs", b"/usr", b"tmpfs", 0, None): raise OSError(ctypes.get_errno())
    return "mounted"
attempt("read the user's file", lambda: open(host_file).read())
attempt("list home", lambda: os.listdir("/root") + os.listdir("/home"))
attempt("read passwd", lambda: open("/etc/passwd").read())
attempt("read the program of the owner", lambda: os.readlink(f"/proc/{host_pid}/exe"))
attempt("kill the owner", lambda: os.kill(host_pid, 9))
attempt("other processes", lambda: [p for p in os.listdir("/proc") if p.isdigit() and p != str(os.getpid())][0])
attempt("connect to the host", lambda: connect(("127.0.0.1", port)))
attempt("connect outside", lambda: connect(("192.0.2.1", 80)))
attempt("abstract sockets", lambda: [l for l in open("/proc/net/unix")][1])
attempt("write a library", lambda: open(json.__file__, "a"))
attempt("write to usr", lambda: open("/usr/x", "w"))
attempt("become root", lambda: os.setuid(0))
attempt("new namespace", new_namespace)
attempt("mount", mount)
attempt("open kvm or disks", lambda: [open("/dev/" + d) for d in ("kvm", "sda", "vda", "mem")])
attempt("run a shell", lambda: subprocess.run(["/bin/sh", "-c", "true"]))
attempt("fill its log", lambda: [os.write(2, b"x" * (1 << 20)) for _ in range(3)] and "three")
if CGROUP: attempt("fork without end", fork_many)
os.truncate(2, 0); os.lseek(2, 0, 0)
os.write(2, json.dumps(found).encode())
"""


def test_a_hostile_program_in_its_place_reaches_nothing(tmp_path, monkeypatch):
    """Python instead of QEMU, in the same jail, without even QEMU's own seccomp filter."""
    secret = tmp_path / "secret"
    secret.write_text("the user's")
    secret.chmod(0o644)
    cgroups = CgroupStore()
    script = HOSTILE.replace("CGROUP", str(not cgroups.missing))

    async def attack(port: int) -> dict[str, str]:
        arguments = ["-I", "-S", "-c", script, str(os.getpid()), str(secret), str(port)]
        async with Jail(cgroups=cgroups).start("vm-hostile", HOSTILE_PROGRAM, arguments, (), LIMITS) as process:
            with anyio.fail_after(60):
                await process.wait()
            said = process.words(1 << 20).strip("\0")
            assert said.startswith("{"), said
            return json.loads(said)

    import socket

    with socket.create_server(("127.0.0.1", 0)) as server:
        found = anyio.run(attack, server.getsockname()[1])
    assert found.pop("fill its log") == "REACHED 'three'"  # 3 of 4 MiB; the fifth would end it
    if not cgroups.missing:
        assert found.pop("fork without end") == "BlockingIOError"
    assert {name: how for name, how in found.items() if how.startswith("REACHED")} == {}
    assert len(found) == 16
    assert cgroups.groups().get("vm-hostile") is None


WRITER = r"""
import os, sys
found = []
for fd in map(int, sys.argv[1:]):
    try: os.fchmod(fd, 0o666)
    except OSError: pass
    try:
        again = os.open(f"/proc/self/fd/{fd}", os.O_RDWR)
        os.pwrite(again, b"poison", 0)
        found.append(fd)
    except OSError: pass
os.write(2, repr(found).encode())
"""


def test_what_it_is_given_to_read_it_cannot_write(home, monkeypatch):
    """Descriptors opened for reading can be opened again through /proc: what is behind them is sealed."""
    from luminaguard.images.manifest import ROOT
    from luminaguard.microvm.template import placeholder
    from luminaguard.runtime import Runtime
    from luminaguard.settings import Folders, load_settings

    monkeypatch.setenv("LUMINAGUARD_HOME", str(home.folder))
    folders = Folders.from_environment().ensure()
    runtime = Runtime(load_settings(folders), folders)

    async def attack() -> None:
        async with runtime._pool_template() as template:
            fds = (placeholder(b"x"), runtime.images.current().open_part(ROOT), template.saved.ram,
                   template.saved.state, template.root, template.rehearsal)  # fmt: skip
            arguments = ["-I", "-S", "-c", WRITER, *map(str, fds)]
            async with Jail().start("vm-writer", HOSTILE_PROGRAM, arguments, fds, LIMITS) as process:
                with anyio.fail_after(30):
                    await process.wait()
                assert process.words() == "[]"
            for fd in fds[:2]:
                os.close(fd)

    anyio.run(attack)


@pytest.mark.skipif(os.geteuid() == 0, reason="root's machines have other uids and cannot write to root's files")
def test_a_workspace_image_that_was_written_to_is_packed_anew(tmp_path):
    from luminaguard.workspaces.pack import WorkspaceImages
    from luminaguard.workspaces.state import Limits as Size
    from luminaguard.workspaces.state import read_state

    folder = tmp_path / "w"
    folder.mkdir()
    (folder / "a").write_text("a")
    images, state = WorkspaceImages(tmp_path / "cache"), read_state(folder, Size(10, 1 << 20))
    first = images.open(state)
    good = os.pread(first, 1 << 20, 0)
    writer = os.open(f"/proc/self/fd/{first}", os.O_RDWR)
    os.pwrite(writer, b"poison", 200)
    os.utime(writer, ns=(0, 0))
    again = images.open(state)
    assert os.pread(again, 1 << 20, 0) == good
    for fd in (first, writer, again):
        os.close(fd)


def test_a_log_without_end_ends_the_program_and_not_the_disk():
    flood = "import os\nwhile True: os.write(2, b'x' * 65536)"

    async def run() -> int:
        async with Jail().start("vm-flood", HOSTILE_PROGRAM, ["-I", "-S", "-c", flood], (), LIMITS) as process:
            with anyio.fail_after(30):
                await process.wait()
            return os.fstat(process.said).st_size

    assert anyio.run(run) <= 4 << 20


def test_memory_without_end_ends_the_program_and_not_the_host():
    grow = "kept = []\nwhile True:\n block = bytearray(b'x' * (1 << 20)); kept.append(block)"
    before = available()

    async def run() -> int:
        async with Jail().start("vm-greedy", HOSTILE_PROGRAM, ["-I", "-S", "-c", grow], (), LIMITS) as process:
            least = before
            with anyio.fail_after(60):
                while process.running:
                    least = min(least, available())
                    await anyio.sleep(0.005)
            return before - least

    taken = anyio.run(run)
    assert taken < (LIMITS.memory_bytes if not CgroupStore().missing else LIMITS.address_bytes) + (256 << 20)


def available() -> int:
    rows = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    return int(rows["MemAvailable"].split()[0]) << 10


def test_without_bubblewrap_nothing_starts_unless_the_user_said_so(home, workspace, tmp_path, monkeypatch):
    programs = tmp_path / "bin"
    programs.mkdir()
    for folder in ("/usr/sbin", "/usr/bin", "/sbin", "/bin"):
        for path in Path(folder).iterdir():
            if path.name not in {"bwrap", "doctor"} and not os.path.lexists(programs / path.name):
                (programs / path.name).symlink_to(path)
    refused = home.exec(workspace, "true", PATH=str(programs))
    assert refused.code == 123
    assert refused.json["error"]["type"] == "JailUnavailable"
    assert "bubblewrap" in refused.json["error"]["hint"]
    allowed = home.exec(workspace, "true", PATH=str(programs), LUMINAGUARD_REQUIRE_JAIL="false")
    assert allowed.code == 0
    assert allowed.json["vm"]["jail"]["namespaces"] == "bubblewrap is not installed"


def test_a_program_that_cannot_be_started_ends_with_bubblewraps_words():
    """Before it could run, as a refusal; right after, as what the program said."""

    async def run() -> str:
        try:
            async with Jail().start("vm-none", Program("/no/such/program"), [], (), LIMITS) as process:
                await process.wait()
                return process.words()
        except JailUnavailable as error:
            return error.message

    assert "bwrap: " in anyio.run(run)


def test_killing_the_owner_takes_the_jail_with_it(home, workspace):
    process = running(home, workspace)
    (machine,) = home.run("vm", "list", "--json").json["vms"]
    process.kill()
    process.wait()
    process.stdout.close()
    deadline = time.monotonic() + 10
    while Path(f"/proc/{machine['pid']}").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not Path(f"/proc/{machine['pid']}").exists()
    assert home.run("vm", "list", "--json").json == {"vms": []}
    assert machine["id"] not in CgroupStore().groups()

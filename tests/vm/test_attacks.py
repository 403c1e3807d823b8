"""What a hostile command tries: from inside the machine, and through what comes out of it."""

import hashlib
import json
import shutil
import time
from pathlib import Path

import pytest

from luminaguard.images.manifest import INITRAMFS, KERNEL, PARTS
from luminaguard.testing import Home

pytestmark = pytest.mark.vm

PROBE = r"""
import ctypes, errno, json, os, signal, socket, stat
libc = ctypes.CDLL(None, use_errno=True)
found = {}
def attempt(name, action):
    try:
        value = action()
        found[name] = 'did it' if value is None else str(value)
    except OSError as error:
        found[name] = errno.errorcode.get(error.errno, str(error.errno))
    except Exception as error:
        found[name] = type(error).__name__
def call(number, *args):
    def go():
        if libc.syscall(ctypes.c_long(number), *[ctypes.c_ulong(a) for a in args]) < 0:
            raise OSError(ctypes.get_errno(), 'x')
    return go
def connect(family, address):
    def go():
        with socket.socket(family) as s:
            s.settimeout(2)
            s.connect(address)
    return go
attempt('read supervisor', lambda: os.listdir('/run/luminaguard'))
attempt('read sys', lambda: os.listdir('/sys'))
attempt('disk', lambda: open('/dev/vda', 'rb').read(1))
attempt('make disk', lambda: os.mknod('/tmp/d', stat.S_IFBLK | 0o600, os.makedev(254, 0)))
attempt('make whiteout', lambda: os.mknod('/workspace/w', stat.S_IFCHR | 0o600, 0))
attempt('port', lambda: [n for n in os.listdir('/dev') if n.startswith(('vport', 'hvc', 'vd', 'mem'))] and None or 'none')
attempt('kill init', lambda: os.kill(1, signal.SIGKILL))
attempt('see init', lambda: open('/proc/1/environ').read())
attempt('other processes', lambda: [p for p in os.listdir('/proc') if p.isdigit() and os.stat(f'/proc/{p}').st_uid != os.getuid()] or 'none')
attempt('write root', lambda: open('/x', 'w'))
attempt('write run', lambda: open('/run/x', 'w'))
attempt('write usr', lambda: open('/usr/bin/x', 'w'))
attempt('write etc', lambda: open('/etc/passwd', 'a'))
attempt('setuid', lambda: os.setuid(0))
attempt('chroot', lambda: os.chroot('/tmp'))
attempt('ptrace', call(101, 0, 0, 0, 0))
attempt('mount', call(165, 0, 0, 0, 0, 0))
attempt('unshare', call(272, 0x10000000))
attempt('clone newuser', call(56, 0x10000000 | 17, 0, 0, 0, 0))
attempt('clone3', call(435, 0, 0))
attempt('bpf', call(321, 0, 0, 0))
attempt('io_uring', call(425, 8, 0))
attempt('userfaultfd', call(323, 0))
attempt('keyctl', call(250, 0, 0))
attempt('kexec', call(246, 0, 0, 0, 0))
attempt('module', call(313, 0, 0, 0))
attempt('clock', call(227, 0, 0))
attempt('hostname', call(170, 0, 0))
attempt('vsock', lambda: socket.socket(40).close())
attempt('netlink', lambda: socket.socket(16, socket.SOCK_RAW).close())
attempt('packet', lambda: socket.socket(17, socket.SOCK_RAW).close())
attempt('alg', lambda: socket.socket(38, socket.SOCK_SEQPACKET).close())
attempt('network', connect(socket.AF_INET, ('10.0.2.2', 80)))
attempt('dns', connect(socket.AF_INET, ('8.8.8.8', 53)))
attempt('sysctl', lambda: open('/proc/sys/kernel/randomize_va_space', 'w').write('0'))
attempt('sysrq', lambda: open('/proc/sysrq-trigger', 'w').write('b'))
attempt('kmsg', lambda: open('/proc/kmsg').read(1))
attempt('kcore', lambda: open('/proc/kcore', 'rb').read(1))
status = dict(line.split(':\t', 1) for line in open('/proc/self/status').read().splitlines() if ':\t' in line)
found['capabilities'] = {k: int(status[k], 16) for k in ('CapInh', 'CapPrm', 'CapEff', 'CapBnd', 'CapAmb')}
found['confined'] = (status['NoNewPrivs'], status['Seccomp'], status['Uid'].split()[0])
found['modes'] = [oct(os.stat(p).st_mode & 0o7777) for p in ('/', '/usr', '/etc', '/run', '/workspace')]
setuid = [os.path.join(d, f) for d, _, fs in os.walk('/usr') for f in fs if os.lstat(os.path.join(d, f)).st_mode & 0o6000]
found['set-id files'] = setuid
found['may work'] = [open('/workspace/ok', 'w').write('x'), open('/tmp/ok', 'w').write('x'), os.getpid() > 1]
print(json.dumps(found))
"""


def test_the_workload_can_reach_nothing_but_its_copy(home, workspace):
    result = home.exec(workspace, "python3", "-c", PROBE)
    found = json.loads(result.json["stdout"])
    denied = {"EACCES", "EPERM", "EROFS"}
    for name in ("read supervisor", "read sys", "make disk", "make whiteout", "kill init", "write root", "write run", "write usr", "write etc",
                 "setuid", "chroot", "ptrace", "mount", "unshare", "clone newuser", "bpf", "io_uring", "userfaultfd",
                 "keyctl", "kexec", "module", "clock", "hostname", "sysctl"):  # fmt: skip
        assert found.pop(name) in denied, name
    assert found.pop("sysrq") in {*denied, "ENOENT"}  # a kernel that is built here has none
    for name in ("kmsg", "kcore"):
        assert found.pop(name) in {*denied, "ENOENT", "", "b''"}, name  # masked, or not there
    for name in ("vsock", "netlink", "packet", "alg"):
        assert found.pop(name) == "EAFNOSUPPORT", name
    for name in ("network", "dns"):
        assert found.pop(name) in {"ENETUNREACH", "EACCES"}, name  # EACCES: a landlock that knows TCP
    assert found.pop("disk") in {"ENOENT", "EACCES"}
    assert found.pop("see init") in {"ENOENT", "EACCES"}
    assert found.pop("clone3") == "ENOSYS"
    assert found.pop("port") == "none"
    assert found.pop("other processes") == "none"
    assert set(found.pop("capabilities").values()) == {0}
    assert found.pop("confined")[:2] == ["1", "2"]
    assert found.pop("set-id files") == []
    assert found.pop("modes")[:4] == ["0o755"] * 4
    assert found.pop("may work") == [1, 1, True]
    assert found == {}


def test_a_fork_bomb_ends_with_its_machine(home, workspace):
    bomb = "import os\nwhile True:\n try: os.fork()\n except OSError: pass"
    result = home.exec(workspace, "python3", "-c", bomb, flags=("--timeout", "3"), LUMINAGUARD_PROCESSES="64")
    assert result.code == 124
    assert home.run("vm", "list", "--json").json == {"vms": []}


def test_a_command_that_eats_memory_is_stopped_and_said_so(home, workspace):
    eat = "x = []\nwhile True: x.append(bytearray(1 << 20))"
    result = home.run("exec", "-w", str(workspace), "--", "python3", "-c", eat)
    assert result.code == 137
    assert "out of memory" in result.err


def test_a_full_disk_is_an_error_inside_and_the_machine_lives(home, workspace):
    result = home.exec(workspace, "sh", "-c", "head -c 500M /dev/zero > big; echo status $?; rm big; echo still here")
    assert "still here" in result.json["stdout"]
    assert "No space left" in result.json["stderr"]
    assert result.json["status"] == "unchanged"


def test_a_flood_of_output_is_bounded(home, workspace):
    result = home.exec(workspace, "sh", "-c", "head -c 8M /dev/zero; echo end >&2", LUMINAGUARD_CAPTURE_MAX_MIB="1")
    value = result.json
    assert (len(value["stdout"]), value["truncated"], value["stderr"]) == (1 << 20, True, "end\n")


def test_what_it_leaves_running_is_gone_before_its_files_are_read(home, workspace):
    script = "(while :; do date +%N > changing; done) & (trap '' TERM HUP; setsid sleep 1000 &) ; echo done"
    result = home.exec(workspace, "sh", "-c", script, timeout_s=60)
    assert result.json["stdout"] == "done\n"
    assert result.json["exit_code"] == 0


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("mkfifo pipe", "a device, a socket or a pipe"),
        ("cp /bin/true x; chmod u+s x", "set-user-id"),
        ("truncate -s 900G huge", "more than 1,024 MiB"),
        ("mkdir .luminaguard-req-x", "publishing uses itself"),
        ("for i in $(seq 60); do : > f$i; done", "more than 50 files"),
    ],
)
def test_effects_that_may_not_be_published_are_refused(home, workspace, command, words):
    before = sorted(workspace.rglob("*"))
    result = home.exec(
        workspace, "sh", "-c", command, flags=("--publish", "always"), LUMINAGUARD_CHANGESET_MAX_FILES="50"
    )
    assert result.code == 122, result.json
    assert words in result.json["error"]["message"]
    assert sorted(workspace.rglob("*")) == before
    kinds = [json.loads(line)["kind"] for line in home.run("ledger", "export").out.splitlines()[1:]]
    assert kinds == ["exec.started", "exec.refused"]


def test_each_clone_is_its_own_machine(home, workspace):
    script = (
        "import os, uuid, time, socket, json; print(json.dumps([uuid.uuid4().hex, os.urandom(8).hex(),"
        "socket.gethostname(), open('/proc/sys/kernel/random/boot_id').read(), open('/etc/machine-id').read(), time.time()]))"
    )
    seen = [json.loads(home.exec(workspace, "python3", "-c", script).json["stdout"]) for _ in range(3)]
    for values in list(zip(*seen, strict=True))[:5]:
        assert len(set(values)) == 3, values
    assert abs(seen[-1][5] - time.time()) < 30


def test_nothing_of_the_hosts_environment_is_in_the_machine(home, workspace):
    script = "env; cat /proc/1/environ /proc/self/environ /proc/cmdline 2>&1; cat /proc/*/cmdline 2>/dev/null"
    result = home.exec(
        workspace, "sh", "-c", script, LUMINAGUARD_TEST_SECRET="s3cr3t-value", AWS_SECRET_ACCESS_KEY="s3cr3t-key"
    )
    assert result.code == 0
    assert "s3cr3t" not in result.out
    assert "SECRET" not in result.out
    assert "s3cr3t" not in home.run("ledger", "export").out


def copy_cache(cache: Path, target: Path) -> Path:
    shutil.copytree(cache, target, symlinks=True, ignore=shutil.ignore_patterns("packages", "workspaces"))
    shutil.copytree(cache.parent / "state" / "keys", target.parent / "state" / "keys")
    return target


@pytest.mark.parametrize("part", ["vmlinux", "initramfs.cpio", "root.squashfs", "ram", "state", "manifest.json"])
@pytest.mark.parametrize("how", ["flip", "truncate"])
def test_a_tampered_image_or_template_starts_nothing(tmp_path, cache, workspace, part, how):
    own = copy_cache(cache, tmp_path / "cache")
    home = Home(tmp_path / "home", own)
    current = (own / "images" / "current").read_text().strip()
    part_of_image = own / "images" / current / part
    files = [part_of_image] if part in PARTS[:3] else list((own / "templates").glob(f"*/{part}"))
    assert files
    if part in {KERNEL, INITRAMFS}:
        shutil.rmtree(own / "templates")  # they are used when one is built
    for file in files:
        file.chmod(0o600)
        with file.open("r+b") as handle:
            size = file.stat().st_size
            if how == "truncate":
                handle.truncate(size // 2)
            else:
                handle.seek(size // 2)
                byte = handle.read(1)
                handle.seek(size // 2)
                handle.write(bytes([byte[0] ^ 1]))
    result = home.exec(workspace, "true")
    assert result.code == 123, result
    assert result.json["error"]["type"] == "ImageTampered"
    assert "Delete" in result.json["error"]["hint"]
    assert not list((own / "templates").glob("*/ram")) or part not in {KERNEL, INITRAMFS}


def test_the_image_verifies_and_says_when_not(tmp_path, cache):
    own = copy_cache(cache, tmp_path / "cache")
    home = Home(tmp_path / "home", own)
    assert home.run("image", "verify").code == 0
    current = own / "images" / (own / "images" / "current").read_text().strip()
    (current / "sbom.cdx.json").chmod(0o600)
    (current / "sbom.cdx.json").write_text("{}")
    assert home.run("image", "verify").code == 123
    manifest = json.loads((current / "manifest.json").read_text())
    manifest["parts"]["sbom.cdx.json"] = {"size": 2, "sha256": hashlib.sha256(b"{}").hexdigest()}
    (current / "manifest.json").chmod(0o600)
    (current / "manifest.json").write_text(json.dumps(manifest))
    assert "named after" in home.run("image", "verify").err

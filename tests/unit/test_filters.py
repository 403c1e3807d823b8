"""The seccomp filters, run by an interpreter of BPF over every number; landlock, run for real on this host's kernel."""

import json
import os
import socket
import struct

import pytest

from luminaguard.guest import confine, filters

KILL, ALLOW, EPERM, ENOSYS, EAFNOSUPPORT = 0x80000000, 0x7FFF0000, 0x50001, 0x50026, 0x50061
X86_64 = 0xC000003E


def answer(profile: str, number: int, *arguments: int, arch: int = X86_64) -> int:
    """What the kernel would return for a call: classic BPF over struct seccomp_data."""
    code = list(struct.iter_unpack("<HBBI", filters.program(profile)))
    data = struct.pack("<IIQ6Q", number, arch, 0, *(*arguments, 0, 0, 0, 0, 0, 0)[:6])
    at, accumulator = 0, 0
    for _ in range(len(code)):
        operation, jump_true, jump_false, value = code[at]
        at += 1
        if operation == 0x20:
            accumulator = struct.unpack_from("<I", data, value)[0]
        elif operation == 0x06:
            return value
        elif operation == 0x05:
            at += value
        else:
            holds = {0x15: accumulator == value, 0x35: accumulator >= value, 0x45: bool(accumulator & value)}[operation]
            at += jump_true if holds else jump_false
    raise AssertionError("it does not end")


LISTS = {"strict": (filters._STRICT,), "default": (filters._STRICT, filters._DEFAULT),
         "build": (filters._STRICT, filters._DEFAULT, filters._BUILD)}  # fmt: skip
SPECIAL = {filters._IOCTL, filters._SOCKET, filters._SOCKETPAIR, filters._CLONE, filters._CLONE3}
KNOWN = {number for names in (filters._STRICT, filters._DEFAULT, filters._BUILD, filters._REFUSED)
         for number in names.values()}  # fmt: skip


@pytest.mark.parametrize("profile", filters.PROFILES)
def test_every_number_has_the_answer_that_the_lists_say(profile):
    allowed = {number for names in LISTS[profile] for number in names.values()}
    for number in (*range(700), 0x3FFFFFFF):
        if number in SPECIAL:
            continue
        wanted = ALLOW if number in allowed else EPERM if number in KNOWN else ENOSYS
        assert answer(profile, number) == wanted, number


@pytest.mark.parametrize("profile", filters.PROFILES)
def test_other_ways_into_the_kernel_end_the_process(profile):
    for number in (0, 59, 101, 321):
        assert answer(profile, number | 0x40000000) == KILL  # x32
        assert answer(profile, number, arch=0x40000003) == KILL  # i386


@pytest.mark.parametrize("profile", filters.PROFILES)
def test_arguments_are_looked_at(profile):
    families = {family: answer(profile, filters._SOCKET, family) for family in range(50)}
    few = set() if profile == "strict" else {socket.AF_UNIX, socket.AF_INET, socket.AF_INET6}
    assert {family for family, said in families.items() if said == ALLOW} == few
    assert set(families.values()) - {ALLOW} == {EAFNOSUPPORT}
    assert answer(profile, filters._SOCKETPAIR, socket.AF_UNIX) == ALLOW
    assert answer(profile, filters._SOCKETPAIR, socket.AF_INET) == EAFNOSUPPORT
    assert answer(profile, filters._CLONE, 0x3D0F00) == ALLOW  # a thread
    for flag in (0x20000, 0x2000000, 0x4000000, 0x8000000, 0x10000000, 0x20000000, 0x40000000):
        assert answer(profile, filters._CLONE, 0x11 | flag) == EPERM, hex(flag)
    assert answer(profile, filters._CLONE3) == ENOSYS
    assert answer(profile, filters._IOCTL, 0, 0x5401) == ALLOW
    assert answer(profile, filters._IOCTL, 0, 0x5412) == answer(profile, filters._IOCTL, 0, 0x541C) == EPERM


def test_each_profile_allows_what_the_stricter_one_does():
    for number in range(460):
        chain = [answer(profile, number) == ALLOW for profile in filters.PROFILES]
        assert chain == sorted(chain), number


def test_no_list_names_a_call_twice_and_the_dangerous_ones_are_refused_by_all():
    names = [name for group in (filters._STRICT, filters._DEFAULT, filters._BUILD, filters._REFUSED) for name in group]
    assert len(names) == len(set(names))
    assert {"ptrace", "mount", "bpf", "init_module", "kexec_load", "io_uring_setup", "unshare", "setns",
            "perf_event_open", "userfaultfd", "keyctl", "pidfd_getfd",
            "process_vm_writev"} <= set(filters._REFUSED)  # fmt: skip


def test_a_call_is_found_in_a_dozen_instructions():
    assert len(filters.program("default")) // 8 < 400


# -- landlock --------------------------------------------------------------------------------------------


def in_a_child(action) -> str:
    """Run in a process of its own, since there is no way back; what it returned, or the name of its error."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            said = action()
        except BaseException as error:  # noqa: BLE001  # told to the parent
            said = f"{type(error).__name__}: {error}"
        os.write(writer, said.encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as file:
        said = file.read()
    os.waitpid(child, 0)
    return said


@pytest.mark.parametrize("abi", [1, 2, 3, 4, 5, 6])
def test_landlock_takes_all_that_the_kernel_has(tmp_path, monkeypatch, abi):
    """As kernels of each age would be confined, on this one; newer rights need a kernel that has them."""
    try:
        here = confine.landlock_abi()
    except OSError:
        pytest.skip("this kernel has no landlock")
    if here < abi:
        pytest.skip(f"this kernel has landlock ABI {here}")
    for name in ("readable", "own", "workspace", "outside"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text("text")
    monkeypatch.setattr(confine, "landlock_abi", lambda: abi)
    monkeypatch.setattr(confine, "readable", lambda: [(str(tmp_path / "readable"), True)])
    monkeypatch.setattr(confine, "OWNED", (str(tmp_path / "own"),))
    monkeypatch.setattr(confine, "DEVICES", ("/dev/null",))
    server = socket.create_server(("127.0.0.1", 0))
    abstract = socket.socket(socket.AF_UNIX)
    abstract.bind(f"\0luminaguard-{os.getpid()}-{abi}")
    abstract.listen()

    def tried(action) -> str:
        try:
            action()
        except OSError as error:
            return type(error).__name__
        return "done"

    def attempts() -> str:
        confine._prctl(confine._PR_SET_NO_NEW_PRIVS, 1)
        confine.restrict(confine.make_ruleset(), str(tmp_path / "workspace"))
        found = {
            "read outside": tried((tmp_path / "outside/file").read_text),
            "write readable": tried(lambda: (tmp_path / "readable/file").write_text("x")),
            "read readable": tried((tmp_path / "readable/file").read_text),
            "write own": tried(lambda: (tmp_path / "own/new").write_text("x")),
            "write workspace": tried(lambda: (tmp_path / "workspace/file").write_text("x")),
            "truncate readable": tried(lambda: os.truncate(tmp_path / "readable/file", 0)),
            "connect": tried(lambda: dialled.connect(address)),
            "abstract": tried(lambda: local.connect(abstract.getsockname())),
            "signal": tried(lambda: os.kill(os.getppid(), 0)),
        }
        return json.dumps(found)

    # All that the child needs is made before it: it can import nothing any more.
    address, dialled, local = server.getsockname(), socket.socket(), socket.socket(socket.AF_UNIX)
    found = json.loads(in_a_child(attempts))
    for connection in (server, abstract, dialled, local):
        connection.close()
    refused = {"read outside", "write readable"}
    refused |= {"truncate readable"} if abi >= 3 else set()
    refused |= {"abstract", "signal"} if abi >= 6 else set()
    assert {name for name, how in found.items() if how == "PermissionError"} == refused, found
    assert {how for name, how in found.items() if name not in refused} == {"done"}, found

"""Firecracker's backend against programs that lie, and its stand-in against requests that are wrong."""

import contextlib
import json
import os
import socket
import stat
import threading
import time
from pathlib import Path

import anyio
import pytest
from hypothesis import given
from hypothesis import strategies as st

from luminaguard.errors import HypervisorUnavailable, MachineError, StorageError
from luminaguard.guest.port import VSOCK_PORT
from luminaguard.microvm.firecracker import api as api_module
from luminaguard.microvm.firecracker import bodies, vsock
from luminaguard.microvm.firecracker.api import Api, connect_inside
from luminaguard.microvm.firecracker.probe import find_firecracker
from luminaguard.microvm.jail import JailFolders
from luminaguard.microvm.jail.folders import Parts, copy_data, open_inside, remove_tree
from luminaguard.testing import firecracker as standin
from luminaguard.testing.firecracker import machine as standin_machine
from luminaguard.testing.firecracker.firecracker import Program
from luminaguard.testing.firecracker.machine import Fatal, Machine, Refused

# -- versions ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", ["1.15.0", "1.15.1", "1.16.1", "1.17.0"])
def test_versions_that_are_used(tmp_path, version):
    found = find_firecracker(*map(str, standin.install(tmp_path, version)))
    assert ".".join(map(str, found.version)) == version
    assert found.can_pause == (not version.startswith("1.16"))
    assert found.snapshot_version == "10.0.0"


@pytest.mark.parametrize(("version", "words"), [("1.14.9", "1.15 to 1.17"), ("1.16.0", "vsock"), ("1.18.0", "outside")])
def test_versions_that_are_refused(tmp_path, version, words):
    with pytest.raises(HypervisorUnavailable, match=words) as caught:
        find_firecracker(*map(str, standin.install(tmp_path, version)))
    assert "1.16.1" in caught.value.hint


def test_a_jailer_of_another_version_is_refused(tmp_path):
    for name, version in (("a", "1.16.1"), ("b", "1.15.0")):
        (tmp_path / name).mkdir()
        standin.install(tmp_path / name, version)
    with pytest.raises(HypervisorUnavailable, match=r"1\.16\.1 and its jailer 1\.15\.0"):
        find_firecracker(str(tmp_path / "a" / "firecracker"), str(tmp_path / "b" / "jailer"))


@pytest.mark.parametrize("mode", [0o775, 0o757])
def test_programs_that_others_can_change_are_refused(tmp_path, mode):
    firecracker, jailer = standin.install(tmp_path)
    jailer.chmod(mode)
    with pytest.raises(HypervisorUnavailable, match="changed by others"):
        find_firecracker(str(firecracker), str(jailer))


def test_programs_in_a_folder_that_others_can_change_are_refused(tmp_path):
    folder = tmp_path / "open"
    folder.mkdir()
    firecracker, jailer = standin.install(folder)
    folder.chmod(0o777)
    with pytest.raises(HypervisorUnavailable, match="changed by others"):
        find_firecracker(str(firecracker), str(jailer))


def test_programs_that_are_missing_or_say_nothing_are_refused(tmp_path):
    with pytest.raises(HypervisorUnavailable, match="not found"):
        find_firecracker(str(tmp_path / "none"), "none")
    with pytest.raises(HypervisorUnavailable, match="does not say"):
        find_firecracker("/bin/true", "/bin/true")


# -- the API against a program that lies -----------------------------------------------------------------


def ask(root: Path, *answers: bytes, hang_up: bool = True) -> dict:
    """One GET to a socket that sends these bytes whatever it is asked."""
    (root / "run").mkdir(exist_ok=True)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(root / "run" / "s"))
    listener.listen(1)

    def serve() -> None:
        connection, _ = listener.accept()
        with connection:
            connection.recv(1 << 16)
            try:
                for answer in answers:
                    connection.sendall(answer)
                if not hang_up:
                    connection.recv(1)
            except OSError:
                pass  # it was hung up on

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()

    async def talk() -> dict:
        api = Api(root, "run/s")
        await api.open(lambda: True, 5)
        try:
            return await api.get("/")
        finally:
            api.close()

    try:
        return anyio.run(talk)
    finally:
        listener.close()
        thread.join(5)


def reply(body: bytes, status: str = "200 OK", length: int | None = None) -> bytes:
    return b"HTTP/1.1 %s\r\nContent-Length: %d\r\n\r\n%s" % (
        status.encode(),
        len(body) if length is None else length,
        body,
    )


def test_an_answer_is_understood(tmp_path):
    assert ask(tmp_path, reply(b'{"state": "Running"}')) == {"state": "Running"}


@pytest.mark.parametrize(
    "answer",
    [b"", b"garbage\r\n\r\n", reply(b"[]"), reply(b"{"), reply(b"[" * 100_000), reply(b"x", length=10_000_000),
     b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 100_000, reply(b"{}", length=10), b"HTTP/1.1 200 OK\r\n"],
)  # fmt: skip
def test_an_answer_that_is_none_is_an_error(tmp_path, answer):
    with pytest.raises(MachineError):
        ask(tmp_path, answer)


def test_an_endless_answer_is_cut(tmp_path):
    with pytest.raises(MachineError, match="too long"):
        ask(tmp_path, reply(b"x" * (1 << 20), length=1 << 30))


def test_silence_ends(tmp_path, monkeypatch):
    monkeypatch.setattr(api_module, "ANSWER_TIMEOUT_S", 0.1)
    with pytest.raises(MachineError, match="no answer within"):
        ask(tmp_path, hang_up=False)


def test_a_refusal_has_its_reason_and_a_full_disk_its_own_error(tmp_path):
    with pytest.raises(MachineError, match="not supported before"):
        ask(tmp_path, reply(b'{"fault_message": "not supported before"}', "400 Bad Request"))
    os.unlink(tmp_path / "run" / "s")
    with pytest.raises(StorageError, match="disk is full"):
        ask(tmp_path, reply(b'{"fault_message": "Cannot write: No space left (os error 28)"}', "400 Bad Request"))


@given(st.binary(max_size=300))
def test_any_bytes_end_in_an_answer_or_a_typed_error(data):
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        try:
            ask(Path(folder), data)
        except (MachineError, StorageError):
            pass


# -- sockets and files in a jail that is not to be trusted ------------------------------------------------


def test_a_link_to_another_socket_is_not_followed(tmp_path):
    """Root would speak to any service of the host on behalf of what was jailed."""
    (tmp_path / "root" / "run").mkdir(parents=True)
    with socket.socket(socket.AF_UNIX) as victim:
        victim.bind(str(tmp_path / "victim"))
        victim.listen(1)
        (tmp_path / "root" / "run" / "s").symlink_to(tmp_path / "victim")
        with pytest.raises(OSError, match="levels of symbolic links|no socket"):
            connect_inside(tmp_path / "root", "run/s")
        (tmp_path / "root" / "run").rename(tmp_path / "root" / "moved")
        (tmp_path / "root" / "run").symlink_to(tmp_path)
        with pytest.raises(NotADirectoryError):
            connect_inside(tmp_path / "root", "run/victim")
    (tmp_path / "root" / "file").write_text("")
    with pytest.raises(OSError, match="no socket"):
        connect_inside(tmp_path / "root", "file")


def test_a_saved_file_that_is_a_link_is_not_read(tmp_path):
    (tmp_path / "root").mkdir()
    (tmp_path / "secret").write_text("of the host")
    (tmp_path / "root" / "state").symlink_to(tmp_path / "secret")
    with pytest.raises(OSError, match="levels of symbolic links"):
        open_inside(tmp_path / "root", "state", os.O_RDONLY)


@given(st.lists(st.tuples(st.integers(0, 40), st.binary(min_size=1, max_size=5000)), max_size=5))
def test_sparse_files_are_copied_as_they_are(pieces):
    size = 64 * 4096
    source, target = os.memfd_create("source"), os.memfd_create("target")
    os.ftruncate(source, size)
    for page, data in pieces:
        os.pwrite(source, data, page * 4096)
    copy_data(source, target, size)
    assert os.pread(target, size + 1, 0) == os.pread(source, size + 1, 0)
    os.close(source)
    os.close(target)


def test_parts_are_laid_once_and_cannot_be_written_by_the_jailed(tmp_path):
    folders = JailFolders(tmp_path)
    parts = Parts(folders)
    memory = os.memfd_create("part")
    os.write(memory, b"content")
    first, second = folders.create("firecracker", "vm-1"), folders.create("firecracker", "vm-2")
    one, two = first.root, second.root
    parts.lay(memory, one, "ram")
    parts.lay(memory, two, "ram")
    assert (one / "ram").read_bytes() == b"content"
    assert (one / "ram").stat().st_ino == (two / "ram").stat().st_ino
    assert stat.S_IMODE((one / "ram").stat().st_mode) == 0o444
    with pytest.raises(FileExistsError):
        parts.lay(memory, one, "ram")
    folders.sweep()  # of another process: ours are locked, however old they are
    os.utime(tmp_path / "jails" / "firecracker" / "vm-1", (0, 0))
    folders.sweep()
    parts.lay(memory, one, "again")
    assert set(folders.machines()) == {"vm-1", "vm-2"}
    first.remove()
    second.remove()
    parts.close()
    os.close(memory)
    assert folders.machines() == {}
    assert [path.name for path in folders.folder.iterdir()] == ["firecracker"]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root's files may be linked into a jail")
def test_a_file_of_roots_is_linked_and_not_copied(tmp_path):
    parts, folder = Parts(JailFolders(tmp_path)), JailFolders(tmp_path).create("firecracker", "vm-1")
    image = tmp_path / "image"
    image.write_bytes(b"x")
    image.chmod(0o644)
    with image.open("rb") as file:
        parts.lay(file.fileno(), folder.root, "vdb")
        assert (folder.root / "vdb").stat().st_ino == image.stat().st_ino
    image.chmod(0o600)  # what the jailed could not read is copied for it
    with image.open("rb") as file:
        parts.lay(file.fileno(), folder.root, "vdc")
        assert (folder.root / "vdc").stat().st_ino != image.stat().st_ino
    parts.close()
    folder.remove()


def test_the_part_that_was_not_used_for_longest_goes_first(tmp_path, monkeypatch):
    monkeypatch.setattr("luminaguard.microvm.jail.folders._MOST_PARTS", 2)
    parts, folder = Parts(JailFolders(tmp_path)), JailFolders(tmp_path).create("firecracker", "vm-1")
    memory = [os.memfd_create("part") for _ in range(3)]
    parts.lay(memory[0], folder.root, "ram")
    for number, fd in enumerate(memory):
        parts.lay(fd, folder.root, f"other{number}")
        parts.lay(memory[0], folder.root, f"ram{number}")
    assert len({(folder.root / f"ram{number}").stat().st_ino for number in range(3)}) == 1
    for fd in memory:
        os.close(fd)
    parts.close()
    folder.remove()


def test_what_a_process_that_was_killed_left_is_swept(tmp_path):
    folders = JailFolders(tmp_path)
    if (child := os.fork()) == 0:
        memory = os.memfd_create("part")
        os.write(memory, b"content")
        Parts(folders).lay(memory, folders.create("firecracker", "vm-1").root, "ram")
        os._exit(0)
    os.waitpid(child, 0)
    (folders.folder / ".new-0123").mkdir()
    os.utime(folders.folder / ".new-0123", (0, 0))
    (folders.folder / ".new-4567").mkdir()  # just made, by someone who will lock it in a moment
    assert len(list(folders.folder.glob(".parts-*"))) == 1
    folders.sweep()
    assert list(folders.folder.glob(".parts-*")) == []
    assert [path.name for path in folders.folder.glob(".new-*")] == [".new-4567"]
    assert folders.machines() == {}


def test_a_tree_without_bottom_is_removed(tmp_path):
    """What a hostile program leaves must not be deeper than what can be removed."""
    top, outside = tmp_path / "tree", tmp_path / "outside"
    top.mkdir()
    outside.mkdir()
    (outside / "file").touch()
    fd = os.open(top, os.O_RDONLY | os.O_DIRECTORY)
    for _ in range(3000):
        os.mkdir("d", dir_fd=fd)
        os.symlink(outside, "link", dir_fd=fd)
        step = os.open("d", os.O_RDONLY | os.O_DIRECTORY, dir_fd=fd)
        os.close(fd)
        fd = step
    os.close(fd)
    remove_tree(top)
    assert not top.exists()
    assert (outside / "file").exists()
    remove_tree(tmp_path / "none")


@pytest.mark.skipif(os.geteuid() != 0, reason="changes owners")
def test_a_sealed_jail_takes_no_new_file(tmp_path):
    tmp_path.chmod(0o755)
    folder = JailFolders(tmp_path).create("firecracker", "vm-1")
    for path in (folder.root, folder.root / "run", folder.root / "dev"):
        path.mkdir(exist_ok=True)
        os.chown(path, 1000, 1000)
    folder.seal()
    for path in (folder.root, folder.root / "run", folder.root / "dev"):
        info = path.stat()
        assert (info.st_uid, stat.S_IMODE(info.st_mode)) == (0, 0o755)
    folder.remove()


def test_a_caller_who_went_away_does_not_spoil_the_next_request(tmp_path):
    """The answer that comes too late belongs to nobody."""
    (tmp_path / "run").mkdir()
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(tmp_path / "run" / "s"))
    listener.listen(4)

    def serve() -> None:
        for number in range(2):
            connection, _ = listener.accept()
            with connection:
                connection.recv(1 << 16)
                if number == 0:
                    connection.recv(1)  # until it is hung up on
                else:
                    connection.sendall(reply(b'{"second": true}'))
                    connection.recv(1)

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()

    async def talk() -> None:
        api = Api(tmp_path, "run/s")
        await api.open(lambda: True, 5)
        with anyio.move_on_after(0.1):
            await api.get("/first")
        assert await api.get("/second") == {"second": True}
        api.close()

    anyio.run(talk)
    listener.close()
    thread.join(5)


# -- what a request may be: the stand-in is as strict as the real program ----------------------------------


@pytest.fixture
def files(tmp_path, monkeypatch):
    """The stand-in takes paths for those in its chroot: here, relative ones."""
    monkeypatch.chdir(tmp_path)
    for name in (bodies.KERNEL, bodies.INITRAMFS, bodies.LOG, bodies.METRICS, *bodies.DISKS[:2]):
        (tmp_path / name).write_bytes(b"marker one\n")
    return tmp_path


def relative(value):
    """The bodies that are really sent, with paths that work outside of a chroot."""
    return json.loads(json.dumps(value).replace('"/', '"'))


def booted(version: str = "1.16.1") -> Machine:
    machine = Machine("vm-1", version)
    machine.start_from(relative(bodies.boot(256, 2)))
    return machine


def test_what_the_backend_sends_is_valid_in_its_phase(files):
    machine = booted()
    assert machine.request("GET", "/", None)["state"] == "Running"
    machine.request("PATCH", "/vm", {"state": "Paused"})
    machine.request("PUT", "/snapshot/create", relative(bodies.snapshot()))
    assert (files / bodies.RAM).stat().st_size == 256 << 20
    clone = Machine("vm-2", "1.16.1")
    clone.request("PUT", "/logger", relative(bodies.logger()))
    clone.request("PUT", "/metrics", relative(bodies.metrics()))
    clone.request("PUT", "/snapshot/load", relative(bodies.load(resume=False, override=True)))
    assert clone.state == "Paused"
    clone.request("PATCH", "/drives/vdb", relative(bodies.replacement(1, bodies.DISKS[0])))
    clone.request("PATCH", "/vm", {"state": "Resumed"})
    assert (clone.state, clone.connectable) == ("Running", True)


@pytest.mark.parametrize(
    ("method", "path", "body", "words"),
    [
        ("PUT", "/boot-source", {"kernel_image_path": "vmlinux", "x": 1}, "deserializing"),
        ("PUT", "/boot-source", {}, "deserializing"),
        ("PUT", "/boot-source", None, "Empty PUT"),
        ("PUT", "/nothing", {}, "Invalid request method and/or path"),
        ("DELETE", "/vm", None, "Invalid request method and/or path"),
        ("GET", "/", {}, "cannot have a body"),
        ("PUT", "/drives/a-b", {"drive_id": "a-b"}, "Invalid request method and/or path"),
        ("PUT", "/drives/a", {"drive_id": "b", "is_root_device": False, "path_on_host": "vda"}, "does not match"),
        ("PUT", "/drives/a", {"drive_id": "a", "is_root_device": False, "path_on_host": "none"}, "Unable to open"),
        ("PUT", "/vsock", {"guest_cid": 2, "uds_path": "v"}, "guest_cid"),
        ("PUT", "/machine-config", {"vcpu_count": 33, "mem_size_mib": 1}, "deserializing"),
        ("PATCH", "/vm", {"state": "Paused"}, "before starting"),
        ("PATCH", "/drives/vda", {"drive_id": "vda"}, "before starting"),
        ("PUT", "/snapshot/create", {"snapshot_path": "a", "mem_file_path": "b"}, "before starting"),
        ("PUT", "/actions", {"action_type": "InstanceStart"}, "without kernel"),
        ("PUT", "/logger", {"log_path": "none"}, "Failed to open"),
        ("PUT", "/snapshot/load", {"snapshot_path": "a"}, "mem_backend"),
    ],
)
def test_wrong_requests_before_the_start(files, method, path, body, words):
    with pytest.raises(Refused, match=words):
        Machine("vm-1", "1.16.1").request(method, path, body)


@pytest.mark.parametrize(
    ("method", "path", "body", "words"),
    [
        ("PUT", "/machine-config", {"vcpu_count": 1, "mem_size_mib": 128}, "after starting"),
        ("PUT", "/actions", {"action_type": "InstanceStart"}, "after starting"),
        ("PUT", "/snapshot/load", {"snapshot_path": "a", "mem_file_path": "b"}, "after starting"),
        ("PUT", "/snapshot/create", {"snapshot_path": "a", "mem_file_path": "b"}, "not paused"),
        ("PATCH", "/drives/none", {"drive_id": "none", "path_on_host": "vda"}, "Invalid block device"),
    ],
)
def test_wrong_requests_after_the_start(files, method, path, body, words):
    with pytest.raises(Refused, match=words):
        booted().request(method, path, body)


def test_metrics_are_set_once_and_nothing_is_loaded_into_a_configured_machine(files):
    machine = Machine("vm-1", "1.16.1")
    machine.request("PUT", "/metrics", {"metrics_path": bodies.METRICS})
    with pytest.raises(Refused):
        machine.request("PUT", "/metrics", {"metrics_path": bodies.METRICS})
    machine.request("PUT", "/vsock", {"guest_cid": 3, "uds_path": "v"})
    with pytest.raises(Refused, match="not allowed after configuring"):
        machine.request("PUT", "/snapshot/load", {"snapshot_path": "a", "mem_file_path": "b"})


@pytest.mark.parametrize("fault", ["no state", "no disk", "socket in the way", "another version", "no memory"])
def test_a_load_that_fails_ends_the_program(files, fault):
    machine = booted()
    machine.request("PATCH", "/vm", {"state": "Paused"})
    machine.request("PUT", "/snapshot/create", relative(bodies.snapshot()))
    victims = {"no state": bodies.STATE, "no disk": "vdb", "no memory": bodies.RAM}
    if fault in victims:
        (files / victims[fault]).unlink()
    if fault == "socket in the way":
        (files / bodies.VSOCK).touch()
    with pytest.raises((Fatal, Refused)):
        Machine("vm-2", "1.15.0" if fault == "another version" else "1.16.1").request(
            "PUT", "/snapshot/load", relative(bodies.load(resume=True, override=False))
        )


@pytest.mark.parametrize(("version", "connectable"), [("1.16.1", False), ("1.15.1", True), ("1.17.0", True)])
def test_pause_and_resume_without_a_snapshot_cuts_the_guest_off_on_1_16(files, version, connectable):
    machine = booted(version)
    machine.request("PATCH", "/vm", {"state": "Paused"})
    machine.request("PATCH", "/vm", {"state": "Resumed"})
    assert machine.connectable is connectable


def test_every_route_that_the_description_has_is_answered(files):
    """With 400 at worst; what the stand-in does not know it must not claim to know."""
    for route, methods in standin_machine._ROUTES.items():
        for method in methods:
            assert callable(getattr(Machine, f"_{method.lower()}_{route.split('/')[1].replace('-', '_')}")), route
    machine = booted()
    machine.request("PATCH", "/balloon", {"amount_mib": 16})
    with pytest.raises(Refused):
        Machine("vm-2", "1.16.1").request("PATCH", "/balloon", {"amount_mib": 16})


@pytest.fixture
def program(files):
    """The stand-in's two sockets, served by threads of this process."""
    running = Program(booted())
    running.listen_for_guest()
    threading.Thread(target=running.serve, args=("api",), daemon=True).start()
    deadline = time.monotonic() + 10
    while True:  # the file is there a moment before anyone listens
        try:
            dial("api").close()
        except OSError:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        else:
            return running


def dial(path: str, said: bytes = b"") -> socket.socket:
    connection = socket.socket(socket.AF_UNIX)
    connection.settimeout(10)
    try:
        connection.connect(path)
    except OSError:
        connection.close()
        raise
    with contextlib.suppress(BrokenPipeError):  # turned away already: its answer can still be read
        connection.sendall(said)
    return connection


GET = b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"


def test_the_eleventh_connection_to_the_api_is_turned_away(program):
    connections = [dial("api", GET) for _ in range(10)]
    assert all(c.recv(100).startswith(b"HTTP/1.1 200") for c in connections)
    with dial("api", GET) as one_more:
        assert one_more.recv(100).startswith(b"HTTP/1.1 503")
    connections.pop().close()
    deadline = time.monotonic() + 10
    answer = b""
    while not answer.startswith(b"HTTP/1.1 200") and time.monotonic() < deadline:
        with dial("api", GET) as again:
            answer = again.recv(100)
    assert answer.startswith(b"HTTP/1.1 200")
    for connection in connections:
        connection.close()


def test_a_snapshot_ends_what_talks_with_the_guest_and_the_next_one_begins_anew(program):
    connect = b"CONNECT %d\n" % VSOCK_PORT
    with dial(bodies.VSOCK, connect) as before, dial("api") as api:
        assert before.recv(3) == b"OK "
        for method, path, body in (
            ("PATCH", "/vm", {"state": "Paused"}),
            ("PUT", "/snapshot/create", relative(bodies.snapshot())),
            ("PATCH", "/vm", {"state": "Resumed"}),
        ):
            data = json.dumps(body).encode()
            api.sendall(f"{method} {path} HTTP/1.1\r\nHost: l\r\nContent-Length: {len(data)}\r\n\r\n".encode() + data)
            assert api.recv(200).startswith(b"HTTP/1.1 204")
        while before.recv(1 << 16):
            pass  # the rest of its HELLO, and then the end
    with dial(bodies.VSOCK, connect) as after:
        assert after.recv(3) == b"OK "


# -- vsock ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "accepted"),
    [(b"OK 1073741824\n", True), (b"OK x\n", False), (b"", False), (b"NO 1\n", False), (b"OK 1" + b"0" * 100, False)],
)
def test_the_answer_to_connect(answer, accepted, monkeypatch):
    monkeypatch.setattr(vsock, "_ANSWER_S", 1.0)
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    with ours, theirs:
        theirs.sendall(answer + (b"next" if accepted else b""))
        theirs.shutdown(socket.SHUT_WR)
        assert anyio.run(vsock._accepted, ours) is accepted
        if accepted:
            assert ours.recv(100) == b"next"  # not a byte too many was taken

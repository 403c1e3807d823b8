"""Reading and packing workspaces."""

import os
import subprocess
import tarfile
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from luminaguard.effects import Change, Changeset, DirEntry, FileEntry, LinkEntry
from luminaguard.errors import ChangesetRefused, StorageError, WorkspaceChanged, WorkspaceError
from luminaguard.workspaces import state as state_module
from luminaguard.workspaces.own import own_paths, refuse_changes
from luminaguard.workspaces.pack import WorkspaceImages
from luminaguard.workspaces.squash import _file_header
from luminaguard.workspaces.state import IGNORE_FILE, Limits, read_state

LIMITS = Limits(1000, 1 << 24)


def test_entries_have_kind_mode_and_hash(workspace):
    state = read_state(workspace, LIMITS)
    assert isinstance(state.entries["sub"], DirEntry)
    assert state.entries["link"] == LinkEntry("a.txt")
    assert isinstance(state.entries["run.sh"], FileEntry)
    assert state.entries["run.sh"].mode == 0o755


def test_ignored_paths_stay_out(workspace):
    (workspace / "node_modules" / "x").mkdir(parents=True)
    (workspace / "node_modules" / "x" / "y").write_text("y")
    (workspace / IGNORE_FILE).write_text("node_modules/\n*.tmp\n")
    (workspace / "z.tmp").write_text("z")
    entries = read_state(workspace, LIMITS).entries
    assert "node_modules" not in entries
    assert "z.tmp" not in entries
    assert IGNORE_FILE in entries


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda w: os.mkfifo(w / "pipe"), "a device, a socket or a pipe"),
        (lambda w: (w / "big").write_bytes(bytes((1 << 24) + 1)), "MiB of files"),
        (lambda w: [(w / f"f{n}").touch() for n in range(1001)], "more than 1,000 entries"),
        (lambda w: (w / IGNORE_FILE).symlink_to("/etc/passwd"), "cannot be read"),
        (lambda w: (w / IGNORE_FILE).write_bytes(b"\xff\xfe"), "cannot be used"),
    ],
)
def test_what_cannot_be_a_workspace_is_refused_with_a_hint(workspace, spoil, words):
    spoil(workspace)
    with pytest.raises(WorkspaceError, match=words) as caught:
        read_state(workspace, LIMITS)
    assert caught.value.hint


def test_missing_file_link_and_root_are_told_apart(tmp_path, workspace):
    (tmp_path / "file").write_text("x")
    (tmp_path / "alias").symlink_to(workspace)
    for path, words in (("nowhere", "does not exist"), ("file", "is not a folder"), ("alias", "symbolic link")):
        with pytest.raises(WorkspaceError, match=words):
            read_state(tmp_path / path, LIMITS)
    with pytest.raises(WorkspaceError, match="root of the file system"):
        read_state(tmp_path.parent.joinpath("/"), LIMITS)


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_an_unreadable_file_is_named(workspace):
    (workspace / "secret").write_text("x")
    (workspace / "secret").chmod(0)
    with pytest.raises(WorkspaceError, match="secret.*cannot be read"):
        read_state(workspace, LIMITS)


def test_a_file_that_grows_while_it_is_read_is_noticed(workspace):
    (workspace / "log").write_bytes(bytes(8 << 20))
    stop = threading.Event()

    def write():
        with (workspace / "log").open("ab") as file:
            while not stop.is_set():
                file.write(b"x")
                file.flush()

    writer = threading.Thread(target=write)
    writer.start()
    try:
        with pytest.raises(WorkspaceChanged):
            for _ in range(50):
                read_state(workspace, LIMITS)
    finally:
        stop.set()
        writer.join()


def test_a_change_between_reading_and_packing_is_noticed(tmp_path, workspace):
    state = read_state(workspace, LIMITS)
    (workspace / "a.txt").write_text("one\nTWO\n")
    with pytest.raises(WorkspaceChanged):
        WorkspaceImages(tmp_path).open(state)
    assert list((tmp_path / "workspaces").iterdir()) == []


def test_the_image_holds_odd_names_links_and_modes(tmp_path, workspace):
    odd = os.fsencode(workspace) + b"/caf\xe9\n" + b"x" * 200
    with open(odd, "wb") as file:
        file.write(b"odd")
    os.link(workspace / "a.txt", workspace / "hard")
    os.chmod(workspace / "run.sh", 0o4755)
    with (workspace / "sparse").open("wb") as file:
        file.truncate(1 << 22)
    state = read_state(workspace, LIMITS)
    os.close(WorkspaceImages(tmp_path).open(state))
    image = next((tmp_path / "workspaces").glob("*.squashfs"))
    assert image.stat().st_size < 1 << 20
    listing = subprocess.run(["unsquashfs", "-lln", str(image)], capture_output=True, check=True).stdout
    assert b"-rwxr-xr-x" in listing
    assert b"-rwsr-xr-x" not in listing
    assert b"1000" in listing
    assert b"caf\xe9" in listing
    before = image.stat().st_ino
    os.close(WorkspaceImages(tmp_path).open(state))
    assert image.stat().st_ino == before  # the same state is not packed twice


def test_a_full_disk_while_packing_is_an_error_with_a_hint(tmp_path, workspace, monkeypatch):
    (workspace / "big").write_bytes(os.urandom(4 << 20))
    state = read_state(workspace, LIMITS)
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard))  # mksquashfs inherits it
    try:
        with pytest.raises(StorageError, match="could not be packed"):
            WorkspaceImages(tmp_path).open(state)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list((tmp_path / "workspaces").iterdir()) == []


def test_a_workspace_that_is_too_large_names_the_folders_that_make_it_so(tmp_path):
    (tmp_path / "node_modules" / "huge").mkdir(parents=True)
    (tmp_path / "src").mkdir()
    for number in range(30):
        (tmp_path / "node_modules" / "huge" / f"f{number}").write_bytes(bytes(1 << 20))
    (tmp_path / "src" / "main.py").write_text("x")
    with pytest.raises(WorkspaceError) as caught:
        read_state(tmp_path, Limits(1000, 20 << 20))
    assert "most are in 'node_modules/huge' (30 MiB, 30 entries)" in caught.value.message
    assert ".luminaguardignore" in caught.value.hint
    with pytest.raises(WorkspaceError) as caught:
        read_state(tmp_path, Limits(20, 1 << 30))
    assert "'node_modules/huge'" in caught.value.message


def test_what_is_ignored_is_not_to_blame_for_a_workspace_that_is_too_large(tmp_path):
    for name in ("ignored", "folders", "links"):
        (tmp_path / name).mkdir()
    for number in range(40):
        (tmp_path / "ignored" / f"f{number}").write_bytes(bytes(1 << 20))
        (tmp_path / "folders" / f"d{number}").mkdir()
        (tmp_path / "links" / f"l{number}").symlink_to("x")
    (tmp_path / ".luminaguardignore").write_text("/ignored/\n")
    with pytest.raises(WorkspaceError) as caught:
        read_state(tmp_path, Limits(50, 1 << 30))
    assert "most are in 'folders' (0 MiB, 40 entries), 'links' (0 MiB, 40 entries)" in caught.value.message
    (tmp_path / "big").write_bytes(bytes(3 << 20))
    with pytest.raises(WorkspaceError) as caught:
        read_state(tmp_path, Limits(1000, 2 << 20))
    assert "most are in '.' (3 MiB, " in caught.value.message


def test_a_state_is_packed_once_and_opened_again_at_once(tmp_path):
    folder = tmp_path / "w"
    folder.mkdir()
    (folder / "same").write_bytes(b"x" * 5000)
    (folder / "twin").write_bytes(b"x" * 5000)
    state = read_state(folder, Limits(100, 1 << 30))
    images = WorkspaceImages(tmp_path / "cache")
    first, again = images.open(state), images.open(state)
    try:
        assert os.fstat(first).st_ino == os.fstat(again).st_ino
    finally:
        os.close(first)
        os.close(again)


# -- LuminaGuard's own folders -------------------------------------------------------------------------


def test_our_own_folders_do_not_go_in_and_no_change_touches_them(tmp_path):
    home = tmp_path / "home"
    (home / ".config" / "luminaguard").mkdir(parents=True)
    (home / ".config" / "luminaguard" / "key").write_text("secret")
    (home / ".config" / "other").write_text("x")
    (home / "link").symlink_to(".config/luminaguard")
    own = own_paths(home, [home / "link", tmp_path / "elsewhere"])
    assert own == {".config/luminaguard"}
    entries = read_state(home, LIMITS, own=own).entries
    assert ".config/other" in entries
    assert not any(path.startswith(".config/luminaguard") for path in entries)
    file = FileEntry(0o644, 1, "a" * 64)
    for change in (
        Change(".config/luminaguard/luminaguard.toml", None, file),
        Change(".config/luminaguard", None, LinkEntry("/tmp/evil")),
        Change(".config", DirEntry(0o755), None),
        Change(".config", DirEntry(0o755), LinkEntry("/tmp/evil")),
        Change(".config", DirEntry(0o755), file),
        Change(".config", DirEntry(0o755), DirEntry(0o777)),
    ):
        with pytest.raises(ChangesetRefused, match="LuminaGuard itself"):
            refuse_changes(Changeset.of([change]), own)
    refuse_changes(Changeset.of([Change(".config/other", None, file), Change(".config/lumina", None, file)]), own)


def test_our_own_folder_is_no_workspace(tmp_path):
    (tmp_path / "state" / "blobs").mkdir(parents=True)
    for folder in (tmp_path / "state", tmp_path / "state" / "blobs"):
        with pytest.raises(WorkspaceError, match="LuminaGuard itself"):
            own_paths(folder, [tmp_path / "state"])


# -- what was hashed before ------------------------------------------------------------------------------


def test_unchanged_files_are_not_read_again_and_changed_ones_are(tmp_path, monkeypatch):
    folder, indexes = tmp_path / "w", tmp_path / "indexes"
    folder.mkdir()
    for number in range(40):
        (folder / f"f{number}").write_text(f"{number}")
    monkeypatch.setattr("luminaguard.workspaces.index._SETTLED_NS", -(10**12))  # everything counts as old
    first = read_state(folder, LIMITS, indexes=indexes)
    hashed = []
    real = state_module.hash_fd
    monkeypatch.setattr(state_module, "hash_fd", lambda fd: hashed.append(fd) or real(fd))
    assert read_state(folder, LIMITS, indexes=indexes).entries == first.entries
    assert hashed == []
    info = (folder / "f1").stat()
    (folder / "f1").write_text("x")  # the same size
    os.utime(folder / "f1", ns=(info.st_atime_ns, info.st_mtime_ns))  # and the same time: the kernel's tells
    (folder / "f2").rename(folder / "moved")
    again = read_state(folder, LIMITS, indexes=indexes).entries
    assert again == read_state(folder, LIMITS).entries
    assert again["f1"] != first.entries["f1"]


def test_a_file_that_was_just_written_is_not_remembered(tmp_path):
    folder, indexes = tmp_path / "w", tmp_path / "indexes"
    folder.mkdir()
    for number in range(40):
        (folder / f"f{number}").write_text("a")
    read_state(folder, LIMITS, indexes=indexes)
    assert not indexes.exists()


@pytest.mark.parametrize("damage", ["", "{", '{"format": 1, "files": 3}', '{"format": 1, "files": {"f0": null}}', "[]"])
def test_a_damaged_index_is_as_good_as_none(tmp_path, monkeypatch, damage):
    folder, indexes = tmp_path / "w", tmp_path / "indexes"
    folder.mkdir()
    for number in range(40):
        (folder / f"f{number}").write_text("a")
    monkeypatch.setattr("luminaguard.workspaces.index._SETTLED_NS", -(10**12))
    want = read_state(folder, LIMITS, indexes=indexes).entries
    (index,) = indexes.iterdir()
    index.write_text(damage)
    assert read_state(folder, LIMITS, indexes=indexes).entries == want


def test_what_a_killed_process_left_of_an_index_is_swept(tmp_path, monkeypatch):
    folder, indexes = tmp_path / "w", tmp_path / "indexes"
    folder.mkdir()
    indexes.mkdir()
    for number in range(40):
        (folder / f"f{number}").write_text("a")
    for name in ("old.7.partial", "new.8.partial"):
        (indexes / name).touch()
    os.utime(indexes / "old.7.partial", (1, 1))
    monkeypatch.setattr("luminaguard.workspaces.index._SETTLED_NS", -(10**12))
    read_state(folder, LIMITS, indexes=indexes)
    assert not (indexes / "old.7.partial").exists()
    assert (indexes / "new.8.partial").exists(), "another process may be writing it"


@given(
    st.binary(min_size=1, max_size=120).filter(lambda name: b"\0" not in name),
    st.integers(0, 0o777), st.integers(0, 1 << 34), st.integers(0, 0xFFFFFFFF),
)  # fmt: skip
def test_a_files_header_is_what_tarfile_would_write(name, mode, size, seconds):
    info = tarfile.TarInfo(os.fsdecode(name))
    info.mode, info.size, info.mtime = mode, size, seconds
    assert _file_header(name, mode, size, seconds) == info.tobuf(tarfile.GNU_FORMAT, "utf-8", "surrogateescape")

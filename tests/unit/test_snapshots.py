"""The states of a task: changes joined and taken apart again, kept, and what nobody needs any more deleted."""

import hashlib
import os
import shutil
import subprocess

import pytest
from hypothesis import given
from hypothesis import strategies as st

from luminaguard.effects.changes import Change, Changeset, DirEntry, FileEntry, LinkEntry
from luminaguard.errors import ChangesetRefused, StorageError, WorkspaceChanged
from luminaguard.workspaces.blobs import BlobStore
from luminaguard.workspaces.pack import WorkspaceImages
from luminaguard.workspaces.snapshots import Snapshot, Snapshots
from luminaguard.workspaces.state import Limits, read_state

NAMES = ["a", "b", "d", "d/x", "d/y"]


@st.composite
def manifests(draw):
    """A state of a small workspace: files need their folder."""
    found = {}
    for name in NAMES:
        if "/" in name and not isinstance(found.get("d"), DirEntry):
            continue
        kinds = [None, FileEntry(0o644, 1, "1" * 64), FileEntry(0o755, 2, "2" * 64), LinkEntry("a"), DirEntry(0o755)]
        if (entry := draw(st.sampled_from(kinds))) is not None:
            found[name] = entry
    return found


def difference(old, new):
    paths = old.keys() | new.keys()
    return Changeset.of(Change(p, old.get(p), new.get(p)) for p in paths if old.get(p) != new.get(p))


@given(manifests(), manifests(), manifests())
def test_changes_joined_and_taken_apart_are_the_changes(first, second, third):
    one, two, whole = difference(first, second), difference(second, third), difference(first, third)
    assert one.then(two) == whole
    assert whole.since(one) == two
    assert one.since(one) == Changeset(())
    assert whole.applied_to(first) == third
    assert one.then(difference(second, first)) == Changeset(())


def test_changes_of_another_state_are_refused():
    one = difference({}, {"a": LinkEntry("x")})
    with pytest.raises(ChangesetRefused):
        one.then(difference({}, {"a": LinkEntry("y")}))
    with pytest.raises(ChangesetRefused):
        one.applied_to({"a": LinkEntry("z")})
    with pytest.raises(ChangesetRefused):
        one.since(difference({"a": LinkEntry("q")}, {}))


@pytest.mark.parametrize(("path", "touched"), [("d/x", True), ("d", True), ("d/x/below", True), ("d/y", False),
                                               ("dx", False), ("", True)])  # fmt: skip
def test_what_changes_touch(path, touched):
    assert difference({}, {"d/x": LinkEntry("a")}).touches(path) is touched
    assert not Changeset(()).touches(path)


@pytest.fixture
def tasks(tmp_path, workspace):
    """The states of one task on the example's folder."""
    blobs = BlobStore(tmp_path / "state")
    snapshots = Snapshots(tmp_path / "state", blobs)
    state = read_state(workspace, Limits(1000, 1 << 20))
    images = WorkspaceImages(tmp_path / "cache")
    fd = images.open(state)
    snapshots.begin("task-1", state, fd)
    os.close(fd)
    yield snapshots, blobs
    assert not list((tmp_path / "state" / "tasks").glob("*/.*"))


def wrote(snapshots, blobs, snapshot, path, data, *, base=None):
    """A step that writes a file."""
    writer = blobs.writer("vm-1")
    writer.begin()
    writer.write(data)
    size, sha = writer.end()
    before = snapshot.changes.applied_to(snapshots.first("task-1").entries).get(path)
    snapshots.take("task-1", "vm-1")
    return snapshot.after(Changeset.of([Change(path, before, FileEntry(0o644, size, sha))]), 1000)


def content(image):
    """What an image holds, by path."""
    with os.fdopen(image, "rb") as file:
        name = f"/proc/self/fd/{file.fileno()}"
        listed = subprocess.run(["unsquashfs", "-lln", name], pass_fds=[file.fileno()], capture_output=True, check=True)
    return listed.stdout.decode()


@pytest.mark.skipif(not shutil.which("unsquashfs"), reason="squashfs-tools")
def test_a_later_state_is_a_layer_on_the_first(tasks, workspace):
    snapshots, blobs = tasks
    (workspace / "a.txt").write_text("changed by somebody else meanwhile")
    later = wrote(snapshots, blobs, Snapshot(), "new.txt", b"new")
    later = wrote(snapshots, blobs, later, "a.txt", b"mine")
    disks, entries = snapshots.open("task-1", later)
    assert entries["a.txt"].sha256 == hashlib.sha256(b"mine").hexdigest()
    assert len(disks) == 2
    assert "run.sh" in content(disks[0])
    upper = content(disks[1])
    assert "new.txt" in upper and "a.txt" in upper and "run.sh" not in upper
    again = Snapshot.from_json(later.to_json())
    assert (again, again.key) == (later, later.key)


def test_contents_that_no_state_needs_are_deleted_and_layers_made_again(tasks):
    snapshots, blobs = tasks
    first = wrote(snapshots, blobs, Snapshot(), "new.txt", b"one")
    second = wrote(snapshots, blobs, first, "new.txt", b"two")
    folder = snapshots.folder / "task-1"
    for state in (first, second):
        for fd in snapshots.open("task-1", state)[0]:
            os.close(fd)
    assert len(list(folder.glob("layer-*"))) == len(list((folder / "contents").iterdir())) == 2
    snapshots.collect("task-1", 2, second)
    assert len(list(folder.glob("layer-*"))) == len(list((folder / "contents").iterdir())) == 1
    (folder / f"layer-{second.key}").unlink()
    for fd in snapshots.open("task-1", second)[0]:
        os.close(fd)
    with pytest.raises(WorkspaceChanged):
        snapshots.open("task-1", first)
    snapshots.forget("task-1")
    assert snapshots.tasks() == []


def test_a_content_that_was_exchanged_is_noticed(tasks):
    snapshots, blobs = tasks
    state = wrote(snapshots, blobs, Snapshot(), "new.txt", b"one")
    (stored,) = (snapshots.folder / "task-1" / "contents").iterdir()
    stored.write_bytes(b"two")
    with pytest.raises(WorkspaceChanged):
        snapshots.open("task-1", state)


def test_a_request_has_its_contents_by_its_own_name(tasks):
    snapshots, blobs = tasks
    state = wrote(snapshots, blobs, Snapshot(), "new.txt", b"one")
    for _ in range(2):  # a crash may come in between
        snapshots.lend("task-1", "req-1", state.changes)
    snapshots.forget("task-1")
    assert blobs.read("req-1", hashlib.sha256(b"one").hexdigest(), 10) == b"one"


@pytest.mark.parametrize("text", ["", "{", '{"format": 2}', '{"format": 1, "path": "/x", "rows": {"a": [1]}}'])
def test_a_damaged_first_state_is_an_error_with_a_hint(tasks, tmp_path, text):
    snapshots, blobs = tasks
    (snapshots.folder / "task-1" / "base.json").write_text(text)
    again = Snapshots(tmp_path / "state", blobs)
    with pytest.raises(StorageError, match="first state"):
        again.open("task-1", Snapshot())

"""Several folders in one machine: joined into one state, packed from each, and told apart again by where they lie."""

import os
import subprocess

import pytest
from hypothesis import given
from hypothesis import strategies as st

from luminaguard.effects.changes import Change, Changeset, DirEntry, FileEntry
from luminaguard.errors import ChangesetRefused, WorkspaceChanged, WorkspaceError
from luminaguard.workspaces.joined import join, split
from luminaguard.workspaces.pack import WorkspaceImages
from luminaguard.workspaces.state import Limits, read_state

LIMITS = Limits(1000, 1 << 20)
FILE = FileEntry(0o644, 1, "0" * 64)


@pytest.fixture
def states(tmp_path):
    """States of a working folder and two others, one of which has a file with two names."""
    for name, text in (("top", "0"), ("docs", "1"), ("src", "2")):
        (tmp_path / name / "sub").mkdir(parents=True)
        (tmp_path / name / "sub" / "file").write_text(text)
    os.link(tmp_path / "src" / "sub" / "file", tmp_path / "src" / "again")
    return [read_state(tmp_path / name, LIMITS) for name in ("top", "docs", "src")]


def test_one_image_shows_all_folders(states, tmp_path):
    top, docs, src = states
    whole = join(top, {"docs": docs, "src": src})
    assert whole.image_key() != top.image_key() and top.parts == {} and "docs" not in top.entries
    fd = WorkspaceImages(tmp_path / "cache").open(whole)
    try:
        told = ["unsquashfs", "-q", "-n", "-d", str(tmp_path / "out"), f"/proc/self/fd/{fd}"]
        subprocess.run(told, pass_fds=[fd], check=True, timeout=30)
    finally:
        os.close(fd)
    found = tmp_path / "out"
    texts = [(found / path).read_text() for path in ("sub/file", "docs/sub/file", "src/sub/file", "src/again")]
    assert texts == ["0", "1", "2", "2"]
    assert (found / "src" / "again").stat().st_ino == (found / "src" / "sub" / "file").stat().st_ino


def test_a_folder_that_became_another_one_is_not_packed(states, tmp_path):
    top, docs, _ = states
    (tmp_path / "docs").rename(tmp_path / "old")
    (tmp_path / "docs").mkdir()
    with pytest.raises(WorkspaceChanged):
        WorkspaceImages(tmp_path / "cache").open(join(top, {"docs": docs}))


def test_a_name_that_is_taken_is_refused(states):
    top, docs, _ = states
    with pytest.raises(WorkspaceError, match="'sub'"):
        join(top, {"sub": docs})


def test_a_folder_that_is_given_twice_is_refused_however_it_is_called(states, tmp_path):
    top, docs, _ = states
    (tmp_path / "link").symlink_to(tmp_path)
    with pytest.raises(WorkspaceError, match="twice"):
        join(top, {"docs": docs, "other": read_state(tmp_path / "link" / "docs", LIMITS)})
    with pytest.raises(WorkspaceError, match="lies in another"):
        join(top, {"docs": docs, "in": read_state(tmp_path / "link" / "docs" / "sub", LIMITS)})


def test_what_becomes_of_a_folder_itself_is_not_published():
    names = {"docs": None}
    mode = Change("docs", DirEntry(0o700), DirEntry(0o755))
    assert split(Changeset.of([mode]), names) == {"": Changeset(()), "docs": Changeset(())}
    for after in (None, FILE):
        with pytest.raises(ChangesetRefused, match="itself"):
            split(Changeset.of([Change("docs", DirEntry(0o700), after)]), names)


NAMES = st.sampled_from(["docs", "src", "docsx", "a"])


@given(st.sets(st.lists(NAMES, min_size=2, max_size=3).map("/".join), max_size=8))
def test_each_change_is_in_the_folder_where_it_lies(paths):
    changes = Changeset.of([Change(path, None, FILE) for path in paths])
    parts = split(changes, {"docs": None, "src": None})
    again = {f"{name}/{one.path}".lstrip("/") for name, part in parts.items() for one in part.changes}
    assert again == paths and set(parts) == {"", "docs", "src"}
    assert not any(change.path.split("/")[0] in {"docs", "src"} for change in parts[""].changes)

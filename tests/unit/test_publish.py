"""Publishing: all or nothing, across kill -9 at every step, and never outside of the folder."""

import errno
import hashlib
import os
import shutil
import signal
import subprocess
import threading
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from luminaguard.effects import Change, Changeset, DirEntry, FileEntry, LinkEntry
from luminaguard.errors import Conflict, OutcomeUnknown, PublishError
from luminaguard.workspaces import publish as publishing
from luminaguard.workspaces.blobs import BlobStore
from luminaguard.workspaces.publish import Publisher
from luminaguard.workspaces.state import Limits, read_state

REQUEST = "req-0123456789"
LIMITS = Limits(10_000, 1 << 30)


def make_base(folder: Path) -> None:
    folder.mkdir()
    (folder / "edit.txt").write_text("before\n")
    (folder / "gone.txt").write_text("gone\n")
    (folder / "script").write_text("#!/bin/sh\n")
    (folder / "old").mkdir()
    (folder / "old" / "deep").mkdir()
    (folder / "old" / "deep" / "f").write_text("f\n")
    (folder / "becomes-dir").write_text("file\n")
    (folder / "becomes-file").mkdir()
    (folder / "becomes-file" / "inner").write_text("inner\n")
    (folder / "link").symlink_to("edit.txt")
    (folder / "kept").mkdir()
    (folder / "kept" / "k").write_text("k\n")


def entry(content: bytes, mode=0o644) -> FileEntry:
    return FileEntry(mode, len(content), hashlib.sha256(content).hexdigest())


AFTER = {
    "edit.txt": b"after\n",
    "new/a/b.txt": b"b\n",
    "becomes-dir/x": b"x\n",
    "becomes-file": b"now a file\n",
    "kept/k": b"k2\n",
    "empty": b"",
}


def scenario(folder: Path, state: Path) -> tuple[Publisher, Changeset]:
    """A changeset with every kind of change, and a publisher that has its contents."""
    base = read_state(folder, LIMITS).entries
    blobs = BlobStore(state)
    for content in AFTER.values():
        writer = blobs.writer(REQUEST)
        writer.begin()
        writer.write(content)
        writer.end()
    after = {path: entry(content) for path, content in AFTER.items()} | {
        "script": FileEntry(0o755, base["script"].size, base["script"].sha256),
        "new": DirEntry(0o755),
        "new/a": DirEntry(0o555),
        "becomes-dir": DirEntry(0o755),
        "kept": DirEntry(0o700),
        "link": LinkEntry("kept/k"),
        "new-link": LinkEntry("/etc/passwd"),
    }
    gone = ["gone.txt", "old", "old/deep", "old/deep/f", "becomes-file/inner"]
    changes = [Change(path, base.get(path), value) for path, value in after.items()]
    changes += [Change(path, base[path], None) for path in gone]
    return Publisher(state, blobs), Changeset.of(changes)


def identity(folder: Path):
    info = folder.stat()
    return str(folder), info.st_ino


def snapshot(folder: Path):
    return read_state(folder, LIMITS).entries


def expected(base, changeset):
    final = dict(base)
    for change in changeset.changes:
        if change.after is None:
            final.pop(change.path)
        else:
            final[change.path] = change.after
    return final


@pytest.fixture
def folder(tmp_path):
    make_base(tmp_path / "ws")
    yield tmp_path / "ws"
    for path in [tmp_path / "ws", *(tmp_path / "ws").rglob("*")]:
        if path.is_dir() and not path.is_symlink():
            path.chmod(0o755)


@pytest.fixture
def state(tmp_path):
    (tmp_path / "state").mkdir(mode=0o700)
    return tmp_path / "state"


def test_every_kind_of_change_is_published(folder, state):
    publisher, changeset = scenario(folder, state)
    base = snapshot(folder)
    publisher.publish(REQUEST, *identity(folder), changeset)
    publisher.close(REQUEST)
    assert snapshot(folder) == expected(base, changeset)
    assert not list(folder.glob(".luminaguard-*"))
    assert publisher.interrupted() == []


def steps_of(tmp_path: Path) -> list[str]:
    make_base(tmp_path / "probe")
    (tmp_path / "probe-state").mkdir()
    publisher, changeset = scenario(tmp_path / "probe", tmp_path / "probe-state")
    steps: list[str] = []
    publisher.publish(REQUEST, *identity(tmp_path / "probe"), changeset, steps.append)
    for path in (tmp_path / "probe").rglob("*"):
        if path.is_dir() and not path.is_symlink():
            path.chmod(0o755)
    return steps


def test_killed_at_every_step_the_folder_is_whole_after_recovery(tmp_path):
    """A child is killed with SIGKILL before step N, for every N; then recovery runs."""
    steps = steps_of(tmp_path)
    assert len(steps) > 35
    outcomes = set()
    for number in range(len(steps)):
        folder, state = tmp_path / f"ws{number}", tmp_path / f"state{number}"
        make_base(folder)
        state.mkdir()
        publisher, changeset = scenario(folder, state)
        base = snapshot(folder)
        pid = os.fork()
        if pid == 0:
            left = number

            def step(_name):
                nonlocal left
                if left == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                left -= 1

            try:
                publisher.publish(REQUEST, *identity(folder), changeset, step)
            finally:
                os._exit(3)
        _, status = os.waitpid(pid, 0)
        assert os.WIFSIGNALED(status), (number, steps[number], status)
        journals = publisher.interrupted()
        published = False
        for journal in journals:
            _, published = publisher.recover(journal)
            publisher.recover(journal)  # recovering twice is the same as once
            publisher.close(REQUEST)
        assert snapshot(folder) == (expected(base, changeset) if published else base), (number, steps[number])
        assert not list(folder.glob(".luminaguard-*")), steps[number]
        assert publisher.interrupted() == []
        outcomes.add(published)
        for path in folder.rglob("*"):
            if path.is_dir() and not path.is_symlink():
                path.chmod(0o755)
    assert outcomes == {True, False}


def test_recovery_itself_may_be_killed(tmp_path):
    """Interrupt while applying, then kill the recovery at each of its own steps."""
    steps = steps_of(tmp_path)
    at = steps.index("journal committed")
    for number in range(3):
        folder, state = tmp_path / f"ws{number}", tmp_path / f"state{number}"
        make_base(folder)
        state.mkdir()
        publisher, changeset = scenario(folder, state)
        base = snapshot(folder)
        for kill_at, recovering in ((at, False), (number, True)):
            pid = os.fork()
            if pid == 0:
                left = kill_at

                def step(_name):
                    nonlocal left
                    if left == 0:
                        os.kill(os.getpid(), signal.SIGKILL)
                    left -= 1

                try:
                    if recovering:
                        work = publishing.Work
                        publishing.Work = lambda root, journal, _step: work(root, journal, step)
                        publisher.recover(publisher.interrupted()[0])
                    else:
                        publisher.publish(REQUEST, *identity(folder), changeset, step)
                finally:
                    os._exit(3)
            os.waitpid(pid, 0)
        for journal in publisher.interrupted():
            assert publisher.recover(journal) == (REQUEST, False)
        assert snapshot(folder) == base


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EINVAL])
def test_a_failing_step_is_undone(folder, state, code):
    base = snapshot(folder)
    total = None
    number = 0
    while total is None or number < total:
        publisher, changeset = scenario(folder, state)
        steps: list[str] = []

        def step(name, steps=steps, number=number):
            steps.append(name)
            if len(steps) == number + 1 and name not in {"clean up", "journal undone"}:
                raise OSError(code, os.strerror(code))

        try:
            publisher.publish(REQUEST, *identity(folder), changeset, step)
            break
        except PublishError:
            publisher.close(REQUEST)
        assert snapshot(folder) == base, steps[-1]
        assert not list(folder.glob(".luminaguard-*"))
        number += 1
    assert number > 35


@pytest.mark.parametrize(
    "spoil",
    [
        lambda f: (f / "edit.txt").write_text("someone else\n"),
        lambda f: (f / "gone.txt").unlink(),
        lambda f: (f / "gone.txt").chmod(0o600),
        lambda f: (f / "empty").write_text(""),
        lambda f: (f / "new").mkdir(),
        lambda f: (f / "old" / "surprise").write_text("x"),
        lambda f: ((f / "link").unlink(), (f / "link").symlink_to("gone.txt")),
        lambda f: os.mkfifo(f / "new"),
    ],
)
def test_a_changed_base_is_a_conflict_and_nothing_is_written(folder, state, spoil):
    publisher, changeset = scenario(folder, state)
    spoil(folder)
    listing = sorted(str(p) for p in folder.rglob("*"))
    content = (folder / "edit.txt").read_text()
    with pytest.raises(Conflict):
        publisher.publish(REQUEST, *identity(folder), changeset)
    assert sorted(str(p) for p in folder.rglob("*")) == listing
    assert (folder / "edit.txt").read_text() == content


@pytest.mark.parametrize("when", ["remove gone.txt", "place edit.txt", "place empty", "remove old"])
def test_a_change_in_the_last_moment_is_put_back(folder, state, when):
    """Someone writes after the check and before the rename: their version survives."""
    publisher, changeset = scenario(folder, state)

    def step(name):
        if name == when:
            target = folder / when.split()[1]
            (target / "mine" if target.is_dir() else target).write_text("mine\n")

    with pytest.raises(Conflict):
        publisher.publish(REQUEST, *identity(folder), changeset, step)
    target = folder / when.split()[1]
    assert (target / "mine" if target.is_dir() else target).read_text() == "mine\n"
    assert (folder / "edit.txt").read_text() == ("mine\n" if when == "place edit.txt" else "before\n")
    assert not list(folder.glob(".luminaguard-*"))


def test_what_someone_wrote_after_a_crash_is_never_overwritten(folder, state):
    publisher, changeset = scenario(folder, state)
    if (pid := os.fork()) == 0:

        def step(name):
            if name == "journal committed":
                os.kill(os.getpid(), signal.SIGKILL)

        try:
            publisher.publish(REQUEST, *identity(folder), changeset, step)
        finally:
            os._exit(3)
    os.waitpid(pid, 0)
    (folder / "edit.txt").write_text("the user's new text\n")
    with pytest.raises(OutcomeUnknown) as caught:
        publisher.recover(publisher.interrupted()[0])
    assert (folder / "edit.txt").read_text() == "the user's new text\n"
    assert "edit.txt" in caught.value.message
    old = [p.read_text() for p in folder.glob(".luminaguard-*/new-*") if p.is_file() and not p.is_symlink()]
    assert "before\n" in old  # the base content is still there for a person


def test_a_link_in_the_way_is_never_followed(folder, state, tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    publisher, changeset = scenario(folder, state)

    def step(name):
        if name == "place new/a/b.txt":  # swap a folder for a link between two steps
            (folder / "new" / "a").rename(folder / "new" / "moved")
            (folder / "new" / "a").symlink_to(outside)

    with pytest.raises(PublishError):
        publisher.publish(REQUEST, *identity(folder), changeset, step)
    assert list(outside.iterdir()) == []


def test_a_tampered_content_is_not_published(folder, state):
    publisher, changeset = scenario(folder, state)
    base = snapshot(folder)
    blob = state / "blobs" / REQUEST / hashlib.sha256(b"after\n").hexdigest()
    blob.write_bytes(b"EVIL!\n")
    with pytest.raises(PublishError, match="not what was approved"):
        publisher.publish(REQUEST, *identity(folder), changeset)
    assert snapshot(folder) == base


def test_another_folder_at_the_same_path_is_a_conflict(folder, state):
    publisher, changeset = scenario(folder, state)
    where = identity(folder)
    folder.rename(folder.with_name("moved"))
    make_base(folder)
    with pytest.raises(Conflict):
        publisher.publish(REQUEST, *where, changeset)


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a file system")
def test_a_crash_is_undone_after_a_reboot_that_numbers_devices_anew(state, tmp_path):
    """The same file system, mounted again from another device: what st_dev says is not who a folder is."""
    disk, mount = tmp_path / "disk", tmp_path / "mnt"
    with disk.open("wb") as file:
        file.truncate(16 << 20)
    mount.mkdir()
    subprocess.run(["/sbin/mkfs.ext4", "-q", "-F", str(disk)], check=True)
    spare = tmp_path / "spare"
    shutil.copyfile(disk, spare)

    def mounted(*, on_second_device: bool) -> None:
        if on_second_device:  # takes the first loop device, so that ours gets another one
            (tmp_path / "other").mkdir(exist_ok=True)
            subprocess.run(["mount", "-o", "loop", str(spare), str(tmp_path / "other")], check=True)
        subprocess.run(["mount", "-o", "loop", str(disk), str(mount)], check=True)

    mounted(on_second_device=False)
    try:
        folder = mount / "w"
        make_base(folder)
        base, first = snapshot(folder), folder.stat()
        publisher, changeset = scenario(folder, state)
        child = os.fork()
        if child == 0:

            def step(name: str) -> None:
                if name.startswith("place new"):
                    os.kill(os.getpid(), signal.SIGKILL)

            publisher.publish(REQUEST, *identity(folder), changeset, step)
            os._exit(0)
        os.waitpid(child, 0)
        assert snapshot(folder) != base
        subprocess.run(["umount", str(mount)], check=True)
        mounted(on_second_device=True)
        second = folder.stat()
        assert (first.st_dev, first.st_ino) != (second.st_dev, second.st_ino)
        (journal,) = publisher.interrupted()
        assert publisher.recover(journal) == (REQUEST, False)
        assert snapshot(folder) == base
        publisher.close(REQUEST)
        publisher.publish(REQUEST, str(folder), first.st_ino, changeset)
    finally:
        for path in (mount, tmp_path / "other"):
            subprocess.run(["umount", str(path)], check=False, stderr=subprocess.DEVNULL)


def test_a_disk_that_fills_while_a_publish_is_undone_is_told(folder, state):
    """The journal cannot even be written: a person must look, and nothing is lost."""
    publisher, changeset = scenario(folder, state)

    def step(name: str) -> None:
        if name.startswith("place new") or name == "journal undone":
            raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OutcomeUnknown):
        publisher.publish(REQUEST, *identity(folder), changeset, step)
    (journal,) = publisher.interrupted()
    publisher.recover(journal)


def test_a_journal_is_set_aside_for_a_person(folder, state):
    publisher, _ = scenario(folder, state)
    assert publisher.set_aside(REQUEST) is None
    (state / "journal").mkdir()
    (state / "journal" / f"{REQUEST}.json").write_text("{")
    aside = publisher.set_aside(REQUEST)
    assert aside is not None
    assert aside.read_text() == "{"
    assert publisher.interrupted() == []


def test_a_publisher_waits_for_another_one_for_a_while(state):
    publisher = Publisher(state, BlobStore(state))
    held, release = threading.Event(), threading.Event()

    def other() -> None:
        with publisher.lock("/some/folder"):
            held.set()
            release.wait(10)

    thread = threading.Thread(target=other)
    thread.start()
    assert held.wait(10)
    with pytest.raises(PublishError), publisher.lock("/some/folder", wait_s=0.2):
        pass
    threading.Timer(0.2, release.set).start()
    with publisher.lock("/some/folder", wait_s=10):
        pass
    thread.join()


def test_two_publishers_do_not_meet(state):
    publisher = Publisher(state, BlobStore(state))
    with publisher.lock("/some/folder"):
        with pytest.raises(PublishError, match="Another process"), publisher.lock("/some/folder"):
            pass
        with publisher.lock("/other/folder"):
            pass


def test_a_hard_link_to_the_outside_is_broken_not_written_through(folder, state, tmp_path):
    outside = tmp_path / "outside.txt"
    os.link(folder / "edit.txt", outside)
    publisher, changeset = scenario(folder, state)
    publisher.publish(REQUEST, *identity(folder), changeset)
    assert outside.read_text() == "before\n"
    assert (folder / "edit.txt").read_text() == "after\n"


names = st.sampled_from(["a", "b", "c", "caf\udce9", "x y"])
trees = st.dictionaries(
    st.lists(names, min_size=1, max_size=3).map("/".join),
    st.one_of(st.binary(max_size=20), st.none(), st.text("ab/.", min_size=1, max_size=5)),
    max_size=6,
)


def lay(folder: Path, tree) -> None:
    folder.mkdir()
    for path, value in sorted(tree.items()):
        target = os.fsencode(str(folder)) + b"/" + path.encode("utf-8", "surrogateescape")
        try:
            os.makedirs(os.path.dirname(target), exist_ok=True)
            if value is None:
                os.mkdir(target)
            elif isinstance(value, str):
                os.symlink(value, target)
            else:
                fd = os.open(target, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
                os.write(fd, value)
                os.close(fd)
        except OSError:
            continue


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(trees, trees, st.integers(0, 60))
def test_any_tree_becomes_any_other_or_stays(tmp_path_factory, one, two, fail_at):
    top = tmp_path_factory.mktemp("trees")
    lay(top / "one", one)
    lay(top / "two", two)
    base, goal = snapshot(top / "one"), snapshot(top / "two")
    blobs = BlobStore(top)
    for path, value in goal.items():
        if isinstance(value, FileEntry):
            writer = blobs.writer(REQUEST)
            writer.begin()
            writer.write(Path(os.fsencode(str(top / "two")).decode() + "/" + path).read_bytes())
            writer.end()
    changeset = Changeset.of(
        Change(path, base.get(path), goal.get(path)) for path in {*base, *goal} if base.get(path) != goal.get(path)
    )
    publisher, count = Publisher(top, blobs), 0

    def step(name):
        nonlocal count
        count += 1
        if count == fail_at and name not in {"clean up", "journal undone"}:
            raise OSError(errno.EIO, "broken")

    try:
        publisher.publish(REQUEST, *identity(top / "one"), changeset, step)
    except PublishError:
        assert snapshot(top / "one") == base
    else:
        assert snapshot(top / "one") == goal


@pytest.mark.skipif(os.geteuid() == 0, reason="root opens everything")
@pytest.mark.parametrize("mode", [0, 0o311, 0o111])
def test_folders_that_may_not_be_read_are_published_and_undone(tmp_path, mode):
    for fail in (False, True):
        folder, state = tmp_path / f"ws{fail}", tmp_path / f"state{fail}"
        folder.mkdir()
        state.mkdir()
        blobs = BlobStore(state)
        writer = blobs.writer(REQUEST)
        writer.begin()
        writer.write(b"x")
        writer.end()
        changeset = Changeset.of([Change("d", None, DirEntry(mode)), Change("d/x", None, entry(b"x"))])

        def step(name, fail=fail):
            if fail and name == "journal committed":
                raise OSError(errno.EIO, "broken")

        publisher = Publisher(state, blobs)
        if fail:
            with pytest.raises(PublishError, match="Publishing failed"):
                publisher.publish(REQUEST, *identity(folder), changeset, step)
            assert list(folder.iterdir()) == []
        else:
            publisher.publish(REQUEST, *identity(folder), changeset, step)
            assert (folder / "d").stat().st_mode & 0o777 == mode
            (folder / "d").chmod(0o700)
            assert (folder / "d" / "x").read_bytes() == b"x"


@pytest.mark.skipif(os.geteuid() == 0, reason="root opens everything")
def test_a_base_that_cannot_be_read_any_more_is_a_conflict(folder, state):
    publisher, changeset = scenario(folder, state)
    (folder / "edit.txt").chmod(0)
    with pytest.raises(Conflict):
        publisher.publish(REQUEST, *identity(folder), changeset)


def test_a_workspace_that_is_gone_after_a_crash_is_told_to_a_person(folder, state):
    publisher, changeset = scenario(folder, state)
    if (pid := os.fork()) == 0:

        def step(name):
            if name == "journal committed":
                os.kill(os.getpid(), signal.SIGKILL)

        try:
            publisher.publish(REQUEST, *identity(folder), changeset, step)
        finally:
            os._exit(3)
    os.waitpid(pid, 0)
    folder.rename(folder.with_name("moved away"))
    (journal,) = publisher.interrupted()
    with pytest.raises(OutcomeUnknown) as caught:
        publisher.recover(journal)
    assert "gone or was replaced" in caught.value.message
    assert journal.exists()


def test_a_changeset_whose_journal_could_not_be_read_again_is_refused_before_anything_is_written(
    folder, state, monkeypatch
):
    publisher, changeset = scenario(folder, state)
    before = snapshot(folder)
    monkeypatch.setattr("luminaguard.workspaces.journal._MAX", 1000)
    with pytest.raises(PublishError, match="too many"):
        publisher.publish(REQUEST, *identity(folder), changeset)
    assert snapshot(folder) == before
    assert publisher.interrupted() == []


def test_the_mode_of_a_file_with_other_names_is_not_published(tmp_path):
    """An approved change of one name must not change a file that lies elsewhere."""
    folder, outside = tmp_path / "w", tmp_path / "outside.conf"
    folder.mkdir()
    (folder / "in.conf").write_bytes(b"x")
    (folder / "in.conf").chmod(0o600)
    os.link(folder / "in.conf", outside)
    changes = Changeset.of([Change("in.conf", entry(b"x", 0o600), entry(b"x", 0o666))])
    publisher = Publisher(tmp_path / "state", BlobStore(tmp_path / "state"))
    with pytest.raises(PublishError, match="2 names"):
        publisher.publish("req-1", str(folder), folder.stat().st_ino, changes)
    assert outside.stat().st_mode & 0o777 == 0o600
    outside.unlink()
    publisher.publish("req-2", str(folder), folder.stat().st_ino, changes)
    assert (folder / "in.conf").stat().st_mode & 0o777 == 0o666

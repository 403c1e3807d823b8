"""A real machine whose PID 1 lies in every way that the protocol has room for: a clear refusal, nothing written."""

import json
from importlib import resources
from pathlib import Path

import pytest

from luminaguard.errors import EXIT_INTERNAL, EXIT_TIMEOUT
from luminaguard.images import initramfs
from luminaguard.images.build import ImageStore
from luminaguard.testing import Home
from luminaguard.testing.liar import LIES

FAILED = ("dies", "silent-changes")
WHAT_IT_IS = {
    **dict.fromkeys(("path-up", "path-absolute", "path-nul", "path-of-a-link", "device", "twice",
                     "child-of-nothing"), "ChangesetRefused"),
    "dies": "MachineError",
    "silent-changes": "GuestUnresponsive",
}  # fmt: skip
pytestmark = [pytest.mark.vm, pytest.mark.xdist_group("liar")]


@pytest.fixture(scope="module")
def liars(cache, tmp_path_factory) -> Home:
    """A home whose image has a liar for PID 1; packages and finished parts come from the shared cache."""
    home = Home(tmp_path_factory.mktemp("liars"))
    store = ImageStore(home.folder / "cache")
    store.folder.mkdir(parents=True)
    store.packages.symlink_to(ImageStore(cache).packages)
    honest = initramfs.supervisor_files

    def lying() -> dict[str, bytes]:
        files = {name: data for name, data in honest().items() if "supervisor.cpython" not in name}
        files["liar.py"] = (resources.files("luminaguard.testing") / "liar.py").read_bytes()
        files["supervisor.py"] += b"\nfrom luminaguard.guest.liar import Liar as Supervisor\n"
        return files

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(initramfs, "supervisor_files", lying)
        store.build(lambda _: None)
    return home


def snapshot(folder: Path) -> list[tuple[str, int, bytes]]:
    entries = sorted(folder.rglob("*"))
    return [(str(e), e.lstat().st_mode, e.read_bytes() if e.is_file() else b"") for e in entries]


def test_the_liar_is_believed_while_it_tells_the_truth(liars, workspace):
    result = liars.exec(workspace, "sh", "-c", "cat a.txt; echo more >> a.txt", flags=("--publish", "always"))
    assert result.code == 0, result
    assert (workspace / "a.txt").read_text() == "one\ntwo\nmore\n"


@pytest.mark.parametrize(
    "lie", [pytest.param(lie, marks=[pytest.mark.slow] * (lie == "silent-changes")) for lie in LIES]
)
def test_a_lie_is_refused_and_nothing_is_written(liars, workspace, lie):
    before = snapshot(workspace.parent)
    endless = lie in {"never-answers", "floods-output"}
    flags = ("--publish", "always", "--timeout", "3" if endless else "60")
    result = liars.exec(workspace, lie, flags=flags)
    assert "Traceback" not in result.err
    assert result.json["status"] == "refused", result
    if endless:
        assert result.code in {EXIT_TIMEOUT, EXIT_INTERNAL}
    else:
        assert result.json["error"]["type"] == WHAT_IT_IS.get(lie, "GuestProtocolError"), result
        assert result.json["error"]["hint"]
    assert snapshot(workspace.parent) == before
    assert not list((liars.folder / "state" / "blobs").glob("*")), "contents of a refused changeset are not kept"
    assert liars.run("vm", "list", "--json").json["vms"] == []
    assert liars.run("approvals", "list", "--json").json["requests"] == []
    last = json.loads(liars.run("ledger", "export").out.splitlines()[-1])
    assert last["kind"] == (
        "exec.finished" if result.code == EXIT_TIMEOUT else "exec.failed" if lie in FAILED else "exec.refused"
    )

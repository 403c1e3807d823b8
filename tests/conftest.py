"""Fixtures: a home for each test over one shared cache with the guest image, and a small workspace."""

import os
import pty
import select
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache as cache_once
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from luminaguard.errors import HypervisorUnavailable
from luminaguard.microvm.firecracker.probe import find_firecracker
from luminaguard.microvm.qemu.probe import probe_kvm
from luminaguard.runtime import Runtime
from luminaguard.settings import Folders, load_settings
from luminaguard.testing import Home
from luminaguard.testing.postgres import Postgres, find_postgres, running_postgres

# On a busy machine slow is no finding; what a test claims never depends on time.
settings.register_profile("luminaguard", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("luminaguard")
for number in (signal.SIGHUP, signal.SIGINT, signal.SIGQUIT):  # ignored under nohup, and then by what tests start
    signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
os.umask(0o022)  # modes in tests are those of most systems; Debian's ordinary users have 002


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests with a real Firecracker run wherever one can; where none can, that is no pass."""
    marked = [item for item in items if item.get_closest_marker("firecracker")]
    if marked and (missing := no_firecracker()):
        for item in marked:
            item.add_marker(pytest.mark.skip(reason=missing))


@cache_once
def no_firecracker() -> str:
    """Why no real Firecracker can run here; empty if one can."""
    names = (os.environ.get("LUMINAGUARD_FIRECRACKER", "firecracker"), os.environ.get("LUMINAGUARD_JAILER", "jailer"))
    try:
        find_firecracker(*names)
    except HypervisorUnavailable as error:
        return f"no Firecracker: {error.message}"
    if os.geteuid() != 0:
        return "Firecracker's jailer needs root"
    kvm = probe_kvm()
    return "" if kvm.usable else f"Firecracker is here and KVM is not ({kvm.reason}): make firecracker-lab"


@pytest.fixture(scope="session")
def cache(tmp_path_factory) -> Path:
    """The cache with the guest image; built by tools/test, or here when run by hand."""
    configured = os.environ.get("LUMINAGUARD_TEST_CACHE")
    base = Path(configured) if configured else Path.home() / ".cache" / "luminaguard-tests"
    if os.environ.get("LUMINAGUARD_TEST_PREBUILT"):
        return base / "cache"  # on a read-only disk
    home = Home(base)
    built = home.run("image", "build", timeout_s=600)
    assert built.code == 0, built.err
    folder = tmp_path_factory.mktemp("warm")
    warm = home.exec(folder, "true", timeout_s=300)  # builds the template, so that no test waits for it
    assert warm.code == 0, warm
    return base / "cache"


@pytest.fixture(scope="session")
def postgres() -> Iterator[Postgres]:
    """A real PostgreSQL, for as long as the tests of this process run; tools/test installs it."""
    if (programs := find_postgres()) is None:
        pytest.skip("PostgreSQL is not installed: apt-get install postgresql")
    with running_postgres(programs) as cluster:
        yield cluster


@pytest.fixture(params=["sqlite", "postgres"])
def place(request, tmp_path) -> Path | str:
    """Where a database is to be: a file, and once more in a real PostgreSQL."""
    return tmp_path / "db" if request.param == "sqlite" else request.getfixturevalue("postgres").create()


@pytest.fixture
def home(tmp_path, cache) -> Home:
    return Home(tmp_path / "home", cache)


class OnATerminal:
    """The program on a terminal of its own."""

    def __init__(self, home: Home, arguments: tuple[str, ...]) -> None:
        self._pid, self._fd = pty.fork()
        if self._pid == 0:
            argv = home.argv(*arguments)
            os.execvpe(argv[0], argv, home.environment | {"TERM": "xterm"})
        self.said = b""

    def until(self, wanted: bytes, timeout_s: float = 60) -> bytes:
        """What comes up to these bytes."""
        deadline = time.monotonic() + timeout_s
        start = len(self.said)
        while wanted not in self.said[start:]:
            ready, _, _ = select.select([self._fd], [], [], max(0, deadline - time.monotonic()))
            assert ready, self.said[start:]
            self.said += os.read(self._fd, 65536)
        return self.said[start:]

    def type(self, text: str) -> None:
        """Press keys."""
        os.write(self._fd, text.encode())

    def wait(self) -> int:
        """Its exit status."""
        while True:
            try:
                if not os.read(self._fd, 65536):
                    break
            except OSError:
                break
        _, status = os.waitpid(self._pid, 0)
        self._pid = 0
        return os.waitstatus_to_exitcode(status)

    def close(self) -> None:
        if self._pid:
            os.kill(self._pid, signal.SIGKILL)
            os.waitpid(self._pid, 0)
        os.close(self._fd)


@pytest.fixture
def on_a_terminal(home):
    @contextmanager
    def start(*arguments: str) -> Iterator[OnATerminal]:
        terminal = OnATerminal(home, arguments)
        try:
            yield terminal
        finally:
            terminal.close()

    return start


@pytest.fixture
def runtime(home, monkeypatch) -> Iterator[Runtime]:
    """The parts themselves, in the test's process, on the test's home."""
    monkeypatch.setenv("LUMINAGUARD_HOME", str(home.folder))
    folders = Folders.from_environment().ensure()
    made = Runtime(load_settings(folders), folders)
    yield made
    made.close()


@pytest.fixture
def bare_home(tmp_path) -> Home:
    """A home without an image, for what needs no machine."""
    return Home(tmp_path / "home")


@pytest.fixture
def workspace(tmp_path) -> Path:
    folder = tmp_path / "workspace"
    (folder / "sub").mkdir(parents=True)
    (folder / "a.txt").write_text("one\ntwo\n")
    (folder / "sub" / "b.txt").write_text("b\n")
    (folder / "run.sh").write_text("#!/bin/sh\necho ran\n")
    (folder / "run.sh").chmod(0o755)
    (folder / "link").symlink_to("a.txt")
    return folder

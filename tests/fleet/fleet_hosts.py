"""Hosts of a fleet, each with a home, a worker process and folders of its own; and one host alone."""

import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager

import anyio

from luminaguard.microvm.tracker import VMTracker
from luminaguard.runtime import Runtime
from luminaguard.runtime.tasks import LocalTasks
from luminaguard.settings import Folders, load_settings
from luminaguard.storage.hosts import Hosts
from luminaguard.tasks.model import Status, Task
from luminaguard.testing import Home

LEASE_S = 4
MINE = '[[policy.rules]]\nname = "mine"\nrisk = "GREEN"\nreason = "Mine."\nwhen = { effect = "changeset" }\n'
SCRIPT = """
turns:
  - calls:
      - write_file: {path: one.txt, content: "1"}
      - write_file: {path: two.txt, content: "2"}
  - calls:
      - publish: {}
  - calls:
      - write_file: {path: three.txt, content: "3"}
  - say: Done.
"""


class Host:
    """One host: its worker can be started, killed, frozen and cut off."""

    def __init__(self, folder, name, *, url="", played=True, cache=None, keys_of=None, prefix=(), slots=2, **variables):
        self.name, self.url, self.slots, self.prefix = name, url, slots, list(prefix)
        self.home = Home(folder, cache)
        if keys_of is not None:
            for path in (keys_of.home.folder / "state" / "keys").iterdir():
                target = self.home.folder / "state" / "keys" / path.name
                target.parent.mkdir(parents=True, mode=0o700, exist_ok=True)
                target.write_bytes(path.read_bytes())
                target.chmod(0o600)
        self.variables = {"LUMINAGUARD_SLOTS": str(slots), "LUMINAGUARD_LEASE_S": str(LEASE_S), **variables}
        if url:
            self.variables |= {"LUMINAGUARD_DATABASE_URL": url, "LUMINAGUARD_HOST": name}
        self.played = played
        self.process = None
        config = folder / "config"
        config.mkdir(mode=0o700, parents=True, exist_ok=True)
        (config / "luminaguard.toml").write_text(MINE)
        self.most = 0

    @property
    def folders(self):
        base = self.home.folder
        return Folders(base / "config", base / "state", base / "cache", base / "run").ensure()

    @contextmanager
    def runtime(self):
        """Its parts, in this process."""
        fleet = {"database_url": self.url, "host": self.name} if self.url else {}
        runtime = Runtime(load_settings(self.folders, fleet | {"lease_s": LEASE_S}), self.folders)
        try:
            yield runtime
        finally:
            runtime.close()

    def make_keys(self):
        with self.runtime() as runtime:
            runtime.approvers.owner()
            _ = runtime.ledger.current_time()

    def start(self):
        """Its worker."""
        argv = self.home.argv("worker")
        if self.played:
            argv = [sys.executable, "-W", "error", "-m", "luminaguard.testing.played_worker"]
        log = (self.home.folder / "worker.log").open("ab")
        with log:
            self.process = subprocess.Popen([*self.prefix, *argv], env=self.home.environment | self.variables,
                                            stdout=log, stderr=log, stdin=subprocess.DEVNULL)  # fmt: skip

    def send(self, number):
        self.process.send_signal(number)

    def kill(self):
        self.process.kill()
        self.process.wait(20)

    def end(self):
        """As a service manager would."""
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(signal.SIGCONT)
            self.process.terminate()
            try:
                self.process.wait(20)
            except subprocess.TimeoutExpired:
                self.kill()

    def said(self):
        path = self.home.folder / "worker.log"
        return path.read_text() if path.exists() else ""

    def at_work(self):
        """How many of its machines work for a task now."""
        found = self._machines()
        if len(found) > self.slots:
            # A look takes time, in which one may end and the next begin: what two looks saw, was there between them.
            found &= self._machines()
        self.most = max(self.most, len(found))
        return len(found)

    def _machines(self):
        running = VMTracker(self.home.folder / "run").running()
        return {one.id for one in running if one.workspace and one.alive}

    def begin(self, count, script, workspaces):
        """Tasks, each in a folder of its own on this host; their ids."""
        ids = []
        with self.runtime() as runtime:
            tasks = LocalTasks(runtime)
            for number in range(count):
                folder = workspaces / f"{self.name or 'here'}-{number}"
                folder.mkdir(parents=True)
                (folder / "a.txt").write_text("a\n")
                task = Task(tasks.new_id(), "Do it.", str(folder), f"script:{script}", runtime.ledger.current_time(),
                            home=runtime.host)  # fmt: skip
                ids.append(anyio.run(tasks.engine.create, task).id)
        return ids

    def tasks(self):
        with self.runtime() as runtime:
            found, damaged = LocalTasks(runtime).store.all(Task.from_json)
        assert not damaged
        return {task.id: task for task in found}

    def hosts(self):
        with self.runtime() as runtime:
            return {one.name: one for one in Hosts(runtime.ledger.database, "", "", LEASE_S).all()}

    def resume(self, task_id):
        """What a person does with a task that rests."""
        with self.runtime() as runtime:
            engine = LocalTasks(runtime).engine
            engine.resume(engine.get(task_id))


def until(condition, timeout_s=60, what="it"):
    """Wait; what the condition gave."""
    deadline = time.monotonic() + timeout_s
    while not (found := condition()):
        assert time.monotonic() < deadline, what
        time.sleep(0.05)
    return found


def see_through(host, ids, *, timeout_s, each=lambda: None, resume=True):
    """Wait until all tasks have ended; a person resumes what rests."""
    deadline = time.monotonic() + timeout_s
    while True:
        each()
        try:
            found = host.tasks()
        except Exception:  # noqa: BLE001  # the database may be away
            time.sleep(0.3)
            continue
        left = [one for one in ids if found[one].status is not Status.FINISHED]
        if not left:
            return found
        for one in left if resume else ():
            if found[one].status is Status.PAUSED:
                host.resume(one)
        assert time.monotonic() < deadline, [(one, found[one].status, found[one].step, found[one].why) for one in left]
        time.sleep(0.1)


def processes_of(host):
    """Machines that outlived their worker; they are given a moment."""
    deadline = time.monotonic() + 10
    while True:
        found = [one.id for one in VMTracker(host.home.folder / "run").running() if os.path.exists(f"/proc/{one.pid}")]
        if not found or time.monotonic() > deadline:
            return found
        time.sleep(0.1)

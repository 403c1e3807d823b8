"""Both queues under the same faults: what is killed, frozen, or loses its database, ends with everything done once.

With played machines the suite is quick and many faults fit into it; with real ones (slow) it counts machines, too.
"""

import json
import shutil
import signal
import sqlite3
import time
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

import pytest
from fleet_hosts import LEASE_S, see_through, until

pytestmark = pytest.mark.timeout(420)
EXPECTED = {"a.txt": "a\n", "one.txt": "1", "two.txt": "2", "three.txt": "3"}


class Surroundings:
    """The hosts, and what can happen to their database."""

    def __init__(self, hosts, stop_database, count):
        self.hosts, self.stop_database, self.count = hosts, stop_database, count


def around(kind, request, make_host, tmp_path, *, played, cache):
    if kind == "embedded":
        host = make_host(played=played, cache=cache)
        path = host.home.folder / "state" / "luminaguard.db"

        @contextmanager
        def locked():
            with sqlite3.connect(path, isolation_level=None) as other:
                other.execute("BEGIN EXCLUSIVE")
                yield
                other.execute("ROLLBACK")
            other.close()

        return Surroundings([host], locked, 12)
    cluster = request.getfixturevalue("postgres")
    url = cluster.create()
    hosts = [make_host(f"host-{number}", url=url, played=played, cache=cache) for number in range(3)]

    @contextmanager
    def stopped():
        cluster.stop()
        try:
            yield
        finally:
            cluster.start()

    return Surroundings(hosts, stopped, 40)


def check_all_was_done_once(where, ids, workspaces):
    for folder in workspaces.iterdir():
        assert {path.name: path.read_text() for path in folder.iterdir()} == EXPECTED, folder
    with where.hosts[0].runtime() as runtime:
        entries = list(runtime.ledger.entries())
        assert runtime.ledger.verify() == len(entries)
    bodies = [(entry.kind, json.loads(entry.body)) for entry in entries]
    claims = Counter(body["request"] for kind, body in bodies if kind == "request.claimed")
    assert max(claims.values()) == 1 and len(claims) >= 2 * len(ids)
    published = [body for kind, body in bodies if kind == "request.finished" and body["state"] == "published"]
    assert len(published) == 2 * len(ids)
    steps = Counter((body["task"], body["step"]) for kind, body in bodies if kind == "task.step")
    assert max(steps.values()) == 1
    assert {task for task, _ in steps} == set(ids)
    return bodies


def begin_all(where, script, workspaces):
    share, more = divmod(where.count, len(where.hosts))
    return [one for number, host in enumerate(where.hosts)
            for one in host.begin(share + (number < more), script, workspaces)]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["embedded", "fleet"])
def test_killed_frozen_and_without_a_database(kind, request, make_host, tmp_path, script):
    where = around(kind, request, make_host, tmp_path, played=True, cache=None)
    workspaces = tmp_path / "workspaces"
    ids = begin_all(where, script, workspaces)
    for host in where.hosts:
        host.start()
    first, last = where.hosts[0], where.hosts[-1]
    until(lambda: any(task.step >= 2 for task in first.tasks().values()), what="somebody works")
    first.kill()
    last.send(signal.SIGSTOP)
    time.sleep(1.5 * LEASE_S if kind == "fleet" else 2)
    first.start()
    last.send(signal.SIGCONT)
    time.sleep(1)
    with where.stop_database():
        time.sleep(3)
    see_through(first, ids, timeout_s=60)
    bodies = check_all_was_done_once(where, ids, workspaces)
    if kind == "fleet":
        hosts = first.hosts()
        assert all(host.alive for host in hosts.values())
    assert bodies


LONG = "turns:\n  - calls:\n      - shell: {command: sleep 100}\n  - say: Done.\n"


@pytest.mark.vm
@pytest.mark.parametrize(
    "how",
    ["frozen database", *(pytest.param(how, marks=pytest.mark.slow) for how in ("ended by another", "frozen itself"))],
)
def test_who_loses_its_lease_kills_its_machines(how, postgres, make_host, tmp_path, cache):
    host = make_host("a", url=postgres.create(), played=False, cache=cache)
    (tmp_path / "long.yaml").write_text(LONG)
    host.begin(1, tmp_path / "long.yaml", tmp_path / "workspaces")
    host.start()
    until(host.at_work, timeout_s=60, what="a machine runs")
    end = "UPDATE hosts SET alive = 0"
    match how:
        case "ended by another":
            postgres.sql(end, host.url.rsplit("/", 1)[1])
        case "frozen database":
            postgres.freeze()
        case "frozen itself":
            host.send(signal.SIGSTOP)
            postgres.sql(end, host.url.rsplit("/", 1)[1])
            host.send(signal.SIGCONT)
    try:
        until(lambda: not host.at_work(), timeout_s=LEASE_S, what="its machine ended")
    finally:
        if how == "frozen database":
            postgres.thaw()
    log = host.home.folder / "state" / "log" / "luminaguard.jsonl"
    until(lambda: '"lease.lost"' in log.read_text(), timeout_s=LEASE_S, what="it noticed")
    until(lambda: host.hosts()["a"].alive, what="it has a lease again")
    until(host.at_work, timeout_s=60, what="it goes on")


@pytest.mark.slow
@pytest.mark.vm
@pytest.mark.parametrize("kind", ["embedded", "fleet"])
def test_the_same_with_machines(kind, request, make_host, tmp_path, script, cache):
    """What is more here: machines that run when their worker is killed or frozen, and no more of them than slots."""
    where = around(kind, request, make_host, tmp_path, played=False, cache=cache)
    workspaces = tmp_path / "workspaces"
    ids = begin_all(where, script, workspaces)
    for host in where.hosts:
        host.start()
    first, last = where.hosts[0], where.hosts[-1]

    def look():
        for host in where.hosts:
            host.at_work()

    until(lambda: look() or first.at_work() > 0, timeout_s=120, what="a machine runs")
    first.kill()
    until(lambda: not first.at_work(), timeout_s=10, what="its machines ended with it")
    until(lambda: look() or last.at_work() > 0 or kind == "embedded", timeout_s=120, what="a machine runs")
    if kind == "fleet":
        last.send(signal.SIGSTOP)
        deadline = time.monotonic() + 2 * LEASE_S
        while time.monotonic() < deadline:
            look()
            time.sleep(0.05)
        assert not first.hosts()[last.name].alive
        last.send(signal.SIGCONT)
    first.start()
    time.sleep(2)
    with where.stop_database():
        time.sleep(3)
    see_through(first, ids, timeout_s=360, each=look)
    check_all_was_done_once(where, ids, workspaces)
    for host in where.hosts:
        assert 0 < host.most <= host.slots, host.name
        if host is not first:  # what a killed worker left goes after an hour
            assert not list((host.home.folder / "state" / "blobs").glob("vm-*"))
    shutil.rmtree(Path(workspaces))

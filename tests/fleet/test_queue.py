"""What stands around the queue, piece by piece, in a real PostgreSQL: leases, the fence, the reaper, the sweep."""

import hashlib
import json
import os
import time

import anyio
import psycopg
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from fleet_hosts import LEASE_S, Host, until

from luminaguard.approvals import Request, State, Verdict
from luminaguard.effects import Change, Changeset, FileEntry
from luminaguard.errors import (
    ApprovalError,
    BootFailed,
    DatabaseUnreachable,
    LeaseLost,
    LedgerError,
    SettingsError,
    StorageError,
    TaskError,
)
from luminaguard.runtime.decisions import Answer
from luminaguard.runtime.tasks import LocalTasks
from luminaguard.runtime.worker import Worker, slots_of
from luminaguard.storage.approvals import Approvals
from luminaguard.storage.contents import Contents
from luminaguard.storage.database import Database
from luminaguard.storage.hosts import Hosts
from luminaguard.storage.ledger import Ledger
from luminaguard.storage.postgres import conninfo, parse_url
from luminaguard.storage.queue import FINISH, REGISTER, RETRY, Jobs
from luminaguard.storage.tasks import Due
from luminaguard.tasks.model import Status, Task
from luminaguard.tasks.queues import Later
from luminaguard.tasks.queues.lease import Lease
from luminaguard.testing.bench import PlayedBench


@pytest.fixture
def url(postgres):
    return postgres.create()


@pytest.fixture
def database(url):
    made = Database.open(url)
    yield made
    made.close()


def sql(database, statement, *values):
    with database.write() as connection:
        done = connection.exec_driver_sql(statement, values or None)
        return done.all() if done.returns_rows else done.rowcount


def job_of(url, token, host="a"):
    """A worker of a host that has taken a job; as the queue does it."""
    with psycopg.connect(url, autocommit=True) as connection:
        worker = connection.execute(REGISTER.encode(), {"token": token}).fetchone()[0]
        row = connection.execute(
            b"SELECT id, attempts FROM procrastinate_fetch_job_v2(%s::varchar[], %s)",
            [["turns", "machines", f"m@{host}", f"f@{host}"], worker],
        ).fetchone()
    return {"job_id": row[0], "worker_id": worker, "attempts": row[1]}


def run_out(database, name):
    sql(database, "UPDATE hosts SET beat_ns = beat_ns - 60000000000 WHERE name = %s", name)


# -- leases -------------------------------------------------------------------------------------------------------


def test_a_name_is_taken_while_its_lease_holds_and_free_after_it(database):
    first, second = Hosts(database, "a", "1", LEASE_S), Hosts(database, "a", "2", LEASE_S)
    first.join(2)
    with pytest.raises(TaskError, match="is alive"):
        second.join(2)
    run_out(database, "a")
    second.join(2)
    assert not first.beat(0) and second.beat(1)
    with pytest.raises(LeaseLost), database.write() as connection:
        first.guard(connection)
    first.leave()  # of one that is not its own any more
    assert [(host.alive, host.busy) for host in second.all()] == [(True, 1)]
    second.leave()
    assert not second.all()[0].alive
    first.join(1)


def test_without_its_lease_a_host_writes_nothing(database, tmp_path):
    hosts = Hosts(database, "a", "1", LEASE_S)
    hosts.join(2)
    key = Ed25519PrivateKey.generate()
    ledger = Ledger(database, key, tmp_path / "head.json", lambda: 10**18)
    approvals = Approvals(database, ledger, hosts.guard, "a")
    approvals.stop_task("task-1", "before")
    run_out(database, "a")
    assert Hosts(database, "b", "2", LEASE_S).reap() == ["a"]
    with pytest.raises(LeaseLost):
        approvals.stop_task("task-2", "after")
    assert [entry.kind for entry in ledger.entries()] == ["task.stopped"]


def test_a_reaper_waits_for_what_is_being_written_under_the_lease(database, url):
    hosts = Hosts(database, "a", "1", LEASE_S)
    hosts.join(2)
    other = Database.open(url)
    with database.write() as connection:
        hosts.guard(connection)
        with other.write(alone=False) as beside:
            beside.exec_driver_sql("SET LOCAL lock_timeout = '200ms'")
            with pytest.raises(Exception, match="lock timeout"):
                beside.exec_driver_sql("UPDATE hosts SET alive = 0")
            beside.rollback()
    other.close()


@pytest.mark.parametrize("how", ["ended by another", "silent database"])
def test_a_lost_lease_is_noticed_within_half_of_it(database, url, how):
    lease_s = 2
    hosts = Hosts(database, "a", "1", lease_s)
    hosts.join(2)
    told = []
    started = time.monotonic()
    with Lease(hosts, lease_s, lambda: 0, lambda: told.append(time.monotonic() - started)) as lease:
        if how == "ended by another":
            time.sleep(lease_s)  # it is renewed meanwhile
            assert not lease.lost
            sql(database, "UPDATE hosts SET alive = 0")
            until(lambda: lease.lost, timeout_s=lease_s)
        else:
            with database.write(alone=False) as connection:  # whoever renews it waits for this
                connection.exec_driver_sql("SELECT 1 FROM hosts FOR UPDATE")
                until(lambda: lease.lost, timeout_s=lease_s)
    assert len(told) == 1


def test_a_writer_that_freezes_in_the_middle_holds_nobody_up_for_long(database, url):
    frozen = psycopg.connect(**conninfo(parse_url(url)))
    with database.write() as connection:
        lock = connection.exec_driver_sql("SELECT objid, classid FROM pg_locks WHERE locktype = 'advisory'").one()
    frozen.execute("SELECT pg_advisory_xact_lock(%s)", [(lock.classid << 32) | lock.objid])
    started = time.monotonic()
    assert sql(database, "SELECT 1")
    assert 1 < time.monotonic() - started < 20
    with pytest.raises(psycopg.Error, match="idle-in-transaction"):
        frozen.execute("SELECT 1")
    frozen.close()


# -- jobs ---------------------------------------------------------------------------------------------------------


def test_a_step_has_one_job_whoever_enqueues_it_and_none_if_it_is_taken_back(database):
    jobs = Jobs(database)
    due = Due("task-1", 3, "turn", "a")
    for _ in range(3):
        with database.write() as connection:
            jobs.enqueue(connection, due)
    assert jobs.waiting() == 1
    with pytest.raises(ZeroDivisionError), database.write() as connection:
        jobs.enqueue(connection, Due("task-1", 4, "turn", "a"))
        raise ZeroDivisionError
    assert jobs.waiting() == 1
    assert sql(database, "SELECT args::text FROM procrastinate_jobs")[0][0] == '{"task": "task-1", "number": 3}'


def test_only_who_still_has_a_job_ends_it_or_puts_it_back(database, url):
    a, b = Hosts(database, "a", "1", LEASE_S), Hosts(database, "b", "2", LEASE_S)
    a.join(2)
    b.join(2)
    with database.write() as connection:
        Jobs(database).enqueue(connection, Due("task-1", 0, "turn", "a"))
    frozen = job_of(url, "1")
    assert b.reap() == [] and sql(database, "SELECT status::text FROM procrastinate_jobs") == [("doing",)]
    run_out(database, "a")
    assert b.reap() == ["a"]
    taken = job_of(url, "2", "b")
    assert taken["job_id"] == frozen["job_id"] and taken["attempts"] == frozen["attempts"] + 1
    with psycopg.connect(url, autocommit=True) as connection:
        for statement, more in ((FINISH, {"status": "succeeded"}), (RETRY, {"retry_at": None, "queue": None})):
            assert connection.execute(statement.encode(), frozen | more).rowcount == 0
        assert connection.execute(b"SELECT status::text, worker_id FROM procrastinate_jobs").fetchone() == (
            "doing", taken["worker_id"])  # fmt: skip
        assert connection.execute(FINISH.encode(), taken | {"status": "succeeded"}).rowcount == 1
    assert sql(database, "SELECT count(*) FROM procrastinate_jobs") == [(0,)]


def test_a_dead_hosts_job_that_waits_already_is_not_there_twice(database, url):
    a, b = Hosts(database, "a", "1", LEASE_S), Hosts(database, "b", "2", LEASE_S)
    a.join(2)
    b.join(2)
    with database.write() as connection:
        Jobs(database).enqueue(connection, Due("task-1", 0, "turn", "a"))
    job_of(url, "1")
    sql(database, "INSERT INTO procrastinate_jobs (queue_name, task_name, queueing_lock) "
        "SELECT queue_name, task_name, queueing_lock FROM procrastinate_jobs")  # fmt: skip
    run_out(database, "a")
    b.reap()
    assert sql(database, "SELECT status::text FROM procrastinate_jobs") == [("todo",)]


def test_a_job_whose_end_was_lost_is_put_back(database, url):
    """Ending it failed, and its worker lives: nobody else would ever look at it."""
    hosts, jobs = Hosts(database, "a", "1", LEASE_S), Jobs(database)
    hosts.join(2)
    with database.write() as connection:
        jobs.enqueue(connection, Due("task-1", 0, "turn", "a"))
    job = job_of(url, "1")
    states = "SELECT status::text FROM procrastinate_jobs"
    assert hosts.reap() == [] and jobs.put_back("1", set()) == 0  # it may just have been taken
    sql(database, "UPDATE procrastinate_events SET at = at - interval '1 minute'")
    assert jobs.put_back("1", {job["job_id"]}) == 0 and jobs.put_back("2", set()) == 0
    assert sql(database, states) == [("doing",)]
    assert jobs.put_back("1", set()) == 1 and sql(database, states) == [("todo",)]


def test_the_sweep_adds_what_is_missing_and_moves_what_waited_for_a_near_host(database):
    jobs = Jobs(database, "gone")
    with database.write() as connection:
        jobs.enqueue(connection, Due("task-1", 1, "machine", "a"))
        jobs.enqueue(connection, Due("task-2", 1, "folder", "a"))
    queues = "SELECT queue_name FROM procrastinate_jobs ORDER BY id"
    assert jobs.sweep(60) == 0 and sql(database, queues) == [("m@gone",), ("f@a",)]
    jobs.sweep(0)
    assert sql(database, queues) == [("machines",), ("f@a",)]  # a folder is nowhere else


def test_tables_are_neither_made_nor_changed_but_by_an_upgrade(postgres):
    name = postgres.create().rsplit("/", 1)[1]
    postgres.sql("CREATE DATABASE empty_one")
    with pytest.raises(StorageError, match="has no tables") as caught:
        Database.open(postgres.url("empty_one"))
    assert "database upgrade" in caught.value.hint
    Database.upgrade(postgres.url("empty_one")).close()
    Database.upgrade(postgres.url("empty_one")).close()
    Database.open(postgres.url("empty_one")).close()
    assert postgres.sql("SELECT has_database_privilege('public', 'empty_one', 'CONNECT')") == [(False,)]
    postgres.sql("UPDATE alembic_version SET version_num = '9999'", name)
    for open_it in (Database.open, Database.upgrade):
        with pytest.raises(StorageError, match="9999"):
            open_it(postgres.url(name))
    with pytest.raises(StorageError, match="no role"):
        Database.upgrade(postgres.url("empty_one"), role="nobody-of-this-name")


def test_nobody_answers_there():
    with pytest.raises(DatabaseUnreachable) as caught:
        Database.open("postgresql://someone:secret@127.0.0.1:1/x")
    assert "secret" not in caught.value.message


# -- what hosts share ---------------------------------------------------------------------------------------------


def test_contents_come_out_as_they_went_in_or_not_at_all(database, tmp_path):
    contents = Contents(database)
    for size in (0, 1, 1 << 20, (3 << 20) + 17):
        data = os.urandom(size)
        fd = os.memfd_create("x")
        os.write(fd, data)
        contents.put("task-1", f"n{size}", fd)
        contents.put("task-1", f"n{size}", fd)
        os.close(fd)
        assert contents.fetch("task-1", f"n{size}", tmp_path / "out")
        assert (tmp_path / "out").read_bytes() == data and (tmp_path / "out").stat().st_mode & 0o777 == 0o600
        (tmp_path / "out").unlink()
    assert not contents.fetch("task-1", "other", tmp_path / "out")
    sql(database, "UPDATE contents SET data = 'x' WHERE name = 'n1'")
    with pytest.raises(StorageError, match="not what it was"):
        contents.fetch("task-1", "n1", tmp_path / "out", "0" * 64)
    assert not list(tmp_path.iterdir())
    contents.forget("task-1")
    assert not contents.has("task-1", "n0")


def test_who_collects_late_keeps_what_a_later_step_put(database):
    """A host that froze after its step must not delete what the next step of another one counts on."""
    contents = Contents(database)
    fd = os.memfd_create("x")
    for name, step in (("old", 1), ("again", 1), ("new", 2), ("again", 2)):
        contents.put("task-1", name, fd, step=step)
    contents.collect("task-1", frozenset({"base"}), 2)
    os.close(fd)
    assert [contents.has("task-1", name) for name in ("old", "again", "new")] == [False, True, True]


def test_what_lies_on_another_host_is_not_claimed_here(url, make_host):
    a, b = make_host("a", url=url), make_host("b", url=url)
    changes = Changeset.of([Change("x", None, FileEntry(0o644, 1, "a" * 64))])
    with a.runtime() as here, b.runtime() as there:
        now = here.ledger.current_time()
        request = Request("req-1", "/nowhere", 1, changes.digest, ("true",), 0, now, now + 10**12, State.PENDING)
        assert here.decisions.ask(request, changes).home == "a"
        with pytest.raises(StorageError, match="rules of a folder on another host"):
            there.decisions.decide(there.approvals.get("req-1"), Answer(Verdict.APPROVE, "test"))
        here.decisions.decide(here.approvals.get("req-1"), Answer(Verdict.APPROVE, "test"))
        with pytest.raises(ApprovalError, match="another host: a"):
            there.approvals.claim("req-1", changes.digest, there.approvers.public())
        here.approvals.claim("req-1", changes.digest, here.approvers.public())
        assert there.decisions.recover() == []  # it is not this host's to settle
        assert here.approvals.get("req-1").state is State.CLAIMED
        assert len(here.decisions.recover()) == 1


def test_the_rules_of_a_folder_hold_on_every_host(url, make_host, tmp_path):
    a, b = make_host("a", url=url), make_host("b", url=url)
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / ".luminaguard.toml").write_text(
        '[[policy.rules]]\nname = "no"\nrisk = "FORBIDDEN"\nreason = "No."\nwhen = { effect = "run", tool = "shell" }\n'
    )
    with a.runtime() as here, b.runtime() as there:
        tasks = LocalTasks(here)
        task = Task("task-1", "x", str(folder), "script:x", here.ledger.current_time(), home="a")
        anyio.run(tasks.engine.create, task)
        (folder / ".luminaguard.toml").rename(tmp_path / "gone")  # another host has another folder of that name
        assert there.policy(folder, home="a", task="task-1").digest != there.policy(folder).digest
        (tmp_path / "gone").rename(folder / ".luminaguard.toml")
        assert there.policy(folder, home="a", task="task-1").digest == here.policy(folder, home="a").digest
        with pytest.raises(StorageError):
            there.policy(folder, home="a", task="task-2")


def test_a_host_that_joins_later_says_so_and_watches_from_then_on(url, make_host, postgres):
    a, b = make_host("a", url=url), make_host("b", url=url)
    with a.runtime() as here, b.runtime() as there:
        here.ledger.append("one")
        there.ledger.append("two")
        here.ledger.append("three")
        kinds = [(entry.kind, json.loads(entry.body).get("host")) for entry in here.ledger.entries()]
        assert kinds == [("one", None), ("ledger.joined", "b"), ("two", None), ("three", None)]
        assert here.ledger.verify() == there.ledger.verify() == 4
        postgres.sql("DELETE FROM checkpoints WHERE seq = 4", url.rsplit("/", 1)[1])
        (there.data / "ledger-head.json").unlink()
        with pytest.raises(LedgerError, match="no signature of its end"):
            there.ledger.append("four")


# -- a worker that cannot ------------------------------------------------------------------------------------------


# -- rows that nobody of ours wrote, and homes that are not what they seem ---------------------------------------------


JOB = "INSERT INTO procrastinate_jobs (queue_name, task_name, args"
TASK = "INSERT INTO tasks VALUES ('task-bad', '/w', 'running', 1, 1, 1"
STRANGE = [
    f"{JOB}, scheduled_at) VALUES ('turns', 'luminaguard.step', '{{}}', '-infinity')",
    f"{JOB}) VALUES ('turns', 'luminaguard.step', '[1]')",
    f"{JOB}) VALUES ('turns', 'other', '{{\"x\": 1}}')",
    f"{JOB}) VALUES ('machines', 'luminaguard.step', '{{\"task\": 1, \"number\": \"x\"}}')",
    "UPDATE procrastinate_jobs SET args = '{}'",
    "UPDATE procrastinate_jobs SET scheduled_at = 'infinity'",
    "INSERT INTO hosts VALUES ('x', 't', 9000000000000000000, 9000000000000000000, 1, 0, 1)",
    "INSERT INTO hosts VALUES ('x', 't', -9000000000000000000, -9000000000000000000, 1, 0, 7)",
    "INSERT INTO host_workers VALUES (-5, 'x')",
    f"{TASK}, '{{', '', 'a', 'turn')",
    f"{TASK}, '{{\"turns\": Infinity}}', '', 'a', 'odd')",
    "INSERT INTO tasks SELECT 'task-bad', workspace, 'running', step, 1, 1, body, '', home, 'turn' FROM tasks LIMIT 1",
]


@pytest.mark.slow
@pytest.mark.parametrize("statement", STRANGE, ids=range(len(STRANGE)))
def test_a_strange_row_stops_nobody(statement, url, database, make_host, tmp_path, script):
    host = make_host("a", url=url)
    (one,) = host.begin(1, script, tmp_path / "workspaces")
    sql(database, statement)
    host.start()
    done = "SELECT status FROM tasks WHERE id = %s"
    until(lambda: sql(database, done, one) == [("finished",)], timeout_s=45, what=host.said())
    assert "Traceback" not in host.said()


def test_a_beat_from_the_future_is_no_life(database):
    a, b = Hosts(database, "a", "1", LEASE_S), Hosts(database, "b", "2", LEASE_S)
    a.join(1)
    sql(database, "UPDATE hosts SET beat_ns = beat_ns + 3600000000000")
    assert not b.all()[0].alive and b.reap() == ["a"]
    Hosts(database, "a", "3", LEASE_S).join(1)


def test_a_host_with_other_keys_is_refused_and_told_why(url, make_host, tmp_path):
    a = make_host("a", url=url)
    with a.runtime() as here:
        here.ledger.append("one")
    other = Host(tmp_path / "other", "b", url=url)
    with other.runtime() as there, pytest.raises(SettingsError, match="are not those of the fleet"):
        there.ledger.append("two")


def test_who_waits_for_a_person_is_no_failure(url, make_host, tmp_path, script):
    host = make_host("a", url=url)
    (host.folders.config / "luminaguard.toml").write_text("")
    (one,) = host.begin(1, script, tmp_path / "workspaces")
    host.start()
    until(lambda: host.tasks()[one].request, timeout_s=30)
    time.sleep(4)
    assert "foresee" not in host.said() and host.tasks()[one].status is Status.WAITING


def test_a_name_belongs_to_one_state_folder(url, make_host, tmp_path):
    a = make_host("a", url=url)
    with a.runtime() as here:
        here.ledger.append("one")
    other = Host(tmp_path / "other", "a", url=url, keys_of=a)
    with other.runtime() as there, pytest.raises(SettingsError, match="another state folder"):
        there.ledger.append("two")
    with a.runtime() as here:
        here.ledger.append("three")


def approved(runtime, folder):
    """A request to write a file there, approved and not published."""
    folder.mkdir()
    name, data = f"req-{folder.name}", b"x"
    changes = Changeset.of([Change("new", None, FileEntry(0o644, 1, hashlib.sha256(data).hexdigest()))])
    writer = runtime.blobs.writer(name)
    writer.begin()
    writer.write(data)
    writer.end()
    runtime.blobs.persist(name)
    now = runtime.ledger.current_time()
    request = Request(name, str(folder), folder.stat().st_ino, changes.digest, ("true",), 0, now, now + 10**12,
                      State.PENDING)  # fmt: skip
    runtime.decisions.decide(runtime.decisions.ask(request, changes), Answer(Verdict.APPROVE, "test"))


def test_what_cannot_be_published_holds_nothing_else_up(url, make_host, tmp_path):
    host = make_host("a", url=url)
    (host.folders.config / "luminaguard.toml").write_text("")
    blocked, free = tmp_path / "blocked", tmp_path / "free"
    with host.runtime() as runtime:
        for folder in (blocked, free):
            approved(runtime, folder)
        (blocked / ".luminaguard.toml").write_text("garbage")
        before = len(list(runtime.ledger.entries()))
    host.start()
    until((free / "new").exists, timeout_s=30)
    time.sleep(3)
    assert host.said().count("req-blocked: it is approved, and not published") == 1
    with host.runtime() as runtime:
        assert len(list(runtime.ledger.entries())) - before < 8
    (blocked / ".luminaguard.toml").unlink()
    until((blocked / "new").exists, timeout_s=30)


def test_what_waits_in_one_database_is_no_orphan_of_another(url, make_host):
    alone = make_host()
    with alone.runtime() as runtime:
        writer = runtime.blobs.writer("req-old")
        writer.begin()
        writer.end()
        kept = [runtime.agent_tasks.snapshots.folder / "task-old", runtime.blobs.folder / "req-old"]
        kept[0].mkdir(parents=True)
        for path in kept:
            os.utime(path, (0, 0))
    with Host(alone.home.folder, "a", url=url).runtime() as runtime:
        runtime.decisions.recover()
        runtime.agent_tasks.collect()
    assert all(path.is_dir() for path in kept)
    with alone.runtime() as runtime:
        runtime.decisions.recover()
    assert not kept[1].exists()


def test_a_damaged_copy_is_fetched_again_and_an_exchanged_one_refused(url, database, make_host, tmp_path, script):
    a, b = make_host("a", url=url), make_host("b", url=url)
    (one,) = a.begin(1, script, tmp_path / "workspaces")
    with b.runtime() as there:
        task, states = there.agent_tasks.engine.get(one), there.agent_tasks.snapshots
        PlayedBench(there, states).check_first(task)
        for name in ("base.json", "base.squashfs", "rules"):
            (states.folder / one / name).write_bytes(b"")
            PlayedBench(there, states).check_first(task)
        sql(database, "UPDATE contents SET data = %s WHERE name = 'rules'", b"[policy]\n")
        (states.folder / one / "rules").unlink()
        with pytest.raises(StorageError, match="not what it began with"):
            PlayedBench(there, states).check_first(task)


def test_nothing_at_all_is_written_without_a_lease(url, make_host, database):
    a = make_host("a", url=url)
    with a.runtime() as runtime:
        hosts = Hosts(database, "a", "1", LEASE_S)
        hosts.join(1)
        runtime.guard = hosts.guard
        runtime.ledger.append("before")
        sql(database, "UPDATE hosts SET alive = 0")
        fd = os.memfd_create("x")
        for write in (lambda: runtime.ledger.append("x"), lambda: runtime.approvals.stop_task("task-1", "x"),
                      lambda: runtime.shared.put("x", "x", fd), lambda: runtime.shared.forget("x"),
                      lambda: runtime.approvals.claim("req-1", "x", {})):  # fmt: skip
            with pytest.raises(LeaseLost):
                write()
        os.close(fd)
        assert [entry.kind for entry in runtime.ledger.entries()] == ["before"]


def test_run_beside_a_worker_of_the_same_home(make_host, tmp_path):
    host, talk = make_host(), tmp_path / "talk.yaml"
    talk.write_text("turns:\n  - say: Nothing to do.\n")
    host.start()
    until(lambda: "waiting for tasks" in host.said())
    for number in range(3):
        folder = tmp_path / f"w{number}"
        folder.mkdir()
        done = host.home.run("run", "x", "-w", str(folder), "--model", f"script:{talk}")
        assert done.code == 0 and "Nothing to do." in done.out, done.err


@pytest.mark.slow
def test_a_worker_ends_even_if_its_database_stands_still(postgres, make_host, cache):
    host = make_host("a", url=postgres.create(), played=False, cache=cache)
    host.start()
    until(lambda: "waiting for tasks" in host.said(), timeout_s=60)
    postgres.freeze()
    try:
        host.send(15)
        host.process.wait(30)
    finally:
        postgres.thaw()


class Broken(PlayedBench):
    """No machine starts here."""

    async def evaluate(self, task, call, work):
        raise BootFailed("It did not boot.", hint="Look.")


class Unforeseen(PlayedBench):
    """A fault of ours."""

    async def evaluate(self, task, call, work):
        return {}["x"]


@pytest.mark.parametrize(("bench", "told"), [(Broken, "did not boot"), (Unforeseen, "did not foresee: KeyError")])
@pytest.mark.parametrize("kind", ["embedded", "fleet"])
def test_a_step_that_fails_again_and_again_lets_its_task_rest(
    kind, bench, told, request, make_host, tmp_path, script, monkeypatch
):
    monkeypatch.setattr("luminaguard.runtime.worker._MOST_TRIES", 2)
    host = make_host("a" if kind == "fleet" else "",
                     url=request.getfixturevalue("postgres").create() if kind == "fleet" else "")  # fmt: skip
    (one,) = host.begin(1, script, tmp_path / "workspaces")

    async def work(runtime):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(Worker(runtime, bench=bench).run)
            with anyio.fail_after(40):
                while host.tasks()[one].status is Status.RUNNING:
                    await anyio.sleep(0.2)
            tasks.cancel_scope.cancel()

    with host.runtime() as runtime:
        anyio.run(work, runtime)
    task = host.tasks()[one]
    assert (task.status, task.step) == (Status.PAUSED, 2) and told in task.why


def test_without_memory_a_machine_waits_and_may_start_elsewhere(make_host, tmp_path, script, monkeypatch):
    host = make_host()
    (one,) = host.begin(1, script, tmp_path / "workspaces")
    with host.runtime() as runtime:
        worker = Worker(runtime)
        monkeypatch.setattr("luminaguard.runtime.worker._free_mib", lambda: runtime.settings.memory_mib - 1)
        with pytest.raises(Later) as caught:
            anyio.run(worker._handle, Due(one, 1, "machine", ""), 0)
        assert caught.value.elsewhere and host.tasks()[one].step == 0


@pytest.mark.parametrize(("free", "memory", "cores", "slots"), [
    (100, 256, 8, 1), (2000, 256, 8, 4), (64_000, 256, 2, 4), (64_000, 8192, 64, 7)])  # fmt: skip
def test_slots_follow_memory_and_cores(make_host, monkeypatch, free, memory, cores, slots):
    monkeypatch.setattr("luminaguard.runtime.worker._free_mib", lambda: free)
    monkeypatch.setattr("os.cpu_count", lambda: cores)
    with make_host().runtime() as runtime:
        runtime.settings = runtime.settings.model_copy(update={"memory_mib": memory, "slots": 0})
        assert slots_of(runtime) == slots
        runtime.settings = runtime.settings.model_copy(update={"slots": 3})
        assert slots_of(runtime) == 3


def test_a_database_that_anybody_may_connect_to_is_refused(postgres, make_host):
    url = postgres.create()
    postgres.sql(f"GRANT CONNECT ON DATABASE {url.rsplit('/', 1)[1]} TO PUBLIC")
    host = make_host("a", url=url)
    host.start()
    assert host.process.wait(30) != 0
    assert "Every role of its server may connect" in host.said()


def test_one_worker_has_a_state_folder(make_host, tmp_path):
    host = make_host()
    host.start()
    until(lambda: "waiting for tasks" in host.said())
    other = host.home.run("worker", LUMINAGUARD_SLOTS="1")
    assert other.code == 122 and "A worker is at work" in other.err
    host.send(15)
    host.process.wait(20)

"""Requests, decisions, claims and the ledger, in a real SQLite database."""

import dataclasses
import json
import os
import sqlite3
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest.mock import patch

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from sqlalchemy import text

from luminaguard.approvals import Decision, Request, State, Verdict, key_id, sign, verify
from luminaguard.effects import Change, Changeset, FileEntry
from luminaguard.errors import ApprovalError, LedgerError, RequestNotFound, StorageError
from luminaguard.storage.approvals import Approvals
from luminaguard.storage.database import Database
from luminaguard.storage.head import Head
from luminaguard.storage.keys import load_key
from luminaguard.storage.ledger import Ledger

CHANGES = Changeset.of([Change("a", None, FileEntry(0o644, 1, "a" * 64))])
HOUR = 3600 * 10**9


class Desk:
    """A database with its repositories and a clock that tests set."""

    def __init__(self, folder, place=None):
        self.now = 10**18
        self.folder = folder
        self.place = place or folder / "db"
        self.key = Ed25519PrivateKey.generate()
        self.keys = {key_id(self.key.public_key()): self.key.public_key()}
        self.ledger_key = Ed25519PrivateKey.generate()
        self.open()

    def open(self):
        if hasattr(self, "database"):
            self.database.close()
        self.database = Database.open(self.place)
        self.ledger = Ledger(self.database, self.ledger_key, self.folder / "head.json", lambda: self.now)
        self.approvals = Approvals(self.database, self.ledger)

    def request(self, request_id="req-1", ttl=HOUR):
        request = Request(request_id, "/w", 2, CHANGES.digest, ("true",), 0, self.now, self.now + ttl, State.PENDING)
        self.approvals.create(request, CHANGES)
        return request

    def decision(self, request, verdict=Verdict.APPROVE):
        plain = Decision(request.id, request.digest, request.workspace, verdict, "test", self.now, request.expires_ns,
                         f"nonce-{request.id}-{verdict.value}-{self.now}", "")  # fmt: skip
        return sign(plain, self.key)

    def decide(self, request, verdict=Verdict.APPROVE):
        self.approvals.decide(self.decision(request, verdict), self.keys)

    def claim(self, request, digest=None):
        return self.approvals.claim(request.id, digest or request.digest, self.keys)

    def sql(self, statement, *values):
        """Tamper with it."""
        marks = "?" if isinstance(self.place, Path) else "%s"
        with self.database.write() as connection:
            connection.exec_driver_sql(statement.replace("?", marks), values)


@pytest.fixture
def desk(tmp_path, place):
    desk = Desk(tmp_path, place)
    yield desk
    desk.database.close()


def test_an_approval_is_used_up_by_its_claim(desk):
    request = desk.request()
    desk.decide(request)
    assert desk.claim(request).state is State.CLAIMED
    with pytest.raises(ApprovalError):
        desk.claim(request)
    desk.approvals.finish(request.id, State.PUBLISHED, "")
    with pytest.raises(ApprovalError):
        desk.claim(request)
    kinds = [entry.kind for entry in desk.ledger.entries()]
    assert kinds == ["request.created", "request.decided", "request.claimed", "request.refused", "request.finished",
                     "request.refused"]  # fmt: skip
    assert desk.ledger.verify() == 6


def test_nothing_is_claimed_without_an_approval_for_exactly_it(desk):
    request = desk.request()
    with pytest.raises(ApprovalError, match="nobody has approved"):
        desk.claim(request)
    desk.decide(request)
    with pytest.raises(ApprovalError, match="not what was approved"):
        desk.claim(request, "sha256:" + "0" * 64)
    denied = desk.request("req-2")
    desk.decide(denied, Verdict.DENY)
    with pytest.raises(ApprovalError):
        desk.claim(denied)


@pytest.mark.parametrize(
    "forged",
    [{"digest": "sha256:" + "1" * 64}, {"workspace": "/other"}, {"verdict": Verdict.DENY}, {"expires_ns": 2 * 10**18},
     {"signature": bytes(64)}, {"approver": "0" * 16}, {"means": "terminal"}],
)  # fmt: skip
def test_a_decision_that_was_changed_is_refused(desk, forged):
    request = desk.request()
    with pytest.raises(ApprovalError):
        desk.approvals.decide(dataclasses.replace(desk.decision(request), **forged), desk.keys)
    assert desk.approvals.get(request.id).state is State.PENDING


def test_a_decision_by_another_key_is_refused(desk):
    request = desk.request()
    with pytest.raises(ApprovalError):
        other = Ed25519PrivateKey.generate().public_key()
        desk.approvals.decide(desk.decision(request), {key_id(other): other})


def test_a_row_edited_in_the_database_does_not_approve(desk, tmp_path):
    request = desk.request()
    desk.sql("UPDATE requests SET state = 'approved'")
    desk.sql(
        "INSERT INTO decisions (request_id, digest, workspace, verdict, means, decided_ns, expires_ns, nonce, "
        "approver, signature) VALUES (?, ?, '/w', 'approve', 'x', 1, ?, 'n', 'x', ?)",
        request.id, request.digest, request.expires_ns, b"\0",
    )  # fmt: skip
    with pytest.raises(ApprovalError, match="not validly signed"):
        desk.claim(request)


def test_a_stored_changeset_that_was_edited_is_refused(desk, tmp_path):
    desk.request()
    desk.sql("UPDATE requests SET body = replace(body, '\"a\"', '\"b\"')")
    with pytest.raises(ApprovalError, match="not what approval was asked for"):
        desk.approvals.changeset("req-1")


def test_time_ends_requests_and_setting_the_clock_back_revives_none(desk):
    request = desk.request()
    desk.decide(request)
    desk.now += 2 * HOUR
    desk.ledger.append("something")
    desk.now -= 4 * HOUR
    with pytest.raises(ApprovalError):
        desk.claim(request)
    assert desk.approvals.get(request.id).state is State.EXPIRED
    kinds = [entry.kind for entry in desk.ledger.entries()]
    assert kinds == ["request.created", "request.decided", "something", "request.expired", "request.refused"]
    assert desk.ledger.verify() == 5


def test_of_many_claims_at_once_one_wins(desk):
    request = desk.request()
    desk.decide(request)
    wins = []

    def claim():
        try:
            desk.claim(request)
            wins.append(1)
        except ApprovalError:
            pass

    threads = [threading.Thread(target=claim) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(wins) == 1


def test_unknown_requests_are_told(desk):
    with pytest.raises(RequestNotFound):
        desk.approvals.get("req-\x1b[2J")


@pytest.mark.parametrize(
    "attack",
    [
        "UPDATE ledger SET body = '{}' WHERE seq = 3",
        "UPDATE ledger SET time_ns = time_ns + 1 WHERE seq = 2",
        "DELETE FROM ledger WHERE seq = 2",
        "DELETE FROM ledger WHERE seq = (SELECT max(seq) FROM ledger)",
        "DELETE FROM ledger",
        "UPDATE ledger SET seq = 99 WHERE seq = 5",
        "UPDATE checkpoints SET signature = (SELECT signature FROM checkpoints WHERE seq = 3) WHERE seq = 4",
        "DELETE FROM ledger WHERE seq > 3; DELETE FROM checkpoints WHERE seq > 3",
    ],
)
def test_a_ledger_that_was_touched_does_not_verify(desk, tmp_path, attack):
    for number in range(5):
        desk.ledger.append("kind", number=number)
    assert desk.ledger.verify() == 5
    for statement in filter(str.strip, attack.split(";")):
        desk.sql(statement)
    with pytest.raises(LedgerError):
        desk.ledger.verify()


def test_an_older_copy_of_the_database_does_not_verify(tmp_path):
    desk = Desk(tmp_path)
    desk.ledger.append("one")
    desk.database.close()
    (tmp_path / "copy").write_bytes((tmp_path / "db").read_bytes())
    desk.open()
    desk.ledger.append("two")
    desk.database.close()
    for leftover in tmp_path.glob("db-*"):
        leftover.unlink()
    (tmp_path / "copy").replace(tmp_path / "db")
    desk.open()
    with pytest.raises(LedgerError):
        desk.ledger.verify()
    desk.database.close()


@pytest.mark.parametrize("how", ["rolled back", "rolled far back", "deleted", "another end", "no head", "garbage head"])
def test_after_a_break_nothing_is_appended_until_a_person_resumes(desk, tmp_path, how):
    """Appending to a chain that was cut off would sign the cut."""
    if how == "no head" and desk.database.shared:
        pytest.skip("a host that joins a fleet has none; see tests/fleet")
    for number in range(3):
        desk.ledger.append("one", number=number)
    head = tmp_path / "head.json"
    match how:
        case "rolled far back":
            desk.sql("DELETE FROM ledger WHERE seq > 1")
            desk.sql("DELETE FROM checkpoints WHERE seq > 1")
        case "rolled back":
            desk.sql("DELETE FROM ledger WHERE seq > 2")
            desk.sql("DELETE FROM checkpoints WHERE seq > 2")
        case "deleted":
            desk.sql("DELETE FROM ledger")
            desk.sql("DELETE FROM checkpoints")
        case "another end":
            desk.sql("UPDATE ledger SET hash = 'f' WHERE seq = 3")
        case "no head":
            head.unlink()
        case "garbage head":
            head.write_text("{")
    desk.open()
    for _ in range(2):
        with pytest.raises(LedgerError, match="ledger"):
            desk.ledger.append("hides the break")
    request = Request("req-9", "/w", 2, CHANGES.digest, ("true",), 0, desk.now, desk.now + HOUR, State.PENDING)
    with pytest.raises(LedgerError):
        desk.approvals.create(request, CHANGES)
    assert desk.ledger.resume("a restored backup").kind == "ledger.resumed"
    desk.ledger.append("goes on")
    if how != "another end":  # what was edited stays edited
        assert desk.ledger.verify() >= 2
        desk.open()
        desk.ledger.append("and on")


def test_a_chain_without_a_break_cannot_be_resumed(desk):
    desk.ledger.append("one")
    with pytest.raises(LedgerError, match="no break"):
        desk.ledger.resume("why not")


def test_a_head_that_is_behind_after_a_crash_is_no_break(desk, tmp_path):
    desk.ledger.append("one")
    old = (tmp_path / "head.json").read_bytes()
    desk.ledger.append("two")
    (tmp_path / "head.json").write_bytes(old)
    desk.ledger.append("three")
    assert desk.ledger.verify() == 3


def test_many_threads_append_at_once_and_what_one_cannot_is_its_own(desk):
    with ThreadPoolExecutor(12) as pool:
        given_ = [number if number % 7 else {1, 2} for number in range(90)]
        works = [pool.submit(desk.ledger.append, "one", number=number) for number in given_]
        failures = [work.exception(30) for work in works]
    assert [bool(failure) for failure in failures] == [number % 7 == 0 for number in range(90)]
    assert all(isinstance(failure, TypeError) for failure in failures if failure)
    assert desk.ledger.verify() == 77
    written = [json.loads(entry.body)["number"] for entry in desk.ledger.entries()]
    assert sorted(written) == [number for number in range(90) if number % 7]
    with desk.ledger.database.read() as connection:
        kept = connection.execute(text("SELECT count(*) FROM checkpoints")).scalar()
    assert kept <= 40


def at_once(desk, threads):
    """Appends that wait for each other, all written by one of them; what became of each."""
    with ThreadPoolExecutor(threads) as pool:
        with desk.ledger._turn:
            works = [pool.submit(desk.ledger.append, "one", number=number) for number in range(threads)]
            while len(desk.ledger._waiting) < threads:
                time.sleep(0.01)
        return [work.exception(30) for work in works]


def test_when_the_head_cannot_be_written_each_entry_is_there_once_and_each_is_told(desk):
    desk.ledger.append("one", number=-1)
    with patch.object(Head, "write", side_effect=StorageError("no space", hint="", kept="The entry is there.")):
        failures = at_once(desk, 5)
    assert all(isinstance(failure, StorageError) for failure in failures)
    written = [json.loads(entry.body).get("number") for entry in desk.ledger.entries() if entry.kind == "one"]
    assert sorted(written) == [-1, 0, 1, 2, 3, 4]
    assert desk.ledger.verify() == 6


def test_a_database_that_is_not_there_for_long_is_waited_for_once(desk):
    with patch.object(Database, "write", side_effect=StorageError("locked", hint="")) as write:
        failures = at_once(desk, 8)
    assert all(isinstance(failure, StorageError) for failure in failures) and write.call_count == 1


def test_a_signal_in_the_main_thread_is_nobody_elses(desk):
    with patch.object(Database, "write", side_effect=KeyboardInterrupt), pytest.raises(KeyboardInterrupt):
        desk.ledger.append("one", number=0)
    assert not desk.ledger._waiting
    assert at_once(desk, 3) == [None] * 3 and desk.ledger.verify() == 3


NO_HEADS = [b"{}", b"[]", b"null", b"\xff", b"x" * 9000, b'{"seq": 1e999, "hash": "", "signature": ""}',
            b'{"seq": 1, "hash": "", "signature": "?"}', b'{"seq": Infinity, "hash": "", "signature": ""}',
            b'{"seq": -99999999999999999999, "hash": "", "signature": ""}']  # fmt: skip


@pytest.mark.parametrize("raw", NO_HEADS)
def test_a_head_that_is_none_is_refused_in_words(desk, tmp_path, raw):
    desk.ledger.append("one")
    (tmp_path / "head.json").write_bytes(raw)
    with pytest.raises(LedgerError, match="head file"):
        desk.ledger.append("two")
    (tmp_path / "head.json").unlink()
    os.mkfifo(tmp_path / "head.json")
    with pytest.raises(LedgerError, match="head file"):
        desk.ledger.append("two")


def test_the_ledgers_clock_does_not_go_back(desk):
    """A request made by the wall clock would be expired before anyone saw it."""
    desk.now += 30 * 24 * HOUR
    desk.ledger.append("while the clock was wrong")
    desk.now -= 30 * 24 * HOUR
    assert desk.ledger.current_time() > desk.now


def test_an_approval_that_was_not_used_can_be_taken_back(desk):
    request = desk.request()
    no = desk.decision(request, Verdict.DENY)
    with pytest.raises(ApprovalError):
        desk.approvals.take_back(no, desk.keys)
    desk.decide(request)
    forged = dataclasses.replace(no, reason="I never said so")
    elsewhere = sign(dataclasses.replace(no, workspace="/other"), desk.key)
    for wrong in (forged, elsewhere, desk.decision(request)):
        with pytest.raises(ApprovalError):
            desk.approvals.take_back(wrong, desk.keys)
        assert desk.approvals.get(request.id).state is State.APPROVED
    desk.approvals.take_back(no, desk.keys)
    with pytest.raises(ApprovalError):
        desk.claim(request)
    assert desk.approvals.get(request.id).state is State.DENIED


def test_who_took_an_approval_back_can_be_verified_in_the_ledger(desk):
    request = desk.request()
    desk.decide(request)
    desk.approvals.take_back(desk.decision(request, Verdict.DENY), desk.keys)
    body = next(json.loads(entry.body) for entry in desk.ledger.entries() if entry.kind == "request.revoked")
    fields = {name: body[name] for name in Decision.__dataclass_fields__} | {
        "verdict": Verdict(body["verdict"]), "signature": bytes.fromhex(body["signature"])}  # fmt: skip
    verify(Decision(**fields), desk.keys)


def test_an_approval_ends_with_a_rule_that_forbids_what_it_is_for(desk):
    request = desk.request()
    with pytest.raises(ApprovalError):
        desk.approvals.void(request.id, "never")
    desk.decide(request)
    desk.approvals.void(request.id, "never")
    with pytest.raises(ApprovalError):
        desk.claim(request)


@pytest.mark.parametrize("column", ["command", "state", "body", "severity", "taint"])
def test_a_row_that_makes_no_sense_is_an_error_with_a_hint(desk, tmp_path, column):
    desk.request()
    desk.sql(f"UPDATE requests SET {column} = 'garbage'")
    with pytest.raises(StorageError, match="cannot be read"):
        desk.approvals.list(everything=True)
        desk.approvals.changeset("req-1")


OLD_TABLES = """
CREATE TABLE schema_version (version INTEGER NOT NULL PRIMARY KEY);
CREATE TABLE requests (id VARCHAR(32) NOT NULL PRIMARY KEY, workspace TEXT NOT NULL, inode BIGINT NOT NULL,
  digest VARCHAR(80) NOT NULL, command TEXT NOT NULL, exit_code INTEGER NOT NULL, created_ns BIGINT NOT NULL,
  expires_ns BIGINT NOT NULL, state VARCHAR(16) NOT NULL, changeset TEXT NOT NULL, outcome TEXT NOT NULL{device});
CREATE INDEX ix_requests_state ON requests (state);
CREATE TABLE decisions (request_id VARCHAR(32) NOT NULL PRIMARY KEY REFERENCES requests (id),
  digest VARCHAR(80) NOT NULL, workspace TEXT NOT NULL, verdict VARCHAR(16) NOT NULL, means TEXT NOT NULL,
  decided_ns BIGINT NOT NULL, expires_ns BIGINT NOT NULL, nonce VARCHAR(64) NOT NULL UNIQUE,
  approver VARCHAR(32) NOT NULL, signature BLOB NOT NULL);
CREATE TABLE ledger (seq INTEGER NOT NULL PRIMARY KEY, time_ns BIGINT NOT NULL, kind VARCHAR(64) NOT NULL,
  body TEXT NOT NULL, previous VARCHAR(64) NOT NULL, hash VARCHAR(64) NOT NULL);
CREATE TABLE checkpoints (seq INTEGER NOT NULL PRIMARY KEY, hash VARCHAR(64) NOT NULL, signature BLOB NOT NULL);
"""


@pytest.mark.parametrize("version", [1, 2])
def test_after_an_upgrade_what_was_approved_still_holds_once(tmp_path, version):
    desk = Desk(tmp_path)
    desk.database.close()
    for path in tmp_path.glob("db*"):
        path.unlink()
    request = Request("req-1", "/w", 2, CHANGES.digest, ("true",), 0, desk.now, desk.now + HOUR, State.APPROVED)
    decision = sign(dataclasses.replace(desk.decision(request), format=1), desk.key)
    with sqlite3.connect(tmp_path / "db") as raw:
        raw.executescript(OLD_TABLES.replace("{device}", ", device BIGINT NOT NULL DEFAULT 7" if version == 1 else ""))
        raw.execute("INSERT INTO schema_version VALUES (?)", (version,))
        row = ("req-1", "/w", 2, CHANGES.digest, '["true"]', 0, desk.now, desk.now + HOUR, "approved",
               json.dumps(CHANGES.to_json()), "")  # fmt: skip
        columns = "id, workspace, inode, digest, command, exit_code, created_ns, expires_ns, state, changeset, outcome"
        raw.execute(f"INSERT INTO requests ({columns}) VALUES (?,?,?,?,?,?,?,?,?,?,?)", row)
        raw.execute("INSERT INTO requests SELECT 'req-2', " + columns[4:].replace("state", "'pending'")
                    + (", device" if version == 1 else "") + " FROM requests")  # fmt: skip
        raw.execute("INSERT INTO decisions VALUES (?,?,?,?,?,?,?,?,?,?)", (
            "req-1", decision.digest, "/w", "approve", decision.means, decision.decided_ns, decision.expires_ns,
            decision.nonce, decision.approver, decision.signature))  # fmt: skip
    raw.close()
    desk.open()
    for name in ("req-1", "req-2"):
        desk.ledger.append("request.created", request=name, workspace="/w", digest=CHANGES.digest)
    assert [request.state for request in desk.approvals.list()] == [State.APPROVED, State.PENDING]
    desk.claim(request)
    with pytest.raises(ApprovalError):
        desk.claim(request)
    waiting = desk.approvals.get("req-2")
    desk.decide(waiting)
    desk.claim(waiting)
    desk.database.close()


def test_a_decision_of_the_old_format_cannot_carry_what_that_did_not_sign(desk):
    request = desk.request()
    old = sign(dataclasses.replace(desk.decision(request), format=1), desk.key)
    for more in ({"part": ("a",)}, {"reason": "x"}, {"policy": "sha256:x"}, {"person": "someone"}, {"format": 3}):
        with pytest.raises(ApprovalError, match="not validly signed"):
            desk.approvals.decide(dataclasses.replace(old, **more), desk.keys)


def test_a_removed_head_does_not_verify(tmp_path):
    desk = Desk(tmp_path)
    desk.ledger.append("one")
    (tmp_path / "head.json").unlink()
    with pytest.raises(LedgerError, match="missing"):
        desk.ledger.verify()
    desk.database.close()


@pytest.mark.parametrize("damage", [b"", b"garbage" * 1000])
def test_a_damaged_database_is_refused_and_kept(tmp_path, damage):
    Desk(tmp_path).database.close()
    path = tmp_path / "db"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2] if not damage else damage)
    kept = path.read_bytes()
    with pytest.raises(StorageError) as caught:
        Desk(tmp_path).request()
    assert caught.value.hint
    assert path.read_bytes() == kept


def test_a_newer_schema_is_refused(tmp_path):
    Desk(tmp_path).database.close()
    with sqlite3.connect(tmp_path / "db") as raw:
        raw.execute("UPDATE alembic_version SET version_num = '99'")
    raw.close()
    with pytest.raises(StorageError, match="99"):
        Desk(tmp_path)


def test_keys_are_private_and_refused_when_they_are_not(tmp_path):
    key = load_key(tmp_path / "keys", "approver")
    path = tmp_path / "keys" / "approver.key"
    assert path.stat().st_mode & 0o777 == 0o600
    assert load_key(tmp_path / "keys", "approver").private_bytes_raw() == key.private_bytes_raw()
    path.chmod(0o644)
    with pytest.raises(StorageError):
        load_key(tmp_path / "keys", "approver")
    path.chmod(0o600)
    path.write_bytes(b"short")
    with pytest.raises(StorageError):
        load_key(tmp_path / "keys", "approver")


class ApprovalMachine(RuleBasedStateMachine):
    """Any order of deciding, claiming, finishing and waiting: at most one claim, only after approval."""

    @initialize()
    def start(self):
        import tempfile
        from pathlib import Path

        self.temporary = tempfile.TemporaryDirectory()
        self.desk = Desk(Path(self.temporary.name))
        self.request = self.desk.request()
        self.approved = self.claims = 0

    @rule(verdict=st.sampled_from(list(Verdict)))
    def decide(self, verdict):
        try:
            self.desk.decide(self.request, verdict)
            assert self.approved == 0
            self.approved = 1 if verdict is Verdict.APPROVE else -1
        except ApprovalError:
            pass

    @rule()
    def claim(self):
        try:
            self.desk.claim(self.request)
        except ApprovalError:
            return
        self.claims += 1
        assert self.approved == 1
        assert self.desk.now < self.request.expires_ns

    @rule(state=st.sampled_from([State.PUBLISHED, State.REFUSED, State.UNKNOWN]))
    def finish(self, state):
        try:
            self.desk.approvals.finish(self.request.id, state, "")
            assert self.claims == 1
        except ApprovalError:
            pass

    @rule(hours=st.sampled_from([-3, 1, 2]))
    def wait(self, hours):
        self.desk.now += hours * HOUR // 2

    @invariant()
    def at_most_one_claim_and_a_whole_ledger(self):
        if hasattr(self, "desk"):
            assert self.claims <= 1
            self.desk.ledger.verify()

    def teardown(self):
        if hasattr(self, "desk"):
            self.desk.database.close()
            self.temporary.cleanup()


TestApprovalMachine = ApprovalMachine.TestCase
TestApprovalMachine.settings = settings(
    max_examples=15, stateful_step_count=12, deadline=None, suppress_health_check=list(HealthCheck)
)

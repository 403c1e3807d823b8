"""Approvers without a database: over TLS, with their own keys, against a service that may be attacked or may lie."""

import dataclasses
import http.client
import json
import ssl
import subprocess
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from fleet_hosts import until

from luminaguard.approvals import Decision, State, Verdict, sign
from luminaguard.approvals.signing import sign_ticket
from luminaguard.cli.remote import Service
from luminaguard.effects import Change, Changeset, FileEntry
from luminaguard.errors import ApprovalError, SettingsError
from luminaguard.service.app import build
from luminaguard.service.server import Server
from luminaguard.service.wire import decision_to_json, request_to_json
from luminaguard.testing import Home
from luminaguard.testing.certificates import make_certificates

PASS = b"a passphrase of anna\n"


class Served:
    """A host with a worker and a service, and the home of an approver who has her key alone."""

    def __init__(self, host, approver, port, authority):
        self.host, self.approver, self.port, self.authority = host, approver, port, authority
        self.url = f"https://127.0.0.1:{port}"

    def remote(self, *words, stdin=PASS):
        return self.approver.run("remote", *words, "--as", "anna", "--service", self.url, "--authority",
                                 str(self.authority), stdin=stdin)  # fmt: skip

    def ask(self, method, target, body=None, *, key=None, at_ns=None, header=None):
        context = ssl.create_default_context(cafile=self.authority)
        connection = http.client.HTTPSConnection("127.0.0.1", self.port, context=context, timeout=20)
        if header is None and key is not None:
            header = sign_ticket(method, target, at_ns or time.time_ns(), key)
        connection.request(method, target, body=body, headers={"Authorization": header} if header else {})
        response = connection.getresponse()
        data = response.read()
        connection.close()
        return response.status, data


@pytest.fixture(params=["fleet", pytest.param("alone", marks=pytest.mark.slow)])
def served(request, make_host, tmp_path):
    url = request.getfixturevalue("postgres").create() if request.param == "fleet" else ""
    host = make_host("a" if url else "", url=url)
    (host.folders.config / "luminaguard.toml").write_text("")  # everything is asked
    made = host.home.run("approvers", "add", "anna", stdin=PASS * 2, **host.variables)
    assert made.code == 0, made.err
    approver = Home(tmp_path / "approver")
    target = approver.folder / "state" / "keys" / "approvers"
    target.mkdir(parents=True, mode=0o700)
    source = host.home.folder / "state" / "keys" / "approvers" / "anna.json"
    (target / "anna.json").write_bytes(source.read_bytes())
    (target / "anna.json").chmod(0o600)
    authority, certificate, key = make_certificates(tmp_path, "127.0.0.1")
    port = 20000 + hash(str(tmp_path)) % 20000
    argv = host.home.argv("serve", "--listen", f"127.0.0.1:{port}", "--certificate", str(certificate), "--key",
                          str(key))  # fmt: skip
    with subprocess.Popen(argv, env=host.home.environment | host.variables, stderr=subprocess.PIPE) as process:
        try:
            assert b"approvers may ask at https" in process.stderr.readline()
            made = Served(host, approver, port, authority)
            until(lambda: answers(made), timeout_s=20)
            yield made
        finally:
            process.terminate()
            assert process.wait(20) == 0


def answers(served):
    try:
        return served.ask("GET", "/")[0]
    except OSError:
        return 0


def anna(served):
    with served.host.runtime() as runtime:
        return runtime.approvers.unlock("anna", PASS.decode().strip())


def asked(served, name="x"):
    """A request that waits for an answer."""
    changes = Changeset.of([Change(name, None, FileEntry(0o644, 1, "a" * 64))])
    with served.host.runtime() as runtime:
        now = runtime.ledger.current_time()
        from luminaguard.approvals import Request

        request = Request(f"req-{name}", "/nowhere", 1, changes.digest, ("true",), 0, now, now + 10**12, State.PENDING)
        return runtime.decisions.ask(request, changes)


def decision_about(request, key, **changed):
    fields = {"request_id": request.id, "digest": request.digest, "workspace": request.workspace,
              "verdict": Verdict.APPROVE, "means": "service", "decided_ns": time.time_ns(),
              "expires_ns": request.expires_ns, "nonce": f"n{time.time_ns()}", "approver": "",
              "policy": request.judged.policy, "person": "anna"}  # fmt: skip
    return sign(Decision(**fields | changed), key)


def test_an_approver_without_a_database_looks_and_answers(served, tmp_path, script):
    (one, two) = served.host.begin(2, script, tmp_path / "workspaces")
    served.host.start()
    found = until(lambda: len(waiting := served.remote("list", "--json").json["requests"]) == 2 and waiting)
    request = next(item for item in found if item["task"] == one)
    shown = served.remote("show", request["id"])
    assert shown.code == 0 and "one.txt" in shown.err and "+1" in shown.err and request["task"] in shown.err
    unseen = served.remote("approve", request["id"])
    assert unseen.code == 122 and "--digest" in unseen.err and "one.txt" in unseen.err
    wrong = served.remote("approve", request["id"], "--digest", "sha256:" + "0" * 64)
    assert wrong.code == 122 and "Nothing was signed" in wrong.err
    assert request["digest"] in shown.err
    approved = served.remote("approve", request["id"], "--digest", request["digest"])
    assert approved.code == 0, approved.err
    folder = tmp_path / "workspaces" / ("a-0" if served.host.name else "here-0")
    until((folder / "one.txt").exists)
    other = next(item for item in found if item["task"] == two)
    denied = served.remote("deny", other["id"], "--reason", "not like this")
    assert denied.code == 0 and "denied" in denied.out
    until(lambda: served.host.tasks()[one].step > 4)
    assert served.remote("approve", other["id"], "--digest", other["digest"]).code == 122
    assert served.remote("list", stdin=b"wrong\n").code == 122
    told = json.loads(served.host.home.run("approvals", "show", request["id"], "--json", **served.host.variables).out)
    assert [(one["person"], one["means"]) for one in told["decisions"]] == [("anna", "service")]


def test_who_has_no_key_here_learns_nothing(served):
    request, key = asked(served), anna(served)
    stranger = Ed25519PrivateKey.generate()
    now = time.time_ns()
    target = f"/v1/requests/{request.id}"
    assert served.ask("GET", target, key=key)[0] == 200
    headers = [None, "x", "LuminaGuard", "LuminaGuard a.b.c", "LuminaGuard " + "9" * 4000, "Bearer x",
               sign_ticket("GET", target, now, stranger), sign_ticket("GET", target, now - 61 * 10**9, key),
               sign_ticket("GET", target, now + 600 * 10**9, key), sign_ticket("POST", target, now, key),
               sign_ticket("GET", "/v1/requests", now, key), sign_ticket("GET", target + "?all=1", now, key),
               sign_ticket("GET", target, now, key).replace("LuminaGuard ", "LuminaGuard x")]  # fmt: skip
    for header in headers:
        status, data = served.ask("GET", target, header=header)
        assert status == 401 and request.id.encode() not in data and b"Traceback" not in data, header
        assert served.ask("POST", f"{target}/decisions", b"{}", header=header)[0] == 401
    for strange in ("/", "/v1", "/v1/requests/", "/v1/requests/../requests", f"{target}/contents", "/docs"):
        assert served.ask("GET", strange, key=key)[0] in {404, 401, 307}


def test_a_decision_holds_for_exactly_what_was_signed_once(served):
    request, other, key = asked(served), asked(served, "y"), anna(served)
    target = f"/v1/requests/{request.id}/decisions"

    def hand_in(decision, to=target, **changed):
        return served.ask("POST", to, json.dumps(decision_to_json(decision) | changed).encode(), key=key)[0]

    good = decision_about(request, key)
    with served.host.runtime() as runtime:
        owner = runtime.approvers.owner()
    refused = [
        decision_about(request, key, digest=other.digest), decision_about(request, key, workspace="/other"),
        decision_about(request, key, policy="sha256:other"), decision_about(request, key, expires_ns=1),
        decision_about(request, key, person="owner"), decision_about(request, key, person="rule"),
        decision_about(request, owner, person="anna"), decision_about(request, Ed25519PrivateKey.generate()),
        dataclasses.replace(good, verdict=Verdict.DENY), dataclasses.replace(good, reason="changed"),
        decision_about(request, key, part=("x", "y")),
    ]  # fmt: skip
    for decision in refused:
        assert hand_in(decision) in {403, 409}, decision
    assert hand_in(good, f"/v1/requests/{other.id}/decisions") == 403
    for strange in ({"part": "x"}, {"part": [1]}, {"verdict": "perhaps"}, {"decided_ns": "1"}, {"format": True},
                    {"signature": "zz"}, {"more": 1}, {"reason": None}):  # fmt: skip
        assert hand_in(good, **strange) == 409, strange
    for body in (b"", b"{", b"[]", b"null", b"[" * 100_000, b"\xff", b'"x"'):
        assert served.ask("POST", target, body, key=key)[0] in {400, 409}
    with pytest.raises((OSError, http.client.HTTPException)):  # it is cut off, or told so
        assert served.ask("POST", target, b"x" * (5 << 20), key=key)[0] == 413
        raise ConnectionError
    with served.host.runtime() as runtime:
        assert runtime.approvals.get(request.id).state is State.PENDING
    assert hand_in(good) in {200, 409}  # approved; its folder is nowhere, so that it cannot be published
    with served.host.runtime() as runtime:
        state = runtime.approvals.get(request.id).state
        assert len(runtime.approvals.decisions(request.id)) == 1
        assert state in {State.APPROVED, State.REFUSED}
        runtime.ledger.verify()
    assert hand_in(good) == 409
    assert hand_in(decision_about(other, key, verdict=Verdict.DENY), f"/v1/requests/{other.id}/decisions") == 200


def test_only_contents_of_the_request_are_given(served, tmp_path, script):
    (one,) = served.host.begin(1, script, tmp_path / "workspaces")
    served.host.start()
    key = anna(served)
    request = until(lambda: next((task.request for task in served.host.tasks().values() if task.request), None))
    other = asked(served)
    with served.host.runtime() as runtime:
        until(lambda: any(waiting.id == request for waiting in runtime.approvals.list()))
        entry = runtime.approvals.changeset(request).changes[0].after
    path = f"/v1/requests/{request}/contents/{entry.sha256}"
    assert served.ask("GET", path, key=key) == (200, b"1")
    for strange in (f"/v1/requests/{other.id}/contents/{entry.sha256}", f"/v1/requests/{request}/contents/{'0' * 64}",
                    f"/v1/requests/{request}/contents/..%2f..%2fkeys", "/v1/requests/nothing/contents/x"):  # fmt: skip
        assert served.ask("GET", strange, key=key)[0] == 404
    assert one


@contextmanager
def lying(answer):
    """A service that says what it likes; a fake."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            data = answer(self.path)
            self.send_response(200)
            self.end_headers()
            self.wfile.write(data)

        do_POST = do_GET  # noqa: N815  # as its library names it

        def log_message(self, *_):
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield Service(f"http://127.0.0.1:{server.server_port}", "", "anna", Ed25519PrivateKey.generate())
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def told(request, effect, **changed):
    return json.dumps({"request": request_to_json(request) | changed, "effect": effect.to_json(), "outcome": "",
                       "decisions": [], "now_ns": 1}).encode()  # fmt: skip


def test_what_a_lying_service_shows_is_not_signed():
    from luminaguard.approvals import Request

    shown = Changeset.of([Change("harmless", None, FileEntry(0o644, 1, "a" * 64))])
    meant = Changeset.of([Change("evil", None, FileEntry(0o755, 1, "b" * 64))])
    request = Request("req-1", "/w", 1, meant.digest, ("true",), 0, 1, 10**18, State.PENDING)
    lies = [told(request, shown), told(dataclasses.replace(request, id="req-2"), meant), b"", b"{}", b"[1]", b"null",
            told(request, meant, state="odd"), told(request, meant, judged=None), told(request, meant, more=1),
            told(request, meant, command=3), told(request, meant, expires_ns="x"),
            told(dataclasses.replace(request, effect="odd"), meant),
            b"[" * 100_000, told(request, meant).replace(b'"evil"', b'"../evil"')]  # fmt: skip
    for lie in lies:
        with lying(lambda _path, lie=lie: lie) as service, pytest.raises(ApprovalError):
            service.request("req-1")
    with lying(lambda path: b"other bytes" if "contents" in path else told(request, meant)) as service:
        assert service.request("req-1").effect == meant
        assert service.content("req-1", "b" * 64) is None


@pytest.mark.parametrize("url", ["http://fleet.example:80", "ftp://127.0.0.1", "x", ""])
def test_a_service_elsewhere_is_asked_by_tls_only(url):
    with pytest.raises(SettingsError):
        Service(url, "", "anna", Ed25519PrivateKey.generate())


def test_what_cannot_be_served_is_said(served, tmp_path):
    listen = f"127.0.0.1:{served.port}"
    taken = served.host.home.run("serve", "--listen", listen, **served.host.variables)
    assert taken.code == 123 and "cannot be listened at" in taken.err and "approvers may ask" not in taken.err
    files = tmp_path / "server.pem", tmp_path / "authority.pem"
    for certificate, key in (files, (files[0], files[0])):
        wrong = served.host.home.run("serve", "--listen", "127.0.0.1:1", "--certificate", str(certificate), "--key",
                                     str(key), **served.host.variables)  # fmt: skip
        assert wrong.code == 123 and "belong together" in wrong.err


@pytest.mark.parametrize("listen", ["0.0.0.0:1", "[::]:1", "10.0.0.1:1", "x", "127.0.0.1:x", "localhost:1", ":1"])
def test_others_are_not_let_listen_in(make_host, listen):
    with make_host().runtime() as runtime, pytest.raises(SettingsError):
        Server(build(runtime), listen, None, None)

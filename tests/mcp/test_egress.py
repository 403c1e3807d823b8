"""The way out of a server's machine: what a program asks for is judged, asked for, made once, and on record."""

import json
import socket
import threading
from collections import deque
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import anyio
import pytest
from pydantic import ValidationError

from luminaguard.runtime import Runtime
from luminaguard.runtime.mcp import egress
from luminaguard.runtime.mcp.egress import Egress
from luminaguard.settings import Folders, StdioServer, load_settings

RULE = """
[[policy.rules]]
name = "my-page"
risk = "GREEN"
reason = "My page."
when = {{ effect = "request", method = {methods}, host = "127.0.0.1", port = {port} }}
"""


class Program:
    """A connection of a program in the machine: what it says, and what it is told."""

    def __init__(self, *says):
        self._says = deque(says)
        self.told = b""
        self.ended = anyio.Event()

    async def receive(self):
        if self._says:
            return self._says.popleft()
        await self.ended.wait()
        return b""

    async def send(self, data):
        self.told += data

    async def end(self):
        self.ended.set()

    @property
    def status(self):
        return int(self.told.split()[1]) if self.told else 0


class Page(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):  # the library's name
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        headers = {name.lower(): value for name, value in self.headers.items()}
        self.server.seen.append((self.command, self.path, headers, body))
        self.send_response(200)
        self.send_header("Content-Length", "4")
        self.end_headers()
        self.wfile.write(b"page")

    do_POST = do_GET  # noqa: N815

    def log_message(self, *_):
        pass


@pytest.fixture
def page():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Page)
    server.seen = []
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def way(bare_home, monkeypatch, tmp_path):
    """Lets programs say things with these rules."""
    monkeypatch.setenv("LUMINAGUARD_HOME", str(bare_home.folder))
    folders = Folders.from_environment().ensure()
    made = []

    @contextmanager
    def opened(rules=""):
        (folders.config / "luminaguard.toml").write_text(
            f'{rules}\n[mcp_servers.net]\ncommand = ["x"]\nfolder = "{tmp_path}"\nnetwork = "rules"\ntimeout_s = 5\n'
        )
        runtime = Runtime(load_settings(folders), folders)
        made.append(runtime)
        server = runtime.settings.mcp_servers["net"]

        def say(*pieces, name="net", labels=frozenset(), timeout_s=5.0, kind=Program):
            program = kind(*pieces)
            way_out = Egress(runtime, name, server.model_copy(update={"timeout_s": timeout_s})).way(labels)

            async def work():
                with anyio.fail_after(30):
                    await way_out(program)

            anyio.run(work)
            return program

        yield say, runtime

    yield opened
    for runtime in made:
        runtime.close()


def get(port, path="/a", more=b""):
    return b"GET http://127.0.0.1:%d%s HTTP/1.1\r\nHost: x\r\n%s\r\n" % (port, path.encode(), more)


def green(page, *methods):
    return RULE.format(methods=json.dumps(methods or ("GET",)), port=page.server_port)


def test_what_a_rule_lets_is_made_at_once_and_on_record(way, page):
    with way(green(page)) as (say, runtime):
        for piece in range(1, 60, 7):  # however it comes
            data = get(page.server_port, "/a/b", b"Accept: text/x\r\nProxy-Connection: close\r\n")
            program = say(data[:piece], data[piece:])
            assert (program.status, program.told[-4:]) == (200, b"page")
        (_, path, headers, _), *_ = page.seen
        assert (path, headers["host"], headers["accept"]) == ("/a/b", f"127.0.0.1:{page.server_port}", "text/x")
        assert "proxy-connection" not in headers
        with runtime.approvals.reading() as connection:
            recorded = list(runtime.approvals.recorded(connection, "network.requested"))
        assert len(recorded) == len(page.seen) and recorded[0]["host"] == f"127.0.0.1:{page.server_port}"


def test_what_no_rule_lets_waits_and_is_made_once_when_it_was_approved(way, page, bare_home):
    with way() as (say, runtime):
        asked = get(page.server_port, more=b"Authorization: Bearer hunter2\r\n")
        for _ in range(2):  # it waits once, however often it comes
            told = say(asked)
            assert told.status == 403 and b"approval" in told.told and not page.seen
        (request,) = runtime.approvals.list()
        assert request.effect == "request" and request.judged.severity.name == "CRITICAL"
        assert "hunter2" not in json.dumps(runtime.approvals.effect(request.id).to_json())
        assert "kept secret, 14 characters" in bare_home.run("approvals", "show", request.id).err
        approved = bare_home.run("approvals", "approve", request.id)
        assert approved.code == 0, approved.err
        others = [get(page.server_port, "/other"), asked.replace(b"hunter2", b"hunter3"), get(page.server_port)]
        for other in others:  # none is what was approved
            assert say(other).status == 403 and not page.seen
        assert say(asked, name="evil").status == 403 and not page.seen  # nor is it of whom it was approved for
        assert say(asked).told.endswith(b"page") and len(page.seen) == 1
        assert page.seen[0][2]["authorization"] == "Bearer hunter2"
        assert runtime.approvals.get(request.id).state.value == "done"
        assert say(asked).status == 403 and len(page.seen) == 1


def test_a_body_is_part_of_what_was_approved(way, page, bare_home):
    with way() as (say, runtime):
        head = b"POST http://127.0.0.1:%d/p HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\n\r\n" % page.server_port
        assert say(head, b"abc").status == 403
        (request,) = runtime.approvals.list()
        assert bare_home.run("approvals", "approve", request.id).code == 0
        assert say(head, b"abd").status == 403 and not page.seen
        chunked = head.replace(b"Content-Length: 3", b"Transfer-Encoding: chunked")
        assert say(chunked, b"1\r\na\r\n2\r\nbc\r\n0\r\n\r\n").told.endswith(b"page")
        assert [(one[0], one[3]) for one in page.seen] == [("POST", b"abc")]


def test_a_second_request_in_the_same_breath_is_not_made(way, page):
    with way(green(page)) as (say, _):
        assert say(get(page.server_port) + get(page.server_port, "/second")).status == 200
        assert [one[1] for one in page.seen] == ["/a"]


def test_a_tunnel_is_asked_for_by_host_and_port(way, page):
    connect = b"CONNECT 127.0.0.1:%d HTTP/1.1\r\nHost: x\r\n\r\n" % page.server_port
    inside = b"GET /inside HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
    with way() as (say, runtime):
        assert say(connect, inside).status == 403 and not page.seen
        (request,) = runtime.approvals.list()
        effect = runtime.approvals.effect(request.id)
        assert (effect.method, effect.url) == ("CONNECT", f"https://127.0.0.1:{page.server_port}/")
    with way(green(page, "CONNECT")) as (say, _):
        told = say(connect, inside).told
        assert told.startswith(b"HTTP/1.1 200") and told.endswith(b"page") and page.seen[0][1] == "/inside"


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1",
        "::1",
        "10.0.0.1",
        "169.254.169.254",
        "::ffff:127.0.0.1",
        "64:ff9b::a00:1",
        "::7f00:1",
        "2002:7f00:1::",
        "fec0::1",
        "100.64.0.1",
        "0.0.0.0",
        "::",
        "64:ff9b:1::7f00:1",
        "224.0.0.1",
        "fe80::1%eth0",
        "240.0.0.1",
    ],
)
def test_a_name_that_leads_home_is_refused_however_harmless_it_looks(way, page, monkeypatch, address):
    async def found(host, port, **_):
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port))]

    monkeypatch.setattr(egress.anyio, "getaddrinfo", found)
    rule = RULE.format(methods='["GET"]', port=page.server_port).replace("127.0.0.1", "good.example")
    with way(rule) as (say, _):
        told = say(b"GET http://good.example:%d/ HTTP/1.1\r\nHost: x\r\n\r\n" % page.server_port)
        assert told.status == 403 and b"own network" in told.told and not page.seen


@pytest.mark.parametrize("said", [
    b"GET /a HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n", b"GET https://a.example/ HTTP/1.1\r\nHost: x\r\n\r\n",
    b"GET file:///etc/passwd HTTP/1.1\r\nHost: x\r\n\r\n", b"GET http://u:p@a.example/ HTTP/1.1\r\nHost: x\r\n\r\n",
    b"GET http://a.example:99999/ HTTP/1.1\r\nHost: x\r\n\r\n", b"GET http:/// HTTP/1.1\r\nHost: x\r\n\r\n",
    *(b"CONNECT %s HTTP/1.1\r\nHost: x\r\n\r\n" % target for target in (
        b"a.example", b"u@a:443", b"a.example:443/x", b"a.example:443?x", b"a.example:443#x", b"http://a.example/",
        b"a.example:0", b"a.example:99999")),
    b"GET http://good.example[2001:db8::1]/ HTTP/1.1\r\nHost: x\r\n\r\n",
    b"\x16\x03\x01\x02\x00", b"GET http://[::1 HTTP/1.1\r\nHost: x\r\n\r\n", b"hello\r\n\r\n",
    b"GET " + b"a" * (80 << 10),
])  # fmt: skip
def test_what_is_no_request_of_a_proxy_is_refused(way, said):
    with way() as (say, runtime):
        assert say(said).status in {400, 431} and runtime.approvals.list() == []


def test_a_body_that_is_too_large_is_refused(way, page):
    head = b"POST http://127.0.0.1:%d/p HTTP/1.1\r\nHost: x\r\nContent-Length: 9000000\r\n\r\n" % page.server_port
    with way(green(page, "POST")) as (say, _):
        assert say(head, *[bytes(1 << 20)] * 9).status == 413 and not page.seen


def test_what_a_rule_forbids_is_not_even_asked_for(way, page):
    rule = green(page).replace("GREEN", "FORBIDDEN")
    with way(rule) as (say, runtime):
        told = say(get(page.server_port))
        assert told.status == 403 and b"My page." in told.told and not page.seen and runtime.approvals.list() == []


def test_a_server_that_is_not_there_is_told_of(way):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    rule = RULE.format(methods='["GET"]', port=port)
    with way(rule) as (say, _):
        told = say(get(port))
        assert told.status == 403 and b"cannot be reached" in told.told


@pytest.mark.parametrize("address", ["93.184.216.34", "2606:2800:220:1::1", "64:ff9b::808:808", "::ffff:8.8.8.8"])
def test_addresses_of_everybody_are_what_they_say(address):
    assert egress._is_what_it_says("good.example", address)


@pytest.mark.parametrize("header", [b"Cookie: a", b"Authorization: b", b"X-Api-Key: c", b"X-Own: d",
                                    b"User-Agent: " + b"A" * 300])  # fmt: skip
def test_a_rule_lets_no_header_through_that_can_carry_something(way, page, header):
    with way(green(page)) as (say, _):
        assert say(get(page.server_port, more=header + b"\r\n")).status == 403 and not page.seen


def test_a_header_that_comes_twice_is_judged_twice(way, page):
    stop = ('[[policy.rules]]\nname = "stop"\nrisk = "FORBIDDEN"\nreason = "No."\n'
            'when = { effect = "request", any_argument = "*secret*" }\n')  # fmt: skip
    with way(stop + green(page)) as (say, _):
        assert say(get(page.server_port, more=b"Accept: secret\r\nAccept: ok\r\n")).status == 403 and not page.seen


def test_a_rule_for_a_path_opens_no_tunnel(way, page):
    rule = green(page).replace("port =", 'url_path = "/**", port =').replace('method = ["GET"], ', "")
    with way(rule) as (say, _):
        assert say(get(page.server_port)).status == 200
        assert say(b"CONNECT 127.0.0.1:%d HTTP/1.1\r\nHost: x\r\n\r\n" % page.server_port).status == 403


def test_what_a_machine_was_given_is_known_of_its_requests(way, page):
    stop = ('[[policy.rules]]\nname = "stop"\nrisk = "FORBIDDEN"\nreason = "It is private."\n'
            'when = { effect = "request", taint = "private" }\n')  # fmt: skip
    with way(stop + green(page)) as (say, _):
        assert say(get(page.server_port)).status == 200
        refused = say(get(page.server_port), labels=frozenset({"private"}))
        assert refused.status == 403 and b"It is private." in refused.told and len(page.seen) == 1


def test_a_program_does_not_fill_the_inbox(way):
    with way() as (say, runtime):
        asked = [get(81, f"/{number}") for number in range(23)]
        for one in asked:
            assert say(one).status == 403
        assert len(runtime.approvals.list()) == 20
        assert b"waits for" in say(asked[0]).told or b"approval" in say(asked[0]).told  # which is one of them


@pytest.fixture
def answering():
    """A server that says something and then nothing more."""
    threads, listeners = [], []

    def start(answer):
        listener = socket.create_server(("127.0.0.1", 0))

        def serve():
            with suppress(OSError):
                while True:
                    one, _ = listener.accept()
                    one.recv(1 << 16)
                    one.sendall(answer)
                    held.append(one)

        held = []
        threads.append(threading.Thread(target=serve, daemon=True))
        threads[-1].start()
        listeners.append((listener, held))
        return listener.getsockname()[1]

    yield start
    for listener, held in listeners:
        listener.shutdown(socket.SHUT_RDWR)
        for one in (listener, *held):
            one.close()
    for thread in threads:
        thread.join(5)


def test_an_answer_that_was_cut_short_is_not_completed_by_our_words(way, answering):
    port = answering(b"HTTP/1.1 200 OK\r\nContent-Length: 400\r\n\r\nhalf")
    with way(RULE.format(methods='["GET"]', port=port)) as (say, _):
        told = say(get(port), timeout_s=0.3).told
        assert told.startswith(b"HTTP/1.1 200") and b"LuminaGuard" not in told


def approved(way_out, bare_home, data, **options):
    """How the request of something that was approved ends."""
    say, runtime = way_out
    assert say(data[0]).status == 403
    (request,) = runtime.approvals.list()
    assert bare_home.run("approvals", "approve", request.id).code == 0
    told = say(*data, **options)
    return told, runtime.approvals.get(request.id).state.value, runtime.approvals.outcome(request.id)


def test_a_tunnel_that_was_used_is_done(way, answering, bare_home):
    port = answering(b"hello")
    with way() as way_out:
        data = (b"CONNECT 127.0.0.1:%d HTTP/1.1\r\nHost: x\r\n\r\n" % port, b"hi")
        told, state, _ = approved(way_out, bare_home, data, timeout_s=0.5)
        assert told.told.endswith(b"hello") and state == "done"


def test_a_tunnel_that_carries_too_much_says_so(way, answering, bare_home, monkeypatch):
    monkeypatch.setattr(egress, "_MOST_ANSWER", 3)
    port = answering(b"hello")
    with way() as way_out:
        data = (b"CONNECT 127.0.0.1:%d HTTP/1.1\r\nHost: x\r\n\r\n" % port, b"hi")
        _, state, outcome = approved(way_out, bare_home, data)
        assert state == "unknown" and "MiB came" in outcome


def test_what_did_not_connect_in_time_was_not_executed(way, bare_home, monkeypatch):
    async def black_hole(*_):
        await anyio.sleep_forever()

    monkeypatch.setattr(egress, "_connect", black_hole)
    with way() as way_out:
        _, state, outcome = approved(way_out, bare_home, (get(81),), timeout_s=0.2)
        assert state == "refused" and "does not answer" in outcome


def test_a_program_that_reads_nothing_holds_nobody_for_ever(way, page, monkeypatch):
    class Deaf(Program):
        async def send(self, _data):
            await anyio.sleep_forever()

    monkeypatch.setattr(egress, "_TELL_S", 0.2)
    with way(green(page)) as (say, _):
        say(get(page.server_port), kind=Deaf, timeout_s=0.3)
        say(b"hello\r\n\r\n", kind=Deaf)


def test_a_machines_own_loopback_is_its_own():
    assert "127.0.0.1" in egress.environment()["NO_PROXY"].split(",")
    with pytest.raises(ValidationError):
        StdioServer(command=("x",), isolation="none", network="rules")

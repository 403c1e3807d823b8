"""The client over standard input and output, in this process: a server that fails in every way is an error, in time."""

import sys
import time
from pathlib import Path

import anyio
import pytest
from hypothesis import given
from hypothesis import strategies as st

from luminaguard.errors import MaybeExecuted, McpServerFailed, NotExecuted
from luminaguard.mcp.lines import Lines
from luminaguard.mcp.pipe import Pipe
from luminaguard.runtime.mcp.host import open_on_host
from luminaguard.runtime.mcp.machine import Ended
from luminaguard.settings import StdioServer

SERVER = Path(__file__).parent.parent / "data" / "notes_server.py"


def run(work, folder, fault="", timeout_s=5.0):
    (folder / "server.py").write_bytes(SERVER.read_bytes())
    server = StdioServer(command=(sys.executable, "server.py", fault), folder=folder, timeout_s=timeout_s)

    async def within():
        with anyio.fail_after(40):
            async with open_on_host(None, "notes", server, ended := Ended()) as session:
                await work(session, ended)

    anyio.run(within)


def test_tools_are_listed_and_called(tmp_path):
    async def work(session, ended):
        assert sorted(await session.list_tools()) == ["add_note", "count"]
        assert (await session.call("add_note", {"text": "x"})).text == "1 notes"
        counted = await session.call("count", {})
        assert (counted.text, counted.structured, counted.failed) == ("1", {"count": 1}, False)
        assert not ended.is_gone()

    run(work, tmp_path)
    assert (tmp_path / "notes.txt").read_text() == "x\n"


@pytest.mark.parametrize(("fault", "said"), [("crash", "status"), ("long", "8 MiB"), ("half", "status 0"),
                                             ("senseless", "cannot be"), ("hang", "no answer")])  # fmt: skip
def test_a_fault_is_an_error_of_that_call_which_may_have_been_executed(tmp_path, fault, said):
    async def work(session, _ended):
        began = time.monotonic()
        with pytest.raises(MaybeExecuted, match=said):
            await session.call("count", {})
        assert time.monotonic() - began < 6

    run(work, tmp_path, fault, timeout_s=2.0)


def test_a_server_that_has_ended_is_known_to_be_gone(tmp_path):
    async def work(session, ended):
        with pytest.raises(MaybeExecuted):
            await session.call("count", {})
        assert ended.is_gone()
        with pytest.raises(McpServerFailed):
            await session.list_tools()

    run(work, tmp_path, "crash")


def test_what_is_no_message_is_left_out(tmp_path):
    async def work(session, _ended):
        assert (await session.call("count", {})).text == "0"

    run(work, tmp_path, "garbage")


def test_definitions_that_cannot_be_are_refused(tmp_path):
    async def work(session, _ended):
        with pytest.raises(McpServerFailed, match="bear the same name"):
            await session.list_tools()

    run(work, tmp_path, "twice")


def test_what_the_server_does_not_know_was_not_executed(tmp_path):
    async def work(session, _ended):
        with pytest.raises(NotExecuted, match="5,0"):
            await session.call("count", {"x": "y" * 5_000_000})

    run(work, tmp_path)


@pytest.mark.parametrize("command", [("/no/such/program",), ("false",)])
def test_a_server_that_does_not_begin_is_an_error(tmp_path, command):
    async def within():
        server = StdioServer(command=command, folder=tmp_path, timeout_s=2)
        with anyio.fail_after(30):
            async with open_on_host(None, "notes", server, Ended()):
                pass

    with pytest.raises(McpServerFailed):
        anyio.run(within)


SILENT = """
import json, sys
for line in sys.stdin:
    said = json.loads(line)
    answer = {"protocolVersion": "2025-11-25", "capabilities": {}, "serverInfo": {"name": "s", "version": "1"}}
    if said["method"] == "initialize":
        print(json.dumps({"jsonrpc": "2.0", "id": said["id"], "result": answer}), flush=True)
"""
SLOW = """
import time
time.sleep(3)
from mcp.server.mcpserver import MCPServer
MCPServer("slow").run()
"""


SLOW_AND_NEW = """
import json, sys, time
time.sleep(3)
for line in sys.stdin:
    said = json.loads(line)
    about = {"name": "s", "version": "1"}
    answer = {"resultType": "complete", "supportedVersions": ["2026-07-28"], "capabilities": {}, "serverInfo": about}
    if said["method"] == "server/discover":
        print(json.dumps({"jsonrpc": "2.0", "id": said["id"], "result": answer}), flush=True)
    elif "id" in said and sys.argv[-1] != "mute":
        print(json.dumps({"jsonrpc": "2.0", "id": said["id"], "error": {"code": -32601, "message": "no"}}), flush=True)
"""


@pytest.mark.parametrize(("program", "word", "era"), [
    (SILENT, "", "2025-11-25"), (SLOW, "", "2026-07-28"), (SLOW_AND_NEW, "", "2026-07-28"),
    (SLOW_AND_NEW, "mute", "2026-07-28"),
], ids=["silent", "slow", "slow and new alone", "slow, new alone and mute"])  # fmt: skip
def test_a_silent_server_costs_no_ten_seconds_and_a_slow_one_is_not_taken_for_one(tmp_path, program, word, era):
    server = StdioServer(command=(sys.executable, "-c", program, word), folder=tmp_path, timeout_s=15)

    async def within():
        began = time.monotonic()
        with anyio.fail_after(30):
            async with open_on_host(None, "notes", server, Ended()) as session:
                assert time.monotonic() - began < 8
                assert session.client.session.protocol_version == era

    anyio.run(within)


def test_nobody_listens_any_more(tmp_path):
    async def within():
        pipe = Pipe()
        pipe.close()
        await pipe.take(b'{"jsonrpc": "2.0", "id": 1, "result": {}}\n')
        assert pipe.failure is None

    anyio.run(within)


@given(st.lists(st.binary(max_size=30).map(lambda data: data.replace(b"\n", b"")), max_size=8), st.integers(1, 20))
def test_lines_come_out_as_they_went_in_however_they_are_cut(wanted, size):
    text, found = b"".join(line + b"\n" for line in wanted), []
    lines = Lines(100)
    for at in range(0, len(text), size):
        found += lines.feed(text[at : at + size])
    assert found == wanted


def test_a_line_has_its_limit():
    with pytest.raises(McpServerFailed, match="longer"):
        Lines(10).feed(b"x" * 11)

"""The QMP client against a QEMU that has been taken over: lies, floods, silence; and callers who go away."""

import json
import socket
import time

import anyio
import pytest

from luminaguard.errors import MachineError
from luminaguard.microvm.qemu import qmp as module
from luminaguard.microvm.qemu.qmp import Qmp


@pytest.fixture
def ends():
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    theirs.setblocking(False)
    with ours, theirs:
        yield Qmp(ours), theirs


async def flood(theirs: socket.socket, data: bytes) -> None:
    while True:
        await anyio.wait_writable(theirs)
        try:
            theirs.send(data)
        except OSError:
            return


async def next_request(theirs: socket.socket) -> dict:
    await anyio.wait_readable(theirs)
    return json.loads(theirs.recv(65536).splitlines()[0])


def test_a_flood_of_events_ends_and_stops_nobody_else(ends):
    qmp, theirs = ends

    async def scenario() -> None:
        others = 0

        async def other() -> None:
            nonlocal others
            while True:
                await anyio.sleep(0.001)
                others += 1

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(flood, theirs, b"{}\n" * 100)
            tasks.start_soon(other)
            with pytest.raises(MachineError, match="no answer"):
                await qmp.execute("stop")
            assert others > 3
            tasks.cancel_scope.cancel()

    start = time.monotonic()
    anyio.run(scenario)
    assert time.monotonic() - start < 30


@pytest.mark.parametrize("line", [b"[" * 100_000 + b"\n", b"nonsense\n", b"[]\n", b"x" * (2 << 20), b""])
def test_nonsense_is_an_error(ends, line, monkeypatch):
    qmp, theirs = ends
    monkeypatch.setattr(module, "ANSWER_TIMEOUT_S", 5)

    async def scenario() -> None:
        async def answer() -> None:
            await next_request(theirs)
            if not line:
                theirs.close()
                return
            view = memoryview(line)
            while view:
                await anyio.wait_writable(theirs)
                try:
                    view = view[theirs.send(view) :]
                except OSError:
                    return

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(answer)
            with pytest.raises(MachineError):
                await qmp.execute("stop")
            tasks.cancel_scope.cancel()

    anyio.run(scenario)


def test_the_answer_to_a_caller_who_went_away_is_not_the_next_ones(ends):
    qmp, theirs = ends

    async def scenario() -> None:
        with anyio.move_on_after(0.05):
            await qmp.execute("query-status")
        first = await next_request(theirs)

        async def answer() -> None:
            second = await next_request(theirs)
            late = {"id": first["id"], "return": {"status": "late"}}
            right = {"id": second["id"], "error": {"class": "GenericError", "desc": "refused"}}
            theirs.send(json.dumps(late).encode() + b"\n" + json.dumps(right).encode() + b"\n")

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(answer)
            with pytest.raises(MachineError, match="refused"):
                await qmp.execute("cont")

    anyio.run(scenario)


def test_silence_ends(ends, monkeypatch):
    qmp, _theirs = ends
    monkeypatch.setattr(module, "ANSWER_TIMEOUT_S", 0.05)
    with pytest.raises(MachineError, match="no answer within"):
        anyio.run(lambda: qmp.execute("stop"))

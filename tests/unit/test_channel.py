"""The host's end of the protocol against a guest that lies, over a real socket."""

import json
import socket
import struct

import anyio
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from luminaguard.errors import GuestProtocolError, GuestUnresponsive, MachineError
from luminaguard.guest import frames
from luminaguard.guest.frames import Frame, encode
from luminaguard.microvm.channel import CallFailed, open_channel
from luminaguard.microvm.machine import MicroVM


def converse(*answers: bytes, streams=(frames.STDOUT,), close=False):
    """Start one call, feed it these bytes, return all of stdout and the result."""

    async def talk():
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        with ours, theirs:
            async with open_channel(ours) as channel:
                call = await channel.call("exec", {}, streams)
                for answer in answers:
                    theirs.sendall(answer)
                if close:
                    theirs.shutdown(socket.SHUT_WR)
                out = b""
                if streams:
                    while data := await call.read(streams[0]):
                        out += data
                return out, await call.result(0.5)

    return anyio.run(talk)


def result(value, channel=1):
    return encode(Frame(frames.RESULT, channel, json.dumps(value).encode()))


def test_output_and_result_arrive_in_order():
    data = encode(Frame(frames.DATA, 1, b"hello", frames.STDOUT)) + encode(Frame(frames.EOF, 1, stream=frames.STDOUT))
    assert converse(data, result({"exit": 0})) == (b"hello", {"exit": 0})


def test_a_failure_has_its_code():
    with pytest.raises(CallFailed) as caught:
        converse(encode(Frame(frames.FAIL, 1, b'{"code": "not-found", "message": "x"}')))
    assert caught.value.code == "not-found"


@pytest.mark.parametrize(
    "lie",
    [
        result({"exit": 0}, channel=7),
        encode(Frame(frames.RESULT, 1, b"not json")),
        encode(Frame(frames.RESULT, 1, b"[]")),
        encode(Frame(frames.RESULT, 1, b"[" * 50_000)),
        encode(Frame(frames.SIGNAL, 1, b"\x09")),
        encode(Frame(frames.CALL, 1, b"{}")),
        encode(Frame(frames.DATA, 1, b"x", frames.STDERR)),
        encode(Frame(frames.HELLO, 0, b'{"protocol": 99}')),
        encode(Frame(frames.EOF, 1, stream=frames.STDOUT)) + encode(Frame(frames.DATA, 1, b"x", frames.STDOUT)),
        encode(Frame(frames.CREDIT, 1, struct.pack(">I", 1), frames.STDIN)),
        b"\xff" * 64,
    ],
)
def test_a_lie_ends_the_connection_with_a_protocol_error(lie):
    with pytest.raises(GuestProtocolError):
        converse(lie)


def test_more_output_than_was_granted_is_refused():
    async def talk():
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        theirs.setblocking(False)
        flood = encode(Frame(frames.DATA, 1, bytes(frames.MAX_PAYLOAD), frames.STDOUT)) * 8
        with ours, theirs:
            async with open_channel(ours) as channel, anyio.create_task_group() as tasks:
                call = await channel.call("exec", {}, (frames.STDOUT,))

                async def send():
                    view = memoryview(flood)
                    while view:
                        await anyio.wait_writable(theirs)
                        view = view[theirs.send(view) :]

                tasks.start_soon(send)
                with anyio.move_on_after(5):
                    while channel.failure is None:  # nobody reads: no credit is granted
                        await anyio.sleep(0.01)
                tasks.cancel_scope.cancel()
                assert call
                return channel.failure

    assert isinstance(anyio.run(talk), GuestProtocolError)


def test_silence_is_told_from_lies_and_from_death():
    with pytest.raises(GuestUnresponsive):
        converse(streams=())
    with pytest.raises(MachineError) as caught:
        converse(close=True)
    assert type(caught.value) is MachineError


@settings(max_examples=60, deadline=None)
@given(st.binary(max_size=600))
def test_arbitrary_bytes_never_crash_the_host(data):
    try:
        converse(data, close=True)
    except (MachineError, CallFailed):
        pass


def record(meta, content=b""):
    header = json.dumps(meta).encode() if not isinstance(meta, bytes) else meta
    return struct.pack(">I", len(header)) + header + content


def take_changes(payload: bytes, claimed):
    async def talk():
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        with ours, theirs:
            async with open_channel(ours) as channel:
                for start in range(0, len(payload), 1000):
                    theirs.sendall(encode(Frame(frames.DATA, 1, payload[start : start + 1000], frames.CHANGES)))
                theirs.sendall(encode(Frame(frames.EOF, 1, stream=frames.CHANGES)) + result({"entries": claimed}))
                entries, contents = [], []

                class Machine:
                    pid = 0

                # The call must be open before the answer to it is read.
                vm = MicroVM("vm-test", Machine(), channel, backend="none", accelerator="none")
                await vm.changes(entries.append, contents.append)
                return entries, b"".join(contents)

    return anyio.run(talk)


def test_records_and_contents_are_told_apart():
    payload = record({"p": "a", "t": "file", "m": 0o644, "s": 5}, b"hello") + record(
        {"p": "b", "t": "whiteout", "m": 0}
    )
    entries, content = take_changes(payload, 2)
    assert [e.path for e in entries] == ["a", "b"]
    assert content == b"hello"


@pytest.mark.parametrize(
    ("payload", "claimed"),
    [
        (record({"p": "a", "t": "file", "m": 0o644, "s": 5}, b"hell"), 1),
        (record({"p": "a", "t": "dir", "m": 0o755}), 2),
        (record({"p": "a", "t": "socket", "m": 0}), 1),
        (record({"p": 1, "t": "dir", "m": 0}), 1),
        (record({"p": "a", "t": "dir", "m": True}), 1),
        (record({"p": "a", "t": "dir", "m": 0o10000}), 1),
        (record({"p": "a", "t": "file", "m": 0, "s": -1}), 1),
        (record({"p": "a", "t": "file", "m": 0, "s": 1 << 70}), 1),
        (record({"p": "a", "t": ["dir"], "m": 0}), 1),
        (record(b"[" * 9000), 1),
        (struct.pack(">I", 1 << 31), 0),
        (b"\x00\x00", 0),
    ],
)
def test_malformed_records_are_refused(payload, claimed):
    with pytest.raises(GuestProtocolError):
        take_changes(payload, claimed)


def test_a_frame_whose_sender_was_cancelled_is_finished_by_the_next(monkeypatch):
    """Half a frame on the line would swallow the frames after it."""
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    theirs.setblocking(False)
    ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)

    async def scenario() -> list[frames.Frame]:
        reader, found = frames.FrameReader(), []
        async with open_channel(ours) as channel:
            with anyio.move_on_after(0.05) as scope:
                await channel.send(frames.Frame(frames.DATA, 1, b"x" * frames.MAX_PAYLOAD))
            assert scope.cancelled_caught

            async def receive() -> None:
                while len(found) < 2:
                    await anyio.wait_readable(theirs)
                    found.extend(reader.feed(theirs.recv(65536)))

            with anyio.fail_after(10):
                async with anyio.create_task_group() as tasks:
                    tasks.start_soon(receive)
                    await channel.send(frames.Frame(frames.CALL, 2, b"{}"))
        return found

    with ours, theirs:
        first, second = anyio.run(scenario)
    assert (first.kind, len(first.payload)) == (frames.DATA, frames.MAX_PAYLOAD)
    assert (second.kind, second.payload) == (frames.CALL, b"{}")

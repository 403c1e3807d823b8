"""The way out of a machine, both ends of it: the guest's sockets, and the host's answers to a guest that may lie."""

import socket
import struct
import tracemalloc
from types import SimpleNamespace

import anyio
import pytest
from hypothesis import given
from hypothesis import strategies as st

from luminaguard.errors import GuestProtocolError, MachineError
from luminaguard.guest import frames, records
from luminaguard.guest.frames import Frame
from luminaguard.guest.loop import Loop
from luminaguard.guest.records import Record, RecordError, RecordReader
from luminaguard.guest.relay import Relay
from luminaguard.microvm.channel import CallFailed
from luminaguard.microvm.relay import serving

KINDS = st.sampled_from([records.OPEN, records.END, records.CLOSE])
ALL = st.lists(st.one_of(
    st.builds(Record, st.integers(0, 2**32 - 1), KINDS),
    st.builds(Record, st.integers(0, 2**32 - 1), st.just(records.DATA), st.binary(min_size=1, max_size=200)),
    st.builds(records.ack, st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 1)),
), max_size=20)  # fmt: skip


def told(found):
    return [(one.connection, one.kind, one.payload) for one in found]


@given(ALL, st.integers(1, 50))
def test_records_are_what_they_were_however_they_are_split(sent, step):
    data = b"".join(map(records.encode, sent))
    reader, found = RecordReader(), []
    for start in range(0, len(data), step):
        found += reader.feed(data[start : start + step])
    assert told(found) == told(sent)


@given(st.binary(max_size=300))
def test_any_bytes_are_records_or_refused(data):
    try:
        found = RecordReader().feed(data)
    except RecordError:
        return
    assert sum(one.size for one in found) <= len(data)


class Line:
    """A call of the host's whose other end is played."""

    def __init__(self, grants=True):
        self._said, self._came = bytearray(), anyio.Event()
        self.sent, self._reader = [], RecordReader()
        self._grants, self._changed, self.outcome = grants, anyio.Event(), None

    def says(self, *sent):
        self.says_raw(b"".join(map(records.encode, sent)))

    def says_raw(self, data):
        self._said += data
        self._came.set()

    async def read(self, stream):
        assert stream == frames.STDOUT
        await self._came.wait()
        data, self._said, self._came = bytes(self._said), bytearray(), anyio.Event()
        return data

    async def write(self, data):
        if not self._grants:
            await anyio.sleep_forever()
        self.sent += told(self._reader.feed(data))
        self._changed.set()
        self._changed = anyio.Event()

    async def result(self, _timeout_s):
        if self.outcome is not None:
            raise self.outcome
        return {}

    async def until(self, *wanted):
        while wanted not in self.sent:
            await self._changed.wait()


def run(work):
    async def within():
        with anyio.fail_after(20):
            await work()

    anyio.run(within)


def test_each_connection_is_answered_by_itself_and_one_that_fails_ends_alone():
    async def handle(connection):
        said = await connection.receive()
        if said == b"bad":
            raise ValueError(said)
        await connection.send(said.upper() * 40_000)
        assert await connection.receive() == b""
        await connection.end()

    async def work():
        line = Line()
        async with serving(line, handle):
            line.says(Record(1, records.OPEN), Record(2, records.OPEN), Record(2, records.DATA, b"bad"))
            await line.until(2, records.CLOSE, b"")
            line.says(Record(1, records.DATA, b"x"), Record(1, records.END))
            await line.until(1, records.CLOSE, b"")
        got = [payload for number, kind, payload in line.sent if (number, kind) == (1, records.DATA)]
        assert b"".join(got) == b"X" * 40_000 and len(got) == 2

    run(work)


@pytest.mark.parametrize("sent", [
    b"\0\0\0\1\x09\0\0", b"\0\0\0\1\2\0\0", b"\0\0\0\1\5\0\0", b"\0\0\0\1\2\xff\xff", b"\0\0\0\1\1\0\1x",
    records.encode(Record(1, records.OPEN)) * 2,
    b"".join(records.encode(Record(number, records.OPEN)) for number in range(1, 100)),
], ids=["kind", "empty", "ack", "length", "payload", "twice", "many"])  # fmt: skip
def test_a_guest_that_breaks_the_form_is_found_out(sent):
    async def work():
        line = Line()
        with pytest.raises(GuestProtocolError):
            async with serving(line, lambda _: anyio.sleep_forever()):
                line.says_raw(sent)
                await anyio.sleep_forever()

    run(work)


def test_what_nobody_reads_is_bounded():
    async def work():
        line = Line()
        async with serving(line, lambda _: anyio.sleep_forever()):
            line.says(Record(1, records.OPEN))
            for _ in range(40):
                line.says(Record(1, records.DATA, bytes(records.MOST)))
            await line.until(1, records.CLOSE, b"")

    run(work)


def test_small_pieces_take_no_more_than_they_are():
    async def work():
        line = Line()
        async with serving(line, lambda _: anyio.sleep_forever()):
            line.says(Record(1, records.OPEN))
            small = [Record(1, records.DATA, b"ab")] * 7000
            tracemalloc.start()
            for _ in range(60):
                line.says(*small)
                await anyio.wait_all_tasks_blocked()
            took, _ = tracemalloc.get_traced_memory()
            tracemalloc.stop()
            assert took < 4 << 20

    run(work)


def test_a_connection_may_begin_right_after_another_has_ended():
    async def work():
        line = Line()
        async with serving(line, lambda _: anyio.sleep_forever()):
            line.says(*(Record(number, records.OPEN) for number in range(1, 65)))
            await anyio.wait_all_tasks_blocked()
            line.says(Record(1, records.CLOSE), Record(65, records.OPEN))
            await anyio.wait_all_tasks_blocked()

    run(work)


def test_a_program_that_reads_nothing_holds_up_itself_alone():
    async def handle(connection):
        if await connection.receive() == b"much":
            await connection.send(bytes(1 << 20))
        await connection.send(b"small")
        await connection.end()

    async def work():
        line = Line()
        async with serving(line, handle):
            line.says(Record(1, records.OPEN), Record(1, records.DATA, b"much"))
            await anyio.wait_all_tasks_blocked()
            sent = sum(len(payload) for _, kind, payload in line.sent if kind == records.DATA)
            assert sent == records.WINDOW
            line.says(Record(2, records.OPEN), Record(2, records.DATA, b"little"))
            await line.until(2, records.DATA, b"small")
            while (1, records.DATA, b"small") not in line.sent:  # and goes on once it reads
                line.says(records.ack(1, min(records.MOST, (1 << 20) + 5 - sent + records.WINDOW)))
                sent += records.MOST
                await anyio.wait_all_tasks_blocked()

    run(work)


@pytest.mark.parametrize("outcome", [None, CallFailed("os-error", "the port is taken")])
def test_a_machine_without_a_way_out_is_told_of(outcome):
    async def work():
        line = Line()
        line.outcome = outcome
        with pytest.raises(MachineError, match="has no way out" if outcome else "its relay ended"):
            async with serving(line, lambda _: anyio.sleep_forever()):
                line.says_raw(b"")
                await anyio.sleep_forever()

    run(work)


def test_a_guest_that_takes_nothing_holds_nobody_up():
    async def work():
        line = Line(grants=False)
        async with serving(line, lambda connection: connection.send(b"x")):
            line.says(Record(1, records.OPEN), Record(2, records.OPEN), Record(2, records.CLOSE))
            await anyio.wait_all_tasks_blocked()

    run(work)


@pytest.fixture
def guest():
    """The guest's end, on a port of this machine, and what it sends."""
    sent, loop = [], Loop()
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    relay = Relay(7, port, loop, sent.append)

    def until(wanted):
        reader, found = RecordReader(), []
        while True:
            while sent:
                frame = sent.pop(0)
                if frame.kind == frames.DATA:
                    found += told(reader.feed(frame.payload))
            if any(wanted == one for one in found):
                return found
            loop.wait()

    def host_says(*given):
        relay.on_frame(Frame(frames.DATA, 7, b"".join(map(records.encode, given)), frames.STDIN))

    yield SimpleNamespace(relay=relay, port=port, loop=loop, sent=sent, until=until, says=host_says)
    relay.end()


def test_a_program_in_the_machine_reaches_the_host_and_both_may_end_first(guest):
    with socket.create_connection(("127.0.0.1", guest.port), timeout=10) as program:
        program.sendall(b"hello")
        guest.until((1, records.DATA, b"hello"))
        guest.says(Record(1, records.DATA, b"there"), Record(1, records.END))
        guest.loop.wait()
        assert program.recv(100) == b"there" and program.recv(100) == b""
        credit = sum(frames.number(frame) for frame in guest.sent if frame.kind == frames.CREDIT)
        assert credit == Record(1, records.DATA, b"there").size + Record(1, records.END).size
        program.shutdown(socket.SHUT_WR)
        guest.until((1, records.END, b""))
    with socket.create_connection(("127.0.0.1", guest.port), timeout=10) as program:
        guest.until((2, records.OPEN, b""))
        guest.says(Record(2, records.DATA, b"last"), Record(2, records.CLOSE))
        guest.loop.wait()
        assert program.recv(100) == b"last" and program.recv(100) == b""
    assert guest.relay.open == (1,)


def test_the_guest_sends_no_more_than_was_granted(guest):
    with socket.create_connection(("127.0.0.1", guest.port), timeout=10) as program:
        program.setblocking(False)
        sent = 0
        for _ in range(200):
            try:
                sent += program.send(bytes(1 << 16))
            except BlockingIOError:
                break
        guest.until((1, records.OPEN, b""))
        size = 0
        while guest.relay.room:
            guest.loop.wait()
            size += sum(len(frame.payload) for frame in guest.sent if frame.kind == frames.DATA)
            guest.sent.clear()
        assert frames.WINDOW - 64 <= size <= frames.WINDOW
        guest.relay.on_frame(Frame(frames.CREDIT, 7, (1 << 16).to_bytes(4, "big"), frames.STDOUT))
        guest.loop.wait()
        assert any(frame.kind == frames.DATA for frame in guest.sent)


def test_there_are_only_so_many_connections_and_the_others_wait(guest):
    programs = []
    for number in range(70):
        programs.append(socket.create_connection(("127.0.0.1", guest.port), timeout=10))
        if number < 64:
            guest.loop.wait()
    try:
        assert len(guest.relay.open) == 64
        guest.says(Record(3, records.CLOSE))
        guest.until((65, records.OPEN, b""))
        assert len(guest.relay.open) == 64 and 3 not in guest.relay.open
    finally:
        for program in programs:
            program.close()


def test_connections_that_are_dropped_never_take_more_than_was_granted(guest):
    programs = []
    for _ in range(40):
        programs.append(socket.create_connection(("127.0.0.1", guest.port), timeout=10))
        guest.loop.wait()
    programs[0].setblocking(False)
    while guest.relay.room:
        try:
            programs[0].send(bytes(1 << 16))
        except BlockingIOError:
            pass
        guest.loop.wait()
    guest.says(*(Record(number, records.DATA, b"x") for number in range(2, 41)))
    for program in programs[1:]:
        program.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        program.close()
    while len(guest.relay.open) > 1:
        guest.loop.wait()
    programs[0].close()
    assert sum(len(frame.payload) for frame in guest.sent if frame.kind == frames.DATA) <= frames.WINDOW

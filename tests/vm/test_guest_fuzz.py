"""The guest's end of the protocol under senseless calls, in a real machine: each is answered, none ends PID 1."""

import json
import os
import socket
import struct

import anyio
import anyio.to_thread
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from luminaguard.guest import frames
from luminaguard.guest.frames import Frame, FrameReader, encode
from luminaguard.microvm.pool import PoolLimits
from luminaguard.runtime import Runtime
from luminaguard.settings import Folders, load_settings
from luminaguard.workspaces.pack import WorkspaceImages
from luminaguard.workspaces.state import Limits, read_state

pytestmark = pytest.mark.vm
EXAMPLES = int(os.environ.get("LUMINAGUARD_TEST_FUZZ", "150"))

JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
LIMITS = {"pids": 16, "nofile": 64, "fsize": 1 << 20}
GOOD = {
    "wake": {"time_ns": 1_700_000_000 * 10**9, "entropy": "AAAA", "hostname": "vm-x", "machine_id": "0" * 32,
             "uid": 123456, "workspace": True, "layer": False, "packages": False, "upper_size": "8m",
             "randomize": True},
    "rest": {},
    "exec": {"argv": ["true"], "cwd": "/", "env": {"PATH": "/usr/bin"}, "tty": None, "limits": LIMITS,
             "profile": "default"},
    "changes": {},
    "inspect": {"settings": ["kernel/sysrq"]},
}  # fmt: skip


@st.composite
def spoilt(draw) -> bytes:
    """A call that is right but for one value, or one key, anywhere in its parameters."""
    method = draw(st.sampled_from(sorted(GOOD)))
    call = json.loads(json.dumps({"method": method, "params": GOOD[method]}))
    place, target = call, draw(st.sampled_from(["method", "params", "deeper"]))
    if target == "deeper":
        place = call["params"]
        if place and isinstance(place.get("limits"), dict) and draw(st.booleans()):
            place = place["limits"]
        target = draw(st.sampled_from(sorted(place))) if place else "extra"
    if draw(st.booleans()):
        place.pop(target, None)
    else:
        place[target] = draw(JSON | st.dictionaries(st.sampled_from(["rows", "columns"]), JSON))
    return json.dumps(call).encode()


def calls():
    deep = st.integers(1, 30_000).map(lambda n: b"[" * n)
    return st.one_of(spoilt(), spoilt(), st.binary(max_size=300), deep, JSON.map(lambda v: json.dumps(v).encode()))


class Host:
    """The host's end, with no manners: what it sends is not checked."""

    def __init__(self, connection: socket.socket, number: int) -> None:
        self._socket = connection
        self._reader = FrameReader()
        self._frames: list[Frame] = []
        self.number = number

    def call(self, payload: bytes, between: list[Frame]) -> tuple[int, dict]:
        """Make a call, send other frames after it, end its input; return the kind and content of its answer."""
        number, self.number = self.number, self.number + 1
        self._socket.sendall(encode(Frame(frames.CALL, number, payload)))
        for frame in between:
            frame.channel = number
            self._socket.sendall(encode(frame))
        self._socket.sendall(encode(Frame(frames.EOF, number, stream=frames.STDIN)))
        credit = struct.pack(">I", frames.WINDOW)
        self._socket.sendall(encode(Frame(frames.CREDIT, number, credit, frames.CHANGES)))
        while True:
            while not self._frames:
                data = self._socket.recv(1 << 16)
                assert data, "PID 1 has ended"
                self._frames = self._reader.feed(data)
            frame = self._frames.pop(0)
            assert frame.channel == number, frame
            if frame.kind in {frames.RESULT, frames.FAIL}:
                return frame.kind, json.loads(frame.payload)


BETWEEN = st.lists(
    st.one_of(
        st.builds(lambda data: Frame(frames.DATA, payload=data), st.binary(max_size=200)),
        st.builds(lambda n: Frame(frames.SIGNAL, payload=bytes([n])), st.integers(0, 255)),
        st.builds(lambda data: Frame(frames.SIGNAL, payload=data), st.binary(max_size=3)),
        st.builds(lambda data: Frame(frames.RESIZE, payload=data), st.binary(max_size=5)),
        st.builds(lambda kind, data: Frame(kind, payload=data),
                  st.sampled_from([frames.HELLO, frames.RESULT, frames.FAIL]), st.binary(max_size=9)),
        st.builds(lambda n, s: Frame(frames.CREDIT, payload=n.to_bytes(4, "big"), stream=s),
                  st.integers(0, 2**32 - 1), st.sampled_from([0, 1, 2, 3])),
    ),
    max_size=4,
)  # fmt: skip


def fuzz(connection: socket.socket, number: int) -> None:
    with connection.dup() as patient:
        patient.settimeout(30)
        _fuzz(patient, Host(patient, number))


def _fuzz(connection: socket.socket, host: Host) -> None:

    @settings(max_examples=EXAMPLES, database=None, suppress_health_check=list(HealthCheck))
    @given(calls(), BETWEEN)
    def answered(payload: bytes, between: list[Frame]) -> None:
        kind, answer = host.call(payload, between)
        assert isinstance(answer, dict)
        assert kind == frames.RESULT or answer["code"], answer

    answered()
    kind, answer = host.call(json.dumps({"method": "exec", "params": GOOD["exec"]}).encode(), [])
    assert (kind, answer) == (frames.RESULT, {"exit": 0, "out_of_memory": False}), "a good call works as before"
    # Bytes that are no frames end the machine, as the protocol says.
    connection.sendall(b"\xff" * 64)
    while connection.recv(1 << 16):
        pass


def test_senseless_calls_are_answered_and_end_nothing(home, workspace, monkeypatch):
    monkeypatch.setenv("LUMINAGUARD_HOME", str(home.folder))
    folders = Folders.from_environment().ensure()
    runtime = Runtime(load_settings(folders), folders)
    disk = WorkspaceImages(runtime.folders.cache).open(read_state(workspace, Limits(1000, 1 << 30)))

    async def scenario() -> None:
        with anyio.fail_after(240):
            async with runtime.open_pool(PoolLimits(0, 0)) as pool, pool.machine(disk) as vm:
                await anyio.to_thread.run_sync(fuzz, *vm.hand_over())

    try:
        anyio.run(scenario)
    finally:
        os.close(disk)
    assert runtime.tracker.running() == []

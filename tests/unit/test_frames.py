"""The frame codec under any split and any bytes."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from luminaguard.guest import frames
from luminaguard.guest.frames import Frame, FrameError, FrameReader, encode

some_frames = st.lists(
    st.builds(
        Frame,
        st.integers(frames.HELLO, frames.RESIZE),
        st.integers(0, 0xFFFF),
        st.binary(max_size=300),
        st.integers(0, 3),
    ),
    max_size=8,
)


@given(some_frames, st.lists(st.integers(1, 64), min_size=1))
def test_any_split_of_the_stream_gives_the_same_frames(sent, cuts):
    data = b"".join(encode(frame) for frame in sent)
    reader, got, position, index = FrameReader(), [], 0, 0
    while position < len(data):
        size = cuts[index % len(cuts)]
        got += reader.feed(data[position : position + size])
        position, index = position + size, index + 1
    assert [repr(f) for f in got] == [repr(f) for f in sent]


@given(st.binary(max_size=4096))
def test_arbitrary_bytes_end_in_frames_or_in_a_frame_error(data):
    reader = FrameReader()
    try:
        for frame in reader.feed(data):
            assert len(frame.payload) <= frames.MAX_PAYLOAD
    except FrameError:
        pass


@pytest.mark.parametrize("header", [b"\x00\x00\x00\x00\x00\x00\x00\x00", b"\x0a" + bytes(7), b"\x05\x04" + bytes(6),
                                    b"\x05\x00\x00\x01\x00\x01\x00\x01"])  # fmt: skip
def test_unknown_kinds_streams_and_lengths_are_refused(header):
    with pytest.raises(FrameError):
        FrameReader().feed(header)


def test_a_payload_that_is_too_long_is_never_sent():
    with pytest.raises(FrameError):
        encode(Frame(frames.DATA, 1, bytes(frames.MAX_PAYLOAD + 1)))

"""What the client reads out of what servers say, piece by piece: no server can make it raise, or believe too much."""

import json

import httpx2
import pytest
from hypothesis import given
from hypothesis import strategies as st

from luminaguard.mcp.definitions import compare, difference
from luminaguard.mcp.http import exchange
from luminaguard.mcp.http.exchange import Target, words

HERE = Target(httpx2.URL("https://one.example/mcp"))


@pytest.mark.parametrize(("status", "said", "unknown"), [
    (404, {"error": {"code": -32001, "message": "Session not found"}}, True),
    (404, {"error": {"code": -32601, "message": "no such method"}}, False), (404, {}, True), (404, [], True),
    (400, {"error": {"code": -32000, "message": "No valid SESSION id"}}, True), (400, {"error": "session"}, False),
    (400, {"error": {"code": -32602, "message": "session"}}, False), (400, {"error": {"code": "x"}}, False),
    (400, {"error": {"code": -32000, "message": "other"}}, False),
])  # fmt: skip
def test_a_session_that_is_not_known_is_told_from_a_request_that_is_not(status, said, unknown):
    assert exchange._knows_no_session(status, json.dumps(said).encode()) is unknown


@given(st.binary(max_size=200), st.sampled_from([400, 404]))
def test_whatever_is_said_of_a_session_is_understood_somehow(content, status):
    assert exchange._knows_no_session(status, content) in {True, False}


@pytest.mark.parametrize(("status", "location", "leads"), [
    (307, "/other", "https://one.example/other"), (308, "https://one.example/x", "https://one.example/x"),
    (307, "https://two.example/mcp", None), (307, "http://one.example/mcp", None), (302, "/other", None),
    (307, "https://one.example:8443/mcp", None), (307, "https://u:p@one.example/mcp", None), (307, "http://[", None),
    (307, "", "https://one.example/mcp"),
])  # fmt: skip
def test_a_redirect_is_followed_within_the_same_server_only(status, location, leads):
    response = httpx2.Response(status, headers={"location": location})
    found = exchange._same_origin(HERE, response)
    assert (str(found) if found else None) == leads


@pytest.mark.parametrize(("text", "seconds"), [
    ("3", 3), ("0", 0), ("", 0), ("-1", 0), ("1.5", 0), ("Fri, 31 Dec 2027 23:59:59 GMT", 0), ("9" * 10, 0), ("²", 0),
])  # fmt: skip
def test_a_pause_is_a_number_of_seconds(text, seconds):
    response = httpx2.Response(503, headers=[(b"retry-after", text.encode())])
    assert exchange._pause(response) == seconds


def test_an_error_in_a_line_has_no_value_of_a_header():
    assert words(httpx2.LocalProtocolError("Illegal header value b'Bearer hunter2'")) == (
        "LocalProtocolError: the request cannot be sent as it is"
    )
    assert words(OSError()) == "OSError" and words(ValueError("x")) == "ValueError: x"
    assert len(words(ValueError("x" * 1000))) == 300


def test_a_difference_shows_each_field_that_changed_and_hides_no_character():
    old, new = {"name": "a", "description": "Reads."}, {"name": "a", "description": "Reads\u202e.", "title": "A"}
    assert compare({"a": old, "b": old}, {"a": new, "c": new}).quarantined == ("a", "c")
    lines = list(difference("a", old, new))
    assert '-  "description": "Reads.",' in lines and '+  "description": "Reads\\u202e.",' in lines
    assert '+  "title": "A"' in lines and all(line.isascii() for line in lines)
    assert list(difference("a", None, new))[3].startswith("+{") and list(difference("a", old, None))[-1] == "-}"
    assert list(difference("a", old, dict(reversed(old.items())))) == []

"""Where the keys of a TOML document stand, so that an error about a value can point at it.

``tomllib`` gives values without their places. This walks over a document that ``tomllib`` has read
already, so it need not check anything: it only has to know where strings and comments end
(toml.io/en/v1.0.0).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

__all__ = ["Place", "places"]

Where = tuple[str | int, ...]
_TOKEN = re.compile(
    r"""(?P<skip>\#[^\n]*|[ \t\r]+)
    |(?P<text>\"{3}(?:\\.|[^\\])*?\"{3,5}|'{3}.*?'{3,5}|"(?:\\.|[^"\\\n])*"|'[^'\n]*')
    |(?P<mark>[\[\]{}=,.\n])
    |(?P<bare>[^\s\#"'\[\]{}=,.]+)""",
    re.VERBOSE | re.DOTALL,
)


class Place(NamedTuple):
    """Line and column, from 1."""

    line: int
    column: int


class _Token(NamedTuple):
    text: str
    offset: int


def places(text: str) -> dict[Where, Place]:
    """The place of every table, key and array element, by its path: ``("policy", "rules", 0, "name")``."""
    starts = [0, *(match.end() for match in re.finditer("\n", text))]
    found: dict[Where, Place] = {}
    line = 0
    for where, offset in sorted(_Walk(text).walk(), key=lambda item: item[1]):
        while line + 1 < len(starts) and starts[line + 1] <= offset:
            line += 1
        found.setdefault(where, Place(line + 1, offset - starts[line] + 1))
    return found


class _Walk:
    """One pass over the tokens of a valid document."""

    def __init__(self, text: str) -> None:
        self._tokens = [_Token(match.group(), match.start()) for match in _TOKEN.finditer(text)
                        if match.lastgroup != "skip"]  # fmt: skip
        self._tokens.append(_Token("", len(text)))
        self._at = 0
        self._arrays: dict[Where, int] = {}

    def walk(self) -> Iterator[tuple[Where, int]]:
        table: Where = ()
        while text := self._peek():
            if text == "\n":
                self._at += 1
            elif text == "[":
                offset = self._tokens[self._at].offset
                table = self._header()
                yield table, offset
            else:
                yield from self._pair(table)

    def _peek(self) -> str:
        return self._tokens[self._at].text

    def _header(self) -> Where:
        self._at += 1
        of_array = self._peek() == "["
        self._at += of_array
        keys = self._keys("]")
        self._at += 1 + of_array
        where: Where = ()
        for number, key in enumerate(keys):
            where = (*where, key)
            if of_array and number == len(keys) - 1:
                self._arrays[where] = self._arrays.get(where, -1) + 1
            if where in self._arrays:
                where = (*where, self._arrays[where])
        return where

    def _keys(self, end: str) -> list[str]:
        keys = []
        while self._peek() not in {end, ""}:
            if self._peek() != ".":
                keys.append(self._peek().strip("\"'"))
            self._at += 1
        return keys

    def _pair(self, table: Where) -> Iterator[tuple[Where, int]]:
        offset = self._tokens[self._at].offset
        for key in self._keys("="):
            table = (*table, key)
            yield table, offset
        self._at += 1
        yield from self._value(table)

    def _value(self, where: Where) -> Iterator[tuple[Where, int]]:
        opened = self._peek()
        if opened not in {"[", "{"}:
            while self._peek() not in {",", "\n", "]", "}", ""}:
                self._at += 1
            return
        self._at += 1
        index = 0
        while (text := self._peek()) not in {"]", "}", ""}:
            if text in {",", "\n"}:
                self._at += 1
            elif opened == "{":
                yield from self._pair(where)
            else:
                yield (*where, index), self._tokens[self._at].offset
                yield from self._value((*where, index))
                index += 1
        self._at += 1

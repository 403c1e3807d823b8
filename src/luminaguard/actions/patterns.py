"""Matching text: globs, and two ways of looking.

A rule that lets something through must not be fooled into letting more through; a rule that stops
something must not be fooled into missing it. So patterns are compared *strictly* for GREEN (the text
as it is, nothing that means more than it says) and *widely* for RED and FORBIDDEN (without case,
compatibility forms and percent-encoding, at any depth of the arguments).
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Iterator
from functools import lru_cache
from typing import Any
from urllib.parse import unquote

from luminaguard.effects.text import hides_something, mixes_scripts

__all__ = ["is_deceptive", "leaves", "matches", "matches_path", "name_words", "plain"]

_MAX_DEPTH, _MAX_LEAVES = 64, 100_000
_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|[^\W\d_A-Za-z]+|\d+")


@lru_cache(maxsize=4096)
def _compiled(pattern: str, *, path: bool) -> re.Pattern[str]:
    """``*`` and ``?`` stay within a component of a path, ``**`` does not; ``[...]`` is one of these characters."""
    out, i = "", 0
    star, one = ("[^/]*", "[^/]") if path else (".*", ".")
    while i < len(pattern):
        c = pattern[i]
        if path and pattern.startswith("**/", i) and (i == 0 or pattern[i - 1] == "/"):
            out, i = out + "(?:[^/]+/)*", i + 3
            continue
        if c == "*":
            end = i
            while pattern[end : end + 1] == "*":
                end += 1
            out, i = out + (".*" if end - i > 1 else star), end
            continue
        end = pattern.find("]", i + 2) if c == "[" else -1
        if end > 0:
            inside = pattern[i + 1 : end]
            negated = inside[0] in "!^"
            body = re.sub(r"([\\\[\]^&~|])", r"\\\1", inside[negated:])
            out, i = out + f"[{('^/' if path else '^') if negated else ''}{body}]", end + 1
            continue
        out, i = out + (one if c == "?" else re.escape(c)), i + 1
    return re.compile(out, re.DOTALL)


def plain(text: str) -> str:
    """Text as it reads to whoever is fooled by it: percent-decoded, compatibility forms folded, without case."""
    for _ in range(3):
        decoded = unquote(text, errors="replace")
        if decoded == text:
            break
        text = decoded
    return unicodedata.normalize("NFKC", text).casefold()


def matches(pattern: str, text: str, *, wide: bool) -> bool:
    """Whether a pattern matches a whole text; ``*`` is anything."""
    if _compiled(pattern, path=False).fullmatch(text):
        return True
    return wide and _compiled(pattern.casefold(), path=False).fullmatch(plain(text)) is not None


def matches_path(pattern: str, path: str, *, wide: bool) -> bool:
    """Whether a glob matches a path: ``docs/**`` is all that is in ``docs``, ``**/x`` an ``x`` anywhere."""
    if _compiled(pattern, path=True).fullmatch(path):
        # What is not in normal form could be another file than it seems to be.
        return wide or not any(part in {".", ".."} for part in path.replace("\\", "/").split("/"))
    return wide and _compiled(pattern.casefold(), path=True).fullmatch(plain(path)) is not None


def name_words(name: str) -> frozenset[str]:
    """The words of a name: ``getAndRemove``, ``get-and-remove`` and ``GET_AND_REMOVE`` are get, and, remove."""
    name = unicodedata.normalize("NFKC", name)
    return frozenset(word.casefold() for word in _WORD.findall(name))


def is_deceptive(name: str) -> bool:
    """Whether a name hides characters or mixes alphabets, so that it may read as another one."""
    return hides_something(name) or any(mixes_scripts(word) for word in re.split(r"[\W_]+", name))


def leaves(value: Any, name: str = "", depth: int = 0) -> Iterator[tuple[str, str]]:
    """Every value in arguments with its dotted name, JSON that is hidden in a string included.

    What is nested deeper than any honest argument comes out as one value of all its text.
    """
    if depth > _MAX_DEPTH:
        yield name, _flat(value)
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield from leaves(inner, f"{name}.{key}" if name else str(key), depth + 1)
    elif isinstance(value, list):
        for inner in value:
            yield from leaves(inner, name, depth + 1)
    elif isinstance(value, str):
        yield name, value
        if value.lstrip()[:1] in {"{", "["}:
            try:
                inner = json.loads(value)
            except (ValueError, RecursionError):
                return
            yield from leaves(inner, name, depth + 1)
    else:
        yield name, json.dumps(value)


def _flat(value: Any) -> str:
    try:
        return json.dumps(value)[:_MAX_LEAVES]
    except (ValueError, RecursionError):
        return "…"

"""Matching text: globs, and two ways of looking.

A rule that lets something through must not be fooled into letting more through; a rule that stops
something must not be fooled into missing it. So patterns are compared *strictly* for GREEN (the text
as it is, nothing that means more than it says) and *widely* for RED and FORBIDDEN (without case,
compatibility forms and percent-encoding, at any depth of the arguments).
"""

from __future__ import annotations

import contextlib
import ipaddress
import itertools
import json
import re
import unicodedata
from collections.abc import Iterator
from functools import lru_cache
from typing import Any
from urllib.parse import unquote

from luminaguard.effects.text import hides_something, mixes_scripts

__all__ = [
    "climbs",
    "host_forms",
    "is_deceptive",
    "leaves",
    "literal",
    "matches",
    "matches_path",
    "name_words",
    "plain",
    "url_hosts",
]

_MAX_PATH, _MAX_DEPTH, _MAX_HIDDEN, _DECODINGS = 4096, 64, 1000, 10
_BLANKS = re.compile(r"\s*")
_DECODER = json.JSONDecoder()
_DOTS = str.maketrans("\u3002\uff61\uff0e", "...")
"""What programs that resolve names take for a dot (UTS 46)."""
_NUMBER = re.compile(r"0x[0-9a-f]{1,16}|\d{1,20}", re.ASCII)
_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|[^\W\d_A-Za-z]+|\d+")


@lru_cache(maxsize=4096)
def _path_glob(pattern: str) -> re.Pattern[str]:
    """``*`` and ``?`` stay within a component, ``**`` does not; ``[...]`` is one of these characters."""
    out, i = "", 0
    while i < len(pattern):
        if pattern.startswith("**/", i) and (i == 0 or pattern[i - 1] == "/"):
            out, i = out + "(?:[^/]+/)*", i + 3
        elif pattern[i] == "*":
            end = i
            while pattern[end : end + 1] == "*":
                end += 1
            out, i = out + (".*" if end - i > 1 else "[^/]*"), end
        else:
            one, i = _one(pattern, i, any_one="[^/]")
            out += one
    return re.compile(out, re.DOTALL)


@lru_cache(maxsize=4096)
def _text_glob(pattern: str) -> tuple[re.Pattern[str], ...]:
    """The pieces between the stars of a glob, in whose order a text must have them."""
    pieces, i = [""], 0
    while i < len(pattern):
        if pattern[i] == "*":
            pieces.append("")
            i += 1
        else:
            one, i = _one(pattern, i, any_one=".")
            pieces[-1] += one
    return tuple(re.compile(piece, re.DOTALL) for piece in pieces)


def _one(pattern: str, i: int, *, any_one: str) -> tuple[str, int]:
    """What matches one character, and where the pattern goes on."""
    end = pattern.find("]", i + 2) if pattern[i] == "[" else -1
    if end < 0:
        return (any_one if pattern[i] == "?" else re.escape(pattern[i])), i + 1
    inside = pattern[i + 1 : end]
    negated = inside[0] in "!^"
    body = re.sub(r"([\\\[\]^&~|])", r"\\\1", inside[negated:])
    if negated:
        return f"[^{'/' if any_one != '.' else ''}{body}]", end + 1
    return f"[{body}]", end + 1


def _glob(pattern: str, text: str) -> bool:
    """Match a whole text in time that grows with its length alone, whatever it is."""
    first, *rest = _text_glob(pattern)
    if not rest:
        return first.fullmatch(text) is not None
    at = first.match(text)
    if at is None:
        return False
    position = at.end()
    for piece in rest[:-1]:
        found = piece.search(text, position)
        if found is None:
            return False
        position = found.end()
    last = rest[-1]
    width = len(pattern.rpartition("*")[2])  # an upper bound: a class is longer than what it matches
    return any(last.fullmatch(text, start) for start in range(max(position, len(text) - width), len(text) + 1))


def plain(text: str) -> str:
    """Text as it reads to whoever is fooled by it: percent-decoded, compatibility forms folded, without case."""
    for _ in range(_DECODINGS):
        decoded = unquote(text, errors="replace")
        if decoded == text:
            break
        text = decoded
    text = unicodedata.normalize("NFKC", text).translate(_DOTS)
    return "".join(c for c in text if unicodedata.category(c) != "Cf").casefold()


def climbs(path: str) -> bool:
    """Whether a path may lead out of where it seems to be, for any reader: ``..``, ``%2e%2e``, ``..;``, a backslash."""
    parts = re.split(r"[/\\]", plain(path))
    return any((part := raw.partition(";")[0].strip()) and not part.strip(".") for raw in parts)


def matches(pattern: str, text: str, *, wide: bool) -> bool:
    """Whether a pattern matches a whole text; ``*`` is anything."""
    return _glob(pattern, text) or (wide and any(_glob(pattern.casefold(), form) for form in _forms(text)))


def _forms(text: str) -> Iterator[str]:
    """What others may make of a text: a path in normal form, a statement without comments and spare blanks."""
    folded = plain(text)
    yield folded
    if "/" in folded or "\\" in folded or "." in folded:
        yield "/" + re.sub(r"/(?:\./|/)*", "/", folded.replace("\\", "/")).removeprefix("/")
    if " " in folded or "\n" in folded or "/*" in folded:
        yield " ".join(re.sub(r"--[^\n]*", " ", _without_comments(folded)).split())


def _without_comments(text: str) -> str:
    kept, at = [], 0
    while (start := text.find("/*", at)) >= 0 and (end := text.find("*/", start + 2)) >= 0:
        kept += [text[at:start], " "]
        at = end + 2
    return "".join((*kept, text[at:]))


def matches_path(pattern: str, path: str, *, wide: bool) -> bool:
    """Whether a glob matches a path: ``docs/**`` is all that is in ``docs``, ``**/x`` an ``x`` anywhere."""
    if len(path) > _MAX_PATH:  # no file's name
        return False
    if _path_glob(pattern).fullmatch(path):
        return wide or not climbs(path)  # what climbs could be another file than it seems to be
    if not wide:
        return False
    folded = plain(path)
    if _path_glob(pattern.casefold()).fullmatch(folded):
        return True
    return pattern.endswith("/**") and matches_path(pattern[:-3], path, wide=True)  # the folder itself


def literal(text: str) -> str:
    """A pattern that matches this text alone."""
    return "".join(f"[{c}]" if c in "*?[" else c for c in text)


def name_words(name: str) -> frozenset[str]:
    """The words of a name: ``getAndRemove``, ``get-and-remove`` and ``GET_AND_REMOVE`` are get, and, remove.

    However it is written, a word must not be missed: what stands between separators counts as one, too, and
    neighbours count joined (``check_out`` is checkout).
    """
    name = "".join(c for c in unicodedata.normalize("NFKD", name) if not unicodedata.combining(c))
    found: set[str] = set()
    for words in (_WORD.findall(name), re.split(r"[\W_\d]+", name)):
        folded = [word.casefold() for word in words if word]
        found.update(folded, map("".join, itertools.pairwise(folded)))
    return frozenset(found)


def host_forms(host: str) -> frozenset[str]:
    """A host in all the ways in which rules may know it: ``0x7f.1`` is 127.0.0.1, as C libraries read it."""
    forms = {host.lower(), plain(host)}
    for form in tuple(forms):
        for address in _addresses(form.strip("[]")):
            forms.add(str(address))
            if mapped := getattr(address, "ipv4_mapped", None):
                forms.add(str(mapped))
    return frozenset(form.rstrip(".") for form in forms)


def _addresses(host: str) -> Iterator[ipaddress.IPv4Address | ipaddress.IPv6Address]:
    with contextlib.suppress(ValueError):
        yield ipaddress.ip_address(host.partition("%")[0])
    parts = host.split(".")
    if not all(_NUMBER.fullmatch(part) for part in parts) or len(parts) > 4:
        return
    for octal in (8, 10):  # readers differ in what a leading zero means
        # inet_aton(3): up to four numbers, decimal, octal or hexadecimal; the last one fills the rest.
        try:
            numbers = [int(part, 16 if part[:2] == "0x" else octal if part[0] == "0" else 10) for part in parts]
        except ValueError:  # 8 or 9 in what would be octal
            continue
        value = sum(number << (24 - 8 * index) for index, number in enumerate(numbers[:-1])) + numbers[-1]
        if value < 1 << 32:
            yield ipaddress.IPv4Address(value)


def url_hosts(url: str) -> frozenset[str]:
    """Every host that some client may take an address to name: slashes of either kind, or none, after the scheme."""
    rest = re.sub(r"^[a-z][a-z0-9+.-]*:", "", "".join(c for c in url if c > " "), flags=re.IGNORECASE).lstrip("/\\")
    found = set()
    for ends in (r"[/?#]", r"[/\\?#]"):
        authority = re.split(ends, rest, maxsplit=1)[0]
        host = authority.rpartition("@")[2]
        bracketed = re.match(r"\[([^\]]*)\]", host)
        found.add(bracketed[1] if bracketed else host.partition(":")[0])
    return frozenset(host for host in found if host)


def is_deceptive(name: str) -> bool:
    """Whether a name hides characters or mixes alphabets, so that it may read as another one."""
    return hides_something(name) or mixes_scripts(name)


def leaves(value: Any, name: str = "", depth: int = 0) -> Iterator[tuple[str, str]]:
    r"""Every value in arguments with its name, JSON that is hidden in a string included.

    A name is ``outer.inner`` in objects, ``name[]`` in lists, and ``name!`` for what was inside of a
    string; a dot within a key is written ``\.``, so that no two places have the same name. What is
    nested deeper than any honest argument comes out as one value of all its text.
    """
    if depth > _MAX_DEPTH:
        yield name, json.dumps(value)
    elif isinstance(value, dict) and value:
        for key, inner in value.items():
            told = re.sub(r"([.\\!\[])", r"\\\1", str(key)) or '""'
            yield from leaves(inner, f"{name}.{told}" if name else told, depth + 1)
    elif isinstance(value, list) and value:
        for inner in value:
            yield from leaves(inner, f"{name}[]", depth + 1)
    elif isinstance(value, str):
        yield name, value
        for inner in _hidden(value):
            yield from leaves(inner, f"{name}!", depth + 1)
    elif depth or value:  # no arguments at all are no argument
        yield name, json.dumps(value)


def _hidden(text: str) -> list[Any]:
    """The JSON values that a string holds, one after the other; none if it is any other text."""
    found, at = [], 0
    if text.lstrip()[:1] not in {"{", "[", '"'}:
        return []
    while (start := _BLANKS.match(text, at).end()) < len(text):  # type: ignore[union-attr]  # it matches nothing, too
        try:
            value, at = _DECODER.raw_decode(text, start)
        except (ValueError, RecursionError):
            return []
        found.append(value)
        if len(found) > _MAX_HIDDEN:
            return [text]
    return found

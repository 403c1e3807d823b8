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
from typing import Any, NamedTuple
from urllib.parse import unquote

from luminaguard.effects.text import hides_something, mixes_scripts

__all__ = ["TooLarge", "check_pattern", "climbs", "host_forms", "is_deceptive", "leaves", "literal", "matches",
           "matches_path", "name_words", "plain", "plain_characters", "url_parts"]  # fmt: skip

_MAX_PATH, _MAX_DEPTH, _DECODINGS = 4096, 64, 10
_MOST_LEAVES, _MOST_TEXT = 2000, 1 << 19
_BLANKS = re.compile(r"\s*")
_DECODER = json.JSONDecoder()
_DOTS = str.maketrans("\u3002\uff61\uff0e", "...")
"""What programs that resolve names take for a dot (UTS 46)."""
_ONE_READING = re.compile(r"[^/\\;.][^/\\;]*(?:/[^/\\;.][^/\\;]*)*")
"""A path that is in normal form already, and so all there is to compare."""
_NUMBER = re.compile(r"0x[0-9a-f]{1,16}|\d{1,20}", re.ASCII)
_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|[^\W\d_A-Za-z]+|\d+")


class _Pieces(NamedTuple):
    """The pieces between the stars of a glob, in whose order a text must have them; how long the last one is."""

    pieces: tuple[re.Pattern[str], ...]
    last: int


@lru_cache(maxsize=4096)
def _compiled(pattern: str) -> _Pieces:
    """``*`` is any text, ``?`` any character, ``[...]`` one of these; raises ValueError for what is no pattern."""
    pieces, lengths, i = [""], [0], 0
    while i < len(pattern):
        if pattern[i] == "*":
            pieces.append("")
            lengths.append(0)
            i += 1
        else:
            one, i = _one(pattern, i)
            pieces[-1] += one
            lengths[-1] += 1
    try:
        return _Pieces(tuple(re.compile(piece, re.DOTALL) for piece in pieces), lengths[-1])
    except re.error as error:
        raise ValueError(f"{pattern!a} is not a pattern ({error})") from None


def _one(pattern: str, i: int) -> tuple[str, int]:
    """What matches one character, and where the pattern goes on."""
    end = pattern.find("]", i + 2) if pattern[i] == "[" else -1
    if end < 0:
        return ("." if pattern[i] == "?" else re.escape(pattern[i])), i + 1
    inside = pattern[i + 1 : end]
    negated = inside[0] in "!^" and len(inside) > 1
    body = re.sub(r"([\\\[\]^&~|])", r"\\\1", inside[negated:])
    return f"[{'^' * negated}{body}]", end + 1


def check_pattern(pattern: str) -> str:
    """The pattern itself; raises ValueError if it is none."""
    for component in (pattern, *pattern.split("/")):
        _compiled(component)
        _compiled(component.casefold())
    return pattern


def plain_characters(pattern: str) -> int:
    """How many letters and digits a pattern asks for by name: what else is in it matches many texts."""
    count = i = 0
    while i < len(pattern):
        _, end = _one(pattern, i)
        count += end == i + 1 and pattern[i].isalnum()
        i = end
    return count


def _glob(pattern: str, text: str) -> bool:
    """Match a whole text in time that grows with its length alone, whatever it is."""
    (first, *rest), last = _compiled(pattern)
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
    return len(text) - last >= position and rest[-1].fullmatch(text, len(text) - last) is not None


def _path_glob(pattern: str, path: str) -> bool:
    """Match a path component by component; ``**`` is any number of them, at the end at least one."""
    wanted, found = pattern.split("/"), path.split("/")
    reached = {0}  # how many components of the path the pattern so far can take
    for number, one in enumerate(wanted):
        if one == "**":
            least = 1 if number == len(wanted) - 1 else 0
            first = min(reached) + least
            reached = set(range(first, len(found) + 1))
        else:
            reached = {at + 1 for at in reached if at < len(found) and _glob(one, found[at])}
        if not reached:
            return False
    return len(found) in reached


@lru_cache(maxsize=8192)
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
    return _glob(pattern, text) or (wide and any(_glob(pattern.casefold(), form) for form in forms(text)))


@lru_cache(maxsize=8192)
def forms(text: str) -> tuple[str, ...]:
    """What others may make of a text: a path in normal form, a statement without comments and spare blanks."""
    folded = plain(text)
    found = [folded]
    if set("/\\.;") & set(folded):
        found.append(_normal_path(folded))
    if set(" \t\n/-") & set(folded):
        found.append(" ".join(re.sub(r"--[^\n]*", " ", _without_comments(folded)).split()))
        found.append(" ".join(folded.split()))
    return tuple(dict.fromkeys(found))


@lru_cache(maxsize=8192)
def _normal_path(path: str) -> str:
    """A path from a root, as servers read it: no backslashes, empty parts, parameters, ``.`` and ``..``."""
    parts: list[str] = []
    for raw in path.replace("\\", "/").split("/"):
        part = raw.partition(";")[0] if raw.strip(".; ") else raw.replace(";", "").strip()
        if part == "..":
            del parts[-1:]
        elif part not in {"", "."}:
            parts.append(part)
    return "/" + "/".join(parts)


def _without_comments(text: str) -> str:
    kept, at = [], 0
    while (start := text.find("/*", at)) >= 0 and (end := text.find("*/", start + 2)) >= 0:
        kept += [text[at:start], " "]
        at = end + 2
    return "".join((*kept, text[at:]))


def matches_path(pattern: str, path: str, *, wide: bool) -> bool:
    """Whether a glob matches a path: ``docs/**`` is all that is in ``docs``, ``**/x`` an ``x`` anywhere."""
    if len(path) > _MAX_PATH:
        return wide  # no file has such a name: what stops, stops
    if _path_glob(pattern, path):
        return wide or not climbs(path)  # what climbs could be another file than it seems to be
    if not wide:
        return False
    folded, read = pattern.casefold(), plain(path)
    if folded == pattern and read == path and _ONE_READING.fullmatch(path):
        return folded.endswith("/**") and matches_path(pattern[:-3], path, wide=True)
    normal = _normal_path(read)
    if any(_path_glob(folded, form) for form in (plain(path), normal if folded.startswith("/") else normal[1:])):
        return True
    return folded.endswith("/**") and matches_path(pattern[:-3], path, wide=True)  # the folder itself


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


def url_parts(url: str) -> frozenset[tuple[str, str]]:
    """Every host and path that some client may take an address to name: slashes of either kind, or none."""
    rest = re.sub(r"^[a-z][a-z0-9+.-]*:", "", "".join(c for c in url if c > " "), flags=re.IGNORECASE).lstrip("/\\")
    found = set()
    for ends in (r"[/?#]", r"[/\\?#]"):
        authority = re.split(ends, rest, maxsplit=1)[0]
        path = re.split(r"[?#]", rest[len(authority) :], maxsplit=1)[0]
        host = authority.rpartition("@")[2]
        bracketed = re.match(r"\[([^\]]*)\]", host)
        found.add((bracketed[1] if bracketed else host.partition(":")[0], path or "/"))
    return frozenset(found)


def is_deceptive(name: str) -> bool:
    """Whether a name hides characters or mixes alphabets, so that it may read as another one."""
    return hides_something(name) or mixes_scripts(name)


class TooLarge(ValueError):
    """Arguments that nobody could look through."""


def leaves(value: Any) -> list[tuple[str, str]]:
    r"""Every value in arguments with its name, JSON that is hidden in a string included.

    A name is ``outer.inner`` in objects, ``name[]`` in lists, and ``name!`` for what was inside of a
    string; a dot within a key is written ``\.``, so that no two places have the same name.

    Raises:
        TooLarge: there are more, longer or deeper ones than any honest call has.
    """
    found: list[tuple[str, str]] = []
    room = _MOST_TEXT
    waiting: list[tuple[str, Any, int]] = [("", value, 0)]
    while waiting:
        name, inner, depth = waiting.pop()
        room -= len(name)
        if depth > _MAX_DEPTH or room < 0 or len(found) + len(waiting) > _MOST_LEAVES:
            raise TooLarge("there are too many arguments to look at")
        if isinstance(inner, dict) and inner:
            if len(inner) > _MOST_LEAVES:
                raise TooLarge("an object has too many keys to look at")
            told = [(re.sub(r"([.\\!\[])", r"\\\1", str(key)) or '""', entry) for key, entry in inner.items()]
            waiting += [(f"{name}.{key}" if name else key, entry, depth + 1) for key, entry in reversed(told)]
        elif isinstance(inner, list) and inner:
            if len(inner) > _MOST_LEAVES:
                raise TooLarge("a list has too many entries to look at")
            waiting += [(f"{name}[]", entry, depth + 1) for entry in reversed(inner)]
        elif isinstance(inner, str):
            room -= len(inner)
            found.append((name, inner))
            waiting += [(f"{name}!", entry, depth + 1) for entry in reversed(_hidden(inner))]
        elif depth or inner:  # no arguments at all are no argument
            found.append((name, json.dumps(inner)))
    if room < 0:
        raise TooLarge("there is too much text in the arguments to look at")
    return found


def _hidden(text: str) -> list[Any]:
    """The JSON values that a string holds, one after the other; none if it is any other text."""
    found: list[Any] = []
    at = 0
    if text.lstrip()[:1] not in {"{", "[", '"'}:
        return []
    while (start := _BLANKS.match(text, at).end()) < len(text):  # type: ignore[union-attr]  # it matches nothing, too
        try:
            value, at = _DECODER.raw_decode(text, start)
        except (ValueError, RecursionError):
            return []
        found.append(value)
        if len(found) > _MOST_LEAVES:
            raise TooLarge("a text holds too many values to look at")
    return found

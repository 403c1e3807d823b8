"""Cards of effects that are no files: a remote call, a network request, the use of a secret, a tool to be run."""

from __future__ import annotations

import json
from typing import Any
from urllib.parse import urlsplit

from luminaguard.effects import diffs
from luminaguard.effects.card import CardItem, DiffCard, Fact
from luminaguard.effects.marks import Mark
from luminaguard.effects.outside import SECRET_HEADERS, NetworkRequest, Outside, RemoteCall, SecretUse, ToolRun
from luminaguard.effects.text import hides_something, mixes_scripts, visible

__all__ = ["make_outside_card"]

_MOST_LINES = 2000
_MAX_LINE = 500


def make_outside_card(effect: Outside) -> DiffCard:
    """The card of a call, a request or the use of a secret."""
    match effect:
        case RemoteCall():
            return _call(effect)
        case NetworkRequest():
            return _request(effect)
        case SecretUse():
            return _secret(effect)
        case ToolRun():
            return _run(effect)


def _call(call: RemoteCall) -> DiffCard:
    facts = [_fact("server", call.server), _fact("tool", call.tool)]
    if call.unconfined:
        facts.append(Fact("runs", "on this machine with your rights, in no machine of its own", loud=True))
    if call.definition is None:
        facts.append(Fact("definition", "the server gave none", loud=True))
    elif call.pinned is None:
        facts.append(Fact("definition", "not pinned before", loud=True))
    elif call.pinned != call.definition:
        facts.append(Fact("definition", "CHANGED since it was pinned; the difference is below", loud=True))
    else:
        facts.append(Fact("definition", "as it was pinned"))
    items = [_value("argument", name, value) for name, value in call.arguments.items()]
    if call.definition is not None:
        old, new = (_pretty(call.pinned) if call.pinned else []), _pretty(call.definition)
        lines = list(diffs.unified(old, new)) if call.pinned is not None else [f" {line}" for line in new]
        if lines:
            items.insert(0, _item("definition", "tool definition", "changed" if call.pinned else "first seen", lines))
    count = len(call.arguments)
    title = f"call {visible(call.tool)} of {visible(call.server)} with {count} argument{'s' * (count != 1)}"
    return DiffCard(call.digest, title, tuple(items), tuple(facts))


def _request(request: NetworkRequest) -> DiffCard:
    split = urlsplit(request.url)
    facts = [_fact("method", request.method), _fact("host", split.netloc), _fact("path", split.path or "/")]
    if request.asker:
        facts.append(_fact("asked by", f"the server {request.asker} in its machine"))
    if request.method == "CONNECT":
        facts.append(Fact("what is sent", "encrypted: it cannot be seen", loud=True))
    if split.query:
        facts.append(_fact("query", split.query))
    if split.scheme != "https":
        facts.append(Fact("transport", f"{visible(split.scheme)}: not encrypted", loud=True))
    facts.append(Fact("body", f"{request.body_size:,} bytes" if request.body_size else "none"))
    if request.body_sha256:
        facts.append(Fact("body sha256", visible(request.body_sha256)))
    items = [_value("header", name, "(kept secret)" if name.lower() in SECRET_HEADERS else value)
             for name, value in request.headers]  # fmt: skip
    items += [_value("header", name, f"(kept secret, {size:,} characters)") for name, size, _ in request.secrets]
    if request.preview:
        rest = request.body_size - len(request.preview.encode(errors="replace"))
        note = f"the other {rest:,} bytes are not shown" if rest > 0 else ""
        lines = [f" {line}" for line in request.preview.split("\n")]
        items.append(_item("body", "body", f"{request.body_size:,} bytes", lines, note))
    title = f"{visible(request.method)} {visible(split.scheme)}://{visible(split.netloc)}{visible(split.path)}"
    return DiffCard(request.digest, title, tuple(items), tuple(facts))


def _secret(use: SecretUse) -> DiffCard:
    facts = [_fact("secret", use.name), _fact("for", use.purpose)]
    facts.append(_fact("sent to", use.host) if use.host else Fact("sent to", "nobody by name", loud=True))
    return DiffCard(use.digest, f"use the secret {visible(use.name)} for {visible(use.purpose)}", (), tuple(facts))


def _run(run: ToolRun) -> DiffCard:
    facts = [_fact("folder", run.workspace), Fact("where", "on a copy, in a machine that is thrown away afterwards")]
    items = [_value("argument", name, value) for name, value in run.arguments.items()]
    return DiffCard(run.digest, f"run {visible(run.tool)} in a machine", tuple(items), tuple(facts))


def _fact(label: str, value: str) -> Fact:
    return Fact(label, visible(value), loud=hides_something(value) or mixes_scripts(value))


def _value(kind: str, name: str, value: Any) -> CardItem:
    lines = [f" {line}" for line in (value.split("\n") if isinstance(value, str) else _pretty(value))]
    match value:
        case str():
            what = f"text, {len(value):,} characters"
        case dict() | list():
            what = f"{'object' if isinstance(value, dict) else 'list'}, {len(value):,} entries"
        case _:
            what = "a value"
    return _item(kind, visible(name), what, lines)


def _item(kind: str, path: str, headline: str, lines: list[str], note: str = "") -> CardItem:
    hidden = any(hides_something(line.replace("\t", "")) for line in lines)
    cut = len(lines) > _MOST_LINES or any(len(line) > _MAX_LINE for line in lines)
    marks = (Mark.CONTROL,) * hidden + (Mark.UNSEEN,) * (cut or bool(note))
    if len(lines) > _MOST_LINES:
        note = f"{len(lines) - _MOST_LINES:,} more lines are not shown"
    shown = tuple(_clip(line) for line in lines[:_MOST_LINES])
    return CardItem(path, kind, headline, marks, shown, note)


def _clip(line: str) -> str:
    shown = line[:1] + visible(line[1:], keep_tab=True)
    return shown if len(shown) <= _MAX_LINE else f"{shown[:_MAX_LINE]} … ({len(shown) - _MAX_LINE} more characters)"


def _pretty(value: Any) -> list[str]:
    """JSON for reading: keys in order, one value a line."""
    return json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False).split("\n")

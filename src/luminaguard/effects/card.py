"""The diff card: what a person sees of a changeset before deciding. A pure model of it.

The summary comes first; then what needs a second look; then every change, with its diff. Nothing
that came from the machine reaches the card unescaped, and what is cut off says so.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from luminaguard.effects import diffs
from luminaguard.effects.changes import Change, Changeset, DirEntry, Entry, FileEntry, LinkEntry
from luminaguard.effects.marks import LOUD, Mark, marks_of
from luminaguard.effects.renames import edited_renames
from luminaguard.effects.text import hides_something, visible, visible_name

__all__ = ["CardItem", "ChangesetCard", "DiffCard", "Fact", "Summary", "card_title", "card_to_json", "make_card"]

MAX_TEXT = 1 << 20
MAX_CARD = 8 << 20
"""Bytes of text that one card compares; changes after that are listed without their diffs, and say so."""
_MAX_LINE = 500
_BINARY = "binary"
CRLF_NOTE = "lines end with CR LF"
Contents = Callable[[str], bytes | None]
"""Gives a file's content by SHA-256, or None when it is not at hand."""


@dataclass(frozen=True, slots=True)
class Summary:
    """Counts over the whole changeset, a renamed file neither as created nor as deleted; lines of compared text."""

    created: int
    edited: int
    deleted: int
    renamed: int
    modes: int
    links: int
    lines_added: int
    lines_removed: int
    bytes_written: int


@dataclass(frozen=True, slots=True)
class CardItem:
    """One change as it is shown.

    Attributes:
        path: escaped.
        headline: the change in words, escaped.
        diff: lines of a unified diff without their file header, escaped.
        note: why there is no diff, or that it is cut.
    """

    path: str
    kind: str
    headline: str
    marks: tuple[Mark, ...]
    diff: tuple[str, ...] = ()
    note: str = ""


@dataclass(frozen=True, slots=True)
class Fact:
    """A line at the top of a card: what it is called, what it is (escaped), and whether to look twice."""

    label: str
    value: str
    loud: bool = False


@dataclass(frozen=True, slots=True)
class DiffCard:
    """A whole card, of any effect: the one model that terminal, page and JSON render.

    Attributes:
        title: the effect in a line, escaped.
        facts: what it is, beside its items.
        items: one change, argument, header or body each.
        summary: the counts of a changeset; None of other effects.
    """

    digest: str
    title: str
    items: tuple[CardItem, ...]
    facts: tuple[Fact, ...] = ()
    summary: Summary | None = None

    @property
    def compared(self) -> bool:
        """Whether every content was compared, so that the counts of lines are all there are."""
        return all(item.note in {"", CRLF_NOTE} for item in self.items)

    @property
    def loud(self) -> tuple[CardItem, ...]:
        """The items that need a second look."""
        return tuple(item for item in self.items if LOUD & set(item.marks))


class ChangesetCard:
    """The card of a changeset, item by item: what is not looked at is not compared.

    Args:
        changeset: what is to be decided.
        before: contents of the base, by SHA-256.
        after: contents that the machine left, by SHA-256.
    """

    def __init__(self, changeset: Changeset, before: Contents, after: Contents) -> None:
        self.changeset = changeset
        self._before, self._after = before, after
        edited = edited_renames(changeset, before, after)
        bases = {change.path: change.before for change in changeset.changes}
        self._moves = _Moves({**changeset.renames, **edited}, {new: bases[old] for new, old in edited.items()})

    def __len__(self) -> int:
        return len(self.changeset)

    def outline(self, index: int) -> CardItem:
        """One change without its contents."""
        change = self.changeset.changes[index]
        base = self._moves.bases.get(change.path, change.before)
        return CardItem(visible_name(change.path), change.kind, _headline(change, base, self._moves), marks_of(change))

    def item(self, index: int, *, compared: bool = True) -> tuple[CardItem, int, int]:
        """One change, and how many lines it adds and removes; not compared, it says so."""
        before, after = (self._before, self._after) if compared else (None, None)
        return _item(self.changeset.changes[index], self._moves, before, after)

    def summary(self, lines_added: int = 0, lines_removed: int = 0) -> Summary:
        """The counts; those of lines are the caller's."""
        kinds, moved = Counter(change.kind for change in self.changeset.changes), len(self._moves.sources)
        return Summary(
            created=kinds["create"] - moved, edited=kinds["modify"], deleted=kinds["delete"] - moved, renamed=moved,
            modes=kinds["mode"], links=kinds["symlink"], lines_added=lines_added, lines_removed=lines_removed,
            bytes_written=sum(self.changeset.blobs().values()),
        )  # fmt: skip


def make_card(changeset: Changeset, before: Contents, after: Contents) -> DiffCard:
    """Build the whole card of a changeset; see :class:`ChangesetCard`."""
    card = ChangesetCard(changeset, before, after)
    items = []
    added = removed = 0
    budget = MAX_CARD
    for index, change in enumerate(changeset.changes):
        sizes = [e.size for e in (change.before, change.after) if isinstance(e, FileEntry)]
        budget -= sum(size for size in sizes if size <= MAX_TEXT)
        item, plus, minus = card.item(index, compared=budget >= 0)
        items.append(item)
        added, removed = added + plus, removed + minus
    summary = card.summary(added, removed)
    return DiffCard(changeset.digest, card_title(summary), tuple(items), summary=summary)


def card_title(s: Summary) -> str:
    """The counts in words."""
    parts = [f"{s.created} created", f"{s.edited} edited", f"{s.deleted} deleted"]
    parts += [f"{s.renamed} renamed"] * bool(s.renamed)
    parts += [f"{s.links} links"] * bool(s.links) + [f"{s.modes} modes changed"] * bool(s.modes)
    return f"{', '.join(parts)}   (+{s.lines_added} -{s.lines_removed} lines, {s.bytes_written:,} bytes)"


def card_to_json(card: DiffCard) -> dict[str, Any]:
    """The card for programs: all that the others show, marks by their words."""
    items = [{"path": item.path, "kind": item.kind, "headline": item.headline, "note": item.note,
              "marks": [mark.value for mark in item.marks], "diff": list(item.diff)}
             for item in card.items]  # fmt: skip
    return {"digest": card.digest, "title": card.title, "items": items,
            "facts": [{"label": fact.label, "value": fact.value, "loud": fact.loud} for fact in card.facts],
            "look_twice": [item.path for item in card.loud]}  # fmt: skip


class _Moves:
    """What was renamed: new path to old path, and what the edited ones of them were before."""

    def __init__(self, sources: Mapping[str, str], bases: Mapping[str, Entry | None]) -> None:
        self.sources = sources
        self.bases = bases
        self.targets = {old: new for new, old in sources.items()}


def _item(change: Change, moves: _Moves, before: Contents | None, after: Contents | None) -> tuple[CardItem, int, int]:
    marks = list(marks_of(change))
    path = visible_name(change.path)
    base = moves.bases.get(change.path, change.before)
    headline = _headline(change, base, moves)
    moved = change.path in moves.targets or (change.path in moves.sources and change.path not in moves.bases)
    old, old_note = _text(base, before, "the base content is no longer at hand")
    new, new_note = _text(change.after, after, "this content is no longer kept: the request was decided")
    note = new_note or old_note
    if _BINARY in (new_note, old_note):
        marks.append(Mark.BINARY)
    if moved or change.kind in {"mode", "symlink"} or not _has_content(change):
        return CardItem(path, change.kind, headline, tuple(marks)), 0, 0
    if note:
        if note != _BINARY and change.after is not None:
            marks.append(Mark.UNSEEN)
        return CardItem(path, change.kind, headline, tuple(marks), note=note), 0, 0
    assert old is not None and new is not None
    if _ends_with_return(new) and (not old or _ends_with_return(old)):
        # As programs on Windows write them; alone at some lines, they are control characters like others.
        old, new, note = _without_returns(old), _without_returns(new), CRLF_NOTE
    if new and Mark.CONTROL not in marks and any(hides_something(line.replace("\t", "")) for line in new):
        marks.append(Mark.CONTROL)
    lines = list(diffs.unified(old, new))
    plus = sum(line.startswith("+") for line in lines)
    minus = sum(line.startswith("-") for line in lines)
    shown = tuple(line[0] + _clip(line[1:]) for line in lines)
    return CardItem(path, change.kind, headline, tuple(marks), shown, note), plus, minus


def _headline(change: Change, base: Entry | None, moves: _Moves) -> str:
    after, before = change.after, change.before
    if source := moves.sources.get(change.path):
        renamed = f"renamed from {visible_name(source)}"
        same = change.path not in moves.bases
        return renamed if same else f"{renamed} and edited: {_words(base)} became {_words(after)}"
    if target := moves.targets.get(change.path):
        return f"renamed to {visible_name(target)}"
    match after:
        case None:
            return f"deleted {_words(before)}"
        case LinkEntry(target):
            return f"link to {visible_name(target)}" + (f" (was {_words(before)})" if before else "")
        case _ if before is None:
            return f"new {_words(after)}"
        case _ if type(before) is not type(after):
            return f"{_words(before)} became {_words(after)}"
        case _:
            assert isinstance(before, FileEntry | DirEntry)
            mode = f", mode {before.mode:04o} to {after.mode:04o}" if before.mode != after.mode else ""
            if isinstance(after, DirEntry) or change.kind == "mode":
                return mode.removeprefix(", ")
            assert isinstance(before, FileEntry)
            return f"{_size(before.size)} to {_size(after.size)}{mode}"


def _words(entry: Entry | None) -> str:
    match entry:
        case FileEntry(mode, size, _):
            return f"file, {_size(size)}, mode {mode:04o}"
        case DirEntry(mode):
            return f"folder, mode {mode:04o}"
        case LinkEntry(target):
            return f"link to {visible_name(target)}"
        case None:
            return "nothing"


def _size(count: int) -> str:
    if count < 1 << 10:
        return f"{count} bytes"
    if count < 1 << 20:
        return f"{count / (1 << 10):,.1f} KiB"
    return f"{count / (1 << 20):,.1f} MiB"


def _has_content(change: Change) -> bool:
    return isinstance(change.before, FileEntry) or isinstance(change.after, FileEntry)


def _text(entry: Entry | None, contents: Contents | None, gone: str) -> tuple[list[str] | None, str]:
    """The lines of a text file; or why there are none to show."""
    if not isinstance(entry, FileEntry):
        return [], ""
    if entry.size > MAX_TEXT:
        return None, f"too large to compare here ({_size(entry.size)})"
    if contents is None:
        return None, "not compared: this card has reached its limit of text"
    data = contents(entry.sha256)
    if data is None:
        return None, gone
    if b"\0" in data:
        return None, _BINARY
    try:
        text = data.decode().removeprefix("\ufeff")
    except UnicodeDecodeError:
        return None, _BINARY
    lines = text.split("\n")
    if lines and not lines[-1]:
        lines.pop()
    elif lines:
        lines[-1] += " (no newline at the end)"
    return lines, ""


def _ends_with_return(lines: list[str]) -> bool:
    return bool(lines) and all(line.endswith("\r") for line in lines)


def _without_returns(lines: list[str]) -> list[str]:
    return [line.removesuffix("\r") for line in lines]


def _clip(line: str) -> str:
    shown = visible(line, keep_tab=True)
    return shown if len(shown) <= _MAX_LINE else f"{shown[:_MAX_LINE]} … ({len(shown) - _MAX_LINE} more characters)"

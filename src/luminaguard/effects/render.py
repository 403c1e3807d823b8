"""The plain terminal rendering of a card: lines with a style word, no terminal codes.

A front end maps the style words to colours; the text alone says everything.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from luminaguard.effects.card import CardItem, DiffCard
from luminaguard.effects.marks import LOUD, QUIETER

__all__ = ["Line", "Style", "render"]

Style = Literal["plain", "title", "loud", "path", "dim", "plus", "minus", "hunk"]
Line = tuple[Style, str]
_DIFF_STYLES: dict[str, Style] = {"+": "plus", "-": "minus", "@": "hunk"}
_REPEATED = 10
_SIGNS = {"create": "+", "modify": "~", "delete": "-", "mode": "m", "symlink": "@",
          "argument": "=", "definition": "d", "header": ":", "body": "="}  # fmt: skip


def render(card: DiffCard, *, max_diff_lines: int | None = 40) -> Iterator[Line]:
    """The card as lines.

    Args:
        card: the card.
        max_diff_lines: how many lines of each diff to show; None for all. A cut says so.
    """
    yield "title", card.title
    yield "dim", card.digest
    for fact in card.facts:
        yield "loud" if fact.loud else "plain", f"{fact.label}: {fact.value}"
    loud = card.loud
    if loud:
        yield "loud", f"LOOK TWICE at {len(loud)} of {len(card.items)}:"
        for item in loud:
            words = ", ".join(mark.value for mark in item.marks if mark in LOUD)
            yield "loud", f"  ! {item.path}   [{words}]"
    counts = ((mark, sum(mark in item.marks for item in card.items)) for mark in QUIETER)
    if also := ", ".join(f"{count} {mark.value}" for mark, count in counts if count):
        yield "loud", f"ALSO MARKED: {also}"
    for item in card.items:
        yield "plain", ""
        yield from _item(item, max_diff_lines)
    if loud:
        # The list at the top may have scrolled away: the question must not stand without it.
        names = ", ".join(item.path for item in loud[:_REPEATED])
        more = f" and {len(loud) - _REPEATED} more" if len(loud) > _REPEATED else ""
        yield "plain", ""
        yield "loud", f"LOOK TWICE (see the top of this card): {names}{more}"


def _item(item: CardItem, most: int | None) -> Iterator[Line]:
    marks = f"   [{', '.join(mark.value for mark in item.marks)}]" if item.marks else ""
    yield "path", f"{_SIGNS[item.kind]} {item.path}   {item.headline}{marks}"
    if item.note:
        yield "dim", f"    ({item.note})"
    for line in item.diff[:most]:
        yield _DIFF_STYLES.get(line[0], "plain"), f"    {line}"
    if most is not None and len(item.diff) > most:
        yield "loud", f"    … {len(item.diff) - most} more lines of this diff are not shown here"

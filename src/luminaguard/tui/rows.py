"""The rows of a diff, a listing of bytes, and a tree of files: pure, and made only where one looks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from luminaguard.effects.card import CardItem
from luminaguard.effects.text import visible_name

__all__ = ["BYTES_A_ROW", "Row", "TreeRow", "byte_row", "byte_rows", "side_by_side", "tree", "unified"]

Tone = Literal["plain", "plus", "minus", "hunk", "note", "empty"]
BYTES_A_ROW = 16


@dataclass(frozen=True, slots=True)
class Row:
    """A row of the right side: one text, or two beside each other; the sign says what a colour would."""

    tone: Tone
    text: str
    other: str | None = None
    other_tone: Tone = "plain"


@dataclass(frozen=True, slots=True)
class TreeRow:
    """A row of the left side: how deep it is, its name, and which item it is; None is a folder that did not change."""

    depth: int
    name: str
    index: int | None


_TONES: dict[str, Tone] = {"+": "plus", "-": "minus", "@": "hunk"}


def unified(item: CardItem) -> list[Row]:
    """The rows of an item: its diff under what there is to say."""
    rows = [Row("note", item.headline)]
    if item.marks:
        rows.append(Row("note", f"! {', '.join(mark.value for mark in item.marks)}"))
    if item.note:
        rows.append(Row("note", f"({item.note})"))
    return rows + [Row(_TONES.get(line[:1], "plain"), line) for line in item.diff]


def side_by_side(rows: Sequence[Row]) -> list[Row]:
    """Unified rows with what was on the left and what is on the right."""
    out: list[Row] = []
    gone: list[Row] = []
    come: list[Row] = []

    def flush() -> None:
        for number in range(max(len(gone), len(come))):
            left = gone[number].text if number < len(gone) else ""
            right = come[number].text if number < len(come) else ""
            out.append(Row("minus" if left else "empty", left, right, "plus" if right else "empty"))
        gone.clear()
        come.clear()

    for row in rows:
        if row.tone == "minus":
            if come:  # a deletion after an addition begins another pair
                flush()
            gone.append(row)
        elif row.tone == "plus":
            come.append(row)
        else:
            flush()
            out.append(row if row.tone in {"note", "hunk"} else Row("plain", row.text, row.text, "plain"))
    flush()
    return out


def byte_rows(size: int) -> int:
    """How many rows a content of so many bytes takes."""
    return -(-size // BYTES_A_ROW)


def byte_row(offset: int, data: bytes) -> Row:
    """One row of bytes, in hexadecimal and as text where they are printable ASCII."""
    numbers = " ".join(f"{byte:02x}" for byte in data)
    text = "".join(chr(byte) if 32 <= byte < 127 else "·" for byte in data)
    return Row("plain", f"{offset:08x}  {numbers:<{BYTES_A_ROW * 3 - 1}}  {text}")


def tree(paths: Sequence[str]) -> list[TreeRow]:
    """Sorted paths as a tree; a folder that did not change itself is a row of its own above what did."""
    rows: list[TreeRow] = []
    above: list[str] = []
    for index, path in enumerate(paths):
        *folders, name = path.split("/")
        common = 0
        while common < min(len(above), len(folders)) and above[common] == folders[common]:
            common += 1
        rows += [TreeRow(depth, f"{visible_name(folders[depth])}/", None) for depth in range(common, len(folders))]
        rows.append(TreeRow(len(folders), visible_name(name), index))
        above = [*folders, name]
    return rows

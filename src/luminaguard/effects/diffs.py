"""Unified diffs whose cost is bounded, whatever the two texts are.

``difflib`` looks for the best match, and texts can be made for which that takes minutes. Here, equal
lines at both ends are set aside first, in linear time; what is left is compared line by line only
while the product of its sizes is small. Beyond that the diff is coarse: all old lines go, all new ones
come. A coarse diff is longer than it has to be and hides nothing.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence

__all__ = ["unified"]

_CONTEXT = 3
_FINE = 400 * 400


def unified(old: Sequence[str], new: Sequence[str]) -> Iterator[str]:
    """The lines of a unified diff without its file header; nothing for equal texts."""
    head = _common(old, new)
    tail = _common(old[head:][::-1], new[head:][::-1])
    before, after = old[head : len(old) - tail], new[head : len(new) - tail]
    if not before and not after:
        return
    first = max(0, head - _CONTEXT)
    above, below = old[first:head], old[len(old) - tail : len(old) - tail + _CONTEXT]
    if len(before) * len(after) <= _FINE:
        lines = difflib.unified_diff([*above, *before, *below], [*above, *after, *below], lineterm="", n=_CONTEXT)
        for number, line in enumerate(lines):
            if number > 1:  # after the file header
                yield _moved(line, first) if line.startswith("@@") else line
        return
    count = len(above) + len(below)
    yield f"@@ -{first + 1},{count + len(before)} +{first + 1},{count + len(after)} @@"
    yield from (f" {line}" for line in above)
    yield from (f"-{line}" for line in before)
    yield from (f"+{line}" for line in after)
    yield from (f" {line}" for line in below)


def _common(a: Sequence[str], b: Sequence[str]) -> int:
    """How many lines both begin with."""
    count = 0
    for one, other in zip(a, b, strict=False):
        if one != other:
            break
        count += 1
    return count


def _moved(header: str, lines: int) -> str:
    """A hunk's header for texts that had ``lines`` more lines in front."""
    if not lines:
        return header
    words = header.split(" ")
    for index in (1, 2):
        sign, (start, _, length) = words[index][0], words[index][1:].partition(",")
        words[index] = f"{sign}{int(start) + lines}" + (f",{length}" if length else "")
    return " ".join(words)

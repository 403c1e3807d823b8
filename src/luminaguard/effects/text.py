"""Show untrusted text so that it cannot lie: what moves the cursor, hides or reorders is escaped."""

from __future__ import annotations

import re
import unicodedata

__all__ = ["hides_something", "mixes_scripts", "visible", "visible_name", "visible_text"]

_INVISIBLE_CATEGORIES = frozenset({"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"})
_LOOKALIKE_SCRIPTS = ("LATIN", "CYRILLIC", "GREEK", "ARMENIAN", "CHEROKEE")
_BLANK = frozenset("\u115f\u1160\u3164\uffa0\u2800\u034f\u17b4\u17b5")
_SELECTORS = ((0x180B, 0x180F), (0xFE00, 0xFE0F), (0xE0100, 0xE01EF))
"""Variation selectors: marks that change nothing to be seen, and can carry a whole message."""

_BETWEEN_WORDS = re.compile(r"[\W_]+")
_JOINER, _EMOJI_SELECTOR = "\u200d", "\ufe0f"
_SKIN_TONES = frozenset(map(chr, range(0x1F3FB, 0x1F400)))


def visible(text: str, *, keep_tab: bool = False) -> str:
    r"""Escape every character that a terminal would not show as itself.

    Control and format characters (bidirectional overrides and zero-width ones among them),
    unassigned and private code points, blanks that are no spaces, and bytes that are not UTF-8 come
    out as ``\x1b`` or ``\u202e``; a backslash stays itself.
    """
    if text.isascii() and text.isprintable():
        return text
    return "".join(
        c if _is_plain(c) or (keep_tab and c == "\t") or _belongs_to_emoji(text, index) else _escape(c)
        for index, c in enumerate(text)
    )


def visible_text(text: str) -> str:
    """Like :func:`visible`, for texts of several lines: newlines and tabs stay."""
    return "\n".join(visible(line, keep_tab=True) for line in text.split("\n"))


def visible_name(name: str) -> str:
    r"""Like :func:`visible`, for paths: a backslash is doubled, so that no name can look like an escape."""
    return visible(name.replace("\\", "\\\\"))


def hides_something(text: str) -> bool:
    """Whether :func:`visible` has anything to escape (a tab or newline counts)."""
    if text.isascii() and text.isprintable():
        return False
    return not all(_is_plain(c) or _belongs_to_emoji(text, index) for index, c in enumerate(text))


def mixes_scripts(text: str) -> bool:
    """Whether one of its words mixes alphabets whose letters look alike, as a Cyrillic letter among Latin ones."""
    return not text.isascii() and any(len(_scripts(word)) > 1 for word in _BETWEEN_WORDS.split(text))


def _scripts(word: str) -> set[str]:
    names = (unicodedata.name(c, "") for c in word if c.isalpha())
    return {script for name in names for script in _LOOKALIKE_SCRIPTS if name.startswith(script)}


def _is_plain(c: str) -> bool:
    if c in _BLANK or any(first <= ord(c) <= last for first, last in _SELECTORS):
        return False
    category = unicodedata.category(c)
    return category not in _INVISIBLE_CATEGORIES and (category != "Zs" or c == " ")


def _belongs_to_emoji(text: str, index: int) -> bool:
    """Whether this is the joiner between two emoji, or the one selector after one (unicode.org/reports/tr51).

    One such character after a symbol hides nothing; a run of them could.
    """
    if text[index] == _EMOJI_SELECTOR:
        return _is_symbol(text, index - 1)
    if text[index] != _JOINER or not _is_symbol(text, index + 1):
        return False
    before = index - 1
    if before >= 0 and (text[before] == _EMOJI_SELECTOR or text[before] in _SKIN_TONES):
        before -= 1
    return _is_symbol(text, before)


def _is_symbol(text: str, index: int) -> bool:
    return 0 <= index < len(text) and unicodedata.category(text[index]) == "So"


def _escape(c: str) -> str:
    code = ord(c)
    if 0xDC80 <= code <= 0xDCFF:
        return f"\\x{code - 0xDC00:02x}"
    if code <= 0xFF:
        return f"\\x{code:02x}"
    return f"\\u{code:04x}" if code <= 0xFFFF else f"\\U{code:08x}"

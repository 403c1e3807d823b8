"""Colours for lines of code, one line at a time: only what is on the screen is looked at."""

from __future__ import annotations

from functools import lru_cache

from pygments.lexer import Lexer
from pygments.lexers import get_lexer_for_filename
from pygments.token import Comment, Keyword, Literal, Name, Token, _TokenType
from pygments.util import ClassNotFound

__all__ = ["coloured", "lexer_for"]

_MOST = 300
_NAMES = frozenset({"bash", "c", "cpp", "css", "diff", "docker", "go", "html", "ini", "java", "javascript", "json",
                    "kotlin", "make", "markdown", "php", "python", "ruby", "rust", "sql", "swift", "toml", "typescript",
                    "xml", "yaml"})  # fmt: skip
"""Languages whose lexers take time that grows with the line; others have expressions that can be made to take long."""
_STYLES: tuple[tuple[_TokenType, str], ...] = (
    (Comment, "italic"), (Keyword, "bold"), (Name.Function, "underline"), (Name.Class, "underline"),
    (Literal.String, "syntax-string"), (Literal.Number, "syntax-number"),
)  # fmt: skip


@lru_cache(maxsize=64)
def lexer_for(name: str) -> Lexer | None:
    """The lexer for a file of this name; None for text that is not code."""
    try:
        lexer = get_lexer_for_filename(name.rpartition("/")[2], stripnl=False, ensurenl=False)
    except ClassNotFound:
        return None
    return lexer if _NAMES & set(lexer.aliases) else None


@lru_cache(maxsize=20_000)
def coloured(lexer: Lexer, line: str) -> tuple[tuple[str, str], ...]:
    """Pieces of a line, each with the name of its style; together they are the line."""
    if len(line) > _MOST:
        return ((line, ""),)
    pieces = tuple((text, _style(kind)) for kind, text in lexer.get_tokens(line) if text)
    return pieces if "".join(text for text, _ in pieces) == line else ((line, ""),)


def _style(kind: _TokenType) -> str:
    return next((style for parent, style in _STYLES if kind in parent), "") if kind is not Token.Text else ""

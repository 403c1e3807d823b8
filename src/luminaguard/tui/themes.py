"""Themes: dark, light, high contrast, and two whose signs a colour-blind person tells apart (blue and orange).

No information is in a colour alone: additions begin with +, deletions with -, what is loud with !.
"""

from __future__ import annotations

from textual.theme import Theme

__all__ = ["THEMES"]


def _theme(name: str, *, dark: bool, **colours: str) -> Theme:
    names = ("plus", "minus", "hunk", "note", "loud", "string", "number")
    variables = {f"lg-{key}": colours.pop(key) for key in names}
    return Theme(name=f"luminaguard-{name}", dark=dark, variables=variables, **colours)  # type: ignore[arg-type]  # colours by their names


THEMES = (
    _theme("dark", dark=True, primary="#6ea8fe", secondary="#9ec5fe", warning="#ffda6a", error="#ea868f",
           success="#75b798", accent="#a370f7", background="#14171c", surface="#1b1f26", panel="#252b34",
           foreground="#dde3ea", plus="#8fd19e", minus="#f1a7ad", hunk="#7fd1e0", note="#9aa5b1", loud="#ffda6a",
           string="#c3a6ff", number="#f0b37e"),
    _theme("light", dark=False, primary="#0a58ca", secondary="#0550ae", warning="#8a5a00", error="#b02a37",
           success="#146c43", accent="#6f42c1", background="#ffffff", surface="#f6f8fa", panel="#e9edf2",
           foreground="#1c2128", plus="#116329", minus="#a40e26", hunk="#055160", note="#57606a", loud="#8a5a00",
           string="#6639ba", number="#953800"),
    _theme("contrast", dark=True, primary="#ffffff", secondary="#ffffff", warning="#ffff00", error="#ff6060",
           success="#00ff00", accent="#00ffff", background="#000000", surface="#000000", panel="#1a1a1a",
           foreground="#ffffff", plus="#00ff00", minus="#ff6060", hunk="#00ffff", note="#ffffff", loud="#ffff00",
           string="#ff99ff", number="#ffcc66"),
    _theme("blue-orange", dark=True, primary="#56b4e9", secondary="#56b4e9", warning="#f0e442", error="#e69f00",
           success="#56b4e9", accent="#cc79a7", background="#15181d", surface="#1c2027", panel="#272d36",
           foreground="#e6e6e6", plus="#56b4e9", minus="#e69f00", hunk="#cc79a7", note="#a9b1ba", loud="#f0e442",
           string="#cc79a7", number="#f0e442"),
)  # fmt: skip

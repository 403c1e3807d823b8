"""A card as a web page: one file without scripts, that loads nothing from anywhere and can be kept or sent on."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape

from luminaguard.effects.render import Line

__all__ = ["page"]

_STYLES = (
    "body{font:14px/1.45 ui-monospace,monospace;margin:2em;background:Canvas;color:CanvasText;color-scheme:light dark}"
    "main{white-space:pre-wrap;overflow-wrap:anywhere}.title,.path{font-weight:bold}.loud{font-weight:bold;"
    "border-left:4px solid #c60;padding-left:.5em}.dim{opacity:.7}.plus{background:#2a78d633}"
    ".minus{background:#e0780033}.hunk{opacity:.7}div:empty::before{content:' '}"
)
# The page shows what came out of a machine: even if something in it were markup, it could load and run nothing.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"


def page(title: str, lines: Iterable[Line]) -> str:
    """The page of a card.

    Args:
        title: for the window.
        lines: as :func:`luminaguard.effects.render.render` makes them, with what stands above.

    Returns:
        A whole document of HTML; styles repeat what the text says, and say nothing alone.
    """
    body = "\n".join(f'<div class="{style}">{escape(text)}</div>' for style, text in lines)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{escape(_POLICY)}">\n'
        '<meta name="viewport" content="width=device-width">\n'
        f"<title>{escape(title)}</title><style>{_STYLES}</style></head>\n<body><main>{body}</main></body></html>\n"
    )

"""The two sides of a card: a tree of what changed, and one change; both draw only the rows that are seen."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from rich.cells import cell_len
from rich.segment import Segment
from rich.style import Style
from textual.binding import Binding, BindingType
from textual.events import Click
from textual.geometry import Size
from textual.message import Message
from textual.scroll_view import ScrollView
from textual.strip import Strip

from luminaguard.effects.marks import LOUD
from luminaguard.tui.desk import OpenCard, Raw
from luminaguard.tui.rows import BYTES_A_ROW, Row, TreeRow, byte_row, byte_rows, side_by_side, tree
from luminaguard.tui.syntax import coloured, lexer_for

__all__ = ["ChangeTree", "ChangeView"]

_SIGNS = {"create": "+", "modify": "~", "delete": "-", "mode": "m", "symlink": "@"}
_TONES = {"plus": "lg-plus", "minus": "lg-minus", "hunk": "lg-hunk", "note": "lg-note"}
_TAB = 4


class _Rows(ScrollView):
    """A view of many rows that keeps one of them current."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("pageup", "page_up", show=False), Binding("pagedown", "page_down", show=False),
        Binding("home", "scroll_home", show=False), Binding("end", "scroll_end", show=False),
    ]  # fmt: skip
    can_focus = True

    def style_of(self, name: str, *, bold: bool = False, reverse: bool = False) -> Style:
        """A style in a colour of the theme."""
        colour = self.app.theme_variables.get(name) or self.app.theme_variables.get("foreground")
        return Style(color=colour, bold=bold, reverse=reverse)

    def padded(self, segments: Sequence[Segment], style: Style | None = None) -> Strip:
        """A strip of the whole width, scrolled sideways as the view is."""
        strip = Strip(segments).apply_style(self.rich_style)
        x, width = self.scroll_offset.x, self.size.width
        return strip.crop_extend(x, x + width, style or self.rich_style)


class ChangeTree(_Rows):
    """The files of a changeset as a tree, or the parts of another effect as a list."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("up,k", "move(-1)", "Up", show=False), Binding("down,j", "move(1)", "Down", show=False),
        Binding("pageup", "move(-20)", show=False), Binding("pagedown", "move(20)", show=False),
        Binding("home", "first", show=False), Binding("end", "last", show=False),
        Binding("space", "leave_out", " Part", show=True),
    ]  # fmt: skip

    class Chosen(Message):
        """Another item is current."""

        def __init__(self, index: int) -> None:
            super().__init__()
            self.index = index

    class Toggled(Message):
        """An item is to be left out of the approval, or taken in again."""

        def __init__(self, index: int) -> None:
            super().__init__()
            self.index = index

    def __init__(self, card: OpenCard) -> None:
        super().__init__(id="tree")
        self.card = card
        flat = [TreeRow(0, path, index) for index, path in enumerate(card.paths)]
        self.rows = tree(card.paths) if card.changeset is not None else flat
        self.left_out: frozenset[int] = frozenset()
        self.current = next((number for number, row in enumerate(self.rows) if row.index is not None), 0)

    def on_mount(self) -> None:
        """Only now there is a size."""
        self.virtual_size = Size(max((self._width(row) for row in self.rows[:2000]), default=1), len(self.rows))
        self._tell()

    @staticmethod
    def _width(row: TreeRow) -> int:
        return row.depth * 2 + cell_len(row.name) + 6

    def render_line(self, y: int) -> Strip:
        """One row."""
        number = y + self.scroll_offset.y
        if number >= len(self.rows):
            return Strip.blank(self.size.width, self.rich_style)
        row = self.rows[number]
        current = number == self.current
        if row.index is None:
            return self.padded([Segment(f"   {'  ' * row.depth}{row.name}", self.style_of("lg-note"))])
        item = self.card.outline(row.index)
        loud = bool(LOUD & set(item.marks))
        kept = "[ ]" if row.index in self.left_out else "[x]" if self.left_out else "   "
        sign = _SIGNS.get(item.kind, "=")
        tone = {"+": "lg-plus", "-": "lg-minus"}.get(sign, "foreground")
        pointer = ">" if current else " "
        text = f"{'  ' * row.depth}{sign} {row.name}"
        segments = [
            Segment(f"{pointer}{kept if self.left_out else ''}", self.style_of("foreground")),
            Segment("!" if loud else " ", self.style_of("lg-loud", bold=True)),
            Segment(text, self.style_of(tone, reverse=current and self.has_focus, bold=current)),
        ]
        return self.padded(segments)

    def go_to(self, index: int) -> None:
        """Make an item current."""
        number = next(number for number, row in enumerate(self.rows) if row.index == index)
        self._set(number, 1)

    @property
    def index(self) -> int:
        """The item that is current."""
        found = self.rows[self.current].index if self.rows else None
        return found if found is not None else 0

    def _set(self, number: int, direction: int) -> None:
        number = max(0, min(len(self.rows) - 1, number))
        while 0 <= number < len(self.rows) and self.rows[number].index is None:
            number += direction
        if not 0 <= number < len(self.rows):
            return
        self.current = number
        if number < self.scroll_offset.y:
            self.scroll_to(y=number, animate=False, force=True)
        elif number >= self.scroll_offset.y + self.size.height:
            self.scroll_to(y=number - self.size.height + 1, animate=False, force=True)
        self.refresh()
        self._tell()

    def _tell(self) -> None:
        if self.rows:
            self.post_message(self.Chosen(self.index))

    def action_move(self, by: int) -> None:
        """Up or down."""
        self._set(self.current + by, 1 if by > 0 else -1)

    def action_first(self) -> None:
        """To the first item."""
        self._set(0, 1)

    def action_last(self) -> None:
        """To the last item."""
        self._set(len(self.rows) - 1, -1)

    def action_leave_out(self) -> None:
        """Leave the current item out, or take it in."""
        self.post_message(self.Toggled(self.index))

    def on_click(self, event: Click) -> None:
        """The mouse chooses; a second click on it toggles."""
        number = int(event.y + self.scroll_offset.y)
        if number < len(self.rows) and self.rows[number].index is not None:
            if number == self.current and self.has_focus:
                self.action_leave_out()
            self._set(number, 1)

    def watch_has_focus(self, value: bool) -> None:
        """The current row is shown otherwise."""
        super().watch_has_focus(value)
        self.refresh()


class ChangeView(_Rows):
    """One change: its diff, in one column or two; or its bytes."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("up,k", "scroll_up", show=False), Binding("down,j", "scroll_down", show=False),
        Binding("left,h", "scroll_left", show=False), Binding("right,l", "scroll_right", show=False),
    ]  # fmt: skip

    def __init__(self) -> None:
        super().__init__(id="change")
        self._unified: list[Row] = []
        self._rows: list[Row] = []
        self._raw: Raw | None = None
        self._name = ""
        self.two_columns = False
        self.wanted = ""
        self.at = -1
        """The row of the last match."""

    def show(self, name: str, rows: list[Row], raw: Raw | None) -> None:
        """Show a change; with ``raw`` its bytes under the rows."""
        self._name, self._unified, self._raw, self.at = name, rows, raw, -1
        self._lay_out()
        self.scroll_to(0, 0, animate=False, force=True)

    def toggle_columns(self) -> None:
        """One column, or two."""
        self.two_columns = not self.two_columns
        self._lay_out()

    def _lay_out(self) -> None:
        self._rows = side_by_side(self._unified) if self.two_columns else self._unified
        count = len(self._rows) + (byte_rows(self._raw.size) if self._raw else 0)
        widest = max((cell_len(row.text.expandtabs(_TAB)) for row in self._rows), default=1)
        if self.two_columns:  # each half shows a part of its text, and both are moved together
            widest = max([widest, *(cell_len((row.other or "").expandtabs(_TAB)) for row in self._rows)])
            widest += self.size.width - self._half
        self.virtual_size = Size(max(widest + _TAB, 80 if self._raw else 1), count)
        self.refresh()

    @property
    def _half(self) -> int:
        return max(10, (self.size.width - 1) // 2)

    def on_resize(self) -> None:
        """How far two columns can be moved depends on their width."""
        if self.two_columns:
            self._lay_out()

    def find_next(self, *, backwards: bool = False) -> bool:
        """Go to the next row that has the wanted text, without case; whether there is one."""
        wanted = self.wanted.casefold()
        start = self.at if self.at >= 0 or not backwards else len(self._rows)
        for number in range(start - 1, -1, -1) if backwards else range(start + 1, len(self._rows)):
            row = self._rows[number]
            if wanted in row.text.casefold() or (row.other is not None and wanted in row.other.casefold()):
                self.at = number
                self.scroll_to(y=number, animate=False, force=True)
                self.refresh()
                return True
        return False

    def render_line(self, y: int) -> Strip:
        """One row."""
        number = y + self.scroll_offset.y
        if number < len(self._rows):
            row = self._rows[number]
            if row.other is None:
                return self.padded(self._segments(row.text, row.tone))
            return self._columns(row)
        if self._raw is not None and (offset := (number - len(self._rows)) * BYTES_A_ROW) < self._raw.size:
            row = byte_row(offset, self._raw.read(offset, BYTES_A_ROW))
            return self.padded([Segment(row.text, self.style_of("foreground"))])
        return Strip.blank(self.size.width, self.rich_style)

    def _columns(self, row: Row) -> Strip:
        half, x, base = self._half, self.scroll_offset.x, self.rich_style
        left = Strip(self._segments(row.text, row.tone)).apply_style(base).crop_extend(x, x + half, base)
        other = Strip(self._segments(row.other or "", row.other_tone)).apply_style(base)
        right = other.crop_extend(x, x + self.size.width - half - 1, base)
        return Strip.join([left, Strip([Segment("│", self.style_of("lg-note"))]).apply_style(base), right])

    def _segments(self, text: str, tone: str) -> list[Segment]:
        text = text.expandtabs(_TAB)
        style = self.style_of(_TONES.get(tone, "foreground"), bold=tone == "note" and text.startswith("!"))
        if self.wanted and self.wanted.casefold() in text.casefold():
            return self._marked(text, style)
        lexer = lexer_for(self._name) if tone in {"plain", "plus", "minus"} and text[:1] in {" ", "+", "-"} else None
        if lexer is None:
            return [Segment(text, style)]
        segments = [Segment(text[:1], style)]
        for piece, kind in coloured(lexer, text[1:]):
            segments.append(Segment(piece, style + self._syntax(kind) if kind else style))
        return segments

    def _syntax(self, kind: str) -> Style:
        if kind.startswith("syntax-"):
            return self.style_of(f"lg-{kind.removeprefix('syntax-')}")
        return Style.parse(kind)

    def _marked(self, text: str, style: Style) -> list[Segment]:
        """What is searched for stands out."""
        segments, at, folded = [], 0, text.casefold()
        if len(folded) != len(text):  # a letter that folds to two: positions would not fit
            return [Segment(text, style + Style(reverse=True))]
        while (found := folded.find(self.wanted.casefold(), at)) >= 0:
            end = found + len(self.wanted)
            segments += [Segment(text[at:found], style), Segment(text[found:end], style + Style(reverse=True))]
            at = end
        return [*segments, Segment(text[at:], style)]

"""The inbox: all requests that wait."""

from __future__ import annotations

from typing import ClassVar

from rich.text import Text
from textual import work
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.widgets import DataTable, Footer, Label, Static
from textual.worker import get_current_worker

from luminaguard.actions.model import Severity
from luminaguard.approvals.model import Request
from luminaguard.approvals.words import duration
from luminaguard.effects.text import visible
from luminaguard.tui.review import Review
from luminaguard.tui.screens import POLL_S, CliffScreen, told

__all__ = ["Inbox"]


class Inbox(CliffScreen):
    """All requests that wait, the most severe first; other processes' come and go by themselves."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("enter", "open", " Open", priority=True), Binding("q,escape", "app.leave", " Quit"),
        Binding("t", "app.next_theme", " Theme"),
    ]  # fmt: skip

    def __init__(self) -> None:
        super().__init__()
        self._requests: dict[str, Request] = {}

    def compose(self) -> ComposeResult:
        """A table over the list of keys."""
        yield Label("Approval Cliff", id="title", markup=False)
        yield DataTable(cursor_type="row", zebra_stripes=False, id="inbox")
        yield Static("", id="empty", markup=False)
        yield Footer(show_command_palette=False, compact=True)

    def on_mount(self) -> None:
        """Fill the table, and keep it so."""
        table = self.query_one(DataTable)
        for name, width in (("severity", 10), ("age", 7), ("left", 7), ("effect", 9), ("what", 44), ("where", 60)):
            table.add_column(name, width=width, key=name)
        table.focus()
        self._load()
        self.set_interval(POLL_S, self._load)

    def on_screen_resume(self) -> None:
        """Back from a request."""
        self._load()

    @work(thread=True, exclusive=True, group="inbox")
    def _load(self) -> None:
        try:
            found, now = self.desk.waiting(), self.desk.now_ns()
        except Exception as error:  # noqa: BLE001  # whatever it is, the others go on waiting, and can be looked at
            self.app.call_from_thread(self._trouble, error)
            return
        if not get_current_worker().is_cancelled:
            self.app.call_from_thread(self._fill, found, now)

    def _trouble(self, error: Exception) -> None:
        self.query_one("#empty", Static).update(told(error))

    def _fill(self, found: list[Request], now_ns: int) -> None:
        table = self.query_one(DataTable)
        rows = {request.id: _row(request, now_ns) for request in found}
        if list(rows) != list(self._requests):
            at = self._at()
            table.clear()
            for key, row in rows.items():
                table.add_row(*row, key=key)
            if at in rows:
                table.move_cursor(row=list(rows).index(at))
        else:
            for key, row in rows.items():
                for name, value in zip(("severity", "age", "left"), row[:3], strict=True):
                    table.update_cell(key, name, value)
        self._requests = {request.id: request for request in found}
        words = "" if found else "Nothing waits for a decision. What comes appears here by itself."
        self.query_one("#empty", Static).update(words)
        self.query_one("#title", Label).update(f"Approval Cliff: {len(found)} waiting")

    def _at(self) -> str:
        keys = list(self._requests)
        row = self.query_one(DataTable).cursor_row
        return keys[row] if 0 <= row < len(keys) else ""

    def on_data_table_row_selected(self, _: DataTable.RowSelected) -> None:
        """The mouse, or Enter."""
        self.action_open()

    def action_open(self) -> None:
        """Open the request under the cursor."""
        if request := self._requests.get(self._at()):
            self.app.push_screen(Review(request))


def _row(request: Request, now_ns: int) -> tuple[Text, ...]:
    sign = {Severity.CRITICAL: "!!", Severity.HIGH: "!"}.get(request.judged.severity, "")
    words = (
        f"{sign}{request.judged.severity.value}", duration((now_ns - request.created_ns) / 1e9),
        duration((request.expires_ns - now_ns) / 1e9), request.effect, visible(" ".join(request.command))[:200],
        visible(request.workspace)[:200],
    )  # fmt: skip
    return tuple(map(Text, words))  # a string would be read as markup

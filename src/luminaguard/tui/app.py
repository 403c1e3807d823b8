"""The application: opens the inbox, or the one request that it was started for."""

from __future__ import annotations

import os
from pathlib import Path
from typing import ClassVar

from textual.app import App
from textual.binding import Binding, BindingType

from luminaguard.runtime.decisions import Answer
from luminaguard.tui.desk import Desk
from luminaguard.tui.inbox import Inbox
from luminaguard.tui.review import Review
from luminaguard.tui.themes import THEMES

__all__ = ["CliffApp"]


class CliffApp(App[Answer | None]):
    """The Approval Cliff in full screen; its result is the answer to the one request that it was opened for."""

    TITLE = "LuminaGuard"
    ENABLE_COMMAND_PALETTE = False
    CSS_PATH = Path(__file__).with_name("cliff.tcss")
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("t", "next_theme", " Theme", show=False),
        Binding("ctrl+c,ctrl+q", "leave", " Quit", show=False, priority=True),
    ]

    def __init__(self, desk: Desk, theme: str = "") -> None:
        super().__init__()
        self.desk = desk
        self._started_by = os.getppid()
        for one in THEMES:
            self.register_theme(one)
        names = [one.name for one in THEMES]
        self.theme = f"luminaguard-{theme}" if f"luminaguard-{theme}" in names else names[0]

    def see_through(self) -> Answer | None:
        """Run it; an error inside is raised here, after the terminal was put back, and not drawn over it."""
        answer = self.run()
        if self._exception is not None:  # textual has no public name for it
            raise self._exception
        return answer

    def _print_error_renderables(self) -> None:
        """Textual would print a traceback with all values in it."""

    def on_mount(self) -> None:
        """The first screen, and a look at signals now and then."""
        self.set_interval(0.1, self._watch)
        self.push_screen(Review(self.desk.only) if self.desk.only else Inbox())

    def _watch(self) -> None:
        # Whoever started this is gone, or a signal asks to end: the terminal is put back on the way out.
        if self.desk.ended() or os.getppid() != self._started_by:
            self.exit(None)

    def action_next_theme(self) -> None:
        """The next theme."""
        names = [one.name for one in THEMES]
        self.theme = names[(names.index(self.theme) + 1) % len(names)]
        self.notify(self.theme.removeprefix("luminaguard-"), timeout=1.5)

    def action_leave(self) -> None:
        """Leave; what waits goes on waiting."""
        self.exit(None)

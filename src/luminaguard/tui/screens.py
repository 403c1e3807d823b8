"""What the screens of this application share."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from textual.screen import Screen

from luminaguard.effects.text import visible
from luminaguard.errors import LuminaGuardError
from luminaguard.tui.desk import Desk

if TYPE_CHECKING:
    from luminaguard.tui.app import CliffApp

__all__ = ["POLL_S", "CliffScreen", "told"]

POLL_S = 0.5
"""How often a screen looks at what other processes did."""


class CliffScreen(Screen[None]):
    """A screen of this application."""

    @property
    def cliff(self) -> CliffApp:
        """The application, by its own type."""
        return cast("CliffApp", self.app)

    @property
    def desk(self) -> Desk:
        """What it works on."""
        return self.cliff.desk


def told(error: Exception) -> str:
    """What a person reads of an error."""
    if isinstance(error, LuminaGuardError):
        return visible(f"{error.message} {error.hint}")
    return visible(f"Something went wrong that was not foreseen: {error!r:.300}. The request stays as it was.")

"""Questions over the screen: a reason, a second step, how long a grant holds; and texts to read."""

from __future__ import annotations

from typing import ClassVar

from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Vertical, VerticalScroll
from textual.screen import ModalScreen
from textual.widgets import Input, Label, Static

__all__ = ["AskText", "ShowText"]


class AskText(ModalScreen[str | None]):
    """Ask for a line of text; None if the person changes their mind.

    Args:
        title, text: what is asked, and more about it.
        must_be: the one word that is taken, for a deliberate second step.
        initial: what stands there at first.
        secret: it is not shown while it is typed, and taken as it is.
    """

    BINDINGS: ClassVar[list[BindingType]] = [Binding("escape", "leave", "Back")]

    def __init__(
        self, title: str, text: str = "", *, must_be: str = "", initial: str = "", secret: bool = False
    ) -> None:
        super().__init__()
        self._title, self._text, self._must_be, self._initial = title, text, must_be, initial
        self._secret = secret

    def compose(self) -> ComposeResult:
        """The box."""
        with Vertical(classes="dialog"):
            yield Label(self._title, classes="dialog-title", markup=False)
            if self._text:
                with VerticalScroll(classes="dialog-text"):
                    yield Static(self._text, markup=False)
            yield Input(self._initial, placeholder=self._must_be, password=self._secret)
            yield Label("Enter to go on, Esc to go back", classes="dim", markup=False)

    def on_mount(self) -> None:
        """Type at once."""
        self.query_one(Input).focus()

    def on_input_submitted(self, event: Input.Submitted) -> None:
        """Enter."""
        if self._must_be and event.value.strip() != self._must_be:
            self.notify(f"Type {self._must_be!r}, or press Esc.", severity="warning", markup=False)
            return
        self.dismiss(event.value if self._secret else event.value.strip())

    def action_leave(self) -> None:
        """Esc."""
        self.dismiss(None)


class ShowText(ModalScreen[None]):
    """A text to read: what happened so far, why the rules came to this."""

    BINDINGS: ClassVar[list[BindingType]] = [Binding("escape,q,enter,i", "leave", "Back")]

    def __init__(self, title: str, text: str) -> None:
        super().__init__()
        self._title, self._text = title, text

    def compose(self) -> ComposeResult:
        """The box."""
        with Vertical(classes="dialog tall"):
            yield Label(self._title, classes="dialog-title", markup=False)
            with VerticalScroll(classes="dialog-text"):
                yield Static(self._text, markup=False)
            yield Label("Esc to go back", classes="dim", markup=False)

    def action_leave(self) -> None:
        """Esc."""
        self.dismiss(None)

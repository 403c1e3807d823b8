"""Opening the full-screen interface where the terminal can show it, and the plain question where it cannot."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

from luminaguard.approvals.model import Request
from luminaguard.cli import signals
from luminaguard.cli.signals import Interrupted
from luminaguard.runtime import Runtime
from luminaguard.runtime.decisions import Answer

__all__ = ["can_open", "open_inbox", "review"]

_SMALLEST = (60, 15)


def can_open(runtime: Runtime) -> bool:
    """Whether there is a terminal for a full-screen interface, and it is wanted."""
    if runtime.settings.interface != "full" or not (sys.stdin.isatty() and sys.stderr.isatty()):
        return False
    size = os.get_terminal_size(sys.stderr.fileno())
    capable = os.environ.get("TERM", "dumb") not in {"dumb", "unknown", ""}
    return capable and size.columns >= _SMALLEST[0] and size.lines >= _SMALLEST[1]


def review(runtime: Runtime, request: Request) -> Answer | None:
    """Look at one request in full screen; None leaves it waiting.

    Raises:
        Interrupted: a signal asked to end meanwhile; the terminal was put back first.
    """
    from luminaguard.tui.app import CliffApp
    from luminaguard.tui.desk import Desk

    with signals.held() as held:
        answer = CliffApp(Desk(runtime, request, held.waits), runtime.settings.theme).see_through()
        if number := held.take():
            raise Interrupted(number)
    return answer


def open_inbox(runtime: Runtime) -> None:
    """Open the inbox; without a capable terminal, ask about one request after the other."""
    from luminaguard.cli.output import tell_recovered

    tell_recovered(runtime.decisions.recover())
    if not can_open(runtime):
        _one_by_one(runtime)
        return
    from luminaguard.tui.app import CliffApp
    from luminaguard.tui.desk import Desk

    with signals.held() as held:
        CliffApp(Desk(runtime, ended=held.waits), runtime.settings.theme).see_through()


def _one_by_one(runtime: Runtime) -> None:
    from luminaguard.cli.execute import show_card
    from luminaguard.cli.output import Progress
    from luminaguard.cli.prompt import ask
    from luminaguard.errors import LuminaGuardError, SettingsError
    from luminaguard.tui.desk import Desk

    if not sys.stdin.isatty():
        raise SettingsError(
            "There is no terminal to ask at.", hint="Use 'luminaguard approvals list', 'show', 'approve' and 'deny'."
        )
    desk, progress = Desk(runtime), Progress()
    waiting = desk.waiting()
    for request in waiting:
        show_card(runtime, request, progress)
        answer = ask(request, _again(runtime, request, progress), runtime)
        if answer is None:
            continue
        try:
            sys.stderr.write(f"{desk.carry_out(request, answer)}\n")
        except LuminaGuardError as error:
            from luminaguard.cli.output import print_error

            print_error(error, as_json=False)
    if not waiting:
        sys.stderr.write("nothing waits for a decision\n")


def _again(runtime: Runtime, request: Request, progress: object) -> Callable[[], None]:
    from luminaguard.cli.execute import show_card
    from luminaguard.cli.output import Progress

    assert isinstance(progress, Progress)
    return lambda: show_card(runtime, request, progress, full=True)

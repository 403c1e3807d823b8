"""The plain question at a terminal, for where the full-screen interface is not wanted or not possible."""

from __future__ import annotations

import sys
import termios
from collections.abc import Callable

from luminaguard.actions.model import Severity
from luminaguard.approvals.model import Request, Verdict
from luminaguard.cli.signals import Interrupted
from luminaguard.effects.changes import Changeset
from luminaguard.effects.text import visible, visible_name
from luminaguard.errors import ChangesetRefused
from luminaguard.runtime.decisions import Answer

__all__ = ["ask"]

_CONFIRM = "publish"
_NO = {"n": Verdict.DENY, "a": Verdict.RETURN, "s": Verdict.STOP}


def ask(request: Request, show_all: Callable[[], None], changeset: Callable[[str], Changeset]) -> Answer | None:
    """Ask about a request; None leaves it pending.

    Args:
        request: it must have been shown.
        show_all: shows its card with whole diffs.
        changeset: gives the changeset of a request's id, for an answer about a part.
    """
    files = request.effect == "changeset"
    asked = f"Publish exactly this to {visible(request.workspace)}?" if files else "Let exactly this happen, once?"
    question = (
        f"\n{asked}\n[y]es, [n]o, {'[p]art of it, ' * files}[a]sk for changes, [s]top the task, [f]ull diffs, [l]ater\n"
        "(n, a and s take a text for the agent behind them): "
    )
    try:
        while True:
            word, _, text = _read(question).partition(" ")
            match word.lower():
                case "y" | "yes" if not text:
                    if _confirmed(request):
                        return Answer(Verdict.APPROVE, "terminal")
                case "n" | "no" | "a" | "ask" | "s" | "stop" as no:
                    return Answer(_NO[no[0]], "terminal", reason=text.strip())
                case "p" | "part" if files:
                    chosen = _part(changeset(request.id))
                    if chosen and _confirmed(request):
                        return Answer(Verdict.APPROVE, "terminal", part=chosen)
                case "f" | "full":
                    show_all()
                case "l" | "later" | "q":
                    return None
    except Interrupted:
        sys.stderr.write("\n")
    except EOFError:
        pass
    return None


def _confirmed(request: Request) -> bool:
    """The second step that what is critical takes."""
    if request.judged.severity is not Severity.CRITICAL:
        return True
    return _read(f"This is CRITICAL: {visible(request.judged.reason)}\nType '{_CONFIRM}' to go on: ") == _CONFIRM


def _part(changeset: Changeset) -> tuple[str, ...]:
    """Ask file by file; nothing if what was chosen cannot be published alone."""
    chosen = []
    for number, change in enumerate(changeset.changes, 1):
        label = f"  {number}/{len(changeset)} {change.kind} {visible_name(change.path)}: [y]es, [N]o, [q]uit choosing: "
        answer = _read(label).lower()
        if answer in {"q", "quit"}:
            return ()
        if answer in {"y", "yes"}:
            chosen.append(change.path)
    try:
        part = changeset.part(chosen)
    except ChangesetRefused as error:
        sys.stderr.write(f"{visible(error.message)} {visible(error.hint)}\n")
        return ()
    sys.stderr.write(f"{len(part)} of {len(changeset)} changes; the others are discarded\n")
    return tuple(change.path for change in part.changes)


def _read(question: str) -> str:
    """One answer; keys typed before the question stood there answer nothing. Raises EOFError at the end of input."""
    termios.tcflush(sys.stdin.fileno(), termios.TCIFLUSH)
    sys.stderr.write(question)
    sys.stderr.flush()
    answer = sys.stdin.readline()
    if not answer:
        raise EOFError
    return answer.strip()

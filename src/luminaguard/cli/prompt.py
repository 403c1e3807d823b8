"""The plain question at a terminal, for where the full-screen interface is not wanted or not possible."""

from __future__ import annotations

import getpass
import sys
import termios
from collections.abc import Callable
from dataclasses import replace

from luminaguard.actions.model import Severity
from luminaguard.approvals.model import Request, Verdict
from luminaguard.approvals.words import CONFIRM
from luminaguard.cli.signals import Interrupted
from luminaguard.effects.changes import Changeset
from luminaguard.effects.text import visible, visible_name
from luminaguard.errors import ChangesetRefused, LuminaGuardError
from luminaguard.runtime import Runtime
from luminaguard.runtime.decisions import Answer

__all__ = ["ask"]

_NO = {"n": Verdict.DENY, "a": Verdict.RETURN, "s": Verdict.STOP}


def ask(request: Request, show_all: Callable[[], None], runtime: Runtime) -> Answer | None:
    """Ask about a request; None leaves it pending.

    Args:
        request: it must have been shown.
        show_all: shows its card with whole diffs.
        runtime: knows the changeset, for an answer about a part, and the people who may answer.
    """
    files = request.effect == "changeset"
    asked = f"Publish exactly this to {visible(request.workspace)}?" if files else "Let exactly this happen, once?"
    question = (
        f"\n{asked}\n[y]es, [n]o, {'[p]art of it, ' * files}[a]sk for changes, [s]top the task, [f]ull diffs, [l]ater\n"
        "(n, a and s take a text for the agent behind them; 'as NAME' answers as another person): "
    )
    given = Answer(Verdict.APPROVE, "terminal")
    try:
        while True:
            word, _, text = _read(question).partition(" ")
            match word.lower():
                case "y" | "yes" if not text:
                    if _confirmed(request):
                        return given
                case "n" | "no" | "a" | "ask" | "s" | "stop" as no:
                    return replace(given, verdict=_NO[no[0]], reason=text.strip())
                case "p" | "part" if files:
                    chosen = _part(runtime.approvals.changeset(request.id))
                    if chosen and _confirmed(request):
                        return replace(given, part=chosen)
                case "as" if text:
                    given = _as_person(runtime, text.strip(), given)
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
    return _read(f"This is CRITICAL: {visible(request.judged.reason)}\nType '{CONFIRM}' to go on: ") == CONFIRM


def _as_person(runtime: Runtime, name: str, given: Answer) -> Answer:
    """The answer as another person's; as it was if they are not who they say."""
    try:
        key = runtime.decisions.unlock(name, getpass.getpass(f"Passphrase of {visible(name)}: "))
    except LuminaGuardError as error:
        sys.stderr.write(f"{visible(error.message)} {visible(error.hint)}\n")
        return given
    return replace(given, person=name, key=key)


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

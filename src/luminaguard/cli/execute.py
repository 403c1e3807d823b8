"""``luminaguard exec`` and ``shell``: run, show the card, ask, publish."""

from __future__ import annotations

import os
import select
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anyio

from luminaguard.approvals.model import State, Verdict
from luminaguard.approvals.words import answered, heading, judged_json
from luminaguard.cli import signals
from luminaguard.cli.inbox import can_open, review
from luminaguard.cli.output import Progress, error_fields, print_lines, print_outcome, tell_recovered
from luminaguard.cli.prompt import ask
from luminaguard.cli.relay import Relay, terminal_size
from luminaguard.cli.signals import Held, Interrupted
from luminaguard.effects.text import visible
from luminaguard.errors import (
    EXIT_DENIED,
    EXIT_PENDING,
    EXIT_REFUSED,
    EXIT_TIMEOUT,
    ApprovalNeeded,
    Forbidden,
    LuminaGuardError,
    PolicyChanged,
    first_of,
)
from luminaguard.runtime import Execution, Runtime
from luminaguard.runtime.decisions import Answer

if TYPE_CHECKING:
    from luminaguard.approvals import Request
    from luminaguard.effects.render import Line
    from luminaguard.microvm.machine import Command

__all__ = ["Options", "card_lines", "execute", "show_card"]

_NOT_FOUND, _NOT_EXECUTABLE = 127, 126
_TERMINAL_RESET = (
    "\x18\x1b\\\x1b[?1049l\x1b[!p\x1b[r\x1b(B\x1b)B\x0f\x1b[?7h\x1b[?25h\x1b]104\x07\x1b]110\x07\x1b]111\x07\x1b[0m\r\n"
)
"""The command had the terminal: end a started sequence, leave the alternate screen, and put back
scroll region, character sets, palette, colours and cursor (xterm's ctlseqs), or it could redraw the card."""
_START_FAILURES = {"not-found": _NOT_FOUND, "not-executable": _NOT_EXECUTABLE}


class Options:
    """The flags of one call."""

    def __init__(
        self, *, publish: str, as_json: bool, terminal: bool, task: str = "", taint: tuple[str, ...] = ()
    ) -> None:
        self.publish = publish
        self.task, self.taint = task, taint
        self.as_json = as_json
        self.terminal = terminal


def execute(runtime: Runtime, workspace: Path, argv: list[str], options: Options, held: Held) -> int:
    """Run one command and see its effects through; return the exit status."""
    from luminaguard.microvm.channel import CallFailed
    from luminaguard.microvm.machine import Command

    size = terminal_size() if options.terminal and not options.as_json else None
    capture = _Capture(runtime.settings.capture_max_mib << 20) if options.as_json else None
    environment = {"TERM": os.environ.get("TERM", "dumb")} if size else {}
    command = Command(argv, terminal=size, environment=environment, processes=runtime.settings.processes,
                      profile=runtime.settings.profile)  # fmt: skip
    progress = Progress(quiet=options.as_json)
    try:
        status = _see_through(runtime, workspace, command, options, capture, progress, held)
        while status is None:  # a rule wanted to be asked first, and a person said yes
            status = _see_through(runtime, workspace, command, options, capture, progress, held)
    except CallFailed as error:
        status = _not_started(error.code, error.message, argv[0], capture)
    except LuminaGuardError as error:
        if capture is None:
            raise
        print_outcome(_without_result(capture, error.exit_code, error_fields(error)))
        status = error.exit_code
    finally:
        progress.clear()
    number = held.take()
    signals.over()
    return 128 + number if number else status


def _see_through(
    runtime: Runtime, workspace: Path, command: Command, options: Options, capture: _Capture | None,
    progress: Progress, held: Held,
) -> int | None:  # fmt: skip
    """Run it and settle its effects; None if it did not run yet, and may now."""
    execution: Execution | None = None
    try:
        with held.passing():
            try:
                execution, number = anyio.run(_run, runtime, workspace, command, options, capture, progress, held)
            except LuminaGuardError as error:
                # A signal to the process group ends what helps us, too, such as mksquashfs.
                if number := held.take():
                    raise Interrupted(number) from error
                raise
        progress.clear()
        if execution is None or number:
            raise Interrupted(number)
        tell_recovered(execution.recovered)
        if execution.detail and capture is None and not (execution.outcome.timed_out or execution.refusal):
            sys.stderr.write(f"note: {execution.detail}\n")
        status = _settle(runtime, execution, options, progress, held)
    except Interrupted as interrupted:
        signals.over()  # a second one must not contradict what is told of the first
        held.take()
        progress.clear()
        _tell_interrupted(interrupted, execution, capture)
        return interrupted.exit_code
    except ApprovalNeeded as needed:
        progress.clear()
        if not _allowed_to_run(runtime, needed, options, progress, held):
            raise
        return None
    except LuminaGuardError as error:
        if capture is None or execution is None:
            raise
        execution.status, execution.detail = "refused", error.message
        print_outcome(_as_json(execution, capture) | {"error": error_fields(error)})
        return error.exit_code
    if capture is not None:
        print_outcome(_as_json(execution, capture))
    return status


def _allowed_to_run(runtime: Runtime, needed: ApprovalNeeded, options: Options, progress: Progress, held: Held) -> bool:
    """Ask whether a command may run at all, where there is somebody to ask; no flag answers that."""
    if options.as_json or not (sys.stdin.isatty() and sys.stderr.isatty()):
        return False
    request = runtime.approvals.get(needed.request_id)
    full = can_open(runtime)
    with held.raising():
        if not full:
            show_card(runtime, request, progress)
        answer = _ask_person(runtime, request, progress, full=full)
    if answer is None:
        return runtime.approvals.get(request.id).state is State.APPROVED
    if answer.verdict is not Verdict.APPROVE:
        runtime.decisions.deny(request, answer)
        raise Forbidden(f"{answered(answer.verdict, answer.reason)}.", hint="It did not run.", kept="Nothing ran.")
    return runtime.decisions.approve_and_hand_over(request, answer).state is State.APPROVED


def _tell_interrupted(interrupted: Interrupted, execution: Execution | None, capture: _Capture | None) -> None:
    pending = execution.request.id if execution and execution.request else ""
    if capture is not None:
        words = {"type": "Interrupted", "message": "The command was interrupted."}
        told = _without_result(capture, interrupted.exit_code, words, pending)
        print_outcome(told | {"status": "pending"} if pending else told)
        return
    sys.stderr.write("interrupted: the machine was destroyed; nothing was published\n")
    if pending:
        sys.stderr.write(f"its effects wait for a decision: {pending}\n")


async def _run(
    runtime: Runtime, workspace: Path, command: Command, options: Options, capture: _Capture | None,
    progress: Progress, held: Held,
) -> tuple[Execution | None, int]:  # fmt: skip
    """Run it; return what came of it, if anything, and the signal that ended it, or 0."""
    relay = Relay(terminal=command.terminal is not None)
    interrupted = 0
    result: Execution | None = None

    async def watch(scope: anyio.CancelScope) -> None:
        nonlocal interrupted
        while not interrupted:
            number = await held.next()
            if not await relay.signal(number):
                interrupted = number
        scope.cancel()

    unread: set[int] = set()

    async def output(stream: int, data: bytes) -> None:
        progress.clear()
        if capture is not None:
            capture.add(stream, data)
        elif stream not in unread:
            try:
                await _write(1 if stream == 1 else 2, data)
            except BrokenPipeError:  # as in `exec ... | head -1`: its effects are wanted all the same
                unread.add(stream)
                await relay.hang_up()
            except OSError as error:  # such as a full disk, which is no reason for the command to end
                unread.add(stream)
                if stream == 1:
                    sys.stderr.write(f"note: standard output cannot be written any more: {error.strerror}\n")

    try:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(watch, tasks.cancel_scope)
            result = await runtime.exec(workspace, command, output=output, feed=relay.feed, progress=progress,
                                        task=options.task, taint=options.taint)  # fmt: skip
            tasks.cancel_scope.cancel()
    except BaseExceptionGroup as group:
        if not interrupted:  # what fails of an interrupted command fails because of that
            raise first_of(group) from None
    return result, interrupted


async def _write(fd: int, data: bytes) -> None:
    """Write all of it; a slow reader slows the command down, by the credit that it is not given.

    No thread: one that is stuck in a write would keep this process from ending at a time limit.
    """
    view = memoryview(data)
    while view:
        try:
            await anyio.wait_writable(fd)
            most = select.PIPE_BUF  # so much a ready pipe takes without blocking
        except OSError:  # such as a regular file, which epoll refuses: writing it does not block
            most = len(view)
        view = view[os.write(fd, view[:most]) :]


class _Capture:
    """Both outputs for ``--json``, the first ``limit`` bytes of each."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._data = {1: bytearray(), 2: bytearray()}
        self.truncated = False

    def add(self, stream: int, data: bytes) -> None:
        room = self._limit - len(self._data[stream])
        self.truncated |= len(data) > room
        self._data[stream] += data[:room]

    def text(self, stream: int) -> str:
        return self._data[stream].decode("utf-8", "replace")


def _settle(runtime: Runtime, execution: Execution, options: Options, progress: Progress, held: Held) -> int:
    """Show the card, get a decision where one is due, publish; return the exit status."""
    request = execution.request
    if execution.outcome.timed_out:
        if not options.as_json:
            sys.stderr.write("timed out: the machine was destroyed; its changes were discarded\n")
        return EXIT_TIMEOUT
    if execution.outcome.out_of_memory and not options.as_json:
        sys.stderr.write("note: the command ran out of memory; try a larger --memory\n")
    if request is None:
        if execution.refusal is not None:
            raise execution.refusal
        return execution.outcome.exit_code
    full = not options.as_json and can_open(runtime)
    with held.raising():
        if not options.as_json and not full:
            show_card(runtime, request, progress)
        answer = _answer(runtime, request, options, progress, full=full)
    while True:
        # From here on signals wait: what is decided is seen through, and told.
        try:
            return _carry_out(runtime, execution, request, answer, options, progress)
        except PolicyChanged as changed:
            if options.as_json or answer is None or answer.means != "terminal":
                raise
            sys.stderr.write(f"note: {visible(changed.message)}\n")
            request = execution.requests[0] = runtime.approvals.get(request.id)
            with held.raising():
                if not full:
                    show_card(runtime, request, progress)
                answer = _answer(runtime, request, options, progress, full=full)


def _carry_out(
    runtime: Runtime, execution: Execution, request: Request, answer: Answer | None, options: Options,
    progress: Progress,
) -> int:  # fmt: skip
    """Do what was answered; return the exit status."""

    def told(text: str) -> None:
        if not options.as_json:
            sys.stderr.write(text)

    if answer is None and (request := runtime.approvals.get(request.id)).state is not State.PENDING:
        return _answered_there(runtime, execution, request, told)
    if answer is None:
        told(f"pending: {request.id}\n  decide with: luminaguard approvals approve {request.id}   (or: deny)\n")
        return EXIT_PENDING
    if answer.verdict is not Verdict.APPROVE:
        runtime.decisions.deny(request, answer)
        execution.status, execution.detail = "denied", answer.reason
        told(f"{answered(answer.verdict, answer.reason)}; nothing was published\n")
        return execution.outcome.exit_code if options.publish == "never" else EXIT_DENIED
    with progress.slowly("publishing") as step:
        request = runtime.decisions.approve_and_publish(request, answer, step=step)
    if request.state is State.PENDING:
        told(f"pending: {request.id} needs the approval of another person, too\n"
             f"  decide with: luminaguard approvals approve {request.id} --as NAME\n")  # fmt: skip
        return EXIT_PENDING
    execution.status = "published"
    count = len(execution.changeset if answer.part is None else answer.part)
    by = f" by {visible(answer.means)}" if answer.person in {"rule", "grant"} else ""
    told(f"published {count} changes to {visible(request.workspace)}{by}\n")
    return execution.outcome.exit_code


def _answered_there(runtime: Runtime, execution: Execution, request: Request, told: Callable[[str], None]) -> int:
    """It was answered in the interface itself, or by another process meanwhile; return the exit status."""
    outcome = visible(runtime.approvals.outcome(request.id) or request.state.value)
    if request.state is State.PUBLISHED:
        execution.status = "published"
        told(f"{outcome}: {visible(request.workspace)}\n")
        return execution.outcome.exit_code
    if request.state in {State.APPROVED, State.CLAIMED, State.UNKNOWN}:
        execution.detail = "its outcome is not known"
        told(f"{request.state.value}: {outcome}; look at it with: luminaguard approvals show {request.id}\n")
        return EXIT_REFUSED
    execution.status, execution.detail = "denied", outcome
    told(f"{request.state.value}: {outcome}; nothing was published\n")
    return EXIT_REFUSED if request.state is State.REFUSED else EXIT_DENIED


def _answer(runtime: Runtime, request: Request, options: Options, progress: Progress, *, full: bool) -> Answer | None:
    """The answer: of a flag, of a rule or a grant that a person gave before, or of the person at the terminal."""
    if options.publish == "always":
        note = os.environ.get("LUMINAGUARD_DECISION_NOTE", "")
        said = f" ({ascii(note)[1:-1][:80]})" if note else ""
        return Answer(Verdict.APPROVE, f"flag --publish always{said}")
    if options.publish == "never":
        return Answer(Verdict.DENY, "flag --publish never")
    if answer := runtime.decisions.without_asking(request):
        return answer
    if options.as_json or not (sys.stdin.isatty() and sys.stderr.isatty()):
        return None
    return _ask_person(runtime, request, progress, full=full)


def _ask_person(runtime: Runtime, request: Request, progress: Progress, *, full: bool) -> Answer | None:
    if full:
        return review(runtime, request)
    return ask(request, lambda: show_card(runtime, request, progress, full=True), runtime)


def show_card(runtime: Runtime, request: Request, progress: Progress, *, full: bool = False) -> None:
    """Print the card of a request to standard error."""
    with progress.slowly("making the card"):
        lines = card_lines(runtime, request, full=full)
    if sys.stderr.isatty():
        sys.stderr.write(_TERMINAL_RESET)
    print_lines([("plain", ""), *lines])


def card_lines(runtime: Runtime, request: Request, *, full: bool) -> list[Line]:
    """The card of a request under what asks for it; ``full`` shows whole diffs."""
    from luminaguard.effects.render import render

    card = runtime.decisions.card(request)
    approved_by = [d.person for d in runtime.approvals.decisions(request.id) if d.verdict is Verdict.APPROVE]
    told = heading(request, runtime.ledger.current_time(), approved_by)
    return [*told, *render(card, max_diff_lines=None if full else 40)]


def _not_started(code: str, message: str, name: str, capture: _Capture | None) -> int:
    status = _START_FAILURES.get(code, EXIT_REFUSED)
    shown = ascii(name)[1:-1][:200]
    hint = {
        "not-found": "The guest has bash, coreutils, git, jq and python3; other programs belong into the workspace.",
        "not-executable": "Set its executable bit, or name its interpreter.",
    }.get(code, "See 'luminaguard doctor'.")
    text = {
        "not-found": "was not found in the machine",
        "not-executable": "cannot be executed in the machine",
    }
    sentence = f"'{shown}' {text.get(code, f'could not be started ({code}: {ascii(message)[1:-1][:200]})')}."
    if capture is not None:
        words = {"type": "CommandNotStarted", "message": sentence, "hint": hint}
        print_outcome(_without_result(capture, status, words) | {"status": "unchanged"})
    else:
        sys.stderr.write(f"error: {sentence}\n  hint: {hint}\n")
    return status


def _without_result(
    capture: _Capture, exit_code: int, error: dict[str, str], request_id: str | None = None
) -> dict[str, Any]:
    """The JSON object of a command that came to no result: what it printed until then is in it."""
    return {
        "status": "refused", "exit_code": exit_code, "stdout": capture.text(1), "stderr": capture.text(2),
        "truncated": capture.truncated, "request_id": request_id or None, "changeset": None, "vm": None,
        "error": error,
    }  # fmt: skip


def _as_json(execution: Execution, capture: _Capture) -> dict[str, Any]:
    return {
        "status": execution.status,
        "exit_code": EXIT_TIMEOUT if execution.outcome.timed_out else execution.outcome.exit_code,
        "stdout": capture.text(1),
        "stderr": capture.text(2),
        "truncated": capture.truncated,
        "request_id": execution.request.id if execution.request else None,
        "changeset": {"digest": execution.changeset.digest, "changes": execution.changeset.to_json()},
        "vm": {"id": execution.vm_id, "backend": execution.backend, "accelerator": execution.accelerator,
               "spawn_ms": execution.spawn_ms, "jail": execution.jail},
        "timings_ms": execution.timings_ms,
        "detail": execution.detail,
        "judged": judged_json(execution.request.judged) if execution.request else None,
    }  # fmt: skip

"""``luminaguard run`` and ``tasks resume``: watch an agent at work, and answer what it asks."""

from __future__ import annotations

import sys
import termios
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import anyio

from luminaguard.approvals.model import Request, State, Verdict
from luminaguard.approvals.words import answered
from luminaguard.cli import signals
from luminaguard.cli.execute import show_card
from luminaguard.cli.inbox import can_open, review
from luminaguard.cli.output import Progress, print_outcome, tell_recovered
from luminaguard.cli.prompt import ask
from luminaguard.cli.signals import Held, Interrupted
from luminaguard.cli.tasks import BY_MODEL, SHOWN, task_json, text_of
from luminaguard.effects.text import visible, visible_text
from luminaguard.errors import (
    EXIT_DENIED,
    EXIT_PENDING,
    EXIT_REFUSED,
    PolicyChanged,
    SettingsError,
    TaskBusy,
    TaskError,
    first_of,
)
from luminaguard.reasoning.budget import Budget, parse_budget
from luminaguard.reasoning.messages import Message, ToolCall
from luminaguard.runtime import Runtime
from luminaguard.runtime.decisions import Answer
from luminaguard.runtime.models import check_models, open_models
from luminaguard.runtime.tasks import LocalTasks
from luminaguard.tasks.model import ENDED, Status, Task, open_calls
from luminaguard.tasks.ports import Evaluated, Watcher
from luminaguard.tools import IN_MACHINE

__all__ = ["replay", "resume", "start"]

_EXIT = {Status.FINISHED: 0, Status.WAITING: EXIT_PENDING, Status.DENIED: EXIT_DENIED, Status.STOPPED: EXIT_DENIED,
         Status.CANCELLED: EXIT_DENIED, Status.PAUSED: EXIT_REFUSED, Status.FAILED: EXIT_REFUSED}  # fmt: skip


def start(
    runtime: Runtime, prompt: str, workspace: Path, held: Held, *, publish: str, max_turns: int | None,
    budget: list[str], as_json: bool,
) -> int:  # fmt: skip
    """Begin a task and see it through; return the exit status."""
    if publish not in {"on-finish", "per-action", "never"}:
        raise SettingsError(f"--publish {publish!a} is unknown.", hint="It is on-finish, per-action or never.")
    limits, models = parse_budget(budget), _absolute_scripts(runtime.settings.model)
    check_models(models)
    tell_recovered(runtime.decisions.recover())
    tasks = runtime.agent_tasks
    tasks.collect()
    task = Task(
        tasks.new_id(), text_of(prompt), str(workspace), models, runtime.ledger.current_time(),
        publish=publish, home=runtime.host, budget=limits,  # type: ignore[arg-type]  # one of them, just checked
    )  # fmt: skip
    if max_turns is not None:
        task = replace(task, max_turns=max_turns)
    return _see_through(runtime, task, held, as_json=as_json, new=True)


def _absolute_scripts(models: str) -> str:
    """The same models wherever the task is resumed."""
    words = [word.strip() for word in models.split(",")] if models else []
    return ",".join(f"script:{Path(word[7:]).absolute()}" if word.startswith("script:") else word for word in words)


def resume(
    runtime: Runtime, task_id: str, held: Held, *, model: str, max_turns: int | None, budget: list[str], as_json: bool
) -> int:
    """Go on with a task; return the exit status."""
    tell_recovered(runtime.decisions.recover())
    tasks = runtime.agent_tasks
    task = tasks.engine.get(task_id)
    if task.status in ENDED:
        raise TaskError(f"{task_id} has ended: it is {task.status.value}.", hint="Begin another task.")
    tasks.check_folder(task)
    changed: dict[str, Any] = {"models": _absolute_scripts(model)} if model else {}
    if budget:
        changed["budget"] = parse_budget(budget, task.budget)
    if max_turns is not None:
        changed["max_turns"] = max_turns
    if task.status is Status.PAUSED or changed:
        with tasks.worker(task_id):
            task = tasks.engine.resume(task, **changed)
    return _see_through(runtime, task, held, as_json=as_json)


def _see_through(runtime: Runtime, task: Task, held: Held, *, as_json: bool, new: bool = False) -> int:
    """Let it work, and ask the person whatever it waits for, as long as there is one."""
    progress = Progress(quiet=as_json)
    shown = _Shown(progress, quiet=as_json)
    try:
        while True:
            task = _work(runtime, task, held, shown, new=new)
            new = False
            progress.clear()
            if task.status is not Status.WAITING or as_json or not _there(runtime, task, held, progress):
                break
        history = runtime.agent_tasks.engine.history(task)
    except Interrupted as interrupted:
        signals.over()
        held.take()
        progress.clear()
        if runtime.host:
            sys.stderr.write(f"{task.id} goes on in the fleet; watch it with: luminaguard tasks resume {task.id}\n"
                             f"  end it with: luminaguard tasks cancel {task.id}\n")  # fmt: skip
        else:
            sys.stderr.write(f"interrupted: {task.id} goes on with: luminaguard tasks resume {task.id}\n")
        return interrupted.exit_code
    finally:
        progress.clear()
    signals.over()
    if as_json:
        print_outcome(task_json(runtime, task, history))
    else:
        shown.end()
        _tell_end(task, history, shown.last)
    return _EXIT.get(task.status, EXIT_REFUSED)


def _work(runtime: Runtime, task: Task, held: Held, shown: _Shown, *, new: bool) -> Task:
    """Move it on in this process, until it waits or ends; a signal ends the work at its last finished step."""
    interrupted = 0

    async def watch(scope: anyio.CancelScope) -> None:
        nonlocal interrupted
        while not interrupted:
            if (number := await held.next()) in signals.ENDING:
                interrupted = number
        scope.cancel()

    async def work() -> Task:
        nonlocal task
        tasks = runtime.agent_tasks
        async with anyio.create_task_group() as group:
            group.start_soon(watch, group.cancel_scope)
            with ExitStack() as stack:
                if not runtime.host:  # held from the beginning: a worker of this home would take it, too
                    try:
                        stack.enter_context(tasks.worker(task.id))
                    except TaskBusy:
                        shown.watcher().note(f"another process works on {task.id}: this one watches")
                        task = await tasks.follow(task, shown.watcher())
                        group.cancel_scope.cancel()
                        return task
                if new:
                    task = await tasks.engine.create(task)
                    shown.began(task)
                if runtime.host:  # in a fleet the workers do it
                    task = await tasks.follow(task, shown.watcher())
                else:
                    async with open_models(task.models, shown.watcher().note) as model:
                        task = await tasks.run(task, model, shown.watcher(), held=True)
            group.cancel_scope.cancel()
        return task

    try:
        task = anyio.run(work)
    except BaseExceptionGroup as group:
        if not interrupted:  # what fails of interrupted work fails because of that
            raise first_of(group) from None
    if interrupted:
        raise Interrupted(interrupted)
    return task


def _there(runtime: Runtime, task: Task, held: Held, progress: Progress) -> bool:
    """Ask at the terminal, if there is one, what the task waits for; whether it can go on now."""
    if not (sys.stdin.isatty() and sys.stderr.isatty()):
        return False
    if task.question:
        return _ask_question(runtime, task, held)
    request = runtime.agent_tasks.stopped_at(task)
    if request is None or request.state is not State.PENDING:
        return False
    full = can_open(runtime)
    while True:
        with held.raising():
            if full:
                given = review(runtime, request)
            else:
                show_card(runtime, request, progress)
                given = ask(request, partial(show_card, runtime, request, progress, full=True), runtime)
        if given is None:
            return runtime.approvals.get(request.id).state is not State.PENDING
        try:
            return _decide(runtime, request, given, progress)
        except PolicyChanged as changed:
            sys.stderr.write(f"note: {visible(changed.message)}\n")
            request = runtime.approvals.get(request.id)


def _decide(runtime: Runtime, request: Request, given: Answer, progress: Progress) -> bool:
    if given.verdict is not Verdict.APPROVE:
        runtime.decisions.deny(request, given)
        sys.stderr.write(f"{answered(given.verdict, given.reason)}\n")
        return True
    if request.effect != "changeset":
        return runtime.decisions.approve_and_hand_over(request, given).state is not State.PENDING
    with progress.slowly("publishing") as step:
        after = runtime.decisions.approve_and_publish(request, given, step=step)
    return after.state is not State.PENDING


def _ask_question(runtime: Runtime, task: Task, held: Held) -> bool:
    termios.tcflush(sys.stdin.fileno(), termios.TCIFLUSH)  # keys typed before the question stood there answer nothing
    asked = visible_text(task.question).replace("\n", f"\n{BY_MODEL}")
    sys.stderr.write(f"\nthe agent asks:\n{BY_MODEL}{asked}\nyour answer (empty: later): ")
    sys.stderr.flush()
    with held.raising():
        text = sys.stdin.readline().strip()
    if not text:
        return False
    runtime.agent_tasks.engine.answer(task, text)
    return True


class _Shown:
    """What a person sees of a task at work: on standard error, for the answer alone goes to standard output."""

    def __init__(self, progress: Progress, *, quiet: bool) -> None:
        self._progress, self._quiet = progress, quiet
        self._open = False
        self.last = ""
        """What the model said last, as far as it was shown."""

    def began(self, task: Task) -> None:
        """A new task."""
        if task.models.startswith("script:"):
            self._say(f"{task.id}: a script is played, no model: {visible(task.models)}")
        else:
            self._say(f"{task.id}: {visible(task.models)}")

    def watcher(self) -> Watcher:
        """For the engine."""
        return Watcher(text=self._text, call=self._call, outcome=self._outcome, note=self._say)

    def _text(self, piece: str) -> None:
        if self._quiet:
            return
        self._progress.clear()
        if not piece:  # the answer begins anew
            if self._open:
                self._say("asking again")
            self.last = ""
            return
        self.last += piece
        # Each line is marked as the model's: it must not look like one of ours.
        lines = visible_text(piece).replace("\n", f"\n{BY_MODEL}")
        sys.stderr.write(lines if self._open else f"{BY_MODEL}{lines}" if piece else "")
        sys.stderr.flush()
        self._open = bool(piece)

    def _call(self, call: ToolCall) -> None:
        self.last = ""
        words = " ".join(f"{key}={value!a}" for key, value in call.arguments.items())
        self._say(f"-> {visible(call.name)} {visible(words)[:SHOWN]}".rstrip())
        if call.name in IN_MACHINE:
            self._progress(f"{call.name} in a machine")

    def _outcome(self, call: ToolCall, outcome: Evaluated | None, refused: str) -> None:
        if outcome is None:
            self._say(f"   {visible(call.name)}: refused: {visible(refused)}")
            return
        lines = outcome.text.splitlines()
        first = visible(lines[0])[:100] if lines else "(no output)"
        more = f" (and {len(lines) - 1} more lines)" if len(lines) > 1 else ""
        changes = f"; {len(outcome.changes)} changes" if len(outcome.changes) else ""
        self._say(f"   {call.name}: {'failed: ' if outcome.failed else ''}{first}{more}{changes}")

    def end(self) -> None:
        """What comes next begins on a line of its own."""
        if self._open:
            sys.stderr.write("\n")
            self._open = False

    def _say(self, line: str) -> None:
        if self._quiet:
            return
        self._progress.clear()
        sys.stderr.write(("\n" if self._open else "") + f"{line}\n")
        self._open = False


def _waits_for(task: Task) -> list[str]:
    """What a task waits for, and how it is answered."""
    resume = f"then: luminaguard tasks resume {task.id}"
    if task.home:
        resume = f"then it goes on in the fleet; watch it with: luminaguard tasks resume {task.id}"
    if task.question:
        asked = visible_text(task.question).replace("\n", f"\n{BY_MODEL}")
        return [
            "waits for an answer; it asks:",
            f"| {asked}",
            f"answer with: luminaguard tasks answer {task.id} TEXT",
            resume,
        ]
    return [f"waits for a decision: {task.request}", f"look at it: luminaguard approvals show {task.request}",
            f"decide: luminaguard approvals approve {task.request}   (or: deny, return)", resume]  # fmt: skip


def _tell_end(task: Task, history: list[Message], shown: str) -> None:
    final = history[-1].text if history and history[-1].role == "assistant" and not open_calls(history) else ""
    why = f" ({visible(task.why)})" if task.why else ""
    lines = {
        Status.FINISHED: [f"finished{why}"], Status.DENIED: [f"finished; its changes were not published{why}"],
        Status.PAUSED: [f"paused: {visible(task.why)}", f"go on with: luminaguard tasks resume {task.id}",
                        "(with more of what was used up: --max-turns N, --budget NAME=LIMIT)"],
        Status.WAITING: _waits_for(task),
    }.get(task.status, [f"{task.status.value}{why}"])  # fmt: skip
    sys.stderr.write(
        f"{task.id} {lines[0]}\n" + "".join(f"  {line}\n" for line in [*lines[1:], f"used: {task.usage.words()}"])
    )
    seen = sys.stdout.isatty() and sys.stderr.isatty() and shown == final  # it stands there already
    if final and not seen and task.status in {Status.FINISHED, Status.DENIED, Status.WAITING}:
        print(visible_text(final))


def replay(runtime: Runtime, task_id: str, held: Held, *, as_json: bool) -> int:
    """Do the calls of a task again on its first state, in a task of its own that publishes nothing."""
    tasks = runtime.agent_tasks
    old = tasks.engine.get(task_id)
    progress = Progress(quiet=as_json)
    shown = _Shown(progress, quiet=as_json)
    new = anyio.run(_replay, runtime, tasks, old, shown)
    progress.clear()
    shown.end()
    same = new.snapshot.changes.digest == old.snapshot.changes.digest
    signals.over()
    held.take()
    if as_json:
        print_outcome(task_json(runtime, new, []) | {"replays": old.id, "same": same})
    else:
        print(f"{new.id} replayed {old.id}: " + ("the same changes" if same else "OTHER changes than then"))
        if not same:
            for change in new.snapshot.changes.since(old.snapshot.changes).changes[:50]:
                print(f"  differs: {visible(change.path)}")
    return 0 if same else EXIT_REFUSED


async def _replay(runtime: Runtime, tasks: LocalTasks, old: Task, shown: _Shown) -> Task:
    from luminaguard.reasoning.script import ScriptModel

    answers = [message for message in tasks.engine.history(old) if message.role == "assistant"]
    # What a person was asked is not asked again: only what ran in machines is done again, all of it.
    turns = [(message.text, [(call.name, dict(call.arguments)) for call in message.calls
                             if not call.malformed and call.name in IN_MACHINE]) for message in answers]  # fmt: skip
    turns = [turn for turn in turns if turn[1]]
    task = Task(tasks.new_id(), old.prompt, old.workspace, f"script:replay of {old.id}",
                runtime.ledger.current_time(), publish="never", home=runtime.host, max_turns=len(turns) + 2,
                budget=Budget(requests=None, tool_calls=None))  # fmt: skip
    tasks = LocalTasks(runtime, here=True)  # no worker takes part in it
    tasks.snapshots.copy_first(old.id, task.id)
    task = await tasks.engine.create(task)
    shown.began(task)
    return await tasks.run(task, ScriptModel(task.models, turns), shown.watcher())

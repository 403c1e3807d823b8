"""``luminaguard tasks``: look at tasks, answer and end them, from any process."""

from __future__ import annotations

import sys
from typing import Any

from luminaguard.approvals.words import duration
from luminaguard.cli.output import print_json, print_lines
from luminaguard.effects.text import visible, visible_text
from luminaguard.errors import SettingsError, TaskError
from luminaguard.reasoning.messages import Message
from luminaguard.runtime import Runtime
from luminaguard.tasks.model import ENDED, Status, Task, open_calls

__all__ = ["BY_MODEL", "SHOWN", "answer", "cancel", "logs", "show", "show_list", "task_json", "text_of"]

_MOST_PROMPT = 1 << 20
SHOWN = 400
"""Characters of a text that are shown, if not all of it is wanted."""
BY_MODEL = "  | "
"""Before each line that is a model's or a tool's: it must not look like one of ours."""


def text_of(prompt: str) -> str:
    """What a person says, on the command line or, for ``-``, on standard input; raises SettingsError."""
    text = sys.stdin.read(_MOST_PROMPT + 1) if prompt == "-" else prompt
    if not text.strip() or len(text) > _MOST_PROMPT:
        raise SettingsError("There is no task, or one of more than 1 MiB.", hint="Say what the agent is to do.")
    return text.strip()


def task_json(runtime: Runtime, task: Task, history: list[Message]) -> dict[str, Any]:
    """A task for programs; its answer is known if its history is given."""
    request = runtime.agent_tasks.stopped_at(task)
    final = history[-1].text if history and history[-1].role == "assistant" and not open_calls(history) else None
    return {
        "task": task.id, "status": task.status.value, "worked_on": runtime.agent_tasks.is_worked_on(task.id),
        "why": task.why, "answer": final, "workspace": task.workspace,
        "models": task.models, "turns": task.turns, "steps": task.step, "usage": task.usage.to_json(),
        "budget": task.budget.to_json(), "request_id": request.id if request else None,
        "question": task.question or None, "created_ns": task.created_ns, "updated_ns": task.updated_ns,
        "changeset": {"digest": task.snapshot.changes.digest, "changes": task.snapshot.changes.to_json()},
        "published": task.published.to_json(),
    }  # fmt: skip


def show_list(runtime: Runtime, *, everything: bool, as_json: bool) -> None:
    """Print the tasks, oldest first."""
    tasks = runtime.agent_tasks
    going = [status.value for status in Status if status not in ENDED]
    found, damaged = tasks.store.all(Task.from_json, () if everything else going)
    if as_json:
        rows = [task_json(runtime, task, []) | {"prompt": task.prompt} for task in found]
        print_json({"tasks": rows, "damaged": damaged})
        return
    now = runtime.ledger.current_time()
    for task in found:
        age = duration((now - task.created_ns) / 1e9)
        print(f"{task.id}  {_stands(runtime, task):11}  {age:>6}  {task.turns:>3} turns  {visible(task.workspace)}  "
              f"{visible(task.prompt)[:60]}")  # fmt: skip
    for task_id in damaged:
        print(f"{task_id}  DAMAGED: its row cannot be read")
    if not found and not damaged:
        print("no tasks" if everything else "no task goes on or waits")


def _stands(runtime: Runtime, task: Task) -> str:
    """Where a task stands; one that nobody works on any more was interrupted."""
    if task.status is Status.RUNNING and not runtime.host and not runtime.agent_tasks.is_worked_on(task.id):
        return "interrupted"
    return task.status.value


def show(runtime: Runtime, task_id: str, *, as_json: bool) -> None:
    """Print one task: how far it came, what it waits for, what it changed."""
    tasks = runtime.agent_tasks
    task = tasks.engine.get(task_id)
    history = tasks.engine.history(task)
    if as_json:
        print_json(task_json(runtime, task, history) | {"prompt": task.prompt})
        return
    why = f" ({visible(task.why)})" if task.why else ""
    lines: list[Any] = [("title", f"{task.id}: {_stands(runtime, task)}{why}")]
    lines += [("plain", line) for line in (
        f"task: {visible(task.prompt)[:SHOWN]}", f"folder: {visible(task.workspace)}",
        f"models: {visible(task.models)}", f"{task.turns} turns, {task.step} steps; used: {task.usage.words()}",
        f"labels: {', '.join(sorted(runtime.tasks.labels(task.id))) or 'none'}")]  # fmt: skip
    if task.question:
        lines.append(("loud", f"it asks: {visible(task.question)}"))
    if task.request:
        request = runtime.agent_tasks.stopped_at(task)
        state = request.state.value if request else "not asked yet"
        lines.append(("loud", f"it waits for {task.request} ({state}): luminaguard approvals show {task.request}"))
    if task.status not in ENDED:
        lines.append(("plain", f"go on with: luminaguard tasks resume {task.id}"))
    changes = task.snapshot.changes
    lines.append(("plain", f"{len(changes)} changes so far, {len(task.unpublished)} of them not published"))
    lines += [("path", f"  {change.kind} {visible(change.path)}") for change in changes.changes[:50]]
    print_lines(lines, sys.stdout)


def logs(runtime: Runtime, task_id: str, *, full: bool, as_json: bool) -> None:
    """Print the history of a task."""
    tasks = runtime.agent_tasks
    history = tasks.engine.history(tasks.engine.get(task_id))
    if as_json:
        print_json({"messages": [message.to_json() | {"opaque": {}} for message in history]})
        return
    most = 1 << 30 if full else SHOWN
    lines: list[Any] = []
    for message in history:
        who = {"user": "person", "assistant": "model", "tool": f"{message.tool} ({'failed, ' * message.failed}"
               f"{message.origin})"}[message.role]  # fmt: skip
        text = visible_text(message.text)
        cut = f" … ({len(text) - most:,} more characters)" if len(text) > most else ""
        lines.append(("path", f"{visible(who)}:"))
        lines += [("plain", f"{BY_MODEL}{line}") for line in (text[:most] + cut).split("\n")]
        for call in message.calls:
            words = " ".join(f"{key}={value!a}" for key, value in call.arguments.items())
            lines.append(
                ("hunk", f"  -> {visible(call.name)} {visible(words)[:most]}{' (malformed)' * bool(call.malformed)}")
            )
    print_lines(lines, sys.stdout)


def cancel(runtime: Runtime, task_id: str, reason: str, *, as_json: bool) -> None:
    """End a task."""
    tasks = runtime.agent_tasks
    task = tasks.engine.get(task_id)
    if task.status in ENDED:
        raise TaskError(f"{task_id} has ended: it is {task.status.value}.", hint="There is nothing to cancel.")
    task = tasks.engine.cancel(task, reason or "cancelled by a person")
    print_json(task_json(runtime, task, [])) if as_json else print(f"cancelled {task_id}")


def answer(runtime: Runtime, task_id: str, text: str, *, as_json: bool) -> None:
    """Answer a task's question."""
    tasks = runtime.agent_tasks
    task = tasks.engine.get(task_id)
    if task.status is not Status.WAITING or not task.question:
        raise TaskError(f"{task_id} asks no question.", hint=f"See 'luminaguard tasks show {task_id}'.")
    task = tasks.engine.answer(task, text_of(text))
    if as_json:
        print_json(task_json(runtime, task, []))
    else:
        print(f"answered; go on with: luminaguard tasks resume {task_id}")

"""``luminaguard run`` and what belongs to it: the commands of tasks and models."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from luminaguard.cli import signals
from luminaguard.cli.common import Json, open_runtime

__all__ = ["models_app", "run", "tasks_app"]

tasks_app = typer.Typer(help="What agents work on.", no_args_is_help=True, rich_markup_mode=None)
models_app = typer.Typer(help="Language models: what works here, and their keys.", no_args_is_help=True,
                         rich_markup_mode=None)  # fmt: skip

TaskId = Annotated[str, typer.Argument(metavar="ID")]
Model = Annotated[
    str | None,
    typer.Option(
        "--model", metavar="MODEL", help="PROVIDER:NAME, PROVIDER:NAME@URL or script:FILE; several with commas."
    ),
]
Budget = Annotated[
    list[str] | None,
    typer.Option(
        "--budget", metavar="NAME=LIMIT", help="requests, tokens, dollars, calls or time, such as time=30min."
    ),
]
MaxTurns = Annotated[int | None, typer.Option("--max-turns", help="Answers of the model until it pauses.", min=1)]


def run(
    task: Annotated[str, typer.Argument(metavar="TASK", help="What the agent is to do; - is standard input.")],
    workspace: Annotated[
        Path, typer.Option("--workspace", "-w", help="The folder to work on.", readable=False)
    ] = Path(),
    model: Model = None,
    max_turns: MaxTurns = None,
    budget: Budget = None,
    publish: Annotated[
        str, typer.Option("--publish", help="When you are asked: on-finish, per-action, or never.")
    ] = "on-finish",
    as_json: Json = False,
) -> None:
    """Let an agent work on a copy of the folder; publish what you approve."""
    with signals.held() as held:
        from luminaguard.cli.paths import absolute
        from luminaguard.cli.run import start

        runtime = open_runtime(as_json=as_json, model=model)
        sys.exit(start(runtime, task, absolute(workspace), held, publish=publish, max_turns=max_turns,
                       budget=budget or [], as_json=as_json))  # fmt: skip


@tasks_app.command("list")
def tasks_list(
    everything: Annotated[bool, typer.Option("--all", help="Those that ended, too.")] = False, as_json: Json = False
) -> None:
    """List the tasks that go on, wait for you, or are paused."""
    from luminaguard.cli import tasks

    tasks.show_list(open_runtime(as_json=as_json), everything=everything, as_json=as_json)


@tasks_app.command("show")
def tasks_show(task_id: TaskId, as_json: Json = False) -> None:
    """Show how far a task came, what it waits for, and what it changed."""
    from luminaguard.cli import tasks

    tasks.show(open_runtime(as_json=as_json), task_id, as_json=as_json)


@tasks_app.command("logs")
def tasks_logs(
    task_id: TaskId,
    full: Annotated[bool, typer.Option("--full", help="Whole texts.")] = False,
    as_json: Json = False,
) -> None:
    """Show all that was said in a task, with the calls and their outcomes."""
    from luminaguard.cli import tasks

    tasks.logs(open_runtime(as_json=as_json), task_id, full=full, as_json=as_json)


@tasks_app.command("cancel")
def tasks_cancel(
    task_id: TaskId,
    reason: Annotated[str, typer.Option("--reason", help="For the record.")] = "",
    as_json: Json = False,
) -> None:
    """End a task; what it asked for is not asked any more."""
    from luminaguard.cli import tasks

    tasks.cancel(open_runtime(as_json=as_json), task_id, reason, as_json=as_json)


@tasks_app.command("resume")
def tasks_resume(
    task_id: TaskId, model: Model = None, max_turns: MaxTurns = None, budget: Budget = None, as_json: Json = False
) -> None:
    """Go on with a task that was interrupted, is paused, or has its answer."""
    with signals.held() as held:
        from luminaguard.cli import run

        runtime = open_runtime(as_json=as_json)
        sys.exit(run.resume(runtime, task_id, held, model=model or "", max_turns=max_turns, budget=budget or [],
                              as_json=as_json))  # fmt: skip


@tasks_app.command("answer")
def tasks_answer(
    task_id: TaskId, text: Annotated[str, typer.Argument(metavar="TEXT", help="- is standard input.")],
    as_json: Json = False,
) -> None:  # fmt: skip
    """Answer the question that a task asks; 'tasks resume' goes on."""
    from luminaguard.cli import tasks

    tasks.answer(open_runtime(as_json=as_json), task_id, text, as_json=as_json)


@tasks_app.command("replay")
def tasks_replay(task_id: TaskId, as_json: Json = False) -> None:
    """Do a task's calls again, on the state that it began with, without a model; compare what changes."""
    with signals.held() as held:
        from luminaguard.cli import run

        sys.exit(run.replay(open_runtime(as_json=as_json), task_id, held, as_json=as_json))


@models_app.command("list")
def models_list(as_json: Json = False) -> None:
    """Say which models could be used on this machine now."""
    from luminaguard.cli.output import print_json
    from luminaguard.reasoning.choice import what_would_work

    chosen, found = open_runtime(as_json=as_json).settings.model, what_would_work()
    if as_json:
        print_json({"chosen": chosen or None, "would_work": found})
        return
    print(f"chosen: {chosen or 'none (set model in luminaguard.toml, or give --model)'}")
    print("\n".join(found) or "nothing was found: no key is set, and no server answers on this machine")


@models_app.command("key")
def models_key(provider: Annotated[str, typer.Argument(metavar="PROVIDER")]) -> None:
    """Keep a provider's key in the system's keyring; it is read from the terminal or standard input."""
    import getpass

    from luminaguard.reasoning.choice import keep_key

    open_runtime()
    key = getpass.getpass(f"Key of {provider}: ") if sys.stdin.isatty() else sys.stdin.readline().strip()
    keep_key(provider, key)
    print(f"the key of {provider} is in the system's keyring")

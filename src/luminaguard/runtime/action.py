"""One action: the state is read, the command runs in a machine, its changes come out, the machine ends.

The order in :func:`run` is the promise: nothing runs before it is recorded, the machine is destroyed
before there is anything to decide, and what there is to decide survives a reboot.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import anyio
import anyio.to_thread

from luminaguard import log
from luminaguard.errors import Forbidden, LuminaGuardError, TaskStopped, WorkspaceChanged, WorkspaceError
from luminaguard.runtime.rehearsal import (
    Background,
    Execution,
    Feed,
    Output,
    Outside,
    Prepared,
    Progress,
    Rehearsal,
    Stopwatch,
    once_it_takes_long,
    prepare_template,
    shown,
)

if TYPE_CHECKING:
    from luminaguard.approvals.model import Judged, Request
    from luminaguard.effects import Changeset
    from luminaguard.microvm.machine import Command
    from luminaguard.runtime.core import Runtime
    from luminaguard.storage.ledger import Ledger
    from luminaguard.workspaces.state import WorkspaceState

__all__ = ["run"]

_MOST_COMMAND = 64 << 10


async def run(
    runtime: Runtime,
    workspace: Path,
    command: Command,
    *,
    output: Output,
    feed: Feed | None = None,
    progress: Progress = lambda _: None,
    task: str = "",
    taint: tuple[str, ...] = (),
    layer: str = "",
    outside: Outside | None = None,
    beside: Mapping[str, Path] | None = None,
) -> Execution:
    """Run a command on a copy of the workspace and take its effects out; publish nothing.

    Args:
        runtime: the parts.
        workspace: absolute path of the folder.
        command: what to run.
        output: receives standard output (1) and standard error (2) as they come.
        feed: writes standard input and signals.
        progress: told in a few words what is being done, for anything that may take long.
        task: what the action belongs to; labels of untrusted input stay with it.
        taint: labels of untrusted input that the command line itself follows.
        layer: id of programs that its machine has beside those of the image.
        outside: answers connections of its programs to :data:`PROXY_PORT` of the machine's loopback; None for none.
        beside: absolute paths of other folders, of which copies lie in that of the workspace, by their names there.

    Returns:
        The execution; its status is ``unchanged``, ``pending`` (there are requests), or
        ``refused`` (timed out, or its effects may not be published).

    Raises:
        Forbidden: a rule forbids to run it; nothing ran.
        ApprovalNeeded: a rule wants to be asked first; nothing ran.
        PolicyInvalid: the rules cannot be read; nothing ran.
        CallFailed: the command could not be started in the guest.
        LuminaGuardError: anything else that went wrong; the workspace was not touched.
    """
    from luminaguard.microvm.broker import has_pool

    marks = Stopwatch()
    recovered: list[str] = []
    runtime.tracker.reap()
    async with AsyncExitStack() as stack:
        prepared = Prepared(stack)
        if runtime.publisher.interrupted():  # what is half published must be settled before it is read
            recovered += await anyio.to_thread.run_sync(runtime.decisions.recover)
        # The database is opened beside what takes longer: nothing runs in a machine before that is recorded.
        opening = Background(lambda: _open_ledger(runtime, recovered))
        pooled = not layer and has_pool(runtime.folders.run)
        if pooled:
            stack.enter_context(opening)
        folders = {"": workspace} | dict(beside or {})
        await _prepare(runtime, prepared, folders, progress, layer, template=not pooled)
        if not pooled:
            stack.enter_context(opening)
        assert prepared.state is not None
        labels = await anyio.to_thread.run_sync(_admit, runtime, prepared, opening, folders, command, task, taint)
        marks.lap("prepare")
        state = prepared.state
        run_it = Rehearsal(runtime, workspace, command, state.entries, output, feed, progress)
        run_it.outside = outside(labels) if outside else None
        run_it.beside = beside or {}
        execution, mode, writer = await run_it.once(prepared, opening, marks, task)
        execution.recovered = recovered
    outcome, changeset = execution.outcome, execution.changeset
    if outcome.timed_out:
        execution.status, execution.detail = (
            "refused",
            "the command was stopped at its time limit",
        )
    elif mode is not None and mode != state.mode | 0o700:
        execution.detail = f"the mode of the folder itself became {mode:04o} in the machine; that is not published"
    if len(changeset) and not outcome.timed_out:
        with anyio.CancelScope(shield=True):  # it ran to its end: what it did is kept, whoever wants to leave now
            await anyio.to_thread.run_sync(_request, runtime, execution, prepared.states, command, task, labels)
    if not execution.requests:
        writer.discard()
    marks.lap("record")
    execution.timings_ms = marks.laps
    log.detail("exec.finished", vm=execution.vm_id, status=execution.status, **marks.laps)
    return execution


async def _prepare(
    runtime: Runtime, prepared: Prepared, folders: Mapping[str, Path], progress: Progress, layer: str, *, template: bool
) -> None:
    """Read and pack the folders, and load the template beside it; all ends before anything is raised."""
    prepared.image = runtime.images.current()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(anyio.to_thread.run_sync, _prepare_folders, runtime, folders, prepared, progress)
        tasks.start_soon(anyio.to_thread.run_sync, _prepare_policies, runtime, folders, prepared)
        if layer:
            tasks.start_soon(anyio.to_thread.run_sync, prepared.open_packages, runtime.layers, layer)
        if template:
            await prepare_template(runtime, prepared, progress)
    if prepared.failures:
        raise prepared.failures[0]


def _prepare_folders(
    runtime: Runtime, folders: Mapping[str, Path], prepared: Prepared, progress: Progress
) -> None:  # fmt: skip
    from luminaguard.workspaces.index import HashIndex
    from luminaguard.workspaces.joined import join
    from luminaguard.workspaces.pack import WorkspaceImages
    from luminaguard.workspaces.state import read_state

    told = once_it_takes_long(progress, "reading the workspace")
    try:
        for name, folder in folders.items():
            prepared.states[name] = read_state(
                folder, runtime.limits("workspace"), lambda count: told(f"{count:,} entries"),
                own=runtime.own_paths(folder), indexes=runtime.folders.cache / "indexes",
            )  # fmt: skip
        prepared.state = join(prepared.states[""], {name: one for name, one in prepared.states.items() if name})
        told = once_it_takes_long(progress, "packing the workspace")
        images = WorkspaceImages(runtime.folders.cache).open_layered(
            prepared.state, lambda count: told(f"{count:,} entries")
        )
        prepared.disks = tuple(prepared.keep(fd) for fd in images if fd >= 0)
    except WorkspaceChanged as error:
        for folder in folders.values():
            HashIndex(runtime.folders.cache / "indexes", folder).forget()
        prepared.failures.append(error)
    except LuminaGuardError as error:
        prepared.failures.append(error)
    except OSError as error:
        failure = WorkspaceError(
            f"The workspace could not be read or packed: {error}.",
            hint="Check the folder, and that the cache folder has free space.",
        )
        prepared.failures.append(failure)


def _prepare_policies(runtime: Runtime, folders: Mapping[str, Path], prepared: Prepared) -> None:
    try:
        prepared.policies = {name: runtime.policy(folder) for name, folder in folders.items()}
    except LuminaGuardError as error:
        prepared.failures.insert(0, error)


def _admit(
    runtime: Runtime, prepared: Prepared, opening: Background[Ledger], folders: Mapping[str, Path], command: Command,
    task: str, taint: tuple[str, ...],
) -> frozenset[str]:  # fmt: skip
    """Refuse what may not even be rehearsed, by the rules of any folder; return the labels that the action carries."""
    from luminaguard.actions.model import Action, Risk
    from luminaguard.effects.outside import ToolRun
    from luminaguard.runtime.policy import judge, marked_labels

    found = [(label, "given on the command line") for label in taint]
    for name, policy in prepared.policies.items():
        found += marked_labels(policy, prepared.states[name].entries)
    labels = frozenset(label for label, _ in found)
    if task:
        opening.join()
        if (why := runtime.tasks.stopped(task)) is not None:
            raise TaskStopped(task, why, kept="Nothing ran.")
        labels = runtime.tasks.add_labels(task, found)

    def judged_in(name: str) -> tuple[ToolRun, Judged]:
        run_it = ToolRun("exec", {"command": _text(command.argv)}, str(folders[name]))
        action = Action.from_json({"effect": "run", "tool": run_it.tool, "arguments": run_it.arguments,
                                   "workspace": run_it.workspace, "task": task, "taint": sorted(labels)})  # fmt: skip
        return run_it, judge(prepared.policies[name], action)[1]

    # Asked for once, by the strictest rules: one run uses one approval.
    name = max(prepared.policies, key=lambda name: judged_in(name)[1].strictness)
    run_it, judged = judged_in(name)
    if judged.risk is not Risk.GREEN or judged.people > 1:
        opening.join()
        runtime.permits.permit(run_it, prepared.policies[name], task, labels)
    return labels


def _open_ledger(runtime: Runtime, recovered: list[str]) -> Ledger:
    recovered += runtime.decisions.recover()
    return runtime.ledger


def _request(
    runtime: Runtime, execution: Execution, states: Mapping[str, WorkspaceState], command: Command, task: str,
    labels: frozenset[str],
) -> None:  # fmt: skip
    """Store the effects and ask for approval: after this they survive a reboot. What is forbidden is not kept."""
    from luminaguard.approvals import Request, State
    from luminaguard.workspaces.joined import split

    # By the ledger's clock: it never goes back, and expiry is judged by it.
    now = runtime.ledger.current_time()
    parts = split(execution.changeset, {name: state for name, state in states.items() if name})
    first = execution.vm_id.replace("vm-", "req-")
    asked: list[tuple[Request, Changeset]] = []
    for name, changeset in parts.items():
        if not len(changeset):
            continue
        state, number = states[name], len(asked) + 1
        asked.append((Request(
            id=first if number == 1 else f"{first}-{number}", workspace=str(state.path), inode=state.inode,
            digest=changeset.digest, command=_kept(command.argv), exit_code=execution.outcome.exit_code,
            created_ns=now, expires_ns=now + runtime.settings.approval_ttl_s * 1_000_000_000, state=State.PENDING,
            task=task, taint=tuple(sorted(labels)),
        ), changeset))  # fmt: skip
    # Contents are kept under each request's name from here on.
    runtime.blobs.hand_over(execution.vm_id, {request.id: changeset.contents for request, changeset in asked})
    for request, _ in asked:
        runtime.blobs.persist(request.id)
    for request, changeset in asked:
        try:
            execution.requests.append(runtime.decisions.ask(request, changeset))
            execution.status = "pending"
        except LuminaGuardError as error:  # of one folder; the others' changes are asked for all the same
            runtime.blobs.forget(request.id)
            if not isinstance(error, Forbidden) and len(asked) == 1:
                raise
            execution.detail, execution.refusal = f"{request.workspace}: {error.message}", error
    if asked and not execution.requests:
        execution.status = "refused"


def _text(argv: Sequence[str]) -> list[str]:
    """The whole command line, bytes that are no text as escapes."""
    return [word.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace") for word in argv]


def _kept(argv: Sequence[str]) -> tuple[str, ...]:
    """The command line of a request: all of it, or its beginning and the digest of all, for no two are the same."""
    whole = _text(argv)
    if sum(map(len, whole)) <= _MOST_COMMAND:
        return tuple(whole)
    return (*shown(argv), f"sha256:{hashlib.sha256(json.dumps(whole).encode()).hexdigest()}")

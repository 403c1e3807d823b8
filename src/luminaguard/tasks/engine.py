"""Moves tasks on, one durable step after another: load, do, save with compare-and-set, record.

A step that is interrupted anywhere was not saved, and is done again from the same state: a model is asked
again, a call is evaluated again in another throwaway machine. What must not happen twice goes through the
cliff, whose requests bear ids that follow from the task and its step: the same step asks for the same thing.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import anyio

from luminaguard.actions.tools import ToolSpec
from luminaguard.approvals.model import Request, State
from luminaguard.effects.changes import Change, Changeset, LinkEntry
from luminaguard.effects.text import visible_name
from luminaguard.errors import (
    ActionInvalid,
    ApprovalError,
    ApprovalNeeded,
    ChangesetRefused,
    CommandTooLong,
    Forbidden,
    GuestProtocolError,
    GuestUnresponsive,
    HistoryTooLong,
    LuminaGuardError,
    McpServerFailed,
    ModelRefused,
    ModelUnavailable,
    SettingsError,
    TaskError,
    TaskStopped,
)
from luminaguard.reasoning.budget import Usage
from luminaguard.reasoning.context import (
    ASK_USER,
    HOST_TOOLS,
    INSTRUCTIONS,
    PUBLISH,
    READ_OUTPUT,
    SUMMARISE,
    as_data,
    as_read,
    cut,
    page,
    size_of,
    summary_of,
    summary_request,
    to_summarise,
)
from luminaguard.reasoning.messages import Message, ToolCall
from luminaguard.reasoning.model import Model
from luminaguard.storage.tasks import Needs, TaskStore
from luminaguard.tasks.model import ENDED, Status, Task, open_calls, with_distinct_ids
from luminaguard.tasks.ports import Cliff, Evaluated, RemoteTools, Watcher, Workbench
from luminaguard.tools.builtin import IN_MACHINE, Plan, plan

__all__ = ["Engine", "request_id"]

_MOST_HISTORY = 400_000
"""Characters; about 100,000 tokens, which the models of these years take."""
_OF_THE_CALL = (ActionInvalid, ApprovalNeeded, ChangesetRefused, CommandTooLong, Forbidden, GuestProtocolError,
                GuestUnresponsive)  # fmt: skip
"""Errors that say something about a call, which its model can read; all others are of this machine."""
_SERVER = "__"
"""In the name of a tool of another server: ``SERVER__TOOL``."""
_MACHINE = "a machine with a copy of the folder"
_TOOLS: tuple[ToolSpec, ...] = (
    *IN_MACHINE.values(), *HOST_TOOLS)  # fmt: skip


@dataclass(slots=True)
class _Round:
    """What one step adds to a task."""

    messages: list[Message] = field(default_factory=list)
    outputs: dict[str, str] = field(default_factory=dict)


class Engine:
    """Moves the tasks of one store on.

    Args:
        store: the tasks.
        bench, cliff: where calls are evaluated and effects asked for.
        remote: the tools of other servers.
        parallel: how many calls of one turn run beside each other.
        now_ns: the time, in nanoseconds since the epoch.
    """

    def __init__(
        self, store: TaskStore, bench: Workbench, cliff: Cliff, *, parallel: int, now_ns: Callable[[], int],
        remote: RemoteTools | None = None,
    ) -> None:  # fmt: skip
        self._store, self._bench, self._cliff = store, bench, cliff
        self._parallel, self._remote = parallel, remote
        self._now_ns = now_ns
        self._said: tuple[str, int, list[Message]] | None = None
        """The history of the task that was worked on last, as it was at a step: nobody else saved one since."""

    # -- one task -------------------------------------------------------------------------------------

    def get(self, task_id: str) -> Task:
        """A task as it stands; raises TaskNotFound."""
        return self._store.get(task_id, Task.from_json)

    def history(self, task: Task) -> list[Message]:
        """All that was said in it."""
        if self._said is None or self._said[:2] != (task.id, task.step):
            self._said = (task.id, task.step, self._store.history(task.id, Message.from_json))
        return list(self._said[2])

    async def create(self, task: Task) -> Task:
        """Store a new task; its first state is kept before that, so that it can always begin."""
        first = await self._bench.begin(task)
        said = [Message("user", task.prompt).to_json()]
        self._store.create(task, task.status.value, said, models=task.models, first=first)
        return task

    async def run(self, task: Task, model: Model, watcher: Watcher) -> Task:
        """Move a task on until it waits for a person, pauses or ends; return it as it then stands.

        Raises:
            TaskError: another process works on it.
            LuminaGuardError: this machine cannot do it now; all finished steps were kept.
        """
        while task.status in {Status.RUNNING, Status.WAITING}:
            task, moved = await self.step(task, model, watcher)
            if not moved:
                break
        return task

    async def step(self, task: Task, model: Model, watcher: Watcher) -> tuple[Task, bool]:
        """One durable step; the task after it, and whether there was anything to do."""
        if task.status is Status.WAITING:
            return self._after_waiting(task, watcher)
        history = self.history(task)
        calls = open_calls(history)
        start = time.monotonic()
        try:
            if calls:
                after, added = await self._do_calls(task, calls, watcher)
            elif history[-1].role == "assistant":
                after, added = self._finish(task), _Round()
            else:
                after, added = await self._ask_model(task, history, model, watcher)
        except TaskStopped as error:
            after, added = task.ended(Status.STOPPED, error.message), _Round()
        except (ModelRefused, ModelUnavailable) as error:
            after, added = task.paused(f"{error.message} {error.hint}"), _Round()
            after = replace(after, usage=after.usage + Usage(requests=error.requests))
        after = replace(after, usage=after.usage + Usage(seconds=round(time.monotonic() - start, 3)))
        changed = after.snapshot is not task.snapshot
        what = "summary" if any(message.covers for message in added.messages) else "calls" if calls else "model"
        return self._save(after, added, what=what, changed=changed), True

    def _save(self, task: Task, added: _Round, *, what: str, changed: bool = True) -> Task:
        """Save a step; ``changed`` says whether the workspace's state is another one now."""
        messages = [message.to_json() for message in added.messages]
        goes_on = task.status in {Status.RUNNING, Status.WAITING}
        needs = self._needs(task, [*self.history(task), *added.messages]) if goes_on else "turn"
        self._store.save(task, task.status.value, messages, added.outputs, needs=needs, what=what, turns=task.turns,
                         tokens=task.usage.tokens, why=task.why[:200])  # fmt: skip
        saved = replace(task, step=task.step + 1)
        if self._said is not None and self._said[:2] == (task.id, task.step):
            self._said = (saved.id, saved.step, [*self._said[2], *added.messages])
        if saved.status in ENDED:
            self._cliff.withdraw(saved, "its task has ended")
        if changed or saved.status in ENDED:
            self._bench.collect(saved)
        return saved

    def _needs(self, task: Task, history: Sequence[Message]) -> Needs:
        """What the next step needs."""
        if task.request:
            return "folder"
        calls = open_calls(history)
        return "machine" if calls and self._for_machine(calls[0]) else "turn"

    # -- the model --------------------------------------------------------------------------------------

    async def _ask_model(
        self, task: Task, history: Sequence[Message], model: Model, watcher: Watcher
    ) -> tuple[Task, _Round]:
        if why := task.budget.used_up(task.usage):
            return task.paused(why), _Round()
        if task.turns >= task.max_turns:
            return task.paused(f"{task.max_turns} turns were made"), _Round()
        size = size_of(history)
        with anyio.move_on_after(self._left_s(task)):
            if size > _MOST_HISTORY:
                return await self._summarise(task, history, _MOST_HISTORY // 2, model, watcher)
            try:
                more = await self._remote.specs() if self._remote else ()
                turn = await model.turn(INSTRUCTIONS, as_read(history), (*_TOOLS, *more), watcher.text)
            except HistoryTooLong:
                return await self._summarise(task, history, size // 3, model, watcher)
            message = with_distinct_ids(turn.message)
            return replace(task, turns=task.turns + 1, usage=task.usage + turn.usage), _Round([message])
        return task.paused(f"the budget of {task.budget.seconds:,.0f} seconds is used up"), _Round()

    async def _summarise(
        self, task: Task, history: Sequence[Message], most: int, model: Model, watcher: Watcher
    ) -> tuple[Task, _Round]:
        """Let the model put what happened into fewer words; the history stays, and the summary becomes part of it.

        Raises:
            HistoryTooLong: there is nothing left that could be summarised.
        """
        covers = to_summarise(history, most)
        if covers <= max((message.covers for message in history), default=0):
            raise HistoryTooLong("What came last is too long for the model.", hint="Resume with another --model.")
        watcher.note(f"the history is long: the model summarises {covers} messages of it")
        turn = await model.turn(SUMMARISE, summary_request(history, covers), (), watcher.text)
        after = replace(task, usage=task.usage + turn.usage)
        return after, _Round([summary_of(turn.message.text, covers)])

    @staticmethod
    def _left_s(task: Task) -> float:
        """Seconds that the budget has left."""
        return math.inf if task.budget.seconds is None else max(0.0, task.budget.seconds - task.usage.seconds)

    def _finish(self, task: Task) -> Task:
        """The model has answered; what it changed goes to the cliff, if a person wants to be asked."""
        if task.publish == "never" or not len(task.unpublished):
            return task.ended(Status.FINISHED)
        return replace(task, status=Status.WAITING, request=request_id(task), asked_for="finish")

    # -- calls ------------------------------------------------------------------------------------------

    async def _do_calls(self, task: Task, calls: Sequence[ToolCall], watcher: Watcher) -> tuple[Task, _Round]:
        """Answer some of the open calls: one that is not for a machine, or the machines' calls before it."""
        limit = task.budget.tool_calls
        if limit is not None and task.usage.tool_calls > limit:
            return task.paused(f"the budget of {limit:,} tool calls is used up"), _Round()
        if why := replace(task.budget, requests=None, tool_calls=None).used_up(task.usage):
            return task.paused(why), _Round()
        first = calls[0]
        if self._remote is not None and _SERVER in first.name and not first.malformed:
            watcher.call(first)
            return await self._do_elsewhere(task, first, self._remote, watcher)
        if not self._for_machine(first):
            watcher.call(first)
            return self._do_on_host(task, first)
        batch = [first]
        for call in calls[1 : self._parallel]:
            # What a person is to be asked about is asked when its turn has come, on the state as it then is.
            if not self._for_machine(call) or not self._bench.runs_unasked(task, call, Changeset(())):
                break
            batch.append(call)
        return await self._do_in_machines(task, batch, watcher)

    @staticmethod
    def _for_machine(call: ToolCall) -> bool:
        return not call.malformed and call.name in IN_MACHINE

    def _do_on_host(self, task: Task, call: ToolCall) -> tuple[Task, _Round]:
        if call.malformed:
            return task, _Round([_failed(call, f"{call.name} was not called: {call.malformed}.")])
        match call.name:
            case "publish" if not len(task.unpublished):
                return task, _Round(
                    [_answer(call, "There is nothing to publish: nothing changed since the last time.")]
                )
            case "publish" if task.publish == "never":
                return task, _Round([_failed(call, "Nothing of this task is to be published, the person said.")])
            case "publish":
                return replace(task, status=Status.WAITING, request=request_id(task), asked_for="publish"), _Round()
            case "ask_user" if isinstance(question := call.arguments.get("question"), str) and question.strip():
                return replace(task, status=Status.WAITING, question=question[:20_000]), _Round()
            case "read_output":
                return task, _Round([self._read_on(task, call)])
        known = ", ".join(tool.name for tool in _TOOLS)
        wrong = "has wrong arguments" if call.name in {PUBLISH, ASK_USER, READ_OUTPUT} else "is no tool"
        return task, _Round([_failed(call, f"{call.name[:64]!a} {wrong}; there is {known}.")])

    async def _do_elsewhere(
        self, task: Task, call: ToolCall, remote: RemoteTools, watcher: Watcher
    ) -> tuple[Task, _Round]:
        """A call of another server's tool: asked for under one id, however often this step is done."""
        request = task.request or request_id(task)
        try:
            outcome = await remote.call(task, call, request)
        except ApprovalNeeded as error:
            return replace(task, status=Status.WAITING, request=error.request_id, asked_for="call"), _Round()
        except TaskStopped:
            raise
        except (*_OF_THE_CALL, ApprovalError, McpServerFailed, SettingsError) as error:
            watcher.outcome(call, None, error.message)
            text = " ".join(part for part in (error.message, error.kept, error.hint) if part)
            return task.running(), _Round([_failed(call, text)])
        name = f"out-{task.step}-0"
        text, was_cut = cut(outcome.text, name)
        watcher.outcome(call, outcome, "")
        added = _Round([_answer(call, text, failed=outcome.failed, origin=f"the server {call.name.split(_SERVER)[0]}")])
        if was_cut:
            added.outputs[name] = outcome.text
        return task.running(), added

    def _read_on(self, task: Task, call: ToolCall) -> Message:
        name, offset = call.arguments.get("name"), call.arguments.get("offset", 0)
        if not isinstance(name, str) or not isinstance(offset, int):
            return _failed(call, "read_output takes a name and an offset.")
        text = self._store.output(task.id, name[:32])
        if text is None:
            return _failed(call, f"There is no outcome {name[:32]!a}.")
        return _answer(call, page(text, name, offset), origin="an outcome before")

    async def _do_in_machines(self, task: Task, batch: Sequence[ToolCall], watcher: Watcher) -> tuple[Task, _Round]:
        """Evaluate calls beside each other on one state, and keep those that mean the same one after the other."""
        plans: dict[int, Plan] = {}
        done: dict[int, Evaluated | LuminaGuardError] = {}
        for number, call in enumerate(batch):
            watcher.call(call)
            try:
                work = plan(call.name, call.arguments)
                plans[number] = replace(work, timeout_s=max(1.0, min(work.timeout_s, self._left_s(task))))
            except ActionInvalid as error:
                done[number] = error
        taken: set[int] = set()
        try:
            async with anyio.create_task_group() as tasks:
                for number, work in plans.items():
                    tasks.start_soon(self._evaluate, task, batch[number], work, number, done)
            return self._accept(task, batch, plans, done, taken, watcher)
        finally:
            for number, one in done.items():
                if isinstance(one, Evaluated) and one.owner and number not in taken:
                    self._bench.drop(one.owner)

    async def _evaluate(
        self, task: Task, call: ToolCall, work: Plan, number: int, done: dict[int, Evaluated | LuminaGuardError]
    ) -> None:
        try:
            done[number] = await self._bench.evaluate(task, call, work)
        except LuminaGuardError as error:
            done[number] = error  # what is wrong with this call is no reason for the others to end

    def _accept(
        self, task: Task, batch: Sequence[ToolCall], plans: dict[int, Plan],
        done: dict[int, Evaluated | LuminaGuardError], taken: set[int], watcher: Watcher,
    ) -> tuple[Task, _Round]:  # fmt: skip
        """Take outcomes in the order of the calls, as long as none depends on what an earlier one changed."""
        after, added, changed = task, _Round(), Changeset(())
        for number, call in enumerate(batch):
            outcome = done[number]
            if number in plans and len(changed) and self._depends(task, plans[number], changed, outcome):
                watcher.note(f"{call.name} is done again, on what changed before it")
                break
            if len(changed) and not self._bench.runs_unasked(task, call, changed):
                break  # what came into the folder brings labels along, under which it is judged otherwise
            if isinstance(outcome, TaskStopped) or (
                isinstance(outcome, LuminaGuardError) and not isinstance(outcome, _OF_THE_CALL)
            ):
                raise outcome
            if isinstance(outcome, ApprovalNeeded):
                if not added.messages:
                    after = replace(after, status=Status.WAITING, request=outcome.request_id, asked_for="run")
                break
            if isinstance(outcome, LuminaGuardError):
                added.messages.append(_failed(call, f"{outcome.message} {outcome.hint}"))
                watcher.outcome(call, None, outcome.message)
                continue
            name = f"out-{task.step}-{number}"
            text, was_cut = cut(outcome.text, name)
            if was_cut:
                added.outputs[name] = outcome.text
            added.messages.append(_answer(call, text, failed=outcome.failed, origin=_MACHINE))
            watcher.outcome(call, outcome, "")
            if len(outcome.changes):
                self._bench.take(task, outcome.owner)
                taken.add(number)
                changed = changed.then(outcome.changes)
                after = replace(after, snapshot=after.snapshot.after(outcome.changes, self._now_ns() // 10**9))
        if after.publish == "per-action" and len(changed) and after.status is Status.RUNNING:
            after = replace(after, status=Status.WAITING, request=request_id(after), asked_for="action")
        return after, added

    def _depends(self, task: Task, work: Plan, changed: Changeset, outcome: Evaluated | LuminaGuardError) -> bool:
        """Whether a call that ran beside others could have come out otherwise after what they changed."""
        if work.reads is None or changed.touches(work.reads) or self._bench.links_on(task, work.reads):
            return True
        if any(isinstance(change.after, LinkEntry) for change in changed.changes):
            return True
        own = outcome.changes if isinstance(outcome, Evaluated) else Changeset(())
        return any(changed.touches(change.path) for change in own.changes)

    # -- what was waited for ------------------------------------------------------------------------------

    def _after_waiting(self, task: Task, watcher: Watcher) -> tuple[Task, bool]:
        """Go on if a person, or the time, has answered."""
        if task.question:
            return task, False
        history = self.history(task)
        try:
            request, outcome, part = self._asked(task)
        except TaskStopped as error:
            return self._save(task.ended(Status.STOPPED, error.message), _Round(), what="stopped"), True
        except Forbidden as error:
            after, added = self._answered_no(task, history, f"{error.message} {error.hint}")
            return self._save(after, added, what="cliff"), True
        match request.state:
            case State.PENDING | State.CLAIMED | State.UNKNOWN:
                return task, False
            case State.PUBLISHED:
                watcher.note(outcome)
                after, added = self._published(task, history, part)
            case State.APPROVED if task.asked_for == "call":  # its request is used up when it is made
                after, added = replace(task, status=Status.RUNNING), _Round()
            case State.APPROVED if task.asked_for != "run":  # it could not be published, or not yet
                watcher.note(f"{request.id} is approved, and could not be published yet")
                return task, False
            case State.APPROVED:  # it is evaluated now
                after, added = task.running(), _Round()
            case State.STOPPED:
                after, added = task.ended(Status.STOPPED, outcome), _Round()
            case State.RETURNED:
                words = f"The person wants something different: {outcome}"
                watcher.note(words)
                after, added = self._answered_no(task, history, words, final=False)
            case State.EXPIRED:
                after, added = self._answered_no(task, history, "Nobody answered in time, which is a denial.")
            case State.REFUSED if task.asked_for == "finish":  # nobody said no: it can be asked for again
                after, added = task.running().paused(f"not published: {outcome}"), _Round()
            case _:
                words = f"{request.state.value}: {outcome}" if outcome else request.state.value
                watcher.note(words)
                after, added = self._answered_no(task, history, f"It was not done; {words}.")
        return self._save(after, added, what="cliff"), True

    def _asked(self, task: Task) -> tuple[Request, str, tuple[str, ...] | None]:
        """What it waits for; asked for now, if a crash came between the saved step and the request."""
        request, outcome, part = self._cliff.look(task.request)
        if request is None:
            self._cliff.ask_to_publish(task, task.request, task.unpublished)
            request, outcome, part = self._cliff.look(task.request)
        assert request is not None
        if task.asked_for not in {"run", "call"} and request.state in {State.PENDING, State.APPROVED}:
            self._cliff.let_through(task, request)
            request, outcome, part = self._cliff.look(task.request)
            assert request is not None
        return request, outcome, part

    def _published(self, task: Task, history: Sequence[Message], part: tuple[str, ...] | None) -> tuple[Task, _Round]:
        """What was approved is in the folder; what was left out of it is taken back here, too."""
        whole, calls = task.unpublished, open_calls(history)
        taken = whole if part is None else whole.part(part)
        out = [Change(c.path, c.after, c.before) for c in whole.changes if part is not None and c.path not in set(part)]
        after = replace(task.running(), published=task.published.then(taken))
        words = f"Published {len(taken)} changes."
        if out:
            after = replace(after, snapshot=after.snapshot.after(Changeset.of(out), self._now_ns() // 10**9))
            names = ", ".join(visible_name(c.path) for c in out[:20])
            words += f" Left out by the person, and taken back: {names}."
        if task.asked_for == "publish":
            return after, _Round([_answer(calls[0], words)])
        if out and task.asked_for == "action":
            return after, _Round(_not_run(calls, words))
        return after, _Round()

    def _answered_no(
        self, task: Task, history: Sequence[Message], words: str, *, final: bool = True
    ) -> tuple[Task, _Round]:
        """A person, a rule or the time has said no.

        Args:
            task: what asked.
            history: all that was said in it.
            words: what the model reads.
            final: whether a no to the whole outcome ends the task.
        """
        calls = open_calls(history)
        # What a person did not want goes through no rule and no grant later on, as a part of something else.
        after = replace(task.running(), denied=task.denied or task.asked_for in {"publish", "finish"})
        match task.asked_for:
            case "run" | "publish" | "call":
                return after, _Round([_failed(calls[0], words)])
            case "finish" if final:
                return task.ended(Status.DENIED, words), _Round()
            case "finish":
                return after, _Round([Message("user", words)])
        # What single calls changed was asked about: it is taken back, and so is what was to build on it.
        back = Changeset.of(Change(c.path, c.after, c.before) for c in task.unpublished.changes)
        after = replace(after, snapshot=task.snapshot.after(back, self._now_ns() // 10**9))
        return after, _Round(_not_run(calls, f"{words} The changes were taken back."))

    # -- people -------------------------------------------------------------------------------------------

    def answer(self, task: Task, text: str) -> Task:
        """Answer the question that a task asks; it can go on then."""
        calls = open_calls(self.history(task))
        if task.status is not Status.WAITING or not task.question or not calls:
            raise TaskError(f"{task.id} asks no question.", hint=f"See 'luminaguard tasks show {task.id}'.")
        after = replace(task, status=Status.RUNNING, question="")
        return self._save(after, _Round([_answer(calls[0], text, origin="the person")]), what="answer")

    def resume(self, task: Task, **changed: object) -> Task:
        """Let a paused task go on, perhaps with another budget, models or turns; one that waits still waits."""
        status = Status.RUNNING if task.status is Status.PAUSED else task.status
        after: Task = replace(task, status=status, why="", **changed)  # type: ignore[arg-type]  # fields of a task
        return self._save(after, _Round(), what="resume", changed=False)

    def give_up(self, task: Task, why: str) -> Task:
        """Answer the calls that nobody waits for any more: they are not done, and not done again."""
        calls = open_calls(self.history(task))
        after = replace(task.running(), question="") if task.status is Status.WAITING else task
        return self._save(after, _Round([_failed(call, why) for call in calls]), what="given up", changed=False)

    def pause(self, task: Task, why: str) -> Task:
        """Let a task rest where it is, until a person resumes it."""
        return self._save(task.paused(why), _Round(), what="paused", changed=False)

    def cancel(self, task: Task, why: str) -> Task:
        """End a task; what it asked for is not asked any more, not even if this is interrupted in the middle."""
        self._cliff.stop(task, why)
        return self._save(task.ended(Status.CANCELLED, why), _Round(), what="cancel")


def request_id(task: Task) -> str:
    """The id of what a task asks for at its present step."""
    return f"req-{hashlib.sha256(f'{task.id} {task.step}'.encode()).hexdigest()[:12]}"


def _answer(call: ToolCall, text: str, *, failed: bool = False, origin: str = "LuminaGuard") -> Message:
    shown = as_data(call.name, origin, text) if origin not in {"LuminaGuard", "the person"} else text
    return Message("tool", shown, call_id=call.id, tool=call.name, failed=failed, origin=origin)


def _not_run(calls: Sequence[ToolCall], words: str) -> list[Message]:
    """What a model reads where calls changed something, and it was not let in: to the calls after them, or alone."""
    if calls:
        return [_failed(call, f"This was not run. {words}") for call in calls]
    return [Message("user", f"About your last changes: {words}")]


def _failed(call: ToolCall, text: str) -> Message:
    return _answer(call, text, failed=True)

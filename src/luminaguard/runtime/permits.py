"""What is let be done by whoever asks for it: by the rules, by an approval that waits for it, or by a grant.

A changeset is published by whoever decides (:mod:`luminaguard.runtime.decisions`); what is here is done by its asker,
and an approval of it is used up before that.
"""

from __future__ import annotations

import dataclasses
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from luminaguard.actions.model import Risk
from luminaguard.approvals import Request, State
from luminaguard.effects.outside import NetworkRequest
from luminaguard.effects.text import visible
from luminaguard.errors import (
    ApprovalError,
    ApprovalNeeded,
    Forbidden,
    LuminaGuardError,
    MaybeExecuted,
    NotExecuted,
    PublishError,
    RequestNotFound,
    SessionLost,
)
from luminaguard.runtime.policy import action_of, judge

if TYPE_CHECKING:
    from luminaguard.actions.policy import Policy
    from luminaguard.effects.outside import Outside, RemoteCall, ToolRun
    from luminaguard.runtime.core import Runtime

__all__ = ["Permits"]

_NOT_CALLED = "It was not called."


class Permits:
    """Lets tools run, calls be made and requests be sent; made by the runtime."""

    def __init__(self, runtime: Runtime) -> None:
        self._runtime, self._decisions = runtime, runtime.decisions

    def runs_unasked(self, run: ToolRun, policy: Policy, task: str, labels: frozenset[str]) -> bool:
        """Whether the rules let a tool run without anybody's answer; nothing is recorded."""
        _, judged = judge(policy, action_of(_to_run(run, task, labels), run))
        return judged.risk is Risk.GREEN and judged.people == 1

    def permit(self, run: ToolRun, policy: Policy, task: str, labels: frozenset[str], *, home: str = "") -> None:
        """Let a tool run in a machine, or not: by the rules, by an approval that waits for it, or by a grant.

        Args:
            run: what is to run.
            policy: the rules that hold for its folder.
            task: what it belongs to.
            labels: the untrusted input that it follows.
            home: the host that has its folder.

        Raises:
            Forbidden: a rule forbids it; that is recorded.
            ApprovalNeeded: a person must answer first; the request that waits is named.
        """
        self.clear(dataclasses.replace(_to_run(run, task, labels), home=home), run, policy, self._decisions.hand_over)

    def clear(
        self, request: Request, effect: ToolRun | RemoteCall | NetworkRequest, policy: Policy,
        use: Callable[[str], object], *, once: bool = False,
    ) -> None:  # fmt: skip
        """Let what its asker does be done, or not: by the rules, by an approval that waits for it, or by a grant.

        Args:
            request: what would ask for it, without its times.
            effect: what would be done.
            policy: the rules that hold.
            use: uses up the approval of a request; not called where the rules let it.
            once: a request of this very id is this very thing: one that was used before is not done again.

        Raises:
            Forbidden: a rule forbids it; that is recorded.
            ApprovalNeeded: a person must answer first; the request that waits is named.
        """
        judgement, judged = judge(policy, action_of(request, effect))
        if judged.risk is Risk.GREEN and judged.people == 1:
            return
        if judged.risk is Risk.FORBIDDEN:
            self._runtime.ledger.append(f"{effect.kind}.forbidden", tool=_name(effect), workspace=request.workspace,
                                        task=request.task, digest=effect.digest, rule=judgement.rule,
                                        reason=judgement.reason)  # fmt: skip
            raise Forbidden(
                f"A rule forbids to run it ({judgement.rule}): {judgement.reason}",
                hint="'luminaguard policy explain' shows how the rules came to that; change the rule if it is wrong.",
                kept="Nothing ran.",
            )
        if once and self._used_before(request, effect):
            use(request.id)
            return
        for found in () if once else self._runtime.approvals.list(task=request.task):
            if (found.effect, found.digest) == (effect.kind, effect.digest):
                if found.state is State.APPROVED:
                    try:
                        use(found.id)
                        return
                    except PublishError:  # another call that is the same is at it
                        continue
                    except ApprovalError as error:  # such as rules that want another person's answer by now
                        if self._runtime.approvals.get(found.id).state is State.APPROVED:
                            self._runtime.approvals.void(found.id, error.message)
                        continue
                if found.state is State.PENDING:
                    raise ApprovalNeeded(found.id)
        now = self._runtime.ledger.current_time()
        until = now + self._runtime.settings.approval_ttl_s * 1_000_000_000
        request = self._decisions.ask(dataclasses.replace(request, created_ns=now, expires_ns=until), effect)
        if (answer := self._decisions.without_asking(request)) is None:
            raise ApprovalNeeded(request.id)
        self._decisions.approve_and_hand_over(request, answer)
        use(request.id)

    def _used_before(self, request: Request, effect: Outside) -> bool:
        """Whether a request of this id is approved, and not used; raises for one that waits, was used, or ended."""
        try:
            found = self._runtime.approvals.get(request.id)
        except RequestNotFound:
            return False
        if found.digest != effect.digest:
            raise ApprovalError(f"{request.id} is about another call.", hint="Make the call anew.", kept=_NOT_CALLED)
        match found.state:
            case State.APPROVED:
                return True
            case State.PENDING | State.CLAIMED | State.UNKNOWN:
                raise ApprovalNeeded(request.id)
            case State.DONE:
                raise MaybeExecuted(
                    f"{request.id} was called before, and its answer was lost.", hint="Look there what became of it.",
                    kept="It was not repeated.",
                )  # fmt: skip
            case _:
                outcome = self._runtime.approvals.outcome(request.id)
                raise Forbidden(f"{request.id} is {found.state.value}: {visible(outcome)}.", kept=_NOT_CALLED,
                                hint="Do something else.")  # fmt: skip

    @contextmanager
    def doing(self, request_id: str) -> Iterator[None]:
        """Do what was approved in this context, once; how it ends is recorded, and after a crash it is unknown.

        Raises:
            ApprovalError: there is no valid, unused approval; the context is not entered.
        """
        with self._used_by_me(request_id):  # recovery leaves alone what somebody is at
            self._decisions.claim(request_id, hand_over=False)
            try:
                yield
            except (NotExecuted, SessionLost) as error:
                self._runtime.approvals.finish(request_id, State.REFUSED, error.message)
                raise
            except LuminaGuardError as error:
                self._runtime.approvals.finish(request_id, State.UNKNOWN, error.message)
                raise
            except BaseException:
                self._runtime.approvals.finish(request_id, State.UNKNOWN, "interrupted; it may have been done")
                raise
            self._runtime.approvals.finish(request_id, State.DONE, "it was called")

    @contextmanager
    def _used_by_me(self, request_id: str) -> Iterator[None]:
        try:
            lock = self._runtime.publisher.lock(request_id)
            lock.__enter__()
        except PublishError:
            raise PublishError(f"Another call uses the approval of {request_id}.", hint="Ask again.") from None
        try:
            yield
        finally:
            lock.__exit__(None, None, None)


def _to_run(run: ToolRun, task: str, labels: frozenset[str]) -> Request:
    """A request to run a tool, without its times."""
    return Request(
        id=f"req-{secrets.token_hex(6)}", workspace=run.workspace, inode=0, digest=run.digest, command=_words(run),
        exit_code=0, created_ns=0, expires_ns=0, state=State.PENDING, effect="run", task=task,
        taint=tuple(sorted(labels)),
    )  # fmt: skip


def _name(effect: ToolRun | RemoteCall | NetworkRequest) -> str:
    return f"{effect.method} {effect.url}"[:500] if isinstance(effect, NetworkRequest) else effect.tool


def _words(run: ToolRun) -> tuple[str, ...]:
    """A tool and its arguments in a line."""
    words = [str(word) for value in run.arguments.values() for word in (value if isinstance(value, list) else [value])]
    return (run.tool, *(word[:500] for word in words[:100]))

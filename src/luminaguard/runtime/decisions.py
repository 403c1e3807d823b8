"""What is decided and what follows: judging, cards, signed decisions, grants, publishing once."""

from __future__ import annotations

import dataclasses
import json
import secrets
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from luminaguard.actions.model import Risk, Severity
from luminaguard.approvals import (
    Decision,
    Grant,
    Judged,
    Limits,
    Request,
    Scope,
    State,
    Verdict,
    key_id,
    sign,
    sign_grant,
)
from luminaguard.effects.text import visible
from luminaguard.errors import (
    ApprovalError,
    Forbidden,
    LuminaGuardError,
    OutcomeUnknown,
    PolicyChanged,
    TaskStopped,
)
from luminaguard.runtime.policy import action_of, judge
from luminaguard.runtime.recovery import Recovery
from luminaguard.storage.approvers import OWNER

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    from luminaguard.actions.model import Action
    from luminaguard.actions.policy import Judgement, Policy
    from luminaguard.effects.card import DiffCard
    from luminaguard.effects.changes import Changeset
    from luminaguard.effects.outside import Outside
    from luminaguard.runtime.core import Runtime

__all__ = ["OWNER", "Again", "Answer", "Decisions"]

_LOCK_WAIT_S = 10.0
_STORY = ("command", "exit_code", "changes", "label", "verdict", "person", "reason", "state", "outcome", "why", "rule")
_MOST_WORDS = 120
_NOT_CALLED = "It was not called."
_DISCARDED = "Nothing was published; what the machine changed was discarded."
Contents = Callable[[str], bytes | None]
Progress = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Answer:
    """What somebody answers.

    Attributes:
        means: how, for the record: ``terminal``, ``flag --publish always``, ``rule NAME``.
        reason: what the agent gets to read.
        part: the paths that are approved; None is all.
        person, key: who else than the owner of this installation, with their unlocked key.
    """

    verdict: Verdict
    means: str
    reason: str = ""
    part: tuple[str, ...] | None = None
    person: str = OWNER
    key: Ed25519PrivateKey | None = None


@dataclass(frozen=True, slots=True)
class Again:
    """The same answer for what comes again: how often, for how many seconds, with what loosened."""

    uses: int
    seconds: int
    patterns: Mapping[str, str] = dataclasses.field(default_factory=dict)


class Decisions:
    """Judges, decides and publishes for one runtime."""

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self._recovery = Recovery(runtime)
        self._last: tuple[object, Action] | None = None

    # -- what is asked ------------------------------------------------------------------------------

    def card(self, request: Request) -> DiffCard:
        """The diff card of a request, from the stored contents and the base on the host."""
        return self._card(request, self._runtime.approvals.effect(request.id))

    def _card(self, request: Request, effect: Changeset | Outside) -> DiffCard:
        from luminaguard.effects.card import make_card
        from luminaguard.effects.changes import Changeset
        from luminaguard.effects.outside_card import make_outside_card

        if not isinstance(effect, Changeset):
            return make_outside_card(effect)
        with self.contents(request, effect) as (before, after):
            return make_card(effect, before, after)

    @contextmanager
    def contents(self, request: Request, changeset: Changeset) -> Iterator[tuple[Contents, Contents]]:
        """What gives the contents before and after of a changeset, by SHA-256, while this context lasts."""
        from luminaguard.effects.card import MAX_TEXT
        from luminaguard.workspaces.base import base_contents

        with base_contents(Path(request.workspace), changeset, MAX_TEXT) as before:
            blobs = self._runtime.blobs
            kept = (lambda sha: before(sha) or blobs.read(request.id, sha, MAX_TEXT)) if request.home else before
            yield kept, lambda sha: blobs.read(request.id, sha, MAX_TEXT)

    def story(self, request: Request) -> list[tuple[int, str]]:
        """What the ledger says of a request, its machine and its task: nanoseconds since the epoch, and words."""
        names = {request.id, f"vm-{request.id.split('-')[1]}"}  # one of several folders has a number behind it
        told = []
        for entry in self._runtime.ledger.entries():
            body = json.loads(entry.body)
            if names & {body.get("request"), body.get("vm")} or (request.task and body.get("task") == request.task):
                words = ", ".join(f"{key} {_short(body[key])}" for key in _STORY if body.get(key, "") != "")
                told.append((entry.time_ns, f"{entry.kind}: {words}" if words else entry.kind))
        return told

    def ask(self, request: Request, effect: Changeset | Outside) -> Request:
        """Judge an effect and ask for its approval.

        Returns:
            The request as it was stored, with what the rules say of it.

        Raises:
            Forbidden: a rule forbids it; that is recorded, and nobody is asked.
            PolicyInvalid: the rules cannot be read.
        """
        if request.task and (why := self._runtime.tasks.stopped(request.task)) is not None:
            self._runtime.ledger.append("effect.forbidden", request=request.id, task=request.task, reason=why)
            raise TaskStopped(request.task, why, kept=_DISCARDED)
        judgement, judged = self.judge(request, effect)
        if judged.risk is Risk.FORBIDDEN:
            self._runtime.ledger.append("effect.forbidden", request=request.id, workspace=request.workspace,
                                        digest=request.digest, effect=request.effect, task=request.task,
                                        rule=judgement.rule, reason=judgement.reason, policy=judged.policy)  # fmt: skip
            raise _forbidden(judged)
        home = request.home or (self._runtime.host if request.effect == "changeset" else "")
        stored = dataclasses.replace(request, judged=judged, home=home)
        self._runtime.approvals.create(stored, effect)
        return stored

    def judge(self, request: Request, effect: Changeset | Outside) -> tuple[Judgement, Judged]:
        """What the rules say of a request's effect now, and of all that its task has read; raises PolicyInvalid."""
        policy = self._policy(request)
        return judge(policy, self._action(request, effect, contents=policy.needs_card))

    def _policy(self, request: Request) -> Policy:
        workspace = Path(request.workspace) if request.workspace else None
        return self._runtime.policy(workspace, home=request.home, task=request.task)

    def _action(self, request: Request, effect: Changeset | Outside, *, contents: bool) -> Action:
        labels = self._runtime.tasks.labels(request.task) if request.task else frozenset()
        key = (request.id, request.digest, labels, contents)
        last = self._last  # another thread may be at another one
        if last is None or last[0] != key:  # it is judged when it is asked, decided and done
            card = self._card(request, effect) if contents and request.effect == "changeset" else None
            last = self._last = (key, action_of(request, effect, card, labels))
        return last[1]

    def looked_at(self, request: Request) -> Request:
        """The request as it is to be shown: judged again, and recorded so, if the rules changed since."""
        if request.state is not State.PENDING or self._policy(request).digest == request.judged.policy:
            return request
        return self._judged_again(request)

    def _judged_again(self, request: Request) -> Request:
        """The request with what the rules say of it now; one that is forbidden by now has ended."""
        _, judged = self.judge(request, self._runtime.approvals.effect(request.id))
        if judged == request.judged:
            return request
        again = self._runtime.approvals.judge_again(request.id, judged)
        if again.state is not State.PENDING:
            self._runtime.blobs.forget(request.id)
        return again

    def action(self, request: Request) -> Action:
        """The action that a request's effect is, with all that its contents show."""
        return self._action(request, self._runtime.approvals.effect(request.id), contents=True)

    def without_asking(self, request: Request) -> Answer | None:
        """The answer that a person gave before: by a rule that they wrote, or by a grant. A grant's use counts."""
        judged = request.judged
        if judged.risk is Risk.GREEN and judged.people == 1:
            return Answer(Verdict.APPROVE, f"rule {judged.rule}", person="rule")
        keys = self._runtime.approvers.public()
        standing, _ = self._runtime.grants.use(self.action(request), judged, request.id, keys)
        if standing is None:
            return None
        grant = standing.grant
        return Answer(Verdict.APPROVE, f"grant {grant.id} (use {standing.uses} of {grant.limits.uses})", person="grant")

    def unlock(self, name: str, passphrase: str) -> Ed25519PrivateKey:
        """Another person's key, for their answer; a wrong passphrase is recorded.

        Raises:
            ApprovalError: there is no such person, or it is not theirs.
        """
        try:
            return self._runtime.approvers.unlock(name, passphrase)
        except ApprovalError as error:
            self._runtime.ledger.append("approver.refused", name=visible(name)[:64], why=visible(error.message))
            raise

    # -- what is answered -----------------------------------------------------------------------------

    def decide(self, request: Request, answer: Answer) -> Request:
        """Sign and store an answer; return the request as it then stands.

        Raises:
            ApprovalError: the request is not pending any more, or the answer does not fit it.
            PolicyChanged: other rules hold than when it was shown; nothing was decided.
        """
        self._refuse_other_rules(request, answer.verdict)
        digest = request.digest
        if answer.part is not None:
            try:
                digest = self._runtime.approvals.changeset(request.id).part(answer.part).digest
            except LuminaGuardError as error:
                self._runtime.approvals.refused(request.id, error)
                raise
        return self._decide(self._signed(request, answer, digest))

    def accept(self, decision: Decision) -> Request:
        """Store a decision that an approver signed elsewhere; return the request as it then stands.

        Raises:
            ApprovalError: as :meth:`decide`; or it bears the name of somebody else than its key's owner.
            PolicyChanged: other rules hold than when it was shown; nothing was decided.
        """
        request = self._runtime.approvals.get(decision.request_id)
        approvers = self._runtime.approvers
        known = {key_id(key): name for name, key in approvers.people().items()}
        known[key_id(approvers.owner().public_key())] = OWNER
        if known.get(decision.approver) != decision.person:
            error = ApprovalError("The decision does not bear the name of its key.", hint="Sign it with your own.")
            self._runtime.approvals.refused(request.id, error)
            raise error
        self._refuse_other_rules(request, decision.verdict)
        if request.state is State.APPROVED and decision.verdict is not Verdict.APPROVE:
            ended = self._runtime.approvals.take_back(decision, approvers.public())
            self._runtime.blobs.forget(request.id)
            return ended
        return self._decide(decision)

    def _refuse_other_rules(self, request: Request, verdict: Verdict) -> None:
        """Nobody has to look again to let nothing through. Time and taint change what rules say, too."""
        again = self._judged_again(request) if verdict is Verdict.APPROVE else request
        if again.judged == request.judged:
            return
        if again.state is State.DENIED:
            raise _forbidden(again.judged)
        raise PolicyChanged(
            f"{request.id} is judged otherwise than when it was shown: it is {again.judged.severity.value} now "
            f"({again.judged.reason})",
            hint="Look at it again, then decide.",
            kept="Nothing was decided.",
        )

    def _decide(self, decision: Decision) -> Request:
        decided = self._runtime.approvals.decide(decision, self._runtime.approvers.public())
        if decided.state not in {State.PENDING, State.APPROVED}:
            self._runtime.blobs.forget(decision.request_id)
        return decided

    def _signed(self, request: Request, answer: Answer, digest: str) -> Decision:
        decision = Decision(
            request_id=request.id, digest=digest, workspace=request.workspace, verdict=answer.verdict,
            means=answer.means, decided_ns=self._runtime.ledger.current_time(), expires_ns=request.expires_ns,
            nonce=secrets.token_hex(16), approver="", reason=answer.reason, part=answer.part,
            policy=request.judged.policy, person=answer.person,
        )  # fmt: skip
        return sign(decision, answer.key or self._runtime.approvers.owner())

    def approve_and_publish(
        self, request: Request, answer: Answer, *, again: Again | None = None, step: Progress = lambda _: None
    ) -> Request:
        """Approve a request and publish it in one go: no approval is left standing if nobody can publish now.

        Args:
            request: what to publish.
            answer: an approval.
            again: grant the same for what comes again.
            step: told before each step.

        Returns:
            The request as it then stands: PENDING if another person must approve it, too; APPROVED if another host
            has the folder, and publishes it.

        Raises:
            ApprovalError: the request is not pending any more.
            PublishError: another process publishes into the folder and does not end; nothing was decided.
        """
        if request.home != self._runtime.host:  # that host's worker publishes it
            return self.approve_and_hand_over(request, answer, again=again)
        grant = self._grant(request, again, answer) if again else None
        with self._runtime.publisher.lock(request.workspace, wait_s=_LOCK_WAIT_S):
            if request.state is State.APPROVED:  # a crash may have come between deciding and publishing
                self._check_as_before(request, answer)
            else:
                request = self.decide(request, answer)
            if request.state is State.PENDING:
                return request
            self._publish(request.id, step)
            if grant is not None:
                self._runtime.grants.create(grant, self._runtime.approvers.public())
        return self._runtime.approvals.get(request.id)

    def _check_as_before(self, request: Request, answer: Answer) -> None:
        """What was approved before is published as it was approved, not as somebody says now."""
        standing = self._runtime.approvals.decisions(request.id)
        if answer.part != standing[0].part or answer.key is not None:
            error = ApprovalError(
                f"{request.id} was approved before in another way.",
                hint="'luminaguard approvals approve ID' alone publishes it as it was; 'deny' takes it back.",
            )
            self._runtime.approvals.refused(request.id, error)
            raise error

    def approve_and_hand_over(self, request: Request, answer: Answer, *, again: Again | None = None) -> Request:
        """Approve an effect that somebody else does: whoever asked for it, or another host that has the folder."""
        grant = self._grant(request, again, answer) if again else None
        request = self.decide(request, answer)
        if grant is not None:
            self._runtime.grants.create(grant, self._runtime.approvers.public())
        return request

    def hand_over(self, request_id: str) -> Request:
        """Use up the approval of an effect that its asker carries out: whoever gets this back may do it, once.

        Raises:
            ApprovalError: there is no valid, unused approval.
        """
        return self.claim(request_id, hand_over=True)

    def claim(self, request_id: str, *, hand_over: bool) -> Request:
        """Use up an approval, before what it lets is done; raises ApprovalError if there is no valid, unused one."""
        effect = self._runtime.approvals.effect(request_id)
        people = self._people(self._runtime.approvals.get(request_id))
        keys = self._runtime.approvers.public()
        self._runtime.approvals.claim(request_id, effect.digest, keys, people=people, hand_over=hand_over)
        return self._runtime.approvals.get(request_id)

    def deny(self, request: Request, answer: Answer) -> Request:
        """Answer with anything but an approval, or take back an approval that was not used.

        Raises:
            ApprovalError: it is too late.
        """
        if request.state is State.APPROVED:
            signed = self._signed(request, answer, request.digest)
            ended = self._runtime.approvals.take_back(signed, self._runtime.approvers.public())
            self._runtime.blobs.forget(request.id)
            return ended
        return self.decide(request, answer)

    def scope(self, request: Request, patterns: Mapping[str, str] | None = None) -> Scope:
        """What a grant made from a request would be for; raises ApprovalError if none can be made."""
        return Scope.of(self.action(request), request.judged, patterns)

    def _grant(self, request: Request, again: Again, answer: Answer) -> Grant:
        """A signed grant; refused before anything is decided."""
        from luminaguard.approvals.grants import LONGEST_S, MOST_USES

        if request.judged.severity is Severity.CRITICAL or request.judged.people > 1:
            raise ApprovalError(
                "What is critical, or needs two people, is asked for each time.", hint="Approve it without a grant."
            )
        if answer.part is not None or answer.verdict is not Verdict.APPROVE:
            raise ApprovalError("A grant is made from the approval of all that was shown.", hint="Leave one out.")
        if not (0 < again.uses <= MOST_USES and 0 < again.seconds <= LONGEST_S):
            raise ApprovalError(
                f"A grant is for at most {MOST_USES} uses and {LONGEST_S // 86400} days.", hint="Choose less."
            )
        now = self._runtime.ledger.current_time()
        grant = Grant(
            id=f"gr-{secrets.token_hex(6)}", made_from=request.id, scope=self.scope(request, again.patterns),
            limits=Limits(now + again.seconds * 1_000_000_000, again.uses), created_ns=now,
            nonce=secrets.token_hex(16), approver="", person=answer.person,
        )  # fmt: skip
        return sign_grant(grant, answer.key or self._runtime.approvers.owner())

    def close_unknown(self, request_id: str) -> str:
        """End a request whose outcome is unknown, after a person has looked; return what was kept.

        Raises:
            ApprovalError: its outcome is known.
        """
        request = self._runtime.approvals.get(request_id)
        with self._runtime.publisher.lock(request.workspace):
            if self._runtime.approvals.get(request_id).state is not State.UNKNOWN:
                raise ApprovalError(
                    f"{request_id} is {request.state.value}: its outcome is not unknown.",
                    hint="Only what an interruption left open is closed; see 'luminaguard approvals show'.",
                )
            self._runtime.approvals.finish(request_id, State.REFUSED, "closed by a person; the outcome stays unknown")
            aside = self._runtime.publisher.set_aside(request_id)
        return f"its journal is kept as {aside}" if aside else "there was no journal any more"

    # -- publishing -------------------------------------------------------------------------------------

    def publish(self, request_id: str, step: Progress = lambda _: None) -> None:
        """Publish an approved request, once.

        Raises:
            ApprovalError: there is no valid, unused approval.
            Conflict: the host's files are not the base any more; nothing was written.
            PublishError: nothing was published, or (OutcomeUnknown) a person must look.
        """
        request = self._runtime.approvals.get(request_id)
        with self._runtime.publisher.lock(request.workspace):
            self._publish(request_id, step)

    def _publish(self, request_id: str, step: Progress) -> None:
        """The caller holds the lock of the workspace."""
        from luminaguard.workspaces.own import refuse_changes

        request = self._runtime.approvals.get(request_id)
        changeset, outcome = self._runtime.approvals.changeset(request_id), "published"
        decided = self._runtime.approvals.decisions(request_id)
        if decided and (part := decided[0].part) is not None:
            whole, changeset = len(changeset), changeset.part(part)
            outcome = f"published a part: {len(changeset)} of {whole} changes"
        people = self._people(request)
        refuse_changes(changeset, self._runtime.own_paths(Path(request.workspace)))
        self._recovery.recover_workspace(request.workspace)
        self._runtime.approvals.claim(request_id, changeset.digest, self._runtime.approvers.public(), people=people)
        try:
            self._runtime.publisher.publish(request_id, request.workspace, request.inode, changeset, step)
        except OutcomeUnknown as error:
            self._runtime.approvals.finish(request_id, State.UNKNOWN, error.message)
            raise
        except LuminaGuardError as error:
            self._recovery.close(request_id, State.REFUSED, error.message)
            raise
        self._recovery.close(request_id, State.PUBLISHED, outcome)

    def _people(self, request: Request) -> int:
        """How many people must have approved, by the rules that hold now: what the database says is not taken.

        Raises:
            Forbidden: an approval does not outlive a rule that forbids what it is for.
        """
        _, judged = self.judge(request, self._runtime.approvals.effect(request.id))
        if judged.risk is Risk.FORBIDDEN:
            if request.state is State.APPROVED:
                self._runtime.approvals.void(request.id, judged.reason)
                self._runtime.blobs.forget(request.id)
            raise _forbidden(judged)
        return judged.people

    def recover(self) -> list[str]:
        """Undo or finish what crashed processes left; return what was done, in sentences."""
        return self._recovery.recover()


def _short(value: object) -> str:
    text = " ".join(map(str, value)) if isinstance(value, list) else str(value)
    return text if len(text) <= _MOST_WORDS else f"{text[:_MOST_WORDS]} …"


def _forbidden(judged: Judged) -> Forbidden:
    return Forbidden(
        f"It is forbidden: {judged.reason} ({judged.rule}).",
        hint="'luminaguard policy explain' shows how the rules came to that; change the rule if it is wrong.",
        kept=_DISCARDED,
    )

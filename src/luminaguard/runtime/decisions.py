"""What a person decides and what follows: cards, signed decisions, publishing once, recovery after a crash."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from luminaguard import log
from luminaguard.errors import LuminaGuardError, OutcomeUnknown, RequestNotFound

if TYPE_CHECKING:
    from luminaguard.approvals import Request
    from luminaguard.effects.card import DiffCard
    from luminaguard.runtime.core import Runtime

__all__ = ["Decisions"]

_ORPHAN_AGE_S = 3600
_LOCK_WAIT_S = 10.0
Progress = Callable[[str], None]


class Decisions:
    """Decides and publishes for one runtime."""

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime

    def card(self, request: Request) -> DiffCard:
        """The diff card of a request, from the stored contents and the base on the host."""
        from luminaguard.effects.card import MAX_TEXT, make_card
        from luminaguard.workspaces.base import base_contents

        changeset = self._runtime.approvals.changeset(request.id)
        with base_contents(Path(request.workspace), changeset, MAX_TEXT) as before:
            return make_card(changeset, before, lambda sha: self._runtime.blobs.read(request.id, sha, MAX_TEXT))

    def decide(self, request: Request, *, approve: bool, means: str) -> None:
        """Sign and store a decision about a request, as the approver of this installation.

        Raises:
            ApprovalError: the request is not pending any more.
        """
        from luminaguard.approvals import Decision, Verdict, sign

        now = self._runtime.ledger.current_time()
        verdict = Verdict.APPROVE if approve else Verdict.DENY
        decision = Decision(
            request_id=request.id, digest=request.digest, workspace=request.workspace, verdict=verdict,
            means=means, decided_ns=now, expires_ns=request.expires_ns, nonce=secrets.token_hex(16), approver="",
        )  # fmt: skip
        key = self._approver()
        self._runtime.approvals.decide(sign(decision, key), key.public_key())
        if not approve:
            self._runtime.blobs.forget(request.id)

    def approve_and_publish(self, request: Request, *, means: str, step: Progress = lambda _: None) -> None:
        """Approve a request and publish it in one go: no approval is left standing if nobody can publish now.

        Args:
            request: what to publish.
            means: how the person decided, for the record.
            step: told before each step.

        Raises:
            ApprovalError: the request is not pending any more.
            PublishError: another process publishes into the folder and does not end; nothing was decided.
        """
        from luminaguard.approvals import State

        with self._runtime.publisher.lock(request.workspace, wait_s=_LOCK_WAIT_S):
            if request.state is not State.APPROVED:  # a crash may have come between deciding and publishing
                self.decide(request, approve=True, means=means)
            self._publish(request.id, step)

    def deny(self, request: Request, *, means: str) -> None:
        """Deny a request, or take back an approval that was not used; its contents are forgotten.

        Raises:
            ApprovalError: it is too late.
        """
        from luminaguard.approvals import State

        if request.state is State.APPROVED:
            self._runtime.approvals.revoke(request.id)
            self._runtime.blobs.forget(request.id)
        else:
            self.decide(request, approve=False, means=means)

    def close_unknown(self, request_id: str) -> str:
        """End a request whose outcome is unknown, after a person has looked; return what was kept.

        Raises:
            ApprovalError: its outcome is known.
        """
        from luminaguard.approvals import State

        self._runtime.approvals.finish(request_id, State.REFUSED, "closed by a person; the outcome stays unknown")
        aside = self._runtime.publisher.set_aside(request_id)
        return f"its journal is kept as {aside}" if aside else "there was no journal any more"

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
        from luminaguard.approvals import State
        from luminaguard.workspaces.own import refuse_changes

        request = self._runtime.approvals.get(request_id)
        changeset = self._runtime.approvals.changeset(request_id)
        refuse_changes(changeset, self._runtime.own_paths(Path(request.workspace)))
        self._recover_workspace(request.workspace)
        self._runtime.approvals.claim(request_id, changeset.digest, self._approver().public_key())
        try:
            self._runtime.publisher.publish(request_id, request.workspace, request.inode, changeset, step)
        except OutcomeUnknown as error:
            self._runtime.approvals.finish(request_id, State.UNKNOWN, error.message)
            raise
        except LuminaGuardError as error:
            self._close(request_id, State.REFUSED, error.message)
            raise
        self._close(request_id, State.PUBLISHED, "published")

    def _close(self, request_id: str, state: Any, outcome: str) -> None:
        """Record the end first; only then may the journal and the contents go."""
        self._runtime.approvals.finish(request_id, state, outcome)
        self._runtime.publisher.close(request_id)
        self._runtime.blobs.forget(request_id)

    # -- after a crash ------------------------------------------------------------------------------

    def recover(self) -> list[str]:
        """Undo or finish what crashed processes left; return what was done, in sentences."""
        from luminaguard.approvals import State
        from luminaguard.workspaces.journal import Journal

        told: list[str] = []
        for path in self._runtime.publisher.interrupted():
            # One that cannot be recovered blocks its own workspace, not the others.
            try:
                workspace = Journal.load(path).workspace
                with self._if_free(workspace) as free:
                    if free and path.exists():
                        told.append(self._recover_one(path))
            except LuminaGuardError as error:
                self._mark_unknown(path.stem, error.message)
                told.append(f"{path.stem}: {error.message} {error.hint}")
        self._forget_orphans()
        for sentence in told:
            log.event("publish.recovered", what=sentence)
        for request in self._runtime.approvals.list():
            if (
                request.state is not State.CLAIMED
                or (self._runtime.folders.state / "journal" / f"{request.id}.json").exists()
            ):
                continue
            with self._if_free(request.workspace) as free:
                # Claimed, nobody at it, and no journal: it ended before anything was written.
                if free and self._runtime.approvals.get(request.id).state is State.CLAIMED:
                    self._close(request.id, State.REFUSED, "interrupted before anything was written")
                    told.append(f"{request.id}: interrupted before anything was written")
        return told

    @contextmanager
    def _if_free(self, workspace: str) -> Iterator[bool]:
        from luminaguard.errors import PublishError

        try:
            lock = self._runtime.publisher.lock(workspace)
            lock.__enter__()
        except PublishError:
            yield False  # its publisher lives: nothing was interrupted
            return
        try:
            yield True
        finally:
            lock.__exit__(None, None, None)

    def _recover_workspace(self, workspace: str) -> None:
        from luminaguard.workspaces.journal import Journal

        for path in self._runtime.publisher.interrupted():
            try:
                concerned = Journal.load(path).workspace == workspace
            except LuminaGuardError as error:
                self._mark_unknown(path.stem, error.message)
                concerned = False
            if concerned:
                self._recover_one(path)

    def _mark_unknown(self, request_id: str, why: str) -> None:
        from luminaguard.approvals import State

        try:
            if self._runtime.approvals.get(request_id).state is State.CLAIMED:
                self._runtime.approvals.finish(request_id, State.UNKNOWN, why)
        except RequestNotFound:
            pass  # the database is newer than the journal: the file alone says that something is open

    def _forget_orphans(self) -> None:
        """Delete contents that no open request and no running machine needs any more."""
        kept = {request.id for request in self._runtime.approvals.list()} | {
            vm.id for vm in self._runtime.tracker.running()
        }
        # A request that is being made has its contents for a moment before its row.
        kept |= {vm_id.replace("vm-", "req-") for vm_id in kept}
        for owner in self._runtime.blobs.owners():
            if owner not in kept and self._runtime.blobs.age_s(owner) > _ORPHAN_AGE_S:
                self._runtime.blobs.forget(owner)

    def _recover_one(self, path: Path) -> str:
        from luminaguard.approvals import State

        request_id, published = self._runtime.publisher.recover(path)
        state = State.PUBLISHED if published else State.REFUSED
        what = "finished after an interruption" if published else "undone after an interruption; nothing was published"
        if self._runtime.approvals.get(request_id).state in {State.CLAIMED, State.UNKNOWN}:
            self._runtime.approvals.finish(request_id, state, what)
        self._runtime.publisher.close(request_id)
        self._runtime.blobs.forget(request_id)
        return f"{request_id}: {what}"

    def _approver(self) -> Any:
        from luminaguard.storage.keys import load_key

        return load_key(self._runtime.folders.state / "keys", "approver")

"""After a crash: publishes that were interrupted are undone or finished, and what nobody needs is forgotten."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from luminaguard import log
from luminaguard.approvals.model import State
from luminaguard.errors import LuminaGuardError, PublishError, RequestNotFound

if TYPE_CHECKING:
    from luminaguard.runtime.core import Runtime

__all__ = ["Recovery"]

_ORPHAN_AGE_S = 3600


class Recovery:
    """Settles for one runtime what killed processes left."""

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime

    def recover(self) -> list[str]:
        """Undo or finish what crashed processes left; return what was done, in sentences."""
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
        for request in self._runtime.approvals.list(readable=True):
            journal = self._runtime.data / "journal" / f"{request.id}.json"
            here = request.home == self._runtime.host or request.effect != "changeset"
            if here and request.state is State.CLAIMED and not journal.exists():
                told += self._settle_claimed(request.id, request.workspace, files=request.effect == "changeset")
        for sentence in told:
            log.event("publish.recovered", what=sentence)
        return told

    def _settle_claimed(self, request_id: str, workspace: str, *, files: bool) -> list[str]:
        """Claimed, nobody at it, and no journal."""
        with self._if_free(workspace if files else request_id) as free:
            if not free or self._runtime.approvals.get(request_id).state is not State.CLAIMED:
                return []
            if files:  # it ended before anything was written
                self.close(request_id, State.REFUSED, "interrupted before anything was written")
                return [f"{request_id}: interrupted before anything was written"]
            self._runtime.approvals.finish(request_id, State.UNKNOWN, "interrupted; it may have been done")
            return [f"{request_id}: interrupted; it may have been done, or not: a person must look"]

    def recover_workspace(self, workspace: str) -> None:
        """Settle what was interrupted in one folder; the caller holds its lock."""
        from luminaguard.workspaces.journal import Journal

        for path in self._runtime.publisher.interrupted():
            try:
                concerned = Journal.load(path).workspace == workspace
            except LuminaGuardError as error:
                self._mark_unknown(path.stem, error.message)
                concerned = False
            if concerned:
                self._recover_one(path)

    def close(self, request_id: str, state: State, outcome: str) -> None:
        """Record the end first; only then may the journal and the contents go."""
        self._runtime.approvals.finish(request_id, state, outcome)
        self._runtime.publisher.close(request_id)
        self._runtime.blobs.forget(request_id)

    @contextmanager
    def _if_free(self, workspace: str) -> Iterator[bool]:
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

    def _mark_unknown(self, request_id: str, why: str) -> None:
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
        request_id, published = self._runtime.publisher.recover(path)
        state = State.PUBLISHED if published else State.REFUSED
        what = "finished after an interruption" if published else "undone after an interruption; nothing was published"
        if self._runtime.approvals.get(request_id).state in {State.CLAIMED, State.UNKNOWN}:
            self._runtime.approvals.finish(request_id, state, what)
        self._runtime.publisher.close(request_id)
        self._runtime.blobs.forget(request_id)
        return f"{request_id}: {what}"

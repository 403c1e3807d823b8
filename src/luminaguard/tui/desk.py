"""What the interface works on: requests that wait, opened cards, and answers; for one runtime, from any thread."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from luminaguard.actions.model import Severity
from luminaguard.approvals.model import Request, State, Verdict
from luminaguard.approvals.words import answered
from luminaguard.effects.card import CardItem, ChangesetCard, DiffCard, Fact, card_title
from luminaguard.effects.changes import Changeset, DirEntry, FileEntry
from luminaguard.effects.text import visible, visible_name
from luminaguard.errors import LuminaGuardError, StorageError

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    from luminaguard.actions.policy import Step
    from luminaguard.runtime import Runtime
    from luminaguard.runtime.decisions import Again, Answer

__all__ = ["Desk", "OpenCard", "Raw"]


_MOST_OPEN = 8


@dataclass(frozen=True, slots=True)
class Raw:
    """A content that is shown as bytes, wherever one looks: its size, and a reader of (offset, count)."""

    size: int
    read: Callable[[int, int], bytes]


class OpenCard:
    """The card of one request: its items one by one, each compared when it is looked at."""

    def __init__(self, runtime: Runtime, request: Request) -> None:
        self.request = request
        self._runtime = runtime
        self._closing = ExitStack()
        self._lock = threading.Lock()
        self._known: dict[int, CardItem] = {}
        self._opened: dict[str, int] = {}
        effect = runtime.approvals.effect(request.id)
        self._whole: DiffCard | None = None
        self._lazy: ChangesetCard | None = None
        if isinstance(effect, Changeset):
            self.changeset: Changeset | None = effect
            before, after = self._closing.enter_context(runtime.decisions.contents(request, effect))
            self._lazy = ChangesetCard(effect, before, after)
            self.paths = tuple(change.path for change in effect.changes)
            title, *_ = card_title(self._lazy.summary()).split("   ")
            self.title, self.facts, self.digest = title, (), effect.digest
        else:
            from luminaguard.effects.outside_card import make_outside_card

            self.changeset = None
            self._whole = make_outside_card(effect)
            self.paths = tuple(item.path for item in self._whole.items)
            self.title, self.facts, self.digest = self._whole.title, self._whole.facts, effect.digest

    title: str
    facts: tuple[Fact, ...]
    digest: str

    def __len__(self) -> int:
        return len(self.paths)

    def outline(self, index: int) -> CardItem:
        """An item without its contents."""
        if self._whole is not None:
            return self._whole.items[index]
        assert self._lazy is not None
        return self._known.get(index) or self._lazy.outline(index)

    def item(self, index: int) -> CardItem:
        """An item with its diff; computed on first use."""
        if self._whole is not None:
            return self._whole.items[index]
        assert self._lazy is not None
        with self._lock:
            if index not in self._known:
                self._known[index] = self._lazy.item(index)[0]
            return self._known[index]

    def raw(self, index: int) -> Raw | None:
        """The new content of an item as bytes; None if it has none that is kept."""
        change = self.changeset.changes[index] if self.changeset else None
        if change is None or not isinstance(change.after, FileEntry) or not change.after.size:
            return None
        with self._lock:
            if change.after.sha256 not in self._opened:
                try:
                    fd = self._runtime.blobs.open(self.request.id, change.after.sha256)
                except StorageError:
                    return None
                if len(self._opened) >= _MOST_OPEN:
                    os.close(self._opened.pop(next(iter(self._opened))))
                self._opened[change.after.sha256] = fd
        return Raw(change.after.size, partial(self._read, change.after.sha256))

    def _read(self, sha256: str, offset: int, count: int) -> bytes:
        with self._lock:
            fd = self._opened.get(sha256)
            return b"" if fd is None else os.pread(fd, count, offset)

    def with_needed(self, index: int) -> frozenset[int]:
        """This change and those that it cannot be made without."""
        if self.changeset is None:
            return frozenset({index})
        needed = self.changeset.needed_with(self.paths[index])
        return frozenset({index, *(i for i, path in enumerate(self.paths) if path in needed)})

    def with_dependent(self, index: int) -> frozenset[int]:
        """This change and those that cannot be made without it."""
        assert self.changeset is not None
        path, change = self.paths[index], self.changeset.changes[index]
        found = {index}
        if isinstance(change.after, DirEntry):
            found |= {i for i, other in enumerate(self.paths) if other.startswith(f"{path}/")}
        for i, other in enumerate(self.changeset.changes):
            gone = isinstance(other.before, DirEntry) and not isinstance(other.after, DirEntry)
            if gone and path.startswith(f"{other.path}/"):
                found.add(i)
        return frozenset(found)

    def close(self) -> None:
        """Let go of the folder and the contents."""
        with self._lock:
            for fd in self._opened.values():
                os.close(fd)
            self._opened.clear()
        self._closing.close()


class Desk:
    """The requests of one runtime, and their answers.

    Args:
        runtime: its parts.
        only: a request that alone is asked about; its answer is returned instead of carried out.
        ended: whether a signal asks to end.
    """

    def __init__(
        self, runtime: Runtime, only: Request | None = None, ended: Callable[[], bool] = lambda: False
    ) -> None:
        self._runtime = runtime
        self._lock = threading.RLock()
        self.only = only
        self.ended = ended

    def waiting(self) -> list[Request]:
        """What waits for an answer, the most severe first, then the oldest."""
        with self._lock:
            found = [self._looked_at(request) for request in self._runtime.approvals.list()
                     if request.state is State.PENDING]  # fmt: skip
        found = [request for request in found if request.state is State.PENDING]
        return sorted(found, key=lambda request: (_rank(request), request.created_ns))

    def _looked_at(self, request: Request) -> Request:
        try:
            return self._runtime.decisions.looked_at(request)
        except LuminaGuardError:
            return request  # such as rules of its folder that cannot be read: told when it is opened, or answered

    def state(self, request: Request) -> Request:
        """A request as it stands now."""
        with self._lock:
            return self._runtime.approvals.get(request.id)

    def approved_by(self, request: Request) -> tuple[str, ...]:
        """Who approved a request so far."""
        with self._lock:
            decisions = self._runtime.approvals.decisions(request.id)
        return tuple(decision.person for decision in decisions if decision.verdict is Verdict.APPROVE)

    def people(self) -> list[str]:
        """Who may answer, beside the owner."""
        return list(self._runtime.approvers.people())

    def unlock(self, name: str, passphrase: str) -> Ed25519PrivateKey:
        """A person's key; raises ApprovalError."""
        with self._lock:
            return self._runtime.decisions.unlock(name, passphrase)

    def open(self, request: Request) -> OpenCard:
        """The card of a request; close it."""
        with self._lock:
            return OpenCard(self._runtime, request)

    def story(self, request: Request) -> list[tuple[int, str]]:
        """What happened so far: times in nanoseconds since the epoch, and words."""
        with self._lock:
            return self._runtime.decisions.story(request)

    def steps(self, request: Request) -> tuple[Step, ...]:
        """The rules that were looked at, in their order."""
        with self._lock:
            judgement, _ = self._runtime.decisions.judge(request, self._runtime.approvals.effect(request.id))
        return judgement.steps

    def now_ns(self) -> int:
        """By the ledger's clock, which judges expiry."""
        with self._lock:
            return self._runtime.ledger.current_time()

    def scope(self, request: Request) -> list[str]:
        """What a grant made from a request would be for, in lines."""
        with self._lock:
            scope = self._runtime.decisions.scope(request)
        lines = [f"{name}: {visible(value)}" for name, value in scope.values]
        for path, kind, _, target in scope.files:
            lines.append(f"{kind} {visible_name(path)}" + (f" -> {visible_name(target)}" if target else ""))
        return lines

    def carry_out(self, request: Request, answer: Answer, again: Again | None = None) -> str:
        """Do what was answered; return what came of it, in words.

        Raises:
            LuminaGuardError: it was refused; nothing, or all of it, was done.
        """
        decisions = self._runtime.decisions
        with self._lock:
            if answer.verdict is not Verdict.APPROVE:
                decisions.deny(request, answer)
                return f"{answered(answer.verdict, answer.reason)}; nothing was published"
            if request.effect != "changeset":
                decisions.approve_and_hand_over(request, answer, again=again)
                return "approved: whoever asked may do it once"
            after = decisions.approve_and_publish(request, answer, again=again)
            if after.state is State.PENDING:
                return "approved; another person must approve it, too"
            return visible(self._runtime.approvals.outcome(request.id))


def _rank(request: Request) -> int:
    return -list(Severity).index(request.judged.severity)

"""What a host of a fleet must have of the others: where contents that are not here can be had."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

__all__ = ["Shared"]


class Shared(Protocol):
    """Contents that all hosts can have; each is whole or not there."""

    def put(self, owner: str, name: str, fd: int, *, step: int = 0) -> None:
        """Share the whole of an open file, unless it is shared; ``step`` is the task's that puts it."""

    def fetch(self, owner: str, name: str, path: Path, sha256: str = "") -> bool:
        """Bring one here; whether there was one. Raises StorageError if it is not what its SHA-256 says."""

    def collect(self, owner: str, keep: frozenset[str], step: int) -> None:
        """Forget what is not among ``keep`` and was put before a step."""

    def forget(self, owner: str) -> None:
        """Forget all of an owner's."""

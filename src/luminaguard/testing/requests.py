"""Requests for approval as an action would make them, without a machine: for tests of what comes after."""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from luminaguard.approvals.model import Request, State
from luminaguard.effects.changes import Change, Changeset, DirEntry, Entry, FileEntry, LinkEntry
from luminaguard.effects.outside import Outside

if TYPE_CHECKING:
    from luminaguard.runtime import Runtime

__all__ = ["ask_for", "ask_for_changes"]

_HOUR_NS = 3600 * 10**9


def ask_for_changes(
    runtime: Runtime, workspace: Path, changes: Mapping[str, bytes | int | str | None], *,
    command: tuple[str, ...] = ("true",), task: str = "", taint: tuple[str, ...] = (), request_id: str = "",
    ttl_ns: int = _HOUR_NS,
) -> Request:  # fmt: skip
    """Ask for changes of a folder: path to new content, mode of a new folder, target of a link, or None for gone.

    What is there now is the base; bytes keep the mode of a file that is there and are 0644 otherwise.
    """
    request_id = request_id or f"req-{secrets.token_hex(5)}"
    writer = runtime.blobs.writer(request_id)
    found = []
    for path, new in changes.items():
        before = _entry(workspace / path)
        after: Entry | None
        match new:
            case bytes():
                writer.begin()
                writer.write(new)
                size, sha256 = writer.end()
                after = FileEntry(before.mode if isinstance(before, FileEntry) else 0o644, size, sha256)
            case int():
                after = DirEntry(new)
            case str():
                after = LinkEntry(new)
            case None:
                after = None
        found.append(Change(path, before, after))
    changeset = Changeset.of(found)
    inode = workspace.stat().st_ino if workspace.exists() else 0
    now = runtime.ledger.current_time()
    request = Request(request_id, str(workspace), inode, changeset.digest, command, 0, now, now + ttl_ns, State.PENDING,
                      task=task, taint=taint)  # fmt: skip
    return runtime.decisions.ask(request, changeset)


def ask_for(runtime: Runtime, effect: Outside, *, task: str = "", request_id: str = "") -> Request:
    """Ask for an effect that is no changeset."""
    now = runtime.ledger.current_time()
    request = Request(request_id or f"req-{secrets.token_hex(5)}", "", 0, effect.digest, (effect.kind,), 0, now,
                      now + _HOUR_NS, State.PENDING, effect=effect.kind, task=task)  # type: ignore[arg-type]  # one of EffectKind  # fmt: skip
    return runtime.decisions.ask(request, effect)


def _entry(path: Path) -> Entry | None:
    if path.is_symlink():
        return LinkEntry(str(path.readlink()))
    if path.is_dir():
        return DirEntry(path.stat().st_mode & 0o777)
    if not path.exists():
        return None
    data = path.read_bytes()
    return FileEntry(path.stat().st_mode & 0o777, len(data), hashlib.sha256(data).hexdigest())

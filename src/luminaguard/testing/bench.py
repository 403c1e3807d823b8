"""A double of the workbench: it starts no machines, and plays what two tools would do to a state.

For tests of what is around evaluations (steps, crashes, waiting, publishing), which are many and must be quick;
what machines really do is tested with machines.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import anyio

from luminaguard.effects.changes import Change, Changeset, DirEntry, FileEntry
from luminaguard.reasoning.messages import ToolCall
from luminaguard.runtime.bench import MachineBench
from luminaguard.runtime.core import Runtime
from luminaguard.tasks.model import Task
from luminaguard.tasks.ports import Evaluated
from luminaguard.tools.builtin import Plan
from luminaguard.workspaces.snapshots import Snapshots

__all__ = ["PlayedBench"]


class PlayedBench(MachineBench):
    """Plays ``write_file``, and ``shell`` with ``rm NAME`` or ``chmod NAME``; other calls change nothing."""

    def __init__(self, runtime: Runtime, snapshots: Snapshots, *, takes_s: float = 0) -> None:
        super().__init__(runtime, snapshots)
        self._takes_s = takes_s
        self._blobs = runtime.blobs
        self._states = snapshots
        self.evaluated: list[str] = []

    async def evaluate(self, task: Task, call: ToolCall, work: Plan) -> Evaluated:
        """What the call would do, by its arguments alone."""
        del work
        self.check_first(task)
        entries = task.snapshot.changes.applied_to(self._states.first(task.id).entries)
        self.permit(task, call, Path(task.workspace), entries)
        self.evaluated.append(call.id)
        await anyio.sleep(self._takes_s)
        command = str(call.arguments.get("command", ""))
        owner = f"vm-{task.id}-{task.step}-{call.id}"
        changes = []
        if call.name == "write_file":
            path, content = str(call.arguments["path"]), str(call.arguments["content"]).encode()
            parent = path.rpartition("/")[0]
            if parent and parent not in entries:
                changes.append(Change(parent, None, DirEntry(0o755)))
            writer = self._blobs.writer(owner)
            writer.begin()
            writer.write(content)
            size, sha256 = writer.end()
            before = entries.get(path)
            changes.append(Change(path, before, FileEntry(0o644, size, sha256)))
        elif call.name == "shell" and command.startswith("rm "):
            changes.append(Change(command[3:], entries.get(command[3:]), None))
        elif call.name == "shell" and command.startswith("chmod "):
            before = entries[command[6:]]
            assert isinstance(before, FileEntry)
            # As a machine does: the whole file comes out, whatever of it was changed.
            content = self._content(task, before)
            writer = self._blobs.writer(owner)
            writer.begin()
            writer.write(content)
            writer.end()
            changes.append(Change(command[6:], before, FileEntry(0o755, before.size, before.sha256)))
        found = Changeset.of(change for change in changes if change.before != change.after)
        return Evaluated(f"played {call.name}", failed=False, changes=found, owner=owner if len(found) else "")

    def _content(self, task: Task, entry: FileEntry) -> bytes:
        """What a file holds: of the folder, or of an earlier step."""
        for path in (*Path(task.workspace).rglob("*"), *(self._states.folder / task.id / "contents").iterdir()):
            if path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() == entry.sha256:
                return path.read_bytes()
        raise AssertionError("it is nowhere")

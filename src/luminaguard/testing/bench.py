"""A double of the workbench: it starts no machines, and plays what two tools would do to a state.

For tests of what is around evaluations (steps, crashes, waiting, publishing), which are many and must be quick;
what machines really do is tested with machines.
"""

from __future__ import annotations

from pathlib import Path

from luminaguard.effects.changes import Change, Changeset, DirEntry, FileEntry
from luminaguard.reasoning.messages import ToolCall
from luminaguard.runtime.core import Runtime
from luminaguard.runtime.tasks import MachineBench
from luminaguard.tasks.engine import Evaluated
from luminaguard.tasks.model import Task
from luminaguard.tools.builtin import Plan
from luminaguard.workspaces.snapshots import Snapshots

__all__ = ["PlayedBench"]


class PlayedBench(MachineBench):
    """Plays ``write_file``; of any other tool it says its name, and ``shell`` with ``rm NAME`` deletes a file."""

    def __init__(self, runtime: Runtime, snapshots: Snapshots) -> None:
        super().__init__(runtime, snapshots)
        self._blobs = runtime.blobs
        self._states = snapshots
        self.evaluated: list[str] = []

    async def evaluate(self, task: Task, call: ToolCall, work: Plan) -> Evaluated:
        """What the call would do, by its arguments alone."""
        del work
        entries = task.snapshot.changes.applied_to(self._states.first(task.id).entries)
        self.permit(task, call, Path(task.workspace), entries)
        self.evaluated.append(call.id)
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
        elif call.name == "shell" and (command := str(call.arguments["command"])).startswith("rm "):
            changes.append(Change(command[3:], entries.get(command[3:]), None))
        found = Changeset.of(change for change in changes if change.before != change.after)
        return Evaluated(f"played {call.name}", failed=False, changes=found, owner=owner if len(found) else "")

"""The tools of servers for an agent's tasks: each call opens its server, and is made once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import anyio
import anyio.to_thread

from luminaguard import log
from luminaguard.actions.tools import ToolSpec
from luminaguard.effects.changes import Changeset
from luminaguard.errors import LuminaGuardError, NotExecuted
from luminaguard.mcp.names import Names
from luminaguard.runtime.mcp.servers import McpServers
from luminaguard.tasks.ports import Evaluated

if TYPE_CHECKING:
    from collections.abc import Mapping

    from luminaguard.mcp.definitions import Definition
    from luminaguard.reasoning.messages import ToolCall
    from luminaguard.runtime.core import Runtime
    from luminaguard.tasks.model import Task

__all__ = ["ServerTools"]

_MOST_DESCRIPTION = 4000
_LOOK_S = 10.0


class ServerTools:
    """The tools of all servers that a runtime knows."""

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self._servers = McpServers(runtime)
        self._names = Names()

    async def specs(self) -> Sequence[ToolSpec]:
        """What was accepted of each; of one that was never used, what it says now. One that fails has none."""
        found: dict[str, Mapping[str, Definition]] = {}

        async def look(name: str) -> None:
            try:
                found[name] = await self._tools_of(name)
            except LuminaGuardError as error:
                log.event("mcp.server_missing", server=name, why=error.message)

        with anyio.move_on_after(_LOOK_S):  # one that hangs keeps no model from its turn
            async with anyio.create_task_group() as tasks:
                for name in self._runtime.settings.mcp_servers:
                    tasks.start_soon(look, name)
        return [
            ToolSpec(self._names.add(server, tool), str(definition.get("description", ""))[:_MOST_DESCRIPTION],
                     definition.get("inputSchema") or {"type": "object"})
            for server in sorted(found)
            for tool, definition in found[server].items()
        ]  # fmt: skip

    async def _tools_of(self, name: str) -> Mapping[str, Definition]:
        pinned = await anyio.to_thread.run_sync(self._servers.pinned, name)
        if pinned is not None:
            return pinned
        async with self._servers.open(name) as opened:
            now = await opened.session.list_tools()
        await anyio.to_thread.run_sync(self._servers.check, name, now)
        return now

    async def call(self, task: Task, call: ToolCall, request_id: str) -> Evaluated:
        """Make a call; see :class:`luminaguard.tasks.ports.RemoteTools`."""
        if self._names.find(call.name) is None:
            await self.specs()
        where = self._names.find(call.name)
        if where is None:
            raise NotExecuted(f"There is no tool {call.name[:64]!a}.", hint="Use one that there is.")
        server, tool = where
        async with self._servers.open(server) as opened:
            answer = await self._servers.call(opened, tool, dict(call.arguments), task=task.id, request_id=request_id)
            result = opened.session.in_words(answer)
        # What a server says may be what somebody else wrote there.
        await anyio.to_thread.run_sync(self._runtime.tasks.add_labels, task.id, [(f"mcp:{server}", tool)])
        text = result.text
        for request in opened.requests:
            text += f"\n[it changed files of its own folder; that waits for a person: {request.id}]"
        return Evaluated(text, failed=result.failed, changes=Changeset(()))

"""Servers of tools, each in a machine with a copy of its folder; what it changed is asked for when it has ended."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import anyio

from luminaguard.actions.model import Risk
from luminaguard.approvals import Request, State
from luminaguard.errors import Forbidden, LuminaGuardError, McpServerFailed, SettingsError, ToolQuarantined
from luminaguard.mcp.definitions import Comparison, Definition, compare

if TYPE_CHECKING:
    from luminaguard.mcp.session import Result, Session
    from luminaguard.microvm.channel import Call
    from luminaguard.runtime.core import Runtime
    from luminaguard.runtime.rehearsal import Execution

__all__ = ["McpServers", "Opened"]

_MOST_SAID = 64 << 10
_END_S = 2.0


@dataclass(slots=True)
class Opened:
    """A server in its machine.

    Attributes:
        session: speaks with it.
        execution: what the machine did, once it has ended.
    """

    session: Session
    execution: Execution | None = None


class McpServers:
    """The servers of one runtime, and what was accepted of their tools."""

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime

    @asynccontextmanager
    async def open(self, name: str) -> AsyncIterator[Opened]:
        """Run a server in a machine, for as long as this context lasts; its effects wait afterwards.

        Raises:
            SettingsError: there is none of this name.
            McpServerFailed: it ends, or does not begin to speak.
            LuminaGuardError: what :meth:`Runtime.exec` raises.
        """
        from luminaguard.mcp.session import Pipe, open_session
        from luminaguard.microvm.channel import CallFailed
        from luminaguard.microvm.machine import Command

        settings = self._runtime.settings
        server = settings.mcp_servers.get(name)
        if server is None:
            known = ", ".join(settings.mcp_servers) or "none"
            raise SettingsError(
                f"There is no MCP server {name[:64]!a}.", hint=f"Of luminaguard.toml there is: {known}."
            )
        pipe, said = Pipe(), bytearray()
        opened: Opened | None = None

        async def output(stream: int, data: bytes) -> None:
            if stream == 1:
                await pipe.take(data)
            else:
                said.extend(data)
                del said[:-_MOST_SAID]

        async def feed(call: Call) -> None:
            async for line in pipe.given():
                await call.write(line)
            await call.write_eof()

        failure: list[LuminaGuardError] = []
        done = anyio.Event()

        async def work() -> None:
            command = Command(server.command, processes=settings.processes, profile=settings.profile)
            try:
                execution = await self._runtime.exec(server.folder, command, output=output, feed=feed)
            except CallFailed as error:
                failure.append(McpServerFailed(f"The server {name!a} could not be started ({error.code}).",
                                               hint="Check its command; see 'luminaguard exec'."))  # fmt: skip
            except LuminaGuardError as error:
                failure.append(error)
            else:
                if opened is not None:
                    opened.execution = execution
                code = execution.outcome.exit_code
                failure.append(McpServerFailed(f"The server {name!a} ended with status {code}.", hint=_last(said)))
            pipe.ended(failure[0])
            done.set()

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(work)
            try:
                async with open_session(name, pipe, server.timeout_s) as session:
                    opened = Opened(session)
                    yield opened
            finally:
                pipe.to_server.close()  # end of file, upon which a server ends
                with anyio.CancelScope(shield=True), anyio.move_on_after(_END_S):
                    await done.wait()
                if not done.is_set():
                    failure.append(McpServerFailed(
                        f"The server {name!a} did not end: its machine was destroyed.",
                        hint="A server ends when its standard input does.", kept="Nothing that it changed was kept.",
                    ))  # fmt: skip
                    tasks.cancel_scope.cancel()
        pipe.close()
        if opened is not None and opened.execution is None and failure:
            raise failure[0]

    # -- what was accepted --------------------------------------------------------------------------------

    def pinned(self, name: str) -> dict[str, Definition] | None:
        """The definitions that were accepted last; None if the server was never used."""
        with self._runtime.approvals.reading() as connection:
            found = None
            for body in self._runtime.approvals.recorded(connection, "mcp.accepted"):
                if body["server"] == name:
                    found = body["tools"]
        return found

    def check(self, name: str, now: Mapping[str, Definition]) -> Comparison:
        """Compare a server's tools with what was accepted; on first use they are accepted as they are."""
        pinned = self.pinned(name)
        if pinned is None:
            self.accept(name, now)
            pinned = dict(now)
        return compare(pinned, now)

    def accept(self, name: str, now: Mapping[str, Definition]) -> None:
        """Record that a server's tools are what they are meant to be."""
        self._runtime.ledger.append("mcp.accepted", server=name, tools=json.loads(json.dumps(now)))

    async def call(self, opened: Opened, tool: str, arguments: dict[str, Any]) -> Result:
        """Call a tool that is what was accepted.

        Raises:
            ToolQuarantined: it is another one, or new; it was not called.
            Forbidden: a rule forbids it; it was not called.
            McpServerFailed: there is no such tool, or the server failed; it may have been executed.
        """
        session = opened.session
        now = await session.list_tools()
        found = self.check(session.name, now)
        if tool not in now:
            raise McpServerFailed(f"The server {session.name!a} has no tool {tool[:64]!a}.",
                                  hint=f"It has: {', '.join(now)[:500] or 'none'}.")  # fmt: skip
        if tool in found.quarantined:
            raise ToolQuarantined(
                f"The tool {tool!a} of {session.name!a} is not what was accepted.",
                hint=f"See the difference and accept it: luminaguard mcp accept {session.name}",
                kept="It was not called.",
            )
        digest = self._refuse_forbidden(session.name, tool, arguments, dict(now[tool]))
        self._runtime.ledger.append("mcp.called", server=session.name, tool=tool, digest=digest)
        return await session.call(tool, arguments)

    def _refuse_forbidden(self, server: str, tool: str, arguments: dict[str, Any], definition: dict[str, Any]) -> str:
        """The digest of a call. What it changes waits at the cliff anyway; what a rule forbids is not even called."""
        from luminaguard.effects.outside import RemoteCall
        from luminaguard.runtime.policy import action_of, judge

        effect = RemoteCall(server, tool, arguments, definition, definition)
        folder = self._runtime.settings.mcp_servers[server].folder
        request = Request("", str(folder), 0, effect.digest, (server, tool), 0, 0, 0, State.PENDING, effect="call")
        judgement, judged = judge(self._runtime.policy(folder), action_of(request, effect))
        if judged.risk is Risk.FORBIDDEN:
            self._runtime.ledger.append("effect.forbidden", effect="call", server=server, tool=tool,
                                        digest=effect.digest, rule=judgement.rule, reason=judgement.reason)  # fmt: skip
            raise Forbidden(
                f"A rule forbids to call it ({judgement.rule}): {judgement.reason}",
                hint="'luminaguard policy explain' shows how the rules came to that; change the rule if it is wrong.",
                kept="It was not called.",
            )
        return effect.digest


def _last(said: bytearray) -> str:
    lines = said.decode("utf-8", "replace").strip().splitlines()
    last = ascii(lines[-1])[1:-1][:300] if lines else ""
    return f"It said last: {last}" if last else "It said nothing on standard error."

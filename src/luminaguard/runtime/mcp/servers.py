"""The servers of one runtime: opened, compared with what was accepted of their tools, and called."""

from __future__ import annotations

import json
import os
import secrets
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, TypeVar

import anyio.to_thread

from luminaguard.actions.model import Risk
from luminaguard.approvals import Request, State
from luminaguard.errors import (
    Forbidden,
    LuminaGuardError,
    MaybeExecuted,
    McpServerFailed,
    SettingsError,
    TaskStopped,
    ToolQuarantined,
)
from luminaguard.mcp.definitions import Comparison, Definition, compare
from luminaguard.runtime.mcp.folders import folder_of, folders_of
from luminaguard.runtime.mcp.host import open_on_host
from luminaguard.runtime.mcp.machine import Ended, open_in_machine
from luminaguard.settings import HttpServer, McpServer, StdioServer

if TYPE_CHECKING:
    import httpx2
    from mcp_types import CallToolResult, InputRequiredResult
    from sqlalchemy import Connection

    from luminaguard.effects.outside import RemoteCall
    from luminaguard.mcp.http import BalancedTransport, Trust
    from luminaguard.mcp.session import More, Peer, Session
    from luminaguard.runtime.core import Runtime
    from luminaguard.runtime.rehearsal import Execution

__all__ = ["McpServers", "Opened"]

T = TypeVar("T")


@dataclass(slots=True)
class Opened:
    """A server that answers.

    Attributes:
        session: speaks with it.
        balanced: of a server over HTTP, what carries its messages.
    """

    session: Session
    balanced: BalancedTransport | None = None
    _ended: Ended = field(default_factory=Ended)

    @property
    def execution(self) -> Execution | None:
        """Of a server in a machine, what that did, once it has ended."""
        return self._ended.execution

    @property
    def requests(self) -> list[Request]:
        """What it changed in its folders waits as these; empty as long as its machine runs."""
        return self.execution.requests if self.execution is not None else []

    def follow(self, labels: frozenset[str]) -> None:
        """Tell a server in a machine what untrusted or private input its caller has read."""
        self._ended.follow(labels)

    @property
    def gone(self) -> bool:
        """Whether a server in a machine has ended by itself."""
        return self._ended.is_gone()


class McpServers:
    """The servers of one runtime, and what was accepted of their tools."""

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self._compared: dict[str, tuple[Mapping[str, Definition], Mapping[str, Definition], Comparison]] = {}
        self._known: dict[str, tuple[str, dict[str, dict[str, Any]]]] = {}

    def settings(self, name: str) -> McpServer:
        """How a server was set up; raises SettingsError if there is none of this name."""
        servers = self._runtime.settings.mcp_servers
        if name not in servers:
            known = ", ".join(servers) or "none"
            raise SettingsError(
                f"There is no MCP server {name[:64]!a}.", hint=f"Of luminaguard.toml there is: {known}."
            )
        return servers[name]

    @asynccontextmanager
    async def open(self, name: str, peer: Peer | None = None) -> AsyncIterator[Opened]:
        """Speak with a server for as long as this context lasts; one of a machine is run for that.

        Raises:
            SettingsError: there is none of this name, or what it needs is not set.
            McpServerFailed: it ends, or does not answer.
            LuminaGuardError: what :meth:`Runtime.exec` raises.
        """
        server = self.settings(name)
        if isinstance(server, StdioServer):
            ended = Ended()
            run = open_on_host if server.isolation == "none" else open_in_machine
            async with run(self._runtime, name, server, ended, peer) as session:
                await anyio.to_thread.run_sync(self._note_what_it_has, name, session)
                yield Opened(session, _ended=ended)
            return
        from luminaguard.mcp.http.session import open_http
        from luminaguard.mcp.session import NOBODY

        pinned = await anyio.to_thread.run_sync(self.pinned, name)
        trust, auth = self._trust(name, server, pinned or {}), self._auth(name, server)
        async with open_http(name, server, _headers(name, server), trust=trust, pinned=pinned, auth=auth,
                             peer=peer or NOBODY) as http:  # fmt: skip
            await anyio.to_thread.run_sync(self._note_what_it_has, name, http.session)
            yield Opened(http.session, http.transport)

    async def status(self, names: Sequence[str]) -> dict[str, dict[str, Any]]:
        """Whether servers answer, by name: a state in words, and what is known of each endpoint."""
        found: dict[str, dict[str, Any]] = {}

        async def look(name: str) -> None:
            server = self.settings(name)
            if isinstance(server, StdioServer):
                where = "on this machine, without isolation," if server.isolation == "none" else "in a machine"
                found[name] = {"state": f"runs {where} when it is used", "endpoints": []}
                return
            try:
                found[name] = await self._look(name, server)
            except LuminaGuardError as error:
                found[name] = {"state": error.message, "endpoints": []}

        async with anyio.create_task_group() as tasks:
            for name in names:
                tasks.start_soon(look, name)
        return {name: found[name] for name in names}

    async def test(self, name: str) -> dict[str, Any]:
        """Begin a server and list its tools: whether that is as it should be, in words and numbers; accepts nothing."""
        began = time.monotonic()
        try:
            async with self.open(name) as opened:
                begun_s = time.monotonic() - began
                now = await opened.session.list_tools()
                revision = opened.session.client.session.protocol_version or ""
        except LuminaGuardError as error:
            return {"name": name, "ok": False, "detail": f"{error.message} {error.hint}"}
        pinned = await anyio.to_thread.run_sync(self.pinned, name)
        found = compare(dict(now) if pinned is None else pinned, now)
        state = "not used before" if pinned is None else "as they were accepted"
        if bad := [*found.quarantined, *found.gone]:
            state = f"NOT as they were accepted: {', '.join(bad)[:200]}"
        ids = ", ".join(request.id for request in opened.requests)
        waits = f"; what it changed when it began waits: {ids}" if ids else ""
        return {"name": name, "ok": not bad, "revision": revision, "begun_s": round(begun_s, 2), "tools": len(now),
                "detail": f"{revision}, begun in {begun_s:.1f} s, {len(now)} tools, {state}{waits}"}  # fmt: skip

    async def _look(self, name: str, server: HttpServer) -> dict[str, Any]:
        from luminaguard.mcp.http.session import look_at

        pinned = await anyio.to_thread.run_sync(self.pinned, name)
        rows = await look_at(name, server, _headers(name, server), pinned=pinned, auth=self._auth(name, server))
        well = sum(row["health"] == "well" for row in rows)
        return {"state": f"{well} of {len(rows)} endpoints answer as they should", "endpoints": rows}

    def _trust(self, name: str, server: HttpServer, pinned: Mapping[str, Definition]) -> Any:
        """What is known of a tool: what a person says, and what a server says that a person trusts."""
        from luminaguard.mcp.http import Trust

        trusted = name in self._runtime.policy(None).trusted_servers

        def trust(tool: str) -> Trust:
            said = pinned.get(tool, {}).get("annotations") or {}
            read_only = trusted and said.get("readOnlyHint") is True
            twice = trusted and said.get("idempotentHint") is True
            return Trust(read_only or twice or tool in server.idempotent, read_only)

        return trust

    def _auth(self, name: str, server: HttpServer) -> httpx2.Auth | None:
        """What shows the server who asks, from a login before."""
        if not server.oauth:
            return None
        from luminaguard.runtime.mcp.login import Tokens, oauth_of, without_a_person

        tokens = Tokens(self._runtime.folders.state, name)
        return oauth_of(server.urls[0], tokens, "http://127.0.0.1/callback", *without_a_person(name))

    async def login(self, name: str, show: Callable[[str], Awaitable[None]]) -> int:
        """Log in at a server, with a browser; how many tools it offers then.

        Args:
            name: of the server.
            show: lets a person look at an address.

        Raises:
            SettingsError: the server was not set up for that.
            McpServerFailed: nobody logged in, or the server does not answer.
        """
        from luminaguard.mcp.http.session import open_http
        from luminaguard.runtime.mcp.login import PERSON_S, Browser, Tokens, oauth_of

        server = self.settings(name)
        if not isinstance(server, HttpServer) or not server.oauth:
            raise SettingsError(f"The server {name!a} has no login.", hint="'oauth = true' in its table gives it one.")
        tokens = Tokens(self._runtime.folders.state, name)
        tokens.forget()
        patient = server.model_copy(update={"timeout_s": PERSON_S + server.timeout_s, "check_s": 0.0,
                                            "url": server.urls[0]})  # fmt: skip
        async with Browser.open() as browser:
            auth = oauth_of(server.urls[0], tokens, browser.redirect, show, browser.answer)
            async with open_http(name, patient, _headers(name, server), auth=auth) as http:
                return len(await http.session.list_tools())

    # -- what was accepted --------------------------------------------------------------------------------

    def pinned(self, name: str) -> dict[str, Definition] | None:
        """The definitions that were accepted last; None if the server was never used."""
        return self._accepted(name)[0]

    def cached(self, name: str) -> dict[str, Definition] | None:
        """What was accepted of a server that cannot say anything else: one of a layer, which is locked; else None."""
        layer = getattr(self.settings(name), "layer", "")
        pinned, of = self._accepted(name)
        return pinned if layer and of == layer else None

    def has(self, name: str) -> frozenset[str] | None:
        """What a server said last that it has beside tools, such as ``prompts``; None if it was never asked."""
        with self._runtime.approvals.reading() as connection:
            said = self._last(connection, "mcp.capabilities").get(name)
        return frozenset(said["has"]) if said is not None else None

    def _note_what_it_has(self, name: str, session: Session) -> None:
        said = session.client.server_capabilities.model_dump(exclude_none=True)
        if self.has(name) != frozenset(said):
            self._runtime.ledger.append("mcp.capabilities", server=name, has=sorted(said))

    def last_accepted(self) -> str:
        """What is something else once anything was accepted of any server."""
        with self._runtime.approvals.reading() as connection:
            return self._runtime.approvals.last_recorded(connection, "mcp.accepted")

    def _accepted(self, name: str) -> tuple[dict[str, Definition] | None, str]:
        """The definitions that were accepted last, and of which layer."""
        with self._runtime.approvals.reading() as connection:
            said = self._last(connection, "mcp.accepted").get(name)
        return (said["tools"], said.get("layer", "")) if said is not None else (None, "")

    def _last(self, connection: Connection, kind: str) -> dict[str, dict[str, Any]]:
        """What the ledger has last of a kind, for each server; read again once there is more of it."""
        last = self._runtime.approvals.last_recorded(connection, kind)
        at, found = self._known.get(kind, ("", {}))
        if last != at:
            found = {body["server"]: body for body in self._runtime.approvals.recorded(connection, kind)}
            self._known[kind] = (last, found)
        return found

    def check(self, name: str, now: Mapping[str, Definition]) -> Comparison:
        """Compare a server's tools with what was accepted; on first use they are accepted as they are."""
        pinned, of = self._accepted(name)
        before = self._compared.get(name)
        if before is not None and before[0] is pinned and before[1] is now:  # all of both is hashed for it
            return before[2]
        found = compare(dict(now) if pinned is None else pinned, now)
        same_again = of != getattr(self._runtime.settings.mcp_servers.get(name), "layer", "") and not (
            found.quarantined or found.gone)  # fmt: skip
        if pinned is None or same_again:  # of another layer, and the same tools
            self.accept(name, now)
        elif pinned is not None:
            self._compared[name] = (pinned, now, found)
        return found

    def accept(self, name: str, now: Mapping[str, Definition]) -> None:
        """Record that a server's tools are what they are meant to be."""
        layer = getattr(self._runtime.settings.mcp_servers.get(name), "layer", "")
        more = {"layer": layer} if layer else {}
        self._runtime.ledger.append("mcp.accepted", server=name, tools=json.loads(json.dumps(now)), **more)

    # -- calls ----------------------------------------------------------------------------------------------

    async def call(
        self, opened: Opened, tool: str, arguments: dict[str, Any], *, task: str = "",
        now: Mapping[str, Definition] | None = None, request_id: str = "",
    ) -> CallToolResult:  # fmt: skip
        """Call a tool that is what was accepted, if the rules and people let it.

        Args:
            opened: its server.
            tool: its name.
            arguments: a JSON object.
            task: what it belongs to; the untrusted input that it has read counts.
            now: the server's tools, if they were just listed.
            request_id: under which it is asked for, if it must be: the same id is the same call, and is made once.

        Raises:
            ToolQuarantined: it is another one, or new; it was not called.
            Forbidden: a rule forbids it; it was not called.
            ApprovalNeeded: a person must answer first; it was not called.
            McpServerFailed: there is no such tool, or the server failed; MaybeExecuted if it may have done it.
        """
        session = opened.session
        listed = await session.list_tools() if now is None else now

        def effect() -> RemoteCall:
            return self._effect(session.name, tool, arguments, listed)

        return await self._do(opened, effect, lambda: session.call_whole(tool, arguments), task, request_id)

    async def call_further(
        self, opened: Opened, tool: str, arguments: dict[str, Any], more: More, *, task: str,
        now: Mapping[str, Definition],
    ) -> CallToolResult | InputRequiredResult:  # fmt: skip
        """Like :meth:`call`, for whoever can be asked: a call goes on in rounds, each of which is let by itself."""

        def effect() -> RemoteCall:
            return self._effect(opened.session.name, tool, arguments, now)

        return await self._do(opened, effect, lambda: opened.session.call_further(tool, arguments, more), task)

    async def ask(
        self, opened: Opened, method: str, arguments: dict[str, Any], do: Callable[[], Awaitable[T]], *, task: str
    ) -> T:
        """Another request than a tool's call, which by the protocol only reads: judged as a call of its name is.

        Raises:
            Forbidden, ApprovalNeeded, McpServerFailed: as :meth:`call` does.
        """
        from luminaguard.effects.outside import RemoteCall

        definition = {"name": method, "annotations": {"readOnlyHint": True}}

        def effect() -> RemoteCall:
            unconfined = self._is_unconfined(opened.session.name)
            return RemoteCall(opened.session.name, method, arguments, definition, definition, unconfined)

        return await self._do(opened, effect, do, task)

    async def _do(
        self, opened: Opened, effect: Callable[[], RemoteCall], do: Callable[[], Awaitable[T]], task: str,
        request_id: str = "",
    ) -> T:  # fmt: skip
        """Do what is let; an approval is used up before it, and told how it ended."""
        stack, asked = ExitStack(), list[str]()

        def admit() -> None:
            self._admit(opened, effect(), task, request_id, use)

        def use(approved: str) -> None:
            stack.enter_context(self._runtime.permits.doing(approved))
            asked.append(approved)

        try:
            await anyio.to_thread.run_sync(admit)
            result = await do()
        except BaseException:
            with anyio.CancelScope(shield=True):
                await anyio.to_thread.run_sync(stack.__exit__, *sys.exc_info())
            raise
        if asked:
            with anyio.CancelScope(shield=True):
                await anyio.to_thread.run_sync(stack.close)
        return result

    def _admit(
        self, opened: Opened, effect: RemoteCall, task: str, request_id: str, use: Callable[[str], None]
    ) -> None:
        """Let a call be made, and record it; an approval that it takes is used up by ``use``."""
        if request_id:
            self._refuse_again(effect, request_id)
        if opened.balanced is None and not effect.unconfined:
            self._refuse_forbidden(effect)
            if task:
                opened.follow(self._runtime.tasks.labels(task))
        else:
            labels = frozenset[str]()
            if task:
                why, labels = self._runtime.tasks.standing(task)
                if why is not None:
                    raise TaskStopped(task, why, kept="It was not called.")
            request = self._request(effect, task=task, labels=labels)
            if request_id:
                request = replace(request, id=request_id)
            self._runtime.permits.clear(request, effect, self._runtime.policy(None), use, once=bool(request_id))
        self._record(effect, request_id)

    def _record(self, effect: RemoteCall, request_id: str) -> None:
        asked = {"request": request_id} if request_id else {}
        self._runtime.ledger.append("mcp.called", server=effect.server, tool=effect.tool, digest=effect.digest, **asked)

    def _refuse_again(self, effect: RemoteCall, request_id: str) -> None:
        """What a rule let through leaves no request: whether it was made before stands in the ledger alone."""
        said = (effect.definition or {}).get("annotations") or {}
        if said.get("readOnlyHint") is True:
            return
        with self._runtime.approvals.reading() as connection:
            made = any(body.get("request") == request_id
                       for body in self._runtime.approvals.recorded(connection, "mcp.called"))  # fmt: skip
        if made:
            raise MaybeExecuted(
                f"{effect.tool} of {effect.server} was called before, and its answer was lost.",
                hint="Look there what became of it.", kept="It was not repeated.",
            )  # fmt: skip

    def _effect(self, server: str, tool: str, arguments: dict[str, Any], now: Mapping[str, Definition]) -> RemoteCall:
        """The call as an effect; raises for a tool that there is not, or that is not what was accepted."""
        from luminaguard.effects.outside import RemoteCall
        from luminaguard.mcp.session import check_sendable

        check_sendable(arguments)
        found = self.check(server, now)
        if tool not in now:
            raise McpServerFailed(f"The server {server!a} has no tool {tool[:64]!a}.",
                                  hint=f"It has: {', '.join(now)[:500] or 'none'}.")  # fmt: skip
        if tool in found.quarantined:
            raise ToolQuarantined(
                f"The tool {tool!a} of {server!a} is not what was accepted.",
                hint=f"See the difference and accept it: luminaguard mcp accept {server}",
                kept="It was not called.",
            )
        definition = dict(now[tool])
        return RemoteCall(server, tool, arguments, definition, definition, self._is_unconfined(server))

    def _is_unconfined(self, server: str) -> bool:
        return getattr(self._runtime.settings.mcp_servers[server], "isolation", "machine") == "none"

    def _request(self, effect: RemoteCall, *, task: str = "", labels: frozenset[str] = frozenset()) -> Request:
        """What would ask for a call, without its times."""
        server = self._runtime.settings.mcp_servers[effect.server]
        folder = str(folder_of(self._runtime, effect.server, server)) if isinstance(server, StdioServer) else ""
        return Request(f"req-{secrets.token_hex(6)}", folder, 0, effect.digest, (effect.server, effect.tool), 0, 0, 0,
                       State.PENDING, effect="call", task=task, taint=tuple(sorted(labels)))  # fmt: skip

    def _refuse_forbidden(self, effect: RemoteCall) -> None:
        """What a call in a machine changes waits at the cliff anyway; what a rule forbids is not even called."""
        from luminaguard.runtime.policy import action_of, judge

        server = self._runtime.settings.mcp_servers[effect.server]
        assert isinstance(server, StdioServer)
        for folder in folders_of(self._runtime, effect.server, server):
            request = replace(self._request(effect), workspace=str(folder))
            judgement, judged = judge(self._runtime.policy(folder), action_of(request, effect))
            if judged.risk is not Risk.FORBIDDEN:
                continue
            self._runtime.ledger.append("effect.forbidden", effect="call", server=effect.server, tool=effect.tool,
                                        digest=effect.digest, rule=judgement.rule, reason=judgement.reason)  # fmt: skip
            raise Forbidden(
                f"A rule forbids to call it ({judgement.rule}): {judgement.reason}",
                hint="'luminaguard policy explain' shows how the rules came to that; change the rule if it is wrong.",
                kept="It was not called.",
            )


def _headers(name: str, server: HttpServer) -> dict[str, str]:
    """The headers of each request, from the environment; raises SettingsError for one that is not there."""
    found = {}
    for header, variable in server.headers.items():
        value = os.environ.get(variable, "")
        if not value or not value.isascii() or not value.isprintable() or value != value.strip():
            raise SettingsError(
                f"The variable {variable}, which the server {name!a} needs, has no usable value.",
                hint=f"Set it to what the header {header} shall be.",
            )
        found[header] = value
    return found

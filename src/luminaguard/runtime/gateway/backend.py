"""The gateway's backend: what is offered, and each call through the rules and the cliff."""

from __future__ import annotations

import re
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import anyio
import anyio.abc
import anyio.to_thread
import mcp_types as types

from luminaguard import log
from luminaguard.actions.model import Risk, Severity
from luminaguard.approvals import State, Verdict
from luminaguard.effects.text import visible
from luminaguard.errors import (
    ApprovalError,
    ApprovalNeeded,
    Forbidden,
    LuminaGuardError,
    MaybeExecuted,
    McpServerFailed,
    PublishError,
)
from luminaguard.mcp.definitions import Definition
from luminaguard.mcp.gateway import Client
from luminaguard.mcp.gateway.changes import Changes, List
from luminaguard.mcp.gateway.further import addressed
from luminaguard.mcp.gateway.server import Asks
from luminaguard.mcp.metrics import Calls, exposition
from luminaguard.mcp.names import Names, Visibility
from luminaguard.runtime.decisions import Answer
from luminaguard.runtime.gateway.folder import FolderTools, Waiting, settle
from luminaguard.runtime.gateway.further import Further, ListeningServers
from luminaguard.runtime.gateway.kept import KeptServers
from luminaguard.runtime.mcp import McpServers, Opened

if TYPE_CHECKING:
    from pydantic import BaseModel

    from luminaguard.runtime.core import Runtime

__all__ = ["END_S", "Gateway", "Silent", "beside", "tell_ended", "waits"]

T = TypeVar("T")

_LEFT = "the program that asked for it has left"
_GATEWAY = re.compile(r"gateway-[0-9a-f]{10}")
_LOOK_S, _WATCH_S = 0.25, 2.0
END_S = 10.0
"""What calls that are under way get when a gateway ends."""
_MOST_SHOWN = 4000
_UP_TO = {"never": None, "low": Severity.LOW, "medium": Severity.MEDIUM}


class Silent:
    """A program whose person is not asked about approvals."""

    async def ask(self, _asks: Asks) -> bool | None:
        """Nobody answers."""
        return None


class Gateway:
    """One gateway; made by :meth:`open`."""

    def __init__(self, runtime: Runtime, tasks: anyio.abc.TaskGroup, folder: FolderTools | None) -> None:
        self._runtime, self._folder = runtime, folder
        self._mcp = McpServers(runtime)
        self._kept = KeptServers(
            ListeningServers(self._mcp, self._changed), tasks, runtime.settings.gateway.idle_s, tell_ended
        )
        self._names = Names()
        gateway = runtime.settings.gateway
        self._visibility = Visibility(gateway.show, gateway.hide)
        self._schemas: dict[str, Mapping[str, Any]] = {}
        self._labels = set[str]()
        self._calls = Calls()
        self.task = f"gateway-{secrets.token_hex(5)}"
        self._further = Further(tuple(runtime.settings.mcp_servers), self._mcp, self._kept, self.task)
        self.changes = Changes()

    @classmethod
    @asynccontextmanager
    async def open(cls, runtime: Runtime, workspace: Path | None) -> AsyncIterator[Gateway]:
        """A gateway for as long as this context lasts; what was changed in machines is asked for at its end."""
        for request in await settle(runtime):
            log.event("gateway.changes_wait", request=request)
        folder = FolderTools(runtime, workspace) if workspace else None
        async with anyio.create_task_group() as tasks:
            gateway = cls(runtime, tasks, folder)
            with runtime.publisher.lock(gateway.task):  # for as long as it lives, however it ends
                await anyio.to_thread.run_sync(gateway.withdraw_of_the_dead)
                try:
                    async with beside(gateway._watch, gateway.changes.tell):
                        yield gateway
                finally:
                    gateway._kept.retire()
                    tasks.cancel_scope.deadline = anyio.current_time() + END_S
                    if folder is not None:
                        with anyio.CancelScope(shield=True):
                            await _close(folder)
                    with anyio.CancelScope(shield=True):
                        await anyio.to_thread.run_sync(gateway.withdraw, gateway.task)

    def withdraw(self, task: str) -> None:
        """Nobody comes for what a gateway's client asked for and left."""
        try:
            for request in self._runtime.approvals.list(task=task):
                if request.state in {State.PENDING, State.APPROVED}:
                    with suppress(ApprovalError):
                        self._runtime.decisions.deny(request, Answer(Verdict.DENY, "gateway", _LEFT))
        except LuminaGuardError as error:  # they end by themselves in time
            log.event("gateway.not_withdrawn", why=error.message)

    def withdraw_of_the_dead(self) -> None:
        """Likewise of gateways that were killed; of those of another host nobody here knows whether they live."""
        if self._runtime.host:
            return
        try:
            waiting = {request.task for request in self._runtime.approvals.list(readable=True)}
        except LuminaGuardError as error:
            log.event("gateway.not_withdrawn", why=error.message)
            return
        for task in waiting - {self.task}:
            if _GATEWAY.fullmatch(task):
                with suppress(PublishError), self._runtime.publisher.lock(task):  # else it lives
                    self.withdraw(task)

    # -- what is offered ------------------------------------------------------------------------------------

    async def tools(self) -> Mapping[str, Definition]:
        """What was accepted of all servers; of one that was never used, what it says now."""
        offered: dict[str, Definition] = dict(FolderTools.tools()) if self._folder else {}
        found: dict[str, Mapping[str, Definition]] = {}

        async def look(name: str) -> None:
            try:
                found[name] = await self._tools_of(name)
            except LuminaGuardError as error:  # its tools are missing, and nobody else's
                log.event("gateway.server_missing", server=name, why=error.message)

        async with anyio.create_task_group() as tasks:
            for name in self._runtime.settings.mcp_servers:
                tasks.start_soon(look, name)
        for server in sorted(found):
            for tool, definition in found[server].items():
                offered[self._names.add(server, tool)] = definition
        shown = {name: tool for name, tool in offered.items() if self._visibility.shows(name)}
        self._schemas = {name: tool.get("inputSchema") or {} for name, tool in shown.items()}
        return shown

    async def _tools_of(self, name: str) -> Mapping[str, Definition]:
        pinned = await anyio.to_thread.run_sync(self._mcp.pinned, name)
        if pinned is not None:  # what it says by now is compared when it is called
            return pinned
        async with self._kept.use(name) as kept:
            now = await kept.tools(time.monotonic())
        found = await anyio.to_thread.run_sync(self._mcp.check, name, now)
        return {tool: now[tool] for tool in found.same}

    async def _changed(self, server: str, what: List) -> None:
        """A server says that a list of it is another one."""
        if what == "tools":  # what it offers now is offered here once a person has accepted it
            if (kept := self._kept.open.get(server)) is not None:
                kept.forget_tools()
            return
        self._further.forget(server)
        self.changes.note(what)

    async def _watch(self) -> None:
        """Tell those who have listed the tools once a person has accepted other ones, wherever they did."""
        known = await anyio.to_thread.run_sync(self._mcp.last_accepted)
        while True:
            await anyio.sleep(_WATCH_S)
            try:
                now = await anyio.to_thread.run_sync(self._mcp.last_accepted)
            except LuminaGuardError as error:
                log.event("gateway.not_watched", why=error.message)
                continue
            if now != known:
                known = now
                self.changes.note("tools")

    async def listed(self, method: str) -> Mapping[str, Sequence[Any]]:
        """What each server has beside tools; see :class:`luminaguard.mcp.gateway.further.FurtherBackend`."""
        return await self._further.listed(method)

    async def shown(self, method: str, servers: Iterable[str]) -> None:
        """A program sees what servers list, which nobody has accepted: what it does then follows that."""
        for server in servers:
            await self.follow(server, method, {})

    def shows(self, name: str) -> bool:
        """Whether something of a server is shown here."""
        return self._visibility.shows(name)

    def shows_address(self, server: str, uri: str) -> bool:
        """Whether a resource of a server is shown here."""
        return self._visibility.shows_address(server, uri)

    async def read(self, server: str, method: str, params: dict[str, Any]) -> BaseModel:
        """Make a request of a server through the rules and the cliff."""
        answer = await self.when_let(lambda: self._further.read(server, method, params), Silent())
        if isinstance(answer, str):
            raise McpServerFailed(f"This waits for the approval of a person: {answer}.", hint="Ask again after it.")
        await self.follow(server, method, {})
        return answer

    def schema(self, name: str) -> Mapping[str, Any] | None:
        """The schema of a tool's arguments."""
        return self._schemas.get(name)

    # -- calls ----------------------------------------------------------------------------------------------

    async def call(self, name: str, arguments: dict[str, Any], client: Client) -> types.CallToolResult:
        """Do a call through the rules and the cliff; see :class:`luminaguard.mcp.gateway.Backend`."""
        if name not in self._schemas:
            await self.tools()
        if name not in self._schemas:
            raise McpServerFailed(f"There is no tool {name[:64]!a}.", hint="List the tools again.")
        if self._folder is not None and name in FolderTools.tools():
            return await self._call_in_folder(self._folder, name, arguments)
        where = self._names.find(name)
        assert where is not None
        server, tool = where
        began, outcome = time.monotonic(), "refused"
        try:
            answer = await self.when_let(lambda: self._call_server(server, tool, arguments), client)
            if isinstance(answer, str):
                outcome = "waits"
                return waits(answer)
            outcome = "failed" if answer.is_error else "done"
            return answer
        except MaybeExecuted:
            outcome = "maybe executed"
            raise
        except McpServerFailed:
            outcome = "failed"
            raise
        finally:
            self._calls.note(server, outcome, time.monotonic() - began)

    async def when_let(self, attempt: Callable[[], Awaitable[T]], client: Client) -> T | str:
        """Do it once a person has let it; the id of the request that waits, if nobody has answered in time."""
        deadline = time.monotonic() + self._runtime.settings.gateway.wait_s
        while True:
            try:
                return await attempt()
            except ApprovalNeeded as needed:  # nothing is held while a person decides
                if not await self._decided(needed.request_id, client, deadline):
                    return needed.request_id

    def metrics(self) -> str:
        """Calls and endpoints in the text format of Prometheus."""
        from luminaguard.mcp.http.session import measured

        return exposition(self._calls, {name: measured(kept.opened.balanced) for name, kept in self._kept.open.items()
                                        if kept.opened.balanced is not None})  # fmt: skip

    async def _call_server(self, server: str, tool: str, arguments: dict[str, Any]) -> types.CallToolResult:
        async with self._kept.use(server) as kept:
            now = await kept.tools(time.monotonic())
            answer = await self._mcp.call(kept.opened, tool, arguments, task=self.task, now=now)
        await self.follow(server, tool, now[tool])
        return answer.model_copy(update={"content": [addressed(server, one) for one in answer.content]})

    async def follow(self, server: str, tool: str, definition: Definition) -> None:
        """Remember that whoever uses this gateway has read what a server gave."""
        label = f"mcp:{server}"
        if label in self._labels:
            return
        said = definition.get("annotations") or {}
        # A server that is trusted is, as far as what it says is its own.
        trusted = server in self._runtime.policy(None).trusted_servers and said.get("openWorldHint") is not True
        if not trusted:
            self._labels.add(label)
            await anyio.to_thread.run_sync(self._runtime.tasks.add_labels, self.task, [(label, tool)])

    async def _call_in_folder(
        self, folder: FolderTools, name: str, arguments: dict[str, Any]
    ) -> types.CallToolResult:  # fmt: skip
        answer = await folder.call(name, arguments)
        deadline = time.monotonic() + self._runtime.settings.gateway.wait_s
        while isinstance(answer, Waiting):
            if time.monotonic() >= deadline or not answer.call_id:
                return waits(answer.request)
            await anyio.sleep(_LOOK_S)
            answer = await folder.again(answer)
        return _said(answer.text, failed=answer.failed)

    async def _decided(self, request_id: str, client: Client, deadline: float) -> bool:
        """Whether the request may be used now; raises Forbidden for a no. False if nobody has answered yet."""
        request = await anyio.to_thread.run_sync(self._runtime.approvals.get, request_id)
        most = _UP_TO[self._runtime.settings.gateway.ask_client]
        judged = request.judged
        if most is not None and not most < judged.severity and judged.risk is Risk.RED and judged.people == 1:
            question = f"{visible(' '.join(request.command))}: {judged.reason} ({request_id})"
            card = await anyio.to_thread.run_sync(self._question, request_id, question)
            said = await client.ask(Asks(request_id, card)) if card else None
            if said is not None:
                verdict = Verdict.APPROVE if said else Verdict.DENY
                answer = Answer(verdict, "MCP client")
                act = self._runtime.decisions.approve_and_hand_over if said else self._runtime.decisions.deny
                await anyio.to_thread.run_sync(act, request, answer)
        while True:
            request = await anyio.to_thread.run_sync(self._runtime.approvals.get, request_id)
            if request.state in {State.APPROVED, State.CLAIMED, State.DONE, State.UNKNOWN}:
                return True  # or used by another call that was the same: this one is asked for by itself then
            if request.state is not State.PENDING:
                outcome = await anyio.to_thread.run_sync(self._runtime.approvals.outcome, request_id)
                raise Forbidden(
                    f"{request_id} is {request.state.value}: {visible(outcome) or 'a person said no'}.",
                    hint="Do not ask for the same again; do something else.", kept="It was not called.",
                )  # fmt: skip
            if time.monotonic() >= deadline:
                return False
            await anyio.sleep(_LOOK_S)

    def _question(self, request_id: str, first: str) -> str:
        """All of a call, in words: the client's person sees what they allow. Empty for what is too long to be seen."""
        import json

        effect = self._runtime.approvals.effect(request_id)
        arguments = json.dumps(getattr(effect, "arguments", {}), ensure_ascii=True, indent=1)
        return f"{first}\n{arguments}" if len(arguments) <= _MOST_SHOWN else ""


@asynccontextmanager
async def beside(*works: Callable[[], Coroutine[Any, Any, None]]) -> AsyncIterator[None]:
    """Do what has no end of its own, for as long as this context lasts: nobody waits for it then."""
    async with anyio.create_task_group() as tasks:
        for work in works:
            tasks.start_soon(work)
        try:
            yield
        finally:
            tasks.cancel_scope.cancel()


def tell_ended(name: str, opened: Opened) -> None:
    """Note that what a server in a machine changed waits."""
    for request in opened.requests:
        log.event("gateway.changes_wait", server=name, request=request.id)


async def _close(folder: FolderTools) -> None:
    try:
        if request := await folder.close():
            log.event("gateway.changes_wait", request=request)
    except LuminaGuardError as error:
        log.event("gateway.not_asked", why=error.message)


def waits(request_id: str) -> types.CallToolResult:
    """What is told of a call that waits for a person."""
    return _said(
        f"This waits for the approval of a person: {request_id}. It was not done. They decide with 'luminaguard "
        f"approvals approve {request_id}' or in 'luminaguard inbox'; then make the very same call again.", failed=True,
    )  # fmt: skip


def _said(text: str, *, failed: bool) -> types.CallToolResult:
    return types.CallToolResult(content=[types.TextContent(type="text", text=text)], is_error=failed)

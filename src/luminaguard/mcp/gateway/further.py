"""Prompts and resources of many servers behind one address, under names that say whose they are."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol, TypeVar

import mcp_types as types
from mcp.server.context import ServerRequestContext
from mcp.server.lowlevel import Server
from pydantic import BaseModel

from luminaguard.errors import LuminaGuardError
from luminaguard.mcp.gateway.changes import Changes
from luminaguard.mcp.names import Names, address_of, resource_at
from mcp import MCPError

__all__ = ["FurtherBackend", "add_further", "addressed"]

T = TypeVar("T")
Context = ServerRequestContext[Any]
Content = TypeVar("Content", bound=BaseModel)


class FurtherBackend(Protocol):
    """Decides and does."""

    changes: Changes

    async def listed(self, method: str) -> Mapping[str, Sequence[Any]]:
        """What each server lists: ``prompts/list``, ``resources/list`` or ``resources/templates/list``."""

    async def shown(self, method: str, servers: Iterable[str]) -> None:
        """Take note that a program sees what these servers list."""

    def shows(self, name: str) -> bool:
        """Whether something is shown: ``SERVER__NAME``."""

    def shows_address(self, server: str, uri: str) -> bool:
        """Whether a resource of a server is shown."""

    async def read(self, server: str, method: str, params: dict[str, Any]) -> BaseModel:
        """Make a request of a server; raises LuminaGuardError, or MCPError for what the server said."""


def add_further(server: Server[Any], backend: FurtherBackend) -> None:
    """Let a server offer the prompts and resources of all."""
    offers = _Offers(backend)
    page = types.PaginatedRequestParams
    server.add_request_handler("prompts/list", page, offers.prompts)
    server.add_request_handler("prompts/get", types.GetPromptRequestParams, offers.prompt)
    server.add_request_handler("resources/list", page, offers.resources)
    server.add_request_handler("resources/templates/list", page, offers.templates)
    server.add_request_handler("resources/read", types.ReadResourceRequestParams, offers.resource)
    server.add_request_handler("completion/complete", types.CompleteRequestParams, offers.completion)


def addressed(server: str, content: Content) -> Content:
    """A part of what a server said, with addresses of its resources as they are here."""
    if isinstance(content, types.ResourceLink):
        return content.model_copy(update={"uri": address_of(server, content.uri)})
    if isinstance(content, types.EmbeddedResource):
        inner = content.resource.model_copy(update={"uri": address_of(server, content.resource.uri)})
        return content.model_copy(update={"resource": inner})
    return content


class _Offers:
    def __init__(self, backend: FurtherBackend) -> None:
        self._backend = backend
        self._names = Names()

    # -- what there is --------------------------------------------------------------------------------------

    async def prompts(self, context: Context, _params: Any) -> types.ListPromptsResult:
        return types.ListPromptsResult(prompts=await self._listed(context, "prompts/list", self._prompts))

    async def resources(self, context: Context, _params: Any) -> types.ListResourcesResult:
        return types.ListResourcesResult(resources=await self._listed(context, "resources/list", self._addresses))

    async def templates(self, context: Context, _params: Any) -> types.ListResourceTemplatesResult:
        found = await self._listed(context, "resources/templates/list", self._templates)
        return types.ListResourceTemplatesResult(resource_templates=found)

    async def _listed(
        self, context: Context, method: str, shown: Callable[[Mapping[str, Sequence[T]]], list[tuple[str, T]]]
    ) -> list[T]:
        """What there is, as it is called here, and note that it was seen."""
        self._backend.changes.meet(context)
        rows = shown(await _plainly(self._backend.listed(method)))
        await self._backend.shown(method, {server for server, _ in rows})
        return [row for _, row in rows]

    def _prompts(self, found: Mapping[str, Sequence[types.Prompt]]) -> list[tuple[str, types.Prompt]]:
        self._names = Names()  # of those that there are
        named = [(server, self._names.add(server, one.name), one) for server, rows in found.items() for one in rows]
        return [(server, one.model_copy(update={"name": name})) for server, name, one in named
                if self._backend.shows(name)]  # fmt: skip

    def _addresses(self, found: Mapping[str, Sequence[types.Resource]]) -> list[tuple[str, types.Resource]]:
        return [(server, one.model_copy(update={"uri": address_of(server, one.uri)}))
                for server, rows in found.items() for one in rows
                if self._backend.shows_address(server, one.uri)]  # fmt: skip

    def _templates(
        self, found: Mapping[str, Sequence[types.ResourceTemplate]]
    ) -> list[tuple[str, types.ResourceTemplate]]:  # fmt: skip
        return [(server, one.model_copy(update={"uri_template": address_of(server, one.uri_template)}))
                for server, rows in found.items() for one in rows
                if self._backend.shows_address(server, one.uri_template)]  # fmt: skip

    # -- what is read ---------------------------------------------------------------------------------------

    async def prompt(self, _context: Context, params: types.GetPromptRequestParams) -> types.GetPromptResult:
        server, name = await self._prompt_of(params.name)
        given = {"name": name} | ({"arguments": params.arguments} if params.arguments is not None else {})
        found = await self._read(server, "prompts/get", given, types.GetPromptResult)
        messages = [one.model_copy(update={"content": addressed(server, one.content)}) for one in found.messages]
        return found.model_copy(update={"messages": messages})

    async def resource(
        self, _context: Context, params: types.ReadResourceRequestParams
    ) -> types.ReadResourceResult:  # fmt: skip
        server, uri = self._resource_of(params.uri)
        found = await self._read(server, "resources/read", {"uri": uri}, types.ReadResourceResult)
        contents = [one.model_copy(update={"uri": address_of(server, one.uri)}) for one in found.contents]
        return found.model_copy(update={"contents": contents})

    async def completion(self, _context: Context, params: types.CompleteRequestParams) -> types.CompleteResult:
        given = params.model_dump(mode="json", by_alias=True, exclude_none=True, exclude={"meta"})
        if isinstance(params.ref, types.PromptReference):
            server, given["ref"]["name"] = await self._prompt_of(params.ref.name)
        else:
            server, given["ref"]["uri"] = self._resource_of(params.ref.uri)
        return await self._read(server, "completion/complete", given, types.CompleteResult)

    async def _prompt_of(self, name: str) -> tuple[str, str]:
        if self._names.find(name) is None:
            self._prompts(await _plainly(self._backend.listed("prompts/list")))
        found = self._names.find(name)
        if found is None or not self._backend.shows(name):
            raise MCPError(types.INVALID_PARAMS, f"There is no prompt {name[:64]!a}.")
        return found

    def _resource_of(self, address: str) -> tuple[str, str]:
        found = resource_at(address)
        if found is None or not self._backend.shows_address(*found):
            raise MCPError(types.INVALID_PARAMS, f"There is no resource {address[:200]!a}.")
        return found

    async def _read(self, server: str, method: str, params: dict[str, Any], kind: type[T]) -> T:
        found = await _plainly(self._backend.read(server, method, params))
        if not isinstance(found, kind):
            why = "It wants to ask something first, which 'luminaguard gateway --server' passes on."
            raise MCPError(types.INVALID_REQUEST, why)
        return found


async def _plainly(doing: Awaitable[T]) -> T:
    """Where there is no result that could say so, a refusal of ours is an error of the protocol."""
    try:
        return await doing
    except LuminaGuardError as error:
        raise MCPError(types.INVALID_REQUEST, f"{error.message} {error.hint}") from error

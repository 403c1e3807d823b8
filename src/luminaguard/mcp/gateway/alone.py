"""One server alone behind the gateway, with all that it has: each request goes on to it, and what it asks comes back.

The old era's servers ask in the middle of a call, and the new era's give a question instead of a result; both reach the
program that called, and its answer the server.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from importlib import metadata
from typing import Any, Protocol, TypeVar

import mcp_types as types
from mcp.server.context import ServerRequestContext
from mcp.server.lowlevel import Server
from pydantic import BaseModel

from luminaguard.errors import LuminaGuardError
from luminaguard.mcp.gateway.changes import Changes, TellingServer
from luminaguard.mcp.gateway.methods import LISTED, READ
from luminaguard.mcp.gateway.server import told
from luminaguard.mcp.session import More
from mcp import MCPError

__all__ = ["AloneBackend", "make_server_alone"]

T = TypeVar("T")

Context = ServerRequestContext[Any]
_LOG_LEVEL = "io.modelcontextprotocol/logLevel"

_CAPABILITY = {"prompts": "prompts/", "resources": "resources/", "logging": "logging/", "completions": "completion/"}


class AloneBackend(Protocol):
    """Decides and does."""

    changes: Changes

    async def capabilities(self) -> types.ServerCapabilities:
        """What the server has."""

    async def tools(self, context: Context) -> types.ListToolsResult:
        """Its tools, those that were accepted."""

    def schema(self, name: str) -> dict[str, Any] | None:
        """The schema of a tool's arguments; None if there is none."""

    async def call(
        self, context: Context, name: str, arguments: dict[str, Any], more: More
    ) -> types.CallToolResult | types.InputRequiredResult:
        """Call a tool; raises LuminaGuardError, or MCPError for what the server said."""

    async def request(self, context: Context, method: str, params: dict[str, Any]) -> BaseModel:
        """Make a request of :data:`LISTED` or :data:`READ`; raises likewise."""


async def make_server_alone(backend: AloneBackend) -> Server[Any]:
    """An MCP server that is this one; raises LuminaGuardError if it does not answer."""

    async def list_tools(context: Context, _params: types.PaginatedRequestParams | None) -> types.ListToolsResult:
        backend.changes.meet(context)
        return await _plainly(backend.tools(context))

    async def call_tool(
        context: Context, params: types.CallToolRequestParams
    ) -> types.CallToolResult | types.InputRequiredResult:
        more = More(params.input_responses, params.request_state, context.session.report_progress, _meta(context))
        try:
            return await backend.call(context, params.name, params.arguments or {}, more)
        except LuminaGuardError as error:
            return told(params.name, error)

    server = TellingServer(
        "luminaguard", version=metadata.version("luminaguard"), on_list_tools=list_tools, on_call_tool=call_tool,
        get_tool_input_schema=backend.schema, on_subscriptions_listen=backend.changes.listen,
    )  # fmt: skip
    has = (await backend.capabilities()).model_dump(exclude_none=True)
    for method, (params, _, _) in (LISTED | READ).items():
        if any(name in has and method.startswith(prefix) for name, prefix in _CAPABILITY.items()):
            server.add_request_handler(method, params, _handler(backend, method))
    return server


def _handler(backend: AloneBackend, method: str) -> Callable[[Context, Any], Awaitable[BaseModel]]:
    async def handle(context: Context, params: BaseModel | None) -> BaseModel:
        if method in LISTED:
            backend.changes.meet(context)
        given = params.model_dump(mode="json", by_alias=True, exclude_none=True, exclude={"meta"}) if params else {}
        if meta := _meta(context):
            given["_meta"] = meta
        return await _plainly(backend.request(context, method, given))

    return handle


def _meta(context: Context) -> Any:
    """Of what a request says about itself, what is meant for the server."""
    level = (context.meta or {}).get(_LOG_LEVEL)
    return {_LOG_LEVEL: level} if level else None


async def _plainly(doing: Awaitable[T]) -> T:
    """Where there is no result that could say so, a refusal of ours is an error of the protocol."""
    try:
        return await doing
    except LuminaGuardError as error:
        raise MCPError(types.INVALID_REQUEST, f"{error.message} {error.hint}") from error

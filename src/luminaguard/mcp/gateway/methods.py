"""The requests beside those of tools that a gateway passes on to a server, and the types of what comes back."""

from __future__ import annotations

from typing import Any

import anyio
import mcp_types as types
from pydantic import BaseModel, TypeAdapter

from luminaguard.errors import LuminaGuardError
from luminaguard.mcp.session import Session
from mcp import MCPError

__all__ = ["LISTED", "READ", "said_by", "send"]

LISTED: dict[str, tuple[Any, Any, Any]] = {
    "prompts/list": (types.PaginatedRequestParams, types.ListPromptsRequest, types.ListPromptsResult),
    "resources/list": (types.PaginatedRequestParams, types.ListResourcesRequest, types.ListResourcesResult),
    "resources/templates/list": (
        types.PaginatedRequestParams, types.ListResourceTemplatesRequest, types.ListResourceTemplatesResult,
    ),
    "logging/setLevel": (types.SetLevelRequestParams, types.SetLevelRequest, types.EmptyResult),
}  # fmt: skip
"""What is asked for without a question: what there is, as with tools. Parameters, request and result by method."""

READ: dict[str, tuple[Any, Any, Any]] = {
    "resources/read": (
        types.ReadResourceRequestParams, types.ReadResourceRequest,
        TypeAdapter(types.ReadResourceResult | types.InputRequiredResult),
    ),
    "prompts/get": (
        types.GetPromptRequestParams, types.GetPromptRequest,
        TypeAdapter(types.GetPromptResult | types.InputRequiredResult),
    ),
    "completion/complete": (types.CompleteRequestParams, types.CompleteRequest, types.CompleteResult),
    "resources/subscribe": (types.SubscribeRequestParams, types.SubscribeRequest, types.EmptyResult),
    "resources/unsubscribe": (types.UnsubscribeRequestParams, types.UnsubscribeRequest, types.EmptyResult),
}  # fmt: skip
"""What is judged as a call of this name: its parameters say something to the server."""


async def send(session: Session, method: str, params: dict[str, Any]) -> BaseModel:
    """Make a request of :data:`LISTED` or :data:`READ`; raises McpServerFailed."""
    _, kind, result = (LISTED | READ)[method]
    with session.failures(), anyio.fail_after(session.timeout_s):
        request = kind.model_validate({"method": method, "params": params})
        found: BaseModel = await session.client.session.send_request(request, result)
    return found


def said_by(session: Session, error: LuminaGuardError) -> MCPError | None:
    """What a server itself said that became an error of ours; None if it did not say it."""
    cause = error.__cause__
    while isinstance(cause, LuminaGuardError):
        cause = cause.__cause__
    if isinstance(cause, MCPError) and session.explain(cause) is None:
        return MCPError(cause.error.code, cause.error.message, cause.error.data)
    return None

"""A server with everything that the server part of the conformance suite looks for, in both eras of the protocol.

``server.py [PORT]`` prints its address once it listens. Names, addresses and defaults are those that the suite wants.
What is sent stands here as it is on the wire. Tools that ask do so in either era, whatever era the suite asks for
them in, so that a gateway may stand between that speaks one to the suite and the other to this server.
"""

from __future__ import annotations

import json
import re
import socket
import sys
import warnings
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any, NamedTuple

import anyio
import mcp_types as types
import uvicorn
from mcp.server.caching import CACHEABLE_METHODS, CacheHint
from mcp.server.context import ServerRequestContext
from mcp.server.lowlevel import Server
from mcp.server.request_state import RequestStateBoundary, RequestStateSecurity
from mcp.server.subscriptions import InMemorySubscriptionBus, ListenHandler, PromptsListChanged, ToolsListChanged
from mcp.shared.exceptions import MCPDeprecationWarning
from mcp.shared.message import ServerMessageMetadata
from mcp_types.version import MODERN_PROTOCOL_VERSIONS
from pydantic import BaseModel

from mcp import MCPError

Json = dict[str, Any]
Context = ServerRequestContext[Any]
Makes = Callable[[Context, Any], Json | Awaitable[Json]]
Does = Json | Makes  # a result, or what makes one of a request

NAME = "luminaguard-conformance"
STEP_S = 0.05  # between the notifications of a call, so that they are seen to come one by one
ASKS: dict[str, tuple[str, Any, Any]] = {  # by method: the capability that a client must have, and the types
    "elicitation/create": ("elicitation", types.ElicitRequest, types.ElicitResult),
    "sampling/createMessage": ("sampling", types.CreateMessageRequest, types.CreateMessageResult),
    "roots/list": ("roots", types.ListRootsRequest, types.ListRootsResult),
}
BUS = InMemorySubscriptionBus()
CHANGES = {"tools": 0, "prompts": 0}


# What is sent.
def text(words: str) -> Json:
    return {"type": "text", "text": words}


def resource(uri: str, mime: str, words: str) -> Json:
    return {"type": "resource", "resource": {"uri": uri, "mimeType": mime, "text": words}}


def content(*parts: Json) -> Json:
    return {"content": list(parts)}


def messages(*parts: Json) -> Json:
    return {"messages": [{"role": "user", "content": part} for part in parts]}


def form(**fields: Json) -> Json:
    return {"type": "object", "properties": fields, "required": list(fields)}


def elicit(message: str, **fields: Json) -> Json:
    return {"method": "elicitation/create", "params": {"message": message, "requestedSchema": form(**fields)}}


def sample(prompt: str) -> Json:
    asked = {"role": "user", "content": text(prompt)}
    return {"method": "sampling/createMessage", "params": {"messages": [asked], "maxTokens": 100}}


def wire(model: BaseModel) -> Json:
    return model.model_dump(mode="json", by_alias=True, exclude_none=True)


PNG = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR42mNoAAAAggCB2kUIOwAAAABJRU5ErkJggg=="
WAV = "UklGRiYAAABXQVZFZm10IBAAAAABAAEAQB8AAEAfAAABAAgAZGF0YQIAAACAgA=="
IMAGE: Json = {"type": "image", "data": PNG, "mimeType": "image/png"}
SOUND: Json = {"type": "audio", "data": WAV, "mimeType": "audio/wav"}
TEXT: Json = {"type": "string"}
WHO = elicit("Who is it?", name=TEXT)
RIGHT = elicit("Is that right?", ok={"type": "boolean"})
ROOTS: Json = {"method": "roots/list", "params": {}}
GREET = sample("Greet.")
OPTIONS = ["option1", "option2", "option3"]
TITLED = [{"const": f"value{number}", "title": f"Option {number}"} for number in (1, 2, 3)]
CONDITIONS: Json = {
    "$schema": "https://json-schema.org/draft/2020-12/schema", "type": "object", "additionalProperties": False,
    "$defs": {"address": {"$anchor": "address", "type": "object", "properties": {"city": TEXT}}},
    "properties": {"home": {"$ref": "#/$defs/address"}, "work": {"$ref": "#address"}, "days": {"type": "integer"}},
    "allOf": [{"anyOf": [{"required": ["home"]}, {"required": ["work"]}]}],
    "if": {"required": ["days"]}, "then": {"required": ["work"]}, "else": {"required": ["home"]},
}  # fmt: skip


# What is done.
def rounds(*steps: Json, keeps: bool = True, result: Callable[[Json], Json] = content) -> Makes:
    """Asks step after step, for what the client can answer, and tells the answers.

    Without sessions the call returns with a step and comes again with answers; if it ``keeps`` a state, which carries
    those of the steps before, they count only beside that. With sessions it asks while it runs.
    """

    async def does(context: Context, params: Any) -> Json:
        said: Json = json.loads(params.request_state or "{}")
        if params.request_state or not keeps:
            keys = {key for step in steps for key in step} & (params.input_responses or {}).keys()
            said |= {key: wire(params.input_responses[key]) for key in keys}
        can, here = context.session.client_capabilities, ServerMessageMetadata(related_request_id=context.request_id)
        for step in steps:
            needs = {key: ASKS[request["method"]] for key, request in step.items()}
            asked = {key: request for key, request in step.items() if getattr(can, needs[key][0], None) is not None}
            if not asked:
                lacks: Json = {"requiredCapabilities": {need: {} for need, _, _ in needs.values()}}
                raise MCPError(types.MISSING_REQUIRED_CLIENT_CAPABILITY, "The client cannot be asked.", lacks)
            if context.protocol_version not in MODERN_PROTOCOL_VERSIONS:
                for key, request in asked.items():
                    _, ask, answer = needs[key]
                    said[key] = wire(await context.session.send_request(ask(**request), answer, metadata=here))
            elif not asked.keys() <= said.keys():
                state = {"requestState": json.dumps(said)} if keeps else {}
                return {"resultType": "input_required", "inputRequests": asked, **state}
        return result(text(f"state-ok: {json.dumps(said, sort_keys=True)}"))

    return does


async def logs(context: Context, _params: Any) -> Json:
    for moment in ("begins", "goes on", "ends"):
        await context.session.send_log_message("info", f"The call {moment}.", NAME, context.request_id)
        await anyio.sleep(STEP_S)
    return content(text("Logged."))


async def progresses(context: Context, _params: Any) -> Json:
    for percent in (0, 50, 100):
        await context.session.report_progress(percent, 100, f"{percent} of 100")
        await anyio.sleep(STEP_S)
    return content(text("Done."))


def changes(kind: str, event: ToolsListChanged | PromptsListChanged) -> Does:
    async def does(_context: Context, _params: Any) -> Json:
        CHANGES[kind] += 1
        await BUS.publish(event)
        return content(text(f"Changed {CHANGES[kind]} times."))

    return does


# What there is.
class Fixture(NamedTuple):
    """A tool or a prompt: what it is, what it does, and the schema of its arguments."""

    about: str
    does: Does
    takes: Json = {"type": "object", "properties": {}}  # noqa: RUF012


TOOLS: dict[str, Fixture] = {
    "test_simple_text": Fixture("A text.", content(text("A plain answer."))),
    "test_image_content": Fixture("An image.", content(IMAGE)),
    "test_audio_content": Fixture("A sound.", content(SOUND)),
    "test_embedded_resource": Fixture("A file.", content(resource("test://embedded-resource", "text/plain", "In."))),
    "test_multiple_content_types": Fixture("A text, an image and a resource.", content(
        text("Three things."), IMAGE, resource("test://mixed-content-resource", "application/json", '{"value": 123}'))),
    "test_error_handling": Fixture("Fails.", content(text("It failed, as it should.")) | {"isError": True}),
    "test_tool_with_logging": Fixture("Logs.", logs),
    "test_logging_tool": Fixture("Logs, where the request wants it.", logs),
    "test_tool_with_progress": Fixture("Tells how far it is.", progresses),
    "test_sampling": Fixture("Asks a model.", lambda context, params: rounds(
        {"said": sample(params.arguments["prompt"])})(context, params), form(prompt=TEXT)),
    "test_elicitation": Fixture("Asks a person.", lambda context, params: rounds(
        {"said": elicit(params.arguments["message"], username=TEXT, email=TEXT)})(context, params), form(message=TEXT)),
    "test_elicitation_sep1034_defaults": Fixture("Asks a person, with defaults.", rounds({"said": elicit(
        "Is this right?", name=TEXT | {"default": "John Doe"}, age={"type": "integer", "default": 30},
        score={"type": "number", "default": 95.5}, verified={"type": "boolean", "default": True},
        status=TEXT | {"enum": ["active", "inactive", "pending"], "default": "active"})})),
    "test_elicitation_sep1330_enums": Fixture("Asks a person to choose.", rounds({"said": elicit(
        "Which?", untitledSingle=TEXT | {"enum": OPTIONS}, titledSingle=TEXT | {"oneOf": TITLED},
        legacyEnum=TEXT | {"enum": ["opt1", "opt2"], "enumNames": ["Option 1", "Option 2"]},
        untitledMulti={"type": "array", "items": TEXT | {"enum": OPTIONS}},
        titledMulti={"type": "array", "items": {"anyOf": TITLED}})})),
    "test_missing_capability": Fixture("Needs a client with a model.", rounds({"greeting": GREET})),
    "test_trigger_tool_change": Fixture("Changes the tools.", changes("tools", ToolsListChanged())),
    "test_trigger_prompt_change": Fixture("Changes the prompts.", changes("prompts", PromptsListChanged())),
    "test_streaming_elicitation": Fixture("Asks a person.", rounds({"name": WHO})),
    "test_input_required_result_elicitation": Fixture("Asks a person.", rounds({"user_name": WHO}, keeps=False)),
    "test_input_required_result_sampling": Fixture("Asks a model.", rounds({"capital_question": GREET}, keeps=False)),
    "test_input_required_result_list_roots": Fixture("Asks for roots.", rounds({"client_roots": ROOTS}, keeps=False)),
    "test_input_required_result_request_state": Fixture("Asks, with a state.", rounds({"confirm": RIGHT})),
    "test_input_required_result_tampered_state": Fixture("Takes no other state.", rounds({"confirm": RIGHT})),
    "test_input_required_result_multiple_inputs": Fixture(
        "Asks for three things.", rounds({"user_name": WHO, "greeting": GREET, "client_roots": ROOTS})),
    "test_input_required_result_multi_round": Fixture("Asks twice.", rounds({"step1": WHO}, {"step2": RIGHT})),
    "test_input_required_result_capabilities": Fixture("Asks what it can.", rounds({"ask": WHO, "sample": GREET})),
    "json_schema_2020_12_tool": Fixture("Takes arguments under conditions.", content(text("Taken.")), CONDITIONS),
    "test_x_mcp_header": Fixture("Takes an argument that a header repeats.", content(text("Taken.")), {
        "type": "object", "properties": {"place": TEXT | {"x-mcp-header": "Place"}}}),
}  # fmt: skip
PROMPTS: dict[str, Fixture] = {
    "test_simple_prompt": Fixture("A text.", messages(text("Say something."))),
    "test_prompt_with_arguments": Fixture("A text with arguments.", lambda _, params: messages(
        text("{arg1} and {arg2}".format(**params.arguments))), form(arg1=TEXT, arg2=TEXT)),
    "test_prompt_with_embedded_resource": Fixture("A resource and a text.", lambda _, params: messages(
        resource(params.arguments["resourceUri"], "text/plain", "In."), text("Read it.")), form(resourceUri=TEXT)),
    "test_prompt_with_image": Fixture("An image and a text.", messages(IMAGE, text("Look at it."))),
    "test_input_required_result_prompt": Fixture(
        "Asks a person.", rounds({"user_context": elicit("About what?", context=TEXT)}, keeps=False, result=messages)),
}  # fmt: skip
RESOURCES: dict[str, Json] = {
    "test://static-text": {"mimeType": "text/plain", "text": "It never changes."},
    "test://static-binary": {"mimeType": "image/png", "blob": PNG},
    "test://watched-resource": {"mimeType": "text/plain", "text": "It may be watched."},
}
TEMPLATE: Json = {"uriTemplate": "test://template/{id}/data", "name": "template", "mimeType": "application/json"}


# What is answered.
async def done(does: Does, context: Context, params: Any) -> Json:
    result = does if isinstance(does, dict) else does(context, params)
    era = {"resultType": "complete"} if context.protocol_version in MODERN_PROTOCOL_VERSIONS else {}
    return era | (result if isinstance(result, dict) else await result)


async def call(fixtures: dict[str, Fixture], context: Context, params: Any) -> Json:
    if params.name not in fixtures:
        raise MCPError(types.INVALID_PARAMS, "There is nothing of this name.", {"name": params.name})
    return await done(fixtures[params.name].does, context, params)


def listed(kind: str, fixtures: dict[str, Fixture], more: Callable[[Json], Json], *_: Any) -> Json:
    """What there is; who changes a list is another one afterwards, and a gateway holds no other tool back for it."""
    changed = (name for name in fixtures if kind == "prompts" or "trigger" in name)
    versions = dict.fromkeys(fixtures, "") | dict.fromkeys(changed, f", version {CHANGES[kind]}")
    return {kind: [
        {"name": name, "title": f"{name}{versions[name]}", "description": about, **more(takes)}
        for name, (about, _, takes) in fixtures.items()
    ]}  # fmt: skip


def read_resource(_context: Context, params: Any) -> Json:
    found = RESOURCES.get(params.uri)
    if match := re.fullmatch(r"test://template/([^/]+)/data", params.uri):
        found = {"mimeType": "application/json", "text": json.dumps({"id": match[1]})}
    if found is None:
        raise MCPError(types.INVALID_PARAMS, "There is no such resource.", {"uri": params.uri})
    return {"contents": [{"uri": params.uri, **found}]}


def complete(_context: Context, params: Any) -> Json:
    found = [word for word in ("test", "testing", "toast") if word.startswith(params.argument.value)]
    return {"completion": {"values": found, "total": len(found), "hasMore": False}}


HANDLERS: dict[str, tuple[type[types.RequestParams], Does]] = {
    "tools/list": (types.PaginatedRequestParams, partial(listed, "tools", TOOLS, lambda takes: {"inputSchema": takes})),
    "tools/call": (types.CallToolRequestParams, partial(call, TOOLS)),
    "prompts/list": (types.PaginatedRequestParams, partial(listed, "prompts", PROMPTS, lambda takes: {
        "arguments": [{"name": name, "required": True} for name in takes["properties"]]})),
    "prompts/get": (types.GetPromptRequestParams, partial(call, PROMPTS)),
    "resources/list": (types.PaginatedRequestParams, {"resources": [
        {"uri": uri, "name": uri, "mimeType": found["mimeType"]} for uri, found in RESOURCES.items()]}),
    "resources/templates/list": (types.PaginatedRequestParams, {"resourceTemplates": [TEMPLATE]}),
    "resources/read": (types.ReadResourceRequestParams, read_resource),
    "resources/subscribe": (types.SubscribeRequestParams, {}),
    "resources/unsubscribe": (types.UnsubscribeRequestParams, {}),
    "completion/complete": (types.CompleteRequestParams, complete),
    "logging/setLevel": (types.SetLevelRequestParams, {}),
}  # fmt: skip


def make_server() -> Server[Any]:
    hints: Any = dict.fromkeys(CACHEABLE_METHODS, CacheHint(ttl_ms=5_000, scope="public"))
    server = Server[Any](NAME, version="1", cache_hints=hints, on_subscriptions_listen=ListenHandler(BUS))
    for method, (params, does) in HANDLERS.items():
        server.add_request_handler(method, params, partial(done, does))
    server.middleware.append(RequestStateBoundary(RequestStateSecurity.ephemeral(), default_audience=NAME))
    return server


async def main(port: int) -> None:
    app = make_server().streamable_http_app(host="127.0.0.1")  # so that requests for other hosts are refused
    # With its protocol by name: asyncio sends small pieces at once only where it sees that it is TCP.
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("127.0.0.1", port))
        listener.listen(128)
        print(f"http://127.0.0.1:{listener.getsockname()[1]}/mcp", flush=True)
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning", ws="none", timeout_graceful_shutdown=1))
        await server.serve(sockets=[listener])


if __name__ == "__main__":
    warnings.simplefilter("ignore", MCPDeprecationWarning)  # the newer revision gives up what the older one looks for
    anyio.run(main, int(sys.argv[1]) if sys.argv[1:] else 0)

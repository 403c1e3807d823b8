"""A client of our HTTP transport for the conformance suite of the protocol: it does what each scenario looks for.

The suite starts it with the address of a server as its last argument, and the scenario's name in the environment.
Most scenarios only watch a client that connects, lists the tools, and calls each of them.
"""

import json
import os
import sys
from contextlib import suppress
from urllib.parse import parse_qs, urlsplit

import anyio
import httpx2
import mcp_types as types
from mcp.shared.auth import AuthorizationCodeResult, OAuthClientInformationFull
from pydantic import AnyUrl

from luminaguard.mcp.http.session import open_http
from luminaguard.mcp.session import Peer
from luminaguard.runtime.mcp.login import oauth_of
from luminaguard.settings import HttpServer
from luminaguard.testing.mcp_oauth import MemoryTokens
from mcp import MCPError

SCENARIO = os.environ.get("MCP_CONFORMANCE_SCENARIO", "")
CONTEXT = json.loads(os.environ.get("MCP_CONFORMANCE_CONTEXT") or "{}")
REDIRECT = "http://localhost:3000/callback"
OF_A_KIND = {"number": 5, "integer": 5, "string": "x", "boolean": True, "array": [], "object": {}, "null": None}


def registered():
    """What the scenario has registered us as before; None for nothing."""
    if "client_id" not in CONTEXT:
        return None
    secret = CONTEXT.get("client_secret")
    return OAuthClientInformationFull(
        client_id=CONTEXT["client_id"], client_secret=secret, redirect_uris=[AnyUrl(REDIRECT)],
        token_endpoint_auth_method="client_secret_basic" if secret else "none",
    )  # fmt: skip


class Person:
    """Somebody who says yes to everything at once, without a browser."""

    def __init__(self):
        self.came = None

    async def show(self, url):
        async with httpx2.AsyncClient(trust_env=False) as http:
            back = (await http.get(url)).headers["location"]
        query = {key: values[0] for key, values in parse_qs(urlsplit(back).query).items()}
        self.came = AuthorizationCodeResult(code=query["code"], state=query.get("state"), iss=query.get("iss"))

    async def answer(self):
        return self.came


async def fill_in(_context, params):
    """Accept a form with what it has itself for each field, or something of its kind."""
    fields = getattr(params, "requested_schema", {}).get("properties", {})
    content = {name: field.get("default", OF_A_KIND.get(field.get("type", "string"))) for name, field in fields.items()}
    return types.ElicitResult(action="accept", content=content)


def arguments_for(tool):
    """What a tool must be given, of the right kinds."""
    schema = tool.input_schema
    return {name: OF_A_KIND.get(schema["properties"].get(name, {}).get("type", "string"), "x")
            for name in schema.get("required", [])}  # fmt: skip


async def run(url):
    auth = None
    if SCENARIO.startswith("auth/"):
        person = Person()
        document = "https://conformance-test.local/client-metadata.json"
        auth = oauth_of(url, MemoryTokens(registered()), REDIRECT, person.show, person.answer, document=document)
    server = HttpServer(url=url, timeout_s=25, check_s=0)
    async with open_http("conformance", server, {}, auth=auth, peer=Peer(elicitation=fill_in)) as http:
        client = http.session.client
        tools = (await client.list_tools()).tools
        calls = CONTEXT.get("toolCalls")
        if calls is None:
            calls = [{"name": tool.name, "arguments": arguments_for(tool)} for tool in tools]
        for call in calls:
            if call["name"] in {tool.name for tool in tools}:
                with suppress(MCPError, RuntimeError):  # some are refused on purpose, and the next one counts
                    await client.call_tool(call["name"], call.get("arguments") or {})


anyio.run(run, sys.argv[-1])

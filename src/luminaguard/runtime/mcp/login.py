"""Logging in at a server: the SDK's OAuth, with tokens in a file of the state folder and a browser on this machine."""

from __future__ import annotations

import json
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import parse_qs, urlsplit

import anyio
import anyio.abc
import h11
from mcp.client.auth import OAuthClientProvider, TokenStorage
from mcp.shared.auth import AuthorizationCodeResult, OAuthClientInformationFull, OAuthClientMetadata, OAuthToken
from pydantic import AnyUrl, BaseModel, ValidationError

from luminaguard.errors import McpServerFailed, StorageError, first_of
from luminaguard.files import replace_text

__all__ = ["PERSON_S", "Browser", "Tokens", "oauth_of", "without_a_person"]

T = TypeVar("T", bound=BaseModel)
_MAX_FILE = 1 << 20
_PATH = "/callback"
PERSON_S = 300.0
_DONE = b"<!doctype html><title>LuminaGuard</title><p>You are logged in; this page can be closed."


class Tokens:
    """What a server gave us to show, and what it calls us; a file with mode 0600, which nothing else reads."""

    def __init__(self, state: Path, server: str) -> None:
        self._path = state / "mcp-tokens" / f"{server}.json"

    async def get_tokens(self) -> OAuthToken | None:
        """The tokens; None for none."""
        return self._get("tokens", OAuthToken)

    async def set_tokens(self, tokens: OAuthToken) -> None:
        """Keep them."""
        self._set("tokens", tokens)

    async def get_client_info(self) -> OAuthClientInformationFull | None:
        """What the authorization server calls us; None if it does not."""
        return self._get("client", OAuthClientInformationFull)

    async def set_client_info(self, client_info: OAuthClientInformationFull) -> None:
        """Keep it."""
        self._set("client", client_info)

    def forget(self) -> bool:
        """Delete all of it; whether there was any."""
        there = self._path.exists()
        self._path.unlink(missing_ok=True)
        return there

    def _get(self, name: str, kind: type[T]) -> T | None:
        found = self._read().get(name)
        try:
            return kind.model_validate(found) if found is not None else None
        except ValidationError as error:
            raise self._damaged(error) from error

    def _set(self, name: str, value: BaseModel) -> None:
        replace_text(self._path, json.dumps(self._read() | {name: value.model_dump(mode="json", exclude_none=True)}))

    def _read(self) -> dict[str, Any]:
        try:
            fd = os.open(self._path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
            with os.fdopen(fd, encoding="utf-8") as file:
                found = json.loads(file.read(_MAX_FILE))
            if not isinstance(found, dict):
                raise ValueError("it is no object")  # noqa: TRY004  # of the file, not of a caller
        except FileNotFoundError:
            return {}
        except (OSError, ValueError) as error:
            raise self._damaged(error) from error
        return found

    def _damaged(self, error: Exception) -> StorageError:
        return StorageError(f"{self._path} cannot be read: {type(error).__name__}.", hint="Remove it and log in again.")


Show = Callable[[str], Awaitable[None]]
Answer = Callable[[], Awaitable[AuthorizationCodeResult]]


def oauth_of(
    url: str, tokens: TokenStorage, redirect: str, show: Show, answer: Answer, *, document: str | None = None
) -> OAuthClientProvider:
    """The SDK's flow for one server.

    Args:
        url: of the server.
        tokens: where they are kept.
        redirect: where the authorization server sends the browser back to.
        show: lets a person look at an address.
        answer: waits for what comes back.
        document: where a description of us can be read, for servers that register nobody.
    """
    metadata = OAuthClientMetadata(client_name="LuminaGuard", redirect_uris=[AnyUrl(redirect)])
    return OAuthClientProvider(url, metadata, tokens, show, answer, client_metadata_url=document)


def without_a_person(server: str) -> tuple[Show, Answer]:
    """For calls: a person logs in by a command of its own, not in the middle of one."""

    async def show(_url: str) -> None:
        raise McpServerFailed(f"{server} wants somebody to log in.", hint=f"Run: luminaguard mcp login {server}")

    async def answer() -> AuthorizationCodeResult:
        raise McpServerFailed("Nobody was asked.", hint=f"Run: luminaguard mcp login {server}")

    return show, answer


class Browser:
    """Listens on this machine for the browser that comes back; made by :meth:`open`.

    Attributes:
        redirect: the address that the browser is sent back to.
    """

    def __init__(self, port: int) -> None:
        self.redirect = f"http://127.0.0.1:{port}{_PATH}"
        self._sends, self._comes = anyio.create_memory_object_stream[AuthorizationCodeResult](1)

    @classmethod
    @asynccontextmanager
    async def open(cls) -> AsyncIterator[Browser]:
        """Listen on a free port of the loopback interface, for as long as this context lasts."""
        listener = await anyio.create_tcp_listener(local_host="127.0.0.1")
        port = listener.extra(anyio.abc.SocketAttribute.local_port)  # noqa: S610  # of anyio
        browser = cls(port)
        try:
            async with listener, anyio.create_task_group() as tasks:
                tasks.start_soon(listener.serve, browser._serve)
                yield browser
                tasks.cancel_scope.cancel()
        except BaseExceptionGroup as group:
            raise first_of(group) from None
        finally:
            browser._sends.close()
            browser._comes.close()

    async def answer(self) -> AuthorizationCodeResult:
        """What came back; raises McpServerFailed if nothing does in time."""
        with anyio.move_on_after(PERSON_S):
            return await self._comes.receive()
        raise McpServerFailed(f"Nobody logged in within {PERSON_S:.0f} s.", hint="Run the command again.")

    async def _serve(self, stream: anyio.abc.SocketStream) -> None:
        connection = h11.Connection(h11.SERVER, max_incomplete_event_size=64 << 10)
        async with stream:
            try:
                while (event := connection.next_event()) is h11.NEED_DATA:
                    connection.receive_data(await stream.receive())
                if isinstance(event, h11.Request):
                    status, body = self._take(event.target.decode("ascii", "replace"))
                    head = h11.Response(status_code=status, headers=[("content-type", "text/html; charset=utf-8"),
                                                                     ("connection", "close")])  # fmt: skip
                    await stream.send(connection.send(head) + connection.send(h11.Data(data=body))
                                      + connection.send(h11.EndOfMessage()))  # fmt: skip
            except (h11.ProtocolError, anyio.EndOfStream, anyio.BrokenResourceError):
                pass

    def _take(self, target: str) -> tuple[int, bytes]:
        """What a browser came with; the SDK compares the state with its own."""
        parts = urlsplit(target)
        query = parse_qs(parts.query)
        if parts.path != _PATH or "code" not in query:
            return 404, b"nothing is here"
        result = AuthorizationCodeResult(
            code=query["code"][0], state=query.get("state", [None])[0], iss=query.get("iss", [None])[0]
        )
        try:
            self._sends.send_nowait(result)
        except anyio.WouldBlock:
            return 409, b"once is enough"
        return 200, _DONE

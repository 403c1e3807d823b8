"""A laboratory MCP server that wants to be shown who asks, with an authorization server of its own beside it.

The authorization server registers anybody, lets anybody in who comes with a browser, checks PKCE (RFC 7636), and
gives tokens that end when a test says so.
"""

from __future__ import annotations

import base64
import hashlib
import json
import secrets
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qs, urlencode, urlsplit

from luminaguard.testing.mcp_lab import LabServer

__all__ = ["MemoryTokens", "OAuthServer"]


class MemoryTokens:
    """Tokens for as long as this process lives, as the SDK's flow keeps them."""

    def __init__(self, client: Any = None) -> None:
        self.tokens: Any = None
        self.client = client

    async def get_tokens(self) -> Any:
        """The tokens, if there are any."""
        return self.tokens

    async def set_tokens(self, tokens: Any) -> None:
        """Keep them."""
        self.tokens = tokens

    async def get_client_info(self) -> Any:
        """What the authorization server calls us, if it does."""
        return self.client

    async def set_client_info(self, client_info: Any) -> None:
        """Keep it."""
        self.client = client_info


@dataclass
class OAuthServer(LabServer):
    """One server.

    Attributes:
        broken: which step of the flow is answered with an error, ``register`` or ``token``; or ``flood``.
        tokens: those that are good.
        logins: how often somebody came with a browser.
    """

    broken: str = ""
    tokens: set[str] = field(default_factory=set)
    logins: int = 0
    _codes: dict[str, str] = field(default_factory=dict)
    _refresh: set[str] = field(default_factory=set)

    @property
    def _base(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def answer_beside(self, say: Any, method: bytes, target: str, headers: dict[str, str], body: bytes) -> bool:
        """Answer what is not MCP, and MCP without a good token; whether it did."""
        path, query = urlsplit(target).path, parse_qs(urlsplit(target).query)
        if path == "/mcp":
            if headers.get("authorization", "").removeprefix("Bearer ") in self.tokens:
                return False
            where = f'Bearer resource_metadata="{self._base}/.well-known/oauth-protected-resource/mcp"'
            await say.response(401, b"", [("www-authenticate", where)])
            return True
        if path.startswith("/.well-known/oauth-protected-resource"):
            await say.json(200, {"resource": self.url, "authorization_servers": [self._base]})
        elif path.startswith("/.well-known/"):
            await self._metadata(say)
        elif path == "/register" and self.broken == "flood":
            await say.response(200, b" " * (3 << 20))
        elif path == "/register" and method == b"POST":
            asked = json.loads(body) | {"client_id": f"client-{secrets.token_hex(4)}"}
            await say.json(500 if self.broken == "register" else 201, asked)
        elif path == "/authorize":
            await self._authorize(say, query)
        elif path == "/token" and method == b"POST":
            await self._token(say, parse_qs(body.decode()))
        else:
            await say.response(404, b"")
        return True

    async def _metadata(self, say: Any) -> None:
        await say.json(200, {
            "issuer": self._base, "authorization_endpoint": f"{self._base}/authorize",
            "token_endpoint": f"{self._base}/token", "registration_endpoint": f"{self._base}/register",
            "response_types_supported": ["code"], "grant_types_supported": ["authorization_code", "refresh_token"],
            "code_challenge_methods_supported": ["S256"], "token_endpoint_auth_methods_supported": ["none"],
        })  # fmt: skip

    async def _authorize(self, say: Any, query: dict[str, list[str]]) -> None:
        self.logins += 1
        code = secrets.token_hex(8)
        self._codes[code] = query["code_challenge"][0]
        back = f"{query['redirect_uri'][0]}?{urlencode({'code': code, 'state': query['state'][0]})}"
        await say.response(302, b"", [("location", back)])

    async def _token(self, say: Any, form: dict[str, list[str]]) -> None:
        if form["grant_type"] == ["refresh_token"]:
            good = form["refresh_token"][0] in self._refresh
        else:
            challenge = base64.urlsafe_b64encode(hashlib.sha256(form["code_verifier"][0].encode()).digest())
            good = self._codes.pop(form["code"][0], "") == challenge.rstrip(b"=").decode()
        if self.broken == "token" or not good:
            await say.json(400, {"error": "invalid_grant"})
            return
        self.tokens.add(token := secrets.token_hex(16))
        self._refresh.add(refresh := secrets.token_hex(16))
        await say.json(200, {"access_token": token, "token_type": "Bearer", "expires_in": 3600,
                             "refresh_token": refresh})  # fmt: skip

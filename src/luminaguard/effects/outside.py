"""Effects that are no files: of another server's tool, of the network, of a secret, of a tool that a rule holds back.

Like a changeset, each has one digest over all that it is. What is secret is never in one: of a secret
the name, of a body the size, the digest and the beginning that a person may see.
"""

from __future__ import annotations

import abc
import hashlib
import json
import re
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar
from urllib.parse import urlsplit

from luminaguard.errors import ActionInvalid

__all__ = ["SECRET_HEADERS", "NetworkRequest", "Outside", "RemoteCall", "SecretUse", "ToolRun", "outside_from_json"]

_MAX_BODY = 4 << 20
_MAX_PREVIEW = 64 << 10
SECRET_HEADERS = frozenset({"authorization", "proxy-authorization", "cookie", "set-cookie", "x-api-key",
                            "x-auth-token", "x-amz-security-token"})  # fmt: skip
"""Headers whose values are secrets: they are no part of what is asked, stored or recorded."""
_SHA256 = re.compile(r"[0-9a-f]{64}")
_HOST = re.compile(r"[\w.-]{1,253}|[0-9a-fA-F:]{2,45}")


class _Digested(abc.ABC):
    """A digest over the canonical form, with the kind of effect in it."""

    kind: ClassVar[str]

    @abc.abstractmethod
    def to_json(self) -> dict[str, Any]:
        """For storage and for people's programs."""

    @cached_property
    def digest(self) -> str:
        """``sha256:`` and 64 hex digits."""
        text = json.dumps(self.to_json(), sort_keys=True, separators=(",", ":"))
        digest = hashlib.sha256(f"luminaguard {self.kind} 1\0{text}".encode())
        return f"sha256:{digest.hexdigest()}"


@dataclass(frozen=True)
class RemoteCall(_Digested):
    """A call of a tool of another server.

    Attributes:
        arguments: the JSON object that is sent.
        definition: the tool's definition as the server gives it now; None when it gave none.
        pinned: the definition that a person saw last; None on first use.
        unconfined: the server runs on this machine, without a machine of its own.
    """

    server: str
    tool: str
    arguments: dict[str, Any]
    definition: dict[str, Any] | None = None
    pinned: dict[str, Any] | None = None
    unconfined: bool = False
    kind: ClassVar[str] = "call"

    def to_json(self) -> dict[str, Any]:
        """For storage and for people's programs."""
        where = {"unconfined": True} if self.unconfined else {}
        return {"server": self.server, "tool": self.tool, "arguments": self.arguments,
                "definition": self.definition, "pinned": self.pinned} | where  # fmt: skip


@dataclass(frozen=True)
class NetworkRequest(_Digested):
    """A request over HTTP.

    Attributes:
        url: whole, with its query.
        headers: name and value, without those that carry a secret.
        body_size, body_sha256: of the whole body, in bytes and hex.
        preview: the beginning of the body, bytes that are not UTF-8 as replacement characters.
        secrets: of each header that carries a secret the name, its length in characters, and a keyed digest.
        asker: the server in whose machine it is made; empty for others.
    """

    method: str
    url: str
    headers: tuple[tuple[str, str], ...] = ()
    body_size: int = 0
    body_sha256: str = ""
    preview: str = ""
    secrets: tuple[tuple[str, int, str], ...] = ()
    asker: str = ""
    kind: ClassVar[str] = "request"

    def to_json(self) -> dict[str, Any]:
        """For storage and for people's programs."""
        said: dict[str, Any] = {
            "method": self.method, "url": self.url, "headers": [list(header) for header in self.headers],
            "body_size": self.body_size, "body_sha256": self.body_sha256, "preview": self.preview,
        }  # fmt: skip
        if self.secrets:
            said["secrets"] = [list(secret) for secret in self.secrets]
        if self.asker:
            said["asker"] = self.asker
        return said


@dataclass(frozen=True)
class SecretUse(_Digested):
    """The use of a secret: its name, what for, and where it would go."""

    name: str
    purpose: str
    host: str = ""
    kind: ClassVar[str] = "secret"

    def to_json(self) -> dict[str, Any]:
        """For storage and for people's programs."""
        return {"name": self.name, "purpose": self.purpose, "host": self.host}


@dataclass(frozen=True)
class ToolRun(_Digested):
    """A tool that runs in a machine, on a copy of a folder, where a rule wants to be asked before that.

    Attributes:
        arguments: of a command, ``{"command": [...]}``.
        workspace: absolute path of the folder that it is given a copy of.
    """

    tool: str
    arguments: dict[str, Any]
    workspace: str
    kind: ClassVar[str] = "run"

    def to_json(self) -> dict[str, Any]:
        """For storage and for people's programs."""
        return {"tool": self.tool, "arguments": self.arguments, "workspace": self.workspace}


Outside = RemoteCall | NetworkRequest | SecretUse | ToolRun


def outside_from_json(kind: str, raw: Any) -> Outside:
    """Parse an effect of a kind.

    Raises:
        ActionInvalid: it is none; it says why.
    """
    try:
        if len(json.dumps(raw, ensure_ascii=False).encode()) > _MAX_BODY:  # raises for what is no text, too
            raise ValueError(f"it is larger than {_MAX_BODY >> 20} MiB")
        match kind:
            case "call":
                return RemoteCall(_text(raw, "server"), _text(raw, "tool"), _arguments(raw),
                                  _object(raw.get("definition")), _object(raw.get("pinned")),
                                  raw.get("unconfined") is True)  # fmt: skip
            case "request":
                headers = tuple((str(name), str(value)) for name, value in raw.get("headers", ()))
                _ = urlsplit(_text(raw, "url")).port  # raises for an address that is none
                preview = str(raw.get("preview", ""))[:_MAX_PREVIEW]
                if secret := next((name for name, _ in headers if name.lower() in SECRET_HEADERS), None):
                    raise ValueError(f"the header {secret!a} carries a secret: leave it out, ask for the secret")
                if _size(raw) and not _SHA256.fullmatch(str(raw.get("body_sha256", ""))):
                    raise ValueError("body_sha256 is the digest of the body, 64 hexadecimal digits")
                secrets = tuple((str(name), int(size), str(digest)) for name, size, digest in raw.get("secrets", ()))
                return NetworkRequest(_text(raw, "method"), _text(raw, "url"), headers, _size(raw),
                                      str(raw.get("body_sha256", "")), preview, secrets,
                                      str(raw.get("asker", "")))  # fmt: skip
            case "secret":
                host = str(raw.get("host", ""))
                if host and not _HOST.fullmatch(host):
                    raise ValueError("host is the name of one, and nothing beside it")
                return SecretUse(_text(raw, "name"), _text(raw, "purpose"), host)
            case "run":
                return ToolRun(_text(raw, "tool"), _arguments(raw), _text(raw, "workspace"))
            case other:
                raise ValueError(f"there is no effect {other!r}")
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError, RecursionError) as error:
        raise ActionInvalid(
            f"This is no effect of kind {kind!a}: {error}.", hint="'luminaguard approvals request --help' shows them."
        ) from error


def _text(raw: Any, name: str) -> str:
    value = raw[name]
    if not isinstance(value, str) or not value:
        raise ValueError(f"{name} must be text")
    return value


def _object(value: Any) -> Any:
    if value is not None and not isinstance(value, dict):
        raise ValueError("arguments and definitions are objects")
    return value


def _arguments(raw: Any) -> dict[str, Any]:
    found: dict[str, Any] | None = _object(raw.get("arguments", {}))
    if found is None:
        raise ValueError("arguments are an object")
    return found


def _size(raw: Any) -> int:
    size = int(raw.get("body_size", 0))
    if size < 0:
        raise ValueError("a size is not negative")
    return size

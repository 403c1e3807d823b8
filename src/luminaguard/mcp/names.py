"""What the tools of many servers are called side by side, for agents and for other programs, and which are shown."""

from __future__ import annotations

import fnmatch
import hashlib
import posixpath
import re
from dataclasses import dataclass, field
from urllib.parse import unquote

__all__ = ["Names", "Visibility", "address_of", "resource_at"]

_LONGEST = 64
"""What all known hosts take, of letters, digits, ``_`` and ``-``."""
_ADDRESS = "luminaguard:"
_DECODINGS = 10
_STRANGE = re.compile(r"[^A-Za-z0-9_-]")


@dataclass(frozen=True, slots=True)
class Visibility:
    """Which tools are shown, by patterns over ``SERVER__TOOL``; what is hidden cannot be called either."""

    show: tuple[str, ...] = ("*",)
    hide: tuple[str, ...] = ()

    def shows(self, name: str) -> bool:
        """Whether a tool is shown."""
        return any(fnmatch.fnmatchcase(name, one) for one in self.show) and not self._hides(name)

    def shows_address(self, server: str, uri: str) -> bool:
        """Whether a resource is shown, by ``SERVER__ADDRESS``: a hidden one is, however its address is written."""
        shown = self.shows(f"{server}__{uri}")
        return shown and not (self.hide and any(self._hides(f"{server}__{form}") for form in _forms(uri)))

    def _hides(self, name: str) -> bool:
        return any(fnmatch.fnmatchcase(name.casefold(), one.casefold()) for one in self.hide)


def _forms(uri: str) -> set[str]:
    """Other ways to write an address, which may lead to the same place."""
    decoded = [uri]
    while len(decoded) < _DECODINGS and (again := unquote(decoded[-1])) != decoded[-1]:
        decoded.append(again)
    found = set(decoded)
    for one in decoded:
        scheme, colon, rest = one.replace("\\", "/").partition(":")
        rest = re.split(r"[?#]", rest, maxsplit=1)[0]
        slashes = "//" if rest.startswith("//") else ""
        host, slash, path = rest[len(slashes) :].partition("/")
        plain = posixpath.normpath(f"/{path}").lstrip("/")
        for name in {host, "", "localhost"} if host.casefold() in {"", "localhost"} else {host}:
            found.add(f"{scheme}{colon}{slashes}{name}{slash}{plain}")
    return found


@dataclass(slots=True)
class Names:
    """Names that hosts take, each for one tool of one server, and the same again for the same tools."""

    _known: dict[str, tuple[str, str]] = field(default_factory=dict)

    def add(self, server: str, tool: str) -> str:
        """The name of a tool."""
        whole = f"{server}__{tool}"
        name = _STRANGE.sub("_", whole)
        if name != whole or len(name) > _LONGEST or self._known.get(name, (server, tool)) != (server, tool):
            # Two tools must not end up under one name, and a name must not depend on which came first.
            name = f"{name[: _LONGEST - 9]}-{hashlib.sha256(whole.encode()).hexdigest()[:8]}"
        self._known[name] = (server, tool)
        return name

    def find(self, name: str) -> tuple[str, str] | None:
        """The server and tool of a name that was given before."""
        return self._known.get(name)


def address_of(server: str, uri: str) -> str:
    """The address, or the template of addresses, that a resource of a server has among those of others."""
    return f"{_ADDRESS}{server}/{uri}"


def resource_at(address: str) -> tuple[str, str] | None:
    """The server and its own address of what :func:`address_of` made; None for anything else."""
    server, slash, uri = address.removeprefix(_ADDRESS).partition("/")
    return (server, uri) if address.startswith(_ADDRESS) and slash and server and uri else None

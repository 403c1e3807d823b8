"""Servers are written into ``luminaguard.toml``: one by one, or from the file of another host of servers.

The file is a person's: what stands in it stays, with its comments. A table is added at its end, or taken out whole.
"""

from __future__ import annotations

import json
import os
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from luminaguard.errors import SettingsError
from luminaguard.files import replace_text
from luminaguard.settings import HttpServer, McpServer, Settings, StdioServer

__all__ = ["Found", "add_server", "check_new", "read_other", "remove_server"]

_MAX_FILE = 1 << 20
_NAME = re.compile(r"(?=.{1,32}$)[a-z][a-z0-9-]*(_[a-z0-9-]+)*")
_DOWNLOADS = frozenset({"npx", "bunx", "pnpx", "uvx", "pipx", "docker", "podman"})


@dataclass(frozen=True, slots=True)
class Found:
    """A server of another host's file.

    Attributes:
        settings: as ours; None if it cannot be taken over.
        notes: what is to be done, or why not.
    """

    name: str
    settings: dict[str, Any] | None
    notes: tuple[str, ...] = ()


def read_other(path: Path, folder: Path | None) -> list[Found]:
    """The servers of a file with ``mcpServers``, as Claude Desktop, Claude Code, Cursor and others write it.

    Args:
        path: the file.
        folder: what servers that are run get a copy of.

    Raises:
        SettingsError: it is none.
    """
    try:
        with path.open("rb") as file:
            raw = json.loads(file.read(_MAX_FILE))
        servers = raw.get("mcpServers", raw.get("servers")) if isinstance(raw, dict) else None
        if not isinstance(servers, dict):
            raise ValueError("it has no object 'mcpServers'")  # noqa: TRY004  # of the file, not of a caller
    except (OSError, ValueError, RecursionError) as error:
        raise SettingsError(
            f"{path} cannot be read as a file of MCP servers: {error}.",
            hint='It has {"mcpServers": {"NAME": {"command": ..., "args": [...]}}}.',
        ) from error
    return [_taken_over(str(name), one, folder) for name, one in servers.items()]


def _taken_over(name: str, raw: Any, folder: Path | None) -> Found:
    ours = re.sub(r"[^a-z0-9-]+", "-", name.lower()).strip("-")[:32] or "server"
    ours = ours if ours[0].isalpha() else f"s-{ours}"[:32]
    notes: list[str] = []
    if not isinstance(raw, dict):
        return Found(ours, None, ("it is no object",))
    if raw.get("disabled"):
        return Found(ours, None, ("it is switched off there",))
    if "url" in raw or "serverUrl" in raw:
        headers = {}
        for header in _names(raw.get("headers")):  # values are secrets: they do not go into a file of settings
            variable = re.sub(r"[^A-Z0-9]+", "_", f"MCP_{ours}_{header}".upper())
            headers[str(header)] = variable
            notes.append(f"set {variable} to the value of its header {header}")
        return _checked(ours, {"url": raw.get("url", raw.get("serverUrl")), "headers": headers}, notes)
    command, arguments = raw.get("command"), raw.get("args") or []
    if not isinstance(command, str) or not isinstance(arguments, list):
        return Found(ours, None, ("it has neither a url nor a command",))
    if os.path.basename(command) in _DOWNLOADS:
        why = "downloads the server when it starts: add it with --npm or --pypi, at a version that is locked"
        return Found(ours, None, (f"{os.path.basename(command)} {why}",))
    if variables := _names(raw.get("env")):
        notes.append(f"its variables {', '.join(variables)} do not go into the machine; --env gives it some")
    settings: dict[str, Any] = {"command": [command, *map(str, arguments)]}
    if folder is not None:
        settings["folder"] = str(folder)
    return _checked(ours, settings, notes)


def _names(raw: Any) -> list[str]:
    """The keys of what should be an object; of anything else none."""
    return [str(key) for key in raw] if isinstance(raw, dict) else []


def _checked(name: str, settings: dict[str, Any], notes: list[str]) -> Found:
    try:
        _validated(settings)
    except ValidationError as error:
        return Found(name, None, (str(error.errors()[0]["msg"]),))
    return Found(name, {key: value for key, value in settings.items() if value}, tuple(notes))


def _validated(settings: dict[str, Any]) -> StdioServer | HttpServer:
    adapter: TypeAdapter[Any] = TypeAdapter(McpServer)
    found: StdioServer | HttpServer = adapter.validate_python(settings)
    return found


def check_new(known: Settings, name: str) -> None:
    """Refuse a name that cannot be a server's, or that is one's already; raises SettingsError."""
    if not _NAME.fullmatch(name):
        raise SettingsError(f"{name[:40]!a} is no name for a server.", hint="Small letters, digits, '-' and '_'.")
    if name in known.mcp_servers:
        raise SettingsError(f"There is a server {name!a}.", hint=f"'luminaguard mcp remove {name}' takes it out.")


def add_server(config: Path, known: Settings, name: str, settings: Mapping[str, Any]) -> None:
    """Write a server at the end of ``luminaguard.toml``.

    Raises:
        SettingsError: there is one of this name, or these are no settings of one; nothing was written.
    """
    check_new(known, name)
    try:
        _validated(dict(settings))
    except ValidationError as error:
        raise SettingsError(
            f"The server cannot be used: {error.errors()[0]['msg']}.", hint="See docs/mcp.md."
        ) from error
    lines = [f"[mcp_servers.{name}]", *(f"{key} = {_toml(value)}" for key, value in settings.items())]
    path = config / "luminaguard.toml"
    before = _read(path)
    gap = "" if not before or before.endswith("\n\n") else "\n" if before.endswith("\n") else "\n\n"
    after = f"{before}{gap}" + "\n".join(lines) + "\n"
    expected = _parsed(path, before)
    expected.setdefault("mcp_servers", {})[name] = json.loads(json.dumps(dict(settings)))
    _replace(path, after, expected)


def remove_server(config: Path, name: str) -> None:
    """Take a server's table out of ``luminaguard.toml``; raises SettingsError if it does not stand there by itself."""
    path = config / "luminaguard.toml"
    lines = _read(path).splitlines(keepends=True)
    begins = [number for number, line in enumerate(lines) if line.strip() == f"[mcp_servers.{name}]"]
    if len(begins) != 1:
        raise SettingsError(f"{path} has no table [mcp_servers.{name}].", hint="Take it out by hand.")
    end = begins[0] + 1
    own = f"[mcp_servers.{name}."
    while end < len(lines) and (not lines[end].lstrip().startswith("[") or lines[end].lstrip().startswith(own)):
        end += 1
    while end < len(lines) and (not lines[end - 1].strip() or lines[end - 1].lstrip().startswith("#")):
        end -= 1  # what stands before the next table is about that one
    expected = _parsed(path, "".join(lines))
    expected.get("mcp_servers", {}).pop(name, None)
    _replace(path, "".join(lines[: begins[0]] + lines[end:]), expected)


def _parsed(path: Path, text: str) -> dict[str, Any]:
    try:
        return tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise SettingsError(f"{path} cannot be read: {error}.", hint="Correct the file.") from error


def _replace(path: Path, text: str, expected: dict[str, Any]) -> None:
    """Write the file, if what it says then is what it should; raises SettingsError, and nothing was written."""
    try:
        found: dict[str, Any] | None = tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError):
        found = None
    known = expected.get("mcp_servers")
    if found != expected and not (known == {} and found == {key: one for key, one in expected.items() if one != {}}):
        raise SettingsError(
            f"{path} is written in a way that this command cannot change.", hint="Change it by hand.",
            kept="Nothing was written.",
        )  # fmt: skip
    replace_text(path, text)


def _toml(value: Any) -> str:
    """A value of ours; JSON's strings are TOML's, too (TOML 1.0, "String"), but for what is no character."""
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{_toml(key)} = {_toml(one)}" for key, one in value.items()) + " }"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_toml, value))}]"
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def _read(path: Path) -> str:
    try:
        with path.open("rb") as file:
            data = file.read(_MAX_FILE + 1)
        if len(data) > _MAX_FILE:
            raise SettingsError(f"{path} is larger than {_MAX_FILE >> 20} MiB.", hint="Change it by hand.")
        return data.decode()
    except FileNotFoundError:
        return ""
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"{path} cannot be read: {error}.", hint="Correct the file.") from error

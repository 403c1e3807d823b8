"""Where other programs keep the servers that they start, so that this one can be written there."""

from __future__ import annotations

import difflib
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from luminaguard.errors import SettingsError
from luminaguard.files import replace_text

__all__ = ["HOSTS", "Change", "plan_install"]

_MAX_FILE = 4 << 20
_NAME = "luminaguard"


@dataclass(frozen=True, slots=True)
class _Host:
    """One program: where its file is, for a user or a project, and what the object of its servers is called."""

    user: Callable[[Path], Path]
    project: str
    key: str
    extra: tuple[tuple[str, str], ...] = ()


HOSTS: dict[str, _Host] = {
    "claude-code": _Host(lambda home: home / ".claude.json", ".mcp.json", "mcpServers", (("type", "stdio"),)),
    "cursor": _Host(lambda home: home / ".cursor" / "mcp.json", ".cursor/mcp.json", "mcpServers"),
    "vscode": _Host(lambda home: home / ".config" / "Code" / "User" / "mcp.json", ".vscode/mcp.json", "servers",
                    (("type", "stdio"),)),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Change:
    """What would be written."""

    path: Path
    before: str
    after: str

    def diff(self) -> list[str]:
        """The lines of a unified diff."""
        name = str(self.path)
        return list(difflib.unified_diff(self.before.splitlines(), self.after.splitlines(), name, name, lineterm=""))

    def write(self) -> None:
        """Write it, unless the file is another one by now; raises SettingsError, StorageError."""
        if _read(self.path) != self.before:
            raise SettingsError(f"{self.path} was changed meanwhile.", hint="Run the command again.")
        replace_text(self.path, self.after)


def plan_install(host: str, home: Path, project: Path | None, words: Sequence[str]) -> Change:
    """What has to be written for a program to start the gateway.

    Args:
        host: one of :data:`HOSTS`.
        home: the user's home folder.
        project: a folder, for that project alone; None for all of the user's.
        words: flags of the gateway beside ``--stdio``.

    Raises:
        SettingsError: there is no such program, or its file cannot be read as JSON.
    """
    if host not in HOSTS:
        raise SettingsError(f"{host[:40]!a} is unknown.", hint=f"It is one of {', '.join(HOSTS)}.")
    known = HOSTS[host]
    path = project / known.project if project else known.user(home)
    before = _read(path)
    try:
        whole: Any = json.loads(before, object_pairs_hook=_once) if before.strip() else {}
        _ = json.dumps(
            whole, allow_nan=False, ensure_ascii=False
        ).encode()  # raises for what would not come out as it is
    except (ValueError, RecursionError) as error:
        raise SettingsError(
            f"{path} is no plain JSON: {error}.", hint="It may have comments; write the entry into it by hand."
        ) from error
    if not isinstance(whole, dict) or not isinstance(whole.setdefault(known.key, {}), dict):
        raise SettingsError(f"{path} has no object {known.key!a}.", hint="Correct the file.")
    whole[known.key][_NAME] = dict(known.extra) | {"command": _program(), "args": ["gateway", "--stdio", *words]}
    return Change(path, before, json.dumps(whole, indent=2, ensure_ascii=False) + "\n")


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object whose keys are there once: of others one value would be lost."""
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key comes twice")
    return found


def _program() -> str:
    """This program, wherever that host starts it from."""
    beside = Path(sys.executable).with_name("luminaguard")
    return str(beside) if beside.exists() else "luminaguard"


def _read(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return file.read(_MAX_FILE).decode()
    except FileNotFoundError:
        return ""
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"{path} cannot be read: {error}.", hint="Correct the file.") from error

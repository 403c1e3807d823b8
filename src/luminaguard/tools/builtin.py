"""The tools that run in a machine: what a model is told of them, and the command that each call is.

A call is checked here, before any machine is started: a wrong one is answered with a sentence that the
model can act on. ``reads`` says what a call's outcome can depend on, so that calls of one turn can run
beside each other on the same state and still mean what they would one after the other.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

from luminaguard.actions.tools import ToolSpec
from luminaguard.errors import ActionInvalid

__all__ = ["IN_MACHINE", "Plan", "as_asked", "check_arguments", "plan"]

_MAX_ARGUMENTS = 8 << 20
_MAX_PROGRAM = 64 << 10
"""Of a command line or a program: all of it is judged by the rules, and shown to whoever is asked."""
_MOST_ASKED = 2000
_FILE_TOOLS = frozenset({"read_file", "write_file", "edit_file", "list_files", "search_files"})
_DEFAULT_TIMEOUT_S, _LONGEST_S = 300, 3600


@dataclass(frozen=True, slots=True)
class Plan:
    """What a call is.

    Attributes:
        argv, stdin: the command in the machine.
        timeout_s: until it is stopped.
        reads: the one path that its outcome depends on; None is all of the workspace.
    """

    argv: tuple[str, ...]
    stdin: bytes
    timeout_s: float
    reads: str | None


def _tool(name: str, description: str, **properties: tuple[str, str]) -> ToolSpec:
    """A tool whose parameters are told as ``name=(type, what for)``; one that may be left out ends with ``?``."""
    required = [key for key, (kind, _) in properties.items() if not kind.endswith("?")]
    shapes = {key: {"type": kind.removesuffix("?"), "description": text} for key, (kind, text) in properties.items()}
    return ToolSpec(name, description, {"type": "object", "properties": shapes, "required": required,
                                    "additionalProperties": False})  # fmt: skip


_PATH = "relative to the workspace"
IN_MACHINE: Mapping[str, ToolSpec] = {tool.name: tool for tool in (
    _tool("shell", "Run a command line with bash in the workspace. There is no network. Changes of files are kept "
          "for the next calls; processes, and files elsewhere, are not.",
          command=("string", "the command line"),
          timeout_s=("integer?", f"seconds until it is stopped; {_DEFAULT_TIMEOUT_S} if not given")),
    _tool("python", "Run Python code in the workspace, with the standard library.",
          code=("string", "the program"),
          timeout_s=("integer?", f"seconds until it is stopped; {_DEFAULT_TIMEOUT_S} if not given")),
    _tool("read_file", "Read lines of a text file.", path=("string", _PATH),
          offset=("integer?", "the first line, from 1"), limit=("integer?", "how many lines; at most 2000")),
    _tool("write_file", "Create a file, or replace all of it; folders are made.", path=("string", _PATH),
          content=("string", "all of the new text")),
    _tool("edit_file", "Replace a text that occurs exactly once in a file.", path=("string", _PATH),
          old=("string", "the text as it is, with its white space"), new=("string", "what takes its place"),
          everywhere=("boolean?", "replace it wherever it occurs")),
    _tool("list_files", "List files with their sizes in bytes.", path=("string?", f"a folder, {_PATH}"),
          pattern=("string?", "names, such as *.py")),
    _tool("search_files", "Find lines that match a regular expression of Python.", regex=("string", "what to find"),
          path=("string?", f"a folder or file, {_PATH}"), pattern=("string?", "names of files, such as *.py")),
)}  # fmt: skip
_TYPES = {"string": str, "integer": int, "boolean": bool, "object": dict, "array": list}


def plan(name: str, arguments: Mapping[str, Any]) -> Plan:
    """The command that a call is.

    Raises:
        ActionInvalid: there is no such tool, or these are no arguments for it; it says what is wrong.
    """
    if name not in IN_MACHINE:
        raise ActionInvalid(f"There is no tool {name[:64]!a}.", hint=f"There is {', '.join(IN_MACHINE)}.")
    check_arguments(IN_MACHINE[name], arguments)
    timeout_s = float(max(1, min(int(arguments.get("timeout_s", _DEFAULT_TIMEOUT_S)), _LONGEST_S)))
    match name:
        case "shell":
            # From standard input a command line may be longer than an argument; bash reads it before it runs.
            return Plan(("bash", "-c", 'eval "$(cat)" </dev/null'), _bytes(arguments["command"]), timeout_s, None)
        case "python":
            return Plan(("python3", "-"), _bytes(arguments["code"]), timeout_s, None)
    asked = json.dumps({"tool": name, "arguments": dict(arguments)}).encode("ascii")
    path = str(arguments.get("path", "")) if name in {"read_file", "write_file", "edit_file"} else None
    return Plan(("python3", "-I", "-S", "-X", "utf8", "-c", _script()), asked, timeout_s, _plain(path))


def as_asked(name: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a call as rules and people see them: long texts as their beginning and their digest."""
    return {key: _beginning(value) if name in _FILE_TOOLS and isinstance(value, str) else value
            for key, value in arguments.items()}  # fmt: skip


def _beginning(text: str) -> str:
    if len(text) <= _MOST_ASKED:
        return text
    digest = hashlib.sha256(_bytes(text)).hexdigest()
    return f"{text[:_MOST_ASKED]} … ({len(text):,} characters, sha256 {digest})"


def check_arguments(tool: ToolSpec, arguments: Mapping[str, Any]) -> None:
    """Check the arguments of a call against the tool's schema, as far as these schemas go.

    Raises:
        ActionInvalid: it says which argument is wrong.
    """
    properties: Mapping[str, Any] = tool.parameters["properties"]
    if unknown := {str(key) for key in arguments} - set(properties):
        raise _wrong(tool, f"has no argument {min(unknown)[:64]!a}")
    if missing := [key for key in tool.parameters["required"] if key not in arguments]:
        raise _wrong(tool, f"needs {missing[0]!a}")
    for key, value in arguments.items():
        kind = properties[key]["type"]
        if not isinstance(value, _TYPES[kind]) or (kind == "integer" and isinstance(value, bool)):
            raise _wrong(tool, f"takes {key!a} as {kind}, not as {type(value).__name__}")
        if isinstance(value, str) and ("\0" in value or len(value) > _MAX_ARGUMENTS):
            raise _wrong(tool, f"takes no {key!a} that is longer than {_MAX_ARGUMENTS >> 20} MiB or has a NUL in it")
        if isinstance(value, str) and tool.name not in _FILE_TOOLS and len(value) > _MAX_PROGRAM:
            raise _wrong(tool, f"takes no {key!a} of more than {_MAX_PROGRAM >> 10} KiB; write it into a file first")


def _wrong(tool: ToolSpec, why: str) -> ActionInvalid:
    return ActionInvalid(f"{tool.name} {why}.", hint=f"Its arguments: {', '.join(tool.parameters['properties'])}.")


def _bytes(text: str) -> bytes:
    return text.encode("utf-8", "backslashreplace")


def _plain(path: str | None) -> str | None:
    """The path as a workspace has it; None (which is everything) for one that says more than a name."""
    if path is None or not path or path.startswith("/"):
        return None
    parts = [part for part in path.split("/") if part not in {"", "."}]
    return None if ".." in parts or not parts else "/".join(parts)


@cache
def _script() -> str:
    return (resources.files("luminaguard.tools") / "in_guest.py").read_text(encoding="utf-8")

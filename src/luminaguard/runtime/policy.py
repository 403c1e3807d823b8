"""The rules that hold here and now: read from their files, and applied to what is asked for.

The user's file lies in the configuration folder, where no agent can write; the workspace's own file
comes from the host's folder, never from a machine's copy of it.
"""

from __future__ import annotations

import datetime as dt
import hashlib
import json
import os
import re
import stat
from functools import lru_cache
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from luminaguard.actions.files import MAX_FILE, RulesFile, parse_policy
from luminaguard.actions.model import Action, mark_words
from luminaguard.actions.patterns import matches_path
from luminaguard.actions.policy import WORKSPACE_FILE, Judgement, Policy
from luminaguard.approvals.model import Judged
from luminaguard.effects.changes import Changeset
from luminaguard.effects.outside import NetworkRequest, Outside, RemoteCall, SecretUse, ToolRun
from luminaguard.errors import PolicyInvalid

if TYPE_CHECKING:
    from collections.abc import Iterable

    from luminaguard.approvals.model import Request
    from luminaguard.effects.card import DiffCard

__all__ = ["BUILT_IN", "action_of", "built_in_rules", "judge", "load_policy", "marked_labels", "own_rules"]

BUILT_IN = "built-in rules"
_AGENT = re.compile(r"task-\w{1,20}")
"""Ids of tasks that agents work on."""


def built_in_rules() -> RulesFile:
    """The rules that come with LuminaGuard."""
    return RulesFile(BUILT_IN, (resources.files("luminaguard.actions") / "builtin.toml").read_text(encoding="utf-8"))


def load_policy(config: Path, workspace: Path | None, kept: bytes | None = None) -> Policy:
    """Read all rules that hold for a folder.

    Args:
        config: the configuration folder.
        workspace: the folder that is worked on; None where there is none.
        kept: the folder's own rules, where the folder is on another host; empty if it has none.

    Raises:
        PolicyInvalid: a file of rules cannot be read; nothing may run.
    """
    user = _read(config, "luminaguard.toml", follow=True)
    if kept is None:
        own = _read(workspace, WORKSPACE_FILE, follow=False) if workspace else None
    else:
        own = RulesFile(WORKSPACE_FILE, kept.decode()) if kept else None
    return _parsed(user, own)


@lru_cache(maxsize=8)
def _parsed(user: RulesFile | None, own: RulesFile | None) -> Policy:
    """The rules of these texts: they are read each time, and understood once."""
    return parse_policy(user, built_in_rules(), own)


def own_rules(workspace: Path) -> bytes:
    """The rules that a folder has of its own; empty if it has none. Raises PolicyInvalid."""
    found = _read(workspace, WORKSPACE_FILE, follow=False)
    return found.text.encode() if found else b""


def judge(policy: Policy, action: Action) -> tuple[Judgement, Judged]:
    """What the rules say of an action now, whole and as a request keeps it."""
    judgement = policy.judge(action, dt.datetime.now().astimezone())
    two = policy.two_people_from is not None and not judgement.severity < policy.two_people_from
    j = judgement
    return judgement, Judged(j.risk, j.severity, j.reason, j.rule, policy.digest, people=2 if two else 1)


def action_of(
    request: Request, effect: Changeset | Outside, card: DiffCard | None = None, labels: frozenset[str] = frozenset()
) -> Action:
    """The action that a request's effect is.

    Args:
        request: what asks.
        effect: its effect.
        card: of a changeset; with it, lines and what only contents show are known, too.
        labels: what its task carries by now, beside what it carried when it asked.
    """
    taint = frozenset(request.taint) | labels
    common: dict[str, Any] = {"workspace": request.workspace, "task": request.task, "taint": taint}
    match effect:
        case Changeset():
            seen: dict[str, frozenset[str]] = {}
            lines = None
            if card is not None and card.summary is not None:
                seen = {c.path: mark_words(item.marks) for c, item in zip(effect.changes, card.items, strict=True)}
                if card.compared:  # what was not compared has no number of lines, and none is not zero
                    lines = card.summary.lines_added + card.summary.lines_removed
            agent = bool(_AGENT.fullmatch(request.task)) and request.command[:1] == ("run",)
            return Action.of_changeset(effect, workspace=request.workspace, command=() if agent else request.command,
                                       task=request.task, taint=taint, lines=lines, seen=seen,
                                       tool="run" if agent else "exec")  # fmt: skip
        case RemoteCall(server, tool, arguments, definition):
            return Action.from_json({"effect": "call", "server": server, "tool": tool, "arguments": arguments,
                                     "annotations": _hints(definition),
                                     "exact": (("definition", _digest(definition)),), **common})  # fmt: skip
        case NetworkRequest(method, url):
            headers: dict[str, str] = {}
            for name, value in (*effect.headers, *((name, "") for name, _, _ in effect.secrets)):
                before = headers.get(name.lower())  # as one that comes twice is read (RFC 9110, 5.3)
                headers[name.lower()] = value if before is None else f"{before}, {value}"
            exact = (("body", effect.body_sha256), ("headers", _digest(effect.headers)),
                     *([("secrets", _digest(effect.secrets))] if effect.secrets else []))  # fmt: skip
            return Action.from_json({"effect": "request", "method": method, "url": url, "bytes": effect.body_size,
                                     "arguments": {"headers": headers} if headers else {},
                                     "exact": exact, **common})  # fmt: skip
        case SecretUse(name, purpose, host):
            return Action.from_json({"effect": "secret", "secret": name, "url": f"https://{host}/" if host else "",
                                     "exact": (("purpose", purpose),), **common})  # fmt: skip
        case ToolRun(tool, arguments, workspace):
            path = arguments.get("path")
            files = [{"path": path}] if isinstance(path, str) and path else []
            return Action.from_json(common | {"effect": "run", "tool": tool, "arguments": arguments, "files": files,
                                              "workspace": workspace})  # fmt: skip


def _hints(definition: dict[str, Any] | None) -> dict[str, bool]:
    """The annotations of a tool's definition that say yes or no; all else that stands there says nothing."""
    said = (definition or {}).get("annotations")
    names = ("readOnlyHint", "destructiveHint", "idempotentHint", "openWorldHint")
    return {name: said[name] for name in names if isinstance(said.get(name), bool)} if isinstance(said, dict) else {}


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def marked_labels(policy: Policy, paths: Iterable[str]) -> list[tuple[str, str]]:
    """The labels of marked folders that a workspace has, each with the first path that bears it."""
    waiting = dict(policy.marked_folders)
    found = []
    for path in paths if waiting else ():
        here = [pattern for pattern in waiting if matches_path(pattern, path, wide=True)]
        found += [(waiting.pop(pattern), path) for pattern in here]
    return found


def _read(folder: Path, name: str, *, follow: bool) -> RulesFile | None:
    """A file of rules; None if there is none, or no folder. What is there and is no file of rules is an error."""
    try:
        folder_fd = os.open(folder, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError:
        return None  # whoever uses the folder says what is wrong with it
    try:
        flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | (0 if follow else os.O_NOFOLLOW)
        fd = os.open(name, flags, dir_fd=folder_fd)
    except FileNotFoundError:
        if not (folder / name).is_symlink():
            return None
        raise _unreadable(name, "it is a link to nothing") from None
    except OSError as error:
        if not os.access(folder, os.R_OK | os.X_OK):
            return None  # the whole folder cannot be used, and whoever uses it says so
        raise _unreadable(name, str(error.strerror)) from error
    finally:
        os.close(folder_fd)
    with os.fdopen(fd, "rb") as file:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise _unreadable(name, "it is not a file")
        try:
            return RulesFile(name, file.read(MAX_FILE + 1).decode())
        except (OSError, UnicodeDecodeError) as error:
            raise _unreadable(name, str(error)) from error


def _unreadable(name: str, why: str) -> PolicyInvalid:
    return PolicyInvalid(
        f"{name}, line 1, column 1: it cannot be read: {why}.",
        hint="Correct or remove it; nothing runs and nothing is published while the rules cannot be read.",
    )

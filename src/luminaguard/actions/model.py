"""An action as the policy sees it: what the agent called, with what, and what came of it.

Two kinds of facts meet here. What a machine *observed* (the files of a changeset, the host of a
request) is judged as it is. What somebody *claims* (a tool's name, a server's annotations) is a hint.
"""

from __future__ import annotations

import re
from enum import Enum
from functools import cached_property
from typing import Any, Literal, Self
from urllib.parse import SplitResult, urlsplit

from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError, field_validator

from luminaguard.actions.patterns import climbs, is_deceptive, leaves
from luminaguard.effects.changes import Change as FileChange
from luminaguard.effects.changes import Changeset, DirEntry, Entry, FileEntry, Kind, LinkEntry
from luminaguard.effects.marks import Mark, marks_of
from luminaguard.effects.text import hides_something
from luminaguard.errors import ActionInvalid

__all__ = ["Action", "EffectKind", "FileFact", "Hints", "Risk", "Severity", "mark_words"]

EffectKind = Literal["run", "changeset", "call", "request", "secret"]
"""``run``: inside a machine, of no effect yet; the others cross its boundary."""

_FROZEN = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)
_PORTS = {"http": 80, "https": 443}
_HOST = re.compile(r"(?:[^\W_][\w-]*\.)*[^\W_][\w-]*|[0-9a-f:]+")
_MAX_NAME, _MAX_FILES = 4096, 100_000


class _Ordered(Enum):
    """Members compare in the order in which they stand: what comes later is stricter."""

    def __lt__(self, other: Self) -> bool:
        order = list(type(self))
        return order.index(self) < order.index(other)


class Risk(_Ordered):
    """What becomes of an action."""

    GREEN = "GREEN"
    RED = "RED"
    FORBIDDEN = "FORBIDDEN"


class Severity(_Ordered):
    """How much attention a decision deserves."""

    LOW = "low"
    MEDIUM = "medium"
    HIGH = "high"
    CRITICAL = "critical"


def mark_words(marks: tuple[Mark, ...]) -> frozenset[str]:
    """The words by which rules name marks: ``hook``, ``leaves``, ``executable``."""
    return frozenset(mark.name.lower() for mark in marks)


class FileFact(BaseModel):
    """One changed path: relative to the workspace, what became of it, and what a person must not miss.

    ``bytes`` is the size of what is written; a deletion writes nothing. ``target`` is where a link points.
    """

    model_config = _FROZEN

    path: str = Field(min_length=1, max_length=_MAX_NAME)
    kind: Kind = "modify"
    marks: frozenset[str] = frozenset()
    target: str = Field(default="", max_length=_MAX_NAME)
    bytes: int = Field(default=0, ge=0)

    @field_validator("marks")
    @classmethod
    def _known(cls, value: frozenset[str]) -> frozenset[str]:
        if unknown := value - {mark.name.lower() for mark in Mark}:
            raise ValueError(f"there is no mark {min(unknown)!r}")
        return value

    @classmethod
    def of(cls, change: FileChange, more: frozenset[str] = frozenset()) -> FileFact:
        """The fact that a change is; ``more`` are marks that only its contents show."""
        size = change.after.size if isinstance(change.after, FileEntry) else 0
        return cls.model_construct(
            path=change.path, kind=change.kind, marks=mark_words(marks_of(change)) | more, bytes=size,
            target=change.after.target if isinstance(change.after, LinkEntry) else "",
        )  # fmt: skip


class Hints(BaseModel):
    """What a server says of its own tool (MCP's annotations); None is no answer."""

    model_config = _FROZEN

    read_only: bool | None = Field(default=None, alias="readOnlyHint")
    destructive: bool | None = Field(default=None, alias="destructiveHint")
    idempotent: bool | None = Field(default=None, alias="idempotentHint")
    open_world: bool | None = Field(default=None, alias="openWorldHint")


class Action(BaseModel):
    """One concrete action.

    Attributes:
        effect: what crosses the machine's boundary.
        tool, server: names; no server is LuminaGuard itself.
        arguments: as the model gave them.
        files, lines: what a changeset changes; lines of text added and removed, None when not counted.
        method, url, bytes: of a request; ``bytes`` are those of its body.
        secret: the name of a secret, never its value.
        workspace: absolute path of the folder.
        exact: what else it is, by name, such as the digest of a body: for grants, which take it as it is.
        taint: labels of untrusted input that the task has read.
    """

    model_config = _FROZEN

    effect: EffectKind
    tool: str = Field(default="", max_length=_MAX_NAME)
    server: str = Field(default="", max_length=_MAX_NAME)
    arguments: JsonValue = Field(default_factory=dict)
    annotations: Hints = Hints()
    files: tuple[FileFact, ...] = Field(default=(), max_length=_MAX_FILES)
    lines: int | None = Field(default=None, ge=0)
    method: str = Field(default="", max_length=32)
    url: str = Field(default="", max_length=8192)
    bytes: int = Field(default=0, ge=0)
    secret: str = Field(default="", max_length=_MAX_NAME)
    workspace: str = Field(default="", max_length=_MAX_NAME)
    exact: tuple[tuple[str, str], ...] = ()
    task: str = Field(default="", max_length=200)
    taint: frozenset[str] = frozenset()

    @field_validator("files", mode="before")
    @classmethod
    def _from_entries(cls, value: Any) -> Any:
        """Files may be told as a changeset tells them, too; their marks are then found here."""
        if not isinstance(value, list | tuple):
            return value
        return [_from_row(row) if isinstance(row, dict) else row for row in value]

    @classmethod
    def from_json(cls, raw: Any) -> Action:
        """Parse an action.

        Raises:
            ActionInvalid: it says which field is wrong.
        """
        try:
            return cls.model_validate(raw)
        except (ValidationError, RecursionError, OverflowError) as error:
            issues = error.errors() if isinstance(error, ValidationError) else []
            first = f"{'.'.join(map(str, issues[0]['loc']))}: {issues[0]['msg']}" if issues else "nested too deeply"
            raise ActionInvalid(
                f"This is not an action: {first}.",
                hint="'luminaguard policy explain --help' shows what one looks like.",
            ) from error

    @classmethod
    def of_changeset(
        cls, changeset: Changeset, *, workspace: str, command: tuple[str, ...], task: str = "",
        taint: frozenset[str] = frozenset(), lines: int | None = None,
        seen: dict[str, frozenset[str]] | None = None, tool: str = "exec",
    ) -> Action:  # fmt: skip
        """What publishing a changeset is. ``seen`` are the marks that only contents show, by path.

        What an agent did is of the tool ``run`` and of no command: what it was asked for is no command line.
        """
        seen = seen or {}
        files = tuple(FileFact.of(change, seen.get(change.path, frozenset())) for change in changeset.changes)
        return cls.model_construct(
            effect="changeset", tool=tool, arguments={"command": list(command)} if command else {}, files=files,
            lines=lines,
            workspace=workspace, task=task, taint=taint,
        )  # fmt: skip

    @cached_property
    def leaves(self) -> list[tuple[str, str]]:
        """Every value in the arguments with its name; raises TooLarge."""
        return leaves(self.arguments)

    @cached_property
    def host(self) -> str:
        """Host of the request, as its server would be looked up; empty if there is none."""
        return (self._split.hostname or "").removesuffix(".") if self._split else ""

    @property
    def port(self) -> int:
        """Of the request, also where its address does not name it; 0 if there is none."""
        return (self._split.port or _PORTS.get(self._split.scheme, 0)) if self._split else 0

    @cached_property
    def url_path(self) -> str:
        """Path of the request's address without its query; empty for a tunnel, in which no path can be seen."""
        if self.method.upper() == "CONNECT":
            return ""
        return (self._split.path or "/") if self._split else ""

    @cached_property
    def oddity(self) -> str:
        """What an address has beside host and path, in words; empty if it has nothing."""
        if self.oddity_but_port or self._split is None or self.port == _PORTS.get(self._split.scheme):
            return self.oddity_but_port
        return f"names port {self.port}"

    @cached_property
    def oddity_but_port(self) -> str:
        """The same, where a rule says which port."""
        split = self._split
        if split is None or not _HOST.fullmatch(self.host.casefold()):
            return "has no host that all would read alike"
        if hides_something(self.url) or {" ", "\\"} & set(self.url) or is_deceptive(self.url):
            return "has characters that some read otherwise"
        if split.scheme not in _PORTS:
            return "is not one of HTTP"
        if split.username is not None or split.password is not None:
            return "names a user"
        if climbs(split.path) or "%" in split.path:
            return "has a path that some read otherwise"
        return "has a query" if split.query or split.fragment else ""

    @cached_property
    def _split(self) -> SplitResult | None:
        try:
            split = urlsplit(self.url)
            _ = split.port  # raises, too
        except ValueError:
            return None
        return split


def _from_row(row: dict[str, Any]) -> Any:
    """A change that was told by its entries, ``{"path", "before", "after"}``; or by its kind, with some marks."""
    try:
        if {"before", "after"} & row.keys():
            return FileFact.of(FileChange(str(row["path"]), _entry(row.get("before")), _entry(row.get("after"))))
        # What the path alone shows is marked, whoever tells it.
        path, kind = str(row["path"]), row.get("kind", "modify")
        before = None if kind in {"create", "symlink"} else FileEntry(0o644, 0, "before")
        after = {"delete": None, "symlink": LinkEntry("x")}.get(kind, FileEntry(0o644, 0, "after"))
        marks = mark_words(marks_of(FileChange(path, before, after)))
        return row | {"marks": sorted(marks | set(row.get("marks", ())))}
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise ValueError(f"a file cannot be read ({error!r})") from None


def _entry(raw: Any) -> Entry | None:
    if raw is None:
        return None
    match raw["type"]:
        case "file":
            size = int(raw.get("size", 0))
            if size < 0:
                raise ValueError("a size is not negative")
            return FileEntry(int(str(raw.get("mode", "0644")), 8), size, str(raw.get("sha256", "")))
        case "dir":
            return DirEntry(int(str(raw.get("mode", "0755")), 8))
        case "symlink":
            return LinkEntry(str(raw["target"]))
        case other:
            raise ValueError(f"unknown type {other!r}")

"""One Settings object: defaults, ``luminaguard.toml``, ``LUMINAGUARD_*`` variables, then flags.

The file is read from the user's configuration folder and never from a workspace, where an agent
could have written it. ``LUMINAGUARD_HOME`` moves configuration, state, cache and run-time files
together under one folder.
"""

from __future__ import annotations

import itertools
import os
import re
import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import (
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    StringConstraints,
    Tag,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from luminaguard.errors import SettingsError

__all__ = ["Folders", "GatewaySettings", "HttpServer", "McpServer", "Settings", "StdioServer", "load_settings"]

_MAX_FILE = 1 << 20
_LOOPBACK = frozenset({"localhost", "127.0.0.1", "::1"})
_HEADER = re.compile(r"[A-Za-z0-9-]{1,64}")
_FOLDER = re.compile(r"(?!\.)[^/\x00-\x1f\x7f]{1,64}")
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,127}")
ServerName = Annotated[str, StringConstraints(pattern=r"^[a-z][a-z0-9-]*(_[a-z0-9-]+)*$", max_length=32)]
"""Without ``__``, which stands between it and the name of a tool: no server can take another one's names."""


class Folders:
    """Where things live. All are created with mode 0700 when first used."""

    def __init__(self, config: Path, state: Path, cache: Path, run: Path, data: Path | None = None) -> None:
        self.config = config
        self.state = state
        self.cache = cache
        self.run = run
        self.data = data or state.parent / "data"
        """What people work on who have no other place for it: of servers of tools that were given no folder."""

    @classmethod
    def from_environment(cls) -> Folders:
        """``LUMINAGUARD_HOME``, or the XDG base directories (specifications.freedesktop.org)."""
        if home := os.environ.get("LUMINAGUARD_HOME"):
            base = Path(home).absolute()
            return cls(base / "config", base / "state", base / "cache", base / "run", base / "data")

        def xdg(variable: str, default: str) -> Path:
            value = os.environ.get(variable, "")
            # The specification has relative paths ignored.
            return (Path(value) if value.startswith("/") else Path.home() / default) / "luminaguard"

        state = xdg("XDG_STATE_HOME", ".local/state")
        return cls(xdg("XDG_CONFIG_HOME", ".config"), state, xdg("XDG_CACHE_HOME", ".cache"), state / "run",
                   xdg("XDG_DATA_HOME", ".local/share"))  # fmt: skip

    def ensure(self) -> Folders:
        """Create the folders, private to the user.

        Raises:
            SettingsError: one cannot be created, or belongs to someone else.
        """
        for folder in (self.config, self.state, self.cache, self.run):
            try:
                folder.mkdir(mode=0o700, parents=True, exist_ok=True)
                info = folder.stat()
                if info.st_uid == os.geteuid() and info.st_mode & 0o077:
                    folder.chmod(0o700)
            except OSError as error:
                raise SettingsError(
                    f"{folder} cannot be used: {error.strerror}.",
                    hint="Set LUMINAGUARD_HOME to a folder that you own.",
                ) from error
            if info.st_uid != os.geteuid():
                raise SettingsError(
                    f"{folder} belongs to another user (uid {info.st_uid}).",
                    hint="Set LUMINAGUARD_HOME to a folder that you own.",
                )
        return self


class StdioServer(BaseModel):
    """A server of tools that speaks MCP on its standard input and output, in a machine of its own.

    Attributes:
        command: what is run in the machine.
        folder: absolute path of the folder that it gets a copy of; what it changes there is asked for. None for an
            empty one.
        folders: absolute paths of more folders, by the names that copies of them have in that one.
        timeout_s: how long a call may take.
        isolation: ``none`` lets it run on this machine, with the user's rights, and each call of it be asked for.
        network: ``rules`` lets its programs reach by HTTP what the rules let, and ask for the rest; ``none`` nothing.
        environment: variables that it is given; nothing secret, for they stand here.
        layer: id of what is beside the image in its machine: a server from npm or PyPI; empty for none.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    command: tuple[str, ...] = Field(min_length=1, max_length=256)
    isolation: Literal["machine", "none"] = "machine"
    folder: Path | None = None
    folders: dict[str, Path] = Field(default_factory=dict, max_length=15)
    environment: dict[str, str] = Field(default_factory=dict, max_length=64)
    network: Literal["none", "rules"] = "none"
    layer: str = Field(default="", pattern="^([0-9a-f]{64})?$")
    timeout_s: float = Field(default=60, gt=0, le=3600)

    @model_validator(mode="after")
    def _layer_in_a_machine(self) -> StdioServer:
        if self.isolation == "none" and (self.layer or self.network != "none" or self.folders):
            raise ValueError("a layer, rules of a network and several folders are of a machine, and isolation is none")
        return self

    @model_validator(mode="after")
    def _folders_apart(self) -> StdioServer:
        given = sorted(Path(os.path.normpath(one)) for one in (self.folder, *self.folders.values()) if one is not None)
        if any(later.is_relative_to(one) for one, later in itertools.pairwise(given)):
            raise ValueError("one of the folders lies in another one")
        return self

    @field_validator("environment")
    @classmethod
    def _variables(cls, environment: dict[str, str]) -> dict[str, str]:
        if any(not _VARIABLE.fullmatch(name) or "\0" in value for name, value in environment.items()):
            raise ValueError("the environment has names of variables, and texts")
        return environment

    @field_validator("folder")
    @classmethod
    def _absolute(cls, folder: Path | None) -> Path | None:
        if folder is not None and not folder.is_absolute():
            raise ValueError("it is no absolute path")
        return folder

    @field_validator("folders")
    @classmethod
    def _named(cls, folders: dict[str, Path]) -> dict[str, Path]:
        if not all(_FOLDER.fullmatch(name) and name.isprintable() and folder.is_absolute()
                   for name, folder in folders.items()):  # fmt: skip
            raise ValueError("the folders have plain names and absolute paths")
        return folders


class HttpServer(BaseModel):
    """A server of tools elsewhere, at one or several endpoints that do the same.

    Attributes:
        url: its address, or all its addresses.
        weights: the share of each address; all the same if there are none.
        resolve: each address of the host's name is an endpoint.
        strategy: who gets a call: the less loaded of two, or one after another.
        timeout_s: how long a call may take, with all attempts.
        check_s: how often endpoints are looked at; 0 for never.
        idempotent: tools that a person says may be called twice.
        stateless: a session of the older era may be opened anew at another endpoint.
        hedge: calls that only read are sent a second time when they take long.
        busy_is_not_done: 429 and 503 are believed to mean that nothing was done.
        headers: header to the environment variable that has its value.
        oauth: it wants to be shown who asks, which ``luminaguard mcp login`` gets.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    url: str | tuple[str, ...]
    weights: tuple[float, ...] = ()
    resolve: bool = False
    strategy: Literal["two-choices", "round-robin"] = "two-choices"
    timeout_s: float = Field(default=60, gt=0, le=3600)
    check_s: float = Field(default=15, ge=0, le=3600)
    idempotent: frozenset[str] = frozenset()
    stateless: bool = False
    hedge: bool = False
    busy_is_not_done: bool = True
    headers: dict[str, str] = Field(default_factory=dict)
    oauth: bool = False

    @property
    def urls(self) -> tuple[str, ...]:
        """All its addresses."""
        return (self.url,) if isinstance(self.url, str) else self.url

    @model_validator(mode="after")
    def _usable(self) -> HttpServer:
        urls = self.urls
        if not 0 < len(urls) <= 64 or len(set(urls)) != len(urls):
            raise ValueError("it has 1 to 64 addresses, each once")
        for url in urls:
            if not url.isascii() or not url.isprintable() or " " in url:
                raise ValueError("an address has plain characters alone")
            parts = urlsplit(url)
            _ = parts.port  # raises for what is none
            if parts.scheme not in {"http", "https"} or not parts.hostname or "@" in parts.netloc or parts.fragment:
                raise ValueError("an address is http or https, with a host and without a password")
            if parts.scheme == "http" and parts.hostname not in _LOOPBACK:
                raise ValueError("an address of another machine is https")
        if self.weights and (len(self.weights) != len(urls) or not all(0 < one <= 1000 for one in self.weights)):
            raise ValueError("there is one weight an address, each above 0")
        if self.resolve and len(urls) != 1:
            raise ValueError("resolve is for one address")
        if any(not _HEADER.fullmatch(name) or not _VARIABLE.fullmatch(var) for name, var in self.headers.items()):
            raise ValueError("headers give the name of an environment variable for the name of a header")
        return self


def _kind_of_server(raw: Any) -> str:
    return "http" if "url" in (raw if isinstance(raw, dict) else vars(raw)) else "stdio"


McpServer = Annotated[
    Annotated[StdioServer, Tag("stdio")] | Annotated[HttpServer, Tag("http")], Discriminator(_kind_of_server)
]


class GatewaySettings(BaseModel):
    """What other programs see of the servers, and how they may call.

    Attributes:
        show, hide: patterns over ``SERVER__TOOL``; what is hidden cannot be called either.
        wait_s: how long a call that waits for a person is held before its caller is told to come again.
        ask_client: up to which severity the caller's own person may answer in the caller's own interface; ``never``
            for none. An agent may be able to answer there by itself.
        at_once: how many calls of one client run beside each other.
        per_minute: how many calls one client may make in a minute.
        idle_s: after how long without a call a server in a machine is ended, and what it changed is asked for.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    show: tuple[str, ...] = ("*",)
    hide: tuple[str, ...] = ()
    wait_s: float = Field(default=45, ge=0, le=3600)
    ask_client: Literal["never", "low", "medium"] = "never"
    at_once: int = Field(default=16, ge=1, le=256)
    per_minute: int = Field(default=6000, ge=1)
    idle_s: float = Field(default=60, gt=0, le=86400)


class Settings(BaseSettings):
    """All that a user can set. Sizes are in the unit that the name says."""

    model_config = SettingsConfigDict(env_prefix="LUMINAGUARD_", extra="forbid", frozen=True)

    accelerator: Literal["auto", "tcg", "kvm"] = "auto"
    backend: Literal["auto", "qemu", "firecracker"] = "auto"
    qemu: str = "qemu-system-x86_64"
    firecracker: str = "firecracker"
    jailer: str = "jailer"
    require_jail: bool = True
    kernel: Literal["distribution", "hardened"] = "distribution"
    memory_mib: int = Field(default=256, ge=128, le=65536)
    timeout_s: float = Field(default=3600, gt=0, le=7 * 86400)
    processes: int = Field(default=256, ge=8, le=32768)
    profile: Literal["strict", "default", "build"] = "default"
    publish: Literal["ask", "never", "always"] = "ask"
    approval_ttl_s: int = Field(default=7 * 86400, ge=60, le=365 * 86400)
    workspace_max_files: int = Field(default=500_000, ge=1)
    workspace_max_mib: int = Field(default=8192, ge=1, le=15 * 1024)
    changeset_max_files: int = Field(default=20_000, ge=1)
    changeset_max_mib: int = Field(default=1024, ge=1)
    capture_max_mib: int = Field(default=16, ge=1, le=1024)
    pool_minimum: int = Field(default=1, ge=0, le=256)
    pool_maximum: int = Field(default=8, ge=0, le=256)
    pool_max_age_s: float = Field(default=600, gt=0)
    pool_memory_mib: int = Field(default=2048, ge=0)
    interface: Literal["full", "plain"] = "full"
    theme: Literal["dark", "light", "contrast", "blue-orange"] = "dark"
    model: str = ""
    parallel_calls: int = Field(default=2, ge=1, le=64)
    database_url: str = Field(default="", repr=False)
    host: str = Field(default="", pattern=r"^([a-z0-9][a-z0-9.-]{0,35})?$")
    slots: int = Field(default=0, ge=0, le=256)
    service_url: str = ""
    service_authority: str = ""
    lease_s: float = Field(default=30, ge=2, le=600)
    mcp_servers: dict[ServerName, McpServer] = Field(default_factory=dict)
    gateway: GatewaySettings = Field(default_factory=GatewaySettings)
    debug: bool = False

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """The environment beats the file, which arrives as the initial values."""
        del settings_cls, dotenv_settings, file_secret_settings
        return env_settings, init_settings


def load_settings(folders: Folders, overrides: dict[str, Any] | None = None) -> Settings:
    """Read the file and the environment; ``overrides`` (flags; None means not given) win.

    Raises:
        SettingsError: a value or the file cannot be used; it says which and why.
    """
    path = folders.config / "luminaguard.toml"
    try:
        settings = Settings(**_read(path))
        chosen = {key: value for key, value in (overrides or {}).items() if value is not None}
        if chosen:
            settings = Settings.model_validate(settings.model_dump() | chosen)
            # Environment values are sources of the model: a flag must still win over them.
            settings = settings.model_copy(update=chosen)
    except ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(str, issue['loc']))}: {issue['msg']}" for issue in error.errors()[:4])
        raise SettingsError(
            f"The settings cannot be used: {problems}.",
            hint=f"Check {path}, the LUMINAGUARD_* variables and the flags.",
        ) from error
    return settings


def _read(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            values = tomllib.loads(file.read(_MAX_FILE).decode())
    except FileNotFoundError:
        if path.is_symlink():  # someone meant it to be there
            raise SettingsError(
                f"{path} is a link to nothing.", hint="Correct the link, or remove it to use the defaults."
            ) from None
        return {}
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise SettingsError(
            f"{path} cannot be read: {error}.",
            hint="Correct the file, or move it away to use the defaults.",
        ) from error
    values.pop("policy", None)  # the rules, which are read with their places when they are needed
    return values

"""One Settings object: defaults, ``luminaguard.toml``, ``LUMINAGUARD_*`` variables, then flags.

The file is read from the user's configuration folder and never from a workspace, where an agent
could have written it. ``LUMINAGUARD_HOME`` moves configuration, state, cache and run-time files
together under one folder.
"""

from __future__ import annotations

import os
import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, field_validator
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from luminaguard.errors import SettingsError

__all__ = ["Folders", "McpServer", "Settings", "load_settings"]

_MAX_FILE = 1 << 20
ServerName = Annotated[str, StringConstraints(pattern=r"^[a-z][a-z0-9_-]{0,31}$")]


class Folders:
    """Where things live. All are created with mode 0700 when first used."""

    def __init__(self, config: Path, state: Path, cache: Path, run: Path) -> None:
        self.config = config
        self.state = state
        self.cache = cache
        self.run = run

    @classmethod
    def from_environment(cls) -> Folders:
        """``LUMINAGUARD_HOME``, or the XDG base directories (specifications.freedesktop.org)."""
        if home := os.environ.get("LUMINAGUARD_HOME"):
            base = Path(home).absolute()
            return cls(base / "config", base / "state", base / "cache", base / "run")

        def xdg(variable: str, default: str) -> Path:
            value = os.environ.get(variable, "")
            # The specification has relative paths ignored.
            return (Path(value) if value.startswith("/") else Path.home() / default) / "luminaguard"

        state = xdg("XDG_STATE_HOME", ".local/state")
        return cls(xdg("XDG_CONFIG_HOME", ".config"), state, xdg("XDG_CACHE_HOME", ".cache"), state / "run")

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


class McpServer(BaseModel):
    """A server of tools that speaks MCP on its standard input and output, in a machine of its own.

    Attributes:
        command: what is run in the machine.
        folder: absolute path of the folder that it gets a copy of; what it changes there is asked for.
        timeout_s: how long a call may take.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    command: tuple[str, ...] = Field(min_length=1, max_length=256)
    folder: Path
    timeout_s: float = Field(default=60, gt=0, le=3600)

    @field_validator("folder")
    @classmethod
    def _absolute(cls, folder: Path) -> Path:
        if not folder.is_absolute():
            raise ValueError("it is no absolute path")
        return folder


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

"""The folders that a server works on."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from luminaguard.runtime.core import Runtime
    from luminaguard.settings import StdioServer

__all__ = ["folder_of", "folders_of"]


def folder_of(runtime: Runtime, name: str, server: StdioServer) -> Path:
    """The folder that a server works on: the one that it was given, or one of its own that begins empty."""
    if server.folder is not None:
        return server.folder
    folder = runtime.folders.data / "mcp" / name
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    return folder


def folders_of(runtime: Runtime, name: str, server: StdioServer) -> tuple[Path, ...]:
    """All folders that a server works on, the one that it begins in first."""
    return (folder_of(runtime, name, server), *server.folders.values())

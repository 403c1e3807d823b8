"""What every group of commands shares: the options of one call, and the runtime that it works with."""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING, Annotated, Any

import typer

from luminaguard import log
from luminaguard.cli import signals

if TYPE_CHECKING:
    from luminaguard.runtime import Runtime

__all__ = ["Call", "Json", "open_runtime"]

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


class Call:
    """The options of this process's one call, for the end of the command line, wherever it comes from."""

    debug = False
    as_json = False
    closing = ExitStack()


def open_runtime(*, as_json: bool = False, **overrides: Any) -> Runtime:
    """The runtime of the user's home; closed when the command line ends. ``overrides`` are flags."""
    Call.as_json = as_json
    with signals.held():  # imports, and libraries that would swallow an exception in the middle
        from luminaguard.runtime import Runtime
        from luminaguard.settings import Folders, load_settings

        folders = Folders.from_environment()
        log.configure(folders.state / "log", debug=Call.debug)
        runtime = Runtime(load_settings(folders, overrides), folders)
        Call.closing.callback(runtime.close)
        return runtime

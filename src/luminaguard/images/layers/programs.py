"""Package managers of this machine, which resolve and download; nothing of what they fetch is run here."""

from __future__ import annotations

import os
import re
import signal
import subprocess
from collections.abc import Sequence
from pathlib import Path

from luminaguard.errors import PackageUnavailable

__all__ = ["FETCH_S", "check_names", "run"]

FETCH_S = 600.0
"""What a package manager gets for one step."""
_MOST_SAID = 200
_FROM_REGISTRIES_ONLY = {
    "npm_config_git": "/bin/false", "npm_config_allow_git": "none", "npm_config_allow_remote": "none",
    "npm_config_allow_file": "none", "npm_config_allow_directory": "none",
}  # fmt: skip
"""A dependency may name a repository or any address, and resolving would ask there, with this user's keys."""


def check_names(pattern: re.Pattern[str], packages: Sequence[str], form: str) -> None:
    """Refuse what is no name of a package, such as an address or an option; raises PackageUnavailable."""
    for package in packages:
        if not pattern.fullmatch(package):
            raise PackageUnavailable(f"{package[:100]!a} is no package of a registry.", hint=f"{form}, no address.")


def run(command: Sequence[str], folder: Path, *, stdin: str = "", missing: str) -> str:
    """Run one in a folder; what it printed.

    Args:
        command: the program and its arguments.
        folder: where.
        stdin: what it reads.
        missing: what to do if there is no such program.

    Raises:
        PackageUnavailable: it failed, or is missing.
    """
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "NODE_"))}
    environment |= _FROM_REGISTRIES_ONLY
    try:
        process = subprocess.Popen(
            command, cwd=folder, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, text=True, errors="replace", start_new_session=True,
        )  # fmt: skip
    except FileNotFoundError as error:
        raise PackageUnavailable(f"'{Path(command[0]).name}' is not installed.", hint=missing) from error
    try:
        with process:
            try:
                out, err = process.communicate(stdin, FETCH_S)
            except BaseException:  # with all that it has started
                os.killpg(process.pid, signal.SIGKILL)
                raise
    except subprocess.TimeoutExpired as error:
        raise PackageUnavailable(
            f"'{Path(command[0]).name}' did not end within {FETCH_S:g} s.", hint="Check the network, and try again."
        ) from error
    if process.returncode:
        said = ascii(" ".join(err.split()))[1:-1]
        if len(said) > 2 * _MOST_SAID:  # npm says first what it is about, uv last
            said = f"{said[:_MOST_SAID]} ... {said[-_MOST_SAID:]}"
        raise PackageUnavailable(
            f"'{Path(command[0]).name}' failed: {said}", hint="Check the package's name and version, and the network."
        )
    return out

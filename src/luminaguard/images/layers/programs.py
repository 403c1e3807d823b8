"""Package managers of this machine, which resolve and download; nothing of what they fetch is run here."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Sequence
from pathlib import Path

from luminaguard.errors import PackageUnavailable

__all__ = ["FETCH_S", "run"]

FETCH_S = 600.0
"""What a package manager gets for one step."""
_MOST_SAID = 300


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
    try:
        done = subprocess.run(
            command, cwd=folder, env=environment, input=stdin, capture_output=True, text=True, check=False,
            timeout=FETCH_S, errors="replace",
        )  # fmt: skip
    except FileNotFoundError as error:
        raise PackageUnavailable(f"'{Path(command[0]).name}' is not installed.", hint=missing) from error
    except subprocess.TimeoutExpired as error:
        raise PackageUnavailable(
            f"'{Path(command[0]).name}' did not end within {FETCH_S:g} s.", hint="Check the network, and try again."
        ) from error
    if done.returncode:
        said = ascii(" ".join(done.stderr.split())[-_MOST_SAID:])[1:-1]
        raise PackageUnavailable(
            f"'{Path(command[0]).name}' failed: {said}", hint="Check the package's name and version, and the network."
        )
    return done.stdout

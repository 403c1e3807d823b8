"""A LuminaGuard home of its own for a test, and the real command line run in it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["CommandResult", "Home"]


@dataclass(frozen=True, slots=True)
class CommandResult:
    """How a command ended and what it printed."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """The object that ``--json`` printed."""
        return json.loads(self.out)


class Home:
    """``LUMINAGUARD_HOME`` in a temporary folder; its cache may be shared with other homes.

    Args:
        folder: the home; made if need be.
        cache: a cache to share.
        keys: the keys of the home that signed what is in the cache; next to the cache by default.
    """

    def __init__(self, folder: Path, cache: Path | None = None, keys: Path | None = None) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        if cache is not None:
            (folder / "cache").symlink_to(cache)
            self._share_key(keys or cache.resolve().parent / "state" / "keys")

    def _share_key(self, keys: Path) -> None:
        """What is in a cache was signed by its first home: others that share it need the key."""
        key = keys / "templates.key"
        if key.exists():
            target = self.folder / "state" / "keys" / key.name
            target.parent.mkdir(parents=True, mode=0o700, exist_ok=True)
            shutil.copyfile(key, target)
            target.chmod(0o600)

    @property
    def environment(self) -> dict[str, str]:
        """The environment in which commands use this home."""
        return os.environ | {"LUMINAGUARD_HOME": str(self.folder), "NO_COLOR": "1", "LUMINAGUARD_INTERFACE": "plain"}

    def argv(self, *arguments: str) -> list[str]:
        """The command line of the real program."""
        return [sys.executable, "-W", "error", "-m", "luminaguard", *arguments]

    def run(self, *arguments: str, stdin: bytes = b"", timeout_s: float = 120, **variables: str) -> CommandResult:
        """Run ``luminaguard`` to its end; raises subprocess.TimeoutExpired."""
        done = subprocess.run(
            self.argv(*arguments),
            env=self.environment | variables,
            input=stdin,
            capture_output=True,
            timeout=timeout_s,
            check=False,
        )
        return CommandResult(done.returncode, done.stdout.decode(), done.stderr.decode())

    def exec(self, workspace: Path, *command: str, flags: tuple[str, ...] = (), **options: Any) -> CommandResult:
        """``luminaguard exec --json`` on a folder."""
        return self.run("exec", "--workspace", str(workspace), "--json", *flags, "--", *command, **options)

    @contextmanager
    def serving(self, *, timeout_s: float = 60, **variables: str) -> Iterator[subprocess.Popen[bytes]]:
        """``luminaguard pool serve``, once a machine waits in it."""
        argv, environment = self.argv("pool", "serve"), self.environment | variables
        with subprocess.Popen(argv, env=environment, stderr=subprocess.PIPE) as process:
            try:
                deadline = time.monotonic() + timeout_s
                while not self.run("pool", "status", "--json").json.get("status", {}).get("ready"):
                    assert time.monotonic() < deadline
                    assert process.poll() is None
                    time.sleep(0.05)
                yield process
            finally:
                process.terminate()
                process.wait(30)

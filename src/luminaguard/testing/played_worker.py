"""``python -m luminaguard.testing.played_worker``: a worker whose machines are played, for tests of queues.

All else is real: its database, its lease, its folders. Machines are what the tests of machines are for.
"""

from __future__ import annotations

import os
import sys
from functools import partial

import anyio

from luminaguard import log
from luminaguard.runtime import Runtime
from luminaguard.runtime.worker import Worker
from luminaguard.settings import Folders, load_settings
from luminaguard.testing.bench import PlayedBench


def main() -> None:
    """Work until killed."""
    folders = Folders.from_environment()
    log.configure(folders.state / "log")
    runtime = Runtime(load_settings(folders), folders)
    takes_s = float(os.environ.get("PLAYED_TAKES_S", "0.05"))
    anyio.run(Worker(runtime, _tell, partial(PlayedBench, takes_s=takes_s)).run)


def _tell(words: str) -> None:
    print(words, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()

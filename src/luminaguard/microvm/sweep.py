"""What :mod:`luminaguard.microvm.reaper` runs when an owner is gone; its arguments are RUN and LOCK."""

from __future__ import annotations

import sys
from pathlib import Path

from luminaguard.microvm.broker import remove_dead_socket
from luminaguard.microvm.tracker import VMTracker

__all__ = ["main"]


def main(run: str, lock: str) -> None:
    """End, remove and note what the owner left in ``run``; it held ``lock``."""
    VMTracker(Path(run)).reap()
    remove_dead_socket(Path(run))
    Path(lock).unlink(missing_ok=True)


if __name__ == "__main__":
    main(*sys.argv[1:])

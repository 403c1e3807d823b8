"""The entry point. ``--version`` answers before anything heavy is imported."""

from __future__ import annotations

import sys

from luminaguard import __version__

__all__ = ["main"]


def main() -> None:
    """Run the command line and exit with its status."""
    if sys.argv[1:] == ["--version"]:
        print(f"luminaguard {__version__}")
        return
    from luminaguard.cli.app import run

    run()


if __name__ == "__main__":
    main()

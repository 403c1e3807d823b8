"""The entry point. ``--version`` answers before anything heavy is imported."""

from __future__ import annotations

import gc
import sys

from luminaguard import __version__

__all__ = ["main"]


def main() -> None:
    """Run the command line and exit with its status."""
    if sys.argv[1:] == ["--version"]:
        print(f"luminaguard {__version__}")
        return
    # Nearly all that is allocated is code and lives to the end. Looking for garbage among it takes a tenth of
    # the time of a short command, half of that on the way out.
    gc.set_threshold(100_000, 50, 50)
    from luminaguard.cli import signals

    signals.install()
    try:
        with signals.held():  # an import is not left in the middle
            from luminaguard.cli.app import run

        run()
    except signals.Interrupted as interrupted:
        signals.tell(interrupted)
        sys.exit(interrupted.exit_code)
    finally:
        signals.over()
        gc.freeze()


if __name__ == "__main__":
    main()

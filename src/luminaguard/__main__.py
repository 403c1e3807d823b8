"""The entry point. ``--version`` answers before anything heavy is imported."""

from __future__ import annotations

import _signal as signal  # type: ignore[import-not-found]  # built in; 'signal' first loads enum, where Ctrl-C would show
import gc
import sys

from luminaguard import __version__

__all__ = ["main"]


def main() -> None:
    """Run the command line and exit with its status."""
    # Until there is somebody who could say more, Ctrl-C ends this process as it ends any other.
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
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

"""Lay the two stand-in programs into a folder, as files that can be run."""

from __future__ import annotations

import os
import sys
from pathlib import Path

__all__ = ["install"]


def install(folder: Path, version: str = "1.16.1", *, filtered: bool = True) -> tuple[Path, Path]:
    """Write ``firecracker`` and ``jailer``.

    Args:
        folder: where to.
        version: which one they claim to be, and whose known faults they have.
        filtered: whether they claim a seccomp filter, as a release has one.

    Returns:
        Their paths.
    """
    source = Path(__file__).resolve().parents[3]
    programs = []
    for name in ("firecracker", "jailer"):
        path = folder / name
        text = (
            f"#!{sys.executable} -B\n"
            f"import sys\nsys.path[:0] = {[str(source), *sys.path[1:]]!r}\n"
            f"from luminaguard.testing.firecracker.{name} import main\n"
            f"main(sys.argv[1:], {version!r}, filtered={filtered!r})\n"
        )
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o755)
        with os.fdopen(fd, "w", encoding="utf-8") as file:
            file.write(text)
        programs.append(path)
    return programs[0], programs[1]

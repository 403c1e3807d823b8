"""The main job on real files: a clean-up runs in a micro-VM, its effects are shown and published.

Makes a fresh folder with a git repository from ``examples/bookkeeping``, runs ``clean-up.sh`` on it
with ``luminaguard exec``, and verifies the ledger. On a terminal it asks; with ``--yes``, or without
a terminal, it answers by a decision that the ledger records as the demo's.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
FOLDER = HERE.parent / "demo" / "bookkeeping"


def say(text: str) -> None:
    """Print a heading."""
    print(f"\033[1m==>\033[0m {text}" if sys.stdout.isatty() else f"==> {text}", flush=True)


def git(*arguments: str) -> None:
    """Run git in the demo's folder, without the user's own configuration."""
    environment = os.environ | {"GIT_CONFIG_GLOBAL": "/dev/null", "GIT_CONFIG_SYSTEM": "/dev/null"}
    identity = (
        "-c",
        "user.name=Demo",
        "-c",
        "user.email=demo@localhost",
        "-c",
        "init.defaultBranch=main",
    )
    subprocess.run(["git", *identity, *arguments], cwd=FOLDER, env=environment, check=True)


def main() -> int:
    """Run the demo; return the exit status of the product."""
    say(f"a fresh book-keeping folder: {FOLDER}")
    shutil.rmtree(FOLDER, ignore_errors=True)
    shutil.copytree(HERE / "bookkeeping", FOLDER)
    git("init", "-q")
    git("add", "-A")
    git("commit", "-qm", "The folder as it was")
    asks = sys.stdin.isatty() and sys.stderr.isatty() and "--yes" not in sys.argv[1:]
    publish = ["ask"] if asks else ["always"]
    program = [sys.executable, "-m", "luminaguard"]
    script = (HERE / "clean-up.sh").read_text(encoding="utf-8")
    say('luminaguard exec --workspace demo/bookkeeping -- bash -c "$(cat examples/clean-up.sh)"')
    if not asks:
        say("no question will be asked: the demo answers yes, and the ledger says that it did")
    command = [
        *program,
        "exec",
        "--workspace",
        str(FOLDER),
        "--publish",
        *publish,
        "--",
        "bash",
        "-c",
        script,
        "clean-up",
    ]
    environment = os.environ | ({} if asks else {"LUMINAGUARD_DECISION_NOTE": "make demo"})
    status = subprocess.run(command, env=environment, check=False).returncode
    say("luminaguard ledger verify")
    verified = subprocess.run([*program, "ledger", "verify"], check=False).returncode
    say(f"the folder now (exit status of the command: {status}):")
    for path in sorted(FOLDER.rglob("*")):
        inside = path.relative_to(FOLDER)
        if ".git" not in inside.parts or "post-commit" in inside.name:
            arrow = f" -> {os.readlink(path)}" if path.is_symlink() else ""
            print(f"    {inside}{arrow}")
    return status or verified


if __name__ == "__main__":
    sys.exit(main())

"""The stand-in for the jailer: a chroot, a uid, limits, and the other stand-in in the same process.

The real one executes the program that it has copied into the chroot. An interpreter could not be
started there, so this one goes on in its own process, with everything imported before.
"""

from __future__ import annotations

import argparse
import os
import re
import resource
import shutil
from pathlib import Path

from luminaguard.testing.firecracker import firecracker

__all__ = ["main"]


def main(arguments: list[str], version: str, *, filtered: bool) -> None:
    """Do what the jailer does, in its order."""
    if arguments == ["--version"]:
        print(f"Jailer v{version}")
        return
    own, after = (arguments[: arguments.index("--")], arguments[arguments.index("--") + 1 :])
    parser = argparse.ArgumentParser(allow_abbrev=False)
    for name in ("id", "exec-file", "uid", "gid", "chroot-base-dir"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--cgroup-version", choices=("1", "2"), default="1")
    parser.add_argument("--resource-limit", action="append", default=[])
    given = parser.parse_args(own)
    if not re.fullmatch(r"[A-Za-z0-9-]{1,64}", given.id):
        raise SystemExit("Invalid instance ID")
    program = os.path.basename(given.exec_file)
    root = Path(given.chroot_base_dir, program, given.id, "root")
    root.mkdir(mode=0o700, parents=True, exist_ok=True)
    shutil.copyfile(given.exec_file, root / program)
    for limit in given.resource_limit:
        name, _, value = limit.partition("=")
        number = {"fsize": resource.RLIMIT_FSIZE, "no-file": resource.RLIMIT_NOFILE}[name]
        resource.setrlimit(number, (int(value), int(value)))
    uid, gid = int(given.uid), int(given.gid)
    for folder in (root, root / "dev", root / "run"):
        folder.mkdir(mode=0o700, exist_ok=True)
        os.chown(folder, uid, gid)
    os.chroot(root)
    os.chdir("/")
    os.setgroups([])
    os.setresgid(gid, gid, gid)
    os.setresuid(uid, uid, uid)
    firecracker.main(["--id", given.id, *after], version, filtered=filtered)

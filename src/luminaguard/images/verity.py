"""dm-verity: the root file system's hash tree, and the words that make the kernel check every block against it.

The tree follows the data in the same file, so a machine has no disk more. Salt is none, so equal images have
equal trees (Documentation/admin-guide/device-mapper/verity.rst, dm-init.rst).
"""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

from luminaguard.errors import ImageBuildFailed, Unavailable

__all__ = ["BLOCK", "DEVICE", "add_tree"]

BLOCK = 4096
_HASH = "blake2b-512"
DEVICE = "dm-mod.create="
"""On the kernel's command line: the root is the device that this makes, and no other."""


def add_tree(root: Path) -> str:
    """Append the tree to a file system; return what the kernel's command line must say.

    A block that differs from its hash is a panic, not an error that somebody could overlook.

    Raises:
        ImageBuildFailed: veritysetup cannot make it.
        Unavailable: veritysetup is not installed.
    """
    with root.open("r+b") as file:
        size = file.seek(0, 2)
        file.truncate(-(-size // BLOCK) * BLOCK)
    blocks = -(-size // BLOCK)
    command = ("veritysetup", "format", "--no-superblock", "--salt", "-", "--hash", _HASH,
               "--data-blocks", str(blocks), "--hash-offset", str(blocks * BLOCK), str(root), str(root))  # fmt: skip
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
    except FileNotFoundError as error:
        raise Unavailable("veritysetup is not installed.", hint="apt-get install cryptsetup-bin") from error
    digest = re.search(r"^Root hash:\s+([0-9a-f]{128})$", done.stdout, re.MULTILINE)
    if done.returncode or digest is None:
        raise ImageBuildFailed(f"veritysetup failed: {done.stderr[-300:]}", hint="Check that the disk is not full.")
    table = f"verity 1 /dev/vda /dev/vda {BLOCK} {BLOCK} {blocks} {blocks} {_HASH} {digest[1]} - 1 panic_on_corruption"
    return f'{DEVICE}"root,,,ro,0 {blocks * BLOCK // 512} {table}"'

"""What a package manager has written into a folder, as a tree for a layer: nothing of it is believed."""

from __future__ import annotations

import os
import posixpath
import stat
from collections.abc import Callable
from pathlib import Path

from luminaguard.errors import ImageBuildFailed
from luminaguard.images.rootfs import Node, Tree

__all__ = ["read_folder"]

_MOST_ENTRIES = 60_000
_MOST_BYTES = 512 << 20


def read_folder(folder: Path, prefix: str, *, drop: Callable[[str], bool] = lambda _: False) -> Tree:
    """Everything below a folder.

    Args:
        folder: what is read; links in it are not followed.
        prefix: where it lies in the layer.
        drop: says of a path below the folder whether it stays away.

    Raises:
        ImageBuildFailed: it has what no layer may have, or too much.
    """
    tree: Tree = {}
    size = 0
    for where, folders, files in os.walk(folder):
        base = os.path.relpath(where, folder)
        for name in sorted([*folders, *files]):
            path = posixpath.normpath(posixpath.join(base, name))
            if drop(path):
                if name in folders:
                    folders.remove(name)
                continue
            info = os.lstat(os.path.join(where, name))
            node = _node(os.path.join(where, name), path, info)
            size += len(node.data)
            if len(tree) >= _MOST_ENTRIES or size > _MOST_BYTES:
                raise _refused(f"more than {_MOST_ENTRIES:,} entries or {_MOST_BYTES >> 20} MiB")
            tree[f"{prefix}/{path}"] = node
    return tree


def _node(source: str, path: str, info: os.stat_result) -> Node:
    if not path.isprintable():
        raise _refused(f"the name {path[:100]!a}")
    if stat.S_ISDIR(info.st_mode):
        return Node("dir", 0o755)
    if stat.S_ISLNK(info.st_mode):
        target = os.readlink(source)
        reached = posixpath.normpath(posixpath.join(posixpath.dirname(path), target))
        if target.startswith("/") or reached.startswith(".."):
            raise _refused(f"the link {path!a} to {target[:100]!a}")
        return Node("link", 0o777, target=target)
    if not stat.S_ISREG(info.st_mode):
        raise _refused(f"{path!a}, which is no file")
    if info.st_size > _MOST_BYTES:
        raise _refused(f"more than {_MOST_BYTES >> 20} MiB")
    with open(source, "rb") as file:
        return Node("file", 0o755 if info.st_mode & 0o100 else 0o644, file.read(_MOST_BYTES))


def _refused(what: str) -> ImageBuildFailed:
    return ImageBuildFailed(f"The package has {what}: it has no place in a layer.", hint="Use another package.")

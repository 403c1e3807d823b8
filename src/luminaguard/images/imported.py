"""Make a container image's tree into a guest's root: the same form as that of our own image.

The supervisor needs a Python, and whatever the container has is not to be trusted to be one. So the interpreter of
our own packages comes along, with its libraries and the loader that finds them, in a folder of its own.
"""

from __future__ import annotations

import posixpath

from luminaguard.errors import ImageBuildFailed
from luminaguard.images import elf
from luminaguard.images.manifest import Image
from luminaguard.images.rootfs import FILES, LIBRARY_FOLDERS, LINKS, SKELETON, Node, Tree

__all__ = ["RUNTIME", "RUNTIME_OPTION", "finish", "interpreter", "python_of"]

RUNTIME = "usr/lib/luminaguard"
RUNTIME_OPTION = "lumina.runtime"
"""On the kernel's command line: the supervisor's Python is the one in :data:`RUNTIME`."""
_LIBRARIES = f"{RUNTIME}/usr/lib/x86_64-linux-gnu"
_LOADER = "ld-linux-x86-64.so.2"
_MOUNTED = ("dev", "proc", "run", "sys", "tmp", "var/tmp", "workspace", "home/user")
_NAMES = ("etc/hostname", "etc/machine-id")
_PRELOAD = "etc/ld.so.preload"
"""Loaded into every program, and so into the supervisor; it is told not to use the loader's cache."""
_SECRETS = ("etc/shadow", "etc/shadow-", "etc/gshadow", "etc/gshadow-", "etc/passwd-", "etc/group-",
            "var/lib/systemd/random-seed", "var/lib/dbus/machine-id")  # fmt: skip
_OWN_FILES = ("etc/passwd", "etc/group", "etc/hosts", "etc/nsswitch.conf", "etc/gitconfig")

_GONE = (*_MOUNTED, RUNTIME, _PRELOAD, *_SECRETS, *_OWN_FILES, *_NAMES)


def interpreter() -> tuple[str, ...]:
    """How the Python of :data:`RUNTIME` is started."""
    return (
        f"/{_LIBRARIES}/{_LOADER}",
        "--inhibit-cache",
        "--library-path",
        f"/{_LIBRARIES}",
        f"/{RUNTIME}/usr/bin/python3",
    )


def python_of(image: Image) -> tuple[str, ...]:
    """How a command starts the Python that LuminaGuard knows in this image."""
    return interpreter() if image.manifest.container else ("python3",)


def finish(tree: Tree, packages: Tree) -> Tree:
    """The root: the container's files without what has no place in a machine, and our interpreter.

    Args:
        tree: the flattened container.
        packages: the tree of our own image.

    Raises:
        ImageBuildFailed: a folder that a machine needs is something else in the container.
    """
    root = {path: node for path, node in tree.items() if not _left_out(path)}
    for path in ("etc", "home", "root", "usr", "usr/lib", "var"):
        if path in root and root[path].kind != "dir":
            raise ImageBuildFailed(
                f"/{path} of the container image is a {root[path].kind}: a machine needs a folder there.",
                hint="Use an image with the usual folders.",
            )
    root |= {path: Node("dir", mode) for path, mode in SKELETON.items() if path != "usr/sbin"}
    root |= {path: Node("file", 0o644, FILES[path].encode()) for path in _OWN_FILES}
    root |= {path: Node("link", 0o777, target=LINKS[path]) for path in _NAMES}
    root |= _runtime(packages)
    for path in list(root):
        parent = posixpath.dirname(path)
        while parent and parent not in root:
            root[parent] = Node("dir", 0o755)
            parent = posixpath.dirname(parent)
    return root


def _left_out(path: str) -> bool:
    gone = any(path == other or path.startswith(f"{other}/") for other in _GONE)
    return gone or path.startswith(("etc/ssh/ssh_host_", "root/.ssh/"))


def _runtime(packages: Tree) -> Tree:
    """The interpreter, its standard library, and every library that one of them needs."""
    python = packages["usr/bin/python3"].target or "python3"
    wanted = {f"usr/bin/{python}"} | {p for p in packages if p.startswith(f"usr/lib/{python}/")}
    libraries = {posixpath.basename(p): p for folder in reversed(LIBRARY_FOLDERS) for p in packages
                 if posixpath.dirname(p) == folder.rstrip("/")}  # fmt: skip
    found: Tree = {}
    todo = [libraries[_LOADER]]
    for path in sorted(wanted):
        found[f"{RUNTIME}/{path}"] = packages[path]
        todo += [libraries[name] for name in _needs(packages[path])]
    found[f"{RUNTIME}/usr/bin/python3"] = Node("link", 0o777, target=python)
    while todo:
        path = todo.pop()
        target = f"{_LIBRARIES}/{posixpath.basename(path)}"
        if target in found:
            continue
        node = packages[path]
        while node.kind == "link":  # of a shared object's name to its version
            node = packages[posixpath.normpath(posixpath.join(posixpath.dirname(path), node.target))]
        found[target] = node
        todo += [libraries[name] for name in _needs(node)]
    return found


def _needs(node: Node) -> list[str]:
    return elf.needed(node.data) if node.data.startswith(elf.MAGIC) else []

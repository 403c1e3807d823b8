"""Put the guest's root file system together from packages, without root and without a chroot.

No maintainer script runs. What the scripts would have done and the guest needs (merged ``/usr``,
accounts, certificates, alternatives, byte code) is done here, in the open. Every file belongs to
uid 0, no file keeps a set-id bit, nothing has a time: the same packages give the same bytes.
"""

from __future__ import annotations

import importlib.util
import io
import marshal
import posixpath
import re
import sys
import tarfile
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Literal

from luminaguard.errors import ImageBuildFailed
from luminaguard.images import deb, elf, spec

__all__ = ["FILES", "LIBRARY_FOLDERS", "LINKS", "SKELETON", "Node", "Stretch", "Tree", "add_parents", "build_tree",
           "compile_sources", "unpack", "write_tar"]  # fmt: skip

_MERGED = ("bin", "sbin", "lib", "lib32", "lib64", "libx32")
SKELETON = {
    "dev": 0o755, "etc": 0o755, "home": 0o755, "home/user": 0o755, "proc": 0o555, "root": 0o700,
    "run": 0o755, "sys": 0o555, "tmp": 0o1777, "usr": 0o755, "usr/sbin": 0o755, "var": 0o755,
    "var/tmp": 0o1777, "workspace": 0o755,
}  # fmt: skip
FILES = {
    "etc/passwd": "root:x:0:0:root:/root:/usr/sbin/nologin\n"
    "user:x:1000:1000:user:/home/user:/bin/bash\n"
    "nobody:x:65534:65534:nobody:/nonexistent:/usr/sbin/nologin\n",
    "etc/group": "root:x:0:\nuser:x:1000:\nnogroup:x:65534:\n",
    "etc/shells": "/bin/sh\n/bin/bash\n",
    "etc/hosts": "127.0.0.1 localhost\n::1 localhost\n",
    "etc/nsswitch.conf": "passwd: files\ngroup: files\nhosts: files\n",
    "etc/gitconfig": "[safe]\n\tdirectory = /workspace\n[user]\n\tname = user\n"
    # Each call is another user: an index that knows owners would be written anew by each git status.
    "\temail = user@micro-vm\n[core]\n\tpager = cat\n\tcheckStat = minimal\n",
}
LINKS = {
    "etc/hostname": "/run/identity/hostname", "etc/machine-id": "/run/identity/machine-id",
    "usr/bin/sh": "dash", "usr/bin/awk": "gawk", "usr/bin/python": "python3",
    "usr/bin/which": "which.debianutils", "etc/localtime": "/usr/share/zoneinfo/Etc/UTC",
    # Where OpenSSL looks: the package that has these links is left out, as it has the command-line tool.
    "usr/lib/ssl/cert.pem": "/etc/ssl/certs/ca-certificates.crt", "usr/lib/ssl/certs": "/etc/ssl/certs",
}  # fmt: skip
LIBRARY_FOLDERS = ("usr/lib/x86_64-linux-gnu/", "usr/lib/", "usr/lib64/")
_NOT_COMPILED = re.compile(r"/(test|tests|idlelib|lib2to3|turtledemo|ensurepip)/")


@dataclass(frozen=True, slots=True)
class Stretch:
    """Bytes that lie in a file: what is too much to be held in memory."""

    file: IO[bytes]
    start: int
    size: int


@dataclass(frozen=True, slots=True)
class Node:
    """One entry: a file with ``data`` or with what ``stretch`` says, a folder, or a symbolic link to ``target``."""

    kind: Literal["file", "dir", "link"]
    mode: int
    data: bytes = b""
    target: str = ""
    stretch: Stretch | None = None


Tree = dict[str, Node]


def build_tree(packages: Iterable[Path], step: Callable[[str], None]) -> Tree:
    """Unpack the packages into one tree and finish it.

    Args:
        packages: .deb files, already verified.
        step: told in a few words what is being done.

    Raises:
        ImageBuildFailed: two packages disagree about a path, or a program lacks a library.
    """
    tree: Tree = {}
    for package in packages:
        step(f"unpacking {package.name.split('_')[0]}")
        _unpack(package, tree)
    for path, mode in SKELETON.items():
        tree[path] = Node("dir", mode)
    for name in _MERGED:
        if any(path.startswith(f"usr/{name}/") for path in tree) or name == "sbin":
            tree[name] = Node("link", 0o777, target=f"usr/{name}")
    for path, text in FILES.items():
        tree[path] = Node("file", 0o644, text.encode())
    for path, target in LINKS.items():
        tree[path] = Node("link", 0o777, target=target)
    _certificates(tree)
    _check_libraries(tree)
    step("compiling the Python standard library")
    python = f"{sys.version_info[0]}.{sys.version_info[1]}"
    compile_sources(tree, f"usr/lib/python{python}/", python)
    add_parents(tree)
    return tree


def unpack(packages: Iterable[Path]) -> Tree:
    """What packages bring along, and nothing else; raises ImageBuildFailed."""
    tree: Tree = {}
    for package in packages:
        _unpack(package, tree)
    return tree


def add_parents(tree: Tree) -> None:
    """Add the folders that entries lie in."""
    for path in list(tree):
        _parents(tree, path)


def write_tar(tree: Tree, out: IO[bytes]) -> None:
    """Write the tree as a canonical tar: sorted, owned by uid 0, time 0."""
    # Not of the pax format: of a long link, or one that is not ASCII, mksquashfs 4.5 drops the first slash there.
    with tarfile.open(fileobj=out, mode="w|", format=tarfile.GNU_FORMAT, encoding="utf-8") as tar:
        for path in sorted(tree):
            node = tree[path]
            info = tarfile.TarInfo(path)
            info.mode, info.mtime = node.mode, 0
            if node.kind == "dir":
                info.type = tarfile.DIRTYPE
            elif node.kind == "link":
                info.type, info.linkname = tarfile.SYMTYPE, node.target
            elif node.stretch is not None:
                info.size = node.stretch.size
                node.stretch.file.seek(node.stretch.start)
                tar.addfile(info, node.stretch.file)
                continue
            else:
                info.size = len(node.data)
            tar.addfile(info, io.BytesIO(node.data))


def _unpack(package: Path, tree: Tree) -> None:
    hardlinks: list[tuple[str, str]] = []
    for member, data in deb.data_members(package):
        path = _merged(posixpath.normpath(member.name).lstrip("/"))
        if path.startswith("..") or "\0" in path:
            raise ImageBuildFailed(
                f"{package.name} contains the path {member.name!r}.",
                hint="This is not a well-formed package; do not trust its source.",
            )
        if path in {".", ""} or _dropped(path, member.isdir()):
            continue
        if member.isdir():
            tree.setdefault(path, Node("dir", member.mode & 0o755 | 0o555))
        elif member.issym():
            tree[path] = Node("link", 0o777, target=member.linkname)
        elif member.isreg():
            tree[path] = Node("file", member.mode & 0o755 | 0o444, data)
        elif member.islnk():
            hardlinks.append((path, _merged(posixpath.normpath(member.linkname).lstrip("/"))))
        # Device nodes, sockets and pipes have no place in an image: the guest makes its own.
    for path, target in hardlinks:
        if target in tree:
            tree[path] = tree[target]


def _merged(path: str) -> str:
    return f"usr/{path}" if path.split("/", 1)[0] in _MERGED and "/" in path else path


def _dropped(path: str, folder: bool) -> bool:
    return (f"{path}/" if folder else path).startswith(spec.DROPPED_PREFIXES)


def _parents(tree: Tree, path: str) -> None:
    parent = posixpath.dirname(path)
    if parent and parent not in tree:
        tree[parent] = Node("dir", 0o755)
        _parents(tree, parent)


def _certificates(tree: Tree) -> None:
    """What update-ca-certificates does: one bundle of all roots."""
    roots = sorted(p for p in tree if p.startswith("usr/share/ca-certificates/") and p.endswith(".crt"))
    bundle = b"".join(tree[path].data.rstrip(b"\n") + b"\n" for path in roots)
    tree["etc/ssl/certs/ca-certificates.crt"] = Node("file", 0o644, bundle)


def _check_libraries(tree: Tree) -> None:
    names = {posixpath.basename(p) for p in tree if p.startswith(LIBRARY_FOLDERS)}
    missing = {
        f"{path} needs {library}"
        for path, node in tree.items()
        if node.data.startswith(elf.MAGIC)
        for library in elf.needed(node.data)
        if library not in names
    }
    if missing:
        raise ImageBuildFailed(
            f"{len(missing)} programs of the image lack a library: {'; '.join(sorted(missing)[:5])}.",
            hint="Drop the program or keep the library in luminaguard/images/spec.py.",
        )


def compile_sources(tree: Tree, prefix: str, python: str) -> None:
    """Byte-compile what lies below ``prefix`` when this interpreter writes what the guest's (``3.11``) reads.

    Under emulation, compiling at each import costs more than running. The hash in the header is
    never checked in the guest (PEP 552), where the files cannot change.
    """
    if python != f"{sys.version_info[0]}.{sys.version_info[1]}":
        return
    sources = [p for p in tree if p.startswith(prefix) and p.endswith(".py")]
    for path in sources:
        if _NOT_COMPILED.search(path):
            continue
        source = tree[path].data
        try:
            with warnings.catch_warnings(action="ignore"):
                code = compile(source, f"/{path}", "exec", dont_inherit=True, optimize=0)
            # Marshal version 2 has no back references, whose layout depends on the process that writes.
            body = marshal.dumps(code, 2)
        except (SyntaxError, ValueError, RecursionError, MemoryError, OverflowError):
            continue  # a template, a test, or of another version: whoever imports it compiles it
        header = importlib.util.MAGIC_NUMBER + (1).to_bytes(4, "little")
        header += importlib.util.source_hash(source)
        folder, name = posixpath.split(path)
        cached = f"{folder}/__pycache__/{name[:-3]}.{sys.implementation.cache_tag}.pyc"
        tree[cached] = Node("file", 0o644, header + body)

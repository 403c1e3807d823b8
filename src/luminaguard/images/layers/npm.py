"""A server from npm: a lock by npm itself, with an integrity for each package, and its files with no script run."""

from __future__ import annotations

import base64
import binascii
import json
import posixpath
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from luminaguard.errors import ImageBuildFailed, PackageUnavailable
from luminaguard.images.layers.folder import read_folder
from luminaguard.images.layers.programs import check_names, run
from luminaguard.images.rootfs import Node, Tree

__all__ = ["NODE_PACKAGES", "Component", "install", "resolve"]

NODE_PACKAGES = ("nodejs",)
"""Of the distribution: what runs it in the machine."""
_PACKAGE = re.compile(
    r"(?P<name>(@[a-z0-9][a-z0-9._-]*/)?[a-z0-9][a-z0-9._-]*)(@(?P<version>[A-Za-z0-9.^~*+-]{1,64}))?"
)
_QUIET = ("--ignore-scripts", "--no-audit", "--no-fund", "--omit=dev", "--os=linux", "--cpu=x64", "--libc=glibc")
_MISSING = "Install it: apt-get install npm"
_PLACE = "usr/lib/luminaguard-servers/node_modules"
_UNUSED = (".map", ".d.ts", ".d.mts", ".d.cts")
_PROGRAM = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


@dataclass(frozen=True, slots=True)
class Component:
    """A package of a layer, for the bill of materials: its hashes by algorithm, in hex."""

    name: str
    version: str
    purl: str
    hashes: tuple[tuple[str, str], ...]


def resolve(package: str, others: tuple[str, ...], work: Path) -> dict[str, Any]:
    """Ask npm for all that a package needs; a lock, without addresses of registries.

    Args:
        package: name, or ``name@version``.
        others: more of them, whose versions are to hold.
        work: an empty folder.

    Raises:
        PackageUnavailable: it is not the name of a package, there is none, or npm cannot be used.
    """
    check_names(_PACKAGE, (package, *others), "NAME or NAME@VERSION")
    (work / "package.json").write_text('{"private": true}\n', encoding="utf-8")
    run(("npm", "install", "--package-lock-only", "--save-exact", "--lockfile-version=3",
         "--omit-lockfile-registry-resolved=true", *_QUIET,
         "--", package, *others), work, missing=_MISSING)  # fmt: skip
    found: dict[str, Any]
    try:
        found = {"manifest": json.loads((work / "package.json").read_text(encoding="utf-8")),
                 "lock": json.loads((work / "package-lock.json").read_text(encoding="utf-8"))}  # fmt: skip
        packages = dict(found["lock"]["packages"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise PackageUnavailable(f"npm wrote no lock that is known ({error!r}).", hint="Use npm 7 or newer.") from error
    found["manifest"]["name"] = found["lock"]["name"] = "layer"  # not that of a temporary folder
    for path, one in packages.items():
        # Of a registry's package it is left out, as was asked: this one is from elsewhere.
        if path and ("integrity" not in one or one.get("link") or "resolved" in one):
            raise PackageUnavailable(
                f"{path.removeprefix('node_modules/')!a} has no hash of a registry: it is from elsewhere.",
                hint="Use a package whose dependencies all are.",
            )
    return found


def install(package: str, lock: dict[str, Any], work: Path) -> tuple[str, Tree, dict[str, str], list[Component]]:
    """Fetch what is locked, compare it with its hashes, and make a tree of it.

    Returns:
        The package's version, the tree, its programs (name to path), and all packages.

    Raises:
        PackageUnavailable: it cannot be had, or is not what was locked.
        ImageBuildFailed: it has no program, or what no layer may have.
    """
    for name, part in (("package.json", lock["manifest"]), ("package-lock.json", lock["lock"])):
        (work / name).write_text(json.dumps(part), encoding="utf-8")
    run(("npm", "ci", *_QUIET), work, missing=_MISSING)
    tree = read_folder(work / "node_modules", _PLACE, drop=_is_unused)
    match = _PACKAGE.fullmatch(package)
    assert match is not None
    about = _about(tree, match["name"])
    programs = _programs(about, match["name"], tree)
    for name, path in programs.items():
        tree[path] = Node("file", 0o755, tree[path].data)
        tree[f"usr/bin/{name}"] = Node("link", 0o777, target=f"/{path}")
    return str(about["version"]), tree, programs, [*map(_component, *zip(*_locked(lock), strict=True))]


def _is_unused(path: str) -> bool:
    name = posixpath.basename(path)
    return path in {".bin", ".package-lock.json"} or name.endswith(_UNUSED) or path.endswith("/node_modules/.bin")


def _about(tree: Tree, package: str) -> dict[str, Any]:
    """What a package says of itself; raises ImageBuildFailed."""
    try:
        about = json.loads(tree[f"{_PLACE}/{package}/package.json"].data)
        if not isinstance(about["version"], str) or not isinstance(about.get("bin", ""), str | dict):
            raise TypeError("fields of the wrong type")
    except (KeyError, ValueError, TypeError, RecursionError) as error:
        raise ImageBuildFailed(
            f"What {package} says of itself cannot be read ({type(error).__name__}).", hint="Use another package."
        ) from error
    return dict(about)


def _programs(about: dict[str, Any], package: str, tree: Tree) -> dict[str, str]:
    said = about.get("bin")
    named = {package.rpartition("/")[2]: said} if isinstance(said, str) else dict(said or {})
    found = {}
    for name, path in named.items():
        where = posixpath.normpath(f"{_PLACE}/{package}/{path}")
        if (
            _PROGRAM.fullmatch(str(name))
            and where.startswith(f"{_PLACE}/{package}/")
            and where in tree
            and tree[where].kind == "file"
        ):
            found[str(name)] = where
    if not found:
        raise ImageBuildFailed(f"{package} has no program to start.", hint="Use a package that is a server.")
    return found


def _locked(lock: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    return [(path, one) for path, one in sorted(lock["lock"]["packages"].items()) if path]


def _component(path: str, one: dict[str, Any]) -> Component:
    name, version = path.rpartition("node_modules/")[2], str(one["version"])
    hashes = []
    for word in str(one["integrity"]).split():
        algorithm, _, value = word.partition("-")
        try:
            hashes.append((algorithm.upper().replace("SHA", "SHA-"), base64.b64decode(value, validate=True).hex()))
        except binascii.Error:
            continue
    return Component(name, version, f"pkg:npm/{name.replace('@', '%40')}@{version}", tuple(hashes))

"""A server from PyPI: a lock by uv, with hashes, and its wheels unpacked: nothing is built, and no code is run here."""

from __future__ import annotations

import configparser
import re
import sys
from pathlib import Path
from typing import Any

from luminaguard.errors import ImageBuildFailed, PackageUnavailable
from luminaguard.images.layers.folder import read_folder
from luminaguard.images.layers.npm import Component
from luminaguard.images.layers.programs import check_names, run
from luminaguard.images.rootfs import Node, Tree, compile_sources

__all__ = ["LIBRARY_PACKAGES", "install", "resolve"]

LIBRARY_PACKAGES = ("libstdc++6",)
"""Of the distribution: what wheels expect of every Linux (PEP 600)."""
_PACKAGE = re.compile(
    r"(?P<name>[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?)(?P<version>[<>=!~][<>=!~A-Za-z0-9.,*+ ]{1,100})?"
)
_PLATFORM = "x86_64-manylinux_2_28"
_PLACE = "usr/lib/luminaguard-servers/python"
_LOCKED = re.compile(r"^(?P<name>[A-Za-z0-9._-]+)==(?P<version>[^\s;\\]+)(?P<rest>(?:.*\\\n)*.*)", re.MULTILINE)
_HASH = re.compile(r"--hash=sha256:([0-9a-f]{64})")
_ENTRY = re.compile(r"(?P<module>\w+(\.\w+)*)\s*:\s*(?P<function>\w+(\.\w+)*)(\s*\[.*\])?")
_PROGRAM = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_LAUNCHER = """#!/usr/bin/python3 -I
import site
import sys

site.addsitedir("/{place}")
from {module} import {root}

sys.exit({function}())
"""
"""Isolated: no file of the folder that it works in, and no variable, is taken for a part of it."""


def resolve(package: str, others: tuple[str, ...], python: str, work: Path) -> dict[str, Any]:
    """Ask uv for all that a package needs; a lock, without addresses of indices.

    Args:
        package: name, or ``name==version``.
        others: more requirements that must hold.
        python: of the machine, such as ``3.11``.
        work: an empty folder.

    Raises:
        PackageUnavailable: it is not the name of a package, there is no wheel for it, or uv cannot be used.
    """
    check_names(_PACKAGE, (package, *others), "NAME or NAME==VERSION")
    text = run(
        (*_uv(), "pip", "compile", "-", *_target(python), "--generate-hashes", "--no-emit-index-url", "--no-header",
         "--no-annotate", "--output-file", "-"),
        work, stdin="".join(f"{one}\n" for one in (package, *others)), missing=_MISSING,
    )  # fmt: skip
    return {"python": python, "requirements": text}


def install(package: str, lock: dict[str, Any], work: Path) -> tuple[str, Tree, dict[str, str], list[Component]]:
    """Fetch what is locked, compare it with its hashes, and make a tree of it, with byte code.

    Returns:
        The package's version, the tree, its programs (name to path), and all packages.

    Raises:
        PackageUnavailable: it cannot be had, or is not what was locked.
        ImageBuildFailed: it has no program, or what no layer may have.
    """
    python, place = str(lock["python"]), work / "site"
    (work / "requirements.txt").write_text(lock["requirements"], encoding="utf-8")
    run((*_uv(), "pip", "install", *_target(python), "--require-hashes", "--no-deps", "--no-compile-bytecode",
         "--link-mode", "copy", "--target", str(place), "-r", "requirements.txt"), work, missing=_MISSING)  # fmt: skip
    tree = read_folder(place, _PLACE, drop=_is_unused)
    match = _PACKAGE.fullmatch(package)
    assert match is not None
    components = [*map(_component, _LOCKED.finditer(lock["requirements"]))]
    version = next(one.version for one in components if _plain(one.name) == _plain(match["name"]))
    programs = {}
    for name, (module, function) in _entries(match["name"], version, tree).items():
        text = _LAUNCHER.format(place=_PLACE, module=module, root=function.split(".")[0], function=function)
        tree[f"usr/bin/{name}"] = Node("file", 0o755, text.encode())
        programs[name] = f"usr/bin/{name}"
    if not programs:
        raise ImageBuildFailed(f"{match['name']} has no program to start.", hint="Use a package that is a server.")
    compile_sources(tree, f"{_PLACE}/", python)
    return version, tree, programs, components


_MISSING = "Install LuminaGuard again: uv comes with it."


def _uv() -> tuple[str, ...]:
    import uv  # noqa: PLC0415  # few commands need it

    try:
        return (uv.find_uv_bin(),)
    except FileNotFoundError as error:
        raise PackageUnavailable("uv is not installed.", hint=_MISSING) from error


def _target(python: str) -> tuple[str, ...]:
    return ("--python", sys.executable, "--python-version", python, "--python-platform", _PLATFORM,
            "--only-binary", ":all:")  # fmt: skip


def _is_unused(path: str) -> bool:
    folder, _, name = path.partition("/")
    about = folder.endswith(".dist-info") and name in {"RECORD", "INSTALLER", "REQUESTED", "uv_cache.json"}
    return folder == "bin" or about or path == ".lock" or path.endswith(("/__pycache__", ".pyi"))


def _plain(name: str) -> str:
    """As names are compared (PEP 503)."""
    return re.sub(r"[-_.]+", "-", name).lower()


def _entries(package: str, version: str, tree: Tree) -> dict[str, tuple[str, str]]:
    """The programs of a package: module and function by name (packaging.python.org, "Entry points specification")."""
    for path, node in tree.items():
        found = re.fullmatch(rf"{_PLACE}/([^/]+)-([^/-]+)\.dist-info/entry_points\.txt", path)
        if found is None or (_plain(found[1]), found[2]) != (_plain(package), version):
            continue
        parser = configparser.ConfigParser(delimiters=("=",), interpolation=None)
        parser.optionxform = str  # type: ignore[assignment,method-assign]  # names are case-sensitive
        try:
            parser.read_string(node.data.decode())
        except (configparser.Error, UnicodeDecodeError) as error:
            raise ImageBuildFailed(f"The programs of {package} cannot be read: {error}", hint="Use another.") from error
        scripts = parser["console_scripts"] if parser.has_section("console_scripts") else {}
        entries = {name: _ENTRY.fullmatch(value) for name, value in scripts.items() if _PROGRAM.fullmatch(name)}
        return {name: (one["module"], one["function"]) for name, one in entries.items() if one is not None}
    return {}


def _component(match: re.Match[str]) -> Component:
    name, version = match["name"], match["version"]
    hashes = tuple(("SHA-256", digest) for digest in _HASH.findall(match["rest"]))
    return Component(name, version, f"pkg:pypi/{_plain(name)}@{version}", hashes)

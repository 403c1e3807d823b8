"""Build a layer: resolve, fetch by the lock, put together, look at it, and let it appear by one rename."""

from __future__ import annotations

import contextlib
import json
import os
import posixpath
import re
import shutil
import struct
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from luminaguard.errors import ImageBuildFailed
from luminaguard.images import elf
from luminaguard.images import lock as locks
from luminaguard.images.audit import audit_layer, listed
from luminaguard.images.build import part_of, squash, write_part
from luminaguard.images.layers import npm, pypi
from luminaguard.images.layers.store import DISK, LOCK, PARTS, SBOM, Layer, LayerManifest, LayerStore, Source
from luminaguard.images.manifest import ROOT, Image
from luminaguard.images.manifest import SBOM as IMAGE_SBOM
from luminaguard.images.rootfs import LIBRARY_FOLDERS, Node, Tree, add_parents, unpack
from luminaguard.images.sbom import bill, deb_components

__all__ = ["build_layer", "rebuild_layer"]

Step = Callable[[str], None]


def build_layer(
    store: LayerStore, image: Image, packages: Path, source: Source, package: str, others: tuple[str, ...], step: Step
) -> Layer:
    """Build a layer with the newest versions that fit, and keep it.

    Args:
        store: where it is kept.
        image: that it will lie on.
        packages: folder of the distribution's packages, which are kept.
        source: where the package is from.
        package: its name, perhaps with a version.
        others: more packages or requirements that must hold.
        step: told in a few words what is being done.

    Raises:
        PackageUnavailable: it cannot be had, or is not what its hash says.
        ImageBuildFailed: it cannot be a layer; nothing was kept.
    """
    if image.manifest.container:
        raise ImageBuildFailed(
            "Machines use the image of a container, whose libraries are not known.",
            hint="Use an image of LuminaGuard's own for servers: 'luminaguard image list' and 'image use'.",
        )
    store.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    with _in_words(package), _work(store.folder) as work:
        step(f"resolving {package}")
        found: dict[str, Any]
        if source == "npm":
            found = npm.resolve(package, others, _inside(work, "resolve"))
        else:
            found = pypi.resolve(package, others, _python_of(image), _inside(work, "resolve"))
        extra = npm.NODE_PACKAGES if source == "npm" else pypi.LIBRARY_PACKAGES
        present = frozenset(c["name"] for c in _bill_of(image) if c["bom-ref"].startswith("root/"))
        debs = locks.resolve_extra(extra, present)
        lock = {"source": source, "package": package, "found": found, "distribution": json.loads(debs.dumps())}
        return _put_together(store, image, packages, lock, work, step)


def rebuild_layer(store: LayerStore, layer: Layer, image: Image, packages: Path, step: Step) -> bool:
    """Build a layer again from its lock, somewhere else; whether it is the same to the last byte.

    Raises:
        PackageUnavailable: what is locked cannot be had any more.
    """
    with _work(store.folder) as work:
        elsewhere = LayerStore(_inside(work, "again"))
        again = _put_together(elsewhere, image, packages, json.loads(layer.read(LOCK)), work, step)
        return again.manifest == layer.manifest


def _put_together(
    store: LayerStore, image: Image, packages: Path, lock: dict[str, Any], work: Path, step: Step
) -> Layer:
    package, debs = lock["package"], locks.PackageLock.loads(json.dumps(lock["distribution"]), LOCK)
    step(f"fetching {package} and what it needs")
    install = npm.install if lock["source"] == "npm" else pypi.install
    version, tree, programs, components = install(package, lock["found"], _inside(work, "install"))
    step(f"fetching {len(debs.packages)} packages of the distribution")
    for path, node in unpack(locks.fetch(debs, packages)).items():
        if path.startswith("usr/"):
            if path.startswith("usr/bin/") and path in tree:
                raise ImageBuildFailed(f"{package} has a program that runs it: {path}.", hint="Use another package.")
            tree.setdefault(path, node)
    _refuse_what_is_there(tree, programs, image)
    add_parents(tree)
    step("writing the layer")
    folder = _inside(work, "layer")
    squash(tree, folder / DISK)
    write_part(folder / LOCK, (json.dumps(lock, sort_keys=True, indent=1) + "\n").encode())
    rows = [
        {"type": "library", "bom-ref": f"{lock['source']}/{one.name}@{one.version}/{number}", "name": one.name,
         "version": one.version, "purl": one.purl,
         "hashes": [{"alg": algorithm, "content": digest} for algorithm, digest in one.hashes]}
        for number, one in enumerate(components)
    ]  # fmt: skip
    identity = json.dumps(lock, sort_keys=True)
    write_part(folder / SBOM, bill(package, version, identity, [*deb_components(debs), *rows]).encode())
    name = re.split(r"(?<=.)@|[<>=!~]", package)[0]
    manifest = LayerManifest(
        lock["source"], name, version, tuple(sorted(programs)), image.manifest.distribution,
        len(components) + len(debs.packages), {name: part_of(folder / name) for name in PARTS},
    )  # fmt: skip
    faults = [f"{check.name}: {', '.join(check.faults[:3])}" for check in audit_layer(folder / DISK)
              if check.verdict == "fail"]  # fmt: skip
    if faults:
        raise ImageBuildFailed(f"{package} cannot be a layer: {'; '.join(faults)}.", hint="Use another package.")
    write_part(folder / "manifest.json", manifest.dumps().encode())
    target = store.folder / manifest.digest
    if not target.exists():
        folder.rename(target)
    return store.load(manifest.digest)


def _refuse_what_is_there(tree: Tree, programs: dict[str, str], image: Image) -> None:
    """A layer adds: what the image has stays what is used, so a program of the same name would never be started."""
    entries = listed(image.folder / ROOT)
    there = {entry.path for entry in entries}
    taken = sorted(name for name in programs if f"usr/bin/{name}" in there)
    if taken:
        raise ImageBuildFailed(f"The image has a program {taken[0]!a} already.", hint="Use another package.")
    for path in there & tree.keys():
        if tree[path].kind != "dir":
            del tree[path]
    names = {posixpath.basename(path) for path in there if path.startswith(LIBRARY_FOLDERS)}
    names |= {posixpath.basename(path) for path in tree}
    missing = sorted({f"{path} needs {library}" for path, node in tree.items() for library in _needs(node)
                      if library not in names})  # fmt: skip
    if missing:
        raise ImageBuildFailed(
            f"{len(missing)} programs lack a library: {'; '.join(missing[:3])}.", hint="Use another package."
        )


def _needs(node: Node) -> list[str]:
    # Of another system's, as some packages have beside each other: nobody loads it.
    is_ours = node.data.startswith(elf.MAGIC) and node.data[18:20] == elf.X86_64
    try:
        return [name for name in elf.needed(node.data) if "musl" not in name] if is_ours else []
    except (struct.error, ValueError, OverflowError, StopIteration, IndexError):
        return []  # it begins as a program does and is none: test data of a package


def _bill_of(image: Image) -> list[dict[str, Any]]:
    with open(image.open_part(IMAGE_SBOM), "rb") as file:
        components: list[dict[str, Any]] = json.load(file)["components"]
    return components


def _python_of(image: Image) -> str:
    found = [c["name"] for c in _bill_of(image) if re.fullmatch(r"python3\.\d+", c["name"])]
    if len(found) != 1:
        raise ImageBuildFailed("The image has no Python that is known.", hint="Run 'luminaguard image build'.")
    return str(found[0]).removeprefix("python")


def _inside(work: Path, name: str) -> Path:
    folder = work / name
    folder.mkdir(mode=0o700)
    return folder


@contextlib.contextmanager
def _in_words(package: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ImageBuildFailed(
            f"The layer of {package} could not be written: {error.strerror or error}.",
            hint="Check that the data folder has 500 MB free.",
        ) from error


@contextlib.contextmanager
def _work(store: Path) -> Iterator[Path]:
    """A folder beside the layers, which is gone afterwards; what a killed build left is removed."""
    for leftover in store.glob(".building-*"):
        pid = leftover.name.split("-")[1]
        if not Path(f"/proc/{pid}").exists():
            shutil.rmtree(leftover, ignore_errors=True)
    work = Path(tempfile.mkdtemp(prefix=f".building-{os.getpid()}-", dir=store))
    try:
        yield work
    finally:
        shutil.rmtree(work, ignore_errors=True)

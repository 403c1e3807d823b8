"""Build, list, find and verify guest images under one folder.

    <cache>/packages/*.deb            downloads, checked against the lock
    <cache>/images/<manifest digest>/ one image
    <cache>/images/current            the name of the image that new machines use
    <cache>/kernels/                  kernels that were built here; see :mod:`luminaguard.images.hardened`

A build works in a temporary folder beside the images and appears by one rename; one that was
interrupted leaves a folder that the next build removes.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Literal

from luminaguard.errors import ImageBuildFailed, ImageMissing, ImageTampered, LockOutdated, PackageUnavailable
from luminaguard.images import initramfs, kernel, rootfs, verity
from luminaguard.images import lock as locks
from luminaguard.images.manifest import (
    INITRAMFS,
    KERNEL,
    PARTS,
    ROOT,
    SBOM,
    Image,
    Manifest,
    Part,
    sha256_fd,
)
from luminaguard.images.sbom import sbom

__all__ = ["ImageStore", "KernelKind", "part_of", "squash", "write_part"]

KernelKind = Literal["distribution", "hardened"]

_MKSQUASHFS = (
    *("mksquashfs", "-", "{out}", "-tar", "-comp", "lz4", "-no-xattrs", "-noappend", "-quiet", "-no-progress"),
    # The tar has no entry for the root itself; left alone it would be writable by all, with today's time.
    # Of a tar, -root-uid and -root-gid are ignored for who is not root: it would be the builder's own.
    *("-mkfs-time", "0", "-all-time", "0", "-root-mode", "755", "-all-root", "-mem", "256M"),
)
_LEFT_S = 3600
_HARDENED_SOURCES = ("hardened.py", "verity.py")
_RECIPE_SOURCES = ("spec.py", "deb.py", "rootfs.py", "kernel.py", "oci.py", "tars.py", "imported.py")


@dataclass(slots=True)
class _Made:
    """What is known of an image's parts once they are made."""

    release: str
    boot_options: str = ""
    container: str = ""
    layers: tuple[str, ...] = ()
    environment: dict[str, str] = field(default_factory=dict)


class ImageStore:
    """The images of one cache folder."""

    def __init__(self, cache: Path) -> None:
        self.folder = cache / "images"
        self.packages = cache / "packages"
        self.kernels = cache / "kernels"

    def current(self) -> Image:
        """The image that new machines use.

        Raises:
            ImageMissing: none was built, or it was built by another version of LuminaGuard.
            ImageTampered: its manifest is damaged.
        """
        try:
            name = (self.folder / "current").read_text(encoding="ascii").strip()
        except (OSError, UnicodeDecodeError):
            raise ImageMissing(
                "No guest image has been built yet.",
                hint="Run 'luminaguard image build' (about a minute).",
            ) from None
        if not _is_digest(name):
            raise ImageTampered(
                f"{self.folder / 'current'} does not name an image.",
                hint="Run 'luminaguard image build'.",
            )
        image = Image.load(self.folder / name)
        if image.manifest.guest != _guest_digest():
            raise ImageMissing(
                "The guest image was built by another version of LuminaGuard.",
                hint="Run 'luminaguard image build'; it takes a few seconds.",
            )
        return image

    def current_name(self) -> str:
        """What :meth:`current` would open; empty if there is none."""
        try:
            return self.current().folder.name
        except (ImageMissing, ImageTampered):
            return ""

    def images(self) -> list[Image]:
        """All images whose manifests are whole, oldest first."""
        found = []
        for entry in sorted(self.folder.glob("*/manifest.json"), key=lambda p: p.stat().st_mtime):
            if _is_digest(entry.parent.name):
                with contextlib.suppress(ImageTampered, ImageMissing):
                    found.append(Image.load(entry.parent))
        return found

    def damaged(self) -> list[str]:
        """Names of folders that should be images, and whose manifests are not to be trusted."""
        found = {entry.name for entry in self.folder.glob("*") if _is_digest(entry.name)}
        return sorted(found - {image.folder.name for image in self.images()})

    def use(self, name: str) -> Image:
        """Make an image that was built before the one that new machines use.

        Args:
            name: its id, or how it begins.

        Raises:
            ImageMissing: there is none of that name, or more than one.
            ImageTampered: a part of it differs from its manifest.
        """
        found = [image for image in self.images() if image.folder.name.startswith(name)]
        if len(found) != 1 or not name:
            raise ImageMissing(
                f"{len(found)} images begin with {name[:64]!a}.", hint="'luminaguard image list' shows them."
            )
        found[0].verify()
        self._make_current(found[0])
        return self.current()

    def build(
        self, step: Callable[[str], None], *, kernel: KernelKind = "distribution", container: Path | None = None,
        locked: bool = False, force: bool = False,
    ) -> Image:  # fmt: skip
        """Build the image for this machine's distribution and make it current.

        Args:
            step: told in a few words what is being done.
            kernel: the distribution's signed one, or one that is built here from its sources.
            container: an OCI layout, or what ``docker save`` wrote, whose files become the root file system.
            locked: refuse to use anything but the lock that LuminaGuard ships.
            force: build even if the current image has the same recipe.

        Raises:
            ImageBuildFailed: it could not be built (a full disk included); no image is changed.
            PackageUnavailable: packages cannot be had.
        """
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        with self._only_builder(step):
            self._remove_half_built()
            try:
                return self._build(step, kernel, container, locked, force)
            except OSError as error:
                what = "the disk is full" if error.errno == errno.ENOSPC else str(error)
                raise ImageBuildFailed(
                    f"The guest image could not be built: {what}.",
                    hint="Free about 1 GB in the cache folder and run 'luminaguard image build' again.",
                    kept="Finished downloads and earlier images were kept.",
                ) from error

    def rebuild(self, image: Image, step: Callable[[str], None]) -> list[str]:
        """Build an image again from its packages, somewhere else; the names of parts that come out different.

        Raises:
            ImageBuildFailed: it cannot be built again by this version, or from the packages at hand.
        """
        if image.manifest.container:
            raise ImageBuildFailed(
                "The image was made of a container image, which is not kept.",
                hint="Run 'luminaguard image build --from-oci' with it again and compare the two ids.",
            )
        kernel: KernelKind = "hardened" if image.manifest.kernel == "hardened" else "distribution"
        lock, _ = self._choose_lock(step, kernel, locked=False)
        if (image.manifest.lock, image.manifest.recipe) != (lock.digest, _recipe_digest(kernel)):
            raise ImageBuildFailed(
                "The image was built from other packages, or by another version, than there are now.",
                hint="Run 'luminaguard image build' and audit that one.",
            )
        work = self.folder / f".building-{os.getpid()}"
        with self._only_builder(step):
            work.mkdir(mode=0o700)
            try:
                self._make_parts(work, lock, kernel, None, None, step)
                return [name for name in PARTS if part_of(work / name) != image.manifest.parts[name]]
            finally:
                shutil.rmtree(work, ignore_errors=True)

    def _build(
        self, step: Callable[[str], None], kernel: KernelKind, container: Path | None, locked: bool, force: bool
    ) -> Image:
        lock, is_shipped = self._choose_lock(step, kernel, locked)
        recipe, guest = _recipe_digest(kernel), _guest_digest()
        same_root = [
            image
            for image in reversed(self.images())
            if (image.manifest.lock, image.manifest.recipe, image.manifest.container) == (lock.digest, recipe, "")
        ]
        if container is not None:
            same_root = []  # what is in it is known only once it was read
        if not force:
            for image in same_root:
                if image.manifest.guest == guest and _is_whole(image):
                    self._make_current(image)
                    return image
        work = self.folder / f".building-{os.getpid()}"
        work.mkdir(mode=0o700)
        try:
            reusable = next((i for i in same_root if not force and _is_whole(i)), None)
            found = self._make_parts(work, lock, kernel, container, reusable, step)
            manifest = Manifest(
                lock.distribution, found.release, lock.digest, is_shipped, recipe, guest,
                {name: part_of(work / name) for name in PARTS}, kernel, found.container, found.environment,
                found.boot_options,
            )  # fmt: skip
            write_part(work / "manifest.json", manifest.dumps().encode())
            target = self.folder / manifest.digest
            if target.exists():
                shutil.rmtree(target)
            work.rename(target)
        finally:
            shutil.rmtree(work, ignore_errors=True)
        image = Image.load(target)
        self._make_current(image)
        return image

    def _choose_lock(
        self, step: Callable[[str], None], kernel: KernelKind, locked: bool
    ) -> tuple[locks.PackageLock, bool]:
        lock, is_shipped = self._choose_packages(step, locked)
        if kernel == "distribution":
            return lock, is_shipped
        if locked:
            raise PackageUnavailable(
                "LuminaGuard ships no lock for the sources of a kernel.", hint="Build that image without --locked."
            )
        sources = locks.resolve_sources()
        lock = lock.with_kernel(sources)
        step(f"fetching {sources.name} {sources.version}")
        locks.fetch(lock, self.packages)
        return lock, False

    def _choose_packages(self, step: Callable[[str], None], locked: bool) -> tuple[locks.PackageLock, bool]:
        shipped = locks.shipped()
        if shipped is not None:
            step(f"fetching {len(shipped.packages)} locked packages")
            try:
                locks.fetch(shipped, self.packages)
            except LockOutdated:
                if locked:
                    raise
                step("the sources have newer packages than the lock: resolving them anew")
            else:
                return shipped, True
        elif locked:
            raise PackageUnavailable(
                f"LuminaGuard ships no package lock for {'-'.join(locks.distribution())}.",
                hint="Build without --locked: apt then resolves the packages from its signed sources.",
            )
        lock = locks.resolve()
        step(f"fetching {len(lock.packages)} packages")
        locks.fetch(lock, self.packages)
        return lock, False

    def _make_parts(
        self,
        work: Path,
        lock: locks.PackageLock,
        kind: KernelKind,
        container: Path | None,
        reusable: Image | None,
        step: Callable[[str], None],
    ) -> _Made:
        """Write all parts."""
        files = {package: self.packages / package.filename for package in lock.packages}
        busybox = _busybox(files[lock.role("initramfs")[0]])
        if kind == "hardened":
            from luminaguard.images import hardened  # noqa: PLC0415  # few builds need it

            found = hardened.build_kernel(files[lock.role("kernel")[0]], self.kernels, step)
        else:
            step("unpacking the kernel")
            found = kernel.extract(files[p] for p in lock.role("kernel"))
        write_part(work / INITRAMFS, initramfs.build(busybox, found.modules, found.init))
        made = _Made(found.release)
        if reusable is not None:
            for name in (KERNEL, ROOT):
                write_part(work / name, b"")  # for its mode
                shutil.copyfile(reusable.folder / name, work / name)
            made.boot_options = reusable.manifest.boot_options
        else:
            write_part(work / KERNEL, found.elf)
            tree = rootfs.build_tree((files[p] for p in lock.role("root")), step)
            if container is None:
                step("writing the root file system")
                squash(tree, work / ROOT)
            else:
                self._import(container, tree, work, made, step)
            if kind == "hardened":
                made.boot_options = f"{made.boot_options} {verity.add_tree(work / ROOT)}".strip()
        write_part(work / SBOM, sbom(lock, made.container, made.layers).encode())
        return made

    def _import(self, container: Path, packages: rootfs.Tree, work: Path, made: _Made,
                step: Callable[[str], None]) -> None:  # fmt: skip
        from luminaguard.images import imported, oci  # noqa: PLC0415  # few builds need it

        with tempfile.TemporaryFile(dir=work) as spool:
            image = oci.read_image(container, spool, step)
            root = imported.finish(image.tree, packages)
            step("writing the root file system")
            squash(root, work / ROOT)
        made.container, made.layers, made.environment = image.digest, image.layers, image.environment
        made.boot_options = imported.RUNTIME_OPTION

    def _make_current(self, image: Image) -> None:
        temporary = self.folder / f".current-{os.getpid()}"
        write_part(temporary, f"{image.folder.name}\n".encode())
        temporary.replace(self.folder / "current")

    def _remove_half_built(self) -> None:
        for leftover in self.folder.glob(".building-*"):
            shutil.rmtree(leftover, ignore_errors=True)
        for leftover in self.folder.glob(".audit-*"):  # of an audit that was killed; one that runs takes seconds
            with contextlib.suppress(FileNotFoundError):
                if time.time() - leftover.stat().st_mtime > _LEFT_S:
                    shutil.rmtree(leftover, ignore_errors=True)

    @contextlib.contextmanager
    def _only_builder(self, step: Callable[[str], None]) -> Iterator[None]:
        fd = os.open(self.folder / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                step("waiting for another build to end")
                fcntl.flock(fd, fcntl.LOCK_EX)
            yield
        finally:
            os.close(fd)


def squash(tree: rootfs.Tree, target: Path) -> None:
    """Write a tree as a squashfs; raises ImageBuildFailed, and OSError if the disk is full."""
    command = [word.replace("{out}", str(target)) for word in _MKSQUASHFS]
    write_part(target, b"")  # for its mode, which mksquashfs keeps
    try:
        # Into a file: a full pipe would let both wait for each other.
        words = tempfile.TemporaryFile()  # noqa: SIM115  # closed below
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=words)
    except FileNotFoundError as error:
        raise ImageBuildFailed(
            "mksquashfs is not installed.", hint="Install it: apt-get install squashfs-tools"
        ) from error
    with words, process:
        assert process.stdin is not None
        with contextlib.suppress(BrokenPipeError), process.stdin:
            rootfs.write_tar(tree, process.stdin)
        process.wait()
        said = os.pread(words.fileno(), 1 << 16, 0).decode("utf-8", "replace").strip()
    if process.returncode:
        if "No space left" in said:
            raise OSError(errno.ENOSPC, "mksquashfs wrote until the disk was full")
        raise ImageBuildFailed(f"mksquashfs failed: {said[-300:]}", hint="Check that the cache folder has 500 MB free.")


def _busybox(package: Path) -> bytes:
    from luminaguard.images import deb  # noqa: PLC0415  # only a build reads packages

    for member, data in deb.data_members(package):
        if member.isreg() and member.name.endswith("/bin/busybox"):
            return data
    raise ImageBuildFailed(f"{package.name} contains no busybox.", hint="Write a new lock.")


def _recipe_digest(kernel: KernelKind) -> str:
    folder = resources.files("luminaguard.images")
    # The byte code in the image is this interpreter's: another patch release may compile differently.
    digest = hashlib.sha256("\0".join((sys.version.split()[0], *_MKSQUASHFS)).encode())
    for name in _RECIPE_SOURCES:
        digest.update((folder / name).read_bytes())
    if kernel == "hardened":
        from luminaguard.images import hardened  # noqa: PLC0415  # few builds need it

        for name in _HARDENED_SOURCES:
            digest.update((folder / name).read_bytes())
        digest.update(hardened.configuration() + hardened.compiler().encode())
    return digest.hexdigest()


def _guest_digest() -> str:
    digest = hashlib.sha256()
    for name in ("initramfs.py", "cpio.py", "imported.py", "verity.py"):
        digest.update((resources.files("luminaguard.images") / name).read_bytes())
    for entry in sorted(resources.files("luminaguard.guest").iterdir(), key=lambda e: e.name):
        if entry.name.endswith(".py"):
            digest.update(entry.name.encode() + b"\0" + entry.read_bytes())
    return digest.hexdigest()


def _is_whole(image: Image) -> bool:
    try:
        image.verify()
    except ImageTampered:
        return False
    return True


def part_of(path: Path) -> Part:
    """Size and SHA-256 of a file."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return Part(os.fstat(fd).st_size, sha256_fd(fd))
    finally:
        os.close(fd)


def write_part(path: Path, data: bytes) -> None:
    """Write a file that only its owner can read, and make it last."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    with os.fdopen(fd, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _is_digest(name: str) -> bool:
    return len(name) == 64 and all(c in "0123456789abcdef" for c in name)

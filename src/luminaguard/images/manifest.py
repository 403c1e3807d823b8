"""The manifest of a guest image: which parts it has, what they hash to, and what they came from.

An image is a folder named after the SHA-256 of its manifest, so a changed manifest is as visible
as a changed part. Every use verifies the parts that it uses.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeVar

from luminaguard.errors import ImageMissing, ImageTampered

__all__ = [
    "INITRAMFS",
    "KERNEL",
    "ROOT",
    "Image",
    "Manifest",
    "Part",
    "check_owner",
    "open_sealed",
    "open_verified",
    "read_manifest",
    "seal",
    "sha256_fd",
]

KERNEL, INITRAMFS, ROOT, SBOM = "vmlinux", "initramfs.cpio", "root.squashfs", "sbom.cdx.json"
PARTS = (KERNEL, INITRAMFS, ROOT, SBOM)
_FORMAT = 2
_MAX_MANIFEST = 1 << 20
_CHUNK = 1 << 20
_REBUILD = "run 'luminaguard image build'"
_SEAL_S = 5.0
_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SEAL


@dataclass(frozen=True, slots=True)
class Part:
    """Size in bytes and SHA-256 of one file of an image."""

    size: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Manifest:
    """What an image is made of.

    Attributes:
        lock: digest of the package lock that it was built from.
        locked: whether that is the lock that came with LuminaGuard (else: resolved on this machine).
        recipe: digest of the code, lists and interpreter version that put the root file system together.
        guest: digest of the guest supervisor's sources.
        kernel: ``distribution``, or ``hardened`` for one that was built here.
        container: digest of the container image that the root file system is of; empty for our own.
        environment: what that image sets for its programs.
        boot_options: what the kernel's command line must say for this image alone (see the modules ``verity``
            and ``imported``).
    """

    distribution: str
    kernel_release: str
    lock: str
    locked: bool
    recipe: str
    guest: str
    parts: dict[str, Part]
    kernel: str = "distribution"
    container: str = ""
    environment: dict[str, str] = field(default_factory=dict)
    boot_options: str = ""

    def dumps(self) -> str:
        """Canonical JSON; its SHA-256 names the image."""
        return json.dumps({"format": _FORMAT, **asdict(self)}, sort_keys=True, indent=1) + "\n"

    @property
    def digest(self) -> str:
        """SHA-256 of :meth:`dumps`, in hex."""
        return hashlib.sha256(self.dumps().encode()).hexdigest()

    @classmethod
    def loads(cls, text: str) -> Manifest:
        """Parse a manifest; raises ValueError, KeyError or TypeError when it is none.

        Raises:
            ImageMissing: it is one of another version of LuminaGuard.
        """
        raw: dict[str, Any] = json.loads(text)
        if (found := int(raw.pop("format"))) != _FORMAT:
            raise ImageMissing(
                f"The guest image was built by another version of LuminaGuard (format {found}).",
                hint="Run 'luminaguard image build'; it takes a few seconds.",
            )
        raw["parts"] = {str(k): Part(int(v["size"]), str(v["sha256"])) for k, v in raw["parts"].items()}
        if set(raw["parts"]) != set(PARTS):
            raise ValueError("it does not name the parts of an image")
        return cls(**raw)


@dataclass(frozen=True, slots=True)
class Image:
    """An image on disk whose manifest matches its name. Its parts are verified when opened."""

    folder: Path
    manifest: Manifest

    @property
    def id(self) -> str:
        """The short name that people see."""
        return self.folder.name[:12]

    @classmethod
    def load(cls, folder: Path) -> Image:
        """Read and check the manifest of an image.

        Raises:
            ImageTampered: the manifest is missing, malformed, or not the one the folder is named for; or
                others than this user can write to the folder.
            ImageMissing: it was built by another version.
        """
        return cls(folder, read_manifest(folder, Manifest.loads))

    def open_part(self, name: str) -> int:
        """A sealed copy of a part in memory, verified and open for reading only; the caller owns it.

        Raises:
            ImageTampered: it is missing, truncated, or differs.
        """
        return open_sealed(self.folder / name, self.manifest.parts[name], self.folder)

    def verify(self) -> None:
        """Verify every part; raises :class:`ImageTampered`."""
        for name in PARTS:
            os.close(open_verified(self.folder / name, self.manifest.parts[name], self.folder))


class _Named(Protocol):
    """What a folder is named after."""

    @property
    def digest(self) -> str: ...


N = TypeVar("N", bound=_Named)


def read_manifest(folder: Path, loads: Callable[[str], N], remedy: str = _REBUILD) -> N:
    """The manifest that a folder was named after.

    Args:
        folder: whose; nobody else can write to it.
        loads: parses one; raises ValueError, KeyError, TypeError or AttributeError for what is none.
        remedy: what to do with a folder that is not to be trusted.

    Raises:
        ImageTampered: it is missing, malformed, or another one; or others can write to the folder.
    """
    check_owner(folder)
    try:
        with (folder / "manifest.json").open(encoding="utf-8") as file:
            manifest = loads(file.read(_MAX_MANIFEST))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise _tampered(folder, f"its manifest cannot be read ({error})", remedy) from error
    if manifest.digest != folder.name:
        raise _tampered(folder, "its manifest is not the one that it was named after", remedy)
    return manifest


def check_owner(folder: Path) -> None:
    """Whether only this user, or root, can write to a folder and to the one that it is in.

    Raises:
        ImageTampered: others can.
    """
    for path in (folder, folder.parent):
        try:
            fd = os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)  # of a link, where it leads
        except OSError as error:
            raise _tampered(folder, f"{path} cannot be opened ({error.strerror})") from error
        try:
            info = os.fstat(fd)
        finally:
            os.close(fd)
        if info.st_uid not in {os.geteuid(), 0}:
            raise _tampered(folder, f"{path} belongs to another user (uid {info.st_uid})")
        if info.st_mode & 0o022:
            raise _tampered(folder, f"others can write to {path} (mode {info.st_mode & 0o7777:04o})")


def open_verified(path: Path, part: Part, owner: Path) -> int:
    """Open a file and compare size and SHA-256; return the descriptor, at offset 0.

    The descriptor that was hashed is the one that is used, so a swap of the path changes nothing.

    Raises:
        ImageTampered: the file is missing, or differs.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError as error:
        raise _tampered(owner, f"{path.name} cannot be opened ({error.strerror})") from error
    try:
        size = os.fstat(fd).st_size
        if size != part.size:
            raise _tampered(owner, f"{path.name} has {size} bytes instead of {part.size}")
        if sha256_fd(fd) != part.sha256:
            raise _tampered(owner, f"{path.name} does not have the recorded SHA-256")
    except BaseException:  # whatever ends this, the descriptor must not leak
        os.close(fd)
        raise
    return fd


def open_sealed(path: Path, part: Part, owner: Path, remedy: str = _REBUILD) -> int:
    """Like :func:`open_verified`, but of a sealed copy in memory.

    A process that is given a descriptor of a file can open it again through ``/proc/self/fd``, for
    writing too where the file's owner is its own; nobody can write to this one.

    Raises:
        ImageTampered: the file is missing, or differs.
    """
    source = -1
    memory = os.memfd_create(path.name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        source = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        if os.fstat(source).st_size != part.size:
            size = os.fstat(source).st_size
            raise _tampered(owner, f"{path.name} has {size} bytes instead of {part.size}", remedy)
        digest, offset, buffer = hashlib.sha256(), 0, memoryview(bytearray(_CHUNK))
        while count := os.preadv(source, [buffer], offset):
            digest.update(buffer[:count])
            os.pwrite(memory, buffer[:count], offset)
            offset += count
        if digest.hexdigest() != part.sha256:
            raise _tampered(owner, f"{path.name} does not have the recorded SHA-256", remedy)
        seal(memory)
        return os.open(f"/proc/self/fd/{memory}", os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise _tampered(owner, f"{path.name} cannot be read ({error.strerror})", remedy) from error
    finally:
        os.close(memory)
        if source >= 0:
            os.close(source)


def seal(memory: int) -> None:
    """Let nobody change a memfd any more, not even who made it; raises OSError.

    The kernel refuses for as long as something still holds a page of it, which whoever has just written
    them cannot know: under load that happens.
    """
    deadline = time.monotonic() + _SEAL_S
    while True:
        try:
            fcntl.fcntl(memory, fcntl.F_ADD_SEALS, _SEALS)
            return
        except OSError as error:
            if error.errno != errno.EBUSY or time.monotonic() > deadline:
                raise
        time.sleep(0.01)


def sha256_fd(fd: int) -> str:
    """SHA-256 of a file from its first byte; leaves the offset at 0."""
    digest = hashlib.sha256()
    buffer = bytearray(_CHUNK)
    view = memoryview(buffer)
    offset = 0
    while count := os.preadv(fd, [buffer], offset):
        digest.update(view[:count])
        offset += count
    return digest.hexdigest()


def _tampered(folder: Path, why: str, remedy: str = _REBUILD) -> ImageTampered:
    return ImageTampered(
        f"{folder} is not to be trusted: {why}.",
        hint=f"Delete that folder and {remedy}.",
        kept="Nothing was started from it.",
    )

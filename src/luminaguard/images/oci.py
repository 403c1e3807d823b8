"""Read a container image and flatten its layers into one tree: what is in it is hostile until proven otherwise.

Takes an OCI layout (folder or tar; opencontainers/image-spec, image-layout.md and layer.md) or what ``docker
save`` writes. Every digest is verified: of the manifest, of the configuration, of each layer as it is stored, and
of each layer unpacked. Nothing of it is ever unpacked onto the host's file system: contents go one after the other
into one file without a name, and the tree says where they lie.
"""

from __future__ import annotations

import errno
import gzip
import hashlib
import io
import json
import os
import posixpath
import re
import stat
import tarfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Protocol, cast

import zstandard

from luminaguard.errors import ImageBuildFailed
from luminaguard.images.rootfs import Node, Stretch, Tree
from luminaguard.images.tars import BoundedTarInfo, members

__all__ = ["Limits", "OciImage", "read_image"]

_DIGEST = re.compile(r"sha256:([0-9a-f]{64})")
_MAX_JSON = 4 << 20
_MAX_TEXT = 256 << 20  # bytes of all paths and targets
_MAX_LINKS = 40
_MAX_STEPS = 512  # components of a path, and of all links on its way
_MAX_STEPS_IN_ALL = 10_000_000
_MAX_ENVIRONMENT = 16 << 10
_OURS = frozenset({"HOME", "USER", "LOGNAME", "TMPDIR"})  # of the user that a machine has
_CHUNK = 1 << 20
_WHITEOUT, _OPAQUE = ".wh.", ".wh..wh..opq"
_INDEX_TYPES = ("application/vnd.oci.image.index.v1+json", "application/vnd.docker.distribution.manifest.list.v2+json")


@dataclass(frozen=True, slots=True)
class Limits:
    """How large an image may be: bytes as stored and unpacked, entries, layers, length and depth of a path."""

    stored: int = 4 << 30
    unpacked: int = 4 << 30
    entries: int = 300_000
    layers: int = 256
    path: int = 2048
    depth: int = 128


@dataclass(slots=True)
class OciImage:
    """A flattened image.

    Attributes:
        digest: ``sha256:...`` of its manifest (of its configuration, where docker wrote it): its identity.
        layers: digests of the layers unpacked, from the lowest.
        environment: what its configuration sets, by name.
        tree: all that is left of the layers; contents are read from the spool when asked for.
    """

    digest: str
    layers: tuple[str, ...]
    environment: dict[str, str]
    tree: Tree = field(default_factory=dict)


class _Store(Protocol):
    """Where the image's files are: a folder, or a tar."""

    def open(self, name: str) -> IO[bytes]:
        """A regular file by its path; raises KeyError when there is none."""
        ...


def read_image(source: Path, spool: IO[bytes], step: Callable[[str], None], limits: Limits = Limits()) -> OciImage:
    """Verify and flatten the image for this machine's processor.

    Args:
        source: an OCI layout's folder, or a tar of one, or what ``docker save`` wrote.
        spool: takes the contents of files.
        step: told in a few words what is being done.
        limits: how large it may be.

    Raises:
        ImageBuildFailed: it is none, is damaged or too large, or has entries that lead outside of it.
    """
    try:
        with _opened(source, limits) as store:
            found = _described(store, limits)
            flattened = _Flattener(spool, limits)
            for number, layer in enumerate(found.layers, 1):
                step(f"unpacking layer {number} of {len(found.layers)}")
                with store.open(layer.name) as stored:
                    flattened.add(stored, layer)
            flattened.check_size()
            return OciImage(found.digest, tuple(layer.unpacked for layer in found.layers), found.environment,
                            flattened.tree)  # fmt: skip
    except OSError as error:
        if error.errno in {errno.ENOSPC, errno.EDQUOT}:
            raise  # of the spool: no fault of the image
        raise _refused(f"it cannot be read: {error}") from error
    except (EOFError, tarfile.TarError, zlib.error, zstandard.ZstdError, MemoryError) as error:
        raise _refused(f"it cannot be read: {error}") from error
    except (LookupError, ValueError, TypeError, AttributeError, RecursionError, OverflowError) as error:
        raise _refused(f"it is not a whole image ({type(error).__name__}: {error})") from error


# -- the image's own files ------------------------------------------------------------------------


class _Folder:
    def __init__(self, path: Path) -> None:
        self._path = path

    def open(self, name: str) -> IO[bytes]:
        """Component by component, so that no link leads anywhere else."""
        if {"", ".", ".."} & set(name.split("/")):
            raise KeyError(name)
        fd = os.open(self._path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            *folders, last = name.split("/")
            for folder in folders:
                deeper = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=fd)
                os.close(fd)
                fd = deeper
            # Not blocking: a pipe in its place would be waited for without end.
            opened = os.open(last, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=fd)
            if not stat.S_ISREG(os.fstat(opened).st_mode):
                os.close(opened)
                raise KeyError(name)
            return os.fdopen(opened, "rb")
        except FileNotFoundError:
            raise KeyError(name) from None
        finally:
            os.close(fd)


class _Archive:
    def __init__(self, tar: tarfile.TarFile, limits: Limits) -> None:
        self._tar = tar
        self._files: dict[str, tarfile.TarInfo] = {}
        self._links: dict[str, str] = {}
        for count, member in enumerate(members(tar, limits.stored)):
            if count > limits.entries:
                raise ValueError("it has too many files")
            name = posixpath.normpath(member.name).lstrip("/")
            if member.isreg():
                self._files[name] = member
            elif member.issym():  # as docker writes a layer that it has written before
                self._links[name] = posixpath.normpath(posixpath.join(posixpath.dirname(name), member.linkname))

    def open(self, name: str) -> IO[bytes]:
        file = self._tar.extractfile(self._files[self._links.get(name, name)])
        if file is None:
            raise KeyError(name)
        return file


@contextmanager
def _opened(source: Path, limits: Limits) -> Iterator[_Store]:
    if source.is_dir():
        yield _Folder(source)
        return
    fd = os.open(source, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # a pipe would be waited for
    with os.fdopen(fd, "rb") as file:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise ValueError("it is neither a folder nor a file")
        with tarfile.open(fileobj=file, mode="r:", tarinfo=BoundedTarInfo) as tar:
            yield _Archive(tar, limits)


@dataclass(frozen=True, slots=True)
class _Layer:
    """Where a layer is, its digest as stored (empty where docker wrote it), and unpacked."""

    name: str
    stored: str
    unpacked: str


@dataclass(frozen=True, slots=True)
class _Described:
    digest: str
    layers: tuple[_Layer, ...]
    environment: dict[str, str]


def _described(store: _Store, limits: Limits) -> _Described:
    try:
        with store.open("index.json") as file:
            index = _json(file)
    except KeyError:
        return _described_by_docker(store, limits)
    digest = _for_this_machine(index)
    manifest = _verified_json(store, digest)
    if manifest.get("mediaType") in _INDEX_TYPES or "manifests" in manifest:
        digest = _for_this_machine(manifest)
        manifest = _verified_json(store, digest)
    config = _verified_json(store, manifest["config"]["digest"])
    stored = [str(layer["digest"]) for layer in manifest["layers"]]
    return _put_together(digest, [(_blob(d), d) for d in stored], config, limits)


def _described_by_docker(store: _Store, limits: Limits) -> _Described:
    with store.open("manifest.json") as file:
        entries = _json(file)
    if len(entries) != 1:
        raise ValueError(f"it holds {len(entries)} images; save one")
    name = str(entries[0]["Config"])
    with store.open(name) as file:
        data = file.read(_MAX_JSON)
    digest = hashlib.sha256(data).hexdigest()
    if digest not in name:
        raise ValueError("its configuration does not have the digest that it is named for")
    return _put_together(f"sha256:{digest}", [(str(n), "") for n in entries[0]["Layers"]], json.loads(data), limits)


def _put_together(digest: str, stored: list[tuple[str, str]], config: Any, limits: Limits) -> _Described:
    if (config["os"], config["architecture"]) != ("linux", "amd64"):
        raise ValueError(f"it is for {config['os']!a:.80} on {config['architecture']!a:.80}")
    unpacked = [str(d) for d in config["rootfs"]["diff_ids"]]
    if not 0 < len(stored) <= limits.layers or len(unpacked) != len(stored):
        raise ValueError(f"{len(stored)} layers, {len(unpacked)} digests of what is in them")
    layers = tuple(_Layer(name, d, whole) for (name, d), whole in zip(stored, unpacked, strict=True))
    if not all(_DIGEST.fullmatch(layer.unpacked) for layer in layers):
        raise ValueError("a layer has no SHA-256")
    pairs = [str(pair) for pair in (config.get("config") or {}).get("Env") or ()]
    if len(json.dumps(pairs)) > _MAX_ENVIRONMENT:
        raise ValueError(f"its environment has more than {_MAX_ENVIRONMENT} characters")
    if any("\0" in pair or pair != pair.encode("utf-8", "replace").decode() for pair in pairs):
        raise ValueError("its environment has what is no text")
    given = {name: value for name, _, value in (pair.partition("=") for pair in pairs)}
    return _Described(digest, layers, {name: value for name, value in given.items() if name and name not in _OURS})


def _for_this_machine(index: Any) -> str:
    manifests = index["manifests"]
    fitting = [manifest for manifest in manifests if _fits(manifest.get("platform"))]
    if len(fitting) != 1:
        raise ValueError(f"{len(fitting)} of its {len(manifests)} images are for linux on amd64; give one")
    return str(fitting[0]["digest"])


def _fits(platform: Any) -> bool:
    return platform is None or (platform["os"], platform["architecture"]) == ("linux", "amd64")


def _blob(digest: str) -> str:
    found = _DIGEST.fullmatch(digest)
    if found is None:
        raise ValueError(f"{digest[:80]!r} is no SHA-256")
    return f"blobs/sha256/{found[1]}"


def _verified_json(store: _Store, digest: str) -> Any:
    with store.open(_blob(digest)) as file:
        data = file.read(_MAX_JSON)
    if f"sha256:{hashlib.sha256(data).hexdigest()}" != digest:
        raise ValueError(f"{digest} is not what its file has")
    return json.loads(data)


def _json(file: IO[bytes]) -> Any:
    return json.loads(file.read(_MAX_JSON))


# -- layers ---------------------------------------------------------------------------------------


class _Measured(io.RawIOBase):
    """Hashes and counts what is read through it, up to a limit."""

    def __init__(self, source: IO[bytes], most: int, what: str) -> None:
        self._source = source
        self.left = most
        self._what = what
        self._digest = hashlib.sha256()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any, /) -> int:
        data = self._source.read(min(len(buffer), _CHUNK))
        self.left -= len(data)
        if self.left < 0:
            raise ValueError(f"it is larger {self._what} than this machine takes")
        self._digest.update(data)
        buffer[: len(data)] = data
        return len(data)

    def finish(self) -> str:
        """Read to the end; the digest of all of it."""
        buffer = bytearray(_CHUNK)
        while self.readinto(buffer):
            pass
        return f"sha256:{self._digest.hexdigest()}"


class _Flattener:
    """Applies layers one after the other, by the rules of the image specification."""

    def __init__(self, spool: IO[bytes], limits: Limits) -> None:
        self.tree: Tree = {}
        self._spool = spool
        self._limits = limits
        self._stored, self._unpacked, self._entries = limits.stored, limits.unpacked, 0
        self._folders: dict[str, set[str]] = {"": set()}  # names in each folder
        self._text = self._steps = 0
        self._hidden: set[str] = set()  # what this layer has hidden: it is looked at once

    def add(self, stored: IO[bytes], layer: _Layer) -> None:
        """Apply a layer; both its digests are compared, and raise ValueError where they differ."""
        compressed = _Measured(stored, self._stored, "as stored")
        reader = io.BufferedReader(compressed, _CHUNK)
        unpacked = _Measured(_decompressed(reader), self._unpacked, "unpacked")
        own: set[str] = set()
        self._hidden.clear()
        with tarfile.open(fileobj=io.BufferedReader(unpacked, _CHUNK), mode="r|", tarinfo=BoundedTarInfo) as tar:
            for member in members(tar, self._limits.unpacked):
                self._member(tar, member, own)
        if unpacked.finish() != layer.unpacked:
            raise ValueError(f"the layer {layer.unpacked} has other contents")
        if layer.stored and compressed.finish() != layer.stored:
            raise ValueError(f"the layer {layer.stored} has other contents")
        self._stored, self._unpacked = compressed.left, unpacked.left

    def check_size(self) -> None:
        """All names of a file count: each is written into the file system. Raises ValueError."""
        if sum(node.stretch.size for node in self.tree.values() if node.stretch) > self._limits.unpacked:
            raise ValueError("its files, under all of their names, are larger than this machine takes")

    def _member(self, tar: tarfile.TarFile, member: tarfile.TarInfo, own: set[str]) -> None:
        self._entries += 1
        if self._entries > self._limits.entries:
            raise ValueError(f"it has more than {self._limits.entries:,} entries")
        given = self._checked(member.name)
        if not given:
            return  # the root itself
        folder, name = posixpath.split(given)
        folder = self._resolved(folder)
        path = f"{folder}/{name}" if folder else name
        if name == _OPAQUE:
            if f"{folder}/" not in self._hidden:
                self._hidden.add(f"{folder}/")
                for child in sorted(self._folders.get(folder, ())):
                    self._remove(f"{folder}/{child}" if folder else child, kept=own)
            return
        if name.startswith(_WHITEOUT):
            hidden = name.removeprefix(_WHITEOUT)
            if hidden in {"", ".", ".."}:
                raise ValueError(f"{member.name[:200]!a} hides nothing that can be named")
            hidden = f"{folder}/{hidden}" if folder else hidden
            if hidden not in self._hidden:
                self._hidden.add(hidden)
                self._remove(hidden, kept=own)
            return
        node = self._node(tar, member)
        if node is None:
            return
        self._make_folder(folder, own)
        if node.kind == "dir" and path in self._folders:
            self.tree[path] = node
        else:
            self._remove(path, kept=set())
            self._put(path, node)
        own.add(path)

    def _node(self, tar: tarfile.TarFile, member: tarfile.TarInfo) -> Node | None:
        if member.isdir():
            return Node("dir", member.mode & 0o755 | 0o555)
        if member.issym():
            length = len(member.linkname.encode())  # what is no text has no place in an image
            if not 0 < length <= self._limits.path or "\0" in member.linkname:
                raise ValueError(f"the link {member.name[:200]!a} leads nowhere")
            return Node("link", 0o777, target=member.linkname)
        if member.islnk():
            target = self.tree.get(self._resolved(self._checked(member.linkname), whole=False))
            if target is None or target.kind == "dir":
                raise ValueError(f"{member.name[:200]!a} is another name of what is not there")
            return target
        if member.type in {tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE}:
            return self._file(tar, member)
        if member.type in {tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE}:
            return None  # the guest makes its own devices
        raise ValueError(f"{member.name[:200]!a} is of an unknown type")

    def _file(self, tar: tarfile.TarFile, member: tarfile.TarInfo) -> Node:
        if member.issparse():
            raise ValueError(f"{member.name[:200]!a} has holes, which a layer may not have")
        source = tar.extractfile(member)
        assert source is not None
        start = self._spool.seek(0, os.SEEK_END)
        left = member.size
        while left and (data := source.read(min(left, _CHUNK))):
            self._spool.write(data)
            left -= len(data)
        if left:
            raise EOFError(f"{member.name[:200]!a} ends early")
        # All belongs to root in the machine: what its owner could do, the one user must be able to.
        mode = member.mode & 0o755 | 0o444 | (0o111 if member.mode & 0o100 else 0)
        return Node("file", mode, stretch=Stretch(self._spool, start, member.size))

    def _checked(self, given: str) -> str:
        """A path below the root, in its normal form; ``""`` for the root itself."""
        parts = [part for part in given.split("/") if part not in {"", "."}]
        if ".." in parts or "\0" in given or "\n" in given:
            raise ValueError(f"the path {given[:200]!a} does not stay inside")
        lengths = [len(part.encode()) for part in parts]  # what is no text has no place in an image
        if (
            sum(lengths) + len(parts) > self._limits.path
            or len(parts) > self._limits.depth
            or max(lengths, default=0) > 255  # NAME_MAX
        ):
            raise ValueError(f"the path {given[:100]!a}... is too long")
        if any(part.startswith(_WHITEOUT) for part in parts[:-1]):
            raise ValueError(f"the path {given[:200]!a} lies in what is hidden")
        return "/".join(parts)

    def _resolved(self, path: str, *, whole: bool = True) -> str:
        """Where a folder really is: links on the way are followed as the machine would, and never out of its root.

        Without ``whole`` the last component is left as it is.
        """
        todo = path.split("/") if path else []
        last = [] if whole or not todo else [todo.pop()]
        done: list[str] = []
        followed = 0
        for _ in range(_MAX_STEPS):
            if not todo:
                break
            self._steps += 1
            part = todo.pop(0)
            if part in {"", "."}:
                continue
            if part == "..":
                done = done[:-1]
                continue
            node = self.tree.get("/".join([*done, part]))
            if node is None or node.kind == "dir":
                done.append(part)
                continue
            if node.kind == "file":
                raise ValueError(f"{path[:200]!a} lies in a file")
            followed += 1
            if followed > _MAX_LINKS:
                raise ValueError(f"{path[:200]!a} lies behind a loop of links")
            if node.target.startswith("/"):
                done = []
            todo = [*node.target.split("/"), *todo]
        found = "/".join([*done, *last])
        if self._steps > _MAX_STEPS_IN_ALL:
            raise ValueError("its links lead on and on")
        if todo or len(found.encode()) > self._limits.path or len(done) > self._limits.depth:
            raise ValueError(f"the path {path[:100]!a}... is too long")
        return found

    def _make_folder(self, path: str, own: set[str]) -> None:
        if path in self._folders:
            return
        self._make_folder(posixpath.dirname(path), own)
        self._put(path, Node("dir", 0o755))
        own.add(path)

    def _put(self, path: str, node: Node) -> None:
        folder, name = posixpath.split(path)
        self._text += len(path.encode()) + len(node.target.encode())
        if len(path.encode()) > self._limits.path:
            raise ValueError(f"the path {path[:100]!a}... is too long")
        if len(self.tree) > self._limits.entries or self._text > _MAX_TEXT:
            raise ValueError(f"it has more than {self._limits.entries:,} entries, folders on the way to them included")
        self.tree[path] = node
        self._folders[folder].add(name)
        if node.kind == "dir":
            self._folders[path] = set()

    def _remove(self, path: str, *, kept: set[str]) -> None:
        """Remove what is there, with all in it; not what is ``kept``, which the same layer has brought."""
        if path not in self.tree:
            return
        for child in sorted(self._folders.get(path, ())):
            self._remove(f"{path}/{child}", kept=kept)
        if path in kept or self._folders.get(path):
            return
        del self.tree[path]
        self._folders.pop(path, None)
        folder, name = posixpath.split(path)
        self._folders[folder].discard(name)


def _decompressed(stored: io.BufferedReader[Any]) -> IO[bytes]:
    """By its first bytes: media types have been known to lie."""
    magic = stored.peek(4)[:4]
    if magic.startswith(b"\x1f\x8b"):
        return cast("IO[bytes]", gzip.GzipFile(fileobj=stored))
    if magic == b"\x28\xb5\x2f\xfd":
        reader = zstandard.ZstdDecompressor(max_window_size=1 << 27).stream_reader(stored, read_across_frames=True)
        return cast("IO[bytes]", reader)
    return cast("IO[bytes]", stored)


def _refused(why: str) -> ImageBuildFailed:
    return ImageBuildFailed(
        f"The container image cannot be used: {why}.",
        hint="Give an OCI layout (a folder or a tar), or what 'docker save' writes, of one image for linux/amd64.",
        kept="Nothing was built; earlier images were kept.",
    )

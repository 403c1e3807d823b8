"""Templates: a machine that was booted and warmed once, saved, and is copied from then on.

    <cache>/templates/<key>/ram         the RAM that is not zero, range after range
    <cache>/templates/<key>/state       the device state
    <cache>/templates/<key>/manifest.json   ranges, the SHA-256 of both, what it was made of; signed

The key covers all that a saved machine depends on (image, backend, versions, processor, memory), so
a change of any of them makes a new template. Every use verifies both files while reading them, and
the manifest's signature (HMAC-SHA256 with a key of this installation): who could write to the cache
alone can start nothing. The RAM ends in a sealed memfd, so that not even a clone that has taken over
its hypervisor can write to it.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import hmac
import json
import os
import shutil
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import anyio

from luminaguard import log
from luminaguard.errors import BootFailed, ImageTampered, StorageError
from luminaguard.images.manifest import INITRAMFS, KERNEL, ROOT, Image, Part, check_owner, open_sealed, seal
from luminaguard.microvm.channel import CallFailed
from luminaguard.microvm.machine import DISKS, Command, MicroVM, boot
from luminaguard.microvm.port import BootSource, Hypervisor, SavedMachine
from luminaguard.microvm.tracker import VMTracker

__all__ = ["PLACEHOLDER_BYTES", "TemplateStore", "placeholder"]

PLACEHOLDER_BYTES = 16 << 30
"""Capacity of the workspace disk in the template; a clone's image has less: the last block is the table of owners'."""

_WARM_UP = tuple(Command(argv, cwd="/") for argv in (
    ("/bin/true",),
    ("bash", "-c", "cat /etc/passwd | grep -q user; ls -la / > /dev/null; sed -n 1p /etc/passwd"),
    ("python3", "-c", "import json, os, re, subprocess, pathlib, shutil"),
    ("/bin/true",),
))  # fmt: skip
_REBUILD = "Run 'luminaguard image build --force'; see 'luminaguard doctor'."
_SETTLE_S = 0.5
_CHUNK = 4 << 20
_PAGE = 4096


@dataclass(frozen=True, slots=True)
class _Manifest:
    """``made_of`` is what the template's key is computed from; ``ranges`` say where the RAM's bytes belong."""

    made_of: dict[str, Any]
    memory_mib: int
    ranges: list[tuple[int, int]]
    ram: Part
    state: Part

    def dumps(self, secret: bytes) -> str:
        body = json.dumps({"format": 2, **asdict(self)})
        return json.dumps({"body": body, "hmac_sha256": _sign(body, secret)})

    @classmethod
    def loads(cls, text: str, secret: bytes) -> _Manifest:
        sealed: dict[str, Any] = json.loads(text)
        if not hmac.compare_digest(_sign(sealed["body"], secret), sealed["hmac_sha256"]):
            raise ValueError("it was not signed by this installation, or was changed")
        raw: dict[str, Any] = json.loads(sealed["body"])
        ranges = [(int(start), int(length)) for start, length in raw["ranges"]]
        return cls(raw["made_of"], int(raw["memory_mib"]), ranges, Part(**raw["ram"]), Part(**raw["state"]))


def _sign(body: str, secret: bytes) -> str:
    return hmac.new(secret, body.encode(), hashlib.sha256).hexdigest()


class TemplateStore:
    """The templates of one cache folder, signed with ``secret``."""

    def __init__(self, cache: Path, secret: bytes, tracker: VMTracker) -> None:
        self.folder = cache / "templates"
        self._secret = secret
        self._tracker = tracker

    def key(self, hypervisor: Hypervisor, image: Image, memory_mib: int) -> str:
        """Identity of the template for these parts."""
        return _key(_made_of(hypervisor, image, memory_mib))

    def exists(self, key: str) -> bool:
        """Whether a template with this key was built."""
        return (self.folder / key / "manifest.json").is_file()

    @asynccontextmanager
    async def saved(
        self, hypervisor: Hypervisor, image: Image, memory_mib: int, step: Callable[[str], None]
    ) -> AsyncIterator[SavedMachine]:
        """The template, built first if there is none; its descriptors close with the context.

        Raises:
            ImageTampered: a file of the template differs from what was saved.
            MachineError: a new one could not be booted.
            StorageError: the disk is full.
        """
        key = self.key(hypervisor, image, memory_mib)
        if not self.exists(key):
            await self._build(key, hypervisor, image, memory_mib, step)
        with ExitStack() as stack:
            yield await anyio.to_thread.run_sync(self._load, key, stack)

    async def _build(
        self,
        key: str,
        hypervisor: Hypervisor,
        image: Image,
        memory_mib: int,
        step: Callable[[str], None],
    ) -> None:
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        async with _locked(self.folder / ".lock", step):
            if self.exists(key):
                return
            step("booting a machine to copy from")
            for leftover in self.folder.glob(".building-*"):  # the lock is ours: their builders are dead
                shutil.rmtree(leftover, ignore_errors=True)
            work = self.folder / f".building-{os.getpid()}"
            work.mkdir(mode=0o700)
            try:
                with ExitStack() as stack:
                    ram, state = await self._boot_and_save(stack, hypervisor, image, memory_mib)
                    step("saving it")
                    made_of = _made_of(hypervisor, image, memory_mib)
                    manifest = await anyio.to_thread.run_sync(_store, work, ram, state, memory_mib, made_of)
                _write_new(work / "manifest.json", manifest.dumps(self._secret).encode())
                shutil.rmtree(self.folder / key, ignore_errors=True)
                work.rename(self.folder / key)
            except OSError as error:
                what = "the disk is full" if error.errno == errno.ENOSPC else str(error)
                raise StorageError(
                    f"The template could not be saved: {what}.",
                    hint="Free about 300 MB in the cache folder and run the command again.",
                ) from error
            finally:
                shutil.rmtree(work, ignore_errors=True)
            log.event("template.built", key=key, backend=hypervisor.name, memory_mib=memory_mib)
            self._forget_others(key)

    async def _boot_and_save(
        self, stack: ExitStack, hypervisor: Hypervisor, image: Image, memory_mib: int
    ) -> tuple[int, int]:
        def memfd(name: str, size: int) -> int:
            fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
            stack.callback(os.close, fd)
            os.ftruncate(fd, size)
            return fd

        ram, state = memfd("template-ram", memory_mib << 20), memfd("template-state", 0)
        with ExitStack() as parts:
            opened = []
            for name in (KERNEL, INITRAMFS, ROOT):
                opened.append(await anyio.to_thread.run_sync(image.open_part, name))
                parts.callback(os.close, opened[-1])
            kernel, initramfs, root = opened
            empty = placeholder(b"")
            parts.callback(os.close, empty)
            source = BootSource(
                kernel, initramfs, (root, *(empty for _ in range(1, DISKS))), memory_mib, image.manifest.boot_options
            )
            async with boot(hypervisor, source, ram, self._tracker, task=["template"]) as (vm, machine):
                await vm.wake(upper_mib=memory_mib // 2, randomize=hypervisor.capabilities.random_addresses)
                for command in _WARM_UP:
                    # A container image may lack any of them; that it runs at all was shown by its supervisor.
                    await _warm_up(vm, command, optional=bool(image.manifest.container))
                # What the warm-up left to do in the background, every clone would do again.
                await anyio.sleep(_SETTLE_S)
                await machine.save(state)
        return ram, state

    def _load(self, key: str, stack: ExitStack) -> SavedMachine:
        folder = self.folder / key
        check_owner(folder)
        try:
            manifest = _Manifest.loads((folder / "manifest.json").read_text(encoding="ascii"), self._secret)
            if _key(manifest.made_of) != key:
                raise ValueError("it belongs to another template")
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise _tampered(folder, f"its manifest cannot be read ({error})") from error
        state = open_sealed(folder / "state", manifest.state, folder)
        stack.callback(os.close, state)
        ram = os.memfd_create("ram", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        stack.callback(os.close, ram)
        os.ftruncate(ram, manifest.memory_mib << 20)
        _fill(ram, folder, manifest)
        seal(ram)
        return SavedMachine(ram, state, manifest.memory_mib)

    def _forget_others(self, key: str) -> None:
        """Keep the four newest templates: different memory sizes may alternate."""
        entries = [e for e in self.folder.iterdir() if e.is_dir() and not e.name.startswith(".")]
        entries.sort(key=lambda e: (e.name == key, e.stat().st_mtime), reverse=True)
        for old in entries[4:]:
            shutil.rmtree(old, ignore_errors=True)


def _made_of(hypervisor: Hypervisor, image: Image, memory_mib: int) -> dict[str, Any]:
    """All that a saved machine depends on; the fingerprint covers versions, devices and the processor."""
    parts = {name: image.manifest.parts[name].sha256 for name in (KERNEL, INITRAMFS, ROOT)}
    return {"image": image.folder.name, "parts": parts, "backend": hypervisor.name,
            "accelerator": hypervisor.accelerator, "fingerprint": hypervisor.fingerprint, "memory_mib": memory_mib,
            "warm_up": [command.params() for command in _WARM_UP], "placeholder": PLACEHOLDER_BYTES}  # fmt: skip


def _key(made_of: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()


def placeholder(content: bytes) -> int:
    """A disk of :data:`PLACEHOLDER_BYTES` that begins with ``content``, opened for reading only.

    QEMU takes a descriptor for a read-only disk only if it was opened so.
    """
    fd = os.memfd_create("placeholder", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(fd, PLACEHOLDER_BYTES)
        os.pwrite(fd, content, 0)
        seal(fd)  # a hijacked clone could open it for writing
        return os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC)
    finally:
        os.close(fd)


async def _warm_up(vm: MicroVM, command: Command, *, optional: bool) -> None:
    try:
        outcome = await vm.run(command, output=_discard, timeout_s=60)
    except CallFailed as error:
        if optional:
            return
        raise BootFailed(f"The guest could not start {command.argv[0]}: {error.message}.", hint=_REBUILD) from error
    if outcome.exit_code and not optional:
        raise BootFailed(f"{command.argv[0]} ended with status {outcome.exit_code} in the guest.", hint=_REBUILD)


async def _discard(_stream: int, _data: bytes) -> None:
    return


def _store(work: Path, ram: int, state: int, memory_mib: int, made_of: dict[str, Any]) -> _Manifest:
    """Write the RAM's data and the state to disk; the boot has ended, so both stand still."""
    ranges: list[tuple[int, int]] = []
    digest = hashlib.sha256()
    size = 0
    with _create(work / "ram") as out:
        for start, length in _data_ranges(ram, memory_mib << 20):
            for offset in range(start, start + length, _CHUNK):
                data = os.pread(ram, min(_CHUNK, start + length - offset), offset)
                for first, block in _not_zero(data):
                    _append(ranges, offset + first, len(block))
                    digest.update(block)
                    out.write(block)
                    size += len(block)
        out.flush()
        os.fsync(out.fileno())
    saved = os.pread(state, 64 << 20, 0)
    _write_new(work / "state", saved)
    return _Manifest(made_of, memory_mib, ranges, Part(size, digest.hexdigest()),
                     Part(len(saved), hashlib.sha256(saved).hexdigest()))  # fmt: skip


def _not_zero(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Runs of 64 KiB blocks that are not all zero."""
    step = 16 * _PAGE
    zero = bytes(step)
    start = 0
    for offset in range(0, len(data), step):
        block = data[offset : offset + step]
        if block == zero[: len(block)]:
            if start < offset:
                yield start, data[start:offset]
            start = offset + len(block)
    if start < len(data):
        yield start, data[start:]


def _append(ranges: list[tuple[int, int]], start: int, length: int) -> None:
    if ranges and sum(ranges[-1]) == start:
        ranges[-1] = (ranges[-1][0], ranges[-1][1] + length)
    else:
        ranges.append((start, length))


def _data_ranges(fd: int, size: int) -> Iterator[tuple[int, int]]:
    offset = 0
    while offset < size:
        try:
            start = os.lseek(fd, offset, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:
                return
            raise
        offset = os.lseek(fd, start, os.SEEK_HOLE)
        yield start, offset - start


def _fill(ram: int, folder: Path, manifest: _Manifest) -> None:
    """Copy the saved ranges into the memfd, and hash on a second core what was copied.

    What is hashed is the memfd, after its last write: nothing can change between check and use.
    """
    try:
        source = os.open(folder / "ram", os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError as error:
        raise _tampered(folder, "its RAM is missing") from error
    digest = hashlib.sha256()
    limit = manifest.memory_mib << 20
    copied = threading.Semaphore(0)
    pieces: list[tuple[int, int]] = []
    for start, length in manifest.ranges:
        if start < 0 or length <= 0 or start + length > limit:
            os.close(source)
            raise _tampered(folder, "its manifest names memory that is not there")
        pieces += [(o, min(_CHUNK, start + length - o)) for o in range(start, start + length, _CHUNK)]
    failed = threading.Event()

    def check() -> None:
        buffer = bytearray(_CHUNK)
        view = memoryview(buffer)
        for offset, length in pieces:
            copied.acquire()
            if failed.is_set():
                return
            count = os.preadv(ram, [view[:length]], offset)
            digest.update(view[:count])

    checker = threading.Thread(target=check, name="template-check")
    checker.start()
    try:
        if os.fstat(source).st_size != manifest.ram.size:
            raise _tampered(folder, "its RAM does not have the recorded size")
        position = 0
        for offset, length in pieces:
            done = 0
            while done < length:
                count = _copy(source, position + done, ram, offset + done, length - done)
                if not count:
                    raise _tampered(folder, "its RAM is truncated")
                done += count
            position += length
            copied.release()
    except BaseException:  # the checking thread must end before this one may leave
        failed.set()
        copied.release(len(pieces) + 1)
        raise
    finally:
        checker.join()
        os.close(source)
    if digest.hexdigest() != manifest.ram.sha256:
        raise _tampered(folder, "its RAM does not have the recorded SHA-256")


def _copy(source: int, source_offset: int, target: int, target_offset: int, length: int) -> int:
    data = os.pread(source, length, source_offset)
    return os.pwrite(target, data, target_offset) if data else 0


@asynccontextmanager
async def _locked(path: Path, step: Callable[[str], None]) -> AsyncIterator[None]:
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        told = False
        while True:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if not told:
                    step("waiting for another process that builds the template")
                    told = True
                await anyio.sleep(0.05)
        yield
    finally:
        os.close(fd)


@contextmanager
def _create(path: Path) -> Iterator[Any]:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with os.fdopen(fd, "wb") as file:
        yield file


def _write_new(path: Path, data: bytes) -> None:
    with _create(path) as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _tampered(folder: Path, why: str) -> ImageTampered:
    return ImageTampered(
        f"The template {folder.name[:12]} is not to be trusted: {why}.",
        hint=f"Delete {folder}; the next command builds it anew.",
        kept="No machine was started from it.",
    )

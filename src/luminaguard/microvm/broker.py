"""Lend machines of one process's pool to others of the same user, over a Unix socket.

One datagram each way (SOCK_SEQPACKET, JSON, at most 64 KiB). The borrower sends the workspace's images
as descriptors; it gets the guest's channel as one, and talks to the guest itself from then on. The
lease is the connection: when either side closes it, or dies, the machine is destroyed.

The socket lies in a private folder, and a peer with another uid is refused (SO_PEERCRED, unix(7)).
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
import struct
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import anyio

from luminaguard import log
from luminaguard.errors import LuminaGuardError, MachineError, StorageError, Unavailable
from luminaguard.microvm.channel import open_channel
from luminaguard.microvm.machine import MicroVM
from luminaguard.microvm.pool import Pool
from luminaguard.microvm.port import ProcessInfo

__all__ = ["Lender", "borrow", "has_pool", "pool_status", "remove_dead_socket"]

_MAX = 1 << 16
_SOCKET, _LOCK = "pool.sock", "pool.lock"
_REPLY_TIMEOUT_S = 60.0
_NOTICE_TIMEOUT_S = 3.0
"""Until a server takes note of a request; one that is stopped or stuck has no claim to be waited for."""
_MAX_BORROWERS = 256
_END_S = 5.0


@dataclass(frozen=True, slots=True)
class _Lent:
    """A borrowed machine, as far as a borrower sees it."""

    process: ProcessInfo
    channel: socket.socket

    async def diagnosis(self) -> str:
        return "it is lent by 'luminaguard pool serve', whose log says more"


class Lender:
    """Serves one pool.

    Args:
        pool: what is lent.
        run: the folder for the socket; private to the user.
        kind: what all its machines have in common (memory, accelerator); a borrower who wants
            something else is told so.
    """

    def __init__(self, pool: Pool, run: Path, kind: dict[str, Any]) -> None:
        self._pool = pool
        self._path = run / _SOCKET
        self._lock = run / _LOCK
        self._kind = kind

    async def serve(self, *, on_ready: Callable[[], None] = lambda: None) -> None:
        """Lend until cancelled; ``on_ready`` is called once borrowers can connect.

        Raises:
            Unavailable: another process serves a pool for this user.
        """
        with self._only_one(), self._listening() as listener:
            on_ready()
            limiter = anyio.Semaphore(_MAX_BORROWERS)
            async with anyio.create_task_group() as tasks:
                while True:
                    await anyio.wait_readable(listener)
                    await limiter.acquire()
                    try:
                        connection, _ = listener.accept()
                    except OSError as error:
                        limiter.release()
                        if not isinstance(error, BlockingIOError):  # such as too many open files
                            log.event("pool.accept_failed", error=repr(error))
                            await anyio.sleep(0.1)
                        continue
                    tasks.start_soon(self._handle, connection, limiter)

    async def _handle(self, connection: socket.socket, limiter: anyio.Semaphore) -> None:
        fds: list[int] = []
        try:
            with connection:
                connection.setblocking(False)
                if _peer_uid(connection) != os.geteuid():
                    return
                with anyio.fail_after(_REPLY_TIMEOUT_S):
                    await anyio.wait_readable(connection)
                data, fds, _, _ = socket.recv_fds(connection, _MAX, 4)
                await self._answer(connection, json.loads(data), fds)
        except LuminaGuardError as error:
            log.event("pool.lease_failed", error=repr(error))
        except (OSError, ValueError, KeyError, TypeError, TimeoutError, AttributeError) as error:
            log.event("pool.bad_request", error=repr(error))
        finally:
            for fd in fds:
                os.close(fd)
            limiter.release()

    async def _answer(self, connection: socket.socket, request: dict[str, Any], fds: list[int]) -> None:
        if request["op"] == "status":
            connection.send(json.dumps({"status": asdict(self._pool.status), "kind": self._kind, "pid": os.getpid()})
                            .encode())  # fmt: skip
            return
        if request["op"] != "borrow" or len(fds) not in {1, 2}:
            raise ValueError("unknown request")
        if request["kind"] != self._kind:
            connection.send(json.dumps({"error": "other-kind"}).encode())
            return
        task = [str(word)[:500] for word in request["task"]][:100]
        connection.send(b'{"taken": true}')
        try:
            async with self._pool.machine(*fds, folder=str(request["folder"])[:4096], task=task) as vm:
                channel, number = vm.hand_over()
                reply = {"id": vm.id, "backend": vm.backend, "accelerator": vm.accelerator, "boot_id": vm.boot_id,
                         "call": number, "pid": vm.process.pid, "layers": vm.process.layers}  # fmt: skip
                socket.send_fds(connection, [json.dumps(reply).encode()], [channel.fileno()])
                await _closed_or_dead(connection, vm)
        except LuminaGuardError as error:
            with contextlib.suppress(OSError):
                connection.send(json.dumps({"error": "failed", "message": error.message, "hint": error.hint}).encode())
            raise

    @contextmanager
    def _only_one(self) -> Iterator[None]:
        fd = os.open(self._lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise Unavailable(
                    "Another process serves a pool for this user.", hint="'luminaguard pool status' shows it."
                ) from None
            yield
        finally:
            os.close(fd)

    @contextmanager
    def _listening(self) -> Iterator[socket.socket]:
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
            listener.setblocking(False)
            self._path.unlink(missing_ok=True)  # of one that was killed: the lock is ours
            try:
                with _short(self._path) as path:
                    listener.bind(path)
                listener.listen(_MAX_BORROWERS)
            except OSError as error:
                raise StorageError(
                    f"{self._path} cannot be listened on: {error}.", hint="Check the owner and mode of that folder."
                ) from error
            try:
                yield listener
            finally:
                self._path.unlink(missing_ok=True)


@asynccontextmanager
async def borrow(
    run: Path, disks: Sequence[int], kind: dict[str, Any], *, folder: str, task: Sequence[str]
) -> AsyncIterator[MicroVM | None]:
    """A woken machine from a pool that another process serves, or None when there is no such pool.

    None is no weaker machine: the caller makes one itself, the same way, and it takes longer.

    Raises:
        MachineError: the pool could not give one.
    """
    connection = _connect(run)
    if connection is None:
        yield None
        return
    with connection:
        request = {"op": "borrow", "kind": kind, "folder": folder, "task": list(task)}
        try:
            socket.send_fds(connection, [json.dumps(request).encode()], list(disks))
            reply, fds = await _reply(connection, _NOTICE_TIMEOUT_S)
            if reply.get("taken"):
                reply, fds = await _reply(connection, _REPLY_TIMEOUT_S)
        except OSError:
            reply, fds = {"error": "gone"}, []
        if reply.get("error") in {"other-kind", "gone", "silent"}:
            yield None
            return
        if "error" in reply or len(fds) != 1:
            raise MachineError(
                str(reply.get("message", "The pool gave no machine."))[:1000],
                hint=str(reply.get("hint", "Run 'luminaguard pool status'."))[:500],
                kept="The workspace was not touched.",
            )
        try:
            with socket.socket(fileno=fds[0]) as channel_socket:
                channel_socket.setblocking(False)
                lent = _Lent(ProcessInfo(int(reply["pid"]), dict(reply["layers"])), channel_socket)
                async with open_channel(channel_socket, first_call=int(reply["call"])) as channel:
                    yield MicroVM(str(reply["id"]), lent, channel, backend=str(reply["backend"]),
                                  accelerator=str(reply["accelerator"]), boot_id=str(reply["boot_id"]))  # fmt: skip
        finally:  # also of who was cancelled: a slot is free when its machine is gone
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_WR)
            with anyio.move_on_after(_END_S, shield=True):  # the lender hangs up once the machine is destroyed
                await anyio.wait_readable(connection)


def has_pool(run: Path) -> bool:
    """Whether some process seems to serve a pool: enough to decide what to prepare."""
    return (run / _SOCKET).exists()


def remove_dead_socket(run: Path) -> None:
    """Remove the socket of a server that was killed; one that serves holds the lock and keeps its own."""
    try:
        fd = os.open(run / _LOCK, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    except FileNotFoundError:
        return
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        (run / _SOCKET).unlink(missing_ok=True)
    except BlockingIOError:
        pass
    finally:
        os.close(fd)


async def pool_status(run: Path) -> dict[str, Any] | None:
    """What the pool of this user says of itself; None when no process serves one."""
    connection = _connect(run)
    if connection is None:
        return None
    with connection:
        connection.send(b'{"op": "status"}')
        reply = (await _reply(connection, _NOTICE_TIMEOUT_S))[0]
        return None if "error" in reply else reply


def _connect(run: Path) -> socket.socket | None:
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        connection.setblocking(False)
        with _short(run / _SOCKET) as path:
            connection.connect(path)
        if _peer_uid(connection) != os.geteuid():
            raise ConnectionRefusedError("it belongs to another user")
    except OSError:  # none is served, its server has died, or its backlog is full
        connection.close()
        return None
    return connection


async def _reply(connection: socket.socket, timeout_s: float) -> tuple[dict[str, Any], list[int]]:
    with anyio.move_on_after(timeout_s) as scope:
        await anyio.wait_readable(connection)
    if scope.cancelled_caught:
        return {"error": "silent", "message": f"The pool gave no machine within {timeout_s:g} s."}, []
    data, fds, _, _ = socket.recv_fds(connection, _MAX, 4)
    if not data:
        return {"error": "gone"}, fds
    reply: dict[str, Any] = json.loads(data)
    return reply, fds


async def _closed_or_dead(connection: socket.socket, vm: MicroVM) -> None:
    """Wait until the borrower closes the connection, which is all that it may do with it, or the machine ends."""
    async with anyio.create_task_group() as first:

        async def dies() -> None:
            await vm.ended()
            first.cancel_scope.cancel()

        first.start_soon(dies)
        await anyio.wait_readable(connection)
        first.cancel_scope.cancel()


@contextmanager
def _short(path: Path) -> Iterator[str]:
    """A name for the path that fits into 108 bytes (unix(7)), however deep its folder lies."""
    fd = os.open(path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{fd}/{path.name}"
    finally:
        os.close(fd)


def _peer_uid(connection: socket.socket) -> int:
    data = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    return int(struct.unpack("3i", data)[1])

r"""Connect to the guest's supervisor through Firecracker's vsock socket (docs/vsock.md).

The host connects to the socket in the jail and sends ``CONNECT <port>\n`` in one write; the answer is
``OK <number>\n``, and from then on the socket is the guest's. While nothing listens in the guest yet,
or a restored one has not noticed its reset, Firecracker hangs up or is silent: then it is tried again.
"""

from __future__ import annotations

import socket
from collections.abc import Callable
from pathlib import Path

import anyio

from luminaguard.errors import BootFailed, MachineError
from luminaguard.guest.port import VSOCK_PORT
from luminaguard.microvm.firecracker.api import connect_inside

__all__ = ["connect_guest"]

_ANSWER_S = 2.5  # Firecracker gives up a request after 2 s
_PAUSE_S = 0.002
_MAX_ANSWER = 32


async def connect_guest(root: Path, name: str, alive: Callable[[], bool], timeout_s: float) -> socket.socket:
    """A connection to the supervisor; the caller owns it.

    Raises:
        BootFailed: nothing listened in the guest in time.
        MachineError: the machine ended.
    """
    with anyio.move_on_after(timeout_s):
        while alive():
            connection = await _attempt(root, name)
            if connection is not None:
                return connection
            await anyio.sleep(_PAUSE_S)
    if alive():
        raise BootFailed(f"The guest did not listen within {timeout_s:g} s.", hint="Run 'luminaguard doctor'.")
    raise MachineError(
        "The micro-VM ended before its guest came up.", hint="Run 'luminaguard doctor'.", kept="Nothing was touched."
    )


async def _attempt(root: Path, name: str) -> socket.socket | None:
    try:
        connection = connect_inside(root, name)
    except OSError:
        return None  # the socket is not there yet
    accepted = False
    try:
        connection.send(b"CONNECT %d\n" % VSOCK_PORT)
        with anyio.move_on_after(_ANSWER_S):
            accepted = await _accepted(connection)
    except OSError:
        pass  # hung up
    finally:
        if not accepted:
            connection.close()
    return connection if accepted else None


async def _accepted(connection: socket.socket) -> bool:
    """Read ``OK <number>`` and not a byte more: what follows is the guest's."""
    line = b""
    while not line.endswith(b"\n") and len(line) < _MAX_ANSWER:
        try:
            byte = connection.recv(1)
        except BlockingIOError:
            await anyio.wait_readable(connection)
            continue
        if not byte:
            return False
        line += byte
    return line.startswith(b"OK ") and line.endswith(b"\n") and line[3:-1].isdigit()

"""Talk to machines in tests."""

from __future__ import annotations

from collections.abc import Callable

import anyio

from luminaguard.microvm.machine import Command, MicroVM
from luminaguard.microvm.usage import start_time

__all__ = ["alive", "output_of", "until"]


async def output_of(vm: MicroVM, *argv: str, status: int = 0) -> str:
    """Run a command in a machine; its output, once it has ended with this exit status."""
    said = bytearray()

    async def output(_stream: int, data: bytes) -> None:
        said.extend(data)

    outcome = await vm.run(Command(argv), output=output, timeout_s=120)
    assert outcome.exit_code == status, said
    return said.decode()


def alive(pid: int) -> bool:
    """Whether there is such a process, and not only its zombie."""
    return start_time(pid) != 0


async def until(condition: Callable[[], object], timeout_s: float = 30) -> None:
    """Wait for a condition; raises TimeoutError."""
    with anyio.fail_after(timeout_s):
        while not condition():  # noqa: ASYNC110  # other processes set no event
            await anyio.sleep(0.02)

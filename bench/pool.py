"""Measure the pool: a hit, idle clones, many callers, and what stands beside us."""

from __future__ import annotations

import os
import shutil
import statistics
import subprocess
import time
from pathlib import Path
from typing import Any

import anyio

from luminaguard.microvm.jail import CgroupStore
from luminaguard.microvm.machine import Command
from luminaguard.microvm.pool import PoolLimits
from luminaguard.microvm.usage import usage
from luminaguard.runtime import Runtime

__all__ = ["callers", "hit", "idle", "peers"]


async def _quiet(_stream: int, _data: bytes) -> None:
    return


async def hit(runtime: Runtime, disk: int, count: int, *, kept: int = 4) -> dict[str, list[float]]:
    """Milliseconds from asking a filled, jailed pool to: woken, first byte of output, first /bin/true finished.

    With nothing ``kept``, every one of them is a miss.
    """
    laps: dict[str, list[float]] = {"woken": [], "true": [], "first_byte": []}
    async with runtime.open_pool(PoolLimits(kept, kept)) as pool:
        async with pool.machine(disk):
            pass  # the template is open from here on
        before = pool.status.misses
        for number in range(count):
            await pool.wait_ready(kept - 1)
            await anyio.sleep(0.05)
            start = time.perf_counter()

            async def first(_stream: int, _data: bytes, start: float = start) -> None:
                laps["first_byte"].append((time.perf_counter() - start) * 1000)

            async with pool.machine(disk) as vm:
                laps["woken"].append((time.perf_counter() - start) * 1000)
                if number % 4 == 3:
                    await vm.run(Command(("/bin/echo",)), output=first)
                else:
                    await vm.run(Command(("/bin/true",)), output=_quiet)
                    laps["true"].append((time.perf_counter() - start) * 1000)
        assert pool.status.misses - before == (0 if kept else count)
    return laps


async def idle(runtime: Runtime, count: int) -> dict[str, Any]:
    """Memory of paused clones (MiB each), and the processor time that all of them take in two seconds."""
    async with runtime.open_pool(PoolLimits(count, count, memory_mib=1 << 20)) as pool:
        await pool.wait_ready(count)
        await anyio.sleep(1)
        records = runtime.tracker.running()
        before = [found for record in records if (found := usage(record.pid))]
        await anyio.sleep(2)
        after = [found for record in records if (found := usage(record.pid))]
    mib = {name: [getattr(found, name) / (1 << 20) for found in after] for name in ("private", "pss", "rss")}
    cpu = sum(found.cpu_s for found in after) - sum(found.cpu_s for found in before)
    return {
        "clones": len(after),
        **{f"{name}_mib_p50": round(statistics.median(values), 1) for name, values in mib.items()},
        "private_mib_max": round(max(mib["private"]), 1),
        "goal_private_mib": 35,
        "met": max(mib["private"]) <= 35,
        "cpu_percent": round(cpu / 2 * 100, 2),
    }


async def callers(runtime: Runtime, disk: int, seconds: float) -> dict[str, Any]:
    """Eight callers at once: actions, failures, and what is left behind."""
    before = _held()
    done = failed = 0
    async with runtime.open_pool(PoolLimits(2, 8)) as pool:
        await pool.wait_ready(2)
        start = time.monotonic()

        async def caller() -> None:
            nonlocal done, failed
            while time.monotonic() - start < seconds:
                try:
                    async with pool.machine(disk) as vm:
                        outcome = await vm.run(Command(("/bin/true",)), output=_quiet)
                        done += outcome.exit_code == 0
                except Exception as error:  # noqa: BLE001  # what is counted here is any failure at all
                    failed += 1
                    print(error)

        async with anyio.create_task_group() as tasks:
            for _ in range(8):
                tasks.start_soon(caller)
        took = time.monotonic() - start
        hits, misses = pool.status.hits, pool.status.misses
    after = _held()
    return {
        "callers": 8,
        "seconds": round(took, 1),
        "actions": done,
        "errors": failed,
        "actions_per_s": round(done / took, 2),
        "hits": hits,
        "misses": misses,
        "left_behind": {name: after[name] - before[name] for name in before},
    }


def peers(count: int) -> dict[str, Any]:
    """Milliseconds until ``true`` has ended in what people use instead, where it is installed; p50.

    A plain QEMU that boots is measured as ``cold_boot``.
    """
    commands = {
        "bubblewrap": ["bwrap", "--ro-bind", "/", "/", "--unshare-all", "--die-with-parent", "/bin/true"],
        "gvisor": ["runsc", "--rootless", "--network=none", "do", "/bin/true"],
    }
    found: dict[str, Any] = {}
    for name, command in commands.items():
        if shutil.which(command[0]) is None:
            found[name] = "not installed"
            continue
        values = []
        try:
            for _ in range(count):
                start = time.perf_counter()
                subprocess.run(command, check=True, capture_output=True, timeout=60)
                values.append((time.perf_counter() - start) * 1000)
        except (OSError, subprocess.SubprocessError) as error:
            found[name] = f"does not run here: {str(error)[:80]}"
            continue
        found[name] = round(statistics.median(values), 1)
    return found


def _held() -> dict[str, int]:
    names = [_read(path).strip() for path in Path("/proc").glob("[0-9]*/comm")]
    links = [_link(fd) for fd in Path("/proc/self/fd").iterdir()]
    own = usage(os.getpid())
    return {
        "hypervisors": sum(name.startswith("qemu-system") for name in names),
        "processes_around_them": sum(name in {"bwrap", "setpriv", "prlimit", "flock"} for name in names),
        "descriptors": len(links),
        "sockets": sum(link.startswith("socket:") for link in links),
        "memfds": sum("memfd" in link for link in links),
        "cgroups": len(CgroupStore().groups()),
        "own_private_mib": round(own.private / (1 << 20)) if own else 0,
        "host_memory_mib": (int(_read(Path("/proc/meminfo")).split("MemTotal:")[1].split()[0])
                            - int(_read(Path("/proc/meminfo")).split("MemAvailable:")[1].split()[0])) >> 10,
    }  # fmt: skip


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""


def _link(path: Path) -> str:
    try:
        return os.readlink(path)
    except OSError:
        return ""

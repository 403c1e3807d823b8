"""``luminaguard vm`` and ``luminaguard pool``: what runs, what waits, and ending it."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any

import anyio

from luminaguard.cli import signals
from luminaguard.cli.output import print_json
from luminaguard.effects.text import visible
from luminaguard.errors import LuminaGuardError, MachineNotFound
from luminaguard.microvm.tracker import MachineRecord
from luminaguard.runtime import Runtime

__all__ = ["kill", "metrics", "pool_status", "reap", "serve_pool", "show", "show_list", "watch"]


def show_list(runtime: Runtime, *, everything: bool, as_json: bool) -> None:
    """Print the machines that live, and with ``everything`` those that ended."""
    records = runtime.tracker.running()
    if everything:
        records += runtime.tracker.ended()
    rows = [_facts(record) for record in records]
    if as_json:
        print_json({"vms": rows})
        return
    for row in rows:
        print("  ".join(_columns(row)))
    if not rows:
        print("no machine is running")


def show(runtime: Runtime, vm_id: str, *, as_json: bool) -> None:
    """Print all that is known of one machine; raises MachineNotFound."""
    for record in (*runtime.tracker.running(), *runtime.tracker.ended(1000)):
        if record.id == vm_id:
            facts = _facts(record)
            if as_json:
                print_json(facts)
                return
            for name, value in facts.items():
                shown = ", ".join(f"{k}: {v}" for k, v in value.items()) if isinstance(value, dict) else value
                print(f"{name:12} {visible(' '.join(shown) if isinstance(shown, list) else str(shown))}")
            return
    raise _not_found(vm_id)


def kill(runtime: Runtime, vm_id: str, *, as_json: bool) -> None:
    """End one machine; raises MachineNotFound."""
    record = runtime.tracker.kill(vm_id)
    if record is None:
        raise _not_found(vm_id)
    if as_json:
        print_json({"status": "killed", "id": record.id})
    else:
        print(f"{record.id} was ended; nothing of it is published")


def reap(runtime: Runtime, *, as_json: bool) -> None:
    """End what dead owners left."""
    dead = runtime.tracker.reap()
    if as_json:
        print_json({"status": "reaped", "vms": [record.id for record in dead]})
    else:
        print("\n".join(f"{record.id} was ended: its owner died" for record in dead) or "nothing was left behind")


def pool_status(runtime: Runtime, *, as_json: bool) -> None:
    """Print the counters of the pool that some process of this user serves."""
    from luminaguard.microvm.broker import pool_status as ask

    found = anyio.run(ask, runtime.folders.run)
    if as_json:
        print_json({"running": found is not None, **(found or {})})
        return
    if found is None:
        print("no pool is running; start one with: luminaguard pool serve")
        return
    print(_pool_line(found))


def metrics(runtime: Runtime) -> None:
    """Print machines and the pool in the text format of Prometheus."""
    from luminaguard.microvm.broker import pool_status as ask
    from luminaguard.microvm.metrics import exposition

    found = anyio.run(ask, runtime.folders.run)
    sys.stdout.write(exposition(runtime.tracker.running(), found["status"] if found else None))


def serve_pool(runtime: Runtime) -> None:
    """Keep machines ready and lend them to every ``luminaguard exec`` of this user, until interrupted."""
    from luminaguard.microvm.broker import Lender

    async def run() -> None:
        lender_failure: LuminaGuardError | None = None
        async with runtime.open_pool() as pool, anyio.create_task_group() as tasks:

            async def until_signal() -> None:
                await held.ending()
                tasks.cancel_scope.cancel()

            tasks.start_soon(until_signal)
            try:
                await Lender(pool, runtime.folders.run, runtime.kind).serve(on_ready=_say_that_it_lends)
            except LuminaGuardError as error:
                lender_failure = error
            tasks.cancel_scope.cancel()
        if lender_failure is not None:
            raise lender_failure

    with signals.held() as held:
        anyio.run(run)


def _say_that_it_lends() -> None:
    sys.stderr.write("filling a pool; every exec of this user takes its machine from it until this ends (Ctrl-C)\n")


def watch(draw: Callable[[], None], *, as_json: bool, every_s: float = 1.0) -> None:
    """Print again and again until interrupted; on a terminal in place."""
    try:
        while True:
            if sys.stdout.isatty() and not as_json:
                sys.stdout.write("\x1b[H\x1b[J")
            draw()
            sys.stdout.flush()
            time.sleep(every_s)
    except signals.Interrupted:
        return


def _facts(record: MachineRecord) -> dict[str, Any]:
    used = record.usage() if not record.ended_ns else None
    age = ((record.ended_ns or time.time_ns()) - record.created_ns) / 1e9
    return asdict(record) | {
        "age_s": round(age, 1),
        "cpu_s": used.cpu_s if used else None,
        "rss_bytes": used.rss if used else None,
        "pss_bytes": used.pss if used else None,
        "private_bytes": used.private if used else None,
    }


def _columns(row: dict[str, Any]) -> Iterator[str]:
    yield row["id"]
    yield f"{row['state']:8}"
    yield f"{row['backend']}/{row['accelerator']}"
    yield f"pid {row['pid']}"
    yield f"{row['age_s']:.0f} s"
    if row["cpu_s"] is not None:
        yield f"cpu {row['cpu_s']:.1f} s"
        yield f"memory {row['pss_bytes'] >> 20} MiB ({row['private_bytes'] >> 20} its own)"
    if row["reason"]:
        yield f"ended: {row['reason']}"
    yield visible(row["workspace"])
    yield visible(" ".join(row["task"]))[:80]


def _pool_line(found: dict[str, Any]) -> str:
    s = found["status"]
    total = s["hits"] + s["misses"]
    rate = f"{100 * s['hits'] / total:.0f} % hits of {total}" if total else "not used yet"
    now = f"{s['ready']} ready (target {s['target']}), {s['making']} being made, {s['in_use']} in use"
    ever = f"{s['made']} made, {s['expired']} expired, {s['died']} died, {s['failures']} failures"
    mean, longest = 1000 * s["waited_s"] / max(total, 1), 1000 * s["longest_wait_s"]
    waits = f"waits {mean:.0f} ms on average, {longest:.0f} at most; " if total else ""
    line = f"{now}, {s['waiting']} waiting; {rate}; {waits}{ever}"
    return f"{line}\nlast failure: {visible(s['last_failure'])}" if s["last_failure"] else line


def _not_found(vm_id: str) -> MachineNotFound:
    return MachineNotFound(
        f"There is no machine '{visible(vm_id[:64])}'.", hint="'luminaguard vm list --all' lists them."
    )

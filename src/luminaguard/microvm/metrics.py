"""Machines and the pool in the text format of Prometheus.

Names begin with ``luminaguard_vm_`` and ``luminaguard_pool_``; units are base units, counters end in
``_total`` (prometheus.io/docs/practices/naming). Labels never carry a path or a command.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

from prometheus_client import CollectorRegistry, Metric, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from luminaguard.microvm.tracker import MachineRecord

__all__ = ["exposition"]

_POOL_GAUGES = {
    "ready": "Clones that wait for work.",
    "making": "Clones that are being made.",
    "in_use": "Machines at work.",
    "waiting": "Callers that wait for an on-demand clone.",
    "target": "Clones that should wait.",
}
_POOL_COUNTERS = {
    "hits": "Callers that got a waiting clone.",
    "misses": "Callers that got a clone made on demand.",
    "made": "Clones made to wait.",
    "expired": "Clones that were too old or not wanted any more.",
    "died": "Clones that ended while they waited.",
    "failures": "Clones or templates that could not be made.",
}


def exposition(machines: Iterable[MachineRecord], pool: dict[str, Any] | None) -> str:
    """The metrics as text.

    Args:
        machines: those that live.
        pool: fields of :class:`luminaguard.microvm.pool.PoolStatus`, or None when no pool is served.
    """
    registry = CollectorRegistry()
    registry.register(_Collector(list(machines), pool))
    return generate_latest(registry).decode()


class _Collector(Collector):
    def __init__(self, machines: list[MachineRecord], pool: dict[str, Any] | None) -> None:
        self._machines = machines
        self._pool = pool

    def collect(self) -> Iterator[Metric]:
        count = GaugeMetricFamily("luminaguard_vm_count", "Machines that live.", labels=["state", "backend"])
        for (state, backend), number in Counter((m.state, m.backend) for m in self._machines).items():
            count.add_metric([state, backend], number)
        yield count
        cpu = CounterMetricFamily("luminaguard_vm_cpu_seconds", "Processor time of a hypervisor.", labels=["vm"])
        memory = GaugeMetricFamily("luminaguard_vm_memory_bytes", "Memory of a hypervisor.", labels=["vm", "kind"])
        for machine in self._machines:
            used = machine.usage()
            if used is None:
                continue
            cpu.add_metric([machine.id], used.cpu_s)
            for kind in ("rss", "pss", "private"):
                memory.add_metric([machine.id, kind], getattr(used, kind))
        yield cpu
        yield memory
        if self._pool is not None:
            yield from self._of_pool(self._pool)

    @staticmethod
    def _of_pool(pool: dict[str, Any]) -> Iterator[Metric]:
        for name, text in _POOL_GAUGES.items():
            yield GaugeMetricFamily(f"luminaguard_pool_{name}", text, value=pool[name])
        for name, text in _POOL_COUNTERS.items():
            yield CounterMetricFamily(f"luminaguard_pool_{name}", text, value=pool[name])
        yield CounterMetricFamily("luminaguard_pool_wait_seconds", "Time callers waited.", value=pool["waited_s"])
        yield GaugeMetricFamily("luminaguard_pool_refill_seconds", "Time the last clone took.", value=pool["refill_s"])

"""Servers of tools in the text format of Prometheus: names begin with ``luminaguard_mcp_``, units are base units.

Labels are names of servers and addresses of endpoints as they stand in the settings: never arguments or results.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from prometheus_client import CollectorRegistry, Metric, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

__all__ = ["Calls", "exposition"]

_GAUGES = {
    "running": "Requests that are at an endpoint.",
    "weight": "The share of an endpoint beside the others.",
}
_COUNTERS = {
    "served": "Requests that an endpoint answered.",
    "failed": "Requests that came to nothing at an endpoint.",
}


@dataclass(slots=True)
class Calls:
    """What became of calls.

    Attributes:
        ended: how many, by server and outcome: ``done``, ``failed``, ``maybe executed``, ``waits``, ``refused``.
        seconds: how long those of a server took together.
    """

    ended: Counter[tuple[str, str]] = field(default_factory=Counter)
    seconds: Counter[str] = field(default_factory=Counter)

    def note(self, server: str, outcome: str, seconds: float) -> None:
        """A call has ended."""
        self.ended[server, outcome] += 1
        self.seconds[server] += seconds  # type: ignore[assignment]  # a Counter adds floats as well


def exposition(calls: Calls, endpoints: Mapping[str, list[dict[str, Any]]]) -> str:
    """The metrics as text.

    Args:
        calls: what became of calls.
        endpoints: rows of :meth:`luminaguard.mcp.balancing.Balancer.table` by server.
    """
    registry = CollectorRegistry()
    registry.register(_Collector(calls, endpoints))
    return generate_latest(registry).decode()


class _Collector(Collector):
    def __init__(self, calls: Calls, endpoints: Mapping[str, list[dict[str, Any]]]) -> None:
        self._calls, self._endpoints = calls, endpoints

    def collect(self) -> Iterator[Metric]:
        ended = CounterMetricFamily("luminaguard_mcp_calls", "Calls that ended.", labels=["server", "outcome"])
        for (server, outcome), count in self._calls.ended.items():
            ended.add_metric([server, outcome], count)
        yield ended
        seconds = CounterMetricFamily("luminaguard_mcp_call_seconds", "Time that calls took.", labels=["server"])
        for server, total in self._calls.seconds.items():
            seconds.add_metric([server], total)
        yield seconds
        labels = ["server", "endpoint"]
        families: list[Any] = []
        for name, text in _GAUGES.items():
            families.append((name, GaugeMetricFamily(f"luminaguard_mcp_endpoint_{name}", text, labels=labels)))
        for name, text in _COUNTERS.items():
            families.append((name, CounterMetricFamily(f"luminaguard_mcp_endpoint_{name}", text, labels=labels)))
        well = GaugeMetricFamily("luminaguard_mcp_endpoint_well", "1 for one that gets requests.", labels=labels)
        latency = GaugeMetricFamily("luminaguard_mcp_endpoint_latency_seconds", "An average.", labels=labels)
        for server, rows in self._endpoints.items():
            for row in rows:
                at = [server, str(row["endpoint"])]
                for name, family in families:
                    family.add_metric(at, row[name])
                well.add_metric(at, float(row["health"] == "well"))
                latency.add_metric(at, row["latency_ms"] / 1e3)
        yield from (family for _, family in families)
        yield well
        yield latency

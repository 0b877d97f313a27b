"""What placement tells Ray's metrics (docs/memory.md): pages, leases and the engine's events.

Knows nothing of how they come about.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict

from ray.util.metrics import Counter, Gauge

from actors.engine.protocol import Capacity
from actors.messages import DeviceBytes


class LedgerMetrics:
    """What the ledger has promised."""

    def __init__(self):
        self.rows = Gauge("berth_leases", "Trajectories, by state: placed, waiting", ("pool", "state"))
        self.charged = Gauge("berth_kv_pages_charged", "KV pages its residents are charged now", ("pool", "replica"))

    def tell(self, pool: str, placed: int, waiting: int, charged_pages: Mapping[str, float]) -> None:
        """Counts of one pool, pages by replica."""
        for state, count in (("placed", placed), ("waiting", waiting)):
            self.rows.set(count, {"pool": pool, "state": state})
        for replica, pages in charged_pages.items():
            self.charged.set(pages, {"pool": pool, "replica": replica})


class ReplicaMetrics:
    """What an engine holds and what has happened to it."""

    def __init__(self, pool: str, replica: str):
        self.tags = {"pool": pool, "replica": replica}
        self.pages = Gauge("berth_kv_pages", "KV pages, by state: total, free, cached", ("pool", "replica", "state"))
        self.events = Counter(
            "berth_engine_events", "Out of memory, preemptions, evictions and so on", ("pool", "replica", "event")
        )
        self.bytes = Gauge(
            "berth_gpu_bytes", "Allocated and reserved by torch at most, used by all now", ("pool", "replica", "kind")
        )
        self.before: Mapping[str, int] = {}

    def tell(self, sizes: Capacity, events: Mapping[str, int], device: DeviceBytes | None = None) -> None:
        """Sizes now, how often what has happened since the engine's start, and the GPU's memory."""
        for kind, size in asdict(device).items() if device else ():
            self.bytes.set(size, self.tags | {"kind": kind})
        for state in ("total", "free", "cached"):
            self.pages.set(getattr(sizes, f"pages_{state}"), self.tags | {"state": state})
        for event, count in events.items():
            if more := count - self.before.get(event, 0):
                self.events.inc(more, self.tags | {"event": event})
        self.before = events

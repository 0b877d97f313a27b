"""Which pool has the GPUs: how many replicas each gets, from the config, the rows that want it and the GPUs there are.

On a fixed cluster the pool of the smallest replicas holds every GPU. Rows that need larger replicas take as many GPUs
as they fill, small replicas are drained for them, and the GPUs go back when those rows are over. Pure: no Ray and no
clock, time is an argument.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from pipeline.config import Pool, ReplicaRange

LINGER_S = 5.0
"""Large replicas are kept so long without a row: the next may be about to begin."""
PATIENCE_S = 30.0
"""Draining takes less; a replica that has found no place by then needs free GPUs that lie together."""


@dataclass(frozen=True, slots=True)
class Sized:
    """A pool and its replicas.

    Attributes:
        tp: ranks of a replica.
        gpus: of one rank.
        least, most, first: replicas: kept when idle, at most, and at the start.
        by_load: Serve scales it by its load.
        labels: of the nodes it may be on.
    """

    name: str
    tp: int
    gpus: int
    least: int
    most: int
    first: int
    by_load: bool
    labels: Mapping[str, str]


def sized(pools: Mapping[str, Pool], gpus: int) -> tuple[Sized, ...]:
    """The pools of a config on a cluster that has so many GPUs now, small ones first."""
    found: list[Sized] = []
    for name, pool in sorted(pools.items(), key=lambda item: item[1].tensor_parallel_size):
        tp, wanted, smallest = pool.tensor_parallel_size, pool.replicas, not found
        each = pool.num_gpus if isinstance(pool.num_gpus, int) else min(1, gpus)
        if isinstance(wanted, ReplicaRange):
            bounds = (wanted.min, wanted.max, wanted.min)
        elif isinstance(wanted, int):
            bounds = (0 if smallest and len(pools) > 1 else wanted, wanted, wanted)
        else:
            most = max(1, gpus // tp)
            bounds = (0 if len(pools) > 1 else most, most, most if smallest else 0)
        by_load = smallest and isinstance(wanted, ReplicaRange)
        found.append(Sized(name, tp, each, *bounds, by_load, pool.labels))
    return tuple(found)


@dataclass(frozen=True, slots=True)
class Need:
    """One pool now.

    Attributes:
        gpus: of a replica.
        least, most: replicas.
        rows: trajectories that have their home there, or wait for one.
        slots: rows of one replica; None before any has started.
        unplaced: replicas that have not found their GPUs yet.
    """

    name: str
    gpus: int
    least: int
    most: int
    rows: int = 0
    slots: int | None = None
    unplaced: int = 0

    @property
    def wanted(self) -> int:
        """Replicas that its rows fill, within the bounds."""
        filled = -(-self.rows // self.slots) if self.slots else int(self.rows > 0)
        return min(self.most, max(self.least, filled))


def share(gpus: int, needs: Sequence[Need], spare: int = 0) -> dict[str, int]:
    """Replicas of each pool; together they take no more than `gpus`.

    Larger replicas first: their rows fit nowhere else. The smallest pool takes all that is left.

    Args:
        needs: small replicas first.
        spare: GPUs to leave free while a larger pool works, so that a replica finds its GPUs on one node.
    """
    smallest, *larger = needs
    found: dict[str, int] = {}
    kept = {need.name: need.least * need.gpus for need in needs}
    working = False
    for need in reversed(larger):
        del kept[need.name]
        found[need.name] = max(0, min(need.wanted, (gpus - sum(kept.values())) // need.gpus))
        gpus -= found[need.name] * need.gpus
        working |= found[need.name] > need.least or min(found[need.name], need.unplaced) > 0
    left = gpus - (spare if working else 0)
    found[smallest.name] = max(smallest.least, min(smallest.most, left // smallest.gpus))
    return found


class Turns:
    """`share` over time: pools take turns, so that none waits for ever and starting a model stays a small part.

    A larger pool keeps its GPUs while it has rows. When it has given them back, the smallest pool has them for at least
    as long as it went without, if it has rows. One that took none from it leaves no turn behind.
    """

    def __init__(self) -> None:
        self._busy_s: dict[str, float] = {}  # when a pool last had a row
        self._working = False  # a larger pool has more than its least
        self._since_s: float | None = None  # since when, where the smallest pool goes without for it
        self._until_s = float("-inf")  # the smallest pool's turn
        self._spare, self._unplaced_s = 0, 0.0

    def share(self, gpus: int, needs: Sequence[Need], now_s: float) -> dict[str, int]:
        """See `share`; asked about once a second."""
        smallest, *larger = needs
        for need in larger:
            if need.rows:
                self._busy_s[need.name] = now_s
        waits = not self._working and now_s < self._until_s and smallest.rows > 0
        asked = [smallest, *(replace(need, rows=0 if waits else self._rows(need, now_s)) for need in larger)]
        if not any(need.unplaced for need in larger):
            self._spare, self._unplaced_s = 0, now_s
        elif now_s - self._unplaced_s > PATIENCE_S:
            self._spare, self._unplaced_s = self._spare + 1, now_s
        found = share(gpus, asked, self._spare)
        self._working = any(found[need.name] > need.least for need in larger)
        without = self._working and found[smallest.name] < smallest.most
        if without and self._since_s is None:
            self._since_s = now_s
        elif not without and self._since_s is not None:
            self._until_s, self._since_s = 2 * now_s - self._since_s, None
        return found

    def _rows(self, need: Need, now_s: float) -> int:
        lingers = self._working and now_s - self._busy_s.get(need.name, float("-inf")) < LINGER_S
        return max(need.rows, int(lingers))

"""Ranks 1 and up of a replica's gang as Ray actors, in the replica's placement group, one bundle each.

They live and die with the replica, whose engine is rank 0: Ray ends them when it dies, and when one of them ends, the
replica does, so that Serve builds the whole gang anew. A rank that is stuck and not dead is the engine's to find
(engine/leader.py).

Knows nothing of requests or of what a rank computes.
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
from collections.abc import Callable, Sequence
from typing import Any

import ray
from ray.util import get_current_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from actors.engine import build
from actors.engine.protocol import EngineSpec

HOST = "127.0.0.1"  # a gang lies on one node


class Rank:
    """One rank's process."""

    def serve(self, spec: EngineSpec, seat: dict[str, str], threads: int) -> None:
        """Take a seat, and serve until rank 0 closes; the errors of `build`, and EngineDead for a lost gang."""
        if threads:
            import torch

            torch.set_num_threads(threads)
        os.environ |= seat
        with contextlib.suppress(SystemExit):
            build(spec)


def start_ranks(spec: EngineSpec, threads: int) -> list[Any]:
    """Start the other ranks, and give the engine's process, by this one's environment, the seat of rank 0.

    Args:
        threads: CPU threads of each rank; 0 leaves torch's own number.

    Returns:
        Calls that last as long as the ranks do.
    """
    group = get_current_placement_group()
    if group is None or group.bundle_count != spec.tp:
        raise RuntimeError(f"{spec.tp} ranks want a placement group of as many bundles")
    with socket.socket() as free:
        free.bind((HOST, 0))
        port = free.getsockname()[1]
    actor: Any = ray.remote(Rank)
    env = {"env_vars": {"OMP_NUM_THREADS": str(threads)}} if threads else {}
    calls: list[Any] = []
    for rank, bundle in enumerate(group.bundle_specs):
        seat = {"RANK": str(rank), "WORLD_SIZE": str(spec.tp), "MASTER_ADDR": HOST, "MASTER_PORT": str(port)}
        if rank == 0:
            os.environ |= seat
            continue
        place = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=rank)
        options = {"num_cpus": bundle.get("CPU", 0), "num_gpus": bundle.get("GPU", 0), "runtime_env": env}
        calls.append(actor.options(scheduling_strategy=place, **options).remote().serve.remote(spec, seat, threads))
    return calls


def watch(calls: Sequence[Any], on_end: Callable[[str], None]) -> None:
    """Tell, on a thread, that one of the ranks has ended, and how."""

    def wait() -> None:
        [ended], _ = ray.wait(list(calls), num_returns=1)
        try:
            ray.get(ended)
            said = "it was closed"
        except Exception as e:
            said = str(e).strip().splitlines()[-1]
        on_end(f"a rank has ended ({said})")

    if calls:
        threading.Thread(target=wait, name="berth-ranks", daemon=True).start()

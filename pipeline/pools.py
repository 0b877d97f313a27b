"""The pools of a run as Serve deployments, and what moves GPUs between them while it runs.

Where the smallest pool has a fixed number of replicas, this process tells Serve how many each pool has (`sharing`
decides); where it has a range, Serve scales it by its load, and larger pools ask the cluster for the nodes they need.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray import serve
from ray.serve._private.common import DeploymentID
from ray.serve._private.constants import SERVE_CONTROLLER_NAME, SERVE_NAMESPACE
from ray.serve.config import RequestRouterConfig
from ray.serve.schema import DeploymentStatus
from ray.util import placement_group_table

from actors.errors import BerthError, EngineDead, OutOfMemory
from pipeline.config import Pool, ReplicaRange
from pipeline.sharing import Need, Turns

log = logging.getLogger("berth")

FAILED = (DeploymentStatus.DEPLOY_FAILED, DeploymentStatus.UNHEALTHY)


@dataclass(frozen=True, slots=True)
class Sized:
    """A pool and its replicas.

    Attributes:
        tp: ranks of a replica.
        gpus: of one rank.
        least, most, first: replicas: kept when idle, at most, and at the start.
        by_load: Serve scales it by its load.
    """

    name: str
    tp: int
    gpus: int
    least: int
    most: int
    first: int
    by_load: bool
    labels: Mapping[str, str]


def sized(pools: Mapping[str, Pool], gpus: int) -> list[Sized]:
    """The pools of a config on a cluster of so many GPUs, small ones first."""
    found: list[Sized] = []
    for name, pool in sorted(pools.items(), key=lambda item: item[1].tensor_parallel_size):
        tp, wanted = pool.tensor_parallel_size, pool.replicas
        each = pool.num_gpus if isinstance(pool.num_gpus, int) else min(1, gpus)
        if isinstance(wanted, ReplicaRange):
            # Beside a smaller pool it is the rows that need it which start it.
            bounds = (wanted.min, wanted.max, wanted.min, not found)
        elif isinstance(wanted, int):
            bounds = (wanted, wanted, wanted, False)
        else:
            most = max(1, gpus // tp)
            bounds = (0, most, 0, False) if found else (most, most, most, False)
        found.append(Sized(name, tp, each, *bounds, pool.labels))
    return found

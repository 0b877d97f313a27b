"""What to do when memory runs out: cause of a failure and where it stands → the next rung, or give up and why.

Pure functions: they run in a notebook, and nothing here loads, measures or retries. A policy is an order of rungs:

    same_precision   smaller batch, then sharded over 2, 4, 8 GPUs: no number changes its precision
    memory_first     fits? → half precision → KV compression → several GPUs? tensor parallel : smaller batch
    a list           as written

Within an attempt the engine makes its batch smaller by itself, so a row that it gives back stands at its smallest
bound, and goes to a larger pool next. A rung is passed over only where it is illegal: it changes nothing here, it has
no bearing on the cause, the engine does not do it, the run has no larger pool, the KV heads do not divide, or there are
not enough GPUs on a node. Giving up says all of that, with numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

Cause = Literal["load", "capture", "prefill", "decode", "never_fits", "dead_context", "rank_lost"]
Policy = str | Sequence[str]

RUNGS = ("smaller_batch", "shard", "half_precision", "kv_int8", "kv_fp8", "kv_sparse", "weights_int8")
LOSSY = frozenset(RUNGS) - {"smaller_batch", "shard"}
OFFERED = frozenset(RUNGS) - {"kv_sparse"}
"""What the paged engine does today."""
FOR_A_ROW = OFFERED - LOSSY
"""What may be done for one row: all rows of a run have one precision."""
POLICIES = {
    "same_precision": ("smaller_batch", "shard"),
    "memory_first": ("half_precision", "kv_int8", "kv_fp8", "kv_sparse", "shard", "smaller_batch"),
}
MIN_PREFILL_TOKENS = 64
GANGS = ((2, "sharded"), (4, "sharded"), (8, "sharded"))
_NOT_MEMORY = frozenset({"dead_context", "rank_lost"})
# What a rung cannot help: the batch has no bearing on weights, nor on a row that is too long alone; KV none on weights.
_NO_HELP = {
    "smaller_batch": {"load": "does not make the weights smaller", "never_fits": "the row is alone already"},
    "kv_int8": {"load": "does not make the weights smaller"},
    "kv_fp8": {"load": "does not make the weights smaller"},
    "kv_sparse": {"load": "does not make the weights smaller"},
}


@dataclass(frozen=True, slots=True)
class Standing:
    """Under what a row, or a pool, runs.

    Attributes:
        pool: name of the pool.
        tp: ranks a replica.
        max_batch: rows decoded together at most.
        max_prefill_tokens: tokens a prefill step may take.
        dtype: of activations; and of KV and weights where theirs is auto.
        kv_dtype: auto, int8, fp8 or sparse.
        weights_dtype: auto or int8.
        graphs: decode is replayed from CUDA graphs.
        attempts: made so far, the one that failed included.
    """

    pool: str = "single"
    tp: int = 1
    max_batch: int = 1
    max_prefill_tokens: int = MIN_PREFILL_TOKENS
    dtype: str = "bfloat16"
    kv_dtype: str = "auto"
    weights_dtype: str = "auto"
    graphs: bool = False
    attempts: int = 0


@dataclass(frozen=True, slots=True)
class Hardware:
    """What there is.

    Attributes:
        gpus_per_node: a gang lies on one node; None: as many as any gang wants.
        kv_heads: of the model; a gang's size divides them. None: the gangs were checked against them.
        half_dtype: what half precision means on these devices.
        gangs: size and pool of the gangs that may be formed, smallest first.
    """

    gpus_per_node: int | None = None
    kv_heads: int | None = None
    half_dtype: str = "bfloat16"
    gangs: tuple[tuple[int, str], ...] = GANGS


@dataclass(frozen=True, slots=True)
class Shortage:
    """The numbers of a failure, in bytes on all ranks together; None where they are not known."""

    needed_bytes: int | None = None
    free_bytes: int | None = None

    def __str__(self) -> str:
        def said(count: int | None) -> str:
            if count is None:
                return "an unknown amount"
            return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"

        return f"needs {said(self.needed_bytes)}, has {said(self.free_bytes)}"


@dataclass(frozen=True, slots=True)
class Rung:
    """Go on like this.

    Attributes:
        name: one of RUNGS; `again` (as before, on a new replica) or `uncaptured` (as before, without graphs).
        standing: under what the next attempt runs.
        lossy: its numbers have another precision.
    """

    name: str
    standing: Standing
    lossy: bool = False


@dataclass(frozen=True, slots=True)
class GiveUp:
    """There is no next rung; `reason` is what stands on the row."""

    reason: str


def next_rung(
    cause: Cause,
    standing: Standing,
    hardware: Hardware,
    policy: Policy = "same_precision",
    *,
    offered: frozenset[str] = OFFERED,
    max_attempts: int = 3,
    shortage: Shortage | None = None,
) -> Rung | GiveUp:
    """The next rung for what failed.

    Args:
        cause: what failed. A dead context or a lost rank is no lack of memory: the same is tried again elsewhere. A
            failed capture goes on without graphs.
        standing: under what it failed.
        policy: same_precision, memory_first, or rungs in order.
        offered: rungs that the engine does, for what asks.
        max_attempts: bounds everything, whatever the cause.
        shortage: for the reason.
    """
    where = f"{cause} on {standing.pool} (tensor parallel {standing.tp}, batch {standing.max_batch})"
    numbers = where if shortage in (None, Shortage()) else f"{where}: {shortage}"
    if standing.attempts >= max_attempts:
        return GiveUp(f"{standing.attempts} of {max_attempts} attempts are used; the last: {numbers}")
    if cause in _NOT_MEMORY:
        return Rung("again", standing)
    if cause == "capture" and standing.graphs:
        return Rung("uncaptured", replace(standing, graphs=False))
    refusals: list[str] = []
    for name in order(policy):
        found = _NO_HELP.get(name, {}).get(cause) or _step(name, standing, hardware, offered)
        if isinstance(found, Standing):
            return Rung(name, found, lossy=name in LOSSY)
        refusals.append(f"{name}: {found}")
    return GiveUp(f"{numbers}; " + "; ".join(refusals))


def first_that_fits(
    standing: Standing,
    fails: Callable[[Standing], Cause | None],
    hardware: Hardware,
    policy: Policy = "same_precision",
    *,
    offered: frozenset[str] = OFFERED,
    shortage: Shortage | None = None,
) -> Rung | GiveUp:
    """Climb before anything has run: the first standing that a prediction lets pass, as the last rung taken.

    Args:
        fails: predicts what would run out of memory first, `load`, `prefill`, `decode` or `never_fits`; None if all
            fits.

    Returns:
        a Rung named `start` where it fits as it stands.
    """
    rung: Rung | GiveUp = Rung("start", standing)
    while isinstance(rung, Rung) and (cause := fails(rung.standing)) is not None:
        if cause in _NOT_MEMORY or cause == "capture":
            raise ValueError(f"a prediction cannot name {cause}")
        lossy = rung.lossy
        rung = next_rung(
            cause, rung.standing, hardware, policy, offered=offered, max_attempts=1 << 30, shortage=shortage
        )
        if isinstance(rung, Rung):
            rung = replace(rung, lossy=rung.lossy or lossy)
    return rung


def order(policy: Policy) -> Sequence[str]:
    """A policy's rungs, in order.

    Raises:
        ValueError: no such policy or rung.
    """
    rungs = POLICIES.get(policy) if isinstance(policy, str) else policy
    if rungs is None or not set(rungs) <= set(RUNGS):
        raise ValueError(f"no such policy: {policy}")
    return rungs


def _step(name: str, standing: Standing, hardware: Hardware, offered: frozenset[str]) -> Standing | str:
    """The standing on this rung, or why it is illegal."""
    if name not in offered:
        return "for a whole run only, at its start" if name in OFFERED else "the engine does not do it"
    match name:
        case "smaller_batch":
            batch, prefill = standing.max_batch, standing.max_prefill_tokens
            chunk = max(min(MIN_PREFILL_TOKENS, prefill), prefill // 2)
            smaller = replace(standing, max_batch=max(1, batch // 2), max_prefill_tokens=chunk)
            return smaller if smaller != standing else f"already batch {batch} and {prefill} prefill tokens"
        case "shard":
            return _shard(standing, hardware)
        case "half_precision":
            if standing.dtype != "float32":
                return f"already {standing.dtype}"
            return replace(standing, dtype=hardware.half_dtype)
        case "weights_int8":
            return "already int8" if standing.weights_dtype != "auto" else replace(standing, weights_dtype="int8")
        case _:
            kind = name.removeprefix("kv_")
            return f"already {standing.kv_dtype}" if standing.kv_dtype != "auto" else replace(standing, kv_dtype=kind)


def _shard(standing: Standing, hardware: Hardware) -> Standing | str:
    refusals: list[str] = []
    for size, pool in hardware.gangs:
        if size <= standing.tp:
            continue
        if hardware.kv_heads is not None and hardware.kv_heads % size:
            refusals.append(f"{hardware.kv_heads} KV heads do not divide by {size}")
        elif hardware.gpus_per_node is not None and size > hardware.gpus_per_node:
            refusals.append(f"{size} GPUs on a node are wanted, there are {hardware.gpus_per_node}")
        else:
            return replace(standing, pool=pool, tp=size)
    return ", ".join(refusals) or f"no pool is sharded over more than {standing.tp}"

"""The pools of a run as Serve deployments, and how many replicas each has while it runs.

Where the smallest pool has a fixed number of replicas, this process tells Serve how many each pool has (`sharing`
decides); where it has a range, Serve scales it by its load, and larger pools ask the cluster for the nodes they need.
Knows nothing of agents and of what a replica computes.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import ray
from ray import serve
from ray.serve._private.common import DeploymentID
from ray.serve._private.constants import SERVE_CONTROLLER_NAME, SERVE_NAMESPACE
from ray.serve.config import RequestRouterConfig
from ray.serve.handle import DeploymentHandle
from ray.util import placement_group_table

from actors.engine.protocol import NO_PAGE, Capacity, EngineSpec
from actors.errors import EngineError, Incomplete, InputError, OutOfMemory
from actors.ladder import LOSSY, OFFERED, GiveUp, Hardware, Rung, Standing, next_rung, order
from actors.messages import Numerics
from pipeline.config import RunConfig
from pipeline.sharing import Need, Sized, Turns, sized

ROUTER = "actors.router.HomeRouter"
DRAIN_S = 15
"""How long a replica that is to go may take for the calls it has: a turn of 256 tokens."""
GAVE_UP_S = 30.0
"""A pool without a replica, though it should have some, is closed after so long."""
UNPLACED_S = 60.0
"""So is one that finds no GPUs when small replicas have made all the room they can; they take DRAIN_S to go."""
NODE_S = 1800.0
"""And one for which the autoscaler brings no node, while small replicas have no row that keeps them."""
UNBOUNDED = 1 << 20
"""GPUs of a cluster that brings those that are missing, or of one that needs none."""


@dataclass(frozen=True, slots=True)
class Served:
    """What was started.

    Attributes:
        pools: that have replicas or may get them, small ones first.
        numerics, capacity: of a replica of the smallest.
        rungs: of the fallback that it took for the model to fit, in order: cause, rung, and where that leads.
    """

    pools: tuple[Sized, ...]
    numerics: Numerics
    capacity: Capacity
    rungs: tuple[Mapping[str, str], ...] = ()

    @property
    def rung(self) -> str:
        """On which all rows begin: `start`, or the last of those."""
        return self.rungs[-1]["rung"] if self.rungs else "start"

    @property
    def replicas(self) -> int:
        """Of the smallest pool, at most."""
        return self.pools[0].most


# --- the start


def engine_spec(config: RunConfig) -> EngineSpec:
    """What the config says of the engine."""
    model, memory = config.model, config.memory

    def number(value: int | str) -> int | None:
        return None if isinstance(value, str) else value

    return EngineSpec(
        model=model.id,
        engine=config.engine,
        revision=model.revision,
        adapter=model.adapter,
        dtype=model.dtype,
        quantization=model.quantization,
        trust_remote_code=model.trust_remote_code,
        max_model_len=model.max_model_len,
        max_batch=number(memory.max_batch),
        max_prefill_tokens=number(memory.max_prefill_tokens),
        numerics=config.numerics,
        speculation=config.speculation,
        compile=config.compile,
        budget_fraction=memory.budget_fraction,
        gpu_memory_fraction=memory.gpu_memory_fraction,
        kv_dtype=memory.kv_dtype,
        step_limit_s=config.limits.max_step_s,
        record_oom=memory.record_oom,
        oom_folder=f"{config.out}/oom",
    )


def deploy(
    config: RunConfig, app: str, ledger: str, say: Callable[[str], None], longest: Callable[[], int] = lambda: 0
) -> Served:
    """Start the replicas as the application `app` and wait for the first. Where the model fits no replica of the
    smallest pool, or the longest row not its KV, the fallback says how to go on; a rung that changes the precision is
    for the whole run, and such a row goes to a larger pool only if none comes first.

    Args:
        ledger: name of the actor that replicas report to.
        say: is told why the fallback was needed.
        longest: forecast of the longest row in tokens; asked only where the fallback may change the precision.

    Raises:
        InputError: there are not enough GPUs, or the engine refuses the model.
        Incomplete: no replica started, or the model fits no pool.
    """
    gpus = int(ray.cluster_resources().get("GPU", 0))
    chosen, spec = config.pools, engine_spec(config)
    rungs: list[Mapping[str, str]] = []
    serve.start(proxy_location="Disabled", logging_config={"log_level": "ERROR"})
    while True:
        pools = sized(chosen, gpus)
        if config.ray.address is None:
            _check_gpus(pools, gpus)
        try:
            first = _start(config, pools, spec, app, ledger)
        except OutOfMemory as e:
            dtype = "bfloat16" if spec.dtype == "auto" else spec.dtype
            found = _next(config, pools, spec, dtype, e)
            if isinstance(found, GiveUp):
                raise Incomplete(f"the model fits no pool: {e}; {found.reason}") from e
            why = str(e)
        else:
            numerics, capacity = first.describe.remote().result()
            short = _short(capacity, longest) if LOSSY & set(order(config.fallback)) else None
            found = short and _next(config, pools, spec, numerics.dtype, short)
            if not isinstance(found, Rung) or not found.lossy:
                return Served(pools, numerics, capacity, tuple(rungs))
            why = str(short)
            serve.delete(app)
        at = found.standing
        where = {"dtype": at.dtype, "kv_dtype": at.kv_dtype, "weights_dtype": at.weights_dtype, "pool": at.pool}
        rungs.append({"cause": why, "rung": found.name} | where)
        chosen = {name: pool for name, pool in chosen.items() if pool.tensor_parallel_size >= at.tp}
        spec = replace(
            spec,
            dtype=at.dtype if found.name == "half_precision" else spec.dtype,
            kv_dtype=at.kv_dtype,
            quantization=None if at.weights_dtype == "auto" else at.weights_dtype,
        )
        say(f"{why}; next: {found.name}, {at.dtype}, KV {at.kv_dtype}, weights {at.weights_dtype} in pool {at.pool}")


def bounded(smallest: Sized) -> bool:
    """Whether a run shares the GPUs that there are, and asks for no more."""
    return bool(smallest.gpus) and not smallest.by_load


def largest_node() -> int:
    """GPUs of the node that has most of them."""
    return max((int(node["Resources"].get("GPU", 0)) for node in ray.nodes() if node["Alive"]), default=0)


def _next(config: RunConfig, pools: Sequence[Sized], spec: EngineSpec, dtype: str, error: OutOfMemory) -> Rung | GiveUp:
    """The fallback's next rung for the smallest pool, all of whose rows are to have the same precision."""
    offered = OFFERED
    if config.numerics == "invariant":
        offered -= {"half_precision"}
    if config.engine != "paged":
        offered -= {"kv_int8", "kv_fp8"}
    weights = spec.quantization or "auto"
    standing = Standing(pools[0].name, pools[0].tp, dtype=dtype, kv_dtype=spec.kv_dtype, weights_dtype=weights)
    # A replica was on a node: they are there.
    on_node = largest_node() // pools[0].gpus if bounded(pools[0]) else None
    hardware = Hardware(on_node, gangs=tuple((pool.tp, pool.name) for pool in pools))
    return next_rung(error.stage, standing, hardware, config.fallback, offered=offered)


def _short(capacity: Capacity, longest: Callable[[], int]) -> OutOfMemory | None:
    """What the KV pool lacks for the longest row; None where it fits, or the engine holds no pages."""
    room = capacity.pages_total * capacity.page_tokens
    if not room or (tokens := longest()) <= room:
        return None
    return OutOfMemory(f"the longest row may take {tokens:,} tokens, a replica's KV holds {room:,}", "never_fits")


def _check_gpus(pools: Sequence[Sized], gpus: int) -> None:
    for pool in pools:
        count = max(1, pool.first)
        if count * pool.tp * pool.gpus > gpus:
            raise InputError(
                f"{count} replicas want {count * pool.tp * pool.gpus} GPUs",
                field=f"pools.{pool.name}.replicas",
                got=count,
                wants=f"{gpus} GPUs",
            )


def _start(config: RunConfig, pools: Sequence[Sized], spec: EngineSpec, app: str, ledger: str) -> DeploymentHandle:
    """Deploy the pools as one application, whose ingress is the smallest."""
    others: list[Any] = []
    for pool in reversed(pools):
        threads = 0 if pool.gpus else max(1, (os.cpu_count() or 1) // (max(1, pool.first) * pool.tp))
        deployment = _deployment(config, pool, threads, several=len(pools) > 1)
        mine = others if pool is pools[0] else []
        others.append(deployment.bind(replace(spec, tp=pool.tp), threads, ledger, pool.name, *mine))
    try:
        return serve.run(others[-1], name=app, route_prefix=None, external_scaler_enabled=len(pools) > 1)
    except RuntimeError as e:
        status = serve.status().applications.get(app)
        messages = [each.message for each in status.deployments.values()] if status else []
        raise failure("\n".join(messages) or "no replica started") from e


def _deployment(config: RunConfig, pool: Sized, threads: int, several: bool) -> Any:
    from actors.replica import Replica

    if pool.by_load:
        scale: dict[str, Any] = {"autoscaling_config": {"min_replicas": pool.least, "max_replicas": pool.most}}
    elif several and not pool.first:
        # Serve takes no fixed number of 0, and starts a replica for calls that it remembers from before the last went.
        bounds = {"min_replicas": 0, "initial_replicas": 0, "max_replicas": pool.most}
        memory = {"look_back_period_s": 2.0, "metrics_interval_s": 1.0}
        scale = {"autoscaling_config": bounds | memory | {"policy": {"policy_function": as_it_is}}}
    else:
        scale = {"num_replicas": pool.first}
    deployment: Any = serve.deployment(Replica)
    return deployment.options(
        name=pool.name,
        max_ongoing_requests=100_000,
        # By default Serve starts each replica three times, pausing longer and longer, before it says that a model does
        # not fit.
        max_constructor_retry_count=max(2, pool.first),
        health_check_period_s=2,
        graceful_shutdown_timeout_s=DRAIN_S if several else 5,
        logging_config={"enable_access_log": False},  # a line a call
        ray_actor_options={
            "num_cpus": 1 if pool.gpus else 0,
            "num_gpus": pool.gpus,
            "label_selector": (dict(pool.labels) or None) if pool.tp == 1 else None,
            "runtime_env": _replica_env(config.ray.runtime_env, threads),
        },
        request_router_config=RequestRouterConfig(
            request_router_class=ROUTER,  # pyright: ignore[reportArgumentType]
            request_router_kwargs={"num_fallback_replicas": 0},
        ),
        **scale,
        **_gang(pool),
    )


def as_it_is(context: Any) -> tuple[int, dict[str, Any]]:
    """A policy of Serve's autoscaler: somebody else says how many replicas there are."""
    return context.target_num_replicas, {}


def _replica_env(runtime_env: dict[str, Any], threads: int) -> dict[str, Any]:
    """The runtime environment of a replica, which Serve does not take over from the job.

    Ray starts a process that reserves no CPU with OMP_NUM_THREADS=1, which the engine's thread would keep.
    """
    variables = {"OMP_NUM_THREADS": str(threads)} if threads else {}
    return runtime_env | {"env_vars": variables | runtime_env.get("env_vars", {})}


def _gang(pool: Sized) -> dict[str, Any]:
    """Deployment options by which a replica gets a bundle for each of its ranks, all on one node."""
    if pool.tp == 1:
        return {}
    bundle = {"CPU": 1.0, "GPU": float(pool.gpus)} if pool.gpus else {"CPU": 0.01}  # Ray refuses empty bundles
    options: dict[str, Any] = {"placement_group_bundles": [bundle] * pool.tp, "placement_group_strategy": "STRICT_PACK"}
    labels = [dict(pool.labels)] * pool.tp
    return options | ({"placement_group_bundle_label_selector": labels} if pool.labels else {})


def failure(said: str) -> Exception:
    """Why no replica started, in the words of the replica, of which Serve keeps the text."""
    lines = [line for line in said.splitlines() if line.strip()]
    for line in reversed(lines):
        head, _, rest = line.strip().partition(": ")
        kind = head.rpartition(".")[2]
        if kind in {"UnsupportedModel", "ModelUnavailable", "InputError"}:
            return InputError(rest)
        if kind == "OutOfMemory":
            return OutOfMemory(rest, "never_fits" if rest.startswith(NO_PAGE) else "load")
    return Incomplete("no replica started:\n" + "\n".join(lines[-15:]))


# --- while it runs


def sharing(app: str, pools: Sequence[Sized], ledger: Any, say: Callable[[str], None]) -> Callable[[], None]:
    """What is to be called about once a second; `say` is told of changes."""
    if len(pools) == 1:
        return lambda: None
    sharing = Sharing(app, pools, ledger)

    def share() -> None:
        if sharing.step():
            # How many Serve has of one that it scales by its load is not known here.
            say(", ".join(f"{pool.name} {sharing.now[pool.name]}" for pool in pools if not pool.by_load))

    return share


class Sharing:
    """Tells Serve how many replicas each pool has.

    Args:
        ledger: the actor that knows which pool has how many rows.
    """

    def __init__(self, app: str, pools: Sequence[Sized], ledger: Any):
        self.app, self.pools, self.ledger = app, pools, ledger
        self.now = {pool.name: pool.first for pool in pools}
        self.turns = Turns()
        self.controller: Any = ray.get_actor(SERVE_CONTROLLER_NAME, namespace=SERVE_NAMESPACE)
        self.closed: dict[str, EngineError] = {}
        self.empty: dict[str, tuple[str, float]] = {}  # pools that should have replicas: what they lack, since when
        self.said: dict[str, list[str]] = {}  # by Serve of such a pool: what it said before, and what since

    def step(self) -> dict[str, int]:
        """Look, and act where it is needed; about once a second. Replicas by pool, where they change.

        Raises:
            RayError: the ledger or Serve's controller is being restarted: try again.
        """
        found: Any = ray.get(self.ledger.pools.remote(), timeout=10)
        smallest = self.pools[0]
        gpus, on_node = UNBOUNDED, UNBOUNDED
        if bounded(smallest):
            gpus, on_node = int(ray.cluster_resources().get("GPU", 0)), largest_node()
        # Small replicas have made it.
        all_room = self.now[smallest.name] <= smallest.least if bounded(smallest) else not found[smallest.name][0]
        needs: list[Need] = []
        for pool in self.pools:
            rows, slots, up = found[pool.name]
            each = pool.tp * max(1, pool.gpus)
            short = pool is not smallest and up < self.now[pool.name]
            too_large = pool is not smallest and each > on_node
            unplaced = self._unplaced(pool) if short and not too_large else 0
            if pool.name in self.closed:
                if rows:  # a ledger that was restarted does not know
                    self._close(pool, self.closed[pool.name])
            elif too_large and rows:
                self._lacks(pool, f"a replica takes {each} GPUs of one node, the largest has {on_node}", GAVE_UP_S)
            elif unplaced >= max(1, self.now[pool.name]) and not up and all_room:
                limit_s = UNPLACED_S if bounded(smallest) else NODE_S
                self._lacks(pool, f"a replica takes {each} GPUs of one node, none had them in {limit_s:.0f} s", limit_s)
            elif short and not up:
                self._check(pool)
            else:
                self.empty.pop(pool.name, None)
                self.said.pop(pool.name, None)
            gone = too_large or pool.name in self.closed
            bounds = (0, 0, 0) if gone else (pool.least, pool.most, rows)
            needs.append(Need(pool.name, each, *bounds, slots, 0 if gone else unplaced))
        wanted = self.turns.share(gpus, needs, time.monotonic())
        changes = {
            pool.name: wanted[pool.name]
            for pool in self.pools
            if not pool.by_load and wanted[pool.name] != self.now[pool.name]
        }
        for name, count in changes.items():
            ray.get(self.controller.update_deployment_replicas.remote(DeploymentID(name, self.app), count), timeout=10)
            self.now[name] = count
        return changes

    def _lacks(self, pool: Sized, what: str, limit_s: float) -> None:
        """Close a pool that has lacked GPUs for so long."""
        if self._since(pool, what) > limit_s:
            self._close(pool, OutOfMemory(what, "load"))

    def _since(self, pool: Sized, what: str) -> float:
        """Seconds for which the pool has lacked this."""
        now_s = time.monotonic()
        if pool.name not in self.empty or self.empty[pool.name][0] != what:
            self.empty[pool.name] = what, now_s
        return now_s - self.empty[pool.name][1]

    def _check(self, pool: Sized) -> None:
        """Close a pool whose replicas do not start."""
        status = serve.status().applications[self.app].deployments[pool.name]
        if any(status.replica_states.values()):
            self.empty.pop(pool.name, None)
        # Serve gives up after some tries, and says so only of a deployment that it scales itself; with one that has
        # run before it goes on for ever. What it says of a failed start names the process: no two are alike.
        said = self.said.setdefault(pool.name, [status.message])
        if said[-1] != status.message:
            said.append(status.message)
        gave_up = self._since(pool, "replicas") > GAVE_UP_S
        gave_up |= sum("failed to start" in one for one in said[1:]) >= max(2, self.now[pool.name])
        if gave_up or status.status_trigger == "REPLICA_STARTUP_FAILED":
            error = failure(status.message)
            if not isinstance(error, EngineError):
                why = status.message.strip().rpartition("\n")[2] or "the log of Serve's controller says why"
                error = EngineError(f"pool {pool.name} cannot start: {why}")
            self._close(pool, error)

    def _close(self, pool: Sized, error: EngineError) -> None:
        ray.get(self.ledger.close.remote(pool.name, error), timeout=10)
        self.closed[pool.name] = error

    def _unplaced(self, pool: Sized) -> int:
        prefix = f"SERVE_REPLICA::{self.app}#{pool.name}#"
        groups: Any = placement_group_table().values()
        return sum(group["name"].startswith(prefix) and group["state"] == "PENDING" for group in groups)

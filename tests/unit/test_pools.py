"""The start of a run's pools: each way from the flow chart of docs/memory.md, without Serve."""

from types import SimpleNamespace

import pytest

from actors.engine.protocol import Capacity
from actors.errors import Incomplete, OutOfMemory
from pipeline.config import Pool, ReplicaRange, RunConfig
from pipeline.sharing import sized
from tests import starts
from tests.starts import pools

SINGLE_AND_PAIR = {"single": {}, "pair": {"tensor_parallel_size": 2}}
ANY, HALF = ("float32", "bfloat16"), ("bfloat16",)


def deployed(monkeypatch, fits, on_node=2, **changes):
    """What `deploy` gives and says, and what it tried, where replicas of the ranks in `fits` start in those dtypes."""
    roomy = SimpleNamespace(dtype="float32"), Capacity(8192, 8, 10, 100, 100, 0, 256)

    def describe(pool, spec):
        if spec.dtype not in fits.get(pool.tp, ()):
            raise OutOfMemory(f"the weights do not fit {pool.tp} GPUs", "load", 9 << 30, pool.tp << 30)
        return roomy

    fields = {"suite": "s", "out": "o", "model": {"id": "m", "dtype": "float32"}, "pools": SINGLE_AND_PAIR} | changes
    served, tried, said = starts.deployed(monkeypatch, RunConfig.model_validate(fields), describe, on_node=on_node)
    return served, [(pool.name, spec.dtype) for pool, spec in tried], said


@pytest.mark.parametrize(
    ("fallback", "fits", "tried", "rung", "names"),
    [
        ("memory_first", {1: ANY}, [("single", "float32")], "start", ["single", "pair"]),
        (
            "memory_first",
            {1: HALF},
            [("single", "float32"), ("single", "bfloat16")],
            "half_precision",
            ["single", "pair"],
        ),
        (
            "memory_first",
            {2: HALF},
            [("single", "float32"), ("single", "bfloat16"), ("pair", "bfloat16")],
            "shard",
            ["pair"],
        ),
        ("same_precision", {2: ANY}, [("single", "float32"), ("pair", "float32")], "shard", ["pair"]),
        (
            ["shard", "half_precision"],
            {2: HALF},
            [("single", "float32"), ("pair", "float32"), ("pair", "bfloat16")],
            "half_precision",
            ["pair"],
        ),
    ],
)
def test_a_model_that_does_not_fit_climbs_the_fallback(fallback, fits, tried, rung, names, monkeypatch):
    served, found, said = deployed(monkeypatch, fits, fallback=fallback)
    assert found == tried
    assert (served.rung, [pool.name for pool in served.pools]) == (rung, names)
    assert all(f"next: {name}, " in line for name, line in zip([rung], said[-1:], strict=False))


def test_a_model_that_fits_nowhere_stops_the_run_with_every_reason(monkeypatch):
    with pytest.raises(Incomplete) as caught:
        deployed(monkeypatch, {}, fallback="memory_first")
    for words in (
        "the model fits no pool: the weights do not fit 2 GPUs",
        "half_precision: already bfloat16",
        "kv_int8: does not make the weights smaller",
        "shard: no pool is sharded over more than 2",
        "smaller_batch: does not make the weights smaller",
    ):
        assert words in str(caught.value)


def test_a_gang_that_no_node_can_hold_is_passed_over(monkeypatch):
    with pytest.raises(Incomplete, match="shard: 2 GPUs on a node are wanted, there are 1"):
        deployed(monkeypatch, {2: ANY}, on_node=1, ray={"address": "auto"})
    ranged = {"single": {"replicas": {"min": 1, "max": 2}}, "pair": {"tensor_parallel_size": 2}}
    assert deployed(monkeypatch, {2: ANY}, on_node=1, pools=ranged, ray={"address": "auto"})[0].rung == "shard"


def test_what_was_tried_at_the_start_is_kept_with_its_cause(monkeypatch):
    served, _, said = deployed(monkeypatch, {2: HALF}, fallback="memory_first")
    assert [rung["rung"] for rung in served.rungs] == ["half_precision", "shard"]
    for rung, line in zip(served.rungs, said, strict=True):
        assert line.startswith(f"{rung['cause']}; next: {rung['rung']}, {rung['dtype']}, ")
    assert served.rungs[1]["cause"] == "the weights do not fit 1 GPUs"


def test_an_invariant_run_never_leaves_its_precision(monkeypatch):
    served, tried, _ = deployed(monkeypatch, {2: ANY}, fallback="memory_first", numerics="invariant")
    assert tried == [("single", "float32"), ("pair", "float32")]
    assert served.rung == "shard"


def test_a_replica_that_does_not_start_is_tried_twice_at_least_and_no_more_than_once_each_else():
    config = RunConfig.model_validate({"suite": "s", "out": "o", "model": {"id": "m"}, "pools": SINGLE_AND_PAIR})
    for gpus, wanted in ((1, 2), (8, 8)):
        pool = pools.sized({"single": config.pools["single"]}, gpus)[0]
        options = pools._deployment(config, pool, 0, several=False)._deployment_config
        assert options.max_constructor_retry_count == wanted


def test_what_is_recorded_of_an_out_of_memory_goes_to_the_run():
    config = RunConfig.model_validate({"suite": "s", "out": "/runs/mine", "model": {"id": "m"}})
    assert pools.engine_spec(config).record_oom == "off"
    for written, meant in ((False, "off"), ("all", "all")):  # YAML reads a bare `off` as false
        changed = config.model_dump() | {"memory": {"record_oom": written}}
        spec = pools.engine_spec(RunConfig.model_validate(changed))
        assert (spec.record_oom, spec.oom_folder) == (meant, "/runs/mine/oom")


class Cluster:
    """Serve, Ray and the ledger as `Sharing` sees them: GPUs by node, rows by pool, and the pools that were closed."""

    def __init__(self, monkeypatch, *nodes, least=0, ranged=False, **rows):
        self.nodes, self.rows, self.now_s, self.up, self.closed = list(nodes), rows, 0.0, {"single": 2, "pair": 0}, []
        actor = SimpleNamespace(
            pools=self._remote(lambda: {name: (self.rows.get(name, 0), None, up) for name, up in self.up.items()}),
            close=self._remote(lambda pool, error: self.closed.append((pool, str(error)))),
            update_deployment_replicas=self._remote(lambda deployment, count: None),
        )
        ray = SimpleNamespace(
            get=lambda found, timeout=None: found,
            get_actor=lambda *_, **__: actor,
            cluster_resources=lambda: {"GPU": float(sum(self.nodes))},
            nodes=lambda: [{"Alive": True, "Resources": {"GPU": float(gpus)}} for gpus in self.nodes],
        )
        monkeypatch.setattr(pools, "ray", ray)
        monkeypatch.setattr(pools.time, "monotonic", lambda: self.now_s)
        self.unplaced = False
        waiting = {"id": {"name": "SERVE_REPLICA::app#pair#x", "state": "PENDING"}}
        monkeypatch.setattr(pools, "placement_group_table", lambda: waiting if self.unplaced else {})
        self.pair = SimpleNamespace(replica_states={}, status_trigger="CONFIG_UPDATE_STARTED", message="")
        status = SimpleNamespace(applications={"app": SimpleNamespace(deployments={"pair": self.pair})})
        monkeypatch.setattr(pools.serve, "status", lambda: status)
        gang = Pool(num_gpus=1, tensor_parallel_size=2, replicas=ReplicaRange(min=least, max=max(1, least)))
        single = Pool(num_gpus=1, replicas=ReplicaRange(min=1, max=2)) if ranged else Pool(num_gpus=1)
        configs = {"single": single, "pair": gang}
        self.sharing = pools.Sharing("app", sized(configs, int(sum(nodes))), actor)

    @staticmethod
    def _remote(call):
        return SimpleNamespace(remote=call)

    def step(self, seconds=1.0, times=1):
        changes = []
        for _ in range(times):
            self.now_s += seconds
            changes.append(self.sharing.step())
        return changes


def test_nothing_is_drained_for_a_gang_that_no_node_can_hold_and_its_rows_are_told(monkeypatch):
    cluster = Cluster(monkeypatch, 1, 1, single=50, pair=1)
    assert cluster.step(times=29) == [{}] * 29
    assert not cluster.closed
    cluster.step(5.0)
    assert cluster.closed == [("pair", "a replica takes 2 GPUs of one node, the largest has 1")]


@pytest.mark.parametrize("pair", [0, 1])
def test_nor_for_replicas_that_are_to_be_kept_for_nobody(monkeypatch, pair):
    cluster = Cluster(monkeypatch, 1, 1, least=1, single=50, pair=pair)
    changes = cluster.step(times=60)
    assert all(change.get("single", 2) == 2 for change in changes)
    assert bool(cluster.closed) == bool(pair)


def test_a_pool_that_does_not_start_is_closed_to_a_ledger_that_was_restarted_too(monkeypatch):
    cluster = Cluster(monkeypatch, 2, single=50, pair=1)
    assert cluster.step() == [{"single": 0, "pair": 1}]
    cluster.pair.status_trigger, cluster.pair.message = "REPLICA_STARTUP_FAILED", "actors.errors.OutOfMemory: too large"
    assert cluster.step(10.0) == [{"single": 2, "pair": 0}]
    assert cluster.closed == [("pair", "too large")]
    cluster.rows["pair"] = 0
    cluster.step(times=5)
    assert len(cluster.closed) == 1
    cluster.rows["pair"] = 3
    cluster.step()
    assert cluster.closed[1:] == [("pair", "too large")]


def test_a_gang_that_is_replaced_is_waited_for(monkeypatch):
    cluster = Cluster(monkeypatch, 2, single=50, pair=1)
    cluster.step()
    cluster.pair.status_trigger, cluster.pair.replica_states = "HEALTH_CHECK_FAILED", {"STARTING": 1}
    cluster.step(times=300)
    assert not cluster.closed
    cluster.pair.replica_states = {}
    cluster.step(times=40)
    assert cluster.closed[0] == ("pair", "pool pair cannot start: the log of Serve's controller says why")


def test_a_gang_that_ran_before_and_does_not_start_again_is_closed_after_two_tries(monkeypatch):
    """Serve calls such a pool healthy, and tries for ever."""
    cluster = Cluster(monkeypatch, 2, single=50, pair=1)
    cluster.step()
    cluster.pair.status_trigger, cluster.pair.replica_states = "CONFIG_UPDATE_COMPLETED", {"STARTING": 1}
    cluster.pair.message = "A replica failed to start with exception. Retrying. Error: (pid=1)\nValueError: of long ago"
    cluster.step(times=60)
    cluster.pair.message = "A replica failed to start with exception. Retrying. Error: (pid=2)\nValueError: no"
    cluster.step(times=60)
    assert not cluster.closed
    cluster.pair.message = "A replica failed to start with exception. Retrying. Error: (pid=3)\nValueError: no"
    cluster.step()
    assert cluster.closed == [("pair", "pool pair cannot start: ValueError: no")]
    assert cluster.sharing.now == {"single": 2, "pair": 0}


@pytest.mark.parametrize(("ranged", "least", "after_s"), [(False, 0, 60), (False, 1, 60), (True, 0, 1800)])
def test_a_gang_that_finds_no_gpus_when_all_room_is_made_is_closed(monkeypatch, ranged, least, after_s):
    """Another job has them, say, or the pool's labels are no node's."""
    cluster = Cluster(monkeypatch, 4, single=50, pair=1, ranged=ranged, least=least)
    cluster.up = {"single": 4, "pair": 0}
    cluster.pair.replica_states, cluster.unplaced = {"STARTING": 1}, True
    drained_s = 0 if ranged else 60  # two at once, then one each half minute
    if ranged:  # small replicas that are at work have what it wants
        cluster.step(times=2 * after_s)
        assert not cluster.closed
        cluster.rows["single"] = 0
    cluster.step(times=drained_s + after_s)
    assert not cluster.closed
    cluster.step(times=5)
    said = f"a replica takes 2 GPUs of one node, none had them in {after_s} s"
    assert cluster.closed[0] == ("pair", said)
    assert cluster.sharing.now["pair"] == 0


def test_a_gang_that_loads_beside_one_that_has_no_place_is_waited_for(monkeypatch):
    cluster = Cluster(monkeypatch, 4, single=50, pair=1, least=2)
    cluster.sharing.now = {"single": 0, "pair": 2}
    cluster.pair.replica_states, cluster.unplaced = {"STARTING": 2}, True
    cluster.step(times=300)
    assert not cluster.closed


def test_a_node_that_is_away_for_a_moment_closes_no_gang_that_waits(monkeypatch):
    cluster = Cluster(monkeypatch, 2, single=50, pair=1)
    cluster.pair.replica_states, cluster.unplaced = {"STARTING": 1}, True
    cluster.step(times=50)
    cluster.nodes = [1]
    cluster.step()
    assert not cluster.closed


def test_a_node_that_comes_back_in_time_gets_its_gang(monkeypatch):
    cluster = Cluster(monkeypatch, 1, 1, single=50, pair=1)
    cluster.step(times=20)
    cluster.nodes.append(2)
    assert cluster.step()[0]["pair"] == 1
    cluster.pair.replica_states = {"STARTING": 1}
    cluster.step(times=100)
    assert not cluster.closed

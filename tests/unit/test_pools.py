"""The start of a run's pools: each way from the flow chart of docs/memory.md, without Serve."""

from types import SimpleNamespace

import pytest

from actors.engine.protocol import Capacity
from actors.errors import Incomplete, OutOfMemory
from pipeline.config import RunConfig
from tests import starts
from tests.starts import pools

SINGLE_AND_PAIR = {"single": {}, "pair": {"tensor_parallel_size": 2}}
ANY, HALF = ("float32", "bfloat16"), ("bfloat16",)


def deployed(monkeypatch, fits, **changes):
    """What `deploy` gives and says, and what it tried, where replicas of the ranks in `fits` start in those dtypes."""
    roomy = SimpleNamespace(dtype="float32"), Capacity(8192, 8, 10, 100, 100, 0, 256)

    def describe(pool, spec):
        if spec.dtype not in fits.get(pool.tp, ()):
            raise OutOfMemory(f"the weights do not fit {pool.tp} GPUs", "load", 9 << 30, pool.tp << 30)
        return roomy

    fields = {"suite": "s", "out": "o", "model": {"id": "m", "dtype": "float32"}, "pools": SINGLE_AND_PAIR} | changes
    served, tried, said = starts.deployed(monkeypatch, RunConfig.model_validate(fields), describe)
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

"""Pools from the config, and what Serve's words mean."""

import pytest

from actors.errors import Incomplete, InputError, OutOfMemory
from pipeline.config import Pool
from pipeline.pools import failure, sized

SINGLE, PAIR = {"tensor_parallel_size": 1}, {"tensor_parallel_size": 2}
RANGE = {"replicas": {"min": 1, "max": 3}}


@pytest.mark.parametrize(
    ("pools", "gpus", "expected"),
    [
        # name, ranks, GPUs a rank, least, most, at the start, scaled by its load
        ({"single": SINGLE}, 0, [("single", 1, 0, 1, 1, 1, False)]),
        ({"single": SINGLE}, 8, [("single", 1, 1, 8, 8, 8, False)]),
        ({"pair": PAIR}, 8, [("pair", 2, 1, 4, 4, 4, False)]),
        ({"single": SINGLE | RANGE}, 8, [("single", 1, 1, 1, 3, 1, True)]),
        ({"pair": PAIR, "single": SINGLE}, 8, [("single", 1, 1, 0, 8, 8, False), ("pair", 2, 1, 0, 4, 0, False)]),
        ({"single": SINGLE, "pair": PAIR}, 0, [("single", 1, 0, 0, 1, 1, False), ("pair", 2, 0, 0, 1, 0, False)]),
        (
            {"single": SINGLE | {"replicas": 6}, "pair": PAIR | {"replicas": 1}},
            8,
            [("single", 1, 1, 0, 6, 6, False), ("pair", 2, 1, 1, 1, 1, False)],
        ),
        (
            {"single": SINGLE | RANGE, "pair": PAIR | {"replicas": {"min": 0, "max": 2}, "num_gpus": 1}},
            0,
            [("single", 1, 0, 1, 3, 1, True), ("pair", 2, 1, 0, 2, 0, False)],
        ),
    ],
)
def test_a_larger_pool_waits_for_the_rows_that_need_it(pools, gpus, expected):
    found = sized({name: Pool(**fields) for name, fields in pools.items()}, gpus)
    assert [(p.name, p.tp, p.gpus, p.least, p.most, p.first, p.by_load) for p in found] == expected


def test_why_no_replica_started():
    said = "The deployment failed to start 3 times in a row. Error:\nTraceback (most recent call last):\n  File x\n"
    oom = failure(said + "actors.errors.OutOfMemory: the weights of M take 65.00 GiB\n")
    assert isinstance(oom, OutOfMemory)
    assert (str(oom), oom.stage) == ("the weights of M take 65.00 GiB", "load")
    refused = failure(said + "actors.errors.UnsupportedModel: sinks\n\n")
    assert isinstance(refused, InputError)
    assert str(refused) == "sinks"
    other = failure(said + "OSError: disk\n")
    assert isinstance(other, Incomplete)
    assert "OSError: disk" in str(other)

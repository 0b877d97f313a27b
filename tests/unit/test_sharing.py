"""Which pool has the GPUs, and what Serve says of one that does not start."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from actors.engine.protocol import NO_PAGE
from actors.errors import Incomplete, InputError, OutOfMemory
from pipeline.config import Pool
from pipeline.sharing import LINGER_S, PATIENCE_S, Need, Turns, share, sized

SINGLE = Need("single", 1, 0, 2, rows=200)
PAIR = Need("pair", 2, 0, 1)
ONE, TWO = {"tensor_parallel_size": 1}, {"tensor_parallel_size": 2}
RANGE = {"replicas": {"min": 1, "max": 3}}


@pytest.mark.parametrize(
    ("pools", "gpus", "expected"),
    [
        # name, ranks, GPUs a rank, least, most, at the start, scaled by its load
        ({"single": ONE}, 0, [("single", 1, 0, 1, 1, 1, False)]),
        ({"single": ONE}, 8, [("single", 1, 1, 8, 8, 8, False)]),
        ({"pair": TWO}, 8, [("pair", 2, 1, 4, 4, 4, False)]),
        ({"single": ONE | RANGE}, 8, [("single", 1, 1, 1, 3, 1, True)]),
        ({"pair": TWO, "single": ONE}, 8, [("single", 1, 1, 0, 8, 8, False), ("pair", 2, 1, 0, 4, 0, False)]),
        ({"single": ONE, "pair": TWO}, 0, [("single", 1, 0, 0, 1, 1, False), ("pair", 2, 0, 0, 1, 0, False)]),
        (
            {"single": ONE | {"replicas": 6}, "pair": TWO | {"replicas": 1}},
            8,
            [("single", 1, 1, 0, 6, 6, False), ("pair", 2, 1, 1, 1, 1, False)],
        ),
        (
            {"single": ONE | RANGE, "pair": TWO | {"replicas": {"min": 0, "max": 2}, "num_gpus": 1}},
            0,
            [("single", 1, 0, 1, 3, 1, True), ("pair", 2, 1, 0, 2, 0, False)],
        ),
    ],
)
def test_a_larger_pool_waits_for_the_rows_that_need_it(pools, gpus, expected):
    found = sized({name: Pool(**fields) for name, fields in pools.items()}, gpus)
    assert [(p.name, p.tp, p.gpus, p.least, p.most, p.first, p.by_load) for p in found] == expected


def test_two_gpus_go_to_the_pair_while_it_has_rows_and_come_back():
    assert share(2, [SINGLE, PAIR]) == {"single": 2, "pair": 0}
    assert share(2, [SINGLE, replace(PAIR, rows=1)]) == {"single": 0, "pair": 1}


def test_only_as_many_are_drained_as_are_needed():
    single, pair = replace(SINGLE, most=8), replace(PAIR, most=4, rows=5)
    assert share(8, [single, pair]) == {"single": 6, "pair": 1}  # how many rows it takes is not known yet
    assert share(8, [single, replace(pair, slots=2)]) == {"single": 2, "pair": 3}
    assert share(8, [replace(single, least=4), replace(pair, slots=2)]) == {"single": 4, "pair": 2}
    assert share(8, [replace(single, most=3), pair]) == {"single": 3, "pair": 1}


def test_a_pool_that_is_kept_is_never_taken_for_another():
    four = Need("four", 4, 0, 2, rows=9)
    assert share(8, [SINGLE, replace(PAIR, least=1), four]) == {"single": 2, "pair": 1, "four": 1}


def test_after_the_large_rows_the_small_ones_have_a_turn_as_long():
    turns, busy = Turns(), replace(PAIR, rows=1)
    assert turns.share(2, [SINGLE, busy], 100)["pair"] == 1
    assert turns.share(2, [SINGLE, busy], 150)["pair"] == 1
    assert turns.share(2, [SINGLE, PAIR], 150 + LINGER_S - 1) == {"single": 0, "pair": 1}
    assert turns.share(2, [SINGLE, PAIR], 160) == {"single": 2, "pair": 0}
    assert turns.share(2, [SINGLE, busy], 219) == {"single": 2, "pair": 0}
    assert turns.share(2, [replace(SINGLE, rows=0), busy], 219.5)["pair"] == 1, "nobody else wants them"
    turns = Turns()
    turns.share(2, [SINGLE, busy], 100)
    turns.share(2, [SINGLE, PAIR], 160)
    assert turns.share(2, [SINGLE, busy], 221)["pair"] == 1


def test_where_free_gpus_lie_apart_more_are_drained():
    turns, busy, single = Turns(), replace(PAIR, rows=1, unplaced=1), replace(SINGLE, most=4)
    assert turns.share(4, [single, busy], 0)["single"] == 2
    assert turns.share(4, [single, busy], PATIENCE_S + 1)["single"] == 1
    assert turns.share(4, [single, busy], 2 * PATIENCE_S + 3)["single"] == 0
    assert turns.share(4, [single, replace(busy, unplaced=0)], 100)["single"] == 2


@st.composite
def clusters(draw):
    gpus = draw(st.integers(1, 32))
    sizes = sorted(draw(st.sets(st.sampled_from([1, 2, 4, 8]), min_size=2)))
    needs, left = [], gpus
    for size in sizes:
        least = draw(st.integers(0, min(1, left // size)))
        left -= least * size
        most = draw(st.integers(max(1, least), 32))
        rows = draw(st.integers(0, 99))
        needs.append(Need(f"of{size}", size, least, most, rows, draw(st.none() | st.integers(1, 64))))
    return gpus, needs


@given(clusters(), st.integers(0, 3))
def test_no_more_than_there_is_and_nobody_is_forgotten(cluster, spare):
    gpus, needs = cluster
    found = share(gpus, needs, spare)
    assert sum(found[need.name] * need.gpus for need in needs) <= gpus
    for need in needs:
        assert need.least <= found[need.name] <= need.most
    kept = sum(need.least * need.gpus for need in needs)
    wanting = [need for need in needs if need.rows and need.gpus + kept <= gpus]
    if wanting:
        assert found[wanting[-1].name] > 0, "the largest that fits has a replica"
    if not any(need.rows for need in needs[1:]):
        first = needs[0]
        free = gpus - sum(need.least * need.gpus for need in needs[1:])
        assert found[first.name] == min(first.most, free // first.gpus), "idle pools give everything back"


@given(clusters(), st.lists(st.tuples(st.integers(1, 60), st.integers(0, 3)), max_size=30))
def test_every_pool_with_rows_gets_its_turn(cluster, events):
    gpus, needs = cluster
    needs = [replace(need, least=0, rows=1) for need in needs]
    turns, now_s = Turns(), 0.0
    for pause_s, pool in events:
        now_s += pause_s
        needs = [replace(need, rows=need.rows ^ (i == pool)) for i, need in enumerate(needs)]
        found = turns.share(gpus, needs, now_s)
        assert sum(found[need.name] * need.gpus for need in needs) <= gpus
    # From now on a pool that has its turn ends its rows.
    needs = [replace(need, rows=1) for need in needs if need.gpus <= gpus]
    if len(needs) < 2:
        return
    for _ in range(200):
        now_s += 30
        found = turns.share(gpus, needs, now_s)
        needs = [replace(need, rows=0 if found[need.name] else need.rows) for need in needs]
    assert not any(need.rows for need in needs)


@pytest.mark.filterwarnings("ignore:.*extra keyword arguments:DeprecationWarning")
def test_why_no_replica_started():
    from pipeline.pools import failure

    said = "The deployment failed to start 3 times in a row. Error:\nTraceback (most recent call last):\n  File x\n"
    oom = failure(said + "actors.errors.OutOfMemory: the weights of M take 65.00 GiB\n")
    assert isinstance(oom, OutOfMemory)
    assert (str(oom), oom.stage) == ("the weights of M take 65.00 GiB", "load")
    short = failure(said + f"actors.errors.OutOfMemory: {NO_PAGE}: a page takes 36 MiB, 3 MiB are left\n")
    assert short.stage == "never_fits"
    refused = failure(said + "actors.errors.UnsupportedModel: sinks\n\n")
    assert isinstance(refused, InputError)
    assert str(refused) == "sinks"
    other = failure(said + "OSError: disk\n")
    assert isinstance(other, Incomplete)
    assert "OSError: disk" in str(other)


def test_where_nothing_is_drained_a_second_gang_does_not_wait_for_a_turn():
    turns, busy = Turns(), replace(PAIR, rows=1)
    assert turns.share(1 << 20, [SINGLE, busy], 0) == {"single": 2, "pair": 1}
    assert turns.share(1 << 20, [SINGLE, busy], 300)["pair"] == 1
    assert turns.share(1 << 20, [SINGLE, PAIR], 300 + LINGER_S - 1)["pair"] == 1
    assert turns.share(1 << 20, [SINGLE, PAIR], 300 + LINGER_S)["pair"] == 0
    assert turns.share(1 << 20, [SINGLE, busy], 307)["pair"] == 1

"""Which pool has the GPUs."""

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from pipeline.sharing import LINGER_S, PATIENCE_S, Need, Turns, share

SINGLE = Need("single", 1, 0, 2, rows=200)
PAIR = Need("pair", 2, 0, 1)


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

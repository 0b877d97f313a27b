"""The ladder: every branch walked, and what holds for all of them."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from actors.ladder import (
    FOR_A_ROW,
    LOSSY,
    MIN_PREFILL_TOKENS,
    OFFERED,
    RUNGS,
    GiveUp,
    Hardware,
    Rung,
    Shortage,
    Standing,
    first_that_fits,
    next_rung,
    order,
)

CAUSES = ["load", "capture", "prefill", "decode", "never_fits", "dead_context", "rank_lost"]
ONE_GPU = Hardware(gpus_per_node=1, kv_heads=8)
EIGHT_GPUS = Hardware(gpus_per_node=8, kv_heads=8)
START = Standing(max_batch=8, max_prefill_tokens=256, dtype="float32", attempts=1)
SMALLEST = Standing(attempts=1)
WITHOUT = OFFERED - {"kv_int8", "kv_fp8"}
KV = WITHOUT | {"kv_int8"}


def names(cause, standing, hardware, policy, **options):
    """The rungs from here on down to giving up, an attempt each."""
    found = []
    while True:
        rung = next_rung(cause, standing, hardware, policy, max_attempts=99, **options)
        if isinstance(rung, GiveUp):
            return found, rung.reason
        found.append(rung.name if rung.name != "shard" else f"shard {rung.standing.tp}")
        standing = replace(rung.standing, attempts=standing.attempts + 1)


def test_same_precision_halves_the_batch_and_then_shards():
    found, reason = names("decode", START, EIGHT_GPUS, "same_precision")
    assert found == ["smaller_batch"] * 3 + ["shard 2", "shard 4", "shard 8"]
    assert "smaller_batch: already batch 1 and 64 prefill tokens" in reason
    assert "shard: no pool is sharded over more than 8" in reason
    rung = next_rung("prefill", START, EIGHT_GPUS)
    assert rung == Rung("smaller_batch", replace(START, max_batch=4, max_prefill_tokens=128))


@pytest.mark.parametrize(
    ("cause", "expected"),
    [
        ("load", ["shard 2", "shard 4", "shard 8"]),  # a batch makes no weights smaller
        ("never_fits", ["shard 2", "shard 4", "shard 8"]),  # nor one row shorter
        ("prefill", ["smaller_batch"] * 3 + ["shard 2", "shard 4", "shard 8"]),
    ],
)
def test_each_cause_gets_what_bears_on_it(cause, expected):
    assert names(cause, START, EIGHT_GPUS, "same_precision")[0] == expected


@pytest.mark.parametrize("cause", ["dead_context", "rank_lost"])
@pytest.mark.parametrize("policy", ["same_precision", "memory_first", ["kv_int8"]])
def test_what_is_no_lack_of_memory_is_tried_again_as_it_was_and_not_for_ever(cause, policy):
    assert next_rung(cause, START, ONE_GPU, policy) == Rung("again", START)
    given_up = next_rung(cause, replace(START, attempts=3), ONE_GPU, policy)
    assert isinstance(given_up, GiveUp)
    assert given_up.reason.startswith("3 of 3 attempts are used; the last: " + cause)


def test_a_failed_capture_goes_on_uncaptured_and_then_like_any_other():
    rung = next_rung("capture", replace(START, graphs=True), ONE_GPU)
    assert rung == Rung("uncaptured", START)
    assert next_rung("capture", START, ONE_GPU).name == "smaller_batch"


@pytest.mark.parametrize(
    ("hardware", "tp", "expected", "why"),
    [
        (Hardware(8, 3), 1, None, "3 KV heads do not divide by 2, 3 KV heads do not divide by 4"),
        (Hardware(8, 2), 1, 2, ""),
        (Hardware(8, 2), 2, None, "2 KV heads do not divide by 4"),
        (Hardware(2, 8), 2, None, "4 GPUs on a node are wanted, there are 2"),
        (Hardware(1, 8), 1, None, "2 GPUs on a node are wanted, there are 1"),
        (Hardware(8, 8), 4, 8, ""),
    ],
)
def test_only_legal_gangs_are_formed(hardware, tp, expected, why):
    rung = next_rung("load", replace(SMALLEST, tp=tp), hardware)
    if expected is None:
        assert isinstance(rung, GiveUp)
        assert why in rung.reason
    else:
        assert (rung.name, rung.standing.tp, rung.standing.pool, rung.lossy) == ("shard", expected, "sharded", False)


def test_only_the_pools_of_the_run_are_gone_to():
    of_the_run = Hardware(gangs=((2, "pair"), (8, "node")))
    assert names("never_fits", SMALLEST, of_the_run, "same_precision")[0] == ["shard 2", "shard 8"]
    assert next_rung("never_fits", SMALLEST, of_the_run).standing.pool == "pair"
    assert next_rung("never_fits", replace(SMALLEST, tp=2), of_the_run).standing.pool == "node"
    given_up = next_rung("never_fits", SMALLEST, Hardware(gangs=()))
    assert "shard: no pool is sharded over more than 1" in given_up.reason


def test_giving_up_says_what_was_needed_and_why_each_rung_is_closed():
    shortage = Shortage(needed_bytes=12 << 30, free_bytes=9 << 29)
    rung = next_rung("never_fits", SMALLEST, Hardware(1, 3), shortage=shortage)
    assert rung == GiveUp(
        "never_fits on single (tensor parallel 1, batch 1): needs 12.00 GiB, has 4.50 GiB; smaller_batch: the row is "
        "alone already; shard: 3 KV heads do not divide by 2, 3 KV heads do not divide by 4, 3 KV heads do not divide "
        "by 8"
    )


def test_a_list_is_followed_as_it_is_written():
    everything = frozenset(RUNGS)
    assert names("decode", START, EIGHT_GPUS, ["shard", "weights_int8", "kv_fp8"], offered=everything)[0] == [
        "shard 2", "shard 4", "shard 8", "weights_int8", "kv_fp8",
    ]  # fmt: skip
    found, reason = names("decode", START, ONE_GPU, ["kv_sparse"])
    assert found == []
    assert "kv_sparse: the engine does not do it" in reason
    rung = next_rung("load", START, ONE_GPU, ["kv_sparse", "weights_int8"], offered=everything)
    assert (rung.name, rung.lossy, rung.standing.weights_dtype) == ("weights_int8", True, "int8")
    for policy in ("memory_frist", ["smaller_bach"]):
        with pytest.raises(ValueError, match="no such policy"):
            order(policy)


def model(weights, kv, step):
    """What a toy model fails at in 10 units of memory; the numbers are in float32, on one GPU, for a batch of 8."""

    def fails(at: Standing):
        size = 1 if at.dtype == "float32" else 0.5
        w = weights * size * (0.5 if at.weights_dtype != "auto" else 1) / at.tp
        row = kv * size * (0.5 if at.kv_dtype != "auto" else 1) / at.tp
        s = step * size * at.max_batch / 8 / at.tp
        if w > 10:
            return "load"
        if w + row > 10:
            return "never_fits"
        return "decode" if w + row + s > 10 else None

    return fails


@pytest.mark.parametrize(
    ("weights", "kv", "step", "hardware", "offered", "path", "lossy"),
    [
        (4, 3, 2, ONE_GPU, KV, ("start", 1, "float32", "auto", 8), False),  # fits
        (12, 3, 2, ONE_GPU, KV, ("half_precision", 1, "bfloat16", "auto", 8), True),
        (12, 8, 1, ONE_GPU, KV, ("kv_int8", 1, "bfloat16", "int8", 8), True),
        (12, 8, 6, EIGHT_GPUS, KV, ("shard", 2, "bfloat16", "int8", 8), True),  # several GPUs
        (12, 8, 6, ONE_GPU, KV, ("smaller_batch", 1, "bfloat16", "int8", 4), True),  # one
        (12, 8, 6, Hardware(8, 3), KV, ("smaller_batch", 1, "bfloat16", "int8", 4), True),  # that do not divide
        (12, 8, 6, EIGHT_GPUS, WITHOUT, ("shard", 2, "bfloat16", "auto", 8), True),  # an engine without KV compression
        (24, 8, 6, EIGHT_GPUS, KV, ("shard", 2, "bfloat16", "auto", 8), True),  # the weights fit no single GPU
        (12, 8, 80, EIGHT_GPUS, KV, ("shard", 8, "bfloat16", "int8", 8), True),
        (12, 8, 400, EIGHT_GPUS, KV, ("smaller_batch", 8, "bfloat16", "int8", 2), True),  # all GPUs, then the batch
    ],
)
def test_memory_first_walks_every_branch(weights, kv, step, hardware, offered, path, lossy):
    rung = first_that_fits(START, model(weights, kv, step), hardware, "memory_first", offered=offered)
    assert isinstance(rung, Rung)
    at = rung.standing
    assert (rung.name, at.tp, at.dtype, at.kv_dtype, at.max_batch) == path
    assert rung.lossy is lossy


def test_memory_first_gives_up_where_nothing_fits():
    given_up = first_that_fits(
        START, model(90, 1, 1), ONE_GPU, "memory_first", offered=KV, shortage=Shortage(90 << 30, 10 << 30)
    )
    assert isinstance(given_up, GiveUp)
    for words in (
        "needs 90.00 GiB, has 10.00 GiB",
        "half_precision: already bfloat16",
        "kv_int8: does not make the weights smaller",
        "kv_fp8: ",
        "shard: 2 GPUs on a node are wanted, there are 1",
        "smaller_batch: does not make the weights smaller",
    ):
        assert words in given_up.reason


@pytest.mark.parametrize("policy", ["memory_first", ["weights_int8", "kv_fp8", "half_precision"]])
def test_no_precision_is_changed_for_one_row(policy):
    found, reason = names("never_fits", START, EIGHT_GPUS, policy, offered=FOR_A_ROW)
    assert found == (["shard 2", "shard 4", "shard 8"] if policy == "memory_first" else [])
    for name in LOSSY & set(order(policy)) - {"kv_sparse"}:
        assert f"{name}: for a whole run only, at its start" in reason


def test_a_prediction_of_a_dead_context_is_a_mistake():
    with pytest.raises(ValueError, match="rank_lost"):
        first_that_fits(START, lambda at: "rank_lost", ONE_GPU)


standings = st.builds(
    Standing,
    tp=st.sampled_from([1, 2, 3, 4, 8]),
    max_batch=st.integers(1, 512),
    max_prefill_tokens=st.integers(1, 16384),
    dtype=st.sampled_from(["float32", "float16", "bfloat16"]),
    kv_dtype=st.sampled_from(["auto", "int8", "fp8"]),
    weights_dtype=st.sampled_from(["auto", "int8"]),
    graphs=st.booleans(),
    attempts=st.integers(0, 3),
)
hardwares = st.builds(Hardware, gpus_per_node=st.integers(0, 16), kv_heads=st.integers(1, 32))
policies = st.sampled_from(["same_precision", "memory_first"]) | st.lists(st.sampled_from(RUNGS), max_size=7)
offers = st.frozensets(st.sampled_from(RUNGS))


@given(
    causes=st.lists(st.sampled_from(CAUSES), min_size=1, max_size=9),
    standing=standings,
    hardware=hardwares,
    policy=policies,
    offered=offers,
    most=st.integers(1, 9),
)
def test_a_row_is_tried_a_bounded_number_of_times_and_on_legal_rungs_only(
    causes, standing, hardware, policy, offered, most
):
    first, tries = standing, 0
    while True:
        cause = causes[tries % len(causes)]
        rung = next_rung(cause, standing, hardware, policy, offered=offered, max_attempts=most)
        if isinstance(rung, GiveUp):
            break
        tries += 1
        now = rung.standing
        if rung.name in ("again", "uncaptured"):
            assert cause in ("dead_context", "rank_lost", "capture")
        else:
            assert rung.name in offered
            assert rung.name in order(policy)
        if now.tp != standing.tp:
            assert hardware.kv_heads % now.tp == 0
            assert now.tp <= hardware.gpus_per_node
        assert rung.lossy == (rung.name in LOSSY)
        if policy == "same_precision":
            assert not rung.lossy
            assert (now.dtype, now.kv_dtype, now.weights_dtype) == (first.dtype, first.kv_dtype, first.weights_dtype)
        assert 1 <= now.max_batch <= standing.max_batch
        assert min(MIN_PREFILL_TOKENS, standing.max_prefill_tokens) <= now.max_prefill_tokens
        standing = replace(now, attempts=standing.attempts + 1)
    assert tries <= max(0, most - first.attempts)


@given(
    cause=st.sampled_from(["load", "prefill", "decode", "never_fits"]),
    standing=standings,
    hardware=hardwares,
    policy=policies,
    offered=offers,
)
def test_a_climb_ends_even_where_nothing_ever_fits(cause, standing, hardware, policy, offered):
    seen = []

    def fails(at):
        assert at not in seen
        seen.append(at)
        return cause

    assert isinstance(first_that_fits(standing, fails, hardware, policy, offered=offered), GiveUp)
    assert len(seen) < 40


@pytest.mark.parametrize(
    ("cause", "standing", "expected"),
    [
        # as `deploy` asks: the model fits no replica of the smallest pool
        ("load", Standing("single", dtype="float32"), ["half_precision", "shard 2"]),
        ("load", Standing("single"), ["shard 2"]),
        ("load", Standing("pair", tp=2), []),
        # as a row asks that its engine gave back: alone, at the smallest bound
        ("prefill", SMALLEST, ["shard 2"]),
        ("decode", SMALLEST, ["shard 2"]),
        ("never_fits", SMALLEST, ["shard 2"]),
        ("never_fits", replace(SMALLEST, pool="pair", tp=2), []),
    ],
)
def test_memory_first_with_what_the_engine_does_today_in_a_run_of_two_pools(cause, standing, expected):
    of_the_run = Hardware(gangs=((1, "single"), (2, "pair")))
    offered = OFFERED if cause == "load" else FOR_A_ROW
    assert names(cause, standing, of_the_run, "memory_first", offered=offered)[0] == expected


def test_memory_first_takes_each_compression_where_the_one_before_is_not_done():
    half = replace(START, dtype="bfloat16")
    for kind in ("int8", "fp8", "sparse"):
        rung = next_rung("decode", half, EIGHT_GPUS, "memory_first", offered=FOR_A_ROW | {f"kv_{kind}"})
        assert (rung.name, rung.standing.kv_dtype, rung.lossy) == (f"kv_{kind}", kind, True)

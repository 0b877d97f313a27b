"""What a run's start does where the model, or its longest row, does not fit: the whole run on one rung, and said."""

import re

import pytest

from actors.engine.protocol import NO_PAGE, Capacity
from actors.errors import Incomplete, OutOfMemory
from actors.messages import Numerics
from pipeline.config import load_run
from tests import starts
from tests.unit.test_config import ROOT

pytestmark = pytest.mark.filterwarnings("ignore:.*extra keyword arguments:DeprecationWarning")
TWO = "pools={single: {num_gpus: 1}, pair: {num_gpus: 1, tensor_parallel_size: 2}}"
ONE = "pools={single: {num_gpus: 1}}"


def started(monkeypatch, sets, weights, kv_tokens, longest=4000):
    """`deploy` on two made-up GPUs of 100 units: a float32 model takes `weights`, a pool of what is left holds
    `kv_tokens` where nothing else lies on the GPU.

    Returns:
        what is served; the specs that were started; what was said.
    """

    def describe(pool, spec):
        size = 0.5 if spec.dtype == "bfloat16" else 1.0
        left = 100 - weights * (0.25 if spec.quantization else size) / pool.tp
        if left <= 0:
            raise OutOfMemory("the weights do not fit", "load")
        pages = int(kv_tokens * left / 100 / (0.25 if spec.kv_dtype != "auto" else size) * pool.tp) // 256
        if pages < 1:
            raise OutOfMemory(f"{NO_PAGE}: nothing left", "never_fits")
        kv_dtype = spec.dtype if spec.kv_dtype == "auto" else spec.kv_dtype
        weights_dtype = spec.quantization or spec.dtype
        numerics = Numerics("paged", "sdpa", spec.dtype, kv_dtype, weights_dtype, pool.tp, "commit", False)
        return numerics, Capacity(8192, 8, 10, pages, pages, 0, 256)

    config = load_run(ROOT / "configs" / "quickstart.yaml", ["model.dtype=float32", *sets])
    served, tried, said = starts.deployed(monkeypatch, config, describe, longest)
    return served, [(pool.tp, spec.dtype, spec.kv_dtype, spec.quantization) for pool, spec in tried], said


def test_what_fits_is_left_as_it_is(monkeypatch):
    served, tried, said = started(monkeypatch, [TWO, "fallback=memory_first"], 50, 10_000)
    assert (served.rung, tried, said) == ("start", [(1, "float32", "auto", None)], [])


@pytest.mark.parametrize(
    ("fallback", "weights", "kv_tokens", "rung", "numerics"),
    [
        # float32 leaves 10 units for 800 tokens; bfloat16 fits.
        ("memory_first", 90, 8_000, "half_precision", ("single", "bfloat16", "bfloat16", "bfloat16")),
        # 55 units hold 2,200 tokens in bfloat16, 4,400 in int8.
        ("memory_first", 90, 2_000, "kv_int8", ("single", "bfloat16", "int8", "bfloat16")),
        ("[kv_fp8]", 50, 4_000, "kv_fp8", ("single", "float32", "fp8", "float32")),
        ("[weights_int8, kv_fp8]", 99, 6_000, "weights_int8", ("single", "float32", "float32", "int8")),
        ("[weights_int8, kv_fp8]", 99, 2_000, "kv_fp8", ("single", "float32", "fp8", "int8")),
        # No page fits: of weights that fit.
        ("[kv_int8]", 99, 20_000, "kv_int8", ("single", "float32", "int8", "float32")),
        # Weights that fit no single GPU in any precision it may have.
        ("memory_first", 210, 8_000, "shard", ("pair", "bfloat16", "bfloat16", "bfloat16")),
        # Two GPUs for the rows that need them come first, so that no row changes its precision.
        ("[shard, kv_int8]", 50, 4_000, "start", ("single", "float32", "float32", "float32")),
        ("same_precision", 50, 4_000, "start", ("single", "float32", "float32", "float32")),
        # Nothing helps the longest row: it is left to the row, which fails with the numbers.
        ("memory_first", 90, 500, "kv_int8", ("single", "bfloat16", "int8", "bfloat16")),
    ],
)
def test_a_rung_that_changes_the_precision_is_for_the_whole_run(
    monkeypatch, fallback, weights, kv_tokens, rung, numerics
):
    longest = 2800 if kv_tokens == 20_000 else 4000
    served, tried, said = started(monkeypatch, [TWO, f"fallback={fallback}"], weights, kv_tokens, longest)
    found = served.numerics
    assert (served.rung, served.pools[0].name, found.dtype, found.kv_dtype, found.weights_dtype) == (rung, *numerics)
    if said:
        assert f"next: {rung}, " in said[-1]
        assert f"KV {tried[-1][2]}, weights {tried[-1][3] or 'auto'}" in said[-1]
    if rung == "kv_int8" and kv_tokens == 2_000:
        assert re.match(r"the longest row may take 4,000 tokens, a replica's KV holds [\d,]+; next: kv_int8", said[-1])


def test_only_what_the_engine_does_is_tried(monkeypatch):
    served, tried, _ = started(monkeypatch, [ONE, "fallback=[kv_int8]", "engine=tests.scripted:engine"], 50, 4_000)
    assert (served.rung, len(tried)) == ("start", 1)
    with pytest.raises(
        Incomplete, match=r"half_precision: for a whole run.*kv_int8: does not make the weights smaller"
    ):
        started(monkeypatch, [ONE, "fallback=[half_precision, kv_int8]", "numerics=invariant"], 150, 4_000)


def test_the_longest_row_is_not_asked_for_where_no_precision_may_change(monkeypatch):
    served, _, _ = started(monkeypatch, [TWO], 50, 1_000, longest=None)
    assert served.rung == "start"

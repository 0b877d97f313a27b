"""On two GPUs: a gang over NCCL against one process, with compiled layers, CUDA graphs, and a step that fails on one
rank only.
"""

import pytest
import torch
from torch._dynamo.utils import counters

from actors.engine.assemble import over_model
from tests import ranks
from tests.unit.test_engine_equality import GREEDY, together, tokens

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA GPUs"),
]

OPTIONS = {"pages": 40, "page_tokens": 256, "max_model_len": 1024, "max_batch": 8, "max_prefill_tokens": 512}
WIDE = {"head_dim": 64, "hidden_size": 256, "intermediate_size": 512}


@pytest.fixture(scope="module")
def other():
    with ranks.seats(1, CUDA_VISIBLE_DEVICES="1") as [seat]:
        yield seat


def answers(other, name, on, fail=None, **options):
    """Rank 0's answers, its engine, which is closed, and the batch sizes that it had captured."""
    seat = {"name": name, "size": 2, "port": ranks.free_port(), "on": on, "options": OPTIONS | options, "changes": WIDE}
    other.tell(rank=1, **seat, **(fail or {}))
    engine = ranks.engine(rank=0, **seat)
    compiled = counters["stats"]["unique_graphs"]
    try:
        got = together(engine, GREEDY), engine, engine._runner._runner.captured
        assert counters["stats"]["unique_graphs"] == compiled  # in a step the other rank would wait for it
        return got
    finally:
        engine.close()
        assert other.heard() == "closed"


def one_gpu(name, dtype, **options):
    torch._dynamo.reset()
    model = ranks.shape(name, **WIDE).to("cuda", dtype)
    engine = over_model(model, **(OPTIONS | options))
    try:
        return together(engine, GREEDY)
    finally:
        engine.close()


@pytest.mark.parametrize("name", ["llama", "qwen3", "qwen3_moe", "gemma2"])
def test_fp32_tokens_are_those_of_one_gpu(other, name):
    got, _, _ = answers(other, name, "cuda float32", kernel="reference")
    assert tokens(got) == tokens(one_gpu(name, torch.float32, kernel="reference"))


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_half_precision_with_graphs_and_a_failing_rank(other, name):
    got, engine, captured = answers(other, name, "cuda bfloat16")
    assert captured
    assert engine.events["errors"] == 0
    assert engine.numerics.kernel.endswith("+compiled")
    expected = one_gpu(name, torch.bfloat16)
    assert sum(a.token_ids[0] == b.token_ids[0] for a, b in zip(got, expected, strict=True)) >= len(GREEDY) - 1
    # Where the pages are given the start runs no largest steps: the first forward compiles, the second is a prefill.
    again, engine, _ = answers(other, name, "cuda bfloat16", graphs=False, fail={"fail_at": 2})
    assert engine.numerics.kernel.endswith("+compiled")
    assert engine.events["oom_prefill"] == 1
    assert sum(a.token_ids[0] == b.token_ids[0] for a, b in zip(again, expected, strict=True)) >= len(GREEDY) - 1


def test_layers_that_one_rank_cannot_compile_run_as_they_are_on_both(other):
    fail = {"fail_at": 1, "error": "RuntimeError"}
    got, engine, captured = answers(other, "llama", "cuda bfloat16", fail=fail)
    assert captured
    assert not engine.numerics.kernel.endswith("+compiled")
    expected = one_gpu("llama", torch.bfloat16, compile="off")
    assert sum(a.token_ids[0] == b.token_ids[0] for a, b in zip(got, expected, strict=True)) >= len(GREEDY) - 1


def test_experts_over_ranks_are_not_compiled(other):
    _, engine, captured = answers(other, "qwen3_moe", "cuda bfloat16", compile="on")
    assert captured
    assert not engine.numerics.kernel.endswith("+compiled")

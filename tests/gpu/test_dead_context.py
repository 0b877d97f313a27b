"""On a GPU: a CUDA context that a kernel has broken ends its engine's process, and the next process computes on."""

import warnings

import pytest
import torch

from actors.engine import EngineSpec
from tests.unit.test_process import check_poisoned

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # Ray's own
    from bench.replica import write_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]


@pytest.mark.parametrize("how", ["assert", "address"])
async def test_a_broken_context_ends_the_process_and_the_next_one_answers_as_before(tmp_path, how):
    """In fp32, in which the answers of two processes are the same. The budget leaves room for what this one holds."""
    model = str(write_model(tmp_path / "model", "tiny", "cpu"))
    sizes = {"max_batch": 8, "max_model_len": 1024, "max_prefill_tokens": 512, "kv_pages": 40}
    await check_poisoned(EngineSpec(model, dtype="float32", budget_fraction=0.3, **sizes), how)

"""One rule for what counts as out of memory, wherever it happens."""

import types

import pytest
import torch

from actors.engine import gang as gang_module
from actors.engine.bounds import Bounds
from actors.engine.gang import Gang
from actors.engine.oom import RankFailed, is_out_of_memory
from actors.errors import EngineDead, OutOfMemory

UNLAUNCHED = RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasGemmEx(...)`")


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("tried to allocate 2.00 GiB"),
        MemoryError(),
        OutOfMemory("no room"),
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory"),
    ],
    ids=str,
)
def test_what_says_so_is_out_of_memory_on_any_context(error):
    assert is_out_of_memory(error, works=lambda: False)


@pytest.mark.parametrize("status", ["NOT_INITIALIZED", "EXECUTION_FAILED", "INTERNAL_ERROR"])
def test_a_kernel_that_could_not_be_loaded_is_out_of_memory_on_a_living_context(status):
    error = RuntimeError(f"CUDA error: CUBLAS_STATUS_{status} when calling `cublasGemmEx(...)`")
    assert is_out_of_memory(error, works=lambda: True)
    assert not is_out_of_memory(error, works=lambda: False)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("CUDA error: an illegal memory access was encountered"),
        ValueError("CUBLAS_STATUS_INVALID_VALUE"),
        EngineDead("a rank of the gang is lost: NCCL error: out of memory"),
        RankFailed(f"rank 1: {UNLAUNCHED}"),  # on that rank's context, which it has asked itself
    ],
    ids=str,
)
def test_other_failures_are_not(error):
    assert not is_out_of_memory(error, works=lambda: True)


@pytest.mark.parametrize(("alive", "raised"), [(True, torch.OutOfMemoryError), (False, RankFailed)])
def test_each_rank_judges_by_its_own_context(monkeypatch, alive, raised):
    """One seat of two whose exchange brings back what it said itself."""
    gang = Gang.__new__(Gang)
    gang.rank, gang.size, gang.device, gang.deadline_s = 1, 2, torch.device("cuda"), 60.0
    monkeypatch.setattr(gang, "_exchange", lambda status, op, timeout_s: None)
    monkeypatch.setattr(gang_module, "device_works", lambda device: alive)
    with pytest.raises(raised, match="rank 1: RuntimeError: CUDA error: CUBLAS_STATUS_EXECUTION_FAILED"):
        gang.agree(UNLAUNCHED)


def test_the_profile_pass_halves_after_any_of_them(monkeypatch):
    """A step of more than 100 tokens finds no room for a kernel of cuBLAS."""
    for name in ("memory_allocated", "memory_reserved"):
        monkeypatch.setattr(torch.cuda, name, lambda device: 0)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (0, 0))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)

    def profile(max_prefill_tokens=None, max_batch=None):
        if (max_prefill_tokens or runner.max_prefill_tokens) > 100:
            raise UNLAUNCHED
        return 1

    runner = types.SimpleNamespace(
        max_prefill_tokens=512, max_batch=4, kv=types.SimpleNamespace(device=torch.device("cuda")), profile=profile
    )
    bounds = Bounds(runner)
    bounds.measure(0)
    assert runner.max_prefill_tokens == 64
    assert bounds.events["prefill_halved"] == 3
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: (_ for _ in ()).throw(RuntimeError("dead")))
    runner.max_prefill_tokens = 512
    with pytest.raises(RuntimeError, match="EXECUTION_FAILED"):
        bounds.measure(0)

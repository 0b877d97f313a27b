"""The paged engine, whose CUDA context is broken when it is told so, in the fourth step from then on."""

from dataclasses import replace
from typing import Any

import torch

from actors.engine import assemble
from actors.engine.paged import PagedEngine
from actors.engine.protocol import EngineSpec
from bench.common import runner_of

STEP = 4

if torch.cuda.is_available():
    import triton
    import triton.language as tl

    @triton.jit
    def write_far_away(at):
        tl.store(at + (1 << 40), 1)


def break_context(how: str) -> None:
    """By a failing assertion of a kernel, which is waited for, or a write to an address of nobody's, which is not."""
    if how == "assert":
        _ = torch.zeros(1, device="cuda")[torch.tensor([10**6], device="cuda")]
        torch.cuda.synchronize()
    elif how == "address":
        write_far_away[(1,)](torch.zeros(1, dtype=torch.int32, device="cuda"))
    else:  # as it would read, where there is no GPU
        raise RuntimeError("CUDA error: device-side assert triggered")


def build(spec: EngineSpec) -> PagedEngine:
    engine: Any = assemble.build(replace(spec, engine="paged"))
    runner, told = runner_of(engine), {}
    start = runner._start

    def poisoned(*args):
        if told:
            told["left"] -= 1
            if told["left"] == 0:
                break_context(told["how"])
        return start(*args)

    runner._start = poisoned
    engine.poison = lambda how: told.update(how=how, left=STEP)
    return engine

"""Does an attention kernel compute what it should, on this device, for this model's shapes? Asked once at start.

A build of flash-attn that was compiled for some head dimensions only returns noise for the others, and says nothing
(seen: head dimension 256 on a build for 64 and 128). A wrong score would be all that a user ever saw of it.
Knows no model weights.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import accumulate, chain, repeat
from typing import Any

import torch
from torch import Tensor

from actors.engine.attention import RUNS, Kernel, Plan, Row, Units, attend, check_kernel, queries_a_tile
from actors.engine.kv import KVCache, kv_shapes
from actors.engine.oom import is_out_of_memory
from actors.engine.support import window_of
from actors.errors import UnsupportedModel

MAX_ERROR = 0.03
"""‖out − reference‖ / ‖reference‖; bf16 and fp16 stay below 0.01."""
LENGTHS = (300, 20, 1)
SHARED_PAGES = 2
"""Of the run that all rows but the last begin with, in the check of shared runs."""

log = logging.getLogger(__name__)


def first_right(kernels: Sequence[Kernel], cache_of: Callable[[Kernel], KVCache], config: Any) -> Kernel:
    """The first of `kernels` that does this model's shapes, and right; each that does not is logged.

    Args:
        cache_of: a KV cache with the kernel's pages.

    Raises:
        UnsupportedModel: none does; says why not, each by its name.
    """
    reasons: list[str] = []
    failure: Exception | None = None
    for kernel in kernels:
        try:
            kv = cache_of(kernel)
            check_kernel(kernel, kv, config)
            check_numbers(kernel, kv, config)
            return kernel
        except Exception as e:  # a compiler that is missing or fails does so in many ways
            if is_out_of_memory(e):
                raise
            reasons.append(f"{kernel}: {type(e).__name__}: {e}")
            log.warning("the kernel %s is not used: %s: %s", kernel, type(e).__name__, e)
            failure = e
    raise UnsupportedModel(
        f"no attention kernel does this model here: {'; '.join(reasons)}",
        wants="a C compiler for Triton (`apt-get install gcc`), a flash-attn for its shapes, or engine: reference",
    ) from failure


def check_numbers(kernel: Kernel, kv: KVCache, config: Any) -> None:
    """Compare `kernel` with the reference on random numbers: a prefill and a decode step of three rows, and where the
    runner reads shared pages once, a decode step of rows that begin with the same.

    Raises:
        UnsupportedModel: they differ.
    """
    if kernel in ("reference", "sdpa"):
        return
    scale = getattr(config, "query_pre_attn_scalar", None)
    softcap = getattr(config, "attn_logit_softcapping", None)
    share = config.num_attention_heads // kv_shapes(config)[0][0]
    for heads, head_dim in set(kv.shapes):
        for window in {None, window_of(config)}:
            steps: dict[str, tuple[int | None, bool]] = {"decode": (None, False)}
            if kernel == "triton" and window_of(config) is None:
                steps["decode behind shared pages"] = (None, True)
            steps["prefill"] = (1, False)
            if kernel == "triton":
                steps["prefill of large tiles"] = (1 << 20, False)
            for step, how in steps.items():
                error = _error(kernel, kv, share * heads, heads, head_dim, window, softcap, scale, *how)
                if not error < MAX_ERROR:
                    raise UnsupportedModel(
                        f"{kernel} computes something else than attention for this model's shapes ({step}, error "
                        f"{error:.2g})",
                        field="head_dim",
                        got=head_dim,
                        wants="a flash-attn built for it, or engine: reference",
                    )


def _error(
    kernel: Kernel,
    like: KVCache,
    q_heads: int,
    heads: int,
    head_dim: int,
    window: int | None,
    softcap: float | None,
    scalar: float | None,
    tokens: int | None,
    shared: bool,
) -> float:
    """Relative error of a step; behind shared pages that of the worst row, since a row alone is far larger.

    Args:
        tokens: of a prefill step for which its tiles are chosen; None: a decode step.
        shared: all rows but the last begin with the same pages, which are read once.
    """
    decode = tokens is None
    pages_row = -(-max(LENGTHS) // like.page_tokens)
    pages = 1 + pages_row * len(LENGTHS) + SHARED_PAGES
    run = list(range(pages - SHARED_PAGES, pages)) if shared else []
    kv_dtype = like.kv_dtype if like.quantised else "auto"
    kv = KVCache([(heads, head_dim)], pages, like.page_tokens, like.dtype, like.device, kv_dtype)
    noise = torch.Generator(like.device).manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=noise, device=like.device, dtype=torch.float32).to(like.dtype)

    slots = torch.arange(pages * like.page_tokens, device=like.device)
    k_TKD, v_TKD = (draw(len(slots), heads, head_dim) for _ in range(2))
    kv.write(0, slots, k_TKD, v_TKD)
    new = (1,) * len(LENGTHS) if decode else LENGTHS
    tables = [[1 + row * pages_row + page for page in range(pages_row)] for row in range(len(LENGTHS))]

    def ints(values: Any) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, device=like.device)

    def sums(values: Sequence[int]) -> Tensor:
        return ints([0, *accumulate(values)])

    runs = [run] * (len(LENGTHS) - 1) + [[]]
    rows = [
        Row(sum(new[:at]), len(runs[at]) * like.page_tokens + length - new[at], new[at], runs[at] + tables[at])
        for at, length in enumerate(LENGTHS)
    ]
    queries = queries_a_tile(q_heads, heads, head_dim, tokens or 1, 1) if kernel == "triton" else 1
    parts = (
        [-(-length // like.page_tokens) for length in LENGTHS] if decode else [-(-count // queries) for count in new]
    )
    at = [
        row.pages[position // like.page_tokens] * like.page_tokens + position % like.page_tokens
        for row in rows
        for position in range(row.start, row.start + row.tokens)
    ]
    slots_T = torch.tensor(at, device=like.device)
    row_I = ints([*chain.from_iterable(repeat(row, count) for row, count in enumerate(parts))])
    units = Units(row_I, sums(parts), queries, ints([1]))
    if shared:
        from actors.engine.kernels.decode import Runs  # torch does not bring Triton everywhere

        none = [0] * (RUNS - 1)
        of_runs = ints([run] + [[0] * SHARED_PAGES] * (RUNS - 1))
        units.runs = Runs(sums([len(LENGTHS) - 1, *none]), sums([SHARED_PAGES * like.page_tokens, *none]), of_runs)
    plan = Plan(
        kv=kv,
        kernel=kernel,
        slots_T=slots_T,
        cu_q_R1=sums(new),
        cu_k_R1=sums(LENGTHS),
        lens_R=ints(LENGTHS),
        table_RP=ints(tables),
        max_q=max(new),
        max_k=max(row.start + row.tokens for row in rows),
        decode=decode,
        rows=rows,
        units=units,
        pages_N=torch.arange(pages, device=like.device),
    )
    # Scores large enough that a soft cap shows; behind shared pages small ones, so that no key outweighs all the others
    # and a wrong weight of a partial sum shows.
    q_THD = draw(sum(new), q_heads, head_dim) * (1 if shared else 16)
    scale = (scalar or head_dim) ** -0.5
    k_new_TKD, v_new_TKD = (draw(len(slots_T), heads, head_dim) for _ in range(2))  # other ones than stand there
    got, wanted = (
        attend(replace(plan, kernel=one), q_THD, k_new_TKD, v_new_TKD, 0, scale, window, softcap).float()
        for one in (kernel, "reference")
    )
    if shared:
        return float(((got - wanted).flatten(1).norm(dim=1) / wanted.flatten(1).norm(dim=1)).max())
    return float((got - wanted).norm() / wanted.norm())

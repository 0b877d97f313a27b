"""Does an attention kernel compute what it should, on this device, for this model's shapes? Asked once at start.

A build of flash-attn that was compiled for some head dimensions only returns noise for the others, and says nothing
(seen: head dimension 256 on a build for 64 and 128). A wrong score would be all that a user ever saw of it.
Knows no model weights.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate, chain, repeat
from typing import Any

import torch
from torch import Tensor

from actors.engine.attention import Kernel, Plan, Row, Units, attend, check_kernel, queries_a_tile
from actors.engine.kv import KVCache, kv_shapes
from actors.engine.oom import is_out_of_memory
from actors.engine.support import window_of
from actors.errors import UnsupportedModel

MAX_ERROR = 0.03
"""‖out − reference‖ / ‖reference‖; bf16 and fp16 stay below 0.01."""
LENGTHS = (300, 20, 1)

log = logging.getLogger(__name__)


def first_right(kernels: Sequence[Kernel], kv: KVCache, config: Any) -> Kernel:
    """The first of `kernels` that does this model's shapes, and right; each that does not is logged.

    Raises:
        UnsupportedModel: none does; says why not, each by its name.
    """
    reasons: list[str] = []
    failure: Exception | None = None
    for kernel in kernels:
        try:
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
    """Compare `kernel` with the reference on random numbers: a prefill and a decode step of three rows.

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
            # In decode one query a row; in prefill tiles of both sizes.
            for tokens in (None, 1, 1 << 20) if kernel == "triton" else (None, 1):
                error = _error(kernel, kv, share * heads, heads, head_dim, window, softcap, scale, tokens)
                if not error < MAX_ERROR:
                    raise UnsupportedModel(
                        f"{kernel} computes something else than attention for this model's shapes (error {error:.2g})",
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
) -> float:
    """Relative error of a step.

    Args:
        tokens: of a prefill step for which its tiles are chosen; None: a decode step.
    """
    decode = tokens is None
    pages_row = -(-max(LENGTHS) // like.page_tokens)
    pages = 1 + pages_row * len(LENGTHS)
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

    rows = [Row(sum(new[:at]), length - new[at], new[at], tables[at]) for at, length in enumerate(LENGTHS)]
    queries = queries_a_tile(q_heads, heads, head_dim, tokens or 1, 1) if kernel == "triton" else 1
    parts = (
        [-(-length // like.page_tokens) for length in LENGTHS] if decode else [-(-count // queries) for count in new]
    )
    at = [row.pages[0] * like.page_tokens + row.start + token for row in rows for token in range(row.tokens)]
    slots_T = torch.tensor(at, device=like.device)
    row_I = ints([*chain.from_iterable(repeat(row, count) for row, count in enumerate(parts))])
    plan = Plan(
        kv=kv,
        kernel=kernel,
        slots_T=slots_T,
        cu_q_R1=sums(new),
        cu_k_R1=sums(LENGTHS),
        lens_R=ints(LENGTHS),
        table_RP=ints(tables),
        max_q=max(new),
        max_k=max(LENGTHS),
        decode=decode,
        rows=rows,
        units=Units(row_I, sums(parts), queries, ints([1])),
        pages_N=torch.arange(pages, device=like.device),
    )
    q_THD = draw(sum(new), q_heads, head_dim) * 16  # scores large enough that a soft cap shows
    scale = (scalar or head_dim) ** -0.5
    k_new_TKD, v_new_TKD = (draw(len(slots_T), heads, head_dim) for _ in range(2))  # other ones than stand there
    got, wanted = (
        attend(replace(plan, kernel=one), q_THD, k_new_TKD, v_new_TKD, 0, scale, window, softcap).float()
        for one in (kernel, "reference")
    )
    return float((got - wanted).norm() / wanted.norm())

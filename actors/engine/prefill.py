"""Prefill attention over paged KV in Triton: new tokens of several rows against all that stands in their pages.

FlashAttention-2 (Dao 2023, §3): one pass over the keys with a running maximum. What differs: the query heads that share
a KV head are one tile, so that a block of keys is loaded once for all of them, keys come from pages, and they may be
quantised.

Knows nothing of who owns a page or of what a step is for. Shapes: T tokens, R rows, I tiles of queries, H query heads,
K KV heads, G = H/K, D head dimension, P pages, S tokens a page.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

_LOG2_E = 1.4426950408889634
_SETTING = {"M": 128, "BLOCK": 64, "num_warps": 8, "num_stages": 3}


@triton.jit
def _block(
    tile, q_position, total, weight, top, k, v, k_scale, v_scale, slot, key, head, end, scale, softcap, window, k_slot,
    K: tl.constexpr, D: tl.constexpr, MASKED: tl.constexpr,
    CAPPED: tl.constexpr, WINDOWED: tl.constexpr, QUANTIZED: tl.constexpr,
):  # fmt: skip
    """One block of keys more."""
    d = tl.arange(0, D)
    where = slot * k_slot + head * D
    if MASKED:
        k_DN = tl.load(k + where[None, :] + d[:, None], mask=key[None, :] < end, other=0.0)
    else:
        k_DN = tl.load(k + where[None, :] + d[:, None])
    scores = tl.dot(tile, k_DN.to(tile.dtype))
    if QUANTIZED:
        scores = scores * tl.load(k_scale + slot * K + head, mask=key < end, other=0.0)[None, :]
    if CAPPED:
        # `scale` is that of the scores here, and log2(e) elsewhere.
        scores = softcap * (2 * tl.sigmoid(2 * scores * scale / softcap) - 1)
        base = 1.4426950408889634
    else:
        base = scale
    if MASKED:
        seen = (key[None, :] <= q_position[:, None]) & (key[None, :] < end)
        if WINDOWED:
            seen = seen & (key[None, :] > q_position[:, None] - window)
        scores = tl.where(seen, scores, float("-inf"))
    new_top = tl.maximum(top, tl.max(scores, 1) * base)
    safe = new_top
    if MASKED:
        # A query that has seen no key yet: -inf - -inf is not a number.
        safe = tl.where(new_top == float("-inf"), 0.0, new_top)
    p = tl.exp2(scores * base - safe[:, None])
    shrink = tl.exp2(top - safe)
    weight = weight * shrink + tl.sum(p, 1)
    total = total * shrink[:, None]
    if MASKED:
        v_ND = tl.load(v + where[:, None] + d[None, :], mask=key[:, None] < end, other=0.0)
    else:
        v_ND = tl.load(v + where[:, None] + d[None, :])
    if QUANTIZED:
        p = p * tl.load(v_scale + slot * K + head, mask=key < end, other=0.0)[None, :]
    total = tl.dot(p.to(tile.dtype), v_ND.to(tile.dtype), total)
    return total, weight, new_top


@triton.jit
def _kernel(
    q, k, v, k_scale, v_scale, out, table, cu_q, lens, tile_row, first_tile,
    q_token, q_head, k_slot, width, scale, softcap, window,
    H: tl.constexpr, K: tl.constexpr, G: tl.constexpr, D: tl.constexpr, S: tl.constexpr,
    M: tl.constexpr, GROUP: tl.constexpr, BLOCK: tl.constexpr,
    CAPPED: tl.constexpr, WINDOWED: tl.constexpr, QUANTIZED: tl.constexpr,
):  # fmt: skip
    """A tile of one row's queries, for all query heads of one KV head."""
    head = tl.program_id(0)
    unit = tl.program_id(1)
    row = tl.load(tile_row + unit)
    at_query = (unit - tl.load(first_tile + row)) * (M // GROUP)
    first = tl.load(cu_q + row)
    new = tl.load(cu_q + row + 1) - first
    start = tl.load(lens + row) - new
    m = tl.arange(0, M)
    d = tl.arange(0, D)
    n = tl.arange(0, BLOCK)
    query = at_query + m // GROUP
    heads = head * G + m % GROUP
    mask = (query < new) & (m % GROUP < G)
    token = (first + query).to(tl.int64)
    tile = tl.load(q + token[:, None] * q_token + heads[:, None] * q_head + d[None, :], mask=mask[:, None], other=0.0)
    position = start + query
    end = start + tl.minimum(new, at_query + M // GROUP)
    total = tl.zeros([M, D], tl.float32)
    weight = tl.zeros([M], tl.float32)
    top = tl.full([M], float("-inf"), tl.float32)
    # Keys that every query of the tile sees, in whole blocks.
    low = 0
    whole = (start + at_query + 1) // BLOCK * BLOCK
    if WINDOWED:
        low = tl.maximum(start + at_query - window + 1, 0) // BLOCK * BLOCK
        whole = low
    for at in tl.range(low, whole, BLOCK):
        page = tl.load(table + row * width + at // S).to(tl.int64)
        total, weight, top = _block(
            tile, position, total, weight, top, k, v, k_scale, v_scale, page * S + at % S + n, at + n, head, end,
            scale, softcap, window, k_slot, K, D, False, CAPPED, WINDOWED, QUANTIZED,
        )  # fmt: skip
    for at in tl.range(whole, end, BLOCK):
        page = tl.load(table + row * width + at // S).to(tl.int64)
        total, weight, top = _block(
            tile, position, total, weight, top, k, v, k_scale, v_scale, page * S + at % S + n, at + n, head, end,
            scale, softcap, window, k_slot, K, D, True, CAPPED, WINDOWED, QUANTIZED,
        )  # fmt: skip
    y = total / tl.where(weight > 0, weight, 1.0)[:, None]
    where = (token * H + heads)[:, None] * D + d[None, :]
    tl.store(out + where, y.to(out.dtype.element_ty), mask=mask[:, None])


def queries_a_tile(heads: int, kv_heads: int, setting: dict[str, Any] | None = None) -> int:
    """Query tokens of one program."""
    return (setting or _SETTING)["M"] // triton.next_power_of_2(heads // kv_heads)


def attend(
    q_THD: Tensor,
    k_PSKD: Tensor,
    v_PSKD: Tensor,
    cu_q_R1: Tensor,
    lens_R: Tensor,
    table_RP: Tensor,
    tile_row_I: Tensor,
    first_tile_R1: Tensor,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    k_scale_PSK: Tensor | None = None,
    v_scale_PSK: Tensor | None = None,
    setting: dict[str, Any] | None = None,
) -> Tensor:
    """Causal attention of each row's new tokens, the last ones of its sequence, over all of it.

    Args:
        q_THD: the last dimension contiguous; bf16 or fp16.
        k_PSKD, v_PSKD: contiguous; of q's dtype, or int8 or fp8 with scales.
        cu_q_R1: int32, running sums of the rows' new tokens.
        lens_R: int32, tokens of each row, the new ones included.
        table_RP: int32 page tables.
        tile_row_I: int32, the row of each tile of `queries_a_tile` new tokens; exactly as many as there are.
        first_tile_R1: int32, the first tile of each row.
        window: a query sees itself and the `window` - 1 keys before it.
        k_scale_PSK, v_scale_PSK: float32, what a token's quantised keys and values of a head are multiplied with.

    Returns:
        [T, H, D], contiguous.
    """
    _, heads, dim = q_THD.shape
    page_tokens, kv_heads = k_PSKD.shape[1:3]
    out_THD = torch.empty(q_THD.shape, dtype=q_THD.dtype, device=q_THD.device)
    quantized = k_scale_PSK is not None
    _kernel[(kv_heads, len(tile_row_I))](
        q_THD, k_PSKD, v_PSKD, k_scale_PSK if quantized else lens_R, v_scale_PSK if quantized else lens_R, out_THD,
        table_RP, cu_q_R1, lens_R, tile_row_I, first_tile_R1,
        q_THD.stride(0), q_THD.stride(1), k_PSKD.stride(1), table_RP.stride(0),
        scale if softcap is not None else scale * _LOG2_E, softcap or 1.0, window or 0,
        H=heads, K=kv_heads, G=heads // kv_heads, D=dim, S=page_tokens,
        GROUP=triton.next_power_of_2(heads // kv_heads),
        CAPPED=softcap is not None, WINDOWED=window is not None, QUANTIZED=quantized, **(setting or _SETTING),
    )  # fmt: skip
    return out_THD

"""Prefill attention over paged KV in Triton: new tokens of several rows against all that stands in their pages.

FlashAttention-2 (Dao 2023, §3): one pass over the keys with a running maximum. What differs: the query heads that share
a KV head are one tile, so that a block of keys is loaded once for all of them, keys come from pages, and they may be
quantised.

Knows nothing of who owns a page or of what a step is for. Shapes: T tokens, R rows, I tiles of queries, H query heads,
K KV heads, G = H/K, D head dimension, P pages, S tokens a page.
"""

# Triton's language has no types that a checker knows.
# pyright: basic, reportArgumentType=false, reportCallIssue=false, reportAttributeAccessIssue=false
# pyright: reportOptionalMemberAccess=false, reportIndexIssue=false, reportOperatorIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from actors.engine.kernels import BLOCK, STEP

_LOG2_E = 1.4426950408889634
# Chosen on an H100. Tiles of 128 queries are quicker but where rows have so few that most of a tile is padding.
_WARPS = 4
_TILE, _SMALL_TILE = 128, 64
_WIDE = 128  # head dimension above which shared memory holds no large tile and no third stage


@triton.jit
def _block(
    tile, position, total, weight, top, k, v, k_scale, v_scale, slot, at, head, end, scale, softcap, window,
    K: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, MASKED: tl.constexpr,
    CAPPED: tl.constexpr, WINDOWED: tl.constexpr, QUANTIZED: tl.constexpr,
):  # fmt: skip
    """One block of keys more: the running sum, its weight and the largest score so far, base 2."""
    n = tl.arange(0, BLOCK)
    k_ND = k.load([slot, head * D])
    v_ND = v.load([slot, head * D])
    scores = tl.dot(tile, k_ND.to(tile.dtype).T)
    if QUANTIZED:
        scores = scores * tl.load(k_scale + (slot + n) * K + head)[None, :]
    base = scale
    if CAPPED:
        # `scale` is that of the scores here, and includes log2(e) elsewhere.
        scores = softcap * (2 * tl.sigmoid(2 * scores * scale / softcap) - 1)
        base = 1.4426950408889634
    if MASKED:
        key = at + n
        seen = key[None, :] <= position[:, None]
        if WINDOWED:
            seen = seen & (key[None, :] > position[:, None] - window)
        scores = tl.where(seen, scores, float("-inf"))
        # What an earlier owner of the page left may be infinite, and 0 · inf is not 0.
        v_ND = tl.where((key < end)[:, None], v_ND, 0.0)
    new_top = tl.maximum(top, tl.max(scores, 1) * base)
    safe = new_top
    if MASKED:
        # A query that has seen no key yet: -inf - -inf is not a number.
        safe = tl.where(new_top == float("-inf"), 0.0, new_top)
    p = tl.exp2(scores * base - safe[:, None])
    shrink = tl.exp2(top - safe)
    weight = weight * shrink + tl.sum(p, 1)
    if QUANTIZED:
        of_v = tl.load(v_scale + (slot + n) * K + head)
        if MASKED:
            of_v = tl.where(at + n < end, of_v, 0.0)
        p = p * of_v[None, :]
    total = tl.dot(p.to(tile.dtype), v_ND.to(tile.dtype), total * shrink[:, None])
    return total, weight, new_top


@triton.jit(do_not_specialize=STEP)
def _attention_prefill(
    q, k, v, k_scale, v_scale, out, table, cu_q, lens, tile_row, first_tile,
    q_token, q_head, width, scale, softcap, window,
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
    for masked in tl.static_range(2):
        for at in tl.range(whole if masked else low, end if masked else whole, BLOCK):
            slot = tl.load(table + row * width + at // S) * S + at % S
            total, weight, top = _block(
                tile, position, total, weight, top, k, v, k_scale, v_scale, slot, at, head, end, scale, softcap, window,
                K, D, BLOCK, masked == 1, CAPPED, WINDOWED, QUANTIZED,
            )  # fmt: skip
    y = total / tl.where(weight > 0, weight, 1.0)[:, None]
    where = (token * H + heads)[:, None] * D + d[None, :]
    tl.store(out + where, y.to(out.dtype.element_ty), mask=mask[:, None])


def queries_a_tile(heads: int, kv_heads: int, dim: int, tokens: int, rows: int) -> int:
    """Query tokens of one tile in a step of so many tokens and rows."""
    group = triton.next_power_of_2(heads // kv_heads)
    large = dim <= _WIDE and tokens >= 4 * rows * (_TILE // group)
    return max(1, (_TILE if large else _SMALL_TILE) // group)


def attend(
    q_THD: Tensor,
    k_PSKD: Tensor,
    v_PSKD: Tensor,
    cu_q_R1: Tensor,
    lens_R: Tensor,
    table_RP: Tensor,
    tile_row_I: Tensor,
    first_tile_R1: Tensor,
    queries: int,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    k_scale_PSK: Tensor | None = None,
    v_scale_PSK: Tensor | None = None,
) -> Tensor:
    """Causal attention of each row's new tokens, the last ones of its sequence, over all of it.

    Args:
        q_THD: the last dimension contiguous; bf16 or fp16.
        k_PSKD, v_PSKD: contiguous; of q's dtype, or int8 or fp8 with scales.
        cu_q_R1: int32, running sums of the rows' new tokens.
        lens_R: int32, tokens of each row, the new ones included.
        table_RP: int32 page tables.
        tile_row_I: int32, the row of each tile of `queries` new tokens; exactly as many as there are.
        first_tile_R1: int32, the first tile of each row.
        queries: see `queries_a_tile`.
        window: a query sees itself and the `window` - 1 keys before it.
        k_scale_PSK, v_scale_PSK: float32, what a token's quantised keys and values of a head are multiplied with.

    Returns:
        [T, H, D], contiguous.
    """
    _, heads, dim = q_THD.shape
    page_tokens, kv_heads = k_PSKD.shape[1:3]
    out_THD = torch.empty(q_THD.shape, dtype=q_THD.dtype, device=q_THD.device)
    quantized = k_scale_PSK is not None
    group = triton.next_power_of_2(heads // kv_heads)
    k, v = (TensorDescriptor.from_tensor(cache.view(-1, kv_heads * dim), [BLOCK, dim]) for cache in (k_PSKD, v_PSKD))
    scales = (k_scale_PSK, v_scale_PSK) if quantized else (lens_R, lens_R)
    _attention_prefill[(kv_heads, len(tile_row_I))](
        q_THD, k, v, *scales, out_THD, table_RP, cu_q_R1, lens_R, tile_row_I, first_tile_R1,
        q_THD.stride(0), q_THD.stride(1), table_RP.stride(0),
        scale if softcap is not None else scale * _LOG2_E, softcap or 1.0, window or 0,
        H=heads, K=kv_heads, G=heads // kv_heads, D=dim, S=page_tokens, M=queries * group, GROUP=group,
        CAPPED=softcap is not None, WINDOWED=window is not None, QUANTIZED=quantized,
        BLOCK=BLOCK, num_warps=_WARPS, num_stages=3 if dim <= _WIDE else 2,
    )  # fmt: skip
    return out_THD

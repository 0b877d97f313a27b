"""From one product to attention, in Triton and one launch: queries and keys normalised and turned to their positions,
keys and values into their pages, quantised on the way where the pages are.

What stands between a layer's projections and its attention is then one kernel in place of three; the sums are in fp32
and rounded once, at the end. A program has one KV head of one token, and the query heads that share it.

Shapes: T tokens, H query heads, K KV heads, G = H/K, D head dimension, P pages, S tokens a page.
"""

# Triton's language has no types that a checker knows.
# pyright: basic, reportArgumentType=false, reportCallIssue=false, reportAttributeAccessIssue=false
# pyright: reportOptionalMemberAccess=false, reportIndexIssue=false, reportOperatorIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from actors.engine.kernels.write import most_of, rounded


@triton.jit
def _halves(x, head, mask, d, D: tl.constexpr):
    """The two halves of some heads, in fp32: rotary embedding turns one against the other."""
    where = head[:, None] * D + d[None, :]
    low = tl.load(x + where, mask=mask, other=0.0).to(tl.float32)
    return low, tl.load(x + where + D // 2, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _turned(low, high, weight, d, eps, cos_low, cos_high, sin_low, sin_high, D: tl.constexpr, NORM: tl.constexpr):
    if NORM:
        square = tl.sum(low * low, 1) + tl.sum(high * high, 1)
        scale = 1.0 / tl.sqrt(square / D + eps)
        low = low * scale[:, None] * tl.load(weight + d)[None, :]
        high = high * scale[:, None] * tl.load(weight + D // 2 + d)[None, :]
    return (
        low * cos_low[None, :] - high * sin_low[None, :],
        high * cos_high[None, :] + low * sin_high[None, :],
    )


@triton.jit
def _keep(low, high, cache, scales, at, d, D: tl.constexpr, MOST: tl.constexpr):
    """One head of one token, [1, D/2] twice, to where it belongs."""
    if MOST > 0:
        scale = tl.maximum(tl.max(tl.abs(low), 1), tl.max(tl.abs(high), 1)) / MOST
        tl.store(scales + at + tl.arange(0, 1), scale)
        by = tl.where(scale > 0, scale, 1.0)[:, None]
        low, high = rounded(low / by, MOST), rounded(high / by, MOST)
    where = cache + at * D + d[None, :]
    tl.store(where, low.to(cache.dtype.element_ty))
    tl.store(where + D // 2, high.to(cache.dtype.element_ty))


@triton.jit
def _attention_qkv(
    qkv, out, k_cache, v_cache, k_scales, v_scales, slots, cos, sin, q_norm, k_norm, eps, qkv_token, cos_token,
    G: tl.constexpr, GP: tl.constexpr, K: tl.constexpr, D: tl.constexpr, NORM: tl.constexpr, MOST: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    d = tl.arange(0, D // 2)
    cos_low = tl.load(cos + token * cos_token + d).to(tl.float32)
    cos_high = tl.load(cos + token * cos_token + D // 2 + d).to(tl.float32)
    sin_low = tl.load(sin + token * cos_token + d).to(tl.float32)
    sin_high = tl.load(sin + token * cos_token + D // 2 + d).to(tl.float32)
    new = qkv + token * qkv_token

    g = tl.arange(0, GP)
    heads = head * G + g
    mask = (g < G)[:, None]
    low, high = _halves(new, heads, mask, d, D)
    low, high = _turned(low, high, q_norm, d, eps, cos_low, cos_high, sin_low, sin_high, D, NORM)
    where = out + token * K * G * D + heads[:, None] * D + d[None, :]
    tl.store(where, low.to(out.dtype.element_ty), mask=mask)
    tl.store(where + D // 2, high.to(out.dtype.element_ty), mask=mask)

    one = head + tl.arange(0, 1)
    at = tl.load(slots + token) * K + head
    low, high = _halves(new + K * G * D, one, (one < K)[:, None], d, D)
    low, high = _turned(low, high, k_norm, d, eps, cos_low, cos_high, sin_low, sin_high, D, NORM)
    # Rounded before they are quantised, as in `write`, so that both give the same.
    dtype = qkv.dtype.element_ty
    _keep(low.to(dtype).to(tl.float32), high.to(dtype).to(tl.float32), k_cache, k_scales, at, d, D, MOST)
    low, high = _halves(new + K * (G + 1) * D, one, (one < K)[:, None], d, D)
    _keep(low, high, v_cache, v_scales, at, d, D, MOST)


def enter(
    qkv_TW: Tensor,
    cos_TD: Tensor,
    sin_TD: Tensor,
    q_norm_D: Tensor | None,
    k_norm_D: Tensor | None,
    eps: float,
    k_PSKD: Tensor,
    v_PSKD: Tensor,
    slots_T: Tensor,
    k_scale_PSK: Tensor | None = None,
    v_scale_PSK: Tensor | None = None,
) -> Tensor:
    """Write a step's keys and values, and give its queries [T, H, D], as attention wants them.

    Args:
        qkv_TW: [T, (H + 2K) · D], the heads of queries, of keys, of values; the last dimension contiguous.
        cos_TD, sin_TD: of the tokens' positions, as transformers' `rotate_half` takes them.
        q_norm_D, k_norm_D: fp32, what normalised queries and keys are multiplied by; None: they are not normalised.
        eps: of the norms (Zhang and Sennrich 2019, RMSNorm).
        Others as in `write.write`.
    """
    tokens, width = qkv_TW.shape
    kv_heads, dim = k_PSKD.shape[2:]
    heads = width // dim - 2 * kv_heads
    share = heads // kv_heads
    out_THD = qkv_TW.new_empty(tokens, heads, dim)
    norms = (slots_T, slots_T) if q_norm_D is None else (q_norm_D, k_norm_D)
    most = most_of(k_PSKD, k_scale_PSK)
    scales = (k_scale_PSK, v_scale_PSK) if most else (slots_T, slots_T)
    _attention_qkv[(tokens, kv_heads)](
        qkv_TW, out_THD, k_PSKD, v_PSKD, *scales, slots_T, cos_TD, sin_TD, *norms, eps,
        qkv_TW.stride(0), cos_TD.stride(0),
        G=share, GP=triton.next_power_of_2(share), K=kv_heads, D=dim, NORM=q_norm_D is not None, MOST=most, num_warps=1,
    )  # fmt: skip
    return out_THD

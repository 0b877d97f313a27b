"""New keys and values into their pages, in Triton: both in one launch, and quantised on the way where the pages are.

Shapes: T tokens, K KV heads, D head dimension, P pages, S tokens a page.
"""

# Triton's language has no types that a checker knows.
# pyright: basic, reportArgumentType=false, reportCallIssue=false, reportAttributeAccessIssue=false
# pyright: reportOptionalMemberAccess=false, reportIndexIssue=false, reportOperatorIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def rounded(x, MOST: tl.constexpr):
    """To whole numbers where they become int8; fp8 rounds by itself."""
    if MOST == 127:
        x = tl.where(x < 0, tl.ceil(x - 0.5), tl.floor(x + 0.5))
    return x


@triton.jit
def _store(x, cache, scales, slot, k, d, mask, K: tl.constexpr, D: tl.constexpr, MOST: tl.constexpr):
    where = slot * K * D + k[:, None] * D + d[None, :]
    if MOST > 0:
        x = x.to(tl.float32)
        scale = tl.max(tl.abs(x), 1) / MOST
        tl.store(scales + slot * K + k, scale, mask=k < K)
        x = rounded(x / tl.where(scale > 0, scale, 1.0)[:, None], MOST)
    tl.store(cache + where, x.to(cache.dtype.element_ty), mask=mask)


@triton.jit
def _attention_write(
    k_new, v_new, k_cache, v_cache, k_scales, v_scales, slots, k_token, k_head, v_token, v_head,
    K: tl.constexpr, KP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, MOST: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + token)
    k = tl.arange(0, KP)
    d = tl.arange(0, DP)
    mask = (k < K)[:, None] & (d < D)[None, :]
    key = tl.load(k_new + token * k_token + k[:, None] * k_head + d[None, :], mask=mask, other=0.0)
    _store(key, k_cache, k_scales, slot, k, d, mask, K, D, MOST)
    value = tl.load(v_new + token * v_token + k[:, None] * v_head + d[None, :], mask=mask, other=0.0)
    _store(value, v_cache, v_scales, slot, k, d, mask, K, D, MOST)


def most_of(pages: Tensor, scales: Tensor | None) -> int:
    """The largest number of a quantised dtype; 0 where pages hold the model's own."""
    return 0 if scales is None else 127 if pages.dtype == torch.int8 else 448


def write(
    k_TKD: Tensor,
    v_TKD: Tensor,
    k_PSKD: Tensor,
    v_PSKD: Tensor,
    slots_T: Tensor,
    k_scale_PSK: Tensor | None = None,
    v_scale_PSK: Tensor | None = None,
) -> None:
    """Write a step's keys and values.

    Args:
        k_TKD, v_TKD: the last dimension contiguous.
        k_PSKD, v_PSKD: contiguous; int8 or float8_e4m3fn with scales, else of the same dtype.
        slots_T: int64, page · S + offset of each token.
        k_scale_PSK, v_scale_PSK: float32, set to the largest size of a token's head, over 127 (int8) or 448 (fp8).
    """
    tokens, heads, dim = k_TKD.shape
    most = most_of(k_PSKD, k_scale_PSK)
    scales = (k_scale_PSK, v_scale_PSK) if most else (slots_T, slots_T)
    _attention_write[(tokens,)](
        k_TKD, v_TKD, k_PSKD, v_PSKD, *scales, slots_T,
        k_TKD.stride(0), k_TKD.stride(1), v_TKD.stride(0), v_TKD.stride(1),
        K=heads, KP=triton.next_power_of_2(heads), D=dim, DP=triton.next_power_of_2(dim), MOST=most, num_warps=4,
    )  # fmt: skip

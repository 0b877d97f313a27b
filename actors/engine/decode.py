"""Decode attention over paged KV in Triton: one query token a row, and runs of pages that several rows begin with.

After Flash-Decoding (Dao et al. 2023): keys are cut into chunks, each chunk gives a partial sum and the logarithm of
its weight, and a last kernel merges them. What differs: the query heads that share a KV head are one tile, so that keys
are read once for all of them and not padded to 64 queries; a row's chunks lie on page borders and a fixed number of
programs takes them from a list, so that short and long rows fill the GPU alike; and a run that rows share is one more
source of partial sums in the same merge, its keys read once for up to `_TILE` / G rows.

Knows nothing of who owns a page or of what a step is for. Shapes: B rows, H query heads, K KV heads, G = H/K, D head
dimension, P pages, S tokens a page, N runs, I chunks of all rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

_LOG2_E = 1.4426950408889634
_PROGRAMS_SM = 4
"""Of the kernel over the rows' own pages, a multiprocessor."""
_OWN = {"BLOCK": 64, "num_warps": 4, "num_stages": 3}
_RUN = {"BLOCK": 64, "num_warps": 4, "num_stages": 3}
_TILE = 64
"""Queries of a program over shared pages."""
_RUN_PROGRAMS = 256


@dataclass(slots=True)
class Chunks:
    """Who computes what over the rows' own pages.

    Attributes:
        row_I: int32, the row of each chunk; a row's chunks follow one another. Longer than there are chunks.
        first_B1: int32 [B + 1], the first chunk of each row.
        pages_1: int32 [1], pages a chunk.
    """

    row_I: Tensor
    first_B1: Tensor
    pages_1: Tensor


@dataclass(slots=True)
class Runs:
    """Runs of whole pages, see `attention.Shared`."""

    cu_q_N1: Tensor
    cu_k_N1: Tensor
    table_NP: Tensor


@triton.jit
def _online(scores, v, total, weight, top, keys):
    """One block of keys more: the running sum, its weight and the largest score so far (base 2)."""
    new_top = tl.maximum(top, tl.max(scores, 1))
    # A query that has seen no key yet: -inf - -inf is not a number.
    safe = tl.where(new_top == float("-inf"), 0.0, new_top)
    shrink = tl.exp2(top - safe)
    p = tl.exp2(scores - safe[:, None])
    weight = weight * shrink + tl.sum(p, 1)
    p = p * keys[None, :]
    total = total * shrink[:, None] + tl.dot(p.to(v.dtype), v)
    return total, weight, new_top


@triton.jit
def _scored(q, k, scale, softcap, CAPPED: tl.constexpr):
    """Scores times log2(e)."""
    scores = tl.dot(q, k) * scale
    if CAPPED:
        scores = softcap * (2 * tl.sigmoid(2 * scores / softcap) - 1)
    return scores * 1.4426950408889634


@triton.jit
def _own_kernel(
    q, k, v, k_scale, v_scale, part, log_sum, table, lens, chunk_row, first, chunk_pages,
    rows, q_row, q_head, k_slot, width, scale, softcap, window,
    H: tl.constexpr, K: tl.constexpr, G: tl.constexpr, D: tl.constexpr, S: tl.constexpr,
    M: tl.constexpr, BLOCK: tl.constexpr, CAPPED: tl.constexpr, WINDOWED: tl.constexpr, QUANTIZED: tl.constexpr,
):  # fmt: skip
    """Chunks of the rows' own pages, for all query heads of one KV head at a time."""
    pages = tl.load(chunk_pages)
    work = tl.load(first + rows) * K
    g = tl.arange(0, M)
    d = tl.arange(0, D)
    n = tl.arange(0, BLOCK)
    for unit in tl.range(tl.program_id(0), work, tl.num_programs(0)):
        chunk = unit // K
        head = unit % K
        row = tl.load(chunk_row + chunk)
        length = tl.load(lens + row)
        start = (chunk - tl.load(first + row)) * pages * S
        end = tl.minimum(length, start + pages * S)
        low = start
        if WINDOWED:
            low = tl.maximum(start, tl.maximum(length - window, 0) // BLOCK * BLOCK)
        heads = head * G + g
        tile = tl.load(q + row * q_row + heads[:, None] * q_head + d[None, :], mask=g[:, None] < G, other=0.0)
        total = tl.zeros([M, D], tl.float32)
        weight = tl.zeros([M], tl.float32)
        top = tl.full([M], float("-inf"), tl.float32)
        for at in tl.range(low, end, BLOCK):
            page = tl.load(table + row * width + at // S).to(tl.int64)
            slot = page * S + at % S + n
            seen = at + n < end
            if WINDOWED:
                seen = seen & (at + n >= length - window)
            where = slot * k_slot + head * D
            k_DN = tl.load(k + where[None, :] + d[:, None], mask=seen[None, :], other=0.0)
            v_ND = tl.load(v + where[:, None] + d[None, :], mask=seen[:, None], other=0.0)
            keys = tl.full([BLOCK], 1.0, tl.float32)
            if QUANTIZED:
                keys = tl.load(v_scale + slot * K + head, mask=seen, other=0.0)
                of_k = tl.load(k_scale + slot * K + head, mask=seen, other=0.0)
                scores = _scored(tile, k_DN.to(tile.dtype), scale * of_k[None, :], softcap, CAPPED)
            else:
                scores = _scored(tile, k_DN, scale, softcap, CAPPED)
            scores = tl.where(seen[None, :], scores, float("-inf"))
            total, weight, top = _online(scores, v_ND.to(tile.dtype), total, weight, top, keys)
        mask = g < G
        some = tl.where(weight > 0, weight, 1.0)
        at_part = chunk * H + heads
        tl.store(part + at_part[:, None] * D + d[None, :], total / some[:, None], mask=mask[:, None])
        tl.store(log_sum + at_part, top + tl.log2(some), mask=mask)


@triton.jit
def _run_kernel(
    q, k, v, k_scale, v_scale, part, log_sum, table, cu_q, cu_k,
    rows, q_row, q_head, k_slot, width, scale, softcap,
    H: tl.constexpr, K: tl.constexpr, G: tl.constexpr, D: tl.constexpr, S: tl.constexpr,
    M: tl.constexpr, GROUP: tl.constexpr, RUNS: tl.constexpr, SPLITS: tl.constexpr,
    BLOCK: tl.constexpr, CAPPED: tl.constexpr, QUANTIZED: tl.constexpr,
):  # fmt: skip
    """One split of the shared runs that a tile of rows begins with, for one KV head."""
    head = tl.program_id(0)
    first = tl.program_id(1) * (M // GROUP)
    split = tl.program_id(2)
    within = tl.load(cu_q + RUNS)
    if first < within:
        m = tl.arange(0, M)
        d = tl.arange(0, D)
        n = tl.arange(0, BLOCK)
        row = first + m // GROUP
        heads = head * G + m % GROUP
        mask = (row < within) & (m % GROUP < G)
        tile = tl.load(q + row[:, None] * q_row + heads[:, None] * q_head + d[None, :], mask=mask[:, None], other=0.0)
        total = tl.zeros([M, D], tl.float32)
        weight = tl.zeros([M], tl.float32)
        top = tl.full([M], float("-inf"), tl.float32)
        for run in range(RUNS):
            low = tl.load(cu_q + run)
            high = tl.load(cu_q + run + 1)
            blocks = (tl.load(cu_k + run + 1) - tl.load(cu_k + run)) // BLOCK
            blocks = tl.where((low < first + M // GROUP) & (high > first), blocks, 0)
            mine = (row >= low) & (row < high)
            for block in tl.range(blocks * split // SPLITS, blocks * (split + 1) // SPLITS):
                at = block * BLOCK
                page = tl.load(table + run * width + at // S).to(tl.int64)
                slot = page * S + at % S + n
                where = slot * k_slot + head * D
                k_DN = tl.load(k + where[None, :] + d[:, None])
                v_ND = tl.load(v + where[:, None] + d[None, :])
                keys = tl.full([BLOCK], 1.0, tl.float32)
                if QUANTIZED:
                    keys = tl.load(v_scale + slot * K + head)
                    of_k = tl.load(k_scale + slot * K + head)
                    scores = _scored(tile, k_DN.to(tile.dtype), scale * of_k[None, :], softcap, CAPPED)
                else:
                    scores = _scored(tile, k_DN, scale, softcap, CAPPED)
                scores = tl.where(mine[:, None], scores, float("-inf"))
                total, weight, top = _online(scores, v_ND.to(tile.dtype), total, weight, top, keys)
        some = tl.where(weight > 0, weight, 1.0)
        at_part = (split * rows + row) * H + heads
        tl.store(part + at_part[:, None] * D + d[None, :], total / some[:, None], mask=mask[:, None])
        tl.store(log_sum + at_part, top + tl.log2(some), mask=mask)


@triton.jit
def _merge_kernel(
    part, log_sum, run_part, run_log_sum, first, cu_q, out, rows,
    H: tl.constexpr, D: tl.constexpr, HEADS: tl.constexpr, RUNS: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """The partial sums of a row's chunks, and of the splits of its run, into its output."""
    row = tl.program_id(0)
    h = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    d = tl.arange(0, D)
    mask = h < H
    total = tl.zeros([HEADS, D], tl.float32)
    weight = tl.zeros([HEADS], tl.float32)
    top = tl.full([HEADS], float("-inf"), tl.float32)
    own = tl.load(first + row)
    end = tl.load(first + row + 1)
    for chunk in tl.range(own, end):
        at = chunk * H + h
        more = tl.load(log_sum + at, mask=mask, other=0.0)
        new_top = tl.maximum(top, more)
        safe = tl.where(new_top == float("-inf"), 0.0, new_top)
        shrink = tl.exp2(top - safe)
        grow = tl.exp2(more - safe)
        x = tl.load(part + at[:, None] * D + d[None, :], mask=mask[:, None], other=0.0)
        total = total * shrink[:, None] + x * grow[:, None]
        weight = weight * shrink + grow
        top = new_top
    splits = 0
    if SPLITS > 0:
        splits = tl.where(row < tl.load(cu_q + RUNS), SPLITS, 0)
    for split in tl.range(0, splits):
        at = (split * rows + row) * H + h
        more = tl.load(run_log_sum + at, mask=mask, other=0.0)
        new_top = tl.maximum(top, more)
        safe = tl.where(new_top == float("-inf"), 0.0, new_top)
        shrink = tl.exp2(top - safe)
        grow = tl.exp2(more - safe)
        x = tl.load(run_part + at[:, None] * D + d[None, :], mask=mask[:, None], other=0.0)
        total = total * shrink[:, None] + x * grow[:, None]
        weight = weight * shrink + grow
        top = new_top
    y = total / weight[:, None]
    where = row * H + h
    tl.store(out + where[:, None] * D + d[None, :], y.to(out.dtype.element_ty), mask=mask[:, None])


def attend(
    q_BHD: Tensor,
    k_PSKD: Tensor,
    v_PSKD: Tensor,
    lens_B: Tensor,
    table_BP: Tensor,
    chunks: Chunks,
    runs: Runs | None,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    k_scale_PSK: Tensor | None = None,
    v_scale_PSK: Tensor | None = None,
    own: dict[str, Any] | None = None,
    run: dict[str, Any] | None = None,
    programs: int | None = None,
) -> Tensor:
    """Attention of each row's last token over its run, if it has one, and its own pages. Launches only; CUDA graphs
    may capture it.

    Args:
        q_BHD: the last dimension contiguous; bf16 or fp16.
        k_PSKD, v_PSKD: contiguous; of q's dtype, or int8 or fp8 with scales.
        lens_B: int32, tokens in the rows' own pages.
        table_BP: int32, the rows' own pages.
        runs: rows of runs stand in front; their own keys all lie behind the run.
        window: of a row's own keys only the newest so many count; not together with runs.
        k_scale_PSK, v_scale_PSK: float32, what a token's quantised keys and values of a head are multiplied with.

    Returns:
        [B, H, D] of q's dtype.
    """
    rows, heads, dim = q_BHD.shape
    page_tokens, kv_heads = k_PSKD.shape[1:3]
    share = heads // kv_heads
    group = triton.next_power_of_2(share)
    capacity = len(chunks.row_I)
    quantized = k_scale_PSK is not None
    part_IHD = torch.empty(capacity, heads, dim, dtype=torch.float32, device=q_BHD.device)
    sum_IH = torch.empty(capacity, heads, dtype=torch.float32, device=q_BHD.device)
    constants = {"H": heads, "K": kv_heads, "G": share, "D": dim, "S": page_tokens}
    constants |= {"CAPPED": softcap is not None, "QUANTIZED": quantized}
    strides = (q_BHD.stride(0), q_BHD.stride(1), k_PSKD.stride(1))
    scales = (k_scale_PSK, v_scale_PSK) if quantized else (sum_IH, sum_IH)
    splits, run_part, run_sum = 0, part_IHD, sum_IH
    if runs is not None:
        tile = max(_TILE, 16, group)
        tiles = triton.cdiv(rows, tile // group)
        splits = max(1, min(8, _RUN_PROGRAMS // (tiles * kv_heads)))
        run_part = torch.empty(splits, rows, heads, dim, dtype=torch.float32, device=q_BHD.device)
        run_sum = torch.empty(splits, rows, heads, dtype=torch.float32, device=q_BHD.device)
        _run_kernel[(kv_heads, tiles, splits)](
            q_BHD, k_PSKD, v_PSKD, *scales, run_part, run_sum, runs.table_NP, runs.cu_q_N1, runs.cu_k_N1,
            rows, *strides, runs.table_NP.stride(0), scale, softcap or 1.0,
            **constants, M=tile, GROUP=group, RUNS=len(runs.cu_q_N1) - 1, SPLITS=splits, **(run or _RUN),
        )  # fmt: skip
    count = programs or _programs(q_BHD.device.index or 0 if q_BHD.is_cuda else None)
    _own_kernel[(min(count, capacity * kv_heads),)](
        q_BHD, k_PSKD, v_PSKD, *scales, part_IHD, sum_IH, table_BP, lens_B, chunks.row_I, chunks.first_B1,
        chunks.pages_1, rows, *strides, table_BP.stride(0), scale, softcap or 1.0, window or 0,
        **constants, M=max(16, group), WINDOWED=window is not None, **(own or _OWN),
    )  # fmt: skip
    out_BHD = torch.empty(rows, heads, dim, dtype=q_BHD.dtype, device=q_BHD.device)
    at_once = min(8, triton.next_power_of_2(heads))
    _merge_kernel[(rows, triton.cdiv(heads, at_once))](
        part_IHD, sum_IH, run_part, run_sum, chunks.first_B1, runs.cu_q_N1 if runs else lens_B, out_BHD, rows,
        H=heads, D=dim, HEADS=at_once, RUNS=len(runs.cu_q_N1) - 1 if runs else 0, SPLITS=splits, num_warps=2,
    )  # fmt: skip
    return out_BHD


def _programs(device: int | None) -> int:
    if device is None:
        return 8
    return _PROGRAMS_SM * torch.cuda.get_device_properties(device).multi_processor_count

"""Decode attention over paged KV in Triton: one query token a row, and runs of pages that several rows begin with.

After Flash-Decoding (Dao et al. 2023): keys are cut into chunks, each chunk gives a partial sum and the logarithm of
its weight, and a last kernel merges them. What differs: the query heads that share a KV head are one tile, so that keys
are read once for all of them and not padded to 64 queries; a row's chunks lie on page borders and a fixed number of
programs takes them from a list, so that short and long rows fill the GPU alike; and a run that rows share is one more
source of partial sums in the same merge, its keys read once for up to `_TILE` / G rows, while another
stream reads the rows' own pages.

Knows nothing of who owns a page or of what a step is for. Shapes: B rows, H query heads, K KV heads, G = H/K, D head
dimension, P pages, S tokens a page, N runs, I chunks of all rows.
"""

# Triton's language has no types that a checker knows.
# pyright: basic, reportArgumentType=false, reportCallIssue=false, reportAttributeAccessIssue=false
# pyright: reportOptionalMemberAccess=false, reportIndexIssue=false, reportOperatorIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from actors.engine.kernels import BLOCK, STEP

# Chosen on an H100. Of the programs of a multiprocessor about half are resident at a time.
_OWN = {"BLOCK": BLOCK, "num_warps": 4, "num_stages": 3}
_RUN = {"BLOCK": BLOCK, "num_warps": 4}
_OWN_PROGRAMS, _RUN_PROGRAMS = 16, 1
_TILE = 64  # queries of a program over shared pages


@dataclass(slots=True)
class Runs:
    """Runs of whole pages that several rows begin with; each is read once for all its rows.

    The rows of a run follow one another in front of all that have none, and their own tables and lengths leave it out.

    Attributes:
        cu_q_N1: int32 [N + 1], running sums of the rows of each run.
        cu_k_N1: int32 [N + 1], running sums of the runs' tokens.
        table_NP: int32 page tables of the runs.
    """

    cu_q_N1: Tensor
    cu_k_N1: Tensor
    table_NP: Tensor


@triton.jit
def _online(scores, v, total, weight, top, keys):
    """One block of keys more: the running sum, its weight and the largest score so far, base 2."""
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


@triton.jit(do_not_specialize=STEP)
def _attention_own(
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


@triton.jit(do_not_specialize=STEP)
def _attention_runs(
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
def _with_part(total, weight, top, part, log_sum, at, d, mask, D: tl.constexpr):
    """One partial sum more."""
    more = tl.load(log_sum + at, mask=mask, other=0.0)
    new_top = tl.maximum(top, more)
    safe = tl.where(new_top == float("-inf"), 0.0, new_top)
    shrink = tl.exp2(top - safe)
    grow = tl.exp2(more - safe)
    x = tl.load(part + at[:, None] * D + d[None, :], mask=mask[:, None], other=0.0)
    total = total * shrink[:, None] + x * grow[:, None]
    weight = weight * shrink + grow
    return total, weight, new_top


@triton.jit(do_not_specialize=STEP)
def _attention_merge(
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
        total, weight, top = _with_part(total, weight, top, part, log_sum, at, d, mask, D)
    splits = 0
    if SPLITS > 0:
        splits = tl.where(row < tl.load(cu_q + RUNS), SPLITS, 0)
    for split in tl.range(0, splits):
        at = (split * rows + row) * H + h
        total, weight, top = _with_part(total, weight, top, run_part, run_log_sum, at, d, mask, D)
    y = total / weight[:, None]
    where = row * H + h
    tl.store(out + where[:, None] * D + d[None, :], y.to(out.dtype.element_ty), mask=mask[:, None])


def attend(
    q_BHD: Tensor,
    k_PSKD: Tensor,
    v_PSKD: Tensor,
    lens_B: Tensor,
    table_BP: Tensor,
    chunk_row_I: Tensor,
    first_chunk_B1: Tensor,
    chunk_pages_1: Tensor,
    runs: Runs | None,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    k_scale_PSK: Tensor | None = None,
    v_scale_PSK: Tensor | None = None,
) -> Tensor:
    """Attention of each row's last token over its run, if it has one, and its own pages. Launches only; CUDA graphs
    may capture it.

    Args:
        q_BHD: the last dimension contiguous; bf16 or fp16.
        k_PSKD, v_PSKD: contiguous; of q's dtype, or int8 or fp8 with scales.
        lens_B: int32, tokens in the rows' own pages.
        table_BP: int32, the rows' own pages.
        chunk_row_I: int32, the row of each chunk; a row's follow one another. May be longer than there are chunks.
        first_chunk_B1: int32 [B + 1], the first chunk of each row.
        chunk_pages_1: int32, pages of a chunk.
        runs: their rows' own keys all lie behind them.
        window: of a row's own keys only the newest so many count; not together with runs.
        k_scale_PSK, v_scale_PSK: float32, what a token's quantised keys and values of a head are multiplied with.

    Returns:
        [B, H, D] of q's dtype.
    """
    rows, heads, dim = q_BHD.shape
    page_tokens, kv_heads = k_PSKD.shape[1:3]
    share = heads // kv_heads
    group = triton.next_power_of_2(share)
    multiprocessors = _multiprocessors(q_BHD.device)
    chunks = len(chunk_row_I)
    quantized = k_scale_PSK is not None

    def partial(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=q_BHD.device)

    part_IHD, sum_IH = partial(chunks, heads, dim), partial(chunks, heads)
    cache_of = (k_PSKD, v_PSKD, *((k_scale_PSK, v_scale_PSK) if quantized else (sum_IH, sum_IH)))
    strides = (q_BHD.stride(0), q_BHD.stride(1), k_PSKD.stride(1))
    constants = {"H": heads, "K": kv_heads, "G": share, "D": dim, "S": page_tokens}
    constants |= {"CAPPED": softcap is not None, "QUANTIZED": quantized}
    count, splits, run_part, run_sum = 0, 0, part_IHD, sum_IH
    # Runs are bound by arithmetic, own pages by memory: side by side they take little more than the second.
    here, beside = _streams(q_BHD.device) if runs is not None else (None, None)
    if runs is not None:
        count = len(runs.cu_q_N1) - 1
        tile = max(_TILE, group)
        tiles = triton.cdiv(rows, tile // group)
        splits = max(1, min(8, _RUN_PROGRAMS * multiprocessors // (tiles * kv_heads)))
        run_part, run_sum = partial(splits, rows, heads, dim), partial(splits, rows, heads)
        if here is not None and beside is not None:
            beside.wait_stream(here)
        with torch.cuda.stream(beside):
            _attention_runs[(kv_heads, tiles, splits)](
                q_BHD, *cache_of, run_part, run_sum, runs.table_NP, runs.cu_q_N1, runs.cu_k_N1,
                rows, *strides, runs.table_NP.stride(0), scale, softcap or 1.0,
                **constants, M=tile, GROUP=group, RUNS=count, SPLITS=splits, **_RUN, num_stages=_run_stages(dim),
            )  # fmt: skip
    _attention_own[(min(_OWN_PROGRAMS * multiprocessors, chunks * kv_heads),)](
        q_BHD, *cache_of, part_IHD, sum_IH, table_BP, lens_B, chunk_row_I, first_chunk_B1, chunk_pages_1,
        rows, *strides, table_BP.stride(0), scale, softcap or 1.0, window or 0,
        **constants, M=max(16, group), WINDOWED=window is not None, **_OWN,
    )  # fmt: skip
    if here is not None and beside is not None:
        here.wait_stream(beside)
    out_BHD = torch.empty(rows, heads, dim, dtype=q_BHD.dtype, device=q_BHD.device)
    at_once = min(8, triton.next_power_of_2(heads))
    _attention_merge[(rows, triton.cdiv(heads, at_once))](
        part_IHD, sum_IH, run_part, run_sum, first_chunk_B1, runs.cu_q_N1 if runs else lens_B, out_BHD, rows,
        H=heads, D=dim, HEADS=at_once, RUNS=count, SPLITS=splits, num_warps=2,
    )  # fmt: skip
    return out_BHD


def _run_stages(dim: int) -> int:
    """Tiles of keys on their way at once: two of head dimension 256 exceed the 99 KiB of an A10G and an L4."""
    return 2 if dim <= 128 else 1


@cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def _streams(device: torch.device) -> tuple[torch.cuda.Stream | None, torch.cuda.Stream | None]:
    """The current stream, and another."""
    if device.type != "cuda":
        return None, None
    return torch.cuda.current_stream(device), _beside(device)


@cache
def _beside(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)

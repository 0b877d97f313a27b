"""Attention by itself: the Triton kernels against FlashAttention-2 and against the bytes that must be read.

Rows of drawn lengths behind a prefix that all share, in two layers of pages by turns, so that no read comes from the
cache. `floor_us` is the rows' own keys and values over the device's copy rate. `error` is that against fp32, relative.
Prefill likewise: follow-ups of a few hundred tokens behind long contexts, questions behind a prefix, long prompts.

    python -m bench.attention --out bench/results/attention.json
    python -m bench.attention --tune
"""

from __future__ import annotations

import argparse
import itertools
import random
import statistics
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from actors.engine.attention import _flash_attn, page_tokens_of
from actors.engine.kernels import decode, prefill
from actors.engine.runner import _chunks
from bench.common import device_info, measured_rates, print_table, write_json

PAGE_TOKENS = 256
RUNS = 4
HEADS = {"8b": (32, 8, 128), "1.7b": (16, 8, 128), "tp2 of 8b": (16, 4, 128), "head 64": (16, 8, 64)}


class Case:
    """Rows with their pages, on the device.

    Args:
        own: tokens of each row behind the prefix.
    """

    def __init__(
        self, heads: tuple[int, int, int], prefix_pages: int, own: Sequence[int], page_tokens: int = PAGE_TOKENS
    ):
        device = "cuda"
        self.heads, self.own, self.prefix_pages, self.page_tokens = heads, own, prefix_pages, page_tokens
        q_heads, kv_heads, dim = heads
        noise = torch.Generator(device).manual_seed(0)
        counts = [-(-tokens // page_tokens) for tokens in own]
        pages = 1 + prefix_pages + sum(counts)

        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, generator=noise, device=device, dtype=torch.bfloat16)

        def ints(values: Any) -> Tensor:
            return torch.tensor(values, dtype=torch.int32, device=device)

        self.q_BHD = draw(len(own), q_heads, dim) * 4
        self.layers = [tuple(draw(pages, page_tokens, kv_heads, dim) for _ in range(2)) for _ in range(2)]
        free = list(range(1 + prefix_pages, pages))
        random.Random(0).shuffle(free)
        self.tables = [[free.pop() for _ in range(count)] for count in counts]
        self.prefix = list(range(1, 1 + prefix_pages))
        width = prefix_pages + max(counts)
        self.table_BP = ints([table + [0] * (width - len(table)) for table in self.tables])
        self.whole_BP = ints(
            [[*self.prefix, *table] + [0] * (width - prefix_pages - len(table)) for table in self.tables]
        )
        self.lens_B, self.whole_B = ints(own), ints([prefix_pages * page_tokens + tokens for tokens in own])
        none = [len(own)] * (RUNS - 1)
        tokens = prefix_pages * page_tokens
        self.cu_q_N1, self.cu_k_N1 = ints([0, len(own), *none]), ints([0, *[tokens] * RUNS])
        self.table_NP = ints([self.prefix + [0] * (width - prefix_pages)] * RUNS)
        sizes = (size for size in itertools.count(1) if sum(-(-count // size) for count in counts) <= _chunks(len(own)))
        self.cut = self.chunks(next(sizes))

    def chunks(self, pages: int) -> tuple[Tensor, Tensor, Tensor]:
        """The rows' own pages in chunks of so many."""
        counts = [-(-len(table) // pages) for table in self.tables]
        rows = [row for row, count in enumerate(counts) for _ in range(count)]

        def ints(values: Any) -> Tensor:
            return torch.tensor(values, dtype=torch.int32, device=self.q_BHD.device)

        return ints(rows), ints([0, *itertools.accumulate(counts)]), ints([pages])

    def triton(self, layer: int, shared: bool = True) -> Tensor:
        """Ours, in chunks as the engine cuts them."""
        runs = decode.Runs(self.cu_q_N1, self.cu_k_N1, self.table_NP) if shared else None
        scale = self.heads[2] ** -0.5
        return decode.attend(self.q_BHD, *self.layers[layer], self.lens_B, self.table_BP, *self.cut, runs, scale)

    def flash(self, layer: int) -> Tensor:
        """FlashAttention over the whole contexts."""
        return _flash_attn()[1](
            self.q_BHD.unsqueeze(1),
            *self.layers[layer],
            cache_seqlens=self.whole_B,
            block_table=self.whole_BP,
            causal=True,
        )

    def flash_shared(self, layer: int) -> Any:
        """FlashAttention over the prefix once and over the rows' own pages, without the merge."""
        varlen, with_kvcache = _flash_attn()
        own = with_kvcache(
            self.q_BHD.unsqueeze(1),
            *self.layers[layer],
            cache_seqlens=self.lens_B,
            block_table=self.table_BP,
            causal=True,
            return_softmax_lse=True,
        )
        longest = self.prefix_pages * self.page_tokens
        cu_q, cu_k, table = self.cu_q_N1, self.cu_k_N1, self.table_NP
        run = varlen(
            self.q_BHD, *self.layers[layer], cu_q, cu_k, len(self.own), longest, block_table=table,
            return_attn_probs=True,
        )  # fmt: skip
        return own, run

    def expected(self, layer: int) -> Tensor:
        """In fp32, plainly."""
        q_heads, kv_heads, dim = self.heads
        out = []
        for row, table in enumerate(self.tables):
            pages = torch.tensor([*self.prefix, *table], device=self.q_BHD.device)
            length = self.prefix_pages * self.page_tokens + self.own[row]
            k_LKD, v_LKD = (x[pages].flatten(0, 1)[:length].float() for x in self.layers[layer])
            q_KGD = self.q_BHD[row].float().view(kv_heads, -1, dim)
            p_KGL = (torch.einsum("kgd,lkd->kgl", q_KGD, k_LKD) * dim**-0.5).softmax(-1)
            out.append(torch.einsum("kgl,lkd->kgd", p_KGL, v_LKD).reshape(q_heads, dim))
        return torch.stack(out)


def microseconds(fn: Callable[[int], Any], repeats: int = 20) -> float:
    """Median of a replayed graph with both layers in it, by layer."""
    for layer in (0, 1):
        fn(layer)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(4):
            fn(0)
            fn(1)
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / 8)
    return statistics.median(times)


def prefill_rows(heads: tuple[int, int, int], new: Sequence[int], start: Sequence[int]) -> list[dict[str, Any]]:
    """Both kernels over rows of `new` tokens behind `start` others."""
    q_heads, kv_heads, dim = heads
    noise = torch.Generator("cuda").manual_seed(0)
    lengths = [a + b for a, b in zip(new, start, strict=True)]
    counts = [-(-length // PAGE_TOKENS) for length in lengths]
    free = itertools.count(1)
    tables = [[next(free) for _ in range(count)] for count in counts]

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=noise, device="cuda", dtype=torch.bfloat16)

    def ints(values: Any) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, device="cuda")

    def sums(values: Sequence[int]) -> Tensor:
        return ints([0, *itertools.accumulate(values)])

    layers = [tuple(draw(1 + sum(counts), PAGE_TOKENS, kv_heads, dim) for _ in range(2)) for _ in range(2)]
    q_THD = draw(sum(new), q_heads, dim) * 4
    table_RP = ints([table + [0] * (max(counts) - len(table)) for table in tables])
    cu_q_R1, lens_R, cu_k_R1 = sums(new), ints(lengths), sums(lengths)
    queries = prefill.queries_a_tile(q_heads, kv_heads, dim, sum(new), len(new))
    tiles = [-(-count // queries) for count in new]
    row_I = ints([row for row, count in enumerate(tiles) for _ in range(count)])
    rows = (cu_q_R1, lens_R, table_RP, row_I, sums(tiles), queries)

    def ours(layer: int) -> Tensor:
        return prefill.attend(q_THD, *layers[layer], *rows, dim**-0.5)

    def flash(layer: int) -> Tensor:
        options = {"causal": True, "block_table": table_RP}
        return _flash_attn()[0](q_THD, *layers[layer], cu_q_R1, cu_k_R1, max(new), max(lengths), **options)

    flop = sum(4 * q_heads * dim * (n * s + n * (n + 1) / 2) for n, s in zip(new, start, strict=True))
    difference = float((ours(0).float() - flash(0).float()).norm() / flash(0).float().norm())
    times = {"flash": microseconds(flash, 10), "triton": microseconds(ours, 10)}
    base = {"rows": len(new), "new tokens": sum(new), "context tokens": sum(start)}
    return [
        base | {"what": name, "us": us, "tflop_s": flop / us / 1e6, "difference": difference}
        for name, us in times.items()
    ]


def tune() -> None:
    """Print what decode takes under other settings of its kernels; the first line of each table is what is set."""
    cases = {}
    for mean in (100, 700):
        drawn = random.Random(1)
        own = [drawn.randint(mean // 2, mean * 3 // 2) for _ in range(256)]
        cases[mean] = Case(HEADS["8b"], 12, own, page_tokens_of("triton"))

    def line(**setting: Any) -> dict[str, Any]:
        try:
            return setting | {f"us, {mean} own tokens": microseconds(case.triton, 10) for mean, case in cases.items()}
        except Exception as e:  # a compiler refuses in many ways
            return setting | {"failed": str(e)[:60]}

    runs, tile, programs, stages = decode._RUN, decode._TILE, decode._RUN_PROGRAMS, decode._run_stages
    lines = [line(tile=tile, programs=programs, stages=2, **runs)]
    for size, warps, count, block, many in itertools.product((64, 128), (4, 8), (1, 2, 4), (64, 128), (2, 3)):
        decode._RUN, decode._TILE, decode._RUN_PROGRAMS = {"BLOCK": block, "num_warps": warps}, size, count
        decode._run_stages = lambda _, many=many: many
        lines.append(line(tile=size, programs=count, stages=many, **decode._RUN))
    decode._RUN, decode._TILE, decode._RUN_PROGRAMS, decode._run_stages = runs, tile, programs, stages
    print_table("shared runs", lines)
    own, programs = decode._OWN, decode._OWN_PROGRAMS
    lines = [line(programs=programs, **own)]
    for block, warps, many, count in itertools.product((64, 128), (2, 4), (2, 3, 4), (4, 8, 16)):
        decode._OWN, decode._OWN_PROGRAMS = {"BLOCK": block, "num_warps": warps, "num_stages": many}, count
        lines.append(line(programs=count, **decode._OWN))
    decode._OWN, decode._OWN_PROGRAMS = own, programs
    print_table("own pages", lines)


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tune", action="store_true", help="try other settings of the decode kernels instead")
    parser.add_argument("--out", help="JSON file to write")
    args = parser.parse_args()
    if args.tune:
        tune()
        return
    rates = measured_rates("cuda")
    decoded: list[dict[str, Any]] = []
    work = [("8b", 6, 256, 200), ("8b", 6, 256, 700), ("8b", 6, 64, 700), ("8b", 6, 16, 700), ("8b", 6, 2, 700)]
    work += [("1.7b", 6, 256, 700), ("tp2 of 8b", 6, 256, 700), ("head 64", 6, 256, 700)]
    for shape, prefix_pages, rows, mean in work:
        drawn = random.Random(1)
        own = [drawn.randint(mean // 2, mean * 3 // 2) for _ in range(rows)]
        case = Case(HEADS[shape], prefix_pages, own)
        _, kv_heads, dim = case.heads
        floor_us = sum(own) * kv_heads * dim * 4 / rates["copy_bytes_s"] * 1e6
        wanted = case.expected(0)
        base = {"shape": shape, "rows": rows, "own tokens": sum(own), "floor_us": floor_us}
        for name, call in (
            ("flash", case.flash),
            ("flash, prefix once, not merged", case.flash_shared),
            ("triton", case.triton),
            ("triton, own pages alone", partial(case.triton, shared=False)),
        ):
            out, error = call(0), None
            if name in ("flash", "triton"):
                error = float((out.reshape(wanted.shape).float() - wanted).norm() / wanted.norm())
            decoded.append(base | {"what": name, "us": microseconds(call), "error": error})
        del case, wanted
        torch.cuda.empty_cache()
    print_table("decode, a layer", decoded)
    prefilled: list[dict[str, Any]] = []
    for shape in ("8b", "1.7b", "head 64"):
        drawn = random.Random(0)
        follow_ups = [drawn.randint(130, 360) for _ in range(28)], [drawn.randint(1740, 3000) for _ in range(28)]
        for new, start in (follow_ups, ([40] * 180, [1700] * 180), ([2000] * 4, [0] * 4)):
            prefilled += [{"shape": shape} | row for row in prefill_rows(HEADS[shape], new, start)]
    print_table("prefill, a layer", prefilled)
    workload = {"page_tokens": PAGE_TOKENS, "own": "uniform, half to one and a half of the mean"}
    results = [{"step": "decode"} | row for row in decoded] + [{"step": "prefill"} | row for row in prefilled]
    write_json(
        args.out, "attention", device=device_info("cuda") | rates, workload=workload, results=results, summary={}
    )


if __name__ == "__main__":
    main()

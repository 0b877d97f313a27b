"""Decode attention by itself: the Triton kernels against FlashAttention-2 and against the bytes that must be read.

Rows of drawn lengths behind a prefix that all share, in two layers of pages by turns, so that no read comes from the
cache. `floor_us` is the rows' own keys and values over the device's copy rate. `error` is that against fp32, relative.
With `--sweep` block sizes, warps, stages, programs and chunk sizes are tried, which is how those in
`actors/engine/decode.py` were chosen.

    python -m bench.decode_attention --out bench/results/decode_attention.json
    python -m bench.decode_attention --sweep
"""

from __future__ import annotations

import argparse
import itertools
import random
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from actors.engine import decode
from actors.engine.attention import _flash_attn
from bench.common import device_info, measured_rates, print_table, write_json

PAGE_TOKENS = 256
RUNS = 4
HEADS = {"8b": (32, 8, 128), "1.7b": (16, 8, 128), "tp2 of 8b": (16, 4, 128), "head 64": (16, 8, 64)}


class Case:
    """Rows with their pages, on the device.

    Args:
        own: tokens of each row behind the prefix.
    """

    def __init__(self, heads: tuple[int, int, int], prefix_pages: int, own: Sequence[int], device: str = "cuda"):
        self.heads, self.own, self.prefix_pages = heads, own, prefix_pages
        q_heads, kv_heads, dim = heads
        noise = torch.Generator(device).manual_seed(0)
        counts = [-(-tokens // PAGE_TOKENS) for tokens in own]
        pages = 1 + prefix_pages + sum(counts)

        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, generator=noise, device=device, dtype=torch.bfloat16)

        def ints(values: Any) -> Tensor:
            return torch.tensor(values, dtype=torch.int32, device=device)

        self.q_BHD = draw(len(own), q_heads, dim) * 4
        self.layers = [tuple(draw(pages, PAGE_TOKENS, kv_heads, dim) for _ in range(2)) for _ in range(2)]
        free = list(range(1 + prefix_pages, pages))
        random.Random(0).shuffle(free)
        self.tables = [[free.pop() for _ in range(count)] for count in counts]
        self.prefix = list(range(1, 1 + prefix_pages))
        width = prefix_pages + max(counts)
        self.table_BP = ints([table + [0] * (width - len(table)) for table in self.tables])
        self.whole_BP = ints(
            [[*self.prefix, *table] + [0] * (width - prefix_pages - len(table)) for table in self.tables]
        )
        self.lens_B, self.whole_B = ints(own), ints([prefix_pages * PAGE_TOKENS + tokens for tokens in own])
        none = [len(own)] * (RUNS - 1)
        tokens = prefix_pages * PAGE_TOKENS
        self.cu_q_N1, self.cu_k_N1 = ints([0, len(own), *none]), ints([0, *[tokens] * RUNS])
        self.table_NP = ints([self.prefix + [0] * (width - prefix_pages)] * RUNS)

    def chunks(self, pages: int) -> decode.Chunks:
        """The rows' own pages in chunks of so many."""
        counts = [-(-len(table) // pages) for table in self.tables]
        rows = [row for row, count in enumerate(counts) for _ in range(count)]
        first = [0, *itertools.accumulate(counts)]

        def ints(values: Any) -> Tensor:
            return torch.tensor(values, dtype=torch.int32, device=self.q_BHD.device)

        return decode.Chunks(ints(rows), ints(first), ints([pages]))

    def triton(self, layer: int, pages: int = 1, shared: bool = True, **options: Any) -> Tensor:
        """Ours."""
        runs = decode.Runs(self.cu_q_N1, self.cu_k_N1, self.table_NP) if shared else None
        k_PSKD, v_PSKD = self.layers[layer]
        lens_B, table_BP = self.lens_B, self.table_BP
        scale = self.heads[2] ** -0.5
        return decode.attend(
            self.q_BHD, k_PSKD, v_PSKD, lens_B, table_BP, self.chunk_sizes[pages], runs, scale, **options
        )

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
        longest = self.prefix_pages * PAGE_TOKENS
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
            length = self.prefix_pages * PAGE_TOKENS + self.own[row]
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


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sweep", action="store_true", help="try settings on the largest case")
    parser.add_argument("--out", help="JSON file to write")
    args = parser.parse_args()
    torch.set_float32_matmul_precision("highest")
    rates = measured_rates("cuda")
    results: list[dict[str, Any]] = []
    work = [("8b", 6, 256, 200), ("8b", 6, 256, 700), ("8b", 6, 64, 700), ("8b", 6, 16, 700), ("8b", 6, 1, 700)]
    work += [("1.7b", 6, 256, 700), ("tp2 of 8b", 6, 256, 700), ("head 64", 6, 256, 700)]
    for shape, prefix_pages, rows, mean in work:
        draw = random.Random(1)
        own = [draw.randint(max(1, mean // 2), mean * 3 // 2) for _ in range(rows)]
        case = Case(HEADS[shape], prefix_pages, own)
        case.chunk_sizes = {pages: case.chunks(pages) for pages in (1, 2, 4)}
        _, kv_heads, dim = case.heads
        floor_us = sum(own) * kv_heads * dim * 4 / rates["copy_bytes_s"] * 1e6
        wanted = case.expected(0)
        base = {"shape": shape, "rows": rows, "own tokens": sum(own), "floor_us": floor_us}
        for name, call in (
            ("flash", case.flash),
            ("flash, prefix once", case.flash_shared),
            ("triton", case.triton),
            ("triton, own pages alone", lambda layer, case=case: case.triton(layer, shared=False)),
        ):
            out = call(0)
            error = None
            if name in ("flash", "triton"):
                error = float((out.reshape(wanted.shape).float() - wanted).norm() / wanted.norm())
            results.append(base | {"what": name, "us": microseconds(call), "error": error})
            print(results[-1], flush=True)
        if args.sweep and (rows, mean) == (256, 700) and shape == "8b":
            sweep(case)
        del case, wanted
        torch.cuda.empty_cache()
    print_table("decode attention, a layer", results)
    workload = {"page_tokens": PAGE_TOKENS, "own": "uniform, half to one and a half of the mean"}
    write_json(
        args.out, "decode_attention", device=device_info("cuda") | rates, workload=workload, results=results, summary={}
    )


def sweep(case: Case) -> None:
    """Settings of both kernels, each alone."""
    found: list[dict[str, Any]] = []
    multiprocessors = torch.cuda.get_device_properties("cuda").multi_processor_count

    def attempt(kernel: str, call: Callable[[int], Any], **setting: Any) -> None:
        try:
            found.append({"kernel": kernel, "us": microseconds(call, 10)} | setting)
        except Exception as e:  # a setting that the chip has no room for
            print(kernel, setting, type(e).__name__, str(e)[:80], flush=True)

    for block, warps, stages in itertools.product((32, 64, 128), (2, 4), (2, 3, 4)):
        options = {"BLOCK": block, "num_warps": warps, "num_stages": stages}
        for pages, programs in ((1, 4), (2, 4), (1, 8), (2, 2)) if (block, stages) != (128, 4) else ((1, 2),):
            attempt(
                "own",
                lambda layer, o=options, p=pages, n=programs: case.triton(
                    layer, p, shared=False, own=o, programs=n * multiprocessors
                ),
                **options, pages=pages, programs=programs,
            )  # fmt: skip
    for tile, block, warps, stages in itertools.product((64, 128), (64, 128), (4, 8), (2, 3)):
        options = {"BLOCK": block, "num_warps": warps, "num_stages": stages}
        decode._TILE = tile
        for programs in (256, 512):
            decode._RUN_PROGRAMS = programs
            attempt("both", lambda layer, o=options: case.triton(layer, run=o), tile=tile, **options, programs=programs)
    decode._TILE, decode._RUN_PROGRAMS = 64, 256
    for kernel in ("own", "both"):
        mine = sorted((row for row in found if row["kernel"] == kernel), key=lambda row: row["us"])
        print_table(f"{kernel}: best of {len(mine)}", mine[:12])


if __name__ == "__main__":
    main()

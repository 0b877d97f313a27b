"""The Triton kernels under Triton's interpreter, on a CPU: `TRITON_INTERPRET=1 python -m tests.interpreted`.

A process of its own, since Triton decides at its import whether it interprets. bf16 is left to GPUs: the interpreter
has none.
"""

import itertools

import pytest
import torch
from transformers import LlamaConfig

from actors.engine import selfcheck
from actors.engine.kernels import decode, prefill, write
from actors.engine.kv import KVCache, kv_shapes, quantise
from actors.engine.selfcheck import check_numbers
from actors.errors import UnsupportedModel

K, G, D, S, P = 2, 3, 16, 64, 60  # KV heads, query heads each, head dimension, tokens a page, pages
BOUND = {torch.float32: 1e-5, torch.float16: 2e-3}


def ints(values):
    return torch.tensor(values, dtype=torch.int32)


def sums(values):
    return ints([0, *itertools.accumulate(values)])


def repeated(counts):
    return ints([row for row, count in enumerate(counts) for _ in range(count)])


def pages_of(dtype, quantized):
    """Keys and values as the kernels read them, their scales, and what they stand for."""
    wide = [torch.randn(P, S, K, D).to(dtype) for _ in range(2)]
    if not quantized:
        return wide, (), wide
    caches, scales = zip(*(quantise(x, torch.int8) for x in wide), strict=True)
    slots = torch.randperm(P * S)[:40]  # the kernel's own, over what torch made of them
    expected = [cache.clone() for cache in caches], [scale.clone() for scale in scales]
    for cache, scale in zip(caches, scales, strict=True):
        cache.flatten(0, 1)[slots] = 99
        scale.flatten(0, 1)[slots] = 99.0
    write.write(*(x.flatten(0, 1)[slots] for x in wide), *caches, slots, *scales)
    for got, wanted in zip((*caches, *scales), (*expected[0], *expected[1]), strict=True):
        # Numbers half-way between two are rounded up here and to the even one by torch.
        torch.testing.assert_close(got.float(), wanted.float(), atol=1.0 if got.dtype == torch.int8 else 1e-6, rtol=0)
    return caches, scales, [cache.float() * scale[..., None] for cache, scale in zip(caches, scales, strict=True)]


def plain(q_QHD, keys, values, pages, length, window, softcap):
    """Attention of the last tokens of a sequence over all of it."""
    k_LHD, v_LHD = (x[pages].flatten(0, 1)[:length].float().repeat_interleave(G, 1) for x in (keys, values))
    score_HQL = torch.einsum("qhd,lhd->hql", q_QHD.float(), k_LHD) * D**-0.5
    if softcap:
        score_HQL = torch.tanh(score_HQL / softcap) * softcap
    position_Q1, key_L = torch.arange(length - len(q_QHD), length)[:, None], torch.arange(length)
    seen_QL = (key_L <= position_Q1) & (key_L > position_Q1 - (window or length))
    return torch.einsum("hql,lhd->qhd", score_HQL.masked_fill(~seen_QL, float("-inf")).softmax(-1), v_LHD)


def tables_of(counts):
    free = itertools.count(10)
    tables = [[next(free) for _ in range(count)] for count in counts]
    return tables, ints([table + [0] * (max(counts) - len(table)) for table in tables])


def check(name, got, wanted, dtype):
    error = float((got.float() - wanted).norm() / wanted.norm())
    print(f"{name}: {error:.1e}")
    assert error < BOUND[dtype], name


def decodes(dtype, window, softcap, shared, quantized, chunk):
    """Three rows behind one run of pages, two behind another, two alone."""
    caches, scales, told = pages_of(dtype, quantized)
    lens = [1, 64, 65, 200, 130, 5, 127]
    runs = [[3, 9]] * 3 + [[4]] * 2 + [[]] * 2 if shared else [[]] * 7
    tables, table_BP = tables_of([-(-length // S) for length in lens])
    counts = [-(-len(table) // chunk) for table in tables]
    q_BHD = (torch.randn(K * G, 7, D) * 3).to(dtype).transpose(0, 1)
    of_runs = decode.Runs(sums([3, 2, 0, 0]), sums([2 * S, S, 0, 0]), ints([[3, 9], [4, 0], [0, 0], [0, 0]]))
    cut = (torch.cat([repeated(counts), ints([99] * 3)]), sums(counts), ints([chunk]))
    rows = (ints(lens), table_BP, *cut, of_runs if shared else None)
    got = decode.attend(q_BHD, *caches, *rows, D**-0.5, window, softcap, *scales)
    wanted = [
        plain(q_BHD[r : r + 1], *told, [*runs[r], *tables[r]], len(runs[r]) * S + lens[r], window, softcap)
        for r in range(7)
    ]
    case = f"decode {dtype} window {window} cap {softcap} shared {shared} int8 {quantized} chunks of {chunk}"
    check(case, got, torch.cat(wanted), dtype)


def prefills(dtype, window, softcap, quantized):
    """Rows with and without former context, some shorter than a tile. Behind a row's end its page holds infinities."""
    caches, scales, told = pages_of(dtype, quantized)
    new, start = [1, 30, 9, 70], [100, 0, 55, 130]
    lens = [a + b for a, b in zip(new, start, strict=True)]
    tables, table_RP = tables_of([-(-length // S) for length in lens])
    if not quantized:
        for table, length in zip(tables, lens, strict=True):
            for cache in caches:
                cache[table[-1], (length - 1) % S + 1 :] = float("inf")
    q_THD = (torch.randn(K * G, sum(new), D) * 3).to(dtype).transpose(0, 1)
    queries = prefill.queries_a_tile(K * G, K, D, sum(new), len(new))
    tiles = [-(-count // queries) for count in new]
    rows = (sums(new), ints(lens), table_RP, repeated(tiles), sums(tiles), queries)
    got = prefill.attend(q_THD, *caches, *rows, D**-0.5, window, softcap, *scales)
    ends = [0, *itertools.accumulate(new)]
    wanted = [plain(q_THD[ends[r] : ends[r + 1]], *told, tables[r], lens[r], window, softcap) for r in range(4)]
    check(f"prefill {dtype} window {window} cap {softcap} int8 {quantized}", got, torch.cat(wanted), dtype)


class WrongWeight:
    """The kernel over shared runs, its sums entering the merge with twice their weight."""

    def __init__(self, kernel):
        self.kernel = kernel

    def __getitem__(self, grid):
        def launch(*arguments, **constants):
            self.kernel[grid](*arguments, **constants)
            log_sum = arguments[self.kernel.arg_names.index("log_sum")]
            log_sum += 1.0  # base 2

        return launch


def checks_itself():
    """The check that an engine makes at its start."""
    config = LlamaConfig(
        num_attention_heads=K * G, num_key_value_heads=K, head_dim=D, hidden_size=K * G * D, num_hidden_layers=1
    )
    kv = KVCache(kv_shapes(config), 2, S, torch.float16, "cpu")
    kernel = decode._attention_runs
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(selfcheck, "LENGTHS", (70, 20, 1))
        check_numbers("triton", kv, config)
        print("checked itself")
        patch.setattr(decode, "_attention_runs", WrongWeight(kernel))
        with pytest.raises(UnsupportedModel, match="decode behind shared pages, error"):
            check_numbers("triton", kv, config)
    print("a wrong merge is caught")


def main():
    torch.manual_seed(0)
    for window, softcap, shared, quantized, chunk in (
        (None, None, True, False, 1),
        (50, None, False, False, 2),
        (None, 5.0, True, True, 2),
    ):
        decodes(torch.float32, window, softcap, shared, quantized, chunk)
    decodes(torch.float16, None, None, True, False, 1)
    for window, softcap, quantized in ((None, None, False), (40, 5.0, True)):
        prefills(torch.float32, window, softcap, quantized)
    prefills(torch.float16, None, None, False)
    checks_itself()


if __name__ == "__main__":
    main()

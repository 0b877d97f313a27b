"""The Triton kernels against plain attention: `TRITON_INTERPRET=1 python -m tests.interpreted` on a CPU, and on a GPU
by tests/gpu/test_kernels.py.

A process of its own on a CPU, since Triton decides at its import whether it interprets. bf16 and fp8 are left to GPUs:
the interpreter has no bf16, and rounds fp8 wrongly where a mantissa overflows.
"""

import itertools
from dataclasses import dataclass

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from actors.engine import attention, selfcheck
from actors.engine.fused import FusedAttention, fuse
from actors.engine.kernels import decode, prefill, write
from actors.engine.kv import KVCache, _plain, kv_shapes, quantise
from actors.engine.selfcheck import check_numbers
from actors.errors import UnsupportedModel
from tests.unit.test_runner import CONFIGS

K, S, P = 2, 64, 60  # KV heads, tokens a page, pages
BOUND = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}


@dataclass(frozen=True)
class Case:
    """A step; `stored` is the dtype of quantised KV, `group` the query heads of a KV head."""

    dtype: torch.dtype
    window: int | None = None
    softcap: float | None = None
    shared: bool = False
    stored: torch.dtype | None = None
    chunk: int = 1
    group: int = 3
    dim: int = 16


def ints(values):
    return torch.tensor(values, dtype=torch.int32)


def sums(values):
    return ints([0, *itertools.accumulate(values)])


def repeated(counts):
    return ints([row for row, count in enumerate(counts) for _ in range(count)])


def pages_of(case):
    """Keys and values as the kernels read them, their scales, and what they stand for."""
    wide = [torch.randn(P, S, K, case.dim).to(case.dtype) for _ in range(2)]
    if case.stored is None:
        return wide, (), wide
    caches, scales = zip(*(quantise(x, case.stored) for x in wide), strict=True)
    slots = torch.randperm(P * S)[:40]  # the kernel's own, over what torch made of them
    expected = [cache.clone() for cache in caches], [scale.clone() for scale in scales]
    for cache, scale in zip(caches, scales, strict=True):
        _plain(cache).flatten(0, 1)[slots] = 99
        scale.flatten(0, 1)[slots] = 99.0
    write.write(*(x.flatten(0, 1)[slots] for x in wide), *caches, slots, *scales)
    for got, wanted in zip((*caches, *scales), (*expected[0], *expected[1]), strict=True):
        # Numbers half-way between two are rounded up here and to the even one by torch; e4m3 has 3 bits of mantissa.
        atol, rtol = {torch.int8: (1.0, 0.0), torch.float8_e4m3fn: (0.01, 0.126)}.get(got.dtype, (1e-6, 0.0))
        torch.testing.assert_close(got.float(), wanted.float(), atol=atol, rtol=rtol)
    return caches, scales, [cache.float() * scale[..., None] for cache, scale in zip(caches, scales, strict=True)]


def plain(case, q_QHD, keys, values, pages, length):
    """Attention of the last tokens of a sequence over all of it."""
    k_LHD, v_LHD = (x[pages].flatten(0, 1)[:length].float().repeat_interleave(case.group, 1) for x in (keys, values))
    score_HQL = torch.einsum("qhd,lhd->hql", q_QHD.float(), k_LHD) * case.dim**-0.5
    if case.softcap:
        score_HQL = torch.tanh(score_HQL / case.softcap) * case.softcap
    position_Q1, key_L = torch.arange(length - len(q_QHD), length)[:, None], torch.arange(length)
    seen_QL = (key_L <= position_Q1) & (key_L > position_Q1 - (case.window or length))
    return torch.einsum("hql,lhd->qhd", score_HQL.masked_fill(~seen_QL, float("-inf")).softmax(-1), v_LHD)


def tables_of(counts):
    free = itertools.count(10)
    tables = [[next(free) for _ in range(count)] for count in counts]
    return tables, ints([table + [0] * (max(counts) - len(table)) for table in tables])


def check(name, case, got, wanted):
    error = float((got.float() - wanted).norm() / wanted.norm())
    print(f"{name} {case}: {error:.1e}")
    assert error < BOUND[case.dtype], case


def queries_of(case, tokens):
    return (torch.randn(K * case.group, tokens, case.dim) * 3).to(case.dtype).transpose(0, 1)


def decodes(case):
    """Three rows behind one run of pages, two behind another, two alone."""
    caches, scales, told = pages_of(case)
    lens = [1, 64, 65, 200, 130, 5, 127]
    runs = [[3, 9]] * 3 + [[4]] * 2 + [[]] * 2 if case.shared else [[]] * 7
    tables, table_BP = tables_of([-(-length // S) for length in lens])
    counts = [-(-len(table) // case.chunk) for table in tables]
    q_BHD = queries_of(case, 7)
    of_runs = decode.Runs(sums([3, 2, 0, 0]), sums([2 * S, S, 0, 0]), ints([[3, 9], [4, 0], [0, 0], [0, 0]]))
    cut = (torch.cat([repeated(counts), ints([99] * 3)]), sums(counts), ints([case.chunk]))
    rows = (ints(lens), table_BP, *cut, of_runs if case.shared else None)
    got = decode.attend(q_BHD, *caches, *rows, case.dim**-0.5, case.window, case.softcap, *scales)
    wanted = [
        plain(case, q_BHD[r : r + 1], *told, [*runs[r], *tables[r]], len(runs[r]) * S + lens[r]) for r in range(7)
    ]
    check("decode", case, got, torch.cat(wanted))


def prefills(case):
    """Rows with and without former context, some shorter than a tile. Behind a row's end its page holds infinities."""
    caches, scales, told = pages_of(case)
    new, start = [1, 30, 9, 70], [100, 0, 55, 130]
    lens = [a + b for a, b in zip(new, start, strict=True)]
    tables, table_RP = tables_of([-(-length // S) for length in lens])
    if case.stored is None:
        for table, length in zip(tables, lens, strict=True):
            for cache in caches:
                cache[table[-1], (length - 1) % S + 1 :] = float("inf")
    q_THD = queries_of(case, sum(new))
    queries = prefill.queries_a_tile(K * case.group, K, case.dim, sum(new), len(new))
    tiles = [-(-count // queries) for count in new]
    rows = (sums(new), ints(lens), table_RP, repeated(tiles), sums(tiles), queries)
    got = prefill.attend(q_THD, *caches, *rows, case.dim**-0.5, case.window, case.softcap, *scales)
    ends = [0, *itertools.accumulate(new)]
    wanted = [plain(case, q_THD[ends[r] : ends[r + 1]], *told, tables[r], lens[r]) for r in range(4)]
    check("prefill", case, got, torch.cat(wanted))


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
        num_attention_heads=3 * K, num_key_value_heads=K, head_dim=16, hidden_size=48 * K, num_hidden_layers=1
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


def fuses(name, quantized=False):
    """A model of one family in fp32: what it computes with its attention layers fused, and as they are."""
    config = CONFIGS[name]()
    config.num_hidden_layers = 2
    if config.layer_types:
        config.layer_types = config.layer_types[:2]
    model = AutoModelForCausalLM.from_config(config).eval()
    for called, weight in model.named_parameters():
        if "norm" in called or called.endswith("bias"):
            weight.data.add_(torch.randn_like(weight) * 0.2)
    model.set_attn_implementation(attention.NAME)
    kv = KVCache(kv_shapes(config), P, S, torch.float32, "cpu", "int8" if quantized else "auto")
    heads, dim = kv.shapes[0]
    new = [6, 3]
    _, table_RP = tables_of([1, 1])
    queries = prefill.queries_a_tile(config.num_attention_heads, heads, dim, sum(new), 2)
    tiles = [-(-count // queries) for count in new]
    position_T = torch.cat([torch.arange(count) for count in new])
    slots_T = table_RP.flatten().repeat_interleave(torch.tensor(new)) * S + position_T
    plan = attention.Plan(
        kv, "triton", slots_T, sums(new), sums(new), ints(new), table_RP, max(new), max(new), False,
        units=attention.Units(repeated(tiles), sums(tiles), queries, ints([1])),
    )  # fmt: skip

    def run():
        with torch.no_grad(), attention.attending(plan):
            out = model.base_model(
                input_ids=torch.arange(1, 1 + sum(new))[None], position_ids=position_T[None], use_cache=False
            )
        return out.last_hidden_state[0], [cache.clone().float() for cache in (*kv.k, *kv.v)]

    wanted, pages = run()
    own = model.base_model.layers[1].self_attn
    rotary = own.forward
    own.forward = lambda hidden_states, position_embeddings, **more: rotary(
        hidden_states, (position_embeddings[0], -position_embeddings[1]), **more
    )
    assert not fuse(model, kv), "another rotary embedding"
    layers = model.base_model.layers
    assert not any(type(layer.self_attn) is FusedAttention for layer in layers)
    own.forward = rotary
    assert fuse(model, kv), "refused"
    assert fuse(model, kv), "a second engine over the same model"
    assert all(type(layer.self_attn) is FusedAttention for layer in layers)
    got, fused_pages = run()
    for layer in layers:
        layer.compile(dynamic=True, fullgraph=True, backend="aot_eager")
    compiled, _ = run()
    for case, out in (("fused", got), ("compiled", compiled)):
        error = float((out - wanted).norm() / wanted.norm())
        print(f"{case} {name} int8 {quantized}: {error:.1e}")
        assert error < (2e-3 if quantized else 1e-5), name
    for before, after in zip(pages, fused_pages, strict=True):
        assert float((before - after).abs().max()) <= (1 if quantized else 1e-4)


def main():
    torch.manual_seed(0)
    for case in (
        Case(torch.float32, shared=True),
        Case(torch.float32, window=50, chunk=2, group=1),
        Case(torch.float32, softcap=5.0, shared=True, stored=torch.int8, chunk=2),
        Case(torch.float16, shared=True, group=8),
    ):
        decodes(case)
    for case in (
        Case(torch.float32),
        Case(torch.float32, window=40, softcap=5.0, stored=torch.int8, group=8),
        Case(torch.float16, group=1),
    ):
        prefills(case)
    for name in ("qwen2", "gemma3"):
        fuses(name, quantized=name == "gemma3")
    checks_itself()


if __name__ == "__main__":
    main()

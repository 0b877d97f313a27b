"""On a GPU: kernels against the fp32 reference, graphs against uncaptured steps, noise against the CPU's.

Half precision is checked by logit error, relative to the spread of the logits: bf16 keeps 8 bits and fp16 11, and both
runs round the same linear layers, so what differs is attention and the order of its sums.
"""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

from actors.engine import attention
from actors.engine.kv import KVCache, kv_shapes
from actors.engine.protocol import RowStep
from actors.engine.runner import Runner
from actors.engine.sampling import choose, gumbel, noise_bits
from actors.engine.selfcheck import check_numbers
from actors.errors import UnsupportedModel
from actors.messages import Sampling

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]

PAGE = 256
PROMPT = 700
WINDOW = 150
MAX_LEN = 1024
SHAPE = {
    "vocab_size": 512,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "initializer_range": 0.1,
}
HEADS = {**SHAPE, "head_dim": 64}
CAPS = {"query_pre_attn_scalar": 80, "sliding_window": WINDOW}
CONFIGS = {
    "llama": lambda: LlamaConfig(**HEADS),
    "qwen2": lambda: Qwen2Config(**SHAPE, use_sliding_window=True, sliding_window=WINDOW, max_window_layers=2),
    "qwen3": lambda: Qwen3Config(**{**HEADS, "head_dim": 128}),
    "qwen3_moe": lambda: Qwen3MoeConfig(
        **HEADS, moe_intermediate_size=128, num_experts=8, num_experts_per_tok=2, norm_topk_prob=True
    ),
    "mistral": lambda: MistralConfig(**HEADS, sliding_window=WINDOW),
    "gemma": lambda: GemmaConfig(**{**HEADS, "head_dim": 256}),
    "gemma2": lambda: Gemma2Config(**HEADS, **CAPS, attn_logit_softcapping=5.0, final_logit_softcapping=8.0),
    "gemma3": lambda: Gemma3TextConfig(**HEADS, **CAPS, sliding_window_pattern=2),
}
# Largest logit error over the standard deviation of the logits.
BOUND = {torch.bfloat16: 0.15, torch.float16: 0.03}
# The same of quantised KV: a number that a rounding error in bf16 moves over a border moves by a whole step.
EIGHT_BIT_BOUND = {"int8": 0.25, "fp8": 0.5}
GREEDY = Sampling()
PAGES = {"a": [5, 2, 9, 1], "b": [4, 11, 3, 6], "c": [7, 8, 10, 12], "d": [13, 14, 15]}


def tiny(name, dtype=torch.float32):
    torch.manual_seed(0)
    config = CONFIGS[name]()
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager")
    return model.eval().to("cuda", dtype)


def prompt(seed, tokens=PROMPT):
    return torch.randint(3, 512, (tokens,), generator=torch.Generator().manual_seed(seed)).tolist()


class Recorded(Runner):
    logits = None

    def _draw(self, logits_BV, ids_B, rows, place_R):
        self.logits = logits_BV[[at for at in place_R if at is not None]].float()
        return super()._draw(logits_BV, ids_B, rows, place_R)


def runner_of(model, kernel, graphs=False, max_batch=8, pages=16, kv_dtype="auto", **kwargs):
    kv = KVCache(kv_shapes(model.config), pages, PAGE, model.dtype, "cuda", kv_dtype)
    try:
        check_numbers(kernel, kv, model.config)
    except UnsupportedModel as e:
        pytest.skip(f"refused: {e}")
    return Recorded(model, kv, kernel, max_batch, 2048, MAX_LEN, graphs=graphs, **kwargs)


def row(ids, start, end, pages, sample=True, sampling=GREEDY):
    return RowStep(ids[start:end], start, PAGES[pages], sample, sampling)


def replay(runner, decode_ids):
    """Chunked prefill in mixed steps, then decode steps of given tokens; the logits of each step."""
    a, b, c = prompt(1), prompt(2, 300), prompt(3, 40)
    out = []
    runner.step([row(c, 0, 40, "c")])
    out.append(runner.logits)
    runner.step([row(a, 0, 333, "a", sample=False), row([*c, 7], 40, 41, "c"), row(b, 0, 290, "b", sample=False)])
    out.append(runner.logits)
    runner.step([row(a, 333, 700, "a"), row([*c, 7, 8], 41, 42, "c"), row(b, 290, 300, "b")])
    out.append(runner.logits)
    a, b, c = list(a), list(b), [*c, 7, 8]
    for token in decode_ids:
        for ids in (a, b, c):
            ids.append(token)
        runner.step([row(ids, len(ids) - 1, len(ids), key) for ids, key in ((a, "a"), (b, "b"), (c, "c"))])
        out.append(runner.logits)
    return torch.cat(out)


@pytest.mark.parametrize("name", CONFIGS)
def test_the_reference_on_cuda_equals_the_plain_model(name):
    model = tiny(name)
    ids = prompt(1)
    with torch.no_grad():
        expected = model(torch.tensor([ids], device="cuda"), use_cache=False).logits[0, -1]
    runner = runner_of(model, "reference")
    runner.step([row(ids, 0, 333, "a", sample=False)])
    runner.step([row(ids, 333, 700, "a")])
    torch.testing.assert_close(runner.logits[0], expected, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("kernel", ["triton", "flash_attn", "torch_varlen"])
@pytest.mark.parametrize("name", CONFIGS)
def test_half_precision_kernels_agree_with_the_reference(name, kernel, dtype):
    if kernel not in attention.installed():
        pytest.skip(f"{kernel} is not installed")
    if kernel == "torch_varlen" and name == "gemma2":
        pytest.skip("refused: soft cap")
    model = tiny(name, dtype)
    expected = replay(runner_of(model, "reference"), [20, 30, 40])
    got = replay(runner_of(model, kernel), [20, 30, 40])
    error = (got - expected).abs().amax(-1) / expected.std(-1)
    # A router's near-tie sends a token to another expert: for experts the typical row counts.
    worst = error.median() if name == "qwen3_moe" else error.max()
    assert worst < BOUND[dtype], error.tolist()


@pytest.fixture
def on_cuda():
    """Tensors are made on the GPU unless somebody says where."""
    torch.manual_seed(0)
    with torch.device("cuda"):
        yield


@pytest.mark.usefixtures("on_cuda")
@pytest.mark.parametrize("stored", [None, torch.int8, torch.float8_e4m3fn], ids=["plain", "int8", "fp8"])
@pytest.mark.parametrize(
    ("group", "dim", "dtype"),
    [
        (1, 64, torch.bfloat16),
        (3, 256, torch.bfloat16),
        (4, 128, torch.float16),
        (4, 128, torch.bfloat16),
        (8, 128, torch.bfloat16),
    ],
)
def test_triton_computes_attention(group, dim, stored, dtype):
    """By query heads of a KV head, behind shared pages and without, as tests/interpreted.py has it on a CPU."""
    pytest.importorskip("triton")
    if stored == torch.float8_e4m3fn and torch.cuda.get_device_capability() < attention._FP8_CAPABILITY:
        pytest.skip("Triton has no fp8 here")
    from tests import interpreted

    case = interpreted.Case(dtype, stored=stored, group=group, dim=dim)
    for changes in ({"shared": True, "chunk": 2}, {"shared": True, "softcap": 5.0}, {"window": 50}):
        interpreted.decodes(replace(case, **changes))
    for changes in ({}, {"window": 40, "softcap": 5.0}):
        interpreted.prefills(replace(case, **changes))


@pytest.mark.parametrize("kv_dtype", ["int8", "fp8"])
@pytest.mark.parametrize("kernel", attention.HALF)
@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma2"])
def test_quantised_kv_agrees_with_the_reference(name, kernel, kv_dtype):
    if kernel not in attention.installed():
        pytest.skip(f"{kernel} is not installed")
    if kernel == "torch_varlen" and name == "gemma2":
        pytest.skip("refused: soft cap")
    model = tiny(name, torch.bfloat16)
    expected = replay(runner_of(model, "reference", kv_dtype=kv_dtype), [20, 30, 40])
    runner = runner_of(model, kernel, kv_dtype=kv_dtype, graphs=True)
    runner.capture()
    assert bool(runner.captured) == (kernel == "triton")
    error = (replay(runner, [20, 30, 40]) - expected).abs().amax(-1) / expected.std(-1)
    assert error.max() < EIGHT_BIT_BOUND[kv_dtype], error.tolist()


@pytest.mark.parametrize("name", CONFIGS)
def test_graphs_equal_uncaptured_steps(name):
    kernels = attention.installed()
    if not kernels or (name == "gemma2" and kernels[0] == "torch_varlen"):
        pytest.skip("no half-precision kernel")
    model = tiny(name, torch.bfloat16)
    expected = replay(runner_of(model, kernels[0]), [20, 30, 40, 50])
    runner = runner_of(model, kernels[0], graphs=True)
    runner.capture()
    assert runner.captured == (1, 2, 4, 8)
    got = replay(runner, [20, 30, 40, 50])
    error = (got - expected).abs().amax(-1) / expected.std(-1)
    worst = error.median() if name == "qwen3_moe" else error.max()
    assert worst < BOUND[torch.bfloat16], error.tolist()
    if name != "qwen3_moe":
        # Padding reaches no row: the same three rows alone in a graph of four, and with a fourth beside them.
        a, b, c, d = prompt(1)[:9], prompt(2)[:9], prompt(3)[:9], prompt(4)[:9]
        for ids, key in ((a, "a"), (b, "b"), (c, "c"), (d, "d")):
            runner.step([row(ids, 0, 8, key, sample=False)])
        three = [row(a, 8, 9, "a"), row(b, 8, 9, "b"), row(c, 8, 9, "c")]
        runner.step(three)
        alone = runner.logits
        runner.step([*three, row(d, 8, 9, "d")])
        assert torch.equal(runner.logits[:3], alone)


def no_farther(name, own, *others):
    """Of two ways to round in half precision neither is right: what counts is how far each is from fp32."""
    exact = replay(runner_of(tiny(name, torch.bfloat16).float(), "reference"), [20, 30, 40, 50])

    def errors(got):
        error = (got - exact).abs().amax(-1) / exact.std(-1)
        # A router's near-tie sends a token to another expert: for experts the typical row counts.
        return [error.median().item()] * 2 if name == "qwen3_moe" else [error.mean().item(), error.max().item()]

    mean, most = errors(own)
    for got in others:
        assert errors(got)[0] < 1.25 * mean, (errors(got), errors(own))
        assert errors(got)[1] < 1.5 * most, (errors(got), errors(own))


@pytest.mark.parametrize("name", CONFIGS)
def test_compiled_layers_agree_with_uncompiled_ones(name):
    kernels = attention.installed()
    if not kernels or (name == "gemma2" and kernels[0] == "torch_varlen"):
        pytest.skip("no half-precision kernel")
    torch._dynamo.reset()
    model = tiny(name, torch.bfloat16)
    own = replay(runner_of(model, kernels[0]), [20, 30, 40, 50])
    runner = runner_of(model, kernels[0], graphs=True)
    assert runner.compile()
    uncaptured = replay(runner, [20, 30, 40, 50])
    runner.capture()
    assert runner.captured == (2, 4, 8)
    no_farther(name, own, uncaptured, replay(runner, [20, 30, 40, 50]))
    torch._dynamo.reset()


@pytest.mark.parametrize("kv_dtype", ["auto", "int8"])
@pytest.mark.parametrize("name", CONFIGS)
def test_fused_layers_agree_with_the_models_own(name, kv_dtype):
    if "triton" not in attention.installed():
        pytest.skip("no Triton")
    torch._dynamo.reset()
    own = replay(runner_of(tiny(name, torch.bfloat16), "triton", kv_dtype=kv_dtype), [20, 30, 40, 50])
    runner = runner_of(tiny(name, torch.bfloat16), "triton", graphs=True, kv_dtype=kv_dtype)
    assert runner.fuse()
    fused = replay(runner, [20, 30, 40, 50])
    assert runner.compile()
    runner.capture()
    no_farther(name, own, fused, replay(runner, [20, 30, 40, 50]))
    torch._dynamo.reset()


FORKS = [([1, 2, 4 + r], 2, 3 + 7 * r) for r in range(6)] + [([3, 10 + r], 1, 9 + r) for r in range(3)]
FORKS.append(([13], 0, 40))
"""(pages, whole pages that are shared, tokens of its own) of each row: six begin with pages 1 and 2, three with 3."""


def forked(runner):
    """Prefill the rows of FORKS; the next step of each, which decodes one token."""
    steps = []
    for r, (pages, shared, own) in enumerate(FORKS):
        ids = prompt(pages[0], shared * PAGE) + prompt(50 + r, own + 1)
        runner.step([RowStep(ids[:-1], 0, pages, False, GREEDY)])
        steps.append(RowStep(ids[-1:], len(ids) - 1, pages, True, GREEDY))
    return steps


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma2"])
def test_pages_that_rows_share_are_read_once(name, compiled):
    if "triton" not in attention.installed():
        pytest.skip("triton is not installed")
    torch._dynamo.reset()
    model = tiny(name, torch.bfloat16)
    plain = runner_of(model, "reference", pages=24, max_batch=16)
    plain.step(forked(plain))
    runner = runner_of(model, "triton", pages=24, max_batch=16, graphs=True)
    if compiled:
        assert runner.compile()
    runner.capture()
    assert runner._graphs[16].sharing == (name != "gemma2")
    rows = forked(runner)
    runner.step(rows)
    error = (runner.logits - plain.logits).abs().amax(-1) / plain.logits.std(-1)
    assert error.max() < BOUND[torch.bfloat16], error.tolist()
    # Without the shared pages it would show.
    zeroed = [replace(row, pages=[14] * (len(row.pages) - 1) + [row.pages[-1]]) for row in rows]
    runner.step(zeroed)
    assert ((runner.logits - plain.logits).abs().amax(-1) / plain.logits.std(-1))[:9].min() > BOUND[torch.bfloat16]
    torch._dynamo.reset()


@pytest.mark.parametrize("graphs", [False, True])
@pytest.mark.parametrize("kernel", attention.HALF)
@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma2"])
def test_guesses_are_the_steps_that_they_stand_for(name, kernel, graphs):
    """Five rows with two guesses each in one step, among them rows that share pages, against three steps."""
    if kernel not in attention.installed():
        pytest.skip(f"{kernel} is not installed")
    if kernel == "torch_varlen" and name == "gemma2":
        pytest.skip("refused: soft cap")
    model = tiny(name, torch.bfloat16)
    plain = runner_of(model, "reference", pages=24, max_batch=16)
    runner = runner_of(model, kernel, pages=24, max_batch=16, graphs=graphs)
    runner.capture()
    expected = []
    for rows in guessed(forked(plain)):
        plain.step(rows)
        expected.append(plain.logits)
    together = [row for of_row in zip(*guessed(forked(runner)), strict=True) for row in of_row]
    runner.step(together)
    expected = torch.stack(expected, 1).flatten(0, 1)
    error = (runner.logits - expected).abs().amax(-1) / expected.std(-1)
    assert error.max() < BOUND[torch.bfloat16], error.tolist()


def guessed(rows):
    """The next step of five of the rows, and the two after it, by tokens that are given."""
    chosen = [*rows[:3], rows[6], rows[9]]
    return [
        [replace(row, token_ids=[token or row.token_ids[0]], start=row.start + at) for row in chosen]
        for at, token in enumerate((None, 20, 30))
    ]


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(0.9, 0.95, 40, 7)], ids=["greedy", "sampled"])
def test_steps_launched_ahead_are_those_that_follow_one_another(sampling):
    kernels = attention.installed()
    if not kernels:
        pytest.skip("no half-precision kernel")
    model = tiny("llama", torch.bfloat16)
    runner = runner_of(model, kernels[0], pages=24, max_batch=16, graphs=True)
    runner.capture()

    def of(rows, drawn, keep):
        return [replace(rows[r], token_ids=[drawn[r]], start=rows[r].start + 1) for r in keep]

    chain = [[*range(10)], [0, 1, 2, 3, 5, 6, 8, 9], [7, 0, 3, 4, 1], [0, 1, 2, 3, 4]]
    first = [replace(row, sampling=sampling, logprobs=True) for row in forked(runner)]
    expected, rows = [runner.step(first)], first
    for keep in chain[1:]:
        rows = of(rows, [token for token, _ in expected[-1]], keep)
        expected.append(runner.step(rows))
    rows = [replace(row, sampling=sampling, logprobs=True) for row in forked(runner)]
    launched = [runner.launch(rows)]
    for keep in chain[1:]:
        rows = of(rows, [0] * len(rows), keep)
        launched.append(runner.launch(rows, launched[-1], keep))
    assert [drawn.result() for drawn in launched] == expected


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(0.9, 0.95, 40, 7)], ids=["greedy", "sampled"])
def test_prefill_and_decode_launched_in_turn_are_those_that_follow_one_another(sampling):
    """A prompt is computed in two chunks between decode steps, and decoded with the others behind its last."""
    kernels = attention.installed()
    if not kernels:
        pytest.skip("no half-precision kernel")
    runner = runner_of(tiny("llama", torch.bfloat16), kernels[0], pages=24, max_batch=16, graphs=True)
    runner.capture()
    ids, pages = prompt(77, 300), [15, 16]

    def of(rows, drawn):
        return [replace(row, token_ids=[at[0]], start=row.start + 1) for row, at in zip(rows, drawn, strict=True)]

    def results(go):
        first = [replace(row, sampling=sampling, logprobs=True) for row in forked(runner)]
        a = go(first)
        b = go([RowStep(ids[:200], 0, pages, False, sampling)], a, [None])
        second = of(first, a.result())
        c = go(second, b, [None] * 10)
        d = go([RowStep(ids[200:], 200, pages, True, sampling)], c, [None])
        third = [*of(second, c.result()), RowStep([0], 300, pages, True, sampling)]
        e = go(third, d, [None] * 10 + [0])
        return [[drawn and drawn[0] for drawn in step.result()] for step in (a, b, c, d, e)]

    def stepped(rows, after=None, sources=()):
        sources = sources or [None] * len(rows)
        rows = [
            row if at is None else replace(row, token_ids=[after.result()[at][0]])
            for row, at in zip(rows, sources, strict=True)
        ]
        drawn = runner.step(rows)
        return SimpleNamespace(result=lambda: drawn)

    assert results(runner.launch) == results(stepped)


def test_graphs_are_dropped_by_resize_and_captured_again():
    kernels = attention.installed()
    if not kernels:
        pytest.skip("no half-precision kernel")
    runner = runner_of(tiny("llama", torch.bfloat16), kernels[0], graphs=True)
    runner.capture()
    before = replay(runner, [20])
    runner.resize(14)
    assert runner.captured == ()
    runner.capture()
    assert runner.captured == (1, 2, 4, 8)
    torch.testing.assert_close(replay(runner, [20]), before)


def test_a_failed_capture_leaves_decode_uncaptured(monkeypatch, caplog):
    kernels = attention.installed()
    if not kernels:
        pytest.skip("no half-precision kernel")
    runner = runner_of(tiny("llama", torch.bfloat16), kernels[0], graphs=True)

    def out_of_memory(size, pool):
        raise torch.OutOfMemoryError("no room for a graph")

    monkeypatch.setattr(runner, "_capture", out_of_memory)
    runner.capture()
    runner.capture()
    assert runner.captured == ()
    assert caplog.text.count("no room for a graph") == 1
    replay(runner, [20])


def test_sampling_in_a_graph_step_equals_the_uncaptured_one():
    kernels = attention.installed()
    if not kernels:
        pytest.skip("no half-precision kernel")
    model = tiny("llama", torch.bfloat16)
    runner = runner_of(model, kernels[0], graphs=True)
    runner.capture()
    ids = prompt(1)
    runner.step([row(ids, 0, 699, "a", sample=False)])
    for sampling in (Sampling(1.2, 0.9, 40, 3), Sampling(0.7, seed=9), GREEDY):
        (drawn,) = runner.step([RowStep(ids[699:], 699, PAGES["a"], True, sampling, True)])
        expected = choose(
            runner.logits,
            torch.tensor([sampling.seed], device="cuda"),
            torch.tensor([700], device="cuda"),
            torch.tensor([sampling.temperature], device="cuda") if sampling.temperature else None,
            torch.tensor([sampling.top_p], device="cuda") if sampling.top_p < 1 else None,
            torch.tensor([sampling.top_k], device="cuda") if sampling.top_k else None,
        )
        assert drawn == (int(expected[0]), float(expected[1]))


def test_choose_can_be_captured():
    rows = 20
    logits = torch.randn(rows, 512, device="cuda")
    arguments = (
        torch.arange(rows, device="cuda"),
        torch.arange(rows, device="cuda"),
        torch.linspace(0, 2, rows, device="cuda"),
        torch.full((rows,), 0.9, device="cuda"),
        torch.full((rows,), 40, device="cuda"),
    )
    expected = choose(logits, *arguments)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = choose(logits, *arguments)
    graph.replay()
    assert torch.equal(got[0], expected[0])
    assert torch.equal(got[1], expected[1])


def test_noise_is_the_cpus():
    seeds, positions = torch.arange(-50, 50), torch.arange(100) * 1000
    bits = noise_bits(seeds.cuda(), positions.cuda(), 3000)
    assert torch.equal(bits.cpu(), noise_bits(seeds, positions, 3000))
    difference = gumbel(seeds.cuda(), positions.cuda(), 3000).cpu() - gumbel(seeds, positions, 3000)
    # A last bit of the float64 logarithm may differ, and with it the rounding to float32.
    assert difference.abs().max() < 1e-5
    assert (difference != 0).float().mean() < 1e-3


@pytest.mark.parametrize("name", ["llama", "qwen3_moe", "gemma3"])
def test_invariant_steps_hold_bits_on_cuda(name):
    runner = runner_of(tiny(name), "reference", invariant=True)
    a, b = prompt(1), prompt(2, 300)
    runner.step([row(a, 0, 700, "a")])
    alone = runner.logits[0]
    runner.kv.resize(16)
    runner.step([row(b, 0, 250, "b", sample=False), row(a, 0, 333, "a", sample=False)])
    runner.step([row(b, 250, 300, "b"), row(a, 333, 700, "a")])
    assert torch.equal(runner.logits[1], alone)


def test_profile_measures_a_steps_workspace():
    kernels = attention.installed()
    kernel, dtype = (kernels[0], torch.bfloat16) if kernels else ("reference", torch.float32)
    model = tiny("llama", dtype)
    kv = KVCache(kv_shapes(model.config), 1, PAGE, dtype, "cuda")
    runner = Runner(model, kv, kernel, 8, 512, MAX_LEN, graphs=False)
    small, large = runner.profile(), runner.profile(max_prefill_tokens=4096)
    assert 0 < small < large

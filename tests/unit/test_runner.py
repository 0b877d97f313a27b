"""Packed, paged steps against the plain forward of the same model, in fp32 on CPU, for every supported family."""

from dataclasses import replace

import numpy as np
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
from actors.engine.runner import Runner, _fill, _Packed, _runs, _Span, graph_sizes
from actors.errors import InputError, UnsupportedModel
from actors.messages import Sampling

PAGE = 16
PROMPT = 50
WINDOW = 12
# An initializer_range of 0.2 spreads the logits, so that a wrong mask shows and ties do not.
SHAPE = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
}
HEADS = {**SHAPE, "head_dim": 16}
CAPS = {"query_pre_attn_scalar": 24, "sliding_window": WINDOW}
CONFIGS = {
    "llama": lambda: LlamaConfig(**HEADS),
    "llama_rope": lambda: LlamaConfig(
        **HEADS, rope_parameters={"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}
    ),
    "qwen2": lambda: Qwen2Config(**SHAPE),
    "qwen2_sliding": lambda: Qwen2Config(**SHAPE, use_sliding_window=True, sliding_window=WINDOW, max_window_layers=2),
    "qwen3": lambda: Qwen3Config(**HEADS),
    "qwen3_moe": lambda: Qwen3MoeConfig(
        **HEADS, moe_intermediate_size=32, num_experts=8, num_experts_per_tok=2, norm_topk_prob=True
    ),
    "mistral": lambda: MistralConfig(**HEADS, sliding_window=WINDOW),
    "gemma": lambda: GemmaConfig(**HEADS),
    "gemma2": lambda: Gemma2Config(**HEADS, **CAPS, attn_logit_softcapping=5.0, final_logit_softcapping=8.0),
    "gemma3": lambda: Gemma3TextConfig(**HEADS, **CAPS, sliding_window_pattern=2),
}
DENSE = [name for name in CONFIGS if name != "qwen3_moe"]
GREEDY = Sampling()


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def tiny(name, seed=0):
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(CONFIGS[name](), dtype=torch.float32, attn_implementation="eager").eval()


def prompt(seed, tokens=PROMPT):
    return torch.randint(3, 128, (tokens,), generator=torch.Generator().manual_seed(seed)).tolist()


@torch.no_grad()
def plain_logits(model, ids):
    return model(torch.tensor([ids]), use_cache=False).logits[0]


def plain_greedy(model, ids, tokens):
    ids = list(ids)
    for _ in range(tokens):
        ids.append(int(plain_logits(model, ids)[-1].argmax()))
    return ids[-tokens:]


class Recorded(Runner):
    """Keeps the logits of the last step's drawn rows."""

    logits = None

    def _draw(self, logits_BV, ids_B, rows, place_R):
        self.logits = logits_BV.clone()
        return super()._draw(logits_BV, ids_B, rows, place_R)


def runner_of(model, pages=40, **kwargs):
    kv = KVCache(kv_shapes(model.config), pages, PAGE, torch.float32, "cpu")
    return Recorded(model, kv, "reference", max_batch=8, max_prefill_tokens=64, max_model_len=256, **kwargs)


def row(ids, start, end, pages, sample=True, sampling=GREEDY, logprobs=False):
    return RowStep(ids[start:end], start, pages, sample, sampling, logprobs)


def prefill_alone(runner, ids, pages, cuts=()):
    """Prefill in chunks that end at `cuts`; the logits after the last token."""
    at = 0
    for end in (*cuts, len(ids)):
        runner.step([row(ids, at, end, pages, sample=end == len(ids))])
        at = end
    return runner.logits[0]


A_PAGES, B_PAGES, C_PAGES = [3, 5, 2, 8, 11], [4, 1, 9, 30, 31], [7, 6, 10, 12, 33]


@pytest.mark.parametrize("name", CONFIGS)
def test_chunked_prefill_in_a_mixed_batch_and_decode_equal_the_plain_model(name):
    model = tiny(name)
    a, b, c = prompt(1), prompt(2, 33), prompt(3, 7)
    expected = [plain_greedy(model, ids, 6) for ids in (a, b, c)]
    logits_a, logits_b = plain_logits(model, a), plain_logits(model, b)
    runner = runner_of(model)

    # c decodes while a and b are prefilled in chunks that end anywhere.
    got_c = [runner.step([row(c, 0, 7, C_PAGES)])[0][0]]
    drawn = runner.step(
        [row(a, 0, 21, A_PAGES, sample=False), row(c + got_c, 7, 8, C_PAGES), row(b, 0, 9, B_PAGES, sample=False)]
    )
    assert drawn[0] is None
    assert drawn[2] is None
    got_c.append(drawn[1][0])
    drawn = runner.step([row(a, 21, 50, A_PAGES), row(c + got_c, 8, 9, C_PAGES), row(b, 9, 33, B_PAGES)])
    torch.testing.assert_close(runner.logits[0], logits_a[-1], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(runner.logits[2], logits_b[-1], atol=1e-4, rtol=1e-4)
    got = [[drawn[0][0]], [drawn[2][0]], [*got_c, drawn[1][0]]]

    while any(len(tokens) < 6 for tokens in got):
        ids = [a + got[0], b + got[1], c + got[2]]
        drawn = runner.step(
            [row(i, len(i) - 1, len(i), pages) for i, pages in zip(ids, (A_PAGES, B_PAGES, C_PAGES), strict=True)]
        )
        for tokens, result in zip(got, drawn, strict=True):
            tokens.append(result[0])
    assert [tokens[:6] for tokens in got] == expected


@pytest.mark.parametrize("name", ["mistral", "gemma3", "gemma2"])
def test_the_window_and_caps_matter_in_these_tests(name):
    """Each of them off changes the logits by far more than the tolerance above."""
    model = tiny(name)
    ids = prompt(1)
    logits = plain_logits(model, ids)[-1]
    config = CONFIGS[name]()
    config.sliding_window = WINDOW + 1
    torch.manual_seed(0)
    other = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager").eval()
    assert (plain_logits(other, ids)[-1] - logits).abs().max() > 1e-2


@pytest.mark.parametrize("invariant", [False, True])
@pytest.mark.parametrize("name", DENSE)
def test_guesses_are_drawn_behind_as_if_they_stood_there(name, invariant):
    """A row, and rows that go on where it left off, beside another."""
    model = tiny(name)
    a, b = prompt(1), prompt(2, 33)
    runner = runner_of(model, invariant=invariant)
    hot = replace(GREEDY, temperature=0.8, seed=5)
    guesses = [row(a, at, at + 1, A_PAGES, sampling=hot, logprobs=True) for at in range(40, len(a))]
    prefill_alone(runner, a[:40], A_PAGES)
    one_by_one = [runner.step([guess])[0] for guess in guesses]
    runner.kv.resize(40)
    prefill_alone(runner, b[:32], B_PAGES)
    prefill_alone(runner, a[:40], A_PAGES)
    assert runner.step([row(b, 32, 33, B_PAGES), *guesses])[1:] == one_by_one


@pytest.mark.parametrize("name", DENSE)
def test_no_bit_of_a_dense_model_depends_on_neighbours_or_chunks(name):
    model = tiny(name)
    runner = runner_of(model)
    a, b = prompt(1), prompt(2, 33)
    alone = prefill_alone(runner, a, A_PAGES).clone()
    for cuts in [(1,), (15, 16), (3, 21, 22, 49)]:
        runner.kv.resize(40)
        assert torch.equal(prefill_alone(runner, a, A_PAGES, cuts), alone), cuts
    runner.kv.resize(40)
    runner.step([row(b, 0, 20, B_PAGES, sample=False), row(a, 0, 45, A_PAGES, sample=False)])
    runner.step([row(b, 20, 33, B_PAGES), row(a, 45, 50, A_PAGES)])
    assert torch.equal(runner.logits[1], alone)


@pytest.mark.parametrize("name", ["llama", "qwen3_moe", "gemma3"])
def test_invariant_steps_hold_bits_for_every_family(name):
    model = tiny(name)
    expected = plain_logits(model, prompt(1))[-1]
    runner = runner_of(model, invariant=True)
    a, b = prompt(1), prompt(2, 33)
    alone = prefill_alone(runner, a, A_PAGES).clone()
    torch.testing.assert_close(alone, expected, atol=1e-4, rtol=1e-4)
    for cuts in [(1,), (3, 21, 22, 49)]:
        runner.kv.resize(40)
        assert torch.equal(prefill_alone(runner, a, A_PAGES, cuts), alone), cuts
    runner.kv.resize(40)
    runner.step([row(b, 0, 20, B_PAGES, sample=False), row(a, 0, 45, A_PAGES, sample=False)])
    runner.step([row(b, 20, 33, B_PAGES), row(a, 45, 50, A_PAGES)])
    assert torch.equal(runner.logits[1], alone)


def test_more_drawn_rows_than_an_invariant_tile():
    model = tiny("llama")
    runner = runner_of(model, pages=80, invariant=True)
    prompts = [prompt(seed, 5) for seed in range(12)]
    drawn = runner.step([row(ids, 0, 5, [2 + i]) for i, ids in enumerate(prompts)])
    # The plain model must see the eager attention again.
    model.set_attn_implementation("eager")
    assert [token for token, _ in drawn] == [plain_greedy(model, ids, 1)[0] for ids in prompts]


def test_a_step_repeats_into_the_same_slots():
    runner = runner_of(tiny("qwen3"))
    ids = prompt(1)
    prefill_alone(runner, ids[:40], A_PAGES)
    first = runner.step([row(ids, 40, 50, A_PAGES, logprobs=True)])
    assert runner.step([row(ids, 40, 50, A_PAGES, logprobs=True)]) == first


def test_a_step_that_runs_out_of_memory_repeats(monkeypatch):
    runner = runner_of(tiny("qwen3"))
    ids = prompt(1)
    expected = prefill_alone(runner, ids, A_PAGES).clone()
    runner.kv.resize(40)
    calls = []

    def fails_once(hidden):
        calls.append(1)
        if len(calls) == 1:
            raise torch.OutOfMemoryError("logits")
        return type(runner)._head(runner, hidden)

    monkeypatch.setattr(runner, "_head", fails_once)
    with pytest.raises(torch.OutOfMemoryError):
        runner.step([row(ids, 0, 50, A_PAGES)])
    runner.step([row(ids, 0, 50, A_PAGES)])
    assert torch.equal(runner.logits[0], expected)


def test_what_an_earlier_owner_left_in_a_page_is_never_seen():
    runner = runner_of(tiny("llama"))
    ids = prompt(1)
    expected = prefill_alone(runner, ids, A_PAGES).clone()
    for cache in (*runner.kv.k, *runner.kv.v):
        cache.fill_(float("nan"))
        cache[0].zero_()
    assert torch.equal(prefill_alone(runner, ids, A_PAGES), expected)


def test_a_copied_partial_page_serves_another_row():
    runner = runner_of(tiny("gemma3"))
    ids = prompt(1)
    expected = prefill_alone(runner, ids, A_PAGES).clone()
    runner.copy_pages([(A_PAGES[2], 19, 9), (19, 20, 8), (A_PAGES[0], 18, 8)])
    # 40 = 2 pages + 8 tokens are taken over: two shared pages, and the copy.
    runner.step([row(ids, 40, 50, [A_PAGES[0], A_PAGES[1], 20, 21])])
    assert torch.equal(runner.logits[0], expected)
    for page, copied in ((A_PAGES[2], 19), (A_PAGES[2], 20), (A_PAGES[0], 18)):
        assert torch.equal(runner.kv.k[1][copied], runner.kv.k[1][page])
        assert torch.equal(runner.kv.v[3][copied], runner.kv.v[3][page])


def test_resize_forgets_and_goes_on():
    runner = runner_of(tiny("llama"))
    ids = prompt(1)
    expected = prefill_alone(runner, ids, A_PAGES).clone()
    runner.resize(12)
    assert runner.kv.pages == 12
    assert runner.kv.k[0].shape == (12, PAGE, 2, 16)
    assert torch.equal(prefill_alone(runner, ids, A_PAGES), expected)
    with pytest.raises(ValueError, match="scratch"):
        runner.resize(0)


@pytest.mark.parametrize("name", ["llama", "gemma3"])  # all of them: tests/gpu
def test_layers_compile_in_one_piece(name):
    torch._dynamo.reset()
    config = CONFIGS[name]()
    config.num_hidden_layers = 12  # more than torch would compile apart
    config.layer_types = getattr(config, "layer_types", None) and config.layer_types * 3
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager").eval()
    ids = prompt(1)
    runner = runner_of(model)
    runner.step([row(ids, 0, 50, A_PAGES)])
    expected = runner.logits
    assert runner.compile("eager")
    runner.step([row(ids, 0, 21, B_PAGES, sample=False)])
    runner.step([row(ids, 21, 50, B_PAGES)])
    torch.testing.assert_close(runner.logits, expected, atol=1e-4, rtol=1e-4)
    torch._dynamo.reset()


def test_layers_that_do_not_compile_run_as_they_are(caplog):
    def broken(graph, inputs):
        raise RuntimeError("no C compiler")

    torch._dynamo.reset()
    runner = runner_of(tiny("llama"))
    runner.step([row(prompt(1), 0, 50, A_PAGES)])
    expected = runner.logits
    assert not runner.compile(broken)
    assert "no C compiler" in caplog.text
    runner.step([row(prompt(1), 0, 50, A_PAGES)])
    assert torch.equal(runner.logits, expected)
    torch._dynamo.reset()


def test_what_was_not_compiled_is_not_said_to_be(monkeypatch, caplog):
    runner = runner_of(tiny("llama"))
    with torch._dynamo.config.patch(disable=True):  # monkeypatch would leave the setting deleted
        assert not runner.compile("eager")
    assert "switched off" in caplog.text
    monkeypatch.setattr(torch, "compile", lambda *_, **__: (_ for _ in ()).throw(RuntimeError("not supported")))
    assert not runner.compile("eager")
    assert "not supported" in caplog.text
    runner.step([row(prompt(1), 0, 50, A_PAGES)])


def test_runs_of_shared_pages():
    def decode(pages, start):
        return RowStep([1], start, pages, True, GREEDY)

    rows = [
        decode([7, 8, 30], 40),  # of 7, 8
        decode([5], 3),  # too short to share
        decode([9, 4, 6, 2], 48),  # of 9, 4: the third page of the other is its own
        decode([7, 8, 31, 32], 63),  # of 7, 8
        decode([9, 4, 3], 47),
        decode([12, 13], 20),  # alone
        decode([7, 8, 31, 33], 49),  # of 7, 8, and not of 31, which the first of the run has not
    ]
    order, runs = _runs(rows, PAGE)
    assert order == [0, 3, 6, 2, 4, 1, 5]
    assert runs == [(3, [7, 8]), (2, [9, 4])]
    assert _runs([rows[1], rows[5]], PAGE) == ([0, 1], [])
    # The page that a row writes is its own, whatever its table says (as while a step is profiled).
    assert _runs([decode([7, 7, 7], 47), decode([7, 7, 7], 47)], PAGE)[1] == [(2, [7, 7])]
    many = [decode([100 + i // 2, 200 + i], 20) for i in range(14)]
    order, runs = _runs(many, PAGE)
    assert sorted(order) == list(range(14))
    assert [rows for rows, _ in runs] == [2] * 4


def test_a_run_and_the_rows_own_pages_are_the_whole_context():
    rows = [
        RowStep([40 + r], start, pages, True, GREEDY)
        for r, (start, pages) in enumerate([(40, [7, 8, 30]), (3, [5]), (63, [7, 8, 31, 32]), (48, [9, 4, 6, 2])])
    ]
    order, runs = _runs(rows, PAGE)
    spans = [_Span(rows[r].token_ids, rows[r].start, rows[r].pages, 1) for r in order] + [_Span([0], 0, [0], 0)]
    sizes = (5, 5, 6, 6)
    whole, parts = (_Packed.over(np.full(_Packed.size(*sizes), -1, np.int32), *sizes) for _ in range(2))
    _fill(whole, spans, PAGE)
    _fill(parts, spans, PAGE, runs=runs)
    for name in ("ids_T", "positions_T", "slots_T", "cu_q_R1"):
        assert getattr(whole, name).tolist() == getattr(parts, name).tolist()
    assert parts.cu_q_N1.tolist() == [0, 2, 2, 2, 2]
    assert parts.cu_k_N1.tolist() == [0, 32, 32, 32, 32]
    group_R = [0, 0, 1, 1, 1]
    run_R = np.diff(parts.cu_k_N1)[group_R]
    assert (run_R + parts.lens_R).tolist() == whole.lens_R.tolist()
    for r, span in enumerate(spans):
        pages = [*parts.table_NP[group_R[r], : run_R[r] // PAGE], *parts.table_RP[r]]
        assert pages[: len(span.pages)] == list(span.pages)


@pytest.mark.parametrize(("units", "chunk"), [(20, 1), (13, 1), (12, 2), (7, 2), (6, 3), (4, 6)])
def test_own_pages_are_cut_into_chunks_for_which_there_is_room(units, chunk):
    pages = [6, 1, 4, 2]
    spans = [_Span([1], count * PAGE - 3, list(range(1, count + 1)), 1) for count in pages]
    sizes = (4, 4, 6, units)
    host = _Packed.over(np.full(_Packed.size(*sizes), -1, np.int32), *sizes)
    _fill(host, spans, PAGE)
    counts = [-(-count // chunk) for count in pages]
    assert host.pages_1.tolist() == [chunk]
    assert host.first_R1.tolist() == [0, *np.cumsum(counts)]
    assert host.row_I[: sum(counts)].tolist() == [row for row, count in enumerate(counts) for _ in range(count)]


def test_new_tokens_are_cut_into_tiles():
    spans = [_Span([1] * count, 5, [1, 2, 3], 1) for count in (9, 1, 4)]
    sizes = (14, 3, 3, 5)
    host = _Packed.over(np.full(_Packed.size(*sizes), -1, np.int32), *sizes)
    _fill(host, spans, PAGE, 4)
    assert host.first_R1.tolist() == [0, 3, 4, 5]
    assert host.row_I.tolist() == [0, 0, 0, 1, 2]


def test_graphs_and_profile_do_nothing_on_cpu():
    runner = runner_of(tiny("llama"))
    runner.capture()
    runner.drop_graphs()
    assert runner.captured == ()
    assert runner.profile() == 0


def test_sampled_rows_ignore_neighbours_and_repeats():
    runner = runner_of(tiny("qwen3"))
    a, b = prompt(1), prompt(2, 33)
    hot = Sampling(temperature=1.5, top_p=0.95, top_k=60, seed=-(2**70) + 7)
    alone = runner.step([row(a, 0, 50, A_PAGES, sampling=hot, logprobs=True)])[0]
    beside = runner.step(
        [row(b, 0, 33, B_PAGES), row(a, 0, 50, A_PAGES, sampling=hot, logprobs=True), row(b, 0, 9, C_PAGES)]
    )[1]
    assert beside == alone
    tokens = {runner.step([row(a, 49, 50, A_PAGES, sampling=replace(hot, seed=seed))])[0][0] for seed in range(20)}
    assert len(tokens) > 3


def test_logprobs_are_those_of_the_unmodified_distribution():
    model = tiny("gemma2")
    ids = prompt(1)
    expected = torch.log_softmax(plain_logits(model, ids)[-1], -1)
    runner = runner_of(model)
    token, logprob = runner.step([row(ids, 0, 50, A_PAGES, sampling=Sampling(0.5, 0.9, 5, 3), logprobs=True)])[0]
    assert logprob == pytest.approx(float(expected[token]), abs=1e-4)
    _, silent = runner.step([row(ids, 49, 50, A_PAGES)])[0]
    assert silent != silent


def test_bad_rows_and_arguments_are_refused():
    model = tiny("llama")
    runner = runner_of(model)
    ids = prompt(1)
    with pytest.raises(ValueError, match="pages"):
        runner.step([row(ids, 0, 17, [3])])
    with pytest.raises(ValueError, match="tokens"):
        runner.step([row(ids, 0, 0, [3])])
    with pytest.raises(ValueError, match="256"):
        Runner(model, runner.kv, "flash_attn", 8, 64, 256)
    short = KVCache(kv_shapes(model.config)[:2], 4, PAGE, torch.float32, "cpu")
    with pytest.raises(ValueError, match="layers"):
        Runner(model, short, "reference", 8, 64, 256)
    paged = KVCache(kv_shapes(model.config), 2, 256, torch.bfloat16, "cpu")
    with pytest.raises(ValueError, match="reference"):
        Runner(model, paged, "flash_attn", 8, 64, 256, invariant=True)


def test_a_kernel_refuses_what_it_does_not_compute():
    config = CONFIGS["gemma2"]()
    kv = KVCache(kv_shapes(config), 2, 256, torch.bfloat16, "cpu")
    with pytest.raises(UnsupportedModel, match="softcapping"):
        attention.check_kernel("torch_varlen", kv, config)
    attention.check_kernel("flash_attn", kv, config)
    wide = KVCache([(1, 512)], 2, 256, torch.bfloat16, "cpu")
    with pytest.raises(UnsupportedModel, match="head dimension"):
        attention.check_kernel("flash_attn", wide, config)


def test_an_unknown_attention_argument_is_refused_by_name():
    model = tiny("llama")
    runner = runner_of(model)
    layer = model.model.layers[0].self_attn
    q = torch.zeros(1, 4, 3, 16)
    kv = torch.zeros(1, 2, 3, 16)
    call = attention._attention
    for argument in ("s_aux", "position_bias", "block_sequence_ids"):
        with pytest.raises(UnsupportedModel, match=argument):
            call(layer, q, kv, kv, None, scaling=1.0, **{argument: torch.zeros(4)})
    with pytest.raises(UnsupportedModel, match="attention_mask"):
        call(layer, q, kv, kv, torch.zeros(1, 1, 3, 3), scaling=1.0)
    with pytest.raises(UnsupportedModel, match="is_causal"):
        call(layer, q, kv, kv, None, scaling=1.0, is_causal=False)
    with pytest.raises(UnsupportedModel, match="output_attentions"):
        call(layer, q, kv, kv, None, scaling=1.0, output_attentions=True)
    layer.sinks = torch.zeros(4)
    with pytest.raises(UnsupportedModel, match="sinks"):
        runner.step([row(prompt(1), 0, 5, A_PAGES)])


def test_attention_outside_a_step_says_so():
    model = tiny("llama")
    runner_of(model)
    with pytest.raises(RuntimeError, match="outside a runner's step"):
        plain_logits(model, prompt(1))


def test_the_kernel_of_a_cpu_is_sdpa_and_the_reference_for_a_soft_cap():
    assert attention.kernels_for("cpu", torch.float32) == ["sdpa"]
    assert attention.kernels_for("cpu", torch.bfloat16) == ["sdpa"]
    assert attention.kernels_for("cpu", torch.float32, CONFIGS["qwen3"]()) == ["sdpa"]
    assert attention.kernels_for("cpu", torch.float32, CONFIGS["gemma2"]()) == ["reference"]
    with pytest.raises(InputError, match="cuda or cpu"):
        attention.kernels_for("meta", torch.float32)


def test_half_precision_without_a_kernel_names_the_install_command(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(attention.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(attention, "_has_paged_varlen", lambda: True)
    assert attention.kernels_for("cuda", torch.bfloat16) == ["torch_varlen"]
    monkeypatch.setattr(attention.importlib.util, "find_spec", lambda name: name == "triton" or None)
    assert attention.kernels_for("cuda", torch.bfloat16) == ["triton", "torch_varlen"]
    monkeypatch.setattr(attention.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(attention, "_has_paged_varlen", lambda: False)
    with pytest.raises(InputError, match="pip install flash-attn"):
        attention.kernels_for("cuda", torch.bfloat16)
    assert attention.kernels_for("cuda", torch.float32) == ["sdpa"]
    with pytest.raises(InputError, match="float64"):
        attention.kernels_for("cuda", torch.float64)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 5))
    with pytest.raises(InputError, match=r"7\.5"):
        attention.kernels_for("cuda", torch.float16)


def test_on_which_gpu_which_kernel_does_a_model():
    def on(capability, kv_dtype="auto", dtype=torch.bfloat16, **changes):
        return attention.kernels_on(capability, dtype, kv_dtype, LlamaConfig(**SHAPE | {"head_dim": 64} | changes))

    every = ["triton", "flash_attn", "torch_varlen"]
    assert on((8, 0)) == on((8, 6), "int8") == on((8, 9), "fp8") == on((9, 0), "fp8") == every
    assert on((8, 0), "fp8") == on((8, 6), "fp8") == on((9, 0), head_dim=96) == every[1:]
    assert on((9, 0), head_dim=320) == []
    assert on((8, 0), "fp8", torch.float32) == ["sdpa"]
    gemma2 = CONFIGS["gemma2"]()
    assert attention.kernels_on((9, 0), torch.bfloat16, "auto", gemma2) == every[:2]
    assert attention.kernels_on((9, 0), torch.float32, "auto", gemma2) == ["reference"]
    assert attention.kernels_on((9, 0), torch.float32, "auto", LlamaConfig(**SHAPE), invariant=True) == ["reference"]


@pytest.mark.parametrize("kernel", attention.HALF)
def test_fp8_is_refused_by_name_where_triton_has_none(monkeypatch, kernel):
    config = LlamaConfig(**HEADS)
    kv = KVCache(kv_shapes(config), 2, 256, torch.bfloat16, "cpu", "fp8")
    kv.device = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 9))
    attention.check_kernel(kernel, kv, config)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 0))
    if kernel != "triton":
        attention.check_kernel(kernel, kv, config)
        return
    with pytest.raises(UnsupportedModel, match=r"kv_dtype: Triton has no fp8.*got .fp8 on compute capability 8\.0"):
        attention.check_kernel(kernel, kv, config)


def test_triton_compiles_fp8_from_the_capability_that_is_said():
    """Compiled for GPUs that are not here: nothing is run."""
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from actors.engine.kernels.write import _attention_write

    pointers = {"k_new": "*bf16", "v_new": "*bf16", "k_cache": "*fp8e4nv", "v_cache": "*fp8e4nv"}
    pointers |= {"k_scales": "*fp32", "v_scales": "*fp32", "slots": "*i64"}
    constants = {"K": 2, "KP": 2, "D": 16, "DP": 16, "MOST": 448}
    types = {
        name: pointers.get(name) or ("constexpr" if name in constants else "i32") for name in _attention_write.arg_names
    }
    for capability in ((8, 0), (8, 6), (8, 9), (9, 0)):
        source = ASTSource(_attention_write, types, constants)
        target = GPUTarget("cuda", 10 * capability[0] + capability[1], 32)
        if capability >= attention._FP8_CAPABILITY:
            triton.compile(source, target=target)
        else:
            with pytest.raises(Exception, match="not supported in this architecture"):
                triton.compile(source, target=target)


def test_shared_pages_of_the_widest_heads_fit_small_gpus():
    """Compiled for an A10G, whose programs have 99 KiB of shared memory like an L4's: nothing is run."""
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from actors.engine.kernels import decode

    kernel, dim = decode._attention_runs, 256
    constants = {"H": 8, "K": 4, "G": 2, "D": dim, "S": 256, "CAPPED": False, "QUANTIZED": False}
    constants |= {"M": decode._TILE, "GROUP": 2, "RUNS": 4, "SPLITS": 8, "BLOCK": decode._RUN["BLOCK"]}
    pointers = {"q": "*bf16", "k": "*bf16", "v": "*bf16", "k_scale": "*fp32", "v_scale": "*fp32", "part": "*fp32"}
    pointers |= {"log_sum": "*fp32", "table": "*i32", "cu_q": "*i32", "cu_k": "*i32"}
    types = {
        name: pointers.get(name)
        or ("constexpr" if name in constants else "fp32" if name in ("scale", "softcap") else "i32")
        for name in kernel.arg_names
    }
    options = {"num_warps": decode._RUN["num_warps"], "num_stages": decode._run_stages(dim)}
    made = triton.compile(ASTSource(kernel, types, constants), target=GPUTarget("cuda", 86, 32), options=options)
    assert made.metadata.shared <= 101_376


def test_bf16_reference_runs():
    model = tiny("llama").to(torch.bfloat16)
    logits = plain_logits(model, prompt(1))[-1].float()
    kv = KVCache(kv_shapes(model.config), 40, PAGE, torch.bfloat16, "cpu")
    runner = Recorded(model, kv, "reference", 8, 64, 256)
    got = prefill_alone(runner, prompt(1), A_PAGES, (21,)).float()
    assert (got - logits).abs().max() < 0.1 * logits.abs().max()


def test_graph_sizes_end_with_the_batch_and_pad_little():
    assert graph_sizes(1) == [1]
    assert graph_sizes(6) == [1, 2, 4, 6]
    sizes = graph_sizes(300)
    assert sizes[-1] == 300
    assert sizes == sorted(set(sizes))
    for batch in range(1, 301):
        size = next(size for size in sizes if size >= batch)
        assert size - batch < max(8, 0.25 * batch)


def test_kv_shapes_and_bytes():
    config = CONFIGS["llama"]()
    assert kv_shapes(config) == ((2, 16),) * 4
    assert kv_shapes(config, 2) == ((1, 16),) * 4
    with pytest.raises(ValueError, match="split"):
        kv_shapes(config, 4)
    kv = KVCache([(2, 16), (1, 32)], 3, PAGE, torch.float16, "cpu")
    assert kv.bytes_token == 2 * 2 * (2 * 16 + 32)
    assert kv.bytes_page == sum(t[0].nbytes for t in (*kv.k, *kv.v))
    assert kv.v[1].shape == (3, PAGE, 1, 32)

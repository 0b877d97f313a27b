"""One request, one answer: the real paged engine on tiny fp32 models of every family, alone, in company, preempted,
in chunks and over reused pages, against itself and against the reference engine."""

from contextlib import contextmanager
from dataclasses import replace
from functools import cache

import pytest
import torch

from actors.engine import loader
from actors.engine.assemble import over_model
from actors.engine.protocol import Request
from actors.engine.reference import ReferenceEngine
from actors.messages import Sampling, Stage, Turn
from actors.stopping import speak
from bench.common import made_up_tokenizer, runner_of
from tests.unit.test_runner import CONFIGS, PAGE, WINDOW, _one_thread, prompt, tiny  # noqa: F401

TOKENS = 17  # more than a page: every row outgrows what it was admitted with
TIMEOUT_S = 120


def caps(name):
    return getattr(CONFIGS[name](), "attn_logit_softcapping", None) is not None


FAMILIES = [name for name in CONFIGS if name != "llama_rope"]  # rotary embeddings are the model's own affair
CASES = [(name, "reference") for name in FAMILIES] + [(name, "sdpa") for name in FAMILIES if not caps(name)]
GREEDY = [
    Request(prompt(seed, length), f"r{seed}", TOKENS, logprobs=True) for seed, length in enumerate((7, 31, 48, 60), 1)
]
SAMPLED = [
    replace(request, sequence_id=f"s{seed}", sampling=Sampling(temperature=1.0, top_p=0.9, top_k=40, seed=seed))
    for seed, request in enumerate(GREEDY[:3])
]
OTHERS = [
    Request(prompt(100 + i, 3 + i % 9), f"o{i}", TOKENS, Sampling(temperature=1.0, top_p=0.95, seed=i))
    for i in range(64)
]


def pages_of(requests, page_tokens=PAGE):
    return sum(-(-len(request.token_ids) // page_tokens) for request in requests)


@contextmanager
def paged(model, kernel, **options):
    settings = {"pages": 100, "page_tokens": PAGE, "max_model_len": 256, "max_batch": 8, "max_prefill_tokens": 512}
    engine = over_model(model, kernel=kernel, **(settings | options))
    try:
        yield engine
    finally:
        engine.close()


def together(engine, requests):
    answers = [future.result(TIMEOUT_S) for future in [engine.submit(request) for request in requests]]
    for request in requests:
        engine.end(request.sequence_id)
    return answers


def alone(engine, requests):
    return [together(engine, [request])[0] for request in requests]


def tokens(answers):
    return [answer.token_ids for answer in answers]


@cache
def oracle(name):
    """The reference engine's answers, one row at a time: greedy ones and sampled ones."""
    engine = ReferenceEngine(tiny(name), numerics="invariant", gather_s=0)
    try:
        return alone(engine, GREEDY), alone(engine, SAMPLED)
    finally:
        engine.close()


@pytest.mark.parametrize(("name", "kernel"), CASES)
def test_greedy_tokens_are_those_of_the_reference_engine_whatever_happens(name, kernel):
    model, expected = tiny(name), oracle(name)[0]
    with paged(model, kernel) as engine:
        single, batch = alone(engine, GREEDY), together(engine, GREEDY)
    # Every prompt fits, and no row has a page to grow into.
    with paged(model, kernel, pages=1 + pages_of(GREEDY)) as engine:
        preempted, events = together(engine, GREEDY), engine.events
    with paged(model, kernel, max_prefill_tokens=13) as engine:
        chunked = together(engine, GREEDY)
    with paged(model, kernel, max_prefill_tokens=13, speculation="off") as engine:
        runner_of(engine).asynchronous = True  # each step behind the last, as on a GPU
        launched = together(engine, GREEDY)
    assert max(answer.usage.batch_max for answer in batch) == len(GREEDY)
    assert events["preemptions"] > 0
    assert sum(answer.usage.preemptions for answer in preempted) == events["preemptions"]
    for answers in (single, batch, preempted, chunked, launched):
        assert tokens(answers) == tokens(expected)
        for answer, wanted in zip(answers, expected, strict=True):
            assert answer.logprobs == pytest.approx(wanted.logprobs, abs=1e-3)


@pytest.mark.parametrize(
    ("name", "kernel"), [("llama", "reference"), ("llama", "sdpa"), ("gemma2", "reference"), ("qwen3_moe", "sdpa")]
)
def test_samples_depend_on_the_seed_and_the_row_alone(name, kernel):
    model, expected = tiny(name), oracle(name)[1]
    with paged(model, kernel, pages=200, max_batch=80) as engine:
        single, crowd = alone(engine, SAMPLED), together(engine, SAMPLED + OTHERS)[: len(SAMPLED)]
        reseeded = alone(engine, [replace(r, sampling=replace(r.sampling, seed=99)) for r in SAMPLED])
    assert min(answer.usage.batch_max for answer in crowd) > 60
    # The youngest are preempted first.
    rows = GREEDY[3:] + SAMPLED
    with paged(model, kernel, pages=1 + pages_of(rows)) as engine:
        preempted = together(engine, rows)[-len(SAMPLED) :]
    assert sum(answer.usage.preemptions for answer in preempted) > 0
    assert tokens(single) == tokens(crowd) == tokens(preempted) == tokens(expected)
    assert all(a != b for a, b in zip(tokens(reseeded), tokens(single), strict=True))


FEWSHOT = prompt(200, 62)  # ends within a page
TURNS, TURN_TOKENS = 3, 9


def trajectories(engine, reuse):
    """Three turns of six trajectories. A next context drops the last 2 generated tokens and appends an observation.

    Returns:
        the answers by turn; tokens reused; tokens that an earlier call, or an older one of the turn, has computed.
    """
    contexts = [FEWSHOT + prompt(60 + i, 5 + 7 * i) for i in range(6)]
    computed, answers, found, known = [], [], 0, 0
    for turn in range(TURNS):
        requests = [Request(context, f"t{i}", TURN_TOKENS) for i, context in enumerate(contexts)]
        for context in contexts:
            known += max((common(context[:-1], other) for other in computed), default=0)
            computed.append(context)
        if reuse:
            futures = [engine.submit(request) for request in requests]
            answers.append([future.result(TIMEOUT_S) for future in futures])
        else:
            answers.append([])
            for request in requests:
                engine.scheduler.policy = object()  # KV of another policy is never found
                answers[-1].append(engine.submit(request).result(TIMEOUT_S))
        found += sum(answer.usage.reused for answer in answers[-1])
        computed += [context + list(a.token_ids[:-1]) for context, a in zip(contexts, answers[-1], strict=True)]
        contexts = [
            context + list(answer.token_ids[:-2]) + prompt(80 + 10 * turn + i, 4 + 5 * i)
            for i, (context, answer) in enumerate(zip(contexts, answers[-1], strict=True))
        ]
    return [tokens(turn) for turn in answers], found, known


def common(a, b):
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


@pytest.mark.parametrize(
    ("name", "kernel"),
    [("llama", "reference"), ("mistral", "sdpa"), ("gemma2", "reference"), ("gemma3", "sdpa"), ("qwen3_moe", "sdpa")],
)
def test_reused_pages_change_no_token_and_are_found(name, kernel):
    model = tiny(name)
    with paged(model, kernel, pages=200) as engine:
        without, found, _ = trajectories(engine, reuse=False)
        assert found == 0
    with paged(model, kernel, pages=200) as engine:
        reused, found, known = trajectories(engine, reuse=True)
        assert engine.events["evictions"] == engine.events["preemptions"] == 0
    assert reused == without
    assert found >= 0.95 * known
    # Room for the longest trajectory and little more: evictions and preemptions, and still the same.
    with paged(model, kernel, pages=16) as engine:
        squeezed, _, _ = trajectories(engine, reuse=True)
        assert engine.events["evictions"] > 0
        assert engine.events["preemptions"] > 0
    assert squeezed == without


@pytest.mark.parametrize("name", FAMILIES)
def test_invariant_numbers_are_bit_equal(name):
    model = tiny(name)
    rows = [*GREEDY[1:3], SAMPLED[0]]
    with paged(model, None, invariant=True) as engine:
        assert engine.numerics.reproducible
        single, batch = alone(engine, rows), together(engine, rows)
    with paged(model, None, invariant=True, pages=1 + pages_of(rows), max_prefill_tokens=13) as engine:
        preempted, events = together(engine, rows), engine.events
    assert events["preemptions"] > 0
    for answer, *others in zip(single, batch, preempted, strict=True):
        assert len(answer.logprobs) == TOKENS
        for other in others:
            assert other.token_ids == answer.token_ids
            assert other.logprobs == answer.logprobs


@pytest.mark.parametrize(("name", "kv_dtype"), [("llama", "int8"), ("mistral", "fp8"), ("gemma2", "int8")])
@pytest.mark.parametrize("invariant", [False, True])
def test_no_bit_of_quantised_kv_depends_on_neighbours(name, kv_dtype, invariant):
    model, rows = tiny(name), [*GREEDY[1:3], SAMPLED[0]]
    with paged(model, "reference", invariant=invariant, kv_dtype=kv_dtype) as engine:
        assert (engine.numerics.kv_dtype, engine.numerics.dtype) == (kv_dtype, "float32")
        assert engine.numerics.reproducible == invariant
        single, batch = alone(engine, rows), together(engine, rows)
    options = {"pages": 1 + pages_of(rows), "max_prefill_tokens": 13, "kv_dtype": kv_dtype}
    with paged(model, "reference", invariant=invariant, **options) as engine:
        preempted, events = together(engine, rows), engine.events
    assert events["preemptions"] > 0
    for answer, *others in zip(single, batch, preempted, strict=True):
        for other in others:
            assert other.token_ids == answer.token_ids
            assert other.logprobs == answer.logprobs
    # The first token's log-probability is that of the prompt alone: off by the quantisation, and by little.
    with paged(model, "reference", invariant=invariant) as engine:
        full = alone(engine, rows)
    off = [abs(a.logprobs[0] - b.logprobs[0]) for a, b in zip(single, full, strict=True)]
    assert 0 < max(off) < 0.5


@pytest.mark.parametrize(("kv_dtype", "kernel"), [("int8", "sdpa"), ("fp8", "sdpa"), ("int8", "reference")])
def test_quantised_pages_are_reused_like_others(kv_dtype, kernel):
    model = tiny("llama")
    with paged(model, kernel, pages=200, kv_dtype=kv_dtype) as engine:
        without, found, _ = trajectories(engine, reuse=False)
        assert found == 0
    with paged(model, kernel, pages=200, kv_dtype=kv_dtype) as engine:
        runner_of(engine).asynchronous = True
        reused, found, known = trajectories(engine, reuse=True)
    assert found >= 0.95 * known
    with paged(model, kernel, pages=16, kv_dtype=kv_dtype) as engine:
        squeezed, _, _ = trajectories(engine, reuse=True)
        assert engine.events["evictions"] > 0
    assert reused == squeezed == without


def test_the_prompts_are_longer_than_the_window():
    assert CONFIGS["mistral"]().sliding_window == WINDOW < max(len(request.token_ids) for request in GREEDY)


def test_a_label_is_written_alike_by_both_engines():
    tokenizer = made_up_tokenizer(256)  # whose first 94 tokens are the printable ASCII characters
    label = tuple(tokenizer.encode(":x:"))
    turn = Turn((Stage("thought", 9, None, "[!-~]", ":x:"), Stage("action", 8)))
    # No two have the same prompt: one would find the other's label in the cache.
    rows = [replace(request, max_tokens=turn.max_tokens, logprobs=True) for request in GREEDY + OTHERS[:3]]
    reference = ReferenceEngine(tiny("llama"), numerics="invariant", gather_s=0)
    try:
        with paged(tiny("llama"), "reference") as engine:
            first = [speak(reference, row, turn, tokenizer).result(TIMEOUT_S) for row in rows]
            spoken = [speak(engine, row, turn, tokenizer) for row in rows]
            second = [one.result(TIMEOUT_S) for one in spoken]
    finally:
        reference.close()
    assert tokens(first) == tokens(second)
    for row, one, other in zip(rows, first, second, strict=True):
        at = one.token_ids.index(label[0])
        assert one.token_ids[at : at + 3] == label
        assert one.finish_reason == other.finish_reason == "stage"
        for usage in (one.usage, other.usage):
            assert (usage.forced, usage.generated, usage.prompt_tokens) == (3, at + 8, len(row.token_ids))
        assert len(one.token_ids) == at + 3 + 8
        assert other.logprobs == pytest.approx(one.logprobs, abs=1e-4)
        assert len(one.logprobs) == at + 8
        # The last token said and the label, beside what was not reused of the prompt.
        assert other.usage.prefilled + other.usage.reused == len(row.token_ids) + 1 + 3


@pytest.mark.slow
@pytest.mark.parametrize("kernel", ["reference", "sdpa"])
def test_smollm2_greedy_tokens_are_those_of_the_reference_engine(smollm2, kernel):
    model = loader.load_model(smollm2, "float32", torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    rows = [
        Request(torch.randint(3, model.config.vocab_size, (length,), generator=generator).tolist(), f"r{length}", 24)
        for length in (20, 75, 150, 260, 400, 600)
    ]
    reference = ReferenceEngine(model, numerics="invariant", gather_s=0)
    expected = tokens(alone(reference, rows))
    reference.close()
    settings = {"max_model_len": 1024, "page_tokens": 32}
    with paged(model, kernel, **settings) as engine:
        single, batch = alone(engine, rows), together(engine, rows)
    with paged(model, kernel, **settings, pages=1 + pages_of(rows, 32)) as engine:
        preempted, events = together(engine, rows), engine.events
    assert events["preemptions"] > 0
    assert tokens(single) == tokens(batch) == tokens(preempted) == expected

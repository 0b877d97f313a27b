"""The reference engine against plain `generate`, on a tiny random model."""

from __future__ import annotations

import threading
from concurrent.futures import CancelledError
from dataclasses import replace

import pytest
import torch
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from actors.engine import EngineSpec, reference
from actors.engine.protocol import Request
from actors.engine.reference import ReferenceEngine
from actors.errors import Cancelled, ContextOverflow, EngineDead, EngineError, InputError, OutOfMemory
from actors.messages import Sampling

VOCABULARY = 97


def tiny_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        initializer_range=0.3,
    )
    return LlamaForCausalLM(config).eval()


def prompt(n: int, seed: int = 0) -> list[int]:
    return torch.randint(3, VOCABULARY, (n,), generator=torch.Generator().manual_seed(seed)).tolist()


REQUESTS = [Request(prompt(3 + 5 * i, i), f"row{i}", max_tokens=6 + 2 * i, logprobs=True) for i in range(6)]


@pytest.fixture
def engine():
    engine = ReferenceEngine(tiny_model(), max_batch=8, gather_s=0.2)
    yield engine
    engine.close()


def test_batched_equals_alone_equals_generate(engine):
    batched = [f.result(60) for f in [engine.submit(r) for r in REQUESTS]]
    alone = [engine.submit(r).result(60) for r in REQUESTS]
    model = tiny_model()
    for request, together, single in zip(REQUESTS, batched, alone, strict=True):
        ids = torch.tensor([request.token_ids])
        plain = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            generation_config=GenerationConfig(
                max_new_tokens=request.max_tokens, do_sample=False, pad_token_id=0, eos_token_id=None
            ),
        )[0, ids.shape[1] :]
        assert together.token_ids == single.token_ids == tuple(plain.tolist())
        assert together.finish_reason == "length"
        logits = model(torch.cat([ids, plain[None]], 1)).logits[0, ids.shape[1] - 1 : -1]
        expected = logits.log_softmax(-1).gather(1, plain[:, None]).squeeze(1)
        torch.testing.assert_close(torch.tensor(together.logprobs), expected.detach(), atol=1e-4, rtol=1e-4)


def test_usage(engine):
    answers = [f.result(60) for f in [engine.submit(r) for r in REQUESTS]]
    for request, answer in zip(REQUESTS, answers, strict=True):
        usage = answer.usage
        assert usage.prompt_tokens == usage.prefilled == len(request.token_ids)
        assert (usage.reused, usage.preemptions) == (0, 0)
        assert usage.generated == len(answer.token_ids) == request.max_tokens
        assert usage.batch_max == len(REQUESTS)
        assert min(usage.queue_s, usage.prefill_s, usage.decode_s, usage.gpu_s) >= 0
    assert engine.submit(replace(REQUESTS[0], logprobs=False)).result(60).logprobs == ()


def test_samples_depend_on_the_seed_alone(engine):
    def sampled(seed: int) -> Request:
        return replace(REQUESTS[2], sampling=Sampling(temperature=1.0, top_p=0.9, top_k=40, seed=seed))

    neighbours = [REQUESTS[0], sampled(7), sampled(8), sampled(-(1 << 70)), REQUESTS[5]]
    first = [f.result(60) for f in [engine.submit(r) for r in neighbours]]
    assert engine.submit(sampled(7)).result(60).token_ids == first[1].token_ids
    assert first[1].token_ids != first[2].token_ids
    # greedy rows beside sampled ones stay greedy
    assert engine.submit(REQUESTS[5]).result(60).token_ids == first[4].token_ids


def test_noise_depends_on_the_position_in_the_whole_sequence(engine):
    sampling = Sampling(temperature=1.0, seed=3)
    whole = engine.submit(Request(prompt(9), "a", max_tokens=8, sampling=sampling)).result(60).token_ids
    rest = engine.submit(Request([*prompt(9), *whole[:3]], "a", max_tokens=5, sampling=sampling)).result(60).token_ids
    assert whole[3:] == rest


class Counter:
    """Ends the generation after `n` tokens."""

    def __init__(self, n: int):
        self.n, self.seen = n, list[int]()

    def __call__(self, new_ids) -> bool:
        self.seen += new_ids
        return len(self.seen) >= self.n


def test_matchers_see_each_token_once_in_order(engine):
    matchers = [Counter(n) for n in (1, 3, 99)]
    requests = [replace(r, matcher=m) for r, m in zip(REQUESTS, matchers, strict=False)]
    answers = [f.result(60) for f in [engine.submit(r) for r in requests]]
    assert [tuple(m.seen) for m in matchers] == [a.token_ids for a in answers]
    assert [a.finish_reason for a in answers] == ["stop", "stop", "length"]
    assert [len(a.token_ids) for a in answers] == [1, 3, REQUESTS[2].max_tokens]


def test_a_broken_matcher_fails_its_own_row(engine):
    def broken(new_ids) -> bool:
        raise KeyError("mine")

    bad, good = engine.submit(replace(REQUESTS[0], matcher=broken)), engine.submit(REQUESTS[1])
    with pytest.raises(EngineError, match="matcher failed: KeyError"):
        bad.result(60)
    assert len(good.result(60).token_ids) == REQUESTS[1].max_tokens


def test_stop_token_is_included(engine):
    full = engine.submit(REQUESTS[3]).result(60).token_ids
    stop = next(t for i, t in enumerate(full) if i >= 2 and t not in full[:i])
    answer = engine.submit(replace(REQUESTS[3], stop_token_ids=frozenset({stop, 0}))).result(60)
    assert answer.token_ids == full[: full.index(stop) + 1]
    assert answer.finish_reason == "stop"


def test_context_limit(engine):
    answer = engine.submit(Request(prompt(120), "a", max_tokens=50)).result(60)
    assert (len(answer.token_ids), answer.finish_reason) == (8, "context")
    assert engine.submit(Request(prompt(120), "a", max_tokens=8)).result(60).finish_reason == "length"
    with pytest.raises(ContextOverflow, match="128"):
        engine.submit(Request(prompt(128), "a", max_tokens=1)).result(60)


@pytest.mark.parametrize(
    "request_", [Request([], "a", 1), Request([1], "a", 0), Request([VOCABULARY], "a", 1), Request([-1], "a", 1)]
)
def test_senseless_requests_fail_alone(engine, request_):
    with pytest.raises(EngineError):
        engine.submit(request_).result(60)


class Gate:
    """Holds the engine inside a running request until opened."""

    def __init__(self):
        self.reached, self.open = threading.Event(), threading.Event()

    def __call__(self, new_ids) -> bool:
        self.reached.set()
        assert self.open.wait(30)
        return False


def held(engine, **changes):
    gate = Gate()
    future = engine.submit(Request(prompt(4), "held", max_tokens=50, matcher=gate, **changes))
    assert gate.reached.wait(30)
    return gate, future


def test_end_cancels_what_runs_and_what_waits(engine):
    gate, running = held(engine)
    waiting, other = engine.submit(replace(REQUESTS[0], sequence_id="held")), engine.submit(REQUESTS[1])
    assert (engine.capacity().running, engine.capacity().waiting) == (1, 2)
    engine.end("held")
    engine.end("unknown")
    with pytest.raises(Cancelled):
        waiting.result(1)
    gate.open.set()
    with pytest.raises(Cancelled):
        running.result(30)
    assert other.result(30).finish_reason == "length"


def test_cancelling_a_future_cancels_its_request(engine):
    gate, running = held(engine)
    waiting = engine.submit(REQUESTS[0])
    assert running.cancel()
    assert waiting.cancel()
    gate.open.set()
    with pytest.raises(CancelledError):
        waiting.result(30)
    answer = engine.submit(REQUESTS[1]).result(30)
    assert answer.usage.batch_max == 1


def test_close_fails_everything(engine):
    gate, running = held(engine)
    waiting = engine.submit(REQUESTS[0])
    gate_opener = threading.Timer(0.1, gate.open.set)
    gate_opener.start()
    engine.close()
    for future in (running, waiting, engine.submit(REQUESTS[0])):
        with pytest.raises(EngineDead, match="closed"):
            future.result(1)
    engine.close()


def test_shrink_bounds_the_next_batch(engine):
    engine.shrink(2)
    engine.shrink(5)
    assert engine.capacity().max_batch == 2
    answers = [f.result(60) for f in [engine.submit(r) for r in REQUESTS]]
    assert max(a.usage.batch_max for a in answers) == 2


def out_of_memory(engine, monkeypatch, fits):
    """Make `generate` run out of memory at its first forward where `fits(rows, tokens)` does not hold."""
    generate, sizes = engine.model.generate, list[int]()

    def limited(*, input_ids, **kwargs):
        sizes.append(len(input_ids))
        if not fits(*input_ids.shape):
            raise torch.OutOfMemoryError("CUDA out of memory (simulated)")
        return generate(input_ids=input_ids, **kwargs)

    monkeypatch.setattr(engine.model, "generate", limited)
    return sizes


def test_out_of_memory_halves_the_batch(engine, monkeypatch):
    expected = [engine.submit(r).result(60).token_ids for r in REQUESTS]
    sizes = out_of_memory(engine, monkeypatch, lambda rows, _: rows <= 2)
    answers = [f.result(60) for f in [engine.submit(r) for r in REQUESTS]]
    assert [a.token_ids for a in answers] == expected
    assert sizes[:2] == [6, 3]
    assert max(a.usage.batch_max for a in answers) <= 2


def test_only_the_culprit_leaves(engine, monkeypatch):
    out_of_memory(engine, monkeypatch, lambda _, tokens: tokens < 60)
    culprit = engine.submit(Request(prompt(80), "giant", max_tokens=4))
    others = [engine.submit(r) for r in REQUESTS]
    with pytest.raises(OutOfMemory, match="alone"):
        culprit.result(60)
    assert all(len(f.result(60).token_ids) == r.max_tokens for f, r in zip(others, REQUESTS, strict=True))


def test_a_row_goes_on_after_out_of_memory(engine, monkeypatch):
    expected = [engine.submit(r).result(60) for r in REQUESTS[:4]]
    forward, calls = engine.model.forward, 0

    def sometimes(*args, **kwargs):
        nonlocal calls
        calls += 1
        if calls == 4:
            raise torch.OutOfMemoryError("CUDA out of memory (simulated)")
        return forward(*args, **kwargs)

    monkeypatch.setattr(engine.model, "forward", sometimes)
    matchers = [Counter(99) for _ in range(4)]
    requests = [replace(r, matcher=m) for r, m in zip(REQUESTS, matchers, strict=False)]
    answers = [f.result(60) for f in [engine.submit(r) for r in requests]]
    assert [a.token_ids for a in answers] == [a.token_ids for a in expected]
    assert [tuple(m.seen) for m in matchers] == [a.token_ids for a in expected]
    for answer, request in zip(answers, requests, strict=True):
        assert answer.usage.preemptions == 1
        assert answer.usage.prefilled == 2 * len(request.token_ids) + 3


def test_other_failures_end_the_batch_but_not_the_engine(engine, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(engine.model, "generate", lambda **_: 1 / 0)
        with pytest.raises(EngineError, match="division"):
            engine.submit(REQUESTS[0]).result(60)
    assert engine.dead is None
    assert engine.submit(REQUESTS[0]).result(60)
    monkeypatch.setattr(
        engine.model, "generate", lambda **_: exec('raise RuntimeError("CUDA error: an illegal address")')
    )
    with pytest.raises(EngineDead, match="context is lost"):
        engine.submit(REQUESTS[0]).result(60)
    assert "illegal address" in str(engine.dead)


def test_invariant_runs_rows_alone_and_says_so():
    engine = ReferenceEngine(tiny_model(), numerics="invariant", revision="abc")
    try:
        answers = [f.result(60) for f in [engine.submit(r) for r in REQUESTS]]
        assert {a.usage.batch_max for a in answers} == {1}
        assert engine.numerics.reproducible
        assert (engine.numerics.dtype, engine.numerics.model_revision) == ("float32", "abc")
    finally:
        engine.close()


def test_fast_or_half_precision_promises_nothing(engine):
    assert not engine.numerics.reproducible
    half = ReferenceEngine(tiny_model().to(torch.bfloat16), numerics="invariant")
    half.close()
    assert not half.numerics.reproducible


def test_the_checkpoints_own_sampling_does_not_leak_in():
    model = tiny_model()
    model.generation_config = GenerationConfig(do_sample=True, temperature=5.0, repetition_penalty=3.0, eos_token_id=5)
    engine, plain = ReferenceEngine(model), ReferenceEngine(tiny_model())
    try:
        assert engine.submit(REQUESTS[4]).result(60).token_ids == plain.submit(REQUESTS[4]).result(60).token_ids
    finally:
        engine.close()
        plain.close()


def test_build_from_a_spec(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    engine = reference.build(EngineSpec(str(tmp_path), engine="reference", device="cpu", max_model_len=64))
    try:
        assert engine.capacity().max_model_len == 64
        assert engine.stop_token_ids == {2}
        assert len(engine.numerics.model_revision) == 16
        assert engine.numerics.weights_dtype == "float32"
        assert engine.submit(REQUESTS[0]).result(60).token_ids
    finally:
        engine.close()
    for changes in (
        {"max_model_len": 4096},
        {"numerics": "exact"},
        {"tp": 2},
        {"quantization": "int4"},
        {"kv_dtype": "int8"},
    ):
        with pytest.raises(InputError):
            reference.build(EngineSpec(str(tmp_path), **{"engine": "reference", "device": "cpu", **changes}))
    engine = reference.build(EngineSpec(str(tmp_path), engine="reference", device="cpu", quantization="int8"))
    try:
        assert (engine.numerics.weights_dtype, engine.numerics.dtype) == ("int8", "float32")
        assert engine.submit(REQUESTS[0]).result(60).token_ids
    finally:
        engine.close()

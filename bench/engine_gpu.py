"""Checks of the paged engine on a real device: each says ok or miss, with numbers.

a  exactness  fp32, reference attention: alone = batched = preempted = `ReferenceEngine`, token for token
b  half       bf16 and fp16 kernels against fp32 on the same (rounded) weights: logits, first divergence, CUDA graphs;
              graphs, compiled and fused layers, shared pages and steps launched ahead against none of them
c  memory     thousands of short calls: neither torch's memory nor the process grows
d  oom        a real out-of-memory error, by a cap and by another process: every request completes, tokens unchanged
e  reuse      replayed trajectories: equal tokens with and without reuse; what is reused, by size of the pool
f  8 bits     KV in int8 and fp8, weights in int8: logits against those of the model without, in fp32

On a CPU a, c, e and f run, b and d say skipped. Without --model a random Qwen3-like shape stands in.

    python -m bench.engine_gpu --model smollm2-135m --out bench/results/engine_gpu.json
    python -m bench.engine_gpu --model smollm2-135m --device cpu --only a --prompts 4 --max-prompt 200 --tokens 16
"""

from __future__ import annotations

import argparse
import gc
import random
import statistics
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from itertools import count
from pathlib import Path
from queue import SimpleQueue
from typing import Any, get_args

import torch
from torch import Tensor

from actors.engine import loader
from actors.engine.assemble import over_model
from actors.engine.attention import Kernel, kernels_for, page_tokens_of
from actors.engine.int8 import quantise
from actors.engine.paged import PagedEngine
from actors.engine.pages import Admission, PageAllocator
from actors.engine.protocol import Engine, Request
from actors.engine.reference import ReferenceEngine
from actors.engine.runner import RowStep
from actors.errors import EngineError
from bench.common import (
    default_device,
    device_info,
    empty_cache,
    first_difference,
    own_page_tokens,
    print_table,
    random_model,
    rss_bytes,
    runner_of,
    write_json,
)
from bench.react_replay import Trace, make_traces, read_traces

MAX_MODEL_LEN = 2048
SHARED_TOKENS = 600
Result = dict[str, Any]
Tokens = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Source:
    """Where models come from: a folder, or a random shape."""

    folder: Path | None
    shape: str
    device: str

    def load(self, dtype: str) -> Any:
        """A fresh copy of the model."""
        if self.folder is None:
            return random_model(self.shape, device=self.device, dtype=getattr(torch, dtype))
        return loader.load_model(self.folder, dtype, self.device)


# --- helpers


def make_prompts(n: int, longest: int, vocabulary: int, seed: int = 1) -> list[list[int]]:
    """Random prompts of lengths spread evenly from 20 to `longest`, in random order."""
    draw = random.Random(seed)
    lengths = [20 + (longest - 20) * i // max(1, n - 1) for i in range(n)]
    draw.shuffle(lengths)
    return [[draw.randrange(3, vocabulary) for _ in range(length)] for length in lengths]


def pages_for(lengths: Sequence[int], page_tokens: int) -> int:
    """Pages that sequences of these lengths take, sharing none."""
    return sum(-(-length // page_tokens) for length in lengths)


_ids = count()


def together(engine: Engine, prompts: Sequence[Sequence[int]], tokens: int) -> list[Tokens | EngineError]:
    """The answers to all prompts, submitted at once; an error where one failed."""
    ids = [f"r{next(_ids)}" for _ in prompts]
    futures = [engine.submit(Request(prompt, id, tokens)) for id, prompt in zip(ids, prompts, strict=True)]
    found: list[Tokens | EngineError] = []
    for id, future in zip(ids, futures, strict=True):
        error = future.exception()
        if error is not None and not isinstance(error, EngineError):
            raise error
        found.append(future.result().token_ids if error is None else error)
        engine.end(id)
    return found


def alone(engine: Engine, prompts: Sequence[Sequence[int]], tokens: int) -> list[Tokens | EngineError]:
    """The answers to all prompts, one after the other."""
    return [together(engine, [prompt], tokens)[0] for prompt in prompts]


@torch.no_grad()
def plain_logits(model: Any, ids: Sequence[int], last: int = 1) -> Tensor:
    """Logits [last, V] of the last positions, by the model's own forward with torch's attention."""
    model.set_attn_implementation("sdpa")
    return model(torch.tensor([ids], device=model.device), logits_to_keep=last, use_cache=False).logits[0].float()


def compare(
    model: Any, prompts: Sequence[Sequence[int]], expected: Sequence[Any], found: Sequence[Any]
) -> tuple[int, int, list[dict[str, Any]]]:
    """Rows that failed, rows that differ, and for these where, and how far apart the two tokens' logits are in
    the plain forward of `model` (a tie that rounding decides has a gap of about the rounding error)."""
    failed, where = 0, []
    for index, (prompt, a, b) in enumerate(zip(prompts, expected, found, strict=True)):
        if isinstance(b, EngineError):
            failed += 1
            if failed <= 3:
                print(f"    prompt {index} failed: {type(b).__name__}: {b}")
            continue
        at = first_difference(a, b)
        if at is None:
            continue
        logits_V = plain_logits(model, [*prompt, *a[:at]])[0]
        gap = float(logits_V[a[at]] - logits_V[b[at]])
        where.append({"prompt": index, "prompt_tokens": len(prompt), "position": at, "gap": gap})
    return failed, len(where), where


def verdict(check: str, name: str, ok: bool, **numbers: Any) -> Result:
    """A result; printed as it comes."""
    result = {"check": check, "name": name, "verdict": "ok" if ok else "miss", **numbers}
    shown = ", ".join(f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}"
                      for key, value in numbers.items() if not isinstance(value, list | dict))  # fmt: skip
    print(f"{check} {name}: {result['verdict']}: {shown}", flush=True)
    return result


def skipped(check: str, why: str) -> list[Result]:
    """A check that cannot run here."""
    print(f"{check}: skipped: {why}", flush=True)
    return [{"check": check, "name": "all", "verdict": "skipped", "why": why}]


# --- a: exactness


def exactness(args: argparse.Namespace, source: Source) -> list[Result]:
    """fp32 and the reference attention: one answer whatever the company, and the reference engine's."""
    model = source.load("float32")
    prompts = make_prompts(args.prompts, args.max_prompt, model.config.vocab_size)
    need = pages_for([len(prompt) + args.tokens for prompt in prompts], args.page_tokens)
    most = pages_for([args.max_prompt + args.tokens], args.page_tokens)
    begin = time.perf_counter()
    oracle = ReferenceEngine(model, max_model_len=MAX_MODEL_LEN, numerics="invariant")
    expected = alone(oracle, prompts, args.tokens)
    oracle.close()
    print(f"a: reference engine, one row at a time: {time.perf_counter() - begin:.1f} s", flush=True)
    results: list[Result] = []
    for numerics in args.numerics.split(","):
        first: list[Any] | None = None
        # A pool of less than half, in small pages: rows outgrow theirs when none is left.
        for name, ask, pages in (
            ("alone", alone, need),
            ("batched", together, need),
            ("preempted", together, max(most, need * 2 // 5)),
        ):
            begin = time.perf_counter()
            engine = over_model(
                model,
                kernel="reference",
                pages=pages + 1,
                page_tokens=args.page_tokens,
                max_batch=args.prompts,
                max_prefill_tokens=args.max_prefill_tokens,
                max_model_len=MAX_MODEL_LEN,
                invariant=numerics == "invariant",
            )
            found = ask(engine, prompts, args.tokens)
            events = engine.events
            engine.close()
            seconds = time.perf_counter() - begin
            failed, differ, where = compare(model, prompts, expected, found)
            first = first or found
            failed_own, differ_own, _ = compare(model, prompts, first, found)
            forced = name != "preempted" or events["preemptions"] > 0
            results.append(
                verdict(
                    "a",
                    f"{numerics} {name}",
                    not (failed or differ or failed_own or differ_own) and forced,
                    prompts=len(prompts),
                    failed=failed,
                    differ_from_reference=differ,
                    differ_from_alone=differ_own,
                    largest_gap=max((abs(place["gap"]) for place in where), default=0.0),
                    preemptions=events["preemptions"],
                    seconds=round(seconds, 1),
                    where=where,
                )
            )
    return results


# --- b: half precision


class Logits:
    """Keeps the logits of a runner's last step, in the order of its rows."""

    def __init__(self, runner: Any):
        self._draw = runner._draw
        self.last_BV = torch.empty(0)
        runner._draw = self

    def __call__(self, logits_BV: Tensor, ids_B: Tensor | None, rows: Any, place_R: Sequence[int | None]) -> Any:
        """Stands in for the runner's own."""
        self.last_BV = logits_BV[[at for at in place_R if at is not None]].float()
        return self._draw(logits_BV, ids_B, rows, place_R)


def forced_logits(engine: PagedEngine, prompts: Sequence[list[int]], answers: Sequence[Tokens]) -> Tensor:
    """Logits [N, G, V] for each token of the answers, given those before it: prompts prefilled one by one, then all
    rows decoded together. Feeds the runner by hand, so the engine must have nothing to do."""
    runner = runner_of(engine)
    logits, free = Logits(runner), count(1)
    tables = [
        [next(free) for _ in range(pages_for([len(prompt) + len(answer)], runner.kv.page_tokens))]
        for prompt, answer in zip(prompts, answers, strict=True)
    ]
    sampling = Request([0], "", 1).sampling
    steps = []
    first = []
    for prompt, table in zip(prompts, tables, strict=True):
        runner.step([RowStep(prompt, 0, table, True, sampling)])
        first.append(logits.last_BV[0])
    steps.append(torch.stack(first))
    for at in range(len(answers[0]) - 1):
        rows = [
            RowStep([answer[at]], len(prompt) + at, table, True, sampling)
            for prompt, answer, table in zip(prompts, answers, tables, strict=True)
        ]
        runner.step(rows)
        steps.append(logits.last_BV)
    return torch.stack(steps, 1)


def relative(found_NGV: Tensor, wanted_NGV: Tensor) -> Tensor:
    """‖found − wanted‖ / ‖wanted‖ of each prompt and position, [N, G]."""
    return (found_NGV - wanted_NGV).norm(dim=-1) / wanted_NGV.norm(dim=-1)


def half_precision(args: argparse.Namespace, source: Source) -> list[Result]:
    """bf16 and fp16 against fp32 with the same weights; transformers' own forward in that dtype is the yardstick."""
    if not source.device.startswith("cuda"):
        return skipped("b", "needs CUDA")
    results: list[Result] = []
    for dtype in ("bfloat16", "float16"):
        model, exact = source.load(dtype), source.load("float32")
        exact.load_state_dict(model.state_dict())  # the same rounded weights
        # Some begin with the same pages, which decode steps with graphs then read once.
        first = make_prompts(1, SHARED_TOKENS, model.config.vocab_size, seed=2)[0]
        prompts = make_prompts(args.prompts, args.max_prompt, model.config.vocab_size)
        prompts = [(first + p if i % 2 else p)[: args.max_prompt] for i, p in enumerate(prompts)]
        kernel = args.kernel or kernels_for(source.device, model.dtype)[0]
        pages = pages_for([len(prompt) + args.tokens for prompt in prompts], page_tokens_of(kernel)) + 1
        bounds: dict[str, Any] = {"pages": pages, "max_batch": len(prompts), "max_model_len": MAX_MODEL_LEN}
        options = bounds | {"kernel": kernel}
        engine = over_model(exact, kernel="reference", **bounds)
        wanted: Any = together(engine, prompts, args.tokens)
        engine.close()
        wanted_NGV, yardstick_NGV = (
            torch.stack([plain_logits(m, [*p, *w[:-1]], len(w)) for p, w in zip(prompts, wanted, strict=True)])
            for m in (exact, model)
        )
        yardstick_NG = relative(yardstick_NGV, wanted_NGV)
        del yardstick_NGV
        engine = over_model(model, graphs=False, compile="off", fused=False, **options)
        engine.scheduler.plan_behind = lambda under_way: []
        plain: Any = together(engine, prompts, args.tokens)
        engine.close()
        found: dict[bool, list[Any]] = {}
        logits: dict[bool, Tensor] = {}
        for graphs in (False, True):
            engine = over_model(model, graphs=graphs, **options)
            captured = len(runner_of(engine).captured)
            logits[graphs] = forced_logits(engine, prompts, wanted)
            engine.close()
            engine = over_model(model, graphs=graphs, **options)
            found[graphs] = together(engine, prompts, args.tokens)
            engine.close()
            error_NG = relative(logits[graphs], wanted_NGV)
            largest = float((logits[graphs] - wanted_NGV).abs().max())
            splits = [
                (at, float(wanted_NGV[i, at, w[at]] - wanted_NGV[i, at, f[at]]))
                for i, (w, f) in enumerate(zip(wanted, found[graphs], strict=True))
                if (at := first_difference(w, f)) is not None
            ]
            gaps = [gap for _, gap in splits]
            mean, yard = float(error_NG.mean()), float(yardstick_NG.mean())
            results.append(
                verdict(
                    "b",
                    f"{dtype} graphs {'on' if graphs else 'off'}",
                    # Two logits that err by `largest` each can swap over a gap of twice that.
                    mean <= 1.5 * yard and max(gaps, default=0.0) <= 2 * largest and bool(captured) == graphs,
                    kernel=engine.numerics.kernel,
                    captured=captured,
                    error_prompt_mean=float(error_NG[:, 0].mean()),
                    error_prompt_max=float(error_NG[:, 0].max()),
                    error_forced_mean=mean,
                    error_forced_max=float(error_NG.max()),
                    transformers_mean=yard,
                    transformers_max=float(yardstick_NG.max()),
                    largest_logit_error=largest,
                    rows_diverging=len(splits),
                    first_divergence_median=statistics.median([at for at, _ in splits]) if splits else None,
                    gap_median=statistics.median(gaps) if gaps else 0.0,
                    gap_max=max(gaps, default=0.0),
                )
            )
        apart = relative(logits[True], logits[False])
        differ = sum(first_difference(a, b) is not None for a, b in zip(found[True], found[False], strict=True))
        results.append(
            verdict(
                "b",
                f"{dtype} graphs on = off",
                float(apart.mean()) <= float(yardstick_NG.mean()),
                bitwise_equal=bool((apart == 0).all()),
                positions_bitwise_equal=float((apart == 0).float().mean()),
                difference_mean=float(apart.mean()),
                difference_max=float(apart.max()),
                rows_with_other_tokens=differ,
            )
        )
        failed, differ, where = compare(exact, prompts, plain, found[True])
        gaps = [abs(place["gap"]) for place in where]
        results.append(
            verdict(
                "b",
                f"{dtype} everything on against everything off",
                # The same rounding errors as against fp32, of either.
                not failed and max(gaps, default=0.0) <= 2 * largest,
                rows_with_other_tokens=differ,
                mismatch_rate=differ / len(prompts),
                gap_median=statistics.median(gaps) if gaps else 0.0,
                gap_max=max(gaps, default=0.0),
                where=where,
            )
        )
        del model, exact, engine, logits, wanted_NGV, apart
        empty_cache()
    return results


# --- f: 8 bits

EIGHT_BITS = {
    "kv int8": ("int8", None),
    "kv fp8": ("fp8", None),
    "weights int8": ("auto", "int8"),
    "kv and weights int8": ("int8", "int8"),
}


def eight_bits(args: argparse.Namespace, source: Source) -> list[Result]:
    """What 8 bits cost in logits, and that the device adds no more to it than without: its error may be that
    of the same quantisation in fp32, and one and a half times that of half precision alone."""
    dtype = "bfloat16" if source.device.startswith("cuda") else "float32"
    model = source.load(dtype)
    prompts = make_prompts(min(args.prompts, 8), min(args.max_prompt, 700), model.config.vocab_size)
    tokens = min(args.tokens, 32)
    page_tokens = own_page_tokens(source.device, model.dtype)
    pages = pages_for([len(prompt) + tokens for prompt in prompts], page_tokens) + 1
    options: dict[str, Any] = {"pages": pages, "max_batch": len(prompts), "max_model_len": MAX_MODEL_LEN}

    def logits_of(kind: str | None, exact: bool, kv_dtype: str, **more: Any) -> tuple[Tensor, Any]:
        one = source.load(dtype)
        if kind is not None:
            quantise(one, source.device)
        engine = over_model(one.float() if exact else one, kv_dtype=kv_dtype, **options, **more)
        numerics, graphs = engine.numerics, bool(runner_of(engine).captured)
        found = forced_logits(engine, prompts, wanted)
        engine.close()
        return found, (numerics, graphs)

    engine = over_model(model.float(), **options)
    wanted: Any = together(engine, prompts, tokens)
    engine.close()
    full_NGV, _ = logits_of(None, True, "auto")
    half_NG = relative(logits_of(None, False, "auto", compile="off")[0], full_NGV)
    results: list[Result] = []
    for name, (kv_dtype, kind) in EIGHT_BITS.items():
        begin = time.perf_counter()
        exact_NGV, _ = logits_of(kind, True, kv_dtype)
        found_NGV, (numerics, graphs) = logits_of(kind, False, kv_dtype, compile="auto" if kind else "off")
        price_NG, error_NG = relative(exact_NGV, full_NGV), relative(found_NGV, full_NGV)
        price, error, half = (float(one.mean()) for one in (price_NG, error_NG, half_NG))
        results.append(
            verdict(
                "f",
                name,
                price > 0 and error <= price + 1.5 * half + 1e-6,
                kernel=numerics.kernel,
                kv_dtype=numerics.kv_dtype,
                weights_dtype=numerics.weights_dtype,
                captured=graphs,
                error_mean=error,
                error_max=float(error_NG.max()),
                error_in_fp32_mean=price,
                without_mean=half,
                same_most_likely=float((found_NGV.argmax(-1) == full_NGV.argmax(-1)).float().mean()),
                seconds=round(time.perf_counter() - begin, 1),
            )
        )
        empty_cache()
    return results


# --- c: memory over many calls


def memory(args: argparse.Namespace, source: Source) -> list[Result]:
    """Short calls with shared prefixes: what is allocated after a fifth of them is allocated at the end."""
    cuda = source.device.startswith("cuda")
    model = source.load("auto" if source.folder else "bfloat16" if cuda else "float32")
    vocabulary, draw = model.config.vocab_size, random.Random(3)
    engine = over_model(model, pages=args.pages, max_batch=64, max_model_len=MAX_MODEL_LEN)

    def tokens(size: int) -> list[int]:
        return [draw.randrange(3, vocabulary) for _ in range(size)]

    prefixes = [tokens(draw.randrange(16, 129)) for _ in range(40)]
    points: list[Result] = []
    begin = time.perf_counter()
    running: deque[tuple[str, Future[Any]]] = deque()

    def finish_one() -> None:
        id, future = running.popleft()
        future.result()
        engine.end(id)

    for point in range(1, 11):
        for _ in range(args.calls // 10):
            prefix = draw.choice(prefixes)
            prompt = prefix + tokens(draw.randrange(max(1, 32 - len(prefix)), 257 - len(prefix)))
            id = f"c{next(_ids)}"
            running.append((id, engine.submit(Request(prompt, id, draw.randrange(4, 17)))))
            if len(running) >= 128:
                finish_one()
        while running:
            finish_one()
        gc.collect()
        points.append(
            {
                "calls": point * (args.calls // 10),
                "allocated_mib": torch.cuda.memory_allocated() / 2**20 if cuda else None,
                "reserved_mib": torch.cuda.memory_reserved() / 2**20 if cuda else None,
                "rss_mib": rss_bytes() / 2**20,
                "seconds": round(time.perf_counter() - begin, 1),
            }
        )
    events = engine.events
    engine.close()
    print_table("c: memory", points)
    warm, end = points[1], points[-1]
    growth = {
        key: (end[key] - warm[key] if end[key] is not None else 0.0)
        for key in ("allocated_mib", "reserved_mib", "rss_mib")
    }
    # The reserve may still meet a larger mix of prompts than any before; what is allocated at rest may not grow.
    ok = growth["allocated_mib"] <= 0 and growth["reserved_mib"] <= 32 and growth["rss_mib"] < 32
    return [
        verdict(
            "c",
            f"{args.calls} calls",
            ok,
            **{f"growth_{key}": value for key, value in growth.items()},
            evictions=events["evictions"],
            points=points,
        )
    ]


# --- d: out of memory

# With `wait` it takes the memory at a first line, and gives it back `hold_s` after a second.
GRABBER = """
import sys, threading, torch
hold_s, pause_s = map(float, sys.argv[1:3])
wait = sys.stdin.readline if "wait" in sys.argv else lambda: None
stop = threading.Event()
torch.zeros(1, device="cuda")
grabs = 0
print("ready", flush=True)
wait()
while not stop.is_set():
    held, size = [], 1 << 30
    while size >= 1 << 20:
        try:
            held.append(torch.empty(size, dtype=torch.uint8, device="cuda"))
        except torch.OutOfMemoryError:
            size //= 4
    grabs += 1
    if grabs == 1:
        wait()
        threading.Thread(target=lambda: (sys.stdin.read(), stop.set()), daemon=True).start()
    stop.wait(hold_s)
    held.clear()
    torch.cuda.empty_cache()
    stop.wait(pause_s)
print(grabs, flush=True)
"""


def _counters(engine: PagedEngine) -> dict[str, int]:
    return {name: times for name, times in engine.events.items() if times}


def capped(args: argparse.Namespace, source: Source) -> Result:
    """The process may have less memory than the configured prefill step takes."""
    model = source.load("float32")
    prompts = make_prompts(16, max(1500, args.max_prompt), model.config.vocab_size, seed=7)
    options: dict[str, Any] = {
        "kernel": "reference",
        "pages": pages_for([len(prompt) + args.tokens for prompt in prompts], 256) + 1,
        "max_batch": len(prompts),
        "max_prefill_tokens": 8192,
        "max_model_len": MAX_MODEL_LEN,
    }
    engine = over_model(model, **options)
    empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    expected = together(engine, prompts, args.tokens)
    step_bytes = torch.cuda.max_memory_allocated() - before
    engine.close()
    del engine
    empty_cache()
    engine = over_model(model, **options)
    empty_cache()
    total = torch.cuda.get_device_properties(source.device).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 0.4 * step_bytes) / total)
    try:
        found = together(engine, prompts, args.tokens)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    events = _counters(engine)
    engine.close()
    failed, differ, where = compare(model, prompts, expected, found)
    return verdict(
        "d",
        "cap below the prefill step",
        not (failed or differ) and events.get("oom_prefill", 0) > 0,
        requests=len(prompts),
        failed=failed,
        differ=differ,
        step_mib=step_bytes / 2**20,
        allowed_mib=0.4 * step_bytes / 2**20,
        ooms=events.get("oom_prefill", 0) + events.get("oom_decode", 0),
        where=where,
        events=events,
    )


def grabbed(args: argparse.Namespace, source: Source, dtype: str, longest: int, stage: str) -> Result:
    """Another process takes all free memory for two seconds, gives it back for one, and again.

    Args:
        longest: tokens of a prompt; with short ones nearly all steps decode.
        stage: "prefill" or "decode": where memory must have run out.
    """
    model = source.load(dtype)
    exact = dtype == "float32"
    rows = 24
    waves = [make_prompts(rows, longest, model.config.vocab_size, seed) for seed in range(20, 23)]
    need = pages_for([longest + args.tokens] * rows, own_page_tokens(source.device, model.dtype))
    options: dict[str, Any] = {"pages": need + 1, "max_batch": rows, "max_model_len": MAX_MODEL_LEN}
    options["graphs"] = stage == "prefill"  # a replayed step allocates nothing

    def play(engine: PagedEngine) -> list[Any]:
        found = []
        for prompts in waves:
            found += together(engine, prompts, args.tokens)
        return found

    engine = over_model(model, **options)
    expected = play(engine)
    engine.close()
    del engine
    empty_cache()
    engine = over_model(model, **options)
    runner = runner_of(engine)

    def from_nothing(call: Callable[..., Any]) -> Callable[..., Any]:
        """Else the allocator serves a step from what it kept of the last, and nobody else can be in its way."""

        def emptied(*args: Any) -> Any:
            torch.cuda.empty_cache()
            return call(*args)

        return emptied

    runner.step, runner.launch = from_nothing(runner.step), from_nothing(runner.launch)
    with subprocess.Popen(
        [sys.executable, "-c", GRABBER, "2", "1"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdin is not None
        assert other.stdout is not None
        if other.stdout.readline().strip() != "ready":
            raise RuntimeError("the process that takes the memory did not start")
        begin, rounds, failed, differ, where = time.perf_counter(), 0, 0, 0, []
        found: list[Any] = []
        while rounds == 0 or (time.perf_counter() - begin < 12 and not engine.dead):
            found += play(engine)
            rounds += 1
        other.stdin.close()
        grabs = int(other.stdout.read())
    events = _counters(engine)
    engine.close()
    prompts = [prompt for wave in waves for prompt in wave]
    model = source.load(dtype)  # an engine may have changed the other's layers
    for at in range(0, len(found), len(prompts)):
        more, other_tokens, places = compare(model, prompts, expected, found[at : at + len(prompts)])
        failed, differ, where = failed + more, differ + other_tokens, where + places
    ooms = events.get(f"oom_{stage}", 0)
    return verdict(
        "d",
        f"another process, {dtype}, in {stage}",
        not failed and not (exact and differ) and ooms > 0,
        requests=len(found),
        failed=failed,
        differ=differ,
        times_grabbed=grabs,
        ooms=ooms,
        where=where,
        events=events,
    )


def oom(args: argparse.Namespace, source: Source) -> list[Result]:
    """Real out-of-memory errors."""
    if not source.device.startswith("cuda"):
        return skipped("d", "needs CUDA")
    results: list[Result] = []
    for check in (
        capped,
        partial(grabbed, dtype="float32", longest=args.max_prompt, stage="prefill"),
        partial(grabbed, dtype="float32", longest=40, stage="decode"),
        partial(grabbed, dtype="bfloat16", longest=args.max_prompt, stage="prefill"),
    ):
        results.append(check(args, source))
        print(f"    events: {results[-1]['events']}", flush=True)
        empty_cache()
    return results


# --- e: reuse


class _Forgetful(PageAllocator):
    """Finds nothing of what is cached: every admission has a KV policy of its own."""

    def admit(self, sequence_id: str, token_ids: Sequence[int], policy: Any = None, **options: Any) -> Admission | None:
        """As `PageAllocator.admit`, from the first token."""
        return super().admit(sequence_id, token_ids, object(), **options)

    def promised(self, token_ids: Sequence[int], policy: Any = None) -> bool:
        """Nobody's pages are waited for."""
        return False


def recorded(args: argparse.Namespace, source: Source, vocabulary: int) -> list[Trace]:
    """Trajectories of a replay file in the model's own tokens, or synthetic ones."""
    if args.replay is None or source.folder is None:
        return make_traces(args.trajectories, 5, prefix=300, vocabulary=vocabulary)
    return read_traces(args.replay, args.fewshot, loader.load_tokenizer(source.folder), args.trajectories)


def play(
    engine: PagedEngine, traces: Sequence[Trace], tokens: int, *, reuse: bool = True
) -> tuple[dict[tuple[str, int], Tokens], dict[str, int]]:
    """Replay all trajectories at once, each in a closed loop: the answers by call, and sums of usage."""
    if not reuse:
        pages = engine.scheduler.pages
        engine.scheduler.pages = _Forgetful(pages.num_pages, pages.page_tokens)
    contexts = {trace.id: trace.contexts() for trace in traces}
    finished = SimpleQueue[tuple[str, int, Future[Any]]]()
    answers: dict[tuple[str, int], Tokens] = {}
    totals = {"prompt": 0, "prefilled": 0, "reused": 0, "preemptions": 0}

    def call(id: str, k: int) -> None:
        sequence = id if reuse else f"{id}#{k}"
        future = engine.submit(Request(contexts[id][k], sequence, tokens))
        future.add_done_callback(lambda future: finished.put((id, k, future)))

    for trace in traces:
        call(trace.id, 0)
    left = len(traces)
    while left:
        id, k, future = finished.get()
        answer = future.result()
        answers[id, k] = answer.token_ids
        totals["prompt"] += answer.usage.prompt_tokens
        totals["prefilled"] += answer.usage.prefilled
        totals["reused"] += answer.usage.reused
        totals["preemptions"] += answer.usage.preemptions
        last = k + 1 == len(contexts[id])
        if last or not reuse:
            engine.end(id if reuse else f"{id}#{k}")
        if last:
            left -= 1
        else:
            call(id, k + 1)
    return answers, totals


def computed_before(traces: Sequence[Trace]) -> tuple[int, int]:
    """Tokens of all calls whose KV an earlier call has computed: the trajectory's own former context, or what the
    first prompts share. Also the number that all share."""
    shared = min((first_difference(traces[0].prompt, t.prompt) or 0 for t in traces[1:]), default=0)
    own = sum(len(context) for trace in traces for context in trace.contexts()[:-1])
    return own + shared * (len(traces) - 1), shared


def reuse(args: argparse.Namespace, source: Source) -> list[Result]:
    """Reuse changes no token, finds what was computed, and degrades with the pool."""
    model = source.load("float32")
    traces = recorded(args, source, model.config.vocab_size)
    longest = max(len(trace.contexts()[-1]) for trace in traces) + args.reuse_tokens
    before, shared = computed_before(traces)
    shared_pages = shared // args.reuse_page_tokens
    lengths = [len(trace.contexts()[-1]) + args.reuse_tokens for trace in traces]
    need = pages_for(lengths, args.reuse_page_tokens) - shared_pages * (len(traces) - 1)
    calls = sum(trace.calls for trace in traces)
    print(f"e: {len(traces)} trajectories, {calls} calls, {before:,} tokens computed before, {shared} shared by all, "
          f"longest {longest}, the set needs {need} pages of {args.reuse_page_tokens}", flush=True)  # fmt: skip

    def engine_of(pages: int) -> PagedEngine:
        return over_model(
            model,
            pages=max(pages, pages_for([longest], args.reuse_page_tokens)) + 1,
            page_tokens=args.reuse_page_tokens,
            max_batch=len(traces),
            max_prefill_tokens=args.max_prefill_tokens,
            max_model_len=longest + 1,
        )

    engine = engine_of(pages_for(lengths, args.reuse_page_tokens) * 2)
    begin = time.perf_counter()
    without, totals_without = play(engine, traces, args.reuse_tokens, reuse=False)
    engine.close()
    print(f"e: without reuse: {time.perf_counter() - begin:.1f} s, {totals_without}", flush=True)

    rows: list[Result] = []
    where: list[dict[str, Any]] = []
    for factor in map(float, args.factors.split(",")):
        engine = engine_of(round(need * factor))
        begin = time.perf_counter()
        found, totals = play(engine, traces, args.reuse_tokens)
        events = engine.events
        engine.close()
        for (id, k), answer in found.items():
            if (at := first_difference(without[id, k], answer)) is not None:
                context = next(trace for trace in traces if trace.id == id).contexts()[k]
                logits_V = plain_logits(model, [*context, *answer[:at]])[0]
                gap = float(logits_V[without[id, k][at]] - logits_V[answer[at]])
                where.append({"pool": factor, "id": id, "call": k, "position": at, "gap": gap})
        rows.append(
            {
                "pool": factor,
                "pages": engine.capacity().pages_total,
                "reused_of_computed": totals["reused"] / before,
                "reused": totals["reused"],
                "prefilled": totals["prefilled"],
                "preemptions": totals["preemptions"],
                "evictions": events["evictions"],
                "calls_that_differ": sum(place["pool"] == factor for place in where),
                "seconds": round(time.perf_counter() - begin, 1),
            }
        )
        print(f"e: pool {factor}: {rows[-1]}", flush=True)
    print_table("e: reuse by size of the pool", rows)
    roomy = max(rows, key=lambda row: row["pool"])
    return [
        verdict(
            "e",
            "tokens with reuse = without",
            not where and not totals_without["reused"],
            calls=calls,
            runs=len(rows),
            differ=len(where),
            reused_without=totals_without["reused"],
            largest_gap=max((abs(place["gap"]) for place in where), default=0.0),
            where=where,
        ),
        verdict(
            "e",
            f"reused in a pool of {roomy['pool']} × the need",
            roomy["reused_of_computed"] >= 0.95,
            reused_of_computed=roomy["reused_of_computed"],
            reused=roomy["reused"],
            computed_before=before,
            by_pool=rows,
        ),
    ]


# --- all


CHECKS: dict[str, Callable[[argparse.Namespace, Source], list[Result]]] = {
    "a": exactness,
    "b": half_precision,
    "c": memory,
    "d": oom,
    "e": reuse,
    "f": eight_bits,
}


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--only", default="a,b,c,d,e,f", help="comma-separated checks (default: all)")
    add("--model", help="folder, .gguf, or smollm2-135m (default: random weights of --shape)")
    add("--shape", choices=("small", "tiny"), default="small")
    add("--device", default=default_device())
    add("--prompts", type=int, default=30, help="a, b: prompts")
    add("--max-prompt", type=int, default=1500, help="a, b, d: tokens of the longest prompt")
    add("--tokens", type=int, default=64, help="a, b, d: tokens generated a prompt")
    add("--numerics", default="fast,invariant", help="a: which to run")
    add("--kernel", choices=get_args(Kernel), help="b: attention (default: the fastest there is)")
    add("--page-tokens", type=int, default=32, help="a: small pages, so that rows outgrow theirs")
    add("--max-prefill-tokens", type=int, default=2048, help="a, e: tokens of a prefill step")
    add("--calls", type=int, default=10_000, help="c: calls")
    add("--pages", type=int, default=256, help="c: KV pages")
    add("--replay", help="e: JSON lines of recorded trajectories with `steps` of thought, action, observation")
    add("--fewshot", help="e: text file that all prompts start with (default: an instruction)")
    add("--trajectories", type=int, default=20, help="e: how many")
    add("--reuse-tokens", type=int, default=16, help="e: tokens generated a call")
    add("--reuse-page-tokens", type=int, default=256, help="e: tokens a page")
    add("--factors", default="0.3,0.5,0.7,0.85,1.0,1.25,1.5", help="e: pool sizes, in parts of what the set needs")
    add("--out", help="JSON file to write")
    args = parser.parse_args(argv)
    for check in args.only.split(","):
        if check not in CHECKS:
            parser.error(f"--only: got {check}, wants {', '.join(CHECKS)}")
    if args.max_prompt + args.tokens >= MAX_MODEL_LEN:
        parser.error(f"--max-prompt and --tokens: want less than {MAX_MODEL_LEN} together")
    return args


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run, print, write."""
    args = parse(argv)
    source = Source(loader.resolve(args.model).folder if args.model else None, args.shape, args.device)
    results: list[Result] = []
    for check in args.only.split(","):
        begin = time.perf_counter()
        try:
            results += CHECKS[check](args, source)
        except Exception as e:  # the other checks still have something to say
            results.append(verdict(check, "all", False, error=f"{type(e).__name__}: {e}"))
        empty_cache()
        print(f"{check}: {time.perf_counter() - begin:.0f} s", flush=True)
    verdicts = {
        check: "miss" if "miss" in found else found[0]
        for check in args.only.split(",")
        if (found := [result["verdict"] for result in results if result["check"] == check])
    }
    print_table("verdicts", [{key: result[key] for key in ("check", "name", "verdict")} for result in results])
    return write_json(
        args.out,
        "engine_gpu",
        device=device_info(args.device),
        workload={key: value for key, value in vars(args).items() if key not in ("out", "device")},
        results=results,
        summary=verdicts,
    )


if __name__ == "__main__":
    main()

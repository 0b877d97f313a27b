"""ReAct trajectories replayed through several engines: generate, discard, append the recorded step.

Each trajectory starts from a few-shot prefix that all share and a question of its own. At every call the engine
generates a fixed number of tokens, which are thrown away; the context of the next call is the former context and the
recorded step (the tokens that a real run would have kept). So all engines do the same work, whatever they would say:
256 trajectories of the default lengths are 1,546 calls and 98,944 generated tokens at seed 0. Token ids are random
and seeded, weights too. Trajectories are independent closed loops: the next call starts when the last one is done.

`limit_s` is what the device's own measured rates allow when prefill and decode follow one another:
    prefill  operations of every token that must be computed once, over the rate of a large matrix product
    decode   bytes of the weights at every step and of each row's own KV at every token, the shared prefix once a
             step, over the rate of a large copy; as few steps as the batch and the longest trajectory allow
`limit_overlapped_s` lets the two run beside each other: the larger of all operations and all bytes.

    python -m bench.react_replay --shape 8b --engines berth,continuous_batching --out bench/results/react_8b.json
    python -m bench.react_replay --shape 8b --engines berth,vllm --trajectories 256,64
    python -m bench.react_replay --shape 8b --replay traces.jsonl --fewshot prompt.txt --trajectories 0
    python -m bench.react_replay --shape tiny --device cpu --trajectories 3 --prefix 64 --generate 4

With `--replay` the text is what was recorded: where its thoughts were written by a template, say so beside the figures.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import os
import random
import re
import statistics
import tempfile
import time
import traceback
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import count
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Protocol

import torch
from transformers import AutoModelForCausalLM, GenerationConfig

from actors.engine import loader, settle_garbage
from actors.engine import runner as runner_module
from actors.engine.assemble import over_model
from actors.engine.protocol import Request
from actors.messages import Generation
from bench.common import (
    SHAPES,
    default_device,
    device_info,
    empty_cache,
    first_difference,
    measured_rates,
    model_config,
    print_table,
    random_model,
    runner_of,
    synchronize,
    write_json,
)

STEPS = (3, 4, 4, 5, 5, 5, 6, 7)
QUESTION_TOKENS = 40
FEATURES = ("graphs", "compile", "fused", "shared", "ahead")
SHOWN = [
    *("cell", "engine", "repeat", "wall_s", "generated_tok_s", "prefilled_tokens", "reused_tokens", "preemptions"),
    *("prefill_s", "decode_s", "host_s", "prefill_steps", "decode_steps", "limit_s", "ratio_to_limit"),
]


# --- the work


@dataclass(frozen=True, slots=True)
class Trace:
    """One recorded trajectory: the first prompt, and the tokens appended after each call but the last."""

    id: str
    prompt: list[int]
    steps: list[list[int]]

    @property
    def calls(self) -> int:
        """Calls in all."""
        return len(self.steps) + 1

    def contexts(self) -> list[list[int]]:
        """The context of each call."""
        contexts = [self.prompt]
        for step in self.steps:
            contexts.append(contexts[-1] + step)
        return contexts


def make_traces(n: int, seed: int, *, prefix: int = 1700, vocabulary: int = 150_000) -> list[Trace]:
    """`n` trajectories; other seeds share no prefix with these."""
    draw = random.Random(seed)

    def tokens(size: int) -> list[int]:
        return [draw.randrange(1000, vocabulary) for _ in range(size)]

    shared = tokens(prefix)
    traces: list[Trace] = []
    for index in range(n):
        steps = draw.choice(STEPS)
        prompt = shared + tokens(QUESTION_TOKENS)
        traces.append(Trace(f"{seed}:{index}", prompt, [tokens(48 + draw.randrange(60, 250)) for _ in range(steps)]))
    return traces


INSTRUCTION = (
    "Answer the question by steps of Thought, Action and Observation. Thought reasons about the situation. Action is "
    "Search[entity], Lookup[keyword] or Finish[answer]. Observation is what the tool says.\n"
)


def read_traces(
    replay: str, fewshot: str | None, tokenizer: Any, n: int, seed: int | None = None, vocabulary: int = 1 << 31
) -> list[Trace]:
    """Recorded trajectories, repeated up to `n`.

    Args:
        replay: JSON lines of id, question and steps of thought, action, observation.
        fewshot: text file that all prompts start with; None takes an instruction.
        seed: stands at the very start of all prompts, so that other seeds share nothing with these.
        vocabulary: larger token ids are folded into it.
    """

    def ids(text: str) -> list[int]:
        return [token % vocabulary for token in tokenizer(text, add_special_tokens=False)["input_ids"]]

    shared = ids("" if seed is None else f"Set {seed}.\n")
    shared += ids(Path(fewshot).read_text(encoding="utf-8") if fewshot else INSTRUCTION)
    traces: list[Trace] = []
    rows = [json.loads(line) for line in Path(replay).read_text(encoding="utf-8").splitlines()]
    for copy, row in ((at // len(rows), rows[at % len(rows)]) for at in range(n)):
        steps = [
            ids(f"Thought {i}: {s['thought']}\nAction {i}: {s['action']}\nObservation {i}: {s['observation']}\n")
            for i, s in enumerate(row["steps"], 1)
        ]
        question = f"Question: {row['question']}\n" if not copy else f"Question ({copy}): {row['question']}\n"
        traces.append(Trace(f"{seed}:{copy}:{row['id']}", shared + ids(question), steps[:-1]))
    return traces


@dataclass(slots=True)
class Counts:
    """What an engine says about one replay; None where it does not say."""

    prefilled: int | None = None
    reused: int | None = None
    prefill_s: float | None = None
    decode_s: float | None = None
    prefill_steps: int | None = None
    decode_steps: int | None = None
    preemptions: int | None = None


class Adapter(Protocol):
    """An engine under test: replays traces in closed loops, generating exactly `generate` tokens a call."""

    def replay(self, traces: Sequence[Trace]) -> Counts:
        """Run all trajectories to their end."""
        ...

    def close(self) -> None:
        """Free the device."""
        ...


# --- what the device allows


def limit(traces: Sequence[Trace], prefix: int, args: argparse.Namespace, rates: dict[str, float]) -> dict[str, float]:
    """Seconds that the measured rates allow for this work; see the module's docstring."""
    config: Any = model_config(args.shape)
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config)
    head_params = config.vocab_size * config.hidden_size
    body_params = sum(p.numel() for p in model.base_model.parameters()) - head_params
    itemsize = torch.empty((), dtype=_dtype(args)).itemsize
    kv_bytes = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * itemsize
    attend_flop = 4 * config.num_hidden_layers * config.num_attention_heads * config.head_dim

    rows = min(args.max_batch, len(traces))
    calls = sum(trace.calls for trace in traces)
    steps = (args.generate - 1) * max(-(-calls // rows), max(trace.calls for trace in traces))
    prefill_flop = 2 * body_params * prefix + attend_flop * prefix**2 / 2
    decode_flop, own_kv = 0.0, 0
    for trace in traces:
        contexts = trace.contexts()
        new = len(contexts[-1]) - prefix
        prefill_flop += 2 * body_params * new + 2 * head_params * trace.calls
        prefill_flop += attend_flop * (len(contexts[-1]) ** 2 - prefix**2) / 2
        for context in contexts:
            # Its tokens 2 to G: each attends to all before it.
            seen = (args.generate - 1) * len(context) + args.generate * (args.generate - 1) // 2
            own_kv += seen - (args.generate - 1) * prefix
            decode_flop += 2 * (body_params + head_params) * (args.generate - 1) + attend_flop * seen
    weight_bytes = (body_params + head_params) * itemsize
    decode_bytes = steps * (weight_bytes + prefix * kv_bytes) + own_kv * kv_bytes
    prefill_s, decode_s = prefill_flop / rates["matrix_flop_s"], decode_bytes / rates["copy_bytes_s"]
    return {
        "limit_s": prefill_s + decode_s,
        "limit_prefill_s": prefill_s,
        "limit_decode_s": decode_s,
        "limit_decode_steps": steps,
        "limit_overlapped_s": max(decode_s, (prefill_flop + decode_flop) / rates["matrix_flop_s"]),
    }


# --- Berth


PROFILED = 4
"""Steps that are profiled one after the other."""


class Clock:
    """Stands in for a runner's `step` and `launch` and times steps by kind; one with any row of several tokens is a
    prefill.

    A step's time is from its start, or from the end of the one before where it was launched behind that, until its
    tokens are on the host.
    """

    def __init__(self, runner: Any):
        self._step, self._launch = runner.step, runner.launch
        self.step_s: dict[str, list[float]] = {}
        self.profiled: dict[str, list[Counter[str]]] = {}
        self.kernels: dict[str, list[tuple[str, float]]] = {}  # names and ms of the last profiled step
        self.to_profile: dict[str, list[int]] = {}  # numbers of the steps
        self.steps: Counter[str] = Counter()
        self.gap_s: Counter[str] = Counter()
        self._ended, self._last = 0.0, ""
        self.reset()
        runner.step, runner.launch = self.step, self.launch

    def reset(self) -> None:
        """Count from zero."""
        self.step_s = {"prefill": [], "decode": []}
        self.steps.clear()
        self.gap_s.clear()

    def step(self, rows: Sequence[Any]) -> Any:
        """A timed step."""
        kind = self._kind(rows)
        if self._to_profile(kind):
            return self._profiled(self.to_profile[kind].pop(0), kind, rows)
        begin = time.perf_counter()
        drawn = self._step(rows)
        self.ended(kind, begin)
        return drawn

    def launch(self, rows: Sequence[Any], after: Any = None, sources: Sequence[int | None] = ()) -> Any:
        """A timed launch; none where such a step is to be profiled."""
        kind = self._kind(rows)
        if self._to_profile(kind):
            return None
        begin = time.perf_counter()
        drawn = self._launch(rows, after and after.drawn, sources)
        return drawn and TimedDrawn(drawn, self, kind, begin)

    @staticmethod
    def _kind(rows: Sequence[Any]) -> str:
        return "prefill" if any(len(row.token_ids) > 1 for row in rows) else "decode"

    def _to_profile(self, kind: str) -> bool:
        steps = self.to_profile.get(kind)
        return bool(steps) and self.steps[kind] >= steps[0]

    def ended(self, kind: str, begin: float) -> None:
        """A step that was begun then has just ended."""
        now = time.perf_counter()
        self.step_s[kind].append(now - max(begin, self._ended))
        self.steps[kind] += 1
        if self._last and begin > self._ended:
            self.gap_s[f"{self._last} → {kind}"] += begin - self._ended
        self._ended, self._last = now, kind

    def _profiled(self, number: int, kind: str, rows: Sequence[Any]) -> Any:
        self.steps[kind] += 1
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            drawn = self._step(rows)
            torch.cuda.synchronize()
        events = [event for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
        spent: Counter[str] = Counter()
        for event in events:
            spent[kernel_class(event.name)] += event.time_range.elapsed_us() / 1e3
            spent["# " + kernel_class(event.name)] += 1
        begin, end = min(e.time_range.start for e in events), max(e.time_range.end for e in events)
        spent["# span"] += (end - begin) / 1e3
        spent["# tokens"] += sum(len(row.token_ids) for row in rows)
        kind = f"{kind}, step {number // PROFILED * PROFILED} on"
        self.kernels[kind] = [(event.name[:90], event.time_range.elapsed_us() / 1e3) for event in events]
        self.profiled.setdefault(kind, []).append(spent)
        return drawn


@dataclass(frozen=True, slots=True)
class TimedDrawn:
    """A launched step that tells the clock when it has ended."""

    drawn: Any
    clock: Clock
    kind: str
    begin: float

    def result(self) -> Any:
        """See `protocol.Drawn`."""
        result = self.drawn.result()
        self.clock.ended(self.kind, self.begin)
        return result


_CLASSES = {
    "attention": r"flash|fmha|attention",
    "matrix product": r"gemm|gemv|cutlass|nvjet|cublas|xmma|splitk|wgmma",
    "compiled": r"triton",
    "host copy": r"memcpy|memset",
    "index, copy": r"copy|index|gather|scatter|cat",
    "sort, reduce": r"reduce|argmax|sort|softmax|topk|scan",
    "elementwise": r"elementwise|vectorized|fill",
}


def kernel_class(name: str) -> str:
    """What a kernel does, by its name."""
    return next((kind for kind, pattern in _CLASSES.items() if re.search(pattern, name.lower())), "other")


def closed_loops(
    engine: Any,
    traces: Sequence[Trace],
    at_once: int,
    make: Callable[[list[int], str], Request],
    until_s: float = math.inf,
) -> Iterator[Generation]:
    """Put all trajectories to an engine, `at_once` of them at a time, and end each; the answers as they come.

    Args:
        make: the request for a context of a trajectory.
        until_s: of the monotonic clock: none is begun after that.
    """
    contexts = {trace.id: deque(trace.contexts()) for trace in traces}
    waiting, finished = deque(contexts), SimpleQueue[tuple[str, Future[Generation]]]()

    def call(id: str) -> None:
        future = engine.submit(make(contexts[id].popleft(), id))
        future.add_done_callback(lambda future: finished.put((id, future)))

    for _ in range(min(at_once, len(traces))):
        call(waiting.popleft())
    left = len(traces)
    while left:
        id, future = finished.get()
        yield future.result()
        if contexts[id]:
            call(id)
            continue
        engine.end(id)
        left -= 1
        if time.monotonic() > until_s:
            left -= len(waiting)
            waiting.clear()
        if waiting:
            call(waiting.popleft())


class Berth:
    """The paged engine: one future a call, `end` when a trajectory is done."""

    def __init__(self, args: argparse.Namespace, max_model_len: int):
        self.generate = args.generate
        self.at_once = args.at_once or args.max_batch
        model = random_model(args.shape, device=args.device, dtype=_dtype(args))
        if "shared" in args.without:
            runner_module._SHARING_ROWS = 1 << 30
        self.engine = over_model(
            model,
            pages=args.pages,
            page_tokens=args.page_tokens,
            max_batch=args.max_batch,
            max_prefill_tokens=args.max_prefill_tokens,
            max_model_len=max_model_len,
            graphs="graphs" not in args.without,
            compile="off" if "compile" in args.without else "auto",
            fused="fused" not in args.without,
            speculation=args.speculation,
            budget_fraction=args.budget_fraction,
        )
        settle_garbage()  # as an engine's process does
        runner = runner_of(self.engine)
        if "ahead" in args.without:
            self.engine.scheduler.plan_behind = lambda under_way: []
        self.clock = Clock(runner)
        self.settings = {
            "kernel": self.engine.numerics.kernel,
            "without": args.without,
            "pages": runner.kv.pages,
            "page_tokens": runner.kv.page_tokens,
            "graphs": len(runner.captured),
            "memory": str(self.engine.memory),
            "max_batch": args.max_batch,
            "max_prefill_tokens": args.max_prefill_tokens,
        }

    def replay(self, traces: Sequence[Trace]) -> Counts:
        """Run all trajectories to their end, `at_once` of them at a time."""
        self.clock.reset()
        counts = Counts(0, 0, preemptions=0)
        make = partial(Request, max_tokens=self.generate)
        for answer in closed_loops(self.engine, traces, self.at_once, make):
            check_length(answer.token_ids, self.generate)
            counts.prefilled += answer.usage.prefilled
            counts.reused += answer.usage.reused
            counts.preemptions += answer.usage.preemptions
        gaps = ", ".join(f"{between} {gap_s:.2f} s" for between, gap_s in self.clock.gap_s.most_common())
        print(f"between steps, the device idle: {gaps}", flush=True)
        for kind, times in self.clock.step_s.items():
            setattr(counts, f"{kind}_s", sum(times))
            setattr(counts, f"{kind}_steps", len(times))
        return counts

    def profile(self, traces: Sequence[Trace]) -> None:
        """Print which kinds of kernels the device's time goes to, in a few steps of a replay."""
        starts = {"prefill": (8,), "decode": (8, 148, 300, 448)}  # multiples of PROFILED
        self.clock.to_profile = {
            kind: [at + step for at in ats for step in range(PROFILED)] for kind, ats in starts.items()
        }
        self.replay(traces)
        decode_s = self.clock.step_s["decode"]
        means = [1e3 * statistics.fmean(decode_s[at : at + 50]) for at in range(0, len(decode_s), 50)]
        print("decode, ms a step by fifties:", *(f"{ms:.1f}" for ms in means), flush=True)
        for kind, steps in self.clock.profiled.items():
            total: Counter[str] = sum(steps, Counter())
            times = {name: ms for name, ms in total.items() if not name.startswith("#")}
            rows = [
                {
                    "kernels": name,
                    "launches a step": total["# " + name] / len(steps),
                    "ms a step": ms / len(steps),
                    "share": ms / sum(times.values()),
                }
                for name, ms in sorted(times.items(), key=lambda item: -item[1])
            ]
            busy, span, tokens = (
                sum(times.values()) / len(steps),
                total["# span"] / len(steps),
                total["# tokens"] / len(steps),
            )
            print_table(f"{kind}, {tokens:.0f} tokens: kernels {busy:.2f} ms in {span:.2f} ms a step", rows)
            named: dict[str, list[float]] = {}
            for name, ms in self.clock.kernels[kind]:
                named.setdefault(name, []).append(ms)
            most = sorted(named.items(), key=lambda item: -sum(item[1]))[:24]
            last = [{"kernel": name, "launches": len(times), "ms": sum(times)} for name, times in most]
            print_table(f"the last of these {kind} steps, by kernel", last)

    def close(self) -> None:
        """Free the device."""
        self.engine.close()
        gc.unfreeze()


# --- peers


class HFGenerate:
    """`model.generate` over left-padded batches: every call prefills its whole context."""

    def __init__(self, args: argparse.Namespace, max_model_len: int):
        self.generate, self.batch, self.device = args.generate, args.hf_batch, args.device
        self.model, attention = _peer_model(args)
        # `generate` fills what a call leaves open from here.
        self.model.generation_config = GenerationConfig()
        self.settings = {"attention": attention, "batch": self.batch}

    @torch.no_grad()
    def replay(self, traces: Sequence[Trace]) -> Counts:
        """Batches of trajectories in lockstep; those that end earlier leave the batch."""
        counts = Counts(0, 0)
        config = GenerationConfig(max_new_tokens=self.generate, do_sample=False, pad_token_id=0)
        for at in range(0, len(traces), self.batch):
            live = [deque(trace.contexts()) for trace in traces[at : at + self.batch]]
            while live := [contexts for contexts in live if contexts]:
                rows = [contexts.popleft() for contexts in live]
                longest = max(map(len, rows))
                ids_BT = torch.zeros((len(rows), longest), dtype=torch.int64)
                mask_BT = torch.zeros_like(ids_BT)
                for r, row in enumerate(rows):
                    ids_BT[r, longest - len(row) :] = torch.tensor(row)
                    mask_BT[r, longest - len(row) :] = 1
                out_BT = self.model.generate(
                    input_ids=ids_BT.to(self.device), attention_mask=mask_BT.to(self.device), generation_config=config
                )
                check_length(out_BT[0, longest:], self.generate)
                counts.prefilled += sum(map(len, rows))
        return counts

    def close(self) -> None:
        """Free the device."""
        self.model = None


class ContinuousBatching:
    """Transformers' continuous batching, with CUDA graphs and asynchronous batching where it chooses them."""

    def __init__(self, args: argparse.Namespace, max_model_len: int):
        from transformers.generation import ContinuousBatchingConfig

        self.generate = args.generate
        self.model, attention = _peer_model(args)
        config = ContinuousBatchingConfig(
            max_requests_per_batch=args.max_batch,
            max_blocks_per_request=-(-max_model_len // 256),
            default_compile_level=args.cb_compile,
            max_memory_percent=0.85,
        )
        generation = GenerationConfig(max_new_tokens=self.generate, do_sample=False, eos_token_id=-1, pad_token_id=0)
        self.manager = self.model.init_continuous_batching(
            generation_config=generation, continuous_batching_config=config
        )
        self.manager.start()
        self.settings = {"attention": attention, "compile_level": args.cb_compile, "max_batch": args.max_batch}
        self._ids = count()

    def replay(self, traces: Sequence[Trace]) -> Counts:
        """Every trajectory at once; the manager holds the batch to its limit."""
        running: dict[str, deque[list[int]]] = {}

        def call(contexts: deque[list[int]]) -> None:
            id = str(next(self._ids))
            running[id] = contexts
            self.manager.add_request(contexts.popleft(), request_id=id, max_new_tokens=self.generate, eos_token_id=-1)

        for trace in traces:
            call(deque(trace.contexts()))
        while running:
            answer = self.manager.get_result(timeout=120)
            if answer is None or answer.error:
                raise RuntimeError(f"continuous batching failed: {answer and answer.error}")
            check_length(answer.generated_tokens, self.generate)
            contexts = running.pop(answer.request_id)
            if contexts:
                call(contexts)
        return Counts()

    def close(self) -> None:
        """Free the device."""
        self.manager.stop(block=True)
        self.manager = self.model = None


class VLLM:
    """vLLM with prefix caching and dummy weights."""

    def __init__(self, args: argparse.Namespace, max_model_len: int):
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
        from vllm import LLM, SamplingParams

        folder = tempfile.mkdtemp()
        config: Any = model_config(args.shape)
        config.architectures = ["Qwen3ForCausalLM"]
        config.save_pretrained(folder)
        self.llm: Any = LLM(
            model=folder,
            load_format="dummy",
            skip_tokenizer_init=True,
            dtype="bfloat16",
            gpu_memory_utilization=0.85,
            max_model_len=max_model_len,
            max_num_seqs=args.max_batch,
            enable_prefix_caching=True,
            disable_log_stats=True,
        )
        self.generate = args.generate
        self.sampling = SamplingParams(
            max_tokens=args.generate, min_tokens=args.generate, ignore_eos=True, temperature=0, detokenize=False
        )
        self.settings = {"max_batch": args.max_batch, "gpu_memory_utilization": 0.85}
        self._ids = count()

    def replay(self, traces: Sequence[Trace]) -> Counts:
        """Every trajectory at once; vLLM holds the batch to its limit."""
        engine, running = self.llm.llm_engine, {}

        def call(contexts: deque[list[int]]) -> None:
            id = str(next(self._ids))
            running[id] = contexts
            engine.add_request(id, {"prompt_token_ids": contexts.popleft()}, self.sampling)

        for trace in traces:
            call(deque(trace.contexts()))
        while running:
            for answer in engine.step():
                if not answer.finished:
                    continue
                check_length(answer.outputs[0].token_ids, self.generate)
                # Newer versions append a suffix to the id.
                contexts = running.pop(answer.request_id.partition("-")[0])
                if contexts:
                    call(contexts)
        return Counts()

    def close(self) -> None:
        """Free the device: its engine runs in a process of its own."""
        self.llm = None


ONCE = ("continuous_batching", "hf_generate")
ENGINES: dict[str, Callable[[argparse.Namespace, int], Any]] = {
    "berth": Berth,
    "continuous_batching": ContinuousBatching,
    "hf_generate": HFGenerate,
    "vllm": VLLM,
}


def check_length(token_ids: Any, wanted: int) -> None:
    """A peer that stops early would look fast."""
    if len(token_ids) != wanted:
        raise RuntimeError(f"generated {len(token_ids)} tokens, wanted {wanted}")


def _dtype(args: argparse.Namespace) -> torch.dtype:
    return torch.bfloat16 if args.device.startswith("cuda") else torch.float32


def _peer_model(args: argparse.Namespace) -> tuple[Any, str]:
    """A model with the fastest attention that transformers has here, and which that is."""
    make = partial(random_model, args.shape, device=args.device, dtype=_dtype(args))
    if args.device.startswith("cuda"):
        try:
            return make(attention="flash_attention_2"), "flash_attention_2"
        except (ImportError, ValueError) as e:
            print(f"flash_attention_2 is not to be had ({str(e).splitlines()[0]}): sdpa")
    return make(attention="sdpa"), "sdpa"


# --- the benchmark


@dataclass(slots=True)
class Run:
    """All repeats of one engine."""

    name: str
    rows: list[dict[str, Any]] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Cell:
    """Trajectories to replay, by repeat.

    Attributes:
        name: as it stands on each result.
        prefix: tokens that all prompts begin with.
    """

    name: str
    prefix: int
    repeats: list[list[Trace]]


def make_cells(args: argparse.Namespace) -> tuple[list[Cell], list[Trace]]:
    """What is to be replayed, and a few other trajectories to warm up with."""
    vocabulary = min(150_000, model_config(args.shape).vocab_size)
    seeds = range(args.seed, args.seed + args.repeats)
    make = partial(make_traces, prefix=args.prefix, vocabulary=vocabulary)
    cells = [  # of other seeds each, or a cell would find the one before it in the cache
        Cell(str(n), args.prefix, [make(n, seed + 100 * at) for seed in seeds])
        for at, n in enumerate(args.trajectories)
    ]
    if args.replay:
        tokenizer = loader.load_tokenizer(loader.resolve(args.tokenizer, weights=False).folder)
        read = partial(read_traces, args.replay, args.fewshot, tokenizer, vocabulary=vocabulary)
        prefix = first_difference(*(trace.prompt for trace in read(2, args.seed)))
        n = args.replay_trajectories
        cells.append(Cell(f"recorded {n}", prefix, [read(n, seed) for seed in seeds[: args.replay_repeats]]))
    return cells, make(min(32, max((*args.trajectories, args.replay_trajectories if args.replay else 0))), 9)


def measure(name: str, args: argparse.Namespace, rates: dict[str, float]) -> Run:
    """Build an engine, warm it up, replay, free it. The slow peers replay the first cell alone, and once."""
    cells, warm = make_cells(args)
    if name in ONCE:
        cells = [replace(cells[0], repeats=cells[0].repeats[:1])]
    if name == "hf_generate":
        # `generate` compiles and captures nothing, and 32 trajectories take it a minute.
        cells, warm = [replace(cells[0], repeats=[cells[0].repeats[0][: args.hf_trajectories]])], warm[:2]
    traces = [trace for cell in cells for repeat in cell.repeats for trace in repeat] + warm
    max_model_len = -(-(max(len(trace.contexts()[-1]) for trace in traces) + args.generate) // 256) * 256
    run = Run(name)
    if args.device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
    begin = time.perf_counter()
    engine = ENGINES[name](args, max_model_len)
    try:
        engine.replay(warm)
        run.settings = engine.settings | {"start_s": round(time.perf_counter() - begin, 1)}
        print(f"{name}: ready after {run.settings['start_s']} s, {run.settings}", flush=True)
        for cell in cells:
            for repeat, traces in enumerate(cell.repeats):
                synchronize(args.device)
                begin = time.perf_counter()
                counts = engine.replay(traces)
                synchronize(args.device)
                wall_s = time.perf_counter() - begin
                row = {"cell": cell.name} | _row(name, repeat, traces, counts, wall_s, args)
                row |= limit(traces, cell.prefix, args, rates)
                row["ratio_to_limit"] = row["limit_s"] / wall_s
                run.rows.append(row)
                print(f"{name}: {cell.name}: {wall_s:.2f} s, {row['generated_tok_s']:,.0f} tok/s", flush=True)
        if args.profile and name == "berth" and args.device.startswith("cuda"):
            seed = args.seed + args.repeats
            engine.profile(make_traces(max(args.trajectories), seed, prefix=args.prefix))
    finally:
        engine.close()
        del engine
        empty_cache()
    return run


def _row(
    name: str, repeat: int, traces: Sequence[Trace], counts: Counts, wall_s: float, args: argparse.Namespace
) -> dict[str, Any]:
    calls = sum(trace.calls for trace in traces)
    host_s = None
    if counts.prefill_s is not None and counts.decode_s is not None:
        host_s = wall_s - counts.prefill_s - counts.decode_s
    peak = torch.cuda.max_memory_allocated() if args.device.startswith("cuda") else None
    return {
        "engine": name,
        "repeat": repeat,
        "wall_s": wall_s,
        "generated_tok_s": calls * args.generate / wall_s,
        "trajectories": len(traces),
        "calls": calls,
        "generated_tokens": calls * args.generate,
        "appended_tokens": sum(len(step) for trace in traces for step in trace.steps),
        "prefilled_tokens": counts.prefilled,
        "reused_tokens": counts.reused,
        "preemptions": counts.preemptions,
        "prefill_s": counts.prefill_s,
        "decode_s": counts.decode_s,
        "host_s": host_s,
        "prefill_steps": counts.prefill_steps,
        "decode_steps": counts.decode_steps,
        "peak_bytes": None if name == "vllm" else peak,
    }


def summarize(runs: Sequence[Run]) -> dict[str, dict[str, dict[str, Any]]]:
    """By cell and engine: median and spread (largest less smallest) of the speed, against vLLM's and the limit."""
    speeds: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for run in runs:
        for row in run.rows:
            speeds.setdefault(row["cell"], {}).setdefault(run.name, []).append(row)
    settings = {run.name: run.settings for run in runs}
    summary: dict[str, dict[str, dict[str, Any]]] = {}
    for cell, engines in speeds.items():
        found = {name: [row["generated_tok_s"] for row in rows] for name, rows in engines.items()}
        vllm = statistics.median(found["vllm"]) if "vllm" in found else None
        for name, rows in engines.items():
            median = statistics.median(found[name])
            summary.setdefault(cell, {})[name] = {
                "median_generated_tok_s": median,
                "spread": max(found[name]) - min(found[name]),
                "ratio_to_vllm": median / vllm if vllm else None,
                "ratio_to_limit": statistics.median(row["ratio_to_limit"] for row in rows),
                "settings": settings[name],
            }
    return summary


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--shape", choices=list(SHAPES), default="8b")
    add("--engines", default="berth", help=f"comma-separated, of {', '.join(ENGINES)} (default: berth)")
    add(
        "--trajectories",
        type=lambda text: [int(n) for n in text.split(",") if int(n)],
        default=[256],
        help="of random tokens; several numbers, comma-separated, are measured one after the other; 0: none",
    )
    add("--repeats", type=int, default=3, help="each with a seed of its own: --seed and up")
    add("--seed", type=int, default=0)
    add("--max-batch", type=int, default=256, help="rows decoded together at most")
    add("--at-once", type=int, help="berth: trajectories in flight (default: --max-batch)")
    add("--max-prefill-tokens", type=int, default=8192, help="berth: tokens of a prefill step")
    add("--pages", type=int, help="berth: KV pages (default: what the budget leaves)")
    add("--page-tokens", type=int, help="berth: tokens of a KV page (default: what the kernel does best with)")
    add("--budget-fraction", type=float, default=0.9, help="berth: share of the device's memory to use")
    add("--without", default="", help=f"berth: leave out, comma-separated, of {', '.join(FEATURES)}")
    add("--speculation", choices=["auto", "on", "off"], default="auto", help="berth: guess tokens (auto: not on a GPU)")
    add("--hf-batch", type=int, default=32, help="hf_generate: rows of a batch")
    add("--hf-trajectories", type=int, default=32, help="hf_generate: it is slow, so at most so many")
    add("--cb-compile", type=int, default=1, help="continuous_batching: compile level")
    add("--prefix", type=int, default=1700, help="tokens of the shared prefix")
    add("--replay", help="JSON lines of recorded trajectories, replayed as well")
    add("--replay-trajectories", type=int, default=400, help="--replay: so many, by repeating what was recorded")
    add("--replay-repeats", type=int, help="--replay: repeats (default: --repeats)")
    add("--fewshot", help="--replay: text file that all prompts start with (default: an instruction)")
    add("--tokenizer", default="smollm2-135m", help="--replay: model whose tokenizer it is")
    add("--generate", type=int, default=64, help="tokens generated a call")
    add("--device", default=default_device())
    add("--profile", action="store_true", help="berth: print what kernels a few steps spend their time in")
    add("--out", help="JSON file to write")
    args = parser.parse_args(argv)
    for name in args.engines.split(","):
        if name not in ENGINES:
            parser.error(f"--engines: got {name}, wants {', '.join(ENGINES)}")
    for name in filter(None, args.without.split(",")):
        if name not in FEATURES:
            parser.error(f"--without: got {name}, wants {', '.join(FEATURES)}")
    if args.generate < 2:
        parser.error("--generate: wants 2 or more")
    if not args.trajectories and not args.replay:
        parser.error("--trajectories: wants 1 or more, or --replay")
    return args


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure, print, write; an engine that is not installed or fails stands under `skipped` in the workload."""
    args = parse(argv)
    rates = measured_rates(args.device, _dtype(args))
    device = device_info(args.device) | rates
    copy_gb_s, product_tflop_s = rates["copy_bytes_s"] / 1e9, rates["matrix_flop_s"] / 1e12
    print(f"{device['name']}: copy {copy_gb_s:,.0f} GB/s, product {product_tflop_s:,.1f} TFLOP/s", flush=True)
    runs: list[Run] = []
    skipped: dict[str, str] = {}
    document: dict[str, Any] = {}
    for name in args.engines.split(","):
        try:
            runs.append(measure(name, args, rates))
        except ImportError as e:
            skipped[name] = f"not installed: {e}"
            print(f"{name}: {skipped[name]}", flush=True)
        except Exception as e:  # what the other engines said is worth keeping
            skipped[name] = f"failed: {type(e).__name__}: {e}"
            traceback.print_exc()
        workload = {key: value for key, value in vars(args).items() if key not in ("out", "device", "profile")}
        document = write_json(  # what there is, lest the next engine takes it along
            args.out,
            "react_replay",
            device=device,
            workload=workload | {"skipped": skipped},
            results=[row for run in runs for row in run.rows],
            summary=summarize(runs),
        )
    print_table(f"ReAct replay, {args.shape}", [{key: row[key] for key in SHOWN} for row in document["results"]])
    return document


if __name__ == "__main__":
    main()

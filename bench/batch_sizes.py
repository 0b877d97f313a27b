"""Untuned admission against fixed batch sizes: trajectories of mixed lengths on one GPU, in too small a KV pool.

One engine serves every setting in turn, in the same pool:

    ledger         the ledger (actors/ledger.py, in a process of its own, as in a run) gives homes by forecasts, which
                   start from a prior and learn from the rows that end (pipeline/footprint.py); engine defaults
    keep           the same, but no waiting row's place is given up, however long its tool takes
    8, 16, 32, …   so many trajectories at once, in the order they stand; the engine preempts where pages are short
    generate 64, … `model.generate` over batches of so many, in the memory of weights and pool, and 2 GiB

Two workloads, of the same lengths: `calls` follow one another at once, or after `waits` for a tool. Of three kinds of
questions (a suite's `report_by` field, which forecasts learn by) some want two calls and some twenty, with a twelvefold
spread of own tokens; all share a few-shot prompt. The pool holds the mean trajectory `--largest / --pressure` times.

A setting ends after `--seconds` with what was generated until then, or, where there are few, with its last trajectory:
then the last long ones, beside which ever fewer run, decide. `again` is what was prefilled beyond each token once, of
all that was prefilled. Weights and tokens are random.

    python -m bench.batch_sizes --out bench/results/batch_sizes.json
    python -m bench.batch_sizes --shape tiny --device cpu --trajectories 12 --prefix 300 --generate 4 --sizes 2,8
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import heapq
import multiprocessing
import random
import statistics
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from queue import Empty, SimpleQueue
from typing import Any, Protocol

import torch

from actors.agent import Limits
from actors.engine import settle_garbage
from actors.engine.assemble import MAX_BATCH, over_model
from actors.engine.paged import PagedEngine
from actors.engine.protocol import Request
from actors.ledger import Ledger, Report, Reporter, slots
from actors.messages import Ask, Forecast, Generation, Lease, Task
from bench.common import (
    SHAPES,
    default_device,
    device_info,
    empty_cache,
    model_config,
    own_page_tokens,
    print_table,
    random_model,
    synchronize,
    write_json,
)
from bench.react_replay import HFGenerate, Trace, check_length
from pipeline.footprint import Forecaster
from pipeline.suite import PriorConfig

WORKLOADS = ("calls", "waits")
# kind: share of the questions, calls, tokens appended a step
KINDS = {
    "lookup": (0.6, (2, 5), (100, 260)),
    "compare": (0.3, (4, 9), (100, 400)),
    "research": (0.1, (8, 20), (200, 600)),
}
PRIOR = PriorConfig(steps=(2, 4, 9), tokens_per_step=(120, 200, 380))  # p10, p50, p90 of all kinds together
LIMITS = Limits(max_steps=24, trajectory_tokens=16_384, context_tokens=1 << 20, answer_tokens=64)
QUESTION_TOKENS = 40
OOM = ("oom_prefill", "oom_decode", "culprits", "pool_shrinks")


# --- the work


@dataclass(frozen=True, slots=True)
class Job:
    """A trajectory.

    Attributes:
        task: what its forecast is made from.
        waits_s: of the tool after each call but the last.
    """

    trace: Trace
    task: Task
    waits_s: tuple[float, ...]


def make_jobs(n: int, seed: int, *, prefix: int, vocabulary: int, waits: bool, salt: str) -> list[Job]:
    """`n` trajectories: of other tokens for each salt, and the same lengths and waits for the same seed. Tools take
    half a second in the median (lognormal, sigma 1), one in twelve 3 to 12 s."""
    lengths, words = random.Random(seed), random.Random(f"{seed} {salt}")

    def tokens(size: int) -> list[int]:
        return words.choices(range(1000, vocabulary), k=size)

    def wait_s() -> float:
        slow, quick, is_slow = lengths.uniform(3, 12), lengths.lognormvariate(-0.7, 1), lengths.random() < 1 / 12
        return (slow if is_slow else quick) if waits else 0.0

    shared, jobs = tokens(prefix), list[Job]()
    shares = [share for share, _, _ in KINDS.values()]
    for i in range(n):
        kind = lengths.choices(list(KINDS), shares)[0]
        _, calls, appended = KINDS[kind]
        steps = [tokens(lengths.randint(*appended)) for _ in range(lengths.randint(*calls) - 1)]
        trace = Trace(f"{salt}:{i}", shared + tokens(QUESTION_TOKENS), steps)
        task = Task(trace.id, 0, "", (), {"kind": kind}, {}, 0)
        jobs.append(Job(trace, task, tuple(wait_s() for _ in steps)))
    return jobs


def pool_pages(jobs: Sequence[Job], prefix: int, rows: int, page_tokens: int) -> int:
    """KV pages that `rows` trajectories take at their mean size over all calls, and the scratch page."""
    shared = prefix // page_tokens
    own = [-(-len(context) // page_tokens) - shared for job in jobs for context in job.trace.contexts()]
    largest = max(-(-len(job.trace.contexts()[-1]) // page_tokens) for job in jobs) + 1
    return 1 + max(largest, shared + round(rows * statistics.fmean(own)))


# --- who is let in


class Admission(Protocol):
    """Lets trajectories in.

    Attributes:
        at_once: trajectories under way, those that wait to be let in included.
    """

    at_once: int

    def ask(self, job: Job, tokens: int) -> None:
        """A call of so many tokens wants to be made; its id comes into the queue when it may."""
        ...

    def answered(self, job: Job, answer: Generation, tokens: int) -> None:
        """Its trajectory holds so many tokens and waits for its tool."""
        ...

    def ended(self, job: Job, tokens: int) -> None:
        """The trajectory is over."""
        ...

    def flush(self) -> None:
        """Nothing else happens now."""
        ...

    def close(self) -> None:
        """No more of it."""
        ...


class Fixed:
    """So many at once."""

    def __init__(self, at_once: int, granted: SimpleQueue[Any]):
        self.at_once, self.granted = at_once, granted

    def ask(self, job: Job, tokens: int) -> None:
        """See `Admission`."""
        self.granted.put(job.trace.id)

    def answered(self, job: Job, answer: Generation, tokens: int) -> None:
        """See `Admission`."""

    def ended(self, job: Job, tokens: int) -> None:
        """See `Admission`."""

    def flush(self) -> None:
        """See `Admission`."""

    def close(self) -> None:
        """See `Admission`."""


def serve_ledger(connection: Connection) -> None:
    """The ledger's process: what comes are lists of requests to `Ledger.do` and of reports, at last None; what goes are
    lists of ids of rows that have a home."""

    async def serve() -> None:
        settle_garbage()  # with torch loaded, which the actor does without, a full collection takes 0.3 s
        connection.send([])
        ledger, loop, tasks = (
            Ledger({"single": None}, lease_s=3600.0),
            asyncio.get_running_loop(),
            set[asyncio.Task[None]](),
        )

        async def acquire(ask: Ask) -> None:
            while await ledger.acquire(ask) is None:
                pass
            connection.send([ask.row_id])

        while (came := await loop.run_in_executor(None, connection.recv)) is not None:
            for report in (one for one in came if isinstance(one, Report)):
                await ledger.report(report)
            asked, granted = [one for one in came if not isinstance(one, Report)], []
            for (name, (first, *_)), answer in zip(asked, await ledger.do(asked), strict=True):
                if isinstance(answer, Exception):
                    raise answer
                if name == "ask" and isinstance(answer, Lease):
                    granted.append(first.row_id)
                elif name == "ask":
                    task = loop.create_task(acquire(first))
                    tasks.add(task)
                    task.add_done_callback(tasks.discard)
            if granted:
                connection.send(granted)
        for task in tasks:
            task.cancel()

    asyncio.run(serve())


class Ledgered:
    """The ledger decides, by forecasts; what an agent and a replica tell it in a run is told here, together where it
    happens together, as agents do."""

    def __init__(self, engine: PagedEngine, prefix: int, granted: SimpleQueue[Any], *, drops: bool):
        self.drops, self.granted, self.at_once = drops, granted, slots(engine.capacity())
        self.forecaster = Forecaster(LIMITS, prefix, PRIOR, ["kind"])
        self.reporter = Reporter("ledger", "single", "replica", engine)
        self.forecasts: dict[str, Forecast] = {}
        self.begun: set[str] = set()
        self.requests: list[Any] = []
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=serve_ledger, args=(theirs,), daemon=True)
        self.process.start()
        theirs.close()
        self.connection.recv()  # it has started
        threading.Thread(target=self._listen, daemon=True).start()
        self._report()
        self.flush()

    def _listen(self) -> None:
        while True:
            try:
                for id in self.connection.recv():
                    self.granted.put(id)
            except (EOFError, OSError):  # closed
                return

    def _report(self) -> None:
        report = self.reporter.report()
        self.reported_s = time.monotonic()
        self.requests.append(report if self.drops else replace(report, refill_s=float("inf")))

    def ask(self, job: Job, tokens: int) -> None:
        """See `Admission`."""
        id = job.trace.id
        if id not in self.forecasts:
            self.forecasts[id] = self.forecaster.forecast(job.task, tokens)
        home = "replica" if id in self.begun else None
        self.requests.append(("ask", (Ask(id, 1, "suite", self.forecasts[id], tokens, home, None, None),)))

    def admitted(self, id: str) -> None:
        """The trajectory makes its call."""
        if id not in self.begun:
            self.begun.add(id)
            self.forecaster.begin(f"{id}/0")

    def answered(self, job: Job, answer: Generation, tokens: int) -> None:
        """See `Admission`."""
        self.reporter.prefilled += answer.usage.prefilled
        self.reporter.prefill_gpu_s += answer.usage.prefill_gpu_s
        self.requests.append(("replied", (job.trace.id, 1, tokens)))
        if time.monotonic() > self.reported_s + 1.0:
            self._report()

    def ended(self, job: Job, tokens: int) -> None:
        """See `Admission`."""
        self.requests.append(("end", (job.trace.id, 1)))
        row = {"row_id": job.task.row_id, "prompt_tokens": len(job.trace.prompt), "peak_tokens": tokens}
        row |= {"num_steps": job.trace.calls, "error_type": None, "metadata": job.task.metadata}
        self.forecaster.observe(row)

    def flush(self) -> None:
        """See `Admission`."""
        if self.requests:
            self.connection.send(self.requests)
            self.requests = []

    def close(self) -> None:
        """See `Admission`."""
        self.connection.send(None)
        self.process.join(10)
        if self.process.is_alive():
            self.process.kill()
        self.connection.close()


# --- a setting


def run(engine: PagedEngine, jobs: Sequence[Job], name: str, args: argparse.Namespace) -> dict[str, Any]:
    """One setting over all trajectories, or as many as `--seconds` allow; its figures."""
    came: SimpleQueue[Any] = SimpleQueue()  # ids that may call, and (id, future) of answered calls
    ledgered = None if name.isdigit() else Ledgered(engine, args.prefix, came, drops=name == "ledger")
    admission: Admission = ledgered or Fixed(int(name), came)
    by_id, contexts = {job.trace.id: job for job in jobs}, {job.trace.id: deque(job.trace.contexts()) for job in jobs}
    fresh, tools = deque(by_id), list[tuple[float, str]]()
    before, under_way, calls, prefilled, running, most = engine.events, 0, 0, 0, set[str](), 0
    done: list[tuple[Job, int]] = []
    computed: dict[str, int] = {}
    by_second: list[tuple[int, int]] = []
    started_s = now_s = time.monotonic()
    while (fresh or under_way) and now_s < started_s + args.seconds:
        if now_s >= started_s + len(by_second):
            by_second.append((len(running), sum(len(left) < by_id[id].trace.calls for id, left in contexts.items())))
        while fresh and under_way < admission.at_once:
            under_way += 1
            id = fresh.popleft()
            admission.ask(by_id[id], len(contexts[id][0]))
        while tools and tools[0][0] <= now_s:
            _, id = heapq.heappop(tools)
            admission.ask(by_id[id], len(contexts[id][0]))
        if came.empty():
            admission.flush()
        try:
            left_s = (tools[0][0] if tools else started_s + args.seconds) - time.monotonic()
            one = came.get(timeout=max(0.0, min(left_s, 0.1)))
        except Empty:
            now_s = time.monotonic()
            continue
        now_s = time.monotonic()
        if isinstance(one, str):
            if ledgered:
                ledgered.admitted(one)
            running.add(one)
            most = max(most, len(running))
            future = engine.submit(Request(contexts[one].popleft(), one, args.generate))
            future.add_done_callback(lambda future, id=one: came.put((id, future)))
            continue
        id, future = one
        answer: Generation = future.result()
        check_length(answer.token_ids, args.generate)
        running.discard(id)
        job, usage = by_id[id], answer.usage
        at = job.trace.calls - len(contexts[id]) - 1
        tokens = usage.prompt_tokens + usage.generated
        calls, prefilled = calls + 1, prefilled + usage.prefilled
        computed[id] = usage.prompt_tokens - args.prefix
        if contexts[id]:
            admission.answered(job, answer, tokens)
            heapq.heappush(tools, (now_s + job.waits_s[at], id))
            continue
        engine.end(id)
        admission.ended(job, tokens)
        done.append((job, tokens))
        under_way -= 1
    wall_s = now_s - started_s
    for id in by_id:  # what is left of it, where time was over
        engine.end(id)
    admission.close()
    idle_s = time.monotonic() + 30
    while (sizes := engine.capacity()).running + sizes.waiting and time.monotonic() < idle_s:
        time.sleep(0.01)
    events = {key: count - before[key] for key, count in engine.events.items()}
    once = args.prefix + sum(computed.values())
    return {
        "engine": name,
        "wall_s": wall_s,
        "finished": not fresh and not under_way,
        "generated_tok_s": calls * args.generate / wall_s,
        "calls": calls,
        "trajectories": len(done),
        "most_at_once": most,
        "by_second": by_second,  # calls under way; trajectories begun
        "oom": sum(events[key] for key in OOM),
        "preemptions": events["preemptions"],
        "evictions": events["evictions"],
        "prefilled_tokens": prefilled,
        "again": max(0.0, 1 - once / prefilled) if prefilled else None,
    }


def run_generate(size: int, jobs: Sequence[Job], fraction: float | None, args: argparse.Namespace) -> dict[str, Any]:
    """`model.generate` over a batch of the first trajectories, call by call, until it is out of memory or time.

    Args:
        fraction: of the GPU's memory, that it may have.
    """
    if fraction is not None:
        torch.cuda.set_per_process_memory_fraction(fraction)
    peer = HFGenerate(argparse.Namespace(**vars(args) | {"hf_batch": size}), 0)
    live = [deque(job.trace.contexts()) for job in jobs[:size]]
    calls, oom, started_s = 0, 0, time.monotonic()
    while (live := [one for one in live if one]) and time.monotonic() < started_s + args.seconds:
        batch = [Trace("", one.popleft(), []) for one in live]
        try:
            peer.replay(batch)
        except torch.OutOfMemoryError:
            oom = 1
            break
        synchronize(args.device)
        calls += len(batch)
    wall_s = time.monotonic() - started_s
    peer.close()
    empty_cache()
    figures = {"calls": calls, "oom": oom, "wall_s": wall_s, "generated_tok_s": calls * args.generate / wall_s}
    return {"engine": f"generate {size}", "finished": not live and not oom} | figures


# --- the benchmark


def summarize(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """By workload: the ledger's speed against the best fixed size without an OOM, and what dropping gains."""
    summary: dict[str, Any] = {}
    for workload in dict.fromkeys(row["workload"] for row in rows):
        found = {row["engine"]: row for row in rows if row["workload"] == workload}
        fixed = {name: row for name, row in found.items() if name.isdigit() and not row["oom"]}
        best = max(fixed, key=lambda name: fixed[name]["generated_tok_s"], default=None)
        speed = {name: row["generated_tok_s"] for name, row in found.items()}
        ledger, keep = speed.get("ledger"), speed.get("keep")
        summary[workload] = {
            "best_fixed": best,
            "ratio_to_best": ledger / speed[best] if ledger is not None and best else None,
            "ledger_oom": found["ledger"]["oom"] if "ledger" in found else None,
            "ratio_to_keep": ledger / keep if ledger is not None and keep else None,
        }
    return summary


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure every setting of both workloads, print, write after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--shape", choices=list(SHAPES), default="1.7b")
    add("--trajectories", type=int, default=1_080)
    add("--sizes", default="48,96,128,192,256", help="trajectories at once, comma-separated")
    add("--generate-sizes", default="", help="batches of `generate`, comma-separated; needs a GPU")
    add("--workloads", default=",".join(WORKLOADS))
    add("--pressure", type=float, default=2.0, help="how many times the pool the mean --largest trajectories take")
    add("--largest", type=int, default=256, help="trajectories that the pool is too small for by --pressure")
    add("--prefix", type=int, default=1700, help="tokens of the shared prompt")
    add("--generate", type=int, default=64, help="tokens generated a call")
    add("--seconds", type=float, default=25.0, help="of each setting at most")
    add("--seed", type=int, default=0)
    add("--device", default=default_device())
    add("--out", help="JSON file to write")
    args = parser.parse_args(argv)
    cuda = args.device.startswith("cuda")
    vocabulary = min(150_000, model_config(args.shape).vocab_size)

    def jobs_of(workload: str, name: str, n: int = args.trajectories) -> list[Job]:
        salt, waits = f"{workload} {name}", workload == "waits"
        return make_jobs(n, args.seed, prefix=args.prefix, vocabulary=vocabulary, waits=waits, salt=salt)

    planned = jobs_of("calls", "size")
    dtype = torch.bfloat16 if cuda else torch.float32
    page_tokens = own_page_tokens(args.device, dtype)
    pages = pool_pages(planned, args.prefix, round(args.largest / args.pressure), page_tokens)
    longest = max(len(job.trace.contexts()[-1]) for job in planned) + args.generate
    max_model_len = -(-longest // page_tokens) * page_tokens
    model = random_model(args.shape, device=args.device, dtype=dtype)
    weights_bytes = sum(p.nbytes for p in model.parameters())
    engine = over_model(model, pages=pages, page_tokens=page_tokens, max_model_len=max_model_len)
    pool_bytes = pages * page_tokens * engine.capacity().kv_bytes_token
    del model
    settle_garbage()  # as an engine's process does
    workload = {key: value for key, value in vars(args).items() if key not in ("out", "device")}
    workload |= {"pages": pages, "pool_bytes": pool_bytes, "max_batch": MAX_BATCH[torch.device(args.device).type]}
    rows: list[dict[str, Any]] = []
    document: dict[str, Any] = {}

    def shown(row: dict[str, Any]) -> dict[str, Any]:
        return {key: value for key, value in row.items() if key not in ("repeat", "by_second")}

    def record(kind: str, row: dict[str, Any]) -> None:
        nonlocal document
        rows.append({"workload": kind, "repeat": 0} | row)
        print(shown(rows[-1]), flush=True)
        told = {"device": device_info(args.device), "workload": workload}
        document = write_json(args.out, "batch_sizes", **told, results=rows, summary=summarize(rows))

    # As many rows at once as any setting has, so that none of them is the first to need a kernel or memory.
    run(engine, jobs_of("calls", "warm", min(256, args.trajectories)), "256", args)
    for kind in args.workloads.split(","):
        for name in ("ledger", *(("keep",) if kind == "waits" else ()), *args.sizes.split(",")):
            record(kind, run(engine, jobs_of(kind, name), name, args))
    engine.close()
    del engine
    gc.unfreeze()
    empty_cache()
    for size in filter(None, args.generate_sizes.split(",")):
        fraction = None
        if cuda:
            total_bytes = torch.cuda.get_device_properties(args.device).total_memory
            fraction = (weights_bytes + pool_bytes + (2 << 30)) / total_bytes
        record("generate", run_generate(int(size), jobs_of("calls", "generate"), fraction, args))
    print_table(f"{args.shape}, {pages} pages", [shown(row) for row in rows])
    print_table("summary", [{"workload": name} | found for name, found in document["summary"].items()])
    return document


if __name__ == "__main__":
    main()

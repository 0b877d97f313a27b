"""Whose pages go while trajectories wait for tools: least recently used first, or by when they are expected back.

One replica, simulated in time: the engine's own scheduler and page allocator, and a cost model in place of the model
(8 B at the speeds of two of `bench.placement`'s GPUs). So many trajectories at a time alternate between calls and tools
of three speeds; all of them together want `pressure` times the pool at their mean sizes. What was evicted is computed
again when its trajectory is back. Computing a page again costs the same whoever had it, so cost orders nothing: what is
left to choose by is the time of return, as in Belady's rule (1966), which is `true` below.

    lru        the allocator as it is
    predicted  latest expected return first: since the call ended, the mean of past waits for the same tool
    true       latest true return first: what a perfect prediction would gain

The ledger places by predicted pages, so that a replica stands under a pressure of 1 at most unless forecasts are wrong.

    python -m bench.tool_waits --replay react_replay.jsonl --out bench/results/tool_waits.json
"""

from __future__ import annotations

import argparse
import heapq
import json
import statistics
from collections import defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from actors.engine.pages import PageAllocator, _Node  # pyright: ignore[reportPrivateUsage]
from actors.engine.protocol import Request
from actors.engine.scheduler import Row, Scheduler
from bench.common import device_info, print_table, write_json
from bench.placement import GPUS, KV_BYTES, PAGE, SUITES, WEIGHT_BYTES, Trace, make_trace

POLICIES = ("lru", "predicted", "true")
HOST_S = 0.0047  # a step
# name: shares of a calculator (5 ms), a search (0.1 to 2 s) and a slow tool (10 to 60 s)
MIXES = {"search": (0.0, 1.0, 0.0), "some slow": (0.45, 0.45, 0.1), "a third each": (1 / 3, 1 / 3, 1 / 3)}
SHARED = SUITES["a"][1]


class ByReturn(PageAllocator):
    """Evicts pages of the sequence that is due last; `due_s` is to be set before a sequence pauses."""

    due_s = 0.0

    def _unpin(self, node: _Node) -> None:
        node.pins -= 1
        if not node.pins:
            self._pinned -= 1
            node.stamp = -round(1e6 * self.due_s)
            self._offer(node)


class Simulation:
    """One policy under one pressure. Times in seconds."""

    def __init__(self, policy: str, trace: Trace, gpu: str, mix: str, pressure: float, at_once: int, seed: int):
        self.policy, self.trace, self.at_once = policy, trace, at_once
        _, self.bandwidth, self.prefill_tok_s, _ = GPUS[gpu]
        rng = np.random.default_rng(seed)
        total = len(trace.generated)
        self.tool = rng.choice(3, total, p=MIXES[mix])
        waits = (np.full(total, 0.005), rng.uniform(0.1, 2.0, total), rng.uniform(10, 60, total))
        self.wait_s = np.choose(self.tool, waits)
        mean_own = float(trace.ends.mean()) - SHARED
        pages = round((SHARED + at_once * mean_own / pressure) / PAGE)
        self.pages = (PageAllocator if policy == "lru" else ByReturn)(pages + 1, PAGE)
        longest = int(trace.peak.max()) + 1
        self.scheduler = Scheduler(self.pages, max_batch=at_once, max_prefill_tokens=8_192, max_model_len=longest)
        self.past: dict[int, list[float]] = defaultdict(lambda: [0.0])
        self.now_s = 0.0
        self.step = np.zeros(len(trace.suite), np.int64)

    def run(self) -> dict[str, Any]:
        """To the end of the job; its figures."""
        trace, scheduler = self.trace, self.scheduler
        fresh = iter(range(len(trace.suite)))
        back: list[tuple[float, int]] = []
        for row, _ in zip(fresh, range(self.at_once), strict=False):
            self._call(row)
        useful = again = generated = 0
        t95_s, total = 0.0, 0.95 * float(trace.generated.sum())
        while scheduler.running or scheduler.waiting or back:
            while back and (back[0][0] <= self.now_s or not (scheduler.running or scheduler.waiting)):
                at_s, row = heapq.heappop(back)
                self.now_s = max(self.now_s, at_s)
                self._call(row)
            before = scheduler.preemptions
            self._due(0.0)  # those that are preempted want to go on at once
            work = scheduler.plan()
            scheduler.copies.clear()
            if not work:
                raise RuntimeError(f"nothing to do with {len(scheduler.waiting)} waiting, {before} preempted")
            tokens = sum(part.count for part in work)
            kv = sum(part.row.done for part in work)
            prefill = tokens > len(work)
            self.now_s += HOST_S + (
                tokens / self.prefill_tok_s if prefill else (WEIGHT_BYTES + KV_BYTES * kv) / self.bandwidth
            )
            drawn = [part.row for part in work if part.sample]
            scheduler.commit(work)
            for row in drawn:
                row.tokens.append(-1 - int(row.sequence_id))
                if row.generated < row.request.max_tokens:
                    continue
                i = int(row.sequence_id)
                at = trace.first[i] + self.step[i]
                new = len(row.request.token_ids) - (trace.ends[at - 1] if self.step[i] else SHARED)
                useful += int(new)
                again += row.prefilled - int(new)
                generated += row.generated
                t95_s = t95_s if generated > total else self.now_s
                self.step[i] += 1
                if self.step[i] >= trace.steps[i]:
                    scheduler.remove(row)
                    scheduler.end(row.sequence_id)
                    if (following := next(fresh, None)) is not None:
                        self._call(following)
                    continue
                tool, wait_s = int(self.tool[at]), float(self.wait_s[at])
                self._due(wait_s if self.policy == "true" else statistics.fmean(self.past[tool][-512:]))
                scheduler.remove(row)
                self.past[tool].append(wait_s)  # a little early: what it learns is the same in the long run
                heapq.heappush(back, (self.now_s + wait_s, i))
        return {
            "engine": self.policy,
            "t95_s": t95_s,
            "generated_tok_s": total / t95_s,
            "prefilled_again": again / useful,
            "evictions": self.pages.stats.evictions,
            "preemptions": scheduler.preemptions,
        }

    def _due(self, in_s: float) -> None:
        if isinstance(self.pages, ByReturn):
            self.pages.due_s = self.now_s + in_s

    def _call(self, i: int) -> None:
        trace, at = self.trace, self.trace.first[i] + self.step[i]
        size = int(trace.ends[at] - trace.generated[at])
        # Of a trajectory all tokens behind the shared prompt are the same, which makes drawn ones what was recorded.
        ids = [*range(SHARED), *([-1 - i] * (size - SHARED))]
        request = Request(ids, str(i), int(trace.generated[at]))
        self.scheduler.add(Row(request, Future(), self.now_s, ids.copy()))


def traces(recorded: Sequence[dict[str, Any]], number: int, seed: int) -> Trace:
    """The first suite of `bench.placement`."""
    trace = make_trace(recorded, 3 * number, seed)
    mine = np.flatnonzero(trace.suite == 0)[:number]
    at = np.concatenate([np.arange(trace.first[i], trace.first[i] + trace.steps[i]) for i in mine])
    steps = trace.steps[mine]
    first = np.concatenate([[0], np.cumsum(steps)[:-1]])
    flat = (getattr(trace, name)[at] for name in ("generated", "observed", "wait_s", "ends"))
    return Trace(trace.suite[mine], trace.prompt[mine], first, steps, *flat)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Simulate every policy in every case, print a table, write the document."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--replay", type=Path, required=True, help="JSON lines with `steps`")
    parser.add_argument("--trajectories", type=int, default=160)
    parser.add_argument("--at-once", type=int, default=32)
    parser.add_argument("--gpus", default="80GB,24GB", help="whose speeds")
    parser.add_argument("--pressures", type=float, nargs="+", default=[1.0, 1.25, 1.5, 2.0])
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--out")
    args = parser.parse_args(argv)
    recorded = [json.loads(line) for line in args.replay.read_text(encoding="utf-8").splitlines()]
    results: list[dict[str, Any]] = []
    for gpu, mix, pressure, repeat in product(args.gpus.split(","), MIXES, args.pressures, range(args.repeats)):
        trace = traces(recorded, args.trajectories, repeat)
        for policy in POLICIES:
            found = Simulation(policy, trace, gpu, mix, pressure, args.at_once, repeat).run()
            results.append({"gpu": gpu, "tools": mix, "pressure": pressure, "repeat": repeat, **found})
            print(json.dumps(results[-1]), flush=True)
    summary = dict(summarise(results))
    print_table("gains over lru, means", [{"case": name} | row for name, row in summary.items()])
    workload = {name: getattr(args, name) for name in ("trajectories", "at_once")} | {"tools": MIXES}
    return write_json(
        args.out, "tool_waits", device=device_info("cpu"), workload=workload, results=results, summary=summary
    )


def summarise(results: Sequence[dict[str, Any]]) -> Iterator[tuple[str, dict[str, float]]]:
    """By case: tokens prefilled again under each policy, over those prefilled once, and throughput over lru's."""
    for gpu, mix, pressure in dict.fromkeys((r["gpu"], r["tools"], r["pressure"]) for r in results):
        mine = [r for r in results if (r["gpu"], r["tools"], r["pressure"]) == (gpu, mix, pressure)]
        by = {policy: [r for r in mine if r["engine"] == policy] for policy in POLICIES}
        again = {f"{name}_again": statistics.fmean(r["prefilled_again"] for r in rows) for name, rows in by.items()}
        speed = {name: statistics.fmean(r["generated_tok_s"] for r in rows) for name, rows in by.items()}
        gains = {f"{name}_gain": speed[name] / speed["lru"] - 1 for name in POLICIES[1:]}
        yield f"{gpu}, {mix}, pressure {pressure:g}", again | gains


if __name__ == "__main__":
    main()

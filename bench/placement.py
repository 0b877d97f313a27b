"""Placement of trajectories by predicted KV pages, simulated: the real core (actors/placement.py) beside others' ways.

Replicas of four sizes serve a batch job of three suites. A trajectory alternates between calls and waits for its tool;
its pages stay with its replica meanwhile. The engine is modelled after ours: the pages of running calls are pinned,
those of waiting rows are cached and given up by least recent use when a call needs room, and computed again when their
row is back; a call that finds no room waits. Prefill is a queue a replica, decode is bound by memory bandwidth. So
every policy runs without errors, and what a wrong placement costs is prefill and queueing. An overshoot is a replica
whose residents together need more than its pool; it is counted against admissions.

    ledger         actors.placement.Pool under forecasts learnt from 2,000 other trajectories of each suite
    no_parking     the same, but pages are kept through every wait; only where `--policies` names it
    oracle         the same rule with the true size at every step ahead, but for the sum in the order of steps
                   (`staggered`), which would cost it 6 % of its goodput
    lightllm       its formula (Gong et al. 2025, §3): peak of current + remaining, remaining drawn from the history
    worst_case     every row reserves its suite's limit
    least_loaded   fewest rows, at most `--rows-at-once` a replica
    round_robin    in turn, the same bound

Steps and tokens come from recorded ReAct traces (`--replay`, JSON lines with `steps` of thought, action, observation;
a token is 4 characters), made larger: see `make_trace`. Nothing in it is fitted to a policy's result.

    python -m bench.placement --replay react_replay.jsonl --out bench/results/placement.json
"""

from __future__ import annotations

import argparse
import json
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import repeat
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from actors.messages import Forecast
from actors.placement import HORIZONS, LEVELS, Pool, survival
from bench.common import device_info, print_table, write_json

PAGE = 256
KV_BYTES = 147_456  # of one token: 36 layers, 8 KV heads of 128, bf16
WEIGHT_BYTES = 16.4e9
# name: KV pages under a budget of 0.9, memory bandwidth, prefill tokens a second, share of the replicas
GPUS = {
    "24GB": (120, 0.6e12, 3_000, 0.3),
    "40GB": (480, 1.55e12, 10_000, 0.2),
    "80GB": (1_450, 3.35e12, 26_000, 0.3),
    "141GB": (2_900, 4.8e12, 26_000, 0.2),
}
# name: share of rows, shared prompt tokens, tokens of a step against the first's, steps against the first's
SUITES = {"a": (0.6, 1_700, 1.0, 1.0), "b": (0.3, 4_096, 2.0, 1.0), "c": (0.1, 800, 1.0, 2.0)}
MAX_STEPS = 50
LIMIT_TOKENS = 24_000  # of a trajectory beside its shared prompt; the smallest replica holds one
POLICIES = ("ledger", "oracle", "lightllm", "worst_case", "least_loaded", "round_robin")
DT_S = 0.25

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Trace:
    """Trajectories; step s of trajectory i stands at first[i] + s in the flat arrays.

    Attributes:
        suite: index of its suite. prompt: tokens. steps: calls.
        generated, observed: tokens of each step; wait_s: of the tool after it.
        ends: tokens at the end of each call.
    """

    suite: Ints
    prompt: Ints
    first: Ints
    steps: Ints
    generated: Ints
    observed: Ints
    wait_s: Floats
    ends: Ints

    @property
    def peak(self) -> Ints:
        """Tokens at the end of the last call."""
        return self.ends[self.first + self.steps - 1]


def make_trace(recorded: Sequence[dict[str, Any]], rows: int, seed: int) -> Trace:
    """Recorded steps drawn with replacement, larger in these ways: generation × 8 and observation × 4 (a model that
    reasons, whole paragraphs); one trajectory in ten has 1 + Pareto(1.5) times its steps, at most 50; one observation
    in twenty has 1 + Pareto(1.5) times its tokens, at most 8,000; tools take 2 s in the median (lognormal, sigma 1),
    and one in fifty 20 s × (1 + Pareto(1.5)), at most 300 s. A trajectory ends at the limit of its tokens."""
    rng = np.random.default_rng(seed)
    pairs = np.array(
        [(len(s["thought"] + s["action"]) / 4 + 4, len(s["observation"]) / 4 + 4) for r in recorded for s in r["steps"]]
    )
    counts = np.array([len(r["steps"]) for r in recorded])
    shares, shared, larger, longer = (np.array(column) for column in zip(*SUITES.values(), strict=True))
    suite = rng.choice(len(SUITES), rows, p=shares)
    stretch = np.where(rng.random(rows) < 0.1, 1 + rng.pareto(1.5, rows), 1.0) * longer[suite]
    steps = np.clip(np.rint(rng.choice(counts, rows) * stretch), 1, MAX_STEPS).astype(np.int64)
    prompt = (shared[suite] + 20 + rng.gamma(2.0, 30.0, rows)).astype(np.int64)
    first = np.concatenate([[0], np.cumsum(steps)[:-1]])
    total = int(steps.sum())
    of = np.repeat(np.arange(rows), steps)
    drawn = pairs[rng.integers(0, len(pairs), total)] * larger[suite[of], None]
    generated = (8 * drawn[:, 0] * rng.lognormal(0, 0.3, total)).astype(np.int64) + 1
    jump = np.where(rng.random(total) < 0.05, 1 + rng.pareto(1.5, total), 1.0)
    observed = np.minimum(4 * drawn[:, 1] * jump, 8_000).astype(np.int64)
    wait_s = 2.0 * rng.lognormal(0, 1.0, total)
    slow = rng.random(total) < 0.02
    wait_s[slow] = np.minimum(20 * (1 + rng.pareto(1.5, slow.sum())), 300)
    grown = np.cumsum(generated + observed)
    before = np.concatenate([[0], grown])[first]
    ends = prompt[of] + grown - before[of] - observed
    steps = np.maximum(1, np.add.reduceat(ends <= (prompt + LIMIT_TOKENS)[of], first))
    return Trace(suite, prompt, first, steps, generated, observed, wait_s, ends)


def forecasts_of(past: Trace) -> list[tuple[Floats, float]]:
    """By suite: quantiles of what a trajectory grows by beyond its prompt, and its median steps."""
    found = []
    for suite in range(len(SUITES)):
        mine = past.suite == suite
        grown = (past.peak - past.prompt)[mine][:2_000]
        quantiles = np.quantile(grown, LEVELS)
        quantiles[0], quantiles[-1] = 0, LIMIT_TOKENS
        found.append((quantiles, float(np.median(past.steps[mine][:2_000]))))
    return found


class Oracle(Pool):
    """The ledger's rule, told the truth: the size of every row at every step ahead."""

    def know(self, simulation: Simulation) -> None:
        """Look rows up in this simulation."""
        self.simulation = simulation

    def measure(self, rows: Ints) -> None:
        """The pages that rows will have, without spread."""
        trace, trajectories = self.simulation.trace, self.simulation.of_row[rows]
        step_BH = self.simulation.step[trajectories][:, None] + HORIZONS.astype(np.int64)
        there_BH = step_BH < trace.steps[trajectories][:, None]
        last = trace.steps[trajectories][:, None] - 1
        tokens_BH = trace.ends[trace.first[trajectories][:, None] + np.minimum(step_BH, last)]
        shared = self.prefix_pages[self.prefix[rows]][:, None]
        self.outlook[rows, 0] = np.maximum(-(-tokens_BH // self.page_tokens) - shared, 1)
        self.outlook[rows, 1] = there_BH
        self._sum_up(rows)

    def _staggered(self, rows: Ints) -> float:
        return 0.0


class Simulation:
    """One policy over one trace. Times in seconds; pages are a row's own, shared ones are counted a replica."""

    def __init__(self, policy: str, trace: Trace, past: Trace, replicas: int, rows_at_once: int, seed: int):
        rng = np.random.default_rng(seed)
        self.policy, self.trace, self.rows_at_once = policy, trace, rows_at_once
        kinds = rng.choice(len(GPUS), replicas, p=[gpu[3] for gpu in GPUS.values()])
        pages, bandwidth, prefill, _ = (np.array(column)[kinds] for column in zip(*GPUS.values(), strict=True))
        self.pool, self.bandwidth, self.prefill_rate = pages.astype(np.float64), bandwidth, prefill
        self.replicas, rows = replicas, len(trace.suite)
        self.shared_pages = np.array([suite[1] // PAGE for suite in SUITES.values()])
        self.order = rng.permutation(rows)
        # rows
        self.step = np.zeros(rows, np.int64)
        self.tokens = trace.prompt.copy()
        self.home = np.full(rows, -1, np.int64)
        self.own = np.zeros(rows)  # pages it has now
        self.next_s = np.full(rows, np.inf)
        self.running = np.zeros(rows, np.bool_)
        self.stamp = np.zeros(rows, np.int64)
        self.active = np.zeros(0, np.int64)
        # replicas
        self.used = np.zeros(replicas)
        self.refs = np.zeros((len(SUITES), replicas), np.int64)
        self.residents = np.zeros(replicas, np.int64)
        self.prefill_free_s = np.zeros(replicas)
        self.cached: list[deque[tuple[int, int]]] = [deque() for _ in range(replicas)]
        self.blocked: list[deque[int]] = [deque() for _ in range(replicas)]
        # counts
        self.overshoots = self.evictions = self.blocks = self.admitted = 0
        self.prefilled = self.again = self.useful = 0.0
        self.done_rows, self.busy_pages_s = 0, 0.0
        self.curve: list[tuple[float, float]] = []
        self.decisions_cpu_s = 0.0
        self.now_s = 0.0
        self.at = 0  # in order
        self.place = Core(self, past) if policy in ("ledger", "no_parking", "oracle") else Simple(self, past)

    def run(self) -> dict[str, Any]:
        """To the end of the job; its figures."""
        rows = len(self.trace.suite)
        started_s = time.process_time()
        while self.done_rows < rows:
            self.now_s += DT_S
            self._events()
            before_s = time.process_time()
            taken, homes = self.place.admit()
            self.decisions_cpu_s += time.process_time() - before_s
            if len(taken):
                self._start_rows(taken, homes)
            self.busy_pages_s += float(np.minimum(self.used, self.pool).sum()) * DT_S
            self.curve.append((self.now_s, self.useful))
        total = float(self.useful)
        times, useful = np.array(self.curve).T
        t95_s = float(times[np.searchsorted(useful, 0.95 * total)])
        return {
            "engine": self.policy,
            "generated_tok_s": 0.95 * total / t95_s,
            "whole_job_tok_s": total / self.now_s,
            "t95_s": t95_s,
            "makespan_s": self.now_s,
            "overshoot": self.overshoots / self.admitted,
            "evictions_per_row": self.evictions / rows,
            "blocked_calls_per_row": self.blocks / rows,
            "again_share_of_prefill": self.again / self.prefilled,
            "pool_used": self.busy_pages_s / (float(self.pool.sum()) * self.now_s),
            "placing_cpu_us_per_row": 1e6 * self.decisions_cpu_s / rows,
            "cpu_s": time.process_time() - started_s,
        }

    def _start_rows(self, rows: Ints, homes: Ints) -> None:
        """Rows get a home (or a new one) and start their next call."""
        fresh = self.step[rows] == 0
        self.admitted += len(rows)
        self.home[rows] = homes
        suites = self.trace.suite[rows]
        np.add.at(self.residents, homes, 1)
        for suite in range(len(SUITES)):
            mine = homes[suites == suite]
            new = np.unique(mine[self.refs[suite, mine] == 0])
            self.used[new] += self.shared_pages[suite]
            charged = self.shared_pages[suite] * PAGE
            self.prefill_free_s[new] = (
                np.maximum(self.prefill_free_s[new], self.now_s) + charged / self.prefill_rate[new]
            )
            np.add.at(self.refs[suite], mine, 1)
        self.next_s[rows] = self.now_s
        self.active = np.concatenate([self.active, rows[fresh]])
        self._calls(rows, np.full(len(rows), self.now_s))

    def leave(self, rows: Ints) -> None:
        """Rows leave their homes: they are over, or are given up while they wait."""
        homes, suites = self.home[rows], self.trace.suite[rows]
        np.subtract.at(self.residents, homes, 1)
        np.subtract.at(self.used, homes, self.own[rows])
        for suite in range(len(SUITES)):
            mine = homes[suites == suite]
            np.subtract.at(self.refs[suite], mine, 1)
            gone = np.unique(mine[self.refs[suite, mine] == 0])
            self.used[gone] -= self.shared_pages[suite]
        self.own[rows] = 0
        self.stamp[rows] += 1
        self.home[rows] = -1

    def _events(self) -> None:
        while True:
            due = self.active[self.next_s[self.active] <= self.now_s]
            if not len(due):
                break
            ended, back = due[self.running[due]], due[~self.running[due]]
            freed = set(self.home[ended].tolist())
            self._answers(ended)
            if len(back):
                ready = self.place.back(back)
                self._calls(ready, self.next_s[ready])
            waiting: list[int] = []
            for r in freed:
                waiting += self.blocked[r]
                self.blocked[r].clear()
            self._calls(np.array(waiting, np.int64), np.full(len(waiting), self.now_s), again=True)
        self.active = self.active[self.home[self.active] != -2]

    def _answers(self, rows: Ints) -> None:
        """Calls end: the row is over, or waits for its tool."""
        if not len(rows):
            return
        trace = self.trace
        at = trace.first[rows] + self.step[rows]
        self.running[rows] = False
        self.tokens[rows] = trace.ends[at]
        self.useful += float(trace.generated[at].sum())
        self.step[rows] += 1
        over = self.step[rows] >= trace.steps[rows]
        done, waiting = rows[over], rows[~over]
        homes = self.home[done]
        self.leave(done)
        self.home[done] = -2
        self.next_s[done] = np.inf
        self.done_rows += len(done)
        self.next_s[waiting] += trace.wait_s[at[~over]]
        self.stamp[waiting] += 1
        for row, r, stamp in zip(
            waiting.tolist(), self.home[waiting].tolist(), self.stamp[waiting].tolist(), strict=True
        ):
            self.cached[r].append((row, stamp))
        self.place.answered(done, homes, waiting)

    def _calls(self, rows: Ints, at_s: Floats, *, again: bool = False) -> None:
        """Calls start where there is room for what they grow to; others wait in their replica."""
        if not len(rows):
            return
        trace = self.trace
        at, homes = trace.first[rows] + self.step[rows], self.home[rows]
        want = np.maximum(-(-trace.ends[at] // PAGE) - self.shared_pages[trace.suite[rows]], 1).astype(np.float64)
        held, total = self.own[rows], self.used.copy()
        np.add.at(total, homes, want - held)
        starts = total[homes] <= self.pool[homes]
        np.add.at(self.used, homes[starts], want[starts] - held[starts])
        self._occupy(rows[starts], want[starts])
        slow = np.flatnonzero(~starts).tolist()
        if slow and not again:
            self.overshoots += len(set(homes[slow].tolist()))
        for i, row, r, pages in zip(slow, *(each[slow].tolist() for each in (rows, homes, want)), strict=True):
            # One by one, oldest first; nothing overtakes within a replica.
            if self.blocked[r] or not self._make_room(r, row, pages):
                self.blocked[r].append(row)
                continue
            starts[i], held[i] = True, self.own[row]
            self.used[r] += pages - self.own[row]
            self._occupy(row, pages)
        self.next_s[rows[~starts]] = np.inf
        if not again:
            self.blocks += len(rows) - int(starts.sum())
        rows, homes, at, held, at_s = rows[starts], homes[starts], at[starts], held[starts], at_s[starts]
        # What it held is reused; without pages everything but the shared prompt is computed.
        context = trace.ends[at] - trace.generated[at]
        shared = self.shared_pages[trace.suite[rows]] * PAGE
        prefill = np.where(held == 0, context - shared, context - self.tokens[rows])
        self.prefilled += float(prefill.sum())
        self.again += float((self.tokens[rows] - shared)[(held == 0) & (self.step[rows] > 0)].sum())
        # Prefill is a queue a replica: those of this moment one after the other.
        order = np.argsort(homes, kind="stable")
        seconds = (prefill / self.prefill_rate[homes])[order]
        sums = np.cumsum(seconds)
        firsts = np.flatnonzero(np.diff(homes[order], prepend=-1))
        base = np.repeat(sums[firsts] - seconds[firsts], np.diff(np.append(firsts, len(order))))
        end_s = np.empty(len(order))
        end_s[order] = np.maximum(self.prefill_free_s[homes[order]], at_s[order]) + sums - base
        np.maximum.at(self.prefill_free_s, homes, end_s)
        token_s = (WEIGHT_BYTES + self.used[homes] * PAGE * KV_BYTES) / self.bandwidth[homes]
        self.next_s[rows] = end_s + trace.generated[at] * token_s

    def _occupy(self, rows: Ints | int, want: Floats | float) -> None:
        """The calls of these rows run, with room for what they grow to."""
        self.own[rows] = want
        self.stamp[rows] += 1
        self.running[rows] = True

    def _make_room(self, r: int, row: int, want: float) -> bool:
        """Evict cached pages, least recently used first, until the row's call fits; False where all others run."""
        cached, own = self.cached[r], self.own[row]
        while self.used[r] + want - own > self.pool[r]:
            if not cached:
                return False
            other, stamp = cached.popleft()
            if self.stamp[other] == stamp and other != row:
                self.used[r] -= self.own[other]
                self.own[other] = 0
                self.stamp[other] += 1
                self.evictions += 1
        return True


class Core:
    """The real core places."""

    QUEUED = 2_000

    def __init__(self, simulation: Simulation, past: Trace):
        self.simulation = simulation
        self.forecasts = forecasts_of(past)
        kind = Oracle if simulation.policy == "oracle" else Pool
        self.pool = kind("single", PAGE, lease_s=1e9)
        refill_s = simulation.pool * PAGE / simulation.prefill_rate
        if simulation.policy == "no_parking":
            refill_s[:] = np.inf
        for r in range(simulation.replicas):
            self.pool.replica_up(str(r), int(simulation.pool[r]), 1_000, float(refill_s[r]))
        self.row_of = np.full(len(simulation.trace.suite), -1, np.int64)
        simulation.of_row = np.full(1 << 21, -1, np.int64)
        if isinstance(self.pool, Oracle):
            self.pool.know(simulation)
        self.names = list(SUITES)
        self.turns = [
            deque(simulation.order[simulation.trace.suite[simulation.order] == s]) for s in range(len(SUITES))
        ]
        self.waiting = [0] * len(SUITES)

    def _refill(self) -> None:
        s = self.simulation
        for suite, turn in enumerate(self.turns):
            count = min(len(turn), self.QUEUED - self.waiting[suite])
            if count < self.QUEUED // 2 and count < len(turn):
                continue
            if not count:
                continue
            trajectories = np.array([turn.popleft() for _ in range(count)])
            grown, steps = self.forecasts[suite]
            shared, median, p95 = int(s.shared_pages[suite]) * PAGE, LEVELS.index(0.5), LEVELS.index(0.95)
            peaks = (s.trace.prompt[trajectories][:, None] + grown).astype(np.int64).tolist()
            forecasts = [Forecast(p[0], shared, p[median], p[p95], tuple(p[1:]), round(steps)) for p in peaks]
            # Indices first: an oracle looks its rows up while they are added.
            rows = self.pool.take(self.names[suite], count, s.now_s)
            s.of_row[rows], self.row_of[trajectories] = trajectories, rows
            self.pool.add(rows, self.names[suite], forecasts)
            self.waiting[suite] += count

    def admit(self) -> tuple[Ints, Ints]:
        """Rows that get a home now, and their homes."""
        s = self.simulation
        self._refill()
        rows = np.array(self.pool.place(s.now_s), np.int64)
        trajectories = s.of_row[rows]
        new = trajectories[s.step[trajectories] == 0]
        for suite, count in enumerate(np.bincount(s.trace.suite[new], minlength=len(SUITES)).tolist()):
            self.waiting[suite] -= count
        # Those whose pages the core gave up leave their replicas.
        parked = np.flatnonzero(self.pool.parked)
        gone = s.of_row[parked]
        gone = gone[s.home[gone] >= 0]
        if len(gone):
            s.leave(gone)
        return trajectories, self.pool.home[rows]

    def answered(self, done: Ints, homes: Ints, waiting: Ints) -> None:
        """Rows are done, and leave their homes; others wait for their tools."""
        s = self.simulation
        started_s = time.process_time()
        self.pool.release(self.row_of[done].tolist())
        rows = self.row_of[waiting]
        self.pool.answered(rows, s.tokens[waiting].astype(np.float64), s.now_s)
        s.decisions_cpu_s += time.process_time() - started_s

    def back(self, trajectories: Ints) -> Ints:
        """Those that have a home go on; parked ones queue for one."""
        s = self.simulation
        rows = self.row_of[trajectories]
        at = s.trace.first[trajectories] + s.step[trajectories]
        context = s.trace.ends[at] - s.trace.generated[at]
        self.pool.resume(rows, s.now_s)
        self.pool.advance(rows, context.astype(np.float64))
        homeless = self.pool.home[rows] < 0
        s.next_s[trajectories[homeless]] = np.inf
        return trajectories[~homeless]


class Simple:
    """What others do: a home by a rule of thumb or a formula, first come first served."""

    def __init__(self, simulation: Simulation, past: Trace):
        self.simulation, self.turn = simulation, 0
        s = simulation
        self.forecasts = forecasts_of(past)
        self.reserve = -(-LIMIT_TOKENS // PAGE) + 1.0
        self.reserved = np.zeros(s.replicas)
        self.peak = np.zeros(s.replicas)
        self.rows = [np.zeros(0, np.int64) for _ in range(s.replicas)]
        self.over = np.zeros(len(s.order), np.bool_)
        self.dirty = set(range(s.replicas))
        self.rng = np.random.default_rng(1)
        # of each row: pages it has, tokens it grew by, and the share of the history that grew by less
        self.now = -(-s.trace.prompt // PAGE) - s.shared_pages[s.trace.suite]
        self.grown, self.past = np.zeros(len(s.order)), np.zeros(len(s.order))
        self.quantiles = np.stack([growth for growth, _ in self.forecasts])
        self.levels = np.array(LEVELS)
        # Growth as a straight line from each level of each suite to the next; no draw is beyond the last level, so what
        # is appended is only a divisor other than 0.
        slopes = np.diff(self.quantiles, append=0.0) / np.diff(self.levels, append=2.0)
        self.slopes, self.heights = slopes.ravel(), (self.quantiles - slopes * self.levels).ravel()
        self.line = s.trace.suite * len(LEVELS) - 1

    def admit(self) -> tuple[Ints, Ints]:
        """Rows that get a home now, and their homes."""
        s = self.simulation
        taken: list[int] = []
        homes: list[int] = []
        pick = getattr(self, s.policy)
        counts = s.residents.copy()
        if s.policy == "lightllm":
            for r in self.dirty:
                self.peak[r] = self._peak(self.rows[r])
            self.dirty.clear()
        while s.at < len(s.order):
            row = int(s.order[s.at])
            r = pick(row, counts)
            if r is None:
                break
            s.at += 1
            counts[r] += 1
            self.reserved[r] += self.reserve
            taken.append(row)
            homes.append(r)
        return np.array(taken, np.int64), np.array(homes, np.int64)

    def round_robin(self, row: int, counts: Ints) -> int | None:
        """The next replica with a free place."""
        for _ in range(self.simulation.replicas):
            self.turn = (self.turn + 1) % self.simulation.replicas
            if counts[self.turn] < self.simulation.rows_at_once:
                return self.turn
        return None

    def least_loaded(self, row: int, counts: Ints) -> int | None:
        """The replica with the fewest rows."""
        r = int(counts.argmin())
        return r if counts[r] < self.simulation.rows_at_once else None

    def worst_case(self, row: int, counts: Ints) -> int | None:
        """The replica with the most pages that are not reserved."""
        s = self.simulation
        room = s.pool - s.shared_pages.sum() - self.reserved  # a replica may come to hold every suite's prompt
        r = int(room.argmax())
        return r if room[r] >= self.reserve else None

    def lightllm(self, row: int, counts: Ints) -> int | None:
        """The replica whose peak with the row stays furthest below its pool."""
        s = self.simulation
        room = s.pool - self.peak
        for _ in range(2):
            r = int(room.argmax())
            if room[r] <= 0:
                return None
            rows = np.append(self.rows[r], row)
            peak = self._peak(rows)
            if peak <= s.pool[r]:
                self.rows[r], self.peak[r] = rows, peak
                return r
            room[r] = -1
        return None

    def _peak(self, rows: Ints) -> float:
        """Pages at the worst moment ahead: when a row ends, those that end later have grown as much as it has."""
        if not len(rows):
            return 0.0
        s = self.simulation
        past = self.past.take(rows)
        draw = past + (1 - past) * self.rng.random(len(rows))
        line = self.line.take(rows) + np.searchsorted(self.levels, draw, "right")
        left = self.slopes.take(line) * draw + self.heights.take(line) - self.grown.take(rows)
        order = np.argsort(-left)
        ahead = np.cumsum(self.now.take(rows.take(order)))
        ahead = ahead + np.arange(1, len(rows) + 1) * np.ceil(np.maximum(left.take(order), 0) / PAGE)
        return float(ahead.max()) + float(
            s.shared_pages[np.bincount(s.trace.suite.take(rows), minlength=len(SUITES)) > 0].sum()
        )

    def answered(self, done: Ints, homes: Ints, waiting: Ints) -> None:
        """Rows are done, and leave their homes; others wait for their tools."""
        np.subtract.at(self.reserved, homes, self.reserve)
        s = self.simulation
        if s.policy != "lightllm":
            return
        self.over[done] = True
        for r in set(homes.tolist()):
            self.rows[r] = self.rows[r][~self.over[self.rows[r]]]
        self.dirty.update(homes.tolist())
        suites = s.trace.suite[waiting]
        self.now[waiting] = -(-s.tokens[waiting] // PAGE) - s.shared_pages[suites]
        self.grown[waiting] = s.tokens[waiting] - s.trace.prompt[waiting]
        self.past[waiting] = 1.0 - survival(self.grown[waiting, None], self.quantiles[suites])[:, 0]

    def back(self, trajectories: Ints) -> Ints:
        """All go on: nobody is parked."""
        return trajectories


def simulate(policy: str, trace: Trace, past: Trace, args: argparse.Namespace) -> dict[str, Any]:
    result = Simulation(policy, trace, past, args.replicas, args.rows_at_once, args.seed).run()
    print(json.dumps(result), flush=True)
    return result


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--replay", type=Path, required=True, help="JSON lines with `steps`")
    parser.add_argument("--replicas", type=int, default=1_000)
    parser.add_argument("--trajectories", type=int, default=1_000_000)
    parser.add_argument("--rows-at-once", type=int, default=64, help="a replica, where memory is not asked")
    parser.add_argument("--policies", default=",".join(POLICIES))
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out")
    args = parser.parse_args(argv)
    started_s = time.perf_counter()
    recorded = [json.loads(line) for line in args.replay.read_text(encoding="utf-8").splitlines()]
    trace = make_trace(recorded, args.trajectories, args.seed)
    past = make_trace(recorded, 40_000, args.seed + 1)
    policies = args.policies.split(",")
    with ProcessPoolExecutor(args.processes, get_context("fork")) as pool:
        results = list(pool.map(simulate, policies, repeat(trace), repeat(past), repeat(args)))
    best = next((r["generated_tok_s"] for r in results if r["engine"] == "oracle"), None)
    for result in results:
        result["ratio_to_oracle"] = best and result["generated_tok_s"] / best
    print_table(f"{args.trajectories:,} trajectories on {args.replicas:,} replicas", results)
    write_json(
        args.out,
        "placement",
        device=device_info("cpu"),
        workload={
            "trajectories": args.trajectories,
            "replicas": args.replicas,
            "calls": int(trace.steps.sum()),
            "steps_quantiles": np.quantile(trace.steps, [0.05, 0.5, 0.95, 1]).tolist(),
            "peak_tokens_quantiles": np.quantile(trace.peak, [0.05, 0.5, 0.95, 1]).tolist(),
            "gpus": GPUS,
            "suites": SUITES,
            "rows_at_once": args.rows_at_once,
            "seed": args.seed,
            "wall_s": time.perf_counter() - started_s,
        },
        results=[result | {"repeat": 0} for result in results],
        summary={
            r["engine"]: {
                "median_generated_tok_s": r["generated_tok_s"],
                "ratio_to_oracle": r["ratio_to_oracle"],
                "overshoot": r["overshoot"],
            }
            for r in results
        },
    )
    return {r["engine"]: r for r in results}


if __name__ == "__main__":
    main()

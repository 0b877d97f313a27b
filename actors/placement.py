"""Where trajectories go: leases of predicted KV pages on replicas. Pure: no Ray, no clock, no I/O; time is an argument.

A replica takes one more trajectory where P(pages of its residents > its pool) ≤ 1 % at every step ahead. The pages
of a resident h steps ahead are a random variable: what it will have grown to, or nothing if it has ended by then, as
its forecast says, conditioned on its tokens so far. Its first three cumulants add up over residents, and the sum's
quantile is that of a gamma distribution that has them (Wilson and Hilferty 1931). That distribution is smooth, and the
pages of few rows, or of one that comes to fill the pool in 2 of 100 cases, are not: there the rows that skew the sum
are convolved one by one, and only the others are taken for a gamma's. LightLLM's peak formula (Gong et al. 2025,
"past-future scheduler", §3) looks ahead the same way with one number for each request; ours keeps the spread.
Steps are the clock, and rows are not in phase: each may be half a step ahead or behind, which spreads their sum even
where every forecast is sharp. And rows that were let in together step together, in the order in which their calls
began: no moment at which some have stepped and others have not may exceed the pool either. A row that waits for its
tool does not step: it has what it has for the share of time that rows like it wait, and for the rest what its next call
needs. A row that has been silent for longer than its suite's calls take keeps what it has: its agent may be gone.

Knows nothing of engines, agents and transports. Not thread-safe.
"""

from __future__ import annotations

import heapq
import math
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import count
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import NDArray

from actors.errors import Fenced
from actors.messages import FORECAST_LEVELS, Ask, Forecast, Lease, Resident

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

HORIZONS = np.array([0, 1, 2, 3, 4, 6, 8, 12, 16, 24, 32], np.float64)  # steps ahead; 0: the call that runs or is next
SOON = 5  # horizons that are one step apart
SIGMAS = 2.55  # 1 % of a normal distribution are above 2.33; sums of few, large rows come in lumps
RISK = 0.01
SKEWED = 1.0  # a gamma distribution with less skewness is close enough to any sum of rows
GIANTS = 16  # rows that are convolved one by one
PAST = 512  # calls and waits of a suite that are remembered
BINS = 128  # that a pool is divided into to convolve them
_UNIT = 256.0  # cumulants are whole numbers of 1/256, so that what is charged and released cancels exactly
_STEPS_OF_PRIOR = 2.0  # a row's own growth counts as much as its forecast's after this many steps
LEVELS = (0.0, *FORECAST_LEVELS)
"""Probabilities of `quantiles_of`."""
_LEVELS = np.array(LEVELS)
_Z = np.linspace(-6, 6, 1201)
_TAIL = np.array([NormalDist().cdf(-z) for z in _Z.tolist()])  # of a normal distribution, above _Z


def quantiles_of(forecast: Forecast) -> tuple[float, ...]:
    """Peak tokens at LEVELS: none has fewer than its prompt."""
    return (forecast.prompt_tokens, *forecast.quantile_tokens)


def own_pages(tokens: int, shared_tokens: int, page_tokens: int) -> int:
    """Pages that one row of so many tokens is charged: whole ones, without those of the prompt that all have in common,
    which are charged once; 0 for an engine without pages."""
    return max(1, -(-tokens // page_tokens) - shared_tokens // page_tokens) if page_tokens else 0


def survival(tokens_BH: Floats, quantiles_BK: Floats) -> Floats:
    """P(peak > tokens) under peaks with these quantiles at LEVELS, linear between them."""
    tokens_HB, quantiles_KB = np.ascontiguousarray(tokens_BH.T), np.ascontiguousarray(quantiles_BK.T)  # twice as fast
    above_HB = (tokens_HB >= quantiles_KB[:, None]).sum(0, np.int8).astype(np.int64)
    low_HB = np.minimum(np.maximum(above_HB - 1, 0), len(quantiles_KB) - 2)
    rows = quantiles_KB.shape[1]
    at_HB = low_HB * rows + np.arange(rows)
    left_HB, right_HB = quantiles_KB.take(at_HB), quantiles_KB.take(at_HB + rows)
    part_HB = np.minimum(np.maximum((tokens_HB - left_HB) / np.maximum(right_HB - left_HB, 1e-9), 0.0), 1.0)
    p_HB = _LEVELS.take(low_HB)
    cdf_HB = np.where(above_HB == 0, 0.0, p_HB + part_HB * (_LEVELS.take(low_HB + 1) - p_HB))
    return 1.0 - cdf_HB.T


def outlook(
    tokens_B: Floats,
    growth_B: Floats,
    quantiles_BK: Floats,
    shared_pages_B: Floats,
    page_tokens: int,
    to_come_B: Floats | float = 0.0,
) -> Floats:
    """The pages that rows of `tokens` have at each horizon if they have not ended, and the chance of that, [B, 2, H].

    Args:
        tokens_B: transcript now.
        growth_B: tokens a step.
        quantiles_BK: of the peak, before any of it was seen.
        shared_pages_B: pages of it that are counted elsewhere.
        page_tokens: tokens a page.
        to_come_B: tokens between the transcript of now and the first call; negative where the row may still wait.
    """
    step_B1 = growth_B[:, None]
    # A call holds what it comes to generate; half of a step is generated, half observed.
    size_BH = (tokens_B + to_come_B)[:, None] + step_B1 * (HORIZONS + 0.5)
    # The first call takes place; a later one does if the row comes to its end, or nearly: the last may generate less.
    known_B = tokens_B + np.maximum(to_come_B, 0.0)
    reach_BH = np.where(HORIZONS > 0, size_BH - step_B1 / 16, known_B[:, None])
    alive_BH = survival(reach_BH, quantiles_BK)
    known_B1 = alive_BH[:, :1]
    # Past all that was forecast it may end at any step.
    alive_BH = np.where(known_B1 > 1e-6, alive_BH / np.maximum(known_B1, 1e-6), 0.5**HORIZONS)
    outlook_B2H = np.empty((len(size_BH), 2, len(HORIZONS)))
    outlook_B2H[:, 0] = np.maximum(np.ceil(size_BH / page_tokens) - shared_pages_B[:, None], 1.0)
    outlook_B2H[:, 1] = alive_BH
    return outlook_B2H


def demand(outlook_B2H: Floats, step_pages_B: Floats | float = 0.0) -> Floats:
    """Cumulants of the pages of rows at each horizon, [B, 3, H] in 1/256 pages.

    Args:
        outlook_B2H: of `outlook`.
        step_pages_B: pages a step: the row is half a step ahead or behind.
    """
    pages_BH, alive_BH = np.ascontiguousarray(outlook_B2H.swapaxes(0, 1))
    left_BH = 1.0 - alive_BH
    first_BH = pages_BH * (alive_BH * _UNIT)
    second_BH = pages_BH * (first_BH * left_BH)
    third_BH = pages_BH * (second_BH * (left_BH - alive_BH))
    second_BH += alive_BH * (_UNIT / 4 * np.square(step_pages_B))[..., None]
    return np.rint(np.stack((first_BH, second_BH, third_BH), 1))


def needed(cumulants: Floats) -> Any:
    """Pages that [..., 3, H] summed cumulants exceed with a probability of 1 %, [..., H] at each horizon."""
    pages = cumulants / _UNIT
    first, second, third = pages[..., 0, :], pages[..., 1, :], pages[..., 2, :]
    deviation = np.sqrt(second)
    # Far ahead few rows are left, each with a small chance to be large: no expansion around a normal holds there.
    sixth = np.maximum(third / np.maximum(second * deviation, 1e-6), 1e-3) / 6  # of the skewness
    root = np.maximum(1 + sixth * (SIGMAS - sixth), 0)
    return first + (root * root * root - 1) / (3 * sixth) * deviation


def staggered(cumulants_B3H: Floats) -> float:
    """Pages at the worst moment between two horizons, and one deviation more: rows step one after the other.

    Args:
        cumulants_B3H: of the rows, in the order in which they step.
    """
    mean_BH = cumulants_B3H[:, 0, :SOON] / _UNIT
    stepped_H = np.cumsum(np.diff(mean_BH, axis=1), 0).max(0).clip(0)
    deviation_H = np.sqrt(cumulants_B3H[:, 1, : SOON - 1].sum(0) / _UNIT)
    return float((mean_BH[:, :-1].sum(0) + stepped_H + deviation_H).max())


def _tail(pages: Floats, cumulants: Floats) -> Floats:
    """P(X > pages), [H, N], where X has a gamma distribution with cumulants [3, H]."""
    first, second, third = (cumulants[i][:, None] for i in range(3))
    deviation = np.maximum(np.sqrt(np.maximum(second, 0.0)), 0.01)
    skew = np.maximum(third / deviation**3, 1e-3)
    root = np.cbrt(np.maximum(skew / 2 * (pages - first) / deviation + 1, 0.0))
    return np.where(root > 0, np.interp(6 / skew * (root - 1) + skew / 6, _Z, _TAIL), 1.0)


def doubtful(cumulants: Floats, rows: int, limit: float) -> NDArray[np.bool_]:
    """Horizons at which `needed` may err about a pool of `limit` pages: rows are few or their sum is skewed, and its
    mean and deviation alone (Cantelli's inequality) do not say that it stays within."""
    first, second, third = cumulants / _UNIT
    doubt = RISK * np.maximum(limit - first, 0.0) ** 2 < (1 - RISK) * second
    return doubt if rows <= GIANTS else doubt & (third > SKEWED * second**1.5)


def overflow(outlook_B2H: Floats, others: Floats, limit: float) -> float:
    """P(pages > limit) of these rows and of others whose summed cumulants are [3, H], at the worst horizon.

    The pool is divided into bins; a row that ends between two is there and there in part, so that its mean is kept.
    """
    unit = max(1.0, limit / BINS)
    bins = int(limit / unit) + 1
    pages_BH, alive_BH = np.minimum(outlook_B2H[:, 0] / unit, bins), outlook_B2H[:, 1]
    low_BH = np.floor(pages_BH)
    upper_BH = alive_BH * (pages_BH - low_BH)
    at_N = np.arange(bins)
    width = 2 * bins + 1  # below zero pages there is nothing
    horizons = outlook_B2H.shape[2]
    padded_HW = np.zeros((horizons, width))
    padded_HW[:, bins + 1] = 1.0
    chance_HN = padded_HW[:, bins + 1 :]
    from_BHN = (np.arange(horizons)[:, None] * width + bins + 1 + at_N) - low_BH.astype(np.int64)[:, :, None]
    shares = ((1 - alive_BH)[:, :, None], (alive_BH - upper_BH)[:, :, None], upper_BH[:, :, None])
    for from_HN, none_H1, low_H1, upper_H1 in zip(from_BHN, *shares, strict=True):
        added_HN = low_H1 * padded_HW.take(from_HN)
        if unit > 1:
            added_HN += upper_H1 * padded_HW.take(from_HN - 1)
        chance_HN *= none_H1
        chance_HN += added_HN
    left_N = limit + unit * (0.5 - at_N.astype(np.float64))
    within_HN = chance_HN * (1 - _tail(left_N, others / _UNIT))
    return float(1 - within_HN.sum(1).min())


def longest(past_s: Iterable[float]) -> float:
    """Seconds that calls, or waits, seldom take longer than: mean and `SIGMAS` deviations, a quarter over the mean at
    least; infinite where fewer than 32 have ended, for the first are the quickest."""
    past = np.fromiter(past_s, np.float64)
    return max(past.mean() + SIGMAS * past.std(), 1.25 * past.mean()) if len(past) >= 32 else np.inf


def keeps(waited_s: Floats, past_waits_s: Floats, refill_s: Floats | float) -> NDArray[np.bool_]:
    """Whether the pages of rows that have waited this long for their tool are worth keeping under pressure.

    Keeping f of a pool for t seconds costs f·t of its replica's time, computing them again f·refill: the size cancels,
    and pages are kept while the wait still to come is below the time to prefill a whole pool. What is to come is the
    mean of what was left in past waits that lasted longer; where fewer than 8 did, as long again as it has been.

    Args:
        waited_s: so far.
        past_waits_s: ascending.
        refill_s: pool tokens over prefill tokens a second.
    """
    longer = len(past_waits_s) - np.searchsorted(past_waits_s, waited_s, "right")
    sums = np.append(np.cumsum(past_waits_s[::-1])[::-1], 0.0)
    to_come_s = sums[len(past_waits_s) - longer] / np.maximum(longer, 1) - waited_s
    return np.where(longer < 8, waited_s, to_come_s) <= refill_s


class Pool:
    """The replicas of one deployment and the rows that are, or want to be, resident on them.

    Rows and replicas are indices into arrays, so that a decision costs a few numpy calls whatever their number. Rows
    wait in one heap a suite: twice the size goes first, unless it asked `aging_s` later. A head that fits nowhere lets
    the next `LOOK_PAST` pass until it has waited `aging_s`; then the roomiest replica is held for it. Suites take turns
    by the pages they were given; one that can't be served may fall behind by `LEAD` of all pages, then the others wait.

    Args:
        page_tokens: tokens a page; 0: engines without pages, one slot a row.
        lease_s: a lease that nobody has renewed for so long ends.
    """

    LOOK_PAST = 4
    LEAD = 0.05

    def __init__(self, name: str, page_tokens: int, *, lease_s: float = 900.0, aging_s: float = 300.0):
        self.name, self.page_tokens, self.lease_s, self.aging_s = name, page_tokens, lease_s, aging_s
        # replicas
        self.replica_ids: list[str | None] = []
        self.index: dict[str, int] = {}
        self.pages = np.zeros(0)
        self.slots = np.zeros(0, np.int64)
        self.refill_s = np.zeros(0)
        self.shared = np.zeros(0)
        self.residents = np.zeros(0, np.int64)
        self.is_held = np.zeros(0, np.bool_)
        self.charged = np.zeros((0, 3, len(HORIZONS)))
        # Pages left under the bound at each horizon, -inf where closed. A first look, for which 32 bits do.
        self.left = np.zeros((len(HORIZONS), 0), np.float32)
        self.refused = np.zeros(0)  # pages of the smallest row that had room and was too much of a risk
        # prompts that rows have in common: (suite, tokens) → index into refs
        self.prefixes: dict[tuple[str, int], int] = {}
        self.prefix_pages = np.zeros(0)
        self.called_s, self.waited_s = np.zeros(0), np.zeros(0)  # that its rows took in all
        self.refs = np.zeros((0, 0), np.int64)
        # rows
        self.slot: dict[str, int] = {}
        self.row_id: list[str | None] = []
        self.attempt: list[int] = []
        self.suite: list[str] = []
        self.avoid: list[int] = []
        self.ticket: list[int] = []  # of its entry in a heap; 0 where it does not wait
        self._free: list[int] = []
        self.home = np.zeros(0, np.int64)  # -1 without one
        self.prefix = np.zeros(0, np.int64)
        self.tokens, self.prompt, self.growth = np.zeros(0), np.zeros(0), np.zeros(0)
        self.steps = np.zeros(0)
        self.quantiles = np.zeros((0, len(LEVELS)))
        self.outlook = np.zeros((0, 2, len(HORIZONS)))
        self.cumulants = np.zeros((0, 3, len(HORIZONS)))
        self.size = np.zeros(0)  # the largest of its means
        self.alone = np.zeros(0)  # see _alone; nan until it is asked for
        self.deadline_s, self.asked_s = np.zeros(0), np.zeros(0)
        self.waits = np.zeros(0, np.bool_)  # for its tool
        self.since_s = np.zeros(0)  # when it began to wait, or else its call
        self.parked = np.zeros(0, np.bool_)
        self.silent = np.zeros(0, np.bool_)  # see _silence
        self._moved: set[int] = set()  # their tokens have changed since they were measured
        # queues
        self._heaps: dict[str, list[tuple[float, int, int]]] = {}
        self._tickets = count(1)
        self.queued = 0
        self.served: dict[str, float] = {}
        self.held: dict[int, int] = {}  # row → replica
        self.past_calls: dict[str, deque[float]] = {}  # of a suite, the last PAST
        self.past_waits: dict[str, deque[float]] = {}
        self._swept_s = self._listened_s = 0.0

    # --- replicas

    @property
    def largest(self) -> float:
        """Pages of the largest live replica."""
        return float(self.pages.max(initial=0.0))

    def charged_pages(self) -> dict[str, float]:
        """Pages that the residents of each replica are expected to hold now, shared ones once."""
        self._catch_up()
        return {replica: self.charged[r, 0, 0] / _UNIT + self.shared[r] for replica, r in self.index.items()}

    def replica_up(self, replica: str, pages: int, slots: int, refill_s: float = np.inf) -> None:
        """A replica joins, or says its sizes again."""
        r = self.index.get(replica)
        if r is None:
            r = self.replica_ids.index(None) if None in self.replica_ids else self._grow_replicas()
            self.replica_ids[r], self.index[replica] = replica, r
            self.shared[r] = self.residents[r] = 0
            self.charged[r] = self.refs[:, r] = 0
        self.pages[r], self.slots[r], self.refill_s[r] = pages if self.page_tokens else slots, slots, refill_s
        self._refresh(r)

    def set_page_tokens(self, page_tokens: int) -> None:
        """The page size that the first replica reports; no row has a home yet."""
        if page_tokens == self.page_tokens:
            return
        self.page_tokens = page_tokens
        for (_, shared_tokens), p in self.prefixes.items():
            self.prefix_pages[p] = shared_tokens // page_tokens if page_tokens else 0
        self.measure(np.array(sorted(self.slot.values()), np.int64))

    def _grow_replicas(self) -> int:
        r = len(self.replica_ids)
        more = max(8, r)
        self.replica_ids += [None] * more
        for name in ("pages", "slots", "refill_s", "shared", "residents", "is_held", "charged", "refused"):
            old = getattr(self, name)
            setattr(self, name, np.concatenate([old, np.zeros((more, *old.shape[1:]), old.dtype)]))
        self.left = np.concatenate([self.left, np.full((len(HORIZONS), more), -np.inf, np.float32)], 1)
        self.refs = np.concatenate([self.refs, np.zeros((len(self.refs), more), np.int64)], 1)
        return r

    def replica_down(self, replica: str) -> None:
        """A replica is gone: its rows queue for a new home, with the age they have."""
        r = self.index.pop(replica, None)
        if r is None:
            return
        rows = np.flatnonzero(self.home == r)
        self.replica_ids[r] = None
        self.pages[r], self.slots[r], self.left[:, r] = 0, 0, -np.inf
        self.held = {row: held for row, held in self.held.items() if held != r}
        self.is_held[r] = False
        self.avoid = [-1 if avoided == r else avoided for avoided in self.avoid]
        for row in rows.tolist():
            self._uncharge(row)
            self._enqueue(row)

    def _refresh(self, replicas: Any, needed_H: Floats | None = None) -> None:
        """Recompute what is left of these replicas (an index or an array of them), or of one whose need is known."""
        pages = needed(self.charged[replicas]).T if needed_H is None else needed_H
        left = (self.pages[replicas] - self.shared[replicas]) - pages
        free = (self.residents[replicas] < self.slots[replicas]) & ~self.is_held[replicas]
        self.left[:, replicas] = np.where(free, left, -np.inf)
        self.refused[replicas] = np.inf

    # --- rows

    def _new_row(self, row_id: str | None, attempt: int, suite: str, now_s: float) -> int:
        if not self._free:
            size = len(self.row_id)
            more = max(64, size)
            for name in ("home", "prefix", "tokens", "prompt", "growth", "steps", "quantiles", "outlook", "cumulants"):
                old = getattr(self, name)
                setattr(self, name, np.concatenate([old, np.zeros((more, *old.shape[1:]), old.dtype)]))
            for name in ("size", "alone", "deadline_s", "asked_s", "waits", "since_s", "parked", "silent"):
                old = getattr(self, name)
                setattr(self, name, np.concatenate([old, np.zeros(more, old.dtype)]))
            self.home[size:] = -1
            self.deadline_s[size:] = np.inf
            self.row_id += [None] * more
            self.suite += [""] * more
            for each in (self.attempt, self.avoid, self.ticket):
                each += [0] * more
            self._free = list(range(size + more - 1, size - 1, -1))
        row = self._free.pop()
        self.row_id[row], self.attempt[row], self.suite[row], self.avoid[row] = row_id, attempt, suite, -1
        self.steps[row], self.asked_s[row], self.deadline_s[row] = 0, now_s, now_s + self.lease_s
        self.waits[row], self.since_s[row], self.silent[row] = False, now_s, False
        if row_id is not None:
            self.slot[row_id] = row
        return row

    def _prefix(self, suite: str, shared_tokens: int) -> int:
        key = (suite, shared_tokens)
        if key not in self.prefixes:
            self.prefixes[key] = len(self.prefixes)
            pages = shared_tokens // self.page_tokens if self.page_tokens else 0
            self.prefix_pages = np.append(self.prefix_pages, float(pages))
            self.called_s, self.waited_s = np.append(self.called_s, 1e-6), np.append(self.waited_s, 0.0)
            self.refs = np.concatenate([self.refs, np.zeros((1, len(self.replica_ids)), np.int64)])
        return self.prefixes[key]

    def take(self, suite: str, number: int, now_s: float) -> Ints:
        """Indices for rows without an id (a simulation's)."""
        return np.array([self._new_row(None, 1, suite, now_s) for _ in range(number)], np.int64)

    def add(self, rows: Ints, suite: str, forecasts: Sequence[Forecast]) -> None:
        """Queue rows of one suite."""
        self._set(rows, suite, forecasts)
        self.measure(rows)
        for row in rows.tolist():
            self._enqueue(row)

    def _set(self, rows: Ints, suite: str, forecasts: Sequence[Forecast]) -> None:
        """What rows know before their first call."""
        self.prompt[rows] = self.tokens[rows] = [f.prompt_tokens for f in forecasts]
        self.quantiles[rows] = [quantiles_of(f) for f in forecasts]
        # The last step observes nothing.
        grown = [max(1.0, f.p50_tokens - f.prompt_tokens) / max(0.5, f.p50_steps - 0.5) for f in forecasts]
        self.growth[rows] = grown
        self.prefix[rows] = [self._prefix(suite, f.shared_tokens) for f in forecasts]

    def measure(self, rows: Ints) -> None:
        """Set the cumulants of rows from what is known of them."""
        if not self.page_tokens:
            self._stand(rows, np.ones(len(rows)))
            return
        tokens, prefix, half = self.tokens[rows], self.prefix[rows], 0.5 * self.waits[rows]
        # Half of a step is observed, which a row that waits has yet to do.
        growth = _STEPS_OF_PRIOR * self.growth[rows] + tokens - self.prompt[rows]
        growth = np.maximum(growth / (_STEPS_OF_PRIOR + self.steps[rows] - half), 1.0)
        calls = self.called_s[prefix] / (self.called_s[prefix] + self.waited_s[prefix])
        to_come = half * (2 * calls - 1) * growth
        shared = self.prefix_pages[prefix]
        ahead_B2H = outlook(tokens, growth, self.quantiles[rows], shared, self.page_tokens, to_come)
        # Where others would have ended a silent row has what it has now.
        stands_BH = self.silent[rows, None] & (ahead_B2H.prod(1) < ahead_B2H[:, 0, :1])
        self.outlook[rows] = np.where(stands_BH[:, None], ahead_B2H[:, :, :1], ahead_B2H)
        self._sum_up(rows, growth / self.page_tokens)

    def _sum_up(self, rows: Ints, step_pages: Floats | float = 0.0) -> None:
        self.cumulants[rows] = cumulants_B3H = demand(self.outlook[rows], step_pages)
        self.size[rows] = cumulants_B3H[:, 0].max(1)
        self.alone[rows] = np.nan

    def _alone(self, row: int) -> float:
        """Pages that a row may come to need, under the bound, without its shared prompt."""
        if np.isnan(self.alone[row]):
            self.alone[row] = needed(self.cumulants[row]).max()
        return float(self.alone[row])

    def _stand(self, rows: Ints, pages: Floats) -> None:
        """Rows hold so many pages at every horizon."""
        self.outlook[rows, 0], self.outlook[rows, 1] = pages[:, None], 1.0
        self._sum_up(rows)

    def advance(self, rows: Ints, tokens: Floats, steps: int = 0) -> None:
        """Rows hold so many tokens now and have made so many more steps."""
        self.steps[rows] += steps
        self.tokens[rows] = tokens
        self._charge_anew(rows)

    def _moves(self, row: int, tokens: int, steps: int = 0) -> None:
        """As `advance`, but measured with all others that have moved, once somebody wants to know."""
        self.steps[row] += steps
        self.tokens[row] = tokens
        self._moved.add(row)

    def _catch_up(self) -> None:
        if self._moved:
            self._charge_anew(np.array(sorted(self._moved), np.int64))
            self._moved.clear()

    def _charge_anew(self, rows: Ints) -> None:
        here = rows[self.home[rows] >= 0]
        if not len(here):
            self.measure(rows)
            return
        homes = self.home[here]
        before = self.cumulants[here]
        self.measure(rows)
        np.add.at(self.charged, homes, self.cumulants[here] - before)
        self._refresh(np.unique(homes))

    def release(self, rows: Iterable[int]) -> None:
        """Rows are over."""
        homes: set[int] = set()
        for row in rows:
            homes.add(self._discharge(row))
            self._dequeue(row)
            row_id = self.row_id[row]
            if row_id is not None:
                del self.slot[row_id]
            self.row_id[row] = None
            self.deadline_s[row] = np.inf
            self.waits[row] = self.parked[row] = False
            self._moved.discard(row)
            self._free.append(row)
        homes.discard(-1)
        self._refresh(sorted(homes))

    def _charge(self, row: int, r: int, needed_H: Floats | None = None) -> None:
        p = self.prefix[row]
        self.home[row] = r
        if not self.refs[p, r]:
            self.shared[r] += self.prefix_pages[p]
        self.refs[p, r] += 1
        self.residents[r] += 1
        self.charged[r] += self.cumulants[row]
        self.parked[row] = False
        self._refresh(r, needed_H)

    def _uncharge(self, row: int) -> None:
        if (r := self._discharge(row)) >= 0:
            self._refresh(r)

    def _discharge(self, row: int) -> int:
        """A row leaves its home, whose room is to be computed anew; -1 where there is none, or it is gone."""
        r = int(self.home[row])
        self.home[row] = -1
        if r < 0:
            return -1
        p = self.prefix[row]
        self.refs[p, r] -= 1
        if not self.refs[p, r]:
            self.shared[r] -= self.prefix_pages[p]
        self.residents[r] -= 1
        self.charged[r] -= self.cumulants[row]
        return r if self.replica_ids[r] is not None else -1

    # --- queues

    def _enqueue(self, row: int) -> None:
        if row in self._moved:
            self._catch_up()  # its place goes by its size
        suite = self.suite[row]
        heap = self._heaps.setdefault(suite, [])
        if not heap:  # no credit for the time in which it asked for nothing
            busy = [self.served[name] for name, other in self._heaps.items() if other and name in self.served]
            self.served[suite] = max(self.served.get(suite, 0.0), min(busy, default=0.0))
        self.ticket[row] = next(self._tickets)
        self.queued += 1
        heapq.heappush(heap, (self.asked_s[row] / self.aging_s - math.log2(self.size[row]), self.ticket[row], row))

    def _dequeue(self, row: int) -> None:
        """Its entry stays in the heap, outdated."""
        self.queued -= self.ticket[row] > 0
        self.ticket[row] = 0
        if (r := self.held.pop(row, None)) is not None:
            self.is_held[r] = False
            self._refresh(r)

    def place(self, now_s: float) -> list[int]:
        """Give homes to waiting rows while any fits; the rows."""
        granted: list[int] = []
        if not self.queued or not self.index:
            return granted
        self._silence(now_s)
        self._catch_up()
        lead = self.LEAD * float(self.pages.sum())
        parked = False
        refused: set[int] = set()  # nothing but what is granted changes meanwhile
        while self.queued:
            for heap in self._heaps.values():
                while heap and self.ticket[heap[0][2]] != heap[0][1]:
                    heapq.heappop(heap)
            order = sorted((name for name, heap in self._heaps.items() if heap), key=self.served.__getitem__)
            found = None
            for suite in order:
                if self.served[suite] > self.served[order[0]] + lead:
                    break
                found = self._next(self._heaps[suite], refused, now_s)
                if found:
                    break
            if found:
                row, r, needed_H = found
                if row in self.held:
                    refused.clear()
                self._dequeue(row)
                self._charge(row, r, needed_H)
                if not self.waits[row]:
                    self._heard(np.array([row]), now_s, False)
                self.served[self.suite[row]] += float(self.size[row]) / _UNIT
                granted.append(row)
            elif parked or not self._park(now_s):
                break
            else:
                parked = True
                refused.clear()
        return granted

    def _next(
        self, heap: list[tuple[float, int, int]], refused: set[int], now_s: float
    ) -> tuple[int, int, Floats | None] | None:
        """The first row of a heap that fits somewhere, and `_fit`; those that do not are added to `refused`."""
        passed: list[tuple[float, int, int]] = []
        found = None
        while heap and len(passed) <= self.LOOK_PAST:
            entry = heapq.heappop(heap)
            if self.ticket[entry[2]] != entry[1]:
                continue
            passed.append(entry)
            row = entry[2]
            fit = None if row in refused else self._fit(row)
            if fit:
                found = (row, *fit)
                break
            refused.add(row)
            if len(passed) == 1 and row not in self.held and now_s - self.asked_s[row] > self.aging_s:
                self._hold(row)
        for entry in passed:
            heapq.heappush(heap, entry)
        return found

    def _hold(self, row: int) -> None:
        """Keep the roomiest replica that could ever take the row free for it."""
        could = self.pages - self.prefix_pages[self.prefix[row]] >= self._alone(row)
        if not could.any():
            could = self.pages == self.pages.max(initial=0.0)
        r = int(np.where(could, np.maximum(self.left.min(0), -1.0), -2.0).argmax())
        if self.replica_ids[r] is not None and not self.is_held[r]:
            self.held[row], self.is_held[r], self.left[:, r] = r, True, -np.inf

    def _fit(self, row: int) -> tuple[int, Floats | None] | None:
        """The replica that has the most room left with the row's mean, if it takes the row; then the next three. With
        what all of its rows need then, where that was asked.

        A replica without room for the mean is not asked: seldom the rule would have let the row in all the same, where
        it makes a skewed sum less so.
        """
        p = int(self.prefix[row])
        mean = self.cumulants[row, 0]
        room = (self.left - (mean[:, None] / _UNIT).astype(np.float32)).min(0)
        room -= self.prefix_pages[p] * (self.refs[p] == 0)
        room[self.refused <= self.size[row]] = -np.inf
        if (r := self.held.get(row)) is not None:
            needed_H = self._takes(r, row)
            if needed_H is not None or not self.residents[r]:
                return r, needed_H
        avoid = self._avoided(row)
        for _ in range(4):
            r = int(room.argmax())
            if room[r] < -0.5:  # rounded
                break
            if r != avoid and (needed_H := self._takes(r, row)) is not None:
                return r, needed_H
            room[r] = -np.inf
        # Larger than any pool allows: alone on the largest.
        if self._alone(row) + self.prefix_pages[p] > (top := self.largest):
            alone = np.flatnonzero((self.pages == top) & (self.residents == 0) & (self.left[0] > -np.inf))
            return (int(alone[0]), None) if len(alone) else None
        return None

    def _avoided(self, row: int) -> int:
        """The replica that failed a row, as long as another could ever take it; else -1."""
        avoid = self.avoid[row]
        if avoid < 0:
            return -1
        could = self.pages >= min(self._alone(row) + self.prefix_pages[self.prefix[row]], self.largest)
        could[avoid] = False
        return avoid if could.any() else -1

    def _takes(self, r: int, row: int) -> Floats | None:
        """What the rows of a replica need with this one at each horizon; None where it does not take it."""
        if self.residents[r] >= self.slots[r]:
            return None
        p = self.prefix[row]
        limit = float(self.pages[r] - self.shared[r] - (0 if self.refs[p, r] else self.prefix_pages[p]))
        total = self.charged[r] + self.cumulants[row]
        needed_H = needed(total)
        if needed_H.max() > limit:
            return None
        if not self.residents[r]:
            return needed_H  # there is nobody whom it could crowd out
        rows = np.append(np.flatnonzero(self.home == r), row)
        if self._staggered(rows) <= limit and self._risk(rows, total, limit) <= RISK:
            return needed_H
        self.refused[r] = min(self.refused[r], self.size[row])
        return None

    def _staggered(self, rows: Ints) -> float:
        """`staggered` of rows of which the last is new; those that wait step last."""
        began_s = np.where(self.waits[rows], np.inf, self.since_s[rows])
        began_s[-1] = np.inf
        return staggered(self.cumulants[rows[np.argsort(began_s, kind="stable")]])

    def _risk(self, rows: Ints, total: Floats, limit: float) -> float:
        """`overflow` of rows that need `total`, at the horizons where that is in doubt; 0 where it is at none."""
        doubt = doubtful(total, len(rows), limit) & (self.outlook[rows, 0].sum(0) > limit)
        if not doubt.any():
            return 0.0
        giants = rows[np.argsort(self.cumulants[rows, 2][:, doubt].max(1))[-GIANTS:]]
        others = total - self.cumulants[giants].sum(0)
        return overflow(self.outlook[giants][:, :, doubt], others[:, doubt], limit)

    # --- waits

    def _silence(self, now_s: float) -> None:
        """Find rows whose call or tool takes longer than almost all of their suite: until they are heard of again they
        are not expected to end. Their agent may be gone, and whoever takes them over begins later."""
        if not self.page_tokens or now_s < self._listened_s + 0.1:
            return
        self._listened_s = now_s
        rows = np.flatnonzero((self.home >= 0) & ~self.silent)
        pasts = self.past_calls, self.past_waits
        most_P2 = np.array([[longest(past.get(suite, ())) for past in pasts] for suite, _ in self.prefixes])
        rows = rows[now_s - self.since_s[rows] > most_P2[self.prefix[rows], self.waits[rows].astype(np.int64)]]
        self.silent[rows] = True
        self._moved.update(rows.tolist())

    def _park(self, now_s: float) -> bool:
        """Give up the pages of rows whose tool takes too long, where others want them; at most once a second.

        The engine evicts the pages that were used least recently, which are these.
        """
        if now_s < self._swept_s + 1.0:
            return False
        self._swept_s = now_s
        rows = np.flatnonzero(self.waits & (self.home >= 0))
        refill_s = self.refill_s[self.home[rows]]
        waited_s = now_s - self.since_s[rows]
        found = False
        suites = np.array([self.suite[row] for row in rows.tolist()])
        for suite in set(suites[waited_s > 0.1 * refill_s].tolist()):
            mine = suites == suite
            past = np.sort(np.array(self.past_waits.get(suite, ())))
            for row in rows[mine][~keeps(waited_s[mine], past, refill_s[mine])].tolist():
                self._uncharge(row)
                self.parked[row] = found = True
        return found

    def answered(self, rows: Ints, tokens: Floats, now_s: float) -> None:
        """Rows have their answer, hold so many tokens and wait for their tool."""
        self._wait(rows, now_s)
        self.advance(rows, tokens, 1)

    def _wait(self, rows: Ints, now_s: float) -> None:
        self._past(rows, now_s - self.since_s[rows], self.called_s, self.past_calls)
        self._heard(rows, now_s, True)

    def _past(self, rows: Ints, seconds: Floats, in_all: Floats, past: dict[str, deque[float]]) -> None:
        np.add.at(in_all, self.prefix[rows], seconds)
        for row, each_s in zip(rows.tolist(), seconds.tolist(), strict=True):
            past.setdefault(self.suite[row], deque(maxlen=PAST)).append(each_s)

    def _heard(self, rows: Ints, now_s: float, waits: bool) -> None:
        """From now on rows wait for their tool, or their call runs."""
        self._moved.update(rows[self.silent[rows]].tolist())
        self.waits[rows], self.since_s[rows], self.silent[rows] = waits, now_s, False

    def resume(self, rows: Ints, now_s: float) -> None:
        """Rows are back from their tool; one that was parked queues for a home, with the age it has."""
        waited = rows[self.waits[rows]]
        self._past(waited, now_s - self.since_s[waited], self.waited_s, self.past_waits)
        self._heard(rows, now_s, False)
        for row in rows[self.parked[rows]].tolist():
            self.parked[row] = False
            self._enqueue(row)

    # --- one row by its id

    def ask(self, ask: Ask, now_s: float) -> str | None:
        """The home of a row: as it is, adopted, or None where it waits for one.

        Raises:
            Fenced: a higher attempt of the row has asked.
        """
        row = self.slot.get(ask.row_id)
        asked_s, home = now_s, self.index.get(ask.home or "")
        if row is not None and ask.attempt < self.attempt[row]:
            raise Fenced(f"attempt {self.attempt[row]} of {ask.row_id} has taken over from {ask.attempt}")
        avoid = self.index.get(ask.avoid or "", -1)
        if row is not None and ask.attempt > self.attempt[row]:  # it inherits its place: in the queue, or at home
            asked_s, before = float(self.asked_s[row]), int(self.home[row])
            home = before if home is None and before not in (-1, avoid) else home
            self.release([row])
            row = None
        if row is None:
            row = self._new_row(ask.row_id, ask.attempt, ask.suite, asked_s)
            one = np.array([row])
            self._set(one, ask.suite, [ask.forecast])
            self.avoid[row] = avoid
            # How many steps it took to here was forgotten.
            self.steps[row] = max(0.0, ask.tokens - self.prompt[row]) / self.growth[row]
            self.tokens[row], self.since_s[row] = ask.tokens, now_s
            self.measure(one)
            if home is None:
                self._enqueue(row)
            else:
                self._charge(row, home)
        else:
            self._moves(row, ask.tokens)
            self.resume(np.array([row]), now_s)
            if avoid >= 0 and self.home[row] == avoid:
                self._uncharge(row)
                self.avoid[row] = avoid
                self._enqueue(row)
            elif home is not None and self.home[row] not in (-1, home):
                self._uncharge(row)
                self._charge(row, home)
        self.deadline_s[row] = now_s + self.lease_s
        return self.home_of(ask.row_id)

    def home_of(self, row_id: str) -> str | None:
        """The replica of a row; None where it has none."""
        row = self.slot.get(row_id)
        return None if row is None or self.home[row] < 0 else self.replica_ids[self.home[row]]

    def replied(self, row_id: str, attempt: int, tokens: int, now_s: float) -> None:
        """A row's call is answered: it holds so many tokens and waits for its tool."""
        row = self.slot.get(row_id)
        if row is None or self.attempt[row] != attempt or tokens < self.tokens[row] or self.waits[row]:
            return  # fewer: the next call has overtaken this news; it waits: this is said again
        self._moves(row, tokens, 1)
        self._wait(np.array([row]), now_s)
        self.deadline_s[row] = now_s + self.lease_s

    def end(self, row_id: str, attempt: int) -> None:
        """A row is over, unless a higher attempt has taken it over."""
        row = self.slot.get(row_id)
        if row is not None and attempt >= self.attempt[row]:
            self.release([row])

    def adopt(self, replica: str, residents: Iterable[Resident], now_s: float) -> None:
        """What a replica says it holds: rows that nobody has asked for yet stand still until somebody does."""
        for one in residents:
            known = self.slot.get(one.row_id)
            if known is not None and self.ticket[known]:  # its agent was here first
                self._dequeue(known)
                self._charge(known, self.index[replica])
            if known is not None or replica not in self.index:
                continue
            row = self._new_row(one.row_id, 0, one.suite, now_s)
            rows = np.array([row])
            still = Forecast(one.tokens, 0, one.tokens, one.tokens, (one.tokens,) * len(FORECAST_LEVELS), 1)
            self._set(rows, one.suite, [still])
            self._stand(rows, np.array([max(1.0, own_pages(one.tokens, 0, self.page_tokens))]))
            self._charge(row, self.index[replica])

    def expire(self, now_s: float) -> list[tuple[str, str | None]]:
        """End the leases that nobody has renewed; (row, its home)."""
        rows = np.flatnonzero(self.deadline_s <= now_s).tolist()
        gone = [(self.row_id[row], self.home_of(self.row_id[row] or "")) for row in rows]
        self.release(rows)
        return [(row_id, home) for row_id, home in gone if row_id is not None]


class Placement:
    """All pools: which one a row goes to, and its lease there.

    Args:
        pools: name → pages of one replica where that is known before any has started; small pools first. Calls start
            the first; the others are started for the rows that wait for them.
    """

    PROVISIONAL = 8

    def __init__(self, pools: Mapping[str, int | None], *, lease_s: float = 900.0, aging_s: float = 300.0):
        self.declared = dict(pools)
        self.pools = {name: Pool(name, 256, lease_s=lease_s, aging_s=aging_s) for name in pools}
        self.closed: set[str] = set()  # pools that cannot start: no row goes there that need not
        self.where: dict[str, tuple[Pool, bool]] = {}
        self._provisional: dict[str, set[str]] = {name: set() for name in pools}

    def replica_up(
        self, pool: str, replica: str, pages: int, page_tokens: int, slots: int, refill_s: float = np.inf
    ) -> bool:
        """A replica reports; True where it was not known and is to say what it holds."""
        new = replica not in self.pools[pool].index
        if new and not self.pools[pool].index:
            self.pools[pool].set_page_tokens(page_tokens)
        if page_tokens:  # a replica on another GPU may have another kernel, and pages of another size
            pages = pages * page_tokens // self.pools[pool].page_tokens
        self.pools[pool].replica_up(replica, pages, slots, refill_s)
        self.declared[pool] = max(pages, self.declared[pool] or 0)
        return new

    def ask(self, ask: Ask, now_s: float) -> Lease | None:
        """The lease of a row; None: it waits for one, ask again after `place`.

        Raises:
            Fenced: a higher attempt of the row has asked.
        """
        old = self.where.get(ask.row_id)
        pool, fits = old or self._choose(ask.forecast)
        if ask.pool is not None and ask.pool != pool.name:
            pool, fits = self.pools[ask.pool], True
        elif ask.pool is None and pool.name in self.closed:
            pool, fits = self._choose(ask.forecast)
        if old and old[0] is not pool:
            self.end(ask.row_id, ask.attempt)
            if ask.row_id in self.where:
                raise Fenced(f"a higher attempt of {ask.row_id} has taken over from {ask.attempt}")
        self.where[ask.row_id] = pool, fits
        pool.ask(ask, now_s)
        lease = self.lease(ask.row_id)
        return lease if lease is None or lease.replica else replace(lease, replica=ask.home)

    def _choose(self, forecast: Forecast) -> tuple[Pool, bool]:
        """The first pool with a replica that the row alone does not outgrow, in 99 of 100 cases as far as its forecast
        tells; else the largest. One that outgrows it goes on in the next. The smallest is never closed."""
        tokens = float(np.interp(0.99, LEVELS, quantiles_of(forecast)))
        open_pools = {name: pool for name, pool in self.pools.items() if name not in self.closed}
        # A pool that has never had a replica may hold anything.
        sizes = {name: pool.largest or self.declared[name] or np.inf for name, pool in open_pools.items()}
        for name, pool in open_pools.items():
            if not pool.page_tokens or -(-tokens // pool.page_tokens) <= sizes[name]:
                return pool, True
        return self.pools[max(sizes, key=sizes.__getitem__)], False

    def lease(self, row_id: str) -> Lease | None:
        """The lease of a row as it stands; a provisional one where the pool is to be started."""
        if row_id not in self.where:
            return None
        pool, fits = self.where[row_id]
        row, home, early = pool.slot[row_id], pool.home_of(row_id), self._provisional[pool.name]
        starts = pool is next(iter(self.pools.values())) and not pool.index
        if home is None and starts and (row_id in early or len(early) < self.PROVISIONAL):
            early.add(row_id)
        elif home is None:
            return None
        else:
            early.discard(row_id)
        return Lease(row_id, pool.attempt[row], pool.name, home, fits)

    def replied(self, row_id: str, attempt: int, tokens: int, now_s: float) -> None:
        """See `Pool.replied`."""
        if row_id in self.where:
            self.where[row_id][0].replied(row_id, attempt, tokens, now_s)

    def end(self, row_id: str, attempt: int) -> None:
        """A row is over, unless a higher attempt has taken it over."""
        if row_id in self.where:
            pool = self.where[row_id][0]
            pool.end(row_id, attempt)
            self._forget(pool, row_id)

    def _forget(self, pool: Pool, row_id: str) -> None:
        if row_id not in pool.slot:
            del self.where[row_id]
            self._provisional[pool.name].discard(row_id)

    def adopt(self, pool: str, replica: str, residents: Iterable[Resident], now_s: float) -> None:
        """See `Pool.adopt`."""
        strays = [one for one in residents if self.where.get(one.row_id, (self.pools[pool],))[0] is self.pools[pool]]
        self.pools[pool].adopt(replica, strays, now_s)
        for one in strays:
            self.where.setdefault(one.row_id, (self.pools[pool], True))

    def expire(self, now_s: float) -> list[tuple[str, str | None]]:
        """End the leases that nobody has renewed; (row, its home)."""
        gone: list[tuple[str, str | None]] = []
        for pool in self.pools.values():
            for row_id, home in pool.expire(now_s):
                self._forget(pool, row_id)
                gone.append((row_id, home))
        return gone

    def renew(self, row_ids: Iterable[str], now_s: float) -> None:
        """Leases of these rows go on; unknown rows are ignored."""
        for row_id in row_ids:
            if row_id in self.where:
                pool = self.where[row_id][0]
                if (row := pool.slot.get(row_id)) is not None:
                    pool.deadline_s[row] = now_s + pool.lease_s

    def place(self, now_s: float) -> list[str]:
        """Give homes to waiting rows while any fits; their ids."""
        granted = [pool.row_id[row] for pool in self.pools.values() for row in pool.place(now_s)]
        return [row_id for row_id in granted if row_id is not None]

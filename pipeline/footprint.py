"""Forecasts of whole trajectories: quantiles of peak tokens, and steps, from the prompt, finished rows, prior, limits.

A trajectory's growth (peak minus prompt) is forecast to be like that of finished rows, each carried over to the length
and the group of the question by a regression on their logarithms. The row that is forecast counts as one more, which
grew to its limit: split conformal prediction (Lei et al. 2018, arXiv:1604.04173), so that p95 covers about 95 % of
exchangeable rows however few were seen; p99, which fewer than 100 can't tell, is a multiple of the largest where p95 is
known. Unlike there, the same rows fit the regression, whose two shrunk effects cost next to nothing of that. Before
rows are finished the suite's prior stands for some; it fades as they come.

Forecasts order and place work; they never change a limit or an output. Knows nothing of Ray, engines or bytes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import reduce
from math import ceil, exp, log
from operator import and_
from statistics import NormalDist
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds
from numpy.typing import NDArray

from actors.agent import Limits
from actors.messages import FORECAST_LEVELS, Forecast, Task
from pipeline.suite import PriorConfig
from pipeline.tables import RESULTS, RunFacts, read_table
from pipeline.tasks import PACK, Tasks

MAX_ROWS = 1024
"""Finished rows kept, the newest: 50 KB."""
PRIOR_ROWS = 20.0
"""Rows that the prior counts for while there are none."""
FADE_ROWS = 10.0
"""Finished rows that make the prior count for a third; after 50 it is gone, or its tail would widen every p95."""
PAST_ROWS = 50.0
"""Rows that this run must finish for earlier runs' rows to count half."""
BEYOND = 2.0
"""How many times the largest growth the p99 is where rows are too few to tell it."""
SHRINK_ROWS = 20.0
"""Rows at which an effect of length or group counts half."""

_COLUMNS = ("prompt_tokens", "peak_tokens", "num_steps", "error_type", "metadata")
_PRIOR, _PAST, _OWN = 0.0, 1.0, 2.0
_GROWTH, _STEPS, _LENGTH, _GROUP, _SOURCE, _AGE = range(6)
_DRAWS = [NormalDist().inv_cdf((i + 0.5) / 9) for i in range(9)]

Array = NDArray[np.float64]


class Forecaster:
    """Learns from finished rows and forecasts those to come; plain data, pickled with what it has learned.

    Args:
        limits: bounds of a trajectory; no forecast goes beyond them.
        shared_tokens: prompt prefix common to the suite; what is behind it is the question.
        prior: steps and tokens a step until rows are finished; None: only the limits are known.
        group_by: metadata fields whose equal values make rows alike.
    """

    def __init__(
        self, limits: Limits, shared_tokens: int = 0, prior: PriorConfig | None = None, group_by: Sequence[str] = ()
    ):
        self.limits, self.shared_tokens, self.group_by = limits, shared_tokens, tuple(group_by)
        self._rows: Array = np.array(_prior_rows(prior) if prior else [], dtype=np.float64).reshape(-1, 6)
        self._new: list[tuple[float, ...]] = []
        self._running: dict[str, Mapping[str, Any] | None] = {}
        self._seen = 0
        self._groups: dict[tuple[str, ...], int] = {}
        self._known: dict[tuple[int, int], tuple[Array, int]] = {}

    def begin(self, row_id: str) -> None:
        """This row is being rolled out. Of rows that run at the same time the short ones end first, so what is learned
        from finished ones alone is too short: a row counts once all that began before it have ended."""
        self._running[row_id] = None

    def observe(self, row: Mapping[str, Any]) -> None:
        """Learn from a row of `results/`; rows that a failure cut off teach nothing."""
        self._running[row["row_id"]] = row
        self._learn_ended()

    def drop(self, row_id: str) -> None:
        """A row that was begun ends elsewhere, and teaches nothing here."""
        self._running.pop(row_id, None)
        self._learn_ended()

    def _learn_ended(self) -> None:
        for row_id, ended in list(self._running.items()):
            if ended is None:
                break
            self._learn(ended, _OWN)
            del self._running[row_id]

    def _learn(self, row: Mapping[str, Any], source: float) -> None:
        prompt, peak = row["prompt_tokens"], row["peak_tokens"]
        if not peak or peak < prompt or row["error_type"] in ("infra", "model"):
            return
        self._seen += 1
        length, group = self._length(prompt), self._group(dict(row["metadata"]))
        self._new.append((peak - prompt, row["num_steps"], log(length), group, source, self._seen))
        self._known.clear()

    def forecast(self, task: Task, prompt_tokens: int) -> Forecast:
        """What `task` is expected to need, its prompt being `prompt_tokens` long."""
        key = (self._length(prompt_tokens), self._group(task.metadata))
        if key not in self._known:
            self._known[key] = self._quantiles(*key)
        growth, steps = self._known[key]
        most = max(prompt_tokens, self.limits.tokens)
        peaks = tuple(min(most, prompt_tokens + ceil(min(tokens, most))) for tokens in growth)
        at = dict(zip(FORECAST_LEVELS, peaks, strict=True))
        return Forecast(prompt_tokens, min(self.shared_tokens, prompt_tokens), at[0.5], at[0.95], peaks, steps)

    def _length(self, prompt_tokens: int) -> int:
        return max(1, prompt_tokens - self.shared_tokens)

    def _group(self, metadata: Mapping[str, str]) -> int:
        return self._groups.setdefault(tuple(metadata.get(name, "") for name in self.group_by), len(self._groups))

    def _quantiles(self, length: int, group: int) -> tuple[Array, int]:
        """Growth at each of FORECAST_LEVELS, infinite where only the limits are known, and the median of the steps."""
        rows = self._kept()
        if not len(rows):
            return np.full(len(FORECAST_LEVELS), np.inf), self.limits.max_steps
        weights = self._weights(rows)
        growth = rows[:, _GROWTH] * self._carried(rows, log(length), group)
        ascending = np.argsort(growth, kind="stable")
        levels = np.array(FORECAST_LEVELS) * (weights.sum() + 1)  # the one more row, which grows without bound
        at = np.searchsorted(np.cumsum(weights[ascending]), levels - 1e-9)
        quantiles = np.append(growth[ascending], np.inf)[at]
        # Where rows are too few to tell the p99, the limit in its place would be most of what a sum of many rows needs.
        finished = growth[rows[:, _SOURCE] != _PRIOR]
        most = (finished if len(finished) else growth).max()
        quantiles[-2] = min(quantiles[-2], max(quantiles[-3], BEYOND * most))
        quantiles[-1] = np.inf
        by_steps = np.cumsum(np.bincount(np.rint(rows[:, _STEPS]).astype(int), weights))
        steps = int(np.searchsorted(by_steps, by_steps[-1] / 2))
        return quantiles, max(1, min(self.limits.max_steps + 1, steps))

    def _carried(self, rows: Array, length: float, group: int) -> Array:
        """By what each row's growth is multiplied to be that of a question of this length and group: a regression of
        log growth on log length, and its mean residual by group, both shrunk towards no effect."""
        real = rows[:, _SOURCE] != _PRIOR
        factor = np.ones(len(rows))
        if not real.any():
            return factor
        x, y = rows[real, _LENGTH], np.log(np.maximum(1, rows[real, _GROWTH]))
        groups = rows[real, _GROUP].astype(int)
        dx, dy, n = x - x.mean(), y - y.mean(), len(x)
        slope = float(dx @ dy) / (float(dx @ dx) or 1.0) * n / (n + SHRINK_ROWS)
        effects = np.bincount(groups, dy - slope * dx, len(self._groups)) / (
            np.bincount(groups, minlength=len(self._groups)) + SHRINK_ROWS
        )
        nearest = min(max(length, x.min()), x.max())  # a slope says nothing beyond the lengths it was fitted to
        factor[real] = np.exp(slope * (nearest - x) + effects[group] - effects[groups])
        return factor

    def _weights(self, rows: Array) -> Array:
        """How many rows each row counts for, at most 1."""
        source = rows[:, _SOURCE]
        weights = np.ones(len(rows))
        weights[source == _PAST] = PAST_ROWS / (PAST_ROWS + (source == _OWN).sum())
        prior = source == _PRIOR
        seen = weights[~prior].sum()
        weights[prior] = PRIOR_ROWS * exp(-seen / FADE_ROWS) / max(1, prior.sum())
        return weights

    def _kept(self) -> Array:
        """All rows by growth: the prior's and the newest of the finished."""
        if self._new:
            rows = np.concatenate([self._rows, np.array(self._new)])
            self._new.clear()
            newest = (rows[:, _SOURCE] == _PRIOR) | (rows[:, _AGE] > self._seen - MAX_ROWS)
            rows = rows[newest]
            self._rows = rows[np.argsort(rows[:, _GROWTH], kind="stable")]
        return self._rows

    def learn_from_tables(self, folder: str, facts: RunFacts, model_revision: str) -> int:
        """Learn from the `results/` folder of an earlier run: from its rows of the same suite, prompt, tools and model,
        from MAX_ROWS of them at most, taken evenly; their number."""
        same = {name: getattr(facts, name) for name in ("suite", "prompt_sha", "template_sha", "tool_sha")}
        where = [
            ds.field(name).is_null() if value is None else ds.field(name) == value
            for name, value in (same | {"model_revision": model_revision}).items()
        ]
        table = read_table(folder, RESULTS, _COLUMNS, where=reduce(and_, where))
        some = table.take(np.linspace(0, len(table), min(len(table), MAX_ROWS), endpoint=False).astype(int))
        for row in some.to_pylist():
            self._learn(row, _PAST)
        return len(some)


def _prior_rows(prior: PriorConfig) -> list[tuple[float, ...]]:
    """Rows as the prior has them, ascending: steps and tokens a step independent, each a two-piece log-normal through
    its p10, p50 and p90."""
    steps = [_between(prior.steps, z) for z in _DRAWS]
    tokens = [_between(prior.tokens_per_step, z) for z in _DRAWS]
    return sorted((n * each, n, 0.0, -1.0, _PRIOR, 0.0) for n in steps for each in tokens)


def _between(p10_p50_p90: tuple[float, float, float], z: float) -> float:
    low, middle, high = (max(1.0, value) for value in p10_p50_p90)
    other = high if z > 0 else low
    return middle * (other / middle) ** (abs(z) / 1.2816)


def order(tasks: Tasks, forecaster: Forecaster, prompt_tokens: Mapping[str, int]) -> Iterator[tuple[Task, Forecast]]:
    """Tasks with their forecasts, largest first, so that no giant is left for the end; equals by row id.

    Args:
        prompt_tokens: by task id.
    """

    def forecast(task: Task) -> Forecast:
        return forecaster.forecast(task, prompt_tokens[task.task_id])

    sizes = np.fromiter(
        ((one.p95_tokens, one.p50_tokens) for one in map(forecast, tasks)), np.dtype((np.int64, 2)), len(tasks)
    )
    columns = {"p95": sizes[:, 0], "p50": sizes[:, 1], "place": np.arange(len(tasks))}
    keys = pa.table(columns | {"row_id": tasks.table["row_id"]})
    by_size = [("p95", "descending"), ("p50", "descending"), ("row_id", "ascending")]
    places = keys.sort_by(by_size)["place"].to_numpy()
    for start in range(0, len(places), PACK):
        yield from ((task, forecast(task)) for task in tasks.at(places[start : start + PACK]))

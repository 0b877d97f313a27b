"""Means with honest intervals, pass@k.

Follows Miller 2024, "Adding Error Bars to Evals" (arXiv 2411.00640). Pure functions over arrays; knows nothing of
tables, runs or suites. What cannot be known from so few values is None, not zero.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
from scipy import stats

Values = Sequence[float] | npt.NDArray[Any] | pd.Series
Clusters = Sequence[Any] | npt.NDArray[Any] | pd.Series
Floats = npt.NDArray[np.float64]
ROUNDING = 1e-12
"""A spread below this is rounding of values that are all the same."""


@dataclass(frozen=True, slots=True)
class Interval:
    """A mean and how sure it is.

    Attributes:
        mean: None without values.
        low, high: bounds of the confidence interval; None where there are too few values or clusters for one.
        se: standard error of the mean; None with fewer than two independent values.
        n: values.
        clusters: groups of values that are independent of each other; n where each value is its own.
        method: how the bounds were computed, in words.
    """

    mean: float | None
    low: float | None
    high: float | None
    se: float | None
    n: int
    clusters: int
    method: str
    confidence: float


def interval(
    values: Values,
    clusters: Clusters | None = None,
    *,
    confidence: float = 0.95,
) -> Interval:
    """Mean of a metric over rows, with a two-sided confidence interval.

    0/1 values get Wilson's interval (which stands at 0 % and 100 % too), others Student's t (cut to 0..1 where all
    values lie in there). Where rows share a
    cluster (samples of one task, questions on one document) the error is the clustered one, and 0/1 values get
    Wilson's interval at the effective sample size, adjusted for few clusters (Korn & Graubard 1998).

    Args:
        values: one per row, finite.
        clusters: one label per row; None where rows are independent.
        confidence: 0.95 for a 95 % interval.

    Raises:
        ValueError: a value is not finite, or the lengths differ.
    """
    x = _finite(values)
    codes, count = _codes(clusters, len(x))
    mean = float(x.mean()) if len(x) else None
    se = _standard_error(x, codes, count)

    def made(low: float | None, high: float | None, how: str) -> Interval:
        return Interval(mean, low, high, se, len(x), count, how, confidence)

    if mean is None:
        return made(None, None, "no values")
    if _is_binary(x):
        if count == len(x):
            bounds = stats.binomtest(int(x.sum()), len(x)).proportion_ci(confidence, method="wilson")
            return made(float(bounds.low), float(bounds.high), "Wilson")
        n = _effective_n(len(x), mean, se, count, confidence)
        return made(*_wilson(mean, n, confidence), "Wilson, clustered")
    if se is None:
        return made(None, None, "too few values")
    half = _t(count, confidence) * se
    low, high = mean - half, mean + half
    if x.min() >= 0 and x.max() <= 1:
        low, high = max(0.0, low), min(1.0, high)
    return made(low, high, "t" if count == len(x) else "t, clustered")


def pass_at_k(samples: Values, correct: Values, k: int) -> Floats:
    """Per task, the chance that at least one of k samples is right; NaN where a task has fewer than k.

    The unbiased estimator 1 − C(n−c, k)/C(n, k) of Chen et al. 2021 (arXiv 2107.03374), which is the upper tail of
    a hypergeometric distribution.

    Args:
        samples: samples drawn of each task.
        correct: of them right.
        k: at least 1.

    Raises:
        ValueError: k < 1, or more right than drawn.
    """
    n, c = _finite(samples), _finite(correct)
    if k < 1 or (c > n).any() or (c < 0).any():
        raise ValueError(f"pass@{k} wants k of at least 1 and 0 <= correct <= samples")
    enough = n >= k
    chance = np.full(len(n), np.nan)
    chance[enough] = stats.hypergeom.sf(0, n[enough], c[enough], k)
    return chance


def _finite(values: Values) -> Floats:
    x = np.asarray(values, dtype=np.float64)
    if not np.isfinite(x).all():
        raise ValueError("a value is not finite")
    return x


def _codes(clusters: Clusters | None, n: int) -> tuple[npt.NDArray[np.intp], int]:
    """Cluster number of each row, and how many there are."""
    if clusters is None:
        return np.arange(n), n
    if len(clusters) != n:
        raise ValueError(f"{len(clusters)} cluster labels for {n} values")
    codes, labels = pd.factorize(pd.Series(clusters), use_na_sentinel=False)
    return codes, len(labels)


def _is_binary(x: Floats) -> bool:
    return bool(np.isin(x, (0.0, 1.0)).all())


def _standard_error(x: Floats, codes: npt.NDArray[np.intp], count: int) -> float | None:
    """Of the mean; None with fewer than two clusters.

    Clustered: sqrt(G/(G−1) · Σ_g (Σ_{i∈g} (x_i − x̄))²) / n. Miller 2024, section 2.2, with the finite-sample
    factor G/(G−1) on the whole sum (CR1), which his form puts on its diagonal only: slightly wider with few
    clusters, and equal to s/√n, as his, where each row is its own cluster.
    """
    if count < 2:
        return None
    sums = np.bincount(codes, weights=x - x.mean(), minlength=count)
    return math.sqrt(count / (count - 1) * float(sums @ sums)) / len(x)


def _t(count: int, confidence: float) -> float:
    """Half width of a t interval in standard errors."""
    return float(stats.t.ppf((1 + confidence) / 2, count - 1))


def _wilson(mean: float, n: float, confidence: float) -> tuple[float, float]:
    """Wilson 1927 at a fractional n; scipy's takes whole counts only."""
    z = float(stats.norm.ppf((1 + confidence) / 2))
    centre = (mean + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(mean * (1 - mean) / n + z * z / (4 * n * n))
    return max(0.0, centre - half), min(1.0, centre + half)


def _effective_n(n: int, mean: float, se: float | None, count: int, confidence: float) -> float:
    """Independent values that would be as sure; never more than there are, and one a cluster where none vary."""
    if se is None or se < ROUNDING:
        return float(count)
    adjust = (_t(n, confidence) / _t(count, confidence)) ** 2
    return min(float(n), max(1.0, mean * (1 - mean) / se**2 * adjust))

"""Means with honest intervals, paired comparisons of two runs, pass@k.

Follows Miller 2024, "Adding Error Bars to Evals" (arXiv 2411.00640). Pure functions over arrays; knows nothing of
tables, runs or suites. What cannot be known from so few values is None, not zero.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pandas as pd
from scipy import stats

Values = Sequence[float] | npt.NDArray[Any] | pd.Series
Clusters = Sequence[Any] | npt.NDArray[Any] | pd.Series
Floats = npt.NDArray[np.float64]
SEED = 0
RESAMPLES = 9_999
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


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two runs on the same rows, b − a.

    Attributes:
        mean_a, mean_b: means over the shared rows; None without any.
        difference: its mean and interval.
        p_value: two-sided; None where no test is possible.
        test: which one, in words.
        only_a, only_b: rows where a, and where b, scored higher.
        correlation: Pearson's, of the paired scores; None where either does not vary.
    """

    mean_a: float | None
    mean_b: float | None
    difference: Interval
    p_value: float | None
    test: str
    only_a: int
    only_b: int
    correlation: float | None


def interval(
    values: Values,
    clusters: Clusters | None = None,
    *,
    confidence: float = 0.95,
    method: Literal["auto", "bootstrap"] = "auto",
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
        method: bootstrap resamples clusters (percentiles, seeded) in place of the above.

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
    if method == "bootstrap":
        return made(*_bootstrap(x, codes, count, confidence), "bootstrap")
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


def standard_error(values: Values, clusters: Clusters | None = None) -> float | None:
    """Standard error of the mean; None with fewer than two clusters.

    Clustered: sqrt(G/(G−1) · Σ_g (Σ_{i∈g} (x_i − x̄))²) / n. Miller 2024, section 2.2, with the finite-sample
    factor G/(G−1) on the whole sum (CR1), which his form puts on its diagonal only: slightly wider with few
    clusters, and equal to s/√n, as his, where each row is its own cluster.
    """
    x = _finite(values)
    return _standard_error(x, *_codes(clusters, len(x)))


def paired(
    a: Values,
    b: Values,
    clusters: Clusters | None = None,
    *,
    confidence: float = 0.95,
    test: Literal["auto", "permutation"] = "auto",
) -> Comparison:
    """Compare two runs row by row, which removes what the questions have in common (Miller 2024, section 4).

    auto takes McNemar's exact test for 0/1 values, else a t test of the differences, with the clustered error where
    there are clusters. permutation flips signs, cluster by cluster. The interval is always the differences' t.

    Args:
        a, b: scores of the same rows in the same order.
        clusters: one label per row; None where rows are independent.

    Raises:
        ValueError: lengths differ, or a value is not finite.
    """
    x, y = _finite(a), _finite(b)
    if len(x) != len(y):
        raise ValueError(f"{len(x)} and {len(y)} values cannot be paired")
    d = y - x
    codes, count = _codes(clusters, len(d))
    mean = float(d.mean()) if len(d) else None
    se = _standard_error(d, codes, count)
    half = None if se is None else _t(count, confidence) * se
    low, high = (None, None) if mean is None or half is None else (mean - half, mean + half)
    how = "too few values" if half is None else "t of differences" + ("" if count == len(d) else ", clustered")
    difference = Interval(mean, low, high, se, len(d), count, how, confidence)
    only_a, only_b = int((d < 0).sum()), int((d > 0).sum())
    binary = _is_binary(x) and _is_binary(y) and count == len(d)
    p_value, name = _test(d, codes, count, se, "permutation" if test == "permutation" else "mcnemar" if binary else "t")
    varies = len(d) > 1 and min(float(x.std()), float(y.std())) > ROUNDING
    return Comparison(
        mean_a=float(x.mean()) if len(x) else None,
        mean_b=float(y.mean()) if len(y) else None,
        difference=difference,
        p_value=p_value,
        test=name,
        only_a=only_a,
        only_b=only_b,
        correlation=float(np.corrcoef(x, y)[0, 1]) if varies else None,
    )


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


def _bootstrap(
    x: Floats, codes: npt.NDArray[np.intp], count: int, confidence: float
) -> tuple[float | None, float | None]:
    if count < 2:
        return None, None
    sums, sizes = np.bincount(codes, weights=x, minlength=count), np.bincount(codes, minlength=count)
    found = stats.bootstrap(
        (sums, sizes),
        lambda s, n, axis: s.sum(axis=axis) / n.sum(axis=axis),
        paired=True,
        vectorized=True,
        n_resamples=RESAMPLES,
        batch=max(1, 10_000_000 // count),
        confidence_level=confidence,
        method="percentile",
        rng=np.random.default_rng(SEED),
    )
    return float(found.confidence_interval.low), float(found.confidence_interval.high)


def _test(
    d: Floats, codes: npt.NDArray[np.intp], count: int, se: float | None, kind: Literal["mcnemar", "t", "permutation"]
) -> tuple[float | None, str]:
    """Two-sided p-value of a zero mean difference, and the test's name."""
    if not len(d):
        return None, "no rows"
    if kind == "mcnemar":
        discordant = int((d != 0).sum())
        p = stats.binomtest(int((d > 0).sum()), discordant, 0.5).pvalue if discordant else 1.0
        return float(p), "McNemar, exact"
    if count < 2 or se is None:
        return None, "too few values"
    sums = np.bincount(codes, weights=d, minlength=count)
    # t has no answer where all differences are one number; flipping signs has.
    if kind == "permutation" or se < ROUNDING:
        result = stats.permutation_test(
            (sums, np.zeros(count)),
            lambda s, zero, axis: (s - zero).sum(axis=axis),
            permutation_type="samples",
            vectorized=True,
            n_resamples=RESAMPLES,
            batch=max(1, 10_000_000 // count),
            rng=np.random.default_rng(SEED),
        )
        return float(result.pvalue), "permutation of signs" + ("" if count == len(d) else " by cluster")
    p = 2 * stats.t.sf(abs(float(d.mean())) / se, count - 1)
    return float(p), "paired t" + ("" if count == len(d) else ", clustered")

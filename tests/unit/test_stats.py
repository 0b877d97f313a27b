import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.stats import interval, paired, pass_at_k, standard_error

binary = st.lists(st.sampled_from([0.0, 1.0]), min_size=1, max_size=60)
scores = st.lists(st.floats(0, 1, allow_subnormal=False), min_size=2, max_size=40)


@pytest.mark.parametrize(
    ("right", "n", "low", "high"),
    [
        # Newcombe 1998, Statistics in Medicine 17, table I, method 3 (Wilson without continuity correction).
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_against_published_values(right, n, low, high):
    found = interval([1.0] * right + [0.0] * (n - right))
    assert (found.low, found.high) == (pytest.approx(low, abs=5e-5), pytest.approx(high, abs=5e-5))
    assert (found.mean, found.method) == (pytest.approx(right / n), "Wilson")


def test_too_few_values_are_said_to_be_so():
    none = interval([])
    assert (none.mean, none.low, none.high, none.se, none.n) == (None, None, None, None, 0)
    one = interval([0.5])
    assert (one.mean, one.low, one.high, one.se, one.n) == (0.5, None, None, None, 1)
    right = interval([1.0])
    assert right.low == pytest.approx(0.2065, abs=1e-4)
    assert right.high == 1.0
    assert interval([0.2, 0.4], ["a", "a"]).low is None
    same_cluster = interval([1.0, 1.0, 0.0], ["a", "a", "a"])
    assert same_cluster.high - same_cluster.low > 0.75


def test_t_interval_of_a_known_sample():
    # Student 1908, the extra hours of sleep: mean 1.58, s 1.230, t(9) = 2.262.
    sleep = [1.2, 2.4, 1.3, 1.3, 0.0, 1.0, 1.8, 0.8, 4.6, 1.4]
    found = interval(sleep)
    assert (found.mean, found.low, found.high) == pytest.approx((1.58, 0.70, 2.46), abs=5e-3)


@given(scores)
def test_clustered_equals_plain_where_clusters_are_singletons(values):
    plain = np.std(values, ddof=1) / math.sqrt(len(values))
    assert standard_error(values, range(len(values))) == pytest.approx(plain, abs=1e-12)
    assert interval(values, list(range(len(values)))) == interval(values)


@given(st.lists(st.tuples(st.floats(0, 1), st.integers(0, 9)), min_size=20, max_size=60))
def test_clustered_error_is_millers_up_to_the_small_sample_factor(pairs):
    x, group = np.array([value for value, _ in pairs]), np.array([label for _, label in pairs])
    n, count = len(x), len(set(group.tolist()))
    if count < 2:
        return
    d = x - x.mean()
    cross = sum(d[i] * d[j] for i, j in itertools.permutations(range(n), 2) if group[i] == group[j])
    diagonal = float((d**2).sum())
    ours = standard_error(x, group)
    assert ours**2 == pytest.approx(count / (count - 1) * (diagonal + cross) / n**2, abs=1e-12)


def test_duplicated_rows_add_no_certainty():
    values, twice = [0.0, 0.2, 0.9, 0.4], np.repeat([0.0, 0.2, 0.9, 0.4], 5)
    clusters = np.repeat(list("abcd"), 5)
    assert standard_error(twice, clusters) == pytest.approx(standard_error(values))
    right = interval(np.repeat([1.0, 0.0, 1.0, 1.0, 0.0, 1.0], 50), np.repeat(list("abcdef"), 50))
    alone = interval([1.0, 0.0, 1.0, 1.0, 0.0, 1.0])
    assert right.method == "Wilson, clustered"
    assert right.high - right.low >= alone.high - alone.low


@given(binary, st.integers(1, 5))
def test_a_binary_interval_stays_in_bounds_and_holds_the_mean(values, size):
    for clusters in (None, [i // size for i in range(len(values))]):
        found = interval(values, clusters)
        assert 0 <= found.low <= found.mean + 1e-12
        assert found.mean - 1e-12 <= found.high <= 1
        assert found.low < found.high


def test_intervals_cover():
    rng = np.random.default_rng(1)
    hits = {"plain": 0, "clustered": 0}
    for _ in range(400):
        plain = interval((rng.random(60) < 0.8).astype(float))
        hits["plain"] += plain.low <= 0.8 <= plain.high
        shared = np.repeat(rng.beta(2, 0.5, 30), 4)  # mean 0.8, strongly clustered
        clustered = interval((rng.random(120) < shared).astype(float), np.arange(120) // 4)
        hits["clustered"] += clustered.low <= 0.8 <= clustered.high
    assert hits["plain"] / 400 > 0.92
    assert hits["clustered"] / 400 > 0.91


def test_bootstrap_agrees_with_t_and_respects_clusters():
    x = np.random.default_rng(0).random(200)
    t, boot = interval(x), interval(x, method="bootstrap")
    assert (boot.low, boot.high) == pytest.approx((t.low, t.high), abs=0.01)
    assert boot == interval(x, method="bootstrap")
    wide = interval(np.repeat(x[:40], 5), np.repeat(np.arange(40), 5), method="bootstrap")
    assert (wide.low, wide.high) == pytest.approx((interval(x[:40]).low, interval(x[:40]).high), abs=0.02)
    assert interval([0.3], method="bootstrap").low is None
    assert interval([], method="bootstrap").mean is None


def test_what_cannot_be_averaged_is_refused():
    with pytest.raises(ValueError, match="finite"):
        interval([1.0, math.nan])
    with pytest.raises(ValueError, match="cluster"):
        interval([1.0, 0.0], ["a"])


def test_mcnemar():
    # 10 discordant, 8 to 2: two-sided binomial 2·(1+10+45)/1024.
    a = [1.0] * 2 + [0.0] * 8 + [1.0] * 20
    b = [0.0] * 2 + [1.0] * 8 + [1.0] * 20
    found = paired(a, b)
    assert (found.only_a, found.only_b, found.test) == (2, 8, "McNemar, exact")
    assert found.p_value == pytest.approx(112 / 1024)
    assert found.difference.mean == pytest.approx(0.2)
    assert paired(a, a).p_value == 1.0


def test_paired_t_of_a_known_sample():
    # Student 1908: dextro against laevo, t = 4.0621, p = 0.00283.
    dextro = [0.7, -1.6, -0.2, -1.2, -0.1, 3.4, 3.7, 0.8, 0.0, 2.0]
    laevo = [1.9, 0.8, 1.1, 0.1, -0.1, 4.4, 5.5, 1.6, 4.6, 3.4]
    found = paired(dextro, laevo)
    assert found.p_value == pytest.approx(0.00283, abs=1e-5)
    assert (found.difference.low, found.difference.high) == pytest.approx((0.70, 2.46), abs=5e-3)
    assert found.correlation == pytest.approx(0.7952, abs=1e-4)
    permuted = paired(dextro, laevo, test="permutation")
    assert permuted.test == "permutation of signs"
    assert permuted.p_value < 0.02


@given(scores, st.randoms(use_true_random=False))
def test_pairing_is_antisymmetric(values, random):
    other = [random.random() for _ in values]
    forth, back = paired(values, other), paired(other, values)
    assert forth.difference.mean == pytest.approx(-back.difference.mean)
    assert forth.p_value == pytest.approx(back.p_value)


def test_pairing_with_clusters_and_few_rows():
    a, b = np.tile([0.1, 0.5, 0.3, 0.2], 3), np.tile([0.2, 0.4, 0.6, 0.4], 3)
    labels = np.tile(list("abcd"), 3)
    assert paired(a, b, labels).p_value == pytest.approx(paired(a[:4], b[:4]).p_value)
    assert "cluster" in paired(a, b, labels).test
    assert "cluster" in paired(np.round(a), np.round(b), labels).test
    assert paired([], []).p_value is None
    assert paired([], []).mean_a is None
    assert paired([0.1], [0.3]).p_value is None
    assert paired([0.5, 0.5], [0.7, 0.7]).p_value == pytest.approx(0.5)  # signs: 2 of 4
    assert paired([0.1, 0.3, 0.6], [0.3, 0.5, 0.8]).p_value == pytest.approx(0.25)  # equal up to rounding
    with pytest.raises(ValueError, match="paired"):
        paired([1.0], [1.0, 0.0])


@settings(deadline=None)
@given(st.integers(1, 7), st.data())
def test_pass_at_k_against_brute_force(n, data):
    c, k = data.draw(st.integers(0, n)), data.draw(st.integers(1, n))
    draws = list(itertools.combinations([1] * c + [0] * (n - c), k))
    assert pass_at_k([n], [c], k)[0] == pytest.approx(sum(any(draw) for draw in draws) / len(draws))


def test_pass_at_k_where_it_is_not_known():
    assert pass_at_k([10, 2, 3], [3, 2, 0], 1) == pytest.approx([0.3, 1.0, 0.0])
    assert math.isnan(pass_at_k([10, 2], [3, 2], 5)[1])
    assert len(pass_at_k([], [], 1)) == 0
    with pytest.raises(ValueError, match="pass@0"):
        pass_at_k([1], [1], 0)
    with pytest.raises(ValueError, match="correct"):
        pass_at_k([1], [2], 1)


def test_the_interval_of_shares_stays_within_0_and_1():
    found = interval([0.0] * 19 + [0.9])
    assert found.low == 0.0
    assert found.high is not None
    assert found.high > 0.045
    assert interval([0.0] * 19 + [2.0]).low < 0

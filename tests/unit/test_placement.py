"""Placement: calibration, fairness, pools, fences, waits, and any order of events."""

import copy
import heapq
import time

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from actors.agent import Limits
from actors.errors import Fenced
from actors.messages import Ask, Forecast, Resident, Task
from actors.placement import (
    HORIZONS,
    LEVELS,
    Placement,
    Pool,
    demand,
    keeps,
    needed,
    overflow,
    quantiles_of,
    survival,
)
from pipeline.footprint import Forecaster
from pipeline.suite import PriorConfig

PAGE = 256
GROWTH = np.interp(LEVELS, (0, 0.5, 0.9, 1), (0, 2_000, 5_000, 9_000))


def forecast(prompt: int = 1_800, shared: int = 1_700, growth=GROWTH, steps: float = 4.0) -> Forecast:
    peaks = prompt + np.asarray(growth, float)
    return Forecast(prompt, shared, int(peaks[6]), int(peaks[11]), tuple(map(int, peaks[1:])), steps)


def ask(row_id: str, attempt: int = 1, suite: str = "s", tokens: int = 1_800, **more) -> Ask:
    return Ask(row_id, attempt, suite, more.pop("forecast", forecast()), tokens, **more)


def placement(*pages: int, page_tokens: int = PAGE, slots: int = 1_000, **options) -> Placement:
    made = Placement({"single": None}, **options)
    for i, number in enumerate(pages):
        made.replica_up("single", f"r{i}", number, page_tokens, slots)
    return made


def fill(made: Placement, prefix: str = "q", now_s: float = 0.0, **more) -> list[str]:
    """Ask until somebody has to wait; the rows with a home."""
    for i in range(10_000):
        made.ask(ask(f"{prefix}{i}", **more), now_s)
        made.place(now_s)
        if made.pools["single"].queued:
            return [row for row in made.where if made.lease(row) is not None]
    raise AssertionError("it never filled")


def test_pages_of_another_size_count_by_their_tokens():
    made = placement(100)
    made.replica_up("single", "other", 50, 2 * PAGE, 1_000)
    single = made.pools["single"]
    assert single.pages[single.index["other"]] == single.pages[single.index["r0"]] == 100


def test_survival_follows_the_quantiles():
    quantiles = np.array([quantiles_of(forecast())])
    found = survival(np.array([[0.0, *quantiles_of(forecast()), 1e6]]), quantiles)[0]
    assert found == pytest.approx([1.0, *(1 - np.array(LEVELS)), 0.0])


@pytest.mark.parametrize("pages", [130, 480, 1_450])
def test_a_full_replica_outgrows_its_pool_in_one_of_a_hundred_futures(pages):
    """Rows at random phases fill a pool; their futures are drawn from the very forecasts."""
    rng = np.random.default_rng(pages)
    exceeded, mean_peak = [], []
    for _ in range(10):
        pool = Pool("single", PAGE)
        pool.replica_up("r", pages, 10_000)
        row = None
        while not pool.queued:
            row = pool.take("s", 1, 0.0)
            pool.add(row, "s", [forecast()])
            if pool.place(0.0):
                steps = int(rng.integers(0, 6))
                pool.advance(row, np.array([1_800.0 + 500 * steps]), steps)
        rows = np.flatnonzero(pool.home >= 0)
        tokens, growth = pool.tokens[rows], (2 * pool.growth[rows] + pool.tokens[rows] - 1_800) / (2 + pool.steps[rows])
        past = 1 - survival(tokens[:, None], pool.quantiles[rows])[:, 0]
        drawn = past + (1 - past) * rng.random((500, len(rows)))
        peaks = 1_800 + np.interp(drawn, LEVELS, GROWTH)
        largest = np.zeros(500)
        for ahead in np.arange(0, 40, 0.5):
            size = tokens + growth * ahead
            own = np.maximum(np.ceil(size / PAGE) - 1_700 // PAGE, 1) * (peaks >= size)
            largest = np.maximum(largest, own.sum(1) + 1_700 // PAGE)
        exceeded.append((largest > pages).mean())
        mean_peak.append(largest.mean() / pages)
    assert np.mean(exceeded) <= 0.015  # 1 % and what 5,000 futures leave open
    assert np.mean(mean_peak) > 0.5


def test_the_bound_is_that_of_the_sum_s_distribution():
    def bound(mean: float, variance: float, third: float) -> float:
        return float(needed(np.rint(np.outer([mean, variance, third], np.ones(1)) * 256).astype(np.int64))[0])

    assert bound(10, 0, 0) == 10
    p, pages = 1e-4, 90  # ten rows, each of which comes to 90 pages once in 10,000 times: 0.1 % that any does
    assert bound(10 * p * pages, 10 * p * pages**2, 10 * p * pages**3) < 1
    drawn = np.random.default_rng(0).binomial(20, 0.2, 100_000) * 10.0
    found = bound(drawn.mean(), drawn.var(), ((drawn - drawn.mean()) ** 3).mean())
    assert np.quantile(drawn, 0.99) <= found <= np.quantile(drawn, 0.9995)


@pytest.mark.parametrize("limit", [60.0, 128.0, 700.0])
def test_rows_are_convolved_to_the_chance_that_drawn_sums_exceed(limit):
    rng = np.random.default_rng(int(limit))
    for _ in range(5):
        alive, pages = rng.random((12, 2)) ** 2, rng.integers(1, int(limit / 3), (12, 2)).astype(float)
        rows = np.stack([pages, alive], 1)
        drawn = ((rng.random((40_000, 12, 2)) < alive) * pages).sum(1)
        found = overflow(rows, np.zeros((3, 2), np.int64), limit)
        assert found == pytest.approx((drawn > limit).mean(0).max(), abs=0.01 if limit <= 128 else 0.03)


def test_other_rows_shift_and_spread_what_is_convolved():
    rows = np.array([[[90.0], [0.02]]])
    still = demand(np.array([[[20.0], [1.0]]])).sum(0)
    assert overflow(rows, still, 100.0) == pytest.approx(0.02, abs=1e-6)
    assert overflow(rows, still, 110.0) == pytest.approx(0.0, abs=1e-6)
    many = demand(np.array([[[2.0], [0.5]]] * 20)).sum(0)  # 20 ± 4.5 pages
    half = 0.02 * (np.random.default_rng(0).binomial(20, 0.5, 100_000) * 2 > 20).mean()
    assert overflow(rows, many, 110.0) == pytest.approx(half, abs=0.001)


@pytest.mark.parametrize(("chance", "takes"), [(0.02, False), (0.005, True)])
def test_a_row_that_fills_the_pool_in_two_of_a_hundred_cases_waits(chance, takes):
    """The gamma distribution alone lets it in: it has a quarter of the giant's pages."""
    made = placement(110)
    sure = forecast(shared=0, growth=np.interp(LEVELS, (0, 1), (3_300, 3_310)), steps=1.0)  # 20 pages
    made.ask(ask("sure", forecast=sure), 0.0)
    giant = np.interp(LEVELS, (0, 1 - chance - 0.001, 1 - chance, 1), (0, 300, 23_000, 24_000))
    giant = forecast(prompt=400, shared=0, growth=giant, steps=1.0)
    pool = made.pools["single"]
    made.place(0.0)
    made.ask(ask("giant", tokens=400, forecast=giant), 0.0)
    rows = np.array([pool.slot["sure"], pool.slot["giant"]])
    pool.outlook[rows] = np.stack([np.full((2, len(HORIZONS)), [[20.0], [91.0]]), np.ones((2, len(HORIZONS)))], 1)
    pool.outlook[rows[1], 1] = chance
    before = pool.cumulants[rows[0]].copy()
    pool.cumulants[rows] = demand(pool.outlook[rows])
    pool.charged[0] += pool.cumulants[rows[0]] - before
    assert needed(pool.cumulants[rows].sum(0)).max() < 110
    assert made.place(1.0) == (["giant"] if takes else [])


@pytest.mark.parametrize("pages", [70, 110])
def test_pools_of_few_and_nearly_certain_rows_stay_within(pages):
    """Of one row in five, two in a hundred go on for ten times as long; the others end where all do."""
    rng = np.random.default_rng(pages)
    ends, goes_on = np.interp(LEVELS, (0, 0.01, 1), (0, 1_500, 1_510)), (0, 0.01, 0.979, 0.981, 1)
    goes_on = np.interp(LEVELS, goes_on, (0, 1_500, 1_510, 9_000, 15_000))
    for _ in range(10):
        pool = Pool("single", PAGE)
        pool.replica_up("r", pages, 10_000)
        while not pool.queued:
            row = pool.take("s", 1, 0.0)
            prompt, steps = int(rng.integers(300, 900)), int(rng.integers(0, 4))
            pool.add(row, "s", [forecast(prompt, 0, goes_on if rng.random() < 0.2 else ends)])
            pool.advance(row, np.array([prompt + 375.0 * steps]), steps)
            pool.place(0.0)
        rows = np.flatnonzero(pool.home >= 0)
        pages_BH, alive_BH = pool.outlook[rows, 0], pool.outlook[rows, 1]
        drawn = ((rng.random((20_000, len(rows), 1)) < alive_BH) * pages_BH).sum(1)
        assert (drawn > pages).mean(0).max() <= 0.013  # 1 % and what 20,000 futures leave open


def test_a_row_that_gets_a_new_home_while_it_waits_has_waited_since_its_answer():
    made = placement(90, 90)
    made.ask(ask("a"), 0.0)
    made.place(0.0)
    made.replied("a", 1, 1_900, 1.0)
    made.replied("a", 1, 1_900, 2.0)  # said again
    made.pools["single"].replica_down(made.lease("a").replica)
    made.place(50.0)
    made.ask(ask("a", tokens=2_000, home=made.lease("a").replica), 61.0)
    assert list(made.pools["single"].past_waits["s"]) == [60.0]


@pytest.mark.parametrize("pause_s", [0.0, 3.0])
@pytest.mark.parametrize("apart_s", [0.002, 0.02, 0.2])
def test_rows_that_are_all_alike_stay_within_their_pools(apart_s, pause_s):
    """Three calls each, of which the last adds less, nearly in step; a call holds what it comes to generate. Four
    agents learn how long the rows are, as in tests/integration/test_ledger.py. A ledger that restarts lets nobody in
    for a while, and then many at once."""
    generated, observed, pages = (19, 19, 17), 18, (60, 80, 100, 120)
    prior = PriorConfig(steps=(3, 3, 3), tokens_per_step=(30, 40, 50))
    for seed in range(5):
        rng = np.random.default_rng(seed)
        made = placement(*pages, page_tokens=16)
        agents = [Forecaster(Limits(5, 500, 8_192, 24), 5, prior) for _ in range(4)]
        to_come = [list(range(agent, 160, 4)) for agent in range(4)]
        prompt = rng.integers(13, 16, 160).tolist()
        tokens, step, forecasts = prompt.copy(), [0] * 160, {}
        held: list[dict[int, int]] = [{} for _ in pages]
        asking, ended = set(), 0
        events = [(rng.random() * 0.002, "begins", n % 4) for n in range(64)] + [(2.5 + pause_s, "goes on", 0)]
        heapq.heapify(events)
        while events:
            now_s, what, n = heapq.heappop(events)
            if what == "begins" and to_come[n]:
                n = to_come[n].pop(0)
                forecasts[n] = agents[n % 4].forecast(Task(f"{n}", 0, "", (), {}, {}, 0), prompt[n])
                what = "asks"
            if what == "answered":
                tokens[n] += generated[step[n]]
                made.replied(f"{n}", 1, tokens[n], now_s)
                step[n] += 1
                if step[n] < 3:
                    tokens[n] += observed
                    heapq.heappush(events, (now_s + rng.random() * 0.004, "asks", n))
                else:
                    held[int(made.lease(f"{n}").replica[1:])].pop(n)
                    made.end(f"{n}", 1)
                    row = {"row_id": f"{n}", "prompt_tokens": prompt[n], "peak_tokens": tokens[n], "num_steps": 3}
                    agents[n % 4].observe(row | {"error_type": None, "metadata": {}})
                    heapq.heappush(events, (now_s, "begins", n % 4))
                    ended += 1
            elif what == "asks":
                made.ask(ask(f"{n}", tokens=tokens[n], forecast=forecasts[n]), now_s)
                asking.add(n)
            if not 2.5 < now_s < 2.5 + pause_s:
                made.place(now_s)
            for row in [row for row in asking if made.lease(f"{row}") is not None]:
                asking.remove(row)
                if not step[row]:
                    agents[row % 4].begin(f"{row}")
                home = int(made.lease(f"{row}").replica[1:])
                held[home][row] = -(-(tokens[row] + generated[step[row]]) // 16)
                assert sum(held[home].values()) <= pages[home]
                heapq.heappush(events, (now_s + 0.5 + rng.random() * apart_s, "answered", row))
        assert ended == 160


def test_rows_that_have_fallen_silent_keep_their_pages():
    """As when their agent has died: their pages stay until somebody takes them over, which may be long after."""
    sharp = forecast(14, 0, np.interp(LEVELS, (0, 0.01, 0.99, 1), (0, 90, 92, 480)), 3)
    made = placement(24, page_tokens=16)
    for row, begun_s in [(f"past{i}", i / 4) for i in range(40)]:
        made.ask(ask(row, tokens=14, forecast=sharp), begun_s)
        made.place(begun_s)
        made.replied(row, 1, 33, begun_s + 0.5 + 0.01 * (begun_s % 1))
        made.end(row, 1)
    for row in ("a", "b"):
        for tokens, begun_s in ((14, 10.0), (51, 10.5), (88, 11.0)):
            made.ask(ask(row, tokens=tokens, forecast=sharp), begun_s)
            made.place(begun_s)
            if tokens < 88:
                made.replied(row, 1, tokens + 19, begun_s + 0.5)
    made.ask(ask("next", tokens=14, forecast=sharp), 11.3)
    before = copy.deepcopy(made)
    assert before.place(11.3) == ["next"], "their last call ends with this step"
    assert made.place(12.0) == [], "it should have ended long ago"
    made.ask(ask("a", attempt=2, tokens=14, forecast=sharp), 20.0)
    made.end("b", 1)
    assert made.place(20.1) == ["next"]


@pytest.mark.parametrize("pages", [24, 30, 36, 42, 60])
def test_an_idle_replica_takes_any_row_that_it_may_hold_at_once(pages):
    """However probable it is that the row outgrows the pool: there is nobody whom it could crowd out."""
    made = placement(pages, slots=4)
    made.ask(ask("giant"), 0.0)
    made.place(0.0)
    assert made.lease("giant").replica == "r0"


def test_the_shared_prompt_is_counted_once():
    alone = len(fill(placement(400), forecast=forecast(shared=0)))
    shared = len(fill(placement(400), forecast=forecast(shared=1_700)))
    assert shared > 1.3 * alone


def test_an_engine_without_pages_is_placed_by_slots():
    made = placement(0, 0, page_tokens=0, slots=10)
    assert len(fill(made)) == 20
    assert set(made.pools["single"].residents[:2].tolist()) == {10}


def test_asking_again_changes_nothing_and_a_higher_attempt_fences():
    made = placement(400, 400)
    made.ask(ask("a"), 0.0)
    made.place(0.0)
    first = made.lease("a")
    assert first is not None
    assert made.ask(ask("a"), 1.0) == first
    charged = made.pools["single"].charged.copy()
    second = made.ask(ask("a", attempt=2), 2.0)
    assert second is not None
    assert (second.replica, second.attempt) == (first.replica, 2)
    assert (made.pools["single"].charged == charged).all()
    with pytest.raises(Fenced, match="attempt 2 of a"):
        made.ask(ask("a"), 3.0)
    made.end("a", 1)
    assert made.lease("a") == second
    made.end("a", 2)
    assert not made.pools["single"].charged.any()


@pytest.mark.parametrize("attempt", [1, 2])
def test_a_failed_home_is_avoided(attempt):
    made = placement(400, 400)
    made.ask(ask("a"), 0.0)
    made.place(0.0)
    home = made.lease("a").replica
    made.ask(ask("a", attempt=attempt, avoid=home), 1.0)
    made.place(1.0)
    assert made.lease("a").replica not in (None, home)


@pytest.mark.parametrize("others", [(), (10,)])
def test_a_failed_home_is_taken_again_where_no_other_could_ever_do(others):
    made = placement(400, *others)
    made.ask(ask("a"), 0.0)
    made.place(0.0)
    assert made.ask(ask("a", avoid="r0"), 1.0) is None
    made.place(1.0)
    assert made.lease("a").replica == "r0"


def test_what_takes_the_place_of_a_failed_home_is_not_avoided():
    made = placement(400)
    fill(made)
    made.ask(ask("q0", avoid="r0"), 1.0)
    made.pools["single"].replica_down("r0")
    made.replica_up("single", "r1", 400, PAGE, 1_000)
    made.replica_up("single", "r2", 10, PAGE, 1_000)
    made.place(2.0)
    assert made.lease("q0").replica == "r1"


def test_an_answer_that_arrives_after_the_next_call_says_nothing():
    made = placement(400)
    made.ask(ask("a"), 0.0)
    made.place(0.0)
    made.ask(ask("a", tokens=2_500), 2.0)
    before = made.pools["single"].charged.copy()
    made.replied("a", 1, 2_000, 3.0)
    assert (made.pools["single"].charged == before).all()
    assert not made.pools["single"].waits[made.pools["single"].slot["a"]]


def test_the_largest_goes_first_until_a_small_one_has_waited():
    def order(small_asked_s: float) -> list[str]:
        made = placement(200, aging_s=100.0)
        rows = fill(made)
        waiting = next(row for row in made.where if row not in rows)
        made.end(waiting, 1)
        made.ask(ask("small", forecast=forecast(growth=GROWTH / 4)), small_asked_s)
        made.ask(ask("large", forecast=forecast(growth=GROWTH)), 1_000.0)
        for row in rows:
            made.end(row, 1)
        return made.place(1_000.0)

    assert order(1_000.0) == ["large", "small"]
    assert order(500.0) == ["small", "large"]


def test_a_giant_gets_its_turn_among_small_ones():
    made = placement(300, 300, aging_s=10.0)
    small = {"forecast": forecast(growth=GROWTH / 10)}
    rows = fill(made, **small)
    giant = forecast(growth=np.interp(LEVELS, (0, 1), (55_000, 60_000)))
    made.ask(ask("giant", forecast=giant), 0.0)
    now_s, number = 0.0, 0
    while made.lease("giant") is None:
        now_s += 1.0
        assert now_s < 400
        for row in rows[:2]:
            made.end(row, 1)
        for _ in range(8):
            number += 1
            made.ask(ask(f"more{number}", **small), now_s)
        made.place(now_s)
        rows = [row for row in made.where if row != "giant" and made.lease(row) is not None]
    assert now_s > 10


def test_suites_share_by_pages():
    made = placement(2_000)
    pages = {"a": 0.0, "b": 0.0}
    for i in range(600):
        made.ask(ask(f"a{i}", suite="a"), 0.0)
    for i in range(600):
        made.ask(ask(f"b{i}", suite="b", forecast=forecast(growth=GROWTH * 3)), 0.0)
    made.place(0.0)
    pool = made.pools["single"]
    for row in pool.slot.values():
        if pool.home[row] >= 0:
            pages[pool.suite[row]] += pool.cumulants[row, 0].max() / 256
    assert pages["a"] == pytest.approx(pages["b"], rel=0.2)


def test_a_dead_replica_s_rows_get_another_home():
    made = placement(300, 2_000)
    for i in range(20):
        made.ask(ask(f"q{i}"), 0.0)
    made.place(0.0)
    made.pools["single"].replica_down("r1")
    made.place(1.0)
    homes = {made.lease(row).replica for row in made.where if made.lease(row)}
    assert homes == {"r0"}
    made.replica_up("single", "r2", 2_000, PAGE, 100)
    made.place(2.0)
    assert all(made.lease(row) is not None for row in made.where)


def test_a_ledger_is_rebuilt_from_reports_and_asks_in_any_order():
    before = placement(400, 400)
    rows = fill(before)
    homes = {row: before.lease(row).replica for row in rows}
    for first in ("reports", "agents"):
        after = placement()
        if first == "agents":
            for row in rows:
                after.ask(ask(row, home=homes[row]), 0.0)
        for replica in ("r0", "r1"):
            assert after.replica_up("single", replica, 400, PAGE, 1_000)
            held = tuple(Resident(row, "s", 1_800) for row in rows if homes[row] == replica)
            after.adopt("single", replica, held, 0.0)
            assert not after.replica_up("single", replica, 400, PAGE, 1_000)
        for row in rows:
            assert after.ask(ask(row, home=homes[row]), 1.0).replica == homes[row]
        assert (np.sort(after.pools["single"].residents) == np.sort(before.pools["single"].residents)).all()
        for row in rows:
            after.end(row, 1)
        assert not after.pools["single"].charged.any()


def test_what_nobody_renews_expires():
    made = placement(400, lease_s=10.0)
    rows = fill(made)
    made.ask(ask(rows[0]), 9.0)
    gone = dict(made.expire(10.0))
    assert rows[0] not in gone
    assert {row for row, home in gone.items() if home == "r0"} == set(rows[1:])
    assert made.pools["single"].residents.sum() == 1


def test_the_pool_is_chosen_by_capacity_and_started_from_zero():
    made = Placement({"single": None, "sharded": None})
    huge = forecast(growth=np.interp(LEVELS, (0, 1), (50_000, 60_000)))
    early = [made.ask(ask(f"e{i}", forecast=huge), 0.0) for i in range(10)]
    assert [lease and (lease.pool, lease.replica, lease.fits) for lease in early] == 8 * [("single", None, True)] + [
        None
    ] * 2, "what a pool holds shows when it has started, and calls start the first"
    made.replica_up("single", "r0", 100, PAGE, 50)
    assert [made.ask(ask(f"h{i}", forecast=huge), 0.0) for i in range(10)] == [None] * 10
    assert {made.where[f"h{i}"][0].name for i in range(10)} == {"sharded"}
    made.replica_up("sharded", "g0", 1_000, PAGE, 50)
    made.place(1.0)
    assert made.lease("h0").replica == "g0"
    made.pools["sharded"].replica_down("g0")
    made.ask(ask("again", forecast=huge), 1.0)
    assert made.where["again"][0].name == "sharded", "what a pool held is remembered"
    made.replica_up("sharded", "g0", 1_000, PAGE, 50)
    monster = forecast(growth=np.interp(LEVELS, (0, 1), (400_000, 500_000)))
    made.ask(ask("m", forecast=monster), 2.0)
    for i in range(10):
        made.end(f"h{i}", 1)
    made.place(2.0)
    lease = made.lease("m")
    assert (lease.pool, lease.replica, lease.fits) == ("sharded", "g0", False)


def test_pages_are_kept_while_the_wait_to_come_is_shorter_than_a_refill():
    past = np.sort(np.concatenate([np.full(90, 1.0), np.linspace(60, 300, 30)]))
    assert keeps(np.array([0.0, 2.0]), past, 50.0).tolist() == [True, False]
    few = np.array([1.0, 2.0])
    assert keeps(np.array([5.0, 50.0]), few, 20.0).tolist() == [True, False]
    assert keeps(np.array([1e6]), few, np.inf).all()


def test_a_row_whose_tool_takes_long_makes_room_under_pressure_and_comes_back():
    made = placement()
    made.replica_up("single", "r0", 400, PAGE, 1_000, refill_s=10.0)
    rows = fill(made)
    for row in rows[:5]:
        made.replied(row, 1, 2_500, 0.0)
    assert made.place(5.0) == []
    taken = made.place(60.0)
    assert taken
    assert all(made.lease(row) is None for row in rows[:5])
    for row in rows[5:]:
        made.end(row, 1)
    assert made.ask(ask(rows[0], tokens=2_600, home="r0"), 61.0) is None
    assert rows[0] in made.place(61.0)


def test_two_thousand_decisions_a_second_over_a_thousand_replicas():
    made = placement(*[400] * 1_000)
    for i in range(500):
        made.ask(ask(f"w{i}"), 0.0)
        made.place(0.0)
    rounds_s = []  # on an idle core: neighbours slow the squares beside a round as much as the round
    for at in range(0, 2_000, 500):
        started_s = time.process_time()
        for i in range(at, at + 500):
            made.end(f"w{i}", 1)
            made.ask(ask(f"w{i + 500}"), 0.0)
            made.place(0.0)
        taken_s = time.process_time() - started_s
        rounds_s.append(taken_s * 0.06 / max(0.06, min(squares_s() for _ in range(3))))
    assert 4 * min(rounds_s) < 1.0


def squares_s() -> float:
    """Seconds for the squares of a million numbers: 0.06 on an idle core of 2023, 0.11 where neighbours share it."""
    started_s = time.process_time()
    sum(i * i for i in range(1_000_000))
    return time.process_time() - started_s


class Events(RuleBasedStateMachine):
    """Any order of asks, answers, ends, deaths and restarts of the ledger, beside a record of who holds what."""

    def __init__(self):
        super().__init__()
        self.now_s = 0.0
        self.made = Placement({"single": None}, lease_s=100.0, aging_s=5.0)
        self.pages: dict[str, int] = {}
        self.rows: dict[str, tuple[int, int]] = {}  # attempt and tokens of rows that are not over
        self.homes: dict[str, str] = {}  # where their pages are
        self.number = 0

    def see(self):
        self.made.place(self.now_s)
        for row in list(self.rows):
            lease = self.made.lease(row)
            if lease is not None and lease.replica is not None:
                assert lease.replica in self.pages
                self.homes[row] = lease.replica

    def call(self, row):
        attempt, tokens = self.rows[row]
        self.made.ask(ask(row, attempt, row[0], tokens, home=self.homes.get(row)), self.now_s)

    @rule(suite=st.sampled_from("ab"))
    def begin(self, suite):
        row = f"{suite}{self.number}"
        self.number += 1
        self.rows[row] = (1, 1_800)
        self.call(row)
        self.see()

    @precondition(lambda self: self.rows)
    @rule(i=st.integers(0, 50), grown=st.integers(1, 3_000))
    def step(self, i, grown):
        row = list(self.rows)[i % len(self.rows)]
        attempt, tokens = self.rows[row]
        self.rows[row] = (attempt, tokens + grown)
        self.made.replied(row, attempt, tokens + grown // 2, self.now_s)
        self.now_s += 1.0
        self.call(row)
        self.see()

    @precondition(lambda self: self.rows)
    @rule(i=st.integers(0, 50))
    def next_attempt(self, i):
        row = list(self.rows)[i % len(self.rows)]
        attempt, _ = self.rows[row]
        self.rows[row] = (attempt + 1, 1_800)
        self.call(row)
        with pytest.raises(Fenced):
            self.made.ask(ask(row, attempt, row[0]), self.now_s)
        self.see()

    @precondition(lambda self: self.rows)
    @rule(i=st.integers(0, 50))
    def over(self, i):
        row = list(self.rows)[i % len(self.rows)]
        attempt, _ = self.rows.pop(row)
        self.homes.pop(row, None)
        self.made.end(row, attempt)
        self.see()

    @precondition(lambda self: len(self.pages) < 4)
    @rule(pages=st.integers(20, 200))
    def replica_joins(self, pages):
        name = f"r{self.number}"
        self.number += 1
        self.pages[name] = pages
        self.made.replica_up("single", name, pages, PAGE, 6)
        self.see()

    @precondition(lambda self: self.pages)
    @rule(i=st.integers(0, 4))
    def replica_dies(self, i):
        name = list(self.pages)[i % len(self.pages)]
        del self.pages[name]
        self.made.pools["single"].replica_down(name)
        self.homes = {row: home for row, home in self.homes.items() if home != name}
        self.see()

    @rule(agents_first=st.booleans())
    def ledger_dies(self, agents_first):
        self.made = Placement({"single": None}, lease_s=100.0, aging_s=5.0)
        if agents_first:
            for row in self.rows:
                self.call(row)
        for name, pages in self.pages.items():
            assert self.made.replica_up("single", name, pages, PAGE, 6)
            held = [Resident(row, row[0], self.rows[row][1]) for row, home in self.homes.items() if home == name]
            self.made.adopt("single", name, held, self.now_s)
        for row in self.rows:
            self.call(row)
        for row, home in self.homes.items():
            assert self.made.lease(row).replica == home
        self.see()

    @rule()
    def time_passes(self):
        self.now_s += 30.0
        gone = [row for row, _ in self.made.expire(self.now_s)]
        for row in gone:
            assert self.made.lease(row) is None
            self.call(row)
        self.see()

    @invariant()
    def what_is_charged_is_what_the_residents_need(self):
        pool = self.made.pools["single"]
        for name in self.pages:
            r = pool.index[name]
            here = np.flatnonzero(pool.home == r)
            assert (pool.charged[r] == pool.cumulants[here].sum(0)).all()
            assert pool.residents[r] == len(here)
            prefixes = set(pool.prefix[here].tolist())
            assert pool.shared[r] == sum(pool.prefix_pages[p] for p in prefixes)
        assert pool.queued == sum(ticket > 0 for ticket in pool.ticket)
        assert set(pool.slot) == set(self.made.where)

    def teardown(self):
        for row, (attempt, _) in self.rows.items():
            self.made.end(row, attempt)
        pool = self.made.pools["single"]
        assert not pool.charged.any()
        assert not pool.shared.any()
        assert not pool.residents.any()
        assert not pool.queued
        assert not pool.held
        assert not self.made.where


TestEvents = Events.TestCase
TestEvents.settings = settings(max_examples=60, stateful_step_count=40, deadline=None, derandomize=True)


def test_what_rows_have_come_to_hold_is_charged_before_others_are_let_in():
    made = placement(200)
    row_id, *_ = fill(made)
    pool = made.pools["single"]
    row, before = pool.slot[row_id], pool.charged[0, 0, 0]
    made.replied(row_id, 1, 5_000, 1.0)
    made.ask(ask(row_id, tokens=6_000), 1.0)
    made.place(1.0)
    charged, held = pool.charged[0, 0, 0], pool.cumulants[row].copy()
    pool.measure(np.array([row]))
    assert (held == pool.cumulants[row]).all()
    assert charged > before
    made.replied(row_id, 1, 9_000, 2.0)
    assert made.pools["single"].charged_pages()["r0"] > charged / 256 + pool.shared[0]

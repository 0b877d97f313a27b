"""The ledger without Ray: batches of requests, waits, fences, and what homes are told to free."""

import asyncio
from types import SimpleNamespace

import pytest

from actors.engine.protocol import Capacity
from actors.errors import Fenced, OutOfMemory
from actors.ledger import Leased, Ledger, Report, Reporter
from actors.messages import Call, Sampling, Turn, Usage
from actors.placement import LEVELS
from pipeline.batched import Batched
from tests.unit.test_placement import PAGE, ask, forecast

ROOM_FOR_ONE = Report("single", "r0", 50, PAGE, 1)


async def ledger(*reports: Report) -> Ledger:
    made = Ledger({"single": None})
    for report in reports:
        await made.report(report)
    return made


async def test_a_batch_is_answered_at_once_and_in_order():
    made = await ledger(ROOM_FOR_ONE)
    first, waits, again = await made.do([("ask", (ask("a"),)), ("ask", (ask("b"),)), ("ask", (ask("a"),))])
    assert (first.replica, waits, again) == ("r0", None, first)
    answers = await made.do([("replied", ("a", 1, 1_900)), ("end", ("a", 1)), ("ask", (ask("b"),))])
    assert answers[:2] == [None, None]
    assert answers[2].replica == "r0"


async def test_a_fenced_request_disturbs_no_other():
    made = await ledger(ROOM_FOR_ONE)
    await made.do([("ask", (ask("a", attempt=2),))])
    fenced, ended, lease = await made.do([("ask", (ask("a"),)), ("end", ("a", 1)), ("ask", (ask("a", attempt=2),))])
    assert isinstance(fenced, Fenced)
    assert (ended, lease.attempt) == (None, 2)


def batched(made: Ledger) -> Batched:
    async def send(requests):
        yield enumerate(await made.do(requests))

    return Batched(send, 0.001)


async def test_one_that_waits_gets_its_lease_when_another_ends():
    made = await ledger(ROOM_FOR_ONE)
    actor = SimpleNamespace(acquire=SimpleNamespace(remote=made.acquire))
    send = batched(made)
    first, second = Leased(actor, send, "a", "s"), Leased(actor, send, "b", "s")
    await first.acquire(1, forecast(), 1_800)
    waiting = asyncio.create_task(second.acquire(1, forecast(), 1_800))
    await asyncio.sleep(0.05)
    assert not waiting.done()
    first.answered(1_900, "r0")
    await send(("end", ("a", 1)))
    assert (await waiting).replica == "r0"
    await send(("ask", (ask("b", attempt=2),)))
    with pytest.raises(Fenced):
        await second.acquire(1, forecast(), 1_900)
    await send(("end", ("b", 2)))
    state = await made.state()
    assert (state["leases"], state["charged_pages"], state["homes"]) == (0, {"r0": 0.0}, {})


async def test_homes_are_told_to_free_what_has_ended_or_moved():
    made = await ledger(Report("single", "r0", 90, PAGE, 9), Report("single", "r1", 80, PAGE, 9))
    [lease] = await made.do([("ask", (ask("a"),))])
    assert lease.replica == "r0"
    [lease] = await made.do([("ask", (ask("a", avoid="r0"),))])
    assert lease.replica == "r1"
    await made.do([("end", ("a", 1))])
    assert [(await made.report(Report("single", name, 90, PAGE, 9))).end for name in ("r0", "r1")] == [("a",), ("a",)]


async def test_what_happened_in_engines_is_counted_by_pool_also_of_those_that_are_gone(monkeypatch):
    monkeypatch.setattr("actors.ledger.REPORT_S", 0.01)
    told = [("r0", {"oom_prefill": 1}), ("r0", {"oom_prefill": 2, "waits": 0}), ("r1", {"oom_prefill": 3, "errors": 1})]
    made = await ledger(*(Report("single", name, 90, PAGE, 9, events=events) for name, events in told))
    assert await made.events() == {"single": {"oom_prefill": 5, "errors": 1}}


async def test_what_happened_in_the_last_second_is_waited_for(monkeypatch):
    monkeypatch.setattr("actors.ledger.REPORT_S", 0.2)
    made = await ledger(Report("single", "r0", 90, PAGE, 9))
    asked = asyncio.create_task(made.events())
    await asyncio.sleep(0.15)
    await made.report(Report("single", "r0", 90, PAGE, 9, events={"culprits": 1}))
    assert await asked == {"single": {"culprits": 1}}


async def test_a_replica_says_what_it_holds_and_frees_what_it_is_told_to(monkeypatch):
    made, ended = await ledger(), []
    sizes = Capacity(8192, 8, pages_total=50, page_tokens=PAGE)
    engine = SimpleNamespace(capacity=lambda: sizes, events={"preemptions": 1}, end=ended.append)
    monkeypatch.setattr("actors.ledger.find", lambda _: SimpleNamespace(report=SimpleNamespace(remote=made.report)))
    monkeypatch.setattr("actors.ledger.REPORT_S", 0.01)
    reporter = Reporter("name", "single", "r0", engine)
    for row in "ab":
        call = Call(row, (0,) * 1_800, Turn(()), Sampling(), "s", "r0")
        with reporter.call(call):
            pass
        reporter.answered(call, Usage(prompt_tokens=1_800, generated=100))
    reporter.start()
    await asyncio.sleep(0.1)
    assert (await made.state())["homes"] == {"a": "r0", "b": "r0"}
    await made.do([("end", ("a", 1))])
    await asyncio.sleep(0.1)
    assert ended == ["a"]
    assert list(reporter.residents) == ["b"]


def test_a_pool_is_refilled_at_the_rate_of_the_device_not_of_each_row():
    sizes = Capacity(8192, 8, pages_total=50, page_tokens=PAGE)
    reporter = Reporter("name", "single", "r0", SimpleNamespace(capacity=lambda: sizes, events={}))
    call = Call("a", (0,) * 2_000, Turn(()), Sampling(), "s", "r0")
    assert reporter.report().refill_s == float("inf")
    for _ in range(8):  # in one step of 0.8 s
        reporter.answered(call, Usage(2_000, 2_000, prefill_s=0.8, gpu_s=0.2, prefill_gpu_s=0.1))
    assert reporter.report().refill_s == pytest.approx(50 * PAGE / 20_000)


async def test_rows_go_on_without_a_pool_that_cannot_start():
    """Those that were sent there by the fallback are told; those that only might outgrow the smaller one stay in it."""
    made = Ledger({"single": None, "pair": None}, dead_s=60.0)
    await made.report(Report("single", "r0", 20, PAGE, 9))
    giant = forecast(growth=[100_000] * len(LEVELS))
    actor = SimpleNamespace(acquire=SimpleNamespace(remote=made.acquire))
    leases = {pool: Leased(actor, batched(made), f"{pool}", "s") for pool in ("pair", None)}
    waiting = {pool: asyncio.create_task(one.acquire(1, giant, 1_800, pool)) for pool, one in leases.items()}
    await asyncio.sleep(0.05)
    assert (await made.pools())["pair"][0] == 2
    await made.close("pair", OutOfMemory("no node is as large", "load"))
    with pytest.raises(OutOfMemory, match="no node is as large"):
        await waiting["pair"]
    lease = await waiting[None]
    assert (lease.pool, lease.replica, lease.fits) == ("single", "r0", False)
    assert [rows for rows, _, _ in (await made.pools()).values()] == [1, 0]


async def test_a_fenced_attempt_does_not_hear_of_a_closed_pool(monkeypatch):
    made = await ledger(ROOM_FOR_ONE)
    await made.close("pair", OutOfMemory("no node is as large", "load"))
    await made.do([("ask", (ask("a", attempt=2),))])
    waits = asyncio.create_task(made.acquire(ask("b", attempt=2)))
    await asyncio.sleep(0.05)
    for row in "ab":
        [fenced] = await made.do([("ask", (ask(row, pool="pair"),))])
        assert isinstance(fenced, Fenced)
    await made.do([("end", ("b", 1)), ("end", ("a", 2))])
    assert (await asyncio.wait_for(waits, 1)).replica == "r0"


async def test_one_whose_lease_has_ended_while_it_waited_asks_again_at_once():
    made = Ledger({"single": None}, lease_s=0.5, dead_s=60.0)
    await made.report(ROOM_FOR_ONE)
    await made.do([("ask", (ask("dead"),))])
    assert await asyncio.wait_for(made.acquire(ask("waits")), 5) is None
    assert (await made.acquire(ask("waits"))).replica == "r0"


async def test_leases_that_no_agent_renews_make_room():
    made = Ledger({"single": None}, lease_s=0.5, dead_s=60.0)
    await made.report(Report("single", "r0", 90, PAGE, 2))
    await made.do([("ask", (ask("dead"),)), ("ask", (ask("alive"),))])
    actor = SimpleNamespace(acquire=SimpleNamespace(remote=made.acquire))
    third = asyncio.create_task(Leased(actor, batched(made), "third", "s").acquire(1, forecast(), 1_800))
    for _ in range(25):
        await asyncio.sleep(0.1)
        await made.do([("renew", (("alive", "third", "unknown"),))])
    assert (await third).replica == "r0"
    assert set((await made.state())["homes"]) == {"alive", "third"}

"""Rows through an agent, with ledger, journal and the scripted engine in this process: no Ray, no model."""

import asyncio
import warnings
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from types import SimpleNamespace

import pyarrow as pa
import pytest
from ray.exceptions import ActorDiedError, RayError

from actors.engine.protocol import Capacity, EngineSpec, Request
from actors.errors import EngineDead, EngineError, Fenced, NotHome, OutOfMemory
from actors.ledger import Ledger, Report
from actors.messages import FORECAST_LEVELS, Call, Forecast, Reply, Sampling, Stage, Turn
from actors.stopping import TurnMatcher
from actors.tools import ToolThreads
from pipeline.batched import Batched
from pipeline.config import Pool, load_run
from pipeline.footprint import Forecaster, order
from pipeline.journal import Journal
from pipeline.preflight import prepare
from pipeline.run import untaught
from pipeline.sharing import sized
from pipeline.tables import TASKS, rows_to_table, task_row
from tests.scripted import ScriptedEngine

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # Ray's own
    from bench.pipeline import write_run
    from pipeline import rollout
    from pipeline.pools import Served

MAY_DIFFER = {"queue_s", "prefill_s", "decode_s", "tool_s", "gpu_s", "trajectory", "predicted_peak_bytes"}
ROOM = Report("single", "r0", 400, 16, 64)
CALL = Call("q/0", (1,), Turn((Stage("thought", 8),)), Sampling())


class Handle:
    """The replicas r0 and r1: what they were asked, and what fails.

    Attributes:
        refuse: replica → how often it is not the home of what it is asked.
        breaks: what ends each message before its first answer; None: nothing.
        culprits: rows whose calls fail alone too, so often.
        errors: row → what the engine answers to its first calls; None: what it would.
    """

    def __init__(self, engine: ScriptedEngine, tp: int = 1):
        self.numerics, self.errors = replace(engine.numerics, tp=tp, reproducible=True), {}
        self.engine, self.calls, self.ended, self.refuse = engine, [], [], Counter()
        self.breaks, self.culprits, self.alone = None, Counter(), []
        self.generate_many = SimpleNamespace(remote=self._generate_many)
        self.generate = SimpleNamespace(remote=self._generate_alone)
        self.end = SimpleNamespace(remote=self._end)

    def options(self, session_id, stream=False):
        return self

    async def _generate_many(self, calls):
        if self.breaks is not None:
            raise self.breaks

        async def placed(place, call):
            return place, await self._generate(call)

        for answered in asyncio.as_completed([placed(*one) for one in enumerate(calls)]):
            yield [await answered]

    async def _generate_alone(self, call):
        self.alone.append(call.row_id)
        if self.culprits[call.row_id]:
            self.culprits[call.row_id] -= 1
            raise RayError("it breaks whatever carries it")
        answer = await self._generate(call)
        if isinstance(answer, NotHome):
            raise answer
        return answer

    async def _generate(self, call):
        self.calls.append(call)
        if self.refuse[call.home]:
            self.refuse[call.home] -= 1
            return NotHome()
        if (errors := self.errors.get(call.row_id)) and (error := errors.pop(0)) is not None:
            return error
        matcher = TurnMatcher(call.turn, self.engine.tokenizer)
        request = Request(call.token_ids, call.row_id, call.turn.max_tokens, call.sampling, matcher=matcher)
        answer = await asyncio.wrap_future(self.engine.submit(request))
        return Reply(replace(answer, usage=replace(answer.usage, gpu_s=1.0)), call.home, self.numerics)

    async def _end(self, row_ids):
        self.ended += row_ids


class Local(rollout.Agents):
    """Agents whose journal, ledger and replicas are objects of this process."""

    def __init__(self, prepared, job, folder, engine):
        self.job, self.tokenizer, self.tools, self.scorers = job, prepared.tokenizer, prepared.tools, prepared.scorers
        self.threads, self.scoring, self.running, self.rolled = ToolThreads(), ThreadPoolExecutor(1), None, set()
        self.forecaster = job.forecaster
        self.handles = {pool: Handle(engine, tp) for pool, tp in job.pools.items()}
        self.books = Ledger(dict.fromkeys(job.pools))
        self.ledger = SimpleNamespace(
            **{name: SimpleNamespace(remote=getattr(self.books, name)) for name in ("do", "acquire")}
        )
        self.written = Journal(str(folder))
        self.journal = SimpleNamespace(do=SimpleNamespace(remote=self.written.do))
        self._journal, self.lines = Batched(self._send_journal, 0.001), {}
        self.lease, self._endings = Batched(self._send_leases, 0.001), Batched(self._send_endings, 0.001)

    async def run(self, *reports):
        for report in reports or (ROOM,):
            await self.books.report(report)
        tasks = rows_to_table([task_row(task, forecast) for task, forecast in PREPARED["rows"]], TASKS)
        [table] = [table async for table in self(tasks)]
        await asyncio.sleep(0.05)
        return table


PREPARED: dict = {}


@pytest.fixture(scope="module")
def agents(tmp_path_factory):
    """Makes Agents of 6 rows with this forecaster, over a pool `single` and others of so many ranks."""
    folder = tmp_path_factory.mktemp("suite")
    prepared = prepare(load_run(write_run(folder, 6)))
    PREPARED["rows"] = list(order(prepared.rows.tasks, untaught(prepared), prepared.prompt_tokens))
    PREPARED["tasks"] = [task for task, _ in PREPARED["rows"]]
    engine = ScriptedEngine(EngineSpec("smollm2-135m"))

    def make(forecaster: Forecaster | None = None, **pools: int) -> Local:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(rollout, "ray", SimpleNamespace(cluster_resources=lambda: {"CPU": 2}))
            sizes = Capacity(8192, 8, kv_bytes_token=100, page_tokens=16)
            made = {name: Pool(tensor_parallel_size=tp) for name, tp in ({"single": 1} | pools).items()}
            served = Served(sized(made, 0), engine.numerics, sizes)
            job, _ = rollout.plan_agents(prepared, forecaster or untaught(prepared), "app", served)
        return Local(prepared, job, tmp_path_factory.mktemp("journal"), engine)

    return make


def content(table: pa.Table) -> list[dict]:
    rows = sorted(table.to_pylist(), key=lambda row: row["row_id"])
    for row in rows:
        row["steps"] = [(step["thought"], step["action"], step["observation"]) for step in row["trajectory"]]
    return [{name: value for name, value in row.items() if name not in MAY_DIFFER} for row in rows]


class Wrong(Forecaster):
    """Foretells giants, or nothing."""

    def __init__(self, made: Forecaster, tokens: int):
        super().__init__(made.limits)
        self.tokens = tokens

    def forecast(self, task, prompt_tokens):
        peaks = (self.tokens,) * len(FORECAST_LEVELS)
        return Forecast(prompt_tokens, 0, self.tokens, self.tokens, peaks, 1)


@pytest.mark.parametrize("tokens", [1, 10**7])
async def test_a_forecast_changes_no_limit_no_output_and_no_seed(agents, tokens):
    right = agents()
    wrong = agents(Wrong(right.forecaster, tokens))
    assert wrong.job.limits == right.job.limits
    rows, others = content(await right.run()), content(await wrong.run())
    assert len(rows) == 6
    assert rows == others

    def asked(made: Local) -> list:
        return sorted(made.handles["single"].calls, key=lambda call: (call.row_id, len(call.token_ids)))

    assert asked(wrong) == asked(right)  # token ids, stages, sampling and seed of every call


async def test_finished_rows_teach_the_forecaster_of_their_agent(agents):
    made = agents()
    task = PREPARED["tasks"][0]
    before = made.forecaster.forecast(task, 100)
    table = await made.run()
    after = made.forecaster.forecast(task, 100)
    rows = table.select(["prompt_tokens", "peak_tokens"]).to_pylist()
    grown = sum(row["peak_tokens"] - row["prompt_tokens"] for row in rows) / len(rows)
    assert abs(after.p50_tokens - 100 - grown) < abs(before.p50_tokens - 100 - grown)
    assert not made.forecaster._running


async def test_rows_say_what_was_predicted_of_them(agents):
    made = agents()
    rows = {row["row_id"]: row["predicted_peak_bytes"] for row in (await made.run()).to_pylist()}
    for task, forecast in PREPARED["rows"]:
        pages = -(-forecast.p95_tokens // 16) - forecast.shared_tokens // 16
        assert rows[task.row_id] == pages * 16 * 100


async def test_every_lease_and_every_page_is_given_back(agents):
    made = agents()
    await made.run()
    assert (await made.books.state())["leases"] == 0
    assert sorted(made.handles["single"].ended) == sorted(task.row_id for task in PREPARED["tasks"])


async def test_a_call_that_did_not_reach_its_home_is_made_again_and_counts_as_no_attempt(agents, monkeypatch):
    monkeypatch.setattr(rollout, "RETRY_S", 0.01)
    made = agents()
    made.handles["single"].refuse["r0"] = 3
    table = await made.run(ROOM, Report("single", "r1", 400, 16, 64))
    assert set(table["attempts"].to_pylist()) == {1}
    assert set(table["status"].to_pylist()) == {"ok"}


async def test_a_broken_message_costs_an_attempt_only_those_who_fail_alone_too(agents, monkeypatch):
    monkeypatch.setattr(rollout, "RETRY_S", 0.01)
    made = agents()
    handle, culprit = made.handles["single"], PREPARED["tasks"][2].row_id
    handle.breaks, handle.culprits[culprit] = RayError("broken"), 1
    table = await made.run()
    attempts = dict(zip(table["row_id"].to_pylist(), table["attempts"].to_pylist(), strict=True))
    assert attempts == {task.row_id: 1 + (task.row_id == culprit) for task in PREPARED["tasks"]}
    assert set(table["status"].to_pylist()) == {"ok"}


@pytest.mark.parametrize("gone", [ActorDiedError(), RayError("its home is another now")])
async def test_calls_that_went_with_their_replica_count_as_attempts(agents, monkeypatch, gone):
    monkeypatch.setattr(rollout, "RETRY_S", 0.01)
    made = agents()
    handle = made.handles["single"]
    handle.breaks, handle.refuse["r0"] = gone, 100
    table = await made.run()
    assert set(table["status"].to_pylist()) == {"failed"}
    assert set(table["attempts"].to_pylist()) == {made.job.config.limits.max_attempts}
    if isinstance(gone, ActorDiedError):
        assert not handle.alone


async def test_a_row_says_that_its_calls_were_computed_in_two_ways_and_what_the_lost_one_cost(agents, monkeypatch):
    monkeypatch.setattr(rollout, "RETRY_S", 0.01)
    made, failed = agents(pair=2), []
    moved, lost, *_ = (task.row_id for task in PREPARED["tasks"])
    here, there = OutOfMemory("it does not fit", "decode"), EngineDead("a rank is lost")
    here.gpu_s, there.gpu_s = 0.25, 0.5
    made.handles["single"].errors = {moved: [None, here]}
    made.handles["pair"].errors = {moved: [there]}
    record = made.record

    def listened(*told):
        if told[0] == "fail":
            failed.append(told)
        return record(*told)

    made.record = listened
    table = await made.run(ROOM, Report("pair", "r1", 400, 16, 64))
    rows = {row["row_id"]: row for row in table.to_pylist()}
    assert set(table["status"].to_pylist()) == {"ok"}
    assert [(told[1], told[5], told[6]) for told in failed] == [(moved, 0.25, "single"), (moved, 2 * 0.5, "pair")]
    assert [rows[moved][name] for name in ("pool", "rung", "tp", "attempts")] == ["pair", "shard", 2, 3]
    assert rows[lost]["tp"] == 1
    steps = len(rows[moved]["trajectory"])
    assert rows[moved]["gpu_s"] == 1 + 2 * (steps - 1)
    # The pool is chosen by forecasts, which differ from run to run.
    assert set(table["reproducible"].to_pylist()) == {False}
    alone = agents()
    assert set((await alone.run())["reproducible"].to_pylist()) == {True}


async def test_a_row_that_no_pool_can_hold_says_all_that_it_lacked(agents, monkeypatch):
    monkeypatch.setattr(rollout, "RETRY_S", 0.01)
    made, long = agents(pair=2), PREPARED["tasks"][0].row_id
    made.handles["single"].errors = {long: [None, OutOfMemory("it may need 9 tokens, there are 8", "never_fits")]}
    await made.books.close("pair", OutOfMemory("the largest node has 1 GPU", "load"))
    table = await made.run()
    row = next(row for row in table.to_pylist() if row["row_id"] == long)
    assert set(table["status"].to_pylist()) == {"ok", "failed"}
    assert [row[name] for name in ("status", "error_type", "pool", "attempts")] == ["failed", "infra", "pair", 2]
    for words in (
        "it may need 9 tokens, there are 8; the largest node has 1 GPU; load on pair",
        "no pool is sharded over",
    ):
        assert words in row["error"]


async def test_a_row_whose_larger_pool_does_not_start_says_so_beside_what_it_lacked(agents, monkeypatch):
    monkeypatch.setattr(rollout, "RETRY_S", 0.01)
    made, long = agents(pair=2), PREPARED["tasks"][0].row_id
    made.handles["single"].errors = {long: [OutOfMemory("it may need 9 tokens, there are 8", "never_fits")]}
    await made.books.close("pair", EngineError("pool pair cannot start: ValueError: no"))
    row = next(row for row in (await made.run()).to_pylist() if row["row_id"] == long)
    assert (row["status"], row["attempts"]) == ("failed", 2)
    assert row["error"].endswith("it may need 9 tokens, there are 8; pool pair cannot start: ValueError: no")


async def test_rows_that_wait_for_their_turn_alone_hold_no_place_that_it_needs(agents, monkeypatch):
    """Two replicas go with all their calls, one comes back, and a row without a place is the first to go on."""
    monkeypatch.setattr(rollout, "RETRY_S", 0.01)
    monkeypatch.setattr("pipeline.journal.ALONE_WAIT_S", 0.02)
    made = agents()
    made.written.max_attempts = 2
    handle, core = made.handles["single"], made.books.core
    generate, fails = handle._generate, {task.row_id: asyncio.Event() for task in PREPARED["tasks"]}
    asked: set[str] = set()

    async def lost_once(call):
        if call.row_id in asked:
            return await generate(call)
        asked.add(call.row_id)
        await fails[call.row_id].wait()
        return EngineDead("the replica is gone")

    async def one_comes_back():
        while len(asked) < len(fails):
            await asyncio.sleep(0.01)
        for replica in ("r0", "r1"):
            del made.books.heard[replica]
            core.pools["single"].replica_down(replica)
        await made.books.report(Report("single", "r2", 0, 0, 3))
        await asyncio.sleep(0.1)
        homeless = [row_id for row_id in fails if core.lease(row_id) is None]
        assert len(homeless) == 3
        fails[homeless[0]].set()
        await asyncio.sleep(0.2)
        for failed in fails.values():
            failed.set()

    handle._generate = lost_once
    async with asyncio.timeout(10), asyncio.TaskGroup() as tasks:
        tasks.create_task(one_comes_back())
        table = await made.run(Report("single", "r0", 0, 0, 3), Report("single", "r1", 0, 0, 3))
    assert set(table["status"].to_pylist()) == {"ok"}
    assert set(table["attempts"].to_pylist()) == {2}


async def test_one_that_is_fenced_while_it_waits_is_left_to_its_successor(agents, monkeypatch):
    class FencedByRay(RayError, Fenced):
        """As Ray brings it from an actor."""

    made, row_id = agents(), PREPARED["tasks"][0].row_id
    acquire = rollout.ledger.Leased.acquire

    async def overtaken(lease, *arguments):
        if lease.row_id == row_id:
            raise FencedByRay
        return await acquire(lease, *arguments)

    monkeypatch.setattr(rollout.ledger.Leased, "acquire", overtaken)
    table = await made.run()
    assert len(table) == 5
    assert row_id not in table["row_id"].to_pylist()


async def test_a_row_of_two_numerics_is_not_reproducible(agents):
    made = agents()
    handle, changed = made.handles["single"], PREPARED["tasks"][0].row_id
    generate = handle._generate

    async def other_gpu(call):
        reply = await generate(call)
        second = call.row_id == changed and sum(one.row_id == changed for one in handle.calls) > 1
        return replace(reply, numerics=replace(reply.numerics, kernel="another")) if second else reply

    handle._generate = other_gpu
    table = await made.run()
    rows = {row["row_id"]: row for row in table.to_pylist()}
    assert {row_id for row_id, row in rows.items() if not row["reproducible"]} == {changed}
    assert rows[changed]["kernel"] == "another"


async def test_lines_to_replicas_that_are_gone_are_dropped(agents):
    made = agents()
    began, go_on = asyncio.Event(), asyncio.Event()

    async def slow(calls):
        began.set()
        await go_on.wait()
        yield [(place, call.home) for place, call in enumerate(calls)]

    made.handles["single"].generate_many.remote = slow
    calls = [asyncio.ensure_future(made._line("single", "r0")(replace(CALL, home="r0")))]
    await began.wait()
    made._line("single", "r1")
    assert list(made.lines) == [("single", "r0"), ("single", "r1")]
    go_on.set()
    assert await asyncio.gather(*calls) == ["r0"]
    await asyncio.sleep(0)
    made._line("single", "r2")
    assert list(made.lines) == [("single", "r2")]


async def test_a_fenced_row_is_left_to_its_successor(agents, monkeypatch):
    made = agents()
    ask, row_id = made.books.core.ask, PREPARED["tasks"][0].row_id

    def overtaken(asked, now_s):
        if asked.row_id == row_id and asked.tokens > asked.forecast.prompt_tokens:
            ask(replace(asked, attempt=2), now_s)
        return ask(asked, now_s)

    monkeypatch.setattr(made.books.core, "ask", overtaken)
    table = await made.run()
    assert len(table) == 5
    assert row_id not in table["row_id"].to_pylist() + made.handles["single"].ended
    assert (await made.books.state())["leases"] == 1
    assert not made.forecaster._running


@pytest.mark.parametrize(
    ("failure", "said"),
    [
        (
            RuntimeError(
                "  File x\nTypeError: it breaks here\n\nray.exceptions.UserCodeException: yours\n\nTo retry, do"
            ),
            "TypeError: it breaks here",
        ),
        (RuntimeError("KeyError: 'x'\nactors.errors.EngineDead: gone"), "actors.errors.EngineDead: gone"),
        (RuntimeError("nothing known"), "nothing known"),
        (RuntimeError(), "RuntimeError"),
    ],
)
def test_what_ended_a_run_is_told_in_its_own_words(failure, said):
    assert str(rollout.explained(failure)) == f"the run stopped: {said}\nrepeat the command to resume"

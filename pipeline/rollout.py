"""The run on Ray: manifest → agents → scores → results. Beside pools.py the only file of the pipeline that knows Ray.

Ray Data reads the manifest and writes the tables; agents are an async actor pool in between; they call Serve
deployments that hold the model (pools.py); the journal is one actor.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import os
import re
import sys
import time
import traceback
import uuid
from array import array
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable, Generator, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import ray
import ray.data
from ray import serve
from ray.actor import exit_actor
from ray.data import ActorPoolStrategy, DataContext
from ray.data.checkpoint import CheckpointConfig
from ray.exceptions import ActorDiedError, ActorUnavailableError, RayActorError, RayError
from ray.serve.exceptions import RayServeException
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from actors import ledger
from actors.agent import Limits, Rollout
from actors.engine.protocol import Capacity
from actors.errors import BerthError, EngineDead, EngineError, Fenced, Incomplete, InputError, NotHome, OutOfMemory
from actors.ladder import FOR_A_ROW, GiveUp, Hardware, Shortage, Standing, next_rung
from actors.messages import Call, DeviceBytes, Forecast, Generation, Numerics, Reply, Sampling, Trajectory
from actors.placement import own_pages
from actors.router import session_id
from actors.tokens import codec_of
from pipeline import preflight
from pipeline.batched import Batched
from pipeline.config import RunConfig
from pipeline.footprint import Forecaster
from pipeline.journal import Begin, Journal, Progress
from pipeline.pools import Served
from pipeline.preflight import Prepared, limits_of
from pipeline.suite import Suite
from pipeline.tables import RESULTS, RunFacts, result_row, rows_to_table, task_from_row

log = logging.getLogger("berth")

ROWS_PER_TASK = (16, 64)
ROWS_PER_FILE = 256
CALLS_PER_AGENT = 64
RETRY_S = 1.0
MOST_RETRY_S = 16.0
BATCH_S = 0.005
CALLS_AT_ONCE = 8
WORKER_ENV = {
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "1",  # or agents, which have no GPU, would see all of them
    "RAY_DATA_PARQUET_FOOTER_NUM_ACTORS": "1",  # the manifest has few files; 32 processes cost a minute to start
}
KEEPER_S = 5.0
SLOW_MODEL_S = 24 * 3600

Answers = AsyncIterator[Iterable[tuple[int, Any]]]


@dataclass(frozen=True, slots=True)
class Job:
    """What an agent needs to know; crosses to its process.

    Attributes:
        limits: bounds of a trajectory; the context is the model's.
        capacity: sizes of one replica of the smallest pool.
        pools: ranks of a replica of each pool, small ones first.
        rung: of the fallback that the whole run stands on, or `start`.
        concurrent: trajectories one agent actor rolls out at once.
        forecaster: what past runs have taught; each agent goes on learning with its own.
    """

    config: RunConfig
    suite: Suite
    facts: RunFacts
    limits: Limits
    capacity: Capacity
    app: str
    pools: Mapping[str, int]
    rung: str
    concurrent: int
    forecaster: Forecaster


class Caller:
    """Leases and calls of one process: those that come together travel together.

    Args:
        app: the Serve application.
        pools: its deployments.
        leases: the ledger's actor.
    """

    def __init__(self, app: str, pools: Iterable[str], leases: Any):
        self.ledger: Any = leases
        self.handles = {pool: serve.get_deployment_handle(pool, app) for pool in pools}
        self.lines: dict[tuple[str, str], Batched] = {}
        self.lease = Batched(self._send_leases, BATCH_S)
        self._endings = Batched(self._send_endings, 10 * BATCH_S)

    async def _send_leases(self, requests: Sequence[Any]) -> Answers:
        yield enumerate(await self.ledger.do.remote(requests))

    async def generate(self, call: Call, pool: str) -> Reply:
        """Call the replica `call.home`, in one message with the calls whose leases came together with this one's. A
        message that breaks costs its calls nothing where the replica lives: each is made once more, alone, so that one
        call's fault is not its neighbours'.

        Raises:
            BerthError: see `Replica.generate`; EngineDead also where a message ends without all answers.
            RayError, RayServeException: the replica is gone, or the call fails alone too.
        """
        if call.home is None:  # Serve starts replicas by the number of such calls
            return await self._alone(call, pool)
        try:
            answer = await self._line(pool, call.home)(call)
        except ActorDiedError:  # any of its calls may have killed it: each of them counts as an attempt
            raise
        except (EngineDead, RayError, RayServeException) as broken:
            try:
                return await self._alone(call, pool)
            except NotHome:  # the home went with its message
                raise broken from None
        if isinstance(answer, BerthError):
            raise answer
        return answer

    async def _alone(self, call: Call, pool: str) -> Reply:
        session: Any = self.handles[pool].options(session_id=session_id(call.home, call.row_id))
        return await session.generate.remote(call)

    def _line(self, pool: str, home: str) -> Batched:
        """Calls to one replica. Lines to replicas that are gone are idle, and go when a line to a new one is made."""
        line = self.lines.get((pool, home))
        if line is None:
            session: Any = self.handles[pool].options(session_id=session_id(home, ""), stream=True)
            line = Batched(session.generate_many.remote, 0.0, CALLS_AT_ONCE)
            self.lines = {key: old for key, old in self.lines.items() if old.busy} | {(pool, home): line}
        return line

    def end(self, row_id: str, attempt: int, pool: str | None = None, replica: str = "") -> None:
        """Let the replica free what it keeps for a trajectory, and then the ledger its lease, soon."""
        self._endings((row_id, attempt, pool, replica))

    async def _send_endings(self, requests: Sequence[Any]) -> Answers:
        ended: dict[tuple[str | None, str], list[tuple[str, int]]] = defaultdict(list)
        for row_id, attempt, pool, replica in requests:
            ended[pool, replica].append((row_id, attempt))
        await asyncio.gather(*(self._end_at(pool, replica, rows) for (pool, replica), rows in ended.items()))
        yield enumerate(requests)

    async def _end_at(self, pool: str | None, replica: str, rows: Sequence[tuple[str, int]]) -> None:
        row_ids = [row_id for row_id, _ in rows]
        if pool and replica:
            with contextlib.suppress(RayError, RayServeException):  # the replica is gone, and the pages with it
                session = self.handles[pool].options(session_id=session_id(replica, row_ids[0]))
                await session.end.remote(row_ids)
        for row in rows:
            self.lease(("end", row))


class Agents(Caller):
    """The async Ray Data callable: manifest rows in, result rows out, each durable before it is emitted."""

    def __init__(self, job: Job, journal: Any, leases: Any):
        from actors.engine.loader import load_tokenizer, resolve
        from actors.tools import ToolThreads, load_tools
        from pipeline.scoring import load_scorers

        super().__init__(job.app, job.pools, leases)
        self.job = job
        self.journal: Any = journal
        model = job.config.model
        folder = resolve(model.id, model.revision, weights=False).folder
        self.tokenizer: Any = load_tokenizer(folder, trust_remote_code=model.trust_remote_code)
        self.tools = load_tools(job.suite.config.tools, job.suite.folder)
        self.forecaster = job.forecaster
        self.threads = ToolThreads()
        self.scorers = load_scorers(job.suite.config.scorers, job.suite.folder)
        self.scoring = ThreadPoolExecutor(2, "scoring")
        self.running: asyncio.Semaphore | None = None
        self.rolled: set[str] = set()
        self._journal = Batched(self._send_journal, BATCH_S)

    def record(self, name: str, *arguments: Any) -> asyncio.Future[Any]:
        """Ask the journal; see its methods."""
        return self._journal((name, arguments))

    async def _send_journal(self, requests: Sequence[Any]) -> Answers:
        yield enumerate(await self.journal.do.remote(requests))

    async def __call__(self, batch: pa.Table) -> AsyncIterator[pa.Table]:
        """One table of finished rows for each table of manifest rows; rows that a stop kept back are left out."""
        if self.running is None:
            self.running = asyncio.Semaphore(self.job.concurrent)
            self.renewing = asyncio.create_task(self._renew())
        found = await asyncio.gather(*(self._row(row) for row in batch.to_pylist()))
        yield rows_to_table([row for row in found if row is not None], RESULTS)

    async def _row(self, manifest: dict[str, Any]) -> dict[str, Any] | None:
        assert self.running is not None
        row = Attempts(self, manifest)
        while True:
            async with self.running:
                begun = await row.begin()
                if begun.wait_s is None:
                    self.rolled.add(row.task.row_id)
                    try:
                        recorded = await row.run(begun)
                        break
                    finally:
                        self.rolled.discard(row.task.row_id)
            await asyncio.sleep(begun.wait_s)
        return await recorded  # while another row rolls

    async def _renew(self) -> None:
        """While this process lives, so do the leases of its rows."""
        while True:
            await asyncio.sleep(ledger.RENEW_S)
            with contextlib.suppress(RayError, BerthError):  # the ledger is being restarted
                await self.lease(("renew", (tuple(self.rolled),)))


class _Stopped(Exception):
    """The run is stopping, or another attempt of the row has finished: nothing is to be recorded."""


class Attempts:
    """One row: begun, rolled out, scored and finished in the journal; calls that die are tried again."""

    def __init__(self, agents: Agents, manifest: Mapping[str, Any]):
        self.agents = agents
        self.job = agents.job
        self.task = task_from_row(manifest)
        self.prompt_tokens: int = manifest["prompt_tokens"]
        self.forecast: Forecast  # from `begin` on
        self.predicted_bytes: int | None = None
        self.lease = ledger.Leased(agents.ledger, agents.lease, self.task.row_id, self.job.suite.config.name)
        self.attempt = 0
        self.replica = ""
        self.home: str | None = None
        self.numerics: Numerics | None = None
        self.rung = self.job.rung
        self.wanted: str | None = None if len(self.job.pools) > 1 else next(iter(self.job.pools))
        self.pool = self.wanted  # that served it last
        self.tries = 0
        self.shortages: list[str] = []  # of memory, for which it climbed
        self.lost_gpu_s: float | None = None  # of the call that this attempt failed in
        self.device: DeviceBytes | None = None  # of its last call

    async def begin(self) -> Begin:
        """Forecast the row as well as is known by now, and ask the journal for the next attempt."""
        self.forecast = self.agents.forecaster.forecast(self.task, self.prompt_tokens)
        sizes = self.job.capacity
        pages = own_pages(self.forecast.p95_tokens, self.forecast.shared_tokens, sizes.page_tokens)
        self.predicted_bytes = pages * sizes.page_tokens * sizes.kv_bytes_token or None
        begun = await self.agents.record("begin", self.task.row_id, self.wanted, self.rung, self.predicted_bytes)
        self.attempt, self.lost_gpu_s, self.device = begun.attempt, None, None
        self.tries += begun.wait_s is None
        return begun

    async def run(self, begun: Begin) -> Awaitable[dict[str, Any] | None]:
        """Roll out and score: what is given answers when the row is on storage, with the row that counts; None where
        the run is stopping."""
        if begun.row is not None or begun.exhausted:  # an agent that died may have left its lease
            self.agents.end(self.task.row_id, begun.attempt)
        if begun.row is not None or begun.stop:
            return _known(begun.row)
        try:
            trajectory = _lost(self.task, begun.attempt) if begun.exhausted else await self._trajectory(begun)
        except (Fenced, _Stopped) as e:
            self.agents.forecaster.drop(self.task.row_id)
            # Fenced: Ray has given the row to another agent, whose answer counts.
            return _known(None if isinstance(e, Fenced) else (await self.begin()).row)
        except Exception as e:  # one row's fault must not be the run's: it stands on the row, with its place
            log.exception("row %s", self.task.row_id)
            place = traceback.extract_tb(e.__traceback__)[-1]
            said = f"{type(e).__name__}: {e} ({Path(place.filename).name}:{place.lineno})"
            trajectory = Trajectory(self.task, (), None, None, "error", error=said, error_type="infra")
        trajectory = replace(trajectory, attempts=max(1, self.attempt), numerics=self.numerics)
        row = await asyncio.get_running_loop().run_in_executor(self.agents.scoring, self._scored, trajectory)
        return self._recorded(row)

    async def _recorded(self, row: dict[str, Any]) -> dict[str, Any]:
        finish = ("finish", self.task.row_id, self.attempt, self.replica, row, self.device, self.lost_gpu_s)
        counts: dict[str, Any] = await self.agents.record(*finish) or row
        self.agents.forecaster.observe(counts)
        return counts

    async def _trajectory(self, begun: Begin) -> Trajectory:
        from actors.replay import Replayed
        from actors.tools import Toolbox

        toolbox = Toolbox(self.agents.tools, self.task, codec_of(self.agents.tokenizer).cut, self.agents.threads)
        transcript = preflight.transcript(
            self.job.config, self.job.suite, self.agents.tools, self.agents.tokenizer, self.task
        )
        generate, call_tool = self._generate, toolbox.call
        if self.job.config.journal == "steps":
            for event in begun.events:
                if "numerics" in event:
                    self.pool, self.replica = event["pool"], event["replica"]
                    self.numerics = Numerics(**event["numerics"])
            replayed = Replayed(generate, toolbox, begun.events, self._event)
            generate, call_tool = replayed.generate, replayed.call
        try:
            return await Rollout(self.task, transcript, generate, call_tool, self.job.limits).run()
        except Fenced:
            self.replica = ""  # what it keeps for the row is the other attempt's
            raise
        finally:
            await toolbox.close()
            self.agents.end(self.task.row_id, self.attempt, self.pool, self.replica)

    def _event(self, event: dict[str, Any]) -> asyncio.Future[None]:
        if event["kind"] == "generation" and self.numerics is not None:
            event |= {"pool": self.pool, "replica": self.replica, "numerics": asdict(self.numerics)}
        return self.agents.record("event", self.task.row_id, self.attempt, event)

    async def _call(self, call: Call) -> Reply:
        """Ask for the row's home and call it, until it is there: a home that is gone computes nothing.

        Raises:
            EngineError: of the engine, or because the row's pool cannot start.
            Fenced: a higher attempt has taken the row over.
        """
        wait_s = RETRY_S
        while True:
            self.home = None
            lease = await self.lease.acquire(self.attempt, self.forecast, len(call.token_ids), self.wanted)
            self.home, self.pool = lease.replica, lease.pool
            try:
                self.agents.forecaster.begin(self.task.row_id)
                reply = await self.agents.generate(replace(call, home=self.home), self.pool)
            except NotHome:
                self.lease.failed(self.home)
                await asyncio.sleep(wait_s)
                wait_s = min(2 * wait_s, MOST_RETRY_S)
                continue
            self.lease.answered(len(call.token_ids) + len(reply.generation.token_ids), reply.replica)
            return reply

    async def _generate(self, token_ids: Any, turn: Any) -> Generation:
        """Call the replica. Where it dies, or memory does not suffice, record the attempt as failed and begin the next,
        the latter on the fallback's next rung.

        Raises:
            EngineError: what the engine said of this call, EngineDead after the last attempt, or OutOfMemory where
                there is no further rung.
            Fenced: a higher attempt has taken the row over.
        """
        sampling = self.job.config.sampling
        drawn = Sampling(sampling.temperature, sampling.top_p, sampling.top_k, self.task.seed)
        call = Call(self.task.row_id, array("i", token_ids), turn, drawn, self.job.suite.config.name)
        while True:
            try:
                reply = await self._call(call)
            except Fenced:  # as an error of Ray's, too, where it was waited for
                raise
            except (EngineError, RayError, RayServeException) as e:
                cause = _plain(e) if isinstance(e, EngineError) else e
            else:
                self.replica, self.numerics = reply.replica, self._together(reply.numerics)
                self.device = reply.device
                usage = reply.generation.usage
                return replace(reply.generation, usage=replace(usage, gpu_s=reply.numerics.tp * usage.gpu_s))
            lost_s = getattr(cause, "gpu_s", None)
            self.lost_gpu_s = lost_s and lost_s * self.job.pools[self.pool or next(iter(self.job.pools))]
            if self.home is None and self.wanted is not None:  # the pool that it was sent to is closed
                self.pool, self.replica = self.wanted, ""
            if isinstance(cause, OutOfMemory):
                self.replica = self.home or self.replica
                self._climb(cause)
            elif isinstance(cause, EngineError) and not isinstance(cause, EngineDead):
                raise type(cause)("; ".join([*self.shortages, str(cause)])) from None
            said = f"{type(cause).__name__}: {cause}".splitlines()[0]
            self.lease.failed(self.home)
            failed = (self.task.row_id, self.attempt, self.home or self.replica)
            await self.agents.record("fail", *failed, said, self.lost_gpu_s, self.pool, self.device)
            await asyncio.sleep(RETRY_S)
            mine = self.attempt  # `begin` tells that of whoever began last
            while (begun := await self.begin()).wait_s is not None:
                # The row whose turn it is may need its place.
                self.agents.lease(("end", (self.task.row_id, mine)))
                await asyncio.sleep(begun.wait_s)
            if begun.stop or begun.row is not None:
                raise _Stopped
            if begun.exhausted:
                ended = f"{begun.attempt} attempts ended without an answer; the last: {said}"
                raise EngineDead("; ".join([*self.shortages, ended])) from cause

    def _together(self, numerics: Numerics) -> Numerics:
        """Of all calls so far, the last of which had these. Nobody can repeat a row of two numerics, nor one whose pool
        was chosen by what had been learned by then."""
        before, alone = self.numerics or numerics, len(self.job.pools) == 1
        same = replace(before, reproducible=True) == replace(numerics, reproducible=True)
        return replace(numerics, reproducible=alone and same and before.reproducible and numerics.reproducible)

    def _climb(self, error: OutOfMemory) -> None:
        """Where the next attempt runs.

        Raises:
            OutOfMemory: nowhere; with the numbers and with why each rung is closed.
        """
        sizes = self.job.pools
        pool = self.wanted or self.pool or next(iter(sizes))
        found = next_rung(
            error.stage,
            Standing(pool, sizes[pool], attempts=self.tries),
            Hardware(gangs=tuple((size, name) for name, size in sizes.items())),
            self.job.config.fallback,
            offered=FOR_A_ROW,
            max_attempts=self.job.config.limits.max_attempts,
            shortage=Shortage(error.needed_bytes, error.free_bytes),
        )
        self.shortages.append(str(error))
        if isinstance(found, GiveUp):
            raise OutOfMemory("; ".join([*self.shortages, found.reason]), error.stage) from error
        self.rung, self.wanted = found.name, found.standing.pool

    def _scored(self, trajectory: Trajectory) -> dict[str, Any]:
        from pipeline.scoring import score

        scored = score(trajectory, self.agents.scorers, self.job.suite.primary)
        return result_row(
            trajectory,
            scored=scored,
            run=self.job.facts,
            pool=self.pool,
            rung=self.rung,
            predicted_peak_bytes=self.predicted_bytes,
        )


async def _known(row: dict[str, Any] | None) -> dict[str, Any] | None:
    return row


def _plain(error: EngineError) -> Any:
    """The engine's own error, without what Ray adds on the way."""
    cause = getattr(error, "cause", None)
    return cause if isinstance(cause, EngineError) else error


def _lost(task: Any, attempts: int) -> Trajectory:
    said = f"{attempts} attempts ended with the death of their process"
    return Trajectory(task, (), None, None, "error", error=said, error_type="infra")


def start_ray(config: RunConfig) -> None:
    """Join the cluster, or start a local one."""
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    # Workers look for modules in the driver's folder first: a user's own `pipeline/` there must not stand in for ours.
    os.chdir(Path(__file__).resolve().parents[1])
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
    runtime_env = config.ray.runtime_env
    for name, value in WORKER_ENV.items():
        os.environ.setdefault(name, value)  # Ray Data reads them in this process too
    if config.ray.address is None:
        # Logical CPUs: agents, tables and replicas share what is there; none may starve another.
        options |= {"num_cpus": max(4, os.cpu_count() or 1), "include_dashboard": False}
    else:
        options["address"] = config.ray.address
        runtime_env = runtime_env | {"env_vars": WORKER_ENV | runtime_env.get("env_vars", {})}
    if runtime_env:
        options["runtime_env"] = runtime_env
    with _silent_stderr():
        try:
            ray.init(**options)
        except ConnectionError as e:
            raise InputError(f"no Ray cluster: {e}", field="ray.address", got=config.ray.address) from e
    _quiet()


def _quiet() -> None:
    """Leave the screen to the run's own story; Ray's goes to its log files, its warnings to the logger `berth`."""
    import ray._private.worker as worker

    for name in ("ray", "ray.data", "ray.serve"):
        logging.getLogger(name).setLevel(logging.ERROR)
    # No option turns these off, and on stdout they would stand in the middle of `--json`.
    worker.print_to_stdstream = lambda data, **_: log.info("ray: %s", data["lines"])


@contextlib.contextmanager
def _silent_stderr() -> Generator[None]:
    """Drop what C++ code writes to stderr meanwhile; Python's exceptions are not affected."""
    sys.stderr.flush()
    kept = os.dup(2)
    try:
        with open(os.devnull, "wb") as nothing:
            os.dup2(nothing.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def app_name(out: str) -> str:
    """A name for the Serve application of this session of the run."""
    return f"berth-{hashlib.sha256(out.encode()).hexdigest()[:10]}-{uuid.uuid4().hex[:6]}"


class Keeper:
    """Deletes the replicas when their run's process is gone, however it went: they would hold their GPUs for ever."""

    async def watch(self, app: str, journal: Any) -> None:
        """Returns when the replicas are deleted; `journal` lives as long as the run's process."""
        while True:
            await asyncio.sleep(KEEPER_S)
            try:
                await journal.counts.remote()
            except ActorUnavailableError:
                continue
            except RayActorError:
                break
        await asyncio.to_thread(serve.delete, app)
        exit_actor()


def keep(app: str, journal: Any) -> Any:
    """Start the application's Keeper; kill it when the run has ended by itself."""
    actor: Any = ray.remote(Keeper)
    keeper = actor.options(
        num_cpus=0, name=f"{app}-keeper", lifetime="detached", namespace="serve", max_restarts=-1
    ).remote()
    keeper.watch.remote(app, journal)
    return keeper


def ledger_name(app: str) -> str:
    """Name of the application's ledger."""
    return f"{app}-ledger"


def start_ledger(app: str, served: Served) -> Any:
    """The ledger's actor, which lives as long as this process holds what is returned."""
    return ledger.start(ledger_name(app), {pool.name: None for pool in served.pools})


def start_journal(config: RunConfig, attempts: Mapping[str, int]) -> Any:
    """The journal's actor; beside this process where the run folder is a local one.

    Args:
        attempts: of rows that are done again, by row id.
    """
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft="://" in config.out)
    actor: Any = ray.remote(Journal)
    return actor.options(
        num_cpus=0,
        max_restarts=-1,
        max_task_retries=-1,
        max_concurrency=10_000,
        scheduling_strategy=here,
        enable_task_events=False,
    ).remote(config.out + "/journal", config.limits.max_attempts, attempts)


def plan_agents(prepared: Prepared, forecaster: Forecaster, app: str, served: Served) -> tuple[Job, int]:
    """The job and the number of agent actors: as many trajectories at once as the ledger has homes for at most."""
    config, tasks = prepared.config, -(-len(prepared.rows.tasks) // ROWS_PER_TASK[0])
    agents = max(1, min(8, tasks, int(ray.cluster_resources().get("CPU", 1)) // 8))
    job = Job(
        config=config,
        suite=prepared.suite,
        facts=prepared.facts,
        limits=limits_of(config, prepared.suite, served.capacity.max_model_len),
        capacity=served.capacity,
        app=app,
        pools={pool.name: pool.tp for pool in served.pools},
        rung=served.rung,
        concurrent=-(-sum(pool.most for pool in served.pools) * ledger.slots(served.capacity) // agents),
        forecaster=forecaster,
    )
    return job, agents


def rollouts(job: Job, journal: Any, leases: Any, agents: int, rows: int) -> None:
    """Run the Ray Data job of `rows` rows to its end; blocks."""
    out = job.config.out
    least, most = ROWS_PER_TASK  # a task costs some 20 ms, and each agent should get several
    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.execution_no_progress_timeout_s = SLOW_MODEL_S
    context.memory_usage_poll_interval_s = None  # else a thread for each task under way looks once a second
    context.execution_options.label_selector = job.config.ray.labels or None
    context.checkpoint_config = CheckpointConfig(
        id_column="row_id", checkpoint_path=out + "/journal/checkpoint", delete_checkpoint_on_success=False
    )
    (
        ray.data.read_parquet(out + "/tasks")
        .repartition(target_num_rows_per_block=max(least, min(most, rows // (4 * agents))))
        .map_batches(
            Agents,
            fn_constructor_args=(job, journal, leases),
            compute=ActorPoolStrategy(size=agents, max_concurrent_calls_per_actor=CALLS_PER_AGENT),
            batch_size=None,
            batch_format="pyarrow",
            num_cpus=0.1,
        )
        .write_parquet(out + "/results", min_rows_per_file=ROWS_PER_FILE)
    )


def explained(failure: BaseException) -> Exception:
    """What ended the Ray Data job, as the person who started it should hear it."""
    cause: BaseException | None = failure
    while cause is not None:
        if isinstance(cause, InputError):
            return InputError(str(cause).strip().splitlines()[-1])
        cause = cause.__cause__
    lines = [line.strip() for line in str(failure).splitlines() if line.strip()]
    # Around the error Ray tells that it was its user's, and how to retry such.
    own = [line for line in lines if re.match(r"(?!ray\.)[\w.]*(Error|Exception)\b|(actors|pipeline)\.[\w.]+:", line)]
    told = own or lines or [type(failure).__name__]
    return Incomplete(f"the run stopped: {told[-1]}\nrepeat the command to resume")


def cluster_gpus() -> int:
    """GPUs that the cluster has now."""
    return int(ray.cluster_resources().get("GPU", 0))


def engine_events(leases: Any) -> dict[str, dict[str, int]]:
    """By pool how often what happened in its engines (see `PagedEngine.events`); none where the ledger is gone."""
    try:
        return ray.get(leases.events.remote(), timeout=10)
    except RayError as e:
        log.warning("the ledger does not tell what happened in the engines: %s", e)
        return {}


def watch(
    journal: Any,
    report: Callable[[Progress], None],
    share: Callable[[], None],
    done: Callable[[], bool],
    over: Callable[[], bool],
) -> None:
    """Report the journal's counts and share the GPUs once a second until `done`; stop the run in good order when it is
    `over`."""
    while not done():
        time.sleep(1)
        try:
            counts: Any = ray.get(journal.counts.remote(), timeout=10)
            report(counts)
            share()
        except RayError:
            continue  # the journal, the ledger or Serve is being restarted
        if over():
            with contextlib.suppress(RayError):
                ray.get(journal.stop.remote(), timeout=10)

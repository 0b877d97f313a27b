"""The ledger: one actor that gives every trajectory its home, and the agent's side of it.

Decides nothing itself (placement.py does); it keeps time, lets askers wait, and notices who is gone. It restarts empty:
replicas then report what they hold, and agents ask again before their next call, which changes nothing where all is
known. Replicas enforce their own budgets, so a wrong ledger costs time and never memory.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections import Counter, defaultdict
from collections.abc import Awaitable, Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from actors.engine.protocol import Capacity
from actors.errors import BerthError, EngineError, Fenced
from actors.messages import Ask, Call, Forecast, Lease, Resident, Usage
from actors.metrics import LedgerMetrics, ReplicaMetrics
from actors.placement import Placement

log = logging.getLogger(__name__)

REPORT_S = 1.0
PLACE_S = 0.005  # requests of this time are decided together
RENEW_S = 5.0  # an agent's leases, all together
ANSWER_S = 30.0  # an asker that nobody can serve is told to ask again, which shows that it lives
NAMESPACE = "berth"


@dataclass(frozen=True, slots=True)
class Report:
    """What a replica says of itself, once a second.

    Attributes:
        pages, page_tokens: KV pages and their size; 0 for an engine without pages.
        slots: rows that may have their home there.
        refill_s: time to prefill the whole pool; infinite where it is not known.
        residents: what it holds; None unless asked for.
        events: how often what happened in its engine since its start.
    """

    pool: str
    replica: str
    pages: int
    page_tokens: int
    slots: int
    refill_s: float = math.inf
    residents: tuple[Resident, ...] | None = None
    events: Mapping[str, int] = field(default_factory=dict[str, int])


@dataclass(frozen=True, slots=True)
class Orders:
    """The answer to a report.

    Attributes:
        report: say what you hold, now.
        end: rows that have left or whose lease is over: free their pages unless they run.
    """

    report: bool = False
    end: tuple[str, ...] = ()


class Ledger:
    """Use as an async Ray actor.

    Args:
        pools: name → pages of one replica where that is known before any has started; small pools first.
        lease_s: a lease that nobody renews for so long ends: a dead agent's rows make room for those that go on.
        dead_s: a replica that has not reported for so long is gone.
        settle_s: after a restart, how long replicas have to report before anybody is given a new home.
    """

    def __init__(
        self,
        pools: Mapping[str, int | None],
        *,
        lease_s: float = 20.0,
        dead_s: float = 15.0,
        settle_s: float = 3.0,
        aging_s: float = 300.0,
    ):
        self.core = Placement(pools, lease_s=lease_s, aging_s=aging_s)
        self.dead_s = dead_s
        self.heard: dict[str, tuple[str, float]] = {}
        self.told: dict[str, tuple[str, Mapping[str, int]]] = {}  # also of replicas that are gone
        self.homes: dict[str, str] = {}
        self.orders: defaultdict[str, list[str]] = defaultdict(list)
        self.waiting: dict[str, asyncio.Future[None]] = {}
        self.closed: dict[str, EngineError] = {}
        restarted = ray.is_initialized() and ray.get_runtime_context().was_current_actor_reconstructed
        self.settled_s = time.monotonic() + (settle_s if restarted else 0.0)
        self.metrics = LedgerMetrics()
        self.measured: defaultdict[str, set[str]] = defaultdict(set)
        self._soon: asyncio.TimerHandle | None = None
        self._watching: asyncio.Task[None] | None = None

    async def acquire(self, ask: Ask) -> Lease | None:
        """The lease of a trajectory, as soon as there is room for it; None: ask again.

        Raises:
            Fenced: a higher attempt has taken the row over.
            EngineError: its pool cannot start.
        """
        if (lease := self.ask(ask)) is None:
            self._place_soon()
            waiting = self.waiting.get(ask.row_id)
            if waiting is None:
                waiting = self.waiting[ask.row_id] = asyncio.get_running_loop().create_future()
            await asyncio.wait([waiting], timeout=ANSWER_S)
            lease = self._granted(ask)
        return lease

    async def do(self, requests: Sequence[tuple[str, tuple[Any, ...]]]) -> list[Any]:
        """Several `ask`, `replied`, `renew` and `end` at once, (name, arguments) each, in order: a Lease or None, or an
        error as a value. Waits for nobody: None to an `ask` means that `acquire` has to."""
        answers = [self._answer(getattr(self, name), arguments) for name, arguments in requests]
        new = [i for i, (name, _) in enumerate(requests) if name == "ask" and answers[i] is None]
        if new and time.monotonic() >= self.settled_s:
            self._place()
            for i in new:
                answers[i] = self._answer(self._granted, requests[i][1])
        self._place_soon()
        return answers

    def _answer(self, method: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
        try:
            return method(*arguments)
        except BerthError as e:
            return e

    def ask(self, ask: Ask) -> Lease | None:
        """The lease of a trajectory if it has one.

        Raises:
            Fenced: a higher attempt has taken the row over.
            EngineError: its pool cannot start.
        """
        if (error := self.closed.get(ask.pool or "")) is not None:
            self.end(ask.row_id, ask.attempt)
            if ask.row_id in self.core.where:
                raise Fenced(f"a higher attempt of {ask.row_id} has taken over from {ask.attempt}")
            raise error.with_traceback(None)  # one for all
        return self._home(ask, self.core.ask(ask, time.monotonic()))

    def replied(self, row_id: str, attempt: int, tokens: int) -> None:
        """A call is answered: the row holds so many tokens and waits for its tool."""
        self.core.replied(row_id, attempt, tokens, time.monotonic())

    def renew(self, row_ids: Sequence[str]) -> None:
        """These trajectories are being rolled out, whatever they wait for; said each RENEW_S."""
        self.core.renew(row_ids, time.monotonic())

    def end(self, row_id: str, attempt: int) -> None:
        """A trajectory is over; its home frees what its agent could not end there."""
        self.core.end(row_id, attempt)
        if row_id in self.core.where:  # a higher attempt's
            return
        if (home := self.homes.pop(row_id, None)) in self.heard:
            self.orders[home].append(row_id)
        self._wake(row_id)

    def _granted(self, ask: Ask) -> Lease | None:
        """The lease that an asker has come to have."""
        lease = self.core.lease(ask.row_id)
        if lease is not None and lease.attempt > ask.attempt:
            raise Fenced(f"attempt {lease.attempt} of {ask.row_id} has taken over from {ask.attempt}")
        return self._home(ask, lease)

    async def close(self, pool: str, error: EngineError) -> None:
        """This pool cannot start: rows that were sent to it get the error, others go to the pools that are left."""
        if pool in self.closed:
            return
        self.closed[pool] = error
        self.core.closed.add(pool)
        for row_id in list(self.waiting):  # all ask again
            self._wake(row_id)

    async def pools(self) -> dict[str, tuple[int, int | None, int]]:
        """By pool: rows that have a home there or wait for one, rows that one replica takes where that is known, and
        replicas."""
        return {
            name: (len(pool.slot), int(pool.slots.max(initial=0)) or None, len(pool.index))
            for name, pool in self.core.pools.items()
        }

    def _home(self, ask: Ask, lease: Lease | None) -> Lease | None:
        """The lease; a home that the row has left frees its pages."""
        if lease is not None and lease.replica is not None:
            before = self.homes.get(ask.row_id, lease.replica)
            if before != lease.replica and before in self.heard:
                self.orders[before].append(ask.row_id)
            self.homes[ask.row_id] = lease.replica
        return lease

    async def report(self, report: Report) -> Orders:
        """A replica lives."""
        now_s = time.monotonic()
        self.heard[report.replica] = (report.pool, now_s)
        self.told[report.replica] = (report.pool, report.events)
        new = self.core.replica_up(
            report.pool, report.replica, report.pages, report.page_tokens, report.slots, report.refill_s
        )
        if report.residents is not None:
            self.core.adopt(report.pool, report.replica, report.residents, now_s)
            for one in report.residents:
                self.homes.setdefault(one.row_id, report.replica)
        self._place_soon()
        return Orders(new and report.residents is None, tuple(self.orders.pop(report.replica, ())))

    async def events(self) -> dict[str, dict[str, int]]:
        """By pool how often what happened in its replicas' engines, of those that are gone too. Waits until the others
        have told all up to now, two reports at most."""
        asked_s = time.monotonic()
        for _ in range(20):
            # What an engine tells its replica is half a second old.
            if all(heard_s > asked_s + 0.5 * REPORT_S for _, heard_s in self.heard.values()):
                break
            await asyncio.sleep(0.1 * REPORT_S)
        found: defaultdict[str, Counter[str]] = defaultdict(Counter)
        for pool, events in self.told.values():
            found[pool].update({name: times for name, times in events.items() if times})
        return {pool: dict(events) for pool, events in found.items()}

    async def state(self) -> dict[str, Any]:
        """What is leased now: leases in all, and pages charged and rows by replica."""
        charged: dict[str, float] = {}
        rows: dict[str, int] = {}
        for pool in self.core.pools.values():
            charged |= pool.charged_pages()
            rows |= {replica: int(pool.residents[r]) for replica, r in pool.index.items()}
        return {"leases": len(self.core.where), "charged_pages": charged, "rows": rows, "homes": dict(self.homes)}

    def _measure(self) -> None:
        for name, pool in self.core.pools.items():
            charged = dict.fromkeys(self.measured[name], 0.0) | pool.charged_pages()  # none at a replica that is gone
            self.metrics.tell(name, int(pool.residents[list(pool.index.values())].sum()), pool.queued, charged)
            self.measured[name] = set(pool.index)

    def _place_soon(self) -> None:
        loop = asyncio.get_running_loop()
        if self._watching is None:
            self._watching = loop.create_task(self._watch())
        if self._soon is None and any(pool.queued for pool in self.core.pools.values()):
            self._soon = loop.call_later(max(PLACE_S, self.settled_s - time.monotonic()), self._place)

    def _place(self) -> None:
        if self._soon is not None:
            self._soon.cancel()
            self._soon = None
        for row_id in self.core.place(time.monotonic()):
            self._wake(row_id)

    def _wake(self, row_id: str) -> None:
        """Whoever waits for the row's lease is to look."""
        waiting = self.waiting.pop(row_id, None)
        if waiting is not None and not waiting.done():
            waiting.set_result(None)

    async def _watch(self) -> None:
        """Once a second: what has expired, who has died."""
        while True:
            await asyncio.sleep(1.0)
            now_s = time.monotonic()
            for replica, (pool, heard_s) in list(self.heard.items()):
                if now_s - heard_s > self.dead_s:
                    del self.heard[replica]
                    self.orders.pop(replica, None)
                    self.core.pools[pool].replica_down(replica)
            for row_id, home in self.core.expire(now_s):
                self.homes.pop(row_id, None)
                self._wake(row_id)
                if home is not None:
                    self.orders[home].append(row_id)
            self._place_soon()
            self._measure()


def start(name: str, pools: Mapping[str, int | None], **options: float) -> Any:
    """Start the actor under a name that replicas find it by, beside this process, with which it ends; until then it
    restarts as often as it dies, and requests wait for it."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
    endless = {"max_restarts": -1, "max_task_retries": -1, "max_concurrency": 100_000, "enable_task_events": False}
    actor: Any = ray.remote(Ledger)
    return actor.options(name=name, namespace=NAMESPACE, num_cpus=0, scheduling_strategy=here, **endless).remote(
        pools, **options
    )


def find(name: str) -> Any:
    """The actor of this name."""
    return ray.get_actor(name, namespace=NAMESPACE)


class Leased:
    """A trajectory's side: asks before each call, says what came of it, ends.

    Args:
        ledger: the actor.
        send: hands a request of `Ledger.do` over with others of its process; the answer need not be awaited.
    """

    def __init__(
        self, ledger: Any, send: Callable[[tuple[str, tuple[Any, ...]]], Awaitable[Any]], row_id: str, suite: str
    ):
        self.ledger, self.send, self.row_id, self.suite = ledger, send, row_id, suite
        self.home: str | None = None
        self.avoid: str | None = None
        self.attempt = 0

    async def acquire(self, attempt: int, forecast: Forecast, tokens: int, pool: str | None = None) -> Lease:
        """Wait for a home for a transcript of `tokens`; renews the lease that there is.

        Raises:
            Fenced: a higher attempt has taken the row over.
            EngineError: its pool cannot start.
        """
        self.attempt = attempt
        ask = Ask(self.row_id, attempt, self.suite, forecast, tokens, self.home, self.avoid, pool)
        lease = await self.send(("ask", (ask,)))
        while lease is None:
            lease = await self.ledger.acquire.remote(ask)
        if isinstance(lease, BerthError):
            raise lease
        return lease

    def answered(self, tokens: int, replica: str) -> None:
        """A replica has answered; the trajectory holds so many tokens now."""
        self.home, self.avoid = replica, None
        self.send(("replied", (self.row_id, self.attempt, tokens)))

    def failed(self, replica: str | None) -> None:
        """The call died; the next attempt is to go elsewhere."""
        self.home, self.avoid = None, replica


class Held(Protocol):
    """What a reporter needs of an engine."""

    def capacity(self) -> Capacity:
        """See `Engine.capacity`."""
        ...

    def end(self, sequence_id: str) -> None:
        """See `Engine.end`."""
        ...


class Reporter:
    """A replica's side: counts what it holds, reports once a second, frees what it is told to.

    Args:
        ledger: the actor's name.
        pool: the pool that the replica belongs to.
        replica: the replica's id.
        engine: whose sizes are reported and whose rows are ended.
    """

    def __init__(self, ledger: str, pool: str, replica: str, engine: Held):
        self.ledger, self.pool, self.replica, self.engine = ledger, pool, replica, engine
        self.residents: dict[str, Resident] = {}
        self.running: Counter[str] = Counter()
        self.prefilled, self.prefill_gpu_s = 0, 0.0
        self.metrics = ReplicaMetrics(pool, replica)
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Report from now on; called on the replica's event loop, as often as one likes."""
        if self._task is None:
            self._task = asyncio.get_running_loop().create_task(self._run())

    @contextmanager
    def call(self, call: Call) -> Generator[None]:
        """A call runs."""
        self.residents[call.row_id] = Resident(call.row_id, call.suite, len(call.token_ids))
        self.running[call.row_id] += 1
        try:
            yield
        finally:
            self.running[call.row_id] -= 1
            if not self.running[call.row_id]:
                del self.running[call.row_id]

    def answered(self, call: Call, usage: Usage) -> None:
        """A call was answered."""
        tokens = usage.prompt_tokens + usage.generated + usage.forced
        if call.row_id in self.residents:
            self.residents[call.row_id] = Resident(call.row_id, call.suite, tokens)
        self.prefilled += usage.prefilled
        self.prefill_gpu_s += usage.prefill_gpu_s

    def end(self, row_id: str) -> None:
        """A row is over."""
        self.residents.pop(row_id, None)

    def report(self, *, all_residents: bool = False) -> Report:
        """What to say now."""
        sizes = self.engine.capacity()
        known = self.prefilled >= 10_000 and self.prefill_gpu_s > 0
        pool_tokens = sizes.pages_total * sizes.page_tokens
        return Report(
            pool=self.pool,
            replica=self.replica,
            pages=sizes.pages_total,
            page_tokens=sizes.page_tokens,
            slots=slots(sizes),
            refill_s=pool_tokens * self.prefill_gpu_s / self.prefilled if known else math.inf,
            residents=tuple(self.residents.values()) if all_residents else None,
            events=dict(getattr(self.engine, "events", {})),
        )

    async def _run(self) -> None:
        ask_all = False
        ledger: Any = None
        while True:
            device = getattr(self.engine, "device", None)
            self.metrics.tell(self.engine.capacity(), getattr(self.engine, "events", {}), device)
            try:
                ledger = ledger or find(self.ledger)
                orders: Orders = await ledger.report.remote(self.report(all_residents=ask_all))
            except (RayError, ValueError) as e:  # the ledger restarts, or is not there yet
                log.info("no ledger: %s", e)
                await asyncio.sleep(REPORT_S)
                continue
            for row_id in orders.end:
                if row_id not in self.running:
                    self.engine.end(row_id)
                    self.end(row_id)
            ask_all = orders.report
            if not ask_all:
                await asyncio.sleep(REPORT_S)


def slots(sizes: Capacity) -> int:
    """Rows that may have their home at a replica: with pages, memory is the bound and this only keeps the number
    finite (three rows wait for tools while one runs); without, a quarter more than run at once."""
    return 4 * sizes.max_batch if sizes.page_tokens else -(-5 * sizes.max_batch // 4)

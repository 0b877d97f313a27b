"""The Serve deployment: one engine on one GPU, on a laptop's CPU, or rank 0 of a gang; its engine has a process of its
own (`process`).

Knows no ReAct, no text and no storage.
"""

from __future__ import annotations

import asyncio
import logging
import os
import threading
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from typing import Any

import ray
from ray import serve

from actors.engine.loader import resolve
from actors.engine.protocol import Capacity, EngineSpec
from actors.errors import BerthError, EngineDead, NotHome
from actors.gang import start_ranks, watch
from actors.ledger import Reporter
from actors.messages import Call, Numerics, Reply
from actors.process import EngineProcess

log = logging.getLogger(__name__)

STEP_LIMIT_S = {"gpu": 120.0, "cpu": 600.0}
"""Seconds. On an H100 a prefill step of an 8B model takes under one; a CPU may be slow, and shared."""
SILENT_LIMIT_S = 60.0
"""An engine's process that runs at all tells how it stands twice a second, whatever its step does."""
TOLD_S = 30.0
"""A rank that ends while the engine starts, for a reason that the ranks agree on, is no surprise to rank 0, which tells
it: so long that may take."""


class Replica:
    """Serves the calls of many trajectories with one engine.

    Args:
        spec: what the engine is built from.
        threads: CPU threads of torch; 0 leaves torch's own number.
        ledger: name of the ledger that it reports to.
        pool: the pool that it belongs to.
        larger: the run's other pools, which Serve keeps beside this one; not called.
    """

    def __init__(self, spec: EngineSpec, threads: int, ledger: str, pool: str, *larger: Any):
        self.id = f"{serve.get_replica_context().replica_id.unique_id}@{os.uname().nodename}"
        spec = replace(spec, oom_folder=f"{spec.oom_folder}/{self.id}")
        ranks: list[Any] = []
        if spec.tp > 1:
            resolve(spec.model, spec.revision)  # once, and before a rank starts
            ranks = start_ranks(spec, threads)
        self.stands = threading.Event()
        watch(ranks, self._rank_ended)
        self.engine = EngineProcess(spec, threads, self._end)
        self.step_limit_s = spec.step_limit_s or STEP_LIMIT_S["gpu" if ray.get_gpu_ids() else "cpu"]
        self.stands.set()
        self.reporter = Reporter(ledger, pool, self.id, self.engine)
        self.reporter.start()

    def _rank_ended(self, why: str) -> None:
        self.stands.wait(TOLD_S)
        self._end(why)

    def _end(self, why: str) -> None:
        log.critical("%s; this process ends, so that Serve replaces it", why)
        os._exit(1)

    async def generate(self, call: Call) -> Reply:
        """Continue a trajectory.

        Raises:
            EngineError: ContextOverflow, OutOfMemory, Cancelled or EngineDead.
            NotHome: its lease is with another replica; served here it would take room that others were promised.
        """
        if call.home not in (None, self.id):
            raise NotHome(f"the home is {call.home}, this is {self.id}")
        with self.reporter.call(call):
            generation = await self.engine.speak(call.token_ids, call.row_id, call.sampling, call.turn)
        self.reporter.answered(call, generation.usage)
        return Reply(generation, self.id, self.engine.numerics, self.engine.device)

    async def generate_many(self, calls: Sequence[Call]) -> AsyncIterator[list[tuple[int, Reply | BerthError]]]:
        """Continue several trajectories: answers as they come, each with its place among the calls. What `generate`
        would raise is an answer too."""
        answered: asyncio.Queue[tuple[int, Reply | BerthError]] = asyncio.Queue()
        running = [asyncio.create_task(self._answer(call, place, answered)) for place, call in enumerate(calls)]
        left = len(calls)
        try:
            while left:
                answers = [await answered.get()]
                while not answered.empty():
                    answers.append(answered.get_nowait())
                left -= len(answers)
                yield answers
        finally:
            for task in running:  # the caller is gone
                task.cancel()

    async def _answer(self, call: Call, place: int, answered: asyncio.Queue[tuple[int, Reply | BerthError]]) -> None:
        answer: Reply | BerthError = EngineDead("the call was given up")
        try:
            answer = await self.generate(call)
        except BerthError as e:
            answer = e
        except Exception as e:  # one call's fault must not be its neighbours'
            log.exception("a call of %s", call.row_id)
            answer = EngineDead(f"{type(e).__name__}: {e}")
        finally:
            answered.put_nowait((place, answer))

    async def end(self, row_ids: Sequence[str]) -> None:
        """Free what the engine keeps for these trajectories."""
        for row_id in row_ids:
            self.engine.end(row_id)
            self.reporter.end(row_id)

    async def describe(self) -> tuple[Numerics, Capacity]:
        """Under which numerics this replica computes, and its sizes."""
        return self.engine.numerics, self.engine.capacity()

    async def check_health(self) -> None:
        """Serve replaces a replica whose engine hangs: a kernel that never returns cannot be ended."""
        silent_s, step_s = self.engine.silent_s(), self.engine.step_s()
        if silent_s > SILENT_LIMIT_S:
            self._end(f"the engine's process has told nothing for {silent_s:.0f} s")
        if step_s > self.step_limit_s:
            self._end(f"the engine is at one step for {step_s:.0f} s, the limit is {self.step_limit_s:g} s")

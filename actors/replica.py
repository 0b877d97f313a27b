"""The Serve deployment: one engine on one GPU, on a laptop's CPU, or rank 0 of a gang.

Turns a Turn (text) into the engine's matcher (token ids) and back. Knows no ReAct and no storage.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections import deque
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import Future
from dataclasses import replace
from typing import Any

import ray
from ray import serve

from actors.engine import build, settle_garbage
from actors.engine.loader import load_tokenizer, resolve, stop_token_ids
from actors.engine.protocol import Capacity, Engine, EngineSpec, Request
from actors.errors import BerthError, EngineDead, NotHome
from actors.gang import start_ranks, watch
from actors.ledger import Reporter
from actors.messages import Call, Generation, Numerics, Reply
from actors.stopping import speak

log = logging.getLogger(__name__)

STEP_LIMIT_S = {"gpu": 120.0, "cpu": 600.0}
"""Seconds. On an H100 a prefill step of an 8B model takes under one; a CPU may be slow, and shared."""


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
        from actors.engine.memory import device_bytes

        if threads:
            import torch

            torch.set_num_threads(threads)
        model = resolve(spec.model, spec.revision)
        self.tokenizer: Any = load_tokenizer(model.folder, trust_remote_code=spec.trust_remote_code)
        self.stop_token_ids = stop_token_ids(model.folder, trust_remote_code=spec.trust_remote_code)
        self.id = f"{serve.get_replica_context().replica_id.unique_id}@{os.uname().nodename}"
        spec = replace(spec, oom_folder=f"{spec.oom_folder}/{self.id}")
        ranks = start_ranks(spec, threads) if spec.tp > 1 else []
        self.engine: Engine = build(spec)
        settle_garbage()
        self.step_limit_s = spec.step_limit_s or STEP_LIMIT_S["gpu" if ray.get_gpu_ids() else "cpu"]
        watch(ranks)
        self.reporter = Reporter(ledger, pool, self.id, self.engine, device_bytes)
        self.reporter.start()
        self.answers = Answers()

    async def generate(self, call: Call) -> Reply:
        """Continue a trajectory.

        Raises:
            EngineError: ContextOverflow, OutOfMemory, Cancelled or EngineDead.
            NotHome: its lease is with another replica; served here it would take room that others were promised.
        """
        if call.home not in (None, self.id):
            raise NotHome(f"the home is {call.home}, this is {self.id}")
        request = Request(
            token_ids=call.token_ids,
            sequence_id=call.row_id,
            max_tokens=call.turn.max_tokens,
            sampling=call.sampling,
            stop_token_ids=self.stop_token_ids,
        )
        with self.reporter.call(call):
            generation = await speak(self.engine, request, call.turn, self.tokenizer, self.answers.wait)
        self.reporter.answered(call, generation.usage)
        return Reply(generation, self.id, self.engine.numerics, self.reporter.device)

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
        """Serve replaces a replica whose engine is dead, or hangs: a kernel that never returns cannot be ended."""
        if why := broken(self.engine, self.step_limit_s):
            log.error("%s; this process ends, so that Serve replaces it", why)
            os._exit(1)


class Answers:
    """Hands what an engine has finished to the event loop, all of a step at once: waking the loop is a system call, and
    both threads then want the interpreter. Made on the loop."""

    def __init__(self):
        self._loop = asyncio.get_running_loop()
        self._finished: deque[asyncio.Future[None]] = deque()
        self._woken = False

    async def wait(self, future: Future[Generation]) -> Generation:
        """The engine's answer. Cancelling this cancels the request."""
        waiting: asyncio.Future[None] = self._loop.create_future()
        future.add_done_callback(lambda _: self._finish(waiting))
        try:
            await waiting
        except asyncio.CancelledError:
            future.cancel()
            raise
        return future.result()

    def _finish(self, waiting: asyncio.Future[None]) -> None:
        self._finished.append(waiting)
        if not self._woken:  # in doubt twice, never not at all
            self._woken = True
            self._loop.call_soon_threadsafe(self._deliver)

    def _deliver(self) -> None:
        self._woken = False
        while self._finished:
            waiting = self._finished.popleft()
            if not waiting.done():
                waiting.set_result(None)


def broken(engine: Engine, step_limit_s: float) -> str | None:
    """Why an engine is of no more use; None where it is."""
    if getattr(engine, "dead", False):
        return "the engine is dead"
    if (seconds := engine.step_s()) > step_limit_s:
        return f"the engine is at one step for {seconds:.0f} s, the limit is {step_limit_s:g} s"
    return None

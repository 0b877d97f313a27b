"""Rank 0 leads: what the engine asks of its runner is told to the other ranks, which do the same at the same time.

A command is a few integers and, for a step, its rows: token ids and pages, nothing of how to draw, since only rank 0's
draw counts. Between commands rank 0 gives signs of life, which each rank answers, so that a dead or stuck rank is found
when nothing runs, too.

Knows nothing of models, devices or Ray.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections.abc import Generator, Sequence
from enum import IntEnum
from itertools import chain
from typing import Any

import numpy as np
import torch

from actors.engine import settle_garbage
from actors.engine.oom import is_out_of_memory
from actors.engine.protocol import NoRecorder, Recorder, RowStep
from actors.engine.shard import ShardedRunner
from actors.errors import EngineDead
from actors.messages import Sampling

log = logging.getLogger(__name__)


class Command(IntEnum):
    """What rank 0 asks for."""

    ALIVE = 0
    STEP = 1
    COPY_PAGES = 2
    RESIZE = 3
    DROP_GRAPHS = 4
    DROP_CACHES = 5
    CLOSE = 6


def die(error: EngineDead) -> None:
    """End this process: a thread that hangs in a kernel or a sum cannot be ended in any other way."""
    log.critical("%s; this process ends", error)
    os._exit(1)


class Leader:
    """Implements `protocol.Runner` for rank 0's engine.

    A rank that is found dead in a command is an EngineDead there. One that is found between commands ends the process
    (see `die`), and so does a command that takes a GPU more than twice the gang's deadline.

    Args:
        runner: rank 0's own.
    """

    def __init__(self, runner: ShardedRunner):
        self._runner, self._gang = runner, runner.gang
        self._lock = threading.Lock()  # the engine's thread and the signs of life take turns
        self._since_s: float | None = None  # when the running command began
        self._closed = False
        self._beatless = threading.Event()  # closed, or known to be lost
        self._beats = threading.Thread(target=self._beat, name="berth-gang", daemon=True)
        self._beats.start()

    def step(self, rows: Sequence[RowStep]) -> Sequence[tuple[int, float] | None]:
        """See `protocol.Runner`."""
        with self._told(Command.STEP, pack(rows, self._runner.kv.page_tokens)):
            return self._runner.step(rows)

    def launch(self, rows: Sequence[RowStep], after: Any = None, sources: Sequence[int | None] = ()) -> None:
        """Ranks agree on each step before the next one."""

    def copy_pages(self, copies: Sequence[tuple[int, int, int]]) -> None:
        """See `protocol.Runner`."""
        with self._told(Command.COPY_PAGES, list(chain.from_iterable(copies))):
            self._runner.copy_pages(copies)

    def drop_graphs(self) -> None:
        """See `protocol.Runner`."""
        with self._told(Command.DROP_GRAPHS):
            self._runner.drop_graphs()

    def resize(self, num_pages: int) -> None:
        """See `protocol.Runner`."""
        with self._told(Command.RESIZE, [num_pages]):
            self._runner.resize(num_pages)

    def drop_caches(self) -> None:
        """Give every device what its allocator keeps for later."""
        with self._told(Command.DROP_CACHES):
            self._runner.drop_caches()

    def close(self) -> None:
        """Send the other ranks home. Can be repeated."""
        if self._closed:
            return
        self._closed = True
        self._beatless.set()
        self._beats.join()
        with contextlib.suppress(EngineDead), self._told(Command.CLOSE):
            self._runner.drop_graphs()  # they hold on to the groups
        self._gang.close()

    @contextlib.contextmanager
    def _told(self, command: Command, words: Any = ()) -> Generator[None]:
        with self._lock:
            self._since_s = time.monotonic()
            try:
                self._gang.send(torch.from_numpy(np.concatenate(([command], words)).astype(np.int32)))
                yield
            except EngineDead:
                self._beatless.set()
                raise
            finally:
                self._since_s = None

    def _beat(self) -> None:
        deadline_s = self._gang.deadline_s
        while not self._beatless.wait(deadline_s / 4):
            since_s = self._since_s
            if since_s is None:
                try:
                    with self._told(Command.ALIVE):
                        self._gang.agree()
                except EngineDead as e:
                    die(e)
            elif self._gang.device.type == "cuda" and time.monotonic() - since_s > 2 * deadline_s:
                die(EngineDead(f"a step did not end within {2 * deadline_s:g} s"))


def lead(runner: ShardedRunner, recorder: Recorder | None = None) -> Leader:
    """Rank 0's leader; the other ranks follow until it closes, and then raise SystemExit."""
    if runner.gang.rank == 0:
        return Leader(runner)
    recorder = recorder or NoRecorder()
    settle_garbage()
    try:
        follow(runner, recorder)
    finally:
        recorder.close()
    raise SystemExit(0)


def follow(runner: ShardedRunner, recorder: Recorder) -> None:
    """Ranks 1 and up: do what rank 0 says until it closes.

    Args:
        recorder: this rank's; is told of each out-of-memory error and each step.

    Raises:
        EngineDead: rank 0, or another rank, is gone.
    """
    gang, page_tokens = runner.gang, runner.kv.page_tokens
    while True:
        told = gang.receive().numpy()
        command, words = Command(told[0]), told[1:]
        if command is Command.CLOSE:
            runner.drop_graphs()
            gang.close()
            return
        failure: Exception | None = None
        try:
            match command:
                case Command.ALIVE:
                    gang.agree()
                case Command.STEP:
                    runner.step(unpack(words, page_tokens))
                case Command.COPY_PAGES:
                    runner.copy_pages([(src, dst, tokens) for src, dst, tokens in words.reshape(-1, 3).tolist()])
                case Command.RESIZE:
                    runner.resize(*words.tolist())
                case Command.DROP_GRAPHS:
                    runner.drop_graphs()
                case Command.DROP_CACHES:
                    runner.drop_caches()
        except EngineDead:
            raise
        except Exception as e:
            failure = e.with_traceback(None)  # all ranks agreed on it; rank 0's engine decides what to do
        recorded = ""
        if command is Command.STEP:
            recorder.ended()
            recorded = recorder.failed("step") if failure is not None and is_out_of_memory(failure) else ""
        if failure is not None:
            log.warning("%s failed: %s%s", command.name, failure, recorded)


def pack(rows: Sequence[RowStep], page_tokens: int) -> np.ndarray:
    """Rows as int32: for each its number of tokens, start, whether it draws, token ids and the pages in use."""
    parts = (
        ((len(row.token_ids), row.start, row.sample), row.token_ids, row.pages[: _used(row, page_tokens)])
        for row in rows
    )
    return np.fromiter(chain.from_iterable(chain.from_iterable(parts)), np.int32)


def unpack(words: np.ndarray, page_tokens: int) -> list[RowStep]:
    """What `pack` packed; all rows are greedy."""
    values, at = words.tolist(), 0
    rows: list[RowStep] = []
    while at < len(values):
        count, start, sample = values[at : at + 3]
        row = RowStep(values[at + 3 : at + 3 + count], start, (), bool(sample), Sampling())
        at += 3 + count + _used(row, page_tokens)
        row.pages = values[at - _used(row, page_tokens) : at]
        rows.append(row)
    return rows


def _used(row: RowStep, page_tokens: int) -> int:
    return -(-(row.start + len(row.token_ids)) // page_tokens)

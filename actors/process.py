"""The engine in a process of its own, so that its thread has an interpreter to itself: beside the replica's event loop,
which routes, pickles and counts, a step on an H100 waited for the interpreter longer than for the GPU.

A call crosses as token ids and its turn, and is matched and answered on the other side (`stopping.speak`). What comes
together crosses together, both ways. Either process ends with the other: each sees the pipe's end.

Knows no Ray, no ReAct and no storage.
"""

from __future__ import annotations

import asyncio
import ctypes
import faulthandler
import itertools
import logging
import os
import signal
import subprocess
import sys
import threading
import time
import traceback
from array import array
from collections import deque
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import Any

from actors.engine import build, settle_garbage
from actors.engine.loader import load_tokenizer, resolve, stop_token_ids
from actors.engine.protocol import Capacity, EngineSpec, Request
from actors.errors import BerthError, EngineDead, InputError
from actors.messages import DeviceBytes, Generation, Numerics, Sampling, Turn
from actors.stopping import speak

log = logging.getLogger(__name__)

STATUS_S = 0.5
"""How often an engine's process tells how it stands."""
PR_SET_PDEATHSIG = 1  # linux/prctl.h


@dataclass(frozen=True, slots=True)
class Status:
    """How an engine stands.

    Attributes:
        events: how often what has happened, since the start.
        device: the GPU's memory; None without one, or where it does not tell.
        step_s: see `Engine.step_s`.
    """

    capacity: Capacity
    events: Mapping[str, int]
    device: DeviceBytes | None
    step_s: float


class EngineProcess:
    """Starts an engine in a process of its own, and speaks with it from an event loop. Made on that loop, which it
    blocks until the engine stands.

    Args:
        spec: what the engine is built from.
        threads: CPU threads of torch there; 0 leaves torch's own number.
        on_end: told once, on a thread, that the process has ended, and how; not after `close`.

    Attributes:
        numerics: under which the engine computes.
        status: what it told last.

    Raises:
        BerthError: what `build` raises there; RuntimeError for what is none, with where it came from.
        EngineDead: the process ended before the engine stood.
    """

    def __init__(self, spec: EngineSpec, threads: int = 0, on_end: Callable[[str], None] = lambda how: None):
        self._pipe, other = Pipe()
        # Not `multiprocessing.Process`, which would run the main module of this process there.
        command = [sys.executable, "-uPc", "from actors.process import main; main()", str(other.fileno())]
        paths = os.pathsep.join(path or os.getcwd() for path in sys.path)
        self._process = subprocess.Popen(
            command, pass_fds=[other.fileno()], env=os.environ | {"PYTHONPATH": paths}, stdin=subprocess.DEVNULL
        )
        other.close()
        try:
            self._pipe.send((spec, threads))
            first = self._pipe.recv()
        except (EOFError, OSError):
            raise EngineDead(self._ended()) from None
        if isinstance(first, BaseException):
            self._ended()
            raise first
        self.numerics: Numerics
        self.status: Status
        self.numerics, self.status = first
        self.pid = self._process.pid
        self._told_s = time.monotonic()
        self._on_end = on_end
        self._closed = False
        self._numbers = itertools.count()
        self._waiting: dict[int, asyncio.Future[Any]] = {}
        self._outbox: list[tuple[int, str, tuple[Any, ...]]] = []
        self._loop = asyncio.get_running_loop()
        self._thread = threading.Thread(target=self._read, name="berth-engine-pipe", daemon=True)
        self._thread.start()

    @property
    def events(self) -> Mapping[str, int]:
        """How often what has happened, since the start."""
        return self.status.events

    def capacity(self) -> Capacity:
        """See `Engine.capacity`, STATUS_S ago at most."""
        return self.status.capacity

    @property
    def device(self) -> DeviceBytes | None:
        """The GPU's memory."""
        return self.status.device

    def step_s(self) -> float:
        """See `Engine.step_s`."""
        return self.status.step_s + self.silent_s()

    def silent_s(self) -> float:
        """Seconds for which the process has told nothing, though it should have; it tells during a step, too."""
        return max(0.0, time.monotonic() - self._told_s - 2 * STATUS_S)

    async def speak(self, token_ids: Sequence[int], sequence_id: str, sampling: Sampling, turn: Turn) -> Generation:
        """See `stopping.speak`; the engine's own stop tokens end the generation too. Cancelling this cancels the
        request.

        Raises:
            EngineError: as `Engine.submit`.
        """
        return await self.ask("speak", array("i", token_ids), sequence_id, sampling, turn)

    async def ask(self, name: str, *arguments: Any) -> Any:
        """What a method of the engine there returns."""
        number, waiting = next(self._numbers), self._loop.create_future()
        self._waiting[number] = waiting
        self._post(number, name, arguments)
        try:
            return await waiting
        except asyncio.CancelledError:
            self._post(number, "cancel", ())
            raise
        finally:
            del self._waiting[number]

    def end(self, sequence_id: str) -> None:
        """See `Engine.end`."""
        self._post(-1, "end", (sequence_id,))

    def close(self) -> None:
        """Close the engine, end its process. Calls that wait are left waiting."""
        self._closed = True
        self._post(-1, "close", ())
        self._send()
        self._thread.join()

    def _post(self, number: int, name: str, arguments: tuple[Any, ...]) -> None:
        if not self._outbox:
            self._loop.call_soon(self._send)
        self._outbox.append((number, name, arguments))

    def _send(self) -> None:
        messages, self._outbox = self._outbox, []
        if messages:
            try:
                self._pipe.send(messages)
            except OSError:  # the process has ended, which `_read` sees
                log.info("the engine's process does not listen")
            except Exception as e:  # an argument that cannot cross
                self._deliver([(number, e) for number, _, _ in messages])

    def _read(self) -> None:
        while True:
            try:
                told = self._pipe.recv()
                if isinstance(told, Status):
                    self.status, self._told_s = told, time.monotonic()
                else:
                    self._loop.call_soon_threadsafe(self._deliver, told)
            except (EOFError, OSError):
                break
            except Exception:
                log.exception("an answer of the engine's process cannot be read")
                self._process.kill()
        how = self._ended()
        if not self._closed:
            self._on_end(how)

    def _deliver(self, answers: Sequence[tuple[int, Any]]) -> None:
        for number, answer in answers:
            waiting = self._waiting.get(number)
            if waiting is None or waiting.done():  # given up meanwhile
                continue
            if isinstance(answer, BaseException):
                waiting.set_exception(answer)
            else:
                waiting.set_result(answer)

    def _ended(self) -> str:
        self._pipe.close()
        return f"the engine's process has ended, exit code {self._process.wait()}"


# --- the engine's side


class Host:
    """Serves an engine to the process at the pipe's other end."""

    def __init__(self, pipe: Connection):
        self._pipe = pipe
        self._answered: deque[tuple[int, Future[Any]]] = deque()
        self._woken = threading.Event()
        self._running: dict[int, Future[Any]] = {}
        self._engine: Any = None
        self._tokenizer: Any = None
        self._stop_token_ids: frozenset[int] = frozenset()

    def build(self, spec: EngineSpec, threads: int) -> None:
        """Load the engine."""
        import torch  # here, for the other process has no use for it

        if threads:
            torch.set_num_threads(threads)
        folder, trusted = resolve(spec.model, spec.revision).folder, spec.trust_remote_code
        self._tokenizer = load_tokenizer(folder, trust_remote_code=trusted)
        self._stop_token_ids = stop_token_ids(folder, trust_remote_code=trusted)
        self._engine = build(spec)
        settle_garbage()

    @property
    def numerics(self) -> Numerics:
        """Of the engine."""
        return self._engine.numerics

    def status(self) -> Status:
        """How the engine stands now."""
        from actors.engine.memory import device_bytes

        try:
            device = device_bytes()
        except RuntimeError as e:  # a dead CUDA context, which the engine finds too
            log.warning("the GPU does not tell its memory: %s", e)
            device = None
        engine = self._engine
        return Status(engine.capacity(), dict(getattr(engine, "events", {})), device, engine.step_s())

    def read(self) -> None:
        """Take calls until the other process is gone, and then end this one, whatever its threads do."""
        with _fatal():
            while True:
                try:
                    messages = self._pipe.recv()
                except (EOFError, OSError):
                    os._exit(0)
                for message in messages:
                    self._take(*message)

    def write(self) -> None:
        """Give answers, all at once that have come since the last ones; every STATUS_S how the engine stands. Ends this
        process when the engine is dead."""
        told_s = 0.0
        while True:
            self._woken.wait(STATUS_S)
            self._woken.clear()
            answers: list[tuple[int, Any]] = []
            while self._answered:
                answers.append(_answer(*self._answered.popleft()))
            for number, _ in answers:
                self._running.pop(number, None)
            if answers:
                self._pipe.send(answers)
            if getattr(self._engine, "dead", None):
                os._exit(1)
            if time.monotonic() - told_s >= STATUS_S:
                told_s = time.monotonic()
                self._pipe.send(self.status())

    def _take(self, number: int, name: str, arguments: tuple[Any, ...]) -> None:
        if name == "speak":
            try:
                spoken = self._spoken(*arguments)
            except Exception as e:  # one call's fault must not be its neighbours'
                spoken = Future[Generation]()
                spoken.set_exception(e)
            self._answer_with(number, spoken)
        elif name == "cancel":
            if (future := self._running.get(number)) is not None:
                future.cancel()
        elif name == "end":
            self._engine.end(*arguments)
        elif name == "close":
            self._engine.close()
            os._exit(0)
        else:  # may take as long as it likes
            threading.Thread(target=self._call, args=(number, name, arguments), daemon=True).start()

    def _spoken(self, token_ids: array[int], sequence_id: str, sampling: Sampling, turn: Turn) -> Future[Generation]:
        request = Request(token_ids.tolist(), sequence_id, turn.max_tokens, sampling, self._stop_token_ids)
        return speak(self._engine, request, turn, self._tokenizer)

    def _call(self, number: int, name: str, arguments: tuple[Any, ...]) -> None:
        future: Future[Any] = Future()
        self._answer_with(number, future)
        if not future.set_running_or_notify_cancel():
            return
        try:
            answer = getattr(self._engine, name)(*arguments)
        except Exception as e:
            future.set_exception(e)
        else:
            future.set_result(answer)

    def _answer_with(self, number: int, future: Future[Any]) -> None:
        self._running[number] = future
        future.add_done_callback(partial(self._done, number))

    def _done(self, number: int, future: Future[Any]) -> None:
        self._answered.append((number, future))
        self._woken.set()


def _answer(number: int, future: Future[Any]) -> tuple[int, Any]:
    if future.cancelled():
        return number, EngineDead("the call was given up")
    error = future.exception()
    return number, future.result() if error is None else _told(error)


def _told(error: BaseException) -> BaseException:
    """An error that can cross, with where it came from, unless it is one for people."""
    if isinstance(error, BerthError):
        return error
    told = RuntimeError(f"{type(error).__name__}: {error}")
    told.add_note("".join(traceback.format_exception(error)))
    return told


@contextmanager
def _fatal() -> Generator[None]:
    """Whatever is raised ends this process, whose other threads would go on without this one."""
    try:
        yield
    except BaseException:
        log.critical("this process ends:\n%s", traceback.format_exc())
        os._exit(1)


def main() -> None:
    """The process of an engine; its argument is the pipe's descriptor."""
    pipe = Connection(int(sys.argv[1]))
    os.set_inheritable(pipe.fileno(), False)
    faulthandler.enable()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a run is interrupted at its driver
    if sys.platform == "linux":  # of a process that is stopped, too, which does not see the pipe's end
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    host = Host(pipe)
    spec, threads = pipe.recv()
    threading.Thread(target=host.read, name="berth-pipe", daemon=True).start()
    try:
        host.build(spec, threads)
        first: Any = (host.numerics, host.status())
    except BaseException as e:
        if not isinstance(e, InputError):
            log.error("the engine does not start", exc_info=e)
        first = _told(e)
    with _fatal():
        pipe.send(first)
        if isinstance(first, BaseException):
            os._exit(1)
        host.write()

"""One trajectory's tools: runs calls under limits of time and size and turns every failure into an observation.

Knows nothing of how tools are declared, of prompt formats, or of Ray. A tool runs in this process: one that is
killed takes the process with it, and an async tool that blocks the event loop blocks every trajectory.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
import os
import re
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from actors.errors import ToolCrash, ToolError, ToolTimeout
from actors.messages import Task
from actors.tools.declare import Tool

MAX_BYTES = 1 << 20
CHARS_PER_TOKEN = 32  # English has 4; past this the text is not worth tokenizing (512 tokens: 16 k characters, 4 ms)
MARKER = " … [cut]"
MARKER_TOKENS = 8  # at most, in byte-level vocabularies
CLOSE_TIMEOUT_S = 10.0

Cut = Callable[[str, int], str]
"""(text, max_tokens) → the text itself if it has at most that many tokens, else its beginning that has."""

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ToolResult:
    """What came of one call.

    Attributes:
        observation: what the model is shown.
        seconds: from the call to the observation.
        error: what went wrong; None if nothing did.
        crashed: the tool broke (a bug, a hung pool), not the model's doing.
    """

    observation: str
    seconds: float
    error: str | None = None
    crashed: bool = False


@dataclass(frozen=True, slots=True)
class _Outcome:
    """A call's value or exception, as data: raising a tool's SystemExit in a coroutine would end the event loop."""

    value: Any = None
    error: BaseException | None = None


class ToolThreads:
    """Runs synchronous calls in daemon threads, at most `workers` at once in one event loop.

    A call that passes its limit is abandoned: Python cannot stop a thread, so its slot goes to the next call and
    the thread is only counted, until it ends by itself.

    Args:
        workers: calls that run at once; further ones wait, and their limit starts when they run.
        max_abandoned: abandoned threads still running at which further calls are refused with ToolCrash.
    """

    def __init__(self, workers: int = 32, max_abandoned: int = 64):
        self._slots = asyncio.Semaphore(workers)
        self._max_abandoned = max_abandoned
        self.abandoned = 0

    async def run(self, call: Callable[[], Any], timeout_s: float) -> _Outcome:
        """The call's outcome; ToolTimeout after `timeout_s` seconds."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[_Outcome] = loop.create_future()

        def settle(outcome: _Outcome) -> None:
            if future.done():
                self.abandoned -= 1
            else:
                future.set_result(outcome)

        def work() -> None:
            try:
                outcome = _Outcome(call())
            except BaseException as e:  # a tool's sys.exit() is the tool's failure
                outcome = _Outcome(error=e)
            try:
                loop.call_soon_threadsafe(settle, outcome)
            except RuntimeError:  # the loop was closed while an abandoned call ran on
                log.debug("a tool call ended after its event loop")

        async with self._slots:
            if self.abandoned >= self._max_abandoned:
                raise ToolCrash(
                    f"{self.abandoned} tool threads hang past their time limit; no further synchronous tool is run "
                    "until one of them ends"
                )
            try:
                threading.Thread(target=work, name="berth-tool", daemon=True).start()
            except RuntimeError as e:  # the process may start no more threads
                raise ToolCrash(str(e)) from e
            try:
                return await asyncio.wait_for(future, timeout_s)
            except TimeoutError as e:
                raise ToolTimeout(f"no result after {timeout_s:g} s") from e
            finally:
                if future.cancelled():  # by the time limit, or because the trajectory was cancelled
                    self.abandoned += 1


class Toolbox:
    """The tools of one trajectory. Class tools get their instance at the first call.

    Args:
        tools: what `load_tools` returned.
        task: the trajectory's task.
        cut: shortens a text to a number of tokens.
        threads: shared by all trajectories of the process.
    """

    def __init__(self, tools: Sequence[Tool], task: Task, cut: Cut, threads: ToolThreads):
        self._tools = {tool.name.casefold(): tool for tool in tools}
        self._task = task
        self._cut = cut
        self._threads = threads
        self._instances: dict[Callable[[Task], object], object] = {}

    def find(self, name: str) -> Tool | None:
        """The tool of this name (without case)."""
        return self._tools.get(name.strip().casefold())

    async def call(self, name: str, arguments: Mapping[str, Any], max_tokens: int = sys.maxsize) -> ToolResult:
        """Call a tool by name (without case). Never raises for a tool's failure; see ToolResult.

        Args:
            max_tokens: of the observation; the tool's own limit if that is lower.
        """
        start = time.perf_counter()
        tool = self.find(name)
        if tool is None:
            names = ", ".join(tool.name for tool in self._tools.values())
            text = self._bounded(f"There is no tool {name!r}. Tools: {names or 'none'}.", min(64, max_tokens), ())
            return ToolResult(text, time.perf_counter() - start, error=text)
        error: str | None = None
        crashed = False
        try:
            observation = await self._attempt(tool, arguments)
        except ToolTimeout as e:
            observation = f"Tool {tool.name} failed: {e}."
            error = f"ToolTimeout: {e}"
        except ToolCrash as e:
            crashed = True
            observation = error = f"Tool {tool.name} failed: {e}"
            cause = e.__cause__
            if cause is not None and (frames := traceback.extract_tb(cause.__traceback__)):
                error += f" ({frames[-1].filename}:{frames[-1].lineno})"
        except ToolError as e:
            observation = error = str(e)
        observation = self._bounded(observation, min(tool.max_tokens, max_tokens), tool.env)
        if error is not None:
            error = self._bounded(error, 512, tool.env)
        return ToolResult(observation, time.perf_counter() - start, error, crashed)

    async def close(self) -> None:
        """Call `close()` of every class tool's instance that has one; failures are logged."""
        instances, self._instances = self._instances, {}
        for instance in instances.values():
            close = getattr(instance, "close", None)
            if close is None:
                continue
            try:
                if inspect.iscoroutinefunction(close):
                    outcome = await _awaited(close, CLOSE_TIMEOUT_S)
                else:
                    outcome = await self._threads.run(close, CLOSE_TIMEOUT_S)
            except ToolError as e:
                outcome = _Outcome(error=e)
            if outcome.error is not None:
                log.error("%s.close() failed", type(instance).__name__, exc_info=outcome.error)

    async def _attempt(self, tool: Tool, arguments: Mapping[str, Any]) -> str:
        checked = tool.check(arguments)

        def call() -> Any:
            return getattr(self._instance(tool), tool.method)(**checked)

        if tool.is_async:
            outcome = await _awaited(call, tool.timeout_s)
        else:
            outcome = await self._threads.run(call, tool.timeout_s)
        if isinstance(outcome.error, ToolError):
            raise outcome.error
        if outcome.error is not None:
            raise ToolCrash(_describe(outcome.error)) from outcome.error
        if not isinstance(outcome.value, str):
            raise ToolCrash(f"it returned {type(outcome.value).__name__}, not a string")
        return outcome.value

    def _instance(self, tool: Tool) -> object:
        if tool.make not in self._instances:
            self._instances[tool.make] = tool.make(self._task)
        return self._instances[tool.make]

    def _bounded(self, text: str, max_tokens: int, env: Sequence[str]) -> str:
        """Cut to the limits, clean of what UTF-8 or a table cannot hold and of the values of `env`."""
        whole = len(text)
        text = _clean(text[:MAX_BYTES])  # a slice of the first MiB: the rest of a huge result is never copied
        text = text.encode()[:MAX_BYTES].decode(errors="ignore")
        is_cut = len(text) < whole
        for name in env:
            if value := os.environ.get(name):
                text = text.replace(value, f"[{name}]")
        short = text[: CHARS_PER_TOKEN * max_tokens]
        kept = self._cut(short, max_tokens)
        if kept == text and not is_cut:
            return text
        room = max_tokens - MARKER_TOKENS
        return self._cut(short, room) + MARKER if room > 0 else kept


async def _awaited(call: Callable[[], Any], timeout_s: float) -> _Outcome:
    """The outcome of an async call; ToolTimeout after `timeout_s` seconds, even if it ignores its cancellation."""

    async def guarded() -> _Outcome:
        try:
            return _Outcome(await call())
        except asyncio.CancelledError:
            raise
        except BaseException as e:  # a tool's sys.exit() is the tool's failure
            return _Outcome(error=e)

    task = asyncio.create_task(guarded())
    try:
        await asyncio.wait({task}, timeout=timeout_s)
        if not task.done():
            raise ToolTimeout(f"no result after {timeout_s:g} s")
        if task.cancelled():
            raise ToolCrash("it cancelled itself")
        return task.result()
    finally:
        task.cancel()


def _clean(text: str) -> str:
    """Lone surrogates and NULs replaced one for one."""
    return re.sub("[\ud800-\udfff\0]", "\ufffd", text)


def _describe(error: BaseException) -> str:
    try:
        return f"{type(error).__name__}: {error}"
    except Exception:  # its __str__ may fail as well
        return type(error).__name__

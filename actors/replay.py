"""Step-level resume: what a trajectory did is recorded, and done again from the record after a crash.

A rollout is a function of what the model and the tools answered. So a new attempt runs the same loop from the start
and gets the recorded answers, until they end; then it calls the model and the tools. Knows no Ray and no storage.
"""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from actors.agent import Generate
from actors.messages import Generation, Turn, Usage
from actors.tools import Toolbox, ToolResult

Record = Callable[[dict[str, Any]], Awaitable[None]]
"""Makes an event durable; in order, and it need not be awaited."""

INTERRUPTED = "Tool {} was interrupted by a crash after it was called; whether it took effect is not known."


class Replayed:
    """`generate` and tools of one trajectory, with what earlier attempts recorded first.

    Recorded generations are not computed again, and none begins before the one before is on record: a crash costs the
    call under way and no other. A tool's recorded result is what the model sees; the tool itself is called again only
    to rebuild the state of its instance, and never where it is not idempotent. A call of such a tool whose result is
    not on record is not repeated: it counts as a crash of the tool.

    Args:
        generate, toolbox: the real ones.
        events: what earlier attempts recorded, oldest first.
        record: records what this attempt does.
    """

    def __init__(self, generate: Generate, toolbox: Toolbox, events: Iterable[Mapping[str, Any]], record: Record):
        self._generate = generate
        self._toolbox = toolbox
        self._events = deque(events)
        self._record = record
        self._recorded: Awaitable[None] | None = None  # the last generation of this attempt

    async def generate(self, token_ids: Sequence[int], turn: Turn) -> Generation:
        """The recorded generation, or a new one."""
        if (event := self._next("generation")) is not None:
            usage = Usage(**event["usage"])
            return Generation(tuple(event["token_ids"]), event["finish_reason"], usage)
        if self._recorded is not None:  # while it was made durable, the tool ran
            await self._recorded
        found = await self._generate(token_ids, turn)
        self._recorded = self._record(
            {
                "kind": "generation",
                "token_ids": found.token_ids,
                "finish_reason": found.finish_reason,
                "usage": asdict(found.usage),
            }
        )
        return found

    async def call(self, name: str, arguments: Mapping[str, Any], max_tokens: int = sys.maxsize) -> ToolResult:
        """The recorded result, or that of a call."""
        tool = self._toolbox.find(name)
        repeatable = tool is None or tool.idempotent
        called = self._next("call") is not None
        if (event := self._next("tool")) is not None:
            if tool is not None and tool.stateful and tool.idempotent:
                await self._toolbox.call(name, arguments, max_tokens)
            return ToolResult(**event["result"])
        if called:
            said = INTERRUPTED.format(name)
            result = ToolResult(said, 0.0, said, crashed=True)
        else:
            if not repeatable:
                await self._record({"kind": "call"})
            result = await self._toolbox.call(name, arguments, max_tokens)
        recorded = self._record({"kind": "tool", "result": asdict(result)})
        if not repeatable:
            await recorded
        return result

    def _next(self, kind: str) -> Mapping[str, Any] | None:
        """The next event, if it is of this kind."""
        if self._events and self._events[0]["kind"] == kind:
            return self._events.popleft()
        return None

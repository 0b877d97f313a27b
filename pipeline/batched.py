"""Many small requests of one process become few large ones. Knows no Ray."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from typing import Any

from actors.errors import EngineDead


class Batched:
    """Collects requests for a moment and sends them together; each caller gets its own answer.

    Requests are sent in the order they were made; several batches may be under way.

    Args:
        send: takes the requests, gives their answers as they come, each with its request's place in the batch. Its
            exception is every caller's that has no answer yet.
        delay_s: how long the first request of a batch waits for others.
        most: requests of a batch.
    """

    def __init__(
        self,
        send: Callable[[Sequence[Any]], AsyncIterator[Iterable[tuple[int, Any]]]],
        delay_s: float,
        most: int = sys.maxsize,
    ):
        self._send = send
        self._delay_s = delay_s
        self._most = most
        self._waiting: list[tuple[Any, asyncio.Future[Any]]] = []
        self._sending: set[asyncio.Task[None]] = set()

    def __call__(self, request: Any) -> asyncio.Future[Any]:
        """The answer, in time; it need not be awaited."""
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        if len(self._waiting) % self._most == 0:
            task = asyncio.create_task(self._flush())
            self._sending.add(task)
            task.add_done_callback(self._sending.discard)
        self._waiting.append((request, future))
        return future

    @property
    def busy(self) -> bool:
        """Whether a request waits for its answer."""
        return bool(self._sending)

    async def _flush(self) -> None:
        await asyncio.sleep(self._delay_s)
        batch, self._waiting = self._waiting[: self._most], self._waiting[self._most :]
        unanswered = {place: future for place, (_, future) in enumerate(batch)}
        try:
            async for answers in self._send([request for request, _ in batch]):
                for place, answer in answers:
                    if not (future := unanswered.pop(place)).done():
                        future.set_result(answer)
            if unanswered:
                raise EngineDead(f"{len(unanswered)} of {len(batch)} requests got no answer")
        except BaseException as e:
            for future in unanswered.values():
                if not future.done():
                    future.set_exception(e if isinstance(e, Exception) else EngineDead("the request was given up"))
                    future.exception()  # marked as seen: not every caller waits
            if not isinstance(e, Exception):
                raise

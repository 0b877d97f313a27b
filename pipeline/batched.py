"""Many small requests of one process become few large ones. Knows no Ray."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Any


class Batched:
    """Collects requests for a moment and sends them together; each caller gets its own answer.

    Requests are sent in the order they were made; several batches may be under way.

    Args:
        send: takes the requests, answers in their order. Its exception is every caller's.
        delay_s: how long the first request of a batch waits for others.
    """

    def __init__(self, send: Callable[[Sequence[Any]], Awaitable[Sequence[Any]]], delay_s: float):
        self._send = send
        self._delay_s = delay_s
        self._waiting: list[tuple[Any, asyncio.Future[Any]]] = []
        self._sending: set[asyncio.Task[None]] = set()

    def __call__(self, request: Any) -> asyncio.Future[Any]:
        """The answer, in time; it need not be awaited."""
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        if not self._waiting:
            task = asyncio.create_task(self._flush())
            self._sending.add(task)
            task.add_done_callback(self._sending.discard)
        self._waiting.append((request, future))
        return future

    async def _flush(self) -> None:
        await asyncio.sleep(self._delay_s)
        batch, self._waiting = self._waiting, []
        try:
            answers = await self._send([request for request, _ in batch])
        except Exception as e:
            for _, future in batch:
                if not future.done():
                    future.set_exception(e)
                    future.exception()  # marked as seen: not every caller waits
            return
        for (_, future), answer in zip(batch, answers, strict=True):
            if not future.done():
                future.set_result(answer)

"""A replica's side of the engine's futures, without Serve: what finishes together is handed over together."""

import asyncio
import threading
import warnings
from concurrent.futures import Future

import pytest

from actors.errors import OutOfMemory
from actors.messages import Generation, Usage

with warnings.catch_warnings():  # Ray Serve's own
    warnings.simplefilter("ignore", DeprecationWarning)
    from actors.replica import Answers


def on_a_thread(do) -> None:
    thread = threading.Thread(target=do)
    thread.start()
    thread.join()


async def test_what_finishes_together_wakes_the_loop_once(monkeypatch):
    answers, loop = Answers(), asyncio.get_running_loop()
    futures = [Future[Generation]() for _ in range(5)]
    calls = [asyncio.create_task(answers.wait(future)) for future in futures]
    await asyncio.sleep(0)
    woken, wake = [], loop.call_soon_threadsafe
    monkeypatch.setattr(loop, "call_soon_threadsafe", lambda *a, **k: woken.append(a) or wake(*a, **k))
    given = [Generation((n,), "stop", Usage()) for n in range(4)]

    def step():
        for future, generation in zip(futures, given, strict=False):
            future.set_result(generation)
        futures[4].set_exception(OutOfMemory("alone", "decode"))

    on_a_thread(step)
    assert await asyncio.gather(*calls[:4]) == given
    with pytest.raises(OutOfMemory, match="alone"):
        await calls[4]
    assert len(woken) == 1
    last = Future[Generation]()
    on_a_thread(lambda: last.set_result(given[0]))
    assert await answers.wait(last) == given[0]


async def test_a_cancelled_call_cancels_its_request():
    future = Future[Generation]()
    call = asyncio.create_task(Answers().wait(future))
    await asyncio.sleep(0)
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    assert future.cancelled()

import asyncio

import pytest

from actors.errors import EngineDead
from pipeline.batched import Batched


async def test_many_become_one_and_each_gets_its_own():
    sent = []

    async def send(requests):
        sent.append(list(requests))
        yield [(place, request * 2) for place, request in enumerate(requests)]

    batched = Batched(send, 0.01)
    assert await asyncio.gather(*(batched(n) for n in range(5))) == [0, 2, 4, 6, 8]
    assert sent == [[0, 1, 2, 3, 4]]
    assert await batched(7) == 14


async def test_a_failure_is_every_callers_of_that_batch_and_no_others():
    async def send(requests):
        if "bad" in requests:
            raise OSError("away")
        yield enumerate(requests)

    batched = Batched(send, 0.01)
    first = [batched("bad"), batched("good")]
    for future in first:
        with pytest.raises(OSError, match="away"):
            await future
    assert await batched("good") == "good"


async def test_a_caller_that_went_away_disturbs_nobody():
    async def send(requests):
        yield enumerate(requests)

    batched = Batched(send, 0.01)
    gone, stays = batched(1), batched(2)
    gone.cancel()
    assert await stays == 2


async def test_an_answer_waits_for_no_other_of_its_batch_and_a_failure_takes_none_back():
    go_on = asyncio.Event()

    async def send(requests):
        yield [(1, "quick")]
        await go_on.wait()
        yield [(2, "slow")]
        raise OSError("away")

    batched = Batched(send, 0.01)
    lost, quick, slow = batched(0), batched(1), batched(2)
    assert await quick == "quick"
    assert not slow.done()
    go_on.set()
    assert await slow == "slow"
    with pytest.raises(OSError, match="away"):
        await lost


async def test_batches_are_of_bounded_size_and_in_order():
    sent = []

    async def send(requests):
        sent.append(requests)
        yield enumerate(requests)

    batched = Batched(send, 0.01, most=2)
    assert await asyncio.gather(*(batched(n) for n in range(5))) == [0, 1, 2, 3, 4]
    assert sent == [[0, 1], [2, 3], [4]]


async def test_a_request_that_gets_no_answer_is_told():
    async def half(requests):
        yield [(0, requests[0])]

    ask = Batched(half, 0.0)
    first, second = ask("a"), ask("b")
    assert await first == "a"
    with pytest.raises(EngineDead, match="1 of 2 requests got no answer"):
        await second

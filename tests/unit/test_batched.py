import asyncio

import pytest

from pipeline.batched import Batched


async def test_many_become_one_and_each_gets_its_own():
    sent = []

    async def send(requests):
        sent.append(list(requests))
        return [request * 2 for request in requests]

    batched = Batched(send, 0.01)
    assert await asyncio.gather(*(batched(n) for n in range(5))) == [0, 2, 4, 6, 8]
    assert sent == [[0, 1, 2, 3, 4]]
    assert await batched(7) == 14


async def test_a_failure_is_every_callers_of_that_batch_and_no_others():
    async def send(requests):
        if "bad" in requests:
            raise OSError("away")
        return requests

    batched = Batched(send, 0.01)
    first = [batched("bad"), batched("good")]
    for future in first:
        with pytest.raises(OSError, match="away"):
            await future
    assert await batched("good") == "good"


async def test_a_caller_that_went_away_disturbs_nobody():
    async def send(requests):
        return requests

    batched = Batched(send, 0.01)
    gone, stays = batched(1), batched(2)
    gone.cancel()
    assert await stays == 2

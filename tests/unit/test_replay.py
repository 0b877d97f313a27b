import asyncio
from dataclasses import replace

import pytest

from actors.messages import Generation, Task, Turn, Usage
from actors.replay import Replayed
from actors.tools import Toolbox, ToolThreads, declare

TASK = Task("q", 0, "?", ("a",), {}, {}, 7)
TURN = Turn(())


class Counter:
    """Counts its own calls."""

    def __init__(self):
        self.calls = 0

    def __call__(self, by: int) -> str:
        """Add."""
        self.calls += by
        return f"{self.calls}"


def tool(calls: list[int], *, idempotent: bool):
    class Seen(Counter):
        """Add, and tell."""

        def __call__(self, by: int) -> str:
            """Add, and tell."""
            calls.append(by)
            return super().__call__(by)

    found = declare(Seen, name="Add", field="tools", args={})
    return replace(found, idempotent=idempotent)


class Run:
    """A trajectory of two generations, each followed by a call; dies where it is told to."""

    def __init__(self, events, *, idempotent: bool, dies_after: int = 99):
        self.events = list(events)
        self.new: list[dict] = []
        self.generated: list[int] = []
        self.calls: list[int] = []
        self.left = dies_after
        self.toolbox = Toolbox([tool(self.calls, idempotent=idempotent)], TASK, lambda t, n: t, ToolThreads())
        self.replayed = Replayed(self.generate, self.toolbox, self.events, self.record)

    async def generate(self, token_ids, turn):
        self.generated.append(len(token_ids))
        return Generation((len(token_ids), 1), "stop", Usage(prompt_tokens=len(token_ids), generated=2))

    def record(self, event):
        future = asyncio.get_running_loop().create_future()
        if self.left == 0:
            raise ConnectionError("killed")
        self.left -= 1
        self.new.append(event)
        future.set_result(None)
        return future

    async def go(self):
        seen = []
        ids = [5, 6]
        for by in (1, 2):
            found = await self.replayed.generate(ids, TURN)
            ids = ids + list(found.token_ids)
            result = await self.replayed.call("add", {"by": by})
            seen.append(result.observation)
        return ids, seen


@pytest.mark.parametrize("idempotent", [True, False])
@pytest.mark.parametrize("dies_after", range(6))
async def test_resumed_anywhere_it_ends_the_same(idempotent, dies_after):
    whole = Run((), idempotent=idempotent)
    expected = await whole.go()
    assert expected[1] == ["1", "3"]
    first = Run((), idempotent=idempotent, dies_after=dies_after)
    if dies_after < len(whole.new):
        with pytest.raises(ConnectionError):
            await first.go()
    else:
        await first.go()
    second = Run(first.new, idempotent=idempotent)
    ids, seen = await second.go()
    assert ids == expected[0]
    generations = sum(event["kind"] == "generation" for event in first.new)
    assert len(second.generated) == 2 - generations, "a recorded generation was computed again"
    results = sum(event["kind"] == "tool" for event in first.new)
    if idempotent:
        assert seen == expected[1]  # the instance's state was rebuilt
    else:
        assert len(first.calls) + len(second.calls) <= 2, "a call that may not be repeated was repeated"
        interrupted = sum(event["kind"] == "call" for event in first.new) - results
        assert sum("interrupted by a crash" in text for text in seen) == interrupted


async def test_no_generation_begins_before_the_one_before_is_on_record():
    class Slow(Run):
        """Its records become durable when they are told to."""

        def record(self, event):
            super().record(event)
            return self.storage

    run = Slow((), idempotent=True)
    run.storage = asyncio.get_running_loop().create_future()
    going = asyncio.create_task(run.go())
    while not run.calls:
        await asyncio.sleep(0.01)
    await asyncio.sleep(0.05)
    assert (len(run.generated), run.calls) == (1, [1]), "the tool need not wait, the next generation must"
    run.storage.set_result(None)
    await going
    assert len(run.generated) == 2


async def test_after_a_lost_record_nothing_is_generated():
    class Lost(Run):
        """Its journal is gone."""

        def record(self, event):
            future = asyncio.get_running_loop().create_future()
            future.set_exception(ConnectionError("gone"))
            future.exception()  # marked as seen: not every caller waits
            return future

    run = Lost((), idempotent=True)
    with pytest.raises(ConnectionError):
        await run.go()
    assert len(run.generated) == 1


async def test_an_interrupted_call_counts_as_a_crash():
    run = Run(
        [{"kind": "generation", "token_ids": [1], "finish_reason": "stop", "usage": {}}, {"kind": "call"}],
        idempotent=False,
    )
    await run.replayed.generate([1], TURN)
    result = await run.replayed.call("Add", {"by": 1})
    assert result.crashed
    assert not run.calls

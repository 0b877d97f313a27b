"""The loop's bounds: no call passes the limit of tokens, and there is always room to ask for the answer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from actors.agent import Limits, Rollout
from actors.messages import Generation, Usage
from actors.tools import Toolbox, ToolThreads, declare
from tests.unit.test_formats import new, task

ANSWER_TOKENS = 16 + 96


@pytest.fixture(scope="module")
def tokenizer(smollm2: Path) -> Any:
    return AutoTokenizer.from_pretrained(smollm2)


async def rolled_out(tokenizer: Any, name: str, limit: int, context: int = 8192, words: int = 40):
    """A trajectory of a model that always searches, until it is asked for the answer; and each call's most tokens."""
    reached: list[int] = []

    def search(entity: str) -> str:
        """Search."""
        return "river " * words

    async def generate(token_ids, turn):
        reached.append(len(token_ids) + turn.max_tokens)
        forced = [stage.name for stage in turn.stages] == ["answer"]
        said = (
            "Nixon]"
            if forced
            else " I look.\nAction: Search[X]\n"
            if name == "react_chat"
            else " I look.\nAction 1: Search[X]\n"
        )
        ids = tokenizer.encode(said, add_special_tokens=False)
        return Generation(tuple(ids), "stop", Usage(generated=len(ids)))

    def cut(text: str, most: int) -> str:
        return tokenizer.decode(tokenizer.encode(text)[:most])

    toolbox = Toolbox([declare(search, name="search", field="tools", args={})], task(), cut, ToolThreads())
    limits = Limits(max_steps=6, trajectory_tokens=limit, context_tokens=context, answer_tokens=ANSWER_TOKENS)
    transcript = new(name, tokenizer)
    return await Rollout(task(), transcript, generate, toolbox.call, limits).run(), transcript, reached


@pytest.mark.parametrize("name", ["react_text", "react_chat"])
@pytest.mark.parametrize("room", range(160, 620, 46))
async def test_at_the_token_limit_the_answer_is_asked_for(tokenizer, name, room):
    limit = new(name, tokenizer).prompt_tokens + room
    found, transcript, reached = await rolled_out(tokenizer, name, limit)
    assert found.answer == "Nixon"
    assert found.forced_finish
    assert max(reached) <= limit
    assert len(transcript.token_ids) <= limit
    assert found.stop_reason == ("token_limit" if len(found.steps) < 7 else "step_limit")


async def test_an_observation_takes_no_more_than_the_room_that_is_left(tokenizer):
    limit = new("react_text", tokenizer).prompt_tokens + 300
    found, transcript, _ = await rolled_out(tokenizer, "react_text", limit, words=1000)
    assert found.stop_reason == "token_limit"
    assert found.answer == "Nixon"
    assert found.steps[0].observation.endswith("… [cut]")
    assert found.steps[0].observation in tokenizer.decode(transcript.token_ids), "the row shows what the model saw"


async def test_the_tighter_bound_is_named(tokenizer):
    limit = new("react_text", tokenizer).prompt_tokens + 300
    found, _, _ = await rolled_out(tokenizer, "react_text", 4096, context=limit)
    assert (found.stop_reason, found.answer) == ("context_limit", "Nixon")

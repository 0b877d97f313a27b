"""A generation ends where its turn ends: incremental decoding, stage limits, stops."""

from __future__ import annotations

import time
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from actors.actions import LINE_END, MARKER, STOPS
from actors.engine.protocol import Request
from actors.errors import OutOfMemory
from actors.messages import Generation, Stage, Turn, Usage
from actors.stopping import TurnMatcher, speak
from actors.tokens import codec_of

REACT = Turn((Stage("thought", 40, MARKER), Stage("action", 12, LINE_END)), STOPS)
ANSWER = Turn((Stage("answer", 8, LINE_END),))


@pytest.fixture(scope="module")
def tokenizer(smollm2: Path) -> Any:
    return AutoTokenizer.from_pretrained(smollm2)


def play(turn: Turn, tokenizer: Any, text: str, run: int = 1) -> tuple[str, str | None]:
    """The text up to where the matcher ends it, and its reason; `run` tokens are delivered at a time."""
    ids = tokenizer.encode(text, add_special_tokens=False)
    matcher = TurnMatcher(turn, tokenizer)
    for k in range(0, len(ids), run):
        if matcher(ids[k : k + run]):
            return codec_of(tokenizer).decode(ids[: k + run]), matcher.reason
    return text, matcher.reason


@pytest.mark.parametrize(
    ("text", "end", "reason"),
    [
        (" I look.\nAction 1: Search[X]\nObservation 1: y", " I look.\nAction 1: Search[X]\n", "stop"),
        (" I look. Action: Search[X]\nand", " I look. Action: Search[X]\n", "stop"),
        (" I look.\nACTION 1:\n\n Search[X]\nmore", " I look.\nACTION 1:\n\n Search[X]\n", "stop"),
        (" I look.\nAction 1:\nThought 2: hm", " I look.\nAction 1:\nThought", "stop"),
        (" I look.\nThought 2: I", " I look.\nThought", "stop"),
        (" I look.\nObservation 1: It", " I look.\nObservation", "stop"),
        (" I look.\nobservation: It", " I look.\nobservation:", "stop"),
        ("\nObservation 1: It", "\nObservation", "stop"),
        (" The action is clear, the reaction: none", " The action is clear, the reaction: none", None),
        (" word" * 50, " word" * 40, "stage"),
        (" I look.\nAction 1: Search[" + " word" * 50, None, "stage"),
    ],
)
def test_react_turns_end(tokenizer: Any, text: str, end: str | None, reason: str | None) -> None:
    ended, why = play(REACT, tokenizer, text)
    assert why == reason
    if end is not None:
        assert ended == end


def test_action_limit_counts_from_its_marker(tokenizer: Any) -> None:
    ended, reason = play(REACT, tokenizer, " I look.\nAction 1:" + " word" * 50)
    assert (ended.count(" word"), reason) == (12, "stage")


def test_stop_at_the_limit_is_a_stop(tokenizer: Any) -> None:
    text = " one two three four five six seven\n"
    assert len(tokenizer.encode(text)) == 8
    assert play(ANSWER, tokenizer, text) == (text, "stop")


def test_runs_of_tokens_end_in_the_run_that_matches(tokenizer: Any) -> None:
    text = " I look.\nAction 1: Search[X]\nObservation 1: y and so on"
    for run in (2, 3, 5, 100):
        ended, reason = play(REACT, tokenizer, text, run)
        assert ended.startswith(" I look.\nAction 1: Search[X]\n")
        assert reason == "stop"


def test_ended_stays_ended(tokenizer: Any) -> None:
    matcher = TurnMatcher(ANSWER, tokenizer)
    assert matcher(tokenizer.encode("yes\n"))
    assert matcher(tokenizer.encode(" more"))
    assert matcher.reason == "stop"


def test_character_split_over_tokens(tokenizer: Any) -> None:
    assert len(tokenizer.encode("𓂀")) > 1
    turn = Turn((Stage("answer", 64, "𓂀"),))
    assert play(turn, tokenizer, "ab𓂀cd") == ("ab𓂀", "stop")


def test_broken_bytes_do_not_hide_what_follows(tokenizer: Any) -> None:
    half = tokenizer.encode("𓂀")[:1]
    matcher = TurnMatcher(Turn((Stage("answer", 64, "end"),)), tokenizer)
    assert not matcher(half * 20)
    assert matcher(tokenizer.encode(" the end"))


def test_stop_far_behind_the_window(tokenizer: Any) -> None:
    long = " word" * 200
    turn = Turn((Stage("thought", 400, MARKER), Stage("action", 12, LINE_END)), STOPS)
    assert play(turn, tokenizer, long + "\nAction 1: Finish[x]\n\n")[1] == "stop"
    second = (Stage("thought", 8, ":"), Stage("action", 400, r"^ word word\n"))
    for begin, stages in (("", second[1:]), (":", second)):
        assert play(Turn(stages), tokenizer, begin + " word word\n")[1] == "stop"
        assert play(Turn(stages), tokenizer, begin + long + "\n word word\n")[1] is None


FORCED = Turn((Stage("thought", 40, MARKER, LINE_END, "Action 1:"), Stage("action", 12, LINE_END)), STOPS)


@dataclass
class Says:
    """An engine that says these texts in turn, as far as the matcher lets it."""

    tokenizer: Any
    texts: list[str]
    run: int = 1
    asked: list[Request] = field(default_factory=list)

    def submit(self, request: Request) -> Future[Generation]:
        future = Future[Generation]()
        if len(self.asked) == len(self.texts):
            error = OutOfMemory("no more")
            error.gpu_s = 0.5
            future.set_exception(error)
            return future
        ids = self.tokenizer.encode(self.texts[len(self.asked)], add_special_tokens=False)
        self.asked.append(request)
        assert request.matcher is not None
        end = next((k for k in range(0, len(ids), self.run) if request.matcher(ids[k : k + self.run])), len(ids))
        ids = tuple(ids[: end + self.run])
        usage = Usage(len(request.token_ids), 5, len(request.token_ids) - 5, len(ids), gpu_s=0.25)
        future.set_result(Generation(ids, "stop", usage))
        return future


def spoken(tokenizer: Any, texts: list[str], run: int = 1) -> tuple[str, Generation, list[Request]]:
    engine: Any = Says(tokenizer, texts, run)
    request = Request((7,) * 20, "a", FORCED.max_tokens)
    generation = speak(engine, request, FORCED, tokenizer).result(0)
    return codec_of(tokenizer).decode(generation.token_ids), generation, engine.asked


def test_a_label_is_written_behind_a_line(tokenizer: Any) -> None:
    text, generation, (first, second) = spoken(tokenizer, [" I look.\nThis is not said.", " Search[X]\nnor this"])
    assert text == " I look.\nAction 1: Search[X]\n"
    said = tuple(tokenizer.encode(" I look.\nAction 1:"))
    assert second.token_ids == (*first.token_ids, *said)
    usage, label = generation.usage, len(tokenizer.encode("Action 1:"))
    assert (usage.forced, usage.generated) == (label, len(generation.token_ids) - label)
    assert (usage.prompt_tokens, usage.prefilled, usage.reused) == (20, 10, 15)
    assert second.max_tokens == FORCED.max_tokens - (len(said) - label)
    assert generation.finish_reason == "stop"


def test_a_call_that_fails_behind_a_label_has_lost_what_was_said_before_it(tokenizer: Any) -> None:
    with pytest.raises(OutOfMemory) as caught:
        spoken(tokenizer, [" I look.\n"])
    assert caught.value.gpu_s == 0.75


@pytest.mark.parametrize(
    ("said", "reason"),
    [(" I look. Action: Search[X]\n", "stop"), (" word" * 40, "stage"), ("\n\n I look. Action 1: Search[X]\n", "stop")],
)
def test_no_label_where_no_line_ended_before_one(tokenizer: Any, said: str, reason: str) -> None:
    text, generation, asked = spoken(tokenizer, [said + " and so on"])
    assert (text, len(asked)) == (said, 1)
    assert (generation.usage.forced, generation.finish_reason) == (0, reason)


def test_what_follows_a_written_label_has_its_own_limit(tokenizer: Any) -> None:
    text, generation, _ = spoken(tokenizer, [" I look.\n", " word" * 50])
    assert (text, generation.finish_reason) == (" I look.\nAction 1:" + " word" * 12, "stage")


def test_no_label_where_the_engine_has_gone_on_already(tokenizer: Any) -> None:
    said = " I look.\nAction 1: Search[X]\n"
    text, generation, asked = spoken(tokenizer, [said], run=100)
    assert (text, len(asked), generation.usage.forced) == (said, 1, 0)


def test_cheap(tokenizer: Any) -> None:
    ids = tokenizer.encode(" The quick brown fox jumps over the lazy dog." * 200)[:2000]
    matcher = TurnMatcher(Turn((Stage("thought", 4000, MARKER),), STOPS), tokenizer)
    start = time.perf_counter()
    for token in ids:
        matcher([token])
    per_token_us = (time.perf_counter() - start) / len(ids) * 1e6
    assert per_token_us < 50  # about 1 on an idle core: a step has 256 rows


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text(max_size=120), run=st.integers(1, 7))
@example(text="§", run=1)
def test_decodes_incrementally_what_was_encoded(tokenizer: Any, text: str, run: int) -> None:
    """The whole text is seen, in whatever pieces: an end-of-text pattern matches at the last token only."""
    text = text.replace("\x00", "") + "§§"
    ids = tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)
    matcher = TurnMatcher(Turn((Stage("answer", 1000, "§§$"),)), tokenizer)
    ended = [matcher(ids[k : k + run]) for k in range(0, len(ids), run)]
    assert ended[-1]
    assert "§§" in text[:-1] or not any(ended[:-1])

"""Lets a model speak for a turn: ends the generation where the turn does (the text side of the engine's matcher), and
writes what the turn says is to be written in the model's place.

The matcher runs on the engine's thread, for every token of every row of a step: a token's text is looked up, and some
64 characters are searched. Knows nothing of formats: the regular expressions, limits and labels come with the Turn.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import replace
from functools import lru_cache
from typing import Any, Literal

from actors.engine.protocol import Engine, Request
from actors.errors import EngineError
from actors.messages import Generation, Turn
from actors.tokens import codec_of

LOOKBACK = 64
"""Characters before the newest ones in which a match may begin."""
KEPT = 1024
"""Characters of the text behind that are carried along: to cut them off at every token would cost more."""
PARTIAL_TOKENS = 8
"""Tokens after which an incomplete character is taken as it is: a character has 4 bytes at most."""


class TurnMatcher:
    """A Matcher (see `actors.engine.protocol`) for one generation.

    Attributes:
        reason: `stop` where a regular expression ended the turn, `stage` where a stage's limit did, `label` where the
            stage's label is to be written; None before.
        taken: tokens up to there.
    """

    def __init__(self, turn: Turn, tokenizer: Any):
        self.reason: Literal["stop", "stage", "label"] | None = None
        self.taken = 0
        self._codec = codec_of(tokenizer)
        self._stages = turn.stages
        self._stop = _either(turn.stop) if turn.stop else None
        self._pending: list[int] = []  # tokens of a character that is not complete
        self._turn_text = self._stage_text = ""
        self._stage = -1
        self._next_stage()

    def __call__(self, new_ids: Sequence[int], /) -> bool:
        """True: the turn has ended within `new_ids`."""
        for token in new_ids:
            if self.reason is not None:
                break
            text = self._codec.texts[token]
            if self._pending or text.endswith("\ufffd"):
                text = self._completed(token)
            self.taken += 1
            if text:
                self.reason = self._ended(text)
            if self.reason is None and self.taken == self._limit:
                self.reason = "stage"
        return self.reason is not None

    def label(self) -> str:
        """What is to be written now; the next stage begins behind it."""
        label = self._stages[self._stage].label
        self._turn_text += label
        self._stage_text, self.reason = "", None
        self._next_stage()
        return label

    def _completed(self, token: int) -> str:
        """The text of the pending tokens and this one; nothing as long as a character may lack its end."""
        self._pending.append(token)
        text = self._codec.decode(self._pending)
        if text.endswith("\ufffd") and len(self._pending) < PARTIAL_TOKENS:
            return ""
        self._pending.clear()
        return text

    def _ended(self, new: str) -> Literal["stop", "label"] | None:
        # Searched from `at` on, `^` matches at the text's own start only, and what stands before is seen.
        text = self._turn_text if len(self._turn_text) < KEPT else self._turn_text[-2 * LOOKBACK :]
        at = max(0, len(text) - LOOKBACK)
        self._turn_text = text = text + new
        if self._stop is not None and self._stop.search(text, at):
            return "stop"
        if self._stage:
            at, text = int(len(self._stage_text) > LOOKBACK), self._stage_text[-LOOKBACK - 1 :] + new
        while self._ends is not None and (match := self._ends.search(text, at)):
            if self._stage == len(self._stages) - 1:
                return "stop"
            at, text = 0, text[match.end() :]
            self._next_stage()
        self._stage_text = text
        return "label" if self._cue is not None and self._cue.search(text, at) else None

    def _next_stage(self) -> None:
        self._stage += 1
        stage = self._stages[self._stage]
        self._ends = _either((stage.ends,)) if stage.ends else None
        self._cue = _either((stage.cue,)) if stage.cue else None
        self._limit = self.taken + stage.max_tokens


def speak(engine: Engine, request: Request, turn: Turn, tokenizer: Any) -> Future[Generation]:
    """Let the model speak for a turn. A label that is written in its place is computed like a prompt: the engine gets
    what was said so far and the label as the context of a further request, before its next step.

    Args:
        request: without a matcher; its `max_tokens` are the turn's.

    Returns:
        As `Engine.submit`.
    """
    return _Spoken(engine, request, TurnMatcher(turn, tokenizer), codec_of(tokenizer).encode)


class _Spoken(Future[Generation]):
    """What is said in a turn. Once it is there it holds nothing that holds it: no work for the garbage collector."""

    def __init__(self, engine: Engine, request: Request, matcher: TurnMatcher, encode: Callable[[str], list[int]]):
        super().__init__()
        self._engine, self._request = engine, replace(request, matcher=matcher)
        self._matcher, self._encode = matcher, encode
        self._before: tuple[Generation, Sequence[int]] | None = None  # what was said, and the label behind it
        self._running: Future[Generation] | None = None
        self._submit(self._request)

    def cancel(self) -> bool:
        """Cancel the request that runs, too."""
        cancelled, running = super().cancel(), self._running
        if cancelled and running is not None:
            running.cancel()
        return cancelled

    def _submit(self, request: Request) -> None:
        self._running = running = self._engine.submit(request)
        if self.cancelled():
            running.cancel()
        running.add_done_callback(self._ended)

    def _ended(self, running: Future[Generation]) -> None:
        matcher = self._matcher
        try:
            said = running.result() if self._before is None else _joined(*self._before, running.result())
            # An engine that gives its matcher runs of tokens may have gone beyond the cue: then nothing is written.
            if matcher.reason == "label" and matcher.taken == len(said.token_ids) - said.usage.forced:
                label = self._encode(matcher.label())
                context = (*self._request.token_ids, *said.token_ids, *label)
                self._before = said, label
                left = self._request.max_tokens - matcher.taken
                self._submit(replace(self._request, token_ids=context, max_tokens=left))
                return
        except BaseException as e:  # also that it was cancelled
            self._running = None
            if self._before is not None and isinstance(e, EngineError) and e.gpu_s is not None:
                e.gpu_s += self._before[0].usage.gpu_s
            if self.set_running_or_notify_cancel():
                self.set_exception(e.with_traceback(None))  # whose frames hold this
            return
        self._running = None
        if self.set_running_or_notify_cancel():
            self.set_result(replace(said, finish_reason="stage") if matcher.reason == "stage" else said)


def _joined(before: Generation, label: Sequence[int], after: Generation) -> Generation:
    """What was said, the label that was written behind it, and what was said then, as one."""
    usage = replace(
        before.usage.plus(after.usage),
        prompt_tokens=before.usage.prompt_tokens,
        reused=before.usage.reused,
        forced=before.usage.forced + len(label),
    )
    token_ids = (*before.token_ids, *label, *after.token_ids)
    return replace(after, token_ids=token_ids, usage=usage, logprobs=before.logprobs + after.logprobs)


@lru_cache(maxsize=256)
def _either(patterns: tuple[str, ...]) -> re.Pattern[str]:
    return re.compile("|".join(f"(?:{pattern})" for pattern in patterns))

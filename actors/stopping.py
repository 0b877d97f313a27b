"""Ends a generation where its turn ends: the text side of the engine's matcher.

Runs on the engine's thread: per token one decode of a few ids and two searches over some 64 characters.
Knows nothing of formats: the regular expressions and limits come with the Turn.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Literal

from actors.messages import Turn
from actors.tokens import codec_of

LOOKBACK = 64
"""Characters before the newest ones in which a match may begin."""
PARTIAL_TOKENS = 8
"""Tokens after which an incomplete character is taken as it is: a character has 4 bytes at most."""


class _Tail:
    """The newest characters of a growing text."""

    __slots__ = ("cut", "text")

    def __init__(self, text: str = ""):
        self.text = text
        self.cut = False

    def push(self, new: str) -> None:
        self.cut = self.cut or len(self.text) > LOOKBACK
        self.text = self.text[-LOOKBACK:] + new

    def search(self, pattern: re.Pattern[str]) -> re.Match[str] | None:
        return pattern.search(self.text, 1 if self.cut else 0)  # from 1, `^` holds at the text's own start only


class TurnMatcher:
    """A Matcher (see `actors.engine.protocol`) for one generation.

    Attributes:
        reason: `stop` where a regular expression ended the turn, `stage` where a stage's limit did; None before.
    """

    def __init__(self, turn: Turn, tokenizer: Any):
        self.reason: Literal["stop", "stage"] | None = None
        self._stages = turn.stages
        self._stop = _either(turn.stop) if turn.stop else None
        self._ends = [_either((stage.ends,)) if stage.ends else None for stage in turn.stages]
        self._stage = 0
        self._used = 0
        self._pending: list[int] = []
        self._turn_tail = _Tail()
        self._stage_tail = _Tail()
        self._decode = codec_of(tokenizer).decode

    def __call__(self, new_ids: Sequence[int], /) -> bool:
        """True: the turn has ended within `new_ids`."""
        for token in new_ids:
            if self.reason is None:
                self.reason = self._step(token)
        return self.reason is not None

    def _step(self, token: int) -> Literal["stop", "stage"] | None:
        self._used += 1
        self._pending.append(token)
        text = self._decode(self._pending)
        if not text.endswith("\ufffd") or len(self._pending) >= PARTIAL_TOKENS:
            self._pending.clear()
            if self._ended(text):
                return "stop"
        return "stage" if self._used >= self._stages[self._stage].max_tokens else None

    def _ended(self, text: str) -> bool:
        self._turn_tail.push(text)
        self._stage_tail.push(text)
        if self._stop is not None and self._turn_tail.search(self._stop):
            return True
        while (ends := self._ends[self._stage]) is not None and (match := self._stage_tail.search(ends)):
            if self._stage == len(self._stages) - 1:
                return True
            self._stage += 1
            self._used = 0
            self._stage_tail = _Tail(self._stage_tail.text[match.end() :])
        return False


@lru_cache(maxsize=256)
def _either(patterns: tuple[str, ...]) -> re.Pattern[str]:
    return re.compile("|".join(f"(?:{pattern})" for pattern in patterns))

"""Ends a generation where its turn ends: the text side of the engine's matcher.

Runs on the engine's thread, for every token of every row of a step: a token's text is looked up, and some 64 characters
are searched. Knows nothing of formats: the regular expressions and limits come with the Turn.
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
KEPT = 1024
"""Characters of the text behind that are carried along: to cut them off at every token would cost more."""
PARTIAL_TOKENS = 8
"""Tokens after which an incomplete character is taken as it is: a character has 4 bytes at most."""


class TurnMatcher:
    """A Matcher (see `actors.engine.protocol`) for one generation.

    Attributes:
        reason: `stop` where a regular expression ended the turn, `stage` where a stage's limit did; None before.
    """

    def __init__(self, turn: Turn, tokenizer: Any):
        self.reason: Literal["stop", "stage"] | None = None
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
            self._left -= 1
            if text and self._ended(text):
                self.reason = "stop"
            elif not self._left:
                self.reason = "stage"
        return self.reason is not None

    def _completed(self, token: int) -> str:
        """The text of the pending tokens and this one; nothing as long as a character may lack its end."""
        self._pending.append(token)
        text = self._codec.decode(self._pending)
        if text.endswith("\ufffd") and len(self._pending) < PARTIAL_TOKENS:
            return ""
        self._pending.clear()
        return text

    def _ended(self, new: str) -> bool:
        # Searched from `at` on, `^` matches at the text's own start only, and what stands before is seen.
        text = self._turn_text if len(self._turn_text) < KEPT else self._turn_text[-2 * LOOKBACK :]
        at = max(0, len(text) - LOOKBACK)
        self._turn_text = text = text + new
        if self._stop is not None and self._stop.search(text, at):
            return True
        if self._stage:
            at, text = int(len(self._stage_text) > LOOKBACK), self._stage_text[-LOOKBACK - 1 :] + new
        while self._ends is not None and (match := self._ends.search(text, at)):
            if self._stage == len(self._stages) - 1:
                return True
            at, text = 0, text[match.end() :]
            self._next_stage()
        self._stage_text = text
        return False

    def _next_stage(self) -> None:
        self._stage += 1
        stage = self._stages[self._stage]
        self._ends = _either((stage.ends,)) if stage.ends else None
        self._left = stage.max_tokens


@lru_cache(maxsize=256)
def _either(patterns: tuple[str, ...]) -> re.Pattern[str]:
    return re.compile("|".join(f"(?:{pattern})" for pattern in patterns))

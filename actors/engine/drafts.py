"""Guesses of what a row says next, out of its own text: prompt lookup (Saxena 2023), for speculative decoding.

ReAct answers copy: names out of observations, the labels of the format, the last thought. So the tokens that followed
the last few tokens where they stood before are a good guess, and cost no model. The guesses are computed together with
the row's next token, and each is kept only where it is what is drawn there with that position's own noise (`sampling`);
the idea is of Leviathan et al. 2023, "Fast inference from transformers via speculative decoding". So which tokens a row
gets does not depend on guessing, only how many steps they take.

Knows nothing of pages, batches or models.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence

LONGEST, SHORTEST = 4, 2
"""Tokens that must have stood together before; the longest that did is taken."""
FIRST, MOST = 4, 15
"""Guesses at a time: the number to start with, and the largest."""
_BYTES = 4


class Lookup:
    """The guesses of one row. The number at a time grows while all are right and shrinks towards what was right."""

    def __init__(self) -> None:
        self._text = bytearray()  # uint32, so that bytearray.rfind searches it
        self._length = FIRST

    def draft(self, tokens: Sequence[int], most: int) -> list[int]:
        """At most `most` tokens that may follow `tokens`, which continue those of the last call."""
        self._text += array("I", tokens[len(self._text) // _BYTES :]).tobytes()
        text, size = self._text, _BYTES * min(most, self._length)
        for n in range(LONGEST, SHORTEST - 1, -1):
            at = self._last(text[-_BYTES * n :])
            if at is not None:
                followed = text[at + _BYTES * n :]  # goes round where it reaches the end: a text that repeats itself
                return array("I", bytes(followed * (size // len(followed) + 1))[:size]).tolist()
        return []

    def judge(self, drafted: int, kept: int) -> None:
        """So many were guessed, and so many of them right."""
        self._length = min(MOST, self._length + 2) if kept == drafted else max(1, (self._length + kept) // 2)

    def _last(self, tokens: bytearray) -> int | None:
        """Where these tokens stood last, before the end."""
        end = len(self._text) - _BYTES
        while (at := self._text.rfind(tokens, 0, end)) >= 0:
            if at % _BYTES == 0:
                return at
            end = at + len(tokens) - 1  # not between two tokens
        return None

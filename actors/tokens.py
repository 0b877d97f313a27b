"""Text to token ids and back, for text that nobody vouches for.

A control token's name in untrusted text ("<|im_end|>" in a question) must not become the control token.
`split_special_tokens=True` does not do: it lets added tokens that are not `special` through (Qwen's <tool_call>),
and it is a switch on the shared tokenizer, so threads race. Here such names are broken up before encoding.
Knows nothing of formats, templates or tasks.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

BREAK = "\ufdd0"
"""Unicode noncharacter between pieces of text that are encoded apart."""
MARK = "\ufdd1"
"""Unicode noncharacter around placeholders in a rendered template."""

SYNTAX = frozenset(("<think>", "</think>", "[THINK]", "[/THINK]", "<tool_call>", "</tool_call>")) | frozenset(
    ("<|python_tag|>", "[TOOL_CALLS]", "[ARGS]", "[CALL_ID]")
)
"""Control tokens with which a model thinks and calls tools; any other special token ends what it says."""


class Codec:
    """One tokenizer. Use `codec_of`, which keeps them.

    Attributes:
        bos: ids that the tokenizer puts before a text.
        ends: special tokens that end a generation, by id.
        end: regular expression of their names.
        texts: what each token adds to a text before it; where a token is part of a character, see `decode`.
    """

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer
        added = {int(i): token for i, token in tokenizer.added_tokens_decoder.items()}
        control = {i: t for i, t in added.items() if len(t.content) > 1 and (t.special or not t.content.isspace())}
        self.ends = {i: t.content for i, t in added.items() if t.special and t.content not in SYNTAX}
        ends = sorted(self.ends.values(), key=len, reverse=True)
        self.end = re.compile("|".join(map(re.escape, ends)) or "(?!)")
        self._ids = frozenset(control) - {tokenizer.unk_token_id}
        names = sorted((t.content for t in control.values()), key=len, reverse=True)
        self._names = re.compile("|".join(map(re.escape, names)) or "(?!)")
        alone = tokenizer.encode("a", add_special_tokens=False)
        full = tokenizer.encode("a", add_special_tokens=True)
        self.bos: list[int] = full[: full.index(alone[0])] if alone and alone[0] in full else []
        self._newline: list[int] = tokenizer.encode("\n", add_special_tokens=False)
        self._spaced = str(tokenizer.convert_ids_to_tokens(alone)[0]).startswith("▁")
        self._anchor = list(alone)
        self._anchor_chars = len(self._decode(self._anchor))
        self.texts = _Texts(self.decode)

    def plain(self, text: str) -> str:
        """`text` with every control token's name broken up; what `encode` makes of it has no control tokens."""
        text = text.replace(BREAK, "").replace(MARK, "")
        broken = self._names.sub(lambda m: BREAK.join(("", *m[0], "")), text)
        if self._ids.isdisjoint(self.encode(broken)):
            return broken
        return BREAK.join(("", *text, ""))  # a normalizer made a name out of other characters

    def encode(self, text: str, start: bool = False) -> list[int]:
        """Ids of trusted text; names of control tokens become them unless `plain` broke them up.

        Args:
            start: nothing stands before the text (SentencePiece puts a space there).
        """
        ids: list[int] = []
        for piece in text.split(BREAK):
            if piece:
                ids += self._piece(piece, start and not ids)
        return ids

    def _piece(self, piece: str, start: bool) -> list[int]:
        if self._spaced and not start:
            ids: list[int] = self.tokenizer.encode("\n" + piece, add_special_tokens=False)
            if ids[: len(self._newline)] == self._newline:
                return ids[len(self._newline) :]
        return self.tokenizer.encode(piece, add_special_tokens=False)

    def count(self, texts: Sequence[str]) -> list[int]:
        """Tokens of each untrusted text, encoded together: some 20 times as fast as one by one."""
        found = self.tokenizer(list(texts), add_special_tokens=False, return_attention_mask=False)["input_ids"]
        return [
            len(self.encode(self.plain(text)) if self._names.search(text) else ids)
            for text, ids in zip(texts, found, strict=True)
        ]

    def cut(self, text: str, most: int) -> str:
        """`text`, or its beginning of so many tokens."""
        ids = self.tokenizer.encode(text, add_special_tokens=False)
        return text if len(ids) <= most else self.tokenizer.decode(ids[:most])

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids that continue a text: a leading space is kept, special tokens are written out."""
        return self._decode([*self._anchor, *ids])[self._anchor_chars :]

    def _decode(self, ids: list[int]) -> str:
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        if backend is not None:
            return backend.decode(ids, skip_special_tokens=False)
        return self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def said(self, ids: Sequence[int]) -> list[int]:
        """`ids` up to the first token that ends a generation."""
        end = next((k for k, token in enumerate(ids) if token in self.ends), len(ids))
        return list(ids[:end])

    def head(self, ids: Sequence[int], text: str, end: int) -> tuple[list[int], str]:
        """The most ids whose text lies within `text[:end]`, and the text that is then missing to `end`."""
        for k in range(len(ids), -1, -1):
            part = self.decode(ids[:k])
            if len(part) <= end and text.startswith(part):
                return list(ids[:k]), text[len(part) : end]
        return [], text[:end]

    def tail(self, ids: Sequence[int], text: str, start: int) -> list[int]:
        """Ids of `text[start:]`, of `ids` as many as possible."""
        for k in range(len(ids) + 1):
            part = self.decode(ids[:k])
            if len(part) >= start and text.startswith(part):
                return self.encode(self.plain(text[start : len(part)])) + list(ids[k:])
        return []


class _Texts(dict[int, str]):
    """Texts by token, each decoded when it is first asked for."""

    def __init__(self, decode: Callable[[Sequence[int]], str]):
        self._decode = decode

    def __missing__(self, token: int) -> str:
        text = self[token] = self._decode([token])
        return text


@lru_cache(maxsize=8)
def codec_of(tokenizer: Any) -> Codec:
    """The codec of a tokenizer that does not change any more."""
    return Codec(tokenizer)

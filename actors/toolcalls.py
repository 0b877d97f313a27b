"""Native tool calls, as the families of models write them: Hermes and Qwen, Llama 3, Mistral.

Knows nothing of tokens, templates' rendering or tools: text in, a call with its place in the text out.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

_DECODER = json.JSONDecoder()
_BARE = re.compile(r'\{\s{0,8}"(?:name|type|function)"')


@dataclass(frozen=True, slots=True)
class Found:
    """The first call in a reply.

    Attributes:
        start, end: its place in the text, opening and closing marks included.
        name: of the tool; None where the call cannot be read.
        arguments: None where the call cannot be read.
        missing: text to put behind `text[:end]` so that it is a whole call.
        slips: deviations from the family's syntax.
    """

    start: int
    end: int
    name: str | None
    arguments: dict[str, Any] | None
    missing: str = ""
    slips: int = 0


@dataclass(frozen=True, slots=True)
class Syntax:
    """How a family writes a call.

    Attributes:
        signs: texts of which one stands in the chat template of such a family.
        opens: regular expression of what begins a call.
        mark: the text that begins a call.
        between: text between the mark and the call's JSON.
        close: the text that ends a call; empty if only the end of the reply does.
        arguments: the JSON key of the arguments.
    """

    name: str
    signs: tuple[str, ...]
    opens: str
    mark: str
    between: str
    close: str
    arguments: str

    def written(self, name: str, arguments: dict[str, Any]) -> str:
        """A call as the family writes it."""
        call = json.dumps({"name": name, self.arguments: arguments}, ensure_ascii=False)
        return self.mark + self.between + call + self.close

    def forced(self, name: str, argument: str) -> str:
        """The beginning of a call, up to within the string of its only argument."""
        return f'{self.mark}{self.between}{{"name": "{name}", "{self.arguments}": {{"{argument}": "'

    def find(self, text: str) -> Found | None:
        """The first call in `text`; None where there is none."""
        opened = re.search(self.opens, text)
        bare = _BARE.search(text)
        if opened is None:
            if bare is None:
                return None
            return self._read(text, bare.start(), bare.start(), slips=1)
        if self.name == "mistral" and (
            named := re.compile(r"\s{0,8}([\w-]{1,64})(?:\[ARGS\])?").match(text, opened.end())
        ):
            return self._named(text, opened.start(), named)
        at = opened.start() if text[opened.start() : opened.end()].endswith("{") else opened.end()
        return self._read(text, opened.start(), text.find("{", at))

    def _read(self, text: str, start: int, at: int, slips: int = 0) -> Found:
        """The JSON object at `at` of a call that starts at `start`."""
        call, end = _object(text, at)
        if call is None:
            return Found(start, len(text), None, None, slips=slips)
        inner = call.get("function")
        if isinstance(inner, dict):
            call, slips = inner, slips + 1
        name = call.get("name") or (inner if isinstance(inner, str) else None)
        other = "parameters" if self.arguments == "arguments" else "arguments"
        slips += self.arguments not in call
        arguments = call.get(self.arguments, call.get(other, {}))
        if isinstance(arguments, str):
            arguments, slips = _object(arguments, arguments.find("{"))[0], slips + 1
        if not isinstance(name, str) or not isinstance(arguments, dict):
            name = arguments = None
        return self._closed(text, start, end, name, arguments, slips)

    def _named(self, text: str, start: int, named: re.Match[str]) -> Found:
        """Mistral's newer form: [TOOL_CALLS]name[ARGS]{…}."""
        arguments, end = _object(text, text.find("{", named.end()))
        return Found(start, end, named[1] if arguments is not None else None, arguments)

    def _closed(
        self, text: str, start: int, end: int, name: str | None, arguments: dict[str, Any] | None, slips: int
    ) -> Found:
        """`Found`, with the closing mark if it stands there, or what is missing of it."""
        opened = re.match(self.opens, text[start:]) is not None
        if not self.close or not opened or (self.close == "]" and "[" not in text[start + len(self.mark) : end]):
            return Found(start, end, name, arguments, slips=slips)
        space = len(text[end:]) - len(text[end:].lstrip())
        if text.startswith(self.close.strip(), end + space):
            return Found(start, end + space + len(self.close.strip()), name, arguments, slips=slips)
        return Found(start, end, name, arguments, missing=self.close, slips=slips + 1)


HERMES = Syntax("hermes", ("<tool_call>",), r"<tool_call>", "<tool_call>", "\n", "\n</tool_call>", "arguments")
LLAMA = Syntax("llama", ("<|python_tag|>", "ipython"), r"<\|python_tag\|>|^\s{0,8}\{", "", "", "", "parameters")
MISTRAL = Syntax("mistral", ("[TOOL_CALLS]",), r"\[TOOL_CALLS\]", "[TOOL_CALLS]", "[", "]", "arguments")


def syntax_of(template: str) -> Syntax | None:
    """The syntax that a chat template speaks; None if none of these. `<function=…>` (Qwen3-Coder) is none."""
    if "<function=" in template:
        return None
    return next((s for s in (HERMES, MISTRAL, LLAMA) if any(sign in template for sign in s.signs)), None)


def string_end(text: str) -> tuple[str, int, bool]:
    """Read on in a JSON string whose quote was opened before `text`: its value, its end, whether it was closed."""
    inside = re.match(r'(?:[^"\\]|\\.)*', text, re.DOTALL)
    end = inside.end() if inside else 0
    try:
        value = json.loads(f'"{text[:end]}"', strict=False)
    except ValueError:
        value = text[:end]
    return value, end, text[end : end + 1] == '"'


def _object(text: str, at: int) -> tuple[dict[str, Any] | None, int]:
    """The JSON object that begins at or after blanks from `at`, and its end."""
    if at < 0:
        return None, len(text)
    try:
        value, end = _DECODER.raw_decode(text, at)
    except (ValueError, RecursionError):
        return None, len(text)
    return (value, end) if isinstance(value, dict) else (None, len(text))

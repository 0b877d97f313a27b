"""What a model wrote as Thought and Action (Yao et al. 2022), read with forgiveness; every slip is counted.

Small models misnumber, forget brackets, add quotes, put two actions on a line. What can be understood is; what
cannot becomes words for the model. Every regular expression here is linear in the text.
Knows nothing of tokens, templates or how tools run.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

# Searched after every token: each alternative begins with a literal, which makes `re` 10 times faster here.
MARKER = (
    r"(?:\n[ \t>*#_-]{0,6}(?i:action)|A(?<!\wA)(?:ction|CTION))"
    r"[ \t]{0,3}\*{0,2}(?P<n>\d{0,3})[ \t]{0,3}\*{0,2}:\*{0,2}"
)
"""The label before an action: at a line's start in any case, within a line with a capital."""
LINE_END = r"\n(?:(?<=\S\n)|(?<=\S[ \t]\n)|(?<=\S[ \t]{2}\n))"
"""A newline after something: where an action or an answer ends."""
STOPS = (
    r"\n[ \t]{0,8}(?:Observation|(?i:observation)[ \t]{0,3}[\d:])",
    r"\n(?:(?<=[^\s>]\n)|(?<=[^\s>][ \t\n]\n))[ \t]{0,8}(?:Thought|(?i:thought)[ \t]{0,3}[\d:])",
)
"""Where the model goes on to write what is not its to write, or begins another turn."""
FORCED = "I must answer now."
"""The thought written for a model that has no steps left."""

_MARKER = re.compile(MARKER)
_FIRST = re.compile(r"\s*(?i:action)[ \t]{0,3}(?P<n>\d{0,3})[ \t]{0,3}:")
_THOUGHT = re.compile(r"\s*[>*#_-]{0,4}(?i:thought)[ \t]{0,3}\d{0,3}[ \t]{0,3}\*{0,2}:\*{0,2}[ \t]*")
_JOINT = re.compile(r"^(?:->|=>|[:=.,;])\s*")
_LINE = re.compile(r"\S[^\n]*")
_QUOTES = {'"': '"', "'": "'", "`": "`", "“": "”", "‘": "’", "«": "»"}
_HARMLESS = " \t\r.;`*"


@dataclass(frozen=True, slots=True)
class ToolSpec:
    """What a model is told of a tool.

    Attributes:
        parameters: JSON Schema of the arguments, an object.
    """

    name: str
    description: str
    parameters: Mapping[str, Any]

    @property
    def arguments(self) -> list[str]:
        """Names of the arguments, in order."""
        return list(self.parameters.get("properties", {}))

    @property
    def required(self) -> list[str]:
        """Names of the arguments that must be given."""
        return list(self.parameters.get("required", self.arguments))


@dataclass(frozen=True, slots=True)
class Action:
    """What the model did in a turn.

    Attributes:
        thought: its thought or reasoning.
        text: the action as it wrote it; of a final answer, the text that the answer was taken from.
        tool: the tool called, as declared; None where nothing is to be called.
        arguments: the call's arguments; of a final answer `{"answer": …}`.
        problem: what was wrong, as an observation for the model.
        slips: deviations from the format, forgiven or pointed out.
        final: this is the answer; no tool runs.
    """

    thought: str
    text: str
    tool: str | None
    arguments: dict[str, Any] | None
    problem: str | None
    slips: int
    final: bool


@dataclass(frozen=True, slots=True)
class Reading:
    """A Thought and Action found in what a model said.

    Attributes:
        action: None where there is a thought only.
        end: characters of the text that belong to the turn.
    """

    thought: str
    action: str | None
    end: int
    slips: int


FINISH = ToolSpec(
    "finish",
    "Give the final answer and end the task.",
    {
        "type": "object",
        "properties": {"answer": {"type": "string"}},
        "required": ["answer"],
        "additionalProperties": False,
    },
)
"""Finish[answer]: the agent obeys it, no tool runs."""


class Actions:
    """The actions that a task's tools allow, Finish among them."""

    def __init__(self, tools: Sequence[ToolSpec]):
        specs = {fold(tool.name): tool for tool in tools}
        specs.setdefault("finish", FINISH)
        self._specs = specs
        names = sorted((spec.name for spec in specs.values()), key=len, reverse=True)
        either = "|".join("[ _-]?".join(map(re.escape, fold(name))) for name in names)
        self._first = re.compile(rf"(?:{either})(?!\w)", re.IGNORECASE)
        self._called = re.compile(rf"(?<!\w)(?:{either}) ?[\[(]", re.IGNORECASE)

    @property
    def specs(self) -> list[ToolSpec]:
        """The tools, in the order they were declared."""
        return list(self._specs.values())

    @property
    def valid(self) -> str:
        """What may be called, in a sentence."""
        return "Valid actions are " + ", ".join(map(usage, self.specs)) + "."

    def spec(self, name: str) -> ToolSpec | None:
        """The tool of this name, whatever its case and separators."""
        return self._specs.get(fold(name))

    def problem(self, thought: str, text: str, what: str, slips: int = 0) -> Action:
        """An action that cannot be done, with what to tell the model."""
        return Action(thought, text, None, None, what, slips + 1, False)

    def invalid(self, thought: str, text: str, why: str = "", slips: int = 0) -> Action:
        """`problem` in the words of Yao et al.'s environment, then the valid actions."""
        return self.problem(thought, text, f"Invalid action{': ' + why if why else ''}. {self.valid}", slips)

    def call(self, thought: str, text: str, spec: ToolSpec, arguments: dict[str, Any], slips: int) -> Action:
        """A call with its arguments by name; a final answer if the tool is Finish."""
        if fold(spec.name) != "finish":
            return Action(thought, text, spec.name, arguments, None, slips, False)
        answer = arguments.get("answer", next(iter(arguments.values()), None) if len(arguments) == 1 else None)
        if answer is None:
            return self.problem(thought, text, f"Invalid action: {spec.name} needs `answer`.", slips)
        slips += "answer" not in arguments
        answer = answer if isinstance(answer, str) else json.dumps(answer, ensure_ascii=False)
        return Action(thought, text, spec.name, {"answer": answer}, None, slips, True)

    def inline(self, text: str) -> tuple[int, int] | None:
        """Where a line of a thought ends with a call in brackets: start of the call, end of the line."""
        for line in re.finditer(r"[^\n]+", text):
            found = self._called.search(text, line.start(), line.end())
            if found:
                close = _closing(text, found.end() - 1, line.end())
                if close is not None and not text[close + 1 : line.end()].strip(_HARMLESS):
                    return found.start(), line.end()
        return None

    def parse(self, thought: str, text: str, slips: int = 0) -> Action:
        """Read the text of an action."""
        text = text.strip()
        body = text.strip("`*").lstrip("\"'“- \t")
        slips += body != text
        if again := _FIRST.match(body):
            body, slips = body[again.end() :].lstrip(), slips + 1
        if not body:
            return self.problem(thought, text, f"No action was given. {self.valid}", slips)
        found = self._first.match(body)
        if found is None:
            called = self._called.search(body)
            if called is None:
                unknown = re.match(r"\w{1,64}(?=[ \t]{0,2}[\[(])", body)
                return self.invalid(thought, text, f"there is no {unknown[0]}" if unknown else "", slips)
            found, slips = self._first.match(body, called.start()), slips + 1
            assert found is not None
        spec = self._specs[fold(found[0])]
        slips += found[0] not in (spec.name, shown(spec))
        rest = body[found.end() :]
        argument, more = _argument(rest) if rest.strip(_HARMLESS) else ("", 0)
        bound, bad = _bind(spec, argument)
        slips += more + bad
        if bound is None or (spec.required and not rest.strip(_HARMLESS)):
            return self.invalid(thought, text, f"{found[0]} has no argument", slips)
        return self.call(thought, text, spec, bound, slips)


def read_turn(text: str, number: int | None, actions: Actions) -> Reading:
    """Find Thought and Action in what a model said in one turn.

    Args:
        number: the number its action should carry; None where actions are not numbered.
    """
    slips = 0
    start = 0
    if label := _THOUGHT.match(text):
        start, slips = label.end(), int(number is not None)
    found = _MARKER.search(text, start) or _FIRST.match(text, start)
    if found is None:
        inline = actions.inline(text)
        if inline is None:
            return Reading(text[start:].strip(), None, len(text.rstrip()), slips + 1)
        at, end = inline
        return Reading(text[start:at].strip(), text[at:end], end, slips + 1)
    slips += number is not None and (found["n"] != str(number) or "Action" not in found[0])
    line = _LINE.search(text, found.end())
    action, end = (line[0], line.end()) if line else ("", len(text.rstrip()))
    return Reading(text[start : found.start()].strip(), action, end - len(action) + len(action.rstrip()), slips)


def answer_end(text: str) -> int | None:
    """Where the bracket closes that was opened before `text`."""
    return _closing("[" + text, 0, len(text) + 1)


def shown(spec: ToolSpec) -> str:
    """A tool's name as few-shot examples write it: Search."""
    return spec.name[:1].upper() + spec.name[1:]


def usage(spec: ToolSpec) -> str:
    """How to call a tool: Search[entity]."""
    return f"{shown(spec)}[{', '.join(spec.required)}]"


def fewshot_tools(fewshot: str) -> list[str]:
    """Names of the tools that few-shot examples call, each once, in order."""
    calls = re.findall(r"^[ \t]*Action[ \t]*\d{0,3}[ \t]{0,3}:[ \t]*(\w+)[ \t]?[\[(]", fewshot, re.MULTILINE)
    return list(dict.fromkeys(calls))


def fold(name: str) -> str:
    """What of a tool's name counts: neither case nor separators."""
    return re.sub(r"[ _-]", "", name).casefold()


def _closing(text: str, start: int, end: int) -> int | None:
    """Index of the bracket that closes the one at `start`."""
    opens, closes = text[start], "]" if text[start] == "[" else ")"
    depth = 0
    for k in range(start, end):
        depth += (text[k] == opens) - (text[k] == closes)
        if depth == 0:
            return k
    return None


def _argument(rest: str) -> tuple[str, int]:
    """The argument in what follows a tool's name, and the slips in it."""
    body = _JOINT.sub("", rest.strip(), count=1)
    slips = int(rest[:1] not in ("[", "("))
    if body[:1] not in ("[", "("):
        return _unquoted(body.strip(" \t"), slips)
    slips += body[0] == "("
    close = _closing(body, 0, len(body))
    if close is None:  # never closed, or an unpaired bracket within
        inner = body[1:].rstrip()
        return _unquoted(inner[:-1] if inner[-1:] in ("]", ")") else inner, slips + 1)
    slips += bool(body[close + 1 :].strip(_HARMLESS))
    return _unquoted(body[1:close].strip(), slips)


def _unquoted(text: str, slips: int) -> tuple[str, int]:
    close = _QUOTES.get(text[:1])
    if close and len(text) > 1 and text[-1] == close and close not in text[1:-1]:
        return text[1:-1].strip(), slips + 1
    return text, slips


def _bind(spec: ToolSpec, argument: str) -> tuple[dict[str, Any] | None, int]:
    """The argument text as arguments by name (None: an argument is missing), and the slips in it."""
    names, required = spec.arguments, spec.required
    if not names:
        return {}, int(bool(argument))
    if argument.startswith("{"):
        try:
            named = json.loads(argument)
        except (ValueError, RecursionError):
            named = None
        if isinstance(named, dict) and named and set(named) <= set(names):
            return named, 1
    if not argument and required and fold(spec.name) != "finish":
        return None, 0
    keys = (required if len(required) > 1 else required[:1]) or names[:1]
    if len(keys) > 1:
        parts = [part.strip() for part in argument.split(",", len(keys) - 1)]
        if len(parts) < len(keys):
            return None, 0
        return {key: _typed(spec, key, part) for key, part in zip(keys, parts, strict=True)}, 0
    key = keys[0]
    if keyword := re.match(rf"{re.escape(key)}[ ]{{0,3}}[:=][ ]{{0,3}}", argument, re.IGNORECASE):
        argument, slips = _unquoted(argument[keyword.end() :].strip(), 1)
        return {key: _typed(spec, key, argument)}, slips
    return ({key: _typed(spec, key, argument)} if argument or required else {}), 0


def _typed(spec: ToolSpec, key: str, text: str) -> Any:
    """A number, truth value or list where the schema wants one and the text is one; otherwise the text."""
    if spec.parameters.get("properties", {}).get(key, {}).get("type") not in ("integer", "number", "boolean", "array"):
        return text
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text

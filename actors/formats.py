"""The three ways a ReAct agent writes: react_text, react_chat, tool_calling.

    react_text    one growing text: Question, then Thought n, Action n, Observation n (Yao et al. 2022)
    react_chat    the same in a chat: an assistant message a turn, the observation as the next user message
    tool_calling  the chat template's own tool calls; the thought is what the model says before the call

The transcript lives here as token ids. A turn appends only its delta, so a call is a pure extension of the one
before; where a template rewrites history (reasoning dropped from earlier turns) the transcript is rendered anew,
the longest common prefix is kept, and the tokens behind it are counted in `recomputed_tokens`. What the model
generated is never decoded and encoded again: its ids stand in place of a placeholder in the rendered template.
Only generated tokens are parsed, and text of tasks and tools never becomes a control token (see `tokens`).
Knows nothing of engines, tools' execution, suites or Ray.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from actors.actions import (
    FORCED,
    LINE_END,
    MARKER,
    STOPS,
    Action,
    Actions,
    ToolSpec,
    answer_end,
    fewshot_tools,
    read_turn,
)
from actors.chat import PROBE, Chat, ReactChat, ToolCalling, stage
from actors.errors import InputError
from actors.messages import Stage, Task, Turn
from actors.tokens import Codec, codec_of

__all__ = ["Action", "Format", "Prompt", "ToolSpec", "check_format", "fewshot_tools", "make_format"]

FORMATS = ("react_text", "react_chat", "tool_calling")
REASONING_HISTORY = ("template", "keep")
_FIELD = re.compile(r"\{([^\W\d]\w*)\}")


@dataclass(frozen=True, slots=True)
class Prompt:
    """The suite's texts.

    Attributes:
        user: what is asked, with the task's fields as `{name}`.
    """

    system: str
    fewshot: str
    user: str


class Format(Protocol):
    """One trajectory's transcript.

    Attributes:
        token_ids: the transcript so far; replaced, never changed in place.
        prompt_tokens: of them the prompt.
        recomputed_tokens: transcript tokens that were dropped again: behind a stop, or reasoning and all behind it.
    """

    token_ids: list[int]
    prompt_tokens: int
    recomputed_tokens: int

    def turn(self) -> Turn:
        """Limits and stops of the next call."""
        ...

    def read(self, generation_token_ids: Sequence[int], finish_reason: str) -> Action | None:
        """Take in what the model said and read it. None: the turn needs another call to be complete."""
        ...

    def observe(self, observation: str) -> None:
        """Append the observation and open the next turn."""
        ...

    def force_finish(self) -> None:
        """Ask for the answer now; the next `read` gives a final action."""
        ...


def make_format(
    name: str,
    tokenizer: Any,
    prompt: Prompt,
    tools: Sequence[ToolSpec],
    max_tokens: Mapping[str, int],
    reasoning_max_tokens: int | None,
    reasoning_history: str,
    task: Task,
    forced_labels: bool = False,
) -> Format:
    """The transcript of a new trajectory.

    Args:
        max_tokens: limits by stage: thought, action, answer.
        reasoning_max_tokens: tokens a model may think (<think>…</think>) before it speaks; None: as its thought.
        reasoning_history: `template`: earlier turns keep their reasoning if the template keeps it; `keep`: always.
        forced_labels: react_text writes `Action n:` where a thought's first line ends; without it the model does.

    Raises:
        InputError: an unknown name or field, or a template that cannot do it.
    """
    if name not in FORMATS:
        raise InputError("unknown format", field="agent.format", got=name, wants=" | ".join(FORMATS))
    if reasoning_history not in REASONING_HISTORY:
        raise InputError(
            "unknown policy",
            field="agent.reasoning.history",
            got=reasoning_history,
            wants=" | ".join(REASONING_HISTORY),
        )
    if forced_labels and name != "react_text":
        raise InputError("the model writes these labels", field="agent.labels", got="forced", wants="react_text")
    codec, actions = codec_of(tokenizer), Actions(tools)
    limits = dict(max_tokens)
    if reasoning_max_tokens is not None:
        limits["reasoning"] = reasoning_max_tokens
    if name == "react_text":
        return ReactText(codec, actions, prompt, limits, task, forced_labels)
    kind = ReactChat if name == "react_chat" else ToolCalling
    system = "\n\n".join(part.strip() for part in (prompt.system, prompt.fewshot) if part.strip())
    return kind(codec, actions, system, fill(prompt.user, task).strip(), limits, reasoning_history == "keep")


def check_format(name: str, tokenizer: Any, tools: Sequence[ToolSpec]) -> None:
    """Play two turns of a made-up task.

    Raises:
        InputError: names what the tokenizer's chat template cannot do.
    """
    limits = {"thought": 8, "action": 8, "answer": 8}
    task = Task("check", 0, PROBE, ("it",), {}, {}, 0)
    probe = make_format(name, tokenizer, Prompt("Be brief.", "", "{question}"), tools, limits, None, "template", task)
    if isinstance(probe, Chat):
        probe.check()


def fill(template: str, task: Task) -> str:
    """`template` with the task's fields: plain names only, one pass, so that a field's text is never a template."""
    values: dict[str, Any] = {**task.metadata, **task.row, "question": task.question}

    def value(match: re.Match[str]) -> str:
        name = match[1]
        if name not in values:
            raise InputError(
                "the prompt names a field that the row lacks",
                field="prompt.user",
                got=name,
                wants="one of " + ", ".join(map(str, values)),
            )
        got = values[name]
        return got if isinstance(got, str) else json.dumps(got, ensure_ascii=False, default=str)

    return _FIELD.sub(value, template)


def named_fields(template: str) -> list[str]:
    """The fields that `fill` wants for this template."""
    return _FIELD.findall(template)


class ReactText:
    """Thought, Action, Observation as one text, numbered, as Yao et al. 2022 do with a plain language model."""

    def __init__(
        self, codec: Codec, actions: Actions, prompt: Prompt, limits: Mapping[str, int], task: Task, forced_labels: bool
    ):
        self._codec, self._actions, self._limits = codec, actions, limits
        self._cue = LINE_END if forced_labels else None
        label = re.match(r"\s*(\w+)[ \t]?:", prompt.user)
        user = prompt.user if label else f"Question: {prompt.user}"
        self._stops = (*STOPS, rf"\n[ \t]{{0,8}}{re.escape(label[1] if label else 'Question')}[ \t]{{0,3}}:")
        self._stop = re.compile("|".join(self._stops))
        self._number = 1
        self._phase = "turn"  # turn, action, answer; read: the model has spoken
        self._thought, self._slips = "", 0
        parts = [part.strip("\n") for part in (prompt.system, prompt.fewshot, fill(user, task).strip())]
        text = codec.plain("\n".join(part for part in parts if part)) + "\nThought 1:"
        self.token_ids = codec.bos + codec.encode(text, start=True)
        self.prompt_tokens = len(self.token_ids)
        self.recomputed_tokens = 0
        self._newline = False  # the transcript ends with one

    def turn(self) -> Turn:
        """Thought and action; or the one that is asked for."""
        action = stage("action", self._limits, LINE_END)
        if self._phase == "answer":
            return Turn((stage("answer", self._limits, LINE_END),))
        if self._phase == "action":
            return Turn((action,), self._stops)
        thought = Stage("thought", self._limits["thought"], MARKER, self._cue, f"Action {self._number}:")
        return Turn((thought, action), self._stops)

    def read(self, generation_token_ids: Sequence[int], finish_reason: str) -> Action | None:
        """See `Format`. A thought without an action gets the label of one and is asked for it."""
        ids = self._codec.said(generation_token_ids)
        text = self._codec.decode(ids)
        phase, self._phase = self._phase, "read"
        if phase == "answer":
            return self._answer(ids, text)
        stop = self._stop.search(text)
        said = text[: stop.start()] if stop else text
        if phase == "action":
            line = re.search(r"\S[^\n]*", said)
            action, end = (line[0].rstrip(), line.start() + len(line[0].rstrip())) if line else ("", 0)
            self._take(ids, text, end)
            return self._actions.parse(self._thought, action, self._slips)
        reading = read_turn(said, self._number, self._actions)
        self._take(ids, text, reading.end)
        if reading.action is not None:
            return self._actions.parse(reading.thought, reading.action, reading.slips)
        if finish_reason == "context":
            return self._actions.invalid(reading.thought, "", slips=reading.slips - 1)
        self._append(f"Action {self._number}:")
        self._phase, self._thought, self._slips = "action", reading.thought, reading.slips
        return None

    def observe(self, observation: str) -> None:
        """See `Format`."""
        said = self._codec.plain(observation.strip())
        self._append(f"Observation {self._number}: {said}\nThought {self._number + 1}:")
        self._number += 1
        self._phase = "turn"

    def force_finish(self) -> None:
        """See `Format`. Writes the thought and the action up to the answer."""
        if self._phase == "read":
            self.observe("The step limit is reached.")
        thought = f" {FORCED}\nAction {self._number}:" if self._phase == "turn" else ""
        self.token_ids = self.token_ids + self._codec.encode(thought + " Finish[")
        self._phase = "answer"

    def _answer(self, ids: list[int], text: str) -> Action:
        line = text[: end.start()].rstrip() if (end := re.search(LINE_END, text)) else text.rstrip()
        close = answer_end(line)
        answer = line if close is None else line[: close - 1]
        self._take(ids, text, len(line) if close is None else close)
        spec = self._actions.spec("finish")
        return Action(
            FORCED, line.strip(), spec and spec.name, {"answer": answer.strip()}, None, int(close is None), True
        )

    def _take(self, ids: list[int], text: str, end: int) -> None:
        """The transcript goes on with `text[:end]`, and the newline behind it if that costs nothing."""
        kept, missing = self._codec.head(ids, text, end)
        self._newline = False
        if text[end : end + 1] == "\n":
            more, rest = self._codec.head(ids, text, end + 1)
            if not rest:
                kept, missing, self._newline = more, "", True
        self.recomputed_tokens += len(ids) - len(kept)
        self.token_ids = self.token_ids + kept + self._codec.encode(self._codec.plain(missing))

    def _append(self, line: str) -> None:
        self.token_ids = self.token_ids + self._codec.encode(line if self._newline else "\n" + line)
        self._newline = False

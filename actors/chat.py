"""ReAct inside a model's chat template: react_chat and tool_calling.

Messages are rendered whole each turn, with placeholders for what the model said; its ids stand in for them, so that
nothing it generated is decoded and encoded again. Where the template renders earlier turns otherwise than they were
(dropped reasoning), the transcript follows the template from there on, and that is counted.
Knows nothing of tasks, suites, engines or how tools run.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from actors.actions import FORCED, LINE_END, MARKER, STOPS, Action, Actions, answer_end, read_turn
from actors.errors import InputError
from actors.messages import Stage, Turn
from actors.tokens import BREAK, MARK, Codec
from actors.toolcalls import Syntax, string_end, syntax_of

THINK, THOUGHT_THROUGH = "<think>", "</think>"
TEMPLATE_DATE = "26 Jul 2024"
"""What Llama 3 templates print where no date is given; today's would make a prompt depend on the day."""
PROBE = "What is it?"
"""The question of the made-up task that `check` plays."""


def stage(name: str, limits: Mapping[str, int], ends: str | None = None) -> Stage:
    """A stage with its limit."""
    return Stage(name, limits[name], ends)


@dataclass(slots=True)
class _Said:
    """What the model said in one turn of a chat.

    Attributes:
        before: rendered text before it, since the turn before.
        ids: all of it.
        content: the ids behind the reasoning; `ids` where there is none.
        reasoned: there is reasoning.
    """

    before: str
    ids: list[int] = field(default_factory=list)
    content: list[int] = field(default_factory=list)
    reasoned: bool = False


class Chat:
    """A transcript inside a chat template. Messages are rendered whole each turn, with placeholders for what the
    model said; its ids stand in for them, so only template text and untrusted text is ever encoded."""

    name = ""

    def __init__(self, codec: Codec, actions: Actions, system: str, user: str, limits: Mapping[str, int], keep: bool):
        self._codec, self._actions, self._limits, self._keep = codec, actions, limits, keep
        self._tokenizer = codec.tokenizer
        self._tools = self._tool_schemas()
        self._template = self._chat_template()
        self._messages = self._opening(codec.plain(system), codec.plain(user))
        self._encoded: dict[str, list[int]] = {}
        self._past: list[_Said] = []
        self._said = _Said(self._render(self._messages))
        self._phase = "turn"  # turn, call, answer; read: the model has spoken
        self._slips = 0
        self._opened = 0  # characters of a forced answer that were written for the model
        ends = {text for text in codec.ends.values() if text in self._template} | {self._tokenizer.eos_token}
        self._stops = tuple(sorted(re.escape(text) for text in ends if text))
        self.token_ids = self._ids(self._said.before, start=True)
        self.prompt_tokens = len(self.token_ids)
        self.recomputed_tokens = 0

    # what a chat format of its own adds

    def _stages(self) -> tuple[Stage, ...]:
        raise NotImplementedError

    def _parse(self, reasoning: str, text: str, start: int, limited: bool) -> Action | None:
        """Read `text[start:]`; None after `_call` asked for the call."""
        raise NotImplementedError

    def _answer(self, text: str) -> Action:
        raise NotImplementedError

    def _forced(self) -> str:
        raise NotImplementedError

    def _spoken(self, turn: int, content: str, mark: str) -> dict[str, Any]:
        """The message of what the model said, with placeholders."""
        return {"role": "assistant", "content": content + mark}

    def _observed(self, turn: int, observation: str) -> dict[str, Any]:
        raise NotImplementedError

    def _tool_schemas(self) -> list[dict[str, Any]] | None:
        return None

    def _example(self) -> str:
        """A turn as a model would say it, for `check`."""
        raise NotImplementedError

    # Format

    def turn(self) -> Turn:
        """Reasoning if it has a limit of its own, then the format's stages."""
        stages = self._stages()
        if self._phase == "turn" and "reasoning" in self._limits and not self._said.ids:
            stages = (stage("reasoning", self._limits, THOUGHT_THROUGH), *stages)
        return Turn(stages, self._stops)

    def read(self, generation_token_ids: Sequence[int], finish_reason: str) -> Action | None:
        """As `Format` says. Reasoning that ran to its limit is closed, and the model asked to go on."""
        said = self._codec.said(generation_token_ids)
        self._said.ids = self._said.ids + said
        self.token_ids = self.token_ids + said
        text = self._codec.decode(self._said.ids)
        phase, self._phase = self._phase, "read"
        if phase == "answer":
            return self._answer(text)
        limited = finish_reason in ("stage", "length") and phase != "call"
        start = 0
        if self._thinking(text):
            start = text.find(THOUGHT_THROUGH)
            if start < 0 and finish_reason != "context":
                self._write(f"\n{THOUGHT_THROUGH}\n\n", control=True)
                self._phase = "turn"
                self._slips += 1
                return None
            start = len(text) if start < 0 else start + len(THOUGHT_THROUGH)
            start += len(text[start:]) - len(text[start:].lstrip("\n"))
        reasoning = text[:start].replace(THINK, "").replace(THOUGHT_THROUGH, "").strip()
        action = self._parse(reasoning, text, start, limited)
        if action is None:
            self._phase = "call"
            return None
        self._said.reasoned = start > 0
        self._said.content = self._said.ids
        if start:
            text = self._codec.decode(self._said.ids)
            self._said.content = self._codec.tail(self._said.ids, text, min(start, len(text)))
        return action

    def observe(self, observation: str) -> None:
        """As `Format` says."""
        self._past.append(self._said)
        turn = len(self._past) - 1
        content = f"{THINK}\n{_mark(turn, 'r')}\n{THOUGHT_THROUGH}\n\n" if self._said.reasoned else ""
        self._messages.append(self._spoken(turn, content, _mark(turn)))
        self._messages.append(self._observed(turn, self._codec.plain(observation.strip())))
        text = self._render(self._messages)
        ids, at = self._history(text)
        self._said = _Said(text[at:])
        ids += self._ids(text[at:])
        common = _common(ids, self.token_ids)
        self.recomputed_tokens += len(self.token_ids) - common
        self.token_ids = ids
        self._phase = "turn"
        self._slips = 0

    def force_finish(self) -> None:
        """As `Format` says. Writes the model's message up to the answer."""
        if self._phase == "read":
            self.observe("The step limit is reached.")
        opened = self._thinking("") and not self._said.ids
        self._write((f"\n{THOUGHT_THROUGH}\n\n" if opened else "") + self._forced(), control=True)
        self._phase = "answer"
        self._opened = len(self._codec.decode(self._said.ids))

    # the transcript

    def _write(self, text: str, control: bool = False) -> None:
        """Put words into the model's mouth."""
        ids = self._codec.encode(text if control else self._codec.plain(text))
        self._said.ids = self._said.ids + ids
        self.token_ids = self.token_ids + ids

    def _cut(self, text: str, end: int, missing: str = "") -> None:
        """What the model said ends at `text[:end]`, with `missing` behind it."""
        kept, rest = self._codec.head(self._said.ids, text, end)
        dropped = len(self._said.ids) - len(kept)
        if dropped:
            self.recomputed_tokens += dropped
            self.token_ids = self.token_ids[:-dropped]
            self._said.ids = kept
        self._write(rest)
        self._write(missing, control=True)

    def _thinking(self, text: str) -> bool:
        """The model's reasoning was opened, by the template or by itself."""
        return text.lstrip().startswith(THINK) or self._said.before.rstrip().endswith(THINK)

    def _history(self, text: str) -> tuple[list[int], int]:
        """Ids of the rendered `text` up to the end of the last turn, and that place. A turn whose reasoning the
        template drops, or whose opening it writes otherwise in history, is taken as the template has it."""
        ids: list[int] = []
        at = 0
        for turn, said in enumerate(self._past):
            mark, reason = _mark(turn), _mark(turn, "r")
            last = text.rfind(mark)
            if last < at:
                raise self._refuse("drops what the assistant said from history")
            shared = _common(said.before, text[at:])
            whole = shared == len(said.before) and (not said.reasoned or reason in text)
            if self._keep:
                whole = True
            elif shared < len(said.before):
                shared = said.before.rfind("\n", 0, shared) + 1 or shared
            said.before = said.before if self._keep else said.before[:shared]
            ids += self._ids(said.before, start=not turn) + (said.ids if whole else said.content)
            at = self._end(turn, text, last + len(mark))
        return ids, at

    def _end(self, turn: int, text: str, at: int) -> int:
        """Where what the model said in `turn` ends in the rendered text, its last placeholder ending at `at`."""
        return at

    def _ids(self, text: str, start: bool = False) -> list[int]:
        if text not in self._encoded:
            self._encoded[text] = self._codec.encode(text, start)
        return list(self._encoded[text])

    # the template

    def _refuse(self, what: str, cause: str = "") -> InputError:
        name = getattr(self._tokenizer, "name_or_path", "") or "the model"
        return InputError(
            f"the chat template of {name} {what}" + (f": {cause}" if cause else ""),
            field="agent.format",
            got=self.name,
            wants="another format (react_text needs no template)",
        )

    def _chat_template(self) -> str:
        try:
            return self._tokenizer.get_chat_template(tools=self._tools)
        except (ValueError, AttributeError) as e:
            raise self._refuse("is missing", str(e).splitlines()[0] if str(e) else "") from e

    def _opening(self, system: str, user: str) -> list[dict[str, Any]]:
        """System and user message; one message where the template has no system role."""
        if not system:
            return [{"role": "user", "content": user}]
        apart = [{"role": "system", "content": system}, {"role": "user", "content": user}]
        try:
            known = system.strip() in self._render(apart)
        except InputError:
            known = False
        return apart if known else [{"role": "user", "content": f"{system}\n\n{user}"}]

    def _render(self, messages: list[dict[str, Any]], prompt: bool = True) -> str:
        try:
            return self._tokenizer.apply_chat_template(
                messages,
                tools=self._tools,
                tokenize=False,
                add_generation_prompt=prompt,
                date_string=TEMPLATE_DATE,
            )
        except Exception as e:  # a template is a program of the model's maker
            raise self._refuse("fails", f"{type(e).__name__}: {e}") from e

    def check(self) -> None:
        """Play two made-up turns; the user's message must be PROBE.

        Raises:
            InputError: what the template cannot carry.
        """
        for observation in ("One thing.", "Another thing."):
            before = self._codec.decode(self.token_ids)
            self.read(self._codec.encode(self._example()), "stop")
            self.observe(observation)
            text = self._codec.decode(self.token_ids)
            if observation not in text:
                raise self._refuse("does not show the model what its tools return")
            if PROBE not in text:
                raise self._refuse("drops the question")
            self._check_extends(before + self._example(), text)

    def _check_extends(self, before: str, text: str) -> None:
        """Raise InputError where `text` should go on from `before` and does not."""


class ReactChat(Chat):
    """Thought and Action as an assistant message, the observation as a user message; not numbered."""

    name = "react_chat"

    def _stages(self) -> tuple[Stage, ...]:
        action = stage("action", self._limits, LINE_END)
        if self._phase == "answer":
            return (stage("answer", self._limits, LINE_END),)
        if self._phase == "call":
            return (action,)
        return (stage("thought", self._limits, MARKER), action)

    def turn(self) -> Turn:
        """As in the text, and no observation of the model's own; reasoning may say what it likes."""
        turn = super().turn()
        free = self._phase == "answer" or turn.stages[0].name == "reasoning"
        return turn if free else Turn(turn.stages, (*STOPS, *turn.stop))

    def _parse(self, reasoning: str, text: str, start: int, limited: bool) -> Action | None:
        stop = re.compile("|".join(STOPS)).search(text, start)
        said = text[start : stop.start() if stop else len(text)]
        reading = read_turn(said, None, self._actions)
        self._cut(text, start + reading.end)
        thought = "\n".join(part for part in (reasoning, reading.thought) if part)
        slips = reading.slips + self._slips
        if reading.action is not None:
            return self._actions.parse(thought, reading.action, slips)
        if not limited:
            return self._actions.invalid(thought, "", "there is no line `Action:`", slips - 1)
        self._write("\nAction:")
        self._slips += 1
        return None

    def _answer(self, text: str) -> Action:
        opened = self._opened
        answer = text[opened:].split("\n", 1)[0]
        close = answer_end(answer)
        self._cut(text, opened + (len(answer.rstrip()) if close is None else close))
        spec = self._actions.spec("finish")
        given = {"answer": (answer if close is None else answer[: close - 1]).strip()}
        return Action(FORCED, answer.strip(), spec and spec.name, given, None, int(close is None), True)

    def _forced(self) -> str:
        return f"Thought: {FORCED}\nAction: Finish["

    def _observed(self, turn: int, observation: str) -> dict[str, Any]:
        return {"role": "user", "content": f"Observation: {observation}"}

    def _example(self) -> str:
        return "Thought: I know.\nAction: Finish[it]"

    def _check_extends(self, before: str, text: str) -> None:
        whole = self._render([{**m, "content": self._unmarked(m["content"])} for m in self._messages])
        same = "".join(whole.replace(BREAK, "").split()) == "".join(text.split())
        if self.recomputed_tokens or not text.startswith(before) or not same:
            raise self._refuse("rewrites earlier turns, so that a call is no extension of the one before")

    def _unmarked(self, content: str) -> str:
        return re.sub(f"{MARK}[^{MARK}]*{MARK}", lambda _: self._example(), content)


class ToolCalling(Chat):
    """The template's own tool calls. A reply without a call is the answer."""

    name = "tool_calling"

    def __init__(self, codec: Codec, actions: Actions, system: str, user: str, limits: Mapping[str, int], keep: bool):
        self._calls: list[tuple[str, str] | None] = []  # tool and argument name of each past turn's call
        self._call: tuple[str, str] | None = None
        super().__init__(codec, actions, system, user, limits, keep)
        syntax = syntax_of(self._template)
        if syntax is None:
            raise self._refuse("writes tool calls in no syntax that is known here (Hermes/Qwen, Llama 3, Mistral)")
        self._syntax: Syntax = syntax

    def _stages(self) -> tuple[Stage, ...]:
        close = re.escape(self._syntax.close.strip()) if self._syntax.close != "]" else ""
        action = stage("action", self._limits, close or None)
        if self._phase == "answer":
            return (stage("answer", self._limits, r'(?<!\\)(?:\\\\){0,8}"'),)
        if self._phase == "call":
            return (action,)
        speech = Stage("thought", max(self._limits["thought"], self._limits["answer"]), self._syntax.opens)
        return (speech, action)

    def _parse(self, reasoning: str, text: str, start: int, limited: bool) -> Action | None:
        found = self._syntax.find(text[start:])
        if found is None:
            said = text[start:].strip()
            self._call = None
            if limited:
                self._write(("\n" if said else "") + self._syntax.mark + self._syntax.between + '{"name": "', True)
                self._slips += 1
                return None
            if not said:
                return self._actions.problem(reasoning, "", "There is no tool call and no answer.", self._slips)
            return Action(reasoning, said, None, {"answer": said}, None, self._slips, True)
        thought = "\n".join(part for part in (reasoning, text[start : start + found.start].strip()) if part)
        call = text[start + found.start : start + found.end].strip()
        slips = self._slips + found.slips + bool(text[start + found.end :].strip())
        self._cut(text, start + found.end, found.missing)
        spec = self._actions.spec(found.name) if found.name else None
        self._call = (spec.name, (spec.arguments or ["x"])[0]) if spec else ("invalid", "x")
        if found.name is None or found.arguments is None:
            return self._actions.invalid(
                thought, call, "the tool call is not valid JSON with a name and arguments", slips
            )
        if spec is None:
            return self._actions.invalid(thought, call, f"there is no tool {found.name[:64]}", slips)
        return self._actions.call(thought, call, spec, found.arguments, slips + (found.name != spec.name))

    def _answer(self, text: str) -> Action:
        opened = self._opened
        value, end, closed = string_end(text[opened:])
        self._cut(text, opened + end)
        spec = self._actions.spec("finish")
        return Action(FORCED, text[opened:].strip(), spec and spec.name, {"answer": value}, None, int(not closed), True)

    def _forced(self) -> str:
        spec = self._actions.spec("finish")
        assert spec is not None
        return self._syntax.forced(spec.name, (spec.arguments or ["answer"])[0])

    def observe(self, observation: str) -> None:
        """As `Format` says."""
        self._calls.append(self._call)
        super().observe(observation)

    def _spoken(self, turn: int, content: str, mark: str) -> dict[str, Any]:
        call = self._calls[turn]
        if call is None:
            return super()._spoken(turn, content, mark)
        function = {"name": call[0], "arguments": {call[1]: mark}}
        calls = [{"id": f"call{turn:05d}", "type": "function", "function": function}]
        return {"role": "assistant", "content": content, "tool_calls": calls}

    def _observed(self, turn: int, observation: str) -> dict[str, Any]:
        call = self._calls[turn]
        if call is None:
            return {"role": "user", "content": observation}
        return {"role": "tool", "name": call[0], "tool_call_id": f"call{turn:05d}", "content": observation}

    def _end(self, turn: int, text: str, at: int) -> int:
        if self._calls[turn] is None:
            return at
        end = self._codec.end.search(text, at)
        if end is None:
            raise self._refuse("ends a tool call with no special token")
        return end.start()

    def check(self) -> None:
        """See `Chat`; and the prompt names the tools."""
        if any(tool.name not in self._said.before for tool in self._actions.specs):
            raise self._refuse("does not show the model its tools")
        super().check()

    def _tool_schemas(self) -> list[dict[str, Any]] | None:
        return [
            {
                "type": "function",
                "function": {
                    "name": tool.name,
                    "description": self._codec.plain(tool.description),
                    "parameters": dict(tool.parameters),
                },
            }
            for tool in self._actions.specs
        ]

    def _example(self) -> str:
        spec = self._actions.specs[0]
        return self._syntax.written(spec.name, dict.fromkeys(spec.required, "it"))


def _mark(turn: int, kind: str = "c") -> str:
    """A placeholder that no template trims, splits or escapes."""
    return f"{MARK}{kind}{turn}{MARK}"


def _common(left: Sequence[Any], right: Sequence[Any]) -> int:
    """Length of the longest common prefix."""
    return next((k for k, (a, b) in enumerate(zip(left, right, strict=False)) if a != b), min(len(left), len(right)))

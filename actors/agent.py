"""The ReAct loop (Yao et al. 2022, arXiv:2210.03629): Thought, Action, Observation, until an answer.

Receives `generate` and `call_tool` as callables. Knows no engine, no Ray, no storage and no scores.
"""

from __future__ import annotations

import json
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from actors.actions import Action
from actors.errors import ContextOverflow, EngineError
from actors.formats import Format
from actors.messages import Generation, Step, StopReason, Task, Trajectory, Turn, Usage
from actors.tools import ToolResult

Generate = Callable[[Sequence[int], Turn], Awaitable[Generation]]
CallTool = Callable[[str, Mapping[str, Any], int], Awaitable[ToolResult]]
"""(name, arguments, most tokens of the observation) → result; a tool's failure is a result, never raised."""


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds of one trajectory.

    Attributes:
        max_steps: steps before the answer is asked for.
        trajectory_tokens: tokens of the transcript, prompt included.
        context_tokens: the model's own bound on the same.
        answer_tokens: of the tighter one kept free for asking for the answer: no step and no observation takes them.
    """

    max_steps: int
    trajectory_tokens: int
    context_tokens: int
    answer_tokens: int

    @property
    def tokens(self) -> int:
        """The tighter of the two token bounds."""
        return min(self.trajectory_tokens, self.context_tokens)

    @property
    def reason(self) -> StopReason:
        """Which of the two it is."""
        return "token_limit" if self.trajectory_tokens <= self.context_tokens else "context_limit"


@dataclass(slots=True)
class _Tally:
    """What the calls of one trajectory, or of one step, cost together."""

    usage: Usage = field(default_factory=Usage)

    def add(self, other: Usage) -> None:
        self.usage = self.usage.plus(other)


class Rollout:
    """One trajectory being rolled out. `run` is called once."""

    def __init__(self, task: Task, transcript: Format, generate: Generate, call_tool: CallTool, limits: Limits):
        self.task = task
        self.transcript = transcript
        self.generate = generate
        self.call_tool = call_tool
        self.limits = limits
        self.steps: list[Step] = []
        self.total = _Tally()
        self.slips = 0
        self.tool_calls = 0
        self.tool_errors = 0
        self.peak_tokens = 0
        self.tool_s = 0.0
        self.crash: str | None = None

    async def run(self) -> Trajectory:
        """Roll the task out to its end. An EngineError ends it as a failed trajectory with what was done so far."""
        try:
            return await self._loop()
        except ContextOverflow as e:
            return self._end("error", error=str(e), error_type="model")
        except EngineError as e:
            return self._end("error", error=f"{type(e).__name__}: {e}", error_type="infra")

    async def _loop(self) -> Trajectory:
        for _ in range(self.limits.max_steps):
            if not self._fits(self.limits.answer_tokens):
                return await self._forced(self.limits.reason)
            step = _Tally()
            started = time.perf_counter()
            action = await self._turn(step)
            if action.final:
                self._record(action, "", step.usage, started)
                return self._end("finish", action)
            observation = action.problem if action.problem is not None else await self._act(action)
            self._record(action, observation, step.usage, started)
            self.transcript.observe(observation)
        return await self._forced("step_limit")

    async def _forced(self, reason: StopReason) -> Trajectory:
        """Ask for the answer now, if that still fits."""
        self.transcript.force_finish()
        if not self._fits():
            return self._end(reason)
        step = _Tally()
        started = time.perf_counter()
        action = await self._turn(step)
        self._record(action, "", step.usage, started)
        return self._end(reason, action, forced=True)

    def _fits(self, spare: int = 0) -> bool:
        return self._room() >= self.transcript.turn().max_tokens + spare

    def _room(self) -> int:
        return self.limits.tokens - len(self.transcript.token_ids)

    async def _turn(self, step: _Tally) -> Action:
        """Let the model speak until its turn reads as an action."""
        while True:
            turn = self.transcript.turn()
            generation = await self.generate(self.transcript.token_ids, turn)
            step.add(generation.usage)
            self.total.add(generation.usage)
            self.peak_tokens = max(self.peak_tokens, len(self.transcript.token_ids) + len(generation.token_ids))
            action = self.transcript.read(generation.token_ids, generation.finish_reason)
            if action is not None:
                self.slips += action.slips
                return action

    async def _act(self, action: Action) -> str:
        self.tool_calls += 1
        room = max(0, self._room() - self.limits.answer_tokens)
        result = await self.call_tool(action.tool or "", action.arguments or {}, room)
        self.tool_s += result.seconds
        if result.error is not None:
            self.tool_errors += 1
        if result.crashed:
            self.crash = self.crash or result.error
        return result.observation

    def _record(self, action: Action, observation: str, usage: Usage, started: float) -> None:
        self.steps.append(
            Step(
                thought=action.thought,
                action=action.text,
                tool=action.tool,
                arguments=None if action.arguments is None else json.dumps(action.arguments, ensure_ascii=False),
                observation=observation,
                tokens=usage.generated,
                seconds=time.perf_counter() - started,
                prefilled=usage.prefilled,
                reused=usage.reused,
            )
        )

    def _end(
        self,
        reason: StopReason,
        action: Action | None = None,
        *,
        forced: bool = False,
        error: str | None = None,
        error_type: str | None = None,
    ) -> Trajectory:
        answer = str((action.arguments or {}).get("answer", "")) if action is not None and action.final else None
        if error is None and self.crash is not None:
            error, error_type = self.crash, "tool"
        return Trajectory(
            task=self.task,
            steps=tuple(self.steps),
            answer=answer.strip() if answer is not None else None,
            raw_answer=action.text if action is not None and action.final else None,
            stop_reason=reason,
            forced_finish=forced,
            parse_errors=self.slips,
            error=error,
            error_type=error_type,  # pyright: ignore[reportArgumentType]
            tool_calls=self.tool_calls,
            tool_errors=self.tool_errors,
            prompt_tokens=self.transcript.prompt_tokens,
            peak_tokens=self.peak_tokens,
            usage=self.total.usage,
            tool_s=self.tool_s,
        )

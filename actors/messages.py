"""What crosses processes: tasks, generations, steps, trajectories. Frozen, plain data.

Knows nothing of Ray, engines, formats or storage.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

FinishReason = Literal["stop", "stage", "length", "context"]
StopReason = Literal["finish", "step_limit", "token_limit", "context_limit", "error"]


@dataclass(frozen=True)
class Task:
    """One sample of one question.

    Attributes:
        task_id: id of the question, unique in the suite.
        sample: 0-based index among the samples of this question.
        question: the question's text.
        gold: accepted answers.
        metadata: the suite's metadata fields, as strings.
        row: the whole data row, for tools and the prompt template.
        seed: sampling seed of this row, derived from the run's seed and the row id.
    """

    task_id: str
    sample: int
    question: str
    gold: tuple[str, ...]
    metadata: Mapping[str, str]
    row: Mapping[str, Any]
    seed: int

    @property
    def row_id(self) -> str:
        """Unique id of the result row: `task_id/sample`."""
        return f"{self.task_id}/{self.sample}"


FORECAST_LEVELS = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99, 1.0)
"""At which probabilities a forecast gives quantiles; the last is what the limits allow."""


@dataclass(frozen=True)
class Forecast:
    """What a trajectory is expected to need, from its first call to its last. Orders and places work, bounds nothing.

    Attributes:
        prompt_tokens: tokens of its prompt.
        shared_tokens: of them the prefix that every prompt of the suite begins with.
        p50_tokens, p95_tokens: quantiles of its longest transcript, prompt included.
        quantile_tokens: the same at each of FORECAST_LEVELS, ascending; interpolate linearly to draw from them,
            with prompt_tokens at 0.
        p50_steps: median of its steps.
    """

    prompt_tokens: int
    shared_tokens: int
    p50_tokens: int
    p95_tokens: int
    quantile_tokens: tuple[int, ...]
    p50_steps: int


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn.

    Attributes:
        temperature: 0 takes the most likely token.
        top_p: smallest set of tokens whose probability reaches this; 1.0 keeps all.
        top_k: the k most likely tokens; None keeps all.
        seed: with the token's position in the sequence the only source of noise (a counter).
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int | None = None
    seed: int = 0


@dataclass(frozen=True)
class Stage:
    """One part of a turn with its own token limit.

    Attributes:
        name: thought, action, answer or reasoning.
        max_tokens: tokens the stage may generate; the turn ends there with reason `stage`.
        ends: regular expression whose first match in the stage's text ends the stage and starts the next.
        cue: regular expression whose first match does so too if it comes before that of `ends`; `label` is then written
            in the model's place.
        label: what the format has between the stages; trusted text.
    """

    name: str
    max_tokens: int
    ends: str | None = None
    cue: str | None = None
    label: str = ""


@dataclass(frozen=True)
class Turn:
    """When a generation ends, in text; the replica turns it into the engine's matcher.

    Attributes:
        stages: in order; the last one's end (match or limit) ends the turn.
        stop: regular expressions; any match ends the turn.
    """

    stages: tuple[Stage, ...]
    stop: tuple[str, ...] = ()

    @property
    def max_tokens(self) -> int:
        """Tokens the whole turn may generate."""
        return sum(stage.max_tokens for stage in self.stages)


@dataclass(frozen=True)
class Usage:
    """What one call cost.

    Attributes:
        prompt_tokens: tokens in the request.
        prefilled: of them and of `forced` computed in this call, re-prefill after a preemption included.
        reused: of them found in the KV cache at first admission.
        generated: tokens generated.
        forced: tokens among the answer's that were written in the model's place (see `Stage.label`).
        kv_bytes_peak: this sequence's own KV bytes at peak: its unique pages and its share of shared ones.
        batch_max: largest number of rows computed together with this one in a step.
        preemptions: times the row was set back.
        queue_s: seconds waiting for admission.
        prefill_s: seconds from admission to the first token.
        decode_s: seconds from the first token to the last.
        gpu_s: the row's share of the engine's busy seconds.
        prefill_gpu_s: of them those until its first token; rows that are prefilled together share them.
    """

    prompt_tokens: int = 0
    prefilled: int = 0
    reused: int = 0
    generated: int = 0
    kv_bytes_peak: int = 0
    batch_max: int = 0
    preemptions: int = 0
    queue_s: float = 0.0
    prefill_s: float = 0.0
    decode_s: float = 0.0
    gpu_s: float = 0.0
    forced: int = 0
    prefill_gpu_s: float = 0.0

    def plus(self, other: Usage) -> Usage:
        """Both together: the longest prompt, the highest peaks, sums of the rest."""
        return Usage(
            prompt_tokens=max(self.prompt_tokens, other.prompt_tokens),
            prefilled=self.prefilled + other.prefilled,
            reused=self.reused + other.reused,
            generated=self.generated + other.generated,
            kv_bytes_peak=max(self.kv_bytes_peak, other.kv_bytes_peak),
            batch_max=max(self.batch_max, other.batch_max),
            preemptions=self.preemptions + other.preemptions,
            queue_s=self.queue_s + other.queue_s,
            prefill_s=self.prefill_s + other.prefill_s,
            prefill_gpu_s=self.prefill_gpu_s + other.prefill_gpu_s,
            decode_s=self.decode_s + other.decode_s,
            gpu_s=self.gpu_s + other.gpu_s,
            forced=self.forced + other.forced,
        )


@dataclass(frozen=True)
class Generation:
    """What the engine answers.

    Attributes:
        token_ids: the generated tokens, the stop token (if any) and forced ones included.
        finish_reason: stop (a stop token or the matcher), length (max_tokens), context (model limit).
            The replica says `stage` where a stage's own limit ended the turn.
        usage: what it cost.
        logprobs: log-probability of each generated token under the unmodified distribution.
    """

    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    usage: Usage
    logprobs: tuple[float, ...] = ()


@dataclass(frozen=True)
class Call:
    """One call of a trajectory to its replica.

    Attributes:
        row_id: the trajectory; also the engine's sequence id.
        token_ids: the whole transcript so far; an array crosses processes fastest.
        turn: when the answer ends.
        sampling: how tokens are drawn.
        suite: the trajectory's suite.
        home: the replica that its lease names, which alone serves it; None lets any.
    """

    row_id: str
    token_ids: Sequence[int]
    turn: Turn
    sampling: Sampling
    suite: str = ""
    home: str | None = None


@dataclass(frozen=True)
class DeviceBytes:
    """Memory of a replica's GPU.

    Attributes:
        allocated, reserved: the most that torch has held in use, and kept, since the engine's start.
        used: what all processes hold now.
    """

    allocated: int
    reserved: int
    used: int


@dataclass(frozen=True)
class Reply:
    """A replica's answer to a call.

    Attributes:
        replica: id of the replica that served it.
        numerics: under which it computed.
        device: its GPU's memory within the last second; None on a CPU.
    """

    generation: Generation
    replica: str
    numerics: Numerics
    device: DeviceBytes | None = None


@dataclass(frozen=True)
class Numerics:
    """Under which numerics a replica computes; stands on every row it serves.

    Attributes:
        reproducible: the same row gives the same tokens whatever runs beside it.
    """

    engine: str
    kernel: str
    dtype: str
    kv_dtype: str
    weights_dtype: str
    tp: int
    model_revision: str
    reproducible: bool


@dataclass(frozen=True)
class Step:
    """One Thought, Action, Observation; times in seconds, sizes in tokens.

    Attributes:
        thought: the model's thought (or reasoning), as written.
        action: the action as the model wrote it; empty if none was found.
        tool: name of the tool that was called; None where nothing was.
        arguments: JSON object of the call's arguments; None where nothing was called.
        observation: what the model was shown.
        tokens: tokens generated in the step.
        seconds: from the call to the observation.
        prefilled, reused: the step's prompt tokens that were computed, and found in the cache.
    """

    thought: str
    action: str
    tool: str | None
    arguments: str | None
    observation: str
    tokens: int
    seconds: float
    prefilled: int
    reused: int


@dataclass(frozen=True)
class Trajectory:
    """A finished rollout of one task, before scoring.

    Attributes:
        answer: the final answer, stripped; None where none was given.
        raw_answer: the text it was taken from.
        error_type: model, tool or infra; None without an error.
        forced_finish: the step limit was reached and the answer was asked for.
        parse_errors: slips in the model's format that were forgiven or pointed out.
        peak_tokens: longest transcript that was computed, prompt and generation, in tokens.
    """

    task: Task
    steps: tuple[Step, ...]
    answer: str | None
    raw_answer: str | None
    stop_reason: StopReason
    forced_finish: bool = False
    parse_errors: int = 0
    error: str | None = None
    error_type: Literal["model", "tool", "infra"] | None = None
    tool_calls: int = 0
    tool_errors: int = 0
    prompt_tokens: int = 0
    peak_tokens: int = 0
    usage: Usage = field(default_factory=Usage)
    tool_s: float = 0.0
    attempts: int = 1
    numerics: Numerics | None = None


@dataclass(frozen=True)
class Ask:
    """A trajectory asks for its home, before each of its calls; asking again changes nothing.

    Attributes:
        attempt: a higher one takes the row over; a lower one is refused.
        tokens: of the transcript now.
        home: replica that served the last call.
        avoid: replica at which the last call failed.
        pool: the pool it must go to; None leaves the choice to the forecast.
    """

    row_id: str
    attempt: int
    suite: str
    forecast: Forecast
    tokens: int
    home: str | None = None
    avoid: str | None = None
    pool: str | None = None


@dataclass(frozen=True)
class Lease:
    """Where a trajectory's calls go until it ends.

    Attributes:
        replica: its home; None where the pool has no replica yet and the call is to start one.
        fits: False: the forecast exceeds the largest replica of every pool; this is the largest.
    """

    row_id: str
    attempt: int
    pool: str
    replica: str | None
    fits: bool = True


@dataclass(frozen=True)
class Resident:
    """A trajectory whose pages a replica keeps."""

    row_id: str
    suite: str
    tokens: int

"""What any engine must offer. Knows no Ray, no ReAct and no text: token ids in, token ids out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Protocol

from actors.messages import Generation, Numerics, Sampling

NO_PAGE = "no room for KV"
"""How an engine begins to say that its weights fit, and no page of KV beside them."""


class Matcher(Protocol):
    """Decides when a generation ends. Called with each newly delivered run of token ids, in order, exactly
    once per token; True ends the generation after these tokens. Must be cheap: it runs on the engine's thread.
    """

    def __call__(self, new_ids: Sequence[int], /) -> bool:
        """True: the generation ends after `new_ids`."""
        ...


@dataclass(frozen=True, slots=True)
class Request:
    """One call: continue `token_ids`.

    Attributes:
        token_ids: the whole context so far, at least one token.
        sequence_id: the trajectory. A later request of the same id is usually an extension of this one, and
            its KV is kept until `end`. One request of a sequence runs at a time.
        max_tokens: tokens to generate at most, ≥ 1.
        sampling: greedy by default; noise depends on (seed, position) alone.
        stop_token_ids: a token that ends the generation; it is included in the answer.
        matcher: see `Matcher`; must not be shared between requests.
        logprobs: return the log-probability of each chosen token.
    """

    token_ids: Sequence[int]
    sequence_id: str
    max_tokens: int
    sampling: Sampling = field(default_factory=Sampling)
    stop_token_ids: frozenset[int] = frozenset()
    matcher: Matcher | None = None
    logprobs: bool = False


@dataclass(frozen=True, slots=True)
class EngineSpec:
    """What an engine is built from; an engine's factory takes one of these.

    Attributes:
        model: HF id, folder, .gguf file or `smollm2-135m`.
        engine: paged, reference or `module:factory`.
        dtype: auto, float32, bfloat16 or float16.
        device: a torch device; None takes the GPU where there is one.
        max_model_len: longest context in tokens; None takes the model's own.
        max_batch: rows decoded together at most; None lets the engine choose.
        max_prefill_tokens: tokens a prefill step may take; None lets the engine choose.
        numerics: fast, or invariant (same row, same tokens, whatever else runs).
        budget_fraction: share of the device's memory to use.
        gpu_memory_fraction: torch's per-process cap on the device's memory.
        quantization: int8 or None: weights of the decoder's linear layers.
        kv_dtype: auto is the model's dtype; int8 or fp8.
        speculation: on: tokens are guessed and checked (see `drafts`); off; or auto: on where it was seen to be faster,
            so far on a CPU.
        compile: on: layers are compiled at the start (half precision on GPUs only, and no experts over several ranks);
            off; or auto: on where that was seen to be faster, so far for dense models.
        kv_pages: KV pages; None takes what the budget leaves.
        tp: ranks that the model is split over, one process each.
        rank_deadline_s: how long a rank waits for the others before it takes one for dead.
        step_limit_s: how long a step may run before the engine is taken for hung; None leaves it to the replica.
        record_oom: what is written when memory runs out: off, snapshot, trace or all (see `recorder`).
        oom_folder: where to; a path or an address.
    """

    model: str
    engine: str = "paged"
    revision: str | None = None
    adapter: str | None = None
    dtype: str = "auto"
    quantization: str | None = None
    trust_remote_code: bool = False
    device: str | None = None
    max_model_len: int | None = None
    max_batch: int | None = None
    max_prefill_tokens: int | None = None
    numerics: str = "fast"
    budget_fraction: float = 0.9
    gpu_memory_fraction: float | None = None
    kv_dtype: str = "auto"
    speculation: str = "auto"
    compile: str = "auto"
    kv_pages: int | None = None
    tp: int = 1
    rank_deadline_s: float = 60.0
    step_limit_s: float | None = None
    record_oom: str = "off"
    oom_folder: str = "oom"


@dataclass(frozen=True, slots=True)
class Capacity:
    """What an engine holds now.

    Attributes:
        max_model_len: longest context in tokens, prompt and generation together.
        max_batch: rows decoded together at most.
        kv_bytes_token: KV bytes one token takes, on all ranks together; 0 for an engine that holds no pages.
        pages_total, pages_free, pages_cached: KV pages in all, free, and kept for reuse.
        page_tokens: tokens a page; 0 for an engine that holds no pages.
        running, waiting: requests now.
    """

    max_model_len: int
    max_batch: int
    kv_bytes_token: int = 0
    pages_total: int = 0
    pages_free: int = 0
    pages_cached: int = 0
    page_tokens: int = 0
    running: int = 0
    waiting: int = 0


@dataclass(frozen=True, slots=True)
class Memory:
    """GPU memory of one engine on one rank, in bytes by component (see `memory.predict`).

    Attributes:
        weights_bytes: parameters.
        activation_bytes: what the largest prefill step adds at its peak, before it draws.
        logits_bytes: logits and sampling of the largest batch; never live together with that peak.
        workspace_bytes: what cuBLAS keeps for the threads that run steps.
        graph_bytes: captured decode steps: their memory pool, their outputs, cuBLAS's workspaces for them.
        context_bytes: CUDA context and loaded kernels, and what other processes hold.
        slack_bytes: what torch's allocator holds and cannot use.
        pool_bytes: KV pages, the scratch page included; None where no budget was given.
    """

    weights_bytes: int
    activation_bytes: int
    logits_bytes: int
    workspace_bytes: int
    graph_bytes: int
    context_bytes: int
    slack_bytes: int
    pool_bytes: int | None = None

    @property
    def step_bytes(self) -> int:
        """What a step adds at its peak."""
        return max(self.activation_bytes, self.logits_bytes)

    @property
    def fixed_bytes(self) -> int:
        """All but the KV pool."""
        kept = self.weights_bytes + self.workspace_bytes + self.graph_bytes
        return kept + self.step_bytes + self.context_bytes + self.slack_bytes

    @property
    def total_bytes(self) -> int:
        """The KV pool included."""
        return self.fixed_bytes + (self.pool_bytes or 0)


@dataclass(frozen=True, slots=True)
class MemoryReport:
    """What was predicted of an engine's memory, and what its start found.

    Attributes:
        measured: bytes by field of `Memory`; lacks what the device does not tell, on a CPU nearly all.
        device_used_bytes: what all processes held of the device after the start; None on a CPU.
    """

    predicted: Memory
    measured: Mapping[str, int]
    device_used_bytes: int | None = None

    def __str__(self) -> str:
        def mib(size: int | None) -> str:
            return "?" if size is None else f"{size / 2**20:,.0f}"

        return ", ".join(
            f"{name.removesuffix('_bytes')} {mib(getattr(self.predicted, name))} → {mib(found)}"
            for name, found in self.measured.items()
        )


class Engine(Protocol):
    """One model. `submit` and `end` may be called from any thread and never block on the GPU."""

    numerics: Numerics

    def submit(self, request: Request) -> Future[Generation]:
        """Queue a request. The future fails with an `EngineError`; cancelling it cancels the request."""
        ...

    def end(self, sequence_id: str) -> None:
        """Free what is kept for a sequence; a running request of it fails with `Cancelled`. Unknown ids are
        ignored, and so is the call itself by an engine that holds no pages."""
        ...

    def capacity(self) -> Capacity:
        """Sizes and occupancy now."""
        ...

    def shrink(self, max_batch: int) -> None:
        """Decode at most `max_batch` rows together from the next step on."""
        ...

    def step_s(self) -> float:
        """Seconds that the step under way has run so far; 0.0 where none is. A step is what must end by itself in
        bounded time however much is queued: one forward, with the delivery of what it gave."""
        ...

    def close(self) -> None:
        """Fail what is queued with `EngineDead`, stop the thread, free the memory."""
        ...


@dataclass(slots=True)
class RowStep:
    """One sequence in one step; or one guess behind the last row, which it continues.

    Attributes:
        token_ids: the new tokens to compute, at least one; one in decode.
        start: position of the first of them.
        pages: page table that covers `start + len(token_ids)` tokens.
        sample: draw the next token after the last of `token_ids`.
        sampling: how to draw it.
        logprobs: return its log-probability.
    """

    token_ids: Sequence[int]
    start: int
    pages: Sequence[int]
    sample: bool
    sampling: Sampling
    logprobs: bool = False


class Drawn(Protocol):
    """A launched step."""

    def result(self) -> Sequence[tuple[int, float] | None]:
        """Wait for it; as `Runner.step`."""
        ...


class Runner(Protocol):
    """What the engine needs of a runner. All calls come from the engine's thread; any may run out of memory."""

    def step(self, rows: Sequence[RowStep], /) -> Sequence[tuple[int, float] | None]:
        """Write the rows' KV; (token id, log-probability) where `sample` is set. Can be repeated."""
        ...

    def launch(self, rows: Sequence[RowStep], after: Any = None, sources: Sequence[int | None] = (), /) -> Drawn | None:
        """Start a step and do not wait; None, with nothing done, where that cannot be.

        After what `launch` gave before, a row with a source goes on with the token that the row there draws."""
        ...

    def copy_pages(self, copies: Sequence[tuple[int, int, int]], /) -> None:
        """(page, page, tokens): copy at least the first tokens of one to the other, in order. None is written that was
        read before, so it can be repeated."""
        ...

    def drop_graphs(self) -> None:
        """Free captured graphs."""
        ...

    def resize(self, num_pages: int, /) -> None:
        """Free all pages and allocate `num_pages`."""
        ...


class Recorder(Protocol):
    """Keeps what is known of an out of memory (see `recorder.OomRecorder`). Raises nothing."""

    def failed(self, stage: str, traced: bool = True) -> str:
        """Memory ran out; where that is recorded, as the end of a log line."""
        ...

    def ended(self) -> None:
        """A step has ended, well or not."""
        ...

    def close(self) -> None:
        """No step follows from this thread. Can be repeated."""
        ...


class NoRecorder:
    """A `Recorder` that keeps nothing."""

    def failed(self, stage: str, traced: bool = True) -> str:
        """Nowhere."""
        return ""

    def ended(self) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing."""

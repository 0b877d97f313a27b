"""The reference engine: transformers `generate` over left-padded batches. Simple and right rather than fast: the
oracle in tests, and the fallback for architectures that the paged engine refuses.

It prefills every request whole (nothing is kept between calls), so `Usage.reused` and `kv_bytes_peak` are 0.
What a row has drawn is kept outside `generate`: after an out-of-memory the row goes on from there, its matcher
never sees a token twice, and its sampling noise, which depends on (seed, position) alone, stays the same.

Knows nothing of Ray, text, pages, prefix reuse or tensor parallelism.

Shapes: B rows of the batch, T padded prompt length, V vocabulary.
"""

from __future__ import annotations

import gc
import logging
import threading
import time
from collections import deque
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from actors.engine import loader
from actors.engine.int8 import weights_dtype
from actors.engine.oom import is_out_of_memory
from actors.engine.protocol import Capacity, EngineSpec, NoRecorder, Recorder, Request
from actors.engine.recorder import loading, recorder_of
from actors.engine.sampling import choose, wrap_seed
from actors.errors import Cancelled, ContextOverflow, EngineDead, EngineError, InputError, OutOfMemory
from actors.messages import FinishReason, Generation, Numerics, Usage

if TYPE_CHECKING:
    from transformers import PreTrainedModel

log = logging.getLogger(__name__)

MAX_BATCH = 16


def build(spec: EngineSpec) -> ReferenceEngine:
    """Find a model, load it and start its engine. KV, memory and prefill settings of the spec have no meaning here.

    Raises:
        InputError: what `loader.resolve`, `from_folder` and `ReferenceEngine` raise; or tp is more than 1.
        OutOfMemory: the weights do not fit.
    """
    if spec.tp != 1:
        raise InputError(
            "the reference engine runs on one device", field="tensor_parallel_size", got=spec.tp, wants="1"
        )
    if spec.kv_dtype not in ("auto", spec.dtype):
        raise InputError(
            "the reference engine keeps KV in the model's dtype",
            field="memory.kv_dtype",
            got=spec.kv_dtype,
            wants="auto, or engine: paged",
        )
    found = loader.resolve(spec.model, spec.revision)
    return from_folder(
        found.folder,
        dtype=spec.dtype,
        device=spec.device,
        max_model_len=spec.max_model_len,
        max_batch=spec.max_batch or MAX_BATCH,
        revision=loader.recorded_revision(found.revision, spec.adapter),
        adapter=spec.adapter,
        quantization=spec.quantization,
        numerics=spec.numerics,
        trust_remote_code=spec.trust_remote_code,
        recorder=recorder_of(spec, torch.device(spec.device or ("cuda" if torch.cuda.is_available() else "cpu"))),
    )


def from_folder(
    folder: str | Path,
    *,
    dtype: str = "auto",
    device: str | None = None,
    max_model_len: int | None = None,
    max_batch: int = MAX_BATCH,
    revision: str = "",
    adapter: str | None = None,
    quantization: str | None = None,
    numerics: str = "fast",
    trust_remote_code: bool = False,
    recorder: Recorder | None = None,
) -> ReferenceEngine:
    """Load a model from a folder and start its engine.

    Args:
        folder: as `loader.resolve` gives it.
        device: None takes cuda where there is one, else cpu.
        max_model_len, max_batch, numerics: see `ReferenceEngine`.
        revision: recorded on every row.
        dtype, adapter, quantization, trust_remote_code: see `loader.load_model`.
        recorder: is told when memory runs out.

    Raises:
        InputError: what `loader.load_model` and `ReferenceEngine` raise.
        OutOfMemory: the weights do not fit.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    with loading(str(folder), recorder):
        model = loader.load_model(
            folder, dtype, device, adapter=adapter, quantization=quantization, trust_remote_code=trust_remote_code
        )
    return ReferenceEngine(
        model,
        max_model_len=max_model_len,
        max_batch=max_batch,
        revision=revision,
        numerics=numerics,
        stop_token_ids=loader.stop_token_ids(folder, trust_remote_code=trust_remote_code),
        recorder=recorder,
    )


@dataclass(slots=True, eq=False)
class _Row:
    """A request and what it has drawn so far; all but `ended` belongs to the engine's thread."""

    request: Request
    limit: int  # tokens it may generate, the context's end included
    submitted: float
    future: Future[Generation] = field(default_factory=Future)
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    ended: bool = False
    admitted: float | None = None
    first: float = 0.0
    last: float = 0.0
    gpu_s: float = 0.0
    prefilled: int = 0
    preemptions: int = 0
    batch_max: int = 0

    def succeed(self, reason: FinishReason) -> None:
        prompt, admitted = len(self.request.token_ids), self.admitted or self.submitted
        usage = Usage(
            prompt_tokens=prompt,
            prefilled=self.prefilled,
            generated=len(self.token_ids),
            batch_max=self.batch_max,
            preemptions=self.preemptions,
            queue_s=admitted - self.submitted,
            prefill_s=self.first - admitted,
            decode_s=self.last - self.first,
            gpu_s=self.gpu_s,
        )
        logprobs = tuple(self.logprobs) if self.request.logprobs else ()
        self._settle(Generation(tuple(self.token_ids), reason, usage, logprobs))

    def fail(self, error: EngineError, cause: BaseException | None = None) -> None:
        error.__cause__, error.gpu_s = cause, self.gpu_s
        self._settle(error)

    def _settle(self, outcome: Generation | EngineError) -> None:
        # The future stays pending until now, so that its owner can cancel it at any time.
        try:
            if self.future.set_running_or_notify_cancel():
                if isinstance(outcome, Generation):
                    self.future.set_result(outcome)
                else:
                    self.future.set_exception(outcome)
        except (InvalidStateError, RuntimeError):  # settled before: by an end(), or a cancel that was notified
            pass


class _Batch:
    """One call of `generate`: draws, records and stops each row by its own rules."""

    def __init__(self, engine: ReferenceEngine, rows: list[_Row], device: torch.device):
        self.engine, self.rows, self.device = engine, rows, device
        self.active = [True] * len(rows)
        self.drawn: list[tuple[int, float]] = []
        self.fresh = True
        self.clock = engine.since_s = time.monotonic()
        sampling = [row.request.sampling for row in rows]
        self.seeds_B = torch.tensor([wrap_seed(s.seed) for s in sampling], device=device)
        # None spares the work of a filter that no row uses
        self.temperature_B = self.top_p_B = self.top_k_B = None
        if any(s.temperature > 0 for s in sampling):
            self.temperature_B = torch.tensor([s.temperature for s in sampling], device=device)
            if any(s.top_p < 1 for s in sampling):
                self.top_p_B = torch.tensor([s.top_p for s in sampling], device=device)
            if any(s.top_k for s in sampling):
                self.top_k_B = torch.tensor([s.top_k or engine.vocab_size for s in sampling], device=device)
        self.logprobs = any(row.request.logprobs for row in rows)

    def draw(self, logits_BV: torch.Tensor) -> torch.Tensor:
        """All the mass on each row's chosen token, [B, V]: generate's argmax then takes it."""
        positions = [len(row.request.token_ids) + len(row.token_ids) for row in self.rows]
        ids_B, logprobs_B = choose(
            logits_BV,
            self.seeds_B,
            torch.tensor(positions, device=self.device),
            self.temperature_B,
            self.top_p_B,
            self.top_k_B,
            logprobs=self.logprobs,
        )
        logprobs = [0.0] * len(self.rows) if logprobs_B is None else logprobs_B.tolist()
        self.drawn = list(zip(ids_B.tolist(), logprobs, strict=True))
        return torch.full_like(logits_BV, -torch.inf).scatter_(1, ids_B[:, None], 0.0)

    def record(self) -> list[bool]:
        """Commit the step's tokens; which rows are done, in order."""
        now = time.monotonic()
        share_s, self.clock = (now - self.clock) / max(1, sum(self.active)), now
        self.engine.since_s = now
        self.engine.recorder.ended()
        for index, (row, (token, logprob)) in enumerate(zip(self.rows, self.drawn, strict=True)):
            if not self.active[index]:
                continue
            if self.fresh:
                row.prefilled += len(row.request.token_ids) + len(row.token_ids)
            row.first = row.first or now
            row.last, row.gpu_s = now, row.gpu_s + share_s
            row.batch_max = max(row.batch_max, len(self.rows))
            row.token_ids.append(token)
            row.logprobs.append(logprob)
            self.active[index] = not self.engine.finish(row, token)
        self.fresh = False
        return [not active for active in self.active]


class _Draw(LogitsProcessor):
    def __init__(self, batch: _Batch):
        self.batch = batch

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return self.batch.draw(scores)


class _Done(StoppingCriteria):
    def __init__(self, batch: _Batch):
        self.batch = batch

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return torch.tensor(self.batch.record(), device=input_ids.device)


class ReferenceEngine:
    """One model, one thread, one batch at a time. Offers `protocol.Engine`.

    A batch is what is queued when the one before ends, oldest first, up to `max_batch`; a row that finishes early
    is delivered at once, and its place stays empty until the batch ends. On an out-of-memory the batch is halved
    and its unfinished rows go on from what they have drawn; the size grows again by one a batch. A row that runs
    out of memory alone fails with `OutOfMemory`.

    `end` fails a queued or running request of the sequence with `Cancelled` (a running one at its next token);
    there is nothing else to free.

    Args:
        model: a causal language model in eval mode, on its device. The engine owns it from here on.
        max_model_len: longest context in tokens; None is the model's own.
        max_batch: rows computed together at most.
        revision: recorded on every row.
        numerics: `invariant` runs one row at a time, without padding. Only then, and in float32, does `Numerics`
            say reproducible: left padding moves float32 sums by an ulp or so, which may flip a near-tie, and in
            half precision nothing is promised across kernels.
        stop_token_ids: the model's own, for callers to put into requests; the engine does not add them.
        gather_s: how long an idle engine waits for companions of the first request.

    Raises:
        InputError: max_model_len is more than the model has, or the model names none.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        max_model_len: int | None = None,
        max_batch: int = MAX_BATCH,
        revision: str = "",
        numerics: str = "fast",
        stop_token_ids: frozenset[int] = frozenset(),
        gather_s: float = 0.005,
        recorder: Recorder | None = None,
    ):
        if numerics not in ("fast", "invariant"):
            raise InputError("unknown numerics", field="numerics", got=numerics, wants="fast | invariant")
        config: Any = model.config.get_text_config()
        self.model: Any = model
        self.max_model_len = _context(getattr(config, "max_position_embeddings", None), max_model_len)
        self.vocab_size = int(config.vocab_size)
        self.numerics = _numerics(model, revision, numerics)
        self.stop_token_ids = stop_token_ids
        self.dead: str | None = None  # why the engine cannot go on
        self.since_s: float | None = None  # when the step under way began
        self._max_batch = 1 if numerics == "invariant" else max(1, max_batch)
        self._bound = self._max_batch  # halved by an out-of-memory, grows back
        self._gather_s, self.recorder = gather_s, recorder or NoRecorder()
        self._queue: deque[_Row] = deque()
        self._running: list[_Row] = []
        self._closed: str | None = None  # why
        self._changed = threading.Condition()
        # generate fills what a call leaves open from here: the checkpoint's own sampling must not leak in
        model.generation_config = GenerationConfig()
        self._thread = threading.Thread(target=self._loop, name="berth-reference", daemon=True)
        self._thread.start()

    # --- any thread

    def submit(self, request: Request) -> Future[Generation]:
        """Queue a request; see `protocol.Engine`. The future may fail at once (`ContextOverflow`, `EngineError` for
        an id outside the vocabulary, `EngineDead` after a close)."""
        prompt = len(request.token_ids)
        row = _Row(request, min(request.max_tokens, self.max_model_len - prompt), time.monotonic())
        if prompt == 0 or request.max_tokens < 1:
            row.fail(EngineError("a request needs at least one token, and max_tokens of at least 1"))
        elif prompt >= self.max_model_len:
            row.fail(
                ContextOverflow(f"a prompt of {prompt} tokens leaves no room in a context of {self.max_model_len}")
            )
        elif not 0 <= min(request.token_ids) <= max(request.token_ids) < self.vocab_size:
            row.fail(EngineError(f"a token id lies outside the vocabulary of {self.vocab_size}"))
        else:
            with self._changed:
                closed = self._closed
                if closed is None:
                    self._queue.append(row)
                    self._changed.notify()
            if closed is not None:
                row.fail(EngineDead(closed))
        return row.future

    def end(self, sequence_id: str) -> None:
        """Fail what is queued or running of a sequence with `Cancelled`."""
        with self._changed:
            queued = [row for row in self._queue if row.request.sequence_id == sequence_id]
            for row in queued:
                self._queue.remove(row)
            for row in self._running:
                row.ended = row.ended or row.request.sequence_id == sequence_id
        for row in queued:
            row.fail(Cancelled(f"{sequence_id} was ended"))

    def capacity(self) -> Capacity:
        """Sizes and occupancy now; it holds no pages."""
        with self._changed:
            running = sum(not row.future.done() for row in self._running)
            return Capacity(self.max_model_len, self._max_batch, running=running, waiting=len(self._queue))

    def step_s(self) -> float:
        """Seconds since the batch that is under way drew its last tokens, or began; 0.0 where none is."""
        since_s = self.since_s
        return 0.0 if since_s is None else time.monotonic() - since_s

    def shrink(self, max_batch: int) -> None:
        """At most `max_batch` rows together, from the next batch on; never more than before."""
        with self._changed:
            self._max_batch = max(1, min(self._max_batch, max_batch))
            self._bound = min(self._bound, self._max_batch)

    def close(self) -> None:
        """Fail what is queued and running (at its next token) with `EngineDead`, stop the thread, free the model."""
        self._stop("the engine was closed")
        if threading.current_thread() is not self._thread:
            self._thread.join()
        self.model = None
        _free()

    def _stop(self, why: str) -> None:
        with self._changed:
            self._closed = self._closed or why
            queued = list(self._queue)
            self._queue.clear()
            self._changed.notify()
        for row in queued:
            row.fail(EngineDead(why))

    # --- the engine's thread

    def _loop(self) -> None:
        while rows := self._admit():
            error = self._generate(rows)
            self.since_s = None
            left = [row for row in rows if not row.future.done()]
            if error is None:
                self._bound = min(self._bound + 1, self._max_batch)
                self._fail(left, EngineError, "generate ended early", None)
            elif is_out_of_memory(error):
                recorded = self.recorder.failed("step")
                log.warning("a batch of %d rows ran out of memory: %s%s", len(rows), error, recorded)
                _free()
                self._retry(left, len(rows), error)
            elif "CUDA error" in str(error):
                self.dead = f"the CUDA context is lost: {error}"
                log.error(self.dead)
                self._fail(left, EngineDead, "the CUDA context is lost", error)
                self._stop(self.dead)
            else:
                log.error("a batch failed", exc_info=error)
                self._fail(left, EngineError, "the model failed", error)
            with self._changed:
                self._running = []
            del error, left, rows
        self.recorder.close()

    def _admit(self) -> list[_Row]:
        """Wait for work; empty when closed."""
        with self._changed:
            if not self._queue:
                self._changed.wait_for(lambda: self._queue or self._closed is not None)
                if self._bound > 1:
                    self._changed.wait_for(
                        lambda: len(self._queue) >= self._bound or self._closed is not None, self._gather_s
                    )
            rows: list[_Row] = []
            while not rows and self._closed is None:
                while self._queue and len(rows) < self._bound:
                    row = self._queue.popleft()
                    if row.future.cancelled():
                        row.fail(Cancelled("cancelled"))
                    else:
                        rows.append(row)
                if not rows:  # all of them were cancelled
                    self._changed.wait_for(lambda: self._queue or self._closed is not None)
            self._running = rows
        now = time.monotonic()
        for row in rows:
            row.admitted = row.admitted or now
        return rows

    def _generate(self, rows: list[_Row]) -> Exception | None:
        """Run a batch. Finished rows are delivered; what is not done when it fails is the caller's."""
        contexts = [[*row.request.token_ids, *row.token_ids] for row in rows]
        longest = max(map(len, contexts))
        ids_BT = torch.zeros((len(rows), longest), dtype=torch.int64)
        mask_BT = torch.zeros_like(ids_BT)
        for index, context in enumerate(contexts):
            ids_BT[index, longest - len(context) :] = torch.tensor(context)
            mask_BT[index, longest - len(context) :] = 1
        steps = max(row.limit - len(row.token_ids) for row in rows)
        try:
            device = self.model.device
            batch = _Batch(self, rows, device)
            self.model.generate(
                input_ids=ids_BT.to(device),
                attention_mask=mask_BT.to(device),
                generation_config=GenerationConfig(max_new_tokens=steps, do_sample=False, pad_token_id=0),
                logits_processor=LogitsProcessorList([_Draw(batch)]),
                stopping_criteria=StoppingCriteriaList([_Done(batch)]),
            )
        except Exception as e:
            # the frames hold the batch's tensors: drop them before anyone tries again
            return e.with_traceback(None)
        return None

    def finish(self, row: _Row, token: int) -> bool:
        """Settle a row after a token where it is done, or its owner is gone."""
        request = row.request
        if row.future.cancelled():
            row.fail(Cancelled("cancelled"))
            return True
        if self._closed is not None:
            row.fail(EngineDead(self._closed))
            return True
        if row.ended:
            row.fail(Cancelled(f"{request.sequence_id} was ended"))
            return True
        try:
            matched = request.matcher is not None and request.matcher((token,))
        except Exception as e:  # the caller's code: it must not take its neighbours along
            row.fail(EngineError(f"the matcher failed: {e!r}"), e)
            return True
        if matched or token in request.stop_token_ids:
            row.succeed("stop")
        elif len(row.token_ids) >= row.limit:
            row.succeed("length" if row.limit == request.max_tokens else "context")
        else:
            return False
        return True

    def _retry(self, left: list[_Row], size: int, error: Exception) -> None:
        if size == 1:
            self._fail(left, OutOfMemory, "out of memory alone", error)
            return
        with self._changed:
            self._bound = max(1, size // 2)
            log.warning("out of memory with %d rows: going on with %d", size, self._bound)
            for row in reversed(left):
                row.preemptions += 1
                self._queue.appendleft(row)
            closed = self._closed
        if closed is not None:
            self._stop(closed)

    def _fail(self, rows: list[_Row], kind: type[EngineError], what: str, error: Exception | None) -> None:
        for row in rows:
            tokens = len(row.request.token_ids) + len(row.token_ids)
            row.fail(kind(f"{what}, at {tokens} tokens" + (f": {error}" if error else "")), error)


def _context(model_len: int | None, wanted: int | None) -> int:
    if wanted is None and model_len is None:
        raise InputError("the model names no longest context", field="model.max_model_len", wants="a number of tokens")
    if wanted is not None and (wanted < 2 or (model_len is not None and wanted > model_len)):
        raise InputError(
            "not a context this model has", field="model.max_model_len", got=wanted, wants=f"2 to {model_len}"
        )
    return int(wanted or model_len or 0)


def _numerics(model: PreTrainedModel, revision: str, numerics: str) -> Numerics:
    dtype = str(model.dtype).removeprefix("torch.")
    kernel = str(getattr(model.config, "_attn_implementation", None) or "eager")
    reproducible = numerics == "invariant" and model.dtype == torch.float32
    return Numerics("reference", kernel, dtype, dtype, weights_dtype(model), 1, revision, reproducible)


def _free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()

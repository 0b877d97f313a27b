"""The paged engine: requests in, token ids out, by continuous batching over paged KV.

`scheduler.Scheduler` decides; this is the thread around it: mail in, plan, run, deliver, and what to do when a step
fails. Knows nothing of tensors, models, text, ReAct or Ray.
"""

from __future__ import annotations

import logging
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from itertools import islice
from queue import Empty, SimpleQueue

from actors.engine.oom import RankFailed, device_works, is_out_of_memory
from actors.engine.pages import PageAllocator
from actors.engine.protocol import Capacity, Drawn, MemoryReport, NoRecorder, Recorder, Request, RowStep, Runner
from actors.engine.scheduler import Row, Scheduler, Work
from actors.errors import Cancelled, ContextOverflow, EngineDead, EngineError, OutOfMemory
from actors.messages import FinishReason, Generation, Numerics, Usage

log = logging.getLogger(__name__)

_WAIT_S = 0.25
_EVENTS = (
    "oom_prefill oom_decode errors prefill_halved batch_halved waits graph_drops pool_shrinks culprits preemptions "
    "evictions drafted kept oom_recorded"
)


@dataclass(frozen=True, slots=True)
class _Done:
    """A step that was waited for."""

    drawn: Sequence[tuple[int, float] | None]

    def result(self) -> Sequence[tuple[int, float] | None]:
        return self.drawn


@dataclass(frozen=True, slots=True)
class _Flight:
    """A step under way."""

    work: list[Work]
    drawn: Drawn
    started_s: float


class PagedEngine:
    """Implements `protocol.Engine` on a runner, in its own thread.

    Where the runner launches steps, the next one is under way before the tokens of the one before it are read (see
    `Scheduler.plan_behind`).

    When a step runs out of memory nothing of it was committed, so it is planned again under smaller bounds: first
    caches are dropped, then `max_prefill_tokens` is halved (a prefill step, down to `min_prefill_tokens`), then the
    batch. A row that fails alone waits while somebody else holds the memory; then it gets the graphs dropped, the pool
    cut by a quarter (down to half of its first size in the engine's life, and never so far that a row does not fit),
    and leaves with `OutOfMemory` if it still fails; then the bounds are as before. After `grow_after` good steps halved
    bounds double again, up to the limit. Rows over a halved batch are preempted: they come back to their cached pages.

    A decode step that fails is repeated without guesses first, and nothing is guessed until bounds are as before.

    A step that fails otherwise is halved in the same way until the row that fails alone leaves with `EngineError`. A
    dead CUDA context, or a pool that cannot be allocated again, fails everything with `EngineDead`.

    Args:
        runner: computes; all its calls come from the engine's thread.
        num_pages: KV pages the runner has, the scratch page 0 included.
        page_tokens: tokens a page.
        max_model_len: longest context in tokens, prompt and generation together.
        max_batch: rows that run together.
        max_prefill_tokens: tokens of a prefill step.
        max_decode_tokens: tokens of a decode step, guesses included (see `drafts`); 0: nothing is guessed.
        numerics: what stands on every row.
        kv_bytes_token: KV bytes of one token.
        memory: what was predicted and measured at the start; kept as `memory`.
        events: what happened at the start.
        min_prefill_tokens: `max_prefill_tokens` is not halved below this.
        grow_after: good steps before halved bounds double.
        drop_caches: called after each out-of-memory error, say `torch.cuda.empty_cache`.
        squeezed: whether somebody else holds memory that was free at the start.
        works: whether the device still does, after an error that may mean either (see `oom`).
        patience_s: how long the engine waits for it, since its last good step, before it gives up more than bounds.
        recorder: is told of each out-of-memory error and each step.
        on_close: called at the end of `close`.
        on_dead: called once, in the engine's thread, when the engine has died and its futures have failed.
        clock: seconds.
    """

    def __init__(
        self,
        runner: Runner,
        *,
        num_pages: int,
        page_tokens: int,
        max_model_len: int,
        max_batch: int,
        max_prefill_tokens: int,
        max_decode_tokens: int = 0,
        numerics: Numerics,
        kv_bytes_token: int = 0,
        memory: MemoryReport | None = None,
        events: Mapping[str, int] | None = None,
        min_prefill_tokens: int = 64,
        grow_after: int = 32,
        drop_caches: Callable[[], None] = lambda: None,
        squeezed: Callable[[], bool] = lambda: False,
        works: Callable[[], bool] = device_works,
        patience_s: float = 60.0,
        recorder: Recorder | None = None,
        on_close: Callable[[], None] = lambda: None,
        on_dead: Callable[[BaseException], None] = lambda error: None,
        clock: Callable[[], float] = time.perf_counter,
    ):
        self.numerics = numerics
        self.memory = memory
        self.dead = False
        self.scheduler = Scheduler(
            PageAllocator(num_pages, page_tokens),
            policy=numerics.kv_dtype,
            max_batch=max_batch,
            max_prefill_tokens=max_prefill_tokens,
            max_decode_tokens=max_decode_tokens,
            max_model_len=max_model_len,
        )
        self._runner: Runner | None = runner
        self._kv_bytes_page = kv_bytes_token * page_tokens
        self._kv_bytes_token = kv_bytes_token
        self._first_pages, self._page_tokens = num_pages, page_tokens
        self._limits = (max_prefill_tokens, max_batch, max_decode_tokens)
        self._min_prefill_tokens = min(min_prefill_tokens, max_prefill_tokens)
        self._grow_after = grow_after
        self._drop_caches, self._on_dead, self._clock = drop_caches, on_dead, clock
        self._on_close, self._works, self._recorder = on_close, works, recorder or NoRecorder()
        self._squeezed, self._patience_s, self._waited_s = squeezed, patience_s, 0.0
        self._events: dict[str, int] = dict.fromkeys(_EVENTS.split(), 0) | dict(events or {})
        self._evictions_before = 0  # in pools that were replaced
        self._good_steps = 0
        self._failing = False  # the last step failed
        self._since_s: float | None = None  # when the step under way began
        self._finished_s = 0.0  # when the last one had ended
        self._hold = 0  # steps until one may be launched ahead again
        self._mail: SimpleQueue[Row | str | None] = SimpleQueue()  # a row: queue it, or drop it if cancelled
        self._closed = False
        self._lock = threading.Lock()  # between `_closed` and the mail
        self._thread = threading.Thread(target=self._run, name="berth-engine", daemon=True)
        self._thread.start()

    @property
    def events(self) -> dict[str, int]:
        """How often what happened, since the start."""
        evictions = self._evictions_before + self.scheduler.pages.stats.evictions
        return self._events | {"preemptions": self.scheduler.preemptions, "evictions": evictions}

    def submit(self, request: Request) -> Future[Generation]:
        """Queue a request.

        The future fails with ContextOverflow (the prompt leaves no room under `max_model_len`), OutOfMemory (prompt and
        `max_tokens` exceed the whole pool, or a step fails with this row alone), Cancelled, EngineDead, or EngineError
        (a malformed request, a matcher that raises, a step that fails otherwise with this row alone). A second request
        of a sequence waits for the first.
        """
        row = Row(request, Future(), self._clock(), list(request.token_ids))
        error = self._refusal(request)
        if error is None:
            with self._lock:
                if self._closed:
                    error = EngineDead("the engine is closed" if not self.dead else "the engine is dead")
                else:
                    self._mail.put(row)
        if error is not None:
            row.fail(error)
        else:
            # A row holds its future: held by it in turn, only the garbage collector could free them.
            row.future.add_done_callback(partial(self._cancelled, weakref.ref(row)))
        return row.future

    def _cancelled(self, ref: weakref.ref[Row], future: Future[Generation]) -> None:
        if future.cancelled() and (row := ref()) is not None:
            self._mail.put(row)

    def end(self, sequence_id: str) -> None:
        """See `protocol.Engine.end`; takes effect before the next step."""
        self._mail.put(sequence_id)

    def capacity(self) -> Capacity:
        """See `protocol.Engine.capacity`. Read while the engine runs: each number is right, their sum may be off."""
        scheduler, stats = self.scheduler, self.scheduler.pages.stats
        return Capacity(
            max_model_len=scheduler.max_model_len,
            max_batch=scheduler.max_batch,
            kv_bytes_token=self._kv_bytes_token,
            pages_total=stats.total,
            pages_free=stats.free,
            pages_cached=stats.cached,
            page_tokens=self._page_tokens,
            running=len(scheduler.running),
            waiting=len(scheduler.waiting) + self._mail.qsize(),
        )

    def step_s(self) -> float:
        """See `protocol.Engine.step_s`."""
        since_s = self._since_s
        return 0.0 if since_s is None else self._clock() - since_s

    def shrink(self, max_batch: int) -> None:
        """See `protocol.Engine.shrink`; never widens what the engine was made with."""
        prefill, batch, decode = self._limits
        self._limits = (prefill, max(1, min(batch, max_batch)), decode)
        self.scheduler.max_batch = min(self.scheduler.max_batch, self._limits[1])

    def close(self) -> None:
        """Fail what is queued or runs with EngineDead, stop the thread, let go of the runner. Can be repeated."""
        with self._lock:
            self._closed = True
            self._mail.put(None)
        if threading.current_thread() is not self._thread:
            self._thread.join()
        self._runner = None
        self._on_close()

    def _refusal(self, request: Request) -> EngineError | None:
        length, limit = len(request.token_ids), self.scheduler.max_model_len
        if not length or request.max_tokens < 1:
            return EngineError(f"wants a token and max_tokens ≥ 1, got {length} and {request.max_tokens}")
        if length >= limit:
            return ContextOverflow(f"{length} tokens leave no room for an answer: the model's limit is {limit}")
        return self._outgrown(request)

    def _outgrown(self, request: Request) -> OutOfMemory | None:
        needed, pool = self.scheduler.tokens_needed(request), self.scheduler.pages.capacity_tokens
        if needed <= pool:
            return None
        whole = pool == (self._first_pages - 1) * self._page_tokens
        text = f"may need KV of {needed:,} tokens, the {'whole pool holds' if whole else 'pool was cut to'} {pool:,}"
        kv_bytes = self._kv_bytes_token
        return OutOfMemory(text, "never_fits", needed * kv_bytes or None, pool * kv_bytes if kv_bytes else None)

    def _run(self) -> None:
        error: BaseException = EngineDead("the engine was closed")
        try:
            flight: _Flight | None = None
            while self._read_mail(wait=flight is None):
                self._since_s = self._clock()
                flight = flight or self._begin(self.scheduler.plan())
                if flight is not None:
                    behind = self._begin_behind(flight)
                    flight = behind if self._finish(flight) else None
                self._since_s = None
        except BaseException as e:
            log.critical("the engine is dead: %s", e, exc_info=not isinstance(e, EngineDead))
            error, self.dead = e, True
        with self._lock:
            self._closed = True
        rows = [*self.scheduler.running, *self.scheduler.waiting]
        while True:
            try:
                mail = self._mail.get_nowait()
            except Empty:
                break
            if isinstance(mail, Row):
                rows.append(mail)
        text = str(error) if isinstance(error, EngineDead) else f"{type(error).__name__}: {error}"
        for row in rows:
            row.fail(EngineDead(text))
        if self.dead:
            self._on_dead(error)
        self._recorder.close()

    def _read_mail(self, wait: bool) -> bool:
        """Take in what came; waits where nothing is to be done. False: close."""
        idle = wait and not (self.scheduler.running or self.scheduler.waiting)
        while True:
            try:
                mail = self._mail.get(block=idle)
            except Empty:
                return True
            idle = False
            if mail is None:
                return False
            if isinstance(mail, str):
                for row in self.scheduler.end(mail):
                    row.fail(Cancelled(f"sequence {mail!r} was ended"))
            elif mail.future.cancelled():
                self.scheduler.remove(mail)
                mail.claim()
            elif error := self._outgrown(mail.request):
                mail.fail(error)
            else:
                self.scheduler.add(mail)

    def _begin(self, work: list[Work]) -> _Flight | None:
        """Start a step, and wait for it unless it can be launched; None where there is none or it failed."""
        runner = self._runner
        if not work:
            return None
        assert runner is not None  # `close` lets go of it when the thread has ended
        started_s = self._clock()
        self._admitted(work, started_s)
        failure: Exception | None = None
        try:
            self._copy_pages(runner)
            rows = self._row_steps(work)
            drawn = runner.launch(rows) or _Done(runner.step(rows))
        except Exception as e:
            # The traceback's frames hold the step's tensors: without it, and outside `except`, they are freed.
            failure, drawn = e.with_traceback(None), _Done(())
        if failure is not None:
            self._recover(work, failure)
            return None
        return _Flight(work, drawn, started_s)

    def _begin_behind(self, flight: _Flight) -> _Flight | None:
        """Launch the step behind one under way, so that the device does not wait for the host to read its tokens."""
        if isinstance(flight.drawn, _Done) or self._closed:
            return None
        if self._hold:
            self._hold -= 1
            return None
        runner, work = self._runner, self.scheduler.plan_behind(flight.work)
        assert runner is not None
        if not work:
            return None
        now_s = self._clock()
        self._admitted(work, now_s)
        at = {part.row: index for index, part in enumerate(flight.work)}
        # The last token of a row is what the step under way draws, unless it stands there already.
        sources = [at[part.row] if part.start == len(part.row.tokens) else None for part in work]
        failure: Exception | None = None
        try:
            self._copy_pages(runner)
            drawn = runner.launch(self._row_steps(work), flight.drawn, sources)
        except Exception as e:  # it is planned again when the one before has ended
            failure, drawn = e.with_traceback(None), None
        if failure is not None:
            self._hold = self._grow_after
            oom = is_out_of_memory(failure, self._works)
            recorded = self._record(work) if oom else ""
            log.warning("a step could not be launched ahead: %s: %s%s", type(failure).__name__, failure, recorded)
            self._events[_event(work, oom)] += 1
            if oom:
                self._drop_caches()
        return None if drawn is None else _Flight(work, drawn, now_s)

    def _admitted(self, work: list[Work], now_s: float) -> None:
        for part in work:
            if part.row.admitted_s is None:
                part.row.admitted_s = now_s

    def _copy_pages(self, runner: Runner) -> None:
        """What admitted rows start with."""
        scheduler = self.scheduler
        while scheduler.copies:
            copies = scheduler.next_copies()
            runner.copy_pages(copies)
            del scheduler.copies[: len(copies)]

    def _finish(self, flight: _Flight) -> bool:
        """Wait for a step, deliver what it drew; False where it failed, and with it what was launched behind it."""
        failure: Exception | None = None
        try:
            drawn = flight.drawn.result()
        except Exception as e:
            failure, drawn = e.with_traceback(None), ()
        # Of rows that the step before this one ended, or that were cancelled meanwhile, nothing is kept.
        running = set(self.scheduler.running)
        live = [part for part in flight.work if part.row in running]
        if failure is not None:
            self._recover(live, failure)
            return False
        now_s = self._clock()
        started_s, self._finished_s = max(flight.started_s, self._finished_s), now_s
        token_s = (now_s - started_s) / max(1, sum(part.tokens for part in live))
        results, rows = iter(drawn), len(flight.work)
        self.scheduler.commit(live)
        for part in flight.work:
            row, result = part.row, next(results)
            further = list(islice(results, len(part.drafts))) if part.drafts else ()
            if row not in running:
                continue
            tokens = part.tokens
            row.gpu_s += token_s * tokens
            row.batch_max = max(row.batch_max, rows)
            if tokens > 1 or not row.peak_pages or (row.done - 1) % self._page_tokens == 0:  # has new pages
                row.peak_pages = max(row.peak_pages, self.scheduler.pages.share(row.sequence_id))
            if result is not None and self._deliver(row, *result, now_s) and further:
                self._keep(part, further, now_s)
        self._failing = False
        self._waited_s = 0.0
        self._recorder.ended()
        self._grow()
        return True

    def _row_steps(self, work: list[Work]) -> list[RowStep]:
        rows: list[RowStep] = []
        for part in work:
            row, request, end = part.row, part.row.request, part.start + part.count
            ids = row.tokens[part.start : end] or [0]  # not known yet
            rows.append(RowStep(ids, part.start, row.pages, part.sample, request.sampling, request.logprobs))
            for at, token in enumerate(part.drafts, end):
                rows.append(RowStep([token], at, row.pages, True, request.sampling, request.logprobs))
        return rows

    def _keep(self, part: Work, further: Iterable[tuple[int, float] | None], now_s: float) -> None:
        """Guesses that are what was drawn have their KV already; what was drawn behind each of them counts as well."""
        row, kept, goes_on = part.row, 0, True
        for guess, result in zip(part.drafts, further, strict=True):
            if not goes_on or guess != row.tokens[-1] or result is None:
                break
            kept += 1
            self.scheduler.commit([Work(row, row.done, 1, True)])
            goes_on = self._deliver(row, *result, now_s)
        self._events["drafted"] += len(part.drafts)
        self._events["kept"] += kept
        if goes_on:
            row.lookup.judge(len(part.drafts), kept)

    def _deliver(self, row: Row, token: int, logprob: float, now_s: float) -> bool:
        """Take in a drawn token; whether the row goes on."""
        request = row.request
        row.tokens.append(token)
        if request.logprobs:
            row.logprobs.append(logprob)
        if row.first_s is None:
            row.first_s, row.prefill_gpu_s = now_s, row.gpu_s
        try:
            matched = request.matcher is not None and request.matcher((token,))
        except Exception as e:
            self.scheduler.remove(row)
            row.fail(EngineError(f"the matcher failed: {type(e).__name__}: {e}"), e)
            return False
        reason: FinishReason
        if matched or token in request.stop_token_ids:
            reason = "stop"
        elif len(row.tokens) < row.limit:
            return True
        else:
            reason = "length" if row.generated >= request.max_tokens else "context"
        self.scheduler.remove(row)
        answer = Generation(
            tuple(row.tokens[len(request.token_ids) :]), reason, self._usage(row, now_s), tuple(row.logprobs)
        )
        if row.claim():
            row.future.set_result(answer)
        return False

    def _usage(self, row: Row, now_s: float) -> Usage:
        admitted_s, first_s = row.admitted_s or now_s, row.first_s or now_s
        return Usage(
            prompt_tokens=len(row.request.token_ids),
            prefilled=row.prefilled,
            reused=row.reused or 0,
            generated=row.generated,
            kv_bytes_peak=round(row.peak_pages * self._kv_bytes_page),
            batch_max=row.batch_max,
            preemptions=row.preemptions,
            queue_s=admitted_s - row.submitted_s,
            prefill_s=first_s - admitted_s,
            decode_s=now_s - first_s,
            gpu_s=row.gpu_s,
            prefill_gpu_s=row.prefill_gpu_s,
        )

    def _grow(self) -> None:
        scheduler = self.scheduler
        scheduler.max_batch = min(scheduler.max_batch, self._limits[1])
        bounds = (scheduler.max_prefill_tokens, scheduler.max_batch, scheduler.max_decode_tokens)
        self._good_steps = 0 if bounds == self._limits else self._good_steps + 1
        if self._good_steps >= self._grow_after:
            self._good_steps = 0
            scheduler.max_prefill_tokens = min(self._limits[0], 2 * bounds[0])
            scheduler.max_batch = min(self._limits[1], 2 * bounds[1])
            if bounds[:2] == self._limits[:2]:
                scheduler.max_decode_tokens = self._limits[2]

    def _recover(self, work: list[Work], error: Exception) -> None:
        """A step failed: change one thing, so that the next plan is easier; or let its only row go."""
        oom, scheduler, runner = is_out_of_memory(error, self._works), self.scheduler, self._runner
        if not oom and _is_fatal(error, self._works):
            raise EngineDead(f"{type(error).__name__}: {error}") from error
        if not work:
            return
        assert runner is not None
        row, rows, tokens = work[0].row, len(work), sum(part.tokens for part in work)
        prefill = any(part.prefill for part in work)
        self._good_steps = 0
        self._events[_event(work, oom)] += 1
        said = f"{type(error).__name__}: {str(error).partition('. ')[0]}"
        self._recorder.ended()
        recorded = self._record(work) if oom else ""
        log.warning("a step of %d rows and %d tokens failed: %s%s", rows, tokens, said, recorded)
        if oom:
            self._drop_caches()
        if tokens > rows and not prefill:
            scheduler.max_decode_tokens = 0
            return
        if oom and not self._failing:
            self._failing = True
            return
        if oom and prefill and tokens > self._min_prefill_tokens:
            scheduler.max_prefill_tokens = max(self._min_prefill_tokens, tokens // 2)
            self._events["prefill_halved"] += 1
        elif rows > 1:
            scheduler.max_batch = rows // 2
            self._events["batch_halved"] += 1
        elif oom and self._waited_s < self._patience_s and self._squeezed():
            self._waited_s += _WAIT_S
            self._events["waits"] += 1
            time.sleep(_WAIT_S)
        elif oom and "graphs" not in row.relieved:
            row.relieved.add("graphs")
            runner.drop_graphs()
            self._events["graph_drops"] += 1
        elif not (oom and self._cut_pool(runner, row)):
            self._expel(row, error, oom)

    def _record(self, work: list[Work]) -> str:
        """Before anything is done about it: where this out of memory is recorded, as the end of a log line."""
        recorded = self._recorder.failed("prefill" if any(part.prefill for part in work) else "decode")
        self._events["oom_recorded"] += bool(recorded)
        return recorded

    def _expel(self, row: Row, error: Exception, oom: bool) -> None:
        self._events["culprits"] += 1
        self._failing = False
        self.scheduler.max_prefill_tokens, self.scheduler.max_batch, self.scheduler.max_decode_tokens = self._limits
        self.scheduler.remove(row)
        text = f"failed alone at the smallest bound: {type(error).__name__}: {error}"
        stage = "prefill" if row.left > 1 else "decode"
        row.fail(OutOfMemory(text, stage) if oom else EngineError(text), error)

    def _cut_pool(self, runner: Runner, row: Row) -> bool:
        """Reallocate the pool smaller, once for `row`; False where that was done or some row would not fit any more."""
        pages, rows = self.scheduler.pages, (*self.scheduler.running, *self.scheduler.waiting)
        needed = -(-max(self.scheduler.tokens_needed(row.request) for row in rows) // self._page_tokens) + 1
        num_pages = max(pages.num_pages * 3 // 4, self._first_pages // 2, needed, 2)
        if "pool" in row.relieved or num_pages >= pages.num_pages:
            return False
        row.relieved.add("pool")
        self._events["pool_shrinks"] += 1
        self._evictions_before += pages.stats.evictions
        while True:
            failure: Exception | None = None
            try:
                runner.resize(num_pages)
            except Exception as e:
                failure = e.with_traceback(None)
            if failure is None:
                break
            if not is_out_of_memory(failure, self._works) or num_pages <= needed:
                raise EngineDead(f"the KV pool could not be allocated again: {failure}") from failure
            self._drop_caches()
            num_pages = max(num_pages * 3 // 4, needed)
        log.warning("the KV pool was cut from %d pages to %d", pages.num_pages, num_pages)
        self.scheduler.replace_pool(PageAllocator(num_pages, self._page_tokens))
        return True


def _event(work: list[Work], oom: bool) -> str:
    if not oom:
        return "errors"
    return "oom_prefill" if any(part.prefill for part in work) else "oom_decode"


def _is_fatal(error: Exception, works: Callable[[], bool]) -> bool:
    """The CUDA context is gone: every later call would fail too. Triton and the driver have their own words for it."""
    said = str(error)
    told = "CUDA error" in said or "NCCL error" in said
    elsewhere = isinstance(error, RankFailed)  # its context is not this one
    return told or isinstance(error, EngineDead) or ("CUDA" in said and (elsewhere or not works()))

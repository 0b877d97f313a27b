"""Which rows run, what they compute next, and in which pages: decisions only, no thread, no clock, no device.

Rows join and leave between steps (iteration-level scheduling: Orca, Yu et al. 2022, §3.1); prompts are computed in
chunks (Sarathi, Agrawal et al. 2023) and, unlike there, in steps that alternate with decode steps, so that a decode
step keeps one shape and can be replayed as a CUDA graph. Preemption recomputes (PagedAttention, Kwon et al. 2023,
§4.5), mostly from pages that are still cached.

Knows nothing of tensors, models, text, ReAct or Ray.
"""

from __future__ import annotations

from bisect import insort_left, insort_right
from collections.abc import Hashable, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from itertools import count

from actors.engine.drafts import Lookup
from actors.engine.pages import PageAllocator
from actors.engine.protocol import Request
from actors.errors import EngineError
from actors.messages import Generation

TOGETHER, MOST_HELD = 16, 8
"""Rows are let in once they are a sixteenth of those that run, or after 8 plans. With F the fixed time of a prefill
step, D that of a decode step and T tokens a turn, √(2FT/D) plans between two prefill steps lose least: 7 where F = D/2
and T = 50; twice or half as many lose a quarter more."""

MOST_COPIES = 16
"""Pages that are copied together: of one layer they take some MiB on their way."""


@dataclass(eq=False, slots=True, weakref_slot=True)
class Row:
    """A request on its way. `tokens` is the context so far, generated tokens included; `done` of them have KV."""

    request: Request
    future: Future[Generation]
    submitted_s: float
    tokens: list[int]
    age: int = 0  # of its sequence: smaller is older
    limit: int = 0  # its context ends there: at `max_tokens`, or with the model
    pages: list[int] = field(default_factory=list)  # its table, while it runs
    done: int = 0
    recorded: int = 0  # of these, what the allocator knows of
    computed: int = 0  # the most that `done` ever was
    prefilled: int = 0
    reused: int | None = None
    peak_pages: float = 0.0
    batch_max: int = 0
    preemptions: int = 0
    gpu_s: float = 0.0
    prefill_gpu_s: float = 0.0
    admitted_s: float | None = None
    first_s: float | None = None
    logprobs: list[float] = field(default_factory=list)
    lookup: Lookup = field(default_factory=Lookup)
    relieved: set[str] = field(default_factory=set)  # what was given up for its sake, once each
    over: bool = False

    @property
    def sequence_id(self) -> str:
        """The trajectory."""
        return self.request.sequence_id

    @property
    def left(self) -> int:
        """Tokens to compute before the next one can be drawn, ≥ 1."""
        return len(self.tokens) - self.done

    @property
    def generated(self) -> int:
        """Tokens drawn so far."""
        return len(self.tokens) - len(self.request.token_ids)

    def claim(self) -> bool:
        """The right to set the future, once; False where it was cancelled (whoever waits is told)."""
        first, self.over = not self.over, True
        return first and self.future.set_running_or_notify_cancel()

    def fail(self, error: EngineError, cause: BaseException | None = None) -> None:
        """The row leaves with an error."""
        error.__cause__, error.gpu_s = cause, self.gpu_s
        if self.claim():
            self.future.set_exception(error)


@dataclass(slots=True)  # not frozen, which would make each of some hundred a step four times as dear
class Work:
    """One row's part of a step. Not to be changed.

    Attributes:
        start: position of the first token to compute.
        count: tokens of the context to compute; where the step is planned behind another, the one that this draws is
            not known yet.
        sample: the row's context is complete after them: a token is drawn.
        drafts: guesses of those behind them (see `drafts`).
    """

    row: Row
    start: int
    count: int
    sample: bool
    drafts: tuple[int, ...] = ()

    @property
    def tokens(self) -> int:
        """Tokens that the step computes for the row, guesses included."""
        return self.count + len(self.drafts)

    @property
    def prefill(self) -> bool:
        """More than the last token of the row's context is missing before it."""
        return self.count > 1 or not self.sample


def _rest(row: Row) -> Work:
    """All that a row lacks before its next token."""
    return Work(row, row.done, row.left, True)


class Scheduler:
    """Who runs, what they compute next, and in which pages. Decisions only; the same calls decide the same.

    Age is that of the sequence: the follow-up of an old trajectory goes before the first call of a new one, so that
    what is cached is used before it is evicted. The oldest running row always advances: where pages are short the
    youngest is preempted, and any row that `check` lets in fits alone.

    Args:
        pages: the page allocator.
        policy: KV policy of all its pages.
        max_batch: rows that run together, in whatever phase.
        max_prefill_tokens: tokens of a prefill step.
        max_decode_tokens: tokens of a decode step, guesses included; not above `max_batch`: nothing is guessed.
        max_model_len: longest context in tokens.
    """

    def __init__(
        self,
        pages: PageAllocator,
        *,
        max_batch: int,
        max_prefill_tokens: int,
        max_model_len: int,
        max_decode_tokens: int = 0,
        policy: Hashable = None,
    ):
        self.pages, self.policy = pages, policy
        self.max_batch, self.max_prefill_tokens = max_batch, max_prefill_tokens
        self.max_decode_tokens = max_decode_tokens
        self.max_model_len = max_model_len
        self.running: list[Row] = []  # oldest first, as is `waiting`
        self.waiting: list[Row] = []
        self.copies: list[tuple[int, int, int]] = []  # to be done in order before the next step writes
        self.preemptions = 0
        self._refused = False  # pages were short for whoever waits, and nobody has left since
        self._ages: dict[str, int] = {}
        self._next_age = count()
        self._prefilled_last = False
        self._held = 0  # plans since rows that could be let in were made to wait for others

    def tokens_needed(self, request: Request) -> int:
        """Most tokens of KV that a request can come to need; its last token's KV is never written."""
        return min(len(request.token_ids) + request.max_tokens, self.max_model_len) - 1

    def add(self, row: Row) -> None:
        """Queue a row."""
        row.age = self._ages.setdefault(row.sequence_id, next(self._next_age))
        row.limit = min(len(row.request.token_ids) + row.request.max_tokens, self.max_model_len)
        insort_right(self.waiting, row, key=lambda row: row.age)
        self._refused = False

    def remove(self, row: Row) -> None:
        """A row is over: what it has written stays cached for its sequence. Unknown rows are ignored."""
        self._refused = False
        if row in self.running:
            self.running.remove(row)
            self._pause(row)
        elif row in self.waiting:
            self.waiting.remove(row)

    def end(self, sequence_id: str) -> list[Row]:
        """Forget a sequence; returns the rows of it that were queued or running."""
        rows = [row for row in (*self.running, *self.waiting) if row.sequence_id == sequence_id]
        for row in rows:
            self.remove(row)
        self.pages.end(sequence_id)
        self._refused = False
        self._ages.pop(sequence_id, None)
        return rows

    def plan(self) -> list[Work]:
        """The next step. Asked again without a `commit` between (the step failed), it plans under today's bounds."""
        preemptions = self.preemptions
        while len(self.running) > self.max_batch:
            self._preempt(self.running[-1])
        ready = 0
        while ready < len(self.running):
            row = self.running[ready]
            if row.left > 1 or self._extend(row, row.done + 1):
                ready += 1
            else:
                self._preempt(self.running[-1])
        todo = [_rest(row) for row in self.running]
        if preemptions == self.preemptions:
            todo = self._admit(todo)
        return self._next(todo, self._prefilled_last)

    def plan_behind(self, under_way: Sequence[Work]) -> list[Work]:
        """The step behind one under way, planned before anybody knows what that draws.

        Rows that it completes whatever they draw are left out. Those that it turns out to have ended are computed in
        vain.

        Returns:
            nothing where it is to be waited for: a row would have to be preempted, or tokens are guessed.
        """
        if self.max_decode_tokens or len(self.running) > self.max_batch:
            return []
        before = {part.row: part for part in under_way}
        todo: list[Work] = []
        for row in self.running:
            part = before.get(row)
            if part is None:
                todo.append(_rest(row))
            elif not part.sample:
                todo.append(Work(row, row.done + part.count, row.left - part.count, True))
            elif len(row.tokens) + 1 < row.limit:
                todo.append(Work(row, len(row.tokens), 1, True))
        for part in todo:
            if not part.prefill and not self._extend(part.row, part.start + 1):
                return []
        if not self._refused:
            todo = self._admit(todo)
        return self._next(todo, any(part.prefill for part in under_way))

    def _next(self, todo: Sequence[Work], prefilled_last: bool) -> list[Work]:
        """Of what rows lack before their next token, oldest first: the decode step, or the prefill step."""
        prefill = [part for part in todo if part.prefill]
        decode = [part for part in todo if not part.prefill]
        if decode and (prefilled_last or not prefill):
            return self._guess(decode)
        work: list[Work] = []
        budget = self.max_prefill_tokens
        for part in prefill:
            if budget:
                count = min(part.count, budget)
                work.append(replace(part, count=count, sample=count == part.count))
                budget -= count
        return work

    def _guess(self, decode: list[Work]) -> list[Work]:
        """A decode step with guesses as far as it has room for them."""
        room = self.max_decode_tokens - len(decode)
        if room <= 0:
            return decode
        work: list[Work] = []
        for i, part in enumerate(decode):
            row = part.row
            most = min(room // (len(decode) - i), row.limit - len(row.tokens) - 1)
            drafts = row.lookup.draft(row.tokens, most) if most > 0 else []
            if drafts and not self._extend(row, row.done + 1 + len(drafts)):
                drafts = []
            room -= len(drafts)
            work.append(replace(part, drafts=tuple(drafts)))
        return work

    def next_copies(self) -> list[tuple[int, int, int]]:
        """The first of `copies`, as many as can be done (and repeated) together: none writes what was read before."""
        read: set[int] = set()
        for at, (src, dst, _) in enumerate(self.copies[:MOST_COPIES]):
            if dst in read:
                return self.copies[:at]
            read.add(src)
        return self.copies[:MOST_COPIES]

    def commit(self, work: Iterable[Work]) -> None:
        """The step's KV is written. Call it before drawn tokens are appended to the rows."""
        for part in work:
            row, end = part.row, part.start + part.count
            self._prefilled_last = prefill = part.prefill
            known = max(len(row.request.token_ids), row.computed)
            if row.done < known:  # prompt tokens, and generated ones that are computed again
                row.prefilled += min(end, known) - row.done
            row.done, row.computed = end, max(end, row.computed)
            if prefill or not end % self.pages.page_tokens:
                self._record(row)

    def _record(self, row: Row) -> None:
        """Tell the allocator what of the row has KV; of generated tokens it need not know before a page is full."""
        if row.done > row.recorded:
            self.pages.commit(row.sequence_id, row.tokens[row.recorded : row.done])
            row.recorded = row.done

    def _extend(self, row: Row, length: int) -> bool:
        """Room for so many tokens of the row; False where pages are short."""
        room = len(row.pages) * self.pages.page_tokens
        return length <= room or self.pages.extend(row.sequence_id, length)

    def _pause(self, row: Row) -> None:
        self._record(row)
        self.pages.pause(row.sequence_id)
        row.pages = []

    def replace_pool(self, pages: PageAllocator) -> None:
        """All KV is lost: every running row is preempted and starts again in the new pool."""
        while self.running:
            self._preempt(self.running[-1])
        self.pages = pages
        self.copies.clear()

    def _preempt(self, row: Row) -> None:
        self._refused = False
        self.running.remove(row)
        self._pause(row)
        self.preemptions += 1
        row.preemptions += 1
        insort_left(self.waiting, row, key=lambda row: row.age)

    def _admit(self, todo: list[Work]) -> list[Work]:
        """Let waiting rows in, oldest first; none overtakes one that is short of pages.

        A row whose next page is just being computed by another is passed over for now, so that a burst of rows with
        one few-shot prompt computes it once. Looking no further than the free slots bounds the host time.

        Each prefill step holds up all rows that decode, however few it computes, and of many rows some end with each
        step: those that wait are let in together (see `TOGETHER`), after a few plans, or with a prefill step that is
        due anyhow. How many have pages is guessed by the first of them, without what it will find cached.

        Args:
            todo: what those lack that run, oldest first.

        Returns:
            the same with what those lack that were let in.
        """
        slots = self.max_batch - len(self.running)
        if slots <= 0 or not self.waiting:
            return todo
        fitting = self.pages.available * self.pages.page_tokens // len(self.waiting[0].tokens)
        ready = min(slots, len(self.waiting), fitting)
        few = ready < len(self.running) // TOGETHER
        if few and self._held < MOST_HELD and not any(part.prefill for part in todo):
            self._held += 1
            return todo
        active, admitted = {row.sequence_id for row in self.running}, list[Row]()
        for row in self.waiting[:slots]:
            if row.sequence_id in active or self.pages.promised(row.tokens, self.policy):
                continue
            # Room to grow for those that run, or the newcomer would soon be preempted again.
            leave = min(len(self.running), self.pages.num_pages // 64)
            admission = self.pages.admit(row.sequence_id, row.tokens, self.policy, leave=leave)
            if admission is None:
                self._refused = True
                break
            self.waiting.remove(row)
            insort_right(self.running, row, key=lambda row: row.age)
            active.add(row.sequence_id)
            admitted.append(row)
            row.pages = self.pages.table(row.sequence_id)
            row.done = row.recorded = admission.reused_tokens
            row.reused = row.done if row.reused is None else row.reused
            self.copies += admission.copies
        if not admitted:
            return todo
        self._held = 0
        return sorted([*todo, *map(_rest, admitted)], key=lambda part: part.row.age)

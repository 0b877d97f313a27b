"""The paged engine on a scripted runner, whose tokens are a function of what its pages hold: a wrong page table, a page
written by two, or a lost token gives other tokens than `expected`, which knows of no pages."""

import asyncio
import gc
import itertools
import pickle
import random
import threading
import time
import weakref
import zlib
from array import array
from concurrent.futures import CancelledError, Future, wait
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import SimpleNamespace

import pytest

from actors.engine.paged import PagedEngine
from actors.engine.pages import PageAllocator
from actors.engine.protocol import Request
from actors.engine.scheduler import MOST_HELD, Row, Scheduler
from actors.errors import Cancelled, ContextOverflow, EngineDead, EngineError, OutOfMemory
from actors.messages import Numerics, Sampling, Stage, Turn
from actors.stopping import speak
from bench.common import made_up_tokenizer

NUMERICS = Numerics("paged", "scripted", "float32", "float32", "float32", 1, "none", True)
VOCABULARY = 50
TIMEOUT_S = 20
PARROT = 500


class FakeOOM(MemoryError):
    """Stands for torch.OutOfMemoryError."""


def draw(context, seed):
    if seed >= PARROT and len(context) > 9 and len(context) % 11:  # says again what it said 9 tokens ago, mostly
        return context[-9]
    return zlib.crc32(array("i", [*context, seed])) % VOCABULARY


def expected(token_ids, max_tokens, seed=0, stop=frozenset()):
    tokens = list(token_ids)
    while len(tokens) < len(token_ids) + max_tokens:
        tokens.append(draw(tokens, seed))
        if tokens[-1] in stop:
            break
    return tuple(tokens[len(token_ids) :])


@dataclass
class Launched:
    drawn: list
    error: Exception | None = None

    def result(self):
        if self.error is not None:
            raise self.error
        return self.drawn


class Scripted:
    """Stores token ids in pages. `fail` is called with the rows of each step and may return an exception."""

    def __init__(self, num_pages, page_tokens, fail=lambda rows: None, launches=False):
        self.size, self.fail, self.launches, self.behind = page_tokens, fail, launches, 0
        self.prefills_behind = 0
        self.graphs, self.resizes, self.steps = True, [], []
        self.gate = threading.Event()
        self.gate.set()
        self.allocate(num_pages)

    def allocate(self, num_pages):
        self.store = [[-1] * self.size for _ in range(num_pages)]

    def step(self, rows):
        assert self.gate.wait(TIMEOUT_S)
        self.steps.append([len(row.token_ids) for row in rows])
        tables = [list(row.pages) for row in rows]
        for i, row in enumerate(rows):
            others = {page for table in tables if table != tables[i] for page in table}
            for position, token in enumerate(row.token_ids, row.start):
                page = row.pages[position // self.size]
                assert page != 0
                assert page not in others, "written while shared"
                self.store[page][position % self.size] = token
        error = self.fail(rows)
        if error is not None:
            for row in rows:  # garbage in its slots
                for position in range(row.start, row.start + len(row.token_ids)):
                    self.store[row.pages[position // self.size]][position % self.size] = -2
            raise error
        results = []
        for row in rows:
            length = row.start + len(row.token_ids)
            context = [token for page in row.pages for token in self.store[page]][:length]
            token = draw(context, row.sampling.seed)
            results.append((token, -token / 100) if row.sample else None)
        return results

    def launch(self, rows, after=None, sources=()):
        """Computes at once what a device would compute later, on tokens that the engine has not seen."""
        if not self.launches:
            return None
        if after is not None:
            self.behind += 1
            self.prefills_behind += any(not row.sample or len(row.token_ids) > 1 for row in rows)
            rows = [
                row if at is None else replace(row, token_ids=[after.drawn[at][0]])
                for row, at in zip(rows, sources, strict=True)
            ]
        try:
            return Launched(self.step(rows))
        except (RuntimeError, MemoryError) as error:
            if self.launches == "fails late":
                return Launched([(-9, 0.0)] * len(rows), error)
            raise

    def copy_pages(self, copies):
        read = set()
        for src, dst, tokens in copies:
            assert dst not in read
            read.add(src)
            self.store[dst] = self.store[src][:tokens] + [-3] * (self.size - tokens)

    def drop_graphs(self):
        self.graphs = False

    def resize(self, num_pages):
        self.resizes.append(num_pages)
        self.allocate(num_pages)


@contextmanager
def engine(num_pages=200, page_tokens=4, fail=lambda rows: None, launches=False, **options):
    runner = Scripted(num_pages, page_tokens, fail, launches)
    settings = {"max_model_len": 400, "max_batch": 16, "max_prefill_tokens": 64, "min_prefill_tokens": 8}
    paged = PagedEngine(
        runner,
        num_pages=num_pages,
        page_tokens=page_tokens,
        numerics=NUMERICS,
        kv_bytes_token=10,
        **(settings | options),
    )
    try:
        yield paged, runner
    finally:
        runner.gate.set()
        paged.close()
        assert not paged._thread.is_alive()


def request(sequence_id, token_ids, max_tokens=8, seed=0, **options):
    return Request(token_ids, sequence_id, max_tokens, Sampling(seed=seed), **options)


def answer(paged, *args, **options):
    return paged.submit(request(*args, **options)).result(TIMEOUT_S)


def prompts(number, rng, shot=0):
    shared = [rng.randrange(VOCABULARY) for _ in range(shot)]
    return [shared + [rng.randrange(VOCABULARY) for _ in range(rng.randrange(1, 40))] for _ in range(number)]


def settled(condition):
    deadline = time.monotonic() + TIMEOUT_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def all_right(paged, texts, max_tokens=12, seed=0):
    futures = [paged.submit(request(f"s{i}", text, max_tokens, seed=seed + i)) for i, text in enumerate(texts)]
    answers = [future.result(TIMEOUT_S) for future in futures]
    assert [a.token_ids for a in answers] == [expected(t, max_tokens, seed + i) for i, t in enumerate(texts)]
    return answers


def test_alone():
    with engine() as (paged, _):
        result = answer(paged, "a", [1, 2, 3])
    usage = result.usage
    assert result.token_ids == expected([1, 2, 3], 8)
    assert result.finish_reason == "length"
    assert (usage.prompt_tokens, usage.prefilled, usage.reused, usage.generated) == (3, 3, 0, 8)
    assert (usage.batch_max, usage.preemptions, usage.kv_bytes_peak) == (1, 0, 3 * 4 * 10)
    assert min(usage.queue_s, usage.prefill_s, usage.decode_s) >= 0 < usage.gpu_s
    assert 0 < usage.prefill_gpu_s < usage.gpu_s
    assert result.logprobs == ()


@pytest.mark.parametrize(
    ("options", "shot"),
    [
        ({}, 0),
        ({}, 21),
        ({"num_pages": 15, "max_model_len": 52}, 0),
        ({"num_pages": 24}, 21),
        ({"page_tokens": 1, "num_pages": 4000}, 5),
    ],
    ids=["batch", "shared prefix", "tiny pool", "tiny pool, shared prefix", "pages of one token"],
)
def test_batched_rows_are_as_alone(options, shot):
    with engine(**options) as (paged, runner):
        answers = all_right(paged, prompts(30, random.Random(0), shot))
        assert max(a.usage.batch_max for a in answers) > 1
        tiny = options.get("num_pages", 200) < 100
        assert (paged.events["preemptions"] > 0) == tiny
        assert sum(a.usage.preemptions for a in answers) == paged.events["preemptions"]
        assert (sum(a.usage.prefilled + a.usage.reused - a.usage.prompt_tokens for a in answers) > 0) == tiny
        assert max(sum(step) for step in runner.steps if max(step) > 1) <= 64


def test_a_burst_with_one_prefix_computes_it_once():
    with engine() as (paged, runner):
        runner.gate.clear()
        texts = prompts(10, random.Random(1), shot=60)
        futures = [paged.submit(request(f"{i}", text, 4)) for i, text in enumerate(texts)]
        runner.gate.set()
        usages = [future.result(TIMEOUT_S).usage for future in futures]
    assert sum(usage.reused >= 60 for usage in usages) == 9


def test_follow_ups_reuse_what_was_computed():
    with engine() as (paged, _):
        context = list(range(10))
        for turn in range(4):
            result = answer(paged, "a", context, 5)
            assert result.token_ids == expected(context, 5)
            assert result.usage.reused == (len(context) - 4 if turn else 0)  # the last token's KV was not written
            assert result.usage.prefilled == len(context) - result.usage.reused
            context = [*context, *result.token_ids, 1, 2, 3]


def test_a_trimmed_answer_diverges_within_a_page():
    with engine() as (paged, _):
        first = answer(paged, "a", list(range(10)), 9)
        context = [*range(10), *first.token_ids[:3], 1, 2]
        again = answer(paged, "a", context)
        assert again.usage.reused == 13
        assert again.token_ids == expected(context, 8)


def test_end_frees_the_pages():
    with engine() as (paged, _):
        answer(paged, "a", list(range(10)))
        assert paged.capacity().pages_free < paged.capacity().pages_total
        paged.end("a")
        paged.end("unknown")
        settled(lambda: paged.capacity().pages_free == paged.capacity().pages_total)


def test_usage_shares_shared_pages():
    with engine() as (paged, runner):
        answer(paged, "a", list(range(9)), 1)
        assert answer(paged, "b", [*range(8), 20], 1).usage.kv_bytes_peak == (2 / 2 + 1) * 40
        assert len(runner.steps) == 2


def test_stop_token_is_included():
    with engine() as (paged, _):
        tokens = expected([5], 30)
        stop = frozenset({tokens[4]})
        result = answer(paged, "a", [5], 30, stop_token_ids=stop)
    assert result.token_ids == expected([5], 30, stop=stop)
    assert result.finish_reason == "stop"


def test_matcher_sees_each_token_once_even_when_preempted():
    seen = {i: [] for i in range(12)}

    def matcher(i):
        def match(new_ids):
            seen[i] += new_ids
            return len(seen[i]) == 15

        return match

    with engine(num_pages=15, max_model_len=52) as (paged, _):
        texts = prompts(12, random.Random(3))
        texts = [text[:30] for text in texts]
        futures = [paged.submit(request(f"{i}", text, 20, matcher=matcher(i))) for i, text in enumerate(texts)]
        for i, future in enumerate(futures):
            result = future.result(TIMEOUT_S)
            assert tuple(seen[i]) == result.token_ids == expected(texts[i], 15)
            assert result.finish_reason == "stop"
        assert paged.events["preemptions"]


def test_a_matcher_that_raises_fails_its_row_alone():
    def broken(new_ids):
        raise KeyError("mine")

    with engine() as (paged, _):
        bad, good = paged.submit(request("a", [1], matcher=broken)), paged.submit(request("b", [2]))
        with pytest.raises(EngineError, match="matcher failed: KeyError"):
            bad.result(TIMEOUT_S)
        assert good.result(TIMEOUT_S).token_ids == expected([2], 8)


def test_logprobs():
    with engine() as (paged, _):
        result = answer(paged, "a", [1, 2], logprobs=True)
    assert result.logprobs == tuple(-token / 100 for token in result.token_ids)


def test_limits():
    with engine(num_pages=11, max_model_len=60) as (paged, runner):
        for token_ids, max_tokens, kind in (
            ([], 1, EngineError),
            ([1], 0, EngineError),
            ([1] * 60, 1, ContextOverflow),
            ([1] * 30, 12, OutOfMemory),  # 41 tokens of KV, 40 in the pool
        ):
            with pytest.raises(kind):
                answer(paged, "a", token_ids, max_tokens)
        assert runner.steps == []
        assert len(answer(paged, "a", [1] * 30, 11).token_ids) == 11
    with engine(max_model_len=20) as (paged, _):
        result = answer(paged, "a", [1] * 15, 10)
        assert result.finish_reason == "context"
        assert len(result.token_ids) == 5
        assert answer(paged, "b", [1] * 15, 5).finish_reason == "length"


def test_cancel_queued_and_running():
    with engine(max_batch=1) as (paged, runner):
        runner.gate.clear()
        running, queued = paged.submit(request("a", [1], 50)), paged.submit(request("b", [2], 50))
        assert queued.cancel()
        assert running.cancel()
        runner.gate.set()
        assert wait([running, queued], TIMEOUT_S).not_done == set()
        with pytest.raises(CancelledError):
            running.result()
        assert answer(paged, "a", [1], 3).token_ids == expected([1], 3)
        settled(lambda: paged.capacity().running == paged.capacity().waiting == 0)


def test_end_while_running_and_queued():
    with engine(max_batch=1) as (paged, runner):
        runner.gate.clear()
        futures = [paged.submit(request(name, [1], 50)) for name in "abb"]
        other = paged.submit(request("c", [3]))
        for name in "ab":
            paged.end(name)
        runner.gate.set()
        for future in futures:
            with pytest.raises(Cancelled):
                future.result(TIMEOUT_S)
        assert other.result(TIMEOUT_S).token_ids == expected([3], 8)
        assert answer(paged, "b", [1], 3).token_ids == expected([1], 3)


def test_a_second_request_of_a_sequence_waits():
    with engine() as (paged, _):
        first, second = (paged.submit(request("a", [1, 2, 3], 20)) for _ in range(2))
        assert first.result(TIMEOUT_S).token_ids == second.result(TIMEOUT_S).token_ids
        assert second.result().usage.batch_max == 1


def test_close_fails_what_is_queued_and_later_requests():
    with engine(max_batch=1) as (paged, runner):
        runner.gate.clear()
        futures = [paged.submit(request(f"{i}", [1], 50)) for i in range(3)]
        futures[2].cancel()
        closing = threading.Thread(target=paged.close)
        closing.start()
        runner.gate.set()
        closing.join()
        for future in [*futures[:2], paged.submit(request("late", [1]))]:
            with pytest.raises(EngineDead, match="closed"):
                future.result(TIMEOUT_S)
        paged.close()


def test_prefill_and_decode_alternate():
    with engine(max_prefill_tokens=16) as (paged, runner):
        runner.gate.clear()
        short, long = paged.submit(request("a", [1], 12)), paged.submit(request("b", list(range(150)), 2))
        settled(lambda: len(paged.scheduler.running) + len(paged.scheduler.waiting) + paged._mail.qsize() == 2)
        runner.gate.set()
        short.result(TIMEOUT_S), long.result(TIMEOUT_S)
    assert runner.steps[1:9] in ([[16], [1]] * 4, [[1], [16]] * 4)


def test_shrink_preempts_and_goes_on():
    with engine() as (paged, runner):
        runner.gate.clear()
        futures = [paged.submit(request(f"{i}", [i, i], 30)) for i in range(8)]
        paged.shrink(2)
        runner.gate.set()
        for i, future in enumerate(futures):
            assert future.result(TIMEOUT_S).token_ids == expected([i, i], 30)
        assert max(len(step) for step in runner.steps[10:]) == 2
        assert paged.capacity().max_batch == 2
        paged.shrink(100)
        assert paged.capacity().max_batch == 2


def oom_if(condition):
    return lambda rows: FakeOOM("no memory") if condition(rows) else None


def test_oom_in_prefill_halves_the_chunk():
    fail = oom_if(lambda rows: max(len(row.token_ids) for row in rows) > 1 and sum(len(r.token_ids) for r in rows) > 20)
    drops = []
    with engine(fail=fail, drop_caches=lambda: drops.append(1), grow_after=10**6) as (paged, runner):
        all_right(paged, prompts(12, random.Random(5)))
        events = paged.events
    assert len(drops) == events["oom_prefill"] > 0
    assert events["prefill_halved"] <= 3
    assert events["batch_halved"] == events["culprits"] == events["pool_shrinks"] == 0
    assert max(sum(step) for step in runner.steps[-20:]) <= 20


def test_oom_in_decode_halves_the_batch_and_grows_back():
    shortage = [True]
    fail = oom_if(lambda rows: shortage[0] and len(rows) > 3 and all(len(row.token_ids) == 1 for row in rows))
    with engine(fail=fail, grow_after=5) as (paged, _):
        all_right(paged, prompts(12, random.Random(6)))
        events = paged.events
        assert events["oom_decode"] > 0 < events["batch_halved"]
        assert events["culprits"] == events["pool_shrinks"] == 0
        shortage[0] = False
        texts = [[*text, 9] for text in prompts(12, random.Random(7))]
        futures = [paged.submit(request(f"t{i}", text, 40)) for i, text in enumerate(texts)]
        assert [f.result(TIMEOUT_S).token_ids for f in futures] == [expected(text, 40) for text in texts]
        assert paged.capacity().max_batch == 16


@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_only_the_culprit_leaves(phase):
    def is_culprit(row):
        return row.sampling.seed == 77 and (len(row.token_ids) == 1 or phase == "prefill")

    with engine(fail=oom_if(lambda rows: any(map(is_culprit, rows)))) as (paged, runner):
        texts = prompts(10, random.Random(8))
        bad = paged.submit(request("bad", list(range(30)), 10, seed=77))
        all_right(paged, texts)
        with pytest.raises(OutOfMemory, match="alone at the smallest bound") as caught:
            bad.result(TIMEOUT_S)
        assert isinstance(caught.value.__cause__, FakeOOM)
        assert caught.value.stage == phase
        assert (caught.value.gpu_s > 0) == (phase == "decode"), "what its prefill took; steps that fail are nobody's"
        assert paged.events["culprits"] == 1
        assert not runner.graphs
        assert runner.resizes == [150]
        assert paged.capacity().max_batch == 16
        all_right(paged, texts)


def test_a_smaller_pool_helps_and_everything_is_computed_again():
    with engine(num_pages=100) as (paged, runner):
        runner.fail = oom_if(lambda rows: len(runner.store) > 80 and len(runner.steps) > 6)
        texts = prompts(8, random.Random(9))
        all_right(paged, texts)
        assert paged.events["pool_shrinks"] == 1
        assert paged.events["culprits"] == 0
        assert paged.capacity().pages_total == 74
        with pytest.raises(OutOfMemory, match="pool was cut"):
            answer(paged, "big", [1] * 300, 50)


def test_what_the_whole_pool_cannot_hold_is_refused_with_its_bytes_and_crosses_processes():
    with engine(num_pages=11) as (paged, _), pytest.raises(OutOfMemory) as caught:
        answer(paged, "a", [1] * 30, 12)
    caught.value.gpu_s = 0.5
    sent = pickle.loads(pickle.dumps(caught.value))
    assert str(sent) == "may need KV of 41 tokens, the whole pool holds 40"
    assert (sent.stage, sent.needed_bytes, sent.free_bytes, sent.gpu_s) == ("never_fits", 410, 400, 0.5)


def test_a_pool_that_cannot_come_back_is_the_end():
    died = []
    with engine(fail=oom_if(lambda rows: True), on_dead=died.append) as (paged, runner):
        runner.resize = lambda num_pages: (_ for _ in ()).throw(FakeOOM("still none"))
        with pytest.raises(EngineDead, match="could not be allocated again"):
            answer(paged, "a", [1])
        settled(lambda: died)
        assert paged.dead


def test_a_failed_copy_is_repeated():
    failures = [FakeOOM("in a copy")] * 3
    with engine() as (paged, runner):
        copy = runner.copy_pages

        def flaky(copies):
            copy(copies)
            if failures:
                raise failures.pop()

        runner.copy_pages = flaky
        answer(paged, "a", list(range(20)), 1)
        texts = [[*range(18), 40 + i] for i in range(4)]
        futures = [paged.submit(request(f"{i}", text)) for i, text in enumerate(texts)]
        assert [f.result(TIMEOUT_S).token_ids for f in futures] == [expected(text, 8) for text in texts]
        assert not failures


def test_copies_that_write_what_was_read_wait():
    scheduler = Scheduler(PageAllocator(9, 4), max_batch=1, max_prefill_tokens=1, max_model_len=8)
    scheduler.copies = [(7, 8, 3), (8, 5, 2), (7, 3, 1), (2, 7, 3), (7, 2, 1), (1, 4, 1)]
    for expected in ([(7, 8, 3), (8, 5, 2), (7, 3, 1)], [(2, 7, 3)], [(7, 2, 1), (1, 4, 1)], []):
        found = scheduler.next_copies()
        assert found == expected
        del scheduler.copies[: len(found)]


def test_a_poisonous_row_fails_alone():
    def fail(rows):
        return ValueError("bad row") if any(row.sampling.seed == 77 for row in rows) else None

    with engine(fail=fail) as (paged, runner):
        bad = paged.submit(request("bad", [1, 2, 3], seed=77))
        all_right(paged, prompts(10, random.Random(10)))
        with pytest.raises(EngineError, match="ValueError: bad row"):
            bad.result(TIMEOUT_S)
        assert runner.resizes == []


@pytest.mark.parametrize("by", ["CUDA error", "Triton Error [CUDA]", "CUDA driver error"])
def test_a_dead_context_fails_everything(by):
    died, fail = [], [False]

    def dead(rows):
        return RuntimeError(f"{by}: an illegal memory access was encountered") if fail[0] else None

    with engine(fail=dead, on_dead=died.append, works=lambda: False) as (paged, runner):
        runner.gate.clear()
        futures = [paged.submit(request(f"{i}", [1], 50)) for i in range(5)]
        fail[0] = True
        runner.gate.set()
        for future in futures:
            with pytest.raises(EngineDead, match="illegal memory"):
                future.result(TIMEOUT_S)
        settled(lambda: died)
        assert paged.dead
        with pytest.raises(EngineDead, match="dead"):
            answer(paged, "late", [1])


def test_a_kernel_that_does_not_start_on_a_context_that_works_costs_its_row_alone():
    def fail(rows):
        if any(row.sampling.seed == 77 for row in rows):
            return RuntimeError("Triton Error [CUDA]: invalid argument")
        return None

    with engine(fail=fail, works=lambda: True) as (paged, _):
        bad = paged.submit(request("bad", [1, 2, 3], seed=77))
        all_right(paged, prompts(10, random.Random(10)))
        with pytest.raises(EngineError, match="invalid argument"):
            bad.result(TIMEOUT_S)
        assert not paged.dead


def test_old_trajectories_go_first():
    scheduler = Scheduler(PageAllocator(100, 4), max_batch=1, max_prefill_tokens=64, max_model_len=100)
    rows = [Row(request(name, [1, 2]), None, 0.0, [1, 2]) for name in "abca"]
    for row in rows[:3]:
        scheduler.add(row)
    scheduler.commit(scheduler.plan())
    assert scheduler.running == [rows[0]]
    scheduler.remove(rows[0])
    scheduler.add(rows[3])
    assert [work.row for work in scheduler.plan()] == [rows[3]]
    assert scheduler.end("a") == [rows[3]]
    assert [work.row for work in scheduler.plan()] == [rows[1]]


def test_the_oldest_always_advances():
    scheduler = Scheduler(PageAllocator(6, 2), max_batch=4, max_prefill_tokens=8, max_model_len=11)
    rows = [Row(request(f"{i}", [i, i]), None, 0.0, [i, i]) for i in range(3)]
    for row in rows:
        scheduler.add(row)
    while scheduler.running or scheduler.waiting:
        work = scheduler.plan()
        assert work
        oldest = scheduler.running[0]
        assert work[0].row is oldest or oldest.left == 1
        scheduler.commit(work)
        for part in work:
            part.row.tokens.append(0)
            if len(part.row.tokens) == 11:
                scheduler.remove(part.row)
    assert scheduler.preemptions > 0
    assert all(len(row.tokens) == 11 for row in rows)


@pytest.mark.parametrize(
    ("max_decode_tokens", "launches"), [(0, False), (40, False), (0, "fails"), (0, "fails late"), (40, "fails late")]
)
def test_stress(max_decode_tokens, launches):
    """2,000 requests in 500 trajectories from 4 threads, with cancellations, ends and memory errors."""
    rng = random.Random(11)
    chaos = random.Random(12)
    shots = [[rng.randrange(VOCABULARY) for _ in range(length)] for length in (0, 13, 40)]
    wrong = []

    def trajectory(paged, name, rng):
        context = [*rng.choice(shots), *(rng.randrange(VOCABULARY) for _ in range(rng.randrange(1, 20)))]
        for _ in range(4):
            max_tokens, seed = rng.randrange(1, 12), rng.randrange(1000)
            future = paged.submit(request(name, context, max_tokens, seed))
            if rng.random() < 0.05:
                future.cancel()
                continue
            if rng.random() < 0.02:
                paged.end(name)
                wait([future], TIMEOUT_S)
                continue
            tokens = future.result(TIMEOUT_S).token_ids
            if tokens != expected(context, max_tokens, seed):
                wrong.append((name, context))
            kept = tokens[: rng.randrange(len(tokens) + 1)] if rng.random() < 0.3 else tokens
            context = [*context, *kept, *(rng.randrange(VOCABULARY) for _ in range(rng.randrange(1, 15)))]
        paged.end(name)

    def client(paged, number):
        rng = random.Random(number)
        for start in range(0, 125, 25):
            names = [f"{number}/{start + i}" for i in range(25)]
            threads = [
                threading.Thread(target=trajectory, args=(paged, name, random.Random(rng.random()))) for name in names
            ]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()

    fail = oom_if(lambda rows: chaos.random() < 0.02)
    options = {"max_decode_tokens": max_decode_tokens, "grow_after": 8, "launches": launches}
    with engine(num_pages=120, max_model_len=250, fail=fail, **options) as (paged, runner):
        clients = [threading.Thread(target=client, args=(paged, number)) for number in range(4)]
        for thread in clients:
            thread.start()
        for thread in clients:
            thread.join()
        assert wrong == []
        settled(lambda: paged.capacity().running == paged.capacity().waiting == 0)
        capacity = paged.capacity()
        assert capacity.pages_free + capacity.pages_cached == capacity.pages_total
        assert paged.events["preemptions"] > 0 < paged.events["oom_decode"]
        assert (paged.events["kept"] > 0) == bool(max_decode_tokens)
        assert (runner.behind > 100) == (bool(launches) and not max_decode_tokens)
        assert not paged.dead


@pytest.mark.parametrize(
    "options",
    [{}, {"num_pages": 24, "max_model_len": 90}, {"page_tokens": 1, "num_pages": 4000}, {"max_batch": 5}],
    ids=["batch", "tiny pool", "pages of one token", "small batch"],
)
def test_steps_launched_ahead_change_no_token(options):
    texts = prompts(30, random.Random(3), 13)
    with engine(**options, launches=True) as (paged, runner):
        answers = all_right(paged, texts, 30)
        assert runner.behind > 20
        assert runner.prefills_behind > 0
        seen = []

        def match(new_ids):
            seen.extend(new_ids)
            return len(seen) == 5

        assert answer(paged, "stops", texts[0], 30, matcher=match).token_ids == tuple(seen)
        assert tuple(seen) == expected(texts[0], 5)
        assert answer(paged, "logprobs", texts[0], 5, logprobs=True).logprobs == tuple(-t / 100 for t in seen)
        capacity = paged.capacity()
        assert capacity.pages_free + capacity.pages_cached == capacity.pages_total
    with engine(**options) as (paged, runner):
        assert [a.token_ids for a in all_right(paged, texts, 30)] == [a.token_ids for a in answers]
        assert runner.behind == 0


def test_a_row_that_comes_waits_for_one_step_only():
    with engine(num_pages=600, max_model_len=2000, launches=True) as (paged, runner):
        long = paged.submit(request("long", [1, 2, 3], 1500))
        settled(lambda: runner.behind > 20)
        runner.gate.clear()
        before, ended = len(runner.steps), []
        short = paged.submit(request("short", [4, 5, 6], 2))
        short.add_done_callback(lambda _: ended.append(len(runner.steps)))
        runner.gate.set()
        assert short.result(TIMEOUT_S).token_ids == expected([4, 5, 6], 2)
        settled(lambda: ended)
        assert ended[0] - before <= 6
        assert long.result(TIMEOUT_S).token_ids == expected([1, 2, 3], 1500)


def test_a_newcomer_is_let_in_though_rows_end_at_every_step():
    slow = {"fail": lambda rows: time.sleep(0.002), "launches": True}
    with engine(num_pages=3000, max_model_len=2000, max_batch=64, **slow) as (paged, runner):
        long = [paged.submit(request(f"{i}", [1, 2, i], 100 + i)) for i in range(50)]
        wait(long[:1], TIMEOUT_S)  # from here on each step ends one
        began = len(runner.steps)
        assert answer(paged, "new", [7, 8, 9], 1).token_ids == expected([7, 8, 9], 1)
        assert len(runner.steps) - began <= MOST_HELD + 4
        assert [future.result(TIMEOUT_S).token_ids for future in long] == [
            expected([1, 2, i], 100 + i) for i in range(50)
        ]


def queue(scheduler, name, text, max_tokens):
    scheduler.add(Row(request(name, text, max_tokens), Future(), 0, [*text]))


def step(scheduler):
    """Plan a step, and go on as if it had drawn."""
    work = scheduler.plan()
    scheduler.commit(work)
    for part in work:
        part.row.tokens.append(7)
    return work


def test_rows_that_come_one_by_one_are_let_in_together():
    """Of 64 places one gets free with each step, and somebody waits for each: three go in at once."""
    scheduler = Scheduler(PageAllocator(2000, 4), max_batch=64, max_prefill_tokens=500, max_model_len=200)
    prefills, names = [], itertools.count()
    for _ in range(200):
        while len(scheduler.waiting) < 10:
            name = next(names)
            queue(scheduler, f"{name}", [name, 1, 2], 50)
        work = step(scheduler)
        if work[0].prefill:
            prefills.append(len(work))
        elif len(scheduler.running) > 60:
            scheduler.remove(scheduler.running[0])
    assert prefills[0] == 10
    assert set(prefills[20:]) == {3}  # a sixteenth of the 61 that go on


def test_rows_are_let_in_together_where_pages_are_short_too():
    scheduler = Scheduler(PageAllocator(1300, 4), max_batch=256, max_prefill_tokens=4000, max_model_len=200)
    prefills, names = [], itertools.count()
    for _ in range(400):
        while len(scheduler.waiting) < 100:
            name = next(names)
            queue(scheduler, f"{name}", [name, *range(30)], 30)
        work = step(scheduler)
        for part in work:
            if part.row.generated >= 20 + int(part.row.sequence_id) % 20:
                scheduler.remove(part.row)
        if work[0].prefill:
            prefills.append(len(work))
    assert len(scheduler.running) < 150
    assert sum(prefills[20:]) > 5 * len(prefills[20:])


def test_a_row_that_nobody_joins_is_let_in_after_some_plans():
    scheduler = Scheduler(PageAllocator(2000, 4), max_batch=64, max_prefill_tokens=500, max_model_len=200)
    for name in range(40):
        queue(scheduler, f"{name}", [name, 1, 2], 50)
    step(scheduler)
    queue(scheduler, "last", [40, 1, 2], 50)
    plans = [step(scheduler)]
    while not plans[-1][0].prefill:
        plans.append(step(scheduler))
    assert len(plans) == MOST_HELD + 1


def test_a_preemption_lets_those_in_who_were_refused():
    """B grows until it is preempted; the follow-up of an older sequence, refused before, has room from then on."""
    slow = {"fail": lambda rows: time.sleep(0.002), "launches": True}
    with engine(num_pages=41, max_model_len=150, max_batch=4, **slow) as (paged, runner):
        answer(paged, "old", [1, 2, 3], 1)
        began = len(runner.steps)
        done: dict[str, int] = {}
        asked = (
            ("A", list(range(10)), 130),
            ("B", [(7 * i + 3) % 50 for i in range(100)], 45),
            ("old", [1, 2, 3, *range(20, 70)], 6),
        )
        futures = [paged.submit(request(name, text, length)) for name, text, length in asked[:2]]
        settled(lambda: paged.capacity().running == 2)
        futures.append(paged.submit(request(*asked[2])))
        for (name, _, _), future in zip(asked, futures, strict=True):
            future.add_done_callback(lambda _, name=name: done.setdefault(name, len(runner.steps) - began))
        for (_, text, length), future in zip(asked, futures, strict=True):
            assert future.result(TIMEOUT_S).token_ids == expected(text, length)
        settled(lambda: len(done) == 3)
        assert paged.events["preemptions"] > 0
        assert done["old"] < done["A"]


def test_what_cannot_be_launched_ahead_is_not_tried_at_each_step():
    drops = []
    with engine(launches=True, grow_after=10, drop_caches=lambda: drops.append(1)) as (paged, runner):
        launch = runner.launch

        def starved(rows, after=None, sources=()):
            if after is not None:
                raise FakeOOM("no room to draw")
            return launch(rows)

        runner.launch = starved
        assert answer(paged, "a", [1, 2, 3], 200).token_ids == expected([1, 2, 3], 200)
        assert 10 <= paged.events["oom_decode"] == len(drops) <= 20


def test_copies_that_do_not_fit_together_are_done_apart():
    with engine(num_pages=2000, max_model_len=60, max_batch=64) as (paged, runner):
        copy, sizes = runner.copy_pages, []

        def small(copies):
            sizes.append(len(copies))
            if len(copies) > 16:
                raise FakeOOM("no room for so many pages")
            copy(copies)

        runner.copy_pages = small
        answer(paged, "a", list(range(30)), 1)
        texts = [[*range(27), 100 + i, 7] for i in range(40)]
        futures = [paged.submit(request(f"{i}", text)) for i, text in enumerate(texts)]
        assert [f.result(TIMEOUT_S).token_ids for f in futures] == [expected(text, 8) for text in texts]
        assert sum(sizes) > 30
        assert paged.events["oom_prefill"] == paged.events["oom_decode"] == 0


def test_the_end_of_a_sequence_under_way_frees_its_pages_for_others():
    slow = {"fail": lambda rows: time.sleep(0.002), "launches": True}
    with engine(num_pages=40, max_model_len=80, **slow) as (paged, runner):
        for turn in range(10):
            futures = [paged.submit(request(f"{turn}/{i}", [turn, i, 7], 60)) for i in range(2)]
            settled(lambda: runner.behind > 5)
            paged.end(f"{turn}/0")
            with pytest.raises(Cancelled):
                futures[0].result(TIMEOUT_S)
            assert answer(paged, f"{turn}/new", [turn, 9], 20).token_ids == expected([turn, 9], 20)
            assert futures[1].result(TIMEOUT_S).token_ids == expected([turn, 1, 7], 60)
            runner.behind = 0


GUESSING = {"max_decode_tokens": 64}


def guessed(texts, max_tokens, guessing, **options):
    """Answers, engine steps and events; rows repeat themselves, so that guesses are often right."""
    with engine(**guessing) as (paged, runner):
        futures = [
            paged.submit(request(f"s{i}", text, max_tokens, seed=PARROT + i, logprobs=True, **options))
            for i, text in enumerate(texts)
        ]
        answers = [future.result(TIMEOUT_S) for future in futures]
        capacity = paged.capacity()
        assert capacity.pages_free + capacity.pages_cached == capacity.pages_total
        return answers, len(runner.steps), paged.events


@pytest.mark.parametrize(
    "options", [{}, {"num_pages": 40, "max_model_len": 150}, {"page_tokens": 1, "num_pages": 4000}]
)
def test_guesses_change_no_token_and_save_steps(options):
    texts = prompts(8, random.Random(20))
    plain, steps, none = guessed(texts, 60, options)
    found, fewer, events = guessed(texts, 60, options | GUESSING)
    assert [a.token_ids for a in found] == [a.token_ids for a in plain]
    assert [a.token_ids for a in found] == [expected(text, 60, PARROT + i) for i, text in enumerate(texts)]
    assert [a.logprobs for a in found] == [a.logprobs for a in plain]
    assert none["drafted"] == none["kept"] == 0
    assert events["kept"] > events["drafted"] / 3
    assert fewer < steps * 0.75


@pytest.mark.parametrize("length", range(1, 24))
def test_a_row_ends_within_its_guesses(length):
    seen = []

    def match(new_ids):
        seen.extend(new_ids)
        return len(seen) == length

    text = [1, 2, 3, 4, 5, 6, 7, 8, 9, 1, 2, 3, 4]
    [matched], _, events = guessed([text], 40, GUESSING, matcher=match)
    assert matched.token_ids == tuple(seen) == expected(text, length, PARROT)
    assert len(matched.logprobs) == length
    [cut], _, _ = guessed([text], length, GUESSING)
    assert cut.token_ids == matched.token_ids
    assert events["kept"] > 0 or length < 3


def test_a_step_that_fails_is_repeated_without_guesses():
    guesses = oom_if(lambda rows: len(rows) > 6 and all(len(row.token_ids) == 1 for row in rows))
    with engine(fail=guesses, grow_after=5, **GUESSING) as (paged, _):
        all_right(paged, prompts(6, random.Random(21)), seed=PARROT, max_tokens=60)
        events = paged.events
    assert events["oom_decode"] > 1, "they are tried again"
    assert events["batch_halved"] == events["pool_shrinks"] == events["culprits"] == events["preemptions"] == 0


def test_memory_that_another_process_holds_is_waited_for(monkeypatch):
    monkeypatch.setattr("actors.engine.paged._WAIT_S", 0.01)
    held = {"steps": 60}

    def fail(rows):
        held["steps"] -= 1
        return FakeOOM("CUDA out of memory") if held["steps"] > 0 else None

    with engine(fail=fail, squeezed=lambda: held["steps"] > 0) as (paged, _):
        answers = [paged.submit(request(f"s{n}", [n] * 30)) for n in range(4)]
        for n, answer in enumerate(answers):
            assert answer.result(TIMEOUT_S).token_ids == expected([n] * 30, 8)
        assert paged.events["waits"] > 20
        assert paged.events["culprits"] == paged.events["pool_shrinks"] == paged.events["graph_drops"] == 0


def test_it_is_not_waited_for_for_ever(monkeypatch):
    monkeypatch.setattr("actors.engine.paged._WAIT_S", 0.01)
    with engine(fail=lambda rows: FakeOOM("CUDA out of memory"), squeezed=lambda: True, patience_s=0.1) as (paged, _):
        with pytest.raises(OutOfMemory, match="failed alone"):
            paged.submit(request("s", [1] * 30)).result(TIMEOUT_S)
        assert paged.events["waits"] in (10, 11)  # of 0.01 s each


def test_a_call_leaves_no_work_to_the_garbage_collector():
    turn = Turn((Stage("thought", 8),))
    gc.collect()
    gc.disable()
    try:
        with engine() as (paged, _):
            future = speak(paged, request("a", [1, 2, 3]), turn, made_up_tokenizer(1000))
            matcher = weakref.ref(future._matcher)
            assert future.result(TIMEOUT_S).token_ids
            del future
            settled(lambda: matcher() is None)
    finally:
        gc.enable()


@pytest.mark.filterwarnings("ignore:Using extra keyword arguments")  # ray.serve's own, at import
def test_a_replica_whose_engine_is_at_one_step_for_too_long_ends_its_process(monkeypatch):
    from actors import replica

    ended = []
    monkeypatch.setattr(replica.os, "_exit", ended.append)
    mine = replica.Replica.__new__(replica.Replica)  # its own start wants Serve
    mine.step_limit_s = 0.05
    with engine() as (paged, runner):
        silent = [0.0]
        mine.engine = SimpleNamespace(step_s=paged.step_s, silent_s=lambda: silent[0])
        answer(paged, "a", [1, 2, 3])
        settled(lambda: paged.step_s() == 0.0)
        asyncio.run(mine.check_health())
        runner.gate.clear()
        future = paged.submit(request("a", [1, 2, 3]))
        settled(lambda: paged.step_s() > 0.05)
        assert ended == []
        asyncio.run(mine.check_health())
        assert ended == [1]
        runner.gate.set()
        future.result(TIMEOUT_S)
        settled(lambda: paged.step_s() == 0.0)
        silent[0] = 61.0
        asyncio.run(mine.check_health())
        assert ended == [1, 1]

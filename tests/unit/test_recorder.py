"""What is written when memory runs out: real traces of real steps on a CPU; of snapshots, which a CPU does not have,
the order of calls and their bounds (tests/gpu writes real ones)."""

import errno
import gzip
import json
import logging
import re
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from actors.engine import recorder
from actors.engine.assemble import over_model
from actors.engine.bounds import Bounds
from actors.engine.protocol import EngineSpec
from actors.engine.recorder import HISTORY, LIMIT, OomRecorder, loading, recorder_of
from actors.engine.reference import ReferenceEngine
from actors.errors import InputError, OutOfMemory
from bench.common import runner_of
from tests.unit.test_engine_equality import GREEDY, PAGE, together, tokens
from tests.unit.test_memory import Steps, no_gpu  # noqa: F401
from tests.unit.test_runner import tiny

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
OPTIONS = {"pages": 100, "page_tokens": PAGE, "max_model_len": 256, "max_batch": 8, "max_prefill_tokens": 512}


def traced(path):
    """The operations of a trace, of whichever thread."""
    with gzip.open(path, "rt") as stream:
        return [event["name"] for event in json.load(stream)["traceEvents"] if event.get("cat") == "cpu_op"]


def files(folder):
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


def failing(run, times, error):
    """`run`, which fails the first `times` times."""
    left = [times]

    def sometimes(*args, **kwargs):
        if left[0]:
            left[0] -= 1
            raise error
        return run(*args, **kwargs)

    return sometimes


@pytest.fixture
def history(monkeypatch):
    """torch's memory history as a list of calls; a snapshot is a file that says so."""
    calls = []
    monkeypatch.setattr(torch.cuda, "init", lambda: calls.append("init"))
    monkeypatch.setattr(torch.cuda.memory, "_record_memory_history", lambda **options: calls.append(options))

    def dump(path):
        calls.append("dump")
        Path(path).write_bytes(b"snapshot")

    monkeypatch.setattr(torch.cuda.memory, "_dump_snapshot", dump)
    return calls


def test_an_engine_traces_the_step_that_it_repeats(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        expected, got, events = [], [], {}
        for folder in (None, tmp_path / "oom"):
            kept = None if folder is None else OomRecorder("all", str(folder), CPU)
            engine = over_model(tiny("llama"), kernel="sdpa", **OPTIONS, recorder=kept)
            runner = runner_of(engine)
            runner.step = failing(runner.step, 2, MemoryError("injected"))
            answers = tokens(together(engine, GREEDY))
            events = engine.events
            engine.close()
            expected, got = got, answers
    assert got == expected
    assert events["oom_recorded"] == 1
    assert files(tmp_path / "oom") == ["rank0-prefill-1.json.gz"]
    assert "aten::linear" in traced(tmp_path / "oom" / "rank0-prefill-1.json.gz")
    assert re.search(
        r"tokens failed: MemoryError: injected; recorded in \S+/oom/: rank0-prefill-1.json.gz", caplog.text
    )
    assert "no memory snapshot of a CPU" in caplog.text


def test_a_trace_ends_after_a_few_steps(tmp_path):
    kept = OomRecorder("trace", str(tmp_path), CPU)
    kept.failed("decode")
    for _ in range(recorder.TRACED_STEPS):
        assert files(tmp_path) == []
        torch.ones(3) + 1
        kept.ended()
    torch.ones(3) * 2
    kept.ended()
    kept.close()
    names = traced(tmp_path / "rank0-decode-1.json.gz")
    assert names.count("aten::add") == recorder.TRACED_STEPS
    assert "aten::mul" not in names


def test_one_trace_at_a_time_and_a_few_of_each_stage(tmp_path):
    kept = OomRecorder("trace", str(tmp_path), CPU, rank=3)
    told = []
    for stage in ("prefill", "decode", "prefill", "prefill", "decode", "decode"):
        told += [kept.failed(stage), kept.failed(stage)]
        kept.close()
    assert [bool(words) for words in told] == [True, False] * 3 + [False, False] + [True, False] + [False, False]
    assert files(tmp_path) == [f"rank3-{stage}-{n}.json.gz" for stage in ("decode", "prefill") for n in (1, 2)]
    assert kept.failed("load", traced=False) == ""


def test_snapshots_are_bounded_and_come_before_anything_is_done(tmp_path, history):
    kept = OomRecorder("snapshot", str(tmp_path), CUDA)
    assert history == ["init", {"stacks": "python", "max_entries": HISTORY}]
    told = [kept.failed(stage, traced=False) for stage in ("load", "capture") for _ in range(5)]
    assert [bool(words) for words in told] == ([True] * LIMIT + [False] * (5 - LIMIT)) * 2
    assert told[0] == f"; recorded in {tmp_path}/: rank0-load-1.pickle"
    assert history.count("dump") == 2 * LIMIT
    assert files(tmp_path) == [f"rank0-{stage}-{n + 1}.pickle" for stage in ("capture", "load") for n in range(LIMIT)]


def test_the_engine_records_before_it_drops_caches(tmp_path, history):
    kept = OomRecorder("snapshot", str(tmp_path), CUDA)
    engine = over_model(tiny("llama"), kernel="sdpa", **OPTIONS, recorder=kept)
    engine._drop_caches = lambda: history.append("drop")
    runner = runner_of(engine)
    runner.step = failing(runner.step, 3, torch.OutOfMemoryError("injected"))
    together(engine, GREEDY[:1])
    assert engine.events["oom_recorded"] == LIMIT
    engine.close()
    assert history[2:] == ["dump", "drop"] * LIMIT + ["drop"]


def test_the_profile_pass_records_what_it_makes_smaller(tmp_path, history, no_gpu, caplog):  # noqa: F811
    runner = Steps(100 << 20)
    kept = OomRecorder("snapshot", str(tmp_path), CUDA)
    found = Bounds(runner, recorder=kept)
    found.measure(0)
    assert (found.events["oom_prefill"], found.events["oom_decode"], found.events["oom_recorded"]) == (3, 2, 4)
    assert files(tmp_path) == [f"rank0-{stage}-{n}.pickle" for stage in ("decode", "prefill") for n in (1, 2)]
    assert caplog.text.count("recorded in") == 4


def test_a_load_that_does_not_fit_is_recorded_and_out_of_memory(tmp_path, history, caplog):
    kept = OomRecorder("all", str(tmp_path), CUDA)
    with pytest.raises(OutOfMemory, match="the weights of a/b do not fit: tried") as caught, loading("a/b", kept):
        raise torch.OutOfMemoryError("tried to allocate 2.00 GiB")
    assert caught.value.stage == "load"
    assert files(tmp_path) == ["rank0-load-1.pickle"]
    assert "rank0-load-1.pickle" in caplog.text
    with pytest.raises(ValueError, match="mine"), loading("a/b", kept):
        raise ValueError("mine")
    assert files(tmp_path) == ["rank0-load-1.pickle"]


def test_the_reference_engine_records_too(tmp_path, caplog):
    model = tiny("llama")
    kept = OomRecorder("trace", str(tmp_path), CPU)
    engine = ReferenceEngine(model, max_model_len=256, max_batch=4, recorder=kept)
    engine.model.generate = failing(engine.model.generate, 1, torch.OutOfMemoryError("injected"))
    expected = [len(answer.token_ids) for answer in together(engine, [replace(one, logprobs=False) for one in GREEDY])]
    engine.close()
    assert expected == [request.max_tokens for request in GREEDY]
    assert files(tmp_path) == ["rank0-step-1.json.gz"]
    assert "aten::linear" in traced(tmp_path / "rank0-step-1.json.gz")
    assert "rank0-step-1.json.gz" in caplog.text


def test_what_cannot_be_written_is_logged_and_nothing_else(tmp_path, history, monkeypatch, caplog):
    """A full disk half-way through a snapshot, a folder that is a file, a profiler that does not start."""

    def full(path):
        Path(path).write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(torch.cuda.memory, "_dump_snapshot", full)
    kept = OomRecorder("snapshot", str(tmp_path / "full"), CUDA)
    assert kept.failed("decode") == ""
    assert files(tmp_path / "full") == []
    assert "the memory snapshot rank0-decode-1.pickle could not be written: OSError" in caplog.text

    (tmp_path / "file").write_text("mine")
    kept = OomRecorder("trace", str(tmp_path / "file"), CPU)
    kept.failed("decode")
    kept.close()
    assert "the trace rank0-decode-1.json.gz could not be written: FileExistsError" in caplog.text
    assert (tmp_path / "file").read_text() == "mine"

    def broken(self):
        raise RuntimeError("no CUPTI")

    monkeypatch.setattr(torch.profiler.profile, "start", broken)
    kept = OomRecorder("trace", str(tmp_path / "none"), CPU)
    assert kept.failed("decode") == ""
    kept.ended()
    kept.close()
    assert "the trace rank0-decode-1.json.gz could not be started: RuntimeError: no CUPTI" in caplog.text


@pytest.fixture
def staging(tmp_path, monkeypatch):
    """Where files are made that go elsewhere."""
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))


def test_on_an_object_store_files_are_copied_and_no_address_is_logged(tmp_path, history, staging):
    kept = OomRecorder("snapshot", f"file://{tmp_path}/run/oom/replica", CUDA)
    assert kept.failed("decode") == "; recorded in oom/replica/: rank0-decode-1.pickle"
    kept.close()
    assert (tmp_path / "run/oom/replica/rank0-decode-1.pickle").read_bytes() == b"snapshot"
    assert list((tmp_path / "tmp").iterdir()) == []


def test_a_copy_that_fails_stays_where_it_was_made(history, staging, caplog):
    kept = OomRecorder("snapshot", "nowhere://key:secret@bucket/oom/replica", CUDA)
    kept.failed("decode")
    kept.close()
    [path] = re.findall(r"stays at (\S+) on", caplog.text)
    assert Path(path).read_bytes() == b"snapshot"
    assert "it stays at" in caplog.text
    assert "secret" not in caplog.text


def test_nothing_is_recorded_unless_it_is_asked_for(history):
    assert recorder_of(EngineSpec("any"), CUDA) is None
    assert history == []
    with pytest.raises(InputError, match=r"memory\.record_oom"):
        recorder_of(EngineSpec("any", record_oom="everything"), CPU)

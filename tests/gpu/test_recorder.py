"""On a GPU: what is written of a real out of memory, and that the engine goes on."""

import gzip
import itertools
import json
import pickle

import pytest
import torch

from actors.engine.assemble import over_model
from actors.engine.recorder import OomRecorder
from bench.common import runner_of
from tests.unit.test_engine_equality import GREEDY, together, tokens
from tests.unit.test_runner import tiny

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]

OPTIONS = {"pages": 40, "max_model_len": 1024, "max_batch": 8, "max_prefill_tokens": 512}


@pytest.fixture(autouse=True)
def no_history():
    yield
    torch.cuda.memory._record_memory_history(enabled=None)


def test_a_snapshot_of_the_failure_and_a_trace_of_the_repetition(tmp_path):
    device = torch.device("cuda")
    answers = []
    for recorder in (None, OomRecorder("all", str(tmp_path), device)):
        engine = over_model(tiny("llama").to(device), kernel="sdpa", graphs=False, **OPTIONS, recorder=recorder)
        runner = runner_of(engine)
        launch, left = runner.launch, [1]

        def once(*args, launch=launch, left=left):
            if left[0]:
                left[0] -= 1
                torch.empty(1 << 50, dtype=torch.uint8, device=device)  # a real one, of torch's allocator
            return launch(*args)

        runner.launch = once
        answers.append(tokens(together(engine, GREEDY)))
        events = engine.events
        engine.close()
    assert answers[0] == answers[1]
    assert (events["oom_prefill"], events["oom_recorded"], events["culprits"]) == (1, 1, 0)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rank0-prefill-1.json.gz", "rank0-prefill-1.pickle"]
    with (tmp_path / "rank0-prefill-1.pickle").open("rb") as stream:
        snapshot = pickle.load(stream)
    ooms = [entry for entry in snapshot["device_traces"][0] if entry["action"] == "oom"]  # torch tries twice
    assert {entry["size"] for entry in ooms} == {1 << 50}
    assert any(frame["name"] == "once" for frame in ooms[0]["frames"])
    assert snapshot["segments"]
    with gzip.open(tmp_path / "rank0-prefill-1.json.gz", "rt") as stream:
        kinds = {event.get("cat") for event in json.load(stream)["traceEvents"]}
    assert {"cpu_op", "kernel"} <= kinds


def test_two_traces_in_a_process_that_replays_graphs(tmp_path):
    """torch's profiler is started, ended and started again; where graphs are, CUPTI has been known to crash of that."""
    device = torch.device("cuda")
    recorder = OomRecorder("trace", str(tmp_path), device)
    model = tiny("llama").to(device, torch.bfloat16)
    engine = over_model(model, compile="off", **OPTIONS, recorder=recorder)
    runner = runner_of(engine)
    assert runner.captured
    launch, calls = runner.launch, itertools.count()

    def sometimes(*args):
        if next(calls) in (0, 12):
            torch.empty(1 << 50, dtype=torch.uint8, device=device)
        return launch(*args)

    runner.launch = sometimes
    answers = together(engine, GREEDY)
    assert len(tokens(answers)) == len(GREEDY)
    assert engine.events["oom_recorded"] == 2
    engine.close()
    assert len(list(tmp_path.glob("*.json.gz"))) == 2

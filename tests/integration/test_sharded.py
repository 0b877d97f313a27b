"""A gang of ranks under Serve, on CPUs: a run of its own, and with a rank killed or stopped in the middle."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import psutil
import pytest

from bench.clusters import children, wait_for
from bench.scripted import finished_rows
from bench.tiny import write_tiny_model
from tests.integration.test_run import QUICKSTART, ROOT, command, rows_of, run

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("model"))


def gang(size: int) -> list[str]:
    return ["--set", f"pools={{sharded: {{tensor_parallel_size: {size}, replicas: 1}}}}"]


def real(model: Path, rows: int) -> list[str]:
    return ["--limit", str(rows), "--set", f"model.id={model}"]


def check(out: Path, rows: int, size: int = 2) -> pd.DataFrame:
    frame = rows_of(out)
    assert frame["row_id"].is_unique
    assert len(frame) == rows
    assert (frame["status"] == "ok").all(), frame["error"].tolist()
    assert set(frame["tp"]) == {size}
    assert set(frame["pool"]) == {"sharded"}
    return frame


@pytest.fixture(scope="module")
def alone(tmp_path_factory, model) -> pd.DataFrame:
    """Rows of one process."""
    out = tmp_path_factory.mktemp("alone") / "out"
    done = run(command(out, *real(model, 6), engine="paged"))
    assert done.returncode == 0, done.stdout + done.stderr
    return rows_of(out)


@pytest.mark.parametrize("size", [2, 4])
def test_a_sharded_run_gives_the_rows_of_one_process(tmp_path, model, alone, size, monkeypatch):
    """Ray believes that there are as many GPUs as ranks."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # they share the CPUs
    out = tmp_path / "out"
    argv = [sys.executable, "-m", "tests.integration.gpus_run", str(size), str(QUICKSTART), "--out", str(out)]
    done = run([*argv, *real(model, 6), *gang(size), "--set", "engine=paged"])
    assert done.returncode == 0, done.stdout + done.stderr
    frames = [frame.sort_values("row_id") for frame in (check(out, 6, size), alone)]
    assert {dtype for frame in frames for dtype in frame["dtype"]} == {"float32"}
    steps = [[[(step["thought"], step["action"]) for step in row] for row in frame["trajectory"]] for frame in frames]
    assert steps[0] == steps[1]
    assert frames[0]["generated_tokens"].tolist() == frames[1]["generated_tokens"].tolist()


@pytest.mark.parametrize(
    ("victim", "how"),
    [
        ("ray::Rank", signal.SIGKILL),
        ("ray::ServeReplica", signal.SIGKILL),
        ("actors.process", signal.SIGKILL),
        ("ray::Rank", signal.SIGSTOP),
        ("ray::ServeReplica", signal.SIGSTOP),
        ("actors.process", signal.SIGSTOP),
    ],
)
def test_a_lost_rank_rebuilds_the_gang_and_loses_no_row(tmp_path, model, victim, how):
    out, rows = tmp_path / "out", 40
    argv = command(out, *real(model, rows), *gang(2), "--set", "memory.max_batch=4", engine="paged")
    with subprocess.Popen(argv, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        wait_for(lambda: len(finished_rows(out)) > 4)
        [target, *_] = children(process.pid, victim)
        titles = ("ray::Rank", "ray::ServeReplica", "actors.process")
        ranks = [one for title in titles for one in children(process.pid, title)]
        target.send_signal(how)
        killed, before = time.monotonic(), len(finished_rows(out))
        assert not psutil.wait_procs(ranks, 300)[1]
        gone_s = time.monotonic() - killed
        wait_for(lambda: len(finished_rows(out)) > before + 4)
        print(
            json.dumps(
                {"victim": victim, "signal": how.name, "gang_gone_s": gone_s, "rows_again_s": time.monotonic() - killed}
            )
        )
        output = process.communicate(timeout=900)[0].decode()
    assert process.returncode == 0, output
    check(out, rows)
    attempts = pd.read_parquet(out / "attempts")
    assert (attempts["outcome"] == "ok").sum() == rows
    assert 0 < (attempts["outcome"] != "ok").sum() <= 2 * 8


def test_a_rank_that_is_lost_while_the_gang_starts_is_found_then(tmp_path, model):
    out = tmp_path / "out"
    argv = command(out, *real(model, 6), *gang(2), engine="paged")
    with subprocess.Popen(argv, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        wait_for(lambda: children(process.pid, "ray::Rank"))
        [target] = children(process.pid, "ray::Rank")
        target.kill()
        killed = time.monotonic()
        wait_for(lambda: [one for one in children(process.pid, "ray::Rank") if one.pid != target.pid])
        print(json.dumps({"another_rank_s": time.monotonic() - killed}))
        output = process.communicate(timeout=900)[0].decode()
    assert process.returncode == 0, output
    check(out, 6)

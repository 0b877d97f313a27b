"""A gang of two ranks under Serve, on CPUs: a run of its own, and with a rank killed or stopped in the middle."""

import json
import signal
import subprocess
import time
from pathlib import Path

import pandas as pd
import psutil
import pytest

from bench.clusters import children, wait_for
from bench.scripted import finished_rows
from bench.tiny import write_tiny_model
from tests.integration.test_run import ROOT, command, rows_of, run

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
GANG = ["--set", "pools={sharded: {tensor_parallel_size: 2, replicas: 1}}"]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("model"))


def sharded(out: Path, model: Path, rows: int) -> list[str]:
    return command(out, "--limit", str(rows), "--set", f"model.id={model}", *GANG, engine="paged")


def check(out: Path, rows: int) -> pd.DataFrame:
    frame = rows_of(out)
    assert frame["row_id"].is_unique
    assert len(frame) == rows
    assert (frame["status"] == "ok").all(), frame["error"].tolist()
    assert set(frame["tp"]) == {2}
    assert set(frame["pool"]) == {"sharded"}
    return frame


def test_a_sharded_run_gives_the_rows_of_one_process(tmp_path, model):
    done = run(sharded(tmp_path / "two", model, 6))
    assert done.returncode == 0, done.stdout + done.stderr
    two = check(tmp_path / "two", 6)
    done = run(command(tmp_path / "one", "--limit", "6", "--set", f"model.id={model}", engine="paged"))
    assert done.returncode == 0, done.stdout + done.stderr
    one = rows_of(tmp_path / "one")
    steps = [[(step["thought"], step["action"]) for step in row] for row in two.sort_values("row_id")["trajectory"]]
    assert steps == [
        [(step["thought"], step["action"]) for step in row] for row in one.sort_values("row_id")["trajectory"]
    ]


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
    argv = [*sharded(out, model, rows), "--set", "memory.max_batch=4"]
    with subprocess.Popen(argv, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        wait_for(lambda: len(finished_rows(out)) > 4)
        [target, *_] = children(process.pid, victim)
        titles = ("ray::Rank", "ray::ServeReplica", "actors.process")
        gang = [one for title in titles for one in children(process.pid, title)]
        target.send_signal(how)
        killed, before = time.monotonic(), len(finished_rows(out))
        assert not psutil.wait_procs(gang, 300)[1]
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

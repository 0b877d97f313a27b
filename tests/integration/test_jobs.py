"""`ray job submit` against a cluster, as docs/cluster.md tells it: submit, status, logs, stop, submit again."""

import json
import sys
import time
from collections import Counter
from pathlib import Path

import pandas as pd
import pytest

from bench.clusters import Cluster, ray_cluster, wait_for
from bench.scripted import finished_rows, lines_in, script, write_suite
from tests.integration.test_run import ROOT

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]
ROWS = 300


@pytest.fixture
def calls(tmp_path):
    """A file with a line for each call of the engine."""
    return tmp_path / "calls"


@pytest.fixture
def cluster(calls):
    with ray_cluster("--num-cpus=4", env=script(delay_s=0.5, max_batch=8, count=str(calls))) as found:
        yield found


def submit(cluster: Cluster, name: str, out: Path, *settings: str, wait: bool = True):
    berth = [sys.executable, "-m", "pipeline", "run", "configs/quickstart.yaml", "--out", str(out)]
    berth += ["--set", "engine=tests.scripted:build", "--set", "ray.address=auto", *settings]
    options = ["--address", cluster.jobs, "--working-dir", str(ROOT), "--submission-id", name]
    return cluster.ray("job", "submit", *options, *(() if wait else ("--no-wait",)), "--", *berth)


def status(cluster: Cluster, name: str) -> str:
    said = cluster.ray("job", "status", "--address", cluster.jobs, name)
    words = ("SUCCEEDED", "FAILED", "STOPPED", "RUNNING", "PENDING")
    return next(word for word in words if word in (said.stdout + said.stderr).upper())


def actors(cluster: Cluster) -> str:
    """What lives on the cluster; a replica's name holds its application's."""
    return cluster.ray("list", "actors", "--address", cluster.jobs, "--filter", "state=ALIVE", "--detail").stdout


def test_a_job_is_submitted_watched_stopped_and_submitted_again(cluster, calls, tmp_path):
    suite, out = write_suite(tmp_path / "suite", ROWS), tmp_path / "out"

    bad = submit(cluster, "bad", out, "--set", "limt=3")
    assert bad.returncode == 1
    assert status(cluster, "bad") == "FAILED"
    assert "did you mean `limit`" in bad.stdout + bad.stderr
    assert not out.exists()

    more = ("--set", f"suite={suite}")
    started = submit(cluster, "first", out, *more, wait=False)
    assert started.returncode == 0, started.stderr
    wait_for(lambda: len(lines_in(calls)) > ROWS // 2)
    assert status(cluster, "first") == "RUNNING"
    assert "berth-" in actors(cluster)

    begun = time.monotonic()
    stopped = cluster.ray("job", "stop", "--address", cluster.jobs, "first")
    assert stopped.returncode == 0, stopped.stderr
    assert time.monotonic() - begun < 30
    assert status(cluster, "first") == "STOPPED"
    told = cluster.ray("job", "logs", "--address", cluster.jobs, "first").stdout
    assert "rollouts" in told
    assert "SIGTERM: stopped; repeat the command to resume" in told, "it was killed before it had ended by itself"
    wait_for(lambda: "berth-" not in actors(cluster), 60)
    finished = finished_rows(out)
    assert 0 < len(finished) < ROWS

    again = submit(cluster, "again", out, *more)
    assert again.returncode == 0, again.stdout + again.stderr
    assert status(cluster, "again") == "SUCCEEDED"
    frame = pd.read_parquet(out / "results")
    assert sorted(frame["task_id"]) == sorted(f"q{n}" for n in range(ROWS))
    assert (frame["status"] == "ok").all()
    computed = Counter(line.split()[0] for line in lines_in(calls))
    assert all(computed[row_id] == 3 for row_id in finished), "a finished row was computed again"

    repeated = submit(cluster, "repeated", out, *more)
    assert repeated.returncode == 0
    assert "already complete" in repeated.stdout + repeated.stderr
    assert json.loads((out / "summary.json").read_text())["rows"]["finished"] == ROWS

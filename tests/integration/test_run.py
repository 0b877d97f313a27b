"""The whole job on a real local Ray, with the scripted engine where the model is not the point."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pandas as pd
import psutil
import pytest

from bench.clusters import children, wait_for
from bench.scripted import finished_rows, lines_in, write_suite

pytestmark = pytest.mark.timeout(1200)  # a busy machine takes minutes to start Ray
ROOT = Path(__file__).parents[2]
QUICKSTART = ROOT / "configs" / "quickstart.yaml"


def command(out: Path, *more: str, engine: str = "tests.scripted:build") -> list[str]:
    base = [sys.executable, "-m", "pipeline", "run", str(QUICKSTART), "--out", str(out), "--set", f"engine={engine}"]
    return [*base, *more]


def run(argv: list[str], script: dict | None = None, **options) -> subprocess.CompletedProcess[str]:
    env = os.environ | {"BERTH_SCRIPT": json.dumps(script or {})}
    return subprocess.run(argv, cwd=ROOT, env=env, capture_output=True, text=True, timeout=560, **options)


def rows_of(out: Path) -> pd.DataFrame:
    return pd.read_parquet(out / "results")


def test_a_run_completes_and_its_repetition_changes_nothing(tmp_path):
    out = tmp_path / "out"
    done = run(command(out, "--limit", "20", "--json"))
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)
    assert summary["rows"]["finished"] == 20
    frame = rows_of(out)
    assert frame["row_id"].is_unique
    assert len(frame) == 20
    assert (frame["num_steps"] == 3).all()
    assert not (out / "journal").exists()
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file() and path.name != ".lock"}
    again = run(command(out, "--limit", "20"))
    assert again.returncode == 0
    assert "already complete" in again.stdout
    assert before == {path: path.stat().st_mtime_ns for path in before}

    changed = run(command(out, "--limit", "20", "--set", "seed=7"))
    assert changed.returncode == 2
    assert "seed: was 0, is now 7" in changed.stderr

    scored = run([sys.executable, "-m", "pipeline", "score", str(out), "--scorer", "f1", "--json"])
    assert scored.returncode == 0, scored.stderr
    assert len(pd.read_parquet(out / "rescored")) == 20


@pytest.mark.parametrize(
    "victim",
    ["driver", *(pytest.param(victim, marks=pytest.mark.slow) for victim in ("agent", "replica", "engine"))],
)
def test_kill_9_in_the_middle_loses_nothing_and_repeats_nothing(tmp_path, victim):
    suite, out, calls = write_suite(tmp_path / "suite", 120), tmp_path / "out", tmp_path / "calls"
    script = {"delay_s": 0.3, "max_batch": 8, "count": str(calls)}
    argv = command(out, "--set", f"suite={suite}")
    env = os.environ | {"BERTH_SCRIPT": json.dumps(script)}
    with subprocess.Popen(argv, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        wait_for(lambda: len(lines_in(calls)) > 150)
        if victim == "driver":
            process.kill()
        else:
            title = {"agent": "MapWorker", "replica": "ServeReplica", "engine": "actors.process"}[victim]
            [target, *_] = wait_for(lambda: children(process.pid, title))
            target.kill()
        output = process.communicate(timeout=560)[0].decode()
    if victim == "driver":
        wait_for(
            lambda: not [p for p in psutil.process_iter(["cmdline"]) if str(out) in " ".join(p.info["cmdline"] or [])]
        )
        finished = finished_rows(out)
        assert 0 < len(finished) < 120
        again = run(argv, script)
        assert again.returncode == 0, again.stdout + again.stderr
    else:
        assert process.returncode == 0, output
    frame = rows_of(out)
    assert sorted(frame["task_id"]) == sorted(f"q{n}" for n in range(120))
    assert (frame["status"] == "ok").all()
    repeated = Counter(line.split()[0] for line in lines_in(calls))
    if victim == "driver":
        assert all(repeated[row_id] == 3 for row_id in finished), "a finished row was computed again"
    assert sum(count > 3 for count in repeated.values()) <= 20, "more than what was in flight was repeated"
    attempts = pd.read_parquet(out / "attempts")
    assert (attempts["outcome"] == "ok").sum() == 120


def test_a_second_run_in_the_same_folder_is_refused(tmp_path):
    out = tmp_path / "out"
    env = os.environ | {"BERTH_SCRIPT": json.dumps({"delay_s": 60})}
    argv = command(out, "--limit", "2")
    with subprocess.Popen(argv, cwd=ROOT, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        wait_for(lambda: list((out / "journal").glob("*.jsonl")))
        second = run(argv)
        process.send_signal(signal.SIGTERM)
        started = time.monotonic()
        assert process.wait(timeout=30) == 3
        assert time.monotonic() - started < 3
    assert second.returncode == 2
    assert "another run is at work in this folder" in second.stderr


@pytest.mark.parametrize("engine", ["paged", pytest.param("reference", marks=pytest.mark.slow)])
def test_the_real_model_on_a_few_questions(tmp_path, engine):
    done = run(command(tmp_path / "out", "--limit", "2", engine=engine))
    assert done.returncode == 0, done.stdout + done.stderr
    frame = rows_of(tmp_path / "out")
    assert (frame["status"] == "ok").all()
    assert (frame["generated_tokens"] > 0).all()
    assert set(frame["dtype"]) == {"float32"}
    assert len(frame["model_revision"].iloc[0]) >= 16


def test_examples_custom_runs_from_a_folder_with_a_pipeline_of_its_own(tmp_path):
    shutil.copytree(ROOT / "examples" / "custom", tmp_path / "mine")
    (tmp_path / "pipeline").mkdir()
    (tmp_path / "pipeline" / "__init__.py").write_text("raise RuntimeError('the wrong pipeline')\n")
    berth = Path(sys.executable).parent / "berth"
    done = subprocess.run(
        [str(berth), "run", "mine/run.yaml", "--limit", "2", "--out", "out", "--set", "memory.max_batch=2"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=560,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    frame = rows_of(tmp_path / "out")
    assert (frame["status"] == "ok").all(), frame["error"].tolist()
    assert all("cite" in dict(scores) for scores in frame["scores"])

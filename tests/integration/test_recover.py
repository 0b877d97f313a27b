"""Memory runs out: rows move to the pool that has it, GPUs go with them and come back, on a real local Ray."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

from bench.scripted import script, write_suite
from tests.integration.test_run import QUICKSTART, ROOT, rows_of
from tests.integration.test_sharded import model  # noqa: F401

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
POOLS = "pools={single: {}, pair: {tensor_parallel_size: 2}}"
ROWS = 200


def recovered(out: Path, gpus: int, *settings: str, env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    argv = [sys.executable, "-m", "tests.integration.gpus_run", str(gpus), str(QUICKSTART), "--out", str(out)]
    for setting in (POOLS, *settings):
        argv += ["--set", setting]
    done = subprocess.run(argv, cwd=ROOT, env=os.environ | env, capture_output=True, text=True, timeout=900)
    print(done.stdout, done.stderr)
    return done


def scripted(tmp_path: Path, name: str, rows: int, **faults: object) -> tuple[str, pd.DataFrame, pd.DataFrame]:
    """What a run on two GPUs printed, its rows and its attempts."""
    suite, out = write_suite(tmp_path / "suite", rows), tmp_path / name
    env = script(delay_s=0.5, max_batch=4, **faults)
    done = recovered(out, 2, f"suite={suite}", "engine=tests.scripted:build", env=env)
    assert done.returncode == 0, done.stdout + done.stderr
    frame = rows_of(out).set_index("row_id")
    assert frame.index.is_unique
    assert len(frame) == rows
    return done.stdout, frame, pd.read_parquet(out / "attempts").set_index(["row_id", "attempt"])


def test_one_long_row_among_short_ones_on_two_gpus(tmp_path):
    """From its second step on it needs both."""
    long = "q20/0"
    said, frame, attempts = scripted(tmp_path, "out", ROWS, oom={long: [2, 1]})
    assert (frame["status"] == "ok").all(), frame["error"].tolist()
    assert tuple(frame.loc[long, ["pool", "rung", "tp", "attempts", "num_steps"]]) == ("pair", "shard", 2, 2, 3)
    first, second = attempts.loc[(long, 1)], attempts.loc[(long, 2)]
    assert (first["pool"], first["rung"], first["outcome"]) == ("single", "start", "failed")
    assert first["cause"] == "OutOfMemory: failed alone at the smallest bound: step 2 on 1 GPUs"
    assert (second["pool"], second["rung"], second["outcome"]) == ("pair", "shard", "ok")

    others = frame.drop(long)
    assert set(others["pool"]) == {"single"}
    assert set(others["tp"]) == {1}
    changes = [line.split(maxsplit=1)[1] for line in said.splitlines() if line.startswith("pools")]
    assert changes == ["single 0, pair 1", "single 2, pair 0"]
    ended = attempts["ended_at"]
    after = attempts[(attempts["pool"] == "single") & (ended > second["ended_at"])]
    assert len(after) > 20, "the singles have their GPUs again"
    assert (attempts["outcome"] == "failed").sum() == 1, "drained replicas end the calls they have"

    _, _, plain = scripted(tmp_path, "plain", ROWS)
    with_s, without_s = ((t["ended_at"].max() - t["started_at"].min()).total_seconds() for t in (attempts, plain))
    away_s = (second["ended_at"] - first["ended_at"]).total_seconds()
    print(json.dumps({"rows": ROWS, "with_s": with_s, "without_s": without_s, "long_row_s": away_s}))


def test_a_row_that_fits_nowhere_fails_with_its_numbers_and_alone(tmp_path):
    _, frame, attempts = scripted(tmp_path, "out", 40, oom={"q3/0": [2, 8]})
    assert (frame["status"] == "failed").sum() == 1
    assert tuple(frame.loc["q3/0", ["error_type", "attempts", "num_steps"]]) == ("infra", 2, 1)
    for words in ("needs 9.00 GiB, has 2.00 GiB", "batch 1", "no pool is sharded over more than 2"):
        assert words in frame.loc["q3/0", "error"]
    assert list(attempts.loc["q3/0"]["pool"]) == ["single", "pair"]
    assert list(attempts.loc["q3/0"]["outcome"]) == ["failed", "failed"]


def test_a_model_that_fits_no_single_gpu_starts_sharded(tmp_path):
    said, frame, _ = scripted(tmp_path, "out", 8, load=[2, 8])
    assert "the weights do not fit 1 GPUs; next: shard, bfloat16, KV auto, weights auto in pool pair" in said
    assert (frame["status"] == "ok").all()
    assert (set(frame["pool"]), set(frame["rung"]), set(frame["tp"])) == ({"pair"}, {"shard"}, {2})


def test_a_larger_pool_that_cannot_start_fails_the_rows_that_need_it_alone(tmp_path):
    said, frame, _ = scripted(tmp_path, "out", 60, oom={"q3/0": [2, 1]}, load=[1, 1])
    assert (frame["status"] == "failed").sum() == 1
    assert "the weights do not fit 2 GPUs; load on pair (tensor parallel 2" in frame.loc["q3/0", "error"]
    assert frame.loc["q3/0", "attempts"] <= 3
    assert "pools      single 0, pair 1" in said


@pytest.mark.parametrize(
    ("squeeze", "moved", "rung"),
    [
        # Steps of one rank run out of memory in the middle of four of six trajectories, whose peaks are 1,319 to 1,328.
        ({"tokens": {"1": 1321}}, 4, "shard"),
        # Its pool holds 1,792 tokens, less than the forecast: rows begin over two ranks.
        ({"pages": {"1": 8, "2": 64}}, 6, "start"),
    ],
)
def test_the_real_engine_over_two_ranks_goes_on_where_one_had_not_the_memory(tmp_path, model, squeeze, moved, rung):  # noqa: F811
    """On CPUs: the transcript so far is computed again, and the tokens are those of a run with memory enough."""
    settings = (f"model.id={model}", "engine=tests.squeezed:build", "limit=6", "memory.max_batch=4")
    frames, said = [], {}
    for name, env in (("small", squeeze), ("large", {})):
        more = (*settings, "memory.record_oom=trace")
        done = recovered(tmp_path / name, 0, *more, env={"BERTH_SQUEEZE": json.dumps(env)})
        assert done.returncode == 0, done.stdout + done.stderr
        said[name] = done.stdout
        frame = rows_of(tmp_path / name).set_index("row_id").sort_index()
        assert (frame["status"] == "ok").all(), frame["error"].tolist()
        frames.append(frame)
    small, large = frames
    print(small[["pool", "rung", "attempts", "tp", "peak_tokens"]])
    print(pd.read_parquet(tmp_path / "small" / "attempts")[["row_id", "attempt", "pool", "cause", "lost_gpu_s"]])
    tries = pd.read_parquet(tmp_path / "small" / "attempts")
    failed_at = set(tries[tries["cause"].fillna("").str.startswith("OutOfMemory: failed alone")]["replica"])
    traces = {path.parent.name for path in (tmp_path / "small" / "oom").glob("*/rank0-*.json.gz")}
    assert traces == failed_at, "named by the replica of the attempt"
    assert ("recorded in oom/" in said["small"]) is bool(failed_at)
    assert not (tmp_path / "large" / "oom").exists()
    assert set(large["pool"]) == {"single"}
    there = small[small["pool"] == "pair"]
    assert len(there) == moved
    assert (set(there["tp"]), set(there["rung"])) == ({2}, {rung})
    steps = [[[(step["thought"], step["action"]) for step in row] for row in frame["trajectory"]] for frame in frames]
    assert steps[0] == steps[1]


def test_no_token_depends_on_where_memory_runs_out_and_what_fits_nowhere_fails_alone(tmp_path):
    """As on GPUs (bench/recover.py), with errors where tests/squeezed.py says so."""
    argv = [sys.executable, "-m", "bench.recover", "--device", "cpu", "--slower", "4", "--work", str(tmp_path / "work")]
    for name in ("roomy", "capped", "squeezed", "sharded", "nowhere", "alone"):
        argv += ["--only", name]
    done = subprocess.run([*argv, "--out", str(tmp_path / "out.json")], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    found = {line["case"]: line for line in json.loads((tmp_path / "out.json").read_text())["results"]}
    print({name: (line["events"], line["causes"]) for name, line in found.items()})
    assert found["capped"]["events"]["single"]["prefill_halved"] > 0
    assert found["squeezed"]["events"]["single"]["waits"] > 0

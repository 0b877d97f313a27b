"""Pools from zero GPUs and back, on Ray's autoscaler with fake nodes."""

import json
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

from tests.integration.test_run import ROOT, rows_of

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]


def autoscaled(out: Path, *options: str) -> tuple[list[dict], dict, str]:
    """Samples, their summary and what the run said."""
    argv = [sys.executable, "-m", "bench.autoscaling", *options, "--out", str(out)]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, timeout=1100)
    assert done.returncode == 0, done.stdout + done.stderr
    document = json.loads(out.read_text())
    [result] = document["results"]
    return result["samples"], document["summary"]["berth, scripted"], done.stderr


def test_a_pool_starts_at_zero_on_demand_and_goes_back_to_zero(tmp_path):
    picture = tmp_path / "autoscaling.png"
    samples, summary, _ = autoscaled(tmp_path / "autoscaling.json", "--rows", "300", "--plot", str(picture))
    assert picture.stat().st_size > 0
    assert samples[0]["nodes"] == {"head": 1}
    assert samples[-1]["nodes"] == {"head": 1}
    assert samples[-1]["replicas"] == {}
    assert samples[-1]["calls"] == 3 * 300
    assert summary["gpu_node_s"] <= summary["replica_s"] < summary["run_ended_s"] < summary["no_node_s"]
    assert 1 <= summary["most_replicas"] <= 2
    assert summary["most_gpu_nodes"] <= 2
    assert summary["most_other_gpu_nodes"] == 0, "nodes that no pool asked for"


def test_a_gang_has_a_node_brought_for_a_row_and_no_replica_is_drained_for_it(tmp_path):
    """The smallest pool is a range, so that Serve scales it; one row of 400 needs two GPUs from its second step on."""
    long, rows = "q110/0", 400
    settings = ("--rows", str(rows), "--long", long, "--work", str(tmp_path))
    samples, _, said = autoscaled(tmp_path / "autoscaling.json", *settings)
    frame = rows_of(tmp_path / "out").set_index("row_id")
    assert frame.index.is_unique
    assert len(frame) == rows
    assert (frame["status"] == "ok").all(), frame["error"].tolist()
    assert tuple(frame.loc[long, ["pool", "rung", "tp", "attempts", "num_steps"]]) == ("pair", "shard", 2, 2, 3)
    assert set(frame.drop(long)["pool"]) == {"single"}
    attempts = pd.read_parquet(tmp_path / "out" / "attempts").set_index(["row_id", "attempt"])
    assert (attempts["outcome"] == "failed").sum() == 1, "no replica went with calls under way"

    def at(time: pd.Timestamp) -> float:
        """In seconds of the samples."""
        return round(time.timestamp() - samples[0]["at"], 1)

    wanted_s, row_s = at(attempts.loc[(long, 1), "ended_at"]), at(attempts.loc[(long, 2), "ended_at"])
    ended_s = at(attempts["ended_at"].max())
    there = [one["s"] for one in samples if one["nodes"].get("sharded")]
    up = [one["s"] for one in samples if one["pools"].get("pair")]
    gone_s = next(one["s"] for one in samples if one["s"] > there[-1])
    singles = [one["pools"].get("single", 0) for one in samples if wanted_s < one["s"] < gone_s]
    changes = [line.split(maxsplit=1)[1] for line in said.splitlines() if line.startswith("pools")]
    figures = {"wanted_s": wanted_s, "node_s": there[0], "replica_s": up[0], "row_s": row_s, "node_gone_s": gone_s}
    print(json.dumps(figures | {"last_row_s": ended_s, "singles": [singles[0], singles[-1]], "said": changes}))
    assert wanted_s < there[0] < row_s < gone_s < ended_s
    assert max(one["nodes"].get("sharded", 0) for one in samples) == 1
    assert singles[0] > 0
    assert singles == sorted(singles), "a small replica went"
    assert [change.rpartition("pair ")[2] for change in changes] == ["1", "0"]

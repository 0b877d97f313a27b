"""A pool from zero GPUs and back, on Ray's autoscaler with fake nodes."""

import json
import subprocess
import sys

import pytest

from tests.integration.test_run import ROOT

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]


def test_a_pool_starts_at_zero_on_demand_and_goes_back_to_zero(tmp_path):
    out, picture = tmp_path / "autoscaling.json", tmp_path / "autoscaling.png"
    argv = [sys.executable, "-m", "bench.autoscaling", "--rows", "300", "--out", str(out), "--plot", str(picture)]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, timeout=1100)
    assert done.returncode == 0, done.stdout + done.stderr
    assert picture.stat().st_size > 0
    document = json.loads(out.read_text())
    [result] = document["results"]
    samples, summary = result["samples"], document["summary"]["berth, scripted"]
    assert samples[0]["nodes"] == {"head": 1}
    assert samples[-1]["nodes"] == {"head": 1}
    assert samples[-1]["replicas"] == {}
    assert samples[-1]["calls"] == 3 * 300
    assert summary["gpu_node_s"] <= summary["replica_s"] < summary["run_ended_s"] < summary["no_node_s"]
    assert 1 <= summary["most_replicas"] <= 2
    assert summary["most_gpu_nodes"] <= 2
    assert summary["most_other_gpu_nodes"] == 0, "nodes that no pool asked for"

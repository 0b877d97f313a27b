"""Four replicas of different budgets that refuse what exceeds them, four agents, on a real local Ray."""

import json
import os
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pandas as pd
import pytest

from bench.clusters import children, wait_for
from bench.scripted import lines_in, script, write_suite
from tests.integration.test_run import QUICKSTART, ROOT, rows_of

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]
ROWS = 160
BUDGETS = [60, 80, 100, 120]  # pages of 16 tokens
# Every trajectory comes to hold 7; as far as the ledger knows it may be 32.
PRIOR = "prior: {steps: [3, 3, 3], tokens_per_step: [30, 40, 50]}\nlimits: {trajectory_tokens: 500}\n"


@pytest.mark.parametrize("victim", [None, "agent", "replica", "ledger"])
def test_budgets_are_kept_and_no_lease_is_left(tmp_path, victim):
    suite, out, log, states = (
        write_suite(tmp_path / "suite", ROWS),
        *(tmp_path / name for name in ("out", "log", "states")),
    )
    with (suite / "suite.yaml").open("a", encoding="utf-8") as file:
        file.write(PRIOR)
    argv = [sys.executable, "-m", "tests.integration.ledger_run", str(states), str(QUICKSTART), "--out", str(out)]
    for setting in (f"suite={suite}", "engine=tests.scripted:build", "pools.single.replicas=4"):
        argv += ["--set", setting]
    env = os.environ | script(delay_s=0.5, max_batch=64, budgets=BUDGETS, log=str(log))
    with subprocess.Popen(argv, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        if victim is not None:
            wait_for(lambda: len(lines_in(log)) > ROWS or process.poll() is not None, 600)
            title = {"agent": "MapWorker", "replica": "ServeReplica", "ledger": "ray::Ledger"}[victim]
            [target, *_] = wait_for(lambda: children(process.pid, title))
            target.kill()
        output = process.communicate(timeout=900)[0].decode()
    assert process.returncode == 0, output
    frame = rows_of(out)
    assert sorted(frame["task_id"]) == sorted(f"q{n}" for n in range(ROWS))
    assert (frame["status"] == "ok").all(), frame["error"].tolist()

    calls = [json.loads(line) for line in lines_in(log)]
    assert {call["budget"] for call in calls} == set(BUDGETS)
    assert all(call["used"] <= call["budget"] for call in calls)
    homes = defaultdict(set)
    for call in calls:
        homes[call["row"]].add(call["pid"])
    moved = [row for row, pids in homes.items() if len(pids) > 1]
    if victim is None:
        assert not moved
    elif victim == "ledger":
        assert len(moved) <= ROWS // 20
    seen = [json.loads(line) for line in lines_in(states)]
    most = {pid: max(call["used"] for call in calls if call["pid"] == pid) for pid in {call["pid"] for call in calls}}
    print(json.dumps({"victim": victim, "moved": len(moved), "most_pages": sorted(most.values())}))
    assert max(state["leases"] for state in seen) > 16, "one agent rolls out 16 at once"
    assert seen[-1]["leases"] == 0
    assert all(pages == 0 for pages in seen[-1]["charged_pages"].values())
    attempts = pd.read_parquet(Path(out) / "attempts")
    assert (attempts["outcome"] == "ok").sum() == ROWS
    ended = attempts[attempts["outcome"] == "ok"]
    assert (ended["kv_pages"] == 7).all()
    assert (ended["predicted_bytes"] > 0).all()

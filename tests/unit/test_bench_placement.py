"""The placement benchmark at a small size: every policy ends, none loses a row, the ledger keeps its promise."""

import json

import pytest

from bench import placement


@pytest.mark.slow
def test_every_policy_finishes_every_trajectory(tmp_path):
    step = {"thought": "I look for it. " * 6, "action": "Search[it]", "observation": "It is a thing. " * 20}
    replay = tmp_path / "replay.jsonl"
    replay.write_text("\n".join(json.dumps({"steps": [step] * steps}) for steps in (3, 4, 5)))
    out = tmp_path / "out.json"
    found = placement.main(
        ["--replay", str(replay), "--replicas", "8", "--trajectories", "1500", "--processes", "1", "--out", str(out)]
    )
    assert set(found) == set(placement.POLICIES)
    # Those of one seed come in a lump: a pool that is over stays so for some seconds, and each call counts.
    one = ["--replay", str(replay), "--replicas", "8", "--trajectories", "1500", "--policies", "ledger"]
    others = [placement.main([*one, "--seed", f"{seed}"])["ledger"]["overshoot"] for seed in range(1, 10)]
    assert (found["ledger"]["overshoot"] + sum(others)) / 10 <= 0.01
    assert found["ledger"]["generated_tok_s"] > found["worst_case"]["generated_tok_s"]
    assert json.loads(out.read_text())["bench"] == "placement"

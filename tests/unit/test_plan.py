"""What `berth plan` says, from folders that hold a config.json and nothing else."""

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from actors.engine import attention, memory
from bench import react_replay
from bench.common import model_config
from pipeline import hardware, plan
from pipeline.__main__ import app
from pipeline.config import load_run

ROOT = Path(__file__).parents[2]
QUICKSTART = str(ROOT / "configs" / "quickstart.yaml")
EXPECTED = plan.Expected(rows=1000, prompt=2000, shared=1800, p50=2800, p95=3600, worst=4096, steps=5.0, exact=True)
H100, H200 = hardware.GPUS[-2:]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Folders of the three published shapes, without weights and tokenizer."""
    root = tmp_path_factory.mktemp("shapes")
    for shape in ("8b", "32b", "70b"):
        model_config(shape).save_pretrained(root / shape)
    return root


def invoke(*args):
    result = CliRunner().invoke(app, ["plan", QUICKSTART, *args])
    return result.exit_code, result.stdout, result.stderr


# --- trajectories


def test_residents_keep_the_risk():
    for pool_tokens in (5_000, 50_000, 500_000):
        held = plan.residents(pool_tokens, EXPECTED, 256)
        assert plan.overflow_risk(held, pool_tokens, EXPECTED, 256) <= plan.RISK or held == 1
        assert plan.overflow_risk(held + 1, pool_tokens, EXPECTED, 256) > plan.RISK
    assert plan.residents(4000, EXPECTED, 256) == 0  # the longest trajectory would not fit


def test_residents_against_drawn_trajectories():
    pool_tokens = 60_000
    held = plan.residents(pool_tokens, EXPECTED, 256)
    deviation = (EXPECTED.p95 - EXPECTED.p50) / 1.645
    peaks = np.random.default_rng(0).normal(EXPECTED.p50, deviation, (20_000, held))
    shared = EXPECTED.shared // 256 * 256
    used = shared + (np.ceil((peaks - shared) / 256) * 256).sum(axis=1)
    assert 0.001 < (used > pool_tokens).mean() <= plan.RISK


# --- speed


def replay_work(repeat, row):
    traces, generate, prefix = react_replay.make_traces(256, repeat), 64, 1700
    contexts = [len(context) for trace in traces for context in trace.contexts()]
    longest = [len(trace.contexts()[-1]) for trace in traces]
    return hardware.Work(
        calls=row["calls"],
        prefill=row["prefilled_tokens"],
        prefill_context=prefix**2 / 2 + sum((last**2 - prefix**2) / 2 for last in longest),
        decode=len(contexts) * (generate - 1),
        decode_context=sum((generate - 1) * (context + generate / 2) for context in contexts),
        shared=prefix // 128 * 128,
    )


def test_efficiency_is_what_the_replay_reached():
    config = model_config("8b")
    found = memory.parameters(config)
    kv_bytes = memory.kv_token_bytes(config, memory.torch.bfloat16)
    shape = hardware.Shape(found.active, found.head, 36 * 32 * 128, 2 * found.read, 0, 1.0, kv_bytes)
    rows = json.loads((ROOT / "bench" / "results" / "react_replay_8b.json").read_text())["results"]
    reached, token_s = [], 25.5e-6  # of prefill, by profiled steps (docs/performance.md)
    for row in (row for row in rows if (row["cell"], row["engine"]) == ("256", "berth")):
        work = replay_work(row["repeat"], row)
        prefill_s, decode_s = hardware.run_seconds(work, shape, H100, 256, 1, hardware.Efficiency(1, 1, 0))
        took_s = token_s * row["prefilled_tokens"]
        left_s = row["wall_s"] - took_s - row["host_s"]
        reached.append((prefill_s / took_s, decode_s / left_s, row["host_s"] * 256 / work.decode))
        assert sum(hardware.run_seconds(work, shape, H100, 256)) == pytest.approx(row["wall_s"], rel=0.1)
    ours = hardware.Efficiency()
    assert (ours.prefill, ours.decode, ours.step_s) == pytest.approx(np.median(reached, axis=0), rel=0.01)


def test_sharding_is_as_fast_as_measured():
    """Two GPUs beside one."""
    sizes = json.loads((ROOT / "bench" / "results" / "tensor_parallel_compiled.json").read_text())["results"]
    single, pair = sorted(sizes, key=lambda one: one["tensor_parallel"])
    prefill, decode = pair["prefill_tok_s"] / single["prefill_tok_s"], single["decode_ms"] / pair["decode_ms"]
    whole = hardware.Shape(7_000_000_000, 600_000_000, 1, 16_000_000_000, 0, 1.0, 0)
    half = hardware.Shape(7_000_000_000, 600_000_000, 1, 8_000_000_000, 0, 1.0, 0)
    work = hardware.Work(calls=0, prefill=1e6, prefill_context=0, decode=1e4, decode_context=0)
    reached = hardware.Efficiency(step_s=0)
    one, two = (hardware.run_seconds(work, shape, H200, 64, tp, reached) for shape, tp in ((whole, 1), (half, 2)))
    assert one[0] / two[0] == pytest.approx(prefill, rel=0.01)
    assert one[1] / two[1] == pytest.approx(decode, rel=0.01)


def test_few_rows_read_few_experts():
    shape = hardware.Shape(3_000_000_000, 300_000_000, 1, 60_000_000_000, 58_000_000_000, 8 / 128, 0)
    work = hardware.Work(0, 0, 0, 1e4, 0)
    per_step = [
        hardware.run_seconds(work, shape, H200, rows, 1, hardware.Efficiency(1, 1, 0))[1] * rows for rows in (1, 64)
    ]
    assert per_step[0] / per_step[1] == pytest.approx((2 + 58 / 16) / (60 - 58 * (15 / 16) ** 64), rel=0.01)


# --- rungs


def test_rungs_follow_the_fallback():
    config = load_run(QUICKSTART)
    names = [(name, tp, batch, prefill) for name, tp, batch, prefill in plan.rungs(config, 8, 64, 8192)]
    assert names == [
        ("as it is", 1, 64, 8192),
        ("smaller batch", 1, 32, 4096),
        ("smaller batch", 1, 16, 2048),
        ("sharded ×2", 2, 64, 8192),
        ("sharded ×4", 4, 64, 8192),
        ("sharded ×8", 8, 64, 8192),
    ]
    assert [rung[0] for rung in plan.rungs(config, 3, 16, 8192)] == ["as it is"]
    sharded = load_run(QUICKSTART, ["fallback=[shard]", "pools.single.tensor_parallel_size=2"])
    assert [rung[1] for rung in plan.rungs(sharded, 8, 64, 8192)] == [2, 4, 8]


def options(folder, *sets):
    config = load_run(QUICKSTART, [f"model.id={folder}", *sets])
    return {option.gpu.name: option for option in plan.make_plan(config, hardware.GPUS).options if not option.cheaper}


def test_the_first_rung_that_fits(folders):
    rung = {shape: {name: option.rung for name, option in options(folders / shape).items()} for shape in ("8b", "70b")}
    assert set(rung["8b"].values()) == {"as it is"}
    assert rung["70b"] == {
        "A10G 24 GB": None,  # embedding and output layer, 4 GiB, are whole on each of eight
        "L4 24 GB": None,
        "A100 40 GB": "sharded ×8",
        "A100 80 GB": "sharded ×2",
        "H100 80 GB": "sharded ×2",
        "H200 141 GB": "sharded ×2",
    }
    # 19 GiB of 24 for weights and a page: a batch of 256 rows and a prefill of 32,768 tokens leave no room.
    tight = options(folders / "8b", "memory.max_prefill_tokens=65536")["A10G 24 GB"]
    assert tight.rung == "smaller batch"
    assert tight.memory.total_bytes <= 0.9 * tight.gpu.memory_bytes
    nothing = options(folders / "70b", "fallback=[smaller_batch]")["H100 80 GB"]
    assert (nothing.rung, nothing.at_once, nothing.hours, nothing.oom_risk) == (None, 0, None, 1.0)


def test_replicas_hours_and_cost(folders):
    one = options(folders / "70b", "price.usd_per_gpu_hour=2.5", "samples=100")["H200 141 GB"]
    assert one.gpu_hours == pytest.approx(2 * one.hours)
    assert one.usd == pytest.approx(2.5 * one.gpu_hours)
    fixed = options(folders / "70b", "samples=100", "pools.single.replicas=3")["H200 141 GB"]
    assert (fixed.replicas, fixed.usd) == (3, None)
    assert fixed.hours == pytest.approx(one.hours / 3)
    hurried = options(folders / "70b", "samples=100", f"limits.max_hours={one.hours / 4.5}")["H200 141 GB"]
    assert hurried.replicas == 5
    # Ten times the work takes ten times as long, once the batch is full.
    ten = options(folders / "70b", "samples=1000")["H200 141 GB"]
    assert ten.hours == pytest.approx(10 * one.hours, rel=0.01)


def test_more_memory_is_never_worse(folders):
    found = options(folders / "8b", "samples=100")
    order = ["A10G 24 GB", "A100 40 GB", "A100 80 GB", "H200 141 GB"]
    assert [found[name].at_once for name in order] == sorted(found[name].at_once for name in order)
    risks = [option.oom_risk for option in found.values()]
    assert all(0 <= risk <= 0.02 for risk in risks)


def test_what_the_rates_do_not_cover_has_no_time(folders):
    found = options(folders / "8b", "numerics=invariant")["H200 141 GB"]
    assert (found.rung, found.hours, found.memory.graph_bytes) == ("as it is", None, 0)
    assert found.memory.weights_bytes == 4 * 8_190_735_360
    code, out, _ = invoke("--set", f"model.id={folders / '8b'}", "--set", "fallback=memory_first")
    assert (code, "only smaller_batch and shard are planned" in out) == (0, True)


def test_the_cheaper_rung_is_named_too(folders):
    """Two A100 of 80 GB hold the weights of 70 B parameters and little else: four of them are cheaper."""
    config = load_run(QUICKSTART, [f"model.id={folders / '70b'}", "samples=1000"])
    a100 = next(gpu for gpu in hardware.GPUS if gpu.name == "A100 80 GB")
    first, better = plan.make_plan(config, [a100]).options
    assert (first.rung, first.cheaper, better.cheaper) == ("sharded ×2", False, True)
    assert better.gpu_hours <= 0.9 * first.gpu_hours
    assert better.at_once > first.at_once
    assert len(plan.make_plan(config, [H200]).options) == 1


def test_each_larger_pool_is_shown(folders):
    pools = "pools={single: {}, pair: {tensor_parallel_size: 2}, quad: {tensor_parallel_size: 4}}"
    config = load_run(QUICKSTART, [f"model.id={folders / '32b'}", pools])
    shown = [option for option in plan.make_plan(config, hardware.GPUS).options if not option.cheaper]
    of_h100 = [option for option in shown if option.gpu.name == "H100 80 GB"]
    assert [(option.pool, option.gpus) for option in of_h100] == [(None, 1), ("pair", 2), ("quad", 4)]
    assert of_h100[0].at_once < of_h100[1].at_once <= of_h100[2].at_once
    assert [option.hours is None for option in of_h100] == [False, True, True]
    code, out, _ = invoke("--set", f"model.id={folders / '32b'}", "--set", pools)
    lines = [line for line in out.splitlines() if line.startswith(("  pair:", "  quad:"))]
    assert (code, len(lines)) == (0, 2 * len(hardware.GPUS))
    assert "does not fit" in lines[0], "65 GB of weights on two GPUs of 24 GB"


def test_local_gpus_take_their_rates_from_the_table(monkeypatch):
    a100 = memory.Device("NVIDIA A100-SXM4-80GB", 79 << 30, (8, 0))
    h100 = memory.Device("NVIDIA H100 80GB HBM3", 79 << 30, (9, 0))
    other, old = memory.Device("NVIDIA A40", 45 << 30, (8, 6)), memory.Device("Tesla T4", 15 << 30, (7, 5))
    monkeypatch.setattr(memory, "local_devices", lambda: [h100, h100, a100, other, old])
    found = hardware.local_gpus()
    assert [(gpu.name, gpu.count, gpu.hopper) for gpu in found] == [
        ("here: NVIDIA H100 80GB HBM3", 2, True),
        ("here: NVIDIA A100-SXM4-80GB", 1, False),
        ("here: NVIDIA A40", 1, False),
    ]
    assert [gpu.memory_bytes_s for gpu in found] == [3.35e12, 2.039e12, None]


def test_fp8_is_planned_with_the_kernel_that_does_it(folders, monkeypatch):
    """Before compute capability 8.9 Triton has none: others copy what they read, and decode without graphs."""
    sets = [f"model.id={folders / '8b'}", "memory.kv_dtype=fp8"]
    found = plan.make_plan(load_run(QUICKSTART, sets), hardware.GPUS)
    kernels = {option.gpu.name: option.kernels[0] for option in found.options}
    assert kernels == {gpu.name: "triton" if gpu.capability >= (8, 9) else "flash_attn" for gpu in hardware.GPUS}
    [note] = [note for note in found.notes if "Triton" in note]
    assert note.startswith("A10G 24 GB, A100 40 GB, A100 80 GB: ")
    assert "flash_attn or torch_varlen" in note
    for option in found.options:
        assert (option.memory.graph_bytes == 0) == (option.kernels[0] != "triton")
    ampere = hardware.Gpu("here: NVIDIA A100", 79 << 30, 312e12, 2.039e12, (8, 0), count=1)
    monkeypatch.setattr(attention, "installed", lambda: ["triton"])
    here = plan.make_plan(load_run(QUICKSTART, sets), [ampere])
    assert [option.rung for option in here.options] == [None]
    assert any(note.startswith("here: NVIDIA A100: no attention kernel that is installed") for note in here.notes)
    monkeypatch.setattr(attention, "installed", lambda: ["triton", "torch_varlen"])
    assert plan.make_plan(load_run(QUICKSTART, sets), [ampere]).options[0].kernels == ("torch_varlen",)
    int8 = plan.make_plan(load_run(QUICKSTART, [sets[0], "memory.kv_dtype=int8"]), hardware.GPUS)
    assert {option.kernels[0] for option in int8.options} == {"triton"}
    assert not any("Triton" in note for note in int8.notes)


def test_a_local_gpu_is_not_sharded_beyond_what_is_there(folders):
    here = hardware.Gpu("here: NVIDIA H100", 79 << 30, 989e12, 3.35e12, (9, 0), count=1)
    config = load_run(QUICKSTART, [f"model.id={folders / '70b'}"])
    assert plan.make_plan(config, [here]).options[0].rung is None


# --- the command


@pytest.mark.parametrize("shape", ["8b", "32b", "70b"])
def test_plan_prints_every_gpu(folders, shape):
    code, out, _ = invoke("--set", f"model.id={folders / shape}", "--set", "price.usd_per_gpu_hour=2")
    assert code == 0
    for gpu in hardware.GPUS:
        line = next(line for line in out.splitlines() if line.startswith(gpu.name))
        assert any(words in line for words in ("as it is", "sharded ×", "batch ", "does not fit"))
        assert "$" in line or "does not fit" in line
        assert "likely" in line or "does not fit" in line
        assert "…" not in line
    assert "the folder has no tokenizer" in out
    assert "characters a token" in out


def test_plan_as_json(folders):
    code, out, err = invoke("--set", f"model.id={folders / '8b'}", "--json")
    document = json.loads(out)
    assert code == 0
    assert document["parameters"] == 8_190_735_360
    assert document["forecast"]["rows"] == 72
    assert document["forecast"]["exact"] is False
    first = document["options"][0]
    assert first["memory"]["total_bytes"] == first["memory"]["fixed_bytes"] + first["memory"]["pool_bytes"]
    assert not any(math.isnan(option["oom_risk"]) for option in document["options"])
    assert "H200 141 GB" in err


def test_plan_counts_with_the_tokenizer(smollm2):
    code, out, _ = invoke()
    assert code == 0
    assert "note" not in out
    config = load_run(QUICKSTART)
    found = plan.make_plan(config, hardware.GPUS[:1]).forecast
    assert found.exact
    assert 0 < found.shared < found.prompt < found.p50 < found.p95 <= found.worst == 2048


def test_plan_refuses_in_words(folders):
    code, _, err = invoke("--set", f"model.id={folders / '8b'}", "--set", "engine=reference")
    assert code == 2
    assert "only the paged engine" in err
    code, _, err = invoke("--set", f"model.id={folders / '8b'}", "--set", "pools.single.tensor_parallel_size=3")
    assert code == 2
    assert "pools: the model's KV heads cannot be split so (got 3); wants a divisor of 8" in err
    code, _, err = invoke("--set", "model.id=/nowhere/at/all")
    assert code == 2
    assert "no such file or folder" in err


def test_importing_plan_loads_no_torch():
    code = "import sys, pipeline.plan; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_risk_in_words():
    assert plan.risk_text(0.0) == "very unlikely (<0.1 %)"
    assert plan.risk_text(0.009) == "unlikely (0.9 %)"
    assert plan.risk_text(0.1) == "possible (10.0 %)"
    assert plan.risk_text(0.5) == "likely (50.0 %)"

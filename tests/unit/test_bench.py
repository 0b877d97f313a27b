"""The benchmarks run on a CPU with a tiny shape; their numbers mean nothing there."""

import gc
import json
import subprocess
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest
import torch

from bench import batch_sizes, engine_gpu, memory_model, react_replay, tensor_parallel
from bench.common import made_up_tokenizer, model_config
from bench.scripted import made_up_text

with warnings.catch_warnings():  # Ray Serve's own
    warnings.simplefilter("ignore", DeprecationWarning)
    from bench import host, job, replica

ROOT = Path(__file__).resolve().parents[2]


def test_replay(tmp_path, capsys):
    out = tmp_path / "made" / "replay.json"
    react_replay.main(
        "--shape tiny --device cpu --engines berth,hf_generate --trajectories 3,2 --repeats 2 --prefix 64 --generate 4 "
        f"--max-batch 4 --out {out}".split()
    )
    document = json.loads(out.read_text())
    assert set(document) == {"bench", "commit", "device", "versions", "workload", "results", "summary"}
    berth, peer = ([row for row in document["results"] if row["engine"] == name] for name in ("berth", "hf_generate"))
    assert [(row["cell"], row["repeat"]) for row in berth] == [("3", 0), ("3", 1), ("2", 0), ("2", 1)]
    assert [(row["cell"], row["repeat"]) for row in peer] == [("3", 0)]
    for mine, theirs in zip(berth, peer, strict=False):
        assert mine["generated_tokens"] == theirs["generated_tokens"] == 4 * mine["calls"]
        assert mine["prefilled_tokens"] + mine["reused_tokens"] == theirs["prefilled_tokens"]
        assert mine["reused_tokens"] > theirs["reused_tokens"] == 0
        assert 0 < mine["prefill_s"] + mine["decode_s"] <= mine["wall_s"]
    assert min(row["prefilled_tokens"] for row in berth) > 64  # none finds another's text in the cache
    for name in ("berth", "hf_generate"):
        assert document["summary"]["3"][name]["median_generated_tok_s"] > 0
        assert document["summary"]["3"][name]["ratio_to_limit"] > 0
        assert document["summary"]["3"][name]["ratio_to_vllm"] is None
    assert "ReAct replay" in capsys.readouterr().out


def test_replay_of_recorded_text(tmp_path):
    step = {"thought": "I look it up.", "action": "Search[Femme]", "observation": "Femme is a lesbian identity."}
    rows = [{"id": str(i), "question": f"What is question {i}?", "steps": [step] * (2 + i)} for i in range(2)]
    (tmp_path / "replay.jsonl").write_text("\n".join(map(json.dumps, rows)))
    document = react_replay.main(
        "--shape tiny --device cpu --trajectories 0 --replay-trajectories 5 --repeats 2 --generate 4 "
        f"--replay {tmp_path}/replay.jsonl".split()
    )
    first, second = document["results"]
    assert first["calls"] == second["calls"] == 2 + 3 + 2 + 3 + 2
    assert first["appended_tokens"] > 5 * 10
    # A repeat is other text: it finds nothing of the first in the cache.
    assert first["prefilled_tokens"] == pytest.approx(second["prefilled_tokens"], rel=0.1)


def test_reference_work():
    traces = react_replay.make_traces(256, 0)
    assert sum(trace.calls for trace in traces) == 1546
    assert traces[0].prompt[:1700] == traces[1].prompt[:1700]
    assert {108 <= len(step) <= 298 for trace in traces for step in trace.steps} == {True}


def test_limit():
    traces = react_replay.make_traces(256, 0)
    args = react_replay.parse(["--shape", "8b", "--device", "cuda"])
    limit = react_replay.limit(traces, 1700, args, {"matrix_flop_s": 800e12, "copy_bytes_s": 3e12})
    # 270,000 tokens of 7 billion parameters; 504 steps over 15 GB of weights and the rows' KV.
    assert limit["limit_prefill_s"] == pytest.approx(2 * 7e9 * 271_000 / 800e12, rel=0.15)
    assert limit["limit_decode_steps"] == 8 * 63
    assert 504 * 15.1e9 / 3e12 < limit["limit_decode_s"] < 504 * 40e9 / 3e12
    assert limit["limit_overlapped_s"] < limit["limit_s"]


def test_kernel_class():
    name = "void flash_fwd_splitkv_kernel<Flash_fwd_kernel_traits<128, 64, 128, 4, false, cutlass::bfloat16_t>>"
    assert react_replay.kernel_class(name) == "attention"
    assert react_replay.kernel_class("nvjet_hsh_128x256_64x4_2x1_v_bz_coopA_TNT") == "matrix product"


def test_checks(tmp_path):
    document = engine_gpu.main(
        "--shape tiny --device cpu --prompts 4 --max-prompt 60 --tokens 12 --page-tokens 8 --calls 40 --pages 30 "
        "--trajectories 2 --reuse-tokens 4 --reuse-page-tokens 64 --factors 0.5,1.5 "
        f"--out {tmp_path}/checks.json".split()
    )
    assert document["summary"] == {"a": "ok", "b": "skipped", "c": "ok", "d": "skipped", "e": "ok", "f": "ok"}
    bits = {result["name"]: result for result in document["results"] if result["check"] == "f"}
    assert {(one["kv_dtype"], one["weights_dtype"]) for one in bits.values()} == {
        ("int8", "float32"), ("fp8", "float32"), ("float32", "int8"), ("int8", "int8"),
    }  # fmt: skip
    assert bits["kv int8"]["error_mean"] < bits["kv fp8"]["error_mean"]
    preempted = [result for result in document["results"] if result["name"].endswith("preempted")]
    assert all(result["preemptions"] for result in preempted)


@pytest.mark.slow
def test_batch_sizes(tmp_path):
    document = batch_sizes.main(
        "--shape tiny --device cpu --trajectories 4 --prefix 300 --generate 2 --sizes 2 --largest 4 --workloads calls "
        f"--pressure 1.5 --seconds 60 --out {tmp_path}/sizes.json".split()
    )
    ledger, two = document["results"]
    assert [ledger["engine"], two["engine"]] == ["ledger", "2"]
    assert ledger["finished"]
    assert two["finished"]
    assert ledger["calls"] == two["calls"]
    assert (ledger["trajectories"], two["most_at_once"]) == (4, 2)
    assert ledger["oom"] == two["oom"] == 0 == ledger["again"]
    assert document["summary"]["calls"]["best_fixed"] == "2"
    assert document["summary"]["calls"]["ratio_to_best"] > 0


def test_batch_sizes_have_the_same_lengths_and_other_tokens():
    make = partial(batch_sizes.make_jobs, 50, 3, prefix=300, vocabulary=2_000)
    one, other = make(waits=True, salt="a"), make(waits=True, salt="b")
    assert [job.waits_s for job in one] == [job.waits_s for job in other]
    assert [list(map(len, job.trace.steps)) for job in one] == [list(map(len, job.trace.steps)) for job in other]
    assert one[0].trace.prompt != other[0].trace.prompt
    assert not any(map(any, (job.waits_s for job in make(waits=False, salt="a"))))
    rows = [
        {"workload": "calls", "engine": name, "generated_tok_s": speed, "oom": oom}
        for name, speed, oom in (
            ("ledger", 95.0, 0),
            ("keep", 100.0, 0),
            ("8", 50.0, 0),
            ("64", 200.0, 1),
            ("16", 90.0, 0),
        )
    ]
    found = batch_sizes.summarize(rows)["calls"]
    assert (found["best_fixed"], found["ratio_to_keep"]) == ("16", 0.95)
    assert found["ratio_to_best"] == pytest.approx(95 / 90)


def test_nothing_ends_early():
    assert model_config("8b").eos_token_id is None


@pytest.mark.slow
def test_tensor_parallel(tmp_path):
    out = tmp_path / "tp.json"
    tensor_parallel.main(f"--shape tiny --device cpu --sizes 1,2 --rows 4 --context 64 --out {out}".split())
    one, two = json.loads(out.read_text())["results"]
    assert (one["tensor_parallel"], two["tensor_parallel"]) == (1, 2)
    assert one["agreement"] == two["agreement"] == 1.0
    assert two["prefill_tok_s"] > 0 < two["decode_ms"]


def test_replica_rates():
    # 8 calls of 4 tokens by two processes, 2 at once: begun at 10 and 10.5, the last trajectory at 14.
    done = [replica.Done(10.0, 13.0, (11.0, 12.0, 13.0, 14.0)), replica.Done(10.5, 14.0, (12.0, 13.0, 15.0, 18.0))]
    row = replica.row("serve", 0, done, generate=4, at_once=2)
    assert (row["calls"], row["wall_s"], row["calls_s"], row["generated_tok_s"]) == (8, 8.0, 1.0, 4.0)
    assert row["steady_tok_s"] == 3 * 4 / 2  # behind the second call's end at 12: at 13, 13 and 14
    bare = row | {"engine": "engine", "generated_tok_s": 5.0, "steady_tok_s": 9.0}
    summary = replica.summarize([bare, bare | {"engine": "matcher"}, row])
    assert summary["serve"]["cost"] == pytest.approx(0.25)
    assert summary["serve"]["steady_cost"] == pytest.approx(0.5)
    assert summary["matcher"]["cost"] == summary["engine"]["steady_cost"] == 0.0


def test_replica_work_is_as_long_in_every_way_and_shares_nothing():
    traces = react_replay.make_traces(3, 0, prefix=64, vocabulary=2048)
    first, second = (replica.shifted(traces, by, 2048) for by in (1, 2))
    assert [[len(step) for step in trace.contexts()] for trace in first] == [
        [len(step) for step in trace.contexts()] for trace in traces
    ]
    assert first[0].prompt[0] != second[0].prompt[0] != traces[0].prompt[0]
    assert {1000 <= token < 2048 for trace in first for token in trace.prompt} == {True}
    assert not {trace.id for trace in first} & {trace.id for trace in second}


def test_made_up_words():
    tokenizer = made_up_tokenizer(2048)
    assert len(tokenizer) == 2048
    assert len(tokenizer.decode([1000, 2047]).split()) == 2
    assert tokenizer.decode(tokenizer.encode("Action 1:\n")) == "Action 1:\n"
    text = made_up_text("seed", 20)
    assert len(tokenizer.encode(text)) == 20
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.slow
def test_replica(tmp_path):
    argv = (
        "--shape tiny --device cpu --trajectories 6 --at-once 4 --repeats 1 --prefix 64 --generate 4 "
        f"--models {tmp_path} --out {tmp_path}/replica.json".split()
    )
    subprocess.run([sys.executable, "-m", "bench.replica", *argv], cwd=ROOT, check=True, timeout=280)
    document = json.loads((tmp_path / "replica.json").read_text())
    assert [row["engine"] for row in document["results"]] == ["engine", "matcher", "serve"]
    assert {row["calls"] for row in document["results"]} == {document["results"][0]["calls"]}
    assert any("first token" in line for line in document["workload"]["start"])


@pytest.mark.slow
def test_job(tmp_path):
    argv = (
        "--shape tiny --device cpu --trajectories 24 --max-batch 8 --seconds 8 --ramp 1 --prefix 64 "
        f"--models {tmp_path} --out {tmp_path}/job.json".split()
    )
    subprocess.run([sys.executable, "-m", "bench.job", *argv], cwd=ROOT, check=True, timeout=280)
    document = json.loads((tmp_path / "job.json").read_text())
    mine, alone = document["results"]
    assert (mine["engine"], mine["failed"], alone["engine"]) == ("job", 0, "engine")
    assert mine["rows"] > 0
    assert 0 < alone["calls"] <= mine["calls"]
    assert document["summary"]["job"]["steady_cost"] > -1


def test_host(tmp_path):
    out = tmp_path / "host.json"
    threads, thresholds = torch.get_num_threads(), gc.get_threshold()
    try:
        host.main(f"--max-batch 8 --at-once 12 --calls 60 --generate 6 --repeats 1 --out {out}".split())
    finally:
        torch.set_num_threads(threads)
        gc.set_threshold(*thresholds)
    rows = json.loads(out.read_text())["results"]
    assert [row["engine"] for row in rows] == ["plain", "matcher"]
    assert all(0 < row["replay_ms_step"] < row["cpu_ms_step"] for row in rows)
    assert all(row["decode_steps"] > row["prefill_steps"] > 0 for row in rows)


def test_job_steady_rates():
    ended = [(10.0, 4), (11.5, 4), (12.0, 6), (14.0, 8), (20.0, 8)]
    steps = [job.Step(at, at == 13, 4, 8, 5, 6, 0.1, 0.2, 0.1, 0.0) for at in (10.5, 12.0, 13.0, 14.0, 16.0)]
    seen = {"ended": ended, "steps": steps, "between": [(10.5, 9.0), (12.0, 1.0), (13.0, 2.0)]}
    row = job.row("job", seen, ramp=1.0, seconds=5.0)  # from 11 to 15
    assert (row["calls"], row["steady_s"], row["calls_s"], row["steady_tok_s"]) == (5, 4.0, 0.75, 4.5)
    assert (row["decode_steps_s"], row["prefill_steps_s"], row["running"], row["between_s"]) == (0.5, 0.25, 5, 1.5)
    row = job.row("engine", seen | {"ended": ended[:4]}, ramp=1.0, seconds=60.0)  # no more work behind 14
    assert (row["steady_s"], row["steady_tok_s"]) == (3.0, 6.0)
    row = job.row("engine", seen | {"full_s": 13.0}, ramp=1.0, seconds=60.0)  # fewer and fewer rows behind 13
    assert (row["steady_s"], row["steady_tok_s"], row["decode_steps_s"]) == (2.0, 5.0, 0.5)


def test_memory_model(tmp_path, monkeypatch):
    monkeypatch.setattr(memory_model, "ProcessPoolExecutor", lambda count, mp_context: ThreadPoolExecutor(count))
    document = memory_model.main(
        "--shapes tiny --device cpu --settings float32:64:4:graphs,float32:32:2:eager,float33:32:2:eager "
        "--prompt-tokens 40 "
        f"--out {tmp_path}/memory.json".split()
    )
    assert json.loads((tmp_path / "memory.json").read_text())["bench"] == "memory_model"
    summary = document["summary"]["berth"]
    assert summary["weights"] == {"measured": 2, "within_goal": 2, "largest_error_mib": 0.0}
    assert summary["activation"]["measured"] == 0  # a CPU keeps no count
    assert {row["generated_tokens"] for row in document["results"]} == {4 * 8, 2 * 8}
    assert list(document["workload"]["failed"]) == ["tiny float33:32:2:eager"]  # and it cost no other


def test_memory_goals():
    mib = 1 << 20
    predicted = {"weights_bytes": 1150 * mib, "pool_bytes": 9000 * mib, "all but the pool": 2000 * mib}
    measured = {"weights_bytes": 1000 * mib, "pool_bytes": 8000 * mib, "all but the pool": 2200 * mib}
    found = {"predicted": predicted, "measured": measured, "generated_tokens": 1, "captured": 0}
    rows = memory_model.compare("tiny", "bfloat16:1:1:eager", found)
    # 15 % but 150 MiB; 12.5 % and 1,000 MiB; 9 %.
    assert [row["within_goal"] for row in rows] == [True, False, False]
    assert memory_model.summarize(rows)["pool"] == {"measured": 1, "within_goal": 0, "largest_error_mib": 1000.0}

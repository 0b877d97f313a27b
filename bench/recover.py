"""Memory runs out on real GPUs, and ranks are lost: what becomes of the rows, through the whole job.

capped     the configured batch and prefill do not fit under a cap: tokens equal those of `roomy`
squeezed   another process takes all of the GPU's memory again and again: tokens equal those of `roomy`
sharded    a model that fits no single GPU, by a cap, starts on two: tokens equal those of `roomy`
long       one row too long for one GPU among many on two GPUs; and the same run without it
nowhere    a row that fits nowhere fails with its numbers, its neighbours complete
alone      a row whose own steps run out of memory at the smallest bound fails, its neighbours complete; on a CPU only
half       `memory_first`: a model that fits in half precision only; on a GPU only
eight      `memory_first`: the longest row's KV fits in int8 only; on a GPU only
stopped    a model that fits nowhere stops the run with the reasons, exit code 3
lost       as `sharded`, with its tokens; in its middle kill -9 of rank 1, of rank 0 (the engine's process) and of the
           replica, and SIGSTOP of rank 1

Each case is a run of `python -m pipeline run` on a local Ray, with a random model that the benchmark writes: what it
says is noise, so that each row takes as many steps as it may. On a CPU Ray is told of two GPUs, and memory runs out
where tests/squeezed.py says so. Exits 0 only if all hold.

    python -m bench.recover --work /tmp/recover --out bench/results/recover.json
    python -m bench.recover --device cpu --only capped --only lost
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Generator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
import psutil
import torch

from actors.engine.memory import kv_token_bytes, predict, weights_bytes
from bench.clusters import Job, wait_for
from bench.common import SHAPES, default_device, device_info, model_config, print_table, write_json
from bench.engine_gpu import GRABBER
from bench.scripted import begun_rows, finished_rows, write_suite

MIB = 1 << 20
AGENT = {"max_steps": 3, "max_tokens": {"thought": 48, "action": 24, "answer": 24}}
# Else a forecast begins at what the limits allow, four times what a row takes, and small pools stand empty.
PRIOR = "prior: {steps: [4, 4, 4], tokens_per_step: [140, 160, 200]}\n"
PAIR = {"single": {}, "sharded": {"tensor_parallel_size": 2}}
ALONE = {"single": {"replicas": 1}}
FAULTS = (
    ("rank 1", "ray::Rank", signal.SIGKILL),
    ("rank 0", "actors.process", signal.SIGKILL),
    ("the replica", "ray::ServeReplica", signal.SIGKILL),
    ("rank 1", "ray::Rank", signal.SIGSTOP),
)


@dataclass(frozen=True, slots=True)
class Kit:
    """How a case is made on one kind of device.

    Attributes:
        rows: of a run without a long row.
        own: characters, and tokens, that each of them has for itself.
        many: rows beside a long one.
        enough: rows for all of FAULTS, one after the other.
        longer: characters, and tokens, that the long row has more than others.
        longest: tokens that a suite with such a row allows.
        hung_s: `limits.max_step_s` where a rank is stopped.
        flips: rows that may differ by rounding where sums over ranks are in another order.
    """

    shape: str
    engine: str
    rows: int
    own: int
    many: int
    enough: int
    longer: int
    longest: int
    max_model_len: int
    hung_s: float
    flips: int

    @property
    def cuda(self) -> bool:
        """On GPUs; else Ray is told of two."""
        return self.engine == "paged"


GPU = Kit("1.7b", "paged", 24, 500, 200, 80, 20_000, 24_000, 3072, 15.0, 2)
CPU = Kit("tiny", "tests.squeezed:build", 4, 0, 110, 80, 1_500, 4096, 8192, 30.0, 0)


@dataclass(slots=True)
class Found:
    """What a case showed; `problems` are what it should have."""

    numbers: dict[str, Any] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def expect(self, holds: Any, otherwise: str) -> None:
        """Note a problem unless it holds."""
        if not holds:
            self.problems.append(otherwise)


class Bench:
    """Makes runs, and reads what they left.

    Args:
        work: folder of the model, the suites and the runs.

    Attributes:
        until_s: of the monotonic clock, when the case at work must have ended.
    """

    def __init__(self, work: Path, kit: Kit):
        self.work, self.kit = work, kit
        self.until_s = float("inf")
        folder = work / "models" / kit.shape
        if not folder.exists():  # by a process of its own, which leaves nothing on the GPU
            made = "from bench.replica import write_model; from pathlib import Path; import sys"
            made += "; write_model(Path(sys.argv[1]), *sys.argv[2:])"
            device = "cuda" if kit.cuda else "cpu"  # in float32 on a CPU
            subprocess.run([sys.executable, "-c", made, str(folder), kit.shape, device], check=True)
        self.model = folder

    def left_s(self) -> float:
        """Seconds that the case at work has."""
        return max(1.0, self.until_s - time.monotonic())

    def cap(self, dtype: torch.dtype, room_bytes: float, config: dict[str, Any]) -> float:
        """`memory.gpu_memory_fraction` under which an engine has so many bytes beside all that it needs."""
        memory = config["memory"]
        found = predict(
            model_config(self.kit.shape),
            dtype=dtype,
            max_prefill_tokens=memory["max_prefill_tokens"],
            max_batch=memory["max_batch"],
            max_model_len=config["model"]["max_model_len"],
        )
        total = torch.cuda.get_device_properties(0).total_memory
        return (found.fixed_bytes + room_bytes) / (0.9 * total)

    def config(
        self, name: str, rows: int, *, dtype: str, own: int = 0, long: int = 0, **changes: Any
    ) -> dict[str, Any]:
        """Of a run; with `own` more characters in each question, and `long` in that of one row in its middle."""
        longer = dict.fromkeys(range(rows), own) | ({rows // 2: long} if long else {})
        suite = write_suite(self.work / f"suite-{rows}-{own}-{long}", rows, longer=longer)
        with (suite / "suite.yaml").open("a", encoding="utf-8") as file:
            file.write(PRIOR + f"limits: {{trajectory_tokens: {self.kit.longest if long else 4096}}}\n")
        return {
            "suite": str(suite),
            "out": str(self.work / name),
            "model": {"id": str(self.model), "dtype": dtype, "max_model_len": self.kit.max_model_len},
            "engine": self.kit.engine,
            "agent": AGENT,
            "compile": "off",
            "speculation": "off",
            "memory": {"max_batch": 16 if self.kit.cuda else 4, "max_prefill_tokens": 512},
        } | changes

    @contextmanager
    def started(self, config: dict[str, Any], squeeze: dict[str, Any] | None = None, gpus: int = 2) -> Generator[Job]:
        """The run at work; it is ended with the block."""
        path = self.work / f"{Path(config['out']).name}.json"  # JSON is YAML
        path.write_text(json.dumps(config))
        env = os.environ | {"BERTH_SQUEEZE": json.dumps(squeeze or {}), "PYTHONUNBUFFERED": "1"}
        module = ["pipeline", "run"] if self.kit.cuda else ["tests.integration.gpus_run", str(gpus)]
        if self.kit.cuda and gpus == 1:
            env["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").partition(",")[0]
        job = Job([sys.executable, "-m", *module, str(path)], env)
        try:
            yield job
        finally:
            job.kill()
            (self.work / f"{Path(config['out']).name}.log").write_text(job.output())

    def until(self, job: Job, condition: Callable[[], Any]) -> Any:
        """What `condition` returns once it is true.

        Raises:
            RuntimeError: the run ended before.
        """
        found = wait_for(lambda: condition() or job.process.poll() is not None, self.left_s())
        if found is True and not condition():
            raise RuntimeError("it ended too soon:\n" + job.output()[-2000:])
        return condition() if found is True else found

    def finish(self, job: Job, config: dict[str, Any], found: Found, failed: int = 0) -> pd.DataFrame:
        """Wait for the end; the rows, of which each is there once and `failed` have failed."""
        code = job.end(self.left_s())
        said = job.output()
        if code:
            raise RuntimeError(f"it ended with {code}:\n{said[-2000:]}")
        frame = pd.read_parquet(Path(config["out"]) / "results").set_index("row_id").sort_index()
        attempts = pd.read_parquet(Path(config["out"]) / "attempts")
        info = json.loads((Path(config["out"]) / "run.json").read_text())
        causes = Counter(str(cause)[:160] for cause in attempts["cause"].dropna())
        found.numbers |= {
            "rows": len(frame),
            "failed": int((frame["status"] != "ok").sum()),
            "steps": float(frame["num_steps"].mean()),
            "events": info["engine_events"],
            "attempts": attempts["outcome"].value_counts().to_dict(),
            "causes": dict(causes.most_common(6)),
            "pools": frame["pool"].value_counts().to_dict(),
            "seconds_of_rollouts": span_s(attempts),
            "said": [line for line in said.splitlines() if line.startswith(("memory", "pools", "replicas", "  "))],
        }
        tasks = pd.read_parquet(Path(config["out"]) / "tasks")
        found.expect(frame.index.is_unique and len(frame) == len(tasks), "rows are lost or twice there")
        found.expect(found.numbers["failed"] == failed, f"{found.numbers['failed']} rows failed, not {failed}")
        return frame


def span_s(attempts: pd.DataFrame) -> float:
    """From the first attempt's start to the last one's end."""
    return (attempts["ended_at"].max() - attempts["started_at"].min()).total_seconds()


def steps_of(frame: pd.DataFrame) -> dict[str, list[tuple[str, str]]]:
    """What the model said, by row."""
    return {
        row_id: [(step["thought"], step["action"]) for step in row]
        for row_id, row in zip(frame.index, frame["trajectory"], strict=True)
    }


Case = Callable[[Bench], Found]
CASES: dict[str, tuple[Case, float, str]] = {}


def case(timeout_s: float, on: str = "cpu cuda") -> Callable[[Case], Case]:
    """Enter a function into the table; on GPUs it takes at most so long."""

    def enter(made: Case) -> Case:
        CASES[made.__name__] = (made, timeout_s, on)
        return made

    return enter


def roomy_config(bench: Bench, name: str) -> dict[str, Any]:
    """In float32, whose tokens should not depend on what is computed together."""
    prefill, batch = (65_536, 64) if bench.kit.cuda else (512, 4)
    memory = {"max_batch": batch, "max_prefill_tokens": prefill}
    kit = bench.kit
    return bench.config(name, kit.rows, dtype="float32", own=kit.own, memory=memory, pools=ALONE)


@case(150)
def roomy(bench: Bench) -> Found:
    """As `capped`, with memory enough."""
    found = Found()
    config = roomy_config(bench, "roomy")
    with bench.started(config, gpus=1) as job:
        frame = bench.finish(job, config, found)
    found.expect((frame["num_steps"] > 1).all(), "rows of one step")
    found.expect(not out_of_memory(found), "it ran out of memory")
    return found


def out_of_memory(found: Found) -> int:
    """Steps that ran out of memory."""
    events = found.numbers["events"].values()
    return sum(times.get(name, 0) for times in events for name in ("oom_prefill", "oom_decode"))


def compare(bench: Bench, frame: pd.DataFrame, found: Found, other: str = "roomy", flips: int = 0) -> None:
    """With those rows of a case that ran before that this one has as well; so many may differ."""
    path = bench.work / other / "results"
    if not path.exists():
        found.problems.append(f"it is compared with `{other}`, which has not run in this --work")
        return
    wanted = steps_of(pd.read_parquet(path).set_index("row_id").sort_index())
    mine = steps_of(frame)
    both = wanted.keys() & mine.keys()
    differ = sum(mine[row_id] != wanted[row_id] for row_id in both)
    found.numbers |= {"compared": len(both), "differ": differ}
    found.expect(both and differ <= flips, f"{differ} of {len(both)} rows differ from those of `{other}`")


@case(150)
def capped(bench: Bench) -> Found:
    """The configured step does not fit, nor the next smaller one."""
    found = Found()
    config = roomy_config(bench, "capped")
    if bench.kit.cuda:
        weights = bench.cap(torch.float32, 0, config | {"memory": {"max_batch": 1, "max_prefill_tokens": 64}})
        total = torch.cuda.get_device_properties(0).total_memory
        config["memory"] |= {"gpu_memory_fraction": weights + 3072 * MIB / total}
    with bench.started(config, {"step_tokens": 100}, gpus=1) as job:
        frame = bench.finish(job, config, found)
    compare(bench, frame, found)
    found.expect(out_of_memory(found), "it did not run out of memory")
    return found


@contextmanager
def taker(bench: Bench) -> Generator[Callable[[], None]]:
    """Another process on the GPU: it takes what is free when the function is called, and when it is called again it
    begins to give it back for a moment and take it again, in turn."""
    cuda, taken = bench.kit.cuda, bench.work / "taken"
    # On a GPU what a step once had stays the engine's: the first one must find nothing.
    argv = [sys.executable, "-c", GRABBER, "2", "10", "wait"]
    if not cuda:
        again = f"while true; do sleep 3; rm {taken}; sleep 1; touch {taken}; done"
        argv = ["sh", "-c", f"echo ready; read go; touch {taken}; read go; {again}"]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdin is not None
        assert other.stdout is not None
        stdin = other.stdin
        if other.stdout.readline().strip() != "ready":
            raise RuntimeError("the process that takes the memory did not start")

        def go() -> None:
            stdin.write("go\n")
            stdin.flush()

        try:
            yield go
        finally:
            other.kill()
            taken.unlink(missing_ok=True)


@case(150)
def squeezed(bench: Bench) -> Found:
    """From the first row's start on."""
    found = Found()
    config = roomy_config(bench, "squeezed")
    if bench.kit.cuda:
        config["memory"]["max_prefill_tokens"], config["memory"]["max_batch"] = 8192, bench.kit.rows
    with taker(bench) as take, bench.started(config, {"taken": str(bench.work / "taken")}, gpus=1) as job:
        bench.until(job, lambda: "\nreplicas" in job.output())
        take()
        bench.until(job, lambda: begun_rows(bench.work / "squeezed"))
        take()
        frame = bench.finish(job, config, found)
    compare(bench, frame, found)
    found.expect(out_of_memory(found), "it did not run out of memory")
    return found


def tight_config(bench: Bench, name: str, rows: int, **changes: Any) -> dict[str, Any]:
    """Of a model whose weights in float32 take a little more than a GPU has, with the questions of `roomy`."""
    kit = bench.kit
    config = bench.config(name, rows, dtype="float32", own=kit.own, **changes)
    if kit.cuda:
        total = torch.cuda.get_device_properties(0).total_memory
        weights = weights_bytes(model_config(kit.shape), torch.float32)
        config["memory"]["gpu_memory_fraction"] = 0.995 * weights / (0.9 * total)
    return config


def starts_sharded(frame: pd.DataFrame, found: Found) -> None:
    """The smallest pool was passed over."""
    said = "\n".join(found.numbers["said"])
    found.expect("next: shard" in said, "it did not say that it starts sharded")
    where = (set(frame["pool"]), set(frame["rung"]), set(frame["tp"]))
    found.expect(where == ({"sharded"}, {"shard"}, {2}), f"rows ran in {where}")


@case(240)
def sharded(bench: Bench) -> Found:
    """The weights fit two GPUs only, of which each holds some 60 %. On GPUs a row or two may differ, for ranks sum in
    another order."""
    found = Found()
    config = tight_config(bench, "sharded", bench.kit.enough, pools=PAIR)
    with bench.started(config, {"load": 2}) as job:
        frame = bench.finish(job, config, found)
    starts_sharded(frame, found)
    compare(bench, frame, found, flips=bench.kit.flips)
    return found


@case(540)
def lost(bench: Bench) -> Found:
    """FAULTS, one after the other."""
    found = Found()
    config = tight_config(bench, "lost", bench.kit.enough, pools=PAIR)
    config["limits"] = {"max_attempts": 8, "max_step_s": bench.kit.hung_s}
    out = Path(config["out"])
    faults: list[dict[str, Any]] = []
    with bench.started(config, {"load": 2}) as job:

        def more(rows: int) -> None:
            before = len(finished_rows(out))
            bench.until(job, lambda: len(finished_rows(out)) >= before + rows)

        for victim, title, how in FAULTS:
            more(3)
            gang = [one for kind in ("ray::Rank", "ray::ServeReplica", "actors.process") for one in job.children(kind)]
            [target, *_] = [process for process in gang if title in " ".join(process.cmdline())]
            nvls = target.environ().get("NCCL_NVLS_ENABLE")
            found.expect(nvls == os.environ.get("NCCL_NVLS_ENABLE"), f"a rank had NCCL_NVLS_ENABLE={nvls}")
            target.send_signal(how)
            since = time.monotonic()
            _, left = psutil.wait_procs(gang, bench.kit.hung_s + 60)
            found.expect(not left, f"{len(left)} processes outlived {how.name} of {victim}")
            gone_s = time.monotonic() - since
            more(4)
            faults.append(
                {
                    "victim": victim,
                    "signal": how.name,
                    "gang_gone_s": gone_s,
                    "rows_again_s": time.monotonic() - since,
                }
            )
            print(faults[-1], flush=True)
            found.numbers["faults"] = faults
        frame = bench.finish(job, config, found)
    starts_sharded(frame, found)
    compare(bench, frame, found, "sharded", bench.kit.flips)
    lost_attempts = sum(times for outcome, times in found.numbers["attempts"].items() if outcome != "ok")
    found.expect(lost_attempts, "no attempt was lost: the faults came too late")
    return found


def long_config(
    bench: Bench, name: str, rows: int, long: int, pools: dict[str, Any], pool_tokens: int = 12_000
) -> dict[str, Any]:
    """On GPUs each single has a KV pool of so many tokens at most."""
    kit = bench.kit
    config = bench.config(name, rows, dtype="bfloat16" if kit.cuda else "float32", long=long, pools=pools)
    config["model"]["max_model_len"] = SHAPES[kit.shape]["max_position_embeddings"]
    if kit.cuda:
        pool_bytes = pool_tokens * kv_token_bytes(model_config(kit.shape), torch.bfloat16)
        config["memory"]["gpu_memory_fraction"] = bench.cap(torch.bfloat16, pool_bytes, config)
    return config


@case(540)
def long(bench: Bench) -> Found:
    """The singles are drained, the row finishes on the pair, the GPUs come back."""
    found, plain = Found(), Found()
    squeeze = {"pages": {"1": 8, "2": 64}}
    config = long_config(bench, "long-without", bench.kit.many, 0, {"single": {}})
    with bench.started(config, squeeze) as job:
        bench.finish(job, config, plain)
    found.numbers |= {"without_s": plain.numbers["seconds_of_rollouts"]}
    found.problems += plain.problems
    config = long_config(bench, "long", bench.kit.many, bench.kit.longer, PAIR)
    times: dict[str, float] = {}
    with bench.started(config, squeeze) as job:
        begun = time.monotonic()
        while job.process.poll() is None and time.monotonic() < bench.until_s:
            for line in job.output().splitlines():
                if line.startswith(("pools ", "replicas ")):
                    times.setdefault(line.split(maxsplit=1)[1], round(time.monotonic() - begun, 1))
            time.sleep(0.2)
        frame = bench.finish(job, config, found)
    row_id = f"q{bench.kit.many // 2}/0"
    others = frame.drop(row_id)
    attempts = pd.read_parquet(Path(config["out"]) / "attempts").set_index("row_id")
    with_s, without_s = found.numbers["seconds_of_rollouts"], found.numbers["without_s"]
    found.numbers |= {
        "times_s": times,
        "long_row": dict(frame.loc[row_id, ["pool", "rung", "tp", "attempts", "peak_tokens"]]),
        "long_row_s": span_s(attempts.loc[[row_id]]),
        "others_s": span_s(attempts.drop(row_id)),
        "loss_s": with_s - without_s,
        "loss": with_s / without_s - 1,
    }
    found.expect(frame.loc[row_id, "pool"] == "sharded", "the long row did not run on the pair")
    found.expect(set(others["pool"]) == {"single"}, "others did not run on the singles")
    found.expect(list(times)[-2:] == ["single 0, sharded 1", "single 2, sharded 0"], f"the GPUs went {list(times)}")
    return found


def too_long(bench: Bench, name: str, rows: int, squeeze: dict[str, Any], *words: str) -> Found:
    """One GPU, no other pool, and a long row, which fails with these words."""
    found = Found()
    config = long_config(bench, name, rows, bench.kit.longer, ALONE)
    with bench.started(config, squeeze, gpus=1) as job:
        frame = bench.finish(job, config, found, failed=1)
    row = frame.loc[f"q{rows // 2}/0"]
    found.numbers |= {"error": row["error"], "tries": int(row["attempts"])}
    found.expect(row["status"] == "failed" and row["error_type"] == "infra", "another row failed")
    found.expect(all(word in str(row["error"]) for word in words), f"its error does not say {words}")
    found.expect(row["attempts"] <= 3, f"{row['attempts']} tries")
    return found


@case(150)
def nowhere(bench: Bench) -> Found:
    """Its pages are more than the pool has."""
    return too_long(bench, "nowhere", bench.kit.rows, {"pages": {"1": 8}}, "needs", "has")


@case(150, "cpu")
def alone(bench: Bench) -> Found:
    """It has the pages, and its steps no memory. Not on GPUs: what a step of one row takes there hardly grows with its
    length, so that its pages are what it lacks (`nowhere`)."""
    words = ("failed alone at the smallest bound", "on single (tensor parallel 1, batch 1)", "no pool is sharded")
    found = too_long(bench, "alone", bench.kit.enough, {"tokens": {"1": 2_000}}, *words)
    given_back = found.numbers["events"]["single"].get("culprits")
    found.expect(given_back == 1, f"{given_back} rows were given back")
    return found


def of_one_precision(frame: pd.DataFrame, found: Found, rung: str, **numerics: str) -> None:
    """All rows ran on this rung."""
    found.expect(f"next: {rung}, " in "\n".join(found.numbers["said"]), f"it did not say that it goes on with {rung}")
    for name, value in ({"rung": rung} | numerics).items():
        found.expect(set(frame[name]) == {value}, f"{name} is {set(frame[name])}")


@case(150, "cuda")
def half(bench: Bench) -> Found:
    """The weights fit one GPU in half precision only."""
    found = Found()
    config = tight_config(bench, "half", bench.kit.rows, pools=ALONE, fallback="memory_first")
    with bench.started(config, gpus=1) as job:
        frame = bench.finish(job, config, found)
    of_one_precision(frame, found, "half_precision", dtype="bfloat16")
    return found


@case(150, "cuda")
def eight(bench: Bench) -> Found:
    """One row in 8 bits has the place that all would have in 16."""
    found = Found()
    config = long_config(bench, "eight", bench.kit.rows, bench.kit.longer, ALONE, 18_000) | {"fallback": "memory_first"}
    with bench.started(config, gpus=1) as job:
        frame = bench.finish(job, config, found)
    of_one_precision(frame, found, "kv_int8", kv_dtype="int8", dtype="bfloat16")
    return found


@case(90)
def stopped(bench: Bench) -> Found:
    """One GPU, and no rung that changes the precision."""
    found = Found()
    config = tight_config(bench, "stopped", bench.kit.rows, pools=ALONE)
    with bench.started(config, {"load": 2}, gpus=1) as job:
        code = job.end(bench.left_s())
    found.numbers |= {"code": code, "said": job.output().strip().splitlines()[-4:]}
    found.expect(code == 3, f"it ended with {code}")
    said = " ".join(found.numbers["said"])
    found.expect("fits no pool" in said and "shard: no pool is sharded over more than 1" in said, "no reasons")
    return found


def main() -> None:
    """Run the cases."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", choices=list(CASES), help="these cases, in this order")
    parser.add_argument("--device", choices=["cpu", "cuda"], default=default_device())
    parser.add_argument("--work", type=Path, help="folder to keep models and runs in (default: one that goes away)")
    parser.add_argument("--slower", type=float, default=1.0, help="cases may take so many times as long")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    kit = GPU if args.device == "cuda" else CPU
    lines: list[dict[str, Any]] = []
    keep = nullcontext(args.work) if args.work else tempfile.TemporaryDirectory(prefix="berth-recover-")
    with keep as folder:
        Path(folder).mkdir(parents=True, exist_ok=True)
        bench = Bench(Path(folder).resolve(), kit)
        for name in args.only or [name for name, (_, _, on) in CASES.items() if args.device in on]:
            made, timeout_s, _ = CASES[name]
            begun = time.monotonic()
            bench.until_s = begun + timeout_s * args.slower
            try:
                found = made(bench)
                line = {"case": name, "holds": not found.problems, "problems": "; ".join(found.problems)}
                line |= found.numbers
            except Exception as e:  # one case's failure must not hide the others'
                line = {"case": name, "holds": False, "problems": f"{type(e).__name__}: {e}"}
            line["seconds"] = time.monotonic() - begun
            lines.append(line)
            print(json.dumps(line, default=str), flush=True)
            write_json(
                args.out,
                "recover",
                device=device_info(args.device),
                workload={name: getattr(kit, name) for name in ("shape", "rows", "many", "enough", "longer")},
                results=json.loads(json.dumps(lines, default=str)),
                summary={"holds": sum(line["holds"] for line in lines), "of": len(lines)},
            )
    shown = ("case", "holds", "seconds", "rows", "failed", "differ", "seconds_of_rollouts", "loss", "problems")
    print_table("recover", [{name: line.get(name) for name in shown} for line in lines])
    sys.exit(0 if all(line["holds"] for line in lines) else 1)


if __name__ == "__main__":
    main()

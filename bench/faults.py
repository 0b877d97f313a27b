"""Whatever breaks: each fault on a real local cluster of several raylets, and what became of the rows.

For each fault: how the command ended, rows in and out, duplicates, lost rows, calls of the model that were made twice,
seconds until work went on, and whether the rows equal those of a run without faults. The scripted engine
(tests/scripted.py) stands in for the model where the model is not the point. Exits 0 only if all hold.

    python -m bench.faults --fast
    python -m bench.faults --only replica --only disk_full --out bench/results/faults.json
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import pandas as pd
import psutil
import pyarrow.parquet as pq
from ray.util.state import list_actors, list_nodes

from bench.clusters import RAY, ROOT, Cluster, Job, free_ports, ray_cluster, wait_for
from bench.common import device_info, print_table, write_json
from bench.s3 import BUCKET, s3_server
from bench.scripted import finished_rows, generations, lines_in, write_suite
from bench.scripted import script as script_of
from bench.tiny import write_tiny_model
from pipeline.tables import filesystem

STEPS = 3
COMPARED = ["row_id", "status", "answer", "score", "num_steps", "trajectory"]
TIMES = ["queue_s", "prefill_s", "decode_s", "tool_s", "gpu_s"]
LEARNED = ["predicted_peak_bytes"]
"""By what the run had learned when the row began."""
COMPUTED_AGAIN = ["attempts", "prefilled_tokens", "reused_tokens", "max_batch_seen", "observed_peak_bytes"]
LABEL = {"berth/part": "replica"}


@dataclass(slots=True)
class Outcome:
    """What became of one fault's run."""

    ends: list[int] = field(default_factory=list)
    recover_s: float | None = None
    failed: frozenset[str] = frozenset()
    """Rows that may fail, and must."""
    complete: bool = True
    without: pd.DataFrame | None = None
    """Rows of the same run without the fault, where the scripted engine did not make them."""
    problems: list[str] = field(default_factory=list)


class Run(Job):
    """One command of a bench at work."""

    def __init__(self, bench: Bench, argv: list[str], env: dict[str, str]):
        super().__init__(argv, env)
        self.bench = bench

    def until_calls(self, count: int) -> None:
        """Wait until the engine was called so often."""
        wait_for(lambda: self.process.poll() is not None or len(self.bench.calls()) >= count, 300)
        if self.process.poll() is not None:
            raise RuntimeError("it ended too soon:\n" + self.output())


class Bench:
    """A cluster, a suite, and a run folder a fault.

    Args:
        folder: where everything goes.
        rows: of the suite.
    """

    def __init__(self, folder: Path, cluster: Cluster, rows: int):
        self.folder, self.cluster, self.rows = folder, cluster, rows
        self.name = ""
        self.nodes: dict[str, subprocess.Popen[bytes]] = {}
        self.suite = write_suite(folder / "suite", rows)

    @property
    def out(self) -> Path:
        """The run folder."""
        return self.folder / f"out-{self.name}"

    def calls(self) -> list[str]:
        """Row ids of the engine's calls, in order."""
        return [row_id for row_id, _ in self.steps()]

    def steps(self) -> list[tuple[str, int]]:
        """Of which row, and from 1 for which of its steps, the engine was called, in order."""
        lines = map(str.split, lines_in(self.folder / f"calls-{self.name}"))
        return [(row_id, int(step)) for row_id, step in lines]

    def start(
        self,
        *more: str,
        suite: Path | None = None,
        out: str | None = None,
        config: dict[str, Any] | None = None,
        **script: Any,
    ) -> Run:
        """`berth run` on the cluster; `config` replaces parts of the run's, `script` is the scripted engine's."""
        settings = {"delay_s": 0.2, "max_batch": 8, "count": str(self.folder / f"calls-{self.name}")} | script
        run = {
            "suite": str(suite or self.suite),
            "out": out or str(self.out),
            "model": {"id": "smollm2-135m"},
            "engine": "tests.scripted:build",
            "pools": {"single": {"replicas": 2, "labels": LABEL}},
            "ray": {
                "address": self.cluster.address,
                "runtime_env": {"env_vars": script_of(**settings)},
            },
        }
        path = self.folder / f"run-{self.name}.json"  # JSON is YAML
        path.write_text(json.dumps(run | (config or {})))
        return Run(self, [sys.executable, "-m", "pipeline", "run", str(path), *more], self.cluster.env)

    def actors(self, needle: str) -> list[Any]:
        """Living actors of the cluster whose class holds `needle`."""
        found = list_actors(address=self.cluster.jobs, filters=[("state", "=", "ALIVE")], detail=True, limit=1000)
        return [actor for actor in found if needle in actor.class_name and psutil.pid_exists(actor.pid)]

    def kill(self, needle: str, engine: bool = False) -> None:
        """kill -9 of one such actor, or of the process of its engine."""
        [one, *_] = wait_for(lambda: self.actors(needle), 60)
        [child, *_] = psutil.Process(one.pid).children() if engine else [one]
        os.kill(child.pid, signal.SIGKILL)

    def kill_driver(self, job: Run) -> None:
        """kill -9 of the run's driver; its agents outlive it for a moment, and call the engine: until they are gone."""
        job.process.kill()
        job.end()
        wait_for(lambda: not self.actors("Agents"), 60)

    def add_node(self, name: str) -> None:
        """A raylet for replicas."""
        argv = [RAY, "start", f"--address={self.cluster.address}", "--block", "--num-cpus=2"]
        argv += ["--labels", ",".join(f"{key}={value}" for key, value in LABEL.items()), "--disable-usage-stats"]
        env = self.cluster.env | {"RAY_NODE_NAME": name}
        self.nodes[name] = subprocess.Popen(
            argv, env=env, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        count = len(self.nodes) + 1
        wait_for(lambda: len(self.living_nodes()) >= count, 120)

    def remove_node(self, name: str) -> None:
        """kill -9 of everything on it."""
        process = self.nodes.pop(name)
        raylets = [p for p in psutil.Process(process.pid).children(recursive=True) if p.is_running()]
        for one in [*raylets, psutil.Process(process.pid)]:
            with contextlib.suppress(psutil.NoSuchProcess):
                one.kill()
        process.wait()

    def node_with_replica(self) -> tuple[str, str]:
        """Name and id of such a node; a node of the bench may have none, the other then has both."""

        def find() -> tuple[str, str] | None:
            homes = {actor.pid: actor.node_id for actor in self.actors("ServeReplica:berth")}
            for name, process in self.nodes.items():
                for child in psutil.Process(process.pid).children(recursive=True):
                    if child.pid in homes:
                        return name, homes[child.pid]
            return None

        return wait_for(find, 60)

    def living_nodes(self) -> list[Any]:
        """Nodes as the cluster sees them, told apart here: with a filter Ray takes dead nodes for truncated output."""
        return [node for node in list_nodes(address=self.cluster.jobs, limit=1000) if node.state == "ALIVE"]

    def rows_of(self) -> pd.DataFrame:
        """The run's table."""
        return pd.read_parquet(self.out / "results")

    def recovered(self, since: float, calls: int) -> float:
        """Seconds from `since` until the engine is called again."""
        wait_for(lambda: len(self.calls()) > calls, 300)
        return time.monotonic() - since


Fault = Callable[[Bench], Outcome]
FAULTS: dict[str, tuple[Fault, bool, str]] = {}


def fault(fast: bool, expect: str = "complete, every row once") -> Callable[[Fault], Fault]:
    """Enter a function into the table."""

    def enter(made: Fault) -> Fault:
        FAULTS[made.__name__] = (made, fast, expect)
        return made

    return enter


def _driver(bench: Bench, share: float) -> Outcome:
    job = bench.start()
    job.until_calls(int(share * STEPS * bench.rows))
    bench.kill_driver(job)
    finished, calls, since = finished_rows(bench.out), len(bench.calls()), time.monotonic()
    again = bench.start()
    recover_s = bench.recovered(since, calls)
    found = Outcome([again.end()], recover_s)
    counts = Counter(bench.calls())
    if twice := [row for row in finished if counts[row] != STEPS]:
        found.problems.append(f"{len(twice)} finished rows were computed again")
    return found


@fault(fast=False)
def driver_25(bench: Bench) -> Outcome:
    """kill -9 of the driver at a quarter, then the same command."""
    return _driver(bench, 0.25)


@fault(fast=True)
def driver_50(bench: Bench) -> Outcome:
    """kill -9 of the driver half-way, then the same command."""
    return _driver(bench, 0.5)


@fault(fast=False)
def driver_75(bench: Bench) -> Outcome:
    """kill -9 of the driver at three quarters, then the same command."""
    return _driver(bench, 0.75)


@fault(fast=True)
def on_record(bench: Bench) -> Outcome:
    """kill -9 of the driver when all rows are on record and no part of results/ can be read, then the same command."""
    job = bench.start()
    job.until_calls(STEPS * bench.rows)
    time.sleep(1)  # the last records are written
    job.process.kill()
    killed = job.end()
    for part in (bench.out / "results").glob("*.parquet"):
        _cut(part)
    finished = len(finished_rows(bench.out))
    found = Outcome([bench.start().end()])
    if killed != -signal.SIGKILL or finished < bench.rows:
        found.problems.append(f"the driver ended with {killed}, {finished} rows were on record")
    if (calls := len(bench.calls())) != STEPS * bench.rows:
        found.problems.append(f"{calls} calls in all")
    return found


@fault(fast=False)
def steps_resumed(bench: Bench) -> Outcome:
    """kill -9 of the driver half-way under `journal: steps`: no call is made again but those under way."""
    job = bench.start("--set", "journal=steps")
    job.until_calls(STEPS * bench.rows // 2)
    bench.kill_driver(job)
    held, calls, since = generations(bench.out), len(bench.calls()), time.monotonic()
    again = bench.start("--set", "journal=steps")
    found = Outcome([], bench.recovered(since, calls))
    found.ends = [again.end()]
    steps = Counter(bench.steps())
    if twice := [row_id for (row_id, step), count in steps.items() if count > 1 and step <= held[row_id]]:
        found.problems.append(f"{len(twice)} calls were made again whose answers the journal held")
    if (most := max(Counter(bench.calls()).values())) > STEPS + 1:  # one is under way
        found.problems.append(f"a row's calls were made {most} times")
    return found


def _actor(bench: Bench, needle: str, engine: bool = False) -> Outcome:
    job = bench.start()
    job.until_calls(STEPS * bench.rows // 3)
    bench.kill(needle, engine)
    since, calls = time.monotonic(), len(bench.calls())
    recover_s = bench.recovered(since, calls)
    return Outcome([job.end()], recover_s)


@fault(fast=True)
def agent(bench: Bench) -> Outcome:
    """kill -9 of an agent."""
    return _actor(bench, "Agents")


@fault(fast=True)
def replica(bench: Bench) -> Outcome:
    """kill -9 of a replica."""
    return _actor(bench, "ServeReplica:berth")


@fault(fast=False)
def engine(bench: Bench) -> Outcome:
    """kill -9 of an engine's process; the replica ends with it."""
    return _actor(bench, "ServeReplica:berth", engine=True)


@fault(fast=True)
def hung_step(bench: Bench) -> Outcome:
    """A step of a replica's engine never ends."""
    hang = bench.folder / "hang"
    job = bench.start("--set", "limits.max_step_s=5", hangs=str(hang))
    job.until_calls(STEPS * bench.rows // 3)
    before = {one.pid for one in bench.actors("ServeReplica:berth")}
    hang.touch()
    wait_for(lambda: not hang.exists(), 60)
    since = time.monotonic()
    wait_for(lambda: not all(map(psutil.pid_exists, before)), 60)
    return Outcome([job.end()], time.monotonic() - since)


def _real(bench: Bench, pools: dict[str, Any], victim: str) -> Outcome:
    """kill -9 of `victim` under a real model in float32; the same run without that comes first."""
    model = bench.folder / "tiny"
    if not model.exists():
        write_tiny_model(model)
    config = {
        "model": {"id": str(model), "dtype": "float32"},
        "engine": "paged",
        "numerics": "invariant",
        "agent": {"max_steps": 3, "max_tokens": {"thought": 32, "action": 16, "answer": 16}},
        "memory": {"max_batch": 4},
        "pools": pools,
    }
    name, bench.name = bench.name, bench.name + "-without"
    if code := bench.start(config=config).end():
        raise RuntimeError(f"the run without the fault ended with {code}")
    found = Outcome(without=bench.rows_of())
    bench.name = name
    job = bench.start(config=config)
    wait_for(lambda: len(finished_rows(bench.out)) >= bench.rows // 4, 300)
    bench.kill(victim)
    since, finished = time.monotonic(), len(finished_rows(bench.out))
    wait_for(lambda: job.process.poll() is not None or len(finished_rows(bench.out)) > finished + 4, 300)
    found.recover_s = time.monotonic() - since
    found.ends = [job.end()]
    if (pd.read_parquet(bench.out / "attempts")["outcome"] == "ok").all():
        found.problems.append("no attempt was lost: the fault came too late")
    return found


@fault(fast=False)
def replica_fp32(bench: Bench) -> Outcome:
    """kill -9 of a replica with a real model: rows equal those without, times and what was computed again aside."""
    return _real(bench, {"single": {"replicas": 2, "labels": LABEL}}, "ServeReplica:berth")


@fault(fast=False)
def rank(bench: Bench) -> Outcome:
    """kill -9 of the second rank of a gang."""
    return _real(bench, {"sharded": {"tensor_parallel_size": 2, "replicas": 1, "labels": LABEL}}, "Rank")


@fault(fast=False)
def journal(bench: Bench) -> Outcome:
    """kill -9 of the journal's actor."""
    return _actor(bench, "Journal")


@fault(fast=False)
def ledger(bench: Bench) -> Outcome:
    """kill -9 of the ledger's actor."""
    return _actor(bench, "Ledger")


@fault(fast=False)
def controller(bench: Bench) -> Outcome:
    """kill -9 of Serve's controller."""
    return _actor(bench, "ServeController")


@fault(fast=False)
def node_removed(bench: Bench) -> Outcome:
    """A node with a replica goes, all at once; another comes."""
    job = bench.start(delay_s=1.0)  # finding and draining a node takes seconds
    job.until_calls(STEPS * bench.rows // 3)
    name, _ = bench.node_with_replica()
    bench.remove_node(name)
    since, calls = time.monotonic(), len(bench.calls())
    recover_s = bench.recovered(since, calls)
    bench.add_node(name + "x")
    return Outcome([job.end()], recover_s)


@fault(fast=False)
def node_drained(bench: Bench) -> Outcome:
    """A node with a replica is drained, as a cloud does before it takes a spot machine back."""
    job = bench.start(delay_s=1.0)  # as above
    job.until_calls(STEPS * bench.rows // 3)
    name, node_id = bench.node_with_replica()
    options = f"--node-id {node_id} --reason DRAIN_NODE_REASON_PREEMPTION --reason-message spot"
    options += " --deadline-remaining-seconds 20"
    drained = bench.cluster.ray("drain-node", "--address", bench.cluster.address, *options.split())
    if drained.returncode:
        raise RuntimeError(drained.stdout + drained.stderr)
    since, calls = time.monotonic(), len(bench.calls())
    recover_s = bench.recovered(since, calls)
    found = Outcome([job.end()], recover_s)
    bench.remove_node(name)
    bench.add_node(name + "d")
    return found


@fault(fast=False)
def job_stopped(bench: Bench) -> Outcome:
    """`ray job stop` in the middle, then submitted again."""
    first = bench.start()  # writes the run's config
    first.process.kill()
    first.end()
    config = bench.folder / f"run-{bench.name}.json"
    command = [sys.executable, "-m", "pipeline", "run", str(config)]
    options = ["--address", bench.cluster.jobs, "--working-dir", str(ROOT)]
    name = f"{bench.name}-{os.getpid()}"

    def submit(number: int, *more: str) -> subprocess.CompletedProcess[str]:
        return bench.cluster.ray(
            "job", "submit", *options, "--submission-id", f"{name}-{number}", *more, "--", *command
        )

    submit(1, "--no-wait")
    wait_for(lambda: len(bench.calls()) > STEPS * bench.rows // 3, 300)
    bench.cluster.ray("job", "stop", "--address", bench.cluster.jobs, f"{name}-1")
    since, calls = time.monotonic(), len(bench.calls())
    again = submit(2)
    found = Outcome([again.returncode], time.monotonic() - since)
    if len(bench.calls()) <= calls:
        found.problems.append("nothing was done after the second submission")
    return found


@fault(fast=True, expect="complete; that row failed after bounded tries, the others fine")
def killer_row(bench: Bench) -> Outcome:
    """A row that kills its replica every time."""
    job = bench.start(killer="q7/0")
    return Outcome([job.end()], failed=frozenset({"q7/0"}))


FAULTY_TOOL = '''"""Hangs, crashes and floods, by row."""

import os
import time

from actors.messages import Task


def Search(entity: str, task: Task) -> str:
    """Look an entity up."""
    if task.task_id == "q1":
        time.sleep(600)
    if task.task_id == "q2":
        raise RuntimeError("broken")
    if task.task_id == "q3":
        return "x" * 100_000_000
    return "A thing."
'''


@fault(fast=True, expect="complete; the row whose tool crashed failed, the others fine")
def tools(bench: Bench) -> Outcome:
    """Tools that hang, crash and flood."""
    suite = write_suite(bench.folder / "faulty", bench.rows, '[{use: "faulty:Search", timeout_s: 2}]')
    (suite / "faulty.py").write_text(FAULTY_TOOL)
    job = bench.start(suite=suite)
    found = Outcome([job.end()], failed=frozenset({"q2/0"}))
    rows = bench.rows_of().set_index("row_id")
    if "no result after" not in rows.loc["q1/0", "trajectory"][0]["observation"]:
        found.problems.append("the hung tool left no trace on its row")
    if len(str(rows.loc["q3/0", "trajectory"][0]["observation"])) > 100_000:
        found.problems.append("the flood was not cut")
    return found


@fault(fast=False)
def store_away(bench: Bench) -> Outcome:
    """The object store does not answer for 60 s."""
    with s3_server(urlparse(os.environ["AWS_ENDPOINT_URL"]).port or 0) as server:
        out = f"s3://{BUCKET}/run"
        job = bench.start(out=out)
        job.until_calls(STEPS * bench.rows // 3)
        server.send_signal(signal.SIGSTOP)
        since = time.monotonic()
        time.sleep(60)
        server.send_signal(signal.SIGCONT)
        calls = len(bench.calls())
        recover_s = bench.recovered(since, calls)
        found = Outcome([job.end()], recover_s)
        fs, path = filesystem(out + "/results")
        bench.out.mkdir()
        table = pq.read_table(path, filesystem=fs)
        (bench.out / "results").mkdir()
        pq.write_table(table, bench.out / "results" / "copied.parquet")
        return found


@fault(fast=False)
def truncated_part(bench: Bench) -> Outcome:
    """A part of results/ is cut short after a kill -9; and another one of the finished run."""
    rows = 700  # parts have 256 rows
    suite = write_suite(bench.folder / "large", rows)
    job = bench.start(suite=suite, delay_s=0.02, max_batch=64)
    parts = bench.out / "results"
    wait_for(lambda: parts.exists() and list(parts.glob("*.parquet")), 300)
    time.sleep(1)
    job.process.kill()
    job.end()
    finished = finished_rows(bench.out)
    _cut(next(parts.glob("*.parquet")))
    first = bench.start(suite=suite, delay_s=0.02, max_batch=64).end()
    counts = Counter(bench.calls())
    found = Outcome([first])
    if twice := [row for row in finished if counts[row] != STEPS]:
        found.problems.append(f"{len(twice)} finished rows were computed again")
    _cut(next(parts.glob("*.parquet")))
    found.ends.append(bench.start(suite=suite, delay_s=0.02, max_batch=64).end())
    return found


def _cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


@fault(fast=False)
def retry_killed(bench: Bench) -> Outcome:
    """kill -9 of `--retry-failed`, as it begins and in its middle; then again."""
    bench.start(killer="q7/0").end()
    before = len(pd.read_parquet(bench.out / "attempts"))
    early = bench.start("--retry-failed", "infra", killer="")
    wait_for(lambda: "failed rows are done again" in early.output() or early.process.poll() is not None, 120)
    early.process.kill()
    early.end()
    calls = len(bench.calls())
    late = bench.start("--retry-failed", "infra", killer="")
    wait_for(lambda: len(bench.calls()) > calls or late.process.poll() is not None, 300)
    late.process.kill()
    late.end()
    found = Outcome([bench.start("--retry-failed", "infra", killer="").end()])
    if len(pd.read_parquet(bench.out / "attempts")) <= before:
        found.problems.append("attempts/ lost the old attempts or lacks the new one")
    return found


@fault(fast=False, expect="exit 3, resumable")
def disk_full(bench: Bench) -> Outcome:
    """The disk under the run folder is full; then it has room again. Needs root, to mount a small disk."""
    bench.out.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=160k", "tmpfs", str(bench.out)]
    subprocess.run(mount, check=True)
    try:
        first = bench.start().end()
        subprocess.run(["mount", "-o", "remount,size=64m", str(bench.out)], check=True)
        second = bench.start().end()
        found = Outcome([first, second])
        if first != 3:
            found.problems.append(f"ended with {first} where the disk was full")
        found.ends = [second]
        kept = bench.folder / "kept"
        shutil.copytree(bench.out, kept)
    finally:
        subprocess.run(["umount", "-l", str(bench.out)], check=True)
    shutil.copytree(kept, bench.out, dirs_exist_ok=True)
    return found


@fault(fast=True, expect="exit 3, resumable")
def out_of_hours(bench: Bench) -> Outcome:
    """`limits.max_hours` is reached; then the command without it."""
    first = bench.start("--set", "limits.max_hours=0.001").end()
    found = Outcome()
    if first != 3 or len(finished_rows(bench.out)) >= bench.rows:
        found.problems.append(f"ended with {first} after {len(finished_rows(bench.out))} rows")
    found.ends = [bench.start().end()]
    return found


@fault(fast=True, expect="exit 2 within 30 s, nothing written elsewhere")
def folder_deleted(bench: Bench) -> Outcome:
    """The run folder is deleted in the middle."""
    job = bench.start()
    job.until_calls(STEPS * bench.rows // 3)
    shutil.rmtree(bench.out)
    since = time.monotonic()
    code = job.end(60)
    found = Outcome([code], time.monotonic() - since, complete=False)
    if code != 2:
        found.problems.append(f"ended with {code}: {job.output()[-300:]}")
    if time.monotonic() - since > 30:
        found.problems.append("took more than 30 s")
    time.sleep(10)
    if bench.out.exists():
        found.problems.append("the folder is there again")
    return found


@fault(fast=True, expect="exit 2 within 30 s; the first run completes")
def two_runs(bench: Bench) -> Outcome:
    """A second run at the same folder."""
    job = bench.start(delay_s=4.0)  # a minute of work: the second must find it at it
    job.until_calls(1)
    since = time.monotonic()
    code = bench.start().end(60)
    found = Outcome(recover_s=time.monotonic() - since)
    if code != 2 or time.monotonic() - since > 30:
        found.problems.append(f"the second ended with {code} after {time.monotonic() - since:.0f} s")
    found.ends = [job.end()]
    return found


def judge(bench: Bench, name: str, found: Outcome, baseline: pd.DataFrame) -> dict[str, Any]:
    """A line of the table."""
    line: dict[str, Any] = {
        "fault": name,
        "expected": FAULTS[name][2],
        "ends": found.ends,
        "recover_s": found.recover_s,
    }
    if found.complete:
        frame = bench.rows_of()
        rows_in = len(pd.read_parquet(bench.out / "tasks")) if (bench.out / "tasks").exists() else bench.rows
        duplicates = int(frame["row_id"].duplicated().sum())
        lost = rows_in - frame["row_id"].nunique()
        calls = Counter(bench.calls())
        line |= {
            "rows_in": rows_in,
            "rows_out": len(frame),
            "duplicates": duplicates,
            "lost": lost,
            "calls_twice": sum(max(0, count - STEPS) for count in calls.values()),
        }
        failed = set(frame.loc[frame["status"] == "failed", "row_id"])
        if duplicates or lost:
            found.problems.append("duplicates or lost rows")
        if failed != set(found.failed):
            found.problems.append(f"failed rows: {sorted(failed)[:5]}, expected {sorted(found.failed)}")
        if any(found.ends):
            found.problems.append(f"ended with {found.ends}")
        if found.without is not None:
            line["equal"] = identical(frame, found.without)
        elif name != "tools":
            line["equal"] = equal(frame, baseline, found.failed)
        if not line.get("equal", True):
            found.problems.append("rows differ from those of the run without faults")
    line["holds"] = not found.problems
    line["problems"] = "; ".join(found.problems)
    return line


def identical(frame: pd.DataFrame, without: pd.DataFrame) -> bool:
    """Whether both tables are the same in every column but times, predictions and what computing again changes."""

    def plain(found: pd.DataFrame) -> list[str]:
        rows = found.drop(columns=TIMES + LEARNED + COMPUTED_AGAIN).sort_values("row_id").to_dict("records")
        for row in rows:
            kept = ("thought", "action", "tool", "arguments", "observation", "tokens")
            row["trajectory"] = [[step[name] for name in kept] for step in row["trajectory"]]
        return [repr(row) for row in rows]

    return plain(frame) == plain(without)


def equal(frame: pd.DataFrame, baseline: pd.DataFrame, failed: frozenset[str]) -> bool:
    """Whether the rows of both say the same, times aside."""

    def plain(found: pd.DataFrame) -> dict[str, str]:
        rows = found[~found["row_id"].isin(failed)][COMPARED].to_dict("records")
        for row in rows:
            row["trajectory"] = [(step["thought"], step["action"], step["observation"]) for step in row["trajectory"]]
        return {row["row_id"]: repr(row) for row in rows}

    mine, theirs = plain(frame), plain(baseline)
    return all(theirs.get(row_id, said) == said for row_id, said in mine.items())


def main() -> None:
    """Run the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fast", action="store_true", help="the fast half")
    parser.add_argument("--only", action="append", choices=list(FAULTS), help="these faults")
    parser.add_argument("--rows", type=int, default=90)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("SIGTERM: stopped"))  # its clusters end with it
    names = args.only or [name for name, (_, fast, _) in FAULTS.items() if fast or not args.fast]
    lines: list[dict[str, Any]] = []
    os.environ |= {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{free_ports(1)[0]}",
        "AWS_ACCESS_KEY_ID": "none",
        "AWS_SECRET_ACCESS_KEY": "none",
        "AWS_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    with tempfile.TemporaryDirectory(prefix="berth-faults-") as folder, ray_cluster("--num-cpus=4") as cluster:
        bench = Bench(Path(folder), cluster, args.rows)
        for name in ("one", "two"):
            bench.add_node(name)
        try:
            bench.name = "baseline"
            job = bench.start()
            if code := job.end():
                sys.exit(f"the run without faults ended with {code}:\n{job.output()}")
            baseline = bench.rows_of()
            for name in names:
                bench.name = name
                started = time.monotonic()
                made = FAULTS[name][0]
                try:
                    line = judge(bench, name, made(bench), baseline)
                except Exception as e:  # one fault's failure must not hide the others'
                    line = {"fault": name, "holds": False, "problems": f"{type(e).__name__}: {e}"}
                line["seconds"] = time.monotonic() - started
                lines.append(line)
                print(f"{'holds' if line['holds'] else 'FAILS':6} {name}: {line['problems'] or 'ok'}", flush=True)
                write_json(
                    args.out,
                    "faults",
                    device=device_info("cpu"),
                    workload={"rows": args.rows, "steps": STEPS, "replicas": 2, "nodes": 3},
                    results=lines,
                    summary={"holds": sum(line["holds"] for line in lines), "of": len(lines)},
                )
        finally:
            for name in list(bench.nodes):
                bench.remove_node(name)
    print_table("faults", lines)
    sys.exit(0 if all(line["holds"] for line in lines) else 1)


if __name__ == "__main__":
    main()

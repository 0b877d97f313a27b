"""The whole job without a model: tasks a second through Ray Data, agents, journal and Serve, beside bare Serve calls.

The scripted engine (tests/scripted.py) answers at once, so what is left is the pipeline's own cost. Prints a table of
each process's memory over time and of its CPU time, and writes JSON.

    python -m bench.pipeline --tasks 2000 --out bench/results/pipeline.json

With `--stop-s` the run is stopped so long after its first part; all rows but the last LEFT are then written as copies
of one that is finished, into results/ and the journal, and the command is repeated to its end. So the start, the
resumption and the end of a run of any length are measured without waiting for its middle:

    python -m bench.pipeline --tasks 1000000 --stop-s 60
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from statistics import median
from typing import Any

import psutil
import pyarrow as pa
import pyarrow.parquet as pq

from bench.common import device_info, print_table, write_json
from bench.scripted import finished_rows, script, write_suite
from pipeline.rollout import ROWS_PER_FILE

STEPS = 3
LEFT = 1000
ROOT = Path(__file__).resolve().parents[1]


def write_run(folder: Path, tasks: int) -> Path:
    """A suite of `tasks` questions and its run config."""
    write_suite(folder, tasks)
    run = folder / "run.yaml"
    run.write_text("suite: .\nout: out\nmodel: {id: smollm2-135m}\nengine: tests.scripted:build\n")
    return run


def title(process: psutil.Process) -> str:
    """A process's role, by its command line."""
    line = " ".join(process.cmdline())
    for mark in (
        "Agents",
        "ServeReplica",
        "actors.process",
        "Journal",
        "Ledger",
        "ServeController",
        "raylet",
        "gcs_server",
        "pipeline run",
    ):
        if mark in line:
            return mark
    return "other"


class Watched:
    """What is seen of the processes of a job: MiB of resident memory of the largest of each role every 2 s, and CPU
    seconds of each role."""

    def __init__(self):
        self.mib: dict[str, list[float]] = defaultdict(list)
        self.cpu_s: dict[tuple[str, int], float] = {}

    def look(self, job: int) -> None:
        """Sample a job's process and all below it."""
        largest: dict[str, float] = {}
        for one in [psutil.Process(job), *psutil.Process(job).children(recursive=True)]:
            try:
                role, times = title(one), one.cpu_times()
                largest[role] = max(largest.get(role, 0.0), one.memory_info().rss / 2**20)
                self.cpu_s[role, one.pid] = times.user + times.system
            except psutil.Error:
                continue
        for role, mib in largest.items():
            self.mib[role].append(mib)

    def table(self, tasks: int) -> list[dict[str, Any]]:
        """A row each role. The middle third of the samples against the last tells whether memory grows."""
        rows: list[dict[str, Any]] = []
        for role, mib in sorted(self.mib.items()):
            third = len(mib) // 3
            cpu_s = sum(seconds for (which, _), seconds in self.cpu_s.items() if which == role)
            found = {"process": role, "middle_mib": median(mib[third : 2 * third] or mib)}
            found |= {"last_third_mib": median(mib[2 * third :]), "max_mib": max(mib)}
            rows.append(found | {"cpu_s": cpu_s, "cpu_ms_task": cpu_s / tasks * 1000})
        return rows


def run_job(run: Path, max_batch: int, watched: Watched, stop_s: float | None = None) -> dict[str, Any] | None:
    """Run the job, or resume it; its summary, or None where it was stopped, `stop_s` after its first part."""
    env = os.environ | script(max_batch=max_batch)
    argv = [sys.executable, "-m", "pipeline", "run", str(run), "--json"]
    until = None
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(argv, cwd=ROOT, env=env, stdout=output)
        while process.poll() is None:
            watched.look(process.pid)
            if until is None and stop_s is not None and any((run.parent / "out" / "results").glob("*.parquet")):
                until = time.monotonic() + stop_s
            if until is not None and time.monotonic() > until:
                process.terminate()
            time.sleep(2)
        if process.returncode == (0 if stop_s is None else 3):
            output.seek(0)
            return json.loads(output.read()) if stop_s is None else None
        sys.exit(f"the job ended with exit code {process.returncode}")


def fill(out: Path, left: int) -> None:
    """Write rows as copies of one that is finished, so that only `left` are missing."""
    records = [json.loads(line) for path in (out / "journal").glob("*.jsonl") for line in path.open(encoding="utf-8")]
    parts = sorted((out / "results").glob("*.parquet"))
    model = pq.read_table(parts[0]).slice(0, 1)
    done = finished_rows(out).union(*(pq.read_table(path, columns=["row_id"])["row_id"].to_pylist() for path in parts))
    [old] = model["row_id"].to_pylist()
    lines = [json.dumps(record) for record in records if record["row_id"] == old]
    ids: list[str] = pq.read_table(out / "tasks", columns=["row_id"])["row_id"].to_pylist()
    missing = [row_id for row_id in ids if row_id not in done][:-left]
    for start in range(0, len(missing), ROWS_PER_FILE):
        some = missing[start : start + ROWS_PER_FILE]
        tasks = [row_id.rpartition("/")[0] for row_id in some]
        table = model.take(pa.array([0] * len(some)))
        for name, values in (("row_id", some), ("task_id", tasks)):
            place = table.schema.get_field_index(name)
            table = table.set_column(place, table.schema.field(name), pa.array(values, table.schema.field(name).type))
        pq.write_table(table, out / "results" / f"copies-{start:08d}.parquet", compression="zstd")
        with (out / "journal" / f"{time.time_ns():020d}-c0b1e500-merged.jsonl").open("w", encoding="utf-8") as file:
            for row_id, task_id in zip(some, tasks, strict=True):
                for line in lines:
                    line = line.replace(f'"{old}"', f'"{row_id}"')
                    file.write(line.replace(f'"{old.rpartition("/")[0]}"', f'"{task_id}"') + "\n")


def bare_calls(seconds: float, at_once: int) -> float:
    """Calls a second of one client to a Serve deployment that does nothing, `at_once` under way."""
    import ray
    from ray import serve

    class Nothing:
        async def generate(self, call: Any) -> Any:
            return call

    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    serve.start(proxy_location="Disabled", logging_config={"log_level": "ERROR"})
    deployment: Any = serve.deployment(Nothing)
    options = {"max_ongoing_requests": 100_000, "ray_actor_options": {"num_cpus": 0}}
    handle = serve.run(deployment.options(**options).bind(), name="bare", route_prefix=None)
    payload = tuple(range(200))

    async def client() -> float:
        done, until = 0, time.perf_counter() + seconds

        async def one() -> None:
            nonlocal done
            while time.perf_counter() < until:
                await handle.generate.remote(payload)
                done += 1

        await handle.generate.remote(payload)
        started = time.perf_counter()
        await asyncio.gather(*(one() for _ in range(at_once)))
        return done / (time.perf_counter() - started)

    try:
        return asyncio.run(client())
    finally:
        serve.shutdown()
        ray.shutdown()


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", type=int, default=2000)
    parser.add_argument("--max-batch", type=int, default=64, help="trajectories at once are 1.25 times this")
    parser.add_argument("--seconds", type=float, default=15.0, help="of bare Serve calls")
    parser.add_argument("--stop-s", type=float, help="stop so long after the first part, fill, and resume")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    watched = Watched()
    with tempfile.TemporaryDirectory() as folder:
        run, out = write_run(Path(folder), args.tasks), Path(folder) / "out"
        if args.stop_s is not None:
            run_job(run, args.max_batch, watched, args.stop_s)
            print_table("resident memory by role, sampled each 2 s: to the stop", watched.table(args.tasks))
            fill(out, LEFT)
            watched = Watched()
        summary = run_job(run, args.max_batch, watched)
        assert summary is not None
        files = sum(1 for _ in (out / "results").glob("*.parquet"))
    shown = watched.table(args.tasks)
    print_table("resident memory by role, sampled each 2 s, and CPU time", shown)
    wall_s = summary["throughput"]["wall_s"]
    result = {
        "engine": "berth, scripted",
        "repeat": 0,
        "rows": summary["rows"]["finished"],
        "failed": summary["rows"]["failed"],
        "files": files,
        "files_above_rows_256": files - args.tasks // ROWS_PER_FILE,
        "largest_rss_gib": max(row["max_mib"] for row in shown) / 1024,
    }
    speed: dict[str, float] = {}
    if args.stop_s is None:
        rate = bare_calls(args.seconds, args.max_batch)
        tasks_s = args.tasks / wall_s
        result |= {"wall_s": wall_s, "bare_calls_s": rate}
        speed = {"tasks_s": tasks_s, "ratio_to_bare": tasks_s / (rate / STEPS)}
    print_table("pipeline without a model", [result | speed])
    write_json(
        args.out,
        "pipeline",
        device=device_info("cpu"),
        workload={"tasks": args.tasks, "steps": STEPS, "max_batch": args.max_batch, "stop_s": args.stop_s},
        results=[result | speed | {"processes": shown}],
        summary={"berth, scripted": result | speed},
    )


if __name__ == "__main__":
    main()

"""The whole job without a model: tasks a second through Ray Data, agents, journal and Serve, beside bare Serve calls.

The scripted engine (tests/scripted.py) answers at once, so what is left is the pipeline's own cost. Prints a table of
each process's memory over time, and writes JSON.

    python -m bench.pipeline --tasks 2000 --out bench/results/pipeline.json
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
from typing import Any

import psutil

from bench.common import device_info, print_table, write_json
from bench.scripted import script, write_suite

STEPS = 3
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


def run_job(run: Path, max_batch: int) -> tuple[dict[str, Any], dict[str, list[float]], dict[str, float]]:
    """Run the job; its summary, MiB of resident memory of the largest process of each role, sampled each 2 s, and CPU
    seconds of each role."""
    env = os.environ | script(max_batch=max_batch)
    argv = [sys.executable, "-m", "pipeline", "run", str(run), "--json"]
    memory: dict[str, list[float]] = defaultdict(list)
    cpu_s: dict[tuple[str, int], float] = {}
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(argv, cwd=ROOT, env=env, stdout=output)
        while process.poll() is None:
            found: dict[str, float] = {}
            for one in [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]:
                try:
                    role = title(one)
                    found[role] = max(found.get(role, 0.0), one.memory_info().rss / 2**20)
                    times = one.cpu_times()
                    cpu_s[role, one.pid] = times.user + times.system
                except psutil.Error:
                    continue
            for role, mib in found.items():
                memory[role].append(mib)
            time.sleep(2)
        if process.returncode:
            sys.exit(f"the job ended with exit code {process.returncode}")
        output.seek(0)
        by_role: dict[str, float] = defaultdict(float)
        for (role, _), seconds in cpu_s.items():
            by_role[role] += seconds
        return json.loads(output.read()), dict(memory), by_role


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
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        summary, memory, cpu_s = run_job(write_run(Path(folder), args.tasks), args.max_batch)
    rate = bare_calls(args.seconds, args.max_batch)
    wall_s = summary["throughput"]["wall_s"]
    tasks_s = args.tasks / wall_s
    result = {
        "engine": "berth, scripted",
        "repeat": 0,
        "wall_s": wall_s,
        "tasks_s": tasks_s,
        "bare_calls_s": rate,
        "ratio_to_bare": tasks_s / (rate / STEPS),
        "rows": summary["rows"]["finished"],
        "failed": summary["rows"]["failed"],
    }
    print_table("pipeline without a model", [result])
    shown = [
        {
            "process": role,
            "first_mib": mib[0],
            "median_mib": sorted(mib)[len(mib) // 2],
            "last_mib": mib[-1],
            "max_mib": max(mib),
            "cpu_s": cpu_s[role],
            "cpu_ms_task": cpu_s[role] / args.tasks * 1000,
        }
        for role, mib in sorted(memory.items())
    ]
    print_table("resident memory by role, sampled each 2 s, and CPU time", shown)
    write_json(
        args.out,
        "pipeline",
        device=device_info("cpu"),
        workload={"tasks": args.tasks, "steps": STEPS, "max_batch": args.max_batch},
        results=[result | {"rss_mib": {role: [round(one) for one in mib] for role, mib in memory.items()}}],
        summary={"berth, scripted": {"tasks_s": tasks_s, "ratio_to_bare": result["ratio_to_bare"]}},
    )


if __name__ == "__main__":
    main()

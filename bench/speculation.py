"""What guessing tokens from a row's own text gains (actors/engine/drafts.py): the same trajectories with and without.

Real tasks, a real model, no Ray; the two runs must end in the same trajectories.

    python -m bench.speculation configs/quickstart.yaml --limit 24
    python -m bench.speculation configs/gsm8k.yaml:data=test.jsonl --limit 16 --out bench/results/speculation.json
"""

from __future__ import annotations

import argparse
import asyncio
import time
from dataclasses import dataclass
from typing import Any

import torch

from actors.engine import EngineSpec, build
from actors.messages import Trajectory
from actors.tools import ToolThreads
from bench.common import device_info, print_table, write_json
from bench.rollouts import prepared_run, roll
from pipeline.preflight import Prepared


async def trajectories(prepared: Prepared, engine: Any, batch: int) -> list[Trajectory]:
    """All tasks, `batch` at a time."""
    threads, slots = ToolThreads(), asyncio.Semaphore(batch)

    async def one(task: Any) -> Trajectory:
        async with slots:
            return await roll(prepared, engine, task, threads)

    return await asyncio.gather(*(one(task) for task in prepared.rows.tasks))


def said(trajectory: Trajectory) -> list[tuple[str, str, str]]:
    """What was computed, without times."""
    return [(step.thought, step.action, step.observation) for step in trajectory.steps]


@dataclass(frozen=True, slots=True)
class Run:
    """One run of all tasks on a new engine.

    Attributes:
        requests: that the engine got.
        events: of the engine, by name.
    """

    found: list[Trajectory]
    seconds: float
    cpu_s: float
    requests: int
    events: dict[str, int]

    def total(self, name: str) -> Any:
        """Sum of a field of the rows' usage."""
        return sum(getattr(one.usage, name) for one in self.found)


def run(prepared: Prepared, batch: int, speculation: str) -> Run:
    """Build an engine, roll out all tasks, free it."""
    model = prepared.config.model
    spec = EngineSpec(model.id, revision=model.revision, dtype=model.dtype, max_batch=batch, speculation=speculation)
    engine: Any = build(spec)
    submit, requests = engine.submit, list[Any]()
    engine.submit = lambda request: requests.append(request) or submit(request)
    try:
        started, cpu_s = time.perf_counter(), time.process_time()
        found = asyncio.run(trajectories(prepared, engine, batch))
        seconds, cpu_s = time.perf_counter() - started, time.process_time() - cpu_s
        return Run(found, seconds, cpu_s, len(requests), engine.events)
    finally:
        engine.close()


def measure(prepared: Prepared, batch: int, speculation: str) -> tuple[dict[str, Any], list[Trajectory]]:
    """One run, told."""
    ran = run(prepared, batch, speculation)
    tokens, kept = ran.total("generated"), ran.events["kept"]
    return {
        "speculation": speculation,
        "rows": len(ran.found),
        "seconds": round(ran.seconds, 1),
        "generated": tokens,
        "tokens_s": round(tokens / ran.seconds, 1),
        "decode_s": round(ran.total("decode_s"), 1),
        "drafted": ran.events["drafted"],
        "kept": kept,
        "tokens_a_row_step": round(tokens / (tokens - kept), 2),
    }, ran.found


def main() -> None:
    """Read the arguments, measure off and on in turn, compare, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("config", help="run config, with `:field=value` behind it for other values")
    parser.add_argument("--limit", type=int, default=24)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--repeat", type=int, default=1)
    parser.add_argument("--out", help="JSON file")
    args = parser.parse_args()
    prepared = prepared_run(args.config, "runs", [f"limit={args.limit}"])
    results: list[dict[str, Any]] = []
    first: list[Trajectory] | None = None
    for speculation in ("off", "on") * args.repeat:
        result, found = measure(prepared, args.batch, speculation)
        first = first or found
        result["other_trajectories"] = sum(said(a) != said(b) for a, b in zip(first, found, strict=True))
        results.append(result)
        print(result, flush=True)
    print_table("Guessed tokens", results)
    off, on = (min(r["seconds"] for r in results if r["speculation"] == name) for name in ("off", "on"))
    summary = {"suite": prepared.facts.suite, "speedup": round(off / on, 2)}
    print(summary)
    device = device_info("cuda" if torch.cuda.is_available() else "cpu")
    write_json(args.out, "speculation", device=device, workload=vars(args), results=results, summary=summary)


if __name__ == "__main__":
    main()

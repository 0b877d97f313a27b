"""Real trajectories without Ray: one engine, one process, several suites at once; run folders with results/ tables.

For what needs many real rows and no cluster, as `bench.forecast`. Tasks start in a random order that no length
decides, every suite in turn; at the deadline no more start, and those that run end: nothing long is cut off. The same
command again goes on with the rows that are not there yet.

    python -m bench.rollouts --out runs/lengths --samples 5 --temperature 0.7 --minutes 40 \\
        configs/gsm8k.yaml:data=test.jsonl configs/quickstart.yaml
"""

from __future__ import annotations

import argparse
import asyncio
import random
import time
from collections.abc import Sequence
from dataclasses import replace
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any

from actors.agent import Rollout
from actors.engine import Engine, EngineSpec, Request, build
from actors.engine.loader import stop_token_ids
from actors.messages import Generation, Sampling, Task, Trajectory, Turn
from actors.stopping import speak
from actors.tokens import codec_of
from actors.tools import Toolbox, ToolThreads
from pipeline.config import load_run
from pipeline.preflight import Prepared, limits_of, prepare, transcript
from pipeline.scoring import score
from pipeline.tables import RESULTS, read_results, result_row, rows_to_table, write_table

ROWS_PER_FILE = 8


async def roll(prepared: Prepared, engine: Engine, task: Task, threads: ToolThreads) -> Trajectory:
    """One trajectory, its calls made to the engine directly."""
    config, tokenizer = prepared.config, prepared.tokenizer
    stops = stop_token_ids(prepared.model_folder)
    drawn = Sampling(config.sampling.temperature, config.sampling.top_p, config.sampling.top_k, task.seed)
    sequence_id = f"{prepared.facts.suite}/{task.row_id}"

    async def generate(token_ids: Any, turn: Turn) -> Generation:
        request = Request(tuple(token_ids), sequence_id, turn.max_tokens, drawn, stops)
        return await asyncio.wrap_future(speak(engine, request, turn, tokenizer))

    limits = limits_of(config, prepared.suite, prepared.model_len)
    toolbox = Toolbox(prepared.tools, task, codec_of(tokenizer).cut, threads)
    prompt = transcript(config, prepared.suite, prepared.tools, tokenizer, task)
    try:
        trajectory = await Rollout(task, prompt, generate, toolbox.call, limits).run()
    finally:
        await toolbox.close()
        engine.end(sequence_id)
    return replace(trajectory, numerics=engine.numerics)


async def run(suites: list[Prepared], engine: Engine, batch: int, seconds: float, seed: int) -> None:
    """Roll out the suites' tasks until none is left or the time is over."""
    draw, threads, started = random.Random(seed), ToolThreads(), time.monotonic()
    done = {prepared.config.out: finished(prepared.config.out) for prepared in suites}
    queues = [
        [(prepared, task) for task in draw.sample(prepared.rows.tasks, len(prepared.rows.tasks))] for prepared in suites
    ]
    waiting = iter([item for item in chain.from_iterable(zip_longest(*queues)) if item is not None])
    rows: dict[str, list[dict[str, Any]]] = {prepared.config.out: [] for prepared in suites}

    def flush(out: str) -> None:
        if rows[out]:
            write_table(rows_to_table(rows[out], RESULTS), f"{out}/results/part-{len(done[out]):06d}.parquet")
            done[out] |= {row["row_id"] for row in rows[out]}
            rows[out].clear()
            print(f"{time.monotonic() - started:6.0f} s  {out}: {len(done[out])} rows", flush=True)

    async def worker() -> None:
        for prepared, task in waiting:
            if time.monotonic() - started > seconds:
                return
            if task.row_id in done[prepared.config.out]:
                continue
            trajectory = await roll(prepared, engine, task, threads)
            scored = score(trajectory, prepared.scorers, prepared.suite.primary)
            out = prepared.config.out
            rows[out].append(result_row(trajectory, scored=scored, run=prepared.facts, pool=None, rung=None))
            if len(rows[out]) >= ROWS_PER_FILE:
                flush(out)

    await asyncio.gather(*(worker() for _ in range(batch)))
    for out in rows:
        flush(out)


def finished(out: str) -> set[str]:
    """Row ids that the run folder holds."""
    return set(read_results(f"{out}/results", ["row_id"]).column("row_id").to_pylist())


def prepared_run(argument: str, out: str, sets: Sequence[str] = ()) -> Prepared:
    """`config.yaml:field=value:…` as a run whose folder is below `out` and has the config's name."""
    path, *more = argument.split(":")
    return prepare(load_run(path, [*more, *sets], out=f"{out}/{Path(path).stem}"))


def main(argv: Sequence[str] | None = None) -> None:
    """Read the arguments, build the engine, roll out."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("configs", nargs="+", help="run config, with `:field=value` behind it for other values")
    parser.add_argument("--out", required=True, help="each suite's run folder is made below it")
    parser.add_argument("--samples", type=int, default=5)
    parser.add_argument("--temperature", type=float, default=0.7)
    parser.add_argument("--minutes", type=float, default=40)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    sets = [f"sampling.temperature={args.temperature}", f"samples={args.samples}", f"seed={args.seed}"]
    suites = [prepared_run(argument, args.out, sets) for argument in args.configs]
    model = suites[0].config.model
    engine = build(EngineSpec(model.id, revision=model.revision, dtype=args.dtype, max_batch=args.batch))
    try:
        asyncio.run(run(suites, engine, args.batch, args.minutes * 60, args.seed))
    finally:
        engine.close()


if __name__ == "__main__":
    main()

"""How well trajectories are forecast: coverage of p95 on held-out questions, and how far it stays below the limit.

Splits are by question (all samples of one stand on one side) and random; a forecaster learns from so many finished rows
and forecasts the others, which it never sees. Beside it: the worst-case limit, the suite's prior alone, and the plain
95th percentile of the same rows. `run` is a simulated run: rows start largest first, so many at once, are forecast
when they start and learned from when they end, and longer ones end later, so that short ones are seen first.

    python -m bench.forecast --runs runs/lengths --out bench/results/forecast.json \\
        configs/gsm8k.yaml:data=test.jsonl configs/quickstart.yaml

The run folders are those of `bench.rollouts`: a model's own trajectories. With `--recorded NAME=FILE` also such as were
written down before, replayed in the suite's format: GSM8K's solutions by people (a line a step, the sum in << >> as the
calculator's call), or ReAct traces with `steps`. Nothing here is timed.
"""

from __future__ import annotations

import argparse
import heapq
import json
import random
import re
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from actors.messages import Task
from bench.common import device_info, print_table, write_json
from bench.rollouts import prepared_run
from pipeline.footprint import Forecaster
from pipeline.preflight import Prepared, transcript
from pipeline.run import untaught
from pipeline.tables import read_results

COLUMNS = ("row_id", "task_id", "sample", "prompt_tokens", "peak_tokens", "num_steps", "error_type", "metadata", "seed")
BAND = (0.93, 0.97)
Row = dict[str, Any]


def as_task(row: Row) -> Task:
    """What a forecaster reads of a task."""
    return Task(row["task_id"], row["sample"], "", (), dict(row["metadata"]), {}, row["seed"])


def recorded(prepared: Prepared, file: str) -> list[Row]:
    """Rows of trajectories that a file records, by the suite's own format and tokenizer."""
    tasks = {task.task_id: task for task in prepared.rows.tasks}
    found: list[Row] = []
    for line, text in enumerate(Path(file).read_text(encoding="utf-8").splitlines(), 1):
        data = json.loads(text)
        task = tasks[data["id"].rpartition("-")[0] if "steps" in data else f"line:{line}"]
        steps = data.get("steps") or _solution(data["answer"])
        story = transcript(prepared.config, prepared.suite, prepared.tools, prepared.tokenizer, task)
        peak = 0
        for number, step in enumerate(steps, 1):
            said = f" {step['thought']}\nAction {number}: {step['action']}\n"
            ids = prepared.tokenizer.encode(said, add_special_tokens=False)
            peak = len(story.token_ids) + len(ids)
            story.read(ids, "stop")
            story.observe(step["observation"])
        row = {"row_id": f"{task.task_id}/{line}", "task_id": task.task_id, "sample": line, "seed": 0}
        row |= {"prompt_tokens": story.prompt_tokens, "peak_tokens": peak, "num_steps": len(steps)}
        found.append(row | {"error_type": None, "metadata": task.metadata})
    return found


def _solution(answer: str) -> list[dict[str, str]]:
    """GSM8K's solution as a trajectory."""
    told, _, final = answer.partition("####")
    steps: list[dict[str, str]] = []
    for line in filter(None, map(str.strip, told.splitlines())):
        sums = re.findall(r"<<(.*?)=(.*?)>>", line) or [("0", "0")]
        thought = re.sub(r"<<.*?>>", "", line)
        steps.append({"thought": thought, "action": f"Calculator[{sums[0][0]}]", "observation": sums[0][1]})
    last = {"thought": "I have the answer.", "action": f"Finish[{final.strip()}]", "observation": ""}
    return [*steps, last]


def split(rows: Sequence[Row], learned: int, draw: random.Random) -> tuple[list[Row], list[Row]]:
    """`learned` rows, and the rows of all other questions; rows left over of the last learned question are dropped."""
    by_task: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        by_task[row["task_id"]].append(row)
    names = sorted(by_task)
    draw.shuffle(names)
    known: list[Row] = []
    while len(known) < learned and names:
        known += by_task[names.pop()]
    return known[:learned], [row for name in names for row in by_task[name]]


def measure(p50: Sequence[float], p95: Sequence[float], held: Sequence[Row], limit: int) -> Row:
    """Coverage, and mean p95 over the limit and over the true mean peak."""
    peak = np.array([row["peak_tokens"] for row in held])
    return {
        "held": len(held),
        "p95_coverage": float((peak <= np.array(p95)).mean()),
        "p50_coverage": float((peak <= np.array(p50)).mean()),
        "p95_of_limit": float(np.mean(p95) / limit),
        "p95_of_actual": float(np.mean(p95) / peak.mean()),
        # Mean pinball loss at 0.95, in tokens: less is better, and neither width nor misses can be hidden from it.
        "p95_loss_tokens": float(np.maximum(0.95 * (peak - np.array(p95)), 0.05 * (np.array(p95) - peak)).mean()),
    }


def repeated(rows: Sequence[Row], make: Callable[[], Forecaster], learned: int, repeats: int) -> dict[str, list[Row]]:
    """Measures by method, one a split."""
    limit = make().limits.tokens
    found: dict[str, list[Row]] = defaultdict(list)
    for repeat in range(repeats):
        known, held = split(rows, learned, random.Random(repeat))
        model = make()
        for row in known:
            model.observe(row)
        forecasts = [model.forecast(as_task(row), row["prompt_tokens"]) for row in held]
        found["forecast"].append(
            measure([f.p50_tokens for f in forecasts], [f.p95_tokens for f in forecasts], held, limit)
        )
        prior = [make().forecast(as_task(row), row["prompt_tokens"]) for row in held]
        found["prior"].append(measure([f.p50_tokens for f in prior], [f.p95_tokens for f in prior], held, limit))
        if known:
            growth = [row["peak_tokens"] - row["prompt_tokens"] for row in known]
            low, high = np.quantile(growth, (0.5, 0.95))
            prompts = np.array([row["prompt_tokens"] for row in held])
            found["percentile"].append(measure(prompts + low, prompts + high, held, limit))
        found["limit"].append(measure([limit] * len(held), [limit] * len(held), held, limit))
    return found


def simulated(rows: Sequence[Row], make: Callable[[], Forecaster], concurrent: int, in_order: bool) -> Row:
    """A run that learns as it goes: coverage of the forecasts that were made when rows started."""
    model = make()
    by_id = {row["row_id"]: row for row in rows}

    def size(row: Row) -> tuple[int, int, str]:
        forecast = model.forecast(as_task(row), row["prompt_tokens"])
        return -forecast.p95_tokens, -forecast.p50_tokens, row["row_id"]

    waiting = sorted(rows, key=size, reverse=True)  # popped from its end: the largest first
    running: list[tuple[float, str]] = []
    now, made = 0.0, []
    while waiting or running:
        while waiting and len(running) < concurrent:
            row = waiting.pop()
            if in_order:
                model.begin(row["row_id"])
            made.append((row, model.forecast(as_task(row), row["prompt_tokens"])))
            heapq.heappush(running, (now + row["peak_tokens"] - row["prompt_tokens"], row["row_id"]))
        now, row_id = heapq.heappop(running)
        model.observe(by_id[row_id])
    held = [row for row, _ in made]
    found = measure([f.p50_tokens for _, f in made], [f.p95_tokens for _, f in made], held, model.limits.tokens)
    return {"method": f"run, {concurrent} at once" + ", in order" * in_order, "learned": None, **found}


def summarise(measures: Sequence[Row], learned: int) -> Row:
    """Means over splits; of the p95's coverage also its spread, how often it lies in the band, and the spread that a
    perfect method would have: a quantile of so many rows, checked on so many others."""
    coverage = [row["p95_coverage"] for row in measures]
    mean = {name: statistics.fmean(row[name] for row in measures) for name in measures[0]}
    inside = sum(BAND[0] <= value <= BAND[1] for value in coverage) / len(coverage)
    sampling = (0.95 * 0.05 * (1 / learned + 1 / mean["held"])) ** 0.5 if learned else None
    spread = {"p95_coverage_sd": statistics.pstdev(coverage), "p95_sampling_sd": sampling}
    return mean | spread | {"splits_in_band": inside}


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure each suite, print tables, write the document."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("configs", nargs="+", help="run config, with `:field=value` behind it for other values")
    parser.add_argument("--runs", required=True, help="folder that holds a run folder of each config's name")
    parser.add_argument("--recorded", action="append", default=[], help="NAME=FILE, NAME being a config's")
    parser.add_argument("--learned", type=int, nargs="+", default=[0, 10, 20, 50, 100, 150, 200])
    parser.add_argument("--repeats", type=int, default=200)
    parser.add_argument("--concurrent", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument("--out")
    args = parser.parse_args(argv)
    results: list[Row] = []
    sources: dict[str, Row] = {}
    files = dict(item.split("=", 1) for item in args.recorded)
    for argument in args.configs:
        prepared = prepared_run(argument, args.runs)
        make = partial(untaught, prepared)
        table = read_results(f"{prepared.config.out}/results", COLUMNS).to_pylist()
        found = {"model": [row for row in table if row["peak_tokens"]]}
        if (name := Path(prepared.config.out).name) in files:
            found["recorded"] = recorded(prepared, files[name])
        for source, rows in found.items():
            if rows:
                label = f"{prepared.facts.suite}, {source}"
                rows.sort(key=lambda row: row["row_id"])
                sources[label] = about(rows, make().limits.tokens)
                results += [{"source": label} | row for row in measured(rows, make, args)]
    print_table("sources", [{"source": name} | row for name, row in sources.items()])
    print_table(f"forecasts, means of {args.repeats} splits", results)
    # Of each source, after the most rows that leave a fifth as many to be forecast.
    best = {row["source"]: row for row in results if row["method"] == "forecast" and row["held"] * 5 >= row["learned"]}
    workload = {"sources": sources, "repeats": args.repeats, "splits": "by question", "learned": args.learned}
    return write_json(args.out, "forecast", device=device_info("cpu"), workload=workload, results=results, summary=best)


def about(rows: Sequence[Row], limit: int) -> Row:
    """What kind of rows they are."""
    growth = [row["peak_tokens"] - row["prompt_tokens"] for row in rows]
    p5, p50, p95 = np.quantile(growth, (0.05, 0.5, 0.95)).tolist()
    return {
        "rows": len(rows),
        "questions": len({row["task_id"] for row in rows}),
        "limit_tokens": limit,
        "mean_prompt_tokens": statistics.fmean(row["prompt_tokens"] for row in rows),
        "growth_p5": p5,
        "growth_p50": p50,
        "growth_p95": p95,
        "growth_max": max(growth),
        "mean_steps": statistics.fmean(row["num_steps"] for row in rows),
    }


def measured(rows: Sequence[Row], make: Callable[[], Forecaster], args: argparse.Namespace) -> Iterator[Row]:
    """Every method after so many learned rows, then simulated runs."""
    for learned in (n for n in args.learned if n < len(rows)):
        for method, measures in repeated(rows, make, learned, args.repeats).items():
            yield {"method": method, "learned": learned, **summarise(measures, learned)}
    for concurrent in args.concurrent:
        yield simulated(rows, make, concurrent, False)
        yield simulated(rows, make, concurrent, True)


if __name__ == "__main__":
    main()

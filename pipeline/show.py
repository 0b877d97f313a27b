"""What `run`, `report` and `validate` tell at the end: a trajectory, the score, where the tables are.

Reads the run's tables and summary; computes no statistics.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from itertools import chain
from typing import Any

import pyarrow.dataset as ds
from rich.text import Text

from pipeline.config import AgentConfig, RunConfig
from pipeline.console import Screen, clean, duration
from pipeline.preflight import Prepared, limits_of, transcript
from pipeline.tables import RESULTS, TASKS, read_bytes, read_table


def tell(screen: Screen, out: str, summary: dict[str, Any]) -> None:
    """One trajectory, the score with its interval, what it cost, where the tables are."""
    if (row := example(out)) is not None:
        screen.trajectory(row)
    rows, score = summary["rows"], summary["score"]
    if score["mean"] is not None:
        screen.line("score", f"{summary['primary']} {measured(score)}")
    if (text := expectation(out)) is not None:
        screen.line("expect", text)
    for name, metric in summary["metrics"].items():
        if name != summary["primary"] and metric["mean"] is not None:
            screen.line("", f"{name} {measured(metric)}")
    ended = ", ".join(f"{reason} {count:,}" for reason, count in summary["stop_reasons"].items())
    screen.line(
        "rows", f"{rows['finished']:,} of {rows['expected'] or 0:,}, {rows['failed']:,} failed; ended by: {ended}"
    )
    for error, count in list(summary["errors"].items())[:3]:
        screen.line("", f"{count:,} × {error}")
    _speed(screen, summary)
    if memory := summary["memory"]:
        predicted, observed = (memory[name]["mean"] / 2**20 for name in ("predicted_bytes", "observed_bytes"))
        above = memory["above_predicted_fraction"]
        screen.line(
            "memory",
            f"KV of a row at its peak: {predicted:,.1f} MiB predicted (p95), {observed:,.1f} MiB observed, means; "
            f"{above:.1%} of rows took more than predicted",
        )
    screen.line("tables", f"{out}/results/*.parquet   (pandas.read_parquet reads the folder)")
    screen.line("report", f"{out}/report.html")


def measured(score: Mapping[str, Any]) -> str:
    """A mean that is there, as `stats.Interval` has it: with its interval, the method and the number of rows."""
    span = "" if score["low"] is None else f" [{score['low']:.3f}, {score['high']:.3f}]"
    return f"{score['mean']:.3f}{span} (95 % {score['method']}, n={score['n']:,})"


def _speed(screen: Screen, summary: dict[str, Any]) -> None:
    reuse, throughput = summary["reuse"], summary["throughput"]
    parts: list[str] = []
    if throughput["wall_s"]:
        parts.append(f"{duration(throughput['wall_s'])} of rollouts")
    if throughput["generated_tok_s"]:
        parts.append(f"{throughput['generated_tok_s']:,.0f} generated tokens/s")
    if reuse["reused_fraction"] is not None:
        parts.append(f"{reuse['reused_fraction']:.0%} of prompt tokens reused from the KV cache")
    if parts:
        screen.line("speed", ", ".join(parts))


def example(out: str) -> dict[str, Any] | None:
    """A trajectory worth reading: a right answer with tool calls, else the one with most tool calls."""
    light = read_table(f"{out}/results", RESULTS, ["row_id", "score", "tool_calls", "status"])
    best = max(
        chain.from_iterable(batch.to_pylist() for batch in light.to_batches()),
        key=lambda r: (r["status"] == "ok", (r["score"] or 0) * (r["tool_calls"] > 0), r["tool_calls"]),
        default=None,
    )
    if best is None:
        return None
    where = ds.field("row_id") == best["row_id"]
    row = read_table(f"{out}/results", RESULTS, where=where).to_pylist()[0]
    task = read_table(f"{out}/tasks", TASKS, ["question"], where=where).to_pylist()
    return row | {"question": task[0]["question"] if task else row["row_id"]}


def expectation(out: str) -> str | None:
    """What the suite says of this model; None where it says nothing, or the run is not of the kind it was measured in:
    the whole suite, greedy, in the default format."""
    info = json.loads(read_bytes(f"{out}/run.json") or b"{}")
    config = info.get("config", {})
    model = config.get("model", {})
    found = info.get("suite", {}).get("expect", {}).get(model.get("id"))
    changed = [
        config.get("limit"),
        config.get("data"),
        model.get("adapter"),
        config.get("sampling", {}).get("temperature"),
    ]
    if found is None or any(changed) or config.get("agent", {}).get("format") != AgentConfig().format:
        return None
    return f"{found[0]:.2f} to {found[1]:.2f} was measured for {model['id']} on this suite before"


def facts(prepared: Prepared) -> dict[str, Any]:
    """What `validate --json` says of a run that can be run."""
    return {
        "suite": prepared.suite.config.name,
        "suite_version": prepared.suite.config.version,
        "rows": len(prepared.rows.tasks),
        "rejected": len(prepared.rows.rejects),
        "tools": [tool.name for tool in prepared.tools],
        "primary": prepared.suite.primary,
        "model": prepared.config.model.id,
        "model_revision": prepared.model_revision,
        "context_tokens": prepared.model_len,
        "longest_prompt_tokens": max(prepared.prompt_tokens.values()),
    }


def show_prompts(screen: Screen, prepared: Prepared, count: int) -> None:
    """The rendered prompts of the first tasks, with their sizes in tokens."""
    config: RunConfig = prepared.config
    for task in prepared.rows.tasks[:count]:
        made = transcript(config, prepared.suite, prepared.tools, prepared.tokenizer, task)
        screen.console.rule(Text(clean(task.row_id)), align="left", style="dim")
        screen.console.print(clean(prepared.tokenizer.decode(made.token_ids)), markup=False)
        screen.console.rule(style="dim")
        screen.line(
            "tokens",
            f"prompt {made.prompt_tokens:,}; a turn at most {made.turn().max_tokens:,}; trajectory at most "
            f"{limits_of(config, prepared.suite, prepared.model_len).tokens:,}; "
            f"the model takes {prepared.model_len:,}",
        )


def call_each_tool(screen: Screen, prepared: Prepared) -> None:
    """Call every tool once with the first task's question as its text arguments."""
    from actors.tools import Toolbox, ToolThreads

    task = prepared.rows.tasks[0]

    async def call_all() -> None:
        toolbox = Toolbox(prepared.tools, task, lambda text, _: text, ToolThreads())
        for tool in prepared.tools:
            strings = [name for name, one in tool.arguments.items() if one.schema.get("type") == "string"]
            result = await toolbox.call(tool.name, dict.fromkeys(strings, task.question))
            said = result.error or result.observation
            screen.line("tool", f"{tool.name}: {duration(result.seconds)}: {' '.join(said.split())[:200]}")
        await toolbox.close()

    asyncio.run(call_all())

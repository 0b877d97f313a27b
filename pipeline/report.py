"""A run's tables → summary.json and report.html.

Reads a run folder and nothing else; knows no Ray, engine or agent. Whole columns are worked on, only the shown
examples become Python objects. The page is one file, asks for nothing, and runs no script: what models, tools and
data wrote is escaped and cut for display.
"""

from __future__ import annotations

import html
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
import yaml
from markupsafe import Markup

from actors.errors import InputError
from pipeline import stats, tables

MAX_GROUPS = 30
MAX_METRICS = 50
MAX_ERRORS = 10
MAX_STEPS_SHOWN = 20
MAX_TEXT_CHARS = 2000
EXAMPLES = {"right": 3, "wrong": 4, "failed": 3}
MAX_POINTS = 2000
# Characters that reorder the text around them can make an answer look like another one.
_REORDERING = dict.fromkeys((*range(0x202A, 0x202F), *range(0x2066, 0x206A)), "\ufffd")

Frame = Any
"""A pandas DataFrame. pandas ships no stubs, and pyright cannot tell its columns from its frames."""

_LARGE = {"answer", "raw_answer", "gold", "trajectory"}
_UNREAD = {"data_sha", "prompt_sha", "template_sha", "tool_sha", "scorer_version", "schema_version", "seed"}
_NUMERICS = ["engine", "kernel", "dtype", "kv_dtype", "weights_dtype", "tp", "model_revision", "reproducible"]
_SIZES = ["num_steps", "prompt_tokens", "generated_tokens", "prefilled_tokens", "reused_tokens", "tool_calls"]
_TIMES = ["queue_s", "prefill_s", "decode_s", "tool_s"]


def summarize(run_dir: str | Path) -> dict[str, Any]:
    """What a run says, as plain JSON data. Pure over the run's tables and run.json.

    Failed and unscored rows count as 0 in every score. `score_without_faults` leaves out rows that failed for
    reasons that are not the model's: infrastructure, or a tool that broke. Rows of one `cluster_by` value, or samples
    of one task, are one cluster.

    Args:
        run_dir: run folder, local, s3:// or gs://. Tables or run.json may be missing.

    Raises:
        InputError: run.json is not JSON, or the rows come from a newer Berth.
    """
    return _Run(run_dir).summary()


def write_report(run_dir: str | Path) -> dict[str, Any]:
    """Write summary.json and report.html into the run folder; returns the summary."""
    run = _Run(run_dir)
    summary = run.summary()
    page = _TEMPLATE.render(
        s=summary,
        run=run.facts,
        examples=run.examples(),
        charts=run.charts(),
        most_steps=MAX_STEPS_SHOWN,
        **_texts(run),
    )
    base = str(run_dir).rstrip("/")
    tables.write_bytes((json.dumps(summary, indent=2, allow_nan=False) + "\n").encode(), f"{base}/summary.json")
    tables.write_bytes(page.translate(_REORDERING).encode("utf-8", "replace"), f"{base}/report.html")
    return summary


def metrics(scores: pa.ChunkedArray, lost: Frame, clusters: Frame, primary: str) -> dict[str, dict[str, Any]]:
    """Mean and interval of every metric, the primary first; `n` says of how many rows.

    Args:
        scores: metric → value, a row each.
        lost: whether the row failed or was not scored: without a metric it counts as 0, other rows are left out.
        clusters: rows that are not independent have the same.
    """
    keys = pa.chunked_array([chunk.keys for chunk in scores.chunks], pa.string())
    found: dict[str, dict[str, Any]] = {}
    for name in sorted(keys.unique().to_pylist(), key=lambda name: (name != primary, name))[:MAX_METRICS]:
        values = _lookup(scores, name)
        known = lost | values.notna()
        found[name] = asdict(stats.interval(values[known].fillna(0.0), clusters[known]))
    return found


class _Run:
    """One run folder, read: `facts` (run.json) and `frame` (a row per result row, without the large columns)."""

    def __init__(self, run_dir: str | Path):
        self.base = str(run_dir).rstrip("/")
        self.facts = _read_json(f"{self.base}/run.json")
        suite = self.facts.get("suite")
        self.suite: Mapping[str, Any] = suite if isinstance(suite, dict) else {}
        scorers = self.suite.get("scorers") or ["score"]
        self.primary: str = self.suite.get("primary") or str(scorers[0]).rpartition(":")[2]
        table = tables.read_results(
            f"{self.base}/results", [name for name in tables.RESULTS.names if name not in _LARGE | _UNREAD]
        )
        self.scores, self.metadata = table["scores"], table["metadata"]
        table = table.drop_columns(["scores", "metadata"])
        frame: Frame = table.to_pandas(split_blocks=True, self_destruct=True)  # each column goes as it is taken over
        del table
        frame["tp"] = frame["tp"].astype("Int64")
        frame["failed"] = frame["status"] == "failed"
        frame["fault"] = frame["failed"] & frame["error_type"].isin(["infra", "tool"])
        frame["unscored"] = frame["score"].isna() & ~frame["failed"]
        frame["primary"] = frame["score"].fillna(0.0).where(~frame["failed"], 0.0)
        by = self.suite.get("cluster_by")
        frame["cluster"] = _lookup(self.metadata, by).fillna("") if by else frame["task_id"]
        self.frame = frame

    def summary(self) -> dict[str, Any]:
        """See `summarize`."""
        frame = self.frame
        expected = tables.count_rows(f"{self.base}/tasks", tables.TASKS)
        attempts = self._attempts()
        rows = {
            "expected": expected or None,
            "finished": len(frame),
            "missing": max(0, expected - len(frame)),
            "duplicated": len(frame) - int(frame["row_id"].nunique()),
            "tasks": int(frame["task_id"].nunique()),
            "ok": int((~frame["failed"]).sum()),
            "failed": int(frame["failed"].sum()),
            "infra": int((frame["fault"] & (frame["error_type"] == "infra")).sum()),
            "tool": int((frame["fault"] & (frame["error_type"] == "tool")).sum()),
            "unscored": int(frame["unscored"].sum()),
            "forced_finish": int(frame["forced_finish"].sum()),
            "retried": int((frame["attempts"] > 1).sum()),
            "rejected": tables.count_rows(f"{self.base}/rejects", tables.REJECTS),
        }
        return {
            "schema_version": tables.SCHEMA_VERSION,
            "suite": _only(frame["suite"]) or self.suite.get("name"),
            "suite_version": _only(frame["suite_version"]) or self.suite.get("version"),
            "complete": bool(expected) and rows["missing"] == 0,
            "rows": rows,
            "primary": self.primary,
            "score": self._interval(frame),
            "score_without_faults": self._interval(frame[~frame["fault"]]),
            "metrics": metrics(self.scores, frame["failed"] | frame["unscored"], frame["cluster"], self.primary),
            "pass_at_k": self._pass_at_k(),
            "groups": self._groups(),
            "stop_reasons": _counts(frame["stop_reason"]),
            "error_types": _counts(frame.loc[frame["failed"], "error_type"].fillna("unknown")),
            "errors": _counts(frame["error"].dropna().str.slice(0, 300), MAX_ERRORS),
            "distributions": {name: _spread(frame[name]) for name in _SIZES},
            "parse_errors": int(frame["parse_errors"].sum()),
            "tool_errors": int(frame["tool_errors"].sum()),
            "reuse": _reuse(frame),
            "timing": {name: {"total": _sum(frame[name]), **_spread(frame[name])} for name in [*_TIMES, "gpu_s"]},
            "attempts": attempts,
            "throughput": self._throughput(attempts["wall_s"] or self._wall_s()),
            "numerics": _combinations(frame, _NUMERICS),
            "placement": _combinations(frame, ["pool", "rung"]),
            "memory": _memory(frame),
        }

    def _interval(self, frame: Frame) -> dict[str, Any]:
        return asdict(stats.interval(frame["primary"], frame["cluster"]))

    def _pass_at_k(self) -> dict[str, dict[str, Any]]:
        """By k, where tasks have several samples and the primary metric is right or wrong."""
        frame = self.frame
        if not len(frame) or frame["sample"].max() == 0 or not frame["primary"].isin([0.0, 1.0]).all():
            return {}
        tasks = frame.groupby("task_id").agg(n=("primary", "size"), c=("primary", "sum"), cluster=("cluster", "first"))
        most = int(tasks["n"].max())
        found: dict[str, dict[str, Any]] = {}
        for k in sorted({most} | {2**i for i in range(most.bit_length()) if 2**i <= most}):
            chance = stats.pass_at_k(tasks["n"], tasks["c"], k)
            known = ~np.isnan(chance)
            found[str(k)] = asdict(stats.interval(chance[known], tasks.loc[known, "cluster"]))
        return found

    def _groups(self) -> dict[str, dict[str, Any]]:
        """The primary score by each `report_by` column, largest groups first."""
        found: dict[str, dict[str, Any]] = {}
        for field in self.suite.get("report_by") or []:
            values = _lookup(self.metadata, field).fillna("")
            sizes = values.value_counts()
            shown = [name for name, _ in sorted(sizes.items(), key=lambda item: (-item[1], item[0]))[:MAX_GROUPS]]
            groups = [{"value": name, **self._interval(self.frame[values == name])} for name in shown]
            found[field] = {"values": groups, "not_shown": len(sizes) - len(shown)}
        return found

    def _attempts(self) -> dict[str, Any]:
        columns = ["outcome", "cause", "rung", "gpu_s", "lost_gpu_s", "started_at", "ended_at"]
        frame = tables.read_table(f"{self.base}/attempts", tables.ATTEMPTS, columns).to_pandas()
        begin, end = frame["started_at"].min(), frame["ended_at"].max()
        wall = (end - begin).total_seconds() if pd.notna(begin) and pd.notna(end) else None
        bad = frame["outcome"] != "ok"
        return {
            "total": len(frame),
            "outcomes": _counts(frame["outcome"]),
            "causes": _counts(frame.loc[bad, "cause"].fillna("unknown").str.slice(0, 300), MAX_ERRORS),
            "rungs": _counts(frame["rung"].dropna()),
            "lost_gpu_s": _sum(frame["lost_gpu_s"]),
            "wall_s": wall,
        }

    def _wall_s(self) -> float | None:
        """Seconds between run.json's `started_at` and `finished_at`."""
        times: Any = pd.to_datetime(
            [self.facts.get("started_at"), self.facts.get("finished_at")], errors="coerce", utc=True
        )
        return None if times.hasnans else float((times[1] - times[0]).total_seconds())

    def _throughput(self, wall: float | None) -> dict[str, Any]:
        """From the first attempt's start to the last one's end, else run.json's times; pauses are included."""
        generated, rows = _sum(self.frame["generated_tokens"]), len(self.frame)
        per_s = 1 / wall if wall and wall > 0 else None
        return {
            "wall_s": wall,
            "rows_per_hour": rows * per_s * 3600 if per_s else None,
            "generated_tok_s": generated * per_s if per_s else None,
            "generated_tok_per_gpu_s": _ratio(generated, _sum(self.frame["gpu_s"])),
            "gpu_h": _sum(self.frame["gpu_s"]) / 3600,
        }

    def examples(self) -> list[dict[str, Any]]:
        """Ten rows drawn with a fixed seed: right, wrong, failed, and others where there are too few of a kind."""
        frame = self.frame
        if not len(frame):
            return []
        kind = pd.Series("wrong", frame.index).mask(frame["primary"] >= 1, "right").mask(frame["failed"], "failed")
        order = pd.Series(np.random.default_rng(0).permutation(len(frame)), frame.index)
        rank = order.groupby(kind).rank(method="first") - kind.map(EXAMPLES)
        chosen = pd.DataFrame({"kind": kind, "over": rank.clip(lower=0), "order": order, "row_id": frame["row_id"]})
        chosen = chosen.sort_values(["over", "order"]).head(sum(EXAMPLES.values()))
        ids = chosen["row_id"].tolist()
        rows = _by_id(f"{self.base}/results", tables.RESULTS, ids)
        tasks = _by_id(f"{self.base}/tasks", tables.TASKS, ids)
        shown = [
            {**rows[row_id], "kind": kind, "question": tasks.get(row_id, {}).get("question")}
            for kind, row_id in zip(chosen["kind"], ids, strict=True)
        ]
        return sorted(shown, key=lambda row: list(EXAMPLES).index(row["kind"]))

    def charts(self) -> dict[str, Markup]:
        """Inline SVG by name; none where there is nothing to draw."""
        frame = self.frame
        if not len(frame):
            return {}
        made = {"sizes": _histograms(frame)}
        both: Frame = frame[["predicted_peak_bytes", "observed_peak_bytes"]].dropna().astype(float)
        if len(both):
            made["memory"] = _scatter(both.sample(min(len(both), MAX_POINTS), random_state=0) / 2**20)
        return made


def _read_json(uri: str) -> dict[str, Any]:
    data = tables.read_bytes(uri)
    if data is None:
        return {}
    try:
        facts = json.loads(data)
    except ValueError as e:
        raise InputError(f"not JSON: {e}", file=uri) from e
    return facts if isinstance(facts, dict) else {}


def _by_id(folder: str, schema: pa.Schema, ids: Sequence[str]) -> dict[str, dict[str, Any]]:
    rows = tables.read_table(folder, schema, where=ds.field("row_id").isin(list(ids))).to_pylist()
    return {row["row_id"]: row for row in rows}


def _lookup(column: pa.ChunkedArray, key: str) -> Any:
    return pc.call_function("map_lookup", [column], pc.MapLookupOptions(pa.scalar(key), "first")).to_pandas()


def _only(values: Any) -> Any:
    """The one value of a column; None where there are none or several."""
    found = values.unique().tolist()
    return found[0] if len(found) == 1 else None


def _counts(values: Any, most: int | None = None) -> dict[str, int]:
    counted = sorted(values.value_counts().items(), key=lambda item: (-item[1], str(item[0])))
    return {str(value): int(count) for value, count in counted[:most]}


def _sum(values: Any) -> float:
    return float(values.sum())


def _ratio(part: float, whole: float) -> float | None:
    return part / whole if whole else None


def _spread(values: Any) -> dict[str, float | None]:
    if not len(values):
        return dict.fromkeys(("mean", "p10", "p50", "p90", "max"))
    low, mid, high = values.quantile([0.1, 0.5, 0.9])
    return {"mean": float(values.mean()), "p10": low, "p50": mid, "p90": high, "max": float(values.max())}


def _reuse(frame: Frame) -> dict[str, float | None]:
    reused, prefilled = _sum(frame["reused_tokens"]), _sum(frame["prefilled_tokens"])
    return {
        "reused_tokens": reused,
        "prefilled_tokens": prefilled,
        "reused_fraction": _ratio(reused, reused + prefilled),
    }


def _combinations(frame: Frame, columns: list[str]) -> list[dict[str, Any]]:
    counted: Frame = (
        frame.groupby(columns, dropna=False, sort=False).size().sort_values(ascending=False).reset_index(name="rows")
    )
    return json.loads(counted.to_json(orient="records"))


def _memory(frame: Frame) -> dict[str, Any] | None:
    """Predicted against observed KV of the rows that have both."""
    both: Frame = frame[["predicted_peak_bytes", "observed_peak_bytes"]].dropna().astype(float)
    both = both[both["predicted_peak_bytes"] > 0]
    if not len(both):
        return None
    ratio = both["observed_peak_bytes"] / both["predicted_peak_bytes"]
    return {
        "rows": len(both),
        "predicted_bytes": _spread(both["predicted_peak_bytes"]),
        "observed_bytes": _spread(both["observed_peak_bytes"]),
        "observed_over_predicted": _spread(ratio),
        "above_predicted_fraction": float((ratio > 1).mean()),
    }


def _texts(run: _Run) -> dict[str, Any]:
    """The config as YAML, without the environment's values: they may be secrets."""
    config = json.loads(json.dumps(run.facts.get("config") or {}, default=str))
    ray = config.get("ray") if isinstance(config, dict) else None
    env = ray.get("runtime_env") if isinstance(ray, dict) else None
    if isinstance(env, dict) and isinstance(env.get("env_vars"), dict):
        env["env_vars"] = dict.fromkeys(env["env_vars"], "(not shown)")
    text = yaml.safe_dump(config, sort_keys=False, allow_unicode=True, width=100) if config else ""
    model = config.get("model") if isinstance(config, dict) else None
    return {"config_yaml": text, "model": model if isinstance(model, dict) else {}}


def _histograms(frame: Frame) -> Markup:
    figure, axes = _figure(3)
    for ax, name, label in zip(
        axes,
        ("num_steps", "generated_tokens", "prefilled_tokens"),
        ("steps", "tokens generated", "tokens prefilled"),
        strict=True,
    ):
        values = frame[name].to_numpy()
        top = int(values.max())
        bins: Any = np.arange(-0.5, top + 1) if top <= 40 else np.linspace(0, np.quantile(values, 0.995), 31)
        ax.hist(values, bins=bins, color="#3b7dd8", rwidth=0.9)
        ax.set_xlabel(f"{label} a row")
    axes[0].set_ylabel("rows")
    return _svg(figure, "Histograms of steps, tokens generated and tokens prefilled, by row")


def _scatter(mib: Frame) -> Markup:
    figure, (ax,) = _figure(1)
    top = float(mib.to_numpy().max()) * 1.05 or 1.0
    ax.plot([0, top], [0, top], color="#888888", linewidth=1, linestyle="--")
    ax.plot(mib["predicted_peak_bytes"], mib["observed_peak_bytes"], ".", color="#3b7dd8", markersize=4, alpha=0.5)
    ax.set_xlabel("predicted MiB")
    ax.set_ylabel("observed MiB")
    return _svg(figure, "Predicted against observed KV cache of a row; above the dashed line more was used")


def _figure(count: int) -> tuple[Any, Sequence[Any]]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.2 * count if count > 1 else 4.2, 2.4 if count > 1 else 3.2), layout="constrained")
    axes = figure.subplots(1, count, squeeze=False)[0]
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
        ax.locator_params(nbins=5)
    return figure, axes


def _svg(figure: Any, title: str) -> Markup:
    """Inline SVG whose text and lines take the page's colour, so that it reads in light and dark."""
    import matplotlib as mpl

    out = io.StringIO()
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "berth", "font.family": "sans-serif"}):
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None})
    svg = out.getvalue()
    svg = svg[svg.index("<svg") :].replace("#000000", "currentColor")
    label = html.escape(title, quote=True)
    return Markup(svg.replace("<svg", f'<svg role="img" aria-label="{label}"', 1))


def _cut(text: object, most: int = MAX_TEXT_CHARS, mark: str | None = None) -> Markup:
    """Text for display: escaped, and cut with a note (or `mark`)."""
    shown = "" if text is None else str(text)
    if len(shown) <= most:
        return Markup.escape(shown)
    note = Markup('<span class="note"> … {} more characters; the whole is in results/</span>')
    return Markup.escape(shown[:most]) + (note.format(f"{len(shown) - most:,}") if mark is None else mark)


def _number(value: Any, digits: int = 3) -> str:
    if value is None:
        return "–"
    if isinstance(value, float) and not value.is_integer() and abs(value) < 1000:
        return f"{value:.{digits}g}" if abs(value) >= 1 else f"{value:.{digits}f}"
    return f"{value:,.0f}"


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return "–"
    if seconds < 120:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _score(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def _environment() -> jinja2.Environment:
    env = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    env.filters |= {"cut": _cut, "number": _number, "duration": _duration, "score": _score}
    return env


_PAGE = """\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ s.suite or "run" }} · {{ s.primary }} {{ s.score.mean|score }}</title>
<style>
:root { color-scheme: light dark; --ink: #1d2126; --soft: #5d6670; --line: #d9dde2; --card: #f5f7f9; --page: #fff;
  --blue: #2f6fc9; --good: #1a7f4b; --bad: #b3261e; --warn: #fff3d6; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e7ea; --soft: #9aa4ae; --line: #3a4149; --card: #22272d;
  --page: #181b1f; --blue: #6ea4ec; --good: #5cc48d; --bad: #f2857d; --warn: #463a17; } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--page); max-width: 64rem;
  margin: 0 auto; padding: 1.5rem; }
h1 { font-size: 1.6rem; margin: 0; overflow-wrap: anywhere; } h2 { font-size: 1.15rem; margin: 2.2rem 0 .5rem; }
p { margin: .4rem 0; max-width: 48rem; } .soft, .note { color: var(--soft); } .note { font-style: italic; }
.big { font-size: 2.4rem; font-weight: 650; line-height: 1.2; } .good { color: var(--good); } .bad { color: var(--bad); }
.warn { background: var(--warn); border-radius: 6px; padding: .5rem .8rem; margin: .5rem 0; }
.row { display: flex; flex-wrap: wrap; gap: 0 2.5rem; }
table { border-collapse: collapse; margin: .4rem 0; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .2rem 1.1rem .2rem 0; border-bottom: 1px solid var(--line); vertical-align: top;
  overflow-wrap: anywhere; }
th { font-weight: 600; color: var(--soft); font-size: .85rem; overflow-wrap: normal; } .n { text-align: right; white-space: nowrap; }
td.text { min-width: 7rem; max-width: 32rem; } .r { white-space: nowrap; } .scroll { overflow-x: auto; }
.bar { width: 12rem; height: 1rem; vertical-align: middle; } .bar .track { stroke: var(--line); stroke-width: 1; }
.bar .ci { stroke: var(--blue); stroke-width: 5; opacity: .45; } .bar .dot { fill: var(--blue); }
.split { display: flex; height: 1.4rem; max-width: 48rem; border-radius: 4px; overflow: hidden; margin: .5rem 0; }
.c0 { background: #8a94a0; } .c1 { background: #d9822b; } .c2 { background: #2f6fc9; } .c3 { background: #2c9a67; }
.key { display: inline-block; width: .8rem; height: .8rem; border-radius: 2px; margin-right: .4rem; }
.chart svg { max-width: 100%; height: auto; } .chart text { fill: currentColor; }
details { border: 1px solid var(--line); border-radius: 6px; margin: .5rem 0; padding: .4rem .8rem; }
summary { cursor: pointer; overflow-wrap: anywhere; } .tag { font-weight: 650; }
pre { background: var(--card); border-radius: 4px; padding: .5rem .7rem; margin: .3rem 0; white-space: pre-wrap;
  overflow-wrap: anywhere; unicode-bidi: plaintext; font: 13px/1.45 ui-monospace, monospace; max-height: 24rem; overflow-y: auto; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .1rem 1rem; margin: .4rem 0; }
dt { color: var(--soft); } dd { margin: 0; overflow-wrap: anywhere; unicode-bidi: plaintext; }
.step { border-left: 3px solid var(--line); padding-left: .8rem; margin: .7rem 0; }
</style>
</head>
<body>
{% macro range(i) -%}
{% if i.low is none %}<span class="soft">{{ i.method }}</span>{% else %}{{ i.low|score }} to {{ i.high|score }}{% endif %}
{%- endmacro %}
{% macro bar(i, low, high) %}
{% if i.mean is not none and high > low %}
{% set width = high - low %}
<svg class="bar" viewBox="0 0 200 16" preserveAspectRatio="none" aria-hidden="true">
<line class="track" x1="0" x2="200" y1="8" y2="8"/>
{% if i.low is not none %}
<line class="ci" x1="{{ '%.1f'|format(200 * (i.low - low) / width) }}" x2="{{ '%.1f'|format(200 * (i.high - low) / width) }}" y1="8" y2="8"/>
{% endif %}
<circle class="dot" cx="{{ '%.1f'|format(3 + 194 * (i.mean - low) / width) }}" cy="8" r="3.5"/></svg>
{% endif %}
{% endmacro %}
{% macro intervals(head, items) %}
{% set lows = items|map(attribute=1)|map(attribute="low")|reject("none")|list + items|map(attribute=1)|map(attribute="mean")|reject("none")|list %}
{% set highs = items|map(attribute=1)|map(attribute="high")|reject("none")|list + items|map(attribute=1)|map(attribute="mean")|reject("none")|list %}
{% set low = [0, (lows or [0])|min]|min %}{% set high = [1, (highs or [1])|max]|max %}
<div class="scroll"><table>
<tr><th>{{ head }}</th><th class="n">mean</th><th>95 % interval</th><th>{{ low|number }} to {{ high|number }}</th><th class="n">rows</th><th class="n">clusters</th><th>method</th></tr>
{% for name, i in items %}
<tr><td class="text">{{ name|cut(120) }}</td><td class="n">{{ i.mean|score }}</td><td class="r">{{ range(i) }}</td><td>{{ bar(i, low, high) }}</td><td class="n">{{ i.n|number }}</td><td class="n">{{ i.clusters|number }}</td><td class="soft">{{ i.method }}</td></tr>
{% endfor %}
</table></div>
{% endmacro %}
{% macro counts(head, items, total) %}
<table>
<tr><th>{{ head }}</th><th class="n">rows</th><th class="n">share</th></tr>
{% for name, count in items.items() %}
<tr><td class="text">{{ name|cut(300) }}</td><td class="n">{{ count|number }}</td><td class="n">{{ "%.1f %%"|format(100 * count / total) if total else "–" }}</td></tr>
{% else %}
<tr><td class="soft" colspan="3">none</td></tr>
{% endfor %}
</table>
{% endmacro %}
{% set r = s.rows %}
<h1>{{ s.suite or "Unnamed suite" }}{% if s.suite_version %} <span class="soft">v{{ s.suite_version }}</span>{% endif %}</h1>
<p class="soft">{{ model.id or "model not recorded" }}{% if model.revision %} @ {{ model.revision }}{% endif %}{% if run.commit is string %} · Berth {{ run.commit[:12] }}{{ "+" if run.commit.endswith("+") }}{% endif %}</p>

{% if not r.finished %}<div class="warn">No finished rows yet: there is nothing to report.</div>
{% elif r.missing %}<div class="warn"><b>Incomplete.</b> {{ r.finished|number }} of {{ r.expected|number }} rows are finished. Largest tasks run first, so what is missing is not a random part: do not quote this score.</div>{% endif %}
{% if r.duplicated %}<div class="warn"><b>{{ r.duplicated|number }} rows stand in results/ twice.</b> Every number below is off.</div>{% endif %}
{% if r.infra or r.tool %}<div class="warn"><b>{{ r.infra|number }} of {{ r.finished|number }} rows failed through infrastructure and {{ r.tool|number }} through a tool that broke</b>, not through the model. They count as 0 in the score; without them it is {{ s.score_without_faults.mean|score }}.</div>{% endif %}
{% if r.unscored %}<div class="warn"><b>{{ r.unscored|number }} rows could not be scored</b> because a scorer failed. They count as 0; their generations are kept and can be scored again.</div>{% endif %}
{% if r.rejected %}<div class="warn"><b>{{ r.rejected|number }} data rows were rejected</b> and not run; see rejects/.</div>{% endif %}

<p class="soft" style="margin-top:1.2rem">{{ s.primary|cut(80) }}</p>
<div class="big">{{ s.score.mean|score }}</div>
<p>95 % interval {{ range(s.score) }} · {{ r.finished|number }} rows, {{ r.tasks|number }} tasks{% if s.score.clusters != s.score.n %}, {{ s.score.clusters|number }} independent clusters{% endif %} <span class="soft">· {{ s.score.method }}</span></p>
<p class="soft">{{ r.failed|number }} failed rows count as 0.{% if r.failed %} Without the {{ (r.infra + r.tool)|number }} that infrastructure or a tool failed: {{ s.score_without_faults.mean|score }} ({{ range(s.score_without_faults) }}).{% endif %}</p>

<h2>Scores</h2>
{{ intervals("metric", s.metrics.items()|list) }}
{% if s.pass_at_k %}
{{ intervals("pass@k", s.pass_at_k.items()|list) }}
<p class="soft">Unbiased estimate over tasks (Chen et al. 2021).</p>
{% endif %}
{% for field, group in s.groups.items() %}
<h2>{{ s.primary|cut(80) }} by {{ field|cut(80) }}</h2>
{% set items = [] %}{% for g in group["values"] %}{% set _ = items.append((g.value or "(empty)", g)) %}{% endfor %}
{{ intervals(field, items) }}
{% if group.not_shown %}<p class="note">{{ group.not_shown|number }} smaller groups are not shown; see results/.</p>{% endif %}
{% endfor %}

<h2>How rows ended</h2>
<div class="row">
<div>{{ counts("stop reason", s.stop_reasons, r.finished) }}</div>
<div>{{ counts("failed by", s.error_types, r.finished) }}</div>
<dl><dt>forced to answer</dt><dd>{{ r.forced_finish|number }} rows</dd><dt>format slips</dt><dd>{{ s.parse_errors|number }}</dd><dt>tool errors shown to the model</dt><dd>{{ s.tool_errors|number }}</dd><dt>rows tried more than once</dt><dd>{{ r.retried|number }}</dd></dl>
</div>
{% if s.errors %}{{ counts("most frequent errors", s.errors, r.finished) }}{% endif %}

<h2>Steps and tokens</h2>
{% if charts.sizes %}<div class="chart">{{ charts.sizes }}</div>{% endif %}
<table><tr><th>a row</th><th class="n">mean</th><th class="n">p10</th><th class="n">median</th><th class="n">p90</th><th class="n">max</th></tr>
{% for name, d in s.distributions.items() %}
<tr><td>{{ name|replace("num_", "")|replace("_", " ") }}</td><td class="n">{{ d.mean|number }}</td><td class="n">{{ d.p10|number }}</td><td class="n">{{ d.p50|number }}</td><td class="n">{{ d.p90|number }}</td><td class="n">{{ d.max|number }}</td></tr>
{% endfor %}</table>

<h2>Time and work</h2>
{% set parts = [("waiting", "queue_s"), ("prefill", "prefill_s"), ("decode", "decode_s"), ("tools", "tool_s")] %}
{% set total = s.timing.queue_s.total + s.timing.prefill_s.total + s.timing.decode_s.total + s.timing.tool_s.total %}
{% if total %}
<div class="split">{% for name, key in parts %}<div class="c{{ loop.index0 }}" style="width:{{ '%.2f'|format(100 * s.timing[key].total / total) }}%"></div>{% endfor %}</div>
{% endif %}
<table><tr><th>where a row's time goes</th><th class="n">mean</th><th class="n">p90</th><th class="n">share</th></tr>
{% for name, key in parts %}
<tr><td><span class="key c{{ loop.index0 }}"></span>{{ name }}</td><td class="n">{{ s.timing[key].mean|duration }}</td><td class="n">{{ s.timing[key].p90|duration }}</td><td class="n">{{ "%.1f %%"|format(100 * s.timing[key].total / total) if total else "–" }}</td></tr>
{% endfor %}</table>
<dl>
<dt>prompt tokens found in the cache</dt><dd>{{ "%.1f %%"|format(100 * s.reuse.reused_fraction) if s.reuse.reused_fraction is not none else "–" }} <span class="soft">({{ s.reuse.reused_tokens|number }} reused, {{ s.reuse.prefilled_tokens|number }} prefilled)</span></dd>
<dt>wall time</dt><dd>{{ s.throughput.wall_s|duration }}</dd>
<dt>throughput</dt><dd>{{ s.throughput.rows_per_hour|number }} rows/h, {{ s.throughput.generated_tok_s|number }} generated tokens/s</dd>
<dt>GPU busy</dt><dd>{{ s.timing.gpu_s.total|duration }}, {{ s.throughput.generated_tok_per_gpu_s|number }} generated tokens a busy second</dd>
{% if s.attempts.total %}
<dt>attempts</dt><dd>{{ s.attempts.total|number }}{% for name, count in s.attempts.outcomes.items() %} · {{ name|cut(40) }} {{ count|number }}{% endfor %}; GPU time lost {{ s.attempts.lost_gpu_s|duration }}</dd>
{% for name, count in s.attempts.causes.items() %}<dt></dt><dd class="soft">{{ count|number }} × {{ name|cut(200) }}</dd>{% endfor %}
{% endif %}
</dl>

<h2>Numerics</h2>
{% set ways = s.numerics|selectattr("engine")|list|length %}
{% if ways > 1 %}<p>Rows were computed in {{ ways }} different ways; scores may differ between them for that reason alone.</p>{% endif %}
<div class="scroll"><table><tr><th>engine</th><th>kernel</th><th>dtype</th><th>KV</th><th>weights</th><th class="n">tp</th><th>model revision</th><th>reproducible</th><th class="n">rows</th></tr>
{% for n in s.numerics %}
{% if n.engine %}
<tr>{% for key in ("engine", "kernel", "dtype", "kv_dtype", "weights_dtype") %}<td>{{ (n[key] or "–")|cut(60) }}</td>{% endfor %}<td class="n">{{ n.tp|number }}</td><td>{{ (n.model_revision or "–")[:12] }}</td><td>{{ "yes" if n.reproducible else "no" }}</td><td class="n">{{ n.rows|number }}</td></tr>
{% else %}
<tr><td class="soft" colspan="8">failed before a replica answered</td><td class="n">{{ n.rows|number }}</td></tr>
{% endif %}
{% endfor %}</table></div>
{% if s.numerics|selectattr("reproducible", "equalto", false)|list %}
<p class="soft">Rows marked “no” can change with batch and placement; how many do was not measured in this run.</p>
{% endif %}
{% if s.placement|length > 1 %}
<table><tr><th>pool</th><th>rung</th><th class="n">rows</th></tr>{% for p in s.placement %}<tr><td>{{ (p.pool or "–")|cut(60) }}</td><td>{{ (p.rung or "–")|cut(60) }}</td><td class="n">{{ p.rows|number }}</td></tr>{% endfor %}</table>
{% endif %}

{% if s.memory %}
<h2>KV cache: predicted and observed</h2>
<div class="row">
{% if charts.memory %}<div class="chart">{{ charts.memory }}</div>{% endif %}
<div><table><tr><th>MiB a row, at peak</th><th class="n">mean</th><th class="n">median</th><th class="n">p90</th><th class="n">max</th></tr>
{% for name, d in (("predicted", s.memory.predicted_bytes), ("observed", s.memory.observed_bytes)) %}
<tr><td>{{ name }}</td>{% for key in ("mean", "p50", "p90", "max") %}<td class="n">{{ (d[key] / 1048576)|number }}</td>{% endfor %}</tr>
{% endfor %}
<tr><td>observed / predicted</td>{% for key in ("mean", "p50", "p90", "max") %}<td class="n">{{ "%.2f"|format(s.memory.observed_over_predicted[key]) }}</td>{% endfor %}</tr></table>
<p>{{ "%.1f %%"|format(100 * s.memory.above_predicted_fraction) }} of {{ s.memory.rows|number }} rows used more than predicted.</p></div>
</div>
{% endif %}

<h2>Examples</h2>
<p class="soft">Drawn at random with a fixed seed, by kind; not representative in their proportions.</p>
{% for e in examples %}
<details><summary><span class="tag {{ 'good' if e.kind == 'right' else 'bad' }}">{{ e.kind }}</span> · {{ (e.question or e.row_id)|cut(160, "…") }} <span class="soft">{{ e.row_id|cut(80) }}</span></summary>
<dl><dt>gold</dt><dd>{{ e.gold|join(" | ")|cut(500) }}</dd><dt>answer</dt><dd>{% if e.answer is none %}<span class="soft">none</span>{% else %}{{ e.answer|cut(500) }}{% endif %}</dd>
<dt>scores</dt><dd>{% for name, value in e.scores %}{{ name|cut(60) }} {{ value|score }}{{ ", " if not loop.last }}{% else %}–{% endfor %}</dd>
<dt>ended by</dt><dd>{{ e.stop_reason }}{{ ", answer forced" if e.forced_finish }}{% if e.error_type %} ({{ e.error_type }}){% endif %}, {{ e.num_steps }} steps, {{ e.generated_tokens|number }} tokens generated</dd>
{% if e.error %}<dt>error</dt><dd class="bad">{{ e.error|cut(500) }}</dd>{% endif %}</dl>
{% if e.question and e.question|length > 160 %}<pre>{{ e.question|cut }}</pre>{% endif %}
{% for step in e.trajectory[:most_steps] %}
<div class="step"><span class="soft">step {{ loop.index }} · {{ step.tokens|number }} tokens · {{ step.seconds|duration }}{% if step.tool %} · {{ step.tool|cut(60) }}{% endif %}</span>
{% if step.thought %}<pre>{{ step.thought|cut }}</pre>{% endif %}
{% if step.action %}<pre><b>{{ step.action|cut }}</b></pre>{% endif %}
{% if step.observation %}<pre class="soft">{{ step.observation|cut }}</pre>{% endif %}
</div>
{% endfor %}
{% if e.trajectory|length > most_steps %}<p class="note">{{ e.trajectory|length - most_steps }} more steps are in results/.</p>{% endif %}
</details>
{% else %}<p class="soft">No rows.</p>
{% endfor %}

<h2>Cite and rerun</h2>
<p>Quote the score with its interval, the number of rows and what it was measured under:</p>
<pre>{{ s.primary }} {{ s.score.mean|score }} (95 % CI {{ range(s.score)|striptags }}, n = {{ r.finished }}{% if s.score.clusters != s.score.n %}, {{ s.score.clusters }} clusters{% endif %}) on {{ s.suite or "?" }}{% if s.suite_version %} v{{ s.suite_version }}{% endif %}, {{ model.id or "?" }}{% if model.revision %}@{{ model.revision }}{% endif %}{% for n in s.numerics if n.engine %}, {{ n.engine }} {{ n.dtype }} tp {{ n.tp }} ({{ n.rows }} rows){% endfor %}; {{ r.failed }} failed rows counted as 0.</pre>
<p class="soft">Cite the suite's paper as its README says. Intervals after Miller 2024, “Adding Error Bars to Evals”, arXiv 2411.00640.</p>
{% if config_yaml %}<p>Save as <code>run.yaml</code> and run <code>berth run run.yaml</code>:</p>
<pre>{{ config_yaml|cut(20000) }}</pre>{% else %}<p class="soft">run.json holds no config.</p>{% endif %}
{% if run.versions is mapping %}<dl>{% for name, version in run.versions.items() %}<dt>{{ name|cut(60) }}</dt><dd>{{ version|cut(120) }}</dd>{% endfor %}</dl>{% endif %}
{% if run.hardware is mapping %}<dl>{% for name, value in run.hardware.items() %}<dt>{{ name|cut(60) }}</dt><dd>{{ value|cut(200) }}</dd>{% endfor %}</dl>{% endif %}
</body>
</html>
"""  # noqa: E501

_TEMPLATE = _environment().from_string(_PAGE)

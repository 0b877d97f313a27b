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


def compare(run_a: str | Path, run_b: str | Path) -> dict[str, Any]:
    """Two runs on the row_ids they share, b − a: `stats.Comparison` as data, with how many rows were not shared."""
    a, b = _Run(run_a), _Run(run_b)
    both = a.frame.merge(b.frame, on="row_id", suffixes=("_a", "_b"))
    found = stats.paired(both["primary_a"], both["primary_b"], both["cluster_a"])
    alone = {"rows_only_in_a": len(a.frame) - len(both), "rows_only_in_b": len(b.frame) - len(both)}
    return {"metric_a": a.primary, "metric_b": b.primary, **asdict(found), **alone}


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
            "infra": int((frame["failed"] & (frame["error_type"] == "infra")).sum()),
            "tool": int((frame["failed"] & (frame["error_type"] == "tool")).sum()),
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


_TEMPLATE = _environment().from_string(Path(__file__).with_name("report.html.jinja").read_text(encoding="utf-8"))

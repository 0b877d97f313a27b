"""Scores of a finished run by other scorers, beside the old ones: no GPU, no generation.

Each call writes one file of `rescored/`, named by the scorers' versions; `results/` is never touched.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import pyarrow as pa

from actors.errors import InputError
from pipeline import stats
from pipeline.run import run_info
from pipeline.scoring import load_scorers, score, version_of
from pipeline.suite import load_suite
from pipeline.tables import RESULTS, TASKS, open_table, read_table, trajectory_from_row, write_table

SCORES = pa.schema(
    [
        pa.field("row_id", pa.string(), nullable=False),
        pa.field("score", pa.float64()),
        pa.field("scores", pa.map_(pa.string(), pa.float64()), nullable=False),
        pa.field("error", pa.string()),
        pa.field("scorer_version", pa.string(), nullable=False),
    ]
)


def rescore(out: str, specs: Sequence[str]) -> dict[str, Any]:
    """Score every row of `out/results` with these scorers.

    Returns:
        `path` of the new table, `metrics` with their intervals, `shown` as lines for people.
    """
    info = run_info(out)
    suite = load_suite(info["config"]["suite"], info["config"]["data"])
    scorers = load_scorers(specs, suite.folder)
    primary = specs[0].rpartition(":")[2]
    tasks = {row["row_id"]: row for row in read_table(f"{out}/tasks", TASKS).to_pylist()}
    rows: list[dict[str, Any]] = []
    version = version_of(scorers)
    for batch in open_table(f"{out}/results", RESULTS).to_batches():
        for row in batch.to_pylist():
            trajectory = trajectory_from_row(row, tasks.get(row["row_id"]))
            failed = row["status"] == "failed"
            made = score(trajectory, scorers, primary)
            rows.append(
                {
                    "row_id": row["row_id"],
                    "score": 0.0 if failed else made.score,
                    "scores": {name: 0.0 if failed else value for name, value in made.scores.items()},
                    "error": made.error,
                    "scorer_version": version,
                }
            )
    if not rows:
        raise InputError("no rows to score", file=f"{out}/results")
    path = f"{out}/rescored/{version.replace(' ', '+').replace('/', '_').replace(':', '.')}.parquet"
    write_table(pa.Table.from_pylist(rows, schema=SCORES), path)
    by = suite.config.cluster_by
    clusters = [tasks[row["row_id"]]["metadata"] for row in rows] if by else []
    clusters = [dict(one)[by] for one in clusters] if by else [row["row_id"].rpartition("/")[0] for row in rows]
    names = list(dict.fromkeys(name for row in rows for name in row["scores"]))
    metrics = {name: stats.interval([row["scores"].get(name, 0.0) for row in rows], clusters) for name in names}
    shown = {
        name: f"{found.mean:.3f}" + ("" if found.low is None else f" [{found.low:.3f}, {found.high:.3f}]")
        for name, found in metrics.items()
    }
    if errors := sum(row["error"] is not None for row in rows):
        shown["unscored"] = f"{errors:,} rows; the first: {next(row['error'] for row in rows if row['error'])}"
    return {"path": path, "metrics": {name: asdict(found) for name, found in metrics.items()}, "shown": shown}

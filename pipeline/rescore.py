"""Scores of a run by other scorers, beside the old ones: no GPU, no generation.

Each call writes one file of `rescored/`, named by the scorers' versions; `results/` is never touched. The suite is as
run.json has it, so that what was edited since plays no part; a suite's own scorers are read from its folder. Results
and their tasks are read some files at a time. Of all rows only the scores are held, as columns, and written at the end.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.dataset as ds

from actors.errors import InputError
from pipeline.report import metrics
from pipeline.run import run_info
from pipeline.scoring import load_scorers, score, version_of
from pipeline.show import measured
from pipeline.tables import RESULTS, TASK, TASKS, count_rows, open_table, read_table, trajectory_from_row, write_table
from pipeline.tasks import PACK

SCORES = pa.schema(
    [
        pa.field("row_id", pa.string(), nullable=False),
        pa.field("score", pa.float64()),
        pa.field("scores", pa.map_(pa.string(), pa.float64()), nullable=False),
        pa.field("error", pa.string()),
        pa.field("scorer_version", pa.string(), nullable=False),
    ]
)
MAX_NAME_CHARS = 200


def rescore(out: str, specs: Sequence[str]) -> dict[str, Any]:
    """Score every row of `out/results` with these scorers.

    Returns:
        `path` of the new table, `rows`: finished and expected ones, `metrics` with their intervals, `shown` as lines
        for people.

    Raises:
        InputError: no such scorer, no rows, or none that could be scored.
    """
    info = run_info(out)
    folder, by = info["config"].get("suite"), info["suite"].get("cluster_by")
    if not isinstance(folder, str):
        raise InputError("names no suite", file=f"{out}/run.json", field="config.suite")
    specs = list(dict.fromkeys(specs))
    scorers = load_scorers(specs, Path(folder))
    primary = specs[0].rpartition(":")[2]
    version = version_of(scorers)
    expected = count_rows(f"{out}/tasks", TASKS)
    packs: list[pa.Table] = []
    clusters: list[str] = []
    lost: list[bool] = []
    answered = unscored = 0
    first_error, some = None, False
    for files in open_table(f"{out}/results", RESULTS):
        tasks = _tasks(out, files.to_table(columns=["row_id"])["row_id"])
        rows: list[dict[str, Any]] = []
        for row in chain.from_iterable(batch.to_pylist() for batch in files.to_batches(batch_size=PACK)):
            trajectory = trajectory_from_row(row, tasks.get(row["row_id"]))
            failed = row["status"] == "failed"
            made = score(trajectory, scorers, primary)
            scores = {name: 0.0 if failed else value for name, value in made.scores.items()}
            rows.append(
                {
                    "row_id": row["row_id"],
                    "score": 0.0 if failed else made.score,
                    "scores": scores,
                    "error": made.error,
                    "scorer_version": version,
                }
            )
            lost.append(failed or made.score is None)
            clusters.append(dict(row["metadata"]).get(by) or "" if by else row["task_id"])
            answered += trajectory.answer is not None
            if made.error:
                unscored, first_error, some = unscored + 1, first_error or made.error, some or bool(scores)
        packs.append(pa.Table.from_pylist(rows, schema=SCORES))
    table = pa.concat_tables(packs)
    if not len(table):
        raise InputError("no rows to score", file=f"{out}/results")
    if answered and unscored == answered and not some:
        raise InputError(f"no row could be scored; the first: {first_error}", field="--scorer")
    name = version.replace(" ", "+").replace("/", "_").replace(":", ".")
    if len(name) > MAX_NAME_CHARS:  # a file's name may have 255 bytes
        name = hashlib.sha256(version.encode()).hexdigest()
    path = f"{out}/rescored/{name}.parquet"
    write_table(table, path)
    found = metrics(table["scores"], pd.Series(lost), pd.Series(clusters), primary)
    shown = {name: measured(metric) for name, metric in found.items() if metric["mean"] is not None}
    if unscored:
        shown["unscored"] = f"{unscored:,} rows; the first: {first_error}"
    if len(table) < expected:
        shown["incomplete"] = (
            f"{len(table):,} of {expected:,} rows are done, and largest tasks run first: do not quote these scores"
        )
    return {
        "path": path,
        "rows": {"finished": len(table), "expected": expected or None},
        "metrics": found,
        "shown": shown,
    }


def _tasks(out: str, row_ids: pa.ChunkedArray) -> dict[str, dict[str, Any]]:
    """The tasks of these rows, without forecasts, by row_id; the manifest has them in another order than results/."""
    mine = ds.field("row_id").isin(row_ids.combine_chunks())
    return {row["row_id"]: row for row in read_table(f"{out}/tasks", TASKS, TASK.names, where=mine).to_pylist()}

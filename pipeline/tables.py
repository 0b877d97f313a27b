"""Arrow schemas of the run folder's tables, and rows in and out of them.

The only place that knows column names. Knows nothing of Ray, engines, suites or reports. A new column goes at
the end of its group and raises SCHEMA_VERSION; readers fill what an older file lacks with nulls.
"""

from __future__ import annotations

import json
import posixpath
import uuid
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from actors.errors import InputError
from actors.messages import Forecast, Numerics, Step, Task, Trajectory, Usage
from pipeline.scoring import Scored

SCHEMA_VERSION = 2
MAX_RAW_CHARS = 2000
FILES_AT_ONCE = 64
"""A dataset keeps the footers of all files that it has read, 0.15 MB each: 0.6 GB for 10⁶ results."""

_TEXT, _I32, _I64, _F64, _BOOL = pa.string(), pa.int32(), pa.int64(), pa.float64(), pa.bool_()
_TIME = pa.timestamp("us", tz="UTC")
_STRINGS = pa.map_(_TEXT, _TEXT)


def _schema(*groups: tuple[pa.DataType, str]) -> pa.Schema:
    """Fields from (type, "names") groups; a name that ends in ! may not be null."""
    made = [
        pa.field(name.rstrip("!"), kind, not name.endswith("!")) for kind, names in groups for name in names.split()
    ]
    return pa.schema(made, metadata={"berth.schema_version": str(SCHEMA_VERSION)})


_STEP = pa.struct(
    _schema(
        (_TEXT, "thought! action! tool arguments observation!"),
        (_I64, "tokens!"),
        (_F64, "seconds!"),
        (_I64, "prefilled! reused!"),
    )
)

RESULTS = _schema(
    (_TEXT, "row_id! task_id!"),
    (_I32, "sample!"),
    (_TEXT, "suite!"),
    (_I32, "suite_version!"),
    (_TEXT, "status! error error_type stop_reason!"),
    (_BOOL, "forced_finish!"),
    (_I32, "parse_errors!"),
    (_TEXT, "answer raw_answer"),
    (pa.list_(_TEXT), "gold!"),
    (_F64, "score"),
    (pa.map_(_TEXT, _F64), "scores!"),
    (_STRINGS, "metadata!"),
    (pa.list_(_STEP), "trajectory!"),
    (_I32, "num_steps! tool_calls! tool_errors!"),
    (_I64, "prompt_tokens! generated_tokens! reused_tokens! prefilled_tokens! peak_tokens"),
    (_I64, "predicted_peak_bytes observed_peak_bytes"),
    (_TEXT, "pool rung"),
    (_I32, "attempts!"),
    (_TEXT, "engine kernel dtype kv_dtype weights_dtype"),
    (_I32, "tp max_batch_seen"),
    (_I64, "seed!"),
    (_BOOL, "reproducible"),
    (_TEXT, "model_revision data_sha! prompt_sha! template_sha tool_sha! scorer_version!"),
    (_F64, "queue_s! prefill_s! decode_s! tool_s! gpu_s!"),
    (_I32, "schema_version!"),
)

TASK = _schema(
    (_TEXT, "row_id! task_id!"),
    (_I32, "sample!"),
    (_I64, "seed!"),
    (_TEXT, "question!"),
    (pa.list_(_TEXT), "gold!"),
    (_STRINGS, "metadata!"),
    (_TEXT, "row!"),
)
"""A task alone; TASKS is the manifest, with its forecast."""

_FORECAST = _schema(
    (_I64, "prompt_tokens shared_tokens p50_tokens p95_tokens p50_steps predicted_peak_bytes"),
    (pa.list_(_I64), "quantile_tokens"),
)

TASKS = pa.schema([*TASK, *_FORECAST], metadata=TASK.metadata)

ATTEMPTS = _schema(
    (_TEXT, "row_id!"),
    (_I32, "attempt!"),
    (_TIME, "started_at! ended_at"),
    (_TEXT, "replica pool rung outcome! cause"),
    (_I64, "predicted_bytes allocated_bytes reserved_bytes nvml_used_bytes kv_pages"),
    (_F64, "gpu_s lost_gpu_s"),
)

REJECTS = _schema((_TEXT, "file!"), (_I64, "line!"), (_TEXT, "field reason! raw!"))


@dataclass(frozen=True, slots=True)
class RunFacts:
    """What is the same on every row of a run.

    Attributes:
        data_sha, prompt_sha, template_sha, tool_sha: digests of the rows, prompt texts, chat template and tools;
            template_sha is None where the format uses no chat template.
        scorer_version: `pipeline.scoring.version_of(scorers)`.
    """

    suite: str
    suite_version: int
    data_sha: str
    prompt_sha: str
    template_sha: str | None
    tool_sha: str
    scorer_version: str


def result_row(
    trajectory: Trajectory,
    *,
    scored: Scored,
    run: RunFacts,
    pool: str | None,
    rung: str | None,
    predicted_peak_bytes: int | None = None,
) -> dict[str, Any]:
    """One row of `results/`: plain data that JSON and Arrow both take, columns in RESULTS' order.

    `status` is failed where the trajectory has an error. A scorer's failure leaves the status alone and stands in
    `error`. What no replica reported (no call was made, or the engine holds no pages) is None.
    """
    task, usage, numerics = trajectory.task, trajectory.usage, trajectory.numerics
    failed = trajectory.error_type is not None or trajectory.stop_reason == "error"
    row: dict[str, Any] = {
        "row_id": task.row_id,
        "task_id": task.task_id,
        "sample": task.sample,
        "suite": run.suite,
        "suite_version": run.suite_version,
        "status": "failed" if failed else "ok",
        "error": "; ".join(part for part in (trajectory.error, scored.error) if part) or None,
        "error_type": trajectory.error_type,
        "stop_reason": trajectory.stop_reason,
        "forced_finish": trajectory.forced_finish,
        "parse_errors": trajectory.parse_errors,
        "answer": trajectory.answer,
        "raw_answer": trajectory.raw_answer,
        "gold": list(task.gold),
        "score": 0.0 if failed else scored.score,
        "scores": {name: 0.0 if failed else value for name, value in scored.scores.items()},
        "metadata": dict(task.metadata),
        "trajectory": [asdict(step) for step in trajectory.steps],
        "num_steps": len(trajectory.steps),
        "tool_calls": trajectory.tool_calls,
        "tool_errors": trajectory.tool_errors,
        "prompt_tokens": trajectory.prompt_tokens,
        "generated_tokens": usage.generated,
        "reused_tokens": usage.reused,
        "prefilled_tokens": usage.prefilled,
        "peak_tokens": trajectory.peak_tokens or None,
        "predicted_peak_bytes": predicted_peak_bytes,
        "observed_peak_bytes": usage.kv_bytes_peak or None,
        "pool": pool,
        "rung": rung,
        "attempts": trajectory.attempts,
        "max_batch_seen": usage.batch_max or None,
        "seed": task.seed,
        "queue_s": usage.queue_s,
        "prefill_s": usage.prefill_s,
        "decode_s": usage.decode_s,
        "tool_s": trajectory.tool_s,
        "gpu_s": usage.gpu_s,
        "schema_version": SCHEMA_VERSION,
        **{item.name: getattr(numerics, item.name, None) for item in fields(Numerics)},
        **asdict(run),
    }
    return {name: row[name] for name in RESULTS.names}


def trajectory_from_row(row: Mapping[str, Any], task: Mapping[str, Any] | None = None) -> Trajectory:
    """The Trajectory a results row was made of, for rescoring.

    Args:
        row: a row of `results/`, from Arrow or JSON.
        task: the same row_id's row of `tasks/`; without it question and data row, which results do not keep,
            are empty.

    `usage.preemptions` is not stored and comes back as 0.
    """
    restored = task_from_row(task) if task is not None else _task(row, question="", data={})
    usage = Usage(
        prompt_tokens=row["prompt_tokens"],
        prefilled=row["prefilled_tokens"],
        reused=row["reused_tokens"],
        generated=row["generated_tokens"],
        kv_bytes_peak=row["observed_peak_bytes"] or 0,
        batch_max=row["max_batch_seen"] or 0,
        **{name: row[name] for name in ("queue_s", "prefill_s", "decode_s", "gpu_s")},
    )
    numerics = None if row["engine"] is None else Numerics(**{item.name: row[item.name] for item in fields(Numerics)})
    same = ("answer", "raw_answer", "stop_reason", "forced_finish", "parse_errors", "error", "error_type")
    same += ("tool_calls", "tool_errors", "prompt_tokens", "tool_s", "attempts")
    return Trajectory(
        task=restored,
        peak_tokens=row["peak_tokens"] or 0,
        steps=tuple(Step(**step) for step in row["trajectory"]),
        usage=usage,
        numerics=numerics,
        **{name: row[name] for name in same},
    )


def bare_row(task: Task) -> dict[str, Any]:
    """A row of TASK; the whole data row goes in as JSON."""
    return {
        "row_id": task.row_id,
        "task_id": task.task_id,
        "sample": task.sample,
        "seed": task.seed,
        "question": task.question,
        "gold": list(task.gold),
        "metadata": dict(task.metadata),
        "row": json.dumps(dict(task.row), ensure_ascii=False, default=str),
    }


def task_row(
    task: Task, forecast: Forecast | None = None, *, predicted_peak_bytes: int | None = None
) -> dict[str, Any]:
    """A row of the manifest `tasks/`."""
    return {
        **bare_row(task),
        "predicted_peak_bytes": predicted_peak_bytes,
        **{item.name: getattr(forecast, item.name, None) for item in fields(Forecast)},
    }


def forecast_from_row(row: Mapping[str, Any]) -> Forecast:
    """The Forecast that a manifest row holds."""
    found: dict[str, Any] = {item.name: row[item.name] for item in fields(Forecast)}
    found["quantile_tokens"] = tuple(found["quantile_tokens"])
    return Forecast(**found)


def task_from_row(row: Mapping[str, Any]) -> Task:
    """The Task a manifest row was made of."""
    return _task(row, question=row["question"], data=json.loads(row["row"]))


def _task(row: Mapping[str, Any], question: str, data: Mapping[str, Any]) -> Task:
    return Task(
        task_id=row["task_id"],
        sample=row["sample"],
        question=question,
        gold=tuple(row["gold"]),
        metadata=dict(row["metadata"]),  # Arrow gives a map as pairs, JSON as an object
        row=data,
        seed=row["seed"],
    )


def reject_row(file: str, line: int, field: str | None, reason: str, raw: str) -> dict[str, Any]:
    """One row of `rejects/`; `raw` is cut to MAX_RAW_CHARS."""
    return {"file": file, "line": line, "field": field, "reason": reason, "raw": raw[:MAX_RAW_CHARS]}


def rows_to_table(rows: Sequence[Mapping[str, Any]], schema: pa.Schema) -> pa.Table:
    """Rows as an Arrow table of exactly this schema.

    Lone surrogates (half an emoji in someone's JSON) are no UTF-8 and become `?`, so that they cost no row.

    Raises:
        ValueError: a column is missing, unknown, or null where it may not be.
        TypeError: a value is not of its column's type; nothing is rounded, parsed or truncated on the way.
    """
    _check(rows, list(schema), "")
    try:
        return _table(rows, schema)
    except UnicodeEncodeError:
        return _table([_encodable(row) for row in rows], schema)


def _table(rows: Sequence[Mapping[str, Any]], schema: pa.Schema) -> pa.Table:
    try:
        arrays = [pa.array([row[field.name] for row in rows], field.type) for field in schema]
    except pa.ArrowInvalid as e:
        raise TypeError(str(e)) from e
    return pa.Table.from_arrays(arrays, schema=schema)


def _check(rows: Sequence[Mapping[str, Any]], columns: Sequence[pa.Field], place: str) -> None:
    """What pyarrow lets pass: other columns, forbidden nulls, floats cut to integers."""
    names = {field.name for field in columns}
    for row in rows:
        if set(row) != names:
            raise ValueError(f"{place}missing {sorted(names - row.keys())}, unknown {sorted(row.keys() - names)}")
    for field in columns:
        name, kind = place + field.name, field.type
        values = [row[field.name] for row in rows]
        if not field.nullable and any(value is None for value in values):
            raise ValueError(f"{name} is null")
        if pa.types.is_integer(kind) and any(isinstance(value, float) for value in values):
            raise TypeError(f"{name} is a float, wants {kind}")
        if pa.types.is_list(kind) and pa.types.is_struct(kind.value_type):
            _check([item for value in values if value for item in value], list(kind.value_type), f"{name}.")


def _encodable(value: Any) -> Any:
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode("utf-8")
    if isinstance(value, Mapping):
        return {_encodable(key): _encodable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_encodable(item) for item in value]
    return value


def filesystem(uri: str | Path) -> tuple[pafs.FileSystem, str]:
    """The pyarrow filesystem of a local path, `s3://…` or `gs://…`, and the path on it.

    Raises:
        InputError: pyarrow does not know this kind of address.
    """
    if "://" not in str(uri):
        return pafs.LocalFileSystem(), str(Path(uri).expanduser().absolute())
    try:
        return pafs.FileSystem.from_uri(str(uri))
    except pa.ArrowInvalid as e:
        raise InputError(f"not an address Berth can open: {e}", got=str(uri), wants="a path, s3:// or gs://") from e


def open_table(folder: str | Path, schema: pa.Schema) -> Iterator[ds.Dataset]:
    """The Parquet files below `folder` in their order, as datasets of `schema` of FILES_AT_ONCE files each; one of no
    files where the folder is absent.

    A column that a file lacks is null.
    """
    fs, path = filesystem(folder)
    files = table_files(fs, path)
    for start in range(0, max(1, len(files)), FILES_AT_ONCE):
        yield ds.dataset(files[start : start + FILES_AT_ONCE], schema=schema, format="parquet", filesystem=fs)


def table_files(fs: pafs.FileSystem, folder: str) -> list[str]:
    """The Parquet files below `folder`, sorted; hidden ones (leading `.` or `_`: being written) are not seen."""
    found = fs.get_file_info(pafs.FileSelector(folder, recursive=True, allow_not_found=True))
    return sorted(info.path for info in found if info.is_file and _is_table(posixpath.relpath(info.path, folder)))


def _is_table(relative: str) -> bool:
    return relative.endswith(".parquet") and not any(part.startswith((".", "_")) for part in relative.split("/"))


def read_table(
    folder: str | Path, schema: pa.Schema, columns: Sequence[str] | None = None, *, where: ds.Expression | None = None
) -> pa.Table:
    """Rows below `folder`, an absent folder being an empty table.

    Args:
        columns: these only, in this order; None for all.
        where: keep rows that satisfy it, as `pyarrow.dataset.field("row_id").isin([...])`.
    """
    wanted = None if columns is None else list(columns)
    return pa.concat_tables(files.to_table(columns=wanted, filter=where) for files in open_table(folder, schema))


def read_results(folder: str | Path, columns: Sequence[str] | None = None) -> pa.Table:
    """The run's `results/` folder, local or on s3://, gs://; empty where it does not exist yet.

    Raises:
        InputError: the rows were written by a newer Berth.
    """
    wanted = None if columns is None else list(columns)
    found: list[pa.Table] = []
    for files in open_table(folder, RESULTS):
        if files.count_rows(filter=ds.field("schema_version") > SCHEMA_VERSION):
            raise InputError("written by a newer version of Berth", file=str(folder), wants=f"schema {SCHEMA_VERSION}")
        found.append(files.to_table(columns=wanted))
    return pa.concat_tables(found)


def count_rows(folder: str | Path, schema: pa.Schema) -> int:
    """Number of rows below `folder`, from the files' footers alone."""
    return sum(files.count_rows() for files in open_table(folder, schema))


def write_table(table: pa.Table, uri: str | Path, on: pafs.FileSystem | None = None) -> None:
    """Write one Parquet file that appears whole or not at all; parents are made, an older file is replaced.

    Args:
        on: the filesystem that `uri` is a path of; None where `uri` names it.
    """
    with _whole(uri, on) as stream:
        pq.write_table(table, stream, compression="zstd")


def write_bytes(data: bytes, uri: str | Path) -> None:
    """Write one file that appears whole or not at all."""
    with _whole(uri) as stream:
        stream.write(data)


def read_bytes(uri: str | Path) -> bytes | None:
    """A file's content; None where there is none."""
    fs, path = filesystem(uri)
    try:
        if not fs.get_file_info(path).is_file:
            return None
        with fs.open_input_stream(path) as stream:
            return stream.read()
    except FileNotFoundError:  # removed since it was seen
        return None


@contextmanager
def _whole(uri: str | Path, on: pafs.FileSystem | None = None) -> Generator[pa.NativeFile]:
    """A stream whose file appears when the block ends well."""
    fs, path = (on, str(uri)) if on is not None else filesystem(uri)
    if not isinstance(fs, pafs.LocalFileSystem):
        # Closing an upload half-way publishes it, so it is opened once the content is known.
        buffer = pa.BufferOutputStream()
        yield buffer
        with fs.open_output_stream(path) as stream:
            stream.write(buffer.getvalue())
        return
    folder, name = posixpath.split(path)
    fs.create_dir(folder, recursive=True)
    hidden = posixpath.join(folder, f".{name}.{uuid.uuid4().hex}")
    try:
        with fs.open_output_stream(hidden) as stream:
            yield stream
        fs.move(hidden, path)
    finally:
        if fs.get_file_info(hidden).is_file:
            fs.delete_file(hidden)

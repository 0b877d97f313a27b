"""suite.yaml and its rows: read and checked into Tasks; rows that cannot be used become Rejects.

Knows no model, no tokenizer and no Ray.
"""

from __future__ import annotations

import csv
import hashlib
import importlib
import io
import json
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from pydantic import Field, PositiveInt, field_validator

from actors.errors import InputError
from actors.formats import fill, named_fields
from actors.messages import Task
from pipeline.config import Part, RunConfig, absolute, nearest, parse, read_yaml
from pipeline.tasks import Tasks

MAX_TEXT_BYTES = 1 << 20


class DataConfig(Part):
    """Where the rows are."""

    path: str = Field(description=".jsonl, .parquet or .csv beside suite.yaml, or hf:org/name")
    split: str | None = Field(default=None, description="split of an hf: dataset")
    revision: str | None = Field(default=None, description="revision of an hf: dataset")


class FieldsConfig(Part):
    """Which column is what."""

    id: str | None = Field(default="id", description="unique id; null numbers the rows by line")
    question: str = Field(default="question", description="the question")
    gold: str = Field(
        default="answer",
        description="accepted answer, or a list of them; of a truth value, yes and true or no and false",
    )
    gold_pattern: str | None = Field(
        default=None, description="regular expression; its first group in the gold is the answer"
    )
    metadata: list[str] = Field(default_factory=list, description="columns kept in the result rows")

    @field_validator("gold_pattern")
    @classmethod
    def _compiles(cls, pattern: str | None) -> str | None:
        if pattern is not None:
            try:
                groups = re.compile(pattern).groups
            except re.error as e:
                raise ValueError(f"a regular expression ({e})") from e
            if groups < 1:
                raise ValueError("a regular expression with a group")
        return pattern


class PromptConfig(Part):
    """The texts a trajectory begins with; file names beside suite.yaml, or the text itself."""

    system: str = Field(default="", description="instructions: file name or text")
    fewshot: str = Field(default="", description="worked examples: file name or text")
    user: str = Field(default="Question: {question}", description="template; {name} is filled from the row")


class LimitsConfig(Part):
    """Bounds of one trajectory."""

    max_steps: PositiveInt = Field(default=8, description="steps before Finish is forced")
    trajectory_tokens: PositiveInt = Field(default=4096, description="tokens of the whole transcript, prompt included")


class PriorConfig(Part):
    """What a trajectory is like until runs teach better: p10, p50, p90."""

    steps: tuple[float, float, float] = Field(default=(3, 5, 7), description="steps")
    tokens_per_step: tuple[float, float, float] = Field(default=(120, 220, 350), description="tokens a step")


class SuiteConfig(Part):
    """suite.yaml."""

    name: str = Field(description="name on every result row", pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")
    version: int = Field(default=1, ge=1, description="raise it when rows, prompt or tools change")
    data: DataConfig
    fields: FieldsConfig = Field(default_factory=FieldsConfig)
    cluster_by: str | None = Field(default=None, description="column whose equal values are not independent")
    prompt: PromptConfig = Field(default_factory=PromptConfig)
    tools: list[str | dict[str, Any]] = Field(default_factory=list, description="- search: {…} or - use: module:name")
    limits: LimitsConfig = Field(default_factory=LimitsConfig)
    prior: PriorConfig = Field(default_factory=PriorConfig)
    scorers: list[str] = Field(
        default_factory=lambda: ["exact_match"], min_length=1, description="built in, or module:callable"
    )
    primary: str | None = Field(default=None, description="the metric that is `score`; the first scorer's if null")
    expect: dict[str, tuple[float, float]] = Field(
        default_factory=dict, description="by model id: the range of the primary score that was measured before"
    )
    report_by: list[str] = Field(default_factory=list, description="metadata columns to split the report by")


@dataclass(frozen=True, slots=True)
class Suite:
    """A suite as read: its config, its folder and its texts."""

    config: SuiteConfig
    folder: Path
    data: str
    system: str
    fewshot: str

    @property
    def primary(self) -> str:
        """Name of the metric that becomes `score`."""
        return self.config.primary or self.config.scorers[0].rpartition(":")[2]


@dataclass(frozen=True, slots=True)
class Reject:
    """A row that cannot be used.

    Attributes:
        line: 1-based line (text files) or row.
        raw: the row as it stood, shortened.
    """

    file: str
    line: int
    field: str | None
    reason: str
    raw: str

    def __str__(self) -> str:
        place = f"{self.file}:{self.line}"
        return f"{place}: {self.field}: {self.reason}" if self.field else f"{place}: {self.reason}"


@dataclass(frozen=True, slots=True)
class Rows:
    """What the data file held, in its order."""

    tasks: Tasks
    rejects: tuple[Reject, ...]
    sha: str


def load_suite(folder: str | Path, data: str | None = None) -> Suite:
    """Read suite.yaml and the prompt files beside it.

    Raises:
        InputError: naming file and field.
    """
    path = Path(folder)
    file = path if path.suffix in {".yaml", ".yml"} else path / "suite.yaml"
    if not file.exists() and not path.exists():
        raise InputError("no such suite folder", field="suite", got=str(folder), wants="a folder with suite.yaml")
    config = parse(SuiteConfig, read_yaml(file), str(file))
    base = file.parent.resolve()
    asked = named_fields(config.prompt.user)
    if not asked:
        raise InputError(
            "names no field, so that every row would be asked the same",
            file=str(file),
            field="prompt.user",
            got=config.prompt.user,
            wants="a template such as `Question: {question}`",
        )
    if config.fields.gold in asked:
        raise InputError("shows the model the answer", file=str(file), field="prompt.user", got=config.prompt.user)
    for name in config.report_by:
        if name not in config.fields.metadata:
            hint = nearest(name, config.fields.metadata)
            raise InputError(
                "not a metadata column" + hint, file=str(file), field="report_by", got=name, wants="fields.metadata"
            )
    return Suite(
        config=config,
        folder=base,
        data=data or absolute(config.data.path, base),
        system=_text(config.prompt.system, base, file, "prompt.system"),
        fewshot=_text(config.prompt.fewshot, base, file, "prompt.fewshot"),
    )


def _text(value: str, base: Path, file: Path, field: str) -> str:
    """A file's text where `value` names one or looks as if it should, else `value` itself."""
    if not os.path.isfile(base / value):
        if re.fullmatch(r"\S+\.[A-Za-z]\w{0,6}|[^\n]+\.(?i:txt|md|jinja|prompt)", value):
            raise InputError("no such file", file=str(file), field=field, got=value, wants="a file, or several words")
        return value
    try:
        return (base / value).read_text(encoding="utf-8-sig")
    except OSError as e:
        raise InputError(f"not readable: {e.strerror}", file=str(base / value), field=field) from e
    except UnicodeDecodeError as e:
        raise InputError(f"not UTF-8 at byte {e.start + 1}", file=str(base / value), field=field) from e


def read_rows(suite: Suite, run: RunConfig) -> Rows:
    """Read and check the suite's rows, up to `run.limit`, expanded by `run.samples`.

    Raises:
        InputError: no such file, an unknown kind of file, a duplicate id, no row at all, or none with a column of
            `fields.metadata`.
    """
    rejects: list[Reject] = []
    digest = hashlib.sha256()
    tasks = Tasks(_tasks(suite, run, rejects, digest))
    if not tasks and not rejects:
        raise InputError("no rows", file=suite.data, wants="at least one")
    return Rows(tasks, tuple(rejects), digest.hexdigest()[:16])


def _tasks(suite: Suite, run: RunConfig, rejects: list[Reject], digest: Any) -> Iterator[Task]:
    """The tasks; the rows that are none go to `rejects`, what was read to `digest`."""
    config = suite.config
    paragraphs = [name for name in map(_paragraphs, config.tools) if name]
    wanted = [(name, "prompt.user") for name in named_fields(config.prompt.user)]
    wanted += [(name, "search.paragraphs") for name in paragraphs]
    wanted += [(config.cluster_by, "cluster_by")] if config.cluster_by else []
    lines: dict[str, int] = {}
    columns: dict[str, None] = {}
    for line, raw, row in raw_rows(suite):
        if run.limit is not None and len(lines) >= run.limit:
            return
        digest.update(raw.encode("utf-8", "surrogateescape"))
        if isinstance(row, str):
            rejects.append(Reject(suite.data, line, None, row, raw[:2000]))
            continue
        columns |= dict.fromkeys(row)
        task, field, reason = _task(config, wanted, paragraphs, row, line)
        if task is None:
            rejects.append(Reject(suite.data, line, field, reason, raw[:2000]))
            continue
        if task.task_id in lines:
            raise InputError(
                f"the same id as line {lines[task.task_id]}",
                file=f"{suite.data}:{line}",
                field=suite.config.fields.id,
                got=task.task_id,
                wants="an id that no other row has",
            )
        lines[task.task_id] = line
        yield from (_sample(task, sample, run.seed) for sample in range(run.samples))
    for name in config.fields.metadata if columns else ():
        if name not in columns:
            raise InputError(
                "no row has it" + _known(name, columns), file=suite.data, field="fields.metadata", got=name
            )


def _sample(task: Task, sample: int, seed: int) -> Task:
    drawn = replace(task, sample=sample)
    digest = hashlib.sha256(f"{seed}/{drawn.row_id}".encode()).digest()
    return replace(drawn, seed=int.from_bytes(digest[:8], "big") >> 1)


def _task(
    config: SuiteConfig, wanted: Iterable[tuple[str, str]], paragraphs: Iterable[str], row: Mapping[str, Any], line: int
) -> tuple[Task | None, str | None, str]:
    """One row as a Task, or the field and the reason why not.

    Args:
        wanted: columns that there must be, and what names each.
        paragraphs: of them those that hold lists.
    """
    fields = config.fields
    for name in (fields.id, fields.question, fields.gold):
        if name is not None and row.get(name) is None:
            return None, name, "is null" if name in row else "missing" + _known(name, row)
    for name, field in wanted:
        if name != "question" and name not in row:
            return None, name, f"missing; {field} names it{_known(name, row)}"
    question = row[fields.question]
    if not isinstance(question, str):
        return None, fields.question, f"is {type(question).__name__}, wants text"
    if not question.strip():
        return None, fields.question, "is empty"
    if (size := len(question.encode("utf-8", "replace"))) > MAX_TEXT_BYTES:
        return None, fields.question, f"is {size:,} bytes long, wants at most {MAX_TEXT_BYTES:,}"
    found = row[fields.gold]
    golds = [gold for one in (found if isinstance(found, list) else [found]) for gold in _golds(one)]
    if not golds or not all(map(str.strip, golds)):
        return None, fields.gold, "wants text that is not empty, a number, or a list of them"
    if fields.gold_pattern:
        matches = [re.search(fields.gold_pattern, gold) for gold in golds]
        golds = [(match.group(1) or "").strip() if match else "" for match in matches]
        if not all(golds):
            return None, fields.gold, f"gold_pattern {fields.gold_pattern!r} finds nothing"
    for name in paragraphs:
        if not isinstance(row[name], list):
            return None, name, f"is {type(row[name]).__name__}, wants a list of paragraphs"
    metadata = {name: _scalar(row.get(name)) for name in fields.metadata}
    if config.cluster_by:
        metadata[config.cluster_by] = _scalar(row[config.cluster_by])
        if not metadata[config.cluster_by]:
            return None, config.cluster_by, "wants text or a number that is not empty; cluster_by names it"
    task_id = f"line:{line}" if fields.id is None else _scalar(row[fields.id])
    if not task_id:
        return None, fields.id, "wants text or a number that is not empty"
    task = Task(task_id, 0, question, tuple(golds), metadata, dict(row), 0)
    texts = [(fields.id, task_id), (fields.question, question), *((fields.gold, gold) for gold in golds)]
    for name, text in [*texts, *metadata.items(), ("prompt.user", fill(config.prompt.user, task))]:
        if re.search("[\ud800-\udfff]", text):
            return None, name, "holds half of a surrogate pair, which is no character"
    return task, None, ""


def _paragraphs(tool: str | dict[str, Any]) -> str | None:
    """The column that a tool's entry takes its articles from."""
    options = tool.get("search") if isinstance(tool, dict) else None
    column = options.get("paragraphs") if isinstance(options, dict) else None
    return column if isinstance(column, str) else None


def _known(name: str, columns: Iterable[str]) -> str:
    """What a missing column may be: the nearest there is, or all there are."""
    return nearest(name, columns) or "; there are " + ", ".join(map(str, columns))[:200]


def _golds(value: Any) -> list[str]:
    """The spellings of one gold answer; an empty one for what is none."""
    if isinstance(value, bool):
        return ["yes", "true"] if value else ["no", "false"]
    return [_scalar(value)]


def _scalar(value: Any) -> str:
    """Text of a scalar; empty for anything else."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    finite = isinstance(value, (str, int)) or (isinstance(value, float) and math.isfinite(value))
    return str(value) if finite else ""


def raw_rows(suite: Suite) -> Iterator[tuple[int, str, dict[str, Any] | str]]:
    """(line, raw text, row or why it is none) of every row."""
    if suite.data.startswith("hf:"):
        return _hub_rows(suite)
    path = Path(suite.data)
    if not os.path.exists(path):
        raise InputError("no such file", field="data", got=suite.data, wants="a .jsonl, .parquet or .csv file")
    readers = {".jsonl": _jsonl_rows, ".json": _jsonl_rows, ".parquet": _parquet_rows, ".csv": _csv_rows}
    reader = readers.get(path.suffix.lower())
    if reader is None or path.is_dir():
        raise InputError("not a kind of file Berth reads", field="data", got=suite.data, wants=".jsonl, .parquet, .csv")
    try:
        path.open("rb").close()
    except OSError as e:
        raise InputError(f"not readable: {e.strerror}", file=suite.data) from e
    return reader(path)


def _jsonl_rows(path: Path) -> Iterator[tuple[int, str, dict[str, Any] | str]]:
    first = True
    with path.open("rb") as file:
        for line, content in enumerate(file, 1):
            data = content.removeprefix(b"\xef\xbb\xbf") if line == 1 else content
            if not data.strip():
                continue
            if first and data.lstrip().startswith(b"["):
                raise InputError("is a JSON array", file=str(path), wants="one object a line")
            first, raw = False, data.decode("utf-8", "surrogateescape")
            try:
                row = json.loads(data.rstrip().decode("utf-8"))
            except UnicodeDecodeError as e:
                yield line, raw, f"not UTF-8 at byte {e.start + 1} of the line"
            except json.JSONDecodeError as e:
                yield line, raw, f"not JSON: {e.msg} at column {e.colno}"
            except RecursionError:
                yield line, raw, "not JSON: nested too deeply"
            except ValueError as e:
                yield line, raw, f"not JSON: {e}"
            else:
                yield line, raw, row if isinstance(row, dict) else f"is a JSON {type(row).__name__}, wants an object"


def _csv_rows(path: Path) -> Iterator[tuple[int, str, dict[str, Any] | str]]:
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as e:
        raise InputError(f"not UTF-8 at byte {e.start + 1}", file=str(path)) from e
    csv.field_size_limit(64 << 20)
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    line = 1
    try:
        names = list(reader.fieldnames or ())
        if twice := [name for name in names if names.count(name) > 1]:
            raise InputError("two columns of one name", file=f"{path}:1", got=twice[0], wants="different names")
        line = reader.line_num + 1
        for row in reader:
            raw = json.dumps(row, ensure_ascii=False)
            yield reader.line_num, raw, "has more cells than the header" if None in row else row
            line = reader.line_num + 1
    except csv.Error as e:
        raise InputError(f"not CSV: {e}, in the row that begins here", file=f"{path}:{line}") from e


def _parquet_rows(path: Path) -> Iterator[tuple[int, str, dict[str, Any] | str]]:
    line = 0
    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(1024):
                for row in batch.to_pylist():
                    line += 1
                    yield line, json.dumps(row, ensure_ascii=False, default=str), row
    except (OSError, ValueError) as e:
        raise InputError(f"not a Parquet file: {e}", file=str(path)) from e


def _hub_rows(suite: Suite) -> Iterator[tuple[int, str, dict[str, Any] | str]]:
    config = suite.config.data
    if config.split is None:
        raise InputError("an hf: dataset needs a split", field="data.split", wants="test, validation, …")
    try:
        load_dataset = importlib.import_module("datasets").load_dataset
    except (ImportError, AttributeError) as e:
        raise InputError("hf: data needs the package `datasets`", field="data", wants="pip install 'berth[hf]'") from e
    name, _, subset = suite.data.removeprefix("hf:").partition(":")
    try:
        rows = load_dataset(name, subset or None, split=config.split, revision=config.revision)
    except Exception as e:
        raise InputError(f"cannot load it: {e}", field="data", got=suite.data) from e
    for line, row in enumerate(rows, 1):
        yield line, json.dumps(row, ensure_ascii=False, default=str), dict(row)

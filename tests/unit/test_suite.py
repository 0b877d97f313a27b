import json
import socket
from pathlib import Path

import pandas as pd
import pytest
import yaml

from actors.errors import InputError
from pipeline.config import RunConfig
from pipeline.suite import load_suite, read_rows

ROOT = Path(__file__).parents[2]
SUITE = {"name": "tiny", "data": {"path": "rows.jsonl"}}
ROW = {"id": "a", "question": "Who?", "answer": "me"}


def make(tmp_path: Path, rows: list[object] | bytes, suite: dict | None = None, **run: object):
    """A suite folder with these rows; (suite, run config)."""
    (tmp_path / "suite.yaml").write_text(yaml.safe_dump(SUITE | (suite or {})), encoding="utf-8")
    content = rows if isinstance(rows, bytes) else b"".join(json.dumps(row).encode() + b"\n" for row in rows)
    (tmp_path / "rows.jsonl").write_bytes(content)
    config = RunConfig.model_validate({"suite": str(tmp_path), "out": "o", "model": {"id": "m"}} | run)
    return load_suite(tmp_path), config


@pytest.mark.parametrize("file", sorted((ROOT / "datasets").glob("*/suite.yaml")), ids=lambda path: path.parent.name)
def test_every_shipped_suite_is_valid(file):
    suite = load_suite(file.parent)
    assert suite.system
    assert suite.fewshot


def test_rows_become_tasks_with_samples_and_seeds(tmp_path):
    suite, run = make(tmp_path, [ROW, ROW | {"id": 7, "answer": ["x", 3, True]}], samples=2)
    rows = read_rows(suite, run)
    assert [task.row_id for task in rows.tasks] == ["a/0", "a/1", "7/0", "7/1"]
    assert rows.tasks[2].gold == ("x", "3", "yes", "true")
    assert len({task.seed for task in rows.tasks}) == 4
    assert all(0 <= task.seed < 2**63 for task in rows.tasks)
    assert read_rows(suite, run).tasks == rows.tasks


def test_limit_counts_tasks_and_seed_changes_seeds(tmp_path):
    suite, run = make(tmp_path, [ROW | {"id": str(i)} for i in range(5)], limit=2, samples=3)
    assert len(read_rows(suite, run).tasks) == 6
    other = run.model_copy(update={"seed": 1})
    assert read_rows(suite, other).tasks[0].seed != read_rows(suite, run).tasks[0].seed


def test_gold_pattern_takes_its_first_group(tmp_path):
    fields = {"id": None, "gold_pattern": r"####\s*(.+)$"}
    suite, run = make(tmp_path, [{"question": "q", "answer": "long\n#### 1,080"}], {"fields": fields})
    task = read_rows(suite, run).tasks[0]
    assert (task.task_id, task.gold) == ("line:1", ("1,080",))


@pytest.mark.parametrize(
    ("line", "field", "words"),
    [
        (b'{"id": "b", "question": "q", "answer": ', None, "not JSON"),
        (b'["a"]', None, "wants an object"),
        (b'{"id": "b", "questoin": "q", "answer": "x"}', "question", "did you mean `questoin`"),
        (b'{"id": "b", "zzz": "q", "answer": "x"}', "question", "missing; there are id, zzz, answer"),
        (b'{"id": "b", "question": "q", "answer": null}', "answer", "is null"),
        (b'{"id": "b", "question": "q", "answer": ""}', "answer", "not empty"),
        (b'{"id": "b", "question": "q", "answer": "  "}', "answer", "not empty"),
        (b'{"id": "b", "question": "q", "answer": ["", "Paris"]}', "answer", "not empty"),
        (b'{"id": "b", "question": "q", "answer": NaN}', "answer", "not empty"),
        (b'{"id": "b", "question": "q", "answer": -Infinity}', "answer", "not empty"),
        (b'{"id": "b", "question": "q\\ud800", "answer": "x"}', "question", "surrogate"),
        (b'{"id": "\\udfff", "question": "q", "answer": "x"}', "id", "surrogate"),
        (b'{"id": "b", "question": "q", "answer": "x"', None, "delimiter at column 43"),
        (b'{"id": "b", "question": 3, "answer": "x"}', "question", "is int, wants text"),
        (b'{"id": "b", "question": "  ", "answer": "x"}', "question", "is empty"),
        (b'{"id": "b", "question": "q"}', "answer", "missing"),
        (b'{"id": "b", "question": "q", "answer": []}', "answer", "not empty"),
        (b'{"id": "b", "question": "q", "answer": {"x": 1}}', "answer", "wants text"),
        (b'{"id": "", "question": "q", "answer": "x"}', "id", "not empty"),
        (b'{"id": "b", "question": "caf\xe9", "answer": "x"}', None, "not UTF-8 at byte 29"),
        (json.dumps({"id": "b", "question": "x" * 5_000_000, "answer": "x"}).encode(), "question", "5,000,000 bytes"),
        (b"[" * 100_000, None, "not JSON"),
    ],
)
def test_a_bad_row_names_file_line_and_field_and_is_kept(tmp_path, line, field, words):
    good = json.dumps(ROW).encode()
    suite, run = make(tmp_path, b"\n".join([good, b"", line, json.dumps(ROW | {"id": "c"}).encode()]))
    rows = read_rows(suite, run)
    assert [task.task_id for task in rows.tasks] == ["a", "c"]
    [reject] = rows.rejects
    assert (reject.line, reject.field) == (3, field)
    assert words in reject.reason
    assert str(reject).startswith(f"{tmp_path / 'rows.jsonl'}:3: ")
    assert len(reject.raw) <= 2000


@pytest.mark.parametrize(
    ("suite", "change", "field", "words"),
    [
        ({"fields": {"gold_pattern": "x(y)?"}}, {"answer": "x"}, "answer", "finds nothing"),
        ({"fields": {"gold_pattern": "#(.*)"}}, {"answer": "# "}, "answer", "finds nothing"),
        ({"prompt": {"user": "{question} {contxt}"}}, {"context": "c"}, "contxt", "did you mean `context`"),
        ({"prompt": {"user": "{question} {größe}"}}, {}, "größe", "prompt.user names it"),
        ({"prompt": {"user": "{question} {c}"}}, {"c": ["\ud800"]}, "prompt.user", "surrogate"),
        ({"fields": {"metadata": ["m"]}}, {"m": "\ud800"}, "m", "surrogate"),
        ({"tools": [{"search": {"paragraphs": "paragraf"}}]}, {"paragraphs": []}, "paragraf", "mean `paragraphs`"),
        ({"tools": [{"search": {"paragraphs": "p"}}]}, {"p": "text"}, "p", "is str, wants a list"),
        ({"cluster_by": "doc"}, {"docs": 1}, "doc", "did you mean `docs`"),
        ({"cluster_by": "doc"}, {"doc": None}, "doc", "not empty"),
        ({"cluster_by": "doc"}, {"doc": [1]}, "doc", "not empty"),
        ({"cluster_by": "doc"}, {"doc": {"a": 1}}, "doc", "not empty"),
    ],
)
def test_a_row_that_does_not_suit_its_suite_is_rejected(tmp_path, suite, change, field, words):
    rows = read_rows(*make(tmp_path, [ROW | change], suite))
    assert not rows.tasks
    assert rows.rejects[0].field == field
    assert words in rows.rejects[0].reason


def test_a_metadata_column_that_no_row_has_is_refused(tmp_path):
    suite, run = make(tmp_path, [ROW, ROW | {"id": "b", "level": 1}], {"fields": {"metadata": ["levle"]}})
    with pytest.raises(InputError, match=r"rows.jsonl: fields.metadata: no row has it; did you mean `level`"):
        read_rows(suite, run)
    assert len(read_rows(suite, run.model_copy(update={"limit": 1})).tasks) == 1  # a later row may have it


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('id,question,answer\na,q,x\nb,q,"x\nc,q,y\n', "rows.csv:3: not CSV: unexpected end of data"),
        ('id,question,answer\na,q,"x" y\n', "rows.csv:2: not CSV"),
        ("id,question,answer,answer\na,q,x,y\n", r"rows.csv:1: two columns of one name .got 'answer'"),
    ],
)
def test_a_broken_csv_file_is_named_with_its_line(tmp_path, text, words):
    _, run = make(tmp_path, [ROW])
    (tmp_path / "rows.csv").write_text(text)
    with pytest.raises(InputError, match=words):
        read_rows(load_suite(tmp_path, str(tmp_path / "rows.csv")), run)


def test_a_csv_column_may_have_no_name(tmp_path):
    _, run = make(tmp_path, [ROW])
    (tmp_path / "rows.csv").write_text(",id,question,answer\n0,a,q,x\n1,b,q,x,y\n")
    rows = read_rows(load_suite(tmp_path, str(tmp_path / "rows.csv")), run)
    assert [task.task_id for task in rows.tasks] == ["a"]
    assert [reject.reason for reject in rows.rejects] == ["has more cells than the header"]


def test_a_json_array_is_named_once(tmp_path):
    with pytest.raises(InputError, match=r"rows.jsonl: is a JSON array; wants one object a line"):
        read_rows(*make(tmp_path, json.dumps([ROW], indent=1).encode()))


def test_rows_that_cannot_be_read(tmp_path):
    suite, run = make(tmp_path, [ROW])
    (tmp_path / "rows.jsonl").unlink()
    with socket.socket(socket.AF_UNIX) as unreadable:
        unreadable.bind(str(tmp_path / "rows.jsonl"))
        with pytest.raises(InputError, match=r"rows.jsonl: not readable: No such device"):
            read_rows(suite, run)


@pytest.mark.parametrize("name", ["my system.txt", "system.TXT", "x.prompt", "instructions"])
def test_a_prompt_that_is_a_file_is_read(tmp_path, name):
    (tmp_path / name).write_text("Be brief.")
    assert make(tmp_path, [ROW], {"prompt": {"system": name}})[0].system == "Be brief."


@pytest.mark.parametrize("text", ["", "Be brief.", "Answer in Python 3.11", "one.\ntwo.txt", "Think.", "x" * 5000])
def test_a_prompt_that_is_no_file_is_text(tmp_path, text):
    assert make(tmp_path, [ROW], {"prompt": {"system": text}})[0].system == text


def test_duplicate_id_names_both_lines(tmp_path):
    suite, run = make(tmp_path, [ROW, ROW | {"id": "b"}, ROW])
    with pytest.raises(InputError, match=r"rows.jsonl:3: id: the same id as line 1"):
        read_rows(suite, run)


def test_an_empty_file_is_refused(tmp_path):
    suite, run = make(tmp_path, b"\n\n")
    with pytest.raises(InputError, match="no rows"):
        read_rows(suite, run)


def test_csv_and_parquet_hold_the_same_rows(tmp_path):
    suite, run = make(tmp_path, [ROW, ROW | {"id": "b"}])
    frame = pd.DataFrame([ROW, ROW | {"id": "b"}])
    frame.to_csv(tmp_path / "rows.csv", index=False)
    frame.to_parquet(tmp_path / "rows.parquet")
    wanted = read_rows(suite, run).tasks
    for name in ("rows.csv", "rows.parquet"):
        assert read_rows(load_suite(tmp_path, str(tmp_path / name)), run).tasks == wanted


@pytest.mark.parametrize(
    ("data", "words"),
    [("none.jsonl", "no such file"), ("suite.yaml", "not a kind of file"), ("hf:org/name", "split")],
)
def test_data_that_cannot_be_read(tmp_path, data, words):
    _, run = make(tmp_path, [ROW])
    path = data if data.startswith("hf:") else str(tmp_path / data)
    with pytest.raises(InputError, match=words):
        read_rows(load_suite(tmp_path, path), run)


def test_a_broken_parquet_file_is_named(tmp_path):
    _, run = make(tmp_path, [ROW])
    (tmp_path / "rows.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(InputError, match=r"rows.parquet: not a Parquet file"):
        read_rows(load_suite(tmp_path, str(tmp_path / "rows.parquet")), run)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"primry": "f1"}, "did you mean `primary`"),
        ({"fields": {"gold_pattern": "("}}, "regular expression"),
        ({"fields": {"gold_pattern": "x"}}, "with a group"),
        ({"prompt": {"system": "none.txt"}}, "prompt.system: no such file"),
        ({"prompt": {"system": "no ne.TXT"}}, "prompt.system: no such file"),
        ({"prompt": {"fewshot": "x.prompt"}}, "prompt.fewshot: no such file"),
        ({"prompt": {"user": "Answer it."}}, "prompt.user: names no field"),
        ({"prompt": {"user": "{question} {größe}"}, "fields": {"gold": "größe"}}, "shows the model the answer"),
        ({"report_by": ["domain"]}, "report_by: not a metadata column"),
        ({"name": "a/b"}, "name"),
        ({"prompt": {"user": "{question} hint: {answer}"}}, "shows the model the answer"),
        ({"limits": {"max_steps": -1}}, "limits.max_steps"),
    ],
)
def test_a_wrong_suite_field_is_named(tmp_path, change, words):
    with pytest.raises(InputError, match=r"suite.yaml") as caught:
        make(tmp_path, [ROW], change)
    assert words in str(caught.value)


def test_no_such_suite(tmp_path):
    with pytest.raises(InputError, match="no such suite folder"):
        load_suite(tmp_path / "none")

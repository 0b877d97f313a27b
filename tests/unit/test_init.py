"""`init suite`: what it writes passes every check; what it cannot use leaves nothing behind."""

import json
import os
import shutil

import pytest

from actors.errors import InputError
from pipeline.config import load_run
from pipeline.init import write_suite
from pipeline.preflight import prepare
from pipeline.suite import load_suite, read_rows

PARAGRAPH = {"title": "Ankor", "text": "Ankor is a port."}
FILES = {
    "worked.jsonl": json.dumps({"question": "How many?", "answer": "2 + 2 = <<2+2=4>>4\n#### 4"}),
    "plain.jsonl": json.dumps({"question": "How many?", "answer": "4"}),
    "named.jsonl": json.dumps({"QID": "x", "Query": "Which port?", "Target": "Ankor"}),
    "own.jsonl": json.dumps({"question": "Which port?", "answer": "Ankor", "paragraphs": [PARAGRAPH]}),
    "table.csv": "id,question,answer\n7,How many?,4\n",
}


@pytest.mark.parametrize("name", FILES)
def test_what_it_writes_passes_every_check(tmp_path, name):
    (tmp_path / name).write_text(FILES[name])
    written = write_suite(str(tmp_path / "acme"), tmp_path / name)
    assert {path.rpartition("/")[2] for path in written} == {path.name for path in (tmp_path / "acme").iterdir()}
    prepared = prepare(load_run(tmp_path / "acme" / "run.yaml"))
    assert [task.gold[0] for task in prepared.rows.tasks] in (["4"], ["Ankor"])
    assert not prepared.rows.rejects
    assert prepared.suite.primary == ("exact_match" if name in ("named.jsonl", "own.jsonl") else "numeric_match")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"id": 1, "question": "?", "answer": "a"}\n{"id": 1, "question": "?", "answer": "b"}', "same id as line 1"),
        ('{"text": "?", "answer": "a"}', "no column looks like the question"),
        ('{"question": "?", "label2": "a"}', "no column looks like the answer"),
        ("", "rows"),
        ('{"question": "?", "answer": null}\n{"question": "?", "answer": ""}', "every row was rejected"),
    ],
)
def test_a_file_that_cannot_be_used_leaves_no_folder(tmp_path, text, said):
    data = tmp_path / "rows.jsonl"
    data.write_text(text)
    with pytest.raises(InputError, match=said) as refused:
        write_suite(str(tmp_path / "acme"), data)
    assert str(data) in str(refused.value)
    assert not (tmp_path / "acme").exists()


@pytest.mark.parametrize("name", ["null", "2024", "1e3"])
@pytest.mark.parametrize("data", ["a: b #1.csv", '{it\'s}, "so".csv'])
def test_names_that_yaml_reads_otherwise(tmp_path, name, data):
    (tmp_path / data).write_text("ID,Question,Answer\n007,How many?,4\n8,Which port?,Ankor\n")
    write_suite(str(tmp_path / name), tmp_path / data)
    run = load_run(tmp_path / name / "run.yaml")
    suite = load_suite(run.suite)
    assert (suite.config.name, suite.data, suite.primary) == (name, str(tmp_path / name / data), "exact_match")
    assert [task.task_id for task in read_rows(suite, run).tasks] == ["007", "8"]


def test_a_folder_that_cannot_be_made_or_filled_leaves_nothing(tmp_path, monkeypatch):
    data = tmp_path / "plain.jsonl"
    data.write_text(FILES["plain.jsonl"])
    with pytest.raises(InputError, match="name: cannot be made: Not a directory"):
        write_suite(str(data / "acme"), data)
    monkeypatch.setattr(shutil, "copyfile", lambda *_: os.stat("/none"))
    with pytest.raises(InputError, match="acme: cannot be written: No such file"):
        write_suite(str(tmp_path / "a" / "b" / "acme"), data)
    assert [path.name for path in tmp_path.iterdir()] == ["plain.jsonl"]


def test_what_is_there_is_not_overwritten(tmp_path):
    (tmp_path / "acme").mkdir()
    (tmp_path / "plain.jsonl").write_text(FILES["plain.jsonl"])
    with pytest.raises(InputError, match="already exists"):
        write_suite(str(tmp_path / "acme"), tmp_path / "plain.jsonl")

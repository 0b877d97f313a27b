"""`init suite`: what it writes passes every check; what it cannot use leaves nothing behind."""

import json

import pytest

from actors.errors import InputError
from pipeline.config import load_run
from pipeline.init import write_suite
from pipeline.preflight import prepare

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
    ],
)
def test_a_file_that_cannot_be_used_leaves_no_folder(tmp_path, text, said):
    data = tmp_path / "rows.jsonl"
    data.write_text(text)
    with pytest.raises(InputError, match=said) as refused:
        write_suite(str(tmp_path / "acme"), data)
    assert str(data) in str(refused.value)
    assert not (tmp_path / "acme").exists()


def test_what_is_there_is_not_overwritten(tmp_path):
    (tmp_path / "acme").mkdir()
    (tmp_path / "plain.jsonl").write_text(FILES["plain.jsonl"])
    with pytest.raises(InputError, match="already exists"):
        write_suite(str(tmp_path / "acme"), tmp_path / "plain.jsonl")

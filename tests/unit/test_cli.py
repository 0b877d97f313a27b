"""The command line in process: what is wrong is said in words, with the exit code for it."""

import json
import shutil
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from pipeline import __version__
from pipeline.__main__ import app
from pipeline.console import Screen, clean
from pipeline.show import expectation

ROOT = Path(__file__).parents[2]
CONFIG = str(ROOT / "configs" / "quickstart.yaml")


def invoke(*args):
    return CliRunner().invoke(app, list(args))


@pytest.fixture
def suite(tmp_path):
    """A suite to edit, and its suite.yaml's content."""
    shutil.copytree(ROOT / "datasets" / "quickstart", tmp_path / "suite")
    return tmp_path / "suite", yaml.safe_load((tmp_path / "suite" / "suite.yaml").read_text())


def refused(*args):
    result = invoke("validate", CONFIG, *args)
    assert result.exit_code == 2, result.output
    assert isinstance(result.exception, SystemExit)
    assert "Traceback" not in result.output
    return result.stderr


@pytest.mark.parametrize(
    ("assignment", "words"),
    [
        ("model.max_model_len=1000000", "error model.max_model_len: longer than the model's context (got 1000000)"),
        ("limit=-1", "limit: not valid (got -1); wants greater than 0"),
        ("model.idd=x", "model.idd: unknown field; did you mean `id`?"),
    ],
)
def test_a_field_that_cannot_be_is_named(smollm2, assignment, words):
    assert words in refused("--set", assignment)


def test_few_shot_examples_call_declared_tools_only(suite):
    folder, _ = suite
    file = folder / "fewshot.txt"
    file.write_text(file.read_text().replace("Search[", "Serch["))
    said = refused("--set", f"suite={folder}")
    assert "the few-shot examples call Serch, which is not a declared tool; did you mean `search`?" in said


def test_a_prompt_that_leaves_no_room_is_refused(smollm2, suite):
    folder, content = suite
    content["limits"]["trajectory_tokens"] = 100
    (folder / "suite.yaml").write_text(yaml.safe_dump(content))
    said = refused("--set", f"suite={folder}")
    assert "limits.trajectory_tokens is 100; wants a shorter prompt" in said.replace("\n", " ")


def test_an_option_is_blamed_by_its_name():
    assert "--limit" in refused("--limit", "0")


def test_what_is_valid_is_said_in_json(smollm2):
    result = invoke("validate", CONFIG, "--limit", "3", "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert (found["rows"], found["rejected"], found["context_tokens"]) == (3, 0, 8192)
    assert "3 rows can be run" in result.stderr


def test_the_version():
    assert invoke("--version").stdout == f"berth {__version__}\n"


@pytest.mark.parametrize("command", ["run", "validate", "plan", "report", "score", "init suite"])
def test_each_command_shows_an_example(command):
    result = invoke(*command.split(), "--help")
    assert result.exit_code == 0
    assert f"berth {command} " in result.stdout.rpartition("Example")[2]


def test_text_of_a_model_neither_steers_nor_reorders(capsys):
    assert clean("a\x1b[2Jb\u202ec\u2066d\te\n") == "a\ufffd[2Jb\ufffdc\ufffdd\te\n"
    Screen().line("tool", ":smile: [bold]")
    assert capsys.readouterr().out == "tool       :smile: [bold]\n"


@pytest.mark.parametrize(
    ("change", "shown"),
    [
        ({}, True),
        ({"limit": 20}, False),
        ({"agent": {"format": "react_chat"}}, False),
        ({"sampling": {"temperature": 1.0}}, False),
    ],
)
def test_a_score_is_expected_only_where_it_was_measured(tmp_path, change, shown):
    config = {"model": {"id": "m"}, "limit": None, "agent": {"format": "react_text"}, "sampling": {"temperature": 0.0}}
    info = {"config": config | change, "suite": {"expect": {"m": [0.02, 0.16]}}}
    (tmp_path / "run.json").write_text(json.dumps(info))
    assert (expectation(str(tmp_path)) is not None) == shown

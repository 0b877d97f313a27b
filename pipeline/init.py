"""`berth init suite NAME --data FILE`: a suite and a run config that work, from a file of questions and answers.

Guesses which column is what, and writes its guesses where they are easy to change.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

from actors.errors import InputError
from pipeline.config import load_run, parse
from pipeline.preflight import check_gold, describe_rejects
from pipeline.scoring import load_scorers
from pipeline.suite import Suite, SuiteConfig, load_suite, raw_rows, read_rows

QUESTIONS = ("question", "query", "prompt", "problem", "input", "q")
GOLDS = ("answer", "answers", "gold", "target", "label", "output", "a")
IDS = ("id", "qid", "_id", "uid", "key", "question_id", "task_id")

SUITE = """\
name: {name}
version: 1                          # raise it when rows, prompt or tools change
data: {{path: {data}}}
fields: {{id: {id}, question: {question}, gold: {gold}{pattern}, metadata: []}}
prompt: {{system: system.txt, fewshot: fewshot.txt, user: "Question: {{question}}"}}
tools:
{tools}
limits: {{max_steps: 6, trajectory_tokens: 2048}}
scorers: [{scorers}]          # of exact_match, f1, numeric_match, or "my_scorer:function" beside this file
primary: {primary}
"""

RUN = """\
suite: .
out: ../runs/{name}
limit: 8                            # remove it to run all rows
model: {{id: smollm2-135m}}           # or an HF id, a folder, a .gguf file
agent: {{format: react_text}}
"""

SYSTEM = """\
Answer the question by taking turns of Thought, Action and Observation. A Thought reasons about what is known and
what is missing. An Action is one of: {actions}. An Observation is what the action returned.
"""

FEWSHOT_SEARCH = """\
Question: In which country is the town of Example?
Thought 1: I need to search Example and find its country.
Action 1: Search[Example]
Observation 1: Example is a small town in the country of Sample.
Thought 2: Example is in Sample, so the answer is Sample.
Action 2: Finish[Sample]
"""

FEWSHOT_CALCULATOR = """\
Question: A box holds 12 eggs. How many eggs are in 7 boxes?
Thought 1: I need to multiply 12 by 7.
Action 1: Calculator[12 * 7]
Observation 1: 84
Thought 2: There are 84 eggs.
Action 2: Finish[84]
"""


def write_suite(name: str, data: Path) -> list[str]:
    """Write the suite folder `name`; the paths written.

    Raises:
        InputError: no such file, no row that can be used, no column that looks like a question or an answer, a gold
            answer that does not score 1.0, or a folder that exists or cannot be written. Nothing is left behind then.
    """
    folder = Path(name)
    if os.path.exists(folder):
        raise InputError("already exists", field="name", got=name, wants="a new name")
    config = parse(SuiteConfig, {"name": folder.name, "data": {"path": str(data)}}, "berth init suite")
    source = Suite(config, Path.cwd(), str(data), "", "")
    first = next((row for _, _, row in raw_rows(source) if isinstance(row, dict)), None)
    if first is None:
        raise InputError("no rows", file=str(data), wants="at least one")
    question, gold = _pick(first, QUESTIONS, data, "question"), _pick(first, GOLDS, data, "answer")
    paragraphs = "paragraphs" if isinstance(first.get("paragraphs"), list) else None
    golds = [str(row[gold]) for _, _, row in raw_rows(source) if isinstance(row, dict) and row.get(gold) is not None]
    worked = all(re.search(r"####[ \t]*\S+\s*$", one) for one in golds)  # its number stands at the end, as in GSM8K
    primary = "numeric_match" if worked or all(map(_is_number, golds)) else "exact_match"
    tools = f"  - search: {{paragraphs: {paragraphs}}}" if paragraphs else "  - calculator: {}"
    fewshot = FEWSHOT_SEARCH if paragraphs else FEWSHOT_CALCULATOR
    actions = (
        "Search[entity], Lookup[keyword], Finish[answer]" if paragraphs else "Calculator[expression], Finish[answer]"
    )
    written = {
        "suite.yaml": SUITE.format(
            name=_in_yaml(folder.name),
            data=_in_yaml(data.name),
            id=_in_yaml(_column(first, IDS)),
            question=_in_yaml(question),
            gold=_in_yaml(gold),
            pattern=', gold_pattern: "####\\\\s*(.+)$"' if worked else "",
            tools=tools,
            scorers=f"{primary}, f1" if primary == "exact_match" else primary,
            primary=primary,
        ),
        "run.yaml": RUN.format(name=folder.name),
        "system.txt": SYSTEM.format(actions=actions),
        "fewshot.txt": fewshot,
    }
    made = next(path for path in (*reversed(folder.parents), folder) if not os.path.exists(path))
    try:
        folder.mkdir(parents=True)
    except OSError as e:
        raise InputError(f"cannot be made: {e.strerror}", field="name", got=name) from e
    try:
        for file, text in written.items():
            (folder / file).write_text(text, encoding="utf-8")
        shutil.copyfile(data, folder / data.name)
        _check(folder, data)
    except BaseException as e:
        shutil.rmtree(made)
        if isinstance(e, OSError):
            raise InputError(f"cannot be written: {e.strerror}", file=str(folder)) from e
        raise
    return [str(folder / file) for file in (*written, data.name)]


def _check(folder: Path, data: Path) -> None:
    """All of the data under what was guessed; messages name the file that was given."""
    run = load_run(folder / "run.yaml").model_copy(update={"limit": None})
    suite = load_suite(run.suite, str(data))
    rows = read_rows(suite, run)
    if not rows.tasks:
        raise InputError("every row was rejected:\n" + describe_rejects(rows.rejects))
    check_gold(suite, load_scorers(suite.config.scorers, suite.folder), rows)


def _in_yaml(text: str | None) -> str:
    """As it stands in a list or mapping in braces."""
    return yaml.safe_dump([text], default_flow_style=True, allow_unicode=True, width=1 << 20).strip()[1:-1]


def _is_number(gold: str) -> bool:
    try:
        float(gold.replace(",", ""))
    except ValueError:
        return False
    return True


def _column(row: Iterable[Any], names: tuple[str, ...]) -> str | None:
    """The row's column of the first of these names, in any case."""
    by_name = {str(name).casefold(): str(name) for name in row}
    return next((by_name[name] for name in names if name in by_name), None)


def _pick(row: dict[str, Any], names: tuple[str, ...], file: Path, what: str) -> str:
    found = _column(row, names)
    if found is None:
        raise InputError(
            f"no column looks like the {what}", file=str(file), got=", ".join(map(str, row)), wants=" or ".join(names)
        )
    return found

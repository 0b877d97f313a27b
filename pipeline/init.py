"""`berth init suite NAME --data FILE`: a suite and a run config that work, from a file of questions and answers.

Guesses which column is what, and writes its guesses where they are easy to change.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

from actors.errors import InputError
from pipeline.config import load_run, parse
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
        InputError: no such file, no rows, no column that looks like a question or an answer, folder exists.
    """
    folder = Path(name)
    if folder.exists():
        raise InputError("already exists", field="name", got=name, wants="a new name")
    config = parse(SuiteConfig, {"name": folder.name, "data": {"path": str(data)}}, "berth init suite")
    first = next(
        (row for _, _, row in raw_rows(Suite(config, Path.cwd(), str(data), "", "")) if isinstance(row, dict)), None
    )
    if first is None:
        raise InputError("no rows", file=str(data), wants="at least one")
    question, gold = _pick(first, QUESTIONS, data, "question"), _pick(first, GOLDS, data, "answer")
    paragraphs = "paragraphs" if isinstance(first.get("paragraphs"), list) else None
    worked = re.search(r"####[ \t]*\S+\s*$", str(first[gold]))  # a solution with its number at the end, as in GSM8K
    primary = "numeric_match" if worked or _is_number(first[gold]) else "exact_match"
    tools = f"  - search: {{paragraphs: {paragraphs}}}" if paragraphs else "  - calculator: {}"
    fewshot = FEWSHOT_SEARCH if paragraphs else FEWSHOT_CALCULATOR
    actions = (
        "Search[entity], Lookup[keyword], Finish[answer]" if paragraphs else "Calculator[expression], Finish[answer]"
    )
    written = {
        "suite.yaml": SUITE.format(
            name=folder.name,
            data=data.name,
            id=next((one for one in IDS if one in first), "null"),
            question=question,
            gold=gold,
            pattern=', gold_pattern: "####\\\\s*(.+)$"' if worked else "",
            tools=tools,
            scorers=f"{primary}, f1" if primary == "exact_match" else primary,
            primary=primary,
        ),
        "run.yaml": RUN.format(name=folder.name),
        "system.txt": SYSTEM.format(actions=actions),
        "fewshot.txt": fewshot,
    }
    folder.mkdir(parents=True)
    for file, text in written.items():
        (folder / file).write_text(text, encoding="utf-8")
    shutil.copyfile(data, folder / data.name)
    try:
        run = load_run(folder / "run.yaml")
        read_rows(load_suite(run.suite, str(data)), run)
    except InputError:
        shutil.rmtree(folder)
        raise
    return [str(folder / file) for file in (*written, data.name)]


def _is_number(gold: Any) -> bool:
    try:
        float(str(gold).replace(",", ""))
    except ValueError:
        return False
    return True


def _pick(row: dict[str, Any], names: tuple[str, ...], file: Path, what: str) -> str:
    by_name = {str(name).casefold(): str(name) for name in row}
    for name in names:
        if name in by_name:
            return by_name[name]
    raise InputError(
        f"no column looks like the {what}", file=str(file), got=", ".join(map(str, row)), wants=" or ".join(names)
    )

"""Runs without a model: a suite of any size, settings of the scripted engine, what the journal of a run holds."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

SEARCH = "[search: {corpus: corpus.jsonl}]"


def write_suite(folder: Path, rows: int, tools: str = SEARCH, longer: Mapping[int, int] | None = None) -> Path:
    """A suite of `rows` questions `q0`, `q1`, … with a small corpus; its folder.

    Args:
        folder: made where it is absent.
        tools: suite.yaml's `tools`, in YAML.
        longer: characters that these questions have more than the others.
    """
    folder.mkdir(exist_ok=True)

    def question(n: int) -> str:
        size = (longer or {}).get(n, 0)
        return f"Question number {n}?" + ("".join(f" {k}" for k in range(size)))[:size]

    lines = (json.dumps({"id": f"q{n}", "question": question(n), "answer": "yes"}) for n in range(rows))
    (folder / "rows.jsonl").write_text("\n".join(lines))
    corpus = (json.dumps({"title": f"thing {n}", "text": f"Thing {n} is a thing."}) for n in range(3))
    (folder / "corpus.jsonl").write_text("\n".join(corpus))
    (folder / "suite.yaml").write_text(
        f"name: scripted\ndata: {{path: rows.jsonl}}\ntools: {tools}\nscorers: [exact_match]\n"
    )
    return folder


def made_up_word(n: int) -> str:
    """The number in base 16, in letters."""
    return f"{n:05x}".translate(str.maketrans("0123456789", "ghijklmnop"))


def made_up_text(seed: str, words: int) -> str:
    """So many of the first 1,000 made-up words, each behind a blank: as many tokens of `common.made_up_tokenizer`."""
    return "".join(f" {made_up_word(n)}" for n in random.Random(seed).choices(range(1000), k=words))


def script(**settings: object) -> dict[str, str]:
    """Environment of the scripted engine (tests/scripted.py)."""
    return {"BERTH_SCRIPT": json.dumps(settings)}


def finished_rows(out: Path) -> set[str]:
    """Rows that the journal of a run folder holds as finished."""
    return {record["row_id"] for record in _records(out) if record["kind"] == "finish"}


def begun_rows(out: Path) -> set[str]:
    """Rows of which the journal of a run folder holds an attempt's start, which stands there before its first call."""
    return {record["row_id"] for record in _records(out) if record["kind"] == "begin"}


def generations(out: Path) -> Counter[str]:
    """How many of each row the journal of a run folder holds (`journal: steps`)."""
    events = {(record["row_id"], record["n"], record["event"]["kind"]) for record in _records(out) if "event" in record}
    return Counter(row_id for row_id, _, kind in events if kind == "generation")  # a merge may have left two copies


def _records(out: Path) -> Iterator[dict[str, Any]]:
    for path in (out / "journal").glob("*.jsonl"):
        yield from map(json.loads, path.read_text().splitlines())


def lines_in(path: Path) -> list[str]:
    """The file's lines so far; none where it is absent."""
    return path.read_text().splitlines() if path.exists() else []

"""Imports go one way: tests, bench → pipeline → actors → actors/engine → libraries."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MAY_IMPORT = {
    "actors/engine": {"actors.engine", "actors.messages", "actors.errors"},
    "actors": {"actors"},
    "pipeline": {"actors", "pipeline"},
}
LEAVES = {"actors/messages.py", "actors/errors.py"}
OURS = ("actors", "pipeline", "tests", "bench")


def imports(path: Path) -> set[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
    return {name for name in found if name.split(".")[0] in OURS}


FILES = sorted(path.relative_to(ROOT) for room in ("actors", "pipeline") for path in (ROOT / room).rglob("*.py"))


@pytest.mark.parametrize("file", FILES, ids=str)
def test_imports_go_one_way(file):
    room = next(room for room in MAY_IMPORT if str(file).startswith(room + "/"))
    allowed = set() if str(file) in LEAVES else MAY_IMPORT[room]
    for name in imports(ROOT / file):
        assert any(name == one or name.startswith(one + ".") for one in allowed), f"{file} imports {name}"


def test_the_agent_knows_no_engine():
    assert not any(name.startswith("actors.engine") for name in imports(ROOT / "actors" / "agent.py"))


def test_datasets_holds_no_python():
    assert not list((ROOT / "datasets").rglob("*.py"))

"""Tools: declaration, loading, limits, the built-in ones, and the example's own."""

import asyncio
import gc
import json
import logging
import os
import subprocess
import sys
import textwrap
import threading
import time
import tracemalloc
from pathlib import Path
from typing import Annotated, Literal

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from actors.errors import InputError, ToolCrash, ToolError
from actors.messages import Step, Task, Trajectory
from actors.tools import Toolbox, ToolThreads, declare, load_attribute, load_tools, tools_sha
from actors.tools import load as load_module
from actors.tools.calculator import calculator

ROOT = Path(__file__).parents[2]
CUSTOM = ROOT / "examples" / "custom"
ARTICLES = [
    {"title": "Shōjo manga", "text": "Shōjo manga is manga for girls. It is Japanese."},
    {"title": "Elde", "text": "The Elde is a river. It rises near Lake Mur. The river is long."},
    {"title": "Elde (ship)", "text": "Elde was a ship named for the river Elde."},
    {"title": "Tarnbrook", "text": "Tarnbrook is a town on the Elde."},
    {"title": "O'Neill Bridge", "text": "A bridge in Tarnbrook."},
]


@pytest.fixture(autouse=True)
def no_leftover_modules():
    before, finders = set(sys.modules), list(sys.meta_path)
    yield
    for name in set(sys.modules) - before:
        if name.startswith(("_berth_", "mine", "acme", "sibling", "broken", "pack")):
            del sys.modules[name]
    sys.meta_path[:] = finders


def task(**row: object) -> Task:
    return Task("t", 0, "q", ("a",), {}, row, 0)


def cut(text: str, max_tokens: int) -> str:
    """One character is one token."""
    return text[:max_tokens]


def toolbox(*targets: object, threads: ToolThreads | None = None, row: dict | None = None, **limits: object) -> Toolbox:
    tools = [
        declare(target, name=getattr(target, "__name__", "tool"), field="tools", args={}, **limits)
        for target in targets
    ]
    return Toolbox(tools, task(**row or {}), cut, threads or ToolThreads())


def corpus(folder: Path, rows: list[dict] | None = None) -> Path:
    path = folder / "corpus.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in (ARTICLES if rows is None else rows)))
    return path


def searcher(folder: Path, **options: object) -> Toolbox:
    corpus(folder)
    tools = load_tools([{"search": {"corpus": "corpus.jsonl", **options}}], folder)
    return Toolbox(tools, task(), cut, ToolThreads())


async def observe(box: Toolbox, name: str, **arguments: object) -> str:
    return (await box.call(name, arguments)).observation


# --- declaration


def test_declaration_from_type_hints():
    def find(
        entity: str,
        count: int = 3,
        near: float = 0.5,
        deep: bool = False,
        order: Literal["up", "down"] = "up",
        tags: list[str] | None = None,
        note: Annotated[str, "free text"] = "",
    ) -> str:
        """Find an entity.

        More that the model is not told.
        """
        return entity

    tool = declare(find, name="find", field="tools[0]", args={})
    assert tool.spec["name"] == "find"
    assert tool.spec["description"] == "Find an entity."
    parameters = tool.spec["parameters"]
    assert parameters["required"] == ["entity"]
    assert parameters["additionalProperties"] is False
    kinds = {name: schema.get("type") for name, schema in parameters["properties"].items()}
    assert kinds == {
        "entity": "string",
        "count": "integer",
        "near": "number",
        "deep": "boolean",
        "order": "string",
        "tags": None,
        "note": "string",
    }
    assert parameters["properties"]["order"]["enum"] == ["up", "down"]
    assert parameters["properties"]["count"]["default"] == 3
    json.dumps(tool.spec)
    assert tool.check({"entity": 1984, "count": "4", "order": "down"}) == {
        "entity": "1984",
        "count": 4,
        "order": "down",
    }


def no_docstring(x: str) -> str:
    return x


def no_hint(x) -> str:
    """Doc."""
    return x


def odd_hint(x: dict[str, int]) -> str:
    """Doc."""
    return str(x)


def odd_result(x: str) -> dict:
    """Doc."""
    return {x: 1}


def many(*xs: str) -> str:
    """Doc."""
    return str(xs)


def lost_hint(x: "Missing") -> str:  # noqa: F821
    """Doc."""
    return str(x)


class Needy:
    """Doc."""

    def __init__(self, path: str):
        self.path = path

    def __call__(self, x: str) -> str:
        return self.path + x


class Uncallable:
    """Doc."""


@pytest.mark.parametrize(
    ("target", "args", "says"),
    [
        (no_docstring, {}, "docstring"),
        (no_hint, {}, "'x' has no type hint; wants str, int"),
        (odd_hint, {}, "unsupported type"),
        (odd_result, {}, "return type"),
        (many, {}, "cannot be passed by name"),
        (lost_hint, {}, "type hints cannot be read"),
        (Needy, {}, "__init__ needs 'path'"),
        (Needy, {"paths": "x"}, "unknown name in args (got 'paths'); wants path"),
        (Uncallable, {}, "cannot be called"),
        ("text", {}, "cannot be called"),
    ],
)
def test_what_cannot_be_declared(target, args, says):
    with pytest.raises(InputError) as e:
        declare(target, name="mine", field="tools[2].use", args=args)
    assert says in str(e.value)
    assert "tools[2].use" in str(e.value)


async def test_fixed_arguments_and_the_task_are_not_the_models():
    def scale(x: int, task: Task, factor: int = 1) -> str:
        """Multiply."""
        return f"{task.row['unit']} {x * factor}"

    tool = declare(scale, name="scale", field="tools", args={"factor": 3})
    assert list(tool.arguments) == ["x"]
    box = Toolbox(
        [tool, declare(Needy, name="needy", field="", args={"path": "p"})], task(unit="m"), cut, ToolThreads()
    )
    assert await observe(box, "scale", x=2) == "m 6"
    assert await observe(box, "Needy", x="q") == "pq"


# --- loading


@pytest.mark.parametrize(
    ("entry", "says"),
    [
        ({"serch": {}}, "there is no tool 'serch'; wants 'search'"),
        ({"Calculator": {}}, "wants 'calculator'"),
        ({"search": {}}, "either corpus or paragraphs"),
        ({"search": {"corpus": "none.jsonl"}}, "does not exist"),
        ({"search": {"paragraphs": "p", "topk": 2}}, "unknown option 'topk'; wants 'top_k'"),
        ({"search": {"paragraphs": "p", "top_k": 0}}, "tools[0].search.top_k"),
        ({"search": {"paragraphs": "p"}, "calculator": {}}, "not one tool"),
        ({"calculator": {"timeout_s": -1}}, "tools[0].calculator.timeout_s"),
        ({"calculator": 3}, "tools[0].calculator"),
        ({"lookup": {}}, "lookup needs search"),
        ({"use": "mine"}, "not module:attr"),
        ({"use": "mine:"}, "not module:attr"),
        ({"use": "../mine:f"}, "not module:attr"),
        ({"use": "mien:good"}, "no module 'mien'"),
        ({"use": "mien:good"}, "wants 'mine'"),
        ({"use": "mine:goood"}, "has no 'goood' (got 'mine:goood'); wants 'good'"),
        ({"use": "mine:good", "timeout": 3}, "unknown option 'timeout'; wants 'timeout_s'"),
        ({"use": "mine:good", "env": ["BERTH_NO_SUCH"]}, "BERTH_NO_SUCH is not set"),
        ({"use": "mine:good", "args": {"y": 1}}, "unknown name in args"),
        ({"use": "broken:f"}, "importing 'broken' failed: ValueError: at import"),
        ({"use": "mine:finish"}, "two tools of one name"),
        ({"use": "math:hypot"}, "docstring|arguments|type hint"),
    ],
)
def test_what_cannot_be_loaded(tmp_path, entry, says):
    (tmp_path / "mine.py").write_text(
        'def good(x: str) -> str:\n    """Doc."""\n    return x\n\ndef finish(answer: str) -> str:\n    """Doc."""\n'
    )
    (tmp_path / "broken.py").write_text("raise ValueError('at import')\n")
    with pytest.raises(InputError) as e:
        load_tools([entry], tmp_path)
    assert any(part in str(e.value) for part in says.split("|"))


@pytest.mark.parametrize("second", ["calculator", {"use": "mine:Calcul_ator"}])
def test_two_tools_of_one_name(tmp_path, second):
    (tmp_path / "mine.py").write_text('def Calcul_ator(x: str) -> str:\n    """Doc."""\n    return x\n')
    with pytest.raises(InputError, match="two tools of one name"):
        load_tools(["calculator", second], tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("c.txt", "x", "unknown kind of corpus"),
        ("c.jsonl", "", "no rows"),
        ("c.jsonl", '{"title": "A"}\n', "no column 'text'"),
        ("c.jsonl", '{"title": "A", "text": "B"}\n{nonsense\n', "line 2 is not JSON"),
        ("c.jsonl", "[1]\n", "line 1 is not an object"),
        ("c.jsonl", '{"title": "A", "text": null}\n', "row 1: title and text must be strings"),
        ("c.jsonl", b'{"title": "A", "text": "B"}\n\xff\xfe\xfa', "line 2 is not UTF-8 at its byte 1"),
        ("c.jsonl", "[" * 100_000, "line 1 is not JSON"),
        ("c.parquet", "no parquet", "cannot be read"),
        ("c.parquet", {"title": ["A"], "body": ["B"]}, "no column 'text'"),
    ],
)
def test_unusable_corpus(tmp_path, name, content, says):
    if isinstance(content, dict):
        pq.write_table(pa.table(content), tmp_path / name)
    else:
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError) as e:
        load_tools([{"search": {"corpus": name}}], tmp_path)
    assert says in str(e.value)
    assert name in str(e.value)


def test_corpus_is_built_once_per_version_of_the_file(tmp_path, monkeypatch):
    built = []
    real = load_module.load_corpus.__globals__["Corpus"]
    monkeypatch.setitem(load_module.load_corpus.__globals__, "Corpus", lambda rows: built.append(1) or real(rows))
    path = corpus(tmp_path)
    for _ in range(3):
        load_tools([{"search": {"corpus": "corpus.jsonl"}}], tmp_path)
    assert len(built) == 1
    corpus(tmp_path, ARTICLES[:2])
    os.utime(path, ns=(1, 1))
    load_tools([{"search": {"corpus": str(path)}}], tmp_path)
    assert len(built) == 2


async def test_corpus_from_parquet(tmp_path):
    pq.write_table(pa.Table.from_pylist(ARTICLES), tmp_path / "c.parquet")
    tools = load_tools([{"search": {"corpus": "c.parquet"}}], tmp_path)
    assert (
        await observe(Toolbox(tools, task(), cut, ToolThreads()), "search", entity="TARNBROOK") == ARTICLES[3]["text"]
    )


def test_search_brings_lookup(tmp_path):
    source = {"paragraphs": "p", "max_tokens": 99}
    assert [tool.name for tool in load_tools([{"search": source}, "calculator"], tmp_path)] == [
        "search",
        "lookup",
        "calculator",
    ]
    tools = load_tools([{"search": source}, {"lookup": {"max_tokens": 20}}], tmp_path)
    assert [(tool.name, tool.max_tokens) for tool in tools] == [("search", 99), ("lookup", 20)]
    assert [tool.name for tool in load_tools([{"search": source | {"lookup": False}}], tmp_path)] == ["search"]


def test_options_of_a_tool_of_ones_own(tmp_path, monkeypatch):
    monkeypatch.setenv("MINE_TOKEN", "secret")
    (tmp_path / "mine.py").write_text('def good(x: str, y: str = "") -> str:\n    """Doc."""\n    return x\n')
    entry = {
        "use": "mine:good",
        "timeout_s": 10,
        "max_tokens": 800,
        "idempotent": True,
        "env": ["MINE_TOKEN"],
        "args": {"y": "z"},
    }
    [tool] = load_tools([entry], tmp_path)
    assert (tool.timeout_s, tool.max_tokens, tool.idempotent, tool.env) == (10, 800, True, ("MINE_TOKEN",))
    assert list(tool.arguments) == ["x"]
    assert tool.files == (tmp_path / "mine.py",)


def test_sha_changes_with_the_tool(tmp_path):
    def sha(**entry: object) -> str:
        return tools_sha(load_tools([{"use": "mine:good", **entry}], tmp_path))

    (tmp_path / "mine.py").write_text('def good(x: str) -> str:\n    """Doc."""\n    return x\n')
    first = sha()
    assert first == sha()
    assert first != sha(max_tokens=7)
    (tmp_path / "mine.py").write_text('def good(x: str) -> str:\n    """Doc."""\n    return x + x\n')
    assert first != sha()


@pytest.mark.parametrize("file", ["mine.py", "sibling.py", "sibling_late.py", "pack/__init__.py", "pack/other.py"])
def test_sha_changes_with_what_the_tool_imports(tmp_path, file):
    foreign(tmp_path)
    with (tmp_path / "mine.py").open("a") as mine:
        mine.write("from pack import part\nimport numpy as np\n\ndef late():\n    import broken\n")
    (tmp_path / "alone.py").write_text("")
    (tmp_path / "broken.py").write_text("def (")
    tools = load_tools([{"use": "mine:where"}], tmp_path)
    first = tools_sha(tools)
    (tmp_path / "alone.py").write_text("# changed\n")
    assert tools_sha(load_tools([{"use": "mine:where"}], tmp_path)) == first
    with (tmp_path / file).open("a") as content:
        content.write("# changed\n")
    assert tools_sha(tools) != first


FOREIGN = {
    "pipeline/__init__.py": "WHOSE = 'foreign'\n",
    "pipeline/tool.py": 'def piped(x: str) -> str:\n    """Doc."""\n    return "foreign " + x\n',
    "datasets/__init__.py": "WHOSE = 'foreign'\n",
    "datasets/rows.jsonl": "",
    "json.py": "raise RuntimeError('shadows json')\n",
    "sibling.py": "NAME = 'sibling'\n",
    "sibling_late.py": "NAME = 'late'\n",
    "pack/__init__.py": "",
    "pack/part.py": "from .other import NAME\n\ndef f(x: str) -> str:\n    '''Doc.'''\n    return NAME + x\n",
    "pack/other.py": "NAME = 'other '\n",
    "plain/part.py": "def g(x: str) -> str:\n    '''Doc.'''\n    return 'plain ' + x\n",
    "mine.py": """
        import json
        import pipeline
        import sibling

        def where(x: str) -> str:
            '''Doc.'''
            import sibling_late
            return f"{sibling.NAME} {sibling_late.NAME} {getattr(pipeline, 'WHOSE', 'ours')}"
        """,
}


def foreign(folder: Path) -> Path:
    for name, text in FOREIGN.items():
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(textwrap.dedent(text))
    return folder


def test_a_foreign_folder_shadows_nothing(tmp_path):
    """In a fresh process, where neither `pipeline` nor `datasets` is imported yet."""
    foreign(tmp_path)
    script = """
        import importlib.util, sys
        from pathlib import Path
        from actors.tools import load_attribute, load_tools
        base = Path(sys.argv[1])
        load = lambda use: load_attribute(use, base, "tools")
        assert load("mine:where")("") == "sibling late ours"
        assert load("pipeline.tool:piped")("x") == "foreign x"
        assert load("pack.part:f")("x") == "other x"
        assert load("plain.part:g")("x") == "plain x"
        assert load("datasets:WHOSE") == "foreign"
        assert load("math:pi") > 3
        assert [tool.name for tool in load_tools([{"use": "mine:where"}], base)] == ["where"]
        import pipeline
        assert not hasattr(pipeline, "WHOSE")
        spec = importlib.util.find_spec("datasets")
        assert spec is None or not str(spec.origin).startswith(str(base))
        assert str(base) not in sys.path
        assert sys.modules["mine"].where is load("mine:where")
        """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), str(tmp_path)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_two_suites_with_modules_of_one_name(tmp_path):
    for name in "ab":
        (tmp_path / name).mkdir()
        (tmp_path / name / "mine.py").write_text(f"NAME = {name!r}\n")
    assert [load_attribute("mine:NAME", tmp_path / name, "tools") for name in "aba"] == ["a", "b", "a"]
    assert load_attribute("json:dumps", tmp_path, "tools") is json.dumps


# --- calls and their limits


async def test_sync_and_async_tools():
    def up(x: str) -> str:
        """Doc."""
        return f"{x.upper()} {threading.current_thread() is threading.main_thread()}"

    async def down(x: str) -> str:
        """Doc."""
        await asyncio.sleep(0)
        return x.lower()

    box = toolbox(up, down)
    assert await observe(box, "up", x="a") == "A False"
    result = await box.call(" DOWN", {"x": "B"})
    assert (result.observation, result.error, result.crashed) == ("b", None, False)
    assert result.seconds >= 0


async def test_unknown_tool():
    result = await toolbox(numbered).call("nope\ud800", {})
    assert result.observation.startswith("There is no tool 'nope")
    assert "numbered" in result.observation
    assert result.error
    assert not result.crashed


def numbered(n: int, tags: list[str], order: Literal["up", "down"] = "up") -> str:
    """Doc."""
    return f"{n} {tags} {order}"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"n": "three", "tags": []}, "n wants an integer, got 'three'"),
        ({"n": 1.5, "tags": []}, "n wants an integer, got 1.5"),
        ({"tags": []}, "n is missing; wants an integer"),
        ({"n": 1, "tags": "a"}, "tags wants a list of strings, got 'a'"),
        ({"n": 1, "tags": [], "order": "left"}, "order wants one of 'up', 'down', got 'left'"),
        ({"n": 1, "tags": [], "size": 2}, "there is no 'size'; it takes n, tags, order"),
        ({"n": "9" * 10_000, "tags": []}, "n wants an integer"),
    ],
)
async def test_wrong_arguments(arguments, says):
    result = await toolbox(numbered).call("numbered", arguments)
    assert says in result.observation
    assert len(result.observation) < 300
    assert result.error == result.observation
    assert not result.crashed


class Odd(Exception):
    def __str__(self):
        raise RuntimeError("no text")


@pytest.mark.parametrize("is_async", [False, True])
@pytest.mark.parametrize(
    ("error", "observation", "crashed"),
    [
        (ValueError("bad"), "Tool fail failed: ValueError: bad", True),
        (ToolError("no such page"), "no such page", False),
        (ToolCrash("server down"), "Tool fail failed: server down", True),
        (SystemExit(3), "Tool fail failed: SystemExit: 3", True),
        (KeyboardInterrupt(), "Tool fail failed: KeyboardInterrupt: ", True),
        (StopIteration("x"), "Tool fail failed: StopIteration: x", True),
        (Odd(), "Tool fail failed: Odd", True),
        (ValueError("y" * 10**6), "Tool fail failed: ValueError: y", True),
    ],
)
async def test_a_tool_that_raises(is_async, error, observation, crashed):
    def fail() -> str:
        """Doc."""
        raise error

    async def afail() -> str:
        """Doc."""
        if isinstance(error, StopIteration):
            raise ValueError  # Python itself turns it into a RuntimeError in coroutines
        raise error

    afail.__name__ = "fail"
    result = await toolbox(afail if is_async else fail).call("fail", {})
    if not (is_async and isinstance(error, StopIteration)):
        assert result.observation.startswith(observation)
    assert len(result.observation) <= 512
    assert result.crashed is crashed
    assert result.error
    if isinstance(error, ValueError) and len(str(error)) < 9:
        assert "test_tools.py:" in result.error
        assert "test_tools.py:" not in result.observation


async def test_a_tool_that_cancels_itself():
    async def quits() -> str:
        """Doc."""
        raise asyncio.CancelledError

    result = await toolbox(quits).call("quits", {})
    assert result.crashed


@pytest.mark.parametrize("value", [None, 3, b"bytes", ["a"]])
async def test_a_tool_that_returns_no_string(value):
    def odd() -> str:
        """Doc."""
        return value

    result = await toolbox(odd).call("odd", {})
    assert result.observation == f"Tool odd failed: it returned {type(value).__name__}, not a string"
    assert result.crashed


async def test_a_hung_tool_stalls_no_other_trajectory():
    release = threading.Event()

    def hang() -> str:
        """Doc."""
        release.wait(30)
        return "late"

    threads = ToolThreads(workers=1)
    hung, other = toolbox(hang, threads=threads, timeout_s=0.2), toolbox(numbered, threads=threads)
    start = time.perf_counter()
    first, second = await asyncio.gather(
        hung.call("hang", {}), other.call("numbered", {"n": 1, "tags": []})
    )  # one worker: the second call waits for the first one's slot, not for its thread
    assert time.perf_counter() - start < 5
    assert first.observation == "Tool hang failed: no result after 0.2 s."
    assert first.error == "ToolTimeout: no result after 0.2 s"
    assert not first.crashed
    assert 0.2 <= first.seconds < 5
    assert second.observation == "1 [] up"
    assert threads.abandoned == 1
    release.set()
    for _ in range(100):
        await asyncio.sleep(0.01)
        if not threads.abandoned:
            break
    assert threads.abandoned == 0


async def test_slow_tools_run_side_by_side():
    def slow() -> str:
        """Doc."""
        time.sleep(0.2)
        return "done"

    threads = ToolThreads()
    start = time.perf_counter()
    results = await asyncio.gather(*(toolbox(slow, threads=threads).call("slow", {}) for _ in range(16)))
    assert {result.observation for result in results} == {"done"}
    assert time.perf_counter() - start < 2


async def test_abandoned_threads_are_bounded():
    release = threading.Event()

    def hang() -> str:
        """Doc."""
        release.wait(30)
        return ""

    threads = ToolThreads(workers=4, max_abandoned=3)
    boxes = [toolbox(hang, threads=threads, timeout_s=0.05) for _ in range(3)]
    await asyncio.gather(*(box.call("hang", {}) for box in boxes))
    result = await boxes[0].call("hang", {})
    assert result.crashed
    assert "3 tool threads hang past their time limit" in result.observation
    release.set()


async def test_a_cancelled_trajectory_frees_its_slot():
    release = threading.Event()

    def hang() -> str:
        """Doc."""
        release.wait(30)
        return ""

    threads = ToolThreads(workers=1)
    call = asyncio.create_task(toolbox(hang, threads=threads).call("hang", {}))
    await asyncio.sleep(0.05)
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    assert threads.abandoned == 1
    assert await observe(toolbox(numbered, threads=threads), "numbered", n=1, tags=[]) == "1 [] up"
    release.set()


async def test_an_async_tool_that_ignores_its_cancellation():
    async def stubborn() -> str:
        """Doc."""
        for _ in range(3):
            try:
                await asyncio.sleep(0.3)
            except asyncio.CancelledError:
                continue
        return "late"

    result = await toolbox(stubborn, timeout_s=0.1).call("stubborn", {})
    assert result.error == "ToolTimeout: no result after 0.1 s"
    assert result.seconds < 0.3
    await asyncio.sleep(0.7)


@pytest.mark.parametrize("letter", ["x", "é", "漢", "😀"])
async def test_a_huge_result_is_cut_in_little_time_and_memory(letter):
    huge = letter * (100_000_000 // len(letter.encode()))

    def big() -> str:
        """Doc."""
        return huge

    box = toolbox(big, max_tokens=40)
    gc.collect()
    tracemalloc.start()
    try:
        result = await box.call("big", {})
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert result.observation == letter * 32 + " … [cut]"
    assert result.seconds < 2
    assert peak < 20_000_000
    assert result.error is None


async def test_the_token_limit():
    def echo(x: str) -> str:
        """Doc."""
        return x

    box = toolbox(echo, max_tokens=20)
    assert await observe(box, "echo", x="a" * 20) == "a" * 20
    assert await observe(box, "echo", x="a" * 21) == "a" * 12 + " … [cut]"
    assert await observe(toolbox(echo, max_tokens=5), "echo", x="abcdefgh") == "abcde"


async def test_what_utf8_cannot_hold_is_replaced():
    def odd() -> str:
        """Doc."""
        return "a\ud800b\0c\udfffd漢"

    assert await observe(toolbox(odd), "odd") == "a\ufffdb\ufffdc\ufffdd漢"


async def test_values_of_env_reach_no_row(tmp_path, monkeypatch):
    monkeypatch.setenv("MINE_TOKEN", "s3cr3t")
    (tmp_path / "mine.py").write_text(
        'import os\n\ndef leak(x: str) -> str:\n    """Doc."""\n    token = os.environ["MINE_TOKEN"]\n'
        '    if x == "raise":\n        raise ValueError(f"GET /?token={token}")\n    return token\n'
    )
    box = Toolbox(load_tools([{"use": "mine:leak", "env": ["MINE_TOKEN"]}], tmp_path), task(), cut, ToolThreads())
    assert await observe(box, "leak", x="") == "[MINE_TOKEN]"
    result = await box.call("leak", {"x": "raise"})
    assert "s3cr3t" not in result.observation + str(result.error)


class Counter:
    """Count."""

    closed: list["Counter"] = []  # noqa: RUF012

    def __init__(self):
        self.count = 0

    def __call__(self) -> str:
        self.count += 1
        return str(self.count)

    def close(self) -> None:
        Counter.closed.append(self)


class AsyncCounter(Counter):
    """Count."""

    async def __call__(self) -> str:
        return super().__call__()

    async def close(self) -> None:
        super().close()


class BadlyClosed(Counter):
    """Count."""

    def close(self) -> None:
        raise OSError("cannot close")


@pytest.mark.parametrize("kind", [Counter, AsyncCounter])
async def test_a_class_has_one_instance_per_trajectory(kind):
    Counter.closed.clear()
    tool = declare(kind, name="count", field="tools", args={})
    threads = ToolThreads()
    boxes = [Toolbox([tool], task(), cut, threads) for _ in range(2)]
    assert [await observe(box, "count") for box in (boxes[0], boxes[0], boxes[1])] == ["1", "2", "1"]
    for box in boxes:
        await box.close()
        await box.close()
    assert sorted(counter.count for counter in Counter.closed) == [1, 2]
    unused = Toolbox([tool], task(), cut, threads)
    await unused.close()
    assert len(Counter.closed) == 2


async def test_a_failing_close_is_logged(caplog):
    Counter.closed.clear()
    box = toolbox(BadlyClosed, Counter)
    await observe(box, "BadlyClosed")
    await observe(box, "Counter")
    with caplog.at_level(logging.ERROR):
        await box.close()
    assert "BadlyClosed.close() failed" in caplog.text
    assert "cannot close" in caplog.text
    assert len(Counter.closed) == 1


async def test_an_init_that_fails_is_a_crash():
    class Broken:
        """Doc."""

        def __init__(self):
            raise OSError("no server")

        def __call__(self) -> str:
            return ""

    box = toolbox(Broken)
    result = await box.call("Broken", {})
    assert result.observation == "Tool Broken failed: OSError: no server"
    assert result.crashed
    await box.close()


# --- search and lookup


@pytest.mark.parametrize(
    ("entity", "observation"),
    [
        ("Elde", ARTICLES[1]["text"]),
        ("  tarnBROOK ", ARTICLES[3]["text"]),
        ("Shōjo manga", ARTICLES[0]["text"]),
        ("SHO\u0304JO  MANGA", ARTICLES[0]["text"]),
        ("shojo manga", f"Shōjo manga: {ARTICLES[0]['text']}"),
        ("ship Elde", f"Elde (ship): {ARTICLES[2]['text']}"),
        ("xyzzy", "Could not find [xyzzy]. Similar: []."),
        ("Tarnbrook bridge", "Could not find [Tarnbrook bridge]. Similar: [\"O'Neill Bridge\", 'Tarnbrook']."),
        ("  ", "Search wants the name of an entity."),
        ("!!!", "Could not find [!!!]. Similar: []."),
    ],
)
async def test_search(tmp_path, entity, observation):
    assert await observe(searcher(tmp_path), "Search", entity=entity) == observation


async def test_search_shows_top_k(tmp_path):
    seen = await observe(searcher(tmp_path, top_k=2), "search", entity="elde")
    assert seen == f"{ARTICLES[1]['text']}\nElde (ship): {ARTICLES[2]['text']}"


async def test_lookup_cycles(tmp_path):
    box = searcher(tmp_path)
    result = await box.call("lookup", {"keyword": "river"})
    assert result.observation == "There is no page to look into: search for an article first."
    assert result.error
    await observe(box, "search", entity="Elde")
    assert await observe(box, "lookup", keyword="river") == "(Result 1 / 2) The Elde is a river."
    assert await observe(box, "lookup", keyword="River ") == "(Result 2 / 2) The river is long."
    assert await observe(box, "lookup", keyword="river") == "No more results."
    assert await observe(box, "lookup", keyword="river") == "No more results."
    assert await observe(box, "lookup", keyword="lake mur") == "(Result 1 / 1) It rises near Lake Mur."
    assert await observe(box, "lookup", keyword="river") == "(Result 1 / 2) The Elde is a river."
    assert await observe(box, "lookup", keyword="sea") == "No more results."
    await observe(box, "search", entity="nothing of the sort")
    assert await observe(box, "lookup", keyword="lake") == "(Result 1 / 1) It rises near Lake Mur."
    await observe(box, "search", entity="Tarnbrook")
    assert await observe(box, "lookup", keyword="lake") == "No more results."


async def test_pages_are_a_trajectorys_own(tmp_path):
    corpus(tmp_path)
    tools = load_tools([{"search": {"corpus": "corpus.jsonl"}}], tmp_path)
    one, two = (Toolbox(tools, task(), cut, ToolThreads()) for _ in range(2))
    await observe(one, "search", entity="Elde")
    assert "no page" in await observe(two, "lookup", keyword="river")


@pytest.mark.parametrize(
    "rows",
    [
        [{"title": "Elde", "sentences": ["The Elde is a river.", " It is long."]}, {"title": "Mur", "sentences": []}],
        [{"title": "Elde", "text": "The Elde is a river. It is long."}],
    ],
)
async def test_the_tasks_own_paragraphs(tmp_path, rows):
    tools = load_tools([{"search": {"paragraphs": "context"}}], tmp_path)
    box = Toolbox(tools, task(context=rows), cut, ToolThreads())
    assert await observe(box, "search", entity="elde") == "The Elde is a river. It is long."
    assert await observe(box, "lookup", keyword="LONG") == "(Result 1 / 1) It is long."
    assert (await observe(box, "search", entity="long river")).startswith(
        "Could not find [long river]. Similar: ['Elde'"
    )


async def test_paragraphs_that_are_plain_strings(tmp_path):
    tools = load_tools([{"search": {"paragraphs": "context"}}], tmp_path)
    text = "The Elde is a river that rises near Lake Mur and flows past Tarnbrook."
    box = Toolbox(tools, task(context=(text, "Short.")), cut, ToolThreads())
    assert await observe(box, "search", entity="short.") == "Short."
    assert (
        await observe(box, "search", entity="Elde")
        == f"The Elde is a river that rises near Lake Mur and flows past …: {text}"
    )


@pytest.mark.parametrize("row", [{}, {"context": "text"}, {"context": {"title": []}}, {"context": [{"title": "A"}]}])
async def test_rows_without_paragraphs(tmp_path, row):
    tools = load_tools([{"search": {"paragraphs": "context"}}], tmp_path)
    result = await Toolbox(tools, task(**row), cut, ToolThreads()).call("search", {"entity": "A"})
    assert result.crashed
    assert "'context'" in result.observation


async def test_no_paragraphs_at_all(tmp_path):
    tools = load_tools([{"search": {"paragraphs": "context"}}], tmp_path)
    for rows in ([], [""], [{"title": "", "text": ""}]):
        seen = await observe(Toolbox(tools, task(context=rows), cut, ToolThreads()), "search", entity="A")
        assert seen == "Could not find [A]. Similar: []."


# --- calculator


@pytest.mark.parametrize(
    ("expression", "result"),
    [
        ("0.1 + 0.2", "0.3"),
        ("1/3", "0.333333333333333"),
        ("1/3*3", "1"),
        ("2 + 3 * (4 - 1)", "11"),
        ("-7 // 2", "-4"),
        ("7 % 3", "1"),
        ("7 % (1 + 2)", "1"),
        ("2**10", "1024"),
        ("2^10", "1024"),
        ("2 ** -2", "0.25"),
        ("1,234 * 2", "2468"),
        ("1,234,567.50 + 0.5", "1234568"),
        ("$1,200 - $200.50", "999.5"),
        ("20%", "0.2"),
        ("50 * 20%", "10"),
        ("200 / 20%", "1000"),
        ("(10 + 10)% * 50", "10"),
        ("100 - 5% - 2", "97.95"),
        ("3 x 4", "12"),
        ("3x4", "12"),
        ("3 × 4 ÷ 2 − 1", "5"),
        ("2x(1+2)", "6"),
        ("max(1,234)", "234"),
        ("max(1, 2.5, 2)", "2.5"),
        ("min(3, 2)", "2"),
        ("abs(-2.50)", "2.5"),
        ("round(2.675, 2)", "2.68"),
        ("round(10/4)", "2"),
        ("sqrt(16)", "4"),
        ("sqrt(2)", "1.4142135623731"),
        ("sqrt(2)**2", "2"),
        ("8 ** (1/3)", "2"),
        ("sqrt(0.25)", "0.5"),
        ("007 + 1", "8"),
        (".5 + 5.", "5.5"),
        ("1e3 + 1E-3", "1000.001"),
        ("1e-12", "1e-12"),
        ("12 / 4 =", "3"),
        ("+-+5", "-5"),
        ("1 ** 9999999999", "1"),
        ("(-1) ** 9999999999", "-1"),
        ("0 ** 9999999999", "0"),
        ("48 + 48/2", "72"),
        ("٣ + 1", "4"),
        ("+".join("1" * 250), "250"),
        ("12345678901234567.25 - 12345678901234567", "0.25"),
    ],
)
def test_calculator(expression, result):
    assert calculator(expression) == result


@pytest.mark.parametrize(
    "expression",
    [
        "9**9**9",
        "9**9**9**9",
        "10**100000",
        "(10**500)**500",
        "2**(2**70)",
        "9**0.5**-99",
        "1.5**99999999.5",
        "1e999",
        "1e-999",
        "1" * 501,
        "9" * 500 + "**2**9",
        "*".join(["9" * 60] * 8) + "**9",
        "round(1, 10**9)",
        "round(1, 0.5)",
        "(" * 240 + "1" + ")" * 240,
        "-" * 499 + "1",
        "-" * 300 + "1",
        "1/0",
        "1 % 0",
        "1 // 0",
        "0 ** -1",
        "sqrt(-1)",
        "(-8) ** (1/3)",
        "",
        "   ",
        "1 +",
        "1 2",
        "(1",
        "1)",
        "%",
        "1, 2",
        "x",
        "os.system('ls')",
        "().__class__",
        "(1).real",
        "1 .real",
        "__import__('os')",
        "abs",
        "abs.__call__(1)",
        "sqrt",
        "sqrt()",
        "sqrt(1, 2)",
        "max()",
        "max(*1)",
        "max(**1)",
        "lambda: 1",
        "1 if 1 else 2",
        "1 < 2",
        "True",
        "2j",
        "0b10",
        "[1][0]",
        "'a' * 3",
        "1_000",
        "~1",
        "1 << 99",
        "1 and 2",
        "1\0",
        "a := 1",
        "(1)(2)",
        "三 + 1",
        "\ud800",
        "1 # 2",
        "1\n2",
    ],
)
def test_calculator_refuses(expression):
    start = time.perf_counter()
    with pytest.raises(ToolError) as e:
        calculator(expression)
    assert str(e.value)
    assert time.perf_counter() - start < 0.5


async def test_calculator_as_a_tool(tmp_path):
    box = Toolbox(load_tools([{"calculator": None}], tmp_path), task(), cut, ToolThreads())
    assert await observe(box, "Calculator", expression="1,000 * 3") == "3000"
    result = await box.call("calculator", {"expression": "1/0"})
    assert result.observation == result.error == "Division by zero."
    assert not result.crashed


# --- examples/custom


async def test_the_examples_tool():
    [tool] = load_tools([{"use": "acme_tools:Wiki", "timeout_s": 10}], CUSTOM)
    assert tool.spec["name"] == "Wiki"
    box = Toolbox([tool], task(), cut, ToolThreads())
    assert (await observe(box, "wiki", title="acme lantern")).startswith("Acme Lantern: The Acme Lantern is a solar")
    assert (await observe(box, "wiki", title="Acme Lantern")).startswith("You read this before.")
    assert "'Mira Holt'" in await observe(box, "wiki", title="Mira Hold")
    await box.close()


async def test_the_examples_rows_can_be_answered_and_scored():
    cite = load_attribute("acme_scorer:cite", CUSTOM, "scorers")
    [tool] = load_tools([{"use": "acme_tools:Wiki"}], CUSTOM)
    rows = [json.loads(line) for line in (CUSTOM / "test.jsonl").read_text().splitlines()]
    assert len({row["qid"] for row in rows}) == 6
    for row in rows:
        about = Task(row["qid"], 0, row["q"], tuple(row["answers"]), {"doc_id": row["doc_id"]}, row, 0)
        box = Toolbox([tool], about, cut, ToolThreads())
        seen = await observe(box, "wiki", title=row["doc_id"])
        step = Step("", "", "Wiki", "{}", seen, 1, 0.0, 0, 0)
        assert cite(Trajectory(about, (step,), row["answers"][0], None, "finish"), about.gold) == {"cite": 1.0}
        assert cite(Trajectory(about, (), row["answers"][0], None, "finish"), about.gold) == {"cite": 0.0}
        await box.close()

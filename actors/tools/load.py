"""suite.yaml's `tools:` entries → Tools; a suite's own Python by file location.

Knows nothing of the rest of the suite. What it returns stays in the process: each Ray worker loads its own.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import hashlib
import importlib
import importlib.util
import json
import os
import sys
import types
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from actors.actions import fold
from actors.errors import InputError
from actors.messages import Task
from actors.tools.calculator import calculator
from actors.tools.declare import Tool, declare, declare_method
from actors.tools.search import Pages, load_corpus, own_paragraphs

BUILT_IN = ("search", "lookup", "calculator")
BUILT_IN_VERSION = 1
"""Goes into `tools_sha`; raise it when a built-in tool's results change."""
OURS = frozenset({"actors", "pipeline", "datasets"})
"""Top-level names that no suite's folder may take: ours, and Hugging Face's."""


class _Options(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)
    timeout_s: Annotated[float, Field(gt=0, le=3600, description="seconds a call may take")] = 30.0
    max_tokens: Annotated[int, Field(gt=0, description="tokens of a result that the model sees")] = 512


class _Search(_Options):
    corpus: Annotated[str | None, Field(description=".parquet or .jsonl file with title and text")] = None
    paragraphs: Annotated[str | None, Field(description="field of the row with the task's own paragraphs")] = None
    top_k: Annotated[int, Field(ge=1, description="articles shown at most")] = 1
    lookup: Annotated[bool, Field(description="bring the tool lookup along")] = True


class _Use(_Options):
    use: Annotated[str, Field(description="module:attr of a function or class")]
    idempotent: Annotated[bool, Field(description="a call may be repeated without harm")] = False
    env: Annotated[tuple[str, ...], Field(strict=False, description="environment variables it reads")] = ()
    args: Annotated[dict[str, Any], Field(default_factory=dict, description="fixed arguments, of a class's __init__")]


def load_tools(entries: Sequence[Mapping[str, Any] | str], base: Path) -> list[Tool]:
    """The tools that a suite's `tools:` declares, in its order.

    `search` brings `lookup` along, which shares its page; an entry `lookup` after it changes its limits.

    Args:
        entries: `{"search": {…}}`, `{"calculator": {}}` or just "calculator", `{"use": "module:attr", …}`.
        base: the suite's folder; relative paths and the user's modules are looked up here.

    Raises:
        InputError: unknown tool or option, two tools of one name, a module, corpus or environment variable missing.
    """
    base = base.resolve()
    file = str(base / "suite.yaml")
    tools: list[Tool] = []
    for number, entry in enumerate(entries):
        field = f"tools[{number}]"
        if isinstance(entry, str):
            entry = {entry: {}}
        if "use" in entry:
            tools.append(_user_tool(_parse(_Use, entry, field, file), base, field, file))
            continue
        if len(entry) != 1:
            raise InputError("not one tool", file=file, field=field, got=dict(entry), wants="{name: {…}} or {use: …}")
        [(name, options)] = entry.items()
        field = f"{field}.{name}"
        if name == "search":
            tools += _search_tools(_parse(_Search, options or {}, field, file), base, field, file)
        elif name == "calculator":
            limits = _parse(_Options, options or {}, field, file).model_dump()
            version = {"version": BUILT_IN_VERSION}
            tools.append(
                declare(calculator, name=name, field=field, args={}, idempotent=True, options=version, **limits)
            )
        elif name == "lookup":
            brought = [tool for tool in tools if tool.name == name]
            if not brought:
                raise InputError("lookup needs search", file=file, field=field, wants="an entry `search` before it")
            tools.remove(brought[0])
            tools.append(dataclasses.replace(brought[0], **_parse(_Options, options or {}, field, file).model_dump()))
        else:
            wants = _near(name, BUILT_IN) + "; use: module:attr for a tool of your own"
            raise InputError(f"there is no tool {name!r}", file=file, field=field, wants=wants)
    taken = {"finish"}
    for tool in tools:
        if fold(tool.name) in taken:
            raise InputError("two tools of one name", file=file, field="tools", got=tool.name, wants="different names")
        taken.add(fold(tool.name))
    return tools


def load_attribute(use: str, base: Path, field: str, file: str | None = None) -> Any:
    """What "module:attr" names: from a module of the folder `base` if it is there, else from an installed one.

    A module of the folder is imported under its own name if that is free, else under a private one: a folder's
    own `pipeline/` or `datasets/` never stands in for the packages of that name, now or later. While it is
    imported, other modules of the folder are found first, those names excepted; afterwards, last.

    Raises:
        InputError: not of that form, no such module or attribute, or the module fails.
    """
    module_name, _, attribute = use.partition(":")
    if not all(part.isidentifier() for part in (*module_name.split("."), *attribute.split("."))):
        raise InputError("not module:attr", file=file, field=field, got=use, wants='such as "acme_tools:Wiki"')
    value: Any = _import(module_name, base.resolve(), field, file)
    for part in attribute.split("."):
        if not hasattr(value, part):
            where = getattr(value, "__file__", None) or getattr(value, "__name__", module_name)
            near = _near(part, (name for name in dir(value) if not name.startswith("_")))
            raise InputError(f"{where} has no {part!r}", file=file, field=field, got=use, wants=near)
        value = getattr(value, part)
    return value


def tools_sha(tools: Iterable[Tool]) -> str:
    """SHA-256 (hex) of what decides the tools' behaviour: declarations, limits, options, their files' content."""
    sha = hashlib.sha256()
    for tool in tools:
        declared = [tool.spec, tool.timeout_s, tool.max_tokens, dict(tool.options)]
        sha.update(json.dumps(declared, sort_keys=True, default=str).encode())
        for path in tool.files:
            with path.open("rb") as content:
                sha.update(hashlib.file_digest(content, "sha256").digest())
    return sha.hexdigest()


def _search_tools(options: _Search, base: Path, field: str, file: str) -> list[Tool]:
    if (options.corpus is None) == (options.paragraphs is None):
        raise InputError("not one source of articles", file=file, field=field, wants="either corpus or paragraphs")
    corpus = None if options.corpus is None else load_corpus(base / options.corpus, f"{field}.corpus")

    def make(task: Task) -> Pages:
        return Pages(corpus or own_paragraphs(task, str(options.paragraphs)), options.top_k)

    shared: dict[str, Any] = {
        "make": make,
        "timeout_s": options.timeout_s,
        "max_tokens": options.max_tokens,
        "options": {"version": BUILT_IN_VERSION, "top_k": options.top_k, "paragraphs": options.paragraphs},
    }
    files = () if options.corpus is None else (base / options.corpus,)
    search = declare_method(Pages, "search", field=field, idempotent=True, files=files, **shared)
    return [search, declare_method(Pages, "lookup", field=field, **shared)][: 1 + options.lookup]


def _user_tool(options: _Use, base: Path, field: str, file: str) -> Tool:
    for name in options.env:
        if name not in os.environ:
            raise InputError(f"the environment variable {name} is not set", file=file, field=f"{field}.env")
    target = load_attribute(options.use, base, f"{field}.use", file)
    source = getattr(sys.modules.get(getattr(target, "__module__", "")), "__file__", None)
    files = sources(Path(source), base) if source else ()
    return declare(
        target,
        name=options.use.rpartition(":")[2].rpartition(".")[2],
        field=f"{field}.use",
        file=file,
        args=options.args,
        timeout_s=options.timeout_s,
        max_tokens=options.max_tokens,
        idempotent=options.idempotent,
        env=options.env,
        options={"use": options.use, "args": options.args},
        files=tuple(sorted(files)),
    )


def sources(source: Path, base: Path, found: set[Path] | None = None) -> set[Path]:
    """A module's file and those of the folder `base` that it imports, wherever in them the imports stand.

    Read from the source, not from `sys.modules`, whose content depends on what else the process has loaded.
    """
    found = set[Path]() if found is None else found
    found.add(source)
    if source.suffix != ".py" or not source.is_relative_to(base):
        return found
    try:
        nodes = ast.walk(ast.parse(source.read_bytes()))
    except (SyntaxError, ValueError):  # whoever imports it will hear of it
        return found
    for package in source.relative_to(base).parents[:-1]:
        if (file := base / package / "__init__.py").is_file() and file not in found:
            sources(file, base, found)
    for node in nodes:
        names: list[str] = []
        start = base
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            start = source.parents[node.level - 1] if node.level else base
            names = [".".join(filter(None, (node.module, alias.name))) for alias in node.names]
        for name in names:
            parts = name.split(".")
            for path in [start.joinpath(*parts[:n]) for n in range(1, len(parts) + 1)]:
                for file in (path.with_suffix(".py"), path / "__init__.py"):
                    if file.is_file() and file not in found:
                        sources(file, base, found)
    return found


_Model = TypeVar("_Model", bound=BaseModel)


def _parse(model: type[_Model], given: Any, field: str, file: str) -> _Model:
    try:
        return model.model_validate(given)
    except ValidationError as e:
        error = e.errors()[0]
        names = ".".join(str(part) for part in error["loc"])
        if error["type"] == "extra_forbidden":
            wants = _near(names, model.model_fields)
            raise InputError(f"unknown option {names!r}", file=file, field=field, wants=wants) from e
        place = f"{field}.{names}" if names else field
        raise InputError(error["msg"], file=file, field=place, got=error["input"]) from e


def _near(name: str, known: Iterable[str]) -> str:
    known = list(known)
    near = difflib.get_close_matches(name.casefold(), known, n=1) or difflib.get_close_matches(name, known, n=1)
    return repr(near[0]) if near else "one of " + ", ".join(sorted(known)) if known else ""


@dataclass(frozen=True, slots=True)
class _Folder(MetaPathFinder):
    """Finds modules of a suite's folder: `top` under the name `alias`, others under their own."""

    base: Path
    top: str
    alias: str

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: types.ModuleType | None = None
    ) -> ModuleSpec | None:
        """The import system's question; None lets the next finder answer."""
        if fullname == self.alias:
            return _spec(self.alias, self.base / self.top)
        if path is not None or fullname == self.top or fullname in OURS | sys.stdlib_module_names:
            return None
        spec = PathFinder.find_spec(fullname, [str(self.base)])
        return spec if spec and spec.has_location else None  # a plain folder is no module


def _spec(name: str, path: Path) -> ModuleSpec | None:
    if (path / "__init__.py").is_file():
        return importlib.util.spec_from_file_location(
            name, path / "__init__.py", submodule_search_locations=[str(path)]
        )
    if path.with_suffix(".py").is_file():
        return importlib.util.spec_from_file_location(name, path.with_suffix(".py"))
    spec = ModuleSpec(name, None, is_package=True)
    spec.submodule_search_locations = [str(path)]
    return spec


def _import(name: str, base: Path, field: str, file: str | None) -> types.ModuleType:
    path = base.joinpath(*name.split("."))
    here = path.with_suffix(".py").is_file() or (path / "__init__.py").is_file()
    top, dot, rest = name.partition(".")
    importlib.invalidate_caches()
    alias = (
        top if not here or _is_free(top, base) else f"_berth_{hashlib.sha1(str(base).encode()).hexdigest()[:8]}_{top}"
    )
    folder = _Folder(base, top, alias)
    if here:
        sys.meta_path.insert(0, folder)
    try:
        return importlib.import_module(alias + dot + rest)
    except (Exception, SystemExit) as e:  # importing runs the user's code
        if isinstance(e, ModuleNotFoundError) and e.name and f"{alias}{dot}{rest}.".startswith(f"{e.name}."):
            near = _near(name, (found.stem for found in base.glob("*.py")))
            raise InputError(
                f"no module {name!r} in {base}, and none installed", file=file, field=field, wants=near
            ) from e
        raise InputError(f"importing {name!r} failed: {type(e).__name__}: {e}", file=file, field=field) from e
    finally:
        if here:
            sys.meta_path.remove(folder)
            if folder not in sys.meta_path:
                sys.meta_path.append(folder)


def _is_free(top: str, base: Path) -> bool:
    """No module but the folder's own has the name."""
    if top in OURS | sys.stdlib_module_names:
        return False
    try:
        spec = importlib.util.find_spec(top)
    except ValueError:  # a module without a spec, such as __main__
        return False
    own = _spec(top, base / top)
    return spec is None or (own is not None and _places(spec) == _places(own))


def _places(spec: ModuleSpec) -> set[Path]:
    return {Path(place).resolve() for place in (spec.origin, *(spec.submodule_search_locations or ())) if place}

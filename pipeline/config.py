"""The run config: read, check, dump. Each part of a run is a field here, none is a flag.

Relative paths resolve against the file that names them. Knows no Ray and loads no torch.
"""

from __future__ import annotations

import difflib
import json
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    model_validator,
)

from actors.engine.loader import SMOLLM2
from actors.errors import InputError
from actors.ladder import RUNGS

Auto = Literal["auto"]
UNRECORDED = "(not recorded)"
_SECRET = re.compile(r"(?i)(key|token|secret|passw(or)?d|credential|sig(nature)?)s?$")
_PARAMETER = re.compile(r"([?&]([^=&#\s]+)=)[^&#\s]+")


def _word(value: object) -> object:
    """YAML reads a bare `on` and `off` as true and false."""
    return ("off", "on")[value] if isinstance(value, bool) else value


Switch = Annotated[Literal["auto", "on", "off"], BeforeValidator(_word)]


class Part(BaseModel):
    """Base of every part of a YAML file: unknown fields are errors, values do not change."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class ModelConfig(Part):
    """Which model, and in which numbers."""

    id: str = Field(description="HF id, folder, .gguf file, or `smollm2-135m` (the model bundled with Berth)")
    revision: str | None = Field(default=None, description="branch, tag or commit; resolved to a commit and recorded")
    adapter: str | None = Field(default=None, description="LoRA adapter, folder or HF id[@revision], merged at load")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(default="auto", description="auto: by hardware")
    quantization: Literal["int8"] | None = Field(default=None, description="weights of the decoder's linear layers")
    max_model_len: PositiveInt | None = Field(
        default=None, description="longest context in tokens; the model's own if null"
    )
    trust_remote_code: bool = Field(default=False, description="run code that comes with the model")


class StageTokens(Part):
    """Token limits by ReAct stage."""

    thought: PositiveInt = Field(default=128, description="tokens of a thought")
    action: PositiveInt = Field(default=64, description="tokens of an action")
    answer: PositiveInt = Field(default=64, description="tokens of the final answer")


class Reasoning(Part):
    """For models that think before they speak."""

    max_tokens: PositiveInt | None = Field(
        default=None, description="tokens of a <think> span; null: the thought's limit"
    )
    history: Literal["template", "keep"] = Field(default="template", description="earlier reasoning in later turns")


class AgentConfig(Part):
    """The ReAct loop."""

    format: Literal["react_text", "react_chat", "tool_calling"] = Field(
        default="react_text", description="prompt format"
    )
    labels: Literal["generated", "forced"] = Field(
        default="generated",
        description="who writes `Action 3:` in react_text: the model, or the format where a thought's first line ends, "
        "which saves generating it; what a thought goes on with is then not said",
    )
    max_steps: PositiveInt | None = Field(
        default=None, description="steps before Finish is forced; the suite's if null"
    )
    max_tokens: StageTokens = Field(default_factory=StageTokens, description="limits by stage")
    reasoning: Reasoning = Field(default_factory=Reasoning, description="models that think")


class SamplingConfig(Part):
    """How tokens are drawn."""

    temperature: float = Field(default=0.0, ge=0, le=10, description="0 is greedy")
    top_p: float = Field(default=1.0, gt=0, le=1, description="nucleus")
    top_k: PositiveInt | None = Field(default=None, description="keep the k most likely tokens")


class MemoryConfig(Part):
    """Bounds on GPU memory."""

    budget_fraction: float = Field(default=0.9, gt=0, le=1, description="share of the device's memory Berth may use")
    gpu_memory_fraction: float | None = Field(default=None, gt=0, le=1, description="torch's per-process cap")
    max_prefill_tokens: PositiveInt | Auto = Field(default="auto", description="tokens a prefill step may take")
    max_batch: PositiveInt | Auto = Field(default="auto", description="rows decoded together")
    kv_dtype: Literal["auto", "int8", "fp8"] = Field(default="auto", description="of KV; auto: the model's dtype")
    record_oom: Annotated[Literal["off", "snapshot", "trace", "all"], BeforeValidator(_word)] = Field(
        default="off",
        description="what a replica writes to the run's folder, oom/, when memory runs out: torch's memory snapshot, a "
        "profiler trace of the next steps, or both; a few of each",
    )


class ReplicaRange(Part):
    """Replicas that come and go with the load."""

    min: int = Field(default=0, ge=0, description="kept when idle")
    max: PositiveInt = Field(default=1, description="at most")

    @model_validator(mode="after")
    def _ordered(self) -> ReplicaRange:
        if self.min > self.max:
            raise ValueError(f"min {self.min} is more than max {self.max}")
        return self


class Pool(Part):
    """One Serve deployment."""

    tensor_parallel_size: PositiveInt = Field(default=1, description="GPUs a replica")
    num_gpus: int | Auto = Field(
        default="auto",
        description="GPUs a rank; auto: 1 where the cluster has some now, so say 1 where it starts from none",
    )
    replicas: PositiveInt | Auto | ReplicaRange = Field(
        default="auto",
        description="auto: one for each GPU, or one on a CPU; of a larger pool beside a smaller one: none until a row "
        "needs it",
    )
    labels: dict[str, str] = Field(default_factory=dict, description="Ray node labels a replica's node must have")


class RayConfig(Part):
    """Where the cluster is."""

    address: str | None = Field(default=None, description="null: a local Ray; `auto`: the cluster this runs on")
    labels: dict[str, str] = Field(default_factory=dict, description="Ray node labels where agents and writers may run")
    runtime_env: dict[str, Any] = Field(
        default_factory=dict, description="passed to ray.init; run.json keeps no value of `env_vars`"
    )


class LimitsConfig(Part):
    """When to stop trying."""

    max_attempts: PositiveInt = Field(default=3, description="attempts of one row")
    max_hours: PositiveFloat | None = Field(default=None, description="stop in good order after this; exit code 3")
    max_usd: PositiveFloat | None = Field(default=None, description="stop in good order at this cost; needs price")
    max_step_s: PositiveFloat | None = Field(
        default=None,
        description="a replica whose engine is at one step for longer is replaced; null: 120 on a GPU, 600 on a CPU",
    )


class Price(Part):
    """What a GPU costs."""

    usd_per_gpu_hour: PositiveFloat | None = Field(default=None, description="US dollars")


class RunConfig(Part):
    """Everything one run is made of."""

    suite: str = Field(description="folder that holds suite.yaml")
    data: str | None = Field(default=None, description="another file for the suite's rows")
    out: str = Field(description="run folder: local, s3:// or gs://")
    limit: PositiveInt | None = Field(default=None, description="first N tasks only")
    bad_rows: Literal["stop", "skip"] = Field(
        default="stop", description="rows that cannot be used: stop, or go on without"
    )
    samples: PositiveInt = Field(default=1, description="rollouts of each task")
    seed: int = Field(default=0, ge=0, description="every row's seed derives from it")
    model: ModelConfig = Field(description="which model")
    engine: str = Field(default="paged", description="paged, reference, or module:factory")
    speculation: Switch = Field(
        default="auto", description="guess tokens from the row's own text and check them; auto: where it is faster"
    )
    compile: Switch = Field(
        default="auto", description="compile the model's layers when a replica starts; auto: on a GPU, where it pays"
    )
    numerics: Literal["fast", "invariant"] = Field(
        default="fast", description="invariant: same row, same tokens, always"
    )
    agent: AgentConfig = Field(default_factory=AgentConfig, description="the ReAct loop")
    sampling: SamplingConfig = Field(default_factory=SamplingConfig, description="how tokens are drawn")
    memory: MemoryConfig = Field(default_factory=MemoryConfig, description="bounds on GPU memory")
    fallback: Literal["same_precision", "memory_first"] | list[str] = Field(
        "same_precision", description="what to do when memory runs out"
    )
    pools: dict[str, Pool] = Field(
        default_factory=lambda: {"single": Pool()},
        description="Serve deployments; a row goes to the smallest that it fits",
    )
    journal: Literal["rows", "steps"] = Field(
        default="rows", description="what survives a crash: finished rows, or each step of unfinished ones as well"
    )
    ray: RayConfig = Field(default_factory=RayConfig, description="where the cluster is")
    limits: LimitsConfig = Field(default_factory=LimitsConfig, description="when to stop trying")
    price: Price = Field(default_factory=Price, description="what a GPU costs")


Model = TypeVar("Model", bound=BaseModel)


def load_run(path: str | Path, sets: Iterable[str] = (), **overrides: Any) -> RunConfig:
    """Read a run config.

    Args:
        path: YAML file.
        sets: `a.b=c` assignments from the command line; paths in them resolve against the current folder.
        overrides: top-level fields from the command line, None for "as in the file".

    Raises:
        InputError: naming the file, the field, what it got and what it wants.
    """
    file = Path(path)
    data = read_yaml(file)
    base = file.resolve().parent
    for name in ("suite", "data", "out"):
        if isinstance(data.get(name), str):
            data[name] = absolute(data[name], base)
    _resolve_model(data, base)
    model = data.get("model")
    before = dict(model) if isinstance(model, dict) else {}
    for assignment in sets:
        _assign(data, assignment)
    _resolve_model(data, Path.cwd(), before)
    data.update({name: value for name, value in overrides.items() if value is not None})
    for name in ("suite", "data", "out"):
        if isinstance(data.get(name), str):
            data[name] = absolute(data[name], Path.cwd())
    config = parse(RunConfig, data, str(path))
    _check(config, str(path))
    return config


def _resolve_model(data: dict[str, Any], base: Path, before: Mapping[str, Any] | None = None) -> None:
    """Make local model paths absolute, those aside that stand in `before` already."""
    model = data.get("model")
    if isinstance(model, dict):
        for name in ("id", "adapter"):
            value = model.get(name)
            if isinstance(value, str) and value != (before or {}).get(name) and _looks_local(value, base):
                model[name] = absolute(value, base)


def _check(config: RunConfig, file: str) -> None:
    """Rules that span fields."""
    if isinstance(config.fallback, list):
        for rung in config.fallback:
            if rung not in RUNGS:
                raise InputError("no such rung" + nearest(rung, RUNGS), file=file, field="fallback", got=rung)
    if config.engine not in ("paged", "reference") and ":" not in config.engine:
        hint = nearest(config.engine, ("paged", "reference"))
        raise InputError(
            "no such engine" + hint,
            file=file,
            field="engine",
            got=config.engine,
            wants="paged, reference, module:factory",
        )
    if not config.pools:
        raise InputError("a run needs a pool", file=file, field="pools", wants="single: {tensor_parallel_size: 1}")
    if config.limits.max_usd and not config.price.usd_per_gpu_hour:
        raise InputError("max_usd needs a price", file=file, field="price.usd_per_gpu_hour", wants="US dollars an hour")


def dump(config: BaseModel) -> dict[str, Any]:
    """The resolved config as plain data for run.json, without what may be a secret.

    Left out are the values of `runtime_env`'s variables, of a tool's `args` and of a URI's parameters whose names tell
    of a secret, and what stands before an `@` in a URI.
    """
    data = _public(config.model_dump(mode="json"))
    variables = data.get("ray", {}).get("runtime_env", {}).get("env_vars")
    if isinstance(variables, dict):
        variables.update(dict.fromkeys(variables, UNRECORDED))
    return data


def _public(data: Any, in_args: bool = False) -> Any:
    if isinstance(data, dict):
        return {
            name: UNRECORDED
            if in_args and isinstance(value, str) and _SECRET.search(str(name))
            else _public(value, in_args or name == "args")
            for name, value in data.items()
        }
    if isinstance(data, list):
        return [_public(value, in_args) for value in data]
    if not isinstance(data, str) or "://" not in data:
        return data
    data = _PARAMETER.sub(lambda found: found[1] + UNRECORDED if _SECRET.search(found[2]) else found[0], data)
    return re.sub(r"(?<=://)[^/@\s]+(?=@)", UNRECORDED, data)


def absolute(path: str, base: Path) -> str:
    """`path` as it is where it is a URI or absolute, else below `base`."""
    if "://" in path or path.startswith("hf:"):
        return path
    return str(Path(os.path.normpath(base / Path(path).expanduser())))


def _looks_local(name: str, base: Path) -> bool:
    """What is given for a model is a path; the bundled model's name never is."""
    return name != SMOLLM2 and (name.startswith((".", "/", "~")) or name.endswith(".gguf") or (base / name).is_dir())


def read_yaml(file: Path) -> dict[str, Any]:
    """A YAML mapping.

    Raises:
        InputError: no such file, not readable, not UTF-8, not YAML (with the line), or not a mapping.
    """
    try:
        text = file.read_bytes().decode("utf-8")
    except FileNotFoundError as e:
        raise InputError("no such file", file=str(file)) from e
    except IsADirectoryError as e:
        raise InputError("is a folder", file=str(file), wants="a YAML file") from e
    except OSError as e:
        raise InputError(f"not readable: {e.strerror}", file=str(file)) from e
    except UnicodeDecodeError as e:
        raise InputError(f"not UTF-8 at byte {e.start + 1}", file=str(file)) from e
    try:
        data = _yaml(text)
    except yaml.YAMLError as e:
        mark = getattr(e, "problem_mark", None)
        where = f"{file}:{mark.line + 1}" if mark else str(file)
        raise InputError(f"not YAML: {getattr(e, 'problem', None) or e}", file=where) from e
    if not isinstance(data, dict):
        raise InputError("not a mapping", file=str(file), got=data, wants="fields like `name: value`")
    return data


class _Loader(yaml.SafeLoader):
    """Refuses a key that stands twice in one mapping, where PyYAML takes the last."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen: set[str] = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in seen:
                raise yaml.MarkedYAMLError(problem=f"{key.value} stands twice", problem_mark=key.start_mark)
            seen.add(key.value)
        return node


def _yaml(text: str) -> Any:
    """What the text says; everything that PyYAML trips over is a YAMLError."""
    try:
        return yaml.load(text, _Loader)
    except (ValueError, RecursionError) as e:  # a date such as 2024-13-45, a thousand brackets
        raise yaml.YAMLError(str(e)) from e


def parse(model: type[Model], data: Any, file: str, field: str | None = None) -> Model:
    """`data` as `model`; every problem in one message, a line each.

    Raises:
        InputError: names fields, what they got, what they want; unknown fields with the nearest known one.
    """
    try:
        return model.model_validate(data)
    except ValidationError as e:
        lines = [_problem(model, error, file, field) for error in e.errors(include_url=False)]
        raise InputError("\n".join(dict.fromkeys(lines))) from e


def _problem(model: type[BaseModel], error: Mapping[str, Any], file: str, prefix: str | None) -> str:
    place = [str(part) for part in error["loc"] if not _is_branch(str(part))]
    dotted = ".".join([*([prefix] if prefix else []), *place])
    got, kind = error.get("input"), error["type"]
    if kind == "extra_forbidden":
        known = _known_fields(model, error["loc"][:-1])
        return str(InputError("unknown field" + nearest(place[-1], known), file=file, field=dotted))
    if kind == "missing":
        return str(InputError("missing", file=file, field=dotted))
    wants = error["msg"].removeprefix("Input should be ").removeprefix("Value error, ")
    return str(InputError("not valid", file=file, field=dotted, got=got, wants=wants))


def _is_branch(part: str) -> bool:
    """Pydantic names the branch of a union in the location; users did not write it."""
    return "[" in part or part in {"int", "str", "ReplicaRange", "dict", "constrained-int", "bool", "float"}


def _known_fields(model: type[BaseModel], loc: Iterable[Any]) -> list[str]:
    kind: Any = model
    for part in loc:
        fields = getattr(kind, "model_fields", {})
        if str(part) in fields:
            kind = _inner_model(fields[str(part)].annotation)
    return list(getattr(kind, "model_fields", {}))


def _inner_model(annotation: Any) -> Any:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for arg in getattr(annotation, "__args__", ()):
        found = _inner_model(arg)
        if found is not None:
            return found
    return None


def nearest(word: str, known: Iterable[str]) -> str:
    """`; did you mean X?` for the nearest known word, or nothing."""
    found = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f"; did you mean `{found[0]}`?" if found else ""


def _assign(data: dict[str, Any], assignment: str) -> None:
    path, sep, text = assignment.partition("=")
    keys = path.split(".")
    if not sep or not all(keys):
        raise InputError("not an assignment", field="--set", got=assignment, wants="a.b=value")
    try:
        value = _yaml(text)
    except yaml.YAMLError as e:
        raise InputError("the value is not YAML", field=f"--set {path}", got=text) from e
    here = data
    for key in keys[:-1]:
        if here.get(key) is None:
            here[key] = {}
        here = here[key]
        if not isinstance(here, dict):
            raise InputError("has no fields of its own", field=f"--set {path}", got=here)
    here[keys[-1]] = value


def schemas() -> dict[str, dict[str, Any]]:
    """JSON Schemas of the YAML files, by file name."""
    from pipeline.suite import SuiteConfig

    return {"run.schema.json": RunConfig.model_json_schema(), "suite.schema.json": SuiteConfig.model_json_schema()}


def write_schemas(folder: Path) -> None:
    """Write the schemas; a test holds the committed ones against them."""
    for name, schema in schemas().items():
        (folder / name).write_text(json.dumps(schema, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

"""Everything that can be checked before a GPU is taken, checked: config, suite, rows, tools, scorers, prompt, model.

Loads the model's tokenizer and config, never its weights. Knows no Ray.
"""

from __future__ import annotations

import hashlib
import importlib
import json
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from actors.actions import FINISH, ToolSpec, fewshot_tools, fold
from actors.agent import Limits
from actors.errors import InputError
from actors.formats import Format, Prompt, check_format, fill, make_format
from actors.ladder import OFFERED
from actors.messages import Task
from actors.tokens import codec_of
from actors.tools import Tool, load_tools, tools_sha
from pipeline.config import RunConfig, nearest
from pipeline.scoring import Scorer, gold_check, load_scorers, version_of
from pipeline.suite import Reject, Rows, Suite, load_suite, read_rows
from pipeline.tables import RunFacts
from pipeline.tasks import packed

UNBOUNDED = 1 << 20
"""Tokens of context for models that name no bound."""
ASK_TOKENS = 96
"""Of the words that ask for the answer, and of what a template puts around them and around an observation."""
SHOWN = 8
"""Prompts that are rendered to find what all have in common."""


@dataclass(frozen=True, slots=True)
class Prepared:
    """A run that passed every check.

    Attributes:
        tokenizer: the model's.
        model_revision: commit, or a digest of the file; the adapter's behind a `+`.
        model_len: the longest context the model (or the config) allows, in tokens.
        prompt_tokens: tokens of each task's prompt, by task id.
        shared_tokens: of them the prefix that all prompts begin with.
    """

    config: RunConfig
    suite: Suite
    rows: Rows
    tools: tuple[Tool, ...]
    scorers: tuple[Scorer, ...]
    tokenizer: Any
    model_folder: Path
    model_revision: str
    model_len: int
    facts: RunFacts
    prompt_tokens: Mapping[str, int]
    shared_tokens: int


def prepare(config: RunConfig) -> Prepared:
    """Check all there is to check.

    Raises:
        InputError: the first thing that cannot be used, or every row that cannot (`bad_rows: stop`).
    """
    from actors.engine.loader import load_config, load_tokenizer, pinned_adapter, recorded_revision, resolve

    _check_built(config)
    suite = load_suite(config.suite, config.data)
    tools = tuple(load_tools(suite.config.tools, suite.folder))
    with _named(suite):
        scorers = load_scorers(suite.config.scorers, suite.folder)
    _check_fewshot(suite, tools)
    rows = read_rows(suite, config)
    if rows.rejects and config.bad_rows == "stop":
        raise InputError(describe_rejects(rows.rejects))
    if not rows.tasks:
        raise InputError("every row was rejected:\n" + describe_rejects(rows.rejects))
    check_gold(suite, scorers, rows)

    # Weights of a repository are the replicas' business: the machine that submits may have no room for them.
    model = resolve(config.model.id, config.model.revision, weights=Path(config.model.id).is_absolute())
    pinned = {"revision": model.revision}
    if config.model.adapter is not None:
        pinned["adapter"], _ = pinned_adapter(config.model.adapter)
    config = config.model_copy(update={"model": config.model.model_copy(update=pinned)})
    trusted = config.model.trust_remote_code
    model_config = load_config(model.folder, trust_remote_code=trusted)
    if config.engine == "paged":
        from actors.engine.support import check_supported, check_tensor_parallel

        check_supported(model_config)
        _check_fp8(config, model_config)
        for name, pool in config.pools.items():
            check_tensor_parallel(model_config, pool.tensor_parallel_size, f"pools.{name}.tensor_parallel_size")
    tokenizer = load_tokenizer(model.folder, trust_remote_code=trusted)
    check_format(config.agent.format, tokenizer, specs(tools))
    model_len = context_tokens(config, model_config)
    prompt_tokens, shared_tokens = count_prompts(config, suite, rows.tasks, tools, tokenizer)
    _check_context(config, suite, rows, tools, tokenizer, model_len, prompt_tokens)
    return Prepared(
        config=config,
        suite=suite,
        rows=rows,
        tools=tools,
        scorers=scorers,
        tokenizer=tokenizer,
        model_folder=model.folder,
        model_revision=recorded_revision(model.revision, config.model.adapter),
        model_len=model_len,
        facts=_facts(config, suite, rows, tools, scorers, tokenizer),
        prompt_tokens=prompt_tokens,
        shared_tokens=shared_tokens,
    )


def describe_rejects(rejects: Sequence[Reject], most: int = 20) -> str:
    """A line for each, up to `most`."""
    lines = [str(reject) for reject in rejects[:most]]
    if len(rejects) > most:
        lines.append(f"… and {len(rejects) - most:,} more rows")
    return "\n".join(lines)


def specs(tools: Sequence[Tool]) -> list[ToolSpec]:
    """What the model is told of the tools, Finish last."""
    return [ToolSpec(**tool.spec) for tool in tools] + [FINISH]


def transcript(config: RunConfig, suite: Suite, tools: Sequence[Tool], tokenizer: Any, task: Task) -> Format:
    """A new transcript of `task`: the rendered prompt."""
    agent = config.agent
    return make_format(
        agent.format,
        tokenizer,
        Prompt(suite.system, suite.fewshot, suite.config.prompt.user),
        specs(tools),
        agent.max_tokens.model_dump(),
        agent.reasoning.max_tokens,
        agent.reasoning.history,
        task,
        agent.labels == "forced",
    )


def _check_built(config: RunConfig) -> None:
    """Refuse what the config can say and Berth does not do yet, rather than do something else."""
    if config.memory.kv_dtype != "auto" and config.engine == "reference":
        raise InputError(
            "the reference engine keeps KV in the model's dtype",
            field="memory.kv_dtype",
            got=config.memory.kv_dtype,
            wants="auto, or engine: paged",
        )
    if config.numerics == "invariant" and config.model.dtype not in ("auto", "float32"):
        raise InputError("kept in float32 only", field="numerics", got="invariant", wants="model.dtype: float32")
    if ":" in config.engine:
        module, _, factory = config.engine.partition(":")
        try:
            found = importlib.import_module(module)
        except Exception as e:  # importing runs the user's code
            what = f"importing {module!r} failed: {type(e).__name__}: {e}"
            raise InputError(what, field="engine", got=config.engine, wants="module:factory") from e
        if not hasattr(found, factory):
            what = f"{module} has no {factory!r}" + nearest(factory, dir(found))
            raise InputError(what, field="engine", got=config.engine, wants="module:factory")
    if isinstance(config.fallback, list) and not OFFERED.issuperset(config.fallback):
        raise InputError("not done yet", field="fallback", got=config.fallback, wants=", ".join(sorted(OFFERED)))
    sizes = [pool.tensor_parallel_size for pool in config.pools.values()]
    if len(set(sizes)) < len(sizes):
        raise InputError(
            "rows go to the smallest pool that they fit",
            field="pools",
            got=dict(zip(config.pools, sizes, strict=True)),
            wants="another tensor_parallel_size for each",
        )
    for name, pool in config.pools.items():
        if pool.tensor_parallel_size > 1 and config.engine == "reference":
            raise InputError(
                "the reference engine runs on one GPU",
                field=f"pools.{name}.tensor_parallel_size",
                got=pool.tensor_parallel_size,
                wants="1, or engine: paged",
            )


def _check_fp8(config: RunConfig, model_config: Any) -> None:
    """Refuse KV in fp8 where attention does not do it on a GPU of this machine; a cluster's are not known here."""
    field = "memory.kv_dtype" if config.memory.kv_dtype == "fp8" else "fallback"
    in_list = isinstance(config.fallback, list) and "kv_fp8" in config.fallback
    if config.ray.address is not None or not (field == "memory.kv_dtype" or in_list):
        return
    import torch

    from actors.engine.attention import installed, kernels_on
    from actors.engine.memory import local_devices

    if config.numerics == "invariant" or config.model.dtype == "float32":
        return
    for device in local_devices():
        does = kernels_on(device.capability, torch.bfloat16, "fp8", model_config)
        if device.capability >= (8, 0) and not set(does).intersection(installed()):
            raise InputError(
                f"no attention kernel that is installed does fp8 on {device.name}",
                field=field,
                got="fp8",
                wants=f"int8, a GPU of compute capability 8.9, or {' or '.join(does)}",
            )


def _check_fewshot(suite: Suite, tools: Sequence[Tool]) -> None:
    known = {fold(tool.name): tool.name for tool in tools} | {"finish": "Finish"}
    for name in fewshot_tools(suite.fewshot):
        if fold(name) not in known:
            raise InputError(
                f"the few-shot examples call {name}, which is not a declared tool" + nearest(name, known.values()),
                file=str(suite.folder / "suite.yaml"),
                field="prompt.fewshot",
                wants="one of " + ", ".join(known.values()),
            )


@contextmanager
def _named(suite: Suite) -> Generator[None]:
    """Errors of those who do not know the suite's file name it."""
    try:
        yield
    except InputError as e:
        raise InputError(e.message, file=str(suite.folder / "suite.yaml")) from e


def check_gold(suite: Suite, scorers: Sequence[Scorer], rows: Rows) -> None:
    """InputError where a gold answer does not score 1.0 in the primary metric."""
    with _named(suite):
        failures = gold_check((task for task in rows.tasks if task.sample == 0), scorers, suite.primary)
    if failures:
        first = failures[0]
        raise InputError(
            f"{len(failures)} gold answers do not score 1.0 in {suite.primary}; the first: row {first.task_id!r}, "
            f"gold {first.gold!r}, score {first.score}",
            file=str(suite.folder / "suite.yaml"),
            field="primary",
        )


def context_tokens(config: RunConfig, model_config: Any) -> int:
    """The longest context that the model, or the config, allows."""
    text_config = model_config.get_text_config()
    own = getattr(text_config, "max_position_embeddings", None)
    wanted = config.model.max_model_len
    if own is not None and wanted is not None and wanted > own:
        raise InputError("longer than the model's context", field="model.max_model_len", got=wanted, wants=f"≤ {own}")
    return wanted or own or UNBOUNDED


def limits_of(config: RunConfig, suite: Suite, context_tokens: int) -> Limits:
    """Limits of every trajectory of a run, on a model of so long a context."""
    asked = suite.config.limits
    answer_tokens = config.agent.max_tokens.answer + ASK_TOKENS
    return Limits(config.agent.max_steps or asked.max_steps, asked.trajectory_tokens, context_tokens, answer_tokens)


def count_prompts(
    config: RunConfig, suite: Suite, tasks: Sequence[Task], tools: Sequence[Tool], tokenizer: Any
) -> tuple[dict[str, int], int]:
    """Tokens of each task's prompt, by task id, and of the prefix they share.

    A few prompts are rendered; for the others only what differs, the user's text, is tokenised, all at once. Where a
    tokenizer joins it with the text around it, a count may be a token off.
    """
    counts: dict[str, int] = {}
    for pack in packed(task for task in tasks if task.sample == 0):
        users = [f"\n{fill(suite.config.prompt.user, task).strip()}" for task in pack]
        counts |= zip((task.task_id for task in pack), codec_of(tokenizer).count(users), strict=True)
    some = tasks[:: max(1, len(tasks) // SHOWN)]
    shown = [transcript(config, suite, tools, tokenizer, task).token_ids for task in some]
    rest = len(shown[0]) - counts[some[0].task_id]
    columns = enumerate(zip(*shown, strict=False))
    shared = next((i for i, ids in columns if len(set(ids)) > 1), min(map(len, shown)))
    return {task_id: count + rest for task_id, count in counts.items()}, shared


def _check_context(
    config: RunConfig,
    suite: Suite,
    rows: Rows,
    tools: Sequence[Tool],
    tokenizer: Any,
    model_len: int,
    prompt_tokens: Mapping[str, int],
) -> None:
    """Every prompt leaves room for a turn and the answer. Only prompts near the bound are rendered to be sure."""
    limits = limits_of(config, suite, model_len)
    name = "the model's context" if limits.reason == "context_limit" else "limits.trajectory_tokens"
    turn = transcript(config, suite, tools, tokenizer, rows.tasks[0]).turn().max_tokens
    room = limits.tokens - turn - limits.answer_tokens
    for task in rows.tasks:
        if task.sample or prompt_tokens[task.task_id] + 64 < room:
            continue
        prompt = transcript(config, suite, tools, tokenizer, task)
        if prompt.prompt_tokens > room:
            raise InputError(
                f"the prompt has {prompt.prompt_tokens:,} tokens, a turn may take {turn:,}, "
                f"asking for the answer {limits.answer_tokens:,}; {name} is {limits.tokens:,}",
                file=suite.data,
                field=f"row {task.task_id}",
                wants="a shorter prompt, or a higher bound",
            )


def _facts(
    config: RunConfig, suite: Suite, rows: Rows, tools: Sequence[Tool], scorers: Sequence[Scorer], tokenizer: Any
) -> RunFacts:
    prompt = [config.agent.format, suite.system, suite.fewshot, suite.config.prompt.user]
    template = getattr(tokenizer, "chat_template", None) if config.agent.format != "react_text" else None
    return RunFacts(
        suite=suite.config.name,
        suite_version=suite.config.version,
        data_sha=rows.sha,
        prompt_sha=digest(json.dumps(prompt)),
        template_sha=digest(str(template)) if template else None,
        tool_sha=tools_sha(tools),
        scorer_version=version_of(scorers),
    )


def digest(text: str) -> str:
    """16 hex digits of SHA-256."""
    return hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()[:16]


def identity(prepared: Prepared) -> dict[str, Any]:
    """What makes two runs the same run: all that decides its rows. Pools, limits and memory do not."""
    config, facts = prepared.config, prepared.facts
    return {
        "suite": facts.suite,
        "suite_version": facts.suite_version,
        "fields": prepared.suite.config.fields.model_dump(),
        "scorers": [facts.scorer_version, prepared.suite.primary],
        "data": facts.data_sha,
        "prompt": facts.prompt_sha,
        "template": facts.template_sha,
        "tools": facts.tool_sha,
        "limits": prepared.suite.config.limits.model_dump(),
        "model": config.model.model_dump(exclude={"adapter"})
        | {"id": Path(config.model.id).name, "revision": prepared.model_revision},
        "engine": config.engine,
        "numerics": config.numerics,
        "agent": config.agent.model_dump(),
        "sampling": config.sampling.model_dump(),
        "samples": config.samples,
        "seed": config.seed,
        "rows": len(prepared.rows.tasks),
        "kv_dtype": config.memory.kv_dtype,
    }

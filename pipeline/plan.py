"""What a run will need, before any GPU is taken: config, suite and the model's config.json → does it fit, at which
rung, how many trajectories at once, hours, cost, risk; for this machine's GPUs and for a table of common ones.

Memory comes from `actors.engine.memory`, GPUs and hours from `hardware`, trajectories from `footprint` by the suite's
prior. Knows nothing of what other jobs hold of a GPU, and learns nothing from past runs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from actors.engine.protocol import Memory
from actors.errors import InputError, ModelUnavailable
from actors.formats import check_format
from pipeline.config import RunConfig
from pipeline.console import Screen, duration
from pipeline.footprint import Forecaster
from pipeline.hardware import GIB, Gpu, Shape, Work, run_seconds
from pipeline.preflight import context_tokens, count_prompts, limits_of, specs
from pipeline.suite import Suite, load_suite, read_rows

CHARACTERS_TOKEN = 4
GENERATED_SHARE = 0.5
"""Of the tokens that a step adds; the rest is observed. To be replaced by what runs teach."""
SMALLEST_BATCH = 16
SHARDS = (2, 4, 8)
MODEL_ERROR = 0.025
"""Standard deviation of the memory model's error, as a share of all but the KV pool: its goal is 5 %."""
RISK = 0.01
"""Trajectories are placed until their peaks exceed the pool with this probability."""
Z_RISK = 2.326
Z_P95 = 1.645
TABLE_COLUMNS = 150


@dataclass(frozen=True, slots=True)
class Expected:
    """The trajectories of a suite, in tokens.

    Attributes:
        rows: trajectories in all.
        prompt: of a median row; shared: its first tokens that all rows have.
        p50, p95, worst: whole trajectories, the prompt included.
        steps: model calls of a trajectory.
        exact: counted with the model's tokenizer, not estimated from characters.
    """

    rows: int
    prompt: int
    shared: int
    p50: int
    p95: int
    worst: int
    steps: float
    exact: bool


@dataclass(frozen=True, slots=True)
class Option:
    """A GPU and a rung at which a replica fits it.

    Attributes:
        rung: as it is, smaller batch or sharded; None where nothing fits.
        gpus: of one replica.
        memory: of one rank, at the last rung tried where nothing fits.
        at_once: trajectories of a replica that decode together.
        replicas, hours, gpu_hours, usd: None where the GPU's rates, the replicas or the price are not known.
        oom_risk: probability that memory runs short: the residents outgrow the pool (some are set back and computed
            again), or the memory model is wrong by more than what the budget leaves.
        cheaper: not the first rung that fits, but the one with the fewest GPU hours.
        kernels: of attention that do it on this GPU, the fastest first; the first that is installed is taken.
        pool: a larger pool of the config, for rows that outgrow the smallest; how many do is not known, nor its hours.
    """

    gpu: Gpu
    rung: str | None
    gpus: int
    max_batch: int
    max_prefill_tokens: int
    memory: Memory
    at_once: int = 0
    oom_risk: float = 1.0
    replicas: int = 1
    hours: float | None = None
    gpu_hours: float | None = None
    usd: float | None = None
    cheaper: bool = False
    kernels: tuple[str, ...] = ()
    pool: str | None = None


# --- trajectories


def forecast(config: RunConfig, suite: Suite, tools: Sequence[Any], tokenizer: Any, model_len: int) -> Expected:
    """The suite's trajectories; without a tokenizer prompts are estimated from their characters."""
    rows = read_rows(suite, config)
    if not rows.tasks:
        raise InputError("no row can be used", file=suite.data, wants="at least one")
    if tokenizer is None:
        common = suite.system + suite.fewshot
        lengths = [(len(common) + len(task.question)) // CHARACTERS_TOKEN for task in rows.tasks]
        shared = len(common) // CHARACTERS_TOKEN
    else:
        counts, shared = count_prompts(config, suite, rows.tasks, tools, tokenizer)
        lengths = list(counts.values())
    prompt = int(np.median(lengths))
    limits = limits_of(config, suite, model_len)
    median = Forecaster(limits, shared, suite.config.prior).forecast(rows.tasks[0], prompt)
    p50, p95, worst = median.p50_tokens, median.p95_tokens, median.quantile_tokens[-1]
    return Expected(len(rows.tasks), prompt, shared, p50, p95, worst, median.p50_steps, tokenizer is not None)


# --- work


def work_of(expected: Expected) -> Work:
    """The run's work, every row as the median one; what all rows share is computed once."""
    grown = expected.p50 - expected.prompt
    context = expected.prompt + grown / 2
    prefill = expected.prompt - expected.shared + grown * (1 - GENERATED_SHARE)
    decode = grown * GENERATED_SHARE
    return Work(
        calls=expected.rows * expected.steps,
        prefill=expected.rows * prefill + expected.shared,
        prefill_context=expected.rows * prefill * context,
        decode=expected.rows * decode,
        decode_context=expected.rows * decode * context,
        shared=expected.shared,
    )


# --- memory


def residents(pool_tokens: int, expected: Expected, page_tokens: int) -> int:
    """Most trajectories whose peaks, all at the same time, exceed the pool with a probability of at most `RISK`."""
    room = pool_tokens - expected.shared // page_tokens * page_tokens
    if expected.worst > pool_tokens:
        return 0
    mean, deviation = _own_tokens(expected, page_tokens)
    # n · mean + z · deviation · √n = room, solved for √n
    root = (-Z_RISK * deviation + math.sqrt((Z_RISK * deviation) ** 2 + 4 * mean * room)) / (2 * mean)
    return max(1, int(root**2))


def overflow_risk(count: int, pool_tokens: int, expected: Expected, page_tokens: int) -> float:
    """Probability that the peaks of `count` trajectories, all at the same time, exceed the pool."""
    room = pool_tokens - expected.shared // page_tokens * page_tokens
    mean, deviation = _own_tokens(expected, page_tokens)
    return _above((room - count * mean) / (max(deviation, 1.0) * math.sqrt(count)))


def _own_tokens(expected: Expected, page_tokens: int) -> tuple[float, float]:
    """Mean and standard deviation of what a trajectory holds beside the shared pages, at its peak, in whole pages."""
    own = expected.p50 - expected.shared // page_tokens * page_tokens + page_tokens / 2
    return own, (expected.p95 - expected.p50) / Z_P95


def _above(deviations: float) -> float:
    return 0.5 * math.erfc(deviations / math.sqrt(2))


def rungs(config: RunConfig, kv_heads: int, batch: int, prefill: int) -> list[tuple[str, int, int, int]]:
    """(name, GPUs, max batch, max prefill tokens) in the order of the fallback policy, beginning with the config.

    Raises:
        InputError: the KV heads cannot be split as the config wants.
    """
    sizes = [pool.tensor_parallel_size for pool in config.pools.values()]
    for size in sizes:
        if kv_heads % size:
            raise InputError(
                "the model's KV heads cannot be split so", field="pools", got=size, wants=f"a divisor of {kv_heads}"
            )
    base = min(sizes)
    found = [("as it is", base, batch, prefill)]
    for kind in ("smaller_batch", "shard") if isinstance(config.fallback, str) else config.fallback:
        if kind == "smaller_batch":
            halves = range(1, max(0, int(math.log2(max(1, batch / SMALLEST_BATCH)))) + 1)
            found += [("smaller batch", base, batch >> k, max(64, prefill >> k)) for k in halves]
        elif kind == "shard":
            found += [(f"sharded ×{tp}", tp, batch, prefill) for tp in SHARDS if tp > base and kv_heads % tp == 0]
    return found


def choose(config: RunConfig, model_config: Any, expected: Expected, model_len: int, gpu: Gpu) -> list[Option]:
    """The first rung at which the longest trajectory fits the GPU; then the cheapest one, if it saves a tenth or more
    of the GPU hours. Where nothing fits, the last rung tried. Behind it the config's larger pools."""
    from actors.engine.assemble import MAX_BATCH, MAX_PREFILL_TOKENS
    from actors.engine.kv import kv_shapes

    asked = config.memory
    batch = MAX_BATCH["cuda"] if asked.max_batch == "auto" else asked.max_batch
    prefill = MAX_PREFILL_TOKENS["cuda"] if asked.max_prefill_tokens == "auto" else asked.max_prefill_tokens
    first, *others = rungs(config, kv_shapes(model_config)[0][0], batch, prefill)
    tried = [first, *(rung for rung in others if gpu.count is None or rung[1] <= gpu.count)]
    options = [_option(config, model_config, expected, model_len, gpu, rung) for rung in tried]
    _, *pools = sorted((pool.tensor_parallel_size, name) for name, pool in config.pools.items())
    larger = [
        replace(
            _option(config, model_config, expected, model_len, gpu, (f"{tp} GPUs", tp, batch, prefill)),
            pool=name,
            hours=None,
            gpu_hours=None,
            usd=None,
        )
        for tp, name in pools
    ]
    fitting = [option for option in options if option.rung is not None]
    if not fitting:
        return options[-1:] + larger
    cheapest = min(fitting, key=lambda option: option.gpu_hours or 0.0)
    saves = cheapest.gpu_hours and fitting[0].gpu_hours and cheapest.gpu_hours <= 0.9 * fitting[0].gpu_hours
    return [fitting[0], *([replace(cheapest, cheaper=True)] if saves else []), *larger]


def _option(
    config: RunConfig, model_config: Any, expected: Expected, model_len: int, gpu: Gpu, rung: tuple[str, int, int, int]
) -> Option:
    from actors.engine.attention import page_tokens_of
    from actors.engine.kv import kv_shapes
    from actors.engine.memory import kv_token_bytes, parameters, predict

    name, gpus, batch, prefill = rung
    dtype = _dtype(config)
    kernels = _kernels(config, model_config, gpu)
    kernel = kernels[0] if kernels else "none"
    page_tokens = page_tokens_of(kernel)
    memory = predict(
        model_config,
        dtype=dtype,
        max_prefill_tokens=prefill,
        max_batch=batch,
        max_model_len=model_len,
        quantization=config.model.quantization,
        tp=gpus,
        kv_dtype=config.memory.kv_dtype,
        graphs=config.numerics != "invariant",
        hopper=gpu.hopper,
        device_bytes=gpu.memory_bytes,
        budget_fraction=config.memory.budget_fraction,
        gpu_memory_fraction=config.memory.gpu_memory_fraction,
        kernel=kernel,
    )
    option = Option(gpu, None, gpus, batch, prefill, memory, kernels=kernels)
    kv_bytes_token = kv_token_bytes(model_config, dtype, config.memory.kv_dtype, gpus)
    pool_tokens = (memory.pool_bytes or 0) // kv_bytes_token - page_tokens  # without the scratch page
    held = residents(pool_tokens, expected, page_tokens)
    if not held or not kernels or (gpu.count is not None and gpus > gpu.count):
        return option
    at_once = min(held, batch, expected.rows)
    full = overflow_risk(at_once, pool_tokens, expected, page_tokens)
    wrong = _above((gpu.memory_bytes - memory.total_bytes) / (MODEL_ERROR * memory.fixed_bytes))
    option = replace(option, rung=name, at_once=at_once, oom_risk=1 - (1 - full) * (1 - wrong))
    if gpu.matrix_flop_s is None or dtype.itemsize != 2:  # the table's rates are those of half precision
        return option
    found = parameters(model_config)
    shape = Shape(
        active=found.active,
        head=found.head,
        attention=model_config.num_attention_heads * sum(head_dim for _, head_dim in kv_shapes(model_config)),
        read_bytes=memory.weights_bytes * found.read // found.total,
        expert_bytes=memory.weights_bytes * found.experts // found.total,
        used_experts=model_config.num_experts_per_tok / model_config.num_experts if found.experts else 1.0,
        kv_bytes_token=kv_bytes_token,
    )
    hours = sum(run_seconds(work_of(expected), shape, gpu, at_once, gpus)) / 3600
    return _timed(option, config, hours)


def _kernels(config: RunConfig, model_config: Any, gpu: Gpu) -> tuple[str, ...]:
    """See `Option`; on this machine's GPUs only those that are installed."""
    from actors.engine.attention import HALF, installed, kernels_on

    invariant = config.numerics == "invariant"
    found = kernels_on(gpu.capability, _dtype(config), config.memory.kv_dtype, model_config, invariant)
    if gpu.count is None or not set(found) & set(HALF):
        return tuple(found)
    here = installed()
    return tuple(kernel for kernel in found if kernel in here)


def _kernel_notes(config: RunConfig, model_config: Any, gpus: Sequence[Gpu]) -> list[str]:
    """On which GPUs attention is not Triton's though the dtype is one of half precision, and what that means."""
    if _dtype(config).itemsize != 2:
        return []
    names: dict[tuple[str, ...], list[str]] = {}
    for gpu in gpus:
        kernels = _kernels(config, model_config, gpu)
        if kernels[:1] != ("triton",):
            names.setdefault(kernels, []).append(gpu.name)
    kv_dtype = config.memory.kv_dtype
    what = f"this head dimension or KV in {kv_dtype}" if kv_dtype != "auto" else "this head dimension"
    copied = "; KV in 8 bits is copied to be read, and decode runs without CUDA graphs" if kv_dtype != "auto" else ""
    return [
        f"{', '.join(where)}: Triton's kernels are missing or do not do {what}; it takes {' or '.join(kernels)}{copied}"
        if kernels
        else f"{', '.join(where)}: no attention kernel that is installed does {what} there"
        for kernels, where in names.items()
    ]


def _dtype(config: RunConfig) -> Any:
    """The torch dtype of a run on a GPU; every one of the table computes bfloat16."""
    from actors.engine.loader import resolve_dtype

    auto = "float32" if config.numerics == "invariant" else "bfloat16"
    return resolve_dtype(auto if config.model.dtype == "auto" else config.model.dtype, "cpu")


def _timed(option: Option, config: RunConfig, hours: float) -> Option:
    """`option` with replicas and cost, where one replica takes `hours`."""
    wanted = min(config.pools.values(), key=lambda pool: pool.tensor_parallel_size).replicas
    if isinstance(wanted, int):
        replicas = wanted
    elif not isinstance(wanted, str):
        replicas = wanted.max
    elif option.gpu.count is not None:
        replicas = max(1, option.gpu.count // option.gpus)
    else:
        replicas = math.ceil(hours / config.limits.max_hours) if config.limits.max_hours else 1
    gpu_hours = hours * option.gpus
    price = config.price.usd_per_gpu_hour
    usd = None if price is None else gpu_hours * price
    return replace(option, replicas=replicas, hours=hours / replicas, gpu_hours=gpu_hours, usd=usd)


# --- the command


@dataclass(frozen=True, slots=True)
class Plan:
    """What `berth plan` says.

    Attributes:
        parameters: of the model.
        kv_bytes_token: on one GPU, unsharded.
        notes: what was estimated, and why.
    """

    model: str
    parameters: int
    kv_bytes_token: int
    forecast: Expected
    options: tuple[Option, ...]
    notes: tuple[str, ...]


def make_plan(config: RunConfig, gpus: Sequence[Gpu]) -> Plan:
    """Plan a run on each GPU. Reads the suite and the model's config and tokenizer, no weights.

    Raises:
        InputError: the config, suite or model cannot be used or planned.
    """
    from actors.engine.loader import load_config, load_tokenizer, resolve
    from actors.engine.memory import kv_token_bytes, parameters
    from actors.engine.support import check_supported
    from actors.tools import load_tools

    if config.engine != "paged":
        raise InputError("only the paged engine can be planned", field="engine", got=config.engine, wants="paged")
    suite = load_suite(config.suite, config.data)
    tools = load_tools(suite.config.tools, suite.folder)
    folder = resolve(config.model.id, config.model.revision, weights=False).folder
    trusted = config.model.trust_remote_code
    model_config: Any = load_config(folder, trust_remote_code=trusted)
    check_supported(model_config)
    notes: list[str] = []
    try:
        tokenizer = load_tokenizer(folder, trust_remote_code=trusted)
    except ModelUnavailable as e:
        tokenizer = None
        why = str(e).replace(str(folder), folder.name)
        notes.append(f"{why}; prompts are estimated at {CHARACTERS_TOKEN} characters a token, tools left out")
    else:
        check_format(config.agent.format, tokenizer, specs(tools))
    model_len = context_tokens(config, model_config)
    expected = forecast(config, suite, tools, tokenizer, model_len)
    if config.memory.kv_dtype != "auto" or config.model.quantization is not None:
        notes.append(
            "numbers in 8 bits are unpacked in front of each product: that takes time which is not counted here"
        )
    notes += _kernel_notes(config, model_config, gpus)
    if config.fallback != "same_precision":
        notes.append("of the fallback's rungs only smaller_batch and shard are planned")
    return Plan(
        model=Path(config.model.id).name if Path(config.model.id).exists() else config.model.id,
        parameters=parameters(model_config).total,
        kv_bytes_token=kv_token_bytes(model_config, _dtype(config), config.memory.kv_dtype),
        forecast=expected,
        options=tuple(option for gpu in gpus for option in choose(config, model_config, expected, model_len, gpu)),
        notes=tuple(notes),
    )


def to_json(plan: Plan) -> dict[str, Any]:
    """The plan as plain data; sums of the memory components included."""
    document = asdict(plan)
    for option, plain in zip(plan.options, document["options"], strict=True):
        plain["memory"] |= {"fixed_bytes": option.memory.fixed_bytes, "total_bytes": option.memory.total_bytes}
    return document


def show(screen: Screen, plan: Plan) -> None:
    """The plan as lines and a table."""
    expected = plan.forecast
    kv_kib = plan.kv_bytes_token / 1024
    screen.line("model", f"{plan.model}: {plan.parameters / 1e9:.2f} B parameters, {kv_kib:,.0f} KiB of KV a token")
    for note in plan.notes:
        screen.line("note", note)
    screen.line(
        "tokens",
        f"{expected.rows:,} trajectories of {expected.steps:g} steps; prompt {'' if expected.exact else 'about '}"
        f"{expected.prompt:,}, {expected.shared:,} of it shared by all; at its peak p50 {expected.p50:,}, "
        f"p95 {expected.p95:,}, at most {expected.worst:,}",
    )
    priced = any(option.usd is not None for option in plan.options)
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for name in ("GPU", "rung"):
        table.add_column(name, no_wrap=True)
    for name in ("weights", "step", "other", "KV pool", "at once", "replicas", "time", "GPU hours"):
        table.add_column(name, justify="right", no_wrap=True)
    if priced:
        table.add_column("cost", justify="right")
    table.add_column("out of memory", no_wrap=True)
    for option in plan.options:
        cells = _cells(option)
        table.add_row(*(cells if priced else [*cells[:-2], cells[-1]]))
    # A log's or a narrow terminal's width would cut the cells.
    wide = max(screen.console.width, TABLE_COLUMNS)
    Console(file=screen.console.file, width=wide, highlight=False).print(table)
    screen.line(
        "units", "GiB on one GPU; at once: of a replica, if all stood at their peak; time: without loading and tools"
    )
    if any(option.pool for option in plan.options):
        screen.line("pools", "time is that of all rows in the smallest; the larger ones take what it cannot hold")


def _cells(option: Option) -> list[str]:
    memory = option.memory
    rest = memory.fixed_bytes - memory.weights_bytes - memory.step_bytes
    sizes = [f"{size / GIB:,.1f}" for size in (memory.weights_bytes, memory.step_bytes, rest, memory.pool_bytes or 0)]
    name = f"  {option.pool}:" if option.pool else "  cheaper:" if option.cheaper else option.gpu.name
    if option.rung is None:
        return [name, "none", *sizes, "-", "-", "-", "-", "-", "does not fit"]
    rung = option.rung
    if option.pool:
        return [name, rung, *sizes, f"{option.at_once:,}", "-", "-", "-", "-", risk_text(option.oom_risk)]
    if rung == "smaller batch":
        rung = f"batch {option.max_batch}, prefill {option.max_prefill_tokens:,}"
    return [
        name,
        rung,
        *sizes,
        f"{option.at_once:,}",
        f"{option.replicas:,}",
        "?" if option.hours is None else duration(option.hours * 3600),
        "?" if option.gpu_hours is None else f"{option.gpu_hours:,.2f}",
        "?" if option.usd is None else f"${option.usd:,.2f}",
        risk_text(option.oom_risk),
    ]


def risk_text(risk: float) -> str:
    """A probability in a word and a number."""
    if risk < 0.001:
        return "very unlikely (<0.1 %)"
    word = "unlikely" if risk <= 1.5 * RISK else "possible" if risk < 0.2 else "likely"
    return f"{word} ({risk:.1%})".replace("%", " %")

"""A spec → a paged engine: load the model, measure a step, give the KV pool what the budget leaves, capture graphs.

Knows no requests. The only place where the engine's parts are put together.
"""

from __future__ import annotations

import logging
import math
import os
import sys
import time
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch

from actors.engine import loader
from actors.engine.attention import HALF, kernels_for, page_tokens_of
from actors.engine.bounds import Bounds
from actors.engine.gang import START_S, Gang
from actors.engine.int8 import weights_dtype
from actors.engine.kv import QUANTISED, KVCache, kv_shapes
from actors.engine.leader import lead
from actors.engine.memory import (
    SLACK_BYTES,
    THREADS,
    device_used_bytes,
    fitting_pages,
    kv_sizes,
    most_pages,
    predict,
    unused_bytes,
    weights_bytes,
)
from actors.engine.oom import device_works, is_out_of_memory
from actors.engine.paged import PagedEngine
from actors.engine.protocol import NO_PAGE, EngineSpec, Memory, MemoryReport, NoRecorder, Recorder
from actors.engine.recorder import loading, recorder_of
from actors.engine.runner import Runner
from actors.engine.selfcheck import first_right
from actors.engine.shard import ShardedRunner, split
from actors.engine.support import check_supported, check_tensor_parallel
from actors.errors import InputError, OutOfMemory
from actors.messages import Numerics

log = logging.getLogger(__name__)

MAX_BATCH = {"cuda": 256, "cpu": 16}
MAX_PREFILL_TOKENS = {"cuda": 8192, "cpu": 512}
DECODE_TOKENS_ROW = {"cuda": 1, "cpu": 4}
"""Tokens of a decode step for each row of the largest batch, guesses included: no more than CUDA graphs replay."""
CPU_POOL_FRACTION = 0.25
OTHERS_BYTES = 256 << 20
"""What another process may take without being waited for."""
_POLL_S = 0.2
LEAVING_S = 30.0
"""How long a process that had this GPU before may take to let go of its memory: Ray gives the GPU on when it is told to
end, not when it has ended."""


class Start:
    """Seconds of each part of an engine's start, in order; the first is what came before, imports for the most part."""

    def __init__(self):
        self.seconds = {"before": process_age_s()}

    @contextmanager
    def part(self, name: str) -> Generator[None]:
        """This part runs."""
        begun_s = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - begun_s

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {seconds:.1f}" for name, seconds in self.seconds.items())
        return f"{parts}; the process is {process_age_s():.1f} s old"


def process_age_s() -> float:
    """Since this process was started; a Ray worker may have waited for its work. nan but on Linux."""
    if sys.platform != "linux":
        return math.nan
    ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")


def build(spec: EngineSpec) -> PagedEngine:
    """Load a model into a paged engine.

    With `tp` > 1 this is called on every rank, with the environment that `Gang.join` wants: rank 0 gets the engine,
    the others serve until it is closed, and then raise SystemExit.

    Raises:
        ModelUnavailable, UnsupportedModel: see `loader` and `support`.
        InputError: no kernel for this device and dtype, or numerics that it cannot keep.
        OutOfMemory: the weights do not fit, which is refused before they are read, or leave no room for a KV page.
    """
    if spec.kv_dtype not in ("auto", *QUANTISED):
        raise InputError("no such KV dtype", field="memory.kv_dtype", got=spec.kv_dtype, wants="auto | int8 | fp8")
    start = Start()
    device = torch.device(spec.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda" and spec.gpu_memory_fraction is not None:
        torch.cuda.set_per_process_memory_fraction(spec.gpu_memory_fraction)
    found = loader.resolve(spec.model, spec.revision)
    config = loader.load_config(found.folder, trust_remote_code=spec.trust_remote_code)
    check_supported(config)
    check_tensor_parallel(config, spec.tp)
    if device.type == "cuda":
        budget = spec.budget_fraction * (spec.gpu_memory_fraction or 1.0)
        room = int(budget * torch.cuda.get_device_properties(device).total_memory)
        dtype = loader.resolve_dtype(spec.dtype, device)
        check_weights(weights_bytes(config, dtype, spec.quantization, spec.tp), room, spec)
        with start.part("wait"):
            wait_for_memory(lambda: torch.cuda.mem_get_info(device)[0], room)
    gang = Gang.join(spec.tp, device, spec.rank_deadline_s) if spec.tp > 1 else None
    recorder = recorder_of(spec, device, 0 if gang is None else gang.rank)
    agreed = nullcontext() if gang is None else gang.agreed(START_S)
    with start.part("load"), loading(spec.model, recorder), agreed:
        model = loader.load_model(
            found.folder,
            str(loader.resolve_dtype(spec.dtype, device)).removeprefix("torch."),
            device if gang is None else "cpu",
            adapter=spec.adapter,
            quantization=spec.quantization if gang is None else None,
            trust_remote_code=spec.trust_remote_code,
        )
        if gang is not None:
            split(model, gang.rank, gang.size, device, spec.quantization)
    return over_model(
        model,
        revision=loader.recorded_revision(found.revision, spec.adapter),
        max_model_len=spec.max_model_len,
        max_batch=spec.max_batch,
        max_prefill_tokens=spec.max_prefill_tokens,
        pages=spec.kv_pages,
        invariant=spec.numerics == "invariant",
        speculation=spec.speculation,
        compile=spec.compile,
        kv_dtype=spec.kv_dtype,
        budget_fraction=spec.budget_fraction,
        gpu_memory_fraction=spec.gpu_memory_fraction,
        gang=gang,
        recorder=recorder,
        start=start,
    )


def wait_for_memory(free: Callable[[], int], room_bytes: int, clock: Callable[[], float] = time.monotonic) -> None:
    """Wait until the GPU has the memory that this engine may take, LEAVING_S at most; then it goes on with what there
    is.

    Args:
        free: bytes of the GPU that nobody holds now.
    """
    until_s = clock() + LEAVING_S
    while (now := free()) < room_bytes:
        if clock() > until_s:
            log.warning(
                "other processes hold this GPU's memory: %.2f GiB are free, the budget is %.2f GiB",
                now / 2**30,
                room_bytes / 2**30,
            )
            return
        time.sleep(_POLL_S)


def check_weights(needed_bytes: int, room_bytes: int, spec: EngineSpec) -> None:
    """Refuse weights that one of `spec.tp` GPUs has no room for, before a byte of them is read.

    Raises:
        OutOfMemory: with the numbers.
    """
    if needed_bytes > room_bytes:
        raise OutOfMemory(
            f"the weights of {spec.model} take {needed_bytes / 2**30:.2f} GiB on each of {spec.tp} GPUs, the budget is "
            f"{room_bytes / 2**30:.2f} GiB",
            "load",
            needed_bytes * spec.tp,
            room_bytes * spec.tp,
        )


def over_model(
    model: Any,
    *,
    kernel: str | None = None,
    revision: str = "",
    max_model_len: int | None = None,
    max_batch: int | None = None,
    max_prefill_tokens: int | None = None,
    pages: int | None = None,
    page_tokens: int | None = None,
    invariant: bool = False,
    graphs: bool = True,
    speculation: str = "auto",
    compile: str = "auto",
    fused: bool = True,
    kv_dtype: str = "auto",
    budget_fraction: float = 0.9,
    gpu_memory_fraction: float | None = None,
    gang: Gang | None = None,
    recorder: Recorder | None = None,
    start: Start | None = None,
) -> PagedEngine:
    """A paged engine over a loaded model, on the model's device.

    Args:
        kernel: attention kernel; None takes the fastest there is for the device and dtype.
        max_model_len: tokens; None takes the model's own bound.
        max_batch, max_prefill_tokens: None takes MAX_BATCH, MAX_PREFILL_TOKENS by device. Both are halved at the start
            as often as a step, and beside it a KV pool, want it (see `Bounds`).
        pages: KV pages, the scratch page included; None takes what the budget leaves.
        page_tokens: tokens a page; None takes what the kernel does best with.
        invariant: same row, same tokens, whatever else runs; float32 only.
        speculation, compile: on, off or auto, see `EngineSpec`.
        fused: one product and one kernel for queries, keys and values, on one GPU under the Triton kernels (see
            `fused.fuse`). The model is changed in place: no other kernel can run it then.
        kv_dtype: auto is the model's; int8 or fp8.
        budget_fraction: share of the GPU's memory to use.
        gpu_memory_fraction: torch's cap, as it was set; the budget is a share of that.
        gang: this rank's seat, the model being its part (see `shard.split`). Ranks other than 0 do not return: they
            serve until rank 0's engine is closed, then raise SystemExit.
        recorder: is told when memory runs out.
        start: has the seconds of what was done before.
    """
    start, recorder = start or Start(), recorder or NoRecorder()
    tp = 1 if gang is None else gang.size
    device, dtype, weights = model.device, model.dtype, weights_dtype(model)
    if invariant and dtype != torch.float32:
        raise InputError("kept in float32 only", field="numerics", got="invariant", wants="model.dtype: float32")
    kernels: Any = [kernel] if kernel else ["reference"] if invariant else kernels_for(device, dtype, model.config)
    length = max_model_len or getattr(model.config, "max_position_embeddings", None) or 1 << 17
    batch = max_batch or MAX_BATCH[device.type]
    prefill = max_prefill_tokens or MAX_PREFILL_TOKENS[device.type]
    guesses = speculation == "on" or (speculation == "auto" and device.type == "cpu")
    shapes = kv_shapes(model.config, tp)

    def cache_of(kernel: str) -> KVCache:
        return KVCache(shapes, 2, page_tokens or page_tokens_of(kernel), dtype, device, kv_dtype)

    cuda = device.type == "cuda"
    before = torch.cuda.memory_allocated(device) if cuda else 0
    with start.part("check"):
        at = kernels.index(first_right(kernels, cache_of, model.config))
        chosen = kernels[at if gang is None else -gang.smallest(-at)]  # the same on all ranks
    kept = torch.cuda.memory_allocated(device) - before if cuda else 0  # cuBLAS takes its workspace in the check
    kv = cache_of(chosen)
    kind: Any = Runner if gang is None else partial(ShardedRunner, gang=gang)
    runner: Runner = kind(model, kv, chosen, batch, prefill, length, graphs=graphs, invariant=invariant)
    joined = False
    if fused and gang is None:
        with start.part("fuse"):
            joined = runner.fuse()
    before = torch.cuda.memory_allocated(device) - kept if cuda else 0
    if compiles(compile, chosen, model.config, tp):
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(loader.cache_folder() / "compiled"))
        with start.part("compile"):
            runner.compile()
    elif compile == "on":
        log.warning("compile: on has no effect on %s in %s over %d ranks: layers run as they are", device, dtype, tp)
    bounds = Bounds(runner, gang, recorder)

    def predicted() -> Memory:
        return predict(
            model.config,
            tp=tp,
            dtype=dtype,
            quantization="int8" if weights == "int8" else None,
            kv_dtype=kv_dtype,
            max_prefill_tokens=runner.max_prefill_tokens,
            max_batch=runner.max_batch,
            max_model_len=length,
            graphs=graphs and chosen != "reference",
            cuda=cuda,
            hopper=cuda and torch.cuda.get_device_capability(device) == (9, 0),
            device_bytes=torch.cuda.get_device_properties(device).total_memory if cuda else None,
            budget_fraction=budget_fraction,
            gpu_memory_fraction=gpu_memory_fraction,
            kernel=chosen,
        )

    try:
        if cuda and pages is None:
            with start.part("profile"):
                bounds.measure(before)
        with start.part("fit"):
            # A step may read all of the pool, and other kernels copy what they read of quantised KV.
            page_bytes = kv.bytes_page + (0 if chosen == "triton" else kv.read_bytes_page)
            cap = gpu_memory_fraction or 1.0
            count = pages or _fit(kv, page_bytes, predicted, bounds, budget_fraction, cap, length, gang)
    finally:
        recorder.close()  # the engine's steps are another thread's
    measured = {"weights_bytes": sum(p.nbytes for p in model.parameters()), **bounds.measured}
    with start.part("pool"):
        runner.resize(count)
    measured["pool_bytes"] = count * kv.bytes_page
    used = device_used_bytes(device) if cuda else 0
    with start.part("graphs"):
        failure = runner.capture()
    if failure is not None and is_out_of_memory(failure, partial(device_works, device)):
        log.warning("the capture ran out of memory%s", bounds.record("capture", traced=False))
    if cuda:
        measured["graph_bytes"] = device_used_bytes(device) - used
    if cuda and pages is None and chosen in HALF:
        with start.part("settle"):
            bounds.settle()
    memory = MemoryReport(predicted(), measured, device_used_bytes(device) if cuda else None)
    leader = lead(runner, recorder) if isinstance(runner, ShardedRunner) else None
    name = str(dtype).removeprefix("torch.")
    computes = "+".join([chosen, *["fused"] * joined, *["compiled"] * runner.compiled])
    log.info("%d KV pages of %d tokens, kernel %s, %s", count, kv.page_tokens, computes, name)
    log.info("memory, predicted → measured MiB: %s", memory)
    log.info("start, seconds: %s", start)
    return PagedEngine(
        leader or runner,
        num_pages=count,
        page_tokens=kv.page_tokens,
        max_model_len=length,
        max_batch=runner.max_batch,
        max_prefill_tokens=runner.max_prefill_tokens,
        max_decode_tokens=runner.max_batch * DECODE_TOKENS_ROW[device.type] if guesses else 0,
        numerics=Numerics("paged", computes, name, kv.kv_dtype, weights, tp, revision, reproducible=invariant),
        kv_bytes_token=kv.bytes_token * tp,
        memory=memory,
        events=bounds.events,
        drop_caches=leader.drop_caches if leader else torch.cuda.empty_cache if device.type == "cuda" else lambda: None,
        recorder=recorder,
        on_close=leader.close if leader else lambda: None,
        squeezed=_squeezed(device) if device.type == "cuda" else lambda: False,
        works=partial(device_works, device),
    )


def compiles(wanted: str, kernel: str, config: Any, tp: int) -> bool:
    """Whether layers are compiled.

    Args:
        wanted: on, off or auto, see `EngineSpec`.
    """
    experts = hasattr(config, "num_experts")
    # Compiled norms are tuned by each rank for itself and may round apart: a token's experts would differ by rank.
    if kernel not in HALF or (experts and tp > 1):
        return False
    return wanted == "on" or (wanted == "auto" and not experts)


def _squeezed(device: torch.device) -> Callable[[], bool]:
    """Whether other processes hold more of the GPU than they do now."""

    def others() -> int:
        free, total = torch.cuda.mem_get_info(device)
        return total - free - torch.cuda.memory_reserved(device)

    before = others()
    return lambda: others() > before + OTHERS_BYTES


def _fit(
    kv: KVCache,
    page_bytes: int,
    predicted: Callable[[], Memory],
    bounds: Bounds,
    budget_fraction: float,
    cap: float,
    max_model_len: int,
    gang: Gang | None,
) -> int:
    """How many pages fit, under bounds that leave room for them; the same on all ranks.

    Args:
        page_bytes: of a page, and of what a step that reads it copies of it.

    Raises:
        OutOfMemory: no page has room beside the scratch page.
    """
    tp = 1 if gang is None else gang.size
    longest = -(-max_model_len // kv.page_tokens) + 1
    while True:
        room = _room(kv, predicted(), bounds.measured, budget_fraction, cap, tp)
        room = room if gang is None else gang.smallest(room)
        most = most_pages(bounds.max_batch, max_model_len, kv.page_tokens)
        pages = fitting_pages(room, page_bytes, most, partial(_ends_bytes, kv))
        if kv.device.type == "cuda" and bounds.relax(pages * kv.bytes_page, kv.bytes_page, longest * kv.bytes_page):
            continue
        if pages < 2:
            page, left = kv.bytes_page, max(0, room)
            text = f"{NO_PAGE}: a page takes {page / 2**20:.0f} MiB, {left / 2**20:.0f} MiB are left"
            raise OutOfMemory(text, "never_fits", 2 * page * tp, left * tp)
        return pages


def _room(
    kv: KVCache, predicted: Memory, measured: Mapping[str, int], budget_fraction: float, cap: float, tp: int
) -> int:
    """Bytes for KV, by what was measured; for what comes later (graphs, slack of steps), by what is predicted."""
    if kv.device.type == "cpu":
        return int(CPU_POOL_FRACTION / tp * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES"))
    free, total = torch.cuda.mem_get_info(kv.device)
    own = torch.cuda.memory_reserved(kv.device)
    room = min(free - int((1 - budget_fraction) * total), int(budget_fraction * total) - own)
    if cap < 1:  # the rest of the GPU may be others': how much of what is not free is this process's is not told
        room = min(room, int(budget_fraction * cap * total) - own - predicted.context_bytes)
    room -= max(measured["activation_bytes"], measured["logits_bytes"])
    # What the allocator keeps behind the weights is in `own`. The engine's own thread will want a workspace too.
    return room - predicted.graph_bytes - SLACK_BYTES - predicted.workspace_bytes // THREADS


def _ends_bytes(kv: KVCache, pages: int) -> int:
    """What torch's allocator keeps behind the tensors of so many pages."""
    return unused_bytes(kv_sizes(kv.shapes, kv.stored, pages * kv.page_tokens)) if kv.device.type == "cuda" else 0

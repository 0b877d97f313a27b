"""A spec → a paged engine: load the model, measure a step, give the KV pool what the budget leaves, capture graphs.

Knows no requests. The only place where the engine's parts are put together.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping
from typing import Any

import torch

from actors.engine import loader
from actors.engine.attention import kernel_for
from actors.engine.kv import KVCache, kv_shapes
from actors.engine.memory import PAGE_TOKENS, THREADS, device_used_bytes, most_pages, predict
from actors.engine.paged import PagedEngine
from actors.engine.protocol import EngineSpec, Memory, MemoryReport
from actors.engine.runner import Runner
from actors.engine.selfcheck import check_numbers
from actors.engine.support import check_supported
from actors.errors import InputError, OutOfMemory
from actors.messages import Numerics

log = logging.getLogger(__name__)

MAX_BATCH = {"cuda": 256, "cpu": 16}
MAX_PREFILL_TOKENS = {"cuda": 8192, "cpu": 512}
CPU_POOL_FRACTION = 0.25
OTHERS_BYTES = 256 << 20
"""What another process may take without being waited for."""


def build(spec: EngineSpec) -> PagedEngine:
    """Load a model into a paged engine.

    Raises:
        ModelUnavailable, UnsupportedModel: see `loader` and `support`.
        InputError: no kernel for this device and dtype, or numerics that it cannot keep.
        OutOfMemory: the model leaves no room for a KV page.
    """
    if spec.tp != 1:
        raise InputError("one GPU a replica for now", field="tensor_parallel_size", got=spec.tp, wants="1")
    if spec.kv_dtype != "auto":
        raise InputError("KV is kept in the model's dtype", field="memory.kv_dtype", got=spec.kv_dtype, wants="auto")
    device = torch.device(spec.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda" and spec.gpu_memory_fraction is not None:
        torch.cuda.set_per_process_memory_fraction(spec.gpu_memory_fraction)
    found = loader.resolve(spec.model, spec.revision)
    check_supported(loader.load_config(found.folder, trust_remote_code=spec.trust_remote_code))
    try:
        model = loader.load_model(
            found.folder,
            spec.dtype,
            device,
            adapter=spec.adapter,
            quantization=spec.quantization,
            trust_remote_code=spec.trust_remote_code,
        )
    except torch.OutOfMemoryError as e:
        raise OutOfMemory(f"the weights of {spec.model} do not fit this GPU: {e}") from e
    return over_model(
        model,
        revision=found.revision,
        max_model_len=spec.max_model_len,
        max_batch=spec.max_batch,
        max_prefill_tokens=spec.max_prefill_tokens,
        pages=spec.kv_pages,
        invariant=spec.numerics == "invariant",
        budget_fraction=spec.budget_fraction * (spec.gpu_memory_fraction or 1.0),
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
    page_tokens: int = PAGE_TOKENS,
    invariant: bool = False,
    graphs: bool = True,
    budget_fraction: float = 0.9,
) -> PagedEngine:
    """A paged engine over a loaded model, on the model's device.

    Args:
        kernel: attention kernel; None takes the fastest there is for the device and dtype.
        max_model_len: tokens; None takes the model's own bound.
        max_batch, max_prefill_tokens: None takes MAX_BATCH, MAX_PREFILL_TOKENS by device.
        pages: KV pages, the scratch page included; None takes what the budget leaves.
        invariant: same row, same tokens, whatever else runs; float32 only.
        budget_fraction: share of the GPU's memory to use.
    """
    device, dtype = model.device, model.dtype
    if invariant and dtype != torch.float32:
        raise InputError("kept in float32 only", field="numerics", got="invariant", wants="model.dtype: float32")
    chosen: Any = kernel or ("reference" if invariant else kernel_for(device, dtype, model.config))
    length = max_model_len or getattr(model.config, "max_position_embeddings", None) or 1 << 17
    batch = max_batch or MAX_BATCH[device.type]
    prefill = max_prefill_tokens or MAX_PREFILL_TOKENS[device.type]
    kv = KVCache(kv_shapes(model.config), 2, page_tokens, dtype, device)
    check_numbers(chosen, kv, model.config)
    runner = Runner(model, kv, chosen, batch, prefill, length, graphs=graphs, invariant=invariant)
    cuda = device.type == "cuda"
    predicted = predict(
        model.config,
        dtype=dtype,
        max_prefill_tokens=prefill,
        max_batch=batch,
        max_model_len=length,
        graphs=graphs and chosen != "reference",
        cuda=cuda,
        hopper=cuda and torch.cuda.get_device_capability(device) == (9, 0),
        device_bytes=torch.cuda.get_device_properties(device).total_memory if cuda else None,
        budget_fraction=budget_fraction,
    )
    measured = {"weights_bytes": sum(p.nbytes for p in model.parameters())}
    if cuda and pages is None:
        measured |= _measure(runner)
    count = pages or _pages(kv, predicted, measured, budget_fraction, most_pages(batch, length, page_tokens))
    runner.resize(count)
    measured["pool_bytes"] = count * kv.bytes_page
    before = device_used_bytes(device) if cuda else 0
    runner.capture()
    if cuda:
        measured["graph_bytes"] = device_used_bytes(device) - before
    memory = MemoryReport(predicted, measured, device_used_bytes(device) if cuda else None)
    name = str(dtype).removeprefix("torch.")
    log.info("%d KV pages of %d tokens, kernel %s, %s", count, page_tokens, chosen, name)
    log.info("memory, predicted → measured MiB: %s", memory)
    return PagedEngine(
        runner,
        num_pages=count,
        page_tokens=page_tokens,
        max_model_len=length,
        max_batch=batch,
        max_prefill_tokens=prefill,
        numerics=Numerics("paged", chosen, name, name, name, 1, revision, reproducible=invariant),
        kv_bytes_token=kv.bytes_token,
        memory=memory,
        oom_errors=(torch.OutOfMemoryError, MemoryError),
        drop_caches=torch.cuda.empty_cache if device.type == "cuda" else lambda: None,
        squeezed=_squeezed(device) if device.type == "cuda" else lambda: False,
    )


def _squeezed(device: torch.device) -> Callable[[], bool]:
    """Whether other processes hold more of the GPU than they do now."""

    def others() -> int:
        free, total = torch.cuda.mem_get_info(device)
        return total - free - torch.cuda.memory_reserved(device)

    before = others()
    return lambda: others() > before + OTHERS_BYTES


def _measure(runner: Runner) -> dict[str, int]:
    """The components that profile steps show, before the KV pool and the graphs exist.

    Raises:
        torch.OutOfMemoryError: the largest step does not fit.
    """
    device = runner.kv.device
    before = torch.cuda.memory_allocated(device)
    runner.profile(1, 1)  # cuBLAS takes its workspace, modules are loaded: neither belongs to a step
    workspace_bytes = torch.cuda.memory_allocated(device) - before
    activation_bytes = runner.profile(max_batch=1)
    logits_bytes = runner.profile(max_prefill_tokens=1)
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(device)
    reserved = torch.cuda.memory_reserved(device)
    return {
        "activation_bytes": activation_bytes,
        "logits_bytes": logits_bytes,
        "workspace_bytes": workspace_bytes,
        "context_bytes": total - free - reserved,
        "slack_bytes": reserved - torch.cuda.memory_allocated(device),
    }


def _pages(kv: KVCache, predicted: Memory, measured: Mapping[str, int], budget_fraction: float, most: int) -> int:
    """How many pages fit by what was measured; for what comes later (graphs, slack), by what is predicted."""
    if kv.device.type == "cpu":
        room = int(CPU_POOL_FRACTION * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES"))
    else:
        free, total = torch.cuda.mem_get_info(kv.device)
        own = torch.cuda.memory_reserved(kv.device)
        room = min(free - int((1 - budget_fraction) * total), int(budget_fraction * total) - own)
        room -= max(measured["activation_bytes"], measured["logits_bytes"])
        # The engine's own thread will want a workspace too.
        room -= predicted.graph_bytes + predicted.slack_bytes + predicted.workspace_bytes // THREADS
    pages = min(most, room // kv.bytes_page)
    if pages < 2:
        raise OutOfMemory(
            f"no room for KV: a page takes {kv.bytes_page / 2**20:.0f} MiB, {max(0, room) / 2**20:.0f} MiB are left"
        )
    return pages

"""The memory model: an HF config → GPU bytes by component, before any weight is loaded or GPU taken.

weights      every parameter of the model, instantiated on the meta device. Under tensor parallelism transformers' own
             plan says what is split: linear layers, experts, the head, the embedding by vocabulary; norms and what the
             plan does not name stay whole on each rank. int8 stands for the linear layers of the decoder: a byte a
             weight and a scale a row; head, embedding, norms and stacked experts keep the dtype. A layer is unpacked
             while it computes, which a step has to hold for the largest of them.
KV           2 · KV heads · head dimension · bytes, over all layers; a layer with a sliding window keeps all tokens too,
             since a page holds a token of every layer. In 8 bits: 2 · KV heads · (head dimension + 4), the scales; and
             beside each page of the pool room for the copy that a step makes of one layer of it.
activations  the model's own forward is run on the meta device over a few tokens, with our attention's fake, and the
             bytes of live tensors are counted; they grow with the tokens of a step. Nothing is kept for a backward
             pass, so the peak lies in one layer. For a dense one of hidden size E, MLP size I, head dimension D that is
             the product in the MLP: embedding output, layer input, residual and normed input (4 E), activated gate, up
             and their product (3 I), cosines and sines (2 D): 4 E + 3 I + 2 D numbers a token. With k experts a token,
             it is the end of the experts' sum instead, where transformers holds four copies of every token routed to an
             expert: 4 E + 4 k E and small change. A few attention heads on a narrow MLP peak elsewhere; the count
             finds where. FlashAttention's own 4 bytes a head and token are less than that, earlier, and not counted.
logits       the head runs over drawn rows only, when the activations are gone: [B, V] in the model's dtype, and
             sampling in chunks of 16 rows with top-k, top-p and log-probabilities, counted in the same way; the
             workspace of CUDA's sort (its second buffer of keys and indices) is added.
graphs       one memory pool for all sizes, as large as the largest decode step with its logits; one buffer of outputs;
             a packed batch of integers a size; and cuBLAS's workspaces, which it keeps for each thread and stream that
             ever ran a matrix product: one for the warm-ups of all sizes, one for their captures.
context      CUDA's context and loaded kernels: a constant, fitted to an H200.
slack        what torch's allocator holds and nobody uses. Behind weights and KV tensors its rules say it: blocks lie in
             segments of 20 MiB, or of whole 2 MiB (two of 8 MiB leave 4). Behind steps it is a constant: the engine
             makes its largest steps first, into whose segments all smaller ones fit (docs/memory.md).

The KV pool is what remains of the budget in whole pages, and no more than a full batch of the longest contexts.

Not known here: what kernels allocate for themselves, the fp32 gathers of the `sdpa` kernel, other processes, and how
much a load takes on its way (weights go to the device one by one).
"""

from __future__ import annotations

import importlib
import json
import math
import re
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig, AutoModelForCausalLM

from actors.engine.attention import NAME, page_tokens_of
from actors.engine.int8 import linear_layers
from actors.engine.kv import QUANTISED, kv_bytes_token, kv_shapes, kv_sizes, read_bytes_token
from actors.engine.protocol import Memory
from actors.engine.runner import graph_sizes
from actors.engine.sampling import CHUNK_ROWS, choose
from actors.messages import DeviceBytes

CONTEXT_BYTES = 768 << 20
SLACK_BYTES = 64 << 20
"""Behind steps of all sizes, where the largest came first."""
CUBLAS_BYTES = {True: 32 << 20, False: (8 << 20) + (128 << 10)}
"""A workspace, by whether the capability is 9.0 (torch's CublasHandlePool)."""
THREADS = 2
"""Threads that run steps, each with a workspace: the one that builds the engine, and the engine's."""
SORT_BYTES = 12
"""A number being sorted: a second key and index."""
_TRACED_TOKENS = 256
_SHARDED = re.compile(r"(packed_)?(colwise|rowwise)")  # as `shard.split` cuts: embedding and output layer stay whole


@dataclass(frozen=True, slots=True)
class Parameters:
    """How many numbers a model's weights hold, tied ones once.

    Attributes:
        total: all of them.
        embedding: the input embedding's table.
        head: the output head's matrix, tied or not.
        experts: those of routed experts.
        active: those that one token is multiplied with in the layers: neither embedding nor head, and of the experts
            only the chosen.
        read: those that a decode step reads, if its rows take every expert: all but an embedding that is not the head.
    """

    total: int
    embedding: int
    head: int
    experts: int
    active: int
    read: int


@dataclass(frozen=True, slots=True)
class _Weight:
    numel: int
    rows: int
    sharded: bool
    by_rows: bool  # a part has whole rows
    linear: bool  # of a decoder layer's nn.Linear


def parameters(config: Any) -> Parameters:
    """Count the parameters of a config's causal language model."""
    model = _meta_model(_key(config))
    embedding = model.get_input_embeddings().weight.numel()
    head = model.get_output_embeddings().weight.numel()
    total = sum(p.numel() for p in model.parameters())
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    experts = sum(p.numel() for name, p in model.named_parameters() if ".experts." in name)
    share = config.num_experts_per_tok / config.num_experts if experts else 0.0
    body = total - embedding - (0 if tied else head)
    return Parameters(total, embedding, head, experts, int(body - experts * (1 - share)), body + head)


def weights_bytes(config: Any, dtype: torch.dtype, quantization: str | None = None, tp: int = 1) -> int:
    """Bytes of the weights on one of `tp` ranks."""
    return sum(_weight_sizes(config, dtype, quantization, tp))


def _weight_sizes(config: Any, dtype: torch.dtype, quantization: str | None, tp: int) -> list[int]:
    """Bytes of each tensor."""
    sizes: list[int] = []
    for weight in _weights(_key(config)):
        numel = -(-weight.numel // (tp if weight.sharded else 1))
        rows = -(-weight.rows // (tp if weight.by_rows else 1))
        int8 = quantization == "int8" and weight.linear
        sizes += [numel, rows * dtype.itemsize] if int8 else [numel * dtype.itemsize]
    return sizes


def unused_bytes(sizes: Iterable[int]) -> int:
    """What torch's caching allocator holds beyond tensors of these bytes, made in this order and kept.

    By the rules of c10/cuda/CUDACachingAllocator.cpp: blocks up to 1 MiB lie in segments of 2 MiB, those below 10 MiB
    in segments of 20, larger ones in their own, in whole 2 MiB. The rest of a segment goes to the next that it fits.
    """
    unused = 0
    rests: dict[bool, list[int]] = {True: [], False: []}
    for size in sizes:
        block = -(-size // 512) * 512
        small = block <= 1 << 20
        rest = min((rest for rest in rests[small] if rest >= block), default=None)
        if rest is None:
            rest = 2 << 20 if small else 20 << 20 if block < 10 << 20 else -(-block // (2 << 20)) * (2 << 20)
            unused += rest
        else:
            rests[small].remove(rest)
        if rest - block >= 512 if small else rest - block > 1 << 20:
            rests[small].append(rest - block)
        unused -= size
    return unused


def unpacked_bytes(config: Any, dtype: torch.dtype, quantization: str | None = None, tp: int = 1) -> int:
    """What an int8 layer adds while it computes: its weights in `dtype`, of the largest layer; else 0."""
    sizes = [-(-one.numel // (tp if one.sharded else 1)) for one in _weights(_key(config)) if one.linear]
    return max(sizes, default=0) * dtype.itemsize if quantization == "int8" else 0


def kv_token_bytes(config: Any, dtype: torch.dtype, kv_dtype: str = "auto", tp: int = 1) -> int:
    """KV bytes of a token on one of `tp` ranks, scales included.

    Raises:
        ValueError: the KV heads cannot be split over the ranks.
    """
    return kv_bytes_token(kv_shapes(config, tp), QUANTISED.get(kv_dtype, dtype))


def activation_bytes(config: Any, dtype: torch.dtype, tokens: int, tp: int = 1) -> int:
    """What a forward of `tokens` packed tokens adds at its peak."""
    return math.ceil(_traced_forward(_key(config), tp) * tokens / _TRACED_TOKENS) * dtype.itemsize // 2


def logits_bytes(config: Any, dtype: torch.dtype, batch: int) -> int:
    """Logits of `batch` rows and what drawing from them adds."""
    logits = batch * config.vocab_size * dtype.itemsize
    rows = min(batch, CHUNK_ROWS)
    drawing = logits + _traced_draw(rows, config.vocab_size, dtype) + SORT_BYTES * rows * config.vocab_size
    if getattr(config, "final_logit_softcapping", None) is not None:
        return max(3 * logits, drawing)  # raw logits, their tanh, and that scaled
    return drawing


def graph_bytes(
    config: Any,
    dtype: torch.dtype,
    batch: int,
    max_model_len: int,
    hopper: bool,
    page_tokens: int,
    tp: int = 1,
    quantization: str | None = None,
) -> int:
    """Captured decode steps of all sizes up to `batch`."""
    sizes = graph_sizes(batch)
    logits = batch * config.vocab_size * dtype.itemsize
    step = activation_bytes(config, dtype, batch, tp) + unpacked_bytes(config, dtype, quantization, tp)
    pool = max(step, logits + batch * config.hidden_size * dtype.itemsize)
    packed = 4 * sum(size + 5 for size in sizes) * (-(-max_model_len // page_tokens) + 6)
    return pool + logits + 8 * batch + packed + 2 * CUBLAS_BYTES[hopper]


def predict(
    config: Any,
    *,
    dtype: torch.dtype,
    max_prefill_tokens: int,
    max_batch: int,
    max_model_len: int,
    quantization: str | None = None,
    tp: int = 1,
    kv_dtype: str = "auto",
    graphs: bool = True,
    cuda: bool = True,
    hopper: bool = True,
    device_bytes: int | None = None,
    budget_fraction: float = 0.9,
    gpu_memory_fraction: float | None = None,
    kernel: str = "triton",
) -> Memory:
    """The memory of one rank of an engine.

    Args:
        config: an HF config of a causal language model.
        kv_dtype: auto is `dtype`.
        cuda: False leaves out what only a GPU has.
        hopper: a GPU of capability 9.0.
        device_bytes: the GPU's memory; None leaves the pool out.
        budget_fraction, gpu_memory_fraction: as in the run config.
        kernel: of attention in half precision on a GPU.

    Raises:
        ValueError: the KV heads cannot be split over the ranks.
    """
    page_tokens = page_tokens_of(kernel)
    page_bytes = kv_token_bytes(config, dtype, kv_dtype, tp) * page_tokens
    activations = activation_bytes(config, dtype, max(max_prefill_tokens, max_batch), tp)
    activations += unpacked_bytes(config, dtype, quantization, tp)
    logits = logits_bytes(config, dtype, max_batch)
    # Triton's kernels read quantised KV as it is; others a copy, a layer at a time, in steps that no graph can hold.
    copies = kv_dtype != "auto" and not (cuda and kernel == "triton" and dtype in (torch.float16, torch.bfloat16))
    sizes = _weight_sizes(config, dtype, quantization, tp)
    bare = Memory(
        weights_bytes=sum(sizes),
        activation_bytes=activations,
        logits_bytes=logits,
        workspace_bytes=THREADS * CUBLAS_BYTES[hopper] if cuda else 0,
        graph_bytes=graph_bytes(config, dtype, max_batch, max_model_len, hopper, page_tokens, tp, quantization)
        if cuda and graphs and not copies
        else 0,
        context_bytes=CONTEXT_BYTES if cuda else 0,
        slack_bytes=SLACK_BYTES + unused_bytes(sizes) if cuda else 0,
    )
    if device_bytes is None:
        return bare
    budget = int(budget_fraction * (gpu_memory_fraction or 1.0) * device_bytes)
    if copies:  # a step may read all of the pool
        page_bytes += page_tokens * read_bytes_token(kv_shapes(config, tp), dtype, QUANTISED[kv_dtype])
    shapes, stored = kv_shapes(config, tp), QUANTISED.get(kv_dtype, dtype)

    def slack(pages: int) -> int:
        if not cuda:
            return 0
        return SLACK_BYTES + unused_bytes([*sizes, *kv_sizes(shapes, stored, pages * page_tokens)])

    room = budget - bare.fixed_bytes + bare.slack_bytes
    most = min(most_pages(max_batch, max_model_len, page_tokens), max(0, room - bare.slack_bytes) // page_bytes)
    pages = fitting_pages(room, page_bytes, most, slack)
    pool_bytes = pages * kv_token_bytes(config, dtype, kv_dtype, tp) * page_tokens
    return replace(bare, slack_bytes=slack(pages), pool_bytes=pool_bytes)


def fitting_pages(room_bytes: int, page_bytes: int, most: int, ends_bytes: Callable[[int], int]) -> int:
    """Pages that fit `room_bytes` with what torch's allocator keeps behind them, `most` at most.

    Args:
        ends_bytes: behind so many pages.
    """
    pages = min(max(0, room_bytes) // page_bytes, most)
    while pages > (fitting := max(0, room_bytes - ends_bytes(pages)) // page_bytes):
        pages = fitting
    return pages


def most_pages(max_batch: int, max_model_len: int, page_tokens: int) -> int:
    """Pages that a full batch of the longest contexts takes, and the scratch page."""
    return max_batch * -(-max_model_len // page_tokens) + 1


# --- the device


@dataclass(frozen=True, slots=True)
class Device:
    """A GPU of this machine."""

    name: str
    memory_bytes: int
    capability: tuple[int, int]


def local_devices() -> list[Device]:
    """This machine's GPUs: by NVML, which takes no context on them, else by torch."""
    nvml = _nvml()
    if nvml is None:
        found: list[Any] = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
        return [Device(one.name, one.total_memory, (one.major, one.minor)) for one in found]
    handles = [nvml.nvmlDeviceGetHandleByIndex(i) for i in range(nvml.nvmlDeviceGetCount())]
    return [
        Device(
            str(nvml.nvmlDeviceGetName(handle)),
            int(nvml.nvmlDeviceGetMemoryInfo(handle).total),
            tuple(nvml.nvmlDeviceGetCudaComputeCapability(handle)),
        )
        for handle in handles
    ]


def device_used_bytes(device: torch.device) -> int:
    """What all processes hold of a CUDA device: by NVML, else by the CUDA runtime.

    Without what the driver and firmware keep for themselves (some 475 MiB of an H100), which is no part of the memory
    that CUDA says the device has, and which NVML's first version of this call counts as used.
    """
    if (nvml := _nvml()) is not None:
        try:
            uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
            found = nvml.nvmlDeviceGetMemoryInfo(nvml.nvmlDeviceGetHandleByUUID(uuid), version=nvml.nvmlMemory_v2)
            return int(found.total - found.reserved - found.free)
        # A slice of a GPU, a container that hides it, or a driver before 510; another module of NVML's name.
        except (nvml.NVMLError, AttributeError, TypeError):
            pass
    free, total = torch.cuda.mem_get_info(device)
    return total - free


def device_bytes() -> DeviceBytes | None:
    """Memory of the GPU that this process computes on; None where it uses none."""
    if not torch.cuda.is_initialized():
        return None
    used = device_used_bytes(torch.device("cuda", torch.cuda.current_device()))
    return DeviceBytes(torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved(), used)


def _nvml() -> Any:
    """The initialised library, or None where it, its driver or a GPU is missing."""
    try:
        nvml: Any = importlib.import_module("pynvml")
    except ImportError:
        return None
    try:
        nvml.nvmlInit()
    except nvml.NVMLError:
        return None
    return nvml


# --- on the meta device


def _key(config: Any) -> str:
    fields = config.to_dict() | {"dtype": None}
    fields.pop("quantization_config", None)
    return json.dumps(fields, sort_keys=True, default=str)


@lru_cache(maxsize=8)
def _meta_model(key: str) -> Any:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(**json.loads(key)), dtype=torch.bfloat16).eval()


def _rank_key(key: str, tp: int) -> str:
    """What one rank computes, as a model of its own; of layers that are alike only the first."""
    fields = json.loads(key)
    heads = fields["num_attention_heads"]
    fields["head_dim"] = fields.get("head_dim") or fields["hidden_size"] // heads
    fields["num_key_value_heads"] = fields.get("num_key_value_heads") or heads
    for name in ("num_attention_heads", "num_key_value_heads", "intermediate_size", "moe_intermediate_size"):
        if fields.get(name):
            fields[name] = -(-fields[name] // tp)
    if not fields.get("mlp_only_layers"):
        fields["num_hidden_layers"] = min(fields["num_hidden_layers"], 2 + 2 * (fields.get("decoder_sparse_step") or 1))
        if fields.get("layer_types"):
            fields["layer_types"] = fields["layer_types"][: fields["num_hidden_layers"]]
    return json.dumps(fields)


@lru_cache(maxsize=8)
def _weights(key: str) -> tuple[_Weight, ...]:
    model = _meta_model(key)
    plan: dict[str, str] = model.tp_plan
    linear = {f"{name}.weight" for name, _ in linear_layers(model)}

    def weight(name: str, parameter: Tensor) -> _Weight:
        place = re.sub(r"\.\d+\.", ".*.", name)
        module, _, kind = place.rpartition(".")
        style = plan.get(place) or plan.get(module) or ""
        whole_bias = kind == "bias" and style.startswith("rowwise")  # added once, after the ranks' sum
        sharded = bool(_SHARDED.fullmatch(style)) and not whole_bias
        return _Weight(
            numel=parameter.numel(),
            rows=parameter.shape[0],
            sharded=sharded,
            by_rows=sharded and style.startswith("colwise"),
            linear=name in linear,
        )

    return tuple(weight(name, parameter) for name, parameter in model.named_parameters())


@lru_cache(maxsize=32)
def _traced_forward(key: str, tp: int) -> int:
    """Peak bytes of a bf16 forward of `_TRACED_TOKENS` tokens. Twice that in fp32, where transformers' grouped experts
    have no meta kernel."""
    model = _meta_model(_rank_key(key, tp))
    model.set_attn_implementation(NAME)
    ids_1T = torch.zeros(1, _TRACED_TOKENS, dtype=torch.int64, device="meta")
    body = model.base_model
    return live_peak_bytes(lambda: body(input_ids=ids_1T, position_ids=ids_1T, use_cache=False))


@lru_cache(maxsize=32)
def _traced_draw(rows: int, vocabulary: int, dtype: torch.dtype) -> int:
    with torch.device("meta"):
        logits_BV = torch.empty(rows, vocabulary, dtype=dtype)
        ints_B, floats_B = torch.zeros(rows, dtype=torch.int64), torch.ones(rows)
    return live_peak_bytes(lambda: choose(logits_BV, ints_B, ints_B, floats_B, floats_B, ints_B))


class _Live(TorchDispatchMode):
    """Counts the bytes of storages that operations make, until they are freed."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = self._now = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {id(one.untyped_storage()) for one in tree_leaves((args, kwargs)) if isinstance(one, Tensor)}
        out = func(*args, **(kwargs or {}))
        for one in tree_leaves(out):
            if isinstance(one, Tensor):
                storage = one.untyped_storage()
                if id(storage) not in self._known | given:
                    self._known.add(id(storage))
                    self._now += storage.nbytes()
                    weakref.finalize(storage, self._freed, id(storage), storage.nbytes())
        self.peak = max(self.peak, self._now)
        return out

    def _freed(self, storage: int, size: int) -> None:
        self._known.remove(storage)
        self._now -= size


@torch.no_grad()
def live_peak_bytes(call: Callable[[], object]) -> int:
    """Most bytes of tensors made by a call that were alive at once; what custom operators make inside is not seen."""
    with _Live() as live:
        call()
    return live.peak

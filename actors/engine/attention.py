"""Attention over paged KV, under a transformers model that is otherwise left as it is.

The model calls `_attention` through transformers' attention interface; it writes the step's keys and values into their
pages and attends from there. What belongs to a step (pages, lengths) comes from the `Plan` that the runner has made
current on its thread. No mask function is registered: for an implementation without one transformers builds no mask at
all, where a registered one first costs a host synchronisation per step to look for packed sequences.

Kernels:
    triton        FlashAttention in Triton (`actors.engine.kernels`), with shared pages read once; fp16 and bf16
    flash_attn    FlashAttention-2 (Dao 2023) over block tables; fp16 and bf16
    torch_varlen  the same algorithm in torch (2.14 on), where flash-attn is not installed; no soft cap
    sdpa          torch's own attention over gathered pages, for fp32 and CPUs
    reference     plain torch in fp32, on CPU and CUDA, slow; any soft cap

The reference is invariant by construction: queries go in groups of 4 that are aligned to their position in the sequence
and padded, over keys padded to whole pages. So the shape of every matrix product, and a token's place in it, follow
from the token's position alone: neighbours and prefill chunks change no bit.

Knows nothing of scheduling, sampling or who owns a page. Shapes: T tokens of a step, R rows, H query heads, K KV heads,
G = H/K, D head dimension, P pages a row, S tokens a page, L keys, Q queries of a group.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import logging
import math
import threading
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, cast

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from actors.engine.kernels import BLOCK
from actors.engine.kv import KVCache, kv_shapes
from actors.errors import InputError, UnsupportedModel

if TYPE_CHECKING:
    from actors.engine.kernels.decode import Runs

Kernel = Literal["triton", "flash_attn", "torch_varlen", "sdpa", "reference"]

log = logging.getLogger(__name__)

NAME = "berth_paged"
_GROUP = 4
RUNS = 4
"""Runs of shared pages that a replayed step reads once."""
HALF: tuple[Kernel, ...] = ("triton", "flash_attn", "torch_varlen")
"""Kernels for half precision, the fastest first."""
_PAGE_UNIT: dict[Kernel, int] = {"triton": BLOCK, "flash_attn": 256, "torch_varlen": 256}
_TRITON_HEAD_DIMS = (16, 32, 64, 128, 256)
_FP8_CAPABILITY = (8, 9)  # below, Triton's compiler has no e4m3
_INSTALL = "`uv pip install flash-attn==2.8.3 --no-build-isolation`, torch 2.14 or later, or model.dtype: float32"
# Without influence here: positions are in the rotary embedding already, and the cache is ours.
_IGNORED = {"position_ids", "use_cache", "cache_position", "return_dict"}
_OFF = {"output_attentions", "output_hidden_states", "output_router_logits"}


@dataclass(slots=True)
class Row:
    """A row of a step as the reference kernel reads it.

    Attributes:
        at: index in the step of its first token.
        start: position in the sequence of that token.
        tokens: how many it computes.
        pages: its page table.
    """

    at: int
    start: int
    tokens: int
    pages: Sequence[int]


@dataclass(slots=True)
class Units:
    """How the Triton kernels cut a step: a row's new tokens into tiles of queries, in decode its pages into chunks.

    Attributes:
        row_I: int32, the row of each tile or chunk.
        first_R1: int32 [R + 1], the first one of each row.
        queries: tokens of a tile.
        pages_1: int32, pages of a chunk.
        runs: pages that rows of a decode step begin with and share.
    """

    row_I: Tensor
    first_R1: Tensor
    queries: int
    pages_1: Tensor
    runs: Runs | None = None


@dataclass(slots=True)
class Plan:
    """What a step's attention needs beside queries, keys and values.

    Attributes:
        slots_T: int64, page · S + offset where each token's KV goes.
        cu_q_R1, cu_k_R1: int32, running sums of the rows' new tokens and of their lengths; unused in decode.
        lens_R: int32, tokens of each row after this step.
        table_RP: int32 page tables.
        max_q, max_k: largest number of new tokens, and largest length.
        decode: every row computes one token.
        rows: for the reference kernel; rows that only pad are left out and attend to nothing.
        units: for the Triton kernels.
        pages_N: where KV is quantised, the distinct pages that the step reads, int64: kernels other than Triton's get a
            copy of these in the model's dtype, and page tables, but not slots, count in it.
    """

    kv: KVCache
    kernel: Kernel
    slots_T: Tensor
    cu_q_R1: Tensor | None
    cu_k_R1: Tensor | None
    lens_R: Tensor
    table_RP: Tensor
    max_q: int
    max_k: int
    decode: bool
    rows: Sequence[Row] = ()
    units: Units | None = None
    pages_N: Tensor | None = None


class _TritonKernels(NamedTuple):
    write: Callable[..., None]
    enter: Callable[..., Tensor]
    prefill: Callable[..., Tensor]
    decode: Callable[..., Tensor]


class _Current(threading.local):
    plan: Plan | Callable[..., Tensor] | None = None


_current = _Current()


@contextmanager
def attending(plan: Plan | Callable[..., Tensor]) -> Generator[None]:
    """Make `plan` the one that attention on this thread follows, or a function that takes its place."""
    before, _current.plan = _current.plan, plan
    try:
        yield
    finally:
        _current.plan = before


def page_tokens_of(kernel: str) -> int:
    """Tokens of a page: FlashAttention's unit, or half of it, which leaves less of a page empty and less of a shared
    prompt to each row alone."""
    return 128 if kernel == "triton" else 256


def kernels_for(device: torch.device | str, dtype: torch.dtype, config: Any = None) -> list[Kernel]:
    """The kernels that compute `dtype` on `device` with what is installed, the fastest first; at least one.

    Args:
        config: the model's; a soft cap in fp32 or on a CPU is left to the reference.

    Raises:
        InputError: there is none; says what to install or to set.
    """
    device = torch.device(device)
    if device.type == "cpu" or (device.type == "cuda" and dtype == torch.float32):
        return ["reference" if getattr(config, "attn_logit_softcapping", None) is not None else "sdpa"]
    if device.type != "cuda":
        raise InputError("the paged engine runs on CUDA and CPU", field="device", got=device.type, wants="cuda or cpu")
    if dtype not in (torch.float16, torch.bfloat16):
        raise InputError("no attention kernel", field="model.dtype", got=str(dtype), wants="float32, bfloat16, float16")
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 0):
        raise InputError(
            "FlashAttention-2 needs compute capability 8.0 (Ampere)",
            field="model.dtype",
            got=f"{dtype} on {capability[0]}.{capability[1]}",
            wants="float32",
        )
    found = installed()
    if not found:
        if importlib.util.find_spec("flash_attn") is not None:
            try:
                _flash_attn()
            except ImportError as e:
                raise InputError(f"flash-attn does not load ({e})", wants=_INSTALL) from e
        raise InputError("no attention kernel for half precision is installed", wants=_INSTALL)
    return found


def installed() -> list[Kernel]:
    """The kernels for half precision that are installed here, the fastest first."""
    found: list[Kernel] = []
    if importlib.util.find_spec("triton") is not None:
        found.append("triton")
    if importlib.util.find_spec("flash_attn") is not None:
        try:
            _flash_attn()
            found.append("flash_attn")
        except ImportError as e:
            log.warning("flash-attn does not load: %s", e)
    if _has_paged_varlen():
        found.append("torch_varlen")
    return found


def kernels_on(
    capability: tuple[int, int], dtype: torch.dtype, kv_dtype: str, config: Any, invariant: bool = False
) -> list[Kernel]:
    """The kernels that do a model on a GPU of this compute capability, where they are installed, the fastest first.

    Args:
        kv_dtype: auto, int8 or fp8.
        config: the model's.
    """
    if dtype == torch.float32:
        capped = getattr(config, "attn_logit_softcapping", None) is not None
        return ["reference" if capped or invariant else "sdpa"]
    return [one for one in HALF if _refusal(one, kv_shapes(config), kv_dtype, config, capability) is None]


def check_kernel(kernel: Kernel, kv: KVCache, config: Any) -> None:
    """Refuse a model whose shapes or arguments `kernel` does not do on the device of `kv`.

    Raises:
        UnsupportedModel: names the shape or argument.
        ValueError: the KV cache was not made for this kernel.
    """
    capability = torch.cuda.get_device_capability(kv.device) if kv.device.type == "cuda" else None
    refused = _refusal(kernel, kv.shapes, kv.kv_dtype, config, capability)
    if kernel not in HALF:
        if refused is not None:
            raise refused
        return
    if kv.page_tokens % _PAGE_UNIT[kernel]:
        raise ValueError(f"{kernel} wants pages of a multiple of {_PAGE_UNIT[kernel]} tokens, got {kv.page_tokens}")
    if kv.dtype not in (torch.float16, torch.bfloat16):
        raise ValueError(f"{kernel} wants float16 or bfloat16 keys and values, got {kv.dtype}")
    if refused is not None:
        raise refused


def _refusal(
    kernel: Kernel, shapes: Sequence[tuple[int, int]], kv_dtype: str, config: Any, capability: tuple[int, int] | None
) -> UnsupportedModel | None:
    """Why `kernel` does not do these shapes; None where it does.

    Args:
        capability: of the GPU; None on a CPU.
    """
    softcap = getattr(config, "attn_logit_softcapping", None)
    if softcap is not None and kernel in ("sdpa", "torch_varlen"):
        where = "under sdpa" if kernel == "sdpa" else "without flash-attn"
        return _unsupported(f"attn_logit_softcapping {where}", softcap)
    for _, head_dim in shapes:
        if kernel == "triton" and head_dim not in _TRITON_HEAD_DIMS:
            return UnsupportedModel("the Triton kernels do not do this head dimension", got=head_dim, wants="16 to 256")
        if kernel in ("flash_attn", "torch_varlen") and (head_dim > 256 or head_dim % 8):
            return UnsupportedModel("FlashAttention-2 does not do this head dimension", got=head_dim, wants="8 to 256")
    if kernel == "triton" and kv_dtype == "fp8" and capability is not None and capability < _FP8_CAPABILITY:
        return UnsupportedModel(
            "Triton has no fp8 e4m3 on this GPU",
            field="memory.kv_dtype",
            got=f"fp8 on compute capability {capability[0]}.{capability[1]}",
            wants="int8, or compute capability 8.9",
        )
    return None


def _attention(
    module: torch.nn.Module,
    q_1HTD: Tensor,
    k_1KTD: Tensor,
    v_1KTD: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **rest: Any,
) -> tuple[Tensor, None]:
    """What transformers calls in each layer; every argument is honoured or refused by name.

    Returns:
        [1, T, H, D], and no attention weights.

    Raises:
        UnsupportedModel: an argument that the kernels do not compute.
    """
    if attention_mask is not None:
        raise _unsupported("attention_mask", tuple(attention_mask.shape))
    if dropout and module.training:
        raise _unsupported("dropout", dropout)
    if getattr(module, "is_causal", True) is False or rest.pop("is_causal", True) is False:
        raise _unsupported("is_causal", False)
    for name in ("sinks", "s_aux"):
        if getattr(module, name, None) is not None:
            raise _unsupported(name, "set on the layer")
    for name, value in rest.items():
        if value is not None and name not in _IGNORED and not (name in _OFF and value is False):
            raise _unsupported(name, value)
    if k_1KTD.shape[-1] != v_1KTD.shape[-1] or q_1HTD.shape[0] != 1:
        raise _unsupported("shapes of keys and values", (tuple(k_1KTD.shape), tuple(v_1KTD.shape)))
    out_THD = torch.ops.berth.attend(
        q_1HTD[0].transpose(0, 1),
        k_1KTD[0].transpose(0, 1),
        v_1KTD[0].transpose(0, 1),
        module.layer_idx,
        q_1HTD.shape[-1] ** -0.5 if scaling is None else scaling,
        sliding_window,
        softcap,
    )
    return out_THD.unsqueeze(0), None


def _unsupported(argument: str, got: object) -> UnsupportedModel:
    return UnsupportedModel(
        "the paged engine does not do this attention argument",
        field=argument,
        got=got if isinstance(got, int | float | str | tuple) else type(got).__name__,
        wants="engine: reference",
    )


def attend(
    plan: Plan,
    q_THD: Tensor,
    k_TKD: Tensor,
    v_TKD: Tensor,
    layer: int,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    """Write a step's keys and values into their pages, then attend causally from its queries. Returns [T, H, D]."""
    if plan.kernel == "triton":
        return _triton(plan, q_THD, k_TKD, v_TKD, layer, scale, window, softcap)
    plan.kv.write(layer, plan.slots_T, k_TKD, v_TKD)
    k_PSKD, v_PSKD = plan.kv.read(layer, plan.pages_N)
    return KERNELS[plan.kernel](plan, q_THD, k_PSKD, v_PSKD, scale, window, softcap)


def _attend(
    q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor, layer: int, scale: float, window: int | None, softcap: float | None
) -> Tensor:
    plan = _current.plan
    if plan is None:
        raise RuntimeError("paged attention was called outside a runner's step")
    if not isinstance(plan, Plan):
        return plan(q_THD, k_TKD, v_TKD, layer, scale, window, softcap)
    return attend(plan, q_THD, k_TKD, v_TKD, layer, scale, window, softcap)


def _attend_fake(
    q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor, layer: int, scale: float, window: int | None, softcap: float | None
) -> Tensor:
    return q_THD.new_empty(q_THD.shape)


def _attend_qkv(
    qkv_TW: Tensor,
    width: int,
    cos_TD: Tensor,
    sin_TD: Tensor,
    q_norm_D: Tensor | None,
    k_norm_D: Tensor | None,
    eps: float,
    layer: int,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    plan = _current.plan
    if not isinstance(plan, Plan) or plan.kernel != "triton":
        raise RuntimeError("fused attention was called outside a step of the Triton kernels")
    cache, scales = _pages(plan, layer)
    q_THD = _triton_kernels().enter(qkv_TW, cos_TD, sin_TD, q_norm_D, k_norm_D, eps, *cache, plan.slots_T, *scales)
    return _triton_written(plan, q_THD, layer, scale, window, softcap).view(-1, width)


def _attend_qkv_fake(qkv_TW: Tensor, width: int, *_: Any) -> Tensor:
    return qkv_TW.new_empty(qkv_TW.shape[0], width)


def _flash(
    plan: Plan, q_THD: Tensor, k_PSKD: Tensor, v_PSKD: Tensor, scale: float, window: int | None, softcap: float | None
) -> Tensor:
    varlen, with_kvcache = _flash_attn()
    options: dict[str, Any] = {
        "softmax_scale": scale,
        "causal": True,
        # FlashAttention counts the tokens to the left, transformers the window with the token itself.
        "window_size": (-1, -1) if window is None else (window - 1, 0),
        "softcap": softcap or 0.0,
        "block_table": plan.table_RP,
    }
    if plan.decode:
        return with_kvcache(q_THD.unsqueeze(1), k_PSKD, v_PSKD, cache_seqlens=plan.lens_R, **options).squeeze(1)
    return varlen(q_THD, k_PSKD, v_PSKD, plan.cu_q_R1, plan.cu_k_R1, plan.max_q, plan.max_k, **options)


def queries_a_tile(heads: int, kv_heads: int, dim: int, tokens: int, rows: int) -> int:
    """Query tokens of one of `Units`' tiles in a step of so many tokens and rows."""
    from actors.engine.kernels.prefill import queries_a_tile  # torch does not bring Triton everywhere

    return queries_a_tile(heads, kv_heads, dim, tokens, rows)


def _triton(
    plan: Plan,
    q_THD: Tensor,
    k_TKD: Tensor,
    v_TKD: Tensor,
    layer: int,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    q_THD, k_TKD, v_TKD = (x if x.stride(-1) == 1 else x.contiguous() for x in (q_THD, k_TKD, v_TKD))
    cache, scales = _pages(plan, layer)
    _triton_kernels().write(k_TKD, v_TKD, *cache, plan.slots_T, *scales)
    return _triton_written(plan, q_THD, layer, scale, window, softcap)


def _pages(plan: Plan, layer: int) -> tuple[tuple[Tensor, Tensor], tuple[Tensor | None, Tensor | None]]:
    """Keys and values of a layer as they are kept, and their scales."""
    kv = plan.kv
    return (kv.k[layer], kv.v[layer]), (kv.k_scale[layer], kv.v_scale[layer])


def _triton_written(
    plan: Plan, q_THD: Tensor, layer: int, scale: float, window: int | None, softcap: float | None
) -> Tensor:
    """Attention over pages that hold the step's own keys and values."""
    units = plan.units
    if units is None:
        raise RuntimeError("a step for the Triton kernels was not cut into units")
    cache, scales = _pages(plan, layer)
    kernels = _triton_kernels()
    rows = (plan.lens_R, plan.table_RP, units.row_I, units.first_R1)
    if plan.decode:
        return kernels.decode(q_THD, *cache, *rows, units.pages_1, units.runs, scale, window, softcap, *scales)
    return kernels.prefill(q_THD, *cache, plan.cu_q_R1, *rows, units.queries, scale, window, softcap, *scales)


def _torch_varlen(
    plan: Plan, q_THD: Tensor, k_PSKD: Tensor, v_PSKD: Tensor, scale: float, window: int | None, softcap: float | None
) -> Tensor:
    if softcap is not None:
        raise _unsupported("softcap", softcap)
    return _varlen_attn()(
        q_THD,
        k_PSKD,
        v_PSKD,
        plan.cu_q_R1,
        plan.cu_k_R1,
        plan.max_q,
        plan.max_k,
        scale=scale,
        window_size=(-1, 0) if window is None else (window - 1, 0),
        enable_gqa=q_THD.shape[1] != k_PSKD.shape[2],
        seqused_k=plan.lens_R,
        block_table=plan.table_RP,
    )


def _sdpa(
    plan: Plan, q_THD: Tensor, k_PSKD: Tensor, v_PSKD: Tensor, scale: float, window: int | None, softcap: float | None
) -> Tensor:
    if softcap is not None:
        raise _unsupported("softcap", softcap)
    heads, head_dim = q_THD.shape[1:]
    page_tokens, kv_heads = k_PSKD.shape[1:3]
    if plan.decode:
        pages = -(-plan.max_k // page_tokens)
        table = plan.table_RP[:, :pages].flatten()
        k_RKLD, v_RKLD = (  # index_select: on a CPU 5 to 20 times as fast as indexing
            x.index_select(0, table).view(len(q_THD), -1, kv_heads, head_dim).transpose(1, 2) for x in (k_PSKD, v_PSKD)
        )
        position_L = torch.arange(pages * page_tokens, device=q_THD.device)
        seen_RL = position_L < plan.lens_R[:, None]
        if window is not None:
            seen_RL &= position_L >= plan.lens_R[:, None] - window
        # The heads that share keys stand as queries of one head.
        q_RKGD = q_THD.view(len(q_THD), kv_heads, -1, head_dim)
        seen = seen_RL[:, None, None, :].expand(-1, 1, q_RKGD.shape[2], -1)
        return scaled_dot_product_attention(q_RKGD, k_RKLD, v_RKLD, attn_mask=seen, scale=scale).flatten(1, 2)
    out_THD = torch.zeros(q_THD.shape, dtype=q_THD.dtype, device=q_THD.device)
    for row in plan.rows:
        end = row.start + row.tokens
        first = 0 if window is None else max(0, row.start - window + 1) // page_tokens
        pages_P = torch.tensor(row.pages[first : -(-end // page_tokens)], device=q_THD.device)
        k_1KLD, v_1KLD = (
            x.index_select(0, pages_P).flatten(0, 1)[: end - first * page_tokens].transpose(0, 1).unsqueeze(0)
            for x in (k_PSKD, v_PSKD)
        )
        position_Q1 = torch.arange(row.start, end, device=q_THD.device)[:, None]
        position_L = torch.arange(first * page_tokens, end, device=q_THD.device)
        seen_QL = position_L <= position_Q1
        if window is not None:
            seen_QL &= position_L > position_Q1 - window
        q_1HQD = q_THD[row.at : row.at + row.tokens].transpose(0, 1).unsqueeze(0)
        out_1HQD = scaled_dot_product_attention(
            q_1HQD, k_1KLD, v_1KLD, attn_mask=seen_QL, scale=scale, enable_gqa=heads != kv_heads
        )
        out_THD[row.at : row.at + row.tokens] = out_1HQD[0].transpose(0, 1)
    return out_THD


def _reference(
    plan: Plan, q_THD: Tensor, k_PSKD: Tensor, v_PSKD: Tensor, scale: float, window: int | None, softcap: float | None
) -> Tensor:
    heads, head_dim = q_THD.shape[1:]
    page_tokens, kv_heads = k_PSKD.shape[1:3]
    group = math.gcd(_GROUP, page_tokens)
    out_THD = torch.zeros(q_THD.shape, dtype=q_THD.dtype, device=q_THD.device)
    for row in plan.rows:
        end = row.start + row.tokens
        for page in range(row.start // page_tokens, -(-end // page_tokens)):
            # The keys that any query in this page of positions may see, in whole pages.
            page_start = page * page_tokens
            first = 0 if window is None else max(0, page_start - window + 1) // page_tokens
            pages = torch.tensor(row.pages[first : page + 1], device=q_THD.device)
            k_KLD = k_PSKD[pages].flatten(0, 1).transpose(0, 1).float().contiguous()
            v_KLD = v_PSKD[pages].flatten(0, 1).transpose(0, 1).float().contiguous()
            # What an earlier owner left behind may be infinite, and 0 · inf is not 0.
            v_KLD[:, max(end - first * page_tokens, 0) :] = 0
            position_L = torch.arange(first * page_tokens, page_start + page_tokens, device=q_THD.device)
            low, high = max(row.start, page_start), min(end, page_start + page_tokens)
            for at in range(low // group * group, high, group):
                a, b = max(at, low), min(at + group, high)
                here = slice(row.at + a - row.start, row.at + b - row.start)
                q_QHD = torch.zeros((group, heads, head_dim), dtype=torch.float32, device=q_THD.device)
                q_QHD[a - at : b - at] = q_THD[here].float()
                q_KGQD = q_QHD.view(group, kv_heads, -1, head_dim).permute(1, 2, 0, 3)
                score_KML = torch.matmul(q_KGQD.reshape(kv_heads, -1, head_dim), k_KLD.transpose(1, 2)) * scale
                if softcap is not None:
                    score_KML = torch.tanh(score_KML / softcap) * softcap
                position_Q1 = torch.arange(at, at + group, device=q_THD.device)[:, None]
                seen_QL = position_L <= position_Q1
                if window is not None:
                    seen_QL &= position_L > position_Q1 - window
                score_KGQL = score_KML.view(kv_heads, -1, group, len(position_L))
                p_KGQL = score_KGQL.masked_fill(~seen_QL, float("-inf")).softmax(-1)
                out_KMD = torch.matmul(p_KGQL.view(score_KML.shape), v_KLD)
                out_QHD = out_KMD.view(kv_heads, -1, group, head_dim).permute(2, 0, 1, 3).flatten(1, 2)
                out_THD[here] = out_QHD[a - at : b - at].to(q_THD.dtype)
    return out_THD


@cache
def _flash_attn() -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
    module = cast(Any, importlib.import_module("flash_attn"))
    return module.flash_attn_varlen_func, module.flash_attn_with_kvcache


@cache
def _triton_kernels() -> _TritonKernels:
    from actors.engine.kernels import decode, prefill, qkv, write  # torch does not bring Triton everywhere

    return _TritonKernels(write.write, qkv.enter, prefill.attend, decode.attend)


@cache
def _varlen_attn() -> Callable[..., Tensor]:
    return cast(Any, importlib.import_module("torch.nn.attention.varlen")).varlen_attn


def _has_paged_varlen() -> bool:
    try:
        return "block_table" in inspect.signature(_varlen_attn()).parameters
    except ImportError:
        return False


KERNELS: dict[Kernel, Callable[..., Tensor]] = {
    "flash_attn": _flash,
    "torch_varlen": _torch_varlen,
    "sdpa": _sdpa,
    "reference": _reference,
}

# The pages are not among the arguments: each layer reads and writes its own within one call, so nothing can be
# reordered across it, and a compiler need not prove that it may update gigabytes in place.
torch.library.custom_op(
    "berth::attend",
    _attend,
    mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor v, SymInt layer, float scale, int? window, float? softcap) -> Tensor",
)
torch.library.register_fake("berth::attend", _attend_fake)
torch.library.custom_op(
    "berth::attend_qkv",
    _attend_qkv,
    mutates_args=(),
    schema="(Tensor qkv, SymInt width, Tensor cos, Tensor sin, Tensor? q_norm, Tensor? k_norm, float eps, "
    "SymInt layer, float scale, int? window, float? softcap) -> Tensor",
)
torch.library.register_fake("berth::attend_qkv", _attend_qkv_fake)
AttentionInterface.register(NAME, _attention)

"""Attention layers with one product for queries, keys and values, and one kernel from there to the pages.

A layer's own forward is asked first what it computes: a few random tokens pass through it, and what it hands to
attention (queries, keys, values, scale, window, soft cap) is kept. The layer is replaced only where the fused one gives
the same. So nothing here knows a family of models, and one with another kind of norm or of rotary embedding stays as
it is.

Knows nothing of steps, scheduling or requests. Shapes as in `actors.engine.kernels.qkv`.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from actors.engine.attention import attending
from actors.engine.kv import KVCache
from actors.engine.oom import is_out_of_memory
from actors.errors import UnsupportedModel

MAX_ERROR = 0.03
"""‖fused − own‖ / ‖own‖ of queries, keys and values; bf16 and fp16 stay below 0.01."""
_TOKENS = 5
_APART = 97  # so that many frequencies have turned
_SHARED_BLOCK = 10 << 20

log = logging.getLogger(__name__)


@dataclass(slots=True)
class _Seen:
    """A layer's attention module, what came in, and what it handed to attention."""

    own: Any
    hidden_TE: Tensor
    cos_TD: Tensor
    sin_TD: Tensor
    q_THD: Tensor
    k_TKD: Tensor
    v_TKD: Tensor
    scale: float
    window: int | None
    softcap: float | None


class FusedAttention(nn.Module):
    """Stands for a transformers attention module in its decoder layer, whose projections it joins.

    Args:
        seen: of that module; its output projection is kept.

    Raises:
        UnsupportedModel: see `parts`.
    """

    def __init__(self, seen: _Seen):
        super().__init__()
        layers, norms = parts(seen.own)
        biases: list[Tensor] = [layer.bias for layer in layers if _biased(layer)]
        self.weight = nn.Parameter(torch.cat([layer.weight for layer in layers]), requires_grad=False)
        self.bias = nn.Parameter(torch.cat(biases), requires_grad=False) if biases else None
        self.o_proj = seen.own.o_proj
        self.layer_idx: int = seen.own.layer_idx
        self.q_norm, self.k_norm, self.eps = norms
        self.width = seen.q_THD[0].numel()
        self.scale, self.window, self.softcap = seen.scale, seen.window, seen.softcap

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        **_: Any,
    ) -> tuple[Tensor, None]:
        """[1, T, E] → [1, T, E], as the module that it stands for.

        Raises:
            UnsupportedModel: a mask.
        """
        if attention_mask is not None:
            raise UnsupportedModel("the paged engine does not do this attention argument", field="attention_mask")
        cos, sin = position_embeddings
        out_TW = torch.ops.berth.attend_qkv(
            nn.functional.linear(hidden_states[0], self.weight, self.bias),
            self.width,
            cos[0],
            sin[0],
            self.q_norm,
            self.k_norm,
            self.eps,
            self.layer_idx,
            self.scale,
            self.window,
            self.softcap,
        )
        return self.o_proj(out_TW).unsqueeze(0), None


def parts(own: Any) -> tuple[list[nn.Linear], tuple[Tensor | None, Tensor | None, float]]:
    """The projections of queries, keys and values; and what normalised queries and keys are multiplied by, fp32 [D],
    None where they are not normalised, and the norms' epsilon.

    Raises:
        UnsupportedModel: they are no plain linear layers, or there is one norm only.
    """
    layers = [getattr(own, name, None) for name in ("q_proj", "k_proj", "v_proj")]
    plain = [layer for layer in layers if type(layer) is nn.Linear]
    norms = [norm for name in ("q_norm", "k_norm") if (norm := getattr(own, name, None)) is not None]
    if len(plain) < len(layers) or len({_biased(layer) for layer in plain}) > 1 or len(norms) == 1:
        raise UnsupportedModel("queries, keys and values are no plain projections", got=type(own).__name__)
    if not norms:
        return plain, (None, None, 0.0)
    eps = [getattr(norm, "variance_epsilon", None) or norm.eps for norm in norms]
    if eps[0] != eps[1]:
        raise UnsupportedModel("norms of queries and keys with two epsilons", got=str(eps))
    # Of ones the mean square is 1. Some families multiply by the weight, others by one more.
    ones = torch.ones_like(norms[0].weight, dtype=torch.float32)
    q_norm, k_norm = ((norm(ones) * math.sqrt(1 + eps[0])).float() for norm in norms)
    return plain, (q_norm, k_norm, eps[0])


def _biased(layer: Any) -> bool:
    return layer.bias is not None  # which torch's types rule out


@torch.no_grad()
def fuse(model: Any, kv: KVCache) -> bool:
    """Replace the attention modules of a model's decoder layers by fused ones, if these give the same in all of them.

    Args:
        model: with our attention set, before its layers are compiled.
        kv: of the model's shapes; its own pages are not touched.

    Returns:
        whether it is done, now or by an engine before this one; if not, why not is logged.
    """
    if all(isinstance(layer.self_attn, FusedAttention) for layer in model.base_model.layers):
        return True
    try:
        every = _watch(model, kv)
        kv_dtype = kv.kv_dtype if kv.quantised else "auto"
        own, fused = (KVCache(kv.shapes, 1, kv.page_tokens, kv.dtype, kv.device, kv_dtype) for _ in range(2))
        for i in range(len(every)):  # no name for what is let go of below
            _compare(every[i], own, fused)
        del own, fused
    except Exception as e:  # a compiler that is missing or fails does so in many ways
        if is_out_of_memory(e):
            raise
        log.warning("queries, keys and values are not fused: %s: %s", type(e).__name__, e)
        return False
    for layer in model.base_model.layers:
        layer.self_attn = FusedAttention(every.pop(0))  # whose projections nobody holds any longer
    if kv.device.type == "cuda":
        _pack(model, kv.device)
    return True


def _pack(model: Any, device: torch.device) -> None:
    """Give back what the joined projections held. Tensors below 10 MiB share blocks of 20 (torch's caching allocator),
    which stay as long as one of them does, so those that are left are let go of for a moment.

    Raises:
        torch.OutOfMemoryError: another process has taken that memory meanwhile; the model is of no more use.
    """
    small = [parameter for parameter in model.parameters() if parameter.nbytes < _SHARED_BLOCK]
    for parameter in small:
        parameter.data = parameter.data.cpu()
    torch.cuda.empty_cache()
    for parameter in small:
        parameter.data = parameter.data.to(device)


def _watch(model: Any, kv: KVCache) -> list[_Seen]:
    """What each layer's attention module gets and hands on, for a few tokens far from each other."""
    came: dict[int, tuple[Any, Tensor, Tensor, Tensor]] = {}
    every: list[_Seen] = []

    def enters(own: Any, args: Any, kwargs: Any) -> None:
        cos, sin = kwargs["position_embeddings"]
        came[own.layer_idx] = (own, kwargs["hidden_states"][0], cos[0], sin[0])

    def attends(q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor, layer: int, *rest: Any) -> Tensor:
        every.append(_Seen(*came[layer], q_THD.clone(), k_TKD.clone(), v_TKD.clone(), *rest))
        return torch.zeros_like(q_THD)  # the next layer only wants some input

    hooks = [layer.self_attn.register_forward_pre_hook(enters, with_kwargs=True) for layer in model.base_model.layers]
    ids = torch.arange(1, 1 + _TOKENS, device=kv.device)[None]
    try:
        with attending(attends):
            model.base_model(input_ids=ids, position_ids=ids * _APART, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return every


def _compare(seen: _Seen, own: KVCache, fused: KVCache) -> None:
    """Raise UnsupportedModel where the kernel makes something else of the layer's projections than the layer did."""
    from actors.engine.kernels.qkv import enter  # torch does not bring Triton everywhere

    layers, norms = parts(seen.own)
    slots_T, pages_1 = torch.arange(_TOKENS, device=own.device), torch.tensor([0], device=own.device)
    layer: int = seen.own.layer_idx
    own.write(layer, slots_T, seen.k_TKD, seen.v_TKD)
    qkv_TW = torch.cat([each(seen.hidden_TE) for each in layers], -1)
    scales = fused.k_scale[layer], fused.v_scale[layer]
    q_THD = enter(qkv_TW, seen.cos_TD, seen.sin_TD, *norms, fused.k[layer], fused.v[layer], slots_T, *scales)
    wanted, got = ([x[0, :_TOKENS] for x in cache.read(layer, pages_1)] for cache in (own, fused))
    wanted, got = [seen.q_THD, *wanted], [q_THD, *got]
    for name, a, b in zip(("queries", "keys", "values"), got, wanted, strict=True):
        error = float((a.float() - b.float()).norm() / b.float().norm())
        if not error < MAX_ERROR:
            raise UnsupportedModel(
                f"the fused kernel makes other {name} than the layer (error {error:.2g})", got=type(seen.own).__name__
            )

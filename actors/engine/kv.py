"""The tensors that hold keys and values, in pages.

Page 0 is scratch by convention: rows that only pad a batch write there, and no allocator hands it out. Knows nothing
of who owns a page, of attention, or of models beyond the shapes in their config.

Keys and values may be kept in 8 bits: int8, or float8 e4m3 (Micikevicius et al. 2022), symmetric, with one float32
scale for each token and KV head. Unlike in caches that quantise keys by channel (KIVI, Liu et al. 2024), a token's
numbers then depend on that token alone: neither neighbours nor the way a prompt was cut change a bit, and nothing stays
in full precision until a group is full.

Shapes: P pages, S tokens a page, K KV heads, D head dimension, T tokens, N pages of a step.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

SCRATCH_PAGE = 0
QUANTISED = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}
"""Stored dtypes by their name in `memory.kv_dtype`."""
SCALE_DTYPE = torch.float32
_LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}
_LEAST_SCALE = 1e-20  # of a head of zeros


def kv_shapes(config: Any, tensor_parallel_size: int = 1) -> tuple[tuple[int, int], ...]:
    """(KV heads, head dimension) of each layer of a supported HF config, on one of `tensor_parallel_size` ranks."""
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    if kv_heads % tensor_parallel_size:
        raise ValueError(f"{kv_heads} KV heads cannot be split over {tensor_parallel_size} ranks")
    return ((kv_heads // tensor_parallel_size, head_dim),) * config.num_hidden_layers


def kv_bytes_token(shapes: Sequence[tuple[int, int]], stored: torch.dtype) -> int:
    """Bytes that one token's keys and values take over all layers, their scales included where `stored` has some."""
    scale = SCALE_DTYPE.itemsize if stored in _LARGEST else 0
    return sum(2 * heads * (head_dim * stored.itemsize + scale) for heads, head_dim in shapes)


def kv_sizes(shapes: Sequence[tuple[int, int]], stored: torch.dtype, tokens: int) -> list[int]:
    """Bytes of each tensor of a cache of `tokens` tokens, in the order in which they are made."""
    scale = SCALE_DTYPE.itemsize if stored in _LARGEST else 0
    each = ((tokens * heads * head_dim * stored.itemsize, tokens * heads * scale) for heads, head_dim in shapes)
    return [size for pair in each for size in 2 * pair if size]


def read_bytes_token(shapes: Sequence[tuple[int, int]], dtype: torch.dtype, stored: torch.dtype) -> int:
    """Bytes that `KVCache.read` of one token takes beside the cache, for the largest layer; 0 if nothing is quantised:
    both copies in `dtype`, and the 8 bits and scales that the second is made of."""
    if stored not in _LARGEST:
        return 0
    return max(
        heads * (head_dim * (2 * dtype.itemsize + stored.itemsize) + SCALE_DTYPE.itemsize) for heads, head_dim in shapes
    )


def quantise(x_TKD: Tensor, stored: torch.dtype) -> tuple[Tensor, Tensor]:
    """Keys or values in 8 bits: [..., K, D] in `stored`, and scales [..., K]. Each token and head by itself."""
    x_TKD = x_TKD.float()
    scale_TK = (x_TKD.abs().amax(-1) / _LARGEST[stored]).clamp_min(_LEAST_SCALE)
    x_TKD = x_TKD / scale_TK.unsqueeze(-1)
    return (x_TKD.round_() if stored == torch.int8 else x_TKD).to(stored), scale_TK


def dequantise(q_TKD: Tensor, scale_TK: Tensor, dtype: torch.dtype) -> Tensor:
    """What `quantise` made, in `dtype`, rounded once: bf16, fp16 and fp32 hold every 8-bit number exactly."""
    return q_TKD.to(dtype).mul_(scale_TK.unsqueeze(-1))


class KVCache:
    """Keys and values of all layers: `k[layer]` and `v[layer]` are [P, S, K, D], zeroed at first.

    Where they are quantised, `k_scale[layer]` and `v_scale[layer]` are float32 [P, S, K], else None.

    Args:
        shapes: (K, D) by layer; layers may differ.
        pages: P, the scratch page included.
        page_tokens: S; FlashAttention wants a multiple of 256.
        dtype: of keys and values as attention has them.
        device: where they live.
        kv_dtype: `auto` keeps them in `dtype`; int8 or fp8.

    Raises:
        torch.OutOfMemoryError: they do not fit; nothing stays allocated.
    """

    def __init__(
        self,
        shapes: Sequence[tuple[int, int]],
        pages: int,
        page_tokens: int,
        dtype: torch.dtype,
        device: torch.device | str,
        kv_dtype: str = "auto",
    ):
        self.shapes = tuple(shapes)
        self.page_tokens = page_tokens
        self.dtype = dtype
        self.stored = dtype if kv_dtype == "auto" else QUANTISED[kv_dtype]
        self.kv_dtype = str(dtype).removeprefix("torch.") if kv_dtype == "auto" else kv_dtype
        self.device = torch.device(device)
        self.pages = 0
        self.k: list[Tensor] = []
        self.v: list[Tensor] = []
        self.k_scale: list[Tensor | None] = []
        self.v_scale: list[Tensor | None] = []
        self.resize(pages)

    @property
    def quantised(self) -> bool:
        """Kept in 8 bits with scales."""
        return self.stored in _LARGEST

    @property
    def bytes_token(self) -> int:
        """KV bytes of one token over all layers, scales included."""
        return kv_bytes_token(self.shapes, self.stored)

    @property
    def bytes_page(self) -> int:
        """KV bytes of one page over all layers."""
        return self.bytes_token * self.page_tokens

    @property
    def read_bytes_page(self) -> int:
        """What a step takes beside the cache for each page that it reads, 0 if nothing is quantised."""
        return read_bytes_token(self.shapes, self.dtype, self.stored) * self.page_tokens

    def resize(self, pages: int) -> None:
        """Free everything, then allocate `pages` zeroed pages; all content is lost.

        Raises:
            torch.OutOfMemoryError: they do not fit; the cache then holds 0 pages and can be resized again.
        """
        if pages < 1:
            raise ValueError(f"a KV cache needs its scratch page, got {pages} pages")
        self._clear()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        try:
            for heads, head_dim in self.shapes:
                shape = (pages, self.page_tokens, heads)
                for cache, scales in ((self.k, self.k_scale), (self.v, self.v_scale)):
                    cache.append(torch.zeros((*shape, head_dim), dtype=self.stored, device=self.device))
                    scale = torch.zeros(shape, dtype=SCALE_DTYPE, device=self.device) if self.quantised else None
                    scales.append(scale)
        except Exception:  # of which an allocation knows several
            self._clear()
            raise
        self.pages = pages

    def _clear(self) -> None:
        for tensors in (self.k, self.v, self.k_scale, self.v_scale):
            tensors.clear()
        self.pages = 0

    def write(self, layer: int, slots_T: Tensor, k_TKD: Tensor, v_TKD: Tensor) -> None:
        """Put keys and values of a step into their slots (page · S + offset)."""
        caches = (self.k[layer], self.k_scale[layer], k_TKD), (self.v[layer], self.v_scale[layer], v_TKD)
        for cache, scale_PSK, x_TKD in caches:
            if scale_PSK is not None:
                x_TKD, scale_TK = quantise(x_TKD, self.stored)
                scale_PSK.flatten(0, 1).index_copy_(0, slots_T, scale_TK)
            _plain(cache).flatten(0, 1).index_copy_(0, slots_T, _plain(x_TKD))

    def read(self, layer: int, pages_N: Tensor | None) -> tuple[Tensor, Tensor]:
        """Keys and values of a layer in `dtype`: the cache itself, or, where they are quantised, these pages of it."""
        k_scale, v_scale = self.k_scale[layer], self.v_scale[layer]
        if k_scale is None or v_scale is None:
            return self.k[layer], self.v[layer]
        if pages_N is None:
            raise ValueError("quantised keys and values are read by pages")
        k_NSKD, v_NSKD = (
            dequantise(_picked(cache, pages_N), _picked(scale_PSK, pages_N), self.dtype)
            for cache, scale_PSK in ((self.k[layer], k_scale), (self.v[layer], v_scale))
        )
        return k_NSKD, v_NSKD

    def copy_pages(self, copies: Sequence[tuple[int, int]]) -> None:
        """Copy pages (from, to) in every layer as if one after the other, with two operations a tensor for all of them.

        None may write a page that one before it reads.
        """
        source: dict[int, int] = {}  # of what is copied on
        for src, dst in copies:
            source[dst] = source.get(src, src)
        from_N, to_N = indices([*source.values(), *source], self.device).reshape(2, -1)
        for cache in (*self.k, *self.v, *self.k_scale, *self.v_scale):
            if cache is not None:
                _plain(cache).index_copy_(0, to_N, _plain(cache).index_select(0, from_N))


def _plain(x: Tensor) -> Tensor:
    """The same bits as integers where torch has no indexing of the dtype."""
    return x.view(torch.uint8) if x.dtype == torch.float8_e4m3fn else x


def _picked(cache: Tensor, pages_N: Tensor) -> Tensor:
    return _plain(cache).index_select(0, pages_N).view(cache.dtype)


def indices(values: Sequence[int], device: torch.device) -> Tensor:
    """An int64 tensor on its way to the device: a step that is under way there is not waited for."""
    host = torch.tensor(values, dtype=torch.int64, pin_memory=device.type == "cuda")
    return host.to(device, non_blocking=True)

"""The tensors that hold keys and values, in pages.

Page 0 is scratch by convention: rows that only pad a batch write there, and no allocator hands it out. Knows nothing
of who owns a page, of attention, or of models beyond the shapes in their config.

Shapes: P pages, S tokens a page, K KV heads, D head dimension.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

SCRATCH_PAGE = 0


def kv_shapes(config: Any, tensor_parallel_size: int = 1) -> tuple[tuple[int, int], ...]:
    """(KV heads, head dimension) of each layer of a supported HF config, on one of `tensor_parallel_size` ranks."""
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    if kv_heads % tensor_parallel_size:
        raise ValueError(f"{kv_heads} KV heads cannot be split over {tensor_parallel_size} ranks")
    return ((kv_heads // tensor_parallel_size, head_dim),) * config.num_hidden_layers


def kv_bytes_token(shapes: Sequence[tuple[int, int]], dtype: torch.dtype) -> int:
    """Bytes that one token's keys and values take over all layers."""
    return sum(2 * heads * head_dim * dtype.itemsize for heads, head_dim in shapes)


class KVCache:
    """Keys and values of all layers: `k[layer]` and `v[layer]` are [P, S, K, D], zeroed at first.

    Args:
        shapes: (K, D) by layer; layers may differ.
        pages: P, the scratch page included.
        page_tokens: S; FlashAttention wants a multiple of 256.
        dtype: of keys and values.
        device: where they live.

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
    ):
        self.shapes = tuple(shapes)
        self.page_tokens = page_tokens
        self.dtype = dtype
        self.device = torch.device(device)
        self.pages = 0
        self.k: list[Tensor] = []
        self.v: list[Tensor] = []
        self.resize(pages)

    @property
    def bytes_token(self) -> int:
        """KV bytes of one token over all layers."""
        return kv_bytes_token(self.shapes, self.dtype)

    @property
    def bytes_page(self) -> int:
        """KV bytes of one page over all layers."""
        return self.bytes_token * self.page_tokens

    def resize(self, pages: int) -> None:
        """Free everything, then allocate `pages` zeroed pages; all content is lost.

        Raises:
            torch.OutOfMemoryError: they do not fit; the cache then holds 0 pages and can be resized again.
        """
        if pages < 1:
            raise ValueError(f"a KV cache needs its scratch page, got {pages} pages")
        self.k.clear()
        self.v.clear()
        self.pages = 0
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        try:
            for heads, head_dim in self.shapes:
                shape = (pages, self.page_tokens, heads, head_dim)
                self.k.append(torch.zeros(shape, dtype=self.dtype, device=self.device))
                self.v.append(torch.zeros(shape, dtype=self.dtype, device=self.device))
        except torch.OutOfMemoryError:
            self.k.clear()
            self.v.clear()
            raise
        self.pages = pages

    def copy_pages(self, copies: Sequence[tuple[int, int]]) -> None:
        """Copy pages (from, to) in every layer as if one after the other, with two operations a tensor for all of them.

        None may write a page that one before it reads.
        """
        source: dict[int, int] = {}  # of what is copied on
        for src, dst in copies:
            source[dst] = source.get(src, src)
        from_N, to_N = indices([*source.values(), *source], self.device).reshape(2, -1)
        for cache in (*self.k, *self.v):
            cache.index_copy_(0, to_N, cache.index_select(0, from_N))


def indices(values: Sequence[int], device: torch.device) -> Tensor:
    """An int64 tensor on its way to the device: a step that is under way there is not waited for."""
    host = torch.tensor(values, dtype=torch.int64, pin_memory=device.type == "cuda")
    return host.to(device, non_blocking=True)

"""Linear layers that read the same input, computed as one matrix product: queries, keys and values, and the two inputs
of a gated MLP. One large product fills a GPU better than several, most of all the small ones of grouped-query keys.

Knows nothing of attention, pages or requests.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

SETS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Names of a module's layers with one input, in the order in which its forward calls them."""


class _Whole(nn.Module):
    """The joined layer, and what it gave for the input under way."""

    def __init__(self, layers: Sequence[nn.Linear]):
        super().__init__()
        self.weight = nn.Parameter(torch.cat([layer.weight for layer in layers]), requires_grad=False)
        self.bias = (
            nn.Parameter(torch.cat([layer.bias for layer in layers]), requires_grad=False)
            if _biased(layers[0])
            else None
        )
        self.out: Tensor | None = None


class _Part(nn.Module):
    """Stands for one of the layers: the first computes for all, the last lets go of it."""

    def __init__(self, whole: _Whole, start: int, size: int):
        super().__init__()
        self.whole, self.start, self.size = whole, start, size
        self.last = start + size == whole.weight.shape[0]

    def forward(self, x: Tensor) -> Tensor:
        """[…, inputs] → […, outputs of this layer], a view."""
        whole = self.whole
        out = nn.functional.linear(x, whole.weight, whole.bias) if self.start == 0 else whole.out
        assert out is not None, "called out of order"
        whole.out = None if self.last else out
        return out.narrow(-1, self.start, self.size)


def _biased(layer: nn.Linear) -> bool:
    return "bias" in dict(layer.named_parameters())


@torch.no_grad()
def join(model: Any) -> int:
    """Join the plain linear layers of SETS wherever a module has a whole set; the number of sets joined."""
    joined = 0
    for module in list(model.modules()):
        for names in SETS:
            found = [getattr(module, name, None) for name in names]
            layers = [layer for layer in found if isinstance(layer, nn.Linear) and type(layer) is nn.Linear]
            if len(layers) < len(names) or len({(layer.weight.dtype, _biased(layer)) for layer in layers}) > 1:
                continue
            whole, start = _Whole(layers), 0
            for name, layer in zip(names, layers, strict=True):
                setattr(module, name, _Part(whole, start, layer.out_features))
                start += layer.out_features
            joined += 1
    return joined

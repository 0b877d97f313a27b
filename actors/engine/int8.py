"""Weights in int8: each output channel of a decoder's linear layer has one scale, symmetric, without zero point; what
flows through the layers keeps its dtype (weight-only). After LLM.int8() (Dettmers et al. 2022, §2), whose row-wise
scales these are; it also multiplies in int8 and keeps outlier columns apart, which is not done here. Embeddings, head,
norms, biases and stacked experts stay as they are: `memory` counts the same layers.

Knows nothing of loading, of ranks or of KV.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from actors.errors import UnsupportedModel

_LARGEST = 127


class Int8Linear(nn.Linear):
    """`whole` with weights in int8 [out, in] and a scale a row [out] in its dtype, on `device`.

    The scale is rounded to that dtype before it is used, so that its rounding costs nothing. Every int8 is exact in
    bf16, fp16 and fp32: in bf16 and fp32 a product differs from that with the dequantised weights by the rounding of
    its result alone. In fp16 such a sum, larger by the scale, could leave the range, so weights are scaled and rounded.
    """

    bias: nn.Parameter | None  # pyright: ignore[reportIncompatibleVariableOverride]

    def __init__(self, whole: nn.Linear, device: torch.device | str):
        super().__init__(whole.in_features, whole.out_features, bias=False, device="meta")
        weight = whole.weight.detach().to(device)
        scale_O = (weight.float().abs().amax(1) / _LARGEST).to(weight.dtype)
        scale_O[scale_O == 0] = 1  # of a row of zeros, or of numbers too small for the dtype
        rounded = (weight.float() / scale_O.float()[:, None]).round_().clamp_(-_LARGEST, _LARGEST)
        self.weight = nn.Parameter(rounded.to(torch.int8), requires_grad=False)
        self.scale = nn.Parameter(scale_O, requires_grad=False)
        bias: Any = whole.bias
        if bias is not None:
            self.bias = nn.Parameter(bias.detach().to(device), requires_grad=False)

    def forward(self, input: Tensor) -> Tensor:
        """[..., in] → [..., out]."""
        weight = self.weight.to(input.dtype)
        if input.dtype == torch.float16:
            output = linear(input, weight * self.scale[:, None])
        else:
            output = linear(input, weight) * self.scale
        return output if self.bias is None else output + self.bias


def linear_layers(model: Any) -> Generator[tuple[str, nn.Linear]]:
    """(name, module) of the layers whose weights are quantised: all `nn.Linear` but the head."""
    head = model.get_output_embeddings()
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and module is not head:
            yield name, module


def quantise(model: Any, device: torch.device | str) -> None:
    """Quantise a model's weights and move it to `device`, layer by layer: beside what stays, the device holds one layer
    in the model's dtype at a time.

    Raises:
        UnsupportedModel: it has no linear layer that torch knows as one, as where a checkpoint is quantised already.
    """
    found = list(linear_layers(model))
    if not found:
        raise UnsupportedModel(
            "this model has no plain linear layers", field="model.quantization", got="int8", wants="null"
        )
    for name, module in found:
        model.set_submodule(name, Int8Linear(module, device))
    model.to(device)


def weights_dtype(model: Any) -> str:
    """What rows record of a loaded model's weights: int8, or its dtype."""
    quantised = any(isinstance(module, Int8Linear) for module in model.modules())
    return "int8" if quantised else str(model.dtype).removeprefix("torch.")

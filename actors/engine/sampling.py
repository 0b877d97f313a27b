"""Draw the next token of each row: greedy, temperature, top-k, top-p.

The noise is a pure function of (row seed, position, token index): a counter goes through the finaliser of SplitMix64
(Steele et al. 2014, "Fast splittable pseudorandom number generators", §3), written in int64 tensor operations, which
wrap alike on CPU and CUDA. The draw is Gumbel-max (Maddison et al. 2014, "A* sampling", §2). So a row's tokens depend
neither on its neighbours nor on how often a step was repeated.

Knows nothing of models, pages or requests. Shapes: B rows, V vocabulary, C rows of one chunk.
"""

from __future__ import annotations

import torch
from torch import Tensor

# SplitMix64's increment and multipliers, as signed 64-bit integers.
_STEP = 0x9E3779B97F4A7C15 - (1 << 64)
_MIX_1 = 0xBF58476D1CE4E5B9 - (1 << 64)
_MIX_2 = 0x94D049BB133111EB - (1 << 64)

# Rows that are sampled together. Noise, sort and probabilities take some 60 bytes a row and token, so that 16 rows
# of a vocabulary of 150,000 take 0.15 GB of workspace whatever the batch.
CHUNK_ROWS = 16


def wrap_seed(seed: int) -> int:
    """Fold any integer into int64, as tensors hold it."""
    return (seed + (1 << 63)) % (1 << 64) - (1 << 63)


def _shift(x: Tensor, bits: int) -> Tensor:
    """Logical right shift of int64, whose own shift copies the sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mix(x: Tensor) -> Tensor:
    x = (x ^ _shift(x, 30)) * _MIX_1
    x = (x ^ _shift(x, 27)) * _MIX_2
    return x ^ _shift(x, 31)


def noise_bits(seeds_B: Tensor, positions_B: Tensor, vocabulary: int) -> Tensor:
    """64 random bits for each row and token.

    Args:
        seeds_B: int64.
        positions_B: int64, position in the sequence of the token to draw.
        vocabulary: V.

    Returns:
        int64 [B, V], the same bits on every device.
    """
    key_B = _mix(_mix(seeds_B.long() + _STEP) + (positions_B.long() + 1) * _STEP)
    counter_V = torch.arange(1, vocabulary + 1, device=seeds_B.device) * _STEP
    return _mix(key_B[:, None] + counter_V[None, :])


def gumbel(seeds_B: Tensor, positions_B: Tensor, vocabulary: int) -> Tensor:
    """Standard Gumbel noise, float32 [B, V]; the logarithms are taken in float64, so that devices agree."""
    # 52 bits and a half: exact in float64 and never 0 or 1.
    uniform_BV = (_shift(noise_bits(seeds_B, positions_B, vocabulary), 12).double() + 0.5) * 2.0**-52
    return -torch.log(-torch.log(uniform_BV)).float()


def choose(
    logits_BV: Tensor,
    seeds_B: Tensor,
    positions_B: Tensor,
    temperature_B: Tensor | None,
    top_p_B: Tensor | None,
    top_k_B: Tensor | None,
    *,
    logprobs: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """Draw one token a row. No host synchronisation, so a CUDA graph can hold it.

    None stands for a filter that no row uses, and spares its work: it is the caller who knows without asking the
    device. Filters apply in the order temperature, top-k, top-p, the latter over what top-k left, as in transformers.
    Tokens tied with the last one kept are kept too, so that the order of a sort decides nothing.

    Args:
        logits_BV: any float dtype.
        seeds_B: int64, see `wrap_seed`.
        positions_B: int64, position in the sequence of the token to draw.
        temperature_B: float32; 0 takes the most likely token. None: all rows are greedy.
        top_p_B: float32 in (0, 1]; 1 keeps all.
        top_k_B: int64; V or more keeps all.
        logprobs: compute the second result.

    Returns:
        token ids, int64 [B]; and their log-probabilities under the unmodified distribution, float32 [B], or None.
    """
    if temperature_B is None:
        ids_B = logits_BV.argmax(-1)
    else:
        drawn = [
            _sample(
                logits_BV[rows].float(),
                seeds_B[rows],
                positions_B[rows],
                temperature_B[rows],
                None if top_p_B is None else top_p_B[rows],
                None if top_k_B is None else top_k_B[rows],
            )
            for rows in _chunks(logits_BV)
        ]
        ids_B = torch.cat(drawn)
    if not logprobs:
        return ids_B, None
    return ids_B, torch.cat([_logprob(logits_BV[rows], ids_B[rows]) for rows in _chunks(logits_BV)])


def _chunks(logits_BV: Tensor) -> list[slice]:
    return [slice(at, at + CHUNK_ROWS) for at in range(0, logits_BV.shape[0], CHUNK_ROWS)]


def _logprob(logits_CV: Tensor, ids_C: Tensor) -> Tensor:
    # log_softmax reduces a row in an order that depends on V alone; logsumexp's depends on the number of rows too.
    return torch.log_softmax(logits_CV.float(), -1).gather(1, ids_C[:, None]).squeeze(1)


def _sample(
    logits_CV: Tensor,
    seeds_C: Tensor,
    positions_C: Tensor,
    temperature_C: Tensor,
    top_p_C: Tensor | None,
    top_k_C: Tensor | None,
) -> Tensor:
    greedy_C = logits_CV.argmax(-1)
    divisor_C = torch.where(temperature_C > 0, temperature_C, 1.0)
    scaled_CV = logits_CV / divisor_C[:, None]
    if top_p_C is not None or top_k_C is not None:
        floor_C1 = _floor(scaled_CV, top_p_C, top_k_C)
        scaled_CV = scaled_CV.masked_fill(scaled_CV < floor_C1, float("-inf"))
    drawn_C = (scaled_CV + gumbel(seeds_C, positions_C, logits_CV.shape[1])).argmax(-1)
    return torch.where(temperature_C > 0, drawn_C, greedy_C)


def _floor(scaled_CV: Tensor, top_p_C: Tensor | None, top_k_C: Tensor | None) -> Tensor:
    """The smallest scaled logit that a row keeps, [C, 1]."""
    sorted_CV = scaled_CV.sort(-1, descending=True).values
    kept_C1 = torch.full((scaled_CV.shape[0], 1), scaled_CV.shape[1], dtype=torch.int64, device=scaled_CV.device)
    if top_k_C is not None:
        kept_C1 = top_k_C.long().clamp(1, scaled_CV.shape[1])[:, None]
    if top_p_C is not None:
        floor_C1 = sorted_CV.gather(1, kept_C1 - 1)
        p_CV = sorted_CV.masked_fill(sorted_CV < floor_C1, float("-inf")).softmax(-1)
        # Summed as integers: a float scan adds in another order for one row than for several.
        before_CV = (p_CV.double() * 2.0**52).long()
        before_CV = before_CV.cumsum(-1) - before_CV
        inside_CV = before_CV < (top_p_C.double() * 2.0**52).long()[:, None]
        # top_p = 1 keeps all, whatever rounding says about the tail.
        reach_C1 = torch.where(top_p_C[:, None] < 1, inside_CV.sum(-1, keepdim=True), kept_C1)
        kept_C1 = torch.minimum(kept_C1, reach_C1.clamp(min=1))
    return sorted_CV.gather(1, kept_C1 - 1)

"""GPUs and how fast they run a model: a table of common ones, this machine's, and a roofline.

Seconds are operations of the prefill over the matrix rate, and bytes of a decode step (weights, the rows' KV) over the
memory rate, divided by the share of these rates that the engine reached on an H100 (`Efficiency`), which is assumed to
hold on other GPUs. Loading, tools, and time in which a batch is not full are not in them.

The table. Matrix rate: dense bf16 with fp32 sums; memory rate: the board's; both from NVIDIA's data sheets (A10G: AWS's
variant of the A10, with half its matrix rate; L4; A100 PCIe 40 GB and SXM 80 GB; H100 SXM; H200 SXM). Memory: what CUDA
reports as the total, which is less than the name says (H200: bench/results; others: torch's out-of-memory messages).

Knows no suite, no config and no memory model.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

GIB = 1 << 30


@dataclass(frozen=True, slots=True)
class Gpu:
    """A GPU. Rates are None where they are not known.

    Attributes:
        memory_bytes: what CUDA reports.
        matrix_flop_s: operations a second.
        memory_bytes_s: bytes a second.
        capability: CUDA's compute capability.
        count: how many there are; None for as many as one likes.
    """

    name: str
    memory_bytes: int
    matrix_flop_s: float | None
    memory_bytes_s: float | None
    capability: tuple[int, int] = (8, 0)
    count: int | None = None

    @property
    def hopper(self) -> bool:
        """Of capability 9.0."""
        return self.capability == (9, 0)


GPUS = (
    Gpu("A10G 24 GB", int(22.0 * GIB), 70e12, 0.600e12, (8, 6)),
    Gpu("L4 24 GB", int(22.0 * GIB), 121e12, 0.300e12, (8, 9)),
    Gpu("A100 40 GB", int(39.4 * GIB), 312e12, 1.555e12),
    Gpu("A100 80 GB", int(79.2 * GIB), 312e12, 2.039e12),
    Gpu("H100 80 GB", int(79.1 * GIB), 989e12, 3.35e12, (9, 0)),
    Gpu("H200 141 GB", int(139.8 * GIB), 989e12, 4.8e12, (9, 0)),
)


@dataclass(frozen=True, slots=True)
class Efficiency:
    """What the engine reached on the Qwen3-8B shape in bf16.

    Attributes:
        prefill: share of the matrix rate, at 25.5 µs a token by the kernels of profiled steps; decode: share of the
            memory rate; step_s: host work of a step; of bench/results/react_replay_8b.json, one H100.
        sharded_prefill, sharded_decode: share that is left of each doubling of the GPUs. From
            bench/results/tensor_parallel_compiled.json, two H200s with NVLink: prefill 41.2 k → 64.1 k tokens/s, decode
            11.35 → 11.28 ms a step.
    """

    prefill: float = 0.604
    decode: float = 0.531
    step_s: float = 0.000113
    sharded_prefill: float = 0.778
    sharded_decode: float = 0.503


@dataclass(frozen=True, slots=True)
class Shape:
    """What the roofline needs of a model, on one of `tp` ranks where it says bytes.

    Attributes:
        active: parameters that a token is multiplied with in the layers.
        head: parameters of the output head.
        attention: numbers in all layers' queries of a token.
        read_bytes: weights that a decode step reads; expert_bytes: of them experts.
        used_experts: share of the experts that a token takes.
    """

    active: int
    head: int
    attention: int
    read_bytes: int
    expert_bytes: int
    used_experts: float
    kv_bytes_token: int


@dataclass(frozen=True, slots=True)
class Work:
    """What a run computes, in tokens; `_context` sums the context that each of these tokens attends to.

    Attributes:
        shared: so many every context begins with alike, and a decode step reads their KV once.
    """

    calls: float
    prefill: float
    prefill_context: float
    decode: float
    decode_context: float
    shared: float = 0


def run_seconds(
    work: Work, shape: Shape, gpu: Gpu, rows: int, tp: int = 1, efficiency: Efficiency | None = None
) -> tuple[float, float]:
    """Seconds of prefill and of decode on one replica that decodes `rows` rows together.

    Args:
        shape: of one rank.
        efficiency: what is reached of the rates; all of them, and no host work, at Efficiency(1, 1, 0).

    Raises:
        ValueError: the GPU's rates are not known.
    """
    if gpu.matrix_flop_s is None or gpu.memory_bytes_s is None:
        raise ValueError(f"the rates of {gpu.name} are not known")
    reached = efficiency or Efficiency()
    doublings = math.log2(tp)
    flop_s = gpu.matrix_flop_s * tp * reached.prefill * reached.sharded_prefill**doublings
    bytes_s = gpu.memory_bytes_s * reached.decode * reached.sharded_decode**doublings
    prefill_flop = 2 * (shape.active * work.prefill + shape.head * work.calls)
    decode_flop = 2 * (shape.active + shape.head) * work.decode + 4 * shape.attention * work.decode_context
    steps = work.decode / rows
    # The experts that no row of a step takes are not read.
    unread = shape.expert_bytes * (1 - shape.used_experts) ** rows
    kv_tokens = work.decode_context - (work.decode - steps) * work.shared
    decode_bytes = steps * (shape.read_bytes - unread) + kv_tokens * shape.kv_bytes_token
    prefill_s = (prefill_flop + 4 * shape.attention * work.prefill_context) / flop_s
    return prefill_s, max(decode_bytes / bytes_s, decode_flop / flop_s) + steps * reached.step_s


def local_gpus() -> list[Gpu]:
    """This machine's GPUs that the kernels run on (capability 8.0 and up), one of a kind, with the table's rates."""
    from actors.engine.memory import local_devices

    found = local_devices()
    gpus: list[Gpu] = []
    for device in dict.fromkeys(found):
        if device.capability < (8, 0):
            continue
        alike = [gpu for gpu in GPUS if gpu.name.split()[0] in re.findall(r"\w+", device.name)]
        rates = min(alike, key=lambda gpu: abs(gpu.memory_bytes - device.memory_bytes), default=None)
        gpus.append(
            Gpu(
                f"here: {device.name}",
                device.memory_bytes,
                rates.matrix_flop_s if rates else None,
                rates.memory_bytes_s if rates else None,
                device.capability,
                found.count(device),
            )
        )
    return gpus

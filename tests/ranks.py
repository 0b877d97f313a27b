"""Ranks 1 and up of gangs, in processes of their own: each reads a seat as a line of JSON,
takes it, and says how it ended.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager, nullcontext, suppress
from unittest.mock import patch

import torch
from transformers import AutoModelForCausalLM

from actors.engine import assemble
from actors.engine.gang import Gang
from actors.engine.recorder import OomRecorder
from actors.engine.shard import ShardedRunner, split
from tests.unit.test_runner import CONFIGS


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def shape(name, **changes):
    """A seeded fp32 model of a family, with 4 KV heads and `changes` to its config."""
    config = CONFIGS[name]()
    for field, value in ({"num_attention_heads": 8, "num_key_value_heads": 4} | changes).items():
        setattr(config, field, value)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager").eval()
    for field, parameter in model.named_parameters():
        if field.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.2)  # they are made as zeros, which no cut can get wrong
    return model


_calls = {"left": 0}


@torch.library.custom_op("berth_tests::fail", mutates_args=())
def _fail(hidden: torch.Tensor) -> torch.Tensor:
    _calls["left"] -= 1
    if _calls["left"] == 0:
        raise _calls["error"]
    return hidden.clone()


_fail.register_fake(torch.empty_like)


def fail_once(model, call: int, error: Exception) -> None:
    """Raise in the `call`th forward, the one that compiles included, between the sums of the second layer.

    By an operator in all layers: compiled ones run no Python, and one compilation serves all.
    """
    layers = model.base_model.layers
    _calls.update(left=(call - 1) * len(layers) + 2, error=error)
    for layer in layers:
        layer.mlp.register_forward_pre_hook(lambda _, args: (_fail(args[0]),))


def slow(graph, inputs):
    """A compiler that takes longer than a gang's deadline in its tests."""
    time.sleep(1.5)
    return graph.forward


@contextmanager
def compiling(backend):
    """Runners of gangs compile their layers, on a CPU too; `slow` is ours, others are `torch.compile`'s."""

    class Compiling(ShardedRunner):
        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            self.compile(slow if backend == "slow" else backend)

    with patch.object(assemble, "ShardedRunner", Compiling):
        yield


def engine(
    name,
    rank,
    size,
    port,
    options,
    deadline_s=60.0,
    fail_at=None,
    error="MemoryError",
    changes=None,
    on="cpu float32",
    quantization=None,
    backend=None,
    record=None,
):
    """Rank 0's engine; other ranks serve, then raise SystemExit.

    Args:
        backend: compiles the layers where the engine would not, see `compiling`.
        record: a folder for traces of what runs out of memory.
    """
    place, _, dtype = on.partition(" ")
    device = torch.device(place)
    if backend or device.type == "cuda":
        torch._dynamo.reset()  # hooks are not compared: layers would run what an earlier gang compiled, without ours
    gang = Gang(rank, size, device, port, deadline_s=deadline_s)
    model = shape(name, **(changes or {})).to(getattr(torch, dtype))
    split(model, rank, size, device, quantization)
    if fail_at is not None:
        fail_once(model, fail_at, {"MemoryError": MemoryError, "RuntimeError": RuntimeError}[error]("injected"))
    recorder = None if record is None else OomRecorder("trace", record, device, rank)
    with compiling(backend) if backend else nullcontext():
        return assemble.over_model(model, gang=gang, recorder=recorder, **options)


class Seat:
    """A process that takes seats in gangs, one after the other."""

    def __init__(self, stream):
        self.stream = stream
        self.pid = int(stream.readline())

    def tell(self, **seat) -> None:
        self.stream.write(json.dumps(seat) + "\n")
        self.stream.flush()

    def heard(self) -> str:
        """How the last gang ended."""
        return self.stream.readline().strip()


@contextmanager
def seats(count: int, **env: str):
    """Processes that end with the block. One loads torch, which takes seconds, and is forked into them."""
    pairs = [socket.socketpair() for _ in range(count)]
    fds = [theirs.fileno() for _, theirs in pairs]
    command = [sys.executable, "-m", "tests.ranks", *map(str, fds)]
    # A process that has asked the driver for its devices cannot be forked; by NVML it can.
    own = {"OMP_NUM_THREADS": "1", "PYTORCH_NVML_BASED_CUDA_CHECK": "1"}
    with subprocess.Popen(command, env=os.environ | own | env, pass_fds=fds) as process:
        streams = []
        for ours, theirs in pairs:
            theirs.close()
            streams.append(ours.makefile("rw", encoding="utf-8"))
            ours.close()
        found = [Seat(stream) for stream in streams]
        try:
            yield found
        finally:
            for seat in found:
                with suppress(ProcessLookupError):
                    os.kill(seat.pid, signal.SIGKILL)
                seat.stream.close()
            process.kill()


def serve(fd: int) -> None:
    torch.set_num_threads(1)
    with socket.socket(fileno=fd).makefile("rw", encoding="utf-8") as stream:
        print(os.getpid(), file=stream, flush=True)
        for line in stream:
            try:
                engine(**json.loads(line))
            except SystemExit:
                said = "closed"
            except Exception as e:
                said = f"{type(e).__name__}: {e}"
            print(said, file=stream, flush=True)


if __name__ == "__main__":
    for name in sys.argv[1:]:
        if os.fork() == 0:
            serve(int(name))
            os._exit(0)
    with suppress(ChildProcessError):
        while True:
            os.wait()

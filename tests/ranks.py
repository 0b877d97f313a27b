"""Ranks 1 and up of a gang in a process of its own: reads one JSON object a line, takes that seat, says how it
ended.

Starting a process takes seconds, for torch; so the same ones serve gang after gang.
"""

import json
import os
import socket
import subprocess
import sys

import torch
from transformers import AutoModelForCausalLM

from actors.engine.assemble import over_model
from actors.engine.gang import Gang
from actors.engine.shard import split


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def shape(name, **changes):
    """A seeded fp32 model of a family, with 4 KV heads."""
    from tests.unit.test_runner import CONFIGS

    config = CONFIGS[name]()
    for field, value in ({"num_attention_heads": 8, "num_key_value_heads": 4} | changes).items():
        setattr(config, field, value)
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager").eval()


def fail_once(model, call: int, error: Exception) -> None:
    """Raise in the `call`th forward, between the sums of the second layer."""
    calls = []

    def hook(module, args):
        calls.append(1)
        if len(calls) == call:
            raise error

    model.base_model.layers[1].mlp.register_forward_pre_hook(hook)


def engine(
    name, rank, size, port, options, deadline_s=60.0, fail_at=None, error="MemoryError", changes=None, on="cpu float32"
):
    """Rank 0's engine; other ranks serve, then raise SystemExit."""
    place, _, dtype = on.partition(" ")
    device = torch.device(place)
    gang = Gang(rank, size, device, port, deadline_s=deadline_s)
    model = shape(name, **(changes or {})).to(getattr(torch, dtype))
    split(model, rank, size, device)
    if fail_at is not None:
        fail_once(model, fail_at, {"MemoryError": MemoryError, "RuntimeError": RuntimeError}[error]("injected"))
    return over_model(model, gang=gang, **options)


def start(**env: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "tests.ranks"]
    env = os.environ | {"OMP_NUM_THREADS": "1"} | env
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env)


def tell(process: subprocess.Popen, **seat) -> None:
    assert process.stdin is not None
    process.stdin.write(json.dumps(seat) + "\n")
    process.stdin.flush()


def heard(process: subprocess.Popen) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


if __name__ == "__main__":
    torch.set_num_threads(1)
    for line in sys.stdin:
        try:
            engine(**json.loads(line))
        except SystemExit:
            print("closed", flush=True)
        except Exception as e:
            print(f"{type(e).__name__}: {e}", flush=True)

"""The memory model against a GPU: each component predicted from the config and measured, over models, dtypes, prefill
sizes, batches, with and without CUDA graphs.

Each setting runs in a process of its own, since cuBLAS's workspaces and the CUDA context stay for a process's life: an
engine is built, which profiles its steps, then a full batch of prompts longer than a prefill step goes through it with
top-p sampling and log-probabilities. `slack` is what torch's allocator then holds outside the graphs' own pool beyond
what is in use and a step; `context` what the device holds beyond all other components. The goal: each component within
10 % or 200 MiB, and all but the KV pool within 5 %. The GPU must be idle otherwise; this process takes no context on
it. The result is written after each setting. Layers are compiled, as in a run: the first setting of a model and dtype
takes longest.

    python -m bench.memory_model --out bench/results/memory_model.json
    python -m bench.memory_model --shapes tiny --device cpu --settings float32:64:4:graphs
"""

from __future__ import annotations

import argparse
import multiprocessing
import random
import time
import traceback
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import fields
from itertools import product
from typing import Any

import torch

from actors.engine.assemble import over_model
from actors.engine.protocol import Memory, Request
from actors.messages import Sampling
from bench.common import SHAPES, default_device, device_info, print_table, random_model, runner_of, write_json

MAX_MODEL_LEN = 4096
SETTINGS = (
    "bfloat16:8192:256:graphs",
    "bfloat16:2048:256:graphs",
    "bfloat16:8192:64:graphs",
    "float16:8192:256:graphs",
    "bfloat16:2048:64:eager",
    "float16:8192:256:eager",
)
COMPONENTS = [field.name for field in fields(Memory)]
SHARE, BYTES, TOTAL_SHARE = 0.1, 200 << 20, 0.05


def measure(shape: str, setting: str, device: str, budget_fraction: float, prompt_tokens: int) -> dict[str, Any]:
    """Build an engine and run it: what was predicted, and what was found, by component; None where it is not known."""
    dtype, prefill, batch, graphs = setting.split(":")
    model = random_model(shape, device=device, dtype=getattr(torch, dtype))
    engine = over_model(
        model,
        max_model_len=MAX_MODEL_LEN,
        max_batch=int(batch),
        max_prefill_tokens=int(prefill),
        graphs=graphs == "graphs",
        budget_fraction=budget_fraction,
    )
    cuda = device.startswith("cuda")
    report = engine.memory
    assert report is not None
    before = torch.cuda.memory_allocated() if cuda else 0
    draw = random.Random(0)
    futures = [
        engine.submit(
            Request(
                [draw.randrange(model.config.vocab_size) for _ in range(prompt_tokens)],
                str(row),
                8,
                sampling=Sampling(1.0, 0.9, 50, seed=row),
                logprobs=True,
            )
        )
        for row in range(max(int(batch), 2 * int(prefill) // prompt_tokens))
    ]
    generated = sum(len(future.result().token_ids) for future in futures)
    predicted = {name: getattr(report.predicted, name) for name in COMPONENTS}
    measured: dict[str, int | None] = {name: report.measured.get(name) for name in COMPONENTS}
    if cuda:
        time.sleep(1)  # the engine's thread lets go of its last step
        # It took a workspace of its own; all else that it allocated is free again.
        measured["workspace_bytes"] = report.measured["workspace_bytes"] + torch.cuda.memory_allocated() - before
        free, total = torch.cuda.mem_get_info()
        used = total - free
        step = max(report.measured["activation_bytes"], report.measured["logits_bytes"])
        measured["slack_bytes"] = unused_default_bytes() - step
        known = Memory(**{name: size or 0 for name, size in measured.items()} | {"context_bytes": 0})
        measured["context_bytes"] = used - known.total_bytes
        predicted["all but the pool"] = report.predicted.fixed_bytes
        measured["all but the pool"] = used - report.measured["pool_bytes"]
    captured = len(runner_of(engine).captured)
    engine.close()
    return {
        "predicted": predicted,
        "measured": measured,
        "generated_tokens": generated,
        "captured": captured,
        "device": device_info(device),
    }


def unused_default_bytes() -> int:
    """What torch's allocator holds beside tensors, outside the pools of CUDA graphs."""
    segments = [one for one in torch.cuda.memory_snapshot() if tuple(one["segment_pool_id"]) == (0, 0)]
    blocks = [block for one in segments for block in one["blocks"] if block["state"] == "active_allocated"]
    return sum(one["total_size"] for one in segments) - sum(block["requested_size"] for block in blocks)


def compare(shape: str, setting: str, found: dict[str, Any]) -> list[dict[str, Any]]:
    """A row for each component: bytes, error, and whether it is within the goal; None where nothing was measured."""
    rows: list[dict[str, Any]] = []
    for name, predicted in found["predicted"].items():
        measured = found["measured"].get(name)
        row = {
            "engine": "berth",
            "repeat": 0,
            "shape": shape,
            "setting": setting,
            "generated_tokens": found["generated_tokens"],
            "captured": found["captured"],
            "component": name.removesuffix("_bytes"),
            "predicted_mib": None if predicted is None else predicted / 2**20,
            "measured_mib": None if measured is None else measured / 2**20,
            "error_mib": None,
            "error": None,
            "within_goal": None,
        }
        if measured is not None and predicted is not None:
            error = predicted - measured
            allowed = TOTAL_SHARE * measured if name == "all but the pool" else max(SHARE * measured, BYTES)
            row |= {
                "error_mib": error / 2**20,
                "error": error / measured if measured else None,
                "within_goal": abs(error) <= allowed,
            }
        rows.append(row)
    return rows


def summarize(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """By component: how many were measured, how many are within the goal, the largest error."""
    summary: dict[str, Any] = {}
    for component in dict.fromkeys(row["component"] for row in rows):
        judged = [row for row in rows if row["component"] == component and row["within_goal"] is not None]
        summary[component] = {
            "measured": len(judged),
            "within_goal": sum(row["within_goal"] for row in judged),
            "largest_error_mib": max((abs(row["error_mib"]) for row in judged), default=None),
        }
    return summary


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure every setting of every shape, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--shapes", default="1.7b,8b", help=f"comma-separated, of {', '.join(SHAPES)}")
    add("--settings", default=",".join(SETTINGS), help="dtype:max prefill tokens:max batch:graphs or eager, …")
    add("--budget-fraction", type=float, default=0.9, help="share of the device's memory to use")
    add("--prompt-tokens", type=int, default=512, help="of each request")
    add("--seconds", type=float, default=540.0, help="no setting is begun later than that")
    add("--device", default=default_device())
    add("--out", help="JSON file to write")
    args = parser.parse_args(argv)
    rows: list[dict[str, Any]] = []
    failed: dict[str, str] = {}
    device: dict[str, Any] = {}
    document: dict[str, Any] = {}
    context = multiprocessing.get_context("spawn")
    started_s = time.monotonic()
    for shape, setting in product(args.shapes.split(","), args.settings.split(",")):
        begun_s = time.monotonic()
        if begun_s > started_s + args.seconds:
            failed[f"{shape} {setting}"] = "not begun: time was over"
            continue
        try:
            with ProcessPoolExecutor(1, mp_context=context) as process:
                task = process.submit(measure, shape, setting, args.device, args.budget_fraction, args.prompt_tokens)
                result = task.result()
        except Exception as e:  # what the other settings say is worth keeping
            failed[f"{shape} {setting}"] = f"{type(e).__name__}: {e}"
            traceback.print_exc()
        else:
            device, found = result["device"], compare(shape, setting, result)
            title = f"{shape} {setting}, {time.monotonic() - begun_s:.0f} s"
            print_table(title, [{key: row[key] for key in list(row)[6:]} for row in found])
            rows += found
        workload = {key: value for key, value in vars(args).items() if key not in ("out", "device")}
        document = write_json(
            args.out,
            "memory_model",
            device=device,
            workload=workload | {"max_model_len": MAX_MODEL_LEN, "failed": failed},
            results=rows,
            summary={"berth": summarize(rows)},
        )
    missed = [row for row in rows if row["within_goal"] is False]
    shown = ("shape", "setting", "component", "predicted_mib", "measured_mib", "error_mib", "error")
    print_table("beyond the goal", [{key: row[key] for key in shown} for row in missed])
    print_table("all settings", [{"component": name} | found for name, found in summarize(rows).items()])
    return document


if __name__ == "__main__":
    main()

"""One model over 1, 2 and 4 GPUs: prefill tokens a second, milliseconds a decode step, memory, agreement with one.

Starts a process a rank, each of which sees one GPU. Tokens differ from those of one GPU where rounding decides, so the
agreement is the share of greedy tokens up to each answer's first difference. A sum over ranks is also timed by itself,
of a decode step's size, many in one CUDA graph. The JSON is written after each gang; ratios are to the first one.

    python -m bench.tensor_parallel --shape 8b --sizes 1,2,4 --compile auto,off --out bench/results/tensor_parallel.json
    python -m bench.tensor_parallel --shape tiny --device cpu --sizes 1,2 --rows 4 --context 64
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

import torch

from actors.engine.assemble import over_model
from actors.engine.gang import Gang
from actors.engine.protocol import Request, RowStep
from actors.engine.shard import split
from actors.messages import Sampling
from bench.common import (
    default_device,
    device_info,
    first_difference,
    own_page_tokens,
    print_table,
    random_model,
    runner_of,
    synchronize,
    write_json,
)
from bench.engine_gpu import make_prompts

ANSWER_TOKENS = 32
DECODE_STEPS = 64
SUMS = 64


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """One rank's work; rank 0 returns the numbers, the others serve and raise SystemExit."""
    device = torch.device(args.device)
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    gang = Gang.join(args.size, device, 120.0) if args.size > 1 else None
    model = random_model(args.shape, device=args.device, dtype=dtype)
    vocabulary = model.config.vocab_size
    sum_us = None
    if gang is not None:
        split(model, gang.rank, gang.size, device)
        part = torch.zeros(args.rows, model.config.hidden_size, dtype=dtype, device=device)
        sum_us = 1e6 * seconds_a_sum(gang, part)
    page_tokens = own_page_tokens(device, dtype)
    began_s = time.perf_counter()
    pages_row = -(-(args.context + DECODE_STEPS) // page_tokens)
    engine = over_model(
        model,
        pages=1 + args.rows * pages_row,
        page_tokens=page_tokens,
        max_batch=args.rows,
        max_prefill_tokens=args.max_prefill_tokens,
        max_model_len=pages_row * page_tokens,
        compile=args.compile,
        gang=gang,
    )
    start_s = time.perf_counter() - began_s
    prompts = make_prompts(16, args.context, vocabulary)
    futures = [engine.submit(Request(prompt, f"r{i}", ANSWER_TOKENS)) for i, prompt in enumerate(prompts)]
    answers = [future.result().token_ids for future in futures]
    runner = runner_of(engine)
    tables = [list(range(1 + row * pages_row, 1 + (row + 1) * pages_row)) for row in range(args.rows)]
    ids = [row % vocabulary for row in range(args.context)]
    at_once = max(1, args.max_prefill_tokens // args.context)

    def step(rows: Sequence[int], token_ids: Sequence[int], start: int) -> float:
        synchronize(args.device)
        began = time.perf_counter()
        runner.step([RowStep(token_ids, start, tables[row], True, Sampling()) for row in rows])
        synchronize(args.device)
        return time.perf_counter() - began

    chunks = [range(at, min(args.rows, at + at_once)) for at in range(0, args.rows, at_once)]
    prefill_s = [sum(step(rows, ids, 0) for rows in chunks) for _ in range(3)]
    decode_s = [step(range(args.rows), [7], args.context + at) for at in range(DECODE_STEPS)]
    peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else 0
    engine.close()
    return {
        "tensor_parallel": args.size,
        "kernel": engine.numerics.kernel,
        "start_s": start_s,
        "sum_us": sum_us,
        "prefill_tok_s": args.rows * args.context / statistics.median(prefill_s),
        "decode_ms": 1e3 * statistics.median(decode_s[8:]),
        "peak_gib": peak / 2**30,
        "answers": [list(answer) for answer in answers],
    }


def seconds_a_sum(gang: Gang, part: torch.Tensor) -> float:
    """Of a sum of so many zeros over the ranks, in a CUDA graph as decode has it; all ranks call this."""

    def sums() -> None:
        for _ in range(SUMS):
            gang.reduce(part)

    run = sums
    sums()  # NCCL sets itself up
    if part.device.type == "cuda":
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # NCCL's threads use CUDA, too
            sums()
        run = graph.replay
    found_s: list[float] = []
    for _ in range(5):
        synchronize(part.device.type)
        began_s = time.perf_counter()
        run()
        synchronize(part.device.type)
        found_s.append((time.perf_counter() - began_s) / SUMS)
    return statistics.median(found_s)


def gang_of(size: int, compile: str, argv: Sequence[str]) -> dict[str, Any]:
    """Run `measure` on `size` ranks; rank 0's numbers."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks: list[subprocess.Popen[str]] = []
    try:
        for rank in range(size):
            seat = {"RANK": rank, "WORLD_SIZE": size, "MASTER_PORT": port, "CUDA_VISIBLE_DEVICES": rank}
            env = os.environ | {name: str(value) for name, value in seat.items()}
            command = [sys.executable, "-m", "bench.tensor_parallel", *argv, "--size", str(size), "--compile", compile]
            out = subprocess.PIPE if rank == 0 else subprocess.DEVNULL
            ranks.append(subprocess.Popen(command, env=env, stdout=out, text=True))
        said = ranks[0].communicate()[0]
        if ranks[0].returncode:
            raise SystemExit(f"rank 0 of {size} ended with {ranks[0].returncode}")
        return json.loads(said.splitlines()[-1])
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run it; the document."""
    argv = sys.argv[1:] if argv is None else list(argv)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="8b")
    parser.add_argument("--device", default=default_device())
    parser.add_argument("--sizes", default="1,2,4")
    parser.add_argument("--rows", type=int, default=128)
    parser.add_argument("--context", type=int, default=1024, help="tokens a row")
    parser.add_argument("--max-prefill-tokens", type=int, default=8192)
    parser.add_argument("--compile", default="auto", help="auto, off, or both: auto,off")
    parser.add_argument("--out")
    parser.add_argument("--size", type=int, help="be one rank of a gang of this size; for the benchmark's own use")
    args = parser.parse_args(argv)
    if args.size is not None:
        numbers = measure(args)
        print(json.dumps(numbers))
        return numbers
    document: dict[str, Any] = {}
    results: list[dict[str, Any]] = []
    alone: Any = None
    for compile, size in itertools.product(args.compile.split(","), args.sizes.split(",")):
        numbers = gang_of(int(size), compile, argv)
        answers = numbers.pop("answers")
        alone = alone or answers
        pairs = list(zip(alone, answers, strict=True))
        same = [at if (at := first_difference(a, b)) is not None else len(a) for a, b in pairs]
        first = results[0] if results else numbers
        results.append(
            numbers
            | {
                "answers_equal": sum(a == b for a, b in pairs),
                "answers": len(pairs),
                "agreement": sum(same) / sum(len(a) for a, _ in pairs),
                "prefill_ratio": numbers["prefill_tok_s"] / first["prefill_tok_s"],
                "decode_ratio": first["decode_ms"] / numbers["decode_ms"],
            }
        )
        document = write_json(
            args.out,
            "tensor_parallel",
            device=device_info(args.device),
            workload={"shape": args.shape, "rows": args.rows, "context": args.context, "decode_steps": DECODE_STEPS},
            results=results,
            summary={f"{row['tensor_parallel']} {row['kernel']}": row for row in results},
        )
    print_table(f"tensor parallel, {args.shape}", results)
    return document


if __name__ == "__main__":
    main()

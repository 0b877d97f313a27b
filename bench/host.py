"""What a step costs the host: the engine over a device that computes nothing.

The reference work of `react_replay` in closed loops. Scheduler, pages, delivery and all that a replayed decode step
does before and behind its graph are the engine's own; graphs are empty, a prefill step is none, and tokens are those of
a table. So what is left is CPU time of the engine's thread, of which a device hides as much as its own steps take.

    plain      the length ends a call
    matcher    each call has the matcher of a ReAct turn, which looks at every token

    python -m bench.host --out bench/results/host.json
"""

from __future__ import annotations

import argparse
import gc
import time
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch

from actors.engine import settle_garbage
from actors.engine.paged import PagedEngine
from actors.engine.protocol import Request, RowStep
from actors.engine.runner import _SHARING_ROWS, Drawn, Runner, _chunks, _Graph, _Packed, graph_sizes
from actors.messages import Numerics
from actors.stopping import TurnMatcher
from bench.common import device_info, made_up_tokenizer, print_table, workload_of, write_json
from bench.react_replay import closed_loops, make_traces
from bench.replica import FIRST_TOKEN, turn_of

PAGE_TOKENS, MAX_LEN, VOCABULARY = 128, 4096, 32_768
NUMERICS = Numerics("none", "none", "bfloat16", "bfloat16", "bfloat16", 1, "", False)


class Nothing(Runner):
    """A runner on a device that computes nothing, and whose steps are launched as on a GPU."""

    def __init__(self, max_batch: int):
        kv: Any = SimpleNamespace(page_tokens=PAGE_TOKENS, copy_pages=lambda copies: None)
        self.kv, self._device, self.asynchronous, self._least_tokens = kv, torch.device("cpu"), True, 1
        self._max_pages = MAX_LEN // PAGE_TOKENS
        graph: Any = SimpleNamespace(replay=lambda: None)
        self._graphs = {}
        for size in graph_sizes(max_batch):
            words = _Packed.size(size, size, self._max_pages, _chunks(size))
            self._graphs[size] = _Graph(
                graph, torch.zeros(words, dtype=torch.int32), _chunks(size), size >= _SHARING_ROWS
            )
        self._graph_logits_BV = torch.zeros(max_batch, 1)
        self._graph_ids_B = torch.randint(FIRST_TOKEN, VOCABULARY, (max_batch,))
        self.decode_s, self.decode_steps, self.prefill_steps = 0.0, 0, 0

    def _start(self, rows: Sequence[RowStep], after: Drawn | None, sources: Sequence[int | None]) -> Drawn:
        size = self._graph_size(rows)
        if size is None:
            self.prefill_steps += 1
            place_R, ids_B = [0 if row.sample else None for row in rows], self._graph_ids_B
            assert ids_B is not None
            return Drawn(ids_B, place_R, ids_B, None, [False] * len(rows), None)
        begin_s = time.thread_time()
        drawn = self._replay(rows, size, after, sources)
        self.decode_s += time.thread_time() - begin_s
        self.decode_steps += 1
        return drawn


def measure(way: str, args: argparse.Namespace) -> dict[str, Any]:
    """CPU time of the engine's thread, from the end of as many calls as run at once on."""
    runner, turn, tokenizer = Nothing(args.max_batch), turn_of(args.generate), made_up_tokenizer(VOCABULARY)
    engine = PagedEngine(
        runner,
        num_pages=args.max_batch * MAX_LEN // PAGE_TOKENS,
        page_tokens=PAGE_TOKENS,
        max_model_len=MAX_LEN,
        max_batch=args.max_batch,
        max_prefill_tokens=8192,
        numerics=NUMERICS,
    )
    traces = make_traces(args.calls, 0, prefix=1700, vocabulary=VOCABULARY)

    def make(context: list[int], id: str) -> Request:
        matcher = TurnMatcher(turn, tokenizer) if way == "matcher" else None
        return Request(context, id, args.generate, matcher=matcher)

    def now() -> tuple[float, float, int, int]:
        clock = time.pthread_getcpuclockid(engine._thread.ident or 0)
        return time.clock_gettime(clock), runner.decode_s, runner.decode_steps, runner.prefill_steps

    settle_garbage()
    first = now()
    for calls, _ in enumerate(closed_loops(engine, traces, args.at_once, make), 1):
        if calls == args.at_once:
            first = now()
        if calls == args.at_once + args.calls:
            break
    cpu_s, decode_s, decode_steps, prefill_steps = (b - a for a, b in zip(first, now(), strict=True))
    engine.close()
    gc.unfreeze()
    return {
        "engine": way,
        "repeat": 0,
        "decode_steps": decode_steps,
        "prefill_steps": prefill_steps,
        "cpu_ms_step": 1000 * cpu_s / (decode_steps + prefill_steps),
        "replay_ms_step": 1000 * decode_s / decode_steps,
    }


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--max-batch", type=int, default=256, help="rows decoded together")
    parser.add_argument("--at-once", type=int, default=320, help="trajectories in flight")
    parser.add_argument("--calls", type=int, default=3000, help="that are measured")
    parser.add_argument("--generate", type=int, default=64, help="tokens generated a call")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", help="JSON file to write")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    rows = [measure(way, args) | {"repeat": repeat} for repeat in range(args.repeats) for way in ("plain", "matcher")]
    least = {way: min(row["cpu_ms_step"] for row in rows if row["engine"] == way) for way in ("plain", "matcher")}
    summary = {way: {"least_cpu_ms_step": ms} for way, ms in least.items()}
    document = write_json(
        args.out, "host", device=device_info("cpu"), workload=workload_of(args), results=rows, summary=summary
    )
    print_table(f"Host work of a step, {args.max_batch} rows", rows)
    return document


if __name__ == "__main__":
    main()

"""What Serve costs: the reference work straight on a replica's engine, and through the replica as a run calls it.

One replica, deployed with the pipeline's own options, does the same work in three ways, in turn, `--repeats` times:

    engine    256 closed loops in the engine's process put requests to it; the length ends a call
    matcher   the same, and each call has the matcher of a ReAct turn, which looks at every token and ends it
    serve     clients in as many processes as a run has agents: each call asks the ledger for its home, is routed
              there, pickled, matched, answered; ended trajectories are freed in batches

So all have the same model, kernels, graphs and pages, and what the second adds is the matcher, what the third adds to
that is Serve. The work is that of `react_replay`: forced lengths, greedy, random weights and tokens; the same lengths
in all ways, other tokens, so that nothing is found in the cache of another. `steady_tok_s` counts only while all slots
are taken: from the end of the first `--at-once` calls until the last trajectory has begun.

The model is written once into the cache folder ($BERTH_CACHE), with a tokenizer of made-up words.

    python -m bench.replica --shape 1.7b --out bench/results/replica.json
    python -m bench.replica --shape 1.7b --trajectories 6000 --seconds 195 --ways engine,serve --repeats 1
    python -m bench.replica --shape tiny
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import math
import os
import shutil
import statistics
import tempfile
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ray
import torch
from ray import serve

from actors import ledger
from actors.actions import LINE_END, MARKER, STOPS
from actors.engine import assemble
from actors.engine.loader import cache_folder, load_tokenizer, resolve
from actors.engine.protocol import EngineSpec, Request
from actors.messages import FORECAST_LEVELS, Call, Forecast, Sampling, Stage, Turn
from actors.replica import Replica
from actors.stopping import TurnMatcher
from bench.common import (
    SHAPES,
    default_device,
    device_info,
    empty_cache,
    made_up_tokenizer,
    print_table,
    random_model,
    replicas_of,
    runner_of,
    workload_of,
    write_json,
)
from bench.react_replay import Clock, Trace, check_length, closed_loops, make_traces
from pipeline import pools
from pipeline.config import RunConfig
from pipeline.rollout import Caller, app_name, start_ray

WAYS = ("engine", "matcher", "serve")
WARM_TRAJECTORIES = 32
FIRST_TOKEN = 1000
"""Smaller ids are left to the tokenizer's single bytes."""


# --- the work


@dataclass(frozen=True, slots=True)
class Done:
    """One way through the work; seconds of the host's monotonic clock.

    Attributes:
        ended_s: of each call.
        last_begun_s: when the last trajectory was begun.
    """

    begun_s: float
    last_begun_s: float
    ended_s: tuple[float, ...]


def turn_of(tokens: int) -> Turn:
    """A turn of ReAct text whose thought has so many tokens: made-up words match nothing."""
    return Turn((Stage("thought", tokens, MARKER), Stage("action", tokens, LINE_END)), STOPS)


def shifted(traces: Sequence[Trace], by: int, vocabulary: int) -> list[Trace]:
    """Traces of the same lengths that share no token with those shifted otherwise."""

    def shift(tokens: Sequence[int]) -> list[int]:
        return [FIRST_TOKEN + (token - FIRST_TOKEN + by) % (vocabulary - FIRST_TOKEN) for token in tokens]

    return [Trace(f"{by}:{trace.id}", shift(trace.prompt), [shift(step) for step in trace.steps]) for trace in traces]


class Probed(Replica):
    """The replica of a run, whose engine has more methods than a run asks for."""

    async def ask(self, name: str, *arguments: Any) -> Any:
        """What the engine's method returns."""
        return await self.engine.ask(name, *arguments)

    async def cpu_s(self) -> float:
        """CPU seconds of this process, which is not the engine's."""
        return time.process_time()


class Measured:
    """The paged engine, which can also be given work in its own process."""

    def __init__(self, spec: EngineSpec):
        self.start: list[str] = []
        log, handler = logging.getLogger(assemble.__name__), logging.Handler()
        handler.emit = lambda record: self.start.append(record.getMessage())
        log.addHandler(handler)
        log.setLevel(logging.INFO)
        self.tokenizer: Any = load_tokenizer(resolve(spec.model, spec.revision).folder)
        self.engine = assemble.build(replace(spec, engine="paged"))
        self.engine.submit(Request([FIRST_TOKEN], "first", 1)).result()
        self.engine.end("first")
        self.start.append(f"first token: the process is {assemble.process_age_s():.1f} s old")
        self.clock = Clock(runner_of(self.engine))  # pyright: ignore[reportArgumentType]
        self.cpu_s = time.process_time()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.engine, name)

    def told(self) -> list[str]:
        """What the engine said of its start."""
        return self.start

    def direct(self, traces: Sequence[Trace], at_once: int, generate: int, matched: bool, seconds: float) -> Done:
        """All trajectories straight on the engine; none is begun after `seconds`."""
        turn, begun, ended = turn_of(generate), dict[str, float](), list[float]()

        def make(context: list[int], id: str) -> Request:
            begun.setdefault(id, time.monotonic())
            if not matched:
                return Request(context, id, generate)
            return Request(context, id, turn.max_tokens, matcher=TurnMatcher(turn, self.tokenizer))

        for answer in closed_loops(self.engine, traces, at_once, make, time.monotonic() + seconds):
            check_length(answer.token_ids, generate)
            ended.append(time.monotonic())
        return Done(min(begun.values()), max(begun.values()), tuple(ended))

    def counts(self) -> dict[str, float]:
        """Of the engine's steps and its process, since the last time."""
        steps = self.clock.step_s
        before, self.cpu_s = self.cpu_s, time.process_time()
        found = {
            "prefill_s": sum(steps["prefill"]),
            "decode_s": sum(steps["decode"]),
            "decode_steps": len(steps["decode"]),
            "between_s": sum(self.clock.gap_s.values()),
            "engine_cpu_s": self.cpu_s - before,
        }
        self.clock.reset()
        return found


class Clients(Caller):
    """A process that calls as a run's agent does: a lease for each call, which goes to the lease's home."""

    def __init__(self, app: str, pool: str, leases: Any):
        super().__init__(app, [pool], leases)
        self.pool = pool

    async def replay(self, traces: Sequence[Trace], at_once: int, generate: int, prefix: int, seconds: float) -> Done:
        """All trajectories, `at_once` of them at a time; none is begun after `seconds`."""
        waiting, ended, turn = deque(traces), list[float](), turn_of(generate)
        begun_s = last_begun_s = time.monotonic()

        async def slot() -> None:
            nonlocal last_begun_s
            while waiting and time.monotonic() - begun_s < seconds:
                trace = waiting.popleft()
                last_begun_s = time.monotonic()
                lease = ledger.Leased(self.ledger, self.lease, trace.id, "replica")
                forecast = forecast_of(trace, prefix, generate)
                for context in trace.contexts():
                    home = (await lease.acquire(1, forecast, len(context), self.pool)).replica
                    reply = await self.generate(
                        Call(trace.id, tuple(context), turn, Sampling(), "replica", home), self.pool
                    )
                    check_length(reply.generation.token_ids, generate)
                    ended.append(time.monotonic())
                    lease.answered(len(context) + generate, reply.replica)
                self.end(trace.id, 1, self.pool, lease.home or "")

        await asyncio.gather(*(slot() for _ in range(at_once)))
        return Done(begun_s, last_begun_s, tuple(ended))


def forecast_of(trace: Trace, prefix: int, generate: int) -> Forecast:
    """What the trajectory needs, known beforehand here."""
    tokens = len(trace.prompt) + sum(map(len, trace.steps)) + generate
    return Forecast(len(trace.prompt), prefix, tokens, tokens, (tokens,) * len(FORECAST_LEVELS), trace.calls)


# --- the model


def model_folder(args: argparse.Namespace) -> Path:
    """The model of a command line, written where it is not there yet."""
    name = f"{args.shape}-{'bf16' if args.device.startswith('cuda') else 'fp32'}"
    return write_model((args.models or cache_folder() / "bench").resolve() / name, args.shape, args.device)


def write_model(folder: Path, shape: str, device: str) -> Path:
    """A model of a shape with random weights, and a tokenizer of as many words; its folder."""
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        made = Path(tempfile.mkdtemp(dir=folder.parent))
        dtype = torch.bfloat16 if device.startswith("cuda") else torch.float32
        random_model(shape, device=device, dtype=dtype).save_pretrained(made)
        empty_cache()  # the replica needs the room
        made_up_tokenizer(SHAPES[shape]["vocab_size"]).save_pretrained(made)
        try:
            made.rename(folder)
        except OSError:  # somebody else was first
            shutil.rmtree(made)
    return folder


# --- the benchmark


def row(way: str, repeat: int, done: Sequence[Done], generate: int, at_once: int) -> dict[str, Any]:
    """Rates of one way through the work, by one or several processes."""
    ended = sorted(at for one in done for at in one.ended_s)
    wall_s = ended[-1] - min(one.begun_s for one in done)
    full_s, last_begun_s = ended[min(at_once, len(ended)) - 1], max(one.last_begun_s for one in done)
    steady = sum(full_s < at <= last_begun_s for at in ended)
    return {
        "engine": way,
        "repeat": repeat,
        "wall_s": wall_s,
        "generated_tok_s": len(ended) * generate / wall_s,
        "calls": len(ended),
        "calls_s": len(ended) / wall_s,
        "steady_tok_s": steady * generate / (last_begun_s - full_s) if steady else None,
    }


def run(args: argparse.Namespace, config: RunConfig, tell: Callable[[list[dict[str, Any]], list[str]], Any]) -> None:
    """Deploy, warm up, measure in turn.

    Args:
        tell: after each way, the rows so far, and what the engine said of its start.
    """
    vocabulary = SHAPES[args.shape]["vocab_size"]
    start_ray(config)
    app = app_name(config.out)
    name = f"{app}-ledger"
    leases = ledger.start(name, dict.fromkeys(config.pools), lease_s=3600.0)
    serve.start(proxy_location="Disabled", logging_config={"log_level": "ERROR"})
    begin = time.perf_counter()
    served = pools.deploy(config, app, name, print)
    pool = served.pools[0].name
    handle: Any = serve.get_deployment_handle(pool, app)
    actor: Any = ray.remote(Clients)
    count = max(1, min(8, int(ray.cluster_resources().get("CPU", 1)) // 8))  # as many as a run has agents
    clients = [actor.options(num_cpus=0).remote(app, pool, leases) for _ in range(count)]
    up_s = time.perf_counter() - begin
    print(f"replica up after {up_s:.0f} s, {served.numerics.kernel}; {count} clients", flush=True)
    start: list[str] = handle.ask.remote("told").result()
    print(*start, sep="\n", flush=True)

    def replay(way: str, traces: Sequence[Trace]) -> list[Done]:
        if way != "serve":
            matched = way == "matcher"
            return [handle.ask.remote("direct", traces, args.at_once, args.generate, matched, args.seconds).result()]
        slots = [len(range(k, args.at_once, count)) for k in range(count)]
        return ray.get(
            [
                client.replay.remote(traces[k::count], slots[k], args.generate, args.prefix, args.seconds)
                for k, client in enumerate(clients)
            ]
        )

    rows: list[dict[str, Any]] = []
    warm = make_traces(min(WARM_TRAJECTORIES, args.trajectories), 99, prefix=args.prefix, vocabulary=vocabulary)
    for repeat in range(-1, args.repeats):
        traces = warm
        if repeat >= 0:
            traces = make_traces(args.trajectories, args.seed + repeat, prefix=args.prefix, vocabulary=vocabulary)
        for at, way in enumerate(args.ways):
            work = shifted(traces, 1 + at, vocabulary)
            handle.ask.remote("counts").result()
            done = replay(way, work)
            if repeat >= 0:
                rows.append(row(way, repeat, done, args.generate, args.at_once) | handle.ask.remote("counts").result())
                print({key: round(value, 2) if isinstance(value, float) else value for key, value in rows[-1].items()})
                tell(rows, start)


def summarize(rows: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Medians; `cost` of each way is the median over repeats of how much more time a token takes than on the bare
    engine in the same repeat, from the first call to the last; `steady_cost` the same while all slots are taken."""
    summary: dict[str, dict[str, Any]] = {}
    bare = {row["repeat"]: row for row in rows if row["engine"] == "engine"}
    for way in dict.fromkeys(row["engine"] for row in rows):
        mine = [row for row in rows if row["engine"] == way]
        found: dict[str, Any] = {}
        for cost, speed in (("cost", "generated_tok_s"), ("steady_cost", "steady_tok_s")):
            speeds = [row[speed] for row in mine if row[speed]]
            costs = [
                bare[row["repeat"]][speed] / row[speed] - 1
                for row in mine
                if row[speed] and bare.get(row["repeat"], {}).get(speed)
            ]
            found |= {f"median_{speed}": statistics.median(speeds) if speeds else None}
            found |= {"spread": max(speeds) - min(speeds)} if speed == "generated_tok_s" else {}
            found |= {cost: statistics.median(costs) if costs else None}
        summary[way] = found
    return summary


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--shape", choices=list(SHAPES), default="1.7b")
    add("--trajectories", type=int, help="default: half more than --at-once")
    add("--at-once", type=int, help="trajectories in flight, and rows decoded together (default: 256, on a CPU 16)")
    add("--ways", type=lambda text: text.split(","), default=WAYS, help="of engine, matcher, serve")
    add("--seconds", type=float, default=math.inf, help="no trajectory is begun later in a way")
    add("--repeats", type=int, default=2, help="each with a seed of its own: --seed and up")
    add("--seed", type=int, default=0)
    add("--prefix", type=int, default=1700, help="tokens of the shared prefix")
    add("--generate", type=int, default=64, help="tokens generated a call")
    add(
        "--device", default=default_device(), help="where the model is made; the replica takes a GPU where there is one"
    )
    add("--models", type=Path, help="folder that the model is written into (default: the cache folder)")
    add("--out", help="JSON file to write")
    args = parser.parse_args(argv)
    args.at_once = args.at_once or (256 if args.device.startswith("cuda") else 16)
    args.trajectories = args.trajectories or args.at_once * 3 // 2
    return args


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure, print, write."""
    args = parse(argv)
    begin = time.perf_counter()
    model = model_folder(args)
    longest = args.prefix + 40 + 7 * 300 + args.generate
    config = RunConfig.model_validate(
        {
            "suite": "replica",
            "out": f"replica-{os.getpid()}",
            "model": {"id": str(model), "max_model_len": -(-longest // 256) * 256},
            "memory": {"max_batch": args.at_once},
            "engine": "bench.replica:Measured",
            "speculation": "off",
        }
    )
    print(f"{args.shape}: model at hand after {time.perf_counter() - begin:.0f} s", flush=True)
    document: dict[str, Any] = {}

    def tell(rows: list[dict[str, Any]], start: list[str]) -> None:
        document.update(
            write_json(
                args.out,
                "replica",
                device=device_info(args.device),
                workload=workload_of(args) | {"start": start, "seconds": min(args.seconds, 1e9)},
                results=rows,
                summary=summarize(rows),
            )
        )

    with replicas_of(Probed):
        run(args, config, tell)
    print_table(f"A replica's engine and Serve, {args.shape}, {args.at_once} calls at once", document["results"])
    print_table("Against the bare engine", [{"way": way, **found} for way, found in document["summary"].items()])
    return document


if __name__ == "__main__":
    main()

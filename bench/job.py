"""What the whole job costs: a run's rollouts on one replica, then its engine alone on the same calls.

The job is a run's own: manifest, Ray Data, agents, tools, journal, scoring, leases, Serve, result tables. Its engine is
the paged one over random weights, whose answers are replaced by recorded ones: a thought and an action, some 64 tokens,
that end where the turn's matcher says. The tool answers with 60 to 250 made-up words. So trajectories are as long as
those of `react_replay`, and agents do all that they do in a run.

    job       rolled out for `--seconds`, then stopped as `max_hours` stops a run
    engine    the calls that the job made, context by context, put to the same engine by a thread of its process,
              `--at-once` trajectories at a time, for as long

No token of the second is found in the cache of the first. `steady_tok_s` counts tokens of calls that ended between
`--ramp` and `--seconds` behind the first call. Means of a step say where the engine's thread was: on the host
(`host_ms`, of which `host_cpu_ms` on a CPU; the rest waits for the interpreter), of that collecting garbage (`gc_ms`,
by any thread), waiting for the device (`waited_ms`).

    python -m bench.job --shape 1.7b --seconds 200 --out bench/results/job.json
    python -m bench.job --shape tiny --seconds 20 --ramp 5
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import random
import tempfile
import threading
import time
from array import array
from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import replace
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple
from zlib import crc32

import ray
from ray import serve

from actors.engine import EngineSpec, Matcher, Request
from actors.engine import build as build_engine
from actors.engine.loader import load_tokenizer, resolve
from actors.engine.runner import Drawn
from actors.messages import Generation
from bench.common import SHAPES, default_device, device_info, print_table, replicas_of, workload_of, write_json
from bench.react_replay import QUESTION_TOKENS, STEPS, Trace, closed_loops
from bench.replica import FIRST_TOKEN, Probed, model_folder
from bench.scripted import made_up_text
from pipeline import pools, rollout
from pipeline import run as pipeline_run
from pipeline.config import load_run
from pipeline.preflight import prepare

THOUGHT_TOKENS = 42
TOOL = '''"""The tool of the recorded trajectories."""

import random

from actors.messages import Task
from bench.scripted import made_up_text


def Search(entity: str, task: Task) -> str:
    """Look an entity up."""
    seed = f"{task.task_id} {entity}"
    return made_up_text(seed, random.Random(seed).randrange(60, 250)).strip()
'''


@cache
def calls_of(row_id: str) -> int:
    """Calls of a trajectory; the last finishes."""
    return random.Random(row_id).choice(STEPS) + 1


class Replaying:
    """The paged engine with recorded answers in place of its own. One call of a trajectory at a time.

    Attributes:
        ended: seconds of the monotonic clock and tokens of each call that ended.
        contexts: of finished trajectories: the last context, and of each call the lengths of its own and its answer.
        between: seconds from a call's end to the next one of its trajectory, and when that came.
        steps: see `watch`; of whoever calls the engine.
    """

    def __init__(self, spec: EngineSpec):
        self.engine: Any = build_engine(replace(spec, engine="paged"))
        self.numerics = self.engine.numerics
        encode = load_tokenizer(resolve(spec.model, spec.revision).folder).encode
        self.endings = {
            (at, last): encode(f"\nAction {at}: " + ("Finish[yes]" if last else f"Search[{at}]") + "\n")
            for at in range(1, max(STEPS) + 2)
            for last in (False, True)
        }
        self.words = random.Random(0).choices(range(FIRST_TOKEN, FIRST_TOKEN + 1000), k=10_000)
        self.lengths: defaultdict[str, list[tuple[int, int]]] = defaultdict(list)
        self.ended: list[tuple[float, int]] = []
        self.contexts: dict[str, tuple[array[int], list[tuple[int, int]]]] = {}
        self.between: list[tuple[float, float]] = []
        self.steps = watch(self.engine)
        self._answered: dict[str, float] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self.engine, name)

    def submit(self, request: Request) -> Future[Generation]:
        """Compute as many tokens as the recorded answer has until its turn ends, and give these."""
        name, made = request.sequence_id, self.lengths[request.sequence_id]
        at, calls = len(made) + 1, calls_of(request.sequence_id)
        begin = crc32(f"{name} {at}".encode()) % (len(self.words) - THOUGHT_TOKENS)
        answer = tuple(self.words[begin : begin + THOUGHT_TOKENS] + self.endings[at, at == calls])
        out: Future[Generation] = Future()
        now_s = time.monotonic()
        if name in self._answered:
            self.between.append((now_s, now_s - self._answered[name]))

        def deliver(future: Future[Generation]) -> None:
            if (error := future.exception()) is not None:
                out.set_exception(error)
                return
            found = future.result()
            given = answer[: len(found.token_ids)]
            self._answered[name] = time.monotonic()
            self.ended.append((self._answered[name], len(given)))
            made.append((len(request.token_ids), len(given)))
            if at == calls:
                self.contexts[name] = array("i", request.token_ids), made
            out.set_result(replace(found, token_ids=given))

        matcher = request.matcher and Instead(request.matcher, answer)
        length = min(request.max_tokens, len(answer))
        self.engine.submit(replace(request, max_tokens=length, matcher=matcher)).add_done_callback(deliver)
        return out

    def end(self, sequence_id: str) -> None:
        """See `Engine`."""
        self.lengths.pop(sequence_id, None)
        self._answered.pop(sequence_id, None)
        self.engine.end(sequence_id)

    def seen(self) -> dict[str, Any]:
        """Calls that ended, and CPU seconds of this process and its Python threads by name."""
        clocks = {one.name: time.pthread_getcpuclockid(one.ident) for one in threading.enumerate() if one.ident}
        threads = {name: time.clock_gettime(clock) for name, clock in clocks.items()}
        seen = {"ended": self.ended, "steps": list(self.steps), "between": list(self.between)}
        return seen | {"process": time.process_time(), "threads": threads}

    def alone(self, at_once: int, seconds: float, vocabulary: int) -> dict[str, Any]:
        """Put the job's calls to the engine again; which ended when, and their tokens; the engine's steps."""
        traces: list[Trace] = []
        left: dict[str, deque[int]] = {}
        for name, (context, made) in self.contexts.items():
            other = [(token + vocabulary // 2) % vocabulary for token in context]
            starts = [0, *(length for length, _ in made)]
            steps = [other[a:b] for a, b in pairwise(starts)]
            traces.append(Trace(f"again {name}", steps[0], steps[1:]))
            left[f"again {name}"] = deque(count for _, count in made)
        self.steps.clear()
        ended: list[tuple[float, int]] = []
        begun, full_s = set[str](), [math.inf]

        def make(context: list[int], name: str) -> Request:
            begun.add(name)
            if len(begun) == len(traces):  # from here on fewer and fewer are under way
                full_s[0] = min(full_s[0], time.monotonic())
            return Request(context, name, left[name].popleft())

        for answer in closed_loops(self.engine, traces, at_once, make, time.monotonic() + seconds):
            ended.append((time.monotonic(), len(answer.token_ids)))
        return {"ended": ended, "steps": self.steps, "between": [], "full_s": full_s[0]}


def watch(engine: Any) -> list[Step]:
    """The steps of a paged engine from now on, as they end."""
    scheduler, steps, times = engine.scheduler, list[Step](), Times()
    commit = scheduler.commit
    times.watch()

    def watched(work: Sequence[Any]) -> None:
        now_s = time.monotonic()
        waiting = len(scheduler.waiting)
        prefill = any(part.prefill for part in work)
        tokens = sum(part.tokens for part in work)
        steps.append(Step(now_s, prefill, len(work), tokens, len(scheduler.running), waiting, *times.take()))
        commit(work)

    scheduler.commit = watched
    return steps


class Step(NamedTuple):
    """A step of the engine: when it ended, what it computed, who was in the engine."""

    at_s: float
    prefill: bool
    rows: int
    tokens: int
    running: int
    waiting: int
    waited_s: float
    host_s: float
    host_cpu_s: float
    gc_s: float


class Times:
    """Where the engine's thread was since the step before."""

    def __init__(self):
        self.waited_s = self.host_s = self.host_cpu_s = self.gc_s = 0.0
        self.since = (time.perf_counter(), 0.0)

    def watch(self) -> None:
        """Time what waits for the device, and garbage collection."""
        result = Drawn.result

        def timed(drawn: Drawn) -> Any:
            begin, cpu = time.perf_counter(), time.thread_time()
            self.host_s, self.host_cpu_s = begin - self.since[0], cpu - self.since[1]
            try:
                return result(drawn)
            finally:
                self.since = time.perf_counter(), time.thread_time()
                self.waited_s = self.since[0] - begin

        Drawn.result = timed
        begun = [0.0]

        def collected(phase: str, _: Any) -> None:
            if phase == "start":
                begun[0] = time.perf_counter()
            else:
                self.gc_s += time.perf_counter() - begun[0]

        gc.callbacks.append(collected)

    def take(self) -> tuple[float, float, float, float]:
        """And forget."""
        taken = self.waited_s, self.host_s, self.host_cpu_s, self.gc_s
        self.gc_s = 0.0
        return taken


class Instead:
    """Shows a matcher other tokens than those that were generated, as many."""

    def __init__(self, matcher: Matcher, answer: Sequence[int]):
        self.matcher, self.answer, self.at = matcher, answer, 0

    def __call__(self, new_ids: Sequence[int], /) -> bool:
        """See `Matcher`."""
        at, self.at = self.at, self.at + len(new_ids)
        return self.matcher(self.answer[at : self.at])


def row(way: str, seen: dict[str, Any], ramp: float, seconds: float) -> dict[str, Any]:
    """Rates and steps between `ramp` and `seconds` behind the first call's end."""
    ended: Sequence[tuple[float, int]] = seen["ended"]
    first = min(at for at, _ in ended)
    span = min(seconds, seen.get("full_s", math.inf) - first, max(at for at, _ in ended) - first) - ramp
    steady = [tokens for at, tokens in ended if ramp < at - first <= ramp + span]
    steps = [step for step in seen["steps"] if ramp < step.at_s - first <= ramp + span]
    prefill = [step for step in steps if step.prefill]
    decode = [step for step in steps if not step.prefill]
    between = sorted(wait_s for at, wait_s in seen["between"] if ramp < at - first <= ramp + span)

    def mean(numbers: Sequence[float]) -> float:
        return sum(numbers) / max(1, len(numbers))

    found = {
        "engine": way,
        "repeat": 0,
        "calls": len(ended),
        "steady_s": span,
        "calls_s": len(steady) / span,
        "steady_tok_s": sum(steady) / span,
        "decode_steps_s": len(decode) / span,
        "prefill_steps_s": len(prefill) / span,
        "decode_rows": mean([step.rows for step in decode]),
        "prefill_rows": mean([step.rows for step in prefill]),
        "prefill_tokens": mean([step.tokens for step in prefill]),
        "running": mean([step.running for step in steps]),
        "waiting": mean([step.waiting for step in steps]),
        "waited_ms": 1000 * mean([step.waited_s for step in steps]),
        "host_ms": 1000 * mean([step.host_s for step in steps]),
        "host_cpu_ms": 1000 * mean([step.host_cpu_s for step in steps]),
        "gc_ms": 1000 * mean([step.gc_s for step in steps]),
    }
    if between:
        found |= {"between_s": mean(between), "between_p50_s": between[len(between) // 2]}
        found |= {"between_p95_s": between[len(between) * 95 // 100]}
    return found


def write_suite(folder: Path, model: Path, args: argparse.Namespace) -> Path:
    """The suite and the run's config."""
    rows = (
        {"id": f"t{n}", "question": made_up_text(f"t{n}", QUESTION_TOKENS).strip(), "answer": "yes"}
        for n in range(args.trajectories)
    )
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "fewshot.txt").write_text(made_up_text("few-shot", args.prefix).strip() + "\n")
    (folder / "recorded.py").write_text(TOOL)
    (folder / "suite.yaml").write_text(
        "name: recorded\ndata: {path: rows.jsonl}\nprompt: {fewshot: fewshot.txt}\n"
        'tools: [{use: "recorded:Search"}]\nscorers: [exact_match]\nlimits: {max_steps: 8, trajectory_tokens: 4096}\n'
    )
    path = folder / "run.json"  # JSON is YAML
    config = {"suite": ".", "out": "out", "engine": "bench.job:Replaying", "speculation": "off"}
    config |= {"model": {"id": str(model), "max_model_len": 4096}, "memory": {"max_batch": args.max_batch}}
    path.write_text(json.dumps(config))
    return path


def run_job(
    prepared: Any, served: pools.Served, app: str, leases: Any, begun: Callable[[], Any], seconds: float
) -> Any:
    """The run's rollouts until they end, or `seconds` behind the engine's first answer: none is begun after that. The
    journal's counts.

    Args:
        begun: whether the engine has answered.
    """
    config, learned = prepared.config, pipeline_run.untaught(prepared)
    pipeline_run.open_folder(prepared)
    pipeline_run.write_manifest(prepared, learned)
    journal = rollout.start_journal(config, {})
    job, agents = rollout.plan_agents(prepared, learned, app, served)
    failure: list[BaseException] = []

    def work() -> None:
        try:
            rollout.rollouts(job, journal, leases, agents, len(prepared.rows.tasks))
        except BaseException as e:
            failure.append(e)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    while thread.is_alive() and not begun():
        time.sleep(0.2)
    thread.join(seconds)
    ray.get(journal.stop.remote())
    thread.join()
    if failure:
        raise rollout.explained(failure[0]) from failure[0]
    return ray.get(journal.counts.remote())


def run(args: argparse.Namespace, prepared: Any, tell: Callable[[list[dict[str, Any]]], Any]) -> None:
    """Deploy, roll out, do the calls again."""
    config, begin = prepared.config, time.perf_counter()
    rollout.start_ray(config)
    app = rollout.app_name(config.out)
    served = pools.deploy(config, app, rollout.ledger_name(app), print)
    leases = rollout.start_ledger(app, served)
    handle: Any = serve.get_deployment_handle(served.pools[0].name, app)
    print(f"replica up after {time.perf_counter() - begin:.0f} s, {served.numerics.kernel}", flush=True)
    before: dict[str, Any] = handle.ask.remote("seen").result()
    replica_s: float = handle.cpu_s.remote().result()
    begun = lambda: handle.ask.remote("seen").result()["ended"]  # noqa: E731
    counts = run_job(prepared, served, app, leases, begun, args.seconds)
    seen: dict[str, Any] = handle.ask.remote("seen").result()
    calls = len(seen["ended"])
    spent = {name: cpu_s - before["threads"].get(name, 0.0) for name, cpu_s in seen["threads"].items()}
    spent["process"] = seen["process"] - before["process"]
    spent["replica"] = handle.cpu_s.remote().result() - replica_s
    found = row("job", seen, args.ramp, args.seconds)
    found |= {"rows": counts.finished, "failed": counts.failed}
    rows = [found | {"cpu_ms_call": {name: 1000 * cpu_s / calls for name, cpu_s in spent.items()}}]
    tell(rows)
    alone = handle.ask.remote("alone", args.at_once, args.seconds, SHAPES[args.shape]["vocab_size"]).result()
    tell([*rows, row("engine", alone, args.ramp, args.seconds)])


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--shape", choices=list(SHAPES), default="1.7b")
    add("--seconds", type=float, default=200.0, help="of the job, and of the engine alone")
    add("--ramp", type=float, default=20.0, help="of them not counted")
    add("--trajectories", type=int, help="rows of the suite (default: 9000, on a CPU 400)")
    add("--max-batch", type=int, help="rows decoded together (default: 256, on a CPU 16)")
    add("--at-once", type=int, help="trajectories of the engine alone (default: a quarter more)")
    add("--prefix", type=int, default=1700, help="tokens of the few-shot examples")
    add(
        "--device", default=default_device(), help="where the model is made; the replica takes a GPU where there is one"
    )
    add("--models", type=Path, help="folder that the model is written into (default: the cache folder)")
    add("--out", help="JSON file to write")
    args = parser.parse_args(argv)
    gpu = args.device.startswith("cuda")
    args.trajectories = args.trajectories or (9000 if gpu else 400)
    args.max_batch = args.max_batch or (256 if gpu else 16)
    args.at_once = args.at_once or args.max_batch * 5 // 4
    return args


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure, print, write."""
    args = parse(argv)
    model = model_folder(args)
    document: dict[str, Any] = {}

    def tell(rows: list[dict[str, Any]]) -> None:
        speeds = {row["engine"]: row["steady_tok_s"] for row in rows}
        cost = speeds["engine"] / speeds["job"] - 1 if "engine" in speeds else None
        summary = {way: {"median_steady_tok_s": speed} for way, speed in speeds.items()}
        summary["job"]["steady_cost"] = cost
        workload = workload_of(args)
        device = device_info(args.device)
        document.update(write_json(args.out, "job", device=device, workload=workload, results=rows, summary=summary))
        plain = [{name: value for name, value in row.items() if name != "cpu_ms_call"} for row in rows]
        print("CPU of the engine's process by thread, and of the replica's, ms a call:", rows[0]["cpu_ms_call"])
        print_table(f"The whole job and its engine alone, {args.shape}; cost {cost}", plain)

    with tempfile.TemporaryDirectory(prefix="berth-job-") as folder:
        prepared = prepare(load_run(str(write_suite(Path(folder), model, args)), []))
        with replicas_of(Probed):
            run(args, prepared, tell)
    return document


if __name__ == "__main__":
    main()

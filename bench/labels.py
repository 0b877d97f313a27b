"""What it saves that the format writes `Action 3:` (`agent.labels: forced`): the same tasks with and without.

Real tasks, a real model, no Ray. Counts the calls, the tokens that were generated and those that were written, and the
trajectories that come out otherwise, which are those whose thoughts went on behind their first line.

    python -m bench.labels configs/quickstart.yaml --limit 36
    python -m bench.labels configs/gsm8k.yaml:data=test.jsonl --limit 10 --out bench/results/labels.json
"""

from __future__ import annotations

import argparse
import statistics
from typing import Any

from actors.messages import Trajectory
from bench.common import default_device, device_info, print_table, write_json
from bench.rollouts import prepared_run
from bench.speculation import run, said
from pipeline.preflight import Prepared
from pipeline.scoring import score

LABELS = ("generated", "forced")


def measure(prepared: Prepared, batch: int, speculation: str) -> tuple[dict[str, Any], list[Trajectory]]:
    """One run on a new engine, told."""
    ran = run(prepared, batch, speculation)
    scores = [score(one, prepared.scorers, prepared.suite.primary).score or 0.0 for one in ran.found]
    return {
        "engine": "berth",
        "labels": prepared.config.agent.labels,
        "speculation": speculation,
        "wall_s": ran.seconds,
        "cpu_s": ran.cpu_s,
        "rows": len(ran.found),
        "requests": ran.requests,
        "generated": ran.total("generated"),
        "forced": ran.total("forced"),
        "prefilled": ran.total("prefilled"),
        "decode_s": ran.total("decode_s"),
        "score": statistics.mean(scores),
        "parse_errors": sum(one.parse_errors for one in ran.found),
    }, ran.found


def main() -> None:
    """Read the arguments, measure in turn, compare, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", help="run config, with `:field=value` behind it for other values")
    parser.add_argument("--limit", type=int, default=36)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--speculation", default="on,off", help="comma-separated")
    parser.add_argument("--out", help="JSON file")
    args = parser.parse_args()
    results: list[dict[str, Any]] = []
    first: list[Trajectory] | None = None
    for speculation in args.speculation.split(","):
        for labels in LABELS:
            prepared = prepared_run(args.config, "runs", [f"limit={args.limit}", f"agent.labels={labels}"])
            result, found = measure(prepared, args.batch, speculation)
            first = first or found
            result["other_trajectories"] = sum(said(a) != said(b) for a, b in zip(first, found, strict=True))
            results.append(result)
            print(result, flush=True)
    print_table("Who writes the labels", results)
    summary = {
        f"{labels}, speculation {speculation}": {
            name: next(r[name] for r in results if (r["labels"], r["speculation"]) == (labels, speculation))
            for name in ("wall_s", "cpu_s", "generated", "requests", "score")
        }
        for speculation in args.speculation.split(",")
        for labels in LABELS
    }
    device = device_info(default_device())
    write_json(args.out, "labels", device=device, workload=vars(args), results=results, summary=summary)


if __name__ == "__main__":
    main()

"""`python -m tests.integration.ledger_run STATES ARGS…`: a run on 4 fake GPUs with 4 agents, its ledger watched.

What the ledger says of itself stands in STATES, a line of JSON each 0.2 s.
"""

import functools
import json
import sys
import threading
import time
from dataclasses import replace

import ray
from ray.exceptions import RayError

from actors import ledger
from pipeline import __main__, rollout


def watch(path: str, name: str) -> None:
    with open(path, "a", encoding="utf-8") as file:
        while True:
            try:
                state = ray.get(ledger.find(name).state.remote(), timeout=2)
            except (RayError, ValueError):
                state = None
            if state is not None:
                file.write(json.dumps(state) + "\n")
                file.flush()
            time.sleep(0.2)


def main() -> None:
    states, *arguments = sys.argv[1:]
    plan, start, init = rollout.plan_agents, ledger.start, ray.init

    def four_agents(*args):
        job, _ = plan(*args)
        threading.Thread(target=watch, args=(states, rollout.ledger_name(job.app)), daemon=True).start()
        return replace(job, concurrent=16), 4

    ray.init = lambda **options: init(**options | {"num_gpus": 4, "num_cpus": 12})
    rollout.CALLS_PER_AGENT = 1  # or the first agent would take all tasks
    rollout.plan_agents = four_agents
    ledger.start = functools.partial(start, lease_s=20.0, dead_s=4.0)
    sys.argv = ["berth", "run", *arguments]
    __main__.main()


if __name__ == "__main__":
    main()

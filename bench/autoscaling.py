"""Nodes and replicas over time: a run whose GPU pool starts at zero, on Ray's autoscaler with fake nodes.

The node types are those of cluster.yaml with their labels and GPUs; a fake node is a raylet on this machine that claims
them. The head has no CPU and no GPU, so all that the run needs must be started on demand. The scripted engine
(tests/scripted.py) answers after a delay, so the times of a real cloud to start a machine and load weights are missing.

    python -m bench.autoscaling --rows 400 --out bench/results/autoscaling.json --plot docs/autoscaling.png

With `--long q20/0` that row needs two GPUs from its second step on, for which a second pool is there, on nodes of four.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import yaml

from bench.clusters import ray_cluster
from bench.common import device_info, print_table, write_json
from bench.pipeline import write_run
from bench.scripted import script

ROOT = Path(__file__).resolve().parents[1]
HEAD, HEAD_TYPE = "f" * 51 + "00000", "ray.head.default"
GIVE_UP_S = 900
WINDOW = 5
"""Samples over which the plot averages the rate of calls."""


def autoscaling_config(gcs_address: str, idle_s: float) -> dict[str, Any]:
    """cluster.yaml's node types for fake nodes; at most 4 CPUs each, as Ray may start a process for each."""
    shipped = yaml.safe_load((ROOT / "cluster.yaml").read_text(encoding="utf-8"))
    types: dict[str, Any] = {}
    for name, kind in shipped["available_node_types"].items():
        resources = kind["resources"] | {"CPU": min(4, kind["resources"]["CPU"]), "object_store_memory": 2**28}
        head = name == shipped["head_node_type"]
        workers = {"min_workers": 0, "max_workers": 0 if head else kind["max_workers"]}
        types[HEAD_TYPE if head else name] = {"resources": resources, "labels": kind["labels"], "node_config": {}}
        types[HEAD_TYPE if head else name] |= workers
    provider = {
        "type": "external",
        "module": "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider",
        "gcs_address": gcs_address,
    }
    commands = ("setup", "head_setup", "worker_setup", "head_start_ray", "worker_start_ray", "initialization")
    return {f"{name}_commands": [] for name in commands} | {
        "cluster_name": shipped["cluster_name"],
        "max_workers": shipped["max_workers"],
        "auth": {},
        "file_mounts": {},
        "cluster_synced_files": [],
        "idle_timeout_minutes": idle_s / 60,
        "provider": provider,
        "head_node_type": HEAD_TYPE,
        "available_node_types": types,
    }


def sample(calls: Path) -> dict[str, Any]:
    """What there is now: nodes by type, replicas by state, running ones by pool, calls answered by the engine."""
    import ray
    from ray import serve

    nodes = Counter(node["Labels"].get("pool") for node in ray.nodes() if node["Alive"])
    states: Counter[str] = Counter()
    pools: dict[str, int] = {}
    for app in serve.status().applications.values():
        for name, deployment in app.deployments.items():
            found = {str(getattr(state, "value", state)): n for state, n in deployment.replica_states.items()}
            states.update(found)
            pools[name] = found.get("RUNNING", 0)
    done = calls.read_text().count("\n") if calls.exists() else 0
    return {"nodes": dict(nodes), "replicas": dict(states), "pools": pools, "calls": done, "at": time.time()}


def timeline(
    rows: int, delay_s: float, idle_s: float, least: int, most: int, long: str | None = None, work: Path | None = None
) -> tuple[int, list[dict[str, Any]]]:
    """Run a job on the cluster; its exit code and a sample each second, until all nodes but the head are gone.

    Args:
        least, most: replicas of the smallest pool.
        long: a row that needs two GPUs from its second step on; with a second pool for it.
        work: where the run's folder `out` is to be; None removes it.
    """
    pools: dict[str, Any] = {
        "single": {"num_gpus": 1, "labels": {"pool": "single"}, "replicas": {"min": least, "max": most}}
    }
    if long:
        pools["pair"] = {"num_gpus": 1, "labels": {"pool": "sharded"}, "tensor_parallel_size": 2}
    oom = {long: (2, 1)} if long else {}
    with tempfile.TemporaryDirectory() as name:
        folder, config = work or Path(name), Path(name) / "autoscaling.yaml"
        calls, run = folder / "calls", write_run(folder, rows)
        env = script(delay_s=delay_s, max_batch=8, count=str(calls), oom=oom) | {
            "RAY_FAKE_CLUSTER": "1",
            "RAY_enable_autoscaler_v2": "1",
            "RAY_CLOUD_INSTANCE_ID": HEAD,
            "RAY_OVERRIDE_NODE_ID_FOR_TESTING": HEAD,
            "RAY_NODE_TYPE_NAME": HEAD_TYPE,
            "AUTOSCALER_UPDATE_INTERVAL_S": "1",
        }

        def configure(gcs_address: str) -> None:
            config.write_text(yaml.safe_dump(autoscaling_config(gcs_address, idle_s)))

        options = [f"--autoscaling-config={config}", "--num-cpus=0", "--num-gpus=0", "--labels=pool=head"]
        with ray_cluster(*options, env=env, before=configure) as cluster:
            import ray

            os.environ["RAY_AUTH_MODE"] = "disabled"
            ray.init(cluster.address, log_to_driver=False, logging_level="ERROR")
            argv = [sys.executable, "-m", "pipeline", "run", str(run)]
            argv += ["--set", "ray.address=auto", "--set", "ray.labels.pool=agents"]
            argv += ["--set", f"pools={json.dumps(pools)}"]
            started = time.monotonic()
            samples: list[dict[str, Any]] = []
            log = sys.stderr
            with subprocess.Popen(argv, cwd=ROOT, env=cluster.env, stdout=log, stderr=log) as process:
                while time.monotonic() - started < GIVE_UP_S:
                    samples.append({"s": round(time.monotonic() - started, 1)} | sample(calls))
                    samples[-1]["running"] = process.poll() is None
                    if not samples[-1]["running"] and set(samples[-1]["nodes"]) <= {"head"}:
                        break
                    time.sleep(max(0.0, started + len(samples) - time.monotonic()))
                process.kill()
            ray.shutdown()
    return process.returncode, samples


def summarize(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """Seconds from the start to each change, and what there was at most."""

    def first(condition: Any) -> float | None:
        return next((one["s"] for one in samples if condition(one)), None)

    ended = first(lambda one: not one["running"])
    return {
        "gpu_node_s": first(lambda one: one["nodes"].get("single")),
        "replica_s": first(lambda one: one["replicas"].get("RUNNING")),
        "run_ended_s": ended,
        "no_replica_s": first(lambda one: ended is not None and one["s"] >= ended and not one["replicas"]),
        "no_node_s": first(lambda one: ended is not None and one["s"] >= ended and set(one["nodes"]) <= {"head"}),
        "most_gpu_nodes": max(one["nodes"].get("single", 0) for one in samples),
        "most_replicas": max(one["replicas"].get("RUNNING", 0) for one in samples),
        "most_other_gpu_nodes": max(one["nodes"].get("sharded", 0) for one in samples),
    }


def plot(samples: list[dict[str, Any]], least: int, most: int, path: Path) -> None:
    """Nodes, replicas and calls a second over time."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    at = [one["s"] for one in samples]
    figure, (nodes, replicas, calls) = pyplot.subplots(3, 1, sharex=True, figsize=(9, 6.5), height_ratios=(3, 2, 2))
    for name, label, colour, lift in (
        ("head", "head (no GPU, no CPU)", "#888888", 0.06),
        ("agents", "agents (CPU)", "#1f77b4", 0.0),
        ("single", "single (1 GPU)", "#d62728", -0.06),
        ("sharded", "sharded (4 GPUs)", "#9467bd", -0.12),
    ):
        if name == "sharded" and not any(one["nodes"].get(name) for one in samples):
            continue
        counts = [one["nodes"].get(name, 0) + lift for one in samples]
        nodes.step(at, counts, where="post", label=label, color=colour, linewidth=2)
    running = [one["replicas"].get("RUNNING", 0) for one in samples]
    waiting = [sum(one["replicas"].values()) for one in samples]
    replicas.fill_between(at, waiting, step="post", color="#ff7f0e", alpha=0.35, label="starting or stopping")
    replicas.fill_between(at, running, step="post", color="#2ca02c", alpha=0.8, label="running")
    rates = [0.0] * WINDOW
    for before, now in zip(samples, samples[WINDOW:], strict=False):
        rates.append((now["calls"] - before["calls"]) / max(0.1, now["s"] - before["s"]))
    calls.step(at, rates, where="post", color="#444444")
    ended = next((one["s"] for one in samples if not one["running"]), None)
    for axis, title in ((nodes, "nodes"), (replicas, "replicas"), (calls, "calls/s")):
        axis.set_ylabel(title)
        axis.grid(alpha=0.3)
        axis.set_ylim(-0.15 if axis is nodes else 0, axis.get_ylim()[1] * 1.35)
        if ended is not None:
            axis.axvline(ended, color="black", linestyle=":", linewidth=1)
    if ended is not None:
        nodes.annotate(
            "run complete",
            (ended, 1),
            xycoords=("data", "axes fraction"),
            xytext=(-4, -12),
            textcoords="offset points",
            ha="right",
        )
    for axis in (nodes, replicas):
        axis.yaxis.get_major_locator().set_params(integer=True)
        axis.legend(loc="upper left", frameon=False, fontsize=9)
    calls.set_xlabel("seconds since the command")
    figure.suptitle(f"A pool with replicas {{min: {least}, max: {most}}}: from zero GPUs and back")
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=400)
    parser.add_argument("--delay-s", type=float, default=1.0, help="of each call of the scripted engine")
    parser.add_argument("--idle-s", type=float, default=12.0, help="after which the autoscaler removes a node")
    parser.add_argument("--least", type=int, default=0, help="replicas")
    parser.add_argument("--replicas", type=int, default=2, help="at most")
    parser.add_argument("--long", help="id of a row that needs two GPUs, as q20/0")
    parser.add_argument("--work", type=Path, help="keep the run's folder in this one")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--plot", type=Path)
    args = parser.parse_args()
    code, samples = timeline(
        args.rows, args.delay_s, args.idle_s, args.least, args.replicas, args.long, args.work and args.work.resolve()
    )
    summary = summarize(samples)
    print_table("autoscaling", [summary])
    workload = {"rows": args.rows, "delay_s": args.delay_s, "idle_s": args.idle_s, "max_replicas": args.replicas}
    workload |= {"min_replicas": args.least, "long": args.long}
    write_json(
        args.out,
        "autoscaling",
        device=device_info("cpu"),
        workload=workload,
        results=[{"engine": "berth, scripted", "repeat": 0, "exit_code": code, "samples": samples}],
        summary={"berth, scripted": summary},
    )
    if args.plot:
        plot(samples, args.least, args.replicas, args.plot)
    if code:
        sys.exit(f"the run ended with exit code {code}")


if __name__ == "__main__":
    main()

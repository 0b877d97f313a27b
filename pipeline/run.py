"""One run from config to report: folder, manifest, rollouts, tables. Repeating it resumes it.

Decides nothing about Ray (rollout.py) and nothing about columns (tables.py).
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import json
import logging
import math
import os
import platform
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Collection, Generator, Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, replace
from datetime import UTC, datetime
from functools import partial
from itertools import groupby, starmap
from multiprocessing import get_context, parent_process
from operator import itemgetter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.dataset as ds
from pyarrow.fs import FileSelector, FileType

from actors.errors import Incomplete, InputError, RunConflict
from actors.messages import Numerics
from pipeline import __version__
from pipeline.config import RunConfig, dump
from pipeline.console import Screen, duration, eta
from pipeline.footprint import Forecaster, order
from pipeline.journal import Progress, records
from pipeline.lock import locked
from pipeline.preflight import Prepared, identity, limits_of
from pipeline.report import write_report
from pipeline.resume import attempts_so_far, clear_journal, failed_rows, reconcile, reopen, write_checkpoint
from pipeline.tables import (
    ATTEMPTS,
    REJECTS,
    RESULTS,
    TASKS,
    count_rows,
    filesystem,
    read_bytes,
    read_table,
    reject_row,
    rows_to_table,
    task_row,
    write_bytes,
    write_table,
)
from pipeline.tasks import packed

log = logging.getLogger("berth")

MANIFEST_ROWS = 4096
MANY_ROWS = 50_000
"""From here on reading the tables back takes more memory than a process costs time to start."""
WRITTEN = ("journal", "results", "tasks", "attempts", "rejects", "oom", "summary.json", "report.html")
"""What a run writes into its folder, after run.json."""
OOM_EVENTS = ("oom_prefill", "oom_decode")
RELIEF_EVENTS = ("prefill_halved", "batch_halved", "waits", "graph_drops", "pool_shrinks", "culprits")
BY_ATTEMPT = [("row_id", "ascending"), ("attempt", "ascending")]


def execute(prepared: Prepared, screen: Screen, retry: Collection[str] | None = None) -> dict[str, Any]:
    """Run to the end, or resume; the summary.

    Args:
        retry: do failed rows of these error types again (all types: empty); None leaves them.

    Raises:
        RunConflict: the folder is in use, holds another run, or is not a run's.
        Incomplete: stopped before the end; the same command resumes.
    """
    out, total = prepared.config.out, len(prepared.rows.tasks)
    check_folder(out, prepared.suite.folder)
    with locked(out, stop_on_loss(screen), lambda said: screen.line("lock", said)):
        info = open_folder(prepared)
        left = missing(prepared, reconcile(out, lambda said: screen.line("damaged", said)))
        if retry is not None:
            again = failed_rows(out, retry)
            screen.line("retry", f"{len(again):,} failed rows are done again")
            if again:
                info |= {"finished_at": None}
                write_json(info, f"{out}/run.json")
                reopen(out, again)
                left += len(again)
        if not left and info.get("finished_at"):
            screen.line("run", f"already complete: {total:,} rows in {out}; nothing to do")
            return summary_of(out)
        if left:
            learned = forecaster(prepared)
            write_manifest(prepared, learned)
            give_back()
            roll_out(prepared, learned, info, screen)
        return finish(prepared, info)


def summary_of(out: str) -> dict[str, Any]:
    """summary.json of a finished run; written again where it is missing or damaged."""
    try:
        found = json.loads(read_bytes(f"{out}/summary.json") or b"")
    except ValueError:
        found = None
    return found if isinstance(found, dict) and found else write_report(out)


def check_folder(out: str, suite: Path) -> None:
    """Refuse a folder of the user's own, in which a run would take files for its own.

    Raises:
        RunConflict: it is the suite's, or holds what a run writes and no run.json.
    """
    if "://" not in out and Path(out).resolve() == suite.resolve():
        raise RunConflict("is the suite's own folder", field="out", got=out, wants="another folder with --out")
    try:
        found = [] if _exists(f"{out}/run.json") else [name for name in WRITTEN if _exists(f"{out}/{name}")]
    except OSError as e:
        raise InputError(f"not readable: {e}", field="out", got=out) from e
    if found:
        raise RunConflict(
            f"holds {', '.join(found)} and no run.json, so these files are not known to be a run's",
            field="out",
            got=out,
            wants="another folder with --out",
        )


def missing(prepared: Prepared, done: pa.Array) -> int:
    """Number of the run's rows that are not done.

    Raises:
        RunConflict: rows are done that are not the run's.
    """
    mine, done = prepared.rows.tasks.table["row_id"].combine_chunks(), done.unique()
    foreign = pa.table({"row_id": done}).filter(~ds.field("row_id").isin(mine))["row_id"].to_pylist()
    if foreign:
        raise RunConflict(
            f"{len(foreign):,} rows are not of this run, as {min(map(str, foreign))!r}",
            file=f"{prepared.config.out}/results",
            wants="another folder with --out",
        )
    return len(mine) - len(done)


def open_folder(prepared: Prepared) -> dict[str, Any]:
    """run.json of this run: a new one, or the one there, if it is of the same run."""
    path = f"{prepared.config.out}/run.json"
    mine = identity(prepared)
    found = read_bytes(path)
    if found is None:
        info = {
            "berth": __version__,
            "identity": mine,
            "config": dump(prepared.config),
            "suite": dump(prepared.suite.config),
            "facts": asdict(prepared.facts),
            "versions": versions(),
            "commit": commit(),
            "hardware": {"host": platform.node(), "cpus": os.cpu_count(), "machine": platform.machine()},
            "started_at": now(),
        }
        try:
            write_json(info, path)
        except OSError as e:
            raise InputError(f"not writable: {e}", field="out", got=prepared.config.out) from e
        if prepared.rows.rejects:
            rejects = [reject_row(r.file, r.line, r.field, r.reason, r.raw) for r in prepared.rows.rejects]
            write_table(rows_to_table(rejects, REJECTS), f"{prepared.config.out}/rejects/rejects.parquet")
        return info
    info = run_info(prepared.config.out)
    if info["identity"] != mine:
        raise RunConflict(
            "the folder holds another run:\n" + difference(info["identity"], mine),
            file=prepared.config.out,
            wants="the same config, another folder with --out, or --force-new (for other scorers: berth score)",
        )
    return info


def beside(prepared: Prepared) -> Prepared:
    """The run in its own folder, or in the first of DIR-2, DIR-3, … that is free or holds this very run."""
    out, count = prepared.config.out, 1
    while read_bytes(f"{out}/run.json") is not None and run_info(out)["identity"] != identity(prepared):
        count += 1
        out = f"{prepared.config.out}-{count}"
    return replace(prepared, config=prepared.config.model_copy(update={"out": out}))


def error_types(text: str | None) -> tuple[str, ...] | None:
    """`--retry-failed`: the named types, none of them for `all`; None where it was not given."""
    if text is None or text == "all":
        return None if text is None else ()
    names = tuple(part.strip() for part in text.split(","))
    for name in names:
        if name not in ("model", "tool", "infra"):
            raise InputError("no such type of error", field="--retry-failed", got=name, wants="all, model, tool, infra")
    return names


def difference(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> str:
    """Dotted fields that differ, a line each."""
    lines: list[str] = []
    for name in sorted(old.keys() | new.keys()):
        before, after = old.get(name), new.get(name)
        if isinstance(before, dict) and isinstance(after, dict):
            if text := difference(before, after, f"{prefix}{name}."):
                lines.append(text)
        elif before != after:
            lines.append(f"  {prefix}{name}: was {before!r}, is now {after!r}")
    return "\n".join(lines)


def write_manifest(prepared: Prepared, learned: Forecaster) -> None:
    """The tasks with their forecasts as Parquet, largest first, once: Ray Data reads this, and resumes by it."""
    out, tasks = prepared.config.out, prepared.rows.tasks
    if count_rows(f"{out}/tasks", TASKS) == len(tasks):
        return
    rows = starmap(task_row, order(tasks, learned, prepared.prompt_tokens))
    for part, some in enumerate(packed(rows, MANIFEST_ROWS)):
        write_table(rows_to_table(some, TASKS), f"{out}/tasks/tasks-{part:06d}.parquet")


def longest(out: str) -> int:
    """Tokens of the run's longest row at its peak, by the manifest's forecasts at 95 %."""
    return max(read_table(f"{out}/tasks", TASKS, ["p95_tokens"])["p95_tokens"].to_pylist(), default=0)


def _eight_bit(numerics: Numerics) -> str:
    parts = (("KV", numerics.kv_dtype), ("weights", numerics.weights_dtype))
    return "".join(f", {what} {dtype}" for what, dtype in parts if dtype != numerics.dtype)


def forecaster(prepared: Prepared) -> Forecaster:
    """A forecaster that has learned from the run folders beside this run's: rows of the same suite and model."""
    found, parent = untaught(prepared), prepared.config.out.rstrip("/").rpartition("/")[0]
    fs, path = filesystem(parent)
    try:
        beside = fs.get_file_info(FileSelector(path, allow_not_found=True))
        folders = sorted(f"{parent}/{info.base_name}" for info in beside if info.type == FileType.Directory)
    except OSError as e:
        log.warning("no forecasts from the runs in %s: %s", parent, e)
        return found
    for folder in folders:
        try:
            if _exists(f"{folder}/run.json"):
                found.learn_from_tables(f"{folder}/results", prepared.facts, prepared.model_revision)
        except (OSError, pa.ArrowException) as e:  # another run's tables, or private folder, must not stop this one
            log.warning("no forecasts from %s: %s", folder, e)
    return found


def untaught(prepared: Prepared) -> Forecaster:
    """A forecaster that knows the suite's prior and limits, and no row yet."""
    suite = prepared.suite.config
    limits = limits_of(prepared.config, prepared.suite, prepared.model_len)
    return Forecaster(limits, prepared.shared_tokens, suite.prior, suite.report_by)


def _exists(uri: str) -> bool:
    fs, path = filesystem(uri)
    return fs.get_file_info(path).type != FileType.NotFound


def roll_out(prepared: Prepared, learned: Forecaster, info: dict[str, Any], screen: Screen) -> None:
    """Start Ray and the replicas, roll out what is missing, stop them."""
    import ray
    from ray import serve

    from pipeline import pools, rollout

    config = prepared.config
    app = rollout.app_name(config.out)
    with exit_on_signal(screen):
        started = time.monotonic()
        screen.line("ray", "starting" if config.ray.address is None else f"joining {config.ray.address}")
        rollout.start_ray(config)
    keeper: Any = None
    with exit_on_signal(screen):  # again: Ray has put its own handlers in
        try:
            # Again: writers of a killed run on the cluster may have ended one more part by now.
            done = reconcile(config.out, lambda said: screen.line("damaged", said))
            write_checkpoint(config.out, done)
            journal = rollout.start_journal(config, attempts_so_far(config.out, done))
            if config.ray.address is not None:
                keeper = rollout.keep(app, journal)
            screen.line("model", f"loading {config.model.id} into the {config.engine} engine")
            served = pools.deploy(
                config,
                app,
                rollout.ledger_name(app),
                lambda said: screen.line("memory", said),
                lambda: longest(config.out),
            )
            leases = rollout.start_ledger(app, served)
            numerics, capacity = served.numerics, served.capacity
            screen.line(
                "replicas",
                f"{served.replicas} ready after {duration(time.monotonic() - started)}: "
                f"{numerics.dtype}{_eight_bit(numerics)}, attention {numerics.kernel}, "
                f"context {capacity.max_model_len:,} tokens, batch {capacity.max_batch}",
            )
            same_precision(info, numerics, len(done), config.out)
            info["numerics"] = asdict(numerics)
            info["gpus"] = rollout.cluster_gpus()
            info["rungs_at_start"] = list(served.rungs)
            info["kv_page_bytes"] = capacity.kv_bytes_token * capacity.page_tokens
            write_json(info, f"{config.out}/run.json")
            job, agents = rollout.plan_agents(prepared, learned, app, served)
            share = pools.sharing(app, served.pools, leases, lambda said: screen.line("pools", said))
            left = len(prepared.rows.tasks) - len(done)
            work = partial(rollout.rollouts, job, journal, leases, agents, left)
            _roll(work, journal, share, len(done), prepared, screen)
            info["engine_events"] = rollout.engine_events(leases)
            for said in shortages(info["engine_events"]):
                screen.line("memory", said)
            ray.get(journal.settled.remote())
        finally:
            if keeper is not None:
                ray.kill(keeper)
            serve.shutdown() if config.ray.address is None else serve.delete(app)
            ray.shutdown()


def same_precision(info: Mapping[str, Any], numerics: Numerics, done: int, out: str) -> None:
    """Rows of two precisions would share one mean.

    Args:
        info: run.json, with what the rows that are done were computed with.
        done: their number.

    Raises:
        RunConflict: this start computes in another precision, say since another rung of the fallback was taken.
    """
    before = info.get("numerics") if done else None
    names = ("dtype", "kv_dtype", "weights_dtype")
    differ = [name for name in names if before and before.get(name) != getattr(numerics, name)]
    if before and differ:
        raise RunConflict(
            f"{done:,} rows are done in another precision",
            field=", ".join(differ),
            got=", ".join(str(getattr(numerics, name)) for name in differ),
            wants=f"{', '.join(str(before.get(name)) for name in differ)} (model.dtype, memory.kv_dtype, "
            f"model.quantization), or another folder than {out}",
        )


def _roll(work: Any, journal: Any, share: Callable[[], None], before: int, prepared: Prepared, screen: Screen) -> None:
    """Do the work in a thread, show progress and share the GPUs beside it; `before` rows are in results/ already."""
    import ray

    from pipeline import rollout

    config, total = prepared.config, len(prepared.rows.tasks)
    failure: list[BaseException] = []

    def guarded() -> None:
        try:
            work()
        except BaseException as e:
            failure.append(e)

    thread = threading.Thread(target=guarded, name="ray-data", daemon=True)
    started = time.monotonic()
    # A run that was finished has left its journal; rows that are done again have a new one.
    counted: Any = ray.get(journal.counts.remote())
    elsewhere = max(0, before - counted.resumed)
    thread.start()
    with screen.progress(total) as show:

        def report(counts: Progress) -> None:
            elapsed = time.monotonic() - started
            done = counts.finished
            mean = f"score {counts.score_sum / done:.3f}  " if done else ""
            failed = f"{counts.failed} failed  " if counts.failed else ""
            left = eta(elsewhere + done, elsewhere + counts.resumed, total, elapsed)
            show(elsewhere + done, f"{counts.running} running  {mean}{failed}{left}")

        rollout.watch(journal, report, share, lambda: not thread.is_alive(), budget(config, rollout.cluster_gpus))
    if failure:
        raise rollout.explained(failure[0]) from failure[0]


def budget(config: RunConfig, gpus: Callable[[], int]) -> Callable[[], bool]:
    """Whether `max_hours` or `max_usd` is reached: to be asked about once a second, as GPUs come and go.

    Args:
        gpus: GPUs that the cluster has now.
    """
    limits, price = config.limits, config.price.usd_per_gpu_hour or 0.0
    started = last = time.monotonic()
    usd = 0.0

    def reached() -> bool:
        nonlocal last, usd
        before, last = last, time.monotonic()
        if limits.max_usd:
            usd += price * gpus() * (last - before) / 3600
        hours = (last - started) / 3600
        return hours >= (limits.max_hours or math.inf) or usd >= (limits.max_usd or math.inf)

    return reached


def apart(rows: int, work: Callable[..., Any], *arguments: Any) -> Any:
    """What `work` gives; where a run has many rows, from a process of its own, whose memory is then free again."""
    if rows < MANY_ROWS:
        return work(*arguments)
    with ProcessPoolExecutor(1, get_context("spawn"), _end_with_parent) as process:
        return process.submit(work, *arguments).result()


def give_back() -> None:
    """Hand what is free of this process's memory back to the machine: checking 10⁶ rows leaves some 0.5 GB."""
    pa.default_memory_pool().release_unused()
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):  # glibc's
        trim(0)


def _end_with_parent() -> None:
    """A run that is killed holds its folder no longer: nothing of it may write there."""
    parent = parent_process()
    assert parent is not None

    def wait() -> None:
        parent.join()
        os._exit(3)

    threading.Thread(target=wait, name="parent", daemon=True).start()


def shortages(events: Mapping[str, Mapping[str, int]]) -> list[str]:
    """A line for each pool whose engines ran out of memory and went on: how often, what they did about it, and
    the folder in the run's own where that is recorded."""
    lines: list[str] = []
    for pool, times in events.items():
        if count := sum(times.get(name, 0) for name in OOM_EVENTS):
            told = ", ".join(f"{name} {times[name]}" for name in (*OOM_EVENTS, *RELIEF_EVENTS) if times.get(name))
            recorded = "; recorded in oom/" if times.get("oom_recorded") else ""
            lines.append(f"{pool}: {count:,} steps ran out of memory: {told}{recorded}")
    return lines


def tell_attempts(out: str, page_bytes: int) -> None:
    """attempts/ from the journal, which must have settled."""
    write_attempts(out, records(f"{out}/journal"), page_bytes)


def write_attempts(out: str, records: pa.Table, page_bytes: int = 0) -> None:
    """attempts/ from the journal's records, beside what is there: one row for each attempt that began.

    Args:
        records: see `journal.records`.
        page_bytes: KV bytes a page; 0 for an engine without pages.
    """
    told = (row for batch in records.sort_by(BY_ATTEMPT).to_batches(MANIFEST_ROWS) for row in batch.to_pylist())
    attempts = (_attempt_row(list(some), page_bytes) for _, some in groupby(told, itemgetter("row_id", "attempt")))
    packs = [rows_to_table(pack, ATTEMPTS) for pack in packed(filter(None, attempts), MANIFEST_ROWS)]
    new = pa.concat_tables([ATTEMPTS.empty_table(), *packs])
    keys = ["row_id", "attempt"]
    before = read_table(f"{out}/attempts", ATTEMPTS).join(new.select(keys), keys, join_type="left anti")
    write_table(pa.concat_tables([before.cast(ATTEMPTS), new]), f"{out}/attempts/attempts.parquet")


def _attempt_row(records: list[dict[str, Any]], page_bytes: int) -> dict[str, Any] | None:
    """The row of one attempt; None where its start is not on record."""
    start = next((record for record in records if record["kind"] == "begin"), None)
    end = next((record for record in records if record["kind"] != "begin"), None)
    if start is None:
        return None
    row = dict.fromkeys(ATTEMPTS.names) | {name: start[name] for name in ("row_id", "attempt", "pool", "rung")}
    row |= {"started_at": datetime.fromtimestamp(start["at"], UTC), "predicted_bytes": start["predicted_bytes"]}
    if end is None:
        return row | {"outcome": "lost"}
    return row | {
        "ended_at": datetime.fromtimestamp(end["at"], UTC),
        "replica": end["replica"],
        "pool": end["pool"] or start["pool"],
        "outcome": end["status"] or "failed",
        "cause": end["cause"],
        "kv_pages": -(-end["kv_bytes"] // page_bytes) if page_bytes and end["kv_bytes"] else None,
        "allocated_bytes": end["allocated_bytes"],
        "reserved_bytes": end["reserved_bytes"],
        "nvml_used_bytes": end["used_bytes"],
        "gpu_s": end["gpu_s"],
        "lost_gpu_s": end["lost_gpu_s"],
    }


def finish(prepared: Prepared, info: dict[str, Any]) -> dict[str, Any]:
    """Write attempts/; see that no row is missing, write run.json, summary.json and report.html, clear the journal."""
    out, total = prepared.config.out, len(prepared.rows.tasks)
    apart(total, tell_attempts, out, info.get("kv_page_bytes", 0))
    if left := missing(prepared, read_table(f"{out}/results", RESULTS, ["row_id"])["row_id"]):
        raise Incomplete(f"{total - left:,} of {total:,} rows are done; repeat the command to resume")
    finished = info | {"finished_at": now()}
    write_json(finished | {"finished_at": None}, f"{out}/run.json")
    summary = apart(total, write_report, out)
    write_json(finished, f"{out}/run.json")
    clear_journal(out)
    return summary


@contextmanager
def exit_on_signal(screen: Screen) -> Generator[None]:
    """SIGTERM and SIGINT end the process at once with exit code 3: all that is finished is on storage."""

    def leave(number: int, _: object) -> None:
        screen.error(f"{signal.Signals(number).name}: stopped; repeat the command to resume")
        os._exit(3)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, leave) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def stop_on_loss(screen: Screen) -> Callable[[InputError], None]:
    """End the process at once with exit code 2 when the run folder is no longer this run's."""

    def leave(error: InputError) -> None:
        screen.error(f"stopped: {error}")
        os._exit(2)

    return leave


def run_info(folder: str) -> dict[str, Any]:
    """run.json of a run folder.

    Raises:
        InputError: there is none, or it is not what a run writes.
    """
    found = read_bytes(f"{folder}/run.json")
    if found is None:
        raise InputError("no run.json in it", field="folder", got=folder, wants="the run folder of a run")
    try:
        info = json.loads(found)
    except ValueError as e:
        raise InputError(f"not JSON: {e}", file=f"{folder}/run.json") from e
    if not isinstance(info, dict) or not all(
        isinstance(info.get(name), dict) for name in ("identity", "config", "suite")
    ):
        raise InputError("not what a run writes", file=f"{folder}/run.json")
    return info


@contextmanager
def opened(folder: str) -> Generator[None]:
    """Work on a run folder whose tables may be damaged, and which may not be ours to write.

    Raises:
        InputError: it is no run folder, or a file in it cannot be read or written.
    """
    run_info(folder)
    try:
        yield
    except (OSError, pa.ArrowInvalid) as e:
        raise InputError(str(e), file=folder, wants="tables that can be read, in a folder that can be written") from e


def versions() -> dict[str, str]:
    """Versions of what decides the numbers."""
    names = ("ray", "torch", "triton", "transformers", "tokenizers", "flash-attn", "pyarrow", "pandas")
    found = {"python": platform.python_version()}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def commit() -> str | None:
    """The commit of this checkout, `+` behind it where files differ; None outside a checkout."""
    here = Path(__file__).parent
    try:
        head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, check=True)
        dirty = subprocess.run(["git", "status", "--porcelain"], cwd=here, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return head.stdout.strip() + ("+" if dirty.stdout.strip() else "")


def write_json(data: Any, uri: str) -> None:
    """Readable JSON that appears whole or not at all."""
    write_bytes((json.dumps(data, indent=2, ensure_ascii=False, default=str) + "\n").encode("utf-8"), uri)


def now() -> str:
    """UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")

import json
import os
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import psutil
import pyarrow as pa
import pytest

from actors.errors import Incomplete, InputError, RunConflict
from actors.messages import Numerics, Task
from pipeline import run as module
from pipeline.config import RunConfig
from pipeline.console import eta
from pipeline.journal import RECORDS
from pipeline.run import budget, difference, error_types, run_info, same_precision, shortages, write_attempts
from pipeline.tables import ATTEMPTS, read_table
from pipeline.tasks import Tasks

ROOT = Path(__file__).resolve().parents[2]


def config(**changes):
    return RunConfig.model_validate({"suite": "s", "out": "o", "model": {"id": "m"}} | changes)


def run_of_three(tmp_path):
    tasks = Tasks(Task(name, 0, "?", ("x",), {}, {}, 0) for name in "abc")
    suite = SimpleNamespace(folder=tmp_path / "suite")
    return SimpleNamespace(config=config(out=str(tmp_path / "out")), rows=SimpleNamespace(tasks=tasks), suite=suite)


def test_difference_names_fields():
    old, new = {"a": {"b": 1, "c": 2}, "d": 3}, {"a": {"b": 1, "c": 9}, "d": 3, "e": None, "f": 0}
    assert difference(old, new).splitlines() == ["  a.c: was 2, is now 9", "  f: was None, is now 0"]


def test_limits_of_time_and_money(monkeypatch):
    now = 0.0
    monkeypatch.setattr(module.time, "monotonic", lambda: now)
    there = 0
    endless = budget(config(), lambda: there)
    timed = budget(config(limits={"max_hours": 3}), lambda: there)
    priced = budget(config(limits={"max_usd": 7.5}, price={"usd_per_gpu_hour": 2}), lambda: there)
    now = 2 * 3600.0
    assert (endless(), timed(), priced()) == (False, False, False)
    there = 4  # GPUs that came later cost from then on: 8 dollars in an hour
    now = 2.9 * 3600.0
    assert (endless(), timed(), priced()) == (False, False, False)
    now = 3 * 3600.0
    assert (endless(), timed(), priced()) == (False, True, True)


@pytest.mark.parametrize("content", ["{", "[]", "{}", None])
def test_a_folder_that_is_no_run_is_named(tmp_path, content):
    if content is not None:
        (tmp_path / "run.json").write_text(content)
    with pytest.raises(InputError, match=r"run\.json"):
        run_info(str(tmp_path))


def record(kind, attempt, **more):
    place = {"pool": "single", "rung": "start"} if kind == "begin" else {"replica": "r"}
    return {"kind": kind, "row_id": "a/0", "attempt": attempt, "at": 1.0 + attempt} | place | more


def records(*told):
    return pa.Table.from_pylist(list(told), schema=RECORDS)


def test_attempts_tell_what_became_of_each(tmp_path):
    write_attempts(
        str(tmp_path),
        records(
            record("begin", 1),
            record("fail", 1, cause="ActorDiedError: gone"),
            record("begin", 2),
            record("begin", 3),
            record("fail", 3, cause="EngineDead: dead"),
            record("finish", 3, status="failed"),
            record("begin", 4),
            record("finish", 4, status="ok"),
        ),
    )
    rows = read_table(tmp_path / "attempts", ATTEMPTS).to_pylist()
    assert [(row["outcome"], row["cause"]) for row in rows] == [
        ("failed", "ActorDiedError: gone"),
        ("lost", None),
        ("failed", "EngineDead: dead"),
        ("ok", None),
    ]


def test_only_what_is_missing_is_rolled_out(tmp_path, monkeypatch):
    prepared, rolled = run_of_three(tmp_path), []
    monkeypatch.setattr(module, "open_folder", lambda prepared: {"identity": {}, "config": {}, "suite": {}})
    monkeypatch.setattr(module, "reconcile", lambda *_: pa.array(["a/0", "b/0"]))
    monkeypatch.setattr(module, "forecaster", lambda _: None)
    monkeypatch.setattr(module, "write_manifest", lambda *_: None)
    monkeypatch.setattr(module, "roll_out", lambda *_: rolled.append(1))
    with pytest.raises(Incomplete, match="0 of 3 rows"):
        module.execute(prepared, SimpleNamespace(line=lambda *_: None))
    assert rolled


def test_a_damaged_part_does_not_keep_failed_rows_from_being_done_again(tmp_path, monkeypatch):
    prepared, rolled = run_of_three(tmp_path), []
    (tmp_path / "out" / "results").mkdir(parents=True)
    (tmp_path / "out" / "results" / "p.parquet").write_bytes(b"cut short")
    (tmp_path / "out" / "run.json").write_text(json.dumps({"identity": {}, "config": {}, "suite": {}}))
    monkeypatch.setattr(module, "identity", lambda _: {})
    monkeypatch.setattr(module, "forecaster", lambda _: None)
    monkeypatch.setattr(module, "write_manifest", lambda *_: None)
    monkeypatch.setattr(module, "roll_out", lambda *_: rolled.append(1))
    with pytest.raises(Incomplete, match="0 of 3 rows"):
        module.execute(prepared, SimpleNamespace(line=lambda *_: None), retry=())
    assert rolled


def test_all_rows_without_a_summary_only_need_the_report(tmp_path, monkeypatch):
    prepared = run_of_three(tmp_path)
    monkeypatch.setattr(module, "open_folder", lambda prepared: {"identity": {}, "config": {}, "suite": {}})
    monkeypatch.setattr(module, "reconcile", lambda *_: pa.array(["a/0", "b/0", "c/0"]))
    results = pa.table({"row_id": ["a/0", "b/0", "c/0"]})
    monkeypatch.setattr(module, "read_table", lambda *_: results)
    told = []
    monkeypatch.setattr(module, "tell_attempts", lambda *arguments: told.append(arguments))
    monkeypatch.setattr(module, "write_report", lambda out: {"rows": pa.scalar(3).as_py()})
    monkeypatch.setattr(module, "roll_out", lambda *_: pytest.fail("nothing is left to roll out"))
    assert module.execute(prepared, SimpleNamespace(line=lambda *_: None)) == {"rows": 3}
    assert told == [(prepared.config.out, 0)]
    assert run_info(prepared.config.out)["finished_at"]


@pytest.mark.parametrize("name", ["journal/notes.jsonl", "results/mine.parquet", "tasks/mine", "report.html"])
def test_a_folder_of_the_users_own_is_refused_and_left_as_it_is(tmp_path, name):
    prepared = run_of_three(tmp_path)
    file = tmp_path / "out" / name
    file.parent.mkdir(parents=True)
    file.write_text("mine")
    with pytest.raises(RunConflict, match=rf"out: holds {name.partition('/')[0]} and no run\.json"):
        module.execute(prepared, SimpleNamespace(line=lambda *_: None))
    assert [path for path in (tmp_path / "out").rglob("*") if path.is_file()] == [file]


def test_the_suites_own_folder_is_refused(tmp_path):
    with pytest.raises(RunConflict, match="the suite's own folder"):
        module.check_folder(f"{tmp_path}/x/..", tmp_path)


@pytest.mark.parametrize("content", [None, "", "{", "[]", "{}", "\udcff"])
def test_a_summary_that_is_lost_or_damaged_is_written_again(tmp_path, monkeypatch, content):
    monkeypatch.setattr(module, "write_report", lambda out: {"written": out})
    (tmp_path / "summary.json").write_text('{"rows": 3}')
    assert module.summary_of(str(tmp_path)) == {"rows": 3}
    (tmp_path / "summary.json").unlink()
    if content is not None:
        (tmp_path / "summary.json").write_text(content, errors="surrogateescape")
    assert module.summary_of(str(tmp_path)) == {"written": str(tmp_path)}


def test_rows_of_another_run_are_not_taken_for_ones_own(tmp_path):
    with pytest.raises(RunConflict, match="1 rows are not of this run, as 'x/0'"):
        module.missing(run_of_three(tmp_path), pa.array(["a/0", "b/0", "x/0"]))


def test_a_private_folder_beside_the_run_does_not_stop_it(tmp_path, monkeypatch, caplog):
    def exists(uri):
        if uri.endswith("/private/run.json"):
            raise PermissionError(uri)
        return True

    learned = []
    fake = SimpleNamespace(learn_from_tables=lambda folder, *_: learned.append(folder))
    monkeypatch.setattr(module, "untaught", lambda _: fake)
    monkeypatch.setattr(module, "_exists", exists)
    for name in ("open", "private"):
        (tmp_path / name).mkdir()
    prepared = SimpleNamespace(config=config(out=str(tmp_path / "out")), facts=None, model_revision="r")
    assert module.forecaster(prepared) is fake
    assert learned == [f"{tmp_path}/open/results"]
    assert "private" in caplog.text


def test_attempts_tell_what_was_predicted_and_what_was_used(tmp_path):
    begun = record("begin", 1) | {"predicted_bytes": 4096}
    ended = record("finish", 1, status="ok", gpu_s=0.5, kv_bytes=2049)
    ended |= {"allocated_bytes": 7, "reserved_bytes": 8, "used_bytes": 9}
    write_attempts(str(tmp_path), records(begun, ended), 1024)
    [row] = read_table(tmp_path / "attempts", ATTEMPTS).to_pylist()
    assert (row["allocated_bytes"], row["reserved_bytes"], row["nvml_used_bytes"]) == (7, 8, 9)
    assert (row["predicted_bytes"], row["kv_pages"], row["gpu_s"]) == (4096, 3, 0.5)


def test_many_rows_are_read_back_in_a_process_of_its_own(tmp_path):
    assert module.apart(module.MANY_ROWS - 1, os.getpid) == os.getpid()
    assert module.apart(module.MANY_ROWS, os.getpid) != os.getpid()
    with pytest.raises(InputError, match=r"no run\.json"):
        module.apart(module.MANY_ROWS, run_info, str(tmp_path))


PARENT = """
import time
from pipeline import run
if __name__ == "__main__":
    run.apart(run.MANY_ROWS, time.sleep, 600)
"""


def test_the_process_of_its_own_ends_with_a_run_that_is_killed(tmp_path):
    (tmp_path / "parent.py").write_text(PARENT)
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    parent = psutil.Popen([sys.executable, str(tmp_path / "parent.py")], env=env)
    try:
        children: list[psutil.Process] = []
        while len(children) < 2 and parent.is_running():  # the resource tracker, and the one that works
            children = parent.children(recursive=True)
            time.sleep(0.1)
        time.sleep(3)
        parent.kill()
        parent.wait()
        assert psutil.wait_procs(children, timeout=10)[1] == []
    finally:
        if parent.is_running():
            parent.kill()


def test_attempts_of_earlier_runs_stay(tmp_path):
    first = records(record("begin", 1), record("fail", 1, cause="gone"))
    write_attempts(str(tmp_path), first)
    write_attempts(str(tmp_path), records(record("begin", 2), record("finish", 2, status="ok")))
    rows = read_table(tmp_path / "attempts", ATTEMPTS).to_pylist()
    assert [(row["attempt"], row["outcome"]) for row in rows] == [(1, "failed"), (2, "ok")]


@pytest.mark.parametrize(("text", "types"), [(None, None), ("all", ()), ("infra, tool", ("infra", "tool"))])
def test_types_of_error_to_retry(text, types):
    assert error_types(text) == types


def test_an_unknown_type_of_error_is_named():
    with pytest.raises(InputError, match=r"--retry-failed.*gpu"):
        error_types("gpu")


def test_another_run_starts_beside_what_is_there(tmp_path, monkeypatch):
    @dataclass(frozen=True)
    class Fake:
        config: object

    monkeypatch.setattr(module, "identity", lambda prepared: {"mine": True})
    for name, mine in (("out", False), ("out-2", False), ("out-3", True)):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "run.json").write_text(json.dumps({"identity": {"mine": mine}, "config": {}, "suite": {}}))
    found = module.beside(Fake(config(out=str(tmp_path / "out"))))
    assert found.config.out == str(tmp_path / "out-3")


def test_shortages_are_told_by_pool_where_there_were_any():
    events = {"single": {"waits": 4, "oom_decode": 1, "oom_prefill": 2, "drafted": 9}, "pair": {"preemptions": 3}}
    said = "single: 3 steps ran out of memory: oom_prefill 2, oom_decode 1, waits 4"
    assert shortages(events) == [said]
    events["single"]["oom_recorded"] = 2
    assert shortages(events) == [f"{said}; recorded in oom/"]


def test_a_resumed_run_does_not_mix_precisions():
    told = Numerics("paged", "triton", "bfloat16", "bfloat16", "bfloat16", 1, "m", False)
    info, int8 = {"numerics": asdict(told)}, replace(told, kv_dtype="int8")
    same_precision({}, told, 5, "out")
    same_precision(info, int8, 0, "out")
    same_precision(info, replace(told, kernel="flash_attn", tp=2), 5, "out")
    with pytest.raises(
        RunConflict, match=r"5 rows are done in another precision.*got 'int8'.*wants bfloat16.*kv_dtype"
    ):
        same_precision(info, int8, 5, "out")


@pytest.mark.parametrize(
    ("done", "before", "said"),
    [(300, 300, "ETA 0 s"), (0, 0, "ETA ?"), (104, 100, "ETA ?"), (120, 100, "ETA 1 min 30 s")],
)
def test_the_time_left_is_told_even_where_all_rows_were_done_before(done, before, said):
    assert eta(done, before, 300, 10.0) == said

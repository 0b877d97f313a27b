import asyncio
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from actors.errors import RunConflict
from pipeline.journal import RECORDS, Journal
from pipeline.resume import attempts_so_far, clear_journal, failed_rows, reconcile, reopen, write_checkpoint
from pipeline.run import tell_attempts, write_attempts

NONE = pa.array([], pa.string())
ROW = {
    "pool": "p",
    "error": None,
    "status": "failed",
    "score": 0.0,
    "generated_tokens": 5,
    "prefilled_tokens": 7,
    "reused_tokens": 2,
}


def part(out: Path, name: str, *rows: tuple[str, str, str | None]) -> Path:
    """A results part of (row_id, status, error_type) rows."""
    ids, statuses, kinds = zip(*rows, strict=True)
    path = out / "results" / f"{name}.parquet"
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"row_id": ids, "status": statuses, "error_type": pa.array(kinds, pa.string())}), path)
    return path


def ids_in(folder: Path) -> list[str]:
    return sorted(row for path in folder.glob("*.parquet") for row in pq.read_table(path)["row_id"].to_pylist())


def test_all_well_changes_nothing(tmp_path):
    path = part(tmp_path, "p", ("a/0", "ok", None), ("b/0", "ok", None))
    before = path.stat().st_mtime_ns
    assert set(reconcile(str(tmp_path), pytest.fail).to_pylist()) == {"a/0", "b/0"}
    assert path.stat().st_mtime_ns == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["results"]


def test_nothing_yet(tmp_path):
    assert set(reconcile(str(tmp_path), pytest.fail).to_pylist()) == set()


@pytest.mark.parametrize("keep", [0, 1, 3, 100, -1])
def test_a_part_cut_short_is_set_aside_and_told(tmp_path, keep):
    part(tmp_path, "p", ("a/0", "ok", None))
    cut = part(tmp_path, "q", ("b/0", "ok", None))
    cut.write_bytes(cut.read_bytes()[:keep])
    told: list[str] = []
    assert set(reconcile(str(tmp_path), told.append).to_pylist()) == {"a/0"}
    assert "q.parquet" in told[0]
    assert ids_in(tmp_path / "results") == ["a/0"]
    assert (tmp_path / "journal/damaged/q.parquet.damaged").exists()


def test_a_table_that_is_not_a_runs_is_left_where_it_is(tmp_path):
    path = tmp_path / "results" / "mine.parquet"
    path.parent.mkdir()
    pq.write_table(pa.table({"x": [1]}), path)
    with pytest.raises(RunConflict, match=r"mine\.parquet: .*no row_id"):
        reconcile(str(tmp_path), pytest.fail)
    assert path.exists()


@pytest.mark.parametrize("foreign", [None, "damaged/q.parquet.damaged", "notes.jsonl"])
def test_of_the_journal_only_what_a_run_wrote_is_removed(tmp_path, foreign):
    async def earlier() -> None:
        await Journal(f"{tmp_path}/journal").begin("a/0", "p", "r")

    asyncio.run(earlier())
    write_checkpoint(str(tmp_path), pa.array(["a/0"]))
    folder = tmp_path / "journal"
    if foreign:
        (folder / foreign).parent.mkdir(exist_ok=True)
        (folder / foreign).write_text("{}")
    clear_journal(str(tmp_path))
    clear_journal(str(tmp_path))
    files = [str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()]
    assert files == ([foreign] if foreign else [])
    assert folder.exists() == bool(foreign)


def test_a_row_that_stands_twice_is_kept_once(tmp_path):
    part(tmp_path, "p", ("a/0", "ok", None), ("b/0", "ok", None))
    part(tmp_path, "q", ("b/0", "ok", None), ("c/0", "ok", None))
    part(tmp_path, "r", ("c/0", "ok", None))
    assert set(reconcile(str(tmp_path), pytest.fail).to_pylist()) == {"a/0", "b/0", "c/0"}
    assert ids_in(tmp_path / "results") == ["a/0", "b/0", "c/0"]


def test_the_checkpoint_says_what_the_results_hold(tmp_path):
    folder = tmp_path / "journal" / "checkpoint"
    folder.mkdir(parents=True)
    for name in ("x.parquet", "y.pending.parquet"):
        pq.write_table(pa.table({"row_id": ["lost/0"]}), folder / name)
    write_checkpoint(str(tmp_path), pa.array(["b/0", "a/0"]))
    assert ids_in(folder) == ["a/0", "b/0"]
    write_checkpoint(str(tmp_path), NONE)
    assert ids_in(folder) == []


def test_failed_rows_by_type(tmp_path):
    part(tmp_path, "p", ("a/0", "ok", None), ("b/0", "failed", "infra"), ("c/0", "failed", "tool"))
    assert sorted(failed_rows(str(tmp_path), ())) == ["b/0", "c/0"]
    assert failed_rows(str(tmp_path), ("infra", "model")) == ["b/0"]


@pytest.mark.parametrize("at_once", [1, 4096])
def test_reopened_rows_leave_the_table_and_the_journal(tmp_path, monkeypatch, at_once):
    monkeypatch.setattr("pipeline.resume.REOPENED_AT_ONCE", at_once)
    out = str(tmp_path)
    part(tmp_path, "p", ("a/0", "ok", None), ("b/0", "failed", "infra"))
    part(tmp_path, "q", ("c/0", "failed", "tool"))

    async def earlier() -> None:
        journal = Journal(out + "/journal")
        await journal.begin("b/0", "p", "r")
        await journal.finish("b/0", 1, "r", ROW)
        await journal.settled()
        tell_attempts(out, 0)

    asyncio.run(earlier())
    reopen(out, ["b/0", "c/0"])
    reopen(out, ["b/0", "c/0"])  # killed in between, and repeated
    assert set(reconcile(out, pytest.fail).to_pylist()) == {"a/0"}
    journal = Journal(out + "/journal", attempts=attempts_so_far(out, pa.array(["a/0"])))
    assert (journal.progress.finished, journal.progress.failed) == (0, 0)

    async def again() -> int:
        begun = await journal.begin("b/0", "p", "r")
        assert begun.row is None
        return begun.attempt

    assert asyncio.run(again()) == 2


def test_attempts_go_on_from_the_table(tmp_path):
    begin = {"kind": "begin", "row_id": "a/0", "at": 1.0, "pool": "p", "rung": "r"}
    write_attempts(str(tmp_path), pa.Table.from_pylist([begin | {"attempt": n} for n in (1, 2, 3)], schema=RECORDS))
    assert attempts_so_far(str(tmp_path), NONE) == {"a/0": 3}
    assert attempts_so_far(str(tmp_path), pa.array(["a/0"])) == {}

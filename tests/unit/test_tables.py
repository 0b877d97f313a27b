import json
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow.fs import LocalFileSystem

from actors.errors import InputError
from actors.messages import Forecast, Numerics, Step, Task, Trajectory, Usage
from pipeline import tables
from pipeline.scoring import Scored
from pipeline.tables import RESULTS, RunFacts, read_results, result_row, rows_to_table, write_table

# CONTRACTS, results/: the public columns in their order.
COLUMNS = """row_id task_id sample suite suite_version status error error_type stop_reason forced_finish parse_errors
answer raw_answer gold score scores metadata trajectory num_steps tool_calls tool_errors prompt_tokens generated_tokens
reused_tokens prefilled_tokens peak_tokens predicted_peak_bytes observed_peak_bytes pool rung attempts engine kernel
dtype kv_dtype weights_dtype tp max_batch_seen seed reproducible model_revision data_sha prompt_sha template_sha
tool_sha scorer_version queue_s prefill_s decode_s tool_s gpu_s schema_version"""

FACTS = RunFacts("hotpotqa", 1, "d", "p", None, "t", "exact_match@1")
NUMERICS = Numerics("paged", "flash", "bfloat16", "bfloat16", "bfloat16", 1, "abc", False)
TASK = Task("q1", 2, "Who?", ("Ann", "Anne"), {"type": "bridge"}, {"id": "q1", "n": [1, None]}, 7)
STEP = Step("think", "Search[x]", "search", '{"q": "x"}', "seen", 12, 0.5, 100, 40)
USAGE = Usage(120, 100, 40, 12, 4096, 8, 0, 0.1, 0.2, 0.3, 0.4)
DONE = Trajectory(
    TASK,
    (STEP, STEP),
    "Ann",
    "Finish[Ann]",
    "finish",
    tool_calls=2,
    prompt_tokens=120,
    peak_tokens=160,
    usage=USAGE,
    numerics=NUMERICS,
)
FORECAST = Forecast(120, 100, 150, 170, (140, 150, 170), 2)
DEAD = Trajectory(TASK, (), None, None, "error", error="node lost", error_type="infra", attempts=3)


def row(rollout=DONE, **changes):
    scored = Scored(1.0, {"exact_match": 1.0, "f1": 1.0})
    return {**result_row(rollout, scored=scored, run=FACTS, pool="single", rung="base"), **changes}


def test_results_have_the_columns_of_the_contract():
    assert RESULTS.names == COLUMNS.split()
    assert list(row()) == COLUMNS.split()


@pytest.mark.parametrize("trajectory", [DONE, DEAD])
def test_a_trajectory_survives_arrow_and_json(trajectory):
    [stored] = rows_to_table([row(trajectory)], RESULTS).to_pylist()
    [manifest] = rows_to_table([tables.task_row(TASK, FORECAST)], tables.TASKS).to_pylist()
    assert tables.task_from_row(manifest) == TASK
    assert tables.forecast_from_row(manifest) == FORECAST
    assert tables.trajectory_from_row(stored, manifest) == trajectory
    through_json = json.loads(json.dumps(row(trajectory)))
    assert tables.trajectory_from_row(through_json, manifest) == trajectory
    assert tables.trajectory_from_row(stored).task.question == ""


def test_a_failed_trajectory_is_a_row():
    failed = row(DEAD)
    assert (failed["status"], failed["error_type"], failed["attempts"]) == ("failed", "infra", 3)
    assert failed["engine"] is None
    assert failed["observed_peak_bytes"] is None


def test_a_scorers_failure_keeps_the_generation():
    kept = result_row(DONE, scored=Scored(None, {}, "scorer x: boom"), run=FACTS, pool=None, rung=None)
    assert (kept["status"], kept["score"], kept["error"], kept["answer"]) == ("ok", None, "scorer x: boom", "Ann")


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"sample": 1.5}, TypeError),
        ({"sample": "1"}, TypeError),
        ({"sample": True}, TypeError),
        ({"sample": 2**40}, TypeError),
        ({"answer": 3}, TypeError),
        ({"score": "1"}, TypeError),
        ({"forced_finish": 1}, TypeError),
        ({"row_id": None}, ValueError),
        ({"extra": 1}, ValueError),
        ({"trajectory": [{"thought": "x"}]}, ValueError),
        ({"trajectory": [{**row()["trajectory"][0], "tokens": 1.5}]}, TypeError),
    ],
)
def test_nothing_is_cast_silently(changes, error):
    with pytest.raises(error):
        rows_to_table([row(), row(**changes)], RESULTS)


def test_a_missing_column_is_named():
    broken = row()
    del broken["score"]
    with pytest.raises(ValueError, match="score"):
        rows_to_table([broken], RESULTS)


@settings(max_examples=30, deadline=None)
@given(st.text(st.characters(), max_size=50), st.dictionaries(st.text(max_size=5), st.text(max_size=5), max_size=3))
def test_any_text_can_be_stored(text, metadata):
    table = rows_to_table([row(answer=text, metadata=metadata)], RESULTS)
    assert table["answer"][0].as_py() == text.encode("utf-8", "replace").decode()


def test_half_an_emoji_costs_no_row():
    table = rows_to_table([row(answer="a\ud83d", metadata={"k": "\ud83d"})], RESULTS)
    assert table["answer"][0].as_py() == "a?"
    rows_to_table([tables.reject_row("f.jsonl", 3, None, "not UTF-8", "\udc80" * 9000)], tables.REJECTS)


def test_a_reject_is_cut():
    assert len(tables.reject_row("f", 1, "q", "empty", "x" * 9000)["raw"]) == 2000


def test_rows_are_written_and_read_back(tmp_path: Path):
    rows = [row(row_id=f"q{i}/0") for i in range(5)]
    write_table(rows_to_table(rows[:3], RESULTS), tmp_path / "results" / "a.parquet")
    write_table(rows_to_table(rows[3:], RESULTS), f"file://{tmp_path}/results/deep/b.parquet")
    table = read_results(tmp_path / "results")
    assert table.schema.equals(RESULTS)
    assert table["row_id"].to_pylist() == [f"q{i}/0" for i in range(5)]
    assert read_results(str(tmp_path / "results"), ["score", "row_id"]).column_names == ["score", "row_id"]
    found = tables.read_table(tmp_path / "results", RESULTS, ["row_id"], where=ds.field("row_id") == "q4/0")
    assert found.num_rows == 1
    assert len(pd.read_parquet(tmp_path / "results" / "a.parquet")) == 3
    assert tables.count_rows(tmp_path / "results", RESULTS) == 5


def test_an_absent_or_empty_folder_is_an_empty_table(tmp_path: Path):
    assert read_results(tmp_path / "none").schema.equals(RESULTS)
    (tmp_path / "results").mkdir()
    assert read_results(tmp_path / "results", ["row_id"]).num_rows == 0
    assert tables.count_rows(tmp_path / "none", tables.TASKS) == 0


def test_files_in_the_making_are_not_seen(tmp_path: Path):
    write_table(rows_to_table([row()], RESULTS), tmp_path / "a.parquet")
    for name in (".b.parquet", "_c.parquet", "_SUCCESS", "notes.txt"):
        (tmp_path / name).write_bytes(b"half")
    (tmp_path / ".pending").mkdir()
    (tmp_path / ".pending" / "d.parquet").write_bytes(b"half")
    assert read_results(tmp_path).num_rows == 1


def test_a_write_that_fails_leaves_the_old_file_and_no_litter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write_table(rows_to_table([row()], RESULTS), tmp_path / "a.parquet")

    def fail(table, stream, **_):
        stream.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(pq, "write_table", fail)
    with pytest.raises(OSError, match="disk full"):
        write_table(rows_to_table([row(), row()], RESULTS), tmp_path / "a.parquet")
    assert [path.name for path in tmp_path.iterdir()] == ["a.parquet"]
    assert read_results(tmp_path).num_rows == 1


def test_older_files_lack_columns_and_newer_ones_are_refused(tmp_path: Path):
    table = rows_to_table([row()], RESULTS)
    write_table(table.drop_columns(["rung", "score"]), tmp_path / "old.parquet")
    assert read_results(tmp_path, ["row_id", "rung"]).to_pylist() == [{"row_id": "q1/2", "rung": None}]
    write_table(rows_to_table([row(schema_version=tables.SCHEMA_VERSION + 1)], RESULTS), tmp_path / "new.parquet")
    with pytest.raises(InputError, match="newer"):
        read_results(tmp_path)


def test_many_files_are_read_some_at_a_time_and_say_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for n in range(5):
        write_table(
            rows_to_table([row(row_id=f"q{n}/{i}", sample=i) for i in range(2)], RESULTS), tmp_path / f"{n}.parquet"
        )
    where = ds.field("sample") == 1
    whole = read_results(tmp_path), tables.read_table(tmp_path, RESULTS, ["row_id"], where=where)
    monkeypatch.setattr(tables, "FILES_AT_ONCE", 2)
    assert [files.count_rows() for files in tables.open_table(tmp_path, RESULTS)] == [4, 4, 2]
    assert (read_results(tmp_path), tables.read_table(tmp_path, RESULTS, ["row_id"], where=where)) == whole
    assert tables.count_rows(tmp_path, RESULTS) == 10
    write_table(rows_to_table([row(schema_version=tables.SCHEMA_VERSION + 1)], RESULTS), tmp_path / "new.parquet")
    with pytest.raises(InputError, match="newer"):
        read_results(tmp_path)


def test_bytes_are_written_whole(tmp_path: Path):
    assert tables.read_bytes(tmp_path / "x.json") is None
    tables.write_bytes(b"{}", tmp_path / "deep" / "x.json")
    assert tables.read_bytes(f"file://{tmp_path}/deep/x.json") == b"{}"
    with pytest.raises(InputError, match="address"):
        tables.read_bytes("nosuch://x/y")


def test_a_file_that_goes_while_it_is_read_is_none(tmp_path: Path, monkeypatch):
    (tmp_path / "x").write_bytes(b"x")

    class Vanishing:
        def get_file_info(self, path: str):
            info = local.get_file_info(path)
            local.delete_file(path)
            return info

        def open_input_stream(self, path: str):
            return local.open_input_stream(path)

    local = LocalFileSystem()
    monkeypatch.setattr(tables, "filesystem", lambda uri: (Vanishing(), str(uri)))
    assert tables.read_bytes(tmp_path / "x") is None


def test_attempts_take_utc_times():
    now = pd.Timestamp("2026-01-01T00:00:00Z").to_pydatetime()
    attempt = {
        **dict.fromkeys(tables.ATTEMPTS.names),
        "row_id": "q/0",
        "attempt": 1,
        "started_at": now,
        "outcome": "ok",
    }
    assert rows_to_table([attempt], tables.ATTEMPTS)["started_at"][0].as_py() == now
    assert tables.ATTEMPTS.field("started_at").type == pa.timestamp("us", tz="UTC")

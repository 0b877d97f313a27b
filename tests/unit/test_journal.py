import asyncio
import json
import random

import pytest

from actors.messages import DeviceBytes
from pipeline import journal as module
from pipeline.journal import DEVICE, Journal, records

ROW = {
    "status": "ok",
    "score": 1.0,
    "generated_tokens": 5,
    "prefilled_tokens": 7,
    "reused_tokens": 2,
    "pool": "p",
    "error": None,
}


@pytest.fixture(autouse=True)
def fast(monkeypatch):
    monkeypatch.setattr(module, "COMMIT_S", 0.01)


async def test_a_finished_row_is_on_storage_before_finish_returns(tmp_path):
    journal = Journal(str(tmp_path / "j"))
    begun = await journal.begin("a/0", "single", "start")
    assert begun.attempt == 1
    await journal.finish("a/0", 1, "r", ROW | {"answer": "é\u2028"})
    again = Journal(str(tmp_path / "j"))
    found = await again.begin("a/0", "single", "start")
    assert found.row == ROW | {"answer": "é\u2028"}
    assert again.progress.finished == again.progress.resumed == 1


async def test_attempts_that_vanish_in_one_session_are_bounded(tmp_path):
    journal = Journal(str(tmp_path / "j"), max_attempts=2)
    assert [(await journal.begin("a/0", "p", "r")).exhausted for _ in range(3)] == [False, False, True]
    resumed = Journal(str(tmp_path / "j"), max_attempts=2)
    begun = await resumed.begin("a/0", "p", "r")
    assert (begun.exhausted, begun.attempt) == (False, 3)  # killing the run is not the row's fault


async def test_the_first_finish_counts(tmp_path):
    journal = Journal(str(tmp_path / "j"))
    await journal.begin("a/0", "p", "r")
    await journal.begin("a/0", "p", "r")
    rows = await asyncio.gather(*(journal.finish("a/0", n, "r", ROW | {"answer": str(n)}) for n in (1, 2)))
    assert sorted(row is None for row in rows) == [False, True]  # the first counts, the second is told so
    assert journal.progress.finished == 1


async def test_stop_starts_nothing_more_and_still_gives_what_is_finished(tmp_path):
    journal = Journal(str(tmp_path / "j"))
    await journal.begin("a/0", "p", "r")
    await journal.finish("a/0", 1, "r", ROW)
    await journal.stop()
    assert (await journal.begin("b/0", "p", "r")).stop
    assert (await journal.begin("a/0", "p", "r")).row == ROW


async def test_objects_grow_with_commits_not_with_rows_and_merge(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "MERGE_OBJECTS", 8)
    journal = Journal(str(tmp_path / "j"), max_attempts=9)

    async def one(n: int) -> None:
        await asyncio.sleep(random.Random(n).random())
        begun = await journal.begin(f"{n}/0", "p", "r")
        await journal.finish(f"{n}/0", begun.attempt, "r", ROW | {"answer": str(n)})

    await asyncio.gather(*(one(n) for n in range(300)))
    await journal.settled()
    assert len(list((tmp_path / "j").iterdir())) < 30
    assert len(records(str(tmp_path / "j"))) == 600
    for found in (journal, Journal(str(tmp_path / "j"))):
        for n in range(300):
            assert (await found.begin(f"{n}/0", "p", "r")).row == ROW | {"answer": str(n)}


async def test_records_tell_each_attempt(tmp_path):
    journal = Journal(str(tmp_path / "j"))
    await journal.begin("a/0", "single", "start")
    await journal.fail("a/0", 1, "r1", "ActorDiedError: gone")
    await journal.begin("a/0", "single", "start")
    await journal.finish("a/0", 2, "r2", ROW, DeviceBytes(7, 8, 9))
    await journal.settled()
    found = records(str(tmp_path / "j"))
    told = [(r["kind"], r["attempt"]) for r in found.to_pylist()]
    assert told == [("begin", 1), ("fail", 1), ("begin", 2), ("finish", 2)]
    assert "row" not in found.column_names
    device = found.select(DEVICE).to_pylist()
    assert [tuple(one.values()) for one in device] == [(None,) * 3] * (len(device) - 1) + [(7, 8, 9)]


async def test_a_write_that_fails_fails_its_callers_and_only_them(tmp_path, monkeypatch):
    journal = Journal(str(tmp_path / "j"))
    await journal.begin("a/0", "p", "r")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(module, "write_whole", full)
        with pytest.raises(OSError, match="No space"):
            await journal.finish("a/0", 1, "r", ROW)
    assert journal.progress.finished == 0
    assert await journal.finish("a/0", 1, "r", ROW) is None
    assert journal.progress.finished == 1


async def test_a_half_written_object_is_not_read(tmp_path):
    journal = Journal(str(tmp_path / "j"))
    await journal.begin("a/0", "p", "r")
    (tmp_path / "j" / "00.jsonl.123.tmp").write_text(json.dumps({"kind": "finish"})[:10])
    assert Journal(str(tmp_path / "j")).progress.finished == 0


async def test_a_merge_that_fails_holds_nobody_up(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "MERGE_OBJECTS", 2)
    journal = Journal(str(tmp_path / "j"))

    def broken(*_: object) -> dict[str, int]:
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(journal, "_concatenate", broken)
        for n in range(6):
            await asyncio.wait_for(journal.begin(f"{n}/0", "p", "r"), 5)
    assert (await asyncio.wait_for(journal.finish("0/0", 1, "r", ROW), 5)) is None
    assert Journal(str(tmp_path / "j")).progress.finished == 1


async def test_a_begin_beside_it_does_not_unmark_a_finish_on_its_way(tmp_path):
    journal = Journal(str(tmp_path / "j"))
    await journal.begin("a/0", "p", "r")
    await journal.begin("a/0", "p", "r")
    third = asyncio.create_task(journal.begin("a/0", "p", "r"))
    await asyncio.sleep(0.015)  # its batch is being written
    rows = await asyncio.gather(*(journal.finish("a/0", n, "r", ROW | {"answer": str(n)}) for n in (1, 2)))
    await third
    assert sorted(row is None for row in rows) == [False, True]  # the first counts, the second is told so


async def test_the_last_attempt_runs_alone(tmp_path):
    journal = Journal(str(tmp_path / "j"), max_attempts=3)
    for _ in range(2):
        for row in ("killer", "victim"):
            await journal.begin(row, "p", "r")
    assert (await journal.begin("killer", "p", "r")).attempt == 3
    assert (await journal.begin("victim", "p", "r")).wait_s
    assert (await journal.begin("new", "p", "r")).wait_s is None
    assert (await journal.begin("killer", "p", "r")).exhausted  # it killed once more
    await journal.finish("killer", 3, "", ROW)
    begun = await journal.begin("victim", "p", "r")
    assert (begun.attempt, begun.wait_s) == (3, None)
    await journal.finish("victim", 3, "", ROW)


async def test_events_survive_and_are_told_once(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "MERGE_OBJECTS", 2)
    journal = Journal(str(tmp_path / "j"))
    await journal.begin("a/0", "p", "r")
    for n in range(5):
        await journal.event("a/0", 1, {"n": n})
    kept = {path.name: path.read_bytes() for path in (tmp_path / "j").iterdir()}
    for name, content in kept.items():  # a merge that was interrupted leaves objects that the merged one holds too
        (tmp_path / "j" / f"0{name}").write_bytes(content)
    again = Journal(str(tmp_path / "j"))
    begun = await again.begin("a/0", "p", "r")
    assert (begun.attempt, begun.events) == (2, tuple({"n": n} for n in range(5)))
    await again.event("a/0", 1, {"late": True})  # the first attempt is fenced
    await again.event("a/0", 2, {"n": 5})
    third = await again.begin("a/0", "p", "r")
    assert third.events == tuple({"n": n} for n in range(6))
    await again.finish("a/0", 3, "r", ROW)
    assert not Journal(str(tmp_path / "j")).rows["a/0"].events


async def test_an_object_store_that_is_away_is_waited_for(tmp_path, monkeypatch):
    journal = Journal(str(tmp_path / "j"))
    journal.fs = module.fs.SubTreeFileSystem("/", journal.fs)  # so that the disk counts as a store
    real, failures = module.write_whole, [OSError("away")] * 2

    def flaky(*arguments: object) -> None:
        if failures:
            raise failures.pop()
        real(*arguments)

    monkeypatch.setattr(module, "write_whole", flaky)
    await journal.begin("a/0", "p", "r")
    assert not failures


async def test_several_at_once(tmp_path):
    journal = Journal(str(tmp_path / "j"))
    first, second = await journal.do([("begin", ("a/0", "p", "r")), ("begin", ("b/0", "p", "r"))])
    assert (first.attempt, second.attempt) == (1, 1)
    assert await journal.do([("finish", ("a/0", 1, "r", ROW))]) == [None]

import asyncio
import json
import random

import pytest

from pipeline import journal as module
from pipeline.journal import Journal

ROW = {"status": "ok", "score": 1.0, "generated_tokens": 5, "prefilled_tokens": 7, "reused_tokens": 2}


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
    assert rows[0] == rows[1]
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
    await asyncio.sleep(0.1)
    assert len(list((tmp_path / "j").iterdir())) < 30
    for found in (journal, Journal(str(tmp_path / "j"))):
        for n in range(300):
            assert (await found.begin(f"{n}/0", "p", "r")).row == ROW | {"answer": str(n)}


async def test_records_tell_each_attempt(tmp_path):
    journal = Journal(str(tmp_path / "j"))
    await journal.begin("a/0", "single", "start")
    await journal.fail("a/0", 1, "r1", "ActorDiedError: gone")
    await journal.begin("a/0", "single", "start")
    await journal.finish("a/0", 2, "r2", ROW)
    told = [(r["kind"], r["attempt"]) for r in journal.records()]
    assert told == [("begin", 1), ("fail", 1), ("begin", 2), ("finish", 2)]
    assert all("row" not in record for record in journal.records())


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
    assert await journal.finish("a/0", 1, "r", ROW) == ROW
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
    assert (await asyncio.wait_for(journal.finish("0/0", 1, "r", ROW), 5)) == ROW
    assert Journal(str(tmp_path / "j")).progress.finished == 1


async def test_a_begin_beside_it_does_not_unmark_a_finish_on_its_way(tmp_path):
    journal = Journal(str(tmp_path / "j"))
    await journal.begin("a/0", "p", "r")
    await journal.begin("a/0", "p", "r")
    third = asyncio.create_task(journal.begin("a/0", "p", "r"))
    await asyncio.sleep(0.015)  # its batch is being written
    rows = await asyncio.gather(*(journal.finish("a/0", n, "r", ROW | {"answer": str(n)}) for n in (1, 2)))
    await third
    assert rows[0] == rows[1]

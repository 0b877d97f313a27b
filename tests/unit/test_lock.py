"""The lock of a run folder. Objects are tried on a local disk here, on S3 in tests/integration/test_object_store.py."""

import os
import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from actors.errors import InputError, RunConflict
from pipeline import lock as module
from pipeline.lock import locked


def unexpected(error: InputError) -> None:
    raise error


@pytest.fixture(params=["local", "objects"])
def out(request, tmp_path, monkeypatch):
    """A run folder's address."""
    monkeypatch.setattr(module, "BEAT_S", 0.1)
    monkeypatch.setattr(module, "EXPIRY_S", 1.0)
    monkeypatch.setattr(module._File, "beat_s", 0.1)
    return str(tmp_path / "out") if request.param == "local" else f"file://{tmp_path}/out"


@pytest.fixture
def objects(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "BEAT_S", 0.1)
    monkeypatch.setattr(module, "EXPIRY_S", 1.0)
    (tmp_path / "out" / "lock").mkdir(parents=True)
    return tmp_path / "out" / "lock"


def test_a_lock_is_held_once_and_let_go_of(out):
    with locked(out, unexpected):
        with pytest.raises(RunConflict, match=f"another run is at work in this folder .process {os.getpid()}"):
            locked(out, unexpected).__enter__()
        time.sleep(1.5)  # longer than an expiry: it is renewed
        with pytest.raises(RunConflict):
            locked(out, unexpected).__enter__()
    with locked(out, unexpected):
        pass


def test_a_place_that_cannot_be_written_to_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    for out in (str(tmp_path / "file" / "out"), f"file://{tmp_path}/file/out"):
        with pytest.raises(InputError, match="not writable"), locked(out, unexpected):
            pass


def test_who_holds_a_lock_learns_that_the_folder_is_gone(out, tmp_path):
    lost: list[InputError] = []
    with locked(out, lost.append):
        shutil.rmtree(tmp_path / "out")
        until = time.monotonic() + 10
        while not lost and time.monotonic() < until:
            time.sleep(0.05)
    assert "removed" in str(lost[0])
    assert not isinstance(lost[0], RunConflict)


def test_who_holds_a_lock_learns_that_another_has_taken_over(objects):
    lost: list[InputError] = []
    with locked(f"file://{objects.parent}", lost.append):
        (objects / "hold-000000000000").write_text("process 1 on other")
        until = time.monotonic() + 10
        while not lost and time.monotonic() < until:
            time.sleep(0.05)
    assert isinstance(lost[0], RunConflict)
    assert "process 1 on other" in str(lost[0])


def test_the_lock_of_a_run_that_was_killed_ends(objects, monkeypatch):
    monkeypatch.setattr(module, "EXPIRY_S", 3.0)
    (objects / "hold-000000000000").write_text("process 1 on other")
    (objects / "ask-000000000000").write_text("process 1 on other")
    told: list[str] = []
    with locked(f"file://{objects.parent}", unexpected, told.append):
        assert not (objects / "hold-000000000000").exists()
        assert [path.name[:5] for path in objects.iterdir()].count("hold-") == 1
    assert any("process 1 on other" in text for text in told)


def test_a_refused_run_leaves_nothing_behind(objects):
    out = f"file://{objects.parent}"
    with locked(out, unexpected):
        before = {path.name for path in objects.iterdir()}
        with pytest.raises(RunConflict):
            locked(out, unexpected).__enter__()
        assert {path.name for path in objects.iterdir()} == before
    assert not list(objects.iterdir())


def test_of_many_that_start_at_once_one_gets_it(objects, monkeypatch):
    monkeypatch.setattr(module, "EXPIRY_S", 20.0)
    out, holders, most, guard = f"file://{objects.parent}", 0, 0, threading.Lock()
    start = threading.Barrier(4)

    def contend(_: int) -> bool:
        nonlocal holders, most
        start.wait()
        try:
            with locked(out, unexpected):
                with guard:
                    holders += 1
                    most = max(most, holders)
                time.sleep(1.5)
                with guard:
                    holders -= 1
            return True
        except RunConflict:
            return False

    with ThreadPoolExecutor(4) as pool:
        for _ in range(4):
            won = list(pool.map(contend, range(4)))
            assert any(won)
    assert most == 1

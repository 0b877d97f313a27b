"""A run folder on S3, against moto's server: the whole job, its lock, and a kill -9 in the middle."""

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter

import pandas as pd
import pytest
from pyarrow import fs

from actors.errors import InputError, RunConflict
from bench.clusters import free_ports, wait_for
from bench.s3 import BUCKET, program, s3_server
from bench.scripted import lines_in, write_suite
from pipeline import lock
from pipeline.lock import locked
from pipeline.tables import RESULTS, read_bytes, read_table
from tests.integration.test_run import ROOT, command, run

pytestmark = pytest.mark.timeout(1200)


@pytest.fixture(scope="module")
def server():
    """Address of an S3 server."""
    if program() is None:
        pytest.skip("moto is not installed")
    [port] = free_ports(1)
    with s3_server(port):
        yield f"http://127.0.0.1:{port}"


@pytest.fixture
def out(server, monkeypatch, request):
    """A run folder in a bucket; credentials and endpoint come from the environment alone."""
    for name, value in {
        "AWS_ENDPOINT_URL": server,
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "never-to-be-written-down",
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)
    return f"s3://{BUCKET}/{request.node.name}"


def files_of(out: str) -> dict[str, tuple[int, int]]:
    """Size and time of each object of the run folder."""
    store, path = fs.FileSystem.from_uri(out)
    infos = store.get_file_info(fs.FileSelector(path, allow_not_found=True, recursive=True))
    return {info.path.removeprefix(path): (info.size, info.mtime_ns) for info in infos if info.is_file}


def test_a_lock_on_s3_is_held_once_and_known_to_be_lost(out, monkeypatch):
    monkeypatch.setattr(lock, "BEAT_S", 1.5)  # S3 tells times to the second
    lost: list[InputError] = []
    with locked(out, lost.append):
        with pytest.raises(RunConflict, match=f"process {os.getpid()}"):
            locked(out, lost.append).__enter__()
        assert [name[:11] for name in files_of(out)] == ["/lock/hold-"]
        assert not lost
        store, path = fs.FileSystem.from_uri(out)
        store.delete_dir(path)
        wait_for(lambda: lost, 30)
    assert "removed" in str(lost[0])
    with locked(out, lost.append):
        pass
    with pytest.raises(InputError, match="not writable"), locked("s3://no-such-bucket/x", lost.append):
        pass


def test_a_run_in_a_bucket_completes_and_its_repetition_changes_nothing(out):
    secret = "ray.runtime_env.env_vars.TOKEN=never-to-be-written-down"
    done = run(command(out, "--limit", "5", "--json", "--set", secret))
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["rows"]["finished"] == 5
    before = files_of(out)
    assert {"/run.json", "/summary.json", "/report.html", "/attempts/attempts.parquet"} <= before.keys()
    assert not [name for name in before if name.startswith(("/journal", "/lock"))]
    again = run(command(out, "--limit", "5"))
    assert "already complete" in again.stdout, again.stdout + again.stderr
    assert files_of(out) == before
    for name in before:
        assert b"never-to-be-written-down" not in (read_bytes(out + name) or b"")
    scored = run([sys.executable, "-m", "pipeline", "score", out, "--scorer", "f1", "--json"])
    assert scored.returncode == 0, scored.stderr
    reported = run([sys.executable, "-m", "pipeline", "report", out])
    assert reported.returncode == 0, reported.stderr


@pytest.mark.slow
def test_kill_9_in_the_middle_of_a_run_in_a_bucket(out, tmp_path):
    suite, calls = write_suite(tmp_path / "suite", 300), tmp_path / "calls"
    script = {"delay_s": 0.5, "max_batch": 8, "count": str(calls)}
    argv = command(out, "--set", f"suite={suite}")
    env = os.environ | {"BERTH_SCRIPT": json.dumps(script)}
    with subprocess.Popen(argv, cwd=ROOT, env=env, stdout=subprocess.DEVNULL) as process:
        wait_for(lambda: len(lines_in(calls)) > 150)
        second = run(argv, script)
        assert second.returncode == 2
        assert "another run is at work" in second.stderr
        process.kill()
    finished = {
        record["row_id"]
        for name in files_of(out)
        if name.startswith("/journal/") and name.endswith(".jsonl")
        for record in map(json.loads, (read_bytes(out + name) or b"").splitlines())
        if record["kind"] == "finish"
    }
    assert 0 < len(finished) < 300
    again = run(argv, script)  # at once: it waits for the dead run's lock to end
    assert again.returncode == 0, again.stdout + again.stderr
    assert "may have been killed" in again.stdout
    frame: pd.DataFrame = read_table(f"{out}/results", RESULTS).to_pandas()
    assert sorted(frame["task_id"]) == sorted(f"q{n}" for n in range(300))
    assert (frame["status"] == "ok").all()
    repeated = Counter(line.split()[0] for line in lines_in(calls))
    assert all(repeated[row_id] == 3 for row_id in finished), "a finished row was computed again"


@pytest.mark.slow
def test_a_run_whose_bucket_is_emptied_stops_and_writes_nothing_more(out):
    env = os.environ | {"BERTH_SCRIPT": json.dumps({"delay_s": 20})}
    argv = command(out, "--limit", "20")
    with subprocess.Popen(argv, cwd=ROOT, env=env, stderr=subprocess.PIPE, text=True) as process:
        wait_for(lambda: any(name.startswith("/journal/") for name in files_of(out)))
        store, path = fs.FileSystem.from_uri(out)
        store.delete_dir(path)
        started = time.monotonic()
        said = process.communicate(timeout=60)[1]
        assert time.monotonic() - started < 30
    assert process.returncode == 2
    assert "removed or replaced" in said
    time.sleep(5)
    assert not files_of(out)


@pytest.mark.slow
def test_sigterm_in_a_run_on_a_bucket_leaves_it_resumable(out):
    env = os.environ | {"BERTH_SCRIPT": json.dumps({"delay_s": 60})}
    argv = command(out, "--limit", "5")
    with subprocess.Popen(argv, cwd=ROOT, env=env) as process:
        wait_for(lambda: any(name.startswith("/journal/") for name in files_of(out)))
        process.send_signal(signal.SIGTERM)
        started = time.monotonic()
        assert process.wait(timeout=30) == 3
        assert time.monotonic() - started < 3
    again = run(argv)
    assert again.returncode == 0, again.stdout + again.stderr
    assert len(read_table(f"{out}/results", RESULTS)) == 5

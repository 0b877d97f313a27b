import datetime as dt
import json
import re
import shutil
import time
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from actors.errors import InputError
from actors.messages import Numerics, Step, Task, Trajectory, Usage
from pipeline import tables
from pipeline.report import compare, metrics, summarize, write_report
from pipeline.rescore import rescore
from pipeline.run import opened
from pipeline.scoring import Scored
from pipeline.tables import ATTEMPTS, REJECTS, RESULTS, TASKS, RunFacts, result_row, rows_to_table, task_row

FACTS = RunFacts("hotpotqa", 1, "d4a0", "p", "c", "t", "exact_match@1 f1@2")
NUMERICS = Numerics(
    "paged", "flash_attn", "bfloat16", "bfloat16", "bfloat16", 1, "12fd25f77366fa6b3b4b768ec3050bf6", False
)
EVIL = "<script>alert(1)</script>\"'><img src=x onerror=alert(1)>{{ 7*7 }}</pre>\u202e $x^2$"
START = dt.datetime(2026, 3, 1, tzinfo=dt.UTC)


def trajectory(i: int, *, kind: str, sample: int = 0, text: str = "") -> Trajectory:
    rng = np.random.default_rng(i)
    hops = ("bridge", "comparison")[i % 2]
    task = Task(f"q{i}", sample, f"Question {i} {text}", ("yes",), {"type": hops, "doc": f"d{i // 3}"}, {"id": i}, i)
    steps = tuple(
        Step(f"I think {text}", f"Search[{text}]", "search", "{}", f"seen {text}", 60, 0.4, 90, 500)
        for _ in range(int(rng.integers(2, 8)))
    )
    n = len(steps)
    usage = Usage(700 * n, 90 * n, 500 * n, 60 * n, 2**20 * 30 * n, 32, 0, 0.2 * n, 0.1 * n, 0.9 * n, 0.05 * n)
    if kind in ("infra", "model", "tool"):
        return Trajectory(
            task, steps, None, None, "error", error=f"node lost {text}", error_type=kind, usage=usage, attempts=3
        )
    answer = {"right": "yes", "wrong": f"no {text}", "none": None}[kind]
    stop = "finish" if answer else "step_limit"
    return Trajectory(
        task,
        steps,
        answer,
        answer,
        stop,
        tool_calls=n,
        prompt_tokens=700 * n,
        usage=usage,
        tool_s=0.3 * n,
        numerics=NUMERICS,
    )


def store(
    folder: Path, trajectories: list[Trajectory], *, expected: int | None = None, text: str = "", **facts: object
):
    rows, manifest = [], []
    for t in trajectories:
        right = float(t.answer == "yes")
        scored = Scored(right, {"exact_match": right, "f1": max(right, 0.4 if t.answer else 0.0)})
        if t.answer is None and t.error_type:
            scored = Scored(0.0, {})
        rows.append(
            result_row(t, scored=scored, run=FACTS, pool="single", rung="base", predicted_peak_bytes=2**20 * 150)
        )
        manifest.append(task_row(t.task))
    manifest += [{**manifest[0], "row_id": f"open{i}/0"} for i in range((expected or len(rows)) - len(rows))]
    attempt = dict.fromkeys(ATTEMPTS.names)
    attempts = [
        {
            **attempt,
            "row_id": t.task.row_id,
            "attempt": 1,
            "started_at": START + dt.timedelta(seconds=i),
            "ended_at": START + dt.timedelta(seconds=i + 60),
            "outcome": "failed" if t.error_type else "ok",
            "cause": t.error,
            "lost_gpu_s": 1.0 if t.error_type else None,
        }
        for i, t in enumerate(trajectories)
    ]
    tables.write_table(rows_to_table(rows, RESULTS), folder / "results" / "0.parquet")
    tables.write_table(rows_to_table(manifest, TASKS), folder / "tasks" / "0.parquet")
    tables.write_table(rows_to_table(attempts, ATTEMPTS), folder / "attempts" / "0.parquet")
    run = {
        "suite": {
            "name": "hotpotqa",
            "primary": "exact_match",
            "scorers": ["exact_match", "f1"],
            "report_by": ["type"],
        },
        "config": {"model": {"id": f"Org/Model {text}", "revision": "12fd"}, "seed": 0},
        "versions": {"torch": "2.11", "ray": text or "2.60"},
        **facts,
    }
    (folder / "run.json").write_text(json.dumps(run))
    return folder


def mixed(n: int, text: str = "") -> list[Trajectory]:
    kinds = np.random.default_rng(0).choice(
        ["right", "wrong", "none", "infra", "model", "tool"], n, p=[0.4, 0.4, 0.1, 0.05, 0.03, 0.02]
    )
    return [trajectory(i, kind=str(kind), text=text) for i, kind in enumerate(kinds)]


class Page(HTMLParser):
    """Tags and addresses of a page, as a browser would see them."""

    def __init__(self, page: str):
        super().__init__()
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.handlers: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href", "action")]
        self.handlers += [name for name, _ in attrs if name.startswith("on")]


def assert_harmless(page: str):
    seen = Page(page)
    assert not {"script", "img", "iframe", "link", "object", "form"} & set(seen.tags)
    assert not seen.handlers
    assert all(address.startswith("#") for address in seen.addresses)
    assert not re.search(r"url\((?!#)", page)
    assert "@import" not in page


def test_summary_of_a_mixed_run(tmp_path: Path):
    run = mixed(100)
    summary = summarize(store(tmp_path, run))
    right = sum(t.answer == "yes" for t in run)
    infra, tool = (sum(t.error_type == kind for t in run) for kind in ("infra", "tool"))
    assert tool > 0
    assert summary["score"]["mean"] == pytest.approx(right / 100)
    assert summary["score"]["method"] == "Wilson"
    assert summary["score_without_faults"]["mean"] == pytest.approx(right / (100 - infra - tool))
    assert (summary["rows"]["infra"], summary["rows"]["tool"]) == (infra, tool)
    assert summary["rows"]["failed"] == sum(bool(t.error_type) for t in run)
    assert summary["error_types"]["infra"] == infra
    assert summary["complete"] is True
    assert list(summary["metrics"]) == ["exact_match", "f1"]
    assert summary["metrics"]["exact_match"] == summary["score"]
    assert summary["metrics"]["f1"]["n"] == 100
    groups = summary["groups"]["type"]["values"]
    assert sorted(group["value"] for group in groups) == ["bridge", "comparison"]
    assert sum(group["n"] for group in groups) == 100
    assert summary["reuse"]["reused_fraction"] == pytest.approx(500 / 590)
    assert summary["throughput"]["wall_s"] == 159
    assert summary["attempts"]["lost_gpu_s"] == summary["rows"]["failed"]
    assert summary["memory"]["rows"] == 100
    assert 0 < summary["memory"]["above_predicted_fraction"] < 1
    assert summary["numerics"][0]["engine"] == "paged"
    assert sum(line["rows"] for line in summary["numerics"]) == 100
    json.dumps(summary, allow_nan=False)


def test_the_report_is_written_whole_and_the_same_twice(tmp_path: Path):
    store(tmp_path, mixed(60))
    summary = write_report(tmp_path)
    first = (tmp_path / "report.html").read_bytes()
    write_report(str(tmp_path) + "/")
    assert (tmp_path / "report.html").read_bytes() == first
    assert json.loads((tmp_path / "summary.json").read_text()) == summary == summarize(tmp_path)
    page = first.decode()
    assert_harmless(page)
    assert page.count("<details>") == 10
    assert "failed through infrastructure" in page
    assert "revision: 12fd" in page


def test_hostile_text_stays_text(tmp_path: Path):
    run = mixed(40, text=EVIL)
    long = trajectory(999, kind="wrong", text="<script>" + "x" * 100_000)
    wide = trajectory(998, kind="model", text=EVIL)
    store(tmp_path, [*run, long, wide], text=EVIL)
    facts = json.loads((tmp_path / "run.json").read_text())
    facts["suite"]["report_by"] = ["type", EVIL]
    facts |= {"commit": EVIL, "hardware": {EVIL: EVIL}}
    (tmp_path / "run.json").write_text(json.dumps(facts))
    write_report(tmp_path)
    page = (tmp_path / "report.html").read_text()
    assert_harmless(page)
    assert "<script" not in page.lower()
    assert "&lt;script&gt;" in page
    assert "{{ 7*7 }}" in page
    assert "\u202e" not in page


def test_a_long_observation_is_cut_with_a_note(tmp_path: Path):
    store(tmp_path, [trajectory(1, kind="wrong", text="y" * 100_000)])
    write_report(tmp_path)
    page = (tmp_path / "report.html").read_text()
    assert "98,005 more characters; the whole is in results/" in page
    assert len(page) < 120_000


def test_a_run_without_anything(tmp_path: Path):
    summary = write_report(tmp_path)
    assert summary["score"]["mean"] is None
    assert summary["complete"] is False
    assert "No finished rows yet" in (tmp_path / "report.html").read_text()


def test_a_run_in_which_all_failed(tmp_path: Path):
    store(tmp_path, [trajectory(i, kind="infra") for i in range(5)], expected=8)
    summary = write_report(tmp_path)
    assert (summary["score"]["mean"], summary["score"]["n"]) == (0.0, 5)
    assert summary["score_without_faults"]["mean"] is None
    assert (summary["rows"]["missing"], summary["complete"]) == (3, False)
    page = (tmp_path / "report.html").read_text()
    assert "Incomplete" in page
    assert "5 of 5 rows failed through infrastructure and 0 through a tool that broke" in page


def test_wall_time_from_run_json_where_attempts_are_absent(tmp_path: Path):
    store(tmp_path, mixed(4), started_at="2026-03-01T00:00:00+00:00", finished_at="2026-03-01T00:02:00+00:00")
    (tmp_path / "attempts" / "0.parquet").unlink()
    found = summarize(tmp_path)["throughput"]
    assert (found["wall_s"], found["rows_per_hour"]) == (120.0, pytest.approx(120))


def test_one_row_and_a_bare_run_json(tmp_path: Path):
    store(tmp_path, [trajectory(1, kind="right")])
    (tmp_path / "run.json").write_text('{"suite": "hotpotqa", "config": {"model": null}}')
    summary = write_report(tmp_path)
    assert (summary["primary"], summary["score"]["mean"], summary["score"]["n"]) == ("score", 1.0, 1)
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(InputError, match=r"run\.json: not JSON"):
        summarize(tmp_path)


def test_unscored_rows_count_as_zero_and_are_told(tmp_path: Path):
    run = [trajectory(i, kind="right") for i in range(4)]
    rows = [result_row(t, scored=Scored(1.0, {"cite": 1.0}), run=FACTS, pool=None, rung=None) for t in run[:3]] + [
        result_row(run[3], scored=Scored(None, {}, "scorer cite: KeyError"), run=FACTS, pool=None, rung=None)
    ]
    tables.write_table(rows_to_table(rows, RESULTS), tmp_path / "results" / "0.parquet")
    tables.write_table(
        rows_to_table([tables.reject_row("f.jsonl", 1, None, "not JSON", "{")], REJECTS),
        tmp_path / "rejects" / "0.parquet",
    )
    summary = write_report(tmp_path)
    assert summary["score"]["mean"] == 0.75
    assert summary["metrics"]["cite"]["mean"] == 0.75
    assert (summary["rows"]["unscored"], summary["rows"]["rejected"]) == (1, 1)
    assert "could not be scored" in (tmp_path / "report.html").read_text()


def rescorable(folder: Path, trajectories: list[Trajectory], **more) -> Path:
    """A run folder whose suite's folder, which may be edited after the run, holds a scorer `mine`."""
    (folder / "suite").mkdir()
    (folder / "suite" / "mine.py").write_text(
        "def cite(trajectory, gold):\n    return {'cite': 1.0} if trajectory.task.task_id == 'q0' else {'other': 0.0}\n"
        "def broken(trajectory, gold):\n    raise KeyError('oops')\n"
    )
    return store(folder, trajectories, identity={}, config={"suite": str(folder / "suite")}, **more)


def test_a_metric_that_is_not_on_every_row_is_the_mean_of_those_that_have_it(tmp_path: Path):
    run = [trajectory(i, kind=kind) for i, kind in enumerate(("right", "right", "infra"))]
    out = str(rescorable(tmp_path, run, suite={"cluster_by": "doc"}))
    found = rescore(out, ["exact_match", "mine:cite", "mine:cite"])["metrics"]
    table = pq.read_table(Path(out) / "rescored")
    assert {name: (one["mean"], one["n"]) for name, one in found.items()} == {
        "exact_match": (pytest.approx(2 / 3), 3),
        "cite": (0.5, 2),
        "other": (0.0, 2),
    }
    lost = pd.Series([False, False, True])
    assert found == metrics(table["scores"], lost, pd.Series(["d0"] * 3), "exact_match")


def test_an_unfinished_run_is_said_to_be_one_when_scored(tmp_path: Path):
    out = str(rescorable(tmp_path, mixed(10), expected=12))
    assert "10 of 12 rows are done" in rescore(out, ["f1"])["shown"]["incomplete"]
    shutil.rmtree(tmp_path / "tasks")
    shown = rescore(out, ["exact_match", "f1"])["shown"]
    assert "incomplete" not in shown


def test_scorers_of_which_none_works_are_refused(tmp_path: Path):
    out = str(rescorable(tmp_path, mixed(5)))
    with pytest.raises(InputError, match=r"--scorer: no row could be scored; .*KeyError: 'oops'"):
        rescore(out, ["mine:broken"])
    assert not (tmp_path / "rescored").exists()


def test_many_scorers_make_no_name_that_is_too_long(tmp_path: Path):
    out = str(rescorable(tmp_path, [trajectory(0, kind="right")]))
    names = [f"cite{'x' * 60}{n}" for n in range(5)]
    source = "".join(f"def {name}(trajectory, gold):\n    return {{'{name}': 1.0}}\n" for name in names)
    (tmp_path / "suite" / "long.py").write_text(source)
    assert Path(rescore(out, [f"long:{name}" for name in names])["path"]).exists()


def test_rows_are_scored_some_files_at_a_time_each_with_its_own_task(tmp_path: Path, monkeypatch):
    """The manifest has its rows in another order than results/, and in other files."""
    run = mixed(23)
    out = rescorable(tmp_path, run)
    (tmp_path / "suite" / "own.py").write_text(
        "def own(trajectory, gold):\n"
        "    task = trajectory.task\n"
        "    return {'own': float(task.row['id']) if task.question.split()[1] == task.task_id[1:] else -1.0}\n"
    )
    whole = rescore(str(out), ["own:own", "exact_match"])
    [path] = (out / "rescored").iterdir()
    expected = pq.read_table(path)
    for name, rows in (("results", range(23)), ("tasks", range(22, -1, -1))):
        table = pq.read_table(out / name)
        for part in range(0, 23, 4):
            pq.write_table(table.take(list(rows[part : part + 4])), out / name / f"{part:02d}.parquet")
        (out / name / "0.parquet").unlink()
    path.unlink()
    monkeypatch.setattr(tables, "FILES_AT_ONCE", 2)
    assert rescore(str(out), ["own:own", "exact_match"]) == whole
    assert pq.read_table(path).equals(expected)
    ok = {t.task.row_id: float(t.task.row["id"]) for t in run if t.error_type is None and t.answer is not None}
    scores = dict(zip(expected["row_id"].to_pylist(), expected["score"].to_pylist(), strict=True))
    assert {row_id: scores[row_id] for row_id in ok} == ok


def test_scoring_that_is_cut_short_leaves_no_table(tmp_path: Path, monkeypatch):
    out = str(rescorable(tmp_path, mixed(6)))
    table = pq.read_table(tmp_path / "results" / "0.parquet")
    (tmp_path / "results" / "0.parquet").unlink()
    for part in range(3):
        pq.write_table(table.slice(2 * part, 2), tmp_path / "results" / f"{part}.parquet")
    monkeypatch.setattr(tables, "FILES_AT_ONCE", 1)
    scored = []

    def stopped(row, task):
        scored.append(row)
        if len(scored) == 5:
            raise KeyboardInterrupt
        return tables.trajectory_from_row(row, task)

    monkeypatch.setattr("pipeline.rescore.trajectory_from_row", stopped)
    with pytest.raises(KeyboardInterrupt):
        rescore(out, ["f1"])
    assert not (tmp_path / "rescored").exists()
    assert rescore(out, ["f1"])["rows"]["finished"] == 6


@pytest.mark.parametrize("content", [b"", b"PAR1 and no more", b"x" * 100])
def test_a_damaged_table_is_named(tmp_path: Path, content: bytes):
    out = rescorable(tmp_path, mixed(3))
    (out / "results" / "0.parquet").write_bytes(content)
    for work in (lambda: write_report(out), lambda: rescore(str(out), ["f1"])):
        with pytest.raises(InputError, match=r"results/0\.parquet"), opened(str(out)):
            work()


def test_samples_of_a_task_are_a_cluster_and_give_pass_at_k(tmp_path: Path):
    run = [
        trajectory(i, kind="right" if i % 3 == sample else "wrong", sample=sample)
        for i in range(12)
        for sample in range(4)
    ]
    summary = summarize(store(tmp_path, run))
    assert (summary["score"]["n"], summary["score"]["clusters"]) == (48, 12)
    assert summary["score"]["method"] == "Wilson, clustered"
    assert summary["pass_at_k"]["1"]["mean"] == pytest.approx(0.25)
    assert summary["pass_at_k"]["4"]["mean"] == pytest.approx(1.0)
    assert list(summary["pass_at_k"]) == ["1", "2", "4"]


def test_cluster_by_a_column(tmp_path: Path):
    suite = {"primary": "exact_match", "cluster_by": "doc"}
    summary = summarize(store(tmp_path, mixed(30), suite=suite))
    assert summary["score"]["clusters"] == 10


def test_many_groups_are_cut_and_told(tmp_path: Path):
    suite = {"primary": "exact_match", "report_by": ["doc", "nothing"]}
    summary = summarize(store(tmp_path, mixed(120), suite=suite))
    assert len(summary["groups"]["doc"]["values"]) == 30
    assert summary["groups"]["doc"]["not_shown"] == 10
    assert [group["value"] for group in summary["groups"]["nothing"]["values"]] == [""]


def test_the_environment_is_not_shown(tmp_path: Path):
    config = {"ray": {"runtime_env": {"env_vars": {"WIKI_TOKEN": "s3cret"}, "pip": ["x"]}}}
    write_report(store(tmp_path, mixed(3), config=config))
    page = (tmp_path / "report.html").read_text()
    assert "WIKI_TOKEN" in page
    assert "s3cret" not in page


def test_two_runs_are_compared_on_what_they_share(tmp_path: Path):
    a = store(tmp_path / "a", [trajectory(i, kind="wrong") for i in range(10)])
    b = store(tmp_path / "b", [trajectory(i, kind="right" if i < 8 else "wrong") for i in range(12)])
    found = compare(a, b)
    assert (found["only_a"], found["only_b"], found["difference"]["n"]) == (0, 8, 10)
    assert found["difference"]["mean"] == pytest.approx(0.8)
    assert found["p_value"] == pytest.approx(2 / 2**8)
    assert (found["rows_only_in_a"], found["rows_only_in_b"]) == (0, 2)


def test_a_hundred_thousand_rows(tmp_path: Path):
    store(tmp_path, mixed(1000))
    table = pa.concat_tables([tables.read_results(tmp_path / "results")] * 20)
    for i in range(5):
        number = pc.cast(pa.array(range(i * 20_000, (i + 1) * 20_000)), pa.string())
        ids = pc.binary_join_element_wise(table["row_id"], number, "/")
        copy = table.set_column(0, RESULTS.field("row_id"), ids).cast(RESULTS)
        tables.write_table(copy, tmp_path / "results" / f"{i}.parquet")
    begin = time.perf_counter()
    summary = write_report(tmp_path)
    assert summary["rows"]["finished"] == 100_000
    assert time.perf_counter() - begin < 60  # 3 s on an idle core
    assert len((tmp_path / "report.html").read_bytes()) < 500_000

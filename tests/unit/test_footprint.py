import json
import pickle
from dataclasses import fields, replace
from types import SimpleNamespace

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from actors.agent import Limits
from actors.engine.protocol import Capacity
from actors.messages import FORECAST_LEVELS, Forecast, Numerics, Task, Trajectory
from pipeline import run as run_module
from pipeline.config import Pool, load_run
from pipeline.footprint import MAX_ROWS, Forecaster, order
from pipeline.preflight import count_prompts, prepare, transcript
from pipeline.run import forecaster, write_manifest
from pipeline.scoring import Scored
from pipeline.sharing import sized
from pipeline.suite import PriorConfig
from pipeline.tables import (
    RESULTS,
    TASKS,
    RunFacts,
    forecast_from_row,
    read_table,
    result_row,
    rows_to_table,
    task_from_row,
    write_table,
)
from pipeline.tasks import Tasks

LIMITS = Limits(max_steps=8, trajectory_tokens=2048, context_tokens=4096, answer_tokens=160)
PRIOR = PriorConfig(steps=(2, 4, 6), tokens_per_step=(35, 55, 90))
FACTS = RunFacts("s", 1, "d", "p", None, "t", "exact_match@1")
NUMERICS = Numerics("paged", "sdpa", "float32", "float32", "float32", 1, "commit", False)


def task(name: str = "q", **metadata: str) -> Task:
    return Task(name, 0, "Who?", ("Ann",), metadata, {}, 7)


def seen(growth: int, question: int = 50, steps: int = 4, **more: object) -> dict:
    """What a finished row tells, its prompt being 700 shared tokens and the question."""
    prompt = 700 + question
    row: dict[str, object] = {
        "row_id": str(object()),
        "prompt_tokens": prompt,
        "peak_tokens": prompt + growth,
        "num_steps": steps,
        "error_type": None,
    }
    return row | {"metadata": {}} | more


def taught(rows: list[dict], prior: PriorConfig | None = PRIOR, **more: object) -> Forecaster:
    made = Forecaster(LIMITS, 700, prior, **more)  # pyright: ignore[reportArgumentType]
    for row in rows:
        made.observe(row)
    return made


def test_without_rows_the_prior_speaks_and_without_a_prior_the_limits():
    by_prior = taught([]).forecast(task(), 750)
    assert 750 + 4 * 45 < by_prior.p50_tokens < 750 + 4 * 65
    assert 750 + 6 * 60 < by_prior.p95_tokens < 2048
    assert (by_prior.p50_steps, by_prior.shared_tokens, by_prior.prompt_tokens) == (4, 700, 750)
    by_limits = taught([], prior=None).forecast(task(), 750)
    assert set(by_limits.quantile_tokens) == {2048}
    assert by_limits.p50_steps == 8


def test_rows_teach():
    found = taught([seen(growth, steps=6) for growth in range(1000, 1200)]).forecast(task(), 750)
    assert 750 + 1080 < found.p50_tokens < 750 + 1120
    assert 750 + 1180 < found.p95_tokens <= 750 + 1200
    assert found.p50_steps == 6


def test_few_rows_are_not_trusted_with_a_tail():
    """Split conformal: with n rows of equal weight p95 is the ⌈0.95 (n + 1)⌉-th, which 18 rows do not have."""
    rows = [seen(growth) for growth in range(101, 120)]
    assert taught(rows[:18], prior=None).forecast(task(), 750).p95_tokens == 2048
    assert taught(rows, prior=None).forecast(task(), 750).p95_tokens == 750 + 119
    assert taught([seen(n) for n in range(1, 200)], prior=None).forecast(task(), 750).p95_tokens == 750 + 190


def test_long_questions_and_groups_are_told_apart():
    rows = [seen(100 + 3 * length, length) for length in range(20, 220)]
    by_length = taught(rows)
    short, long = by_length.forecast(task(), 720), by_length.forecast(task(), 900)
    assert short.p50_tokens - 720 + 100 < long.p50_tokens - 900
    rows = [seen(growth, metadata={"type": kind}) for kind, growth in (("a", 100), ("b", 500)) for _ in range(100)]
    by_type = taught(rows, group_by=["type"])
    a, b, new = (by_type.forecast(task(type=name), 750).p50_tokens for name in ("a", "b", "new"))
    assert 850 <= a < 900 < new < 1100 < b <= 1250


def test_rows_that_began_together_are_learned_in_the_order_they_began():
    """Else the short ones, which end first, would stand for all."""
    made = taught([], prior=None)
    for name in "abc":
        made.begin(name)
    for name in "cb":
        made.observe(seen(10, row_id=name))
    assert made.forecast(task(), 750).p50_tokens == 2048
    made.observe(seen(500, row_id="a"))
    assert made.forecast(task(), 750) == taught([seen(500), seen(10), seen(10)], prior=None).forecast(task(), 750)


@pytest.mark.parametrize("lost", [{"error_type": "infra"}, {"error_type": "model"}, {"peak_tokens": None}])
def test_rows_that_were_cut_off_teach_nothing(lost):
    assert taught([seen(900, **lost)]).forecast(task(), 750) == taught([]).forecast(task(), 750)


def test_only_the_newest_rows_are_kept_and_little_is_pickled():
    made = taught([seen(1000)] * 10 + [seen(50)] * MAX_ROWS)
    assert made.forecast(task(), 750).quantile_tokens[-2] < 1000
    assert len(pickle.dumps(made)) < 100_000


rows_seen = st.lists(st.builds(seen, st.integers(0, 5000), st.integers(0, 3000), st.integers(0, 12)), max_size=40)


@given(rows_seen, st.integers(0, 6000), st.booleans())
def test_quantiles_ascend_within_the_limits(rows, prompt_tokens, with_prior):
    made = taught(rows, PRIOR if with_prior else None)
    found = made.forecast(task(), prompt_tokens)
    assert list(found.quantile_tokens) == sorted(found.quantile_tokens)
    assert len(found.quantile_tokens) == len(FORECAST_LEVELS)
    most = max(prompt_tokens, 2048)
    assert prompt_tokens <= found.quantile_tokens[0] <= found.p50_tokens <= found.p95_tokens <= most
    assert found.quantile_tokens[-1] == most
    assert 1 <= found.p50_steps <= 9
    assert 0 <= found.shared_tokens <= prompt_tokens


@given(rows_seen, st.integers(1, 2000))
def test_the_same_rows_give_the_same_forecast(rows, prompt_tokens):
    one, two = taught(rows), taught([])
    for row in rows:
        two.forecast(task(), prompt_tokens)  # being asked in between changes nothing
        two.observe(row)
    assert one.forecast(task(), prompt_tokens) == two.forecast(task(), prompt_tokens)
    assert pickle.loads(pickle.dumps(one)).forecast(task(), prompt_tokens) == one.forecast(task(), prompt_tokens)


@given(st.lists(st.integers(1, 40), min_size=1, max_size=20))
def test_largest_first_and_equals_by_row_id(questions):
    tasks = [replace(task(f"q{i}"), sample=sample) for i in range(len(questions)) for sample in (1, 0)]
    counts = {f"q{i}": 700 + question for i, question in enumerate(questions)}
    ordered = list(order(Tasks(tasks), taught([]), counts))
    assert sorted(t.row_id for t, _ in ordered) == sorted(t.row_id for t in tasks)
    keys = [(-f.p95_tokens, -f.p50_tokens, t.row_id) for t, f in ordered]
    assert keys == sorted(keys)
    assert list(order(Tasks(tasks[::-1]), taught([]), counts)) == ordered


def test_past_tables_teach_where_suite_and_model_are_the_same(tmp_path):
    def stored(model_revision: str, prompt_sha: str, growth: int) -> list[dict]:
        numerics = replace(NUMERICS, model_revision=model_revision)
        done = Trajectory(
            task(), (), "Ann", "Ann", "finish", prompt_tokens=750, peak_tokens=750 + growth, numerics=numerics
        )
        facts = replace(FACTS, prompt_sha=prompt_sha)
        row = result_row(done, scored=Scored(1.0, {"exact_match": 1.0}), run=facts, pool=None, rung=None)
        return [row | {"row_id": f"{model_revision}{prompt_sha}{i}"} for i in range(300)]

    rows = stored("commit", "p", 60) + stored("other", "p", 900) + stored("commit", "other", 900)
    write_table(rows_to_table(rows, RESULTS), tmp_path / "part.parquet")
    made = taught([])
    assert made.learn_from_tables(str(tmp_path), FACTS, "commit") == 300
    assert made.forecast(task(), 750).p50_tokens == 810
    for _ in range(200):  # what this run sees counts more than what others saw
        made.observe(seen(200))
    assert made.forecast(task(), 750).p50_tokens == 950
    assert made.learn_from_tables(str(tmp_path / "absent"), FACTS, "commit") == 0


@pytest.fixture
def prepared(tmp_path, smollm2):
    folder = tmp_path / "suite"
    folder.mkdir()
    words = ["Who?", "Who was it that <|im_end|> wrote it, and why?", "  Naïve 日本語 question\nin two lines  "]
    words += ["What is " + "very " * n + "long?" for n in range(40)]
    rows = [{"id": f"q{n}", "question": text, "answer": "yes"} for n, text in enumerate(words)]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    suite = {"name": "s", "data": {"path": "rows.jsonl"}, "prompt": {"system": "Answer.", "fewshot": "Be brief."}}
    (folder / "suite.yaml").write_text(yaml.safe_dump(suite))
    config = {"suite": "suite", "out": "runs/one", "model": {"id": str(smollm2)}, "samples": 2}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
    return prepare(load_run(tmp_path / "run.yaml"))


@pytest.mark.parametrize("name", ["react_text", "react_chat"])
def test_prompts_are_counted_without_being_rendered(prepared, name):
    agent = prepared.config.agent.model_copy(update={"format": name})
    config = prepared.config.model_copy(update={"agent": agent})
    tasks = prepared.rows.tasks
    parts = (config, prepared.suite, prepared.tools, prepared.tokenizer)
    counts, shared = count_prompts(config, prepared.suite, tasks, prepared.tools, prepared.tokenizer)
    rendered = {t.task_id: transcript(*parts, t).token_ids for t in tasks}
    assert counts == {task_id: len(ids) for task_id, ids in rendered.items()}
    assert len({tuple(ids[:shared]) for ids in rendered.values()}) == 1
    assert len({tuple(ids[: shared + 1]) for ids in rendered.values()}) > 1


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Ray's own
def test_a_wrong_forecast_changes_the_order_and_nothing_else(prepared, monkeypatch):
    """Same rows, same seeds, same prompts, same limits, whatever the forecaster says."""
    from pipeline import rollout
    from pipeline.pools import Served

    class Wrong(Forecaster):
        def forecast(self, task: Task, prompt_tokens: int) -> Forecast:
            peak = 10**9 + task.seed % 10**9
            return Forecast(1, 1, peak, peak, (peak,) * len(FORECAST_LEVELS), 10**6)

    def manifest(out: str, learned: Forecaster) -> tuple[list[dict], Limits]:
        served = Served(sized({"single": Pool()}, 0), NUMERICS, Capacity(4096, 8))
        made = replace(prepared, config=prepared.config.model_copy(update={"out": out}))
        write_manifest(made, learned)
        job, _ = rollout.plan_agents(made, learned, "app", served)
        return read_table(f"{out}/tasks", TASKS).to_pylist(), job.limits

    monkeypatch.setattr(rollout, "ray", SimpleNamespace(cluster_resources=lambda: {"CPU": 2}))
    base = prepared.config.out
    rows, limits = manifest(base + "a", forecaster(prepared))
    wrong, wrong_limits = manifest(base + "b", Wrong(LIMITS))

    def by_id(found: list[dict]) -> dict[str, dict]:
        forecasts = {item.name for item in fields(Forecast)}
        return {row["row_id"]: {k: v for k, v in row.items() if k not in forecasts} for row in found}

    assert [row["row_id"] for row in wrong] != [row["row_id"] for row in rows]
    assert by_id(wrong) == by_id(rows)
    assert sorted(map(task_from_row, wrong), key=lambda t: t.row_id) == sorted(
        prepared.rows.tasks, key=lambda t: t.row_id
    )
    assert wrong_limits == limits
    sizes = [forecast_from_row(row).p95_tokens for row in rows]
    assert sizes == sorted(sizes, reverse=True)
    assert len(set(sizes)) > 10


def test_runs_beside_this_one_teach_and_broken_ones_do_not_stop_it(prepared, caplog):
    before = forecaster(prepared).forecast(prepared.rows.tasks[0], 100)
    numerics = replace(NUMERICS, model_revision=prepared.model_revision)
    done = Trajectory(
        prepared.rows.tasks[0], (), "yes", "yes", "finish", prompt_tokens=100, peak_tokens=1100, numerics=numerics
    )
    row = result_row(done, scored=Scored(1.0, {"exact_match": 1.0}), run=prepared.facts, pool=None, rung=None)
    beside = prepared.config.out.removesuffix("one") + "two"
    table = rows_to_table([row | {"row_id": str(n)} for n in range(300)], RESULTS)
    write_table(table, f"{beside}/results/part.parquet")
    assert forecaster(prepared).forecast(prepared.rows.tasks[0], 100) == before  # no run folder: it has no run.json
    run_module.write_json({}, f"{beside}/run.json")
    assert forecaster(prepared).forecast(prepared.rows.tasks[0], 100).p50_tokens == 1100
    run_module.write_bytes(b"not Parquet", f"{beside}/results/broken.parquet")
    assert forecaster(prepared).forecast(prepared.rows.tasks[0], 100) == before
    assert "no forecasts from" in caplog.text

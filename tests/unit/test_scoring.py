import math
import sys
import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from actors.errors import InputError
from actors.messages import Task, Trajectory
from pipeline import scoring
from pipeline.scoring import Scorer, gold_check, load_scorer, load_scorers, normalize, numbers, version_of


def task(*gold: str, task_id: str = "q") -> Task:
    return Task(task_id, 0, "?", gold, {}, {}, 0)


def said(answer: str | None, *gold: str) -> Trajectory:
    return Trajectory(task(*gold), (), answer, answer, "finish")


def scored(name: str, answer: str | None, *gold: str) -> float:
    return scoring.BUILTIN[name](said(answer, *gold), gold)[name]


def custom(function, spec: str = "mine:score") -> Scorer:
    return Scorer(spec, function, "v", builtin=False)


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("The  Beatles!", "beatles"),
        ("a man, an apple & the sea", "man apple sea"),
        ("U.S.", "us"),
        ("Theatre", "theatre"),
        ("  \tA.  ", ""),
        ("1,080", "1080"),
        ("rock-n-roll", "rocknroll"),
        ("Ångström's", "ångströms"),
        ("the-end", "theend"),
    ],
)
def test_hotpotqa_normalisation(text, normal):
    assert normalize(text) == normal


@given(st.text())
def test_normalising_twice_changes_nothing_but_articles_uncovered_by_punctuation(text):
    once = normalize(text)
    assert once == " ".join(once.split())
    assert not set(once.split()) & {"a", "an", "the"}


@pytest.mark.parametrize(
    ("answer", "gold", "exact", "overlap"),
    [
        ("The Beatles", ("beatles",), 1.0, 1.0),
        ("Paris, France", ("Paris",), 0.0, 2 / 3),
        ("Anne", ("Ann", "anne"), 1.0, 1.0),
        ("yes", ("no",), 0.0, 0.0),
        ("yes it is", ("yes",), 0.0, 0.0),
        ("yes", ("yes it is",), 0.0, 0.0),
        ("no", ("No.",), 1.0, 1.0),
        ("noanswer", ("noanswer here",), 0.0, 0.0),
        ("x x y", ("x y y",), 0.0, 2 / 3),
        ("", ("x",), 0.0, 0.0),
        (None, ("x",), 0.0, 0.0),
        ("x", (), 0.0, 0.0),
        ("A", ("A",), 1.0, 1.0),
        ("the", ("A",), 0.0, 0.0),
    ],
)
def test_exact_match_and_f1(answer, gold, exact, overlap):
    assert scored("exact_match", answer, *gold) == exact
    assert scored("f1", answer, *gold) == pytest.approx(overlap)


@given(st.text(st.sampled_from("abc the"), max_size=20), st.text(st.sampled_from("abc the"), max_size=20))
def test_f1_is_symmetric_bounded_and_at_least_exact_match(a, b):
    assert scored("f1", a, b) == scored("f1", b, a)
    assert 0 <= scored("f1", a, b) <= 1
    if a.strip():
        assert scored("f1", a, b) >= scored("exact_match", a, b)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("1,080", [1080]),
        ("$1,080.50 in all.", [1080.5]),
        ("-$5", [-5]),
        ("$-5", [-5]),
        ("−3.5 °C", [-3.5]),
        ("50%", [50]),
        ("3/4", [0.75]),
        ("3 / 4", [0.75]),
        ("1 1/2 cups", [1.5]),
        ("1/0", []),
        ("10-5", [10, 5]),
        ("first 3, then 42.", [3, 42]),
        ("1,2,3", [1, 2, 3]),
        ("12,34", [12, 34]),
        ("1.5e3", [1500]),
        (".5", [0.5]),
        ("CO2", []),
        ("3km", [3]),
        ("9" * 400, []),
        ("none", []),
    ],
)
def test_numbers(text, found):
    assert numbers(text) == pytest.approx(found)


def test_numbers_of_a_huge_text_are_quick():
    for text in ("1" * 100_000, "1," * 50_000, "1 " * 50_000, "-" * 100_000, "1 1/" * 25_000, "," * 100_000):
        assert all(math.isfinite(value) for value in numbers(text))


@pytest.mark.parametrize(
    ("answer", "gold", "right"),
    [
        ("$1,080", "1,080", 1.0),
        ("The answer is 1080 dollars.", "1,080", 1.0),
        ("1080.0005", "1080", 1.0),
        ("1080.5", "1080", 0.0),
        ("18 of 20", "18", 0.0),
        ("-5", "5", 0.0),
        ("0", "0.0", 1.0),
        ("seven", "7", 0.0),
        ("7", "seven", 0.0),
        (None, "7", 0.0),
    ],
)
def test_numeric_match(answer, gold, right):
    assert scored("numeric_match", answer, gold) == right


@given(st.integers(-(10**12), 10**12))
def test_a_number_matches_itself_however_it_is_written(number):
    for text in (f"{number}", f"{number:,}", f"It is {number:,}.", f"{number}%", f"{number}.0"):
        assert scored("numeric_match", text, str(number)) == 1.0


def test_score_gives_every_metric_and_the_primary():
    both = load_scorers(["exact_match", "f1"], ".")
    got = scoring.score(said("Paris, France", "Paris"), both, "f1")
    assert (got.score, got.scores, got.error) == (pytest.approx(2 / 3), {"exact_match": 0.0, "f1": got.score}, None)


def test_no_answer_scores_zero_whatever_the_scorer_says():
    def generous(trajectory, gold):
        return {"length": 5.0 + len(trajectory.answer)}

    got = scoring.score(said(None, "x"), [*load_scorers(["exact_match"], "."), custom(generous)], "exact_match")
    assert (got.score, got.scores, got.error) == (0.0, {"exact_match": 0.0, "length": 0.0}, None)


@pytest.mark.parametrize("wrong", [0.5, None, {"m": math.nan}, {"m": "high"}, {1: 1.0}, {"exact_match": 1.0}])
def test_what_is_no_metric_is_an_error_of_the_row(wrong):
    got = scoring.score(said("x", "x"), [*load_scorers(["exact_match"], "."), custom(lambda *_: wrong)], "exact_match")
    assert (got.score, got.scores) == (1.0, {"exact_match": 1.0})
    assert got.error is not None
    assert "mine:score" in got.error


def test_a_broken_primary_scorer_gives_no_score_and_raises_nothing():
    def broken(trajectory, gold):
        raise KeyError("oops")

    got = scoring.score(said("x", "x"), [custom(broken)], "cite")
    assert (got.score, got.scores) == (None, {})
    assert got.error is not None
    assert "KeyError" in got.error
    got = scoring.score(said("x", "x"), load_scorers(["f1"], "."), "cite")
    assert got.score is None
    assert "cite" in str(got.error)


def test_gold_check_names_what_does_not_score_one():
    f1 = load_scorers(["f1"], ".")
    failures = gold_check([task("Ann", "Bob"), task(task_id="empty")], f1, "f1")
    assert [str(failure) for failure in failures] == ["task empty: no gold answer"]
    failures = gold_check([task("5", "five", task_id="q7")], load_scorers(["numeric_match"], "."), "numeric_match")
    assert [str(failure) for failure in failures] == ["task q7: gold 'five' scores 0.0, not 1.0"]
    assert gold_check([task()], [custom(lambda *_: {"m": 1})], "m") == []


def test_gold_check_names_scorer_and_row_of_an_exception():
    def broken(trajectory, gold):
        raise KeyError("oops")

    with pytest.raises(InputError, match=r"mine:score failed on row q/0: KeyError"):
        gold_check([task("x")], [custom(broken)], "m")
    with pytest.raises(InputError, match=r"primary: no scorer gives this metric .*wants f1"):
        gold_check([task("x")], load_scorers(["f1"], "."), "exact_match")


def test_a_scorer_that_exits_is_one_that_failed():
    scorer = custom(lambda *_: sys.exit(3))
    assert scoring.score(said("x", "x"), [scorer], "m").error == "scorer mine:score: RuntimeError: SystemExit: 3"
    with pytest.raises(InputError, match="SystemExit: 3"):
        gold_check([task("x")], [scorer], "m")


def test_a_scorer_of_ones_own(tmp_path: Path):
    file = tmp_path / "berth_test_scorer.py"
    file.write_text("def cite(trajectory, gold):\n    return {'cite': float(trajectory.answer in gold)}\n")
    mine = load_scorer("berth_test_scorer:cite", tmp_path)
    assert scoring.score(said("x", "x"), [mine], "cite").score == 1.0
    assert not mine.builtin
    with pytest.raises(InputError):
        load_scorer("berth_test_scorer:nothing", tmp_path)
    with pytest.raises(InputError):
        load_scorer("berth_no_such_module:cite", tmp_path)


def test_an_unknown_scorer_is_refused_with_the_known_ones():
    with pytest.raises(InputError, match="exact_match, f1, numeric_match"):
        load_scorer("exactmatch", ".")


def test_versions_tell_scorers_apart_and_are_stable():
    loaded = load_scorers(list(scoring.BUILTIN), ".")
    assert len({scorer.version for scorer in loaded}) == 3
    assert version_of(loaded) == version_of(load_scorers(list(scoring.BUILTIN), "."))
    assert version_of(loaded).startswith("exact_match@")


def test_what_a_scorer_imports_is_part_of_its_version(tmp_path: Path):
    (tmp_path / "berth_judge").mkdir()
    files = {
        "berth_judge/__init__.py": "",
        "berth_judge/cite.py": "import json\nfrom .words import WORDS\ndef cite(*_):\n    import berth_late as l\n",
        "berth_judge/words.py": "WORDS = 1\n",
        "berth_late.py": "LATE = 1\n",
        "other.py": "",
    }
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    (tmp_path / "json").mkdir()  # a folder that is no module, though one that is imported has its name

    def version() -> str:
        return load_scorer("berth_judge.cite:cite", tmp_path).version

    first = version()
    (tmp_path / "other.py").write_text("x = 1\n")
    assert version() == first
    for name in ("berth_judge/words.py", "berth_late.py", "berth_judge/__init__.py", "berth_judge/cite.py"):
        before = version()
        (tmp_path / name).write_text(files[name] + "# changed\n")
        assert version() != before


def test_a_scorer_that_hangs_leaves_an_error_and_is_given_up_after_some_calls(monkeypatch):
    monkeypatch.setattr(scoring, "SCORER_S", 0.05)
    monkeypatch.setattr(scoring, "MAX_HUNG", 2)
    go_on = threading.Event()
    scorers = [*load_scorers(["exact_match"], "."), custom(lambda *_: go_on.wait() and {"cite": 1.0})]
    found = [scoring.score(said("x", "x"), scorers, "exact_match") for _ in range(3)]
    assert [one.score for one in found] == [1.0, 1.0, 1.0]
    assert ["no result after 0.05 s" in one.error for one in found] == [True, True, False]
    assert "not called: 2 calls hang" in found[2].error
    go_on.set()
    for thread in list(scoring._hung):
        thread.join(20)
    assert scoring.score(said("x", "x"), scorers, "cite").score == 1.0

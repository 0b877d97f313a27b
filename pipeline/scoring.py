"""Scorers by name: (Trajectory, gold) → {metric: float}, and what a trajectory's scores are.

Knows nothing of storage, Ray or models. Scoring needs no GPU and may be repeated on a finished run.
"""

from __future__ import annotations

import hashlib
import inspect
import math
import re
import string
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass, field, replace
from pathlib import Path
from threading import Thread
from typing import Any

from actors.errors import InputError
from actors.messages import Task, Trajectory

SCORER_S = 60.0
"""Seconds that a scorer of one's own may take for one trajectory."""
MAX_HUNG = 16
"""Calls that hang past their limit in one process at which scorers of one's own are not called any more."""

Score = Callable[[Trajectory, tuple[str, ...]], Mapping[str, float]]


@dataclass(frozen=True, slots=True)
class Scorer:
    """One scorer.

    Attributes:
        spec: as the suite names it.
        function: (trajectory, gold) → {metric: value}; may raise anything.
        version: digest of name and source, also of what it imports from the suite's folder; a change means that old
            and new scores are not comparable.
        builtin: one of BUILTIN, which need gold.
    """

    spec: str
    function: Score
    version: str
    builtin: bool


@dataclass(frozen=True, slots=True)
class Scored:
    """What the scorers said of one trajectory.

    Attributes:
        score: the primary metric; None where its scorer failed.
        scores: every metric.
        error: which scorers failed and how; None without a failure. The generation is kept all the same.
    """

    score: float | None
    scores: Mapping[str, float] = field(default_factory=dict)
    error: str | None = None


@dataclass(frozen=True, slots=True)
class GoldFailure:
    """A gold answer that the primary metric does not score 1.0.

    Attributes:
        gold: the answer; None where the task has none.
        score: what it got; None where there was nothing to score.
    """

    task_id: str
    gold: str | None
    score: float | None

    def __str__(self) -> str:
        if self.gold is None:
            return f"task {self.task_id}: no gold answer"
        return f"task {self.task_id}: gold {self.gold[:200]!r} scores {self.score}, not 1.0"


def normalize(text: str) -> str:
    """HotpotQA's `normalize_answer`: lower case, no ASCII punctuation, no a/an/the, single spaces.

    Source: hotpot_evaluate_v1.py (Yang et al. 2018), which took it from SQuAD.
    """
    bare = "".join(char for char in text.lower() if char not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", bare).split())


def _comparable(text: str) -> str:
    """Normalised; an answer of nothing but articles and punctuation (choice `A`, `+`) stays as it is.

    Here ours differs from the official script, under which any such answer equals any other.
    """
    return normalize(text) or text.strip().lower()


def _best(answer: str | None, gold: Iterable[str], metric: Callable[[str, str], float]) -> float:
    return 0.0 if answer is None else max((metric(answer, accepted) for accepted in gold), default=0.0)


def exact_match(trajectory: Trajectory, gold: tuple[str, ...]) -> dict[str, float]:
    """1.0 where the answer equals a gold answer after HotpotQA's normalisation."""
    return {"exact_match": _best(trajectory.answer, gold, lambda a, b: float(_comparable(a) == _comparable(b)))}


def f1(trajectory: Trajectory, gold: tuple[str, ...]) -> dict[str, float]:
    """Token F1 against the best gold answer, HotpotQA's: yes, no and noanswer score only when equal."""
    return {"f1": _best(trajectory.answer, gold, _f1)}


def _f1(answer: str, gold: str) -> float:
    said, accepted = _comparable(answer), _comparable(gold)
    if said != accepted and {said, accepted} & {"yes", "no", "noanswer"}:
        return 0.0
    said_tokens, gold_tokens = said.split(), accepted.split()
    common = (Counter(said_tokens) & Counter(gold_tokens)).total()
    return 2 * common / (len(said_tokens) + len(gold_tokens)) if common else 0.0


# Not inside a word or number (CO2, v1.2.3); thousands only in proper groups; `3/4` and `1 1/2` are fractions.
_NUMBER = re.compile(
    r"(?<![\w.])(?P<sign>[-−+])?(?:[$€£¥]\s?)?(?P<inner>[-−+])?"
    r"(?P<number>(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)(?P<exponent>[eE][-+]?\d+\b)?"
    r"(?:\s?/\s?(?P<over>\d+)|\s(?P<top>\d+)/(?P<bottom>\d+))?",
    re.ASCII,
)


def numbers(text: str) -> list[float]:
    """The numbers in a text, in order: signs, thousands, decimals, exponents, fractions, currency.

    Units are dropped, not converted: `50%` is 50, `3 km` is 3. Words (`five`, `2 million`) are not read.
    """
    found = [_value(match) for match in _NUMBER.finditer(text)]
    return [value for value in found if math.isfinite(value)]


def _value(match: re.Match[str]) -> float:
    value = float(match["number"].replace(",", "") + (match["exponent"] or ""))
    try:
        if match["over"]:
            value /= float(match["over"])
        elif match["bottom"]:
            value += float(match["top"]) / float(match["bottom"])
    except ZeroDivisionError:
        return math.nan
    return -value if (match["sign"] or match["inner"]) in ("-", "−") else value


def numeric_match(trajectory: Trajectory, gold: tuple[str, ...]) -> dict[str, float]:
    """1.0 where the answer's last number is within 1e-6 (relative) of a gold answer's last number."""
    return {"numeric_match": _best(trajectory.answer, gold, _numeric)}


def _numeric(answer: str, gold: str) -> float:
    said, accepted = numbers(answer), numbers(gold)
    return float(bool(said and accepted) and math.isclose(said[-1], accepted[-1], rel_tol=1e-6, abs_tol=1e-12))


BUILTIN: dict[str, Score] = {"exact_match": exact_match, "f1": f1, "numeric_match": numeric_match}
_HELPERS = (normalize, _comparable, _best, _f1, numbers, _value, _numeric)


def load_scorer(spec: str, base: str | Path) -> Scorer:
    """A built-in scorer by name, or `module:callable` from the suite's folder or the installed packages.

    Raises:
        InputError: no such scorer, module or callable.
    """
    if spec in BUILTIN:
        source = "".join(inspect.getsource(part) for part in (BUILTIN[spec], *_HELPERS)) + _NUMBER.pattern
        return Scorer(spec, BUILTIN[spec], _digest(spec, source), builtin=True)
    if ":" not in spec:
        raise InputError("no such scorer", field="scorers", got=spec, wants=", ".join((*BUILTIN, "module:callable")))
    from actors.tools.load import load_attribute, sources  # here, so that tables and reports load no tools

    function: Any = load_attribute(spec, Path(base), "scorers")
    if not isinstance(function, Callable):
        raise InputError("not callable", field="scorers", got=spec, wants="(trajectory, gold) -> {metric: number}")
    owner: Any = function if inspect.isroutine(function) else type(function)
    file = inspect.getsourcefile(owner)
    place = Path(base).joinpath(*spec.partition(":")[0].split("."))
    starts = [Path(file)] if file else []
    starts += [path for path in (place.with_suffix(".py"), place / "__init__.py") if path.is_file()]
    files = set[Path]().union(*(sources(start.resolve(), Path(base).resolve()) for start in starts))
    source = "".join(path.read_bytes().decode("utf-8", "replace") for path in sorted(files)) or spec
    return Scorer(spec, function, _digest(spec, source), builtin=False)


def load_scorers(specs: Sequence[str], base: str | Path) -> tuple[Scorer, ...]:
    """`load_scorer` for each."""
    return tuple(load_scorer(spec, base) for spec in specs)


def version_of(scorers: Sequence[Scorer]) -> str:
    """Names and versions in one line, for `scorer_version`."""
    return " ".join(f"{scorer.spec}@{scorer.version}" for scorer in scorers)


def _digest(spec: str, source: str) -> str:
    return hashlib.sha256(f"{spec}\n{source}".encode()).hexdigest()[:12]


def score(trajectory: Trajectory, scorers: Sequence[Scorer], primary: str) -> Scored:
    """Scores of one trajectory; never raises for a scorer's fault.

    An answer of None scores 0 in every metric. Scorers then see an empty answer, so that they need not
    reckon with None and their metrics' names are known.
    """
    answered = trajectory if trajectory.answer is not None else replace(trajectory, answer="")
    scores: dict[str, float] = {}
    errors: list[str] = []
    for scorer in scorers:
        try:
            scores |= _run(scorer, answered, taken=scores)
        except Exception as e:
            errors.append(f"scorer {scorer.spec}: {type(e).__name__}: {e}")
    if trajectory.answer is None:
        return Scored(0.0, dict.fromkeys({primary: 0.0, **scores}, 0.0))
    if primary not in scores and not errors:
        errors.append(f"no scorer gave the primary metric {primary}")
    return Scored(scores.get(primary), scores, "; ".join(errors)[:2000] or None)


def _run(scorer: Scorer, trajectory: Trajectory, taken: Mapping[str, float] = {}) -> dict[str, float]:
    """The scorer's metrics, checked.

    Raises:
        ValueError: what it gave is not {name: finite number}.
        TimeoutError: it gave nothing within SCORER_S.
        Exception: what it raises.
    """
    gold = trajectory.task.gold
    said: Any = scorer.function(trajectory, gold) if scorer.builtin else _in_time(scorer.function, trajectory, gold)
    if not isinstance(said, Mapping) or not all(isinstance(name, str) for name in said):
        raise ValueError(f"gave {type(said).__name__} {str(said)[:80]}, wants {{metric: number}}")
    if twice := taken.keys() & said.keys():
        raise ValueError(f"metric {sorted(twice)} is another scorer's too")
    values = {name: float(value) for name, value in said.items()}
    if bad := [name for name, value in values.items() if not math.isfinite(value)]:
        raise ValueError(f"metric {bad} is not finite")
    return values


_hung: list[Thread] = []


def _in_time(function: Score, trajectory: Trajectory, gold: tuple[str, ...]) -> Any:
    """What the function returns or raises; Python cannot stop a thread, so one that hangs is left behind."""
    _hung[:] = [thread for thread in _hung if thread.is_alive()]
    if len(_hung) >= MAX_HUNG:
        raise TimeoutError(f"not called: {len(_hung)} calls hang past their limit of {SCORER_S:g} s")
    outcome: Future[Any] = Future()

    def work() -> None:
        try:
            outcome.set_result(function(trajectory, gold))
        except Exception as e:
            outcome.set_exception(e)
        except BaseException as e:  # as of sys.exit, which would end the caller's thread and not the process
            outcome.set_exception(RuntimeError(f"{type(e).__name__}: {e}"))

    thread = Thread(target=work, name="berth-scorer", daemon=True)
    thread.start()
    if not wait([outcome], SCORER_S).done:
        _hung.append(thread)
        raise TimeoutError(f"no result after {SCORER_S:g} s")
    return outcome.result()


def gold_check(tasks: Iterable[Task], scorers: Sequence[Scorer], primary: str) -> list[GoldFailure]:
    """Every gold answer, given as the answer, should score 1.0 in the primary metric; those that do not.

    Raises:
        InputError: a scorer raised (its name and the row are named), or no scorer gives the primary metric.
    """
    failures: list[GoldFailure] = []
    for task in tasks:
        if not task.gold and any(scorer.builtin and scorer.spec == primary for scorer in scorers):
            failures.append(GoldFailure(task.task_id, None, None))
        for gold in task.gold:
            got = _checked(Trajectory(task, (), gold, gold, "finish"), scorers, primary)
            if not math.isclose(got, 1.0):
                failures.append(GoldFailure(task.task_id, gold, got))
    return failures


def _checked(trajectory: Trajectory, scorers: Sequence[Scorer], primary: str) -> float:
    scores: dict[str, float] = {}
    for scorer in scorers:
        try:
            scores |= _run(scorer, trajectory, taken=scores)
        except Exception as e:
            what = f"scorer {scorer.spec} failed on row {trajectory.task.row_id}: {type(e).__name__}: {e}"
            raise InputError(what, field="scorers", got=trajectory.answer) from e
    if primary not in scores:
        raise InputError("no scorer gives this metric", field="primary", got=primary, wants=", ".join(scores))
    return scores[primary]

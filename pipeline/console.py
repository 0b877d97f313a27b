"""What a person sees: lines, a progress bar with ETA on a terminal, plain lines elsewhere.

Knows no Ray and no tables; it is given numbers and texts.
"""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Generator
from contextlib import contextmanager
from typing import IO, Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

PLAIN_EVERY_S = 10.0
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def _console(file: IO[str]) -> Console:
    return Console(file=file, soft_wrap=True, highlight=False, emoji=False)


class Screen:
    """Where the run's story is told. With `quiet_stdout`, on stderr, so that stdout holds JSON alone."""

    def __init__(self, quiet_stdout: bool = False):
        self.console = _console(sys.stderr if quiet_stdout else sys.stdout)

    def line(self, topic: str, text: str) -> None:
        """One line of the story: a topic and what happened."""
        self.console.print(f"[bold cyan]{escape(topic):<10}[/] {escape(clean(text))}")

    def error(self, text: str) -> None:
        """What is wrong, for the person who can mend it."""
        _console(sys.stderr).print(f"[bold red]error[/] {escape(clean(text))}")

    @contextmanager
    def progress(self, total: int) -> Generator[Any]:
        """A callable (done, text) that shows how far the run is."""
        if not self.console.is_terminal:
            yield _Plain(self, total)
            return
        columns = (
            TextColumn("[bold cyan]rollouts  [/]"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.description}"),
        )
        with Progress(*columns, console=self.console) as bar:
            task = bar.add_task("", total=total)
            yield lambda done, text: bar.update(task, completed=done, description=text)

    def trajectory(self, row: dict[str, Any]) -> None:
        """One whole trajectory, as the model and its tools wrote it."""
        self.console.print()
        self.console.print(f"[bold]{escape(_short(row['question']))}[/]")
        for number, step in enumerate(row["trajectory"], 1):
            if step["thought"]:
                self.console.print(f"[dim]Thought {number}:[/] {escape(_short(step['thought']))}")
            self.console.print(f"[dim]Action {number}:[/] {escape(_short(step['action']))}")
            if step["observation"]:
                self.console.print(f"[dim]Observation {number}:[/] {escape(_short(step['observation']))}")
        gold = _short(" | ".join(row["gold"]))
        answer = _short(row["answer"]) if row["answer"] is not None else "(none)"
        self.console.print(f"[dim]Answer:[/] {escape(answer)}   [dim]gold:[/] {escape(gold)}", end="   ")
        score = "none" if row["score"] is None else f"{row['score']:.2f}"
        self.console.print(f"[dim]score:[/] {score}   [dim]ended by:[/] {escape(row['stop_reason'])}")
        self.console.print()


class _Plain:
    """Progress as a line now and then, for logs."""

    def __init__(self, screen: Screen, total: int):
        self.screen, self.total = screen, total
        self.next_at = 0.0

    def __call__(self, done: int, text: str) -> None:
        if time.monotonic() < self.next_at and done < self.total:
            return
        self.next_at = time.monotonic() + PLAIN_EVERY_S
        self.screen.line("rollouts", f"{done:,}/{self.total:,} {text}")


def _short(text: str, most: int = 400) -> str:
    text = clean(" ".join(text.split()))
    return text if len(text) <= most else text[:most] + " …"


def clean(text: str) -> str:
    """`text` without characters that steer a terminal or reorder what is read: it may be a model's or a tool's."""
    return _CONTROL.sub("\N{REPLACEMENT CHARACTER}", text)


def duration(seconds: float) -> str:
    """`2 h 05 min`, `3 min 07 s` or `12 s`."""
    whole = round(seconds)
    if whole >= 3600:
        return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
    return f"{whole // 60} min {whole % 60:02d} s" if whole >= 60 else f"{whole} s"


def eta(done: int, before: int, total: int, elapsed_s: float) -> str:
    """Time left at the pace of this session, `before` rows being done when it started; unknown until five more are."""
    fresh, left = done - before, total - done
    if left and fresh < min(5, total - before):
        return "ETA ?"
    return f"ETA {duration(left * elapsed_s / max(1, fresh))}"

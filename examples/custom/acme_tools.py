"""A tool of one's own: reads articles of Acme's wiki from the file beside this one.

Knows nothing of Berth: a tool is a callable with typed arguments that returns a string.
"""

from __future__ import annotations

import difflib
import json
from pathlib import Path

ARTICLES = Path(__file__).with_name("articles.jsonl")


class Wiki:
    """Read the article of Acme's wiki with this title."""

    def __init__(self):
        """Runs once per trajectory, so what is kept on `self` is this trajectory's own."""
        self._file = ARTICLES.open(encoding="utf-8")
        self._read: set[str] = set()

    def __call__(self, title: str) -> str:
        """Runs in a thread, so it may wait; an `async def` runs in the agent's event loop instead."""
        self._file.seek(0)
        articles = {row["title"].casefold(): row for row in map(json.loads, self._file)}
        article = articles.get(title.strip().casefold())
        if article is None:
            near = difflib.get_close_matches(title.casefold(), articles, n=3, cutoff=0.3)
            return f"Could not find [{title}]. Similar: {[articles[key]['title'] for key in near]}."
        again = "You read this before. " if article["title"] in self._read else ""
        self._read.add(article["title"])
        return f"{again}{article['title']}: {article['text']}"

    def close(self) -> None:
        """Runs when the trajectory ends, however it ends."""
        self._file.close()

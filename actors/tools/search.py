"""Search[entity] and Lookup[keyword] over a corpus file or the task's own paragraphs.

The actions of Yao et al. 2022 ("ReAct", section 3.1) and the wording of their observations. Ours differ in that
an article is shown whole (to the tool's token limit; theirs shows five sentences), that articles come from a file
instead of Wikipedia, and that a title which holds every word asked for is good enough. Knows nothing of limits.
"""

from __future__ import annotations

import json
import re
import threading
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from rank_bm25 import BM25Okapi

from actors.errors import InputError, ToolCrash, ToolError
from actors.messages import Task

SIMILAR = 5
MAX_CANDIDATES = 10_000  # articles scored per query, those with its rarest words first: some 10 ms
UNTITLED_CHARS = 60


@dataclass(frozen=True, slots=True)
class Article:
    """A title, the text as shown, and its sentences for Lookup."""

    title: str
    text: str
    sentences: tuple[str, ...]

    @classmethod
    def of_text(cls, text: str, title: str | None = None) -> Article:
        """An article whose sentences are split from its text; without a title, the text's beginning is one."""
        sentences = (part.strip() for part in re.split(r"(?<=[.!?])\s+|\n+", text))
        beginning = text.strip()
        if len(beginning) > UNTITLED_CHARS:
            beginning = beginning[:UNTITLED_CHARS].rsplit(" ", 1)[0] + " …"
        return cls(beginning if title is None else title, text, tuple(part for part in sentences if part))


class Corpus:
    """Articles by title and by BM25 (rank_bm25's Okapi) over title and text. Read-only, shared by threads."""

    def __init__(self, articles: Iterable[Article]):
        self.articles = tuple(articles)
        self._by_title: dict[str, int] = {}
        self._postings: dict[str, list[int]] = defaultdict(list)
        for number, article in enumerate(self.articles):
            self._by_title.setdefault(_key(article.title), number)
        self._titles = [frozenset(_words(article.title)) for article in self.articles]
        # [""] stands for no words at all, on which rank_bm25 divides by zero
        words = (_words(f"{article.title} {article.text}") or [""] for article in self.articles)
        self._bm25: Any = BM25Okapi(words if self.articles else [[""]])
        self._bm25.doc_len = np.array(self._bm25.doc_len)  # rank_bm25 converts the list at every query
        for number, counts in enumerate(self._bm25.doc_freqs):
            for word in counts:
                self._postings[word].append(number)

    def exact(self, title: str) -> int | None:
        """The article of that title, whatever its case, width and spaces."""
        return self._by_title.get(_key(title))

    def ranked(self, query: str) -> list[int]:
        """Articles that share a word with the query, best first; ties in the corpus's order."""
        words = _words(query)
        candidates: set[int] = set()
        for word in sorted({word for word in words if word in self._postings}, key=lambda w: len(self._postings[w])):
            candidates.update(self._postings[word][:MAX_CANDIDATES])
            if len(candidates) >= MAX_CANDIDATES:
                break
        if not candidates:
            return []
        numbers = sorted(candidates)
        scores = self._bm25.get_batch_scores(words, numbers)
        return [number for _, number in sorted(zip(scores, numbers, strict=True), key=lambda pair: (-pair[0], pair[1]))]

    def named(self, query: str, numbers: Iterable[int]) -> Iterator[int]:
        """Those of `numbers` whose title holds every word of the query, articles aside."""
        wanted = frozenset(_words(query)) - {"a", "an", "the"}
        return (number for number in numbers if wanted and wanted <= self._titles[number])


class Pages:
    """One trajectory's reading: Search opens a page, Lookup goes through it."""

    def __init__(self, corpus: Corpus, top_k: int = 1):
        self._corpus = corpus
        self._top_k = top_k
        self._sentences: tuple[str, ...] | None = None
        self._keyword: str | None = None
        self._hits: list[str] = []
        self._shown = 0

    def search(self, entity: str) -> str:
        """Read the article titled `entity`; if there is none, similar titles are listed."""
        if not entity.strip():
            raise ToolError("Search wants the name of an entity.")
        corpus = self._corpus
        exact, ranked = corpus.exact(entity), corpus.ranked(entity)
        first = [] if exact is None else [exact]
        found = (first + [n for n in corpus.named(entity, ranked) if n != exact])[: self._top_k]
        if not found:
            titles = list(dict.fromkeys(corpus.articles[number].title for number in ranked[:SIMILAR]))
            return f"Could not find [{entity}]. Similar: {titles}."
        pages = [corpus.articles[number] for number in found]
        self._sentences = tuple(sentence for page in pages for sentence in page.sentences)
        self._keyword = None
        shown = (
            page.text if n == exact else f"{page.title}: {page.text}" for n, page in zip(found, pages, strict=True)
        )
        return "\n".join(shown)

    def lookup(self, keyword: str) -> str:
        """Find the next sentence with `keyword` in the article that the last search found."""
        if self._sentences is None:
            raise ToolError("There is no page to look into: search for an article first.")
        key = _key(keyword)
        if not key:
            raise ToolError("Lookup wants a keyword.")
        if key != self._keyword:
            self._keyword, self._shown = key, 0
            self._hits = [sentence for sentence in self._sentences if key in _key(sentence)]
        if self._shown >= len(self._hits):
            return "No more results."
        self._shown += 1
        return f"(Result {self._shown} / {len(self._hits)}) {self._hits[self._shown - 1]}"


def own_paragraphs(task: Task, field: str) -> Corpus:
    """A corpus of the task's row: {title, sentences}, {title, text} or plain strings. ToolCrash if it is neither."""
    rows = task.row.get(field)
    if isinstance(rows, str | Mapping) or not isinstance(rows, Iterable):
        raise ToolCrash(f"the task's row has no list of paragraphs in its field {field!r}")
    return Corpus(_paragraph(row, field) for row in rows)


def _paragraph(row: Any, field: str) -> Article:
    match row:
        case str():
            return Article.of_text(row)
        case {"title": str() as title, "text": str() as text}:
            return Article.of_text(text, title)
        case {"title": str() as title, "sentences": rest} if isinstance(rest, Iterable) and not isinstance(rest, str):
            sentences = tuple(str(sentence).strip() for sentence in rest)
            return Article(title, " ".join(sentences), sentences)
        case _:
            raise ToolCrash(
                f"a paragraph in the field {field!r} is neither a string nor has title and text: {row!r:.80}"
            )


_corpora: dict[Path, tuple[tuple[int, int], Corpus]] = {}
_corpora_lock = threading.Lock()


def load_corpus(path: Path, field: str) -> Corpus:
    """The index of a corpus file, built once per process for each version of the file.

    Args:
        path: .parquet or .jsonl with the columns title and text (strings).
        field: where the suite names it, for errors.

    Raises:
        InputError: missing, unreadable, a column missing, a row without title or text, no rows.
    """
    path = path.resolve()
    wrong = {"file": str(path), "field": field}
    if path.suffix not in (".parquet", ".jsonl"):
        raise InputError("unknown kind of corpus", **wrong, got=path.suffix, wants=".parquet or .jsonl")
    try:
        with _corpora_lock:
            stat = path.stat()
            version = (stat.st_mtime_ns, stat.st_size)
            if path not in _corpora or _corpora[path][0] != version:
                _corpora.pop(path, None)
                rows = _parquet_rows(path, wrong) if path.suffix == ".parquet" else _jsonl_rows(path, wrong)
                corpus = Corpus(_articles(rows, wrong))
                if not corpus.articles:
                    raise InputError("the corpus has no rows", **wrong)
                _corpora[path] = (version, corpus)
            return _corpora[path][1]
    except FileNotFoundError as e:
        raise InputError("the corpus does not exist", **wrong) from e
    except (OSError, UnicodeDecodeError, pa.ArrowException) as e:
        raise InputError(f"the corpus cannot be read: {e}", **wrong) from e


def _parquet_rows(path: Path, wrong: Mapping[str, str]) -> Iterator[tuple[int, Mapping[str, Any]]]:
    with pq.ParquetFile(path) as file:
        names: Sequence[str] = file.schema_arrow.names
        _check_columns(names, wrong)
        number = 0
        for batch in file.iter_batches(columns=["title", "text"]):
            for row in batch.to_pylist():
                number += 1
                yield number, row


def _jsonl_rows(path: Path, wrong: Mapping[str, str]) -> Iterator[tuple[int, Mapping[str, Any]]]:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line.decode("utf-8-sig").rstrip())
            except UnicodeDecodeError as e:
                raise InputError(f"line {number} is not UTF-8 at its byte {e.start + 1}", **wrong) from e
            except (ValueError, RecursionError) as e:
                raise InputError(f"line {number} is not JSON: {e}", **wrong) from e
            if not isinstance(row, dict):
                raise InputError(f"line {number} is not an object", **wrong, got=row, wants="title and text")
            _check_columns(row, wrong)
            yield number, row


def _check_columns(names: Iterable[str], wrong: Mapping[str, str]) -> None:
    names = list(names)
    for column in ("title", "text"):
        if column not in names:
            raise InputError(f"the corpus has no column {column!r}", **wrong, got=names, wants="title and text")


def _articles(rows: Iterable[tuple[int, Mapping[str, Any]]], wrong: Mapping[str, str]) -> Iterator[Article]:
    for number, row in rows:
        title, text = row["title"], row["text"]
        if not isinstance(title, str) or not isinstance(text, str):
            raise InputError(f"row {number}: title and text must be strings", **wrong, got=(title, text))
        yield Article.of_text(text, title)


def _key(text: str) -> str:
    """For equality: one width, one case, single spaces."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def _words(text: str) -> list[str]:
    """For likeness: words without case and accents, so that Shojo finds Shōjo."""
    bare = "".join(c for c in unicodedata.normalize("NFKD", text) if not unicodedata.combining(c))
    return re.findall(r"\w+", bare.casefold())

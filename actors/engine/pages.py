"""Which KV page belongs to whom: a prefix tree over pages, pins, LRU eviction. Pure bookkeeping.

Paging as in PagedAttention (Kwon et al. 2023, §4), sharing by a tree over token ids as in RadixAttention (Zheng et al.
2024, §3). Ours differs: tree nodes are whole pages and are found by their tokens, not by a hash of them; the last,
partial page of a sequence is a leaf too, which its owner fills in place and which others copy from; and pages that only
one sequence ever used count as free in the moment it ends, although their content stays findable until overwritten.

Knows nothing of tensors, threads, requests or time. Not thread-safe: one thread calls it.
"""

from __future__ import annotations

import heapq
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import count

# Children that a diverging prompt is compared with, newest first: bounds the host time of an admission.
_COPY_CANDIDATES = 8


@dataclass(frozen=True, slots=True)
class Admission:
    """What an admitted sequence starts with.

    Attributes:
        reused_tokens: leading tokens whose KV is in its pages (after `copies`); at most all but the last.
        copies: (source page, target page, tokens) to copy, in order, before any page is written.
        pages: its page table.
    """

    reused_tokens: int
    copies: tuple[tuple[int, int, int], ...]
    pages: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class PageStats:
    """Pages by state, `total = free + cached + pinned`; the scratch page is not counted.

    Attributes:
        free: blank, or left behind by the only sequence that used them.
        cached: kept for a sequence that waits, or because several sequences used them.
        pinned: in the table of a running sequence.
        evictions: cached pages given up so far.
    """

    total: int
    free: int
    cached: int
    pinned: int
    evictions: int


@dataclass(eq=False, slots=True)
class _Node:
    """A page with content. `tokens` is shorter than a page in a tail, which only its owner may fill."""

    parent: _Node | None
    page: int
    tokens: tuple[int, ...]
    children: dict[tuple[int, ...], _Node] = field(default_factory=dict)
    tails: dict[_Node, None] = field(default_factory=dict)
    promised: set[tuple[int, ...]] = field(default_factory=set)  # pages that a running sequence will add below
    live: int = 0  # sequences, running or waiting, whose context includes it
    pins: int = 0  # of them running
    shared: bool = False  # a second sequence has used it
    stamp: int = 0
    gone: bool = False

    @property
    def spare(self) -> bool:
        """Left behind by its only user: free, its content still findable."""
        return not self.live and not self.shared

    @property
    def rank(self) -> tuple[bool, int]:
        """Order of eviction: spare pages, then the least recently used."""
        return (not self.spare, self.stamp)

    @property
    def evictable(self) -> bool:
        return not (self.gone or self.pins or self.children or self.tails)


@dataclass(eq=False, slots=True)
class _Sequence:
    root: _Node
    target: tuple[int, ...]  # the context it was admitted with
    path: list[_Node]
    tail: _Node | None
    pages: list[int]  # of path, then of tail, then fresh ones
    running: bool = True
    promise: tuple[_Node, tuple[int, ...]] | None = None

    @property
    def nodes(self) -> list[_Node]:
        return [*self.path, self.tail] if self.tail else self.path

    @property
    def end(self) -> _Node:
        return self.path[-1] if self.path else self.root


class PageAllocator:
    """Hands out pages 1 to `num_pages - 1`; page 0 is scratch for padding and never handed out.

    A sequence is running (its pages pinned), waiting (its content cached, evictable) or unknown. A page is written by
    one running sequence only, behind what was committed, and never once a second sequence uses it.

    Args:
        num_pages: pages in all, the scratch page included; at least 2.
        page_tokens: tokens a page.
        min_copy_tokens: a partial page is copied for no fewer tokens; None is a sixteenth of a page.
    """

    def __init__(self, num_pages: int, page_tokens: int, *, min_copy_tokens: int | None = None):
        if num_pages < 2 or page_tokens < 1:
            raise ValueError(f"needs 2 pages and 1 token a page at least, got {num_pages} and {page_tokens}")
        self.num_pages, self.page_tokens = num_pages, page_tokens
        self._min_copy = max(1, page_tokens // 16) if min_copy_tokens is None else min_copy_tokens
        self._blank = list(range(num_pages - 1, 0, -1))
        self._pinned = 0  # pages of nodes with pins, and fresh pages
        self._spare = 0
        self._evictions = 0
        self._roots: dict[Hashable, _Node] = {}
        self._sequences: dict[str, _Sequence] = {}
        self._heap: list[tuple[tuple[bool, int], int, _Node]] = []  # may hold outdated entries
        self._clock = count(1)

    @property
    def capacity_tokens(self) -> int:
        """Tokens that one sequence alone can hold."""
        return (self.num_pages - 1) * self.page_tokens

    @property
    def available(self) -> int:
        """Pages that no running sequence uses."""
        return self.num_pages - 1 - self._pinned

    @property
    def stats(self) -> PageStats:
        """Pages by state, now."""
        free = len(self._blank) + self._spare
        return PageStats(self.num_pages - 1, free, self.available - free, self._pinned, self._evictions)

    def promised(self, token_ids: Sequence[int], policy: Hashable = None) -> bool:
        """True: a running sequence is about to write the next page that this context needs. Waiting for it saves
        computing (and holding) the page twice; the running sequence advances, so the wait ends."""
        path = self._walk(token_ids, policy)
        done = len(path) * self.page_tokens
        end = path[-1] if path else self._roots.get(policy)
        return end is not None and tuple(token_ids[done : done + self.page_tokens]) in end.promised

    def admit(
        self,
        sequence_id: str,
        token_ids: Sequence[int],
        policy: Hashable = None,
        *,
        min_tokens: int | None = None,
        leave: int = 0,
    ) -> Admission | None:
        """Start or resume a sequence with this context, reusing what is cached of it.

        Args:
            sequence_id: must not be running. If waiting, what it keeps and this context does not continue is let go.
            token_ids: the context, at least one token.
            policy: KV under another policy (its dtype, say) is never reused.
            min_tokens: tokens the table must have room for; None is the context.
            leave: pages that must stay available to others.

        Returns:
            None where there are too few pages; nothing has changed then.

        Raises:
            ValueError: the sequence runs already, or the context is empty.
        """
        old = self._sequences.get(sequence_id)
        if old and old.running:
            raise ValueError(f"sequence {sequence_id!r} is running")
        if not token_ids:
            raise ValueError("a context has at least one token")
        root = self._roots.setdefault(policy, _Node(None, 0, ()))
        path = self._walk(token_ids, policy)
        end, done = path[-1] if path else root, len(path) * self.page_tokens
        rest = tuple(token_ids[done : min(done + self.page_tokens, len(token_ids) - 1)])

        tail = old.tail if old and old.tail and old.tail.parent is end and not old.tail.gone else None
        kept = _common(tail.tokens, rest) if tail else 0
        if not kept:
            tail = None
        source, copied = self._best_source(end, rest, old.path[len(path) : len(path) + 1] if old else [])

        missing = -(-max(len(token_ids), min_tokens or 0) // self.page_tokens) - len(path)
        room = self.available - leave - sum(not node.pins for node in path)
        if source and copied > max(kept, self._min_copy - 1) and missing <= room - (not source.pins):
            tail = None
        else:
            source, copied = None, kept
            if missing - bool(tail) > room - (tail is not None):
                return None

        for i, node in enumerate(path):
            self._use(node, mine=old is not None and i < len(old.path) and old.path[i] is node)
        if tail:
            self._use(tail, mine=True)
            tail.tokens = tail.tokens[:kept]
        new = _Sequence(root, tuple(token_ids), path, tail, [])
        new.pages = [node.page for node in new.nodes]
        self._sequences[sequence_id] = new
        if old:
            self._drop(set(old.nodes).difference(new.nodes))
        if source:
            self._pin(source)  # not to be evicted for its own copy
        new.pages += [self._take() for _ in range(missing - bool(tail))]
        copies: tuple[tuple[int, int, int], ...] = ()
        if source:
            self._unpin(source)
            new.tail = self._grow(end, new.pages[len(path)], rest[:copied])
            copies = ((source.page, new.tail.page, copied),)
        self._promise(new)
        return Admission(done + copied, copies, tuple(new.pages))

    def extend(self, sequence_id: str, length: int) -> bool:
        """Make room for a context of `length` tokens; False, and nothing changed, where pages are short."""
        pages = self._running(sequence_id).pages
        needed = -(-length // self.page_tokens) - len(pages)
        if needed > self.available:
            return False
        pages += [self._take() for _ in range(needed)]
        return True

    def commit(self, sequence_id: str, token_ids: Sequence[int]) -> None:
        """Record that the KV of these next tokens has been written; full pages become findable by others.

        A page whose twin is in the tree already is freed and the twin takes its place in the table.

        Raises:
            ValueError: the sequence is not running, or has no room for them.
        """
        sequence = self._running(sequence_id)
        if self._length(sequence) + len(token_ids) > len(sequence.pages) * self.page_tokens:
            raise ValueError(f"sequence {sequence_id!r} has no room for {len(token_ids)} tokens")
        at = 0
        while at < len(token_ids):
            tail = sequence.tail
            if tail is None:
                tail = sequence.tail = self._grow(sequence.end, sequence.pages[len(sequence.path)], ())
            new = tuple(token_ids[at : at + self.page_tokens - len(tail.tokens)])
            tail.tokens += new
            at += len(new)
            if len(tail.tokens) == self.page_tokens:
                self._fill(sequence, tail)

    def pause(self, sequence_id: str) -> None:
        """Stop running, with the request done or preempted: what is committed is cached, unused room is freed."""
        sequence = self._running(sequence_id)
        self._unpromise(sequence)
        nodes = sequence.nodes
        fresh = sequence.pages[len(nodes) :]
        self._blank += fresh
        self._pinned -= len(fresh)
        del sequence.pages[len(nodes) :]
        sequence.running = False
        for node in reversed(nodes):
            self._unpin(node)

    def end(self, sequence_id: str) -> None:
        """Forget a sequence: pages that it alone has used are free from now on. Unknown ids are ignored."""
        sequence = self._sequences.get(sequence_id)
        if sequence is None:
            return
        if sequence.running:
            self.pause(sequence_id)
        del self._sequences[sequence_id]
        self._drop(sequence.nodes)

    def table(self, sequence_id: str) -> list[int]:
        """The page table of a running sequence, which `extend` and `commit` change in place until it is paused."""
        return self._running(sequence_id).pages

    def length(self, sequence_id: str) -> int:
        """Tokens that are committed for a running sequence."""
        return self._length(self._running(sequence_id))

    def share(self, sequence_id: str) -> float:
        """Pages of a running sequence: its own, and its share of those that others use too."""
        sequence = self._running(sequence_id)
        return len(sequence.pages) - len(sequence.path) + sum(1 / node.live for node in sequence.path)

    def _running(self, sequence_id: str) -> _Sequence:
        sequence = self._sequences.get(sequence_id)
        if sequence is None or not sequence.running:
            raise ValueError(f"sequence {sequence_id!r} is not running")
        return sequence

    def _length(self, sequence: _Sequence) -> int:
        return len(sequence.path) * self.page_tokens + (len(sequence.tail.tokens) if sequence.tail else 0)

    def _walk(self, token_ids: Sequence[int], policy: Hashable) -> list[_Node]:
        """The full pages that hold the context's start, its last token left out."""
        path: list[_Node] = []
        node = self._roots.get(policy)
        for start in range(0, len(token_ids) - self.page_tokens, self.page_tokens):
            node = node and node.children.get(tuple(token_ids[start : start + self.page_tokens]))
            if node is None:
                break
            path.append(node)
        return path

    def _best_source(self, end: _Node, rest: tuple[int, ...], own: Sequence[_Node]) -> tuple[_Node | None, int]:
        """The page below `end` that starts with most of `rest`, and how many tokens of it.

        Args:
            own: the page of the sequence that its context leaves, if any; below a shared prompt it is one of very many.
        """
        best, most = None, 0
        for nodes in ([node for node in own if node.parent is end and not node.gone], end.children.values(), end.tails):
            for _, node in zip(range(_COPY_CANDIDATES), reversed(nodes), strict=False):
                if (common := _common(node.tokens, rest)) > most:
                    best, most = node, common
        return best, most

    def _grow(self, parent: _Node, page: int, token_ids: Sequence[int]) -> _Node:
        """A fresh page gets content: it becomes a tail."""
        node = _Node(parent, page, tuple(token_ids), live=1, pins=1)
        parent.tails[node] = None
        return node

    def _fill(self, sequence: _Sequence, tail: _Node) -> None:
        """A tail is full: it enters the tree, or gives way to its twin there."""
        parent = sequence.end
        sequence.tail = None
        self._unpromise(sequence)
        del parent.tails[tail]
        node = parent.children.setdefault(tail.tokens, tail)
        if node is not tail:
            self._use(node, mine=False)
            sequence.pages[len(sequence.path)] = node.page
            tail.gone = True
            self._blank.append(tail.page)
            self._pinned -= 1
        sequence.path.append(node)
        self._promise(sequence)

    def _promise(self, sequence: _Sequence) -> None:
        start = len(sequence.path) * self.page_tokens
        page = sequence.target[start : start + self.page_tokens]
        if len(page) == self.page_tokens and page not in sequence.end.promised:
            sequence.end.promised.add(page)
            sequence.promise = (sequence.end, page)

    def _unpromise(self, sequence: _Sequence) -> None:
        if sequence.promise:
            node, page = sequence.promise
            node.promised.discard(page)
            sequence.promise = None

    def _use(self, node: _Node, *, mine: bool) -> None:
        if not mine:
            self._spare -= node.spare
            node.live += 1
            node.shared = True
        self._pin(node)

    def _drop(self, nodes: Iterable[_Node]) -> None:
        for node in nodes:
            if not node.gone:
                node.live -= 1
                self._spare += node.spare
                self._offer(node)

    def _pin(self, node: _Node) -> None:
        self._pinned += not node.pins
        node.pins += 1

    def _unpin(self, node: _Node) -> None:
        node.pins -= 1
        if not node.pins:
            self._pinned -= 1
            node.stamp = next(self._clock)
            self._offer(node)

    def _offer(self, node: _Node) -> None:
        """Put a node where eviction finds it, if it can be evicted now."""
        if not node.evictable or not node.parent:
            return
        heapq.heappush(self._heap, (node.rank, next(self._clock), node))
        if len(self._heap) > 4 * self.num_pages + 64:  # outdated entries would add up over a long run
            self._heap = [entry for entry in self._heap if entry[2].evictable and entry[0] == entry[2].rank]
            heapq.heapify(self._heap)

    def _take(self) -> int:
        """A page to write; the caller has checked that one is available."""
        self._pinned += 1
        return self._blank.pop() if self._blank else self._evict()

    def _evict(self) -> int:
        while True:
            rank, _, node = heapq.heappop(self._heap)
            if node.evictable and rank == node.rank:
                break
        parent = node.parent
        assert parent is not None  # roots are never offered
        if node in parent.tails:
            del parent.tails[node]
        else:
            del parent.children[node.tokens]
        self._evictions += not node.spare
        self._spare -= node.spare
        node.gone = True
        self._offer(parent)
        return node.page


def _common(a: tuple[int, ...], b: tuple[int, ...]) -> int:
    """Length of the common prefix."""
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low

"""The page allocator under any order of events, against a model that stores what is written page by page."""

from collections import Counter
from itertools import count

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from actors.engine.pages import PageAllocator

TOKENS = st.lists(st.integers(0, 1), min_size=1, max_size=6)
SHOTS = st.sampled_from([(), (7, 7, 7, 7, 7), (7, 7, 7, 7, 7, 8, 8, 8)])


class Pages(RuleBasedStateMachine):
    """Running sequences are kept oldest first; `done` counts the tokens that are written and committed."""

    @initialize(num_pages=st.integers(3, 14), page_tokens=st.integers(1, 4))
    def start(self, num_pages, page_tokens):
        self.pages = PageAllocator(num_pages, page_tokens)
        self.size = page_tokens
        self.store = [[-1] * page_tokens for _ in range(num_pages)]
        self.context: dict[str, list[int]] = {}
        self.done: dict[str, int] = {}  # of running ones
        self.cached: dict[str, int] = {}  # of waiting ones, where nothing was evicted since

        self.names = (f"s{i}" for i in count())

    def one(self, i):
        """A running sequence."""
        return list(self.done)[i % len(self.done) if i > 0 else i]

    def forget(self, name):
        self.pages.end(name)
        for table in (self.context, self.done, self.cached):
            table.pop(name, None)

    def admit(self, name, compute):
        tokens = self.context[name]
        before, promised = self.pages.stats, self.pages.promised(tokens)
        admission = self.pages.admit(name, tokens)
        if admission is None:
            assert self.done or -(-len(tokens) // self.size) > before.total
            assert self.pages.stats == before
            return
        assert 0 <= admission.reused_tokens < len(tokens)
        assert len(admission.pages) == -(-len(tokens) // self.size)
        for source, target, length in admission.copies:
            assert source != target
            assert 0 < length <= self.size
            self.store[target] = self.store[source][:]
        self.done[name] = admission.reused_tokens
        kept = self.cached.pop(name, 0)
        if self.pages.stats.evictions == before.evictions:
            most = min(kept, len(tokens) - 1)
            scarce = self.pages.available <= 1  # then a page may be copied no more
            assert admission.reused_tokens >= (most // self.size * self.size if scarce else most)
        else:
            self.cached.clear()
        if promised:
            start = admission.reused_tokens // self.size * self.size
            assert any(tokens[: start + self.size] == self.context[other][: start + self.size] for other in self.done)
        if compute:
            self.write(name, len(tokens) - self.done[name])

    def write(self, name, length, *, commit=True):
        """A step: into the sequence's own pages, behind what it has."""
        tokens, start, table = self.context[name], self.done[name], self.pages.table(name)
        others = {page for other in self.done if other != name for page in self.pages.table(other)}
        for position in range(start, start + length):
            page = table[position // self.size]
            assert page != 0
            assert page not in others
            self.store[page][position % self.size] = tokens[position] if commit else -2
        if commit:
            self.pages.commit(name, tokens[start : start + length])
            self.done[name] += length

    def stop(self, name):
        self.pages.pause(name)
        self.cached[name] = self.done.pop(name)

    def make_room(self, name, length):
        """What an engine does: preempt the youngest until there is room, or it is its own turn."""
        evictions = self.pages.stats.evictions
        while name in self.done and not self.pages.extend(name, self.done[name] + length):
            assert len(self.done) > 1 or self.done[name] + length > self.pages.capacity_tokens
            self.stop(list(self.done)[-1])
        if self.pages.stats.evictions != evictions:
            self.cached.clear()
        return name in self.done

    @property
    def waiting(self):
        return [name for name in self.context if name not in self.done]

    @precondition(lambda self: len(self.context) < 5)
    @rule(shot=SHOTS, tokens=TOKENS, compute=st.booleans())
    def submit(self, shot, tokens, compute):
        name = next(self.names)
        self.context[name] = [*shot, *tokens]
        self.admit(name, compute)

    @precondition(lambda self: self.waiting)
    @rule(i=st.integers(0, 4), trim=st.integers(0, 3), tokens=TOKENS, compute=st.booleans())
    def follow_up(self, i, trim, tokens, compute):
        name = self.waiting[i % len(self.waiting)]
        kept = self.context[name][: max(1, len(self.context[name]) - trim)]
        self.context[name] = [*kept, *tokens]
        self.cached[name] = min(self.cached.get(name, 0), len(kept))
        self.admit(name, compute)

    @precondition(lambda self: self.done)
    @rule(i=st.integers(0, 4), count=st.integers(1, 9))
    def prefill(self, i, count):
        name = self.one(i)
        self.write(name, min(count, len(self.context[name]) - self.done[name]))

    @precondition(lambda self: self.done)
    @rule(i=st.integers(0, 4), tokens=TOKENS)
    def decode(self, i, tokens):
        name = self.one(i)
        self.write(name, len(self.context[name]) - self.done[name])
        for token in tokens:
            if self.done[name] < self.pages.capacity_tokens and self.make_room(name, 1):
                self.context[name].append(token)
                self.write(name, 1)
            if name not in self.done:
                break

    @precondition(lambda self: self.done)
    @rule(i=st.integers(0, 4))
    def failed_step(self, i):
        """Out of memory half-way: garbage in its slots, nothing committed."""
        name = self.one(i)
        self.write(name, len(self.context[name]) - self.done[name], commit=False)

    @precondition(lambda self: self.done)
    @rule(token=st.integers(0, 1))
    def oldest_advances(self, token):
        name = self.one(0)
        if self.done[name] < len(self.context[name]):
            self.write(name, 1)
        elif self.done[name] < self.pages.capacity_tokens:
            assert self.make_room(name, 1)
            self.context[name].append(token)
            self.write(name, 1)

    @precondition(lambda self: self.done)
    @rule(i=st.integers(0, 4))
    def wait(self, i):
        self.stop(self.one(i))

    @precondition(lambda self: self.done)
    @rule()
    def preempt_youngest(self):
        self.stop(self.one(-1))

    @precondition(lambda self: self.context)
    @rule(i=st.integers(0, 4))
    def end(self, i):
        self.forget(list(self.context)[i % len(self.context)])

    @precondition(lambda self: self.done)
    @rule(i=st.integers(0, 4), tokens=st.integers(1, 50))
    def extend(self, i, tokens):
        name = self.one(i)
        available, length = self.pages.available, len(self.pages.table(name))
        evictions = self.pages.stats.evictions
        if self.pages.extend(name, self.done[name] + tokens):
            assert len(self.pages.table(name)) * self.size >= self.done[name] + tokens
        else:
            assert -(-(self.done[name] + tokens) // self.size) - length > available
            assert len(self.pages.table(name)) == length
        if self.pages.stats.evictions != evictions:
            self.cached.clear()

    @invariant()
    def running_sequences_read_what_they_wrote(self):
        for name in self.__dict__.get("done", ()):
            table, length = self.pages.table(name), self.pages.length(name)
            assert length == self.done[name]
            read = [self.store[table[i // self.size]][i % self.size] for i in range(length)]
            assert read == self.context[name][:length]

    @invariant()
    def every_page_is_in_one_place_and_the_tree_is_true(self):
        if "pages" not in self.__dict__:
            return
        pages, users, pinned_by = self.pages, Counter(), Counter()
        for sequence in pages._sequences.values():
            for node in sequence.nodes:
                users[node] += 1
                pinned_by[node] += sequence.running
                assert not (sequence.running and node.gone)
        nodes, stack = [], list(pages._roots.values())
        while stack:
            node = stack.pop()
            below = [*node.children.values(), *node.tails]
            assert all(child.parent is node and not child.gone for child in below)
            assert all(len(child.tokens) == self.size for child in node.children.values())
            assert all(0 < len(child.tokens) < self.size and users[child] <= 1 for child in node.tails)
            nodes += below
            stack += below
        for node in nodes:
            assert self.store[node.page][: len(node.tokens)] == list(node.tokens)
            assert (node.live, node.pins) == (users[node], pinned_by[node])
        fresh = [page for s in pages._sequences.values() for page in s.pages[len(s.nodes) :] if s.running]
        places = Counter([*pages._blank, *(node.page for node in nodes), *fresh])
        assert places == Counter(range(1, pages.num_pages))
        stats = pages.stats
        assert stats.pinned == sum(node.pins > 0 for node in nodes) + len(fresh)
        assert stats.free == len(pages._blank) + sum(node.spare for node in nodes)
        assert stats.free + stats.cached + stats.pinned == stats.total
        frontier = [s.promise for s in pages._sequences.values() if s.promise]
        assert sum(len(node.promised) for node in [*nodes, *pages._roots.values()]) == len(frontier)

    def teardown(self):
        if "pages" not in self.__dict__:
            return
        for name in list(self.context):
            self.forget(name)
        assert self.pages.stats.pinned == 0
        everything = [9] * self.pages.capacity_tokens
        assert self.pages.admit("everything", everything) is not None
        assert self.pages.stats.pinned == self.pages.stats.total


TestPages = Pages.TestCase
TestPages.settings = settings(max_examples=120, stateful_step_count=50, deadline=None, derandomize=True)

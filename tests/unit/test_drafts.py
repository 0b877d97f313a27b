"""Guesses out of a row's own text, against a plain search."""

from hypothesis import given
from hypothesis import strategies as st

from actors.engine.drafts import FIRST, LONGEST, MOST, SHORTEST, Lookup

# few different tokens, some of whose bytes look alike when shifted
TOKENS = st.lists(st.sampled_from([0, 1, 256, 257, 65536, 16777216, 4294967295]), min_size=1, max_size=60)


def plain(tokens, most):
    for n in range(LONGEST, SHORTEST - 1, -1):
        for at in range(len(tokens) - n - 1, -1, -1):
            if tokens[at : at + n] == tokens[-n:]:
                followed = tokens[at + n :]
                return [followed[i % len(followed)] for i in range(most)]
    return []


@given(TOKENS, st.integers(1, 20), st.integers(1, 59))
def test_what_followed_the_last_tokens_where_they_stood_before(tokens, most, seen):
    lookup = Lookup()
    lookup.draft(tokens[:seen], most)
    assert lookup.draft(tokens, most) == plain(tokens, min(most, FIRST))


def test_guesses_grow_while_they_are_right_and_shrink_where_not():
    lookup, tokens = Lookup(), [1, 2, 3, 4] * 20
    for _ in range(10):
        found = lookup.draft(tokens, 99)
        lookup.judge(len(found), len(found))
    assert len(lookup.draft(tokens, 99)) == MOST
    for _ in range(10):
        lookup.judge(MOST, 0)
    assert len(lookup.draft(tokens, 99)) == 1

"""The page allocator, case by case. Pages of 4 tokens, so that a context can be read."""

import random

import pytest

from actors.engine.pages import PageAllocator, PageStats


def admitted(pages, sequence_id, tokens, **kwargs):
    admission = pages.admit(sequence_id, tokens, **kwargs)
    assert admission is not None
    return admission


def run(pages, sequence_id, tokens, **kwargs):
    """Admit and compute a whole context."""
    admission = admitted(pages, sequence_id, tokens, **kwargs)
    pages.commit(sequence_id, tokens[admission.reused_tokens :])
    return admission


def test_scratch_page_is_never_handed_out():
    pages = PageAllocator(4, 4)
    assert sorted(run(pages, "a", list(range(12))).pages) == [1, 2, 3]
    assert pages.capacity_tokens == 12


def test_room_is_for_the_context_or_more():
    pages = PageAllocator(10, 4)
    assert len(admitted(pages, "a", [1] * 5).pages) == 2
    assert len(admitted(pages, "b", [1] * 5, min_tokens=9).pages) == 3


def test_refusal_changes_nothing():
    pages = PageAllocator(4, 4)
    run(pages, "a", list(range(8)))
    before = pages.stats
    assert pages.admit("b", list(range(100, 108))) is None
    assert pages.admit("c", [100], leave=1) is None
    assert pages.stats == before
    assert pages.admit("c", [100]) is not None


def test_extend_is_all_or_nothing():
    pages = PageAllocator(4, 4)
    run(pages, "a", [1, 2, 3])
    assert pages.extend("a", 4)
    assert len(pages.table("a")) == 1
    assert not pages.extend("a", 103)
    assert len(pages.table("a")) == 1
    assert pages.extend("a", 12)
    assert len(pages.table("a")) == 3


def test_full_pages_are_shared():
    pages = PageAllocator(20, 4)
    first = run(pages, "a", [1, 2, 3, 4, 5, 6, 7, 8, 9])
    second = run(pages, "b", [1, 2, 3, 4, 5, 6, 7, 8, 100])
    assert second.reused_tokens == 8
    assert second.copies == ()
    assert second.pages[:2] == first.pages[:2]
    assert second.pages[2] != first.pages[2]
    assert pages.share("a") == 1 + 2 / 2


def test_the_last_token_is_always_computed_and_never_into_a_shared_page():
    pages = PageAllocator(20, 4)
    tokens = [1, 2, 3, 4, 5, 6, 7, 8]
    first = run(pages, "a", tokens)
    second = admitted(pages, "b", tokens)
    assert second.reused_tokens == 7
    assert second.copies == ((first.pages[1], second.pages[1], 3),)


def test_divergence_within_a_page_copies_the_common_part():
    pages = PageAllocator(20, 4)
    first = run(pages, "a", [1, 2, 3, 4, 5, 6, 7])
    second = run(pages, "b", [1, 2, 3, 4, 5, 6, 100, 101])
    assert second.reused_tokens == 6
    assert second.copies == ((first.pages[1], second.pages[1], 2),)


def test_short_common_parts_are_not_copied():
    pages = PageAllocator(20, 4, min_copy_tokens=2)
    run(pages, "a", [1, 2, 3])
    assert admitted(pages, "b", [1, 9, 9]).copies == ()


def test_follow_up_continues_its_own_tail_in_place():
    pages = PageAllocator(20, 4)
    first = run(pages, "a", [1, 2, 3, 4, 5, 6])
    pages.pause("a")
    second = admitted(pages, "a", [1, 2, 3, 4, 5, 6, 7, 8, 9])
    assert (second.reused_tokens, second.copies) == (6, ())
    assert second.pages[:2] == first.pages


def test_follow_up_finds_its_own_page_among_many_behind_a_shared_one():
    """What a call generated filled the page and is thrown away: the context's part of that page is copied."""
    pages = PageAllocator(100, 4)
    for i in range(40):
        run(pages, f"row {i}", [1, 2, 3, 4, 100 + i, 200 + i, 7, 8])
        pages.pause(f"row {i}")
    second = admitted(pages, "row 0", [1, 2, 3, 4, 100, 200, 9, 9])
    assert second.reused_tokens == 6
    assert [count for _, _, count in second.copies] == [2]


def test_follow_up_that_trims_its_tail_continues_in_place():
    pages = PageAllocator(20, 4)
    first = run(pages, "a", [1, 2, 3, 4, 5, 6, 7])
    pages.pause("a")
    second = admitted(pages, "a", [1, 2, 3, 4, 5, 100, 101])
    assert (second.reused_tokens, second.copies) == (5, ())
    assert second.pages == first.pages
    pages.commit("a", [100, 101])
    pages.pause("a")
    assert admitted(pages, "b", [1, 2, 3, 4, 5, 6, 7, 0]).reused_tokens == 5


def test_follow_up_that_trims_a_full_page_copies_and_frees_the_old_one():
    pages = PageAllocator(20, 4)
    first = run(pages, "a", [1, 2, 3, 4, 5, 6, 7, 8, 9])
    pages.pause("a")
    second = run(pages, "a", [1, 2, 3, 4, 5, 6, 100])
    assert second.reused_tokens == 6
    assert second.copies == ((first.pages[1], second.pages[1], 2),)
    assert pages.stats == PageStats(total=19, free=17, cached=0, pinned=2, evictions=0)


def test_another_ones_page_wins_where_it_has_more():
    pages = PageAllocator(20, 4)
    run(pages, "a", [1, 2, 9])
    pages.pause("a")
    run(pages, "b", [1, 2, 3, 4])
    again = admitted(pages, "a", [1, 2, 3, 7])
    assert again.reused_tokens == 3
    assert len(again.copies) == 1


def test_end_frees_its_own_pages_and_keeps_shared_ones():
    pages = PageAllocator(20, 4)
    shot = list(range(8))
    run(pages, "a", [*shot, 100, 101, 102, 103, 104])
    run(pages, "b", [*shot, 200])
    pages.end("a")
    assert pages.stats == PageStats(total=19, free=16, cached=0, pinned=3, evictions=0)
    pages.end("b")
    assert pages.stats == PageStats(total=19, free=17, cached=2, pinned=0, evictions=0)
    assert admitted(pages, "c", [*shot, 300]).reused_tokens == 8


def test_free_pages_are_still_found_until_overwritten():
    pages = PageAllocator(4, 4)
    run(pages, "a", list(range(9)))
    pages.end("a")
    assert pages.stats.free == 3
    assert admitted(pages, "b", list(range(9))).reused_tokens == 8
    pages.end("b")
    run(pages, "c", list(range(100, 112)))
    pages.end("c")
    assert admitted(pages, "d", list(range(9))).reused_tokens == 0


def test_eviction_takes_ended_pages_first_then_the_oldest_leaf_one_by_one():
    pages = PageAllocator(7, 4)
    for name, start in (("a", 0), ("b", 100), ("c", 200)):
        run(pages, name, list(range(start, start + 8)))
        pages.pause(name)
    pages.end("c")
    run(pages, "d", list(range(300, 312)))  # c's two pages, and the last one of a
    assert pages.stats == PageStats(total=6, free=0, cached=3, pinned=3, evictions=1)
    pages.end("d")
    assert admitted(pages, "b", list(range(100, 109))).reused_tokens == 8
    assert admitted(pages, "a", list(range(9))).reused_tokens == 4


def test_ending_a_sequence_whose_pages_were_evicted():
    pages = PageAllocator(3, 4)
    run(pages, "a", list(range(8)))
    pages.pause("a")
    run(pages, "b", list(range(100, 108)))
    pages.end("a")
    pages.end("b")
    pages.end("never seen")
    assert pages.stats.free == 2


def test_the_source_of_a_copy_is_not_evicted_for_it():
    pages = PageAllocator(3, 4)
    first = run(pages, "a", [1, 2, 3, 4, 5, 6])
    pages.pause("a")
    second = run(pages, "b", [1, 2, 3, 9])
    assert second.copies == ((first.pages[0], second.pages[0], 3),)
    assert first.pages[0] != second.pages[0]


def test_without_a_page_for_both_the_source_is_given_up():
    pages = PageAllocator(2, 4)
    run(pages, "a", [1, 2, 3])
    pages.pause("a")
    assert run(pages, "b", [1, 2, 9]).reused_tokens == 0


def test_twins_become_one_page():
    pages = PageAllocator(20, 4)
    tokens = [1, 2, 3, 4, 5]
    first, second = admitted(pages, "a", tokens), admitted(pages, "b", tokens)
    assert first.pages[0] != second.pages[0]
    pages.commit("a", tokens)
    pages.commit("b", tokens)
    assert pages.table("b")[0] == first.pages[0]
    assert pages.stats.pinned == 3


def test_a_page_about_to_be_written_is_promised():
    pages = PageAllocator(20, 4)
    tokens = list(range(8))
    assert not pages.promised(tokens)
    admitted(pages, "a", [*tokens, 100])
    assert pages.promised([*tokens, 200])
    assert not pages.promised([9, *tokens])
    assert not pages.promised(tokens[:3])
    pages.commit("a", tokens[:4])
    assert pages.promised([*tokens, 200])
    pages.commit("a", tokens[4:])
    assert not pages.promised([*tokens, 200])
    admitted(pages, "b", list(range(50, 60)))
    pages.pause("b")
    assert not pages.promised(list(range(50, 60)))


def test_policies_do_not_mix():
    pages = PageAllocator(20, 4)
    run(pages, "a", list(range(9)), policy="bfloat16")
    assert admitted(pages, "b", list(range(9)), policy="int8").reused_tokens == 0
    assert admitted(pages, "c", list(range(9)), policy="bfloat16").reused_tokens == 8


def test_pause_frees_unused_room_and_resumes():
    pages = PageAllocator(10, 4)
    run(pages, "a", [1, 2, 3, 4, 5], min_tokens=30)
    assert pages.stats.pinned == 8
    pages.pause("a")
    assert pages.stats == PageStats(total=9, free=7, cached=2, pinned=0, evictions=0)
    assert admitted(pages, "a", [1, 2, 3, 4, 5, 6]).reused_tokens == 5


def test_misuse_is_refused():
    pages = PageAllocator(10, 4)
    with pytest.raises(ValueError, match="2 pages"):
        PageAllocator(1, 4)
    with pytest.raises(ValueError, match="not running"):
        pages.commit("a", [1])
    admitted(pages, "a", [1, 2])
    with pytest.raises(ValueError, match="is running"):
        pages.admit("a", [1, 2])
    with pytest.raises(ValueError, match="at least one token"):
        pages.admit("b", [])
    with pytest.raises(ValueError, match="no room"):
        pages.commit("a", [1, 2, 3, 4, 5])


def test_long_use_keeps_the_heap_small():
    pages, rng = PageAllocator(8, 4), random.Random(0)
    for i in range(3000):
        run(pages, f"{i % 5}", [rng.randrange(2) for _ in range(rng.randrange(1, 20))])
        pages.pause(f"{i % 5}")
    assert len(pages._heap) <= 4 * 8 + 65

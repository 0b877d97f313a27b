"""Noise that is a function of a counter, filters, and the distribution that comes out."""

import pytest
import torch
from scipy import stats

from actors.engine import sampling
from actors.engine.sampling import choose, gumbel, noise_bits, wrap_seed

MASK = (1 << 64) - 1


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def ints(*values):
    return torch.tensor(values, dtype=torch.int64)


def floats(*values):
    return torch.tensor(values, dtype=torch.float32)


def splitmix64(x):
    """The published finaliser, in Python integers."""
    x &= MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK
    return x ^ (x >> 31)


def draws(logits_V, rows, temperature=1.0, top_p=None, top_k=None, position=17):
    """Token counts of `rows` rows with seeds 0, 1, …"""
    ids_B, _ = choose(
        logits_V.expand(rows, -1),
        torch.arange(rows),
        torch.full((rows,), position),
        torch.full((rows,), temperature),
        None if top_p is None else torch.full((rows,), top_p),
        None if top_k is None else torch.full((rows,), top_k),
        logprobs=False,
    )
    return torch.bincount(ids_B, minlength=len(logits_V))


def test_noise_is_splitmix64_bit_for_bit():
    gamma = 0x9E3779B97F4A7C15
    seeds, positions = [0, 1, -5, 2**63 - 1], [0, 3, 100_000, 7]
    bits = noise_bits(ints(*seeds), ints(*positions), 6)
    for r, (seed, position) in enumerate(zip(seeds, positions, strict=True)):
        key = splitmix64(splitmix64(seed + gamma) + (position + 1) * gamma)
        for token in range(6):
            assert int(bits[r, token]) & MASK == splitmix64(key + (token + 1) * gamma)


def test_any_integer_is_a_seed():
    assert [wrap_seed(seed) for seed in (0, -1, 2**63, 2**64 + 3)] == [0, -1, -(2**63), 3]


def test_noise_is_gumbel_and_independent_along_each_axis():
    noise = gumbel(torch.arange(40), torch.arange(40), 500)
    assert torch.isfinite(noise).all()
    assert stats.kstest(noise.flatten().numpy(), stats.gumbel_r.cdf).pvalue > 1e-3
    for other in (
        gumbel(torch.arange(40) + 1, torch.arange(40), 500),
        gumbel(torch.arange(40), torch.arange(1, 41), 500),
    ):
        correlation = torch.corrcoef(torch.stack([noise.flatten(), other.flatten()]))[0, 1]
        assert abs(correlation) < 0.03


def test_draws_follow_the_softmax():
    logits = torch.linspace(-2, 2, 12)
    for temperature in (0.5, 1.0, 2.0):
        expected = torch.softmax(logits / temperature, -1) * 20_000
        assert (
            stats.chisquare(
                draws(logits, 20_000, temperature), expected.double() / expected.double().sum() * 20_000
            ).pvalue
            > 1e-3
        )


def test_draws_of_one_row_over_positions_follow_the_softmax():
    logits = torch.linspace(-2, 2, 12)
    ids_B, _ = choose(
        logits.expand(20_000, -1), torch.full((20_000,), 5), torch.arange(20_000), torch.ones(20_000), None, None
    )
    expected = torch.softmax(logits.double(), -1) * 20_000
    assert stats.chisquare(torch.bincount(ids_B, minlength=12), expected).pvalue > 1e-3


def test_top_k_keeps_k_and_renormalises():
    logits = torch.tensor([0.1, 2.0, -1.0, 1.5, 0.7, 1.9])
    counts = draws(logits, 8_000, top_k=3)
    assert counts.nonzero().flatten().tolist() == [1, 3, 5]
    expected = torch.softmax(logits[[1, 3, 5]].double(), -1) * 8_000
    assert stats.chisquare(counts[[1, 3, 5]], expected).pvalue > 1e-3


def test_top_p_keeps_the_smallest_set_that_reaches_it():
    logits = torch.tensor([0.15, 0.5, 0.05, 0.3]).log()
    for top_p, kept in [
        (0.3, [1]),
        (0.49, [1]),
        (0.6, [1, 3]),
        (0.79, [1, 3]),
        (0.9, [0, 1, 3]),
        (0.97, [0, 1, 2, 3]),
        (1.0, [0, 1, 2, 3]),
    ]:
        assert draws(logits, 4_000, top_p=top_p).nonzero().flatten().tolist() == kept, top_p


def test_top_p_counts_what_top_k_left():
    # Of 0.5, 0.3, 0.15, 0.05 top-k leaves 0.625 and 0.375: 0.6 is reached by the first alone, 0.7 by both.
    logits = torch.tensor([0.15, 0.5, 0.05, 0.3]).log()
    assert draws(logits, 2_000, top_p=0.6, top_k=2).nonzero().flatten().tolist() == [1]
    assert draws(logits, 2_000, top_p=0.7, top_k=2).nonzero().flatten().tolist() == [1, 3]


def test_ties_at_the_edge_are_kept():
    logits = torch.tensor([1.0, 0.0, 1.0, 1.0])
    assert draws(logits, 2_000, top_k=2).nonzero().flatten().tolist() == [0, 2, 3]


def test_rows_of_a_mixed_batch_are_drawn_as_if_alone():
    generator = torch.Generator().manual_seed(1)
    rows = 3 * sampling.CHUNK_ROWS + 1
    logits = torch.randn(rows, 97, generator=generator) * 3
    seeds, positions = torch.arange(rows) % 7, torch.arange(rows) * 3
    temperature = torch.tensor([0.0, 0.7, 1.3])[torch.arange(rows) % 3]
    top_p = torch.tensor([1.0, 0.9])[torch.arange(rows) % 2]
    top_k = torch.tensor([97, 5, 1, 40])[torch.arange(rows) % 4]
    ids, logprobs = choose(logits, seeds, positions, temperature, top_p, top_k)
    for r in range(rows):
        one = slice(r, r + 1)
        id_, logprob = choose(
            logits[one],
            seeds[one],
            positions[one],
            temperature[one] if temperature[r] else None,
            top_p[one] if top_p[r] < 1 else None,
            top_k[one] if top_k[r] < 97 else None,
        )
        assert int(id_) == int(ids[r])
        assert float(logprob) == float(logprobs[r])
    assert torch.equal(ids[temperature == 0], logits[temperature == 0].argmax(-1))
    assert torch.equal(ids[top_k == 1], logits[top_k == 1].argmax(-1))


def test_logprobs_are_of_the_unmodified_distribution():
    logits = torch.randn(4, 50, generator=torch.Generator().manual_seed(0)).bfloat16()
    ids, logprobs = choose(
        logits, ints(1, 2, 3, 4), ints(9, 9, 9, 9), floats(0.3, 0.3, 2, 0), floats(0.5, 1, 1, 1), ints(3, 50, 50, 50)
    )
    assert torch.equal(logprobs, torch.log_softmax(logits.float(), -1)[torch.arange(4), ids])


def test_greedy_rows_make_no_noise(monkeypatch):
    monkeypatch.setattr(sampling, "noise_bits", lambda *_: pytest.fail("noise for greedy rows"))
    logits = torch.randn(20, 50, generator=torch.Generator().manual_seed(0))
    ids, logprobs = choose(logits, torch.zeros(20).long(), torch.zeros(20).long(), None, None, None, logprobs=False)
    assert torch.equal(ids, logits.argmax(-1))
    assert logprobs is None
    _, logprobs = choose(logits, torch.zeros(20).long(), torch.zeros(20).long(), None, None, None)
    assert torch.equal(logprobs, torch.log_softmax(logits, -1).amax(-1))

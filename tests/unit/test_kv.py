"""Keys and values in 8 bits: how far off, by what, and that nothing of a page is left behind."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.engine.kv import QUANTISED, KVCache, dequantise, quantise

SHAPES = [(2, 16), (1, 32)]
PAGE = 4
# Half a step of the largest number of a token and head: int8 has 127, e4m3 3 bits of mantissa and 2^-9 below 2^-6.
STEP = {"int8": 0.5 / 127, "fp8": 2**-4}


def numbers(seed, tokens, heads=2, head_dim=16, spread=1.0):
    noise = torch.Generator().manual_seed(seed)
    x_TKD = torch.randn(tokens, heads, head_dim, generator=noise)
    return x_TKD * torch.logspace(-spread, spread, tokens)[:, None, None]


@settings(max_examples=60, deadline=None)
@given(
    kv_dtype=st.sampled_from(["int8", "fp8"]),
    seed=st.integers(0, 99),
    spread=st.floats(0, 9),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_an_error_is_at_most_half_a_step_of_the_tokens_own_head(kv_dtype, seed, spread, dtype):
    x_TKD = numbers(seed, 12, spread=spread).to(dtype)
    q_TKD, scale_TK = quantise(x_TKD, QUANTISED[kv_dtype])
    assert q_TKD.dtype == QUANTISED[kv_dtype]
    assert scale_TK.dtype == torch.float32
    found = dequantise(q_TKD, scale_TK, torch.float32)
    largest = x_TKD.float().abs().amax(-1, keepdim=True)
    assert ((found - x_TKD.float()).abs() <= STEP[kv_dtype] * largest * 1.0001).all()
    # Rounded once, where the model's dtype is a short one.
    assert torch.equal(dequantise(q_TKD, scale_TK, torch.bfloat16), found.to(torch.bfloat16))


def test_relative_errors_of_normal_numbers():
    x_TKD = numbers(0, 2000, head_dim=64)
    errors = {}
    for kv_dtype, stored in QUANTISED.items():
        found = dequantise(*quantise(x_TKD, stored), torch.float32)
        errors[kv_dtype] = float(((found - x_TKD).norm(dim=-1) / x_TKD.norm(dim=-1)).mean())
    # A uniform error of a step of 2.5 σ / 127 has a σ of a 175th; e4m3 has one of 2^-4 / √3 at most.
    assert errors["int8"] == pytest.approx(1 / 175, rel=0.1)
    assert 0.02 < errors["fp8"] < 0.036


@pytest.mark.parametrize("kv_dtype", QUANTISED)
def test_zeros_and_what_is_no_number_stay_what_they_are(kv_dtype):
    x_TKD = torch.zeros(3, 1, 8)
    x_TKD[1, 0, 3] = float("nan")
    x_TKD[2] = 1e-30
    found = dequantise(*quantise(x_TKD, QUANTISED[kv_dtype]), torch.float32)
    assert torch.equal(found[0], x_TKD[0])
    assert found[1].isnan().all()
    assert (found[2].abs() < 1e-19).all()


@pytest.mark.parametrize("kv_dtype", ["auto", *QUANTISED])
def test_what_is_written_is_read_wherever_it_lies_and_whoever_is_beside_it(kv_dtype):
    kv = KVCache(SHAPES, 9, PAGE, torch.float32, "cpu", kv_dtype)
    k_TKD, v_TKD = numbers(1, 6), numbers(2, 6)
    slots_T = torch.tensor([5 * PAGE + i for i in range(4)] + [2 * PAGE, 2 * PAGE + 1])
    kv.write(0, slots_T, k_TKD, v_TKD)
    alone = KVCache(SHAPES, 9, PAGE, torch.float32, "cpu", kv_dtype)
    for t in range(6):
        alone.write(0, torch.tensor([4 + t]), k_TKD[t : t + 1], v_TKD[t : t + 1])
    pages_N = torch.tensor([2, 5])
    for found, one, wanted in zip(
        kv.read(0, pages_N), alone.read(0, torch.tensor([1, 2])), (k_TKD, v_TKD), strict=True
    ):
        if kv_dtype == "auto":
            found, one = found[pages_N], one[1:3]
        found = torch.cat([found[1], found[0, :2]])
        assert torch.equal(found, one.flatten(0, 1)[:6])
        assert (found - wanted).norm() <= (0.04 if kv.quantised else 0) * wanted.norm()


@pytest.mark.parametrize("kv_dtype", ["auto", *QUANTISED])
def test_copies_carry_the_scales(kv_dtype):
    kv = KVCache(SHAPES, 9, PAGE, torch.float32, "cpu", kv_dtype)
    for layer, (heads, head_dim) in enumerate(SHAPES):
        kv.write(layer, torch.arange(4, 12), *(numbers(s, 8, heads, head_dim, spread=3) for s in (3, 4)))
    kv.copy_pages([(1, 7), (2, 8), (8, 3)])
    every = torch.arange(9)
    for layer in range(len(SHAPES)):
        for cache in kv.read(layer, every):
            assert cache[1].abs().sum() > 0
            for source, copy in ((1, 7), (2, 8), (2, 3)):
                assert torch.equal(cache[source], cache[copy])


@pytest.mark.parametrize(("kv_dtype", "dtype", "ratio"), [
    ("int8", torch.bfloat16, 2 / (1 + 4 / 64)), ("fp8", torch.float32, 4 / (1 + 4 / 64)), ("auto", torch.float16, 1),
])  # fmt: skip
def test_sizes(kv_dtype, dtype, ratio):
    kv = KVCache([(3, 64)] * 2, 5, PAGE, dtype, "cpu", kv_dtype)
    full = 2 * 2 * 3 * 64 * dtype.itemsize
    assert kv.bytes_token == full / ratio
    tensors = [t for t in (*kv.k, *kv.v, *kv.k_scale, *kv.v_scale) if t is not None]
    assert kv.bytes_page * 5 == sum(t.nbytes for t in tensors)
    assert kv.read_bytes_page == (PAGE * 3 * (64 * (2 * dtype.itemsize + 1) + 4) if kv.quantised else 0)
    kv.resize(7)
    assert {len(t) for t in (*kv.k, *kv.v, *kv.k_scale, *kv.v_scale) if t is not None} == {7}


def test_a_pool_that_does_not_fit_leaves_nothing(monkeypatch):
    kv = KVCache(SHAPES, 5, PAGE, torch.float32, "cpu", "int8")
    zeros, made = torch.zeros, []

    def few(*args, **kwargs):
        if len(made) == 3:
            raise torch.OutOfMemoryError("no")
        made.append(1)
        return zeros(*args, **kwargs)

    monkeypatch.setattr(torch, "zeros", few)
    with pytest.raises(torch.OutOfMemoryError):
        kv.resize(50)
    assert (kv.pages, kv.k, kv.v, kv.k_scale, kv.v_scale) == (0, [], [], [], [])


def test_quantised_pages_are_named_to_be_read():
    with pytest.raises(ValueError, match="by pages"):
        KVCache(SHAPES, 5, PAGE, torch.float32, "cpu", "fp8").read(0, None)

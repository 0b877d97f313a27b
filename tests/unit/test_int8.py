"""Weights in int8: how far off, which layers, and that loading and splitting come to the same."""

import pytest
import torch
from torch import nn

from actors.engine import loader, memory
from actors.engine.int8 import Int8Linear, linear_layers, quantise, weights_dtype
from actors.engine.shard import split
from actors.errors import UnsupportedModel
from tests.ranks import shape
from tests.unit.test_runner import A_PAGES, B_PAGES, _one_thread, prompt, row, runner_of, tiny  # noqa: F401


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
def test_a_weight_is_off_by_half_a_step_of_its_row_at_most(dtype, bias):
    torch.manual_seed(0)
    whole = nn.Linear(96, 40, bias=bias, dtype=dtype)
    with torch.no_grad():
        whole.weight[3] *= 1000
        whole.weight[7] = 0
    found = Int8Linear(whole, "cpu")
    assert (found.weight.dtype, found.scale.dtype) == (torch.int8, dtype)
    assert (found.weight.abs().amax(1)[torch.arange(40) != 7] >= 126).all()
    back = found.weight.float() * found.scale.float()[:, None]
    # The largest of a row may be cut by the rounding of the scale.
    step = whole.weight.detach().float().abs().amax(1, keepdim=True) / 127
    most = 0.5 if dtype == torch.float32 else 0.5 + 127 * 2**-9
    assert ((back - whole.weight.float()).abs() <= most * step * 1.001).all()
    assert ((back - whole.weight.float()).abs() > 0.501 * step).float().mean() < 0.02
    x = torch.randn(5, 96, dtype=dtype)
    wanted = nn.functional.linear(x.float(), back, None if whole.bias is None else whole.bias.float())
    assert (found(x).float() - wanted).norm() <= (1e-6 if dtype == torch.float32 else 0.006) * wanted.norm()


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3_moe", "gemma3"])
def test_the_layers_that_memory_counts_are_quantised(name):
    model = tiny(name)
    config, before = model.config, {name: p.clone() for name, p in model.named_parameters()}
    quantise(model, "cpu")
    assert sum(p.nbytes for p in model.parameters()) == memory.weights_bytes(config, torch.float32, "int8")
    assert model.dtype == torch.float32
    assert weights_dtype(model) == "int8"
    assert all(isinstance(module, Int8Linear) for _, module in linear_layers(model))
    for field, parameter in model.named_parameters():
        if parameter.dtype != torch.int8 and not field.endswith("scale"):
            assert torch.equal(parameter, before[field])
    assert model.get_output_embeddings().weight.dtype == torch.float32


def test_logits_stay_near_and_layers_compile_in_one_piece():
    torch._dynamo.reset()
    ids = prompt(1)
    full = runner_of(tiny("llama"))
    full.step([row(ids, 0, 50, A_PAGES)])
    model = tiny("llama")
    quantise(model, "cpu")
    small = runner_of(model)
    small.step([row(ids, 0, 50, A_PAGES)])
    expected = small.logits
    assert 0 < (expected - full.logits).norm() < 0.1 * full.logits.norm()
    assert small.compile("eager")
    small.step([row(ids, 0, 21, B_PAGES, sample=False)])
    small.step([row(ids, 21, 50, B_PAGES)])
    torch.testing.assert_close(small.logits, expected, atol=1e-4, rtol=1e-4)
    torch._dynamo.reset()


@pytest.mark.parametrize(("name", "changes"), [
    ("llama", {"attention_bias": True, "mlp_bias": True}), ("qwen3_moe", {}), ("gemma2", {}),
])  # fmt: skip
def test_ranks_have_the_parts_of_the_quantised_model(name, changes):
    whole = shape(name, **changes)
    quantise(whole, "cpu")
    weights = dict(whole.named_parameters())
    for size in (2, 4):
        parts = [shape(name, **changes) for _ in range(size)]
        for rank, part in enumerate(parts):
            split(part, rank, size, torch.device("cpu"), "int8")
        plain = shape(name, **changes)
        split(plain, 0, size, torch.device("cpu"))
        saved = sum(p.nbytes for p in plain.parameters()) - sum(p.nbytes for p in parts[0].parameters())
        counted = [memory.weights_bytes(plain.config, torch.float32, kind, size) for kind in (None, "int8")]
        assert saved == counted[0] - counted[1]
        for field, module in linear_layers(whole):
            mine = [part.get_submodule(field) for part in parts]
            assert all(isinstance(one, Int8Linear) for one in mine)
            rows = field.rpartition(".")[2] not in ("o_proj", "down_proj")
            assert torch.equal(torch.cat([one.weight for one in mine], 0 if rows else 1), weights[f"{field}.weight"])
            scales = torch.cat([one.scale for one in mine]) if rows else mine[-1].scale
            assert torch.equal(scales, module.scale)


def test_a_checkpoint_loads_in_int8(tmp_path):
    model = tiny("llama")
    model.save_pretrained(tmp_path)
    found = loader.load_model(tmp_path, "bfloat16", quantization="int8")
    assert weights_dtype(found) == "int8"
    assert not found.training
    quantise(model.to(torch.bfloat16), "cpu")
    for (field, a), (_, b) in zip(found.named_parameters(), model.named_parameters(), strict=True):
        assert torch.equal(a, b), field


def test_a_model_without_plain_layers_is_refused():
    model = tiny("llama")
    for name, module in list(linear_layers(model)):
        model.set_submodule(name, nn.Identity() if isinstance(module, nn.Linear) else module)
    with pytest.raises(UnsupportedModel, match=r"model\.quantization"):
        quantise(model, "cpu")


def test_sums_stay_within_the_range_of_fp16():
    whole = torch.nn.Linear(2048, 4, bias=False, dtype=torch.float16)
    whole.weight.data.fill_(0.1)
    got = Int8Linear(whole, "cpu")(torch.full((1, 2048), 0.7, dtype=torch.float16))
    assert got.float().tolist()[0] == pytest.approx([2048 * 0.7 * 0.1] * 4, rel=0.01)

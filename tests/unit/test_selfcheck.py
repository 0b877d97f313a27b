import pytest
import torch
from transformers import Gemma2Config, Qwen3Config

from actors.engine import attention
from actors.engine.kv import KVCache, kv_shapes
from actors.engine.selfcheck import check_numbers, first_right
from actors.errors import UnsupportedModel

SHAPE = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "hidden_size": 64, "num_hidden_layers": 2}
CONFIGS = [Qwen3Config(**SHAPE), Gemma2Config(**SHAPE, sliding_window=64, query_pre_attn_scalar=32)]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.model_type)
@pytest.mark.parametrize("fault", [None, "noise", "nan", "window", "scale", "softcap"])
def test_a_kernel_that_computes_something_else_is_refused(monkeypatch, config, fault):
    def kernel(plan, q, k, v, scale, window, softcap):
        out = attention.KERNELS["reference"](
            plan,
            q,
            k,
            v,
            scale * (1.5 if fault == "scale" else 1),
            None if fault == "window" else window,
            None if fault == "softcap" else softcap,
        )
        if fault == "nan":
            return out * float("nan")
        return torch.randn_like(out) if fault == "noise" else out

    monkeypatch.setitem(attention.KERNELS, "flash_attn", kernel)
    kv = KVCache(kv_shapes(config), 2, 256, torch.bfloat16, "cpu")
    if fault is None or (config.model_type == "qwen3" and fault in ("window", "softcap")):
        check_numbers("flash_attn", kv, config)
        return
    with pytest.raises(UnsupportedModel, match="computes something else than attention"):
        check_numbers("flash_attn", kv, config)


def test_the_first_kernel_that_is_right_is_taken(monkeypatch, caplog):
    def broken(*args):
        raise RuntimeError("no C compiler")

    def noise(plan, q, *args):
        return torch.randn_like(q)

    monkeypatch.setattr(attention, "_triton", broken)
    monkeypatch.setitem(attention.KERNELS, "flash_attn", noise)
    monkeypatch.setitem(attention.KERNELS, "torch_varlen", attention.KERNELS["reference"])
    kv = KVCache(kv_shapes(CONFIGS[0]), 2, 256, torch.bfloat16, "cpu")
    assert first_right(["triton", "flash_attn", "torch_varlen"], lambda _: kv, CONFIGS[0]) == "torch_varlen"
    assert "triton is not used: RuntimeError: no C compiler" in caplog.text
    assert "flash_attn is not used: UnsupportedModel" in caplog.text
    with pytest.raises(
        UnsupportedModel,
        match=r"triton: RuntimeError: no C compiler; flash_attn: UnsupportedModel: .*flash_attn computes",
    ):
        first_right(["triton", "flash_attn"], lambda _: kv, CONFIGS[0])
    with pytest.raises(UnsupportedModel, match="head dimension"):
        first_right(["triton"], lambda _: KVCache([(2, 48)], 2, 256, torch.bfloat16, "cpu"), CONFIGS[0])

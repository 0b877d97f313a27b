"""What is supported is decided from the config; everything else is refused by its name."""

import pytest
from transformers import (
    DeepseekV3Config,
    Gemma2Config,
    Gemma3Config,
    Gemma3TextConfig,
    GemmaConfig,
    GPT2Config,
    GptOssConfig,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
    Qwen3NextConfig,
)

from actors.engine.support import FAMILIES, check_class, check_supported, window_of
from actors.errors import UnsupportedModel

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024, "rope_theta": 1e6}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 1024,
    "rope_theta": 5e5,
}


@pytest.mark.parametrize(
    "config",
    [
        LlamaConfig(),
        LlamaConfig(rope_parameters=LLAMA3),
        LlamaConfig(rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}),
        Qwen2Config(),
        Qwen2Config(use_sliding_window=True, sliding_window=128, max_window_layers=4),
        Qwen3Config(rope_parameters=YARN),
        Qwen3MoeConfig(),
        MistralConfig(),
        MistralConfig(sliding_window=None),
        GemmaConfig(),
        Gemma2Config(),
        Gemma3TextConfig(),
        LlamaConfig(architectures=["LlamaForCausalLM"]),
    ],
    ids=lambda config: config.model_type,
)
def test_supported(config):
    check_supported(config)


def test_every_family_has_a_default_config_here():
    seen = {
        config.model_type
        for config in (LlamaConfig, Qwen2Config, Qwen3Config, Qwen3MoeConfig, MistralConfig, GemmaConfig, Gemma2Config)
    }
    assert seen | {Gemma3TextConfig.model_type} == set(FAMILIES)


def changed(config, **attributes):
    """A config as a hub repository may carry it: attributes that its class does not know included."""
    for name, value in attributes.items():
        setattr(config, name, value)
    return config


LONG = {"rope_type": "longrope", "short_factor": [1.0] * 64, "long_factor": [1.0] * 64, "rope_theta": 1e4}


@pytest.mark.parametrize(
    ("config", "named"),
    [
        (GPT2Config(), "gpt2"),
        (GptOssConfig(), "gpt_oss"),
        (DeepseekV3Config(), "deepseek_v3"),
        (Qwen3NextConfig(), "qwen3_next"),
        (Gemma3Config(), "gemma3'"),
        (Phi3Config(), "phi3"),
        (LlamaConfig(architectures=["LlamaForSequenceClassification"]), "LlamaForSequenceClassification"),
        (LlamaConfig(architectures=["MyLlama"]), "MyLlama"),
        (
            LlamaConfig(rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}),
            "rope_type.*'dynamic'",
        ),
        (changed(LlamaConfig(), rope_parameters=LONG), "rope_type.*'longrope'"),
        (changed(Gemma3TextConfig(), rope_parameters={"full_attention": LONG}), "rope_type.*'longrope'"),
        (changed(Qwen2Config(), rope_parameters={"rope_type": "default", "mrope_section": [1, 2]}), "mrope_section"),
        (changed(LlamaConfig(), kv_lora_rank=512), "kv_lora_rank.*latent"),
        (changed(Qwen3Config(), layer_types=["full_attention", "linear_attention"]), "linear_attention"),
        (changed(Qwen3Config(), layer_types=["chunked_attention"]), "chunked_attention"),
        (changed(Qwen3Config(), layer_types=["sliding_attention"], sliding_window=None), "sliding_window"),
        (changed(MistralConfig(), layer_types=["sliding_attention", "full_attention"]), "layer_types"),
        (changed(MistralConfig(), sliding_window=0), "sliding_window"),
        (changed(LlamaConfig(), attn_logit_softcapping=50.0), "attn_logit_softcapping"),
        (changed(LlamaConfig(), final_logit_softcapping=30.0), "final_logit_softcapping"),
        (Gemma3TextConfig(attn_logit_softcapping=50.0), "attn_logit_softcapping"),
        (Gemma3TextConfig(use_bidirectional_attention=True), "use_bidirectional_attention"),
        (changed(LlamaConfig(), is_causal=False), "is_causal"),
        (changed(LlamaConfig(), attention_chunk_size=8192), "attention_chunk_size"),
        (changed(LlamaConfig(), logit_scale=0.06), "logit_scale"),
        (changed(LlamaConfig(), use_attention_sinks=True), "attention sinks"),
    ],
)
def test_refused_by_name(config, named):
    with pytest.raises(UnsupportedModel, match=named) as raised:
        check_supported(config)
    assert "engine: reference" in str(raised.value)


def test_a_class_of_remote_code_is_refused():
    check_class(LlamaConfig(), "LlamaForCausalLM")
    with pytest.raises(UnsupportedModel, match="TweakedForCausalLM"):
        check_class(LlamaConfig(), "TweakedForCausalLM")


def test_windows():
    assert window_of(LlamaConfig()) is None
    assert window_of(MistralConfig(sliding_window=64)) == 64
    assert window_of(MistralConfig(sliding_window=None)) is None
    assert window_of(Qwen2Config(sliding_window=64)) is None
    assert window_of(Gemma3TextConfig(sliding_window=512)) == 512
    assert window_of(Gemma3TextConfig(sliding_window=512, layer_types=["full_attention"] * 26)) is None

"""Which models the paged engine computes right, decided from the HF config alone.

What is not known to be handled is refused by name: an ignored attention argument gives plausible wrong tokens. Read
against transformers 5.23's modeling files. Knows nothing of weights, devices or kernels.
"""

from __future__ import annotations

from typing import Any, cast

from actors.errors import UnsupportedModel

# model_type → the class whose forward was read.
FAMILIES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "mistral": "MistralForCausalLM",
    "gemma": "GemmaForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
}
# These models apply one sliding window to all layers, whatever `layer_types` says.
_ONE_WINDOW = {"mistral", "qwen3_moe"}
_LAYER_TYPES = {"full_attention", "sliding_attention"}
# Static frequencies. "dynamic" and "longrope" recompute them from the longest position in the batch, so that packed
# rows would disturb each other.
_ROPE_TYPES = {"default", "linear", "llama3", "yarn"}
# Config attribute → what it asks for. None, False, 0 and empty mean that it is off.
_REFUSED = {
    "kv_lora_rank": "multi-head latent attention",
    "q_lora_rank": "multi-head latent attention",
    "attention_chunk_size": "chunked attention",
    "attention_sink_size": "attention sinks",
    "use_sinks": "attention sinks",
    "use_attention_sinks": "attention sinks",
    "alibi": "a position bias",
    "position_bias": "a position bias",
    "relative_attention_num_buckets": "a position bias",
    "use_bidirectional_attention": "bidirectional attention",
    "num_kv_shared_layers": "layers that share KV",
    "linear_num_value_heads": "linear attention layers",
    "mamba_d_state": "state-space layers",
    "ssm_state_size": "state-space layers",
    "logit_scale": "scaled logits",
    "logits_scaling": "scaled logits",
    "attention_multiplier": "a scaled attention",
    "is_encoder_decoder": "an encoder",
    "vision_config": "images",
    "audio_config": "audio",
}
_SOFTCAP = {"attn_logit_softcapping": {"gemma2"}, "final_logit_softcapping": {"gemma2", "gemma3_text"}}
_WAY_OUT = "engine: reference"


def check_supported(config: Any) -> None:
    """Refuse a model that the paged engine does not compute right.

    Args:
        config: an HF `PreTrainedConfig` of a causal language model.

    Raises:
        UnsupportedModel: names the architecture, layer type or attention argument.
    """
    family = getattr(config, "model_type", None)
    if family not in FAMILIES:
        raise UnsupportedModel(
            "the paged engine does not do this architecture",
            field="model.id",
            got=family,
            wants=f"one of {', '.join(sorted(FAMILIES))}, or {_WAY_OUT}",
        )
    for name in getattr(config, "architectures", None) or ():
        check_class(config, name)
    for attribute, meaning in _REFUSED.items():
        if getattr(config, attribute, None):
            raise _refusal(meaning, attribute, getattr(config, attribute))
    if getattr(config, "is_causal", True) is False:
        raise _refusal("bidirectional attention", "is_causal", False)
    for attribute, families in _SOFTCAP.items():
        if getattr(config, attribute, None) is not None and family not in families:
            raise _refusal("a soft cap that transformers does not apply here", attribute, getattr(config, attribute))
    _check_layers(config, family)
    _check_rope(config)


def check_class(config: Any, name: str) -> None:
    """Refuse a model class other than the one that was read for the config's family (remote code, other heads).

    Raises:
        UnsupportedModel: names the class.
    """
    wanted = FAMILIES[config.model_type]
    if name != wanted:
        raise UnsupportedModel(
            "the paged engine does not know this model class",
            field="model.id",
            got=name,
            wants=f"{wanted}, or {_WAY_OUT}",
        )


def tensor_parallel_sizes(config: Any) -> list[int]:
    """The numbers of ranks over which the model's KV heads can be split, rising."""
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    return [size for size in range(1, heads + 1) if heads % size == 0]


def check_tensor_parallel(config: Any, size: int, field: str = "tensor_parallel_size") -> None:
    """Refuse a number of ranks that does not divide the model's KV heads.

    Raises:
        UnsupportedModel: names those that do.
    """
    sizes = tensor_parallel_sizes(config)
    if size not in sizes:
        raise UnsupportedModel(
            f"the model's {sizes[-1]} KV heads cannot be split evenly",
            field=field,
            got=size,
            wants=" or ".join(map(str, sizes)),
        )


def window_of(config: Any) -> int | None:
    """The sliding window of the config's sliding layers in tokens; None where all layers see everything."""
    types = cast(set[str], set(getattr(config, "layer_types", None) or ()))
    window = getattr(config, "sliding_window", None)
    return window if config.model_type in _ONE_WINDOW or "sliding_attention" in types else None


def _check_layers(config: Any, family: str) -> None:
    types = cast(tuple[str, ...], tuple(getattr(config, "layer_types", None) or ()))
    for kind in types:
        if kind not in _LAYER_TYPES:
            raise _refusal("a layer type", "layer_types", kind)
    if family in _ONE_WINDOW and len(set(types)) > 1:
        raise _refusal("sliding and full layers mixed in this family", "layer_types", types)
    window = getattr(config, "sliding_window", None)
    sliding = "sliding_attention" in types or (family in _ONE_WINDOW and window is not None)
    if sliding and not (isinstance(window, int) and window > 0):
        raise _refusal("sliding layers without a window", "sliding_window", window)


def _check_rope(config: Any) -> None:
    parameters = cast(dict[str, Any], getattr(config, "rope_parameters", None) or {})
    # One set for the model, or one a layer type (Gemma 3).
    sets = list(parameters.values()) if _LAYER_TYPES & parameters.keys() else [parameters]
    for rope in sets:
        kind = (rope or {}).get("rope_type", "default")
        if kind not in _ROPE_TYPES:
            raise _refusal("a rotary embedding", "rope_parameters.rope_type", kind)
        if "mrope_section" in (rope or {}):
            raise _refusal("a multimodal rotary embedding", "rope_parameters.mrope_section", rope["mrope_section"])


def _refusal(what: str, attribute: str, got: object) -> UnsupportedModel:
    return UnsupportedModel(
        f"the paged engine does not do {what}", field=f"config.{attribute}", got=got, wants=_WAY_OUT
    )

"""A real model that is small enough for a laptop's every test: seeded weights, SmolLM2's tokenizer, no sense in it."""

from __future__ import annotations

from pathlib import Path


def write_tiny_model(folder: Path) -> Path:
    """A Llama of two layers and 4 KV heads, so that two ranks can share it; its folder."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from actors.engine.loader import load_tokenizer, resolve

    tokenizer = load_tokenizer(resolve("smollm2-135m").folder)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=8192,
        initializer_range=0.2,
        eos_token_id=tokenizer.eos_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder

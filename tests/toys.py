"""Tiny random models."""

from typing import Any

import torch
from torch import nn

from decoding.target import Target


def tiny_model(
    *,
    vocab: int = 64,
    width: int = 32,
    layers: int = 2,
    heads: int = 4,
    kv_heads: int | None = None,
    tied: bool = True,
    seed: int = 0,
    spread: float = 0.6,
    max_positions: int = 512,
    dtype: torch.dtype = torch.float64,
) -> Any:
    """A random Llama whose outputs are far from uniform (`spread`: its initial weights)."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads or heads,
        max_position_embeddings=max_positions,
        tie_word_embeddings=tied,
        initializer_range=spread,
        bos_token_id=None,
        eos_token_id=None,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return LlamaForCausalLM(config).to(dtype).eval()


def tiny_target(**options: Any) -> Target:
    return Target(tiny_model(**options), name="tiny")


def sharpen(module: nn.Module, factor: float) -> nn.Module:
    """Scales the matrices of a fresh module in place, so that its laws are far from uniform."""
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.ndim > 1:
                parameter.mul_(factor)
    return module

"""What the configurations of one-layer drafters (EAGLE) have in common: a Llama of one layer."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from decoding.target import Shape
from train.layouts import plain

SAID = (
    "model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
    "num_attention_heads", "num_key_value_heads", "head_dim", "hidden_act",
    "max_position_embeddings", "rms_norm_eps", "attention_bias", "mlp_bias", "tie_word_embeddings",
    "rope_parameters", "rope_theta", "rope_scaling",
)  # fmt: skip


def settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """Of a drafter's config() what describes the layer; not the defaults of LlamaConfig that would
    be wrong of it, such as special tokens."""
    return {key: config[key] for key in SAID}


def require(config: Mapping[str, Any], shape: Shape, folder: Path) -> None:
    """Raises ValueError for a layer other than the one that our drafters have for such a target."""
    heads, width = config.get("num_attention_heads"), config.get("hidden_size")
    expected = {
        "model_type": (config.get("model_type", "llama"), "llama"),
        "num_hidden_layers": (config.get("num_hidden_layers", 1), 1),
        "vocab_size": (config.get("vocab_size"), shape.vocab_size),
        "hidden_size": (width, shape.hidden_size),
        "intermediate_size": (config.get("intermediate_size"), shape.intermediate_size),
        "num_attention_heads": (heads, shape.heads),
        "num_key_value_heads": (config.get("num_key_value_heads") or heads, shape.kv_heads),
        "head_dim": (
            config.get("head_dim") or (width // heads if heads and width else None),
            shape.head_dim or shape.hidden_size // shape.heads,
        ),
        "hidden_act": (config.get("hidden_act", "silu"), "silu"),
        "rms_norm_eps": (config.get("rms_norm_eps", 1e-6), shape.norm_eps),
        "rope_theta": (plain.theta(config), shape.rope_theta),
        "attention_bias": (bool(config.get("attention_bias")), False),
        "mlp_bias": (bool(config.get("mlp_bias")), False),
        "tie_word_embeddings": (bool(config.get("tie_word_embeddings")), False),
    }
    wrong = [f"{key} {was!r}, not {ours!r}" for key, (was, ours) in expected.items() if was != ours]
    if wrong:
        raise ValueError(
            f"{folder / 'config.json'} has {'; '.join(wrong[:4])}: not the layer that a drafter of "
            "this family has for this target; choose the target that it was made for, or another "
            "drafter"
        )

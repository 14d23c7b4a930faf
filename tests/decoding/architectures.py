"""Architectures of transformers, tiny and random, for the tests of what a target takes."""

from functools import cache
from typing import Any

import torch
from toys import sharpen

from decoding.target import Shape, Target
from drafters.clover import Clover
from drafters.clover2 import Clover2
from drafters.eagle import Eagle
from drafters.eagle3 import Eagle3
from drafters.hydra_heads import HydraHeads
from drafters.medusa import Medusa

LAYERS = 3
SIZES = {
    "vocab_size": 48,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
WHOLE = {"layer_types": ["full_attention"] * LAYERS}
CAPS = {"final_logit_softcapping": 2.0, "attn_logit_softcapping": 3.0, "query_pre_attn_scalar": 16}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "Llama": {},
    "Qwen2": {},
    "Qwen3": {"head_dim": 16},
    "Gemma": {"head_dim": 16},
    "Gemma2": {"head_dim": 16, "sliding_window": 4, **WHOLE, **CAPS},
    "Mistral": {"sliding_window": None},
    "GPTNeoX": {"num_key_value_heads": None},
    "Phi": {},
    "Cohere": {"logit_scale": 0.3},
    "Granite": {"logits_scaling": 4.0, "embedding_multiplier": 3.0},
}

FAMILIES = {
    "medusa": Medusa,
    "hydra_heads": HydraHeads,
    "clover": Clover,
    "clover2": Clover2,
    "eagle": Eagle,
    "eagle3": Eagle3,
}


def random_model(name: str, **changes: Any) -> Any:
    """Every parameter of it random, biases and norms too, and its laws far from uniform."""
    import transformers

    options = {**SIZES, **ARCHITECTURES.get(name, {}), **changes}
    config = getattr(transformers, f"{name}Config")(
        **{k: v for k, v in options.items() if v is not None or k != "num_key_value_heads"}
    )
    with torch.random.fork_rng():
        torch.manual_seed(8)
        model = transformers.AutoModelForCausalLM.from_config(config).double()
        with torch.no_grad():
            for parameter in model.parameters():
                noise = torch.randn_like(parameter)
                parameter.copy_(0.4 * noise if parameter.ndim > 1 else parameter + 0.2 * noise)
            if model.get_input_embeddings() is not None:  # or a token would foretell itself
                model.get_input_embeddings().weight.mul_(0.2)
    return model


@cache
def random_target(name: str, tied: bool) -> Target:
    return Target(random_model(name, tie_word_embeddings=tied), name=name)


def heads_for(family: str, target: Target, **options: Any) -> Any:
    """A sharp random drafter of this family, built for the target's shape."""
    if family == "eagle3":
        options["taps"] = [0, 1, 2]
    with torch.random.fork_rng():
        torch.manual_seed(3)
        drafter = FAMILIES[family](Shape.of(target.model.config), **options).to(target.dtype)
        drafter.initialise(target, lambda: torch.ones(48))
        for parameter in drafter.parameters():
            if parameter.ndim > 1:
                parameter.data += 0.1 * torch.randn_like(parameter)
    return sharpen(drafter, 1.5).eval()

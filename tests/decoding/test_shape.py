"""What is known of a target by its shape alone: parameters, of mixtures of experts too."""

from typing import Any

import torch

from decoding.target import Shape

QWEN3_235B = Shape(151_936, 4096, 94, 64, 4, 12_288, 40_960, head_dim=128, experts=128,
                   active_experts=8, expert_size=1536)  # fmt: skip


def built(name: str, **more: Any) -> tuple[Any, int]:
    """A small model's configuration, and its parameters counted one by one."""
    import transformers

    sizes = {
        "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": False,
    }  # fmt: skip
    config = getattr(transformers, f"{name}Config")(**sizes, **more)
    with torch.device("meta"):
        model = getattr(transformers, f"{name}ForCausalLM")(config)
    return config, sum(p.numel() for p in model.parameters())


def test_a_dense_model_has_no_experts():
    config, count = built("Llama")
    shape = Shape.of(config)
    assert shape.parameters() == shape.parameters(active=True) == count
    assert (shape.experts, shape.active_experts, shape.expert_size) == (0, 0, 0)


def test_all_experts_are_counted_and_the_matrix_that_chooses():
    config, count = built("Mixtral", num_local_experts=6, num_experts_per_tok=2)
    shape = Shape.of(config)
    assert (shape.experts, shape.active_experts, shape.expert_size) == (6, 2, 48)
    assert shape.parameters() == count
    assert count - shape.parameters(active=True) == 3 * 4 * 3 * 32 * 48  # four experts a layer


def test_experts_have_a_size_of_their_own():
    given = {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 16}
    config, count = built("Qwen3Moe", head_dim=8, **given)
    shape = Shape.of(config)
    assert (shape.experts, shape.active_experts, shape.expert_size) == (8, 3, 16)
    assert (
        count - shape.parameters() == 3 * 2 * 8
    )  # norms of queries and keys, which are not counted


def test_the_published_counts():
    assert round(QWEN3_235B.parameters() / 1e9) == 235
    assert round(QWEN3_235B.parameters(active=True) / 1e9) == 22
    embeddings = 2 * 151_936 * 4096
    assert round((QWEN3_235B.parameters() - embeddings) / 1e9) == 234

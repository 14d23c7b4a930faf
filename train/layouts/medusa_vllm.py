"""Layout `vllm` of the family medusa, as vLLM 0.32 reads it (models/medusa.py).

vLLM drops the biases of the blocks unless `medusa_fc_bias` is true, and cannot load heads over part
of the vocabulary: both are always written whole. Heads that share the target's output matrix are
one `lm_heads.0.weight` with `original_lm_head: true`. Its greedy chain is as long as
num_speculative_tokens, at most the number of heads.

Shapes: T tokens, D the target's width, V vocabulary.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from decoding.target import Shape, Target
from drafters.base import Trained
from drafters.files import write_json
from drafters.medusa import Medusa
from train.layouts import files
from train.layouts.given import PATHS, Facts, Prompt, output_matrix, same

METHOD, ENGINES = "medusa", ("vllm",)
ADAPTER = "target_adapter"


def fits(config: Mapping[str, Any], names: set[str]) -> bool:
    """Whether this is the layout of a folder with this config.json."""
    return config.get("model_type") == "medusa" and "num_heads" in config


def write(drafter: Trained, folder: Path, facts: Facts) -> list[str]:
    """Writes the heads; returns notes. Raises ValueError where they share a matrix with a bias."""
    assert isinstance(drafter, Medusa)
    shared = not drafter.lm_heads
    own = {k: v for k, v in drafter.state_dict().items() if not k.startswith("adapter.")}
    tensors = facts.stored(own)
    if shared:
        tensors["lm_heads.0.weight"] = output_matrix(facts.borrowed.target)
    files.save(folder, "medusa/vllm", tensors)
    vocabulary = drafter.shape.vocab_size
    write_json(folder / "config.json", {
        "architectures": ["MedusaModel"],
        "model_type": "medusa",
        "hidden_size": drafter.shape.hidden_size,
        "vocab_size": vocabulary,
        "truncated_vocab_size": vocabulary,
        "num_heads": len(drafter.blocks),
        "num_hidden_layers": len(drafter.blocks[0].layers),
        "medusa_fc_bias": True,
        "original_lm_head": shared,
        "dtype": str(tensors["blocks.0.layers.0.weight"].dtype).removeprefix("torch."),
    })  # fmt: skip
    notes = [
        f"num_speculative_tokens is at most the number of heads, {len(drafter.blocks)}",
        PATHS,
    ]
    return notes + adapter(drafter, folder)


def adapter(drafter: Medusa, folder: Path) -> list[str]:
    """Writes the matrices by which Medusa-2 changes its target, as peft reads them; returns a note
    of it, or nothing for a drafter that leaves its target as it is."""
    if drafter.adapter is None:
        return []
    own = folder / ADAPTER
    drafter.adapter.config().save_pretrained(own)
    save_file(drafter.adapter.peft_state(), own / "adapter_model.safetensors")
    return [f"the heads are for a changed target: merge {ADAPTER} (peft) into it before serving"]


def read(folder: Path, shape: Shape, target: Target | None = None) -> Medusa:
    """The heads of a folder; with a target, a matrix that is the target's own is shared again.

    Raises ValueError for what vLLM would not read, or other sizes than the target's.
    """
    config, saved = files.config(folder), files.tensors(folder)
    _require(config, saved, shape, folder)
    count, layers = config["num_heads"], config["num_hidden_layers"]
    shared = bool(config.get("original_lm_head"))
    if shared:
        matrix = saved.pop("lm_heads.0.weight", None)
        if matrix is None:
            raise ValueError(f"{folder} has original_lm_head and no lm_heads.0.weight: add it")
        shared = target is not None and same(output_matrix(target), matrix)
        if not shared:
            saved |= {f"lm_heads.{i}.weight": matrix for i in range(count)}
    drafter = Medusa(shape, heads=count, layers=layers, head="shared" if shared else "own")
    files.fill(drafter, saved, folder)
    return drafter.eval()


def _require(
    config: Mapping[str, Any], saved: Mapping[str, Tensor], shape: Shape, folder: Path
) -> None:
    """Raises ValueError for a configuration that vLLM reads otherwise than the tensors ask."""
    count, layers = config.get("num_heads"), config.get("num_hidden_layers")
    if not all(isinstance(n, int) and n > 0 for n in (count, layers)):
        raise ValueError(
            f"{folder / 'config.json'} has num_heads {count!r} and num_hidden_layers {layers!r}; "
            "expected how many heads there are and how many blocks each has"
        )
    mine, found = (shape.hidden_size, shape.vocab_size), [config.get("hidden_size")]
    found.append(config.get("vocab_size"))
    if tuple(found) != mine:
        raise ValueError(
            f"{folder} is for a target of width {found[0]} and {found[1]} tokens, and this one has "
            f"{mine[0]} and {mine[1]}; choose the target that it was made for"
        )
    if "token_map" in saved or config.get("truncated_vocab_size", found[1]) != found[1]:
        raise ValueError(f"{folder} has heads over part of the vocabulary, which vLLM cannot load")
    if any(name.endswith(".bias") for name in saved) and not config.get("medusa_fc_bias"):
        raise ValueError(
            f"{folder} holds biases, and without medusa_fc_bias in config.json vLLM drops them: "
            'add "medusa_fc_bias": true'
        )


def logits(folder: Path, prompt: Prompt, facts: Facts, depth: int) -> list[Tensor]:
    """What vLLM's heads give of the target's last states, [T, V] each; settings that are absent
    have its defaults."""
    config, saved = files.config(folder), files.tensors(folder)
    weights = {name: tensor.float() for name, tensor in saved.items()}
    found = []
    for i in range(config["num_heads"]):
        x_TD = prompt.states_LTD[-1]
        for j in range(config["num_hidden_layers"]):
            name = f"blocks.{i}.layers.{j}"
            bias = weights[f"{name}.bias"] if config.get("medusa_fc_bias", False) else None
            x_TD = x_TD + F.silu(F.linear(x_TD, weights[f"{name}.weight"], bias))
        head = 0 if config.get("original_lm_head", False) else i
        found.append(x_TD @ weights[f"lm_heads.{head}.weight"].T)
    return found

"""Layout `speculators` of the family eagle3: that of the library speculators 0.9, which vLLM 0.32
reads too (transformers_utils/configs/speculators/algos.py).

`vllm serve FOLDER` starts target and drafter, where the file names a target that can be found.
`norm_before_residual` is always written: absent it is true for vLLM, false for speculators. Ids of
taps are k for hidden_states[k]. The target's embedding is in the file.

Shapes: L taps, T tokens, V vocabulary.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from decoding.target import Shape, Target
from drafters.base import Trained
from drafters.eagle3 import Eagle3
from drafters.files import write_json
from train.layouts import files, llama
from train.layouts.eagle3_vllm import FLAGS, IDS, Written, computed, drafter_of, rising
from train.layouts.given import Facts, Prompt, embedding

METHOD, ENGINES = "eagle3", ("vllm", "speculators")
VERSION = "0.9.0"


def fits(config: Mapping[str, Any], names: set[str]) -> bool:
    """Whether this is the layout of a folder with this config.json."""
    return config.get("speculators_model_type") == "eagle3"


def write(drafter: Trained, folder: Path, facts: Facts) -> list[str]:
    """Writes the drafter with the target's embedding; returns notes."""
    assert isinstance(drafter, Eagle3)
    taps, mine = rising(drafter)
    tensors = {n.replace("midlayer.", "layers.0."): t for n, t in facts.stored(mine).items()}
    tensors["embed_tokens.weight"] = embedding(facts.borrowed.target)
    files.save(folder, "eagle3/speculators", tensors)
    layer = llama.settings(drafter.config()) | {"num_aux_hidden_states": len(taps)}
    greedy = {
        "proposal_type": "greedy",
        "speculative_tokens": facts.draft_length,
        "verifier_accept_k": 1,
        "accept_tolerance": 0.0,
    }
    write_json(folder / "config.json", {
        "architectures": ["Eagle3DraftModel"],
        "speculators_model_type": "eagle3",
        "speculators_version": VERSION,
        "speculators_config": {
            "algorithm": "eagle3",
            "default_proposal_method": "greedy",
            "proposal_methods": [greedy],
            "verifier": {
                "name_or_path": facts.base_model,
                "architectures": list(facts.architectures),
            },
        },
        "transformer_layer_config": layer,
        "draft_vocab_size": drafter.lm_head.out_features,
        "target_hidden_size": drafter.shape.hidden_size,
        **dict.fromkeys(FLAGS, False),
        "embed_requires_grad": False,
        IDS: taps,
        "tie_word_embeddings": False,
        "dtype": str(tensors["fc.weight"].dtype).removeprefix("torch."),
    })  # fmt: skip
    if facts.base_model:
        return []
    return [
        "the target is not on the Hub, so the file names none (verifier.name_or_path): the library "
        "speculators loads it only once a target is named there; vLLM is started with the target "
        "and this drafter as its speculative_config"
    ]


def read(folder: Path, shape: Shape, target: Target | None = None) -> Eagle3:
    """The drafter of a folder. Raises ValueError if a tensor is missing, left over or of another
    shape, the embedding is not the target's, or a setting asks for what this family lacks."""
    config, saved = files.config(folder), files.tensors(folder)
    layer = config.get("transformer_layer_config")
    if not isinstance(layer, dict) or config.get("norm_before_residual") is None:
        raise ValueError(
            f"{folder / 'config.json'} has no transformer_layer_config or no norm_before_residual "
            "(absent, vLLM takes it for true and speculators for false): write both"
        )
    mine = {name.replace("layers.0.", "midlayer."): tensor for name, tensor in saved.items()}
    return drafter_of(Written(config, layer, config.get(IDS), mine), folder, shape, target)


def logits(folder: Path, prompt: Prompt, facts: Facts, depth: int) -> list[Tensor]:
    """What vLLM computes to guess each token, [rows, V] for each of `depth` guesses; settings that
    are absent have its defaults."""
    config, layers = files.config(folder), facts.shape.layers
    ids = config.get(IDS) or [2, layers // 2, layers - 3]
    known = {"norm_before_residual": True} | config
    written = Written(known, config["transformer_layer_config"], ids, files.tensors(folder))
    return computed(written, prompt, facts, depth)

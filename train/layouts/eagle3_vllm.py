"""Layout `vllm` of the family eagle3: the native one, as vLLM 0.32 (models/llama_eagle3.py) and
SGLang 0.5 (models/llama_eagle3.py) read it.

Which states are tapped is written in both dialects: `eagle_aux_hidden_state_layer_ids` beside the
other settings is k for transformers' hidden_states[k] (vLLM), inside `eagle_config` it is k - 1
(SGLang). vLLM hands the states over in rising order whatever the order of the ids, so the columns
of fc are written in that order. What no id can name: the last state, which vLLM has before the
final norm.

Shapes: T tokens, L taps, D the target's width, E = L x D, R rows of the drafter's head, V
vocabulary.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from decoding.target import Shape, Target
from drafters.base import Trained
from drafters.eagle3 import Eagle3
from drafters.files import write_json
from train.layouts import files, llama, plain
from train.layouts.eagle_vllm import only_borrowed
from train.layouts.given import Facts, Prompt

METHOD, ENGINES = "eagle3", ("vllm", "sglang", "openvino")
IDS = "eagle_aux_hidden_state_layer_ids"
FLAGS = ("norm_before_residual", "norm_before_fc", "fc_norm", "norm_output")


@dataclass(frozen=True)
class Written:
    """A drafter's files, whatever the layout: all settings, those of its layer, the ids of its taps
    (None: none is named) and its tensors."""

    config: Mapping[str, Any]
    layer: Mapping[str, Any]
    ids: list[int] | None
    tensors: dict[str, Tensor]


def fits(config: Mapping[str, Any], names: set[str]) -> bool:
    """Whether this is the layout of a folder with this config.json and tensors of these names."""
    norms = {"midlayer.hidden_norm.weight", "layers.0.hidden_norm.weight"}
    return bool(norms & names) and "speculators_model_type" not in config


def write(drafter: Trained, folder: Path, facts: Facts) -> list[str]:
    """Writes the drafter; returns notes. Raises ValueError where it taps the last state."""
    assert isinstance(drafter, Eagle3)
    taps, tensors = rising(drafter)
    tensors = facts.stored(tensors)
    files.save(folder, "eagle3/vllm", tensors)
    write_json(folder / "config.json", {
        **{"architectures": ["LlamaForCausalLMEagle3"]},
        **llama.settings(drafter.config()),
        **dict.fromkeys(FLAGS, False),
        "draft_vocab_size": drafter.lm_head.out_features,
        "target_hidden_size": drafter.shape.hidden_size,
        "num_aux_hidden_states": len(taps),
        IDS: taps,
        "eagle_config": {"use_aux_hidden_state": True, IDS: [k - 1 for k in taps]},
        "dtype": str(tensors["fc.weight"].dtype).removeprefix("torch."),
    })  # fmt: skip
    return [] if len(taps) == 3 else [f"SGLang reads three taps, and this drafter has {len(taps)}"]


def rising(drafter: Eagle3) -> tuple[list[int], dict[str, Tensor]]:
    """The taps in rising order, and the drafter's tensors with fc's columns so. Raises ValueError
    where it taps the last state."""
    taps, last = list(drafter.taps), drafter.shape.layers
    if last in taps:
        raise ValueError(
            f"the drafter taps hidden_states[{last}], the last state after the final norm, which "
            f"engines hand over before it; train one with drafter.taps below {last}"
        )
    order = sorted(range(len(taps)), key=taps.__getitem__)
    tensors = dict(drafter.state_dict())
    columns = tensors["fc.weight"].unflatten(1, (len(taps), -1))
    tensors["fc.weight"] = columns[:, order].flatten(1)
    return [taps[i] for i in order], tensors


def read(folder: Path, shape: Shape, target: Target | None = None) -> Eagle3:
    """The drafter of a folder. Raises ValueError if a tensor is missing, left over or of another
    shape, or a setting asks for what this family does not compute.

    Ids inside `eagle_config` alone are in SGLang's dialect, as all that write them alone mean.
    """
    config, saved = files.config(folder), files.tensors(folder)
    nested = (config.get("eagle_config") or {}).get(IDS)
    ids, alone = config.get(IDS), [k + 1 for k in nested] if nested else None
    if ids and alone and list(ids) != alone:
        raise ValueError(
            f"{folder / 'config.json'} taps {list(ids)} for vLLM and, by the ids in eagle_config, "
            f"{alone} for SGLang (one more than written); make them agree"
        )
    mine = {name.replace("layers.0.", "midlayer."): tensor for name, tensor in saved.items()}
    return drafter_of(Written(config, config, ids or alone, mine), folder, shape, target)


def drafter_of(written: Written, folder: Path, shape: Shape, target: Target | None) -> Eagle3:
    """The drafter of these files, whose tensors have our names."""
    saved = written.tensors
    llama.require(written.layer, shape, folder)
    _require(written.config, shape, folder)
    only_borrowed(saved, target, folder, ("embed_tokens.weight",))
    rows = written.config.get("draft_vocab_size") or shape.vocab_size
    _require_map(saved, rows, shape.vocab_size, folder)
    drafter = Eagle3(shape, taps=written.ids, vocabulary=rows)
    files.fill(drafter, saved, folder)
    return drafter.eval()


def _require(config: Mapping[str, Any], shape: Shape, folder: Path) -> None:
    """Raises ValueError for a computation that this family does not have."""
    nested = config.get("eagle_config") or {}
    asked = [flag for flag in FLAGS if config.get(flag) or nested.get(flag)]
    if nested.get("use_aux_hidden_state") is False:
        asked.append("use_aux_hidden_state false")
    if asked:
        raise ValueError(
            f"{folder / 'config.json'} asks for {', '.join(asked)}, which the family eagle3 does "
            "not compute: choose a drafter without"
        )
    width = config.get("target_hidden_size") or shape.hidden_size
    if width != shape.hidden_size:
        raise ValueError(
            f"{folder} reads states of width {width}, and this target's are {shape.hidden_size}; "
            "choose the target that it was made for"
        )


def _require_map(saved: dict[str, Tensor], rows: int, vocabulary: int, folder: Path) -> None:
    """Raises ValueError unless d2t names `rows` tokens of the target and t2d the same ones; takes
    out maps that name them all."""
    if not {"d2t", "t2d"} & saved.keys() and rows == vocabulary:
        return
    d2t, t2d = saved.get("d2t"), saved.get("t2d")
    if d2t is None or t2d is None or d2t.shape != (rows,) or t2d.shape != (vocabulary,):
        raise ValueError(
            f"{folder} has {rows} of the target's {vocabulary} tokens, and no d2t of {rows} "
            f"offsets and t2d of {vocabulary} marks that say which: get the checkpoint again"
        )
    ids_R = d2t.long() + torch.arange(rows)
    marked = torch.zeros(vocabulary, dtype=torch.bool)
    within = bool(((ids_R >= 0) & (ids_R < vocabulary)).all())
    if within:
        marked[ids_R] = True
    if not within or int(marked.sum()) != rows or not torch.equal(marked, t2d.bool()):
        raise ValueError(
            f"{folder}: d2t (target id = row + d2t[row]) and t2d do not name the same {rows} "
            "tokens: the maps are damaged, or d2t holds ids where offsets are expected"
        )
    if bool((ids_R.diff() < 0).any()):
        raise ValueError(f"{folder} names its {rows} tokens out of order: d2t must rise with them")
    saved |= {"d2t": d2t.long(), "t2d": t2d.bool()}
    if rows == vocabulary and not d2t.any():
        del saved["d2t"], saved["t2d"]


def logits(folder: Path, prompt: Prompt, facts: Facts, depth: int) -> list[Tensor]:
    """What vLLM computes to guess each token, [rows, V] for each of `depth` guesses; settings that
    are absent have its defaults."""
    config, saved = files.config(folder), files.tensors(folder)
    weights = {n.replace("midlayer.", "layers.0."): tensor for n, tensor in saved.items()}
    layers = facts.shape.layers
    nested = (config.get("eagle_config") or {}).get(IDS)
    ids = config.get(IDS) or nested or [2, layers // 2, layers - 3]
    return computed(Written(config, config, ids, weights), prompt, facts, depth)


def computed(written: Written, prompt: Prompt, facts: Facts, depth: int) -> list[Tensor]:
    """The same of files whose tensors have the names of vLLM's modules, whatever their dtype."""
    assert written.ids is not None, "vLLM has a default where none is named"
    w = {n: t.float() if t.is_floating_point() else t for n, t in written.tensors.items()}
    config, layer = written.config, plain.Layer.of(w, "layers.0.", written.layer)
    before = bool(config.get("norm_before_residual", False))

    def step(stream_SD: Tensor, embed_SD: Tensor) -> tuple[Tensor, Tensor]:
        normed_SD = layer.norm("hidden_norm", stream_SD)
        read = torch.cat([layer.norm("input_layernorm", embed_SD), normed_SD], dim=-1)
        out_SD = layer(normed_SD if before else stream_SD, read)
        said_SD = plain.rms(out_SD, w["norm.weight"], layer.eps)
        return (said_SD if config.get("norm_output", False) else out_SD), said_SD

    taps_TE = prompt.states_LTD[sorted(written.ids)].transpose(0, 1).flatten(1)
    streams_TD = taps_TE @ w["fc.weight"].T
    own = w.get("embed_tokens.weight")
    embed_TD = facts.borrowed.embed(prompt.ids_T) if own is None else own[prompt.ids_T]
    found = plain.guesses(streams_TD, embed_TD, depth, step)
    return [whole(rows @ w["lm_head.weight"].T, w.get("d2t"), facts) for rows in found]


def whole(logits_NR: Tensor, d2t: Tensor | None, facts: Facts) -> Tensor:
    """Over the target's vocabulary, [N, V], as vLLM spreads them; the others are -inf."""
    rows, vocabulary = logits_NR.shape[1], facts.shape.vocab_size
    if rows == vocabulary:
        return logits_NR
    assert d2t is not None, "a head over part of the vocabulary without d2t"
    spread = logits_NR.new_full((len(logits_NR), vocabulary), -torch.inf)
    spread[:, torch.arange(rows) + d2t] = logits_NR
    return spread

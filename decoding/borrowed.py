"""What draft heads borrow of a target, loaded alone: all that training from a cache reads of it.

Shapes: T tokens of a batch B, D target width.
"""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from decoding.cache import Cache
from decoding.target import Target, TargetOut


class Borrowed(Target):
    """A target's embedding, last norm and head, and its last layer where the files name its tensors
    as the model does. The other layers are not there (meta tensors), so it makes no pass."""

    def _states(
        self,
        ids_BT: Tensor,
        positions_BT: Tensor,
        mask: Tensor,
        cache: Cache | None,
        taps: tuple[int, ...],
    ) -> TargetOut:
        raise AssertionError("only the embedding and the head of this target are loaded")


def parts_of(place: str, revision: str | None, dtype: torch.dtype) -> Any:
    """A model of `place`, a folder or Hub id, with those parts; of a Hub id, only the files that
    hold them are fetched. Raises ValueError where a file has no tensor of that name."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(place, revision=revision, trust_remote_code=False)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)
    files = _files(place, revision)
    outside, last = _outside(model), list(_last_layer(model))
    tied = set(getattr(model, "all_tied_weights_keys", None) or {})
    for name in outside:
        if name in files or name not in tied:
            _put(model, name, files, dtype)
    if all(name in files for name in last):
        for name in last:
            _put(model, name, files, dtype)
    model.tie_weights()
    return model


def _outside(model: Any) -> list[str]:
    """Names of the parameters that belong to no list of layers."""
    lists = [name for name, m in model.named_modules() if isinstance(m, nn.ModuleList)]
    every = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    return [n for n in every if not any(n.startswith(f"{stack}.") for stack in lists)]


def _last_layer(model: Any) -> Iterator[str]:
    """Names of the last layer's parameters, for models whose layers are named so."""
    stack = getattr(model.base_model, "layers", None)
    for name, module in model.named_modules():
        if stack is not None and module is stack[-1]:
            yield from (f"{name}.{each}" for each, _ in module.named_parameters())


def _files(place: str, revision: str | None) -> dict[str, Callable[[], str]]:
    """What gives the path of the file that holds each tensor, fetching it if need be."""
    from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file

    def fetched(name: str) -> Callable[[], str]:
        return lambda: str(cached_file(place, name, revision=revision))

    index = cached_file(
        place,
        SAFE_WEIGHTS_INDEX_NAME,
        revision=revision,
        _raise_exceptions_for_missing_entries=False,
    )
    if index is None:
        with safe_open(fetched(SAFE_WEIGHTS_NAME)(), "pt") as file:
            return dict.fromkeys(file.keys(), fetched(SAFE_WEIGHTS_NAME))
    files = json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"]
    return {tensor: fetched(name) for tensor, name in files.items()}


def _put(model: Any, name: str, files: dict[str, Callable[[], str]], dtype: torch.dtype) -> None:
    """Reads one parameter, onto the device that a target is on."""
    if name not in files:
        raise ValueError(
            f"the files of {model.config.name_or_path} have no tensor {name}, so its parts cannot "
            "be loaded alone; train with the whole target, without a cache"
        )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with safe_open(files[name](), "pt", device=device) as file:
        value = file.get_tensor(name).to(dtype)
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, nn.Parameter(value, requires_grad=False))

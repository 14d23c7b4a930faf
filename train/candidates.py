"""The drafters that advice compares: small models around the recipe's own, and all draft heads."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf

from decoding.target import Shape
from drafters.base import Blueprint
from drafters.heads import Heads
from drafters.lm import HEAD_DIM, LM
from train.compose import ROOT, build
from train.plan import Planned

PARTS = ROOT / "conf" / "drafter"
DEPTHS = (1, 2, 4)  # layers of the small models, and the recipe's own number


def blueprints_of(
    config: dict[str, Any], stages: list[Planned], shape: Shape
) -> tuple[str, dict[str, Blueprint]]:
    """The name of the recipe's drafter, and all drafters to time, by the names that are shown."""
    trained = [s.config for s in stages if s.config["_target_"] == "train.distill.Distill"]
    own: Any = build((trained[-1] if trained else config)["drafter"])
    layers, width = 1, max(HEAD_DIM, shape.hidden_size // HEAD_DIM * HEAD_DIM)
    heads = _heads()
    if not isinstance(own, Blueprint):  # training-free: nothing to size
        return "", dict(_small_models(shape, layers, width)) | heads
    same = [known for known, blueprint in heads.items() if key(blueprint) == key(own)]
    name = same[0] if same else f"{own.cls.__module__.removeprefix('drafters.')}, as configured"
    if own.arguments.get("checkpoint"):
        name = f"lm {Path(own.arguments['checkpoint']).name}"
    elif issubclass(own.cls, LM):
        layers, width = depth_and_width(empty(own, shape))
        name = f"lm {layers}x{width}"
    return name, dict(_small_models(shape, layers, width)) | heads | {name: own}


def _small_models(shape: Shape, layers: int, width: int) -> Iterator[tuple[str, Blueprint]]:
    """Depths and widths around the recipe's, and at each depth the width that has about as many
    parameters."""

    def model(depth: int, width: int) -> Blueprint:
        return Blueprint(LM, {"layers": depth, "width": width})

    size = count(empty(model(layers, width), shape))
    for depth in sorted({*DEPTHS, layers}):
        widths = {max(HEAD_DIM, round(width * f / HEAD_DIM) * HEAD_DIM) for f in (0.5, 1, 2)}
        near = range(HEAD_DIM, width + 1, HEAD_DIM) if depth >= layers else sorted(widths)
        sizes = [(abs(count(empty(model(depth, w), shape)) - size), w) for w in near]
        widths.add(min(sizes)[1])
        for each in sorted(widths):
            yield f"lm {depth}x{each}", model(depth, each)


def around(blueprint: Blueprint, shape: Shape) -> Iterator[tuple[str, Blueprint]]:
    """The small models next to this one in depth and in width."""
    layers, width = depth_and_width(empty(blueprint, shape))
    for depth in (layers - 1, layers, layers + 1):
        for step in (-1, 0, 1):
            wide = width + step * max(HEAD_DIM, round(width / 4 / HEAD_DIM) * HEAD_DIM)
            if depth >= 1 and wide >= HEAD_DIM:
                yield f"lm {depth}x{wide}", Blueprint(LM, {"layers": depth, "width": wide})


def _heads() -> dict[str, Blueprint]:
    """Every family of draft heads, as conf/drafter has it."""
    found = {}
    for file in sorted(PARTS.glob("*.yaml")):
        made = build(OmegaConf.to_container(_part(file.stem)))
        if isinstance(made, Blueprint) and issubclass(made.cls, Heads):
            found[file.stem] = made
    return found


def _part(name: str) -> Any:
    """A part with those that its defaults name below it; Hydra itself composes one thing at a time
    and is at it."""
    mine: Any = OmegaConf.load(PARTS / f"{name}.yaml")
    below = [part for part in mine.pop("defaults", []) if part != "_self_"]
    return OmegaConf.merge(*map(_part, below), mine)


def key(blueprint: Blueprint) -> str:
    """All that a drafter's speed depends on besides its target."""
    return f"{blueprint.cls.__name__} {json.dumps(blueprint.arguments, sort_keys=True)}"


def empty(blueprint: Blueprint, shape: Shape) -> Any:
    """The drafter without memory for its weights."""
    with torch.device("meta"):
        return blueprint(shape)


def count(model: torch.nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def depth_and_width(drafter: Any) -> tuple[int, int]:
    config = drafter.model.config
    return config.num_hidden_layers, config.hidden_size

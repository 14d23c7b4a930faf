"""`view=true`: what each stage of a recipe would train on or ask. Nothing is trained."""

import sys
from itertools import islice
from pathlib import Path
from typing import Any

from data.generate import Generate
from data.language import Gated
from data.sources import prompt_of
from data.view import examples
from train.base import BaseTarget
from train.compose import build
from train.distill import Distill, rows_of
from train.plan import Planned

PROMPTS = 5


def view(config: dict[str, Any], stages: list[Planned]) -> None:
    """Prints examples of every stage's data that is there already, under the target's tokenizer."""
    tokenizer = _tokenizer(config, stages)
    for stage in stages:
        made = build(stage.config)
        print(f"\n[{stage.name}]")
        if isinstance(made, (Distill, BaseTarget)):
            _documents(made, stage, tokenizer)
        elif isinstance(made, Generate):
            _prompts(made)
        else:
            print("trains on nothing")


def _documents(made: Distill | BaseTarget, stage: Planned, tokenizer: Any) -> None:
    if "cache" in stage.inputs:
        print(f"trains on the sequences of stage {stage.needs['cache']}")
        return
    generated: Path | None = stage.inputs.get("data")
    if generated is not None and not (generated / "data.json").is_file():
        print(f"trains on the answers of stage {stage.needs['data']}, which has not run yet")
        return
    rows, name = rows_of(made.data, generated)
    print(examples(rows, tokenizer, name, sys.stdout.isatty()))


def _prompts(made: Generate) -> None:
    print(f"asks, of {made.prompts.name}:")
    for row in islice(Gated(made.prompts, of="prompt"), PROMPTS):
        print("  " + prompt_of(row).replace("\n", "\n    "))


def _tokenizer(config: dict[str, Any], stages: list[Planned]) -> Any:
    """The target's; where a stage trains it and has not yet, one learnt from the same text now."""
    for stage in stages:
        made = build(stage.config)
        if isinstance(made, BaseTarget):
            if stage.done:
                return build(config["target"]).tokenizer(stage.folder / "artifact")
            print("the target is not trained yet; its tokenizer is learnt now, for this view only")
            return made.make_tokenizer()
    return build(config["target"]).tokenizer()

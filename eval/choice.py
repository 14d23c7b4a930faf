"""What a measurement settles on before it begins: the dtype, and the shape of a draft."""

from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from decoding.pretrained import Pretrained
from decoding.sampling import Sampling
from decoding.sharded import agreed
from decoding.target import Target
from eval.arms import Arm
from eval.cost import pass_milliseconds
from eval.prompts import Prompt
from eval.shapes import Shape

VERIFIED = 6  # tokens of a pass when the cost of verification is measured
DTYPES = ("bfloat16", "float32")


@dataclass(frozen=True)
class Choice:
    """The dtype and why that one; the shape, and `tried`: tokens/s of each shape."""

    dtype: str
    why: str
    tried: dict[str, float]
    shape: Shape


def load_fastest(
    spec: Pretrained, folder: Path | None, dtype: str | None = None
) -> tuple[Target, str]:
    """The target in the dtype that is fastest at verifying (or in the one given), and why."""
    if dtype:
        return spec.load(folder, dtype), "configured"
    cost = {}
    for name in DTYPES:
        model = spec.load(folder, name)
        cost[name] = agreed(model, pass_milliseconds(model, VERIFIED))
    best = min(cost, key=lambda name: cost[name])
    shown = ", ".join(f"{name} {ms:.2f} ms" for name, ms in cost.items())
    return spec.load(folder, best), f"the faster at verifying {VERIFIED} tokens: {shown}"


def try_shapes(
    arm: Arm, shapes: list[Shape], trial: list[Prompt], samplings: list[Sampling], tokens: int
) -> dict[str, float]:
    """Tokens/s of each shape on the trial prompts, in turn; {} where there is only one.

    Over all temperatures together, since one drafter serves them all.
    """
    if len(shapes) == 1:
        return {}
    names = [str(shape) for shape in shapes]
    made, seconds = dict.fromkeys(names, 0), dict.fromkeys(names, 0.0)
    for turn, prompt in enumerate(tqdm(trial[:1] + trial, desc="shapes of draft")):
        for shape, name in zip(shapes, names, strict=True):
            shape.give(arm.drafter)
            for sampling in samplings:
                done = arm.answer([prompt], sampling, tokens)
                if turn:  # the first is the warm-up
                    made[name] += done.tokens
                    seconds[name] += done.seconds
    return {name: made[name] / seconds[name] for name in names}


def rules(shape: Shape, sample: bool) -> str:
    """How drafts of this shape are verified, in words."""
    kind = shape.tree["kind"] if shape.tree else "chain"
    if kind in ("static", "dynamic") or not sample:
        return "one-hot"
    sampled = "block verification" if kind == "chain" else "recursive rejection"
    return f"one-hot at temperature 0, {sampled} above"

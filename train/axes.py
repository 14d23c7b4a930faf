"""The values of a preset's axes (conf/sweep/): functions that its YAML calls, `${times:...}`, and
that are answered from the whole configuration before any job starts."""

import bisect
import functools
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf

HEAD_DIM = 64  # of an lm (drafters/lm.py): widths are its multiples
SIZES = 5  # of sweep=size
LARGEST = 4  # a drafter has at most a fourth of its target's parameters, where that leaves a choice
LARGER = 4  # times the recipe's own drafter: as large as sweep=shape may make its models


def register() -> None:
    """Makes the functions known to configurations. None reads or runs more than numbers and the
    shape of the target."""
    new = OmegaConf.register_new_resolver
    new("times", times)
    new("spaced", spaced)
    new("sizes", sizes)
    new("equal", equal)
    new("families", families)


def times(own: float, *factors: float) -> str:
    """Multiples of the recipe's own value."""
    return ",".join(f"{own * factor:.6g}" for factor in factors)


def spaced(own: int, least: int, decades: float, count: int) -> str:
    """`count` whole numbers up to the recipe's own, evenly spaced in their logarithms over
    `decades`, none below `least` (a step of training)."""
    low = max(float(least), own / 10**decades)
    steps = [low * (own / low) ** (i / (count - 1)) for i in range(count)]
    return ",".join(str(n) for n in sorted({max(round(step), least) for step in steps}))


def sizes(*, _root_: DictConfig) -> str:
    """Widths of lms of the recipe's depth, evenly spaced in the logarithm of their parameters, from
    a hundredth to a fourth of the target's: about SIZES of them. Where the target is so small that
    fewer than four widths lie between, the four least."""
    count, _ = _lms(_root_)
    layers, target = _root_["drafter"]["layers"], _shape(_root_).parameters()
    most = max(target / LARGEST, count(layers, 4 * HEAD_DIM))
    low = max(most / 25, count(layers, HEAD_DIM))
    budgets = [low * (most / low) ** (i / (SIZES - 1)) for i in range(SIZES)]
    widths = {_widest(budget, layers, count) for budget in budgets}
    least = {HEAD_DIM * n for n in (1, 2, 3, 4)}
    return ",".join(map(str, sorted(widths if len(widths) >= 4 else least)))


def equal(*layers: int, _root_: DictConfig) -> str:
    """The budget (drafter.parameters) at which lms of these depths are most nearly of one size.

    Each is as wide as fits the budget, and widths are whole heads, so sizes cannot be quite equal:
    of the budgets from the recipe's own drafter to LARGER times it, that one is taken at which the
    largest model is least larger than the smallest.
    """
    count, own = _lms(_root_)

    def spread(budget: float) -> float:
        found = [count(n, _widest(budget, n, count)) for n in layers]
        return max(found) / min(found)

    budgets = [own * LARGER ** (i / 60) for i in range(61)]
    best = min(budgets, key=lambda budget: (round(spread(budget), 2), budget))
    return str(round(best))


def families(own: str, target: str, *others: str) -> str:
    """The recipe's own drafter and the parts of other classes than its own `_target_`."""
    from train.compose import CONF

    def class_of(part: str) -> str:
        return yaml.safe_load((CONF / "drafter" / f"{part}.yaml").read_text("utf-8"))["_target_"]

    return ",".join([own, *(part for part in others if class_of(part) != target)])


def _widest(budget: float, layers: int, count: Any) -> int:
    """The largest width, a multiple of HEAD_DIM, whose lm has at most this many parameters, or
    HEAD_DIM."""
    widths = range(HEAD_DIM, 2**15, HEAD_DIM)
    fit = bisect.bisect_right(widths, budget, key=lambda width: count(layers, width))
    return widths[max(0, fit - 1)]


def _lms(root: DictConfig) -> tuple[Any, int]:
    """count(layers, width) of an lm for this target; and the recipe's own drafter's count."""
    from drafters.base import Blueprint
    from drafters.lm import LM
    from train.candidates import count, empty

    _require_lm(root)
    shape = _shape(root)

    @functools.cache
    def made(layers: int, width: int) -> int:
        return count(empty(Blueprint(LM, {"layers": layers, "width": width}), shape))

    def parameters(layers: int, width: int) -> int:
        one, two = made(1, width), made(2, width)  # each further layer has as many as the second
        return one + (layers - 1) * (two - one)

    own: Any = root.drafter
    width = own.width or shape.hidden_size // HEAD_DIM * HEAD_DIM
    return parameters, own.parameters or parameters(own.layers, width)


def _require_lm(root: DictConfig) -> None:
    drafter: Any = root.drafter
    if drafter._target_ != "drafters.lm.LM":
        raise ValueError(
            f"this sweep sizes an lm and the recipe's drafter is {drafter._target_}, whose size is "
            "its target's: add drafter=lm"
        )


def _shape(root: DictConfig) -> Any:
    """The target's shape: of its files, or of the stage that will train it. Raises ValueError where
    neither is at hand."""
    from decoding.target import Shape
    from train.estimate import shape_of_target
    from train.plan import Planned

    plain: Any = OmegaConf.to_container(root.stages, resolve=False)
    whole = [stage for stage in plain.values() if isinstance(stage, dict)]
    trained = [stage for stage in whole if stage.get("_target_") == "train.base.BaseTarget"]
    stages = []
    if trained and not root.target.path:
        stages = [Planned("target", trained[0], {}, "", None)]  # type: ignore[arg-type]
    spec: Any = OmegaConf.to_container(root.target, resolve=True)
    if spec.get("shape") and not Path(str(spec["path"])).is_dir():  # no waiting for the Hub
        return Shape(**spec["shape"])
    found = shape_of_target(spec, stages)
    if found is None:
        raise ValueError(
            f"the shape of the target {root.target.path} is not known here, and the drafters are "
            "sized by it: give the axis yourself, drafter.width=256,512,1024"
        )
    return found

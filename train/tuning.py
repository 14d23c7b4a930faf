"""What the stages take that look for the best way to draft: tune_tree and skip_layers."""

import torch

from decoding.target import Shape
from eval.choice import DTYPES, VERIFIED
from eval.cost import SIZES, between
from eval.rounds import SECONDS, TURNS
from eval.skip_layers import FINALISTS, SkipLayers
from eval.tune_tree import WIDTHS, TuneTree
from train.machine import matrix_speed
from train.passes import BASE, EFFICIENCY, SHORT, START, Estimate, mapped, round_cost
from train.scale import Work, pass_bytes, target_flops

ROW = 512  # tokens of a prompt with its answer, at most; where they are longer, it takes longer
LEVELS = 9 * 2 * len(WIDTHS)  # of a drafter, that tune_tree times (eval/cost.py)


def tuning(made: TuneTree, shape: Shape | None, rehearsed: bool) -> Estimate:
    """Reading answers, and timing passes of the target and levels of the drafter, of which is known
    that each takes less than such a pass."""
    said = f"hit rates on at most {made.rows:,} answers, and a tree of at most {made.nodes} nodes"
    if shape is None:
        return Estimate(said)
    row = min(ROW, shape.max_positions)
    sizes = [m for m in SIZES if m <= 2 * made.nodes]
    ends = {m: round_cost(shape, 1, m, rehearsed=rehearsed) for m in (1, VERIFIED, sizes[-1])}
    timed = _in_turn(sum(between(ends, m) for m in sizes))
    timed += len(DTYPES) * _in_turn(ends[VERIFIED])
    reading = made.rows * row * target_flops(shape, row) / (matrix_speed("bfloat16") * EFFICIENCY)
    floor = _floor(shape)
    work = Work(0, 1, 1, shape.hidden_size, 3, made.batch_size, row)
    return Estimate(
        said,
        # both dtypes of the target are held while the faster one is loaded
        memory=int(floor + 4 * shape.parameters() + mapped(shape) + pass_bytes(shape, work)),
        floor=floor,
        seconds=(
            START + timed + SHORT * reading,
            START + timed + LEVELS * ends[1] + reading,
        ),
    )


def skipping(made: SkipLayers, shape: Shape | None, rehearsed: bool) -> Estimate:
    """Answers drafted with each mask that is tried, then those of the best and without drafts.

    A token takes at most two passes: what a mask leaves of one, and the target's."""
    compared = made.repeats * (FINALISTS + 1)
    most = (made.trials + compared) * made.prompts * made.max_new_tokens
    said = f"{made.trials} masks of layers, at most {most:,} tokens"
    if shape is None:
        return Estimate(said)
    seconds, floor = most * round_cost(shape, 1, rehearsed=rehearsed), _floor(shape)
    return Estimate(
        said,
        memory=floor + mapped(shape),
        floor=floor,
        seconds=(START + SHORT * seconds, START + 2 * seconds),
    )


def _floor(shape: Shape) -> int:
    return 2 * shape.parameters() + (0 if torch.cuda.is_available() else BASE)


def _in_turn(seconds: float) -> float:
    """Seconds of turns that take so long each (eval/rounds.py)."""
    least, most = TURNS
    return seconds * (1 + min(max(SECONDS / seconds, least), most))

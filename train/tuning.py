"""What the stages take that look for the best way to draft (tune_tree, skip_layers), and those that
hand a drafter to engines (export, serve, and what is asked of them before the bill)."""

import torch

from decoding.target import Shape
from eval.choice import DTYPES, VERIFIED
from eval.cost import SIZES, between
from eval.rounds import SECONDS, TURNS
from eval.serve import Serve
from eval.skip_layers import FINALISTS, SkipLayers
from eval.tune_tree import WIDTHS, TuneTree
from train.export import Export
from train.layouts.table import LAYOUTS
from train.machine import matrix_speed
from train.overfit import ROWS, Overfit
from train.passes import (
    BASE,
    EFFICIENCY,
    LAYER_SECONDS,
    SHORT,
    START,
    Estimate,
    mapped,
    round_cost,
)
from train.scale import Work, pass_bytes, target_flops
from train.serveable import Serveable, family_of

ROW = 512  # tokens of a prompt with its answer, at most; where they are longer, it takes longer
WRITING = 1e8  # bytes a second of an export: cast, written, hashed, read back
PROVING = 1.0  # seconds of a format's proof, its imports included
# Seconds that an engine and a format took beside the answers: started twice, models converted,
# the card's code run; on two cores, with models of 20 million parameters.
ENGINES = {"transformers": 15, "vllm": 50, "openvino": 30, "llama_cpp": 15, "speculators": 20}
PASSES = 4  # over each answer: by the engine and by our loop, without a drafter and with it
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


def handing(
    made: Export | Serve | Serveable | Overfit,
    family: str,
    shape: Shape | None,
    parameters: int | None,
    rehearsed: bool,
) -> Estimate:
    """What such a stage takes, of a drafter of this family (drafters.medusa.Medusa, or medusa) with
    so many parameters (None: not known)."""
    if isinstance(made, Export):
        return exporting(made, family, shape, parameters)
    if isinstance(made, Serve):
        return serving(made, family, shape, rehearsed)
    if isinstance(made, Serveable):
        return preserving(made, shape, parameters, rehearsed)
    return overfitting(made, shape, parameters, rehearsed)


def exporting(made: Export, family: str, shape: Shape | None, parameters: int | None) -> Estimate:
    """The formats of the family; at most in fp32, and with a matrix of the target's in each."""
    family = _short(family)
    wanted = made.formats(family)
    said = f"the formats {', '.join(wanted)}" if wanted else f"nothing: no engine serves {family}"
    if shape is None or parameters is None or not wanted:
        return Estimate(said)
    rows = shape.vocab_size * shape.hidden_size
    disk = len(wanted) * 4 * (parameters + rows)
    lends = family != "lm"
    floor = 3 * 4 * parameters + (
        _floor(shape) if lends else _floor(shape) - 2 * shape.parameters()
    )
    seconds = START + len(wanted) * PROVING + disk / WRITING
    memory = floor + (mapped(shape) if lends else 0)
    return Estimate(said, memory=memory, floor=floor, disk=disk, seconds=(seconds, seconds))


def serving(made: Serve, family: str, shape: Shape | None, rehearsed: bool) -> Estimate:
    """Each engine that is here with each format of the family that it reads. The memory is this
    stage's own: the engines', which are processes of their own, comes before it."""
    layouts = LAYOUTS.get(_short(family), {})
    asked = [e for each in layouts.values() for e in each.ENGINES if e in made.engines]
    if _short(family) == "lm" and "llama_cpp" in made.engines:
        asked.append("llama_cpp")  # with the format gguf
    prompts = made.limit * len(made.prompts)
    said = f"{len(asked)} x engine and format, {prompts} prompts; engines' own memory not counted"
    if shape is None or not asked:
        return Estimate(said if asked else "no engine is here that reads the family")
    answers = prompts * made.max_new_tokens * round_cost(shape, 1, rehearsed=rehearsed)
    wide = 2 if made.dtype == "float32" else 1  # as round_cost is of bf16
    started = START + sum(ENGINES[engine] for engine in asked)
    seconds = (1 + len(asked) * PASSES) * wide * answers
    floor = _floor(shape) + 2 * (wide - 1) * shape.parameters()
    return Estimate(
        said,
        memory=floor + mapped(shape),
        floor=floor,
        seconds=(started / 2 + SHORT * seconds, started + seconds),
    )


def preserving(
    made: Serveable, shape: Shape | None, parameters: int | None, rehearsed: bool
) -> Estimate:
    """What `preflight=serve` takes: an export of the untrained drafter, and `serving`."""
    family = family_of(made.drafter)
    exported = exporting(made.engines.export, family, shape, parameters)
    return _both(exported, serving(made.engines.client, family, shape, rehearsed))


def overfitting(
    made: Overfit, shape: Shape | None, parameters: int | None, rehearsed: bool
) -> Estimate:
    """A short training on a few answers, decoding them, then export and serving."""
    said, family = f"{made.steps} steps on {made.count} answers", family_of(made.drafter)
    if shape is None or parameters is None:
        return Estimate(said)
    speed = matrix_speed(made.dtype) * EFFICIENCY
    spans = []
    for row in (made.max_new_tokens, made.max_new_tokens + made.max_prompt_tokens):
        learnt = made.steps * ROWS * row * (6 * parameters + 2 * shape.parameters()) / speed
        spans.append(2 * START + learnt + made.steps * shape.layers * LAYER_SECONDS)
    floor = _floor(shape) + 2 * shape.parameters() + 16 * parameters
    training = Estimate(
        said,
        memory=floor + mapped(shape),
        floor=floor,
        disk=4 * parameters,
        seconds=(spans[0], spans[1]),
    )
    if family not in LAYOUTS:
        return training
    exported = exporting(made.engines.export, family, shape, parameters)
    served = serving(made.engines.client, family, shape, rehearsed)
    return _both(_both(training, exported), served)


def _both(first: Estimate, then: Estimate) -> Estimate:
    """Of two things, one after the other."""
    spans = [each.seconds for each in (first, then) if each.seconds]
    sizes = [each.disk for each in (first, then) if each.disk]
    held = [each.memory for each in (first, then) if each.memory]
    return Estimate(
        f"{first.what}; then {then.what}",
        memory=max(held, default=None),
        floor=max(first.floor, then.floor),
        disk=sum(sizes) if sizes else None,
        seconds=(sum(s[0] for s in spans), sum(s[1] for s in spans)) if spans else None,
    )


def _short(family: str) -> str:
    """A family's name, of the class that configures it too."""
    parts = family.split(".")
    return parts[1] if len(parts) == 3 else family


def _floor(shape: Shape) -> int:
    return 2 * shape.parameters() + (0 if torch.cuda.is_available() else BASE)


def _in_turn(seconds: float) -> float:
    """Seconds of turns that take so long each (eval/rounds.py)."""
    least, most = TURNS
    return seconds * (1 + min(max(SECONDS / seconds, least), most))

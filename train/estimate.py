"""What a stage will take, before it takes it: parameters, tokens, steps, memory, disk, time.

Disk is arithmetic. Memory and time of a training step are measured on random weights of the same
shapes where that takes a second or two (train/probe.py); else they are arithmetic too.
"""

import json
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from data.generate import Generate
from data.pack import SHARD
from decoding.pretrained import Pretrained
from decoding.target import Shape
from drafters.base import Batch, Metrics
from drafters.lm import LM
from eval.bench import Bench
from eval.serve import Serve
from eval.skip_layers import SkipLayers
from eval.tune_tree import TuneTree
from train import decoded, loop
from train.base import BaseTarget
from train.cache import CacheStates
from train.compose import build
from train.distill import Distill
from train.export import Export
from train.machine import matrix_speed, memory_free, neighbours
from train.objectives import CE
from train.overfit import Overfit
from train.packing import VALIDATION_SEQUENCES
from train.passes import (
    BASE,
    EFFICIENCY,
    PACKING,
    REHEARSED,
    START,
    Estimate,
    caching,
    generating,
    mapped,
    measuring,
    packed_bytes,
    round_cost,
)
from train.placement import placement
from train.plan import Planned
from train.probe import SAVED, Measured, measure, random_batch, stand_in
from train.scale import Work, held, kept, pass_bytes
from train.schedule import Schedule
from train.serveable import Serveable
from train.tuning import handing, skipping, tuning

STATE_BYTES = 12  # a trained parameter in a checkpoint: fp32 weight and two moments
PACKER_BYTES = 60  # a token that is being packed, as Python's integers in three lists
HOLES = 0.15  # of a step's memory: the allocator cannot use again what it gave back
SAVING = 2e8  # bytes a second of a checkpoint, hashes included
AT_MOST = 8.0  # seconds that a rehearsed step may take


@dataclass(frozen=True)
class Learner:
    """What a training stage trains, and reads: `work` on one rank; `reads`: the target whose
    passes (`passes` of them, or what costs as much; none with a cache) each step needs, `weights`
    its bytes on a rank; `decodes`: its validations decode prompts; artifact: bytes of a saved
    parameter."""

    work: Work
    schedule: Schedule
    reads: Shape | None = None
    weights: int = 0
    passes: int = 1
    decodes: bool = False
    artifact: int = 4


def shape_of_target(spec: dict[str, Any], stages: list[Planned]) -> Shape | None:
    """The target's shape: of the stage that trains it, of the files at hand, or as configured."""
    for stage in stages:
        if stage.config["_target_"] == "train.base.BaseTarget":
            width = stage.config["width"]
            return Shape(
                hidden_size=width,
                heads=width // 64,
                kv_heads=width // 64,
                vocab_size=stage.config["vocab_size"],
                layers=stage.config["layers"],
                intermediate_size=-(-8 * width // 192) * 64,
                max_positions=stage.config["max_positions"],
                tied=True,
            )
    from transformers import AutoConfig

    target: Pretrained = build(spec)
    try:
        return Shape.of(AutoConfig.from_pretrained(str(target.path), revision=target.revision))
    except OSError:  # a Hub id and no Hub: the plan says so
        return Shape(**target.shape) if target.shape else None


def drafter_parameters(config: dict[str, Any], shape: Shape) -> int | None:
    """Parameters of a configured drafter for a target of this shape; nothing is allocated.

    None for a checkpoint on the Hub while the Hub cannot be reached.
    """
    try:
        with torch.device("meta"):
            return sum(p.numel() for p in build(config)(shape).parameters())
    except OSError:
        return None


def estimate(
    stage: Planned,
    shape: Shape | None,
    ranks: int = 1,
    *,
    rehearsed: bool = True,
    drafter: dict[str, Any] | None = None,
) -> Estimate:
    """What is known of a stage beforehand; `rehearsed`: measured where it does not take long.
    drafter: the recipe's, for stages that have none of their own."""
    made = build(stage.config)
    if isinstance(made, (BaseTarget, Distill)):
        learner = learner_of(stage, made, shape, ranks)
        if learner is None or shape is None:
            plan = made.schedule
            said = "sizes are not known while the Hub cannot be reached"
            return Estimate(said, plan.steps * plan.batch_tokens, plan.steps)
        found = _once(stage.config, made, learner, shape) if rehearsed else None
        return training(learner, shape, ranks, found)
    if isinstance(made, Generate):
        return generating(made, shape, ranks, rehearsed)
    if isinstance(made, Bench):
        return measuring(made, shape, ranks, rehearsed)
    if isinstance(made, CacheStates):
        if shape and drafter_parameters(stage.config["drafter"], shape) is None:
            shape = None
        return caching(made, shape, ranks)
    if isinstance(made, TuneTree):
        return tuning(made, shape, rehearsed)
    if isinstance(made, SkipLayers):
        return skipping(made, shape, rehearsed)
    if isinstance(made, Export | Serve | Serveable | Overfit):
        own = stage.config.get("drafter") or drafter
        count = drafter_parameters(own, shape) if own and shape else None
        return handing(made, own["_target_"] if own else "", shape, count, rehearsed)
    return Estimate("")


def learner_of(
    stage: Planned, made: BaseTarget | Distill, shape: Shape | None, ranks: int
) -> Learner | None:
    """What a training stage trains; None where a size is not known offline."""
    plan = made.schedule
    micro, length = plan.micro(ranks), plan.sequence_length
    if shape is None:
        return None
    if isinstance(made, BaseTarget):
        work = Work(shape.parameters(), 1, shape.layers, shape.hidden_size, 0, micro, length)
        return Learner(work, plan, passes=0, artifact=2)
    count = drafter_parameters(stage.config["drafter"], shape)
    if count is None:
        return None
    given = made.drafter.arguments
    reads = made.objective.needs_target or made.drafter.cls.needs_target  # type: ignore[attr-defined]
    layers, width = int(given.get("layers") or 1), int(given.get("width") or shape.hidden_size)
    unrolled, taps = int(given.get("steps") or 1), 3 if "taps" in given else 0
    adapted = bool(given.get("target_lora"))  # there and back, and once as it was
    if adapted:
        layers += shape.layers
    work = Work(count, unrolled, layers, width, taps, micro, length)
    if not reads:
        return Learner(work, plan, passes=0)
    cached, decodes = "cache" in stage.needs, "data" in stage.needs
    passes = 4 if adapted else int(not cached)
    weights = _weights(made.target, shape, ranks, cached)
    return Learner(work, plan, shape, weights, passes, decodes)


def _weights(target: Pretrained, shape: Shape, ranks: int, cached: bool) -> int:
    """Bytes of the frozen target on a rank that trains."""
    found = placement(shape, dtype=target.dtype, ranks=ranks, positions=0)
    if cached:
        return found.borrowed
    return found.sharded if target.parallel else found.replicated


MEASURED: dict[str, Measured | None] = {}  # of this process: the runs of a sweep share steps


def _once(
    config: dict[str, Any], made: BaseTarget | Distill, learner: Learner, shape: Shape
) -> Measured | None:
    """`rehearse`, once for all stages whose steps are the same work."""
    parts = [config.get(name) for name in ("drafter", "objective", "target")]
    work = [asdict(learner.work), learner.schedule.dtype, learner.passes, asdict(shape)]
    key = json.dumps([*parts, *work], sort_keys=True, default=str)
    if key not in MEASURED:
        MEASURED[key] = rehearse(made, learner, shape)
    return MEASURED[key]


def rehearse(made: BaseTarget | Distill, learner: Learner, shape: Shape) -> Measured | None:
    """A step of the real drafter beside a target of random weights; None where that would take
    long, or more memory than there is."""
    size = learner.work.parameters + (shape.parameters() if learner.reads else 0)
    long = size > REHEARSED or micro_seconds(learner, shape) > AT_MOST
    elsewhere = isinstance(made, Distill) and made.drafter.arguments.get("checkpoint")
    elsewhere = elsewhere or (learner.reads and not learner.passes)  # a cache has its own batches
    needed = size * (SAVED + 8) + kept(learner.work, "float32")
    if shape.experts or long or elsewhere or needed > memory_free():
        return None
    batch = random_batch(learner.work.micro, learner.work.length, shape.vocab_size)
    frozen = stand_in(shape) if learner.reads else None
    with torch.random.fork_rng():
        module, objective = _module(made, shape)
        module.initialise(frozen, lambda: torch.ones(shape.vocab_size, dtype=torch.long))
    target = module.learning(frozen) if frozen else None

    def step(engine: nn.Module, batch: Batch) -> tuple[Tensor, Metrics]:
        return engine(batch, target, objective)

    return measure(module, step, batch, learner.schedule.dtype, frozen)


def _module(made: BaseTarget | Distill, shape: Shape) -> tuple[Any, Any]:
    if isinstance(made, BaseTarget):
        return LM(shape, layers=made.layers, width=made.width), CE()
    return made.drafter(shape), made.objective


def training(
    learner: Learner, shape: Shape, ranks: int = 1, found: Measured | None = None
) -> Estimate:
    """From a measured step, or from arithmetic."""
    plan, work = learner.schedule, learner.work
    target = learner.reads.parameters() if learner.reads else 0
    floor = held(work.parameters, plan.zero_stage, ranks, plan.dtype) + learner.weights
    step = kept(work, plan.dtype) + (pass_bytes(shape, work) if learner.passes else 0)
    if found:
        step = found.peak
    if not torch.cuda.is_available():
        floor, step = floor + BASE, step + _in_the_heap(learner, step)
    timed = found or Measured(0, micro_seconds(learner, shape), 0.0)
    seconds = START + learning_seconds(learner, shape, ranks, timed, rehearsed=bool(found))
    return Estimate(
        f"{work.parameters:,} parameters" + (f", reads a target of {target:,}" if target else ""),
        tokens=plan.steps * plan.batch_tokens,
        steps=plan.steps,
        memory=int(floor + step),
        floor=floor,
        disk=disk(learner),
        aside=STATE_BYTES * work.parameters,
        seconds=(seconds, seconds),
        measured=found is not None,
    )


def _in_the_heap(learner: Learner, step: float) -> float:
    """Bytes that a process on a CPU has held besides: sequences while they were packed, the pages
    of the target's file, holes that a step left, and a gathered checkpoint beside these."""
    plan, parameters = learner.schedule, learner.work.parameters
    packing = min(plan.tokens, SHARD * plan.sequence_length) * PACKER_BYTES
    target = mapped(learner.reads) if learner.passes and learner.reads else 0
    return packing + target + HOLES * step + SAVED * parameters


def disk(learner: Learner) -> int:
    """Bytes of the tensors that a training stage leaves: packed positions, two checkpoints, the
    best weights where validation decodes, the artifact. Small files come on top."""
    plan, parameters = learner.schedule, learner.work.parameters
    sequences = plan.tokens // plan.sequence_length + VALIDATION_SEQUENCES
    packed = packed_bytes(sequences, plan.sequence_length)
    best = 4 * parameters if learner.decodes else 0
    kept_states = min(2, plan.steps) * STATE_BYTES * parameters
    return packed + kept_states + best + learner.artifact * parameters


def learning_seconds(
    learner: Learner, shape: Shape, ranks: int, found: Measured, *, rehearsed: bool
) -> float:
    """Packing, steps, validations and checkpoints."""
    plan, parameters = learner.schedule, learner.work.parameters
    steps = plan.steps * found.step_seconds(plan, ranks) * neighbours(ranks)  # who share its cores
    reports = min(loop.REPORTS, plan.steps)
    held_out = VALIDATION_SEQUENCES * plan.sequence_length
    looks = held_out / learner.work.tokens * found.seconds / 3  # forward passes alone
    if learner.decodes:  # rounds of one batch of prompts after another, and their training passes
        rounds = decoded.PROMPTS / decoded.TOGETHER * decoded.NEW_TOKENS / 2 / ranks
        rows, tokens = decoded.TOGETHER, decoded.CHAIN + 1
        looks += rounds * 2 * round_cost(shape, rows, tokens, rehearsed=rehearsed)
    saves = min(loop.CHECKPOINTS + 1, plan.steps) * STATE_BYTES * parameters / SAVING
    return plan.tokens / PACKING + steps + reports * looks + saves


def micro_seconds(learner: Learner, shape: Shape) -> float:
    """Seconds of one micro-batch by its operations."""
    work = learner.work
    passes = 2 * learner.passes * learner.reads.parameters(active=True) if learner.reads else 0
    flops = work.tokens * (6 * work.parameters * work.passes + passes)
    return flops / (matrix_speed(learner.schedule.dtype) * EFFICIENCY)

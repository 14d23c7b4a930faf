"""What the stages take that only pass tokens through the target: generate, bench and cache.

How long answers will be is not known, so that time of generate and bench is a range.
"""

import functools
from dataclasses import dataclass, replace

import torch

from data.generate import Generate
from decoding.target import Shape
from eval.bench import Bench
from train.cache import CacheStates
from train.machine import matrix_speed, memory_free, memory_speed, neighbours
from train.packing import VALIDATION_SEQUENCES
from train.probe import round_seconds
from train.scale import target_flops

EFFICIENCY = 0.35  # share of the probe's speed that training reached here
LAYER_SECONDS = 4e-4  # of a pass however small the layer: Python and kernel starts, on a CPU here
BASE = 530 * 2**20  # bytes of a process on a CPU before it holds any weight: libraries
START = 5.0  # seconds of a stage before its work: imports, engine
PACKING = 2e5  # tokens a second that are read, judged and packed
PACKED_BYTES = 7  # a packed position: id 4, mask 1, document 2
ROW_BYTES = 4  # a packed sequence: its number of supervised tokens
ANSWER_BYTES = 12  # a generated token in JSON lines: its id, its text and the row's share
SHORT = 1 / 8  # of max_new_tokens: answers as short as they were in the recipes here
REHEARSED = 3e8  # parameters up to which a stand-in is made, and


@dataclass
class Estimate:
    """Bytes, tokens and seconds; None where nothing can be said beforehand.

    memory: of one rank at its peak, of which `floor` is certain: weights and optimiser. disk: what
    will be left, and `aside` what stands beside it while a checkpoint is written. seconds: the
    least and the most.
    """

    what: str
    tokens: int | None = None
    steps: int | None = None
    memory: int | None = None
    floor: int = 0
    disk: int | None = None
    aside: int = 0
    seconds: tuple[float, float] | None = None
    measured: bool = False


def generating(made: Generate, shape: Shape | None, ranks: int, rehearsed: bool) -> Estimate:
    """Answers of unknown lengths, shared by the ranks; rehearsed: a round of decoding is
    measured."""
    parts, share = _divided(made, ranks)
    answers = made.limit * made.answers_per_prompt if made.limit else None
    said = f"at most {answers:,} answers" if answers else "every prompt"
    if shape is None:
        return Estimate(f"{said}; the target's shape is not known offline")
    cache = shape.layers * 2 * shape.kv_heads * (shape.head_dim or 64) * 2
    room = made.batch_size * (made.max_new_tokens + made.max_prompt_tokens) * cache
    floor = 2 * shape.parameters() // parts + (0 if torch.cuda.is_available() else BASE)
    memory = floor + room + mapped(shape, parts)
    found = Estimate(f"{said}, whose lengths nobody knows", memory=memory, floor=floor)
    if answers is None:
        return found
    most = answers * made.max_new_tokens
    rounds = share * most / made.batch_size
    seconds = rounds * round_cost(shape, made.batch_size, rehearsed=rehearsed)
    times = (START + seconds * SHORT, START + seconds)
    return replace(found, tokens=most, disk=most * ANSWER_BYTES, seconds=times)


def measuring(made: Bench, shape: Shape | None, ranks: int, rehearsed: bool) -> Estimate:
    """Arms, trials and the test of the sampling law; see generating."""
    parts, share = _divided(made, ranks)
    prompts = len(made.prompts) * made.limit
    said = f"{len(made.prompts)} task(s), at most {prompts:,} prompts"
    if shape is None:
        return Estimate(said)
    arms = 2 + len(made.baselines)
    answers = share * prompts * made.repeats * len(made.temperatures) * arms
    passes = {b: answers * made.max_new_tokens / b for b in made.batch_sizes}
    most = sum(count * round_cost(shape, b, rehearsed=rehearsed) for b, count in passes.items())
    drawn = made.law_samples * 2 * sum(t > 0 for t in made.temperatures)  # a few tokens each
    tried = most * made.trial_prompts / (2 * prompts)
    checks = START + drawn / 64 * 8 * round_cost(shape, 64, rehearsed=rehearsed) + tried
    floor = 2 * shape.parameters() // parts + (0 if torch.cuda.is_available() else BASE)
    return Estimate(
        said,
        # controls hold the target in fp32 as well
        memory=floor + 4 * shape.parameters() // parts + mapped(shape, parts),
        floor=floor,
        seconds=((checks + most * SHORT) / 2, checks + most),  # drafting may halve it
    )


@functools.cache
def round_cost(shape: Shape, rows: int, tokens: int = 1, *, rehearsed: bool) -> float:
    """Seconds of a round of decoding, measured if `rehearsed` and a stand-in is soon made; else the
    longest of reading the weights, multiplying them, and starting the kernels."""
    parameters = shape.parameters()
    soon = parameters <= REHEARSED and not shape.experts
    if rehearsed and soon and 6 * parameters <= memory_free():
        return round_seconds(shape, rows, tokens)
    reading = 2 * parameters / memory_speed()
    active = shape.parameters(active=True)
    multiplying = 2 * active * rows * tokens / (matrix_speed("bfloat16") * EFFICIENCY)
    return max(reading, multiplying, shape.layers * LAYER_SECONDS)


def caching(made: CacheStates, shape: Shape | None, ranks: int) -> Estimate:
    """One pass over the training sequences."""
    parts, share = _divided(made, ranks)
    said = f"a cache of the target's states ({made.keep}, {made.dtype})"
    if shape is None:
        return Estimate(said, tokens=made.tokens)
    floor = 2 * shape.parameters() // parts + (0 if torch.cuda.is_available() else BASE)
    sequences = made.tokens // made.sequence_length + VALIDATION_SEQUENCES
    positions = sequences * made.sequence_length
    held = made.batch_size * made.sequence_length * shape.hidden_size * 32
    flops = share * positions * target_flops(shape, made.sequence_length)
    seconds = START + made.tokens / PACKING + flops / (matrix_speed("bfloat16") * EFFICIENCY)
    return Estimate(
        said,
        tokens=made.tokens,
        memory=floor + held + mapped(shape, parts),
        floor=floor,
        disk=positions * made.kept(shape).bytes + packed_bytes(sequences, made.sequence_length),
        seconds=(seconds, seconds),
    )


def _divided(made: Generate | Bench | CacheStates, ranks: int) -> tuple[int, float]:
    """Into how many parts the target's weights are divided, and which share of the time of one
    rank the work takes: a sharded target does it all together, ranks of one CPU share its cores."""
    if made.target.parallel:
        return ranks, 1.0
    return 1, neighbours(ranks) / ranks


def mapped(shape: Shape, parts: int = 1) -> int:
    """Bytes that a loaded target takes on a CPU besides its weights: its file's pages, which stay
    mapped, and what the passes of its own check leave in the heap. Measured on models here."""
    return 0 if torch.cuda.is_available() else 4 * shape.parameters() // parts


def packed_bytes(sequences: int, length: int) -> int:
    """Disk of packed sequences."""
    return sequences * (PACKED_BYTES * length + ROW_BYTES)

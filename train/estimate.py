"""What a stage will take, before it takes it: parameters, tokens, steps, memory, disk, hours.

Rough by design: memory and disk within a factor of two, hours from half-second probes of the
machine's matrix products and memory. Step D of the project narrows them.
"""

import functools
import time
from dataclasses import dataclass
from typing import Any

import torch

from data.generate import Generate
from decoding.pretrained import Pretrained
from decoding.target import Shape
from eval.bench import Bench
from train.base import BaseTarget
from train.compose import build
from train.distill import Distill
from train.plan import Planned
from train.schedule import Schedule

PACKED_BYTES = 7  # a packed position: id 4, mask 1, document 2
TRAINED_BYTES = 16  # a trained parameter: bf16 weight and gradient, fp32 master and two moments
STATE_BYTES = 12  # a parameter in a checkpoint: fp32 weight and two moments
ACTIVATIONS = 34  # bytes a token, layer and unit of width that a training step keeps (bf16)
EFFICIENCY = 0.35  # share of the probe's speed that training reached here
LAYER_SECONDS = 4e-4  # of a pass however small the layer: Python and kernel starts, on a CPU here
BASE = 6 * 2**25  # bytes of a process before it holds any weight
ROW_BYTES = 12  # a generated token in JSON lines: its id, its text and the row's share


@dataclass
class Estimate:
    """Bytes, tokens and seconds; None where nothing can be said beforehand."""

    what: str
    tokens: int | None = None
    steps: int | None = None
    memory: int | None = None
    disk: int | None = None
    seconds: float | None = None


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


def estimate(stage: Planned, shape: Shape | None) -> Estimate:
    """What is known of a stage beforehand."""
    made = build(stage.config)
    if isinstance(made, BaseTarget):
        assert shape is not None
        return _training(made.schedule, shape.parameters(), shape.layers, shape.hidden_size, 0, 0)
    if isinstance(made, Distill):
        count = drafter_parameters(stage.config["drafter"], shape) if shape else None
        if shape is None or count is None:
            plan = made.schedule
            said = "sizes are not known while the Hub cannot be reached"
            return Estimate(said, plan.steps * plan.batch_tokens, plan.steps)
        reads_target = made.objective.needs_target or made.drafter.cls.needs_target  # type: ignore[attr-defined]
        reads = shape.parameters() if reads_target else 0
        layers = int(made.drafter.arguments.get("layers") or 1)
        passes = 1
        if made.drafter.arguments.get("target_lora"):  # there and back, and once as it was
            layers, passes = layers + shape.layers, 4
        return _training(made.schedule, count, layers, shape.hidden_size, reads, passes)
    if isinstance(made, Generate):
        return _generating(made, shape)
    if isinstance(made, Bench):
        return _measuring(made, shape)
    return Estimate("")


def _training(
    plan: Schedule, parameters: int, layers: int, width: int, target: int, passes: int
) -> Estimate:
    """passes: forward passes of a target of `target` parameters, or what costs as much."""
    positions = plan.steps * plan.batch_tokens
    held = plan.micro_batch * plan.sequence_length
    activations = held * layers * width * ACTIVATIONS
    flops = positions * (6 * parameters + 2 * passes * target)
    return Estimate(
        f"{parameters:,} parameters" + (f", reads a target of {target:,}" if target else ""),
        tokens=positions,
        steps=plan.steps,
        memory=parameters * TRAINED_BYTES + 2 * target + activations + BASE,
        disk=positions * PACKED_BYTES + parameters * (3 * STATE_BYTES + 4),
        seconds=flops / (matrix_speed(plan.dtype) * EFFICIENCY),
    )


def _generating(made: Generate, shape: Shape | None) -> Estimate:
    if shape is None:
        return Estimate("generate; the target's shape is not known offline")
    most = made.limit * made.answers_per_prompt * made.max_new_tokens if made.limit else None
    cache = shape.layers * 2 * shape.kv_heads * (shape.head_dim or 64) * 2
    held = made.batch_size * (made.max_new_tokens + made.max_prompt_tokens) * cache
    return Estimate(
        f"at most {made.limit * made.answers_per_prompt:,} answers"
        if made.limit
        else "every prompt",
        tokens=most,
        memory=2 * shape.parameters() + held + BASE,
        disk=most * ROW_BYTES if most else None,
        seconds=decoding_seconds(shape, most / made.batch_size, made.batch_size) if most else None,
    )


def _measuring(made: Bench, shape: Shape | None) -> Estimate:
    prompts = len(made.prompts) * made.limit
    said = f"{len(made.prompts)} task(s), at most {prompts:,} prompts"
    if shape is None:
        return Estimate(said)
    arms = 2 + len(made.baselines)
    answers = prompts * made.repeats * len(made.temperatures) * arms * made.max_new_tokens
    return Estimate(
        said,
        memory=4 * shape.parameters() + BASE,  # controls hold the target in fp32
        seconds=sum(decoding_seconds(shape, answers / b, b) for b in made.batch_sizes),
    )


def decoding_seconds(shape: Shape, passes: float, rows: int) -> float:
    """Seconds of `passes` target passes over one token of each of `rows` requests: the longest of
    reading the weights, multiplying them, and starting the kernels."""
    parameters = shape.parameters()
    reading = 2 * parameters / memory_speed()
    multiplying = 2 * parameters * rows / (matrix_speed("bfloat16") * EFFICIENCY)
    return passes * max(reading, multiplying, shape.layers * LAYER_SECONDS)


@functools.cache
def matrix_speed(dtype: str) -> float:
    """Floating-point operations a second of a matrix product on this machine, now."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    kind = torch.bfloat16 if dtype == "bfloat16" else torch.float32
    a = torch.randn(1024, 1024, device=device).to(kind)
    begin, count = time.perf_counter(), 0
    while time.perf_counter() - begin < 0.3:
        torch.mm(a, a)
        if device == "cuda":
            torch.cuda.synchronize()
        count += 1
    return count * 2 * 1024**3 / (time.perf_counter() - begin)


@functools.cache
def memory_speed() -> float:
    """Bytes a second that this machine reads, measured now by summing 64 MiB."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    a = torch.ones(2**24, device=device)
    begin, count = time.perf_counter(), 0
    while time.perf_counter() - begin < 0.2:
        a.sum().item()
        count += 1
    return count * 2**26 / (time.perf_counter() - begin)


def show(name: str, config: dict[str, Any], stages: list[Planned]) -> None:
    """Prints the plan of a recipe."""
    shape = shape_of_target(config["target"], stages)
    print(f"recipe {name}: {len(stages)} stages; nothing is started")
    what = f"{shape.parameters():,} parameters" if shape else "not known offline"
    print(f"target: {config['target'].get('path') or 'trained by stage target'}, {what}")
    if shape and config.get("drafter"):
        count = drafter_parameters(config["drafter"], shape)
        size = f"{count:,} parameters ({count / shape.parameters():.1%})" if count else "not known"
        print(f"drafter: {config['drafter']['_target_']}, {size}")
    total = Estimate("")
    for stage in stages:
        found = estimate(stage, shape)
        total.disk = (total.disk or 0) + (found.disk or 0)
        total.seconds = (total.seconds or 0) + (found.seconds or 0)
        print(f"\n  {stage.name}: {'done' if stage.done else 'to do'}, {stage.folder}")
        if stage.needs:
            print("    needs " + ", ".join(f"{k} from {v}" for k, v in stage.needs.items()))
        print(f"    {_sentence(found)}")
    print(
        f"\nin all: about {_bytes(total.disk or 0)} of disk and {_time(total.seconds or 0)}, with "
        "every answer of generate and bench as long as it may be"
    )


def _sentence(found: Estimate) -> str:
    parts = [found.what] if found.what else []
    if found.tokens is not None:
        parts.append(f"{found.tokens:,} tokens")
    if found.steps is not None:
        parts.append(f"{found.steps:,} steps")
    if found.memory is not None:
        parts.append(f"about {_bytes(found.memory)} of memory a rank")
    if found.disk is not None:
        parts.append(f"{_bytes(found.disk)} of disk")
    if found.seconds is not None:
        parts.append(f"roughly {_time(found.seconds)}")
    return ", ".join(parts) or "small"


def _bytes(count: float) -> str:
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"


def _time(seconds: float) -> str:
    return f"{seconds / 3600:.1f} hours" if seconds >= 5400 else f"{seconds / 60:.1f} minutes"

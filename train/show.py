"""`plan=true`: what a recipe would do, what it would take, and what has changed since."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode

from decoding.pretrained import contents_hash
from decoding.target import Shape
from eval.forecast import Forecaster, measured, measurement
from eval.joint import Known
from eval.known import LAWS, read, untold
from eval.others import Others, mind, taken
from train.base import BaseTarget
from train.budget import asked_of, chain_of, here, setting_of
from train.candidates import empty
from train.compose import bind, build
from train.distill import Distill
from train.estimate import drafter_parameters, estimate, learner_of, shape_of_target
from train.launch import Launch
from train.machine import gib
from train.passes import BASE, Estimate, mapped
from train.plan import Planned, changes
from train.preflight import findings, scarce
from train.scale import (
    USABLE,
    Hardware,
    cache_bytes,
    held,
    kept,
    pass_bytes,
    stages_table,
    table,
)

BENCH = "eval.bench.Bench"


@dataclass
class Bill:
    """What the runs of a sweep come to that this process plans: the stages to do, each once, by
    their folders; hardware: whether that of another machine."""

    runs: int = 0
    hardware: bool = False
    stages: dict[Path, Planned] = field(default_factory=dict)
    found: dict[Path, Estimate] = field(default_factory=dict)


BILL = Bill()


def show(name: str, config: dict[str, Any], stages: list[Planned], root: Path) -> None:
    """Prints the plan of a recipe; with `hardware`, also what it would take on such GPUs. Of a
    sweep's run only what runs before it have not: `whole` ends them."""
    watch = Others()
    launch: Launch = build(config["launch"])
    shape = shape_of_target(config["target"], stages)
    print(f"recipe {name}: {len(stages)} stages; nothing is started")
    hardware = config.get("hardware")
    if hardware:
        print("memory and time of the stages are this machine's; those of others stand at the end")
    what = f"{shape.parameters():,} parameters" if shape else "not known offline"
    print(f"target: {config['target'].get('path') or 'trained by stage target'}, {what}")
    if shape and config.get("drafter"):
        count = drafter_parameters(config["drafter"], shape)
        size = f"{count:,} parameters ({count / shape.parameters():.1%})" if count else "not known"
        print(f"drafter: {config['drafter']['_target_']}, {size}")
    found = {}
    new = [stage for stage in stages if stage.folder not in BILL.stages]
    for stage in stages:
        if stage not in new:
            found[stage.name] = BILL.found[stage.folder]
            print(f"\n  {stage.name}: as in a run before, {stage.folder}")
            continue
        found[stage.name] = estimate(
            stage,
            shape,
            launch.world,
            rehearsed=not (hardware or stage.done),
            drafter=config.get("drafter"),
        )
        print(f"\n  {stage.name}: {'done' if stage.done else 'to do'}, {stage.folder}")
        if stage.needs:
            print("    needs " + ", ".join(f"{k} from {v}" for k, v in stage.needs.items()))
        print(f"    {_sentence(found[stage.name], _took(stage))}")
        for line in [] if stage.done else changes(stage):
            print(f"    {line}")
    print(*forecast(config, stages, root, shape), sep="\n", end="")
    print(f"\nto do: {_total([found[stage.name] for stage in new if not stage.done])}")
    busy = mind(taken([watch.since()]), "measured times are too long")
    if busy and any(found[stage.name].measured for stage in new):
        print(busy)
    several = HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN
    if several:
        BILL.runs, BILL.hardware = BILL.runs + 1, bool(hardware)
        BILL.stages |= {stage.folder: stage for stage in new}
        BILL.found |= {stage.folder: found[stage.name] for stage in new}
    if hardware and shape:
        ranks = launch.world
        lines = elsewhere(hardware, stages, shape, ranks)
        print(*lines, *too_large(build(hardware), stages, shape, ranks, found), sep="\n")
    elif not several:
        print(*findings(stages, launch, root, found), sep="\n")


def whole(launch: Launch, root: Path, sweeper: str) -> Iterator[str]:
    """Lines that end the plans of a sweep: what all its runs take, stages that they share once. Of
    a sampler's the first was planned, and what is halved ends before."""
    if not BILL.runs:
        return
    stages = BILL.stages.items()
    todo = [replace(stage, name=folder.name) for folder, stage in stages if not stage.done]
    found = {stage.name: BILL.found[stage.folder] for stage in todo}
    who = f"all {BILL.runs} runs to their end"
    who = "of the trials, the first" if sweeper == "optuna" else who
    who += ", which halving cuts (above)" if sweeper == "halving" else ""
    yield f"\n{who}: {len(todo)} stages to do, {_total(list(found.values()))}"
    if not BILL.hardware:
        yield from findings(todo, launch, root, found)


def forecast(
    config: dict[str, Any], stages: list[Planned], root: Path, shape: Shape | None
) -> list[str]:
    """What earlier sweeps on the recipe's target say of its drafter, a line for each bench, and of
    those that are done what was measured; a line for sweeps without a report; [] without either."""
    benches = [s for s in stages if s.config["_target_"] == BENCH and chain_of(stages, s)]
    if shape is None or not benches:
        return []
    lines = [f"\n  {line}\n" for line in untold(root)]
    if not any(root.glob(LAWS)):
        return lines
    mark = _mark(config, stages)
    runs = read(root, mark) if mark else []
    hardware = config.get("hardware")
    place = build(hardware).name if hardware else here()
    for bench in benches:
        line = _forecast(bench, stages, shape, runs, place)
        lines += [f"\n  {bench.name}: {line}\n"] if runs else []
    return lines


def _forecast(
    bench: Planned, stages: list[Planned], shape: Shape, runs: list[Known], place: str
) -> str:
    """Of one bench, from the other runs."""
    try:
        known = measurement(bench.folder)[1] if bench.done else None
    except ValueError:  # a tree, or a report whose controls failed: nothing to compare with
        known = None
    rest = [run for run in runs if run.bench != bench.folder.name]
    if known:
        rest = [run for run in rest if run.prompts == known.prompts]
    forecaster = Forecaster.of(rest, place, setting_of(stages, bench))
    if forecaster is None:
        return f"no prediction: {len(rest)} runs of sweeps on this target are too few for a law"
    chain = chain_of(stages, bench)
    blueprint: Any = build(chain[0].config["drafter"])
    deepest = getattr(empty(blueprint, shape), "deepest", None)
    lengths = sorted({min(n, deepest or n) for n in bench.config["draft_lengths"]})
    try:
        found = forecaster.ask(asked_of(chain, shape), [known.length] if known else lengths)
    except (ValueError, OSError) as error:
        return f"no prediction: {error}"
    return f"{found}\n    measured: {measured(known, found)}" if known else str(found)


def _mark(config: dict[str, Any], stages: list[Planned]) -> str | None:
    """The hash or revision that reports call the recipe's target by; None while it is not here."""
    spec = build(config["target"])
    if spec.path is None:
        trained = [s for s in stages if s.config["_target_"] == "train.base.BaseTarget" and s.done]
        return contents_hash(trained[0].folder / "artifact") if trained else None
    if Path(spec.path).is_dir():
        return contents_hash(spec.path)
    from huggingface_hub import resolve_revision

    try:
        found = resolve_revision(spec.path, revision=spec.revision, local_files_only=True)
        return str(found.resolved)
    except OSError:  # not on this machine, so no sweep was run on it here
        return None


def elsewhere(
    hardware: dict[str, Any], stages: list[Planned], shape: Shape, ranks: int
) -> list[str]:
    """What the stages that read the target in training take on other hardware, by placement."""
    bind(hardware, "hardware")
    gpu = build(hardware)
    lines = []
    for stage in stages:
        made = build(stage.config)
        learner = learner_of(stage, made, shape, ranks) if isinstance(made, Distill) else None
        if learner is None or learner.reads is None:
            continue
        work, positions = learner.work, learner.schedule.steps * learner.schedule.batch_tokens
        sizes = cache_bytes(shape, work.taps, positions).items()
        lines += [
            f"\n{stage.name} on {ranks} x {gpu.name}, micro-batches of {work.micro} x "
            f"{work.length} tokens (docs/scale.md has the arithmetic):",
            *table(shape, work, ranks, gpu),
            "",
            *stages_table(work, (ranks,), gpu),
            f"a cache of {positions:,} positions: "
            + ", ".join(f"{gib(size)} for {kind}" for kind, size in sizes),
        ]
    return lines


def too_large(
    gpu: Hardware, stages: list[Planned], shape: Shape, ranks: int, found: dict[str, Estimate]
) -> list[str]:
    """A warning for each stage to do that needs more than one such GPU can give it."""
    have = USABLE * gpu.memory
    needs = {s.name: _on_gpu(s, shape, ranks, found[s.name]) for s in stages if not s.done}
    return [
        scarce(stage, needs[stage.name], f"each {gpu.name}", have)
        for stage in stages
        if needs.get(stage.name, 0) > have
    ]


def _on_gpu(stage: Planned, shape: Shape, ranks: int, found: Estimate) -> float:
    """Bytes of a stage on each of `ranks` GPUs: what it needs here without what a CPU adds."""
    made = build(stage.config)
    if isinstance(made, (BaseTarget, Distill)):
        learner = learner_of(stage, made, shape, ranks)
        if learner is None:
            return 0
        plan, work = learner.schedule, learner.work
        step = kept(work, plan.dtype) + (pass_bytes(shape, work) if learner.passes else 0)
        return held(work.parameters, plan.zero_stage, ranks, plan.dtype) + learner.weights + step
    if found.memory is None or torch.cuda.is_available():
        return found.memory or 0
    parts = ranks if getattr(made, "target", None) and made.target.parallel else 1
    return found.memory - BASE - mapped(shape, parts)


def _took(stage: Planned) -> float | None:
    """Seconds, of a stage that is done."""
    if not stage.done:
        return None
    result = json.loads((stage.folder / "result.json").read_text(encoding="utf-8"))
    return float(result.get("seconds", 0.0))


def _sentence(found: Estimate, took: float | None) -> str:
    parts = [found.what] if found.what else []
    if found.tokens is not None:
        parts.append(f"{'at most ' if found.steps is None else ''}{found.tokens:,} tokens")
    if found.steps is not None:
        parts.append(f"{found.steps:,} steps")
    if found.memory is not None:
        parts.append(f"about {gib(found.memory)} of memory a rank")
    if found.disk is not None:
        parts.append(f"{'' if found.steps else 'at most '}{gib(found.disk)} of disk")
    if took is not None:
        parts.append(f"took {_time(took)}")
    elif found.seconds is not None:
        how = " (from a measured step)" if found.measured else ""
        parts.append(f"{_span(*found.seconds)}{how}")
    return ", ".join(parts) or "small"


def _total(found: list[Estimate]) -> str:
    times = [each.seconds for each in found if each.seconds]
    least, most = (sum(pair[i] for pair in times) for i in (0, 1))
    disk = sum(each.disk or 0 for each in found)
    return f"about {gib(disk)} of disk and {_span(least, most)}"


def _span(least: float, most: float) -> str:
    if most < 1.01 * least:
        return f"about {_time(most)}"
    return f"{_time(least)} to {_time(most)}, as long as answers are"


def _time(seconds: float) -> str:
    return f"{seconds / 3600:.1f} hours" if seconds >= 5400 else f"{seconds / 60:.1f} minutes"

"""What a budget of tokens or minutes leaves for each drafter that advice compares."""

import math
import shlex
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from hydra.core.hydra_config import HydraConfig

from decoding.target import Shape, Target
from drafters.base import Blueprint
from drafters.lm import LM
from eval.advise import Advice, Candidate
from eval.ancestry import flat
from eval.forecast import Forecaster
from eval.joint import Asked, Known, Law
from eval.known import machine, positions, read, settings
from eval.outlook import Proposal, outlooks
from train.candidates import around, count, depth_and_width, empty, key
from train.compose import build
from train.distill import Distill
from train.estimate import estimate, learner_of
from train.plan import Planned, processor

GENERATE = "data.generate.Generate"
DISTILL = "train.distill.Distill"


@dataclass(frozen=True)
class Budget:
    """Packed positions of all trainings of a drafter, or minutes of them and of what has to be
    generated first; neither: the recipe's own tokens."""

    tokens: int | None = None
    minutes: float | None = None

    def __post_init__(self) -> None:
        if self.tokens is not None and self.minutes is not None:
            raise ValueError(
                f"budget.tokens is {self.tokens} and budget.minutes {self.minutes}: give one of "
                "both, the other is null"
            )
        for name, value in vars(self).items():
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if value is not None and not (number and math.isfinite(value) and value > 0):
                raise ValueError(
                    f"budget.{name} is {value!r}; it must be a number above 0, or null"
                )

    def check(self, trained: Sequence[Planned]) -> None:
        """Refuses, before anything is timed, what pays for no step of the last training."""
        if self and not trained:
            raise ValueError(
                "budget is for a training, and the recipe has none: leave it out, or choose a "
                "recipe with a stage `finetune`"
            )
        step = int(trained[-1].config["schedule"]["batch_tokens"]) if trained else 0
        if self.tokens is not None and self.tokens < step:
            raise ValueError(
                f"budget.tokens is {self.tokens:,} and one step of stage {trained[-1].name} takes "
                f"{step:,}: give it more"
            )

    def __bool__(self) -> bool:
        return self.tokens is not None or self.minutes is not None

    def __str__(self) -> str:
        if self.tokens is not None:
            return f"{self.tokens:,} tokens"
        return "the recipe's own tokens" if self.minutes is None else f"{self.minutes:g} minutes"


def chain_of(stages: Sequence[Planned], last: Planned) -> list[Planned]:
    """The trainings of the drafter that `last` leaves or measures, the latest first."""
    by_name = {stage.name: stage for stage in stages}
    found, stage = [], last if last.config["_target_"] == DISTILL else None
    stage = stage or by_name.get(last.needs.get("drafter", ""))
    while stage is not None and stage.config["_target_"] == DISTILL:
        found.append(stage)
        stage = by_name.get(stage.needs.get("drafter", ""))
    return found


def setting_of(stages: Sequence[Planned], bench: Planned) -> tuple[str, str]:
    """What the law has no term for (eval/known.py), of the drafter that this bench measures."""
    return settings(dict(_held(bench, "", {stage.name: stage for stage in stages})))


def _held(stage: Planned, role: str, by_name: dict[str, Planned]) -> Iterator[tuple[str, str]]:
    """As `eval.swept.Run.held`, of stages that need not have run."""
    yield from flat(stage.config, role)
    for name, source in stage.needs.items():
        if source in by_name:
            yield from _held(by_name[source], f"{role}{name}.", by_name)


def asked_of(chain: Sequence[Planned], shape: Shape) -> Asked:
    """The drafter that these trainings will leave. OSError where its sizes are not at hand."""
    blueprint: Any = build(chain[0].config["drafter"])
    tokens, *before = (positions(stage.config["schedule"]) for stage in chain)
    return asked_for(blueprint, shape, tokens, sum(before))


def asked_for(blueprint: Blueprint, shape: Shape, tokens: int, before: int) -> Asked:
    """A drafter of this blueprint after so many tokens, for a target of this shape."""
    made = empty(blueprint, shape)
    depth = depth_and_width(made)[0] if issubclass(blueprint.cls, LM) else None
    return Asked(_family(blueprint), count(made), tokens, depth, before)


def _family(blueprint: Blueprint) -> str:
    """As reports call it; one that changes its target is another, whose runs no law here holds."""
    name = blueprint.cls.__module__.removeprefix("drafters.")
    return f"{name} with target_lora" if blueprint.arguments.get("target_lora") else name


@dataclass(frozen=True)
class Purse:
    """A budget in a recipe: its trainings (latest first), the runs of sweeps on its target, what
    their times must have been measured on, the target's shape, seconds of what has to be generated
    first, and the setting of its last training (eval/known.py)."""

    budget: Budget
    chain: list[Planned]
    runs: list[Known]
    machine: str
    shape: Shape
    first: float = 0.0
    setting: str = ""

    def allows(self, blueprint: Blueprint) -> Asked:
        """The drafter after the training that the budget pays. ValueError where it pays none."""
        schedule = self.chain[0].config["schedule"]
        asked = asked_for(blueprint, self.shape, 1, self._before(blueprint))
        if not self.budget:
            return replace(asked, tokens=positions(schedule))
        ahead = self._ahead(blueprint) if asked.before else []
        before = sum(positions(stage.config["schedule"]) for stage in ahead)
        if self.budget.minutes is None:
            whole = float(self.budget.tokens or 0) - before
        else:
            spent = self.first + sum(self._seconds(stage) for stage in ahead)
            seconds = max(60 * self.budget.minutes - spent, 0.0)
            whole = seconds * self._rate(blueprint, asked)
        step = int(schedule["batch_tokens"])
        tokens = int(whole) // step * step
        if tokens < step:
            needs = f"{before:,} tokens of pretraining and " if before else ""
            raise ValueError(
                f"{self.budget} pay no training: it takes {needs}a step of {step:,} tokens"
                + (f" after {self.first / 60:.1f} minutes of generating" if self.first else "")
            )
        return replace(asked, tokens=tokens)

    def _ahead(self, blueprint: Blueprint) -> list[Planned]:
        """The pretraining to do for this drafter: none that the recipe's own has done already."""
        return [
            _training(stage, blueprint)
            for stage in self.chain[1:]
            if not (stage.done and key(build(stage.config["drafter"])) == key(blueprint))
        ]

    def _seconds(self, stage: Planned) -> float:
        return fmean(estimate(stage, self.shape).seconds or (0.0,))

    def words(self, blueprint: Blueprint, known: str, asked: Asked, length: int) -> list[str]:
        """What the command says of this drafter besides its recipe; `known`: the part of
        conf/drafter that it is, or "" for the recipe's own."""
        own, *earlier = self.chain
        found = [f"drafter={known}"] if known else []
        if known == "lm":
            given = blueprint.arguments
            found += [f"drafter.layers={given['layers']}", f"drafter.width={given['width']}"]
        if earlier and not asked.before:
            found += [f"stages.{stage.name}=null" for stage in earlier]
            found += [f"stages.{own.name}.needs.drafter=null"]
        found += [f"stages.{own.name}.schedule.tokens={asked.tokens:.0f}"]
        return [*found, f"stages.bench.draft_lengths=[{length}]"]

    def _before(self, blueprint: Blueprint) -> int:
        """Pretraining as the recipe has it, or none, where the family was measured so alone; none
        for one that changes its target, which text must not."""
        mine = sum(positions(stage.config["schedule"]) for stage in self.chain[1:])
        seen = {run.of.before for run in self.runs if run.of.family == _family(blueprint)}
        if blueprint.arguments.get("target_lora"):
            return 0
        return 0 if 0 in seen and mine not in seen else mine

    def _rate(self, blueprint: Blueprint, asked: Asked) -> float:
        """Training tokens a second: of the measured run of its family that is nearest in size, by
        the operations of a token; without one, as the plan estimates them."""
        stage = _training(self.chain[0], blueprint)
        made = build(stage.config)
        assert isinstance(made, Distill), "the chain holds trainings alone"
        learner = learner_of(stage, made, self.shape, 1)
        reads = 2 * learner.reads.parameters(active=True) if learner and learner.reads else 0
        here = [run for run in self.runs if run.machine == self.machine and run.rate]
        mine = [run for run in here if run.of.family == asked.family]
        if mine:
            near = min(mine, key=lambda r: abs(math.log(r.of.parameters / asked.parameters)))
            less = (6 * near.of.parameters + reads) / (6 * asked.parameters + reads)
            return float(near.rate or 0) * less
        found = estimate(stage, self.shape)
        assert found.seconds, "a training with a shape takes a time"
        return (found.tokens or 0) / found.seconds[1]


def _training(stage: Planned, blueprint: Blueprint) -> Planned:
    """The stage with this drafter."""
    config = {"_target_": f"{blueprint.cls.__module__}.{blueprint.cls.__name__}"}
    return replace(stage, config=stage.config | {"drafter": config | blueprint.arguments})


def purse_of(budget: Budget, stages: Sequence[Planned], model: Target, root: Path) -> Purse:
    """The budget with what the recipe and the sweeps in `root` say of its trainings."""
    last = [s for s in stages if s.config["_target_"] == DISTILL][-1]
    ahead = [s for s in stages if s.config["_target_"] == GENERATE and not s.done]
    runs, first = read(root, str(model.revision)), 0.0
    for stage in ahead if budget.minutes else []:
        first += fmean(estimate(stage, model.shape).seconds or (0.0,))
    mine = [s for s in stages if s.needs.get("drafter") == last.name]
    setting = setting_of(stages, mine[-1])[0] if mine else ""
    return Purse(budget, chain_of(stages, last), runs, here(), model.shape, first, setting)


Timer = Callable[[dict[str, Blueprint]], list[Candidate]]


def propose(
    name: str, purse: Purse, advice: Advice, blueprints: dict[str, Blueprint], time: Timer
) -> Proposal:
    """The candidates after the trainings that the purse pays, best first; with a budget also the
    small models next to the best of them. ValueError where it pays none."""
    forecaster = Forecaster.of(purse.runs, purse.machine, (purse.setting, ""))
    budget, sweep = (str(purse.budget) if purse.budget else ""), command(name, [], "-m")
    if forecaster is None:
        few = f"{len(purse.runs)} runs of sweeps on this target are too few for a law"
        why = few if purse.runs else "no sweep on this target was reported in this output folder"
        return Proposal(budget, None, why, [], sweep=sweep)
    law, timed = forecaster.law, {c.name: c for c in advice.candidates}
    asked, unknown = _after(purse, law, {each: blueprints[each] for each in timed})
    found = outlooks(forecaster, timed, asked)
    best = next((o for o in found if o.asked.family == "lm"), None)
    if purse.budget and best:
        near = dict(around(blueprints[best.name], purse.shape))
        new, _ = _after(purse, law, {n: b for n, b in near.items() if n not in timed})
        more = {c.name: c for c in time({n: near[n] for n in new})}
        blueprints = near | blueprints
        found = outlooks(forecaster, timed | more, asked | new)
    if not found:
        return Proposal(budget, None, "; ".join(unknown), [], sweep=sweep)
    chosen = found[0]
    blueprint = blueprints[chosen.name]
    part = "lm" if issubclass(blueprint.cls, LM) else chosen.name
    part = "" if chosen.name == advice.recipe else part
    words = purse.words(blueprint, part, chosen.asked, chosen.length)
    speed, told = forecaster.speed, command(name, words)
    shares = (speed.fixed, speed.added) if speed else (None, 0.0)
    return Proposal(budget, law, "", found, unknown, sweep, told, *shares)


def _after(
    purse: Purse, law: Law, blueprints: dict[str, Blueprint]
) -> tuple[dict[str, Asked], dict[str, list[str]]]:
    """What each will be after the training that the purse pays; by reason, of which nothing can be
    said."""
    asked: dict[str, Asked] = {}
    unknown: dict[str, list[str]] = {}
    for name, blueprint in blueprints.items():
        try:
            asked[name] = purse.allows(blueprint)
            why = law.unknown(asked[name])
        except ValueError as error:
            why = str(error)
        if why:
            unknown.setdefault(why, []).append(name)
            asked.pop(name, None)
    return asked, unknown


def command(name: str, words: Sequence[str], *switches: str) -> str:
    """The command of a recipe, with the words that this one was given where these replace none."""
    given = HydraConfig.get().overrides.task if HydraConfig.initialized() else []
    keys = [word.partition("=")[0] for word in words]
    replaced = ("recipe=", "advise=", "budget", *(("drafter.",) if "drafter" in keys else ()))
    kept = [w for w in given if not w.startswith(replaced) and w.partition("=")[0] not in keys]
    return shlex.join(["python", "-m", "train", *switches, f"recipe={name}", *kept, *words])


def here() -> str:
    """What times that are measured on this machine hold for (eval/known.py: machine)."""
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return machine(", ".join([processor(), *gpus]), torch.get_num_threads())

"""Successive halving: the trainings of a sweep pause at rungs, and only those that decode best go
on, so that a sweep costs little more than its best run.

Successive Halving is Jamieson & Talwalkar 2016 (arXiv 1502.07943). Hyperband (Li et al. 2018, arXiv
1603.06560) runs it for several first rungs, since one that is too low lets late bloomers go; ASHA
(Li et al. 2020, arXiv 1810.05934) lets jobs go on before all have come to a rung, where machines
would wait. Here all wait: ours are few and of equal length.

Each training follows the learning rates of its whole run, which is why one that goes on equals one
that was never paused, bit for bit. The price is in fairness: at a rung the cosine is not over, so
that a configuration whose rate is still high is judged before that has come down, and one that
learns slowly before it has caught up; runs that were planned for the rung's tokens might rank
otherwise. Tau itself is of 64 held-out prompts. A higher first rung (`least`, a lower `rungs`) buys
certainty with tokens.
"""

import json
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

from drafters.files import write_json
from train.compose import build
from train.plan import Planned

DISTILL = "train.distill.Distill"
RUNGS = "rungs.json"  # in a stage's folder: [[tokens, validation_tau], ...]
STOPPED = (130, 143)

Launch = Callable[[list[list[str]]], Sequence[float | None]]
"""Starts jobs of these words, all at once as far as it can; their values, None where there is
none."""


def step_at(tokens: float, batch_tokens: int) -> int:
    """The first step after which a training has seen so many tokens."""
    return max(1, math.ceil(tokens / batch_tokens))


def record(folder: Path, tokens: int, tau: float | None) -> None:
    """Notes what a training's validation decoded where it paused."""
    write_json(folder / RUNGS, sorted({**rungs(folder), tokens: tau}.items()))


def rungs(folder: Path) -> dict[int, float | None]:
    """Tokens -> validation_tau of each pause of the training in this folder."""
    try:
        return dict(json.loads((folder / RUNGS).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):  # without it the rung is validated again
        return {}


def paused_stage(stages: list[Planned]) -> Planned:
    """The training that a sweep pauses: the one whose drafter no other training starts from.
    Raises ValueError where there is none, or where its validations cannot decode."""
    trainings = {s.name: s for s in stages if s.config["_target_"] == DISTILL}
    needs = {stage.name: stage.needs.values() for stage in stages}
    used, waiting = set[str](), [n for name in trainings for n in needs[name]]
    while waiting:
        if (name := waiting.pop()) not in used:
            used.add(name)
            waiting += needs[name]
    last = [name for name in trainings if name not in used]
    if len(last) != 1:
        raise ValueError(
            f"halving pauses the one training that a bench measures, and this recipe has "
            f"{', '.join(last) or 'none'}: leave out hydra/sweeper=halving"
        )
    stage = trainings[last[0]]
    if not build(stage.config).decodes(stage.needs):
        raise ValueError(
            f"halving ranks by decoded tokens per target call, and stages.{stage.name} has no "
            "validation that decodes: it must train on answers of the target (needs.data), with "
            "the target there (no needs.cache) and an objective that reads it, such as "
            f"objective@stages.{stage.name}.objective=forward_kl"
        )
    return stage


@dataclass(frozen=True)
class Job:
    """One configuration of the sweep: its words, those of them that differ from the other jobs',
    and its stages."""

    words: tuple[str, ...]
    name: str
    stages: tuple[Planned, ...]

    @cached_property
    def training(self) -> Planned:
        return paused_stage(list(self.stages))

    @property
    def schedule(self) -> dict[str, Any]:
        return self.training.config["schedule"]

    def step(self, pause: int) -> int:
        """Where it pauses for that many tokens."""
        return step_at(pause, self.schedule["batch_tokens"])

    def tau(self, pause: int) -> float | None:
        """What it decoded there, if it has."""
        tokens = self.step(pause) * self.schedule["batch_tokens"]
        return rungs(self.training.folder).get(tokens)

    def beyond(self, pause: int) -> bool:
        """Whether it was trained past this rung before anyone looked: in a plain run."""
        here = self.step(pause)
        return self.tau(pause) is None and (self.training.done or self.trained > here)

    @property
    def trained(self) -> int:
        """Steps that are behind it."""
        if self.training.done:
            return self.schedule["tokens"] // self.schedule["batch_tokens"]
        saved = (self.training.folder / "checkpoints").glob("step-*")
        names = [re.fullmatch(r"step-(\d{8,})(?:\.\d+)?", path.name) for path in saved]
        return max((int(name[1]) for name in names if name), default=0)

    @property
    def seconds(self) -> float:
        """That its training took, in all starts."""
        file = self.training.folder / "seconds.json"
        return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else 0.0

    def fault(self) -> dict[str, Any]:
        """Code and sentence that its first unfinished stage left, {} if none."""
        for stage in self.stages:
            file = stage.folder / "failed.json"
            if not stage.done and file.is_file():
                return json.loads(file.read_text(encoding="utf-8"))
        return {}


class Halving:
    """Which jobs go on from which rung: with eta 3, the best third of those that began it."""

    def __init__(self, jobs: list[Job], *, eta: int, rungs: int, least: int | None) -> None:
        """rungs: how often at most jobs are compared, the end included; least: tokens below which
        none is (it then decides the number). Raises ValueError where this cannot be done."""
        if eta < 2 or rungs < 2 or (least is not None and least < 1):
            raise ValueError(
                f"hydra.sweeper has eta {eta}, rungs {rungs}, least {least}; eta and rungs must be "
                "at least 2, least a number of tokens or null"
            )
        refuse_unequal(jobs)
        self.jobs, self.stage = jobs, jobs[0].training.name
        tokens = jobs[0].schedule["tokens"]
        if least is not None:
            rungs = 1 + _log(tokens / least, eta)
        rungs = min(rungs, max(2, 1 + _log(len(jobs), eta)))  # one job alone need not pause
        batch = max(job.schedule["batch_tokens"] for job in jobs)  # rungs are whole steps
        self.full = tokens // batch * batch
        self.pauses = [step_at(tokens / eta**k, batch) * batch for k in range(rungs - 1, 0, -1)]
        self.counts = [max(1, len(jobs) // eta**k) for k in range(rungs)]
        for job in jobs:
            steps = [job.step(pause) for pause in self.pauses]
            steps.append(tokens // job.schedule["batch_tokens"])
            if len(steps) < 2 or any(a >= b for a, b in pairwise(steps)):
                raise ValueError(
                    f"the rungs fall on the steps {', '.join(map(str, steps))} of {job.name}, and "
                    "must rise: lower hydra.sweeper.rungs, eta or least, or train on more tokens"
                )

    def planned(self) -> list[str]:
        """Lines that say what will be trained, against the whole grid."""
        ends = [*self.pauses, self.full]
        lines = [
            f"halving: {len(self.jobs)} jobs, compared by tokens per target call of "
            f"stages.{self.stage} on held-out prompts"
        ]
        for n, (count, end) in enumerate(zip(self.counts, ends, strict=True)):
            who = f"the best {count}" if n else f"all {count}"
            to = f"to {end:,} tokens" if n < len(self.pauses) else f"to the end ({end:,} tokens)"
            lines.append(f"  {who} {to}{'' if n < len(self.pauses) else ', and all later stages'}")
        grid = self.full * len(self.jobs)
        lines.append(f"  {self.cost():,} tokens in all, {self.cost() / grid:.0%} of the whole grid")
        before = {s.folder for j in self.jobs for s in j.stages if s.config["_target_"] == DISTILL}
        whole = before - {job.training.folder for job in self.jobs}
        if len(whole) > 1:
            lines.append(f"  besides, {len(whole)} earlier trainings, which are not halved")
        return lines

    def cost(self) -> int:
        """Tokens of the halved stage that all rungs take."""
        ends = pairwise([0, *self.pauses, self.full])
        return sum(count * (b - a) for count, (a, b) in zip(self.counts, ends, strict=True))

    def run(self, launch: Launch) -> None:
        """Launches the jobs rung by rung, and prints who goes on. What a rung has decided before is
        not asked again. Raises SystemExit where a job was told to stop."""
        print(*self.planned(), sep="\n", flush=True)
        going = self.jobs
        for number, pause in enumerate(self.pauses, 1):
            due = [job for job in going if job.tau(pause) is None and not job.beyond(pause)]
            word = f"++stages.{self.stage}.pause_at={pause}"
            if due:
                launch([[*job.words, word] for job in due])
            stop_if_told([job for job in due if job.tau(pause) is None])
            going = self._decided(going, number, pause)
            if not going:
                print("no job has come to this rung, so none goes on", flush=True)
                return
        values = launch([list(job.words) for job in going])
        stop_if_told(going)
        self._conclude(going, values)

    def _decided(self, going: list[Job], number: int, pause: int) -> list[Job]:
        """Who goes on from this rung, in the order of the grid: those that decoded best, of equals
        the earlier; told as a table, best first. Jobs that were beyond it have no number to compare
        and take nobody's place."""
        taus = [(tau, job) for job in going if (tau := job.tau(pause)) is not None]
        taus.sort(key=lambda pair: -pair[0])
        beyond = [job for job in going if job.beyond(pause)]
        places = self.counts[number]
        print(f"\nrung {number} ({pause:,} tokens): tau, best first", flush=True)
        for place, (tau, job) in enumerate(taus):
            print(f"  {tau:.3f}  {'goes on' if place < places else 'ends here':<9}  {job.name}")
        if places < len(taus) and taus[places - 1][0] == taus[places][0]:
            print("  of those with equal tau, the earlier in the grid go on")
        for job in beyond:
            print(f"      -  goes on    {job.name}: was trained beyond this rung before")
        for job in going:
            if job.tau(pause) is None and job not in beyond:
                print(f"      -  failed     {job.name}: {_reason(job, pause)}")
        chosen = [job for _, job in taus[:places]] + beyond
        return [job for job in going if job in chosen]

    def _conclude(self, going: list[Job], values: Sequence[float | None]) -> None:
        """Prints the best of the jobs that have ended, and what the others did not cost."""
        known = [(v, job) for v, job in zip(values, going, strict=True) if v is not None]
        if known:
            value, best = max(known, key=lambda pair: pair[0])
            print(f"\nbest: {best.name} ({value:.3f})", flush=True)
        else:
            print("\nno job that went on has come to its end; the same command goes on", flush=True)
        begun = [job for job in self.jobs if job.trained]
        done = sum(job.trained * job.schedule["batch_tokens"] for job in begun)
        whole = len(self.jobs) * self.full
        rates = [j.seconds / (j.trained * j.schedule["batch_tokens"]) for j in begun]
        spent, all_of_it = sum(j.seconds for j in begun), sum(rates) * whole / max(1, len(begun))
        print(
            f"stages.{self.stage} was trained on {done:,} tokens in all its jobs; the whole grid "
            f"would have been {whole:,}. It took {spent:,.0f} seconds, and at the same rates the "
            f"whole grid would have taken about {all_of_it:,.0f}",
            flush=True,
        )


def refuse_unequal(jobs: list[Job]) -> None:
    """Raises ValueError for jobs that tau at equal tokens does not compare."""
    if len(jobs) < 2:
        raise ValueError("a sweep of one job cannot be halved: give a key several values")
    first = jobs[0]
    for job in jobs:
        if (job.training.name, job.schedule["tokens"]) != (
            first.training.name,
            first.schedule["tokens"],
        ):
            raise ValueError(
                f"the jobs train {first.training.name} on {first.schedule['tokens']:,} tokens "
                f"({first.name}) and {job.training.name} on {job.schedule['tokens']:,} "
                f"({job.name}), and halving compares them at equal tokens of one stage: sweep that "
                "with hydra/sweeper=basic"
            )
    seen: dict[Path, Job] = {}
    for job in jobs:
        other = seen.setdefault(job.training.folder, job)
        if other is not job:
            raise ValueError(
                f"{other.name} and {job.name} train the same drafter, so that tau cannot choose "
                "between them: sweep that with hydra/sweeper=basic, on the drafter that is best"
            )


def stop_if_told(jobs: list[Job]) -> None:
    """Ends the sweep where one of these jobs, which have not come to their end, was told to."""
    for job in jobs:
        code = job.fault().get("code")
        if code in STOPPED:
            print("the sweep was stopped; the same command goes on where it was", flush=True)
            raise SystemExit(code)


def _reason(job: Job, pause: int) -> str:
    """Why it has no tau at this rung, in its first sentence."""
    if job.step(pause) * job.schedule["batch_tokens"] in rungs(job.training.folder):
        return "its validation had no prompt to decode"
    said = job.fault().get("error", "it ended before its training; its lines above say why")
    return " ".join(str(said).split()).split(". ")[0]


def _log(x: float, base: int) -> int:
    """The whole part of log_base(x), at least 0, of an x that may be a power of it."""
    return max(0, math.floor(math.log(x, base) + 1e-9))

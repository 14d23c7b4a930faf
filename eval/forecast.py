"""What a drafter will give before it is trained, from the runs of all sweeps on its target.

    python -m eval.forecast OUTPUT_DIR STAGE...     predicted beside measured, of benches left out

tau comes from the joint law (eval/joint.py). The speedup is that of a round's milliseconds, s =
tau (v(1) + o) / (n token + v(n + 1) + o) (decoding.md, a.1), in the part of an answer's time that
drafting can shorten: 1 / (f + e + (1 - f) / s). f is the share of plain decoding's time that is no
round (prefill above all), as benches measured it; e what drafting adds to it (the drafter's own
prefill), by the speedups that they measured.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from scipy.stats import t as student

from eval.ancestry import benched
from eval.bootstrap import CONFIDENCE
from eval.cost import between
from eval.joint import SPARE, Asked, Interval, Known, Law, expected_tau, fit
from eval.known import LAWS, alike, known_of, read, settings
from eval.swept import Run


@dataclass(frozen=True)
class Speed:
    """What rounds cost on one machine. plain: milliseconds of a round of plain decoding; verify:
    of one over m tokens, by m; fixed, added: the shares f and e; scatter: standard deviation of the
    log of measured speedups about these, by `freedom` degrees."""

    runs: list[Known]
    plain: float
    verify: dict[int, float]
    fixed: float
    added: float
    scatter: float
    freedom: int

    def token(self, asked: Asked) -> float | None:
        """Milliseconds of a drafted token: of an lm by its depth, and by its size where the runs
        vary in it; of heads as measured for the family. None where neither was measured."""
        mine = [run for run in self.runs if run.of.family == asked.family]
        depths = {run.of.depth for run in mine}
        if not mine or (len(depths) == 1 and asked.depth not in depths):
            return None
        columns, new = [np.ones(len(mine))], [1.0]
        for name in ("depth", "parameters"):
            values = [float(getattr(run.of, name) or 0) for run in mine]
            if len(set(values)) > 1 and len(mine) > len(columns) + 1:
                columns.append(np.array(values))
                new.append(float(getattr(asked, name)))
        found = np.linalg.lstsq(np.stack(columns, 1), np.array([run.token for run in mine]))[0]
        return max(float(found @ new), 0.0)

    def decoding(self, tau: float, length: int, token: float) -> float:
        """The speedup of rounds, with chains of that length."""
        return tau * self.plain / (length * token + between(self.verify, length + 1))

    def whole(self, decoding: Any) -> Any:
        """Of the whole answer (Amdahl's law)."""
        return 1 / (self.fixed + self.added + (1 - self.fixed) / decoding)

    def at(self, alpha: Interval, length: int, token: float) -> Interval:
        """The speedup at this acceptance: what is not known of it, and of the costs."""
        value, low, high = alpha.through(
            lambda a: self.whole(self.decoding(expected_tau(a, length), length, token))
        )
        t = float(student.ppf((1 + CONFIDENCE) / 2, self.freedom))
        off = t * self.scatter * math.sqrt(1 + 1 / (self.freedom + 1))
        down, up = (math.hypot(math.log(value / end), off) for end in (low, high))
        return Interval(value, value * math.exp(-down), value * math.exp(up))


def speed_of(runs: Sequence[Known], machine: str) -> Speed | None:
    """From the runs that were measured on this machine, without other work; None where they are
    too few."""
    quiet = [run for run in runs if run.machine == machine and run.quiet]
    mine = [r for r in quiet if r.speedup and r.token and r.verify and r.fixed is not None]
    if len(mine) <= SPARE:
        return None
    sizes = sorted(set.intersection(*(set(run.verify) for run in mine)))
    verify = {m: median(run.verify[m] + run.overhead for run in mine) for m in sizes}
    pairs = [(r.speedup.value, r.decoding, r.fixed) for r in mine if r.speedup]
    whole_R, decoding_R, fixed_R = np.array(pairs, dtype=float).T
    rounds_R = (1 - fixed_R) / decoding_R
    # medians: a run that something disturbed must not decide them
    fixed = float(np.median(fixed_R))
    added = max(float(np.median(1 / whole_R - fixed_R - rounds_R)), -fixed)
    off_R = np.log(whole_R * (fixed_R + added + rounds_R))
    freedom = len(mine) - 1
    scatter = math.sqrt(float((off_R**2).sum()) / freedom)
    return Speed(mine, verify[1], verify, fixed, added, scatter, freedom)


@dataclass(frozen=True)
class Forecast:
    """What is said of a drafter: tau with chains of `length`, the speedup (None: `silent` says
    why), the axes that were left, and what of: runs and sweeps."""

    tau: Interval
    length: int
    speedup: Interval | None
    silent: str
    beyond: list[str]
    runs: int
    sweeps: int

    def __str__(self) -> str:
        """The sentence for a terminal."""
        tau = f"tau {shown(self.tau)} at T=0 with drafts of {self.length}"
        speed = f"about {shown(self.speedup, 'x')}" if self.speedup else self.silent
        beyond = f" ({'; '.join(self.beyond)}: extrapolated)" if self.beyond else ""
        plural = "s" if self.sweeps > 1 else ""
        of = f"{self.runs} runs of {self.sweeps} sweep{plural}"
        return f"predicted from {of}: {tau}, {speed}{beyond}"


def shown(found: Interval, unit: str = "") -> str:
    """`2.10 [1.80, 2.40]`."""
    return f"{found.value:.2f}{unit} [{found.low:.2f}, {found.high:.2f}]"


@dataclass(frozen=True)
class Forecaster:
    """The law of a target's runs, what rounds cost on this machine (None: not measured here) and
    where they were measured instead; setting: of the training that is asked about, if known."""

    law: Law
    speed: Speed | None
    elsewhere: list[str]
    setting: tuple[str, str] = ("", "")

    @classmethod
    def of(
        cls, runs: Sequence[Known], machine: str, setting: tuple[str, str] = ("", "")
    ) -> Forecaster | None:
        """From runs on one target; of those on different prompts, or trained differently, one part
        (eval/known.py: alike). None where they are too few."""
        mine = alike(runs, setting)
        law = fit(mine)
        places = sorted({run.machine for run in mine} - {machine})
        return Forecaster(law, speed_of(mine, machine), places, setting) if law else None

    def ask(self, asked: Asked, lengths: Sequence[int] = ()) -> Forecast:
        """With the one of these draft lengths that is fastest (without costs, that is nearest to
        what was measured). ValueError where the runs say nothing of such a drafter."""
        alpha = self.law.alpha(asked)
        length = min(lengths, key=lambda n: abs(n - self.law.length), default=self.law.length)
        speedup, silent = None, self._silent()
        token = self.speed.token(asked) if self.speed else None
        if self.speed and token is not None:
            told = {n: self.speed.at(alpha, n, token) for n in lengths or [length]}
            length = max(told, key=lambda n: told[n].value)
            speedup = told[length]
        tau = alpha.through(lambda a: expected_tau(a, length))
        beyond = self.beyond(asked)
        sweeps = len({run.sweep for run in self.law.runs})
        return Forecast(tau, length, speedup, silent, beyond, len(self.law.runs), sweeps)

    def beyond(self, asked: Asked) -> list[str]:
        """In what it leaves the runs, in words: axes, and what the law has no term for."""
        mine = [run.setting for run in self.law.runs if run.of.kind == asked.kind]
        parts = zip(self.setting, zip(*mine, strict=True), strict=False)
        other = [bool(part and all(known) and part not in known) for part, known in parts]
        what = ("loss, learning rate, batch and data", "pretraining and drafter's own values")
        said = [f"no run has its {w}" for w, o in zip(what, other, strict=False) if o]
        return self.law.beyond(asked) + said

    def _silent(self) -> str:
        if self.speed or not self.elsewhere:
            return "the speedup not known: too few runs like it have costs of rounds"
        return f"the speedup not known here: measured on {' and '.join(self.elsewhere)}"


def compared(root: Path, stages: Sequence[Path]) -> list[str]:
    """Two lines for each bench stage: what other runs on its target and prompts predict,
    and what it measured. ValueError for a folder that is no bench stage, or without reports of
    sweeps, and where nothing can be predicted."""
    if not any(root.glob(LAWS)):
        raise ValueError(
            f"{root} has no {LAWS}: give the OUTPUT_DIR of sweeps whose reports "
            "`python -m eval.sweep FOLDER` has written"
        )
    left = {stage.resolve().name: measurement(stage.resolve()) for stage in stages}
    lines = []
    for name, (target, known) in left.items():
        rest = [run for run in read(root, target) if run.bench not in left]
        rest = [run for run in rest if run.prompts == known.prompts]
        forecaster = Forecaster.of(rest, known.machine, known.setting)
        try:
            if forecaster is None:
                raise ValueError(f"{len(rest)} other runs on its prompts are too few for a law")
            found = forecaster.ask(known.of, [known.length])
            lines += [f"{name}: {found}", f"  measured: {measured(known, found)}"]
        except ValueError as error:
            lines += [f"{name}: no prediction: {error}"]
    if len(lines) == len(left):
        raise ValueError("\n".join(lines))
    return lines


def measured(known: Known, found: Forecast) -> str:
    """What was measured, and whether the intervals said so."""
    told = f"tau {shown(known.at(found.length))}, {_within(known.at(found.length), found.tau)}"
    if known.speedup is None or found.speedup is None:
        return told
    return f"{told}; {shown(known.speedup, 'x')}, {_within(known.speedup, found.speedup)}"


def _within(known: Interval, found: Interval) -> str:
    inside = found.low <= known.value <= found.high
    return f"{known.value / found.value - 1:+.0%}, {'in' if inside else 'OUTSIDE'} the interval"


def measurement(stage: Path) -> tuple[str, Known]:
    """The target's hash, and the run, of a bench stage; ValueError for what is none, or did not
    measure a trained drafter's chains."""
    if not (stage / "artifact" / "report.json").is_file():
        raise ValueError(f"{stage} is no folder of a bench stage: it has no artifact/report.json")
    try:
        run = Run(stage.name, {}, code=0, **benched(stage, stage.parent))
        known = known_of(run.told() | {"setting": settings(run.held)}, "")
    except KeyError as error:
        raise ValueError(f"{stage} was measured by an earlier version: no {error}") from None
    if known is None or run.target is None:
        raise ValueError(
            f"{stage} measured no chains of a drafter trained here, at T=0 and batch 1"
        )
    return run.target, known


def main(arguments: list[str]) -> int:
    """Prints predictions beside measurements; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m eval.forecast",
        description="Predicts drafters from the sweeps' other runs on their target, and prints "
        "what was measured beside it.",
        epilog="Exit codes: 0 compared, 2 refused (no bench, no report, nothing to predict from).",
    )
    parser.add_argument("root", type=Path, metavar="OUTPUT_DIR", help="the folder with sweeps/")
    said = "the folder of a bench stage; it is left out of the law"
    parser.add_argument("stages", type=Path, metavar="STAGE", nargs="+", help=said)
    given = parser.parse_args(arguments)
    try:
        print(*compared(given.root, given.stages), sep="\n")
        return 0
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

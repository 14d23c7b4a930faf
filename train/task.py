"""One composed recipe, run: all of a plain command, or one job of a sweep, which may be in another
process or on another machine than the command."""

import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hydra.conf import HydraConf
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from data.secrets import guard, redacted, refuse
from train.compose import bind, build, check_name, resolvers, unknown
from train.mistakes import explain
from train.sweep import BAD_INPUT, OWN, PAUSED, STOPPED, Job, Sweep, numbers, short_hash
from train.track import outcome

BUG = 1
TOLD = ("tracker", "sweep")  # settings of which the tracker's own run is made
SWITCHES = ("plan", "view", "advise")  # they train nothing, and leave no note


def task(config: DictConfig) -> float | None:
    """Runs the recipe, or does what its switches ask; returns what a sweep's job has measured of
    the number that sweepers maximise.

    Raises SystemExit with an exit code other than 0. A job of a sweep leaves its code in its note
    instead, so that the others go on, and raises it only where it was told to stop."""
    if not OmegaConf.has_resolver("env"):  # a launcher's own process
        guard()
        resolvers()
    here = HydraConfig.get()
    if here.mode is not None and here.mode.name == "MULTIRUN":
        if not any(config.get(switch) for switch in SWITCHES):
            return _job(config, here)
        words = [word for word in here.overrides.task if not word.startswith("recipe=")]
        print(f"\n=== run {here.job.num} of the sweep: {' '.join(words)}", flush=True)
    try:
        name, settings = settled(config, here)
    except ValueError as error:
        print(f"error: {redacted(str(error))}", file=sys.stderr)
        _stop(BAD_INPUT, here)
        return None
    leads = not int(os.environ.get("RANK", 0))
    trains = leads and not any(settings[switch] for switch in SWITCHES)
    if trains:
        os.environ["DRAFTSMITH_RUN"] = name
    code, stages = _runner(settings)(name, settings)
    if code:
        _stop(code, here)
        return None
    if trains:
        root = Path(str(settings["output_dir"] or "outputs")).resolve()
        run = f"{name}-{short_hash([Path(place).name for place in stages.values()], 12)}"
        _tell(settings, root, run, {"stages": stages, "code": code})
    return None


def _stop(code: int, here: HydraConf) -> None:
    """Ends the command; but one run of a sweep that is only shown leaves the others theirs, and
    what is wrong with it was told before them (train/__main__.py)."""
    several = here.mode is not None and here.mode.name == "MULTIRUN"
    if not several or code != BAD_INPUT:
        sys.exit(code)


def settled(config: DictConfig, here: HydraConf) -> tuple[str, dict[str, Any]]:
    """The recipe's name and its resolved settings. Raises ValueError with what is wrong."""
    settings = resolved(config)
    return check_name("recipe", here.runtime.choices["recipe"]), settings


def resolved(config: DictConfig) -> dict[str, Any]:
    """Settings without references. Raises ValueError with what is wrong."""
    try:
        plain = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        raise ValueError(explain(error, [])) from None
    assert isinstance(plain, dict)
    settings = {str(key): value for key, value in plain.items()}
    for switch in SWITCHES:
        if not isinstance(settings[switch], bool):
            raise ValueError(f"{switch} is {settings[switch]!r}; it must be true or false")
    _check_budget(settings["budget"] or {}, settings["advise"])
    refuse(settings, "")
    return settings


def _check_budget(budget: Any, advise: bool) -> None:
    """Raises ValueError for a budget that pays nothing, before anything is timed."""
    names = ("tokens", "minutes")
    if not isinstance(budget, dict):
        raise ValueError(f"budget is {budget!r}; expected a mapping: set budget.tokens=NUMBER")
    for name in budget:
        if name not in names:
            raise ValueError(unknown(f"budget.{name}", name, list(names)))
    if advise:
        from train.budget import Budget

        Budget(**budget)
    elif any(value is not None for value in budget.values()):
        raise ValueError(
            "budget is for what advise=true proposes and changes no training: add advise=true, or "
            "set the schedule.tokens of a stage"
        )


def _runner(
    settings: dict[str, Any],
) -> Callable[[str, dict[str, Any]], tuple[int, dict[str, str]]]:
    """What the switches ask for: a recipe's name and settings -> exit code and stages' folders."""
    if settings["advise"]:
        from train.advise import run_advice

        return run_advice
    from train.run import run_recipe

    return run_recipe


def _job(config: DictConfig, here: HydraConf) -> float | None:
    """Runs one job of a sweep and notes what became of it; the value that is maximised, None
    without one (which a sweeper takes for a failed trial)."""
    if int(os.environ.get("RANK", 0)):  # of a launcher's several commands the first leaves notes
        name, settings = settled(config, here)
        _runner(settings)(name, settings)
        return None
    sweep = Sweep.of_job(Path(here.sweep.dir), str(here.job.env_set[OWN]))
    job = Job(sweep, list(here.overrides.task), here.job.num)
    print(f"\n=== run {job.number} of the sweep: {job.name}", flush=True)
    os.environ.update(job.environment())
    code = BUG
    try:
        name, settings = settled(config, here)
        from train.run import run_recipe

        code, _ = run_recipe(name, settings, job)
    except ValueError as error:
        print(f"error: {redacted(str(error))}", file=sys.stderr)
        code = BAD_INPUT
        job.failed(error)
    except Exception as error:  # a bug in one job is no reason to lose the others
        print(redacted(traceback.format_exc()), file=sys.stderr)
        job.failed(f"{type(error).__name__}: {error}")
    value = job.end(code)
    if code in STOPPED:
        sys.exit(code)
    try:
        told = {key: OmegaConf.to_container(config[key], resolve=True) for key in TOLD}
        run = f"{sweep.folder.name}-{job.file.stem}"
        _tell(told, sweep.folder, run, job.note | {"code": code})
    except OmegaConfBaseException:  # which is why the job has failed
        return value
    return value


def _tell(config: dict[str, Any], folder: Path, run: str, note: dict[str, Any]) -> None:
    """Gives a remote tracker what a recipe or job has come to: what its stages have measured, and
    of a job of a sweep what it differs in, where it paused and why it failed. It ends nothing."""
    try:
        bind(config["tracker"], "tracker")
        values = numbers(note["stages"], config["sweep"]["maximises"])
    except (ValueError, OSError) as error:  # settings that its stages have refused, a broken file
        print(f"warning: no tracker was told: {redacted(str(error))}", file=sys.stderr)
        return
    if note["code"]:  # an earlier stage's is not what the table ranks by
        values.pop(config["sweep"]["maximises"], None)
    for tokens, tau in note.get("rungs", [])[-1:]:
        values |= {"rung/tokens": tokens} | ({} if tau is None else {"rung/tau": tau})
    told = {key: note.get(key) for key in ("overrides", "error")}
    told["stages"] = {name: Path(place).name for name, place in note["stages"].items()}
    failed = 0 if note["code"] == PAUSED else note["code"]
    outcome(build(config["tracker"]), folder, run, told, values, failed)

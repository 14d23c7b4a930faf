"""The axes of a sweep, of its preset and of the user; and how all its jobs begin and end."""

import itertools
import os
import re
import shlex
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from data.secrets import redacted
from train.compose import CONF, bind, build, check_name
from train.mistakes import explain, several
from train.plugins import TOGETHER, added, chosen
from train.sweep import OWN, Sweep, folder_of, told

DISTILL = "train.distill.Distill"
NEEDED = ("finetune", "bench")  # stages that the presets change or measure
FEW = 100  # jobs that are planned before any starts: a third of a second each
ALWAYS = ("sweep", "output_dir", "plan", "view", "advise")  # the same for all jobs

Axes = dict[str, list[str]]
"""Key -> its values as they are written in a command; none where only Hydra knows them."""


def no_sweep(override: Override, multirun: bool) -> str | None:
    """What is wrong with a word that sweeps; None if nothing is."""
    key, line = str(override.key_or_group), str(override.input_line)
    if not override.is_sweep_override():
        if key == "sweep" and not multirun and not override.is_delete():
            return f"{line} starts several runs: add -m (python -m train -m recipe=NAME {line})"
        return None
    if not multirun:
        return several(override)
    if key in ALWAYS:
        return f"{line} gives several values, and {key} is one for all runs: choose one"
    if "${" in line:
        return f"{line} refers to another setting; write the values of a sweep themselves"
    return None


def first(override: Override) -> str:
    """The word, with the first of several values."""
    values = _values(override)
    return f"{override.get_key_element()}={values[0]}" if values else str(override.input_line)


def base_word(override: Override) -> str | None:
    """The word where it is the same for all jobs; of several recipes the first."""
    if not override.is_sweep_override():
        return str(override.input_line)
    return first(override) if override.key_or_group == "recipe" and _values(override) else None


def _values(override: Override) -> list[str]:
    """Of a swept word; of an interval its start."""
    if not override.is_sweep_override() or "glob(" in str(override.input_line):
        return []
    if override.is_discrete_sweep():
        return list(override.sweep_string_iterator())
    value = override.value()
    assert isinstance(value, IntervalSweep)
    return [str(value.start)]


def axes_of(overrides: list[Override], composed: DictConfig) -> Axes:
    """The preset's axes, and the user's, which replace those of the same key. composed: what all
    jobs have in common, with Hydra's settings. Raises ValueError for a preset that this recipe
    cannot use, for a single value of its axis, and where nothing is swept."""
    if composed.sweep.name:
        _require_stages(composed)
    for override in overrides:
        if _bare(override) in (composed.hydra.sweeper.get("params") or {}):
            _require_value(override)
    axes = own = _presets(composed)
    for override in overrides:
        if override.is_sweep_override():
            _require_sampler(override, overrides)
            axes = {k: v for k, v in axes.items() if k != _bare(override)}
            axes[override.get_key_element()] = _values(override)
        elif _bare(override) in own and not _starts_from(override, composed):
            raise ValueError(
                f"{override.input_line} replaces the axis of sweep={composed.sweep.name}: give "
                "several values"
            )
    if not axes:
        raise ValueError("nothing is swept: give a key several values, or leave out -m")
    return axes


def _require_value(override: Override) -> None:
    """An axis starts from a value; `key=` and `key=[]` are none."""
    if not (override.is_sweep_override() or override.is_delete()) and override.value() in ("", []):
        raise ValueError(f"{override.input_line} has no value: give one, or several")


def _presets(composed: DictConfig) -> Axes:
    """The axes of the preset alone."""
    try:
        given = composed.hydra.sweeper.get("params") or {}
        params = {key: given[key] for key in given}  # which computes them
    except OmegaConfBaseException as error:
        raise ValueError(explain(error, [])) from None
    parsed = OverridesParser.create().parse_overrides([f"{k}={v}" for k, v in params.items()])
    return {o.get_key_element(): _values(o) for o in parsed if o.is_sweep_override()}


def _starts_from(override: Override, composed: DictConfig) -> bool:
    """Whether the preset computes this axis from the recipe's own value, which the word gives."""
    key = _bare(override)
    params: Any = OmegaConf.to_container(composed.hydra.sweeper.params, resolve=False)
    own = (f"${{{key}}}", f"${{hydra.runtime.choices.{key}}}")
    return not override.is_delete() and any(name in str(params[key]) for name in own)


def _require_sampler(override: Override, overrides: list[Override]) -> None:
    sweeper = chosen(overrides).get("hydra/sweeper", "basic")
    if override.is_interval_sweep() and sweeper != "optuna":
        raise ValueError(
            f"{override.input_line} is an interval, and hydra/sweeper={sweeper} takes values: add "
            "hydra/sweeper=optuna, which samples it, or write the values"
        )


def _bare(override: Override) -> str:
    return override.get_key_element().lstrip("+~")


def _fixed(overrides: list[Override], axes: Axes) -> list[str]:
    """The words that are the same for all jobs; not the value that an axis starts from."""
    alike = [o for o in overrides if not o.is_sweep_override() and _bare(o) not in axes]
    return [str(override.input_line) for override in alike]


def words_of(overrides: list[Override], axes: Axes) -> list[str]:
    """The user's words, with an axis in the place of the value that it starts from."""
    found = []
    for override in overrides:
        starts = not override.is_sweep_override() and _bare(override) in axes
        axis = f"{_bare(override)}={','.join(axes[_bare(override)])}" if starts else None
        found.append(axis or str(override.input_line))
    return found


def _runs(overrides: list[Override], axes: Axes) -> list[dict[str, str]] | None:
    """The swept words of each job; None where only the sweeper knows them."""
    if chosen(overrides).get("hydra/sweeper") == "optuna" or not all(axes.values()):
        return None
    return [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]


def starts_nothing(composed: DictConfig) -> bool:
    """Whether the command only shows (plan, view, advise)."""
    return bool(composed.plan or composed.view or composed.advise)


def to_show(overrides: list[Override], axes: Axes) -> tuple[list[Override], Axes]:
    """The words and axes of a sweep that is only shown: without launcher, which would take it
    elsewhere, and sampler, which chooses as it goes: of the user's axes their first values."""
    words = [o for o in overrides if not str(o.key_or_group).startswith("hydra")]
    sweeper = chosen(overrides).get("hydra/sweeper", "basic")
    if sweeper == "optuna":
        print("optuna chooses values as it goes; shown are runs with the first values", flush=True)
        own = {override.get_key_element() for override in words if override.is_sweep_override()}
        axes = {key: values for key, values in axes.items() if key not in own}
        words = OverridesParser.create().parse_overrides([first(word) for word in words])
    elif sweeper == "halving":
        kept = re.compile(r"hydra/sweeper|hydra\.sweeper\.(eta|rungs|least)")
        words += [o for o in overrides if kept.fullmatch(str(o.key_or_group))]
    return words, axes


def _require_stages(composed: DictConfig) -> None:
    stages: Any = OmegaConf.to_container(composed.stages, resolve=False)
    whole = {name: s for name, s in stages.items() if isinstance(s, dict) and "_target_" in s}
    lacks = [f"stages.{name}" for name in NEEDED if name not in whole]
    if lacks:
        trained = [name for name, stage in whole.items() if stage["_target_"] == DISTILL]
        own = f"stages.{trained[0]}.optim.lr=1e-4,3e-4" if trained else "KEY=VALUE,VALUE"
        raise ValueError(
            f"sweep={composed.sweep.name} is for recipes with the stages {' and '.join(NEEDED)}, "
            f"and this one has no {' or '.join(lacks)}: leave it out and write the axis yourself, "
            f"python -m train -m recipe=NAME {own}"
        )


def each_part(overrides: list[Override], axes: Axes) -> Iterator[list[str]]:
    """For each part that an axis names after its first, the words of one job with it: what cannot
    be composed is a mistake, known before any job starts."""
    fixed = _fixed(overrides, axes)
    start = {key: f"{key}={values[0]}" for key, values in axes.items() if values}
    for key, values in axes.items():
        group = key.lstrip("+").partition("@")[0]
        for value in values[1:] if group == "recipe" or (CONF / group).is_dir() else []:
            yield [*fixed, *{**start, key: f"{key}={value}"}.values()]


def each_job(overrides: list[Override], axes: Axes) -> Iterator[tuple[str, list[str]]]:
    """The name and the words of every job, of the first FEW; none where a sampler chooses."""
    for run in itertools.islice(_runs(overrides, axes) or [], FEW):
        words = [f"{key}={value}" for key, value in run.items()]
        yield " ".join(words), [*_fixed(overrides, axes), *words]


@contextmanager
def begun(
    overrides: list[Override], axes: Axes, composed: DictConfig
) -> Iterator[tuple[Sweep | None, list[str]]]:
    """The sweep, with its folder, and the words that Hydra needs besides the user's. No sweep where
    nothing is trained (plan, view, advise), or in the other processes of a launcher: Hydra then
    writes to a folder that goes with this block. Raises ValueError for a name that is none."""
    if int(os.environ.get("RANK", 0)) or starts_nothing(composed):
        with tempfile.TemporaryDirectory() as away:
            yield None, [_place(Path(away)), *added(overrides)]
        return
    sweep = _named(overrides, axes, composed).begin(_runs(overrides, axes))
    shown = " ".join(f"{key}={','.join(values)}" for key, values in axes.items())
    print(f"sweep {sweep.folder.name}: {shown}", flush=True)
    print(f"maximises {sweep.maximises}; what its jobs do is noted in {sweep.folder}", flush=True)
    together = chosen(overrides).get("hydra/launcher") in TOGETHER
    if together and not sweep.maximises.startswith(("tau", "validation")):
        print(
            "warning: jobs at the same time share this machine, so speeds that they measure are "
            "no figures; sweep.maximises=tau_T0 does not depend on it; hydra/launcher=basic "
            "takes turns",
            file=sys.stderr,
        )
    own = f"+hydra.job.env_set.{OWN}={_quoted(sweep.own())}"
    yield sweep, [_place(sweep.folder), own, *added(overrides)]


def _named(overrides: list[Override], axes: Axes, composed: DictConfig) -> Sweep:
    recipes = [o for o in overrides if o.key_or_group == "recipe"]
    several = any(o.is_sweep_override() for o in recipes)
    recipe = "recipes" if several or not recipes else str(recipes[-1].value())
    preset, maximises = composed.sweep.name, str(composed.sweep.maximises)
    if preset is not None:
        check_name("sweep.name", preset)
    try:
        root = Path(str(composed.output_dir or "outputs")).resolve()
    except OmegaConfBaseException as error:
        raise ValueError(explain(error, [])) from None
    others = [key for key in axes if key not in _presets(composed)]
    fixed = _fixed(overrides, axes)
    folder = folder_of(root, check_name("recipe", recipe), preset, others, fixed)
    command = shlex.join(["python", "-m", "train", *sys.argv[1:]])
    return Sweep(folder, recipe, preset, maximises, tuple(axes), redacted(command))


def _place(folder: Path) -> str:
    """The word that tells Hydra the folder of the sweep."""
    return f"hydra.sweep.dir={_quoted(str(folder))}"


def _quoted(value: str) -> str:
    escaped = value.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'


def show_whole(composed: DictConfig, sweeper: str) -> None:
    """Prints what the runs of a sweep that were planned take together."""
    from train.show import whole

    plain: Any = OmegaConf.to_container(composed.launch, resolve=True)
    bind(plain, "launch")
    root = Path(str(composed.output_dir or "outputs")).resolve()
    print(*whole(build(plain), root, sweeper), sep="\n")


def swept(sweep: Sweep | None, run: Callable[[], None]) -> int:
    """Runs all jobs and prints their table; returns the exit code: of the first job that failed,
    or of whoever stopped the sweep. Whatever happens, what the jobs noted stays and is told."""
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra's own ending would lose the table
    before = signal.signal(signal.SIGTERM, _stopped)
    try:
        code = _run(sweep, run)
    finally:
        signal.signal(signal.SIGTERM, before)
    if sweep:
        print(*told(sweep), sep="\n", flush=True)
    return code or (sweep.code() if sweep else 0)


def _run(sweep: Sweep | None, run: Callable[[], None]) -> int:
    try:
        run()
    except KeyboardInterrupt:
        return 130
    except SystemExit as left:
        return left.code if isinstance(left.code, int) else 1
    except (HydraException, OmegaConfBaseException) as error:
        print(f"error: {redacted(explain(error, []))}", file=sys.stderr)
        return 2
    except Exception as error:
        if (
            sweep and sweep.code()
        ):  # the sweeper's answer to jobs that failed, each of which is told
            print(f"the sweeper has ended: {redacted(str(error))}", file=sys.stderr)
            return sweep.code()
        print(redacted(traceback.format_exc()), file=sys.stderr)
        return 1
    return 0


def _stopped(number: int, _: object) -> None:
    """A signal between two jobs, or while jobs of other processes run."""
    raise SystemExit(128 + number)

"""The command: `python -m train recipe=NAME`. Composes, checks, plans, runs."""

import codecs
import locale
import os
import re
import sys
from typing import NoReturn

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from data.secrets import guard, redacted, refuse_word
from train import halving
from train.compose import CONF, RECIPES, refuse_commands, resolvers
from train.grid import (
    FEW,
    Axes,
    axes_of,
    base_word,
    begun,
    each_job,
    each_part,
    first,
    no_sweep,
    show_whole,
    starts_nothing,
    swept,
    to_show,
    words_of,
)
from train.mistakes import explain, no_choice, options, quoted, unreadable
from train.plugins import chosen, refusal
from train.sweep import BAD_INPUT
from train.task import resolved, task

# Hydra's others read configurations from elsewhere, or a pickle
SWITCHES = ("-m", "--multirun", "-c", "--cfg", "-p", "--package", "-i", "--info", "--resolve")
SHOWS = ("-c", "--cfg", "-i", "--info")  # they run nothing
TAKES = (*SHOWS, "-p", "--package")  # with a word behind them that is no override
HELP = """\
draftsmith makes draft models for speculative decoding, and measures what they save.

  python -m train recipe=NAME [key=value ...]     run a recipe; run again to go on where it stopped
  python -m train recipe=NAME plan=true           show stages, sizes and costs; start nothing
  python -m train recipe=NAME view=true           show examples with the supervised tokens in colour
  python -m train recipe=NAME advise=true         time drafters: which would pay; train nothing
  python -m train -m recipe=NAME sweep=lr         try several values and compare
  python -m train -m recipe=NAME stages.finetune.optim.lr=1e-4,3e-4     the same with your own
  python -m train recipe=NAME --cfg job           print the whole configuration

Recipes:
{recipes}

Parts to choose with group=name or group@stages.STAGE.KEY=name:
{groups}
"""


def main() -> None:
    """Entry point; exit codes: 0 done, 2 bad input, 3 a check failed, 4 environment."""
    sys.argv[1:] = [quoted(word) for word in _without_local_rank(sys.argv[1:])]
    resolvers()
    store = ConfigStore.instance()
    try:
        for path in (*sorted(RECIPES.glob("*.yaml")), *sorted(CONF.glob("*/*.yaml"))):
            refuse_commands(path)
        for word in sys.argv[1:]:
            refuse_word(word)
    except ValueError as error:
        _stop(str(error))
    for path in sorted(RECIPES.glob("*.yaml")):
        store.store(path.stem, OmegaConf.load(path), group="recipe", package="_global_")
    if not sys.argv[1:] or {"-h", "--help"} & set(sys.argv[1:]):
        print(help_text())
        return
    overrides = _check(sys.argv[1:])
    words, switches = _parted(sys.argv[1:])
    if {"-m", "--multirun"} & set(switches):
        sys.exit(_sweep(overrides))
    sys.argv[1:] = [*words, *switches]  # argparse wants all words in one place
    _hydra()


def _hydra() -> None:
    hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")(task)()


def _sweep(overrides: list[Override]) -> int:
    """Runs every job of a sweep, whatever becomes of the others; returns the exit code."""
    base = [word for word in (base_word(override) for override in overrides) if word]
    composed = _composed(base, hydras=True)
    try:
        axes = axes_of(overrides, composed)
        for words in each_part(overrides, axes):
            _composed(words)
        sweeper = chosen(overrides).get("hydra/sweeper", "basic")
        wrong = [] if int(os.environ.get("RANK", 0)) else _wrong(overrides, axes, composed, sweeper)
        if starts_nothing(composed):
            overrides, axes = to_show(overrides, axes)
        with begun(overrides, axes, composed) as (sweep, words):
            sys.argv[1:] = ["--multirun", *words_of(overrides, axes), *words]
            code = swept(sweep, _hydra)
        if composed.plan:
            show_whole(composed, sweeper)
        return code or (BAD_INPUT if wrong else 0)
    except ValueError as error:
        _stop(str(error))


def _wrong(overrides: list[Override], axes: Axes, composed: DictConfig, sweeper: str) -> list[str]:
    """The jobs that cannot run, told before any does. Raises ValueError where none can, or where
    halving cannot compare them."""
    from train.run import planned

    if composed.plan:  # from what is at hand
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
    wrong: dict[str, str] = {}
    jobs = list(each_job(overrides, axes))
    whole = []
    for name, words in jobs:
        try:
            stages = planned(resolved(_composed(words)))[1]
            whole.append(halving.Job(tuple(words), name, tuple(stages)))
        except ValueError as error:
            wrong[name] = str(error)
        except OSError:  # the job, which may run elsewhere, will see
            continue
    if wrong and (len(wrong) == len(jobs) or sweeper == "halving"):
        name, said = next(iter(wrong.items()))
        which = "no job of this sweep can run" if len(wrong) == len(jobs) else "a job cannot run"
        raise ValueError(f"{which}; {name}: {said}")
    if sweeper == "halving" and len(whole) == len(jobs) < FEW:
        settings = {key: composed.hydra.sweeper[key] for key in ("eta", "rungs", "least")}
        halving.Halving(whole, **settings)
    for name, said in wrong.items():
        print(f"warning: {name} cannot run, the other jobs will: {redacted(said)}", file=sys.stderr)
    return list(wrong)


def _without_local_rank(words: list[str]) -> list[str]:
    """What launchers add, in one word or two, is no setting."""
    pairs = zip(["", *words], words, strict=False)
    return [
        word
        for before, word in pairs
        if not re.match(r"--?local[_-]rank", word)
        and not (re.fullmatch(r"--?local[_-]rank", before) and word.isdecimal())
    ]


def _in_utf8() -> None:
    """Starts again in UTF-8 where the locale says otherwise: words, files and output have letters
    of all languages, whatever the terminal was set to. Once: children inherit the setting."""
    asked, encoding = os.environ.get("PYTHONUTF8") == "1", locale.getencoding()
    if not (sys.flags.utf8_mode or asked or codecs.lookup(encoding).name == "utf-8"):
        os.environ["PYTHONUTF8"] = "1"
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def help_text() -> str:
    """Recipes with the line that each says of itself, and the parts to choose from."""
    files = sorted(RECIPES.glob("*.yaml"))
    lines = [f"  {f.stem:<14} {f.read_text(encoding='utf-8').splitlines()[0][2:]}" for f in files]
    groups = []
    for folder in sorted(p for p in CONF.iterdir() if p.is_dir()):
        names = ", ".join(f.stem for f in sorted(folder.glob("*.yaml")))
        groups.append(f"  {folder.name:<14} {names}")
    return HELP.format(recipes="\n".join(lines), groups="\n".join(groups))


def _parted(arguments: list[str]) -> tuple[list[str], list[str]]:
    """The words, and the switches with what they take."""
    words, switches = list[str](), list[str]()
    for before, each in zip(["", *arguments], arguments, strict=False):
        taken = before in TAKES and "=" not in each
        (switches if each.startswith("-") or taken else words).append(each)
    return words, switches


def _check(arguments: list[str]) -> list[Override]:
    """The overrides among the arguments, after a first composition, so that a misspelling is one
    sentence with the valid names."""
    words, given = _parted(arguments)
    switches = [switch.partition("=")[0] for switch in given if switch.startswith("-")]
    for switch in switches:
        if switch not in SWITCHES:
            _stop(
                f"{switch} is no switch here, expected one of {', '.join(SWITCHES)}: leave it out"
            )
    multirun = bool({"-m", "--multirun"} & set(switches))
    shows = [switch for switch in switches if switch in SHOWS]
    if multirun and shows:
        _stop(f"{shows[0]} shows one configuration, and -m runs several: leave out one of the two")
    overrides = _overrides(words)
    for override in overrides:
        _check_word(override, multirun)
    if any("glob(" in str(o.input_line) for o in overrides if o.is_sweep_override()):
        return overrides  # Hydra expands it, and lists the options itself
    plain = [first(override) for override in overrides]
    if not any(word.startswith("recipe=") for word in plain):
        _stop(f"no recipe was chosen: add recipe=NAME, one of {', '.join(options('recipe'))}")
    _composed(plain)
    return overrides


def _check_word(override: Override, multirun: bool) -> None:
    """Refuses a word that reaches where it may not, or is no choice."""
    key, line = str(override.key_or_group), str(override.input_line)
    if key.startswith("hydra"):
        wrong = refusal(override, multirun)
        if wrong:
            _stop(wrong)
        return
    if str(override.package or "").startswith(("hydra", "_global_")):
        _stop(f"{line} would change settings of Hydra itself: leave it out")
    chosen = line.partition("=")[2]
    if (key == "recipe" or (CONF / key).is_dir()) and re.search(r"[/\\]|\.\.", chosen):
        _stop(f"{line} leads out of conf/{key}, expected a name of a file there")
    wrong = no_choice(override) or no_sweep(override, multirun)
    if wrong:
        _stop(wrong)


def _composed(words: list[str], hydras: bool = False) -> DictConfig:
    """The configuration of these words; with `hydras`, Hydra's own settings too."""
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        try:
            return hydra.compose("config", words, return_hydra_config=hydras)
        except (HydraException, OmegaConfBaseException) as error:
            _stop(explain(error, words))


def _overrides(words: list[str]) -> list[Override]:
    parser, found = OverridesParser.create(), list[Override]()
    for word in words:
        try:
            found += parser.parse_overrides([word])
        except HydraException:
            _stop(unreadable(word))
    return found


def _stop(sentence: str) -> NoReturn:
    print(f"error: {redacted(sentence)}", file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    _in_utf8()
    guard()
    main()

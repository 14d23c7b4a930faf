"""The command: `python -m train recipe=NAME`. Composes, checks, plans, runs."""

import codecs
import locale
import os
import re
import sys
from collections.abc import Callable
from typing import Any, NoReturn

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from data.secrets import guard, redacted, refuse, refuse_word
from train.compose import CONF, RECIPES, check_name, refuse_commands, resolvers
from train.mistakes import explain, no_choice, options, quoted, several, unreadable

SWEPT: list[tuple[int, float | None, str]] = []  # the runs of a sweep: code, speedup, overrides
# Hydra's others read configurations from elsewhere, or a pickle
SWITCHES = ("-m", "--multirun", "-c", "--cfg", "-p", "--package", "-i", "--info", "--resolve")
HYDRA = ("hydra/sweeper", "hydra/launcher", "hydra.sweeper", "hydra.launcher", "hydra.sweep")
HELP = """\
draftsmith makes draft models for speculative decoding, and measures what they save.

  python -m train recipe=NAME [key=value ...]     run a recipe; run again to go on where it stopped
  python -m train recipe=NAME plan=true           show stages, sizes and costs; start nothing
  python -m train recipe=NAME view=true           show examples with the supervised tokens in colour
  python -m train recipe=NAME advise=true         time drafters: which would pay; train nothing
  python -m train --multirun recipe=NAME stages.finetune.optim.lr=1e-4,3e-4     sweep
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
    _check(sys.argv[1:])
    hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")(_task)()
    if SWEPT:
        sys.exit(_conclude())


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


def _check(arguments: list[str]) -> None:
    """Composes once beforehand, so that a misspelling is one sentence with the valid names."""
    for switch in (a.partition("=")[0] for a in arguments if a.startswith("-")):
        if switch not in SWITCHES:
            _stop(
                f"{switch} is no switch here, expected one of {', '.join(SWITCHES)}: leave it out"
            )
    pairs = zip(["", *arguments], arguments, strict=False)
    takes = ("-c", "--cfg", "-p", "--package", "-i", "--info")  # a word that is no override
    words = [a for before, a in pairs if not a.startswith("-") and before not in takes]
    overrides = _overrides(words)
    plain = []
    for override in overrides:
        key = str(override.key_or_group)
        if key.startswith("hydra") and not key.startswith(HYDRA):
            _stop(f"{key} cannot be set here; of Hydra's own settings {', '.join(HYDRA)} can")
        if key.startswith("hydra") and "_target_" in str(override.input_line):
            _stop(f"{override.input_line} names code; choose a plugin with hydra/sweeper=NAME")
        if str(override.package or "").startswith(("hydra", "_global_")):
            _stop(f"{override.input_line} would change settings of Hydra itself: leave it out")
        chosen = str(override.input_line).partition("=")[2]
        if (key == "recipe" or (CONF / key).is_dir()) and re.search(r"[/\\]|\.\.", chosen):
            _stop(f"{override.input_line} leads out of conf/{key}, expected a name of a file there")
        wrong = no_choice(override)
        if wrong:
            _stop(wrong)
        if override.is_sweep_override() and not {"-m", "--multirun"} & set(arguments):
            _stop(several(override))
        if override.is_sweep_override() and "glob(" in str(override.input_line):
            return  # Hydra expands it, and lists the options itself
        key = override.get_key_element()
        value = next(override.sweep_string_iterator()) if override.is_sweep_override() else None
        plain.append(f"{key}={value}" if value is not None else str(override.input_line))
    if not any(word.startswith("recipe=") for word in plain):
        _stop(f"no recipe was chosen: add recipe=NAME, one of {', '.join(options('recipe'))}")
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        try:
            hydra.compose("config", plain)
        except (HydraException, OmegaConfBaseException) as error:
            _stop(explain(error, plain))


def _overrides(words: list[str]) -> list[Override]:
    parser, found = OverridesParser.create(), list[Override]()
    for word in words:
        try:
            found += parser.parse_overrides([word])
        except HydraException:
            _stop(unreadable(word))
    return found


def _task(config: DictConfig) -> float | None:
    """Runs one composed recipe, or advises on it; returns the headline speedup for sweepers."""
    try:
        plain = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        _stop(explain(error, []))
    assert isinstance(plain, dict)
    settings = {str(key): value for key, value in plain.items()}
    for switch in ("plan", "view", "advise"):
        if not isinstance(settings[switch], bool):
            _stop(f"{switch} is {settings[switch]!r}; it must be true or false")
    from hydra.core.hydra_config import HydraConfig

    here = HydraConfig.get()
    try:
        refuse(settings, "")
        name = check_name("recipe", here.runtime.choices["recipe"])
    except ValueError as error:
        _stop(str(error))
    run = _runner(settings)
    if here.mode is not None and here.mode.name == "MULTIRUN":
        words = [word for word in here.overrides.task if not word.startswith("recipe=")]
        print(f"\n=== run {here.job.num} of the sweep: {name} {' '.join(words)}", flush=True)
        code, value = run(f"{name}-{here.job.num}", settings)
        SWEPT.append((code, value, " ".join(words)))
        return value
    code, value = run(name, settings)
    if code:
        sys.exit(code)
    return value


def _runner(settings: dict[str, Any]) -> Callable[[str, dict[str, Any]], tuple[int, float | None]]:
    """What the switches ask for: one recipe's name and settings -> exit code and speedup."""
    if settings["advise"]:
        from train.advise import run_advice

        return run_advice
    from train.run import run_recipe

    return run_recipe


def _conclude() -> int:
    """A line for each run of a sweep; returns the first exit code that was not 0."""
    for code, value, words in SWEPT:
        print(f"{words or 'as it is'}: " + (f"exit code {code}" if code else f"speedup {value}"))
    return next((code for code, *_ in SWEPT if code), 0)


def _stop(sentence: str) -> NoReturn:
    print(f"error: {redacted(sentence)}", file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    _in_utf8()
    guard()
    main()

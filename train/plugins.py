"""Hydra's launchers and sweepers: which may be chosen, what may be set of them, what a sweep adds.

They are made by Hydra itself, without the checks of train/compose.py, and some of their settings
are code or shell commands. So what may be set is listed here, and its values are plain words.
"""

import re
from importlib.metadata import PackageNotFoundError, version

from hydra.core.override_parser.types import Override

SAMPLERS = ("tpe", "random", "cmaes", "nsgaii", "motpe")  # a grid is what basic does
PLUGINS: dict[str, dict[str, str | None]] = {  # group -> choice -> what must be installed for it
    "hydra/launcher": {
        "basic": None,
        "joblib": "hydra-joblib-launcher",
        "submitit_local": "hydra-submitit-launcher",
        "submitit_slurm": "hydra-submitit-launcher",
    },
    "hydra/sweeper": {"basic": None, "halving": None, "optuna": "hydra-optuna-sweeper"},
    "hydra/sweeper/sampler": dict.fromkeys(SAMPLERS, "hydra-optuna-sweeper"),
}
SETTINGS = re.compile(
    r"hydra\.launcher\.(n_jobs|verbose|timeout|pre_dispatch|batch_size|timeout_min|cpus_per_task"
    r"|gpus_per_node|tasks_per_node|mem_gb|nodes|name|partition|qos|constraint|exclude|gres"
    r"|cpus_per_gpu|gpus_per_task|mem_per_gpu|mem_per_cpu|account|signal_delay_s|max_num_timeout"
    r"|array_parallelism)"
    r"|hydra\.sweeper\.(max_batch_size|eta|rungs|least|n_trials|n_jobs|max_failure_rate|direction"
    r"|storage|study_name|sampler\.(seed|n_startup_trials|n_ei_candidates|multivariate"
    r"|consider_prior|prior_weight|consider_magic_clip|consider_endpoints|sigma0|population_size"
    r"|mutation_prob|crossover_prob|swapping_prob))"
)
PLAIN = re.compile(r"[\w.:/+@%,*-]*")  # nothing that a shell or a batch script could take for more
TOGETHER = ("joblib", "submitit_local")  # launchers whose jobs share this machine


def refusal(override: Override, multirun: bool) -> str | None:
    """What is wrong with a word that sets something of Hydra's own; None if nothing is."""
    key, line = str(override.key_or_group), str(override.input_line)
    value = line.partition("=")[2]
    if override.package is not None or override.is_delete():
        return f"{line} would change settings of Hydra itself: leave it out"
    wrong = _not_chosen(key, value) if key in PLUGINS else _not_set(key, value, line)
    if wrong or multirun:
        return wrong
    return f"{line} is for the jobs of a sweep, and this command runs one: add -m, or leave it out"


def _not_set(key: str, value: str, line: str) -> str | None:
    if "_target_" in line:
        return f"{line} names code; choose a plugin with hydra/sweeper=NAME or hydra/launcher=NAME"
    if not SETTINGS.fullmatch(key):
        groups = ", ".join(PLUGINS)
        return (
            f"{key} cannot be set here; of Hydra's own settings {groups} can, and numbers and "
            "names of hydra.launcher and hydra.sweeper: leave it out"
        )
    if not PLAIN.fullmatch(value):
        return f"{line} is no plain word, expected a number or a name: correct it"
    return None


def _not_chosen(group: str, name: str) -> str | None:
    choices = PLUGINS[group]
    if name not in choices:
        return f"{group}={name} is not known here, expected one of {', '.join(choices)}"
    package = choices[name]
    try:
        if package:
            version(package)
    except PackageNotFoundError:
        return (
            f"{group}={name} needs {package}, which is not installed: "
            ".venv/bin/pip install -c constraints.txt -e '.[sweep]'"
        )
    return None


def chosen(overrides: list[Override]) -> dict[str, str]:
    """Group of plugins -> the choice that these words make."""
    pairs = [(str(o.key_or_group), str(o.input_line).partition("=")[2]) for o in overrides]
    return {key: value for key, value in pairs if key in PLUGINS}


def added(overrides: list[Override]) -> list[str]:
    """Words that a sweep adds unless the user said otherwise: Optuna would minimise, and end with
    the first failed trial."""
    if chosen(overrides).get("hydra/sweeper") != "optuna":
        return []
    said = {str(override.key_or_group) for override in overrides}
    words = {"hydra.sweeper.direction": "maximize", "hydra.sweeper.max_failure_rate": "1.0"}
    return [f"{key}={value}" for key, value in words.items() if key not in said]

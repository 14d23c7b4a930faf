"""hydra/sweeper=halving. Hydra makes sweepers of this package alone, which is why it is no room;
what it does stands in train/halving.py."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.utils import JobReturn
from hydra.errors import HydraException
from omegaconf import OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from data.secrets import redacted
from train.halving import Halving, Job
from train.mistakes import explain
from train.plan import plan


@dataclass
class HalvingConf:
    """hydra.sweeper with hydra/sweeper=halving; see Halving for eta, rungs and least."""

    _target_: str = "hydra_plugins.draftsmith.HalvingSweeper"
    eta: int = 3
    rungs: int = 3
    least: int | None = None
    params: dict[str, str] | None = None


ConfigStore.instance().store(
    group="hydra/sweeper", name="halving", node=HalvingConf, provider="draftsmith"
)


class HalvingSweeper(BasicSweeper):
    """The grid of the basic sweeper, of which each rung leaves a share. Whatever launcher is
    chosen gets all jobs of a rung at once."""

    def __init__(
        self, eta: int, rungs: int, least: int | None, params: dict[str, str] | None
    ) -> None:
        super().__init__(max_batch_size=None, params=params)
        self.eta, self.rungs, self.least = eta, rungs, least
        self.returns = list[Sequence[JobReturn]]()

    def sweep(self, arguments: list[str]) -> Any:
        """What the launcher returned for each rung."""
        assert self.config is not None
        if self.config.view or self.config.advise:  # nothing is trained
            return super().sweep(arguments)
        try:
            jobs = self._jobs(arguments)
            race = Halving(jobs, eta=self.eta, rungs=self.rungs, least=self.least)
        except (ValueError, OSError) as error:
            print(f"error: {redacted(str(error))}", file=sys.stderr)
            sys.exit(2 if isinstance(error, ValueError) else 4)
        if self.config.plan:
            print(*race.planned(), sep="\n", flush=True)
            return super().sweep(arguments)
        race.run(self._launch)
        return self.returns

    def _jobs(self, arguments: list[str]) -> list[Job]:
        """Each job of the grid, planned. Raises ValueError as `plan` does."""
        assert self.hydra_context is not None
        parser = OverridesParser.create(config_loader=self.hydra_context.config_loader)
        overrides = parser.parse_overrides([*self._parse_config(), *arguments])
        (grid,) = self.split_arguments(overrides, None)
        swept = {word for words in grid for word in words if not all(word in w for w in grid)}
        jobs = []
        for words in grid:
            settings = self._settings(words)
            root = Path(str(settings["output_dir"] or "outputs")).resolve()
            name = " ".join(word for word in words if word in swept) or "as it is"
            jobs.append(Job(tuple(words), name, tuple(plan(settings, root))))
        return jobs

    def _settings(self, words: list[str]) -> dict[str, Any]:
        """A job's configuration, as its launcher will compose it. Raises ValueError where it has no
        meaning."""
        assert self.hydra_context is not None
        assert self.config is not None
        try:
            composed = self.hydra_context.config_loader.load_sweep_config(self.config, words)
            with open_dict(composed):
                del composed["hydra"]
            plain = OmegaConf.to_container(composed, resolve=True, throw_on_missing=True)
        except (HydraException, OmegaConfBaseException) as error:
            raise ValueError(explain(error, words)) from None
        assert isinstance(plain, dict)
        return {str(key): value for key, value in plain.items()}

    def _launch(self, batch: list[list[str]]) -> list[float | None]:
        """Their values; None for a job that failed, which ends no other."""
        assert self.launcher is not None
        number = sum(map(len, self.returns))
        results = self.launcher.launch(batch, initial_job_idx=number)
        self.returns.append(results)
        return [_value(result) for result in results]


def _value(result: JobReturn) -> float | None:
    try:
        return result.return_value
    except Exception as error:  # whatever the job raised
        print(f"error: {type(error).__name__}: {redacted(str(error))}", file=sys.stderr)
        return None

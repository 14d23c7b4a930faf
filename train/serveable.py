"""Stage `serveable` (`preflight=serve`): engines load the drafter before it is trained.

A layout that an engine refuses shows on untrained weights as well as on trained ones, and those
cost nothing. Whether it reads the same drafter out of the files shows less, since fresh guesses are
seldom accepted: of what has learnt something, the stage `overfit` asks that.
"""

from pathlib import Path

import torch

from data.sources import Source
from decoding.pretrained import Pretrained
from drafters.base import Blueprint, Trained, require_intact, save
from eval.clients import installed
from eval.serve import Serve
from train.export import Export
from train.layouts.table import LAYOUTS
from train.processes.worker import build_of_this_rank


def family_of(drafter: Blueprint) -> str:
    """The name of its family: that of its file in drafters/."""
    return drafter.cls.__module__.removeprefix("drafters.")


class Engines:
    """The engines that are here: name -> Python (null: not here). transformers is, always."""

    def __init__(
        self,
        target: Pretrained,
        prompts: Source,
        engines: dict[str, str | None] | None,
        *,
        limit: int,
        max_prompt_tokens: int,
        max_new_tokens: int,
        dtype: str,
        format: str | list[str] | None = None,
    ) -> None:
        self.export = Export(target=target, format=format)
        self.client = Serve(
            target=target, prompts={"preflight": prompts}, engines=engines, heldout_only=False,
            limit=limit, max_prompt_tokens=max_prompt_tokens, max_new_tokens=max_new_tokens,
            dtype=dtype, snippets=False,
        )  # fmt: skip

    def check(self) -> None:
        """Raises ValueError for an engine that is not where it is said to be."""
        self.client.check({})

    def versions(self) -> str:
        """Of the engines, for a fingerprint."""
        named = self.client.engines
        return str({engine: installed(engine, python) for engine, python in named.items()})

    def serve(
        self, out: Path, exported: Path, drafter: Path, target: Path | None
    ) -> dict[str, float]:
        """Exports the drafter to exported/artifact in the formats of its family and has it served,
        with the matrix and the logs in out/artifact; returns tau by engine and format. Raises
        Failed where an export is not the drafter, or what is served is not. Of a family that no
        engine reads it says so, and returns {}."""
        family = require_intact(drafter)["family"]
        if family not in LAYOUTS:
            print(f"not served: no engine reads the family {family}", flush=True)
            return {}
        for folder in (out, exported):
            folder.mkdir(parents=True, exist_ok=True)
        self.export.run(exported, drafter=drafter, target=target)
        return self.client.run(out, drafter=drafter, export=exported / "artifact", target=target)


class Preflight:
    """A stage that asks `engines` before the bill. It tests all our code, and their versions."""

    engines: Engines

    def check(self, needs: dict[str, str]) -> None:
        """Raises ValueError for an engine that is not where it is said to be."""
        self.engines.check()

    def fingerprint(self) -> str:
        """Of all our code, and of the engines' versions."""
        return build_of_this_rank()["draftsmith"] + self.engines.versions()


class Serveable(Preflight):
    """Exports the drafter as training would start it in each `format` (null: all of its family) and
    has it loaded and used by the engines (eval/serve.py): answers must be the target's own, and as
    many of its guesses be accepted as in our loop.

    Formats whose engine is not named are read back strictly and compared with the training module
    only, which the log says.
    """

    def __init__(
        self,
        *,
        target: Pretrained,
        drafter: Blueprint,
        prompts: Source,
        engines: dict[str, str | None] | None = None,
        format: str | list[str] | None = None,
        limit: int = 4,
        max_prompt_tokens: int = 256,
        max_new_tokens: int = 16,
        dtype: str = "float32",
        seed: int = 0,
    ) -> None:
        family = family_of(drafter)
        if family not in LAYOUTS:
            raise ValueError(
                f"preflight=serve has an engine load the drafter, and none reads the family "
                f"{family}; leave it out, or train one of {', '.join(LAYOUTS)}"
            )
        self.target, self.drafter, self.seed = target, drafter, seed
        self.engines = Engines(
            target, prompts, engines, limit=limit, max_prompt_tokens=max_prompt_tokens,
            max_new_tokens=max_new_tokens, dtype=dtype, format=format,
        )  # fmt: skip
        self.engines.export.formats(family)  # its own checks, before anything starts

    def run(self, out: Path, *, target: Path | None = None) -> dict[str, float]:
        """Leaves the matrix in artifact/served.json and the engines' logs beside it; returns tau by
        engine and format. Raises Failed where one does not serve it."""
        self._untrained(out / "untrained", target)
        return self.engines.serve(out, out / "export", out / "untrained", target)

    def _untrained(self, folder: Path, place: Path | None) -> None:
        """Saves the drafter with the weights that training would start from; what depends on the
        data (which tokens a smaller vocabulary holds) is as if all tokens were as frequent."""
        torch.manual_seed(self.seed)
        shape = self.target.shape_of(place)
        module = self.drafter(shape)
        assert isinstance(module, Trained), f"{type(module).__name__} has nothing to train"
        begin = None
        if module.needs_target:
            sharded = self.target.parallel is not None
            begin = self.target.borrow(place) if sharded else self.target.load(place)
        module.initialise(begin, lambda: torch.ones(shape.vocab_size))
        save(module, folder, self.drafter.arguments)
        self.target.tokenizer(place).save_pretrained(folder)

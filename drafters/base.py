"""What every drafter is: the interface, the training batch, saving and loading.

Shapes: B batch, T tokens, S newly committed tokens, N drafted nodes, V vocabulary.
"""

import importlib
import inspect
import json
import math
import re
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from decoding.cache import Cache
from decoding.loop import State
from decoding.round import Draft, Seen
from decoding.sampling import Sampling
from decoding.target import Shape, Target, TargetOut
from drafters.files import Digests, damage, digests, write_json

_HERE = Path(__file__).parent
NOTE = "drafter.json"
M = TypeVar("M", bound=nn.Module)
Metrics = dict[str, Tensor]
"""Sums over the supervised tokens of a batch, detached; the loop divides by `tokens`."""


@dataclass
class Batch:
    """Packed sequences. mask_BT marks the tokens whose prediction is supervised; tokens of one
    document share a number in doc_BT and attend to each other only."""

    ids_BT: Tensor
    mask_BT: Tensor
    doc_BT: Tensor
    cached: TargetOut | None = None

    def to(self, device: torch.device) -> "Batch":
        """The same sequences on a device."""
        return Batch(self.ids_BT.to(device), self.mask_BT.to(device), self.doc_BT.to(device))

    @classmethod
    def of(cls, answers: list[tuple[list[int], list[int]]], device: torch.device) -> "Batch":
        """Prompts with their answers, a row each, padded to the right; the answers' tokens are
        supervised."""
        longest = max(len(prompt) + len(answer) for prompt, answer in answers)
        ids_BT = torch.zeros(len(answers), longest, dtype=torch.long)
        doc_BT = torch.full_like(ids_BT, -1)
        mask_BT = torch.zeros_like(ids_BT, dtype=torch.bool)
        for b, (prompt, answer) in enumerate(answers):
            end = len(prompt) + len(answer)
            ids_BT[b, :end] = torch.tensor([*prompt, *answer])
            doc_BT[b, :end], mask_BT[b, len(prompt) : end] = b, True
        return cls(ids_BT.to(device), mask_BT.to(device), doc_BT.to(device))


@dataclass
class Prediction:
    """One draft position's guesses at N tokens, for an objective to judge.

    hidden_ND are the drafter's states, weight_VD its head (None: the target's own, frozen),
    labels_N the true tokens; row_N the sequence of the batch that each belongs to, target_ND the
    target's states at the same positions (None when no target is given). position: 0 for the first
    drafted token, -1 for the target's own (a family that changes it). A head over part of the
    vocabulary names its tokens in vocabulary_V (its row i is the target's token vocabulary[i]).
    real_N: which of them are guessed at this position (None: all); share: what their loss weighs.
    """

    hidden_ND: Tensor
    weight_VD: Tensor | None
    labels_N: Tensor
    row_N: Tensor
    target_ND: Tensor | None
    position: int = 0
    vocabulary_V: Tensor | None = None
    real_N: Tensor | None = None
    share: float = 1.0

    def guessed(self) -> "Prediction":
        """Without the tokens that are not guessed at this position."""
        if self.real_N is None:
            return self
        kept_N = self.real_N.bool()
        states = self.target_ND
        return replace(
            self,
            hidden_ND=self.hidden_ND[kept_N],
            labels_N=self.labels_N[kept_N],
            row_N=self.row_N[kept_N],
            target_ND=None if states is None else states[kept_N],
            real_N=None,
        )

    def logits(self, hidden_CD: Tensor, target: Target | None) -> Tensor:
        """The head over some of the states."""
        if self.weight_VD is not None:
            return hidden_CD @ self.weight_VD.T
        assert target is not None, "a drafter that borrows the target's head needs the target"
        return target.logits(hidden_CD)


class Objective(Protocol):
    """A loss on predictions (train/objectives.py has them)."""

    needs_target: bool

    def __call__(
        self, predictions: list[Prediction], target: Target | None
    ) -> tuple[Tensor, list[Metrics]]:
        """The losses summed over N, each times its share, added up; and the metrics of each.

        The predictions are of the same N tokens, one a draft position: labels, rows, target states
        and vocabulary are those of the first, so that the target's law is made once for all."""


@dataclass(frozen=True)
class Look:
    """An objective that teaches nothing: a function looks at each prediction, and the target."""

    each: Callable[[Prediction, Target | None], None]
    needs_target: bool = False

    def __call__(
        self, predictions: list[Prediction], target: Target | None
    ) -> tuple[Tensor, list[Metrics]]:
        for prediction in predictions:
            self.each(prediction.guessed(), target)
        return predictions[0].hidden_ND.sum() * 0, [{} for _ in predictions]


@dataclass(frozen=True)
class Blueprint:
    """A drafter that is configured and waits for the shape of its target."""

    cls: type["Drafter"]
    arguments: dict[str, Any]

    def __call__(self, shape: Shape) -> "Drafter":
        return self.cls(shape, **self.arguments)


class Drafter(nn.Module, ABC):
    """Proposes drafts. Training-free families stop here; every family is a final class.

    The target is an argument and never an attribute, so it cannot enter a state dict, an optimiser
    or ZeRO.
    """

    taps: tuple[int, ...] = ()
    changes_target = False
    remembers = False  # what one call of decode taught it serves the next, until it must `forget`

    def forget(self) -> None:
        """Drops what earlier requests taught it: it is cold again."""

    def on(self, target: Target) -> Target:
        """The target that it decodes with: this one, unless the family `changes_target`."""
        return target

    @abstractmethod
    def start(
        self, target: Target, cache: Cache, sampling: Sampling, requests: list[int], max_len: int
    ) -> State:
        """A fresh state for requests that will have at most `max_len` tokens each."""

    @abstractmethod
    def propose(self, state: Any, seen: Seen, target: Target) -> Draft:
        """Guesses what follows the committed tokens, of which `seen` are new to the drafter."""


class Trained(Drafter):
    """A family with parameters. `needs_target`: training reads the target's states, and
    `reads_last`: the last ones among them, not for the target's law alone;
    `max_positions`: of the drafter itself, where it has fewer than its target."""

    needs_target = False
    reads_last = False

    @property
    def max_positions(self) -> float:
        return math.inf

    @abstractmethod
    def forward(
        self, batch: Batch, target: Target | None, objective: Objective
    ) -> tuple[Tensor, Metrics]:
        """The training step: loss summed over supervised tokens. DeepSpeed calls nothing else."""

    @abstractmethod
    def initialise(self, target: Target | None, counts: Callable[[], Tensor]) -> None:
        """Sets the weights that training starts from, where they come from elsewhere: a checkpoint
        that the configuration names, the target's own head, the frequencies of the training data
        (`counts()`: of each token among the supervised ones, [V])."""

    def learning(self, target: Target) -> Target:
        """The target that it learns with: as `on`, but its changes can still be trained."""
        return target

    def adapt(self) -> None:
        """Called when the weights to start from are there: freezes those that training leaves
        alone and adds what it moves in their stead."""

    @abstractmethod
    def save(self, folder: Path) -> None:
        """Writes the drafter so that `load` gives it back exactly (safetensors and JSON)."""

    @abstractmethod
    def read(self, folder: Path) -> None:
        """Fills the parameters from what `save` wrote; a missing or unexpected one is an error."""


def save(drafter: Trained, folder: Path, arguments: dict[str, Any]) -> None:
    """Writes the drafter with the configuration that `load` rebuilds it from."""
    folder.mkdir(parents=True, exist_ok=True)
    drafter.save(folder)
    family = type(drafter).__module__.removeprefix("drafters.")
    note = {"family": family, "arguments": arguments, "files": weights(folder)}
    write_json(folder / NOTE, note)


def load(folder: Path, shape: Shape) -> Trained:
    """The drafter that `save` wrote, for a target of this shape. Raises ValueError if there is none
    or its files are damaged."""
    saved = require_intact(folder)
    found = _families(saved["family"])
    if len(found) != 1:
        raise ValueError(
            f"{folder / NOTE} names the family {saved['family']!r}, which is not one of drafters/"
        )
    arguments = saved["arguments"]
    if arguments.get("checkpoint"):  # where it came from; its architecture is in this folder
        arguments = arguments | {"checkpoint": str(folder)}
    drafter = found[0](shape, **arguments)
    drafter.read(folder)
    return drafter.eval()


def _families(name: str) -> list[type[Trained]]:
    """The trained class of a file of drafters/; none for what is no family's name."""
    if not re.fullmatch(r"[a-z0-9_]+", name) or not _HERE.joinpath(f"{name}.py").is_file():
        return []
    module = importlib.import_module(f"drafters.{name}")
    classes = [c for c in vars(module).values() if isinstance(c, type) and issubclass(c, Trained)]
    return [c for c in classes if c.__module__ == module.__name__ and not inspect.isabstract(c)]


def weights(folder: Path) -> Digests:
    """Digests of a drafter's weights: every safetensors file of its folder."""
    files = sorted(folder.rglob("*.safetensors"))
    return digests(folder, [file.relative_to(folder).as_posix() for file in files])


def require_intact(folder: Path) -> dict[str, Any]:
    """What drafter.json says. Raises ValueError if it or a file of weights is not as `save` left
    it; a drafter of before hashes were noted passes."""
    note = folder / NOTE
    if not note.is_file():
        raise ValueError(f"{folder} holds no drafter: it has no {NOTE}")
    try:
        saved = json.loads(note.read_text(encoding="utf-8"))
        why = damage(folder, saved["files"]) if "files" in saved else None
        known = isinstance(saved["family"], str) and isinstance(saved["arguments"], dict)
    except (ValueError, KeyError, TypeError):
        known, why = False, None
    if not known:
        why = f"{NOTE} is not readable"
    if why:
        raise ValueError(
            f"the drafter in {folder} is damaged: {why}; copy it anew, or run the recipe that made "
            "it again"
        )
    return saved


def cast(module: M, dtype: torch.dtype) -> M:
    """Changes the parameters' dtype in place, and only theirs: a rounded rotary-frequency buffer
    would be another position code."""
    for parameter in module.parameters():
        parameter.data = parameter.data.to(dtype)
    return module

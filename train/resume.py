"""What a run goes on from: its newest checkpoint, and the weights that decoded best.

Rank 0 alone looks at the folder and sends what it found to the others: two ranks that looked
themselves could find two checkpoints (a shared file system shows a new one late), and a rank
without that file system could not go on at all.
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from decoding.pulse import item
from decoding.ranks import Ranks
from eval.controls import Failed
from train import checkpoint
from train.engine import STATE_KEYS, Engine
from train.guard import Preempted, bits, not_finite


class Paused(Preempted):
    """The run has come to where it was to pause, and has saved; it is not done."""


@dataclass
class Position:
    """Where a run stands: `step` global batches are behind it, of which `applied` moved the
    weights and the last `skipped` in a row did not; the last validation followed step `validated`.
    """

    step: int = 0
    applied: int = 0
    skipped: int = 0
    validated: int = 0

    @classmethod
    def of(cls, saved: dict[str, Any]) -> "Position":
        """From what a checkpoint says; one of an older version has a step alone."""
        step = int(saved["step"])
        known = {"applied": step, "validated": step} | saved
        return cls(**{name: int(known.get(name, 0)) for name in cls.__dataclass_fields__})

    def count(self, applied: bool) -> None:
        """One more step."""
        self.step += 1
        self.applied += applied
        self.skipped = 0 if applied else self.skipped + 1


def newest(folder: Path, ranks: Ranks) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """On every rank, the state and position of rank 0's newest checkpoint that verifies, if there
    is one; prints which were passed over. Raises Failed if a rank received something else."""
    found = checkpoint.newest(folder) if ranks.first else None
    if found is not None:
        for why in found[2]:
            print(f"skipped checkpoint {why}", flush=True)
    note = ranks.every(None if found is None else _note(found[0], found[1]))[0]
    if note is None:
        return None
    state = {}
    for name, (shape, kind) in note["tensors"].items():
        mine = found[0][name] if found else torch.empty(shape, dtype=getattr(torch, kind))
        state[name] = _from_first(mine, ranks)
    if len(set(ranks.every(bits(list(state.values()))))) > 1:
        raise Failed(f"the ranks did not receive the same checkpoint of {folder}; run it again")
    return state, note["position"]


def _note(state: dict[str, Tensor], position: dict[str, Any]) -> dict[str, Any]:
    kinds = {n: (list(t.shape), str(t.dtype).removeprefix("torch.")) for n, t in state.items()}
    return {"position": position, "tensors": kinds}


def _from_first(mine: Tensor, ranks: Ranks) -> Tensor:
    """Rank 0's tensor, on the CPU."""
    if ranks.world == 1:
        return mine
    sent = mine.cuda() if torch.cuda.is_available() else mine
    torch.distributed.broadcast(sent, 0)
    return sent.cpu()


def save(folder: Path, engine: Engine, ranks: Ranks, at: Position) -> None:
    """Saves the engine's state with this position. Raises as `finite` does."""
    state = finite(engine, ranks, at)
    if ranks.first:
        _write(folder, at.step, state, asdict(at))
    ranks.barrier()


def _write(
    folder: Path, step: int, state: dict[str, Tensor], said: dict[str, Any], keep: int = 2
) -> None:
    """Saves, watched: storage that never answers is a hang too."""
    with item("save of a checkpoint", checkpoint.patience(state)):
        checkpoint.save(folder, step, state, said, keep)


def finite(engine: Engine, ranks: Ranks, at: Position) -> dict[str, Tensor]:
    """The engine's state, on every rank. Raises Failed when a number in it is not finite."""
    state = engine.state()
    bad = ranks.decide(lambda: not_finite(state))
    if bad:
        raise Failed(
            f"after step {at.step} {bad[0]} holds numbers that are not finite, so it is not saved; "
            "the same command goes on from the checkpoint before. If this comes again, lower "
            "optim.lr"
        )
    return state


def reserve(folder: Path, module: nn.Module, ranks: Ranks) -> None:
    """Raises OSError where the checkpoints of this module will not fit (train/checkpoint.py)."""
    if ranks.first:
        trained = sum(p.numel() for p in module.parameters() if p.requires_grad)
        checkpoint.reserve(folder, 4 * (1 + len(STATE_KEYS)) * trained)


def restore(folder: Path, engine: Engine, ranks: Ranks) -> Position:
    """Puts the newest checkpoint into the engine. Raises ValueError if it is another drafter's."""
    found = newest(folder, ranks)
    if found is None:
        return Position()
    state, saved = found
    lacks = [name for name, _ in engine.trained if name not in state]
    if lacks:
        raise ValueError(
            f"the checkpoint in {folder} has no {lacks[0]} ({len(lacks)} tensors are missing): it "
            "was made by another version of the drafter. Remove that folder to begin anew"
        )
    at = Position.of(saved)
    engine.restore(state, at.applied)
    return at


class Best:
    """The weights that decoded best so far, one copy, written and verified as checkpoints are.

    It may be of a later step than the checkpoint that a crashed run goes on from: it was measured,
    and the steps up to it are trained and measured again.
    """

    def __init__(self, folder: Path, ranks: Ranks) -> None:
        self.folder, self.ranks = folder, ranks
        found = checkpoint.newest(folder) if ranks.first else None
        kept = ranks.every([found[1]["step"], found[1]["tau"]] if found else [0, 0.0])[0]
        self.step, self.tau = int(kept[0]), float(kept[1])

    def offer(self, engine: Engine, at: Position, tau: float) -> None:
        """Keeps the weights of this step if none decoded better: of equals the one trained longer.
        Every rank must call it with the same tau."""
        if tau < self.tau or (at.step, tau) == (self.step, self.tau):
            return
        self.step, self.tau = at.step, tau
        state = finite(engine, self.ranks, at)
        if self.ranks.first:
            weights = {name: state[name] for name, _ in engine.trained}
            _write(self.folder, at.step, weights, {"tau": tau}, keep=1)
        self.ranks.barrier()

    def give(self, engine: Engine) -> dict[str, float]:
        """Puts them into a finished engine's module; their step and tau, {} if there are none."""
        if not self.step:
            return {}
        found = newest(self.folder, self.ranks)
        if found is None:
            if self.ranks.first:
                print(f"the copy in {self.folder} is damaged: the last step is saved", flush=True)
            return {}
        for name, parameter in engine.trained:
            parameter.data = found[0][name].to(parameter.device)
        return {"artifact_step": found[1]["step"], "artifact_tau": found[1]["tau"]}

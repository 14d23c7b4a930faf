"""Families from their configurations, made tiny, and what training judges of them."""

from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import Tensor

from decoding.sampling import Sampling
from decoding.target import Shape, Target
from drafters.base import Batch, Drafter, Prediction, Trained
from train import compose

ROOT = Path(__file__).resolve().parents[2]
FAMILIES = sorted(path.stem for path in (ROOT / "conf" / "drafter").glob("*.yaml"))
GREEDY, SAMPLED = Sampling(), Sampling(temperature=1.0, seed=2)
PROMPTS = [[5], [1, 2, 3, 4, 5, 6, 7], [9, 8, 9, 8, 9]]


def arguments(family: str, **changes: Any) -> dict[str, Any]:
    """The family's own settings, made tiny where they have a size."""
    config = OmegaConf.to_container(OmegaConf.load(ROOT / "conf" / "drafter" / f"{family}.yaml"))
    assert isinstance(config, dict)
    tiny = {"width": 64, "layers": 1, "draft_length": 4, **changes}
    return {str(k): v for k, v in {**config, **{k: tiny[k] for k in tiny if k in config}}.items()}


def build(family: str, shape: Shape, **changes: Any) -> Drafter:
    """The random drafter that its configuration describes."""
    config = arguments(family, **changes)
    compose.bind(config, f"drafter {family}")
    with torch.random.fork_rng():
        torch.manual_seed(3)
        made = compose.build(config)
        return made if isinstance(made, Drafter) else made(shape)


def is_trained(family: str) -> bool:
    config = arguments(family)
    return issubclass(compose.find(config["_target_"], family), Trained)


TRAINED = [family for family in FAMILIES if is_trained(family)]


def packed(vocab: int, T: int = 24, seed: int = 0) -> Batch:
    """Two sequences of three documents, the second padded; not every token is supervised."""
    rng = torch.Generator().manual_seed(seed)
    ids_BT = torch.randint(vocab, (2, T), generator=rng)
    doc_BT = torch.tensor([[0] * 7 + [1] * 9 + [2] * (T - 16), [0] * 11 + [1] * 5 + [2] * (T - 16)])
    mask_BT = torch.rand(2, T, generator=rng) < 0.8
    mask_BT[:, 1:] &= doc_BT[:, 1:] == doc_BT[:, :-1]
    mask_BT[:, 0] = False
    doc_BT[1, -3:] = -1
    mask_BT[1, -3:] = False
    return Batch(ids_BT, mask_BT, doc_BT)


class Recorder:
    """An objective that keeps what it is given to judge."""

    def __init__(self, needs_target: bool = False) -> None:
        self.needs_target = needs_target
        self.seen: list[Prediction] = []

    def __call__(self, prediction: Prediction, target: Target | None) -> tuple[Tensor, dict]:
        self.seen.append(prediction)
        return prediction.hidden_ND.sum() * 0, {}


def judged(drafter: Trained, batch: Batch, target: Target) -> list[Prediction]:
    recorder = Recorder()
    with torch.no_grad():
        drafter(batch, target, recorder)
    return sorted(recorder.seen, key=lambda prediction: prediction.position)


def logits_of(prediction: Prediction) -> Tensor:
    return prediction.hidden_ND @ prediction.weight_VD.T


def teacher_forced(drafter: Trained, ids: list[int], target: Target) -> list[Tensor]:
    """For each draft position k, logits [T, V] whose row t is what training judges as the guess of
    token t (rows that a position cannot guess are NaN)."""
    ids_BT = torch.tensor([ids])
    batch = Batch(ids_BT, torch.ones_like(ids_BT).bool(), torch.zeros_like(ids_BT))
    rows = []
    for prediction in judged(drafter, batch, target):
        logits = logits_of(prediction)
        missing = logits.new_full((len(ids) - len(logits), logits.shape[1]), torch.nan)
        assert prediction.labels_N.tolist() == ids[len(missing) :]
        rows.append(torch.cat([missing, logits]))
    return rows

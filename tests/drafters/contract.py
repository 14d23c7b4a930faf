"""Families from their configurations, made tiny, and what training judges of them."""

import inspect
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import Tensor
from toys import sharpen, tiny_target

from decoding.loop import decode
from decoding.round import Draft, Seen
from decoding.sampling import Sampling
from decoding.target import Shape, Target
from drafters.base import Batch, Drafter, Look, Prediction, Trained
from train import compose

ROOT = Path(__file__).resolve().parents[2]
CONFIGURED = sorted(path.stem for path in (ROOT / "conf" / "drafter").glob("*.yaml"))
FAMILIES = [name for name in CONFIGURED if (ROOT / "drafters" / f"{name}.py").is_file()]
GREEDY, SAMPLED = Sampling(), Sampling(temperature=1.0, seed=2)
PROMPTS = [[5], [1, 2, 3, 4, 5, 6, 7], [9, 8, 9, 8, 9]]


def arguments(family: str, **changes: Any) -> dict[str, Any]:
    """The family's own settings, made tiny where they have a size."""
    config = OmegaConf.to_container(OmegaConf.load(ROOT / "conf" / "drafter" / f"{family}.yaml"))
    assert isinstance(config, dict)
    tiny = {"width": 64, "draft_length": 4, "taps": [0, 1, 2], "steps": 4, **changes}
    taken = inspect.signature(compose.find(config["_target_"], family)).parameters
    return {str(k): v for k, v in {**config, **{k: tiny[k] for k in tiny if k in taken}}.items()}


def build(family: str, shape: Shape, **changes: Any) -> Drafter:
    """The random drafter that its configuration describes."""
    config = arguments(family, **changes)
    compose.bind(config, f"drafter {family}")
    with torch.random.fork_rng():
        torch.manual_seed(3)
        made = compose.build(config)
        drafter = made if isinstance(made, Drafter) else made(shape)
        _disturb(drafter)
        return drafter


def _disturb(drafter: Drafter) -> None:
    """Matrices that start at zero hide what they multiply."""
    with torch.no_grad():
        for parameter in drafter.parameters():
            if parameter.ndim > 1 and not parameter.any():
                parameter.normal_(std=0.02)


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


def judged(drafter: Trained, batch: Batch, target: Target) -> list[Prediction]:
    seen: list[Prediction] = []
    with torch.no_grad():
        drafter.eval()(batch, target, Look(lambda prediction, _: seen.append(prediction)))
    return sorted(seen, key=lambda prediction: prediction.position)


def logits_of(prediction: Prediction, target: Target) -> Tensor:
    """Over the target's vocabulary, whatever part of it the head has."""
    logits, ids_V = prediction.logits(prediction.hidden_ND, target), prediction.vocabulary_V
    if ids_V is None:
        return logits
    whole = logits.new_full((len(logits), target.shape.vocab_size), -torch.inf)
    return whole.index_copy(1, ids_V, logits)


def teacher_forced(drafter: Trained, ids: list[int], target: Target) -> list[Tensor]:
    """For each draft position k, logits [T, V] whose row t is what training judges as the guess of
    token t (rows that a position cannot guess are NaN)."""
    ids_BT = torch.tensor([ids])
    batch = Batch(ids_BT, torch.ones_like(ids_BT).bool(), torch.zeros_like(ids_BT))
    rows = []
    for prediction in judged(drafter, batch, target):
        logits = logits_of(prediction, target)
        missing = logits.new_full((len(ids) - len(logits), logits.shape[1]), torch.nan)
        assert prediction.labels_N.tolist() == ids[len(missing) :]
        rows.append(torch.cat([missing, logits]))
    return rows


class Watching:
    """A drafter and its state with a notebook: the committed tokens and the draft of each round."""

    def __init__(self, drafter: Drafter) -> None:
        self.drafter, self.taps = drafter, drafter.taps
        self.rounds: list[tuple[list[list[int]], Draft]] = []
        self.accepted: list[int] = []

    def start(
        self, target: Target, cache: Any, sampling: Sampling, requests: list[int], max_len: int
    ) -> "Watching":
        self.committed: list[list[int]] = [[] for _ in requests]
        self.state: Any = self.drafter.start(target, cache, sampling, requests, max_len)
        return self

    def select(self, rows: list[int]) -> None:
        self.committed = [self.committed[r] for r in rows]
        self.state.select(rows)

    def propose(self, state: Any, seen: Seen, target: Target) -> Draft:
        for row, ids in enumerate(seen.ids_BS.tolist()):
            self.committed[row] += ids[: seen.count[row]]
            if seen.draft is not None:
                self.accepted.append(seen.count[row] - 1)
        draft = self.drafter.propose(self.state, seen, target)
        self.rounds.append(([list(ids) for ids in self.committed], draft))
        return draft


class Exact(Sampling):
    """Laws in float64, so that they can be compared to 1e-9."""

    def law(self, logits: Tensor) -> Tensor:
        return (logits / self.temperature).softmax(-1)


def assert_drafted_as_trained(family: str, **changes: Any) -> None:
    """U6, for a family with some of its settings changed: whole answers at temperature 1 in a
    ragged batch, from a target so flat that every acceptance length occurs."""
    target = tiny_target(vocab=17, seed=5, spread=0.15, tied=False)
    drafter = build(family, target.shape, **{"draft_length": 3, **changes})
    assert isinstance(drafter, Trained)
    sharpen(drafter.double(), 2).eval()
    watching, law = Watching(drafter), Exact(temperature=1.0)
    decode(target, watching, PROMPTS, sampling=law, max_new_tokens=60, end_ids=frozenset())
    compared = 0
    for committed, draft in watching.rounds:
        assert draft.q_BMV is not None
        for row, ids in enumerate(committed):
            if drafter.needs_target and ids[0] == PROMPTS[0][0]:
                continue  # a prompt of one token has no state before it: no such row is trained on
            drafted = draft.ids_BN[row, : draft.size[row]].tolist()
            positions = teacher_forced(drafter, ids + drafted, target)
            for n in range(draft.size[row]):
                logits = positions[min(n, len(positions) - 1)][len(ids) + n]
                q_V = draft.q_BMV[row, n]
                torch.testing.assert_close(q_V, logits.softmax(-1), atol=1e-9, rtol=0)
                compared += 1
    assert compared > 60
    assert set(watching.accepted) >= {0, 1, 2, 3}, "some acceptance has not been met"

"""Draft & Verify (Zhang et al. 2024): the target drafts for itself with some sublayers left out.

Training-free and without memory of its own: it reads the target's committed keys and values. Which
sublayers to skip is for the stage `skip_layers` to find (eval/skip_layers.py).

Shapes: B batch, N drafted tokens, V vocabulary.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean

import torch
from torch import Tensor

from decoding.cache import Cache
from decoding.constraint import allowed
from decoding.round import Draft, Seen
from decoding.sampling import Dice, Purpose, Sampling, draw
from decoding.skim import Skimmer
from decoding.target import Target
from drafters.base import Drafter

GOAL = 0.9  # the share of a draft to be accepted, which the threshold is moved towards
FOUND = "layers.json"  # what the stage skip_layers leaves


@dataclass
class LayerSkipState:
    """The target's cache, whose scratch slots drafts are read into; per row the threshold, the
    smoothed rate of acceptance and the length of the last draft."""

    skimmer: Skimmer
    cache: Cache
    sampling: Sampling
    requests: list[int]
    threshold: list[float]
    rate: list[float]
    drafted: list[int] = field(default_factory=list)

    def select(self, rows: list[int]) -> None:
        for name in ("requests", "threshold", "rate", "drafted"):
            setattr(self, name, [getattr(self, name)[r] for r in rows])


class LayerSkip(Drafter):
    """The target without the attention of the layers `attention` and the MLP of the layers `mlp`
    (null: of every second layer between the first and the last; [] and []: the target itself).

    draft_length: at most so many tokens a round. A row stops after a token that was given less
    than its threshold (the token stays in the draft, so that the law stays exact). After a round
    that accepted the share a of the draft, rate = beta1 rate + (1 - beta1) a (0 when a request
    begins), and the threshold moves by (1 - beta2) epsilon: up where the rate is below 0.9, else
    down, unless the draft was as long as may be. It starts from `threshold`; later requests go on
    from where it stood (the mean of a batch's rows; a request's last round teaches nothing).
    sample: whether it draws its tokens when the target samples (else it takes the likeliest).
    """

    remembers = True

    def __init__(
        self,
        *,
        attention: list[int] | None = None,
        mlp: list[int] | None = None,
        draft_length: int = 8,
        threshold: float = 0.6,
        beta1: float = 0.5,
        beta2: float = 0.9,
        epsilon: float = 0.01,
        sample: bool = True,
    ) -> None:
        super().__init__()
        if draft_length < 1:
            raise ValueError(f"layer_skip.draft_length is {draft_length}; it must be at least 1")
        shares = {"threshold": threshold, "beta1": beta1, "beta2": beta2, "epsilon": epsilon}
        for name, value in shares.items():
            if not 0 <= value <= 1:
                raise ValueError(f"layer_skip.{name} is {value}; it must lie between 0 and 1")
        for name, layers in (("attention", attention or []), ("mlp", mlp or [])):
            if len(set(layers)) < len(layers) or min(layers, default=0) < 0:
                raise ValueError(
                    f"layer_skip.{name} is {layers}; it must be null or layers counted from 0, "
                    "each once"
                )
        self.attention, self.mlp, self.draft_length = attention, mlp, draft_length
        self.beta1, self.beta2, self.epsilon, self.sample = beta1, beta2, epsilon, sample
        self.cold = self.threshold = threshold

    @classmethod
    def found(cls, folder: Path) -> "LayerSkip":
        """As the stage skip_layers left it in its artifact."""
        note = json.loads((folder / FOUND).read_text(encoding="utf-8"))
        names = ("attention", "mlp", "draft_length", "threshold")
        return cls(**{name: note[name] for name in names})

    def forget(self) -> None:
        self.threshold = self.cold

    def start(
        self, target: Target, cache: Cache, sampling: Sampling, requests: list[int], max_len: int
    ) -> LayerSkipState:
        usual = middle(target.shape.layers)
        attention = usual if self.attention is None else self.attention
        skimmer = Skimmer(target, attention, usual if self.mlp is None else self.mlp)
        rows = len(requests)
        thresholds, rates = [self.threshold] * rows, [0.0] * rows
        return LayerSkipState(skimmer, cache, sampling, list(requests), thresholds, rates)

    @torch.inference_mode()
    def propose(self, state: LayerSkipState, seen: Seen, target: Target) -> Draft:
        self._adapt(state, [count - 1 for count in seen.count])
        dice = Dice(state.sampling, state.requests, seen.length)
        sampled = self.sample and not state.sampling.greedy
        u_BN = dice.uniforms(Purpose.DRAFT, self.draft_length) if sampled else None
        rows = torch.arange(len(seen.count), device=seen.ids_BS.device)
        last_B = torch.tensor(seen.count, device=seen.ids_BS.device) - 1
        token_B, going = seen.ids_BS[rows, last_B], [True] * len(rows)
        state.drafted = [0] * len(rows)
        ids: list[Tensor] = []
        laws: list[Tensor] = []
        paths: list[tuple[int, ...]] = [()] * len(going)
        while any(going) and len(ids) < self.draft_length:
            logits_B1V = state.skimmer.skim(token_B[:, None], state.cache, after=len(ids))
            logits_BV = allowed(logits_B1V, [[path] for path in paths], dice)[:, 0]
            if u_BN is None:
                law_BV, token_B = logits_BV.float().softmax(-1), logits_BV.argmax(-1)
            else:
                law_BV = state.sampling.law(logits_BV)
                token_B = draw(law_BV, u_BN[:, len(ids)])
            ids.append(token_B)
            laws.append(law_BV)
            paths = [(*path, t) for path, t in zip(paths, token_B.tolist(), strict=True)]
            sure = law_BV.gather(1, token_B[:, None])[:, 0].tolist()
            state.drafted = [n + on for n, on in zip(state.drafted, going, strict=True)]
            going = [
                on and share >= least
                for on, share, least in zip(going, sure, state.threshold, strict=True)
            ]
        ids_BN, size = torch.stack(ids, dim=1), list(state.drafted)
        if not sampled:
            return Draft.chain(ids_BN, size)
        return Draft.chain(ids_BN, size, "iid", torch.stack(laws, dim=1))

    def _adapt(self, state: LayerSkipState, accepted: list[int]) -> None:
        """Moves each row's threshold by what became of its last draft, if there was one."""
        for b, drafted in enumerate(state.drafted):
            share, now = accepted[b] / drafted, state.threshold[b]
            state.rate[b] = self.beta1 * state.rate[b] + (1 - self.beta1) * share
            aim = now + self.epsilon
            if state.rate[b] >= GOAL:
                aim = now if drafted == self.draft_length else now - self.epsilon
            state.threshold[b] = self.beta2 * now + (1 - self.beta2) * aim
        self.threshold = mean(state.threshold)


def middle(layers: int) -> list[int]:
    """Every second layer between the first and the last; of two layers the second."""
    return list(range(1, min(layers, max(2, layers - 1)), 2))

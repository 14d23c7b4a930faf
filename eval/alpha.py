"""How likely a drafted token is to be accepted, without the bias of what was accepted before it.

alpha = sum over x of min(p(x), q(x)), averaged over the positions of answers that the target drew
itself (decoding.md, section g, point 4): the loop sees later positions only where the earlier ones
were accepted, which are the easy ones. At temperature 0: how often both have the same argmax.

Shapes: B batch, T tokens, N positions, C a chunk of them, V vocabulary.
"""

from collections import defaultdict

import numpy as np
import torch
from torch import Tensor

from decoding.sampling import Sampling
from decoding.target import Target
from drafters.base import Batch, Look, Prediction, Trained
from eval.bootstrap import RESAMPLES, Estimate, divide, estimates, resample

TOGETHER, CHUNK = 8, 256


@torch.no_grad()
def alphas(
    target: Target,
    drafter: Trained,
    answers: list[tuple[list[int], list[int]]],
    sampling: Sampling,
    seed: int = 0,
) -> list[Estimate]:
    """The alpha of each draft position, first to last, over (prompt ids, answer ids) pairs that
    the target gave under this sampling; Estimates (eval/bootstrap.py), n in answers.

    The drafter reads true tokens before each position, so a later head is judged as if all guesses
    before it had been right. `lm` has one number for every position.
    """
    answers = [pair for pair in answers if len(pair[1]) > 1]
    sums: dict[int, np.ndarray] = defaultdict(lambda: np.zeros((2, len(answers), 1)))
    for begin in range(0, len(answers), TOGETHER):

        def look(p: Prediction, _: Target | None, begin: int = begin) -> None:
            if p.position >= 0 and len(p.labels_N):
                overlap_N1, row_N = _overlaps(p, target, sampling), p.row_N.cpu().numpy() + begin
                np.add.at(sums[p.position][0], row_N, overlap_N1.double().cpu().numpy())
                np.add.at(sums[p.position][1], row_N, 1.0)

        batch = Batch.of(answers[begin : begin + TOGETHER], target.device)
        drafter(batch, target, Look(look, needs_target=True))
    return [_estimate(sums[position][0], sums[position][1], seed) for position in sorted(sums)]


def _estimate(overlap_G1: np.ndarray, count_G1: np.ndarray, seed: int) -> Estimate:
    drawn = resample({"overlap": overlap_G1, "count": count_G1}, RESAMPLES, seed)
    return estimates(divide(drawn["overlap"], drawn["count"]), int((count_G1 > 0).sum()))[0]


def _overlaps(p: Prediction, target: Target, sampling: Sampling) -> Tensor:
    """sum min(p, q) at each position, [N, 1]; greedy: 1 where both have the same argmax."""
    assert p.target_ND is not None, "alphas asks for the target's states"
    found = []
    for at in range(0, len(p.labels_N), CHUNK):
        here = slice(at, at + CHUNK)
        p_CV = target.logits(p.target_ND[here])
        q_CV = p.logits(p.hidden_ND[here], target)
        if p.vocabulary_V is not None:
            whole_CV = torch.full_like(p_CV, -torch.inf)
            whole_CV[:, p.vocabulary_V] = q_CV.to(whole_CV.dtype)
            q_CV = whole_CV
        if sampling.greedy:
            found.append((p_CV.argmax(-1) == q_CV.argmax(-1)).float())
        else:
            found.append(torch.minimum(sampling.law(p_CV), sampling.law(q_CV)).sum(-1))
    return torch.cat(found)[:, None]

"""alpha beside what one line of algebra gives, answer by answer."""

import pytest
import torch

from decoding.sampling import Sampling
from drafters.lm import LM
from eval.alpha import alphas
from tests.drafters.contract import build, teacher_forced
from tests.toys import sharpen, tiny_target

ANSWERS = [([1, 2, 3], [4, 5, 6, 7]), ([9, 8], [7, 6, 5]), ([5], [4])]  # the last has no pair


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("family", ["lm", "eagle", "medusa"])
def test_alpha_is_the_mean_overlap_on_the_targets_answers(family: str, temperature: float):
    target = tiny_target(vocab=40, seed=0, tied=False)
    drafter = sharpen(build(family, target.shape, steps=2, heads=2).double(), 3).eval()
    sampling = Sampling(temperature=temperature)
    found = alphas(target, drafter, ANSWERS, sampling)
    for position, estimate in enumerate(found):
        overlaps = []
        for prompt, answer in ANSWERS[:2]:
            ids = [*prompt, *answer]
            with torch.no_grad():
                p_TV = target.logits(target(torch.tensor([ids])).hidden_BTD)[0]
            guesses = teacher_forced(drafter, ids, target)[position]
            for t in range(len(prompt), len(ids)):
                if guesses[t].isnan().any():
                    continue
                p, q = p_TV[t - 1], guesses[t]
                if temperature:
                    overlaps.append(torch.minimum(p.softmax(-1), q.softmax(-1)).sum().item())
                else:
                    overlaps.append(float(p.argmax() == q.argmax()))
        assert estimate["value"] == pytest.approx(sum(overlaps) / len(overlaps), abs=1e-5)
        assert estimate["n"] == 2
    assert len(found) == (1 if family == "lm" else 2)


def test_the_target_as_its_own_drafter_overlaps_wholly():
    target = tiny_target(vocab=40, seed=0, tied=False)
    (found,) = alphas(target, LM.around(target.model), ANSWERS, Sampling(temperature=1.0))
    assert found["value"] == pytest.approx(1.0, abs=1e-6)

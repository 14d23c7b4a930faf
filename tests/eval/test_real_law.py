"""The two-sample test: honest decoding passes, wrong rules do not, and p is what p should be."""

import copy
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from decoding.pretrained import Pretrained
from decoding.sampling import Sampling
from decoding.target import Target
from decoding.verify import Rule
from drafters.lm import LM
from eval import law
from tests.decoding.wrong import ResamplesFromP, SoftmaxOfResidual
from tests.toys import tiny_target

PROMPTS = [[1, 2, 3], [4, 5], [6, 7, 8, 9]]


@pytest.fixture
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tenth of the exchanges, and ten times the level that they can reach."""
    monkeypatch.setattr(law, "EXCHANGES", 4_000)
    monkeypatch.setattr(law, "LEVEL", 1e-3)


def near(model: Target, noise: float) -> LM:
    """The target with noise on its weights, in proportion to them."""
    drafter = LM.around(copy.deepcopy(model.model), draft_length=3)
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(1)
        for parameter in drafter.parameters():
            parameter.add_(noise * parameter.std() * torch.randn_like(parameter))
    return drafter


def compared(rule: Rule | None = None, **options: Any) -> dict[str, Any]:
    model = tiny_target(vocab=24, spread=0.3, dtype=torch.float32)
    sampling = Sampling(options.pop("temperature", 1.0), top_k=options.pop("top_k", 0))
    settings = {"samples": 900, "tokens": 6} | options
    return law.compare(model, near(model, 0.3), PROMPTS, sampling, rule=rule, **settings)


@pytest.mark.parametrize("options", [{}, {"temperature": 0.6}, {"top_k": 5}])
def test_honest_decoding_passes(options: dict[str, Any]):
    found = compared(**options)
    assert found["passed"], found
    assert set(found["p_values"]) == {"log-probability", "length", "first token"}
    assert found["n"] == 900


@pytest.mark.usefixtures("_quick")
@pytest.mark.parametrize("rule", [ResamplesFromP, SoftmaxOfResidual])
def test_a_wrong_rule_fails(rule: type[Rule]):
    found = compared(rule())
    assert not found["passed"], found


def test_fewer_samples_than_the_protocols_are_said_to_be_few_and_none_test_nothing():
    assert "fewer than 2,000" in compared(samples=30)["found"]
    none = compared(samples=0)
    assert none["n"] == 0
    assert "not tested" in none["found"]
    with pytest.raises(ValueError, match="temperature above 0"):
        compared(temperature=0.0)


def test_log_probabilities_are_those_of_a_whole_pass():
    """Answers of several lengths, read behind a prompt that was read once."""
    model = tiny_target(vocab=24, spread=0.3)
    sampling = Sampling(0.7, top_k=6)
    prompt, answers = [3, 1, 4], [[5, 9, 2], [6], [5, 3, 5, 8]]
    due = []
    for answer in answers:
        ids_1T = torch.tensor([prompt + answer])
        p_TV = sampling.law(model.logits(model(ids_1T).hidden_BTD[0, len(prompt) - 1 : -1]))
        chosen = p_TV.gather(1, torch.tensor(answer)[:, None]).double()
        due.append(float(chosen.clamp(min=torch.finfo(torch.float32).tiny).log().sum()))
    found = law._log_law(model, prompt, answers, sampling)
    assert found == pytest.approx(due, rel=1e-5)


def p_values(draw: Any, times: int = 40) -> list[float]:
    """Of `times` experiments: draw(rng) gives both arms' numbers."""
    found = []
    for seed in range(times):
        rng = np.random.default_rng(seed)
        found.append(law.p_value([law.energy(*draw(rng))], rng))
    return found


def test_p_is_uniform_where_the_laws_are_one_and_small_where_only_the_spread_differs():
    same = p_values(lambda rng: (rng.normal(size=80), rng.normal(size=80)))
    assert 0.35 < float(np.mean(same)) < 0.65
    assert min(same) > 1e-3
    wider = p_values(lambda rng: (rng.normal(size=400), 1.5 * rng.normal(size=400)), times=3)
    assert max(wider) < 1e-3


def test_exchanges_stay_within_a_prompt():
    """Prompts whose numbers lie far apart would hide a shift in each of them."""
    rng = np.random.default_rng(0)
    pairs = [(m + rng.normal(size=150), m + 1 + rng.normal(size=150)) for m in (0, 100, 500)]
    assert law.p_value([law.energy(a, b) for a, b in pairs], rng) < 1e-4
    pooled = [np.concatenate(arm) for arm in zip(*pairs, strict=True)]
    assert law.p_value([law.energy(*pooled)], rng) > 0.05


def test_counts_see_other_shares_and_pass_the_same():
    rng = np.random.default_rng(0)
    one, two, three = (
        rng.choice(3, size=400, p=p) for p in ([0.6, 0.2, 0.2], [0.4, 0.4, 0.2], [0.6, 0.2, 0.2])
    )
    assert law.p_value([law.counts(one, two)], rng) < 1e-4
    assert law.p_value([law.counts(one, three)], rng) > 1e-3
    assert law.p_value([law.counts(one * 0, two * 0)], rng) == 1


def test_first_tokens_are_sorted_by_how_much_the_drafter_favours_them():
    model = tiny_target(vocab=24, spread=0.3, dtype=torch.float32)
    drafter, sampling = near(model, 0.3), Sampling(1.0)
    kind_V = law.favoured(model, drafter, PROMPTS[0], sampling)
    laws = [
        sampling.law(m.logits(m(torch.tensor(PROMPTS[:1])).hidden_BTD[0, -1]))
        for m in (model, Target(drafter.model))
    ]
    ratio_V = (laws[1] / laws[0]).numpy()
    kinds = sorted(set(kind_V.tolist()))
    assert len(kinds) > 4
    for low, high in pairwise(kinds):
        assert ratio_V[kind_V == low].min() >= ratio_V[kind_V == high].max()
    greedy = LM.around(drafter.model, draft_length=2, sample=False)  # drafts with certainty
    drafted = int(laws[1].argmax())
    assert law.favoured(model, greedy, PROMPTS[0], sampling)[drafted] == 0


def test_a_real_model_follows_its_law_and_a_wrong_rule_does_not(shared: Path):
    model = Pretrained(path=str(shared / "models" / "stories260k")).load(dtype="float32")
    drafter = near(model, 0.3)
    prompts = [[1, 2, 3], [1, 40, 7]]
    options: dict[str, Any] = {"samples": 300, "tokens": 8}
    sampling = Sampling(1.0)
    assert law.compare(model, drafter, prompts, sampling, **options)["passed"]
    wrong = law.compare(model, drafter, prompts, sampling, rule=SoftmaxOfResidual(), **options)
    assert not wrong["passed"], wrong

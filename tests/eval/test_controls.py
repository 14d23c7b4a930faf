"""Controls pass where all is well, and each planted fault is caught by the checks named beside it.

A fault that no check here may catch is in the table too: wrong labels in training change no answer.
"""

import copy
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import GenerationConfig

from decoding import loop
from decoding.loop import Decoded, decode
from decoding.round import Verdict
from decoding.sampling import Sampling, draw
from decoding.target import Target
from decoding.verify import OneHot, Rule
from drafters.base import cast
from drafters.lm import LM
from eval import controls, law, timed_controls
from tests.decoding.wrong import ResamplesFromP
from tests.toys import tiny_target

PROMPTS = [[1, 2, 3], [4, 5], [6, 7, 8, 9]]
TOKENS = 24
END = 13  # stands in one of the greedy answers


def target(vocab: int = 24, ends: bool = True) -> Target:
    made = tiny_target(vocab=vocab, spread=0.3, dtype=torch.float32)
    made.model.generation_config = GenerationConfig(eos_token_id=END if ends else None)
    return made


def drafter(model: Target, noise: float = 0.1) -> LM:
    """The target with noise on its weights: neither always right nor always wrong."""
    near = LM.around(copy.deepcopy(model.model), draft_length=3)
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(1)
        for parameter in near.parameters():
            parameter.add_(noise * torch.randn_like(parameter))
    return near


def rows(model: Target, ours: Any) -> list[dict[str, Any]]:
    """What bench leaves in runs.jsonl (eval/runs.py), of both arms."""
    found = []
    for arm, used in (("autoregressive", None), ("drafter", ours)):
        done = decode(model, used, PROMPTS, sampling=Sampling(), max_new_tokens=TOKENS)
        found.append({
            "arm": arm, "group": 0, "tokens": done.tokens,
            "row_rounds": sum(len(a.accepted) for a in done.answers),
            "ids": [a.ids for a in done.answers],
            "drafted": [a.drafted for a in done.answers],
            "accepted": [a.accepted for a in done.answers],
        })  # fmt: skip
    return found


def checks(model: Target, ours: Any) -> dict[str, dict[str, Any]]:
    """Everything that bench asks before it trusts a number."""
    return {
        **controls.run(model, ours, PROMPTS, TOKENS, 0),
        **timed_controls.run(model, PROMPTS[:2], 12, 0, repeats=5),
        "counting": controls.counted(rows(model, ours), model.end_ids, TOKENS),
        "law": law.compare(model, ours, PROMPTS[:1], Sampling(1.0), samples=800, tokens=6),
    }


class AcceptsAll(Rule):
    name, lossless, laws = "accepts all", False, frozenset({"one_hot", "iid"})

    def _verify(self, logits_BMV, draft, dice) -> Verdict:
        size_B = torch.tensor(draft.size)
        last_BV = logits_BMV[torch.arange(len(size_B)), size_B]
        paths = [list(range(n)) for n in draft.size]
        if dice.sampling.greedy:
            return Verdict(paths, last_BV.argmax(-1).tolist())
        return Verdict(paths, draw(dice.sampling.law(last_BV), dice.next(size_B[:, None])[:, 0])
                       .tolist())  # fmt: skip


class AcceptsNothing(OneHot):
    laws = frozenset({"one_hot", "iid"})

    def _verify(self, logits_BMV, draft, dice) -> Verdict:
        return super()._verify(logits_BMV, replace(draft, size=[0] * len(draft.size)), dice)


class Shifted(LM):
    """As if its labels had been one too far: it guesses the token after the next."""

    def propose(self, state, seen, target):
        draft = super().propose(state, seen, target)
        ids_BN = draft.ids_BN.roll(-1, dims=1)
        return replace(draft, ids_BN=ids_BN, q_BMV=None, law="one_hot")


def wrong_rule(rule: Callable[[], Rule]) -> Callable[[Any], None]:
    return lambda patch: patch.setattr(loop, "default_rule", lambda law: rule())


def only_sampled(rule: Callable[[], Rule]) -> Callable[[Any], None]:
    true = loop.default_rule
    return lambda patch: patch.setattr(
        loop, "default_rule", lambda law: rule() if law == "iid" else true(law)
    )


def counts_twice(patch: Any) -> None:
    true = Decoded.tokens.fget  # type: ignore[attr-defined]
    patch.setattr(Decoded, "tokens", property(lambda done: 2 * true(done)))


def forgets_a_round(patch: Any) -> None:
    true = loop._emit

    def emit(done, live, seen, draft, *rest):
        on = true(done, live, seen, draft, *rest)
        for answer in done.answers:
            if len(answer.accepted) == 2 and draft.ids_BN.shape[1]:
                answer.accepted.pop()
                answer.drafted.pop()
        return on

    patch.setattr(loop, "_emit", emit)


def says_an_end_and_goes_on(patch: Any) -> None:
    true = loop._emit
    patch.setattr(loop, "_emit", lambda *arguments: true(*arguments[:5], frozenset(), arguments[6]))


def slow_baseline(patch: Any) -> None:
    true = loop._no_draft
    patch.setattr(loop, "_no_draft", lambda seen: [time.sleep(0.005), true(seen)][1])


def slow_passes(patch: Any) -> None:
    true = Target.score
    patch.setattr(Target, "score", lambda *arguments: [time.sleep(0.01), true(*arguments)][1])


FAULTS: dict[str, tuple[Callable[[Any], None], set[str]]] = {
    "nothing": (lambda patch: None, set()),
    "every draft is accepted": (wrong_rule(AcceptsAll), {"random drafter", "exactness", "law"}),
    "no draft is accepted": (
        wrong_rule(AcceptsNothing), {"drafter = target", "oracle drafter", "ceiling"},
    ),
    "resampled from p after a rejection": (only_sampled(ResamplesFromP), {"law"}),
    "tokens counted twice": (counts_twice, {"counting"}),
    "a round not counted": (
        forgets_a_round, {"drafter = target", "oracle drafter", "ceiling", "counting"},
    ),
    "an end id does not end": (says_an_end_and_goes_on, {"baseline", "counting"}),
    "a slow baseline": (slow_baseline, {"null drafter", "baseline speed"}),
    "slow passes": (slow_passes, {"baseline speed"}),
}  # fmt: skip


def test_a_handful_of_pairs_judges_no_time(monkeypatch):
    """One busy moment may touch them all: their figure is shown, and fails nothing."""
    slow_baseline(monkeypatch)
    found = timed_controls.run(target(), PROMPTS[:1], 12, 0)
    assert found["null drafter"]["overhead"] < 0.8
    assert found["null drafter"]["passed"]


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_is_caught_by_these_checks_and_no_other(fault: str, monkeypatch):
    plant, caught = FAULTS[fault]
    model = target()
    ours = drafter(model)
    monkeypatch.setattr(law, "EXCHANGES", 4_000)  # a tenth, for ten times the level
    monkeypatch.setattr(law, "LEVEL", 1e-3)
    plant(monkeypatch)
    found = checks(model, ours)
    assert {name for name, check in found.items() if not check["passed"]} == caught, found


def test_wrong_labels_pass_all_controls_and_show_in_tau_alone():
    model = target()
    honest = drafter(model, 0.02)
    shifted = copy.copy(honest)
    shifted.__class__ = Shifted
    found = {ours: controls.run(model, ours, PROMPTS, TOKENS, 0) for ours in (honest, shifted)}
    assert all(check["passed"] for each in found.values() for check in each.values())
    tau = [float(each["exactness"]["found"].rsplit(" ", 1)[1]) for each in found.values()]
    assert tau[0] > 1.5 > tau[1]


def test_small_targets_are_decided_in_fp64(monkeypatch):
    model = target()
    before = {name: p.dtype for name, p in model.named_parameters()}
    found = controls.run(model, drafter(model), PROMPTS, TOKENS, 0)
    for name in ("drafter = target", "oracle drafter", "baseline"):
        assert "float64" in found[name]["found"]
    assert found["drafter = target"]["acceptance"] == 1
    assert {name: p.dtype for name, p in model.named_parameters()} == before
    monkeypatch.setattr(controls, "DECIDABLE", 10)
    found = controls.run(model, drafter(model), PROMPTS, TOKENS, 0)
    assert "float32" in found["drafter = target"]["found"]
    assert "must be 99.5%" in found["drafter = target"]["found"]


def test_a_penalty_of_the_models_own_configuration_stays_out_of_the_comparison():
    model = target()
    own = GenerationConfig(eos_token_id=END, repetition_penalty=5.0, do_sample=True, top_k=3)
    model.model.generation_config = own
    plain = decode(model, None, PROMPTS[:1], sampling=Sampling(), max_new_tokens=TOKENS)
    ids, seconds = controls.generated(model, PROMPTS[0], TOKENS, model.end_ids)
    assert ids == plain.answers[0].ids
    assert seconds > 0
    assert model.model.generation_config is own
    longer, _ = controls.generated(model, PROMPTS[0], TOKENS, frozenset())
    assert len(longer) == TOKENS


def test_the_oracle_is_right_in_every_round_of_a_ragged_batch():
    model = cast(target().double(), torch.float64)
    plain = decode(model, None, PROMPTS, sampling=Sampling(), max_new_tokens=TOKENS)
    oracle = controls.Oracle([a.ids for a in plain.answers], 5)
    done = decode(model, oracle, PROMPTS, sampling=Sampling(), max_new_tokens=TOKENS)
    assert [a.ids for a in done.answers] == [a.ids for a in plain.answers]
    assert [len(a.accepted) for a in done.answers] == [-(-len(a.ids) // 6) for a in plain.answers]
    assert len({len(a.ids) for a in plain.answers}) > 1


def test_the_ceiling_is_a_speedup_that_the_draft_length_bounds():
    model = target(ends=False)
    found = timed_controls.run(model, PROMPTS[:2], 20, 0, draft_length=4)["ceiling"]
    assert 1.2 < found["speedup"] < 5.5
    assert found["draft_length"] == 4


def test_one_bad_run_in_five_fails_no_control_of_time(monkeypatch):
    """A busy machine stretches some runs; a slow baseline stretches all."""
    model, calls = target(ends=False), iter(range(10**6))

    def sometimes(*arguments, **options):
        done = decode(*arguments, **options)
        if next(calls) % 5 == 0:
            done.seconds *= 10
        return done

    monkeypatch.setattr(timed_controls, "decode", sometimes)
    found = timed_controls.run(model, PROMPTS, 12, 0)
    assert all(check["passed"] for check in found.values()), found


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"tokens": 5}, "5 tokens are reported and 4 are there"),
        ({"row_rounds": 3}, "3 calls are reported and 2 are there"),
        ({"ids": [[1, 7, 3, 7]]}, "2 tokens stand behind an end id"),
        ({"ids": [[1, 2, 3]], "tokens": 3}, "neither an end id nor the limit of 6"),
        ({"ids": [[1, 2, 3, 4, 5, 6, 7]], "tokens": 7, "accepted": [[3, 3]]}, "neither an end"),
        ({"accepted": [[3, 0]]}, "accepted more than was drafted"),
        ({"accepted": [[1, 0]]}, "2 rounds that accepted 1 cannot bring 4 tokens"),
        ({"accepted": [[2, 1, 1]], "drafted": [[2, 2, 2]], "row_rounds": 3}, "3 rounds that"),
    ],
)
def test_counting_again_finds_what_does_not_add_up(change: dict[str, Any], said: str):
    run = {
        **{"arm": "drafter", "group": 3, "tokens": 4, "row_rounds": 2, "ids": [[1, 2, 3, 7]]},
        **{"drafted": [[2, 2]], "accepted": [[2, 0]]},
    }
    assert controls.counted([run], frozenset({7}), 6)["passed"]
    found = controls.counted([run, run | change], frozenset({7}), 6)
    assert not found["passed"]
    assert said in found["found"]
    assert "drafter, group 3" in found["found"]

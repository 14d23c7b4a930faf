"""Advice from made-up times: the reference's answers, what can never pay, where batches end."""

import json
from dataclasses import replace

import pytest

from eval.advise import ALPHAS, LENGTHS, Accepted, Advice, Candidate, free, verdict
from eval.joint import expected_tau
from train.advise import render

FLAT = {1: 10.0, 2: 10.0, 4: 10.0, 8: 10.0, 16: 10.0, 32: 10.0}
STEEP = {m: 10.0 * m for m in FLAT}


def candidate(
    token: float,
    verify: dict[int, float] = FLAT,
    *,
    name: str = "lm 1x64",
    family: str = "lm",
    parameters: int = 1000,
    layers: int | None = 1,
) -> Candidate:
    """A drafter whose token takes `token` ms, and a target whose calls take `verify`."""
    bound = free(verify, 0.0)
    draft = {n: token * n for n in LENGTHS}
    return Candidate(name, family, parameters, layers, bound.plain, draft, bound.verify)


def advice(*candidates: Candidate, verify: dict[int, float] = FLAT, **more: object) -> Advice:
    options = {"refused": {}, "recipe": "lm 1x64", "kept": "FILE", **more}
    bound = free(verify, 0.0)
    return Advice("target", "float32", verify, 0.0, bound, list(candidates), **options)


REFERENCE = [  # decoding.md, a.1: c, alpha, speedup, draft length
    *[(0.05, 0.6, 1.92, 4), (0.05, 0.8, 3.09, 8), (0.05, 0.9, 4.67, 13)],
    *[(0.1, 0.6, 1.67, 3), (0.1, 0.8, 2.47, 6), (0.1, 0.9, 3.43, 10)],
    *[(0.2, 0.6, 1.40, 2), (0.2, 0.8, 1.87, 4), (0.2, 0.9, 2.37, 7)],
]


@pytest.mark.parametrize(("c", "alpha", "speedup", "length"), REFERENCE)
def test_best_draft_lengths_of_the_reference(c: float, alpha: float, speedup: float, length: int):
    found = candidate(10 * c).best(alpha)
    assert (round(found[0], 2), found[1]) == (speedup, length)


def test_tokens_per_target_call():
    assert expected_tau(0.8, 8) == pytest.approx((1 - 0.8**9) / 0.2)
    assert expected_tau(1.0, 5) == 6
    assert expected_tau(0.0, 5) == 1


def test_where_a_drafter_breaks_even():
    """With c = 0.2 and one token, (1 + alpha) / 1.2 = 1 at 0.2, and longer drafts need more."""
    slow = candidate(2.0)
    assert slow.needs() == pytest.approx(0.2, abs=1e-6)
    assert slow.speedup(0.2, 2) < 1
    least = slow.needs(candidate(0.5).best(0.6)[0])
    assert least is not None
    assert slow.best(least)[0] == pytest.approx(candidate(0.5).best(0.6)[0])
    assert slow.best(least - 0.01)[0] < candidate(0.5).best(0.6)[0]


def test_what_cannot_pay_whatever_is_accepted():
    """Where a call over m tokens takes m times as long, and a draft something on top."""
    dead = candidate(1.0, STEEP, name="lm 8x8")
    assert dead.needs() is None
    assert dead.best(1.0)[0] < 1
    said = " ".join(verdict(advice(dead, verify=STEEP)))
    assert "Cannot pay on this machine for this target, whatever they accept: lm 8x8 (at mo" in said
    assert "lm 8x8 is fastest at that acceptance: 0.76x with drafts of 1" in said
    assert "it cannot pay" in said
    living = verdict(advice(candidate(1.0)))
    assert "Every drafter here can pay if enough of its tokens are accepted." in living


def test_costs_of_verification_shorten_drafts():
    """The free drafter is the bound, and drafts as far as verification allows."""
    rising = {m: 10.0 + 2.0 * (m - 1) for m in FLAT}
    assert free(rising, 0.0).best(0.8)[1] < free(FLAT, 0.0).best(0.8)[1] == 16
    assert free(rising, 5.0).plain == 15
    assert candidate(0.5, rising).best(0.8)[0] < free(rising, 0.0).best(0.8)[0]


def test_heads_draft_no_further_than_they_are():
    heads = Candidate("medusa", "medusa", 9, None, 10.0, {1: 0.1, 3: 0.3}, {1: 10.0, 3: 10.0})
    assert heads.best(0.9)[1] == 3
    assert heads.token == pytest.approx(0.1)


def test_depth_and_width_at_nearly_equal_size():
    wide = candidate(0.5, name="lm 1x256", parameters=1000)
    deep = candidate(2.0, name="lm 4x128", parameters=1100, layers=4)
    large = candidate(4.0, name="lm 4x512", parameters=9000, layers=4)
    sized = candidate(0.5, name="lm 1x512", parameters=3000)
    said = " ".join(verdict(advice(wide, deep, large, sized, alpha=0.6)))
    least = deep.needs(wide.best(0.6)[0])
    assert "lm 4x128 (1,100 parameters) takes 2.00 ms a token and lm 1x256 (1,000) 0.50 ms" in said
    assert f"its acceptance must be {least:.2f} or more" in said
    assert "a token's time follows the layers with R² 0.76" in said
    assert "Depth" not in " ".join(verdict(advice(wide, sized)))


@pytest.mark.parametrize(
    ("growth", "said"),
    [
        ({2: 1.0, 4: 1.5, 8: 9.0}, "pays up to batch 4; at batch 8 verification costs so much"),
        ({2: 9.0}, "pays up to batch 1; at batch 2"),
        ({2: 1.0, 4: 1.0}, "still pays at batch 4, the largest tried"),
    ],
    ids=["8", "2", "none"],
)
def test_the_batch_from_which_verification_costs_too_much(growth: dict[int, float], said: str):
    one = candidate(1.0)
    batches = {1: one} | {
        b: replace(one, verify={n: by * ms for n, ms in one.verify.items()})
        for b, by in growth.items()
    }
    assert said in verdict(advice(one, batches=batches))[-1]


def report(**changes: object) -> dict[str, object]:
    """A bench report: 60 of 100 first and 21 of 60 second tokens accepted."""
    positions = [{"reached": 100, "accepted": 60}, {"reached": 60, "accepted": 21}]
    cell = {"arm": "drafter", "batch": 1, "temperature": 0.0, "n": 9, "acceptance": positions}
    cell |= {"tau": {"value": 1.8}, "speedup": {"value": 1.4}, **changes}
    other = [cell | {"arm": "ngram"}, cell | {"batch": 4}, cell | {"temperature": 1.0}]
    conditions = {"drafter": "lm", "parameters_drafter": 1000, "draft_shape": "chain of 2"}
    for row in other:
        row["acceptance"] = [{"reached": 10, "accepted": 1}]
    return {"table": [*other, cell], "conditions": conditions}


def test_the_acceptance_that_was_measured_marks_its_row():
    found = Accepted.of(report())
    assert found is not None
    assert found.alpha == pytest.approx(81 / 160)
    mine, other = candidate(1.0), candidate(1.0, name="lm 1x128", parameters=2000)
    known = advice(mine, other, alpha=found.alpha, accepted=found)
    lines = render(known).splitlines()
    assert [x.split()[1] for x in lines if x.endswith("<- the recipe's, measured")] == ["1x64"]
    assert sum("measured" in x for x in lines) == 2
    assert (
        "accepted 0.51 of the tokens that were verified, 1.80 tokens per target call"
        in " ".join(lines)
    )
    foreign = replace(found, parameters=5)
    said = verdict(advice(mine, accepted=foreign))[0]
    assert said.endswith("; it is none of the drafters here.")
    assert "No drafter of this recipe was measured yet" in verdict(advice(mine))[0]


def test_a_report_without_a_drafted_token_has_no_acceptance():
    assert Accepted.of(report(n=0) | {"table": []}) is None
    assert Accepted.of({**report(), "table": [report(acceptance=[])["table"][-1]]}) is None


def test_figures_of_a_busy_machine_are_said_to_be_so():
    said = verdict(advice(candidate(1.0), verify=FLAT | {4: 3.0}))[0]
    assert said.startswith("THE FIGURES SCATTER: a call over 4 tokens took 3.00 ms and one over 2")
    assert "remove FILE" in said
    assert "SCATTER" not in " ".join(verdict(advice(candidate(1.0), verify=FLAT | {2: 9.5})))
    mine = candidate(1.0)
    odd = replace(mine, verify=dict.fromkeys(mine.verify, 0.6 * mine.plain))
    said = verdict(advice(mine, odd))[0]
    assert said.startswith("THE FIGURES SCATTER: a call over ")
    assert f"and one of plain decoding {mine.plain:.2f} ms" in said


def test_the_acceptance_of_a_law_is_said_to_be_one():
    known = replace(advice(candidate(1.0)), alpha=0.45, expected="lm 1x128 after 9 tokens")
    said = verdict(known)
    assert said[0].startswith("By the law of the sweeps lm 1x128 after 9 tokens accepts 0.45;")
    assert "No drafter of this recipe was measured yet" not in " ".join(said)
    assert "At acceptance 0.45 no drafter can give more than" in " ".join(said)


def test_advice_is_text_and_json():
    known = advice(
        candidate(1.0),
        candidate(0.1, name="medusa", family="medusa", layers=None),
        batches={1: candidate(1.0), 2: candidate(3.0)},
        refused={"lm 4x512": "too large", "lm 2x512": "too large", "eagle3": "too few layers"},
    )
    text = render(known)
    for part in ("Left out (too large): lm 4x512, lm 2x512", "a drafter that costs nothing", "16"):
        assert part in text
    told = json.loads(json.dumps(known.told(), allow_nan=False))
    assert told["candidates"][0]["break_even"] == pytest.approx(0.1, abs=1e-6)
    assert told["candidates"][0]["at"]["0.8"] == {
        "speedup": pytest.approx(2.47, abs=0.01),
        "length": 6,
    }
    assert set(told["free"]["at"]) == {f"{alpha:g}" for alpha in ALPHAS}

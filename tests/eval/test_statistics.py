"""The numbers of a report against hand-made runs whose answers are known."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from eval.bootstrap import Estimate, share, verdict
from eval.slices import break_even, by_length, language_in
from eval.statistics import acceptance_by_position, measure, paired_speedup


def run(arm: str, group: int = 0, seconds: float = 1.0, tokens: int = 10, **rest: Any) -> dict:
    """One raw run at temperature 0, batch 1; autoregressive unless `rest` says otherwise."""
    base = {
        **{"arm": arm, "temperature": 0.0, "batch": 1, "repeat": 0, "group": group},
        **{"prompts": [group], "task": "ko", "tokens": tokens, "rounds": tokens},
        **{"row_rounds": tokens, "seconds": seconds, "first_seconds": 0.2, "first_tokens": 1},
        **{"draft_seconds": 0.0, "verify_seconds": 0.5 * seconds, "repetitive": False},
        **{"drafted": [[0] * tokens], "accepted": [[0] * tokens]},
    }
    return base | rest


def drafted(group: int = 0, seconds: float = 0.5, **rest: Any) -> dict:
    """Four rounds of three drafted tokens that accept 3, 2, 1 and 0: ten tokens."""
    pattern = {"drafted": [[3, 3, 3, 3]], "accepted": [[3, 2, 1, 0]], "rounds": 4, "row_rounds": 4}
    costs = {"draft_seconds": 0.12, "verify_seconds": 0.24, "first_tokens": 4}
    return run("drafter", group, seconds, **(pattern | costs | rest))


def near(estimate: Estimate | None, value: float) -> bool:
    return estimate is not None and estimate["value"] == pytest.approx(value)


def test_accept_pattern_of_3_2_1_0_gives_1_5_accepted_and_tau_2_5() -> None:
    cell = measure([drafted(), run("autoregressive")], "drafter", temperature=0.0, batch=1)
    assert near(cell["accepted_per_round"], 1.5)
    assert near(cell["tau"], 2.5)
    assert (cell["drafted"], cell["accepted"], cell["tokens"]) == (12, 6, 10)
    first, second, third = cell["acceptance"]
    assert near(first["survival"], 3 / 4)
    assert near(second["survival"], 2 / 4)
    assert near(third["survival"], 1 / 4)
    assert near(first["conditional"], 3 / 4)
    assert near(second["conditional"], 2 / 3)
    assert near(third["conditional"], 1 / 2)
    assert [p["reached"] for p in cell["acceptance"]] == [4, 3, 2]


def test_costs_and_times_of_one_prompt() -> None:
    cell = measure([drafted(), run("autoregressive")], "drafter", temperature=0.0, batch=1)
    expected = {
        **{"speedup": 2.0, "decode_speedup": (0.8 / 9) / (0.3 / 6), "tokens_per_second": 20.0},
        **{"draft_ms_per_round": 30.0, "verify_ms_per_round": 60.0, "draft_ms_per_token": 10.0},
        **{"plain_ms_per_round": 50.0, "busy_speedup": 0.5 / 0.36, "ttft_ms": 200.0},
        **{"tpot_ms_p50": 50.0, "tpot_ms_p95": 50.0, "other_ms_per_round": 35.0},
    }
    assert {name: cell[name]["value"] for name in expected} == pytest.approx(expected)
    assert cell["speedup"]["low"] is None
    assert cell["verdict"] == "one prompt: no interval"


def test_a_short_round_leaves_later_positions_alone() -> None:
    runs = [drafted(drafted=[[3, 1], [2]], accepted=[[2, 1], [2]], prompts=[0, 1])]
    counts = [(p["drafted"], p["reached"], p["accepted"]) for p in acceptance_by_position(runs)]
    assert counts == [(3, 3, 3), (2, 2, 2), (1, 1, 0)]


def test_positions_are_pooled_counts_and_not_means_over_prompts() -> None:
    often = drafted(0, drafted=[[1] * 9], accepted=[[1] * 9])
    once = drafted(1, drafted=[[1]], accepted=[[0]])
    (first,) = acceptance_by_position([often, once])
    assert near(first["conditional"], 0.9)
    assert first["conditional"]["n"] == 2


def test_accepting_more_than_was_drafted_is_caught() -> None:
    with pytest.raises(AssertionError, match="accepted more than drafted"):
        acceptance_by_position([drafted(drafted=[[1]], accepted=[[2]])])


def test_repeats_add_up_and_are_no_prompts() -> None:
    runs = [run("autoregressive", g, 2.0) for g in range(3)]
    runs += [drafted(g, s, repeat=r) for g in range(3) for r, s in enumerate((0.5, 1.5))]
    cell = measure(runs, "drafter", temperature=0.0, batch=1)
    assert near(cell["speedup"], 2.0)
    assert (cell["n"], cell["runs"]) == (3, 6)


def test_only_shared_groups_are_compared() -> None:
    runs = [run("autoregressive", 0), drafted(0), drafted(1, seconds=99.0)]
    cell = measure(runs, "drafter", temperature=0.0, batch=1)
    assert near(cell["speedup"], 2.0)
    assert (cell["n"], cell["unpaired"]) == (1, 1)


def test_speed_is_per_token_when_lengths_differ() -> None:
    runs = [run("autoregressive", tokens=20, seconds=2.0), drafted(seconds=0.5, tokens=5)]
    assert near(paired_speedup(runs, "drafter"), 1.0)


def test_the_macro_mean_weighs_each_prompt_alike() -> None:
    """A long prompt that is 4 times as fast and a short one that is not faster at all."""
    runs = [run("autoregressive", 0, 8.0, 80), run("autoregressive", 1, 1.0, 10)]
    runs += [drafted(0, 2.0, tokens=80), drafted(1, 1.0)]
    cell = measure(runs, "drafter", temperature=0.0, batch=1)
    assert near(cell["macro_speedup"], (4 + 1) / 2)
    assert near(cell["speedup"], 9 / 3)


def test_tau_is_told_over_prompts_too() -> None:
    runs = [run("autoregressive", g) for g in range(10)]
    runs += [drafted(g, row_rounds=10 - g) for g in range(10)]  # tau 1, 10/9, ... 10
    cell = measure(runs, "drafter", temperature=0.0, batch=1)
    found = [cell[f"tau_p{p}"]["value"] for p in (10, 50, 90)]
    assert found == pytest.approx([1.0, 10 / 6, 10 / 2])
    assert near(cell["tau"], 100 / 55)
    assert cell["tau_p10"]["low"] <= found[0] <= cell["tau_p10"]["high"]


def sweep(*speeds: tuple[int, float], noise: float = 0.0, groups: int = 12) -> list[dict]:
    """Groups at each batch size, so many times as fast as without a drafter."""
    spread = np.random.default_rng(0).lognormal(sigma=noise, size=(len(speeds), groups))
    return [
        one
        for i, (batch, speed) in enumerate(speeds)
        for g in range(groups)
        for one in (
            run("autoregressive", g, speed * spread[i, g], batch=batch),
            drafted(g, 1.0, batch=batch),
        )
    ]


def test_break_even_is_where_the_speedup_falls_through_1() -> None:
    """1.25 at 4 and 0.8 at 16: equally far from 1 in the logarithm, so at 8."""
    (found,) = break_even(sweep((1, 2.0), (4, 1.25), (16, 0.8), noise=0.1), resamples=2000)
    exact = break_even(sweep((1, 2.0), (4, 1.25), (16, 0.8)), resamples=10)[0]["value"]
    assert exact == pytest.approx(8)
    assert found["state"] == "crossed"
    assert found["low"] < found["value"] < found["high"]
    assert 4 < found["low"] < found["high"] < 16
    assert found["said"].startswith("drafting pays up to about batch")


@pytest.mark.parametrize(
    ("speeds", "state", "said"),
    [
        ([(1, 2.0), (4, 1.5)], "not reached", "no break-even up to batch 4, the largest measured"),
        ([(1, 0.9), (4, 1.5)], "below from the start", "drafting does not pay even at batch 1"),
    ],
)
def test_break_even_outside_the_sizes_is_words(speeds: list, state: str, said: str) -> None:
    (found,) = break_even(sweep(*speeds), resamples=100)
    assert (found["state"], found["said"]) == (state, said)
    assert found["value"] is found["low"] is found["high"] is None


def test_break_even_near_an_end_says_how_uncertain_it_is() -> None:
    (found,) = break_even(sweep((1, 1.5), (4, 1.02), noise=0.3), resamples=1000)
    assert found["high"] is None or found["low"] is not None
    assert "above 4" in found["said"]


def test_break_even_of_single_groups_has_no_interval() -> None:
    (found,) = break_even(sweep((1, 1.5), (4, 0.5), groups=1), resamples=100)
    assert found["state"] == "crossed"
    assert found["low"] is found["high"] is None
    assert "no interval" in found["said"]


def test_one_batch_size_has_no_break_even() -> None:
    assert break_even(sweep((1, 1.5))) == []


@pytest.mark.parametrize(
    ("task", "code"),
    [
        *[("de", "de"), ("de_en", "de"), ("ko_nli", "ko"), ("translation/ja", "ja")],
        *[("math_reasoning", None), ("chat", None), ("번역", None)],
    ],
)
def test_the_language_of_a_task_is_in_its_name(task: str, code: str | None) -> None:
    assert language_in(task) == code


def test_prompt_lengths_make_buckets_of_five_or_more() -> None:
    lengths = [10] * 6 + [64] * 5 + [300] * 4
    runs = [
        one
        for g, n in enumerate(lengths)
        for one in (
            run("autoregressive", g, 3.0 if n == 64 else 1.0, prompt_tokens=[n]),
            drafted(g, 0.5, prompt_tokens=[n]),
        )
    ]
    found = {e["prompt_tokens"]: (e["n"], round(e["speedup"]["value"], 9)) for e in by_length(runs)}
    assert found == {"under 64": (6, 2.0), "64 to 255": (5, 6.0)}
    assert by_length([one for one in runs if one["prompt_tokens"] == [10]]) == []
    assert by_length([drafted(g) for g in range(9)]) == []  # rows from before schema 2


def test_pairing_cancels_what_prompts_share() -> None:
    """Prompts of very different cost, each exactly twice as fast: an interval without width."""
    cost = np.random.default_rng(0).lognormal(sigma=2, size=30)
    runs = [run("autoregressive", g, s) for g, s in enumerate(cost)]
    runs += [drafted(g, s / 2) for g, s in enumerate(cost)]
    found = paired_speedup(runs, "drafter")
    assert (found["low"], found["high"]) == (pytest.approx(2.0), pytest.approx(2.0))
    assert verdict(found) == "faster"


def test_intervals_cover_the_truth_and_are_seeded() -> None:
    """Noisy prompts whose true ratio is 1.5: a 95 % interval holds it about 95 times in 100."""
    rng = np.random.default_rng(1)
    held = 0
    for _ in range(200):
        cost, noise = rng.lognormal(sigma=0.5, size=40), rng.lognormal(-0.02, 0.2, size=40)
        runs = [run("autoregressive", g, 1.5 * c) for g, c in enumerate(cost)]
        runs += [drafted(g, s) for g, s in enumerate(cost * noise)]
        found = paired_speedup(runs, "drafter", resamples=500)
        held += found["low"] <= 1.5 <= found["high"]
    assert 178 <= held <= 198
    assert paired_speedup(runs, "drafter", resamples=500) == found


def test_no_shared_group_names_what_is_there() -> None:
    with pytest.raises(ValueError, match=r"'ngram' and 'autoregressive'.*'drafter', 0.0, 1"):
        paired_speedup([drafted()], "ngram")


def test_the_baseline_is_not_compared_with_itself() -> None:
    cell = measure([run("autoregressive")], "autoregressive", temperature=0.0, batch=1)
    assert cell["speedup"] is cell["macro_speedup"] is cell["busy_speedup"] is None
    assert cell["verdict"] is None
    assert near(cell["tau"], 1.0)
    assert cell["acceptance"] == []


def test_an_answer_that_ends_in_its_first_round_has_no_decode_time() -> None:
    short = {"tokens": 4, "rounds": 1, "row_rounds": 1, "first_seconds": 0.5}
    short |= {"drafted": [[3]], "accepted": [[3]]}
    cell = measure([drafted(**short), run("autoregressive")], "drafter", temperature=0, batch=1)
    assert cell["decode_speedup"]["value"] is None
    assert cell["tpot_ms_p50"] == {"value": None, "low": None, "high": None, "n": 0}


def test_nothing_measured_is_none_and_not_a_crash() -> None:
    cell = measure([], "drafter", temperature=0.0, batch=1)
    assert (cell["n"], cell["speedup"]["value"], cell["verdict"]) == (0, None, "not measured")


@pytest.mark.parametrize(
    ("low", "high", "words"),
    [
        (0.8, 0.99, "slower than no drafting"),
        (0.9, 1.1, "no difference shown"),
        (1.01, 1.1, "faster"),
    ],
)
def test_the_whole_interval_decides_the_verdict(low: float, high: float, words: str) -> None:
    assert verdict({"value": (low + high) / 2, "low": low, "high": high, "n": 9}) == words


def test_share_none_of_24_is_not_certainly_none() -> None:
    found = share(0, 24)
    assert (found["value"], found["low"]) == (0, 0)
    assert found["high"] == pytest.approx(0.138, abs=0.001)
    assert share(0, 0)["value"] is None

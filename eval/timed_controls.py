"""Controls of the stopwatch: is the baseline slow, does the loop cost, what is the most to be had?

They run on the target that is measured, in its dtype. gamma is the length of a draft.

Shapes: P pairs of runs, of one prompt in one repeat each.
"""

import random
from typing import Any

import numpy as np
from numpy.typing import NDArray

from decoding.loop import Answer, Decoded, decode
from decoding.sampling import Sampling
from decoding.target import Target
from drafters.base import Drafter
from eval.controls import GAMMA, Oracle, full_rounds, generated

SLOW_BASELINE = 1.25  # seconds of plain decoding over those of the null drafter
SLOW_ENGINE = 0.8  # tokens/s of plain decoding over those of transformers
ENOUGH = 9  # pairs below which a control of time shows its figure and judges nothing
MOST = 0.9  # of the oracle's rounds: in bf16 a near-tie may cost one
Array = NDArray[np.float64]


def run(
    target: Target,
    prompts: list[list[int]],
    tokens: int,
    seed: int,
    *,
    draft_length: int = GAMMA,
    repeats: int = 3,
) -> dict[str, dict[str, Any]]:
    """name -> {passed, found, ...}: plain decoding against the null drafter (nothing proposed), an
    oracle (the answer itself proposed, `draft_length` tokens a round) and transformers' generate.

    Greedy, `tokens` a prompt even where an answer ends, prompt by prompt, arms in random turn, the
    first turn dropped. Each figure is a median over pairs. A control of time fails only where three
    quarters of nine pairs or more are beyond its margin, which a busy machine does not bring about.
    """
    answers = _settled(target, prompts, tokens, draft_length)
    arms = {"plain": None, "null": Oracle(answers, 0), "oracle": Oracle(answers, draft_length)}
    seconds: dict[str, list[float]] = {name: [] for name in (*arms, "transformers")}
    done: dict[str, list[Answer]] = {name: [] for name in arms}
    turns, rng = [n for _ in range(repeats) for n in range(len(prompts))], random.Random(seed)
    for turn, n in enumerate([0, *turns]):
        for name in rng.sample(list(seconds), len(seconds)):
            if name == "transformers":
                took = generated(target, prompts[n], tokens, frozenset())[1]
            else:
                made = _greedy(target, arms[name], prompts[n], n, tokens)
                took = made.seconds
                done[name] += made.answers if turn else []
            seconds[name] += [took] if turn else []
    taken_P = {name: np.array(each) for name, each in seconds.items()}
    return {
        "null drafter": _null(taken_P["plain"] / taken_P["null"], done),
        "ceiling": _ceiling(taken_P["plain"] / taken_P["oracle"], done["oracle"], draft_length),
        "baseline speed": _baseline_speed(taken_P["transformers"] / taken_P["plain"]),
    }


def _settled(
    target: Target, prompts: list[list[int]], tokens: int, draft_length: int
) -> list[list[int]]:
    """Answers as an oracle's wide passes give them: those of plain decoding, but that in bf16 a
    near-tie may fall otherwise; an answer that took another way is foretold anew."""
    answers = [_answer(target, None, prompt, n, tokens).ids for n, prompt in enumerate(prompts)]
    for _ in range(3):
        oracle = Oracle(answers, draft_length)
        done = [_answer(target, oracle, prompt, n, tokens) for n, prompt in enumerate(prompts)]
        answers = [answer.ids for answer in done]
        if full_rounds(done, draft_length) == 1:
            break
    return answers


def _null(plain_over_null_P: Array, done: dict[str, list[Answer]]) -> dict[str, Any]:
    pairs = zip(done["plain"], done["null"], strict=True)
    same, n = sum(a.ids == b.ids for a, b in pairs), len(done["plain"])
    overhead = float(np.median(1 / plain_over_null_P))
    return {
        "passed": same == n and not _beyond(plain_over_null_P, SLOW_BASELINE),
        "found": f"a drafter that proposes nothing takes {overhead:.2f} times as long as plain "
        f"decoding (must not be clearly below {1 / SLOW_BASELINE:.2f}), and {same} of {n} answers "
        "are identical",
        "overhead": overhead,
    }


def _ceiling(plain_over_oracle_P: Array, done: list[Answer], draft_length: int) -> dict[str, Any]:
    full, speedup = full_rounds(done, draft_length), float(np.median(plain_over_oracle_P))
    return {
        "passed": MOST <= full <= 1,
        "found": f"drafts of {draft_length} tokens that are all right and cost nothing make it "
        f"{speedup:.2f}x as fast, and no drafter of such drafts can do better; {full:.0%} of the "
        f"rounds were needed for that (must be {MOST:.0%} at least: near-ties may cost some)",
        "speedup": speedup,
        "draft_length": draft_length,
    }


def _baseline_speed(ours_over_theirs_P: Array) -> dict[str, Any]:
    ratio = float(np.median(ours_over_theirs_P))
    return {
        "passed": not _beyond(1 / ours_over_theirs_P, 1 / SLOW_ENGINE),
        "found": f"plain decoding here is {ratio:.2f} times as fast as transformers' generate, the "
        f"best public engine at hand (must not be clearly below {SLOW_ENGINE})",
        "ratio": ratio,
    }


def _beyond(ratio_P: Array, margin: float) -> bool:
    """Whether three quarters of the pairs are above the margin; never of a handful, which one busy
    moment may have touched wholly."""
    return len(ratio_P) >= ENOUGH and float(np.percentile(ratio_P, 25)) > margin


def _answer(
    target: Target, drafter: Drafter | None, prompt: list[int], number: int, tokens: int
) -> Answer:
    return _greedy(target, drafter, prompt, number, tokens).answers[0]


def _greedy(
    target: Target, drafter: Drafter | None, prompt: list[int], number: int, tokens: int
) -> Decoded:
    """`tokens` tokens, whatever they are."""
    return decode(
        target, drafter, [prompt], sampling=Sampling(), max_new_tokens=tokens,
        end_ids=frozenset(), requests=[number],
    )  # fmt: skip

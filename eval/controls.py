"""Checks that must hold whatever the speed; a report whose controls fail is not to be trusted."""

from typing import Any

from decoding.adapter import Adapted
from decoding.loop import Decoded, decode
from decoding.sampling import Sampling
from decoding.target import Target
from drafters.base import Drafter, cast
from drafters.lm import LM

NEARLY_ALL = 0.995  # of the target's own drafts; in fp32 an exact tie may fall either way


class Failed(Exception):
    """A control failed: the measurement, or the drafter, is broken."""


def run(
    target: Target, drafter: Drafter, prompts: list[list[int]], tokens: int, seed: int
) -> dict[str, dict[str, Any]]:
    """name -> {passed, found}, on a few prompts of up to `tokens` new tokens, target in fp32."""
    plain = decode(target, None, prompts, sampling=Sampling(), max_new_tokens=tokens)
    twin = LM.around(target.model, draft_length=4)
    accepted = []
    for temperature in (0.0, 1.0):
        sampling = Sampling(temperature=temperature, seed=seed)
        done = decode(target, twin, prompts, sampling=sampling, max_new_tokens=tokens)
        accepted.append(_acceptance(done))
    stranger = cast(LM(target.shape, layers=1, width=64), target.dtype).to(target.device)
    random_done = decode(target, stranger, prompts, sampling=Sampling(), max_new_tokens=tokens)
    ours = decode(target, drafter, prompts, sampling=Sampling(), max_new_tokens=tokens)
    return {
        "drafter = target": {
            "passed": min(accepted) >= NEARLY_ALL,
            "found": f"the target as its own drafter: {accepted[0]:.1%} of its drafts accepted at "
            f"T=0, {accepted[1]:.1%} at T=1 (must be all)",
        },
        "random drafter": _equal(plain, random_done, "an untrained drafter", target)
        | {"acceptance": _acceptance(random_done)},
        "exactness": _equal(plain, ours, "this drafter", target),
    }


def _equal(plain: Decoded, other: Decoded, who: str, target: Target) -> dict[str, Any]:
    same = sum(a.ids == b.ids for a, b in zip(plain.answers, other.answers, strict=True))
    dtype = str(target.dtype).removeprefix("torch.")
    whose = "the changed target's" if isinstance(target, Adapted) else "the target's"
    return {
        "passed": same == len(plain.answers),
        "found": f"{same} of {len(plain.answers)} greedy answers with {who} identical to {whose} "
        f"own in {dtype}; tau {_tau(other):.2f}",
    }


def _acceptance(done: Decoded) -> float:
    drafted = sum(sum(a.drafted) for a in done.answers)
    return sum(sum(a.accepted) for a in done.answers) / max(1, drafted)


def _tau(done: Decoded) -> float:
    return done.tokens / max(1, sum(len(a.accepted) for a in done.answers))

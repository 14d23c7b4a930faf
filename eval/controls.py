"""Checks that must hold whatever the speed; a report whose controls fail is not to be trusted.

`run` needs a target whose sums are exact enough for equality (fp32); `counted` reads the rows that
the measurement left; timed_controls.py has those that take the time. tau is tokens per target call,
gamma the length of a draft. No control sees a drafter that is merely bad: wrong labels in training
lower tau and change no answer, which decode-validation finds (train/decoded.py).
"""

import copy
import time
from dataclasses import dataclass
from typing import Any

import torch

from decoding.adapter import Adapted
from decoding.cache import Cache
from decoding.loop import Answer, Decoded, decode
from decoding.round import Draft, Seen
from decoding.sampling import Sampling
from decoding.sharded import Sharded
from decoding.target import Target
from drafters.base import Drafter, cast
from drafters.lm import LM

GAMMA = 4
NEARLY_ALL = 0.995  # of the target's own drafts; in fp32 an exact tie may fall either way
DECIDABLE = 200_000_000  # parameters of the largest target that is controlled in fp64


class Failed(Exception):
    """A control failed: the measurement, or the drafter, is broken."""


@dataclass
class Place:
    """Where each row of a batch stands in an answer that is known; at -1: before its prompt."""

    answers: list[list[int]]
    at: list[int]

    def select(self, rows: list[int]) -> None:
        self.answers = [self.answers[r] for r in rows]
        self.at = [self.at[r] for r in rows]


class Oracle(Drafter):
    """Proposes the next `draft_length` tokens of answers known beforehand, by request number: no
    drafter of chains can do better, and it takes no time. With draft_length 0 it is the null
    drafter, which goes the way of a drafter and proposes nothing."""

    def __init__(self, answers: list[list[int]], draft_length: int) -> None:
        super().__init__()
        self.answers, self.draft_length = answers, draft_length

    def start(
        self, target: Target, cache: Cache, sampling: Sampling, requests: list[int], max_len: int
    ) -> Place:
        return Place([self.answers[r] for r in requests], [-1] * len(requests))

    def propose(self, state: Place, seen: Seen, target: Target) -> Draft:
        pairs = zip(state.at, seen.count, strict=True)
        state.at = [0 if at < 0 else at + count for at, count in pairs]
        known = zip(state.answers, state.at, strict=True)
        guesses = [answer[at : at + self.draft_length] for answer, at in known]
        size = [len(guess) for guess in guesses]
        padded = [guess + [0] * (max(size) - len(guess)) for guess in guesses]
        ids_BN = torch.tensor(padded, dtype=torch.long, device=seen.ids_BS.device)
        return Draft.chain(ids_BN.view(len(size), max(size)), size)


def run(
    target: Target, drafter: Drafter, prompts: list[list[int]], tokens: int, seed: int
) -> dict[str, dict[str, Any]]:
    """name -> {passed, found, ...}, on a few prompts of up to `tokens` new tokens, target in fp32.

    A target of up to DECIDABLE parameters is its own drafter, the oracle's target and transformers'
    in fp64, where all is decided: every draft of theirs must stand.
    """
    plain = decode(target, None, prompts, sampling=Sampling(), max_new_tokens=tokens)
    stranger = cast(LM(target.shape, layers=1, width=64), target.dtype).to(target.device)
    random_done = decode(target, stranger, prompts, sampling=Sampling(), max_new_tokens=tokens)
    ours = decode(target, drafter, prompts, sampling=Sampling(), max_new_tokens=tokens)
    exact = _decisive(target)
    return {
        "drafter = target": _all_stand(exact, None, prompts, tokens, seed),
        "oracle drafter": _all_stand(exact, GAMMA, prompts, tokens, seed),
        "random drafter": _equal(plain, random_done, "an untrained drafter", target)
        | {"acceptance": _acceptance(random_done)},
        "exactness": _equal(plain, ours, "this drafter", target),
        "baseline": _same_as_transformers(exact, prompts, tokens),
    }


def counted(runs: list[dict[str, Any]], end_ids: frozenset[int], limit: int) -> dict[str, Any]:
    """{passed, found}: the tokens that the rows of runs.jsonl report, counted again from their ids:
    up to and with the first end id, at most `limit` of them, all from rounds that can have made
    them."""
    wrong, tokens = [], 0
    for run in runs:
        rows = zip(run["ids"], run["drafted"], run["accepted"], strict=True)
        faults = [_miscounted(*row, end_ids, limit) for row in rows]
        recount = sum(_length(ids, end_ids) for ids in run["ids"])
        calls = sum(map(len, run["accepted"]))
        if recount != run["tokens"]:
            faults.append(f"{run['tokens']} tokens are reported and {recount} are there")
        if calls != run["row_rounds"]:
            faults.append(f"{run['row_rounds']} calls are reported and {calls} are there")
        wrong += [f"{run['arm']}, group {run['group']}: {fault}" for fault in faults if fault]
        tokens += recount
    said = f"{tokens:,} tokens of {len(runs):,} runs counted again from their ids: "
    more = f"{len(wrong)} faults, such as: {wrong[0]}" if wrong else "all as reported"
    return {"passed": not wrong, "found": said + more}


def _decisive(target: Target) -> Target:
    """The target in fp64 if it is small enough to be copied, else itself."""
    size = sum(p.numel() for p in target.parameters())
    if size > DECIDABLE or isinstance(target, Sharded):  # whose parts no copy would bring together
        return target
    return Target(cast(copy.deepcopy(target.model), torch.float64), name=target.name)


def _all_stand(
    target: Target, gamma: int | None, prompts: list[list[int]], tokens: int, seed: int
) -> dict[str, Any]:
    """An oracle's drafts, or (gamma None) those of the target itself, greedy and sampled: all must
    stand, and a round bring gamma + 1 tokens, the last of an answer fewer."""
    drafted = gamma or GAMMA
    accepted, full = [], []
    for temperature in (0.0, 1.0):
        sampling = Sampling(temperature, seed=seed)
        plain = decode(target, None, prompts, sampling=sampling, max_new_tokens=tokens)
        ours: Drafter = LM.around(target.model, draft_length=drafted)
        if gamma:
            ours = Oracle([answer.ids for answer in plain.answers], gamma)
        done = decode(target, ours, prompts, sampling=sampling, max_new_tokens=tokens)
        accepted.append(_acceptance(done))
        full.append(full_rounds(done.answers, drafted))
    due = 1.0 if target.dtype == torch.float64 else NEARLY_ALL
    who = "the target's own answers as drafts" if gamma else "the target as its own drafter"
    return {
        "passed": min(accepted) >= due and (due < 1 or set(full) == {1.0}),
        "found": f"{who}, in {_name(target.dtype)}: {accepted[0]:.1%} of the drafts accepted at "
        f"T=0, {accepted[1]:.1%} at T=1 (must be {'all' if due == 1 else f'{due:.1%}'}); "
        f"{full[0]:.1%} and {full[1]:.1%} of the rounds as few as drafts of {drafted} allow",
        "acceptance": min(accepted),
    }


def _same_as_transformers(target: Target, prompts: list[list[int]], tokens: int) -> dict[str, Any]:
    plain = decode(target, None, prompts, sampling=Sampling(), max_new_tokens=tokens).answers
    theirs = [generated(target, prompt, tokens, target.end_ids)[0] for prompt in prompts]
    same = sum(a.ids == b for a, b in zip(plain, theirs, strict=True))
    return {
        "passed": same == len(prompts),
        "found": f"{same} of {len(prompts)} answers of plain decoding identical to those of "
        f"transformers' generate in {_name(target.dtype)}",
    }


def generated(
    target: Target, prompt: list[int], tokens: int, ends: frozenset[int]
) -> tuple[list[int], float]:
    """The greedy answer of transformers' generate, and its seconds. The model's own
    generation_config steps aside: its penalties would hold for one side only."""
    from transformers import GenerationConfig

    model = target.model
    ids_1T = torch.tensor([prompt], device=target.device)
    plain = GenerationConfig(
        do_sample=False, use_cache=True, max_new_tokens=tokens, pad_token_id=0,
        eos_token_id=sorted(ends) or None,
    )  # fmt: skip
    own, model.generation_config = model.generation_config, plain
    try:
        begin = time.perf_counter()
        out_1T = model.generate(ids_1T, attention_mask=torch.ones_like(ids_1T))
        answer = out_1T[0, len(prompt) :].tolist()  # which waits for the device
        return answer, time.perf_counter() - begin
    finally:
        model.generation_config = own


def _length(ids: list[int], end_ids: frozenset[int]) -> int:
    """Tokens up to and with the first end id."""
    return next((n + 1 for n, token in enumerate(ids) if token in end_ids), len(ids))


def _miscounted(
    ids: list[int], drafted: list[int], accepted: list[int], ends: frozenset[int], limit: int
) -> str:
    """What is wrong with an answer and its rounds; "" if nothing."""
    length, made = _length(ids, ends), sum(accepted) + len(accepted)
    if length < len(ids):
        return f"{len(ids) - length} tokens stand behind an end id"
    if len(ids) > limit or (len(ids) < limit and not set(ids[-1:]) & ends):
        return f"an answer of {len(ids)} tokens has neither an end id nor the limit of {limit}"
    if any(a > d for a, d in zip(accepted, drafted, strict=True)):
        return "a round accepted more than was drafted"
    if not made - accepted[-1] - 1 < len(ids) <= made:
        return (
            f"{len(accepted)} rounds that accepted {sum(accepted)} cannot bring {len(ids)} tokens"
        )
    return ""


def full_rounds(answers: list[Answer], gamma: int) -> float:
    """The fewest rounds that drafts of gamma allow, over those that there were."""
    return sum(-(-len(a.ids) // (gamma + 1)) for a in answers) / sum(
        len(a.accepted) for a in answers
    )


def _equal(plain: Decoded, other: Decoded, who: str, target: Target) -> dict[str, Any]:
    same = sum(a.ids == b.ids for a, b in zip(plain.answers, other.answers, strict=True))
    whose = "the changed target's" if isinstance(target, Adapted) else "the target's"
    return {
        "passed": same == len(plain.answers),
        "found": f"{same} of {len(plain.answers)} greedy answers with {who} identical to {whose} "
        f"own in {_name(target.dtype)}; tau {_tau(other):.2f}",
    }


def _acceptance(done: Decoded) -> float:
    drafted = sum(sum(a.drafted) for a in done.answers)
    return sum(sum(a.accepted) for a in done.answers) / max(1, drafted)


def _tau(done: Decoded) -> float:
    return done.tokens / max(1, sum(len(a.accepted) for a in done.answers))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")

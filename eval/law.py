"""Whether sampled answers follow the target's own law, on the real model (decoding.md (g), 6).

Answers of draft-and-verify and of plain decoding are two samples; if both come from the same law,
it does not matter which is which. The test exchanges them within each prompt and looks at the
sequences' log-probabilities under the target, at their lengths and at how much the drafter favours
their first tokens: a wrong rule lets too many of its guesses through, or too few, and may yet leave
log-probabilities where they were.

Shapes: B answers decoded together, T their tokens, M tokens of a pass, V vocabulary, R exchanges,
n answers of a prompt in both arms, C kinds of answers. p is the target's law, q the drafter's.
"""

from collections.abc import Callable, Sized
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from decoding.loop import State, decode
from decoding.round import Draft, Seen
from decoding.sampling import Sampling
from decoding.target import Target
from decoding.verify import Rule
from drafters.base import Drafter

Array = NDArray[np.float64]

PROMPTS = 4
LEAD = 3  # tokens of an answer that are drawn beforehand, for both arms alike
DUE = 2000  # answers of each arm that the protocol asks for
LEVEL = 1e-4  # of the three statistics together: a third of it each (Bonferroni)
EXCHANGES = 40_000  # p cannot be less than 1 / (1 + this), which must be below that third
ENOUGH = 20  # exchanges as extreme as what was seen: p is then known well enough
TOGETHER = 256
FLOATS = 2**24  # most of the numbers B x M x V that verification holds at once
WIDEST = 8  # M that this reckons with
KINDS = 8  # of first tokens, each of about this share of the target's law

Distance = tuple[Array, Callable[[Array], Array]]
"""Signs [n] of the answers to one prompt (+1/n in an arm, -1/n in the other), and the distance [R]
of the arms that rows of signs [R, n] make."""


def compare(
    target: Target,
    drafter: Drafter,
    prompts: list[list[int]],
    sampling: Sampling,
    *,
    samples: int = DUE,
    tokens: int = 12,
    rule: Rule | None = None,
) -> dict:
    """{passed, found, p_values, n}: answers with the drafter against plain ones, `samples` of each
    behind the shortest of the prompts, at most `tokens` tokens long; 0 samples test nothing.

    Raises ValueError at temperature 0, where there is no law to test.
    """
    if sampling.greedy:
        raise ValueError("the sampling law is tested at a temperature above 0; it is 0")
    if samples < 1:
        said = "not tested on this model: its number of samples is 0"
        return {"passed": True, "found": said, "p_values": {}, "n": 0}
    some = [_led(target, p, sampling) for p in sorted(prompts, key=len)[:PROMPTS]]
    each = -(-samples // len(some))
    distances: dict[str, list[Distance]] = {"log-probability": [], "length": [], "first token": []}
    for number, prompt in enumerate(some):
        a, b = (
            _answers(target, ours, prompt, sampling, tokens, rule, range(begin, begin + each))
            for ours, begin in ((None, 2 * each * number), (drafter, 2 * each * number + each))
        )
        logs = (_log_law(target, prompt, answers, sampling) for answers in (a, b))
        distances["log-probability"].append(energy(*logs))
        distances["length"].append(energy(*(np.array([*map(len, ids)]) for ids in (a, b))))
        kind_V = favoured(target, drafter, prompt, sampling)
        firsts = (kind_V[[ids[0] for ids in answers]] for answers in (a, b))
        distances["first token"].append(counts(*firsts))
    rng = np.random.default_rng(sampling.seed)
    p = {name: p_value(each_prompt, rng) for name, each_prompt in distances.items()}
    return {
        "passed": min(p.values()) >= LEVEL / len(p),
        "found": _said(p, each * len(some), len(some), sampling, tokens),
        "p_values": p,
        "n": each * len(some),
    }


def p_value(distances: list[Distance], rng: np.random.Generator) -> float:
    """Permutation p-value of the hypothesis that the arms have one law, whose statistic is the sum
    of the distances; exchanges happen within a prompt.

    Drawn until ENOUGH exchanges are as extreme as the data (Besag and Clifford 1991), EXCHANGES at
    most: cheap unless p is small.
    """
    seen = sum(float(distance(sign_n[None])[0]) for sign_n, distance in distances)
    extreme = drawn = 0
    while drawn < EXCHANGES and extreme < ENOUGH:
        R = min(1000 if drawn else 100, EXCHANGES - drawn)
        total_R = np.zeros(R)
        for sign_n, distance in distances:
            total_R += distance(rng.permuted(np.broadcast_to(sign_n, (R, len(sign_n))), axis=1))
        extreme += int((total_R >= seen * (1 - 1e-9) - 1e-12).sum())  # equal up to rounding
        drawn += R
    return (1 + extreme) / (1 + drawn)


def energy(a: Array, b: Array) -> Distance:
    """Of numbers: the energy distance (Szekely and Rizzo 2004), which sees location, spread and
    shape; half of it is the integral of the squared difference of the distribution functions. In
    units of the numbers' deviation, times n, so that larger samples count for more."""
    values_n = np.concatenate([a, b]).astype(np.float64)
    order = np.argsort(values_n, kind="stable")
    scale = values_n.std() or 1.0
    gap_n = np.diff(values_n[order], append=values_n.max()) / scale

    def distance(sign_Rn: Array) -> Array:
        return np.cumsum(sign_Rn, axis=1) ** 2 @ gap_n * len(gap_n)

    return _signs(a, b)[order], distance


def counts(a: NDArray[np.int64], b: NDArray[np.int64]) -> Distance:
    """Of kinds: chi-square of how often each occurs."""
    _, kind_n = np.unique(np.concatenate([a, b]), return_inverse=True)
    member_nC = np.eye(kind_n.max() + 1)[kind_n]
    weight_C = len(kind_n) / member_nC.sum(0)

    def distance(sign_Rn: Array) -> Array:
        return (sign_Rn @ member_nC) ** 2 @ weight_C

    return _signs(a, b), distance


@torch.inference_mode()
def favoured(
    target: Target, drafter: Drafter, prompt: list[int], sampling: Sampling
) -> NDArray[np.int64]:
    """The kind of each token [V] as the first of an answer, from 0: in the order of q / p, and of
    about 1 / KINDS of p each. q is 1 for what is drafted with certainty."""
    heard = _Heard(drafter, drafter.taps)
    decode(target, heard, [prompt], sampling=sampling, max_new_tokens=1)
    logits_V = target.logits(target(torch.tensor([prompt], device=target.device)).hidden_BTD[0, -1])
    p_V = sampling.law(logits_V).double().cpu()
    q_V = torch.zeros_like(p_V)
    draft = heard.draft
    if draft is not None and draft.q_BMV is not None:
        q_V = draft.q_BMV[0, 0].double().cpu()
    elif draft is not None:
        at_root = (draft.parents_BN[0, : draft.size[0]] == -1).cpu()
        q_V[draft.ids_BN[0, : draft.size[0]].cpu()[at_root]] = 1
    order = (q_V / p_V.clamp(min=torch.finfo(torch.float32).tiny)).argsort(descending=True)
    kind_V = np.empty(len(p_V), dtype=np.int64)
    before_V = (p_V[order].cumsum(0) - p_V[order]).numpy()
    kind_V[order.numpy()] = np.minimum(before_V * KINDS, KINDS - 1).astype(np.int64)
    return kind_V


@dataclass
class _Heard:
    """A drafter whose first draft is kept."""

    drafter: Drafter
    taps: tuple[int, ...]
    draft: Draft | None = None

    def start(self, *arguments: Any) -> State:
        return self.drafter.start(*arguments)

    def propose(self, state: Any, seen: Seen, target: Target) -> Draft:
        draft = self.drafter.propose(state, seen, target)
        self.draft = self.draft or draft
        return draft


def _signs(a: Sized, b: Sized) -> Array:
    return np.concatenate([np.full(len(a), 1 / len(a)), np.full(len(b), -1 / len(b))])


def _led(target: Target, prompt: list[int], sampling: Sampling) -> list[int]:
    """The prompt and the first tokens of an answer to it: at the very first, any of thousands may
    follow, and a drafter knows it, so that a wrong rule would have little to do."""
    drawn = decode(target, None, [prompt], sampling=sampling, max_new_tokens=LEAD).answers[0]
    return prompt if drawn.ended else prompt + drawn.ids


def _answers(
    target: Target,
    drafter: Drafter | None,
    prompt: list[int],
    sampling: Sampling,
    tokens: int,
    rule: Rule | None,
    requests: range,
) -> list[list[int]]:
    """One answer a request, as many together as memory allows: verification holds the law at every
    node."""
    size = max(1, min(TOGETHER, FLOATS // (WIDEST * target.shape.vocab_size)))
    found = []
    for begin in range(requests.start, requests.stop, size):
        some = list(range(begin, min(begin + size, requests.stop)))
        done = decode(
            target, drafter, [prompt] * len(some), sampling=sampling, max_new_tokens=tokens,
            rule=rule, requests=some,
        )  # fmt: skip
        found += [answer.ids for answer in done.answers]
    return found


@torch.inference_mode()
def _log_law(
    target: Target, prompt: list[int], answers: list[list[int]], sampling: Sampling
) -> Array:
    """Each answer's log-probability after `prompt` under the processed law: the prompt is read
    once, the answers in one pass over all their tokens."""
    found = []
    size = max(1, FLOATS // (max(map(len, answers)) * target.shape.vocab_size))
    for begin in range(0, len(answers), size):
        some = answers[begin : begin + size]
        count, longest = [len(a) for a in some], max(map(len, some))
        ids_BT = torch.tensor([a + [0] * (longest - len(a)) for a in some], device=target.device)
        cache = target.new_cache(1, len(prompt) + longest)
        ids_1S = torch.tensor([prompt], device=target.device)
        target.prefill(ids_1S, [len(prompt)], cache)
        cache.select([0] * len(some))
        draft = Draft.chain(ids_BT[:, :-1], [longest - 1] * len(some))
        root_B = ids_1S[0, -1].expand(len(some))
        p_BTV = sampling.law(target.score(root_B, draft, cache).logits_BMV)
        p_BT = p_BTV.gather(2, ids_BT[:, :, None])[:, :, 0].double()
        found.append(_sums(p_BT.clamp(min=torch.finfo(torch.float32).tiny).log(), count))
    return np.concatenate(found)


def _sums(log_BT: Tensor, count: list[int]) -> Array:
    """Over each row's own tokens."""
    within_BT = torch.arange(log_BT.shape[1]) < torch.tensor(count)[:, None]
    return (log_BT.cpu() * within_BT).sum(1).numpy()


def _said(p: dict[str, float], n: int, prompts: int, sampling: Sampling, tokens: int) -> str:
    values = ", ".join(f"{name} p = {value:.2g}" for name, value in p.items())
    few = "" if n >= DUE else f"; with fewer than {DUE:,} only coarse faults show"
    return (
        f"{n:,} answers with the drafter and {n:,} without, to {prompts} prompts at "
        f"T={sampling.temperature:g}, up to {tokens} tokens long: {values} "
        f"(each must be at least {LEVEL / len(p):.0e}){few}"
    )

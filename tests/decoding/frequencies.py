"""What decode() emits, counted and compared with the exact law of the target."""

from typing import Any

import numpy as np
import torch
from law import Block_, reference_law
from scipy.stats import chi2

from decoding.loop import decode
from decoding.sampling import Sampling
from decoding.target import Target
from decoding.verify import Rule


def exact_law(
    target: Target, prompt: list[int], length: int, sampling: Sampling
) -> dict[Block_, float]:
    """Every continuation's probability, from the target's plain forward pass."""
    vocab = target.shape.vocab_size
    law: dict[Block_, float] = {(): 1.0}
    for _ in range(length):
        prefixes = list(law)
        ids = torch.tensor([[*prompt, *prefix] for prefix in prefixes])
        with torch.inference_mode():
            p = reference_law(target.logits(target(ids).hidden_BTD[:, -1]), sampling)
        law = {
            (*prefix, token): law[prefix] * p[row, token]
            for row, prefix in enumerate(prefixes)
            for token in range(vocab)
        }
    return law


def p_value(
    target: Target,
    drafter: Any,
    prompts: list[list[int]],
    sampling: Sampling,
    *,
    rule: Rule | None = None,
    length: int = 4,
    n: int = 8_000,  # with which the wrong rules of test_law.py fail
    batch: int = 2_000,
) -> float:
    """G-test of the first `length` tokens of n requests, all prompts together, on `exact_law`."""
    laws = [exact_law(target, prompt, length, sampling) for prompt in prompts]
    counts: list[dict[Block_, int]] = [{} for _ in prompts]
    for begin in range(0, n, batch):
        numbers = list(range(begin, min(n, begin + batch)))
        answers = decode(
            target,
            drafter,
            [prompts[i % len(prompts)] for i in numbers],
            sampling=sampling,
            max_new_tokens=length,
            end_ids=frozenset(),
            rule=rule,
            requests=numbers,
        ).answers
        for i, answer in zip(numbers, answers, strict=True):
            seen = counts[i % len(prompts)]
            seen[tuple(answer.ids)] = seen.get(tuple(answer.ids), 0) + 1
    return g_test(
        [c.get(key, 0) for law, c in zip(laws, counts, strict=True) for key in law],
        [p * sum(c.values()) for law, c in zip(laws, counts, strict=True) for p in law.values()],
        groups=len(prompts),
    )


def g_test(observed: list[int], expected: list[float], groups: int = 1) -> float:
    """p-value; cells with an expectation below 5 are merged with their like. 0 if the impossible
    was observed."""
    seen, due = np.array(observed, dtype=float), np.array(expected)
    if seen[due == 0].any():
        return 0.0
    order = np.argsort(due[due > 0], kind="stable")
    seen, due = seen[due > 0][order], due[due > 0][order]
    cells: list[list[float]] = [[0.0, 0.0]]
    for s, d in zip(seen, due, strict=True):
        cells[-1][0] += s
        cells[-1][1] += d
        if cells[-1][1] >= 5:
            cells.append([0.0, 0.0])
    last = cells.pop()
    cells[-1] = [cells[-1][0] + last[0], cells[-1][1] + last[1]]
    o, e = np.array(cells).T
    g = 2 * np.sum(o[o > 0] * np.log(o[o > 0] / e[o > 0]))
    return float(chi2.sf(g, len(cells) - groups))

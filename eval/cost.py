"""What a pass costs on this device: the target's over several tokens, the drafter's by level.

Shapes: B batch, W nodes of a level.
"""

import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch

from decoding.round import Draft
from decoding.sampling import Dice, Sampling
from decoding.target import Target
from decoding.verify import OneHot
from drafters.heads import Heads


@torch.inference_mode()
def pass_milliseconds(model: Target, tokens: int, context: int = 64, repeats: int = 15) -> float:
    """Median milliseconds to score, verify and keep `tokens` tokens behind `context` committed
    ones: a draft of one token fewer, as a tree."""
    ids = torch.arange(context, device=model.device)[None] % model.shape.vocab_size
    cache = model.new_cache(1, context + 2 * tokens)
    model.prefill(ids, [context], cache)
    draft = Draft.chain(ids[:, : tokens - 1], [tokens - 1])
    draft.is_chain = tokens == 1
    dice, times = Dice(Sampling(), [0], [context]), []
    for _ in range(repeats):
        begin = time.perf_counter()
        scored = model.score(ids[:, -1], draft, cache)
        model.keep(draft, scored, OneHot()(scored, draft, dice), cache)
        if model.device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - begin)
        cache.length = [context - 1]
    return median(times) * 1000


@torch.inference_mode()
def level_milliseconds(
    model: Target, drafter: Heads, widths: list[int], context: int = 64, repeats: int = 9
) -> tuple[float, dict[int, float]]:
    """Median milliseconds of a drafter's first level (with reading one committed pair), and of a
    further level of so many asked nodes, each with the choice of its best guesses."""
    ids = torch.arange(context, device=model.device)[None] % model.shape.vocab_size
    cache = model.new_cache(1, context + 64)
    sampling = Sampling()
    seen = model.prefill(ids, [context], cache, drafter.taps)
    state = drafter.start(model, cache, sampling, [0], context + 8)
    first: list[float] = []
    ranks = min(8, model.shape.vocab_size)
    later: dict[int, list[float]] = {width: [] for width in widths}
    drafter.ask(state, seen, model, Dice(sampling, [0], seen.length)).begin()
    for _ in range(repeats):
        for width in widths:
            newest = seen.select([0])
            newest.ids_BS, newest.count = newest.ids_BS[:, -1:], [1]
            newest.hidden_BSD = newest.hidden_BSD[:, -1:]
            if newest.taps_BSLD is not None:
                newest.taps_BSLD = newest.taps_BSLD[:, -1:]
            growth = drafter.ask(state, newest, model, Dice(sampling, [0], seen.length))
            first.append(_timed(model, lambda: growth.begin().topk(ranks)))  # noqa: B023
            drafted = torch.zeros(1, width, dtype=torch.long, device=model.device)
            asked = (drafted, torch.zeros_like(drafted), 1)
            later[width].append(_timed(model, lambda: growth.deepen(*asked).topk(ranks)))  # noqa: B023
    return median(first), {width: median(times) for width, times in later.items()}


def _timed(model: Target, work: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    work()
    if model.device.type == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - begin) * 1000

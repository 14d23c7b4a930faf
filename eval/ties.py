"""Where two greedy answers part: at a near-tie of the target, or because something is wrong.

Scoring a draft is a pass over M = gamma + 1 tokens, plain decoding a pass over one. In bf16 the two
round differently, and so do the keys and values that each of them leaves in the cache; where two
tokens are almost equally likely, either may then win (decoding.md (g), point 5).

Shapes: R rows (copies of one request), M tokens of a pass, V vocabulary.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import chain, repeat
from typing import Any

import torch
from torch import Tensor

from decoding.round import Draft
from decoding.target import Target

PLAIN = "autoregressive"
SHOWN = 5  # divergences of an arm that are listed
WORSE = 4  # times the error of a narrow pass: what the width of a pass cannot explain


@dataclass(frozen=True)
class Replay:
    """What the target says where two answers part, in logits.

    gap: how far the exact target puts the less likely of the two tokens below its likeliest (its
    top-2 gap where these are the two). moved: the largest change of a logit between the deployed
    passes of one token and of M; narrow_error, wide_error: the largest distance of each of the two
    from the exact logits. repeated: made again, they choose the two tokens.
    """

    gap: float
    moved: float
    narrow_error: float
    wide_error: float
    repeated: bool

    @property
    def explains(self) -> bool:
        """Whether it was rounding: two logits that may each move by `moved` can swap.

        The gap is the exact target's, and the deployed passes may be further from that than from
        each other, so a swap that they repeat is explained too. A wide pass that is much worse
        than the narrow one is no rounding but a fault, whose changes would excuse anything.
        """
        sound = self.wide_error <= WORSE * self.narrow_error
        return sound and (self.gap <= 2 * self.moved or self.repeated)


@dataclass(frozen=True)
class Divergence:
    """The first difference of two answers. A token is None where its answer had ended, and then
    there is no replay: no logit decides that."""

    position: int
    plain: int | None
    other: int | None
    replay: Replay | None = None

    @property
    def tolerated(self) -> bool:
        return self.replay is not None and self.replay.explains


def exact_dtype(dtype: torch.dtype) -> str:
    """The dtype that decides what the target means: fp32 for bf16, fp64 for fp32."""
    return "float32" if dtype.itemsize < 4 else "float64"


def judge(
    model: Target,
    exact: Target,
    prompt: list[int],
    plain: list[int],
    other: list[int],
    *,
    width: int,
    accepted: list[int] | None = None,
    rows: int = 1,
) -> Divergence | None:
    """Where `other` leaves `plain`, greedy answers of `model` to `prompt`; None if nowhere.

    model: the target as deployed. exact: the same in `exact_dtype`. width: tokens of a pass that
    made `other`, gamma + 1. accepted: drafts accepted in each of its rounds (None: all of them).
    rows: requests that were decoded together.

    Both answers are read again as they were made, up to the difference: the cache that a pass reads
    is half of why it rounds differently, and a replay of the last pass alone misses it.
    """
    if plain == other:
        return None
    at = next((i for i, (a, b) in enumerate(zip(plain, other, strict=False)) if a != b), None)
    if at is None:  # one goes on where the other ended
        at = min(len(plain), len(other))
        left = [x[at] if at < len(x) else None for x in (plain, other)]
        return Divergence(at, left[0], left[1])
    before, tokens = plain[:at], [plain[at], other[at]]
    with _full_precision(), torch.inference_mode():
        ids_T = torch.tensor([prompt + before], device=exact.device)
        due_V = exact.logits(exact(ids_T).hidden_BTD[0, -1]).double()
    stood = [n + 1 for n in accepted or []]
    kept, width = chain(stood, repeat(width)), max([width, *stood])
    one_V = _replayed(model, prompt, before, repeat(1), 1, rows)
    many_V = _replayed(model, prompt, before, kept, width, rows)
    replay = Replay(
        gap=float(due_V.max() - due_V[tokens].min()),
        moved=_distance(one_V, many_V),
        narrow_error=_distance(one_V, due_V),
        wide_error=_distance(many_V, due_V),
        repeated=[int(one_V.argmax()), int(many_V.argmax())] == tokens,
    )
    return Divergence(at, plain[at], other[at], replay)


def agreement(
    runs: list[dict[str, Any]],
    prompts: list[list[int]],
    model: Target,
    exact: Target,
    widths: dict[str, int],
) -> dict[str, dict[str, Any]]:
    """Each arm of `widths` against plain decoding, over the rows of runs.jsonl at temperature 0.

    widths: arm -> tokens of its passes, gamma + 1 or a tree's nodes + 1; leave out arms that are
    lossy or change the target. prompts: ids, by the numbers that the rows have.

    Returns arm -> {n, identical, near_ties, wrong, largest_gap, examples}. n counts the prompts of
    each batch size; of its repeats the worst counts. largest_gap: of the near-ties, in logits.
    It costs at most what one more repeat of the answers that differ would.
    """
    greedy = [run for run in runs if run["temperature"] == 0]
    plain = {_place(run): run for run in greedy if run["arm"] == PLAIN}
    found = {}
    for arm, width in widths.items():
        seen: dict[tuple[Any, ...], Divergence | None] = {}
        worst: dict[tuple[int, int], Divergence | None] = {}
        for run in (r for r in greedy if r["arm"] == arm and _place(r) in plain):
            for n, (number, mine) in enumerate(zip(run["prompts"], run["ids"], strict=True)):
                due, batch = plain[_place(run)]["ids"][n], len(run["prompts"])
                key = (batch, number, tuple(due), tuple(mine))
                if key not in seen:
                    seen[key] = judge(
                        model, exact, prompts[number], due, mine, width=width,
                        accepted=run["accepted"][n], rows=batch,
                    )  # fmt: skip
                place = (run["batch"], number)
                worst[place] = max(worst.get(place), seen[key], key=_severity)
        found[arm] = _summary(worst)
    return found


def told(found: dict[str, dict[str, Any]], dtype: torch.dtype) -> dict[str, Any]:
    """What `agreement` found as a control: {passed, found}."""
    name = str(dtype).removeprefix("torch.")
    each = [
        f"{arm} {a['identical']} of {a['n']} identical, {a['near_ties']} at a near-tie, "
        f"{a['wrong']} wrong"
        for arm, a in found.items()
    ]
    return {
        "passed": all(a["wrong"] == 0 for a in found.values()),
        "found": f"greedy answers in {name} against plain decoding: "
        f"{'; '.join(each) or 'no arm was compared'} (wrong must be 0)",
    }


def _summary(worst: dict[tuple[int, int], Divergence | None]) -> dict[str, Any]:
    parted = [(place, d) for place, d in worst.items() if d is not None]
    wrong = [(place, d) for place, d in parted if not d.tolerated]
    ties = [(place, d) for place, d in parted if d.tolerated]
    return {
        "n": len(worst),
        "identical": len(worst) - len(parted),
        "near_ties": len(ties),
        "wrong": len(wrong),
        "largest_gap": max((d.replay.gap for _, d in ties if d.replay), default=None),
        "examples": [
            {"batch": batch, "prompt": number, "tolerated": d.tolerated, **asdict(d)}
            for (batch, number), d in (wrong + ties)[:SHOWN]
        ],
    }


def _severity(divergence: Divergence | None) -> int:
    return 0 if divergence is None else 1 if divergence.tolerated else 2


def _place(run: dict[str, Any]) -> tuple[int, int, int]:
    return run["batch"], run["repeat"], run["group"]


@torch.inference_mode()
def _replayed(
    model: Target,
    prompt: list[int],
    answer: list[int],
    kept: Iterator[int],
    width: int,
    rows: int,
) -> Tensor:
    """Logits [V] of what follows prompt and answer, where the answer was read in passes of `width`
    tokens of which so many were kept each time."""
    ids, at = prompt + answer, len(prompt) - 1
    cache = model.new_cache(1, len(ids) + width)
    model.prefill(torch.tensor([prompt], device=model.device), [len(prompt)], cache)
    cache.select([0] * rows)
    while True:
        block = ids[at : at + width]  # what the answer does not say may be anything: it is later
        ids_M = torch.tensor(block + [0] * (width - len(block)), device=model.device)
        ids_RM = ids_M.expand(rows, width)
        draft = Draft.chain(ids_RM[:, 1:], [width - 1] * rows)
        logits_MV = model.score(ids_RM[:, 0], draft, cache).logits_BMV[0]
        step = next(kept)
        if at + step >= len(ids):
            return logits_MV[len(ids) - 1 - at].double()
        at += step
        cache.length = [at] * rows


def _distance(one_V: Tensor, other_V: Tensor) -> float:
    return float((one_V.to(other_V.device) - other_V).abs().max())


@contextmanager
def _full_precision() -> Iterator[None]:
    """No TF32, and no bf16 inside of fp32 products."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)

"""Where two greedy answers part: at a near-tie of the target, or because something is wrong.

Scoring a draft is a pass over M = gamma + 1 tokens, plain decoding a pass over one. In bf16 the two
round differently, and so do the keys and values that each of them leaves in the cache; where two
tokens are almost equally likely, either may then win (decoding.md (g), point 5).

Shapes: R rows that are decoded together, M tokens of a pass, V vocabulary.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import count
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


@dataclass(frozen=True)
class Made:
    """Answers that were decoded together, by row: the prompts and answers, and of each round the
    tokens drafted (the longest path) and accepted. The other rows matter: with their number, and
    the lengths of their prompts, passes round differently."""

    prompts: list[list[int]]
    answers: list[list[int]]
    drafted: list[list[int]]
    accepted: list[list[int]]

    @classmethod
    def alone(cls, prompt: list[int], answer: list[int], width: int = 1) -> "Made":
        """One answer in passes of `width` tokens that all stand: how, was not told."""
        rounds = [width - 1] * max(1, -(-len(answer) // width))
        return cls([prompt], [answer], [rounds], [rounds])

    @classmethod
    def of(cls, run: dict[str, Any], prompts: list[list[int]]) -> "Made":
        """A row of runs.jsonl; prompts: ids, by the numbers that it has."""
        asked = [prompts[number] for number in run["prompts"]]
        return cls(asked, run["ids"], run["drafted"], run["accepted"])


def exact_dtype(dtype: torch.dtype) -> str:
    """The dtype that decides what the target means: fp32 for bf16, fp64 for fp32."""
    return "float32" if dtype.itemsize < 4 else "float64"


def judge(
    model: Target, exact: Target, plain: Made, other: Made, *, width: int, row: int = 0
) -> Divergence | None:
    """Where a row's answer in `other` leaves the one in `plain`, both greedy answers of `model`;
    None if nowhere.

    model: the target as deployed. exact: the same in `exact_dtype`. width: tokens of a pass that
    made `other`, gamma + 1 or a tree's nodes + 1.

    Both are read again as they were made, up to the difference: the cache that a pass reads is half
    of why it rounds differently, and a replay of the last pass alone misses it.
    """
    due, got = plain.answers[row], other.answers[row]
    if due == got:
        return None
    at = next((i for i, (a, b) in enumerate(zip(due, got, strict=False)) if a != b), None)
    if at is None:  # one goes on where the other ended
        at = min(len(due), len(got))
        left = [x[at] if at < len(x) else None for x in (due, got)]
        return Divergence(at, left[0], left[1])
    tokens = [due[at], got[at]]
    with _full_precision(), torch.inference_mode():
        ids_T = torch.tensor([plain.prompts[row] + due[:at]], device=exact.device)
        due_V = exact.logits(exact(ids_T).hidden_BTD[0, -1]).double()
    one_V = _replayed(model, plain, row, at, 1)
    many_V = _replayed(model, other, row, at, width)
    replay = Replay(
        gap=float(due_V.max() - due_V[tokens].min()),
        moved=_distance(one_V, many_V),
        narrow_error=_distance(one_V, due_V),
        wide_error=_distance(many_V, due_V),
        repeated=[int(one_V.argmax()), int(many_V.argmax())] == tokens,
    )
    return Divergence(at, due[at], got[at], replay)


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
                    made = (Made.of(each, prompts) for each in (plain[_place(run)], run))
                    seen[key] = judge(model, exact, *made, width=width, row=n)
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
def _replayed(model: Target, made: Made, row: int, at: int, width: int) -> Tensor:
    """Logits [V] that chose token `at` of a row's answer, in passes over all rows as they were."""
    ids, here = [p + a for p, a in zip(made.prompts, made.answers, strict=True)], model.device
    last = len(made.prompts[row]) - 1 + at  # the token that they follow
    path = max(map(max, made.drafted))
    roots = [len(prompt) - 1 for prompt in made.prompts]
    cache = model.new_cache(len(ids), max(map(len, ids)) + width)
    padded = torch.tensor(_filled(made.prompts, max(map(len, made.prompts))), device=here)
    model.prefill(padded, [len(prompt) for prompt in made.prompts], cache)
    live = list(range(len(ids)))
    for turn in count():
        drafted = max(made.drafted[r][turn] for r in live)
        M = drafted + 1 if path + 1 >= width or not drafted else width  # a tree is wider than deep
        # what an answer does not say may be anything: it is later
        blocks = _filled([ids[r][roots[r] : roots[r] + M] for r in live], M)
        ids_RM = torch.tensor(blocks, device=here)
        draft = Draft.chain(ids_RM[:, 1:], [M - 1] * len(live))
        logits_RMV = model.score(ids_RM[:, 0], draft, cache).logits_BMV
        if roots[row] + made.accepted[row][turn] >= last:
            return logits_RMV[live.index(row), last - roots[row]].double()
        for r in live:
            roots[r] += made.accepted[r][turn] + 1
        cache.length = [roots[r] for r in live]
        on = [i for i, r in enumerate(live) if turn + 1 < len(made.accepted[r])]
        if len(on) < len(live):
            live = [live[i] for i in on]
            cache.select(on)
    raise AssertionError("the rounds of an answer make all its tokens")


def _filled(rows: list[list[int]], length: int) -> list[list[int]]:
    return [row + [0] * (length - len(row)) for row in rows]


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

"""Where two greedy answers part: at a near-tie of the target, or because something is wrong.

Scoring a draft is a pass over M = gamma + 1 tokens, plain decoding a pass over one. In bf16 the two
round differently, and so do the keys and values that each of them leaves in the cache; where two
tokens are almost equally likely, either may then win (decoding.md (g), point 5).

Shapes: R rows that are decoded together, M tokens of a pass, V vocabulary.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
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
    tokens drafted (the longest path) and accepted; whether drafts were chains. The other rows
    matter: with their number, and the lengths of their prompts, passes round differently."""

    prompts: list[list[int]]
    answers: list[list[int]]
    drafted: list[list[int]]
    accepted: list[list[int]]
    chains: bool = True

    @classmethod
    def alone(cls, prompt: list[int], answer: list[int], width: int = 1) -> "Made":
        """One answer in passes of `width` tokens that all stand: how, was not told."""
        rounds = [width - 1] * max(1, -(-len(answer) // width))
        return cls([prompt], [answer], [rounds], [rounds])

    @classmethod
    def of(cls, run: dict[str, Any], prompts: list[list[int]]) -> "Made":
        """A row of runs.jsonl; prompts: ids, by the numbers that it has."""
        asked = [prompts[number] for number in run["prompts"]]
        chains = [sum(drafted) for drafted in run["drafted"]] == run["nodes"]
        return cls(asked, run["ids"], run["drafted"], run["accepted"], chains)


def exact_dtype(dtype: torch.dtype) -> str:
    """The dtype that decides what the target means: fp32 for bf16, fp64 for fp32."""
    return "float32" if dtype.itemsize < 4 else "float64"


def judge(
    model: Target, exact: Target, plain: Made, other: Made, *, width: int
) -> list[Divergence | None]:
    """Of each row, where its answer in `other` leaves the one in `plain`, both greedy answers of
    `model`; None if nowhere.

    model: the target as deployed. exact: the same in `exact_dtype`. width: tokens of a pass that
    made `other` where it drafted trees: their nodes + 1.

    Where rows part, both batches are read again as they were made, once, up to the last difference:
    the cache that a pass reads is half of why it rounds differently, and a replay of the last pass
    alone misses it.
    """
    pairs = list(zip(plain.answers, other.answers, strict=True))
    places = {
        row: at for row, (due, got) in enumerate(pairs) if (at := _parting(due, got)) is not None
    }
    both = {row: at for row, at in places.items() if at < min(map(len, pairs[row]))}
    one, many = (_replayed(model, made, both, width) if both else {} for made in (plain, other))
    found: list[Divergence | None] = []
    for row, (due, got) in enumerate(pairs):
        if row not in places:
            found.append(None)
            continue
        at = places[row]
        tokens = [answer[at] if at < len(answer) else None for answer in (due, got)]
        before = plain.prompts[row] + due[:at]
        read = row in one and row in many  # not where rounds make fewer tokens than there are
        replay = _compared(exact, before, tokens, one[row], many[row]) if read else None
        found.append(Divergence(at, tokens[0], tokens[1], replay))
    return found


def _parting(due: list[int], got: list[int]) -> int | None:
    """The first place where two answers differ; where one goes on, the end of the other."""
    if due == got:
        return None
    places = (i for i, (a, b) in enumerate(zip(due, got, strict=False)) if a != b)
    return next(places, min(len(due), len(got)))


def _compared(
    exact: Target, before: list[int], tokens: list[int | None], one_V: Tensor, many_V: Tensor
) -> Replay:
    """The two deployed passes beside the exact target's, after these ids."""
    with _full_precision(), torch.inference_mode():
        ids_T = torch.tensor([before], device=exact.device)
        due_V = exact.logits(exact(ids_T).hidden_BTD[0, -1]).double()
    return Replay(
        gap=float(due_V.max() - due_V[tokens].min()),
        moved=_distance(one_V, many_V),
        narrow_error=_distance(one_V, due_V),
        wide_error=_distance(many_V, due_V),
        repeated=[int(one_V.argmax()), int(many_V.argmax())] == tokens,
    )


def agreement(
    runs: list[dict[str, Any]],
    prompts: list[list[int]],
    model: Target,
    exact: Target,
    widths: dict[str, int],
) -> dict[str, dict[str, Any]]:
    """Each arm of `widths` against plain decoding, over the rows of runs.jsonl at temperature 0.

    widths: arm -> tokens of its passes where it drafts trees; leave out arms that are lossy or
    change the target. prompts: ids, by the numbers that the rows have.

    Returns arm -> {n, identical, near_ties, wrong, largest_gap, examples}. n counts the prompts of
    each batch size; of its repeats the worst counts. largest_gap: of the near-ties, in logits.
    It costs at most what the runs with a difference did, once.
    """
    greedy = [run for run in runs if run["temperature"] == 0]
    plain = {_place(run): run for run in greedy if run["arm"] == PLAIN}
    found = {}
    for arm, width in widths.items():
        seen: dict[str, list[Divergence | None]] = {}
        worst: dict[tuple[int, int], Divergence | None] = {}
        for run in (r for r in greedy if r["arm"] == arm and _place(r) in plain):
            due = plain[_place(run)]
            made = Made.of(due, prompts), Made.of(run, prompts)
            if (key := str(made)) not in seen:
                seen[key] = judge(model, exact, *made, width=width)
            for number, parted in zip(run["prompts"], seen[key], strict=True):
                place = (run["batch"], number)
                worst[place] = max(worst.get(place), parted, key=_severity)
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
def _replayed(model: Target, made: Made, places: dict[int, int], width: int) -> dict[int, Tensor]:
    """Of each of these rows the logits [V] that chose the token at its place in the answer, in
    passes over all rows as they were."""
    ids, here = [p + a for p, a in zip(made.prompts, made.answers, strict=True)], model.device
    last = {r: len(made.prompts[r]) - 1 + at for r, at in places.items()}  # what they follow
    roots = [len(prompt) - 1 for prompt in made.prompts]
    cache = model.new_cache(len(ids), max(map(len, ids)) + width)
    padded = torch.tensor(_filled(made.prompts, max(map(len, made.prompts))), device=here)
    model.prefill(padded, [len(prompt) for prompt in made.prompts], cache)
    live, found = list(range(len(ids))), dict[int, Tensor]()
    for turn in range(max(map(len, made.accepted))):
        drafted = max(made.drafted[r][turn] for r in live)
        M = drafted + 1 if made.chains or not drafted else width
        # what an answer does not say may be anything: it is later
        blocks = _filled([ids[r][roots[r] : roots[r] + M] for r in live], M)
        ids_RM = torch.tensor(blocks, device=here)
        draft = Draft.chain(ids_RM[:, 1:], [M - 1] * len(live))
        logits_RMV = model.score(ids_RM[:, 0], draft, cache).logits_BMV
        for place, r in enumerate(live):
            if r in last and roots[r] <= last[r] <= roots[r] + made.accepted[r][turn]:
                found[r] = logits_RMV[place, last[r] - roots[r]].double()
            roots[r] += made.accepted[r][turn] + 1
        if len(found) == len(places):
            break
        cache.length = [roots[r] for r in live]
        on = [i for i, r in enumerate(live) if turn + 1 < len(made.accepted[r])]
        if len(on) < len(live):
            live = [live[i] for i in on]
            cache.select(on)
    return found


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

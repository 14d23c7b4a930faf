"""Decode-validation: tokens per target call on held-out prompts, while a drafter is trained.

A validation loss can fall while the drafter as it will be used stands still, or is broken; this
number is made by the loop that users decode with. Beside it stands what the same rounds would have
brought if the drafter guessed as its training pass judges it, from true tokens. With rounding set
aside the two are equal round for round, so that they differ only where drafting is not what was
trained.

Shapes: N predictions, V vocabulary.
"""

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from decoding.loop import Answer, decode
from decoding.pulse import item
from decoding.sampling import Sampling
from decoding.sharded import Parted, agreed
from decoding.target import Target
from drafters.base import Batch, Look, Prediction, Trained, write_json
from train.engine import ranks, sum_over_ranks
from train.guard import STOP

PROMPTS = 64
NEW_TOKENS = 32
CHAIN = 5  # tokens drafted a round, or as many as there are heads: what training makes must not
# depend on settings that it does not depend on (draft_length, tree, stop_below)
TOGETHER = 16  # prompts of a batch, since their caches stand beside the training's memory
PASSED = 4  # answers of a training pass, each twice as long as when it is decoded
CHUNK = 256  # predictions whose logits are held at once
PLATEAU = 0.02  # a drafter whose last quarter added more was still learning
COSTLY = 0.1  # share of the time from which validation is worth a word
FEW = 8  # prompts below which a disagreement shows nothing
GAP = 1.1  # a ratio that rounding, in bf16 too, does not make
WIDE = 3.0  # standard errors, and not 2: a run asks at every validation

Sums = dict[str, float]
SUMS = (
    *("n", "rounds", "tokens", "expected", "tokens^2", "tokens expected", "expected^2"),
    *("first", "first expected"),  # rounds whose first guess was right
)  # over answers, and no means, so that ranks can add theirs


def keep_prompts(file: Path, rows: Iterable[Mapping[str, Any]], longest: int) -> None:
    """Writes the first prompts, each once, of answers that are held out for validation."""
    ids = [row["prompt_ids"] for row in rows if "prompt_ids" in row]
    fitting = dict.fromkeys(tuple(prompt) for prompt in ids if len(prompt) <= longest)
    write_json(file, list(fitting)[:PROMPTS])


class Decoded:
    """Decodes the kept prompts greedily with plain chains of the drafter, each rank its share."""

    def __init__(self, target: Target, file: Path) -> None:
        self.target = target
        prompts = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else []
        # a prompt of one token has no state before it, and no training pass judges its answer so
        self.prompts: list[list[int]] = sorted((p for p in prompts if len(p) > 1), key=len)

    @torch.inference_mode()
    def __call__(self, drafter: Trained) -> tuple[dict[str, float], str | None]:
        """Tokens per target call, decoded (validation_tau) and as training judges the drafter
        (validation_expected_tau), and a sentence where the two disagree; {} without prompts that
        fit both models."""
        most = min(self.target.shape.max_positions, drafter.max_positions) - NEW_TOKENS
        prompts = [prompt for prompt in self.prompts if len(prompt) <= most]
        if not prompts:
            return {}, None
        rank, world = ranks()
        together = isinstance(self.target, Parted)  # then all ranks make the same passes
        mine = prompts if together else prompts[rank::world]
        chain = min(CHAIN, getattr(drafter, "deepest", None) or CHAIN)
        sums = dict.fromkeys(SUMS, 0.0)
        with plain_chains(drafter, chain):
            most = len(prompts[::world]) if not together else len(prompts)
            for at in range(0, most, TOGETHER):
                STOP.check()  # as often on a rank that has fewer
                if not (here := mine[at : at + TOGETHER]):
                    continue
                with item("decoding for validation"):
                    done = decode(
                        self.target, drafter, here, sampling=Sampling(), max_new_tokens=NEW_TOKENS
                    )
                    judged = self._judged(drafter, here, done.answers)
                for answer, right in zip(done.answers, judged, strict=True):
                    rounds = rounds_of(len(answer.ids), answer.accepted, right, chain)
                    found = counted(rounds)
                    sums = {key: sums[key] + found[key] for key in SUMS}
        # every rank must come to the same decision
        sums = agreed(self.target, sums) if together else sum_over_ranks(sums)
        taus = {
            "validation_tau": sums["tokens"] / sums["rounds"],
            "validation_expected_tau": sums["expected"] / sums["rounds"],
        }
        return taus, disagreement(sums)

    def _judged(
        self, drafter: Trained, prompts: list[list[int]], answers: list[Answer]
    ) -> list[list[list[bool]]]:
        """For each answer and draft position, which of the answer's tokens the drafter's training
        pass has right by its own labels."""
        pairs = [(p, a.ids) for p, a in zip(prompts, answers, strict=True)]
        found = []
        for at in range(0, len(pairs), PASSED):
            found += judged(drafter, self.target, pairs[at : at + PASSED])
        return found


@contextmanager
def plain_chains(drafter: Trained, length: int) -> Iterator[None]:
    """The drafter drafts chains of this length and no trees, and its training pass unrolls as many
    positions; what it was set to comes back afterwards."""
    plain = {"draft_length": length, "stop_below": 0.0, "tree": None, "steps": length}
    before = {name: getattr(drafter, name) for name in plain if hasattr(drafter, name)}
    try:
        for name in before:
            setattr(drafter, name, plain[name])
        yield
    finally:
        for name, value in before.items():
            setattr(drafter, name, value)


def judged(
    drafter: Trained, target: Target, answers: list[tuple[list[int], list[int]]]
) -> list[list[list[bool]]]:
    """See `Decoded._judged`. Each answer stands behind another document, as in packed sequences.

    The labels are the drafter's own, so that it is judged as it is trained, even if it learns the
    wrong tokens. They are laid on the answer from its end: the first may lack a state to be
    predicted from.
    """
    documents = [prompt + answer for prompt, answer in answers]
    others = [documents[b - 1] for b in range(len(documents))]
    rows = [(other + p, answer) for other, (p, answer) in zip(others, answers, strict=True)]
    batch = Batch.of(rows, target.device)
    for b, other in enumerate(others):
        batch.doc_BT[b, : len(other)] = -2  # neither this answer's document nor padding
    found: dict[int, list[list[bool]]] = {}

    def look(prediction: Prediction, head: Target | None) -> None:
        right_N = _right(prediction, head)
        found[prediction.position] = [
            _from_the_end(right_N[prediction.row_N == b].tolist(), len(answer))
            for b, (_, answer) in enumerate(answers)
        ]

    drafter(batch, target, Look(look))
    positions = sorted(k for k in found if k >= 0)  # -1 is a changed target's own
    return [[found[k][b] for k in positions] for b in range(len(answers))]


def _from_the_end(right: list[bool], tokens: int) -> list[bool]:
    return ([False] * tokens + right)[-tokens:]


def _right(prediction: Prediction, target: Target | None) -> Tensor:
    """Whether the likeliest token is the label, [N]."""
    found = []
    for at in range(0, max(1, len(prediction.labels_N)), CHUNK):
        best_C = prediction.logits(prediction.hidden_ND[at : at + CHUNK], target).argmax(-1)
        if prediction.vocabulary_V is not None:
            best_C = prediction.vocabulary_V[best_C]
        found.append(best_C == prediction.labels_N[at : at + CHUNK])
    return torch.cat(found)


def rounds_of(
    tokens: int, accepted: list[int], right: list[list[bool]], chain: int
) -> list[tuple[int, int]]:
    """For each round of an answer, the guesses that were accepted and those that should have been:
    all before the first wrong one; of both, what stands before the answer's last token.

    right[k][i]: whether guess k of a chain (from 0) is token i, as judged in training; a family
    that is judged at fewer positions goes on as at its last.
    """
    found, at = [], 0
    for taken in accepted:
        left, run = tokens - at - 1, 0
        while run < min(chain, left) and right[min(run, len(right) - 1)][at + run]:
            run += 1
        found.append((min(taken, left), run))
        at += taken + 1
    return found


def counted(rounds: list[tuple[int, int]]) -> Sums:
    """An answer's tokens, decoded and expected (the guesses, and one a round of the target's own),
    and their products."""
    n = len(rounds)
    tokens, expected = n + sum(a for a, _ in rounds), n + sum(e for _, e in rounds)
    first, first_expected = sum(a > 0 for a, _ in rounds), sum(e > 0 for _, e in rounds)
    products = (tokens**2, tokens * expected, expected**2)
    return dict(zip(SUMS, (1, n, tokens, expected, *products, first, first_expected), strict=True))


def disagreement(sums: Sums) -> str | None:
    """A sentence with likely causes when training expects other numbers than decoding gave: by more
    than a tenth, and by more than the noise of a ratio of paired sums (delta method)."""
    n, tokens, expected, rounds = (sums[key] for key in ("n", "tokens", "expected", "rounds"))
    ratio = expected / tokens
    square = sums["expected^2"] - 2 * ratio * sums["tokens expected"] + ratio**2 * sums["tokens^2"]
    wide = WIDE * math.sqrt(max(0.0, square) * n / max(1, n - 1)) / tokens
    if n < FEW or abs(ratio - 1) <= wide or 1 / GAP <= ratio <= GAP:
        return None
    first, due = sums["first"] / rounds, sums["first expected"] / rounds
    return (
        f"judged as in training, from true tokens, the drafter would give {expected / rounds:.2f} "
        f"tokens per target call on {n:.0f} held-out prompts, and decoding them gave "
        f"{tokens / rounds:.2f} ({ratio:.2f} +- {wide:.2f} times): it does not draft as it was "
        f"trained. Its first guess was right in {due:.0%} of the rounds as judged and in "
        f"{first:.0%} as drafted; likely causes: {_causes(first, due)}. "
        "tests/drafters/contract.py compares the two pass by pass (assert_drafted_as_trained)"
    )


def _causes(first: float, due: float) -> str:
    """Where to look, by whether the first guesses already differ."""
    if abs(first - due) > 0.05:
        return (
            "labels shifted by a place, a draft that begins at another token or state of the "
            "target than training, other position ids, a draft vocabulary mapped to other tokens"
        )
    return (
        "a draft that goes on otherwise than training: position ids of drafted tokens, the "
        "features handed from guess to guess, the order of heads, a cache that keeps rejected ones"
    )


def last_quarter(metrics: Path, steps: int) -> float | None:
    """What the last quarter of the steps added to validation_tau, as a share; None if unknown."""
    try:
        lines = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError):  # telemetry that was lost ends no training
        return None
    tau = {line["step"]: line["validation_tau"] for line in lines if "validation_tau" in line}
    before = [step for step in tau if step <= 0.8 * steps]
    if not before or steps not in tau:
        return None
    at = min(before, key=lambda step: abs(step - 0.75 * steps))
    return tau[steps] / tau[at] - 1


def told(found: Mapping[str, float], gain: float | None) -> str:
    """Lines for the end of a run with decode-validation, of what its loop found."""
    said = (
        f"decoded on held-out prompts: {found['validation_tau']:.2f} tokens per target call, "
        f"{found['validation_expected_tau']:.2f} expected from true tokens"
    )
    if gain is not None:
        said += f", {gain:+.1%} in the last quarter of training"
        said += "; it is still learning, so raise schedule.tokens" if gain > PLATEAU else ""
    if found["artifact_step"] != found["steps"]:
        said += (
            f"\nsaved: the drafter of step {found['artifact_step']:.0f} of {found['steps']:.0f}, "
            f"which decoded best of all that were validated: {found['artifact_tau']:.2f}"
        )
    if found.get("validation_share", 0) > COSTLY:
        share = f"{found['validation_share']:.0%}"
        said += f"\nvalidation took {share} of the time: raise validate_every to have less of it"
    return said

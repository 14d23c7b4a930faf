"""Stage `overfit`: a drafter that has learnt a few answers by heart must draft them without fault.

It is asked before the bill (`preflight=overfit`): whatever keeps a drafter from saturating on eight
prompts will keep it from learning on a million, and whatever makes it draft otherwise than it was
trained costs the same share there, where nobody can tell it from a drafter that is merely bad.

BAR lies between what was measured (tests/train/test_overfit.py; acceptance at the worst of four
positions, six answers of a tiny target): healthy families 1.00, all eight (eagle after two thirds
of the steps 0.93; lm and eagle on koen-17m 1.00); a training mask that sees ahead 0.63, taps one
layer off 0.33, two heads in each other's place 0.11, labels one token late 0.05. What this does not
see is a part that a few answers can be learnt without: heads whose biases are dropped after
training still draft all (1.00), which the proof of each export finds (train/layouts/proof.py).
"""

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import count as numbers
from pathlib import Path
from typing import Any

from data.chat import require_template
from data.documents import is_validation
from data.repetition import is_repetitive
from data.sources import Source
from decoding.loop import decode
from decoding.pretrained import Pretrained
from decoding.sampling import Sampling
from decoding.target import Target
from drafters.base import Blueprint, Trained, cast, load, write_json
from drafters.eagle3 import Eagle3
from eval.controls import Failed
from eval.prompts import collect
from train.decoded import judged, plain_chains
from train.distill import Distill
from train.objectives import CE
from train.schedule import AdamW, Schedule
from train.serveable import Engines, Preflight

BAR = 0.9
CHAIN = 4  # positions that are judged, or as many as the family has
ROWS = 4  # sequences of a step
RATE, NARROW = 3e-3, 384  # the learning rate of a target this wide; wider ones learn at less
END: frozenset[int] = frozenset()  # end tokens end nothing: the more there is to learn by heart

Pair = tuple[list[int], list[int]]
"""A prompt, and what the target answers to it."""


@dataclass
class Position:
    """A place in a chain of guesses. drafted: rounds that came to it, the guesses before it being
    accepted; accepted: of them, those where the target took its guess; trained: share of the
    answers' tokens that the training pass has right there by its own labels."""

    drafted: int = 0
    accepted: int = 0
    trained: float = 0.0

    @property
    def rate(self) -> float:
        return self.accepted / max(1, self.drafted)


class Overfit(Preflight):
    """Trains the drafter on the target's own greedy answers to `count` prompts until it knows them,
    by the training stage that the bill is for (train/distill.py), with cross-entropy; then decodes
    the same prompts. At each of the first CHAIN positions of a chain at least BAR of the guesses
    must be accepted, or Failed says where and why.

    engines: names -> Pythons, as in the stage `serve`: the same drafter must be accepted as often
    there. steps: of training; lr: null takes RATE, less for targets wider than NARROW (as 1/width).
    dtype: of target and training; fp32, in which next to no answer parts from its own.
    """

    def __init__(
        self,
        *,
        target: Pretrained,
        drafter: Blueprint,
        prompts: Source,
        engines: dict[str, str | None] | None = None,
        count: int = 8,
        max_prompt_tokens: int = 256,
        max_new_tokens: int = 48,
        steps: int = 300,
        lr: float | None = None,
        dtype: str = "float32",
        seed: int = 0,
    ) -> None:
        if count < 2 or min(max_prompt_tokens, steps) < 1 or max_new_tokens <= CHAIN + 1:
            raise ValueError(
                f"overfit has count {count}, max_prompt_tokens {max_prompt_tokens}, max_new_tokens "
                f"{max_new_tokens}, steps {steps}; count must be at least 2, max_new_tokens above "
                f"{CHAIN + 1}, the others at least 1"
            )
        if target.parallel:
            raise ValueError(
                f"overfit holds the target on one device, and target.parallel is {target.parallel};"
                " leave out preflight=overfit, or set target.parallel=null"
            )
        AdamW(lr=RATE if lr is None else lr)  # its own checks, before anything starts
        Schedule(tokens=1, batch_tokens=1, sequence_length=1, dtype=dtype)  # and its
        self.target, self.drafter, self.prompts = replace(target, dtype=dtype), drafter, prompts
        self.count, self.steps, self.lr, self.dtype, self.seed = count, steps, lr, dtype, seed
        self.max_prompt_tokens, self.max_new_tokens = max_prompt_tokens, max_new_tokens
        self.engines = Engines(
            self.target, prompts, engines, limit=count, max_prompt_tokens=max_prompt_tokens,
            max_new_tokens=max_new_tokens, dtype=dtype,
        )  # fmt: skip

    def run(self, out: Path, *, target: Path | None = None) -> dict[str, float]:
        """Writes artifact/overfit.json; returns tau and the rate of each position. Raises Failed
        when a position stays below BAR, in our loop or in an engine."""
        tokenizer = self.target.tokenizer(target)
        require_template(tokenizer, self.target.path or "the target")
        prompts, _ = collect(
            {"overfit": self.prompts}, tokenizer, limit=self.count, heldout_only=False,
            most_tokens=self.max_prompt_tokens, trained_on=None,
        )  # fmt: skip
        pairs = self._answered(self.target.load(target), [prompt.ids for prompt in prompts])
        self._train(out, pairs, target)
        model = self.target.load(target)
        drafter = load(out / "training" / "artifact", model.shape)
        found, tau = measure(model, cast(drafter, model.dtype).to(model.device), pairs)
        folder = out / "artifact"
        folder.mkdir(exist_ok=True)
        told = [{"acceptance": p.rate, **vars(p)} for p in found]
        write_json(folder / "overfit.json", {"bar": BAR, "tau": tau, "positions": told})
        print(sentence(found, tau, len(pairs)), flush=True)
        if fault := fault_of(found):
            raise Failed(fault)
        del model, drafter  # the device is the engines' now
        trained = out / "training" / "artifact"
        served = self.engines.serve(out / "served", out / "export", trained, target)
        shutil.rmtree(out / "training" / "checkpoints", ignore_errors=True)
        rates = {f"acceptance_{k}": position.rate for k, position in enumerate(found, 1)}
        return {"tau": tau} | rates | served

    def _answered(self, model: Target, prompts: list[list[int]]) -> list[Pair]:
        """The target's own greedy answers. Raises ValueError where most of them repeat themselves:
        then a drafter whose labels are one off learns the same."""
        tokens = self.max_new_tokens
        done = decode(model, None, prompts, sampling=Sampling(), max_new_tokens=tokens, end_ids=END)
        ids = [answer.ids for answer in done.answers]
        repeated = sum(map(is_repetitive, ids))
        if 2 * repeated > len(ids):
            raise ValueError(
                f"{repeated} of {len(ids)} answers of the target repeat themselves, and what is "
                "learnt from them shows nothing; give overfit other prompts "
                "(data@preflight.overfit.prompts=NAME)"
            )
        return list(zip(prompts, ids, strict=True))

    def _train(self, out: Path, pairs: list[Pair], place: Path | None) -> None:
        """Leaves the drafter in out/training/artifact."""
        answers, training = out / "answers", out / "training"
        for folder in (answers, training):
            folder.mkdir(parents=True, exist_ok=True)
        lines = [json.dumps(row) for row in _rows(pairs)]
        (answers / "shard-00000.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
        longest = max(len(prompt) + len(answer) for prompt, answer in pairs)
        width = self.target.shape_of(place).hidden_size
        rate = RATE * min(1.0, NARROW / width) if self.lr is None else self.lr
        Distill(
            target=self.target,
            drafter=self.drafter,
            objective=CE(),
            schedule=Schedule(
                tokens=self.steps * ROWS * longest, batch_tokens=ROWS * longest,
                sequence_length=longest, dtype=self.dtype, seed=self.seed,
            ),
            optim=AdamW(lr=rate, warmup=0.1, weight_decay=0.0),
        ).run(training, target=place, data=answers)  # fmt: skip


def measure(target: Target, drafter: Trained, pairs: list[Pair]) -> tuple[list[Position], float]:
    """Each position of plain greedy chains on answers that the drafter should know, and tau.

    Where an answer parts from the one that was learnt (a near-tie of the target in bf16), it is
    judged up to there: behind that nothing was learnt.
    """
    target = drafter.on(target)
    chain = min(CHAIN, getattr(drafter, "deepest", None) or CHAIN)
    if isinstance(drafter, Eagle3):  # its guesses beyond are of states that training never made
        chain = min(chain, drafter.steps)
    with plain_chains(drafter, chain):
        done = decode(
            target, drafter, [prompt for prompt, _ in pairs], sampling=Sampling(),
            max_new_tokens=max(len(ids) for _, ids in pairs), end_ids=END,
        )  # fmt: skip
        right = judged(drafter, target, pairs)
    found = [Position() for _ in range(chain)]
    for (_, known), answer in zip(pairs, done.answers, strict=True):
        for k, taken in _guesses(_common(known, answer.ids), answer.accepted, chain):
            found[k].drafted += 1
            found[k].accepted += taken
    for k, position in enumerate(found):
        told = [bit for rows in right for bit in rows[min(k, len(rows) - 1)][k:]]
        position.trained = sum(told) / max(1, len(told))
    return found, done.tokens / sum(len(answer.accepted) for answer in done.answers)


def _guesses(tokens: int, accepted: list[int], chain: int) -> Iterator[tuple[int, bool]]:
    """(position, whether it was accepted) of each guess of an answer's first `tokens` tokens that
    the target came to."""
    at = 0
    for taken in accepted:
        for k in range(min(chain, taken + 1, tokens - at)):
            yield k, k < taken
        at += taken + 1


def _common(known: list[int], ids: list[int]) -> int:
    """How many tokens two answers have in common before they part."""
    pairs = enumerate(zip(known, ids, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(known), len(ids)))


def _rows(pairs: list[Pair]) -> Iterator[dict[str, Any]]:
    """Rows as the stage generate leaves them, none of which training would keep for validation."""
    samples: list[Any] = [{"prompt_ids": prompt, "answer_ids": ids} for prompt, ids in pairs]
    names = (f"overfit {n}" for n in numbers())
    trained = (name for name in names if not is_validation({"prompt": name} | samples[0]))
    for name, sample in zip(trained, samples, strict=False):
        yield {"prompt": name, "samples": [sample]}


def sentence(found: list[Position], tau: float, prompts: int) -> str:
    """What was found, for the log."""
    rates = ", ".join(f"{position.rate:.0%}" for position in found)
    return (
        f"overfit: {prompts} answers learnt by heart are drafted with {tau:.2f} tokens per target "
        f"call, of {len(found) + 1} at most; accepted by position, the guesses before it being "
        f"accepted: {rates}"
    )


def fault_of(found: list[Position]) -> str | None:
    """A sentence with likely causes for the first position below BAR; None where all reach it."""
    for k, position in enumerate(found, 1):
        if position.rate >= BAR:
            continue
        head = (
            f"after training on a handful of answers until it should know them, {position.rate:.0%}"
            f" of the drafter's guesses at position {k} are accepted (of {position.drafted}), "
            f"expected at least {BAR:.0%}"
        )
        if position.trained < BAR:
            return (
                f"{head}; its training pass has {position.trained:.0%} right: it has not learnt "
                "them. Likely causes: labels that it cannot predict from what it reads, a mask or "
                "a state that hides the answer so far, weights that no gradient moves, or too "
                "little training for this target (raise preflight.overfit.steps, or set its lr)"
            )
        causes = (
            "labels shifted by a place, a state or tap of another layer or token than in training, "
            "a mask that let training see what comes, a draft vocabulary mapped to other tokens"
            if k == 1
            else "position ids of drafted tokens, features handed from guess to guess, the order "
            "of heads, a mask that let training see what comes"
        )
        return (
            f"{head}; its training pass has {position.trained:.0%} right: it does not draft as it "
            f"was trained. Likely causes: {causes}"
        )
    return None

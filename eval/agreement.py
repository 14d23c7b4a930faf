"""Does another engine say what our decode loop says: the same ids, and as many accepted tokens?

Rows: of each prompt, [drafts, accepted at position 1, 2, ...], counted over its rounds.
Legend of shapes: G prompts, R resamples.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from decoding.loop import decode
from decoding.sampling import Sampling
from decoding.target import Target
from drafters.base import Drafter
from eval.bootstrap import RESAMPLES, Estimate, divide, estimates, resample
from eval.clients import Served
from eval.markdown import interval
from eval.ties import Made, judge

NONE: frozenset[int] = frozenset()
ROUNDING = 1e-9
DEFINITIONS = {
    "tau": "tokens per target call, as in the report: those of the answers, up to their ends, over "
    "the rounds that checked a draft (the first token is left out where an engine has it from the "
    "pass over the prompt); there: the engine's; here: our loop's with the same chain on the same "
    "prompts, with its 95 % bootstrap interval over them",
    "bench": "what the report measured at temperature 0, batch 1: on its own prompts, with its own "
    "shape of draft; null: without a report",
    "accepted_by_position": "the share of drafts whose first, second, ... token was accepted",
    "rounds": "prompts whose drafts and accepted tokens by position are those of our loop; "
    "near_ties: where our loop in a finer dtype parts from itself; in fp32 wrong must be 0; null: "
    "the engine does not tell of each prompt",
    "answers": "their ids against our loop's without a drafter; near_ties: those that a replay in "
    "a finer dtype explains by rounding; wrong must be 0",
}


@dataclass(frozen=True)
class Question:
    """What is asked of our loop and of each engine. plain: our loop's own answers without a
    drafter, up to their ends. Decoding is greedy, a prompt at a time, and brings as many tokens as
    the plain answer has."""

    target: Target
    prompts: list[list[int]]
    plain: list[list[int]]
    draft_length: int

    @classmethod
    def of(
        cls, target: Target, prompts: list[list[int]], max_new_tokens: int, draft_length: int
    ) -> "Question":
        """The question, its plain answers decoded."""
        return cls(target, prompts, answers(target, prompts, max_new_tokens), draft_length)


def answers(target: Target, prompts: list[list[int]], max_new_tokens: int) -> list[list[int]]:
    """The target's own greedy answers, each up to and including its first end token."""
    ends = target.end_ids
    return [_decoded(target, None, prompt, max_new_tokens, ends).ids for prompt in prompts]


def here(
    question: Question,
    drafter: Drafter,
    *,
    drafts_first: bool,
    cuts_last: bool,
    only: list[int] | None = None,
) -> list[list[int]]:
    """Rows of our loop for all prompts, or for those of these numbers, counted as an engine counts
    that drafts the first token or not, and whose last round drafts beyond the answer's end or not.

    Our loop drafts the first token too. Where an engine has it from the pass over the prompt, it is
    given to ours with the prompt: from there on both draft at the same places. An answer of which
    nothing is left then has no rounds.
    """
    rows = []
    positions = range(question.draft_length)
    for number in range(len(question.prompts)) if only is None else only:
        plain = question.plain[number]
        given = [] if drafts_first else plain[:1]
        wanted = len(plain) - len(given)
        if not wanted:
            rows.append([0] * (1 + len(positions)))
            continue
        prompt = question.prompts[number] + given
        accepted = list(_decoded(question.target, drafter, prompt, wanted).accepted)
        if cuts_last:
            accepted[-1] = wanted - sum(n + 1 for n in accepted[:-1]) - 1
        rows.append([len(accepted), *(sum(n > k for n in accepted) for k in positions)])
    return rows


def compared(
    question: Question,
    served: Served,
    rows: list[list[int]],
    finer: Callable[[list[int]], list[list[int]]],
) -> dict[str, Any]:
    """tau there and here, acceptance by position, and `rounds`: whose are the very same.

    rows: of our loop; finer: those of some prompts again, all in the next finer dtype. A prompt
    whose rounds differ is let pass as a near-tie where our own loop parts from itself there.
    `agrees`: tau there lies within the interval of ours (prompts are resampled), and in fp32 or
    finer, where the engine tells of each prompt, no rounds are wrong. The interval alone would let
    pass a tap that is one off.
    """
    tau, *positions = _estimates(rows, [len(ids) - served.given for ids in question.plain])
    there, low, high = served.accepted, tau["low"], tau["high"]
    found: dict[str, Any] = {
        "tau": {"there": served.tau, "here": tau},
        "drafts": {"there": served.drafts, "here": sum(row[0] for row in rows)},
        "accepted_by_position": {
            "there": there and [n / max(1, served.drafts) for n in there],
            "here": positions,
        },
        "rounds": None,
    }
    agrees = False
    if low is not None and high is not None:  # of equal prompts the interval is a point
        agrees = low - ROUNDING <= served.tau <= high + ROUNDING
    if served.by_prompt is not None:
        pairs = zip(served.by_prompt, rows, strict=True)
        parted = [number for number, (theirs, ours) in enumerate(pairs) if theirs != ours]
        again = finer(parted) if parted else []
        wrong = [n for n, row in zip(parted, again, strict=True) if row == rows[n]]
        found["rounds"] = {
            "n": len(rows),
            "identical": len(rows) - len(parted),
            "near_ties": len(parted) - len(wrong),
            "wrong": len(wrong),
        }
        if question.target.dtype.itemsize >= 4:
            agrees &= not wrong
    return found | {"agrees": agrees}


def equality(
    question: Question, served: Served, exact: Callable[[], Target]
) -> dict[str, dict[str, Any]]:
    """Of the engine's answers without drafting and with it, compared with our plain ones: {n,
    identical, near_ties, wrong, first}. Where one differs it is replayed (eval/ties.py) in the
    target of the next finer dtype, which `exact` loads; only a near-tie is let pass. An engine has
    kernels of its own, whose rounding is taken to be what the width of a pass changes in ours.
    """
    found = {}
    for name, answers in (("plain", served.plain_ids), ("drafting", served.ids)):
        parted = []
        for prompt, plain, other in zip(question.prompts, question.plain, answers, strict=True):
            if other != plain:
                width = question.draft_length + 1
                made = Made.alone(prompt, plain), Made.alone(prompt, other, width)
                parted += judge(question.target, exact(), *made, width=width)
        wrong = [d for d in parted if d is not None and not d.tolerated]
        found[name] = {
            "n": len(answers),
            "identical": len(answers) - len(parted),
            "near_ties": len(parted) - len(wrong),
            "wrong": len(wrong),
            "first": _said(wrong[0].position, wrong[0].plain, wrong[0].other) if wrong else None,
        }
    return found


def faults(row: dict[str, Any]) -> list[str]:
    """What is wrong with a place of the matrix, in sentences."""
    who = f"{row['version']} with {row['family']}/{row['format']}"
    if not row["loaded"]:
        return [f"{who}: {row['error']}"]
    found = [
        f"{who}: {e['wrong']} of {e['n']} answers {how} are not the target's own ({e['first']})"
        for how, e in row["answers"].items()
        if e["wrong"]
    ]
    if not row["agrees"]:
        found.append(
            f"{who}: {_accepted(row)}; the files, or the way the engine reads them, are not the "
            "drafter that was trained (a bias dropped, a tap or a head one off)"
        )
    if row["snippet"] and not row["snippet"]["executed"]:
        found.append(f"{who}: the code that the card shows did not run: {row['snippet']['error']}")
    return found


def told(served: dict[str, Any]) -> list[str]:
    """served.json in lines: one for each engine and format, and one for each that was not run."""
    lines = []
    for row in served["rows"]:
        who = f"serve: {row['family']}/{row['format']} in {row['version']}:"
        if not row["loaded"]:
            lines.append(f"{who} not loaded")
            continue
        equal = [f"{e['identical']} of {e['n']} {how}" for how, e in row["answers"].items()]
        ran = (
            "none" if row["snippet"] is None else "ran" if row["snippet"]["executed"] else "FAILED"
        )
        lines.append(
            f"{who} loaded; answers equal: {', '.join(equal)}; {_accepted(row)}; snippet: {ran}"
        )
    lines += [f"serve: {e['format']} was not run in {e['engine']}: {e['why']}"
              for e in served["not_run"]]  # fmt: skip
    if bench := served["bench"]:
        lines.append(
            f"serve: bench measured {interval(bench['tau'])}, on its own prompts, drafting a "
            f"{bench['draft_shape']}"
        )
    return lines + ([f"serve: {served['nobody']}"] if served["nobody"] else [])


def _accepted(row: dict[str, Any]) -> str:
    here, rounds = row["tau"]["here"], row["rounds"]
    alike = rounds and f", the same rounds in {rounds['identical']} of {rounds['n']} prompts"
    return (
        f"{row['tau']['there']:.3f} tokens per target call there, {interval(here)} in our loop"
        f"{alike or ''}"
    )


def _decoded(
    target: Target,
    drafter: Drafter | None,
    prompt: list[int],
    tokens: int,
    ends: frozenset[int] = NONE,
) -> Any:
    done = decode(
        target, drafter, [prompt], sampling=Sampling(), max_new_tokens=tokens, end_ids=ends
    )
    return done.answers[0]


def _estimates(rows: list[list[int]], tokens: list[int]) -> list[Estimate]:
    """tau, of rounds that brought so many tokens, and the share of drafts whose first, second, ...
    token was accepted."""
    counts_GP, tokens_G1 = np.array(rows, dtype=np.float64), np.array(tokens)[:, None]
    drafts_G1, accepted_GK = counts_GP[:, :1], counts_GP[:, 1:]
    columns = {"top": np.concatenate([tokens_G1, accepted_GK], 1), "drafts": drafts_G1}
    sums = resample(columns, RESAMPLES, seed=0)
    bottom = np.broadcast_to(sums["drafts"], sums["top"].shape)
    return estimates(divide(sums["top"], bottom), len(rows))


def _said(position: int, plain: int | None, other: int | None) -> str:
    return f"token {position + 1} is {other}, expected {plain}"

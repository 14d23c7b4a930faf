"""The runs of a measurement: who is decoded together, in what order, and the rows that are left."""

from collections.abc import Mapping
from pathlib import Path

from tqdm import tqdm

from data.repetition import is_repetitive
from data.sources import prompt_key
from decoding.loop import Decoded
from decoding.ranks import Ranks
from decoding.sampling import Sampling
from eval.arms import Arm
from eval.others import Others
from eval.prompts import Prompt
from eval.ranks import KEYS, Row, Rows

BAR = "{desc}: {percentage:3.0f}% |{bar}| {elapsed} gone, {remaining} left"


def measure(
    arms: Mapping[str, Arm],
    prompts: list[Prompt],
    kept: Path,
    *,
    ranks: Ranks,
    cells: list[tuple[int, float]],
    repeats: int,
    seed: int,
    max_new_tokens: int,
) -> list[Row]:
    """Every run, arms in turn on each group of prompts, another one first each time; cells are
    (batch, temperature).

    Each rank records its share; a warm arm's runs depend on those before, so each makes them all.
    Runs that stand in `kept` already are not made again, but for those of a warm arm whose repeat
    was cut short: what it had learnt went with the process. A single rank notes what others did
    on the machine meanwhile; of several each would take the rest for others.
    """
    others = Others() if ranks.world == 1 else None
    with (
        Rows(kept, ranks, arms=list(arms), cells=cells) as rows,
        tqdm(total=len(cells) + 1e-6, desc="bench", bar_format=BAR, disable=not ranks.first) as bar,
    ):
        for batch, temperature in cells:
            groups = groups_of(prompts, batch, temperature, rows.rows)
            if not groups and ranks.first:
                tqdm.write(f"batch {batch} at T={temperature:g}: not measured, too few prompts")
            for arm in arms.values() if groups else []:  # warm-up: not counted
                together = [prompts[i] for i in groups[0]]
                arm.answer(together, Sampling(temperature=temperature, seed=seed), max_new_tokens)
            for repeat in range(repeats):
                sampling = Sampling(temperature=temperature, seed=seed + repeat)
                places = {
                    name: [(name, temperature, batch, repeat, n) for n in range(len(groups))]
                    for name in arms
                }
                done = {name: all(place in rows for place in places[name]) for name in arms}
                _forget(arms)
                for number, group in enumerate(groups):
                    first = number % len(arms)
                    for name in [*arms][first:] + [*arms][:first]:
                        arm, place = arms[name], places[name][number]
                        mine = ranks.has(number)
                        if done[name] if arm.warm else place in rows or not mine:
                            continue
                        together = [prompts[i] for i in group]
                        answered = arm.answer(together, sampling, max_new_tokens)
                        if mine:
                            made = row(place, group, prompts, answered)
                            rows.add(made | ({"others": others.since()} if others else {}))
                    bar.update(1 / (repeats * len(groups)))
            rows.meet()
        return rows.rows


def _forget(arms: Mapping[str, Arm]) -> None:
    """Each repeat teaches the warm arms anew: a prompt's second run must not know its first."""
    for arm in arms.values():
        if arm.drafter is not None:
            arm.drafter.forget()


def groups_of(
    prompts: list[Prompt], batch: int, temperature: float, runs: list[Row]
) -> list[list[int]]:
    """Indices decoded together: single prompts, or batches of those that are not repetitive."""
    if batch == 1:
        return [[i] for i in range(len(prompts))]
    odd = {
        i
        for run in runs
        if run["batch"] == 1 and run["temperature"] == temperature and run["repetitive"]
        for i in run["prompts"]
    }
    usable = [i for i in range(len(prompts)) if i not in odd]
    return [usable[a : a + batch] for a in range(0, len(usable) - batch + 1, batch)]


def row(
    place: tuple[str, float, int, int, int],
    group: list[int],
    prompts: list[Prompt],
    done: Decoded,
) -> Row:
    """One row of runs.jsonl (eval/report.py reads it)."""
    tasks = {prompts[i].task for i in group}
    return {
        **dict(zip(KEYS, place, strict=True)),
        "prompts": group,
        "task": tasks.pop() if len(tasks) == 1 else "mixed",
        "keys": [prompt_key(prompts[i].text)[:12] for i in group],
        "prompt_tokens": [len(prompts[i].ids) for i in group],
        "ids": [a.ids for a in done.answers],
        "tokens": done.tokens,
        "rounds": done.rounds,
        "row_rounds": sum(len(a.accepted) for a in done.answers),
        "seconds": done.seconds,
        "first_seconds": done.first_seconds,
        "first_tokens": done.first_tokens,
        "draft_seconds": done.draft_seconds,
        "verify_seconds": done.verify_seconds,
        "drafted": [a.drafted for a in done.answers],
        "accepted": [a.accepted for a in done.answers],
        "nodes": [a.nodes for a in done.answers],
        "repetitive": any(is_repetitive(a.ids) for a in done.answers),
    }

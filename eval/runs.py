"""The rows of runs.jsonl: who is decoded together, and what a run leaves for the report."""

import json
from pathlib import Path
from typing import Any

from data.repetition import is_repetitive
from decoding.loop import Decoded
from eval.prompts import Prompt

KEYS = ("arm", "temperature", "batch", "repeat", "group")  # what names a run


def groups_of(
    prompts: list[Prompt], batch: int, temperature: float, runs: list[dict[str, Any]]
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


def read(file: Path) -> list[dict[str, Any]]:
    """The runs that an earlier start of this stage made; a line cut short is made again."""
    runs = []
    for line in file.read_text(encoding="utf-8").splitlines() if file.is_file() else []:
        try:
            runs.append(json.loads(line))
        except ValueError:
            continue
    return runs


def row(
    place: tuple[str, float, int, int, int],
    group: list[int],
    prompts: list[Prompt],
    done: Decoded,
) -> dict[str, Any]:
    """One row of runs.jsonl (eval/report.py reads it)."""
    tasks = {prompts[i].task for i in group}
    return {
        **dict(zip(KEYS, place, strict=True)),
        "prompts": group,
        "task": tasks.pop() if len(tasks) == 1 else "mixed",
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
        "repetitive": any(is_repetitive(a.ids) for a in done.answers),
    }

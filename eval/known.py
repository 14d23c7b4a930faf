"""The runs of an output folder's sweeps that laws for plans are fitted to.

They come from the reports (`python -m eval.sweep FOLDER`). A run's setting is a pair of hashes of
what the law has no term for: of its last training and of how drafts were accepted, and of its own
drafter and what that started from.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from eval.ancestry import read_json
from eval.joint import Asked, Interval, Known
from eval.others import much

LAWS = "sweeps/*/report/laws.json"  # in an output folder
AXES = re.compile(
    r"seed|sweep\..*|drafter|drafter[.@].*|stages\.\w+\.(drafter\b.*|schedule\.tokens)"
)
ENDS = ("low", "high")
# of a run's held configuration (eval/ancestry.py), of the last training and of bench
TRAINING = re.compile(
    r"drafter\.(objective|optim|schedule|data|init|validate_every)\b.*|(typical|stop_below)\b.*"
)
# what the law has terms for, or is a fact of the target; a cache holds what the target says
MODELLED = re.compile(
    r"(.*\.)?(schedule\.(tokens|compile)|drafter\.(layers|width|parameters)|(target|cache)\..*)"
)
NOT_GIVEN = ("null", "0.0")  # as if the key were not there


def settings(held: Mapping[str, str]) -> tuple[str, str]:
    """Of a run's held configuration: twelve hex digits each of its last training with bench's way
    to accept, and of the rest of its drafter."""
    facts = {k: v for k, v in held.items() if not MODELLED.fullmatch(k) and v not in NOT_GIVEN}
    last = {key: value for key, value in facts.items() if TRAINING.fullmatch(key)}
    own = {k: v for k, v in facts.items() if k.startswith("drafter.") and k not in last}
    return _mark(last), _mark(own)


def _mark(facts: Mapping[str, str]) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:12]


def alike(runs: Sequence[Known], setting: tuple[str, str]) -> list[Known]:
    """Those that may stand in one law: on the same prompts, with the setting that is asked for, or
    where no run has it with the commonest; the second half of a setting so within each kind."""
    first, own = setting
    asked = [run for run in runs if first and run.setting[0] == first]
    mine = _most([run.prompts for run in asked or runs], asked or runs)
    mine = _most([run.setting[0] for run in mine], mine)
    found: list[Known] = []
    for kind in dict.fromkeys(run.of.kind for run in mine):
        same = [run for run in mine if run.of.kind == kind]
        exact = [run for run in same if own and run.setting[1] == own]
        found += exact or _most([run.setting[1] for run in same], same)
    return found


def _most(labels: Sequence[str], runs: Sequence[Known]) -> list[Known]:
    """The runs with the commonest label."""
    most = [label for label, _ in Counter(labels).most_common(1)]
    return [run for run, label in zip(runs, labels, strict=True) if label in most]


def read(root: Path, target: str) -> list[Known]:
    """The runs of all sweeps of an output folder on the target with this hash of its contents, at
    temperature 0 and batch 1, each measurement once; ValueError for a report that is broken.

    Left out are runs that drafted trees, and those of sweeps over what is no term of the law (a
    learning rate, a loss).
    """
    found: dict[str, Known] = {}
    for file in sorted(root.glob(LAWS)):
        try:
            told = json.loads(file.read_text(encoding="utf-8"))
            rows = told["runs"] if told["target"] == target else []
            runs = [known_of(row, file.parents[1].name) for row in rows]
        except (OSError, ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
            raise ValueError(
                f"{file} is not the report of a sweep ({error!r}): write it anew with "
                f"`python -m eval.sweep {file.parents[1]}`"
            ) from None
        for run in filter(None, runs):
            found.setdefault(run.bench, run)
    return list(found.values())


def untold(root: Path) -> list[str]:
    """A line that names the sweeps of the law's axes with measurements that no report has; [] where
    there are none."""
    told: set[str] = set()
    for file in root.glob(LAWS):
        told |= {str(run.get("bench")) for run in _json(file).get("runs", [])}
    names = [
        f"sweeps/{note.parent.name}"
        for note in sorted(root.glob("sweeps/*/sweep.json"))
        if all(AXES.fullmatch(str(key)) for key in _json(note).get("axes", []))
        and not set(_benches(root, note.parent)) <= told
    ]
    if not names:
        return []
    have = "has no report yet, or an" if len(names) == 1 else "have no report yet, or an"
    first = root / names[0]
    return [f"{', '.join(names)} {have} older one: python -m eval.sweep {first} lets plans predict"]


def _benches(root: Path, sweep: Path) -> Iterator[str]:
    """The names of the measurements that the finished jobs of a sweep left."""
    for job in sweep.glob("jobs/*.json"):
        note = _json(job)
        for place in (note.get("stages") or {}).values() if note.get("code") == 0 else ():
            name = Path(place).name
            if (root / "stages" / name / "artifact" / "report.json").is_file():
                yield name


def _json(file: Path) -> dict[str, Any]:
    """The object in a file; {} where there is none."""
    try:
        return read_json(file, "")
    except ValueError:
        return {}


def _fits(row: Mapping[str, Any]) -> bool:
    """Whether a run was measured, drafted chains, and differs from others in the law's terms."""
    chain = str(row["draft_shape"]).startswith("chain")
    axes = all(AXES.fullmatch(key) for key in row["overrides"])
    return row["code"] == 0 and chain and axes and bool(row["bench"])


def known_of(row: Mapping[str, Any], sweep: str) -> Known | None:
    """A run as laws.json has it; None where that cell was not measured, or where it would bend the
    law (_fits)."""
    tau = _cell(row["tau"]) if _fits(row) and row["trained"] else None
    if tau is None:
        return None
    own, *before = row["trained"].values()
    depth = row["depth"] if row["family"] == "lm" else None  # a set of heads is as deep as it is
    costs, said, length = row["costs"], row["conditions"], row["draft_length"]
    last, rest = row.get("setting") or ("", "")  # of a report before there were settings
    return Known(
        of=Asked(row["family"], row["parameters"], own, depth, sum(before)),
        sweep=sweep,
        bench=row["bench"],
        prompts=f"{said['prompts']}, {said['max_new_tokens']} tokens",
        length=length,
        tau=tau,
        speedup=_cell(row["speedup"]),
        token=costs["draft_ms"] / length if costs else None,
        verify={int(m): ms for m, ms in costs.get("verify_ms", {}).items()},
        overhead=costs.get("overhead_ms", 0.0),
        rate=row["train_tokens_per_second"],
        machine=machine(said["machine"], said["threads"]),
        setting=(last, rest),
        quiet=not much(row.get("other_work"), said["threads"]),
        fixed=row.get("fixed"),
    )


def machine(name: str, threads: int) -> str:
    """What times hold for: the processor with the GPUs, if any, and the threads."""
    return f"{name}, {threads} threads"


def _cell(cells: list[dict[str, Any]]) -> Interval | None:
    """At temperature 0 and batch 1; without an interval of its own, a point."""
    for cell in cells:
        if (cell["temperature"], cell["batch"]) == (0, 1):
            value = cell["value"]
            return Interval(value, *(value if cell[k] is None else cell[k] for k in ENDS))
    return None


def positions(schedule: Mapping[str, Any]) -> int:
    """Whole steps of a configured training, in packed positions."""
    return int(schedule["tokens"]) // int(schedule["batch_tokens"]) * int(schedule["batch_tokens"])

"""What the folder of a bench stage tells of the drafter: its figures, and all it was made from.

Reads stage.json, result.json, environment.json and report.json of the stages, and the keys of the
prompts in runs.jsonl.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from drafters.trees import tree_of
from eval.bootstrap import Estimate
from eval.slices import DRAFTER
from eval.statistics import BASELINE

Row = dict[str, Any]
# keys that cannot change a figure, and the seed, whose change is a repeat
FREE = frozenset({"tracker", "micro_batch", "zero_stage", "pause_at", "seed"})


def read_json(file: Path, otherwise: str) -> Row:
    """The object in a file; ValueError, which begins with `otherwise`, where there is none."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{otherwise} ({error})") from None
    if not isinstance(found, dict):
        raise ValueError(f"{otherwise} (it holds no JSON object)")
    return found


def found_at(place: Path, stages: Path) -> Path | None:
    """A stage's folder where its note says, or, when outputs were moved, beside the sweep."""
    for folder in (place, stages / place.name):
        if (folder / "stage.json").is_file():
            return folder
    return None


def note_of(stage: Path) -> Row:
    """A stage's name, configuration and inputs."""
    return read_json(stage / "stage.json", f"{stage} is not the folder of a stage")


def benched(bench: Path, stages: Path) -> Row:
    """What a bench stage measured, and of which drafter; {} where it has no report."""
    file = bench / "artifact" / "report.json"
    if not file.is_file():
        return {}
    report = read_json(file, f"{file} is no report")
    known = report["conditions"]
    cells = {
        (row["temperature"], row["batch"]): row for row in report["table"] if row["arm"] == DRAFTER
    }
    drawn = known.get("draft", {})
    tree = tree_of(drawn.get("tree"))
    found: Row = {
        **{"parameters": known["parameters_drafter"], "family": known["drafter"]},
        **{"target": known["target_revision"], "costs": known.get("costs", {}), "bench": bench},
        "draft_length": drawn.get("draft_length") if tree is None else tree.depth,
        "draft_shape": known.get("draft_shape"),
        "other_work": known.get("other_work"),
        "conditions": _conditions(bench, known),
        "held": dict(_held(bench, "", stages)),
        **_trained(bench, stages),
    }
    if report["passed"]:
        for name in ("tau", "speedup"):
            found[name] = {c: r[name] for c, r in cells.items() if _known(r[name])}
        found["fixed"] = _fixed(report["table"])
        first = next((cells[c] for c in sorted(cells)), None)
        if first and _known(first["draft_ms_per_token"]):
            found["token_ms"] = first["draft_ms_per_token"]
    return found


def _fixed(table: list[Row]) -> float | None:
    """The share of plain decoding's time that is no round of it: prefill above all."""
    rows = [row for row in table if row["arm"] == BASELINE]
    first = min(rows, key=lambda row: (row["temperature"], row["batch"]), default={})
    names = ("draft", "verify", "other")
    times = [e["value"] for n in names if (e := first.get(f"{n}_ms_per_round")) and _known(e)]
    return float(times[2] / sum(times)) if len(times) == 3 and sum(times) > 0 else None


def _known(estimate: Estimate | None) -> bool:
    return estimate is not None and estimate["value"] is not None


def _conditions(bench: Path, known: Row) -> Row:
    """What a figure depends on besides the drafter; the prompts by the hashes of their texts."""
    file = bench / "artifact" / "runs.jsonl"
    keys: list[Any] = [note_of(bench)["config"].get("prompts")]
    if file.is_file():
        lines = filter(None, file.read_text(encoding="utf-8").splitlines())
        keys = sorted({key for line in lines for key in json.loads(line).get("keys", [])})
    mark = hashlib.sha256(json.dumps(keys, sort_keys=True).encode()).hexdigest()[:12]
    environment = bench / "environment.json"
    where = read_json(environment, "") if environment.is_file() else {}
    names = [where.get("processor"), *where.get("devices", [])]
    told = {key: known.get(key) for key in ("device", "threads", "dtype", "max_new_tokens")}
    machine = ", ".join(str(name) for name in names if name) or None
    return {"target": known.get("target"), **told, "machine": machine, "prompts": mark}


def _trained(bench: Path, stages: Path) -> Row:
    """How much training made the drafter, by stage and in all, how fast it was, an lm's shape."""
    trained: dict[str, int] = {}
    first = place = _input(bench, "drafter", stages)
    while place is not None:
        note = note_of(place)
        schedule = note["config"].get("schedule") or {}
        if schedule.get("tokens"):
            step = int(schedule["batch_tokens"])
            trained[note["name"]] = int(schedule["tokens"]) // step * step
        place = _input(place, "drafter", stages)
    found: Row = {"trained": trained, "tokens": sum(trained.values()) or None}
    if first is None:
        return found
    result, config = first / "result.json", first / "artifact" / "config.json"
    if result.is_file():
        found["train_tokens_per_second"] = read_json(result, "").get("tokens_per_second")
    if config.is_file():  # of an lm; a set of heads has none
        shape = read_json(config, "")
        found |= {"depth": shape.get("num_hidden_layers"), "width": shape.get("hidden_size")}
    return found


def _input(stage: Path, name: str, stages: Path) -> Path | None:
    place = note_of(stage).get("inputs", {}).get(name)
    return found_at(Path(place).parent, stages) if place else None


def _held(stage: Path, role: str, stages: Path) -> Iterator[tuple[str, str]]:
    """Every value that made a measurement: `drafter.schedule.tokens`, `drafter.data.seed`, ...; an
    input whose folder is gone counts by its name, which holds its fingerprint."""
    note = note_of(stage)
    yield from flat(note["config"], role)
    for name, place in note.get("inputs", {}).items():
        below, path = found_at(Path(place).parent, stages), f"{role}{name}."
        if below is None:
            yield path, Path(place).parent.name
        else:
            yield from _held(below, path, stages)


def flat(config: Row, path: str) -> Iterator[tuple[str, str]]:
    """The values of a stage's configuration that can change a figure, below `path`, as JSON."""
    for key, value in config.items():
        if key in FREE:
            continue
        if isinstance(value, dict):
            yield from flat(value, f"{path}{key}.")
        else:
            yield f"{path}{key}", json.dumps(value)

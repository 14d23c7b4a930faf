"""What a finished stage leaves is known by its hashes: DONE lists them.

A stage whose files are no longer those is not done. It is not begun anew either: each stage goes on
from what is whole (the last checkpoint, the shards that verify) and makes the rest again.
"""

import json
from pathlib import Path

from drafters.files import damage, digests, flush, write_json
from train.plan import Planned

DONE = "DONE"
NOTES = ("stage.json", "result.json")
CACHE = "train.cache.CacheStates"


def seal(stage: Path) -> None:
    """Makes the stage's files durable and writes DONE, its last one, with their hashes."""
    artifact = sorted(p for p in (stage / "artifact").rglob("*") if p.is_file())
    names = [*NOTES, *(p.relative_to(stage).as_posix() for p in artifact)]
    for name in names:
        flush(stage / name)
    write_json(stage / DONE, {"files": digests(stage, names)})


def broken(stage: Path, whole: bool = True) -> str | None:
    """What a finished stage's files lack of what DONE lists, or None; with `whole` false only its
    own notes are looked at, not the artifact."""
    try:
        known = json.loads((stage / DONE).read_text(encoding="utf-8"))["files"]
        return damage(stage, known if whole else {name: known[name] for name in NOTES})
    except (ValueError, KeyError, TypeError):
        return f"{DONE} is not readable"


def reopen(stages: list[Planned]) -> None:
    """Has each finished stage whose files are damaged run again, and says so. A cache, which may be
    terabytes, is hashed whole only where a stage still to be run will read it. Backwards, since
    damage makes a stage one to be run."""
    for stage in reversed(stages):
        read = any(
            stage.folder / "artifact" in other.inputs.values() for other in stages if not other.done
        )
        whole = read or stage.config["_target_"] != CACHE
        why = broken(stage.folder, whole) if stage.done else None
        if why:
            print(f"{stage.name}: {why}; what is damaged is made again", flush=True)
            (stage.folder / DONE).unlink(missing_ok=True)

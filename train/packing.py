"""What is trained on, packed once into a stage's folder: of a source, of answers, or of a cache."""

import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

from tqdm import tqdm

from data import pack
from data.documents import Documents, is_validation
from data.generate import read
from data.language import Gated
from data.rows import Row, Sample
from data.sources import Source, heldout, prompt_of
from data.storage import STALL, TRIES
from decoding.pulse import paced
from train.decoded import keep_prompts
from train.schedule import Schedule

VALIDATION_SEQUENCES = 16
PATIENCE = TRIES * STALL + 60  # seconds that storage may take for a row, which it tries again


def rows_of(source: Source | None, generated: Path | None) -> tuple[Iterable[Row | Sample], str]:
    """The rows to train on, of a language-checked source or of a generate stage, and their name."""
    if generated is not None:
        return read(generated), "the target's answers"
    assert source is not None, "check() refuses a stage with neither"
    return _gated(source), source.name


def _gated(source: Source) -> Iterator[Row]:
    rows = Gated(source, of="all")
    try:
        for row in rows:
            if "messages" not in row or not heldout(prompt_of(row)):
                yield row
    finally:  # also when the reader has enough before the source ends
        print(rows.summary(), flush=True)


def prepare(
    out: Path, rows: Iterable[Row | Sample], documents: Documents, schedule: Schedule
) -> None:
    """Packs training and validation data into out/packed, once, and prints what it found."""
    most = schedule.tokens // schedule.sequence_length
    said = pack_into(out, rows, documents, schedule.sequence_length, most)
    if said:
        train = pack.Packed(out / "packed" / "train")
        epochs = schedule.steps * schedule.batch_tokens / (len(train) * train.length)
        print(f"{said}; {epochs:.2f} epochs, {schedule.steps} steps", flush=True)


def pack_into(
    out: Path, rows: Iterable[Row | Sample], documents: Documents, length: int, most: int
) -> str:
    """Packs at most so many sequences of this length, and some for validation, into out/packed;
    returns what it found, or nothing where it is done."""
    folder = out / "packed"
    if (folder / "train" / "packed.json").is_file():
        try:
            pack.Packed(folder / "train")
            return ""
        except ValueError as why:
            print(f"{why}; it is packed again", flush=True)
    shutil.rmtree(folder, ignore_errors=True)
    part = out / "packed.part"
    shutil.rmtree(part, ignore_errors=True)
    bar = tqdm(paced(rows, "a row to pack", PATIENCE), unit="row", desc="tokenise and pack")
    kept: list[Row | Sample] = []
    train = pack.write(part / "train", documents(_aside(bar, kept), False), length, most)
    bar.close()
    documents.complain()  # also where the source was not read to its end
    held = Documents(documents.tokenizer, documents.name)
    try:
        pack.write(part / "validation", held(kept, True), length, VALIDATION_SEQUENCES)
    except ValueError as why:  # too little data for a validation set; training goes on without
        print(f"no validation: {why}", flush=True)
        shutil.rmtree(part / "validation", ignore_errors=True)
    keep_prompts(part / "prompts.json", kept, length)
    part.rename(folder)
    return (
        f"{documents.name}: {documents.rows:,} rows read, {len(train):,} sequences of "
        f"{train.length} ({train.tokens / (len(train) * train.length):.0%} filled, "
        f"{documents.supervised / max(1, documents.tokens):.0%} supervised"
        f"{f', {train.too_long:,} dropped as too long' if train.too_long else ''})"
    )


def take_over(cache: Path, out: Path) -> None:
    """Copies a cache's sequences to out/packed, once: training shuffles and counts them as its
    own."""
    if (out / "packed").is_dir():
        return
    part = out / "packed.part"
    shutil.rmtree(part, ignore_errors=True)
    shutil.copytree(cache / "packed", part)
    part.rename(out / "packed")


def _aside(rows: Iterable[Row | Sample], kept: list[Row | Sample]) -> Iterator[Row | Sample]:
    """Passes rows on, remembering those that validation will want."""
    for row in rows:
        if len(kept) < 2000 and is_validation(row):
            kept.append(row)
        yield row

"""Stage `export`: the drafter in the layouts that serving engines read, each one proved."""

import hashlib
import json
import shutil
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from decoding.pretrained import DTYPES, Pretrained
from drafters.base import Trained, load, require_intact, write_json
from drafters.files import Digests, digests
from drafters.heads import Heads
from drafters.lm import LM
from eval.forms import TARGET
from train.layouts import changed, files, gguf
from train.layouts.given import Facts, Lent
from train.layouts.proof import prove
from train.layouts.table import GGUF, LAYOUTS, formats

NOTE = "export.json"


@dataclass(frozen=True)
class Subject:
    """What is exported: a drafter and the facts for its files, the target that it drafts for in the
    dtype that was measured, and that target's folder where a stage made it."""

    family: str
    drafter: Trained
    facts: Facts
    spec: Pretrained
    place: Path | None


class Export:
    """Writes a drafter in each `format` (a name or a list; null: all of its family, gguf where
    gguf_converter is given), with the dtype and draft length that the report says were measured.

    Each is read back strictly, and its logits on random prompts, computed once by the training
    module and once from the files alone as the engine reads them, must be equal. Of a sharded
    target the states for that are drawn at random. Beside a drafter that changes its target
    (Medusa-2) stands that target, merged, as the entry `target`.

    family: the drafter's, or the class that configures it, so that a wrong format is found before
    training. base_model: the target's id on the Hub; null: target.path, if it is one.
    gguf_converter: llama.cpp's convert_hf_to_gguf.py, run by gguf_python (null: this Python);
    gguf_pre_tokenizer: llama.cpp's name for the target's (null: see train/layouts/gguf.py).
    """

    free = frozenset({"gguf_python", "gguf_converter"})

    def __init__(
        self,
        *,
        target: Pretrained,
        format: str | list[str] | None = None,
        family: str | None = None,
        base_model: str | None = None,
        gguf_converter: str | None = None,
        gguf_python: str | None = None,
        gguf_pre_tokenizer: str | None = None,
    ) -> None:
        self.target, self.base_model = target, base_model
        self.asked = [format] if isinstance(format, str) else format
        self.gguf = (gguf_converter, gguf_python, gguf_pre_tokenizer)
        for key, file in (("gguf_converter", gguf_converter), ("gguf_python", gguf_python)):
            if file and not Path(file).is_file():
                raise ValueError(f"stages.export.{key} is {file}, which is not there: correct it")
        if family:
            parts = family.split(".")  # drafters.medusa.Medusa, or medusa
            self.formats(parts[1] if len(parts) == 3 else family)

    def fingerprint(self) -> str:
        """Of the code that writes and proves the layouts."""
        digest = hashlib.sha256()
        for file in sorted(Path(files.__file__).parent.glob("*.py")):
            digest.update(file.read_bytes())
        return digest.hexdigest()

    def formats(self, family: str) -> list[str]:
        """The formats to write, none of a family that no engine serves. Raises ValueError for one
        that was asked for and that the family does not have."""
        if self.asked is None and family not in LAYOUTS:
            return []
        have = formats(family)
        if self.asked is None:
            return [form for form in have if form != GGUF or self.gguf[0]]
        for form in self.asked:
            if form not in have:
                raise ValueError(
                    f"stages.export.format is {form!r}; the formats of the family {family} are: "
                    f"{', '.join(have)}"
                )
        if GGUF in self.asked and not self.gguf[0]:
            raise ValueError(
                "stages.export.format=gguf needs llama.cpp's own converter: set "
                "stages.export.gguf_converter to its convert_hf_to_gguf.py, and gguf_python to a "
                "Python that has its package gguf"
            )
        if not self.asked or len(set(self.asked)) < len(self.asked):
            raise ValueError(
                f"stages.export.format is {self.asked}; name each format once: {', '.join(have)}"
            )
        return self.asked

    def run(
        self, out: Path, *, drafter: Path, report: Path | None = None, target: Path | None = None
    ) -> dict[str, float]:
        """Leaves artifact/FORMAT/... and artifact/export.json: format to `files` (digests),
        `dtype` of the drafter's own weights, `engines`, vLLM's `method`, `notes`, and
        `difference`, the largest of a logit over the largest logit.
        Returns bytes and the worst difference. Raises Failed if an export is not the drafter."""
        folder, part = out / "artifact", out / "artifact.part"
        shutil.rmtree(part, ignore_errors=True)
        family = require_intact(drafter)["family"]
        wanted = self.formats(family)
        part.mkdir(parents=True)
        told: dict[str, Any] = {}
        if wanted:
            subject = self._subject(family, drafter, report, target)
            told = {form: self._one(subject, form, part / form) for form in wanted}
            if subject.drafter.changes_target:
                told[TARGET] = self._changed(subject, part / TARGET)
        for form, entry in told.items():
            print(_line(form, part / form, entry), flush=True)
        if not told:
            print(f"no engine serves {family}: nothing is exported, the drafter stays as it is")
        write_json(part / NOTE, told)
        shutil.rmtree(folder, ignore_errors=True)
        part.rename(folder)
        size = sum(f["bytes"] for entry in told.values() for f in entry["files"].values())
        worst = max((e["difference"] or 0.0 for e in told.values()), default=0.0)
        return {"bytes": size, "difference": worst}

    def _subject(
        self, family: str, drafter: Path, report: Path | None, target: Path | None
    ) -> Subject:
        """The drafter with what its files say of the target and of what was measured."""
        trained = load(drafter, self.target.shape_of(target))
        facts = measured(facts_of(self.target, target, trained, self.base_model), report)
        names = {dtype: name for name, dtype in DTYPES.items()}
        spec = replace(self.target, dtype=names[facts.dtype] if facts.dtype else self.target.dtype)
        if family != "lm":
            facts = replace(facts, lent=_lent(spec, trained, target))
        return Subject(family, trained, facts, spec, target)

    def _one(self, subject: Subject, form: str, folder: Path) -> dict[str, Any]:
        """Writes one format, an lm with its tokenizer, and returns its entry of export.json."""
        family, gguf_asked = subject.family, form == GGUF
        made = folder.with_name("gguf.from") if gguf_asked else folder
        layout = "transformers" if gguf_asked else form
        entry = export(family, layout, subject.drafter, made, subject.facts)
        if family == "lm":
            subject.spec.tokenizer(subject.place).save_pretrained(made)
        if not gguf_asked:
            return entry | {"files": listed(folder)}
        notes = gguf.write(made, folder, *self.gguf)
        shutil.rmtree(made)
        return _entry(folder, ("llama_cpp",), None, notes, None) | {"dtype": entry["dtype"]}

    def _changed(self, subject: Subject, folder: Path) -> dict[str, Any]:
        """Writes the target that goes with a drafter which changes it, and its tokenizer."""
        gap = changed.write(folder, subject.facts, subject.spec.dtype)
        subject.spec.tokenizer(subject.place).save_pretrained(folder)
        return _entry(folder, changed.ENGINES, None, [changed.NOTE], gap)


def _lent(spec: Pretrained, drafter: Trained, place: Path | None) -> Lent:
    """The target in the dtype that was measured, as the drafter changes it if it does (then it has
    to be whole)."""
    if spec.parallel and not drafter.changes_target:
        return Lent(spec.borrow(place))
    target = replace(spec, parallel=None).load(place)
    lent = Lent(drafter.to(target.device).on(target))
    drafter.cpu()
    return lent


def export(family: str, form: str, drafter: Trained, folder: Path, facts: Facts) -> dict[str, Any]:
    """Writes the drafter in one layout and proves it; returns its entry of export.json. Raises
    Failed where the files are not the drafter."""
    layout = LAYOUTS[family][form]
    folder.mkdir(parents=True)
    notes = layout.write(drafter, folder, facts)
    difference = prove(layout, drafter, folder, facts)
    return _entry(folder, layout.ENGINES, layout.METHOD, notes, difference)


def facts_of(
    spec: Pretrained, place: Path | None, drafter: Trained, base_model: str | None = None
) -> Facts:
    """What files say of the target, from its configuration alone, and how the drafter drafts."""
    from transformers import AutoConfig, GenerationConfig

    assert isinstance(drafter, LM | Heads), f"a {type(drafter).__name__} has no draft length"
    shape = spec.shape_of(place)  # which says what is wrong with a target that is not there
    where, revision = str(place or spec.path), None if place else spec.revision
    config = AutoConfig.from_pretrained(where, revision=revision, trust_remote_code=False)
    said: Any = config.get_text_config()
    with suppress(OSError):  # not every target has one
        said = GenerationConfig.from_pretrained(where, revision=revision or "main")
    kinds = ("bos_token_id", "eos_token_id", "pad_token_id")
    hub = spec.path if not place and spec.name == spec.path else None
    return Facts(
        shape=shape,
        draft_length=drafter.draft_length,
        stop_below=drafter.stop_below,
        base_model=base_model or hub,
        architectures=tuple(config.architectures or ()),
        token_ids={kind: getattr(said, kind, None) for kind in kinds},
    )


def measured(facts: Facts, report: Path | None) -> Facts:
    """The facts with the dtype and the chain that bench measured; after a tree, the drafter's own
    draft length stays, since engines draft chains."""
    if report is None:
        return facts
    conditions = json.loads((report / "report.json").read_text(encoding="utf-8"))["conditions"]
    draft = conditions["draft"]
    return replace(
        facts,
        dtype=DTYPES[conditions["dtype"]],
        draft_length=draft.get("draft_length") or facts.draft_length,
        stop_below=draft.get("stop_below", facts.stop_below),
    )


def listed(folder: Path) -> Digests:
    """Digests of all files below a folder."""
    found = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
    return digests(folder, found)


def _entry(
    folder: Path,
    engines: tuple[str, ...],
    method: str | None,
    notes: list[str],
    difference: float | None,
) -> dict[str, Any]:
    said = files.config(folder) if (folder / "config.json").is_file() else {}
    return {
        "files": listed(folder),
        "dtype": said.get("dtype"),
        "engines": list(engines),
        "method": method,
        "notes": notes,
        "difference": difference,
    }


def _line(form: str, folder: Path, entry: dict[str, Any]) -> str:
    """What the log says of an export: its bytes by groups of tensors, and how well it agrees."""
    size = sum(file["bytes"] for file in entry["files"].values())
    parts = files.groups(folder).items()
    parts_told = ", ".join(f"{name} {count / 2**20:.2f}" for name, count in parts)
    told = f"{form}: {size / 2**20:.2f} MiB" + (f" ({parts_told})" if parts_told else "")
    gap = entry["difference"]
    equal = (
        "logits not computed here" if gap is None else f"logits equal to {gap:.1g} of the largest"
    )
    return f"{told}; {equal}; read by {', '.join(entry['engines'])}"

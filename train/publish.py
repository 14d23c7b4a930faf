"""Stage `publish`: a folder whose card says what was measured, and its upload to the Hub."""

import hashlib
import re
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from decoding.pretrained import Pretrained, contents_hash
from drafters.base import NOTE
from drafters.files import damage, write_json
from drafters.published import require_name
from eval.bootstrap import FASTER, SLOWER
from eval.controls import Failed
from eval.markdown import interval, number, times
from eval.sections import sentence
from train.publishing import assembled, hub
from train.publishing.card import Facts, card
from train.publishing.provenance import RECIPE, note_of, provenance, recipe, to_give, trace
from train.publishing.staged import frozen

CARRIED = ("report.json", "report.md", "report.html", "report.png", "runs.jsonl")
MANIFEST = "manifest.json"
LANGUAGE = re.compile(r"[a-z]{2,3}(-[A-Za-z]{2,8})?|code|multilingual")  # what the Hub takes


@dataclass(frozen=True)
class Inputs:
    """The artifacts that a publication is made of."""

    drafter: Path
    report: Path
    target: Path | None
    export: Path | None
    serve: Path | None
    parent: Path | None

    def contents(self) -> dict[str, str]:
        """A hash of each but the target, of which only the name is published."""
        mine = {name: place for name, place in vars(self).items() if place and name != "target"}
        return {name: contents_hash(str(place)) for name, place in mine.items()}


@dataclass(frozen=True)
class Told:
    """What measuring it said: report.json, comparison.json, and what speaks against it."""

    measured: dict[str, Any]
    compared: dict[str, Any] | None
    objections: list[str]


class Publish:
    """Assembles drafter, tokenizer, card and evidence, and uploads them as one commit.

    language: codes for the card; licence: of the drafter's weights, which the data decide;
    repository: user/name on the Hub; null: the folder is made and nothing is uploaded.
    private: of a repository that is not there yet; tag: the revision's name.
    force: uploads also what `objections` speak against; the card says so in its first lines.
    """

    def __init__(
        self,
        *,
        target: Pretrained,
        language: list[str],
        licence: str,
        repository: str | None = None,
        private: bool = True,
        tag: str | None = None,
        force: bool = False,
    ) -> None:
        for code in language:
            if not LANGUAGE.fullmatch(code):
                raise ValueError(
                    f"publish.language has {code!r}, expected ISO 639 codes such as ko: write one"
                )
        if repository is not None:
            require_name(repository)
        if tag is not None and not hub.TAG.fullmatch(tag):
            raise ValueError(f"publish.tag is {tag!r}, expected a name such as v1: correct it")
        self.target, self.language, self.licence = target, language, licence
        self.repository, self.private, self.tag, self.force = repository, private, tag, force

    def fingerprint(self) -> str:
        """Of the code that writes the folder: another card is another publication."""
        digest = hashlib.sha256()
        for file in sorted(Path(hub.__file__).parent.glob("*.py")):
            digest.update(file.read_bytes())
        return digest.hexdigest()

    def rehearse(self) -> str:
        """What publishing would do on the Hub, in a line; changes nothing there. Raises ValueError
        where token, scope or repository do not allow it."""
        assert self.repository is not None, "nothing is uploaded without a repository"
        return hub.check(self.repository, private=self.private)

    def run(
        self,
        out: Path,
        *,
        drafter: Path,
        report: Path,
        target: Path | None = None,
        export: Path | None = None,
        serve: Path | None = None,
        parent: Path | None = None,
    ) -> dict[str, float]:
        """Writes artifact/ and returns its size in bytes; with a repository, uploads it. `export`,
        `serve` and `parent` name stages whose formats, runs in engines and comparison with the
        drafter that training started from come along."""
        measured = assembled.read(report / "report.json")
        _require_of(drafter, report)
        compared = assembled.read(parent / "comparison.json") if parent else None
        why = objections(measured, compared)
        if why and self.repository and not self.force:
            raise Failed(
                f"not published: {'; '.join(why)}. Train on, or set stages.publish.force=true: the "
                "card then says this first"
            )
        assembled.refuse_links(drafter)
        inputs = Inputs(drafter, report, target, export, serve, parent)
        folder, done = out / "artifact", out / "staged.json"
        mark = {"of": inputs.contents(), "by": self._settings()}
        if _kept(folder, done, mark):
            print("nothing has changed since the folder was made: it stays as it is", flush=True)
        else:
            done.unlink(missing_ok=True)
            self._stage(inputs, out, Told(measured, compared, why))
            write_json(done, mark)
        size = sum(file["bytes"] for file in assembled.read(folder / MANIFEST)["files"].values())
        print(f"ready for the Hub: {folder} ({size / 2**20:.1f} MiB)", flush=True)
        for line in why:
            print(f"mind: {line}", flush=True)
        if self.repository:
            self._upload(self.repository, folder, out, measured)
        return {"bytes": size}

    def _settings(self) -> str:
        """All that the folder depends on besides the inputs: the settings, the target, the code."""
        ours = {key: value for key, value in vars(self).items() if key != "target"}
        return f"{sorted(ours.items())} {self.target.name} {self.fingerprint()}"

    def _stage(self, inputs: Inputs, out: Path, told: Told) -> None:
        """Makes out/artifact anew."""
        folder, part = out / "artifact", out / "artifact.part"
        stages: dict[str, Path] = {}
        for made in filter(None, (inputs.drafter, inputs.report, inputs.export, inputs.parent)):
            trace(made, stages)
        shutil.rmtree(part, ignore_errors=True)
        shutil.copytree(inputs.drafter, part)
        for name in CARRIED:
            shutil.copy2(inputs.report / name, part / name)
        assembled.as_measured(part, told.measured["conditions"])
        if inputs.parent:
            shutil.copy2(inputs.parent / "comparison.json", part / "comparison.json")
        formats = assembled.formats(inputs.export, part) if inputs.export else {}
        facts = self._facts(part, inputs, stages, told)
        (part / "README.md").write_text(card(replace(facts, formats=formats)), encoding="utf-8")
        write_json(part / MANIFEST, {"files": frozen(part)})
        shutil.rmtree(folder, ignore_errors=True)
        part.rename(folder)

    def _facts(self, part: Path, inputs: Inputs, stages: dict[str, Path], told: Told) -> Facts:
        """What the card says but for the formats; writes provenance.json and recipe.yaml, of which
        it speaks."""
        name, revision = self.target.name, told.measured["conditions"].get("target_revision")
        text = recipe(stages, f"Makes the draft model for {name} that it was published with.")
        (part / RECIPE).write_text(text, encoding="utf-8")
        if inputs.serve:  # whose engines another machine may not have
            trace(inputs.serve, stages)
        known = provenance(stages, {"name": name, "revision": revision})
        write_json(part / "provenance.json", known)
        return Facts(
            family=assembled.read(part / NOTE)["family"],
            target=name,
            base=name if name == self.target.path and not inputs.target else None,  # a Hub id
            repository=self.repository,
            language=self.language,
            licence=self.licence,
            report=told.measured,
            provenance=known,
            objections=told.objections,
            served=assembled.served(inputs.serve, part) if inputs.serve else None,
            comparison=told.compared,
            missing=to_give(text),
        )

    def _upload(self, repository: str, folder: Path, out: Path, measured: dict[str, Any]) -> None:
        said = [sentence(entry) for entry in measured["headline"][:1]]
        commit = hub.upload(
            folder,
            repository,
            private=self.private,
            tag=self.tag,
            message=" ".join([f"A draft model for {self.target.name}.", *said]),
        )
        write_json(out / "published.json", {"repository": repository, "commit": commit})
        print(f"published: {repository} at commit {commit}", flush=True)


def _kept(folder: Path, done: Path, mark: dict[str, Any]) -> bool:
    """Whether the folder is there, whole, and was made of this and by this."""
    try:
        if assembled.read(done) != mark:
            return False
        return damage(folder, assembled.read(folder / MANIFEST)["files"]) is None
    except (OSError, ValueError, KeyError):
        return False


def objections(measured: dict[str, Any], compared: dict[str, Any] | None) -> list[str]:
    """Why this drafter should not be published, each with its numbers; [] for a good one.

    At batch 1 it has to be faster than no drafting at one temperature at least, the whole interval
    above 1, and slower at none, the whole interval below 1. All controls have to have passed. A
    fine-tune has to be nowhere worse than its parent.
    """
    controls, entries = measured["controls"], measured["headline"]
    why = [
        f"the control {name} failed: {control['found']}"
        for name, control in controls.items()
        if not control["passed"]
    ]
    if not controls:
        why.append("no control was run, so nothing vouches for its figures")
    why += [sentence(entry).rstrip(".") for entry in entries if entry["verdict"] == SLOWER]
    undecided = [sentence(e).rstrip(".") for e in entries if e["verdict"] not in (FASTER, SLOWER)]
    if not any(e["verdict"] == FASTER for e in entries) and (undecided or not entries):
        told = "; ".join(undecided) or "not measured"
        why.append(f"at batch 1 it was not shown to be faster than no drafting ({told})")
    worse = [row for row in (compared or {"rows": []})["rows"] if row["verdict"] == "worse"]
    return why + [
        f"on {row['set']}, temperature {row['temperature']:g}, its {row['said']} is worse than "
        f"that of the drafter which it was trained on from: {interval(row['ratio'], times)} as "
        f"fast, tau {number(row['tau']['after']['value'])} after "
        f"{number(row['tau']['before']['value'])}"
        for row in worse
    ]


def _require_of(drafter: Path, report: Path) -> None:
    """Raises ValueError where the report is of another drafter."""
    measured = note_of(report.parent)["inputs"].get("drafter")
    if measured is None or Path(measured).parent.name != drafter.parent.name:
        raise ValueError(
            f"stages.publish.needs: the report is of {measured and Path(measured).parent.name} and "
            f"the drafter is {drafter.parent.name}; expected the same: name the stage that the "
            "bench stage needs"
        )

"""Stage `publish`: a folder whose card says what was measured, and its upload to the Hub."""

import hashlib
import re
import shutil
from pathlib import Path
from typing import Any

from decoding.pretrained import Pretrained
from drafters.base import NOTE
from drafters.files import write_json
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
        stages: dict[str, Path] = {}
        for made in filter(None, (drafter, report, export, parent)):
            trace(made, stages)
        folder, part = out / "artifact", out / "artifact.part"
        shutil.rmtree(part, ignore_errors=True)
        assembled.refuse_links(drafter)
        shutil.copytree(drafter, part)
        for name in CARRIED:
            shutil.copy2(report / name, part / name)
        assembled.as_measured(part, measured["conditions"])
        if parent:
            shutil.copy2(parent / "comparison.json", part / "comparison.json")
        formats = assembled.formats(export, part) if export else {}
        facts = self._facts(part, measured, stages, target, formats, serve, compared, why)
        (part / "README.md").write_text(card(facts), encoding="utf-8")
        files = frozen(part)
        write_json(part / MANIFEST, {"files": files})
        shutil.rmtree(folder, ignore_errors=True)
        part.rename(folder)
        size = sum(file["bytes"] for file in files.values())
        print(f"ready for the Hub: {folder} ({size / 2**20:.1f} MiB)", flush=True)
        for line in why:
            print(f"mind: {line}", flush=True)
        if self.repository:
            self._upload(self.repository, folder, out, measured)
        return {"bytes": size}

    def _facts(
        self,
        part: Path,
        measured: dict[str, Any],
        stages: dict[str, Path],
        target: Path | None,
        formats: dict[str, Any],
        serve: Path | None,
        compared: dict[str, Any] | None,
        why: list[str],
    ) -> Facts:
        """What the card says; writes provenance.json and recipe.yaml, of which it speaks."""
        name, revision = self.target.name, measured["conditions"].get("target_revision")
        text = recipe(stages, f"Makes the draft model for {name} that it was published with.")
        (part / RECIPE).write_text(text, encoding="utf-8")
        if serve:  # whose engines another machine may not have
            trace(serve, stages)
        known = provenance(stages, {"name": name, "revision": revision})
        write_json(part / "provenance.json", known)
        return Facts(
            family=assembled.read(part / NOTE)["family"],
            target=name,
            base=name if name == self.target.path and not target else None,  # a Hub id
            repository=self.repository,
            language=self.language,
            licence=self.licence,
            report=measured,
            provenance=known,
            objections=why,
            served=assembled.served(serve, part) if serve else None,
            comparison=compared,
            formats=formats,
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

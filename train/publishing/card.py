"""The card: what a stranger reads of a published drafter, made from measured files alone.

Short at the top, complete below; what was not measured is not there, or said to be missing.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from eval.forms import TARGET
from eval.markdown import grid, number
from eval.sections import sentence
from train.publishing import measured, uses
from train.publishing.measured import plain

Row = dict[str, Any]
DEFINED = ("speedup", "tau", "n", "interval", "tokens/s", "break-even", "predicted", "repetitive")
MADE_HERE = "train.base.BaseTarget"
LICENCES = {
    "apache-2.0": "https://www.apache.org/licenses/LICENSE-2.0",
    "mit": "https://opensource.org/license/mit",
    "odc-by": "https://opendatacommons.org/licenses/by/1-0/",
    "cc0-1.0": "https://creativecommons.org/publicdomain/zero/1.0/",
    "cc-by-2.0": "https://creativecommons.org/licenses/by/2.0/",
    "cc-by-4.0": "https://creativecommons.org/licenses/by/4.0/",
    "cc-by-sa-4.0": "https://creativecommons.org/licenses/by-sa/4.0/",
    "psf-2.0": "https://docs.python.org/3/license.html",
}


@dataclass(frozen=True)
class Facts:
    """What a card is made from: files that stages left, and what publish was told.

    family: the drafter's; base: the target's Hub id, None where it has none; repository: None where
    the folder is not uploaded; objections: why it should not be published, of which `force` makes
    its first lines; report: report.json; provenance: provenance.json; served: served.json of the
    stage serve; comparison: comparison.json of a fine-tune and its parent; formats: what the stage
    export left -> {place: the sub-folder where it stands, engines, notes}; missing: words that
    reproducing needs.
    """

    family: str
    target: str
    base: str | None
    repository: str | None
    language: list[str]
    licence: str
    report: Row
    provenance: Row
    objections: list[str] = field(default_factory=list)
    served: Row | None = None
    comparison: Row | None = None
    formats: dict[str, Row] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)

    @property
    def conditions(self) -> Row:
        return self.report["conditions"]

    @property
    def served_dtype(self) -> str:
        return self.served["conditions"]["dtype"] if self.served else "an unknown dtype"


def card(facts: Facts) -> str:
    """README.md: the Hub's metadata, then Markdown in which no name can become a tag or a table's
    edge."""
    parts = [
        *(f"---\n{metadata(facts)}---", f"# A draft model for {plain(facts.target)}"),
        *(f"**Mind: {plain(why)}**" for why in facts.objections),
        *(f"**{plain(sentence(entry))}**" for entry in facts.report["headline"]),
        *_opening(facts),
        grid(("", ""), _summary(facts)),
        "![the figures of the measurement](report.png)",
        *("## Use", *uses.blocks(facts)),
        *("## How fast", *measured.speed(facts.report)),
        *("## Is the output the target's own?", *measured.lossless(facts.report)),
        *("## Limits", *measured.limits(facts.report, trained_lengths(facts.provenance))),
        *_regressions(facts.comparison),
        *("## Data", *_data(facts.provenance["stages"])),
        *("## Make it again", *_again(facts)),
        *("## What the numbers mean", _definitions(facts.report)),
        *("## Files", _files(facts)),
    ]
    return "\n\n".join(parts) + "\n"


def metadata(facts: Facts) -> str:
    """The YAML head, in the Hub's own vocabulary.

    base_model_relation has no word for a draft model: heads, which are weights on top of a target
    that stays as it is, come under `adapter`; of an `lm`, a model of its own, none is said.
    library_name is always said, since the Hub would take heads for a transformers model. There is
    no model-index: it ranks answers on a benchmark, and these are the target's.
    """
    from huggingface_hub import ModelCardData

    alone = facts.family == "lm"
    sources = [data for s in facts.provenance["stages"].values() for data in s["data"].values()]
    known: dict[str, Any] = {
        "library_name": "transformers" if alone else "draftsmith",
        "pipeline_tag": "text-generation",
        "license": facts.licence,
        "language": facts.language,
        "base_model": facts.base,
        "base_model_relation": "adapter" if facts.base and not alone else None,
        "datasets": sorted({data["hub"] for data in sources if "hub" in data}) or None,
        "tags": ["speculative-decoding", "draft-model", facts.family],
    }
    return ModelCardData(**{k: v for k, v in known.items() if v is not None}).to_yaml() + "\n"


def _opening(facts: Facts) -> Iterator[str]:
    if not facts.report["headline"]:
        yield "**Its speed at batch 1 was not measured.**"
    if change := facts.conditions.get("target_change"):
        merged = TARGET in facts.formats
        yield (
            f"**It does not leave the target as it was:** {plain(change['said'])}. The matrices "
            "are in `target_adapter` (peft); merge them into the target before you serve it"
            + (", or serve the one in `target/`, where they are." if merged else ".")
        )
    else:
        yield (
            "It guesses several tokens; the target checks them in one pass and stays the author "
            "of every token."
        )


def _summary(facts: Facts) -> Iterator[tuple[str, str]]:
    known, report = facts.conditions, facts.report
    yield "target", f"{facts.target}, {_revision(facts)}"
    weights = f"{known['parameters_drafter']:,} parameters beside {known['parameters_target']:,}"
    yield "drafter", f"family `{facts.family}`, {weights} of the target"
    yield "languages", ", ".join(facts.language)
    yield "licence of its weights", _licence(facts.licence)
    yield "measured on", f"{machine(facts)}, {known['dtype']}, drafting a {known['draft_shape']}"
    state = "passed" if report["passed"] else "**NOT PASSED**"
    yield "controls", f"{state}: {', '.join(report['controls']) or 'none was run'}"
    for entry in report["break_even"]:
        yield f"batch sizes, temperature {entry['temperature']:g}", entry["said"]
    if not report["break_even"]:
        yield "batch sizes", "only one was measured; how many requests at once still pay is open"


def _revision(facts: Facts) -> str:
    """The commit of a target of the Hub; of another the hash of its files."""
    known = facts.provenance["target"]["revision"]
    if facts.base:
        return f"commit `{known}`" if known else "at an unknown commit"
    made = any(s["config"]["_target_"] == MADE_HERE for s in facts.provenance["stages"].values())
    where = "made by the stage target below and not published here; " if made else ""
    return f"{where}sha256 of its files `{known[:12] if known else 'unknown'}`"


def machine(facts: Facts) -> str:
    """The device that bench measured on, by name."""
    made = next(s for s in facts.provenance["stages"].values() if _is_bench(s))["environment"]
    if devices := made.get("devices"):
        return " + ".join(devices)
    name = made.get("processor") or facts.conditions["device"]
    return f"{name}, {facts.conditions['threads']} threads"


def trained_lengths(provenance: Row) -> dict[int, list[str]]:
    """Tokens of a training sequence -> the stages that trained the drafter on them."""
    found: dict[int, list[str]] = {}
    for name, stage in provenance["stages"].items():
        if stage["config"]["_target_"] == "train.distill.Distill":
            found.setdefault(stage["config"]["schedule"]["sequence_length"], []).append(name)
    return found


def _is_bench(stage: Row) -> bool:
    return stage["config"]["_target_"] == "eval.bench.Bench"


def _regressions(comparison: Row | None) -> Iterator[str]:
    if comparison is not None:
        yield "## Beside the drafter that its training started from"
        yield from measured.regressions(comparison)


def _data(stages: dict[str, Row]) -> Iterator[str]:
    """Sources by stage, with language and licence; what was measured on stands apart."""
    trained: dict[str, list[str]] = {}
    asked: dict[str, list[str]] = {}
    for name, stage in stages.items():
        for called, data in stage["data"].items():
            measures = stage["config"]["_target_"].startswith("eval.")
            lines = asked if measures else trained
            lines.setdefault(_source(called, data), []).append(name)
    yield _list("Trained on (in brackets the stages that read it)", trained)
    if any(s["config"]["_target_"] == "data.generate.Generate" for s in stages.values()):
        yield (
            "Of what a stage `generate` reads, only the prompts were used; the answers are the "
            "target's own."
        )
    for stage in stages.values():
        if parent := stage.get("parent"):
            commit = f", commit `{parent['revision']}`" if parent["revision"] else ""
            yield f"Training started from the drafter {plain(parent['checkpoint'])}{commit}."
    yield _list("Measured on", asked)


def _list(title: str, lines: dict[str, list[str]]) -> str:
    told = [f"- {line} ({', '.join(stages)})" for line, stages in lines.items()]
    return "\n".join([f"{title}:", "", *(told or ["- not recorded"])])


def _source(called: str, data: Row) -> str:
    name, mark = plain(called), ""
    if "hub" in data:
        name = f"[{name}](https://huggingface.co/datasets/{data['hub']})"
        mark = f"revision `{data['revision']}`" if data["revision"] else "no revision was pinned"
    elif data["sha256"]:
        mark = f"sha256 of its contents `{data['sha256'][:12]}`"
    told = [data["language"], mark, f"licence: {_licence(data['licence'])}"]
    return "; ".join([name, *filter(None, told)])


def _licence(name: str | None) -> str:
    link = LICENCES.get((name or "").lower())
    return f"[{name}]({link})" if link else plain(name or "not stated")


def _again(facts: Facts) -> Iterator[str]:
    """The commands that make it from nothing, and what tells that they do the same."""
    made, stages = facts.provenance["draftsmith"], facts.provenance["stages"]
    dirty = ", with changes that it does not have" if made["dirty"] is True else ""
    but = "" if facts.served is None else ", but for serve, which needs the engines"
    yield (
        f"`recipe.yaml` has every setting of every stage{but}. In a clone of draftsmith at commit "
        f"`{made['commit']}`{dirty}, once `make quickstart` or `make test` has set up `.venv`:"
    )
    take = "cp path/to/this/folder/recipe.yaml recipes/"
    if facts.repository:
        take = f".venv/bin/hf download {facts.repository} recipe.yaml --local-dir recipes"
    words = " ".join([".venv/bin/python -m train recipe=recipe", *facts.missing])
    yield "\n".join(["```", take, f"{words} plan=true  # shows the stages below", words, "```"])
    if facts.missing:
        yield (
            "Each `...` stands for files or a folder that are not published here: give your own "
            "copies of them (names and hashes are above)."
        )
    if other := [name for name, stage in stages.items() if stage["same_code"] is False]:
        yield (
            f"Made by other code than that commit's, or measured on another device: "
            f"{', '.join(other)}. These get other fingerprints, and may give other numbers."
        )
    rows = [(n, f"`{n}-{s['fingerprint']}`", _took(s["seconds"])) for n, s in stages.items()]
    yield grid(("stage", "its folder, named by its fingerprint", "took"), rows)
    packages = facts.provenance["environment"]["packages"]
    yield f"Versions: {', '.join(f'{name} {number}' for name, number in packages.items())}."


def _took(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    return f"{number(seconds)} s" if seconds < 60 else f"{number(seconds / 60)} min"


def _definitions(report: Row) -> str:
    known = report["definitions"]
    return "\n".join(f"- **{name}**: {plain(known[name])}" for name in DEFINED if name in known)


def _files(facts: Facts) -> str:
    lines = [
        "- [report.md](report.md), [report.html](report.html): the whole measurement, baselines, "
        "acceptance by position, costs and controls included; `report.json`, `runs.jsonl`: its "
        "numbers",
        "- `recipe.yaml`, `provenance.json`: how it was made, of what, by which versions, on what",
        "- `drafter.json`: its family, and the shape of draft that was measured",
        "- `manifest.json`: size and sha256 of every other file",
    ]
    for name, entry in facts.formats.items():
        read = f"the drafter in the layout `{name}`, read by {', '.join(entry['engines'])}"
        told = "; ".join([*([read] if name != TARGET else []), *entry["notes"]])
        if entry["place"] != ".":
            lines.append(f"- `{entry['place']}/`: {plain(told)}")
    if facts.served is not None:
        lines.append("- `served.json`, `logs/`: what engines did with it, and what they printed")
    return "\n".join(lines)

"""Stage `publish`: a folder ready for the Hub, whose card says what was measured."""

import json
import shutil
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from decoding.pretrained import DTYPES, Pretrained
from drafters.base import weights, write_json
from train.processes.worker import environment

CARRIED = ("report.json", "report.md", "report.html", "report.png", "runs.jsonl")


class Publish:
    """Assembles drafter, tokenizer, model card and evidence.

    language: codes for the card; licence: of the drafter's weights, which the data decide;
    repository: where it will live on the Hub.
    """

    def __init__(
        self,
        *,
        target: Pretrained,
        language: list[str],
        licence: str,
        repository: str = "your-name/your-drafter",
    ) -> None:
        self.target, self.language, self.licence = target, language, licence
        self.repository = repository

    def run(
        self, out: Path, *, drafter: Path, report: Path, target: Path | None = None
    ) -> dict[str, float]:
        """Writes artifact/ and returns its size in bytes."""
        folder, part = out / "artifact", out / "artifact.part"
        shutil.rmtree(part, ignore_errors=True)
        shutil.copytree(drafter, part)
        measured = json.loads((report / "report.json").read_text(encoding="utf-8"))
        for name in CARRIED:
            shutil.copy2(report / name, part / name)
        as_measured(part, measured["conditions"])
        revision = measured["conditions"].get("target_revision")
        provenance = self._provenance(drafter, report, revision)
        card = self._card(part, measured, provenance, target)
        (part / "README.md").write_text(card, encoding="utf-8")
        write_json(part / "provenance.json", provenance)
        shutil.rmtree(folder, ignore_errors=True)
        part.rename(folder)
        size = sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())
        print(f"ready for the Hub: {folder} ({size / 2**20:.1f} MiB)", flush=True)
        return {"bytes": size}

    def _card(
        self,
        folder: Path,
        measured: dict[str, Any],
        provenance: dict[str, Any],
        target: Path | None,
    ) -> str:
        name = self.target.name
        base = name if name == self.target.path and not target else None  # a Hub id
        head = ["---", "library_name: transformers", "pipeline_tag: text-generation"]
        head += [f"license: {self.licence}", "language:", *(f"- {code}" for code in self.language)]
        if base:
            head += [f"base_model: {base}"]
        head += ["tags:", "- speculative-decoding", "- draft-model", "---"]
        lossless = (
            "Speculative decoding with it is lossless: greedy answers equal the target's, sampled "
            "ones follow its law. What was checked stands under Controls."
        )
        if change := measured["conditions"].get("target_change"):
            lossless = (
                f"**It does not leave the target as it was:** {change['said']}. The matrices are "
                "in `target_adapter` (peft); merge them into the target before you serve it."
            )
        body = (folder / "report.md").read_text(encoding="utf-8")
        return "\n".join(
            [
                *head,
                "",
                f"# A draft model for {name}",
                "",
                "It guesses; the target checks several tokens in one pass and stays the author. "
                + lossless,
                "",
                "## Use",
                "",
                _use(
                    json.loads((folder / "drafter.json").read_text(encoding="utf-8"))["family"],
                    base or "path/to/target",
                    self.repository,
                ),
                "",
                "## What it was trained on",
                "",
                *_data_lines(provenance),
                "",
                "## What was measured",
                "",
                body,
            ]
        )

    def _provenance(self, drafter: Path, report: Path, revision: str | None) -> dict[str, Any]:
        stages: dict[str, dict[str, Any]] = {}
        _trace(drafter, stages)
        _trace(report, stages)
        return {
            "stages": stages,
            "environment": environment(),
            "target": {"name": self.target.name, "revision": revision},
        }


def _trace(artifact: Path, stages: dict[str, dict[str, Any]]) -> None:
    """Adds the stage that made the artifact, after those that it was made from."""
    note = json.loads((artifact.parent / "stage.json").read_text(encoding="utf-8"))
    for source in note["inputs"].values():
        _trace(Path(source), stages)
    stages[note["name"]] = {
        "fingerprint": note["fingerprint"],
        "needs": {name: Path(place).parent.name for name, place in note["inputs"].items()},
        "config": _without_folders(note["config"]),
    }


def _without_folders(config: Any) -> Any:
    """The configuration with absolute paths cut to their names: the rest is this machine's."""
    if isinstance(config, dict):
        return {key: _without_folders(value) for key, value in config.items()}
    if isinstance(config, list):
        return [_without_folders(item) for item in config]
    if isinstance(config, str) and Path(config).is_absolute():
        return Path(config).name
    return config


def _data_lines(provenance: dict[str, Any]) -> list[str]:
    """A line for each source that a stage before the measurement read, with its licence."""
    lines = []
    for stage, body in provenance["stages"].items():
        if body["config"]["_target_"] == "eval.bench.Bench":
            continue
        for source in sources_in(body["config"]):
            said = source.get("licence") or "not stated"
            lines.append(f"- {stage}: {_called(source)} (licence: {said})")
    return lines


def sources_in(config: Any) -> list[dict[str, Any]]:
    """The configurations of sources in a stage's, those inside a Mix one by one."""
    if isinstance(config, list):
        return [found for item in config for found in sources_in(item)]
    if not isinstance(config, dict):
        return []
    if config.get("_target_") in ("data.sources.Local", "data.sources.Hub", "data.builtin.Builtin"):
        return [config]
    return [found for value in config.values() for found in sources_in(value)]


def _called(source: dict[str, Any]) -> str:
    if "files" in source:
        return ", ".join(source["files"])
    if "path" in source:
        return " ".join(p for p in (source["path"], source.get("name"), source.get("split")) if p)
    return f"Python's own {source['kind']} text"


def as_measured(folder: Path, conditions: dict[str, Any]) -> None:
    """Gives the files the dtype and the shape of draft that were measured.

    `generate(assistant_model=...)` reads the draft length from the drafter's own
    generation_config.json, our loader from drafter.json.
    """
    dtype = DTYPES[conditions["dtype"]]
    for file in folder.rglob("*.safetensors"):
        tensors = {
            name: tensor.to(dtype) if tensor.is_floating_point() else tensor
            for name, tensor in load_file(file).items()
        }
        save_file(tensors, file, metadata={"format": "pt"})
    _change(folder / "config.json", {"dtype": conditions["dtype"]})
    draft = conditions["draft"]
    _change(
        folder / "generation_config.json",
        {
            "num_assistant_tokens": draft.get("draft_length"),
            "num_assistant_tokens_schedule": "constant",
            "assistant_confidence_threshold": draft["stop_below"],
        },
    )
    note = json.loads((folder / "drafter.json").read_text(encoding="utf-8"))
    note["arguments"].pop("tree", None)
    note["arguments"] |= draft
    if note["arguments"].get("checkpoint"):  # its architecture is in config.json
        note["arguments"]["checkpoint"] = Path(note["arguments"]["checkpoint"]).name
    note["files"] = weights(folder)
    write_json(folder / "drafter.json", note)


def _change(file: Path, settings: dict[str, Any]) -> None:
    if file.is_file():
        write_json(file, json.loads(file.read_text(encoding="utf-8")) | settings)


def _use(family: str, target: str, drafter: str) -> str:
    """How to serve it: an `lm` in transformers; heads with this project's own loop."""
    if family == "lm":
        return _snippet(target, drafter)
    return f"""These are draft heads of the family `{family}` (`model.safetensors`, `config.json`;
`drafter.json` names the family and the shape of draft that was measured):

```python
from pathlib import Path

from huggingface_hub import snapshot_download
from transformers import AutoTokenizer

from decoding.loop import decode
from decoding.pretrained import Pretrained
from decoding.sampling import Sampling
from drafters.base import cast, load

folder = Path(snapshot_download("{drafter}"))
tokenizer = AutoTokenizer.from_pretrained(folder)  # the target's, with the template measured
target = Pretrained(path="{target}").load()
drafter = cast(load(folder, target.shape), target.dtype).to(target.device)
target = drafter.on(target)  # itself, unless the family changes it
messages = [{{"role": "user", "content": "..."}}]
ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
done = decode(target, drafter, [ids], sampling=Sampling(), max_new_tokens=256)
print(tokenizer.decode(done.answers[0].ids))
```"""


def _snippet(target: str, drafter: str) -> str:
    return f"""```python
from transformers import AutoModelForCausalLM, AutoTokenizer

# the target's, with the chat template that was measured
tokenizer = AutoTokenizer.from_pretrained("{drafter}")
target = AutoModelForCausalLM.from_pretrained("{target}", dtype="auto")
drafter = AutoModelForCausalLM.from_pretrained("{drafter}", dtype="auto")
messages = [{{"role": "user", "content": "..."}}]
inputs = tokenizer.apply_chat_template(
    messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
)
print(tokenizer.decode(target.generate(**inputs, assistant_model=drafter, max_new_tokens=256)[0]))
```"""

"""Stage `serve`: the drafter in other engines. They must load it, give the target's own answers and
accept as much as our loop does; a matrix says which did."""

import gc
import json
import shutil
import sys
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch

from data.chat import require_template
from data.sources import Source
from decoding.pretrained import DTYPES, Pretrained
from decoding.target import Target
from drafters.base import Trained, cast, load, write_json
from eval import agreement
from eval.agreement import Question
from eval.clients import PACKAGES, Asked, Served, ask, executed, installed
from eval.controls import Failed
from eval.forms import TARGET, Form, forms
from eval.prompts import collect
from eval.ties import exact_dtype

Row = dict[str, Any]


@dataclass(frozen=True)
class Place:
    """Of the matrix: an engine with a format, what it answered (None: it did not load), the row."""

    form: Form
    row: Row
    served: Served | None = None


class Serve:
    """Asks engines to serve a drafter, each with the Python of an environment that has it.

    engines: name -> that Python (null: not here, which the matrix says); transformers is here
    already. draft_length: of a chain (null: the one that the report measured, else the drafter's
    own). dtype: in which all decode; fp32, where answers are equal but for ties. snippets: whether
    the code that the card shows is run too.
    """

    def __init__(
        self,
        *,
        target: Pretrained,
        prompts: dict[str, Source | None],
        engines: dict[str, str | None] | None = None,
        heldout_only: bool = True,
        limit: int = 24,
        max_prompt_tokens: int = 256,
        max_new_tokens: int = 64,
        draft_length: int | None = None,
        dtype: str = "float32",
        snippets: bool = True,
    ) -> None:
        if limit < 2 or min(max_new_tokens - 1, max_prompt_tokens, draft_length or 1) < 1:
            raise ValueError(
                f"serve has limit {limit}, max_new_tokens {max_new_tokens}, max_prompt_tokens "
                f"{max_prompt_tokens}, draft_length {draft_length}; limit and max_new_tokens must "
                "be at least 2, the others 1"
            )
        if dtype not in DTYPES:
            raise ValueError(f"serve.dtype is {dtype!r}; it must be one of {list(DTYPES)}")
        if unknown := [name for name in engines or {} if name not in PACKAGES]:
            raise ValueError(
                f"serve.engines names {', '.join(unknown)}; there are clients for "
                f"{', '.join(PACKAGES)}"
            )
        self.prompts = {task: source for task, source in prompts.items() if source is not None}
        if not self.prompts:
            raise ValueError("serve has no prompts; give /data@stages.serve.prompts.TASK a source")
        named = {"transformers": sys.executable} | (engines or {})
        self.engines = {name: Path(python) for name, python in named.items() if python}
        self.target, self.heldout_only = target, heldout_only
        self.limit, self.max_prompt_tokens = limit, max_prompt_tokens
        self.max_new_tokens, self.draft_length = max_new_tokens, draft_length
        self.dtype, self.snippets = dtype, snippets

    def check(self, needs: dict[str, str]) -> None:
        """Raises ValueError for a Python that does not run or lacks its engine."""
        for engine, python in self.engines.items():
            if engine != "transformers" and installed(engine, python) is None:
                raise ValueError(
                    f"engines.{engine} is {python}, which has none of the packages "
                    f"{', '.join(PACKAGES[engine])}; install one there, or set it to null"
                )

    def run(
        self,
        out: Path,
        *,
        drafter: Path,
        export: Path | None = None,
        report: Path | None = None,
        target: Path | None = None,
        data: Path | None = None,
    ) -> dict[str, float]:
        """Writes artifact/served.json and artifact/logs/; returns tau by engine and format.

        export: the stage with the formats to serve (null: the drafter's own files). data: a
        generate stage, whose prompts are left out. Raises Failed where an engine does not load a
        format, changes answers, accepts other tokens than our loop, or a snippet does not run.
        """
        folder, part = out / "artifact", out / "artifact.part"
        shutil.rmtree(part, ignore_errors=True)
        (part / "logs").mkdir(parents=True)
        ours = load(drafter, self.target.shape_of(target))
        length = self._length(ours, report)
        prompts, origin = self._asked(self._longest(ours, target), target, data)
        formats, nobody = forms(drafter, ours, export)
        due = [(form, e) for form in formats for e in form.engines if e in self.engines]
        found: list[Place] = []
        if due:
            spec = self._spec(ours, target, export)
            plain = self._plain(spec, prompts)
            lengths = [len(ids) for ids in plain]
            asked = Asked(Path(str(spec.path)), prompts, lengths, length, self.dtype)
            found = [self._one(form, engine, asked, part / "logs") for form, engine in due]
            self._compare(found, spec, asked, drafter, plain)
        rows = [place.row for place in found]
        conditions = {
            "target": self.target.name, "dtype": self.dtype, "draft_length": length,
            "prompts": len(prompts), "prompt_source": origin, "max_new_tokens": self.max_new_tokens,
        }  # fmt: skip
        faults = [fault for row in rows for fault in agreement.faults(row)]
        written = {"conditions": conditions, "definitions": agreement.DEFINITIONS, "rows": rows}
        written |= {"bench": _benched(report), "not_run": self._absent(formats)}
        written |= {"nobody": nobody, "passed": not faults}
        write_json(part / "served.json", written)
        shutil.rmtree(folder, ignore_errors=True)
        part.rename(folder)
        for line in agreement.told(written):
            print(line, flush=True)
        if faults:
            raise Failed(f"what is served is not what was trained: {'; '.join(faults)}")
        return {f"tau_{row['engine']}_{row['format']}": row["tau"]["there"] for row in rows}

    def _length(self, ours: Trained, report: Path | None) -> int:
        """Of the chains that are drafted: engines verify no trees."""
        length = self.draft_length
        if length is None and report is not None:
            told = json.loads((report / "report.json").read_text(encoding="utf-8"))
            length = told["conditions"]["draft"].get("draft_length")
        length = length or int(getattr(ours, "draft_length"))  # noqa: B009  (no family says its type)
        return min(length, getattr(ours, "deepest", None) or length)

    def _longest(self, ours: Trained, target: Path | None) -> int:
        """The most tokens of a prompt that leaves room for its answer in both models."""
        positions = int(min(self.target.shape_of(target).max_positions, ours.max_positions))
        if positions <= self.max_new_tokens:
            raise ValueError(
                f"serve.max_new_tokens is {self.max_new_tokens} and the target and drafter have "
                f"{positions} positions for prompt and answer; lower it"
            )
        return min(self.max_prompt_tokens, positions - self.max_new_tokens)

    def _asked(
        self, longest: int, target: Path | None, data: Path | None
    ) -> tuple[list[list[int]], str]:
        tokenizer = self.target.tokenizer(target)
        require_template(tokenizer, self.target.path or "the target")
        prompts, origin = collect(
            self.prompts, tokenizer, limit=self.limit, most_tokens=longest,
            heldout_only=self.heldout_only, trained_on=data,
        )  # fmt: skip
        return [prompt.ids for prompt in prompts], f"{', '.join(self.prompts)} ({origin})"

    def _absent(self, formats: list[Form]) -> list[dict[str, str]]:
        """Who was not asked, and why."""
        return [
            {"engine": engine, "format": form.name, "why": _why_not(engine)}
            for form in formats
            for engine in form.engines
            if engine not in self.engines
        ]

    def _spec(self, ours: Trained, target: Path | None, export: Path | None) -> Pretrained:
        """The target that engines load, by its folder: the one that a drafter which changes its
        target was exported with, else the one that was named."""
        folder = target or _local(self.target)
        if ours.changes_target:
            assert export is not None, "no form of such a drafter is without its target"
            folder = export / TARGET
        return replace(self.target, path=str(folder), revision=None)

    def _plain(self, spec: Pretrained, prompts: list[list[int]]) -> list[list[int]]:
        """The target's own answers, up to their ends. It is dropped again: the device is the
        engines' now. Raises ValueError where they leave nothing to draft."""
        plain = agreement.answers(spec.load(dtype=self.dtype), prompts, self.max_new_tokens)
        gc.collect()
        torch.cuda.empty_cache()
        if max(map(len, plain)) < 2:
            raise ValueError(
                f"all {len(plain)} answers of the target end with their first token, so nothing is "
                "drafted; give serve other prompts (/data@stages.serve.prompts.TASK)"
            )
        return plain

    def _one(self, form: Form, engine: str, asked: Asked, logs: Path) -> Place:
        """A place of the matrix as far as the engine alone knows it."""
        python, log = self.engines[engine], logs / f"{engine}-{form.name}.log"
        version = installed(engine, python)
        print(f"serve: {form.layout} in {version}; starting it takes a while", flush=True)
        row: Row = {
            "engine": engine, "version": version, "family": form.family, "format": form.name,
            "method": form.method, "draft_length": asked.draft_length, "log": f"logs/{log.name}",
            "command": f"PYTHON eval/engines/{engine}_side.py REQUEST ANSWER", "snippet": None,
        }  # fmt: skip
        try:
            served = ask(engine, python, asked, drafter=form.folder, method=form.method, log=log)
        except Failed as error:
            return Place(form, row | {"loaded": False, "error": str(error)})
        row |= {"loaded": True, "version": served.version}
        row["seconds"] = {"plain": served.plain_seconds, "drafting": served.seconds}
        if self.snippets:
            row["snippet"] = executed(form, engine, python, asked, logs)
        return Place(form, row, served)

    def _compare(
        self,
        found: list[Place],
        spec: Pretrained,
        asked: Asked,
        drafter: Path,
        plain: list[list[int]],
    ) -> None:
        """Adds to the rows what our loop says of the same."""
        length, model = asked.draft_length, spec.load(dtype=self.dtype)
        question = Question(model, asked.prompts, plain, length)
        finer = cache(lambda: spec.load(dtype=exact_dtype(model.dtype)))

        def ours(model: Target, rounded: str) -> Trained:
            """The drafter as the files hold it, in the target's dtype and place."""
            mine: Any = cast(load(drafter, model.shape), DTYPES[rounded])
            mine.draft_length, mine.tree, mine.stop_below = length, None, 0.0
            return cast(mine, model.dtype).to(model.device)

        for place in found:
            if (served := place.served) is None:
                continue
            counting = partial(
                agreement.here, drafts_first=served.drafts_first, cuts_last=served.cuts_last
            )

            def again(
                numbers: list[int], counting: Any = counting, rounded: str = place.form.dtype
            ) -> list[list[int]]:
                exact = replace(question, target=finer())
                return counting(exact, ours(exact.target, rounded), only=numbers)

            mine = counting(question, ours(model, place.form.dtype))
            place.row["answers"] = agreement.equality(question, served, finer)
            place.row.update(agreement.compared(question, served, mine, again))


def _benched(report: Path | None) -> Row | None:
    """What the report says of the same at temperature 0, batch 1."""
    if report is None:
        return None
    told = json.loads((report / "report.json").read_text(encoding="utf-8"))
    shape = told["conditions"].get("draft_shape")
    found = [entry["tau"] for entry in told.get("headline", []) if entry["temperature"] == 0]
    return {"tau": found[0], "draft_shape": shape} if found else None


def _local(target: Pretrained) -> Path:
    """The target's folder; of a Hub id the one in the cache, fetched whole."""
    assert target.path is not None, "a target comes from a stage or has a path"
    if Path(target.path).is_dir():
        return Path(target.path)
    from huggingface_hub import snapshot_download

    kinds = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt"]
    return Path(snapshot_download(target.path, revision=target.revision, allow_patterns=kinds))


def _why_not(engine: str) -> str:
    if engine not in PACKAGES:
        return "it needs a GPU, and there is no client for it here"
    return f"not installed here: engines.{engine} names no Python"

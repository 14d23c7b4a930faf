"""Stage `serve`: the drafter in other engines. They must load it, give the target's own answers and
accept as much as our loop does; a matrix says which did."""

import json
import shutil
import sys
import tempfile
import time
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

from data.chat import require_template
from data.sources import Source
from decoding.pretrained import DTYPES, Pretrained
from decoding.target import Target
from drafters.base import Trained, cast, load, write_json
from eval import agreement
from eval.agreement import Question
from eval.clients import PACKAGES, Served, ask, installed, run, why
from eval.controls import Failed
from eval.engines.snippets import snippet
from eval.forms import Form, forms
from eval.prompts import collect
from eval.ties import exact_dtype

Row = dict[str, Any]


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
        rows, answers, absent = self._ask(formats, target, prompts, length, part / "logs")
        self._compare(answers, drafter, target, prompts, length)
        conditions = {
            "target": self.target.name, "dtype": self.dtype, "draft_length": length,
            "prompts": len(prompts), "prompt_source": origin, "max_new_tokens": self.max_new_tokens,
        }  # fmt: skip
        faults = [fault for row in rows for fault in agreement.faults(row)]
        written = {"conditions": conditions, "definitions": agreement.DEFINITIONS, "rows": rows}
        written |= {"not_run": absent, "nobody": nobody, "passed": not faults}
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

    def _ask(
        self,
        formats: list[Form],
        target: Path | None,
        prompts: list[list[int]],
        length: int,
        logs: Path,
    ) -> tuple[list[Row], list[tuple[Row, Served, Form]], list[dict[str, str]]]:
        """The matrix as far as the engines alone know it, their answers, and who was not asked."""
        rows, answers, absent = [], [], []
        place = target or _local(self.target)
        for form in formats:
            for engine in form.engines:
                if engine not in self.engines:
                    told = {"engine": engine, "format": form.name, "why": _why_not(engine)}
                    absent.append(told)
                    continue
                row, served = self._one(form, engine, place, prompts, length, logs)
                rows.append(row)
                answers += [(row, served, form)] if served else []
        return rows, answers, absent

    def _one(
        self,
        form: Form,
        engine: str,
        target: Path,
        prompts: list[list[int]],
        length: int,
        logs: Path,
    ) -> tuple[Row, Served | None]:
        python, log = self.engines[engine], logs / f"{engine}-{form.name}.log"
        version = installed(engine, python)
        print(f"serve: {form.layout} in {version}; starting it takes a while", flush=True)
        row: Row = {
            "engine": engine, "version": version, "family": form.family, "format": form.name,
            "method": form.method, "draft_length": length, "log": f"logs/{log.name}",
            "command": f"PYTHON eval/engines/{engine}_side.py REQUEST ANSWER", "snippet": None,
        }  # fmt: skip
        try:
            served = ask(
                engine, python, target=target, drafter=form.folder, method=form.method,
                prompts=prompts, max_new_tokens=self.max_new_tokens, draft_length=length,
                dtype=self.dtype, log=log,
            )  # fmt: skip
        except Failed as error:
            return row | {"loaded": False, "error": str(error)}, None
        row |= {"loaded": True, "version": served.version}
        row["seconds"] = {"plain": served.plain_seconds, "drafting": served.seconds}
        if self.snippets:
            row["snippet"] = executed(form, engine, python, target, length, logs)
        return row, served

    def _compare(
        self,
        answers: list[tuple[Row, Served, Form]],
        drafter: Path,
        target: Path | None,
        prompts: list[list[int]],
        length: int,
    ) -> None:
        """Adds what our loop says of the same. The target is loaded only now: until here the
        device was the engines'."""
        if not answers:
            return
        model = self.target.load(target, self.dtype)
        question = Question.of(model, prompts, self.max_new_tokens, length)
        finer = cache(lambda: self.target.load(target, exact_dtype(model.dtype)))

        def ours(model: Target, rounded: str) -> Trained:
            """The drafter as the files hold it, in the target's dtype and place."""
            mine: Any = cast(load(drafter, model.shape), DTYPES[rounded])
            mine.draft_length, mine.tree, mine.stop_below = length, None, 0.0
            return cast(mine, model.dtype).to(model.device)

        for row, served, form in answers:
            counting = partial(
                agreement.here, drafts_first=served.drafts_first, cuts_last=served.cuts_last
            )

            def again(
                numbers: list[int], counting: Any = counting, rounded: str = form.dtype
            ) -> list[list[int]]:
                exact = replace(question, target=finer())
                return counting(exact, ours(exact.target, rounded), only=numbers)

            mine = counting(question, ours(model, form.dtype))
            row["answers"] = agreement.equality(question, served, finer)
            row |= agreement.compared(question, served, mine, again)


def executed(
    form: Form, engine: str, python: Path, target: Path, length: int, logs: Path
) -> Row | None:
    """Runs the code that the card shows; {executed, seconds, log} and, where it did not run,
    `error`. None: there is none for this engine and layout."""
    folders = {str(target): "TARGET", str(form.folder): "DRAFTER"}
    try:
        code = snippet(engine, form.layout, str(target), str(form.folder), length)
    except ValueError:
        return None
    log = logs / f"{engine}-{form.name}-snippet.log"
    shown = code
    for path, name in folders.items():
        shown = shown.replace(path, name)
    log.write_text(f"{shown}\n--- what it printed\n", encoding="utf-8")
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory() as place:
        file = Path(place) / "snippet.py"
        file.write_text(code, encoding="utf-8")
        code_left = run(engine, python, [str(file)], log, folders | {place: "."})
    row: Row = {"executed": code_left == 0, "seconds": time.perf_counter() - begin}
    row["log"] = f"logs/{log.name}"
    return row if code_left == 0 else row | {"error": why(code_left, log)}


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

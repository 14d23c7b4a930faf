"""Stage `bench`: draft-and-verify against autoregressive decoding through the same loop.

The number it prints is wall-clock: prompts, drafter, verification and all, on this device.
"""

import json
import random
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from data.chat import require_same_tokenizer, require_template
from data.sources import Source, prompt_key
from decoding.loop import Decoded, decode
from decoding.pretrained import Pretrained
from decoding.sampling import Sampling
from decoding.target import Target
from decoding.verify import Rule, Typical
from drafters.base import Drafter, Trained, cast, load, write_json
from drafters.trees import tree_of
from eval import controls
from eval.change import changed
from eval.cost import pass_milliseconds
from eval.prompts import Prompt, collect
from eval.report import headline_lines, summarise, write_report
from eval.runs import KEYS, groups_of, read, row
from eval.shapes import Shape, shapes_of

VERIFIED = 6  # tokens of a pass when the cost of verification is measured
BAR = "{desc}: {percentage:3.0f}% |{bar}| {elapsed} gone, {remaining} left"
DTYPES = ("bfloat16", "float32")
CHANGED = "for the changed target, not for the original"
LOSSY = "drafter, typical acceptance (LOSSY)"
Arms = dict[str, tuple[Target, Drafter | None, Rule | None]]


@dataclass(frozen=True)
class Choice:
    """What a measurement settled on before it began; tried: tokens/s of each shape."""

    dtype: str
    why: str
    tried: dict[str, float]
    shape: Shape


class Bench:
    """Measures a drafter on prompts of one or more tasks.

    Arms (autoregressive, the drafter, each baseline) run in turn on each prompt, `repeats` times;
    chains of `draft_lengths`, `trees` and what a tune_tree stage found (where the family grows
    trees) are tried on `trial_prompts` prompts that are then left out, and the fastest is used.
    dtype null takes the faster of bf16 and fp32 by the measured cost of verification.
    Batch sizes above 1 are measured on prompts whose answers were not repetitive. typical: adds
    an arm that verifies by Medusa's lossy rule, and says so in its name.
    """

    on_device = True

    def __init__(
        self,
        *,
        target: Pretrained,
        prompts: dict[str, Source | None],
        heldout_only: bool = True,
        limit: int = 40,
        max_prompt_tokens: int = 512,
        max_new_tokens: int = 128,
        temperatures: list[float],
        batch_sizes: list[int],
        draft_lengths: list[int],
        trees: list[dict[str, Any]] | None = None,
        trial_prompts: int = 12,
        control_prompts: int = 6,
        repeats: int = 3,
        baselines: dict[str, Drafter | None] | None = None,
        typical: Typical | None = None,
        dtype: str | None = None,
        stop_below: float = 0.0,
        sample: bool = True,
        seed: int = 0,
    ) -> None:
        sizes = [limit, max_new_tokens, repeats, trial_prompts, control_prompts]
        if min([*sizes, *batch_sizes, *draft_lengths], default=0) < 1 or not temperatures:
            raise ValueError(
                "bench needs temperatures, batch_sizes and draft_lengths, and limit, "
                "max_new_tokens, repeats, trial_prompts and control_prompts of at least 1"
            )
        for temperature in temperatures:
            Sampling(temperature=temperature)  # its own checks, before anything starts
        if not any(prompts.values()):
            raise ValueError("bench has no prompts; give /data@stages.bench.prompts.TASK a source")
        self.prompts = {task: source for task, source in prompts.items() if source is not None}
        self.target, self.heldout_only = target, heldout_only
        self.limit, self.max_prompt_tokens, self.max_new_tokens = (
            limit, max_prompt_tokens, max_new_tokens,
        )  # fmt: skip
        self.temperatures, self.batch_sizes = temperatures, batch_sizes
        for tree in trees or []:
            tree_of(tree)  # its own checks, before anything starts
        self.draft_lengths, self.trees, self.trial_prompts = (
            draft_lengths, trees or [], trial_prompts,
        )  # fmt: skip
        self.control_prompts, self.repeats = control_prompts, repeats
        self.baselines = {k: v for k, v in (baselines or {}).items() if v is not None}
        self.typical = typical
        self.dtype, self.seed = dtype, seed
        self.stop_below, self.sample = stop_below, sample

    def run(
        self,
        out: Path,
        *,
        drafter: Path,
        target: Path | None = None,
        data: Path | None = None,
        tree: Path | None = None,
    ) -> dict[str, float]:
        """Writes artifact/: report.json, report.md, report.png, runs.jsonl. `data` names the
        generate stage whose prompts must not be measured on, `tree` a tune_tree stage."""
        tokenizer = self.target.tokenizer(target)
        require_template(tokenizer, self.target.path or "the target")
        require_same_tokenizer(tokenizer, str(drafter))
        prompts, origin = collect(
            self.prompts,
            tokenizer,
            limit=self.limit + (self.trial_prompts if len(self.prompts) == 1 else 0),
            most_tokens=self.max_prompt_tokens,
            heldout_only=self.heldout_only,
            trained_on=data,
        )
        print(origin, flush=True)
        trial, prompts = _split(prompts, self.trial_prompts, self.seed)

        chosen = self._settle(drafter, target, trial, tree, out / "choice.json")
        found = self._controls(drafter, target, prompts, chosen.shape)
        for name, control in found.items():
            print(f"control, {name}: {control['found']}", flush=True)
        model = self.target.load(target, chosen.dtype)
        ours = self._drafter(drafter, model, chosen.shape)
        decoded = ours.on(model)
        arms: Arms = {"autoregressive": (model, None, None), "drafter": (decoded, ours, None)}
        arms |= {name: (model, baseline, None) for name, baseline in self.baselines.items()}
        arms |= {} if self.typical is None else {LOSSY: (decoded, ours, self.typical)}
        runs = self._measure(arms, prompts, out / "runs.jsonl")
        conditions = self._conditions(model, ours, chosen, prompts, origin)
        if decoded is not model:
            some = [p.ids for p in prompts]
            change = changed(model, decoded, some, self.max_new_tokens, self.seed)
            conditions |= {"target_change": change, "rule": f"{conditions['rule']}: {CHANGED}"}
        report = summarise(runs, conditions, found)
        write_report(out / "artifact", report, runs)
        for line in headline_lines(report):
            print(line, flush=True)
        if not report["passed"]:
            raise controls.Failed(
                "a control failed, so the speed cannot be trusted: "
                + "; ".join(c["found"] for c in found.values() if not c["passed"])
            )
        return _headline_metrics(report)

    def _settle(
        self,
        drafter: Path,
        target: Path | None,
        trial: list[Prompt],
        tuned: Path | None,
        kept: Path,
    ) -> "Choice":
        """The dtype to measure in and the shape to draft in; chosen once, also over restarts."""
        if not kept.is_file():
            model, why = self._load(target)
            ours = self._drafter(drafter, model, None)
            shapes = shapes_of(ours, self.draft_lengths, self.trees, tuned)
            tried = self._try(ours.on(model), ours, trial, shapes)
            best = max(shapes, key=lambda shape: tried.get(str(shape), 0.0))
            dtype = str(model.dtype).removeprefix("torch.")
            write_json(kept, {"dtype": dtype, "why": why, "tried": tried, "shape": asdict(best)})
        note = json.loads(kept.read_text(encoding="utf-8"))
        return Choice(**note | {"shape": Shape(**note["shape"])})

    def _drafter(self, folder: Path, model: Target, shape: Shape | None) -> Trained:
        """The drafter in the target's dtype and place, drafting as configured and in this shape."""
        ours = cast(load(folder, model.shape), model.dtype).to(model.device)
        ours.stop_below, ours.sample = self.stop_below, self.sample  # type: ignore[assignment]
        if shape is not None:
            shape.give(ours)
        return ours

    def _controls(
        self, drafter: Path, target: Path | None, prompts: list[Prompt], shape: Shape
    ) -> dict[str, dict[str, Any]]:
        """In fp32, where equality is exact but for ties: what must hold whatever the speed."""
        exact = self.target.load(target, dtype="float32")
        some = [p.ids for p in prompts[: self.control_prompts]]
        ours = self._drafter(drafter, exact, shape)
        return controls.run(ours.on(exact), ours, some, min(48, self.max_new_tokens), self.seed)

    def _load(self, folder: Path | None) -> tuple[Target, str]:
        """The target in the dtype to measure in, and why that one."""
        if self.dtype:
            return self.target.load(folder, self.dtype), "configured"
        cost = {}
        for dtype in DTYPES:
            cost[dtype] = pass_milliseconds(self.target.load(folder, dtype), VERIFIED)
        best = min(cost, key=lambda dtype: cost[dtype])
        shown = ", ".join(f"{dtype} {ms:.2f} ms" for dtype, ms in cost.items())
        why = f"the faster at verifying {VERIFIED} tokens: {shown}"
        return self.target.load(folder, best), why

    def _try(
        self, model: Target, ours: Trained, trial: list[Prompt], shapes: list[Shape]
    ) -> dict[str, float]:
        """Tokens/s of each shape on the trial prompts, in turn; {} where there is only one.

        Over all temperatures together, since one drafter serves them all.
        """
        if len(shapes) == 1:
            return {}
        arm, names = (model, ours, None), [str(shape) for shape in shapes]
        tokens, seconds = dict.fromkeys(names, 0), dict.fromkeys(names, 0.0)
        for turn, prompt in enumerate(tqdm(trial[:1] + trial, desc="shapes of draft")):
            for shape, name in zip(shapes, names, strict=True):
                shape.give(ours)
                for temperature in self.temperatures:
                    done = self._answer(arm, [prompt], temperature, 0)
                    if turn:  # the first is the warm-up
                        tokens[name] += done.tokens
                        seconds[name] += done.seconds
        return {name: tokens[name] / seconds[name] for name in names}

    def _measure(self, arms: Arms, prompts: list[Prompt], kept: Path) -> list[dict[str, Any]]:
        """Every run, arms in turn; those that stand in `kept` already are not made again."""
        runs = read(kept)
        have = {tuple(run[key] for key in KEYS) for run in runs}
        cells = [(b, t) for b in sorted(self.batch_sizes) for t in self.temperatures]
        for arm in arms.values():  # warm-up: not counted
            self._answer(arm, prompts[:1], self.temperatures[-1], 0)
        with (
            tqdm(total=len(cells) + 1e-6, desc="bench", bar_format=BAR) as bar,
            kept.open("a") as stream,
        ):
            for batch, temperature in cells:
                groups = groups_of(prompts, batch, temperature, runs)
                if not groups:
                    tqdm.write(f"batch {batch} at T={temperature:g}: not measured, too few prompts")
                turns = [(r, n) for r in range(self.repeats) for n in range(len(groups))]
                for repeat, number in turns:
                    for name, arm in arms.items():
                        if (name, temperature, batch, repeat, number) in have:
                            continue
                        together = [prompts[i] for i in groups[number]]
                        done = self._answer(arm, together, temperature, repeat)
                        place = (name, temperature, batch, repeat, number)
                        runs.append(row(place, groups[number], prompts, done))
                        stream.write(json.dumps(runs[-1]) + "\n")
                    bar.update(1 / len(turns))
        return runs

    def _answer(
        self,
        arm: tuple[Target, Drafter | None, Rule | None],
        prompts: list[Prompt],
        temperature: float,
        repeat: int,
    ) -> Decoded:
        """Answers of one arm; a prompt's randomness is its own, whatever it is decoded with."""
        model, drafter, rule = arm
        return decode(
            model,
            drafter,
            [p.ids for p in prompts],
            sampling=Sampling(temperature=temperature, seed=self.seed + repeat),
            max_new_tokens=self.max_new_tokens,
            rule=rule,
            requests=[int(prompt_key(p.text)[:8], 16) for p in prompts],
        )

    def _conditions(
        self,
        model: Target,
        ours: Trained,
        chosen: "Choice",
        prompts: list[Prompt],
        origin: str,
    ) -> dict[str, Any]:
        from importlib.metadata import version

        return {
            "target": model.name,
            "target_revision": model.revision,
            "drafter": type(ours).__module__.removeprefix("drafters."),
            "parameters_target": sum(p.numel() for p in model.parameters()),
            "parameters_drafter": sum(p.numel() for p in ours.parameters()),
            "device": str(model.device),
            "threads": torch.get_num_threads(),
            "dtype": str(model.dtype).removeprefix("torch."),
            "dtype_reason": chosen.why,
            "draft_shape": str(chosen.shape),
            "draft": chosen.shape.arguments()
            | {"stop_below": self.stop_below, "sample": self.sample},
            "draft_shape_choice": chosen.tried,
            "rule": f"{_rules(chosen.shape, self.sample)} (lossless)",
            "max_new_tokens": self.max_new_tokens,
            "repeats": self.repeats,
            "prompts": len(prompts),
            "prompt_source": f"{', '.join(self.prompts)} ({origin})",
            "versions": {name: version(name) for name in ("torch", "transformers")},
        }


def _rules(shape: Shape, sample: bool) -> str:
    """How drafts of this shape are verified, in words."""
    kind = shape.tree["kind"] if shape.tree else "chain"
    if kind in ("static", "dynamic") or not sample:
        return "one-hot"
    sampled = "block verification" if kind == "chain" else "recursive rejection"
    return f"one-hot at temperature 0, {sampled} above"


def _split(prompts: list[Prompt], trial: int, seed: int) -> tuple[list[Prompt], list[Prompt]]:
    """Prompts to choose the draft length on, and the others, which are measured."""
    shuffled = list(prompts)
    random.Random(seed).shuffle(shuffled)
    trial = min(trial, len(shuffled) // 4 or 1)
    return shuffled[:trial], shuffled[trial:] or shuffled


def _headline_metrics(report: dict[str, Any]) -> dict[str, float]:
    """The headline as flat numbers, for sweeps and the summary."""
    metrics = {}
    for entry in report["headline"]:
        at = f"T{entry['temperature']:g}"
        for key in ("speedup", "tau"):
            if entry[key]["value"] is not None:
                metrics[f"{key}_{at}"] = entry[key]["value"]
    return metrics

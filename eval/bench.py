"""Stage `bench`: draft-and-verify against autoregressive decoding through the same loop.

The number it prints is wall-clock: prompts, drafter, verification and all, on this device.
"""

import json
import random
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from data.chat import require_same_tokenizer, require_template
from data.sources import Source
from decoding.constraint import Grammars
from decoding.pretrained import Pretrained
from decoding.ranks import Ranks
from decoding.sampling import Sampling
from decoding.target import Target
from decoding.verify import Typical
from drafters.base import Drafter, Trained, cast, load, write_json
from drafters.layer_skip import LayerSkip
from drafters.trees import tree_of
from eval import choice, controls, evidence, ties, timed_controls
from eval.arms import AUTOREGRESSIVE, DRAFTER, LOSSY, Arm, beside
from eval.choice import Choice
from eval.prompts import Prompt, collect, with_later_turns
from eval.ranks import Row
from eval.report import headline_lines, summarise, write_report
from eval.runs import measure
from eval.schema import refusal, sentence, validity
from eval.shapes import Shape, shapes_of

CHANGED = "for the changed target, not for the original"


class Bench:
    """Measures a drafter on prompts of one or more tasks.

    Arms (autoregressive, the drafter, each baseline) run in turn on each prompt, `repeats` times;
    chains of `draft_lengths`, `trees` and what a tune_tree stage found (where the family grows
    trees) are tried on `trial_prompts` prompts that are then left out, and the fastest is used.
    dtype null takes the faster of bf16 and fp32 by the measured cost of verification.
    Batch sizes above 1 are measured on prompts whose answers were not repetitive. Up to `turns`
    turns of a conversation are asked. typical: adds an arm that verifies by Medusa's lossy rule,
    and says so in its name. law_samples: answers of each arm that the test of the sampling law
    draws at each temperature above 0; 0 leaves it out. graphs: decoding/graphs.py (needs a GPU).
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
        turns: int = 2,
        law_samples: int = 2000,
        graphs: bool = False,
        seed: int = 0,
    ) -> None:
        sizes = [limit, max_new_tokens, repeats, trial_prompts, control_prompts, turns]
        if min([*sizes, *batch_sizes, *draft_lengths], default=0) < 1 or not temperatures:
            raise ValueError(
                "bench needs temperatures, batch_sizes and draft_lengths, and limit, "
                "max_new_tokens, repeats, trial_prompts, control_prompts and turns of at least 1"
            )
        for temperature in temperatures:
            Sampling(temperature=temperature)  # its own checks, before anything starts
        if not any(prompts.values()):
            raise ValueError("bench has no prompts; give /data@stages.bench.prompts.TASK a source")
        self.prompts = {task: source for task, source in prompts.items() if source is not None}
        self.target, self.heldout_only = replace(target.for_decoding(), graphs=graphs), heldout_only
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
        self.turns, self.law_samples = turns, law_samples

    def run(
        self,
        out: Path,
        *,
        drafter: Path,
        target: Path | None = None,
        data: Path | None = None,
        tree: Path | None = None,
        layers: Path | None = None,
    ) -> dict[str, float]:
        """Writes artifact/: report.json, report.md, report.html, report.png, runs.jsonl. `data`
        names the generate stage whose prompts must not be measured on, `tree` a tune_tree stage,
        `layers` a skip_layers stage, whose mask becomes one more baseline."""
        tokenizer = self.target.tokenizer(target)
        require_template(tokenizer, self.target.path or "the target")
        require_same_tokenizer(tokenizer, str(drafter))
        ranks = Ranks.here(together=self.target.parallel is not None)
        tell = print if ranks.first else _nothing
        longest = self._longest(target, drafter)
        prompts, grammars, conditions = self._prompts(tokenizer, data, longest)
        tell(conditions["prompt_source"], flush=True)
        trial, prompts = _split(prompts, self.trial_prompts, self.seed)

        kept = out / "choice.json"
        chosen = self._settle(ranks, drafter, target, trial, grammars, tree, kept)
        model = self.target.load(target, chosen.dtype)
        plain = Arm(model, grammars=grammars)
        prompts = self._with_later_turns(ranks, plain, tokenizer, prompts, longest, out)
        ours = self._drafter(drafter, model, chosen.shape)
        found = self._controls(ranks, drafter, target, model, prompts, chosen.shape)
        for name, control in found.items():
            tell(f"control, {name}: {control['found']}", flush=True)
        arms = self._arms(plain, ours, layers)
        runs = measure(
            arms,
            prompts,
            out / "runs.jsonl",
            ranks=ranks,
            cells=[(b, t) for b in sorted(self.batch_sizes) for t in self.temperatures],
            repeats=self.repeats,
            seed=self.seed,
            max_new_tokens=self.max_new_tokens,
        )
        if not (ranks.first or ranks.together):
            return {}
        exact = self.target.load(target, ties.exact_dtype(model.dtype))
        checks, more = evidence.gathered(
            runs, prompts, arms, exact, chosen.shape, limit=self.max_new_tokens, seed=self.seed
        )
        for name, control in checks.items():
            tell(f"control, {name}: {control['found']}", flush=True)
        conditions |= more | self._settings(chosen, "target_change" in more)
        conditions |= {"ranks": ranks.world, "graphs": self.target.graphs}
        conditions |= {"parallel": self.target.parallel} if ranks.together else {}
        if grammars is not None:
            schemas = [p.schema for p in prompts]
            conditions["structured"] = validity(runs, schemas, tokenizer, model.end_ids)
            for count in conditions["structured"]:
                tell(sentence(count), flush=True)
        return _reported(out / "artifact", runs, conditions, found | checks) if ranks.first else {}

    def _longest(self, target: Path | None, drafter: Path) -> int:
        """The most tokens of a prompt that leaves room for its answer in both models."""
        shape = self.target.shape_of(target)
        positions = int(min(shape.max_positions, load(drafter, shape).max_positions))
        if positions <= self.max_new_tokens:
            raise ValueError(
                f"max_new_tokens is {self.max_new_tokens} and the target and drafter have "
                f"{positions} positions for prompt and answer; lower it"
            )
        return min(self.max_prompt_tokens, positions - self.max_new_tokens)

    def _prompts(
        self, tokenizer: Any, data: Path | None, longest: int
    ) -> tuple[list[Prompt], Grammars | None, dict[str, Any]]:
        """What is asked, what answers with a schema must match, and the conditions that say so."""
        revisions = {n: c for s in self.prompts.values() for n, c in s.revisions().items()}
        prompts, origin = collect(
            self.prompts,
            tokenizer,
            limit=self.limit + (self.trial_prompts if len(self.prompts) == 1 else 0),
            most_tokens=longest,
            heldout_only=self.heldout_only,
            trained_on=data,
        )
        grammars = None
        if any(prompt.schema is not None for prompt in prompts):
            grammars = Grammars(tokenizer)
            fit = [p for p in prompts if p.schema is None or not refusal(p.schema, grammars)]
            if not fit:
                raise ValueError("no schema of these prompts can be followed; choose others")
            origin += f", {len(prompts) - len(fit):,} because their schema cannot be followed"
            prompts = fit
        told = {"prompt_source": f"{', '.join(self.prompts)} ({origin})"}
        return prompts, grammars, told | ({"data_revisions": revisions} if revisions else {})

    def _arms(self, plain: Arm, ours: Trained, layers: Path | None) -> dict[str, Arm]:
        """The baseline first, then the drafter and what it is measured beside."""
        mine = replace(plain, target=ours.on(plain.target), drafter=ours)
        skipping = {} if layers is None else {"layer_skip": LayerSkip.found(layers)}
        arms = {AUTOREGRESSIVE: plain, DRAFTER: mine}
        arms |= beside(plain.target, self.baselines | skipping, plain.grammars)
        return arms | ({} if self.typical is None else {LOSSY: replace(mine, rule=self.typical)})

    def _with_later_turns(
        self,
        ranks: Ranks,
        plain: Arm,
        tokenizer: Any,
        prompts: list[Prompt],
        longest: int,
        out: Path,
    ) -> list[Prompt]:
        """Later turns stand behind the target's own greedy answers to the earlier ones; found once,
        also over restarts, since rows name prompts by their number."""
        kept = out / "prompts.json"

        def answer(some: list[Prompt]) -> list[list[int]]:
            bar = tqdm(some, desc="earlier turns", disable=not ranks.first)
            answers = [plain.answer([p], Sampling(), self.max_new_tokens).answers[0] for p in bar]
            return [answer.ids for answer in answers]

        def find() -> list[dict[str, Any]]:
            if kept.is_file():
                return json.loads(kept.read_text(encoding="utf-8"))
            asked = with_later_turns(
                prompts, tokenizer, answer, turns=self.turns, most_tokens=longest
            )
            return [asdict(prompt) for prompt in asked]

        found = ranks.decide(find)
        if ranks.first:
            write_json(kept, found)
        return [Prompt(**prompt) for prompt in found]

    def _settle(
        self,
        ranks: Ranks,
        drafter: Path,
        target: Path | None,
        trial: list[Prompt],
        grammars: Grammars | None,
        tuned: Path | None,
        kept: Path,
    ) -> Choice:
        """The dtype to measure in and the shape to draft in; chosen once, also over restarts."""

        def choose() -> dict[str, Any]:
            if kept.is_file():
                return json.loads(kept.read_text(encoding="utf-8"))
            model, why = choice.load_fastest(self.target, target, self.dtype)
            ours = self._drafter(drafter, model, None)
            shapes = shapes_of(ours, self.draft_lengths, self.trees, tuned)
            samplings = [Sampling(temperature=t, seed=self.seed) for t in self.temperatures]
            arm = Arm(ours.on(model), ours, grammars=grammars)
            tried = choice.try_shapes(arm, shapes, trial, samplings, self.max_new_tokens)
            best = max(shapes, key=lambda shape: tried.get(str(shape), 0.0))
            dtype = str(model.dtype).removeprefix("torch.")
            return {"dtype": dtype, "why": why, "tried": tried, "shape": asdict(best)}

        note = ranks.decide(choose)
        if ranks.first:
            write_json(kept, note)
        return Choice(**note | {"shape": Shape(**note["shape"])})

    def _drafter(self, folder: Path, model: Target, shape: Shape | None) -> Trained:
        """The drafter in the target's dtype and place, drafting as configured and in this shape."""
        ours = cast(load(folder, model.shape), model.dtype).to(model.device)
        ours.stop_below, ours.sample = self.stop_below, self.sample  # type: ignore[assignment]
        if shape is not None:
            shape.give(ours)
        return ours

    def _controls(
        self,
        ranks: Ranks,
        drafter: Path,
        target: Path | None,
        model: Target,
        prompts: list[Prompt],
        shape: Shape,
    ) -> dict[str, dict[str, Any]]:
        """What must hold whatever the speed: in fp32, where equality is exact but for ties; of the
        clock, in the dtype that is measured; and of the law that sampled answers have."""
        some, tokens = prompts[: self.control_prompts], min(48, self.max_new_tokens)

        def check() -> dict[str, dict[str, Any]]:
            exact = self.target.load(target, dtype="float32")
            ours = self._drafter(drafter, exact, shape)
            ids = [p.ids for p in some]
            found = controls.run(ours.on(exact), ours, ids, tokens, self.seed)
            found |= timed_controls.run(model, ids, tokens, self.seed)
            return found | evidence.of_the_law(
                ours.on(exact), ours, some, self.temperatures, self.law_samples, self.seed
            )

        return ranks.decide(check)

    def _settings(self, chosen: Choice, target_changed: bool) -> dict[str, Any]:
        """The conditions that were configured, or chosen here."""
        rule = f"{choice.rules(chosen.shape, self.sample)} (lossless)"
        return {
            "dtype_reason": chosen.why,
            "draft_shape": str(chosen.shape),
            "draft": chosen.shape.arguments()
            | {"stop_below": self.stop_below, "sample": self.sample},
            "draft_shape_choice": chosen.tried,
            "rule": f"{rule}: {CHANGED}" if target_changed else rule,
            "max_new_tokens": self.max_new_tokens,
            "repeats": self.repeats,
        }


def _split(prompts: list[Prompt], trial: int, seed: int) -> tuple[list[Prompt], list[Prompt]]:
    """Prompts to choose the draft length on, and the others, which are measured."""
    shuffled = list(prompts)
    random.Random(seed).shuffle(shuffled)
    trial = min(trial, len(shuffled) // 4 or 1)
    return shuffled[:trial], shuffled[trial:] or shuffled


def _nothing(*_: object, **__: object) -> None:
    """What ranks other than the first print."""


def _reported(
    folder: Path, runs: list[Row], conditions: dict[str, Any], found: dict[str, dict[str, Any]]
) -> dict[str, float]:
    """Writes and tells the report; the headline as flat numbers, for sweeps and the summary."""
    report = summarise(runs, conditions, found)
    write_report(folder, report, runs)
    for line in headline_lines(report):
        print(line, flush=True)
    if not report["passed"]:
        failed = [control["found"] for control in found.values() if not control["passed"]]
        raise controls.Failed(
            f"a control failed, so the speed cannot be trusted: {'; '.join(failed)}"
        )
    return {
        f"{key}_T{entry['temperature']:g}": entry[key]["value"]
        for entry in report["headline"]
        for key in ("speedup", "tau")
        if entry[key]["value"] is not None
    }

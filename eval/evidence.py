"""What stands beside the figures of a bench: can they be trusted, and what explains them."""

from importlib.metadata import version
from statistics import fmean
from typing import Any

import torch

from decoding.sampling import Sampling
from decoding.target import Target
from drafters.base import Trained
from eval import controls, cost, law, ties
from eval.alpha import alphas
from eval.arms import AUTOREGRESSIVE, DRAFTER, LOSSY, Arm
from eval.change import changed
from eval.others import taken
from eval.prompts import Prompt
from eval.ranks import Row
from eval.shapes import Shape

ANSWERS = 40  # that alpha is averaged over


def gathered(
    runs: list[Row],
    prompts: list[Prompt],
    arms: dict[str, Arm],
    exact: Target,
    shape: Shape,
    *,
    limit: int,
    seed: int,
) -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:
    """Controls of the answers that were measured, {name: {passed, found}}, and conditions."""
    model, decoded = arms[AUTOREGRESSIVE].target, arms[DRAFTER].target
    ours = arms[DRAFTER].drafter
    assert isinstance(ours, Trained), "the drafter's arm drafts with it"
    checks, agreement = of_the_runs(runs, prompts, arms, exact, limit)
    told = conditions(model, ours, len(prompts)) | {"agreement": agreement}
    told |= explanation(model, ours, shape, prompts, runs)
    needed = told["threads"] if model.device.type == "cpu" else 1
    busy = taken([run.get("others") for run in runs], needed)
    told |= {} if busy is None else {"other_work": busy}
    if decoded is not model:
        told["target_change"] = changed(model, decoded, [p.ids for p in prompts], limit, seed)
    return checks, told


def conditions(model: Target, ours: Trained, prompts: int) -> dict[str, Any]:
    """What was measured, on what machine, with what versions."""
    return {
        "target": model.name,
        "target_revision": model.revision,
        "drafter": type(ours).__module__.removeprefix("drafters."),
        "parameters_target": sum(p.numel() for p in model.parameters()),
        "parameters_drafter": sum(p.numel() for p in ours.parameters()),
        "device": str(model.device),
        "threads": torch.get_num_threads(),
        "dtype": str(model.dtype).removeprefix("torch."),
        "prompts": prompts,
        "versions": {name: version(name) for name in ("torch", "transformers")},
    }


def of_the_runs(
    runs: list[Row],
    prompts: list[Prompt],
    arms: dict[str, Arm],
    exact: Target,
    limit: int,
) -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:
    """Controls of the answers that were measured, and how far they agree with plain decoding's
    (those that a schema confines are left out: a replay knows nothing of it)."""
    model = arms[AUTOREGRESSIVE].target
    widths = {
        name: _width(runs, name)
        for name, arm in arms.items()
        if name not in (AUTOREGRESSIVE, LOSSY) and arm.target is model
    }
    free = [run for run in runs if all(prompts[n].schema is None for n in run["prompts"])]
    found = ties.agreement(free, [p.ids for p in prompts], model, exact, widths)
    checks = {
        "agreement": ties.told(found, model.dtype),
        "counting": controls.counted(runs, model.end_ids, limit),
    }
    return checks, found


def of_the_law(
    decoded: Target, ours: Trained, prompts: list[Prompt], temperatures: list[float], samples: int,
    seed: int,
) -> dict[str, dict[str, Any]]:  # fmt: skip
    """Whether sampled answers have the law that plain sampling has, at each temperature above 0."""
    ids = [p.ids for p in prompts]
    return {
        f"same law at T={t:g}": law.compare(
            decoded, ours, ids, Sampling(temperature=t, seed=seed), samples=samples
        )
        for t in temperatures
        if t > 0 and samples
    }


def explanation(
    model: Target, ours: Trained, shape: Shape, prompts: list[Prompt], runs: list[Row]
) -> dict[str, Any]:
    """Of the measured cells: what a round costs here, the speedup that this and the rounds saved
    predict, and alpha (eval/alpha.py) on the target's own answers."""
    odd = {_group(run) for run in runs if run["repetitive"]}  # the report leaves them out, too
    runs = [run for run in runs if _group(run) not in odd] or runs
    cells = sorted({(run["temperature"], run["batch"]) for run in runs if run["arm"] == DRAFTER})
    told: dict[str, Any] = {"predicted": [], "alpha": {}}
    for temperature in sorted({t for t, _ in cells}):
        sampling = Sampling(temperature=temperature)
        batches = [batch for t, batch in cells if t == temperature]
        here = [run for run in runs if run["temperature"] == temperature]
        known = [
            pair for run in here for pair in zip(run["prompt_tokens"], run["ids"], strict=True)
        ]
        context = round(fmean(n + len(ids) / 2 for n, ids in known))
        costs = cost.measure(model, ours, shape, batches, sampling=sampling, context=context)
        told.setdefault("costs", costs.told())
        for batch in batches:
            speedup = _predicted(costs, here, batch)
            entry = {"arm": DRAFTER, "temperature": temperature, "batch": batch}
            told["predicted"].append(entry | {"speedup": speedup})
        plain = [r for r in runs if r["arm"] == AUTOREGRESSIVE and r["temperature"] == temperature]
        answers = [
            (prompts[number].ids, ids)
            for run in plain
            if run["repeat"] == 0 and run["batch"] == min(batches)
            for number, ids in zip(run["prompts"], run["ids"], strict=True)
            if prompts[number].schema is None
        ]
        told["alpha"][f"{temperature:g}"] = alphas(
            ours.on(model), ours, answers[:ANSWERS], sampling
        )
    return told


def _group(run: Row) -> tuple[float, int, int]:
    return run["temperature"], run["batch"], run["group"]


def _predicted(costs: cost.Costs, runs: list[Row], batch: int) -> float:
    """By the passes for a token that drafting saved; a batch waits for its last row."""
    here = [run for run in runs if run["batch"] == batch]
    plain, mine = ([r for r in here if r["arm"] == arm] for arm in (AUTOREGRESSIVE, DRAFTER))
    passes, drafted = (
        sum(r["rounds"] for r in arm) / sum(r["tokens"] for r in arm) for arm in (plain, mine)
    )
    tau = passes / drafted
    length = fmean(r["rounds"] for r in plain)
    prompt = fmean(max(r["prompt_tokens"]) for r in plain)
    return costs.predict(tau, batch, length, prompt)


def _width(runs: list[Row], arm: str) -> int:
    """Tokens of this arm's passes: the root and about as many nodes as its fullest answer's."""
    rates = [
        nodes / max(1, len(rounds))
        for run in runs
        if run["arm"] == arm
        for nodes, rounds in zip(run["nodes"], run["accepted"], strict=True)
    ]
    return 1 + round(max(rates, default=0))

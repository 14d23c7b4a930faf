"""`advise=true`: what a drafter of this recipe could save on this machine. Nothing is trained.

Times the recipe's target and drafters that are not trained (their speed does not depend on their
weights): small language models around the recipe's depth and width, and every family of heads.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from decoding.pretrained import Pretrained
from decoding.target import Target
from drafters.base import Blueprint, Trained, cast, write_json
from drafters.heads import Heads
from drafters.lm import LM
from eval.advise import ALPHAS, DEFAULT, LENGTHS, Accepted, Advice, Candidate, free, verdict
from eval.choice import DTYPES, VERIFIED
from eval.cost import SIZES, Ledger, between, chains, passes
from eval.others import Others, mind, taken
from eval.outlook import Proposal
from train.budget import DISTILL, Budget, propose, purse_of
from train.candidates import blueprints_of, count, depth_and_width, empty, key
from train.compose import build
from train.plan import Planned, device, plan
from train.run import BAD_INPUT, ENVIRONMENT

BATCHES = (2, 4, 8, 16, 32, 64)  # that are tried for the limit
MOST = 256  # tokens of the largest target call that is timed for it
TOGETHER = 200_000_000  # parameters of drafters that are timed together, at least


def run_advice(name: str, config: dict[str, Any]) -> tuple[int, dict[str, str]]:
    """Prints the advice for a recipe and keeps it as JSON; returns the exit code and no stages."""
    try:
        root = Path(str(config["output_dir"] or "outputs")).resolve()
        stages = plan(config, root)
        budget = Budget(**config.get("budget") or {})
        watch = Others()
        advice, proposal, file = advise(name, config, stages, root, budget)
        write_json(file, advice.told() | {"proposal": proposal.told() if proposal else None})
        print(render(advice, proposal))
        so = "these costs are not those of a quiet machine; what is kept of them is used again"
        if busy := mind(taken([watch.since()]), so):
            print(f"{busy} Remove {advice.kept} to measure anew.")
        return 0, {}
    except ValueError as error:
        code, said = BAD_INPUT, str(error)
    except OSError as error:
        code, said = ENVIRONMENT, str(error)
    except KeyboardInterrupt:
        code, said = 130, "stopped; what was measured is kept"
    print(f"error: {said}", file=sys.stderr)
    return code, {}


def advise(
    name: str, config: dict[str, Any], stages: list[Planned], root: Path, budget: Budget
) -> tuple[Advice, Proposal | None, Path]:
    """The advice, what to train (None for a recipe that trains nothing), and the file of both."""
    trained = [s for s in stages if s.config["_target_"] == DISTILL]
    budget.check(trained)
    model, ledger = _target(config, stages, root / "costs")
    verify, overhead = passes(ledger, model, SIZES)
    accepted = _accepted(root / f"{name}.json", model.name)
    recipe, blueprints = blueprints_of(config, stages, model.shape)
    candidates, refused = _candidates(ledger, model, blueprints, recipe, verify[1] + overhead)
    if not candidates:
        raise ValueError(
            "there is no drafter to advise on: "
            + "; ".join(f"{name}: {why}" for name, why in refused.items())
        )
    advice = Advice(
        target=model.name,
        conditions=f"{ledger.key['dtype']}, {ledger.key['machine']}",
        verify=verify,
        overhead=overhead,
        free=free(verify, overhead),
        candidates=candidates,
        refused=refused,
        recipe=recipe,
        kept=str(ledger.file),
        alpha=accepted.alpha if accepted else DEFAULT,
        accepted=accepted,
    )
    file = ledger.file.with_name(ledger.file.name.replace("costs", f"advice-{name}"))
    proposal = None
    if trained:
        purse = purse_of(budget, stages, model, root)

        def time(new: dict[str, Blueprint]) -> list[Candidate]:
            return _candidates(ledger, model, new, "", verify[1] + overhead)[0]

        proposal = propose(name, purse, advice, blueprints, time)
        advice = advice if accepted else _by_law(advice, proposal)
    fastest = blueprints[advice.fastest.name]
    return replace(advice, batches=_batches(ledger, model, advice, fastest)), proposal, file


def _by_law(advice: Advice, proposal: Proposal) -> Advice:
    """With the acceptance that the law gives the recipe's drafter, or else the best one."""
    if not proposal.outlooks:
        return advice
    own = next((o for o in proposal.outlooks if o.name == advice.recipe), proposal.outlooks[0])
    said = f"{own.name} after {own.asked.tokens:,.0f} tokens"
    return replace(advice, alpha=own.alpha.value, expected=said)


def _target(config: dict[str, Any], stages: list[Planned], folder: Path) -> tuple[Target, Ledger]:
    """The target in the dtype that bench would take, and what is known of its costs."""
    spec: Pretrained = build(config["target"])
    place = _place(spec, stages)
    configured = [
        s.config.get("dtype") for s in stages if s.config["_target_"] == "eval.bench.Bench"
    ]
    found = []
    for dtype in [d for d in configured if d] or DTYPES:
        model = spec.load(place, dtype)
        ledger = Ledger(folder, model, device())
        verify, _ = passes(ledger, model, [VERIFIED])
        found.append((verify[VERIFIED], model, ledger))
    return min(found, key=lambda pair: pair[0])[1:]


def _place(spec: Pretrained, stages: list[Planned]) -> Path | None:
    """The folder of a target that a stage has trained; None for one that is at hand by its path."""
    if spec.path is None:
        trained = [s for s in stages if s.config["_target_"] == "train.base.BaseTarget"]
        if not trained or not trained[0].done:
            raise ValueError(
                "the recipe's target is not trained yet, so nothing can be measured: run the "
                "recipe without advise=true until its stage target is done, or set target.path to "
                "a local folder"
            )
        return trained[0].folder / "artifact"
    if not Path(spec.path).is_dir():
        from huggingface_hub import try_to_load_from_cache

        known = try_to_load_from_cache(spec.path, "config.json", revision=spec.revision)
        if not isinstance(known, str):
            raise ValueError(
                f"the target {spec.path} is not on this machine, and advice downloads nothing: "
                "download it first, or set target.path to a local folder"
            )
    return None


def _accepted(note: Path, target: str) -> Accepted | None:
    """What the recipe's last bench measured; None where there is no sound report on this target."""
    folders = json.loads(note.read_text(encoding="utf-8")).values() if note.is_file() else []
    for folder in folders:
        file = Path(folder) / "artifact" / "report.json"
        if file.is_file():
            report = json.loads(file.read_text(encoding="utf-8"))
            sound = report["passed"] and report["conditions"]["target"] == target
            return Accepted.of(report) if sound else None
    return None


def _candidates(
    ledger: Ledger, model: Target, blueprints: dict[str, Blueprint], recipe: str, plain: float
) -> tuple[list[Candidate], dict[str, str]]:
    """Those that the target allows, timed, and of the others why not; no small models of more than
    half of the target. Held at a time are TOGETHER parameters, or the target's number."""
    most = count(model)
    refused: dict[str, str] = {}
    groups: list[dict[str, Blueprint]] = [{}]
    held = 0
    for name, blueprint in blueprints.items():
        try:
            size = count(empty(blueprint, model.shape))
        except (ValueError, OSError) as error:
            refused[name] = str(error)
            continue
        if size > most / 2 and name != recipe and issubclass(blueprint.cls, LM):
            refused[name] = "more than half of the target's parameters"
            continue
        if groups[-1] and held + size > max(most, TOGETHER):
            groups, held = [*groups, {}], 0
        groups[-1][name], held = blueprint, held + size
    found = [_timed(ledger, model, group, plain) for group in groups if group]
    return [candidate for group in found for candidate in group], refused


def _timed(
    ledger: Ledger,
    model: Target,
    blueprints: dict[str, Blueprint],
    plain: float,
    rows: int = 1,
    lengths: Sequence[int] = LENGTHS,
) -> list[Candidate]:
    """These drafters with the milliseconds of their chains, which are no longer than they draft."""
    made: dict[str, Trained] = {}
    chained: dict[str, list[int]] = {}
    for blueprint in blueprints.values():
        drafter: Any = blueprint(model.shape)
        if isinstance(drafter, Heads):  # matrices of the target's own sizes
            drafter.initialise(model, lambda: torch.ones(model.shape.vocab_size))
        deepest = min(getattr(drafter, "deepest", None) or max(lengths), max(lengths))
        made[key(blueprint)] = cast(drafter, model.dtype).to(model.device).eval()
        chained[key(blueprint)] = sorted({n for n in lengths if n < deepest} | {deepest})
    found = chains(ledger, model, made, chained, rows)
    rest = ledger.known[f"rest, batch {rows}"][0]
    return [
        Candidate(
            name,
            blueprint.cls.__module__.removeprefix("drafters."),
            count(made[key(blueprint)]),
            depth_and_width(made[key(blueprint)])[0] if issubclass(blueprint.cls, LM) else None,
            plain,
            found[key(blueprint)][0],
            {n: ms + rest for n, ms in found[key(blueprint)][1].items()},
        )
        for name, blueprint in blueprints.items()
    ]


def _batches(
    ledger: Ledger, model: Target, advice: Advice, blueprint: Blueprint
) -> dict[int, Candidate]:
    """The fastest candidate by batch, until it no longer pays or a call is too large to time."""
    name, longest = advice.fastest.name, advice.fastest.best(advice.alpha)[1]
    found = {1: advice.fastest}
    for rows in BATCHES:
        lengths = [n for n in {*LENGTHS, longest} if n <= longest and rows * (n + 1) <= MOST]
        if not lengths:
            break
        verify, overhead = passes(ledger, model, [1], rows)
        plain = verify[1] + overhead
        (found[rows],) = _timed(ledger, model, {name: blueprint}, plain, rows, lengths)
        if found[rows].best(advice.alpha)[0] < 1:
            break
    return found


def render(advice: Advice, proposal: Proposal | None = None) -> str:
    """The advice as text for a terminal."""
    left_out: dict[str, list[str]] = {}
    for name, why in advice.refused.items():
        left_out.setdefault(why, []).append(name)
    sizes = [f"  {m:>4}  {ms:>8.2f}  {ms / advice.verify[1]:>5.2f}x" for m, ms in
             sorted(advice.verify.items())]  # fmt: skip
    return "\n".join(
        [
            f"{advice.target} on this machine ({advice.conditions})",
            "",
            "What a call of the target costs, by the tokens that it verifies:",
            "  tokens      ms   of plain",
            *sizes,
            f"  A round takes {advice.overhead:.3f} ms besides.",
            "",
            *_table(advice),
            "",
            *_by_batch(advice),
            *(proposal.lines() if proposal and _new(advice, proposal) else []),
            *(f"Left out ({why}): {', '.join(names)}" for why, names in left_out.items()),
            "",
            *(f"- {sentence}" for sentence in verdict(advice)),
        ]
    )


def _new(advice: Advice, proposal: Proposal) -> bool:
    """Whether it says more than what was measured already."""
    return bool(proposal.law or proposal.budget or advice.accepted is None)


def _table(advice: Advice) -> list[str]:
    width = max(len(c.name) for c in [advice.free, *advice.candidates])
    shown = "".join(f"{f'at {alpha:g}':>11}" for alpha in ALPHAS)
    lines = [
        "Speedup by acceptance, with the draft length that gives it; c is a drafted token's time "
        "in plain",
        "rounds, and below the acceptance `pays from` no draft length pays:",
        f"  {'drafter':<{width}} {'parameters':>12} {'c':>6} {'pays from':>10} {'most':>7}{shown}",
    ]
    for c in [advice.free, *sorted(advice.candidates, key=lambda c: -c.best(advice.alpha)[0])]:
        best = [c.best(alpha) for alpha in ALPHAS]
        cells = "".join(f"{f'{speed:.2f}x @{n}':>11}" for speed, n in best)
        least = c.needs()
        from_ = "never" if least is None else f"{least:.2f}"
        mark = "  <- the recipe's" if c.name == advice.recipe else ""
        mark += ", measured" if advice.accepted and advice.accepted.is_of(c) else ""
        lines.append(
            f"  {c.name:<{width}} {c.parameters:>12,} {c.token / c.plain:>6.2f} {from_:>10} "
            f"{c.best(1.0)[0]:>6.2f}x{cells}{mark}"
        )
    return lines


def _by_batch(advice: Advice) -> list[str]:
    if not advice.batches:
        return []
    lines = [f"{advice.fastest.name} by batch, at acceptance {advice.alpha:.2f}:"]
    for batch, c in sorted(advice.batches.items()):
        speed, length = c.best(advice.alpha)
        ratio = between(c.verify, length) / c.plain
        lines.append(
            f"  {batch:>4}  {speed:>5.2f}x with drafts of {length}, whose verification takes "
            f"{ratio:.2f} plain rounds"
        )
    return [*lines, ""]

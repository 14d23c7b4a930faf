"""What a budget buys, and what a plan predicts, from sweeps that are made up."""

import json
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from scipy.stats import t as student

from decoding.pretrained import contents_hash
from decoding.target import Shape
from drafters.base import Blueprint
from drafters.lm import LM
from drafters.medusa import Medusa
from eval.advise import Advice, Candidate, free
from eval.cost import between
from eval.forecast import Forecaster, compared, main, measurement
from eval.joint import Asked, Interval, Known, expected_tau
from eval.joint import alpha_of as acceptance
from tests.eval.reported import write_laws
from tests.train.composing import ROOT
from train import budget
from train.advise import render
from train.budget import Budget, Purse, chain_of, command, here, propose, setting_of
from train.candidates import count, empty
from train.passes import Estimate
from train.plan import Planned
from train.show import forecast

SHAPE = Shape(1024, 128, 2, 2, 2, 384, 512)
DRAFTER = {"_target_": "drafters.lm.LM", "layers": 1, "width": 128}
STEP = 1000
VERIFY = {1: 4.0, 2: 4.1, 4: 4.3, 8: 4.7, 16: 5.5, 32: 7.0}
LENGTHS = (1, 2, 4, 8, 16)


def stage(name: str, kind: str, needs: dict[str, str], root: Path = Path("out"), **config: Any):
    return Planned(name, {"_target_": kind, **config}, needs, name, root / "stages" / f"{name}-0")


def trainings(root: Path = Path("out"), pretrained: int = 20_000) -> list[Planned]:
    """pretrain, finetune and bench of a recipe."""

    def distill(name: str, tokens: int, needs: dict[str, str]) -> Planned:
        schedule = {"_target_": "train.schedule.Schedule", "tokens": tokens + 1}
        schedule |= {"batch_tokens": STEP, "sequence_length": 250}
        loss, optim = {"_target_": "train.objectives.CE"}, {"_target_": "train.schedule.AdamW"}
        target = {"_target_": "decoding.pretrained.Pretrained", "path": "somewhere"}
        parts = {"drafter": DRAFTER, "schedule": schedule, "objective": loss, "optim": optim}
        return stage(name, "train.distill.Distill", needs, root, target=target, **parts)

    first = [distill("pretrain", pretrained, {})] if pretrained else []
    needs = {"drafter": "pretrain"} if pretrained else {}
    last = distill("finetune", 10_000, needs)
    bench = stage("bench", "eval.bench.Bench", {"drafter": "finetune"}, root, draft_lengths=[2, 4])
    return [*first, last, bench]


def blueprint(layers: int = 1, width: int = 128) -> Blueprint:
    return Blueprint(LM, {"layers": layers, "width": width})


def size(layers: int = 1, width: int = 128) -> int:
    return count(empty(blueprint(layers, width), SHAPE))


def true_tau(of: Asked) -> float:
    """With chains of 4."""
    return 2.0 + 0.4 * math.log10(of.tokens / 1e4) + 0.5 * math.log10(of.parameters / size())


def known(of: Asked, machine: str | None = None, off: float = 0.0) -> Known:
    tau = true_tau(of) + off
    token = 0.3 * (of.depth or 1)
    speed = tau * 4.1 / (4 * token + 4.3 + 0.4 / 4 + 0.1)
    named = f"bench-{of.kind.replace(' ', '')}-{of.parameters}-{of.tokens:g}-{of.depth}"
    return Known(
        **{"of": of, "sweep": "ko-tokens", "bench": named, "prompts": "p, 64 tokens", "length": 4},
        **{"tau": Interval(tau, tau - 0.1, tau + 0.1), "speedup": Interval(speed, speed, speed)},
        **{"token": token, "verify": VERIFY, "overhead": 0.1, "rate": 500.0},
        machine=machine or here(),
        fixed=0.0,
    )


def runs(before: int = 20_000, **more: Any) -> list[Known]:
    tokens = [Asked("lm", size(), t, 1, before) for t in (2e3, 5e3, 1e4, 2e4)]
    sizes = [Asked("lm", size(1, w), 1e4, 1, before) for w in (64, 256, 512)]
    return [known(each, **more) for each in (*tokens, *sizes)]


def purse(budget: Budget, first: float = 0.0, pretrained: int = 20_000, **more: Any) -> Purse:
    stages = trainings(pretrained=pretrained)
    return Purse(budget, chain_of(stages, stages[-1]), runs(**more), here(), SHAPE, first)


REFUSED = {
    "both": ({"tokens": 5000, "minutes": 3}, "budget.tokens is 5000 and budget.minutes 3: give on"),
    "negative": ({"minutes": -1}, "budget.minutes is -1; it must be a number above 0, or null"),
    "word": ({"tokens": "many"}, "budget.tokens is 'many'; it must be a number above 0"),
    "true": ({"tokens": True}, "budget.tokens is True"),
    "small": ({"tokens": 999}, "budget.tokens is 999 and one step of stage finetune takes 1,000"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_a_budget_that_buys_nothing_is_refused(what: str):
    given, said = REFUSED[what]
    with pytest.raises(ValueError, match=said):
        Budget(**given).check(trainings()[:2])
    with pytest.raises(ValueError, match="the recipe has none"):
        Budget(tokens=5000).check([])
    Budget().check([])


def test_tokens_pay_pretraining_first_and_then_whole_steps():
    assert purse(Budget()).allows(blueprint()).tokens == 10_000  # the recipe's own whole steps
    allowed = purse(Budget(tokens=53_700)).allows(blueprint())
    assert (allowed.tokens, allowed.before) == (33_000, 20_000)
    assert allowed.parameters == size()
    assert allowed.depth == 1
    with pytest.raises(ValueError, match="it takes 20,000 tokens of pretraining and a step of 1,0"):
        purse(Budget(tokens=20_500)).allows(blueprint())
    plain = purse(Budget(tokens=53_700), before=0).allows(blueprint())
    assert (plain.tokens, plain.before) == (53_000, 0)  # it was measured without pretraining alone


def test_minutes_pay_by_the_measured_speed_of_a_drafter_of_that_size(monkeypatch):
    """500 tokens a second at 128 wide, and as many fewer as a token has operations; pretraining
    by its own estimate."""
    told = Estimate("", tokens=20_000, seconds=(30.0, 50.0))
    monkeypatch.setattr(budget, "estimate", lambda *a, **k: told)
    minutes = Budget(minutes=2.0)
    assert purse(minutes).allows(blueprint()).tokens == (120 - 40) * 500
    assert purse(minutes, first=30.0).allows(blueprint()).tokens == (90 - 40) * 500
    large = purse(minutes)
    large = replace(large, runs=[run for run in large.runs if run.of.parameters == size()])
    rate = 500 * size() / size(2, 256)
    assert large.allows(blueprint(2, 256)).tokens == int(80 * rate) // STEP * STEP
    with pytest.raises(ValueError, match=r"0\.67 minutes pay no training"):
        replace(large, budget=Budget(minutes=0.67)).allows(blueprint(2, 256))
    with pytest.raises(ValueError, match=r"after 3\.0 minutes of generating"):
        purse(minutes, first=180.0).allows(blueprint())


def test_without_a_run_on_this_machine_minutes_go_by_the_plans_estimate(monkeypatch):
    told = Estimate("", tokens=10_000, seconds=(100.0, 100.0))
    monkeypatch.setattr(budget, "estimate", lambda *a, **k: told)
    found = purse(Budget(minutes=10.0), machine="another, 64 threads")
    assert found.allows(blueprint()).tokens == (600 - 100) * 100


@pytest.mark.parametrize("given", [{"tokens": 40_000}, {"minutes": 2.0}], ids=["tokens", "minutes"])
def test_pretraining_that_is_done_costs_nothing(given, tmp_path: Path, monkeypatch):
    """That of this drafter: another's is still to do."""
    told = Estimate("", tokens=20_000, seconds=(40.0, 40.0))
    monkeypatch.setattr(budget, "estimate", lambda *a, **k: told)
    stages = trainings(tmp_path)
    stages[0].folder.mkdir(parents=True)
    (stages[0].folder / "DONE").touch()
    chain = chain_of(stages, stages[-1])
    found = Purse(Budget(**given), chain, runs(), here(), SHAPE)
    own, other = found.allows(blueprint()), found.allows(blueprint(1, 256))
    assert (own.before, other.before) == (20_000, 20_000)
    minutes = "minutes" in given
    assert own.tokens == (60_000 if minutes else 40_000)
    assert other.tokens == (40_000 if minutes else 20_000)  # a run of its size has the same rate


def candidate(name: str, token: float, layers: int, width: int) -> Candidate:
    drafts = {n: token * n for n in LENGTHS}
    bound = free({m: VERIFY[min(VERIFY, key=lambda k: abs(k - m))] for m in VERIFY}, 0.1)
    of = (name, "lm", size(layers, width), layers, bound.plain)
    return Candidate(*of, drafts, bound.verify)


def advice(*candidates: Candidate) -> Advice:
    bound = free(VERIFY, 0.1)
    return Advice("target", "float32", VERIFY, 0.1, bound, [*candidates], {}, "lm 1x128", "FILE")


def proposed(found: Purse, recipe: str = "lm 1x128"):
    """What is proposed where a wider model drafts a little slower, and one far wider much."""
    near = {"lm 1x128": (0.3, 1, 128), "lm 1x256": (0.33, 1, 256), "lm 1x512": (1.5, 1, 512)}
    prints = {name: blueprint(*shape) for name, (_, *shape) in near.items()}
    timed: list[str] = []

    def time(new: dict[str, Blueprint]) -> list[Candidate]:
        timed.extend(new)
        return [candidate(n, 3.0, b.arguments["layers"], b.arguments["width"])
                for n, b in new.items()]  # fmt: skip

    known_to = replace(advice(*(candidate(n, *s) for n, s in near.items())), recipe=recipe)
    return propose("ko_local", found, known_to, prints, time), known_to, timed


def test_the_proposal_is_the_fastest_by_the_law_with_its_command():
    made, known_to, timed = proposed(purse(Budget(tokens=40_000)))
    first = made.outlooks[0]
    assert first.name == "lm 1x256"  # its tau is higher, and a token costs little more
    assert (first.asked.tokens, first.asked.before) == (20_000, 20_000)
    due = true_tau(first.asked)
    assert first.alpha.value == pytest.approx(acceptance(due, 4), abs=1e-6)
    verify = between(known_to.candidates[1].verify, first.length)
    round_ms = 0.33 * first.length + verify
    tau = expected_tau(first.alpha.value, first.length)
    assert first.per_second.value == pytest.approx(1000 * tau / round_ms)
    assert first.speedup.value == pytest.approx(tau * 4.1 / round_ms)
    assert made.command == (
        "python -m train recipe=ko_local drafter=lm drafter.layers=1 drafter.width=256 "
        "stages.finetune.schedule.tokens=20000 "
        f"'stages.bench.draft_lengths=[{first.length}]'"
    )
    # its neighbours were timed, but for those whose depth no run has
    assert timed == ["lm 1x192", "lm 1x320"]
    text = render(known_to, made)
    assert "Train lm 1x256 (" in text
    assert made.command in text
    assert "By the law of 7 runs of 1 sweep on this target, with 40,000 tokens" in text
    told = json.loads(json.dumps(made.told(), allow_nan=False))
    assert told["outlooks"][0]["asked"]["tokens"] == 20_000


def test_the_proposal_promises_whole_answers_where_runs_show_what_drafting_leaves():
    """Rounds alone would promise more than bench measures."""
    found = purse(Budget(tokens=40_000))
    amdahl = [
        replace(run, fixed=0.2, speedup=run.speedup.through(lambda s: 1 / (0.25 + 0.8 / s)))
        for run in found.runs
        if run.speedup
    ]
    rounds, known_to, _ = proposed(found)
    made, _, _ = proposed(replace(found, runs=amdahl))
    one, two = rounds.outlooks[0].speedup.value, made.outlooks[0].speedup.value
    assert (made.fixed, made.added) == pytest.approx((0.2, 0.05))
    assert two == pytest.approx(1 / (0.25 + 0.8 / one))
    plain = 0.8 * 1000 / known_to.candidates[1].plain  # tokens a second, prefill and all
    assert made.outlooks[0].per_second.value == pytest.approx(plain * two)
    said = "Drafting leaves 20% of an answer's time as it is (prefill above all) and adds 5%"
    assert said in render(known_to, made)
    assert "T=0, whole answers):" in render(known_to, made)
    elsewhere = [replace(run, machine="another, 64 threads") for run in amdahl]
    unknown, _, _ = proposed(replace(found, runs=elsewhere))
    assert unknown.outlooks[0].speedup.value == pytest.approx(one)
    assert "T=0, while decoding):" in render(known_to, unknown)
    assert "Prefill, which drafting does not shorten, comes on top." in render(known_to, unknown)


def test_a_family_that_changes_its_target_is_another():
    """Reports call it medusa too; what medusa accepts says nothing of it."""
    adapted = Blueprint(Medusa, {"heads": 2, "target_lora": {"rank": 2, "alpha": 2}})
    found = purse(Budget(tokens=40_000))
    heads = [known(Asked("medusa", 400_000, t)) for t in (1e4, 4e4)]
    law = Forecaster.of([*found.runs, *heads], here())
    assert law is not None
    asked = found.allows(adapted)
    assert asked.before == 0
    assert law.law.unknown(asked) == "no sweep has a run of medusa with target_lora"
    assert law.law.unknown(replace(asked, family="medusa", parameters=400_000)) == ""


def test_what_is_extrapolated_is_said_with_the_proposal():
    made, _, _ = proposed(purse(Budget(tokens=140_000)))
    text = "\n".join(made.lines())
    assert "Mind that tokens are 6.0x beyond what was measured: extrapolated." in text
    assert "Mind" not in "\n".join(proposed(purse(Budget(tokens=40_000)))[0].lines())


def test_the_recipes_own_drafter_needs_no_words():
    made, _, _ = proposed(purse(Budget(tokens=40_000)), recipe="lm 1x256")
    assert made.command.startswith("python -m train recipe=ko_local stages.finetune.schedule.tok")


def test_a_kind_that_was_measured_without_pretraining_is_trained_so():
    made, _, _ = proposed(purse(Budget(tokens=20_000), before=0))
    assert made.outlooks[0].asked.tokens == 20_000
    assert "stages.pretrain=null stages.finetune.needs.drafter=null" in made.command


def test_those_that_cannot_be_told_apart_are_named():
    """With runs that scatter, two that differ by little are; the one that is far slower is not."""
    luck = (0.1, -0.1, 0.05, -0.08, 0.1, -0.05, 0.04)
    noisy = [known(run.of, off=off) for run, off in zip(runs(), luck, strict=True)]
    found = purse(Budget(tokens=40_000))
    made, _, _ = proposed(replace(found, runs=noisy))
    rivals = [outlook.name for outlook in made.outlooks if outlook.rival]
    assert rivals == ["lm 1x128"]
    assert "Not to be told apart from it: lm 1x128." in made.lines()
    exact, _, _ = proposed(found)
    assert not any(outlook.rival for outlook in exact.outlooks)


def test_what_measured_speeds_scatter_is_in_the_interval_and_in_who_is_a_rival():
    """Of each new drafter by itself; what is not known of their middle moves all alike."""
    found = purse(Budget(tokens=40_000))
    off = (0.06, -0.06, 0.03, -0.04, 0.05, -0.03, 0.0)
    rough = [
        replace(run, speedup=run.speedup.through(lambda s, by=by: s * math.exp(by)))
        for run, by in zip(found.runs, off, strict=True)
        if run.speedup
    ]
    made, _, _ = proposed(replace(found, runs=rough))
    first = made.outlooks[0]
    scatter = math.sqrt(sum(by * by for by in off) / 6)
    wide = student.ppf(0.975, 6) * scatter * math.sqrt(1 + 1 / 7)
    assert math.log(first.speedup.high / first.speedup.value) == pytest.approx(wide, rel=0.12)
    assert math.log(first.speedup.value / first.speedup.low) == pytest.approx(wide, rel=0.12)
    assert [o.name for o in made.outlooks if o.rival] == ["lm 1x128"]
    assert not any(o.rival for o in proposed(found)[0].outlooks)


def test_without_a_law_the_acceptance_is_said_to_be_assumed():
    few = replace(purse(Budget(tokens=40_000)), runs=runs()[:4])
    made, known_to, timed = proposed(few)
    text = render(known_to, made)
    assert "Acceptance is assumed here, what 40,000 tokens buy is not known: 4 runs of" in text
    assert "  python -m train -m recipe=ko_local sweep=tokens\n" in text
    assert "  python -m train -m recipe=ko_local sweep=size\n" in text
    assert (made.outlooks, timed) == ([], [])


def test_without_a_budget_the_law_tells_the_acceptance_of_each():
    made, known_to, timed = proposed(purse(Budget()))
    text = render(known_to, made)
    assert "with the recipe's own tokens" in text
    assert "Train lm" not in text
    assert timed == []
    assert {outlook.asked.tokens for outlook in made.outlooks} == {10_000}


def test_given_words_stay_in_the_command_where_nothing_replaces_them(monkeypatch):
    words = ["recipe=a", "advise=true", "budget.tokens=3", "target.path=/my models/x"]
    words += ["drafter=medusa", "drafter.heads=2", "stages.finetune.schedule.tokens=9"]
    given = SimpleNamespace(overrides=SimpleNamespace(task=words))
    mine = SimpleNamespace(initialized=lambda: True, get=lambda: given)
    monkeypatch.setattr(budget, "HydraConfig", mine)
    new = ["stages.finetune.schedule.tokens=4"]
    start = "python -m train recipe=a 'target.path=/my models/x' "
    assert command("a", ["drafter=lm", *new]) == f"{start}drafter=lm {new[0]}"
    assert command("a", new) == f"{start}drafter=medusa drafter.heads=2 {new[0]}"


@pytest.fixture
def target(tmp_path: Path) -> Path:
    folder = tmp_path / "target"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    return folder


def settings(target: Path) -> dict[str, Any]:
    spec = {"_target_": "decoding.pretrained.Pretrained", "path": str(target)}
    return {"target": spec, "hardware": None}


def swept(root: Path, target: Path, of: list[Known]) -> None:
    write_laws(root, "ko-tokens", of, target=contents_hash(target))


def test_a_plan_predicts_from_the_sweeps_on_its_target(tmp_path: Path, target: Path):
    stages = trainings(tmp_path)
    assert forecast(settings(target), stages, tmp_path, SHAPE) == []
    swept(tmp_path, target, runs())
    (line,) = forecast(settings(target), stages, tmp_path, SHAPE)
    of = Asked("lm", size(), 10_000, 1, 20_000)
    two = expected_tau(acceptance(true_tau(of), 4), 2)  # of 2 and 4 the faster, at these costs
    assert f"bench: predicted from 7 runs of 1 sweep: tau {two:.2f} [" in line
    assert "at T=0 with drafts of 2, about 1.50x [" in line
    assert "extrapolated" not in line
    far = trainings(tmp_path)
    far[1].config["schedule"]["tokens"] = 80_000
    (line,) = forecast(settings(target), far, tmp_path, SHAPE)
    assert line.strip().endswith("(tokens are 4.0x beyond what was measured: extrapolated)")


def test_a_plan_says_why_it_predicts_nothing(tmp_path: Path, target: Path):
    swept(tmp_path, target, runs())
    other = target.with_name("other")
    other.mkdir()
    (other / "config.json").write_text("[]")
    assert forecast(settings(other), trainings(tmp_path), tmp_path, SHAPE) == []
    heads = trainings(tmp_path)
    heads[1].config["drafter"] = {"_target_": "drafters.medusa.Medusa", "heads": 2}
    (line,) = forecast(settings(target), heads, tmp_path, SHAPE)
    assert "no prediction: no sweep has a run of medusa pretrained on 20,000 tokens" in line
    gpu = yaml.safe_load((ROOT / "conf" / "hardware" / "h100.yaml").read_text("utf-8"))
    gpus = settings(target) | {"hardware": gpu}
    (line,) = forecast(gpus, trainings(tmp_path), tmp_path, SHAPE)
    assert f"the speedup not known here: measured on {here()}" in line
    assert "bench: predicted from" in line


def measured_bench(root: Path, known_: Known, target: Path) -> Path:
    """The folders of a bench and its trainings, as the stages leave them."""
    for made in trainings(root):
        (made.folder / "artifact").mkdir(parents=True)
        places = {k: root / "stages" / f"{v}-0" / "artifact" for k, v in made.needs.items()}
        inputs = {name: str(place) for name, place in places.items()}
        note = {"name": made.name, "config": {"prompts": {}, **made.config}, "inputs": inputs}
        (made.folder / "stage.json").write_text(json.dumps(note))
    shape = {"num_hidden_layers": 1, "hidden_size": 128}
    (root / "stages" / "finetune-0" / "artifact" / "config.json").write_text(json.dumps(shape))
    cell = {"arm": "drafter", "temperature": 0.0, "batch": 1, "draft_ms_per_token": {"value": 1.0}}
    for name in ("tau", "speedup"):
        cell[name] = getattr(known_, name)._asdict() | {"n": 9}
    conditions = {"drafter": "lm", "parameters_drafter": size(), "device": "cpu", "threads": 2}
    conditions |= {"target": "t", "target_revision": contents_hash(target), "dtype": "float32"}
    conditions |= {"draft": {"draft_length": 4}, "draft_shape": "chain of 4", "max_new_tokens": 64}
    folder = root / "stages" / "bench-0"
    report = {"passed": True, "table": [cell], "conditions": conditions}
    (folder / "artifact" / "report.json").write_text(json.dumps(report))
    place = {"processor": "C", "devices": []}
    (folder / "environment.json").write_text(json.dumps(place))
    (folder / "DONE").touch()
    return folder


def test_what_was_measured_stands_beside_what_the_other_runs_predict(tmp_path: Path, target: Path):
    """Its own run is left out, wherever it was swept."""
    of = Asked("lm", size(), 10_000, 1, 20_000)
    bench = measured_bench(tmp_path, known(of, off=0.3), target)
    _, mine = measurement(bench)
    assert mine.of == of
    assert mine.setting == setting_of(trainings(tmp_path), trainings(tmp_path)[-1])
    others = [replace(run, prompts=mine.prompts, machine=mine.machine) for run in runs()]
    others = [run for run in others if run.of != of]
    swept(tmp_path, target, [*others, replace(mine, verify=VERIFY, token=0.3, rate=1.0)])
    said = compared(tmp_path, [bench])
    assert said[0].startswith("bench-0: predicted from 6 runs of 1 sweep: tau 2.00 [")
    assert "measured: tau 2.30 [2.20, 2.40], +15%, OUTSIDE the interval; " in said[1]
    (line,) = forecast(settings(target), trainings(tmp_path), tmp_path, SHAPE)
    assert "predicted from 6 runs" in line
    assert "\n    measured: tau 2.30" in line
    with pytest.raises(ValueError, match="is no folder of a bench stage"):
        compared(tmp_path, [tmp_path])


def test_a_comparison_without_anything_to_predict_from_is_refused(
    tmp_path: Path, target: Path, capsys
):
    of = Asked("lm", size(), 10_000, 1, 20_000)
    bench = measured_bench(tmp_path, known(of), target)
    assert main([str(tmp_path / "nowhere"), str(bench)]) == 2
    assert (
        "nowhere has no sweeps/*/report/laws.json: give the OUTPUT_DIR" in capsys.readouterr().err
    )
    mine = measurement(bench)[1]
    others = [replace(run, prompts=mine.prompts) for run in runs()]
    swept(tmp_path, target, others[:3])
    assert main([str(tmp_path), str(bench)]) == 2
    assert "no prediction: 3 other runs" in capsys.readouterr().err
    write_laws(tmp_path, "more", others[3:], target=contents_hash(target))
    assert main([str(tmp_path), str(bench)]) == 0


def test_a_plan_names_the_sweeps_that_no_report_tells(tmp_path: Path, target: Path):
    folder = tmp_path / "sweeps" / "ko-tokens"
    (folder / "jobs").mkdir(parents=True)
    (folder / "sweep.json").write_text(json.dumps({"axes": ["stages.finetune.schedule.tokens"]}))
    place = tmp_path / "stages" / "bench-1"
    (place / "artifact").mkdir(parents=True)
    (place / "artifact" / "report.json").write_text("{}")
    job = {"code": 0, "stages": {"bench": str(place)}}
    asked_ = (settings(target), trainings(tmp_path), tmp_path, SHAPE)
    assert forecast(*asked_) == []  # no job has ended
    (folder / "jobs" / "1.json").write_text(json.dumps(job))
    (line,) = forecast(*asked_)
    assert "sweeps/ko-tokens has no report yet, or an older one: python -m eval.sweep " in line
    (folder / "sweep.json").write_text(json.dumps({"axes": ["stages.finetune.optim.lr"]}))
    assert forecast(*asked_) == []  # of no use to a plan
    (folder / "sweep.json").write_text(json.dumps({"axes": ["stages.finetune.schedule.tokens"]}))
    swept(tmp_path, target, [replace(run, bench="bench-1") for run in runs()[:1]])
    assert not any("no report" in line for line in forecast(*asked_))


def test_a_plan_says_where_it_is_trained_otherwise_than_the_runs(tmp_path: Path, target: Path):
    stages = trainings(tmp_path)
    write_laws(
        tmp_path, "ko", runs(), contents_hash(target), setting=setting_of(stages, stages[-1])
    )
    (line,) = forecast(settings(target), stages, tmp_path, SHAPE)
    assert "no run has its" not in line
    stages[1].config["objective"] = {"_target_": "train.objectives.TV"}
    (line,) = forecast(settings(target), stages, tmp_path, SHAPE)
    assert "(no run has its loss, learning rate, batch and data: extrapolated)" in line
    stages = trainings(tmp_path)
    stages[0].config["optim"] = {"_target_": "train.schedule.AdamW", "lr": 0.5}
    (line,) = forecast(settings(target), stages, tmp_path, SHAPE)
    assert "(no run has its pretraining and drafter's own values: extrapolated)" in line

"""The joint law and the forecast from made-up sweeps, whose coefficients are known."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from eval.forecast import Forecaster, speed_of
from eval.joint import Asked, Interval, Known, Law, alpha_of, expected_tau, fit
from eval.known import read, settings
from tests.eval.reported import write_laws

SLOPE, SIZE = 0.4, 0.3  # of tau, a tenfold of tokens and of parameters
LEVEL = {"lm": 2.0, "eagle": 2.3}
LENGTH = 5
MACHINE = "AMD EPYC, cpu, 2 threads"
VERIFY = {1: 4.0, 2: 4.1, 4: 4.3, 8: 4.7, 16: 5.5}
FIXED = 0.1  # of an answer's time, that drafting leaves as it is


def true_tau(asked: Asked) -> float:
    tokens, size = math.log10(asked.tokens / 1e6), math.log10(asked.parameters / 1e6)
    return LEVEL[asked.family] + SLOPE * tokens + SIZE * size


def known(
    asked: Asked,
    *,
    off: float = 0.0,
    error: float = 0.05,
    length: int = LENGTH,
    sweep: str = "ko-tokens",
    machine: str = MACHINE,
) -> Known:
    """A run that measured the true tau and `off` more, with chains of the length."""
    five = true_tau(asked) + off
    tau = expected_tau(alpha_of(five, LENGTH), length)
    token = 0.2 + 0.3 * (asked.depth or 1)
    decoding = tau * (VERIFY[1] + 0.1) / (length * token + np.interp(length + 1, *_table()) + 0.1)
    speed = 1 / (FIXED + (1 - FIXED) / decoding)
    wide = 1.96 * error
    return Known(
        **{"of": asked, "sweep": sweep, "bench": f"bench-{hash(asked):x}"[:20] + f"{length}"},
        **{
            "prompts": "p, 64 tokens",
            "length": length,
            "tau": Interval(tau, tau - wide, tau + wide),
        },
        **{"speedup": Interval(speed, speed - 0.1, speed + 0.1), "token": token},
        **{"verify": VERIFY, "overhead": 0.1, "rate": 4000.0, "machine": machine, "fixed": FIXED},
    )


def _table() -> tuple[list[int], list[float]]:
    return list(VERIFY), list(VERIFY.values())


def asked(family: str = "lm", tokens: float = 1e6, parameters: int = 1_000_000) -> Asked:
    return Asked(family, parameters, tokens, 1 if family == "lm" else None)


GRID = [
    *[asked(tokens=t) for t in (1e5, 3e5, 1e6, 3e6)],
    *[asked(parameters=p) for p in (300_000, 3_000_000, 10_000_000)],
    *[asked("eagle", t) for t in (1e5, 1e6)],
]


def law_of(runs: list[Known]) -> Law:
    found = fit(runs)
    assert found is not None
    return found


def test_the_law_recovers_what_the_runs_were_made_from():
    law = law_of([known(each) for each in GRID])
    assert law.terms == ["tokens", "parameters"]
    assert law.slopes["tokens"].value == pytest.approx(SLOPE, abs=1e-9)
    assert law.slopes["parameters"].value == pytest.approx(SIZE, abs=1e-9)
    assert law.residual == pytest.approx(0, abs=1e-9)
    new = asked("eagle", 2e6, 5_000_000)
    assert law.tau(new).value == pytest.approx(true_tau(new))
    assert law.alpha(new).value == pytest.approx(alpha_of(true_tau(new), LENGTH))


def test_a_term_is_there_only_where_the_runs_vary_in_it():
    one_size = law_of([known(asked(tokens=t)) for t in (1e5, 2e5, 4e5, 1e6, 2e6)])
    assert one_size.terms == ["tokens"]
    assert one_size.unknown(asked(parameters=1_200_000)) == ""
    assert "do not say what parameters does" in one_size.unknown(asked(parameters=2_000_000))
    with pytest.raises(ValueError, match="no sweep has a run of eagle"):
        one_size.tau(asked("eagle"))
    # tokens and size that grew together are one axis: whichever comes first has it
    both = [known(asked(tokens=t, parameters=int(t))) for t in (1e5, 2e5, 4e5, 1e6, 2e6)]
    assert law_of(both).terms == ["tokens"]
    # a size that parts the families alone is part of their own terms
    families = [known(asked(tokens=t)) for t in (1e5, 3e5, 1e6)]
    families += [known(asked("eagle", t, 9_000_000)) for t in (1e5, 3e5, 1e6)]
    assert law_of(families).terms == ["tokens"]


def test_tokens_that_do_nothing_yet_do_not_flatten_the_law():
    """From nothing a drafter's tau stands still at first: a line through all would promise less."""
    counts = [2e4, 3e4, 5e4, 7e4, 1e5, 1.5e5, 2.5e5, 4e5, 7e5, 1e6]

    def tau(tokens: float) -> float:
        return true_tau(asked(tokens=max(tokens, 1e5)))

    runs = [known(asked(tokens=t), off=tau(t) - true_tau(asked(tokens=t))) for t in counts]
    law = law_of(runs)
    assert law.start == pytest.approx(1e5, rel=0.05)
    assert law.tau(asked(tokens=2e6)).value == pytest.approx(tau(2e6), abs=0.01)
    assert law.tau(asked(tokens=2.5e4)).value == pytest.approx(tau(2e4), abs=0.01)
    assert law_of([known(asked(tokens=t)) for t in counts]).start == 1.0


def test_too_few_runs_make_no_law():
    runs = [known(asked(tokens=t)) for t in (1e5, 2e5, 4e5, 1e6, 2e6)]
    assert fit(runs[:4]) is None  # two terms and three to spare are five
    assert fit(runs) is not None
    assert fit([]) is None


def test_depth_is_a_term_where_enough_runs_vary_in_it():
    deep = [replace(asked(tokens=t), depth=d) for t, d in ((1e5, 1), (1e6, 2), (1e6, 4), (1e6, 8))]
    runs = [known(each, off=0.1 * math.log2(each.depth or 1)) for each in deep]
    runs += [known(asked(tokens=t)) for t in (2e5, 3e6)]
    law = law_of(runs)
    assert law.terms == ["tokens", "depth"]
    assert law.slopes["depth"].value == pytest.approx(0.1)
    assert law_of(runs[:3] + runs[4:]).terms == ["tokens"]  # one run too few for it


def coverage(interval_of: str, count: int = 400) -> float:
    """The share of new drafters whose measured tau lies in the interval that was said before."""
    dice = np.random.default_rng(0)
    new = asked(tokens=5e6, parameters=2_000_000)
    inside = 0
    for _ in range(count):
        errors = dice.uniform(0.03, 0.09, len(GRID))
        luck = 0.04  # of a training, in no run's interval
        runs = [
            known(each, off=dice.normal(0, math.hypot(e, luck)), error=e)
            for each, e in zip(GRID, errors, strict=True)
        ]
        law = law_of(runs)
        if interval_of == "the line":
            law = replace(law, line=replace(law.line, noise=0.0))
        measured = true_tau(new) + dice.normal(0, math.hypot(np.median(errors), luck))
        _, low, high = law.tau(new)
        inside += low <= measured <= high
    return inside / count


def test_a_new_drafter_lies_in_its_interval_in_95_of_100_cases():
    assert 0.925 < coverage("a new drafter") < 0.975
    assert coverage("the line") < 0.9  # an interval for the line is none for a drafter


def test_draws_have_the_interval_that_is_said():
    dice = np.random.default_rng(1)
    law = law_of([known(each, off=dice.normal(0, 0.05)) for each in GRID])
    new = [asked(tokens=2e6), asked("eagle", 2e6)]
    drawn = law.alphas(new, 20_000)
    for column, each in zip(drawn.T, new, strict=True):
        said = law.alpha(each)
        assert np.quantile(column, [0.5, 0.025, 0.975]) == pytest.approx(list(said), abs=0.01)
    assert np.corrcoef(drawn.T)[0, 1] > 0.1  # they share the doubt about the slopes


def test_what_lies_beyond_the_runs_is_said():
    law = law_of([known(each) for each in GRID])
    assert law.beyond(asked(tokens=2e6, parameters=5_000_000)) == []
    said = law.beyond(asked(tokens=12e6, parameters=100_000))
    assert said == [
        "tokens are 4.0x beyond what was measured",
        "parameters are 3.0x below what was measured",
    ]
    deep = [replace(asked(tokens=t), depth=d) for t in (1e5, 1e6, 1e7) for d in (4, 6, 8)]
    law = law_of([*map(known, deep), *(known(asked("eagle", t)) for t in (1e5, 1e6))])
    said = law.beyond(replace(asked(), depth=2))  # heads have no depth, so none of theirs counts
    assert said == ["depth is 2.0x below what was measured"]
    assert law.beyond(replace(asked(), depth=16)) == ["depth is 2.0x beyond what was measured"]
    law = law_of([known(each) for each in GRID])
    near = law.tau(asked(tokens=3e6))
    far = law.tau(asked(tokens=3e8))
    assert far.high - far.low >= near.high - near.low


def test_lengths_that_differ_are_compared_at_the_commonest():
    """A chain of 3 cannot give what one of 5 does: tau as it stands would bend the law."""
    runs = [known(each, length=3 if n in (0, 4) else LENGTH) for n, each in enumerate(GRID)]
    law = law_of(runs)
    assert law.length == LENGTH
    assert law.slopes["tokens"].value == pytest.approx(SLOPE, abs=1e-6)
    assert law.slopes["parameters"].value == pytest.approx(SIZE, abs=1e-6)


@pytest.mark.parametrize("length", [1, 4, 9])
def test_acceptance_and_tau_are_each_others_inverse(length: int):
    for alpha in (0.05, 0.5, 0.93):
        assert alpha_of(expected_tau(alpha, length), length) == pytest.approx(alpha)
    assert (alpha_of(0.9, length), alpha_of(length + 1.5, length)) == (0.0, 1.0)


def test_tau_stays_within_what_is_possible():
    law = law_of([known(each) for each in GRID])
    assert law.tau(asked(tokens=1e30)).value == LENGTH + 1
    assert law.tau(asked(tokens=1e-9)).value == 1


def test_runs_of_all_sweeps_on_the_target_are_read_once(tmp_path: Path):
    runs = [known(each) for each in GRID]
    write_laws(tmp_path, "ko-tokens", runs[:4])
    write_laws(tmp_path, "ko-size", runs[3:])  # the recipe's own is in both
    write_laws(tmp_path, "other", [known(each, off=2) for each in GRID], target="another")
    found = {run.bench: run for run in read(tmp_path, "t")}
    assert len(read(tmp_path, "t")) == len(found) == len(GRID)
    for run in runs:
        mine = found[run.bench]
        assert mine.of == run.of
        assert (mine.tau, mine.speedup, mine.verify) == (run.tau, run.speedup, run.verify)
        assert mine.token == pytest.approx(run.token)
        assert (mine.prompts, mine.machine, mine.rate) == (run.prompts, run.machine, run.rate)
    assert {run.sweep for run in found.values()} == {"ko-tokens", "ko-size"}
    assert read(tmp_path, "nobody's") == []


NO_RUN = {
    "failed": {"code": 3},
    "another loss": {"overrides": {"objective@stages.finetune.objective": "tv"}},
    "another rate": {"overrides": {"stages.finetune.optim.lr": "0.1", "seed": "1"}},
    "a tree": {"draft_shape": "tuned static tree of 7 nodes, 2 deep"},
    "stopped at a rung": {"bench": None, "draft_shape": None, "tau": []},
    "not trained here": {"trained": {}},
}


@pytest.mark.parametrize("what", NO_RUN)
def test_runs_that_would_bend_the_law_are_left_out(what: str, tmp_path: Path):
    write_laws(tmp_path, "ko", [known(GRID[0])], **NO_RUN[what])
    assert read(tmp_path, "t") == []
    axes = {"overrides": {"drafter": "eagle", "sweep.shape": "2x64", "drafter.width": "64"}}
    write_laws(tmp_path, "mine", [known(GRID[0])], **axes)
    assert len(read(tmp_path, "t")) == 1


def test_a_broken_report_is_a_sentence(tmp_path: Path):
    folder = write_laws(tmp_path, "ko", [known(GRID[0])])
    (folder / "laws.json").write_text('{"runs": 3}')
    with pytest.raises(ValueError, match=r"write it anew with `python -m eval\.sweep .*sweeps/ko`"):
        read(tmp_path, "t")


def forecaster(machine: str = MACHINE, **more: Any) -> Forecaster:
    found = Forecaster.of([known(each, **more) for each in GRID], machine)
    assert found is not None
    return found


def test_the_forecast_is_what_such_a_drafter_measures():
    new = asked("lm", 2e6, 2_000_000)
    found = forecaster().ask(new, [LENGTH])
    due = known(new)
    assert due.speedup is not None
    assert found.tau.value == pytest.approx(due.tau.value)
    assert found.speedup is not None
    assert found.speedup.value == pytest.approx(due.speedup.value, rel=1e-3)
    assert found.beyond == []
    assert (found.runs, found.sweeps) == (9, 1)


def test_other_draft_lengths_are_asked_by_the_acceptance():
    """tau taken as the acceptance, or as that of any length, would draft without end."""
    new = asked()
    lengths = [1, 2, 3, 4, 8, 16]
    found = forecaster().ask(new, lengths)
    measured = {n: known(new, length=n) for n in lengths}
    best = max(lengths, key=lambda n: measured[n].speedup or Interval(0, 0, 0))
    assert found.length == best < 16
    assert found.tau.value == pytest.approx(measured[best].tau.value)


def test_what_is_not_known_of_tau_is_not_known_of_speed():
    dice = np.random.default_rng(2)
    runs = [known(each, off=dice.normal(0, 0.1)) for each in GRID]
    found = Forecaster.of(runs, MACHINE)
    assert found is not None
    told = found.ask(asked(tokens=2e6), [LENGTH])
    assert told.speedup is not None
    wide = (told.speedup.high - told.speedup.low) / told.speedup.value
    assert 0.5 < wide / ((told.tau.high - told.tau.low) / told.tau.value) <= 1.05
    assert told.speedup.low < told.speedup.value < told.speedup.high


def test_no_speed_is_claimed_for_another_machine():
    found = forecaster("NVIDIA H100, cuda, 8 threads").ask(asked(), [3, 4])
    assert found.speedup is None
    assert found.tau.value > 1
    assert str(found).endswith(f"the speedup not known here: measured on {MACHINE}")
    few = Forecaster.of([replace(known(each), speedup=None) for each in GRID], MACHINE)
    assert few is not None
    assert "too few runs like it have costs" in str(few.ask(asked()))


def test_a_token_takes_as_long_as_the_depth_says():
    deep = [replace(asked(tokens=t), depth=d) for t in (1e5, 1e6, 1e7) for d in (1, 2, 4)]
    speed = speed_of([known(each) for each in deep], MACHINE)
    assert speed is not None
    assert speed.token(replace(asked(), depth=3)) == pytest.approx(0.2 + 0.3 * 3)
    assert speed.token(asked("eagle")) is None
    assert (speed.fixed, speed.added) == pytest.approx((FIXED, 0.0), abs=1e-9)
    one = speed_of([known(each) for each in GRID], MACHINE)
    assert one is not None
    assert one.token(replace(asked(), depth=2)) is None  # one depth says nothing of others


def test_a_run_beside_other_work_does_not_decide_what_drafting_leaves():
    """By a mean one speedup that is off by half would."""
    runs = [known(replace(asked(tokens=t), depth=d)) for t in (1e5, 1e6, 1e7) for d in (1, 2, 4)]
    assert runs[0].speedup is not None
    odd = replace(runs[0], speedup=runs[0].speedup.through(lambda times: times / 2))
    quiet, beside = speed_of(runs, MACHINE), speed_of([odd, *runs[1:]], MACHINE)
    assert quiet is not None
    assert beside is not None
    assert (beside.fixed, beside.added) == pytest.approx((quiet.fixed, quiet.added))
    assert beside.scatter == pytest.approx(math.log(2) / math.sqrt(8)), "but it is told"


def test_what_the_drafters_own_prefill_adds_is_found_where_drafting_gains_nothing():
    """There a share that is fitted to speedups could be any."""
    runs = []
    for each in GRID:
        run = known(each, off=-0.6)
        assert run.speedup is not None
        speed = run.speedup.through(lambda times: 1 / (1 / times + 0.03))
        runs.append(replace(run, speedup=speed))
    found = speed_of(runs, MACHINE)
    assert found is not None
    assert (found.fixed, found.added) == pytest.approx((FIXED, 0.03))
    run = runs[0]
    assert run.speedup is not None
    assert found.whole(run.decoding) == pytest.approx(run.speedup.value)


def test_times_of_a_busy_machine_are_no_costs(tmp_path: Path):
    write_laws(tmp_path, "ko", [known(GRID[0])], other_work=0.4)
    assert [run.quiet for run in read(tmp_path, "t")] == [False]
    busy = [replace(known(each), quiet=False) for each in GRID]
    assert speed_of(busy, MACHINE) is None
    quiet = [known(each) for each in GRID]
    assert speed_of([*busy, *quiet], MACHINE) == speed_of(quiet, MACHINE)


def test_prompts_are_not_mixed():
    runs = [known(each) for each in GRID]
    other = [replace(known(each, off=1.0), prompts="q, 64 tokens") for each in GRID[:7]]
    found = Forecaster.of([*other, *runs], MACHINE)
    assert found is not None
    assert found.law.tau(asked()).value == pytest.approx(true_tau(asked()))
    assert Forecaster.of([], MACHINE) is None


HELD = {
    **{"limit": "64", "drafter.schedule.tokens": "4096", "drafter.optim.lr": "0.001"},
    **{"drafter.objective._target_": '"CE"', "drafter.data.limit": "60", "typical": "null"},
    **{"drafter.drafter.width": "64", "drafter.drafter.checkpoint": "null"},
    "drafter.drafter.schedule.tokens": "9000",  # of the pretraining, as those below
    **{"drafter.drafter.optim.lr": "0.1", "drafter.drafter.drafter.width": "64"},
    **{"drafter.target.path": '"a"', "drafter.data.target.path": '"a"', "data.limit": "60"},
}
SAME = ("limit", "schedule.tokens", "drafter.width", "target.path")


@pytest.mark.parametrize("key", HELD)
def test_a_setting_is_of_what_the_law_has_no_term_for(key: str):
    last, own = settings(HELD)
    changed = settings(HELD | {key: "7"})
    if key in ("limit", "data.limit") or key.endswith(SAME[1:]):
        assert changed == (last, own)
    elif key.startswith("drafter.drafter."):
        assert changed[0] == last
        assert changed[1] != own
    else:
        assert changed[0] != last
        assert changed[1] == own
    without = {k: v for k, v in HELD.items() if v != "null"}  # heads have no such keys
    assert settings(without) == (last, own)


def test_runs_of_another_setting_are_in_another_law():
    """A tenth of the learning rate is no scatter of the law."""
    runs = [replace(known(each), setting=("a", "x")) for each in GRID]
    slow = [replace(known(each, off=-0.5), setting=("b", "x")) for each in GRID[:7]]
    commonest, its_own, nobodys = (
        Forecaster.of([*slow, *runs], MACHINE, setting)
        for setting in (("", ""), ("b", "x"), ("c", "x"))
    )
    assert commonest
    assert its_own
    assert nobodys
    for found, off in ((commonest, 0.0), (its_own, -0.5), (nobodys, 0.0)):
        assert found.law.tau(asked()).value == pytest.approx(true_tau(asked()) + off)
    assert its_own.beyond(asked()) == []
    assert nobodys.beyond(asked()) == ["no run has its loss, learning rate, batch and data"]
    # a family's own values part its runs alone
    other = [
        replace(known(asked("eagle", t), off=1.0), setting=("a", "y")) for t in (1e5, 1e6, 2e6)
    ]
    both = Forecaster.of([*runs, *other], MACHINE, ("a", "x"))
    assert both
    assert both.law.tau(asked("eagle")).value == pytest.approx(true_tau(asked("eagle")))
    most = Forecaster.of([*runs, *other], MACHINE)
    assert most
    assert len(most.law.runs) == 7 + 3


def test_the_sentence():
    told = str(forecaster().ask(asked(tokens=12e6), [LENGTH]))
    assert told.startswith("predicted from 9 runs of 1 sweep: tau 2.43 [2.43, 2.43] at T=0 with d")
    assert told.endswith("(tokens are 4.0x beyond what was measured: extrapolated)")

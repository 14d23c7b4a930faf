"""`python -m eval.sweep`: sweep folders written by the contract, read, grouped, told and drawn."""

from __future__ import annotations

import hashlib
import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from eval import sweep, sweep_page
from eval.laws import Law
from eval.sweep_laws import alike, explained, laws_of
from eval.swept import read, shortly, together
from tests.eval.test_compare import side
from tests.eval.test_page import EVIL, Tags

TARGET = "3aea01a78b0524c2"
BATCH = 2048


class Folder:
    """An output folder in which sweeps are written as the command, distill and bench leave them."""

    def __init__(self, root: Path, *, target: str = TARGET, prompts: str = "xnli") -> None:
        self.root, self.target, self.prompts = root, target, prompts

    def sweep(self, name: str, *, axes: list[str], maximises: str = "tau_T0") -> Path:
        folder = self.root / "sweeps" / name
        (folder / "jobs").mkdir(parents=True)
        note = {
            **{"recipe": "ko_local", "preset": name, "maximises": maximises, "axes": axes},
            "command": f"python -m train -m recipe=ko_local sweep={name}",
        }
        (folder / "sweep.json").write_text(json.dumps(note))
        return folder

    def job(self, folder: Path, overrides: dict[str, Any], **note: Any) -> dict[str, Any]:
        words = {key: str(value) for key, value in overrides.items()}
        mark = hashlib.sha256(json.dumps(words).encode()).hexdigest()[:12]
        empty = {
            "code": 0,
            "error": None,
            "value": None,
            "stages": {},
            "seconds": 10.0,
            "rungs": [],
        }
        whole = {"overrides": words} | empty | note
        (folder / "jobs" / f"{mark}.json").write_text(json.dumps(whole))
        return whole

    def stage(self, name: str, config: dict, inputs: dict[str, Path], result: dict) -> Path:
        mark = hashlib.sha256(json.dumps([config, {k: str(v) for k, v in inputs.items()}]).encode())
        place = self.root / "stages" / f"{name}-{mark.hexdigest()[:12]}"
        (place / "artifact").mkdir(parents=True, exist_ok=True)
        given = {key: str(value / "artifact") for key, value in inputs.items()}
        note = {"name": name, "fingerprint": mark.hexdigest()[:12], "config": config}
        (place / "stage.json").write_text(json.dumps(note | {"inputs": given}))
        (place / "result.json").write_text(json.dumps(result))
        return place

    def drafter(
        self, *, tokens: int = 245_760, lr: float = 1e-3, seed: int = 0, depth: int = 1,
        width: int = 256, pretrained: int = 0, tracker: str = "jsonl",
    ) -> dict[str, Path]:  # fmt: skip
        data = self.stage("generate", {"_target_": "data.generate.Generate", "limit": 8}, {}, {})

        def trained(name: str, tokens: int, inputs: dict[str, Path]) -> Path:
            config = {
                **{"_target_": "train.distill.Distill", "optim": {"lr": lr}},
                "drafter": {"_target_": "drafters.lm.LM", "layers": depth, "width": width},
                "schedule": {"tokens": tokens, "batch_tokens": BATCH, "seed": seed},
                "tracker": {"group": tracker},
            }
            place = self.stage(name, config, inputs, {"tokens_per_second": 4000.0, "steps": 9})
            shape = {"num_hidden_layers": depth, "hidden_size": width}
            (place / "artifact" / "config.json").write_text(json.dumps(shape))
            return place

        inputs = {"data": data}
        stages = {"generate": data}
        if pretrained:
            stages["pretrain"] = inputs["drafter"] = trained("pretrain", pretrained, {})
        return stages | {"finetune": trained("finetune", tokens, inputs)}

    def run(
        self,
        folder: Path,
        overrides: dict[str, Any],
        tau: dict[float, tuple[float, float]],
        *,
        speedups: dict[int, float] | None = None,
        token_ms: float = 0.8,
        parameters: int = 2_900_736,
        passed: bool = True,
        drafts: int = 4,
        draft_lengths: list[int] | None = None,
        other_work: float = 0.02,
        **made: Any,
    ) -> Path:
        """A measured job: tau by temperature is (value, half of its interval)."""
        stages = self.drafter(**made)
        config = {"_target_": "eval.bench.Bench", "draft_lengths": draft_lengths or [4]}
        config["prompts"] = {"chat": {"files": [self.prompts]}}
        inputs = {"drafter": stages["finetune"], "data": stages["generate"]}
        bench = self.stage("bench", config, inputs, {})
        cells = [
            _cell(t, b, value, half, speedup, token_ms)
            for t, (value, half) in tau.items()
            for b, speedup in (speedups or {1: 1.2}).items()
        ]
        report = {
            "schema": 2,
            "passed": passed,
            "table": cells,
            "conditions": self._conditions(parameters),
        }
        report["conditions"] |= {"draft_shape": f"chain of {drafts}", "other_work": other_work}
        report["conditions"]["draft"] = {"draft_length": drafts}
        (bench / "artifact" / "report.json").write_text(json.dumps(report))
        (bench / "environment.json").write_text('{"processor": "AMD EPYC", "devices": []}')
        places = {name: str(place) for name, place in (stages | {"bench": bench}).items()}
        value = next(iter(tau.values()))[0]
        self.job(folder, overrides, value=value if passed else None, stages=places,
                 code=0 if passed else 3)  # fmt: skip
        return bench

    def _conditions(self, parameters: int) -> dict[str, Any]:
        return {
            **{"target": "koen-17m", "target_revision": self.target, "drafter": "lm"},
            **{"device": "cpu", "threads": 2, "dtype": "bfloat16", "max_new_tokens": 64},
            "parameters_drafter": parameters,
            "costs": {"verify_ms": {"1": 4.2, "8": 4.7}, "overhead_ms": 0.01, "draft_ms": 2.4},
        }


def _cell(
    t: float, b: int, tau: float, half: float, speedup: float, token_ms: float
) -> dict[str, Any]:
    def estimate(value: float, half: float) -> dict[str, Any]:
        return {"value": value, "low": value - half, "high": value + half, "n": 48}

    return {
        **{"arm": "drafter", "temperature": t, "batch": b, "tau": estimate(tau, half)},
        "speedup": estimate(speedup, 0.05),
        "draft_ms_per_token": estimate(token_ms, 0.02 * token_ms),
    }


TOKENS = [BATCH * n for n in (15, 30, 60, 120, 240, 480)]
KEY = "stages.finetune.schedule.tokens"


def of_tokens(folder: Folder, name: str = "tokens", seed: int = 0, **more: Any) -> Path:
    """A sweep over tokens: tau = -0.9 + 0.55 log10 tokens at T=0, 0.2 less at T=1, with noise."""
    rng = np.random.default_rng(seed)
    made = folder.sweep(name, axes=[KEY])
    for tokens in TOKENS:
        tau = -0.9 + 0.55 * math.log10(tokens) + rng.normal(0, 0.03)
        folder.run(made, {KEY: tokens}, {0.0: (tau, 0.12), 1.0: (tau - 0.2, 0.15)},
                   tokens=tokens, speedups={1: 0.4 * tau + 0.4, 2: 0.38 * tau + 0.3,
                                            4: 0.34 * tau + 0.2}, **more)  # fmt: skip
    return made


def of_shapes(folder: Folder, shapes: list[tuple[int, int, int]], name: str = "shape") -> Path:
    """A sweep over (depth, width, parameters): 0.15 + 0.6 ms a layer, a little for parameters."""
    rng = np.random.default_rng(1)
    made = folder.sweep(name, axes=["sweep.shape"], maximises="speedup_T0")
    for depth, width, parameters in shapes:
        tau = -0.4 + 0.4 * math.log10(parameters) + rng.normal(0, 0.02)
        ms = 0.15 + 0.6 * depth + 1e-9 * parameters + rng.normal(0, 0.01)
        folder.run(made, {"sweep.shape": f"[{depth},{width}]"}, {0.0: (tau, 0.1)}, depth=depth,
                   width=width, parameters=parameters, token_ms=ms)  # fmt: skip
    return made


def picked(laws: list[Law], of: str, against: str, temperature: float | None = 0.0) -> list[Law]:
    return [
        law
        for law in laws
        if (law.of, law.against) == (of, against)
        and law.conditions.get("temperature") == temperature
    ]


@pytest.fixture
def outputs(tmp_path: Path) -> Folder:
    return Folder(tmp_path)


def test_runs_are_read_with_all_that_their_stages_tell(outputs: Folder):
    made = outputs.sweep("tokens", axes=[KEY])
    outputs.run(made, {KEY: 61_440}, {0.0: (2.0, 0.1), 1.0: (1.8, 0.2)}, tokens=62_000, depth=2,
                width=192, pretrained=100_000, speedups={1: 1.3, 4: 0.9})  # fmt: skip
    (run,) = read(made).runs
    assert (run.name, run.code, run.value) == ("tokens=61440", 0, 2.0)
    assert run.overrides == {KEY: "61440"}
    assert (run.family, run.parameters, run.depth, run.width) == ("lm", 2_900_736, 2, 192)
    assert run.trained == {"finetune": 30 * BATCH, "pretrain": 48 * BATCH}, "whole steps"
    assert run.tokens == 78 * BATCH
    assert (run.draft_length, run.draft_shape) == (4, "chain of 4")
    assert (run.target, run.train_tokens_per_second) == (TARGET, 4000.0)
    assert run.tau[0.0, 4] == {"value": 2.0, "low": 1.9, "high": 2.1, "n": 48}
    assert run.speedup[1.0, 4]["value"] == 0.9
    assert run.token_ms is not None
    assert run.token_ms["value"] == 0.8
    assert run.first(run.speedup)[0.0]["value"] == 1.3, "of the smallest batch"
    assert run.conditions | {"prompts": ""} == {
        **{"target": "koen-17m", "device": "cpu", "threads": 2, "dtype": "bfloat16"},
        **{"max_new_tokens": 64, "machine": "AMD EPYC", "prompts": ""},
    }
    assert run.held["drafter.drafter.schedule.tokens"] == "100000"
    assert not [key for key in run.held if "tracker" in key or "seed" in key]


def test_outputs_that_were_moved_are_read_where_they_are(outputs: Folder, tmp_path: Path):
    made = of_tokens(outputs)
    before = [run.told() for run in read(made).runs]
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    for name in ("sweeps", "stages"):
        (tmp_path / name).rename(moved / name)
    assert [run.told() for run in read(moved / "sweeps" / "tokens").runs] == before


def test_the_prompts_are_known_by_what_was_asked(outputs: Folder):
    """By the keys in runs.jsonl where it is there, else by the configured sources."""
    made = outputs.sweep("tokens", axes=[KEY])
    places = [
        outputs.run(made, {KEY: n}, {0.0: (2.0, 0.1)}, tokens=n * BATCH) for n in (10, 20, 30)
    ]
    assert len({run.conditions["prompts"] for run in read(made).runs}) == 1
    for place, keys in zip(places, (["a", "b"], ["b", "a", "b"], ["a", "c"]), strict=True):
        lines = [json.dumps({"keys": [key]}) for key in keys]
        (place / "artifact" / "runs.jsonl").write_text("\n".join(lines) + "\n")
    marks = {run.name: run.conditions["prompts"] for run in read(made).runs}
    assert marks["tokens=10"] == marks["tokens=20"] != marks["tokens=30"]


@pytest.mark.parametrize(
    ("overrides", "name"),
    [
        ({"stages.finetune.optim.lr": "1e-3"}, "lr=1e-3"),
        ({"s.finetune.lr": "1", "s.pretrain.lr": "2"}, "finetune.lr=1, pretrain.lr=2"),
        ({"objective@stages.finetune.objective": "ce"}, "objective=ce"),
        ({}, "as the recipe has it"),
    ],
    ids=["last", "longer", "group", "none"],
)  # fmt: skip
def test_names_are_short_and_differ(overrides, name):
    assert shortly(overrides) == name


def test_the_laws_of_a_token_sweep_have_its_coefficients(outputs: Folder):
    laws = laws_of(together([read(of_tokens(outputs))]))
    for temperature, level in ((0.0, -0.9), (1.0, -1.1)):
        (law,) = picked(laws, "tau", "tokens", temperature)
        assert law.n == len(TOKENS)
        assert law.range == (TOKENS[0], TOKENS[-1])
        assert law.coefficients == pytest.approx([level, 0.55], abs=0.25)
        slope = law.slope()
        assert slope.low < 0.55 < slope.high
        assert slope.high - slope.low < 0.3
        assert law.conditions["tokens_of"] == "finetune"
    assert len(picked(laws, "speedup", "batch")) == len(TOKENS)
    assert not picked(laws, "tau", "parameters")


def test_tokens_of_an_equal_pretraining_do_not_count_on_the_axis(outputs: Folder):
    (law,) = picked(laws_of(read(of_tokens(outputs, pretrained=2_000_000))), "tau", "tokens", 0.0)
    assert law.range == (TOKENS[0], TOKENS[-1])


def test_only_runs_that_differ_in_nothing_else_make_a_law(outputs: Folder):
    """Of a grid of tokens and learning rates each rate has its law; what cannot change a figure
    (the tracker) parts none, and a seed is a repeat."""
    made = outputs.sweep("grid", axes=[KEY, "lr"])
    for lr, slope in ((1e-3, 0.5), (1e-2, 0.9)):
        for i, tokens in enumerate(TOKENS[:4]):
            tau = slope * math.log10(tokens) - 1
            outputs.run(made, {KEY: tokens, "lr": lr}, {0.0: (tau, 0.05)}, tokens=tokens, lr=lr,
                        seed=i, tracker=f"job {lr} {i}")  # fmt: skip
    laws = {law.conditions["held"]: law for law in picked(laws_of(read(made)), "tau", "tokens")}
    assert set(laws) == {"lr=0.001", "lr=0.01"}
    assert laws["lr=0.001"].coefficients[1] == pytest.approx(0.5)
    assert laws["lr=0.01"].coefficients[1] == pytest.approx(0.9)


def test_runs_on_other_prompts_are_not_of_one_law(outputs: Folder):
    made = outputs.sweep("tokens", axes=[KEY])
    for i, tokens in enumerate(TOKENS):
        outputs.prompts = "xnli" if i < 3 else "flores"
        outputs.run(made, {KEY: tokens}, {0.0: (1 + 0.1 * i, 0.1)}, tokens=tokens)
    groups = alike(read(made).measured, ("schedule.tokens",), ("prompts",))
    assert sorted(len(group) for _, group in groups) == [3, 3]


def test_seeds_of_one_place_give_a_law_and_its_test(outputs: Folder):
    made = outputs.sweep("seeds", axes=[KEY, "seed"])
    for i, tokens in enumerate(TOKENS[:4]):
        for seed in (0, 1):
            tau = 1 + 0.2 * i + 0.02 * (-1) ** (seed + i)
            outputs.run(made, {KEY: tokens, "seed": seed}, {0.0: (tau, 0.1)}, tokens=tokens,
                        seed=seed)  # fmt: skip
    (law,) = picked(laws_of(read(made)), "tau", "tokens")
    assert law.n == 8
    assert law.lack_of_fit is not None


SHAPES = [(1, 512, 8_000_000), (2, 384, 8_100_000), (3, 320, 7_900_000), (4, 272, 8_050_000),
          (6, 224, 7_950_000), (8, 192, 8_020_000)]  # fmt: skip
SIZES = [(1, 128, 1_000_000), (1, 256, 2_900_000), (1, 384, 5_200_000), (1, 640, 11_000_000)]


def test_depth_explains_the_time_of_a_token_and_parameters_do_not(outputs: Folder):
    laws = laws_of(read(of_shapes(outputs, SHAPES)))
    (depth,) = picked(laws, "token_ms", "depth", None)
    (size,) = picked(laws, "token_ms", "parameters", None)
    assert depth.coefficients == pytest.approx([0.158, 0.6], abs=0.05)
    assert depth.slope().low < 0.61
    assert depth.slope().high > 0.6
    assert depth.r_squared > 0.99
    assert size.r_squared < 0.5
    (said,) = explained(laws)
    assert said.endswith("depth explains it better.")
    assert not picked(laws, "tau", "parameters"), "sizes at one depth alone make that law"


def test_times_that_were_taken_beside_other_work_make_no_law(outputs: Folder):
    """Its tau counts all the same."""
    made = of_shapes(outputs, SIZES)
    before = laws_of(read(made))
    odd = {"depth": 1, "width": 320, "parameters": 4_000_000}
    outputs.run(made, {"sweep.shape": "[1,320]"}, {0.0: (2.24, 0.1)}, token_ms=4.0,
                speedups={1: 1.0, 2: 0.9, 4: 0.8}, other_work=0.7, **odd)  # fmt: skip
    found = read(made)
    after = laws_of(found)
    for against, of in (("depth", "token_ms"), ("parameters", "token_ms"), ("batch", "speedup")):
        assert [law.n for law in after if (law.against, law.of) == (against, of)] == [
            law.n for law in before if (law.against, law.of) == (against, of)
        ]
    (tau,) = picked(after, "tau", "parameters")
    assert tau.n == 5
    said = " ".join(part.text for part in sweep_page.opening(found, after))
    assert (
        "Measured beside other work, which took cores of this machine: shape=[1,320] (0.7)" in said
    )


def test_a_size_sweep_gives_tau_by_parameters_at_one_depth(outputs: Folder):
    laws = laws_of(read(of_shapes(outputs, SIZES)))
    (law,) = picked(laws, "tau", "parameters")
    slope = law.slope()
    assert slope.low < 0.4 < slope.high
    assert law.at(3e6).value == pytest.approx(-0.4 + 0.4 * math.log10(3e6), abs=0.05)
    assert law.n == 4
    assert explained(laws) == []


def test_two_sweeps_are_read_as_one_and_what_they_share_counts_once(outputs: Folder):
    """One of the shapes is also one of the sizes: the same stages, so the same measurement."""
    shapes, sizes = of_shapes(outputs, SHAPES), of_shapes(outputs, [*SIZES, SHAPES[0]], "size")
    both = together([read(shapes), read(sizes)])
    assert len(both.runs) == len(SHAPES) + len(SIZES)
    assert both.preset == "shape + size"
    (law,) = picked(laws_of(both), "tau", "parameters")
    assert law.n == len(SIZES) + 1
    (times,) = picked(laws_of(both), "token_ms", "depth", None)
    assert times.n == len(SHAPES) + len(SIZES)


def test_the_page_answers_first(outputs: Folder):
    made = of_tokens(outputs)
    outputs.job(made, {KEY: 9}, code=2, error="batch_tokens must be at most tokens")
    outputs.job(made, {KEY: 99}, code=None)
    outputs.run(made, {KEY: "broken"}, {0.0: (9.9, 0.1)}, passed=False, lr=3.0)
    lines = sweep.write(together([read(made)]), made / "report")
    assert lines[0].startswith("Best of 6 by tau_T0: tokens=983040, at T=0 tau 2.")
    assert lines[1] == "Of 9 jobs, 2 failed and 1 have no figure."
    assert "measure the one that you choose again" in lines[3]
    assert re.search(r"^Tau against tokens .*T=0, n=6\) rises, \+0\.5", "\n".join(lines), re.M)
    text = (made / "report" / "sweep.md").read_text()
    assert "| tokens=9 | failed (code 2) | - |" in text
    assert "tokens=9 failed: batch_tokens must be at most tokens" in text
    assert "| tokens=99 | at work or interrupted | - |" in text
    assert "| tokens=broken | failed (code 3) | - |" in text, "controls that failed: no figure"
    page = (made / "report" / "index.html").read_text()
    assert page.count("<svg") == 5
    assert "extrapolated" in page
    assert "http" not in page.replace("http-equiv", ""), "it asks nobody for anything"
    assert (made / "report" / "sweep.png").read_bytes().startswith(b"\x89PNG")
    told = json.loads((made / "report" / "laws.json").read_text())
    assert (told["target"], told["conditions"]["prompts"]) == (TARGET, _prompts(made))
    assert len(told["runs"]) == 9
    first = Law.of_told(told["laws"][0])
    assert first.at(1e6).value == pytest.approx(-0.9 + 0.55 * 6, abs=0.15)


def _prompts(folder: Path) -> str:
    return str(read(folder).measured[0].conditions["prompts"])


def test_equals_of_the_best_are_named_and_no_slope_is_not_claimed(outputs: Folder):
    made = outputs.sweep("tokens", axes=[KEY])
    for tokens, tau in zip(TOKENS, (2.0, 2.4, 1.95, 2.35, 2.05, 2.3), strict=True):
        outputs.run(made, {KEY: tokens}, {0.0: (tau, 0.2)}, tokens=tokens)
    said = [line.text for line in sweep_page.opening(read(made), laws_of(read(made)))]
    assert said[0].startswith("Best of 6 by tau_T0: tokens=61440, at T=0 tau 2.40 [2.20, 2.60]")
    assert said[1] == "Not told apart from it: tokens=245760; tokens=983040."
    assert "no slope shown" in said[3]
    assert "xtrapolated" not in said[3]


def test_prompts_are_paired_where_their_runs_were_kept(outputs: Folder, tmp_path: Path):
    """Two runs whose intervals overlap, and of which one is worse on each prompt."""
    made = outputs.sweep("tokens", axes=[KEY])
    for i, (tokens, tau) in enumerate(zip(TOKENS, (2.53, 2.3, 2.52), strict=False)):
        place = outputs.run(made, {KEY: tokens}, {0.0: (tau, 0.4)}, tokens=tokens)
        kept = side(tmp_path / str(tokens), tau=tau, seed=i) / "artifact" / "runs.jsonl"
        kept.rename(place / "artifact" / "runs.jsonl")
    said = [line.text for line in sweep_page.opening(read(made), [])]
    assert said[1] == "Not told apart from it: tokens=122880."
    for file in outputs.root.glob("stages/*/artifact/runs.jsonl"):
        file.unlink()
    said = [line.text for line in sweep_page.opening(read(made), [])]
    assert said[1] == "Not told apart from it: tokens=122880; tokens=61440."


def test_drafts_of_different_shapes_are_said_to_be_part_of_a_law(outputs: Folder):
    made = outputs.sweep("tokens", axes=[KEY])
    for i, tokens in enumerate(TOKENS):
        outputs.run(made, {KEY: tokens}, {0.0: (1 + 0.2 * i, 0.1)}, tokens=tokens,
                    drafts=3 if i < 4 else 5, draft_lengths=[3, 5])  # fmt: skip
    (law,) = laws_of(read(made))
    assert law.conditions["drafts"] == {"chain of 3": 4, "chain of 5": 2}
    assert "Mind: bench drafted differently (" in sweep_page.claim(law)


def test_a_failing_form_is_said_and_the_better_one_drawn(outputs: Folder):
    made = outputs.sweep("tokens", axes=[KEY])
    for n in (10, 20, 40, 80, 160, 320, 640, 1280):
        tau = 3.2 - 2.2 * (n / 10) ** -0.8 + 0.005 * math.cos(n)
        outputs.run(made, {KEY: n * BATCH}, {0.0: (tau, 0.1)}, tokens=n * BATCH)
    (law,) = laws_of(read(made))
    said = sweep_page.claim(law)
    assert "a + b log10 x fails here: a - c x^-b is better" in said
    assert re.search(r"rises, .*: 3\.\d+ - \S+ x\^-0\.[78]\d", said)


def test_halved_runs_are_learning_curves_and_no_law(outputs: Folder):
    made = outputs.sweep("lr", axes=["stages.finetune.optim.lr"])
    key = "stages.finetune.optim.lr"
    for i, lr in enumerate((1e-4, 1e-3, 1e-2)):
        outputs.job(made, {key: lr}, rungs=[[20480, 1.3 + i / 10], [61440, 1.7 + i / 5]][: 1 + i])
    outputs.job(made, {key: 1.0}, code=None, rungs=[[20480, None]])
    sweep.write(together([read(made)]), made / "report")
    text = (made / "report" / "sweep.md").read_text()
    assert "| lr=0.001 | 20,480: 1.40, 61,440: 1.90 | paused at 61,440 |" in text
    assert "No run has been measured by bench yet" in text
    page = (made / "report" / "index.html").read_text()
    assert page.count("<svg") == 1
    assert json.loads((made / "report" / "laws.json").read_text())["laws"] == []


def test_no_name_becomes_a_tag_or_a_formula(outputs: Folder):
    made = outputs.sweep(f"x$a$ {EVIL}".replace("/", "_"), axes=[EVIL])
    for i, tokens in enumerate(TOKENS[:3]):
        outputs.run(made, {f"stages.{EVIL} $x$": tokens}, {0.0: (2 + i / 5, 0.1)}, tokens=tokens)
    outputs.job(made, {"a": EVIL}, code=2, error=f"| {EVIL}")
    lines = sweep.write(together([read(made)]), made / "report")
    assert "n=3" in lines[4]
    page = Tags((made / "report" / "index.html").read_text())
    assert "script" not in page.tags
    assert not [v for _, v in page.values if v.startswith(("http", "//"))]
    assert "<script" not in (made / "report" / "sweep.md").read_text()


def refused(capsys, *folders: Path) -> str:
    assert sweep.main([str(folder) for folder in folders]) == 2
    error = str(capsys.readouterr().err)
    assert error.startswith("error: ")
    assert not any((folder / "report").exists() for folder in folders)
    return error


def test_what_is_no_sweep_or_not_measured_is_refused_in_a_sentence(
    outputs: Folder, tmp_path: Path, capsys
):
    assert "is no sweep: it has no readable sweep.json" in refused(capsys, tmp_path)
    empty = outputs.sweep("empty", axes=[KEY])
    assert "no run has been measured by bench yet (of 0 jobs" in refused(capsys, empty)
    outputs.job(empty, {KEY: 9}, code=2, error="no")
    outputs.job(empty, {KEY: 10}, code=None)
    said = refused(capsys, empty)
    assert "(of 2 jobs 1 at work or interrupted, 1 failed)" in said
    assert "let the sweep go on with the command that began it: python -m train -m" in said
    (empty / "jobs" / "0.json").write_text('{"overrides": ')
    assert "is not the note of a job" in refused(capsys, empty)
    (empty / "jobs" / "0.json").write_text("{}")
    assert "lack 'overrides'" in refused(capsys, empty)


def test_sweeps_that_maximise_different_things_are_ranked_by_one(outputs: Folder):
    """A tau is not compared with a speedup, though both are numbers."""
    fast = outputs.sweep("size", axes=["drafter.width"], maximises="speedup_T0")
    slow = outputs.sweep("tokens", axes=[KEY])
    outputs.run(fast, {"drafter.width": 64}, {0.0: (2.5, 0.1)}, speedups={1: 1.4})
    (job,) = (fast / "jobs").iterdir()
    job.write_text(json.dumps(json.loads(job.read_text()) | {"value": 1.4}))
    outputs.run(slow, {KEY: 9}, {0.0: (1.9, 0.1)}, speedups={1: 1.1}, tokens=20_480)
    for folders in ((fast, slow), (slow, fast)):
        made = together([read(folder) for folder in folders])
        assert [run.name for run in made.measured] == ["width=64", "tokens=9"]


def test_a_bench_that_is_not_at_its_end_has_no_figures(outputs: Folder):
    made = outputs.sweep("tokens", axes=[KEY])
    outputs.run(made, {KEY: 9}, {0.0: (1.9, 0.1)})
    bench = outputs.run(made, {KEY: 99}, {0.0: (2.9, 0.1)}, tokens=20_480)
    (bench / "result.json").unlink()
    assert [run.tau for run in read(made).runs if run.name == "tokens=99"] == [{}]


def test_sweeps_of_two_targets_are_refused(outputs: Folder, tmp_path: Path, capsys):
    other = Folder(tmp_path / "other", target="f" * 16)
    said = refused(capsys, of_tokens(outputs), of_tokens(other))
    assert "were measured with 2 targets, koen-17m (3aea01a78b05), koen-17m (ffffffffffff)" in said


def test_the_command_helps_and_writes_where_it_is_told(outputs: Folder, tmp_path: Path, capsys):
    out = tmp_path / "out"
    assert sweep.main([str(of_shapes(outputs, SIZES)), "--out", str(out)]) == 0
    assert {file.name for file in out.iterdir()} == {
        *("index.html", "laws.json", "sweep.md", "sweep.png"),
    }
    printed = capsys.readouterr().out
    assert printed.startswith("Best of 4 by speedup_T0: shape=[1,")
    assert str(out / "index.html") in printed
    with pytest.raises(SystemExit) as ended:
        sweep.main(["--help"])
    assert ended.value.code == 0
    assert "FOLDER" in capsys.readouterr().out

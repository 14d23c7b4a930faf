"""quickstart from an empty folder, through the command: everything is made once, then kept."""

import json
from pathlib import Path

import pytest
from safetensors import safe_open

from tests.tiny import WORDS
from tests.train.composing import STAGES, command

SMALL = {
    "target": {
        "layers": 2,
        "width": 64,
        "vocab_size": 320,
        "max_positions": 256,
        "schedule.tokens": 24_000,
        "schedule.batch_tokens": 512,
        "schedule.sequence_length": 64,
        "optim.lr": "1e-2",
    },
    "pretrain": {
        "schedule.tokens": 8_192,
        "schedule.batch_tokens": 1_024,
        "schedule.sequence_length": 64,
    },
    "generate": {"limit": 40, "max_new_tokens": 16, "temperatures": "[0.7,1.0]"},
    "finetune": {
        "schedule.tokens": 2_048,
        "schedule.batch_tokens": 512,
        "schedule.sequence_length": 64,
    },
    "bench": {
        "limit": 4,
        "max_new_tokens": 12,
        "repeats": 1,
        "batch_sizes": "[1,2]",
        "draft_lengths": "[2,3]",
        "trial_prompts": 1,
        "control_prompts": 1,
    },
    "serve": {"limit": 4, "max_new_tokens": 12},
}


def questions() -> list[tuple[str, str]]:
    """Short questions with short answers, which a tiny model learns to end."""
    return [(f"{a} {b} {c}?", f"{c}.") for a in WORDS for b in WORDS for c in WORDS[:6]]


def arguments(folder: Path) -> list[str]:
    """quickstart on the file of questions, with little of everything."""
    mine = ["recipe=quickstart", f"output_dir={folder / 'out'}", "drafter.width=64"]
    for stage, settings in SMALL.items():
        mine += [f"stages.{stage}.{key}={value}" for key, value in settings.items()]
    chat = f"_target_: data.sources.Local, files: [{folder / 'chat.jsonl'}], prompt: '{{q}}'"
    for slot, source in {
        "target.data": f"{chat}, answer: '{{a}}'",
        "pretrain.data": f"{chat}, answer: '{{a}}'",
        "generate.prompts": chat,
        "bench.prompts.python": chat,
        "serve.prompts.python": chat,
    }.items():
        mine += [f"~stages.{slot}", f"+stages.{slot}={{{source}}}"]
    return mine


def stamps(folder: Path) -> dict[str, int]:
    return {
        str(p.relative_to(folder)): p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file()
    }


def places(folder: Path) -> dict[str, Path]:
    """The recipe's stages and their folders."""
    note = json.loads((folder / "out" / "quickstart.json").read_text())
    return {name: Path(place) for name, place in note.items()}


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A finished run: its folder, and what it printed."""
    folder = tmp_path_factory.mktemp("pipeline")
    rows = [json.dumps({"q": q, "a": a}) for q, a in questions()]
    (folder / "chat.jsonl").write_text("\n".join(rows) + "\n")
    told = {"WANDB_DIR": str(folder / "wandb"), "WANDB_API_KEY": "", "HOME": str(folder)}
    ran = command(*arguments(folder), "tracker=wandb", cwd=folder, **told)
    assert ran.returncode == 0, ran.stdout[-2000:] + ran.stderr[-4000:]
    return folder, ran.stdout


def test_every_stage_leaves_what_it_promises(done):
    folder, _ = done
    found = places(folder)
    assert tuple(found) == STAGES
    for name, place in found.items():
        for file in ("config.yaml", "environment.json", "stage.json", "result.json", "DONE"):
            assert (place / file).is_file(), (name, file)
        assert json.loads((place / "result.json").read_text())["seconds"] > 0
    for name in ("target", "pretrain", "finetune"):
        rows = [json.loads(x) for x in (found[name] / "metrics.jsonl").read_text().splitlines()]
        assert rows[-1]["step"] == json.loads((found[name] / "result.json").read_text())["steps"]
        assert (found[name] / "artifact" / "model.safetensors").is_file()
    for file in ("report.json", "report.md", "report.png", "runs.jsonl"):
        assert (found["bench"] / "artifact" / file).stat().st_size > 100
    for file in ("model.safetensors", "config.json", "tokenizer.json", "README.md", "report.json"):
        assert (found["publish"] / "artifact" / file).is_file()


def test_no_part_is_left_lying_about(done):
    folder, _ = done
    assert list((folder / "out").rglob("*.part*")) == []
    assert list((folder / "out").rglob(".probe*")) == []


def test_the_target_is_a_llama_in_hugging_face_format_that_has_learnt(done):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder, _ = done
    place = places(folder)["target"]
    model = AutoModelForCausalLM.from_pretrained(place / "artifact")
    tokenizer = AutoTokenizer.from_pretrained(place / "artifact")
    assert model.config.model_type == "llama"
    assert (model.config.num_hidden_layers, model.config.hidden_size) == (2, 64)
    assert tokenizer.chat_template
    assert model.config.eos_token_id == tokenizer.eos_token_id
    losses = [json.loads(x) for x in (place / "metrics.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in losses if "loss" in row]
    assert losses[-1] < 0.6 * losses[0]


def test_the_drafter_shares_the_tokenizer_and_holds_no_target(done):
    folder, _ = done
    found = places(folder)
    ours, theirs = (found[n] / "artifact" / "tokenizer.json" for n in ("finetune", "target"))
    assert json.loads(ours.read_text()) == json.loads(theirs.read_text())
    with safe_open(str(found["finetune"] / "artifact" / "model.safetensors"), "pt") as file:
        layers = {key.split(".")[2] for key in file.keys() if key.startswith("model.layers.")}  # noqa: SIM118
    assert layers == {"0"}


def test_the_report_passed_its_controls_and_says_what_it_measured(done):
    folder, said = done
    report = json.loads((places(folder)["bench"] / "artifact" / "report.json").read_text())
    assert report["passed"]
    assert set(report["controls"]) >= {"drafter = target", "random drafter", "exactness"}
    runs = (places(folder)["bench"] / "artifact" / "runs.jsonl").read_text().splitlines()
    cells = {(r["arm"], r["temperature"], r["batch"]) for r in map(json.loads, runs)}
    arms, temperatures = ("autoregressive", "drafter", "ngram"), (0.0, 1.0)
    assert cells == {(a, t, b) for a in arms for t in temperatures for b in (1, 2)}
    assert "[9/9] publish" in said
    assert "the same rounds in 4 of 4 prompts" in said, "as transformers has them"
    assert "snippet: ran" in said
    assert "report: " in said
    assert "next: " in said


def test_no_prompt_of_the_bench_was_trained_on(done):
    from data.sources import heldout

    folder, _ = done
    shards = (places(folder)["generate"] / "artifact").glob("shard-*.jsonl")
    asked = {json.loads(x)["prompt"] for f in shards for x in f.read_text().splitlines()}
    assert asked
    assert not any(heldout(prompt) for prompt in asked)


def test_wandb_without_a_key_writes_offline_and_ends_nothing(done):
    folder, _ = done
    offline = list(folder.rglob("*.wandb"))
    assert {p.parent.name.split("-")[0] for p in offline} == {"offline"}
    places = [p.relative_to(folder / "out").parts for p in offline]
    stages = {parts[1].split("-")[0] for parts in places if parts[0] == "stages"}
    assert stages == {"target", "pretrain", "finetune"}
    assert [parts[0] for parts in places].count("wandb") == 1, "what the recipe has come to"


def test_again_does_nothing_and_a_changed_stage_runs_with_what_reads_it(done):
    folder, first = done
    before = stamps(folder / "out" / "stages")
    again = command(*arguments(folder), cwd=folder)
    assert again.returncode == 0, again.stderr
    for number, stage in enumerate(STAGES, 1):
        assert f"[{number}/9] {stage}: done before, " in again.stdout
    assert stamps(folder / "out" / "stages") == before
    assert first.split("minutes of work")[1] == again.stdout.split("minutes of work")[1]

    changed = command(*arguments(folder), "stages.serve.limit=3", cwd=folder)
    assert changed.returncode == 0, changed.stdout[-2000:] + changed.stderr[-3000:]
    for number, stage in enumerate(STAGES, 1):
        ran = f"[{number}/9] {stage}: done before, " not in changed.stdout
        assert ran == (stage in ("serve", "publish"))
    after = stamps(folder / "out" / "stages")
    assert {name: after[name] for name in before} == before
    new = {name.split("/")[0].split("-")[0] for name in set(after) - set(before)}
    assert new == {"serve", "publish"}

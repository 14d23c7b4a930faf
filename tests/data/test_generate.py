"""The target's own answers: what a row keeps, what is dropped and counted, and going on."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from data import generate
from data.chat import prompt_ids, template_hash
from data.generate import Generate, read
from data.sources import Local, heldout, prompt_key
from decoding.pretrained import Pretrained
from tests import forked
from tests.tiny import write_chats, write_target, write_texts

SHARDS = 3
PROMPTS = 24


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prompts, and a random model of which two tokens in five end an answer."""
    folder = tmp_path_factory.mktemp("generate")
    text = write_texts(folder)
    write_chats(folder, rows=300)
    write_target(folder / "target", text, ends=120)
    return folder


def stage(place: Path, **changed: Any) -> Generate:
    source = Local(files=[str(place / "chat.jsonl")], prompt="{question}")
    settings: dict[str, Any] = {
        "target": Pretrained(path=str(place / "target"), dtype="float32"),
        "prompts": source,
        "temperatures": [0.0, 0.3, 0.7, 1.0],
        "limit": PROMPTS,
        "max_new_tokens": 20,
        "batch_size": 5,
        "shard_size": PROMPTS // SHARDS,
    }
    return Generate(**settings | changed)


def shards(out: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted((out / "artifact").glob("shard-*.json*"))}


def rows(out: Path) -> list[dict[str, Any]]:
    files = sorted((out / "artifact").glob("shard-*.jsonl"))
    return [json.loads(line) for f in files for line in f.read_text("utf-8").splitlines()]


@pytest.fixture(scope="module")
def made(place: Path) -> Path:
    """The folder of a finished stage."""
    out = place / "out"
    stage(place).run(out)
    return out


def test_rows_keep_what_the_issue_lists_and_the_exact_ids(place: Path, made: Path):
    tokenizer = Pretrained(path=str(place / "target")).tokenizer()
    found = rows(made)
    assert len(found) > PROMPTS // 2
    for row in found:
        wanted = "prompt turns answer temperature seed target revision template samples"
        assert set(row) == set(wanted.split())
        assert row["template"] == template_hash(tokenizer)
        assert [t["role"] for t in row["turns"]] == ["user", "assistant"]
        assert row["turns"] == [
            {"role": "user", "content": row["prompt"]},
            {"role": "assistant", "content": row["answer"]},
        ]
        (sample,) = row["samples"]
        assert sample["prompt_ids"] == prompt_ids(tokenizer, row["turns"][:1])
        assert tokenizer.decode(sample["answer_ids"], skip_special_tokens=True) == row["answer"]
        model_ends = {tokenizer.eos_token_id, *range(len(tokenizer) - 120, len(tokenizer))}
        assert sample["answer_ids"][-1] in model_ends
        assert not model_ends & set(sample["answer_ids"][:-1])


def test_prompts_go_round_the_temperatures(made: Path):
    temperatures = Counter(row["temperature"] for row in rows(made))
    assert set(temperatures) == {0.0, 0.3, 0.7, 1.0}


def test_each_answer_to_a_prompt_has_another_temperature_and_draw(place: Path, tmp_path: Path):
    stage(place, answers_per_prompt=4, limit=6, temperatures=[0.7, 1.0]).run(tmp_path)
    by_prompt: dict[str, list] = {}
    for row in rows(tmp_path):
        by_prompt.setdefault(row["prompt"], []).append(row)
    several = [group for group in by_prompt.values() if len(group) > 2]
    assert several
    for group in several:
        assert len({r["answer"] for r in group}) > 1
        assert {r["temperature"] for r in group} == {0.7, 1.0}


def test_no_heldout_prompt_is_asked(place: Path, made: Path):
    every = [json.loads(x)["question"] for x in (place / "chat.jsonl").read_text().splitlines()]
    assert any(heldout(q) for q in every[:PROMPTS]), "the fixture has none to leave out"
    assert not any(heldout(row["prompt"]) for row in rows(made))


def test_a_prompt_in_two_spellings_is_asked_once(place: Path, tmp_path: Path):
    file = tmp_path / "twice.jsonl"
    said = ["Was ist das?", "was  IST das?", "Was ist dies?"]
    file.write_text("".join(json.dumps({"question": q}) + "\n" for q in said))
    source = Local(files=[str(file)], prompt="{question}")
    found = stage(place, prompts=source, limit=None, max_new_tokens=200).run(tmp_path)
    counted = json.loads((tmp_path / "artifact" / "data.json").read_text())["counts"]
    assert sum(counted.values()) == 2
    assert found["answers"] == counted["kept"]


def test_running_again_gives_the_same_bytes(place: Path, made: Path, tmp_path: Path):
    """Greedy and sampled alike, and whatever the batch size."""
    stage(place).run(tmp_path / "same")
    assert shards(tmp_path / "same") == shards(made)
    stage(place, batch_size=24).run(tmp_path / "larger")
    assert shards(tmp_path / "larger") == shards(made)
    stage(place, seed=1).run(tmp_path / "other")
    first, other = rows(made), rows(tmp_path / "other")
    same = {r["prompt"]: r["answer"] for r in first}
    assert any(r["temperature"] > 0.5 and same.get(r["prompt"]) != r["answer"] for r in other)
    greedy = [r for r in other if r["temperature"] == 0]
    assert all(same[r["prompt"]] == r["answer"] for r in greedy)


def test_only_the_missing_shard_is_made_again(place: Path, made: Path, tmp_path: Path, monkeypatch):
    out = tmp_path / "out"
    stage(place).run(out)
    before = shards(out)
    assert len([n for n in before if n.endswith(".jsonl")]) == SHARDS
    (out / "artifact" / "shard-00001.jsonl").unlink()
    (out / "artifact" / "shard-00001.counts.json").unlink()
    stamps = {p.name: p.stat().st_mtime_ns for p in (out / "artifact").glob("shard-*")}
    answered = []
    real = Generate._answer
    monkeypatch.setattr(
        Generate, "_answer", lambda self, *a: answered.append(a[3][0]) or real(self, *a)
    )
    stage(place).run(out)
    assert answered == [(PROMPTS // SHARDS, 0)], "the first prompt of the second shard"
    assert shards(out) == before
    after = {p.name: p.stat().st_mtime_ns for p in (out / "artifact").glob("shard-*")}
    assert {n: after[n] for n in stamps} == stamps


def test_a_shard_cut_off_by_a_kill_is_made_whole(place: Path, made: Path, tmp_path: Path):
    """Without its counts a shard was not finished; a .part is no shard."""
    out = tmp_path / "out"
    stage(place).run(out)
    before = shards(out)
    cut = out / "artifact" / "shard-00002.jsonl"
    cut.with_name(cut.name + ".part").write_bytes(cut.read_bytes()[:50])
    cut.write_bytes(cut.read_bytes()[:50])
    cut.with_suffix(".counts.json").unlink()
    stage(place).run(out)
    assert shards(out) == before


def test_a_finished_stage_does_not_load_the_target(place: Path, made: Path, monkeypatch):
    monkeypatch.setattr(Pretrained, "load", lambda *a, **k: pytest.fail("loaded the target"))
    stage(place).run(made)


def test_faults_are_counted_and_dropped(place: Path, tmp_path: Path, monkeypatch, capsys):
    out = tmp_path / "out"
    monkeypatch.setattr(generate, "SURE", 1)
    monkeypatch.setattr(generate, "is_repetitive", lambda ids: ids[0] % 3 == 0)
    monkeypatch.setattr(generate, "language_of", lambda t: "de" if len(t) % 2 else "fr")
    stage(place, language="de", temperatures=[1.0], max_new_tokens=1, limit=60).run(out)
    note = json.loads((out / "artifact" / "data.json").read_text())
    counts = note["counts"]
    assert {"kept", "degenerate", "truncated", "wrong language"} <= set(counts)
    assert sum(counts.values()) == 60
    assert note["rows"] == counts["kept"] == len(rows(out))
    for row in rows(out):
        assert row["samples"][0]["answer_ids"][0] % 3
        assert len(row["answer"]) % 2
    said = capsys.readouterr().out
    assert f"{counts['degenerate']} degenerate" in said
    assert f"{counts['wrong language']} wrong language" in said


def test_only_truncated_answers_is_an_error_with_the_counts(tmp_path: Path):
    text = write_texts(tmp_path)
    write_chats(tmp_path, rows=8)
    write_target(tmp_path / "target", text)  # ends only by chance
    with pytest.raises(ValueError, match=r"no usable answer: \d truncated.*raise max_new_tokens"):
        stage(tmp_path, limit=3, temperatures=[1.0], max_new_tokens=1).run(tmp_path / "out")


def test_prompts_that_are_too_long_are_counted(place: Path, tmp_path: Path):
    tokenizer = Pretrained(path=str(place / "target")).tokenizer()
    stage(place, max_prompt_tokens=25).run(tmp_path)
    counts = json.loads((tmp_path / "artifact" / "data.json").read_text())["counts"]
    assert counts["prompt too long"] > 0
    found = rows(tmp_path)
    assert all(len(prompt_ids(tokenizer, r["turns"][:1])) <= 25 for r in found)


TALK = [
    {"role": "system", "content": "Kurz bitte."},
    {"role": "user", "content": "Der Hund trinkt Milch?"},
    {"role": "assistant", "content": "WHAT SOMEBODY ELSE SAID"},
    {"role": "user", "content": "Und die Katze?"},
    {"role": "assistant", "content": "NOT THIS EITHER"},
]


def test_later_turns_are_asked_behind_the_targets_own_answers(place: Path, tmp_path: Path):
    file = tmp_path / "talks.jsonl"
    talks = [[dict(m) for m in TALK] for _ in range(12)]
    for i, talk in enumerate(talks):
        talk[1]["content"] += f" {i}"
    file.write_text("".join(json.dumps({"messages": t}) + "\n" for t in talks))
    source = Local(files=[str(file)], messages="messages")
    stage(place, prompts=source, temperatures=[1.0], limit=None).run(tmp_path)
    tokenizer = Pretrained(path=str(place / "target")).tokenizer()
    whole = [row for row in rows(tmp_path) if len(row["samples"]) == 2]
    assert whole
    for row in whole:
        roles = ["system", "user", "assistant", "user", "assistant"]
        assert [m["role"] for m in row["turns"]] == roles
        assert "SOMEBODY" not in json.dumps(row)
        assert row["answer"] == row["turns"][-1]["content"]
        assert row["samples"][0]["prompt_ids"] == prompt_ids(tokenizer, row["turns"][:2])
        assert row["samples"][1]["prompt_ids"] == prompt_ids(tokenizer, row["turns"][:4])
        assert row["prompt"] == row["turns"][1]["content"]


def test_read_gives_every_answered_turn(made: Path):
    found = list(read(made / "artifact"))
    assert len(found) == sum(len(r["samples"]) for r in rows(made))
    assert all(set(r) == {"prompt", "prompt_ids", "answer_ids"} for r in found)
    assert len({prompt_key(r["prompt"]) for r in found}) == len(found)


def test_text_instead_of_prompts_is_one_sentence(place: Path, tmp_path: Path):
    source = Local(files=[str(place / "text.jsonl")], text="{text}")
    with pytest.raises(ValueError, match="prompt"):
        stage(place, prompts=source).run(tmp_path)


@pytest.mark.parametrize(
    "changed",
    [{"temperatures": []}, {"max_new_tokens": 0}, {"answers_per_prompt": 0}, {"batch_size": 0}],
    ids=str,
)
def test_settings_out_of_range_are_refused(place: Path, changed: dict):
    with pytest.raises(ValueError, match=r"at least one temperature, and answers_per_prompt.*got"):
        stage(place, **changed)


def test_a_target_without_a_chat_template_is_refused(place: Path, tmp_path: Path):
    import shutil

    shutil.copytree(place / "target", tmp_path / "bare")
    (tmp_path / "bare" / "chat_template.jinja").unlink()
    bare = Pretrained(path=str(tmp_path / "bare"), dtype="float32")
    with pytest.raises(ValueError, match=r"the tokenizer of .*bare has no chat template"):
        stage(place, target=bare).run(tmp_path / "out")


def test_prompts_that_the_template_refuses_are_counted(place: Path, tmp_path: Path):
    """Some templates know no system turn: one such conversation must not end hours of work."""
    template = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    template += (place / "target" / "chat_template.jinja").read_text("utf-8")
    target = Pretrained(path=str(place / "target"), dtype="float32", chat_template=template)
    talks = [[{"role": "user", "content": f"{n}. Der Hund?"}] for n in range(12)]
    for talk in talks[:4]:
        talk.insert(0, {"role": "system", "content": "Kurz bitte."})
    file = tmp_path / "talks.jsonl"
    file.write_text("".join(json.dumps({"m": talk}) + "\n" for talk in talks))
    source = Local(files=[str(file)], messages="m")
    stage(place, target=target, prompts=source, limit=None, max_new_tokens=60).run(tmp_path)
    counts = json.loads((tmp_path / "artifact" / "data.json").read_text())["counts"]
    assert counts["refused by the chat template"] == 4
    assert counts["kept"] > 0


def test_two_ranks_write_the_shards_of_one(place: Path, made: Path, tmp_path: Path):
    """Each rank its share; a stage that another number of ranks began is gone on with."""
    target = {"path": str(place / "target"), "dtype": "float32"}
    source = {"files": [str(place / "chat.jsonl")], "prompt": "{question}"}
    config = {
        "_target_": "data.generate.Generate",
        "target": {"_target_": "decoding.pretrained.Pretrained", **target},
        "prompts": {"_target_": "data.sources.Local", **source},
        **{"temperatures": [0.0, 0.3, 0.7, 1.0], "limit": PROMPTS, "max_new_tokens": 20},
        **{"batch_size": 5, "shard_size": PROMPTS // SHARDS},
    }
    note = {"name": "generate", "fingerprint": "0", "config": config, "inputs": {}}
    (tmp_path / "stage.json").write_text(json.dumps(note))
    (tmp_path / "artifact").mkdir()
    for file in (made / "artifact").glob("shard-00001.*"):
        (tmp_path / "artifact" / file.name).write_bytes(file.read_bytes())
    kept = (tmp_path / "artifact" / "shard-00001.jsonl").stat().st_mtime_ns
    forked.run(forked.worker, tmp_path, folder=tmp_path)
    assert shards(tmp_path) == shards(made)
    assert (tmp_path / "artifact" / "shard-00001.jsonl").stat().st_mtime_ns == kept
    data = "artifact/data.json"
    assert (tmp_path / data).read_text() == (made / data).read_text()
    assert json.loads((tmp_path / "environment.json").read_text())["ranks"] == 2

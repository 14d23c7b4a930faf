"""The recipe ko_drafter as it is, from nothing to a drafter on the Hub and back, by one command.

The Hub is a local one: under the names that the recipe reads it serves small stand-ins, a chat
model that was trained for seconds and a few thousand rows of Korean. Only sizes are set.
"""

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import pytest

from tests.soak.whole_hub import contents, whole
from tests.train.composing import LAUNCHED, ROOT
from tests.train.upload_server import ATTRIBUTES, Hub

pytestmark = pytest.mark.soak
CANARY = "hf_" + "c4n4ry" * 5
NAME, TARGET = "me/ko-drafter", "Qwen/Qwen3-8B"
WEB, CHAT = "HuggingFaceFW/fineweb-2", "nlpai-lab/kullm-v2"

PLACES = "서울 부산 대구 광주 제주 강릉 전주 경주 수원 춘천 여수 속초 안동 포항 목포"
TIMES = "아침에 점심에 저녁에 오늘 내일 어제 주말에 봄에 여름에 가을에 겨울에 밤에"
THINGS = "사과를 포도를 감자를 김치를 국수를 만두를 생선을 우유를 떡을 빵을 커피를 수박을"
DEEDS = {"먹어요": "맛있어요", "사요": "비싸요", "팔아요": "싸요", "좋아해요": "저도 좋아해요"}

SIZES = {  # of the target's stand-in; its recipe is quickstart, cut off after the first stage
    "layers": 2,
    "width": 64,
    "vocab_size": 400,
    "max_positions": 256,
    "schedule.tokens": 60_000,
    "schedule.batch_tokens": 1_024,
    "schedule.sequence_length": 64,
    "optim.lr": "1e-2",
}
LEFT_OUT = ("pretrain", "generate", "finetune", "tune_tree", "bench", "export", "serve", "publish")
SMALL = {
    "pretrain.schedule.tokens": 65_536,
    "pretrain.schedule.batch_tokens": 1_024,
    "pretrain.schedule.sequence_length": 64,
    "generate.limit": 120,
    "generate.max_new_tokens": 48,
    "generate.max_prompt_tokens": 96,
    "finetune.schedule.tokens": 32_768,
    "finetune.schedule.batch_tokens": 1_024,
    "finetune.schedule.sequence_length": 64,
    "tune_tree.nodes": 6,
    "tune_tree.depth": 3,
    "tune_tree.ranks": 2,
    "tune_tree.rows": 12,
    "bench.limit": 8,
    "bench.max_prompt_tokens": 96,
    "bench.max_new_tokens": 24,
    "bench.batch_sizes": "[1,2]",
    "bench.draft_lengths": "[2,3]",
    "bench.trial_prompts": 2,
    "bench.control_prompts": 2,
    "bench.repeats": 1,
    "bench.law_samples": 200,
}

LOADS = """
import json, sys
from decoding.loop import decode
from decoding.pretrained import Pretrained
from decoding.sampling import Sampling
from drafters.published import fetch, published
name, where, *prompts = sys.argv[1:]
place = Pretrained(path=where, dtype="float32", thinking=False)
target, tokenizer = place.load(), place.tokenizer()
drafter = published(name, target)
asked = [
    tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}], add_generation_prompt=True, return_dict=False
    )
    for prompt in prompts
]
told = {"folder": str(fetch(name))}
for arm, drafts in {"plain": None, "drafted": drafter}.items():
    done = decode(target, drafts, asked, sampling=Sampling(), max_new_tokens=32)
    told[arm] = [answer.ids for answer in done.answers]
told["accepted"] = sum(sum(answer.accepted) for answer in done.answers)
print(json.dumps(told))
"""


def talks() -> list[dict[str, str]]:
    """Korean questions with their answers, no two alike, as the columns of the chat set."""
    return [
        {
            "instruction": f"{time_} {place}에서 {thing} {deed}?",
            "input": "짧게 답하세요." if number % 3 == 0 else "",
            "output": f"네, {time_} {place}에서 {thing} {deed}. {more}.",
        }
        for number, (time_, place, thing, (deed, more)) in enumerate(
            product(TIMES.split(), PLACES.split(), THINGS.split(), DEEDS.items())
        )
    ]


def web() -> list[dict[str, str]]:
    """Korean pages of a few sentences."""
    said = [row["output"] for row in talks()]
    return [{"text": " ".join(said[n::1500])} for n in range(1500)]


def run(*arguments: str, cwd: Path, **environment: str) -> "subprocess.CompletedProcess[str]":
    """`python ...` on one thread, with its output."""
    clean = {k: v for k, v in os.environ.items() if k not in LAUNCHED}
    mine = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd,
        env=clean | mine | environment,
        capture_output=True,
        text=True,
        timeout=1200,
    )


def stand_in(folder: Path) -> Path:
    """A chat model in Hugging Face format that answers these questions; its folder."""
    rows = [f"{json.dumps(row, ensure_ascii=False)}\n" for row in talks()]
    (folder / "talks.jsonl").write_text("".join(rows), encoding="utf-8")
    source = (
        f"{{_target_: data.sources.Local, files: [{folder / 'talks.jsonl'}], "
        "prompt: '{instruction}\n{input}', answer: '{output}'}"
    ).replace("\n", "\\n")
    words = ["recipe=quickstart", "~stages.target.data", f"+stages.target.data={source}"]
    words += [f"stages.target.{key}={value}" for key, value in SIZES.items()]
    words += [f"stages.{stage}=null" for stage in LEFT_OUT]
    done = run("-m", "train", *words, cwd=folder, HF_HUB_OFFLINE="1")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    (artifact,) = (folder / "outputs" / "stages").glob("target-*/artifact")
    return artifact


def words() -> list[str]:
    """The one command."""
    sizes = [f"stages.{key}={value}" for key, value in SMALL.items()]
    forced = "stages.publish.force=true"  # beside so small a target no drafter is faster
    drafter = ["drafter.layers=1", "drafter.width=64"]
    publish = [f"stages.publish.repository={NAME}", "stages.publish.tag=v1", forced]
    return ["-m", "train", "recipe=ko_drafter", *drafter, *sizes, *publish]


@dataclass
class Done:
    """What the command left: its folder and output, the Hub, and the environment that it saw."""

    folder: Path
    said: str
    seconds: float
    hub: Hub
    environment: dict[str, str]

    def place(self, stage: str) -> Path:
        note = json.loads((self.folder / "outputs" / "ko_drafter.json").read_text())
        return Path(note[stage])


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Done]:
    model = stand_in(tmp_path_factory.mktemp("stand-in"))
    folder = tmp_path_factory.mktemp("ko-drafter")
    sets = {WEB: {"kor_Hang": {"train": web()}}, CHAT: {"default": {"train": talks()}}}
    with whole(CANARY, "me", {TARGET: model}, sets) as hub:
        there = {"HF_ENDPOINT": hub.address, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
        there |= {"HF_TOKEN": CANARY, "HF_HOME": str(folder / "home"), "HOME": str(folder)}
        begin = time.monotonic()
        ran = run(*words(), cwd=folder, **there)
        assert ran.returncode == 0, ran.stdout[-4000:] + ran.stderr[-4000:]
        yield Done(folder, ran.stdout + ran.stderr, time.monotonic() - begin, hub, there)


def test_one_commit_holds_what_publish_left(done: Done, capsys):
    there = done.hub.repositories[NAME]
    mine = contents(done.place("publish") / "artifact")
    assert len(there.commits) == 2  # the Hub's own first, and one
    assert there.private
    assert there.tags == {"v1": there.main}
    assert there.files("main") == mine | ATTRIBUTES
    note = json.loads((done.place("publish") / "published.json").read_text())
    assert note == {"repository": NAME, "commit": there.main}
    assert {"README.md", "drafter.json", "model.safetensors", "report.json"} <= mine.keys()
    with capsys.disabled():
        size = sum(map(len, mine.values())) / 2**20
        print(
            f"\nko_drafter, from nothing to the Hub: {done.seconds:.0f} s, {len(mine)} files, "
            f"{size:.1f} MiB, {len(done.hub.asked)} requests to the server of models"
        )


def test_it_was_made_from_what_the_recipe_names(done: Done):
    artifact = done.place("publish") / "artifact"
    known = json.loads((artifact / "provenance.json").read_text())
    model = done.hub.repositories[TARGET]
    assert known["target"] == {"name": TARGET, "revision": model.main}
    hubs = {
        data.get("hub") for stage in known["stages"].values() for data in stage["data"].values()
    }
    assert hubs == {WEB, CHAT}
    card = (artifact / "README.md").read_text(encoding="utf-8")
    assert f"base_model: {TARGET}" in card
    assert f'Pretrained(path="{TARGET}", revision="{model.main}")' in card
    assert f'published("{NAME}", target)' in card
    answers = "".join(p.read_text() for p in (done.place("generate") / "artifact").glob("*.jsonl"))
    assert len(answers.splitlines()) > 40


def test_it_is_fetched_anew_and_drafts_the_targets_own_answers(done: Done, tmp_path):
    prompts = [row["instruction"] for row in talks()[::1500]]
    home = {"HF_HOME": str(tmp_path / "home")}
    loaded = run("-c", LOADS, NAME, TARGET, *prompts, cwd=tmp_path, **done.environment | home)
    assert loaded.returncode == 0, loaded.stdout[-2000:] + loaded.stderr[-4000:]
    told = json.loads(loaded.stdout.splitlines()[-1])
    assert told["drafted"] == told["plain"]
    assert min(map(len, told["plain"])) > 4
    assert told["accepted"] > 0
    fetched = Path(told["folder"])
    assert fetched.is_relative_to(tmp_path)
    assert fetched.name == done.hub.repositories[NAME].main
    mine = contents(done.place("publish") / "artifact")
    got = contents(fetched)
    assert {"drafter.json", "model.safetensors", "tokenizer.json"} <= got.keys()
    assert all(mine[name] == content for name, content in got.items())
    assert CANARY not in loaded.stdout + loaded.stderr


def test_the_same_command_again_changes_nothing(done: Done):
    before, made = contents(done.folder / "outputs"), len(done.hub.repositories[NAME].commits)
    again = run(*words(), cwd=done.folder, **done.environment)
    assert again.returncode == 0, again.stderr[-3000:]
    assert len(re.findall(r"done before", again.stdout)) == 7
    assert contents(done.folder / "outputs") == before
    assert len(done.hub.repositories[NAME].commits) == made


def test_the_token_stands_nowhere(done: Done):
    assert CANARY not in done.said
    files = contents(done.folder)
    assert len(files) > 50
    assert not [name for name, content in files.items() if CANARY.encode() in content]
    published = done.hub.repositories[NAME].files("main")
    assert published
    assert not [name for name, content in published.items() if CANARY.encode() in content]

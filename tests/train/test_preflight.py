"""What is found out before anything starts, and what a person is told of it."""

import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from decoding.target import Shape
from train import machine, preflight
from train.estimate import estimate
from train.launch import Launch
from train.passes import Estimate
from train.plan import Planned
from train.preflight import Refused, disk, findings, hub, memory, tracking
from train.scale import USABLE, Hardware
from train.show import too_large

GIB = 2**30


def stage(name: str, **config: Any) -> Planned:
    return Planned(name, config, {}, "0", Path("nowhere"))


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with 8 GiB of memory left and 10 GiB of disk."""
    monkeypatch.setattr(preflight, "memory_free", lambda: 8 * GIB)
    usage = SimpleNamespace(free=10 * GIB)
    monkeypatch.setattr(preflight.shutil, "disk_usage", lambda place: usage)
    for name in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE"):
        monkeypatch.delenv(name, raising=False)


KINDS = {
    "pretrain": "train.distill.Distill",
    "finetune": "train.distill.Distill",
    "generate": "data.generate.Generate",
    "bench": "eval.bench.Bench",
    "cache": "train.cache.CacheStates",
    "tune_tree": "eval.tune_tree.TuneTree",
    "skip_layers": "eval.skip_layers.SkipLayers",
    "publish": "train.publish.Publish",
}


def stages(found: dict[str, Estimate]) -> list[Planned]:
    return [stage(name, _target_=KINDS[name]) for name in found]


def test_disk_of_all_stages_and_a_checkpoint_beside_two(free, tmp_path: Path):
    found = {
        "pretrain": Estimate("", disk=3 * GIB, aside=2 * GIB),
        "finetune": Estimate("", disk=4 * GIB, aside=1 * GIB),
        "publish": Estimate(""),
    }
    (line,) = disk(tmp_path / "not there yet", stages(found), found)
    assert line == "disk: 9.0 GiB needed (2.0 GiB of it for a moment), 10.0 GiB free"
    found["cache"] = Estimate("", disk=GIB)
    with pytest.raises(
        OSError, match=r"most is for stage finetune \(4\.0 GiB\): free some, or set"
    ):
        disk(tmp_path, stages(found), found)
    assert disk(tmp_path, [], {}) == []


def test_disk_that_may_suffice_where_answers_are_short_is_a_warning(free, tmp_path: Path):
    """How long they will be nobody knows, so that a start is not refused for it."""
    found = {"generate": Estimate("", disk=60 * GIB), "finetune": Estimate("", disk=2 * GIB)}
    (line,) = disk(tmp_path, stages(found), found)
    assert line.startswith("warning: disk: 62.0 GiB needed ")
    assert "10.0 GiB free" in line
    assert line.endswith("output_dir to another disk. It may suffice, if answers are short")
    found["finetune"].disk = 3 * GIB  # with an eighth of 60 GiB more than there is
    with pytest.raises(OSError, match=r"63\.0 GiB needed .* most is for stage generate"):
        disk(tmp_path, stages(found), found)


def test_memory_that_is_certain_on_every_rank_here(free):
    found = {
        "finetune": Estimate("", memory=3 * GIB, floor=3 * GIB),
        "generate": Estimate("", memory=4 * GIB, floor=GIB),
    }
    two = Launch(how="torchrun", ranks=2)
    (line,) = memory(stages(found), found, two)
    assert "8.0 GiB free for 2 rank(s) here" in line
    assert "stage generate, about 4.0 GiB each" in line
    with pytest.raises(
        OSError, match=r"stage finetune needs 3\.0 GiB on each .*raise deepspeed\.zero_stage"
    ):
        memory(stages(found), found, Launch(how="torchrun", ranks=3))
    (line,) = memory(stages(found), found, Launch(how="torchrun", ranks=4, nodes=2))
    assert "other machines" in line


def test_each_stage_that_may_not_fit_is_warned_of_with_what_to_change(free):
    kinds = [name for name in KINDS if name != "publish"]
    found = {name: Estimate("", memory=9 * GIB, floor=GIB) for name in kinds}
    found |= {"pretrain": Estimate("", memory=2 * GIB), "publish": Estimate("")}
    _, *warnings = memory(stages(found), found, Launch())
    assert [line.split()[2] for line in warnings] == [k for k in kinds if k != "pretrain"]
    said = "needs about 9.0 GiB of memory on each of 1 rank(s) here, and there are 8.0 GiB: "
    assert all(said in line for line in warnings)
    keys = ["schedule.micro_batch", "batch_size", "smaller target", "batch_size"]
    assert all(key in line for key, line in zip(keys, warnings, strict=False))
    assert len(memory(stages(found), found, Launch(how="torchrun", ranks=5))[1:]) == len(kinds)


def test_what_named_gpus_cannot_hold_is_warned_of_in_every_stage():
    """Without what a process on a CPU holds besides, and with the target once, or divided."""
    shape = Shape(1000, 512, 8, 8, 8, 1536, 4096)
    weights = 2 * shape.parameters()
    target: dict[str, Any] = {"_target_": "decoding.pretrained.Pretrained", "path": "a/b"}
    source = {"_target_": "data.sources.Local", "files": ["x.jsonl"], "prompt": "{x}"}
    made = {"target": target, "prompts": source, "temperatures": [0.0]}
    generate = stage("generate", _target_=KINDS["generate"], **made)

    def said(memory: float, ranks: int = 1) -> list[str]:
        gpu = Hardware(name="toy", memory=memory / USABLE, flops=1, bandwidth=1, link=1, network=1)
        found = estimate(generate, shape, ranks, rehearsed=False)
        return too_large(gpu, [generate], shape, ranks, {"generate": found})

    room = 32 * (512 + 1024) * 8 * 2 * 512 * 2  # keys and values of a batch of answers
    assert said(weights + room + 1) == []
    (line,) = said(weights + room - 1)
    assert line.startswith("warning: stage generate needs about ")
    assert "on each toy, and there are " in line
    assert "lower its batch_size" in line
    target["parallel"] = "tensor"
    assert said(weights / 2 + room + 1, ranks=2) == []
    assert said(weights / 2 + room - 1, ranks=2)


def test_what_control_groups_leave(tmp_path: Path):
    def write(name: str, text: str) -> None:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)

    write("proc/meminfo", "MemTotal: 9000 kB\nMemAvailable:  8000 kB\n")
    assert machine.memory_free(tmp_path) == 8000 * 1024
    write("proc/self/cgroup", "0::/job/step\n")
    write("sys/fs/cgroup/job/memory.max", "5000000\n")
    write("sys/fs/cgroup/job/memory.current", "3000000\n")
    write("sys/fs/cgroup/job/memory.stat", "anon 1\ninactive_file 1000000\n")
    write("sys/fs/cgroup/job/step/memory.max", "max\n")
    assert machine.memory_free(tmp_path) == 5_000_000 - 2_000_000  # files can be given up
    write("proc/self/cgroup", "5:memory:/old\n4:cpu:/job\n")
    write("sys/fs/cgroup/memory/old/memory.limit_in_bytes", "700000\n")
    write("sys/fs/cgroup/memory/old/memory.usage_in_bytes", "900000\n")
    write("sys/fs/cgroup/memory/old/memory.stat", "total_inactive_file 0\n")
    assert machine.memory_free(tmp_path) == 0


def test_this_machine_has_some_memory():
    assert 0 < machine.memory_free() < 2**50


def test_wandb_online_needs_a_key(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    def asked(mode: str | None) -> list[str]:
        return tracking([stage("x", tracker={"_target_": "train.track.Wandb", "mode": mode})])

    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert asked(None) == ["tracker: wandb, offline"]
    with pytest.raises(ValueError, match=r"wandb has no key: set WANDB_API_KEY, .*mode=offline"):
        asked("online")
    netrc = tmp_path / ".netrc"
    netrc.write_text("machine api.wandb.ai login user password not-a-real-one\n")
    netrc.chmod(0o600)
    assert asked("online") == ["tracker: wandb, online"]
    netrc.unlink()
    monkeypatch.setenv("WANDB_API_KEY", "not-a-real-one")
    assert asked(None) == ["tracker: wandb, online"]
    assert tracking([stage("x", tracker={"_target_": "train.track.Jsonl"}), stage("y")]) == []


TARGET = {"_target_": "decoding.pretrained.Pretrained", "path": "some-one/some-model"}
DATA = {"_target_": "data.sources.Hub", "path": "some-one/some-texts", "text": "{text}"}


def refused(kind: type, said: str) -> Any:
    """An error of the Hub as huggingface_hub raises it."""
    import httpx

    request = httpx.Request("GET", "http://hub")
    return kind(said, response=httpx.Response(403, request=request))


def test_what_the_hub_refuses_is_known_before_the_work(monkeypatch: pytest.MonkeyPatch):
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    asked = []

    def auth_check(name: str, *, repo_type: str) -> None:
        asked.append((name, repo_type))
        if name == wrong:
            raise refused(error, "no")

    monkeypatch.setattr("huggingface_hub.auth_check", auth_check)
    reading = stage("pretrain", _target_="train.distill.Distill", target=TARGET, data=DATA)
    wrong, error = "", GatedRepoError
    assert hub([reading]) == [
        "Hub: some-one/some-model can be read",
        "Hub: some-one/some-texts can be read",
    ]
    assert sorted(asked) == [("some-one/some-model", "model"), ("some-one/some-texts", "dataset")]
    wrong = "some-one/some-model"
    with pytest.raises(ValueError, match=r"does not give some-one/some-model .* ask for access"):
        hub([reading])
    wrong, error = "some-one/some-texts", RepositoryNotFoundError
    with pytest.raises(ValueError, match=r"has no dataset some-one/some-texts, or it is private"):
        hub([reading])


def test_a_folder_and_what_is_in_the_cache_ask_nobody(monkeypatch, tmp_path: Path):
    monkeypatch.setattr("huggingface_hub.auth_check", lambda *a, **k: pytest.fail("asked"))
    local = stage("a", _target_="data.generate.Generate", target=TARGET | {"path": str(tmp_path)})
    assert hub([local]) == []
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *a: "there")
    assert hub([stage("b", _target_="data.generate.Generate", target=TARGET)]) == []


def test_a_hub_that_is_away_or_slow_stops_nothing(monkeypatch: pytest.MonkeyPatch):
    reading = stage("pretrain", _target_="train.distill.Distill", target=TARGET)

    def away(*a: Any, **k: Any) -> None:
        raise ConnectionError("no network")

    monkeypatch.setattr("huggingface_hub.auth_check", away)
    assert hub([reading]) == ["Hub: not asked (ConnectionError)"]
    answers = threading.Event()
    monkeypatch.setattr("huggingface_hub.auth_check", lambda *a, **k: answers.wait(60))
    monkeypatch.setattr(preflight, "PATIENCE", 0.1)
    assert hub([reading]) == ["Hub: no answer"], "and not what comes after a minute"
    answers.set()


def test_publishing_is_rehearsed_where_a_repository_is_named(monkeypatch: pytest.MonkeyPatch):
    def rehearsed(name: str | None) -> list[str]:
        asked = {"repository": name, "language": ["ko"], "licence": "apache-2.0"}
        target = {"_target_": "decoding.pretrained.Pretrained", "path": None}
        return hub([stage("publish", _target_="train.publish.Publish", target=target, **asked)])

    def check(repository: str, *, private: bool) -> str:
        if repository == "them/theirs":
            raise ValueError("the token here is of me")
        return f"would make {repository}, private {private}"

    monkeypatch.setattr("train.publishing.hub.check", check)
    assert rehearsed(None) == []
    assert rehearsed("me/mine") == ["would make me/mine, private True"]
    with pytest.raises(Refused, match="the token here is of me"):
        rehearsed("them/theirs")


def test_a_plan_says_what_would_stop_and_goes_on(free, tmp_path: Path, monkeypatch):
    found = {"x": Estimate("", disk=20 * GIB, floor=9 * GIB, memory=9 * GIB)}
    monkeypatch.setattr(preflight, "hub", lambda stages: (_ for _ in ()).throw(Refused("gated")))
    mine = [stage("x", _target_=KINDS["finetune"])]
    lines = list(findings(mine, Launch(), tmp_path, found))
    stops = [line for line in lines if line.startswith("would not start here: ")]
    assert ["20.0 GiB needed" in stops[0], "one step" in stops[1], "gated" in stops[2]] == [
        True
    ] * 3
    assert lines[0].startswith("Python 3")

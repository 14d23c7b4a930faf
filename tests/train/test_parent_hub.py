"""Training on from a drafter of the Hub: published, fetched, verified and taken over, from a server
on localhost."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from decoding.pretrained import Pretrained
from drafters.base import Blueprint, load, save
from drafters.medusa import Medusa
from tests.local_server import hub_at
from tests.tiny import write_target, write_texts
from tests.train.upload_server import Hub, publishing
from train.parent import Parent
from train.publishing.hub import upload

TOKEN, NAME = "hf_" + "t0ken" * 6, "me/ko-drafter"
HEADS = {"heads": 2}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    with publishing(TOKEN, "me") as made:
        hub_at(made.address, TOKEN, tmp_path / "cache", monkeypatch)
        yield made


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory) -> Pretrained:
    folder = tmp_path_factory.mktemp("parent")
    return Pretrained(path=write_target(folder / "target", write_texts(folder)), dtype="float32")


def published(spec: Pretrained, folder: Path, seed: int, tag: str) -> tuple[Medusa, str]:
    """A random drafter, and the commit that holds it."""
    torch.manual_seed(seed)
    drafter = Medusa(spec.shape_of(), **HEADS)
    with torch.no_grad():
        for parameter in drafter.parameters():
            parameter.add_(torch.randn_like(parameter))
    save(drafter, folder, HEADS)
    spec.tokenizer().save_pretrained(folder)
    return drafter, upload(folder, NAME, tag=tag)


def parent(spec: Pretrained, **more: Any) -> Parent:
    return Parent(target=spec, drafter=Blueprint(Medusa, HEADS), checkpoint=NAME, **more)


def test_the_revision_that_is_named_is_taken_over_whole(hub: Hub, spec: Pretrained, tmp_path: Path):
    """With the commit that it was, though main has moved on; also where requests fail."""
    old, commit = published(spec, tmp_path / "old", 1, "v1")
    new, newest = published(spec, tmp_path / "new", 2, "v2")
    for number, (revision, drafter, due) in enumerate(
        [("v1", old, commit), (None, new, newest), (commit, old, commit)]
    ):
        hub.arm(first=number, times=1, how="error")
        out = tmp_path / f"out-{number}"
        made = parent(spec, revision=revision)
        made.check({})
        made.run(out)
        note = json.loads((out / "artifact" / "parent.json").read_text())
        assert (note["checkpoint"], note["revision"]) == (NAME, due)
        found = load(out / "artifact", spec.shape_of()).state_dict()
        assert all(torch.equal(found[name], t) for name, t in drafter.state_dict().items())


def test_what_is_no_parent_leaves_nothing(hub: Hub, spec: Pretrained, tmp_path: Path):
    _, commit = published(spec, tmp_path / "old", 1, "v1")
    with pytest.raises(ValueError, match="no such repository, revision"):
        parent(spec, revision="v9").run(tmp_path / "out")
    hub.repositories[NAME].commits[commit]["model.safetensors"] += b"x"
    with pytest.raises((ValueError, ConnectionError), match=r"model\.safetensors"):
        parent(spec).run(tmp_path / "out")
    assert not (tmp_path / "out" / "artifact").exists()

"""Which commit of the Hub a target was loaded from, as the cache's own files say."""

from pathlib import Path

import pytest
import torch

from decoding.pretrained import Pretrained, contents_hash
from tests.toys import tiny_model

OLD, NEW = "0123456789" * 4, "abcdef0123" * 4


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A Hub's cache with two commits of a target: the tag v1, and main; nothing else is reached."""
    place = tmp_path / "hub" / "models--me--target"
    (place / "refs").mkdir(parents=True)
    for number, (ref, commit) in enumerate({"v1": OLD, "main": NEW}.items()):
        (place / "refs" / ref).write_text(commit)
        model = tiny_model(width=64, layers=1, seed=number, dtype=torch.float32)
        model.save_pretrained(place / "snapshots" / commit)
    for key, value in {"HF_HUB_CACHE": str(place.parent), "HF_HUB_OFFLINE": True}.items():
        monkeypatch.setattr(f"huggingface_hub.constants.{key}", value)
    return place


@pytest.mark.parametrize(
    ("asked", "commit"),
    [(None, NEW), ("main", NEW), ("v1", OLD), (OLD, OLD)],
    ids=["none", "branch", "tag", "commit"],
)
def test_the_commit_is_the_one_whose_files_were_loaded(cache: Path, asked: str, commit: str):
    spec = Pretrained(path="me/target", revision=asked, dtype="float32")
    target = spec.load()
    seed = [OLD, NEW].index(commit)
    due = tiny_model(width=64, layers=1, seed=seed, dtype=torch.float32)
    assert target.revision == commit
    assert spec.borrow().revision == commit
    ids = torch.tensor([5])
    assert torch.equal(target.embed(ids), due.get_input_embeddings()(ids))


def test_of_a_folder_it_is_a_hash_of_its_files(cache: Path):
    folder = cache / "snapshots" / OLD
    here = Pretrained(path=str(folder), dtype="float32")
    made = Pretrained(path="me/target", dtype="float32")  # with a folder of a stage in its place
    assert here.load().revision == made.load(folder).revision == contents_hash(folder)
    assert here.load().revision != Pretrained(path=str(cache / "snapshots" / NEW)).load().revision

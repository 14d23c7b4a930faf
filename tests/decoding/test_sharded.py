"""A target sharded over two ranks answers as it does whole.

Shapes: B batch, D width, V vocabulary.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import heads_for, random_model

from decoding import ranks as group
from decoding.loop import decode
from decoding.pretrained import Pretrained
from decoding.ranks import Ranks
from decoding.sampling import Sampling
from decoding.sharded import Sharded, agreed, refuse_what_cannot_be_shared
from decoding.target import Target
from drafters.lm import LM
from drafters.trees import tree_of
from tests import forked

VOCAB = 49  # of which two ranks cannot have half each
MODELS = ("Llama", "GPTNeoX")
FAMILIES = ("medusa", "clover2", "eagle3")
PROMPTS = [[5], [1, 2, 3, 4, 5, 6, 7]]
LONG = 12  # tokens of an answer
TEMPERATURES = (0.0, 1.0)


def drafters(whole: Target) -> dict[str, Any]:
    """One of each kind, the same on all ranks."""
    with torch.random.fork_rng():
        torch.manual_seed(4)
        made = {
            "nothing": None,
            "lm": LM(whole.shape, layers=1, width=64, draft_length=3).double().eval(),
            **{family: heads_for(family, whole) for family in FAMILIES},
        }
    made["eagle3"].tree = tree_of({"kind": "dynamic", "top_k": 3, "depth": 3, "nodes": 8})
    return made


def answers(target: Target, drafter: Any) -> list[Any]:
    """Ids, drafted and accepted tokens of each prompt at each temperature."""
    found = []
    for temperature in TEMPERATURES:
        sampling = Sampling(temperature=temperature, seed=2)
        done = decode(target, drafter, PROMPTS, sampling=sampling, max_new_tokens=LONG)
        found.append([[a.ids, a.drafted, a.accepted] for a in done.answers])
    return found


def held(target: Target) -> int:
    """Bytes of parameters that this process holds."""
    every = {id(p): p for p in target.model.parameters()}.values()
    own = [p.to_local() if hasattr(p, "to_local") else p for p in every]
    return sum(p.numel() * p.element_size() for p in own)


def parts(whole: Target, sharded: Target) -> dict[str, float]:
    """How far from the whole target's are the pieces that heads borrow."""
    ids = torch.tensor([[1, VOCAB - 1, 25], [24, 0, 7]])
    hidden_BD = torch.randn(4, whole.shape.hidden_size, generator=torch.Generator().manual_seed(0))
    seen = torch.arange(12)[None]
    doc = torch.tensor([[0] * 7 + [1] * 5])
    pairs = {
        "embed": (whole.embed(ids), sharded.embed(ids)),
        "head_rows": (whole.head_rows(ids), sharded.head_rows(ids)),
        "logits": (whole.logits(hidden_BD), sharded.logits(hidden_BD)),
        "states": tuple(t(seen, doc_BT=doc).hidden_BTD for t in (whole, sharded)),
        "taps": tuple(t(seen, taps=(0, 2)).taps_BTLD for t in (whole, sharded)),
    }
    return {name: float((a - b).abs().max()) for name, (a, b) in pairs.items()}


def out_of_step(sharded: Target, rank: int) -> str:
    try:
        sharded(torch.tensor([[1, 2 + rank, 3]]))
    except RuntimeError as error:
        return str(error)
    return ""


def job(folder: Path) -> None:
    """What one rank finds, into rank-N.json."""
    rank, world = group.join()
    found: dict[str, Any] = {"models": {}}
    for name in MODELS:
        path = str(folder / name)
        whole = Pretrained(path=path).load(dtype="float64")
        sharded = Pretrained(path=path, parallel="tensor").load(dtype="float64")
        assert isinstance(sharded, Sharded)
        found["models"][name] = {
            "held": [held(sharded), held(whole)],
            "parts": parts(whole, sharded),
            "answers": [answers(sharded, None), answers(whole, None)],
        }
        if name == "Llama":
            every = drafters(whole)
            found["drafted"] = {
                who: [answers(sharded, each), answers(whole, each)] for who, each in every.items()
            }
            found["twin"] = answers(sharded, LM.around(sharded.model, draft_length=3))
            found["agreed"] = [agreed(sharded, rank), agreed(whole, rank)]
            found["out of step"] = out_of_step(sharded, rank)
    shares = Ranks(rank, world)
    found["decided"] = shares.decide(lambda: ["made by", rank])
    found["gathered"] = shares.gather([n for n in range(5) if shares.has(n)])
    (folder / f"rank-{rank}.json").write_text(json.dumps(found), encoding="utf-8")
    shares.barrier()


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sharded")
    for name in MODELS:
        random_model(name, vocab_size=VOCAB).save_pretrained(folder / name)
    return folder


@pytest.fixture(scope="module")
def found(place: Path) -> list[dict[str, Any]]:
    """What each of two ranks found."""
    forked.run(job, place, folder=place)
    return [json.loads((place / f"rank-{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("name", MODELS)
def test_no_rank_holds_the_whole_target(found, name: str):
    for rank in found:
        mine, whole = rank["models"][name]["held"]
        assert mine < 0.56 * whole, "half of it, and the norms (GPT-NeoX: its embedding too)"
    assert sum(rank["models"][name]["held"][0] for rank in found) >= whole


@pytest.mark.parametrize("name", MODELS)
def test_what_heads_borrow_is_the_whole_targets(found, name: str):
    for rank in found:
        assert max(rank["models"][name]["parts"].values()) < 1e-12
        assert rank["models"][name]["parts"]["head_rows"] == 0


@pytest.mark.parametrize("name", MODELS)
def test_plain_answers_are_those_of_one_rank(found, name: str):
    for rank in found:
        sharded, whole = rank["models"][name]["answers"]
        assert sharded == whole
    greedy, sampled = whole
    assert greedy != sampled
    assert all(len(ids) == LONG and len(set(ids)) > 2 for ids, *_ in sampled)


@pytest.mark.parametrize("who", ["lm", *FAMILIES])
def test_drafted_answers_are_those_of_one_rank(found, who: str):
    """The same ids, and the same tokens drafted and accepted for them, on both ranks."""
    for rank in found:
        sharded, whole = rank["drafted"][who]
        assert sharded == whole
    plain, _ = found[0]["drafted"]["nothing"]
    assert [ids for ids, *_ in whole[0]] == [ids for ids, *_ in plain[0]]
    assert any(sum(drafted) for _, drafted, _ in whole[0])


def test_the_sharded_target_accepts_all_of_its_own_drafts(found):
    for rank in found:
        for answer in [answer for at in rank["twin"] for answer in at]:
            _, drafted, accepted = answer
            assert accepted == drafted
            assert set(drafted) == {3}


def test_ranks_out_of_step_are_told_so(found):
    for rank in found:
        assert rank["out of step"].startswith("the ranks of a sharded target are out of step")


def test_ranks_take_what_the_first_decides(found):
    assert [rank["agreed"] for rank in found] == [[0, 0], [0, 1]]
    assert [rank["decided"] for rank in found] == [["made by", 0]] * 2
    assert [rank["gathered"] for rank in found] == [[0, 2, 4, 1, 3]] * 2


def test_what_cannot_be_sharded_is_refused_before_loading(place: Path, monkeypatch):
    with pytest.raises(ValueError, match=r"target\.parallel is 'pipeline'; it must be null"):
        Pretrained(path=str(place / "Llama"), parallel="pipeline")  # type: ignore[arg-type]
    monkeypatch.setattr("decoding.pretrained._model", lambda *_, **__: pytest.fail("loaded"))
    for kind in ("tensor", "zero3"):
        alone = Pretrained(path=str(place / "Llama"), parallel=kind)
        with pytest.raises(ValueError, match=rf"{kind}, which .*this stage has one; set launch"):
            alone.load()


def test_ranks_that_cannot_share_the_heads_are_refused():
    config = random_model("Llama").config  # 4 heads, 2 of them key/value heads
    refuse_what_cannot_be_shared(config, 2, "it")
    said = "it has 4 attention heads and 2 key/value heads, which 3 ranks cannot share evenly; "
    with pytest.raises(ValueError, match=said + r"set launch\.ranks to 2"):
        refuse_what_cannot_be_shared(config, 3, "it")
    config.num_key_value_heads = 1
    with pytest.raises(ValueError, match="cannot share evenly; set target"):
        refuse_what_cannot_be_shared(config, 2, "it")
    config.base_model_tp_plan = None
    with pytest.raises(ValueError, match="no tensor-parallel plan for models of type llama"):
        refuse_what_cannot_be_shared(config, 2, "it")


def test_each_rank_needs_a_gpu_of_its_own(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "2")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ValueError, match=r"there are 2; set launch\.ranks to 2 or fewer"):
        group.join()


def test_a_single_rank_needs_no_group(monkeypatch):
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda *a, **k: pytest.fail("one"))
    alone = Ranks.here()
    assert (alone.rank, alone.world, alone.first) == (0, 1, True)
    assert [alone.has(n) for n in range(3)] == [True] * 3
    assert alone.decide(lambda: {"a": 0.1}) == {"a": 0.1}
    assert alone.gather([1, 2]) == [1, 2]

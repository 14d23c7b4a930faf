"""Decode-validation: the number that training watches is the decode loop's."""

import json
from pathlib import Path

import pytest
import torch
from toys import tiny_target

from decoding.loop import decode
from decoding.sampling import Sampling
from drafters.lm import LM
from train.decoded import NEW_TOKENS, Decoded, keep_prompts, last_quarter, told


def test_prompts_are_kept_once_and_only_where_they_fit(tmp_path: Path):
    file = tmp_path / "prompts.json"
    rows = [{"prompt_ids": [1, 2]}, {"prompt_ids": [1, 2]}, {"prompt_ids": [3] * 9}, {"text": "x"}]
    keep_prompts(file, rows, longest=8)
    assert json.loads(file.read_text()) == [[1, 2]]
    keep_prompts(file, [{"prompt_ids": [i]} for i in range(99)], longest=8)
    assert json.loads(file.read_text()) == [[i] for i in range(64)]  # in the order of the data


def test_tau_is_that_of_decoding(tmp_path: Path):
    target, prompts = tiny_target(), [[3, 4, 5], [9]]
    (tmp_path / "prompts.json").write_text(json.dumps(prompts))
    look = Decoded(target, tmp_path / "prompts.json")
    twin = LM.around(target.model, draft_length=4)
    torch.manual_seed(0)
    stranger = LM(target.shape, layers=1, width=64).double()
    # the target as its own drafter: five tokens a call, the last call cut by the limit
    assert look(twin) == {"validation_tau": pytest.approx(NEW_TOKENS / -(-NEW_TOKENS // 5))}
    done = decode(target, stranger, prompts, sampling=Sampling(), max_new_tokens=NEW_TOKENS)
    calls = sum(len(answer.accepted) for answer in done.answers)
    assert look(stranger) == {"validation_tau": done.tokens / calls}
    assert Decoded(target, tmp_path / "none.json")(twin) == {}


def test_the_last_quarter(tmp_path: Path):
    file = tmp_path / "metrics.jsonl"

    def gain(*taus: tuple[int, float]) -> float | None:
        lines = [{"step": step, "loss": 1.0} for step in range(1, 101)]
        lines += [{"step": step, "validation_tau": tau} for step, tau in taus]
        file.write_text("".join(json.dumps(line) + "\n" for line in lines))
        return last_quarter(file, 100)

    assert gain((50, 1.0), (74, 2.0), (88, 2.4), (100, 2.1)) == pytest.approx(0.05)
    assert gain((100, 2.1)) is None
    assert gain() is None


def test_who_still_learns_is_told_so():
    assert "raise schedule.tokens" in told(2.1, 0.05)
    assert "raise schedule.tokens" not in told(2.1, 0.01)
    assert told(2.1, None) == "decoded on held-out prompts: 2.10 tokens per target call"

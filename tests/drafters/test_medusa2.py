"""Medusa-2: the target changes with the heads, its own weights do not.

Shapes: B batch, T tokens.
"""

from pathlib import Path

import pytest
import torch
from contract import packed
from probes import scatter
from safetensors.torch import load_file
from toys import tiny_model, tiny_target

from decoding.adapter import Adapted
from decoding.loop import decode
from decoding.sampling import Sampling
from decoding.target import Target
from drafters.base import load, save
from drafters.medusa import Medusa
from eval.change import changed
from train.engine import ALONE, Engine, join
from train.objectives import CE, ForwardKL

LORA = {"rank": 4, "alpha": 8}
PROMPTS = [[3, 9, 4], [7, 1, 30, 22, 5]]


@pytest.fixture
def target() -> Target:
    return tiny_target()


def fresh(target: Target) -> Medusa:
    drafter = Medusa(target.shape, heads=3, target_lora=LORA).double()
    drafter.initialise(target, lambda: torch.empty(0))
    return drafter.double()


def trained(target: Target, steps: int = 6) -> Medusa:
    torch.manual_seed(0)
    drafter = fresh(target)
    learning, batch = drafter.learning(target), packed(40)
    optimiser = torch.optim.AdamW(drafter.parameters(), lr=1e-2)
    for _ in range(steps):
        optimiser.zero_grad()
        loss, _ = drafter(batch, learning, CE())
        loss.backward()
        optimiser.step()
    return drafter


def test_a_fresh_adapter_changes_nothing(target):
    drafter, batch = fresh(target), packed(40)
    due = target(batch.ids_BT, doc_BT=batch.doc_BT).hidden_BTD
    for changed_target in (drafter.learning(target), drafter.on(target)):
        assert isinstance(changed_target, Adapted)
        got = changed_target(batch.ids_BT, doc_BT=batch.doc_BT).hidden_BTD
        assert torch.equal(got, due)
    _, sums = drafter(batch, drafter.learning(target), ForwardKL())
    assert float(sums["alpha@target"]) == pytest.approx(float(sums["tokens@target"]))


def test_all_of_the_drafter_learns_and_nothing_of_the_target(target):
    before = {name: p.clone() for name, p in target.model.state_dict().items()}
    drafter = trained(target)
    assert all(p.grad is not None and p.grad.any() for p in drafter.parameters())
    after = target.model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert not any(p.requires_grad or p.grad is not None for p in target.parameters())


def test_the_loss_is_the_targets_own_and_a_share_of_the_heads(target):
    drafter, batch = trained(target), packed(40)
    learning = drafter.learning(target)
    for objective in (CE(), ForwardKL()):
        drafter.heads_weight = 0.0
        alone, sums = drafter(batch, learning, objective)
        drafter.heads_weight = 0.5
        both, _ = drafter(batch, learning, objective)
        drafter.heads_weight = 1.0
        whole, _ = drafter(batch, learning, objective)
        assert (both - alone).item() == pytest.approx((whole - both).item())
        if isinstance(objective, CE):
            assert alone.item() == pytest.approx(float(sums["ce@target"]), rel=1e-5)
        else:  # KL to the original, which is off the adapted law by now
            assert float(sums["alpha@target"]) < 0.99 * float(sums["tokens@target"])


def test_heads_learn_the_data_and_weigh_decay_from_the_first_on(target):
    """heads_weight sum_k 0.8^k CE_k, k from 1, also where the target's own loss is a KL; any
    function may judge."""
    drafter, batch = trained(target), packed(40)
    learning = drafter.learning(target)

    def judge(predictions, target):
        return CE()(predictions, target)

    judge.needs_target = False
    for objective in (CE(), ForwardKL(), judge):
        drafter.heads_weight = 0.0
        own, _ = drafter(batch, learning, objective)
        drafter.heads_weight = 0.5
        loss, sums = drafter(batch, learning, objective)
        due = sum(0.8**k * float(sums[key]) for k, key in enumerate(("ce", "ce@2", "ce@3"), 1))
        assert (loss - own).item() == pytest.approx(0.5 * due, rel=1e-4)


def test_medusa_1_may_start_it_and_is_not_one(target, tmp_path: Path):
    drafter = fresh(target)
    before = {k: v.clone() for k, v in drafter.adapter.state_dict().items()}
    heads = scatter(Medusa(target.shape, heads=3))
    save(heads, tmp_path, {"heads": 3})
    drafter.read(tmp_path)
    state = drafter.state_dict()
    assert state.keys() == heads.state_dict().keys() | {f"adapter.{k}" for k in before}
    assert all(torch.equal(state[k], v) for k, v in heads.state_dict().items())
    assert all(torch.equal(state[f"adapter.{k}"], v) for k, v in before.items())
    with pytest.raises(ValueError, match="holds heads of Medusa-1, without matrices"):
        Medusa(target.shape, heads=3, target_lora=LORA).read(tmp_path)


@pytest.mark.parametrize("zero_stage", [1, 2])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_targets_matrices_learn_at_a_quarter_of_the_rate(monkeypatch, dtype, zero_stage):
    """AdamW's first step moves a weight by the rate, whatever its gradient."""
    for name, value in ALONE.items():
        monkeypatch.setenv(name, value)  # what join() sets goes with the test
    join()
    target = tiny_target(dtype=torch.float32)
    drafter = fresh(target).float()
    for matrix in drafter.adapter.b.values():  # else the others have no gradient yet
        torch.nn.init.normal_(matrix, std=0.02)
    engine = Engine(
        drafter, dtype=dtype, zero_stage=zero_stage, micro_batch=2, accumulation=1, clip=1.0,
        betas=(0.9, 0.99), weight_decay=0.0,
    )  # fmt: skip
    before = engine.state()
    loss, _ = engine(packed(40), drafter.learning(target), CE())
    engine.backward(loss)
    engine.step(1e-2)
    after = engine.state()
    for name, _ in engine.trained:
        moved = float((after[name] - before[name]).abs().max())
        assert moved == pytest.approx(0.25e-2 if name.startswith("adapter.") else 1e-2, rel=1e-2)


def test_answers_are_the_changed_targets(target):
    drafter = trained(target)
    served = drafter.on(target)

    def answers(model: Target, who: Medusa | None) -> list[list[int]]:
        done = decode(model, who, PROMPTS, sampling=Sampling(), max_new_tokens=24)
        return [answer.ids for answer in done.answers]

    assert answers(served, drafter) == answers(served, None)
    assert answers(served, None) != answers(target, None)


def test_what_is_saved_is_read_here_and_by_peft(target, tmp_path: Path):
    from peft import PeftModel

    drafter = trained(target)
    save(drafter, tmp_path, {"heads": 3, "target_lora": LORA})
    again = load(tmp_path, target.shape)
    state = again.state_dict()
    assert all(torch.equal(state[name], value) for name, value in drafter.state_dict().items())
    ids_BT = packed(40).ids_BT
    served = drafter.on(target)
    due = served.logits(served(ids_BT).hidden_BTD)
    theirs = PeftModel.from_pretrained(tiny_model(), tmp_path / "target_adapter")
    torch.testing.assert_close(theirs(ids_BT).logits, due)
    assert len(load_file(tmp_path / "target_adapter" / "adapter_model.safetensors")) == 2 * 14


def test_the_change_is_told_in_numbers(target):
    nothing = changed(target, fresh(target).on(target), PROMPTS, 16, seed=0)
    was = nothing["perplexity"]
    assert was["original"] == pytest.approx(was["adapted"])
    assert (nothing["greedy_agreement"], nothing["same_answers"]) == (1.0, 2)
    much = changed(target, trained(target).on(target), PROMPTS, 16, seed=0)
    assert much["perplexity"]["original"] == pytest.approx(was["original"])
    assert much["perplexity"]["adapted"] > 1.05 * was["original"]
    assert much["greedy_agreement"] < 1
    assert much["same_answers"] < 2

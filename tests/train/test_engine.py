"""The engine: ZeRO 0 to 3, fp32 and bf16, one rank and two, against a plain loop and each other.

Shapes: B rows, F features.
"""

import copy
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from toys import tiny_target

from drafters.base import load, save
from drafters.lm import LM
from drafters.medusa import Medusa
from tests.drafters.contract import TRAINED, arguments, build, packed
from tests.train import zero
from tests.train.zero import CASES, CLIP, DECAY, ON_TWO, Case, Found, Toy
from train.engine import ALONE, join
from train.objectives import CE, ForwardKL

NEAR = 1e-6  # of the largest value, fp32
RUN = [*(("one", case) for case in CASES), *(("two", case) for case in ON_TWO)]
Runs = dict[str, dict[str, Found]]


@pytest.fixture(scope="module", autouse=True)
def _alone() -> Iterator[None]:
    """What join() sets goes with the module."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in ALONE.items():
            patch.setenv(name, value)
        join()
        yield


@pytest.fixture(scope="module")
def one() -> Runs:
    """Every case on this rank alone."""
    return {str(case): dict(zero.course(case)) for case in CASES}


@pytest.fixture(scope="module")
def one_family() -> Runs:
    return {name: {str(stage): zero.family(name, stage) for stage in (1, 3)} for name in TRAINED}


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> tuple[Found, Found]:
    """What the two ranks of one job found."""
    folder = tmp_path_factory.mktemp("two")
    clean = {k: v for k, v in os.environ.items() if k not in ALONE}
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
         zero.__file__, str(folder)],
        env=clean | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"},
        capture_output=True,
        text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return load_file(folder / "rank-0.safetensors"), load_file(folder / "rank-1.safetensors")


@pytest.fixture(scope="module")
def two(both: tuple[Found, Found]) -> Runs:
    """Every case on two ranks."""
    runs: Runs = {}
    for key, value in both[0].items():
        case, at, *rest = key.split("/")
        runs.setdefault(case, {}).setdefault(at, {})["/".join(rest)] = value
    return runs


@pytest.fixture(scope="module")
def by_hand() -> Found:
    """Six steps of a plain torch program: masters, moments and losses."""
    toy = Toy()
    matrices, vectors = [toy.first.weight, toy.head.weight], [toy.first.bias]
    groups = [{"params": matrices, "weight_decay": DECAY}, {"params": vectors, "weight_decay": 0.0}]
    adamw = torch.optim.AdamW(groups, lr=zero.RATE, betas=zero.BETAS)
    losses = []
    for step in range(6):
        adamw.zero_grad()
        loss = toy(*zero.batch(step))[0] / zero.ROWS
        loss.backward()
        nn.utils.clip_grad_norm_([*matrices, *vectors], CLIP)
        adamw.step()
        losses.append(loss.item())
    named = {n: p for n, p in toy.named_parameters() if p.requires_grad}
    found = {n: p.detach().clone() for n, p in named.items()}
    found |= {
        f"{key}/{n}": adamw.state[p][key]
        for n, p in named.items()
        for key in zero.engine.STATE_KEYS
    }
    return found | {"losses": torch.tensor(losses, dtype=torch.float64)}


def gap(a: Found, b: Found) -> float:
    """The largest difference of what both have, as a share of the largest value of its tensor."""
    shared = a.keys() & b.keys()
    assert len(shared) > 3
    return max(float((a[k] - b[k]).abs().max() / b[k].abs().max().clamp(min=1e-30)) for k in shared)


def same(a: Found, b: Found) -> bool:
    """Equal to the bit, name by name."""
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


# --- one law at every stage ----------------------------------------------------------------------


@pytest.mark.parametrize(("world", "case"), [r for r in RUN if r[1].dtype == "float32"], ids=str)
def test_every_stage_is_a_plain_torch_program(world: str, case: Case, by_hand, request):
    end = request.getfixturevalue(world)[str(case)]["end"]
    assert gap(end, by_hand) < NEAR
    assert by_hand.keys() <= end.keys()


@pytest.mark.parametrize(("world", "case"), [r for r in RUN if r[1].dtype == "bfloat16"], ids=str)
def test_bf16_is_close_at_every_stage(world: str, case: Case, by_hand, request):
    end = request.getfixturevalue(world)[str(case)]["end"]
    assert torch.allclose(end["losses"], by_hand["losses"], rtol=2e-2)
    for name in ("first.weight", "first.bias", "head.weight"):
        assert end[name].dtype == torch.float32
        assert end[f"weight/{name}"].dtype == torch.bfloat16
        assert torch.equal(end[name].bfloat16(), end[f"weight/{name}"])


def test_both_ranks_hold_the_same(both):
    assert same(*both)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_bf16_gradients_are_added_in_fp32(stage: int):
    """In bf16, 1 + 2^-9 is 1, however often it is added. Stage 1 rounds the whole sum once."""

    class Slope(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.zeros(4))

        def forward(self, slope: float) -> Tensor:
            return (self.w.float() * torch.tensor([slope, 0, 0, 0])).sum()

    made = Case("bfloat16", stage, 8).engine(Slope())
    for slope in [1.0] + [2.0**-9] * 7:
        made.backward(made(slope) * 8)
        made.step(0.0)
    assert made.gradient_norm() == pytest.approx(1 + 7 / 512, rel=2.0**-8)


# --- saves ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("world", "case"), RUN, ids=str)
def test_resumed_equals_straight_to_the_bit(world: str, case: Case, request):
    """Masters, moments, AdamW's count, and the weights that the module computes with."""
    found = request.getfixturevalue(world)[str(case)]
    assert found["saved"]["count"] == 3
    assert found["end"]["count"] == 6
    assert same(found["restored"], found["saved"])
    end = {k: v for k, v in found["end"].items() if k != "losses"}
    assert same(found["resumed"], end)
    assert not same(found["saved"], end)


@pytest.mark.parametrize("to", [0, 1, 2, 3])
@pytest.mark.parametrize("of", [2, 3])
def test_a_save_of_two_ranks_goes_on_on_one_at_any_stage(of: int, to: int, two):
    saved = two[str(Case("float32", of, 4))]
    case = Case("float32", to, 1)
    made = case.engine(Toy())
    made.restore(saved["saved"], 3)
    losses = zero.train(made, case, range(3, 6))
    assert losses == pytest.approx(saved["end"]["losses"][3:].tolist(), rel=NEAR)
    assert gap(made.state(), saved["end"]) < NEAR


@pytest.mark.parametrize(("world", "case"), RUN, ids=str)
def test_a_finished_module_has_the_masters_and_what_was_frozen(world: str, case: Case, request):
    found = request.getfixturevalue(world)[str(case)]
    finished, fresh = found["finished"], Toy()
    assert finished.keys() == fresh.state_dict().keys()
    for name in ("first.weight", "first.bias", "head.weight"):
        assert torch.equal(finished[name], found["end"][name])
    kind = getattr(torch, case.dtype)
    assert torch.equal(finished["frozen.weight"], fresh.frozen.weight.to(kind))
    assert torch.equal(finished["scale"], torch.tensor(4 / 3)), "a rounded buffer"


# --- gradients that are not finite ---------------------------------------------------------------


@pytest.mark.parametrize(("world", "case"), RUN, ids=str)
def test_a_gradient_that_is_not_finite_leaves_no_trace(world: str, case: Case, request):
    """In one bias, one micro-batch and one rank; that `step` says so is asserted in zero.train."""
    found = request.getfixturevalue(world)[str(case)]
    assert same(found["spoilt"], found["saved"])
    assert same(found["recovered"], found["resumed"])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_what_step_says_and_the_norm(stage: int, dtype: str):
    made = Case(dtype, stage, 1).engine(Toy())
    made.module.poison = math.inf
    made.backward(made(*zero.batch(0))[0])
    assert made.step(zero.RATE) is False
    assert not math.isfinite(made.gradient_norm())
    made.module.poison = 0.0
    made.backward(made(*zero.batch(0))[0] / zero.ROWS)
    assert made.step(zero.RATE) is True
    toy = Toy()
    (toy(*zero.batch(0))[0] / zero.ROWS).backward()
    due = nn.utils.get_total_norm([p.grad for p in toy.parameters() if p.grad is not None])
    rel = NEAR if dtype == "float32" else 2e-2
    assert made.gradient_norm() == pytest.approx(float(due), rel=rel)


# --- stage 3 and the families --------------------------------------------------------------------


def test_stage_3_partitions_and_whole_gathers():
    made = Case("float32", 3, 1).engine(Toy())
    toy, due = made.module, Toy()
    assert all(p.numel() == 0 for p in toy.parameters())
    with torch.no_grad(), made.whole():
        assert all(
            torch.equal(a, b) for a, b in zip(toy.parameters(), due.parameters(), strict=True)
        )
        for step in range(2):
            assert torch.equal(toy(*zero.batch(step))[0], due(*zero.batch(step))[0])
            assert all(p.numel() for p in toy.parameters()), "a pass let go of the weights"
    assert all(p.numel() == 0 for p in toy.parameters())


@pytest.mark.soak
@pytest.mark.parametrize("family", TRAINED)
def test_every_family_trains_at_stage_3_on_one_rank(family: str, one_family):
    found = one_family[family]
    assert torch.allclose(found["3"]["losses"], found["1"]["losses"], rtol=1e-5)
    assert gap(found["3"], found["1"]) < 1e-3  # AdamW divides noise by noise


@pytest.mark.parametrize("family", TRAINED)
def test_every_family_trains_at_stage_3_on_two_ranks(family: str, both):
    kinds = [
        {
            k.removeprefix(f"{family}-{n}/"): v
            for k, v in both[0].items()
            if k.startswith(f"{family}-{n}/")
        }
        for n in (1, 3)
    ]
    assert torch.allclose(kinds[1]["losses"], kinds[0]["losses"], rtol=1e-5)
    assert gap(kinds[1], kinds[0]) < 1e-3


@pytest.mark.parametrize("lora", [None, {"rank": 2, "alpha": 4}], ids=["whole", "lora"])
def test_a_drafter_finished_at_stage_3_is_saved_as_ever(lora, tmp_path: Path):
    target = tiny_target(vocab=40, tied=False, dtype=torch.float32)
    drafter = build("lm", target.shape, lora=lora)
    assert isinstance(drafter, LM)
    drafter.adapt()
    made = Case("float32", 3, 1).engine(drafter)
    for step in range(2):
        loss, _ = made(packed(40, seed=step), target, ForwardKL())
        made.backward(loss)
        made.step(zero.RATE)
    made.finish()
    config = {k: v for k, v in arguments("lm").items() if k != "_target_"}
    save(drafter, tmp_path, config)
    again, batch = load(tmp_path, target.shape), packed(40, seed=7)
    due, _ = drafter.eval()(batch, target, CE())
    got, _ = again(batch, target, CE())
    assert got.item() == pytest.approx(due.item(), rel=1e-5)
    untrained, _ = build("lm", target.shape)(batch, target, CE())
    assert abs(got.item() - untrained.item()) > 1e-3
    assert copy.deepcopy(drafter)(batch, target, CE())[0].item() == due.item()


# --- what is refused -----------------------------------------------------------------------------


def test_stages_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match="zero_stage is 4; it must be 0, 1, 2 or 3"):
        Case("float32", 4).engine(Toy())
    target = tiny_target(dtype=torch.float32)
    changing = Medusa(target.shape, heads=2, target_lora={"rank": 2, "alpha": 4})
    changing.initialise(target, lambda: torch.empty(0))
    with pytest.raises(
        ValueError, match=r"this drafter changes its target, .* set it to 2 or less"
    ):
        Case("float32", 3).engine(changing)


def test_medusa_2_trains_below_stage_3():
    """The target's passes read its matrices, and gradients reach them at every stage."""
    target, losses = tiny_target(dtype=torch.float32), []
    for stage in (0, 1, 2):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            drafter = Medusa(target.shape, heads=2, target_lora={"rank": 2, "alpha": 4})
            drafter.initialise(target, lambda: torch.empty(0))
        made, learning, found = Case("float32", stage, 1).engine(drafter), None, []
        learning = drafter.learning(target)
        for step in range(3):
            loss, _ = made(packed(40, seed=step), learning, CE())
            made.backward(loss / 30)
            assert made.step(zero.RATE)
            found.append(loss.item())
        losses.append(found)
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert losses[2] == pytest.approx(losses[0], rel=1e-5)

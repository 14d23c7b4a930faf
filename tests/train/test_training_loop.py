"""The training loop goes on where it was, wherever it was stopped, and notices when it learns
nothing. Two passes a step: pass 2 s - 1 is the first of step s."""

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from eval.controls import Failed
from tests.train.looping import (
    STEPS,
    counting,
    curve,
    family,
    lines,
    loop_of,
    packed,
    same,
    saved_steps,
    state,
    step_of,
    target,
    times,
    trained,
)
from train import checkpoint, guard, loop, resume
from train.decoded import Decoded
from train.guard import STOP, Preempted, bits

NAN, INF = float("nan"), float("inf")


class Killed(BaseException):
    """Stands for the end of the process: nothing in train/ catches it."""


def dies_at(n: int) -> Any:
    def act(call: int, _: Any) -> None:
        if call == n:
            raise Killed

    return counting(act)


def told_at(n: int) -> Any:
    """SIGTERM comes during the n-th pass."""

    def act(call: int, _: Any) -> None:
        if call == n:
            os.kill(os.getpid(), signal.SIGTERM)

    return counting(act)


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Runs that nothing disturbs: a language model, independent heads, and a head that draws noise
    as it trains."""
    folders = {name: tmp_path_factory.mktemp(name) for name in ("lm", "medusa", "eagle")}
    for name, out in folders.items():
        trained(out, name, every=2)
    return folders


# --- going on -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["lm", "medusa", "eagle"])
def test_a_killed_run_goes_on_to_the_bit(name: str, straight, tmp_path: Path):
    """Twice: amid a step, with passes, a validation and steps behind the checkpoint to do again."""
    for n in (10, 5):
        with pytest.raises(Killed):
            trained(tmp_path, name, dies_at(n), every=2)
    assert 0 < state(tmp_path)[1]["step"] < STEPS
    found = trained(tmp_path, name, every=2)
    assert found["steps"] == STEPS
    assert same(tmp_path, straight[name])
    for key in ("loss", "validation_loss", "gradient_norm"):
        assert curve(tmp_path, key) == curve(straight[name], key)


@pytest.mark.parametrize("n", [1, 2, 7, 8])
def test_a_stop_is_heard_at_the_next_pass(n: int, straight, tmp_path: Path):
    """Not at the end of the step: what of it was done is done again."""
    with pytest.raises(Preempted, match=rf"after step {n // 2} of {STEPS}; the same command"):
        trained(tmp_path, "eagle", told_at(n), every=2)
    assert saved_steps(tmp_path)[-1:] == ([n // 2] if n > 1 else [])
    assert len(curve(tmp_path)) == n // 2 if n > 1 else not (tmp_path / "metrics.jsonl").exists()
    trained(tmp_path, "eagle", every=2)
    assert same(tmp_path, straight["eagle"])
    assert curve(tmp_path) == curve(straight["eagle"])


def test_a_stop_while_saving_keeps_what_is_saved(straight, tmp_path: Path, monkeypatch):
    real = checkpoint.save

    def save(folder, step, *rest):
        if step == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(folder, step, *rest)

    monkeypatch.setattr(checkpoint, "save", save)
    with pytest.raises(Preempted, match="after step 3"):
        trained(tmp_path, every=2)
    monkeypatch.undo()
    assert saved_steps(tmp_path) == [2, 3]
    trained(tmp_path, every=2)
    assert same(tmp_path, straight["lm"])


class Looks:
    """What validations find; counts them, and is told to stop at the first item of one."""

    def __init__(self, told: int = 0) -> None:
        self.seen, self.told = list[int](), told

    def __call__(self, module: nn.Module) -> tuple[dict[str, float], str | None]:
        self.seen.append(bits([p.data for p in module.parameters()]))
        return {"validation_tau": 1.0 + len(self.seen) % 2}, None

    def wrap(self, step: Any) -> Any:
        calls = 0

        def spoilt(engine: Any, batch: Any) -> Any:
            nonlocal calls
            calls += not torch.is_grad_enabled()
            if calls == self.told:
                os.kill(os.getpid(), signal.SIGTERM)
            return step(engine, batch)

        return spoilt


@pytest.mark.parametrize("done", [1, 3])
def test_a_stop_amid_a_validation_begins_it_again(done: int, tmp_path: Path):
    """At the first item of the validation that follows `done` whole ones: of four."""
    validation = loop_of(tmp_path / "parts").validation
    assert validation is not None
    whole, parts = Looks(), Looks(told=done * len(validation) + 1)
    trained(tmp_path / "whole", look=whole, every=2)
    with pytest.raises(Preempted, match=f"after step {2 * (done + 1)} of 8"):
        trained(tmp_path / "parts", wrap=parts.wrap, look=parts, every=2)
    assert len(parts.seen) == done
    parts.told = 0
    found = trained(tmp_path / "parts", look=parts, every=2)
    assert parts.seen == whole.seen
    assert (found["artifact_step"], found["artifact_tau"]) == (6, 2.0)
    assert same(tmp_path / "whole", tmp_path / "parts")


def test_decoding_is_a_validation_that_can_be_stopped(tmp_path: Path, monkeypatch):
    file = tmp_path / "prompts.json"
    file.write_text("[" + ", ".join(f"[{i}, 2, 3]" for i in range(40)) + "]")
    asked = []
    monkeypatch.setattr(STOP, "check", lambda: asked.append(1))
    Decoded(target(), file)(family("medusa").eval())
    assert len(asked) == 3  # 40 prompts, 16 together


def test_signals_are_as_they_were_when_the_run_is_over(straight):
    usual = (signal.SIG_DFL, signal.default_int_handler, signal.SIG_IGN)  # the last with nohup
    assert signal.getsignal(signal.SIGINT) in usual
    assert signal.getsignal(signal.SIGTERM) in usual


def test_the_second_signal_ends_at_once_and_an_echo_does_not(monkeypatch):
    """A launcher that was told with its whole group tells its processes once more."""
    ended = []
    monkeypatch.setattr(os, "_exit", ended.append)
    with STOP.listening():
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(guard.Told):
            STOP.check()
        assert ended == []
        STOP.since -= 2 * guard.ECHO
        os.kill(os.getpid(), signal.SIGTERM)
        assert ended == [143]
    with STOP.listening():
        STOP.check()  # a new run was not told


def test_a_long_step_apart_there_is_a_checkpoint(straight, tmp_path: Path, monkeypatch):
    saved = []
    real = resume.save
    monkeypatch.setattr(loop, "AT_LEAST", -1.0)
    monkeypatch.setattr(resume, "save", lambda *a, **k: saved.append(a[3].step) or real(*a, **k))
    trained(tmp_path, every=2, tokens=20 * 4 * 16)
    assert saved == list(range(1, 21))


def test_another_drafters_checkpoint_is_refused(straight, tmp_path: Path):
    with pytest.raises(Preempted):
        trained(tmp_path, "medusa", told_at(9))
    with pytest.raises(ValueError, match="was made by another version of the drafter"):
        trained(tmp_path, "lm")


# --- gradients that are not finite ------------------------------------------------------------


def weights_at(calls: dict[int, int]) -> Any:
    """Notes the bits of the weights before these passes."""

    def act(call: int, engine: Any) -> None:
        if call in calls:
            calls[call] = bits([p.data for _, p in engine.trained])

    return counting(act)


@pytest.mark.parametrize("factor", [NAN, INF])
def test_a_step_that_is_not_finite_is_skipped(factor: float, tmp_path: Path, capfd):
    """Also where only one of its passes is, the first, and on resume the count stands."""
    seen = {5: 0, 7: 0, 9: 0}  # before steps 3, 4 and 5
    found = trained(tmp_path, "lm", lambda s: weights_at(seen)(times({5: factor})(s)))
    assert found["skipped_steps"] == 1
    assert seen[5] == seen[7] != seen[9]
    skipped = next(line for line in lines(tmp_path) if "skipped" in line)
    assert (skipped["step"], skipped["sequences"]) == (3, sorted(loop_of(tmp_path).order(2)[:2]))
    assert "loss" not in skipped
    assert "NaN" not in (tmp_path / "metrics.jsonl").read_text()
    assert "the gradient of step 3 is not finite, with sequences" in capfd.readouterr().out
    assert all(t.isfinite().all() for t in state(tmp_path)[0].values())
    assert state(tmp_path)[1]["applied"] == STEPS - 1


def test_a_loss_that_is_infinite_beside_finite_gradients_is_skipped_too(tmp_path: Path):
    def wrap(step: Any) -> Any:
        calls = 0

        def spoilt(engine: Any, batch: Any) -> Any:
            nonlocal calls
            calls += torch.is_grad_enabled()
            loss, metrics = step(engine, batch)
            return (loss + INF if calls == 6 else loss), metrics

        return spoilt

    assert trained(tmp_path, wrap=wrap)["skipped_steps"] == 1


def test_a_run_with_a_skipped_step_goes_on_to_the_bit(tmp_path: Path):
    """AdamW has counted one step less than the loop."""
    trained(tmp_path / "whole", "lm", times({5: NAN}))
    with pytest.raises(Killed):
        trained(tmp_path / "parts", "lm", lambda s: dies_at(12)(times({5: NAN})(s)))
    assert state(tmp_path / "parts")[1]["step"] == 5
    trained(tmp_path / "parts")
    assert same(tmp_path / "whole", tmp_path / "parts")


def test_four_in_a_row_end_training_and_the_checkpoint_before_is_kept(tmp_path: Path):
    """One is saved after each step where there is no trouble; steps 3 to 6 have it."""
    with pytest.raises(Failed, match=r"step 6 is not finite.* and 3 steps before it were skipped"):
        trained(tmp_path, "lm", times(dict.fromkeys(range(5, 17), NAN)))
    assert saved_steps(tmp_path) == [1, 2]


def test_trouble_is_counted_over_a_stop(tmp_path: Path):
    bad = dict.fromkeys(range(5, 17), NAN)
    with pytest.raises(Preempted, match="after step 4"):
        trained(tmp_path, "lm", lambda s: told_at(9)(times(bad)(s)))
    assert state(tmp_path)[1]["skipped"] == 2
    with pytest.raises(Failed, match="step 6 is not finite"):
        trained(tmp_path, "lm", times(dict.fromkeys(range(1, 9), NAN)))


def test_a_run_of_skipped_steps_alone_is_no_run(tmp_path: Path):
    with pytest.raises(Failed, match="zero, or not finite, in all of the 3 steps"):
        trained(tmp_path, "lm", times(dict.fromkeys(range(1, 7), NAN)), tokens=3 * 64)
    assert saved_steps(tmp_path) == []


def test_a_skipped_step_that_is_all_that_is_left_ends_no_run(tmp_path: Path):
    """As it would not have ended the run that nobody stopped."""
    with pytest.raises(loop.Preempted):
        trained(tmp_path, "lm", told_at(5), tokens=3 * 64)
    found = trained(tmp_path, "lm", times({1: NAN, 2: NAN}), tokens=3 * 64)
    assert (found["steps"], found["skipped_steps"]) == (3, 1)


def test_numbers_that_are_not_finite_are_never_saved(tmp_path: Path, monkeypatch):
    real = loop.Engine.state

    def spoilt(self: Any) -> dict[str, torch.Tensor]:
        found = real(self)
        found["exp_avg_sq/" + self.trained[0][0]][0] = INF
        return found

    monkeypatch.setattr(loop.Engine, "state", spoilt)
    with pytest.raises(Failed, match=r"after step 1 exp_avg_sq/.* holds numbers that are not"):
        trained(tmp_path)
    assert saved_steps(tmp_path) == []


# --- training that teaches nothing ----------------------------------------------------------------


def test_a_gradient_that_is_always_zero_ends_training(tmp_path: Path, monkeypatch):
    """Weights move all the same: matrices decay."""
    monkeypatch.setattr(guard, "WINDOW", 4)
    with pytest.raises(Failed, match="zero, or not finite, in all of the 4 steps up to step 8"):
        trained(tmp_path, "lm", times(dict.fromkeys(range(5, 17), 0.0)))


def test_weights_that_stand_still_end_training(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(guard, "WINDOW", 4)

    def wrap(step: Any) -> Any:
        def frozen(call: int, engine: Any) -> None:
            engine.step = lambda rate: call % 2 == 0

        return counting(frozen)(step)

    with pytest.raises(Failed, match="no weight of the drafter has changed in the 4 steps up to"):
        trained(tmp_path, "lm", wrap)


class Forgetful(nn.Module):
    """A drafter with a matrix that its training pass does not use."""

    def __init__(self, thaws: bool) -> None:
        super().__init__()
        self.inner, self.unused = family("lm"), nn.Linear(2, 2, bias=False)
        self.thaws = thaws
        self.unused.weight.requires_grad_(not thaws)

    def forward(self, *given: Any) -> Any:
        loss, metrics = self.inner(*given)
        if self.thaws:
            self.unused.weight.requires_grad_(True)
            loss = loss + self.unused.weight.sum() * loss.detach()
        return loss, metrics


@pytest.mark.parametrize(
    ("thaws", "said"),
    [
        (False, r"no gradient reached unused.weight in the first step"),
        (True, r"unused.weight got a gradient in the first step and is not trained"),
    ],
)
def test_who_learns_is_checked_in_the_first_step(thaws: bool, said: str, tmp_path: Path):
    with pytest.raises(Failed, match=said):
        loop_of(tmp_path).run(Forgetful(thaws), step_of("lm"))
    assert saved_steps(tmp_path) == []


def test_a_head_without_supervised_tokens_is_refused(tmp_path: Path):
    """Documents of six tokens: none is six places behind a state of the same document."""
    packed(tmp_path, answer=2)
    with pytest.raises(ValueError, match="head 5 of the drafter has no supervised token in all 61"):
        loop_of(tmp_path).run(family("medusa", heads=5), step_of("medusa"))
    found = loop_of(tmp_path).run(family("medusa", heads=4), step_of("medusa"))
    assert found["steps"] == STEPS


def test_a_head_that_one_step_leaves_out_is_no_fault(tmp_path: Path):
    data = loop_of(tmp_path).train
    guard.require_labels({"tokens": 9.0, "tokens@2": 0.0, "tokens@target": 0.0, "loss": 0.0}, data)
    with pytest.raises(ValueError, match="head 12"):
        guard.require_labels({"tokens@12": 0.0}, data)


# --- memory ---------------------------------------------------------------------------------------

FULL = [
    (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0"), "2.00 GiB"),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 64 bytes."),
     "64 bytes"),
    (MemoryError(), None),
]  # fmt: skip


@pytest.mark.parametrize(("error", "wanted"), FULL, ids=str)
def test_full_memory_is_named_with_the_key_to_lower(error, wanted, tmp_path: Path):
    def act(call: int, _: Any) -> None:
        if call == 4:
            raise error

    more = f" when {wanted} more were wanted" if wanted else ""
    said = (
        f"memory ran out in step 2, in a micro-batch of 2 sequences of 16 tokens{more}; lower "
        r"schedule.micro_batch \(the global batch stays as it is\) or schedule.sequence_length"
    )
    with pytest.raises(MemoryError, match=said):
        trained(tmp_path, "lm", counting(act))


def test_a_single_sequence_that_does_not_fit_can_only_be_shorter(tmp_path: Path):
    def act(*_: Any) -> None:
        raise MemoryError

    with pytest.raises(MemoryError, match=r"1 sequences of 16 tokens; lower schedule.sequence_len"):
        trained(tmp_path, "lm", counting(act), micro_batch=1)


def test_other_errors_stay_what_they_are(tmp_path: Path):
    def act(*_: Any) -> None:
        raise RuntimeError("sizes do not match")

    with pytest.raises(RuntimeError, match=r"^sizes do not match$"):
        trained(tmp_path, "lm", counting(act))


def test_bits_see_any_change():
    a = [torch.randn(3, 4), torch.randn(5).bfloat16()]
    b = [t.clone() for t in a]
    assert bits(a) == bits(b)
    b[1][2] = torch.nextafter(b[1][2], torch.tensor(9.0).bfloat16())
    assert bits(a) != bits(b)
    assert bits(a) != bits(a[::-1])

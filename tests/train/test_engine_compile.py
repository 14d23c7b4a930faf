"""torch.compile in training: the same losses, in the engine's own passes alone, without a trace."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from drafters.base import Trained
from tests.drafters.contract import TRAINED
from tests.drafters.contract import packed as batch_of
from tests.train.looping import VOCAB, counting, family, loop_of, same, step_of, target, trained
from train import probe
from train.engine import ALONE, Engine, join
from train.objectives import ForwardKL
from train.schedule import Schedule

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="there is no g++ here")


@pytest.fixture(scope="module", autouse=True)
def _alone() -> Iterator[None]:
    """What join() sets goes with the module; kernels are compiled in this process."""
    from torch._inductor import config

    with pytest.MonkeyPatch.context() as patch:
        for name, value in ALONE.items():
            patch.setenv(name, value)
        patch.setattr(config, "compile_threads", 1)
        join()
        yield
    torch._dynamo.reset()


@pytest.fixture
def graphs() -> Callable[[], int]:
    """How many graphs were compiled since the test began."""
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    return lambda: counters["stats"]["unique_graphs"]


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """In torch.compile's place: notes the blocks whose compiled forward runs."""
    names: list[str] = []

    def compiled(forward: Any, **_: Any) -> Any:
        def run(*inputs: Any, **named: Any) -> Any:
            names.append(type(forward.__self__).__name__)
            return forward(*inputs, **named)

        return run

    monkeypatch.setattr(torch, "compile", compiled)
    return names


def engine_of(drafter: nn.Module, stage: int = 1, dtype: str = "float32", **said: Any) -> Engine:
    return Engine(
        drafter, dtype=dtype, zero_stage=stage, micro_batch=2, accumulation=1, clip=1.0,
        betas=(0.9, 0.95), weight_decay=0.1, **said,
    )  # fmt: skip


def losses(made: Engine, steps: range) -> list[float]:
    found = []
    for step in steps:
        torch.manual_seed(step)  # EAGLE's noise
        loss, _ = made(batch_of(VOCAB, seed=step), target(), ForwardKL())
        made.backward(loss / 30)
        assert made.step(1e-2)
        found.append(loss.item())
    return found


def fresh(name: str) -> Trained:
    torch.manual_seed(0)
    return family(name).train()


def trained_both_ways(name: str, graphs: Callable[[], int], **said: Any) -> None:
    """Five steps with and without; the shapes are compiled in the first, and never again."""
    eager = losses(engine_of(fresh(name), **said), range(5))
    assert graphs() == 0
    made = engine_of(fresh(name), compiled=True, **said)
    found = losses(made, range(1))
    count = graphs()
    assert count, "nothing was compiled"
    found += losses(made, range(1, 5))
    close = 1e-5 if said.get("dtype", "float32") == "float32" else 2e-2
    assert found == pytest.approx(eager, rel=close)
    with torch.no_grad(), made.whole():  # other sizes, as in validation and decoding
        made.module.eval()(batch_of(VOCAB, T=30), target(), ForwardKL())
    assert graphs() == count
    assert made.module.state_dict().keys() == fresh(name).state_dict().keys()
    made.finish()
    assert not [m for m in made.module.modules() if "forward" in vars(m)]


# --- the compiler itself -------------------------------------------------------------------------


@needs_compiler
def test_an_lm_trains_alike_and_is_compiled_once(graphs):
    trained_both_ways("lm", graphs)


@needs_compiler
@pytest.mark.soak
@pytest.mark.parametrize("name", [name for name in TRAINED if name != "lm"])
def test_every_family_trains_alike(name: str, graphs):
    trained_both_ways(name, graphs)


@needs_compiler
@pytest.mark.soak
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("stage", [0, 1, 2])
def test_every_stage_trains_alike(stage: int, dtype: str, graphs):
    trained_both_ways("medusa", graphs, stage=stage, dtype=dtype)


class Killed(BaseException):
    """Stands for the end of the process."""


@needs_compiler
@pytest.mark.soak
@pytest.mark.parametrize("name", ["lm", "eagle"])
def test_resumed_equals_straight_to_the_bit(name: str, tmp_path: Path, graphs):
    """Kernels are those of each shape, whichever a run meets first."""
    trained(tmp_path / "straight", name, compile=True)
    count = graphs()

    def dies(call: int, _: Any) -> None:
        if call == 11:
            raise Killed

    with pytest.raises(Killed):
        trained(tmp_path / "stopped", name, wrap=counting(dies), compile=True)
    torch._dynamo.reset()  # as another process has it
    trained(tmp_path / "stopped", name, compile=True)
    assert count
    assert same(tmp_path / "stopped", tmp_path / "straight")


def test_a_missing_compiler_is_said_before_anything_starts(monkeypatch: pytest.MonkeyPatch):
    from torch._inductor import config, cpp_builder

    cpp_builder.cpp_compiler_search.cache_clear()
    monkeypatch.setattr(config.cpp, "cxx", ("/nowhere/g++",))
    schedule = Schedule(tokens=64, batch_tokens=64, sequence_length=16, compile=True)
    drafter = fresh("medusa")

    def step(*_: Any) -> Any:
        raise AssertionError("a step was taken")

    said = r"torch.compile does not work here \(.*compiler.*\): install .* schedule.compile=false"
    with pytest.raises(OSError, match=said):
        probe.probe(drafter, step, batch_of(VOCAB), schedule, 1)
    cpp_builder.cpp_compiler_search.cache_clear()


# --- what is compiled, and when ------------------------------------------------------------------


@pytest.mark.parametrize("name", TRAINED)
def test_only_the_engine_runs_compiled_blocks(name: str, called):
    made = engine_of(fresh(name), compiled=True)
    made(batch_of(VOCAB), target(), ForwardKL())
    ran = len(called)
    assert ran
    made.module(batch_of(VOCAB), target(), ForwardKL())
    assert len(called) == ran
    with pytest.raises(AttributeError):
        made(None, target(), ForwardKL())
    assert not [m for m in made.module.modules() if "forward" in vars(m)]


def test_without_it_nothing_is_compiled(called):
    losses(engine_of(fresh("eagle")), range(1))
    assert not called


@pytest.mark.parametrize("compiled", [True, False])
def test_the_loop_compiles_training_and_not_validation(compiled: bool, tmp_path: Path, called):
    loop = loop_of(tmp_path, compile=compiled)
    loop.run(family("medusa"), step_of("medusa"), every=1)
    blocks, passes = len(fresh("medusa").blocks), loop.schedule.steps * 2  # type: ignore[arg-type]
    assert len(called) == compiled * blocks * passes


def test_it_is_another_run_and_not_for_stage_3():
    sizes = {"tokens": 64, "batch_tokens": 64, "sequence_length": 16}
    assert "compile" not in Schedule.free
    with pytest.raises(ValueError, match=r"zero_stage 3, .*; set deepspeed=zero2, or compile to"):
        Schedule(**sizes, zero_stage=3, compile=True)
    assert Schedule(**sizes, zero_stage=2, compile=True).compile

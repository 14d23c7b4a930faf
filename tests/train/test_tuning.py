"""What stages that hand a drafter to engines are said to take."""

import sys
from typing import Any

import pytest

from data.builtin import Builtin
from decoding.pretrained import Pretrained
from decoding.target import Shape
from eval.serve import Serve
from tests.train.composing import compose
from train import tuning
from train.compose import build
from train.export import Export
from train.overfit import Overfit
from train.serveable import Serveable

SHAPE = Shape(
    hidden_size=256, heads=4, kv_heads=4, vocab_size=2048, layers=4, intermediate_size=704,
    max_positions=512, tied=True,
)  # fmt: skip
LM = 1_400_000  # parameters of quickstart's drafter


@pytest.fixture(autouse=True)
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine whose speed is known: 5 ms a round, 1e11 operations a second."""
    monkeypatch.setattr("train.tuning.round_cost", lambda *a, **k: 0.005)
    monkeypatch.setattr("train.tuning.matrix_speed", lambda dtype: 1e11)


def serve(**more: Any) -> Serve:
    return Serve(target=Pretrained(), prompts={"a": Builtin(kind="text")}, **more)


def test_an_export_takes_the_bytes_of_its_formats():
    """Quickstart's took 2.2 seconds and 2.8 MB, in bf16; the most is said for fp32."""
    found = tuning.exporting(Export(target=Pretrained()), "drafters.lm.LM", SHAPE, LM)
    assert found.what == "the formats transformers"
    assert found.disk is not None
    assert 2_781_540 < found.disk < 4 * 2_781_540
    assert found.seconds is not None
    assert 2.2 < found.seconds[1] < 10
    both = tuning.exporting(Export(target=Pretrained()), "eagle3", SHAPE, LM)
    assert both.what == "the formats vllm, speculators"
    assert both.disk == 2 * found.disk
    assert both.floor - found.floor == 2 * SHAPE.parameters()  # its proof needs the target
    none = tuning.exporting(Export(target=Pretrained()), "clover", SHAPE, LM)
    assert (none.what, none.seconds) == ("nothing: no engine serves clover", None)
    unknown = tuning.exporting(Export(target=Pretrained()), "lm", SHAPE, None)
    assert (unknown.what, unknown.disk) == ("the formats transformers", None)


def test_serving_takes_longer_with_each_engine_that_reads_the_family():
    """Quickstart's, 8 prompts and transformers alone, took 27 to 37 seconds."""
    one = tuning.serving(serve(limit=8), "lm", SHAPE, False)
    assert one.seconds is not None
    assert one.seconds[0] < 27 < 37 < one.seconds[1] < 80
    assert one.what.startswith("1 x engine and format, 8 prompts")
    here = {"vllm": sys.executable, "llama_cpp": sys.executable}
    more = tuning.serving(serve(limit=8, engines=here), "drafters.lm.LM", SHAPE, False)
    assert more.what.startswith("3 x engine and format")
    assert more.seconds is not None
    assert more.seconds[1] > one.seconds[1] + 50
    two = tuning.serving(serve(engines={"vllm": sys.executable}), "medusa", SHAPE, False)
    assert two.what.startswith("2 x engine and format, 24 prompts")  # in both layouts
    nobody = tuning.serving(serve(), "medusa", SHAPE, False)
    assert (nobody.what, nobody.seconds) == ("no engine is here that reads the family", None)


def test_bf16_takes_half_the_memory_of_fp32():
    fp32, bf16 = (tuning.serving(serve(dtype=d), "lm", SHAPE, False) for d in DTYPES)
    assert fp32.floor - bf16.floor == 2 * SHAPE.parameters()


DTYPES = ("float32", "bfloat16")


def test_overfitting_takes_its_training_besides():
    drafter = build(compose("recipe=quickstart", "drafter=lm")["drafter"])
    common = {"target": Pretrained(), "drafter": drafter, "prompts": Builtin(kind="text")}
    short, long = (
        tuning.overfitting(Overfit(**common, steps=steps), SHAPE, LM, False)
        for steps in (100, 1000)
    )
    assert short.seconds is not None
    assert long.seconds is not None
    assert long.seconds[0] > 2 * short.seconds[0]
    assert short.what.startswith("100 steps on 8 answers; then the formats transformers; ")
    unknown = tuning.overfitting(Overfit(**common), None, None, False)
    assert unknown.seconds is None
    assert "300 steps" in unknown.what
    heads = build(compose("recipe=quickstart", "drafter=medusa")["drafter"])
    alone = tuning.overfitting(Overfit(**common | {"drafter": heads}), SHAPE, LM, False)
    assert alone.seconds is not None  # no engine is here, and it trains all the same


def test_before_the_bill_an_untrained_drafter_is_exported_and_served():
    drafter = build(compose("recipe=quickstart", "drafter=lm")["drafter"])
    made = Serveable(target=Pretrained(), drafter=drafter, prompts=Builtin(kind="text"))
    found = tuning.preserving(made, SHAPE, LM, False)
    served = tuning.serving(made.engines.client, "lm", SHAPE, False)
    assert found.seconds is not None
    assert served.seconds is not None
    assert found.seconds[1] > served.seconds[1]
    assert found.disk is not None

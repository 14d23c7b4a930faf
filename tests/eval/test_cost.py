"""What a round costs: told by a clock that only our own calls move, and kept for one machine."""

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from decoding.loop import decode
from decoding.round import Draft
from decoding.sampling import Sampling
from decoding.target import Target
from drafters.lm import LM
from eval import cost, rounds
from eval.cost import Costs, Ledger, between, chains, measure, passes, verify_milliseconds
from eval.rounds import Fixed, Overhead, Round, in_turn, longest
from eval.shapes import Shape
from tests.drafters.contract import TRAINED, build
from tests.toys import tiny_target

TREE = {"kind": "dynamic", "top_k": 2, "depth": 3, "nodes": 5}
MADE_UP = Costs(
    tokens=5,
    verify={1: {1: 10.0, 5: 14.0}, 4: {1: 20.0, 5: 40.0}},
    draft={1: 4.0, 4: 9.0},
    overhead={1: 1.0, 4: 1.0},
    prefill={1: {16: (8.0, 2.0), 128: (64.0, 16.0)}, 4: {16: (9.0, 9.0), 128: (9.0, 9.0)}},
)


@pytest.fixture
def quick(monkeypatch) -> None:
    """One turn to warm up and one that counts."""
    monkeypatch.setattr(rounds, "TURNS", (1, 1))


@pytest.fixture
def clock(monkeypatch, quick) -> dict[str, float]:
    """Milliseconds as planted: a call of the target over m tokens of B rows takes 10 + m B, keeping
    2, its prefill 1 a token read, a draft of the LM 4 and half a token's worth for each new token,
    and the rest of a round 3."""
    at = {"ms": 0.0}

    def planted(owner: Any, name: str, cost: Any) -> None:
        true = getattr(owner, name)

        def timed(self: Any, *rest: Any, **more: Any) -> Any:
            at["ms"] += cost(*rest)
            return true(self, *rest, **more)

        monkeypatch.setattr(owner, name, timed)

    planted(Target, "score", lambda root, draft, *_: 10 + (1 + draft.ids_BN.shape[1]) * len(root))
    planted(Target, "keep", lambda *_: 2)
    planted(Target, "prefill", lambda ids, *_: ids.shape[1] - 1)
    planted(
        LM,
        "propose",
        lambda state, seen, *_: 4 + (seen.ids_BS.shape[1] / 2 if seen.draft is None else 0),
    )
    planted(Draft, "depth", lambda *_: 3)  # the loop asks once a round, a timed round never
    monkeypatch.setattr(time, "perf_counter", lambda: at["ms"] / 1000)
    return at


def lm(target: Target, **options: Any) -> LM:
    return LM(target.shape, **{"width": 64, **options}).to(target.dtype).eval()


def test_known_answers_of_the_prediction():
    """By hand: 2.5 x 11 / 19; with prefill (20 + 30 x 11) / (20 + 5 + 12 x 19), a prompt of 40."""
    assert MADE_UP.predict(2.5) == pytest.approx(2.5 * 11 / 19)
    assert MADE_UP.predict(2.5, 4) == pytest.approx(2.5 * 21 / 50)
    with_prefill = (20 + 330) / (20 + 5 + 12 * 19)
    assert MADE_UP.predict(2.5, 1, 30, 40) == pytest.approx(with_prefill)
    assert MADE_UP.predict(2.5, 1, 1e9, 40) == pytest.approx(MADE_UP.predict(2.5))
    assert MADE_UP.told() == {
        "verify_ms": {"1": 10.0, "5": 14.0}, "draft_ms": 4.0, "overhead_ms": 1.0,
    }  # fmt: skip
    json.dumps(MADE_UP.told(), allow_nan=False)
    with pytest.raises(ValueError, match=r"batch 2 was not measured; there are \[1, 4\]"):
        MADE_UP.predict(2.5, 2)


def test_each_part_is_measured_as_planted(clock):
    """None is taken for another, and the script of what stands costs nothing."""
    target = tiny_target()
    costs = measure(target, lm(target), Shape(length=4), [1, 3])
    assert costs.tokens == 5
    assert costs.verify[1] == pytest.approx({m: 12 + m for m in (1, 2, 4, 5, 8, 16, 32, 64)})
    assert costs.verify[3] == pytest.approx({1: 15, 5: 27})
    assert costs.draft == pytest.approx({1: 4, 3: 4})
    assert costs.overhead == pytest.approx({1: 3, 3: 3})
    assert costs.prefill[1] == {16: pytest.approx((15, 8)), 128: pytest.approx((127, 64))}


def test_what_is_predicted_is_what_the_loop_takes(clock):
    """Under the planted clock the whole of decode, prefill and all, costs what `predict` says."""
    target = tiny_target()
    drafter = LM.around(tiny_target(seed=0, spread=0.61).model, draft_length=4)
    costs = measure(target, drafter, Shape(length=4), [1])
    prompt, options = list(range(1, 41)), {"sampling": Sampling(), "max_new_tokens": 48}
    plain = decode(target, None, [prompt], **options)
    done = decode(target, drafter, [prompt], **options)
    tau = plain.rounds / done.rounds
    assert tau > 1.2
    found = costs.predict(tau, 1, done.tokens, len(prompt))
    assert found == pytest.approx(plain.seconds / done.seconds, rel=1e-3)
    assert costs.predict(tau) != pytest.approx(found, rel=0.02)  # prefill matters here


def test_a_sampled_round_and_a_tree_are_timed_too(quick):
    target = tiny_target()
    drafter = lm(target)
    sampled = measure(target, drafter, Shape(length=3), [2], sampling=Sampling(temperature=1.0))
    assert sampled.tokens == 4
    grown = measure(target, drafter, Shape(tree=TREE), [1])
    assert grown.tokens == 6
    assert min(grown.draft[1], grown.verify[1][6], grown.overhead[1]) > 0


@pytest.mark.parametrize("family", TRAINED)
def test_every_family_can_be_timed(family: str, quick):
    """In batches, with its chain; a family that changes its target with the changed one."""
    target = tiny_target()
    drafter: Any = build(family, target.shape).double()
    drafter.initialise(target, lambda: torch.ones(64))
    costs = measure(target, drafter.double(), Shape(length=2), [1, 3], context=24)
    assert costs.tokens == 3
    assert min(costs.draft.values()) > 0
    assert costs.verify[3].keys() == {1, 3}


def test_rounds_accept_from_nothing_to_all_and_stay_where_they_began():
    """Other numbers in other rows, as in a batch that is measured; and no end of the context."""
    target = tiny_target(max_positions=128)
    going = Round(target, lm(target, draft_length=3), rows=2, context=500)
    assert going.context == 128 - rounds.ROOM
    kept, lengths = set(), []
    for _ in range(40):
        going()
        assert going.seen is not None
        kept.add(tuple(going.seen.count))
        lengths += going.seen.length
    assert kept == {(1, 2), (2, 3), (3, 4), (4, 1)}
    assert max(lengths) <= 128 - rounds.ROOM + rounds.ROOM // 2 + 4


def test_the_longest_path_of_a_tree():
    assert longest([]) == []
    assert longest([-1, 0, 1]) == [0, 1, 2]
    assert longest([-1, -1, 1, 0, 2, 1]) == [1, 2, 4]


def test_turns_are_interleaved_and_the_first_is_left_out(monkeypatch):
    order: list[str] = []

    def subject(name: str, *times: float):
        left = iter(times)

        def go() -> tuple[float, float]:
            order.append(name)
            return next(left), 1.0

        return go

    monkeypatch.setattr(rounds, "TURNS", (3, 3))
    found = in_turn({"a": subject("a", 99, 1, 2, 9), "b": subject("b", 99, 5, 4, 6)}, "turns")
    assert found == {"a": (2, 1.0), "b": (5, 1.0)}
    assert order == ["a", "b"] * 4


def test_costs_between_those_that_were_measured():
    known = {1: 10.0, 4: 13.0, 8: 21.0}
    assert [between(known, m) for m in (1, 2, 4, 6, 8, 10)] == [10, 11, 13, 17, 21, 25]
    assert between({3: 5.0}, 9) == 5


def test_tree_tuning_times_all_sizes_in_turn(clock):
    assert verify_milliseconds(tiny_target(), [1, 8]) == pytest.approx({1: 13, 8: 20})


def test_what_is_known_is_not_measured_again(tmp_path: Path, quick, monkeypatch):
    target = tiny_target()
    ledger = Ledger(tmp_path / "costs", target, "machine")
    verify, rest = passes(ledger, target, [1, 4])
    drafts = chains(ledger, target, {"lm": lm(target)}, {"lm": [1, 2]})
    assert [p.name for p in (tmp_path / "costs").iterdir()] == [ledger.file.name]
    monkeypatch.setattr(cost, "in_turn", None)  # would be called
    again = Ledger(tmp_path / "costs", target, "machine")
    assert passes(again, target, [1, 4]) == (verify, rest)
    assert chains(again, target, {"lm": lm(target)}, {"lm": [1, 2]}) == drafts
    with pytest.raises(TypeError):
        passes(again, target, [1, 4, 8])


def test_what_is_measured_later_is_scaled_to_the_spell_of_the_first(tmp_path: Path, monkeypatch):
    """A machine that has become a fifth faster makes no later drafter faster than an earlier."""
    pace = 1.0

    def timed(subjects, said):
        return dict.fromkeys(subjects, (8 * pace, 2 * pace))

    monkeypatch.setattr(cost, "in_turn", timed)
    ledger = Ledger(tmp_path, tiny_target(), "machine")
    first = ledger.fill({"a": lambda: None}, "a")
    pace = 0.8
    again = Ledger(tmp_path, tiny_target(), "machine")
    assert again.fill({"a": lambda: None, "b": lambda: None}, "b")["b"] == pytest.approx(first["a"])
    assert again.known["a"] == first["a"] == (8.0, 2.0)


CHANGES = {
    "machine": lambda target, monkeypatch: "another",
    "dtype": lambda target, monkeypatch: target.to(torch.float32) and "machine",
    "revision": lambda target, monkeypatch: setattr(target, "revision", "b") or "machine",
    "threads": lambda target, monkeypatch: (
        monkeypatch.setattr(torch, "get_num_threads", lambda: 7) or "machine"
    ),
    "software": lambda target, monkeypatch: (
        monkeypatch.setattr(cost, "version", lambda name: "9") or "machine"
    ),
    "code": lambda target, monkeypatch: (
        monkeypatch.setattr(cost, "_sources", lambda: "9") or "machine"
    ),
}


@pytest.mark.parametrize("what", CHANGES)
def test_foreign_costs_are_never_used(what: str, tmp_path: Path, monkeypatch):
    """Neither found by their name, nor believed when they stand under ours."""
    target = tiny_target()
    mine = Ledger(tmp_path, target, "machine")
    mine.fill({"x": lambda: lambda: (1.0,)}, "x")
    assert Ledger(tmp_path, target, "machine").known["x"] == (1.0,)
    machine = CHANGES[what](target, monkeypatch)
    other = Ledger(tmp_path, target, machine)
    assert other.known == {}
    assert other.file != mine.file
    mine.file.rename(other.file)
    assert Ledger(tmp_path, target, machine).known == {}


@pytest.mark.parametrize("text", ["", "{", "[]", '{"key": {}}', '{"milliseconds": {"x": [1]}}'])
def test_a_broken_cost_file_is_measured_again(text: str, tmp_path: Path):
    ledger = Ledger(tmp_path, tiny_target(), "machine")
    ledger.file.write_text(text)
    ledger = Ledger(tmp_path, tiny_target(), "machine")
    assert ledger.fill({"x": lambda: lambda: (2.0,)}, "x") == {"x": (2.0,)}
    assert Ledger(tmp_path, tiny_target(), "machine").known["x"] == (2.0,)


def test_the_overhead_is_neither_draft_nor_call(clock):
    assert Overhead(tiny_target(), rows=2)() == (pytest.approx(3.0),)
    assert Round(tiny_target(), Fixed(0))() == (pytest.approx(0.0), pytest.approx(13.0))

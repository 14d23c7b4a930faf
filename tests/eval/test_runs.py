"""The order of the runs: who is cold, who is warm, and what a restart makes again."""

import itertools
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from decoding.loop import Answer, Decoded
from decoding.ranks import Ranks
from eval.prompts import Prompt, with_later_turns
from eval.runs import measure

PROMPTS = [Prompt("t", f"text {n}", [n + 1, 2]) for n in range(3)]
CELLS = [(1, 0.0), (1, 1.0)]


class Recorded:
    """An arm that writes down what it is asked, and whether its drafter was made cold before."""

    def __init__(self, warm: bool) -> None:
        self.warm, self.asked = warm, list[str]()
        self.drafter = SimpleNamespace(forget=lambda: self.asked.append("forget"))

    def answer(self, prompts: list[Prompt], sampling: Any, max_new_tokens: int) -> Decoded:
        self.asked += [f"{p.text[-1]}@{sampling.temperature:g}" for p in prompts]
        return Decoded([Answer([3], True, [0], [0]) for _ in prompts], rounds=1, seconds=1.0)


def measured(kept: Path) -> dict[str, Recorded]:
    arms = {"plain": Recorded(False), "warm": Recorded(True)}
    rows = measure(
        arms,  # type: ignore[arg-type]
        PROMPTS, kept, ranks=Ranks(), cells=CELLS, repeats=2, seed=0, max_new_tokens=4,
    )  # fmt: skip
    assert len(rows) == 2 * 2 * 2 * 3
    return arms


def test_what_others_do_meanwhile_is_noted_with_each_run(tmp_path: Path):
    measured(tmp_path / "runs.jsonl")
    lines = (tmp_path / "runs.jsonl").read_text().splitlines()
    noted = [json.loads(line)["others"] for line in lines if line]
    assert all(each is None or each[0] > 0 for each in noted)


def test_each_repeat_teaches_a_warm_arm_anew(tmp_path: Path):
    arms = measured(tmp_path / "runs.jsonl")
    repeats = [["forget", *(f"{n}@{t:g}" for n in range(3))] * 2 for _, t in CELLS]
    due = [[f"0@{t:g}", *asked] for (_, t), asked in zip(CELLS, repeats, strict=True)]
    assert arms["warm"].asked == [*itertools.chain(*due)]  # each cell begins with its warm-up


@pytest.mark.parametrize("lost", [1, 2, 3])
def test_a_restart_makes_a_warm_arms_repeat_again(tmp_path: Path, lost: int):
    """The last rows are gone: of the plain arm they are made again, of the warm one its repeat."""
    kept = tmp_path / "runs.jsonl"
    measured(kept)
    lines = [line for line in kept.read_text().splitlines() if line]
    kept.write_text("\n".join(lines[:-lost]) + "\n")
    arms = measured(kept)
    gone = [json.loads(line) for line in lines[-lost:]]
    plain = [f"{run['group']}@1" for run in gone if run["arm"] == "plain"]
    assert [a for a in arms["plain"].asked if a != "forget"] == ["0@0", "0@1", *plain]
    assert [a for a in arms["warm"].asked if a != "forget"] == [
        *("0@0", "0@1", "0@1", "1@1", "2@1")
    ]


def test_later_turns_stand_behind_the_targets_own_answers():
    class Tokenizer:
        def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
            return f"answer {ids}"

        def apply_chat_template(self, messages: Any, **_: Any) -> str:
            return "|".join(m["content"] for m in messages)

        def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
            return {"input_ids": list(range(len(text.split("|"))))}

    first = {"role": "user", "content": "one"}
    talk = Prompt("chat", "one", [1], (first,), ("two", "three"))  # type: ignore[arg-type]
    single = Prompt("chat", "alone", [1], (first,))  # type: ignore[arg-type]

    def asked(turns: int, most: int = 9) -> list[Prompt]:
        return with_later_turns(
            [talk, single], Tokenizer(), lambda some: [[7] for _ in some],
            turns=turns, most_tokens=most,
        )  # fmt: skip

    assert asked(1) == [talk, single]
    second = asked(2)[2]
    assert [m["content"] for m in second.messages] == ["one", "answer [7]", "two"]
    assert (second.text, len(second.ids), second.later) == ("one\ntwo", 3, ("three",))
    assert len(asked(2)) == 3
    assert len(asked(5)) == 4
    assert len(asked(5, most=4)) == 3  # the third turn is too long

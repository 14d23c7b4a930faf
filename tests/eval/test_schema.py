"""Schemas on the way through a measurement: refused, enforced by arms, and counted."""

import json
from types import SimpleNamespace
from typing import Any

import pytest
from tiny import tokenizer, write_texts
from toys import tiny_target

from decoding.constraint import Grammars
from decoding.sampling import Sampling
from drafters.ngram import Ngram
from drafters.token_recycling import TokenRecycling
from eval.arms import COLD, WARM, Arm, beside
from eval.schema import matches, refusal, sentence, validity

SCHEMA = json.dumps(
    {
        "type": "object",
        "properties": {"size": {"type": "integer", "maximum": 9}},
        "required": ["size"],
        "additionalProperties": False,
    }
)
SMALL = json.dumps({"enum": ["a", 1, None]})


@pytest.fixture(scope="module")
def tokens(tmp_path_factory) -> Any:
    return tokenizer(write_texts(tmp_path_factory.mktemp("text")))


@pytest.fixture(scope="module")
def grammars(tokens) -> Grammars:
    return Grammars(tokens)


def asked(text: str, schema: str | None) -> Any:
    return SimpleNamespace(text=text, ids=[5, 6, len(text)], schema=schema)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"size": 3}', True),
        (' {"size":\n3.0} ', True),
        ('{"size": 30}', False),
        ('{"size": 3, "colour": "red"}', False),
        ('{"size": 3', False),
        ('{"size": 3}.', False),
        ('```json\n{"size": 3}\n```', False),
        ('{"size": NaN}', False),
        ("[" * 100_000, False),
        ("", False),
    ],
)
def test_what_matches(text, expected):
    assert matches(text, SCHEMA) is expected


def test_nothing_but_json_is_a_number():
    assert not matches("NaN", '{"type": "number"}')
    assert not matches("Infinity", "{}")


@pytest.mark.parametrize(
    ("schema", "why"),
    [
        (SCHEMA, None),
        ("{}", None),
        ('{"not": {"type": "string"}}', "Unimplemented keys"),
        ('{"$ref": "https://schemas.invalid/other.json"}', "no grammar can be made"),
        ('{"enum": 3}', "no grammar can be made"),
        ("broken", "no grammar can be made"),
        ('{"type": "string", "title": 7}', "is no JSON schema: 7 is not of type 'string'"),
    ],
)
def test_schemas_that_cannot_be_measured_on(schema, why, grammars):
    said = refusal(schema, grammars)
    assert (said is None) if why is None else (why in (said or "")), said


def test_arms_hold_answers_to_their_schemas(tokens, grammars):
    """Each prompt to its own, over a batch; without grammars the same prompts are free."""
    target = tiny_target(vocab=len(tokens), seed=6, tied=False, spread=0.25)
    ends = frozenset({tokens.eos_token_id})
    target.model.generation_config.eos_token_id = tokens.eos_token_id
    prompts = [asked("one", SMALL), asked("two", SCHEMA), asked("another", None)]
    sampling = Sampling(3.0, seed=4)

    def counted(arm: Arm) -> tuple[list[list[int]], list[dict[str, Any]]]:
        ids = [answer.ids for answer in arm.answer(prompts, sampling, 60).answers]
        run = {"arm": "it", "temperature": 3.0, "prompts": [0, 1, 2], "ids": ids}
        return ids, validity([run], [p.schema for p in prompts], tokens, ends)

    held, count = counted(Arm(target, grammars=grammars))
    assert count == [{"arm": "it", "temperature": 3.0, "answers": 2, "ended": 2, "valid": 2}]
    drafted, _ = counted(Arm(target, Ngram(), grammars=grammars))
    assert drafted == held
    free, count = counted(Arm(target))
    assert count[0]["valid"] == 0
    assert free[2] == held[2]
    assert free[0] != held[0]


def test_every_baseline_is_held_to_schemas(grammars):
    arms = beside(tiny_target(), {"a": Ngram(), "b": TokenRecycling()}, grammars)
    assert set(arms) == {"a", f"b {COLD}", f"b {WARM}"}
    assert all(arm.grammars is grammars for arm in arms.values())
    assert [arm.warm for arm in arms.values()] == [False, False, True]


def test_counts_are_by_arm_and_temperature_over_prompts_with_a_schema(tokens):
    end = tokens.eos_token_id
    write = lambda text: tokens.encode(text, add_special_tokens=False)  # noqa: E731

    def run(arm: str, temperature: float, ids: dict[int, list[int]]) -> dict[str, Any]:
        return {
            "arm": arm, "temperature": temperature, "prompts": list(ids), "ids": list(ids.values()),
        }  # fmt: skip

    found = validity(
        [
            run("plain", 0.0, {0: [*write('"a"'), end], 1: [*write('{"size": 3}'), end]}),
            run("plain", 0.0, {0: [*write('"a"'), end], 2: [*write("anything"), end]}),
            run("plain", 0.0, {1: [*write('{"size": 3'), end]}),
            run("plain", 0.0, {1: write('{"size": 3}')}),  # cut by the limit
            run("plain", 1.0, {1: [*write('"a"'), end]}),  # another prompt's answer
            run("drafter", 0.0, {0: [*write("1"), end]}),
            run("drafter", 1.0, {2: [*write("1"), end]}),
        ],
        [SMALL, SCHEMA, None],
        tokens,
        frozenset({end}),
    )
    assert found == [
        {"arm": "plain", "temperature": 0.0, "answers": 5, "ended": 4, "valid": 3},
        {"arm": "plain", "temperature": 1.0, "answers": 1, "ended": 1, "valid": 0},
        {"arm": "drafter", "temperature": 0.0, "answers": 1, "ended": 1, "valid": 1},
    ]
    assert sentence(found[0]) == (
        "plain, T=0: 3 of 5 answers match their JSON schema, 1 did not end"
    )


def test_requests_keep_their_randomness(tokens, grammars):
    """A schema does not change whose numbers an answer is drawn with."""
    target = tiny_target(vocab=len(tokens), seed=6, tied=False, spread=0.25)
    target.model.generation_config.eos_token_id = tokens.eos_token_id
    arm, sampling = Arm(target, grammars=grammars), Sampling(1.0, seed=4)
    alone = arm.answer([asked("two", SCHEMA)], sampling, 30).answers[0].ids
    both = arm.answer([asked("one", SMALL), asked("two", SCHEMA)], sampling, 30).answers[1].ids
    assert alone == both

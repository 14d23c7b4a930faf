"""Structured output: every answer matches its schema, and drafts change nothing in what is said."""

import json
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch
from frequencies import g_test
from scripted import GREEDY, ids_of, random_lm
from tiny import tokenizer, write_texts
from toys import sharpen, tiny_target

sys.path.append(str(Path(__file__).parents[1] / "drafters"))  # families, made tiny

from contract import build

from decoding import loop
from decoding.constraint import Grammars, allowed_of, confined, pruned
from decoding.loop import Answer, decode
from decoding.round import Draft, Verdict
from decoding.sampling import Dice, Sampling, draw
from decoding.target import Target
from decoding.verify import Block, Chain, Rule
from drafters import heads, layer_skip, lm
from drafters.lm import LM
from drafters.ngram import Ngram

FLAT = {
    "type": "object",
    "properties": {
        "kind": {"enum": ["cat", "dog", "yellow bird"]},
        "legs": {"type": "integer", "minimum": 0, "maximum": 12},
    },
    "required": ["kind", "legs"],
    "additionalProperties": False,
}
LEGS = {"type": "object", "properties": {"legs": {"enum": [2, 4]}}, "additionalProperties": False}
LIST = {"type": "array", "items": {"enum": [1, 22, True, None]}, "minItems": 1, "maxItems": 4}
NESTED = {
    "type": "object",
    "properties": {
        "pets": {"type": "array", "items": LEGS, "minItems": 1, "maxItems": 2},
        "word": {"type": "string", "pattern": "^[a-c]{1,4}$"},
    },
    "required": ["pets"],
    "additionalProperties": False,
}
FORCED = {"const": {"name": "nothing to choose", "value": 7}}
SCHEMAS = [FLAT, LIST, NESTED, FORCED]
PROMPTS = [[5], [1, 2, 3, 4, 5, 6, 7], [9, 8, 9, 8, 9], [40, 41], [5, 6]]
SAMPLED = Sampling(temperature=1.0, seed=4)


@pytest.fixture(scope="module")
def tokens(tmp_path_factory) -> Any:
    return tokenizer(write_texts(tmp_path_factory.mktemp("text")))


@pytest.fixture(scope="module")
def grammars(tokens) -> Grammars:
    return Grammars(tokens)


@pytest.fixture(scope="module")
def target(tokens) -> Target:
    """More logits than the tokenizer has tokens, as padded models have."""
    return tiny_target(vocab=len(tokens) + 5, seed=6, tied=False, layers=7, spread=0.25)


@pytest.fixture(scope="module")
def answers(target, tokens, grammars):
    """Answers to the prompts, a schema each and none for the last."""

    def answer(drafter: Any, sampling: Sampling = GREEDY, **options: Any) -> list[Answer]:
        constraints = [*(grammars.json(json.dumps(schema)) for schema in SCHEMAS), None]
        options = {"max_new_tokens": 40, "constraints": constraints, **options}
        ends = frozenset({tokens.eos_token_id})
        return decode(
            target, drafter, PROMPTS, sampling=sampling, end_ids=ends, **options
        ).answers  # fmt: skip

    return answer


DYNAMIC = {"kind": "dynamic", "top_k": 4, "depth": 4, "nodes": 12}
STATIC = {"kind": "static", "paths": [[0], [1], [2], [0, 0], [0, 1], [1, 0], [0, 0, 0]]}
DRAFTERS: dict[str, Any] = {
    "lm": lambda target: random_lm(target, draft_length=4),
    "lm, stops": lambda target: random_lm(target, draft_length=6, stop_below=0.2),
    "lm, static": lambda target: random_lm(target, tree=STATIC),
    "target": lambda target: LM.around(target.model, draft_length=4),
    "ngram": lambda target: Ngram(longest=2, draft_length=5),
    "eagle": lambda target: build("eagle", target.shape),
    "eagle3, part of the vocabulary": lambda target: build("eagle3", target.shape, vocabulary=50),
    "medusa, static": lambda target: build("medusa", target.shape, tree=STATIC),
    "eagle, dynamic": lambda target: build("eagle", target.shape, tree=DYNAMIC),
    "token_recycling": lambda target: build("token_recycling", target.shape),
    "layer_skip": lambda target: build("layer_skip", target.shape),
}


def made(name: str, target: Target) -> Any:
    return DRAFTERS[name](target).double().eval()


@pytest.fixture(scope="module")
def greedy(answers) -> list[list[int]]:
    """Plain constrained decoding."""
    return [answer.ids for answer in answers(None)]


def test_plain_decoding_is_the_argmax_of_what_is_allowed(target, tokens, grammars, greedy):
    """Against whole forward passes, and a matcher that reads the answer anew for each token."""
    from llguidance import LLMatcher

    end, allowed_everywhere = tokens.eos_token_id, 0
    for prompt, schema, ids in zip(PROMPTS, SCHEMAS, greedy, strict=False):
        grammar = LLMatcher.grammar_from_json_schema(json.dumps(schema))
        for n, token in enumerate(ids):
            matcher = LLMatcher(grammars._tokens, grammar)
            assert n == 0 or matcher.consume_tokens(ids[:n])
            bits = matcher.compute_bitmask()
            fits = [t for t in range(len(tokens)) if bits[t // 8] >> t % 8 & 1 and t != end]
            fits += [end] if matcher.is_accepting() else []
            logits_V = target.logits(target(torch.tensor([prompt + ids[:n]])).hidden_BTD[0, -1])
            assert token == max(fits, key=lambda t: float(logits_V[t]))
            allowed_everywhere += token == int(logits_V.argmax())
    assert allowed_everywhere < sum(map(len, greedy)) / 2  # else the masks have done nothing


@pytest.mark.parametrize("name", DRAFTERS)
def test_greedy_answers_are_those_of_plain_decoding(name, target, answers, greedy):
    found = answers(made(name, target))
    assert [answer.ids for answer in found] == greedy
    if name == "target":
        assert sum(sum(answer.accepted) for answer in found) > 60


@pytest.mark.parametrize("limit", range(1, 9))
def test_answers_are_cut_anywhere(limit, target, answers, greedy):
    found = answers(made("lm", target), max_new_tokens=limit)
    assert [answer.ids for answer in found] == [ids[:limit] for ids in greedy]


@pytest.mark.parametrize("name", [None, "lm", "eagle3, part of the vocabulary", "eagle, dynamic"])
@pytest.mark.parametrize("sampling", [Sampling(3.0, seed=4), Sampling(2.0, top_k=40, top_p=0.95)])
def test_every_answer_that_ended_matches_its_schema(name, sampling, target, tokens, grammars):
    drafter = made(name, target) if name else None
    ends, n = frozenset({tokens.eos_token_id}), 6
    constraints: list[Any] = [grammars.json(json.dumps(s)) for s in SCHEMAS for _ in range(n)]
    out = decode(
        target, drafter, [[5, 6, k % n] for k in range(len(constraints))], sampling=sampling,
        end_ids=ends, max_new_tokens=80, constraints=constraints,
    )  # fmt: skip
    ended = Counter[int]()
    for k, answer in enumerate(out.answers):
        text = tokens.decode([t for t in answer.ids if t not in ends])
        if answer.ended:
            jsonschema.validate(json.loads(text), SCHEMAS[k // n])
            ended[k // n] += 1
        else:
            assert len(answer.ids) == 80
    assert all(ended[k] >= 2 for k in range(len(SCHEMAS))), ended


def test_one_hot_samples_are_those_of_plain_decoding(target, answers):
    due = [answer.ids for answer in answers(None, SAMPLED)]
    for name in ("ngram", "eagle, dynamic", "token_recycling"):
        assert [answer.ids for answer in answers(made(name, target), SAMPLED)] == due


def test_answers_without_a_constraint_are_untouched(target, tokens, answers):
    ends = frozenset({tokens.eos_token_id})
    for sampling in (Sampling(), SAMPLED):
        drafter = made("lm", target)
        due = decode(
            target, drafter, PROMPTS[-1:], sampling=sampling, end_ids=ends, max_new_tokens=40,
            requests=[len(PROMPTS) - 1],
        )  # fmt: skip
        assert answers(drafter, sampling)[-1].ids == ids_of(due)[0]


FORCED = ["lm", "eagle", "medusa, static", "eagle, dynamic", "layer_skip"]


@pytest.mark.parametrize("name", FORCED)
def test_what_is_forced_is_drafted_right(name, target, tokens, grammars, monkeypatch):
    """With the mask on q, too, no draft of a forced answer is wrong; without it hardly one is
    right."""
    constraint = grammars.json(json.dumps({"enum": ["abcdefghijklmnopqrstuvwxyz" * 2]}))

    def taken() -> tuple[int, int]:
        """Tokens drafted and tokens accepted; the last round may reach beyond the limit."""
        out = decode(
            target, made(name, target), [[5, 6]], sampling=Sampling(), max_new_tokens=40,
            end_ids=frozenset({tokens.eos_token_id}), constraints=[constraint],
        )  # fmt: skip
        (answer,) = out.answers
        return sum(answer.drafted[:-1]), sum(answer.accepted[:-1])

    drafted, accepted = taken()
    assert drafted == accepted > 26, "26 with the masks of one token instead of the path's"
    monkeypatch.setattr(heads, "confined", lambda growth: growth)
    monkeypatch.setattr(lm, "confined", lambda growth: growth)
    monkeypatch.setattr(layer_skip, "allowed", lambda logits_BMV, *_: logits_BMV)
    monkeypatch.setattr(loop, "pruned", lambda draft, dice: draft)
    drafted, accepted = taken()
    assert accepted < drafted - 20


# --- the law, by hand-written grammars over a handful of tokens ----------------------------------

V, END, TIGHT = 6, 5, 1e-6
TOY_PROMPTS = [[3], [2, 0, 2, 0, 2]]


def may_follow(said: tuple[int, ...]) -> list[bool]:
    """Forbids by the sum of what was said: two siblings never allow the same."""
    return [(t + sum(said)) % 3 != 1 for t in range(END)] + [sum(said) % 2 == 1]


MASKS = [torch.tensor(may_follow((s,))) for s in range(6)]  # all that sums can say


class ByHand:
    """Its own constraint and matcher. `advance` believes everything, so that a wrong decoder is
    found by what it says."""

    def __init__(self) -> None:
        self.said: tuple[int, ...] = ()

    def start(self, ends: frozenset[int]) -> "ByHand":
        assert ends == {END}
        return ByHand()

    def allowed(self, path: tuple[int, ...]) -> Any:
        for n, token in enumerate(path):
            if token == END or not may_follow(self.said + path[:n])[token]:
                return None
        return MASKS[sum(self.said + path) % 6]

    def advance(self, ids: list[int]) -> None:
        self.said += tuple(ids)


def law_of(target: Target, prompt: list[int], length: int) -> dict[tuple[int, ...], float]:
    """Every answer's probability: p where it may be, renormalised; an end ends it."""
    law: dict[tuple[int, ...], float] = {(): 1.0}
    for _ in range(length):
        longer: dict[tuple[int, ...], float] = {}
        for said, share in law.items():
            if END in said:
                longer[said] = share
                continue
            logits_V = target.logits(target(torch.tensor([prompt + list(said)])).hidden_BTD[0, -1])
            p_V = logits_V.softmax(-1) * torch.tensor(may_follow(said))
            for token, p in enumerate((p_V / p_V.sum()).tolist()):
                if p:
                    longer[(*said, token)] = share * p
        law = longer
    return law


@pytest.fixture(scope="module")
def toy() -> Target:
    return tiny_target(vocab=V, width=16, heads=2, seed=5, spread=0.35)


@pytest.fixture(scope="module")
def laws(toy) -> list[dict[tuple[int, ...], float]]:
    found = [law_of(toy, prompt, 4) for prompt in TOY_PROMPTS]
    assert all(sum(law.values()) == pytest.approx(1) for law in found)
    return found


def toy_lm(toy: Target, **drafting: Any) -> LM:
    with torch.random.fork_rng():
        torch.manual_seed(11)
        made = LM(toy.shape, **{"width": 64, "draft_length": 2, **drafting})
    return sharpen(made.double(), 6).eval()


def judged(toy: Target, laws: Any, drafter: Any, rule: Rule | None = None, n: int = 2_000) -> float:
    """G-test of the first four tokens, over at least two rounds, on the laws."""
    counts = [Counter[tuple[int, ...]]() for _ in TOY_PROMPTS]
    for begin in range(0, n, 1_000):
        numbers = list(range(begin, min(n, begin + 1_000)))
        out = decode(
            toy, drafter, [TOY_PROMPTS[i % 2] for i in numbers], sampling=Sampling(1.0),
            max_new_tokens=4, end_ids=frozenset({END}), rule=rule, requests=numbers,
            constraints=[ByHand()] * len(numbers),
        )  # fmt: skip
        for i, answer in zip(numbers, out.answers, strict=True):
            counts[i % 2][tuple(answer.ids)] += 1
    if any(said not in law for law, c in zip(laws, counts, strict=True) for said in c):
        return 0.0
    return g_test(
        [c[said] for law, c in zip(laws, counts, strict=True) for said in law],
        [p * c.total() for law, c in zip(laws, counts, strict=True) for p in law.values()],
        groups=2,
    )


TREES: dict[str, Any] = {
    "static": {"kind": "static", "paths": [[0], [1], [0, 0], [0, 1], [1, 0]]},
    "dynamic": {"kind": "dynamic", "top_k": 3, "depth": 2, "nodes": 7},
    "branching": {"kind": "branching", "branching": [3, 2]},
    "beams": {"kind": "beams", "width": 3, "depth": 2},
}
WAYS: dict[str, Any] = {
    "plain": lambda toy: (None, None),
    "chain": lambda toy: (toy_lm(toy), Chain()),
    "block": lambda toy: (toy_lm(toy), Block()),
    "block, stops": lambda toy: (toy_lm(toy, stop_below=0.4), Block()),
    "ngram": lambda toy: (Ngram(longest=2, draft_length=3), None),
    **{kind: lambda toy, tree=tree: (toy_lm(toy, tree=tree), None) for kind, tree in TREES.items()},
}


def test_one_hot_drafts_lose_what_is_forbidden_and_all_below_it():
    sampling = Sampling(matchers={7: ByHand()})
    ids = torch.tensor([[2, 1, 0, 0, 2, 2]] * 2)  # forbidden: 1; 2 after 2, and after 2, 0
    parents = torch.tensor([[-1, -1, 1, 0, 0, 3]] * 2)
    found = pruned(Draft(ids, parents, [6, 4]), Dice(sampling, [7, 8], [3, 3]))
    assert found.size == [2, 4], "request 8 may say anything"
    assert found.ids_BN[0, :2].tolist() == [2, 0]
    assert found.parents_BN[0, :2].tolist() == [-1, 0]
    assert (found.ids_BN[1, :4].tolist(), found.parents_BN[1].tolist()) == (
        [2, 1, 0, 0], [-1, -1, 1, 0, 0, 3],
    )  # fmt: skip
    chain = pruned(Draft.chain(torch.tensor([[2, 2, 0]]), [3]), Dice(sampling, [7], [3]))
    assert (chain.size, chain.is_chain) == ([1], True)
    sampled = Draft.chain(torch.tensor([[1]]), [1], "iid", torch.ones(1, 1, V) / V)
    assert pruned(sampled, Dice(sampling, [7], [3])) is sampled, "its law says how it was drawn"


@pytest.mark.parametrize("way", WAYS)
def test_joint_law(way, toy, laws):
    p = judged(toy, laws, *WAYS[way](toy))
    assert p > TIGHT, f"G-test p {p:.2g}"


@pytest.mark.parametrize("way", ["chain", "branching"])
def test_joint_law_of_drafts_that_know_no_grammar(way, toy, laws, monkeypatch):
    monkeypatch.setattr(lm, "confined", lambda growth: growth)
    p = judged(toy, laws, *WAYS[way](toy))
    assert p > TIGHT, f"G-test p {p:.2g}"


def only_the_root(scored, draft, dice):
    masked = allowed_of(scored, draft, dice).logits_BMV
    mixed_BMV = scored.logits_BMV.clone()
    mixed_BMV[:, 0] = masked[:, 0]
    return replace(scored, logits_BMV=mixed_BMV)


def of_the_node_before(scored, draft, dice):
    """Masks follow the order of the nodes and not their parents."""
    N = draft.ids_BN.shape[1]
    chain = replace(draft, parents_BN=torch.arange(-1, N - 1).expand_as(draft.ids_BN))
    return allowed_of(scored, chain, dice)


def of_the_parent(scored, draft, dice):
    """Each node has its parent's mask: what was drafted there is not told to the grammar."""
    masked_BMV = allowed_of(scored, draft, dice).logits_BMV
    up_BM = torch.cat([torch.zeros(len(draft.size), 1).long(), draft.parents_BN + 1], dim=1)
    forbidden = (masked_BMV == -torch.inf).gather(1, up_BM[..., None].expand_as(masked_BMV))
    return replace(scored, logits_BMV=scored.logits_BMV.masked_fill(forbidden, -torch.inf))


@pytest.mark.parametrize(
    ("wrong", "way"),
    [
        (only_the_root, "block"),
        (only_the_root, "ngram"),
        (of_the_node_before, "branching"),
        (of_the_node_before, "static"),
        (of_the_parent, "chain"),
        (of_the_parent, "dynamic"),
    ],
)
def test_wrong_masks_fail(wrong, way, toy, laws, monkeypatch):
    monkeypatch.setattr(loop, "allowed_of", wrong)
    p = judged(toy, laws, *WAYS[way](toy))
    assert p < TIGHT, f"a wrong mask passed with G-test p {p:.2g}"


class MasksAfterwards(Rule):
    """Verifies without the grammar, and mends what was said: forbidden drafts go, and the token
    after them is drawn from what is allowed. Every answer is then valid, and the law is wrong."""

    name, lossless, laws = "masks afterwards", True, frozenset({"iid"})

    def _verify(self, logits_BMV, draft, dice) -> Verdict:
        verdict = Chain()._verify(self.raw, draft, dice)
        law_BMV = dice.sampling.law(logits_BMV)
        following = []
        for b, path in enumerate(verdict.path):
            fits = [law_BMV[b, n, draft.ids_BN[b, n]] > 0 for n in path]
            del path[([*fits, False]).index(False) :]
            law_V, u = law_BMV[b, len(path)], dice.next(torch.tensor([[len(path)]]))[0, 0]
            fine = len(path) == len(fits) and law_V[verdict.next[b]] > 0
            following.append(verdict.next[b] if fine else int(draw(law_V, u)))
        return Verdict(verdict.path, following)


def test_masking_after_verification_fails(toy, laws, monkeypatch):
    rule = MasksAfterwards()

    def noting(scored, draft, dice):
        rule.raw = scored.logits_BMV
        return allowed_of(scored, draft, dice)

    monkeypatch.setattr(loop, "allowed_of", noting)
    monkeypatch.setattr(lm, "confined", lambda growth: growth)
    p = judged(toy, laws, toy_lm(toy), rule, n=3_000)
    assert p < TIGHT, f"a wrong rule passed with G-test p {p:.2g}"


# --- what is refused -----------------------------------------------------------------------------


def test_schemas_that_cannot_be_followed_are_refused(grammars):
    for schema, why in (
        ('{"not": {"type": "string"}}', 'Unimplemented keys: \\["not"\\]'),
        ('{"type": "strin"}', "Invalid type: strin"),
        ("false", "Unsatisfiable"),
        ("no JSON", "no grammar can be made of the JSON schema 'no JSON'"),
    ):
        with pytest.raises(ValueError, match=why):
            grammars.json(schema)


def test_a_schema_is_compiled_once_and_serves_many(grammars):
    constraint = grammars.json('{"const": "ab"}')
    assert grammars.json('{"const": "ab"}') is constraint
    ends = frozenset({0})
    first, second = constraint.start(ends), constraint.start(ends)
    begin = [int(t) for t in first.allowed(()).nonzero()[:1]]
    first.advance(begin)
    assert not torch.equal(first.allowed(()), second.allowed(()))
    assert torch.equal(first.allowed(()), second.allowed(tuple(begin)))
    with pytest.raises(ValueError, match="no token to go on with"):
        second.advance([int((~second.allowed(())).nonzero()[0])])


def test_constraints_that_do_not_fit_the_prompts_are_refused(target, grammars):
    def ask(constraints: list[Any], **options: Any) -> None:
        options = {
            "sampling": Sampling(),
            "max_new_tokens": 2,
            "constraints": constraints,
        } | options
        decode(target, None, [[1], [2]], **options)

    constraint = grammars.json("{}")
    with pytest.raises(ValueError, match="2 prompts came with 1 constraints"):
        ask([constraint], end_ids=frozenset({0}))
    with pytest.raises(ValueError, match="there is no end id"):
        ask([constraint, None], end_ids=frozenset())


def test_slow_tokenizers_are_refused():
    with pytest.raises(ValueError, match="is a str; structured output needs a fast"):
        Grammars("words")


def test_matchers_are_no_part_of_what_sampling_is_compared_by():
    one = confined(SAMPLED, [ByHand()], [7], frozenset({END}))
    assert one == SAMPLED
    assert list(one.matchers) == [7]
    assert confined(SAMPLED, [None], [7], frozenset()) is SAMPLED
    assert isinstance(Dice(one, [7], [1]).sampling.matchers[7], ByHand)

"""What is emitted follows the target's law: exactly on toy models, statistically on real ones.

Wrong rules run through the same machinery and must fail; a suite that cannot fail them is void.
"""

import numpy as np
import pytest
import torch
from frequencies import g_test, p_value
from law import (
    Branches,
    Enumerator,
    TableLM,
    TableTarget,
    distance,
    joint,
    product,
    reference_law,
    tables,
)
from toys import sharpen, tiny_target
from wrong import (
    AcceptsByP,
    BlockForgetsWeight,
    DrawsArgmax,
    DrawsCooler,
    DrawsTopTwo,
    DropsTrigger,
    KeyedByPosition,
    ResamplesFromP,
    SamePosition,
    SharedPurposes,
    SoftmaxOfResidual,
)

from decoding.loop import decode
from decoding.sampling import Sampling
from decoding.verify import Block, Chain, OneHot
from drafters.lm import LM
from drafters.ngram import Ngram

V, GAMMA = 5, 2
SAMPLED = Sampling(temperature=1.0)


class TableDrawsArgmax(DrawsArgmax, TableLM): ...


class TableDrawsCooler(DrawsCooler, TableLM): ...


class TableDrawsTopTwo(DrawsTopTwo, TableLM): ...


class TableDropsTrigger(DropsTrigger, TableLM): ...


class LMDrawsArgmax(DrawsArgmax, LM): ...


class LMDrawsCooler(DrawsCooler, LM): ...


class LMDrawsTopTwo(DrawsTopTwo, LM): ...


class LMDropsTrigger(DropsTrigger, LM): ...


def worst(rule, family=TableLM, sampling=SAMPLED, **drafting) -> float:
    """The largest total variation over contexts between p^L, L = G + 2, and what is emitted."""
    p_VV, q_VV = tables(V)
    drafter = family(q_VV, draft_length=GAMMA, **drafting)
    rounds = Enumerator(TableTarget(p_VV), drafter, rule, sampling).round(list(range(V)))
    for law in rounds.values():
        assert sum(law.values()) == pytest.approx(1, abs=1e-11)
    law_VV = reference_law(p_VV, sampling)
    return max(
        distance(joint(rounds, c, GAMMA + 2), product(law_VV, c, GAMMA + 2)) for c in range(V)
    )


@pytest.mark.parametrize(
    ("rule", "drafting", "sampling"),
    [
        (Chain(), {}, SAMPLED),
        (Block(), {}, SAMPLED),
        (OneHot(), {"sample": False}, SAMPLED),
        (Chain(), {"stop_below": 0.3}, SAMPLED),
        (Block(), {"stop_below": 0.3}, SAMPLED),
        (Chain(), {}, Sampling(temperature=0.7, top_k=3)),
        (Block(), {}, Sampling(temperature=1.4, top_p=0.8)),
    ],
    ids=lambda value: value.name if hasattr(value, "name") else None,
)
def test_exact(rule, drafting, sampling):
    """Every rule's arithmetic, over at least two rounds, with filters and confidence stops."""
    assert worst(rule, sampling=sampling, **drafting) < 1e-12


@pytest.mark.parametrize(
    ("rule", "family", "drafting", "at_least"),
    [
        (ResamplesFromP(), TableLM, {}, 0.05),
        (SoftmaxOfResidual(), TableLM, {}, 0.1),
        (BlockForgetsWeight(), TableLM, {}, 0.002),
        (Chain(), TableDrawsArgmax, {}, 0.5),
        (Block(), TableDrawsArgmax, {}, 0.5),
        (Chain(), TableDrawsCooler, {}, 0.05),
        (Chain(), TableDrawsTopTwo, {}, 0.3),
        (Chain(), TableDropsTrigger, {"stop_below": 0.3}, 0.1),
        (Block(), TableDropsTrigger, {"stop_below": 0.3}, 0.1),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else None,
)
def test_wrong_rules_are_far_from_exact(rule, family, drafting, at_least):
    assert worst(rule, family, **drafting) > at_least


@pytest.mark.parametrize("rule", [Chain(), Block()], ids=["chain", "block"])
def test_thresholds_are_the_papers(rule):
    """A rule can be exact and accept too little: its acceptance tests are the published ones."""
    p_VV, q_VV = tables(V)
    length = 3
    machine = Enumerator(TableTarget(p_VV), TableLM(q_VV, draft_length=length), rule, SAMPLED)
    rng = np.random.default_rng(0)

    R = 60
    uniforms = [torch.from_numpy(rng.random((R, n))) for n in (length, length, length + 1)]
    branches = Branches(torch.arange(R) % V, uniforms, torch.ones(R))
    found = machine.thresholds(branches).numpy()
    p, q = reference_law(p_VV, SAMPLED), reference_law(q_VV, SAMPLED)
    for r, drafted in enumerate(machine._draft(branches).ids_BN.tolist()):
        before = [r % V, *drafted]
        ratio = [p[a, x] / q[a, x] for a, x in zip(before, drafted, strict=False)]
        if rule.name == "chain":
            due = np.minimum(1, ratio)
        else:
            due, pi = np.zeros(length), 1.0
            for i, x in enumerate(drafted):
                pi = min(1.0, pi * ratio[i])
                surplus = np.maximum(pi * p[x] - q[x], 0).sum()
                due[i] = pi if i == length - 1 else surplus / (surplus + 1 - pi)
        # what stands before a certain success is never asked (in a chain: all are asked in order)
        asked = [rule.name == "chain" or max(due[i + 1 :], default=0) < 1 for i in range(length)]
        np.testing.assert_allclose(found[r][asked], due[asked], atol=1e-12)


def test_block_accepts_no_fewer_tokens_than_chain():
    p_VV, q_VV = tables(V)
    mean = {}
    for rule in (Chain(), Block()):
        machine = Enumerator(TableTarget(p_VV), TableLM(q_VV, draft_length=3), rule, SAMPLED)
        (law,) = machine.round([0]).values()
        mean[rule.name] = sum(len(block) * weight for block, weight in law.items())
        # and with three drafted tokens the block's own law, extended by p, is p^4
        p = reference_law(p_VV, SAMPLED)
        whole: dict[tuple[int, ...], float] = {}
        for block, weight in law.items():
            for tail, share in product(p, block[-1], 4 - len(block)).items():
                whole[block + tail] = whole.get(block + tail, 0) + weight * share
        assert distance(whole, product(p, 0, 4)) < 1e-12
    assert mean["block"] > mean["chain"] + 1e-3


def surplus(rule, family=TableLM, rows: int = 40, rounds: int = 100) -> float:
    """Tokens accepted in real decoding beyond those due, in standard deviations: what is drafted
    after x stands with probability sum min(p, q) of the laws after x."""
    p_VV, q_VV = tables(V)
    overlap_V = np.minimum(reference_law(p_VV, SAMPLED), reference_law(q_VV, SAMPLED)).sum(-1)
    out = decode(
        TableTarget(p_VV), family(q_VV, draft_length=3), [[b % V] for b in range(rows)],
        sampling=SAMPLED, max_new_tokens=4 * rounds, rule=rule,
    )  # fmt: skip
    taken, asked = 0, []
    for b, answer in enumerate(out.answers):
        context, at = [b % V, *answer.ids], 0
        for accepted in answer.accepted[:rounds]:  # the limit cuts none of these
            asked += context[at : at + min(accepted + 1, 3)]
            taken, at = taken + accepted, at + accepted + 1
    due = overlap_V[asked]
    return float((taken - due.sum()) / np.sqrt((due * (1 - due)).sum()))


def test_a_chain_accepts_what_its_laws_have_in_common():
    assert abs(surplus(Chain())) < 4
    assert surplus(AcceptsByP()) < -8
    assert abs(surplus(Chain(), TableDrawsArgmax)) > 8


def test_drafts_of_a_law_that_a_rule_is_not_exact_for_are_refused():
    p_VV, q_VV = tables(V)
    machine = Enumerator(TableTarget(p_VV), TableLM(q_VV, sample=False), Chain(), SAMPLED)
    with pytest.raises(AssertionError, match="chain is not exact for drafts of law one_hot"):
        machine.round([0])


def test_g_test_sees_what_it_must():
    """The judge itself: fair counts pass, a shift of 3 % and an impossible token do not."""
    rng = np.random.default_rng(1)
    law = rng.dirichlet(np.full(300, 0.7))
    n = 20_000
    fair = rng.multinomial(n, law)
    assert g_test(fair.tolist(), (n * law).tolist()) > 1e-3
    other = 0.9 * law + 0.1 * rng.dirichlet(np.full(300, 0.7))
    assert g_test(rng.multinomial(n, other).tolist(), (n * law).tolist()) < 1e-6
    assert g_test([10, 10, 1], [10.5, 10.5, 0.0]) == 0.0


# --- through decode(), with real models and caches ---------------------------------------------

PROMPTS = [[3], [2, 0, 2, 0, 2]]  # two lengths: ragged caches from the start
TIGHT = 1e-6


@pytest.fixture(scope="module")
def target():
    return tiny_target(vocab=6, width=16, heads=2, seed=5, spread=0.35)


@pytest.fixture(scope="module")
def drafter(target):
    def make(family=LM, **drafting):
        with torch.random.fork_rng():
            torch.manual_seed(11)
            lm = family(target.shape, **{"width": 64, "draft_length": GAMMA, **drafting})
        return sharpen(lm.double(), 6).eval()

    return make


@pytest.mark.parametrize(
    ("rule", "drafting", "sampling"),
    [
        (Chain(), {}, SAMPLED),
        (Block(), {}, SAMPLED),
        (Chain(), {"stop_below": 0.25}, Sampling(1.0, seed=1)),
        (Block(), {"stop_below": 0.25}, Sampling(1.0, seed=2)),
        (OneHot(), {"sample": False}, Sampling(1.0, seed=3)),
        (Chain(), {}, Sampling(0.7, top_k=4, seed=4)),
        (Block(), {}, Sampling(1.3, top_p=0.85, seed=5)),
        (Block(), {}, Sampling(0.8, top_k=5, top_p=0.9, seed=6)),
    ],
    ids=["chain", "block", "chain-stop", "block-stop", "one-hot", "top-k", "top-p", "both"],
)
def test_joint_law(target, drafter, rule, drafting, sampling):
    p = p_value(target, drafter(**drafting), PROMPTS, sampling, rule=rule)
    assert p > TIGHT, f"G-test p {p:.2g}"


def test_joint_law_of_lookups(target):
    p = p_value(target, Ngram(longest=2, draft_length=3), PROMPTS, SAMPLED, length=5)
    assert p > TIGHT, f"G-test p {p:.2g}"


def test_joint_law_of_plain_decoding(target):
    assert p_value(target, None, PROMPTS, SAMPLED) > TIGHT


@pytest.mark.parametrize(
    ("rule", "family", "drafting"),
    [
        (ResamplesFromP(), LM, {}),
        (SoftmaxOfResidual(), LM, {}),
        (Chain(), LMDrawsArgmax, {}),
        (Chain(), LMDrawsCooler, {}),
        (Block(), LMDrawsTopTwo, {}),
        (Block(), LMDropsTrigger, {"stop_below": 0.25}),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else None,
)
def test_wrong_rules_fail(target, drafter, rule, family, drafting):
    p = p_value(target, drafter(family, **drafting), PROMPTS, SAMPLED, rule=rule)
    assert p < TIGHT, f"a wrong rule passed with G-test p {p:.2g}"


@pytest.mark.parametrize(
    ("wrong", "drafting", "size"),
    [
        (SharedPurposes, {}, {}),
        (SamePosition, {}, {}),
        (KeyedByPosition, {"draft_length": 3}, {"n": 24_000, "length": 3}),
    ],
)
def test_reused_randomness_fails(target, drafter, wrong, drafting, size):
    """Marginals of single tokens stay right when a number decides twice: the joint law shows it."""
    numbers = wrong(temperature=1.0)
    p = p_value(target, drafter(**drafting), PROMPTS, numbers, rule=Block(), **size)
    assert p < TIGHT, f"reused numbers passed with G-test p {p:.2g}"

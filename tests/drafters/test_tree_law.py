"""Trees: what is emitted follows the target's law. Wrong rules run through the same tests and must
fail them.
"""

import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from contract import build
from growing import Grower, paths
from torch import Tensor
from toys import sharpen, tiny_target

sys.path.append(str(Path(__file__).parents[1] / "decoding"))  # the law and its judges

from frequencies import p_value
from law import Branches, Enumerator, TableTarget, bisect, distance, product, reference_law, tables

from decoding import verify
from decoding.sampling import Sampling
from decoding.target import TargetOut
from decoding.verify import Rule, Typical, WithoutReplacement
from drafters.trees import Beams, Branching, Dynamic, Static, Tree

V, SEED = 5, 14  # tables on which a rule that forgets to update q is far from exact
PROMPTS = [[0], [1, 0, 1, 0, 4]]  # that end in its worst contexts, at two lengths
SAMPLED, TIGHT = Sampling(temperature=1.0), 1e-6
DRAWN = {"branching": Branching([4, 2]), "beams": Beams(width=4, depth=2)}
ONE_HOT = {
    "static": Static([[0], [1], [2], [0, 0], [0, 1], [1, 0]]),
    "dynamic": Dynamic(top_k=3, depth=2, nodes=7),
}
TREES: dict[str, Tree] = DRAWN | ONE_HOT


class Table(TableTarget):
    """The table as a whole model: `exact_law` asks for states of sequences."""

    def forward(self, ids_BT: Tensor, **_: Any) -> TargetOut:
        return TargetOut(ids_BT[..., None])

    def logits(self, hidden: Tensor) -> Tensor:
        return self.table[hidden[..., 0]]


def judged(kind: str, n: int, sampling: Sampling = SAMPLED, rule: Rule | None = None) -> float:
    """G-test of so many tokens that they are at least two rounds."""
    p_VV, q_VV = tables(V, SEED)
    drafter, length = Grower(TREES[kind], q_VV), TREES[kind].depth + 2
    return p_value(Table(p_VV), drafter, PROMPTS, sampling, rule=rule, n=n, length=length)


@pytest.mark.parametrize("kind", TREES)
@pytest.mark.parametrize(
    ("sampling", "n"),
    [
        (SAMPLED, 20_000),
        (Sampling(0.7, top_k=2, seed=1), 4_000),  # more children than tokens that they can be
        (Sampling(1.5, top_p=0.6, seed=2), 4_000),
        (Sampling(1.3, top_k=4, top_p=0.9, seed=3), 4_000),
    ],
    ids=["plain", "top-k", "top-p", "both"],
)
def test_joint_law(kind, sampling, n):
    p = judged(kind, n if kind in DRAWN else 4_000, sampling)
    assert p > TIGHT, f"G-test p {p:.2g}"


attempt = verify._try


def keeps_q(children, ids, u, p_V, q_V):
    """q of draws with replacement: each sibling is tried as if it were the first."""
    for n in children:
        found, p_V = attempt([n], ids, u, p_V, q_V)
        if found is not None:
            return found, p_V
    return None, p_V


def likeliest_first(children, ids, u, p_V, q_V):
    return attempt(sorted(children, key=lambda n: -q_V[ids[n]]), ids, u, p_V, q_V)


def keeps_p(children, ids, u, p_V, q_V):
    """After a rejection p is still p: not the residual, neither for siblings nor at the end."""
    for n in children:
        if attempt([n], ids, u, p_V, q_V)[0] is not None:
            return n, p_V
        q_V = q_V.index_fill(0, torch.tensor([ids[n]]), 0.0)
        q_V = q_V / q_V.sum()
    return None, p_V


WRONG = {keeps_q: 20_000, likeliest_first: 3_000, keeps_p: 6_000}


@pytest.mark.parametrize("kind", DRAWN)
@pytest.mark.parametrize(("wrong", "n"), WRONG.items())
def test_wrong_rules_fail(monkeypatch, kind, wrong, n):
    monkeypatch.setattr(verify, "_try", wrong)
    p = judged(kind, n)
    assert p < TIGHT, f"a wrong rule passed with G-test p {p:.2g}"


@pytest.mark.parametrize("kind", TREES)
def test_typical_acceptance_is_lossy_and_says_so(kind):
    assert not Typical.lossless
    assert WithoutReplacement.lossless
    assert judged(kind, 1_000, rule=Typical()) < TIGHT


class TreeEnumerator(Enumerator):
    """The enumeration for trees, whose nodes are tried in their order."""

    def _accept(self, branches: Branches) -> Branches:
        for i in range(self.length):
            branches = self._try_node(branches, i)
        return branches

    def _try_node(self, branches: Branches, i: int) -> Branches:
        draft, R = self._draft(branches), len(branches.context)
        due = [paths(draft, b)[i] for b in range(R)]

        def rejected(u: Tensor) -> Tensor:
            branches.uniforms[1][:, i] = u
            pairs = zip(due, self._play(branches), strict=True)
            return torch.tensor([block[:-1][: len(path)] != path for path, block in pairs])

        limit_R = bisect(rejected, R)
        out = branches.take(torch.arange(R).repeat(2))
        out.uniforms[1][:, i] = torch.cat([limit_R / 2, (1 + limit_R) / 2])
        share_R = torch.cat([limit_R, 1 - limit_R])
        out.weight *= share_R
        return out.take((share_R > 1e-13).nonzero()[:, 0])


def off(branching: list[int], sampling: Sampling, seed: int = SEED, context: int = 0) -> float:
    """Total variation between p^L and a block that a tree begins, extended with p."""
    p_VV, q_VV = tables(V, seed)
    drafter: Any = Grower(Branching(branching), q_VV)
    machine = TreeEnumerator(TableTarget(p_VV), drafter, WithoutReplacement(), sampling)
    p, L = reference_law(p_VV, sampling), len(branching) + 2
    (law,) = machine.round([context]).values()
    whole: Counter[tuple[int, ...]] = Counter()
    for block, weight in law.items():
        for tail, share in product(p, block[-1], L - len(block)).items():
            whole[block + tail] += weight * share
    assert sum(law.values()) == pytest.approx(1, abs=1e-11)
    return distance(whole, product(p, context, L))


@pytest.mark.parametrize(
    ("branching", "sampling", "where"),
    [
        ([3], SAMPLED, {}),
        ([1, 2], SAMPLED, {}),
        ([3], Sampling(0.7, top_k=2), {}),
        # q has two tokens and p two others, of which one is what an exhausted draw returns
        ([3], Sampling(1.0, top_p=0.6), {"seed": 4, "context": 2}),
    ],
    ids=["plain", "two levels", "top-k", "exhausted"],
)
def test_exact(branching, sampling, where):
    """All draws, acceptances and successors of the real code, with their exact probabilities."""
    assert off(branching, sampling, **where) < 1e-12


@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_rules_are_far_from_exact(monkeypatch, wrong):
    monkeypatch.setattr("law.BISECTIONS", 20)
    monkeypatch.setattr(verify, "_try", wrong)
    assert off([3], SAMPLED) > 0.01


# --- with real models and caches -----------------------------------------------------------------

REAL = {
    "branching": {"kind": "branching", "branching": [3, 2]},
    "beams": {"kind": "beams", "width": 3, "depth": 2},
}


@pytest.mark.parametrize("kind", REAL)
def test_joint_law_of_a_real_model(kind):
    """Paths with gaps leave the target's cache and the drafter's features as a chain would."""
    target = tiny_target(vocab=6, width=16, heads=2, seed=5, spread=0.35)
    drafter = sharpen(build("eagle", target.shape, tree=REAL[kind]).double(), 2).eval()
    p = p_value(target, drafter, [[3, 1], [2, 0, 2, 0, 2]], SAMPLED, n=2_000)
    assert p > TIGHT, f"G-test p {p:.2g}"

"""Trees: each kind grows as its paper says, over any drafter, and the answers stay the target's.

Wrong draws and masks run through the same tests and must fail them.
"""

import itertools
import sys
from collections import Counter
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from contract import TRAINED, arguments, build, teacher_forced
from growing import Grower, Lookup, Noting, after, grown, paths
from torch import Tensor
from toys import sharpen, tiny_target

sys.path.append(str(Path(__file__).parents[1] / "decoding"))  # the law and its judges

from frequencies import g_test
from law import tables

from decoding.loop import decode
from decoding.sampling import Dice, Sampling
from decoding.target import Target
from drafters import lm, trees
from drafters.heads import Heads
from drafters.lm import LM
from drafters.trees import Beams, Branching, Dynamic, Static, tree_of
from train.compose import find

PROMPTS = [[5, 3], [1, 2, 3, 4, 5, 6, 7], [9, 8, 9, 8, 9]]
GREEDY, SAMPLED, TIGHT = Sampling(), Sampling(temperature=1.0), 1e-6
PLACES = [[0], [1], [2], [0, 0], [0, 1], [1, 0], [0, 1, 0]]
ONE_HOT = ("static", "dynamic")
DRAWN = ("branching", "beams")
GROWING = [f for f in TRAINED if "checkpoint" not in arguments(f)]  # one of each way to read
LMS = {f for f in TRAINED if issubclass(find(arguments(f)["_target_"], f), LM)}
TREES = {
    "static": {"kind": "static", "paths": PLACES},
    "dynamic": {"kind": "dynamic", "top_k": 3, "depth": 4, "nodes": 9},
    "branching": {"kind": "branching", "branching": [3, 2, 1]},
    "beams": {"kind": "beams", "width": 3, "depth": 4},
}


def ids_of(
    target, drafter, prompts=PROMPTS, sampling=GREEDY, end=None, **options
) -> list[list[int]]:
    ends = frozenset() if end is None else frozenset({end})
    options = {"max_new_tokens": 13, "end_ids": ends, **options}
    return [a.ids for a in decode(target, drafter, prompts, sampling=sampling, **options).answers]


def informed(target: Target, kind: str, sampling: Sampling) -> Grower:
    """A random table in which the target's own next token is one of the better guesses."""
    vocab = target.shape.vocab_size
    table_VV = torch.randn(vocab, vocab, generator=torch.Generator().manual_seed(0)).double()
    for prompt, answer in zip(PROMPTS, ids_of(target, None, sampling=sampling), strict=True):
        for a, b in itertools.pairwise([prompt[-1], *answer]):
            table_VV[a, b] += 2.5
    tree = tree_of(TREES[kind])
    assert tree is not None
    return Grower(tree, table_VV)


@pytest.mark.parametrize("family", ["table", "eagle", "lm"])
@pytest.mark.parametrize("kind", TREES)
def test_answers_are_the_targets_own(target, family, kind):
    """Greedily with every tree, and when sampling with trees that are a function of the prefix:
    the target's draws are keyed by position, so that the answer is plain sampling's."""
    for sampling in (GREEDY, SAMPLED) if kind in ONE_HOT else (GREEDY,):
        drafter: Any = informed(target, kind, sampling)
        if family != "table":
            drafter = build(family, target.shape, tree=TREES[kind]).double().eval()
        truth = ids_of(target, None, sampling=sampling)
        assert len(set(truth[0])) > 6, "a constant answer proves nothing"
        assert ids_of(target, drafter, sampling=sampling) == truth


@pytest.mark.parametrize("kind", TREES)
def test_an_end_at_every_offset(target, kind):
    """Wherever on an accepted path an end falls, nothing stands behind it."""
    truth, drafter = ids_of(target, None), informed(target, kind, GREEDY)
    out = decode(target, drafter, PROMPTS, sampling=GREEDY, max_new_tokens=13, end_ids=frozenset())
    assert {n for answer in out.answers for n in answer.accepted} >= {0, 1, 2}
    lengths = set()
    for end in {token for ids in truth for token in ids}:
        due = [ids[: ids.index(end) + 1] if end in ids else ids for ids in truth]
        assert ids_of(target, drafter, end=end) == due
        lengths |= {len(ids) for ids in due}
    assert len(lengths) > 8


@pytest.mark.parametrize("kind", DRAWN)
def test_drawn_trees_do_not_depend_on_the_batch(target, kind):
    drafter = build("eagle", target.shape, tree=TREES[kind]).double().eval()
    together = ids_of(target, drafter, sampling=SAMPLED)
    for number, prompt in enumerate(PROMPTS):
        assert ids_of(target, drafter, [prompt], SAMPLED, requests=[number]) == [together[number]]


class Exact(Sampling):
    """Laws in float64, so that they can be compared to 1e-9."""

    def law(self, logits: Tensor) -> Tensor:
        return (logits / self.temperature).softmax(-1)


def furthest(family: str, kind: str) -> float:
    """The largest gap between the law that a node's children were drawn from and the one that
    training judges behind its path alone, over the rounds of a ragged batch."""
    target = tiny_target(vocab=17, seed=5, spread=0.25, tied=False)
    drafter = sharpen(build(family, target.shape, tree=TREES[kind]).double(), 2).eval()
    assert isinstance(drafter, Heads | LM)
    assert drafter.tree is not None
    noting = drafter.tree = Noting(drafter.tree)
    out = decode(
        target, drafter, PROMPTS, sampling=Exact(1.0), max_new_tokens=24, end_ids=frozenset()
    )
    assert {n for answer in out.answers for n in answer.accepted} >= {0, 1, 2}
    gap = 0.0
    for dice, draft in noting.rounds:
        assert draft.q_BMV is not None
        for b, (request, length) in enumerate(zip(dice.requests, dice.starts, strict=True)):
            committed = (PROMPTS[request] + out.answers[request].ids)[:length]
            for node, path in enumerate([(), *paths(draft, b)][: draft.q_BMV.shape[1]]):
                ids = [*committed, *path]
                heads = teacher_forced(drafter, [*ids, 0, 0, 0, 0], target)
                rows = heads[0 if family in LMS else len(path)]
                due_V = rows[len(ids)].softmax(-1)
                gap = max(gap, (draft.q_BMV[b, node] - due_V).abs().max().item())
    return gap


@pytest.mark.parametrize(
    ("family", "kind"),
    [("eagle", "branching"), ("lm", "branching"), *((family, "beams") for family in GROWING)],
)
def test_a_node_sees_its_own_path(family, kind):
    """U9 for the drafter: what the cache's scratch slots hold of other paths stays unseen."""
    assert furthest(family, kind) < 1e-9


def test_attention_to_other_paths_is_noticed(monkeypatch):
    reach = Heads.reach
    monkeypatch.setattr(Heads, "reach", lambda *a: torch.ones_like(reach(*a)))
    assert furthest("eagle", "branching") > 1e-4


def test_a_tree_of_an_lm_that_sees_other_paths_is_noticed(monkeypatch):
    above = lm.above
    monkeypatch.setattr(lm, "above", lambda *a: torch.ones_like(above(*a)))
    assert furthest("lm", "branching") > 1e-4


# --- how each kind grows -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def table_VV() -> Tensor:
    return tables(12)[1]


def test_static_places_nodes_by_rank(table_VV):
    """Whatever the order of the configuration."""
    places = [(0, 2, 1), (1, 1), (0,), (1,), (0, 2), (0, 0)]
    draft = grown(Static([list(place) for place in places]), table_VV, list(range(12)))
    for root in range(12):
        ranks = [
            tuple(
                after(table_VV, root, path[:i]).argsort(descending=True).tolist().index(token)
                for i, token in enumerate(path)
            )
            for path in paths(draft, root)
        ]
        assert sorted(ranks) == sorted(places)


@pytest.mark.parametrize(
    ("tree", "words"),
    [
        ({"kind": "static", "paths": [[0], [1, 0, 2]]}, r"its parent; \[1, 0, 2\] has none"),
        ({"kind": "static", "paths": []}, "needs paths of ranks from 0"),
        ({"kind": "static", "paths": [[0], []]}, "needs paths of ranks from 0"),
        ({"kind": "static", "paths": [[0], [-1]]}, "needs paths of ranks from 0"),
        ({"kind": "dynamic", "top_k": 2, "depth": 2, "nodes": 7}, "no more than the levels hold"),
        ({"kind": "branching", "branching": [2, 0]}, "must list children per level, from 1"),
        ({"kind": "beams", "width": 0}, "beams have width 0 and depth 4; each must be at least 1"),
        ({"kind": "bush"}, "tree.kind is 'bush'; it must be one of static, dynamic, branching"),
        ({"kind": "beams", "breadth": 3}, "tree of kind beams: .*'breadth'"),
    ],
)
def test_trees_that_cannot_grow_are_refused(tree, words):
    with pytest.raises(ValueError, match=words):
        tree_of(tree)


@pytest.mark.parametrize(("top_k", "depth", "nodes"), [(3, 4, 9), (2, 5, 18), (4, 1, 3), (3, 3, 1)])
def test_dynamic_is_eagle_2(table_VV, top_k, depth, nodes):
    """Beside a search that knows no tensors: each level's best paths are followed, the best of all
    stay."""

    def best(scored: dict, count: int) -> dict:
        return dict(sorted(scored.items(), key=lambda item: -item[1])[:count])

    draft = grown(Dynamic(top_k=top_k, depth=depth, nodes=nodes), table_VV, list(range(12)))
    for root in range(12):
        level, met = {(): 0.0}, {}
        for _ in range(depth):
            found = {}
            for path, score in level.items():
                said = after(table_VV, root, path).log_softmax(-1).tolist()
                found |= {
                    (*path, x): score + s for x, s in best(dict(enumerate(said)), top_k).items()
                }
            level, met = best(found, top_k), met | found
        assert set(paths(draft, root)) == set(best(met, nodes))
        assert draft.size[root] == nodes


def test_dynamic_keeps_parents_when_scores_tie():
    """A certain drafter gives a whole chain the score 0; were a child kept before its parent, the
    tree would hang in the air."""
    certain_VV = torch.full((12, 12), -1000.0).double()
    certain_VV[torch.arange(12), (torch.arange(12) + 1) % 12] = 0
    draft = grown(Dynamic(top_k=4, depth=30, nodes=8), certain_VV, list(range(12)))
    for root in range(12):
        chain = tuple((root + n) % 12 for n in range(1, 9))
        assert paths(draft, root) == [chain[:n] for n in range(1, 9)]


def ordered(law_V: Tensor, k: int) -> dict[tuple[int, ...], float]:
    """The law of k draws without replacement, in their order."""
    q, out = law_V.tolist(), {}
    for drawn in itertools.permutations(range(len(q)), k):
        left = [1 - sum(q[x] for x in drawn[:i]) for i in range(k)]
        out[drawn] = prod(q[x] / rest for x, rest in zip(drawn, left, strict=True))
    return out


def agreement(drawn: list[Any], law: dict[Any, float]) -> float:
    counts = Counter(drawn)
    assert counts.keys() <= law.keys()
    return g_test([counts[key] for key in law], [p * len(drawn) for p in law.values()])


@pytest.mark.parametrize("branching", [[3, 1], [2, 2]])
def test_branching_is_drawn_without_replacement(branching):
    """All nodes of the tree together: two that share a random number show here."""
    table_VV, n = tables(4)[1], 40_000
    law: dict[tuple, float] = {((), ((),)): 1.0}  # ids of all nodes, paths of the last level
    for b in branching:
        grown_law = {}
        for (ids, level), weight in law.items():
            options = [ordered(after(table_VV, 0, path).softmax(-1), b).items() for path in level]
            for chosen in itertools.product(*options):
                new = [(*p, x) for p, (xs, _) in zip(level, chosen, strict=True) for x in xs]
                key = (*ids, *(path[-1] for path in new)), tuple(new)
                grown_law[key] = weight * prod(share for _, share in chosen)
        law = grown_law
    draft = grown(Branching(branching), table_VV, [0] * n)
    drawn = [tuple(ids) for ids in draft.ids_BN.tolist()]
    assert agreement(drawn, {ids: p for (ids, _), p in law.items()}) > TIGHT


def agreement_of_beams(n: int = 20_000) -> list[float]:
    """Per level, whether its paths in their order are draws without replacement from all paths of
    that length (Kool et al. 2019); the first of the first level is then a draw from q."""
    table_VV = tables(4)[1]
    draft = grown(Beams(width=2, depth=2), table_VV, [0] * n)
    rows = [paths(draft, b) for b in range(n)]
    q_V = after(table_VV, 0, ()).softmax(-1)
    pairs = list(itertools.product(range(4), repeat=2))
    q_P = torch.stack([q_V[a] * after(table_VV, 0, (a,)).softmax(-1)[b] for a, b in pairs])
    wide = {tuple(pairs[i] for i in drawn): p for drawn, p in ordered(q_P, 2).items()}
    return [
        agreement([(a[0], b[0]) for a, b, *_ in rows], ordered(q_V, 2)),
        agreement([tuple(row[2:]) for row in rows], wide),
        agreement([row[0][0] for row in rows], dict(enumerate(q_V.tolist()))),
    ]


def test_beams_are_drawn_without_replacement():
    assert min(agreement_of_beams()) > TIGHT


def test_scores_that_forget_their_beam_are_noticed(monkeypatch):
    """Children whose best score is not their parent's win wrongly."""
    true = trees._perturbed
    monkeypatch.setattr(
        trees, "_perturbed", lambda q, score, bound, u: true(q, score, torch.zeros_like(bound), u)
    )
    assert agreement_of_beams()[1] < TIGHT


def test_beams_are_as_wide_as_they_say(monkeypatch, table_VV):
    """Every level keeps the best perturbed scores of all its beams' children, best first."""
    found, true = [], trees._perturbed
    monkeypatch.setattr(trees, "_perturbed", lambda *a: found.append(true(*a)) or found[-1])
    draft = grown(Beams(width=3, depth=4), table_VV, list(range(12)))
    assert draft.size == [12] * 12
    for level, (ids, _, rank) in enumerate(found):
        order = rank.flatten(1).argsort(dim=1, descending=True)[:, :3]
        nodes = slice(3 * level, 3 * level + 3)
        assert torch.equal(draft.ids_BN[:, nodes], ids.flatten(1).gather(1, order))
        assert (draft.parents_BN[:, nodes] >= 3 * level - 3).all()
    assert all(len(set(paths(draft, b))) == 12 for b in range(12))


@pytest.mark.parametrize("tree", [Branching([9, 2]), Beams(width=9, depth=3)])
def test_trees_wider_than_the_vocabulary_still_grow(table_VV, tree):
    for sampling in (Sampling(), Sampling(temperature=1.0)):
        dice = Dice(sampling, [0], [4])
        draft = tree.grow(Lookup(table_VV[:5, :5], torch.tensor([2]), dice))
        assert draft.ids_BN.shape == (1, tree.nodes)
        assert int(draft.ids_BN.min()) >= 0
        assert int(draft.ids_BN.max()) < 5


@pytest.mark.parametrize("tree", [Branching([3, 2, 2]), Beams(width=3, depth=4)])
def test_q_is_what_children_were_drawn_from(table_VV, tree):
    """Row m of q is the law behind node m, for every node that has children."""
    draft = grown(tree, table_VV, list(range(12)))
    assert draft.q_BMV is not None
    for b in range(12):
        for node in {-1, *draft.parents_BN[b].tolist()}:
            due = after(table_VV, b, paths(draft, b)[node] if node >= 0 else ()).softmax(-1)
            torch.testing.assert_close(draft.q_BMV[b, node + 1].double(), due, atol=1e-6, rtol=0)

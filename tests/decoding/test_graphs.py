"""Passes of fixed shapes over a standing cache give the ordinary passes' numbers.

Without a GPU nothing is recorded, and all but the recording is tested: buffers, windows, slots that
keep their addresses, rows that leave. The tests that need one say so.
"""

import gc

import pytest
import torch
from scripted import GREEDY, NO_END, PROMPTS, SAMPLED, ids_of
from toys import tiny_model

from decoding.cache import GROWTH
from decoding.graphs import Graphs, Standing
from decoding.loop import decode
from decoding.pretrained import Pretrained
from decoding.round import Draft
from decoding.target import Target
from drafters.layer_skip import LayerSkip
from drafters.lm import LM
from drafters.token_recycling import TokenRecycling

NEW = 24


@pytest.fixture(scope="module")
def targets() -> tuple[Target, Target]:
    """The same weights twice, without and with fixed shapes."""
    plain, graphed = (Target(tiny_model()) for _ in range(2))
    graphed.graphs = Graphs(graphed.shape.layers)
    return plain, graphed


def drafter(kind: str, target: Target):
    if kind == "lm":  # chains of several lengths
        return LM.around(tiny_model(seed=1), draft_length=4, stop_below=0.02)
    if kind == "layer_skip":  # reads the target's own cache, in passes that are not replayed
        return LayerSkip(attention=[1], mlp=[1], draft_length=3)
    return None if kind == "plain" else TokenRecycling()  # a tree


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("kind", ["plain", "lm", "tree", "layer_skip"])
def test_the_answers_are_those_of_ordinary_passes(targets, kind, sampling):
    found = []
    for target in targets:
        ours = drafter(kind, target)
        for limit in (NEW, 9):  # the second job uses slots that the first one left full
            done = decode(
                target, ours, PROMPTS, sampling=sampling, max_new_tokens=limit, end_ids=NO_END
            )
            found.append(ids_of(done))
    assert found[:2] == found[2:]


def test_rows_that_end_early_leave_their_slots_to_the_others(targets):
    plain, _graphed = targets
    free = decode(plain, None, PROMPTS, sampling=GREEDY, max_new_tokens=NEW, end_ids=NO_END)
    ends = frozenset([free.answers[0].ids[3]])  # the first row leaves, the others move up
    both = [
        decode(t, drafter("lm", t), PROMPTS, sampling=GREEDY, max_new_tokens=NEW, end_ids=ends)
        for t in targets
    ]
    assert ids_of(both[0]) == ids_of(both[1])
    assert len({len(ids) for ids in ids_of(both[1])}) > 1


def test_a_pass_is_made_once_for_its_shapes_and_stays_for_the_next_job(targets):
    _, graphed = targets
    graphed.graphs = Graphs(graphed.shape.layers)

    def ask(tokens: int) -> None:
        decode(graphed, None, [[1, 2, 3]], sampling=GREEDY, max_new_tokens=tokens, end_ids=NO_END)

    ask(NEW)
    slots = graphed.graphs.slots
    (key,) = slots.passes
    assert key == (1, 1, GROWTH)
    first, places = slots.passes[key], [k.data_ptr() for k in slots.keys]
    ask(NEW)
    assert graphed.graphs.slots.passes[key] is first
    assert [k.data_ptr() for k in graphed.graphs.slots.keys] == places


def test_longer_jobs_see_wider_windows_and_get_the_same_logits(targets):
    _plain, graphed = targets
    graphed.graphs = Graphs(graphed.shape.layers)
    long = [(7 * n) % 31 + 1 for n in range(GROWTH - 6)]
    both = [
        decode(t, None, [long], sampling=GREEDY, max_new_tokens=16, end_ids=NO_END) for t in targets
    ]
    assert ids_of(both[0]) == ids_of(both[1])
    widths = {key[-1] for key in graphed.graphs.slots.passes}
    assert widths == {GROWTH, 2 * GROWTH}


def test_two_caches_at_once_do_not_share_slots(targets):
    _, graphed = targets
    graphed.graphs = Graphs(graphed.shape.layers)
    first = graphed.new_cache(2, 40)
    second = graphed.new_cache(1, 40)
    assert isinstance(first, Standing)
    assert isinstance(second, Standing)
    assert first.slots is not second.slots
    kept = first.slots
    del first
    assert graphed.new_cache(1, 40).slots is kept


def test_a_larger_cache_lets_the_smaller_one_go(targets):
    _, graphed = targets
    graphed.graphs = Graphs(graphed.shape.layers)
    decode(graphed, None, [[1, 2]], sampling=GREEDY, max_new_tokens=4, end_ids=NO_END)
    small = graphed.graphs.slots
    assert small.passes
    larger = graphed.new_cache(3, 2 * GROWTH)
    assert not small.passes
    assert larger.slots is not small
    assert (larger.slots.rows, larger.slots.capacity) == (3, 2 * GROWTH)


def test_a_cache_that_must_grow_drops_what_was_made_for_its_old_place(targets):
    plain, graphed = targets
    graphed.graphs = Graphs(graphed.shape.layers)
    cache = graphed.new_cache(1, 8)
    ids = torch.arange(1, GROWTH).remainder(30)[None] + 1
    seen = graphed.prefill(ids, [ids.shape[1]], cache)
    root_B = seen.ids_BS[:, -1]
    for tokens in (0, 5):  # the second does not fit any more
        draft = Draft.chain(torch.full((1, tokens), 3), [tokens])
        other = plain.new_cache(1, 8)
        plain.prefill(ids, [ids.shape[1]], other)
        due = plain.score(root_B, draft, other).logits_BMV
        found = graphed.score(root_B, draft, cache).logits_BMV
        torch.testing.assert_close(found, due)
    assert cache.capacity > GROWTH  # and the pass of the window before has gone with its slots
    assert {key[-1] for key in cache.slots.passes} == {2 * GROWTH}


def test_graphs_without_a_gpu_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="there is no CUDA device"):
        Pretrained(path="x", graphs=True).load()
    with pytest.raises(ValueError, match=r"set target\.parallel=null"):
        Pretrained(path="x", graphs=True, parallel="tensor")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="records CUDA graphs: needs a GPU")
@pytest.mark.parametrize("kind", ["plain", "lm", "tree"])
def test_recorded_passes_give_the_answers_of_ordinary_ones(kind):
    plain, graphed = (Target(tiny_model(dtype=torch.float32).cuda()) for _ in range(2))
    graphed.graphs = Graphs(graphed.shape.layers)
    found = []
    for target in (plain, graphed):
        ours = drafter(kind, target)
        ours = ours.float().cuda() if ours is not None else None
        for _ in range(2):
            done = decode(
                target, ours, PROMPTS, sampling=GREEDY, max_new_tokens=NEW, end_ids=NO_END
            )
            found.append(ids_of(done))
    assert found[:2] == found[2:]
    assert all(p.graph is not None for p in graphed.graphs.slots.passes.values())
    gc.collect()

"""The target drafts for itself: what is skipped, what stays untouched, and when a draft stops.

Shapes: B batch, M tokens of a pass, V vocabulary.
"""

import json
import sys
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from toys import tiny_model, tiny_target

sys.path.append(str(Path(__file__).parents[1] / "decoding"))  # architectures, the law, a watch

from architectures import ARCHITECTURES, random_model, random_target
from frequencies import p_value
from test_cache import Watched

from decoding.loop import decode
from decoding.round import Draft, Seen
from decoding.sampling import Sampling
from decoding.skim import Skimmer
from decoding.target import Target
from drafters import layer_skip
from drafters.layer_skip import LayerSkip, LayerSkipState, middle

GREEDY, SAMPLED = Sampling(), Sampling(temperature=1.0, seed=4)
PROMPTS = [[5], [1, 2, 3, 4, 5, 6, 7], [9, 8, 9, 8, 9]]
MASKS = {"attention": ([1], []), "mlp": ([], [0, 2]), "layer": ([1], [1]), "both": ([0, 1], [1, 2])}
NO_END: frozenset[int] = frozenset()
TIGHT = 1e-6


@contextmanager
def silenced(target: Target, attention: list[int], mlp: list[int]):
    """The model's own sublayers run in full, and then their outputs are thrown away."""
    hooks = []
    layers = next(m for n, m in target.model.named_modules() if n.endswith("layers"))
    for n, layer in enumerate(layers):
        for module in layer.children():
            kind = type(module).__name__
            if (kind.endswith("Attention") and n in attention) or (
                kind.endswith("MLP") and n in mlp
            ):

                def silence(_module: Any, _args: Any, out: Any) -> Any:
                    if isinstance(out, tuple):
                        return (torch.zeros_like(out[0]), *out[1:])
                    return torch.zeros_like(out)

                hooks.append(module.register_forward_hook(silence))
    assert len(hooks) == len(attention) + len(mlp)
    yield
    for hook in hooks:
        hook.remove()


def read(target: Target, capacity: int = 64) -> tuple[Any, torch.Tensor]:
    """A cache that has read the prompts, and their last tokens."""
    padded = torch.tensor([ids + [0] * (7 - len(ids)) for ids in PROMPTS])
    cache = target.new_cache(3, capacity)
    target.prefill(padded, [len(ids) for ids in PROMPTS], cache)
    return cache, torch.tensor([ids[-1] for ids in PROMPTS])


# --- skimming ------------------------------------------------------------------------------------


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("name", ["Llama", "Gemma2", "Cohere", "GPTNeoX", "Phi"])
def test_a_skipped_sublayer_adds_nothing(name, mask):
    """Token by token over committed tokens of three lengths, as one pass of the whole model whose
    outputs are silenced; residuals in turn and side by side."""
    target = random_target(name, True)
    cache, root_B = read(target)
    drafted_BN = torch.tensor([[11, 12, 13], [21, 22, 23], [31, 32, 33]])
    with silenced(target, *mask):
        due_BMV = target.score(root_B, Draft.chain(drafted_BN, [3] * 3), cache).logits_BMV
    full_BMV = target.score(root_B, Draft.chain(drafted_BN, [3] * 3), cache).logits_BMV
    cache, _ = read(target)
    skimmer = Skimmer(target, *mask)
    ids_BM = torch.cat([root_B[:, None], drafted_BN], dim=1)
    steps = [skimmer.skim(ids_BM[:, n : n + 1], cache, after=n) for n in range(4)]
    torch.testing.assert_close(torch.cat(steps, dim=1), due_BMV, atol=1e-5, rtol=0)
    assert (due_BMV - full_BMV).abs().max() > 0.01
    cache, _ = read(target)
    first = skimmer.skim(ids_BM[:, :1], cache)
    rest = skimmer.skim(ids_BM[:, 1:], cache, after=1)  # several tokens behind scratch ones
    torch.testing.assert_close(torch.cat([first, rest], 1), due_BMV, atol=1e-5, rtol=0)


@pytest.mark.parametrize("capacity", [64, 8])
def test_drafting_leaves_the_committed_keys_and_values(capacity):
    """Bit by bit, also where the cache grows meanwhile; and the pass that verifies is unchanged."""
    target = random_target("Llama", True)
    cache, root_B = read(target, capacity)
    before = [tensor.clone() for tensor in cache._keys + cache._values]
    lengths = list(cache.length)
    skimmer = Skimmer(target, [1], [1])
    for n in range(6):
        skimmer.skim(torch.tensor([[3], [4], [5]]) + n, cache, after=n)
    assert cache.length == lengths == [0, 6, 4]
    scratch = 0
    for old, new in zip(before, cache._keys + cache._values, strict=True):
        for b, length in enumerate(lengths):
            assert torch.equal(old[b, :, :length], new[b, :, :length])
        scratch += int((new[0, :, :6] != 0).sum())
    assert scratch > 0
    draft = Draft.chain(torch.tensor([[11, 12], [21, 22], [31, 32]]), [2] * 3)
    scored = target.score(root_B, draft, cache).logits_BMV
    untouched, _ = read(target, 64)
    due = target.score(root_B, draft, untouched).logits_BMV
    torch.testing.assert_close(scored, due, atol=1e-12, rtol=0)


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_the_cache_contract(sampling):
    """After every round the cache holds the unskipped target's keys, and every verified logit is
    that of an unskipped forward pass."""
    target = Watched(tiny_model(layers=3, heads=4, kv_heads=2, seed=0))
    drafter = LayerSkip(attention=[1], mlp=[0], threshold=0.1, draft_length=4)
    decode(target, drafter, PROMPTS, sampling=sampling, max_new_tokens=14, end_ids=NO_END)
    assert target.rounds > 2


def test_skipping_saves_the_work():
    """Counted, since times vary: no matrix is multiplied for what is skipped."""
    target = tiny_target(layers=4)
    ids, cache = torch.tensor([[7]]), target.new_cache(1, 8)

    def work(attention: list[int], mlp: list[int]) -> int:
        skimmer = Skimmer(target, attention, mlp)
        with FlopCounterMode(display=False) as counter:
            skimmer.skim(ids, cache)
        return counter.get_total_flops()

    everything, head = work([], []), work([0, 1, 2, 3], [0, 1, 2, 3])
    assert head == 2 * 32 * 64  # the output matrix alone
    attention, mlp = everything - work([2], []), everything - work([], [2])
    assert 4 * (attention + mlp) == everything - head
    assert min(attention, mlp) > 0
    assert everything - work([0, 3], [1, 3]) == 2 * (attention + mlp)


def test_the_target_stays_whole():
    target = random_target("Llama", True)
    modules = [id(module) for module in target.model.modules()]
    ids = torch.tensor([[1, 2, 3]])
    before = target(ids).hidden_BTD
    skimmer = Skimmer(target, [0, 1], [1])
    skimmer.skim(ids, target.new_cache(1, 8))
    assert [id(module) for module in target.model.modules()] == modules
    assert torch.equal(target(ids).hidden_BTD, before)


def test_what_cannot_be_skipped_is_refused():
    with pytest.raises(ValueError, match="layer 3 is to be skipped, and Llama has layers 0 to 2"):
        Skimmer(random_target("Llama", True), [1, 3], [])
    model = random_model("Llama")
    model.model.layers[1].extra = torch.nn.Linear(32, 32)
    with pytest.raises(ValueError, match="LlamaForCausalLM has self_attn, mlp, extra in a layer"):
        Skimmer(Target(model, name="odd"), [1], [])
    model = random_model("Gemma2")
    model.model.layers[1].post_feedforward_layernorm = torch.nn.LayerNorm(32).double()
    Skimmer(Target(model, name="odd"), [1], [1])
    torch.nn.init.ones_(model.model.layers[1].post_feedforward_layernorm.bias)
    with pytest.raises(ValueError, match="changes its states even without them"):
        Skimmer(Target(model, name="odd"), [1], [])
    model = random_model("Llama")
    model.model.layers = torch.nn.Sequential(*model.model.layers)
    with pytest.raises(ValueError, match="keeps them in no list of its layers"):
        Skimmer(Target(model, name="odd"), [1], [])


# --- the drafter ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_greedy_answers_are_the_targets(name):
    """And with nothing skipped it is the target: every draft is accepted, and is as long as may
    be."""
    target = random_target(name, True)
    options = {"sampling": GREEDY, "max_new_tokens": 24, "end_ids": NO_END}
    due = [a.ids for a in decode(target, None, PROMPTS, **options).answers]
    for attention, mlp in MASKS.values():
        drafter = LayerSkip(attention=attention, mlp=mlp, threshold=0.2, draft_length=4)
        answers = decode(target, drafter, PROMPTS, **options).answers
        assert [a.ids for a in answers] == due
        assert min(k for a in answers for k in a.drafted) >= 1
        assert any(a.accepted != a.drafted for a in answers), "a draft that is always right"
    itself = LayerSkip(attention=[], mlp=[], threshold=0.0, epsilon=0.0, draft_length=4)
    for answer in decode(target, itself, PROMPTS, **options).answers:
        assert answer.ids in due
        assert answer.accepted == answer.drafted == [4] * len(answer.drafted)


def test_the_target_itself_is_always_accepted_when_sampling():
    target = tiny_target(layers=3)
    itself = LayerSkip(attention=[], mlp=[], threshold=0.0, epsilon=0.0, draft_length=4)
    done = decode(target, itself, PROMPTS, sampling=SAMPLED, max_new_tokens=25, end_ids=NO_END)
    assert all(a.accepted == [4] * 5 for a in done.answers)


def judged(drop: bool = False, n: int = 4_000, **options: Any) -> float:
    """G-test of the joint law of four tokens from prompts of two lengths."""
    target = tiny_target(vocab=6, width=16, heads=2, layers=3, seed=5, spread=0.35)
    settings = {"attention": [1], "mlp": [0], "draft_length": 3, "threshold": 0.35, **options}
    drafter = (Drops if drop else LayerSkip)(**settings)
    return p_value(target, drafter, [[3, 1], [2, 0, 2, 0, 2]], SAMPLED, n=n)


class Drops(LayerSkip):
    """Leaves out the token whose low probability stopped the draft."""

    def propose(self, state: LayerSkipState, seen: Seen, target: Target) -> Draft:
        draft = super().propose(state, seen, target)
        assert draft.q_BMV is not None
        size = list(draft.size)
        for b, n in enumerate(size):
            said = draft.q_BMV[b, n - 1, draft.ids_BN[b, n - 1]]
            size[b] = n - int(said < state.threshold[b])
        state.drafted = [max(1, n) for n in size]
        return replace(draft, size=size)


@pytest.mark.parametrize("sample", [True, False], ids=["drawn", "likeliest"])
def test_sampled_answers_follow_the_targets_law(sample):
    p = judged(sample=sample)
    assert p > TIGHT, f"G-test p {p:.2g}"


def test_wrong_drafts_do_not_follow_the_law(monkeypatch):
    """The argmax with a softmax q (the authors' default), and a stop that drops its token."""
    assert judged(drop=True, n=3_000) < TIGHT
    monkeypatch.setattr(layer_skip, "draw", lambda law_BV, u_B: law_BV.argmax(-1))
    assert judged(n=1_000) < TIGHT


def test_likeliest_drafts_leave_sampled_answers_as_they_are():
    target = tiny_target(layers=3)
    options = {"sampling": SAMPLED, "max_new_tokens": 24, "end_ids": NO_END}
    due = [a.ids for a in decode(target, None, PROMPTS, **options).answers]
    found = decode(target, LayerSkip(sample=False), PROMPTS, **options)
    assert [a.ids for a in found.answers] == due


def test_an_answer_does_not_depend_on_the_batch():
    """A row's threshold is its own: drafts of a batch are those of each request alone."""
    target = tiny_target(layers=3, spread=0.3)
    drafter = LayerSkip(mlp=[], epsilon=1.0, threshold=0.3, draft_length=5)
    end = decode(target, None, PROMPTS, sampling=SAMPLED, max_new_tokens=30).answers[0].ids[8]
    options = {"sampling": SAMPLED, "max_new_tokens": 40, "end_ids": frozenset({end})}
    together = decode(target, drafter, PROMPTS, **options).answers
    assert len({len(a.ids) for a in together}) > 1, "all rows finish together"
    for number, prompt in enumerate(PROMPTS):
        drafter.forget()
        alone = decode(target, drafter, [prompt], requests=[number], **options)
        assert alone.answers[0] == together[number]


# --- when a draft stops --------------------------------------------------------------------------


class Sure:
    """A skimmer that gives its favourite, token 1, these probabilities, one list a row."""

    def __init__(self, *shares: list[float]) -> None:
        self.shares = shares

    def skim(self, ids_BT: torch.Tensor, cache: Any, after: int = 0) -> torch.Tensor:
        share_B = torch.tensor([row[after] for row in self.shares])
        rest_BV = ((1 - share_B) / 2)[:, None].repeat(1, 3)
        rest_BV[:, 1] = share_B
        return rest_BV.log()[:, None]


def seen(*counts: int) -> Seen:
    ids = torch.zeros(len(counts), max(counts), dtype=torch.long)
    return Seen(ids, list(counts), list(counts), ids[..., None].double())


def rounds(drafter: LayerSkip, script: list[tuple[list[float], int]]) -> list[tuple[int, float]]:
    """For each (probabilities, accepted): the draft's length and the threshold that judged it."""
    target = tiny_target()
    state = drafter.start(target, target.new_cache(1, 8), GREEDY, [0], 8)
    out, news = [], seen(2)
    for shares, accepted in script:
        state.skimmer = Sure(shares)  # type: ignore[assignment]
        draft = drafter.propose(state, news, target)
        out.append((draft.size[0], round(drafter.threshold, 9)))
        news = seen(accepted + 1)
    return out


def test_the_threshold_by_hand():
    """beta1 0.5, beta2 0.9, epsilon 0.01: steps of 0.001. Rates after the rounds: 0.5, 0.75, 0.875,
    0.9375 (a whole draft: stays), 0.96875 (a short one: falls), 0.484."""
    drafter = LayerSkip(draft_length=4, threshold=0.6)
    whole = ([0.9, 0.9, 0.9, 0.9], 4)
    script = [whole] * 4 + [([0.9, 0.6, 0.9, 0.9], 2), ([0.6015, 0.9, 0.602, 0.9], 0), whole]
    assert rounds(drafter, script) == [
        (4, 0.6), (4, 0.601), (4, 0.602), (4, 0.603),
        (2, 0.603),  # the unlikely token stays in the draft
        (1, 0.602),
        (4, 0.603),
    ]  # fmt: skip


def test_rows_stop_on_their_own_and_the_mean_is_remembered():
    drafter = LayerSkip(draft_length=3, threshold=0.5, beta1=0.0, beta2=0.0, epsilon=0.25)
    target = tiny_target()
    state = drafter.start(target, target.new_cache(2, 8), GREEDY, [0, 1], 8)
    state.skimmer = Sure([0.9, 0.4, 0.9], [0.9, 0.9, 0.9])  # type: ignore[assignment]
    assert drafter.propose(state, seen(2, 2), target).size == [2, 3]
    drafter.propose(state, seen(3, 1), target)  # accepted 2 of 2 and 0 of 3
    assert state.threshold == [0.25, 0.75]
    assert drafter.threshold == 0.5
    state.select([1])
    state.skimmer = Sure([0.7, 0.9, 0.9])  # type: ignore[assignment]
    assert drafter.propose(state, seen(1), target).size == [1]
    assert drafter.threshold == state.threshold[0] == 1.0
    warm = drafter.start(target, target.new_cache(1, 8), GREEDY, [2], 8)
    assert (warm.threshold, warm.rate) == ([1.0], [0.0])
    drafter.forget()
    cold = drafter.start(target, target.new_cache(1, 8), GREEDY, [2], 8)
    assert cold.threshold == [0.5]
    assert LayerSkip.remembers


# --- settings ------------------------------------------------------------------------------------


def test_the_usual_layers():
    assert [middle(n) for n in (1, 2, 3, 4, 8)] == [[], [1], [1], [1], [1, 3, 5]]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"draft_length": 0}, "draft_length is 0"),
        ({"threshold": 1.5}, r"threshold is 1\.5; it must lie between 0 and 1"),
        ({"beta2": -0.1}, "beta2"),
        ({"attention": [1, 1]}, "attention is .*each once"),
        ({"mlp": [-1]}, "mlp is .*counted from 0"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings, words):
    with pytest.raises(ValueError, match=words):
        LayerSkip(**settings)


def test_a_layer_that_is_not_there_is_found_at_the_start():
    target = tiny_target(layers=3)
    with pytest.raises(ValueError, match="layer 7 is to be skipped, and tiny has layers 0 to 2"):
        decode(target, LayerSkip(mlp=[7]), [[1]], sampling=GREEDY, max_new_tokens=2)


def test_what_the_stage_found_is_read(tmp_path: Path):
    note = {"attention": [2], "mlp": [], "draft_length": 6, "threshold": 0.4, "speedup": 1.1}
    (tmp_path / "layers.json").write_text(json.dumps(note))
    drafter = LayerSkip.found(tmp_path)
    assert (drafter.attention, drafter.mlp, drafter.draft_length) == ([2], [], 6)
    assert drafter.threshold == 0.4

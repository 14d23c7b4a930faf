"""Whatever is drafted, the answer is the target's own."""

import pytest
import torch
from scripted import (
    DRAFTERS,
    GREEDY,
    NO_END,
    PROMPTS,
    SAMPLED,
    Scripted,
    ids_of,
    plain,
    random_lm,
    tree,
    wrong,
)
from toys import tiny_model, tiny_target

from decoding.loop import decode
from decoding.pretrained import Pretrained
from decoding.sampling import Sampling
from decoding.target import Target
from decoding.verify import Block, Chain
from drafters.lm import LM


def test_plain_decoding_is_what_transformers_generates(target):
    """The loop's own baseline, beside another implementation."""
    for prompt, ids in zip(PROMPTS, plain(target, PROMPTS), strict=True):
        out = target.model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt)),
            do_sample=False,
            max_new_tokens=24,
            pad_token_id=0,
        )
        assert out[0, len(prompt) :].tolist() == ids


@pytest.mark.parametrize("name", DRAFTERS)
def test_greedy_answers_are_the_targets_own(target, name):
    truth = dict(enumerate(plain(target, PROMPTS)))
    assert min(len(set(ids)) for ids in truth.values()) > 8, "a constant answer proves nothing"
    drafter = DRAFTERS[name](target, truth)
    options = {"sampling": GREEDY, "max_new_tokens": 24, "end_ids": NO_END}
    assert ids_of(decode(target, drafter, PROMPTS, **options)) == list(truth.values())
    for number, prompt in enumerate(PROMPTS):
        alone = decode(target, drafter, [prompt], requests=[number], **options)
        assert ids_of(alone) == [truth[number]]
        (answer,) = alone.answers  # nothing is lost in the accounts
        assert alone.rounds == len(answer.drafted) == len(answer.accepted)
        assert (
            sum(answer.accepted) + alone.rounds >= 24 > sum(answer.accepted[:-1]) + alone.rounds - 1
        )
        assert all(a <= d for a, d in zip(answer.accepted, answer.drafted, strict=True))


@pytest.mark.parametrize("name", ["random", "target", "partly", "tree", "ngram"])
@pytest.mark.parametrize("limit", range(1, 13))
def test_limits_that_end_inside_a_block(llama, name, limit):
    truth = plain(llama, PROMPTS, 12)
    drafter = DRAFTERS[name](llama, dict(enumerate(truth)))
    out = decode(llama, drafter, PROMPTS, sampling=GREEDY, max_new_tokens=limit, end_ids=NO_END)
    assert ids_of(out) == [ids[:limit] for ids in truth]
    assert not any(answer.ended for answer in out.answers)
    assert out.tokens == 3 * limit


@pytest.mark.parametrize("name", ["random", "target", "partly", "tree", "ngram"])
def test_an_end_at_every_offset_of_a_block(llama, name):
    """Nothing stands after an end id, wherever in a block it falls and whatever was accepted."""
    truth = plain(llama, PROMPTS, 13)
    assert min(len(set(ids)) for ids in truth) >= 12, "ends must fall on many offsets"
    drafter = DRAFTERS[name](llama, dict(enumerate(truth)))
    lengths = set()
    for end in {ids[k] for ids in truth for k in range(13)}:
        due = [ids[: ids.index(end) + 1] if end in ids else ids for ids in truth]
        ends = frozenset({end})
        out = decode(llama, drafter, PROMPTS, sampling=GREEDY, max_new_tokens=13, end_ids=ends)
        assert ids_of(out) == due
        assert [a.ended for a in out.answers] == [ids[-1] == end for ids in due]
        lengths |= {len(ids) for ids in due}
    assert lengths == set(range(1, 14))


def test_end_ids_come_from_the_target(llama):
    ids = plain(llama, PROMPTS[:1], 8)[0]
    target = tiny_target(seed=6, tied=False)
    target.model.generation_config.eos_token_id = [ids[4], 63]
    assert target.end_ids == {ids[4], 63}
    out = decode(target, None, PROMPTS[:1], sampling=GREEDY, max_new_tokens=8)
    assert ids_of(out) == [ids[: ids.index(ids[4]) + 1]]


def test_the_target_as_its_own_drafter_is_always_right(llama):
    """Fewer accepted tokens mean that drafter and target read different prefixes."""
    for sampling in (GREEDY, SAMPLED, Sampling(0.8, top_k=9, top_p=0.9)):
        for rule in (Chain(), Block()):
            drafter = LM.around(llama.model, draft_length=4)
            out = decode(
                llama,
                drafter,
                PROMPTS,
                sampling=sampling,
                max_new_tokens=25,
                end_ids=NO_END,
                rule=rule,
            )
            assert out.rounds == 5
            assert all(answer.accepted == [4] * 5 for answer in out.answers)


def test_a_wrong_drafter_costs_a_round_a_token(llama):
    truth = dict(enumerate(plain(llama, PROMPTS)))
    out = decode(
        llama, Scripted(truth, wrong), PROMPTS, sampling=GREEDY, max_new_tokens=24, end_ids=NO_END
    )
    assert out.rounds == 24
    assert all(answer.accepted == [0] * 24 for answer in out.answers)


def test_trees_are_worth_something(llama):
    """Were paths through a tree never taken, its greedy test would prove nothing."""
    truth = dict(enumerate(plain(llama, PROMPTS)))
    taken: list[list[int]] = []

    class Watching(Target):
        def keep(self, draft, scored, verdict, cache):
            taken.extend(verdict.path)
            return super().keep(draft, scored, verdict, cache)

    watching = Watching(llama.model)
    decode(
        watching, Scripted(truth, tree), PROMPTS, sampling=GREEDY, max_new_tokens=24, end_ids=NO_END
    )
    assert sum(nodes != list(range(len(nodes))) for nodes in taken) >= 5
    assert max(map(len, taken)) >= 2


# --- sampled answers -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["random, argmax", "ngram", "wrong", "partly", "tree"])
def test_one_hot_drafts_do_not_change_a_sampled_answer(target, name):
    """The target's own draws are keyed by position alone, so the answer is plain sampling's."""
    for sampling in (SAMPLED, Sampling(0.7, top_k=8, top_p=0.9, seed=5)):
        truth = plain(target, PROMPTS, sampling=sampling)
        assert truth != plain(target, PROMPTS)
        drafter = DRAFTERS[name](target, dict(enumerate(truth)))
        out = decode(target, drafter, PROMPTS, sampling=sampling, max_new_tokens=24, end_ids=NO_END)
        assert ids_of(out) == truth


@pytest.mark.parametrize("name", [None, "random", "random, stops", "target", "ngram"])
def test_an_answer_does_not_depend_on_its_batch(target, name):
    drafter = DRAFTERS[name](target, {}) if name else None
    options = {"sampling": SAMPLED, "max_new_tokens": 20, "end_ids": NO_END}
    numbers = [12, 5, 900]
    together = ids_of(decode(target, drafter, PROMPTS, requests=numbers, **options))
    for prompt, number, ids in zip(PROMPTS, numbers, together, strict=True):
        assert ids_of(decode(target, drafter, [prompt], requests=[number], **options)) == [ids]
    order = [2, 0, 1]
    shuffled = decode(
        target,
        drafter,
        [PROMPTS[i] for i in order],
        requests=[numbers[i] for i in order],
        **options,
    )
    assert ids_of(shuffled) == [together[i] for i in order]


def test_requests_and_seeds_give_different_answers(llama):
    prompts = [PROMPTS[1]] * 6
    drafter = random_lm(llama)
    options = {"max_new_tokens": 12, "end_ids": NO_END}
    out = ids_of(decode(llama, drafter, prompts, sampling=SAMPLED, **options))
    assert len({tuple(ids) for ids in out}) == 6
    again = ids_of(decode(llama, drafter, prompts, sampling=SAMPLED, **options))
    other = ids_of(decode(llama, drafter, prompts, sampling=Sampling(1.0, seed=4), **options))
    assert again == out != other


def test_a_finished_row_leaves_the_others_alone(target):
    """Rows that end early are taken out of caches and states; the rest must not move."""
    for sampling in (GREEDY, SAMPLED):
        for name in ("random", "target", "ngram"):
            drafter = DRAFTERS[name](target, {})
            options = {"sampling": sampling, "max_new_tokens": 20}
            free = ids_of(decode(target, drafter, PROMPTS, end_ids=NO_END, **options))
            for end in (free[0][2], free[1][5], free[2][9]):
                due = [ids[: ids.index(end) + 1] if end in ids else ids for ids in free]
                out = decode(target, drafter, PROMPTS, end_ids=frozenset({end}), **options)
                assert ids_of(out) == due


# --- trained models, where they are --------------------------------------------------------------


@pytest.fixture(scope="module", params=["koen-17m", "stories260k"])
def trained(request, shared) -> tuple[Target, list[list[int]]]:
    folder = shared / "models" / request.param
    if not folder.is_dir():
        pytest.skip(f"{folder} is not there")
    pretrained = Pretrained(str(folder), dtype="float32")
    texts = {
        "koen-17m": ["대한민국의 수도는", "오늘 날씨가 좋아서 나는", "The film was so"],
        "stories260k": ["Once upon a time", "Lily and Tom went to the", "The dog"],
    }[request.param]
    tokenizer = pretrained.tokenizer()
    return pretrained.load(), [tokenizer(text).input_ids for text in texts]


@pytest.mark.parametrize("name", ["random", "target", "ngram", "tree"])
def test_greedy_answers_of_trained_models(trained, name):
    """fp32, no tolerance: one near-tie decided otherwise fails."""
    target, prompts = trained
    truth = plain(target, prompts, 32, end_ids=None)
    drafter = DRAFTERS[name](target, dict(enumerate(truth)))
    assert ids_of(decode(target, drafter, prompts, sampling=GREEDY, max_new_tokens=32)) == truth
    alone = decode(target, drafter, prompts[:1], sampling=GREEDY, max_new_tokens=32)
    assert ids_of(alone) == truth[:1]


def test_a_trained_target_as_its_own_drafter(trained):
    target, prompts = trained
    for sampling in (GREEDY, SAMPLED):
        drafter = LM.around(target.model, draft_length=4)
        out = decode(
            target, drafter, prompts[:1], sampling=sampling, max_new_tokens=25, end_ids=NO_END
        )
        assert out.answers[0].accepted == [4] * 5


# --- sentences -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompts", "limit", "words"),
    [
        ([[1, 2]], 0, "max_new_tokens is 0; it must be at least 1"),
        ([[1], []], 4, "every prompt needs at least one token"),
        ([], 4, "every prompt needs at least one token"),
        (
            [[1] * 500],
            13,
            "a prompt of 500 tokens and 13 new ones exceed the 512 positions of tiny",
        ),
    ],
)
def test_requests_that_cannot_be_met(llama, prompts, limit, words):
    with pytest.raises(ValueError, match=words):
        decode(llama, None, prompts, sampling=GREEDY, max_new_tokens=limit)


def test_drafting_up_to_the_last_position(llama):
    """A draft may reach past the positions that target and drafter have; the answer may not."""
    prompt = [[3] * 500]
    truth = plain(llama, prompt, 12)
    for name in ("random", "target", "ngram"):
        out = decode(
            llama,
            DRAFTERS[name](llama, {}),
            prompt,
            sampling=GREEDY,
            max_new_tokens=12,
            end_ids=NO_END,
        )
        assert ids_of(out) == truth


def test_a_request_longer_than_the_drafter_reads(llama):
    short = LM.around(tiny_model(max_positions=16))
    with pytest.raises(ValueError, match="requests of 21 tokens exceed the drafter's 16 positions"):
        decode(llama, short, [[1]], sampling=GREEDY, max_new_tokens=20)


def test_targets_whose_cache_cannot_be_cropped_are_refused():
    from transformers import MistralConfig, MistralForCausalLM

    config = MistralConfig(
        vocab_size=32,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        sliding_window=16,
    )
    with pytest.raises(ValueError, match="cannot be cropped"):
        Target(MistralForCausalLM(config))

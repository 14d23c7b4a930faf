"""What every family of conf/drafter/ must keep. A new family is found by its YAML alone."""

from pathlib import Path

import pytest
import torch
from contract import (
    FAMILIES,
    GREEDY,
    PROMPTS,
    SAMPLED,
    TRAINED,
    assert_drafted_as_trained,
    build,
    judged,
    logits_of,
    packed,
    teacher_forced,
)
from toys import sharpen, tiny_target

from decoding.loop import decode
from drafters.base import Look, Prediction, Trained, cast, save


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_answers(target, family, sampling):
    """U1 with a random drafter: greedy answers are the target's own, sampled ones do not depend on
    the batch; rows end early, one prompt has a single token."""
    drafter = build(family, target.shape)
    drafter.to(torch.float64).eval()
    plain = decode(target, None, PROMPTS, sampling=sampling, max_new_tokens=24, end_ids=frozenset())
    end = plain.answers[1].ids[9]
    options = {"sampling": sampling, "max_new_tokens": 24, "end_ids": frozenset({end})}
    together = [a.ids for a in decode(target, drafter, PROMPTS, **options).answers]
    if sampling.greedy:
        due = [a.ids for a in plain.answers]
        assert together == [ids[: ids.index(end) + 1] if end in ids else ids for ids in due]
        assert len({tuple(ids) for ids in together}) == 3
        assert min(len(set(ids)) for ids in due) > 8, "a constant answer proves nothing"
    for number, prompt in enumerate(PROMPTS):
        alone = decode(target, drafter, [prompt], requests=[number], **options)
        assert alone.answers[0].ids == together[number]


@pytest.mark.parametrize("family", FAMILIES)
def test_drafting_repeats_itself(target, family):
    """No state outlives a request, but what `forget` drops: the second decode of a process drafts
    what the first did."""
    drafter = build(family, target.shape).to(torch.float64).eval()
    options = {"sampling": SAMPLED, "max_new_tokens": 24, "end_ids": frozenset()}
    first = decode(target, drafter, PROMPTS, **options).answers
    drafter.forget()
    assert decode(target, drafter, PROMPTS, **options).answers == first


# --- trained families: training sees what drafting sees ------------------------------------------


@pytest.mark.parametrize("family", TRAINED)
@pytest.mark.parametrize("stop_below", [0.0, 0.05])
def test_drafting_is_what_was_trained(family, stop_below):
    """U6: the law that each drafted token was drawn from equals the one that training judges, in
    fp64, after no, partial and full acceptance and in ragged batches. An off-by-one in positions,
    cache or the tokens fed after a full acceptance fails here."""
    assert_drafted_as_trained(family, stop_below=stop_below)


@pytest.mark.parametrize("family", TRAINED)
def test_the_future_is_not_seen(target, family):
    """U4: another later token changes no earlier guess, and does change a later one."""
    drafter = build(family, target.shape)
    assert isinstance(drafter, Trained)
    sharpen(drafter.double(), 6)
    ids = list(range(1, 15))
    for t in (3, 8, 13):
        other = [*ids[:t], 30, *ids[t + 1 :]]
        pairs = zip(
            teacher_forced(drafter, ids, target),
            teacher_forced(drafter, other, target),
            strict=True,
        )
        for a, b in pairs:
            torch.testing.assert_close(a[: t + 1], b[: t + 1], atol=0, rtol=0, equal_nan=True)
            if t + 1 < len(ids):
                assert not torch.allclose(a[t + 1 :].nan_to_num(), b[t + 1 :].nan_to_num())


@pytest.mark.parametrize("family", TRAINED)
def test_packed_documents_are_strangers(target, family):
    """Each supervised token of a packed sequence is judged once, with the label and the logits that
    its document gives alone: a mask shifted by one, attention across a boundary or positions that
    run on all fail."""
    drafter = build(family, target.shape)
    assert isinstance(drafter, Trained)
    sharpen(drafter.double(), 6)
    batch = packed(40)
    for k, prediction in enumerate(judged(drafter, batch, target)):
        labels, logits = [], []
        for b in range(2):
            for doc in (d for d in batch.doc_BT[b].unique_consecutive().tolist() if d >= 0):
                here = batch.doc_BT[b] == doc
                ids = batch.ids_BT[b][here].tolist()
                heard = teacher_forced(drafter, ids, target)
                if k >= len(heard):  # too short for a label so far ahead
                    continue
                guesses = heard[k]
                for t in batch.mask_BT[b][here].nonzero()[:, 0].tolist():
                    if not guesses[t].isnan().any():
                        labels.append(ids[t])
                        logits.append(guesses[t])
        assert prediction.labels_N.tolist() == labels
        assert len(labels) > 4
        torch.testing.assert_close(
            logits_of(prediction, target), torch.stack(logits), atol=1e-9, rtol=1e-9
        )


@pytest.mark.parametrize("family", TRAINED)
def test_the_targets_states_stand_beside_the_labels(target, family):
    """Distillation compares p and q of the same token: the state that predicts each label."""
    drafter = build(family, target.shape).double()
    batch = packed(40)
    seen: list[Prediction] = []
    with torch.no_grad():
        drafter(batch, target, Look(lambda p, _: seen.append(p), needs_target=True))
        plain = target.logits(target(batch.ids_BT, doc_BT=batch.doc_BT).hidden_BTD)
    for prediction in seen:
        assert prediction.target_ND is not None
        reach = prediction.position + 1 + drafter.needs_target  # heads start one token earlier
        due = [
            plain[b, t - 1]
            for b in range(2)
            for t in range(reach, batch.ids_BT.shape[1])
            if batch.mask_BT[b, t] and batch.doc_BT[b, t - reach] == batch.doc_BT[b, t]
        ]
        torch.testing.assert_close(target.logits(prediction.target_ND), torch.stack(due))


# --- dtype ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", TRAINED)
def test_bf16_keeps_the_position_code(family):
    """Rounded rotary frequencies are another model: far positions would be read wrongly, and that
    costs several times what rounding everything else does. The target stays in fp32."""
    ids = torch.randint(40, (1_500,), generator=torch.Generator().manual_seed(1)).tolist()
    target = tiny_target(vocab=40, seed=0, spread=0.3, tied=False, dtype=torch.float32)
    made = [build(family, target.shape, steps=1, heads=2, prefix=True) for _ in range(3)]
    drafter, small, ruined = (sharpen(module, 8).eval() for module in made)
    whole = {k: v.clone() for k, v in drafter.named_buffers()}
    if not any("inv_freq" in k for k in whole):
        pytest.skip(f"{family} has no rotary buffers")
    cast(small, torch.bfloat16)
    ruined.to(torch.bfloat16)
    assert {p.dtype for p in small.parameters()} == {torch.bfloat16}
    for key, buffer in small.named_buffers():
        assert torch.equal(buffer, whole[key]), key
        assert buffer.dtype == whole[key].dtype
    assert not all(torch.equal(b.float(), whole[k]) for k, b in ruined.named_buffers())
    laws = {}
    for name, module in (("fp32", drafter), ("cast", small), ("to", ruined)):
        assert isinstance(module, Trained)
        laws[name] = teacher_forced(module, ids, target)[0][-500:].float().softmax(-1)
    gap = {k: 0.5 * (laws[k] - laws["fp32"]).abs().sum(-1).mean().item() for k in ("cast", "to")}
    assert 2.5 * gap["cast"] < gap["to"], gap
    assert gap["to"] > 0.03, gap


def test_saved_paths_are_made(tmp_path: Path, target):
    """save() makes the folder; a drafter is two kinds of file, weights and JSON."""
    drafter = build("lm", target.shape)
    assert isinstance(drafter, Trained)
    save(drafter, tmp_path / "a" / "b", {})
    kinds = {p.suffix for p in (tmp_path / "a" / "b").iterdir()}
    assert kinds == {".safetensors", ".json"}

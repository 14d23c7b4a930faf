"""What every family of conf/drafter/ must keep. A new family is found by its YAML alone."""

from pathlib import Path
from typing import Any

import pytest
import torch
from contract import (
    FAMILIES,
    GREEDY,
    PROMPTS,
    SAMPLED,
    TRAINED,
    Recorder,
    build,
    judged,
    logits_of,
    packed,
    teacher_forced,
)
from torch import Tensor
from toys import sharpen, tiny_target

from decoding.loop import decode
from decoding.round import Draft, Seen
from decoding.sampling import Sampling
from decoding.target import Target
from drafters.base import Drafter, Trained, cast, save


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
    """No state outlives a request: the second decode of a process drafts what the first did."""
    drafter = build(family, target.shape).to(torch.float64).eval()
    options = {"sampling": SAMPLED, "max_new_tokens": 24, "end_ids": frozenset()}
    first, second = (decode(target, drafter, PROMPTS, **options).answers for _ in range(2))
    assert first == second


# --- trained families: training sees what drafting sees ------------------------------------------


class Watching:
    """A drafter and its state with a notebook: the committed tokens and the draft of each round."""

    def __init__(self, drafter: Drafter) -> None:
        self.drafter = drafter
        self.rounds: list[tuple[list[list[int]], Draft]] = []
        self.accepted: list[int] = []

    def start(self, target, cache, sampling, requests, max_len) -> "Watching":
        self.committed: list[list[int]] = [[] for _ in requests]
        self.state: Any = self.drafter.start(target, cache, sampling, requests, max_len)
        return self

    def select(self, rows: list[int]) -> None:
        self.committed = [self.committed[r] for r in rows]
        self.state.select(rows)

    def propose(self, state: Any, seen: Seen, target: Target) -> Draft:
        for row, ids in enumerate(seen.ids_BS.tolist()):
            self.committed[row] += ids[: seen.count[row]]
            if seen.draft is not None:
                self.accepted.append(seen.count[row] - 1)
        draft = self.drafter.propose(self.state, seen, target)
        self.rounds.append(([list(ids) for ids in self.committed], draft))
        return draft


class Exact(Sampling):
    """Laws in float64, so that they can be compared to 1e-9."""

    def law(self, logits: Tensor) -> Tensor:
        return (logits / self.temperature).softmax(-1)


@pytest.mark.parametrize("family", TRAINED)
@pytest.mark.parametrize("stop_below", [0.0, 0.1])
def test_drafting_is_what_was_trained(family, stop_below):
    """U6: the law that each drafted token was drawn from equals the one that training judges, in
    fp64, after no, partial and full acceptance and in ragged batches. An off-by-one in positions,
    cache or the tokens fed after a full acceptance fails here."""
    target = tiny_target(vocab=17, seed=5, spread=0.25, tied=False)
    drafter = build(family, target.shape, stop_below=stop_below, draft_length=3)
    assert isinstance(drafter, Trained)
    sharpen(drafter.double(), 6).eval()
    watching = Watching(drafter)
    decode(
        target,
        watching,
        PROMPTS,
        sampling=Exact(temperature=1.0),
        max_new_tokens=40,
        end_ids=frozenset(),
    )
    compared = 0
    for committed, draft in watching.rounds:
        assert draft.q_BMV is not None
        for row, ids in enumerate(committed):
            drafted = draft.ids_BN[row, : draft.size[row]].tolist()
            positions = teacher_forced(drafter, ids + drafted, target)
            for n in range(draft.size[row]):
                logits = positions[min(n, len(positions) - 1)][len(ids) + n]
                law = draft.q_BMV[row, n]
                torch.testing.assert_close(law, logits.softmax(-1), atol=1e-9, rtol=0)
                compared += 1
    assert compared > 60
    assert set(watching.accepted) >= {0, 1, 2, 3}, "some acceptance has not been met"


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
                guesses = teacher_forced(drafter, ids, target)[k]
                for t in batch.mask_BT[b][here].nonzero()[:, 0].tolist():
                    if not guesses[t].isnan().any():
                        labels.append(ids[t])
                        logits.append(guesses[t])
        assert prediction.labels_N.tolist() == labels
        assert len(labels) > 10
        torch.testing.assert_close(logits_of(prediction), torch.stack(logits), atol=1e-9, rtol=0)


@pytest.mark.parametrize("family", TRAINED)
def test_the_targets_states_stand_beside_the_labels(target, family):
    """Distillation compares p and q of the same token: the state that predicts each label."""
    drafter = build(family, target.shape).double()
    batch = packed(40)
    recorder = Recorder(needs_target=True)
    with torch.no_grad():
        drafter(batch, target, recorder)
        plain = target.logits(target(batch.ids_BT, doc_BT=batch.doc_BT).hidden_BTD)
    for prediction in recorder.seen:
        assert prediction.target_ND is not None
        if prediction.position == 0:
            due = plain[:, :-1][batch.mask_BT[:, 1:]][-len(prediction.labels_N) :]
            torch.testing.assert_close(target.logits(prediction.target_ND), due)


# --- dtype ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", TRAINED)
def test_bf16_keeps_the_position_code(target, family):
    """Rounded rotary frequencies are another model: far positions would be read wrongly."""
    ids = torch.randint(40, (1_500,), generator=torch.Generator().manual_seed(1)).tolist()
    drafter, small, ruined = (sharpen(build(family, target.shape), 10).eval() for _ in range(3))
    whole = {k: v.clone() for k, v in drafter.named_buffers()}
    if not any("inv_freq" in k for k in whole):
        pytest.skip(f"{family} has no rotary buffers")
    cast(small, torch.bfloat16)
    ruined.to(torch.bfloat16)
    assert {p.dtype for p in small.parameters()} == {torch.bfloat16}
    for key, buffer in small.named_buffers():
        assert torch.equal(buffer, whole[key]), key
        assert buffer.dtype == torch.float32
    assert not all(torch.equal(b.float(), whole[k]) for k, b in ruined.named_buffers())
    target_bf16 = tiny_target(vocab=40, seed=0, tied=False, dtype=torch.bfloat16)
    target_fp32 = tiny_target(vocab=40, seed=0, tied=False, dtype=torch.float32)
    laws = {}
    for name, module, frozen in (
        ("fp32", drafter, target_fp32),
        ("cast", small, target_bf16),
        ("to", ruined, target_bf16),
    ):
        assert isinstance(module, Trained)
        laws[name] = teacher_forced(module, ids, frozen)[0][-500:].float().softmax(-1)
    gap = {k: 0.5 * (laws[k] - laws["fp32"]).abs().sum(-1).mean().item() for k in ("cast", "to")}
    assert gap["cast"] < 0.02 < 0.04 < gap["to"], gap


def test_saved_paths_are_made(tmp_path: Path, target):
    """save() makes the folder; a drafter is two kinds of file, weights and JSON."""
    drafter = build("lm", target.shape)
    assert isinstance(drafter, Trained)
    save(drafter, tmp_path / "a" / "b", {})
    kinds = {p.suffix for p in (tmp_path / "a" / "b").iterdir()}
    assert kinds == {".safetensors", ".json"}

"""Decode-validation: the number that training watches is the decode loop's, the step that decoded
best is saved, and a drafter that does not draft as it was trained is stopped."""

import json
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from toys import tiny_target

from data.documents import is_validation
from decoding.adapter import Adapted
from decoding.loop import decode
from decoding.round import Draft, Seen
from decoding.sampling import Sampling
from decoding.target import Target
from drafters.base import Batch, Trained
from drafters.eagle import Eagle
from drafters.eagle3 import Eagle3
from drafters.lm import LM, LMState
from drafters.medusa import Medusa
from eval.controls import Failed
from tests.drafters.contract import TRAINED, build
from tests.tiny import write_target, write_texts
from train import compose, decoded, distill, loop
from train.decoded import (
    NEW_TOKENS,
    Decoded,
    disagreement,
    keep_prompts,
    last_quarter,
    rounds_of,
    told,
)
from train.objectives import CE

T, ROWS, STEPS = 32, 4, 10


def test_prompts_are_kept_once_and_only_where_they_fit(tmp_path: Path):
    file = tmp_path / "prompts.json"
    rows = [{"prompt_ids": [1, 2]}, {"prompt_ids": [1, 2]}, {"prompt_ids": [3] * 9}, {"text": "x"}]
    keep_prompts(file, rows, longest=8)
    assert json.loads(file.read_text()) == [[1, 2]]
    keep_prompts(file, [{"prompt_ids": [i]} for i in range(99)], longest=8)
    assert json.loads(file.read_text()) == [[i] for i in range(64)]  # in the order of the data


PROMPTS = [
    [random.Random(i).randrange(40) for _ in range(random.Random(i).randint(2, 9))]
    for i in range(24)
]


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("prompts") / "prompts.json"
    file.write_text(json.dumps(PROMPTS))
    return file


@pytest.fixture(scope="module")
def target() -> Target:
    """In fp64, so that no argmax is a matter of rounding."""
    return tiny_target(vocab=40, seed=1, tied=False)


@pytest.fixture(scope="module")
def lessons(target: Target) -> list[Batch]:
    """The target's own answers to half of the prompts."""
    half = PROMPTS[::2]
    done = decode(target, None, half, sampling=Sampling(), max_new_tokens=40)
    pairs = [(p, a.ids) for p, a in zip(half, done.answers, strict=True)]
    return [Batch.of(pairs[at : at + 4], torch.device("cpu")) for at in range(0, len(pairs), 4)]


def taught(drafter: Trained, target: Target, lessons: list[Batch], epochs: int) -> Trained:
    drafter.double().train()
    learning = [p for p in drafter.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(learning, lr=1e-2, weight_decay=0)
    for batch in lessons * epochs:
        optimiser.zero_grad()
        loss, metrics = drafter(batch, target, CE())
        (loss / metrics["tokens"]).backward()
        optimiser.step()
    return drafter.eval()


@pytest.mark.parametrize("family", TRAINED)
def test_an_honest_family_decodes_exactly_as_it_is_judged(family, target, lessons, file):
    """Round for round: an average could hide what cancels."""
    drafter = build(family, target.shape)
    assert isinstance(drafter, Trained)
    if isinstance(drafter, LM):
        drafter.adapt()
    taught(drafter, target, lessons, 6)
    values, fault = Decoded(target, file)(drafter)
    assert fault is None
    assert values["validation_tau"] == values["validation_expected_tau"]
    assert values["validation_tau"] > 1.1, "too little was learnt to tell them apart"
    chain = getattr(drafter, "deepest", None) or decoded.CHAIN
    with decoded.plain_chains(drafter, chain):
        done = decode(target, drafter, PROMPTS[:8], sampling=Sampling(), max_new_tokens=32)
        pairs = [(p, a.ids) for p, a in zip(PROMPTS, done.answers, strict=False)]
        with torch.no_grad():
            judged = decoded.judged(drafter, target, pairs)
    for answer, right in zip(done.answers, judged, strict=True):
        rounds = rounds_of(len(answer.ids), answer.accepted, right, chain)
        assert [taken for taken, _ in rounds] == [expected for _, expected in rounds]
        assert sum(1 + taken for taken, _ in rounds) == len(answer.ids)


def test_a_changed_target_is_judged_as_it_has_become(target, lessons, file):
    drafter = Medusa(target.shape, target_lora={"rank": 4, "alpha": 8}, heads_weight=1.0)
    drafter.initialise(target, lambda: torch.ones(40))
    changed = drafter.learning(target)
    assert isinstance(changed, Adapted)
    taught(drafter, changed, lessons, 6)
    values, fault = Decoded(changed, file)(drafter)
    assert fault is None
    assert values["validation_tau"] == values["validation_expected_tau"] > 1.1


def test_a_draft_vocabulary_is_judged_in_the_targets_words(target, lessons, file):
    drafter = build("eagle3", target.shape, vocabulary=30)
    drafter.initialise(target, lambda: torch.arange(40.0))  # the last 30, so that no number fits
    taught(drafter, target, lessons, 12)
    values, fault = Decoded(target, file)(drafter)
    assert fault is None
    assert values["validation_tau"] == values["validation_expected_tau"] > 1.1


def test_tau_is_that_of_decoding(tmp_path: Path):
    target, prompts = tiny_target(), [[3, 4, 5], [9, 8]]
    (tmp_path / "prompts.json").write_text(json.dumps(prompts))
    look = Decoded(target, tmp_path / "prompts.json")
    twin = LM.around(target.model, draft_length=4)
    torch.manual_seed(0)
    stranger = LM(target.shape, layers=1, width=64).double()
    # the target as its own drafter: six tokens a call, the last call cut by the limit
    due = pytest.approx(NEW_TOKENS / -(-NEW_TOKENS // 6))
    assert look(twin) == ({"validation_tau": due, "validation_expected_tau": due}, None)
    done = decode(target, stranger, prompts, sampling=Sampling(), max_new_tokens=NEW_TOKENS)
    calls = sum(len(answer.accepted) for answer in done.answers)
    assert look(stranger)[0]["validation_tau"] == done.tokens / calls
    assert Decoded(target, tmp_path / "none.json")(twin) == ({}, None)


def test_what_training_makes_does_not_depend_on_how_it_will_be_used(target, lessons, file):
    """draft_length, stop_below and tree are no part of a stage's fingerprint."""
    plain = taught(build("eagle", target.shape), target, lessons, 6)
    due = Decoded(target, file)(plain)
    odd = build("eagle", target.shape, draft_length=2)
    assert isinstance(odd, Eagle)
    odd.double().eval().load_state_dict(plain.state_dict())
    odd.stop_below, odd.tree = 0.9, decoded  # type: ignore[assignment]  # anything but a chain
    assert Decoded(target, file)(odd) == due
    assert (odd.draft_length, odd.stop_below, odd.tree, odd.steps) == (2, 0.9, decoded, 4)


# --- disagreement -------------------------------------------------------------------------------


class OnePlaceOn(Medusa):
    """Trains each head on the state one place on: head 1 reads the state that gives its label."""

    def unroll(self, batch: Batch, target: Target) -> Iterator[Tensor]:
        for states in super().unroll(batch, target):
            yield states[:, 1:]


class SameToken(LM):
    """Learns to say the token that it has just read."""

    def _hidden(self, batch: Batch) -> Tensor:
        return super()._hidden(batch).roll(-1, dims=1)


class OneTooFar(LM):
    """Learns the token after the next."""

    def _hidden(self, batch: Batch) -> Tensor:
        return super()._hidden(batch).roll(1, dims=1)


class OtherWords(Eagle3):
    """Drafts from a part of the vocabulary, each token as its neighbour."""

    def _logits(self, out: Tensor) -> Tensor:
        return super()._logits(out).roll(1, dims=-1)


class Stutters(LM):
    """Drafts its first guess at every place."""

    def propose(self, state: LMState, seen: Seen, target: Target) -> Draft:
        draft = super().propose(state, seen, target)
        draft.ids_BN[:, 1:] = draft.ids_BN[:, :1]
        return draft


FIRST, LATER = "labels shifted by a place", "a draft that goes on otherwise than training"
PLANTED = [
    (OnePlaceOn, {}, 2, FIRST),
    (SameToken, {"width": 64}, 6, FIRST),
    (OneTooFar, {"width": 64}, 20, FIRST),
    (OtherWords, {"taps": [0, 1, 2], "steps": 3, "vocabulary": 30}, 12, FIRST),
    (Stutters, {"width": 64}, 20, LATER),
]


@pytest.mark.parametrize(("family", "arguments", "epochs", "cause"), PLANTED)
def test_who_does_not_draft_as_trained_is_named(
    family, arguments, epochs, cause, target, lessons, file
):
    torch.manual_seed(0)
    drafter = family(target.shape, **arguments)
    drafter.initialise(target, lambda: torch.ones(40))
    taught(drafter, target, lessons, epochs)
    values, fault = Decoded(target, file)(drafter)
    assert fault is not None, values
    assert f"{values['validation_tau']:.2f}" in fault
    assert f"{values['validation_expected_tau']:.2f} tokens per target call on 24" in fault
    assert cause in fault


@pytest.mark.parametrize("family", [LM, OneTooFar])
def test_an_untrained_drafter_is_left_alone(family, target, file):
    """There is nothing yet that could disagree."""
    torch.manual_seed(0)
    drafter = family(target.shape, width=64).double().eval()
    values, fault = Decoded(target, file)(drafter)
    assert values["validation_tau"] == pytest.approx(1, abs=0.25)
    assert fault is None


def sums(pairs: list[tuple[int, int]]) -> dict[str, float]:
    """Of answers with so many tokens, decoded and expected, in ten rounds each."""
    return {
        "n": len(pairs),
        "rounds": 10 * len(pairs),
        "tokens": sum(t for t, _ in pairs),
        "expected": sum(e for _, e in pairs),
        "tokens^2": sum(t * t for t, _ in pairs),
        "tokens expected": sum(t * e for t, e in pairs),
        "expected^2": sum(e * e for _, e in pairs),
        "first": 0,
        "first expected": 0,
    }


def test_a_disagreement_is_large_and_beyond_the_noise():
    assert disagreement(sums([(10, 20)] * 64)) is not None
    assert disagreement(sums([(20, 10)] * 64)) is not None  # the other way is no better
    assert disagreement(sums([(10, 10)] * 64)) is None
    assert disagreement(sums([(20, 21)] * 64)) is None  # beyond any noise, but small
    assert disagreement(sums([(10, 20)] * 7)) is None  # too few
    noisy = [(10, 20), (20, 10), (10, 24), (22, 10), (20, 30), (26, 20), (14, 28), (26, 15)]
    assert sum(e for _, e in noisy) / sum(t for t, _ in noisy) > 1.05
    assert disagreement(sums([*noisy, (14, 28), (12, 26)])) is None  # large, but noise
    assert disagreement(sums([*noisy, (14, 28), (12, 26)] * 20)) is not None


def test_the_noise_is_that_of_resampled_prompts():
    pairs = [(10 + i % 2 + i % 5, 20 + i % 3) for i in range(64)]
    ratio = sum(e for _, e in pairs) / sum(t for t, _ in pairs)
    generator = torch.Generator().manual_seed(0)
    at = torch.randint(64, (4000, 64), generator=generator)
    drawn = torch.tensor(pairs).double()[at].sum(1)
    wide = 3 * float((drawn[:, 1] / drawn[:, 0]).std())
    said = disagreement(sums(pairs)) or ""
    assert float(said.split(f"({ratio:.2f} +- ")[1].split()[0]) == pytest.approx(wide, abs=0.01)


def test_rounds_of_known_answers():
    yes, no = True, False

    def expected(accepted: list[int], right: list[list[bool]], chain: int) -> list[int]:
        return [due for _, due in rounds_of(len(right[0]), accepted, right, chain)]

    # one position, judged from true tokens: an autoregressive family
    lm = [[yes, yes, no, yes, yes]]
    assert expected([2, 1], lm, 5) == [2, 1]  # the answer's last token is the target's own
    assert rounds_of(5, [2, 4], lm, 5) == [(2, 2), (1, 1)]  # what was guessed beyond its end
    assert expected([0, 0, 0, 0, 0], lm, 5) == [2, 1, 0, 1, 0]
    assert expected([1, 0, 1], lm, 1) == [1, 0, 1]
    # heads: guess k of a draft that begins at token i is judged at token i + k
    assert expected([1, 1], [[yes, yes, yes, no], [no, no, yes, no]], 2) == [1, 1]
    assert expected([1, 1], [[yes, yes, yes, no], [no, yes, no, no]], 2) == [2, 1]


def test_ranks_share_the_prompts_and_decide_as_one(target, lessons, file, monkeypatch):
    drafter = taught(build("medusa", target.shape), target, lessons, 3)
    whole = Decoded(target, file)(drafter)
    shares: list[dict[str, float]] = []
    for rank in (0, 1, 2):
        monkeypatch.setattr(decoded, "ranks", lambda rank=rank: (rank, 3))
        monkeypatch.setattr(decoded, "sum_over_ranks", lambda s: shares.append(s) or s)
        Decoded(target, file)(drafter)
    total = {key: sum(share[key] for share in shares) for key in shares[0]}
    assert [share["n"] for share in shares] == [8, 8, 8]
    monkeypatch.setattr(decoded, "sum_over_ranks", lambda s: total)
    assert Decoded(target, file)(drafter) == whole


# --- in a training run --------------------------------------------------------------------------


def held_out(prompt: str) -> bool:
    return is_validation({"prompt": prompt, "prompt_ids": [], "answer_ids": []})


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A target and answers, of which some are held out."""
    folder = tmp_path_factory.mktemp("decoded")
    write_target(folder / "target", write_texts(folder))
    (folder / "answers").mkdir()
    rng = random.Random(0)
    rows = []
    names = sorted((f"question {i}" for i in range(1500)), key=lambda n: not held_out(n))
    for name in names[:300]:
        prompt = [1, *(rng.randint(6, 290) for _ in range(rng.randint(2, 12)))]
        answer = [*(rng.randint(6, 290) for _ in range(rng.randint(3, 9))), 5]
        samples = [{"prompt_ids": prompt, "answer_ids": answer}]
        rows.append(json.dumps({"prompt": name, "samples": samples}))
    (folder / "answers" / "shard-00000.jsonl").write_text("\n".join(rows) + "\n")
    return folder


def run(place: Path, folder: Path, **changes: Any) -> dict[str, float]:
    stage = {
        "_target_": "train.distill.Distill",
        "target": {
            "_target_": "decoding.pretrained.Pretrained",
            "path": str(place / "target"),
            "dtype": "float32",
        },
        "drafter": {"_target_": "drafters.medusa.Medusa", "heads": 2},
        "objective": {"_target_": "train.objectives.ForwardKL"},
        "optim": {"_target_": "train.schedule.AdamW", "lr": 1e-3},
        "schedule": {
            "_target_": "train.schedule.Schedule",
            "tokens": STEPS * ROWS * T,
            "batch_tokens": ROWS * T,
            "sequence_length": T,
            "dtype": "float32",
        },
        **changes,
    }
    folder.mkdir(parents=True, exist_ok=True)
    compose.bind(stage, "stages.test")
    return compose.build(stage).run(folder, data=place / "answers")


class Scripted:
    """Decodes to the given numbers, at steps 2, 4, ...; stops the run where it says so."""

    taus = (1.0, 3.0, 2.0, 3.0, 2.5)

    def __init__(self, *_: Any) -> None:
        self.asked = 0

    def __call__(self, drafter: Trained) -> tuple[dict[str, float], str | None]:
        tau = self.taus[self.asked]
        self.asked += 1
        return {"validation_tau": tau, "validation_expected_tau": tau}, None


def state(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "state.safetensors")


def saved(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "artifact" / "model.safetensors")


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one)


def test_the_step_that_decoded_best_is_saved(place: Path, tmp_path: Path, monkeypatch, capfd):
    monkeypatch.setattr(distill, "Decoded", Scripted)
    found = run(place, tmp_path, validate_every=2)
    mine, at = saved(tmp_path), tmp_path / "checkpoints"
    assert same(mine, state(at / "step-00000008"))  # of the two that decoded 3.0, the later
    assert not same(mine, state(at / "step-00000010"))
    assert (found["artifact_step"], found["artifact_tau"], found["validation_tau"]) == (8, 3.0, 2.5)
    said = capfd.readouterr().out
    assert "saved: the drafter of step 8 of 10, which decoded best of all that were" in said
    (copy,) = (tmp_path / "best").iterdir()  # one, and without the optimiser's state
    assert state(copy).keys() == mine.keys()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    taus = {line["step"]: line["validation_tau"] for line in lines if "validation_tau" in line}
    assert taus == dict(zip((2, 4, 6, 8, 10), Scripted.taus, strict=True))
    assert 0 < found["validation_share"] < 1


def test_the_last_step_is_saved_where_nothing_is_decoded(place: Path, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(distill, "Decoded", lambda *_: lambda drafter: ({}, None))
    found = run(place, tmp_path)
    assert same(saved(tmp_path), state(tmp_path / "checkpoints" / "step-00000010"))
    assert not (tmp_path / "best").exists()
    assert "artifact_step" not in found


def test_the_best_step_outlives_a_stop(place: Path, tmp_path: Path, monkeypatch):
    """Stopped behind the best step, and again behind a worse one."""
    monkeypatch.setattr(distill, "Decoded", Scripted)
    monkeypatch.setattr(Scripted, "taus", (1.0, 3.0, 2.0, 2.0, 2.0))
    run(place, tmp_path / "straight", validate_every=2)

    def until(step: int) -> None:
        real = loop.Loop._step

        def stopping(self, engine, step_fn, number, micro):
            loop.STOP.told = number == step
            return real(self, engine, step_fn, number, micro)

        with monkeypatch.context() as patch:
            patch.setattr(loop.Loop, "_step", stopping)
            with pytest.raises(loop.Preempted):
                run(place, tmp_path / "stopped", validate_every=2)

    until(4)
    monkeypatch.setattr(Scripted, "taus", (2.0, 2.0, 2.0))
    until(7)
    monkeypatch.setattr(Scripted, "taus", (2.0, 2.0))
    found = run(place, tmp_path / "stopped", validate_every=2)
    assert found["artifact_step"] == 4
    assert same(saved(tmp_path / "straight"), saved(tmp_path / "stopped"))
    # a run that ended before it could say so has only to save again
    shutil.rmtree(tmp_path / "stopped" / "artifact")
    monkeypatch.setattr(Scripted, "taus", (2.0,))
    run(place, tmp_path / "stopped", validate_every=2)
    assert same(saved(tmp_path / "straight"), saved(tmp_path / "stopped"))


def test_training_ends_where_drafting_is_not_what_is_trained(
    place: Path, tmp_path: Path, monkeypatch
):
    unroll = Medusa.unroll
    monkeypatch.setattr(
        Medusa, "unroll", lambda self, *args: (s[:, 1:] for s in unroll(self, *args))
    )
    with pytest.raises(Failed, match=r"step 3: .* it does not draft as it was trained"):
        run(place, tmp_path, validate_every=3)
    assert max(p.name for p in (tmp_path / "checkpoints").iterdir()) == "step-00000003"
    assert not (tmp_path / "artifact").exists()
    assert not (tmp_path / "best").exists()
    last = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["validation_expected_tau"] > 1.1 * last["validation_tau"]
    with pytest.raises(Failed, match="step 3: "):  # before a further step is taken
        run(place, tmp_path, validate_every=3)
    monkeypatch.undo()
    run(place, tmp_path, validate_every=3)  # mended, it goes on
    assert (tmp_path / "artifact").exists()


def test_honest_training_goes_to_its_end(place: Path, tmp_path: Path):
    found = run(place, tmp_path)
    assert found["validation_expected_tau"] == pytest.approx(found["validation_tau"], rel=0.02)
    prompts = json.loads((tmp_path / "packed" / "prompts.json").read_text())
    assert len(prompts) >= decoded.FEW, "nothing could have been noticed"


def test_validations_are_counted_in_steps(place: Path, tmp_path: Path):
    with pytest.raises(ValueError, match="validate_every is 0; it must be a number of steps"):
        run(place, tmp_path, validate_every=0)


# --- what is said -------------------------------------------------------------------------------


def test_the_last_quarter(tmp_path: Path):
    file = tmp_path / "metrics.jsonl"

    def gain(*taus: tuple[int, float]) -> float | None:
        lines = [{"step": step, "loss": 1.0} for step in range(1, 101)]
        lines += [{"step": step, "validation_tau": tau} for step, tau in taus]
        file.write_text("".join(json.dumps(line) + "\n" for line in lines))
        return last_quarter(file, 100)

    assert gain((50, 1.0), (74, 2.0), (88, 2.4), (100, 2.1)) == pytest.approx(0.05)
    assert gain((100, 2.1)) is None
    assert gain() is None
    file.write_text('{"step": 1, "lo')  # cut off by a loss of power
    assert last_quarter(file, 100) is None
    assert last_quarter(tmp_path / "nowhere.jsonl", 100) is None


def test_who_still_learns_is_told_so():
    found = {
        **{"steps": 10, "validation_tau": 2.1, "validation_expected_tau": 2.14},
        **{"artifact_step": 10, "artifact_tau": 2.1, "validation_share": 0.05},
    }
    assert "raise schedule.tokens" in told(found, 0.05)
    assert "raise schedule.tokens" not in told(found, 0.01)
    assert told(found, None) == (
        "decoded on held-out prompts: 2.10 tokens per target call, 2.14 expected from true tokens"
    )
    assert "validation took 14% of the time" in told(found | {"validation_share": 0.14}, None)

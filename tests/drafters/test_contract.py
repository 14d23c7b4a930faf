"""What every family of conf/drafter/ must keep. A new family is found by its YAML alone."""

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, sharpen, tiny_model, tiny_target
from omegaconf import OmegaConf
from safetensors import safe_open
from torch import Tensor

from data.pack import Document, write
from decoding.loop import decode
from decoding.round import Draft, Seen
from decoding.sampling import Sampling
from decoding.target import Shape, Target
from drafters.base import Batch, Drafter, Prediction, Trained, cast, load, save
from drafters.lm import LM
from train import compose
from train.objectives import CE, ForwardKL

FAMILIES = sorted(path.stem for path in (ROOT / "conf" / "drafter").glob("*.yaml"))
GREEDY, SAMPLED = Sampling(), Sampling(temperature=1.0, seed=2)
PROMPTS = [[5], [1, 2, 3, 4, 5, 6, 7], [9, 8, 9, 8, 9]]


def arguments(family: str, **changes: Any) -> dict[str, Any]:
    """The family's own settings, made tiny where they have a size."""
    config = OmegaConf.to_container(OmegaConf.load(ROOT / "conf" / "drafter" / f"{family}.yaml"))
    assert isinstance(config, dict)
    tiny = {"width": 64, "layers": 1, "draft_length": 4, **changes}
    return {str(k): v for k, v in {**config, **{k: tiny[k] for k in tiny if k in config}}.items()}


def build(family: str, shape: Shape, **changes: Any) -> Drafter:
    """The random drafter that its configuration describes."""
    config = arguments(family, **changes)
    compose.bind(config, f"drafter {family}")
    with torch.random.fork_rng():
        torch.manual_seed(3)
        made = compose.build(config)
        return made if isinstance(made, Drafter) else made(shape)


def is_trained(family: str) -> bool:
    config = arguments(family)
    return issubclass(compose.find(config["_target_"], family), Trained)


TRAINED = [family for family in FAMILIES if is_trained(family)]


@pytest.fixture(scope="module")
def target() -> Target:
    return tiny_target(vocab=40, seed=0, tied=False)


def packed(vocab: int, T: int = 24, seed: int = 0) -> Batch:
    """Two sequences of three documents, the second padded; not every token is supervised."""
    rng = torch.Generator().manual_seed(seed)
    ids_BT = torch.randint(vocab, (2, T), generator=rng)
    doc_BT = torch.tensor([[0] * 7 + [1] * 9 + [2] * (T - 16), [0] * 11 + [1] * 5 + [2] * (T - 16)])
    mask_BT = torch.rand(2, T, generator=rng) < 0.8
    mask_BT[:, 1:] &= doc_BT[:, 1:] == doc_BT[:, :-1]
    mask_BT[:, 0] = False
    doc_BT[1, -3:] = -1
    mask_BT[1, -3:] = False
    return Batch(ids_BT, mask_BT, doc_BT)


class Recorder:
    """An objective that keeps what it is given to judge."""

    def __init__(self, needs_target: bool = False) -> None:
        self.needs_target = needs_target
        self.seen: list[Prediction] = []

    def __call__(self, prediction: Prediction, target: Target | None) -> tuple[Tensor, dict]:
        self.seen.append(prediction)
        return prediction.hidden_ND.sum() * 0, {}


def judged(drafter: Trained, batch: Batch, target: Target) -> list[Prediction]:
    recorder = Recorder()
    with torch.no_grad():
        drafter(batch, target, recorder)
    return sorted(recorder.seen, key=lambda prediction: prediction.position)


def logits_of(prediction: Prediction) -> Tensor:
    return prediction.hidden_ND @ prediction.weight_VD.T


def teacher_forced(drafter: Trained, ids: list[int], target: Target) -> list[Tensor]:
    """For each draft position k, logits [T, V] whose row t is what training judges as the guess of
    token t (rows that a position cannot guess are NaN)."""
    ids_BT = torch.tensor([ids])
    batch = Batch(ids_BT, torch.ones_like(ids_BT).bool(), torch.zeros_like(ids_BT))
    rows = []
    for prediction in judged(drafter, batch, target):
        logits = logits_of(prediction)
        missing = logits.new_full((len(ids) - len(logits), logits.shape[1]), torch.nan)
        assert prediction.labels_N.tolist() == ids[len(missing) :]
        rows.append(torch.cat([missing, logits]))
    return rows


# --- every family --------------------------------------------------------------------------------


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


# --- trained families: gradients, saving ---------------------------------------------------------


@pytest.mark.parametrize("family", TRAINED)
@pytest.mark.parametrize("objective", [CE(), ForwardKL()], ids=["ce", "forward-kl"])
def test_what_is_trained_and_nothing_else(family, objective):
    """Every parameter is reached by each loss, and nothing else moves, least of all the target."""
    target = tiny_target(vocab=40, seed=0, tied=False, dtype=torch.float32)
    drafter = build(family, target.shape)
    assert isinstance(drafter, Trained)
    frozen = {k: v.clone() for k, v in drafter.named_buffers()}
    frozen |= {k: v.detach().clone() for k, v in drafter.named_parameters() if not v.requires_grad}
    target_before = {k: v.clone() for k, v in target.state_dict().items()}
    learning = {k: v for k, v in drafter.named_parameters() if v.requires_grad}
    before = {k: v.detach().clone() for k, v in learning.items()}
    optimiser = torch.optim.AdamW(learning.values(), lr=1e-3, weight_decay=0)
    reached: set[str] = set()
    for step in range(5):
        optimiser.zero_grad()
        loss, _ = drafter(packed(40, seed=step), target, objective)
        loss.backward()
        assert torch.isfinite(loss)
        assert loss > 0
        reached |= {k for k, v in learning.items() if v.grad is not None and v.grad.any()}
        optimiser.step()
    assert reached == set(learning)
    assert all(not torch.equal(v, before[k]) for k, v in learning.items())
    state = dict(drafter.named_buffers()) | dict(drafter.named_parameters())
    assert all(torch.equal(state[k], v) for k, v in frozen.items())
    assert all(v.grad is None for v in target.parameters())
    assert all(torch.equal(v, target_before[k]) for k, v in target.state_dict().items())


@pytest.mark.parametrize("family", TRAINED)
def test_save_and_load(target, family, tmp_path):
    config = {k: v for k, v in arguments(family).items() if k != "_target_"}
    drafter = build(family, target.shape)
    assert isinstance(drafter, Trained)
    sharpen(drafter, 3)
    save(drafter, tmp_path / "made", config)
    again = load(tmp_path / "made", target.shape)
    assert type(again) is type(drafter)
    assert not again.training
    mine, read = drafter.state_dict(), again.state_dict()
    assert mine.keys() == read.keys()
    for key, tensor in mine.items():
        assert read[key].dtype == tensor.dtype
        assert torch.equal(read[key], tensor), key
    for key, buffer in drafter.named_buffers():  # those too that no state dict holds
        assert torch.equal(dict(again.named_buffers())[key], buffer), key
    settings = {k: v for k, v in vars(drafter).items() if isinstance(v, (int, float, str, bool))}
    assert {k: vars(again)[k] for k in settings if k != "training"} == {
        k: v for k, v in settings.items() if k != "training"
    }
    save(again, tmp_path / "again", config)
    for name in sorted(p.name for p in (tmp_path / "made").iterdir()):
        assert (tmp_path / "made" / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


@pytest.mark.parametrize("family", TRAINED)
def test_the_target_is_not_in_the_drafter(target, family, tmp_path):
    """Neither in its state dict after it has worked with one, nor in what is saved."""
    drafter = build(family, target.shape)
    assert isinstance(drafter, Trained)
    keys = set(drafter.state_dict())
    drafter.double()
    decode(target, drafter, PROMPTS, sampling=GREEDY, max_new_tokens=6, end_ids=frozenset())
    drafter(packed(40), target, ForwardKL())
    assert set(drafter.state_dict()) == keys
    assert not any(isinstance(module, Target) for module in drafter.modules())
    theirs = {id(p) for p in target.parameters()}
    assert not any(id(p) in theirs for p in drafter.parameters())
    save(drafter, tmp_path, {k: v for k, v in arguments(family).items() if k != "_target_"})
    stored = [
        key
        for file in tmp_path.glob("*.safetensors")
        for key in safe_open(str(file), "pt").keys()  # noqa: SIM118
    ]
    assert len(stored) == len({p.data_ptr() for p in drafter.state_dict().values()})


def test_what_does_not_fit_is_not_loaded(target, tmp_path):
    config = {k: v for k, v in arguments("lm").items() if k != "_target_"}
    drafter = build("lm", target.shape)
    assert isinstance(drafter, Trained)
    save(drafter, tmp_path, config)
    other = Shape.of(tiny_model(vocab=41).config)
    with pytest.raises((ValueError, RuntimeError), match=r"41|size mismatch"):
        load(tmp_path, other)
    (tmp_path / "drafter.json").write_text('{"family": "../../evil", "arguments": {}}')
    with pytest.raises(ValueError, match="which is not one of drafters/"):
        load(tmp_path, target.shape)
    (tmp_path / "drafter.json").unlink()
    with pytest.raises(ValueError, match=r"holds no drafter: it has no drafter\.json"):
        load(tmp_path, target.shape)


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


# --- trained families: learning ------------------------------------------------------------------

PERIOD, CYCLE_VOCAB, LENGTH = 11, 16, 48


@pytest.fixture(scope="module")
def cycle(tmp_path_factory) -> list[Batch]:
    """A language in which each token has one successor, packed with documents of many lengths."""
    rng = torch.Generator().manual_seed(0)

    def documents():
        for _ in range(400):
            first, n = (
                torch.randint(PERIOD, (1,), generator=rng),
                3 + torch.randint(30, (1,), generator=rng),
            )
            ids = [(int(first) + i) % PERIOD for i in range(int(n))]
            yield Document(ids, [True] * len(ids))

    made = write(tmp_path_factory.mktemp("cycle"), documents(), LENGTH, 10**6)
    return [made.batch(list(range(i, i + 16))) for i in range(0, len(made) - 16, 16)]


def train(drafter: Trained, target: Target | None, batches: list[Batch], steps: int) -> Trained:
    optimiser = torch.optim.AdamW(drafter.parameters(), lr=3e-3)
    objective = CE()
    for step, batch in enumerate(itertools.islice(itertools.cycle(batches), steps)):
        for group in optimiser.param_groups:
            group["lr"] = 3e-3 * (1 - step / steps)
        optimiser.zero_grad()
        loss, metrics = drafter(batch, target, objective)
        (loss / metrics["tokens"]).backward()
        optimiser.step()
    return drafter.eval()


@pytest.fixture(scope="module")
def cyclic_target(cycle) -> Target:
    """A Llama that speaks the cyclic language."""
    model = tiny_model(vocab=CYCLE_VOCAB, spread=0.05, dtype=torch.float32, tied=False)
    lm = train(LM.around(model.train()), None, cycle, 150)
    assert isinstance(lm, LM)
    target = Target(lm.model)
    (answer,) = decode(target, None, [[4, 5]], sampling=GREEDY, max_new_tokens=33).answers
    assert answer.ids == [(6 + i) % PERIOD for i in range(33)]
    return target


def accepted_everything(drafter: Drafter, target: Target) -> bool:
    prompts = [[4], [7, 8, 9], [9, 10, 0, 1, 2, 3, 4]]
    out = decode(target, drafter, prompts, sampling=GREEDY, max_new_tokens=36)
    assert [a.ids for a in out.answers] == [
        [(p[-1] + 1 + i) % PERIOD for i in range(36)] for p in prompts
    ]
    return all(a.accepted == a.drafted and min(a.drafted) > 0 for a in out.answers)


def shifted(drafter: Trained) -> type[Trained]:
    """The same family with labels one token too late."""

    class Shifted(type(drafter)):  # type: ignore[misc]
        def forward(self, batch, target, objective):
            def late(prediction: Prediction, target: Target | None):
                prediction.labels_N = (prediction.labels_N + 1) % PERIOD
                return objective(prediction, target)

            late.needs_target = objective.needs_target  # type: ignore[attr-defined]
            return super().forward(batch, target, late)

    return Shifted


@pytest.mark.parametrize("family", TRAINED)
def test_a_cyclic_language_is_learnt(cycle, cyclic_target, family):
    """U7: every drafted token is accepted; with any off-by-one between labels, mask, states and
    drafting this is impossible (the test below)."""
    drafter = build(family, cyclic_target.shape)
    assert isinstance(drafter, Trained)
    assert not accepted_everything(drafter.eval(), cyclic_target)
    train(drafter.train(), cyclic_target, cycle, 150)
    assert accepted_everything(drafter, cyclic_target)


@pytest.mark.parametrize("family", TRAINED)
def test_labels_one_token_late_are_noticed(cycle, cyclic_target, family):
    """The cyclic test can fail."""
    drafter = build(family, cyclic_target.shape)
    assert isinstance(drafter, Trained)
    drafter.__class__ = shifted(drafter)
    train(drafter.train(), cyclic_target, cycle, 150)
    assert not accepted_everything(drafter, cyclic_target)


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

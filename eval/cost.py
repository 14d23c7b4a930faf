"""What a round costs on this device, measured, and the speedup that such costs predict.

A round drafts, lets the target score the drafted tokens, verifies and keeps. v(m) is the
milliseconds of the target's share over m tokens a row, o what a round takes besides (decoding.md,
a.1). Everything is measured in turn with everything else, so that a slow spell of the machine
falls on all alike, and told by its median.

Shapes: W nodes of a level; m: tokens of a target call for each row, the root and N drafted nodes.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import torch

from decoding.sampling import Dice, Sampling
from decoding.target import Target
from drafters.base import Trained, write_json
from drafters.heads import Heads
from drafters.lm import LM
from eval.rounds import CONTEXT, GREEDY, Fixed, Overhead, Round, Subject, in_turn, now
from eval.shapes import Shape

SIZES = (1, 2, 4, 8, 16, 32, 64)  # tokens of a pass that are timed; between them, linearly
PROMPTS = (16, 128)  # tokens of a prompt whose prefill is timed
SPELL = "plain decoding"  # in a ledger: the round that tells how fast the machine was
ROOT = Path(__file__).parent.parent


@dataclass(frozen=True)
class Costs:
    """Milliseconds of rounds with one drafter in one shape, each by batch.

    tokens: m of its verification; verify: v by m; draft: of one draft; overhead: o; prefill: by
    prompt tokens, the target's and what the drafter adds.
    """

    tokens: int
    verify: dict[int, dict[int, float]]
    draft: dict[int, float]
    overhead: dict[int, float]
    prefill: dict[int, dict[int, tuple[float, float]]]

    def predict(
        self,
        tau: float,
        batch: int = 1,
        answer_tokens: float | None = None,
        prompt_tokens: float | None = None,
    ) -> float:
        """The speedup over plain decoding at `tau` tokens per target call.

        tau (v(1) + o) / (draft + v(m) + o); with a mean answer and prompt length also the prefill,
        which both pay, and the drafter's on top. In a batch whose rows end apart, tau is plain
        decoding's rounds over the drafting ones, which includes waiting for the last row.
        """
        if batch not in self.draft:
            raise ValueError(f"batch {batch} was not measured; there are {sorted(self.draft)}")
        plain = self.verify[batch][1] + self.overhead[batch]
        drafted = self.draft[batch] + self.verify[batch][self.tokens] + self.overhead[batch]
        if answer_tokens is None or prompt_tokens is None:
            return tau * plain / drafted
        known = self.prefill[batch]
        target, extra = (
            max(0.0, between({n: parts[i] for n, parts in known.items()}, prompt_tokens))
            for i in (0, 1)
        )
        rounds = answer_tokens / tau
        return (target + answer_tokens * plain) / (target + extra + rounds * drafted)

    def told(self) -> dict[str, Any]:
        """For a report's conditions, at the smallest batch: {"verify_ms": {"1": ms, ...},
        "draft_ms", "overhead_ms"}."""
        least = min(self.draft)
        return {
            "verify_ms": {str(m): ms for m, ms in sorted(self.verify[least].items())},
            "draft_ms": self.draft[least],
            "overhead_ms": self.overhead[least],
        }


def measure(
    model: Target,
    drafter: Trained,
    shape: Shape,
    batches: list[int],
    *,
    sampling: Sampling = GREEDY,
    context: int = CONTEXT,
) -> Costs:
    """The costs of this drafter in this shape, drafts of full length; v(m) over SIZES at the
    smallest batch. `model` is the original target also for a family that changes it."""
    shape.give(drafter)
    decoded = drafter.on(model)
    subjects: dict[tuple[Any, ...], Subject] = {}
    rounds = {b: Round(decoded, drafter, b, context, sampling) for b in batches}
    for b in batches:
        subjects["round", b] = rounds[b]
        subjects["rest", b] = Overhead(model, b)
        for m in SIZES if b == min(batches) else (1,):
            subjects["pass", b, m] = Round(model, Fixed(m - 1), b, context, sampling)
        for n in PROMPTS:
            subjects["start", b, n] = Round(decoded, drafter, b, n, sampling).begin
    found = in_turn(subjects, "costs of a round", model)
    tokens = rounds[min(batches)].tokens
    verify: dict[int, dict[int, float]] = {b: {} for b in batches}
    prefill: dict[int, dict[int, tuple[float, float]]] = {b: {} for b in batches}
    for (what, b, *size), ms in found.items():
        if what == "pass":
            verify[b][size[0]] = ms[1]
        elif what == "start":  # a later draft is no prefill
            prefill[b][size[0]] = (ms[0], ms[1] - found["round", b][0])
    for b in batches:
        verify[b][tokens] = found["round", b][1]
    draft = {b: found["round", b][0] for b in batches}
    overhead = {b: found["rest", b][0] for b in batches}
    return Costs(tokens, verify, draft, overhead, prefill)


class Ledger:
    """Milliseconds kept in a JSON file of one target, dtype, device, thread count and software.

    The file is named by a hash of those and repeats them; figures of anything else are not read.
    All are of one spell of the machine: what is measured later is scaled by the rounds of plain
    decoding that are measured beside it, which may be a tenth faster than they were.
    """

    def __init__(self, folder: Path, model: Target, machine: str) -> None:
        self.model = model
        self.key = {
            "target": model.name,
            "revision": model.revision,
            "shape": asdict(model.shape),
            "machine": machine,
            "device": model.device.type,
            "dtype": str(model.dtype).removeprefix("torch."),
            "threads": torch.get_num_threads(),
            "versions": {name: version(name) for name in ("torch", "transformers")},
            "sources": _sources(),
        }
        mark = hashlib.sha256(json.dumps(self.key, sort_keys=True).encode()).hexdigest()[:12]
        self.file = folder / f"costs-{mark}.json"
        self.known = self._read()

    def fill(
        self, wanted: Mapping[str, Callable[[], Subject]], said: str
    ) -> dict[str, tuple[float, ...]]:
        """The milliseconds of all that is wanted; what is not known yet is made and measured."""
        missing = {name: make() for name, make in wanted.items() if name not in self.known}
        if missing:
            found = in_turn({SPELL: Round(self.model, Fixed(0)), **missing}, said)
            plain = sum(found.pop(SPELL))
            self.known.setdefault(SPELL, (plain,))
            pace = self.known[SPELL][0] / plain
            self.known |= {name: tuple(ms * pace for ms in parts) for name, parts in found.items()}
            self.file.parent.mkdir(parents=True, exist_ok=True)
            write_json(self.file, {"key": self.key, "milliseconds": self.known})
        return {name: self.known[name] for name in wanted}

    def _read(self) -> dict[str, tuple[float, ...]]:
        try:
            kept = json.loads(self.file.read_text(encoding="utf-8"))
            if kept["key"] == self.key:
                return {name: tuple(map(float, ms)) for name, ms in kept["milliseconds"].items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return {}  # none, or a broken one: what it should hold is measured again
        return {}


def passes(
    ledger: Ledger, model: Target, sizes: Iterable[int], rows: int = 1
) -> tuple[dict[int, float], float]:
    """v by m for these m, and o."""
    at = f"batch {rows}"
    wanted: dict[str, Callable[[], Subject]] = {
        f"{m} tokens, {at}": partial(Round, model, Fixed(m - 1), rows) for m in sizes
    }
    found = ledger.fill(wanted | {f"rest, {at}": partial(Overhead, model, rows)}, f"target, {at}")
    return {m: found[f"{m} tokens, {at}"][1] for m in sizes}, found[f"rest, {at}"][0]


def chains(
    ledger: Ledger,
    model: Target,
    drafters: Mapping[str, Trained],
    lengths: Mapping[str, list[int]],
    rows: int = 1,
) -> dict[str, tuple[dict[int, float], dict[int, float]]]:
    """Of each drafter the milliseconds of a draft and of its verification, by the chain's length.

    Drafters go by names that say all that their speed depends on, for the ledger knows no more.
    """

    def subject(drafter: Trained, length: int) -> Subject:
        following = Round(drafter.on(model), drafter, rows)

        def go() -> tuple[float, float]:
            Shape(length=length).give(drafter)
            return following()

        return go

    at = f"batch {rows}"
    wanted = {
        f"{name}, chain of {n}, {at}": partial(subject, drafter, n)
        for name, drafter in drafters.items()
        for n in lengths[name]
    }
    found = ledger.fill(wanted, f"drafts, {at}")
    return {
        name: (
            {n: found[f"{name}, chain of {n}, {at}"][0] for n in lengths[name]},
            {n: found[f"{name}, chain of {n}, {at}"][1] for n in lengths[name]},
        )
        for name in drafters
    }


def pass_milliseconds(model: Target, tokens: int, context: int = CONTEXT) -> float:
    """v(tokens) at batch 1, of a draft that is verified as a tree."""
    return verify_milliseconds(model, [tokens], context)[tokens]


def verify_milliseconds(
    model: Target, sizes: list[int], context: int = CONTEXT
) -> dict[int, float]:
    """v(m) at batch 1 for each of these m, of drafts that are verified as trees."""
    rounds = {m: Round(model, Fixed(m - 1, tree=True), 1, context) for m in sizes}
    return {m: ms[1] for m, ms in in_turn(rounds, "passes of the target", model).items()}


@torch.inference_mode()
def level_milliseconds(
    model: Target, drafter: Heads | LM, widths: list[int], context: int = CONTEXT, repeats: int = 9
) -> tuple[float, dict[int, float]]:
    """Median milliseconds of a drafter's first level (with reading one committed pair), and of a
    further level of so many asked nodes, each with the choice of its best guesses."""
    ids = torch.arange(context, device=model.device)[None] % model.shape.vocab_size
    cache = model.new_cache(1, context + 64)
    sampling = Sampling()
    seen = model.prefill(ids, [context], cache, drafter.taps)
    state: Any = drafter.start(model, cache, sampling, [0], context + 8)
    first: list[float] = []
    ranks = min(8, model.shape.vocab_size)
    later: dict[int, list[float]] = {width: [] for width in widths}
    drafter.ask(state, seen, model, Dice(sampling, [0], seen.length)).begin()
    for _ in range(repeats):
        for width in widths:
            newest = seen.select([0])
            newest.ids_BS, newest.count = newest.ids_BS[:, -1:], [1]
            newest.hidden_BSD = newest.hidden_BSD[:, -1:]
            if newest.taps_BSLD is not None:
                newest.taps_BSLD = newest.taps_BSLD[:, -1:]
            growth = drafter.ask(state, newest, model, Dice(sampling, [0], seen.length))
            first.append(_timed(model, lambda: growth.begin().topk(ranks)))  # noqa: B023
            drafted = torch.zeros(1, width, dtype=torch.long, device=model.device)
            asked = (drafted, torch.zeros_like(drafted), 1)
            later[width].append(_timed(model, lambda: growth.deepen(*asked).topk(ranks)))  # noqa: B023
    return median(first), {width: median(times) for width, times in later.items()}


def between(measured: Mapping[int, float], at: float) -> float:
    """Linear between what was measured, and beyond it along the last stretch."""
    known = sorted(measured)
    if at <= known[0] or len(known) == 1:
        return measured[known[0]]
    high = next((k for k in known if k >= at), known[-1])
    low = known[known.index(high) - 1]
    share = (at - low) / (high - low)
    return measured[low] + share * (measured[high] - measured[low])


def _timed(model: Target, work: Callable[[], Any]) -> float:
    begin = now(model)
    work()
    return (now(model) - begin) * 1000


def _sources() -> str:
    """Hash of the code whose speed it is."""
    digest = hashlib.sha256()
    files = [*ROOT.glob("decoding/*.py"), *ROOT.glob("drafters/*.py"), Path(__file__)]
    for file in sorted(files):
        digest.update(file.name.encode() + file.read_bytes())
    return digest.hexdigest()[:12]

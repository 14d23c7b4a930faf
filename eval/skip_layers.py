"""Stage `skip_layers`: which sublayers the target can skip to draft for itself (Draft & Verify).

The objective is the paper's: measured tokens a second of greedy self-speculation. Its search is
not: instead of Bayesian optimisation there are random masks and then small changes of the best,
fewer and seeded (decoding.md, section d). A mask has 2 L entries: attention of L layers, then MLP.
"""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tqdm import tqdm

from data.generate import read
from data.sources import prompt_key
from decoding.loop import decode
from decoding.pretrained import Pretrained
from decoding.sampling import Sampling
from decoding.target import Target
from drafters.base import write_json
from drafters.layer_skip import FOUND, LayerSkip, middle
from eval.ranks import read as read_rows

Mask = tuple[bool, ...]
Sums = dict[str, float]
FINALISTS = 3
NEIGHBOURS = 64  # drawn at most, until one was not tried yet
PLAIN = "plain"


class SkipLayers:
    """Searches the layers that `LayerSkip` skips, on prompts of a generate stage, which bench
    leaves out.

    trials: masks to try; prompts: to try them on, and as many others to compare the best three with
    plain decoding on, `repeats` times in turn; max_new_tokens: of each answer. draft_length and
    threshold: as LayerSkip has them. dtype null: as the target is configured.
    """

    on_device = True

    def __init__(
        self,
        *,
        target: Pretrained,
        trials: int = 200,
        prompts: int = 8,
        max_new_tokens: int = 32,
        repeats: int = 3,
        draft_length: int = 8,
        threshold: float = 0.6,
        dtype: str | None = None,
        seed: int = 0,
    ) -> None:
        if min(trials, prompts, max_new_tokens, repeats) < 1:
            raise ValueError(
                f"skip_layers has trials {trials}, prompts {prompts}, max_new_tokens "
                f"{max_new_tokens}, repeats {repeats}; each must be at least 1"
            )
        LayerSkip(draft_length=draft_length, threshold=threshold)  # its own checks
        self.target, self.trials, self.prompts = target, trials, prompts
        self.max_new_tokens, self.repeats = max_new_tokens, repeats
        self.draft_length, self.threshold = draft_length, threshold
        self.dtype, self.seed = dtype, seed

    def run(self, out: Path, *, data: Path, target: Path | None = None) -> dict[str, float]:
        """Writes artifact/layers.json: the mask, what it is worth and what finding it cost."""
        searched, fresh = self._prompts(data)
        model = self.target.load(target, self.dtype)
        kept = out / "trials.jsonl"
        self.measure(model, None, fresh[:1])  # warm-up: not counted
        tried = self._search(model, searched, kept)
        best = sorted(tried, key=lambda mask: -speed(tried[mask]))[:FINALISTS]
        found = self._compare(model, best, fresh)
        chosen = max(best, key=lambda mask: speed(found[mask]))
        worth = _worth(found[chosen], found[PLAIN])
        cost = {
            "trials": len(tried),
            "prompts": len(searched),
            "tokens": round(sum(sums["tokens"] for sums in tried.values())),
            "seconds": sum(sums["seconds"] for sums in tried.values()),
        }
        note = layers_of(chosen) | {
            "draft_length": self.draft_length,
            "threshold": self.threshold,
            **worth,
            "prompts": len(fresh),
            "max_new_tokens": self.max_new_tokens,
            "dtype": str(model.dtype).removeprefix("torch."),
            "search": cost,
        }
        (out / "artifact").mkdir(parents=True, exist_ok=True)
        write_json(out / "artifact" / FOUND, note)
        print(_said(note, model.shape.layers), flush=True)
        return {name: worth[name] for name in ("speedup", "tau", "alpha", "cost")}

    def measure(self, model: Target, mask: Mask | None, prompts: list[list[int]]) -> Sums:
        """Sums over greedy answers to each prompt alone, the drafter cold before the first; no mask
        is plain decoding. `cut`: rounds whose draft was not accepted whole; `draft_steps`: passes
        of the drafter."""
        drafter = None
        if mask is not None:
            settings: dict[str, Any] = layers_of(mask)
            drafter = LayerSkip(
                **settings, draft_length=self.draft_length, threshold=self.threshold
            )
        sums = dict.fromkeys(("tokens", "seconds", "rounds", "draft_steps", "accepted"), 0.0)
        sums |= dict.fromkeys(("cut", "draft_seconds", "verify_seconds"), 0.0)
        for ids in prompts:
            done = decode(
                model, drafter, [ids], sampling=Sampling(), max_new_tokens=self.max_new_tokens
            )
            (answer,) = done.answers
            pairs = list(zip(answer.drafted, answer.accepted, strict=True))
            more = {
                "draft_steps": sum(answer.drafted),
                "accepted": sum(answer.accepted),
                "cut": sum(accepted < drafted for drafted, accepted in pairs),
            }
            timed = ("tokens", "seconds", "rounds", "draft_seconds", "verify_seconds")
            more |= {name: getattr(done, name) for name in timed}
            sums = {name: value + more[name] for name, value in sums.items()}
        return sums

    def _prompts(self, data: Path) -> tuple[list[list[int]], list[list[int]]]:
        """Distinct prompts to search on, and others, in the order of their hashes."""
        found: dict[str, list[int]] = {}
        for sample in read(data):
            found.setdefault(prompt_key(sample["prompt"]), sample["prompt_ids"])
        if len(found) < 2:
            raise ValueError(
                f"{data} has {len(found)} different prompts; skip_layers searches on some and "
                "measures what it found on others: generate more answers"
            )
        ids = [found[key] for key in sorted(found)]
        n = min(self.prompts, len(ids) // 2)
        return ids[:n], ids[n : 2 * n]

    def _search(self, model: Target, prompts: list[list[int]], kept: Path) -> dict[Mask, Sums]:
        """Sums of every mask that was tried; those in `kept` already are not measured again."""
        layers = model.shape.layers
        tried = {mask_of(row, layers): row["sums"] for row in read_rows(kept)}
        best = 0.0
        with (
            tqdm(total=self.trials, desc="masks of layers", unit="mask") as bar,
            kept.open("a", encoding="utf-8") as stream,
        ):

            def tokens_per_second(mask: Mask) -> float:
                nonlocal best
                if mask not in tried:
                    tried[mask] = self.measure(model, mask, prompts)
                    row = layers_of(mask) | {"sums": tried[mask]}
                    stream.write(json.dumps(row) + "\n")
                    stream.flush()
                best = max(best, speed(tried[mask]))
                bar.update()
                bar.set_postfix({"best tokens/s": f"{best:.0f}"})
                return speed(tried[mask])

            asked = search(tokens_per_second, layers, self.trials, self.seed)
        return {mask: tried[mask] for mask in asked}

    def _compare(
        self, model: Target, masks: list[Mask], prompts: list[list[int]]
    ) -> dict[Any, Sums]:
        """Sums of each mask and of plain decoding, in turn on each prompt."""
        arms: dict[Any, Mask | None] = {PLAIN: None} | {mask: mask for mask in masks}
        found: dict[Any, Sums] = {}
        turns = [ids for _ in range(self.repeats) for ids in prompts]
        for ids in tqdm(turns, desc="best masks and plain decoding", unit="prompt"):
            for name, mask in arms.items():
                more = self.measure(model, mask, [ids])
                so_far = found.get(name, dict.fromkeys(more, 0.0))
                found[name] = {key: so_far[key] + more[key] for key in more}
        return found


def search(
    objective: Callable[[Mask], float], layers: int, trials: int, seed: int = 0
) -> dict[Mask, float]:
    """What was tried, at most `trials` masks, and the objective of each.

    The usual mask first, then random ones of every density up to an eighth of the trials, then the
    best so far with one or two entries changed (a random one where those were tried). Few layers
    are tried whole. The same objective and seed give the same masks.
    """
    rng = random.Random(seed)
    usual = [n in middle(layers) for n in range(layers)] * 2
    tried: dict[Mask, float] = {(False,) * len(usual): 0.0}  # it would draft at the full cost
    mask = tuple(usual)
    while len(tried) <= min(trials, 2 ** len(usual) - 1):
        if mask not in tried:
            tried[mask] = objective(mask)
        mask = _random(len(usual), rng)
        if len(tried) > trials // 8:
            best = max(tried, key=lambda m: tried[m])
            near = (_neighbour(best, rng) for _ in range(NEIGHBOURS))
            mask = next((m for m in near if m not in tried), mask)
    return {mask: found for mask, found in tried.items() if any(mask)}


def _random(entries: int, rng: random.Random) -> Mask:
    density = rng.uniform(0.1, 0.7)
    return tuple(rng.random() < density for _ in range(entries))


def _neighbour(mask: Mask, rng: random.Random) -> Mask:
    flipped = rng.sample(range(len(mask)), rng.choice((1, 2)))
    return tuple(skip != (n in flipped) for n, skip in enumerate(mask))


def layers_of(mask: Mask) -> dict[str, list[int]]:
    """The layers that a mask skips, as LayerSkip takes them."""
    layers = len(mask) // 2
    return {
        "attention": [n for n in range(layers) if mask[n]],
        "mlp": [n for n in range(layers) if mask[layers + n]],
    }


def mask_of(skipped: dict[str, Any], layers: int) -> Mask:
    """`layers_of`, backwards."""
    return tuple(n in skipped[kind] for kind in ("attention", "mlp") for n in range(layers))


def speed(sums: Sums) -> float:
    """Tokens a second."""
    return sums["tokens"] / sums["seconds"]


def _worth(drafted: Sums, plain: Sums) -> dict[str, float]:
    """tau: tokens per target call; alpha: how often a drafted token stands whose predecessors do;
    cost (c): a pass of the drafter over one of plain decoding."""
    step = drafted["draft_seconds"] / drafted["draft_steps"]
    return {
        "tokens_per_second": speed(drafted),
        "plain_tokens_per_second": speed(plain),
        "speedup": speed(drafted) / speed(plain),
        "tau": drafted["tokens"] / drafted["rounds"],
        "alpha": drafted["accepted"] / (drafted["accepted"] + drafted["cut"]),
        "cost": step / (plain["verify_seconds"] / plain["rounds"]),
    }


def _said(note: dict[str, Any], layers: int) -> str:
    """What was found, in two or three sentences."""
    cost = note["search"]
    pays = "" if note["speedup"] > 1 else "No mask that was tried beats plain decoding. "
    return (
        f"{pays}The fastest mask skips {len(note['attention'])} attentions and {len(note['mlp'])} "
        f"MLPs of {layers} layers: {note['speedup']:.2f}x as fast as plain decoding on "
        f"{note['prompts']} prompts that it was not searched on "
        f"({note['tokens_per_second']:.1f} against {note['plain_tokens_per_second']:.1f} tokens/s, "
        f"alpha {note['alpha']:.2f}, a draft step costs {note['cost']:.2f} of a pass). The search "
        f"took {cost['trials']} masks on {cost['prompts']} prompts, {cost['tokens']:,} tokens, "
        f"{cost['seconds']:.0f} seconds"
    )

"""Stage `tune_tree`: which places of a token tree are worth verifying, by measured hit rates.

A place is a path of ranks: (0, 2) is the third guess after the best first one. On the target's own
answers it is counted how often the true continuation takes each place; the places hit most often
are the best tree of their number (they are closed under parents, since no path is hit more often
than its beginning). How many pay is decided by the measured cost of verifying and drafting them.

Shapes: B batch, T tokens, K levels.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from data.chat import require_same_tokenizer
from data.documents import is_validation
from data.generate import read
from decoding.pretrained import Pretrained
from decoding.target import Target
from drafters.base import Batch, Look, Prediction, cast, load, write_json
from drafters.heads import Heads, ahead
from drafters.lm import LM
from drafters.trees import Static, tree_of
from eval.choice import load_fastest
from eval.cost import SIZES, between, level_milliseconds, verify_milliseconds

Place = tuple[int, ...]
WIDTHS = (1, 2, 4, 8, 16)


class TuneTree:
    """Chooses a static tree for a drafter that grows trees.

    nodes: at most so many; depth: at most so deep (and no deeper than the drafter has heads);
    ranks: a node has at most so many children; rows: answers to count on; graphs: as in bench.
    """

    on_device = True

    def __init__(
        self,
        *,
        target: Pretrained,
        nodes: int = 48,
        depth: int = 6,
        ranks: int = 8,
        rows: int = 400,
        batch_size: int = 16,
        graphs: bool = False,
    ) -> None:
        if min(nodes, depth, ranks, rows, batch_size) < 1:
            raise ValueError(
                f"tune_tree has nodes {nodes}, depth {depth}, ranks {ranks}, rows {rows}, "
                f"batch_size {batch_size}; each must be at least 1"
            )
        self.target = replace(target, graphs=graphs)
        self.nodes, self.depth, self.ranks = nodes, depth, ranks
        self.rows, self.batch_size = rows, batch_size

    def run(
        self, out: Path, *, drafter: Path, data: Path, target: Path | None = None
    ) -> dict[str, float]:
        """Writes artifact/tree.json (a `tree` of drafters/trees.py), the greedy tree of all nodes
        beside it, and what both were chosen by."""
        require_same_tokenizer(self.target.tokenizer(target), str(drafter))
        model, _ = load_fastest(self.target, target)  # as bench will
        ours = load(drafter, model.shape)
        assert isinstance(ours, Heads | LM), f"{type(ours).__name__} grows no trees"
        cast(ours, model.dtype).to(model.device)
        model = ours.on(model)
        depth = min(self.depth, getattr(ours, "deepest", None) or self.depth)
        hits, positions = self._count(model, ours, depth, data)
        if not positions:
            raise ValueError(f"the answers in {data} are too short to count hits on")
        if not hits:
            raise ValueError(
                "none of the drafter's guesses hit what the target said: train it longer before "
                "tuning a tree"
            )
        ranked = sorted(hits, key=lambda place: (-hits[place], len(place), place))[: self.nodes]
        rate = {place: hits[place] / positions for place in ranked}
        verify = verify_milliseconds(model, [m for m in SIZES if m <= 2 * self.nodes])
        ours.tree = tree_of(_tree(ranked))
        first, level = level_milliseconds(model, ours, list(WIDTHS))
        chosen, speed = fastest(rate, verify, first, level)
        found = {
            "positions": positions,
            "tau": 1 + sum(rate[place] for place in chosen),
            "tau_of_all_nodes": 1 + sum(rate.values()),
            "speedup": speed,
        }
        folder = out / "artifact"
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "tree.json", _tree(chosen))
        write_json(folder / "greedy.json", _tree(ranked))
        costs = {"verify_ms": verify, "first_level_ms": first, "level_ms": level}
        hit = {" ".join(map(str, place)): rate[place] for place in ranked}
        write_json(folder / "tuning.json", found | costs | {"hit_rate": hit})
        print(
            f"tree of {len(chosen)} nodes, {max(map(len, chosen))} deep, out of {len(ranked)}: "
            f"{found['tau']:.2f} tokens per target call expected on {positions:,} positions "
            f"({found['tau_of_all_nodes']:.2f} with all), {speed:.2f}x by the measured costs"
            + ("; counted on answers of the original target" if ours.changes_target else ""),
            flush=True,
        )
        return found

    @torch.no_grad()
    def _count(
        self, model: Target, ours: Heads | LM, depth: int, data: Path
    ) -> tuple[Counter[Place], int]:
        """How often the target's own answers take each place, and out of how many positions."""
        if hasattr(ours, "steps"):
            ours.steps = depth  # type: ignore[assignment]  # as deep as it will draft
        hits: Counter[Place] = Counter()
        positions = 0
        total = -(-self.rows // self.batch_size)
        for batch in tqdm(self._batches(data, model), total=total, desc="hit rates"):
            ranks_BTK = _ranks(ours.eval(), batch, model, depth)
            for path in ranks_BTK.flatten(0, 1)[ahead(batch, 1).flatten()].tolist():
                positions += 1
                for k, rank in enumerate(path):
                    if not 0 <= rank < self.ranks:
                        break
                    hits[tuple(path[: k + 1])] += 1
        return hits, positions

    def _batches(self, data: Path, model: Target) -> Iterator[Batch]:
        """Prompts with their answers, padded to the right; the answers' tokens are supervised.

        Of the rows that training kept for validation, where there are any: on what a drafter has
        seen it hits more often.
        """
        unseen = islice(filter(is_validation, read(data)), self.rows)
        samples = iter(list(unseen) or list(islice(read(data), self.rows)))
        while group := list(islice(samples, self.batch_size)):
            pairs = [(s["prompt_ids"], s["answer_ids"]) for s in group]
            yield Batch.of(pairs, model.device)


def fastest(
    rate: dict[Place, float],
    verify: dict[int, float],
    first: float,
    level: dict[int, float],
) -> tuple[list[Place], float]:
    """The tree with the most tokens a millisecond, and its speedup over decoding without drafts.

    rate: expected hits a round of each place; verify: milliseconds of a target pass over m tokens;
    first and level: milliseconds of the drafter's first level and of one of w asked nodes. For each
    depth the places are taken in the order of their rates, which is best for every number.
    """
    plain = 1 / between(verify, 1)
    ranked = sorted(rate, key=lambda place: (-rate[place], len(place), place))
    best, most = ranked[:1], 0.0
    for depth in range(1, max(map(len, rate)) + 1):
        places = [place for place in ranked if len(place) <= depth]
        for n in range(1, len(places) + 1):
            tree = places[:n]
            inner = Counter(len(place) for place in {p[:-1] for p in tree if len(p) > 1})
            drafting = first + sum(between(level, width) for width in inner.values())
            milliseconds = between(verify, n + 1) + drafting
            speed = (1 + sum(rate[place] for place in tree)) / milliseconds / plain
            if speed > most:
                best, most = tree, speed
    return best, most


def _ranks(ours: Heads | LM, batch: Batch, model: Target, depth: int) -> Tensor:
    """For each pair t and level k the rank of x_{t+1+k} in what the drafter says there, given the
    true tokens before it, [B, T-2, K]; -1 where it cannot be drafted or is not supervised."""
    B, T = batch.ids_BT.shape
    ranks_BTK = torch.full((B, T - 2, depth), -1, device=batch.ids_BT.device)

    def look(prediction: Prediction, target: Target | None) -> None:
        k = prediction.position + 1
        if isinstance(ours, LM):  # its guess of a token is the same at every level
            rank_BT = torch.full_like(batch.ids_BT, -1)
            rank_BT[:, 1:][batch.mask_BT[:, 1:]] = _rank(prediction, target)
            for k in range(1, depth + 1):
                ranks_BTK[:, : T - 1 - k, k - 1] = rank_BT[:, 1 + k :].where(ahead(batch, k), -1)
        elif 1 <= k <= depth:
            valid = ahead(batch, k)
            ranks_BTK[:, : T - 1 - k, k - 1][valid] = _rank(prediction, target)

    ours(batch, model, Look(look))
    return ranks_BTK


def _rank(prediction: Prediction, target: Target | None, chunk: int = 256) -> Tensor:
    found, ids_V = [], prediction.vocabulary_V
    for at in range(0, len(prediction.labels_N), chunk):
        piece = slice(at, at + chunk)
        logits_CV = prediction.logits(prediction.hidden_ND[piece], target)
        labels_C = prediction.labels_N[piece]
        inside_C = torch.ones_like(labels_C, dtype=torch.bool)
        if ids_V is not None:
            place_C = torch.searchsorted(ids_V, labels_C).clamp(max=len(ids_V) - 1)
            inside_C, labels_C = ids_V[place_C] == labels_C, place_C
        mine_C1 = logits_CV.gather(1, labels_C[:, None])
        found.append(torch.where(inside_C, (logits_CV > mine_C1).sum(-1), -1))
    return torch.cat(found) if found else prediction.labels_N


def _tree(places: list[Place]) -> dict[str, object]:
    paths = [list(place) for place in Static([list(p) for p in places]).paths]
    return {"kind": "static", "paths": paths}

"""What draft heads share: they read the target's states, grow trees and save one file.

Shapes: B batch, T tokens, S newly committed tokens, W nodes of a level, D target width,
V vocabulary. Pair t is (x_{t+1}, h_t): a token and the target's state before it. Head k (from 1)
guesses x_{t+1+k} from pair t and what it guessed before (reference: alignment table).
"""

from abc import abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from decoding.cache import Cache
from decoding.round import Draft, Seen
from decoding.sampling import Dice, Sampling
from decoding.target import Shape, Target
from drafters.base import Batch, Metrics, Objective, Prediction, Trained, write_json
from drafters.confined import confined
from drafters.layer import Attend, Layer, cached
from drafters.trees import Chain, Growth, above, tree_of

WEIGHTS = "model.safetensors"


@dataclass
class Grown:
    """A drafter's memory: keys of the committed pairs (families with attention), and of the draft
    in the making each asked node's features [B, n, F] and which asked nodes stand above it."""

    cache: Cache
    sampling: Sampling
    requests: list[int]
    begun: bool = False
    features_BnF: Tensor = field(default_factory=lambda: torch.empty(0))
    above_Bnn: Tensor = field(default_factory=lambda: torch.empty(0))

    def select(self, rows: list[int]) -> None:
        self.cache.select(rows)
        self.requests = [self.requests[r] for r in rows]


class Heads(Trained):
    """Draft heads on a frozen target.

    draft_length: tokens of a chain, used while there is no tree; stop_below and sample as in
    drafters/lm.py; tree: {kind: static | dynamic | branching | beams, ...}, see drafters/trees.py;
    decay: what draft position n weighs in the loss is decay^n.
    """

    needs_target = reads_last = True
    free = frozenset({"draft_length", "stop_below", "sample", "tree"})
    cached_layers = 0
    deepest: int | None = None  # longest path it can draft; None: any

    def __init__(
        self,
        shape: Shape,
        *,
        decay: float,
        draft_length: int,
        stop_below: float,
        sample: bool,
        tree: dict[str, Any] | None,
    ) -> None:
        super().__init__()
        if not 0 < decay <= 1:
            raise ValueError(f"decay is {decay}; it must lie above 0 and at most at 1")
        self.shape, self.decay = shape, decay
        self.draft_length, self.stop_below, self.sample = draft_length, stop_below, sample
        self.tree = tree_of(tree)
        Chain(draft_length, stop_below=stop_below)  # its own checks, before anything starts

    # --- what a family says ---------------------------------------------------------------------

    @abstractmethod
    def begin(self, state: Grown, seen: Seen, target: Target) -> Tensor:
        """Logits of what follows the root, [B, V], after reading what is new."""

    @abstractmethod
    def deepen(
        self, state: Grown, target: Target, ids_BW: Tensor, parents_BW: Tensor, depth: int
    ) -> Tensor:
        """Logits of what follows these nodes, [B, W, V]; see drafters/trees.py."""

    @abstractmethod
    def unroll(self, batch: Batch, target: Target) -> Iterator[Tensor | tuple[Tensor, Tensor]]:
        """Training: for head 1, 2, ... its states [B, T', D] for pairs t = 0, 1, ... (T' may be
        T - 1, the number of pairs, or less); with a second tensor, a loss of its own [B, T']."""

    def head(self, k: int) -> Tensor | None:
        """Weight of head k, [V, D]; None: the target's own."""
        return None

    def vocabulary(self) -> Tensor | None:
        """The tokens of the heads' rows, rising; None: all of the target's."""
        return None

    def config(self) -> dict[str, Any]:
        """What config.json says beside the weights, for serving engines."""
        return {}

    # --- drafting -------------------------------------------------------------------------------

    def start(
        self, target: Target, cache: Cache, sampling: Sampling, requests: list[int], max_len: int
    ) -> Grown:
        return Grown(
            Cache(self.cached_layers, len(requests), max_len + 64), sampling, list(requests)
        )

    @torch.inference_mode()
    def propose(self, state: Grown, seen: Seen, target: Target) -> Draft:
        length = min(self.draft_length, self.deepest or self.draft_length)
        tree = self.tree or Chain(length, stop_below=self.stop_below, sample=self.sample)
        if self.deepest is not None and tree.depth > self.deepest:
            raise ValueError(
                f"the tree is {tree.depth} levels deep and the drafter has {self.deepest} heads; "
                "tune a tree for this drafter"
            )
        dice = Dice(state.sampling, state.requests, seen.length)
        return tree.grow(confined(self.ask(state, seen, target, dice)))

    def ask(self, state: Grown, seen: Seen, target: Target, dice: Dice) -> Growth:
        """This round's questions, as trees put them."""
        return _Round(self, state, seen, target, dice)

    def mine(self, states: Tensor) -> Tensor:
        """The target's states in the drafter's own dtype."""
        return states.to(next(self.parameters()).dtype)

    def read_pairs(self, state: Grown, seen: Seen) -> tuple[Tensor, list[int]]:
        """Columns of `seen` that hold unread pairs, [B, S'] padded by repeating the last, and how
        many each row has. The first token of a prompt has no state before it and is no pair,
        unless it is the whole prompt."""
        begin = [0 if state.begun or c == 1 else 1 for c in seen.count]
        new = [c - b for c, b in zip(seen.count, begin, strict=True)]
        state.begun = True
        columns = [
            [min(b + s, c - 1) for s in range(max(new))]
            for b, c in zip(begin, seen.count, strict=True)
        ]
        return torch.tensor(columns, device=seen.ids_BS.device), new

    def append(
        self,
        state: Grown,
        values_BSX: Tensor,
        columns_BS: Tensor,
        new: list[int],
        layers: list[Layer],
        read_BSI: Tensor | None = None,
    ) -> Tensor:
        """Layers over those pairs, which join the committed ones; the output at the last, [B, X].

        read: what the (only) layer's attention reads instead of the values.
        """
        cache, (B, S) = state.cache, columns_BS.shape
        cache.open(S, values_BSX.device)
        mask = cache.causal(B, S, values_BSX.device)
        start_B1 = torch.tensor(cache.length, device=values_BSX.device)[:, None]
        positions_BS = start_B1 + torch.arange(S, device=values_BSX.device)
        x, read = _columns(values_BSX, columns_BS), None
        if read_BSI is not None:
            read = _columns(read_BSI, columns_BS)
        for number, layer in enumerate(layers):
            x = layer(x, positions_BS, cached(cache, number, mask), read)
        cache.length = [n + k for n, k in zip(cache.length, new, strict=True)]
        at_B = torch.tensor(new, device=x.device) - 1
        return x[torch.arange(B, device=x.device), at_B]

    def below(self, state: Grown, parents_BW: Tensor, depth: int) -> tuple[Tensor, Attend]:
        """Positions of nodes at this depth, and attention to the committed pairs and what stands
        above each, for families whose guesses attend."""
        cache, device = state.cache, parents_BW.device
        allowed_BWA = self.reach(state, parents_BW)
        cache.open(parents_BW.shape[1], device, after=allowed_BWA.shape[2] - parents_BW.shape[1])
        start_B1 = torch.tensor(cache.length, device=device)[:, None]
        attend = cached(cache, 0, cache.mask(allowed_BWA))
        return (start_B1 + depth - 1).expand(parents_BW.shape), attend

    def reach(self, state: Grown, parents_BW: Tensor) -> Tensor:
        """Which asked nodes (old ones, then these) each of these nodes may attend to, [B, W, A];
        remembers it for the nodes below."""
        state.above_Bnn = above(state.above_Bnn, parents_BW)
        return state.above_Bnn[:, -parents_BW.shape[1] :]

    def parents(self, state: Grown, parents_BW: Tensor) -> Tensor:
        """Features of the parents, [B, W, F]."""
        F = state.features_BnF.shape[2]
        return state.features_BnF.gather(1, parents_BW[:, :, None].expand(-1, -1, F))

    def remember(self, state: Grown, features_BWF: Tensor, root: bool = False) -> None:
        """Keeps the features of nodes just asked about; `root` begins a new round."""
        if root:
            state.features_BnF = features_BWF
            state.above_Bnn = features_BWF.new_zeros(0)
        else:
            state.features_BnF = torch.cat([state.features_BnF, features_BWF], dim=1)

    # --- training -------------------------------------------------------------------------------

    def forward(
        self, batch: Batch, target: Target | None, objective: Objective
    ) -> tuple[Tensor, Metrics]:
        assert target is not None, "draft heads read the target's states"
        known = batch.cached or target(batch.ids_BT, doc_BT=batch.doc_BT, taps=self.taps)
        batch = replace(batch, cached=known)
        tokens = ahead(batch, 1)  # those of a later position are among them: a document is a run
        row_N, t_N = tokens.nonzero(as_tuple=True)
        at_N = t_N + 1  # of the state that predicts the token, h_{t+k}
        same: dict[str, Any] = {
            "labels_N": batch.ids_BT[row_N, at_N + 1],
            "row_N": row_N,
            "target_ND": known.hidden_BTD[row_N, at_N] if objective.needs_target else None,
            "vocabulary_V": self.vocabulary(),
        }
        guessed, extra = [], torch.zeros((), device=batch.ids_BT.device)
        deepest = max(1, batch.ids_BT.shape[1] - 2)  # beyond, a sequence has no labels
        for k, found in enumerate(islice(self.unroll(batch, target), deepest), start=1):
            states_BTD, extra_BT = found if isinstance(found, tuple) else (found, None)
            valid, pair_N, share = ahead(batch, k), at_N - k, self.decay ** (k - 1)
            whole = F.pad(valid, (k - 1, 0))  # [t] of head k stands at [t + k - 1] of head 1
            guessed.append(
                Prediction(
                    hidden_ND=states_BTD[row_N, pair_N.clamp(min=0)],
                    weight_VD=self.head(k),
                    position=k - 1,
                    real_N=whole[row_N, t_N],
                    share=share * self.objective_weight,
                    **same,
                )
            )
            if extra_BT is not None:
                extra = extra + share * extra_BT[:, : valid.shape[1]][valid].sum()
        loss, measured = objective(guessed, target)
        names = ["" if k == 1 else f"@{k}" for k in range(1, len(guessed) + 1)]
        each = zip(names, measured, strict=True)
        return loss + extra, {f"{key}{at}": v for at, m in each for key, v in m.items()}

    objective_weight = 1.0

    def initialise(self, target: Target | None, counts: Callable[[], Tensor]) -> None:
        """Nothing to take over."""

    # --- files ----------------------------------------------------------------------------------

    def save(self, folder: Path) -> None:
        tensors = {k: v.detach().contiguous().cpu() for k, v in self.written().items()}
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
        write_json(folder / "config.json", self.config())

    def written(self) -> dict[str, Tensor]:
        """What the file holds: the state dict, and what serving engines want beside it."""
        return self.state_dict()

    def found(self, folder: Path) -> dict[str, Tensor]:
        """The state dict that such a file gives back."""
        return load_file(folder / WEIGHTS)

    def read(self, folder: Path) -> None:
        saved = self.found(folder)
        mine = self.state_dict()
        wrong = [k for k in saved.keys() | mine.keys() if k not in saved or k not in mine]
        wrong += [k for k in saved.keys() & mine.keys() if saved[k].shape != mine[k].shape]
        if wrong:
            raise ValueError(f"{folder} does not fit the drafter: {', '.join(sorted(wrong)[:5])}")
        for key, module in self.named_parameters():
            module.data = module.data.to(saved[key].dtype)
        self.load_state_dict(saved)


@dataclass
class _Round:
    """A drafter asked about one round; what trees call a Growth."""

    drafter: Heads
    state: Grown
    seen: Seen
    target: Target
    dice: Dice

    def begin(self) -> Tensor:
        return self.drafter.begin(self.state, self.seen, self.target)

    def deepen(self, ids_BW: Tensor, parents_BW: Tensor, depth: int) -> Tensor:
        return self.drafter.deepen(self.state, self.target, ids_BW, parents_BW, depth)


def _columns(values_BSX: Tensor, columns_BS: Tensor) -> Tensor:
    return values_BSX.gather(1, columns_BS[:, :, None].expand(-1, -1, values_BSX.shape[2]))


def last(seen: Seen, values_BSX: Tensor) -> Tensor:
    """What stands at each row's last committed token, [B, X]."""
    at_B = torch.tensor(seen.count, device=values_BSX.device) - 1
    return values_BSX[torch.arange(len(seen.count), device=values_BSX.device), at_B]


def ahead(batch: Batch, k: int) -> Tensor:
    """Boolean [B, T - 1 - k]: pairs t whose label x_{t+1+k} is supervised and whose state h_t
    belongs to the label's document."""
    doc_BT = batch.doc_BT
    return batch.mask_BT[:, 1 + k :] & (doc_BT[:, : -1 - k] == doc_BT[:, 1 + k :])


def pair_mask(batch: Batch) -> tuple[Tensor, Tensor]:
    """Mask [B, 1, T-1, T-1] and positions [B, T-1] for attention among pairs: causal, within a
    document, and never to a pair whose token begins a document (no state belongs to it)."""
    doc_BT = batch.doc_BT
    mine_Bt, T = doc_BT[:, 1:], doc_BT.shape[1] - 1
    whole_Bt = doc_BT[:, :-1] == mine_Bt
    index_T = torch.arange(T, device=doc_BT.device)
    causal = index_T[:, None] >= index_T[None, :]
    same = mine_Bt[:, :, None] == mine_Bt[:, None, :]
    itself = torch.eye(T, dtype=torch.bool, device=doc_BT.device)
    mask = (same & causal & whole_Bt[:, None, :]) | itself
    first = torch.ones_like(doc_BT, dtype=torch.bool)
    first[:, 1:] = ~whole_Bt
    index = torch.arange(T + 1, device=doc_BT.device)
    begin_BT = torch.where(first, index, 0).cummax(dim=1).values
    return mask[:, None], (index - begin_BT)[:, :-1]

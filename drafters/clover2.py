"""The family `clover2`: Clover-2 (Xiao et al. 2024, 2408.00264, and its released code).

Shapes: B batch, T tokens, W nodes of a level, D target width, V vocabulary.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from decoding.round import Seen
from decoding.target import Shape, Target
from drafters.base import Batch
from drafters.clover import AttentionDecoder, rows
from drafters.heads import Grown, Heads, pair_mask
from drafters.layer import Layer, copy_last_layer, over, rms_norm


class Clover2(Heads):
    """The attention decoder comes first, so that e(x_{t+1}) is merged into every state; then a
    projection, `layers` augmenting layers and a final norm give the feature of head 1. A second
    decoder and projection, shared by all later heads, take it on token by token.

    Loss of head k: decay^(k-1) (regression SmoothL1(feature, h_{t+k}) + the objective). Features
    meet the target's head, frozen. Departure: the code reads the target's last state before its
    final norm, which not every architecture shows; this reads it after.
    """

    def __init__(
        self,
        shape: Shape,
        *,
        heads: int = 5,
        layers: int = 2,
        regression: float = 10.0,
        decay: float = 0.7,
        draft_length: int = 5,
        stop_below: float = 0.0,
        sample: bool = True,
        tree: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(
            shape, decay=decay, draft_length=draft_length, stop_below=stop_below, sample=sample,
            tree=tree,
        )  # fmt: skip
        if heads < 2 or layers < 1 or regression < 0:
            raise ValueError(
                f"clover2 has heads {heads}, layers {layers}, regression {regression}; they must "
                "be at least 2, 1 and 0"
            )
        width = shape.hidden_size
        self.deepest, self.cached_layers, self.regression = heads, layers, regression
        self.first, self.later = (AttentionDecoder(shape, activate=False) for _ in range(2))
        self.first_fc = nn.Linear(width, width, bias=False)
        self.later_fc = nn.Linear(2 * width, width, bias=False)
        self.layers: Any = nn.ModuleList(Layer(shape) for _ in range(layers))
        self.norm = rms_norm(shape)
        for matrix in (self.first_fc, self.later_fc):
            nn.init.uniform_(matrix.weight, 0, 0.01)
            with torch.no_grad():
                matrix.weight[:, :width] += torch.eye(width)

    def begin(self, state: Grown, seen: Seen, target: Target) -> Tensor:
        merged_BSD = self._merge(self.mine(seen.hidden_BSD), seen.ids_BS, target)
        columns_BS, new = self.read_pairs(state, seen)
        h_BD = self.append(state, merged_BSD, columns_BS, new, list(self.layers))
        self.remember(state, h_BD[:, None], root=True)
        return target.logits(self.norm(h_BD))

    def deepen(
        self, state: Grown, target: Target, ids_BW: Tensor, parents_BW: Tensor, depth: int
    ) -> Tensor:
        h_BWD = self._go_on(self.parents(state, parents_BW), ids_BW, target)
        self.remember(state, h_BWD)
        return target.logits(self.norm(h_BWD))

    def unroll(self, batch: Batch, target: Target) -> Iterator[tuple[Tensor, Tensor]]:
        assert batch.cached is not None
        truth_BTD = self.mine(batch.cached.hidden_BTD)
        mask, positions_BT = pair_mask(batch)
        h_BTD = self._merge(truth_BTD[:, :-1], batch.ids_BT[:, 1:], target)
        for layer in self.layers:
            h_BTD = layer(h_BTD, positions_BT, over(mask))
        T = batch.ids_BT.shape[1]
        for k in range(1, (self.deepest or 1) + 1):
            if k > 1:
                h_BTD = self._go_on(h_BTD[:, : T - k], batch.ids_BT[:, k:], target)
            feature_BTD = self.norm(h_BTD)
            gap = F.smooth_l1_loss(feature_BTD, truth_BTD[:, k:], reduction="none")
            yield feature_BTD, self.regression * gap.float().mean(-1)

    def initialise(self, target: Target | None, counts: Callable[[], Tensor]) -> None:
        assert target is not None, "the augmenting layers start as the target's last"
        for layer in self.layers:
            copy_last_layer(target, layer)

    def _merge(self, h: Tensor, ids: Tensor, target: Target) -> Tensor:
        return self.first_fc(self.first(h, self.mine(rows(ids, target))))

    def _go_on(self, h: Tensor, ids: Tensor, target: Target) -> Tensor:
        e = self.mine(rows(ids, target))
        return self.later_fc(torch.cat([self.later(h, e), e], dim=-1))

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
from drafters.clover import AttentionDecoder
from drafters.heads import Grown, Heads, pair_mask
from drafters.layer import Layer, copy_final_norm, copy_last_layer, over, rms_norm


class Clover2(Heads):
    """h = norm(layers(first(h_t, e(x_{t+1})))): the attention decoder comes first, so that every
    state has its next token merged into it before the `layers` augmenting layers. Head 1 says
    head_norm(first_fc h). A later head k takes h = later(h, e(x_{t+k})), which is carried on, and
    says head_norm(later_fc [h; e]); one decoder and projection serve all later heads. e(x) is x's
    row of W_lm as it is.

    Loss of head k: decay^(k-1) (regression SmoothL1(what it says, h_{t+k}) + the objective).
    Features meet the target's head, frozen. Departure: the code reads the target's last state
    before its final norm, which not every architecture shows; this reads it after.
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
        self.first, self.later = _decoder(shape), _decoder(shape)
        self.first_fc, self.later_fc = nn.Linear(width, width), nn.Linear(2 * width, width)
        for linear in (self.first_fc, self.later_fc):
            _near_identity(linear)
        self.layers: Any = nn.ModuleList(Layer(shape) for _ in range(layers))
        self.norm, self.head_norm = rms_norm(shape), rms_norm(shape)

    def begin(self, state: Grown, seen: Seen, target: Target) -> Tensor:
        e_BSD = self._rows(seen.ids_BS, target)
        merged_BSD = self.first(self.mine(seen.hidden_BSD), e_BSD)
        columns_BS, new = self.read_pairs(state, seen)
        h_BD = self.norm(self.append(state, merged_BSD, columns_BS, new, list(self.layers)))
        self.remember(state, h_BD[:, None], root=True)
        return target.logits(self.head_norm(self.first_fc(h_BD)))

    def deepen(
        self, state: Grown, target: Target, ids_BW: Tensor, parents_BW: Tensor, depth: int
    ) -> Tensor:
        e_BWD = self._rows(ids_BW, target)
        h_BWD = self.later(self.parents(state, parents_BW), e_BWD)
        self.remember(state, h_BWD)
        return target.logits(self._say(h_BWD, e_BWD))

    def unroll(self, batch: Batch, target: Target) -> Iterator[tuple[Tensor, Tensor]]:
        assert batch.cached is not None
        truth_BTD = self.mine(batch.cached.hidden_BTD)
        mask, positions_BT = pair_mask(batch)
        e_BTD = self._rows(batch.ids_BT, target)
        h_BTD = self.first(truth_BTD[:, :-1], e_BTD[:, 1:])
        for layer in self.layers:
            h_BTD = layer(h_BTD, positions_BT, over(mask))
        h_BTD = self.norm(h_BTD)
        said_BTD = self.head_norm(self.first_fc(h_BTD))
        T = batch.ids_BT.shape[1]
        for k in range(1, (self.deepest or 1) + 1):
            if k > 1:
                h_BTD = self.later(h_BTD[:, : T - k], e_BTD[:, k:])
                said_BTD = self._say(h_BTD, e_BTD[:, k:])
            gap = F.smooth_l1_loss(said_BTD, truth_BTD[:, k:], reduction="none")
            yield said_BTD, self.regression * gap.float().mean(-1)

    def initialise(self, target: Target | None, counts: Callable[[], Tensor]) -> None:
        assert target is not None, "layers and norms start as the target's last"
        for layer in self.layers:
            copy_last_layer(target, layer)
        for norm in (self.norm, self.head_norm):
            copy_final_norm(target, norm)

    def _say(self, h: Tensor, e: Tensor) -> Tensor:
        return self.head_norm(self.later_fc(torch.cat([h, e], dim=-1)))

    def _rows(self, ids: Tensor, target: Target) -> Tensor:
        return self.mine(target.head_rows(ids))


def _decoder(shape: Shape) -> AttentionDecoder:
    """Clover-1's without activation and with biases; its values start close to zero."""
    decoder, width = AttentionDecoder(shape, activate=False), shape.hidden_size
    decoder.q, decoder.k, decoder.v = (nn.Linear(width, width) for _ in range(3))
    for linear in (decoder.q, decoder.k):
        _near_identity(linear)
    nn.init.uniform_(decoder.v.weight, 0, 0.01)
    nn.init.zeros_(decoder.v.bias)
    return decoder


@torch.no_grad()
def _near_identity(linear: nn.Linear) -> None:
    """[I | 0] and noise from U(0, 0.01); no bias yet."""
    nn.init.uniform_(linear.weight, 0, 0.01)
    rows = linear.out_features
    linear.weight[:, :rows] += torch.eye(rows)
    nn.init.zeros_(linear.bias)

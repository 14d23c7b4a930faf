"""The family `clover`: heads with a regressive connection (Xiao et al. 2024, 2405.00263).

Shapes: B batch, T tokens, W nodes of a level, D target width, H attention heads, V vocabulary.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from decoding.round import Seen
from decoding.target import Shape, Target
from drafters.base import Batch
from drafters.heads import Grown, Heads, last, pair_mask
from drafters.layer import Layer, copy_last_layer, over, rms_norm
from drafters.medusa import ResBlocks


class AttentionDecoder(nn.Module):
    """h + SiLU(a W_V e), where a is, for each attention head, the cosine of W_Q norm(h) and W_K e.

    The paper writes attention over this one key; a softmax over one key is always 1 and gives W_Q
    and W_K no gradient, so the gate is the cosine of the authors' released code. W_Q and W_K start
    near the identity, W_V at zero.
    """

    def __init__(self, shape: Shape, activate: bool = True) -> None:
        super().__init__()
        width = shape.hidden_size
        self.heads, self.activate = shape.heads if width % shape.heads == 0 else 1, activate
        self.norm = rms_norm(shape)
        self.q, self.k, self.v = (nn.Linear(width, width, bias=False) for _ in range(3))
        for matrix in (self.q, self.k):
            nn.init.normal_(matrix.weight, std=0.01)
            with torch.no_grad():
                matrix.weight += torch.eye(width)
        nn.init.zeros_(self.v.weight)

    def forward(self, h: Tensor, e: Tensor) -> Tensor:
        q, k, v = (
            x.unflatten(-1, (self.heads, -1)) for x in (self.q(self.norm(h)), self.k(e), self.v(e))
        )
        gate = F.cosine_similarity(q, k, dim=-1)
        mixed = (gate[..., None] * v).flatten(-2)
        return h + (F.silu(mixed) if self.activate else mixed)


class Regressor(nn.Module):
    """The paper's ablation of the attention decoder: h + SiLU(W [h; e] + b), zero at the start."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.linear = nn.Linear(2 * shape.hidden_size, shape.hidden_size)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, h: Tensor, e: Tensor) -> Tensor:
        return h + F.silu(self.linear(torch.cat([h, e], dim=-1)))


class Clover(Heads):
    """h_i = decoder(h_{i-1}, e(x_{t+i})); head i guesses x_{t+1+i} by W_lm ResBlocks_i(h_i).

    h_0 is the target's state, through one more decoder layer if `augmenting` (it starts as the
    target's last where that is Llama-like); e(x) is x's row of W_lm, normalised. `attention` false
    puts an MLP in the decoder's place; `regressive` false leaves h_i = h_{i-1}. All three off it is
    `medusa` with head: shared.
    """

    def __init__(
        self,
        shape: Shape,
        *,
        heads: int = 4,
        layers: int = 1,
        attention: bool = True,
        regressive: bool = True,
        augmenting: bool = True,
        decay: float = 0.8,
        draft_length: int = 4,
        stop_below: float = 0.0,
        sample: bool = True,
        tree: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(
            shape, decay=decay, draft_length=draft_length, stop_below=stop_below, sample=sample,
            tree=tree,
        )  # fmt: skip
        if min(heads, layers) < 1:
            raise ValueError(f"clover has heads {heads}, layers {layers}; each must be at least 1")
        if attention and not regressive:
            raise ValueError(
                "clover has attention on and regressive off, but the attention decoder reads what "
                "the regressive connection brings; switch attention off too"
            )
        self.deepest, self.cached_layers = heads, int(augmenting)
        self.augment = Layer(shape) if augmenting else None
        self.decoder: nn.Module | None = None
        if regressive:
            self.decoder = AttentionDecoder(shape) if attention else Regressor(shape)
        self.blocks = nn.ModuleList(ResBlocks(shape.hidden_size, layers) for _ in range(heads))

    def begin(self, state: Grown, seen: Seen, target: Target) -> Tensor:
        states_BSD = self.mine(seen.hidden_BSD)
        if self.augment is None:
            h_BD = last(seen, states_BSD)
        else:
            columns_BS, new = self.read_pairs(state, seen)
            h_BD = self.append(state, states_BSD, columns_BS, new, [self.augment])
        h_BD = self._regress(h_BD, last(seen, seen.ids_BS), target)
        self.remember(state, h_BD[:, None], root=True)
        return target.logits(self.blocks[0](h_BD))

    def deepen(
        self, state: Grown, target: Target, ids_BW: Tensor, parents_BW: Tensor, depth: int
    ) -> Tensor:
        h_BWD = self._regress(self.parents(state, parents_BW), ids_BW, target)
        self.remember(state, h_BWD)
        return target.logits(self.blocks[depth](h_BWD))

    def unroll(self, batch: Batch, target: Target) -> Iterator[Tensor]:
        assert batch.cached is not None
        h_BTD = self.mine(batch.cached.hidden_BTD)[:, :-1]
        if self.augment is not None:
            mask, positions_BT = pair_mask(batch)
            h_BTD = self.augment(h_BTD, positions_BT, over(mask))
        T = batch.ids_BT.shape[1]
        for k, blocks in enumerate(self.blocks, start=1):
            h_BTD = self._regress(h_BTD[:, : T - k], batch.ids_BT[:, k:], target)
            yield blocks(h_BTD)

    def initialise(self, target: Target | None, counts: Callable[[], Tensor]) -> None:
        assert target is not None, "the augmenting block starts as the target's last layer"
        if self.augment is not None:
            copy_last_layer(target, self.augment)

    def _regress(self, h: Tensor, ids: Tensor, target: Target) -> Tensor:
        return h if self.decoder is None else self.decoder(h, self.mine(rows(ids, target)))


def rows(ids: Tensor, target: Target) -> Tensor:
    """Each token's row of W_lm at length 1, [..., D]."""
    return F.normalize(target.head_rows(ids).float(), dim=-1)

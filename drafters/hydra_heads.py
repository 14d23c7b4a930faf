"""The family `hydra_heads`: heads that read the tokens drafted before them (Ankner et al. 2024).

Shapes: B batch, T tokens, W nodes of a level, K heads, D target width, V vocabulary.
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
from drafters.layer import Layer, over
from drafters.medusa import ResBlocks, copy_head, own_heads


class Mixer(nn.Module):
    """ResBlocks whose first reads k + 1 vectors: R c + SiLU(W c + b) with c = [h; E_1; ...; E_k].

    The learned residual R starts as [I | 0] and W, b at zero, so that a fresh head is Medusa's.
    """

    def __init__(self, width: int, inputs: int, layers: int) -> None:
        super().__init__()
        self.residual = nn.Linear(inputs * width, width, bias=False)
        self.linear = nn.Linear(inputs * width, width)
        self.rest = ResBlocks(width, layers - 1)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)
        with torch.no_grad():
            self.residual.weight.zero_()
            self.residual.weight[:, :width].copy_(torch.eye(width))

    def forward(self, c: Tensor) -> Tensor:
        return self.rest(self.residual(c) + F.silu(self.linear(c)))


class HydraHeads(Heads):
    """Head k guesses x_{t+1+k} from [h_t; E(x_{t+1}); ...; E(x_{t+k})], each with an output head of
    its own that starts as the target's.

    layers: of a head's MLP; prefix: a decoder layer over the target's states before them. Hydra++
    is layers 4, prefix true and the objective forward_kl; its dropout of 0.2 and the norm behind
    its prefix layer are left out.
    """

    def __init__(
        self,
        shape: Shape,
        *,
        heads: int = 4,
        layers: int = 1,
        prefix: bool = False,
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
            raise ValueError(f"hydra has heads {heads}, layers {layers}; each must be at least 1")
        self.deepest, self.cached_layers = heads, int(prefix)
        self.prefix = Layer(shape) if prefix else None
        width = shape.hidden_size
        self.mixers = nn.ModuleList(Mixer(width, k + 1, layers) for k in range(1, heads + 1))
        self.lm_heads: Any = own_heads(shape, heads)

    def begin(self, state: Grown, seen: Seen, target: Target) -> Tensor:
        states_BSD = self.mine(seen.hidden_BSD)
        h_BD = last(seen, states_BSD)
        if self.prefix is not None:
            h_BD = self.read_states(state, seen, states_BSD)
        embed_BD = self.mine(target.embed(last(seen, seen.ids_BS)))
        slots = h_BD.new_zeros(len(h_BD), 1, (self.deepest or 1) + 1, h_BD.shape[1])
        slots[:, 0, 0], slots[:, 0, 1] = h_BD, embed_BD
        self.remember(state, slots.flatten(2), root=True)
        return self._logits(1, slots)[:, 0]

    def deepen(
        self, state: Grown, target: Target, ids_BW: Tensor, parents_BW: Tensor, depth: int
    ) -> Tensor:
        B, W = ids_BW.shape
        above = self.parents(state, parents_BW).view(B, W, -1, self.shape.hidden_size)
        slots = above.clone()
        slots[:, :, depth + 1] = self.mine(target.embed(ids_BW))
        self.remember(state, slots.flatten(2))
        return self._logits(depth + 1, slots)

    def unroll(self, batch: Batch, target: Target) -> Iterator[Tensor]:
        assert batch.cached is not None
        h_BTD = self.mine(batch.cached.hidden_BTD)[:, :-1]
        if self.prefix is not None:
            mask, positions_BT = pair_mask(batch)
            h_BTD = self.prefix(h_BTD, positions_BT, over(mask))
        embed_BTD = self.mine(target.embed(batch.ids_BT))
        T = batch.ids_BT.shape[1]
        for k, mixer in enumerate(self.mixers, start=1):
            read = [h_BTD[:, : T - k]]
            read += [embed_BTD[:, 1 + j : 1 + j + T - k] for j in range(k)]
            yield mixer(torch.cat(read, dim=-1))

    def head(self, k: int) -> Tensor:
        return self.lm_heads[k - 1].weight

    def initialise(self, target: Target | None, counts: Callable[[], Tensor]) -> None:
        assert target is not None, "heads start as the target's"
        copy_head(target, self.lm_heads)
        if self.prefix is not None:
            self.prefix.start_as_identity()

    def read_states(self, state: Grown, seen: Seen, states_BSD: Tensor) -> Tensor:
        """The prefix layer over the states that are new; its output at the root, [B, D]."""
        assert self.prefix is not None
        columns_BS, new = self.read_pairs(state, seen)
        return self.append(state, states_BSD, columns_BS, new, [self.prefix])

    def _logits(self, k: int, slots_BWKD: Tensor) -> Tensor:
        mixed_BWD = self.mixers[k - 1](slots_BWKD[:, :, : k + 1].flatten(2))
        return self.lm_heads[k - 1](mixed_BWD)

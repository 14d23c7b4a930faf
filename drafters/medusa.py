"""The family `medusa`: independent heads on the target's last state (Cai et al. 2024, Medusa-1).

Shapes: B batch, T tokens, W nodes of a level, K heads, D target width, V vocabulary.
"""

from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from decoding.round import Seen
from decoding.target import Shape, Target
from drafters.base import Batch
from drafters.heads import Grown, Heads, last


class ResBlocks(nn.Module):
    """x + SiLU(W x + b), `layers` times, each with matrices of its own; weights and biases start at
    zero, so that a fresh block is the identity. Tensors are named as vLLM reads them."""

    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        self.layers: Any = nn.ModuleList(nn.Linear(width, width) for _ in range(layers))
        for parameter in self.parameters():
            nn.init.zeros_(parameter)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + F.silu(layer(x))
        return x


class Medusa(Heads):
    """Head k guesses x_{t+1+k} from h_t alone: softmax(W2_k ResBlocks_k(h_t)).

    head: `own`, a V x D matrix for each head, which starts as the target's; or `shared`, the
    target's own, frozen, so that a head is its blocks.
    """

    def __init__(
        self,
        shape: Shape,
        *,
        heads: int = 4,
        layers: int = 1,
        head: Literal["own", "shared"] = "own",
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
            raise ValueError(f"medusa has heads {heads}, layers {layers}; each must be at least 1")
        self.deepest = heads
        self.blocks: Any = nn.ModuleList(ResBlocks(shape.hidden_size, layers) for _ in range(heads))
        self.lm_heads: Any = own_heads(shape, heads if head == "own" else 0)

    def begin(self, state: Grown, seen: Seen, target: Target) -> Tensor:
        self.remember(state, self.mine(last(seen, seen.hidden_BSD))[:, None], root=True)
        return self._logits(1, state.features_BnF, target)[:, 0]

    def deepen(
        self, state: Grown, target: Target, ids_BW: Tensor, parents_BW: Tensor, depth: int
    ) -> Tensor:
        logits_B1V = self._logits(depth + 1, state.features_BnF, target)
        return logits_B1V.expand(-1, ids_BW.shape[1], -1)

    def unroll(self, batch: Batch, target: Target) -> Iterator[Tensor]:
        assert batch.cached is not None
        hidden_BTD = self.mine(batch.cached.hidden_BTD)[:, :-1]
        for blocks in self.blocks:
            yield blocks(hidden_BTD)

    def head(self, k: int) -> tuple[Tensor | None, Tensor | None]:
        return (self.lm_heads[k - 1].weight if self.lm_heads else None), None

    def initialise(self, target: Target | None, counts: Callable[[], Tensor]) -> None:
        assert target is not None, "heads start as the target's"
        copy_head(target, self.lm_heads)

    def config(self) -> dict[str, Any]:
        """vLLM's layout; it drops the biases unless told of them."""
        return {
            "architectures": ["MedusaModel"],
            "model_type": "medusa",
            "hidden_size": self.shape.hidden_size,
            "vocab_size": self.shape.vocab_size,
            "truncated_vocab_size": self.shape.vocab_size,
            "num_heads": len(self.blocks),
            "num_hidden_layers": len(self.blocks[0].layers),
            "medusa_fc_bias": True,
            "original_lm_head": not self.lm_heads,
        }

    def _logits(self, k: int, hidden_BWD: Tensor, target: Target) -> Tensor:
        states_BWD = self.blocks[k - 1](hidden_BWD)
        return self.lm_heads[k - 1](states_BWD) if self.lm_heads else target.logits(states_BWD)


def own_heads(shape: Shape, count: int) -> nn.ModuleList:
    """`count` output heads without bias."""
    return nn.ModuleList(
        nn.Linear(shape.hidden_size, shape.vocab_size, bias=False) for _ in range(count)
    )


@torch.no_grad()
def copy_head(target: Target, heads: nn.ModuleList) -> None:
    """Starts each head as the target's own."""
    rows = torch.arange(target.shape.vocab_size, device=target.device)
    for head in heads:
        head.weight.copy_(target.head_rows(rows))  # type: ignore[operator]

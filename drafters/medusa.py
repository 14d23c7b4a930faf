"""The family `medusa`: independent heads on the target's last state (Cai et al. 2024).

Shapes: B batch, T tokens, W nodes of a level, K heads, D target width, V vocabulary.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from decoding.adapter import Adapted, Adapter
from decoding.round import Seen
from decoding.target import Shape, Target
from drafters.base import Batch, Metrics, Objective, Prediction
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

    target_lora: null is Medusa-1; {rank: 32, alpha: 16} is Medusa-2, which also trains LoRA
    matrices of the target, so that the target changes: loss = objective(adapted target, original)
    + heads_weight x sum_k decay^k x head k's cross-entropy: the heads learn the tokens in the data
    whatever the objective. With forward_kl that is the paper's self-distillation, with ce its joint
    training. The matrices learn at a quarter of the rate (the paper: 5e-4, heads 4 times that) and
    may start beside the heads of a Medusa-1 checkpoint. Departures from the paper's code: the
    output matrix has no LoRA matrices, there is no dropout, and heads_weight is a constant, not the
    ramp sin(pi/2 step/steps).
    """

    slow: ClassVar = {"adapter.": 0.25}

    def __init__(
        self,
        shape: Shape,
        *,
        heads: int = 4,
        layers: int = 1,
        head: Literal["own", "shared"] = "own",
        target_lora: dict[str, int] | None = None,
        heads_weight: float = 0.2,
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
        self.adapter = Adapter(**target_lora) if target_lora else None
        self.changes_target, self.heads_weight = bool(target_lora), heads_weight

    def on(self, target: Target) -> Target:
        return self.adapter.merged(target) if self.adapter else target

    def learning(self, target: Target) -> Target:
        return self.adapter.beside(target) if self.adapter else target

    def forward(
        self, batch: Batch, target: Target | None, objective: Objective
    ) -> tuple[Tensor, Metrics]:
        if self.adapter is None:
            return super().forward(batch, target, objective)
        assert isinstance(target, Adapted), "Medusa-2 learns on the target that it adapts"
        known = target(batch.ids_BT, doc_BT=batch.doc_BT)
        hard = getattr(objective, "hard", objective)
        heads, sums = super().forward(replace(batch, cached=known), target, hard)
        supervised = batch.mask_BT[:, 1:]
        teacher_ND = None
        if objective.needs_target:
            was = target.original(batch.ids_BT, doc_BT=batch.doc_BT)
            teacher_ND = was.hidden_BTD[:, :-1][supervised]
        own = Prediction(
            hidden_ND=known.hidden_BTD[:, :-1][supervised],
            weight_VD=None,
            labels_N=batch.ids_BT[:, 1:][supervised],
            row_N=supervised.nonzero()[:, 0],
            target_ND=teacher_ND,
            position=-1,  # the target's own, before the first head's
        )
        loss, (measured,) = objective([own], target)
        of_target = {f"{key}@target": value for key, value in measured.items()}
        return loss + self.heads_weight * self.decay * heads, sums | of_target

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

    def head(self, k: int) -> Tensor | None:
        return self.lm_heads[k - 1].weight if self.lm_heads else None

    def initialise(self, target: Target | None, counts: Callable[[], Tensor]) -> None:
        assert target is not None, "heads start as the target's"
        copy_head(target, self.lm_heads)
        if self.adapter is not None:
            self.adapter.fit(target)

    def save(self, folder: Path) -> None:
        """With Medusa-2, the matrices also as peft reads them."""
        super().save(folder)
        if self.adapter is not None:
            own = folder / "target_adapter"
            self.adapter.config().save_pretrained(own)
            save_file(self.adapter.peft_state(), own / "adapter_model.safetensors")

    def found(self, folder: Path) -> dict[str, Tensor]:
        """Medusa-1's heads have no matrices of the target: those that `initialise` made stay."""
        saved = super().found(folder)
        if self.adapter is None:
            return saved
        mine = {k.removeprefix("adapter."): v for k, v in saved.items() if k.startswith("adapter.")}
        self.adapter.take(mine)
        if not self.adapter.a:
            raise ValueError(
                f"{folder} holds heads of Medusa-1, without matrices of the target: a training of "
                "Medusa-2 can start from it, but it does not draft as one"
            )
        fresh = {f"adapter.{k}": v for k, v in self.adapter.state_dict().items()}
        return saved if mine else saved | fresh

    def config(self) -> dict[str, Any]:
        """vLLM's layout, which drops the biases unless told of them. With `shared` heads the sizes
        alone: vLLM would look for the target's output matrix in the folder, which is not there."""
        sizes = {
            "hidden_size": self.shape.hidden_size,
            "vocab_size": self.shape.vocab_size,
            "num_heads": len(self.blocks),
            "num_hidden_layers": len(self.blocks[0].layers),
        }
        served = {
            "architectures": ["MedusaModel"],
            "model_type": "medusa",
            "truncated_vocab_size": self.shape.vocab_size,
            "medusa_fc_bias": True,
            "original_lm_head": False,
        }
        return sizes | served if self.lm_heads else sizes

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

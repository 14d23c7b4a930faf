"""The family `eagle`: EAGLE-1 (Li et al. 2024, 2401.15077), with more steps as HASS aligns it.

Shapes: B batch, T tokens, W nodes of a level, D target width, V vocabulary.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from decoding.round import Seen
from decoding.target import Shape, Target
from drafters.base import Batch
from drafters.heads import Grown, Heads, pair_mask
from drafters.layer import Layer, Unrolled, exported


class Eagle(Heads):
    """From pair t a projection and one decoder layer without input norm guess the target's next
    state: feature_{t+1} = layer(fc [E(x_{t+1}); h_t]); the target's frozen head makes a token of
    it, and both are fed back.

    Loss: regression x SmoothL1(feature_{t+1}, h_{t+1}) + objective_weight x the objective. noise:
    width of the uniform noise on h in training (the code's 0.2 at 512 tokens, scaled by 512 / T).
    steps: 1 is EAGLE-1; more train on its own features fed back, detached, which are what it reads
    when it drafts: 3 is HASS's context alignment (Zhang et al. 2024), without its top-10 loss.
    """

    cached_layers = 1

    def __init__(
        self,
        shape: Shape,
        *,
        steps: int = 1,
        regression: float = 1.0,
        objective_weight: float = 0.1,
        noise: float = 0.2,
        decay: float = 1.0,
        draft_length: int = 5,
        stop_below: float = 0.0,
        sample: bool = True,
        tree: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(
            shape, decay=decay, draft_length=draft_length, stop_below=stop_below, sample=sample,
            tree=tree,
        )  # fmt: skip
        if steps < 1 or min(regression, objective_weight, noise) < 0:
            raise ValueError(
                f"eagle has steps {steps}, regression {regression}, objective_weight "
                f"{objective_weight}, noise {noise}; steps must be at least 1, the others 0"
            )
        self.steps, self.regression, self.noise = steps, regression, noise
        self.objective_weight = objective_weight
        width = shape.hidden_size
        self.fc = nn.Linear(2 * width, width, bias=False)
        self.layers: Any = nn.ModuleList([Layer(shape, norm=False)])

    def begin(self, state: Grown, seen: Seen, target: Target) -> Tensor:
        read_BSD = self._fuse(seen.ids_BS, self.mine(seen.hidden_BSD), target)
        columns_BS, new = self.read_pairs(state, seen)
        feature_BD = self.append(state, read_BSD, columns_BS, new, list(self.layers))
        self.remember(state, feature_BD[:, None], root=True)
        return target.logits(feature_BD)

    def deepen(
        self, state: Grown, target: Target, ids_BW: Tensor, parents_BW: Tensor, depth: int
    ) -> Tensor:
        read_BWD = self._fuse(ids_BW, self.parents(state, parents_BW), target)
        positions_BW, attend = self.below(state, parents_BW, depth)
        feature_BWD = self.layers[0](read_BWD, positions_BW, attend)
        self.remember(state, feature_BWD)
        return target.logits(feature_BWD)

    def unroll(self, batch: Batch, target: Target) -> Iterator[tuple[Tensor, Tensor]]:
        assert batch.cached is not None
        truth_BTD = self.mine(batch.cached.hidden_BTD)
        feature_BTD = truth_BTD[:, :-1]
        if self.training and self.noise:
            width = self.noise * 512 / feature_BTD.shape[1]
            feature_BTD = feature_BTD + (torch.rand_like(feature_BTD) - 0.5) * width
        mask, positions_BT = pair_mask(batch)
        attend, T = Unrolled(mask), batch.ids_BT.shape[1]
        for k in range(1, self.steps + 1):
            ids_BT = F.pad(batch.ids_BT[:, k:], (0, k - 1))
            read_BTD = self._fuse(ids_BT, feature_BTD, target)
            feature_BTD = self.layers[0](read_BTD, positions_BT + k - 1, attend)
            gap = F.smooth_l1_loss(feature_BTD[:, : T - k], truth_BTD[:, k:], reduction="none")
            yield feature_BTD[:, : T - k], self.regression * gap.float().mean(-1)
            feature_BTD = feature_BTD.detach()

    def config(self) -> dict[str, Any]:
        return exported(self.shape) | {"architectures": ["LlamaForCausalLM"]}

    def written(self) -> dict[str, Tensor]:
        """SGLang's fc has a bias, which it would leave random; vLLM passes over it."""
        return super().written() | {"fc.bias": torch.zeros_like(self.fc.weight[:, 0])}

    def found(self, folder: Path) -> dict[str, Tensor]:
        saved = super().found(folder)
        saved.pop("fc.bias", None)
        return saved

    def _fuse(self, ids: Tensor, feature: Tensor, target: Target) -> Tensor:
        return self.fc(torch.cat([self.mine(target.embed(ids)), feature], dim=-1))

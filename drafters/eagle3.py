"""The family `eagle3`: EAGLE-3 (Li et al. 2025, 2503.01840).

Shapes: B batch, T tokens, W nodes of a level, D target width, L tapped layers, V vocabulary.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from decoding.round import Seen
from decoding.target import Shape, Target
from drafters.base import Batch
from drafters.heads import Grown, Heads, pair_mask
from drafters.layer import Layer, Unrolled, exported, rms_norm


class Eagle3(Heads):
    """g_t = fc of the target's hidden_states at three taps; one decoder layer reads
    [norm E(x_{t+1}); norm g_t] with its residual on g; its output is normed for a head of its own
    and fed back, as it is, in the place of g.

    steps: of training-time test, on its own outputs (the paper: 7). taps: indices into
    hidden_states (null: 2, n // 2 and n - 3). vocabulary: size of the draft vocabulary, the
    commonest tokens of the training data (null: all). The head starts as the target's rows.
    """

    cached_layers = 1
    reads_last = False  # but its taps

    def __init__(
        self,
        shape: Shape,
        *,
        steps: int = 5,
        taps: list[int] | None = None,
        vocabulary: int | None = None,
        decay: float = 0.8,
        draft_length: int = 5,
        stop_below: float = 0.0,
        sample: bool = True,
        tree: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(
            shape, decay=decay, draft_length=draft_length, stop_below=stop_below, sample=sample,
            tree=tree,
        )  # fmt: skip
        rows = vocabulary or shape.vocab_size
        if steps < 1 or not 1 <= rows <= shape.vocab_size:
            raise ValueError(
                f"eagle3 has steps {steps} and vocabulary {vocabulary}; steps must be at least 1, "
                f"vocabulary between 1 and the target's {shape.vocab_size:,}"
            )
        self.steps, self.taps = steps, _taps(taps, shape.layers)
        width = shape.hidden_size
        self.fc = nn.Linear(len(self.taps) * width, width, bias=False)
        self.midlayer: Any = Layer(shape, inputs=2 * width)
        self.midlayer.hidden_norm = rms_norm(shape)
        self.norm = rms_norm(shape)
        self.lm_head = nn.Linear(width, rows, bias=False)
        self.d2t: Tensor | None
        self.t2d: Tensor | None
        truncated = rows < shape.vocab_size
        kept = torch.arange(shape.vocab_size) < rows
        self.register_buffer("d2t", torch.zeros(rows, dtype=torch.long) if truncated else None)
        self.register_buffer("t2d", kept if truncated else None)

    def begin(self, state: Grown, seen: Seen, target: Target) -> Tensor:
        assert seen.taps_BSLD is not None, "the target was not asked for its taps"
        g_BSD = self.fc(self.mine(seen.taps_BSLD).flatten(2))
        columns_BS, new = self.read_pairs(state, seen)
        read_BSI = self._read(seen.ids_BS, g_BSD, target)
        out_BD = self.append(state, g_BSD, columns_BS, new, [self.midlayer], read_BSI)
        self.remember(state, out_BD[:, None], root=True)
        return self._logits(out_BD)

    def deepen(
        self, state: Grown, target: Target, ids_BW: Tensor, parents_BW: Tensor, depth: int
    ) -> Tensor:
        g_BWD = self.parents(state, parents_BW)
        positions_BW, attend = self.below(state, parents_BW, depth)
        read_BWI = self._read(ids_BW, g_BWD, target)
        out_BWD = self.midlayer(g_BWD, positions_BW, attend, read_BWI)
        self.remember(state, out_BWD)
        return self._logits(out_BWD)

    def unroll(self, batch: Batch, target: Target) -> Iterator[Tensor]:
        assert batch.cached is not None
        assert batch.cached.taps_BTLD is not None
        g_BTD = self.fc(self.mine(batch.cached.taps_BTLD)[:, :-1].flatten(2))
        mask, positions_BT = pair_mask(batch)
        attend, T = Unrolled(mask), batch.ids_BT.shape[1]
        for k in range(1, self.steps + 1):
            ids_BT = F.pad(batch.ids_BT[:, k:], (0, k - 1))
            read_BTI = self._read(ids_BT, g_BTD, target)
            g_BTD = self.midlayer(g_BTD, positions_BT + k - 1, attend, read_BTI)
            yield self.norm(g_BTD)[:, : T - k]

    def head(self, k: int) -> Tensor:
        return self.lm_head.weight

    @torch.no_grad()
    def initialise(self, target: Target | None, counts: Callable[[], Tensor]) -> None:
        assert target is not None, "the head starts as rows of the target's"
        ids_V = torch.arange(self.shape.vocab_size)
        if self.d2t is not None and self.t2d is not None:
            ids_V = counts().topk(len(self.d2t)).indices.sort().values
            self.d2t.copy_(ids_V - torch.arange(len(ids_V)))
            self.t2d.zero_()
            self.t2d[ids_V] = True
        self.lm_head.weight.copy_(target.head_rows(ids_V.to(target.device)))

    def config(self) -> dict[str, Any]:
        """The native layout of vLLM and SGLang; the default taps need not be written."""
        config = exported(self.shape) | {
            "architectures": ["LlamaForCausalLMEagle3"],
            "draft_vocab_size": self.lm_head.out_features,
            "target_hidden_size": self.shape.hidden_size,
            "norm_before_residual": False,
        }
        if self.taps != _default_taps(self.shape.layers):
            config["eagle_aux_hidden_state_layer_ids"] = list(self.taps)  # vLLM: hidden_states[k]
            config["eagle_config"] = {  # SGLang: hidden_states[k + 1]
                "use_aux_hidden_state": True,
                "eagle_aux_hidden_state_layer_ids": [k - 1 for k in self.taps],
            }
        return config

    def vocabulary(self) -> Tensor | None:
        if self.d2t is None:
            return None
        return self.d2t + torch.arange(len(self.d2t), device=self.d2t.device)

    def _read(self, ids: Tensor, g: Tensor, target: Target) -> Tensor:
        e = self.midlayer.input_layernorm(self.mine(target.embed(ids)))
        return torch.cat([e, self.midlayer.hidden_norm(g)], dim=-1)

    def _logits(self, out: Tensor) -> Tensor:
        logits = self.lm_head(self.norm(out))
        ids_V = self.vocabulary()
        if ids_V is None:
            return logits
        whole = logits.new_full((*logits.shape[:-1], self.shape.vocab_size), -torch.inf)
        return whole.index_copy(-1, ids_V, logits)


def _default_taps(layers: int) -> tuple[int, ...]:
    return (2, layers // 2, layers - 3)


def _taps(given: list[int] | None, layers: int) -> tuple[int, ...]:
    taps = tuple(given) if given is not None else _default_taps(layers)
    if given is None and not (2 < layers // 2 < layers - 3):
        raise ValueError(
            f"the target has {layers} layers, and the taps 2, n // 2 and n - 3 are distinct and in "
            "order from 7 on; name three with drafter.taps=[...]"
        )
    if len(set(taps)) != len(taps) or not taps or not all(0 <= k <= layers for k in taps):
        raise ValueError(
            f"drafter.taps is {list(taps)}; expected distinct indices into hidden_states, 0 (the "
            f"embeddings) to {layers} (the last state)"
        )
    return taps

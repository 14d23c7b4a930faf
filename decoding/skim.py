"""Cheap passes of the target itself, with some of its sublayers left out (Zhang et al. 2024).

Shapes: B batch, T tokens, V vocabulary.
"""

import copy
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn

from decoding.cache import Cache
from decoding.target import Target, additive


class Skimmer:
    """A target's layers without some of their sublayers, over the same tensors.

    attention, mlp: layers whose sublayer adds nothing to the residual stream. A layer that loses
    both is not run at all; of one that loses one, the norm before it still is. The target itself
    is not touched. Raises ValueError for a layer that is not there, and for an architecture whose
    layers are not a residual stream with one attention and one MLP.
    """

    def __init__(self, target: Target, attention: Collection[int], mlp: Collection[int]) -> None:
        self.target = target
        base, layers = target.model.base_model, target.shape.layers
        outside = sorted({n for n in (*attention, *mlp) if not 0 <= n < layers})
        if outside:
            raise ValueError(
                f"layer {outside[0]} is to be skipped, and {target.name} has layers 0 to "
                f"{layers - 1}; name others"
            )
        place, stack = _stack(target)
        kept, emptied = [], []
        for n, layer in enumerate(stack):
            skipped = (n in attention, n in mlp)
            if any(skipped):
                emptied.append(_without(target, layer, (True, True)))
            if not all(skipped):
                kept.append(_without(target, layer, skipped) if any(skipped) else layer)
        self._base = _replaced(base, place, nn.ModuleList(kept))
        none, empty = (_replaced(base, place, nn.ModuleList(some)) for some in ([], emptied))
        self._refuse_unless_equal(none, empty)

    @torch.inference_mode()
    def skim(self, ids_BT: Tensor, cache: Cache, after: int = 0) -> Tensor:
        """Logits [B, T, V] of tokens that follow the committed ones and `after` scratch tokens of
        earlier calls. Writes scratch slots only, which `Target.score` overwrites: the cache's
        length and what it holds of committed tokens stay."""
        B, T = ids_BT.shape
        device = ids_BT.device
        cache.open(T, device, after)
        start_B1 = torch.tensor(cache.length, device=device)[:, None] + after
        positions_BT = start_B1 + torch.arange(T, device=device)
        mask = cache.causal(B, T, device, after)
        return self.target.logits(self._states(self._base, ids_BT, positions_BT, mask, cache))

    def _states(
        self, base: Any, ids_BT: Tensor, positions_BT: Tensor, mask: Tensor, cache: Cache | None
    ) -> Tensor:
        out = base(
            input_ids=ids_BT,
            position_ids=positions_BT,
            attention_mask=additive(mask, self.target.dtype),
            past_key_values=cache,
            use_cache=cache is not None,
        )
        return out.last_hidden_state

    @torch.inference_mode()
    def _refuse_unless_equal(self, none: Any, empty: Any) -> None:
        """Layers without sublayers must do what no layers do; not so where a norm with a bias or a
        convolution stands behind them, or where a sublayer adds the residual itself."""
        ids = torch.zeros(1, 1, dtype=torch.long, device=self.target.device)
        mask = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=self.target.device)
        try:
            due, found = (self._states(base, ids, ids, mask, None) for base in (none, empty))
        except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
            raise ValueError(
                _refusal(self.target, f"does not run without them ({type(error).__name__})")
            ) from error
        if not torch.equal(due, found):
            raise ValueError(_refusal(self.target, "changes its states even without them"))


class _Nothing(nn.Module):
    """What a sublayer leaves that adds nothing; an attention returns its weights beside it."""

    def __init__(self, weights: bool) -> None:
        super().__init__()
        self.weights = weights

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        nothing = torch.zeros_like(args[0] if args else kwargs["hidden_states"])
        return (nothing, None) if self.weights else nothing


def _stack(target: Target) -> tuple[list[str], nn.ModuleList]:
    """The names that lead to the list of the target's layers, and the list."""
    for name, module in target.model.base_model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == target.shape.layers:
            return name.split("."), module
    raise ValueError(_refusal(target, "keeps them in no list of its layers"))


def _without(target: Target, layer: nn.Module, skipped: tuple[bool, bool]) -> nn.Module:
    """The layer without its attention, its MLP or both: the two children with matrices, of which
    the attention knows its place in the cache."""
    heavy = [
        n for n, child in layer.named_children() if any(p.ndim > 1 for p in child.parameters())
    ]
    caching = [name for name in heavy if hasattr(layer.get_submodule(name), "layer_idx")]
    if len(heavy) != 2 or len(caching) != 1:
        raise ValueError(_refusal(target, f"has {', '.join(heavy) or 'none'} in a layer"))
    for name in heavy:
        weights = name in caching
        if skipped[0 if weights else 1]:
            layer = _replaced(layer, [name], _Nothing(weights))
    return layer


def _replaced(module: nn.Module, path: list[str], new: nn.Module) -> nn.Module:
    """The module with another one at `path`; all that does not lie on the path is shared."""
    twin = copy.copy(module)
    head, *rest = path
    below = twin._modules[head]
    assert below is not None, f"there is nothing at {head}"
    twin._modules = twin._modules | {head: _replaced(below, rest, new) if rest else new}
    return twin


def _refusal(target: Target, why: str) -> str:
    model = type(target.model).__name__
    return (
        f"{target.name} cannot leave out attention or MLP sublayers: {model} {why}; leave layer "
        "skipping out for this target"
    )

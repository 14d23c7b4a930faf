"""A target changed by LoRA matrices that a drafter owns (Medusa-2): its own weights stay.

Shapes: B batch, T tokens, D width, r rank.
"""

import copy
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from decoding.target import Target, TargetOut, document_mask

SLOT = "default"  # peft's name for the only adapter


class Adapter(nn.Module):
    """For each linear layer but the output matrix, W becomes W + alpha / rank B A (Hu et al. 2021).

    Empty until `fit` or `take` gives it matrices. Names have "/" where the model's have dots.
    """

    def __init__(self, rank: int, alpha: int) -> None:
        super().__init__()
        if min(rank, alpha) < 1:
            raise ValueError(f"lora has rank {rank} and alpha {alpha}; each must be at least 1")
        self.rank, self.alpha = rank, alpha
        self.a = nn.ParameterDict()
        self.b = nn.ParameterDict()

    def fit(self, target: Target) -> None:
        """Fresh matrices for this target: B is zero, so that they change nothing yet."""
        for name, layer in _layers(self._inject(target.model)).items():
            self.a[name] = nn.Parameter(layer.lora_A[SLOT].weight.detach().float().cpu())
            self.b[name] = nn.Parameter(torch.zeros_like(layer.lora_B[SLOT].weight).float().cpu())

    def take(self, saved: dict[str, Tensor]) -> None:
        """Room for saved matrices, by their names in a state dict (a/NAME and b/NAME)."""
        for matrices, kind in ((self.a, "a"), (self.b, "b")):
            for key, value in saved.items():
                if key.startswith(f"{kind}."):
                    matrices[key.removeprefix(f"{kind}.")] = nn.Parameter(torch.zeros_like(value))

    def beside(self, target: Target) -> "Adapted":
        """The target with these matrices beside its layers: they learn, its weights are shared."""
        model = self._inject(target.model)
        adapted = Adapted(model, target)
        for name, layer in _layers(model).items():
            layer.lora_A[SLOT].weight = self.a[name]
            layer.lora_B[SLOT].weight = self.b[name]
        return adapted

    def merged(self, target: Target) -> "Adapted":
        """The target as it would be served: a copy of its layers with the matrices added."""
        model = copy.deepcopy(self.beside(target).model)
        for name, layer in _layers(model).items():
            layer.merge()
            parent, _, leaf = name.replace("/", ".").rpartition(".")
            setattr(model.get_submodule(parent), leaf, layer.get_base_layer())
        return Adapted(model, target)

    def config(self) -> Any:
        """As peft writes it beside the matrices."""
        from peft import LoraConfig

        modules = [name.replace("/", ".") for name in self.a] or "all-linear"
        return LoraConfig(r=self.rank, lora_alpha=self.alpha, target_modules=modules)

    def peft_state(self) -> dict[str, Tensor]:
        """The matrices under peft's names."""
        named = chain(
            ((name, "lora_A", a) for name, a in self.a.items()),
            ((name, "lora_B", b) for name, b in self.b.items()),
        )
        return {
            f"base_model.model.{name.replace('/', '.')}.{which}.weight": matrix.detach().cpu()
            for name, which, matrix in named
        }

    def _inject(self, model: Any) -> Any:
        """The model again, over the same tensors, with room for matrices in its layers."""
        from peft import inject_adapter_in_model

        if getattr(model, "tp_size", None):
            raise ValueError(
                "this drafter changes its target, which it can only where the target is whole; "
                "set target.parallel=null"
            )
        shared = {id(t): t for t in chain(model.parameters(), model.buffers())}
        return inject_adapter_in_model(self.config(), copy.deepcopy(model, shared))


class Adapted(Target):
    """A target that is not `original` any more; gradients reach its matrices."""

    def __init__(self, model: Any, original: Target) -> None:
        super().__init__(model, name=f"{original.name}, adapted")
        self.original = original

    def forward(
        self, ids_BT: Tensor, *, doc_BT: Tensor | None = None, taps: tuple[int, ...] = ()
    ) -> TargetOut:
        mask, positions_BT = document_mask(ids_BT, doc_BT)
        return self._states(ids_BT, positions_BT, mask, None, taps)


def _layers(model: Any) -> dict[str, Any]:
    """The layers with room for matrices, by name."""
    from peft.tuners.lora import LoraLayer

    found = model.named_modules()
    return {name.replace(".", "/"): m for name, m in found if isinstance(m, LoraLayer)}

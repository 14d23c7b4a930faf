"""What a layout is given beside the drafter: facts for its files, and the target it was made for.

Shapes: T tokens, L + 1 hidden_states of the target, D its width, V its vocabulary.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from decoding.borrowed import Borrowed
from decoding.target import Shape, Target

PATHS = (
    "vLLM takes a drafter whose path holds 'eagle-' or 'eagle3' for an EAGLE, whatever method is "
    "named: keep such words out of its folder's name"
)


class Lent:
    """A target's two outer matrices and its states on a few random prompts, all in fp32 on the
    CPU: what proves an export must not round. Of a target whose layers are not loaded (Borrowed)
    the states are drawn at random."""

    def __init__(self, target: Target, *, prompts: int = 2, length: int = 16) -> None:
        self.target, self.drawn = target, isinstance(target, Borrowed)
        self._random = torch.Generator().manual_seed(0)
        self.prompts = [self._prompt(length) for _ in range(prompts)]

    @cached_property
    def embed_VD(self) -> Tensor:
        return embedding(self.target).float()

    @cached_property
    def head_VD(self) -> Tensor:
        return output_matrix(self.target).float()

    def embed(self, ids: Tensor) -> Tensor:
        """As a Target's."""
        return torch.nn.functional.embedding(ids, self.embed_VD)

    def _prompt(self, length: int) -> "Prompt":
        shape = self.target.shape
        ids_T = torch.randint(shape.vocab_size, (length,), generator=self._random)
        if self.drawn:
            size = (shape.layers + 1, length, shape.hidden_size)
            states = torch.randn(size, generator=self._random)
            return Prompt(ids_T, states)
        with torch.inference_mode():
            out = self.target.model.base_model(
                input_ids=ids_T[None].to(self.target.device), output_hidden_states=True
            )
        all_BTD = [*out.hidden_states[:-1], out.last_hidden_state]
        return Prompt(ids_T, torch.stack([s[0].float().cpu().clone() for s in all_BTD]))


@dataclass(frozen=True)
class Prompt:
    """states_LTD: hidden_states[k] of transformers for k = 0 (the embeddings) to the number of
    layers (the last one, after the final norm); empty for a drafter that reads none."""

    ids_T: Tensor
    states_LTD: Tensor = field(default_factory=lambda: torch.empty(0))


@dataclass(frozen=True)
class Facts:
    """shape: of the target. base_model: the target's id on the Hub, None for a target that is not
    there. architectures, token_ids: what its configuration says. dtype: of the drafter's weights in
    the file, None as they are. draft_length and stop_below: how it drafts where it was measured."""

    shape: Shape
    draft_length: int
    stop_below: float = 0.0
    base_model: str | None = None
    architectures: tuple[str, ...] = ()
    token_ids: dict[str, Any] = field(default_factory=dict)
    dtype: torch.dtype | None = None
    lent: Lent | None = None

    @property
    def borrowed(self) -> Lent:
        assert self.lent is not None, "this layout needs the target"
        return self.lent

    def prompts(self) -> Iterator[Prompt]:
        """Random prompts of the target; where none is lent, ids alone."""
        if self.lent is not None:
            yield from self.lent.prompts
        else:
            rng = torch.Generator().manual_seed(0)
            for _ in range(2):
                yield Prompt(torch.randint(self.shape.vocab_size, (16,), generator=rng))

    def stored(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """The drafter's own tensors in the dtype that the file is to have."""
        if self.dtype is None:
            return tensors
        return {k: v.to(self.dtype) if v.is_floating_point() else v for k, v in tensors.items()}


def embedding(target: Target) -> Tensor:
    """What the target reads of each token, [V, D], in its dtype, on the CPU."""
    ids_V = torch.arange(target.shape.vocab_size, device=target.device)
    return target.embed(ids_V).detach().cpu()


def output_matrix(target: Target) -> Tensor:
    """The target's output matrix, [V, D], in its dtype, on the CPU. Raises ValueError for one with
    a bias, which no layout has room for."""
    if getattr(target.model.get_output_embeddings(), "bias", None) is not None:
        raise ValueError(
            f"the output matrix of {target.name} has a bias, which heads that share it cannot have "
            "in any layout; train with drafter.head=own"
        )
    ids_V = torch.arange(target.shape.vocab_size, device=target.device)
    return target.head_rows(ids_V).detach().cpu()


def same(mine: Tensor, file: Tensor) -> bool:
    """Whether a matrix of the file is this one, as far as the file's dtype can say."""
    return mine.shape == file.shape and torch.equal(mine.to(file.dtype), file)

"""A target that no single device holds: the ranks of the job share its weights.

Two ways, both by transformers' own plans and loader, which reads no more than a rank's part.
`tensor` is for decoding (Shoeybi et al. 2019: columns, then rows, one sum a sublayer; embedding and
head by vocabulary): every rank runs the same loop on the same prompts, and since randomness is
keyed by the request and sums are the same on all ranks, all of them draft, verify and keep the same
tokens. `zero3` is for training (stage 3 of Rajbhandari et al. 2020, by PyTorch's fully_shard): each
rank reads rows of its own, and each layer is gathered for its part of a pass and dropped again.

Shapes: B batch, T tokens, D target width.
"""

import math
from collections.abc import Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F

from decoding.cache import Cache
from decoding.ranks import Ranks, join
from decoding.target import Shape, Target, TargetOut

V = TypeVar("V")


class Parted(Target):
    """A target of which this rank holds a part. All ranks must take part in each of its passes."""

    def agree(self, value: V) -> V:
        """Rank 0's value on all ranks, as JSON gives it back."""
        return Ranks.here(together=True).decide(lambda: value)


class Sharded(Parted):
    """`tensor`: this rank holds a part of each matrix. All ranks must read the same tokens."""

    def head_rows(self, ids: Tensor) -> Tensor:
        from torch.distributed.tensor import DTensor, Replicate

        weight = self.model.get_output_embeddings().weight
        if not isinstance(weight, DTensor):
            return super().head_rows(ids)
        same = DTensor.from_local(ids, weight.device_mesh, [Replicate()], run_check=False)
        rows: Tensor = F.embedding(same, weight).full_tensor()  # type: ignore[attr-defined]
        return rows if self.scale == 1 else rows * self.scale

    def _states(
        self,
        ids_BT: Tensor,
        positions_BT: Tensor,
        mask: Tensor,
        cache: Cache | None,
        taps: tuple[int, ...],
    ) -> TargetOut:
        require_same(ids_BT)
        return super()._states(ids_BT, positions_BT, mask, cache, taps)


class Gathered(Parted):
    """`zero3`: this rank holds a part of each layer, which a pass gathers. What lies outside of the
    layers (embedding, last norm, head) is whole on each rank: training reads it at every chunk.

    Ranks may read different tokens, but all of them must make the same number of passes.
    """

    def __init__(self, model: Any, name: str = "target") -> None:
        super().__init__(model, name)
        from torch.distributed.fsdp import FSDPModule

        layers = {part for layer in _layers(model) for part in layer.modules()}
        parted = [part for part in model.modules() if isinstance(part, FSDPModule)]
        if len(layers.intersection(parted)) < self.shape.layers:
            raise ValueError(
                f"{name} cannot be shared by target.parallel=zero3: transformers' plan for models "
                f"of type {model.config.model_type} does not reach its layers; keep it whole "
                "(target.parallel=null), or train from a stage `cache`"
            )
        for part in parted:
            if part not in layers:
                part.set_reshard_after_forward(False, recurse=False)
                part.unshard()
        # fully_shard finds its root in the first pass; and buffers that were made in inference mode
        # could not be filled again outside of it
        with torch.no_grad():
            model(torch.zeros(1, 1, dtype=torch.long, device=self.device))


def _layers(model: Any) -> Iterator[Any]:
    """The members of a model's lists of modules."""
    for stack in model.modules():
        if isinstance(stack, torch.nn.ModuleList):
            yield from stack


def agreed(target: Target, value: V) -> V:
    """A value that can differ between ranks, such as a time, as rank 0 has it where the ranks share
    the target: what is decided by it must be the same on all ranks."""
    return target.agree(value) if isinstance(target, Parted) else value


def require_same(ids_BT: Tensor) -> None:
    """Raises RuntimeError where another rank reads other tokens: its sums would be added to ours,
    or it would wait for sums that never come."""
    place = torch.arange(1, 2 * ids_BT.numel(), 2, device=ids_BT.device)
    seen = torch.stack([(ids_BT.flatten() * place * place).sum(), *ids_BT.new_tensor(ids_BT.shape)])
    both = torch.cat([seen, -seen])  # the highest of each, and the lowest
    torch.distributed.all_reduce(both, torch.distributed.ReduceOp.MAX)
    if not torch.equal(both[: len(seen)], -both[len(seen) :]):
        raise RuntimeError(
            "the ranks of a sharded target are out of step: they read different tokens, so "
            "something that they drafted or chose differs between them (a time, or a random number "
            "that no seed decides)"
        )


def sharding(kind: str, place: str, revision: str | None, name: str) -> dict[str, Any]:
    """What from_pretrained needs so that each rank loads its part alone; kind: tensor or zero3.
    Raises ValueError, before any weight is read, where the ranks or the model do not allow it."""
    from transformers import AutoConfig
    from transformers.distributed.configuration_utils import DistributedConfig

    _, world = join()
    if world == 1:
        raise ValueError(
            f"target.parallel is {kind}, which shards {name} over several ranks, and this stage "
            "has one; set launch=torchrun launch.ranks=2 (or more), or target.parallel=null"
        )
    if kind == "zero3":
        return {"distributed_config": DistributedConfig(fsdp_size=world)}
    config = AutoConfig.from_pretrained(place, revision=revision, trust_remote_code=False)
    refuse_what_cannot_be_shared(config, world, name)
    return {"distributed_config": DistributedConfig(tp_size=world, tp_plan="auto")}


def refuse_what_cannot_be_shared(config: Any, world: int, name: str) -> None:
    """Each rank gets whole heads; how a model is cut is for transformers to know."""
    if not getattr(config.get_text_config(), "base_model_tp_plan", None):
        raise ValueError(
            f"{name} cannot be sharded: transformers has no tensor-parallel plan for models of "
            f"type {config.model_type}; set target.parallel=null"
        )
    shape = Shape.of(config)
    most = math.gcd(shape.heads, shape.kv_heads)
    if most % world:
        fits = [str(n) for n in range(2, most + 1) if most % n == 0]
        raise ValueError(
            f"{name} has {shape.heads} attention heads and {shape.kv_heads} key/value heads, which "
            f"{world} ranks cannot share evenly; set "
            + (f"launch.ranks to {' or '.join(fits)}" if fits else "target.parallel=null")
        )

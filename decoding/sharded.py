"""A target that no single device holds: its matrices are sharded over the ranks of the job.

transformers shards them (Shoeybi et al. 2019: columns, then rows, one sum a sublayer; embedding and
head by vocabulary); here stand what such a target refuses and what keeps the ranks in step. Every
rank runs the same loop on the same prompts: since randomness is keyed by the request and sums are
the same on all ranks, all of them draft, verify and keep the same tokens.

Shapes: B batch, T tokens, D target width.
"""

import math
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F

from decoding.cache import Cache
from decoding.ranks import Ranks, join
from decoding.target import Shape, Target, TargetOut

V = TypeVar("V")


class Sharded(Target):
    """A target of which this rank holds a part. All ranks must call it with the same tokens."""

    def head_rows(self, ids: Tensor) -> Tensor:
        from torch.distributed.tensor import DTensor, Replicate

        weight = self.model.get_output_embeddings().weight
        if not isinstance(weight, DTensor):
            return super().head_rows(ids)
        same = DTensor.from_local(ids, weight.device_mesh, [Replicate()], run_check=False)
        rows: Tensor = F.embedding(same, weight).full_tensor()  # type: ignore[attr-defined]
        return rows if self.scale == 1 else rows * self.scale

    def agree(self, value: V) -> V:
        """Rank 0's value on all ranks, as JSON gives it back."""
        return Ranks.here(together=True).decide(lambda: value)

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


def agreed(target: Target, value: V) -> V:
    """A value that can differ between ranks, such as a time, as rank 0 has it where the target is
    sharded: what is decided by it must be the same on all ranks."""
    return target.agree(value) if isinstance(target, Sharded) else value


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


def sharding(place: str, revision: str | None, name: str) -> dict[str, Any]:
    """What from_pretrained needs so that each rank loads its part alone. Raises ValueError, before
    any weight is read, where the ranks or the model do not allow it."""
    from transformers import AutoConfig
    from transformers.distributed.configuration_utils import DistributedConfig

    _, world = join()
    config = AutoConfig.from_pretrained(place, revision=revision, trust_remote_code=False)
    refuse_what_cannot_be_shared(config, world, name)
    return {"distributed_config": DistributedConfig(tp_size=world, tp_plan="auto")}


def refuse_what_cannot_be_shared(config: Any, world: int, name: str) -> None:
    """Each rank gets whole heads; how a model is cut is for transformers to know."""
    if world == 1:
        raise ValueError(
            f"target.parallel is tensor, which shards {name} over several ranks, and this stage "
            "has one; set launch=torchrun launch.ranks=2 (or more), or target.parallel=null"
        )
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

"""DeepSpeed behind one small door: a step, a gathered state, ranks."""

import logging
import math
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from decoding.ranks import PATIENCE, backend, ranks
from decoding.ranks import join as join_group

COMPILED: dict[str, Any] = {
    "fallback_random": True
}  # dropout draws what it draws without compiling
ALONE = {
    "RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "0",
}  # fmt: skip
STATE_KEYS = ("exp_avg", "exp_avg_sq")
BUCKET = 50_000_000  # gradients that are reduced in one piece
KEPT_WHOLE = 100_000  # at stage 3, parameters of at most so many elements stay whole on every rank


def join() -> tuple[int, int]:
    """Joins the process group (a group of one without a launcher) and returns rank and size."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    quiet()
    import deepspeed
    import deepspeed.ops

    # the shared-memory operator needs a compiler and 20 s at first use; gloo does its work
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    _, world = join_group()
    if world == 1:  # also in a process that has joined before: DeepSpeed asks for them each time
        os.environ.update(ALONE)
        if not torch.distributed.is_initialized():
            torch.distributed.init_process_group(
                backend(), store=torch.distributed.HashStore(), rank=0, world_size=1
            )
    deepspeed.init_distributed(dist_backend=backend(), verbose=False, timeout=PATIENCE)
    return ranks()


def quiet() -> None:
    """DeepSpeed tells every rank's every step of set-up; only errors are let through."""
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning)


class Engine:
    """AdamW with ZeRO over the drafter, its only module; clipping and accumulation included.

    zero_stage: what each of N ranks holds a share of instead of the whole. 0: nothing; 1: masters
    and moments (fp32); 2: the sum of the gradients too; 3: the weights too, which are gathered
    module by module while a pass needs them. A matrix that a family reads outside of its module's
    own pass (a head that the loss multiplies with) is gathered by DeepSpeed when `engine(...)`
    first reads it, and then for as long as the module that reads it runs, forward and backward:
    stage 3 saves little within a pass of a small drafter, and all of the weights between passes.

    dtype bfloat16: weights and activations; masters and moments are fp32. Gradients are added up
    in fp32 over the micro-batches, except at stage 0, where DeepSpeed adds them in bf16.
    A module may have `slow`: prefixes of parameter names, each with its share of the rate.

    compiled: the passes of the engine alone run the module's blocks (`_blocks`) through
    torch.compile, once for each shape that they meet, so that a resumed run runs the same kernels.
    The module itself stays what it was: whoever calls it, saves it or decodes with it sees no
    compiled code.
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        dtype: str,
        zero_stage: int,
        micro_batch: int,
        accumulation: int,
        clip: float,
        betas: tuple[float, float],
        weight_decay: float,
        compiled: bool = False,
    ) -> None:
        import deepspeed

        if zero_stage not in (0, 1, 2, 3):
            raise ValueError(f"deepspeed.zero_stage is {zero_stage}; it must be 0, 1, 2 or 3")
        if zero_stage == 3 and getattr(module, "changes_target", False):
            raise ValueError(
                "deepspeed.zero_stage is 3, and this drafter changes its target, whose passes read "
                "the drafter's weights where stage 3 does not gather them; set it to 2 or less"
            )
        module.to(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
        self.module, self.stage, self.clip = module, zero_stage, clip
        self.bare = zero_stage == 0 and dtype == "float32"  # DeepSpeed wraps nothing around AdamW
        self.trained = [(n, p) for n, p in module.named_parameters() if p.requires_grad]
        self.compiled = _compiled(module) if compiled else []
        groups = _groups(self.trained, weight_decay, getattr(module, "slow", {}))
        ordered = [parameter for group in groups for parameter in group["params"]]
        config = {
            "train_micro_batch_size_per_gpu": micro_batch,
            "gradient_accumulation_steps": accumulation,
            "gradient_clipping": 0.0 if self.bare else clip,
            "zero_optimization": {
                "stage": zero_stage,
                # DeepSpeed allocates the bucket whole; its own default is 500,000,000
                "reduce_bucket_size": min(BUCKET, sum(p.numel() for p in ordered)),
                "stage3_param_persistence_threshold": KEPT_WHOLE,
            },
            "bf16": {"enabled": dtype == "bfloat16"},
            "zero_allow_untested_optimizer": True,
            "steps_per_print": 10**9,
        }
        if dtype == "bfloat16" and accumulation > 1 and zero_stage:
            config["data_types"] = {"grad_accum_dtype": "fp32"}
        # torch's own AdamW: DeepSpeed's fused ones are compiled at first use
        self.adamw = torch.optim.AdamW(groups, lr=0.0, betas=betas)
        self.engine, self.optimizer, _, _ = deepspeed.initialize(
            model=module, optimizer=self.adamw, config=config
        )
        self.norm = math.nan
        masters = self._prime()
        self.masters = dict(zip(ordered, masters, strict=True)) if zero_stage == 0 else {}

    def _prime(self) -> list[Tensor]:
        """Makes AdamW's empty state now, as its first step would, and has DeepSpeed link it.
        Returns what AdamW steps: masters, or this rank's share of them in flat tensors.

        DeepSpeed links after the first step of the first parameter group, which leaves the other
        groups without state to save and a resumed run without state to fill.
        """
        if self.stage == 3:
            masters = list(self.optimizer.fp32_partitioned_groups_flat)
        else:
            masters = [master for group in self.adamw.param_groups for master in group["params"]]
        for master in masters:
            moments = {key: torch.zeros_like(master) for key in STATE_KEYS}
            self.adamw.state[master] = {"step": torch.tensor(0.0), **moments}
        if self.stage in (1, 2):
            self.optimizer._lazy_init_hp_params_optimizer_state()
        return masters

    def __call__(self, *inputs: Any) -> Any:
        try:
            for block, forward in self.compiled:
                block.forward = forward
            return self.engine(*inputs)
        finally:
            for block, _ in self.compiled:
                del block.forward

    def backward(self, loss: Tensor) -> None:
        self.engine.backward(loss)

    def step(self, rate: float) -> bool:
        """Ends a micro-batch; whether it was the last of a global batch and the weights moved.

        A gradient that is not finite, of any rank and any micro-batch, leaves weights and moments
        as they were on all ranks, and the batch is forgotten.
        """
        for group in self.adamw.param_groups:
            group["lr"] = rate * group["share"]
        finite = True
        if self.bare and self.engine.is_gradient_accumulation_boundary():
            finite = self._judge()
        self.engine.step()
        return finite and self.engine.was_step_applied()

    def _judge(self) -> bool:
        """Clips the summed gradients; drops them, and says False, if they are not finite: AdamW
        leaves alone what has none. DeepSpeed's own optimisers, around AdamW, do both."""
        learning = [p for _, p in self.trained if p.grad is not None]
        norm = nn.utils.get_total_norm([p.grad for p in learning if p.grad is not None])
        self.norm = float(norm)
        if not math.isfinite(self.norm):
            self.engine.zero_grad()
            return False
        nn.utils.clip_grads_with_norm_(learning, self.clip, norm)
        return True

    def gradient_norm(self) -> float:
        """Of the last global batch, before clipping; inf or nan if it was left out."""
        norm = self.norm if self.bare else self.engine.get_global_grad_norm()
        return math.nan if norm is None else float(norm)

    @contextmanager
    def whole(self) -> Iterator[None]:
        """Within it `module` has all its weights on every rank and is an ordinary module, to be
        called, decoded with or saved, not changed. Below stage 3 it always is. All ranks must
        enter and leave it."""
        if self.stage < 3:
            yield
            return
        from deepspeed.runtime.zero import unwrap_model_for_generation

        with unwrap_model_for_generation(self.engine):
            yield

    def state(self) -> dict[str, Tensor]:
        """Every parameter with its optimiser state, fp32, gathered: the same on any world size and
        at any stage. All ranks must call it, and all get it."""
        gathered = {}
        for name, parameter in self.trained:
            gathered[name] = self._get(parameter)
            gathered |= {f"{key}/{name}": self._get(parameter, key) for key in STATE_KEYS}
        return gathered

    def restore(self, state: dict[str, Tensor], step: int) -> None:
        """Takes back what `state` gave after `step` optimiser steps, at any stage."""
        from deepspeed.runtime.zero import GatheredParameters

        for name, parameter in self.trained:
            self._put(parameter, state[name])
            for key in STATE_KEYS:
                self._put(parameter, state[f"{key}/{name}"], key)
        parameters = [parameter for _, parameter in self.trained]
        with torch.no_grad(), GatheredParameters(parameters, modifier_rank=0):
            for name, parameter in self.trained:
                parameter.copy_(state[name])
        for inner in self.adamw.state.values():
            inner["step"].fill_(step)

    def _get(self, parameter: nn.Parameter, key: str | None = None) -> Tensor:
        """The fp32 master of a parameter, or the moment `key`, on the CPU."""
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        if self.stage == 0:
            master = self.masters[parameter]
            full = self.adamw.state[master][key] if key else master.detach()
        elif key:
            full = safe_get_full_optimizer_state(parameter, key)
        else:
            full = safe_get_full_fp32_param(parameter)
        return full.cpu().contiguous().clone()

    def _put(self, parameter: nn.Parameter, value: Tensor, key: str | None = None) -> None:
        """Sets what `_get` gives, each rank its share."""
        from deepspeed import utils

        if self.stage == 0:
            master = self.masters[parameter]
            (self.adamw.state[master][key] if key else master.data).copy_(value)
        elif self.stage < 3 and key:
            utils.safe_set_full_optimizer_state(parameter, value, key)
        elif self.stage < 3:
            utils.safe_set_full_fp32_param(parameter, value)
        else:  # not safe_set_full_*: at stage 3 it fails on sizes that the ranks do not divide
            share = _share(value, utils.safe_get_local_fp32_param(parameter).numel())
            if key:
                utils.safe_set_local_optimizer_state(parameter, share, key)
            else:
                utils.safe_set_local_fp32_param(parameter, share)

    def finish(self) -> None:
        """Leaves the module without DeepSpeed, with its fp32 weights, as it is saved."""
        with self.whole():
            named = self.module.named_parameters()
            kept = {name: p.detach().clone() for name, p in named if not p.requires_grad}
        kept |= {name: self._get(parameter) for name, parameter in self.trained}
        self.engine.destroy()
        for name, parameter in self.module.named_parameters():
            parameter.data = kept[name].to(parameter.device)


def _compiled(module: nn.Module) -> list[tuple[nn.Module, Callable[..., Any]]]:
    """The module's blocks, each with its compiled forward. Shapes are static: those of packed
    sequences are, and kernels for any size need not give the same bits."""
    return [
        (block, torch.compile(block.forward, dynamic=False, options=COMPILED))
        for block in _blocks(module)
    ]


def _blocks(module: nn.Module) -> Iterator[nn.Module]:
    """The outermost modules with parts of their own that are no lists or models: decoder layers,
    residual blocks. What stands between them (supervised tokens picked, losses) has sizes that
    differ from batch to batch."""
    from transformers import PreTrainedModel

    for child in module.children():
        if isinstance(child, (nn.ModuleList, PreTrainedModel)):
            yield from _blocks(child)
        elif list(child.children()):
            yield child


def _share(value: Tensor, size: int) -> Tensor:
    """This rank's `size` elements of a tensor, zeros behind its end."""
    flat = value.flatten()
    padded = nn.functional.pad(flat, (0, size * ranks()[1] - len(flat)))
    return padded[ranks()[0] * size :][:size]


def _groups(
    trained: list[tuple[str, nn.Parameter]], weight_decay: float, slow: dict[str, float]
) -> list[dict[str, Any]]:
    """Parameters of one share of the rate, matrices (which decay) apart from the rest."""
    groups: dict[tuple[float, bool], list[nn.Parameter]] = {}
    for name, parameter in trained:
        share = next((s for prefix, s in slow.items() if name.startswith(prefix)), 1.0)
        groups.setdefault((share, parameter.dim() >= 2), []).append(parameter)
    return [
        {"params": groups[key], "share": key[0], "weight_decay": weight_decay if key[1] else 0.0}
        for key in sorted(groups, reverse=True)
    ]


def sum_over_ranks(values: dict[str, float]) -> dict[str, float]:
    """Adds up each value over the ranks; every rank must bring the same keys."""
    if ranks()[1] == 1:
        return values
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tensor = torch.tensor([values[k] for k in sorted(values)], dtype=torch.float64, device=device)
    torch.distributed.all_reduce(tensor)
    return dict(zip(sorted(values), tensor.tolist(), strict=True))


def barrier() -> None:
    if ranks()[1] > 1:
        torch.distributed.barrier()

"""DeepSpeed behind one small door: a step, a gathered state, ranks."""

import logging
import os
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from decoding.ranks import PATIENCE, backend, ranks
from decoding.ranks import join as join_group

ALONE = {
    "RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "0",
}  # fmt: skip
STATE_KEYS = ("exp_avg", "exp_avg_sq")


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

    A module may have `slow`: prefixes of parameter names, each with its share of the rate.
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
    ) -> None:
        import deepspeed

        if zero_stage not in (1, 2):
            raise ValueError(f"deepspeed.zero_stage is {zero_stage}; it must be 1 or 2")
        module.to(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
        buffers = {name: buffer.clone() for name, buffer in module.named_buffers()}
        trained = [(n, p) for n, p in module.named_parameters() if p.requires_grad]
        groups = _groups(trained, weight_decay, getattr(module, "slow", {}))
        config = {
            "train_micro_batch_size_per_gpu": micro_batch,
            "gradient_accumulation_steps": accumulation,
            "gradient_clipping": clip,
            "zero_optimization": {"stage": zero_stage},
            "bf16": {"enabled": dtype == "bfloat16"},
            "zero_allow_untested_optimizer": True,
            "steps_per_print": 10**9,
        }
        # torch's own AdamW: DeepSpeed's fused ones are compiled at first use
        optimizer = torch.optim.AdamW(groups, lr=0.0, betas=betas)
        self.engine, self.optimizer, _, _ = deepspeed.initialize(
            model=module, optimizer=optimizer, config=config
        )
        # bf16 would round buffers too, and a rounded rotary frequency is another position code
        for name, buffer in module.named_buffers():
            buffer.data = buffers[name]
        self.module = module
        self.trained = trained
        self._prime()

    def _prime(self) -> None:
        """Makes AdamW's empty state now, as its first step would, and has DeepSpeed link it.

        DeepSpeed links after the first step of the first parameter group, which leaves the other
        groups without state to save and a resumed run without state to fill.
        """
        inner = self.optimizer.optimizer
        for group in inner.param_groups:
            for flat in group["params"]:
                moments = {key: torch.zeros_like(flat) for key in STATE_KEYS}
                inner.state[flat] = {"step": torch.tensor(0.0), **moments}
        self.optimizer._lazy_init_hp_params_optimizer_state()

    def __call__(self, *inputs: Any) -> Any:
        return self.engine(*inputs)

    def backward(self, loss: Tensor) -> None:
        self.engine.backward(loss)

    def step(self, rate: float) -> None:
        """Ends a micro-batch; at the last one of a global batch the weights move."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["share"]
        self.engine.step()

    def gradient_norm(self) -> float:
        """Of the last global batch, before clipping."""
        norm = self.engine.get_global_grad_norm()
        return float(norm) if norm is not None else float("nan")

    def state(self) -> dict[str, Tensor]:
        """Every parameter with its optimiser state, fp32, gathered: the same on any world size."""
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        gathered = {}
        for name, parameter in self.trained:
            gathered[name] = safe_get_full_fp32_param(parameter).cpu().contiguous().clone()
            for key in STATE_KEYS:
                full = safe_get_full_optimizer_state(parameter, key)
                gathered[f"{key}/{name}"] = full.cpu().contiguous().clone()
        return gathered

    def restore(self, state: dict[str, Tensor], step: int) -> None:
        """Takes back what `state` gave after `step` optimiser steps."""
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

        for name, parameter in self.trained:
            safe_set_full_fp32_param(parameter, state[name])
            for key in STATE_KEYS:
                safe_set_full_optimizer_state(parameter, state[f"{key}/{name}"], key)
            parameter.data.copy_(state[name])
        for inner in self.optimizer.optimizer.state.values():
            inner["step"].fill_(step)

    def finish(self) -> None:
        """Copies the fp32 weights back into the module, so that it saves what was trained."""
        from deepspeed.utils import safe_get_full_fp32_param

        for _, parameter in self.trained:
            full = safe_get_full_fp32_param(parameter)
            parameter.data = full.to(parameter.device).clone()


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

"""How long and how fast: the token budget and its portions, the learning rate over the steps."""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class AdamW:
    """conf/optim/adamw.yaml: rate, its warm-up and cosine, and what else the optimiser needs.

    warmup and floor are shares: of the steps, and of the peak rate where the cosine ends.
    """

    lr: float = 3e-4
    warmup: float = 0.03
    floor: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.1
    clip: float = 1.0

    def __post_init__(self) -> None:
        if self.lr <= 0 or not 0 <= self.warmup <= 1 or not 0 <= self.floor <= 1 or self.clip <= 0:
            raise ValueError(
                f"optim has lr {self.lr}, warmup {self.warmup}, floor {self.floor}, clip "
                f"{self.clip}; lr and clip must be above 0, warmup and floor shares from 0 to 1"
            )

    def rate(self, step: int, steps: int) -> float:
        """Learning rate of 0-based `step` of `steps`."""
        warm = max(1, math.ceil(self.warmup * steps))
        if step < warm:
            return self.lr * (step + 1) / warm
        progress = (step - warm) / max(1, steps - warm)
        return self.lr * (self.floor + (1 - self.floor) * 0.5 * (1 + math.cos(math.pi * progress)))


@dataclass(frozen=True)
class Schedule:
    """How many tokens, and in what portions. Everything is counted in packed positions.

    tokens: of the whole run; batch_tokens: of one optimiser step over all ranks; micro_batch:
    sequences that one rank holds at once (changes speed and memory, never the result); compile:
    torch.compile for the drafter's training pass (train/engine.py), whose kernels round otherwise,
    so that it is another run.
    """

    free = frozenset({"micro_batch", "zero_stage"})

    tokens: int
    batch_tokens: int
    sequence_length: int
    micro_batch: int = 8
    zero_stage: int = 1
    dtype: str = "bfloat16"
    seed: int = 0
    compile: bool = False

    def __post_init__(self) -> None:
        if min(self.tokens, self.batch_tokens, self.sequence_length, self.micro_batch) < 1:
            raise ValueError(
                f"schedule has tokens {self.tokens}, batch_tokens {self.batch_tokens}, "
                f"sequence_length {self.sequence_length}, micro_batch {self.micro_batch}; each "
                "must be at least 1"
            )
        if self.zero_stage not in (0, 1, 2, 3):
            raise ValueError(f"deepspeed.zero_stage is {self.zero_stage}; it must be 0, 1, 2 or 3")
        if self.compile and self.zero_stage == 3:
            raise ValueError(
                "schedule.compile is true and deepspeed.zero_stage 3, which gathers and drops the "
                "weights amid what would be compiled; set deepspeed=zero2, or compile to false"
            )
        if self.dtype not in ("bfloat16", "float32"):
            raise ValueError(f"schedule.dtype is {self.dtype!r}; it must be bfloat16 or float32")
        if self.batch_tokens % self.sequence_length or self.tokens < self.batch_tokens:
            raise ValueError(
                f"batch_tokens {self.batch_tokens:,} must be a multiple of sequence_length "
                f"{self.sequence_length:,} and at most tokens {self.tokens:,}; otherwise there is "
                "not one whole step"
            )

    @property
    def steps(self) -> int:
        return self.tokens // self.batch_tokens

    @property
    def rows(self) -> int:
        """Sequences of one optimiser step."""
        return self.batch_tokens // self.sequence_length

    def micro(self, world: int) -> int:
        """The largest micro-batch, at most the configured one, that divides a rank's share."""
        if self.rows % world:
            raise ValueError(
                f"a step of {self.rows} sequences cannot be shared by {world} ranks; make "
                "batch_tokens a multiple of sequence_length x ranks"
            )
        share = self.rows // world
        return max(m for m in range(1, min(self.micro_batch, share) + 1) if share % m == 0)

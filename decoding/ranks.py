"""The processes of one job: who is here, who does what, and what all of them agree on.

A launcher (torchrun, deepspeed, srun) says who is who; without one there is a single rank and no
group.
"""

import functools
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor

PATIENCE = timedelta(days=2)  # the other ranks wait while one of them works alone
START = timedelta(minutes=5)  # until the first rank answers


def ranks() -> tuple[int, int]:
    """(rank, world size) as the launcher set them; (0, 1) without one."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def backend() -> str:
    """nccl between GPUs, else gloo."""
    return "nccl" if torch.cuda.is_available() else "gloo"


def address() -> tuple[str, int]:
    """Where the job's store listens: host and port."""
    return os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])


@functools.cache
def store() -> torch.distributed.Store:
    """What all ranks of the job write to and read from, over TCP: torchrun's agent hosts it, else
    rank 0. Raises OSError where it does not answer within START."""
    rank, _ = ranks()
    hosted = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    host, port = address()
    try:
        made = torch.distributed.TCPStore(
            host,
            port,
            is_master=rank == 0 and not hosted,
            timeout=START,
            wait_for_workers=False,
            multi_tenant=True,
        )
    except RuntimeError as error:
        raise OSError(
            f"rank {rank} does not reach the first rank of its job at {host}:{port}: is it "
            f"running, and is the port open? ({' '.join(str(error).split())[:100]})"
        ) from error
    made.set_timeout(PATIENCE)
    # stages that one launcher runs after another meet in one store, each under a name of its own
    return torch.distributed.PrefixStore(os.environ.get("DRAFTSMITH_JOB", "job"), made)


def join() -> tuple[int, int]:
    """Joins the group of the launcher's processes, where there are several; rank and world size.

    Each rank takes the GPU of its local number. Raises ValueError where there are fewer GPUs.
    """
    rank, world = ranks()
    if torch.cuda.is_available():
        local, there = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
        if local >= there:
            raise ValueError(
                f"rank {local} of this machine has no GPU of its own: there are {there}; set "
                f"launch.ranks to {there} or fewer"
            )
        torch.cuda.set_device(local)
    if world > 1 and not torch.distributed.is_initialized():
        torch.distributed.init_process_group(
            backend(), store=store(), rank=rank, world_size=world, timeout=PATIENCE
        )
    return rank, world


@dataclass(frozen=True)
class Ranks:
    """This rank among the `world` of them.

    together: every rank takes part in every piece of work, because the target is sharded over
    them; else each does its share.
    """

    rank: int = 0
    world: int = 1
    together: bool = False

    @classmethod
    def here(cls, together: bool = False) -> "Ranks":
        """The ranks of this job, joined; a single one without a launcher."""
        return cls(*join(), together)

    @property
    def first(self) -> bool:
        """Whether this rank is the one that prints and writes for all."""
        return self.rank == 0

    def has(self, number: int) -> bool:
        """Whether this rank does piece `number`; pieces go round."""
        return self.together or number % self.world == self.rank

    def decide(self, make: Callable[[], Any], *, alone: bool = False) -> Any:
        """What rank 0 makes, on all ranks, as JSON gives it back. The others make it only where
        they work together; alone: not even then, since the target has no part in it. Raises
        OSError where a rank has ended."""
        made = make() if self.first or (self.together and not alone) else None
        return self.every(made)[0]

    def gather(self, mine: list[Any]) -> list[Any]:
        """The items of all ranks, rank by rank, as JSON gives them back; rank 0's where all ranks
        made the same. Raises OSError where a rank has ended."""
        each = self.every(mine)
        return each[0] if self.together else [item for items in each for item in items]

    def every(self, mine: Any) -> list[Any]:
        """Each rank's value, in order, as JSON gives it back."""
        said = json.dumps(mine).encode()
        return [json.loads(text) for text in (exchange(said) if self.world > 1 else [said])]

    def barrier(self) -> None:
        """Returns when all ranks have come here."""
        self.every(None)


def exchange(said: bytes) -> list[bytes]:
    """What each rank says, in order of rank. Raises OSError where a rank has ended."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        sizes = _all(torch.tensor([len(said)], device=device))
        padded = torch.zeros(int(max(sizes)), dtype=torch.uint8)
        padded[: len(said)] = torch.frombuffer(bytearray(said), dtype=torch.uint8)
        texts = _all(padded.to(device))
    except RuntimeError as error:  # torch says which connection broke, not why
        raise OSError(
            "another rank of this job has ended, so this one cannot go on; see what that rank said "
            f"({' '.join(str(error).split())[:100]})"
        ) from error
    return [bytes(t[: int(n)].cpu().numpy()) for t, n in zip(texts, sizes, strict=True)]


def _all(mine: Tensor) -> list[Tensor]:
    """Each rank's tensor; they have one shape."""
    every = [torch.empty_like(mine) for _ in range(ranks()[1])]
    torch.distributed.all_gather(every, mine)
    return every

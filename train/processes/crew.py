"""Commands that a launcher has started once a rank: `torchrun ... -m train recipe=NAME`.

Rank 0's command leads: it composes, plans, makes folders and says which stage comes next. The
others make nothing; they lend a process to each stage that runs on several ranks.
"""

import functools
import hashlib
import json
import time
from itertools import count
from pathlib import Path
from typing import Any

from decoding.ranks import START, ranks, store
from train.launch import Launch

ENVIRONMENT = 4
LOOK, WAIT = 0.2, 10.0  # seconds


class Crew:
    """The commands of one launcher. They meet in its store, one message after another."""

    def __init__(self) -> None:
        self.rank, self.world = ranks()
        self.numbers = count()

    @classmethod
    @functools.cache
    def here(cls) -> "Crew | None":
        """This process among the others; None where it is alone."""
        return cls() if ranks()[1] > 1 else None

    @property
    def leads(self) -> bool:
        return self.rank == 0

    def begin(self, config: dict[str, Any]) -> None:
        """Waits for the others. Raises ValueError where one was told something else, OSError where
        one does not come."""
        self._say({"configuration": "which?"})
        until = time.monotonic() + START.total_seconds()
        for rank in range(1, self.world):
            while not store().check([f"asked/{rank}"]):
                if time.monotonic() > until:
                    raise OSError(f"rank {rank} of {self.world} has not come: look at its machine")
                time.sleep(LOOK)
            if store().get(f"asked/{rank}") != digest(config).encode():
                raise ValueError(
                    f"rank {rank} was started with other settings than rank 0: type the same "
                    "command on every node"
                )

    def announce(self, folder: Path, hang_seconds: float) -> str:
        """The next stage that runs on all ranks; returns the name of this start."""
        job = f"{folder.name}-{store().add('starts', 1)}"
        self._say({"folder": str(folder), "job": job, "hang_seconds": hang_seconds})
        return job

    def end(self, code: int) -> None:
        """There is no more to do. Waits until all have heard it: the store ends with rank 0."""
        number = self._say({"code": code})
        until = time.monotonic() + WAIT
        while store().add(f"heard/{number}", 0) < self.world - 1 and time.monotonic() < until:
            time.sleep(LOOK)

    def follow(self, config: dict[str, Any]) -> int:
        """Runs what rank 0's command announces; returns its exit code. What goes wrong is told by
        that command, or by the ranks of the stage."""
        try:
            while True:
                number, said = self._hear()
                if "code" in said:
                    store().add(f"heard/{number}", 1)
                    return int(said["code"])
                if "configuration" in said:
                    store().set(f"asked/{self.rank}", digest(config))
                else:
                    launch = Launch(hang_seconds=said["hang_seconds"])
                    launch.run(Path(said["folder"]), True, said["job"])
        except RuntimeError:  # rank 0 has gone, and the store with it
            return ENVIRONMENT

    def _say(self, message: dict[str, Any]) -> int:
        number = next(self.numbers)
        store().set(f"message/{number}", json.dumps(message))
        return number

    def _hear(self) -> tuple[int, dict[str, Any]]:
        """The next message, however long it takes: a stage of rank 0 alone may take hours."""
        number = next(self.numbers)
        while not store().check([f"message/{number}"]):
            time.sleep(LOOK)
        return number, json.loads(store().get(f"message/{number}"))


def digest(config: dict[str, Any]) -> str:
    """A hash of what the user asked for."""
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()

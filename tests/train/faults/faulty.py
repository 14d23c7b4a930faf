"""A stage of several ranks that goes wrong in a chosen way."""

import json
import os
import signal
import time
from pathlib import Path

from decoding.pulse import item, paced
from decoding.ranks import Ranks

STEPS = 4


class Faulty:
    """fault: what happens in the third step, or instead of it; "" for nothing."""

    def __init__(self, fault: str) -> None:
        self.fault = fault

    def run(self, out: Path, **_: Path) -> dict[str, float]:
        ranks = Ranks.here()
        print("rank", ranks.rank, "says: 안녕하세요", flush=True)
        (out / f"pid-{ranks.rank}").write_text(str(os.getpid()))
        self.count_signals(out, ranks.rank)
        if self.fault == "packing" and ranks.first:
            for number in paced(range(10), "row"):
                time.sleep(1e6 if number == 5 else 0.01)
        if self.fault == "long":  # rank 0 works alone, for longer than a step may take
            ranks.decide(lambda: time.sleep(float(os.environ["LONG"])))
        for step in range(10_000 if self.fault == "until told" else STEPS):
            with item("step"):
                if step == (0 if self.fault == "first" else 2) and ranks.rank == 1:
                    self.fail()
                ranks.barrier()
                time.sleep(0.05)
            if ranks.first:
                (out / "steps").write_text(str(step + 1))
        seen = {k: os.environ.get(k) for k in ("RANK", "LOCAL_RANK", "MASTER_ADDR")}
        (out / f"place-{ranks.rank}.json").write_text(json.dumps(seen))
        ranks.barrier()
        return {"steps": STEPS}

    def fail(self) -> None:
        if self.fault == "exit":
            os._exit(7)
        if self.fault == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.fault == "raise":
            raise ValueError("there is no row 7 in data.jsonl; 한국어")
        if self.fault in ("sleep", "first"):
            time.sleep(1e6)
        if self.fault == "stop":
            os.kill(os.getpid(), signal.SIGSTOP)

    def count_signals(self, out: Path, rank: int) -> None:
        """A line for each, besides what the worker does with it."""
        known = signal.getsignal(signal.SIGTERM)
        assert callable(known)

        def note(number: int, frame: object) -> None:
            with (out / f"signals-{rank}").open("a") as stream:
                stream.write(f"{number}\n")
            known(number, frame)

        signal.signal(signal.SIGTERM, note)

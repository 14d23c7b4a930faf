"""What a rank says of itself to the others (train/processes/watch.py), read and put into sentences.

A sign has: turn (when it was given), pid, host, where (a place in this repository), waits (for
other ranks), late (a piece of work takes too long), slow (late, or the piece stands still), stuck
([what, seconds] where it is slow and does not wait).
"""

import socket
import sys
from pathlib import Path
from types import FrameType
from typing import Any

import psutil

from train.compose import ROOMS, ROOT

Sign = dict[str, Any]
OURS = tuple(f"{ROOT / room}/" for room in (*ROOMS, "tests"))
COLLECTIVE = ("distributed_c10d.py", "_functional_collectives.py")  # torch's
GOES_ON = "The same command goes on from what is saved"


def position(thread: int | None) -> tuple[bool, str]:
    """Whether a thread waits for other ranks, and where in this repository it stands."""
    frame: FrameType | None = sys._current_frames().get(thread or 0)
    waits, where = False, ""
    while frame is not None:
        file = frame.f_code.co_filename
        waits = waits or file.endswith(COLLECTIVE) or _exchanges(frame)
        if not where and file.startswith(OURS):
            where = (
                f"{Path(file).relative_to(ROOT)}, line {frame.f_lineno} ({frame.f_code.co_name})"
            )
        frame = frame.f_back
    return waits, where or "its start"


def _exchanges(frame: FrameType) -> bool:
    """On GPUs a rank waits where it reads what a collective gave, which is in our own function."""
    code = frame.f_code
    return code.co_name == "exchange" and code.co_filename.endswith("decoding/ranks.py")


def who(sign: Sign) -> str:
    return f"process {sign['pid']} on {sign['host']}"


def ended(rank: int, sign: Sign) -> str:
    return (
        f"rank {rank} ({who(sign)}) has ended without a word: it was killed (by the system, if "
        f"memory ran out) or it crashed. {GOES_ON}"
    )


def hung(rank: int, sign: Sign) -> str:
    doing, seconds = sign["stuck"]
    return (
        f"rank {rank} ({who(sign)}) hangs: its {doing} has stood still for {seconds} seconds, in "
        f"{sign['where']}. {GOES_ON}; launch.hang_seconds is the limit"
    )


def lives(sign: Sign) -> bool:
    """False for a process of this machine that has ended; of other machines only silence tells."""
    if sign["host"] != socket.gethostname():
        return True
    try:
        return psutil.Process(sign["pid"]).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False

"""Waiting for what comes by itself, on a machine of any speed."""

import time
from collections.abc import Callable

ENOUGH = 20.0  # seconds


def comes(state: Callable[[], bool]) -> bool:
    """Whether it does, in a time that is enough for a busy machine; returns as soon as it has."""
    until = time.monotonic() + ENOUGH
    while not state() and time.monotonic() < until:
        time.sleep(0.02)
    return state()

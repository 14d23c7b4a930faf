"""A thread in each rank that ends the job when one rank is dead, hung or has failed, and sees to
it that the first cause is told once.

The ranks hear each other in the job's store over TCP, never through files. Each rank says every
TURN seconds what its main thread is at. Rank 0 judges all of them, the others judge rank 0.
"""

import json
import os
import signal
import socket
import sys
import threading
import time
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

from data.secrets import redacted
from decoding.pulse import PULSE
from decoding.ranks import address, ranks
from drafters.base import write_json
from train.processes.signs import GOES_ON, Sign, ended, hung, lives, position, who
from train.processes.still import Still

ENVIRONMENT, STOPPED = 4, (130, 143)
TURN = 2.0  # seconds
HANG_SECONDS = 40.0  # unless the launch says otherwise
SILENT = 40.0  # seconds without a sign after which a rank counts as dead
ECHO = 1.0  # seconds; a launcher passes on a signal that its whole group was sent
LEAVE, SAVE = 5.0, 30.0  # seconds in which a rank may end by itself: after a fault, after a stop
NAMED = 3  # ranks in a sentence
FAILED = "failed.json"


class Watch:
    """Of this rank, from `begin` to `end`; of the others too, where there are several.

    folder: the stage's; job: what the command calls this start; hang_seconds: how long a piece of
    work may stand still, or take if those before it were quick (decoding/pulse.py).
    """

    def __init__(self, folder: Path, job: str, hang_seconds: float) -> None:
        self.folder, self.job, self.hang_seconds = folder, job, hang_seconds
        self.rank, self.world = ranks()
        self.main = threading.main_thread()
        self.store: torch.distributed.Store | None = None
        self.leaving = False
        self._speaks = self.rank < 2  # where the ranks cannot agree on who tells
        self.told = threading.Event()  # this process has been signalled
        self._signals, wakes = socket.socketpair()
        for end in (self._signals, wakes):
            end.setblocking(False)
        self._wakes = wakes
        self._still = Still()
        self._seen: dict[int, tuple[Any, float]] = {}  # by rank: its last sign, and when it came
        self._late = time.monotonic()

    def begin(self) -> None:
        """Connects, where there are several ranks, and starts the thread. Raises OSError where the
        store does not answer."""
        if self.world > 1:
            self.store = _connected(address(), self.job)
        if threading.current_thread() is self.main:
            signal.set_wakeup_fd(self._wakes.fileno(), warn_on_full_buffer=False)
        threading.Thread(target=self._run, name="watch", daemon=True).start()

    def end(self) -> None:
        """The work is done: a rank that leaves is no dead one."""
        self.leaving = True
        if threading.current_thread() is self.main:
            signal.set_wakeup_fd(-1)
        with suppress(RuntimeError):
            if self.store:
                self.store.set(f"left/{self.rank}", "")

    # ---- what a failing rank asks and tells

    def tell(self, code: int, sentence: str, trace: str = "") -> None:
        """Prints the sentence, unless another rank has told its own, and leaves the code for the
        command: a launcher reports one of its own."""
        if not self._first(code):
            return
        note = {"code": code, "error": sentence} | ({"job": self.job} if self.job else {})
        self._leave_note(note)
        with suppress(RuntimeError):
            if self.store:
                self.store.set("cause", json.dumps(note))
        who = f"rank {self.rank}: " if self.rank else ""
        said = trace or f"error: {who}{' '.join(sentence.split())}\n"
        print(said, end="", file=sys.stderr, flush=True)

    def cause(self) -> dict[str, Any] | None:
        """What another rank has told, if one has."""
        try:
            if self.store and self.store.check(["cause"]):
                return json.loads(self.store.get("cause"))
        except RuntimeError:
            return None
        return None

    def blame(self, seconds: float) -> dict[str, Any] | None:
        """Waits so long for the cause behind an error: what another rank has told, or that one is
        dead, which is then told; None if it is this rank's own."""
        until = time.monotonic() + seconds
        while self.world > 1:
            found = self.cause()
            if found:
                return found
            dead = self._gone()
            if dead:
                self.tell(ENVIRONMENT, dead)
                return {"code": ENVIRONMENT, "error": dead}
            if time.monotonic() > until:
                break
            time.sleep(0.2)
        return None

    def _first(self, code: int) -> bool:
        """Whether no rank has told a cause before."""
        try:
            return self.store.add("claim", 1) == 1 if self.store else self._speaks
        except RuntimeError:  # rank 0 has left with the store; of a stop it has told before
            return self._speaks and (code not in STOPPED or self.rank == 0)

    def _leave_note(self, note: dict[str, Any]) -> None:
        if self.folder.is_dir():  # on a node that shares no disk there is none, and none is made
            with suppress(OSError):
                write_json(self.folder / FAILED, note | {"error": redacted(note["error"])})

    # ---- the thread

    def _run(self) -> None:
        while not self.leaving:
            now = time.monotonic()
            if now - self._late > 5 * TURN:  # stopped and continued: nobody's silence counts
                self._seen.clear()
                PULSE.since = now
            self._late = now
            try:
                self._turn(now)
            except RuntimeError as error:
                self._lost(error)
            self._listen(TURN)

    def _listen(self, seconds: float) -> None:
        """Sleeps, unless a signal comes in."""
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0:
            self._signals.settimeout(left)
            with suppress(TimeoutError, BlockingIOError):
                if set(self._signals.recv(64)) & {signal.SIGTERM, signal.SIGINT}:
                    self.told.set()
                    return

    def _turn(self, now: float) -> None:
        mine = self._state(now)
        if self.store is None:
            if mine["stuck"]:
                self._accuse(hung(self.rank, mine))
            return
        heard = self.told.is_set()
        self._say(mine)
        found = self.cause()
        if found:
            self._follow(found)
        if heard:
            self.store.set("stop", "")
        elif self.store.check(["stop"]):
            self._pass_on()
        self._judge(now)

    def _state(self, now: float) -> Sign:
        """What the main thread is at."""
        waits, where = position(self.main.ident)
        doing, since = PULSE.doing, PULSE.since
        late = still = False
        if doing is not None and now - since > TURN:
            late = now - since > PULSE.limit(doing, self.hang_seconds)
            still = self._still.look(since, now, PULSE.rest(doing, self.hang_seconds))
        slow = late or still
        stuck = [doing, round(now - since)] if slow and not waits else None
        here = {"turn": now, "pid": os.getpid(), "host": socket.gethostname(), "where": where}
        return here | {"waits": waits, "slow": slow, "late": late, "stuck": stuck}

    def _say(self, sign: Sign) -> None:
        if self.store:
            self.store.set(f"sign/{self.rank}", json.dumps(sign))

    def _pass_on(self) -> None:
        """Another rank was told to stop, so this one is as well: once, though a launcher may tell
        every rank."""
        self._listen(TURN)
        if not self.told.is_set() and not self.leaving:
            os.kill(os.getpid(), signal.SIGTERM)

    def _judge(self, now: float) -> None:
        signs = self._signs(range(self.world) if self.rank == 0 else range(1))
        dead = self._dead(signs, now)
        if dead and not self.cause():
            self._accuse(dead)
        all_spoke = len(signs) == self.world
        # one that stands still may wait, in a way that its stack does not show, for one at work
        at_rest = all_spoke and all(s["slow"] or s["waits"] for s in signs.values())
        stuck = [hung(r, s) for r, s in signs.items() if s["stuck"] and (s["late"] or at_rest)]
        if stuck:
            self._accuse("; ".join(stuck[:NAMED]))
        if all_spoke and all(s["slow"] and s["waits"] for s in signs.values()):
            places = "; ".join(f"rank {r} in {s['where']}" for r, s in list(signs.items())[:NAMED])
            self._accuse(f"all ranks wait for each other and none comes: {places}")

    def _signs(self, judged: range) -> dict[int, Sign]:
        """What these ranks said last, without those that have yet to speak or have left."""
        assert self.store is not None
        store = self.store
        speak = [r for r in judged if store.check([f"sign/{r}"])]
        raw = store.multi_get([f"sign/{r}" for r in speak]) if speak else []
        signs = {rank: json.loads(text) for rank, text in zip(speak, raw, strict=True)}
        return {r: s for r, s in signs.items() if not store.check([f"left/{r}"])}

    def _dead(self, signs: dict[int, Sign], now: float) -> str:
        """A sentence on the first rank that has ended or fallen silent; empty if there is none."""
        for rank, sign in signs.items():
            if rank == self.rank:
                continue
            last, since = self._seen.get(rank, (None, now))
            if last != sign["turn"]:
                self._seen[rank], since = (sign["turn"], now), now
            if not lives(sign):
                return ended(rank, sign) if self._signs(range(rank, rank + 1)) else ""
            if now - since > SILENT:
                return (
                    f"rank {rank} ({who(sign)}) has given no sign for {now - since:.0f} seconds; "
                    f"its last was in {sign['where']}. {GOES_ON}"
                )
        return ""

    def _gone(self) -> str:
        """The same for the failing main thread, which cannot wait for silence."""
        try:
            signs = self._signs(range(self.world)) if self.store else {}
        except RuntimeError:
            return ""
        return next((ended(rank, sign) for rank, sign in signs.items() if not lives(sign)), "")

    def _lost(self, error: RuntimeError) -> None:
        """The store has gone, and with it the process that hosts it."""
        hosted = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        self._speaks = self.rank == (0 if hosted else 1)
        time.sleep(1.0 if self._speaks else LEAVE)
        if not self.leaving:
            self.store = None
            self._accuse(
                "the process that holds this job together (rank 0, or its launcher) has ended "
                f"without a word: it was killed or its machine is gone. {GOES_ON}"
            )

    def _follow(self, cause: dict[str, Any]) -> None:
        """Another rank has failed: this one ends by itself, or is ended."""
        if self.rank == 0:
            self._leave_note(cause)
        until = time.monotonic() + (SAVE if cause["code"] in STOPPED else LEAVE)
        while not self.leaving and time.monotonic() < until:
            time.sleep(0.1)
        if not self.leaving:
            _exit(cause["code"])

    def _accuse(self, sentence: str) -> None:
        self.tell(ENVIRONMENT, sentence)
        _exit(ENVIRONMENT)


def _connected(to: tuple[str, int], job: str) -> torch.distributed.Store:
    """A connection of its own to the job's store: on a shared one, waits exclude each other."""
    clock = timedelta(seconds=10)
    made = torch.distributed.TCPStore(*to, is_master=False, timeout=clock, wait_for_workers=False)
    return torch.distributed.PrefixStore(f"watch {job}", made)


def stop_from_afar(to: tuple[str, int], job: str) -> None:
    """Tells all ranks of a job to stop, as SIGTERM to one of them would; nothing happens where the
    store does not answer."""
    with suppress(RuntimeError):
        _connected(to, job).set("stop", "")


def _exit(code: int) -> None:
    """Ends this process whatever its main thread does: a hung one hears no exception."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)

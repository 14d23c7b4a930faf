"""What the ranks of a job see of each other, in one process: a store in memory stands for TCP's."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from decoding import pulse
from tests.waiting import comes
from train.launch import Launch
from train.processes import crew, watch, worker
from train.processes.crew import Crew
from train.processes.signs import position
from train.processes.still import Still
from train.processes.watch import Watch

SPAN = 1.5  # seconds


class Ended(Exception):
    """Stands for the end of the process."""


@pytest.fixture
def world(tmp_path: Path, monkeypatch) -> list[Watch]:
    """Watches of three ranks, none of them running."""
    store = torch.distributed.HashStore()
    made = []
    for rank in range(3):
        each = Watch(tmp_path, "j", hang_seconds=5.0)
        each.rank, each.world, each.store, each._speaks = rank, 3, store, rank < 2
        made.append(each)

    def end(code: int) -> None:
        raise Ended(code)

    monkeypatch.setattr(watch, "_exit", end)
    return made


def sign(world: list[Watch], rank: int, **more: object) -> None:
    here = {"turn": 1.0, "pid": os.getpid(), "host": socket.gethostname(), "where": "x.py, line 3"}
    said = here | {"waits": False, "slow": False, "late": False, "stuck": None} | more
    assert world[rank].store
    world[rank]._say(said)


def told(world: list[Watch], rank: int, now: float, capsys) -> str:
    """What the watch of `rank` ends the job for, if it does."""
    with suppress(Ended):
        world[rank]._judge(now)
    return capsys.readouterr().err


def test_all_is_well_while_signs_come(world, capsys):
    for rank in range(3):
        sign(world, rank)
    assert told(world, 0, 0.0, capsys) == told(world, 1, 0.0, capsys) == ""
    for rank in range(3):
        sign(world, rank, turn=2.0)
    assert told(world, 0, 100.0, capsys) == ""


def test_a_silent_rank_of_another_machine_is_dead_and_one_that_left_is_not(world, capsys):
    for rank in range(3):
        sign(world, rank, host="node9")
    assert told(world, 0, 0.0, capsys) == ""
    assert told(world, 0, watch.SILENT - 1, capsys) == ""
    world[1].end()
    assert "rank 2 (process" in told(world, 0, watch.SILENT + 1, capsys)


def test_rank_0_is_watched_by_the_others_too(world, capsys):
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    sign(world, 0, pid=process.pid)
    sign(world, 1)
    assert "rank 0 (process" in told(world, 1, 0.0, capsys)
    assert told(world, 2, 0.0, capsys) == "", "the cause is told once"


def test_the_rank_that_stands_still_is_named_and_not_those_that_wait_for_it(world, capsys):
    for rank in (0, 2):
        sign(world, rank, waits=True, slow=True)
    sign(world, 1, slow=True, late=True, stuck=["step", 61])
    said = told(world, 0, 0.0, capsys)
    assert said.startswith("error: rank 1 (process")
    assert "its step has stood still for 61 seconds, in x.py, line 3" in said
    assert "rank 2" not in said


def test_a_rank_at_rest_may_wait_for_one_at_work(world, capsys):
    """Not every wait shows in a stack, so that rest alone is no hang while another rank works."""
    sign(world, 1, slow=True, stuck=["step", 45])
    sign(world, 2, waits=True)
    assert told(world, 0, 0.0, capsys) == "", "rank 0 has not spoken"
    sign(world, 0)
    assert told(world, 0, 0.0, capsys) == "", "rank 0 works"
    assert told(world, 2, 0.0, capsys) == "", "and is not judged by its rest alone"
    sign(world, 0, waits=True)
    assert "rank 1 (process" in told(world, 0, 0.0, capsys)


def test_ranks_that_all_wait_for_each_other_are_ended(world, capsys):
    for rank in range(3):
        sign(world, rank, waits=True, slow=rank < 2)
    assert told(world, 0, 0.0, capsys) == "", "one is in no piece of work: it may take its time"
    sign(world, 2, waits=True, slow=True)
    assert "all ranks wait for each other" in told(world, 0, 0.0, capsys)


def test_the_first_cause_is_told_once_and_known_to_all(world, capsys, tmp_path):
    world[2].tell(2, "there is no row 7")
    world[1].tell(4, "connection closed by peer")
    assert capsys.readouterr().err == "error: rank 2: there is no row 7\n"
    note = {"code": 2, "error": "there is no row 7", "job": "j"}
    assert json.loads((tmp_path / "failed.json").read_text()) == note
    assert world[0].cause() == world[1].blame(0.0) == note
    (tmp_path / "failed.json").unlink()
    world[0].leaving = True  # its main thread ends by itself
    world[0]._follow(note | {"code": 143})
    assert (tmp_path / "failed.json").is_file(), "on the disk of rank 0, where the command looks"


def test_of_a_stop_nothing_is_told_when_the_store_has_gone_with_rank_0(world, capsys, monkeypatch):
    class Gone:
        def add(self, *_: object) -> int:
            raise RuntimeError

        set = check = add

    monkeypatch.setattr(world[1], "store", Gone())
    world[1].tell(143, "stopped")
    assert capsys.readouterr().err == ""
    world[1].tell(2, "there is no row 7")
    assert capsys.readouterr().err == "error: rank 1: there is no row 7\n"


def test_a_failing_rank_finds_the_dead_one_behind_its_error(world, capsys):
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    sign(world, 1)
    assert world[0].blame(0.0) is None
    sign(world, 1, pid=process.pid)
    found = world[0].blame(0.0)
    assert found
    assert found["code"] == 4
    assert "rank 1 (process" in capsys.readouterr().err
    assert worker._time_to_ask(RuntimeError("[gloo] Connection closed by peer")) > 10
    assert worker._time_to_ask(ValueError("no row 7")) < 1


def test_no_folder_is_made_where_there_is_none(world, capsys, tmp_path):
    world[1].folder = tmp_path / "elsewhere"
    world[1].tell(2, "x")
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr().err == "error: rank 1: x\n"


def test_one_rank_that_is_told_to_stop_tells_all_and_each_once(world, monkeypatch):
    sent: list[int] = []
    monkeypatch.setattr(os, "kill", lambda _, number: sent.append(number))
    monkeypatch.setattr(watch, "TURN", 0.05)
    for rank in range(3):
        world[rank]._turn(0.0)
    assert sent == []
    world[1].told.set()  # as by a signal
    world[2].told.set()  # which the launcher sent to it as well
    for rank in (1, 2, 0):
        world[rank]._turn(0.0)
    assert sent == [signal.SIGTERM], "to rank 0 alone"
    world[0]._wakes.send(bytes([signal.SIGTERM]))  # its own comes a moment after another rank's
    world[0]._turn(0.0)
    assert sent == [signal.SIGTERM]
    assert world[0].told.is_set()


def test_a_lone_rank_that_hangs_ends_itself(tmp_path: Path, monkeypatch, capsys):
    def end(code: int) -> None:
        raise Ended(code)

    monkeypatch.setattr(watch, "_exit", end)
    alone = Watch(tmp_path, "", hang_seconds=5.0)
    assert alone.world == 1
    with pulse.item("file"):
        pass
    with pulse.item("file"):
        alone._turn(time.monotonic())
        with pytest.raises(Ended):
            alone._turn(time.monotonic() + 6)
    assert "its file has stood still for 6 seconds" in capsys.readouterr().err
    alone._turn(time.monotonic() + 1e6)  # outside of any piece of work


def test_a_first_piece_that_stands_still_is_a_hang_and_one_at_work_is_none(
    tmp_path: Path, monkeypatch, capsys
):
    def end(code: int) -> None:
        raise Ended(code)

    monkeypatch.setattr(watch, "_exit", end)
    alone = Watch(tmp_path, "", hang_seconds=5.0)
    asked: list[float] = []

    def look(begun: float, now: float, seconds: float) -> bool:
        asked.append(seconds)
        return rests

    monkeypatch.setattr(alone._still, "look", look)
    with pulse.item("first of its kind", least=7.0):
        rests = False
        alone._turn(time.monotonic() + 1000)
        rests = True
        with pytest.raises(Ended):
            alone._turn(time.monotonic() + 1000)
    assert "its first of its kind has stood still for 1000 seconds" in capsys.readouterr().err
    assert asked == [7.0, 7.0], "as long as it was given, though that is more than hang_seconds"
    rests = False
    with pulse.item("second"):
        alone._turn(time.monotonic() + pulse.FIRST - 60)
        with pytest.raises(Ended):
            alone._turn(time.monotonic() + pulse.FIRST + 1)  # at work, but for ever


AT_WORK = {
    "rests": ("time.sleep(60)", True),
    "computes": ("while True: pass", False),
    "writes": ("while True: file.write(bytes(300_000)); time.sleep(.2)", False),
    "computed and has ended": ("while time.process_time() < 0.7: pass", False),
}


@pytest.mark.parametrize("what", AT_WORK)
def test_what_a_child_computes_reads_and_writes_is_work(what: str, tmp_path: Path):
    """As a data loader's workers do while their rank waits for them."""
    code, still = AT_WORK[what]
    begin = "import sys, time\nfile = open(sys.argv[1], 'wb', 0)\nprint(flush=True)\ninput()"
    words = [sys.executable, "-c", f"{begin}\n{code}", str(tmp_path / "file")]
    child = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert child.stdout
        assert child.stdin
        child.stdout.readline()
        own = Still()
        assert not own.look(1.0, 100.0, SPAN), "one look says nothing"
        child.stdin.write("\n")  # it begins when it has been looked at, however busy the machine
        child.stdin.flush()
        time.sleep(SPAN)
        if "ended" in what:  # what it had used is now its parent's
            child.wait()
        assert own.look(1.0, 100.0 + SPAN, SPAN) == still
        assert not own.look(2.0, 100.0 + SPAN, SPAN), "another piece of work"
    finally:
        child.kill()
        child.wait()


def test_only_the_last_seconds_count(monkeypatch):
    used = [(0.0, 0), (0.0, 0), (9.0, 0), (9.0, 0), (9.0, 0), (9.02, 100), (9.02, 10**9)]
    looks = iter(used)
    monkeypatch.setattr("train.processes.still.used", lambda: next(looks))
    own = Still()
    found = [own.look(1.0, now, 4.0) for now in (1.0, 2.0, 4.0, 6.0, 8.0, 9.0, 10.0)]
    assert found == [False] * 4 + [True, True, False]

    def fails() -> None:
        raise OSError

    monkeypatch.setattr("train.processes.still.used", fails)
    assert not own.look(1.0, 20.0, 4.0), "where nothing is seen nothing is said"


def test_a_piece_may_take_as_long_as_those_before_let_expect(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(pulse, "time", type("Clock", (), {"monotonic": lambda: clock[0]}))
    own = pulse.Pulse()
    assert own.limit("step", 40.0) == pulse.FIRST, "the first may compile"
    for seconds, limit in ((1.0, 40.0), (9.0, 90.0), (2.0, 90.0)):
        own.begin("step")
        clock[0] += seconds
        own.end()
        assert own.limit("step", 40.0) == limit
    assert own.limit("row", 40.0) == pulse.FIRST
    own.longest["row"], own.least["row"] = 0.1, 540.0
    assert own.limit("row", 40.0) == 540.0, "storage may be asked again first"


def test_paced_items_are_pieces_of_work_and_their_end_is_none(monkeypatch):
    monkeypatch.setattr(pulse, "PULSE", pulse.Pulse())
    seen = [(x, pulse.PULSE.doing) for x in pulse.paced([1, 2], "row")]
    assert seen == [(1, "row"), (2, "row")]
    assert pulse.PULSE.doing is None
    assert "row" in pulse.PULSE.longest
    for _ in pulse.paced([1, 2], "row"):
        break
    assert pulse.PULSE.doing is None


def test_a_thread_that_waits_for_others_is_told_from_one_that_works():
    go = threading.Event()

    def distributed_c10d() -> None:
        go.wait()

    there = threading.Thread(target=distributed_c10d, daemon=True)
    there.start()
    here = "tests/train/test_watch.py, line "
    assert comes(lambda: position(there.ident)[1].startswith(here))
    assert not position(there.ident)[0]
    go.set()
    there.join()
    code = compile(
        "def all_reduce(go): go.wait()", "/x/torch/distributed/distributed_c10d.py", "exec"
    )
    scope: dict = {}
    go.clear()
    torchs = type(distributed_c10d)(code.co_consts[0], scope)
    there = threading.Thread(target=torchs, args=(go,), daemon=True)
    there.start()
    assert comes(lambda: position(there.ident)[0])
    go.set()
    there.join()


# ---- what rank 0 gives to the others


@pytest.fixture
def shared(monkeypatch) -> torch.distributed.Store:
    store = torch.distributed.HashStore()
    for module in (worker, crew):
        monkeypatch.setattr(module, "store", lambda: store)
    return store


def as_rank(number: int, world: int, monkeypatch) -> None:
    monkeypatch.setenv("RANK", str(number))
    monkeypatch.setenv("WORLD_SIZE", str(world))


def test_only_rank_0_reads_the_stage_and_the_others_are_given_it(shared, tmp_path, monkeypatch):
    """Also where they cannot see its folder."""
    as_rank(1, 2, monkeypatch)
    shared.set("stage", '{"name": "finetune"}')
    assert worker.shared_note(Path("/nowhere")) == {"name": "finetune"}
    as_rank(0, 2, monkeypatch)
    (tmp_path / "stage.json").write_text('{"name": "bench", "language": "한국어"}')
    assert worker.shared_note(tmp_path)["language"] == "한국어"
    assert json.loads(shared.get("stage"))["name"] == "bench"


def test_a_rank_with_other_code_or_versions_is_refused(shared, tmp_path, monkeypatch):
    as_rank(0, 2, monkeypatch)
    (tmp_path / "stage.json").write_text("{}")
    mine = worker.build_of_this_rank()
    shared.set("build/1", json.dumps(mine | {"host": "node2", "torch": "2.12.0"}))
    said = rf"rank 1 on node2 does not run what rank 0 runs: torch 2\.12\.0, not {mine['torch']}\."
    with pytest.raises(ValueError, match=said.replace("+", r"\+")):
        worker.shared_note(tmp_path)
    monkeypatch.setattr(worker, "START", type(worker.START)(seconds=0.1))
    as_rank(0, 3, monkeypatch)
    shared.set("build/1", json.dumps(mine | {"host": "node2"}))
    with pytest.raises(OSError, match="rank 2 of 3 has not come within"):
        worker.shared_note(tmp_path)


def test_the_commands_of_one_launcher_run_what_that_of_rank_0_says(shared, tmp_path, monkeypatch):
    ran: list[tuple[str, str]] = []
    monkeypatch.setattr(
        Launch, "run", lambda self, folder, parallel, job: ran.append((folder.name, job)) or 0
    )
    crews = []
    for rank in range(2):
        as_rank(rank, 2, monkeypatch)
        crews.append(Crew())
    codes: list[int] = []
    config = {"seed": 1}
    other = threading.Thread(target=lambda: codes.append(crews[1].follow(config)))
    other.start()
    crews[0].begin(config)
    first = crews[0].announce(tmp_path / "finetune-1", 40.0)
    again = crews[0].announce(tmp_path / "finetune-1", 40.0)
    crews[0].end(3)
    other.join(20)
    assert codes == [3], "rank 0's exit code is everyone's"
    assert ran == [("finetune-1", first), ("finetune-1", again)]
    assert first != again, "each start meets in the store under a name of its own"
    other = threading.Thread(target=lambda: crews[1].follow({"seed": 2}))
    other.start()
    shared.delete_key("asked/1")
    with pytest.raises(ValueError, match="rank 1 was started with other settings than rank 0"):
        crews[0].begin(config)
    crews[0].end(2)
    other.join(20)

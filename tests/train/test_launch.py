"""Stages under every launcher, with ranks that die, hang, fail or are told to stop.

The jobs run through `Launch.run` with the real worker; faults/sitecustomize.py gives their ranks a
stage that goes wrong in a chosen way.
"""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from tests.train.composing import LAUNCHED, ROOT, STAGES, command, compose
from tests.waiting import comes
from train import versions
from train.compose import build
from train.launch import Launch
from train.plan import plan
from train.processes import lock, slurm, worker
from train.processes.job import Job
from train.processes.lock import Lock

HERE = Path(__file__).parent
SOON = 60  # seconds, in which all must be gone


@pytest.fixture
def out(tmp_path: Path, monkeypatch) -> Path:
    """A stage's folder as the command leaves it, and an environment for its ranks."""
    for name in LAUNCHED:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(HERE / "faults"), str(ROOT)]))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    folder = tmp_path / "stage"
    folder.mkdir()
    note = {"name": "t", "config": {}, "inputs": {}}
    (folder / "stage.json").write_text(json.dumps(note))
    return folder


def start(launch: Launch, out: Path, fault: str, monkeypatch) -> tuple[int, float]:
    """The exit code, and the seconds from the fault's step to the end."""
    monkeypatch.setenv("FAULT", fault)
    code = launch.run(out, parallel=True)
    reached = out / "steps"
    return code, time.time() - (reached.stat().st_mtime if reached.is_file() else time.time())


def two(how: str, hang_seconds: float = 30.0) -> Launch:
    launch = Launch(how=how, ranks=2)  # type: ignore[arg-type]
    launch.hang_seconds = hang_seconds  # less than a user may set
    return launch


def gone(out: Path) -> bool:
    """Whether none of the job's processes is left."""
    pids = [int(file.read_text()) for file in out.glob("pid-*")]
    assert len(pids) == 2
    return not any(
        psutil.pid_exists(p) and psutil.Process(p).status() != psutil.STATUS_ZOMBIE for p in pids
    )


def test_a_hung_rank_ends_all_and_is_named(out: Path, monkeypatch, capfd):
    """In its first step, of which nobody knows how long it takes."""
    begin = time.time()
    code, _ = start(two("torchrun", hang_seconds=3.0), out, "first", monkeypatch)
    said = capfd.readouterr()
    assert code == 4
    assert time.time() - begin < SOON, "the start of the ranks included"
    assert gone(out)
    assert said.err.count("error:") == 1
    assert "error: rank 1 (process " in said.err
    assert "hangs: its step has stood still for" in said.err
    assert "in tests/train/faults/faulty.py, line" in said.err
    assert "(fail)" in said.err
    assert "Traceback" not in said.err
    assert said.out.count("says: 안녕하세요") == 1, "rank 0 prints for all"
    assert not (out / "DONE").exists()


def test_deepspeeds_launcher_runs_a_worker_on_each_of_two_ranks(out: Path, monkeypatch):
    """It gives every process --local_rank=N; results are noted once, by rank 0."""
    assert start(two("deepspeed"), out, "", monkeypatch)[0] == 0
    assert (out / "DONE").is_file()
    assert json.loads((out / "environment.json").read_text())["ranks"] == 2
    places = [json.loads((out / f"place-{rank}.json").read_text()) for rank in range(2)]
    assert [p["LOCAL_RANK"] for p in places] == ["0", "1"]


def test_a_killed_rank_ends_all_and_the_same_command_goes_on(out: Path, monkeypatch, capfd):
    code, seconds = start(two("torchrun"), out, "kill", monkeypatch)
    said = capfd.readouterr().err
    assert code == 4
    assert seconds < SOON
    assert gone(out)
    assert said.count("error:") == 1
    assert "rank 1 (process " in said
    assert "has ended without a word: it was killed" in said
    assert start(Launch(), out, "", monkeypatch)[0] == 0
    assert (out / "DONE").is_file()
    assert not (out / "failed.json").exists()
    assert json.loads((out / "environment.json").read_text())["ranks"] == 1


def tell(out: Path, step: int, number: int = signal.SIGTERM) -> threading.Thread:
    """A signal to this process, as a scheduler sends it to the command, once `step` is reached."""

    def wait() -> None:
        until = time.time() + 120
        while time.time() < until:
            if (out / "steps").is_file() and int((out / "steps").read_text() or 0) >= step:
                os.kill(os.getpid(), number)
                return
            time.sleep(0.1)

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    return thread


def allocate(monkeypatch, nodes: int = 2) -> None:
    """An allocation of SLURM, in which srun starts its tasks on this machine."""
    monkeypatch.setenv("PATH", f"{HERE / 'cluster'}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_JOB_ID", str(os.getpid()))
    monkeypatch.setenv("SLURM_JOB_NUM_NODES", str(nodes))
    monkeypatch.setenv("SLURM_JOB_NODELIST", f"node[1-{nodes}]")
    monkeypatch.setenv("SLURM_PROCID", "0")  # of the batch script, which is no rank
    monkeypatch.setenv("SLURM_NTASKS", "16")


def test_under_slurm_each_rank_is_told_once_to_stop(out: Path, monkeypatch, capfd):
    allocate(monkeypatch)
    launch = Launch(how="slurm", ranks=2, nodes=2)
    launch.check([])
    teller = tell(out, step=3)
    code, seconds = start(launch, out, "until told", monkeypatch)
    teller.join()
    assert code == 143
    assert seconds < SOON
    assert gone(out)
    for rank in range(2):
        assert (out / f"signals-{rank}").read_text().split() == ["15"]
    said = capfd.readouterr().err
    assert said.count("error: stopped; the same command goes on") + said.count("rank 1: stop") == 1


FAULTS = {
    "exit": "rank 1 (process ",
    "raise": "rank 1: there is no row 7 in data.jsonl; 한국어",
    "stop": "has given no sign for",
    "sleep": "hangs: its step has stood still for",
}


@pytest.mark.soak
@pytest.mark.parametrize("how", ["torchrun", "deepspeed"])
@pytest.mark.parametrize("fault", FAULTS)
def test_every_fault_ends_all_with_its_cause_once(how, fault, out: Path, monkeypatch, capfd):
    code, seconds = start(two(how), out, fault, monkeypatch)
    said = capfd.readouterr().err
    assert code == (2 if fault == "raise" else 4)
    assert seconds < SOON
    assert gone(out)
    assert said.count("error:") == 1
    assert FAULTS[fault] in said
    assert start(two(how), out, "", monkeypatch)[0] == 0


@pytest.mark.soak
def test_rank_0_that_hangs_alone_is_found_and_one_that_is_busy_is_left_alone(
    out: Path, monkeypatch, capfd
):
    code, _ = start(two("torchrun", hang_seconds=3.0), out, "packing", monkeypatch)
    assert code == 4
    assert "rank 0 (process " in capfd.readouterr().err
    assert gone(out)
    monkeypatch.setenv("LONG", "15")
    assert start(two("deepspeed", hang_seconds=3.0), out, "long", monkeypatch)[0] == 0


@pytest.mark.soak
@pytest.mark.parametrize("how", ["torchrun", "deepspeed"])
def test_every_launcher_tells_each_rank_once(how: str, out: Path, monkeypatch, capfd):
    teller = tell(out, step=3)
    assert start(two(how), out, "until told", monkeypatch)[0] == 143
    teller.join()
    assert gone(out)
    for rank in range(2):
        assert (out / f"signals-{rank}").read_text().split()[:1] == ["15"]
    said = capfd.readouterr().err
    assert said.count("stopped; the same command goes on") == 1


@pytest.mark.soak
def test_deepspeed_over_ssh_runs_two_nodes(out: Path, monkeypatch, tmp_path: Path):
    """ssh and pdsh that stay on this machine."""
    monkeypatch.setenv("PATH", f"{HERE / 'cluster'}{os.pathsep}{os.environ['PATH']}")
    file = tmp_path / "hostfile"
    file.write_text("# two of them\nnode1 slots=1\nnode2 slots=4\n")
    far = Launch(how="deepspeed", ranks=2, nodes=2, hostfile=str(file))
    assert start(far, out, "", monkeypatch)[0] == 0
    places = [json.loads((out / f"place-{rank}.json").read_text()) for rank in range(2)]
    assert [p["LOCAL_RANK"] for p in places] == ["0", "0"]


# ---- without processes of torch


def child(code: str, *words: str) -> list[str]:
    """A process that looks like a rank of the job `t` to those who look at command lines."""
    return [sys.executable, "-c", code, "-m", "train.processes.worker", *words, "--job=t"]


def job(command: list[str], folder: Path, **how: int) -> Job:
    return Job(command, dict(os.environ), folder, "t", **how)


def test_what_a_launcher_leaves_behind_is_ended(tmp_path: Path, capfd):
    """One that dies itself, as deepspeed's does of SIGTERM."""
    rank = child("import time; time.sleep(600)")
    code = (
        "import subprocess, sys, time\n"
        f"p = subprocess.Popen({rank!r}, start_new_session=True)\n"
        f"open({str(tmp_path / 'pid')!r}, 'w').write(str(p.pid))\n"
        "time.sleep(3); sys.exit(9)"
    )
    assert job([sys.executable, "-c", code], tmp_path, expected=1).run() == 9
    pid = int((tmp_path / "pid").read_text())
    with contextlib.suppress(psutil.NoSuchProcess):
        left = psutil.Process(pid)
        assert comes(lambda: left.status() == psutil.STATUS_ZOMBIE)
    assert "have ended without a word (code 9)" in capfd.readouterr().err


STUBBORN = """
import signal, sys, time
def note(n, _):
    with open(sys.argv[1], "a") as f: f.write(f"{n}\\n")
signal.signal(signal.SIGTERM, note); signal.signal(signal.SIGINT, note)
open(sys.argv[1], "w").close()
while True: time.sleep(0.1)
"""


def test_a_second_signal_ends_at_once_what_hears_none(tmp_path: Path):
    heard = tmp_path / "heard"
    command = [sys.executable, "-c", STUBBORN.replace("\\\\", "\\"), str(heard)]

    def twice() -> None:
        for line in (0, 1):
            until = time.time() + 20
            while time.time() < until:
                if heard.is_file() and len(heard.read_text().split()) == line:
                    break
                time.sleep(0.05)
            os.kill(os.getpid(), signal.SIGTERM)

    thread, known = threading.Thread(target=twice), signal.getsignal(signal.SIGTERM)
    thread.start()
    begin = time.monotonic()
    assert job(command, tmp_path).run() == 143
    thread.join()
    assert time.monotonic() - begin < 15
    assert heard.read_text().split() == ["15"], "the second is not passed on: it kills"
    assert signal.getsignal(signal.SIGTERM) == known


def test_the_code_of_the_first_failure_counts_and_an_old_note_does_not(tmp_path: Path):
    note = tmp_path / "failed.json"
    for name, code in (("t", 3), ("an earlier start", 1)):
        note.write_text(json.dumps({"code": 3, "error": "x", "job": name}))
        assert job([sys.executable, "-c", "raise SystemExit(1)"], tmp_path).run() == code


def test_a_stop_that_comes_when_the_stage_is_done_begins_no_other(tmp_path: Path):
    one = job([sys.executable, "-c", ""], tmp_path)
    one.heard.append(signal.SIGTERM)
    assert one.run() == 143


def test_a_launcher_that_cannot_start_leaves_no_handler(tmp_path: Path):
    known = signal.getsignal(signal.SIGTERM)
    with pytest.raises(OSError, match="no-such-launcher"):
        job(["no-such-launcher"], tmp_path).run()
    assert signal.getsignal(signal.SIGTERM) == known


def test_a_rank_that_the_system_holds_does_not_hold_the_command(tmp_path: Path, monkeypatch):
    """No signal ends a process amid a call that storage does not answer."""
    monkeypatch.setattr("train.processes.job.LEAVE", 0.5)
    monkeypatch.setattr("train.processes.job.ROOT", tmp_path)
    monkeypatch.setattr(Job, "_end", lambda self, launcher: None)
    note = json.dumps({"code": 4, "error": "x", "job": "t"})
    code = f"import time; open('failed.json', 'w').write({note!r}); time.sleep(20)"
    begin = time.monotonic()
    assert job([sys.executable, "-c", code], tmp_path).run() == 4
    assert time.monotonic() - begin < 15


def test_a_rank_that_does_not_end_by_itself_is_ended(tmp_path: Path, monkeypatch):
    monkeypatch.setattr("train.processes.job.LEAVE", 0.5)
    note = json.dumps({"code": 4, "error": "x", "job": "t"})
    code = f"import time; open('failed.json', 'w').write({note!r}); time.sleep(600)"
    monkeypatch.setattr("train.processes.job.ROOT", tmp_path)
    assert job([sys.executable, "-c", code], tmp_path).run() == 4


WRONG = {
    "how": ({"how": "slrum"}, "launch.how is 'slrum'; it must be inline, deepspeed, torchrun or"),
    "inline": ({"ranks": 2}, "launch.ranks is 2 and launch.nodes 1 with how=inline"),
    "ranks": ({"how": "slurm", "ranks": 0}, "launch.ranks is 0"),
    "uneven": ({"how": "slurm", "ranks": 3, "nodes": 2}, "launch.ranks is 3 in all on launch.nod"),
    "no hosts": ({"how": "deepspeed", "ranks": 2, "nodes": 2}, "set launch.hostfile to a file"),
    "not there": ({"how": "deepspeed", "hostfile": "/no/file"}, "launch.hostfile /no/file is not"),
    "not read": ({"how": "slurm", "hostfile": "x"}, "launch.hostfile is for launch=deepspeed"),
    "hasty": ({"hang_seconds": 1}, "launch.hang_seconds is 1; it must be at least 10"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_launch_that_cannot_be_is_refused(name: str):
    given, said = WRONG[name]
    with pytest.raises(ValueError, match=said.replace("(", r"\(")):
        Launch(**given)


HOSTFILES = {
    "node1 slots=2\n\n# off\nnode2  slots=4  # fast\n": "",
    "node1 slots=2\nnode2 slots=1\n": "has 1 hosts with 2 slots or more",
    "node1 slots=2\nnode2\n": "line 2 is 'node2'; it must be NAME slots=N",
    "node1 slots=2\nnode1 slots=2\n": "line 2 is 'node1 slots=2'; it must be NAME slots=N, each",
}


@pytest.mark.parametrize("text", HOSTFILES)
def test_a_hostfile_is_read_before_anything_starts(text: str, tmp_path: Path):
    (tmp_path / "hosts").write_text(text)
    given = {"how": "deepspeed", "ranks": 4, "nodes": 2, "hostfile": str(tmp_path / "hosts")}
    if HOSTFILES[text]:
        with pytest.raises(ValueError, match=HOSTFILES[text]):
            Launch(**given)
        return
    made = Launch(**given)
    words = made._command(["train.processes.worker", "x"])
    assert words[words.index("--hostfile") + 1] == str(tmp_path / "hosts")
    assert words[words.index("--num_nodes") + 1] == words[words.index("--num_accelerators") + 1]
    assert made._store() == ("node1", made.port)


def test_torchrun_on_several_nodes_says_what_to_type_on_each(monkeypatch):
    many = Launch(how="torchrun", ranks=16, nodes=2)
    with pytest.raises(ValueError, match="Start this on each of the 2 nodes") as told:
        many.check(["recipe=quickstart", "launch=torchrun", "launch.ranks=16", "seed=3"])
    line = str(told.value).splitlines()[1]
    assert line.startswith("torchrun --nnodes=2 --nproc_per_node=8 --rdzv_backend=c10d")
    assert line.endswith(":29400 -m train recipe=quickstart seed=3")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "16")
    with pytest.raises(ValueError, match="leave launch out, the stages run on these"):
        many.check([])
    Launch().check([])
    assert Launch().world == 16


def test_slurm_wants_an_allocation_that_is_large_enough(monkeypatch):
    many = Launch(how="slurm", ranks=8, nodes=4)
    for name in ("SLURM_JOB_ID", "SLURM_JOB_NUM_NODES"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(ValueError, match="needs srun, which is not on PATH"):
        many.check([])
    monkeypatch.setenv("PATH", str(HERE / "cluster"))
    with pytest.raises(ValueError, match="behind salloc --nodes=4 --ntasks-per-node=2"):
        many.check([])
    allocate(monkeypatch, nodes=2)
    with pytest.raises(ValueError, match=r"launch\.nodes is 4, and this allocation has 2"):
        many.check([])
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "6")
    words = Launch(how="slurm", ranks=8, nodes=2)._command(["train.processes.worker", "x"])
    assert {"srun", "--nodes=2", "--ntasks=8", "--ntasks-per-node=4"} < set(words)
    assert "--cpus-per-task=6" in words
    assert words[-1] == "--slurm"


def test_a_task_of_slurm_knows_its_place(monkeypatch):
    allocate(monkeypatch)
    for name in ("SLURM_LOCALID", "SLURM_STEP_NODELIST", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ValueError, match="SLURM_LOCALID"):
        slurm.place()
    monkeypatch.setenv("SLURM_PROCID", "5")
    monkeypatch.setenv("SLURM_LOCALID", "1")
    there = slurm.place()
    assert there["RANK"] == "5"
    assert there["WORLD_SIZE"] == "16"
    assert there["LOCAL_RANK"] == "1"
    assert there["MASTER_ADDR"] == "127.0.0.1", "what scontrol says"
    monkeypatch.setenv("SLURM_STEP_ID", "1")
    assert slurm.place()["MASTER_PORT"] != there["MASTER_PORT"]
    monkeypatch.setenv("SLURM_GPUS_PER_TASK", "1")
    assert slurm.place()["LOCAL_RANK"] == "0"


@pytest.mark.parametrize(
    "word", [["--local_rank", "3"], ["--local_rank=3"], ["--local-rank=3"], []]
)
def test_a_worker_tolerates_what_launchers_add(word: list[str]):
    assert worker._parse([*word, "outputs/x"]).folder == Path("outputs/x")
    assert worker._parse(["outputs/x", *word]).folder == Path("outputs/x")


def test_versions_are_told_and_untested_ones_warned_of(monkeypatch, tmp_path: Path):
    (line,) = versions.shown()
    assert "torch 2." in line
    assert "transformers 5." in line
    file = (ROOT / "constraints.txt").read_text()
    (tmp_path / "constraints.txt").write_text(file.replace("torch==", "torch==9"))
    monkeypatch.setattr(versions, "ROOT", tmp_path)
    assert set(versions.untested()) == {"torch"}
    assert "tested with 92." in versions.shown()[1]
    assert set(worker.environment()["untested"]) == {"torch"}


# ---- one job at a time


def owner(folder: Path, code: str = "time.sleep(600)") -> "subprocess.Popen[str]":
    """A process that holds the lock of a folder."""
    begin = (
        "import sys, time\nfrom pathlib import Path\nfrom train.processes.lock import Lock\n"
        f"lock = Lock(Path({str(folder)!r})); print(lock.take(), flush=True)\n{code}"
    )
    words = [sys.executable, "-c", begin]
    process = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    process.stdout.readline()
    return process


def test_a_second_job_is_told_who_the_first_is_and_goes_on_when_that_is_dead(tmp_path: Path):
    process = owner(tmp_path)
    with pytest.raises(ValueError, match=f"process {process.pid} on {socket.gethostname()} "):
        Lock(tmp_path).take()
    process.kill()
    process.wait()
    mine = Lock(tmp_path)
    assert mine.take().startswith(f"process {process.pid} on {socket.gethostname()} (since ")
    mine.free()
    again = Lock(tmp_path)
    assert again.take() == "", "given back, not left behind"
    again.free()


def test_a_child_of_a_dead_owner_does_not_hold_the_lock(tmp_path: Path):
    """As a data loader's worker that outlives its rank."""
    fork = "import os\nif os.fork() == 0: time.sleep(20)\nelse: os._exit(9)"
    process = owner(tmp_path, fork)
    process.wait()
    mine = Lock(tmp_path)
    assert "has left this stage unfinished" in mine.take()
    mine.free()


@pytest.mark.parametrize("alive", [True, False])
def test_an_owner_on_another_machine_is_believed_while_it_gives_signs(alive, tmp_path, monkeypatch):
    """Where the file system's locks do not reach from one machine to the other."""
    monkeypatch.setattr(lock, "BEAT", 0.2)
    monkeypatch.setattr(lock, "AGES", 20.0 if alive else 1.0)
    note = {"host": "node9", "pid": 7, "born": 0.0, "since": "x", "count": 1}
    file = tmp_path / ".lock"
    file.write_text(json.dumps(note).ljust(256))
    beat = threading.Timer(0.5, lambda: file.write_text(json.dumps(note | {"count": 2}).ljust(256)))
    mine = Lock(tmp_path)
    if alive:
        beat.start()
        with pytest.raises(ValueError, match="process 7 on node9"):
            mine.take()
        return
    assert "process 7 on node9 (since x) has left" in mine.take()
    assert comes(lambda: json.loads(file.read_text())["count"] > 1), "it gives signs itself"
    mine.free()


# ---- the whole command


def tiny(folder: Path) -> list[str]:
    """The words of a command with one stage: a target of Korean questions, in three steps."""
    words = ("집에", "왜", "오늘", "빨리", "물이", "좋다", "가자", "日本語")
    rows = [{"q": f"{a} {b} {c}?", "a": f"{c}. {a}"} for a in words for b in words for c in words]
    file = folder / "chat.jsonl"
    file.write_text("\n".join(json.dumps(r, ensure_ascii=False) for r in rows), encoding="utf-8")
    source = f"_target_: data.sources.Local, files: ['{file}'], prompt: '{{q}}', answer: '{{a}}'"
    small = {"layers": 1, "width": 64, "vocab_size": 300, "max_positions": 64}
    small |= {"schedule.tokens": 768, "schedule.batch_tokens": 256}
    small |= {"schedule.sequence_length": 64, "schedule.micro_batch": 2}
    return [
        "recipe=quickstart",
        f"output_dir={folder / 'out'}",
        "~stages.target.data",
        f"+stages.target.data={{{source}}}",
        *(f"stages.target.{key}={value}" for key, value in small.items()),
        *(f"stages.{stage}=null" for stage in STAGES[1:]),
    ]


def artifact(folder: Path) -> dict[str, bytes]:
    """Name -> contents; whether the Hub was reachable, which the tokenizer notes, is left out."""
    found = {f.name: f.read_bytes() for f in sorted((folder / "artifact").iterdir())}
    offline = b'"local_files_only": true'
    return {name: raw.replace(offline, offline[:-4] + b"false") for name, raw in found.items()}


def test_in_the_c_locale_the_command_writes_the_same_bytes(tmp_path: Path, monkeypatch):
    """Korean text, and no UTF-8 but what the program itself insists on."""
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    words = tiny(tmp_path)
    (stage,) = plan(compose(*words), tmp_path / "out")
    reference = tmp_path / "reference"
    reference.mkdir()
    build(stage.config).run(reference)
    plain = {"LC_ALL": "C", "LANG": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = command(*words, cwd=tmp_path, **plain)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.splitlines()[0].startswith("Python 3."), "the versions come first"
    assert artifact(stage.folder) == artifact(reference)


@pytest.mark.soak
def test_the_command_itself_can_run_under_a_launcher(tmp_path: Path):
    """`torchrun -m train ...`: rank 0's plans and makes folders, the other's lends a process."""
    env = {k: v for k, v in os.environ.items() if k not in LAUNCHED}
    env |= {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "HF_HUB_OFFLINE": "1"}
    head = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run(
        [*head, "-m", "train", *tiny(tmp_path)], cwd=ROOT, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("[1/1] target: ") == 1
    (folder,) = (tmp_path / "out" / "stages").iterdir()
    assert (folder / "DONE").is_file()
    assert json.loads((folder / "environment.json").read_text())["ranks"] == 2
    again = subprocess.run(
        [*head, "-m", "train", *tiny(tmp_path), "launch=torchrun"],
        cwd=ROOT, env=env, capture_output=True, text=True,
    )  # fmt: skip
    assert "leave launch out, the stages run on these" in again.stderr
    assert again.stderr.count("error:") == 1

"""How a stage's processes are started: one or several, on one machine or several."""

import os
import re
import socket
import sys
import time
from pathlib import Path
from typing import Literal

from decoding.ranks import ranks
from train.processes import slurm
from train.processes.job import Job
from train.processes.watch import HANG_SECONDS

HOST = re.compile(r"(\S+)\s+slots=(\d+)\s*(?:#.*)?")  # a line of DeepSpeed's hostfile


class Launch:
    """conf/launch/: how a stage's processes are started.

    how: inline (one process), or `ranks` processes in all, the same number on each of `nodes`
    machines, started by deepspeed (several nodes: those of `hostfile`, over ssh), torchrun
    (several nodes: each starts the command itself) or slurm (srun, inside an allocation).
    hang_seconds: after how long a piece of work that stands still ends the job.

    Where this process is itself one of several that torchrun, deepspeed or srun has started, its
    stages run on these.
    """

    def __init__(
        self,
        *,
        how: Literal["inline", "deepspeed", "torchrun", "slurm"] = "inline",
        ranks: int = 1,
        nodes: int = 1,
        hostfile: str | None = None,
        hang_seconds: float = HANG_SECONDS,
    ) -> None:
        if how not in ("inline", "deepspeed", "torchrun", "slurm"):
            raise ValueError(
                f"launch.how is {how!r}; it must be inline, deepspeed, torchrun or slurm"
            )
        if ranks < 1 or (how == "inline" and (ranks, nodes) != (1, 1)):
            raise ValueError(
                f"launch.ranks is {ranks} and launch.nodes {nodes} with how={how}; inline runs on "
                "one rank: set launch=torchrun, deepspeed or slurm for several"
            )
        if nodes < 1 or ranks % nodes:
            raise ValueError(
                f"launch.ranks is {ranks} in all on launch.nodes={nodes}; each node has the same "
                "number of them"
            )
        if hang_seconds < 10:
            raise ValueError(f"launch.hang_seconds is {hang_seconds}; it must be at least 10")
        self.how, self.ranks, self.nodes = how, ranks, nodes
        self.hostfile, self.hang_seconds = hostfile, hang_seconds
        self.port = 0  # of deepspeed's store, free when a stage starts
        self._check_hostfile()

    def _check_hostfile(self) -> None:
        if self.hostfile is None:
            if self.how == "deepspeed" and self.nodes > 1:
                raise ValueError(
                    f"launch.nodes is {self.nodes} and deepspeed does not know them: set "
                    'launch.hostfile to a file with a line "NAME slots=N" for each'
                )
            return
        if self.how != "deepspeed":
            raise ValueError(
                f"launch.hostfile is for launch=deepspeed; {self.how} does not read it: leave it "
                "out"
            )
        each = self.ranks // self.nodes
        fit = [name for name, slots in hosts(Path(self.hostfile)).items() if slots >= each]
        if len(fit) < self.nodes:
            raise ValueError(
                f"launch.hostfile {self.hostfile} has {len(fit)} hosts with {each} slots or more, "
                f"and launch.ranks={self.ranks} on launch.nodes={self.nodes} needs {self.nodes}"
            )

    @property
    def world(self) -> int:
        """Ranks that a stage runs on: those that are there already, else `ranks`."""
        return ranks()[1] if ranks()[1] > 1 else self.ranks

    def check(self, words: list[str]) -> None:
        """Raises ValueError where this machine cannot start it now. words: what the user typed
        behind `python -m train`, for a command that can."""
        if ranks()[1] > 1:
            if self.how != "inline":
                raise ValueError(
                    f"launch={self.how} inside {ranks()[1]} processes that a launcher has started "
                    "would start each again: leave launch out, the stages run on these"
                )
        elif self.how == "slurm":
            slurm.require_allocation(self.nodes, self.ranks)
        elif self.how == "torchrun" and self.nodes > 1:
            own = " ".join(word for word in words if not re.match(r"launch\b", word))
            raise ValueError(
                "torchrun starts the processes of its own machine only. Start this on each of the "
                f"{self.nodes} nodes, which share this folder:\n"
                f"torchrun --nnodes={self.nodes} --nproc_per_node={self.ranks // self.nodes} "
                f"--rdzv_backend=c10d --rdzv_endpoint={socket.gethostname()}:29400 "
                f"-m train {own}"
            )

    def run(self, folder: Path, parallel: bool, job: str | None = None) -> int:
        """Runs the stage in `folder` to its end and returns its exit code.

        parallel: the stage can use several ranks; others run on one. job: a name for this start,
        which all that take part share.
        """
        job = job or f"{socket.gethostname()}-{os.getpid()}-{time.time_ns()}"
        worker = ["train.processes.worker", str(folder), f"--job={job}"]
        worker.append(f"--hang-seconds={self.hang_seconds:g}")
        alone = not parallel or self.how == "inline"
        self.port = _free_port()
        command = [sys.executable, "-m", *worker] if alone else self._command(worker)
        return Job(
            command,
            self._environment(parallel),
            folder,
            job,
            expected=0 if alone else self.ranks // self.nodes,
            passes_signals=self.how == "slurm" and not alone,
            store=None if alone else self._store(),
        ).run()

    def _environment(self, parallel: bool) -> dict[str, str]:
        environment = os.environ | {"TOKENIZERS_PARALLELISM": "true", "PYTHONUNBUFFERED": "1"}
        environment["PYTHONUTF8"] = "1"  # whatever the locale: files and logs are UTF-8
        # a log file wants a line now and then, not a bar that redraws itself
        environment.setdefault("TQDM_MININTERVAL", "0.5" if sys.stderr.isatty() else "20")
        environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
        if not parallel:
            for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
                environment.pop(name, None)
        if ranks()[1] > 1:  # rank 0's command hosts the store that its workers meet in
            environment["TORCHELASTIC_USE_AGENT_STORE"] = "True"
        each = self.world // self.nodes
        if parallel and each > 1:  # threads of several ranks on the same cores wait in turn
            mine = max(1, len(os.sched_getaffinity(0)) // each)
            environment.setdefault("OMP_NUM_THREADS", str(mine))
        return environment

    def _command(self, worker: list[str]) -> list[str]:
        each = str(self.ranks // self.nodes)
        if self.how == "deepspeed":
            head = [str(Path(sys.executable).parent / "deepspeed"), "--num_accelerators", each]
            head += ["--num_nodes", str(self.nodes), "--master_port", str(self.port), "--quiet"]
            head += ["--hostfile", self.hostfile] if self.hostfile else []
            return [*head, "--module", *worker]
        if self.how == "slurm":
            head = slurm.step(self.nodes, self.ranks)
            return [*head, sys.executable, "-m", *worker, "--slurm"]
        head = [sys.executable, "-m", "train.processes.agent", "--standalone"]
        return [*head, "--nproc_per_node", each, "-m", *worker]

    def _store(self) -> tuple[str, int] | None:
        """Of a job over ssh, which has processes that no signal from here reaches."""
        if self.hostfile is None:
            return None
        return next(iter(hosts(Path(self.hostfile)))), self.port


def hosts(file: Path) -> dict[str, int]:
    """Slots by host, of a hostfile. Raises ValueError where it is missing or malformed."""
    if not file.is_file():
        raise ValueError(f"launch.hostfile {file} is not there")
    found: dict[str, int] = {}
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        text = line.strip()
        if not text or text.startswith("#"):
            continue
        read = HOST.fullmatch(text)
        if read is None or read[1] in found:
            raise ValueError(
                f"launch.hostfile {file}, line {number} is {text!r}; it must be NAME slots=N, "
                "each name once"
            )
        found[read[1]] = int(read[2])
    return found


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])

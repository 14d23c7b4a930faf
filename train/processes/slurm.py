"""A rank's place in a SLURM job step, and the command that starts a step."""

import os
import shutil
import subprocess

FIRST_PORT, PORTS = 15_000, 20_000


def place() -> dict[str, str]:
    """RANK, WORLD_SIZE and the rest, from the variables that srun sets for each task. Raises
    ValueError outside of a step."""
    try:
        rank, world = os.environ["SLURM_PROCID"], os.environ["SLURM_NTASKS"]
        local, job = os.environ["SLURM_LOCALID"], os.environ["SLURM_JOB_ID"]
    except KeyError as missing:
        raise ValueError(
            f"--slurm reads {missing}, which srun sets for each task and which is not there: start "
            "it with srun"
        ) from None
    step = int(os.environ.get("SLURM_STEP_ID", "0"))
    port = FIRST_PORT + (int(job) * 31 + step) % PORTS
    if "SLURM_GPUS_PER_TASK" in os.environ:  # each task sees its own GPU only
        local = "0"
    return {
        "RANK": rank,
        "WORLD_SIZE": world,
        "LOCAL_RANK": local,
        "MASTER_ADDR": os.environ.get("MASTER_ADDR") or first_node(),
        "MASTER_PORT": os.environ.get("MASTER_PORT") or str(port),
    }


def first_node() -> str:
    """The name of the node on which rank 0 is."""
    nodes = os.environ.get("SLURM_STEP_NODELIST") or os.environ.get("SLURM_JOB_NODELIST", "")
    if not nodes or os.environ.get("SLURM_STEP_NUM_NODES") == "1":
        return "127.0.0.1"
    if "[" not in nodes:
        return nodes.split(",")[0]
    listed = subprocess.run(
        ["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, check=True
    )
    return listed.stdout.split()[0]


def require_allocation(nodes: int, ranks: int) -> None:
    """Raises ValueError outside of an allocation, or in one that has fewer nodes."""
    if not shutil.which("srun"):
        raise ValueError("launch=slurm needs srun, which is not on PATH: is this a SLURM machine?")
    ask = f"salloc --nodes={nodes} --ntasks-per-node={ranks // nodes}"
    if "SLURM_JOB_ID" not in os.environ:
        raise ValueError(
            "launch=slurm starts its ranks with srun inside an allocation, and this is none: put "
            f"the same command behind {ask} (and what else your site asks for), or into a script "
            "for sbatch"
        )
    there = int(os.environ.get("SLURM_JOB_NUM_NODES", "1"))
    if there < nodes:
        raise ValueError(
            f"launch.nodes is {nodes}, and this allocation has {there}: set launch.nodes={there} "
            f"with launch.ranks to match, or ask for more with {ask}"
        )


def step(nodes: int, ranks: int) -> list[str]:
    """srun for one stage: it passes signals on, and ends all tasks when one has failed."""
    head = ["srun", f"--nodes={nodes}", f"--ntasks={ranks}", f"--ntasks-per-node={ranks // nodes}"]
    head += ["--kill-on-bad-exit=1", "--unbuffered"]
    cores = os.environ.get("SLURM_CPUS_PER_TASK")  # srun no longer takes it from the allocation
    return [*head, f"--cpus-per-task={cores}"] if cores else head

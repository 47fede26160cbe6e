"""What launchers tell a rank by its environment: the one file that reads it, before torch is imported.

torchrun's variables are the form that everything else reads. :func:`adopt_launcher` makes them of those of
srun, of Open MPI's and MPICH's mpirun, and of DeepSpeed's launcher, which lacks one.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping

from moetrain.errors import STOPPED, UserError

_FIRST_PORT, _PORTS = 15_000, 15_000  # below those that the system gives to clients
_MPI = (
    (
        "OMPI_COMM_WORLD_RANK",
        "OMPI_COMM_WORLD_SIZE",
        "OMPI_COMM_WORLD_LOCAL_RANK",
        "OMPI_COMM_WORLD_LOCAL_SIZE",
    ),
    ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
)
_RANKS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
_TORCHRUN_GRACE_SECONDS = 3.0


def adopt_launcher() -> None:
    """Set torchrun's variables where another launcher has started this process as one of several ranks.

    What is set already stays. Of srun only a step of several tasks counts: a batch script is no rank.
    """
    env = os.environ
    if "RANK" in env:
        if env.get("LOCAL_SIZE", "").isdecimal():  # DeepSpeed's launcher
            env.setdefault("LOCAL_WORLD_SIZE", env["LOCAL_SIZE"])
        return
    for found in (_srun(env), *(_mpi(env, names) for names in _MPI)):
        if found.get("WORLD_SIZE", "1") != "1":
            for name, value in found.items():
                env.setdefault(name, value)
            return


def _srun(env: Mapping[str, str]) -> dict[str, str]:
    if "SLURM_STEP_ID" not in env or "SLURM_PROCID" not in env:
        return {}
    found = {
        "RANK": env["SLURM_PROCID"],
        "WORLD_SIZE": env.get("SLURM_STEP_NUM_TASKS", "1"),
        "LOCAL_RANK": env.get("SLURM_LOCALID", "0"),
        "LOCAL_WORLD_SIZE": tasks_of_node(
            env.get("SLURM_STEP_TASKS_PER_NODE", "1"), env.get("SLURM_NODEID", "0")
        ),
        "MASTER_ADDR": first_node(env.get("SLURM_STEP_NODELIST", "localhost")),
        "MASTER_PORT": str(port_of_job(env.get("SLURM_JOB_ID", "0"))),
    }
    if env.get("SLURM_CPUS_PER_TASK", "").isdecimal():  # the cores are this rank's alone, not its node's
        found["OMP_NUM_THREADS"] = env["SLURM_CPUS_PER_TASK"]
    return found


def _mpi(env: Mapping[str, str], names: tuple[str, ...]) -> dict[str, str]:
    return {ours: env[theirs] for ours, theirs in zip(_RANKS, names, strict=True) if theirs in env}


def first_node(nodes: str) -> str:
    """The first of Slurm's list of nodes: ``rack[1-2]n[04-07,09],login`` begins with ``rack1n04``."""
    end, depth = len(nodes), 0
    for place, letter in enumerate(nodes):
        depth += (letter == "[") - (letter == "]")
        if letter == "," and depth == 0:
            end = place
            break
    return re.sub(r"\[([^],-]*)[^]]*\]", r"\1", nodes[:end])


def tasks_of_node(counts: str, node: str) -> str:
    """Entry ``node`` of Slurm's ``4(x3),2``: the tasks of nodes 0 to 3 are 4, 4, 4 and 2."""
    found: list[str] = []
    for tasks, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", counts):
        found += [tasks] * int(times or 1)
    return found[int(node)] if node.isdecimal() and int(node) < len(found) else "1"


def port_of_job(job: str) -> int:
    """A port for a job's first rank, another one for each of 15,000 jobs in a row."""
    return _FIRST_PORT + (int(job) if job.isdecimal() else 0) % _PORTS


def grace_seconds() -> float:
    """How long further signals count as the first one.

    torchrun passes on the signal that the terminal has already sent to every process. Slurm sends one when
    the time is nearly over, others at its end and for a job that is cancelled, and SIGKILL after those.
    """
    if "SLURM_STEP_ID" in os.environ:
        return math.inf
    return _TORCHRUN_GRACE_SECONDS if "TORCHELASTIC_RUN_ID" in os.environ else 0.0


def world_size() -> int:
    """How many ranks were started; 1 without torchrun."""
    text = os.environ.get("WORLD_SIZE", "1")
    if not re.fullmatch("0*[1-9][0-9]{0,8}", text):
        raise UserError(
            f"the environment's WORLD_SIZE={text} must be a number from 1 up, as launchers set it"
        )
    return int(text)


def local_ranks() -> int:
    """How many ranks were started on this machine; 1 without torchrun, or where the variable is not set."""
    text = os.environ.get("LOCAL_WORLD_SIZE", "1")
    return max(1, int(text)) if text.isdecimal() else 1


def is_rank_0() -> bool:
    """Whether this process is rank 0, which prints for all ranks; true without torchrun."""
    return os.environ.get("RANK", "0") == "0"


def stopped() -> int:
    """The exit code of a run that was asked to stop and has saved.

    0 where torchrun has restarts left: any other code is a failure to it, and it would begin the run again.
    """
    most, done = (os.environ.get(f"TORCHELASTIC_{name}", "0") for name in ("MAX_RESTARTS", "RESTART_COUNT"))
    again = most.isdecimal() and done.isdecimal() and int(most) > int(done)
    return 0 if again else STOPPED

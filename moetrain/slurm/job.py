"""``python -m moetrain.slurm.job``: the one process of the batch script, which has no torch in it.

Plan, preflight, train, and then what the exit code asks for. A run that was warned before its time is over
has saved, and goes back into the queue under the same job id, and so under the same run folder. Slurm itself
requeues what it preempts.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from moetrain.errors import STOPPED, UserError
from moetrain.parallel.environment import port_of_job
from moetrain.slurm.blame import blamed
from moetrain.writing import keep_others_out

EXCLUDED = "excluded_nodes"  # the file beside the run folders that submit reads
RUN = "MOETRAIN_RUN"  # the words before -m of each step
SRUN = "MOETRAIN_SRUN"  # more options of srun
RESUBMIT = "MOETRAIN_SBATCH"  # the command that submitted this job, as JSON
_WARNING = signal.SIGUSR1  # of --signal in the scripts; SIGTERM is Slurm's own: cancelled, or preempted
_MISTAKES = (2, 3, 130)  # which the same command makes again: input, a folder in use, Ctrl-C
_PREFLIGHT_SECONDS = 600
_PATIENCE_SECONDS = 1200
_REQUEUE_SECONDS = 120  # until Slurm ends this process
_PORT_STRIDE, _LAST_PORT = 997, 65_536


@dataclass
class Job:
    """This job, as Slurm describes it. ``ranks_per_node``: tasks, else GPUs of a node, else 1."""

    id: str
    nodes: int
    ranks_per_node: int
    restarts: int
    max_requeues: int
    warned: signal.Signals | None = None
    running: subprocess.Popen[str] | None = field(default=None, repr=False)

    def watch_signals(self) -> None:
        for number in (_WARNING, signal.SIGTERM):
            signal.signal(number, self._warn)

    def _warn(self, number: int, frame: FrameType | None) -> None:
        self.warned = self.warned or signal.Signals(number)
        if self.running is not None:  # srun passes SIGUSR1 on to every task, and takes SIGTERM for itself
            self.running.send_signal(_WARNING)

    def srun(self, *arguments: str, capture: bool = False, limit: float | None = None) -> tuple[int, str]:
        """Exit code and, captured, standard output of a step. A step that takes too long is ended."""
        command = ["srun", *shlex.split(os.environ.get(SRUN, "")), *arguments]
        with subprocess.Popen(command, stdout=subprocess.PIPE if capture else None, text=True) as process:
            self.running = None if capture else process
            if self.warned and self.running:
                process.send_signal(_WARNING)
            try:
                output, _ = process.communicate(timeout=limit)
            except subprocess.TimeoutExpired:
                process.kill()
                output, _ = process.communicate()
            finally:
                self.running = None
        code = process.returncode
        return (128 - code if code < 0 else code), output or ""


def main(argv: Sequence[str] | None = None) -> int:
    """The job's exit code: that of training, or 1 where no good nodes are left."""
    parser = argparse.ArgumentParser(
        prog="sbatch [Slurm's options] launch/slurm/train.sbatch", allow_abbrev=False
    )
    parser.add_argument("--max-requeues", type=int, default=50, help="default %(default)s")
    parser.add_argument(
        "--spare-nodes", type=int, default=0, help="of the job's nodes, as replacements for bad ones"
    )
    parser.add_argument("--no-preflight", action="store_true", help="take the nodes as they are")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="those of moetrain train")
    options = parser.parse_args(argv)
    keep_others_out()
    arguments = options.arguments[1:] if options.arguments[:1] == ["--"] else options.arguments
    try:
        job = this_job(options.max_requeues, options.spare_nodes)
        job.watch_signals()
        return run(job, arguments, options.spare_nodes, not options.no_preflight)
    except UserError as error:
        _say(f"error: {error}")
        return error.exit_code


def this_job(max_requeues: int, spare: int) -> Job:
    """Raises UserError outside a job, and where all nodes would be spare ones."""
    env = os.environ
    if "SLURM_JOB_ID" not in env:
        raise UserError(
            "there is no SLURM_JOB_ID: this runs in a job; submit it by sbatch or launch/slurm/submit"
        )
    allocated = int(env.get("SLURM_JOB_NUM_NODES", "1"))
    if not 0 <= spare < allocated:
        raise UserError(f"--spare-nodes {spare} of the job's {allocated} node(s): at least one must train")
    per_node = env.get("SLURM_NTASKS_PER_NODE") or env.get("SLURM_GPUS_ON_NODE") or "1"
    if not per_node.isdecimal() or not int(per_node):
        raise UserError(f"{per_node!r} tasks a node: give sbatch --ntasks-per-node=N, one a GPU")
    restarts = int(env.get("SLURM_RESTART_COUNT", "0"))
    return Job(env["SLURM_JOB_ID"], allocated - spare, int(per_node), restarts, max_requeues)


def run(job: Job, arguments: Sequence[str], spare: int, preflight: bool) -> int:
    """Plan, look at the nodes, train, and decide what comes after."""
    if "SLURM_CPUS_PER_TASK" in os.environ:  # which srun no longer takes over by itself
        os.environ.setdefault("SRUN_CPUS_PER_TASK", os.environ["SLURM_CPUS_PER_TASK"])
    os.environ.setdefault("MASTER_ADDR", socket.gethostname())
    os.environ["MASTER_PORT"] = str(free_port(port_of_job(job.id)))
    made = _plan(job, arguments)
    folder = Path(made["folder"])
    port = os.environ["MASTER_PORT"]
    _say(f"job {job.id}, start {job.restarts + 1}: run folder {folder}, port {port}")
    excluded: list[str] = []
    if preflight:
        excluded = list(_look_at_nodes(job, folder.parent, job.nodes + spare))
    before = newest_step(folder)
    nodes = [f"--nodes={job.nodes}", f"--ntasks={job.nodes * job.ranks_per_node}"]
    nodes += [f"--ntasks-per-node={job.ranks_per_node}", *without(excluded)]
    if job.warned:
        _say(f"warned by {job.warned.name} before training began: give the job more time")
        return STOPPED
    # The other ranks find out by themselves that one has ended, and say which.
    patience = ["--kill-on-bad-exit=0", f"--wait={_PATIENCE_SECONDS}"]
    code, _ = job.srun(*nodes, *patience, *_python("moetrain"), "train", *made["arguments"])
    return _after(job, code, before, newest_step(folder))


def _plan(job: Job, arguments: Sequence[str]) -> dict[str, Any]:
    """What :mod:`moetrain.slurm.plan` prints. It says itself what is wrong."""
    name = f"slurm-{os.environ.get('SLURM_ARRAY_JOB_ID', job.id)}"
    task = os.environ.get("SLURM_ARRAY_TASK_ID", "0")
    command = [*_python("moetrain.slurm.plan"), f"--ranks={job.nodes * job.ranks_per_node}"]
    one = ("--nodes=1", "--ntasks=1", "--ntasks-per-node=1")
    code, output = job.srun(
        *one, *command, f"--name={name}", f"--task={task}", "--", *arguments, capture=True
    )
    if code:
        raise SystemExit(code)
    made: dict[str, Any] = json.loads(output.splitlines()[-1])
    return made


def _look_at_nodes(job: Job, root: Path, allocated: int) -> dict[str, str]:
    """The nodes to leave out, and why; they are noted beside the run folders.

    Where too few are left the job ends, or submits itself again without them where it knows how.
    """
    step = [f"--nodes={allocated}", f"--ntasks={allocated}", "--ntasks-per-node=1", "--kill-on-bad-exit=0"]
    command = [*_python("moetrain.slurm.preflight"), f"--folder={root}"]
    _, output = job.srun(*step, *command, capture=True, limit=_PREFLIGHT_SECONDS)
    reports = [json.loads(line) for line in output.splitlines() if line.startswith("{")]
    nodes = _names(os.environ["SLURM_JOB_NODELIST"])
    of_rank = {report["rank"]: report["node"] for report in reports}
    pairs = [
        (report["node"], of_rank[other])
        for report in reports
        for other in report["unreached"]
        if other in of_rank
    ]
    bad = blamed(nodes, {report["node"]: report["faults"] for report in reports}, pairs)
    if not bad:
        _say(f"preflight: {allocated} node(s) are well")
        return bad
    for node, reason in bad.items():
        _say(f"preflight: {node} is left out: {reason}")
    _note(root / EXCLUDED, bad)
    good = [node for node in nodes if node not in bad]
    if len(good) < job.nodes:
        raise SystemExit(_submit_again(job, bad, len(good)))
    os.environ["MASTER_ADDR"] = next(report["host"] for report in reports if report["node"] == good[0])
    return bad


def _note(file: Path, bad: dict[str, str]) -> None:
    today = time.strftime("%Y-%m-%d")
    with contextlib.suppress(OSError), file.open("a") as notes:  # the log has them too
        notes.writelines(f"{node}\t{today}\t{reason}\n" for node, reason in bad.items())


def _submit_again(job: Job, bad: dict[str, str], good: int) -> int:
    few = f"{good} of the job's nodes are well, and it trains on {job.nodes}"
    if job.restarts >= job.max_requeues or RESUBMIT not in os.environ:
        _say(f"error: {few}: submit it again with --exclude={','.join(bad)}, or with --spare-nodes")
        return 1
    command, script = json.loads(os.environ[RESUBMIT])
    before = [word.removeprefix("--exclude=") for word in command if word.startswith("--exclude=")]
    code = subprocess.run([*command, *without([*before, *bad]), *script]).returncode
    _say(f"{few}: " + ("submitted again without the others" if code == 0 else "submitting it again failed"))
    return 1


def _after(job: Job, code: int, before: int, now: int) -> int:
    """0 and mistakes end the job; a run that was warned or lost a rank is begun again if it made progress."""
    if code == 0:
        return 0
    asked_to_stop = job.warned is not _WARNING and (job.warned is not None or code == STOPPED)
    if code in _MISTAKES or asked_to_stop:
        return code
    why = f"warned by {job.warned.name}" if job.warned else f"ended with exit code {code}"
    if now <= before:
        _say(f"{why}, and no checkpoint was added to that of step {before}: not begun again")
        return code
    if job.restarts >= job.max_requeues:
        _say(f"{why}, and was begun again {job.restarts} times: --max-requeues {job.max_requeues}")
        return code
    _say(f"{why} at step {now}: back into the queue")
    done = subprocess.run(["scontrol", "requeue", job.id], capture_output=True, text=True)
    if done.returncode:
        _say(f"error: scontrol requeue {job.id}: {done.stderr.strip()}; the same command goes on")
        return code
    time.sleep(_REQUEUE_SECONDS)  # Slurm ends this process; its exit code would be the job's
    return code


def free_port(first: int, host: str = "") -> int:
    """``first``, or another port that nobody listens on: far from it, where no job of a neighbouring number
    begins, which may be looking at the same moment.
    """
    for port in range(first, _LAST_PORT, _PORT_STRIDE):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a job that ended there is no bar
            probe.bind((host, port))
            return port
    raise UserError(f"no port of {first} and each {_PORT_STRIDE} after it is free on {socket.gethostname()}")


def newest_step(folder: Path) -> int:
    """The step of the newest checkpoint in a run folder; -1 without one."""
    steps = [path.name.removeprefix("step_") for path in (folder / "checkpoints").glob("step_*")]
    return max((int(step) for step in steps if step.isdecimal()), default=-1)


def _names(nodes: str) -> list[str]:
    done = subprocess.run(
        ["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, check=True
    )
    return done.stdout.split()


def _python(module: str) -> list[str]:
    """The command of a step: this Python, or what MOETRAIN_RUN names, such as one in a container."""
    return [*(shlex.split(os.environ.get(RUN, "")) or [sys.executable]), "-m", module]


def without(nodes: Iterable[str]) -> list[str]:
    """srun's and sbatch's option, of which the last one counts."""
    names = ",".join(dict.fromkeys(nodes))
    return [f"--exclude={names}"] if names else []


def _say(text: str) -> None:
    sys.stderr.write(f"moetrain: {text}\n")
    sys.stderr.flush()


if __name__ == "__main__":
    sys.exit(main())

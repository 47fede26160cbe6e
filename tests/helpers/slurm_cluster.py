"""A real Slurm on this machine: munge, a controller, and some nodes that are daemons here, all in one folder.

Each node pretends to have cores and has a port of its own; job steps are ordinary processes.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

NODES = ("n1", "n2", "n3")
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue", "scancel")
SICK = "sick"  # a file in the cluster's folder: nodes whose steps are told of a GPU that is not there
_ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "BOOT_FAIL", "OUT_OF_MEMORY")

_CONF = """\
ClusterName=moetrain
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
SlurmctldPort={controller}
AuthType=auth/munge
AuthInfo=socket={root}/munge/socket,cred_expire=5
CredType=cred/munge
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool.%n
SlurmctldPidFile={root}/controller.pid
SlurmdPidFile={root}/node.%n.pid
SlurmctldLogFile={root}/controller.log
SlurmdLogFile={root}/node.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
TaskProlog={root}/task_prolog
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=sched_interval=5
SlurmdParameters=config_overrides
ReturnToService=2
KillWait=60
MinJobAge=3600
MpiDefault=none
NodeName={nodes} NodeHostname={host} NodeAddr=127.0.0.1 Port={ports} CPUs=4 State=UNKNOWN
PartitionName=main Nodes={nodes} Default=YES MaxTime=INFINITE State=UP
"""
# Slurm reads what it prints: here the way to give one node of several on this machine a fault of its own.
_TASK_PROLOG = """\
#!/bin/sh
[ -n "$SLURM_STEP_ID" ] && grep -qx "$SLURMD_NODENAME" {root}/sick 2>/dev/null &&
  echo "export SLURM_GPUS_ON_NODE=1"
exit 0
"""


def missing() -> list[str]:
    """What this machine lacks for a cluster of its own."""
    lacks = [name for name in PROGRAMS if shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin") is None]
    return lacks + ([] if os.geteuid() == 0 else ["root"])


class Cluster:
    """The programs that run, and questions to Slurm."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.env = {
            **{name: value for name, value in os.environ.items() if not name.startswith("SLURM_")},
            "SLURM_CONF": str(root / "slurm.conf"),
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}:/usr/sbin",
            "OMP_NUM_THREADS": "1",
        }

    def run(self, *command: str, check: bool = True) -> str:
        done = subprocess.run(command, env=self.env, capture_output=True, text=True, timeout=60)
        assert not check or done.returncode == 0, (command, done.stdout, done.stderr)
        return done.stdout

    def sbatch(self, *arguments: str, cwd: Path) -> str:
        """The job's number."""
        done = subprocess.run(
            ["sbatch", "--parsable", *arguments], cwd=cwd, env=self.env, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def state(self, job: str) -> dict[str, str]:
        """Slurm's words on a job."""
        return dict(re.findall(r"(\w+)=(\S*)", self.run("scontrol", "show", "job", job)))

    def wait(self, job: str, seconds: float = 280) -> dict[str, str]:
        """Its words once the job has ended for good. What was requeued need not wait out Slurm's minute."""
        end = time.monotonic() + seconds
        while (state := self.state(job))["JobState"] not in _ENDED:
            assert time.monotonic() < end, (state, self.logs())
            if state["Reason"] == "BeginTime":
                self.run("scontrol", "update", f"JobId={job}", "StartTime=now", check=False)
            time.sleep(0.5)
        return state

    def logs(self) -> str:
        """The ends of the daemons' own logs, for a message."""
        return "\n".join(f"{file.name}: {file.read_text()[-1500:]}" for file in self.root.glob("*.log"))


@contextlib.contextmanager
def cluster(root: Path) -> Iterator[Cluster]:
    """Start it; at the end every process of it is gone."""
    made = Cluster(root)
    _write(root)
    path = root / "munge"
    munge = [
        f"--{name}={path / name}" for name in ("key-file", "socket", "pid-file", "log-file", "seed-file")
    ]
    processes = [subprocess.Popen(["munged", "--foreground", "--force", *munge], env=made.env)]
    try:
        _until(lambda: (path / "socket").exists(), made)
        processes.append(subprocess.Popen(["slurmctld", "-D"], env=made.env, stderr=subprocess.DEVNULL))
        nodes = [["slurmd", "-D", "-N", node] for node in NODES]
        processes += [subprocess.Popen(node, env=made.env, stderr=subprocess.DEVNULL) for node in nodes]
        _until(lambda: made.run("sinfo", "-h", "-o", "%t %D", check=False) == f"idle {len(NODES)}\n", made)
        yield made
    finally:
        with contextlib.suppress(AssertionError, subprocess.SubprocessError):
            made.run("scancel", "--state=RUNNING", check=False)
            made.run("scancel", "--state=PENDING", check=False)
            _until(lambda: not made.run("squeue", "-h", check=False), made, 90)
        for process in reversed(processes):
            process.send_signal(signal.SIGTERM)
        for process in processes:
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()


def _write(root: Path) -> None:
    for folder in ("munge", "state", *(f"spool.{node}" for node in NODES)):
        (root / folder).mkdir()
    (root / "munge").chmod(0o755)  # munged insists
    key = root / "munge" / "key-file"
    key.write_bytes(os.urandom(1024))
    key.chmod(0o600)
    ports = _free_ports(len(NODES) + 1)
    conf = _CONF.format(
        root=root,
        host=socket.gethostname().split(".")[0],
        controller=ports[-1],
        nodes=f"n[1-{len(NODES)}]",
        ports=f"[{ports[0]}-{ports[-2]}]",
    )
    (root / "slurm.conf").write_text(conf)
    prolog = root / "task_prolog"
    prolog.write_text(_TASK_PROLOG.format(root=root))
    prolog.chmod(0o755)


def _free_ports(count: int) -> range:
    """As many free ports in a row, which Slurm's list of nodes needs."""
    own = 17_000 + os.getpid() % 1000 * count  # others may look at the same moment
    for first in range(own, 30_000, count):
        with contextlib.ExitStack() as probes, contextlib.suppress(OSError):
            for port in range(first, first + count):
                probes.enter_context(socket.socket()).bind(("127.0.0.1", port))
            return range(first, first + count)
    raise AssertionError("no free ports in a row")


def _until(true: object, made: Cluster, seconds: float = 60) -> None:
    assert callable(true)
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, made.logs()
        time.sleep(0.2)

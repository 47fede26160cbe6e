"""The cores that this process may use, and how its threads wait for each other. Imports no torch.

OpenMP's threads spin while they wait. On cores of their own that is the fastest way; beside other busy
processes a thread spins for a partner that is not running, and takes the core away from it.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

from moetrain import openmp_waits

_SAMPLE = 0.2  # seconds; /proc/stat counts hundredths
_SPARE = 0.5  # of a core that others may use before the machine counts as shared
_CGROUPS = Path("/sys/fs/cgroup")


def usable_cores() -> int:
    """The number of cores by affinity, or fewer if a container's CPU quota is lower; 1 at least."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = cpu_quota()
    return cores if quota is None else max(1, min(cores, int(quota)))


def threads_per_rank(local_ranks: int) -> int:
    """CPU threads of each of ``local_ranks`` processes: OMP_NUM_THREADS, else an equal share of the cores.

    torchrun sets OMP_NUM_THREADS=1 for several ranks where it is unset, so its 1 is ignored.
    """
    given = os.environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()
    unsaid = given == "1" and local_ranks > 1 and "TORCHELASTIC_RUN_ID" in os.environ
    if given.isdecimal() and int(given) > 0 and not unsaid:
        return int(given)
    return max(1, usable_cores() // local_ranks)


def choose_waiting(local_ranks: int) -> None:
    """Set how OpenMP's threads wait, unless the environment does. Call it before torch is imported.

    Threads sleep if other processes use the cores, which is measured; otherwise they first spin for 1 ms.
    """
    threads = threads_per_rank(local_ranks)
    if threads == 1 or any(name in os.environ for name in openmp_waits.VARIABLES):
        return
    if local_ranks == 1 and usable_cores() - busy_cores(_SAMPLE) < threads - _SPARE:
        os.environ["OMP_WAIT_POLICY"] = "passive"
    else:  # local ranks would find each other busy, starting
        os.environ["GOMP_SPINCOUNT"] = str(openmp_waits.SHORT_SPINS)


def busy_cores(seconds: float) -> float:
    """The mean number of this process's cores that others use, measured for ``seconds``; 0 if unknown."""
    before = _busy_ticks()
    time.sleep(seconds if before is not None else 0)
    after = _busy_ticks()
    if before is None or after is None:
        return 0.0
    return (after - before) / (seconds * os.sysconf("SC_CLK_TCK"))


def _busy_ticks() -> int | None:
    """Of all cores in the affinity set, time stolen by a hypervisor included; None where nothing says."""
    try:
        lines = Path("/proc/stat").read_text().splitlines()
        mine = {f"cpu{core}" for core in os.sched_getaffinity(0)}
        counts = [[int(text) for text in line.split()[1:9]] for line in lines if line.split()[0] in mine]
    except (OSError, ValueError, IndexError, AttributeError):
        return None
    return sum(
        sum(ticks) - ticks[3] - ticks[4] for ticks in counts if len(ticks) == 8
    )  # idle, waiting for a disk


def cpu_quota(root: Path = _CGROUPS, own: Path = Path("/proc/self/cgroup")) -> float | None:
    """The number of cores that control groups (version 1 or 2) allow; None without a limit."""
    try:
        lines = own.read_text().splitlines()
    except OSError:
        return None
    quotas = []
    for line in lines:
        controllers, _, path = line.partition(":")[2].partition(":")
        for base in (root, root / "unified") if not controllers else _v1_roots(root, controllers):
            inside = base / path.lstrip("/")
            for folder in (inside, *(parent for parent in inside.parents if parent.is_relative_to(base))):
                if (quota := _quota_of(folder)) is not None:
                    quotas.append(quota)
    return min(quotas, default=None)


def _v1_roots(root: Path, controllers: str) -> tuple[Path, ...]:
    return (root / controllers, root / "cpu") if "cpu" in controllers.split(",") else ()


def _quota_of(folder: Path) -> float | None:
    try:
        if (file := folder / "cpu.max").is_file():
            limit, period = file.read_text().split()[:2]
        else:
            limit = (folder / "cpu.cfs_quota_us").read_text()
            period = (folder / "cpu.cfs_period_us").read_text()
        return int(limit) / int(period) if int(limit) > 0 and int(period) > 0 else None
    except (OSError, ValueError):  # "max" is no limit
        return None

"""The faults of chaos.py: each strikes a running start once, at a moment that the caller has chosen."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from chaos_start import RANKS, Case, Start, netns

_DISK = "24m"  # of a run folder on a disk that fills up


@dataclass(frozen=True)
class Struck:
    """What a fault did: to whom, and what the output of that start, or of the next one, must then say."""

    victim: str
    says: tuple[str, ...] = ()
    damaged: Path | None = None  # a checkpoint that may not be loaded any more


Strike = Callable[[Start, random.Random], Struck]
Prepare = Callable[[Case], contextlib.AbstractContextManager[Case]]


@contextlib.contextmanager
def _as_it_is(case: Case) -> Iterator[Case]:
    yield case


@dataclass(frozen=True)
class Fault:
    """``prepare`` wraps all starts of a run; ``mend`` is called once the struck start has ended."""

    name: str
    strike: Strike
    saving: bool = False  # strikes while a checkpoint is being written
    prepare: Prepare = _as_it_is
    mend: Callable[[Case], None] = lambda case: None
    refused: Callable[[], str | None] = lambda: None  # why it cannot be made here


def _kill_a_rank(start: Start, draw: random.Random) -> Struck:
    rank, pid = draw.choice(sorted(start.ranks().items()))
    os.kill(pid, signal.SIGKILL)
    return Struck(f"rank {rank}", (f"rank {rank}: lost",))


def _stop_a_rank(start: Start, draw: random.Random) -> Struck:
    rank, pid = draw.choice(sorted(start.ranks().items()))
    os.kill(pid, signal.SIGSTOP)
    return Struck(f"rank {rank}", (f"rank {rank}: lost",))


def _kill_torchrun(start: Start, draw: random.Random) -> Struck:
    start.agents[0].kill()
    return Struck("torchrun", ("launcher",))


def _terminate(start: Start, draw: random.Random) -> Struck:
    """To torchrun, which passes it on, or to one rank."""
    ranks = sorted(start.ranks().items())
    name, pid = draw.choice([("torchrun", start.agents[0].pid), *((f"rank {r}", p) for r, p in ranks)])
    os.kill(pid, signal.SIGTERM)
    return Struck(name, ("stopped after step",))


def _damage(kind: str) -> Strike:
    """Kill everything, then change a random file of the newest checkpoint."""

    def strike(start: Start, draw: random.Random) -> Struck:
        start.signal_all(signal.SIGKILL)
        start.end()
        path = max((start.case.run / "checkpoints").glob("step_*"))
        file = draw.choice(sorted(path.iterdir()))
        data = bytearray(file.read_bytes())
        if kind == "truncated":
            data = data[: draw.randrange(len(data))]
        else:
            data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
        file.write_bytes(data)
        return Struck(f"{path.name}/{file.name}", (f"{path} is damaged and is passed over",), path)

    return strike


def _delete_the_cache(start: Start, draw: random.Random) -> Struck:
    """Under the running ranks, which go on for a while, and then everything is killed."""
    shutil.rmtree(start.case.cache)
    rows = start.rows()
    start.until(lambda: start.rows() >= rows + 2, 60)
    start.signal_all(signal.SIGKILL)
    return Struck("all")


@contextlib.contextmanager
def _own_cache(case: Case) -> Iterator[Case]:
    yield replace(case, cache=case.run.parent / f"{case.run.name}.cache")


@contextlib.contextmanager
def _own_disk(case: Case) -> Iterator[Case]:
    case.run.mkdir()
    _mount(case.run)
    try:
        yield case
    finally:
        subprocess.run(["umount", "-l", str(case.run)], check=True)


def _mount(folder: Path) -> None:
    size = f"size={_DISK}"
    subprocess.run(
        ["mount", "-t", "tmpfs", "-o", size, "tmpfs", str(folder)], check=True, capture_output=True
    )


def _filler(case: Case) -> Path:
    return case.run / "filler"


def _fill_the_disk(start: Start, draw: random.Random) -> Struck:
    with _filler(start.case).open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(4096))
    return Struck("disk", ("No space left on device",))


def _disk_refused() -> str | None:
    return None if os.geteuid() == 0 and shutil.which("mount") else "a small disk needs root and mount"


@contextlib.contextmanager
def _two_machines(case: Case) -> Iterator[Case]:
    with netns.Network(2) as network:
        interface = ("GLOO_SOCKET_IFNAME", netns.DEVICE)
        yield replace(case, network=network, environment=(*case.environment, interface))


def _cut_the_link(start: Start, draw: random.Random) -> Struck:
    network = start.case.network
    assert network is not None
    host = draw.randrange(2)
    network.cut(host)
    half = RANKS // 2
    return Struck(f"machine {host}", tuple(f"rank {rank}: lost" for rank in (0, half)))


def _join_the_link(case: Case) -> None:
    assert case.network is not None
    for host in range(2):
        case.network.join(host)


def _clock(case: Case) -> Path:
    return case.run.parent / f"{case.run.name}.clock"


def _move_clock(case: Case, seconds: int) -> None:
    """In place, as the file is mapped by all processes."""
    with _clock(case).open("r+b") as file:
        file.write(seconds.to_bytes(8, sys.byteorder, signed=True))


@contextlib.contextmanager
def _own_clock(case: Case) -> Iterator[Case]:
    """The wall clock of all processes is as far from the machine's as a file says."""
    library = case.run.parent / "chaos_clock.so"
    source = Path(__file__).with_name("chaos_clock.c")
    subprocess.run(["cc", "-O1", "-shared", "-fPIC", "-o", str(library), str(source)], check=True)
    _clock(case).write_bytes(bytes(8))
    env = {"LD_PRELOAD": str(library), "CLOCK_FILE": str(_clock(case))}
    yield replace(case, environment=(*case.environment, *env.items()))


def _set_the_clock_back(start: Start, draw: random.Random) -> Struck:
    """An hour, under the running ranks; some steps later everything is killed, and begins in the past."""
    _move_clock(start.case, -3600)
    rows = start.rows()
    start.until(lambda: start.rows() >= rows + 3, 60)
    last = (start.case.run / "metrics.jsonl").read_bytes().split(b"\n")[-2]
    if json.loads(last)["time"] > time.time() - 3000:
        raise SystemExit("the ranks' clock was not set back")
    start.signal_all(signal.SIGKILL)
    return Struck("all")


FAULTS = (
    Fault("a rank is killed (SIGKILL)", _kill_a_rank),
    Fault("torchrun is killed (SIGKILL)", _kill_torchrun),
    Fault("a rank is stopped (SIGSTOP)", _stop_a_rank),
    Fault(
        "the disk is full in a save",
        _fill_the_disk,
        True,
        _own_disk,
        lambda case: _filler(case).unlink(),
        _disk_refused,
    ),
    Fault("the newest checkpoint is truncated", _damage("truncated")),
    Fault("a bit of the newest checkpoint is flipped", _damage("flipped")),
    Fault(
        "the link between two machines is cut",
        _cut_the_link,
        False,
        _two_machines,
        _join_the_link,
        netns.refused,
    ),
    Fault("SIGTERM in a save", _terminate, True),
    Fault(
        "the clock is set back an hour, then a kill",
        _set_the_clock_back,
        prepare=_own_clock,
        refused=lambda: None if shutil.which("cc") else "a clock of its own needs cc",
    ),
    Fault("the prepared text is deleted, then a kill", _delete_the_cache, prepare=_own_cache),
)

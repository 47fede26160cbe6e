"""One start of a training on four ranks, and the processes that belong to it; for chaos.py. Linux only."""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from kill_resume import command, count_rows, newest

sys.path.append(str(Path(__file__).parents[1] / "tests" / "dist"))
import netns

RANKS, STEPS = 4, 30
TIMEOUT = 8  # seconds in a collective
ORPHANS = 20.0  # seconds that a process may outlive its launcher
_PORT = "29531"
_MARK = "MOETRAIN_CHAOS"  # in the environment of every process of a start
_MODEL = [
    "model.d_model=64", "model.num_heads=4", "model.d_ff_expert=64", "model.num_experts=6", "parallel.ep=2",
    f"parallel.timeout={TIMEOUT}", "train.sample_tokens=0", "train.micro_batch_size=1",
]  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A run: its folder, the text, the folder of prepared text, and its two machines, if it has them."""

    run: Path
    text: Path
    cache: Path
    overrides: tuple[str, ...] = ()
    network: netns.Network | None = None
    environment: tuple[tuple[str, str], ...] = ()

    @property
    def hosts(self) -> int:
        return 1 if self.network is None else 2


class Start:
    """The command of ``case``, started: one torchrun of four ranks, or two torchruns of two."""

    def __init__(self, case: Case, number: int) -> None:
        self.case = case
        self.logs = [case.run.parent / f"{case.run.name}.{number}.{host}.log" for host in range(case.hosts)]
        self._mark = secrets.token_hex(8)
        self.newest = newest(case.run)  # step of the newest checkpoint that was seen
        env = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
        env |= {_MARK: self._mark, "OMP_NUM_THREADS": "1", **dict(case.environment)}
        self.agents = [self._agent(host, env) for host in range(case.hosts)]

    def _agent(self, host: int, env: dict[str, str]) -> subprocess.Popen[bytes]:
        network = self.case.network
        torchrun = [sys.executable, "-m", "torch.distributed.run"]
        torchrun.append(f"--nproc-per-node={RANKS // self.case.hosts}")
        if network is None:
            torchrun.append("--standalone")
        else:
            torchrun = ["ip", "netns", "exec", network.names[host], *torchrun]
            torchrun += ["--nnodes=2", f"--node-rank={host}", f"--master-addr={network.address(0)}"]
            torchrun += [f"--master-port={_PORT}"]
        train = command(self.case.text, self.case.run, STEPS, ranks=1)[1:]
        arguments = [*torchrun, *train, *_MODEL, f"data.cache_dir={self.case.cache}"]
        with self.logs[host].open("wb") as out:
            return subprocess.Popen(
                [*arguments, *self.case.overrides], stdin=subprocess.DEVNULL, stdout=out, stderr=out, env=env
            )

    def processes(self) -> dict[int, dict[str, str]]:
        """The environment of every process of this start that is left, by its id."""
        found = {}
        for path in Path("/proc").glob("[0-9]*/environ"):
            with contextlib.suppress(OSError):
                words = path.read_bytes().split(b"\0")
                env = dict(word.decode(errors="replace").split("=", 1) for word in words if b"=" in word)
                if env.get(_MARK) == self._mark and alive(int(path.parent.name)):
                    found[int(path.parent.name)] = env
        return found

    def ranks(self) -> dict[int, int]:
        """The process of each rank that runs."""
        found = {}
        for pid, env in self.processes().items():
            with contextlib.suppress(OSError):
                if "RANK" in env and b"moetrain" in Path(f"/proc/{pid}/cmdline").read_bytes():
                    found[int(env["RANK"])] = pid
        return found

    def until(self, condition: Callable[[], bool], seconds: float) -> bool:
        """Whether ``condition`` came to hold before the start ended, and in ``seconds``."""
        for _ in self._looks(seconds, 0.01):
            if condition():
                return True
            if any(agent.poll() is not None for agent in self.agents):
                return False
        return False

    def rows(self) -> int:
        return count_rows(self.case.run)

    def saving(self) -> bool:
        return any((self.case.run / "checkpoints").glob(".tmp_step_*"))

    def wait(self, seconds: float) -> list[int] | None:
        """The launchers' exit codes; None where one has not ended in time."""
        for _ in self._looks(seconds, 0.05):
            codes = [agent.poll() for agent in self.agents]
            if None not in codes:
                return [code for code in codes if code is not None]
        return None

    def orphans(self) -> int:
        """The processes that outlive the launchers by ``ORPHANS`` seconds."""
        for _ in self._looks(ORPHANS, 0.05):
            if not self.processes():
                return 0
        return len(self.processes())

    def signal_all(self, number: int) -> None:
        for pid in self.processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    def end(self) -> None:
        """Kill whatever is left."""
        while self.processes():
            self.signal_all(signal.SIGKILL)
            time.sleep(0.05)
        for agent in self.agents:
            agent.wait()

    def output(self) -> str:
        return "".join(log.read_text(errors="replace") for log in self.logs)

    def _looks(self, seconds: float, pause: float) -> Iterator[None]:
        deadline = time.monotonic() + seconds
        while True:
            self.newest = max(self.newest, newest(self.case.run))
            yield
            if time.monotonic() > deadline:
                return
            time.sleep(pause)


def alive(pid: int) -> bool:
    """Whether it runs, and is not dead and unreaped."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False

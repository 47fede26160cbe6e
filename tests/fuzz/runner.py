"""Runs mutations in a worker process and watches it from outside: time, memory, and whether it lives."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from types import TracebackType

from fuzz.outcome import BEGUN, Limits, Outcome

_TESTS = Path(__file__).resolve().parents[1]
_LOOK = 0.05
_START = 300.0  # seconds until a worker has imported all, and read the valid files


class Runner:
    """Outcomes of mutations of the files in ``world``. A worker that fell is followed by another."""

    def __init__(self, world: Path, limits: Limits = Limits()) -> None:  # noqa: B008
        self._world, self._limits = world, limits
        self._scratch = tempfile.TemporaryDirectory(prefix="fuzz_")
        self._log = (Path(self._scratch.name) / "log").open("w+b")
        self._worker: subprocess.Popen[bytes] | None = None
        self._answers = -1
        self._pending = b""

    def __enter__(self) -> Runner:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop()
        self._log.close()
        self._scratch.cleanup()

    def run(self, jobs: Iterable[tuple[str, int]]) -> Iterator[Outcome]:
        for target, seed in jobs:
            outcome = self._one(target, seed)
            if outcome.kind in ("hang", "memory", "crash"):
                self._stop()  # what is left behind is no fair start for the next
            yield outcome

    def _one(self, target: str, seed: int) -> Outcome:
        worker = self._started()
        assert worker.stdin is not None
        fallen = Outcome(target, seed, "crash")
        held = spent = 0.0
        deadline, ready = time.monotonic() + _START, False
        try:
            worker.stdin.write(f"{target} {seed}\n".encode())
            worker.stdin.flush()
        except BrokenPipeError:
            return self._fallen(fallen)
        while True:
            line = self._line()
            if line == BEGUN:
                held, spent, ready = _memory(worker.pid), _processor(worker.pid), True
                deadline = time.monotonic() + self._limits.wall
            elif line is not None:
                return Outcome(**json.loads(line))
            elif worker.poll() is not None:
                return self._fallen(fallen)
            elif time.monotonic() > deadline:
                if not ready:
                    raise RuntimeError(f"the worker did not begin with {target} {seed} in {_START} seconds")
                return Outcome(target, seed, "hang", "waiting")
            elif ready and _processor(worker.pid) - spent > self._limits.seconds + self._limits.grace:
                return Outcome(target, seed, "hang", "in native code")
            elif ready and _memory(worker.pid) - held > 2 * self._limits.memory:  # before the machine suffers
                return Outcome(target, seed, "memory")

    def _fallen(self, fallen: Outcome) -> Outcome:
        assert self._worker is not None
        code = self._worker.wait()
        self._log.seek(0)
        said = self._log.read().decode(errors="replace")
        if code >= 0:  # the harness itself failed
            raise RuntimeError(
                f"the worker ended with {code} at {fallen.target} {fallen.seed}:\n{said[-3000:]}"
            )
        place = signal.Signals(-code).name
        return Outcome(fallen.target, fallen.seed, "crash", place, said[-300:])

    def _line(self) -> bytes | None:
        """The worker's next answer, if it comes within a moment."""
        if b"\n" not in self._pending:
            readable, _, _ = select.select([self._answers], [], [], _LOOK)
            if not readable or not (data := os.read(self._answers, 1 << 16)):
                return None
            self._pending += data
            if b"\n" not in self._pending:
                return None
        line, _, self._pending = self._pending.partition(b"\n")
        return line

    def _started(self) -> subprocess.Popen[bytes]:
        if self._worker is None:
            self._answers, theirs = os.pipe()
            arguments = [str(self._world), f"{self._scratch.name}/copy", str(theirs)]
            arguments.append(json.dumps(asdict(self._limits)))
            env = {
                **os.environ,
                "PYTHONPATH": f"{_TESTS}:{_TESTS / 'helpers'}:{_TESTS.parent}",
                "OMP_NUM_THREADS": "1",
                "HF_HUB_OFFLINE": "1",
            }
            env["TOKENIZERS_PARALLELISM"] = "false"
            self._log.truncate(0)
            self._worker = subprocess.Popen(
                [sys.executable, "-X", "faulthandler", "-m", "fuzz.worker", *arguments],
                stdin=subprocess.PIPE,
                stdout=self._log,
                stderr=self._log,
                pass_fds=[theirs],
                env=env,
                cwd=self._scratch.name,
            )
            os.close(theirs)
        return self._worker

    def _stop(self) -> None:
        if self._worker is None:
            return
        self._worker.kill()
        self._worker.wait()
        assert self._worker.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._worker.stdin.close()
        os.close(self._answers)
        self._worker, self._pending = None, b""


def _memory(pid: int) -> int:
    """Bytes that a process holds."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, IndexError):
        return 0


def _processor(pid: int) -> float:
    """Seconds of processor that a process has had."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

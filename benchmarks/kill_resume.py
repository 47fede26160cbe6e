"""Kill a training at random moments, resume it each time, and compare it with one that nobody touched.

    python benchmarks/kill_resume.py --kills 20 [--ranks 2] [--steps 80] [--seed 0] [--json FILE]

A tiny model trains on generated text in processes of its own, started by the same command every time. Each
life ends by SIGKILL: on reaching a random step, a random moment after one, while a checkpoint is being
written, or while the process is still starting. Of several ranks (under torchrun) one random rank is killed,
or all processes at once. At the end every row of metrics.jsonl (but for the clock) and the bytes of the final
checkpoint must equal the uninterrupted run's. Linux only. The exit code is 1 where anything differs.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from timing import machine, write_json

MOMENTS = ("at a step", "after a step", "while saving", "while starting")
CLOCK = ("time", "tokens_per_second")
SEQ, GLOBAL, EVERY = 16, 8, 3  # tokens, sequences a step, steps a checkpoint
LIMIT = 300.0  # seconds for one life


@dataclass(frozen=True)
class Life:
    """From start to kill: from the checkpoint of step ``resumed`` to the row of step ``rows``."""

    moment: str
    victim: str
    resumed: int
    rows: int
    saving: bool  # a half-written checkpoint was left
    torn: bool  # the last row was incomplete
    exit_code: int


def write_text(folder: Path) -> Path:
    draw = random.Random(7)
    words = ["".join(draw.choices("abcdefghij", k=draw.randint(2, 6))) for _ in range(41)]
    folder.mkdir()
    for number in range(40):
        (folder / f"{number:02}.txt").write_text(" ".join(draw.choices(words, weights=range(1, 42), k=200)))
    return folder


def command(folder: Path, run: Path, steps: int, ranks: int) -> list[str]:
    python = [sys.executable]
    if ranks > 1:
        python += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    return [
        *python, "-m", "moetrain", "train", f"run.dir={run}", "data=local", f"data.path={folder}/text",
        f"data.cache_dir={folder}/cache", "data.tokenizer.kind=bytes", f"data.seq_len={SEQ}",
        "model.d_model=16", "model.num_layers=2", "model.num_heads=2", "model.d_ff_expert=12",
        "model.num_experts=5",
        "balance=running", "balance.controllers.bias.rate=0.01", "router.capacity_factor=1.2",
        "router.jitter=0.01",
        "train.deterministic=true", "train.threads=1", f"train.micro_batch_size={GLOBAL // 2 // ranks}",
        f"train.global_batch_tokens={GLOBAL * SEQ}", "train.eval_every=10", "train.eval_samples=8",
        "train.sample_tokens=4", f"train.steps={steps}", f"checkpoint.every={EVERY}", "schedule.horizon=100",
    ]  # fmt: skip


class Training:
    """The command as a process, its output in a file."""

    def __init__(self, arguments: list[str], log: Path) -> None:
        self._log = log
        env = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
        with log.open("wb") as out:
            self.popen = subprocess.Popen(
                arguments, stdin=subprocess.DEVNULL, stdout=out, stderr=out,
                env=env | {"OMP_NUM_THREADS": "1", "MPLBACKEND": "agg"},
            )  # fmt: skip

    def wait_until(self, condition: Callable[[], bool]) -> bool:
        """False where the process ended first."""
        deadline = time.monotonic() + LIMIT
        while not condition():
            if self.popen.poll() is not None:
                return False
            if time.monotonic() > deadline:
                raise SystemExit(f"nothing happened for {LIMIT:g} s:\n{self._log.read_text()}")
            time.sleep(0.002)
        return True

    def kill(self, whole: bool, draw: random.Random) -> tuple[str, int]:
        """SIGKILL to every process, or to one rank of several; (who, exit code of the command)."""
        ranks = sorted(descendants(self.popen.pid))
        one = bool(ranks) and not whole
        victims = [draw.choice(ranks)] if one else [self.popen.pid, *ranks]
        for pid in victims:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        try:
            code = self.popen.wait(LIMIT)
        finally:
            for pid in [self.popen.pid, *ranks]:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            self.popen.wait()
        return f"rank {ranks.index(victims[0])}" if one else "all", code


def descendants(pid: int) -> list[int]:
    """Every process that descends from ``pid``."""
    parents: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            parent = int(stat.read_text().rpartition(")")[2].split()[1])
            parents.setdefault(parent, []).append(int(stat.parent.name))
    found, todo = [], [pid]
    while todo:
        children = parents.get(todo.pop(), [])
        found += children
        todo += children
    return found


def count_rows(run: Path) -> int:
    """Whole rows of steps so far, by their number."""
    try:
        lines = (run / "metrics.jsonl").read_bytes().split(b"\n")[:-1]
    except FileNotFoundError:
        return 0
    return max((json.loads(line)["step"] for line in lines), default=0)


def newest(run: Path) -> int:
    """The step of the newest checkpoint, 0 without one."""
    return max((int(p.name[5:]) for p in (run / "checkpoints").glob("step_*")), default=0)


def live_and_die(arguments: list[str], run: Path, target: int, moment: str, draw: random.Random) -> Life:
    """Start the command and kill it at the first ``moment`` after ``target`` rows."""
    resumed = newest(run)
    training = Training(arguments, run.with_suffix(".log"))

    def saving() -> bool:
        return any((run / "checkpoints").glob(".tmp_step_*"))

    try:
        if moment == "while starting":
            training.wait_until(lambda: bool(training.popen.pid))
            time.sleep(draw.uniform(0.0, 4.0))
        else:
            training.wait_until(lambda: count_rows(run) >= target)
            if moment == "after a step":
                time.sleep(draw.uniform(0.0, 0.1))
            if moment == "while saving":
                training.wait_until(saving)
        victim, code = training.kill(draw.random() < 0.5, draw)
    finally:
        training.kill(True, draw)
    metrics = run / "metrics.jsonl"
    torn = metrics.exists() and not metrics.read_bytes().endswith(b"\n") and metrics.stat().st_size > 0
    return Life(moment, victim, resumed, count_rows(run), saving(), torn, code)


def finish(arguments: list[str], log: Path) -> None:
    training = Training(arguments, log)
    if training.popen.wait(LIMIT):
        raise SystemExit(f"the training failed with {training.popen.returncode}:\n{log.read_text()}")


def curve(run: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key not in CLOCK} for row in rows]


def final_state(run: Path, steps: int) -> dict[str, str]:
    """Hash of every file of tensors in the final checkpoint."""
    files = (run / "checkpoints" / f"step_{steps:08d}").glob("*.distcp")
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def kill_and_resume(
    folder: Path, kills: int, ranks: int, steps: int, seed: int, moments: Sequence[str] = MOMENTS
) -> dict[str, Any]:
    """Both runs in ``folder``, and what came of them."""
    draw = random.Random(seed)
    write_text(folder / "text")
    whole, run = folder / "whole", folder / "run"
    finish(command(folder, whole, steps, ranks), folder / "whole.log")
    arguments = command(folder, run, steps, ranks)
    lives: list[Life] = []
    for number in range(kills):
        target = max(count_rows(run), 1 + int((steps - 4) * (number + draw.random()) / kills))
        moment = moments[number % len(moments)]
        lives.append(live_and_die(arguments, run, target, moment, draw))
        print(f"kill {number + 1:2}: {describe(lives[-1])}", flush=True)
    resumed = [*(life.resumed for life in lives[1:]), newest(run)]
    finish(arguments, folder / "run.log")
    there, here = curve(whole), curve(run)
    differing = [a.get("step") for a, b in zip(there, here, strict=False) if a != b]
    return {
        "kills": kills,
        "ranks": ranks,
        "steps": steps,
        "seed": seed,
        "rows": len(there),
        "rows_equal": len(there) == len(here) and not differing,
        "first_difference": differing[0] if differing else None,
        "weights_equal": final_state(whole, steps) == final_state(run, steps),
        "killed": dict(Counter(life.moment for life in lives)),
        "half_written_checkpoints": sum(life.saving for life in lives),
        "torn_rows": sum(life.torn for life in lives),
        "steps_done_again": sum(
            life.rows - after
            for life, after in zip(lives, resumed, strict=True)
            if life.moment != "while starting"
        ),
        "lives": [asdict(life) for life in lives],
        "machine": machine(),
    }


def describe(life: Life) -> str:
    left = "".join([", a half-written checkpoint" * life.saving, ", a torn row" * life.torn])
    return (
        f"{life.moment}, {life.victim}; from step {life.resumed} to {life.rows}{left}; exit {life.exit_code}"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", metavar="FILE")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="moetrain-kill-") as folder:
        result = kill_and_resume(Path(folder), args.kills, args.ranks, args.steps, args.seed)
    equal = result["rows_equal"] and result["weights_equal"]
    saves = result["half_written_checkpoints"]
    print(
        f"{result['kills']} kills on {result['ranks']} rank(s), {saves} left a half-written checkpoint, "
        f"{result['steps_done_again']} steps done again; {result['rows']} rows and the final weights: "
        + ("equal bit for bit" if equal else f"DIFFERENT, first at step {result['first_difference']}")
    )
    write_json(args.json, result)
    return 0 if equal else 1


if __name__ == "__main__":
    sys.exit(main())

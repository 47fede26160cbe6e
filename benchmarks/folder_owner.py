"""Start the same command twice in one run folder, many times, and count how often all went as it should.

    python benchmarks/folder_owner.py --runs 20 [--folder DIR] [--other-folder DIR] [--other-host COMMAND]

Three situations, ``--runs`` times each: two starts at once; a start beside a running one; a start beside
two ranks whose torchrun was killed with SIGKILL. A repetition is right where one of the two trains to its
end, the other ends with exit code 3 and one line that says who has the folder (or is an orphan, and gone),
the rows of metrics.jsonl are complete and every checkpoint is intact. ``--folder`` lies on the file system in
question; ``--other-folder`` is the same place as the second start sees it (another mount of one export), and
``--other-host`` what runs the second start elsewhere, as ``"unshare --uts --mount ..."``. Linux only. The
exit code is 1 where any repetition was wrong.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shlex
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from kill_resume import LIMIT, Training, command, count_rows, descendants, newest, write_text
from timing import machine, write_json

from moetrain.checkpoint.manifest import verify
from moetrain.errors import STOPPED

STEPS = 30
IN_USE = 3  # the exit code of a start that finds the folder in use


@dataclass(frozen=True)
class Place:
    """Where the runs lie: for the first start, for the second, and what the second is started by."""

    folder: Path
    other: Path
    prefix: tuple[str, ...]
    text: Path

    def start(self, name: str, second: bool, ranks: int = 1, steps: int = STEPS) -> Training:
        run = (self.other if second else self.folder) / name
        arguments = command(self.text, run, steps, ranks)
        log = self.text / f"{name}_{'second' if second else 'first'}.log"
        return Training([*self.prefix, *arguments] if second else arguments, log)

    def log(self, name: str, second: bool) -> str:
        return (self.text / f"{name}_{'second' if second else 'first'}.log").read_text(errors="replace")


@dataclass(frozen=True)
class Outcome:
    """One repetition: what was wrong, empty where nothing was; seconds until the orphans were gone."""

    wrong: str
    orphans: float = 0.0


def at_once(place: Place, name: str, draw: random.Random) -> Outcome:
    starts = [place.start(name, second=False)]
    time.sleep(draw.choice([0.0, draw.uniform(0.0, 0.3)]))
    starts.append(place.start(name, second=True))
    codes = [code_of(start) for start in starts]
    if set(codes) != {0, IN_USE}:
        return Outcome(f"exit codes {codes}")
    return Outcome(in_one_line(place, name, second=codes[1] == IN_USE) or damage(place.folder / name, 1))


def beside_a_running_one(place: Place, name: str, draw: random.Random) -> Outcome:
    run = place.folder / name
    steps = 100_000
    first = place.start(name, second=False, steps=steps)
    first.wait_until(lambda: count_rows(run) >= draw.randint(1, 20))
    second = place.start(name, second=True, steps=steps)
    code = code_of(second)
    rows = count_rows(run)
    went_on = first.wait_until(lambda: count_rows(run) > rows)
    first.popen.send_signal(signal.SIGTERM)
    stopped = code_of(first)
    if (code, went_on, stopped) != (IN_USE, True, STOPPED):
        return Outcome(f"exit codes {stopped} and {code}")
    return Outcome(in_one_line(place, name, second=True) or damage(run, 1))


def beside_orphans(place: Place, name: str, draw: random.Random) -> Outcome:
    """The second start uses two ranks too; it may wait for the orphans' end, or find them gone."""
    run = place.folder / name
    first = place.start(name, second=False, ranks=2, steps=100_000)
    first.wait_until(lambda: newest(run) > 0 and count_rows(run) >= draw.randint(4, 20))
    orphans = descendants(first.popen.pid)
    first.popen.kill()
    killed = time.monotonic()
    done = count_rows(run) + STEPS
    second = place.start(name, second=True, ranks=2, steps=done)
    gone = wait(lambda: not any(alive(pid) for pid in orphans), 60)
    first.popen.wait()
    seconds = gone - killed
    code = code_of(second)
    for pid in orphans:
        if alive(pid):
            os.kill(pid, signal.SIGKILL)
    if code != 0:
        return Outcome(f"exit code {code}: {place.log(name, second=True)[-300:]}", seconds)
    late = "" if seconds <= 15 else f"orphans were there for {seconds:.1f} s"
    return Outcome(late or damage(run, 1), seconds)


SITUATIONS: dict[str, Callable[[Place, str, random.Random], Outcome]] = {
    "two starts at once": at_once,
    "a start beside a running one": beside_a_running_one,
    "a start beside orphans": beside_orphans,
}


def code_of(start: Training) -> int | None:
    """Its exit code; None where it did not end, and it is killed then with all that descends from it."""
    try:
        return start.popen.wait(LIMIT)
    except subprocess.TimeoutExpired:
        start.kill(True, random.Random())
        return None


def in_one_line(place: Place, name: str, second: bool) -> str:
    """What is wrong with the output of the start that was refused."""
    said = place.log(name, second).strip()
    one = said.startswith("moetrain: error: ") and "\n" not in said and " is in use by process " in said
    return "" if one else f"not one line: {said[-300:]}"


def damage(run: Path, first: int) -> str:
    """What is wrong with a run folder: rows that are missing or twice, checkpoints that are not intact."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [row["step"] for row in lines if "train/loss" in row]
    if steps != list(range(first, first + len(steps))):
        return f"rows {steps}"
    saved = sorted((run / "checkpoints").glob("step_*"))
    bad = [f"{path.name}: {problems[0]}" for path in saved if (problems := verify(path))]
    if bad or not saved:
        return f"checkpoints: {bad or 'none'}"
    if int(saved[-1].name.removeprefix("step_")) != steps[-1]:
        return f"the last checkpoint is {saved[-1].name}, the last row {steps[-1]}"
    left = [path.name for path in run.iterdir() if path.name.startswith(".")]
    return f"left behind: {left}" if left else ""


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def wait(condition: Callable[[], bool], seconds: float) -> float:
    """The time at which ``condition`` holds, or after ``seconds``."""
    until = time.monotonic() + seconds
    while not condition() and time.monotonic() < until:
        time.sleep(0.02)
    return time.monotonic()


def without_plots(stub: Path) -> None:
    """The plots of a report take longer than a tiny run: its processes find no matplotlib."""
    stub.mkdir()
    (stub / "matplotlib.py").write_text("raise ImportError('left out')\n")
    os.environ["PYTHONPATH"] = f"{stub}:{os.environ.get('PYTHONPATH', '')}"


def table(results: dict[str, list[Outcome]]) -> str:
    lines = ["| situation | right | orphans gone after (median, most) |", "|---|---|---|"]
    for situation, outcomes in results.items():
        right = sum(not outcome.wrong for outcome in outcomes)
        times = sorted(outcome.orphans for outcome in outcomes if outcome.orphans)
        gone = f"{times[len(times) // 2]:.1f} s, {times[-1]:.1f} s" if times else "-"
        lines.append(f"| {situation} | {right} of {len(outcomes)} | {gone} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--other-folder", type=Path)
    parser.add_argument("--other-host", default="")
    parser.add_argument("--only", choices=SITUATIONS, action="append")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", metavar="FILE")
    args = parser.parse_args()
    draw = random.Random(args.seed)
    results: dict[str, list[Outcome]] = {}
    with tempfile.TemporaryDirectory(prefix="moetrain-owner-") as local:
        write_text(Path(local) / "text")
        without_plots(Path(local) / "stub")
        folder = args.folder or Path(local)
        prefix = tuple(shlex.split(args.other_host))
        place = Place(folder, args.other_folder or folder, prefix, Path(local))
        for number, situation in enumerate(args.only or SITUATIONS):
            outcomes = results.setdefault(situation, [])
            for repetition in range(args.runs):
                name = f"owner_{os.getpid()}_{number}_{repetition}"
                outcomes.append(SITUATIONS[situation](place, name, draw))
                print(f"{situation} {repetition + 1}: {outcomes[-1].wrong or 'right'}", flush=True)
                shutil.rmtree(folder / name, ignore_errors=True)
    print(table(results))
    found = {situation: [asdict(outcome) for outcome in outcomes] for situation, outcomes in results.items()}
    write_json(args.json, {"results": found, "machine": machine()})
    return int(any(outcome.wrong for outcomes in results.values() for outcome in outcomes))


if __name__ == "__main__":
    raise SystemExit(main())

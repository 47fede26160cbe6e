"""Train on four ranks, break each run once at a random moment, start it again until it ends, and count.

    python benchmarks/chaos.py --runs 50 [--seed 0] [--only WORDS] [--folder DIR] [--json FILE]

Each run is a tiny MoE on two pairs of experts' ranks (``parallel.ep=2``), started by torchrun, with one fault
of chaos_faults.py; then the same command starts it again until it has ended, ``MOST`` starts at the most. A
run is right where every start ended in time, the last one with exit code 0; no completed checkpoint was lost
(each start goes on from the newest one that the fault left whole); every row of metrics.jsonl (but for the
clock) and the bytes of the final checkpoint equal those of a run that nobody touched; what happened was
named; and no process outlived its launcher by 20 s. Linux; disks and links need root, the clock a C compiler.
The exit code is 1 where any run was wrong.
"""

from __future__ import annotations

import argparse
import random
import re
import shutil
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from chaos_faults import FAULTS, Fault, Struck
from chaos_start import STEPS, Case, Start
from folder_owner import without_plots
from kill_resume import curve, final_state, write_text
from timing import machine, write_json

from moetrain.checkpoint.manifest import verify

MOST = 5  # starts of a run
LIMIT = 150.0  # seconds of a start, after which it counts as hung
RESUMED = re.compile(r"resuming from \S*step_(\d+):")


@dataclass(frozen=True)
class Outcome:
    """One run. ``ends``: seconds from the fault to the launchers' end, or to the kill that followed."""

    fault: str
    victim: str
    step: int
    starts: int
    finished: bool
    hung: int
    lost: int
    equal: bool
    named: bool
    orphans: int
    ends: float
    seconds: float

    @property
    def right(self) -> bool:
        return self.finished and self.equal and self.named and not (self.hung or self.lost or self.orphans)

    def __str__(self) -> str:
        wrong = [] if self.finished else ["not finished"]
        wrong += [f"{n} {what}" for n, what in ((self.hung, "hung"), (self.lost, "checkpoints lost")) if n]
        wrong += [f"{self.orphans} orphans"] if self.orphans else []
        wrong += [] if self.equal else ["another result"]
        wrong += [] if self.named else ["not named"]
        found = ", ".join(wrong) or "right"
        where = f"{self.victim}, step {self.step}"
        return f"{self.fault} ({where}): {self.starts} starts, {self.seconds:.0f} s: {found}"


class Run:
    """One run with one fault; ``whole`` is the run to compare it with."""

    def __init__(self, case: Case, fault: Fault, whole: Path, draw: random.Random) -> None:
        self.case, self.fault, self.whole, self.draw = case, fault, whole, draw
        self.hung = self.lost = self.orphans = 0
        self.said = ""
        self.ends = 0.0

    def go(self) -> Outcome:
        began = time.monotonic()
        with self.fault.prepare(self.case) as self.case:
            struck, step = self._first()
            starts, codes = 1, [1]
            while any(codes) and starts < MOST and not self.hung:
                codes = self._again(starts, struck.damaged)
                starts += 1
            run = self.case.run
            finished = not any(codes)
            equal = finished and curve(run) == curve(self.whole)
            equal = equal and final_state(run, STEPS) == final_state(self.whole, STEPS)
        named = all(text in self.said for text in struck.says)
        return Outcome(
            self.fault.name, struck.victim, step, starts, finished, self.hung, self.lost, equal, named,
            self.orphans, self.ends, time.monotonic() - began,
        )  # fmt: skip

    def _first(self) -> tuple[Struck, int]:
        """The start that is struck, and the step in which."""
        start = Start(self.case, 0)
        try:
            target = self.draw.randrange(7, STEPS - 6)  # two checkpoints are there
            start.until(lambda: start.rows() >= target, LIMIT)
            time.sleep(self.draw.uniform(0.0, 0.15))
            if self.fault.saving:
                start.until(start.saving, LIMIT)
            step = start.rows()
            struck_at = time.monotonic()
            struck = self.fault.strike(start, self.draw)
            self._ended(start, start.wait(LIMIT))
            self.ends = time.monotonic() - struck_at
            self.fault.mend(self.case)
        finally:
            start.end()
        self._lost(start.newest, struck.damaged)
        return struck, step

    def _again(self, number: int, damaged: Path | None) -> list[int]:
        """The exit codes of one more start; it must go on from the newest whole checkpoint."""
        expected = self._whole_steps()[-1]
        start = Start(self.case, number)
        try:
            codes = start.wait(LIMIT)
            self._ended(start, codes)
        finally:
            start.end()
        if (resumed := RESUMED.search(start.output())) is not None:
            self.lost += int(resumed[1]) != expected
        elif codes is not None and not any(codes):
            self.lost += expected > 0
        self._lost(start.newest, damaged)
        return codes or [1]

    def _ended(self, start: Start, codes: list[int] | None) -> None:
        self.hung += codes is None
        self.orphans += 0 if codes is None else start.orphans()
        self.said += start.output()

    def _lost(self, seen: int, damaged: Path | None) -> None:
        """Count it where a checkpoint that was complete is not there, or not intact."""
        whole = self._whole_steps()
        if damaged is not None:
            seen = min(seen, whole[-1])
        self.lost += whole[-1] < seen or any(verify(p) for p in self._checkpoints() if p != damaged)

    def _checkpoints(self) -> list[Path]:
        return sorted((self.case.run / "checkpoints").glob("step_*"))

    def _whole_steps(self) -> list[int]:
        return [0, *(int(path.name[5:]) for path in self._checkpoints() if not verify(path))]


def untouched(case: Case) -> None:
    start = Start(case, 0)
    try:
        if start.wait(LIMIT) != [0]:
            raise SystemExit(f"the run that nobody touches failed:\n{start.output()}")
    finally:
        start.end()


def chaos(folder: Path, runs: int, seed: int, faults: Sequence[Fault]) -> list[Outcome]:
    """``runs`` runs in ``folder``, the faults in turn."""
    draw = random.Random(seed)
    write_text(folder / "text")
    without_plots(folder / "stub")
    cache = folder / "cache"
    whole = Case(folder / "whole", folder, cache)
    untouched(whole)
    found = []
    for number in range(runs):
        fault = faults[number % len(faults)]
        case = Case(folder / f"run{number:02}", folder, cache)
        found.append(Run(case, fault, whole.run, draw).go())
        print(f"{number + 1:2}: {found[-1]}", flush=True)
        if found[-1].right:
            shutil.rmtree(case.run, ignore_errors=True)
    return found


def table(found: Sequence[Outcome]) -> str:
    head = ["fault", "runs", "finished", "hung", "checkpoints lost", "equal to the bit", "named", "orphans"]
    head += ["starts", "seconds from the fault to the end (median, most)"]
    lines = [head, ["---", *["---:"] * (len(head) - 1)]]
    names = list(dict.fromkeys(one.fault for one in found))
    for name in [*names, "all"]:
        some = [one for one in found if name in (one.fault, "all")]
        ends = [one.ends for one in some]
        lines.append([
            name, str(len(some)), str(sum(o.finished for o in some)), str(sum(o.hung for o in some)),
            str(sum(o.lost for o in some)), str(sum(o.equal for o in some)), str(sum(o.named for o in some)),
            str(sum(o.orphans for o in some)), str(sum(o.starts for o in some)),
            f"{statistics.median(ends):.1f}, {max(ends):.1f}",
        ])  # fmt: skip
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def possible(words: str | None) -> list[Fault]:
    """The faults whose names hold ``words`` and that can be made here; the others are named."""
    chosen = [fault for fault in FAULTS if words is None or words in fault.name]
    for fault in chosen:
        if (why := fault.refused()) is not None:
            print(f"left out: {fault.name}: {why}")
    return [fault for fault in chosen if fault.refused() is None]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--runs", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", metavar="WORDS", help="faults whose names hold these words")
    parser.add_argument("--folder", type=Path, help="where runs are made and those that went wrong are kept")
    parser.add_argument("--json", metavar="FILE")
    args = parser.parse_args()
    faults = possible(args.only)
    if not faults:
        parser.error("no fault is left")
    with tempfile.TemporaryDirectory(prefix="moetrain-chaos-") as folder:
        found = chaos(args.folder or Path(folder), args.runs, args.seed, faults)
    print(table(found))
    result: dict[str, Any] = {"runs": [asdict(one) for one in found], "machine": machine()}
    write_json(args.json, result)
    return int(not all(one.right for one in found))


if __name__ == "__main__":
    raise SystemExit(main())

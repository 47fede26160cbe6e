"""Runs mutations in this process: ``python -m fuzz.worker WORLD SCRATCH DESCRIPTOR LIMITS``.

A line on stdin is a job, ``TARGET SEED``; its outcome goes to the descriptor as a line of JSON. The parent
(``runner.py``) watches memory and time from outside. Processor time is watched here too, for a hang's place.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import resource
import shutil
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from random import Random
from types import FrameType, TracebackType
from typing import Any

from fuzz.outcome import BEGUN, Limits, Outcome
from fuzz.planted import PLANTED
from fuzz.target import FaultError, Target, Way
from fuzz.trees import SECRET
from moetrain.errors import UserError

_ADDRESSES = (
    8 * 10**9
)  # bytes of addresses above those at the start: more is an allocation that no file is worth
_goods: dict[tuple[str, str], Any] = {}


class _Hang(BaseException):
    """The processor time of one mutation is spent."""


def run(
    target: Target, seed: int, world: Path, scratch: Path, limits: Limits, begin: Callable[[], None]
) -> Outcome:
    """Mutate a copy of the world, call ``begin`` and read it."""
    with _copy(world, scratch, target):
        random = Random(f"{target.name} {seed}")
        way, note = target.mutate(random)
        good = _good(target, way, world, scratch)
        begin()
        return replace(_judged(target, way, good, limits), seed=seed, note=note)


def _good(target: Target, way: Way, world: Path, scratch: Path) -> Any:
    """What the way gives for the unmutated files."""
    key = (target.name, way.name)
    if key not in _goods:
        with _copy(world, scratch.with_name(f"{scratch.name}_good"), target), _quiet():
            _goods[key] = way.load()
            if complaint := way.judge(_goods[key], _goods[key]):
                raise AssertionError(f"{key}: the unmutated files are judged as {complaint}")
    return _goods[key]


@contextlib.contextmanager
def _copy(world: Path, scratch: Path, target: Target) -> Any:
    before = Path.cwd()
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    for part in target.parts:
        copy = shutil.copytree if (world / part).is_dir() else shutil.copy2
        copy(world / part, scratch / part)
    os.chdir(scratch)
    try:
        yield
    finally:
        os.chdir(before)


@contextlib.contextmanager
def _quiet() -> Any:
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield


def _judged(target: Target, way: Way, good: Any, limits: Limits) -> Outcome:
    blank = Outcome(target.name, 0, "equal")
    begun, alarms = time.process_time(), []

    def alarm(number: int, frame: FrameType | None) -> None:
        alarms.append(number)
        raise _Hang

    Path("/proc/self/clear_refs").write_text("5")  # the peak is of this mutation
    held = _status("VmRSS")
    signal.signal(signal.SIGPROF, alarm)
    signal.setitimer(signal.ITIMER_PROF, limits.seconds, 0.5)  # again, in case somebody catches it
    try:
        try:
            with _quiet():
                found = way.load()
                complaint = None if found is good else way.judge(good, found)
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
        if complaint:
            kind, _, says = complaint.partition(": ")
            outcome = replace(blank, kind=kind, place=way.name, says=says)
        elif SECRET in repr(found):
            outcome = replace(blank, kind="leak", place=way.name)
        else:
            outcome = replace(blank, kind="equal" if _same(good, found) else "fits")
    except UserError as error:
        outcome = _refused(blank, error)
    except FaultError as error:
        kind, _, says = str(error).partition(": ")
        outcome = replace(blank, kind=kind, place=_place(error.__traceback__), says=says)
    except BaseException as error:
        kind = "memory" if isinstance(error, MemoryError) or "allocate memory" in str(error) else "other"
        where = f"{_place(error.__traceback__)} {type(error).__name__}"
        outcome = replace(blank, kind=kind, place=where, says=str(error)[:300])
    if alarms:
        outcome = replace(outcome, kind="hang")
    if (peak := _status("VmHWM") - held) > limits.memory:
        outcome = replace(outcome, kind="memory", says=f"{peak / 1e9:.1f} GB")
    return replace(outcome, seconds=time.process_time() - begun)


def _refused(blank: Outcome, error: UserError) -> Outcome:
    """What is wrong with an error line."""
    line = str(error)
    blank = replace(blank, says=line[:300])
    if SECRET in line:
        return replace(blank, kind="leak")
    return replace(blank, kind="refused")


def _same(good: Any, found: Any) -> bool:
    try:
        return bool(repr(found) == repr(good))
    except Exception:
        return False


def _place(trace: TracebackType | None) -> str:
    frames = [
        f for f in traceback.extract_tb(trace) if "/moetrain/" in f.filename and "/tests/" not in f.filename
    ]
    if not frames:
        frames = list(traceback.extract_tb(trace))[-1:]
    return f"{frames[-1].filename.rpartition('/moetrain/')[2]}:{frames[-1].lineno}" if frames else ""


def _status(key: str) -> int:
    """Bytes that /proc/self/status tells."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    return 0


def _real(name: str) -> Target:
    from fuzz.catalogue import KNOWN, TARGETS  # which take seconds to import

    return TARGETS[name] if name in TARGETS else KNOWN[name]


def main() -> None:
    world, scratch, answers = (
        Path(sys.argv[1]).resolve(),
        Path(sys.argv[2]).resolve(),
        os.fdopen(int(sys.argv[3]), "w"),
    )
    limits = Limits(**json.loads(sys.argv[4]))
    os.environ["FUZZ_SECRET"] = SECRET
    warnings.simplefilter("ignore")

    def say(text: str) -> None:
        print(text, file=answers, flush=True)

    for line in sys.stdin:
        name, seed = line.split()
        target = PLANTED[name] if name in PLANTED else _real(name)
        limit = _status("VmSize") + _ADDRESSES
        resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))
        outcome = run(target, int(seed), world, scratch, limits, lambda: say(BEGUN.decode()))
        say(json.dumps(asdict(outcome)))


if __name__ == "__main__":
    main()

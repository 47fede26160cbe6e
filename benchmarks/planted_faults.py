"""Plant faults in copies of the kernels, one at a time, and show what sees each.

    python benchmarks/planted_faults.py [--only grouped.up ...] [--table FILE]

A fault is a replaced piece of text: an index times a stride in 32 bits, a mask left out, rows out of order,
an expert (or a block, an assignment) passed over. For each the quickest test that should fail by it runs in a
process of its own; or, for some 32-bit products, a kernel is compiled and its addresses are read
(kernels_static.py). It fails where a fault is not seen, where its text no longer stands exactly once in the
file, and where a test fails without any fault.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from planted_faults_list import FAULTS, Fault

ROOT = Path(__file__).resolve().parents[1]
_COPIED = ("kernels", "moetrain", "configs", "benchmarks", "tests/kernels", "tests/helpers", "pyproject.toml")
_NARROW = re.compile(r"in 32 bits reaches an address")


@dataclass(frozen=True)
class Outcome:
    """Whether what was run found something wrong, its words for it, and the seconds it took."""

    seen: bool
    words: str
    seconds: float


def copy_to(folder: Path) -> None:
    """What the tests of kernels need of the repository; links stay links."""
    for name in _COPIED:
        source, target = ROOT / name, folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            ignored = shutil.ignore_patterns("__pycache__")
            shutil.copytree(source, target, symlinks=True, ignore=ignored)
        else:
            shutil.copy(source, target)


def planted(text: str, fault: Fault) -> str:
    """The file with the fault. Raises ValueError unless the text to replace stands in it exactly once."""
    found = text.count(fault.old)
    if found != 1:
        raise ValueError(
            f"kernels/{fault.file}: {fault.old!r} stands there {found} times, not once: the fault "
            f"{fault.kernel}, {fault.kind} of planted_faults_list.py must follow what the kernel has become"
        )
    return text.replace(fault.old, fault.new)


def run(folder: Path, check: str) -> Outcome:
    """A check in a process of its own: ``static MODULE EVERY``, or pytest's arguments."""
    environment = {**os.environ, "PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1"}
    if check.startswith("static "):
        _, module, every = check.split()
        environment.pop("TRITON_INTERPRET", None)
        command = ["benchmarks/kernels_static.py", "--archs", "sm_80", "--jobs", "1"]
        command += ["--modules", module, "--every", every]
    else:
        environment["TRITON_INTERPRET"] = "1"
        file, _, words = check.partition(" ")
        command = ["-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "--confcutdir", "tests/kernels"]
        command += ["-m", "not slow", f"tests/kernels/{file}", "-k", words]
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, *command], cwd=folder, env=environment, capture_output=True, text=True, timeout=280
    )
    seconds, output = time.monotonic() - started, done.stdout + done.stderr
    if check.startswith("static "):
        if done.returncode or " 0 compiled" in output or "does not compile" in output:
            raise RuntimeError(f"{check} did not compile a kernel:\n{output[-2000:]}")
        return Outcome(bool(_NARROW.search(output)), "a 32-bit product reaches an address", seconds)
    if done.returncode not in (0, 1) and done.returncode > 0:
        raise RuntimeError(f"pytest {check} ran no test:\n{output[-2000:]}")
    failed = re.search(r"^FAILED \S*?(\w+\.py::\w+)", output, flags=re.M)
    words = failed[1] if failed else "the test's process died" if done.returncode else ""
    return Outcome(bool(done.returncode), words, seconds)


def outcomes(folder: Path, faults: list[Fault]) -> Iterator[tuple[Fault, Outcome]]:
    """Each fault by itself; the file is put back before the next."""
    for fault in faults:
        path = folder / "kernels" / fault.file
        right = path.read_text()
        path.write_text(planted(right, fault))
        try:
            yield fault, run(folder, fault.check)
        finally:
            path.write_text(right)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", default=[], help="kernels whose name begins so")
    parser.add_argument("--table", help="write the table here as Markdown")
    args = parser.parse_args()
    faults = [f for f in FAULTS if not args.only or f.kernel.startswith(tuple(args.only))]
    lines = ["| kernel | fault | seen by | seconds |", "|---|---|---|---:|"]
    missed = 0
    with tempfile.TemporaryDirectory(prefix="planted_faults_") as name:
        folder = Path(name)
        copy_to(folder)
        for fault in faults:
            planted((folder / "kernels" / fault.file).read_text(), fault)
        for check in dict.fromkeys(fault.check for fault in faults):
            if (found := run(folder, check)).seen:
                raise RuntimeError(f"{check} fails without any fault: {found.words}")
        for fault, found in outcomes(folder, faults):
            missed += not found.seen
            seen_by = f"`{found.words}`" if "::" in found.words else found.words
            lines.append(
                f"| {fault.kernel} | {fault.kind} | {seen_by if found.seen else '**nothing**'} "
                f"| {found.seconds:.0f} |"
            )
            print(lines[-1], flush=True)
    print(f"{len(faults)} faults, {len(faults) - missed} seen")
    if args.table:
        Path(args.table).write_text("\n".join(lines) + "\n")
    return bool(missed)


if __name__ == "__main__":
    sys.exit(main())

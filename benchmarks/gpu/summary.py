"""What a folder of ``run.sh`` says, against the targets of this project.

    python benchmarks/gpu/summary.py FOLDER

Exits with 1 where something is wrong: a test that failed, an error above its bound, bits that differ, more
memory than the bound. Missed speeds are told. A step that did not run, or whose file cannot be read, is "not
measured".
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

OURS = "moetrain"
# TFLOP/s that Liger-Kernel's authors report for their fused kernels on an H100, bf16, 32k tokens
CLAIMED = {"forward": 501, "forward + backward": 413}
CLAIMED_SHAPE, CLAIMED_GPUS = "Qwen3-30B-A3B", ("H100", "H200")
_NOT_LAYERS = ("dense SwiGLU", "dense Llama")  # as fast as arithmetic allows, and no mixture of experts


@dataclass(frozen=True)
class Verdict:
    """``met`` is None where nothing was measured. ``wrong``: not a matter of speed."""

    target: str
    found: str
    met: bool | None
    wrong: bool = False

    def __str__(self) -> str:
        word = {True: "met", False: "WRONG" if self.wrong else "missed", None: "not measured"}[self.met]
        return f"{word:13}{self.target}: {self.found}"


def read(path: Path) -> Any:
    """The JSON of a step, or the reason why there is none."""
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        return f"no {path.name}"
    except (OSError, ValueError, RecursionError) as error:
        return f"{path.name} cannot be read: {str(error).splitlines()[0]}"


def tests(folder: Path) -> Iterator[Verdict]:
    target, path = "kernels' tests on the GPU", folder / "tests.xml"
    try:
        suites = ElementTree.fromstring(path.read_text()).iter("testsuite")
        counts = [
            {key: int(s.get(key, 0)) for key in ("tests", "failures", "errors", "skipped")} for s in suites
        ]
    except (OSError, ValueError, ElementTree.ParseError):
        yield Verdict(target, "no tests.xml", None)
        return
    total = {key: sum(count[key] for count in counts) for key in ("tests", "failures", "errors", "skipped")}
    bad, ran = total["failures"] + total["errors"], total["tests"] - total["skipped"]
    yield Verdict(
        target, f"{ran} ran, {bad} failed, {total['skipped']} skipped", not bad if ran else None, True
    )


def largest_error(row: dict[str, Any]) -> float:
    """Of a unit's outputs; infinite for what is no number."""
    return max(math.inf if math.isnan(error) else error for error in row["errors"])


def kernels(found: Any, name: str, gpu: str) -> Iterator[Verdict]:
    rows = found["rows"]
    if not rows:
        raise ValueError("no row")
    worst = max(rows, key=largest_error)
    where = f"{worst['unit']}, {worst['shape']} {worst['load']} {worst['dtype']}"
    most = largest_error(worst)
    yield Verdict(
        f"{name}: errors within bounds", f"{most:.2f} of the bound at most ({where})", most <= 1, True
    )
    differ = [row["unit"] for row in rows if not row["equal_bits"]]
    yield Verdict(f"{name}: equal bits", f"{len(differ)} of {len(rows)} differ", not differ, True)
    for row in rows:
        ours, place = row["ways"][OURS], f"{row['unit']}, {row['shape']} {row['load']} {row['dtype']}"
        claimed = CLAIMED.get(row["unit"])
        if claimed and (row["shape"], row["load"], row["dtype"]) == (CLAIMED_SHAPE, "uniform", "bf16"):
            comparable = any(known in gpu for known in CLAIMED_GPUS)
            said = f"{ours['tflops']:.0f} TFLOP/s on {gpu}"
            met = ours["tflops"] >= claimed if comparable else None
            yield Verdict(f"{place}: {claimed} TFLOP/s (claimed by Liger on an H100)", said, met)
        others = {way: figures for way, figures in row["ways"].items() if way != OURS}
        if others:
            best = min(others, key=lambda way: others[way]["ms"])
            ratio = others[best]["ms"] / ours["ms"]
            yield Verdict(f"{place}: faster than {best}", f"{ratio:.2f} times as fast", ratio >= 1)
    for job in found["left_out"]:
        yield Verdict(job, "did not fit", None)


def speeds(found: dict[str, Any], kind: str) -> Iterator[Verdict]:
    """Of layers or steps: ours against the fastest other in each setting."""
    for place, figures in found.items():
        others = {
            name: each["speedup_of_ours"]
            for name, each in figures[kind].items()
            if name not in (OURS, *_NOT_LAYERS)
        }
        if others:
            best = min(others, key=others.__getitem__)
            yield Verdict(
                f"{place}: faster than {best}", f"{others[best]:.2f} times as fast", others[best] >= 1
            )


def memory(found: Any) -> Iterator[Verdict]:
    faults = found["faults"]
    said = "; ".join(faults) or f"all of {len(found['shapes'])} settings"
    yield Verdict("bytes for backward within the bound, and others above it", said, not faults, True)


def determinism(found: Any) -> Iterator[Verdict]:
    differ = [
        f"{place} {rung}"
        for place, rungs in found["shapes"].items()
        for rung, names in rungs.items()
        if names
    ]
    said = f"differ: {', '.join(differ)}" if differ else "none differs"
    yield Verdict(f"the layer's bits over {found['runs']} runs", said, not differ, True)


def verdicts(folder: Path) -> list[Verdict]:
    """All targets, in the order of the steps."""
    environment = read(folder / "environment.json")
    gpu = (
        str((environment.get("gpu") or {}).get("name")) if isinstance(environment, dict) else "an unknown GPU"
    )
    readers: dict[str, Callable[[Any], Iterator[Verdict]]] = {
        "kernels": lambda found: kernels(found, "feed-forward", gpu),
        "layer": lambda found: speeds(found["shapes"], "layers"),
        "determinism": determinism,
        "memory": memory,
        "step": lambda found: speeds(found["dtypes"], "models"),
        "kernels_parts": lambda found: kernels(found, "each kernel", gpu),
    }
    result = list(tests(folder))
    for name, reader in readers.items():
        found = read(folder / f"{name}.json")
        if isinstance(found, str):
            result.append(Verdict(name, found, None))
            continue
        try:
            result += reader(found)
        except (KeyError, TypeError, ValueError, AttributeError) as error:  # cut off, or of another version
            result.append(Verdict(name, f"{name}.json lacks {type(error).__name__} {error}", None))
    return result


def heading(folder: Path) -> list[str]:
    environment, lines = read(folder / "environment.json"), []
    if isinstance(environment, dict):
        if note := environment.get("note"):
            lines.append(str(note))
        versions = environment.get("versions", {})
        lines.append(f"{environment.get('gpu')}")
        lines.append(", ".join(f"{name} {version}" for name, version in versions.items() if version))
    steps = folder / "steps.jsonl"
    for line in steps.read_text().splitlines() if steps.exists() else []:
        ended = json.loads(line)
        words = {
            None: "did not fit",
            0: "done",
            124: "ended by its time-out",
            -1: "lacks what environment.json says",
        }
        how = words.get(ended["code"], f"exit code {ended['code']}")
        lines.append(f"{ended['step']}: {how}, {ended['seconds']} s")
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    if not folder.is_dir():
        print(f"summary: {folder} is no folder; give the one that run.sh wrote")
        return 2
    found = verdicts(folder)
    counts = {met: sum(v.met is met for v in found) for met in (True, False, None)}
    print("\n".join([*heading(folder), "", *map(str, found), ""]))
    print(f"{counts[True]} met, {counts[False]} not met, {counts[None]} not measured")
    return any(v.met is False and v.wrong for v in found)


if __name__ == "__main__":
    sys.exit(main())

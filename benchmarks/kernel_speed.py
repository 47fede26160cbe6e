"""Each kernel on a GPU: time beside torch's own ways, error beside fp64, and whether repeats have equal bits.

    python benchmarks/kernel_speed.py [--shapes Qwen3-30B-A3B A B C] [--loads uniform zipf]
                                 [--dtypes bf16 fp16 fp32] [--whole] [--seconds 120] [--out FILE]
    python benchmarks/kernel_speed.py --dry-run       says what it would run, on any machine

Times are CUDA events around one call, ways interleaved in random order, the L2 cache overwritten before each
call; medians and quartiles. TFLOP/s count useful products only: no padding, no recomputation. Errors are the
largest of |found - reference| over a bound that running error analysis derives (``bounded.py``), on the same
problem with 512 tokens, for which fp64 takes little time: above 1 the kernel is wrong. Problems are in order
of worth, and what did not fit into ``--seconds`` is said. Exits with 1 where an error is above its bound or
bits differ.

Shapes: T tokens, D model, F hidden, E experts, k experts a token.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from peers import OURS, PUBLISHED, SHAPES
from timing import machine, write_json
from torch import Tensor

BEST_FIRST = [*(name for name in PUBLISHED if name not in SHAPES), *SHAPES]
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
LOADS = ("uniform", "zipf")
CHECKED_TOKENS = 512
REPEATS = 3  # of the whole problem, for equal bits
_FLUSH_BYTES = 256 << 20  # several times the L2 cache of any GPU


@dataclass(frozen=True)
class Job:
    """One problem; ``parts``: kernel by kernel too, not the whole feed-forward alone."""

    shape: str
    load: str
    dtype: str
    parts: bool

    def __str__(self) -> str:
        what = "the whole and each kernel" if self.parts else "forward, forward + backward"
        return f"{self.shape} {self.load} {self.dtype}: {what}"


def jobs(shapes: list[str], loads: list[str], dtypes: list[str], whole: bool) -> Iterator[Job]:
    """By dtype, and the even loads of a dtype before the skewed ones, for which kernels are not repeated."""
    for dtype in dtypes:
        for load in loads:
            for shape in shapes:
                yield Job(shape, load, dtype, parts=not whole and load == loads[0])


def timed(runs: dict[str, Any], repetitions: int, flush: Tensor) -> dict[str, list[float]]:
    """Milliseconds of each call; the runs interleaved, after one call of each that is not counted."""
    events: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {name: [] for name in runs}
    order, names = random.Random(0), list(runs)
    for run in runs.values():
        run()
    for _ in range(repetitions):
        for name in order.sample(names, len(names)):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            flush.zero_()  # also keeps the device busy while the host launches what is timed
            start.record()
            runs[name]()
            end.record()
            events[name].append((start, end))
    torch.cuda.synchronize()
    return {name: [start.elapsed_time(end) for start, end in pairs] for name, pairs in events.items()}


def repetitions_within(run: Any, most: int, seconds: float) -> int:
    """As many as take ``seconds``, by one call of ``run``; 3 at least."""
    run()
    torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    torch.cuda.synchronize()
    return max(3, min(most, int(seconds / max(time.perf_counter() - start, 1e-6))))


def outputs(unit: Any, problem: Any) -> list[Tensor]:
    """Of ``ours``: what lies on rows of assignments, in memory of its own."""
    rows, used = len(problem.rows.ids_R), problem.used_R
    return [out[used] if len(out) == rows else out.clone() for out in unit.ours()]


def errors(unit: Any, problem: Any) -> list[float]:
    """Of each output, in units of its bound."""
    rows, used = len(problem.rows.ids_R), problem.used_R
    wanted = [x[used] if len(x.value) == rows else x for x in unit.reference()]
    return [want.ratio(found) for want, found in zip(wanted, outputs(unit, problem), strict=True)]


def equal_bits(unit: Any, problem: Any) -> bool:
    first = outputs(unit, problem)
    again = (outputs(unit, problem) for _ in range(REPEATS - 1))
    return all(all(torch.equal(a, b) for a, b in zip(first, other, strict=True)) for other in again)


def measure(unit: Any, problem: Any, repetitions: int, flush: Tensor) -> dict[str, Any]:
    """Times of all ways; one that fails here is left out, with the reason."""
    runs, failed = {OURS: unit.ours}, {}
    for name, run in unit.others.items():
        try:
            run()
            torch.cuda.synchronize()
            runs[name] = run
        except Exception as error:  # torch may have no such product for this type or device
            failed[name] = f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
    times = timed(runs, min(repetitions_within(run, repetitions, 1.0) for run in runs.values()), flush)
    found = {}
    for name, values in times.items():
        low, middle, high = statistics.quantiles(values, n=4)
        found[name] = {"ms": middle, "quartiles": [low, high], "repetitions": len(values)}
        found[name]["tflops"] = unit.flops / middle / 1e9
    return {"ways": found, "failed": failed}


def run_job(job: Job, repetitions: int, flush: Tensor) -> list[dict[str, Any]]:
    from kernel_problem import draw
    from kernel_units import units

    from moetrain.ops.experts.blocks import usual_block

    shape, device = PUBLISHED[job.shape], flush.device
    assignments = shape.tokens * shape.top_k
    block = usual_block(device, DTYPES[job.dtype], assignments, shape.experts)
    small = draw(replace(shape, tokens=CHECKED_TOKENS), job.load, DTYPES[job.dtype], device, block)
    off = {unit.name: errors(unit, small) for unit in units(small, job.parts)}
    del small
    whole, rows = draw(shape, job.load, DTYPES[job.dtype], device, block), []
    for unit in units(whole, job.parts):
        row = {**asdict(job), "unit": unit.name, "flops": unit.flops, "errors": off[unit.name]}
        row["equal_bits"] = equal_bits(unit, whole)
        row |= measure(unit, whole, repetitions, flush)
        rows.append(row)
        print(line(row), flush=True)
    return rows


def line(row: dict[str, Any]) -> str:
    ways = []
    for name, way in row["ways"].items():
        low, high = way["quartiles"]
        speed = f", {way['tflops']:.0f} TFLOP/s" if row["flops"] else ""
        ways.append(f"{name} {way['ms']:.3f} ms ({low:.3f} to {high:.3f}{speed})")
    ways += [f"{name} failed ({reason})" for name, reason in row["failed"].items()]
    bits = "equal bits" if row["equal_bits"] else "BITS DIFFER"
    return f"  {row['unit']:20} {'; '.join(ways)}; error {max(row['errors']):.2f} of its bound; {bits}"


def faults(rows: list[dict[str, Any]]) -> list[str]:
    """Kernels that are wrong, or not the same twice."""
    found = []
    for row in rows:
        where = f"{row['shape']} {row['load']} {row['dtype']} {row['unit']}"
        if not max(row["errors"]) <= 1:
            found.append(f"{where}: error {max(row['errors']):.3g} of its bound")
        if not row["equal_bits"]:
            found.append(f"{where}: {REPEATS} runs have different bits")
    return found


def run_all(wanted: list[Job], seconds: float, repetitions: int, out: str | None) -> int:
    start = time.perf_counter()
    flush = torch.empty(_FLUSH_BYTES, dtype=torch.int8, device="cuda")
    result: dict[str, Any] = {"machine": machine(), "rows": [], "left_out": []}
    print(result["machine"])
    for job in wanted:
        if time.perf_counter() - start > seconds:
            result["left_out"].append(str(job))
            continue
        print(job, flush=True)
        try:
            result["rows"] += run_job(job, repetitions, flush)
        except torch.OutOfMemoryError:
            result["left_out"].append(f"{job}, for want of memory")
        torch.cuda.empty_cache()
        write_json(out, result)
    result["faults"] = faults(result["rows"])
    print("\n".join([f"did not fit (--seconds {seconds:.0f}): {job}" for job in result["left_out"]]))
    print("\n".join([*result["faults"], f"{len(result['faults'])} faults"]))
    write_json(out, result)
    return bool(result["faults"])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", default=BEST_FIRST, choices=BEST_FIRST)
    parser.add_argument("--loads", nargs="+", default=list(LOADS), choices=list(LOADS))
    parser.add_argument("--dtypes", nargs="+", default=list(DTYPES), choices=list(DTYPES))
    parser.add_argument(
        "--whole", action="store_true", help="the whole feed-forward alone, no single kernels"
    )
    parser.add_argument("--repetitions", type=int, default=30)
    parser.add_argument("--seconds", type=float, default=600, help="start no problem after so many")
    parser.add_argument("--dry-run", action="store_true", help="say what would be run")
    parser.add_argument("--out")
    args = parser.parse_args()
    wanted = list(jobs(args.shapes, args.loads, args.dtypes, args.whole))
    if args.dry_run:
        print("\n".join([*map(str, wanted), f"{len(wanted)} problems"]))
        return 0
    if not torch.cuda.is_available():
        print(f"kernels are timed on a GPU, and torch {torch.__version__} sees none; --dry-run needs none")
        return 2
    return run_all(wanted, args.seconds, args.repetitions, args.out)


if __name__ == "__main__":
    sys.exit(main())

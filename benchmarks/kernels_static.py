"""Compile every kernel at every shipped tile for GPUs that are not here, and read the binaries.

    python benchmarks/kernels_static.py [--archs sm_90 gfx942] [--modules grouped] [--every 7] [--jobs 2]
        [--out FILE] [--table FILE] [--check FILE]

Of each: registers, spills, shared memory, tensor-core instructions, occupancy, bytes and FLOPs a step of a
tile, and whether a 32-bit product reaches an address (kernel_addresses.py). ``--check FILE`` compares with
what ``--out`` has written, and fails where a kernel spills, takes more shared memory than a block may have,
lacks tensor-core instructions in a product, multiplies an index in 32 bits, or has more than ``GROWTH`` more
registers than there (by the same version of Triton).
"""

from __future__ import annotations

import argparse
import importlib
import json
import multiprocessing
import os
import sys
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

import torch
import triton
from kernel_build import Built, compile_for
from roofline import bounds, tile_work

from moetrain.kernels.specimen import Specimen
from moetrain.kernels.tiles import ARCHITECTURES, Arch

KERNELS = Path(__file__).resolve().parents[1] / "kernels"
GROWTH = 0.1  # and eight registers, the step in which they are given
Row = dict[str, Any]


def modules(only: Iterable[str] = ()) -> list[str]:
    """The modules of kernels that have specimens; of those named, the ones whose path begins so."""
    names = sorted(
        ".".join(path.relative_to(KERNELS).with_suffix("").parts) for path in KERNELS.rglob("*.py")
    )
    wanted = [n for n in names if not n.startswith("twins.") and (not only or n.startswith(tuple(only)))]
    return [name for name in wanted if "def specimens(" in _path(name).read_text()]


def _path(name: str) -> Path:
    return KERNELS.joinpath(*name.split(".")).with_suffix(".py")


@cache
def specimens(module: str, arch: str) -> list[Specimen]:
    found: list[Specimen] = importlib.import_module(f"moetrain.kernels.{module}").specimens(
        ARCHITECTURES[arch]
    )
    names = [each.name for each in found]
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise ValueError(f"{module}.specimens: the names {', '.join(repeated)} stand for several specimens")
    return found


def build(job: tuple[str, str, int]) -> Row:
    """The row of one specimen; ``error`` is set where it does not compile."""
    module, arch, index = job
    specimen = specimens(module, arch)[index]
    row: Row = {"module": module, "arch": arch, "name": specimen.name, "products": specimen.products}
    if specimen.tile is not None:
        itemsize = 4 if "*fp32" in specimen.signature.values() else 2
        row["tile"] = asdict(specimen.tile)
        row["flops"], row["bytes"] = tile_work(specimen.tile, itemsize, specimen.accumulators)
    try:
        built: Built = compile_for(specimen, ARCHITECTURES[arch])
    except Exception as error:  # whatever a compiler raises is this specimen's result
        return row | {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
    return row | asdict(built)


def faults(row: Row, arch: Arch) -> Iterator[str]:
    """What is wrong with a kernel by itself."""
    where = f"{row['arch']} {row['module']} {row['name']}"
    if "error" in row:
        yield f"{where}: does not compile: {row['error']}"
        return
    if row["spilled"]:
        yield f"{where}: {row['spilled']} bytes a thread are spilled"
    if row["shared"] > arch.shared:
        yield f"{where}: {row['shared']} bytes of shared memory, a block may have {arch.shared}"
    if row["products"] and not row["tensor_cores"]:
        yield f"{where}: no tensor-core instructions"
    for line in row["narrow"]:
        yield f"{where}: {line}"


def regressions(rows: list[Row], recorded: list[Row]) -> Iterator[str]:
    """Kernels with more registers than were recorded, by more than ``GROWTH`` and eight."""
    before = {(r["arch"], r["module"], r["name"]): r.get("registers", 0) for r in recorded}
    for row in rows:
        key = (row["arch"], row["module"], row["name"])
        was, now = before.get(key), row.get("registers", 0)
        if was is not None and now > was * (1 + GROWTH) + 8:
            yield f"{' '.join(key)}: {now} registers a thread, {was} were recorded"


def summary(rows: list[Row]) -> list[str]:
    """A Markdown table: for each kernel and architecture the worst over its specimens."""
    lines = [
        "| kernel | GPU | tiles | registers | spills | shared KB | tensor cores | occupancy | FLOPs a byte |",
        "|---|---|---:|---:|---:|---:|---|---:|---:|",
    ]
    good = [row for row in rows if "error" not in row]
    for key in sorted({(r["module"], r["kernel"], r["arch"]) for r in good}):
        of = [r for r in good if (r["module"], r["kernel"], r["arch"]) == key]
        cores = sorted({word for r in of for word in r["tensor_cores"]})
        work = [r["flops"] / r["bytes"] for r in of if "flops" in r]
        lines.append(
            f"| {key[0]}: {key[1]} | {key[2]} | {len(of)} | {_range([r['registers'] for r in of])} "
            f"| {max(r['spilled'] for r in of)} | {max(r['shared'] for r in of) / 1024:.0f} "
            f"| {', '.join(cores) or '-'} | {_range([round(100 * r['occupancy']) for r in of])} % "
            f"| {_range([round(w) for w in work]) if work else '-'} |"
        )
    return lines


def _range(values: list[int]) -> str:
    low, high = min(values), max(values)
    return f"{low}" if low == high else f"{low} to {high}"


def roofline() -> list[str]:
    """A Markdown table of the bound of each published shape's products."""
    lines = [
        "| GPU | shape | product | tile | TFLOP | arithmetic ms | memory ms | rows | waves | most TFLOP/s |",
        "|---|---|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    for b in bounds():
        tile = f"{b.tile.block_m} x {b.tile.block_n} x {b.tile.block_k}"
        lines.append(
            f"| {b.device} | {b.shape} | {b.product} | {tile} | {b.flops / 1e12:.3f} | {b.arithmetic_ms:.3f} "
            f"| {b.memory_ms:.3f} | {100 * b.padding:.0f} % | {100 * b.last_wave:.0f} % | {b.tflops:.0f} |"
        )
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--archs", nargs="+", default=list(ARCHITECTURES), choices=list(ARCHITECTURES))
    parser.add_argument("--modules", nargs="+", default=[], help="modules of kernels whose path begins so")
    parser.add_argument(
        "--every", type=int, default=1, help="of a module's specimens, compile one in so many"
    )
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--out", help="write every figure here as JSON")
    parser.add_argument("--table", help="write the tables here as Markdown")
    parser.add_argument("--check", help="fail on faults, and on registers beyond those of this JSON")
    args = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET", "0") != "0":
        parser.error("TRITON_INTERPRET is set, and what is interpreted cannot be compiled: unset it")
    jobs = [
        (module, arch, index)
        for module in modules(args.modules)
        for arch in args.archs
        for index in range(0, len(specimens(module, arch)), args.every)
    ]
    torch.set_num_threads(1)
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(args.jobs, mp_context=spawn) as pool:
        rows = list(pool.map(build, jobs, chunksize=4))
    found = [fault for row in rows for fault in faults(row, ARCHITECTURES[row["arch"]])]
    if args.check:
        recorded = json.loads(Path(args.check).read_text())
        if recorded["triton"] == triton.__version__:
            found += regressions(rows, recorded["kernels"])
        else:
            print(f"registers are not compared: {args.check} is of Triton {recorded['triton']}")
    tables = [*summary(rows), "", *roofline()]
    print("\n".join([*tables, *found]))
    print(f"Triton {triton.__version__}: {len(rows)} compiled, {len(found)} faults")
    if args.table:
        Path(args.table).write_text("\n".join(tables) + "\n")
    if args.out:
        _write(Path(args.out), rows)
    return bool(args.check and found)


def _write(path: Path, rows: list[Row]) -> None:
    """JSON with one line a specimen, so that a change shows as the lines of what changed."""
    kept = ["module", "kernel", "arch", "name", "registers", "spilled", "shared", "occupancy", "tensor_cores"]
    kept += ["flops", "bytes", "wide", "wide_ptx", "error"]
    lines = [json.dumps({key: row[key] for key in kept if key in row}) for row in rows]
    text = ",\n".join(lines)
    path.write_text(f'{{"triton": "{triton.__version__}", "kernels": [\n{text}\n]}}\n')


if __name__ == "__main__":
    sys.exit(main())

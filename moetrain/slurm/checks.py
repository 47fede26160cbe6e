"""What one node can find out about itself: each check returns lines that say what is wrong."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

_SIZE = 257  # of the product; a prime
_LEAST = 1 << 30  # bytes of free disk
_BLOCK = 1 << 20
_SECONDS = 30
_ECC = "ecc.errors.uncorrected.volatile.total"
_XID = re.compile(r"NVRM: Xid \(([^)]*)\): (\d+)")
_HARMLESS_XIDS = frozenset({13, 31, 43, 45})  # of a program, not of the GPU, by NVIDIA's list


def check_node(folder: Path) -> list[str]:
    """Everything that is wrong with this node; ``folder`` is one that all nodes share."""
    checks: Sequence[tuple[str, Callable[[], list[str]]]] = (
        ("GPUs", gpus),
        ("errors of GPUs", gpu_errors),
        ("product", products),
        ("temporary folder", lambda: disk(Path(tempfile.gettempdir()))),
        ("run folder", lambda: disk(folder)),
    )
    found = []
    for name, check in checks:
        try:
            found += check()
        except Exception as error:  # whatever a driver or a file system throws is the node's fault
            found.append(f"{name}: {type(error).__name__}: {' '.join(str(error).split())[:200]}")
    return found


def gpus() -> list[str]:
    """The GPUs that Slurm gave this node and those that CUDA sees."""
    told, seen = os.environ.get("SLURM_GPUS_ON_NODE", ""), torch.cuda.device_count()
    if told.isdecimal() and int(told) != seen:
        return [f"Slurm gave {told} GPU(s), and CUDA sees {seen}"]
    return []


def gpu_errors() -> list[str]:
    """Uncorrected ECC errors and Xid events, where nvidia-smi and the kernel's log can be read."""
    if not torch.cuda.is_available():
        return []
    ecc = _output(["nvidia-smi", f"--query-gpu=index,{_ECC}", "--format=csv,noheader"])
    return ecc_faults(ecc) + xid_faults(_output(["dmesg"]))


def ecc_faults(csv: str) -> list[str]:
    """Of nvidia-smi's lines ``index, count``; a GPU without ECC says [N/A]."""
    rows = [[part.strip() for part in line.split(",")] for line in csv.splitlines()]
    bad = [row for row in rows if len(row) == 2 and row[1].isdecimal() and int(row[1])]
    return [f"GPU {index}: {count} uncorrected ECC error(s)" for index, count in bad]


def xid_faults(log: str) -> list[str]:
    """Of the kernel's log; those Xids that programs cause are left out."""
    found = dict.fromkeys(m.groups() for m in _XID.finditer(log) if int(m[2]) not in _HARMLESS_XIDS)
    return [f"GPU {place}: Xid {number}" for place, number in found]


def products() -> list[str]:
    """A product of small whole numbers on every device, which is exact in any order of its sums."""
    draw = torch.Generator().manual_seed(0)
    a, b = (torch.randint(-3, 4, (_SIZE, _SIZE), generator=draw) for _ in range(2))
    right = a @ b
    devices = [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    found = []
    for device in devices or [torch.device("cpu")]:
        for dtype in (torch.float32, torch.bfloat16):
            # Sums pass 256, from which bf16 is no longer exact: so its products are of 7 terms.
            terms = _SIZE if dtype == torch.float32 else 7
            got = (a[:, :terms].to(device, dtype) @ b[:terms].to(device, dtype)).long().cpu()
            wrong = int((got != (right if terms == _SIZE else a[:, :terms] @ b[:terms])).sum())
            if wrong:
                found.append(f"{device}: {wrong} of {got.numel()} elements of a {dtype} product are wrong")
    return found


def disk(folder: Path) -> list[str]:
    """Whether what is written to ``folder`` is there again, and a GB more would be."""
    block = os.urandom(_BLOCK)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder) as file:
            file.write(block)
            file.flush()
            os.fsync(file.fileno())
            back = Path(file.name).read_bytes()
        free = shutil.disk_usage(folder).free
    except OSError as error:
        return [f"{folder} cannot be written: {error.strerror}"]
    if back != block:
        return [f"{folder} gave back other bytes than were written"]
    return [f"{folder} has {free >> 20} MiB left of {_LEAST >> 20} asked for"] if free < _LEAST else []


def _output(command: list[str]) -> str:
    """What a program prints; nothing where it is not there, or may not."""
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        return subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS).stdout
    return ""

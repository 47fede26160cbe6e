"""The machine, the versions, and which steps of ``run.sh`` can be made with what is installed.

    python benchmarks/gpu/environment.py [--out FILE] [--missing FILE]

``--missing`` is written a line for each step that cannot run: its name and the reason. Exits with 2, after
one line for each, where something is missing that every step needs.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from timing import write_json

OLDEST = {"torch": (2, 11), "triton": (3, 4)}
# Modules of this checkout that a step imports; what they need in turn is found by importing them.
STEPS = {
    "tests": ["pytest", "moetrain.kernels.metadata"],
    "kernels": ["kernel_speed", "kernel_units"],
    "layer": ["layer"],
    "determinism": ["moetrain.moe"],
    "memory": ["memory"],
    "step": ["step", "moetrain.train.task", "moetrain.parallel.apply"],
}
OTHERS = (
    "transformers",
    "deepspeed",
    "liger_kernel",
    "scattermoe",
    "sonicmoe",
    "megablocks",
    "xdist",
    "numpy",
)


def too_old() -> list[str]:
    """Of what every step needs: missing, or older than what kernels are written for."""
    lines = []
    for name, oldest in OLDEST.items():
        try:
            found = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            lines.append(f"{name} is missing: every step needs {name} {'.'.join(map(str, oldest))} or later")
            continue
        if tuple(int(part) for part in found.split(".")[:2]) < oldest:
            lines.append(f"{name} {found} is older than {'.'.join(map(str, oldest))}")
    return lines


def why_not(modules: list[str]) -> str | None:
    """Why a step cannot run here; None if it can."""
    for name in modules:
        try:
            importlib.import_module(name)
        except ImportError as error:
            return f"{name}: {error}"
    return None


def versions() -> dict[str, str | None]:
    names = {"liger_kernel": "liger-kernel", "xdist": "pytest-xdist"}
    found: dict[str, str | None] = {}
    for name in (*OLDEST, "pytest", *OTHERS):
        try:
            found[name] = importlib.metadata.version(names.get(name, name))
        except importlib.metadata.PackageNotFoundError:
            found[name] = "installed" if importlib.util.find_spec(name) else None
    return found


def gpu() -> dict[str, Any] | None:
    import torch

    if not torch.cuda.is_available():
        return None
    properties = torch.cuda.get_device_properties(0)
    smi = shutil.which("nvidia-smi")
    fields = "name,driver_version,clocks.sm,clocks.mem,power.limit,temperature.gpu"
    command = [smi or "", f"--query-gpu={fields}", "--format=csv,noheader"]
    said = subprocess.run(command, capture_output=True, text=True).stdout.strip() if smi else None
    return {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "memory_bytes": properties.total_memory,
        "multiprocessors": properties.multi_processor_count,
        "cuda": torch.version.cuda,
        "nvidia_smi": said,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out")
    parser.add_argument("--missing", type=Path)
    args = parser.parse_args()
    if missing := too_old():
        print("\n".join(missing))
        return 2
    python, device, found = sys.version.split()[0], gpu(), versions()
    steps = {step: why_not(modules) for step, modules in STEPS.items()}
    print(f"Python {python}; GPU: {device or 'none'}")
    print(", ".join(f"{name} {version or '-'}" for name, version in found.items()))
    for step, reason in steps.items():
        print(f"{step}: {'can run' if reason is None else 'cannot run, ' + reason}")
    write_json(args.out, {"python": python, "gpu": device, "versions": found, "steps": steps})
    if args.missing:
        lines = [f"{step}: {reason}\n" for step, reason in steps.items() if reason]
        args.missing.write_text("".join(lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())

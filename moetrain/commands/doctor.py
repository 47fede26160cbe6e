"""``moetrain doctor``: versions, devices and optional packages, as plain lines to read or to send along."""

from __future__ import annotations

import platform
import shutil
import sys
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

import moetrain
from moetrain.errors import UserError
from moetrain.parallel.cores import busy_cores, usable_cores
from moetrain.terminal import show

if TYPE_CHECKING:
    import torch

_NEEDED = (
    "torch",
    "numpy",
    "hydra-core",
    "omegaconf",
    "datasets",
    "tokenizers",
    "safetensors",
    "rich",
    "pydantic",
)
_OPTIONAL = {
    "matplotlib": "plots in report.html (moetrain[plot])",
    "wandb": "tracker=wandb (moetrain[wandb])",
    "lm-eval": "moetrain eval tasks=[...] (moetrain[eval])",
    "tensorboard": "tracker=tensorboard (moetrain[tensorboard])",
    "transformers": "tests against transformers (moetrain[hf])",
    "deepspeed": "engine=deepspeed (moetrain[deepspeed])",
    "bitsandbytes": "optim=adamw_8bit (moetrain[bitsandbytes])",
    "triton": "experts.backend=triton, train.compile on a GPU (moetrain[triton])",
    "stanford-stk": "experts.backend=megablocks (moetrain[megablocks])",
    "scattermoe": "experts.backend=scattermoe (github.com/shawntan/scattermoe)",
}
_COMPILERS = ("g++", "clang++", "c++")


def run(args: list[str]) -> int:
    if args and args[0] not in ("-h", "--help"):
        raise UserError(f"doctor takes no arguments, not {args[0]}")
    return doctor()


def doctor() -> int:
    """Print what this machine has; 1 where a needed package is missing, else 0.

    Raises UserError where torch is too old.
    """
    missing = [name for name in _NEEDED if _version(name) is None]
    _line("moetrain", moetrain.__version__)
    _line("python", f"{platform.python_version()} at {sys.executable}")
    _line("system", platform.platform())
    for name in _NEEDED:
        _line(name, _version(name) or "MISSING: install moetrain again")
    for name, use in _OPTIONAL.items():
        _line(name, _version(name) or f"not installed; for {use}")
    compiler = next((path for c in _COMPILERS if (path := shutil.which(c))), None)
    _line("C++ compiler", compiler or "none; train.compile=true needs one")
    _line("cpu", f"{usable_cores()} cores usable, {busy_cores(0.2):.1f} of them busy")
    if "torch" not in missing:
        _print_torch_devices()
    return 1 if missing else 0


def _print_torch_devices() -> None:
    import torch

    from moetrain.compat import check_torch
    from moetrain.ops.cpu.libraries import faster

    check_torch(torch.__version__)
    _line("torch threads", str(torch.get_num_threads()))
    _line("cpu products", f"of fp32 by {faster()}, which was the faster one when it was measured")
    _line("cuda", torch.version.cuda or "this torch is built without CUDA")
    for i in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(i)
        _line(f"gpu {i}", f"{gpu.name}, {gpu.total_memory / 2**30:.0f} GiB")
    if not torch.cuda.device_count():
        _line("gpu", "none; training runs on the CPU")
    _print_ladder(torch.device("cuda" if torch.cuda.device_count() else "cpu"))


def _print_ladder(device: torch.device) -> None:
    """What ``experts.backend=auto`` takes, best first, and why not what stands above it; then other names."""
    import torch

    from moetrain.ops.experts.case import Case
    from moetrain.ops.experts.table import BY_NAME, ladder, why_not

    cases = {
        name: Case(device, dtype, 1024, 1024, "swiglu", block=128)
        for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16))
    }
    for name, case in cases.items():
        reasons = {rung: why_not(rung, case) for rung in ladder(device)}
        rungs = [rung if reason is None else f"not {rung} ({reason})" for rung, reason in reasons.items()]
        _line(f"experts, {name}", ", then ".join(rungs))
    for backend in BY_NAME:
        found = {name: why_not(backend, case) or "ready" for name, case in cases.items()}
        alike = len(set(found.values())) == 1
        said = found["bf16"] if alike else "; ".join(f"{name}: {text}" for name, text in found.items())
        _line("  by its name", f"{backend}: {said}")


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _line(name: str, value: str) -> None:
    show(f"{name:<14}{value}")

"""Which self-tests an accelerator has passed: an empty file each in the user's cache folder.

A file's name is a hash of all that the outcome depends on: the case, the device, versions, and the kernels
themselves. Failures are not kept. Where the folder cannot be used, nothing is remembered.
"""

from __future__ import annotations

import contextlib
import hashlib
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

import moetrain
from moetrain.cache_folder import cache_root
from moetrain.errors import UserError
from moetrain.ops.experts.case import Case
from moetrain.ops.experts.third_party import DISTRIBUTIONS

_FOLDER = "self_tests"


def was_passed(name: str, case: Case) -> bool:
    """Whether the backend ``name`` has passed the self-test of ``case`` on this device before."""
    file = _file(name, case)
    try:
        return file is not None and file.exists()
    except OSError:
        return False


def keep_passed(name: str, case: Case) -> None:
    """Remember that it has."""
    file = _file(name, case)
    if file is not None:
        with contextlib.suppress(OSError):
            file.parent.mkdir(parents=True, exist_ok=True)
            file.touch()


def _file(name: str, case: Case) -> Path | None:
    """None on a CPU, where a test takes milliseconds, and on a device that is only pretended."""
    device = _device(case.device)
    if device is None:
        return None
    facts = (name, case, device, torch.__version__, _packages(), moetrain.__version__, _sources())
    try:
        return cache_root() / _FOLDER / hashlib.sha256(repr(facts).encode()).hexdigest()
    except UserError:
        return None


def _device(device: torch.device) -> str | None:
    if device.type != "cuda" or not torch.cuda.is_available():
        return None
    properties = torch.cuda.get_device_properties(device)
    return f"{properties.name} {properties.major}.{properties.minor} {torch.version.cuda} {torch.version.hip}"


def _packages() -> list[str | None]:
    """The versions of all packages that a backend may compute with."""
    return [_version(name) for name in ("triton", *DISTRIBUTIONS)]


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


@cache
def _sources() -> str:
    """Of kernels and operators, so that a change of either is tested again."""
    found = hashlib.sha256()
    package = Path(moetrain.__path__[0])
    for folder in ("kernels", "ops"):
        for file in sorted((package / folder).resolve().rglob("*.py")):
            found.update(file.read_bytes())
    return found.hexdigest()

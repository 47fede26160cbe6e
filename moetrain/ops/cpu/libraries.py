"""Which of torch's two libraries multiplies fp32 matrices the faster on this processor.

It is measured once, for a tenth of a second, and kept in the user's cache folder, so that a machine always
rounds alike: two processes that measure at the same time both take what the first one wrote. Where nothing
can be kept, the processor's maker decides, as a measurement that is made anew could come out another way.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

import moetrain
from moetrain.cache_folder import cache_root
from moetrain.errors import UserError

MKL, ONEDNN = "mkl", "onednn"
_CPUINFO = Path("/proc/cpuinfo")
_FOLDER = "products"
_SHAPES = ((256, 512, 1024), (512, 1024, 512))  # rows, inner, outer
_ROUNDS = 5
_LEAD = 1.03  # by which MKL must be ahead: less is within the noise
# What changes the kernels that a library takes.
_VARIABLES = (
    "ONEDNN_MAX_CPU_ISA",
    "DNNL_MAX_CPU_ISA",
    "MKL_ENABLE_INSTRUCTIONS",
    "MKL_CBWR",
    "ATEN_CPU_CAPABILITY",
)


@cache
def faster() -> str:
    """``mkl`` or ``onednn``: what fp32 products of this process go through."""
    if not has_onednn():
        return MKL
    if not torch.backends.mkl.is_available():
        return ONEDNN
    file = _file()
    found = None if file is None else _read(file)
    if found is None and file is not None:
        _write_first(file, _alone(measured))
        found = _read(file)
    return found or (MKL if "GenuineIntel" in _cpuinfo() else ONEDNN)


@cache
def has_onednn() -> bool:
    """Whether this build has the operator (it is the one that torch.compile calls) and it is right."""
    if not torch.backends.mkldnn.is_available():
        return False
    a, b = torch.arange(6.0).view(2, 3), torch.arange(12.0).view(3, 4)
    try:
        found = by_onednn(a, b)
    except (AttributeError, RuntimeError, TypeError):
        return False
    return bool(torch.equal(found, a @ b))


def by_onednn(a_nK: Tensor, b_KN: Tensor) -> Tensor:
    if not (b_KN.is_contiguous() or b_KN.t().is_contiguous()):
        b_KN = b_KN.contiguous()  # of some columns of a wider matrix, the operator is a thousand times slower
    result: Tensor = torch.ops.mkldnn._linear_pointwise(a_nK, b_KN.t(), None, "none", [], "")
    return result


def measured() -> str:
    """The faster one of the shortest of a few runs each, interleaved, in the calling thread's own time."""
    with torch.no_grad():
        seconds = {MKL: 0.0, ONEDNN: 0.0}
        for rows, inner, outer in _SHAPES:
            a, b = torch.ones(rows, inner), torch.ones(inner, outer)
            for product in (torch.mm, by_onednn):
                product(a, b)  # compiles a kernel
            runs = [(_seconds(torch.mm, a, b), _seconds(by_onednn, a, b)) for _ in range(_ROUNDS)]
            seconds[MKL] += min(run[0] for run in runs)
            seconds[ONEDNN] += min(run[1] for run in runs)
    return MKL if seconds[MKL] * _LEAD < seconds[ONEDNN] else ONEDNN


def _alone(measure: Callable[[], str]) -> str:
    """In a thread of its own, free of the caller's modes, which may make no real tensors."""
    found: list[str] = []
    thread = threading.Thread(target=lambda: found.append(measure()))
    thread.start()
    thread.join()
    return found[0]


def _seconds(product: Callable[[Tensor, Tensor], Tensor], a: Tensor, b: Tensor) -> float:
    start = time.thread_time()
    product(a, b)
    return time.thread_time() - start


def _file() -> Path | None:
    facts = (
        next((line for line in _cpuinfo().splitlines() if line.startswith("model name")), ""),
        [line for line in _cpuinfo().splitlines() if line.startswith(("vendor_id", "flags"))][:2],
        torch.__version__,
        moetrain.__version__,
        [os.environ.get(name) for name in _VARIABLES],
    )
    try:
        return cache_root() / _FOLDER / hashlib.sha256(repr(facts).encode()).hexdigest()
    except UserError:
        return None


def _cpuinfo() -> str:
    try:
        return _CPUINFO.read_text(errors="replace")
    except OSError:
        return ""


def _read(file: Path) -> str | None:
    try:
        text = file.read_text(errors="replace").strip()
    except OSError:
        return None
    return text if text in (MKL, ONEDNN) else None


def _write_first(file: Path, text: str) -> None:
    """Write ``file`` whole, unless another process was faster; nothing where it cannot be written."""
    with suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=file.parent, prefix=".tmp_") as written:
            written.write(text)
            written.flush()
            if file.exists() and _read(file) is None:  # damaged: it appears whole
                file.unlink()
            os.link(written.name, file)

"""A plain matrix product on a CPU, through oneDNN where that is the faster of torch's two libraries.

torch.mm of fp32 is MKL's, which runs at about 0.8 of oneDNN's speed on AMD Zen 4, and at 1.1 to 1.3 times
that speed on Intel's processors; bf16 is oneDNN's already. ``libraries.py`` measures which it is.
Shapes: n rows, K inner, N outer.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moetrain.ops.cpu.libraries import MKL, by_onednn, faster, has_onednn

_WIDE = 2  # columns a row from which a copy of the transposed operand pays in bf16
_ROWS = 4096  # of a sum that are added at once: their product is in memory by itself
_MIN_WORK = 2**22  # multiplications below which a call costs more than it saves


def product(a_nK: Tensor, b_KN: Tensor, out: Tensor | None = None) -> Tensor:
    """``a @ b``, in ``out`` where given. No gradient: for an operator's own forward and backward."""
    if not _takes_onednn(a_nK, b_KN):
        return torch.mm(a_nK, b_KN, out=out)
    result = by_onednn(a_nK, b_KN)
    return result if out is None else out.copy_(result)


def outer(a_nK: Tensor, b_nN: Tensor, out: Tensor | None = None) -> Tensor:
    """``a.t() @ b`` [K, N], in ``out`` where given, whose dtype may be wider: the gradient of a matrix.

    oneDNN gets a copy of the narrower operand's transpose, and a tall result comes transposed. In bf16 on
    Intel's AMX a copy saves an eighth to a quarter of a much wider one's time, and costs 2 to 3 % elsewhere.
    """
    tall = a_nK.shape[1] > b_nN.shape[1]
    if _takes_onednn(a_nK.t(), b_nN):
        first, second = (b_nN, a_nK) if tall else (a_nK, b_nN)
        result = by_onednn(first.t().contiguous(), second)
        result = result.t() if tall else result
        return result.contiguous() if out is None else out.copy_(result)
    if a_nK.dtype is torch.bfloat16 and a_nK.device.type == "cpu" and b_nN.shape[1] > _WIDE * a_nK.shape[1]:
        a_Kn = a_nK.t().contiguous()
    else:
        a_Kn = a_nK.t()
    if out is None or out.dtype == a_nK.dtype:
        return torch.mm(a_Kn, b_nN, out=out)
    return out.copy_(torch.mm(a_Kn, b_nN))


def add_outer(total_KN: Tensor, a_nK: Tensor, b_nN: Tensor) -> None:
    """``total += a.t() @ b``; where the product is bf16, the sum is still the total's fp32."""
    onednn = _takes_onednn(a_nK.t(), b_nN)
    if a_nK.dtype is total_KN.dtype and not onednn:
        total_KN.addmm_(a_nK.t(), b_nN)
        return
    step = _ROWS if onednn else max(1, len(total_KN))
    for total_kN, a_nk in zip(total_KN.split(step), a_nK.split(step, 1), strict=True):
        total_kN.add_(outer(a_nk, b_nN))


def _takes_onednn(a_nK: Tensor, b_KN: Tensor) -> bool:
    return (
        a_nK.dtype is torch.float32
        and a_nK.device.type == "cpu"
        and a_nK.numel() * b_KN.shape[1] >= _MIN_WORK
        and not torch.compiler.is_compiling()  # which chooses for itself
        and bool(torch.backends.mkldnn.enabled)
        and has_onednn()
        and faster() != MKL
    )

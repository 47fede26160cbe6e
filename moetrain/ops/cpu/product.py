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
_MIN_WORK = 2**22  # multiplications below which a call costs more than it saves


def product(a_nK: Tensor, b_KN: Tensor, out: Tensor | None = None) -> Tensor:
    """``a @ b``, in ``out`` where given. No gradient: for an operator's own forward and backward."""
    if not _takes_onednn(a_nK, b_KN):
        return torch.mm(a_nK, b_KN, out=out)
    result = by_onednn(a_nK, b_KN)
    return result if out is None else out.copy_(result)


def outer(a_nK: Tensor, b_nN: Tensor, out_KN: Tensor) -> Tensor:
    """``a.t() @ b`` in ``out``, whose dtype may be wider: the gradient of a matrix [K, N].

    Where the result is wider than tall, MKL falls to two thirds of its speed on AMD; oneDNN does not, if it
    gets a copy of ``a.t()``. In bf16 on Intel's AMX the copy saves an eighth to a quarter of a much wider
    one's time, and costs 2 to 3 % without AMX.
    """
    if b_nN.shape[1] > a_nK.shape[1] and _takes_onednn(a_nK.t(), b_nN):
        return product(a_nK.t().contiguous(), b_nN, out=out_KN)
    if a_nK.dtype is torch.bfloat16 and a_nK.device.type == "cpu" and b_nN.shape[1] > _WIDE * a_nK.shape[1]:
        return out_KN.copy_(torch.mm(a_nK.t().contiguous(), b_nN))
    if out_KN.dtype != a_nK.dtype:
        return out_KN.copy_(torch.mm(a_nK.t(), b_nN))
    if a_nK.device.type != "cpu" or a_nK.dtype.itemsize < 4 or faster() == MKL:
        return torch.mm(a_nK.t(), b_nN, out=out_KN)
    return out_KN.zero_().addmm_(a_nK.t(), b_nN)  # where MKL is slow, it adds faster than it overwrites


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

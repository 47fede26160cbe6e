"""What the backends of other packages share: when they refuse a case, and the sizes that they can address.

They are taken by name only, never by ``auto``: no measurement here shows that they gain anything over the
kernels of this package, they round operands of fp32 to ten bits, and they count elements in 32 bits.
"""

from __future__ import annotations

from importlib.util import find_spec

import torch
from torch import Tensor

from moetrain.errors import UserError
from moetrain.ops.experts.case import Case
from moetrain.ops.triton_support import device_refusal

DISTRIBUTIONS = ("stanford-stk", "scattermoe")  # whose versions a passed self-test is of
_DTYPES = (torch.bfloat16, torch.float16)
_LARGEST = 2**31 - 1  # elements


def refusal_of_package(case: Case, module: str, install: str) -> str | None:
    """Why ``module``, which ``install`` installs, cannot compute ``case``; None where it may."""
    if find_spec(module) is None:
        return f"{module} is not installed ({install})"
    if case.dtype not in _DTYPES:
        return f"its products are of bf16 and fp16, not {str(case.dtype).removeprefix('torch.')}"
    return device_refusal(case.device)


def refusal_of_widths(case: Case, unit: int) -> str | None:
    """Why its tiles, which are not masked, cannot compute widths that ``unit`` does not divide."""
    for key, width in (("d_model", case.d_model), ("d_ff_expert", case.d_ff)):
        if width % unit:
            return f"model.{key}={width} is no multiple of {unit}, as its tiles need"
    return None


def require_addressable(backend: str, **tensors: Tensor) -> None:
    """UserError where an element of one of the tensors is beyond what 32 bits can count."""
    for name, tensor in tensors.items():
        if tensor.numel() > _LARGEST:
            raise UserError(
                f"experts.backend={backend} counts elements in 32 bits, and {name} has {tensor.numel()}, "
                f"more than {_LARGEST}: take experts.backend=triton, or set experts.max_rows_per_rank"
            )

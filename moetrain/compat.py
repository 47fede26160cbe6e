"""What differs between the versions of torch that moetrain runs on, and nothing else: docs/compatibility.md.

Everything may import it, and it imports errors.py alone. What a version has is looked up by its name; the
only numbers are those of the oldest version and of the oldest that compiles rightly.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from moetrain.errors import UserError

OLDEST = (2, 11)
COMPILES_FROM = (2, 13)


def check_torch(version: str) -> None:
    """Raise UserError where torch's ``version`` is too old, which pip refuses as well if it may look."""
    if _numbers(version) < OLDEST:
        oldest = ".".join(map(str, OLDEST))
        raise UserError(
            f"torch {version} is too old: moetrain needs {oldest} or newer: pip install 'torch>={oldest}'"
        )


def compiles_gradients(version: str) -> bool:
    """Whether torch.compile is right where an operator brings its own gradient.

    torch 2.11.0 changes what the rotation's and the norm's return, without a word (test_model_attention.py).
    """
    return _numbers(version) >= COMPILES_FROM


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".")[:2])


check_torch(torch.__version__)

# torch < 2.13 has them under their old names only, which later versions warn about.
if hasattr(dist, "all_gather_single"):
    all_gather_single, reduce_scatter_single = dist.all_gather_single, dist.reduce_scatter_single
else:
    all_gather_single, reduce_scatter_single = dist.all_gather_into_tensor, dist.reduce_scatter_tensor


def reduce_unused_gradients(model: Any) -> None:
    """Let each rank take part in the sum of every gradient of ``model``, with zeros where it has none.

    ``model``: the root FSDPModule. A rank whose tokens miss a parameter would otherwise leave that parameter
    out of its reduce-scatter, whose sizes then differ between ranks.
    """
    # torch < 2.13 has no switch for it. Before 2.15 its zeros have the parameter's dtype, which FSDP2
    # refuses beside gradients accumulated in another: there, they are made before it collects gradients.
    mixes_dtypes = hasattr(torch.ops.fsdp, "chunk_cat_mixed_dtype")
    if mixes_dtypes and hasattr(model, "set_reduce_scatter_unused_params"):
        model.set_reduce_scatter_unused_params(True)
        return
    from torch.distributed.fsdp import FSDPModule

    for module in model.modules():
        if isinstance(module, FSDPModule):
            group: Any = module._get_fsdp_state()._fsdp_param_group
            if group is not None:  # None: all of its parameters are those of modules within
                group.post_backward = partial(_post_backward, group, group.post_backward)


def _post_backward(group: Any, reduce: Any, *unused: Any) -> None:
    """FSDP2's ``reduce`` of one module's gradients, after those that are missing were set to zeros."""
    if group.reduce_grads:
        used = [p for p in group.fsdp_params if hasattr(p, "_unsharded_param")]  # all, after a forward
        sums = [p.unsharded_accumulated_grad for p in used if p.unsharded_accumulated_grad is not None]
        for parameter in used:
            whole = parameter.unsharded_param
            if not whole.requires_grad or parameter.unsharded_accumulated_grad is not None:
                continue
            if sums:  # FSDP2 adds this micro-batch's gradient, if any
                parameter.unsharded_accumulated_grad = torch.zeros_like(whole, dtype=sums[0].dtype)
            elif whole.grad is None:
                whole.grad = torch.zeros_like(whole)
    reduce(*unused)

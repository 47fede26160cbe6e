"""bf16 over fp32 weights: FSDP2 gathers shards in bf16; one process rounds a block's weights as it runs.

Either way a module sees every parameter but the routers' in the dtype of the products, gradients come back in
it, and their sums over micro-batches and ranks are fp32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy

from moetrain.ops.again import under


def gathered_in(dtype: torch.dtype | None) -> MixedPrecisionPolicy:
    """The policy of FSDP2 for modules whose products run in ``dtype``; None: in that of the parameters.

    It casts no inputs: among them are Routings, whose fp32 weights and scores a cast would round.
    """
    reduce_dtype = None if dtype is None else torch.float32
    return MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=reduce_dtype, cast_forward_inputs=False)


def rounded_to(dtype: torch.dtype, module: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
    """``forward`` with ``module``'s parameters, except those of routers, seen in ``dtype``."""

    def run(*args: Any, **kwargs: Any) -> Any:
        with under(partial(_rounded, module, dtype)):  # recomputation inside has to see the same
            return forward(*args, **kwargs)

    return run


def round_for_inference(model: nn.Module, dtype: torch.dtype) -> None:
    """Convert the parameters of ``model``, except those of routers, to ``dtype`` in place."""
    for owner, key, parameter in list(_but_routers(model)):
        owner._parameters[key] = nn.Parameter(parameter.detach().to(dtype), parameter.requires_grad)


def is_router(module: nn.Module) -> bool:
    """Whether ``module`` is marked as a router, whose parameters stay in fp32."""
    return getattr(module, "is_router", False) is True


@contextmanager
def _rounded(module: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    kept = list(_but_routers(module))
    for owner, key, parameter in kept:
        owner._parameters[key] = parameter.to(dtype)  # type: ignore[assignment]  # the graph leads back
    try:
        yield
    finally:
        for owner, key, parameter in kept:
            owner._parameters[key] = parameter


def _but_routers(module: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Parameter]]:
    if is_router(module):
        return
    for key, parameter in module._parameters.items():
        if parameter is not None:
            yield module, key, parameter
    for child in module.children():
        yield from _but_routers(child)

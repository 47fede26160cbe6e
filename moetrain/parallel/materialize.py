"""Allocate a model that was laid out on the meta device, and draw each rank's part of its initial values.

Each rank allocates its own shards only. No rank sends weights to another.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from moetrain.ops.init import Initializer, init_block, initializer_of


def allocate(model: nn.Module, device: str) -> None:
    """Allocate meta tensors on ``device``, their values undefined, and move all others there."""
    attributes = {name: dict(vars(parameter)) for name, parameter in model.named_parameters()}
    model._apply(lambda t: torch.empty_like(t, device=device) if t.is_meta else t.to(device))
    for name, parameter in model.named_parameters():
        vars(parameter).update(attributes[name])


def draw(model: nn.Module, seed: int) -> None:
    """Initialise every parameter that has an initializer; the values are a function of (seed, its name)."""
    draw_parameters(model.named_parameters(), seed)


def draw_parameters(named: Iterable[tuple[str, nn.Parameter]], seed: int) -> None:
    """:func:`draw` of a part of a model, whose parameters come with their names in the whole."""
    for name, parameter in named:
        initializer = initializer_of(parameter)
        if initializer is not None:
            draw_tensor(parameter, initializer, seed, name)


def draw_tensor(tensor: Tensor, initializer: Initializer, seed: int, name: str) -> None:
    """Write the initial values of the tensor ``name``, of which this rank may have a part."""
    block, offsets = _block(tensor)
    init_block(block, initializer, seed, name.removeprefix("model."), tensor.shape, offsets)


def _block(parameter: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """This rank's part of a parameter, and where in the whole it begins."""
    whole = parameter.detach()
    if not isinstance(whole, DTensor):
        return whole, (0,) * whole.ndim
    (chunk,) = whole.__create_chunk_list__()  # what distributed checkpoints go by
    return whole.to_local(), tuple(chunk.offsets)

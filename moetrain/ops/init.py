"""Initializers: each parameter is made with one, and blocks of it can be initialised anywhere.

A parameter made by :func:`parameter` carries its ``Initializer``. A module that is built by itself is
initialised at once, from torch's generator. Inside :func:`on_meta_device` it holds no memory until the
trainer lays it out, and :func:`init_block` then initialises each rank's own block: a value is a function of
(seed, the parameter's name, the element's place in the whole tensor) and of nothing else.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn

from moetrain.ops.counter import logarithm, normal, stream_key, uniform

M = TypeVar("M", bound=nn.Module)

_CHUNK = 2**15  # elements drawn at once: their fp64 intermediates stay in a cache
_on_meta: ContextVar[bool] = ContextVar("on_meta", default=False)


@dataclass(frozen=True)
class Normal:
    """Independent normal values with mean 0."""

    std: float


@dataclass(frozen=True)
class Constant:
    value: float


@dataclass(frozen=True)
class Orthogonal:
    """Orthonormal rows (columns, where there are more rows than columns) times ``gain``; two dimensions."""

    gain: float = 1.0


@dataclass(frozen=True)
class EqualRows:
    """Normal values, each row then scaled to one norm: that of ``std`` in every element; two dimensions."""

    std: float


@dataclass(frozen=True)
class Uniform:
    """Independent values from ``low`` to ``high``, or ``log``: their logarithms; one dimension."""

    low: float
    high: float
    log: bool = False


Initializer = Normal | Constant | Orthogonal | EqualRows | Uniform


@contextlib.contextmanager
def on_meta_device() -> Iterator[None]:
    """A context in which :func:`parameter` allocates on torch's meta device; buffers are not affected."""
    token = _on_meta.set(True)
    try:
        yield
    finally:
        _on_meta.reset(token)


@contextlib.contextmanager
def in_memory() -> Iterator[None]:
    """A context that suspends :func:`on_meta_device`, for modules that may write their own initial values."""
    token = _on_meta.set(False)
    try:
        yield
    finally:
        _on_meta.reset(token)


def parameter(shape: Sequence[int], initializer: Initializer) -> nn.Parameter:
    """A parameter with its initializer, which runs now, from torch's generator, unless ``on_meta_device``."""
    made = nn.Parameter(torch.empty(*shape, device="meta" if _on_meta.get() else None))
    set_initializer(made, initializer)
    return made


@torch.no_grad()
def set_initializer(made: nn.Parameter, initializer: Initializer) -> None:
    """Replace a parameter's initializer, and initialise the parameter again if it has memory."""
    if made.is_meta:  # torch would decompose what draws nothing, in Python, for a millisecond each
        pass
    elif isinstance(initializer, Normal):
        made.normal_(0.0, initializer.std)
    elif isinstance(initializer, Constant):
        made.fill_(initializer.value)
    elif isinstance(initializer, Uniform):
        made.uniform_(initializer.low, initializer.high)
        if initializer.log:
            made.log_()
    elif isinstance(initializer, EqualRows):
        made.normal_()
        made.mul_(initializer.std * made.shape[1] ** 0.5 / made.norm(dim=1, keepdim=True))
    else:
        nn.init.orthogonal_(made, initializer.gain)
    made.initializer, made.init_version = initializer, made._version  # type: ignore[attr-defined]


def drop_overwritten_initializers(module: nn.Module) -> None:
    """Remove the initializer of each parameter that ``module`` has written to: the written value is kept."""
    for made in module.parameters():
        if initializer_of(made) is not None and made._version != made.init_version:  # type: ignore[attr-defined]
            del made.initializer  # type: ignore[attr-defined]


def with_own_values(make: Callable[[], M]) -> M:
    """What ``make`` builds, with the values that it drew or wrote itself, which no model changes."""
    with in_memory():
        made = make()
    drop_overwritten_initializers(made)
    made.keeps_own_init = True  # type: ignore[assignment]
    return made


def initializer_of(made: Tensor) -> Initializer | None:
    """A parameter's initializer; None if :func:`parameter` did not make it."""
    return getattr(made, "initializer", None)


@torch.no_grad()
def init_block(
    block: Tensor,
    initializer: Initializer,
    seed: int,
    name: str,
    shape: Sequence[int],
    offsets: Sequence[int],
) -> None:
    """Write the initial values of the block at ``offsets`` of the parameter ``name`` of ``shape``.

    They are rounded to fp32 first, so that a model in fp64 starts from the same values as one in fp32.
    """
    if isinstance(initializer, Constant):
        block.fill_(initializer.value)
    elif isinstance(initializer, Normal):
        _init_normal(block, initializer.std, stream_key(seed, name), shape, offsets)
    elif isinstance(initializer, Uniform):
        here = torch.arange(block.shape[0], device=block.device) + offsets[0]
        drawn = uniform(stream_key(seed, name), here) * (initializer.high - initializer.low) + initializer.low
        block.copy_((logarithm(drawn) if initializer.log else drawn).float())
    else:
        rows, columns = shape
        if isinstance(initializer, EqualRows):
            whole = _equal_rows(stream_key(seed, name), rows, columns) * initializer.std
        else:
            whole = _orthonormal(stream_key(seed, name), rows, columns) * initializer.gain
        part = tuple(slice(at, at + size) for at, size in zip(offsets, block.shape, strict=True))
        block.copy_(whole[part].float())


def _init_normal(block: Tensor, std: float, key: int, shape: Sequence[int], offsets: Sequence[int]) -> None:
    if not block.numel():
        return
    rows = _element_indices(block.shape[:-1], shape[:-1], offsets[:-1], block.device)
    width, columns = shape[-1], torch.arange(block.shape[-1], device=block.device) + offsets[-1]
    flat, step = block.view(rows.numel(), -1), max(1, _CHUNK // len(columns))
    for at in range(0, rows.numel(), step):
        indices = rows[at : at + step, None] * width + columns
        flat[at : at + step] = (normal(key, indices) * std).float()


def _element_indices(
    size: Sequence[int], shape: Sequence[int], offsets: Sequence[int], device: torch.device
) -> Tensor:
    """[n] int64: the place in a tensor of ``shape`` of each element of a block of ``size`` at ``offsets``."""
    indices = torch.zeros(1, dtype=torch.int64, device=device)
    for length, whole, offset in zip(size, shape, offsets, strict=True):
        here = torch.arange(length, device=device) + offset
        indices = (indices[:, None] * whole + here).reshape(-1)
    return indices


def _equal_rows(key: int, rows: int, columns: int) -> Tensor:
    """[rows, columns] fp64; the root mean square of each row is 1."""
    drawn = normal(key, torch.arange(rows * columns)).view(rows, columns)
    scale: Tensor = columns**0.5 / _tree_sum(drawn.square()).sqrt()
    return drawn * scale[:, None]


def _orthonormal(key: int, rows: int, columns: int) -> Tensor:
    """[rows, columns] fp64 by modified Gram-Schmidt; its sums are trees, of one order everywhere."""
    fewer, more = sorted((rows, columns))
    basis = normal(key, torch.arange(fewer * more)).view(fewer, more)
    for row in range(fewer):
        basis[row] = basis[row] / _tree_sum(basis[row] * basis[row]).sqrt()
        rest = basis[row + 1 :]
        rest -= _tree_sum(rest * basis[row])[:, None] * basis[row]
    return basis if rows <= columns else basis.T.contiguous()


def _tree_sum(x: Tensor) -> Tensor:
    """The sum over the last dimension, halves added to halves."""
    width = 2 ** math.ceil(math.log2(max(1, x.shape[-1])))
    x = torch.nn.functional.pad(x, (0, width - x.shape[-1]))
    while x.shape[-1] > 1:
        half = x.shape[-1] // 2
        x = x[..., :half] + x[..., half:]
    return x[..., 0]

"""A device that is none: its tensors compute on the CPU, and what would wait for a GPU is counted.

A process without a GPU runs the trainer's own code on ``DEVICE``, with real values, along the paths of an
accelerator. Host and device tensors are told apart by type, and meet only as CUDA lets them. What counts as a
wait is what ``torch.cuda.set_sync_debug_mode`` tells of on a GPU: a value or a number of rows that the host
reads, and a copy between host and device that is not asynchronous, or not of pinned memory.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import FrameType, SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch._library.custom_ops import OPDEFS
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils.weak import WeakIdKeyDictionary

import moetrain

DEVICE = torch.device("lazy", 0)  # a type that every build of torch has a place for, and nobody a device
_PACKAGE = Path(moetrain.__file__).parent
_aten = torch.ops.aten
# How often an operator stops the host, by its name: results of unknown size, and values that it checks.
_WAITS = {
    "nonzero": 1, "masked_select": 1, "_unique2": 1, "unique_dim": 1, "unique_consecutive": 1, "equal": 1,
    "_local_scalar_dense": 1, "bincount": 2,  # its keys' least and largest
}  # fmt: skip
_INDEXING = ("index", "index_put", "index_put_", "_index_put_impl_")


@dataclass(frozen=True)
class Site:
    """Where in the package, and which operator; not ``wait``: a copy to the device that nobody waits for."""

    op: str
    place: str  # file:line, seen from the package
    function: str
    to_device: bool
    wait: bool


class OnDevice(Tensor):
    """A tensor that says it lies on ``DEVICE``; its values are ``held`` on the CPU."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> OnDevice:
        made: OnDevice = Tensor._make_wrapper_subclass(
            cls, held.shape, strides=held.stride(), storage_offset=held.storage_offset(), dtype=held.dtype,
            layout=held.layout, device=DEVICE,
        )  # fmt: skip
        made.held = held
        return made

    def __repr__(self, **unused: Any) -> str:  # type: ignore[override]
        return f"OnDevice({self.held})"

    def tolist(self) -> Any:  # torch has none for subclasses
        return self.cpu().tolist()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]  # torch's own is no class method
        return _compute(func, args, kwargs or {})


class Pretence(TorchDispatchMode):
    """While it lasts, tensors can be made on ``DEVICE``; ``sites`` has each wait and copy to the device."""

    def __init__(self) -> None:
        super().__init__()
        self.sites: Counter[Site] = Counter()
        self._pinned = WeakIdKeyDictionary()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "moetrain":  # look inside, as the profiler of a GPU does
            with self:
                return OPDEFS[func._schema.name]._init_fn(*args, **kwargs)
        if _made_of_others(func):  # below autograd these come whole
            with self:
                return func.decompose(*args, **kwargs)
        if func is _aten._pin_memory.default:
            pinned = args[0].clone()
            self._pinned[pinned] = True
            return pinned
        if func is _aten.is_pinned.default:
            return args[0] in self._pinned
        self._look_at(func, args, kwargs)
        return _compute(func, args, kwargs)

    def _look_at(self, func: Any, args: Any, kwargs: Any) -> None:
        name = func._schema.name.removeprefix("aten::")
        if name in ("_to_copy", "copy_"):
            self._look_at_copy(name, args, kwargs)
            return
        tensors = list(_tensors((args, kwargs)))
        foreign = [t for t in tensors if not isinstance(t, OnDevice)]
        if len(foreign) == len(tensors):
            return
        if name in (*_INDEXING, "where"):  # these copy what they find on the host
            self._add(name, len(foreign), to_device=True)
        elif any(t.ndim for t in foreign):
            raise RuntimeError(f"{func}: a tensor on the host among tensors on the device, at {_place()}")
        self._add(name, _waits(name, args, kwargs))

    def _look_at_copy(self, name: str, args: Any, kwargs: Any) -> None:
        source = args[1] if name == "copy_" else args[0]
        asked = kwargs.get("device")
        target = args[0].device if name == "copy_" else torch.device(asked or source.device)
        if target.type == source.device.type:
            return
        to_device = target.type != "cpu"
        quick = args[2] if name == "copy_" and len(args) > 2 else kwargs.get("non_blocking", False)
        pinned = source if to_device else args[0] if name == "copy_" else None
        wait = not (quick and pinned is not None and pinned in self._pinned)
        self._add(name, 1, to_device, wait)

    def _add(self, op: str, times: int, to_device: bool = False, wait: bool = True) -> None:
        if times:
            self.sites[Site(op, *_place(), to_device, wait)] += times


def waits_of(sites: Mapping[Site, int]) -> int:
    """How often the host waited."""
    return sum(times for site, times in sites.items() if site.wait)


def copies_of(sites: Mapping[Site, int]) -> int:
    """Copies from the host to the device, waited for or not."""
    return sum(times for site, times in sites.items() if site.to_device)


@contextmanager
def pretended_device() -> Iterator[Pretence]:
    """``DEVICE`` as long as it lasts, without autocast; modules that move there get new parameters."""
    before = torch.__future__.get_overwrite_module_params_on_conversion()
    lifts = torch._C._only_lift_cpu_tensors()
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    torch._C._set_only_lift_cpu_tensors(True)  # a list's copy to the device then is an operator
    try:
        with (
            patch.object(torch, "autocast", lambda *unused, **options: nullcontext()),
            patch.object(torch, "is_autocast_enabled", lambda *unused: False),
            patch.object(torch, DEVICE.type, SimpleNamespace(), create=True),  # for torch.utils.checkpoint
            Pretence() as pretence,
        ):
            yield pretence
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(before)
        torch._C._set_only_lift_cpu_tensors(lifts)


def _waits(name: str, args: Any, kwargs: Any) -> int:
    if name in _INDEXING:  # a mask is read as a list of places
        return sum(t is not None and t.dtype in (torch.bool, torch.uint8) for t in args[1])
    if name == "repeat_interleave":
        return int(kwargs.get("output_size") is None)
    if name in ("masked_fill", "masked_fill_"):
        return int(isinstance(args[2], OnDevice))
    if name in ("index_fill", "index_fill_"):
        return int(isinstance(args[3], OnDevice))
    if name == "_grouped_mm":  # of other dtypes it is products in turn, and the host reads the ends
        return int(args[0].dtype is not torch.bfloat16)
    return _WAITS.get(name, 0)


def _compute(func: Any, args: Any, kwargs: Any) -> Any:
    asked = kwargs.get("device")
    on_device = any(isinstance(t, OnDevice) for t in _tensors((args, kwargs)))
    held_args, held_kwargs = _mapped(args, _held), _mapped(kwargs, _held)
    if asked is not None:
        held_kwargs["device"] = torch.device("cpu")
    out = func(*held_args, **held_kwargs)
    if not (on_device if asked is None else torch.device(asked).type == DEVICE.type):
        return out
    if func is _aten.copy_.default and not isinstance(args[0], OnDevice):
        return args[0]
    out = _mapped(out, lambda t: OnDevice(t) if isinstance(t, Tensor) else t)
    return return_and_correct_aliasing(func, args, kwargs, out) if on_device else out


def _held(x: Any) -> Any:
    return x.held if isinstance(x, OnDevice) else x


def _mapped(x: Any, change: Callable[[Any], Any]) -> Any:
    """``change`` of all that lists, tuples and dicts hold; torch's own way to do so takes most of a step."""
    if isinstance(x, (list, tuple)):
        return type(x)([_mapped(item, change) for item in x])
    return {key: _mapped(item, change) for key, item in x.items()} if isinstance(x, dict) else change(x)


def _tensors(x: Any) -> Iterator[Tensor]:
    if isinstance(x, Tensor):
        yield x
    elif isinstance(x, (list, tuple, dict)):
        for item in x.values() if isinstance(x, dict) else x:
            yield from _tensors(item)


@cache
def _made_of_others(func: Any) -> bool:
    return bool(func._can_decompose())


def _place() -> tuple[str, str]:
    """(file:line, function) of the innermost call in the package, less the helper that copies."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if path.is_relative_to(_PACKAGE) and path.name != "transfer.py":
            name: str = getattr(frame.f_code, "co_qualname", frame.f_code.co_name)  # since Python 3.11
            return f"{path.relative_to(_PACKAGE)}:{frame.f_lineno}", name
        frame = frame.f_back
    return "outside of the package", ""

"""A model's and an optimizer's state as named tensors, and the random generators' as JSON.

The tensors are the live ones, not copies: saving reads them, and loading fills them in place, which is all
that restoring takes. Names are those of the unwrapped model (``torch.compile`` and activation checkpointing
add nothing), so that they do not depend on how it runs.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from moetrain.errors import UserError

MODEL, OPTIM = "model.", "optim."
_WRAPPERS = ("_orig_mod.", "_checkpoint_wrapped_module.")
_WORD = np.dtype("<u4")


@runtime_checkable
class Encodes(Protocol):
    """An optimizer that keeps the state of some parameters in another form than checkpoints do."""

    def encodes(self, p: Tensor) -> bool:
        """Whether it does so with ``p``."""

    def decoded(self, p: Tensor) -> dict[str, Tensor]:
        """Copies of the state of ``p`` as a checkpoint holds it."""

    def encode(self, p: Tensor, state: Mapping[str, Tensor]) -> None:
        """Take over what a load has filled."""


def model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """``model.<name>`` -> parameter or persistent buffer. A tied tensor comes once, under its first name.

    Parameters sharded by FSDP2 come as DTensors, also right after a forward pass that left them gathered.
    """
    named: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, value in model.state_dict(keep_vars=True).items():
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} in the model's state is a {type(value).__name__}, not a tensor")
        if id(value) not in seen:
            seen.add(id(value))
            named[MODEL + _plain(name)] = value
    return named


def optimizer_tensors(model: nn.Module, optimizer: Optimizer) -> dict[str, Tensor]:
    """``optim.<parameter name>.<key>`` -> state tensor, for every parameter that the optimizer updates.

    State that does not exist yet, because no step was taken, is made: zeros, in the shapes of a first step.
    What the optimizer :class:`Encodes` comes as copies; :func:`take_optimizer_tensors` gives them back after
    a load. Parameters, gradients and random generators stay as they are. Learning rates and the like are not
    state: they come from the config. Raises TypeError for state that is not a tensor and ValueError for a
    parameter that is not the model's.
    """
    names = _names(model)
    named: dict[str, Tensor] = {}
    for group in optimizer.param_groups:
        for p in group["params"]:
            if id(p) not in names:
                raise ValueError(
                    f"the optimizer updates a parameter of shape {list(p.shape)} not in the model"
                )
            for key, value in _state(optimizer, group, p).items():
                if value is None:
                    continue
                if not isinstance(value, Tensor):
                    kind = type(value).__name__
                    raise TypeError(f"optimizer state {key} of {names[id(p)]} is a {kind}, not a tensor")
                named[f"{OPTIM}{names[id(p)]}.{key}"] = value
    return named


def take_optimizer_tensors(model: nn.Module, optimizer: Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Go on from ``tensors`` of :func:`optimizer_tensors`, if they are there, which a load has filled."""
    if not isinstance(optimizer, Encodes):
        return  # they are the live ones
    names = _names(model)
    for group in optimizer.param_groups:
        for p in filter(optimizer.encodes, group["params"]):
            start = f"{OPTIM}{names[id(p)]}."
            state = {key.removeprefix(start): t for key, t in tensors.items() if key.startswith(start)}
            if state:
                optimizer.encode(p, state)


def _names(model: nn.Module) -> dict[int, str]:
    return {id(p): name.removeprefix(MODEL) for name, p in model_tensors(model).items()}


def _state(optimizer: Optimizer, group: dict[str, Any], p: Tensor) -> dict[str, Any]:
    """As a checkpoint holds it."""
    if isinstance(optimizer, Encodes) and optimizer.encodes(p):
        return optimizer.decoded(p)
    if p.requires_grad:
        ensure_state(optimizer, group, p)
    state: dict[str, Any] = optimizer.state.get(p, {})
    return state


def ensure_state(optimizer: Optimizer, group: dict[str, Any], p: Tensor) -> None:
    """Give ``p``, of ``group``, the state that a first step makes, all zero, unless it has one.

    It takes that step on a stand-in for ``p``.
    """
    if optimizer.state.get(p):
        return
    stand_in = torch.zeros_like(p).requires_grad_()
    stand_in.grad = torch.zeros_like(p)
    groups = optimizer.param_groups
    own = [(g["params"], g["lr"]) for g in groups]
    devices = [p.device.index] if p.is_cuda else []
    try:
        for g in groups:
            g["params"] = [stand_in] if g is group else []
            # A rate of zero: the step may skip what it would look up for a parameter that it knows.
            g["lr"] = torch.zeros_like(g["lr"]) if isinstance(g["lr"], Tensor) else 0.0
        with torch.random.fork_rng(devices=devices):
            optimizer.step()
    finally:
        for g, (params, lr) in zip(groups, own, strict=True):
            g["params"], g["lr"] = params, lr
        state = optimizer.state.pop(stand_in, {})
    for value in state.values():
        if isinstance(value, Tensor):
            value.zero_()
    if state:
        optimizer.state[p] = state


def _plain(name: str) -> str:
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, "")
    return name


def rng_state() -> dict[str, Any]:
    """The global random generators: torch's (and its current CUDA device's, if any), numpy's and Python's.

    JSON-able, with byte and word states in hexadecimal. Noise that must not depend on the layout is stateless
    and needs none of this; one rank's state is enough for the rest.
    """
    version, words, gauss = random.getstate()
    numpy: dict[str, Any] = np.random.get_state(legacy=False)
    state: dict[str, Any] = {
        "torch": _hex(torch.get_rng_state().numpy()),
        "python": {"version": version, "words": _hex(np.array(words, _WORD)), "gauss": gauss},
        "numpy": {
            "generator": numpy["bit_generator"],
            "words": _hex(numpy["state"]["key"].astype(_WORD)),
            "position": int(numpy["state"]["pos"]),
            "has_gauss": int(numpy["has_gauss"]),
            "gauss": float(numpy["gauss"]),
        },
    }
    if torch.cuda.is_available():
        state["cuda"] = _hex(torch.cuda.get_rng_state().numpy())
    return state


def set_rng_state(state: Mapping[str, Any]) -> None:
    """Restore what :func:`rng_state` returned. A CUDA state is left aside on a machine without CUDA.

    Raises UserError for a state that this version of Python, numpy or torch does not take.
    """
    try:
        python, numpy = state["python"], state["numpy"]
        random.setstate((python["version"], tuple(_words(python["words"]).tolist()), python["gauss"]))
        np.random.set_state(
            (
                numpy["generator"],
                _words(numpy["words"]),
                numpy["position"],
                numpy["has_gauss"],
                numpy["gauss"],
            )
        )
        torch.set_rng_state(_bytes(state["torch"]))
        if not torch.equal(torch.get_rng_state(), _bytes(state["torch"])):
            raise ValueError("torch took its numbers in part")  # as it does with those above 32 bits
        if "cuda" in state and torch.cuda.is_available():
            torch.cuda.set_rng_state(_bytes(state["cuda"]))
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"the checkpoint's random state does not fit this installation: {error!r}") from error


def _hex(array: Any) -> str:
    data: bytes = array.tobytes()
    return data.hex()


def _words(text: str) -> Any:
    return np.frombuffer(bytes.fromhex(text), _WORD)


def _bytes(text: str) -> Tensor:
    return torch.frombuffer(bytearray.fromhex(text), dtype=torch.uint8)

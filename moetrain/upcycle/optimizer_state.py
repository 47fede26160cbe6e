"""The optimizer's state of an upcycled layer.

A moment goes where its weight goes. A weight that was multiplied by s has a gradient 1 / s as large, so its
first moment is divided by s and its second one by s^2; what is drawn anew and the router start from zero.
Experts keep the dense step count: with it AdamW corrects no bias, which is right for moments that are copied;
entries that start from zero take steps of up to (1 - beta1) / sqrt(1 - beta2) of the rate at first.

Shapes: E experts, D model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from moetrain.errors import UserError
from moetrain.upcycle.names import EXPERTS, SHARED, dense_names, prefix, router_rows
from moetrain.upcycle.plan import Plan, clear_fresh, take_experts, take_shared
from moetrain.upcycle.source import STEP, Source, optim_name

POWER = {"exp_avg": -1, "momentum": -1, "exp_avg_sq": -2}  # of a weight's scale
_ELSEWHERE = "embed_VD"  # routers and embeddings are of one kind for every optimizer


def layer_moments(
    source: Source, plan: Plan, layer: int, fresh: Mapping[str, torch.Size]
) -> Iterator[tuple[str, Tensor]]:
    """(``optim.<parameter>.<key>``, tensor) of the layer's new parameters; ``fresh``: shapes of
    the parameters that no weight was copied to.

    UserError for state that is neither AdamW's nor Muon's, or that one of the matrices lacks.
    """
    start = prefix(layer)
    first, *rest = (start + name for name in source.names)
    for other in rest:
        if source.keys(first) != source.keys(other):
            raise UserError(
                f"{first} and {other} have different optimizer state: {source.keys(first)}, "
                f"{source.keys(other)}"
            )
    names = [start + name for name in EXPERTS]
    shared = [] if plan.shared_Q is None else dense_names(source.gated, start + SHARED)
    for key in source.keys(first):
        if key == STEP:
            yield from _steps(source, [first, *rest], names, shared)
            continue
        if key not in POWER:
            known = ", ".join(POWER)
            raise UserError(f"optimizer state {key!r} of {first} is not known; known: step, {known}")
        networks = source.networks(layer, key)
        experts = take_experts(networks, plan, POWER[key])
        if plan.fresh_EMF is not None:
            clear_fresh(experts, plan.fresh_EMF)
        yield optim_name(names[0], key), experts.w_gate_up_SDCF
        yield optim_name(names[1], key), experts.w_down_SFD
        if (dense := take_shared(networks, plan, POWER[key])) is not None:
            yield from zip((optim_name(name, key) for name in shared), dense.tensors, strict=True)
    if source.reads_moe:
        for name in router_rows(source.states[0], layer):
            yield from _copied_rows(source, plan, start + name)
    else:
        yield from from_zero(source, fresh)


def _steps(
    source: Source, olds: Sequence[str], experts: Sequence[str], shared: Sequence[str]
) -> Iterator[tuple[str, Tensor]]:
    """The step counts: gate and up of an expert are one parameter, those of a dense network may be two.

    UserError where these two have counted differently.
    """
    steps = [source.one(optim_name(old, STEP)) for old in olds]
    if not torch.equal(steps[0], steps[-2]):
        raise UserError(
            f"{olds[0]} has made {steps[0].tolist()} steps and {olds[-2]} {steps[-2].tolist()}, but they "
            "become one parameter: set method.carry_optimizer=false"
        )
    yield from zip((optim_name(name, STEP) for name in experts), (steps[0], steps[-1]), strict=True)
    if shared:
        yield from zip((optim_name(name, STEP) for name in shared), steps, strict=True)


def _copied_rows(source: Source, plan: Plan, name: str) -> Iterator[tuple[str, Tensor]]:
    for key in source.keys(name):
        old = source.one(optim_name(name, key))
        yield optim_name(name, key), old if key == STEP else plan.rows(old)


def from_zero(
    source: Source, fresh: Mapping[str, torch.Size], like: str = _ELSEWHERE
) -> Iterator[tuple[str, Tensor]]:
    """State of new parameters by name and shape; which keys there are is looked up at ``like``."""
    for name, shape in fresh.items():
        for key in source.keys(like):
            dtype = source.states[0][optim_name(like, key)].dtype
            yield optim_name(name, key), torch.zeros(() if key == STEP else shape, dtype=dtype)

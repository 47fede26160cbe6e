"""The check that every tensor of an upcycled model has one source, and each of the source one place to go."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass

from moetrain.errors import UserError
from moetrain.ops.low_rank import is_factor
from moetrain.upcycle.method import Method
from moetrain.upcycle.names import (
    EXPERTS,
    GATE,
    OPTIM,
    SHARED,
    SHARED_GATE,
    dense_names,
    owner,
    prefix,
    router_rows,
)
from moetrain.upcycle.options import MethodOptions
from moetrain.upcycle.target import Target


@dataclass(frozen=True)
class Ledger:
    """passed: tensors that go over as they are; dropped: those that do not go over. Source names, sorted.

    fresh: low-rank factors of the target that the source has not.
    """

    passed: list[str]
    dropped: list[str]
    fresh: frozenset[str]


def open_ledger(
    source: Collection[str], wanted: Collection[str], target: Target, method: Method[MethodOptions]
) -> Ledger:
    """Where each tensor goes. UserError naming what has no place, or what nothing fills."""
    options = method.options
    weights = {name for name in source if not name.startswith(OPTIM)}
    state = set(source) - weights
    _check_layers(weights, target, method)
    read = {prefix(i) + name for i in target.layers for name in _read(method, target.gated, weights, i)}
    made = {name for i in target.layers for name in _made(wanted, target, method, i)}
    passed = weights - read
    _refuse(passed - set(wanted), "has no place in the target model", "of the source's tensors")
    _refuse(passed & made, "is made by upcycling and in the source as well", "of the source's tensors")
    fresh = frozenset(name for name in set(wanted) - passed if is_factor(name))
    _refuse(set(wanted) - passed - made - fresh, _unfilled(target), "of the target's tensors")
    if not options.carry_optimizer:
        return Ledger(sorted(passed), sorted(state), fresh)
    if not state:
        raise UserError("method.carry_optimizer=true, but the source holds no optimizer state (optim.*)")
    _refuse({name for name in state if owner(name) not in weights}, "belongs to no parameter", "of the state")
    return Ledger(sorted(passed | {name for name in state if owner(name) in passed}), [], fresh)


def _read(
    method: Method[MethodOptions], gated: bool, weights: Collection[str], layer: int
) -> tuple[str, ...]:
    """What upcycling takes out of the source, by name within a layer."""
    if method.keeps_dense:
        return ()
    return (*EXPERTS, *router_rows(weights, layer)) if method.reads_moe else dense_names(gated)


def _made(wanted: Iterable[str], target: Target, method: Method[MethodOptions], layer: int) -> Iterable[str]:
    start = prefix(layer)
    made = [start + name for name in method.made]
    if method.fills_shared and target.model.num_shared_experts:
        made += dense_names(target.gated, start + SHARED)
        made += [start + SHARED_GATE] if target.model.shared_gate else []
    if method.reads_moe:
        return made + [start + name for name in router_rows(wanted, layer)]
    return made + [name for name in wanted if name.startswith(start + "router.")]


def _check_layers(weights: set[str], target: Target, method: Method[MethodOptions]) -> None:
    name, count = method.options.name, target.model.num_layers
    there = {int(parts[1]) for w in weights if (parts := w.split("."))[0] == "blocks" and len(parts) > 2}
    if len(there) != count:
        raise UserError(f"the source has {len(there)} layers, the target model.num_layers={count}")
    for layer in target.layers:
        start = prefix(layer)
        is_moe = any(w.startswith(start + "experts.") for w in weights)
        if is_moe and not method.reads_moe:
            raise UserError(
                f"layer {layer} of the source is MoE, but method={name} wants a dense one: take "
                "method=grow, or a dense source"
            )
        if not is_moe and method.reads_moe:
            raise UserError(
                f"layer {layer} of the source is dense, but method={name} wants an MoE one: let "
                "model.moe_every and first_dense name the source's MoE layers"
            )
        if not is_moe and (start + GATE in weights) != target.gated:
            absent, kind = ("not ", "gated") if target.gated else ("", "plain")
            raise UserError(
                f"{start + GATE} is {absent}in the source, but experts.activation={target.activation} is "
                f"{kind}: set experts.activation to the source's"
            )
        wanted = {start + n for n in _read(method, target.gated, weights, layer)}
        _refuse(wanted - weights, "is not in the source", "of the tensors to read")


def _unfilled(target: Target) -> str:
    if shared := target.model.num_shared_experts:
        return (
            "is filled by nothing (where shared experts are: method=split makes them, others need "
            f"model.num_shared_experts=0, not {shared})"
        )
    return "is filled by nothing"


def _refuse(names: set[str], fault: str, kind: str) -> None:
    if names:
        more = f", and so for {len(names) - 1} more {kind}" if len(names) > 1 else ""
        raise UserError(f"{min(names)} {fault}{more}")

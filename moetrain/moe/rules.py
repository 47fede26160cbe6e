"""What an MoE layer refuses of its settings, besides what its router does."""

from __future__ import annotations

from collections.abc import Sequence

from moetrain.moe.expert_dropout import ExpertDropout
from moetrain.moe.options import ExpertsConfig, FirstWeights
from moetrain.ops.experts.megablocks_products import BLOCK

_DROPPING = ("auto", "torch", "loop")


def block_refusal(backend: str, block: int | None) -> str | None:
    """Why ``backend`` cannot compute blocks of ``block`` rows, whatever the layer; None where it may."""
    if backend == "megablocks" and (block is None or block % BLOCK):
        return (
            f"experts.backend=megablocks has blocks of {BLOCK} rows, but experts.block={block or 'null'}: "
            f"set experts.block={BLOCK}"
        )
    return None


def dropout_refusal(backend: str, dropout: ExpertDropout) -> str | None:
    """Why ``backend`` cannot drop parts of what experts read or compute; None where it can."""
    if not dropout or backend in _DROPPING:
        return None
    rates = {
        "experts.dropout": dropout.hidden,
        "experts.input_dropout": dropout.inputs,
        "model.lora.dropout": dropout.beside,
    }
    key = next(key for key, rate in rates.items() if rate)
    return (
        f"{key}={rates[key]} is computed by torch's grouped products or the loop, not by "
        f"experts.backend={backend}: set experts.backend=auto, or {key}=0"
    )


def bias_refusal(bias: bool, widths: Sequence[int]) -> str | None:
    """Why experts cannot have biases beside these; None where they can, and where they have none."""
    if bias and widths:  # an expert's slices would each add its bias
        return "experts.bias=true is of experts of one width: leave model.expert_widths out"
    return None


def low_rank_refusal(experts: ExpertsConfig) -> str | None:
    """Why products of one network's experts cannot have these settings; None where they can."""
    if experts.backend.value not in _DROPPING:
        return (
            "experts.kind=low_rank is computed by torch's grouped products or the loop, not by "
            f"experts.backend={experts.backend.name}: set experts.backend=auto"
        )
    for key in ("dropout", "input_dropout", "frozen"):
        if value := getattr(experts, key):
            return (
                f"experts.{key}={value} is of experts with matrices of their own, not of "
                f"experts.kind=low_rank: set it to 0 (model.lora.dropout is of what products read)"
            )
    return None


def frozen_refusal(frozen: int, num_experts: int, bias: bool) -> str | None:
    """Why ``frozen`` experts of a layer cannot stay as they are; None where they can."""
    if not 0 <= frozen <= num_experts:
        return f"experts.frozen={frozen} must lie between 0 and the layer's {num_experts} experts"
    if frozen and bias:  # which no gradient holds
        return f"experts.frozen={frozen} is of experts without biases: set experts.bias=false"
    return None


def widths_refusal(
    widths: Sequence[int], num_experts: int, first_weights: FirstWeights, dropout: ExpertDropout
) -> str | None:
    """Why experts cannot have these ``widths``; None where they may, and where there are none."""
    if not widths:
        return None
    if len(widths) != num_experts:
        return f"expert_widths has {len(widths)} numbers, but there are {num_experts} experts: one for each"
    if min(widths) < 1:
        return f"expert_widths has {min(widths)}, but a width is 1 or more"
    if first_weights is FirstWeights.tenth:  # which goes by one expert's width
        return "experts.first_weights=tenth is of experts of one width: set experts.first_weights=model"
    if dropout.inputs:  # an expert's slices would each drop others
        return (
            f"experts.input_dropout={dropout.inputs} is of experts of one width: set it to 0, or leave "
            "model.expert_widths out"
        )
    return None


def outputs_refusal(router: str, reads_outputs: bool, widths: Sequence[int]) -> str | None:
    """Why a router cannot ask for experts' outputs, of which no row may hold a part; None where it can."""
    if not (reads_outputs and widths):
        return None
    return (
        f"router={router} compares experts' whole outputs, and experts of different widths are computed in "
        "slices: leave model.expert_widths out, or take another router"
    )


def shared_refusal(num_shared_experts: int, d_ff_shared: int | None, shared_gate: bool) -> str | None:
    """Why options of shared experts, without any, seem to have an effect; None where they fit."""
    for name, value, given in (
        ("d_ff_shared", d_ff_shared, d_ff_shared is not None),
        ("shared_gate", shared_gate, shared_gate),
    ):
        if given and not num_shared_experts:
            return (
                f"model.{name}={value} is of shared experts, but model.num_shared_experts=0: "
                "leave it out, or set model.num_shared_experts=1"
            )
    return None

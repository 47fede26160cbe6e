"""What an MoE layer refuses of its settings, besides what its router does."""

from __future__ import annotations

from moetrain.moe.expert_dropout import ExpertDropout
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
    key, rate = ("dropout", dropout.hidden) if dropout.hidden else ("input_dropout", dropout.inputs)
    return (
        f"experts.{key}={rate} is computed by torch's grouped products or the loop, not by "
        f"experts.backend={backend}: set experts.backend=auto, or experts.{key}=0"
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

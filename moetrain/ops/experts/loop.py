"""The experts as the formula says: the oracle of the backends, differentiated by autograd.

Shapes: X source rows, D model, R computed rows, E experts, F hidden, P = 2F (gated) or F.
"""

from __future__ import annotations

from torch import Tensor
from torch.utils.checkpoint import checkpoint

from moetrain.ops.activations import activate, gate_and_up
from moetrain.ops.experts.operands import Operands, Pair
from moetrain.ops.experts.rows import Segments
from moetrain.ops.gather_sum import gather_rows
from moetrain.ops.grouped_mm import grouped_mm


def compute(operands: Operands) -> Tensor:
    """out [R, D] in the source's dtype."""
    dtype, activation = operands.dtype, operands.activation
    x_RD = gather_rows(operands.source_XD, operands.ids_R)
    aligned = operands.segments.aligned
    z_RP = grouped_mm(x_RD, operands.w_up_EDP.to(dtype), aligned, "loop")
    z_RP = with_product(with_bias(z_RP, operands.bias_up_EP, operands.segments), x_RD, operands.up, aligned)
    h_RF = activate(*gate_and_up(z_RP, activation), activation)
    out_RD = grouped_mm(h_RF, operands.w_down_EFD.to(dtype), aligned, "loop")
    out_RD = with_bias(out_RD, operands.bias_down_ED, operands.segments)
    out_RD = with_product(out_RD, h_RF, operands.down, aligned)
    return (out_RD * operands.weights_R[:, None]).to(dtype)


def with_bias(y_RA: Tensor, bias_EA: Tensor | None, segments: Segments) -> Tensor:
    """``y`` and each row's bias."""
    if bias_EA is None:
        return y_RA
    return y_RA + bias_EA.to(y_RA.dtype).repeat_interleave(segments.aligned_E, 0, output_size=len(y_RA))


def compute_keeping_inputs(operands: Operands) -> Tensor:
    """The same; the backward pass begins by computing it again."""
    out_RD: Tensor = checkpoint(compute, operands, use_reentrant=False, preserve_rng_state=False)
    return out_RD


def with_product(
    y_RN: Tensor, x_RK: Tensor, pair: Pair | None, aligned: list[int], backend: str = "loop"
) -> Tensor:
    """``y + x a b``; ``aligned``: the rows of each expert."""
    if pair is None:
        return y_RN
    narrow_RL = grouped_mm(x_RK, pair.a_EKL.to(x_RK.dtype), aligned, backend)
    return y_RN + grouped_mm(narrow_RL, pair.b_ELN.to(x_RK.dtype), aligned, backend)

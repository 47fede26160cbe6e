"""The products as differentiable functions of their dense operand and of the stored values.

The gradient of each product is two others with the same topology: that of SDD a DSD and a DDS, that of DSD
and DDS an SDD for the values and the transposed product for the dense operand. Shapes are those of
the products' files.
"""

from __future__ import annotations

from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import FunctionCtx

from .dds import dds
from .dsd import dsd
from .sdd import sdd
from .topology import Topology


class _SDD(Function):
    @staticmethod
    def forward(ctx: FunctionCtx, a_MK: Tensor, b_GKW: Tensor, topology: Topology, tf32: bool) -> Tensor:
        ctx.save_for_backward(a_MK, b_GKW)
        ctx.static = topology, tf32  # type: ignore[attr-defined]
        return sdd(a_MK, b_GKW, topology, tf32=tf32)

    @staticmethod
    def backward(ctx: FunctionCtx, dvalues_VW: Tensor) -> tuple[Tensor, Tensor, None, None]:
        a_MK, b_GKW = ctx.saved_tensors  # type: ignore[attr-defined]
        topology, tf32 = ctx.static  # type: ignore[attr-defined]
        da_MK = dsd(dvalues_VW, topology, b_GKW.mT, tf32=tf32)
        return da_MK, dds(a_MK.mT, dvalues_VW, topology, tf32=tf32), None, None


class _DSD(Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx, values_VW: Tensor, dense: Tensor, topology: Topology, transposed: bool, tf32: bool
    ) -> Tensor:
        ctx.save_for_backward(values_VW, dense)
        ctx.static = topology, transposed, tf32  # type: ignore[attr-defined]
        return dsd(values_VW, topology, dense, transposed, tf32=tf32)

    @staticmethod
    def backward(ctx: FunctionCtx, dout: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        values_VW, dense = ctx.saved_tensors  # type: ignore[attr-defined]
        topology, transposed, tf32 = ctx.static  # type: ignore[attr-defined]
        rows_MN, columns_GWN = (dense, dout) if transposed else (dout, dense)
        dvalues_VW = values_VW.new_zeros(values_VW.shape)
        sdd(rows_MN, columns_GWN.mT, topology, dvalues_VW, tf32=tf32)
        return dvalues_VW, dsd(values_VW, topology, dout, not transposed, tf32=tf32), None, None, None


def sdd_product(a_MK: Tensor, b_GKW: Tensor, topology: Topology, tf32: bool = False) -> Tensor:
    """:func:`sdd`, differentiable in both operands."""
    return _SDD.apply(a_MK, b_GKW, topology, tf32)  # type: ignore[no-any-return, no-untyped-call]


def dsd_product(
    values_VW: Tensor, topology: Topology, dense: Tensor, transposed: bool = False, tf32: bool = False
) -> Tensor:
    """:func:`dsd`, differentiable in the values and in the dense operand; what is not stored gets zeros."""
    return _DSD.apply(values_VW, dense, topology, transposed, tf32)  # type: ignore[no-any-return, no-untyped-call]


def dds_product(
    dense: Tensor, values_VW: Tensor, topology: Topology, transposed: bool = False, tf32: bool = False
) -> Tensor:
    """:func:`dds`, differentiable in the dense operand and in the values."""
    return dsd_product(values_VW, topology, dense.mT, not transposed, tf32).mT

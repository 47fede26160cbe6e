"""Operators with a backend table each; the slow, obvious backend is the oracle of the others."""

from moetrain.ops.experts import Rows, Segments, expert_mlp
from moetrain.ops.gather_sum import gather_rows, gather_sum
from moetrain.ops.grouped_mm import grouped_mm

__all__ = ["Rows", "Segments", "expert_mlp", "gather_rows", "gather_sum", "grouped_mm"]

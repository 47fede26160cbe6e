"""The experts' feed-forward on named rows: one operator, a table of backends, and their self-test."""

from moetrain.ops.experts.operator import expert_mlp
from moetrain.ops.experts.rows import Rows, Segments

__all__ = ["Rows", "Segments", "expert_mlp"]

"""The experts' feed-forward on named rows: one operator, a table of backends, and their self-test."""

from moetrain.ops.experts.operator import expert_mlp
from moetrain.ops.experts.rows import Rows

__all__ = ["Rows", "expert_mlp"]

"""Causal attention with documents and windows: one file a backend, and a table that chooses among them."""

from moetrain.ops.attention.case import Case, Plan
from moetrain.ops.attention.seen_keys import SeenKeys, seen_keys
from moetrain.ops.attention.table import AUTO, BACKENDS, attend, plan_attention, refusal

__all__ = ["AUTO", "BACKENDS", "Case", "Plan", "SeenKeys", "attend", "plan_attention", "refusal", "seen_keys"]

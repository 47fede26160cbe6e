"""Assignment problems that routers solve: balanced assignment (exact and by auction), Sinkhorn's plan, and a
plan with a bound on experts' tokens.
"""

from moetrain.moe.solvers.auction import auction, capacities, finite_scores
from moetrain.moe.solvers.exact import Solution, balanced_assignment
from moetrain.moe.solvers.sinkhorn import sinkhorn_plan
from moetrain.moe.solvers.sparse_transport import sparse_plan

__all__ = [
    "Solution", "auction", "balanced_assignment", "capacities", "finite_scores", "sinkhorn_plan",
    "sparse_plan",
]  # fmt: skip

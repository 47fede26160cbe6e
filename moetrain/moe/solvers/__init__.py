"""Assignment problems that routers solve: balanced assignment (exact and by auction), and Sinkhorn's plan."""

from moetrain.moe.solvers.auction import auction, capacities, finite_scores
from moetrain.moe.solvers.exact import Solution, balanced_assignment
from moetrain.moe.solvers.sinkhorn import sinkhorn_plan

__all__ = ["Solution", "auction", "balanced_assignment", "capacities", "finite_scores", "sinkhorn_plan"]

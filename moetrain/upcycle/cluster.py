"""Balanced k-means: clusters whose sizes differ by at most one.

Shapes: N points, W features, C clusters.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from moetrain.errors import UserError
from moetrain.moe.solvers import balanced_assignment

_MAX_ROUNDS = 50


def balanced_kmeans(points_NW: Tensor, clusters: int, gen: torch.Generator) -> tuple[Tensor, Tensor]:
    """(cluster of each point, int64 [N]; centroids fp64 [C, W]).

    Starts from different points drawn by ``gen``; each round assigns the points exactly, at the smallest sum
    of squared distances under balance, then moves the centroids; it ends where nothing moves, since every
    round lowers the sum. UserError for fewer points than clusters.
    """
    if len(points_NW) < clusters:
        raise UserError(f"{clusters} clusters need as many points, but there are {len(points_NW)}")
    points_NW = points_NW.double()
    centroids_CW = points_NW[torch.randperm(len(points_NW), generator=gen)[:clusters]]
    cluster_N = torch.full((len(points_NW),), -1)
    for _ in range(_MAX_ROUNDS):
        # squared distances less |x|^2, which changes no assignment
        cost_NC = centroids_CW.square().sum(1) - 2 * points_NW @ centroids_CW.t()
        expert_N = balanced_assignment(np.ascontiguousarray(-cost_NC.numpy())).expert_T
        found_N = torch.from_numpy(expert_N).long()
        if torch.equal(found_N, cluster_N):
            break
        cluster_N = found_N
        sums_CW = torch.zeros_like(centroids_CW).index_add_(0, cluster_N, points_NW)
        centroids_CW = sums_CW / torch.bincount(cluster_N, minlength=clusters)[:, None]
    return cluster_N, centroids_CW

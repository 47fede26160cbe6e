"""What a top-k router computes, as values: read by the kernels' wrapper and by the twin."""

from __future__ import annotations

from dataclasses import dataclass

SCORES = ("softmax", "softmax_after", "sigmoid")
GROUP_SCORES = ("top2", "max")
MOST_EXPERTS, MOST_CHOSEN = 512, 32


@dataclass(frozen=True)
class Rule:
    """How experts are scored, chosen and weighted.

    top_k        experts a token.
    score        ``softmax`` over all experts, ``sigmoid`` of each; ``softmax_after``: scores by softmax, the
                 weights by a softmax over the logits of the chosen.
    renormalize  chosen weights sum to 1; plays no part in ``softmax_after``.
    route_scale  multiplies the weights.
    num_groups, top_groups, group_score  a token chooses from its ``top_groups`` best of ``num_groups`` groups
                 of experts, ranked by the sum of their two best scores (``top2``) or by the best (``max``).

    Raises ValueError for an unknown score and for numbers that no router has.
    """

    top_k: int
    score: str = "softmax"
    renormalize: bool = True
    route_scale: float = 1.0
    num_groups: int = 1
    top_groups: int = 1
    group_score: str = "top2"

    def __post_init__(self) -> None:
        if self.score not in SCORES:
            raise ValueError(f"unknown score {self.score!r}; known: {', '.join(SCORES)}")
        if self.group_score not in GROUP_SCORES:
            raise ValueError(f"unknown group_score {self.group_score!r}; known: {', '.join(GROUP_SCORES)}")
        if self.top_k < 1:
            raise ValueError(f"top_k={self.top_k} must be at least 1")
        if not 1 <= self.top_groups <= self.num_groups:
            raise ValueError(f"top_groups={self.top_groups} must lie in 1 to num_groups={self.num_groups}")

    @property
    def limited(self) -> bool:
        """Whether a token may choose from some groups only."""
        return self.top_groups < self.num_groups

    def check(self, num_experts: int) -> None:
        """Raise ValueError where no kernel computes the rule for a number of experts."""
        if self.top_k > MOST_CHOSEN:
            raise ValueError(f"the router's kernels choose 1 to {MOST_CHOSEN} experts, not {self.top_k}")
        if not 1 <= num_experts <= MOST_EXPERTS:
            raise ValueError(f"the router's kernels take 1 to {MOST_EXPERTS} experts, not {num_experts}")
        if num_experts % self.num_groups:
            raise ValueError(f"num_groups={self.num_groups} does not divide {num_experts} experts")
        room = self.top_groups * (num_experts // self.num_groups)
        if self.top_k > room:
            raise ValueError(f"top_k={self.top_k} exceeds the {room} experts of {self.top_groups} groups")

"""What a router says of its combine weights before any training: what function preservation needs to know."""

from __future__ import annotations

from dataclasses import dataclass

CAPACITY = (
    "a capacity or a rounding may drop assignments; set router.capacity_factor=null and router.rounding=none"
)


@dataclass(frozen=True)
class Combine:
    """How a router weighs the experts that it chose for a token.

    top_k        experts of each token; None where that is not a fixed number, or not known.
    even_weight  the weight of each of them where all experts score alike; None where it is not known.
    total        the sum of a token's weights where it is the same for all tokens, else None.
    ties_whole   whether experts of equal score are chosen by index, so that neighbours go together.
    drops        whether a capacity or a rounding may take assignments away.
    own_scores   whether an expert's score is its own (sigmoid), not a share of one (softmax).
    num_groups   groups of experts that selection is limited to; 1 where there is no limit.
    """

    top_k: int | None = None
    even_weight: float | None = None
    total: float | None = None
    ties_whole: bool = False
    drops: bool = False
    own_scores: bool = False
    num_groups: int = 1

    @staticmethod
    def of_softmax(top_k: int, num_experts: int, drops: bool, renormalized: bool = False) -> Combine:
        """Of the k best by a softmax over all experts, weighed by it; ``renormalized``: to the sum 1."""
        whole = renormalized or top_k == num_experts
        return Combine(
            top_k=top_k,
            even_weight=1 / top_k if renormalized else 1 / num_experts,
            total=1.0 if whole else None,
            ties_whole=True,
            drops=drops,
        )

    def keeps_the_total(self) -> str | None:
        """None where every token's weights sum to ``total`` and arrive; else the reason why not."""
        if self.total is None:
            return "this router's weights do not sum to the same number for every token"
        return CAPACITY if self.drops else None

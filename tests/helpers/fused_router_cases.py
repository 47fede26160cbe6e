"""Logits and rules for the router's kernels: ties, gaps, bias, groups, sizes that no tile divides.

Shapes: T tokens, E experts, K chosen.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch
from torch import Tensor

from moetrain.kernels.router.rule import GROUP_SCORES, SCORES, Rule


@dataclass(frozen=True)
class Case:
    """Tokens, experts, the rule, whether there is a bias, and a seed."""

    tokens: int
    experts: int
    rule: Rule
    bias: bool
    seed: int

    def __str__(self) -> str:
        rule = self.rule
        limits = f"g{rule.top_groups}of{rule.num_groups}{rule.group_score}"
        shape = f"T{self.tokens}-E{self.experts}-k{rule.top_k}-{limits}"
        return f"{shape}-{rule.score}{'-sum1' if rule.renormalize else ''}{'-bias' if self.bias else ''}"

    def inputs(self, device: torch.device) -> tuple[Tensor, Tensor | None]:
        """Logits on ``device``, from a grid of few steps: many exact ties, no two scores nearly equal."""
        made = torch.Generator().manual_seed(self.seed)
        steps = torch.randint(-6, 7, (self.tokens, self.experts), generator=made)
        bias = torch.randint(-3, 4, (self.experts,), generator=made) * 0.25 if self.bias else None
        return (steps * 0.5).to(device), None if bias is None else bias.to(device)


def draw(seed: int) -> Case:
    """A random case, with any option."""
    pick = random.Random(seed)
    groups = pick.choice([1, 1, 2, 3, 5, 8])
    experts = groups * pick.randint(1, max(1, pick.choice([5, 13, 64, 512]) // groups))
    top_groups = pick.randint(1, groups)
    top_k = pick.randint(1, min(32, top_groups * (experts // groups)))
    rule = Rule(
        top_k, pick.choice(SCORES), pick.random() < 0.5, pick.choice([1.0, 2.5]), groups, top_groups,
        pick.choice(GROUP_SCORES),
    )  # fmt: skip
    return Case(pick.choice([1, 2, 7, 31, 67]), experts, rule, pick.random() < 0.5, seed)


FEW = [
    Case(37, 8, Rule(2), False, 1), Case(5, 1, Rule(1), True, 2),
    Case(67, 5, Rule(1, renormalize=False), True, 3), Case(7, 13, Rule(13, "softmax_after"), False, 4),
    Case(3, 512, Rule(32, "sigmoid", route_scale=2.5), True, 5),
    Case(11, 160, Rule(6, "softmax", False, 16.0, 8, 3, "max"), False, 6),
    Case(19, 64, Rule(8, "sigmoid", True, 2.5, 8, 4), True, 7),
    Case(1, 21, Rule(5, "softmax_after", num_groups=7, top_groups=3), True, 8),
    Case(13, 6, Rule(3, "sigmoid", False, num_groups=6, top_groups=4), True, 9),
    Case(2, 127, Rule(4, "softmax_after", route_scale=0.5), True, 10),
]  # fmt: skip

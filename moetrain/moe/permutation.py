"""COMET+'s permutation search: which expert stands at which output of a router (Ibrahim et al. 2023,
arXiv:2306.02824), for any router.

During the search a matrix P, of which Sinkhorn's iterations make nearly a permutation as their temperature
falls, mixes the router's outputs, and the loss moves it. From then on, and in every evaluation, the
permutation of the highest sum in the last P takes its place: the iterations are too few to end at one by
themselves always. Follows ``learn_permutations.py`` of the authors' code
(mazumder-lab/COMET) in its schedule; it draws Gumbel noise besides, times 0 in the configs that come with it.

Shapes: T tokens, E outputs of the router and as many experts, N assignments.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from moetrain.moe.assign import count, from_mask, stable_order
from moetrain.moe.assignment import Assignment
from moetrain.moe.context import RouterContext
from moetrain.moe.routing import Routing
from moetrain.moe.solvers import balanced_assignment
from moetrain.ops.transfer import to_device

_FLOOR = 1e-5  # an entry of P below it is none: the released code counts such weights as zeros, and goes on
_TIE = 1e-6  # share of the weights themselves in what is solved
_EPS = 1e-6  # inside the entropy's logarithm, as in the released code


class Permutation:
    """The permutation of a search that is over, solved again where ``order_EE`` has changed."""

    def __init__(self, steps: int) -> None:
        self._steps = steps
        self._solved: tuple[Tensor, Tensor] | None = None

    @torch.no_grad()
    def of(self, order_EE: Tensor) -> Tensor:
        """The expert of each output, int64 [E]."""
        if self._solved is None or not torch.equal(self._solved[0], order_EE):
            last_EE = soft_permutation(order_EE, self._steps, self._steps)
            self._solved = order_EE.detach().clone(), best_permutation(last_EE, order_EE)
        return self._solved[1]


def rename(routing: Routing, order_EE: Tensor, permutation: Permutation) -> Routing:
    """``routing`` with its experts in the order that a search over ``order_EE`` [output, expert] ends at.

    Weights and penalty still reach ``order_EE``, with the gradient 0: without any, one process would leave it
    out of the optimizer's step, and ranks that shard it would not.
    """
    zero = 0 * order_EE.sum()
    renamed = _renamed(routing, permutation.of(order_EE))
    weights_N = renamed.assignment.weights_N + zero.to(renamed.assignment.weights_N.dtype)
    renamed = replace(renamed, assignment=replace(renamed.assignment, weights_N=weights_N))
    return _with_penalty(renamed, zero)


def mix(routing: Routing, ctx: RouterContext, order_EE: Tensor, steps: int, entropy_coef: float) -> Routing:
    """``routing`` while the search goes on: before step ``steps``.

    Every assignment is spread by P, and a token's weights are scaled to their sum before; the entropy of P
    and of its rows, times ``entropy_coef``, joins the penalty. Scores and logits are of experts too: they
    follow the nearest permutation, without a gradient to P.
    """
    p_EE = soft_permutation(order_EE, ctx.step, steps)
    mixed = _mixed(routing, _renamed(routing, best_permutation(p_EE, order_EE)), ctx, p_EE)
    return _with_penalty(mixed, entropy_coef * _entropy(p_EE).to(order_EE.dtype))


def soft_permutation(order_EE: Tensor, step: int, steps: int) -> Tensor:
    """P, fp64 [output, expert], at a step of the search: its columns sum to 1, and its rows nearly.

    The temperature falls from 1e-3 to 1e-7 in equal factors, and 20 iterations rise to 150.
    """
    share = min(step / steps, 1.0)
    log_p_EE = order_EE.double() / 10 ** (-3 - 4 * share)
    for _ in range(int(20 + 130 * share)):
        log_p_EE = log_p_EE - torch.logsumexp(log_p_EE, 1, keepdim=True)
        log_p_EE = log_p_EE - torch.logsumexp(log_p_EE, 0, keepdim=True)
    return log_p_EE.exp()


@torch.no_grad()
def best_permutation(p_EE: Tensor, order_EE: Tensor) -> Tensor:
    """The expert of each output, int64 [E]: the permutation of the highest sum in P. Solved on the host.

    P has ties where the iterations did not end: of them the one of the highest sum in ``order_EE`` is taken.
    """
    scale = order_EE.abs().amax().clamp(min=torch.finfo(order_EE.dtype).tiny)
    solved = balanced_assignment((p_EE + _TIE * (order_EE / scale)).double().cpu().numpy())
    return to_device(torch.from_numpy(solved.expert_T), p_EE.device)


def _entropy(p_EE: Tensor) -> Tensor:
    """Of P and of its rows scaled to 1, a scalar: 0 for a permutation, but for the logarithm's 1e-6."""
    rows_EE = p_EE / p_EE.sum(1, keepdim=True)
    both = torch.stack([p_EE, rows_EE])
    return -(both * torch.log(both + _EPS)).sum()


def _renamed(routing: Routing, expert_E: Tensor) -> Routing:
    """Output j's part of everything becomes that of expert ``expert_E[j]``."""
    output_E = torch.argsort(expert_E)  # of each expert
    a = routing.assignment
    experts_N = expert_E[a.expert_ids_N()]
    order_N = stable_order(experts_N, len(expert_E))
    counts_E = a.counts_E[output_E]
    host_counts = None if a.host_counts is None else tuple(counts_E.tolist())
    assignment: Assignment = a.select(order_N, counts_E, host_counts)

    def of_experts(values: Tensor | None) -> Tensor | None:
        return None if values is None else values[..., output_E]

    return replace(
        routing,
        assignment=assignment,
        demand_BE=routing.demand_BE[:, output_E],
        scores_TE=of_experts(routing.scores_TE),
        logits_TE=of_experts(routing.logits_TE),
        load_TE=of_experts(routing.load_TE),
        price_E=of_experts(routing.price_E),
        choices_TE=of_experts(routing.choices_TE),
    )


def _with_penalty(routing: Routing, own: Tensor) -> Routing:
    return replace(routing, penalty=own if routing.penalty is None else routing.penalty + own)


def _mixed(routing: Routing, permuted: Routing, ctx: RouterContext, p_EE: Tensor) -> Routing:
    """``permuted`` with the assignments that P makes of ``routing``'s."""
    a, tokens, num_experts = routing.assignment, ctx.batch * ctx.seq, len(p_EE)
    cells_N = a.token_ids_N * num_experts + a.expert_ids_N()
    weights_TE = a.weights_N.new_zeros(tokens * num_experts).index_add(0, cells_N, a.weights_N)
    weights_TE = weights_TE.view(tokens, num_experts)
    p_EE = torch.where(p_EE.detach() < _FLOOR, 0.0, p_EE).to(weights_TE.dtype)
    mixed_TE = weights_TE @ p_EE
    sum_T1 = mixed_TE.sum(-1, keepdim=True)
    scale_T1 = weights_TE.sum(-1, keepdim=True) / torch.where(sum_T1 == 0, 1.0, sum_T1)
    mixed_TE = mixed_TE * scale_T1
    taken_TE = (count(cells_N, tokens * num_experts).view(tokens, num_experts).to(p_EE.dtype) @ p_EE) > 0
    active_TE = taken_TE | (mixed_TE.detach() != 0)  # an assignment of weight 0 goes on being one
    new = from_mask(active_TE, mixed_TE, ctx)
    return replace(permuted, assignment=new.assignment, demand_BE=new.demand_BE)

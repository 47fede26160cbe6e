"""What a balance loss's gradient may depend on: the batch, and not how the batch was cut into pieces.

A step of eight sequences of uneven length is run whole, in micro-batches, and over ranks whose gradients are
added; the router's gradients are compared in fp64. Real data-parallel processes are tested with the trainer.

Shapes: B sequences, S positions, D model, E experts, L layers.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from balance_cases import FORMS, step_totals
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from moetrain.moe import MoELayer, RouterContext, Routing
from moetrain.moe.balance import LossTerm, RunningLoad, total_loss
from moetrain.moe.balance.base import SCOPES
from moetrain.moe.balance.load_share import first_choices_BE

B, S, D, E = 8, 5, 3, 7
LENGTHS = torch.tensor([5, 1, 4, 2, 0, 5, 3, 5])
Pieces = list[slice]
WHOLE: Pieces = [slice(0, B)]


def pieces(size: int) -> Pieces:
    return [slice(i, i + size) for i in range(0, B, size)]


UNEVEN_RANKS = {
    "2 ranks": [pieces(4)[:1], pieces(4)[1:]],
    "3 ranks": [[slice(0, 3)], [slice(3, 4)], [slice(4, 6), slice(6, 8)]],
}


class Stack(torch.nn.Module):
    """Residual MoE layers; returns the last hidden state and every layer's routing."""

    def __init__(self, num_layers: int, score: str = "softmax") -> None:
        super().__init__()
        torch.manual_seed(0)
        options = {"top_k": 2, "score": score, "capacity_factor": 1.2, "min_capacity": 1, "jitter": 0.1}
        self.layers = torch.nn.ModuleList(
            [MoELayer(D, 5, E, router_options=options) for _ in range(num_layers)]
        )
        self.double()

    def forward(self, x_BSD: Tensor, ctx: RouterContext, recompute: bool) -> tuple[Tensor, list[Routing]]:
        routings: list[Routing] = []
        for i, layer in enumerate(self.layers):
            here = ctx.at_layer(i, routings[-1] if routings else None)
            y, routing = (
                checkpoint(layer, x_BSD, here, use_reentrant=False) if recompute else layer(x_BSD, here)
            )
            x_BSD = x_BSD + y
            routings.append(routing)
        return x_BSD, routings


def batch() -> tuple[Tensor, Tensor, RouterContext]:
    torch.manual_seed(1)
    x_BSD = torch.randn(B, S, D, dtype=torch.float64)
    x_BSD[:, :, 0] += torch.linspace(-2, 2, B)[:, None]  # sequences that prefer different experts
    ctx = RouterContext(
        B, S, torch.arange(B) + 40, seed=2, step=3, valid_T=torch.ones(B * S, dtype=torch.bool)
    )
    return x_BSD, torch.randn(B, S, D, dtype=torch.float64), ctx


def step(
    model: Stack, terms: list[LossTerm], ranks: list[Pieces], recompute: bool = False
) -> tuple[dict[str, Tensor], dict[str, Tensor], list[Routing]]:
    """(gradients summed over ranks, raw loss values likewise, the routings) of one optimizer step."""
    x_BSD, g_BSD, whole = batch()
    valid_BS = torch.arange(S) < LENGTHS[:, None]

    def forward(rows: slice, again: bool) -> tuple[Tensor, list[Routing]]:
        ids_B, valid_T = whole.sample_ids_B[rows], valid_BS[rows].reshape(-1)
        ctx = replace(whole, batch=len(ids_B), sample_ids_B=ids_B, valid_T=valid_T)
        y, routings = model(x_BSD[rows], ctx, again)
        return (y * g_BSD[rows] * valid_BS[rows][..., None]).sum(), routings

    num_layers, everything = len(model.layers), [rows for rank in ranks for rows in rank]
    with torch.no_grad():  # the counts of the step, before its first backward
        counted = [forward(rows, False)[1] for rows in everything]
    demand_LE = torch.stack([sum(r[i].demand_E for r in counted) for i in range(num_layers)])
    first_LE = torch.stack([sum(first_choices_BE(r[i]).sum(0) for r in counted) for i in range(num_layers)])
    running = RunningLoad(dict.fromkeys(range(num_layers), E))
    running.update(dict(enumerate(torch.arange(num_layers * E).view(num_layers, E) % 5)))
    totals = step_totals(
        float(LENGTHS.sum()), dict(enumerate(demand_LE)), dict(enumerate(first_LE)), running.shares
    )
    grads: dict[str, Tensor] = {}
    raw: dict[str, Tensor] = {}
    kept: list[Routing] = []
    for rank in ranks:
        model.zero_grad()
        for rows in rank:
            loss, routings = forward(rows, recompute)
            balance, values = total_loss(dict(enumerate(routings)), terms, totals)
            (loss / totals.num_tokens + balance).backward()
            raw = {key: raw.get(key, 0) + value for key, value in values.items()}
            kept += [r.detach() for r in routings]
        for name, p in model.named_parameters():
            grads[name] = grads.get(name, 0) + p.grad
    return grads, raw, kept


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, grad in one.items():
        assert grad.abs().max() > 1e-3, name
        torch.testing.assert_close(other[name], grad, rtol=0, atol=1e-10)


def router_difference(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    return max(float((one[n] - other[n]).abs().max()) for n in one if "router" in n)


def terms_of(form: str, scope: str) -> list[LossTerm]:
    return [LossTerm(form, 1.0, scope), LossTerm("z", 0.1, "micro")]


@pytest.mark.parametrize("num_layers", [1, 2])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("scope", ["sequence", "global_batch", "running"])
def test_gradient_does_not_depend_on_the_split(scope: str, form: str, num_layers: int) -> None:
    """``running`` has this property too, at the price of following the load of earlier steps."""
    model, terms = Stack(num_layers), terms_of(form, scope)
    whole, values, _ = step(model, terms, [WHOLE])
    splits = {f"micro-batches of {size}": [pieces(size)] for size in (1, 2, 4)} | UNEVEN_RANKS
    for ranks in splits.values():
        grads, raw, _ = step(model, terms, ranks)
        assert_same(whole, grads)
        torch.testing.assert_close(raw, values, rtol=0, atol=1e-10)


@pytest.mark.parametrize("num_layers", [1, 2])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("scope", SCOPES)
def test_gradient_and_metrics_do_not_depend_on_recompute(scope: str, form: str, num_layers: int) -> None:
    model, terms = Stack(num_layers), terms_of(form, scope)
    for ranks in ([WHOLE], [pieces(4)]):
        grads, raw, routings = step(model, terms, ranks)
        again, raw_again, routings_again = step(model, terms, ranks, recompute=True)
        assert_same(grads, again)
        assert all(torch.equal(raw[key], raw_again[key]) for key in raw)
        assert [r.demand_E.tolist() for r in routings] == [r.demand_E.tolist() for r in routings_again]


@pytest.mark.parametrize("form", FORMS)
def test_micro_does_depend_on_the_micro_batch(form: str) -> None:
    model = Stack(1)
    grads = [step(model, terms_of(form, "micro"), [pieces(size)])[0] for size in (8, 4, 2, 1)]
    for i, one in enumerate(grads):
        for other in grads[:i]:
            assert router_difference(one, other) > 1e-3


@pytest.mark.parametrize("form", FORMS)
def test_scopes_are_different_losses(form: str) -> None:
    model = Stack(1)
    grads = {scope: step(model, terms_of(form, scope), [pieces(2)])[0] for scope in SCOPES}
    for one in SCOPES:
        for other in SCOPES:
            assert one == other or router_difference(grads[one], grads[other]) > 1e-3
    # where they must agree: one micro-batch of everything is the global batch
    whole = [step(model, terms_of(form, scope), [WHOLE])[0] for scope in ("micro", "global_batch")]
    assert router_difference(*whole) < 1e-10


@pytest.mark.parametrize("scope", ["sequence", "global_batch"])
def test_sigmoid_scores_are_invariant_too(scope: str) -> None:
    model, terms = Stack(2, score="sigmoid"), terms_of("switch", scope)
    whole = step(model, terms, [WHOLE])[0]
    for ranks in ([pieces(2)], UNEVEN_RANKS["3 ranks"]):
        assert_same(whole, step(model, terms, ranks, recompute=True)[0])

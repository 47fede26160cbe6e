"""The balance loss of transformers' MoE models and ours, on the same weights.

Shapes: B batch, S sequence, T = B S tokens, E experts, K experts per token.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from balance_cases import balance_loss
from hf_families import FAMILIES
from hf_family import BATCH, SEQ, transformers
from torch import Tensor

from moetrain.moe import RouterContext, Routing, build_router
from moetrain.moe.balance import StepTotals


def our_balance(records: dict[int, Routing]) -> list[Tensor]:
    totals = StepTotals(num_tokens=BATCH * SEQ)
    return [balance_loss(r, "sum_over_k", "micro", totals, layer) for layer, r in records.items()]


@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe", "qwen3_moe", "olmoe"])
def test_balance_loss_and_gradient_are_theirs_with_one_moe_layer(name: str) -> None:
    """Their form is sum_over_k, which is k at perfect balance: k times the switch form."""
    family = FAMILIES[name]
    single = replace(
        family, theirs={**family.theirs, "num_hidden_layers": 1}, ours={**family.ours, "num_layers": 1}
    )
    theirs, ours = single.build(torch.float32)
    ids, _ = family.batch()
    reference = theirs(ids, labels=ids, output_router_logits=True).aux_loss
    records = ours(ids).records
    (loss,) = our_balance(records)
    torch.testing.assert_close(loss, reference, rtol=1e-5, atol=1e-5)
    switch = balance_loss(records[0], "switch", "micro", StepTotals(num_tokens=BATCH * SEQ))
    torch.testing.assert_close(loss, family.router.top_k * switch)
    reference.backward()
    loss.backward()
    gate = theirs.model.layers[0].mlp.gate.weight.grad
    assert gate.abs().max() > 1e-3
    torch.testing.assert_close(ours.routers()[0].weight_ED.grad, gate, rtol=1e-5, atol=1e-5)


def routing_of(logits_TE: Tensor, top_k: int) -> Routing:
    """What a top-k router makes of given logits, as one row of a batch."""
    router = build_router("topk", d_model=logits_TE.shape[1], num_experts=logits_TE.shape[1], top_k=top_k)
    with torch.no_grad():
        router.weight_ED.copy_(torch.eye(logits_TE.shape[1]))
    return router(logits_TE, RouterContext.default(1, logits_TE.shape[0]))


def test_several_layers_are_summed_where_theirs_pools_them() -> None:
    """transformers averages load and probability over all layers before multiplying them.

    Two layers that each use their own half of the experts then look balanced to it: it gives k, the value
    at perfect balance, and a gradient of nothing. The Switch Transformer defines the loss per layer and adds;
    each of these layers is at twice its optimum.
    """
    pooled = transformers.models.mixtral.modeling_mixtral.load_balancing_loss_func
    num_experts, top_k, tokens = 4, 2, 7
    half = torch.full((tokens, num_experts), -20.0)
    first, second = half.clone(), half.clone()
    first[:, :2], second[:, 2:] = 20.0, 20.0
    theirs = pooled((first, second), num_experts, top_k)
    ours = [
        balance_loss(routing_of(logits, top_k), "sum_over_k", "micro", StepTotals(tokens))
        for logits in (first, second)
    ]
    torch.testing.assert_close(theirs, torch.tensor(float(top_k)))
    for loss in ours:
        torch.testing.assert_close(loss, torch.tensor(2.0 * top_k))
    torch.testing.assert_close(pooled((first,), num_experts, top_k), ours[0])


def test_on_a_real_model_their_pooled_value_is_another_number() -> None:
    family = FAMILIES["qwen3_moe"]
    theirs, ours = family.build(torch.float32)
    ids, _ = family.batch()
    records = ours(ids).records
    reference = theirs(ids, labels=ids, output_router_logits=True).aux_loss
    mean_of_layers = torch.stack(our_balance(records)).mean()
    load = torch.stack([r.assignment.counts_E.float() for r in records.values()]).mean(0) / (BATCH * SEQ)
    probability = torch.stack([r.scores_TE.mean(0) for r in records.values()]).mean(0)
    torch.testing.assert_close(reference, 11 * (load * probability).sum(), rtol=1e-5, atol=1e-5)
    assert abs(reference - mean_of_layers) > 0.01

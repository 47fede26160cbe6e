"""The terms of a balance: their sum over layers with coefficients, and where they come from.

Shapes: T tokens, E experts, L layers.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from balance_cases import balance_loss, routed, step_totals

from moetrain.moe.balance import LossTerm, StepTotals, make_terms, total_loss
from moetrain.moe.balance.base import SCOPES
from moetrain.moe.balance.settings import LossConfig, LossScope


def test_total_loss_sums_terms_and_layers_with_coefficients() -> None:
    torch.manual_seed(0)
    layers = [routed(torch.randn(12, 5, dtype=torch.float64, requires_grad=True), 2) for _ in range(3)]
    demand_LE = torch.stack([r.demand_E for r in layers])
    totals = step_totals(12.0, dict(enumerate(demand_LE)))
    terms = [
        LossTerm("switch", 0.5, "global_batch"),
        LossTerm("z", 0.25, "micro"),
        LossTerm("sum_over_k", 2.0, "sequence"),
    ]
    total, raw = total_loss(dict(enumerate(layers)), terms, totals)
    assert list(raw) == ["switch_global_batch", "z", "sum_over_k_sequence"]
    assert all(v.shape == (3,) and not v.requires_grad for v in raw.values())
    want = (
        0.5 * raw["switch_global_batch"].sum() + 0.25 * raw["z"].sum() + 2 * raw["sum_over_k_sequence"].sum()
    )
    torch.testing.assert_close(total.detach(), want)
    for layer, r in enumerate(layers):  # each layer is held against its own row of the totals
        alone = balance_loss(r, "switch", "micro", StepTotals(12.0))
        torch.testing.assert_close(raw["switch_global_batch"][layer], alone.detach())
    missing = {0: layers[0], 4: replace(layers[1], scores_TE=None)}
    with pytest.raises(ValueError, match="layer 4: this router returns no scores"):
        total_loss(missing, terms, step_totals(12.0, {0: demand_LE[0], 4: demand_LE[1]}))
    assert total_loss({}, terms, totals) == (None, {})
    assert total_loss(dict(enumerate(layers)), [], totals) == (None, {})


def test_a_factor_may_be_of_one_layer() -> None:
    torch.manual_seed(0)
    records = {n: routed(torch.randn(12, 5, dtype=torch.float64), 2) for n in (1, 4, 6)}
    terms, factors = [LossTerm("switch", 0.5, "micro")], {"switch": {1: 3.0, 4: 0.25}}
    total, raw = total_loss(records, terms, StepTotals(12.0, factors=factors))
    one, four, six = raw["switch_micro"]
    torch.testing.assert_close(total, 0.5 * (3 * one + 0.25 * four + six), rtol=1e-14, atol=0)


def test_terms_come_from_the_configuration() -> None:
    config = [
        LossConfig(),
        LossConfig("z", 1e-3),
        LossConfig("switch", 0.1, LossScope.sequence),
    ]
    assert make_terms(config) == [
        LossTerm("switch", 0.01, "global_batch"),
        LossTerm("z", 1e-3, "global_batch"),
        LossTerm("switch", 0.1, "sequence"),
    ]
    with pytest.raises(ValueError, match="names a loss twice: switch_global_batch, switch_global_batch"):
        make_terms([LossConfig(), LossConfig(coef=0.5)])
    assert {LossScope(scope) for scope in SCOPES} == set(LossScope)

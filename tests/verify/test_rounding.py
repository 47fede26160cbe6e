"""Comparisons in bf16: what exceeds rounding fails, what rounding explains does not."""

import math

import pytest
import torch

from moetrain.models.options import ModelConfig
from moetrain.verify.measure import DEMAND
from moetrain.verify.rounding import bound, compare_rounded, roundings

MODEL = ModelConfig(num_layers=2)


def findings(scale: float = 1.0, demand: int = 3, name: str = "w_DF") -> dict[str, dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    gradient = torch.randn(5, 7, generator=generator)
    quantities = {
        "loss: nats": torch.tensor(2.0),
        "norm: L2": gradient.norm(),
        f"gradient: blocks.0.mlp.{name}": gradient * scale,
        "gradient: blocks.0.mlp.b_F": torch.zeros(7),
        DEMAND: torch.tensor([[demand, 4]]),
    }
    return {"skewed": quantities}


def checks_of(other, kind="gradient"):
    return [c for c in compare_rounded(MODEL, findings(), [findings(), other]) if c.kind == kind]


def test_the_bound_is_that_of_its_formula():
    assert roundings(MODEL) == 2 * 15 * 2 + 6
    assert bound(MODEL) == pytest.approx(math.sqrt(2 * 66) * math.sqrt(2 * math.log(2e6)) / 256)


@pytest.mark.parametrize(
    ("scale", "holds"), [(1.0, True), (1.2, True), (1.3, False), (2.0, False), (math.nan, False)]
)
def test_a_gradient_that_is_off_by_more_than_rounding_fails(scale, holds):
    (check,) = checks_of(findings(scale))
    assert (check.holds, check.binding, check.number) == (holds, True, 1)
    assert check.scenario == "skewed, in bf16"
    if not holds:
        assert check.where == "blocks.0.mlp on rank 1"


def test_other_assignments_are_told_and_not_binding():
    (check,) = checks_of(findings(2.0, demand=2))
    assert not check.binding
    assert not check.holds


def test_a_gradient_that_is_missing_is_an_error():
    (check,) = checks_of(findings(name="w_other"))
    assert check.worst == math.inf
    assert not check.holds

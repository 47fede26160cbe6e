"""Momentum over depth: against plain loops, and as the optimizer that it is named after."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import plain_blocks as plain
import pytest
import torch
from model_cases import decoder, tokens

from moetrain.errors import UserError
from moetrain.models.decoder import Decoder
from moetrain.models.momentum import advance, coefficients, read_at
from moetrain.models.wiring_options import MomentumConfig, MomentumKind, Wiring

IDS = tokens(2, 5)
HEAVY = MomentumConfig(mu=0.6, step=0.8)
ADAM = MomentumConfig(
    MomentumKind.adam, mu=0.6, step=0.7, adam_layers=2, adam_step=0.3, beta1=0.8, beta2=0.95, decay=0.25
)
ROBUST = MomentumConfig(MomentumKind.robust, rate=0.65, condition=5.0, curvature=2.0)
KINDS = {
    "heavy_ball": HEAVY,
    "adam": ADAM,
    "adam, one layer": replace(ADAM, adam_layers=1, decay=0.0),
    "robust": ROBUST,
}


def hidden(model: Decoder, cfg: MomentumConfig) -> torch.Tensor:
    """From the history of all outputs, layer by layer; nothing is carried."""
    x, outputs = model.embed_VD[IDS], []
    r, k, curvature = cfg.rate, cfg.condition, cfg.curvature
    for block in model.blocks:
        x = plain.attended(model, block, x)
        if not hasattr(block.feed_forward, "router"):
            x = x + plain.mlp(block.feed_forward, plain.norm(block.feed_forward_norm, x))
            continue
        step, mu, ahead = cfg.step, cfg.mu, 0.0
        if cfg.kind is MomentumKind.robust:
            step, mu = k * (1 - r) ** 2 * (1 + r) / curvature, k * r**3 / (k - 1)
            ahead = r**3 / ((k - 1) * (1 - r) ** 2 * (1 + r))
        before = sum(mu ** (len(outputs) - 1 - j) * s for j, s in enumerate(outputs))
        read = plain.norm(block.feed_forward_norm, x + ahead * step * before)
        outputs.append(plain.moe(block.feed_forward, read))
        n = len(outputs)
        if cfg.kind is MomentumKind.adam and n <= cfg.adam_layers:
            m = sum((1 - cfg.beta1) * cfg.beta1 ** (n - 1 - j) * s for j, s in enumerate(outputs))
            v = sum((1 - cfg.beta2) * cfg.beta2 ** (n - 1 - j) * s * s for j, s in enumerate(outputs))
            x = (1 - cfg.decay) * x + cfg.adam_step * m / (v + 1e-8).sqrt()
        else:
            x = x + step * sum(mu ** (n - 1 - j) * s for j, s in enumerate(outputs))
    return plain.norm(model.norm, x)


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("changes", [{}, {"num_layers": 4, "first_dense": 1, "num_shared_experts": 1}])
def test_output_and_gradients(name: str, changes: dict[str, int]) -> None:
    model = decoder(wiring=Wiring.momentum, momentum=KINDS[name], **changes)
    plain.assert_same(model, IDS, hidden(model, KINDS[name]), 1e-9)


def test_no_momentum_is_a_plain_residual() -> None:
    found = decoder(wiring=Wiring.momentum, momentum=MomentumConfig(mu=0.0))(IDS).hidden_BSD
    assert torch.equal(found, decoder()(IDS).hidden_BSD)


def test_the_released_adam_layer_leaves_nothing_of_the_stream() -> None:
    x, s = torch.randn(2, 3, 7).double(), torch.randn(2, 3, 7).double()
    cfg = MomentumConfig(MomentumKind.adam, decay=1.0, adam_step=0.8)
    moved, state = advance(cfg, x, s, None, 0)
    torch.testing.assert_close(moved, 0.8 * 0.1 * s / (0.001 * s * s + 1e-8).sqrt())
    torch.testing.assert_close(state.p, s)
    kept, _ = advance(replace(cfg, decay=0.0), x, s, None, 0)
    torch.testing.assert_close(kept - moved, x)


def test_heavy_ball_and_adam_are_torchs_optimizers() -> None:
    """With minus the gradient of a quadratic as a layer's output, and one step a layer."""
    curvature = torch.tensor([0.5, 1.0, 2.0, 3.5]).double()
    point = torch.nn.Parameter(torch.tensor([1.0, -2.0, 0.5, 3.0]).double())
    x, state = point.detach().clone(), None
    sgd = torch.optim.SGD([point], lr=0.11, momentum=0.7)
    for layer in range(9):
        x, state = advance(MomentumConfig(step=0.11), x, -curvature * x, state, layer)
        point.grad = curvature * point.detach()
        sgd.step()
        torch.testing.assert_close(x, point.detach(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("condition", [3.0, 5.0, 19.0])
@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
def test_the_robust_method_converges_at_its_rate(condition: float, share: float) -> None:
    """On quadratics of curvatures from L / k to L it contracts by the rate at least, between the two rates
    of the method's range; its slowest direction by the rate itself."""
    rate = (1 - condition**-0.5) * (1 - share) + (1 - 1 / condition) * share
    curvature = 2.0
    cfg = MomentumConfig(MomentumKind.robust, rate=rate, condition=condition, curvature=curvature)
    radii = []
    for q in np.linspace(curvature / condition, curvature, 41):
        columns = []
        for start in np.eye(2):  # (x, p) -> the next, a linear map
            x, p = (torch.tensor([value], dtype=torch.float64) for value in start)
            state = advance(cfg, x * 0, p, None, 0)[1]
            s = -q * read_at(cfg, x, state)
            x, state = advance(cfg, x, s, state, 1)
            columns.append([float(x), float(state.p)])
        radii.append(max(abs(np.linalg.eigvals(np.array(columns).T))))
    assert max(radii) <= rate + 1e-6
    assert radii[0] == pytest.approx(rate, abs=1e-6)


def test_a_rate_of_the_triple_momentum_method() -> None:
    """At r = 1 - 1 / sqrt(k) the step is (2 - 1 / sqrt(k)) / L (Van Scoy et al. 2018)."""
    cfg = MomentumConfig(MomentumKind.robust, rate=1 - 9**-0.5, condition=9.0, curvature=4.0)
    assert coefficients(cfg).step == pytest.approx((1 + (1 - 9**-0.5)) / 4.0)


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"momentum": HEAVY}, r"model.momentum is of model.wiring=momentum, not of plain"),
        (
            {"wiring": Wiring.momentum, "momentum": MomentumConfig(rate=0.6)},
            r"model.momentum.rate=0.6 is not used by model.momentum.kind=heavy_ball.* kind=robust",
        ),
        (
            {"wiring": Wiring.momentum, "momentum": replace(ROBUST, mu=0.5)},
            r"model.momentum.mu=0.5 is not used by .*kind=robust.* kind=heavy_ball or adam",
        ),
        ({"wiring": Wiring.momentum, "momentum": MomentumConfig(mu=1.0)}, r"model.momentum.mu=1.0 must lie"),
    ],
)
def test_what_does_not_fit_is_refused(changes: dict[str, object], line: str) -> None:
    with pytest.raises(UserError, match=line):
        decoder(**changes)

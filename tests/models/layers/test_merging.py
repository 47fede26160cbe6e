"""smear and meo: one segment, one expert and one matrix at a time, and what merging is and is not.

Shapes: B batch, S sequence, D model, F hidden, E experts.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from layer_cases import MERGING, inputs, layer
from model_cases import TINY
from torch import Tensor

from moetrain.models.layer_options import MergingConfig, RouteBy
from moetrain.models.layers.merging import MEO, Merging, Smear
from moetrain.moe import RouterContext
from moetrain.moe.balance import make_terms
from moetrain.moe.balance.settings import LossConfig

E, F_, D = TINY.num_experts, TINY.d_ff_expert, TINY.d_model
Gate = Callable[[int, Tensor, Tensor], Tensor]  # (matrix, state, noise) -> gates


def made_of(kind: type[Merging], options: MergingConfig, activation: str) -> Merging:
    """Directly, since a model's builder refuses to look ahead."""
    torch.manual_seed(8)
    made = kind(D, F_, E, options, activation).double()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.normal_(0, 0.5)
    return made


def normed(x: Tensor, gain: Tensor, shift: Tensor) -> Tensor:
    centred = x - x.mean()
    return centred / (centred.square().mean() + 1e-5).sqrt() * gain + shift


def smear_gate(made: Smear, dropout: float) -> Gate:
    router = made.router

    def gate(matrix: int, state: Tensor, noise: Tensor | None) -> Tensor:
        state = normed(state, router.state_gain_D, router.state_shift_D)
        logits = torch.stack(
            [
                normed(row, router.weight_gain_D, router.weight_shift_D) @ state + bias
                for row, bias in zip(router.weight_ED, router.bias_gate_E, strict=True)
            ]
        )
        gates = logits.exp() / logits.exp().sum()
        if noise is not None and dropout:
            gates = torch.stack([g * float(u >= dropout) + 1e-10 for g, u in zip(gates, noise, strict=True)])
            gates = gates / gates.sum()
        return gates

    return gate


def meo_gate(made: MEO, top_k: int) -> Gate:
    def gate(matrix: int, state: Tensor, noise: Tensor | None) -> Tensor:
        router = made.router[matrix]
        logits = [row @ state for row in router.weight_ED]
        if noise is not None:
            normal = [math.sqrt(2) * float(torch.erfinv(2 * u.double() - 1)) for u in noise]
            spreads = [torch.log1p((row @ state).exp()) + 0.01 for row in router.noise_ED]
            logits = [z + n * s for z, n, s in zip(logits, normal, spreads, strict=True)]
        best = sorted(range(E), key=lambda e: -logits[e].item())[:top_k]
        total = sum(logits[e].exp() for e in best)
        zero = torch.zeros((), dtype=torch.float64)
        return torch.stack([logits[e].exp() / total if e in best else zero for e in range(E)])

    return gate


def run_by_hand(
    x_BSD: Tensor,
    made: Merging,
    gate: Gate,
    own_gates: bool,
    activation: str,
    training: bool,
    ctx: RouterContext,
) -> Tensor:
    """Segment by segment; what a matrix reads and how it is gated follows ``own_gates`` (meo)."""
    names = list(made.shapes)
    batch, seq, _ = x_BSD.shape
    length = made.length or seq
    valid = torch.ones(batch, seq) if ctx.valid_T is None else ctx.valid_T.view(batch, seq).double()
    drawn = [ctx.uniform((batch * seq, E), 0x3E60 + m).view(batch, seq, E) for m in range(len(names))]

    def row(b: int) -> Tensor:
        def block(matrix: int, x_SI: Tensor) -> Tensor:
            if not own_gates or made.token_blocks is None:
                return x_SI
            t = made.token_blocks[matrix]
            return x_SI + torch.relu(x_SI @ t.w_in.T + t.b_in) @ t.w_back.T + t.b_back

        def state(x_SI: Tensor, start: int) -> Tensor:
            first, last = (start, start + length) if made.length is None else (start - length, start)
            if first < 0:
                return torch.zeros_like(x_SI[0])
            weights = valid[b, first:last]
            return (weights[:, None] * x_SI[first:last]).sum(0) / max(1.0, float(weights.sum()))

        def product(matrix: int, x_SI: Tensor, gated_by: int, seen_SI: Tensor) -> Tensor:
            rows = []
            for start in range(0, seq, length):
                noise = drawn[gated_by][b, start] if training else None
                gates = gate(gated_by, state(seen_SI, start), noise)
                stack = getattr(made.experts, names[matrix])
                merged = sum(gates[e] * stack[e] for e in range(E))
                rows.append(x_SI[start : start + length] @ merged.T)
            return torch.cat(rows)

        x_SD = x_BSD[b]
        ups = []
        for matrix in range(len(names) - 1):
            read = block(matrix, x_SD)
            ups.append(product(matrix, read, *_gated(matrix, own_gates, read, x_SD)))
        hidden = (
            F.silu(ups[0]) * ups[1]
            if activation == "swiglu"
            else 0.5 * ups[0] * (1 + torch.erf(ups[0] / 2**0.5))
        )
        last = len(names) - 1
        inner = block(last, hidden)
        return product(last, inner, *_gated(last, own_gates, inner, x_SD))

    return torch.stack([row(b) for b in range(batch)])


def _gated(matrix: int, own_gates: bool, own: Tensor, x: Tensor) -> tuple[int, Tensor]:
    """(whose noise and gate, what its state is of)."""
    return (matrix, own) if own_gates else (0, x)


CASES = [
    (kind, route, activation)
    for kind in (Smear, MEO)
    for route in (RouteBy.previous_segment, RouteBy.sequence)
    for activation in ("swiglu", "gelu")
]


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("kind", "route", "activation"), CASES)
def test_output_and_gradients_are_those_of_merged_matrices(
    kind: type[Merging], route: RouteBy, activation: str, training: bool, padded: bool
) -> None:
    made = made_of(kind, replace(MERGING, route_by=route, segment=3), activation).train(training)
    x = inputs(2, 8)
    valid = torch.rand(16, generator=torch.Generator().manual_seed(1)) < 0.7 if padded else None
    ctx = RouterContext(2, 8, torch.tensor([5, 3]), valid_T=valid, seed=2, step=7)
    y, record = made(x, ctx)
    gate = smear_gate(made, 0.2) if isinstance(made, Smear) else meo_gate(made, MERGING.top_k)
    expected = run_by_hand(x, made, gate, kind is MEO, activation, training, ctx)
    torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-10)
    direction, wanted = torch.randn_like(y), [x, *made.parameters()]
    ours = torch.autograd.grad((y * direction).sum(), wanted, materialize_grads=True)
    theirs = torch.autograd.grad((expected * direction).sum(), wanted, materialize_grads=True)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-9)
    columns = E * (len(made.shapes) if kind is MEO else 1)
    assert record.scores_TE.shape == (16, columns)
    torch.testing.assert_close(record.scores_TE.sum(1), torch.full((16,), columns / E, dtype=torch.float64))


@pytest.mark.parametrize("kind", [Smear, MEO])
def test_a_gate_of_one_expert_is_that_expert(kind: type[Merging]) -> None:
    made, x = made_of(kind, MergingConfig(top_k=1, segment=3), "gelu").eval(), inputs(2, 8)
    with torch.no_grad():
        for gate in [made.router] if kind is Smear else made.router:
            gate.weight_ED.zero_()
            if kind is Smear:
                gate.weight_shift_D.zero_()
                gate.bias_gate_E.copy_(torch.tensor([0.0, 0.0, 0.0, 900.0, 0.0]))
    chosen = 3 if kind is Smear else 0  # of equals the first
    e = made.experts
    y = F.gelu(x @ e.w_up_EFD[chosen].T) @ e.w_down_EDF[chosen].T
    torch.testing.assert_close(made(x)[0], y, rtol=1e-12, atol=1e-12)


def test_merging_is_a_sum_of_outputs_for_matrices_only() -> None:
    made, x = made_of(MEO, MergingConfig(segment=3), "gelu"), inputs(1, 4)
    gates = torch.rand(1, E, dtype=torch.float64)
    stack = made.experts.w_up_EFD
    merged = x @ made.experts.merged("w_up_EFD", gates).mT
    torch.testing.assert_close(merged, sum(gates[0, i] * (x @ stack[i].T) for i in range(E)))
    down = made.experts.merged("w_down_EDF", gates)
    layerwise = sum(gates[0, i] * (F.gelu(x @ stack[i].T) @ made.experts.w_down_EDF[i].T) for i in range(E))
    assert ((F.gelu(merged) @ down.mT) - layerwise).abs().max() > 0.1


def test_importance_and_load_see_every_matrixs_gates() -> None:
    """CV^2 over all columns is the sum of the matrices' by (E - 1) / (columns - 1): their means are equal."""
    made, x = made_of(MEO, MergingConfig(segment=8), "swiglu"), inputs(6, 8)
    ctx = RouterContext.default(6, 8)
    _, record = made(x, ctx)
    assert record.load_TE is not None
    gates_3E = record.scores_TE.view(6, 8, 3, E)[:, 0].sum(0)
    parts = [(row.var() / row.mean() ** 2) for row in gates_3E]
    (term,) = make_terms([LossConfig(name="importance", coef=1.0)])
    whole = record.weights_BE(48).sum(0)
    assert term.name == "importance"
    torch.testing.assert_close(whole.var() / whole.mean() ** 2, sum(parts) * (E - 1) / (3 * E - 1))
    load = record.load_TE
    assert ((load > 0) & (load < 1)).all()


def test_a_model_refuses_to_look_ahead() -> None:
    for name in ("smear", "meo"):
        with pytest.raises(ValueError, match=r"route_by=sequence lets every token see later ones"):
            layer(name, merging=MergingConfig(route_by=RouteBy.sequence))
    with pytest.raises(ValueError, match=r"model\.merging\.top_k=6 exceeds model\.num_experts=5"):
        layer("meo", merging=MergingConfig(top_k=6))


def test_load_is_the_chance_to_be_chosen_again() -> None:
    """Against noise drawn many times anew, an expert at a time."""
    made = made_of(MEO, MergingConfig(top_k=2), "gelu")
    gate = made.router[0]
    state, noise = torch.randn(1, D, dtype=torch.float64), torch.rand(1, E, dtype=torch.float64)
    with torch.no_grad():
        gate.weight_ED.mul_(0.2)
        gate.noise_ED.mul_(0.2)
        _, load = gate(state, noise)
        for expert in range(E):
            again = noise.repeat(20_000, 1)
            again[:, expert] = torch.rand(20_000, dtype=torch.float64)
            chosen = gate(state.expand(20_000, D), again)[0][:, expert] > 0
            assert float(chosen.double().mean()) == pytest.approx(float(load[0, expert]), abs=0.02)

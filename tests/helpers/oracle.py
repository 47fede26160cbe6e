"""A Mixture-of-Experts layer as the equations say it: Python loops over tokens and experts, in fp64.

The reference of the parity tests. It shares no code with the package: selection is Python's sort on floats,
softmax, sigmoid and activations are written from their formulas, capacity is brute force, and gradients come
from autograd through scalar products.

Shapes: B batch, S sequence, D model, E experts, F hidden, P = 2F (gated) or F, Q shared hidden.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from fractions import Fraction

import torch
from torch import Tensor

_MASK64 = (1 << 64) - 1


@dataclass(frozen=True)
class Spec:
    """What the layer is asked to do; names follow the router's options."""

    activation: str = "swiglu"
    top_k: int = 2
    score: str = "softmax"
    renormalize: bool = True
    route_scale: float = 1.0
    num_groups: int = 1
    top_groups: int = 1
    group_score: str = "top2"
    capacity_factor: float | None = None
    min_capacity: int = 1
    drop_order: str = "position"
    group: int = 1  # sequences per routing group


@dataclass(frozen=True)
class Weights:
    """fp64 leaves. The shared expert's matrices are [Q, D] and [D, Q], as linear layers store them."""

    router_ED: Tensor
    up_EDCF: Tensor
    down_EFD: Tensor
    shared_gate: Tensor | None = None
    shared_up: Tensor | None = None
    shared_down: Tensor | None = None
    bias_E: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Choice:
    """One kept assignment: flat token, expert, weight."""

    token: int
    expert: int
    weight: Tensor


def layer(
    x_BSD: Tensor,
    weights: Weights,
    spec: Spec,
    valid_BS: Tensor | None = None,
    router_noise_TD: Tensor | None = None,
    drop_noise_TE: Tensor | None = None,
) -> tuple[Tensor, list[Choice]]:
    """(y [B, S, D], kept assignments). Padding (valid False) reaches no expert; shared experts see it all."""
    batch, seq, width = x_BSD.shape
    x_TD = x_BSD.reshape(batch * seq, width)
    wanted: list[Choice] = []
    for t in range(batch * seq):
        if valid_BS is not None and not bool(valid_BS.reshape(-1)[t]):
            continue
        seen_D = x_TD[t] if router_noise_TD is None else x_TD[t] * router_noise_TD[t]
        wanted += [Choice(t, e, w) for e, w in route(seen_D, weights, spec)]
    kept = keep(wanted, spec, batch, seq, weights.router_ED.shape[0], drop_noise_TE)
    rows = [x_BSD.new_zeros(width) for _ in range(batch * seq)]
    for c in kept:
        y_D = feed_forward(
            x_TD[c.token], weights.up_EDCF[c.expert].flatten(1), weights.down_EFD[c.expert], spec.activation
        )
        rows[c.token] = rows[c.token] + c.weight * y_D
    if weights.shared_up is not None and weights.shared_down is not None:
        gate = [] if weights.shared_gate is None else [weights.shared_gate]
        up, down = torch.cat([*gate, weights.shared_up]).t(), weights.shared_down.t()
        rows = [y + feed_forward(x_TD[t], up, down, spec.activation) for t, y in enumerate(rows)]
    y_TD = torch.stack(rows) if rows else x_TD * 1.0
    return y_TD.reshape(batch, seq, width), kept


def route(x_D: Tensor, weights: Weights, spec: Spec) -> list[tuple[int, Tensor]]:
    """(expert, weight) of one token."""
    logits = [(x_D * w_D).sum() for w_D in weights.router_ED]
    scores = [sigmoid(z) for z in logits] if spec.score == "sigmoid" else softmax(logits)
    bias = weights.bias_E or [0.0] * len(scores)
    chosen = select([float(s.detach()) + b for s, b in zip(scores, bias, strict=True)], spec)
    if spec.score == "softmax_after":
        chosen_weights = softmax([logits[e] for e in chosen])
    else:
        chosen_weights = [scores[e] for e in chosen]
        if spec.renormalize:
            total = sum(chosen_weights[1:], chosen_weights[0])
            chosen_weights = [w / total for w in chosen_weights]
    return [(e, spec.route_scale * w) for e, w in zip(chosen, chosen_weights, strict=True)]


def select(values: list[float], spec: Spec) -> list[int]:
    """The k largest of the allowed groups, ties to the lowest index."""
    size = len(values) // spec.num_groups
    groups = [values[g * size : (g + 1) * size] for g in range(spec.num_groups)]
    best = 2 if spec.group_score == "top2" else 1
    merit = [sum(sorted(group, reverse=True)[:best]) for group in groups]
    allowed = sorted(range(spec.num_groups), key=lambda g: (-merit[g], g))[: spec.top_groups]
    candidates = [e for e in range(len(values)) if e // size in allowed]
    return sorted(candidates, key=lambda e: (-values[e], e))[: spec.top_k]


def keep(
    wanted: list[Choice], spec: Spec, batch: int, seq: int, num_experts: int, noise_TE: Tensor | None
) -> list[Choice]:
    """The assignments that fit, per group of sequences and expert."""
    if spec.capacity_factor is None:
        return wanted
    kept = []
    for group in range(batch // spec.group):
        first, last = group * spec.group * seq, (group + 1) * spec.group * seq
        here = [c for c in wanted if first <= c.token < last]
        fair = Fraction(str(spec.capacity_factor)) * len(here) / num_experts
        capacity = max(spec.min_capacity, math.ceil(fair))
        for expert in range(num_experts):
            queue = [c for c in here if c.expert == expert]
            queue.sort(key=lambda c: (-priority(c, spec, noise_TE), c.token))
            kept += queue[:capacity]
    return kept


def priority(choice: Choice, spec: Spec, noise_TE: Tensor | None) -> float:
    if spec.drop_order == "probability":
        return float(choice.weight.detach())
    if spec.drop_order == "random":
        assert noise_TE is not None
        return float(noise_TE[choice.token, choice.expert])
    return 0.0


def feed_forward(x_D: Tensor, up_DP: Tensor, down_FD: Tensor, activation: str) -> Tensor:
    """One token through one expert: gate columns first, then up columns."""
    z_P = x_D @ up_DP
    if activation not in GATES:
        return plain(activation)(z_P) @ down_FD
    half = z_P.shape[0] // 2
    if activation == "swiglu_clamped":
        g_F, up_F = z_P[:half].clamp(max=7), z_P[half:].clamp(-7, 7)
        return (g_F / (1 + torch.exp(-1.702 * g_F)) * (up_F + 1)) @ down_FD
    up_F = plain("relu")(z_P[half:]) if activation == "drelu" else z_P[half:]
    return (plain(GATES[activation])(z_P[:half]) * up_F) @ down_FD


GATES = {
    "swiglu": "silu", "geglu": "gelu", "reglu": "relu", "drelu": "relu", "swiglu_clamped": "",
    "geglu_tanh": "gelu_tanh",
}  # fmt: skip


def plain(name: str) -> Callable[[Tensor], Tensor]:
    return {
        "silu": lambda z: z / (1 + torch.exp(-z)),
        "gelu": lambda z: 0.5 * z * (1 + torch.erf(z / math.sqrt(2))),
        "gelu_tanh": lambda z: 0.5 * z * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3))),
        "relu": lambda z: torch.where(z > 0, z, torch.zeros_like(z)),
        "relu2": lambda z: torch.where(z > 0, z, torch.zeros_like(z)) ** 2,
    }[name]


def softmax(logits: list[Tensor]) -> list[Tensor]:
    highest = max(float(z.detach()) for z in logits)
    powers = [torch.exp(z - highest) for z in logits]
    total = sum(powers[1:], powers[0])
    return [p / total for p in powers]


def sigmoid(z: Tensor) -> Tensor:
    return 1 / (1 + torch.exp(-z))


def uniform(
    seed: int, step: int, layer: int, salt: int, sample: int, position: int, column: int | None
) -> float:
    """The counter-based noise in Python's integers: a chain of splitmix64 finalisers, 23 bits, mid-cell."""
    key = 0
    for part in (seed, step, layer, salt, sample, position) + (() if column is None else (column,)):
        key = _splitmix64((key + part) & _MASK64)
    return (((key >> 41) & 0x7FFFFF) + 0.5) / 2**23


def _splitmix64(x: int) -> int:
    x = (x + 0x9E3779B97F4A7C15) & _MASK64
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK64
    return x ^ (x >> 31)

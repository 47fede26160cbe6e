"""The shapes and settings of the layer's parity tests, and the two runs that they compare.

Shapes: B batch, S sequence, T = B S, D model, E experts, F hidden. All five are distinct primes wherever a
case does not need a special value, so that no two dimensions can be mistaken for each other.
"""

from __future__ import annotations

import functools
import itertools
import zlib
from dataclasses import dataclass, field, replace
from typing import Any

import oracle
import torch
from torch import Tensor

from moetrain.moe import MoELayer, RouterContext, Routing
from moetrain.moe.assign import _DROP_SALT
from moetrain.moe.routers.topk import _JITTER_SALT

SEED, STEP, LAYER = 7, 11, 3


@dataclass(frozen=True)
class Case:
    """One layer, one input. ``padding`` is a pattern's name, ``hot`` the experts that every token prefers."""

    name: str
    shape: tuple[int, int, int, int, int]  # B, S, D, F, E
    spec: oracle.Spec = field(default_factory=oracle.Spec)
    padding: str = "none"
    block: int | None = None
    shared: int = 0
    bias: tuple[float, ...] = ()
    hot: tuple[int, ...] = ()
    jitter: float = 0.0

    def aligned(self) -> Case:
        """The same case at widths that torch's grouped_mm takes in fp32 (rows of 16 bytes)."""
        batch, seq, width, hidden, experts = self.shape
        return replace(self, shape=(batch, seq, 4 * width, 4 * hidden, experts))


PRIMES = (2, 3, 5, 7, 11, 13, 17)


def shape(i: int, experts: int, batch: int = 0, seq: int = 0) -> tuple[int, int, int, int, int]:
    """The i-th choice of distinct primes for what is not given, of at most 39 tokens."""
    choices = [
        (b, s, d, f)
        for b, s, d, f in itertools.permutations(PRIMES, 4)
        if b * s < 40 and experts not in (b, s, d, f) and batch in (0, b) and seq in (0, s)
    ]
    return (*choices[37 * i % len(choices)], experts)


ALL = ("swiglu", "geglu", "reglu", "gelu", "relu", "relu2", "silu", "drelu", "swiglu_clamped", "geglu_tanh")
SCORES = ("softmax", "softmax_after", "sigmoid")
GROUPED = oracle.Spec(score="sigmoid", top_k=3, num_groups=3, top_groups=2, route_scale=2.5)


def _cases() -> list[Case]:
    spec, cases = oracle.Spec, []
    for i, activation in enumerate(ALL):
        for j, score in enumerate(SCORES):
            s = spec(activation=activation, score=score, renormalize=(i + j) % 2 == 0)
            experts = (2, 3, 5, 7, 11, 13)[(i + 2 * j) % 6]
            cases.append(Case(f"{activation}-{score}-{s.renormalize}", shape(3 * i + j, experts), s))
    for experts, score, renormalize in ((5, "softmax", False), (7, "sigmoid", True)):
        for k in range(1, experts + 1):
            s = spec(top_k=k, score=score, renormalize=renormalize)
            cases.append(Case(f"k{k}of{experts}", shape(k, experts), s))
    for block in (1, 8, 32):
        cases.append(Case(f"block{block}", shape(block, 2, seq=11), block=block))
        cases.append(
            Case(f"block{block}-hot", shape(block, 13, seq=11), spec(top_k=2), block=block, hot=(4,))
        )
    for i, order in enumerate(("position", "probability", "random")):
        for j, factor in enumerate((0.3, 0.8, 1.0, 50.0)):
            s = spec(capacity_factor=factor, drop_order=order, score="sigmoid")
            sizes = shape(4 * i + j, 2, batch=3, seq=7)
            cases.append(Case(f"capacity-{order}-{factor}", sizes, replace(s, top_k=1)))
        s = spec(capacity_factor=0.7, drop_order=order, group=2, top_k=3, renormalize=False)
        cases.append(Case(f"capacity-{order}-group2", (4, 5, 3, 7, 11), s, hot=(1, 2)))
        cases.append(Case(f"capacity-{order}-padded", (4, 5, 3, 7, 11), s, padding="tail"))
    for i, padding in enumerate(("tail", "holes", "one_sequence", "first_sequence", "everything")):
        cases.append(Case(f"padding-{padding}", shape(i, 2), padding=padding))
        s = spec(capacity_factor=0.6, top_k=2, score="softmax_after")
        sizes = shape(i, 11, seq=5)
        cases.append(Case(f"padding-{padding}-capacity", sizes, s, padding=padding, shared=1))
    cases += [
        Case("one-token", (1, 1, 5, 7, 3)),
        Case("one-token-hot", (1, 1, 3, 2, 17), spec(top_k=1, renormalize=False), hot=(16,)),
        Case("no-sequences", (0, 3, 5, 7, 2)),
        Case("no-positions", (3, 0, 5, 7, 2)),
        Case("no-tokens-capacity", (0, 3, 5, 7, 2), spec(capacity_factor=1.0), shared=1),
        Case("one-expert", (2, 5, 3, 7, 1), spec(top_k=1)),
        Case("empty-experts", (2, 1, 5, 7, 23), spec(top_k=1, renormalize=False)),
        Case("all-on-one", (3, 7, 5, 11, 2), spec(top_k=1, renormalize=False), hot=(1,)),
        Case("all-on-first", (2, 7, 5, 11, 3), spec(top_k=1, score="sigmoid", renormalize=False), hot=(0,)),
        Case("all-on-two", (2, 11, 7, 3, 5), spec(top_k=2), hot=(4, 1)),
        Case("one-feature", (2, 3, 1, 1, 5), spec(activation="silu")),
        Case("groups", (2, 5, 7, 3, 15), GROUPED),
        Case("groups-bias", (2, 7, 5, 3, 15), GROUPED, bias=tuple((i * 7 % 15 - 7) / 32 for i in range(15))),
        Case("groups-bias-minus5", (5, 2, 3, 7, 15), GROUPED, bias=(-5.0,) * 15),
        Case("groups-max", (3, 2, 5, 7, 15), replace(GROUPED, group_score="max", top_groups=1, top_k=5)),
        Case("groups-softmax", (2, 3, 5, 7, 4), spec(num_groups=2, top_groups=1, renormalize=False)),
        Case("bias-softmax", (2, 5, 7, 3, 11), spec(top_k=3), bias=(0.25, -0.5) * 5 + (0.125,)),
        Case("groups-capacity", (3, 5, 7, 2, 15), replace(GROUPED, capacity_factor=0.5), padding="tail"),
        Case("shared-1", (2, 3, 5, 7, 11), shared=1),
        Case("shared-3-gelu", (2, 5, 3, 7, 11), spec(activation="gelu"), shared=3),
        Case("shared-padded", (3, 5, 7, 2, 11), padding="tail", shared=2),
        Case("jitter", (3, 5, 7, 2, 11), spec(top_k=3), jitter=0.25),
        Case("jitter-capacity", (3, 5, 7, 2, 11), spec(capacity_factor=0.5, drop_order="random"), jitter=0.1),
        Case("many-tokens", (2, 41, 3, 5, 7), spec(top_k=3, score="sigmoid"), block=8),
    ]  # fmt: skip
    return cases


CASES = _cases()
NAMES = [case.name for case in CASES]


@dataclass(frozen=True)
class Inputs:
    """fp64, with values that fp32 can hold, so that both precisions start from the same numbers."""

    x_BSD: Tensor
    g_BSD: Tensor  # the loss is sum(y * g)
    weights: oracle.Weights
    ctx: RouterContext


def valid_mask(padding: str, batch: int, seq: int) -> Tensor | None:
    if padding == "none":
        return None
    valid_BS = torch.ones(batch, seq, dtype=torch.bool)
    if padding == "tail":
        for b in range(batch):
            valid_BS[b, seq - b % seq :] = False
    elif padding == "holes":
        valid_BS.view(-1)[1::3] = False
    elif padding == "everything":
        valid_BS[:] = False
    else:
        valid_BS[0 if padding == "first_sequence" else batch // 2] = False
    return valid_BS


@functools.cache
def inputs(case: Case) -> Inputs:
    generator = torch.Generator().manual_seed(zlib.crc32(case.name.encode()))

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*shape, generator=generator) * scale).double()

    batch, seq, width, hidden, experts = case.shape
    columns = 2 if case.spec.activation in oracle.GATES else 1
    x_BSD, router_ED = normal(batch, seq, width), normal(experts, width, scale=width**-0.5)
    if case.hot:
        x_BSD[..., 0] = 1.5
        router_ED *= 0.25  # noise far below the preference, which itself stays clear of saturation
        router_ED[list(case.hot), 0] += 2.0
    up_EDP = normal(experts, width, columns * hidden, scale=width**-0.5)
    down_EFD = normal(experts, hidden, width, scale=hidden**-0.5)
    shared_gate, shared_up = None, None
    if case.shared:
        *gates, shared_up = normal(columns * case.shared * hidden, width, scale=width**-0.5).chunk(columns)
        shared_gate = gates[0] if gates else None
    weights = oracle.Weights(
        router_ED,
        up_EDP.unflatten(2, (columns, hidden)),
        down_EFD,
        shared_gate,
        shared_up,
        normal(width, case.shared * hidden, scale=hidden**-0.5) if case.shared else None,
        list(case.bias),
    )
    valid_BS = valid_mask(case.padding, batch, seq)
    ctx = RouterContext(
        batch, seq, torch.arange(batch) * 5 + 2, None, None if valid_BS is None else valid_BS.view(-1),
        seed=SEED, step=STEP, layer=LAYER,
    )  # fmt: skip
    return Inputs(x_BSD, normal(batch, seq, width), weights, ctx)


def noise(case: Case, salt: int, columns: int) -> Tensor:
    """The layer's noise, drawn by the oracle's own generator, fp64 [T, columns]."""
    batch, seq = case.shape[:2]
    values = [
        [oracle.uniform(SEED, STEP, LAYER, salt, 5 * b + 2, s, c) for c in range(columns)]
        for b in range(batch)
        for s in range(seq)
    ]
    return torch.tensor(values, dtype=torch.float64).view(batch * seq, columns)


@functools.cache
def expected(case: Case) -> tuple[dict[str, Tensor], list[oracle.Choice]]:
    """The oracle's output and gradients by name, and its assignments sorted by (expert, token)."""
    data = inputs(case)
    x_BSD = data.x_BSD.clone().requires_grad_()
    names = ("router_ED", "up_EDCF", "down_EFD", "shared_gate", "shared_up", "shared_down")
    given = {name: getattr(data.weights, name) for name in names}
    leaves = {name: t.clone().requires_grad_() for name, t in given.items() if t is not None}
    router_noise = drop_noise = None
    if case.jitter:
        router_noise = 1 + case.jitter * (2 * noise(case, _JITTER_SALT, case.shape[2]) - 1)
    if case.spec.drop_order == "random":
        drop_noise = noise(case, _DROP_SALT, case.shape[4])
    valid_T = data.ctx.valid_T
    y_BSD, kept = oracle.layer(
        x_BSD, replace(data.weights, **leaves), case.spec,
        None if valid_T is None else valid_T.view(case.shape[:2]), router_noise, drop_noise,
    )  # fmt: skip
    loss = (y_BSD * data.g_BSD).sum() + 0 * x_BSD.sum()
    leaves["x"] = x_BSD
    grads = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True, materialize_grads=True)
    result = {f"d{name}": grad for name, grad in zip(leaves, grads, strict=True)}
    return {"y": y_BSD.detach(), **result}, sorted(kept, key=lambda c: (c.expert, c.token))


def build(case: Case, dtype: torch.dtype, backend: str) -> MoELayer:
    """The layer with the case's weights; in training mode."""
    spec, weights = case.spec, inputs(case).weights
    _, _, width, hidden, experts = case.shape
    options = {
        "top_k": spec.top_k, "score": spec.score, "renormalize": spec.renormalize,
        "route_scale": spec.route_scale, "num_groups": spec.num_groups, "group_score": spec.group_score,
        "top_groups": spec.top_groups, "capacity_factor": spec.capacity_factor, "jitter": case.jitter,
        "min_capacity": spec.min_capacity, "drop_order": spec.drop_order, "group": str(spec.group),
    }  # fmt: skip
    layer = MoELayer(
        width, hidden, experts, router_options=options, activation=spec.activation, backend=backend,
        num_shared_experts=case.shared, block=case.block,
    ).to(dtype)  # fmt: skip
    with torch.no_grad():
        for name, parameter in parameters(layer).items():
            parameter.copy_(getattr(weights, name))
        if case.bias:
            layer.router.bias_E.copy_(torch.tensor(case.bias))
    return layer


def reassigned(routing: Routing, **changes: Any) -> Routing:
    """The routing with other values in its assignment."""
    return replace(routing, assignment=replace(routing.assignment, **changes))


def parameters(layer: MoELayer) -> dict[str, torch.nn.Parameter]:
    """The layer's parameters under the oracle's names."""
    found = {
        "router_ED": layer.router.weight_ED,
        "up_EDCF": layer.experts.w_gate_up_EDCF,
        "down_EFD": layer.experts.w_down_EFD,
    }
    if layer.shared is not None:
        found |= {"shared_up": layer.shared.w_up_FD, "shared_down": layer.shared.w_down_DF}
        found |= {} if layer.shared.w_gate_FD is None else {"shared_gate": layer.shared.w_gate_FD}
    assert len(found) == len(list(layer.parameters()))
    return found


def actual(case: Case, dtype: torch.dtype, backend: str) -> tuple[dict[str, Tensor], Routing]:
    """The layer's output and gradients by name, and its routing."""
    data, layer = inputs(case), build(case, dtype, backend)
    x_BSD = data.x_BSD.to(dtype, copy=True).requires_grad_()
    y_BSD, routing = layer(x_BSD, data.ctx)
    assert y_BSD.dtype == dtype
    (y_BSD * data.g_BSD.to(dtype)).sum().backward()
    result = {f"d{name}": p.grad for name, p in parameters(layer).items()}
    assert all(grad is not None for grad in result.values())
    return {"y": y_BSD.detach(), "dx": x_BSD.grad, **result}, routing

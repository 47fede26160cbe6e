"""Sums of rows and the router's choice by kernels, in the layer: who asks, what is said, and equal results.

Shapes: T tokens, D model, E experts, R rows, N pairs.
"""

from __future__ import annotations

import importlib
from dataclasses import replace
from typing import Any

import interpreted  # noqa: F401  before any kernel
import pytest
import torch
from torch import Tensor

from moetrain.kernels.router.rule import Rule
from moetrain.moe import MoELayer, Router, RouterContext, Routing, build_router, token_choice
from moetrain.moe.dispatch.row_index import RowIndex
from moetrain.ops import kernel_or_torch
from moetrain.ops.experts import table
from moetrain.ops.gather_sum import gather_sum as summed
from moetrain.ops.kernel_or_torch import Step

gather_sum = importlib.import_module("moetrain.ops.gather_sum")
say_once = importlib.import_module("moetrain.ops.say_once")
CPU, PRETENDED = torch.device("cpu"), torch.device("lazy")
FP32 = (torch.float32, 3)


@pytest.fixture(autouse=True)
def untold(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing was tested, and nothing was said; the experts' own self-tests are tested elsewhere."""
    monkeypatch.setattr(kernel_or_torch, "_tested", {})
    monkeypatch.setattr(say_once, "_said", set())
    monkeypatch.setattr(table, "_self_test", lambda name, case: None)


@pytest.mark.parametrize("width", [1, 19, 48])
def test_sums_have_the_bits_of_torch_s(width: int) -> None:
    g = torch.Generator().manual_seed(width)
    counts_T = torch.tensor([0, 3, 1, 0, 7, 2, 0])
    pairs, rows = int(counts_T.sum()), 17
    ids_N = torch.randperm(rows, generator=g)[:pairs]
    tokens_R = torch.full((rows,), -1).scatter_(0, ids_N, torch.arange(7).repeat_interleave(counts_T))
    rows_RD = torch.randn(rows, width, generator=g)
    dy_TD = torch.randn(7, width, generator=g)
    outcomes = []
    for backend in ("torch", "triton"):
        leaf_RD = rows_RD.clone().requires_grad_()
        y_TD = summed(leaf_RD, ids_N, counts_T.cumsum(0), tokens_R, backend)
        outcomes.append([y_TD, *torch.autograd.grad(y_TD, leaf_RD, dy_TD)])
    assert all(map(torch.equal, *outcomes))


def test_sums_of_returned_rows_follow_the_layer_too(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr(Step, "by_kernel", lambda self, backend, *case: asked.append(backend))
    for backend in ("triton", "auto"):
        RowIndex.of(torch.tensor([2, 0, 2]), 3, backend).total(torch.ones(3, 5))
    assert asked == ["triton", "auto"]


@pytest.mark.parametrize(("backend", "calls"), [("triton", 2), ("auto", 0), ("torch", 0), ("loop", 0)])
def test_a_layer_sums_twice_where_triton_is_asked(
    backend: str, calls: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Forward at the tokens, and backward at the experts' source."""
    seen: list[tuple[int, ...]] = []

    def counting(rows_RD: Tensor, *others: Tensor) -> Tensor:
        seen.append(tuple(rows_RD.shape))
        return gather_sum._by_torch(rows_RD, *others)  # type: ignore[no-any-return]

    layer = MoELayer(19, 23, 5, backend=backend, block=16)
    monkeypatch.setattr(gather_sum, "_STEP", replace(gather_sum._STEP, test=lambda device, case: None))
    monkeypatch.setattr(gather_sum, "_by_kernel", counting)
    x_BSD = torch.randn(2, 7, 19, requires_grad=True)
    layer(x_BSD)[0].sum().backward()
    assert len(seen) == calls
    assert all(shape[1] == 19 for shape in seen)


@pytest.mark.parametrize("asked", ["auto", "torch", "cpu", "loop"])
def test_a_cpu_is_not_asked(asked: str, recwarn: pytest.WarningsRecorder) -> None:
    assert not gather_sum._STEP.by_kernel(asked, CPU, FP32)
    assert not gather_sum._STEP.by_kernel("triton", PRETENDED, FP32)
    assert not recwarn.list


def test_a_gpu_is_asked_unless_torch_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gather_sum, "_STEP", replace(gather_sum._STEP, test=lambda device, case: None))
    gpu = torch.device("cuda", 0)
    asked = {name: gather_sum._STEP.by_kernel(name, gpu, FP32) for name in table.NAMES}
    assert [name for name in asked if asked[name]] == ["auto", "triton", "triton_block_sparse"]


def test_a_type_without_kernels_is_said_once() -> None:
    rows_RD, ids_N, ends_T = torch.ones(2, 5).double(), torch.tensor([1, 0]), torch.tensor([2])
    line = "^the sum of a token's rows with .*=triton: the kernel does not take torch.float64; torch computes"
    with pytest.warns(UserWarning, match=line) as said:
        twice = [summed(rows_RD, ids_N, ends_T, torch.zeros(2).long(), "triton") for _ in range(2)]
    assert len(said) == 1
    assert all(y_TD.eq(2).all() for y_TD in twice)


@pytest.mark.parametrize("fault", ["a row is missing", "not a number", "it raises"])
def test_a_wrong_sum_is_found(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right = gather_sum._by_kernel

    def faulty(rows_RD: Tensor, ids_N: Tensor, ends_T: Tensor) -> Tensor:
        if fault == "it raises":
            raise RuntimeError("no kernel image\nfor this device")
        rows_RD = rows_RD.clone()
        rows_RD[ids_N[3]] = torch.nan if fault == "not a number" else 0
        return right(rows_RD, ids_N, ends_T)  # type: ignore[no-any-return]

    assert gather_sum._STEP.by_kernel("triton", CPU, FP32)
    monkeypatch.setattr(kernel_or_torch, "_tested", {})
    monkeypatch.setattr(gather_sum, "_by_kernel", faulty)
    with pytest.warns(
        UserWarning, match="its sum is off by|self-test failed: RuntimeError: no kernel image;"
    ):
        assert not gather_sum._STEP.by_kernel("triton", CPU, FP32)


ROUTERS: list[tuple[str, dict[str, Any]]] = [
    ("topk", {"top_k": 2}),
    ("topk", {"top_k": 3, "renormalize": False, "jitter": 0.1}),
    ("topk", {"score": "softmax_after", "top_k": 2, "capacity_factor": 1.0, "min_capacity": 1}),
    ("switch", {}),
    ("sigmoid", {"top_k": 4, "num_groups": 3, "top_groups": 2, "route_scale": 2.5}),
    ("sigmoid", {"top_k": 2, "renormalize": False, "num_groups": 4, "top_groups": 2, "group_score": "max"}),
]


def routed(router: Router, x_TD: Tensor, ctx: RouterContext, backend: str) -> tuple[Routing, list[Tensor]]:
    """The Routing, and the gradients of x and the weights by what losses read: weights, scores, logits."""
    router.backend = backend
    x_TD = x_TD.clone().requires_grad_()
    routing: Routing = router(x_TD, ctx)
    assert routing.scores_TE is not None
    assert routing.logits_TE is not None
    parts = (routing.assignment.weights_N, routing.scores_TE, routing.logits_TE.logsumexp(-1))
    total = sum((part * torch.linspace(-1, 2, part.numel()).view(part.shape)).sum() for part in parts)
    return routing, list(torch.autograd.grad(total, [x_TD, *router.parameters()]))  # type: ignore[arg-type]


@pytest.mark.parametrize("tokens", ["random", "ties", "padding", "none"])
@pytest.mark.parametrize(("name", "options"), ROUTERS, ids=str)
def test_a_router_is_the_same_by_the_kernel(
    name: str, options: dict[str, Any], tokens: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(token_choice, "_STEP", replace(token_choice._STEP, test=lambda device, case: None))
    torch.manual_seed(3)
    seq = 0 if tokens == "none" else 17
    router = build_router(name, d_model=12, num_experts=12, **options)
    router.bias_E.copy_(torch.randint(-3, 4, (12,)) * 0.25)
    ctx = RouterContext.default(2, seq)
    x_TD = torch.randn(2 * seq, 12)
    if tokens == "ties" and not options.get("jitter"):
        with torch.no_grad():
            router.weight_ED.copy_(torch.eye(12))
        x_TD = (x_TD * 2).round() * 0.5
    if tokens == "padding":
        ctx = replace(ctx, valid_T=torch.rand(2 * seq) < 0.6)
    (want, want_grads), (got, got_grads) = (routed(router, x_TD, ctx, b) for b in ("torch", "triton"))
    for field in ("token_ids_N", "counts_E", "choice_N"):
        assert torch.equal(getattr(got.assignment, field), getattr(want.assignment, field)), field
    assert torch.equal(got.demand_BE, want.demand_BE)
    assert torch.equal(got.logits_TE, want.logits_TE)
    close = {"rtol": 1e-5, "atol": 2e-5}
    torch.testing.assert_close(got.assignment.weights_N, want.assignment.weights_N, **close)
    torch.testing.assert_close(got.scores_TE, want.scores_TE, **close)
    torch.testing.assert_close(got_grads, want_grads, **close)


def test_the_kernel_chooses_where_triton_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Rule] = []
    by_torch = token_choice._by_torch
    monkeypatch.setattr(token_choice, "_STEP", replace(token_choice._STEP, test=lambda device, case: None))
    monkeypatch.setattr(
        token_choice, "_by_kernel", lambda x, bias, rule: (calls.append(rule), by_torch(x, bias, rule))[1]
    )
    for backend in ("auto", "torch", "triton"):
        MoELayer(7, 5, 3, "sigmoid", {"top_k": 2}, backend=backend, block=16)(torch.randn(1, 4, 7))
    assert [rule.score for rule in calls] == ["sigmoid"]


@pytest.mark.parametrize(
    ("top_k", "experts", "dtype", "reason"),
    [
        (2, 5, torch.float64, "the router's kernels take logits in fp32, not torch.float64"),
        (2, 513, torch.float32, "take 1 to 512 experts, not 513"),
        (33, 64, torch.float32, "choose 1 to 32 experts, not 33"),
    ],
    ids=str,
)
def test_what_no_kernel_chooses_is_said(top_k: int, experts: int, dtype: torch.dtype, reason: str) -> None:
    router = build_router("topk", d_model=3, num_experts=experts, top_k=top_k).to(dtype)
    router.backend = "triton"
    with pytest.warns(UserWarning, match=f"^the router's choice with .*=triton: .*{reason}; torch computes"):
        router(torch.randn(5, 3, dtype=dtype), RouterContext.default(1, 5))


@pytest.mark.parametrize("fault", ["another expert", "weights", "no gradient of the weights"])
def test_a_wrong_choice_is_found(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right, case = token_choice._by_kernel, (Rule(2, "sigmoid"), 7, torch.float32)

    def faulty(logits_TE: Tensor, bias_E: Tensor, rule: Rule) -> token_choice.Chosen:
        found = right(logits_TE, bias_E, rule)
        if fault == "another expert":
            return found._replace(ids_TK=found.ids_TK.flip(0))
        if fault == "weights":
            return found._replace(weights_TK=found.weights_TK * 1.01)
        return found._replace(weights_TK=found.weights_TK.detach() + 0 * found.scores_TE.sum())

    assert token_choice._STEP.by_kernel("triton", CPU, case)
    monkeypatch.setattr(kernel_or_torch, "_tested", {})
    monkeypatch.setattr(token_choice, "_by_kernel", faulty)
    line = {"another expert": "it chose other experts", "weights": "its weight is off by 0.01"}
    with pytest.warns(UserWarning, match=line.get(fault, "its gradient of the logits is off by")):
        assert not token_choice._STEP.by_kernel("triton", CPU, case)


@pytest.mark.parametrize("rule", [Rule(1), Rule(3, "softmax_after", num_groups=4, top_groups=2)], ids=str)
@pytest.mark.parametrize("experts", [12, 128])
def test_self_tests_pass(rule: Rule, experts: int) -> None:
    assert token_choice._failure(CPU, (rule, experts, torch.float32)) is None
    assert token_choice._failure(CPU, (Rule(1), 1, torch.float32)) is None
    for dtype in (torch.float32, torch.bfloat16):
        assert gather_sum._failure(CPU, (dtype, 3)) is None

"""A bound on rows: rounds give the same result, keep little, and drop nothing."""

from __future__ import annotations

from dataclasses import replace

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moetrain.models import Decoder
from moetrain.models.options import ModelConfig
from moetrain.moe import MoELayer, RouterContext
from moetrain.moe.dispatch.rounds import round_starts, split
from moetrain.moe.options import ExpertsConfig
from moetrain.moe.routers.topk import TopKOptions
from moetrain.parallel.apply import parallelize
from moetrain.parallel.mesh import Meshes

D, E = 7, 5


def layer_of(router: str, bound: int | None, **options: object) -> MoELayer:
    torch.manual_seed(0)
    layer = MoELayer(
        d_model=D, d_ff=11, num_experts=E, router=router, router_options=dict(options), block=4,
        num_shared_experts=1, max_rows_per_rank=bound,
    )  # fmt: skip
    layer.router.usual_rows_per_token = None
    return layer.double()


def run(layer: MoELayer, x_BSD: Tensor, ctx: RouterContext) -> tuple[Tensor, ...]:
    x_BSD = x_BSD.clone().requires_grad_()
    y_BSD, routing = layer(x_BSD, ctx)
    routing.check()
    toll = torch.linspace(-1, 1, y_BSD.numel(), dtype=y_BSD.dtype).view_as(y_BSD)
    wanted = [x_BSD, *layer.parameters()]
    grads = torch.autograd.grad((y_BSD * toll).sum(), wanted, allow_unused=True)
    return (y_BSD, *(torch.zeros_like(p) if g is None else g for p, g in zip(wanted, grads, strict=True)))


@pytest.mark.parametrize("router", ["topk", "relu", "moepp", "dense", "sparsemixer2", "expert_choice"])
@settings(max_examples=8, deadline=None)
@given(
    batch=st.integers(1, 3), seq=st.integers(0, 13), bound=st.integers(1, 40), padded=st.booleans(),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_rounds_change_neither_output_nor_gradients(router, batch, seq, bound, padded, seed):
    draw = torch.Generator().manual_seed(seed)
    x_BSD = torch.randn(batch, seq, D, generator=draw, dtype=torch.float64)
    ctx = RouterContext.default(batch, seq)
    if padded:
        ctx = replace(ctx, valid_T=torch.rand(batch * seq, generator=draw) < 0.6)
    for found, expected in zip(
        run(layer_of(router, bound), x_BSD, ctx), run(layer_of(router, None), x_BSD, ctx), strict=True
    ):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


@given(seq=st.integers(0, 31), bound=st.integers(1, 40), padded=st.booleans())
def test_a_split_keeps_every_assignment_within_the_bound(seq, bound, padded):
    ctx = RouterContext.default(2, seq)
    if padded:
        ctx = replace(ctx, valid_T=torch.rand(2 * seq, generator=torch.Generator().manual_seed(seq)) < 0.6)
    layer = layer_of("relu", None)
    routing = layer.router(torch.randn(2 * seq, D, dtype=torch.float64), ctx)
    assignment, pairs, ends = routing.assignment, [], [0]
    for tokens, part in split(assignment, 2 * seq, round_starts(assignment, 2 * seq, bound)):
        assert tokens.start == ends[-1]
        ends.append(tokens.stop)
        assert part.token_ids_N.shape[0] <= bound or tokens.stop - tokens.start == 1
        experts_N = part.expert_ids_N()
        pairs += zip(
            experts_N.tolist(),
            (part.token_ids_N + tokens.start).tolist(),
            part.weights_N.tolist(),
            strict=True,
        )
    assert ends[-1] == 2 * seq
    whole = zip(
        routing.assignment.expert_ids_N().tolist(),
        routing.assignment.token_ids_N.tolist(),
        routing.assignment.weights_N.tolist(),
        strict=True,
    )
    assert sorted(pairs) == sorted(whole)


def kept_bytes(layer: MoELayer, x_BSD: Tensor) -> int:
    """Bytes that autograd keeps for backward, parameters left out."""
    own = {p.untyped_storage().data_ptr() for p in layer.parameters()}
    kept: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        layer(x_BSD)
    return sum(kept.values())


def test_rounds_keep_no_pre_activation():
    x_BSD = torch.randn(1, 256, D, dtype=torch.float64, requires_grad=True)
    free, bounded = (kept_bytes(layer_of("dense", bound), x_BSD) for bound in (None, 64))
    pre_activations = 256 * E * 2 * 11 * 8
    assert free - bounded > 0.9 * pre_activations


def rounds_of(layer: MoELayer, x_BSD: Tensor) -> int:
    calls = []
    with layer.experts.register_forward_pre_hook(lambda *_: calls.append(None)):
        layer(x_BSD)
    return len(calls)


def test_relu_goes_by_rounds_while_more_than_usual_are_active():
    torch.manual_seed(0)
    layer = MoELayer(D, 11, 16, router="relu", router_options={"top_k": 2})
    x_BSD = torch.randn(2, 29, D)
    assert rounds_of(layer, x_BSD) > 1  # about 8 of 16 a token
    with torch.no_grad():
        layer.router.weight_ED[4:] = 0
    assert rounds_of(layer, x_BSD) == 1


def test_a_bound_below_one_is_refused():
    with pytest.raises(ValueError, match=r"experts\.max_rows_per_rank=0"):
        layer_of("topk", 0)


@pytest.mark.usefixtures("training")
def test_training_with_a_bound_is_the_same(corpus, tmp_path):
    losses = []
    for bound in ("null", "97"):
        run_dir = tmp_path / bound
        options = ["train.steps=3", "train.precision=fp64", f"experts.max_rows_per_rank={bound}"]
        assert tiny.train(corpus, run_dir, *options) == 0
        losses.append([row["train/loss"] for row in tiny.steps(run_dir)])
    assert losses[0] == pytest.approx(losses[1], rel=1e-12)


@pytest.mark.parametrize("recompute", [False, True])
def test_rounds_of_rounded_weights_are_computed_again_with_them(recompute):
    """On one process a block's weights are bf16 while it runs alone, and a round is computed again later."""

    def gradients(bound: int | None) -> list[Tensor]:
        torch.manual_seed(3)
        cfg = ModelConfig(d_model=12, num_layers=2, num_heads=2, num_experts=5, d_ff_expert=7)
        model = Decoder(cfg, TopKOptions(), ExpertsConfig(max_rows_per_rank=bound), 11)
        parallelize(model, Meshes(), recompute, compute_dtype=torch.bfloat16)
        model.compute_dtype = torch.bfloat16
        loss = model(torch.randint(11, (2, 13))).hidden_BSD.float().square().sum()
        return list(torch.autograd.grad(loss, list(model.parameters())))

    for found, expected in zip(gradients(9), gradients(None), strict=True):
        assert found.dtype is torch.float32
        assert (found - expected).norm() <= 2e-2 * expected.norm()

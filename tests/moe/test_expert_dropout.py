"""Dropout inside experts: of their hidden units (Switch's) and of what they read (PESC's adapters').

Shapes: B batch, S sequence, T = B S, D model, E experts, F hidden.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import oracle
import pytest
import torch
from torch import Tensor

from moetrain.moe import MoELayer, RouterContext
from moetrain.moe.adapters import AdapterLayer
from moetrain.moe.assignment import Assignment
from moetrain.moe.expert_dropout import DOWN_SALT, GATE_SALT, UP_SALT
from moetrain.moe.low_rank_experts import LowRankLayer
from moetrain.moe.options import Keep
from moetrain.ops.low_rank import StackedLowRank

BATCH, SEQ, WIDTH, HIDDEN, EXPERTS = 3, 5, 7, 11, 4
SEED, STEP, LAYER = 7, 13, 2
SAMPLES = (19, 4, 23)
RATES = [(0.4, 0.0), (0.0, 0.3), (0.4, 0.3)]


def context(samples: tuple[int, ...] = SAMPLES, **changes: int) -> RouterContext:
    parts = {"seed": SEED, "step": STEP, "layer": LAYER, **changes}
    return RouterContext(len(samples), SEQ, torch.tensor(samples), **parts)  # type: ignore[arg-type]


def layer(hidden: float, inputs: float, activation: str = "relu", **more: Any) -> MoELayer:
    torch.manual_seed(3)
    options = {"router_options": {"top_k": 2}, "dropout": hidden, "input_dropout": inputs, **more}
    return MoELayer(WIDTH, HIDDEN, EXPERTS, activation=activation, **options).double()


def inputs() -> Tensor:
    return torch.randn(BATCH, SEQ, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(5))


def mask(sample: int, position: int, expert: int, salt: int, columns: int, rate: float) -> Tensor:
    """By Python's integers: whether each column is kept, over 1 - rate."""
    key = 0
    for b in range(4):
        noise = oracle.uniform(SEED, STEP, LAYER, 0xD209, sample, position, b)
        key += int(noise * 256) << (8 * b)
    row = oracle._splitmix64((oracle._splitmix64(key) + expert) % 2**64)
    start = oracle._splitmix64((row + salt) % 2**64)
    bits = [oracle._splitmix64((start + n) % 2**64) >> 41 & 0x7FFFFF for n in range(columns)]
    return torch.tensor([(b >= round(rate * 2**23)) / (1 - rate) for b in bits], dtype=torch.float64)


def expert_by_hand(moe: MoELayer, x_D: Tensor, e: int, activation: str, token: tuple[int, int]) -> Tensor:
    """Biases are a row of the first matrix that reads a one, products one that reads what is not dropped."""
    experts, rates = moe.experts, moe.experts.dropout
    down_FD = experts.w_down_EFD[e]
    if rates.inputs:
        x_D = x_D * mask(*token, e, 1, len(x_D), rates.inputs)
    kept_F = mask(*token, e, 2, len(down_FD), rates.hidden)
    read, rows, down_FD = [x_D], [experts.w_gate_up_EDCF[e].flatten(1)], kept_F[:, None] * down_FD
    if experts.bias_gate_up_ECF is not None:
        read.append(x_D.new_ones(1))
        rows.append(experts.bias_gate_up_ECF[e].flatten()[None])
    if (up := experts.added("w_gate_up_EDCF")) is not None:
        read.append(x_D * mask(*token, e, UP_SALT, len(x_D), rates.beside))
        rows.append(product(up, e))
    if (down := experts.added("w_down_EFD")) is not None:
        kept_F = kept_F * mask(*token, e, DOWN_SALT, len(down_FD), rates.beside)
        down_FD = down_FD + kept_F[:, None] * product(down, e)
    y_D = oracle.feed_forward(torch.cat(read), torch.cat(rows), down_FD, activation)
    return y_D if experts.bias_down_ED is None else y_D + experts.bias_down_ED[e]


def product(added: StackedLowRank, e: int) -> Tensor:
    return added.factor * added.a_EKR[e] @ added.b_ERN[e].flatten(1)


def by_hand(
    moe: MoELayer,
    x_BSD: Tensor,
    activation: str,
    before: Callable[[Tensor], Tensor],
    expert: Callable[..., Tensor] = expert_by_hand,
) -> Tensor:
    """Token by token; ``before``: what an expert reads of a token, and what its result is added to."""
    none = x_BSD.new_empty(0)
    weights = oracle.Weights(moe.router.weight_ED, none, none)
    rows = []
    for b, sample in enumerate(SAMPLES):
        for s in range(SEQ):
            x_D, y_D = x_BSD[b, s], before(x_BSD[b, s]) if isinstance(moe, AdapterLayer) else 0.0
            for e, g in oracle.route(x_D, weights, oracle.Spec(top_k=2)):
                y_D = y_D + g * expert(moe, before(x_D), e, activation, (sample, s))
            rows.append(y_D)
    return torch.stack(rows).view_as(x_BSD)  # type: ignore[arg-type]


def assert_alike(moe: MoELayer, expected: Callable[[Tensor], Tensor]) -> None:
    x_BSD = inputs().requires_grad_()
    leaves = [x_BSD, *(p for p in moe.parameters())]
    found, wanted = moe(x_BSD, context())[0], expected(x_BSD)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-13)
    for ours, theirs in zip(
        torch.autograd.grad(found.square().sum(), leaves),
        torch.autograd.grad(wanted.square().sum(), leaves),
        strict=True,
    ):
        assert theirs.any()
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize(("hidden", "read"), RATES)
@pytest.mark.parametrize("activation", ["relu", "swiglu"])
@pytest.mark.parametrize("backend", ["auto", "loop"])
def test_output_and_gradients_are_the_masked_networks(
    hidden: float, read: float, activation: str, backend: str
) -> None:
    moe = layer(hidden, read, activation, backend=backend)
    assert_alike(moe, lambda x_BSD: by_hand(moe, x_BSD, activation, lambda x_D: x_D))


def test_adapters_drop_what_they_read() -> None:
    torch.manual_seed(3)
    options: dict[str, Any] = {"router_options": {"top_k": 2}, "input_dropout": 0.3}
    moe = AdapterLayer(WIDTH, 13, HIDDEN, EXPERTS, "relu", **options).double()

    def network(x_D: Tensor) -> Tensor:
        return oracle.feed_forward(x_D, moe.w_up_FD.t(), moe.w_down_DF.t(), "relu")

    assert_alike(moe, lambda x_BSD: by_hand(moe, x_BSD, "gelu", network))


def with_products(moe: MoELayer, shapes: dict[str, tuple[int, tuple[int, ...]]]) -> Any:
    """Beside the matrices of these names, inner and outer widths; biases and products are drawn."""
    for leaf, (inner, outer) in shapes.items():
        moe.experts.add_module(f"lora_{leaf}", StackedLowRank(EXPERTS, inner, outer, 2, 0.7))
    moe.experts.dropout = replace(moe.experts.dropout, beside=0.25)
    with torch.no_grad():
        for name, parameter in moe.double().experts.named_parameters():
            if ".b_" in name or name.startswith("bias_"):
                parameter.normal_()
    return moe


@pytest.mark.parametrize(("hidden", "read"), [(0.0, 0.0), (0.4, 0.3)])
@pytest.mark.parametrize("backend", ["auto", "loop"])
def test_biases_are_not_dropped_nor_what_others_read(hidden: float, read: float, backend: str) -> None:
    moe = layer(hidden, read, "swiglu_clamped", bias=True, backend=backend)
    moe = with_products(moe, {"w_gate_up_EDCF": (WIDTH, (2, HIDDEN)), "w_down_EFD": (HIDDEN, (WIDTH,))})
    assert_alike(moe, lambda x_BSD: by_hand(moe, x_BSD, "swiglu_clamped", lambda x_D: x_D))


def test_products_around_one_network_drop_each_its_own() -> None:
    assert len({GATE_SALT, UP_SALT, DOWN_SALT}) == 3
    torch.manual_seed(3)
    moe: Any = LowRankLayer(
        WIDTH, HIDDEN, EXPERTS, "swiglu", "auto", Keep.inputs, router_options={"top_k": 2}
    )
    ups = dict.fromkeys(("w_gate_FD", "w_up_FD"), (WIDTH, (HIDDEN,)))
    moe = with_products(moe, {**ups, "w_down_DF": (HIDDEN, (WIDTH,))})

    def expert(moe: Any, x_D: Tensor, e: int, activation: str, token: tuple[int, int]) -> Tensor:
        gate, up, down = (product(moe.experts.added(leaf), e) for leaf in (*ups, "w_down_DF"))
        kept = (mask(*token, e, salt, WIDTH, 0.25) for salt in (GATE_SALT, UP_SALT))
        read = torch.cat([x_D, *(x_D * kept_D for kept_D in kept)])
        bases = torch.cat([moe.w_gate_FD, moe.w_up_FD]).t()
        rows = torch.cat([bases, torch.block_diag(gate, up)])
        down = moe.w_down_DF.t() + mask(*token, e, DOWN_SALT, HIDDEN, 0.25)[:, None] * down
        return oracle.feed_forward(read, rows, down, activation)

    assert_alike(moe, lambda x_BSD: by_hand(moe, x_BSD, "swiglu", lambda x_D: x_D, expert))


def test_evaluation_drops_nothing() -> None:
    plain, moe, x_BSD = layer(0, 0), layer(0.4, 0.3), inputs()
    assert torch.equal(moe.eval()(x_BSD, context())[0], plain.eval()(x_BSD, context())[0])
    assert not torch.equal(moe.train()(x_BSD, context())[0], plain.train()(x_BSD, context())[0])


def test_a_mask_is_its_tokens_experts_layers_and_steps_own() -> None:
    """Each expert the same network, so that two choices of one differ by their masks alone."""
    moe = layer(0.5, 0.0)
    with torch.no_grad():
        for weight in (moe.experts.w_gate_up_EDCF, moe.experts.w_down_EFD):
            weight.copy_(weight[:1].expand_as(weight).clone())
    x_BSD = inputs()[:1, :1].expand(BATCH, SEQ, WIDTH)
    found = [moe(x_BSD, context(**change))[0] for change in ({}, {"step": 1}, {"layer": 1}, {"seed": 1})]
    rows = torch.cat([y_BSD.flatten(0, 1) for y_BSD in found])
    assert len(rows.detach().unique(dim=0)) == 4 * BATCH * SEQ
    once = layer(0.5, 0.0, router_options={"top_k": EXPERTS})
    with torch.no_grad():
        for name, weight in once.experts.named_parameters():
            weight.copy_(moe.experts.get_parameter(name))
        once.router.weight_ED.zero_()
    of_one_mask = layer(0.0, 0.0, router_options={"top_k": EXPERTS})
    of_one_mask.load_state_dict(once.state_dict())
    ratio = once(x_BSD, context())[0] / of_one_mask(x_BSD, context())[0]
    assert ratio.detach().std() > 0.05  # four experts with one mask would each be alike


@pytest.mark.parametrize(("hidden", "read"), [(0.4, 0.0), (0.0, 0.3)])
def test_the_mean_over_steps_is_what_is_not_dropped(hidden: float, read: float) -> None:
    """Exact for hidden units, on which the output is linear; for inputs too, with one unit that is."""
    moe, plain = layer(hidden, read), layer(0, 0)
    if read:
        with torch.no_grad():
            for network in (moe, plain):
                network.experts.w_gate_up_EDCF.abs_()
        x_BSD = inputs().abs()
    else:
        x_BSD = inputs()
    with torch.no_grad():
        drawn = torch.stack([moe(x_BSD, context(step=step))[0] for step in range(400)])
        error = (drawn.mean(0) - plain(x_BSD, context())[0]) / (drawn.std(0) / 20)
    assert error.abs().max() < 5
    assert 0.7 < error.std() < 1.4


def test_a_layout_of_the_batch_changes_nothing() -> None:
    """Other micro-batches, rounds and padded blocks draw the same masks."""
    x_BSD, moe = inputs(), layer(0.4, 0.3)
    whole = moe(x_BSD, context())[0]
    parts = [moe(x_BSD[b : b + 1], context(SAMPLES[b : b + 1]))[0] for b in range(BATCH)]
    torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-12, atol=1e-14)
    grad = torch.autograd.grad(whole.square().sum(), moe.experts.w_down_EFD)[0]
    for more in ({"max_rows_per_rank": 7}, {"block": 8}, {"keep": Keep.inputs}):
        other = layer(0.4, 0.3, **more)
        found = other(x_BSD, context())[0]
        torch.testing.assert_close(found, whole, rtol=1e-12, atol=1e-14)
        again = torch.autograd.grad(found.square().sum(), other.experts.w_down_EFD)[0]
        torch.testing.assert_close(again, grad, rtol=1e-11, atol=1e-13)
    assert moe(x_BSD[:, :0], RouterContext(BATCH, 0, torch.tensor(SAMPLES)))[0].shape == (BATCH, 0, WIDTH)


@pytest.mark.parametrize("backend", ["auto", "loop"])
@pytest.mark.parametrize("hidden", [0.4, 0.0])
def test_a_rank_without_rows_has_gradients_of_zero(backend: str, hidden: float) -> None:
    """And none is missing: those of the rows are what a backward pass on ranks waits with."""
    moe, none = layer(hidden, 0.0, backend=backend), torch.zeros(0, dtype=torch.int64)
    source_XD = torch.zeros(0, WIDTH + (4 if hidden else 0), dtype=torch.float64).requires_grad_()
    assignment = Assignment(
        none, torch.zeros(0, dtype=torch.float64), torch.zeros(EXPERTS, dtype=torch.int64)
    )
    work = moe.dispatcher.dispatch(source_XD, assignment)
    moe.dispatcher.combine(moe.experts(work), work).sum().backward()
    for leaf in (source_XD, moe.experts.w_gate_up_EDCF, moe.experts.w_down_EFD):
        assert leaf.grad is not None
        assert not leaf.grad.any()


def test_keys_survive_bf16() -> None:
    moe = layer(0.4, 0.0).float()
    x_BSD = inputs().float()
    exact = moe(x_BSD, context())[0]
    with torch.autocast("cpu", torch.bfloat16):
        rounded = moe(x_BSD, context())[0]
    assert rounded.dtype is torch.bfloat16
    assert (rounded.float() - exact).norm() < 0.02 * exact.norm()


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"dropout": 1.0}, r"experts\.dropout=1\.0 must lie in \[0, 1\)"),
        ({"input_dropout": -0.1}, r"experts\.input_dropout=-0\.1 must lie in \[0, 1\)"),
        ({"dropout": 0.4, "backend": "cpu"}, "not by experts.backend=cpu: set experts.backend=auto"),
        ({"input_dropout": 0.1, "backend": "triton"}, "experts.input_dropout=0.1 is computed by torch's"),
    ],
)
def test_what_cannot_be_is_refused(more: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        MoELayer(WIDTH, HIDDEN, EXPERTS, **more)

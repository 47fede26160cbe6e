"""Several models' networks as experts, and more experts from an MoE model."""

import pytest
import torch
from upcycle_cases import (
    SEED,
    build,
    config,
    dense_matrices,
    dense_state,
    gate_up_down,
    loaded,
    logits,
    relative,
    target,
)

from moetrain.moe.options import RouterConfig
from moetrain.moe.routers.gshard import GShardOptions
from moetrain.moe.routers.sigmoid import SigmoidOptions
from moetrain.moe.routers.topk import GroupScore, Score, TopKOptions
from moetrain.upcycle import GrowOptions, JoinOptions, Rest, upcycle


@pytest.mark.parametrize("rest", list(Rest))
def test_experts_are_the_donors_networks_bit_for_bit(rest: Rest) -> None:
    first, *donors = (dense_state(seed=seed) for seed in range(3))
    goal = target(num_experts=6)
    result = upcycle(first, goal, JoinOptions(rest=rest), SEED, donors=donors)
    loaded(result, goal)
    for layer in (0, 1):
        own = [dense_matrices(state, layer, 2) for state in (first, *donors)]
        for m, expert_EFD in enumerate(gate_up_down(result.state, layer, 2)):
            for e in range(6):
                assert torch.equal(expert_EFD[e], own[e // 2][m])
    for name in ("embed_VD", "blocks.1.attention.w_q_QD", "norm.weight_D"):
        mean = torch.stack([state[name] for state in (first, *donors)]).mean(0)
        expected = mean if rest is Rest.mean else first[name]
        torch.testing.assert_close(result.state[name], expected, rtol=1e-15, atol=1e-15)
    assert not result.preserves
    assert not torch.equal(first["embed_VD"], donors[0]["embed_VD"])


def test_layers_that_stay_dense_are_joined_as_the_rest() -> None:
    first, second = dense_state(seed=0), dense_state(seed=1)
    goal = target(num_experts=4, first_dense=1)
    result = upcycle(first, goal, JoinOptions(), SEED, donors=[second]).state
    name = "blocks.0.feed_forward.w_down_DF"
    torch.testing.assert_close(result[name], (first[name] + second[name]) / 2)


def test_the_mean_of_bf16_is_rounded_once() -> None:
    states = [{n: t.bfloat16() for n, t in dense_state(seed=s).items()} for s in range(3)]
    result = upcycle(states[0], target(num_experts=3), JoinOptions(), SEED, donors=states[1:]).state
    expected = torch.stack([s["embed_VD"].double() for s in states]).mean(0).bfloat16()
    assert torch.equal(result["embed_VD"], expected)


def test_one_model_joined_is_a_copy() -> None:
    state, goal = dense_state(), target()
    result = upcycle(state, goal, JoinOptions(), SEED)
    dense = build(config(num_experts=0), TopKOptions())
    dense.load_state_dict(state)
    assert result.preserves
    assert relative(logits(loaded(result, goal)), logits(dense)) < 1e-12


SOURCE = {"num_experts": 4, "d_ff_expert": 13, "num_shared_experts": 1}


def moe_source(router: RouterConfig, **changes: int) -> dict[str, torch.Tensor]:
    torch.manual_seed(3)
    model = build(config(**{**SOURCE, **changes}), router)
    for (layer,) in model.moe_layers().values():
        layer.router.bias_E.copy_(0.1 * torch.randn_like(layer.router.bias_E))
    return model.state_dict()


GROWN = [
    (TopKOptions(top_k=2), TopKOptions(top_k=6), True),
    (TopKOptions(top_k=1), TopKOptions(top_k=3), True),
    (TopKOptions(top_k=2, score=Score.softmax_after), TopKOptions(top_k=6, score=Score.softmax_after), True),
    (TopKOptions(top_k=2, renormalize=False), TopKOptions(top_k=6, renormalize=False), True),
    (SigmoidOptions(top_k=2, route_scale=2.5), SigmoidOptions(top_k=6, route_scale=2.5), True),
    (SigmoidOptions(top_k=2, renormalize=False), SigmoidOptions(top_k=6, renormalize=False), False),
    (TopKOptions(top_k=2), TopKOptions(top_k=2), False),
    (TopKOptions(top_k=2), TopKOptions(top_k=6, renormalize=False), False),
    (
        TopKOptions(top_k=2, num_groups=2, top_groups=1, group_score=GroupScore.max),
        TopKOptions(top_k=6, num_groups=2, top_groups=1, group_score=GroupScore.max),
        True,
    ),
]


@pytest.mark.parametrize(("old", "new", "kept"), GROWN)
@pytest.mark.parametrize("pattern", [{}, {"first_dense": 1}])
def test_copies_share_their_experts_weight(
    old: TopKOptions, new: TopKOptions, kept: bool, pattern: dict[str, int]
) -> None:
    state = moe_source(old, **pattern)
    small = build(config(**{**SOURCE, **pattern}), old)
    small.load_state_dict(state)
    goal = target(new, **{**SOURCE, **pattern, "num_experts": 12})
    result = upcycle(state, goal, GrowOptions(), SEED, source_router=old)
    error = relative(logits(loaded(result, goal)), logits(small))
    assert (error < 1e-12) is kept
    assert result.preserves is kept, result.reason
    last = "blocks.1.feed_forward."
    for name in ("experts.w_gate_up_EDCF", "experts.w_down_EFD", "router.weight_ED", "shared.w_down_DF"):
        copies = 1 if "shared" in name else 3
        assert torch.equal(result.state[last + name], state[last + name].repeat_interleave(copies, 0))


@pytest.mark.parametrize(
    ("source", "router", "word"),
    [
        (None, TopKOptions(top_k=6), "not known"),
        (GShardOptions(), GShardOptions(), "not both top-k"),
        (TopKOptions(top_k=2), TopKOptions(top_k=4), "3 times"),
        (TopKOptions(top_k=2), TopKOptions(top_k=6, route_scale=2.0), "more than top_k"),
        (
            TopKOptions(top_k=2, capacity_factor=2.0),
            TopKOptions(top_k=6, capacity_factor=2.0),
            "capacity_factor=null",
        ),
        (
            TopKOptions(top_k=2, num_groups=2, top_groups=1),
            TopKOptions(top_k=6, num_groups=2, top_groups=1),
            "group_score=top2",
        ),
    ],
)
def test_growth_that_is_promised_nothing(
    source: RouterConfig | None, router: RouterConfig, word: str
) -> None:
    plain = {"num_experts": 12, "d_ff_expert": 13, "num_shared_experts": 1}
    state = moe_source(TopKOptions(top_k=2))
    result = upcycle(state, target(router, **plain), GrowOptions(), SEED, source_router=source)
    assert not result.preserves
    assert word in result.reason

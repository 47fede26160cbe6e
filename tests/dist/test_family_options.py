"""What published families brought to a model, over ranks: equal to one process."""

from __future__ import annotations

import pytest

from moetrain.config.hydra.compose import compose_train
from moetrain.verify.command import prove
from moetrain.verify.twin import twin_of

OPTIONS = {
    "glm4_moe": [
        "router=sigmoid", "router.num_groups=4", "router.top_groups=2", "router.route_scale=1.7",
        "balance=aux_free", "model.num_shared_experts=1", "model.first_dense=1", "model.rope_fraction=0.5",
        "model.qk_norm=head", "model.qkv_bias=true", "model.out_bias=true", "model.mlp_bias=true",
    ],
    "gemma3_text": [  # made an MoE
        "experts=geglu_tanh", "model.qk_norm=head", "model.sliding_window=5",
        "model.window_pattern=[sliding,full]", "model.window_rope_theta=70", "model.rope_theta=500",
        "model.rope_scaling.kind=linear", "model.rope_scaling.factor=8", "model.zero_centered_norms=true",
        "model.sandwich_norms=true", "model.scales.embedding=3.6", "model.scales.round_embedding=true",
        "model.scales.attention=0.3", "model.num_kv_heads=1", "model.first_dense=1",
    ],
    "granitemoeshared": [
        "router=mixtral", "model.num_shared_experts=1", "model.d_ff_shared=96", "model.scales.embedding=3",
        "model.scales.residual=0.4", "model.scales.attention=0.3", "model.scales.logits_divisor=0.7",
        "model.rope_interleaved=true", "model.qk_norm=head_after_rope",
    ],
}  # fmt: skip
LAYOUTS = {"ep 2": ["parallel.ep=2"], "efsdp 2": []}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.slow
def test_options_of_families_over_two_ranks(name: str, layout: str) -> None:
    cfg = compose_train(["model.num_experts=8", *OPTIONS[name], *LAYOUTS[layout]])
    found = prove(twin_of(cfg, 2, 8), 1e-9)
    assert [check.problem for check in found if not check.holds] == []
    assert sum(check.number for check in found) > 100

"""DeepSeek's models and Moonlight, small: transformers' keys and ours; and random models of theirs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from hypothesis import strategies as st

from moetrain.models.latent_options import LatentConfig
from moetrain.models.options import ModelConfig
from moetrain.moe.routers.topk import GroupScore, Score, TopKOptions

_THEIRS = {
    "kv_lora_rank": 12,
    "qk_nope_head_dim": 6,
    "qk_rope_head_dim": 8,
    "v_head_dim": 10,
    "rms_norm_eps": 1e-3,  # another than that of the latent vectors
    "hidden_size": 36,
    "head_dim": 8,
    "num_key_value_heads": 6,
    "first_k_dense_replace": 1,
    "intermediate_size": 41,
    "moe_intermediate_size": 23,
    "n_routed_experts": 12,
    "num_experts_per_tok": 3,
    "initializer_range": 0.1,  # their scores and rotations are fp32 even in an fp64 model
}
_LATENT = LatentConfig(kv_lora_rank=12, qk_nope_head_dim=6, qk_rope_head_dim=8, v_head_dim=10)
_WITH_QUERIES = replace(_LATENT, q_lora_rank=17)
_OURS = {
    "attention": "latent",
    "d_model": 36,
    "head_dim": None,
    "num_kv_heads": None,
    "first_dense": 1,
    "d_ff": 41,
    "d_ff_expert": 23,
    "num_experts": 12,
    "norm_eps": 1e-3,
    "rope_interleaved": True,
}
_V2 = {**_THEIRS, "n_shared_experts": 2, "routed_scaling_factor": 1.5}
_LIMITED = {"topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2}
_GREEDY = TopKOptions(top_k=3, renormalize=False, route_scale=1.5)
_ONE_GROUP = {"n_group": 1, "topk_group": 1, "norm_topk_prob": False}
_SIGMOID = TopKOptions(top_k=3, score=Score.sigmoid, route_scale=2.5)
# name -> transformers' class, its keys, ours, the router
MODELS: dict[str, tuple[str, dict[str, Any], dict[str, Any], TopKOptions]] = {
    "deepseek_v2": (  # as V2-Lite: queries straight from the token, two shared experts
        "DeepseekV2",
        {**_V2, "q_lora_rank": None},
        {**_OURS, "latent": _LATENT, "num_shared_experts": 2},
        _GREEDY,
    ),
    "deepseek_v2_groups": (  # as V2
        "DeepseekV2",
        {**_V2, **_LIMITED, "q_lora_rank": 17},
        {**_OURS, "latent": _WITH_QUERIES, "num_shared_experts": 2},
        replace(_GREEDY, num_groups=4, top_groups=2, group_score=GroupScore.max),
    ),
    "deepseek_v3": (
        "DeepseekV3",
        {**_THEIRS, "q_lora_rank": 17, "n_group": 4, "topk_group": 2, "n_shared_experts": 1},
        {**_OURS, "latent": _WITH_QUERIES, "num_shared_experts": 1},
        replace(_SIGMOID, num_groups=4, top_groups=2),
    ),
    "moonlight": (  # besides: halves that turn, and values wider than queries, as no published model has them
        "DeepseekV3",
        {
            **_THEIRS,
            **_ONE_GROUP,
            "q_lora_rank": None,
            "n_shared_experts": 2,
            "v_head_dim": 16,
            "rope_interleave": False,
        },
        {
            **_OURS,
            "latent": replace(_LATENT, v_head_dim=16),
            "rope_interleaved": False,
            "num_shared_experts": 2,
        },
        replace(_SIGMOID, renormalize=False, top_groups=1),
    ),
}


@st.composite
def specs(draw: st.DrawFn, name: str, keys: dict[str, Any]) -> tuple[ModelConfig, TopKOptions]:
    widths = {key: draw(st.integers(1, 9)) for key in ("kv_lora_rank", "qk_nope_head_dim", "v_head_dim")}
    widths |= {"q_lora_rank": draw(st.none() | st.integers(1, 7)), "qk_rope_head_dim": keys["head_dim"]}
    groups, of_group = draw(st.integers(1, 3)), draw(st.integers(2, 4))
    limit, second = draw(st.integers(1, groups)), name == "deepseek_v2"
    model = ModelConfig(
        **keys
        | {
            "attention": "latent",
            "latent": LatentConfig(**widths),
            "rope_interleaved": second or draw(st.booleans()),
            "head_dim": None,
            "num_kv_heads": None,
            "num_experts": groups * of_group,
            "d_ff_expert": draw(st.integers(1, 13)),
            "num_shared_experts": draw(st.integers(1, 3)),
            "first_dense": draw(st.integers(0, keys["num_layers"] - 1)),
        }
    )
    options: dict[str, Any] = {
        "top_k": draw(st.integers(1, limit * of_group)),
        "route_scale": draw(st.sampled_from([1.0, 2.5])),
    }
    if second:
        options |= {"renormalize": False, "group_score": GroupScore.max}
    else:
        options |= {"renormalize": draw(st.booleans()), "score": Score.sigmoid}
    if not second or limit < groups:
        options |= {"num_groups": groups, "top_groups": limit}
    return model, TopKOptions(**options)

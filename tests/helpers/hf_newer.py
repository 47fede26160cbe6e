"""Families of 2025, small: GLM-4.5, MiniMax-M2, dots.llm1, ERNIE 4.5, Hunyuan, Granite, GPT-OSS."""

from __future__ import annotations

from dataclasses import replace

from hf_family import THETA, Family, scaled

from moetrain.models.options import LayerWindow, QKNorm
from moetrain.models.rope_options import RopeKind, RopeScaling
from moetrain.models.scale_options import ScalesConfig
from moetrain.moe.options import Activation
from moetrain.moe.routers.topk import Score, TopKOptions

GLM4_MOE = Family(
    "Glm4Moe",
    {
        "moe_intermediate_size": 23,
        "intermediate_size": 41,
        "n_routed_experts": 12,
        "n_shared_experts": 2,
        "num_experts_per_tok": 3,
        "first_k_dense_replace": 1,
        "routed_scaling_factor": 1.7,
        "attention_bias": True,
        "use_qk_norm": True,
        "num_mtp_layers": 0,
    },
    {
        "num_experts": 12,
        "d_ff_expert": 23,
        "d_ff": 41,
        "num_shared_experts": 2,
        "first_dense": 1,
        "norm_eps": 1e-5,
        "qkv_bias": True,
        "qk_norm": QKNorm.head,
        "rope_fraction": 3 / 7,
    },
    TopKOptions(top_k=3, score=Score.sigmoid, renormalize=True, route_scale=1.7, top_groups=1),
    rope={"partial_rotary_factor": 3 / 7},
)
GLM4_MOE_GROUPS = Family(  # without the norms and biases; the whole head turns; unscaled raw scores
    "Glm4Moe",
    {
        **GLM4_MOE.theirs,
        "n_shared_experts": 1,
        "first_k_dense_replace": 0,
        "n_group": 4,
        "topk_group": 2,
        "norm_topk_prob": False,
        "routed_scaling_factor": 1.0,
        "attention_bias": False,
        "use_qk_norm": False,
    },
    {
        **GLM4_MOE.ours,
        "num_shared_experts": 1,
        "first_dense": 0,
        "qkv_bias": False,
        "qk_norm": QKNorm.none,
        "rope_fraction": 1.0,
    },
    TopKOptions(top_k=3, score=Score.sigmoid, renormalize=False, num_groups=4, top_groups=2),
    rope={"partial_rotary_factor": 1.0},
)
MINIMAX_M2 = Family(
    "MiniMaxM2",
    {"intermediate_size": 23, "num_local_experts": 11, "num_experts_per_tok": 3},
    {
        "num_experts": 11,
        "d_ff_expert": 23,
        "norm_eps": 1e-6,
        "qk_norm": QKNorm.full,
        "rope_fraction": 2 / 7,
    },
    TopKOptions(top_k=3, score=Score.sigmoid),
    rope={"partial_rotary_factor": 2 / 7},
)
DOTS1 = Family(
    "Dots1",
    {
        **{key: GLM4_MOE.theirs[key] for key in ("moe_intermediate_size", "intermediate_size")},
        "n_routed_experts": 12,
        "n_shared_experts": 1,
        "num_experts_per_tok": 3,
        "norm_topk_prob": True,
        "first_k_dense_replace": 1,
        "routed_scaling_factor": 2.5,
        "n_group": 3,
        "topk_group": 2,
        "attention_bias": True,
        "rms_norm_eps": 1e-6,
        "sliding_window": None,
    },
    {
        **GLM4_MOE.ours,
        "num_shared_experts": 1,
        "norm_eps": 1e-6,
        "out_bias": True,
        "rope_fraction": 1.0,
    },
    TopKOptions(top_k=3, score=Score.sigmoid, route_scale=2.5, num_groups=3, top_groups=2),
)
DOTS1_WINDOW = replace(
    DOTS1,
    theirs={**DOTS1.theirs, "attention_bias": False, "sliding_window": 4, "max_window_layers": 0},
    ours={**DOTS1.ours, "qkv_bias": False, "out_bias": False, "sliding_window": 4},
)
ERNIE4_5_MOE = Family(
    "Ernie4_5_Moe",
    {
        "moe_intermediate_size": 23,
        "intermediate_size": 41,
        "moe_num_experts": 11,
        "moe_k": 3,
        "moe_num_shared_experts": 2,
        "num_hidden_layers": 4,
        "moe_layer_interval": 2,
        "moe_layer_start_index": 2,
    },
    {
        "num_experts": 11,
        "d_ff_expert": 23,
        "d_ff": 41,
        "num_shared_experts": 2,
        "num_layers": 4,
        "moe_every": 2,
        "first_dense": 2,
        "norm_eps": 1e-5,
        "rope_interleaved": True,
    },
    TopKOptions(top_k=3, score=Score.softmax, renormalize=True),
)
ERNIE4_5_MOE_ALL = replace(  # every layer MoE, no shared experts, tied
    ERNIE4_5_MOE,
    theirs={
        **ERNIE4_5_MOE.theirs,
        "moe_num_shared_experts": 0,
        "moe_layer_interval": 1,
        "moe_layer_start_index": 0,
        "moe_layer_end_index": 3,
        "tie_word_embeddings": True,
    },
    ours={
        **ERNIE4_5_MOE.ours,
        "num_shared_experts": 0,
        "moe_every": 1,
        "first_dense": 0,
        "tie_embeddings": True,
    },
)
HUNYUAN_V1_MOE = Family(
    "HunYuanMoEV1",
    {"intermediate_size": 23, "num_experts": 11, "moe_topk": 3, "attention_bias": True},
    {
        "num_experts": 11,
        "d_ff_expert": 23,
        "num_shared_experts": 1,
        "norm_eps": 1e-5,
        "qkv_bias": True,
        "out_bias": True,
        "qk_norm": QKNorm.head_after_rope,
    },
    TopKOptions(top_k=3, score=Score.softmax, renormalize=True),
)
HUNYUAN_V1_MOE_ALPHA = replace(
    HUNYUAN_V1_MOE,
    theirs={**HUNYUAN_V1_MOE.theirs, "attention_bias": False, "moe_topk": [3] * 3},
    ours={
        **HUNYUAN_V1_MOE.ours,
        "qkv_bias": False,
        "out_bias": False,
        "rope_theta": THETA * 50.0 ** (14 / 12),
    },
    rope={"rope_type": "dynamic", "alpha": 50.0, "factor": 1.0},
)
GRANITEMOE = Family(
    "GraniteMoe",
    {
        "hidden_size": 60,  # transformers divides it by the heads
        "head_dim": 10,
        "intermediate_size": 23,
        "num_local_experts": 11,
        "num_experts_per_tok": 3,
        "attention_bias": True,
        "embedding_multiplier": 3.0,
        "residual_multiplier": 0.4,
        "attention_multiplier": 0.2,
        "logits_scaling": 0.7,
    },
    {
        "d_model": 60,
        "head_dim": 10,
        "num_experts": 11,
        "d_ff_expert": 23,
        "norm_eps": 1e-6,
        "qkv_bias": True,
        "out_bias": True,
        "scales": ScalesConfig(embedding=3.0, residual=0.4, attention=0.2, logits_divisor=0.7),
    },
    TopKOptions(top_k=3, score=Score.softmax_after),
)
GRANITEMOESHARED = replace(
    GRANITEMOE,
    name="GraniteMoeShared",
    theirs={**GRANITEMOE.theirs, "attention_bias": False, "shared_intermediate_size": 19},
    ours={
        **GRANITEMOE.ours,
        "qkv_bias": False,
        "out_bias": False,
        "num_shared_experts": 1,
        "d_ff_shared": 19,
    },
)
GPT_OSS = scaled(
    Family(
        "GptOss",
        {
            "intermediate_size": 37,
            "num_local_experts": 7,
            "num_experts_per_tok": 3,
            "rms_norm_eps": 1e-5,
            "sliding_window": 5,
            "initializer_range": 0.1,
        },
        {
            "d_ff_expert": 37,
            "norm_eps": 1e-5,
            "qkv_bias": True,
            "out_bias": True,
            "attention_sinks": True,
            "sliding_window": 5,
            "window_pattern": (LayerWindow.sliding, LayerWindow.full),
        },
        TopKOptions(top_k=3, score=Score.softmax_after, logit_bias=True),
        Activation.swiglu_clamped,
        expert_bias=True,
    ),
    {"truncate": False},
    RopeScaling(RopeKind.yarn, 4.0, truncate=False),
)
_THREE = ["full_attention", "full_attention", "sliding_attention"]
GPT_OSS_PLAIN = replace(  # no biases of attention, no scaled rope, another order of windows
    GPT_OSS,
    theirs={**GPT_OSS.theirs, "attention_bias": False, "layer_types": _THREE, "tie_word_embeddings": True},
    ours={
        **GPT_OSS.ours,
        "qkv_bias": False,
        "out_bias": False,
        "window_pattern": (LayerWindow.full, LayerWindow.full, LayerWindow.sliding),
        "rope_scaling": RopeScaling(),
        "tie_embeddings": True,
    },
    rope={},
)

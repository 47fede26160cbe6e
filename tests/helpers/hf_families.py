"""Published architectures, small, by name.

Importing it skips a test file where transformers is missing.
"""

from __future__ import annotations

from dataclasses import replace

from hf_deepseek import MODELS as DEEPSEEK_MODELS
from hf_family import Family, scaled
from hf_gemma import MODELS as GEMMA_MODELS
from hf_hybrid import MODELS
from hf_newer import (
    DOTS1,
    DOTS1_WINDOW,
    ERNIE4_5_MOE,
    ERNIE4_5_MOE_ALL,
    GLM4_MOE,
    GLM4_MOE_GROUPS,
    GPT_OSS,
    GPT_OSS_PLAIN,
    GRANITEMOE,
    GRANITEMOESHARED,
    HUNYUAN_V1_MOE,
    HUNYUAN_V1_MOE_ALPHA,
    MINIMAX_M2,
)

from moetrain.models.options import QKNorm
from moetrain.models.rope_options import RopeKind, RopeScaling
from moetrain.moe.options import Activation
from moetrain.moe.routers.topk import Score, TopKOptions

MIXTRAL = Family(
    "Mixtral",
    {"intermediate_size": 37, "num_local_experts": 7, "rms_norm_eps": 1e-5},
    {"d_ff_expert": 37, "norm_eps": 1e-5},
    TopKOptions(top_k=2, score=Score.softmax_after),
)
MIXTRAL_WINDOW = Family(
    "Mixtral", {**MIXTRAL.theirs, "sliding_window": 4}, {**MIXTRAL.ours, "sliding_window": 4}, MIXTRAL.router
)
QWEN3_MOE = Family(
    "Qwen3Moe",
    {
        "moe_intermediate_size": 23,
        "num_experts": 11,
        "num_experts_per_tok": 3,
        "norm_topk_prob": True,
        "rms_norm_eps": 1e-6,
    },
    {"num_experts": 11, "d_ff_expert": 23, "norm_eps": 1e-6, "qk_norm": QKNorm.head},
    TopKOptions(top_k=3, score=Score.softmax, renormalize=True),
)
QWEN3_MOE_MIXED = Family(  # the first layer dense, then every layer with an even number (from 1)
    "Qwen3Moe",
    {**QWEN3_MOE.theirs, "decoder_sparse_step": 2, "mlp_only_layers": [0], "intermediate_size": 41},
    {**QWEN3_MOE.ours, "moe_every": 2, "first_dense": 1, "d_ff": 41},
    QWEN3_MOE.router,
)
QWEN2_MOE = Family(
    "Qwen2Moe",
    {
        "moe_intermediate_size": 23,
        "shared_expert_intermediate_size": 19,
        "num_experts": 11,
        "num_experts_per_tok": 3,
        "norm_topk_prob": False,
        "rms_norm_eps": 1e-6,
    },
    {
        "num_experts": 11,
        "d_ff_expert": 23,
        "num_shared_experts": 1,
        "d_ff_shared": 19,
        "shared_gate": True,
        "norm_eps": 1e-6,
        "qkv_bias": True,
    },
    TopKOptions(top_k=3, score=Score.softmax, renormalize=False),
)
QWEN3_MOE_GELU = replace(
    QWEN3_MOE_MIXED, theirs={**QWEN3_MOE_MIXED.theirs, "hidden_act": "gelu"}, activation=Activation.geglu
)
QWEN2_MOE_MIXED = Family(
    "Qwen2Moe",
    {
        **QWEN2_MOE.theirs,
        "decoder_sparse_step": 2,
        "mlp_only_layers": [1],
        "intermediate_size": 41,
        "num_hidden_layers": 4,
    },
    {**QWEN2_MOE.ours, "moe_every": 2, "first_dense": 3, "d_ff": 41, "num_layers": 4},
    QWEN2_MOE.router,
)
OLMOE = Family(
    "Olmoe",
    {
        "hidden_size": 60,
        "head_dim": 10,
        "intermediate_size": 23,
        "num_experts": 11,
        "num_experts_per_tok": 3,
        "rms_norm_eps": 1e-5,
    },
    {
        "d_model": 60,
        "head_dim": None,
        "num_experts": 11,
        "d_ff_expert": 23,
        "norm_eps": 1e-5,
        "qk_norm": QKNorm.full,
    },
    TopKOptions(top_k=3, score=Score.softmax, renormalize=False),
)
LLAMA = Family(  # transformers wants heads that divide the width
    "Llama",
    {"hidden_size": 66, "intermediate_size": 41, "rms_norm_eps": 1e-5, "initializer_range": 0.1},
    {"d_model": 66, "d_ff": 41, "norm_eps": 1e-5},
)
LLAMA_TIED = Family(
    "Llama", {**LLAMA.theirs, "tie_word_embeddings": True}, {**LLAMA.ours, "tie_embeddings": True}
)
LLAMA_BIASED = replace(
    LLAMA,
    theirs={**LLAMA.theirs, "attention_bias": True, "mlp_bias": True},
    ours={**LLAMA.ours, "qkv_bias": True, "out_bias": True, "mlp_bias": True},
)
MISTRAL = Family(
    "Mistral",
    {"intermediate_size": 41, "rms_norm_eps": 1e-5, "sliding_window": None},
    {"d_ff": 41, "norm_eps": 1e-5},
)
MISTRAL_WINDOW = Family(
    "Mistral", {**MISTRAL.theirs, "sliding_window": 4}, {**MISTRAL.ours, "sliding_window": 4}
)
QWEN2 = Family(
    "Qwen2",
    {"intermediate_size": 41, "rms_norm_eps": 1e-6},
    {"d_ff": 41, "norm_eps": 1e-6, "qkv_bias": True},
)
QWEN2_TIED = Family(
    "Qwen2", {**QWEN2.theirs, "tie_word_embeddings": True}, {**QWEN2.ours, "tie_embeddings": True}
)
QWEN3 = Family(
    "Qwen3",
    {"intermediate_size": 41, "rms_norm_eps": 1e-6},
    {"d_ff": 41, "norm_eps": 1e-6, "qk_norm": QKNorm.head},
)
HYBRID = {name: Family(**case) for name, case in MODELS.items()}
GEMMA = {name: Family(**case) for name, case in GEMMA_MODELS.items()}
DEEPSEEK = {name: Family(*case) for name, case in DEEPSEEK_MODELS.items()}

SCALED = {
    "llama_linear": scaled(LLAMA, {}, RopeScaling(RopeKind.linear, 2.5)),
    "llama_llama3": scaled(
        LLAMA, {"low_freq_factor": 1.0, "high_freq_factor": 4.0}, RopeScaling(RopeKind.llama3, 8.0)
    ),
    "llama_tied_llama3": scaled(
        LLAMA_TIED,
        {"low_freq_factor": 0.5, "high_freq_factor": 3.0},
        RopeScaling(RopeKind.llama3, 3.0, low_freq_factor=0.5, high_freq_factor=3.0),
    ),
    "llama_yarn": scaled(LLAMA, {}, RopeScaling(RopeKind.yarn, 4.0)),
    "ernie4_5_moe_yarn": scaled(ERNIE4_5_MOE_ALL, {}, RopeScaling(RopeKind.yarn, 4.0)),
    "glm4_moe_yarn": scaled(
        replace(GLM4_MOE, ours={**GLM4_MOE.ours, "rope_fraction": 4 / 7}),
        {"partial_rotary_factor": 4 / 7},
        RopeScaling(RopeKind.yarn, 4.0),
    ),
    "qwen2_yarn": scaled(
        QWEN2,
        {"beta_fast": 4.0, "beta_slow": 0.25, "truncate": False, "attention_factor": 0.7},
        RopeScaling(RopeKind.yarn, 4.0, beta_fast=4.0, beta_slow=0.25, truncate=False, attention_factor=0.7),
    ),
    "deepseek_v2_yarn": scaled(
        DEEPSEEK["deepseek_v2_groups"],
        {"mscale": 0.707, "mscale_all_dim": 0.707},
        RopeScaling(RopeKind.yarn, 40.0, mscale=0.707, mscale_all_dim=0.707),
    ),
    "deepseek_v3_yarn": scaled(  # both betas as Kimi-K2 has them
        DEEPSEEK["deepseek_v3"],
        {"mscale": 1.0, "mscale_all_dim": 0.6, "beta_fast": 1.0, "beta_slow": 1.0},
        RopeScaling(RopeKind.yarn, 32.0, beta_fast=1.0, mscale=1.0, mscale_all_dim=0.6),
    ),
}
FAMILIES = {
    "mixtral": MIXTRAL,
    "mixtral_window": MIXTRAL_WINDOW,
    "qwen3_moe": QWEN3_MOE,
    "qwen3_moe_mixed": QWEN3_MOE_MIXED,
    "qwen3_moe_gelu": QWEN3_MOE_GELU,
    "qwen2_moe": QWEN2_MOE,
    "qwen2_moe_mixed": QWEN2_MOE_MIXED,
    "olmoe": OLMOE,
    "llama": LLAMA,
    "llama_tied": LLAMA_TIED,
    "llama_biased": LLAMA_BIASED,
    "mistral": MISTRAL,
    "mistral_window": MISTRAL_WINDOW,
    "qwen2": QWEN2,
    "qwen2_tied": QWEN2_TIED,
    "qwen3": QWEN3,
    **HYBRID,
    **GEMMA,
    "glm4_moe": GLM4_MOE,
    "glm4_moe_groups": GLM4_MOE_GROUPS,
    "minimax_m2": MINIMAX_M2,
    "dots1": DOTS1,
    "dots1_window": DOTS1_WINDOW,
    "ernie4_5_moe": ERNIE4_5_MOE,
    "gpt_oss": GPT_OSS,
    "gpt_oss_plain": GPT_OSS_PLAIN,
    **DEEPSEEK,
    "granitemoe": GRANITEMOE,
    "granitemoeshared": GRANITEMOESHARED,
    "hunyuan_v1_moe": HUNYUAN_V1_MOE,
    "hunyuan_v1_moe_alpha": HUNYUAN_V1_MOE_ALPHA,
    **SCALED,
}

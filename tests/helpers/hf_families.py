"""Published architectures, small: transformers' model and ours with the same weights.

Importing it skips a test file where transformers is missing. Shapes: B batch, S sequence, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from hf_deepseek import MODELS as DEEPSEEK_MODELS
from hf_hybrid import MODELS, slow_decay, wide
from hf_weights import from_hf
from torch import Tensor

from moetrain.models import Decoder
from moetrain.models.options import LayerWindow, ModelConfig, QKNorm
from moetrain.models.rope_options import RopeKind, RopeScaling
from moetrain.models.scale_options import ScalesConfig
from moetrain.moe.options import Activation, Backend, ExpertsConfig
from moetrain.moe.routers.topk import Score, TopKOptions

transformers = pytest.importorskip("transformers", reason="transformers is not installed (extra: hf)")

BATCH, SEQ, VOCAB = 3, 11, 97
_BIAS = ".e_score_correction_bias"
THETA = 5000.0
SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": 31,
    "head_dim": 14,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "pad_token_id": None,  # a padding token's embedding would get no gradient
    "eos_token_id": None,
}
OURS = {
    "d_model": 31,
    "head_dim": 14,
    "num_layers": 3,
    "num_heads": 6,
    "num_kv_heads": 2,
    "tie_embeddings": False,
    "rope_theta": THETA,
}


@dataclass(frozen=True)
class Family:
    """transformers' config and ours, less what all share. ``router`` None: a dense model."""

    name: str
    theirs: dict[str, Any]
    ours: dict[str, Any]
    router: TopKOptions | None = None
    activation: Activation = Activation.swiglu
    expert_bias: bool = False
    rope: dict[str, Any] = field(default_factory=dict)  # transformers' rope_parameters
    seq: int = SEQ
    config: str = ""  # of its class, where another name than the model's

    def their_model(self, dtype: torch.dtype) -> Any:
        """transformers' model with random weights, norms and biases included."""
        with wide(self.name, dtype):
            return self._their_model(dtype)

    def _their_model(self, dtype: torch.dtype) -> Any:
        torch.manual_seed(0)
        rope = {"rope_type": "default", "rope_theta": THETA, **self.rope}
        options = {"tie_word_embeddings": False, "initializer_range": 0.2, **SHAPE, **self.theirs}
        config = getattr(transformers, f"{self.config or self.name}Config")(**options, rope_parameters=rope)
        config._attn_implementation = config._experts_implementation = "eager"
        theirs = getattr(transformers, f"{self.name}ForCausalLM")(config).to(dtype)
        with torch.no_grad():
            for name, parameter in theirs.named_parameters():
                if parameter.ndim == 1:
                    parameter.add_(torch.rand_like(parameter) - 0.5)
                if name.endswith("proj_bias"):  # of experts; beyond the limit of a clamped activation, too
                    parameter.add_(16 * (torch.rand_like(parameter) - 0.5))
            slow_decay(theirs)
            for buffer in _biases(theirs).values():  # so that they change choices
                buffer.add_((torch.rand_like(buffer) - 0.5) * 0.4)
        return theirs

    def build(self, dtype: torch.dtype, backend: str = "loop") -> tuple[Any, Decoder]:
        theirs = self.their_model(dtype)
        cfg = ModelConfig(**{**OURS, "num_experts": 0 if self.router is None else 7, **self.ours})
        experts = ExpertsConfig(activation=self.activation, backend=Backend(backend), bias=self.expert_bias)
        ours = Decoder(cfg, self.router or TopKOptions(), experts, VOCAB).to(dtype)
        weights = dict(theirs.named_parameters())
        weights |= {name: bias.flatten() for name, bias in _biases(theirs).items()}
        missing, unexpected = ours.load_state_dict(from_hf(weights), strict=False)
        assert unexpected == []
        assert all(name.endswith("router.bias_E") for name in missing)
        return theirs, ours

    def batch(self) -> tuple[Tensor, Tensor]:
        """(ids, labels) [B, S]: a fifth of the labels ask for nothing."""
        generator = torch.Generator().manual_seed(1)
        ids = torch.randint(VOCAB, (BATCH, self.seq), generator=generator)
        return ids, ids.where(torch.rand(BATCH, self.seq, generator=generator) > 0.2, -100)


def _biases(theirs: Any) -> dict[str, Tensor]:
    """Those of routers' choices, which no gradient moves."""
    found = {**dict(theirs.named_buffers()), **dict(theirs.named_parameters())}
    return {name: tensor for name, tensor in found.items() if name.endswith(_BIAS)}


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
DEEPSEEK = {name: Family(*case) for name, case in DEEPSEEK_MODELS.items()}
LONG, ORIGINAL = 41, 29  # positions of a scaled rope: more than it was made for


def scaled(family: Family, theirs: dict[str, Any], ours: RopeScaling) -> Family:
    """The family with long sequences and a scaled rope; the original length is in neither argument."""
    rope = {"rope_type": ours.kind.name, "factor": ours.factor, **theirs}
    if ours.kind is not RopeKind.linear:
        rope["original_max_position_embeddings"] = ORIGINAL
        ours = replace(ours, original_max_positions=ORIGINAL)
    return replace(
        family,
        theirs={**family.theirs, "max_position_embeddings": int(ours.factor * ORIGINAL)},
        ours={**family.ours, "rope_scaling": ours},
        rope=rope,
        seq=LONG,
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

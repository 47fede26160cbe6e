"""Random models that a family has words for."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from hf_deepseek import specs as deepseek
from hf_gemma import specs as gemma
from hf_hybrid import hybrids
from hypothesis import strategies as st

from moetrain.models.hf import FAMILIES, ModelSpec
from moetrain.models.options import LayerWindow, ModelConfig, QKNorm
from moetrain.models.scale_options import ScalesConfig
from moetrain.moe.options import Activation, ExpertsConfig
from moetrain.moe.routers.topk import Score, TopKOptions

DENSE = ("llama", "mistral", "qwen2", "qwen3")
WRITTEN = [name for name in FAMILIES if name != "kimi_k2"]  # which goes out as deepseek_v3
QK_NORM = {
    "qwen3": QKNorm.head,
    "qwen3_moe": QKNorm.head,
    "olmoe": QKNorm.full,
    "minimax_m2": QKNorm.full,
    "dots1": QKNorm.head,
    "hunyuan_v1_moe": QKNorm.head_after_rope,
}
GEMMA_ACTIVATIONS = (Activation.swiglu, Activation.geglu_tanh)
HYBRID = ("qwen3_next", "qwen3_5_moe_text", "qwen3_5_text")
SIGMOID = ("dots1", "glm4_moe")
AS_DENSE = (  # one key says both widths
    *("mixtral", "olmoe", "minimax_m2", "hunyuan_v1_moe", "granitemoe", "granitemoeshared"),
)
SLIDING, FULL = LayerWindow
PATTERNS = ((), (SLIDING, FULL), (FULL, SLIDING), (SLIDING, SLIDING, FULL), (FULL, SLIDING, SLIDING, FULL))
WINDOWED = ("mistral", "mixtral", "qwen2", "qwen3", "qwen2_moe", "qwen3_moe", "dots1")


@st.composite
def sigmoid_specs(draw: st.DrawFn, name: str, keys: dict[str, Any], experts: ExpertsConfig) -> ModelSpec:
    """Those of DeepSeek-V3's kind of MoE layer."""
    keys["first_dense"] = draw(st.integers(0, keys["num_layers"] - 1))
    keys["num_shared_experts"] = draw(st.integers(1, 3))
    groups = draw(st.integers(1, 2)) if keys["num_experts"] > 1 else 1  # of two experts or more
    keys["num_experts"] *= groups
    limit = draw(st.integers(1, groups))
    router = TopKOptions(
        top_k=draw(st.integers(1, limit * keys["num_experts"] // groups)),
        score=Score.sigmoid,
        renormalize=draw(st.booleans()),
        route_scale=draw(st.sampled_from([1.0, 2.5])),
        num_groups=groups,
        top_groups=limit,
    )
    if name == "glm4_moe":
        keys["qk_norm"] = draw(st.sampled_from([QKNorm.none, QKNorm.head]))
        keys["rope_fraction"] = draw(st.sampled_from([0.5, 1.0])) if keys["head_dim"] % 4 == 0 else 1.0
    keys["qkv_bias"] = draw(st.booleans())
    keys["out_bias"] = name == "dots1" and keys["qkv_bias"]
    return ModelSpec(ModelConfig(**keys), router, experts)


@st.composite
def specs(draw: st.DrawFn, name: str) -> ModelSpec:
    """A random model that the family ``name`` expresses."""
    kv_heads = draw(st.integers(1, 3))
    layers = draw(st.integers(1, 5))
    keys: dict[str, Any] = {
        "vocab_size": draw(st.integers(1, 19)),
        "d_model": draw(st.integers(1, 23)),
        "num_layers": layers,
        "num_heads": kv_heads * draw(st.integers(1, 3)),
        "num_kv_heads": kv_heads,
        "head_dim": 2 * draw(st.integers(1, 4)),
        "d_ff": draw(st.integers(1, 29)),
        "num_experts": 0,
        "qk_norm": QK_NORM.get(name, QKNorm.none),
        "qkv_bias": name == "qwen2" or (name == "qwen2_moe" and draw(st.booleans())),
        "sliding_window": draw(st.none() | st.integers(1, 9)) if name in WINDOWED else None,
        "rope_theta": draw(st.sampled_from([10000.0, 1e6])),
        "norm_eps": draw(st.sampled_from([1e-5, 1e-6])),
        "tie_embeddings": draw(st.booleans()),
    }
    activations = [Activation.swiglu, *([] if name in HYBRID else [Activation.geglu])]
    experts = ExpertsConfig(activation=draw(st.sampled_from(activations)))
    if name.startswith("deepseek"):
        return ModelSpec(*draw(deepseek(name, keys)), experts)
    if name == "llama":
        keys["qkv_bias"] = keys["out_bias"] = draw(st.booleans())
        keys["mlp_bias"] = draw(st.booleans())
    if name == "gemma3_text":
        model = ModelConfig(**draw(gemma(keys)))
        return ModelSpec(model, experts=replace(experts, activation=draw(st.sampled_from(GEMMA_ACTIVATIONS))))
    if name == "qwen3_5_text":
        return ModelSpec(ModelConfig(**keys | draw(hybrids(layers))), experts=experts)
    if name in DENSE:
        return ModelSpec(ModelConfig(**keys), experts=experts)
    keys["num_experts"] = draw(st.integers(1, 5))
    keys["d_ff_expert"] = keys["d_ff"] if name in AS_DENSE else draw(st.integers(1, 13))
    if name in SIGMOID:
        return draw(sigmoid_specs(name, keys, experts))
    if name in ("qwen2_moe", "qwen3_moe", "ernie4_5_moe", "qwen3_next"):
        keys["moe_every"] = every = draw(st.integers(1, min(3, layers)))
        keys["first_dense"] = draw(st.integers(0, layers // every * every - 1))  # at least the last is MoE
    if name in HYBRID:
        keys |= draw(hybrids(layers))
    if name == "qwen3_5_moe_text":
        keys["d_ff"] = keys["d_ff_expert"]
    if name in ("qwen2_moe", *HYBRID):
        keys |= {"num_shared_experts": 1, "d_ff_shared": draw(st.integers(1, 17)), "shared_gate": True}
    top_k = draw(st.integers(1, keys["num_experts"]))
    router = TopKOptions(
        top_k=top_k,
        score=Score.softmax,
        renormalize=name in ("ernie4_5_moe", "hunyuan_v1_moe") or (name != "mixtral" and draw(st.booleans())),
    )
    if name == "qwen3_5_moe_text":
        router = replace(router, renormalize=True)
    if name == "hunyuan_v1_moe":
        keys["qkv_bias"] = keys["out_bias"] = draw(st.booleans())
        keys["num_shared_experts"] = 1
    if name == "ernie4_5_moe":
        keys |= {"num_shared_experts": draw(st.integers(0, 3)), "rope_interleaved": True}
    if name in ("granitemoe", "granitemoeshared"):
        keys["qkv_bias"] = keys["out_bias"] = draw(st.booleans())
        keys["scales"] = ScalesConfig(*draw(st.sampled_from([(1.0, 0.3, 0.1, 2.0), (12.0, 1.0, 1.0, 1.0)])))
    if name == "granitemoeshared" and draw(st.booleans()):
        keys |= {"num_shared_experts": 1, "d_ff_shared": draw(st.integers(1, 17))}
    if name in ("mixtral", "granitemoe", "granitemoeshared"):
        router = TopKOptions(top_k=top_k, score=Score.softmax_after)
    if name == "minimax_m2":
        keys["rope_fraction"] = draw(st.sampled_from([0.5, 1.0])) if keys["head_dim"] % 4 == 0 else 1.0
        router = TopKOptions(top_k=top_k, score=Score.sigmoid)
    if name == "gpt_oss":
        keys["d_ff_expert"], keys["attention_sinks"] = keys["d_ff"], True
        keys["qkv_bias"] = keys["out_bias"] = draw(st.booleans())
        keys["sliding_window"] = draw(st.none() | st.integers(1, 9))
        fitting = [pattern for pattern in PATTERNS if len(pattern) <= layers]
        keys["window_pattern"] = draw(st.sampled_from(fitting)) if keys["sliding_window"] else ()
        router = TopKOptions(top_k=top_k, score=Score.softmax_after, logit_bias=True)
        experts = ExpertsConfig(activation=Activation.swiglu_clamped, bias=True)
    return ModelSpec(ModelConfig(**keys), router, experts)

"""The keys of ``config.json`` that DeepSeek's models share: latent attention, and what their own code reads.

Writing raises CannotExpressError where the model does what they have no key for.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from moetrain.models.attention import OWN_ATTENTION
from moetrain.models.hf.family import ModelSpec
from moetrain.models.hf.fields import Fields
from moetrain.models.hf.translate import SHARED, read_decoder, require, write_decoder
from moetrain.models.latent_options import LatentConfig
from moetrain.models.options import LATENT, ModelConfig

FUTURE = "num_nextn_predict_layers"  # layers after the last, which predict further tokens
DEFAULTS = SHARED | {
    "first_k_dense_replace": 0,
    "kv_lora_rank": 512,
    "n_shared_experts": 2,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
}
_NORM_EPS = LatentConfig.norm_eps  # whatever rms_norm_eps is


def read_latent_decoder(fields: Fields, version: int, interleaved: bool, **own: Any) -> ModelConfig:
    """A decoder of latent attention; ``own`` are the keys of ModelConfig that its layers add.

    ``version``: of DeepSeek's own code, which the config may name and which computes the same.
    """
    name = f"DeepseekV{version}"
    code = {
        "AutoConfig": f"configuration_deepseek.{name}Config",
        "AutoModel": f"modeling_deepseek.{name}Model",
        "AutoModelForCausalLM": f"modeling_deepseek.{name}ForCausalLM",
    }
    fields.must_be("auto_map", None, code)
    fields.must_be("moe_layer_freq", 1)
    fields.must_be("ep_size", 1, None)  # how their code lays experts out
    fields.without_effect("aux_loss_alpha", "seq_aux")  # losses of training, options of balance here
    heads = fields.integer("num_attention_heads")
    if (found := fields.integer_or_none("num_key_value_heads")) not in (None, heads):
        raise fields.refuse(
            f"num_key_value_heads={found} with num_attention_heads={heads}: latent attention has as many"
        )
    latent = LatentConfig(
        q_lora_rank=fields.integer_or_none("q_lora_rank"),
        kv_lora_rank=fields.integer("kv_lora_rank"),
        qk_nope_head_dim=fields.integer("qk_nope_head_dim"),
        qk_rope_head_dim=fields.integer("qk_rope_head_dim"),
        v_head_dim=fields.integer("v_head_dim"),
        norm_eps=_NORM_EPS,
    )
    # transformers writes them, and takes the former's word for the width that turns
    fields.must_be("head_dim", latent.qk_rope_head_dim)
    fields.must_be("qk_head_dim", latent.qk_nope_head_dim + latent.qk_rope_head_dim)
    return read_decoder(
        fields,
        attention=LATENT,
        latent=latent,
        rope_interleaved=interleaved,
        num_kv_heads=None,
        head_dim=None,
        **own,
    )


def write_latent_decoder(spec: ModelSpec) -> dict[str, Any]:
    """The inverse of :func:`read_latent_decoder`, but for the order in which elements turn."""
    m = spec.model
    require("model.attention", m.attention, LATENT)
    require("model.sliding_window", m.sliding_window, None)
    require("model.latent.norm_eps", m.latent.norm_eps, _NORM_EPS)
    width = m.latent.qk_rope_head_dim
    plain = replace(m, attention=OWN_ATTENTION, latent=LatentConfig(), head_dim=width, num_kv_heads=None)
    return write_decoder(replace(spec, model=plain), own=("rope_interleaved",)) | {
        "attention_bias": False,
        "q_lora_rank": m.latent.q_lora_rank,
        "kv_lora_rank": m.latent.kv_lora_rank,
        "qk_nope_head_dim": m.latent.qk_nope_head_dim,
        "qk_rope_head_dim": width,
        "v_head_dim": m.latent.v_head_dim,
        "moe_layer_freq": 1,
    }

"""The keys of ``config.json`` that DeepSeek's models share: latent attention, and which layers have experts.

Writing raises CannotExpressError where the model does what they have no key for.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from moetrain.models.attention import OWN_ATTENTION
from moetrain.models.hf.family import CannotExpressError, ModelSpec
from moetrain.models.hf.fields import Fields
from moetrain.models.hf.tables import MoENames
from moetrain.models.hf.translate import SHARED, read_decoder, read_num_experts, require, write_decoder
from moetrain.models.latent_options import LatentConfig
from moetrain.models.options import LATENT, ModelConfig

NAMES = MoENames(shared="mlp.shared_experts")
DEFAULTS = SHARED | {
    "first_k_dense_replace": 0,
    "kv_lora_rank": 512,
    "n_shared_experts": 2,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
}
_CODE = "DeepseekV{0}"
_NORM_EPS = 1e-6  # of the latent vectors' norms, whatever rms_norm_eps is


def read_latent_decoder(
    fields: Fields, version: int, experts_alias: str, rope_interleave: bool
) -> ModelConfig:
    """A decoder of latent attention, its first layers dense, and shared experts without a gate in the others.

    ``version``: of DeepSeek's code that the config may name, which computes the same.
    """
    fields.must_be("auto_map", None, *_code(version))
    fields.must_be("moe_layer_freq", 1)
    fields.must_be("ep_size", 1, None)  # how their code lays experts out
    fields.without_effect("num_nextn_predict_layers", "num_mtp_layers")  # of layers beyond the decoder's
    # losses of training, which are options of balance here
    fields.without_effect("aux_loss_alpha", "seq_aux")
    layers = fields.layers()
    dense = fields.integer("first_k_dense_replace")
    if not 0 <= dense < layers:
        raise fields.refuse(f"first_k_dense_replace={dense} leaves none of the {layers} layers with experts")
    experts = read_num_experts(fields, "n_routed_experts", experts_alias)
    shared = fields.integer("n_shared_experts")
    if experts < 1 or shared < 1:
        raise fields.refuse(f"n_routed_experts={experts} and n_shared_experts={shared} must be 1 or more")
    latent = LatentConfig(
        q_lora_rank=fields.integer_or_none("q_lora_rank"),
        kv_lora_rank=fields.integer("kv_lora_rank"),
        qk_nope_head_dim=fields.integer("qk_nope_head_dim"),
        qk_rope_head_dim=fields.integer("qk_rope_head_dim"),
        v_head_dim=fields.integer("v_head_dim"),
        rope_interleave=rope_interleave,
        norm_eps=_NORM_EPS,
    )
    # transformers writes them, and takes the former's word for the width that turns
    fields.must_be("head_dim", latent.qk_rope_head_dim)
    fields.must_be("qk_head_dim", latent.qk_nope_head_dim + latent.qk_rope_head_dim)
    return read_decoder(
        fields,
        attention=LATENT,
        latent=latent,
        num_kv_heads=_kv_heads(fields),
        head_dim=None,
        num_experts=experts,
        d_ff_expert=fields.integer("moe_intermediate_size"),
        num_shared_experts=shared,
        first_dense=dense,
    )


def _kv_heads(fields: Fields) -> None:
    """As many as of queries: their class has no other model, though the key is there."""
    heads, found = fields.integer("num_attention_heads"), fields.integer_or_none("num_key_value_heads")
    if found not in (None, heads):
        raise fields.refuse(
            f"num_key_value_heads={found} with num_attention_heads={heads}: latent attention has as many"
        )


def _code(version: int) -> list[dict[str, str]]:
    """What ``auto_map`` says where DeepSeek's own code lies beside the weights."""
    name = _CODE.format(version)
    whole = {
        "AutoConfig": f"configuration_deepseek.{name}Config",
        "AutoModel": f"modeling_deepseek.{name}Model",
        "AutoModelForCausalLM": f"modeling_deepseek.{name}ForCausalLM",
    }
    return [whole]


def write_latent_decoder(spec: ModelSpec) -> dict[str, Any]:
    """The inverse of :func:`read_latent_decoder`, but for ``rope_interleave``."""
    m = spec.model
    require("model.attention", m.attention, LATENT)
    require("model.sliding_window", m.sliding_window, None)
    if not m.num_experts:
        raise CannotExpressError("model.num_experts=0, and it has experts")
    require("model.moe_every", m.moe_every, 1)
    require("model.shared_gate", m.shared_gate, False)
    shared, left = divmod(m.shared_width, m.d_ff_expert)
    if left or not shared:
        raise CannotExpressError(
            f"its shared experts have {m.shared_width} hidden units together, and it has one or more as wide "
            f"as model.d_ff_expert={m.d_ff_expert}"
        )
    require("model.latent.norm_eps", m.latent.norm_eps, _NORM_EPS)
    width = m.latent.qk_rope_head_dim
    plain = replace(m, attention=OWN_ATTENTION, latent=LatentConfig(), head_dim=width)
    return write_decoder(replace(spec, model=plain)) | {
        "num_key_value_heads": m.num_heads,
        "attention_bias": False,
        "q_lora_rank": m.latent.q_lora_rank,
        "kv_lora_rank": m.latent.kv_lora_rank,
        "qk_nope_head_dim": m.latent.qk_nope_head_dim,
        "qk_rope_head_dim": width,
        "v_head_dim": m.latent.v_head_dim,
        "n_routed_experts": m.num_experts,
        "n_shared_experts": shared,
        "moe_intermediate_size": m.d_ff_expert,
        "first_k_dense_replace": m.first_dense,
        "moe_layer_freq": 1,
    }

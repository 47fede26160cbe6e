"""Every key of a ``config.json`` is used, known to change nothing, or refused.

Used is what a family asks its :class:`Fields` for. ``ONLY`` are keys of which one value (or none) stands for
what is computed here, in any family. ``HARMLESS`` are those by which transformers computes nothing in a
decoder's forward pass. Any other key could stand for another function, unless it says null, false or nothing.
"""

from __future__ import annotations

from typing import Any

from moetrain.errors import quoted
from moetrain.models.hf.fields import Fields

# key -> the values under which nothing is different; keys that a family uses itself are left to it
ONLY: dict[str, tuple[Any, ...]] = {
    # other weights than the files', or other code than transformers' own
    "quantization_config": (None,),
    "compression_config": (None,),
    "transformers_weights": (None, "model.safetensors"),
    "auto_map": (None,),
    "pruned_heads": (None, {}),
    # attention
    "attention_bias": (False,),
    "bias": (False,),
    "use_bias": (False,),
    "qkv_bias": (False,),
    "is_causal": (True,),
    "causal": (True,),
    "use_causal_mask": (True,),
    "use_bidirectional_attention": (False, None),
    "attention_chunk_size": (None,),
    "attn_logit_softcapping": (None,),
    "attention_multiplier": (None,),
    "query_pre_attn_scalar": (None,),
    "scale_attn_weights": (True,),
    "clip_qkv": (None,),
    "use_qk_norm": (False,),
    "qk_layernorm": (False,),
    "no_rope_layers": (None, []),
    "alibi": (False,),
    "add_cross_attention": (False,),
    "is_encoder_decoder": (False,),
    # rotation
    "rope_interleaved": (False,),
    "rotary_pct": (1.0,),
    "rotary_dim": (None,),
    "rope_local_base_freq": (None,),
    # the rest of a layer
    "mlp_bias": (False,),
    "parallel_attn": (False,),
    "use_parallel_residual": (False,),
    "residual_multiplier": (1.0,),
    "embedding_multiplier": (1.0,),
    "scale_emb": (1.0,),
    "scale_depth": (None,),
    "layer_norm_eps": (None,),
    "per_layer_config": (None, {}),
    # the head
    "logit_scale": (None, 1.0),
    "logits_scaling": (1.0,),
    "final_logit_softcapping": (None,),
    # experts
    "num_nextn_predict_layers": (0, None),
    "n_shared_experts": (0, None),
    "first_k_dense_replace": (0, None),
    "routed_scaling_factor": (1.0,),
    "router_jitter_noise": (0.0, None),
}
_HARMLESS = """
what the file is:
    model_type architectures transformers_version torch_dtype dtype name_or_path model_name license
    library_name finetuning_task task_specific_params custom_pipelines transformers.js_config is_llama_config
    unsloth_version unsloth_fixed
lengths and tokens:
    max_position_embeddings max_sequence_length model_max_length seq_length n_positions
    tokenizer_class tokenizer_model_max_length prefix original_vocab_size
training, of which dropouts act there alone and are none here, and whose losses are the config's own:
    attention_dropout hidden_dropout hidden_dropout_prob resid_pdrop embd_pdrop attention_probs_dropout_prob
    classifier_dropout initializer_range initializer_factor router_aux_loss_coef output_router_logits
    gradient_checkpointing neftune_noise_alpha
how it is computed or returned, not what:
    use_cache pretraining_tp chunk_size_feed_forward output_attentions output_hidden_states return_dict
    torchscript use_bfloat16 tie_last_hidden_states attn_implementation experts_implementation tf_legacy_loss
    tie_encoder_decoder is_decoder tp_plan cache_implementation cross_attention_hidden_size use_flash_attn
other heads:
    num_labels id2label label2id problem_type
generation:
    assistant_confidence_threshold assistant_lookbehind bad_words_ids begin_suppress_tokens diversity_penalty
    do_sample early_stopping encoder_no_repeat_ngram_size encoder_repetition_penalty epsilon_cutoff eta_cutoff
    exponential_decay_length_penalty length_penalty max_length max_new_tokens min_length min_new_tokens min_p
    no_repeat_ngram_size num_assistant_tokens num_assistant_tokens_schedule num_beam_groups num_beams
    num_return_sequences output_scores remove_invalid_values repetition_penalty return_dict_in_generate
    suppress_tokens target_lookbehind temperature top_k top_p typical_p
"""
HARMLESS = frozenset(key for line in _HARMLESS.splitlines() if not line.endswith(":") for key in line.split())
_HARMLESS_ENDS = ("_token_id", "_token_ids", "_token_index")


def check_keys(fields: Fields, model_type: str) -> None:
    """Raises UserError for the first key that is neither used nor known to change nothing."""
    for key, value in fields.unused().items():
        if key in ONLY:
            fields.must_be(key, *ONLY[key])
        elif not (_harmless(key) or _says_nothing(value)):
            raise fields.refuse(
                f"{key}={quoted(value)} is not known here, and another function may stand behind it: remove "
                f"the key if transformers' {model_type} does not read it"
            )


def _harmless(key: str) -> bool:
    return key in HARMLESS or key.startswith("_") or key.endswith(_HARMLESS_ENDS)


def _says_nothing(value: object) -> bool:
    return value is None or value is False or value in ("", [], {})

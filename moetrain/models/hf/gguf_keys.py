"""Every key of a GGUF file's metadata is used, known to change nothing, or refused.

What llama.cpp computes of a key is the measure (src/llama-hparams, llama-vocab); names: gguf/constants.py.
"""

from __future__ import annotations

import re
from typing import Any

ARCHITECTURE = "llama"
# of the architecture: what gguf.py and gguf_rope.py read
_USED = (
    *("block_count", "context_length", "embedding_length", "feed_forward_length", "vocab_size"),
    *("attention.head_count", "attention.head_count_kv", "attention.key_length", "attention.value_length"),
    *("attention.layer_norm_rms_epsilon", "rope.dimension_count", "rope.freq_base", "rope.scaling.type"),
    *("rope.scaling.factor", "rope.scale_linear", "rope.scaling.original_context_length"),
)
_HARMLESS = (  # of another norm, of other scalings, and of experts that are not there
    *("attention.layer_norm_epsilon", "expert_used_count", "rope.scaling.finetuned"),
    *("rope.scaling.yarn_beta_fast", "rope.scaling.yarn_beta_slow", "rope.scaling.yarn_ext_factor"),
    *("rope.scaling.yarn_attn_factor", "rope.scaling.yarn_log_multiplier"),
)
_ONLY: dict[str, tuple[Any, ...]] = {  # the values under which a key of the architecture changes nothing
    "expert_count": (0,),
    "attention.causal": (True,),
    "attention.sliding_window": (0,),
    "attention.scale": (0.0,),
    "attention.max_alibi_bias": (0.0,),
    "attention.clamp_kqv": (0.0,),
    "attention.output_scale": (0.0, 1.0),
    "rope.scaling.attn_factor": (1.0,),
    "rope.scaling.alpha": (0.0, 1.0),
    "attn_logit_softcapping": (0.0,),
    "final_logit_softcapping": (0.0,),
    "logit_scale": (0.0, 1.0),
    "residual_scale": (0.0, 1.0),
    "embedding_scale": (0.0, 1.0),
    "use_parallel_residual": (False,),
    "pooling_type": (0,),
}
_ELSEWHERE: dict[str, tuple[Any, ...]] = {
    "general.type": ("model",),
    "split.count": (0, 1),
    "split.no": (0,),
    "tokenizer.ggml.add_space_prefix": (False,),
    "tokenizer.ggml.remove_extra_whitespaces": (False,),
}
_DESCRIPTION = re.compile(  # of the file, of sampling, of how it was quantised, and of single tokens
    r"general\..*|quantize\.imatrix\..*|imatrix\..*|split\.tensors\.count"
    r"|tokenizer\.chat_templates?(\..*)?|tokenizer\.ggml\.(\w+_token_id|add_(bos|eos|sep)_token|scores)"
    r"|tokenizer\.ggml\.(model|pre|tokens|token_type|token_type_count|merges|added_tokens)"
    r"|tokenizer\.huggingface\.json"
)


def unknown_key(metadata: dict[str, Any]) -> tuple[str, str] | None:
    """The first key that may stand for another function, and what is supported; None where all is well."""
    for key, value in metadata.items():
        own = key.removeprefix(f"{ARCHITECTURE}.") if key.startswith(f"{ARCHITECTURE}.") else None
        if own is not None and (own in _USED or own in _HARMLESS):
            continue
        allowed = _ELSEWHERE.get(key) if own is None else _ONLY.get(own)
        if allowed is None and own is None and _DESCRIPTION.fullmatch(key):
            continue
        if allowed is None:
            return key, "the key is not known here, and another function may stand behind it"
        if not any(value == one and isinstance(value, bool) == isinstance(one, bool) for one in allowed):
            return key, f"only {allowed[0]!r} is supported"
    return None

"""Gemma 3's language model, small: transformers' keys and ours; and random ones."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

from moetrain.models.options import LayerWindow, QKNorm
from moetrain.models.rope_options import RopeKind, RopeScaling
from moetrain.models.scale_options import ScalesConfig
from moetrain.moe.options import Activation

SLIDING, FULL = LayerWindow
_LOCAL, _GLOBAL = "sliding_attention", "full_attention"
_WIDTH = 30  # transformers wants heads that divide it
_THEIRS = {
    "hidden_size": _WIDTH,
    "intermediate_size": 41,
    "rms_norm_eps": 1e-5,
    "sliding_window": 5,
    "layer_types": [_LOCAL, _GLOBAL, _LOCAL],
    "query_pre_attn_scalar": 19,
    "tie_word_embeddings": True,
}
_OURS = {
    "d_model": _WIDTH,
    "d_ff": 41,
    "norm_eps": 1e-5,
    "qk_norm": QKNorm.head,
    "sliding_window": 5,
    "window_pattern": (SLIDING, FULL),
    "rope_theta": 70.0,
    "window_rope_theta": 9.0,
    "rope_scaling": RopeScaling(RopeKind.linear, 8.0),
    "zero_centered_norms": True,
    "sandwich_norms": True,
    "scales": ScalesConfig(embedding=_WIDTH**0.5, attention=19**-0.5, round_embedding=True),
    "tie_embeddings": True,
}
_ROPES = {
    _GLOBAL: {"rope_type": "linear", "factor": 8.0, "rope_theta": 70.0},
    _LOCAL: {"rope_type": "default", "rope_theta": 9.0},
}
_PLAIN = {
    "layer_types": [_GLOBAL, _LOCAL, _LOCAL],
    "query_pre_attn_scalar": 14,
    "attention_bias": True,
    "hidden_activation": "silu",
    "tie_word_embeddings": False,
}
_PLAIN_OURS = {
    "window_pattern": (FULL, SLIDING, SLIDING),
    "rope_scaling": RopeScaling(),
    "scales": ScalesConfig(embedding=_WIDTH**0.5, round_embedding=True),
    "qkv_bias": True,
    "out_bias": True,
    "tie_embeddings": False,
}
# name -> what hf_families.Family takes
MODELS: dict[str, dict[str, Any]] = {
    "gemma3_text": {
        "name": "Gemma3",
        "config": "Gemma3Text",
        "theirs": _THEIRS,
        "ours": _OURS,
        "rope": _ROPES,
        "activation": Activation.geglu_tanh,
        "seq": 41,
    },
    "gemma3_text_plain": {  # biases, another activation, no head's scale of its own, untied
        "name": "Gemma3",
        "config": "Gemma3Text",
        "theirs": {**_THEIRS, **_PLAIN},
        "ours": {**_OURS, **_PLAIN_OURS},
        "rope": _ROPES | {_GLOBAL: {"rope_type": "default", "rope_theta": 70.0}},
    },
}


@st.composite
def specs(draw: st.DrawFn, keys: dict[str, Any]) -> dict[str, Any]:
    """Keys of a random decoder of this family, of those that all share."""
    layers, heads = keys["num_layers"], keys["num_heads"]
    width = heads * draw(st.integers(1, 4))
    scalar = draw(st.sampled_from([None, 3, 168]))
    if scalar == keys["head_dim"]:
        scalar = None
    attention = None if scalar is None else scalar**-0.5
    fitting = [
        pattern for pattern in ((), (SLIDING, FULL), (FULL, SLIDING, SLIDING)) if len(pattern) <= layers
    ]
    window = draw(st.none() | st.integers(1, 9))
    pattern = draw(st.sampled_from(fitting)) if window else ()
    scales = ScalesConfig(embedding=width**0.5, attention=attention, round_embedding=width != 1)
    biased = draw(st.booleans())
    keys = keys | {
        "d_model": width, "qk_norm": QKNorm.head, "zero_centered_norms": True, "sandwich_norms": True,
        "scales": scales, "sliding_window": window, "window_pattern": pattern, "qkv_bias": biased,
        "out_bias": biased,
    }  # fmt: skip
    if pattern and draw(st.booleans()):
        keys |= {"window_rope_theta": 500.0}
    if (pattern and "window_rope_theta" in keys) or not window:
        scaling = draw(st.sampled_from([RopeScaling(), RopeScaling(RopeKind.linear, 8.0)]))
        keys |= {"rope_scaling": scaling}
    return keys

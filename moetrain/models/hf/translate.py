"""The keys of ``config.json`` that families share, read into ours and written back.

Writing raises CannotExpressError where the model does what the family has no key for.
"""

from __future__ import annotations

from collections.abc import Container
from typing import Any

from moetrain.bounds import check_ranges
from moetrain.errors import UserError, quoted
from moetrain.models.attention import head_shape
from moetrain.models.hf.family import CannotExpressError, ModelSpec
from moetrain.models.hf.fields import Fields
from moetrain.models.hf.rope import THETA, read_rope, write_rope
from moetrain.models.options import LATENT, ModelConfig, QKNorm
from moetrain.models.rules import check_heads
from moetrain.models.scale_options import ScalesConfig
from moetrain.moe.options import Activation, ExpertsConfig
from moetrain.moe.routers.sigmoid import SigmoidOptions
from moetrain.moe.routers.topk import Score, TopKOptions

SHARED = {  # what all of transformers' classes here take for a key that is absent
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": THETA,
    "tie_word_embeddings": False,
}
_ACTIVATIONS = {
    "silu": Activation.swiglu,
    "gelu": Activation.geglu,
    "relu": Activation.reglu,
    "gelu_pytorch_tanh": Activation.geglu_tanh,
}
# what few families have words for, who name it as their own
_OTHERWISE = (
    *("mlp_bias", "out_bias", "attention_sinks", "window_pattern", "rope_fraction", "rope_interleaved"),
    *("attention", "attention_pattern", "attention_gate", "zero_centered_norms"),
    *("sandwich_norms", "window_rope_theta"),
)


def read_decoder(
    fields: Fields,
    partial_rope: float | None = None,
    alpha_rope: bool = False,
    rope: dict[str, Any] | None = None,
    **own: Any,
) -> ModelConfig:
    """What all families share; ``own`` are the keys of ModelConfig that this one adds.

    ``partial_rope``: its ``partial_rotary_factor`` where none is said; None: a head turns as a whole.
    ``alpha_rope``: whether it knows a dynamic scaling by a fixed ``alpha``. ``rope``: what it has read itself
    of rotation.
    """
    if not {"window_pattern", "attention_pattern"} & own.keys():
        layer_types(fields)  # those of all layers alike
    shared: dict[str, Any] = {
        "vocab_size": fields.integer("vocab_size"),
        "d_model": fields.integer("hidden_size"),
        "num_layers": fields.layers(),
        "num_heads": fields.integer("num_attention_heads"),
        "num_kv_heads": fields.integer_or_none("num_key_value_heads"),
        "head_dim": fields.integer_or_none("head_dim"),
        "d_ff": own["d_ff"] if "d_ff" in own else fields.integer("intermediate_size"),
        "norm_eps": fields.number("rms_norm_eps"),
        "tie_embeddings": fields.flag("tie_word_embeddings", False),
        "init_std": fields.number("initializer_range") if fields.has("initializer_range") else 0.02,
        "num_experts": 0,
    }
    latent, width = own.get("attention") == LATENT, _head_dim(fields) if alpha_rope else None
    rope = read_rope(fields, partial_rope, latent, width) if rope is None else rope
    cfg = ModelConfig(**shared | rope | own)
    try:
        check_ranges(cfg, "model")
        check_heads(cfg)
    except UserError as error:
        raise fields.refuse(str(error)) from None
    return cfg


def _head_dim(fields: Fields) -> int:
    width, heads = fields.integer_or_none("head_dim"), fields.integer("num_attention_heads")
    return width if width is not None else fields.integer("hidden_size") // max(heads, 1)


def read_experts(fields: Fields, key: str = "hidden_act") -> ExpertsConfig:
    """``key``: what the family calls it."""
    name = fields.get(key)
    if not isinstance(name, str) or name not in _ACTIVATIONS:
        raise fields.refuse(f"{key}={quoted(name)} is not supported: {', '.join(_ACTIVATIONS)} are")
    return ExpertsConfig(activation=_ACTIVATIONS[name])


def read_num_experts(fields: Fields, key: str, alias: str) -> int:
    """The number under ``key``, or under ``alias``, which transformers takes for the same attribute."""
    found = [fields.integer(name) for name in (key, alias) if fields.has(name)]
    if len(set(found)) > 1:
        raise fields.refuse(f"{key}={found[0]}, but {alias}={found[1]}: one of the two is wrong")
    return found[0] if found else fields.integer(key)


def write_decoder(
    spec: ModelSpec, qk_norm: QKNorm = QKNorm.none, qkv_bias: bool = False, own: Container[str] = ()
) -> dict[str, Any]:
    """What all share. ``qk_norm``, ``qkv_bias``: what the family does. ``own``: keys that it writes itself.

    Raises CannotExpressError where the model does otherwise.
    """
    m = spec.model
    heads, kv_heads, width = head_shape(m)
    require("model.qk_norm", m.qk_norm.name, qk_norm.name)
    require("model.qkv_bias", m.qkv_bias, qkv_bias)
    require("model.lora.rank", m.lora.rank, None)
    for key in _OTHERWISE:
        if key not in own:
            require(f"model.{key}", getattr(m, key), getattr(ModelConfig, key))
    require("experts.bias", spec.experts.bias, False)
    for key, value in vars(ScalesConfig()).items() if "scales" not in own else ():
        require(f"model.scales.{key}", getattr(m.scales, key), value)
    activations = {ours: theirs for theirs, ours in _ACTIVATIONS.items()}
    if spec.experts.activation not in activations:
        known = ", ".join(ours.name for ours in activations)
        raise CannotExpressError(f"experts.activation={spec.experts.activation.name} is none of {known}")
    return {
        "vocab_size": spec.vocab_size,
        "hidden_size": m.d_model,
        "num_hidden_layers": m.num_layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": width,
        "intermediate_size": m.d_ff,
        "hidden_act": activations[spec.experts.activation],
        "rms_norm_eps": m.norm_eps,
        "tie_word_embeddings": m.tie_embeddings,
        "initializer_range": m.init_std,
        **write_rope(m),
    }


def read_topk(fields: Fields, renormalize: bool) -> TopKOptions:
    """A softmax over all experts, the best chosen; ``renormalize``: their weights sum to 1."""
    top_k = fields.integer("num_experts_per_tok")
    return TopKOptions(top_k=top_k, score=Score.softmax, renormalize=renormalize)


def write_topk(spec: ModelSpec) -> tuple[int, bool]:
    """(experts a token, whether their weights sum to 1). Raises CannotExpressError for any other router."""
    router = check_router(spec)
    if router.score is Score.sigmoid:
        raise CannotExpressError("router.score=sigmoid")
    require("router.route_scale", router.route_scale, 1.0)
    require("router.logit_bias", router.logit_bias, False)
    if router.top_groups not in (None, router.num_groups):
        raise CannotExpressError(f"router.top_groups={router.top_groups} limits the choice to groups")
    top_k = min(2, spec.model.num_experts) if router.top_k is None else router.top_k
    return top_k, router.renormalize or router.score is Score.softmax_after


def check_router(spec: ModelSpec) -> TopKOptions:
    """The options of a top-k router of networks, without a capacity. CannotExpressError for another."""
    router = spec.router
    require("experts.kind", spec.experts.kind.name, "networks")
    if type(router) not in (TopKOptions, SigmoidOptions):
        raise CannotExpressError(f"router={router.name} is not the top-k router")
    assert isinstance(router, TopKOptions)
    require("router.eval_capacity_factor", router.eval_capacity_factor, None)
    require("router.permutation_steps", router.permutation_steps, None)
    return router


def require(key: str, value: Any, wanted: Any) -> None:
    """Raises CannotExpressError unless a key has the one value that the family stands for."""
    if value != wanted:
        raise CannotExpressError(f"{key}={value}, and it has only {wanted}")


def require_dense(spec: ModelSpec) -> None:
    require("model.num_experts", spec.model.num_experts, 0)


def require_all_moe(spec: ModelSpec, shared: bool = False) -> None:
    """Every layer is MoE; no shared expert unless the family has one."""
    if not spec.model.num_experts:
        raise CannotExpressError("model.num_experts=0, and it has experts")
    require("model.moe_every", spec.model.moe_every, 1)
    require("model.first_dense", spec.model.first_dense, 0)
    if not shared:
        require("model.num_shared_experts", spec.model.num_shared_experts, 0)


def shared_number(m: ModelConfig) -> int:
    """How many shared experts without a gate there are, each as wide as the others.

    Raises CannotExpressError where they have a gate or another width.
    """
    require("model.shared_gate", m.shared_gate, False)
    if m.shared_width % m.d_ff_expert:
        raise CannotExpressError(
            f"model.d_ff_shared={m.shared_width}, and its shared experts are each as wide as "
            f"model.d_ff_expert={m.d_ff_expert}"
        )
    return m.shared_width // m.d_ff_expert


def layer_types(fields: Fields) -> str | None:
    """What every layer attends to by the list of transformers 5, None where there is no list."""
    found = fields.get("layer_types") if fields.has("layer_types") else None
    if found is None:
        return None
    if not isinstance(found, list) or not all(isinstance(kind, str) for kind in found):
        raise fields.refuse(f"layer_types is {quoted(found)}, not a list of names")
    kinds = set(found)
    if len(kinds) > 1 or kinds - {"full_attention", "sliding_attention"}:
        raise fields.refuse(
            f"layer_types names {quoted(', '.join(sorted(kinds)))}: only full_attention in all layers is "
            "supported, or sliding_attention in all"
        )
    if len(found) != fields.layers():
        raise fields.refuse(f"layer_types names {len(found)} layers of {fields.layers()}")
    return kinds.pop() if kinds else None


def window(fields: Fields, key: str = "sliding_window") -> int | None:
    """A width of one token or more, or none."""
    width = fields.integer_or_none(key)
    if width is not None and width < 1:
        raise fields.refuse(f"{key}={width} must be 1 or more, or null")
    return width


def window_or_none(fields: Fields, on: bool | None = None) -> int | None:
    """Qwen's window: off unless ``use_sliding_window``, and on the layers that ``layer_types`` names.

    Without that list it is on the layers from ``max_window_layers`` on. ``on``: what counts instead of the
    key.
    """
    fields.without_effect("sliding_window", "max_window_layers")  # unless they are asked for below
    kind, keyed = layer_types(fields), on is None
    on = fields.flag("use_sliding_window", False) if on is None else on
    if kind == "sliding_attention" and not on:
        off = "use_sliding_window is false" if keyed else "sliding_window is null"
        raise fields.refuse(f"layer_types says sliding_attention, but {off}")
    if not on or kind == "full_attention":
        return None
    if kind == "sliding_attention":
        return window(fields)
    first, layers = fields.integer("max_window_layers"), fields.layers()
    if 0 < first < layers:
        raise fields.refuse(
            f"max_window_layers={first} gives a sliding window to some of the {layers} layers only, "
            "which is not supported"
        )
    return window(fields) if first <= 0 else None


def write_window(cfg: ModelConfig) -> dict[str, Any]:
    """The inverse of :func:`window_or_none`."""
    on = cfg.sliding_window is not None
    return {
        "use_sliding_window": on,
        "sliding_window": cfg.sliding_window,
        "max_window_layers": 0 if on else cfg.num_layers,
        "layer_types": ["sliding_attention" if on else "full_attention"] * cfg.num_layers,
    }


def read_sparse_layers(fields: Fields) -> dict[str, Any]:
    """``moe_every`` and ``first_dense`` of Qwen's ``decoder_sparse_step`` and ``mlp_only_layers``."""
    layers, step = fields.layers(), fields.integer("decoder_sparse_step")
    listed = fields.get("mlp_only_layers") if fields.has("mlp_only_layers") else None
    dense = [] if listed is None else listed
    if step < 1 or not isinstance(dense, list) or not all(type(layer) is int for layer in dense):
        raise fields.refuse(
            f"decoder_sparse_step={step} with mlp_only_layers={quoted(dense)} names no layers"
        )
    left_out = set(dense)
    moe = [i for i in range(layers) if i not in left_out and (i + 1) % step == 0]
    first = moe[0] if moe else layers
    if moe != [i for i in range(first, layers) if (i + 1) % step == 0]:
        raise fields.refuse(
            f"mlp_only_layers={quoted(dense)}: only the first layers can be dense besides the step's"
        )
    return {"moe_every": step, "first_dense": 0 if first < step else first}


def write_sparse_layers(cfg: ModelConfig) -> dict[str, Any]:
    dense = [i for i in range(cfg.first_dense) if (i + 1) % cfg.moe_every == 0]
    return {"decoder_sparse_step": cfg.moe_every, "mlp_only_layers": dense}

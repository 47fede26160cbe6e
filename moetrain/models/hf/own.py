"""The family ``moetrain``: any model, by code of its own that is written beside the weights (``remote/``).

transformers runs that code only with ``trust_remote_code=True``. What a router does in evaluation its options
say, in words that ``remote/routing_moetrain.py`` acts on (``RouterConfig.evaluation_rule``).
"""

from __future__ import annotations

import json
from collections.abc import Container
from dataclasses import asdict, dataclass, replace
from dataclasses import fields as dataclass_fields
from enum import Enum
from pathlib import Path
from typing import Any

import torch

from moetrain.errors import quoted
from moetrain.files import parse_json
from moetrain.models.decoder import Decoder
from moetrain.models.hf.family import CannotExpressError, Family, ModelSpec, register_family
from moetrain.models.hf.fields import Fields
from moetrain.models.hf.pieces import Piece, Table, Tiled
from moetrain.models.hf.translate import read_decoder, require, write_decoder
from moetrain.models.hf.windows import read_windows, write_windows
from moetrain.models.options import LayerWindow, QKNorm
from moetrain.models.scale_options import ScalesConfig
from moetrain.moe.options import Activation, ExpertKind, ExpertsConfig, RouterConfig
from moetrain.moe.routers import ROUTERS, build_router, full_options
from moetrain.moe.routers.topk import TopKOptions

_CODE = tuple(
    Path(__file__).parent / "remote" / f"{name}_moetrain.py"
    for name in ("configuration", "modeling", "routing")
)
_AUTO = {
    "AutoConfig": "configuration_moetrain.MoetrainConfig",
    "AutoModelForCausalLM": "modeling_moetrain.MoetrainForCausalLM",
}
_FORMAT = 2  # 1 had gate and up, and queries, keys and values, in one matrix each
# keys that it writes itself, and folders of before have not
_OWN = ("window_pattern", "window_rope_theta", "zero_centered_norms", "sandwich_norms", "scales")
_OUTER = {"embed_VD": "embed_tokens.weight", "head_VD": "lm_head.weight"}


def exported_routers() -> list[str]:
    """The routers that say what they do in evaluation."""
    return [name for name, spec in ROUTERS.items() if spec.exported]


def _write(spec: ModelSpec) -> dict[str, Any]:
    m = spec.model
    common = replace(spec, experts=replace(spec.experts, activation=Activation.swiglu))
    written = write_decoder(common, qk_norm=m.qk_norm, qkv_bias=m.qkv_bias, own=_OWN)
    del written["hidden_act"]
    adapters = spec.experts.kind is ExpertKind.adapters
    return written | _write_routing(spec) | {
        "auto_map": _AUTO,
        "weights_format": _FORMAT,
        "activation": spec.experts.activation.name,
        "qk_norm": m.qk_norm.name,
        "qkv_bias": m.qkv_bias,
        **(write_windows(m, None) if m.window_pattern else {"sliding_window": m.sliding_window}),
        "window_rope_theta": m.window_rope_theta,
        "zero_centered_norms": m.zero_centered_norms,
        "sandwich_norms": m.sandwich_norms,
        "scales": asdict(m.scales),
        "num_experts": m.num_experts,
        "expert_kind": spec.experts.kind.name,
        "moe_intermediate_size": m.d_ff_expert,
        "moe_every": m.moe_every,
        "first_dense": m.first_dense,
        "num_shared_experts": m.num_shared_experts,
        "shared_expert_intermediate_size": m.d_ff if adapters else m.shared_width,
        "shared_gate": m.shared_gate,
    }  # fmt: skip


def _write_routing(spec: ModelSpec) -> dict[str, Any]:
    """``router``: all options, so that the model can be read back; ``routing``: what acts in evaluation."""
    if not spec.model.num_experts:
        return {"router": None, "routing": None}
    if spec.experts.kind is ExpertKind.low_rank:
        raise CannotExpressError("expert_kind=low_rank has no products in it: export with merge=true")
    options = spec.router
    if not ROUTERS[options.name].exported:
        raise CannotExpressError(
            f"router={options.name} is not among the exported: {', '.join(exported_routers())}"
        )
    require("router.eval_capacity_factor", options.eval_capacity_factor, None)
    require("router.permutation_steps", options.permutation_steps, None)
    options = full_options(options)
    plain = {key: v.name if isinstance(v, Enum) else v for key, v in asdict(options).items()}
    if (rule := options.evaluation_rule(spec.model.num_experts)) is None:
        raise CannotExpressError(f"router={options.name} with these options has no rule that is exported")
    return {"router": plain, "routing": rule}


def _read(fields: Fields) -> ModelSpec:
    shared = fields.integer("num_shared_experts")
    fields.without_effect("shared_expert_intermediate_size")  # where there are none
    model = read_decoder(
        fields,
        qk_norm=_enum(fields, "qk_norm", QKNorm),
        qkv_bias=fields.flag("qkv_bias", False),
        **_read_windows(fields),
        window_rope_theta=_number_or_none(fields, "window_rope_theta"),
        zero_centered_norms=fields.flag("zero_centered_norms", False),
        sandwich_norms=fields.flag("sandwich_norms", False),
        scales=_read_scales(fields),
        num_experts=fields.integer("num_experts"),
        d_ff_expert=fields.integer("moe_intermediate_size"),
        moe_every=fields.integer("moe_every"),
        first_dense=fields.integer("first_dense"),
        num_shared_experts=shared,
        d_ff_shared=fields.integer("shared_expert_intermediate_size") if shared else None,
        shared_gate=fields.flag("shared_gate", False),
    )
    kind, activation = _enum(fields, "expert_kind", ExpertKind), _enum(fields, "activation", Activation)
    experts = ExpertsConfig(kind=kind, activation=activation)
    spec = ModelSpec(model, _read_router(fields, model.num_experts), experts)
    fields.must_be("auto_map", _AUTO)
    if (found := fields.integer_or_none("weights_format") or 1) != _FORMAT:
        raise fields.refuse(f"its weights are in format {found}, and this moetrain reads format {_FORMAT}")
    try:
        routing = _write_routing(spec)["routing"]
    except CannotExpressError as error:
        raise fields.refuse(str(error)) from None
    fields.must_be("routing", routing)  # which transformers goes by
    return spec


def _read_windows(fields: Fields) -> dict[str, Any]:
    """Without a list, all layers have it, or none."""
    none = fields.integer_or_none("sliding_window") is None
    usual = LayerWindow.full if none else LayerWindow.sliding
    return {"window_pattern": (), **read_windows(fields, lambda layer: usual)}


def _number_or_none(fields: Fields, key: str) -> float | None:
    return fields.number(key) if fields.has(key) and fields.get(key) is not None else None


def _read_scales(fields: Fields) -> ScalesConfig:
    given = fields.get("scales") if fields.has("scales") else {}
    if not isinstance(given, dict):
        raise fields.refuse(f"scales is {quoted(given)}, not an object")
    inner = Fields(given, f"{fields.where}: scales", asdict(ScalesConfig()))
    found = ScalesConfig(
        embedding=inner.number("embedding"),
        residual=inner.number("residual"),
        attention=_number_or_none(inner, "attention"),
        logits_divisor=inner.number("logits_divisor"),
        round_embedding=inner.flag("round_embedding"),
    )
    if unknown := sorted(inner.unused()):
        raise inner.refuse(f"{unknown[0]} is not known")
    return found


def _read_router(fields: Fields, num_experts: int) -> RouterConfig:
    """Raises UserError unless ``router`` holds options of a router, each of its type."""
    given = fields.get("router")
    if not num_experts:
        return TopKOptions()
    fields.check_plain("router", given)
    name = given.get("name") if isinstance(given, dict) else None
    if not isinstance(name, str) or name not in exported_routers():
        raise fields.refuse(f"router={quoted(given)} is not among {', '.join(exported_routers())}")
    options = ROUTERS[name].options
    if unknown := sorted(given.keys() - {field.name for field in dataclass_fields(options)}):
        raise fields.refuse(f"router: {name} has no option {unknown[0]}")
    try:
        chosen: RouterConfig = parse_json(json.dumps(given), options, f"{fields.where}: router")
        with torch.device("meta"):
            build_router(name, d_model=1, num_experts=num_experts, options=chosen)
    except (ValueError, TypeError, RuntimeError) as error:
        raise fields.refuse(f"router: {error}") from None
    return chosen


def _enum(fields: Fields, key: str, kind: Any) -> Any:
    name = fields.get(key)
    if not isinstance(name, str) or name not in kind.__members__:
        raise fields.refuse(f"{key}={quoted(name)} is not supported: {', '.join(kind.__members__)} are")
    return kind[name]


@dataclass(frozen=True)
class _Own(Family):
    def table(self, spec: ModelSpec) -> Table:
        """Every tensor as it is."""
        with torch.device("meta"):
            model = Decoder(spec.model, spec.router, spec.experts, spec.vocab_size)
        shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        return {
            name: Tiled(shape, (Piece.whole(_their_name(name, shapes), shape),))
            for name, shape in shapes.items()
        }


def _their_name(name: str, names: Container[str]) -> str:
    """Ours, but for what transformers looks for by name, and for the network that adapters share."""
    module, _, leaf = name.rpartition(".")
    if leaf.startswith("w_") and f"{module}.router.bias_E" in names:
        return f"{module}.shared.{leaf}"
    return _OUTER.get(name, name)


register_family(_Own("moetrain", "MoetrainForCausalLM", _read, _write, code=_CODE))

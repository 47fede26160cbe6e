"""What the layers of this folder refuse alike."""

from __future__ import annotations

from torch import Tensor

from moetrain.models.options import ModelConfig
from moetrain.moe import RouterContext
from moetrain.moe.options import ExpertKind, ExpertsConfig, FirstWeights
from moetrain.ops.activations import is_gated


def refuse_unread(cfg: ModelConfig, experts: ExpertsConfig) -> None:
    """ValueError for an option of dispatched experts that such a layer does not read."""
    for key, value, unset in (
        ("model.num_shared_experts", cfg.num_shared_experts, 0),
        ("experts.kind", experts.kind, ExpertKind.networks),
        ("experts.bias", experts.bias, False),
        ("experts.first_weights", experts.first_weights, FirstWeights.model),
        ("experts.frozen", experts.frozen, 0),
        ("experts.max_rows_per_rank", experts.max_rows_per_rank, None),
    ):
        if value != unset:
            shown, default = _shown(value), _shown(unset)
            raise ValueError(
                f"{key}={shown} is of dispatched experts, which it has none of: set {key}={default}"
            )


def _shown(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return "null" if value is None else str(getattr(value, "name", value))


def plain_activation(experts: ExpertsConfig) -> str:
    """The experts' activation; ValueError for a gated one, which has no place in a layer without a gate."""
    name = experts.activation.value
    if is_gated(name):
        raise ValueError(
            f"experts.activation={name} is gated, and its experts have no gate: take relu or gelu"
        )
    return name


def context_of(x_BSD: Tensor, ctx: RouterContext | None) -> RouterContext:
    """``ctx``, or that of a call that gives none."""
    batch, seq, _ = x_BSD.shape
    return RouterContext.default(batch, seq, x_BSD.device) if ctx is None else ctx

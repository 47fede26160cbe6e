"""Layers that predict further tokens, in families' own names.

transformers' classes leave these tensors out, so that names and function are those of what serves them:
vLLM (``deepseek_mtp.py``, ``glm4_moe_mtp.py``, ``qwen3_next_mtp.py``, ``qwen3_5_mtp.py``) and FastDeploy
(``ernie4_5_mtp.py``). There the matrix that joins the two streams reads the embedding first, and then the
state after the last norm.

Shapes: D model, C = 2 D.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from moetrain.models.future_options import FutureConfig
from moetrain.models.hf.pieces import Piece, Table, Tiled
from moetrain.models.options import ModelConfig, future_layers


@dataclass(frozen=True)
class FutureNames:
    """What a family calls such a layer. ``{}`` is its number: its place after the decoder's layers where
    ``by_place``, else from 0.

    ``block``: how the names of its attention and feed-forward layer begin. ``norm``: of what it makes; None:
    the decoder's last norm. ``embedding``, ``head``: copies of the decoder's own that files may have, and an
    export writes. ``dense``: its feed-forward layer is, whatever the decoder's are. ``most``: as many layers
    have names. ``key``: the key of config.json that tells their number.
    """

    block: str
    token_norm: str
    hidden_norm: str
    join: str
    norm: str | None = None
    embedding: str | None = None
    head: str | None = None
    by_place: bool = False
    dense: bool = False
    most: int | None = None
    key: str | None = None

    def options(self, layers: int, cfg: ModelConfig) -> FutureConfig:
        """``model.future`` of ``layers`` such layers."""
        return FutureConfig(layers, self.dense and cfg.num_experts > 0, self.norm is None)

    def number(self, cfg: ModelConfig, layer: int) -> int:
        """The number in the names of the layer at place ``layer``."""
        return layer if self.by_place else layer - cfg.num_layers


# DeepSeek-V3's, whose names GLM-4.5 took over
BY_PLACE = FutureNames(
    block="model.layers.{}.",
    token_norm="model.layers.{}.enorm.weight",
    hidden_norm="model.layers.{}.hnorm.weight",
    join="model.layers.{}.eh_proj.weight",
    norm="model.layers.{}.shared_head.norm.weight",
    embedding="model.layers.{}.embed_tokens.weight",
    head="model.layers.{}.shared_head.head.weight",
    by_place=True,
    key="num_nextn_predict_layers",
)


def block_names(cfg: ModelConfig, names: FutureNames | None, layer: int) -> str:
    """How their names of a layer's tensors begin."""
    if names is None or layer < cfg.num_layers:
        return f"model.layers.{layer}."
    return names.block.format(names.number(cfg, layer))


def joins(cfg: ModelConfig, names: FutureNames | None) -> Table:
    """What such layers have besides a block's tensors."""
    if names is None:
        return {}
    vector, matrix = (cfg.d_model,), (cfg.d_model, 2 * cfg.d_model)
    parts = {
        "join.token_norm.weight_D": (names.token_norm, vector),
        "join.hidden_norm.weight_D": (names.hidden_norm, vector),
        "join.w_join_DC": (names.join, matrix),
    }
    if names.norm is not None:
        parts["norm.weight_D"] = (names.norm, vector)
    return {
        f"blocks.{layer}.{ours}": Tiled(shape, (Piece.whole(name.format(names.number(cfg, layer)), shape),))
        for layer in future_layers(cfg)
        for ours, (name, shape) in parts.items()
    }


def copies(cfg: ModelConfig, names: FutureNames | None) -> dict[str, str]:
    """Their names of copies -> our name of what is copied."""
    if names is None:
        return {}
    head = "embed_VD" if cfg.tie_embeddings else "head_VD"
    found = {names.embedding: "embed_VD", names.head: head}
    return {
        name.format(names.number(cfg, layer)): ours
        for layer in future_layers(cfg)
        for name, ours in found.items()
        if name is not None
    }


def with_layers(cfg: ModelConfig, names: FutureNames, layers: int) -> ModelConfig:
    """``cfg`` with so many such layers."""
    return replace(cfg, future=names.options(layers, cfg))


def refusal(cfg: ModelConfig, names: FutureNames | None) -> str | None:
    """Why the family has no words for the model's layers that predict further tokens; None where it has."""
    layers, key = cfg.future.layers, f"model.future.layers={cfg.future.layers}"
    if not layers:
        return None
    if names is None or (names.most is not None and layers > names.most):
        most = 0 if names is None else names.most
        return f"{key}, and it has {'no such layers' if not most else f'{most} at most'}"
    if cfg.future != (wanted := names.options(layers, cfg)):
        return f"model.future is {cfg.future}, and it has only {wanted}"
    return None

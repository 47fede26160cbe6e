"""Rules about what ``model.attention`` and ``model.feed_forward`` build."""

from __future__ import annotations

import torch
from torch import nn

from moetrain.config.rules.balance import OWN, refuse_controllers, refuse_losses
from moetrain.errors import UserError
from moetrain.models.attention import ATTENTIONS, OWN_ATTENTION, build_attention
from moetrain.models.feed_forward import ALIKE, FEED_FORWARDS, WithoutDispatch, build_feed_forward
from moetrain.models.options import attention_kinds, attention_of, moe_layers
from moetrain.models.wiring_rules import beyond_families
from moetrain.moe import MoELayer
from moetrain.moe.routers import Router, full_options
from moetrain.nearest import nearest
from moetrain.ops.rows import is_row_table
from moetrain.parallel.rules import check_layer
from moetrain.train.optim.options import Tables
from moetrain.train.options import TrainConfig


def feed_forward_is_known(cfg: TrainConfig) -> None:
    if (name := cfg.model.feed_forward) not in FEED_FORWARDS:
        raise UserError(
            f"model.feed_forward={name} is not known{nearest(name, FEED_FORWARDS)}; a plugin's layer needs "
            "plugins=[package] on the command line"
        )
    if name == "dense" and cfg.model.num_experts:
        raise UserError(
            f"model.feed_forward=dense has no experts, but model.num_experts={cfg.model.num_experts}: "
            "set model.num_experts=0 for a dense model"
        )


def attention_is_known(cfg: TrainConfig) -> None:
    if (name := cfg.model.attention) not in ATTENTIONS:
        raise UserError(
            f"model.attention={name} is not known{nearest(name, ATTENTIONS)}; a plugin's attention needs "
            "plugins=[package] on the command line, and a backend's name belongs in model.attention_backend"
        )
    for name in cfg.model.attention_pattern:
        if name not in ATTENTIONS:
            raise UserError(
                f"model.attention_pattern: {name} is not known{nearest(name, ATTENTIONS)}; a plugin's "
                "attention needs plugins=[package] on the command line"
            )


def attention_accepts_its_options(cfg: TrainConfig) -> None:
    """What a plug-in's builder refuses of any layer; without memory."""
    if attention_kinds(cfg.model) == [OWN_ATTENTION]:
        return
    for place in range(cfg.model.num_layers):
        try:
            with torch.device("meta"):
                build_attention(cfg.model, place)
        except ValueError as e:
            name = attention_of(cfg.model, place)
            raise UserError(f"model.attention={name}: layer {place}: {e}") from e


def layers_accept_their_options(cfg: TrainConfig) -> None:
    """What a builder refuses, and what the layout asks of each layer of a plug-in; without memory."""
    m = cfg.model
    alike = m.feed_forward in ALIKE and not (m.layer_experts or m.expert_widths)
    own = m.feed_forward == OWN and alike
    places = moe_layers(m)
    if not places:
        _refuse_tables(cfg, found=False)
    routers: list[Router] = []
    for place in places[:1] if alike else places:
        where = f"model.feed_forward={m.feed_forward}: layer {place}"
        try:
            with torch.device("meta"):
                made = build_feed_forward(m.feed_forward, m, cfg.router, cfg.experts, place)
        except ValueError as e:
            raise UserError(f"{where}: {e}") from e
        _refuse_tables(cfg, any(is_row_table(parameter) for parameter in made.parameters()))
        if own:  # its router, losses and layout have rules of their own
            return
        _refuse_for(made, cfg, where)
        found = [module for module in made.modules() if isinstance(module, Router)]
        routers += found
        for router in found:
            refuse_losses(cfg.balance, router, f"{where}: ")
        for layer in (module for module in made.modules() if isinstance(module, MoELayer)):
            check_layer(cfg.parallel, layer.experts.num_experts, where, layer.slices is not None)
    refuse_controllers(cfg.balance, routers, f"model.feed_forward={m.feed_forward}: ")


def _refuse_tables(cfg: TrainConfig, found: bool) -> None:
    if (tables := cfg.optim.tables) is not Tables.elementwise and not found:
        raise UserError(
            f"optim.tables={tables.name} is of tables whose rows are looked up, and "
            f"model.feed_forward={cfg.model.feed_forward} has none: set optim.tables=elementwise"
        )


def _refuse_for(layer: nn.Module, cfg: TrainConfig, where: str) -> None:
    ep, why = cfg.parallel.ep, getattr(layer, "refuses_ep", None)
    if ep > 1 and isinstance(why, str):
        raise UserError(f"{where} {why}, so it has no use for parallel.ep={ep}: set parallel.ep=1")
    named = [loss.name for loss in cfg.balance.losses] + list(cfg.balance.controllers)
    if named and isinstance(layer, WithoutDispatch) and not layer.tells:
        raise UserError(f"{where} tells nothing of a routing that {named[0]} could balance: set balance=none")


def feed_forward_is_own(cfg: TrainConfig) -> None:
    """What upcycling fills are the tensors of our own layers, in plain blocks."""
    if key := beyond_families(cfg.model):
        raise UserError(f"{key}: upcycling makes plain blocks of equal layers only; leave it out")
    if layers := cfg.model.future.layers:
        raise UserError(
            f"model.future.layers={layers}: upcycling fills the decoder's own layers only; leave it out"
        )
    router = full_options(cfg.router)
    for key, biased in (
        ("experts.bias", cfg.experts.bias),
        ("router.logit_bias", getattr(router, "logit_bias", False)),
    ):
        if biased:
            raise UserError(f"{key}=true: upcycling fills matrices only; set {key}=false")
    if (kinds := attention_kinds(cfg.model)) != [OWN_ATTENTION]:
        raise UserError(
            f"upcycling copies attentions of {OWN_ATTENTION} only, and the model's are {', '.join(kinds)}"
        )
    if cfg.model.feed_forward != OWN:
        raise UserError(
            f"model.feed_forward={cfg.model.feed_forward}: upcycling makes model.feed_forward={OWN} only"
        )

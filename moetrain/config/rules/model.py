"""Rules about the model, the router and the experts."""

from __future__ import annotations

import re

from moetrain.arithmetic import divisor_near
from moetrain.config.rules.router import router_accepts_its_options
from moetrain.data.options import TokenizerKind
from moetrain.errors import UserError
from moetrain.models.options import ModelConfig
from moetrain.moe.options import Repair
from moetrain.train.options import TrainConfig

_BYTES_VOCAB = 257  # 256 bytes and the end-of-text token


def heads_divide_width(cfg: TrainConfig, world: int) -> None:
    m = cfg.model
    if m.head_dim is None and m.d_model % m.num_heads:
        raise UserError(
            f"model.num_heads={m.num_heads} does not divide model.d_model={m.d_model}: "
            f"take {divisor_near(m.d_model, m.num_heads)} heads, or set model.head_dim"
        )


def head_dim_is_even(cfg: TrainConfig, world: int) -> None:
    """RoPE turns pairs of elements."""
    m = cfg.model
    head_dim = m.head_dim if m.head_dim is not None else m.d_model // m.num_heads
    if head_dim % 2:
        made = (
            "" if m.head_dim is not None else f" = model.d_model={m.d_model} / model.num_heads={m.num_heads}"
        )
        raise UserError(f"model.head_dim={head_dim}{made} must be even: RoPE turns pairs of elements")


def kv_heads_divide_heads(cfg: TrainConfig, world: int) -> None:
    m = cfg.model
    if m.num_kv_heads is not None and m.num_heads % m.num_kv_heads:
        raise UserError(
            f"model.num_kv_heads={m.num_kv_heads} does not divide model.num_heads={m.num_heads}: "
            f"take {divisor_near(m.num_heads, m.num_kv_heads)}"
        )


def first_dense_fits(cfg: TrainConfig, world: int) -> None:
    m = cfg.model
    if m.first_dense > m.num_layers:
        raise UserError(f"model.first_dense={m.first_dense} exceeds model.num_layers={m.num_layers}")


def moe_layers_exist(cfg: TrainConfig, world: int) -> None:
    """Experts that no layer uses are a mistake; a dense model says ``num_experts=0``."""
    m = cfg.model
    if m.num_experts and not _moe_layers(m):
        raise UserError(
            f"model.num_experts={m.num_experts}, but model.moe_every={m.moe_every} and "
            f"model.first_dense={m.first_dense} leave none of the {m.num_layers} layers MoE: "
            "lower them, or set model.num_experts=0 for a dense model"
        )


def shared_experts_exist(cfg: TrainConfig, world: int) -> None:
    """Their options would seem to have an effect."""
    m = cfg.model
    for name, given in (("d_ff_shared", m.d_ff_shared is not None), ("shared_gate", m.shared_gate)):
        if given and not m.num_shared_experts:
            raise UserError(
                f"model.{name}={getattr(m, name)} is of shared experts, but model.num_shared_experts=0: "
                "leave it out, or set model.num_shared_experts=1"
            )


def vocabulary_is_large_enough(cfg: TrainConfig, world: int) -> None:
    """A tokenizer from a file is measured when the data are prepared."""
    tokenizer, vocab_size = cfg.data.tokenizer, cfg.model.vocab_size
    needed = {TokenizerKind.bytes: _BYTES_VOCAB, TokenizerKind.bpe: tokenizer.vocab_size}.get(tokenizer.kind)
    if vocab_size is not None and needed is not None and vocab_size < needed:
        raise UserError(
            f"model.vocab_size={vocab_size} is smaller than the tokenizer's {needed} "
            f"(data.tokenizer.kind={tokenizer.kind.name}): raise it, or set model.vocab_size=null"
        )


def routing_group_divides_micro_batch(cfg: TrainConfig, world: int) -> None:
    group, micro = cfg.router.group, cfg.train.micro_batch_size
    if group == "sequence":
        return
    if group == "all":
        share = cfg.train.global_batch_tokens // (cfg.data.seq_len * world)
        if share > micro:
            raise UserError(
                f"router.group=all couples the tokens of a step, so each rank must take its share at once: "
                f"train.micro_batch_size={micro}, but the share is {share} sequences; "
                f"set train.micro_batch_size={share}, or a smaller train.global_batch_tokens"
            )
        return
    if not re.fullmatch("0*[1-9][0-9]{0,9}", group):
        raise UserError(f"router.group={group} must be sequence, all, or a number of sequences from 1 up")
    if micro % int(group):
        raise UserError(
            f"router.group={group} does not divide train.micro_batch_size={micro}: "
            f"a routing group lies in one micro-batch; take {divisor_near(micro, int(group))}"
        )


def _moe_layers(m: ModelConfig) -> int:
    """How many there are of the layers l from first_dense on with (l + 1) % moe_every == 0."""
    return max(0, m.num_layers // m.moe_every - m.first_dense // m.moe_every)


def router_is_causal(cfg: TrainConfig) -> str | None:
    """A warning: what a router that looks ahead means for the losses that are printed."""
    from moetrain.moe.routers import ROUTERS

    if ROUTERS[cfg.router.name].cls.causal or not cfg.model.num_experts:
        return None
    return (
        f"router={cfg.router.name} is not causal: in training a token's experts depend on later tokens, so "
        "train/loss is too low for a language model; val/loss is of the causal way that evaluation takes"
    )


def repair_looks_ahead(cfg: TrainConfig) -> str | None:
    """A warning: a place that a later token leaves free, or takes, decides where a repair sends a token."""
    router = cfg.router
    if router.repair not in (Repair.next_expert, Repair.fill_in) or not cfg.model.num_experts:
        return None
    limits = {"train/loss": router.capacity_factor, "val/loss": router.eval_capacity_factor}
    losses = " and ".join(key for key, factor in limits.items() if factor is not None)
    return (
        f"router.repair={router.repair.name} looks ahead: a token's experts depend on later tokens of its "
        f"routing group, so {losses} can be too low for a language model; router.repair=local does not"
    )


RULES = (
    heads_divide_width,
    head_dim_is_even,
    kv_heads_divide_heads,
    first_dense_fits,
    moe_layers_exist,
    shared_experts_exist,
    vocabulary_is_large_enough,
    router_accepts_its_options,
    routing_group_divides_micro_batch,
)
STORED_RULES = (  # of a model that was made before, whatever it was made for
    heads_divide_width,
    head_dim_is_even,
    kv_heads_divide_heads,
    first_dense_fits,
    router_accepts_its_options,
)
WARNINGS = (router_is_causal, repair_looks_ahead)

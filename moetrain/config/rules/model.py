"""Rules about a model together with its text, its router and its micro-batches."""

from __future__ import annotations

import re

from moetrain.arithmetic import divisor_near
from moetrain.config.rules.router import built_router
from moetrain.data.options import TokenizerKind
from moetrain.errors import UserError
from moetrain.moe.options import Repair, Rounding
from moetrain.moe.routers import ROUTERS
from moetrain.train.options import TrainConfig

_BYTES_VOCAB = 257  # 256 bytes and the end-of-text token


def vocabulary_is_large_enough(cfg: TrainConfig) -> None:
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


def router_is_causal(cfg: TrainConfig) -> str | None:
    """A warning: what a router that looks ahead means for the losses that are printed."""
    if ROUTERS[cfg.router.name].cls.causal or not cfg.model.num_experts:
        return None
    return (
        f"router={cfg.router.name} is not causal: in training a token's experts depend on later tokens, so "
        "train/loss is too low for a language model; val/loss is of the causal way that evaluation takes"
    )


def repair_looks_ahead(cfg: TrainConfig) -> str | None:
    """A warning: a place that a later token leaves free, or takes, decides where a repair sends a token."""
    router = cfg.router
    if router.repair in (Repair.none, Repair.local) or not cfg.model.num_experts:
        return None
    limits = {"train/loss": router.capacity_factor, "val/loss": router.eval_capacity_factor}
    losses = " and ".join(key for key, factor in limits.items() if factor is not None)
    return (
        f"router.repair={router.repair.name} looks ahead: a token's experts depend on later tokens of its "
        f"routing group, so {losses} can be too low for a language model; router.repair=local does not"
    )


def rounding_looks_ahead(cfg: TrainConfig) -> str | None:
    """A warning: whether a token stays with an expert depends on later ones; and what a large tile does."""
    rule, tile = cfg.router.rounding, cfg.router.rounding_tile
    if rule is Rounding.none or not cfg.model.num_experts:
        return None
    text = (
        f"router.rounding={rule.name} looks ahead: in training a token's experts depend on later tokens of "
        "its routing group, so train/loss can be too low for a language model; evaluation rounds nothing"
    )
    top_k, group = built_router(cfg).top_k, cfg.router.group
    if top_k is None:
        return text
    sequences = int(group) if group.isdecimal() else 1
    mean = sequences * cfg.data.seq_len * top_k / cfg.model.num_experts
    if mean >= tile:
        return text
    return (
        f"{text}. An expert gets {mean:.4g} tokens of a routing group on average, fewer than "
        f"router.rounding_tile={tile}, so most get none or many more: raise router.group, or lower the tile"
    )

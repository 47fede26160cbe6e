"""Parameters and floating-point operations of a decoder, exact, from its modules' own shapes.

Shapes: E experts, K experts per token, S sequence, D model, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import nn

from moetrain.models.decoder import Decoder
from moetrain.models.options import ModelConfig, future_layers, window_of
from moetrain.moe import MoELayer, Router
from moetrain.moe.options import ExpertsConfig, RouterConfig
from moetrain.ops.uses import Use

_WHOLE = Use(1.0, 1.0)
_AHEAD = True
_Part = bool | None  # of a model: the layers that predict further tokens, or what is no such layer; None: all
T = TypeVar("T", nn.Parameter, nn.Module)


@dataclass(frozen=True)
class Counts:
    """Parameters by kind. A tied matrix counts once, as ``embedding``; ``head`` is then 0.

    ``experts_active`` are those of the K of E experts that one token passes through, of their mean width
    where they differ. ``shared`` includes the shared experts' gate and what experts without a feed-forward
    network hold: each process has all of it. Layers that predict further tokens count by kind as the others;
    ``ahead`` is what a token passes through of them, which it does in training alone.
    """

    embedding: int = 0
    head: int = 0
    attention: int = 0
    dense: int = 0
    shared: int = 0
    experts: int = 0
    experts_active: int = 0
    router: int = 0
    norms: int = 0
    biases: int = 0
    ahead: int = 0

    @property
    def total(self) -> int:
        return self.active + self.ahead - self.experts_active + self.experts

    @property
    def active(self) -> int:
        """What one token passes through, the whole embedding and head included, as model cards count it."""
        inner = self.attention + self.dense + self.shared + self.experts_active + self.router
        return inner + self.norms + self.biases + self.embedding + self.head - self.ahead


@dataclass(frozen=True)
class Flops:
    """Forward floating-point operations per token, two per multiply-add, matrix products only.

    ``scores``: queries by keys, and weights by values; of a recurrence, its products with the state, as it
    goes token by token. Embedding look-ups, norms, biases, rotations, activations, softmax and the sorting
    of tokens are left out. Training costs three times the forward pass (two products in the backward pass
    for each forward one), recomputation not included. ``ahead``: all of the layers that predict further
    tokens, each with a pass through the head: training has them, evaluation and generation have not.
    """

    projections: int
    scores: float
    dense: int
    shared: int
    experts: int
    router: int
    head: int
    ahead: float = 0

    @property
    def forward(self) -> float:
        inner = self.projections + self.scores + self.dense + self.shared + self.experts + self.router
        return inner + self.head

    @property
    def training(self) -> float:
        return 3 * (self.forward + self.ahead)


def abstract_decoder(
    cfg: ModelConfig, router: RouterConfig, experts: ExpertsConfig | None, vocab_size: int
) -> Decoder:
    """The model without its memory, on the meta device, at any size."""
    with torch.device("meta"):
        return Decoder(cfg, router, experts or ExpertsConfig(), vocab_size)


def count_parameters(model: Decoder) -> Counts:
    """Exact counts of a model on any device; sharded parameters count in their global shape."""
    return replace(_counts(model), ahead=_counts(model, _AHEAD).active)


def _counts(model: Decoder, part: _Part = None) -> Counts:
    layers = [layer for found in model.moe_layers().values() for layer in found]
    holders = {id(p): layer for layer in layers for p in layer.experts.parameters()}
    told = uses(model)
    counts = dict.fromkeys(Counts.__dataclass_fields__, 0)
    for name, parameter in _of(part, model, model.named_parameters()):
        kind = _kind(name, parameter.ndim)
        counts[kind] += parameter.numel()
        if kind == "experts":
            layer = holders.get(id(parameter))
            if layer is not None:
                used, of = experts_per_token(layer), _experts(layer)
                counts["experts_active"] += parameter.numel() * used // of
            else:  # a layer without dispatch, or a plug-in's own
                counts["experts_active"] += round(parameter.numel() * told.get(name, _WHOLE).share)
    return Counts(**counts)


def _of(part: _Part, model: Decoder, named: Iterable[tuple[str, T]]) -> Iterator[tuple[str, T]]:
    """Those that lie in the layers that predict further tokens, or those that do not; None: all."""
    further = tuple(f"blocks.{layer}." for layer in future_layers(model.cfg))
    return ((name, one) for name, one in named if part is None or name.startswith(further) is part)


def uses(model: Decoder) -> dict[str, Use]:
    """What modules tell of their parameters, by the parameters' whole names."""
    return {
        f"{path}.{name}": use
        for path, module in model.named_modules()
        for name, use in getattr(module, "uses", {}).items()
    }


def experts_per_token(layer: MoELayer) -> int:
    """K: the router's ``top_k``, E at most. A router that names no such number counts as using every expert.

    Where some of the K may be experts without a network, this is what a token uses at most.
    """
    num_experts = _experts(layer)
    top_k = layer.router.top_k
    return num_experts if top_k is None else min(top_k, num_experts)


def _experts(layer: MoELayer) -> int:
    """E: those that have a network."""
    return layer.experts.num_experts if layer.slices is None else len(layer.slices.per_expert)


def flops_breakdown(
    cfg: ModelConfig,
    router: RouterConfig,
    seq_len: int,
    vocab_size: int | None = None,
    experts: ExpertsConfig | None = None,
    causal: bool = True,
) -> Flops:
    """Forward operations per token, averaged over a sequence of ``seq_len`` that is one document.

    ``causal``: a query counts the keys that it may see, (S + 1) / 2 on average without a sliding window;
    otherwise all S, as a kernel without skipping computes them. Capacity drops and padding rows are not
    counted. ``vocab_size`` null: the config's own. Raises ValueError where neither says it.
    """
    vocab_size = cfg.vocab_size if vocab_size is None else vocab_size
    if vocab_size is None:
        raise ValueError("the config leaves vocab_size to the tokenizer: give vocab_size")
    model = abstract_decoder(cfg, router, experts, vocab_size)
    scores = [
        attention.score_flops(_pairs(seq_len, window_of(cfg, layer), causal) / seq_len)
        for layer, attention in enumerate(model.attentions())
    ]
    head, own = 2 * vocab_size * cfg.d_model, cfg.num_layers
    further = _flops(model, _AHEAD, sum(scores[own:]), head * cfg.future.layers)
    return replace(_flops(model, not _AHEAD, sum(scores[:own]), head), ahead=further.forward)


def _flops(model: Decoder, part: bool, scores: float, head: int) -> Flops:
    counts, repeated = _counts(model, part), _repeated(model, part)
    return Flops(
        projections=2 * counts.attention,
        scores=scores,
        dense=2 * counts.dense,
        shared=2 * counts.shared,
        experts=2 * (counts.experts_active + repeated["experts"]),
        router=2 * (counts.router + repeated["router"] + _saved_products(model, part)),
        head=head,
    )


def _pairs(seq_len: int, window: int | None, causal: bool) -> int:
    """The pairs of a query and a key whose scores count."""
    window = seq_len if window is None else min(window, seq_len)
    return window * (window + 1) // 2 + (seq_len - window) * window if causal else seq_len * seq_len


def _saved_products(model: Decoder, part: bool) -> int:
    """What routers multiply a token by, less their parameters: negative where most of them are looked up."""
    routers = [m for _, m in _of(part, model, model.named_modules()) if isinstance(m, Router)]
    return sum(r.products_per_token() - sum(p.numel() for p in r.parameters()) for r in routers)


def flops_per_token(
    cfg: ModelConfig,
    router: RouterConfig,
    seq_len: int,
    vocab_size: int | None = None,
    experts: ExpertsConfig | None = None,
) -> float:
    """Forward operations per token with causal attention: the sum of :func:`flops_breakdown`."""
    return flops_breakdown(cfg, router, seq_len, vocab_size, experts).forward


def _repeated(model: Decoder, part: bool) -> dict[str, int]:
    """Multiply-adds of a token beyond one for each active parameter, where modules tell of any; by kind."""
    extra = {"experts": 0, "router": 0}
    told = uses(model)
    for name, parameter in _of(part, model, model.named_parameters()):
        use = told.get(name, _WHOLE)
        if use.products != use.share:
            extra[_kind(name, parameter.ndim)] += round(parameter.numel() * (use.products - use.share))
    return extra


def _kind(name: str, ndim: int) -> str:
    if ".router." in name:
        return "router"
    if ndim == 1:
        return "biases" if ".b_" in name else "norms"
    if name in ("embed_VD", "head_VD"):
        return "embedding" if name == "embed_VD" else "head"
    parts = {
        ".attention.": "attention",
        ".experts.": "experts",
        ".shared.": "shared",
        ".shared_gate_": "shared",
        ".zero_experts.": "shared",
    }
    for part, kind in parts.items():
        if part in name:
            return kind
    return "dense"

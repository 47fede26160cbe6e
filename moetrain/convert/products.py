"""A stored model whose matrices have low-rank products beside them: the sums, and what was trained.

Shapes: N rows and K columns of a matrix, E experts, R rank.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from moetrain.convert.open_model import StoredModel
from moetrain.errors import UserError
from moetrain.models.count import abstract_decoder
from moetrain.models.hf.source import TensorInfo
from moetrain.models.lora_options import LoraConfig
from moetrain.models.options import experts_of, moe_layers, width_of
from moetrain.moe.experts import Experts
from moetrain.moe.mlp import MATRICES
from moetrain.moe.options import ExpertKind
from moetrain.ops.low_rank import PREFIX, is_factor
from moetrain.train.optim.build import freeze

_LISTED = 3  # names in one message


@dataclass(frozen=True)
class Factors:
    """The names of a matrix's factors: ``a`` is [R, K] or [E, K, R], ``b`` [N, R] or [E, R, N...]."""

    a: str
    b: str

    def rank(self, infos: Mapping[str, TensorInfo]) -> int:
        shape = infos[self.a].shape
        return shape[2] if len(shape) == 3 else shape[0]


def factors_of(infos: Mapping[str, TensorInfo]) -> dict[str, Factors]:
    """By the names of the matrices."""
    found: dict[str, dict[str, str]] = {}
    for name in filter(is_factor, infos):
        module, _, leaf = name.rpartition(".")
        owner, _, matrix = module.rpartition(f".{PREFIX}")
        found.setdefault(f"{owner}.{matrix}", {})[leaf[0]] = name
    return {matrix: Factors(**names) for matrix, names in found.items()}


def without_products(model: StoredModel) -> StoredModel:
    """The matrices alone."""
    spec = replace(model.spec, model=replace(model.spec.model, lora=LoraConfig()))
    infos = {name: info for name, info in model.infos.items() if not is_factor(name)}
    return replace(model, spec=spec, infos=infos)


def merged(model: StoredModel) -> StoredModel:
    """Each matrix with its product, added in fp32 at least and rounded to the matrix's dtype once.

    Experts that are products become networks of their own.
    """
    factors = factors_of(model.weights)

    def read(name: str) -> Tensor:
        weight = model.read(name)
        return weight if name not in factors else _sum(model, weight, factors[name])

    with_sums = replace(without_products(model), read=read)
    if model.spec.experts.kind is not ExpertKind.low_rank:
        return with_sums
    return _with_networks(with_sums, lambda weight, name: _sum(model, weight, factors.get(name)))


def _sum(model: StoredModel, weight: Tensor, factors: Factors | None) -> Tensor:
    """``weight``, [N, K] or [E, K, N...], with the product of ``factors``."""
    if factors is None:
        return weight
    wide = torch.promote_types(weight.dtype, torch.float32)
    a, b = (model.read(factor).to(wide) for factor in (factors.a, factors.b))
    product = b @ a if a.ndim == 2 else torch.bmm(a, b.flatten(2)).view(weight.shape)
    factor = model.spec.model.lora.factor(factors.rank(model.infos))
    return (weight.to(wide) + factor * product).to(weight.dtype)


def _with_networks(model: StoredModel, of_experts: Callable[[Tensor, str], Tensor]) -> StoredModel:
    """``model``, of experts that were products of one network, with the network of each.

    ``of_experts``: a matrix of all of them, [E, K, N], and its name -> with each expert's own product.
    """
    cfg, spec = model.spec.model, model.spec
    infos, made = dict(model.infos), dict[str, tuple[str, tuple[str, ...]]]()
    for place in moe_layers(cfg):
        layer = f"blocks.{place}.feed_forward"
        leaves = [leaf for leaf in MATRICES if f"{layer}.{leaf}" in infos]
        dtype = {infos.pop(f"{layer}.{leaf}").dtype for leaf in leaves}.pop()
        experts, width = experts_of(cfg, place), width_of(cfg, place)
        shapes = ((experts, cfg.d_model, len(leaves) - 1, width), (experts, width, cfg.d_model))
        for name, shape, of in zip(Experts.takes_low_rank, shapes, (leaves[:-1], leaves[-1:]), strict=True):
            infos[f"{layer}.experts.{name}"] = TensorInfo(shape, dtype)
            made[f"{layer}.experts.{name}"] = (layer, tuple(of))

    def read(name: str) -> Tensor:
        if name not in made:
            return model.read(name)
        (layer, leaves), shape = made[name], infos[name].shape
        shared = [model.read(f"{layer}.{leaf}").t().expand(shape[0], -1, -1) for leaf in leaves]
        sums = [of_experts(w, f"{layer}.experts.{leaf}") for w, leaf in zip(shared, leaves, strict=True)]
        return torch.stack(sums, 2) if len(shape) == 4 else sums[0].contiguous()

    networks = replace(spec, experts=replace(spec.experts, kind=ExpertKind.networks))
    return replace(model, spec=networks, infos=infos, read=read)


def require_only_products_trained(model: StoredModel) -> None:
    """Raises UserError where the run trained more than its products, which then belong to no other model."""
    if model.trained is None:
        return
    spec = model.spec
    decoder = abstract_decoder(spec.model, spec.router, spec.experts, spec.vocab_size)
    freeze(decoder, model.trained.optim.frozen)
    trained = [n for n, p in decoder.named_parameters() if p.requires_grad and not is_factor(n)]
    if trained:
        more = f" and {len(trained) - _LISTED} more" if len(trained) > _LISTED else ""
        raise UserError(
            f"{model.path}: {', '.join(trained[:_LISTED])}{more} were trained too (optim.frozen), so its "
            "products alone are not what was learned: merge=true exports the whole model"
        )

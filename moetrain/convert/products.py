"""A stored model whose matrices have low-rank products beside them: the sums, and what was trained.

Shapes: N rows and K columns of a matrix, E experts, R rank.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from moetrain.convert.open_model import StoredModel
from moetrain.errors import UserError
from moetrain.models.count import abstract_decoder
from moetrain.models.hf.source import TensorInfo
from moetrain.models.lora_options import LoraConfig
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
    """Each matrix with its product, added in fp32 at least and rounded to the matrix's dtype once."""
    factors, lora = factors_of(model.weights), model.spec.model.lora

    def read(name: str) -> Tensor:
        weight = model.read(name)
        if name not in factors:
            return weight
        wide = torch.promote_types(weight.dtype, torch.float32)
        a, b = (model.read(factor).to(wide) for factor in (factors[name].a, factors[name].b))
        product = b @ a if a.ndim == 2 else torch.bmm(a, b.flatten(2)).view(weight.shape)
        rank = factors[name].rank(model.infos)
        return (weight.to(wide) + lora.factor(rank) * product).to(weight.dtype)

    return replace(without_products(model), read=read)


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

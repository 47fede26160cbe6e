"""``moetrain export adapters=peft``: low-rank products as an adapter that the package peft loads.

peft adapts a module's weight (``target_modules``) or any parameter by its path (``target_parameters``). The
latter serves experts, which transformers 5 holds as one tensor for gate and up and one for down, and all of a
feed-forward layer, since peft rewrites the names of a MoE model's modules there.

Shapes: N rows and K columns of a matrix, E experts, D model, F hidden, R rank.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from moetrain.convert.model_folder import new_folder
from moetrain.convert.open_model import StoredModel
from moetrain.convert.products import Factors, factors_of, require_only_products_trained
from moetrain.errors import UserError
from moetrain.models.hf import Family
from moetrain.models.hf.pieces import Piece
from moetrain.models.options import future_layers
from moetrain.terminal import tell

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_KEY = "base_model.model."  # before every module's path
_EXPERT = re.compile(r"(.*\.experts)\.\d+\.[^.]+\.weight")  # one expert's matrix, as files have it
_UP, _DOWN = "gate_up_proj", "down_proj"
_STACKED = {"w_gate_up_EDCF": _UP, "w_down_EFD": _DOWN}
_LIVE = {"block_sparse_moe": "mlp"}  # parts of a path whose names differ between files and modules


@dataclass(frozen=True)
class Adapter:
    """One parameter's product, as peft has it: A [R E, K], B [N, R E]. ``module``: its path; ``leaf``: the
    parameter in it."""

    module: str
    leaf: str
    rank: int
    a: Tensor
    b: Tensor

    @property
    def by_module(self) -> bool:
        """Whether the module's path names it."""
        return ".self_attn." in self.module and self.leaf == "weight"

    @property
    def target(self) -> str:
        """What peft's configuration calls it."""
        return self.module if self.by_module else f"{self.module}.{self.leaf}"


def export_adapters(
    model: StoredModel, base: StoredModel, family: Family, target: Path, dtype: torch.dtype | None
) -> None:
    """Write ``target``. ``base``: the model without products. Raises UserError for what peft cannot have."""
    require_only_products_trained(model)
    table = family.table(base.spec)
    adapters: list[Adapter] = []
    further = tuple(f"blocks.{layer}." for layer in future_layers(base.spec.model))
    for matrix, factors in factors_of(model.weights).items():
        if matrix.startswith(further):
            raise UserError(
                f"{model.path}: {matrix} has a product, and peft's base has no layers that predict further "
                "tokens: merge=true exports the whole model"
            )
        if matrix not in table or not table[matrix].pieces:
            raise UserError(
                f"{model.path}: {matrix} has a product, but {family.model_type} has no such matrix"
            )
        adapters += _adapters(model, matrix, factors, table[matrix].pieces)
    tensors: dict[str, Tensor] = {}
    leaves = {(adapter.module, adapter.leaf) for adapter in adapters}
    for adapter in adapters:
        # peft wraps the second parameter of a module around the first
        inner = adapter.leaf == _UP and (adapter.module, _DOWN) in leaves
        path = f"{_KEY}{adapter.module}{'.base_layer' if inner else ''}"
        for name, tensor in (("lora_A", adapter.a), ("lora_B", adapter.b)):
            tensors[f"{path}.{name}.weight"] = tensor.to(dtype or tensor.dtype).contiguous()
    with new_folder(target) as folder:
        (folder / CONFIG).write_text(json.dumps(_config(model, adapters), indent=2) + "\n")
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    size = sum(tensor.nbytes for tensor in tensors.values())
    said = f"adapters of {len(adapters)} parameters of {family.architecture} are in {target}"
    tell(f"{said} ({size / 1e6:.2f} MB)")


def _adapters(
    model: StoredModel, matrix: str, factors: Factors, pieces: tuple[Piece, ...]
) -> Iterator[Adapter]:
    a, b, rank = model.read(factors.a), model.read(factors.b), factors.rank(model.infos)
    if a.ndim == 3:
        paths = {match[1] if (match := _EXPERT.fullmatch(piece.theirs)) else "" for piece in pieces}
        leaf = _STACKED.get(matrix.rpartition(".")[2])
        if len(paths) != 1 or "" in paths or leaf is None:
            raise UserError(
                f"{matrix} is stored as {pieces[0].theirs}, for which adapters=peft knows no form: "
                "merge=true exports the whole model"
            )
        down_rows = a.permute(0, 2, 1).flatten(0, 1)  # [E R, K]
        across = b.flatten(2).permute(2, 1, 0).flatten(1)  # [N, R E], the expert's number innermost
        yield Adapter(_live(paths.pop()), leaf, rank, down_rows, across)
        return
    for piece in pieces:
        if piece.dims != (0, 1) or piece.stored or piece.sizes[1] != a.shape[1]:
            raise UserError(
                f"{matrix} is stored in parts ({piece.theirs}) that adapters=peft knows no form for"
            )
        module, _, leaf = _live(piece.theirs).rpartition(".")
        yield Adapter(module, leaf, rank, a, b.narrow(0, piece.offsets[0], piece.sizes[0]))


def _live(path: str) -> str:
    return ".".join(_LIVE.get(part, part) for part in path.split("."))


def _config(model: StoredModel, adapters: list[Adapter]) -> dict[str, Any]:
    """What is left out is peft's default: no dropout, which parameters cannot have, and no bias."""
    lora = model.spec.model.lora
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None,
        "inference_mode": True,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "use_rslora": lora.rslora,
        "target_modules": sorted(adapter.target for adapter in adapters if adapter.by_module),
        "target_parameters": sorted(adapter.target for adapter in adapters if not adapter.by_module),
        "rank_pattern": {adapter.target: adapter.rank for adapter in adapters if adapter.rank != lora.rank},
    }

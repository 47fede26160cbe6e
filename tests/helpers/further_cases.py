"""Small models of transformers whose files hold a layer that predicts further tokens, by published names.

transformers' classes leave such layers out, so that the block is a second model of transformers, of one
layer. Importing it skips a test file where transformers is missing. Shapes: D model.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from hf_cases import CASES, tensors_of, write_theirs
from safetensors.torch import save_file
from torch import Tensor

FULL = {"layer_types": ["full_attention"]}


@dataclass(frozen=True)
class Names:
    """What a family calls the parts of its layer, which is number 0, or follows the last of ``layers``."""

    block: str
    token_norm: str
    hidden_norm: str
    join: str
    norm: str | None
    alone: dict[str, Any]  # of the model that is the block alone
    config: dict[str, Any]  # what config.json says of it
    copies: tuple[str, ...] = ()  # of the embedding, of the head


def by_place(layer: int) -> Names:
    start = f"model.layers.{layer}."
    return Names(
        start,
        f"{start}enorm.weight",
        f"{start}hnorm.weight",
        f"{start}eh_proj.weight",
        f"{start}shared_head.norm.weight",
        {"first_k_dense_replace": 0},
        {"num_nextn_predict_layers": 1},
        (f"{start}embed_tokens.weight", f"{start}shared_head.head.weight"),
    )


MTP = Names(
    "mtp.layers.0.",
    "mtp.pre_fc_norm_embedding.weight",
    "mtp.pre_fc_norm_hidden.weight",
    "mtp.fc.weight",
    "mtp.norm.weight",
    FULL,
    {},
)
ERNIE = Names(
    "model.mtp_block.0.",
    "model.mtp_emb_norm.0.weight",
    "model.mtp_hidden_norm.0.weight",
    "model.mtp_linear_proj.0.weight",
    None,
    {"moe_layer_start_index": 1, "moe_layer_interval": 1},  # of one layer: it is dense
    {"num_nextn_predict_layers": 1},
)
NAMES = {
    "deepseek_v3": by_place(3),
    "glm4_moe": by_place(3),
    "qwen3_next": MTP,
    "qwen3_5_moe_text": replace(MTP, config={"mtp_num_hidden_layers": 1}),
    "ernie4_5_moe": ERNIE,
}


@dataclass(frozen=True)
class Further:
    """A model, the block of its layer alone, what joins the two, and the folder that holds all of them."""

    theirs: Any
    alone: Any
    joining: dict[str, Tensor]
    folder: Path
    names: Names


def write(
    name: str, folder: Path, change: Callable[[dict[str, Tensor]], None] = lambda held: None
) -> Further:
    """The folder of ``name`` with such a layer; ``change`` edits the tensors."""
    family, names = CASES[name], NAMES[name]
    theirs = family.their_model(torch.float32)
    torch.manual_seed(7)
    one = replace(family, theirs={**family.theirs, **names.alone, "num_hidden_layers": 1})
    alone = one.their_model(torch.float32)
    with torch.no_grad():
        for parameter in alone.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.03)  # else it would be the first layer's twin
        alone.lm_head.weight.copy_(theirs.lm_head.weight)
        if names.norm is None:
            alone.model.norm.weight.copy_(theirs.model.norm.weight)
    width = theirs.config.hidden_size
    joining = {
        names.token_norm: torch.rand(width) + 0.5,
        names.hidden_norm: torch.rand(width) + 0.5,
        names.join: torch.randn(width, 2 * width) * 0.2,
    }
    write_theirs(theirs, folder)
    alone.save_pretrained(folder / "alone")
    block = {
        names.block + inner.removeprefix("model.layers.0."): tensor
        for inner, tensor in tensors_of(folder / "alone").items()
        if inner.startswith("model.layers.0.")
    }
    for file in (folder / "alone").iterdir():
        file.unlink()
    (folder / "alone").rmdir()
    held = tensors_of(folder) | block | joining
    if names.norm is not None:
        held[names.norm] = alone.model.norm.weight.detach().clone()
    for copy, own in zip(names.copies, ("model.embed_tokens.weight", "lm_head.weight"), strict=False):
        held[copy] = held[own].clone()
    change(held)
    save_file(held, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text()) | names.config
    (folder / "config.json").write_text(json.dumps(config))
    return Further(theirs, alone, joining, folder, names)

"""Opening another project's checkpoint: its config is understood, its tensors are those of the model."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from moetrain.errors import UserError
from moetrain.models.decoder import Decoder
from moetrain.models.hf.family import Family, ModelSpec, read_model
from moetrain.models.hf.fields import MAX_LAYERS
from moetrain.models.hf.folder import CONFIG, INDEX, MAX_TENSORS, SINGLE, SafetensorsFolder, read_json
from moetrain.models.hf.layouts import as_family, stored_layers, take_copies, with_further
from moetrain.models.hf.pieces import Table, check_source, fill_block
from moetrain.models.hf.quantised import dequantised
from moetrain.models.hf.tensors import DTYPES, STORED, Part, Source, TensorInfo, bytes_of, dtype_names
from moetrain.models.hf.text_part import text_alone

__all__ = [
    "INDEX",
    "SINGLE",
    "Opened",
    "Part",
    "SafetensorsFolder",
    "Source",
    "TensorInfo",
    "bytes_of",
    "dtype_names",
    "open_source",
    "read_folder_spec",
    "read_json",
]

_LISTED = 4


@dataclass(frozen=True)
class Opened:
    """A source whose config is understood and whose tensors are just those of its model."""

    source: Source
    family: Family
    spec: ModelSpec
    table: Table

    @cached_property
    def infos(self) -> dict[str, TensorInfo]:
        """Our tensors, in the dtypes of theirs."""
        stored = self.source.tensors
        return {
            name: TensorInfo(t.shape, stored[t.pieces[0].theirs].dtype if t.pieces else torch.float32)
            for name, t in self.table.items()
        }

    def read(self, name: str) -> Tensor:
        """One of our tensors, whole."""
        info = self.infos[name]
        tensor = torch.empty(info.shape, dtype=info.dtype)
        fill_block(tensor, (0,) * tensor.ndim, self.table[name].pieces, self.source.read)
        return tensor


def read_folder_spec(path: Path) -> ModelSpec:
    """The model of a Hugging Face folder, of which no tensor is read, only what its files say of them."""
    source = text_alone(dequantised(SafetensorsFolder(path)), said=False)
    family, spec = _read(source)
    return with_further(source, family, spec)


def open_source(source: Source, further: bool = True) -> Opened:
    """Raises UserError unless every tensor of ``source`` has one place and every tensor of ours is filled.

    ``further``: layers that predict further tokens are taken, if the family's names describe them; else, and
    where their copies of the embedding or the head are none, they are left out, which is said.
    What the config says is bounded by what the files hold before anything is built.
    """
    where = f"{source.path}: {CONFIG}"
    source = text_alone(dequantised(source))
    family, spec = _read(source)
    for name, info in source.tensors.items():
        if info.dtype not in DTYPES.values():
            kind = next(key for key, dtype in STORED.items() if dtype is info.dtype)
            raise UserError(f"{source.path}: {name} is {kind}; only {', '.join(DTYPES)} are read")
    m = spec.model
    if 3 * m.num_layers * m.num_experts > MAX_TENSORS:
        raise UserError(
            f"{where}: num_experts={m.num_experts} in {m.num_layers} layers are more than possible"
        )
    source, spec = _with_further(source, family, spec, further)
    table = _table(family, spec, where)
    check_source(table, {name: info.shape for name, info in source.tensors.items()}, str(source.path))
    for name, tiled in table.items():
        dtypes = {source.tensors[piece.theirs].dtype for piece in tiled.pieces}
        if len(dtypes) > 1:
            named = sorted(str(dtype).removeprefix("torch.") for dtype in dtypes)
            first = ", ".join(piece.theirs for piece in tiled.pieces[:_LISTED])
            raise UserError(
                f"{source.path}: the parts of {name} ({first} ...) are of several dtypes: {named}"
            )
    return Opened(source, family, spec, table)


def _with_further(source: Source, family: Family, spec: ModelSpec, further: bool) -> tuple[Source, ModelSpec]:
    """The source under the family's names, and the model with what it holds and what is wanted."""
    larger = with_further(source, family, spec)
    layers, why = larger.model.future.layers, ", which are not read in this form"
    if layers and further:
        view = as_family(source, family, larger, why)
        other = take_copies(view, family, larger)
        if other is None:
            return view, larger
        why = f": {other} is another than the decoder's own, which such layers have here"
    elif layers:
        why = f": model.future.layers={layers} would take them"
    return as_family(source, family, spec, why), spec


def _read(source: Source) -> tuple[Family, ModelSpec]:
    return read_model(source.config, f"{source.path}: {CONFIG}", min(stored_layers(source), MAX_LAYERS))


def _table(family: Family, spec: ModelSpec, where: str) -> Table:
    """Raises UserError for a model that cannot be built, ValueError for a table of other tensors."""
    try:
        with torch.device("meta"):
            model = Decoder(spec.model, spec.router, spec.experts, spec.vocab_size)
    except (
        UserError,
        ValueError,
        TypeError,
        RuntimeError,
        ArithmeticError,
    ) as error:  # a width of 0, or 2^64
        raise UserError(f"{where}: {' '.join(str(error).split())[:300]}") from None
    table = family.table(spec)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if shapes != {name: tiled.shape for name, tiled in table.items()}:
        raise ValueError(f"the table of family {family.model_type} does not have the model's tensors")
    return table

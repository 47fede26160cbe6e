"""Reading a Hugging Face folder: config.json and safetensors, tensor by tensor, all checked at opening.

Nothing here can run code: pickled weights are refused by name and never opened.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from moetrain.errors import UserError
from moetrain.models.decoder import Decoder
from moetrain.models.hf.family import Family, ModelSpec, family_of
from moetrain.models.hf.fields import Fields
from moetrain.models.hf.pieces import Table, check_source, fill_block

INDEX, SINGLE, _CONFIG = "model.safetensors.index.json", "model.safetensors", "config.json"
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
_COMPUTED = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")  # stored by old converters
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_LISTED = 4


@dataclass(frozen=True)
class TensorInfo:
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


class Source(Protocol):
    """A checkpoint in Hugging Face's names. ``read`` returns a tensor of its own, in the stored dtype."""

    path: Path
    config: dict[str, Any]
    tensors: dict[str, TensorInfo]

    def read(self, name: str) -> Tensor: ...


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


def open_source(source: Source) -> Opened:
    """Raises UserError unless every tensor of ``source`` has one place and every tensor of ours is filled."""
    where = f"{source.path}: {_CONFIG}"
    family = family_of(source.config, where)
    spec = family.read(Fields(source.config, where))
    table = _table(family, spec, where)
    _drop_computed(source, spec.model.tie_embeddings)
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


def _table(family: Family, spec: ModelSpec, where: str) -> Table:
    """Raises UserError for a model that cannot be built, ValueError for a table of other tensors."""
    try:
        with torch.device("meta"):
            model = Decoder(spec.model, spec.router, spec.experts, spec.vocab_size)
    except (UserError, ValueError, RuntimeError) as error:
        raise UserError(f"{where}: {error}") from None
    table = family.table(spec)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if shapes != {name: tiled.shape for name, tiled in table.items()}:
        raise ValueError(f"the table of family {family.model_type} does not have the model's tensors")
    return table


def _drop_computed(source: Source, tied: bool) -> None:
    """Leave out what is no weight: rotary tables, and a second copy of a tied embedding."""
    for name in [name for name in source.tensors if _COMPUTED.fullmatch(name)]:
        del source.tensors[name]
    head, embedding = "lm_head.weight", "model.embed_tokens.weight"
    if not tied or head not in source.tensors or embedding not in source.tensors:
        return
    if not torch.equal(source.read(head), source.read(embedding)):
        raise UserError(
            f"{source.path}: {_CONFIG} says tie_word_embeddings, but {head} differs from {embedding}: "
            "one of the two would be lost"
        )
    del source.tensors[head]


class SafetensorsFolder:
    """A folder with config.json and one or more safetensors files.

    A file is mapped only while one tensor is read, so that memory holds that tensor and no more.
    Raises UserError for what is missing, truncated, pickled, not listed or listed and not there.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = read_json(path / _CONFIG)
        places = self._places()
        self._files: dict[str, Path] = {}
        self.tensors: dict[str, TensorInfo] = {}
        for file, listed in places.items():
            for name, info in _header(file).items():
                if name in self._files:
                    raise UserError(f"{name} is in {self._files[name]} and in {file}")
                self._files[name], self.tensors[name] = file, info
            here = {name for name in self._files if self._files[name] == file}
            if listed is not None and listed != here:
                self._complain(file, listed, here)

    def read(self, name: str) -> Tensor:
        file = self._files[name]
        try:
            with safe_open(file, "pt") as handle:
                tensor: Tensor = handle.get_tensor(name).clone()
        except (SafetensorError, OSError) as error:
            raise UserError(f"{file}: {name} cannot be read: {error}") from None
        return tensor

    def _places(self) -> dict[Path, set[str] | None]:
        """The files, and the names that the index lists in each; None where there is no index."""
        if (self.path / INDEX).is_file():
            weight_map = read_json(self.path / INDEX).get("weight_map")
            if not isinstance(weight_map, dict) or not all(isinstance(f, str) for f in weight_map.values()):
                raise UserError(f"{self.path / INDEX} has no weight_map of names to files")
            places: dict[Path, set[str] | None] = {}
            for name, file in weight_map.items():
                if Path(file).name != file:
                    raise UserError(f"{self.path / INDEX} names {file!r}, which is not a file beside it")
                names = places.setdefault(self.path / file, set())
                assert names is not None
                names.add(name)
            missing = [file.name for file in places if not file.is_file()]
            if missing:
                raise UserError(
                    f"{self.path / INDEX} names {', '.join(missing[:_LISTED])}, "
                    f"but {len(missing)} of its {len(places)} files are not there"
                )
            return places
        if (self.path / SINGLE).is_file():
            return {self.path / SINGLE: None}
        raise UserError(f"{self.path} {self._what_instead()}")

    def _what_instead(self) -> str:
        found = sorted(file.name for file in self.path.glob("*.safetensors"))
        if found:
            return f"holds {', '.join(found[:_LISTED])}, but neither {SINGLE} nor {INDEX}, which lists shards"
        pickles = sorted(file.name for pattern in _PICKLES for file in self.path.glob(pattern))
        if pickles:
            return (
                f"holds its weights as pickles ({', '.join(pickles[:_LISTED])}), which can run code when "
                "read: have transformers save it as safetensors first"
            )
        return f"holds no {SINGLE}"

    def _complain(self, file: Path, listed: set[str], here: set[str]) -> None:
        lost, extra = sorted(listed - here), sorted(here - listed)
        what = [f"{name} is listed there but not in the file" for name in lost[:_LISTED]]
        what += [f"{name} is in the file but not listed" for name in extra[:_LISTED]]
        raise UserError(f"{file} does not hold what {INDEX} says: {'; '.join(what)}")


def _header(file: Path) -> dict[str, TensorInfo]:
    """Names, shapes and dtypes; reading it checks that the file is as long as they say."""
    try:
        with safe_open(file, "pt") as handle:
            slices = {name: handle.get_slice(name) for name in handle.keys()}  # noqa: SIM118
            found = {name: (tuple(s.get_shape()), str(s.get_dtype())) for name, s in slices.items()}
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file} is no intact safetensors file: {error}") from None
    for name, (_, dtype) in found.items():
        if dtype not in _DTYPES:
            raise UserError(f"{file}: {name} is {dtype}; only {', '.join(_DTYPES)} are read")
    return {name: TensorInfo(shape, _DTYPES[dtype]) for name, (shape, dtype) in found.items()}


def read_json(file: Path) -> dict[str, Any]:
    """An object. Raises UserError for a file that is missing, no JSON or something else."""
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"there is no {file}") from None
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {file}: {error}") from None
    if not isinstance(value, dict):
        raise UserError(f"{file} is not a JSON object")
    return value


def bytes_of(tensor: Tensor) -> memoryview:
    """A tensor's bytes in C order, not copied where it is contiguous."""
    flat: Any = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
    return memoryview(flat)


def dtype_names() -> dict[torch.dtype, str]:
    """What safetensors calls the dtypes that are read and written here."""
    return {dtype: name for name, dtype in _DTYPES.items()}

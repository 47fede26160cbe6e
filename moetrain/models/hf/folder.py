"""A Hugging Face folder: config.json, and safetensors in one file or in those that an index lists.

Nothing here can run code: pickled weights are refused by name and never opened.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Annotated, Any

from pydantic import Field
from safetensors import SafetensorError, safe_open
from torch import Tensor

from moetrain import files
from moetrain.errors import UserError
from moetrain.models.hf.tensors import DTYPES, STORED, Part, TensorInfo
from moetrain.terminal import tell

INDEX, SINGLE, CONFIG = "model.safetensors.index.json", "model.safetensors", "config.json"
MAX_TENSORS = 500_000  # of a model; the largest that are published have a fifth of it
_ADAPTER = "adapter_config.json"  # transformers loads the model that it names, not the one beside it
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
_LISTED = 4
_CONFIG_LIMIT, _INDEX_LIMIT = 4 * files.MB, 100 * files.MB
_HEADER_LIMIT = 16 * files.MB  # over 100,000 tensors in one file

Name = Annotated[str, Field(min_length=1, max_length=1000)]


@dataclass(frozen=True)
class _Index:
    """``metadata`` (a total size) and any other key are of no interest."""

    weight_map: dict[Name, Name]


class SafetensorsFolder:
    """A folder with config.json and one or more safetensors files.

    A file is mapped only while one tensor is read, so that memory holds the part asked for and no more.
    Raises UserError for what is missing, truncated, pickled, not listed or listed and not there.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = read_json(path / CONFIG)
        places = self._places()
        self._files: dict[str, Path] = {}
        self.tensors: dict[str, TensorInfo] = {}
        for file, listed in places.items():
            here = _header(file)
            for name, info in here.items():
                if name in self._files:
                    raise UserError(f"{name} is in {self._files[name]} and in {file}")
                self._files[name], self.tensors[name] = file, info
            if listed is not None and listed != here.keys():
                self._complain(file, listed, set(here))

    def read(self, name: str, part: Part | None = None) -> Tensor:
        file = self._files[name]
        try:
            with safe_open(file, "pt") as handle:
                if part is None:
                    tensor: Tensor = handle.get_tensor(name).clone()
                else:
                    tensor = handle.get_slice(name)[part].clone()
        except (SafetensorError, OSError) as error:
            raise UserError(f"{file}: {name} cannot be read: {error}") from None
        return tensor

    def _places(self) -> dict[Path, set[str] | None]:
        """The files, and the names that the index lists in each; None where there is no index."""
        if (self.path / _ADAPTER).is_file():
            raise UserError(
                f"{self.path} holds {_ADAPTER}: its weights are changes to another model; merge them into it "
                "first, or remove the file if they are merged already"
            )
        index = self.path / INDEX
        if not index.is_file():
            if (self.path / SINGLE).is_file():
                return {self.path / SINGLE: None}
            raise UserError(f"{self.path} {self._what_instead()}")
        places: dict[Path, set[str] | None] = {}
        for name, file in _read_index(index).items():
            names = places.setdefault(self.path / file, set())
            assert names is not None
            names.add(name)
        missing = [file.name for file in places if not _is_file(file)]
        if missing:
            raise UserError(
                f"{index} names {', '.join(missing[:_LISTED])}, "
                f"but {len(missing)} of its {len(places)} files are not there"
            )
        others = sorted(file.name for file in self.path.glob("*.safetensors") if file not in places)
        if SINGLE in others:
            raise UserError(
                f"{self.path} holds {SINGLE} and {INDEX}, which lists other files: transformers reads the "
                "former alone; remove the one that is not the model"
            )
        if others:
            tell(f"not read, since {index} does not list it: {', '.join(others[:_LISTED])}", sys.stderr)
        return places

    def _what_instead(self) -> str:
        found = sorted(file.name for file in self.path.glob("*.safetensors"))
        if SINGLE in found:
            return f"holds {SINGLE}, which is not a regular file"
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


def _read_index(index: Path) -> dict[str, str]:
    """Name -> file, relative to the folder and within it. Raises UserError."""
    try:
        found = files.read_json(index, _Index, _INDEX_LIMIT).weight_map
    except UserError as error:
        raise UserError(f"{index} has no weight_map of names to files: {error}") from None
    for file in set(found.values()):
        parts = PurePosixPath(file).parts
        if file.startswith("/") or "\\" in file or ".." in parts or not file.isprintable() or not parts:
            raise UserError(f"{index} names {file[:80]!r}, which is not a file beside it")
    return found


def _is_file(file: Path) -> bool:
    try:
        return file.is_file()
    except (OSError, ValueError):  # a name that is too long, or that no file can have
        return False


def _header(file: Path) -> dict[str, TensorInfo]:
    """Names, shapes and dtypes; reading it checks that the tensors tile the file's data."""
    with os.fdopen(files.open_regular(file), "rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
    if length > _HEADER_LIMIT:
        raise UserError(
            f"{file} is no intact safetensors file: its header claims {length} bytes, and "
            f"{_HEADER_LIMIT} are possible"
        )
    try:
        with safe_open(file, "pt") as handle:
            names = list(handle.keys())
            if len(names) > MAX_TENSORS:
                raise UserError(f"{file} holds {len(names)} tensors, and no model has {MAX_TENSORS}")
            slices = {name: handle.get_slice(name) for name in names}
            found = {name: (tuple(s.get_shape()), str(s.get_dtype())) for name, s in slices.items()}
    except (SafetensorError, OSError, ValueError, OverflowError) as error:
        raise UserError(f"{file} is no intact safetensors file: {error}") from None
    for name, (shape, dtype) in found.items():
        if not name.isprintable():
            raise UserError(f"{file}: {name[:80]!r} is no name of a tensor")
        if dtype not in STORED:
            raise UserError(f"{file}: {name} is {dtype}; only {', '.join(DTYPES)} are read")
        if 0 in shape:
            raise UserError(f"{file}: {name} is {list(shape)}: it holds no number")
    return {name: TensorInfo(shape, STORED[dtype]) for name, (shape, dtype) in found.items()}


def read_json(file: Path) -> dict[str, Any]:
    """An object. Raises UserError for a file that is missing, no JSON or something else."""
    if not file.exists():
        raise UserError(f"there is no {file}")
    value = files.parse_json(files.read_bytes(file, _CONFIG_LIMIT), Any, f"cannot read {file}")
    if not isinstance(value, dict):
        raise UserError(f"{file} is not a JSON object")
    return value

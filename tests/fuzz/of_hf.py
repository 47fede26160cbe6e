"""Targets: Hugging Face's config.json, index and safetensors, and GGUF."""

from __future__ import annotations

import json
import math
from functools import partial
from pathlib import Path
from typing import Any

import torch

from fuzz.forms import json_file, safetensors_file
from fuzz.gguf_form import gguf_file
from fuzz.target import Target, Way, command, same
from moetrain.config.hydra.compose import compose_train
from moetrain.config.stored import read_spec, trained_config
from moetrain.convert.importing import _open, _tokenizer
from moetrain.convert.open_model import open_model
from moetrain.models.hf.source import SafetensorsFolder, open_source

_IDS = torch.tensor([[1, 5, 2, 7]])
_CONFIGS = ("own/config.json", "mixtral/config.json", "llama/config.json")
_NOT_READ = ("auto_map",)  # transformers' way to the code beside the weights


@torch.no_grad()
def _folder() -> dict[str, Any]:
    """The logits of whichever folder is there, and its config as read beside what the file says."""
    found: dict[str, Any] = {}
    for path in sorted(file.parent for file in Path().glob("*/config.json")):
        model = open_model(path, trained_config)
        decoder = model.build()
        logits = decoder.logits(decoder(_IDS).hidden_BSD)
        document = json.loads((path / "config.json").read_bytes())
        kind = document["model_type"] if isinstance(document, dict) else None
        from moetrain.models.hf import FAMILIES

        found[path.name] = {"logits": logits, "read": FAMILIES[kind].config(model.spec), "file": document}
    return found


def _as_written(good: Any, found: Any) -> str | None:
    """The same function, or one whose every number stands in the file: a family writes what it read."""
    for name, here in found.items():
        before = good[name]
        if here["logits"].shape == before["logits"].shape and torch.equal(here["logits"], before["logits"]):
            continue
        for key, value in here["read"].items():
            if key in here["file"] and key not in _NOT_READ and not _alike(here["file"][key], value):
                return f"differs: {name}: {key} is {str(here['file'][key])[:60]}, read as {str(value)[:60]}"
        unknown = [key for key in here["file"] if key not in before["file"]]
        if here["read"] == before["read"]:
            return f"differs: {name}: other logits of the same config ({unknown[:1]})"
    return None


def _alike(said: Any, read: Any) -> bool:
    if said is None and isinstance(read, dict):  # as if it were not there
        return True
    if isinstance(said, dict) and isinstance(read, dict):
        return all(key not in read or _alike(value, read[key]) for key, value in said.items())
    if isinstance(said, bool) or isinstance(read, bool):
        return said is read
    if isinstance(said, (int, float)) and isinstance(read, float):
        return math.isclose(said, read)
    return bool(said == read)


def _spec() -> Any:
    """What ``moetrain train init_from=`` makes of the folder that is mutated."""
    read = []
    for path in sorted(file.parent for file in Path().glob("*/config.json")):
        read.append(read_spec(path))
        compose_train([f"init_from={path}", "data=local", "data.path=text", "data.tokenizer.kind=bytes"])
    return read


def _convert() -> str:
    return "".join(command(["convert", f"source={path}", f"target=new_{path.name}"]) for path in _sources())


def _sources() -> list[Path]:
    return sorted(file.parent for file in Path().glob("*/config.json"))


def _tensors(path: str) -> dict[str, Any]:
    """The stored tensors by their own names, of a folder that is understood."""
    source = SafetensorsFolder(Path(path))
    opened = open_source(source)
    for name in opened.infos:
        opened.read(name)
    return {name: source.read(name) for name in source.tensors}


def _equal_tensors(good: Any, found: Any) -> str | None:
    if good.keys() != found.keys():
        return "differs: other tensors"
    wrong = [name for name in good if not _equal(good[name], found[name])]
    return f"differs: {wrong[0]}" if wrong else None


def _equal(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.shape == other.shape and one.dtype is other.dtype and torch.equal(one, other)


def _stored_tensors(good: Any, found: Any) -> str | None:
    """Each is one of the stored: of two of a shape, nothing can tell which is which."""
    if good.keys() != found.keys():
        return "differs: other tensors"
    values = {_values(tensor) for tensor in good.values()}
    wrong = [name for name, tensor in found.items() if _values(tensor) not in values]
    return f"differs: {wrong[0]} is none of the stored tensors" if wrong else None


def _values(tensor: torch.Tensor) -> bytes:
    """In one order, since a GGUF file's queries and keys are read with their rows in another."""
    return tensor.reshape(-1).sort().values.numpy().tobytes()


def _gguf() -> dict[str, Any]:
    """Everything that ``moetrain convert`` reads of a GGUF file, beside the package's own reading of it."""
    from gguf import GGUFReader

    source = _open(Path("llama.gguf"))
    opened = open_source(source)
    for name in opened.infos:
        opened.read(name)
    tensors = {name: source.read(name) for name in source.tensors}
    tokenizer = _tokenizer(None, source)
    ids = tokenizer.encode("hello he 1 x")
    tokenizer.decode(ids)
    fields = {key: field.contents() for key, field in GGUFReader(Path("llama.gguf")).fields.items()}
    config = {key: value for key, value in source.config.items() if key != "architectures"}
    spec = opened.family.config(opened.spec)
    return {"tensors": tensors, "ids": ids, "config": config, "spec": spec, "fields": fields}


_SAYS_NOTHING = ("llama.rope.scaling.type",)  # linear without a factor, or none: llama.cpp scales nothing


def _told(good: Any, found: Any) -> str | None:
    """A tensor that is none of the stored, or another config than the file's own keys tell, is a fault."""
    new = [key for key in found["fields"] if key not in good["fields"] and not key.startswith("GGUF.")]
    gone = [key for key in good["fields"] if key not in found["fields"]]
    if found["spec"] != good["spec"]:
        if not any(found["fields"].get(key) != value for key, value in good["fields"].items()):
            return "differs: another config of the same metadata"
        if gone and new:
            return f"differs: {gone[0]} is gone, {new[0]!r} is not known, and neither is said"
    elif new and new[0].startswith(("llama.", "general.alignment")) and new[0] not in _SAYS_NOTHING:
        return f"differs: {new[0]!r} is not used, and that is not said"
    return _stored_tensors(good["tensors"], found["tensors"])


def _hf_target(family: str) -> Target:
    ways = (
        Way("open", _folder, _as_written, 3),
        Way("init_from", _spec, lambda good, found: None),
        Way("convert", _convert, _any_text),
    )
    return Target(f"hf_config_{family}", (family, "text"), (f"{family}/config.json",), json_file, ways)


def _any_text(good: str, found: str) -> str | None:
    return None if found else "differs: nothing was said"


TARGETS = [
    *(_hf_target(family) for family in ("own", "mixtral", "llama")),
    Target(
        "hf_index",
        ("mixtral",),
        ("mixtral/model.safetensors.index.json",),
        json_file,
        (Way("open", partial(_tensors, "mixtral"), _equal_tensors),),
    ),
    Target(
        "safetensors",
        ("own", "mixtral"),
        ("own/model.safetensors", "mixtral/*.safetensors"),
        safetensors_file,
        (
            Way(
                "open",
                lambda: _tensors("own") | {f"m.{n}": t for n, t in _tensors("mixtral").items()},
                _stored_tensors,
            ),
        ),
        share=2,
    ),
    Target("gguf", ("llama.gguf",), ("llama.gguf",), gguf_file, (Way("convert", _gguf, _told),), share=3),
]
__all__ = ["TARGETS", "same"]

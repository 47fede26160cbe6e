"""``moetrain convert``: a Hugging Face folder or a GGUF file becomes a model folder."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path

from torch import Tensor

from moetrain.checkpoint.stream import large_then_small
from moetrain.convert.model_folder import tensor_hash, write_model_folder
from moetrain.convert.options import ConvertConfig
from moetrain.convert.tokenizers import fitted, folder_tokenizer, gguf_templates
from moetrain.data import Tokenizer, load_tokenizer
from moetrain.data.tokenizer import JsonTokenizer
from moetrain.errors import UserError
from moetrain.models.hf.carried import CONFIG, carry_files
from moetrain.models.hf.gguf import GGUFFile
from moetrain.models.hf.gguf_tokenizer import tokenizer_of
from moetrain.models.hf.source import Part, SafetensorsFolder, Source, open_source
from moetrain.terminal import tell
from moetrain.train.options import TrainConfig


def convert(cfg: ConvertConfig, defaults: TrainConfig) -> int:
    """Returns the exit code. Raises UserError for what the user can mend; nothing is written then.

    ``defaults``: what the folder's config says besides the model.
    """
    path = Path(cfg.source).expanduser()
    source = _open(path)
    opened = open_source(source)
    hashing = _HashingSource(opened.source)
    opened = replace(opened, source=hashing)
    tokenizer = fitted(_tokenizer(cfg.tokenizer, source), opened.spec.vocab_size)
    family, spec = opened.family.model_type, opened.spec
    write_model_folder(
        target=Path(cfg.target).expanduser(),
        cfg=replace(defaults, model=spec.model, router=spec.router, experts=spec.experts),
        tokenizer=tokenizer,
        carry=partial(_carry, source, cfg.tokenizer is None),
        tensors=large_then_small(opened.infos),
        read=opened.read,
        origin={"source": str(path.absolute()), "family": family, "tensors": hashing.hashes},
    )
    count = sum(info.nbytes for info in opened.infos.values())
    tell(
        f"{len(source.tensors)} tensors of {opened.family.architecture} became {len(opened.table)} in "
        f"{cfg.target} ({count / 1e9:.2f} GB)\n"
        f"train on: moetrain train init_from={cfg.target}\n"
        f"write:    moetrain generate checkpoint={cfg.target} prompt='The '"
    )
    return 0


def _open(path: Path) -> Source:
    if path.is_dir():
        return SafetensorsFolder(path)
    if not path.exists():
        raise UserError(f"source={path} does not exist")
    if path.suffix == ".gguf":
        return GGUFFile(path)
    raise UserError(f"source={path}: give a folder with config.json and safetensors, or a .gguf file")


def _tokenizer(given: str | None, source: Source) -> Tokenizer:
    if given is not None:
        return load_tokenizer(given)
    if isinstance(source, GGUFFile):
        own = JsonTokenizer(*tokenizer_of(source.metadata, source.path))
        return own.with_templates(gguf_templates(source.metadata))
    return folder_tokenizer(source.path, "give a tokenizer with them, tokenizer=FILE (a tokenizer.json)")


def _carry(source: Source, own_tokenizer: bool, folder: Path) -> None:
    """What other tools want beside the weights; a GGUF file has it in its metadata."""
    if source.path.is_dir():
        carry_files(source.path, folder, own_tokenizer)
    else:
        folder.mkdir(parents=True)
        (folder / CONFIG).write_text(json.dumps(source.config, indent=2) + "\n")


class _HashingSource:
    """A source that notes the hash of every tensor that is read from it.

    One that is read by parts, which follow each other, is read whole and held until another one is.
    """

    def __init__(self, source: Source) -> None:
        self._source = source
        self.path, self.config, self.tensors = source.path, source.config, source.tensors
        self.hashes: dict[str, str] = {}
        self._held: tuple[str, Tensor] | None = None

    def read(self, name: str, part: Part | None = None) -> Tensor:
        if self._held is None or self._held[0] != name:
            self._held = None  # before the next one is there
            tensor = self._source.read(name)
            self.hashes[name] = tensor_hash(tensor)
            if part is None:
                return tensor
            self._held = (name, tensor)
        return self._held[1] if part is None else self._held[1][part]

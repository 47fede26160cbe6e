"""Files of models that read images, too: their language model alone, shown as that of its own family.

``config.json`` holds the language model's under ``text_config``, its tensors have a prefix, and what reads
images is left out. One entry of :data:`OUTERS` a kind of model.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from moetrain.errors import UserError, quoted
from moetrain.models.hf.fields import Fields
from moetrain.models.hf.folder import CONFIG
from moetrain.models.hf.keys import check_keys
from moetrain.models.hf.tensors import Part, Source, TensorInfo
from moetrain.terminal import tell

_TEXT, _TIED = "text_config", "tie_word_embeddings"
_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")  # of generation; at the top they are the model's


@dataclass(frozen=True)
class Outer:
    """A model around a language model of the family ``text``.

    tied         whether the head is the embedding where the file does not say.
    prefixes     beginnings of names of the language model -> what its own family has instead.
    left_out     beginnings of names of what reads images.
    unread       keys that say nothing of the language model.
    """

    architecture: str
    text: str
    tied: bool
    prefixes: Mapping[str, str]
    left_out: tuple[str, ...]
    unread: tuple[str, ...]


_NAMES = {"model.language_model.": "model."}


def _qwen(architecture: str, text: str) -> Outer:
    return Outer(architecture, text, False, _NAMES, ("model.visual.",), ("vision_config",))


OUTERS = {
    "gemma3": Outer(
        "Gemma3ForConditionalGeneration",
        "gemma3_text",
        tied=True,
        # as files are on the hub, and as transformers 5 has it in memory and can save it
        prefixes={
            "language_model.model.": "model.",
            "language_model.lm_head.": "lm_head.",
            **_NAMES,
        },
        left_out=tuple(
            f"{start}{part}."
            for start in ("", "model.")
            for part in ("vision_tower", "multi_modal_projector")
        ),
        unread=("vision_config", "mm_tokens_per_image"),
    ),
    "qwen3_5": _qwen("Qwen3_5ForConditionalGeneration", "qwen3_5_text"),
    "qwen3_5_moe": _qwen("Qwen3_5MoeForConditionalGeneration", "qwen3_5_moe_text"),
}


def text_config(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The config of the language model alone; any other model's as it is.

    Raises UserError for a key of the outer model that is not known, or has another head than the language
    model's.
    """
    kind = config.get("model_type")
    outer = OUTERS.get(kind) if isinstance(kind, str) else None
    if outer is None:
        return dict(config)
    fields = Fields(config, where)
    named = config.get("architectures")
    if named is not None and named != [outer.architecture]:
        raise fields.refuse(f"architectures={quoted(named)} is not {outer.architecture}")
    fields.without_effect(*outer.unread)
    inner = fields.get(_TEXT)
    if not isinstance(inner, dict):
        raise fields.refuse(f"{_TEXT} is {quoted(inner)}, not an object")
    if (said := inner.get("model_type", outer.text)) != outer.text:
        raise fields.refuse(f"{_TEXT}.model_type={quoted(said)} is not {outer.text}")
    null = _TIED in config and config[_TIED] is None  # which counts as false, whatever the default
    tied = False if null else fields.flag(_TIED, outer.tied)
    fields.without_effect(_TIED)
    check_keys(fields, str(kind))
    ids = {key: config[key] for key in _IDS if config.get(key) is not None}
    return {**inner, **ids, "model_type": outer.text, _TIED: tied}


def text_alone(source: Source, said: bool = True) -> Source:
    """``source``, or the language model of one that reads images, too. ``said``: what is left out."""
    kind = source.config.get("model_type")
    outer = OUTERS.get(kind) if isinstance(kind, str) else None
    if outer is None:
        return source
    names: dict[str, str] = {}
    left_out: list[str] = []
    for stored in source.tensors:
        if stored.startswith(outer.left_out):
            left_out.append(stored)
            continue
        name = _renamed(stored, outer)
        if name in names:
            raise UserError(f"{source.path}: {names[name]} and {stored} are one tensor of the language model")
        names[name] = stored
    if left_out and said:
        size = sum(source.tensors[name].nbytes for name in left_out)
        tell(
            f"left out of {source.path}: {len(left_out)} tensor(s), {size:,} bytes, of what reads images "
            f"({left_out[0]} ...); read is the language model alone, {outer.text}",
            sys.stderr,
        )
    return _TextPart(source, text_config(source.config, f"{source.path}: {CONFIG}"), names)


def _renamed(stored: str, outer: Outer) -> str:
    for start, instead in outer.prefixes.items():
        if stored.startswith(start):
            return instead + stored.removeprefix(start)
    return stored


class _TextPart:
    def __init__(self, source: Source, config: dict[str, Any], names: Mapping[str, str]) -> None:
        self._source, self._names = source, names
        self.path, self.config = source.path, config
        self.tensors: dict[str, TensorInfo] = {name: source.tensors[own] for name, own in names.items()}

    def read(self, name: str, part: Part | None = None) -> Tensor:
        return self._source.read(self._names[name], part)

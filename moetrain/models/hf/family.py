"""A family of models as two functions on ``config.json`` and a table of names; one file a family.

``docs/families.md`` shows how to add one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moetrain.errors import UserError, quoted
from moetrain.models.hf.fields import MAX_LAYERS, Fields
from moetrain.models.hf.further import FutureNames, refusal
from moetrain.models.hf.keys import check_keys
from moetrain.models.hf.pieces import Table
from moetrain.models.hf.tables import MoENames, decoder_table
from moetrain.models.options import ModelConfig
from moetrain.moe.options import ExpertsConfig, RouterConfig
from moetrain.moe.routers.topk import TopKOptions


@dataclass(frozen=True)
class ModelSpec:
    """Everything that decides a model's function but its weights; ``vocab_size`` is set in ``model``."""

    model: ModelConfig
    router: RouterConfig = field(default_factory=TopKOptions)
    experts: ExpertsConfig = field(default_factory=ExpertsConfig)

    @property
    def vocab_size(self) -> int:
        assert self.model.vocab_size is not None
        return self.model.vocab_size


class CannotExpressError(ValueError):
    """A model that a family has no words for; the message says why."""


@dataclass(frozen=True)
class Family:
    """``read`` a config.json into a ModelSpec, ``write`` one back (raises CannotExpressError).

    ``code``: files that transformers needs beside the weights; such a family is taken by name only.
    ``defaults``: what transformers takes for a key that is absent. Sizes have none: they must be said.
    Layers that predict further tokens: ``further`` are their names, None where they are not read and so left
    out; ``future_layers`` is the key that says how many come after the last, ``left_out`` are beginnings of
    names. ``fp32``: ends of our names, of tensors that keep
    their dtype in any export, as they do in transformers; the bias of a choice does in all families.
    """

    model_type: str
    architecture: str
    read: Callable[[Fields], ModelSpec]
    write: Callable[[ModelSpec], dict[str, Any]]
    names: MoENames = field(default_factory=MoENames)
    code: tuple[Path, ...] = ()
    defaults: Mapping[str, Any] = field(default_factory=dict)
    future_layers: str | None = None
    left_out: tuple[str, ...] = ()
    fp32: tuple[str, ...] = ()
    further: FutureNames | None = None

    def table(self, spec: ModelSpec) -> Table:
        """Which of their tensors fill which block of ours."""
        return decoder_table(spec.model, spec.vocab_size, self.names, self.further)

    def config(self, spec: ModelSpec) -> dict[str, Any]:
        """``config.json`` of ``spec``, without what concerns no weight (token ids, lengths)."""
        if line := refusal(spec.model, self.further):
            raise CannotExpressError(line)
        head = {"architectures": [self.architecture], "model_type": self.model_type}
        key = None if self.further is None else self.further.key
        return head | self.write(spec) | ({} if key is None else {key: spec.model.future.layers})


FAMILIES: dict[str, Family] = {}


def register_family(family: Family) -> Family:
    """Make a family known by its ``model_type``. A second use of one is an error."""
    if FAMILIES.setdefault(family.model_type, family) is not family:
        raise ValueError(f"family {family.model_type!r} is registered already")
    return family


def read_model(config: Mapping[str, Any], where: str, layers: int = MAX_LAYERS) -> tuple[Family, ModelSpec]:
    """The family and the model of a config.json whose files hold at most ``layers`` layers.

    Raises UserError for a family that is unknown, and for any key under which the model would be another.
    """
    family = family_of(config, where)
    fields = Fields(config, where, family.defaults, layers)
    spec = family.read(fields)
    if family.future_layers is not None and (extra := fields.integer_or_none(family.future_layers) or 0) < 0:
        raise fields.refuse(f"{family.future_layers}={extra} must be 0 or more")
    check_keys(fields, family.model_type)
    return family, spec


def family_of(config: Mapping[str, Any], where: str) -> Family:
    """The family that a config.json names. Raises UserError for one that is unknown."""
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise UserError(
            f"{where}: model_type={quoted(kind)} is not known; known: {', '.join(sorted(FAMILIES))} "
            "(docs/families.md shows how to add one)"
        )
    named, family = config.get("architectures"), FAMILIES[kind]
    if named is not None and not isinstance(named, list):
        raise UserError(f"{where}: architectures={quoted(named)} is no list of names")
    # the bare decoder has all there is where embeddings are tied; else its missing head is noticed
    known = (family.architecture, family.architecture.replace("ForCausalLM", "Model"))
    if named and not any(name in known for name in named):
        raise UserError(
            f"{where}: architectures={quoted(named)} is not the language model {family.architecture}: "
            "other heads cannot be read"
        )
    return family


def families_for(spec: ModelSpec, with_code: bool = False) -> tuple[list[Family], list[str]]:
    """The families that express ``spec`` exactly, and why each other one does not.

    Those that need no code beside the weights, or those that do.
    """
    able, reasons = [], []
    for family in FAMILIES.values():
        if bool(family.code) is not with_code:
            continue
        try:
            family.config(spec)
            able.append(family)
        except CannotExpressError as error:
            reasons.append(f"{family.model_type}: {error}")
    return able, reasons

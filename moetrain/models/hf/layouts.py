"""Other layouts of the same tensors, shown under the names that a family's table has.

transformers 5 keeps all experts of a layer in two stacks, [E, 2F, D] and [E, D, F], and can save them so;
a decoder saved without its head has names without ``model.``; a tied embedding may stand under the head's
name alone. Shapes: E experts, D model, F expert hidden.
"""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass, replace
from itertools import takewhile

import torch
from torch import Tensor

from moetrain.errors import UserError
from moetrain.models.hf.family import Family, ModelSpec
from moetrain.models.hf.fields import MAX_LAYERS
from moetrain.models.hf.folder import MAX_TENSORS
from moetrain.models.hf.further import copies, with_layers
from moetrain.models.hf.tensors import Part, Source, TensorInfo
from moetrain.terminal import tell

MOST_LAYERS = 64  # that predict further tokens: what model.future takes
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
_BASE = "model."
_LAYER = re.compile(r"((?:model\.layers|mtp\.layers|model\.mtp_block)\.\d+\.)(.+)")
_STACK_UP, _STACK_DOWN, _ROUTER = "mlp.experts.gate_up_proj", "mlp.experts.down_proj", "mlp.gate.weight"
_COMPUTED = re.compile(r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq")  # stored by old converters
_FIRST_NUMBER = re.compile(r"(?:^|\.)(\d{1,9})(?:\.|$)")


@dataclass(frozen=True)
class _Place:
    """A tensor of the source, or rows of one of the matrices that it stacks."""

    name: str
    matrix: int | None = None
    first_row: int = 0


class View:
    """A source whose tensors have other names, or are parts of the stored ones."""

    def __init__(self, source: Source, places: dict[str, tuple[_Place, TensorInfo]]) -> None:
        self._source, self._places = source, {name: place for name, (place, _) in places.items()}
        self.path, self.config = source.path, source.config
        self.tensors = {name: info for name, (_, info) in places.items()}

    def read(self, name: str, part: Part | None = None) -> Tensor:
        place = self._places[name]
        if place.matrix is None:
            return self._source.read(place.name, part)
        rows, columns = part or tuple(slice(0, size) for size in self.tensors[name].shape)
        assert isinstance(rows, slice)
        rows = slice(place.first_row + rows.start, place.first_row + rows.stop)
        return self._source.read(place.name, (place.matrix, rows, columns))


def stored_layers(source: Source) -> int:
    """How many layers the names of the tensors tell apart: ``model.layers.<number>.<...>``."""
    found = (_FIRST_NUMBER.search(name) for name in source.tensors)
    return len({match.group(1) for match in found if match})


def as_family(source: Source, family: Family, spec: ModelSpec, why: str = "") -> Source:
    """``source`` under the names of ``family``'s table, without what is no weight.

    ``why``: what is said of layers that predict further tokens and are left out. Copies that such layers have
    of the embedding and the head stay. Raises UserError where a second copy of a tied embedding is another.
    """
    tied = spec.model.tie_embeddings
    places, left_out = _places(source, family, spec)
    if left_out:
        tell(
            f"left out of {source.path}: {len(left_out)} tensor(s) of layers that predict further tokens "
            f"({left_out[0]} ...){why}",
            sys.stderr,
        )
    view = View(source, places)
    if tied and HEAD in places and EMBEDDING in places:
        if not torch.equal(view.read(HEAD), view.read(EMBEDDING)):
            raise UserError(
                f"{source.path}: config.json says tie_word_embeddings, but {HEAD} differs from {EMBEDDING}: "
                "one of the two would be lost"
            )
        del view.tensors[HEAD]
    return view


def _places(
    source: Source, family: Family, spec: ModelSpec
) -> tuple[dict[str, tuple[_Place, TensorInfo]], list[str]]:
    """By the names of ``family``'s table; and the stored names of what is left out."""
    tied = spec.model.tie_embeddings
    places: dict[str, tuple[_Place, TensorInfo]] = {}
    bare_names = not any(name.startswith(_BASE) for name in source.tensors) and any(
        name.startswith("layers.") for name in source.tensors
    )
    further, left_out = _further_layers(source, family, spec), list[str]()
    for stored, info in source.tensors.items():
        bare = bare_names and stored.startswith(("embed_tokens.", "layers.", "norm.", "rotary_emb."))
        name = _BASE + stored if bare else stored
        if tied and stored == HEAD and not {EMBEDDING, "embed_tokens.weight"} & source.tensors.keys():
            name = EMBEDDING
        if name.startswith(further):
            left_out.append(stored)
        elif not _COMPUTED.fullmatch(name):
            places |= _unstacked(source, stored, name, info, family, spec)
    return places, left_out


def with_further(source: Source, family: Family, spec: ModelSpec) -> ModelSpec:
    """``spec`` with the layers that predict further tokens; as it is where ``source`` has none.

    So too where it does not hold just the tensors by which ``family`` describes them: another function could
    stand behind the rest.
    """
    names, m = family.further, spec.model
    beginnings = _further_layers(source, family, spec)
    if names is None or not beginnings:
        return spec
    starts = (names.block.format(names.number(m, m.num_layers + n)) for n in range(MAX_LAYERS))
    held = (start.startswith(beginnings) and _holds(source, start) for start in starts)
    layers = len(list(takewhile(bool, held)))
    if not 0 < layers <= min(names.most or MOST_LAYERS, MOST_LAYERS):
        return spec
    if 3 * (m.num_layers + layers) * m.num_experts > MAX_TENSORS:  # refused before a table of them is made
        return spec
    further = replace(spec, model=with_layers(m, names, layers))
    pieces = (piece for tiled in family.table(further).values() for piece in tiled.pieces)
    wanted = {p.theirs: p.whole_shape for p in pieces if p.theirs.startswith(beginnings)}
    places, _ = _places(source, family, further)
    copied = copies(further.model, names)
    found = {n: i.shape for n, (_, i) in places.items() if n.startswith(beginnings) and n not in copied}
    return further if found == wanted else spec


def _holds(source: Source, start: str) -> bool:
    return any(name.startswith(start) for name in source.tensors)


def take_copies(view: Source, family: Family, spec: ModelSpec) -> str | None:
    """Leave out of ``view`` the copies that further layers have; the name of one that is no copy, or None."""
    table = family.table(spec)
    for name, ours in copies(spec.model, family.further).items():
        if name not in view.tensors:
            continue
        (own,) = (piece.theirs for piece in table[ours].pieces)
        same = own in view.tensors and view.tensors[own] == view.tensors[name]
        if not same or not torch.equal(view.read(name), view.read(own)):
            return name
        del view.tensors[name]
    return None


def _further_layers(source: Source, family: Family, spec: ModelSpec) -> tuple[str, ...]:
    """How the names begin of layers that predict further tokens and that ``spec`` has not."""
    extra = 0 if family.future_layers is None else source.config.get(family.future_layers) or 0
    first, taken = spec.model.num_layers, spec.model.future.layers
    layers = range(first + taken, first + min(extra, MAX_LAYERS))
    return (*(() if taken else family.left_out), *(f"{_BASE}layers.{layer}." for layer in layers))


def _unstacked(
    source: Source, stored: str, name: str, info: TensorInfo, family: Family, spec: ModelSpec
) -> dict[str, tuple[_Place, TensorInfo]]:
    """The experts of a stack one by one, the router beside one by its name, any other tensor as it is."""
    match, names, m = _LAYER.fullmatch(name), family.names, spec.model
    whole = {name: (_Place(stored), info)}
    if match is None or not m.num_experts or names.stacked:
        return whole
    layer, inner = match.groups()
    if inner in names.aliases:
        return {layer + names.aliases[inner]: (_Place(stored), info)}
    if inner == _ROUTER:
        return {layer + names.router: (_Place(stored), info)}
    width, d_model = m.d_ff_expert, m.d_model
    stacks = {  # of each: its shape, and which rows of an expert are which matrix
        _STACK_UP: ((2 * width, d_model), {names.gate: (0, width), names.up: (width, 2 * width)}),
        _STACK_DOWN: ((d_model, width), {names.down: (0, d_model)}),
    }
    if inner not in stacks:
        return whole
    shape, parts = stacks[inner]
    if info.shape != (m.num_experts, *shape):
        wanted = [m.num_experts, *shape]
        raise UserError(
            f"{source.path}: {stored} is {list(info.shape)}, and the experts of its config.json want {wanted}"
        )
    return {
        layer + part.format(e): (
            _Place(stored, e, start),
            TensorInfo((stop - start, info.shape[2]), info.dtype),
        )
        for e in range(m.num_experts)
        for part, (start, stop) in parts.items()
    }

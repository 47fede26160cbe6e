"""What autograd keeps between forward and backward: storages by what they hold, and an MoE layer's bound.

Shapes: T tokens, D model, F hidden, P = 2F (gated), E experts, k experts a token, N = T k assignments, R
computed rows (each expert's rounded up to a multiple of ``block``).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

INPUT, Z, SCORES, WEIGHTS, INDICES = "input", "pre-activation", "scores", "weights", "indices"
PARTS = (INPUT, Z, SCORES, WEIGHTS, INDICES)


@dataclass
class Kept:
    """One storage, and the (shape, dtype) of each tensor that autograd keeps of it."""

    bytes: int
    tensors: set[tuple[tuple[int, ...], torch.dtype]] = field(default_factory=set)


@dataclass(frozen=True)
class Layer:
    """The sizes of an MoE layer with gated experts whose products run in ``dtype``."""

    tokens: int
    d_model: int
    d_ff: int
    experts: int
    top_k: int
    block: int
    dtype: torch.dtype

    def bound(self) -> dict[str, int]:
        """The most bytes of each part that the layer needs for backward, whatever the routing."""
        width, assignments = self.dtype.itemsize, self.tokens * self.top_k
        rows = assignments + min(self.experts, assignments) * (self.block - 1)
        return {
            INPUT: width * self.tokens * self.d_model,
            Z: width * rows * 2 * self.d_ff,
            SCORES: 2 * 4 * self.tokens * self.experts,  # fp32: logits, and their softmax
            # fp32: of rows; of assignments, of a token's choices, and what they were divided by
            WEIGHTS: 4 * (rows + 2 * assignments + self.tokens),
            # int64: the source of a row; of an assignment its choice, row and source, and its place among all
            # choices; ends of tokens; counts, with one of padding
            INDICES: 8 * (rows + 4 * assignments + self.tokens + self.experts + 1),
        }

    def part(self, kept: Kept) -> str:
        """One of ``PARTS``, or a name that says what the storage holds beyond them; Z first where 2F = D."""
        shape, dtype = max(kept.tensors, key=lambda found: torch.Size(found[0]).numel())
        size, last = torch.Size(shape).numel(), shape[-1] if shape else 1
        if not dtype.is_floating_point:
            return INDICES
        if size == self.tokens * self.experts and last == self.experts:
            return SCORES
        if size == self.tokens * self.d_model and last == self.d_model:
            return INPUT if dtype is self.dtype else "input in another type"
        if len(shape) == 1 or last in (1, self.top_k):
            return WEIGHTS
        names = {self.d_model: "rows of width D", self.d_ff: "hidden rows", 2 * self.d_ff: Z}
        return names.get(last, "others")

    def parts(self, storages: list[Kept]) -> dict[str, int]:
        """Bytes by part, those of ``PARTS`` first."""
        found = dict.fromkeys(PARTS, 0)
        for kept in storages:
            name = self.part(kept)
            found[name] = found.get(name, 0) + kept.bytes
        return found


def kept_storages(run: Callable[[], Tensor], module: nn.Module) -> list[Kept]:
    """The storages that autograd keeps for the backward pass of ``run()``, each once, parameters left out.

    A tensor that an operator hides from autograd's hooks is not seen.
    """
    own = {p.untyped_storage().data_ptr() for p in module.parameters()}
    kept: dict[int, Kept] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own and storage.nbytes():
            found = kept.setdefault(storage.data_ptr(), Kept(storage.nbytes()))
            found.tensors.add((tuple(tensor.shape), tensor.dtype))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = run()
        found = list(kept.values())  # while the graph still holds them, no address is used twice
    del out
    return found


def saved_bytes(run: Callable[[], Tensor], module: nn.Module) -> int:
    """The bytes of :func:`kept_storages` together."""
    return sum(kept.bytes for kept in kept_storages(run, module))

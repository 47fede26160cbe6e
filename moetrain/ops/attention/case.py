"""The request to an attention backend and its plan; both are made once a forward pass, for all layers.

Shapes: B batch, S queries, N documents.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from moetrain.ops.attention.seen_keys import SeenKeys

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

NO_SINKS = "it has no sinks (model.attention_sinks)"


@dataclass(frozen=True)
class Case:
    """The description of one call of attention, without its values.

    ``seen`` None: plainly causal, or one query that sees all keys. ``batch`` rows of ``seq`` queries;
    ``heads``: of queries, of keys; each ``width`` wide. ``dtype`` is what the products run in. ``sinks``:
    whether each head has a logit of no key in its softmax.
    """

    seen: SeenKeys | None
    batch: int
    seq: int
    cached: int
    heads: tuple[int, int]
    width: int
    dtype: torch.dtype
    device: torch.device
    sinks: bool = False


class Runs(NamedTuple):
    """Documents as consecutive runs of tokens, all rows one after the other.

    ends_N1 int32 [N + 1]: 0, then the end of each run; runs that do not exist end where the last one does.
    longest: a bound on a run's tokens, known on the host.
    """

    ends_N1: Tensor
    longest: int


@dataclass(frozen=True)
class Plan:
    """The plan of one forward pass: a key of ``BACKENDS``, and what that backend has prepared."""

    backend: str
    seen: SeenKeys | None
    block_mask: BlockMask | None = None  # flex
    runs: Runs | None = None  # varlen

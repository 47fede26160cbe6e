"""RouterContext: everything a router may look at besides its input, and its source of noise.

Shapes: T = B * S tokens, flattened sequence by sequence.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor

from moetrain.moe.routing import RoutingRecord
from moetrain.ops.counter import mix


@dataclass(frozen=True)
class RouterContext:
    """What a router reads besides its input. Noise depends on ``sample_ids_B``, which are global.

    valid_T     bool; None where every token is valid.
    positions_T int64, each token's place in its sequence row (not in its document).
    group       ranks among which tokens are coupled; None: this process alone.
    prev        the previous MoE layer's record of the same forward pass.
    seen        tokens of each row that came in earlier calls, under generation with a cache.
    memory      what the layer keeps between such calls, by names of its own; None: there are none.
    """

    batch: int
    seq: int
    sample_ids_B: Tensor
    token_ids_T: Tensor | None = None
    valid_T: Tensor | None = None
    seed: int = 0
    step: int = 0
    layer: int = 0
    group: dist.ProcessGroup | None = None
    prev: RoutingRecord | None = None
    seen: int = 0
    memory: dict[str, Tensor] | None = None

    @staticmethod
    def default(batch: int, seq: int, device: torch.device | str = "cpu") -> RouterContext:
        """The context of a call that gives none: fresh samples 0 to ``batch`` - 1, no padding."""
        return RouterContext(batch, seq, torch.arange(batch, device=device))

    def at_layer(self, layer: int, prev: RoutingRecord | None) -> RouterContext:
        return replace(self, layer=layer, prev=prev)

    @property
    def positions_T(self) -> Tensor:
        return torch.arange(self.seq, device=self.sample_ids_B.device).repeat(self.batch)

    @property
    def sequence_ids_T(self) -> Tensor:
        """Row of the batch (0 to B - 1) of each token."""
        return torch.arange(self.batch, device=self.sample_ids_B.device).repeat_interleave(self.seq)

    def uniform(self, shape: tuple[int, ...], salt: int = 0) -> Tensor:
        """Noise in (0, 1), fp32, a pure function of (seed, step, layer, salt, sample id, position).

        ``shape`` is (T,) or (T, n). Recompute, micro-batching and every layout draw the same numbers.
        """
        if shape[0] != self.batch * self.seq:
            raise ValueError(f"uniform needs one row a token: {self.batch * self.seq}, not {shape[0]}")
        key = torch.zeros((), dtype=torch.int64, device=self.sample_ids_B.device)
        for part in (self.seed, self.step, self.layer, salt):
            key = mix(key + part)
        key_T = mix(mix(key + self.sample_ids_B).repeat_interleave(self.seq) + self.positions_T)
        if len(shape) > 1:
            columns = torch.arange(shape[1], device=key_T.device)
            key_T = mix(key_T[:, None] + columns)
        return ((key_T >> 41) & 0x7FFFFF).float() * 2.0**-23 + 2.0**-24

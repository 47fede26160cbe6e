"""RouterContext: everything a router may look at besides its input, and its source of noise.

Shapes: T = B * S tokens, flattened sequence by sequence.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor

from moetrain.moe.routing import RoutingRecord
from moetrain.ops.counter import mix


class LayerMemory(dict[str, Tensor]):
    """What one layer keeps of the tokens that generation has already seen, by names of its own."""

    def extend(self, name: str, new_BSX: Tensor) -> Tensor:
        """Keep the new tokens' rows; returns those of all tokens so far [B, N, X], the new ones last."""
        before = self.get(name)
        self[name] = new_BSX if before is None else torch.cat([before, new_BSX], 1)
        return self[name]


@dataclass(frozen=True)
class RouterContext:
    """What a router reads besides its input. Noise depends on ``sample_ids_B``, which are global.

    valid_T     bool; None where every token is valid.
    positions_T int64, each token's place in its sequence row (not in its document).
    group       ranks among which tokens are coupled; None: this process alone.
    prev        the previous MoE layer's record of the same forward pass.
    doc_ids_T   int64, the same number in a sequence row = the same document; None: rows are not divided.
    forced      a layer's place -> the experts that each token takes there, int64 [T, K], in the router's
                order; None: as routers choose. Padding's are any. Routers with ``replays`` obey.
    domain_ids_T  int64, the index of each token's domain among the corpus's; None: not known.
    seen        tokens of each row that came in earlier calls, under generation with a cache.
    memory      what the layer keeps between such calls; None: the sequences are whole.
    keys_ED     a vector of each expert, of the layers whose router goes by the experts' own weights.
    stream_BSD  the residual stream that the layer adds to, before its norm; for a layer whose router reads
                it (``Router.reads_stream``). None: the layer's input is all there is.
    moe_layers  the places of the decoder's MoE layers; empty: not known.
    responses_TE  what the layer's router asked of all experts (``Router.asks``), with a gradient, 0 for
                padding. None: it asked nothing, or has no layer around it.
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
    doc_ids_T: Tensor | None = None
    forced: Mapping[int, Tensor] | None = None
    domain_ids_T: Tensor | None = None
    seen: int = 0
    memory: LayerMemory | None = None
    keys_ED: Tensor | None = None
    stream_BSD: Tensor | None = None
    moe_layers: tuple[int, ...] = ()
    responses_TE: Tensor | None = None

    @staticmethod
    def default(batch: int, seq: int, device: torch.device | str = "cpu") -> RouterContext:
        """The context of a call that gives none: fresh samples 0 to ``batch`` - 1, no padding."""
        return RouterContext(batch, seq, torch.arange(batch, device=device))

    def at_layer(self, layer: int, prev: RoutingRecord | None) -> RouterContext:
        return replace(self, layer=layer, prev=prev, seen=0, memory=None)

    @property
    def forced_TK(self) -> Tensor | None:
        """The experts that this layer's tokens must take; None: as the router chooses."""
        return None if self.forced is None else self.forced[self.layer]

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
        key = self._key(self.step, salt)
        key_T = mix(mix(key + self.sample_ids_B).repeat_interleave(self.seq) + self.positions_T)
        if len(shape) > 1:
            columns = torch.arange(shape[1], device=key_T.device)
            key_T = mix(key_T[:, None] + columns)
        return _noise(key_T)

    def common_uniform(self, number: int, step: int, salt: int = 0) -> Tensor:
        """[``number``] of such noise, alike for all tokens and ranks: of (seed, ``step``, layer, salt)."""
        places = torch.arange(number, device=self.sample_ids_B.device)
        return _noise(mix(self._key(step, salt) + places))

    def _key(self, step: int, salt: int) -> Tensor:
        key = torch.zeros((), dtype=torch.int64, device=self.sample_ids_B.device)
        for part in (self.seed, step, self.layer, salt):
            key = mix(key + part)
        return key


def _noise(keys: Tensor) -> Tensor:
    return ((keys >> 41) & 0x7FFFFF).float() * 2.0**-23 + 2.0**-24

"""Keys and values of the tokens that generation has already seen, preallocated; and what routers keep.

Shapes: B batch, G key and value heads, S new tokens, C cached tokens, M capacity, H head width.
"""

from __future__ import annotations

from torch import Tensor

from moetrain.moe.context import LayerMemory


class LayerCache:
    """One layer's keys and values, and what its router, its feed-forward layer or a recurrence keeps.

    Memory is taken at the first use, in the dtype then seen.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.length = 0
        self.memory = LayerMemory()
        self._keys_BGMH: Tensor | None = None
        self._values_BGMH: Tensor | None = None

    def advance(self, tokens: int) -> int:
        """Count new tokens; returns how many there are then. Raises ValueError beyond the capacity."""
        end = self.length + tokens
        if end > self.capacity:
            raise ValueError(f"the cache holds {self.capacity} tokens; {end} were asked of it")
        self.length = end
        return end

    def append(self, k_BGSH: Tensor, v_BGSH: Tensor) -> tuple[Tensor, Tensor]:
        """Store S new tokens and return all C + S. Raises ValueError beyond the capacity.

        The two may differ in width and in the number of heads: an attention may keep what it makes keys and
        values of.
        """
        before = self.length
        end = self.advance(k_BGSH.shape[2])
        if self._keys_BGMH is None or self._values_BGMH is None:
            self._keys_BGMH, self._values_BGMH = (
                x.new_empty(*x.shape[:2], self.capacity, x.shape[3]) for x in (k_BGSH, v_BGSH)
            )
        self._keys_BGMH[:, :, before:end] = k_BGSH
        self._values_BGMH[:, :, before:end] = v_BGSH
        return self._keys_BGMH[:, :, :end], self._values_BGMH[:, :, :end]


class KVCache:
    """One :class:`LayerCache` a layer. Every row of the batch has the same length."""

    def __init__(self, num_layers: int, capacity: int) -> None:
        self.layers = [LayerCache(capacity) for _ in range(num_layers)]

    @property
    def length(self) -> int:
        """Tokens cached so far."""
        return self.layers[0].length

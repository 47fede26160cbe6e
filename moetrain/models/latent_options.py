"""The ``model.latent`` section of the typed configuration: multi-head latent attention."""

from dataclasses import dataclass, field
from typing import Optional

from moetrain.bounds import above, at_least

_WIDTH = at_least(1, 2**31 - 1)


@dataclass(frozen=True)
class LatentConfig:
    """Of ``model.attention=latent``, in elements; the defaults are DeepSeek-V2-Lite's.

    A head of queries and keys is ``qk_nope_head_dim`` elements that know no position and
    ``qk_rope_head_dim`` that turn with it; the latter are one vector for the keys of all heads.
    """

    # of the vector that queries are made of; null: they are made of the token itself
    q_lora_rank: Optional[int] = field(default=None, metadata=_WIDTH)
    kv_lora_rank: int = field(default=512, metadata=_WIDTH)  # of that which keys and values are made of
    qk_nope_head_dim: int = field(default=128, metadata=_WIDTH)
    qk_rope_head_dim: int = field(default=64, metadata=_WIDTH)  # even
    v_head_dim: int = field(default=128, metadata=_WIDTH)
    norm_eps: float = field(default=1e-6, metadata=above(0))  # of the two vectors' norms
